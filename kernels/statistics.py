r"""Row statistics: the numbers of each row that losses are composed of, and their gradient.

The formulas and their names are in ``backends/eager/statistics.py``. With N rows, V classes and b bytes a logit,
device memory moves (labels and the numbers of each row left out):

=========  =======  ===================================================================
forward    N·V·b    each logit read once, in one launch; one more for N rows' losses
backward   2·N·V·b  read once, gradient written once, in one launch from any upstream
=========  =======  ===================================================================

Logits lose their row's maximum (in backward, lse in two parts) before they are multiplied by log2(e), so that z_y and
lse are in the same units and their difference is as exact as the sum of exponentials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.backends.contract import (
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

from .arguments import (
    Scaling,
    Strided,
    block,
    cap_and_factor,
    form_of,
    inside,
    pointers,
    row_offsets,
    scaling,
    strided,
    tile_rows,
)
from .launch import launch, on_device, scratch
from .row_loss import Partial, row_results, sum_of_weights
from .soft_cross_entropy import narrowed
from .tile_helpers import (
    LOG2_E,
    LOG_OF_0,
    Scales,
    before_label,
    exponential,
    finite,
    finite_maximum,
    fp64,
    in_units,
    labels,
    last_to_end,
    log_softmax,
    of_logits,
    online_step,
    rank_in_tile,
    rank_with_nans,
    rows_to_read,
    scales_of,
    softcapped,
    softcapped_rows,
    weighted_sums,
)
from .tiles import ALL_REGISTERS, FUSED, in_blocks, plan, power_of_2

__all__ = [
    "Ranked",
    "load_label",
    "row_statistics_backward",
    "row_statistics_forward",
    "statistics_backward",
    "statistics_forward",
]

_NO_CLASS = tl.constexpr(0x7FFFFFFF)
_BLOCK = 1024  # rows of a program that makes their losses


def statistics_forward(inputs: LossInputs, wanted: WantedParts, *, loss_dtype: torch.dtype) -> Statistics:
    """See :class:`fastloss.backends.contract.Backend`. Two launches: the visit, and one for the rows' losses."""
    logits, target, weight, options = inputs
    rows, device, dtype = target.numel(), logits.device, compute_dtype(logits.dtype)
    of = _visited(inputs, wanted.numbers(), None)

    def empty(wanted: bool, dtype: torch.dtype, shape: int | tuple[int, ...] = rows) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=device) if wanted else None

    shape = () if options.is_reduced else rows
    out = _Parts(
        torch.empty(shape, dtype=loss_dtype, device=device),
        empty(wanted.z_loss, loss_dtype, shape),
        empty(wanted.lse, dtype),
        empty(wanted.entropy, dtype),
        empty(wanted.correct, torch.bool),
        empty(wanted.log_sum_sq_probs, dtype),
        empty(wanted.mean_logit, dtype),
        torch.empty(3, dtype=torch.float64, device=device),
    )
    programs = triton.cdiv(rows, _BLOCK)
    constants = {
        "BLOCK": _BLOCK,
        "G_PAD": min(power_of_2(programs), _BLOCK),
        "F": form_of(weight, replace(options, logit_scale=1.0, temperature=1.0), REDUCTION=options.reduction),
    }
    with on_device(logits):
        sums, _, counter = scratch(device, 2 * programs, 1) if options.is_reduced else (None, None, None)
        numbers = (rows, logits.shape[1], options.ignore_index, options.label_smoothing, options.lse_square_scale)
        launch(
            _losses_of_rows,
            (programs,),
            (target, weight, of, out, Partial(sums, None, counter), *numbers),
            {**constants, "num_warps": 4, **FUSED},
        )
    predicted = of.predicted if wanted.predicted else None
    saved = (of.lse, of.entropy, of.log_sum_sq_probs, out.totals)
    return Statistics(*out[:4], predicted, *out[4:7], saved=saved)


def statistics_backward(upstreams: PartUpstreams, inputs: LossInputs, saved: Sequence[Tensor | None]) -> Tensor:
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    loss, z_loss, of_lse, of_entropy, of_squares, of_mean = map(_column, upstreams)
    nothing = _column(None)
    of = _Upstreams(loss, z_loss, of_lse, nothing, of_entropy, nothing, of_squares, of_mean)
    return _gradient(of, inputs, saved, torch.empty_like(inputs.input))


