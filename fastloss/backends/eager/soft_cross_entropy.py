r"""Cross-entropy of soft targets, a value t_c for each class, in plain torch ops, chunk by chunk.

With u_c = (1−ε) t_c + ε/C, S = Σ w_c u_c, T = Σ w_c t_c, and the other names as in :mod:`.cross_entropy`, one row's
loss is, of logits z,

    L   =  S lse − Σ_c w_c u_c z_c  +  λ T lse²
    ∂L/∂z_c  =  p_c (S + 2 λ T lse) − w_c u_c
    ∂L/∂t_c  =  (1−ε) w_c (lse − z_c) + λ w_c lse²

and of probabilities y, where what has u_c = 0 adds nothing,

    L   =  −Σ_c w_c u_c log y_c,      ∂L/∂y_c = −w_c u_c / y_c,      ∂L/∂t_c = −(1−ε) w_c log y_c

(Cross-entropy of two distributions: Goodfellow et al., Deep Learning, 2016, §3.13.)

Both tensors are read from memory once, each gradient is written once, and no other buffer grows with N·V. A row's own
numbers are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import LossOptions, SoftForward, compute_dtype
from .chunks import Chunk, Scratch, Value, chunks, row_dtype
from .softmax import LN_2, exponents, is_resolved, sure_exponents, tanh_slope_
from .workers import for_each

__all__ = ["soft_cross_entropy_backward", "soft_cross_entropy_forward"]


def soft_cross_entropy_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    *,
    loss_dtype: torch.dtype,
    gradient: bool,
    target_gradient: bool,
    inplace: bool,
    divisor: float = 1.0,
) -> SoftForward:
    """See :class:`fastloss.backends.contract.Backend`."""
    scale = _mean_scale(input) if options.reduction == "mean" else 1.0
    results = _results(input, target, gradient, target_gradient, inplace)
    losses = _sweep(input, target, weight, options, scale / divisor, *results)
    loss = losses.flatten() if options.reduction == "none" else losses.sum() * scale
    # A copy in any case: what an autograd.Function returns must not be a view.
    return SoftForward(loss.to(loss_dtype, copy=True), *results, saved=())


def soft_cross_entropy_backward(
    upstream: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    saved: Sequence[Tensor],
    *,
    gradient: bool,
    target_gradient: bool,
    inplace: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """See :class:`fastloss.backends.contract.Backend`; nothing is saved, the softmax is computed again."""
    scale = upstream.to(compute_dtype(input.dtype))
    if options.reduction == "none":
        scale = scale.reshape(input.shape[0], 1, input.shape[2])
    elif options.reduction == "mean":
        scale = scale * _mean_scale(input)
    results = _results(input, target, gradient, target_gradient, inplace)
    _sweep(input, target, weight, options, scale, *results)
    return results


def _mean_scale(input: Tensor) -> float:
    """1 / rows; torch's mean over soft targets is one over rows, whatever they weigh."""
    rows = input.shape[0] * input.shape[2]
    return 1.0 / rows if rows else float("nan")


def _results(
    input: Tensor, target: Tensor, gradient: bool, target_gradient: bool, inplace: bool
) -> tuple[Tensor | None, Tensor | None]:
    of_input = (input if inplace else torch.empty_like(input)) if gradient else None
    return of_input, torch.empty_like(target) if target_gradient else None


def _sweep(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    scale: Value,
    gradient: Tensor | None,
    target_gradient: Tensor | None,
) -> Tensor:
    """The one visit to both tensors: every row's loss, and the gradients times ``scale``."""
    outer, classes, inner = input.shape
    device, dtype = input.device, torch.promote_types(compute_dtype(input.dtype), compute_dtype(target.dtype))
    losses = input.new_empty((outer, 1, inner), dtype=row_dtype(device))
    mixed = _Mixed(weight, options, classes, dtype)
    of_rows = _of_logits if options.from_logits else _of_probabilities

    def visit(chunk: Chunk) -> None:
        x = chunk.of(input)
        # What has the dtype of the arithmetic is worked on in its own place.
        in_place = gradient is not None and gradient is not input and gradient.dtype == dtype
        p = chunk.of(gradient) if in_place and gradient is not None else Scratch("softmax", dtype, device).like(x)
        d = None
        if target_gradient is not None:
            t_in_place = target_gradient.dtype == dtype
            d = chunk.of(target_gradient) if t_in_place else Scratch("target gradient", dtype, device).like(x)
        loss = of_rows(
            x, chunk.of(target), mixed, p, d, chunk.of_value(scale), options=options, wanted=gradient is not None
        )
        chunk.of(losses).copy_(loss)
        if gradient is not None and not in_place:
            chunk.of(gradient).copy_(p)
        if target_gradient is not None and d is not None and not t_in_place:
            chunk.of(target_gradient).copy_(d)

    for_each(chunks(input.shape, dtype), visit, device)
    return losses


