r"""The numbers of each row from which losses are put together, in plain torch ops, chunk by chunk.

With z the logits (scaled, and after the softcap), m a row's maximum, p the row's softmax, y its label and w the class
weights:

    s = Σ_c exp(z_c − m),   lse = m + log s,   H = log s − (Σ_c exp(z_c − m) (z_c − m)) / s

and the gradient of upstream gradients g of lse, z_y, H and Σ_c w_c z_c is

    ∂/∂z_c  =  p_c (g_lse − g_H (log p_c + H))  +  [c = y] g_zy  +  g_wz w_c,      log p_c = z_c − lse

With q = Σ_c exp(z_c − m)², which is at least 1 as s is, log Σ_c p_c² = log (q / s²). Upstream gradients g_q of it
and g_z of Σ_c z_c add

    2 g_q p_c (p_c / Σ_c p_c² − 1)  +  g_z

With w_y its label's weight, C classes, W = Σ_c w_c and λ = ``lse_square_scale``, a row's loss is

    hit (lse − z_y) + tail lse + spread (W lse − Σ_c w_c z_c),   hit = w_y (1−ε),  tail = w_y λ lse,  spread = ε/C

so that an upstream gradient g of it is one of each number: g (hit + 2 tail + spread W) of lse, −g hit of z_y, and
−g spread of Σ_c w_c z_c. The z-loss is tail lse.

Both terms of H are at least 0, so that nothing cancels. Where a masked logit of −inf makes p_c = 0, the logarithm is
replaced by a number: 0 times it is 0.

A chunk is read from memory once and stays in a cache; besides the gradient no buffer grows with N·V. The sweeps here
serve soft targets too (``soft_statistics.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import (
    ExternalLabel,
    LossInputs,
    PartUpstreams,
    RowStatistics,
    RowUpstreams,
    Statistics,
    WantedNumbers,
    WantedParts,
    compute_dtype,
)
from .accuracy import inside_label, rank_of, run_maxima
from .chunks import Chunk, Scratch, chunks, row_dtype
from .sweep import LOG2_E, Piece, Scaling, scaled, scaling_of, sweep, times
from .workers import for_each

__all__ = [
    "row_statistics_backward",
    "row_statistics_forward",
    "statistics_backward",
    "statistics_forward",
    "sweep_softmax",
    "visit_rows",
]

# exp() of it is 0 even in float64; so is its product with that 0, as −inf's is not.
_LOG_OF_0 = -1e3


def statistics_forward(inputs: LossInputs, wanted: WantedParts, *, loss_dtype: torch.dtype) -> Statistics:
    """See :class:`fastloss.backends.contract.Backend`; every row is visited."""
    rows, dtype = row_statistics_forward(inputs, wanted.numbers()), compute_dtype(inputs.input.dtype)
    counted, divisor, total, hit, tail, spread = _terms(inputs, rows.lse)
    value = hit * (rows.lse - rows.label_logit)
    value = value if tail is None else value + tail * rows.lse
    if rows.weighted_sum is not None:
        value = value + spread * (total * rows.lse - rows.weighted_sum)

    def reduced(value: Tensor) -> Tensor:
        value = value if counted is None else torch.where(counted, value, 0.0)
        return (value.sum() / divisor if inputs.options.is_reduced else value).to(loss_dtype)

    z_loss = reduced(rows.lse * (0.0 if tail is None else tail)) if wanted.z_loss else None
    lse = rows.lse.to(dtype, copy=True) if wanted.lse else None
    squares = rows.log_sum_sq_probs
    entropy, log_sum_sq_probs = (None if n is None else n.to(dtype, copy=True) for n in (rows.entropy, squares))
    mean_logit = None if rows.logit_sum is None else (rows.logit_sum / inputs.input.shape[1]).to(dtype)
    predicted, correct = rows.predicted, None
    if predicted is not None and wanted.correct:
        correct = predicted == inputs.target
        correct = correct if counted is None else correct & counted
    predicted = predicted if wanted.predicted else None
    return Statistics(
        *(reduced(value), z_loss, lse, entropy, predicted, correct, log_sum_sq_probs, mean_logit),
        saved=(rows.lse, rows.entropy, squares),
    )


def statistics_backward(upstreams: PartUpstreams, inputs: LossInputs, saved: Sequence[Tensor | None]) -> Tensor:
    """See :class:`fastloss.backends.contract.Backend`; the softmax is computed again."""
    of_loss, of_z_loss, of_lse, of_entropy, of_squares, of_mean = upstreams
    lse = saved[0]
    assert lse is not None
    of_label = of_sum = None
    if of_loss is not None or of_z_loss is not None:
        counted, divisor, total, hit, tail, spread = _terms(inputs, lse)

        def of_row(upstream: Tensor, slope: Any) -> Tensor:
            upstream = upstream.to(lse.dtype).flatten() / divisor
            idle = upstream == 0 if counted is None else (upstream == 0) | ~counted  # a row may hold NaN then
            return torch.where(idle, 0.0, upstream * slope).expand(lse.shape)

        slope = 0.0 if tail is None else 2 * tail
        parts = [] if of_lse is None else [of_lse.to(lse.dtype).flatten()]
        if of_z_loss is not None:
            parts.append(of_row(of_z_loss, slope))
        if of_loss is not None:
            of_label = of_row(of_loss, -hit)
            if inputs.options.label_smoothing:
                of_sum = of_row(of_loss, -spread)
            parts.append(of_row(of_loss, hit + slope + spread * total))
        of_lse = sum(parts[1:], parts[0])
    of_logits = None if of_mean is None else of_mean.to(lse.dtype) / inputs.input.shape[1]
    of_rows = RowUpstreams(of_lse, of_label, of_entropy, of_sum, of_squares, of_logits)
    return row_statistics_backward(of_rows, inputs, saved, inplace=False)


class _Terms(NamedTuple):
    """The terms of the rows' losses, as at the top of this file: ``(rows,)``, or one number for all rows."""

    counted: Tensor | None  # None: every row
    divisor: Any  # of the loss, and of its gradient
    total: Any  # W
    hit: Any
    tail: Any  # None: 0
    spread: Any