def row_statistics_forward(
    inputs: LossInputs, wanted: WantedNumbers, ranked: ExternalLabel | None = None
) -> RowStatistics:
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    of = RowStatistics(*_visited(inputs, wanted, ranked))
    if of.weighted_sum is not None:
        total = inputs.input.shape[1] if inputs.weight is None else inputs.weight.sum(dtype=torch.float64)
        of.weighted_sum.add_(total * torch.where(of.label_logit.isfinite(), of.label_logit, 0.0))
    return of


def row_statistics_backward(
    upstreams: Sequence[Tensor | None], inputs: LossInputs, saved: Sequence[Tensor | None], *, inplace: bool
) -> Tensor:
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    of_rows = _Upstreams(_column(None), _column(None), *map(_column, RowUpstreams(*upstreams)))
    result = inputs.input if inplace else torch.empty_like(inputs.input)
    return _gradient(of_rows, inputs, (*saved, None), result)


def _visited(inputs: LossInputs, wanted: WantedNumbers, ranked: ExternalLabel | None) -> _Statistics:
    """Return the numbers of each row; Σ_c w_c z_c is that of z_c − z_y, where z_y is finite. One launch."""
    logits, target, weight, options = inputs
    every_row, entropy, predicted, log_sum_sq_probs, logit_sum = wanted
    outer, classes, inner = logits.shape
    rows = outer * inner
    tiles = plan(logits)
    extra = entropy or ranked is not None
    everything = extra and options.label_smoothing != 0 and (options.softcap is not None or options.is_scaled)
    many = everything or (ranked is not None and tiles.looped and tiles.by_inner)
    tiles = tiles._replace(registers=ALL_REGISTERS if many else tiles.registers)

    def rowwise(wanted: bool, dtype: torch.dtype = torch.float64) -> Tensor | None:
        return torch.empty(rows, dtype=dtype, device=logits.device) if wanted else None

    lse, label_logit, row_entropy = rowwise(True), rowwise(True), rowwise(entropy)
    weighted_sum, row_predicted = rowwise(options.label_smoothing != 0), rowwise(predicted, torch.int64)
    out = _Statistics(
        *(lse, label_logit, row_entropy, weighted_sum, row_predicted, rowwise(ranked is not None, torch.int64)),
        *(rowwise(log_sum_sq_probs), rowwise(logit_sum)),
    )
    label = Ranked(None, None) if ranked is None else Ranked(*ranked[:2])
    most_k = () if tiles.looped else (0 if ranked is None else ranked.most_k,)
    with on_device(logits):
        launch(
            _statistics_loop if tiles.looped else _statistics_tile,
            (tiles.number,),
            (
                *(strided(logits), target, weight, out, label, scaling(options), *most_k, rows, classes, inner),
                *(options.ignore_index, *cap_and_factor(options)),
            ),
            {
                "EVERY_ROW": every_row,
                "T": tiles.tile(logits.dtype),
                "F": form_of(weight, options),
                **tiles.options(),
            },
        )
    return out


