r"""Cross-entropy against soft targets: loss and both gradients from one visit to the input and the target.

With z the logits (after the softcap), p their softmax, lse their log-sum-exp, t the target, w the class weights, ε
the label smoothing over C classes, u = (1−ε) t + ε/C, λ the scale of the squared log-sum-exp, S = Σ_c w_c u_c and
T = Σ_c w_c t_c, one row gives

    L        =  S lse − Σ_c w_c u_c z_c + λ lse² T  =  S ln s − Σ_c w_c u_c (z_c − m) + λ lse² T
    ∂L/∂z_c  =  p_c A − w_c u_c,      A = S + 2 λ lse T
    ∂L/∂t_c  =  w_c (1−ε) (lse − z_c) + λ w_c lse²

where m is the greatest logit and s = Σ_c exp(z_c − m). No term of S ln s − Σ w u (z − m) is below 0, so nothing
cancels, however great the logits are. If the input holds probabilities y instead of logits, one row gives

    L  =  −Σ_c w_c u_c log y_c,      ∂L/∂y_c  =  −w_c u_c / y_c,      ∂L/∂t_c  =  −w_c (1−ε) log y_c

where a term is 0 if its coefficient is 0. With N rows, b bytes per element of the input and b' per element of the
target, the kernels move these bytes, beside the class weights and the numbers per row:

========================================  ==================  =====================================================
forward                                   N·C·(b + b')        each element read once
forward that writes both gradients        2·N·C·(b + b')      read once, gradients written once; rows longer than
                                                              a tile are read a second time, from the L2 cache
backward of both                          2·N·C·(b + b')      read once, written once; the target's gradient alone
                                                              needs only the input and what the forward saved
========================================  ==================  =====================================================

A gradient that is not asked for is not written. Each program stores the sum over its rows, and the last program to
end adds these sums up, always in the same order, so that results are equal from run to run. Nothing waits for the
host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.backends.contract import LossInputs, SoftForward, WantedGradients

from .arguments import (
    Scaling,
    Strided,
    block,
    cap_and_factor,
    class_offsets,
    form_of,
    inside,
    pointers,
    row_offsets,
    scaling,
    strided,
    tile_count,
    tile_rows,
)
from .launch import launch, on_device, scratch
from .tile_helpers import (
    Scales,
    exponential,
    finite_maximum,
    fp64,
    in_units,
    last_to_end,
    of_logits,
    online_step,
    scales_of,
    softcapped,
)
from .tiles import ALL_REGISTERS, Tiles, in_blocks, in_cache, plan, power_of_2, vector_width

__all__ = ["narrowed", "soft_cross_entropy_backward", "soft_cross_entropy_forward"]

# Elements of either tensor that a program of the backward pass takes: 16 per thread.
_BACKWARD_TILE = 2048


class SavedRows(NamedTuple):
    """The numbers per row that the forward saves for the derivatives: ``(rows,)`` each, or None."""

    m: Any = None
    s: Any = None
    level: Any = None  # A
    loss: Any = None  # for derivatives of the gradient


class Totals(NamedTuple):
    """The loss, and what the programs of a launch leave to the last one of them."""

    loss: Any = None  # () or, for "none", (rows,); None: not written
    sums: Any = None  # (programs,), float64: the loss of each program's rows
    counter: Any = None  # (): programs that have ended


class Scalars(NamedTuple):
    """The numbers of the options, as vectors of one element."""

    keep: Any  # 1−ε
    spread: Any  # ε/C
    scale: Any  # the factor of a row's loss in the result, float64
    z_scale: Any  # λ, float64


class Rows(NamedTuple):
    """The rows of a tile: a mask of those that exist, and where they begin in each tensor."""

    in_range: Any
    x: Any
    t: Any
    g: Any
    h: Any


class RowSlopes(NamedTuple):
    """The numbers per row that the gradients need."""

    m: Any
    log_s: Any
    level: Any  # A times that of the input, over s
    scale: Any
    of_input: Any  # the scale times ∂z/∂x, without the softcap's part
    tail: Any  # λ lse², times the scale


class GroupSums(NamedTuple):
    """The sums over each group of classes so far: (ROWS, groups)."""

    m: Any  # the group's maximum
    s: Any  # Σ exp(z − m)
    wud: Any  # Σ w u (z − m)
    wu: Any  # Σ w u
    wt: Any  # Σ w t, if Z_LOSS and SMOOTHING


def soft_cross_entropy_forward(
    inputs: LossInputs, wanted: WantedGradients, *, loss_dtype: torch.dtype, divisor: float = 1.0
) -> SoftForward:
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    input, target, _, options = inputs
    rows, device = input.shape[0] * input.shape[2], input.device
    none = options.reduction == "none"
    results = wanted.tensors(inputs)
    tiles = _plan(inputs, *results)
    loss = torch.empty(rows if none else (), dtype=loss_dtype, device=device)
    # A backward pass follows only where no gradient is written now: it needs m, s and A.
    saved = SavedRows()
    if wanted.later and options.from_logits and not (wanted.input or wanted.target):
        dtype = _compute_dtype(input, target)
        saved = SavedRows(*(torch.empty(rows, dtype=dtype, device=device) for _ in range(3)))
    elif options.from_logits and wanted.input and not wanted.inplace:
        saved = SavedRows(loss=torch.empty(rows, dtype=_compute_dtype(input, target), device=device))
    with on_device(input):
        sums, _, arrived = (None, None, None) if none else scratch(device, tiles.grid, 1)
        totals = Totals(loss, sums, arrived)
        tensors = _tensors(inputs, *results)
        numbers = _numbers(inputs, divisor)
        constants = _constants(inputs, tiles)
        if options.from_logits:
            kernel = _forward_loop if tiles.looped else _forward_tile
            launch(kernel, (tiles.grid,), (*tensors, saved, totals, scaling(options), *numbers), constants)
        else:
            launch(_probabilities, (tiles.grid,), (*tensors, None, 0, totals, *numbers[:3]), constants)
    return SoftForward(loss, *results, () if saved.m is None else tuple(saved[:3]), saved.loss)


def soft_cross_entropy_backward(
    upstream: Tensor, inputs: LossInputs, saved: Sequence[Tensor], wanted: WantedGradients
) -> tuple[Tensor | None, Tensor | None]:
    """See :class:`fastloss.backends.contract.Backend`. One launch; none if neither gradient is asked for."""
    if not (wanted.input or wanted.target):
        return None, None
    input, options, results = inputs.input, inputs.options, wanted.tensors(inputs)
    tiles = _plan(inputs, *results)
    tensors = _tensors(inputs, *results)
    upstream_and_stride = upstream, upstream.stride(0) if upstream.dim() else 0
    numbers = _numbers(inputs)
    with on_device(input):
        if options.from_logits:
            # Each program takes one tile of some rows and some classes: it needs no whole row.
            cols = min(tiles.cols, max(16, _BACKWARD_TILE // tiles.rows))
            tiles, blocks = in_blocks(tiles._replace(cols=cols, warps=4), classes=input.shape[1])
            arguments = (*tensors, *upstream_and_stride, SavedRows(*saved), scaling(options), *numbers)
            launch(_backward, (tiles.number, blocks), arguments, _constants(inputs, tiles))
        else:
            arguments = (*tensors, *upstream_and_stride, Totals(), *numbers[:3])
            launch(_probabilities, (tiles.grid,), arguments, _constants(inputs, tiles))
    return results


def _plan(inputs: LossInputs, *results: Tensor | None) -> Tiles:
    """Return the input's tiles for programs that read the target too."""
    input, target, weight, options = inputs
    written = [t for t in results if t is not None]
    tiles = plan(input, written[0] if written else None)
    classes = input.shape[1]
    vec = vector_width(input, target, *written, classes=classes)
    many = len(written) == 2 or (written and options.softcap is not None)
    of_all = many or tiles.by_inner or (tiles.looped and (written or vec == 1 or options.is_scaled))
    tiles = tiles._replace(vec=vec, registers=ALL_REGISTERS if of_all else 0)
    if written and not tiles.looped and _compute_dtype(input, target) == torch.float32:
        if tiles.warps > 8:
            # 32 elements per thread let two programs share a processor. With 16 there is room for one, which would
            # wait for its own memory accesses.
            tiles = tiles._replace(warps=8)
        if tiles.by_inner:  # 16 elements per thread: 32, each with its own address, would not fit in the registers
            tiles = tiles._replace(warps=8)
    if tiles.looped:
        if not tiles.by_inner and (tiles.vec == 1 or options.softcap is not None):
            # Larger blocks have too many pointers, or too much of the softcap's arithmetic, for the registers.
            tiles = tiles._replace(cols=min(tiles.cols, 4096))
        elif weight is not None and options.label_smoothing and not written and tiles.vec == 8:
            # Up to 80 registers: two programs of 16 warps have 64, and compiled for sm_80 they would spill.
            grid = min(tiles.number, 2 * tiles.grid)
            tiles = tiles._replace(cols=tiles.cols // 2, warps=tiles.warps // 2, grid=grid)
        if written:  # so few rows at a time that the second visit finds both tensors' rows in the L2 cache
            tiles = in_cache(tiles, input.device, classes * (input.element_size() + target.element_size()))
    return tiles


def _compute_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: float64 if either tensor is float64, else float32."""
    return torch.float64 if torch.float64 in (input.dtype, target.dtype) else torch.float32


def _tensors(inputs: LossInputs, result: Tensor | None, target_result: Tensor | None) -> tuple[Any, ...]:
    """Return the kernels' first arguments: rows, classes, inner, x, t, g, h and the class weights."""
    input, target, weight, _ = inputs
    outer, classes, inner = input.shape
    tensors = strided(input), strided(target), strided(result, input), strided(target_result, target), weight
    return outer * inner, classes, inner, *tensors


def _numbers(inputs: LossInputs, divisor: float = 1.0) -> tuple[float, ...]:
    """Return the kernels' last arguments: 1−ε, ε/C, the scale, λ, and two of the softcap and the scaling."""
    options, (outer, classes, inner) = inputs.options, inputs.input.shape
    eps = options.label_smoothing
    scale = 1.0 / max(outer * inner, 1) if options.reduction == "mean" else 1.0 / divisor
    return 1.0 - eps, eps / max(classes, 1), scale, options.lse_square_scale, *cap_and_factor(options)


def _constants(inputs: LossInputs, tiles: Tiles) -> dict[str, object]:
    """Return the constants that a kernel is compiled for. Numbers that vary from call to call are not among them."""
    input, target, weight, options = inputs
    form = form_of(weight, options, Z_LOSS=options.lse_square_scale != 0, REDUCTION=options.reduction)
    tile = tiles.tile(_compute_dtype(input, target), G_PAD=power_of_2(tiles.grid))
    return {"T": tile, "F": form, **tiles.options()}


@triton.jit
def narrowed(value, pointer):
    """Return the value to store: a float64 is rounded to float32 first if it is stored in fewer bits."""
    if value.dtype == tl.float64 and pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    return value


@triton.jit
def _scalars(keep, spread, scale, z_scale, T: tl.constexpr):
    return Scalars(
        tl.full([1], keep, T.ACC), tl.full([1], spread, T.ACC),
        tl.full([1], scale, tl.float64), tl.full([1], z_scale, tl.float64),
    )  # fmt: skip


@triton.jit
def _weighted(t, cols, classes, weight_ptr, scalars, MASKED: tl.constexpr, F: tl.constexpr):
    """Return w u, w t, and w if HAS_WEIGHT, of targets (ROWS, COLS): 0 in columns that are no classes, as t is."""
    wu, wt, w = t, t, t
    if F.SMOOTHING:
        wu = t * scalars.keep[:, None] + scalars.spread[:, None]
    if F.HAS_WEIGHT:
        w = tl.load(weight_ptr + cols, mask=cols < classes, other=0.0).to(t.dtype)[None, :]
        wu, wt = wu * w, t * w
    elif F.SMOOTHING and MASKED:
        wu = tl.where((cols < classes)[None, :], wu, 0.0)
    return wu, wt, w


@triton.jit
def _target_slope(
    d,  # (ROWS, COLS): z − m
    w,  # (1, COLS), if HAS_WEIGHT
    log_s,  # ln s
    keep,  # 1−ε, times the scale
    tail,  # λ lse², times the scale, if Z_LOSS
    F: tl.constexpr,
):
    """Return ∂L/∂t = w ((1−ε) (lse − z) + λ lse²)."""
    h = (log_s[:, None] - d) * keep[:, None]
    if F.Z_LOSS:
        h += tail[:, None]
    if F.HAS_WEIGHT:
        h *= w
    return h


@triton.jit
def _row_results(
    s,  # Σ exp(z − m)
    m,
    wud,  # Σ w u (z − m)
    wu_sum,  # S
    wt_sum,  # T, if Z_LOSS
    in_range,
    z_scale,
    scales: Scales,
    F: tl.constexpr,
):
    """Return the rows' losses, ln s, A and λ lse² before any scale. In float64: rows are few beside logits."""
    m, wud = in_units(m, scales, F), in_units(wud, scales, F)
    log_s = tl.log(s).to(tl.float64)
    level = wu_sum.to(tl.float64)
    loss = level * log_s - wud.to(tl.float64)
    tail = log_s
    if F.Z_LOSS:
        lse = log_s + m.to(tl.float64)
        half = z_scale * lse
        tail = half * lse
        loss += tail * wt_sum.to(tl.float64)
        level += 2.0 * half * wt_sum.to(tl.float64)
    return tl.where(in_range, loss, 0.0), log_s, level, tail


@triton.jit
def _add_loss(loss_sum, loss, totals, row, in_range, F: tl.constexpr):
    """Store the rows' losses if they are not reduced; else return the sum with them."""
    if F.REDUCTION == "none":
        tl.store(totals.loss + row, narrowed(loss, totals.loss), mask=in_range)
    else:
        loss_sum += loss
    return loss_sum


@triton.jit
def _save(saved, row, in_range, m, s, level, loss):
    if saved.loss is not None:
        tl.store(saved.loss + row, loss.to(s.dtype), mask=in_range)
    if saved.m is not None:
        tl.store(saved.m + row, m, mask=in_range)
        tl.store(saved.s + row, s, mask=in_range)
        tl.store(saved.level + row, level.to(s.dtype), mask=in_range)


@triton.jit
def _end(totals, loss_sum, rows, T: tl.constexpr, F: tl.constexpr):
    """Store the sum over this program's rows; in the last program, add up all programs' sums, in their order."""
    tl.store(totals.sums + tl.program_id(0), loss_sum)
    if last_to_end(totals.counter):
        tl.store(totals.counter, 0)
        index = tl.arange(0, T.G_PAD)
        exists = index < tl.num_programs(0)
        loss = tl.sum(tl.load(totals.sums + index, mask=exists, other=0.0, cache_modifier=".cg"), axis=0)
        if F.REDUCTION == "mean":
            loss = loss / rows
        tl.store(totals.loss, narrowed(loss, totals.loss))


@triton.jit
def _forward_tile(
    rows,
    classes,
    inner,
    x: Strided,  # the input
    t: Strided,  # the target
    g: Strided,  # the input's gradient, which may be the input
    h: Strided,  # the target's gradient
    weight_ptr,  # (classes,) or None
    saved: SavedRows,
    totals: Totals,
    scaling: Scaling,
    keep: fp64,  # 1−ε
    spread: fp64,  # ε/C
    scale: fp64,  # 1 / rows for "mean", 1 / divisor else
    z_scale: fp64,
    cap: fp64,
    factor: fp64,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Forward with whole rows in registers: reads both tensors once, writes each gradient once."""
    scalars = _scalars(keep, spread, scale, z_scale, T)
    scales = scales_of(cap, factor, scaling, T, F)
    cols = tl.arange(0, T.COLS)
    col_mask = inside(cols, classes, T)
    x_cols, t_cols = class_offsets(x, cols, T), class_offsets(t, cols, T)
    loss_sum = tl.zeros([T.ROWS], tl.float64)

    for tile in tl.range(tl.program_id(0), tile_count(rows, inner, T), tl.num_programs(0)):
        row, in_range, outer, within = tile_rows(tile, rows, inner, T)
        mask = in_range[:, None] & col_mask[None, :]
        base = x.ptr + row_offsets(x, outer, within, T)[:, None]
        logits = tl.load(base + x_cols[None, :], mask=mask, other=-float("inf")).to(T.ACC)
        base = t.ptr + row_offsets(t, outer, within, T)[:, None]
        target = tl.load(base + t_cols[None, :], mask=mask, other=0.0).to(T.ACC)
        z, dz = softcapped(logits, col_mask[None, :], scales, True, T, F)
        m = finite_maximum(tl.max(z, axis=1))
        d = z - m[:, None]
        e = exponential(d, scales, F)
        s = tl.sum(e, axis=1)
        wu, wt, w = _weighted(target, cols, classes, weight_ptr, scalars, True, F)
        wud = tl.sum(tl.where(col_mask[None, :], wu * d, 0.0), axis=1)
        wu_sum = tl.sum(wu, axis=1)
        wt_sum = wu_sum
        if F.Z_LOSS and F.SMOOTHING:
            wt_sum = tl.sum(wt, axis=1)
        loss, log_s, level, tail = _row_results(s, m, wud, wu_sum, wt_sum, in_range, scalars.z_scale, scales, F)
        loss_sum = _add_loss(loss_sum, loss, totals, row, in_range, F)
        _save(saved, row, in_range, m, s, level, loss)
        scale_acc = scalars.scale.to(T.ACC)
        if g.ptr is not None:
            of_input = scalars.scale * scales.slope if F.SCALED else scalars.scale
            slope = e * (level * of_input / s).to(T.ACC)[:, None] - wu * of_input.to(T.ACC)[:, None]
            if F.SOFTCAP:
                slope *= dz
            out = pointers(g, row_offsets(g, outer, within, T), cols, T)
            tl.store(out, narrowed(slope, g.ptr), mask=mask)
        if h.ptr is not None:
            tail = (tail * scalars.scale).to(T.ACC)
            slope = _target_slope(of_logits(d, scales, F), w, log_s.to(T.ACC), scalars.keep * scale_acc, tail, F)
            out = pointers(h, row_offsets(h, outer, within, T), cols, T)
            tl.store(out, narrowed(slope, h.ptr), mask=mask)

    if F.REDUCTION != "none":
        _end(totals, tl.sum(loss_sum, axis=0), rows, T, F)


@triton.jit
def _visit(
    sums: GroupSums,
    x: Strided,
    t: Strided,
    weight_ptr,
    at: Rows,
    start,
    classes,
    scalars: Scalars,
    scales: Scales,
    MASKED: tl.constexpr,
    TWICE: tl.constexpr,  # these elements will be read again
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Add one block of classes to the sums of each group.

    A group that has met nothing above −∞ counts its differences from 0: they are −∞, or there are none.
    """
    cols, mask = block(start, classes, at.in_range, MASKED, T)
    policy: tl.constexpr = "evict_last" if TWICE else "evict_first"
    z = tl.load(pointers(x, at.x, cols, T), mask=mask, other=-float("inf"), eviction_policy=policy).to(T.ACC)
    target = tl.load(pointers(t, at.t, cols, T), mask=mask, other=0.0, eviction_policy=policy).to(T.ACC)
    SPLIT: tl.constexpr = [T.ROWS, T.COLS // T.GROUP, T.GROUP]
    z, _ = softcapped(z, mask, scales, MASKED, T, F)
    wu, wt, _ = _weighted(target, cols, classes, weight_ptr, scalars, MASKED, F)
    wu = tl.reshape(wu, SPLIT)
    step = online_step(sums.m, sums.s, sums.s, z, scales, False, T, F)
    wud = wu * step.below
    if MASKED:
        exists = tl.reshape(tl.broadcast_to(mask, [T.ROWS, T.COLS]), SPLIT)
        wud = tl.where(exists, wud, 0.0)
    fall = finite_maximum(sums.m) - finite_maximum(step.m)
    wud = sums.wud + (sums.wu * fall + tl.sum(wud, axis=2))
    wu_sum = sums.wu + tl.sum(wu, axis=2)
    wt_sum = sums.wt
    if F.Z_LOSS and F.SMOOTHING:
        wt_sum += tl.sum(tl.reshape(wt, SPLIT), axis=2)
    return GroupSums(step.m, step.s, wud, wu_sum, wt_sum)


@triton.jit
def _write_gradients(
    x: Strided,
    t: Strided,
    g: Strided,
    h: Strided,
    weight_ptr,
    at: Rows,
    of_row: RowSlopes,
    start,
    classes,
    scalars: Scalars,
    scales: Scales,
    MASKED: tl.constexpr,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Write the gradients of one block of rows whose softmax is known. Reads the block once, writes it once.

    The target itself is read for the input's gradient alone.
    """
    cols, mask = block(start, classes, at.in_range, MASKED, T)
    logits = tl.load(
        pointers(x, at.x, cols, T), mask=mask, other=-float("inf"), eviction_policy="evict_first"
    ).to(T.ACC)  # fmt: skip
    target = logits
    if g.ptr is not None:
        target = tl.load(pointers(t, at.t, cols, T), mask=mask, other=0.0, eviction_policy="evict_first").to(T.ACC)
    z, dz = softcapped(logits, mask, scales, False, T, F)
    d = z - of_row.m[:, None]
    wu, _, w = _weighted(target, cols, classes, weight_ptr, scalars, MASKED, F)
    if g.ptr is not None:
        slope = exponential(d, scales, F) * of_row.level[:, None] - wu * of_row.of_input[:, None]
        if F.SOFTCAP:
            slope *= dz
        out = pointers(g, at.g, cols, T)
        tl.store(out, narrowed(slope, g.ptr), mask=mask, eviction_policy="evict_first")
    if h.ptr is not None:
        slope = _target_slope(of_logits(d, scales, F), w, of_row.log_s, scalars.keep * of_row.scale, of_row.tail, F)
        out = pointers(h, at.h, cols, T)
        tl.store(out, narrowed(slope, h.ptr), mask=mask, eviction_policy="evict_first")


@triton.jit
def _forward_loop(
    rows,  # the arguments are those of _forward_tile
    classes,
    inner,
    x: Strided,
    t: Strided,
    g: Strided,
    h: Strided,
    weight_ptr,
    saved: SavedRows,
    totals: Totals,
    scaling: Scaling,
    keep: fp64,
    spread: fp64,
    scale: fp64,
    z_scale: fp64,
    cap: fp64,
    factor: fp64,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Forward with rows longer than a tile: an online softmax over their blocks, then gradients, last block first.

    Reads both tensors once from memory and, for gradients, once from the L2 cache; writes each gradient once. As in
    ``cross_entropy._forward_loop`` a group of neighbouring classes takes its maximum before anything is rescaled.
    """
    WRITTEN: tl.constexpr = g.ptr is not None or h.ptr is not None
    scalars = _scalars(keep, spread, scale, z_scale, T)
    scales = scales_of(cap, factor, scaling, T, F)
    full = classes // T.COLS * T.COLS
    loss_sum = tl.zeros([T.ROWS], tl.float64)

    for tile in tl.range(tl.program_id(0), tile_count(rows, inner, T), tl.num_programs(0)):
        row, in_range, outer, within = tile_rows(tile, rows, inner, T)
        base, t_base = row_offsets(x, outer, within, T), row_offsets(t, outer, within, T)
        at = Rows(in_range, base, t_base, base, t_base)
        zeros = tl.zeros([T.ROWS, T.COLS // T.GROUP], T.ACC)
        sums = GroupSums(
            tl.full([T.ROWS, T.COLS // T.GROUP], -float("inf"), T.ACC), zeros, zeros, zeros, zeros
        )  # fmt: skip
        for start in tl.range(0, full, T.COLS):
            sums = _visit(sums, x, t, weight_ptr, at, start, classes, scalars, scales, False, WRITTEN, T, F)
        if full < classes:
            sums = _visit(sums, x, t, weight_ptr, at, full, classes, scalars, scales, True, WRITTEN, T, F)

        m, m_from = finite_maximum(tl.max(sums.m, axis=1)), finite_maximum(sums.m)
        s = tl.sum(sums.s * exponential(sums.m - m[:, None], scales, F), axis=1)
        wud = tl.sum(sums.wud + sums.wu * (m_from - m[:, None]), axis=1)
        wu_sum = tl.sum(sums.wu, axis=1)
        wt_sum = wu_sum
        if F.Z_LOSS and F.SMOOTHING:
            wt_sum = tl.sum(sums.wt, axis=1)
        loss, log_s, level, tail = _row_results(s, m, wud, wu_sum, wt_sum, in_range, scalars.z_scale, scales, F)
        loss_sum = _add_loss(loss_sum, loss, totals, row, in_range, F)
        _save(saved, row, in_range, m, s, level, loss)
        if WRITTEN:
            at = Rows(in_range, base, t_base, row_offsets(g, outer, within, T), row_offsets(h, outer, within, T))
            of_input = scalars.scale * scales.slope if F.SCALED else scalars.scale
            level, tail = (level * of_input / s).to(T.ACC), (tail * scalars.scale).to(T.ACC)
            of_row = RowSlopes(m, log_s.to(T.ACC), level, scalars.scale.to(T.ACC), of_input.to(T.ACC), tail)
            if full < classes:
                _write_gradients(x, t, g, h, weight_ptr, at, of_row, full, classes, scalars, scales, True, T, F)
            for done in tl.range(0, full, T.COLS):  # from the end: the cache holds what was read last
                start = full - T.COLS - done
                _write_gradients(x, t, g, h, weight_ptr, at, of_row, start, classes, scalars, scales, False, T, F)

    if F.REDUCTION != "none":
        _end(totals, tl.sum(loss_sum, axis=0), rows, T, F)


@triton.jit
def _backward(
    rows,  # the arguments are those of _forward_tile, but for the upstream gradient
    classes,
    inner,
    x: Strided,
    t: Strided,
    g: Strided,
    h: Strided,
    weight_ptr,
    upstream_ptr,  # (rows,) or ()
    upstream_stride,  # 0 for ()
    saved: SavedRows,
    scaling: Scaling,
    keep: fp64,
    spread: fp64,
    scale: fp64,
    z_scale: fp64,
    cap: fp64,
    factor: fp64,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Compute the gradients from both tensors and the saved numbers per row. Reads and writes each element once."""
    scalars = _scalars(keep, spread, scale, z_scale, T)
    scales = scales_of(cap, factor, scaling, T, F)
    row, in_range, outer, within = tile_rows(tl.program_id(0), rows, inner, T)
    m = tl.load(saved.m + row, mask=in_range, other=0.0)
    s = tl.load(saved.s + row, mask=in_range, other=1.0)
    level = tl.load(saved.level + row, mask=in_range, other=0.0).to(tl.float64)
    upstream = tl.load(upstream_ptr + row.to(tl.int64) * upstream_stride, mask=in_range, other=0.0)
    of_loss = scalars.scale * upstream.to(tl.float64)
    log_s = tl.log(s)
    tail = of_loss
    if F.Z_LOSS:
        lse = log_s.to(tl.float64) + in_units(m, scales, F).to(tl.float64)
        tail = scalars.z_scale * lse * lse * of_loss
    at = Rows(
        in_range,
        row_offsets(x, outer, within, T), row_offsets(t, outer, within, T),
        row_offsets(g, outer, within, T), row_offsets(h, outer, within, T),
    )  # fmt: skip
    start = tl.program_id(1) * T.COLS
    of_input = of_loss * scales.slope if F.SCALED else of_loss
    level = (level * of_input / s).to(T.ACC)
    of_row = RowSlopes(m, log_s, level, of_loss.to(T.ACC), of_input.to(T.ACC), tail.to(T.ACC))
    _write_gradients(x, t, g, h, weight_ptr, at, of_row, start, classes, scalars, scales, True, T, F)


@triton.jit
def _visit_probabilities(
    x: Strided,
    t: Strided,
    g: Strided,
    h: Strided,
    weight_ptr,
    at: Rows,
    start,
    classes,
    scale,
    scalars: Scalars,
    LOSS: tl.constexpr,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Return w u log y of one block of rows of probabilities, and write the block's gradients."""
    cols, mask = block(start, classes, at.in_range, True, T)
    y = tl.load(pointers(x, at.x, cols, T), mask=mask, other=1.0, eviction_policy="evict_first").to(T.ACC)
    target = y
    if LOSS or g.ptr is not None:
        target = tl.load(pointers(t, at.t, cols, T), mask=mask, other=0.0, eviction_policy="evict_first").to(T.ACC)
    wu, _, w = _weighted(target, cols, classes, weight_ptr, scalars, True, F)
    log_y = tl.log(y)
    if g.ptr is not None:
        slope = wu * -scale[:, None]
        if x.ptr.dtype.element_ty == tl.float32 and T.ACC == tl.float32:
            slope = tl.div_rn(slope, y)  # rounded as torch rounds it
        else:
            slope = slope / y
        slope = tl.where(wu == 0.0, 0.0, slope)
        out = pointers(g, at.g, cols, T)
        tl.store(out, narrowed(slope, g.ptr), mask=mask, eviction_policy="evict_first")
    if h.ptr is not None:
        factor = scalars.keep * -scale
        slope = log_y * factor[:, None]
        if F.HAS_WEIGHT:
            slope = tl.where(w == 0.0, 0.0, slope * w)
        out = pointers(h, at.h, cols, T)
        tl.store(out, narrowed(slope, h.ptr), mask=mask, eviction_policy="evict_first")
    return tl.where(wu == 0.0, 0.0, wu * log_y)


@triton.jit
def _probabilities(
    rows,
    classes,
    inner,
    x: Strided,  # the input: probabilities
    t: Strided,
    g: Strided,
    h: Strided,
    weight_ptr,
    upstream_ptr,  # (rows,) or (); None: 1
    upstream_stride,  # 0 for ()
    totals: Totals,
    keep: fp64,
    spread: fp64,
    scale: fp64,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Compute the loss of probabilities and its gradients, or these alone. No class depends on another: one visit."""
    LOSS: tl.constexpr = totals.loss is not None
    scalars = _scalars(keep, spread, scale, 0.0, T)
    loss_sum = tl.zeros([T.ROWS], tl.float64)

    for tile in tl.range(tl.program_id(0), tile_count(rows, inner, T), tl.num_programs(0)):
        row, in_range, outer, within = tile_rows(tile, rows, inner, T)
        at = Rows(
            in_range,
            row_offsets(x, outer, within, T), row_offsets(t, outer, within, T),
            row_offsets(g, outer, within, T), row_offsets(h, outer, within, T),
        )  # fmt: skip
        of_row = tl.full([T.ROWS], scale, tl.float64)
        if upstream_ptr is not None:
            upstream = tl.load(upstream_ptr + row.to(tl.int64) * upstream_stride, mask=in_range, other=0.0)
            of_row *= upstream.to(tl.float64)
        of_row = of_row.to(T.ACC)
        if T.LOOPED:
            terms = tl.zeros([T.ROWS, T.COLS], T.ACC)
            for start in tl.range(0, classes, T.COLS):
                terms += _visit_probabilities(
                    x, t, g, h, weight_ptr, at, start, classes, of_row, scalars, LOSS, T, F
                )  # fmt: skip
        else:
            terms = _visit_probabilities(x, t, g, h, weight_ptr, at, 0, classes, of_row, scalars, LOSS, T, F)
        if LOSS:
            loss = tl.where(in_range, -tl.sum(terms, axis=1).to(tl.float64), 0.0)
            loss_sum = _add_loss(loss_sum, loss, totals, row, in_range, F)

    if LOSS and F.REDUCTION != "none":
        _end(totals, tl.sum(loss_sum, axis=0), rows, T, F)
