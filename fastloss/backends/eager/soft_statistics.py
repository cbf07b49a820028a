r"""What logits and soft targets say of each row, in plain torch ops, chunk by chunk.

With z the logits (after the softcap), m a row's maximum, t its targets and w the class weights:

    lse = m + log Σ_c exp(z_c − m),   mass = Σ_c w_c t_c,   nll = mass (lse − m) + Σ_c w_c t_c (m − z_c)

The gradients are those of the contract's :class:`Backend`. Both tensors are read once, and each gradient is written
once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import ExternalLabel, LossOptions, SoftRowStatistics, compute_dtype
from .accuracy import rank_of
from .chunks import Chunk, Scratch, chunks, row_dtype
from .softmax import LOG2_E, capped, tanh_slope_
from .workers import for_each

__all__ = ["soft_statistics_backward", "soft_statistics_forward"]


def soft_statistics_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    *,
    ranked: ExternalLabel | None = None,
) -> SoftRowStatistics:
    """See :class:`fastloss.backends.contract.Backend`."""
    outer, classes, inner = logits.shape
    rows, cap, device = (outer, 1, inner), options.softcap, logits.device
    dtype, wide = torch.promote_types(compute_dtype(logits.dtype), compute_dtype(target.dtype)), row_dtype(device)
    lse = logits.new_empty(rows, dtype=wide)
    nll, mass = torch.empty_like(lse), torch.empty_like(lse)
    weighted_sum = torch.empty_like(lse) if options.label_smoothing else None
    rank = None if ranked is None else ranked.position.new_empty(rows)
    class_weight = None if weight is None else weight.to(dtype)
    total_weight: Tensor | int = classes if weight is None else weight.sum(dtype=wide)

    def visit(chunk: Chunk) -> None:
        x, t = chunk.of(logits), chunk.of(target)
        buffer = Scratch("logits", dtype, device).like(x)
        if ranked is not None and rank is not None:
            mine, position = (chunk.of(number.view(rows)) for number in ranked[:2])
            chunk.of(rank).copy_(rank_of(x, mine.to(x.dtype), position, ranked.most_k))
        maximum = capped(x.amax(1, keepdim=True).to(dtype), cap)
        maximum.masked_fill_(maximum == -torch.inf, 0)
        z = x if x.dtype == dtype else buffer.copy_(x)
        if cap is not None:
            z = torch.div(z, cap, out=buffer).tanh_().mul_(cap)
        below = torch.sub(z, maximum, out=buffer)
        u = Scratch("target", dtype, device).like(x)
        if weighted_sum is not None:
            # Not by a matrix product, which adds up in no good order: at thousands of classes the sum would show it.
            each = below if class_weight is None else torch.mul(below, class_weight.view(1, -1, 1), out=u)
            chunk.of(weighted_sum).copy_(each.sum(1, keepdim=True).to(wide) + total_weight * maximum.to(wide))
        u.copy_(t)
        if class_weight is not None:
            u.mul_(class_weight.view(1, -1, 1))
        total_u = u.sum(1, keepdim=True).to(wide)
        dot = u.mul_(below).sum(1, keepdim=True).to(wide)
        log_total = below.mul_(LOG2_E).exp2_().sum(1, keepdim=True).to(wide).log()
        chunk.of(lse).copy_(log_total + maximum)
        chunk.of(mass).copy_(total_u)
        chunk.of(nll).copy_(total_u * log_total - dot)

    for_each(chunks(logits.shape, dtype), visit, device)
    return SoftRowStatistics(
        lse.flatten(),
        nll.flatten(),
        mass.flatten(),
        None if weighted_sum is None else weighted_sum.flatten(),
        None if rank is None else rank.flatten(),
    )


def soft_statistics_backward(
    upstreams: Sequence[Tensor | None],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    lse: Tensor,
    mass: Tensor,
    *,
    gradient: bool,
    target_gradient: bool,
    inplace: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """See :class:`fastloss.backends.contract.Backend`."""
    rows, cap, device = (logits.shape[0], 1, logits.shape[2]), options.softcap, logits.device
    dtype = torch.promote_types(compute_dtype(logits.dtype), compute_dtype(target.dtype))
    zero = lse.new_zeros(rows)
    of_lse, of_nll, of_mass, of_sum = (zero if u is None else u.reshape(rows) for u in upstreams)
    level = (of_lse + of_nll * mass.view(rows)).to(dtype)
    of_nll, of_mass, of_sum = (number.to(dtype) for number in (of_nll, of_mass, of_sum))
    some_sum = upstreams[3] is not None
    w = None if weight is None else weight.to(dtype).view(1, -1, 1)
    # lse in two parts, as in `statistics`.
    high = lse.view(rows).to(dtype)
    low = None if dtype == lse.dtype else (lse.view(rows) - high).to(dtype)
    of_logits = (logits if inplace else torch.empty_like(logits)) if gradient else None
    of_target = torch.empty_like(target) if target_gradient else None

    def visit(chunk: Chunk) -> None:
        x, t = chunk.of(logits), chunk.of(target)
        p = Scratch("softmax", dtype, device).like(x)
        if of_logits is not None and of_logits.dtype == dtype:
            p = chunk.of(of_logits)
        z, tanh = (x if x.dtype == dtype else p.copy_(x)), None
        if cap is not None:
            tanh = torch.div(z, cap, out=Scratch("tanh", dtype, device).like(x)).tanh_()
            z = torch.mul(tanh, cap, out=p)
        log_p = torch.sub(z, chunk.of(high), out=p)
        if low is not None:
            log_p.sub_(chunk.of(low))
        if of_target is not None:
            d = torch.mul(log_p, -chunk.of(of_nll), out=Scratch("logits", dtype, device).like(x)).add_(
                chunk.of(of_mass)
            )
            chunk.of(of_target).copy_(d if w is None else d.mul_(w))
        if of_logits is None:
            return
        p = log_p.mul_(LOG2_E).exp2_().mul_(chunk.of(level))
        u = Scratch("target", dtype, device).like(x).copy_(t).mul_(-chunk.of(of_nll))
        if some_sum:
            u.add_(chunk.of(of_sum))
        p.add_(u) if w is None else p.addcmul_(u, w)
        if tanh is not None:
            tanh_slope_(p, tanh)  # ∂z/∂x
        if p.dtype != of_logits.dtype:
            chunk.of(of_logits).copy_(p)

    for_each(chunks(logits.shape, dtype), visit, device)
    return of_logits, of_target
