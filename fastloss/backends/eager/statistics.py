r"""What the logits say of each row, in plain torch ops, chunk by chunk.

With z the logits (after the softcap), m a row's maximum, p the row's softmax, y its label and w the class weights:

    s = Σ_c exp(z_c − m),   lse = m + log s,   H = log s − (Σ_c exp(z_c − m) (z_c − m)) / s

and the gradient of upstream gradients g of lse, z_y, H and Σ_c w_c z_c is

    ∂/∂z_c  =  p_c (g_lse − g_H (log p_c + H))  +  [c = y] g_zy  +  g_wz w_c,      log p_c = z_c − lse

Both terms of H are at least 0, so that nothing cancels. Where a masked logit of −inf makes p_c = 0, the logarithm is
replaced by a number: 0 times it is 0.

A chunk is read from memory once and stays in a cache; besides the gradient no buffer grows with N·V.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import ExternalLabel, LossOptions, RowStatistics, compute_dtype
from .accuracy import inside_label, rank_of
from .chunks import Chunk, Scratch, chunks, row_dtype
from .softmax import LOG2_E, capped, tanh_slope_
from .workers import for_each

__all__ = ["row_statistics_backward", "row_statistics_forward"]

# exp() of it is 0 even in float64; so is its product with that 0, as −inf's is not.
_LOG_OF_0 = -1e3


def row_statistics_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    *,
    entropy: bool,
    predicted: bool,
    every_row: bool,
    ranked: ExternalLabel | None = None,
) -> RowStatistics:
    """See :class:`fastloss.backends.contract.Backend`; every row is visited."""
    outer, classes, inner = logits.shape
    rows, cap, device = (outer, 1, inner), options.softcap, logits.device
    dtype, wide = compute_dtype(logits.dtype), row_dtype(device)
    lse = logits.new_empty(rows, dtype=wide)
    label_logit = capped(logits.gather(1, _label(logits, target, options)).to(dtype), cap).to(wide)
    row_entropy = torch.empty_like(lse) if entropy else None
    weighted_sum = torch.empty_like(lse) if options.label_smoothing else None
    row_predicted = logits.new_empty(rows, dtype=torch.int64) if predicted else None
    rank = None if ranked is None else ranked.position.new_empty(rows)
    class_weight = None if weight is None else weight.to(dtype)
    total_weight: Tensor | int = classes if weight is None else weight.sum(dtype=wide)

    def visit(chunk: Chunk) -> None:
        x = chunk.of(logits)
        buffer = Scratch("logits", dtype, device).like(x)
        if row_predicted is None:
            maximum = x.amax(1, keepdim=True)
        else:
            maximum, first = _first_maximum(x)
            chunk.of(row_predicted).copy_(first)
        if ranked is not None and rank is not None:
            mine, position = (chunk.of(number.view(rows)) for number in ranked[:2])
            chunk.of(rank).copy_(rank_of(x, mine.to(x.dtype), position, ranked.most_k))
        maximum = capped(maximum.to(dtype), cap)
        z = x if x.dtype == dtype else buffer.copy_(x)
        if cap is not None:
            z = torch.div(z, cap, out=buffer).tanh_().mul_(cap)
        # Subtracted before anything else, where it is exact: lse − z_y is to be as exact as torch's own log-softmax.
        maximum.masked_fill_(maximum == -torch.inf, 0)
        below = torch.sub(z, maximum, out=buffer)
        if weighted_sum is not None:
            chunk.of(weighted_sum).copy_(
                _weighted_sum(below, class_weight).to(wide) + total_weight * maximum.to(wide)
            )
        e = below if row_entropy is None else Scratch("softmax", dtype, device).like(x).copy_(below)
        e.mul_(LOG2_E).exp2_()
        total = e.sum(1, keepdim=True).to(wide)
        log_total = total.log()
        chunk.of(lse).copy_(log_total + maximum)
        if row_entropy is not None:
            mean = e.mul_(below.clamp_(min=_LOG_OF_0)).sum(1, keepdim=True) / total
            chunk.of(row_entropy).copy_(log_total - mean)

    for_each(chunks(logits.shape, logits.dtype), visit, device)
    return RowStatistics(
        lse.flatten(),
        label_logit.flatten(),
        None if row_entropy is None else row_entropy.flatten(),
        None if weighted_sum is None else weighted_sum.flatten(),
        None if row_predicted is None else row_predicted.flatten(),
        None if rank is None else rank.flatten(),
    )


def row_statistics_backward(
    upstreams: Sequence[Tensor | None],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    lse: Tensor,
    entropy: Tensor | None,
    *,
    inplace: bool = False,
) -> Tensor:
    """See :class:`fastloss.backends.contract.Backend`; the softmax is computed again."""
    rows, cap, device = (logits.shape[0], 1, logits.shape[2]), options.softcap, logits.device
    dtype = compute_dtype(logits.dtype)
    of_lse, of_label, of_entropy, of_sum = (None if u is None else u.reshape(rows) for u in upstreams)
    idle = torch.ones(rows, dtype=torch.bool, device=device)  # rows without a gradient, whatever they hold
    for upstream in (of_lse, of_label, of_entropy, of_sum):
        if upstream is not None:
            idle &= upstream == 0
    some_idle = device.type != "cpu" or bool(idle.any())  # elsewhere a look would make the host wait
    level = lse.new_zeros(rows) if of_lse is None else of_lse
    if of_entropy is not None and entropy is not None:
        level = level - of_entropy * entropy.view(rows)  # p (g_lse − g_H H − g_H log p)
        of_entropy = of_entropy.to(dtype)
    level = level.to(dtype)
    label = None if of_label is None else _label(logits, target, options)
    of_label = None if of_label is None else of_label.to(dtype)
    class_weight = None if weight is None else weight.to(dtype).view(1, -1, 1)
    of_sum = None if of_sum is None else of_sum.to(dtype)
    # lse in two parts, since the logits are near it and what is left of them must be exact.
    high = lse.view(rows).to(dtype)
    low = None if dtype == lse.dtype else (lse.view(rows) - high).to(dtype)
    gradient = logits if inplace else torch.empty_like(logits)

    def visit(chunk: Chunk) -> None:
        x = chunk.of(logits)
        p = chunk.of(gradient) if logits.dtype == dtype else Scratch("softmax", dtype, device).like(x)
        z = x if x.dtype == dtype else p.copy_(x)
        tanh = None
        if cap is not None:
            tanh = torch.div(z, cap, out=Scratch("tanh", dtype, device).like(x)).tanh_()
            z = torch.mul(tanh, cap, out=p)
        log_p = torch.sub(z, chunk.of(high), out=p)
        if low is not None:
            log_p.sub_(chunk.of(low))
        of_p: Tensor = chunk.of(level)
        if of_entropy is not None:
            of_log_p = Scratch("logits", dtype, device).like(x).copy_(log_p).clamp_(min=_LOG_OF_0)
            of_p = of_log_p.mul_(chunk.of(of_entropy)).neg_().add_(chunk.of(level))
        p = log_p.mul_(LOG2_E).exp2_().mul_(of_p)
        if of_sum is not None:
            if class_weight is None:
                p.add_(chunk.of(of_sum))
            else:
                p.addcmul_(chunk.of(of_sum), class_weight)
        if label is not None and of_label is not None:
            p.scatter_add_(1, chunk.of(label), chunk.of(of_label))
        if tanh is not None:
            tanh_slope_(p, tanh)  # ∂z/∂x
        if some_idle:
            p.masked_fill_(chunk.of(idle), 0)
        if logits.dtype != dtype:
            chunk.of(gradient).copy_(p)

    for_each(chunks(logits.shape, logits.dtype), visit, device)
    return gradient


def _label(logits: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """A label that can be used as an index, ``(outer, 1, inner)``; 0 where a row has none."""
    outer, classes, inner = logits.shape
    target = target.view(outer, 1, inner).long()
    return inside_label(target, target != options.ignore_index, classes)[0]


def _weighted_sum(z: Tensor, class_weight: Tensor | None) -> Tensor:
    """Σ_c w_c z_c, of z that is near 0 for the greatest: elsewhere float32 would lose their differences."""
    if class_weight is None:
        return z.sum(1, keepdim=True)
    with torch.autocast(z.device.type, enabled=False):
        return torch.matmul(class_weight, z).unsqueeze(1)


def _first_maximum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's maximum and its class, the first of equal ones, with NaN the greatest; ``(outer, 1, inner)`` each.

    torch's argmax looks at one logit at a time, its amax at a vector of them. So the maxima of short runs of classes
    come first, and only the first run that holds the row's maximum is searched.
    """
    classes = x.shape[1]
    run = min(classes, 128)
    whole = classes // run * run
    maxima = x.narrow(1, 0, whole).unflatten(1, (-1, run)).amax(2)
    if whole < classes:
        maxima = torch.cat([maxima, x.narrow(1, whole, classes - whole).amax(1, keepdim=True)], dim=1)
    best = maxima.argmax(1, keepdim=True)
    # The last run may be short, and begins earlier then: what it gains stands in a run without the maximum.
    start = (best * run).clamp_(max=classes - run)
    index = start + torch.arange(run, device=x.device).view(1, -1, 1)
    return maxima.gather(1, best), start + x.gather(1, index).argmax(1, keepdim=True)