def _gradient(of: _Upstreams, inputs: LossInputs, saved: Sequence[Tensor | None], result: Tensor) -> Tensor:
    """Write the gradient to ``result``; ``saved`` are lse, H, log Σ p² and the totals of the losses, or None."""
    logits, target, weight, options = inputs
    *of_rows, totals = saved
    outer, classes, inner = logits.shape
    tiles = plan(logits, result)
    # No row is held whole here: each program takes one tile of some rows and some classes. Where it is wide in rows,
    # Σ p² with every option would spill at 4096 logits.
    held = 2048 if tiles.by_inner and of.log_sum_sq_probs.ptr is not None else 4096
    tiles = tiles._replace(registers=ALL_REGISTERS if options.is_scaled else tiles.registers)
    tiles, blocks = in_blocks(tiles._replace(cols=min(tiles.cols, held // tiles.rows), warps=4), classes)
    numbers = (
        *(options.ignore_index, options.label_smoothing, options.lse_square_scale),
        *cap_and_factor(options),
    )
    losses = {"Z_LOSS": options.lse_square_scale != 0, "REDUCTION": options.reduction} if totals is not None else {}
    with on_device(logits):
        launch(
            _statistics_gradient,
            (tiles.number, blocks),
            (
                *(strided(logits), target, weight, strided(result), *of_rows, totals, of, scaling(options)),
                *(outer * inner, classes, inner, *numbers),
            ),
            {"T": tiles.tile(logits.dtype), "F": form_of(weight, options, **losses), **tiles.options()},
        )
    return result


def _column(upstream: Tensor | None) -> _Column:
    """Return an upstream gradient, of rows in any shape or ``()``, as the kernel reads it."""
    if upstream is None:
        return _Column(None, 0)
    flat = upstream.reshape(-1) if upstream.dim() > 1 else upstream
    return _Column(flat, flat.stride(0) if flat.dim() else 0)


class _Statistics(NamedTuple):
    """The pointers that a forward pass writes to: (rows,) each."""

    lse: Any  # float64, as the next three
    label_logit: Any
    entropy: Any  # or None
    weighted_sum: Any  # or None
    predicted: Any  # int64; or None
    rank: Any  # int64; or None
    log_sum_sq_probs: Any  # float64, as the next one; or None
    logit_sum: Any  # or None


class Ranked(NamedTuple):
    """The pointers to the label whose rank is wanted, or None: (rows,) each."""

    logit: Any  # float64
    position: Any  # int64: how many of the classes at hand have a lower index


class _Parts(NamedTuple):
    """The pointers to what is made of the numbers of rows: (rows,) each, or None."""

    loss: Any  # or (), reduced
    z_loss: Any  # likewise
    lse: Any
    entropy: Any
    correct: Any  # bool
    log_sum_sq_probs: Any
    mean_logit: Any
    totals: Any  # (3,), float64: Σ w_y for a mean, else 1; W; the reciprocal of the first


class _Column(NamedTuple):
    """A number for each row; or one for all, with a stride of 0."""

    ptr: Any  # None: 0
    stride: Any


class _Upstreams(NamedTuple):
    """The upstream gradients."""

    loss: Any  # reduced, if the loss is, as the next one
    z_loss: Any
    lse: Any
    label: Any  # of z_y
    entropy: Any
    weighted_sum: Any
    log_sum_sq_probs: Any
    logits: Any  # of the mean of z if there are losses, else of Σ z


@triton.jit
def _first_nan(logits: Strided, base, of_rows, classes, T: tl.constexpr):
    """Return the class of the first NaN of some rows, no class for the others. NaNs are rare: a pass of its own."""
    first = tl.zeros(base.shape, tl.int32) + _NO_CLASS
    for start in tl.range(0, classes, T.COLS):
        cols = start + tl.arange(0, T.COLS)
        mask = of_rows[:, None] & inside(cols, classes, T)[None, :]
        x = tl.load(pointers(logits, base, cols, T), mask=mask, other=0.0)
        first = tl.minimum(first, tl.min(tl.where(x != x, cols[None, :], _NO_CLASS), axis=1))
    return first


@triton.jit
def _store_label_logit(
    out: _Statistics,
    logits: Strided,
    base,
    label,
    row,
    counted,
    in_range,
    scales: Scales,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Store z_y, before the visit, so that no register holds it meanwhile.

    Return it in the units of the visit, or 0 where it is not finite.

    Σ_c w_c z_c is a float32 sum of numbers that may be far from 0: it is added up of z_c − z_y.
    """
    x_label = tl.load(logits.ptr + base + label * logits.stride_class, mask=counted, other=0.0).to(T.ACC)
    z_label = softcapped_rows(x_label, scales, T, F)
    tl.store(out.label_logit + row, in_units(z_label, scales, F).to(tl.float64), mask=in_range)
    return tl.where(finite(z_label), z_label, 0.0)


@triton.jit
def _store_row(
    out: _Statistics,
    row,
    in_range,
    m,  # the row's maximum, or another finite number near it
    s,  # Σ exp(z − m)
    u,  # Σ exp(z − m) (z − m)
    wz,
    first,  # the first class of the greatest logit
    wide,  # s in float64, as the next one, where Σ p² is wanted
    q,  # Σ exp(z − m)²
    z_sum,
    scales: Scales,
    F: tl.constexpr,
):
    """Store the statistics of each row; in float64, as only then lse keeps the precision of s."""
    log_s = tl.log(s if out.log_sum_sq_probs is None else wide).to(tl.float64)
    tl.store(out.lse + row, log_s + in_units(m, scales, F).to(tl.float64), mask=in_range)
    if out.entropy is not None:
        tl.store(out.entropy + row, log_s - (u / s).to(tl.float64), mask=in_range)
    if out.weighted_sum is not None:
        tl.store(out.weighted_sum + row, in_units(wz, scales, F).to(tl.float64), mask=in_range)
    if out.predicted is not None:
        tl.store(out.predicted + row, first.to(tl.int64), mask=in_range)
    if out.log_sum_sq_probs is not None:
        tl.store(out.log_sum_sq_probs + row, tl.log(q / (wide * wide)), mask=in_range)
    if out.logit_sum is not None:
        tl.store(out.logit_sum + row, in_units(z_sum, scales, F).to(tl.float64), mask=in_range)


@triton.jit
def load_label(ranked: Ranked, row, in_range, T: tl.constexpr):
    """Return the logit and the position of the label whose rank is wanted."""
    x_label = tl.load(ranked.logit + row, mask=in_range, other=0.0).to(T.ACC)
    return x_label, tl.load(ranked.position + row, mask=in_range, other=0)


@triton.jit(do_not_specialize=["rows", "ignore_index", "most_k"])
def _statistics_tile(
    logits: Strided,
    target_ptr,  # (rows,)
    weight_ptr,  # (classes,) or None
    out: _Statistics,
    ranked: Ranked,
    scaling: Scaling,
    most_k,
    rows,
    classes,
    inner,
    ignore_index,
    cap: fp64,
    factor: fp64,
    EVERY_ROW: tl.constexpr,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Forward with whole rows in registers. Reads each logit once."""
    scales = scales_of(cap, factor, scaling, T, F)
    row, in_range, outer, within = tile_rows(tl.program_id(0), rows, inner, T)
    label, counted, _ = labels(target_ptr, row, in_range, target_ptr, classes, ignore_index, False, T.ACC)
    read = in_range if EVERY_ROW else rows_to_read(counted, in_range, T.BY_INNER)
    base = row_offsets(logits, outer, within, T)
    cols = tl.arange(0, T.COLS)
    col_mask = inside(cols, classes, T)
    places = pointers(logits, base, cols, T)
    x = tl.load(places, mask=read[:, None] & col_mask[None, :], other=-float("inf")).to(T.ACC)
    near = _store_label_logit(out, logits, base, label, row, counted, in_range, scales, T, F)
    if out.rank is not None:
        x_label, position = load_label(ranked, row, in_range, T)
        rank = rank_in_tile(x, x_label, cols, position, read & in_range, most_k)
        tl.store(out.rank + row, rank.to(tl.int64), mask=in_range)

    x_max = tl.max(x, axis=1)
    m = finite_maximum(softcapped_rows(x_max, scales, T, F))
    z, _ = softcapped(x, col_mask[None, :], scales, True, T, F)
    below = z - m[:, None]
    e = exponential(below, scales, F)
    s = tl.sum(e, axis=1)
    u, wz, first, wide, q, z_sum = s, s, row, s, s, s
    if out.entropy is not None:
        u = tl.sum(e * tl.maximum(of_logits(below, scales, F), LOG_OF_0), axis=1)
    if out.log_sum_sq_probs is not None:
        # The greatest, 1 each, apart: where their p is near 1, the gradient is a difference of numbers near 1.
        at_top = below == 0.0
        top, others = tl.sum(at_top.to(tl.int32), axis=1).to(tl.float64), tl.where(at_top, 0.0, e)
        wide = top + tl.sum(others, axis=1).to(tl.float64)
        q = top + tl.sum(others * others, axis=1).to(tl.float64)
    if out.logit_sum is not None:
        z_sum = tl.sum(tl.where(col_mask[None, :], z, 0.0), axis=1)
    if out.weighted_sum is not None:
        weighted = z - near[:, None]
        if F.HAS_WEIGHT:
            weighted *= tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(T.ACC)[None, :]
        wz = tl.sum(tl.where(col_mask[None, :], weighted, 0.0), axis=1)
    if out.predicted is not None:
        first = tl.min(tl.where(x == x_max[:, None], cols[None, :], _NO_CLASS), axis=1)
        if tl.max((s != s).to(tl.int32), axis=0) > 0:  # some row holds a NaN, or +inf
            nan = tl.min(tl.where(x != x, cols[None, :], _NO_CLASS), axis=1)
            first = tl.where(nan != _NO_CLASS, nan, first)
    _store_row(out, row, in_range, m, s, u, wz, first, wide, q, z_sum, scales, F)


class _Online(NamedTuple):
    """An online softmax, of each group of classes: (ROWS, groups)."""

    m: Any  # the running maximum
    s: Any  # Σ exp(z − m)
    u: Any  # Σ exp(z − m) (z − m)
    wz: Any  # Σ_c w_c (z_c − near)
    best: Any  # the group's greatest logit
    first: Any  # its first class
    rank: Any  # how many classes stand before the label that is ranked
    q: Any  # Σ exp(z − m)²
    z_sum: Any  # Σ z, float64: a group may have thousands of blocks


@triton.jit
def _visit(
    state: _Online,
    logits: Strided,
    weight_ptr,
    out: _Statistics,  # the parts that are wanted
    base,
    start,
    classes,
    read,
    near,
    x_label,
    position,
    scales: Scales,
    MASKED: tl.constexpr,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Return the state with one more block of a looped row."""
    m_group, s_group, u_group, wz_group, best_group, first_group, rank_group, q_group, z_group = state
    cols, mask = block(start, classes, read, MASKED, T)
    places = pointers(logits, base, cols, T)
    x = tl.load(places, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(T.ACC)
    SPLIT: tl.constexpr = [T.ROWS, T.COLS // T.GROUP, T.GROUP]
    if out.predicted is not None:
        x_split = tl.reshape(x, SPLIT)
        best = tl.max(x_split, axis=2)
        here = tl.reshape(tl.zeros([T.ROWS, 1], tl.int32) + cols[None, :], SPLIT)
        first = tl.min(tl.where(x_split == best[:, :, None], here, _NO_CLASS), axis=2)
        first_group = tl.where(best > best_group, first, first_group)
        best_group = tl.maximum(best_group, best)
    if out.rank is not None:
        rank_group += before_label(x, x_label, cols, start, position, T.GROUP, T.ROWS, T.COLS)
    z, _ = softcapped(x, mask, scales, MASKED, T, F)
    if out.weighted_sum is not None:
        wz_group += weighted_sums(z, near, weight_ptr, cols, classes, mask, MASKED, T, F)
    if out.logit_sum is not None:
        z_here = tl.where(mask, z, 0.0) if MASKED else z
        z_group += tl.sum(tl.reshape(z_here, SPLIT), axis=2).to(tl.float64)
    step = online_step(m_group, s_group, u_group, z, scales, out.entropy is not None, T, F)
    if out.log_sum_sq_probs is not None:  # the compiler takes the step's exponentials for these
        factor = exponential(m_group - finite_maximum(step.m), scales, F)
        UNIT: tl.constexpr = F.SCALED and not F.SOFTCAP and out.entropy is None
        e = tl.exp2(step.below * (scales.unit[:, None, None] if UNIT else LOG2_E))
        q_group = q_group * factor * factor + tl.sum(e * e, axis=2)
    return _Online(step.m, step.s, step.u, wz_group, best_group, first_group, rank_group, q_group, z_group)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _statistics_loop(
    logits: Strided,
    target_ptr,  # (rows,)
    weight_ptr,  # (classes,) or None
    out: _Statistics,
    ranked: Ranked,
    scaling: Scaling,
    rows,
    classes,
    inner,
    ignore_index,
    cap: fp64,
    factor: fp64,
    EVERY_ROW: tl.constexpr,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Forward with rows longer than a tile: an online softmax over their blocks. Reads each logit once.

    A group of neighbouring classes takes its maximum before anything is rescaled, as in ``cross_entropy``.
    """
    scales = scales_of(cap, factor, scaling, T, F)
    row, in_range, outer, within = tile_rows(tl.program_id(0), rows, inner, T)
    label, counted, _ = labels(target_ptr, row, in_range, target_ptr, classes, ignore_index, False, T.ACC)
    read = in_range if EVERY_ROW else rows_to_read(counted, in_range, T.BY_INNER)
    base = row_offsets(logits, outer, within, T)
    near = _store_label_logit(out, logits, base, label, row, counted, in_range, scales, T, F)
    m_group = tl.full([T.ROWS, T.COLS // T.GROUP], -float("inf"), T.ACC)
    s_group = tl.zeros([T.ROWS, T.COLS // T.GROUP], T.ACC)
    first_group = tl.zeros([T.ROWS, 1], tl.int32) + (tl.arange(0, T.COLS // T.GROUP) * T.GROUP)[None, :]
    rank_group, x_label, position = first_group, near, label
    if out.rank is not None:
        rank_group = tl.zeros([T.ROWS, T.COLS // T.GROUP], tl.int32)
        x_label, position = load_label(ranked, row, in_range, T)
    z_group = s_group
    if out.logit_sum is not None:
        z_group = tl.zeros([T.ROWS, T.COLS // T.GROUP], tl.float64)
    state = _Online(m_group, s_group, s_group, s_group, m_group, first_group, rank_group, s_group, z_group)
    full = classes // T.COLS * T.COLS
    if tl.max(read.to(tl.int32), axis=0) > 0:
        for start in tl.range(0, full, T.COLS):
            state = _visit(
                state,
                logits,
                weight_ptr,
                out,
                base,
                start,
                classes,
                read,
                near,
                x_label,
                position,
                scales,
                False,
                T,
                F,
            )
        if full < classes:
            state = _visit(
                state, logits, weight_ptr, out, base, full, classes, read, near, x_label, position, scales, True, T, F
            )

    m = finite_maximum(tl.max(state.m, axis=1))
    fall = tl.maximum(of_logits(state.m - m[:, None], scales, F), LOG_OF_0)
    factor = tl.exp2(fall * LOG2_E)
    s = tl.sum(state.s * factor, axis=1)
    u, wz, first, wide, q, z_sum = s, s, row, s, s, s
    if out.log_sum_sq_probs is not None:
        wide = tl.sum((state.s * factor).to(tl.float64), axis=1)
        q = tl.sum((state.q * factor * factor).to(tl.float64), axis=1)
    if out.logit_sum is not None:
        z_sum = tl.sum(state.z_sum, axis=1)
    if out.entropy is not None:
        u = tl.sum((state.u + state.s * fall) * factor, axis=1)
    if out.weighted_sum is not None:
        wz = tl.sum(state.wz, axis=1)
    if out.rank is not None:
        rank = rank_with_nans(tl.sum(state.rank, axis=1), x_label, position, read, logits, base, T)
        tl.store(out.rank + row, rank.to(tl.int64), mask=in_range)
    if out.predicted is not None:
        best = tl.max(state.best, axis=1)
        first = tl.min(tl.where(state.best == best[:, None], state.first, _NO_CLASS), axis=1)
        has_nan = read & (s != s)
        if tl.max(has_nan.to(tl.int32), axis=0) > 0:  # or +inf
            nan = _first_nan(logits, base, has_nan, classes, T)
            first = tl.where(nan != _NO_CLASS, nan, first)
    _store_row(out, row, in_range, m, s, u, wz, first, wide, q, z_sum, scales, F)


@triton.jit
def _sum_over_programs(sums_ptr, place, G_PAD: tl.constexpr):
    """Return the sum of one of the four numbers that each program stored."""
    total = tl.zeros([G_PAD], tl.float64)
    for start in tl.range(0, tl.num_programs(0), G_PAD):
        program = start + tl.arange(0, G_PAD)
        there = program < tl.num_programs(0)
        total += tl.load(sums_ptr + program * 4 + place, mask=there, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _losses_of_rows(
    target_ptr,  # (rows,)
    weight_ptr,  # (classes,) or None
    of: _Statistics,
    out: _Parts,
    partial: Partial,
    rows,
    classes,
    ignore_index,
    eps: fp64,
    z_scale: fp64,
    BLOCK: tl.constexpr,  # rows of a program
    G_PAD: tl.constexpr,
    F: tl.constexpr,
):
    """Make the losses, reduced, of the rows' numbers, and round the numbers that are asked for. Reads no logit."""
    eps, z_scale = tl.full([1], eps, tl.float64), tl.full([1], z_scale, tl.float64)
    program = tl.program_id(0)
    row = program * BLOCK + tl.arange(0, BLOCK)
    in_range = row < rows
    _, counted, weight = labels(
        target_ptr, row, in_range, weight_ptr, classes, ignore_index, F.HAS_WEIGHT, tl.float64
    )
    lse = tl.load(of.lse + row, mask=in_range, other=0.0)
    z_label = tl.load(of.label_logit + row, mask=in_range, other=0.0)
    w_total, wz = tl.zeros([1], tl.float64) + classes, lse
    if F.SMOOTHING:
        wz = tl.load(of.weighted_sum + row, mask=in_range, other=0.0)
        if F.HAS_WEIGHT:
            w_total = tl.zeros([1], tl.float64) + sum_of_weights(weight_ptr, classes, tl.float64, BLOCK)
    near = tl.where(finite(z_label), z_label, 0.0)
    one = tl.full([BLOCK], 1.0, tl.float64)
    loss, _, _, _ = row_results(one, lse, z_label, wz, near, w_total, weight, counted, eps, z_scale, classes, one, F)
    z_loss = tl.where(counted, weight * z_scale * lse * lse, 0.0)
    if out.lse is not None:
        tl.store(out.lse + row, lse, mask=in_range)
    if out.entropy is not None:
        tl.store(out.entropy + row, tl.load(of.entropy + row, mask=in_range), mask=in_range)
    if out.log_sum_sq_probs is not None:
        tl.store(out.log_sum_sq_probs + row, tl.load(of.log_sum_sq_probs + row, mask=in_range), mask=in_range)
    if out.mean_logit is not None:
        tl.store(out.mean_logit + row, tl.load(of.logit_sum + row, mask=in_range) / classes, mask=in_range)
    if out.correct is not None:
        target = tl.load(target_ptr + row, mask=in_range, other=0).to(tl.int64)
        right = counted & (tl.load(of.predicted + row, mask=in_range, other=0) == target)
        tl.store(out.correct + row, right, mask=in_range)

    total, ends = tl.full([1], 1.0, tl.float64), program == 0
    if F.REDUCTION == "none":
        tl.store(out.loss + row, narrowed(loss, out.loss), mask=in_range)
        if out.z_loss is not None:
            tl.store(out.z_loss + row, narrowed(z_loss, out.z_loss), mask=in_range)
    else:
        sums = partial.sums + program * 4
        tl.store(sums, tl.sum(loss, axis=0))
        tl.store(sums + 1, tl.sum(z_loss, axis=0))
        tl.store(sums + 2, tl.sum(weight, axis=0))  # NaN where a label is out of bounds
        ends = last_to_end(partial.counter)
    if ends:
        if F.REDUCTION != "none":
            tl.store(partial.counter, 0)
            if F.REDUCTION == "mean":
                total *= _sum_over_programs(partial.sums, 2, G_PAD)
            place = tl.arange(0, 1)
            tl.store(out.loss + place, narrowed(_sum_over_programs(partial.sums, 0, G_PAD) / total, out.loss))
            if out.z_loss is not None:
                z_total = _sum_over_programs(partial.sums, 1, G_PAD) / total
                tl.store(out.z_loss + place, narrowed(z_total, out.z_loss))
        tl.store(out.totals + tl.arange(0, 1), total)
        tl.store(out.totals + 1 + tl.arange(0, 1), w_total)
        tl.store(out.totals + 2 + tl.arange(0, 1), 1.0 / total)


@triton.jit
def _upstream(upstream: _Column, row, in_range):
    """Return an upstream gradient of each row, in float64."""
    place = row.to(tl.int64) * upstream.stride
    return tl.load(upstream.ptr + place, mask=in_range, other=0.0).to(tl.float64)


@triton.jit
def _of_loss(upstream: _Column, totals_ptr, row, in_range, T: tl.constexpr, F: tl.constexpr):
    """Return an upstream gradient of the sum of losses, or of each of them."""
    if F.REDUCTION == "none":
        return _upstream(upstream, row, in_range)
    of_sum = tl.load(upstream.ptr).to(tl.float64)
    # A division takes registers from all rows; only in float64 a product with the reciprocal shows.
    return of_sum / tl.load(totals_ptr) if T.ACC == tl.float64 else of_sum * tl.load(totals_ptr + 2)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _statistics_gradient(
    logits: Strided,
    target_ptr,  # (rows,)
    weight_ptr,  # (classes,) or None
    gradient: Strided,
    lse_ptr,  # (rows,)
    entropy_ptr,  # (rows,) or None
    squares_ptr,  # (rows,) or None: log Σ p²
    totals_ptr,  # (3,), as above; None: no upstream gradient of a loss
    upstream: _Upstreams,
    scaling: Scaling,
    rows,
    classes,
    inner,
    ignore_index,
    eps: fp64,
    z_scale: fp64,
    cap: fp64,
    factor: fp64,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Gradient from the logits and each row's lse and entropy. Reads the logits once, writes once."""
    eps, z_scale = tl.full([1], eps, tl.float64), tl.full([1], z_scale, tl.float64)
    scales = scales_of(cap, factor, scaling, T, F)
    row, in_range, outer, within = tile_rows(tl.program_id(0), rows, inner, T)
    label, counted, weight = labels(target_ptr, row, in_range, weight_ptr, classes, ignore_index, F.HAS_WEIGHT, T.ACC)
    lse = tl.load(lse_ptr + row, mask=in_range, other=0.0).to(tl.float64)
    LABEL: tl.constexpr = upstream.label.ptr is not None or upstream.loss.ptr is not None
    SUM: tl.constexpr = upstream.weighted_sum.ptr is not None or (upstream.loss.ptr is not None and F.SMOOTHING)
    level = tl.zeros([T.ROWS], tl.float64)
    of_label, of_sum, of_entropy, of_squares, of_logits = level, level, level, level, level
    if upstream.lse.ptr is not None:
        level += _upstream(upstream.lse, row, in_range)
    if upstream.label.ptr is not None:
        of_label = _upstream(upstream.label, row, in_range)
    if upstream.weighted_sum.ptr is not None:
        of_sum = _upstream(upstream.weighted_sum, row, in_range)
    weight = weight.to(tl.float64)
    tail = weight * z_scale * lse if F.Z_LOSS else weight
    if upstream.loss.ptr is not None:
        of_loss = tl.where(counted, _of_loss(upstream.loss, totals_ptr, row, in_range, T, F), 0.0)
        hit = weight - weight * eps if F.SMOOTHING else weight
        slope = hit + 2.0 * tail if F.Z_LOSS else hit
        of_label = -of_loss * hit
        if F.SMOOTHING:
            of_sum = -of_loss * (eps / classes)
            slope += eps / classes * tl.load(totals_ptr + 1)
        # A row with an upstream gradient of 0 may hold NaN.
        level += tl.where(of_loss == 0.0, 0.0, of_loss * slope)
    if upstream.z_loss.ptr is not None:
        of_z_loss = tl.where(counted, _of_loss(upstream.z_loss, totals_ptr, row, in_range, T, F), 0.0)
        level += tl.where(of_z_loss == 0.0, 0.0, of_z_loss * (2.0 * tail if F.Z_LOSS else 0.0))
    if upstream.entropy.ptr is not None:
        of_entropy = _upstream(upstream.entropy, row, in_range)
    if upstream.log_sum_sq_probs.ptr is not None:
        of_squares = 2.0 * _upstream(upstream.log_sum_sq_probs, row, in_range)
    # Rows with a gradient: the others are not read, whatever they hold.
    wanted = (level != 0.0) | (of_label != 0.0) | (of_sum != 0.0) | (of_entropy != 0.0) | (of_squares != 0.0)
    with_p = wanted
    if upstream.logits.ptr is not None:
        of_logits = _upstream(upstream.logits, row, in_range)
        of_logits = of_logits if totals_ptr is None else of_logits / classes
        wanted = wanted | (of_logits != 0.0)
    if upstream.entropy.ptr is not None:
        level -= of_entropy * tl.load(entropy_ptr + row, mask=in_range, other=0.0)
    if upstream.log_sum_sq_probs.ptr is not None:
        level -= of_squares
        of_squares *= tl.exp(-tl.load(squares_ptr + row, mask=in_range, other=0.0))

    cols = tl.program_id(1) * T.COLS + tl.arange(0, T.COLS)
    col_mask = inside(cols, classes, T)
    base = row_offsets(logits, outer, within, T)
    mask = rows_to_read(wanted & in_range, in_range, T.BY_INNER)[:, None] & col_mask[None, :]
    places = pointers(logits, base, cols, T)
    x = tl.load(places, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(T.ACC)
    z, dz = softcapped(x, mask, scales, False, T, F)
    log_p = log_softmax(z, lse, scales, T, F)
    p = tl.exp2(log_p * LOG2_E)
    of_p = tl.broadcast_to(level.to(T.ACC)[:, None], p.shape)
    if upstream.entropy.ptr is not None:
        of_p -= of_entropy.to(T.ACC)[:, None] * tl.maximum(log_p, LOG_OF_0)
    if upstream.log_sum_sq_probs.ptr is not None:
        of_p += of_squares.to(T.ACC)[:, None] * p
    g = p * of_p
    if upstream.logits.ptr is not None:  # a row without another upstream gradient may hold −inf alone
        g = tl.where(with_p[:, None], g, 0.0) + of_logits.to(T.ACC)[:, None]
    if LABEL:
        g += tl.where(cols[None, :] == label[:, None], of_label.to(T.ACC)[:, None], 0.0)
    if SUM:
        if F.HAS_WEIGHT:
            w = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(T.ACC)
            g += of_sum.to(T.ACC)[:, None] * w[None, :]
        else:
            g += of_sum.to(T.ACC)[:, None]
    if F.SOFTCAP:
        g *= dz
    if F.SCALED:
        g *= scales.slope.to(T.ACC)[:, None]
    g = tl.where(wanted[:, None], g, 0.0)
    g_base = row_offsets(gradient, outer, within, T)
    places = pointers(gradient, g_base, cols, T)
    tl.store(places, g, mask=in_range[:, None] & col_mask[None, :], eviction_policy="evict_first")