def _terms(inputs: LossInputs, lse: Tensor) -> _Terms:
    logits, target, weight, options = inputs
    rows, classes, labels, eps = target.numel(), logits.shape[1], target.long(), options.label_smoothing
    counted = labels != options.ignore_index
    every_row = target.is_cpu and bool(counted.all())  # elsewhere the host would have to wait
    w: Any = 1.0 if every_row else counted.to(lse.dtype)
    if weight is not None:
        w = w * weight.to(lse.dtype)[_label(inputs).flatten()]
    if not target.is_cpu:
        w = w.masked_fill(counted & ((labels < 0) | (labels >= classes)), float("nan"))
    divisor: Any = 1.0
    if options.reduction == "mean":
        divisor = w.sum() if isinstance(w, Tensor) else rows
    return _Terms(
        None if every_row else counted,
        divisor,
        classes if weight is None else weight.sum(dtype=lse.dtype),
        w * (1 - eps),
        w * options.lse_square_scale * lse if options.lse_square_scale else None,
        eps / classes,
    )


def row_statistics_forward(
    inputs: LossInputs, wanted: WantedNumbers, ranked: ExternalLabel | None = None
) -> RowStatistics:
    """See :class:`fastloss.backends.contract.Backend`; every row is visited."""
    logits = inputs.input
    dtype = compute_dtype(logits.dtype)
    z_y = scaled(logits.gather(1, _label(inputs)).to(dtype), scaling_of(inputs.options, logits.device))
    names = ["lse", *(name for name in wanted._fields[1:] if getattr(wanted, name))]
    numbers = visit_rows(names, inputs, ranked, dtype, soft=False)
    numbers["label_logit"] = z_y.to(row_dtype(z_y.device)).flatten()
    return RowStatistics(**{**dict.fromkeys(RowStatistics._fields), **numbers})