class _Mixed:
    """The targets mixed with the uniform distribution, and weighted: w_c u_c, of one chunk after the other."""

    def __init__(self, weight: Tensor | None, options: LossOptions, classes: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.weight = None if weight is None else weight.to(dtype).view(1, -1, 1)
        self.kept = 1.0 - options.label_smoothing  # 1−ε
        self.spread = options.label_smoothing / max(classes, 1)  # ε/C

    def of(self, t: Tensor) -> Tensor:
        """w_c u_c in the dtype of the arithmetic: ``t`` itself, if that is what it is."""
        if t.dtype == self.dtype and self.weight is None and not self.spread:
            return t
        u = Scratch("target", self.dtype, t.device).like(t).copy_(t)
        if self.spread:
            u.mul_(self.kept).add_(self.spread)
        return u if self.weight is None else u.mul_(self.weight)

    def finish_(self, d: Tensor, scale: Value) -> None:
        """The target's gradient from (1−ε) times what it says of each class."""
        if self.weight is not None:
            d.mul_(self.weight)
        d.mul_(scale)


def _of_logits(
    x: Tensor,
    t: Tensor,
    mixed: _Mixed,
    p: Tensor,
    d: Tensor | None,
    scale: Value,
    *,
    options: LossOptions,
    wanted: bool,
) -> Tensor:
    """The rows' losses; in ``p``, if ``wanted``, the gradient of the input, and in ``d`` that of the target."""
    cap, z_scale, dtype = options.softcap, options.lse_square_scale, mixed.dtype
    u = mixed.of(t)
    product = Scratch("product", dtype, x.device).like(x) if d is None else d
    tanh = None
    if cap is not None:
        wide = x if x.dtype == dtype else p.copy_(x)  # a narrow quotient would be rounded before it is stored
        tanh = torch.div(wide, cap, out=Scratch("tanh", dtype, x.device).like(x)).tanh_()

    def logits() -> Tensor:
        if tanh is not None and cap is not None:
            return torch.mul(tanh, cap, out=p)
        return x if x.dtype == dtype else p.copy_(x)

    def sums() -> tuple[Tensor, Tensor]:
        """Σ w u (z − m), in units of ln 2, and Σ exp(z − m), where ``p`` holds the exponents."""
        dot = torch.mul(p, u, out=product).sum(1, keepdim=True)
        if d is not None:
            torch.mul(p, -LN_2, out=d)
        return dot, p.exp2_().sum(1, keepdim=True)

    settled = False
    if x.is_cpu:  # elsewhere a look at the sums would make the host wait
        m = exponents(logits(), p)
        dot, total = sums()
        settled = is_resolved(total)
    if not settled:
        m = logits().logsumexp(1, keepdim=True)
        sure_exponents(logits(), p)
        dot, total = sums()

    of_rows = row_dtype(x.device)
    level, log_total = u.sum(1, keepdim=True).to(of_rows), total.to(of_rows).log()  # S, lse − m
    loss = level * log_total - dot.to(of_rows) * LN_2
    slope = level
    if z_scale:
        lse = log_total + m
        mass = t if mixed.weight is None else torch.mul(t, mixed.weight, out=Scratch("mass", dtype, x.device).like(x))
        mass = mass.sum(1, keepdim=True, dtype=of_rows)  # T
        loss = loss + z_scale * mass * lse.square()
        slope = slope + 2 * z_scale * mass * lse
    if d is not None:
        d.add_(log_total.to(dtype))  # as it is, float64, it would widen a copy of d
        if mixed.spread:
            d.mul_(mixed.kept)
        if z_scale:
            d.add_((z_scale * lse.square()).to(dtype))
        mixed.finish_(d, scale)
    if wanted:
        p.mul_((slope * scale / total).to(dtype))
        if isinstance(scale, Tensor):
            p.addcmul_(scale.to(dtype), u, value=-1)
        else:
            p.sub_(u, alpha=scale)
        if tanh is not None:
            tanh_slope_(p, tanh)  # ∂z/∂x
    return loss


def _of_probabilities(
    x: Tensor,
    t: Tensor,
    mixed: _Mixed,
    p: Tensor,
    d: Tensor | None,
    scale: Value,
    *,
    options: LossOptions,
    wanted: bool,
) -> Tensor:
    """As :func:`_of_logits`, for probabilities."""
    u = mixed.of(t)
    y = x if x.dtype == mixed.dtype else p.copy_(x)
    product = Scratch("product", mixed.dtype, x.device).like(x)
    loss = torch.xlogy(u, y, out=product).sum(1, keepdim=True).neg_()
    if d is not None:
        torch.log(y, out=d).mul_(-mixed.kept)
        mixed.finish_(d, scale)
    if wanted:
        torch.div(u, y, out=p).mul_(-scale).masked_fill_(u == 0, 0)
    return loss
