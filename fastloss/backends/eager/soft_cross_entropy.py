r"""Cross-entropy of soft targets, a value t_c for each class, in plain torch ops, chunk by chunk.

With u_c = (1−ε) t_c + ε/C, S = Σ w_c u_c, T = Σ w_c t_c, and the other names as in :mod:`.cross_entropy`, one row's
loss is, of logits z,

    L   =  S lse − Σ_c w_c u_c z_c  +  λ T lse²
    ∂L/∂z_c  =  p_c (S + 2 λ T lse) − w_c u_c
    ∂L/∂t_c  =  (1−ε) w_c (lse − z_c) + λ w_c lse²

and of probabilities y, where a class with u_c = 0 adds nothing,

    L   =  −Σ_c w_c u_c log y_c,      ∂L/∂y_c = −w_c u_c / y_c,      ∂L/∂t_c = −(1−ε) w_c log y_c

(Cross-entropy of two distributions: Goodfellow et al., Deep Learning, 2016, §3.13.)

Both tensors are read from memory once, each gradient is written once, and no other buffer grows with N·V. A row's own
numbers are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import LossInputs, SoftForward, WantedGradients, compute_dtype
from .chunks import Chunk, Scratch, Value, row_dtype
from .sweep import LN_2, Piece, chunk_buffer, scaling_of, sweep

__all__ = ["soft_cross_entropy_backward", "soft_cross_entropy_forward"]


def soft_cross_entropy_forward(
    inputs: LossInputs, wanted: WantedGradients, *, loss_dtype: torch.dtype, divisor: float = 1.0
) -> SoftForward:
    """See :class:`fastloss.backends.contract.Backend`."""
    reduction, results = inputs.options.reduction, wanted.tensors(inputs)
    scale = _mean_scale(inputs.input) if reduction == "mean" else 1.0
    losses = _SoftLoss(inputs, scale / divisor, *results).compute()
    loss = losses.flatten() if reduction == "none" else losses.sum() * scale
    # A copy in any case: an autograd.Function must not return a view.
    row_loss = losses if wanted.input and inputs.options.from_logits and not wanted.inplace else None
    return SoftForward(loss.to(loss_dtype, copy=True), *results, saved=(), row_loss=row_loss)


def soft_cross_entropy_backward(
    upstream: Tensor, inputs: LossInputs, saved: Sequence[Tensor], wanted: WantedGradients
) -> tuple[Tensor | None, Tensor | None]:
    """See :class:`fastloss.backends.contract.Backend`; nothing is saved, the softmax is computed again."""
    input, reduction, results = inputs.input, inputs.options.reduction, wanted.tensors(inputs)
    scale = upstream.to(compute_dtype(input.dtype))
    if reduction == "none":
        scale = scale.reshape(input.shape[0], 1, input.shape[2])
    elif reduction == "mean":
        scale = scale * _mean_scale(input)
    _SoftLoss(inputs, scale, *results).compute()
    return results


def _mean_scale(input: Tensor) -> float:
    """Return 1 / rows: torch's mean over soft targets is one over rows, whatever they weigh."""
    rows = input.shape[0] * input.shape[2]
    return 1.0 / rows if rows else float("nan")