def visit_rows(
    names: Iterable[str], inputs: LossInputs, ranked: ExternalLabel | None, dtype: torch.dtype, *, soft: bool
) -> dict[str, Any]:
    """Compute numbers of each row in one sweep over the logits and, if ``soft``, the targets.

    Returns those named, which are fields of the contract's row statistics, ``(rows,)`` each; and ``weighted_sum`` and
    ``rank`` where the options and ``ranked`` ask for them.
    """
    logits, target, weight, options = inputs
    outer, classes, inner = logits.shape
    rows, device, wide = (outer, 1, inner), logits.device, row_dtype(logits.device)
    scaling = scaling_of(options, device)
    numbers = {name: logits.new_empty(rows, dtype=torch.int64 if name == "predicted" else wide) for name in names}
    if options.label_smoothing:
        numbers["weighted_sum"] = logits.new_empty(rows, dtype=wide)
    if ranked is not None:
        numbers["rank"] = logits.new_empty(rows, dtype=torch.int64)
    class_weight = None if weight is None else weight.to(dtype)
    total_weight: Tensor | int = classes if weight is None else weight.sum(dtype=wide)

    def visit(chunk: Chunk) -> None:
        x, results = chunk.of(logits), {name: chunk.of(number) for name, number in numbers.items()}
        buffer = Scratch("softmax", dtype, device).like(x)
        if "predicted" in results:
            maximum, first = _first_maximum(x)
            results["predicted"].copy_(first)
        else:
            maximum = x.amax(1, keepdim=True)
        if ranked is not None:
            label_logit, position = (chunk.of(number.view(rows)) for number in ranked[:2])
            results["rank"].copy_(rank_of(x, label_logit.to(x.dtype), position, ranked.most_k))
        maximum = scaled(maximum.to(dtype), scaling)
        z = x if x.dtype == dtype else buffer.copy_(x)
        if scaling.capped:
            z = torch.div(z, scaling.divisor, out=buffer).tanh_().mul_(scaling.outer)
        elif options.is_scaled:
            z = torch.mul(z, scaling.outer, out=buffer)
        if "logit_sum" in results:
            results["logit_sum"].copy_(z.sum(1, keepdim=True))
        # Subtracted before anything else, where it is exact: lse − z_y is to be as exact as torch's own log-softmax.
        maximum.masked_fill_(maximum == -torch.inf, 0)
        below = torch.sub(z, maximum, out=buffer)
        if "weighted_sum" in results:
            below_sum = _weighted_sum(below, class_weight, exact=soft).to(wide)
            results["weighted_sum"].copy_(below_sum + total_weight * maximum.to(wide))
        if soft:
            u = Scratch("target", dtype, device).like(x).copy_(chunk.of(target))
            if class_weight is not None:
                u.mul_(class_weight.view(1, -1, 1))
            mass = u.sum(1, keepdim=True).to(wide)
            dot = u.mul_(below).sum(1, keepdim=True).to(wide)
        e = torch.mul(below, LOG2_E, out=Scratch("logits", dtype, device).like(x) if "entropy" in results else below)
        # In float64 for Σ p²: where the greatest p is near 1, its gradient is a difference of numbers near 1.
        added_in = wide if "log_sum_sq_probs" in results else None
        total = e.exp2_().sum(1, keepdim=True, dtype=added_in).to(wide)
        log_total = total.log()
        results["lse"].copy_(log_total + maximum)
        if "log_sum_sq_probs" in results:
            squares = torch.mul(e, e, out=Scratch("target", dtype, device).like(x) if "entropy" in results else e)
            results["log_sum_sq_probs"].copy_((squares.sum(1, keepdim=True, dtype=added_in) / total / total).log())
        if "entropy" in results:
            mean = e.mul_(below.clamp_(min=_LOG_OF_0)).sum(1, keepdim=True) / total
            results["entropy"].copy_(log_total - mean)
        if soft:
            results["mass"].copy_(mass)
            results["nll"].copy_(mass * log_total - dot)

    for_each(chunks(logits.shape, dtype), visit, device)
    return {name: number.flatten() for name, number in numbers.items()}


def _weighted_sum(z: Tensor, class_weight: Tensor | None, *, exact: bool) -> Tensor:
    """Return Σ_c w_c z_c, of z near 0 for the greatest: elsewhere float32 would lose their differences.

    ``exact``: not by a matrix product, which adds up in no good order and would show it at thousands of classes.
    """
    if class_weight is None:
        return z.sum(1, keepdim=True)
    if exact:
        product = Scratch("target", z.dtype, z.device).like(z)
        return torch.mul(z, class_weight.view(1, -1, 1), out=product).sum(1, keepdim=True)
    with torch.autocast(z.device.type, enabled=False):
        return torch.matmul(class_weight, z).unsqueeze(1)


def row_statistics_backward(
    upstreams: Sequence[Tensor | None], inputs: LossInputs, saved: Sequence[Tensor | None], *, inplace: bool
) -> Tensor:
    """See :class:`fastloss.backends.contract.Backend`; the softmax is computed again."""
    logits, _, weight, options = inputs
    lse, entropy, log_sum_sq_probs = saved
    assert lse is not None
    rows, dtype = (logits.shape[0], 1, logits.shape[2]), compute_dtype(logits.dtype)
    scaling = scaling_of(options, logits.device)
    of_rows = RowUpstreams(*(None if u is None else times(u.reshape(rows), scaling.slope) for u in upstreams))
    of_lse, of_label, of_entropy, of_sum, of_squares, of_logits = of_rows
    idle = torch.ones(rows, dtype=torch.bool, device=logits.device)  # rows without a gradient, whatever they hold
    for upstream in of_rows[:-1]:
        if upstream is not None:
            idle &= upstream == 0
    without_p = idle  # whose gradient, if they have one, is that of Σ z alone
    if of_logits is not None:
        idle = idle & (of_logits == 0)
    some_idle = not idle.is_cpu or bool(idle.any())  # elsewhere reading them would make the host wait
    level = lse.new_zeros(rows) if of_lse is None else of_lse
    if of_entropy is not None and entropy is not None:
        level = level - of_entropy * entropy.view(rows)  # p (g_lse − g_H H − g_H log p)
        of_entropy = of_entropy.neg().to(dtype)
    if of_squares is not None and log_sum_sq_probs is not None:
        level = level - 2 * of_squares  # p (g_lse − 2 g_q + p 2 g_q / Σ p²)
        of_squares = (2 * of_squares * (-log_sum_sq_probs.view(rows)).exp()).to(dtype)
    level = level.to(dtype)
    label = None if of_label is None else _label(inputs)
    of_label = None if of_label is None else of_label.to(dtype)
    class_weight = None if weight is None else weight.to(dtype).view(1, -1, 1)
    of_sum, of_logits = (None if u is None else u.to(dtype) for u in (of_sum, of_logits))
    gradient = logits if inplace else torch.empty_like(logits)

    def work(chunk: Chunk, log_p: Tensor) -> None:
        of_p = chunk.of(level)
        if of_entropy is not None:
            of_log_p = torch.clamp(log_p, min=_LOG_OF_0, out=Scratch("logits", dtype, log_p.device).like(log_p))
            of_p = of_log_p.mul_(chunk.of(of_entropy)).add_(of_p)
        p = log_p.mul_(LOG2_E).exp2_()
        if of_squares is not None:
            of_p = torch.mul(p, chunk.of(of_squares), out=Scratch("target", dtype, p.device).like(p)).add_(of_p)
        p.mul_(of_p)
        if of_logits is not None:
            p.masked_fill_(chunk.of(without_p), 0).add_(chunk.of(of_logits))
        if of_sum is not None:
            p.add_(chunk.of(of_sum)) if class_weight is None else p.addcmul_(chunk.of(of_sum), class_weight)
        if label is not None and of_label is not None:
            p.scatter_add_(1, chunk.of(label), chunk.of(of_label))

    sweep_softmax(logits, dtype, scaling, lse, work, gradient, zero_rows=idle if some_idle else None)
    return gradient


def sweep_softmax(
    logits: Tensor,
    dtype: torch.dtype,
    scaling: Scaling,
    lse: Tensor,
    work: Callable[[Chunk, Tensor], object],
    gradient: Tensor | None,
    zero_rows: Tensor | None = None,
) -> None:
    """Call ``work`` with every chunk and its log p; where there is a ``gradient``, it writes that of z over log p.

    ``lse`` is ``(rows,)``; the other arguments are those of :func:`.sweep.sweep`.
    """
    lse = lse.view(logits.shape[0], 1, logits.shape[2])
    # lse in two parts, since the logits are near it and the difference must be exact.
    high = lse.to(dtype)
    low = None if dtype == lse.dtype else (lse - high).to(dtype)
    unscaled = scaling.capped or (not isinstance(scaling.outer, Tensor) and scaling.outer == 1.0)

    def with_log_p(chunk: Chunk, piece: Piece) -> None:
        z = piece.z if unscaled else torch.mul(piece.z, piece.unit, out=piece.p)
        log_p = torch.sub(z, chunk.of(high), out=piece.p)
        work(chunk, log_p if low is None else log_p.sub_(chunk.of(low)))

    sweep(logits, dtype, scaling, with_log_p, gradient, zero_rows=zero_rows, reads_once=True)


def _label(inputs: LossInputs) -> Tensor:
    """Return labels that can be used as an index, ``(outer, 1, inner)``; 0 for a row without one."""
    outer, classes, inner = inputs.input.shape
    target = inputs.target.view(outer, 1, inner).long()
    return inside_label(target, target != inputs.options.ignore_index, classes)[0]


def _first_maximum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's maximum, or NaN, and its first class; ``(outer, 1, inner)`` each.

    torch's argmax reads one logit at a time, its amax a vector of them. So the maxima of short runs of classes
    come first, and only the first run that holds the row's maximum is searched.
    """
    classes = x.shape[1]
    run = min(classes, 128)
    maxima = run_maxima(x, run)
    best = maxima.argmax(1, keepdim=True)
    # The last run may be short, and begins earlier then: the classes that it gains are in a run without the maximum.
    start = (best * run).clamp_(max=classes - run)
    index = start + torch.arange(run, device=x.device).view(1, -1, 1)
    return maxima.gather(1, best), start + x.gather(1, index).argmax(1, keepdim=True)