class _SoftLoss:
    """Computes every row's loss, and the gradients times ``scale``; both tensors are read once."""

    def __init__(
        self, inputs: LossInputs, scale: Value, gradient: Tensor | None, target_gradient: Tensor | None
    ) -> None:
        input, target, weight, options = inputs
        self.input, self.target, self.options, self.scale = input, target, options, scale
        self.scaling = scaling_of(options, input.device)
        self.gradient, self.target_gradient = gradient, target_gradient
        self.dtype = torch.promote_types(compute_dtype(input.dtype), compute_dtype(target.dtype))
        self.row_dtype = row_dtype(input.device)
        self.weight = None if weight is None else weight.to(self.dtype).view(1, -1, 1)
        self.target_share = 1.0 - options.label_smoothing  # 1−ε
        self.smoothing = options.label_smoothing / max(input.shape[1], 1)  # ε/C

    def compute(self) -> Tensor:
        """Return the losses ``(outer, 1, inner)``, and write the gradients."""
        outer, _, inner = self.input.shape
        losses = self.input.new_empty((outer, 1, inner), dtype=self.row_dtype)
        visit = self._visit_logits if self.options.from_logits else self._visit_probabilities

        def work(chunk: Chunk, piece: Piece) -> None:
            result, d = self.target_gradient, None
            if result is not None:
                d = chunk_buffer("target gradient", self.dtype, chunk, piece.x, result)
            t, scale = chunk.of(self.target), chunk.of_value(self.scale)
            chunk.of(losses).copy_(visit(piece, t, self._mixed(t), d, scale))
            if d is None or result is None:
                return
            if self.weight is not None:
                d.mul_(self.weight)
            d.mul_(scale)
            if d.dtype != result.dtype:
                chunk.of(result).copy_(d)

        sweep(self.input, self.dtype, self.scaling, work, self.gradient)
        return losses

    def _mixed(self, t: Tensor) -> Tensor:
        """Return w_c u_c in the dtype of the arithmetic: ``t`` itself where nothing changes."""
        if t.dtype == self.dtype and self.weight is None and not self.smoothing:
            return t
        u = self._scratch("target", t).copy_(t)
        if self.smoothing:
            u.mul_(self.target_share).add_(self.smoothing)
        return u if self.weight is None else u.mul_(self.weight)

    def _visit_logits(self, piece: Piece, t: Tensor, u: Tensor, d: Tensor | None, scale: Value) -> Tensor:
        """Return the losses of a chunk whose w_c u_c are ``u``; write ∂L/∂t_c / w_c to ``d``, and ∂L/∂z to ``p``."""
        p, z_scale, dtype = piece.p, self.options.lse_square_scale, self.dtype
        product = self._scratch("product", p) if d is None else d

        def sums() -> tuple[Tensor, Tensor]:
            """Return Σ exp(z − m), and Σ w u (z − m) in units of ln 2, from the exponents."""
            dot = torch.mul(p, u, out=product).sum(1, keepdim=True)
            if d is not None:
                torch.mul(p, -LN_2, out=d)
            return p.exp2_().sum(1, keepdim=True), dot

        total, dot, *level = piece.exponentials(sums, level=bool(z_scale))
        u_sum, log_total = u.sum(1, keepdim=True).to(self.row_dtype), total.to(self.row_dtype).log()  # S, lse − m
        loss = u_sum * log_total - dot.to(self.row_dtype) * LN_2
        a = u_sum  # the coefficient of p
        if z_scale:
            lse = log_total + level[0]
            mass = t if self.weight is None else torch.mul(t, self.weight, out=self._scratch("mass", p))
            mass = mass.sum(1, keepdim=True, dtype=self.row_dtype)  # T
            loss = loss + z_scale * mass * lse.square()
            a = a + 2 * z_scale * mass * lse
        if d is not None:
            d.add_(log_total.to(dtype))  # as it is, float64, it would widen a copy of d
            if self.smoothing:
                d.mul_(self.target_share)
            if z_scale:
                d.add_((z_scale * lse.square()).to(dtype))
        if self.gradient is not None:
            scale = scale * self.scaling.slope
            p.mul_((a * scale / total).to(dtype))
            if isinstance(scale, Tensor):
                p.addcmul_(scale.to(dtype), u, value=-1)
            else:
                p.sub_(u, alpha=scale)
        return loss

    def _visit_probabilities(self, piece: Piece, t: Tensor, u: Tensor, d: Tensor | None, scale: Value) -> Tensor:
        """Do the same as :meth:`_visit_logits` for probabilities."""
        y = piece.z
        loss = torch.xlogy(u, y, out=self._scratch("product", y)).sum(1, keepdim=True).neg_()
        if d is not None:
            torch.log(y, out=d).mul_(-self.target_share)
        if self.gradient is not None:
            torch.div(u, y, out=piece.p).mul_(-scale).masked_fill_(u == 0, 0)
        return loss

    def _scratch(self, use: str, like: Tensor) -> Tensor:
        return Scratch(use, self.dtype, like.device).like(like)
