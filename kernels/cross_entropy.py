r"""Cross-entropy: loss, accuracy and gradient from one visit to the logits.

The formula and its names are in ``backends/eager/cross_entropy.py``. With N rows, V classes and b bytes a logit,
device memory moves (labels, and what is kept a row, left out):

========================================  ==================  =====================================================
forward                                   N·V·b               each logit read once
forward that writes the gradient          2·N·V·b             read once, gradient written once; rows longer than
                                                              a tile are read a second time, from the L2 cache
backward, from what the forward kept      2·N·V·b             read once, written once
========================================  ==================  =====================================================

A launch ends with the mean: every program stores what its rows add up to, and the last to end adds those up, always
in the same order, so that results are equal from run to run. Nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.backends.contract import Forward, LossInputs, LossOptions, compute_dtype

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
from .launch import Launch, Memory, alike, on_device, scratch
from .row_loss import (
    Partial,
    Results,
    Rows,
    end_launch,
    gradient_scale,
    row_results,
    slope,
    subtract_at_label,
    sum_of_weights,
    weigh_rows,
)
from .tile_helpers import (
    Scales,
    before_label,
    exponential,
    finite,
    finite_maximum,
    fp64,
    in_units,
    ks_of,
    label_logit,
    labels,
    online_step,
    rank_held,
    rank_with_nans,
    rows_to_read,
    scales_of,
    softcapped,
    softcapped_rows,
    store_ranks,
    weighted_sums,
)
from .tiles import ALL_REGISTERS, FUSED, Tiles, arithmetic, in_blocks, plan, power_of_2, without_spills

__all__ = ["cross_entropy_backward", "cross_entropy_forward"]

# Up to this many rows each program adds up all weights itself; past it, a launch of its own does it once.
_WEIGHED_BY_EACH = 2048
_WEIGH_PARTS = 64  # the same for any number of rows, so that a batch of another size compiles nothing anew


def cross_entropy_forward(
    inputs: LossInputs, *, loss_dtype: torch.dtype, gradient: bool | None, inplace: bool, divisor: Any = None
) -> Forward:
    """See :class:`fastloss.backends.contract.Backend`. One launch; two for a mean with a gradient over many rows."""
    logits, target, weight, options = inputs
    outer, _, inner = logits.shape
    rows, device, k = outer * inner, logits.device, len(options.topk)
    mean, none = options.reduction == "mean", options.reduction == "none"
    result = (logits if inplace else torch.empty_like(logits)) if gradient else None
    weighed = None if divisor is None else divisor.view(1)
    key = (
        *(logits.shape, logits.stride(), device, options, loss_dtype, None if result is None else result.stride()),
        *(inplace, gradient),
        *map(alike, (logits, target, weight, result, weighed)),
    )
    forward, weigh = _forwards.get(key, lambda: _prepare(logits, weight, result, weighed, options))

    loss = torch.empty(rows if none else (), dtype=loss_dtype, device=device)
    right = torch.empty((k, rows) if none else (k,), dtype=torch.float32, device=device)
    scale = row_max = row_sum = nll = None
    if gradient is False:  # the backward pass will need m and the sum
        scale = torch.empty((), dtype=torch.float64, device=device) if mean else None
        row_max = torch.empty(rows, dtype=compute_dtype(logits.dtype), device=device)
        row_sum = torch.empty_like(row_max)
    elif gradient and not inplace:
        nll = torch.empty(rows, dtype=compute_dtype(logits.dtype), device=device)
    with on_device(logits):
        partial = Partial(
            *((None, None, None) if none else scratch(device, forward.grid[0], 1 + power_of_2(max(k, 1))))
        )
        if weigh is not None:
            weighed = torch.empty(_WEIGH_PARTS, dtype=torch.float64, device=device)
            weigh(target, weight, weighed)
        out = Results(loss, right, scale, row_max, row_sum, nll)
        tensors = target, weight, strided(result, like=logits), out, partial, weighed, scaling(options)
        forward(strided(logits), *tensors)
    return Forward(
        loss,
        right.unbind(0) if k else (),
        result,
        saved=tuple(t for t in (row_max, row_sum, scale) if t is not None),
        nll=nll,
    )


_forwards: Memory[tuple[Launch, Launch | None]] = Memory()


def _prepare(
    logits: Tensor, weight: Tensor | None, result: Tensor | None, weighed: Tensor | None, options: LossOptions
) -> tuple[Launch, Launch | None]:
    """Return the forward launch, and the launch before it that adds up the weights of many rows."""
    outer, classes, inner = logits.shape
    rows, k = outer * inner, len(options.topk)
    capped, smoothed = options.softcap is not None, options.label_smoothing != 0
    loaded = {"ranked": k > 0, "smoothed": smoothed}
    tiles = plan(logits, result, plain=weight is None and not capped, **loaded)
    written, divided, double = result is not None, weighed is not None, logits.dtype == torch.float64
    tiles = without_spills(tiles, capped=capped, written=written, divided=divided, double=double, **loaded)
    if capped and smoothed:
        # The most that is kept beside the logits: 16 of those a thread.
        tiles = _of_fewer_logits(tiles, logits, scaled=options.is_scaled and written)
    k_pad = power_of_2(max(k, 1))
    many = weighed is None and options.reduction == "mean" and result is not None and rows > _WEIGHED_BY_EACH
    numbers = (
        *(options.ignore_index, options.label_smoothing, options.lse_square_scale),
        *(*cap_and_factor(options), options.topk),
    )
    constants = {
        "N_WEIGHED": _WEIGH_PARTS if many else 0 if weighed is None else weighed.numel(),
        **({} if tiles.looped else {"PAIRS": tiles.stages > 1 and logits.data_ptr() % 4 == 0}),
        "T": tiles.tile(logits.dtype, G_PAD=tiles.added_at_once),
        "F": form_of(weight, options, REDUCTION=options.reduction, K=k, K_PAD=k_pad),
        **tiles.options(),
    }
    kernel = _forward_loop if tiles.looped else _forward_tile
    shape = (rows, classes, inner)
    forward = Launch(kernel, (tiles.grid,), constants, (*shape, *numbers))
    return forward, _prepare_weighing(weight, rows, classes, options.ignore_index) if many else None


def _of_fewer_logits(tiles: Tiles, logits: Tensor, *, scaled: bool) -> Tiles:
    """Return tiles of 16 logits a thread: smoothing and a softcap keep the most beside them.

    With a scale and a gradient, those that are wide in rows have 8: 16 spilled 8 bytes in float16.
    """
    tiles = tiles._replace(registers=ALL_REGISTERS)
    if tiles.looped and tiles.by_inner:  # it has 8
        return tiles
    outer, _, inner = logits.shape
    cols = min(tiles.cols, 4096) if tiles.looped else tiles.cols
    rows = max(1, min(tiles.rows, (1024 if scaled and tiles.by_inner else 2048) // cols))
    number = outer * triton.cdiv(inner, rows) if tiles.by_inner else triton.cdiv(outer * inner, rows)
    grid = max(1, min(number, tiles.grid * tiles.rows // rows))
    warps = max(4, rows * cols // 512)
    return tiles._replace(rows=rows, cols=cols, warps=warps, number=number, grid=grid)


def _prepare_weighing(weight: Tensor | None, rows: int, classes: int, ignore_index: int) -> Launch:
    """Return the launch that adds up the weights of the counted rows: a mean's gradient needs the sum beforehand."""
    acc = arithmetic(torch.float32 if weight is None else weight.dtype)
    constants = {"HAS_WEIGHT": weight is not None, "ACC": acc, "num_warps": 4, **FUSED}
    numbers = (rows, triton.cdiv(rows, _WEIGH_PARTS), classes, ignore_index)
    return Launch(_weigh_kernel, (_WEIGH_PARTS,), constants, numbers)


def cross_entropy_backward(upstream: Tensor, inputs: LossInputs, saved: Sequence[Tensor], *, inplace: bool) -> Tensor:
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    logits, target, weight, options = inputs
    row_max, row_sum, *scale = saved
    result = logits if inplace else torch.empty_like(logits)
    key = (
        *(logits.shape, logits.stride(), logits.device, options, result.stride(), upstream.stride()),
        *map(alike, (logits, target, weight, result, upstream, *saved)),
    )
    backward = _backwards.get(key, lambda: _prepare_backward(logits, weight, result, upstream, options))
    with on_device(logits):
        saved_rows = (scale[0] if scale else None, row_max, row_sum)
        backward(strided(logits), target, weight, strided(result), upstream, *saved_rows, scaling(options))
    return result


_backwards: Memory[Launch] = Memory()


def _prepare_backward(
    logits: Tensor, weight: Tensor | None, result: Tensor, upstream: Tensor, options: LossOptions
) -> Launch:
    tiles = plan(logits, result)
    # No row is held whole here: each program takes one tile of some rows and some classes.
    many = weight is not None or options.softcap is not None or options.reduction == "none"
    many = many or options.label_smoothing != 0
    registers = ALL_REGISTERS if many else 0
    tiles = tiles._replace(cols=min(tiles.cols, 4096 // tiles.rows), warps=4, registers=registers)
    outer, classes, inner = logits.shape
    tiles, blocks = in_blocks(tiles, classes)
    numbers = (
        *(outer * inner, classes, inner),
        upstream.stride(0) if upstream.dim() else 0,
        options.ignore_index,
        options.label_smoothing,
        options.lse_square_scale,
        *cap_and_factor(options),
    )
    constants = {"T": tiles.tile(logits.dtype), "F": form_of(weight, options), **tiles.options()}
    return Launch(_backward, (tiles.number, blocks), constants, numbers)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _weigh_kernel(
    target_ptr,  # (rows,)
    weight_ptr,  # (classes,) or None
    weighed_ptr,  # (programs,): the weight of each program's share of the rows
    rows,
    share,  # rows a program
    classes,
    ignore_index,
    HAS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Store Σ w_y over the counted rows, in parts. Reads the labels once."""
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, rows)
    total = weigh_rows(target_ptr, weight_ptr, first, end, classes, ignore_index, HAS_WEIGHT, ACC)
    tl.store(weighed_ptr + tl.program_id(0), total)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _forward_tile(
    logits: Strided,
    target_ptr,  # (rows,)
    weight_ptr,  # (classes,) or None
    gradient: Strided,
    out: Results,
    partial: Partial,
    weighed_ptr,  # parts of the gradient's divisor: of Σ w_y for "mean"; or None
    scaling: Scaling,
    rows,
    classes,
    inner,
    ignore_index,
    eps: fp64,
    z_scale: fp64,
    cap: fp64,
    factor: fp64,
    ks,  # K ints
    N_WEIGHED: tl.constexpr,
    PAIRS: tl.constexpr,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Forward with whole rows in registers: reads the logits once, writes the gradient once."""
    eps, z_scale = tl.full([1], eps, tl.float64), tl.full([1], z_scale, tl.float64)
    scales = scales_of(cap, factor, scaling, T, F)
    scale = gradient_scale(
        gradient, target_ptr, weight_ptr, weighed_ptr, rows, classes, ignore_index, N_WEIGHED, T, F
    )
    if F.SCALED:
        scale *= scales.slope
    cols = tl.arange(0, T.COLS)
    col_mask = inside(cols, classes, T)
    x_cols, g_cols = class_offsets(logits, cols, T), class_offsets(gradient, cols, T)
    loss_sum, weight_sum = tl.zeros([T.ROWS], tl.float64), tl.zeros([T.ROWS], tl.float64)
    counted_sum, right_sum = tl.zeros([T.ROWS], tl.int32), tl.zeros([T.ROWS, F.K_PAD], tl.int32)

    for tile in tl.range(tl.program_id(0), tile_count(rows, inner, T), tl.num_programs(0), num_stages=T.STAGES):
        row, in_range, outer, within = tile_rows(tile, rows, inner, T)
        label, counted, weight = labels(
            target_ptr, row, in_range, weight_ptr, classes, ignore_index, F.HAS_WEIGHT, T.ACC
        )
        base = row_offsets(logits, outer, within, T)
        # A bound for each row: a mask that is the same for all of them would be kept in registers.
        bound = tl.where(rows_to_read(counted, in_range, T.BY_INNER), classes, 0)
        mask = inside(cols[None, :], bound[:, None], T)
        x = tl.load(logits.ptr + base[:, None] + x_cols[None, :], mask=mask, other=-float("inf")).to(T.ACC)
        x_label = label_logit(logits.ptr, base + label * logits.stride_class, counted, PAIRS, T.ACC)
        if F.K > 0:
            k_vector, most_k = ks_of(ks, F.K, F.K_PAD)
            rank = rank_held(x, x_label, label, counted, most_k, logits, base, T)
            if F.REDUCTION == "none":
                store_ranks(out.right, rank, row, rows, in_range, counted, weight == weight, ks, F.K)
            else:
                right_sum += ((rank[:, None] < k_vector[None, :]) & counted[:, None]).to(tl.int32)
                counted_sum += counted.to(tl.int32)

        e, dz, s, m, z_label, wz, w_total = _softmax_of_tile(
            x, x_label, cols, col_mask, weight_ptr, scales, classes, T, F
        )
        loss, level, hit, spread = row_results(
            s, m, z_label, wz, m, w_total, weight, counted, eps, z_scale, classes, scales, F
        )
        if F.REDUCTION == "none":
            tl.store(out.loss + row, loss.to(T.ACC), mask=in_range)
        else:
            loss_sum += loss
            weight_sum += weight.to(tl.float64)
        if out.row_max is not None:
            tl.store(out.row_max + row, m, mask=in_range)
            tl.store(out.row_sum + row, s, mask=in_range)
        if out.nll is not None:
            tl.store(out.nll + row, tl.log(s) + in_units(m - z_label, scales, F), mask=in_range)
        if gradient.ptr is not None:
            level, hit, spread = (level * scale / s).to(T.ACC), (hit * scale).to(T.ACC), (spread * scale).to(T.ACC)
            g = slope(e, cols, level, spread, weight_ptr, col_mask, F)
            g = subtract_at_label(g, label, hit, 0, T.ROWS, T.COLS)
            if F.SOFTCAP:
                g *= dz
            g = tl.where(counted[:, None], g, 0.0)
            g_base = row_offsets(gradient, outer, within, T)
            out_mask = inside(cols[None, :], tl.where(in_range, classes, 0)[:, None], T)
            tl.store(gradient.ptr + g_base[:, None] + g_cols[None, :], g, mask=out_mask)

    if F.REDUCTION != "none":
        end_launch(out, partial, loss_sum, weight_sum, counted_sum, right_sum, T, F)


@triton.jit
def _softmax_of_tile(
    x, x_label, cols, col_mask, weight_ptr, scales: Scales, classes, T: tl.constexpr, F: tl.constexpr
):
    """Return exp(z − m), dz/dx, and of each row s, m, z_y, Σ_c w_c (z_c − m) and W; the last two for smoothing."""
    z, dz = softcapped(x, col_mask[None, :], scales, True, T, F)
    z_label = softcapped_rows(x_label, scales, T, F)
    m = finite_maximum(tl.max(z, axis=1))
    wz, w_total = tl.zeros([T.ROWS], T.ACC), tl.zeros([T.ROWS], T.ACC) + classes
    if F.SMOOTHING:
        weighted = z - m[:, None]
        if F.HAS_WEIGHT:
            w = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(T.ACC)
            weighted *= w[None, :]
            w_total = tl.zeros([T.ROWS], T.ACC) + tl.sum(w, axis=0)
        wz = tl.sum(tl.where(col_mask[None, :], weighted, 0.0), axis=1)
        if not F.HAS_WEIGHT:
            # Nothing below begins before this sum is done, whose terms take registers. It is NaN where the sum of
            # exponentials is; with class weights it also is where a weight of 0 meets a logit of −inf.
            m = tl.where(wz == wz, m, wz)
    e = exponential(z - m[:, None], scales, F)
    return e, dz, tl.sum(e, axis=1), m, z_label, wz, w_total


class _Online(NamedTuple):
    """An online softmax, of each group of classes: (ROWS, groups)."""

    m: Any  # the running maximum
    s: Any  # Σ exp(z − m)
    wz: Any  # Σ_c w_c (z_c − r)
    rank: Any  # classes before the label


@triton.jit
def _visit(
    state: _Online,
    logits: Strided,
    weight_ptr,
    base,
    start,
    classes,
    read,  # (ROWS,): whether the row's logits are read
    label,
    x_label,
    r,
    scales: Scales,
    MASKED: tl.constexpr,
    TWICE: tl.constexpr,  # these logits will be read again
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Return the state with one more block of a looped row."""
    m_group, s_group, wz_group, rank_group = state
    cols, mask = block(start, classes, read, MASKED, T)
    places = pointers(logits, base, cols, T)
    policy: tl.constexpr = "evict_last" if TWICE else "evict_first"
    x = tl.load(places, mask=mask, other=-float("inf"), eviction_policy=policy).to(T.ACC)
    if F.K > 0:
        rank_group += before_label(x, x_label, cols, start, label, T.GROUP, T.ROWS, T.COLS)
    z, _ = softcapped(x, mask, scales, MASKED, T, F)
    if F.SMOOTHING:
        wz_group += weighted_sums(z, r, weight_ptr, cols, classes, mask, MASKED, T, F)
    step = online_step(m_group, s_group, s_group, z, scales, False, T, F)
    return _Online(step.m, step.s, wz_group, rank_group)


@triton.jit
def _write_gradient(
    logits: Strided,
    gradient: Strided,
    weight_ptr,
    base,
    g_base,
    start,
    classes,
    of: Rows,
    scales: Scales,
    MASKED: tl.constexpr,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Write the gradient of one block of rows whose softmax is known. Reads the block once, writes it once."""
    cols = start + tl.arange(0, T.COLS)
    mask, out_mask = of.read[:, None], of.in_range[:, None]
    col_mask = cols < classes
    if MASKED:
        aligned = inside(cols, classes, T)[None, :]
        mask, out_mask = mask & aligned, out_mask & aligned
    places = pointers(logits, base, cols, T)
    x = tl.load(places, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(T.ACC)
    z, dz = softcapped(x, mask, scales, False, T, F)
    e = exponential(z - of.m[:, None], scales, F)
    # A row that does not count gets 0: nothing of it is read, so that e is finite, and its factors are 0. Where its
    # neighbours share its accesses it is read, and may hold anything.
    level = tl.where(of.counted, of.level, 0.0)
    hit, spread = tl.where(of.counted, of.hit, 0.0), tl.where(of.counted, of.spread, 0.0)
    label = of.label.to(tl.int32)  # as the columns are: 64 bits for each of them would take two registers
    at = tl.max(label, axis=0)
    g = slope(e, cols, level, spread, weight_ptr, col_mask, F)
    if e.shape[0] > 1:
        g -= tl.where(cols[None, :] == label[:, None], hit[:, None], 0.0)
    elif (at >= start) & (at < start + T.COLS):  # of a single row's blocks one holds the label
        g = subtract_at_label(g, label, hit, start, 1, T.COLS)
    if F.SOFTCAP:
        g *= dz
    if T.BY_INNER:
        g = tl.where(of.counted[:, None], g, 0.0)
    tl.store(pointers(gradient, g_base, cols, T), g, mask=out_mask, eviction_policy="evict_first")


@triton.jit
def _ends(lead, width, classes, VEC: tl.constexpr):
    """Return a row's first ``lead`` classes and those behind the next ``width``, (2 VEC,), and a mask of them."""
    lane = tl.arange(0, 2 * VEC)
    cols = tl.where(lane < VEC, lane, lead + width + lane - VEC)
    return cols, tl.where(lane < VEC, cols < lead, cols < classes)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _forward_loop(
    logits: Strided,
    target_ptr,  # (rows,)
    weight_ptr,  # (classes,) or None
    gradient: Strided,
    out: Results,
    partial: Partial,
    weighed_ptr,  # parts of the gradient's divisor: of Σ w_y for "mean"; or None
    scaling: Scaling,
    rows,
    classes,
    inner,
    ignore_index,
    eps: fp64,
    z_scale: fp64,
    cap: fp64,
    factor: fp64,
    ks,  # K ints
    N_WEIGHED: tl.constexpr,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Forward with rows longer than a tile: an online softmax over their blocks, then the gradient, last block first.

    Reads the logits once from memory and, for the gradient, once from the L2 cache; writes the gradient once. A group
    of neighbouring classes takes its maximum before anything is rescaled, so that there are 1 + 1 / GROUP
    exponentials a logit (Milakov and Gimelshein 2018, arXiv:1805.02867, rescale at each).

    ``ENDS``: a row begins anywhere in an access, as those of an odd number of classes do. Its blocks are of the whole
    aligned groups of ``VEC`` logits in it. The logits before the first group and behind the last, fewer than ``VEC``
    each, are visited apart. Such rows have no class weights and no softcap, and a tile has one of them.
    """
    eps, z_scale = tl.full([1], eps, tl.float64), tl.full([1], z_scale, tl.float64)
    scales = scales_of(cap, factor, scaling, T, F)
    scale = gradient_scale(
        gradient, target_ptr, weight_ptr, weighed_ptr, rows, classes, ignore_index, N_WEIGHED, T, F
    )
    if F.SCALED:
        scale *= scales.slope
    w_total = tl.zeros([T.ROWS], T.ACC) + classes
    if F.SMOOTHING and F.HAS_WEIGHT:
        w_total = tl.zeros([T.ROWS], T.ACC) + sum_of_weights(weight_ptr, classes, T.ACC, T.COLS)
    loss_sum, weight_sum = tl.zeros([T.ROWS], tl.float64), tl.zeros([T.ROWS], tl.float64)
    counted_sum, right_sum = tl.zeros([T.ROWS], tl.int32), tl.zeros([T.ROWS, F.K_PAD], tl.int32)

    for tile in tl.range(tl.program_id(0), tile_count(rows, inner, T), tl.num_programs(0)):
        row, in_range, outer, within = tile_rows(tile, rows, inner, T)
        label, counted, weight = labels(
            target_ptr, row, in_range, weight_ptr, classes, ignore_index, F.HAS_WEIGHT, T.ACC
        )
        # Where a row begins, where its blocks do, the classes before those and in them, and the label's place there.
        begin = row_offsets(logits, outer, within, T)
        base, lead, width, place = begin, 0, classes, label
        if T.ENDS:
            base = tl.cdiv(begin, T.VEC) * T.VEC
            lead = tl.max(base - begin, axis=0).to(tl.int32)
            width = (classes - lead) // T.VEC * T.VEC
            place = tl.minimum(label - lead, width)
            end_cols, at_ends = _ends(lead, width, classes, T.VEC)
            ends = logits.ptr + begin[:, None] + end_cols[None, :]
            x_ends = tl.load(ends, mask=counted[:, None] & at_ends[None, :], other=-float("inf")).to(T.ACC)
        full = width // T.COLS * T.COLS
        x_label = tl.load(logits.ptr + begin + label * logits.stride_class, mask=counted, other=0.0).to(T.ACC)
        label, place = label.to(tl.int32), place.to(tl.int32)  # as the columns are
        z_label = softcapped_rows(x_label, scales, T, F)
        r = tl.where(finite(z_label), z_label, 0.0)
        m_group = tl.full([T.ROWS, T.COLS // T.GROUP], -float("inf"), T.ACC)
        s_group = tl.zeros([T.ROWS, T.COLS // T.GROUP], T.ACC)
        wz_group = tl.zeros([T.ROWS, T.COLS // T.GROUP], T.ACC)
        rank_group = tl.zeros([T.ROWS, T.COLS // T.GROUP], tl.int32)
        state = _Online(m_group, s_group, wz_group, rank_group)
        read = rows_to_read(counted, in_range, T.BY_INNER)
        TWICE: tl.constexpr = gradient.ptr is not None
        if tl.max(counted.to(tl.int32), axis=0) > 0:
            for start in tl.range(0, full, T.COLS, num_stages=T.STAGES):
                state = _visit(
                    state, logits, weight_ptr, base, start, width, read, place, x_label, r, scales, False, TWICE, T, F
                )
            if full < width:
                state = _visit(
                    state, logits, weight_ptr, base, full, width, read, place, x_label, r, scales, True, TWICE, T, F
                )
        if F.K > 0:
            k_vector, _ = ks_of(ks, F.K, F.K_PAD)
            rank = tl.sum(state.rank, axis=1)
            if T.ENDS:
                tied = (x_ends == x_label[:, None]) & (end_cols[None, :] < label[:, None])
                before = at_ends[None, :] & (~(x_ends <= x_label[:, None]) | tied)
                rank += tl.sum(before.to(tl.int32), axis=1)
            rank = rank_with_nans(rank, x_label, label, counted, logits, begin, T)
            if F.REDUCTION == "none":
                store_ranks(out.right, rank, row, rows, in_range, counted, weight == weight, ks, F.K)
            else:
                right_sum += ((rank[:, None] < k_vector[None, :]) & counted[:, None]).to(tl.int32)
                counted_sum += counted.to(tl.int32)

        m, wz = tl.max(state.m, axis=1), tl.sum(state.wz, axis=1)
        if T.ENDS:
            m = tl.maximum(m, tl.max(x_ends, axis=1))
        m = finite_maximum(m)
        s = tl.sum(state.s * exponential(state.m - m[:, None], scales, F), axis=1)
        if T.ENDS:
            e_ends = exponential(x_ends - m[:, None], scales, F)
            s += tl.sum(e_ends, axis=1)
            if F.SMOOTHING:
                wz += tl.sum(tl.where(at_ends[None, :], x_ends - r[:, None], 0.0), axis=1)
        loss, level, hit, spread = row_results(
            s, m, z_label, wz, r, w_total, weight, counted, eps, z_scale, classes, scales, F
        )
        if F.REDUCTION == "none":
            tl.store(out.loss + row, loss.to(T.ACC), mask=in_range)
        else:
            loss_sum += loss
            weight_sum += weight.to(tl.float64)
        if out.row_max is not None:
            tl.store(out.row_max + row, m, mask=in_range)
            tl.store(out.row_sum + row, s, mask=in_range)
        if out.nll is not None:
            tl.store(out.nll + row, tl.log(s) + in_units(m - z_label, scales, F), mask=in_range)
        if gradient.ptr is not None:
            g_begin = row_offsets(gradient, outer, within, T)
            g_base = g_begin
            level, hit, spread = (level * scale / s).to(T.ACC), (hit * scale).to(T.ACC), (spread * scale).to(T.ACC)
            if T.ENDS:
                g_base = tl.cdiv(g_begin, T.VEC) * T.VEC
                g_ends = slope(e_ends, end_cols, level, spread, None, None, F)
                g_ends -= tl.where(end_cols[None, :] == label[:, None], hit[:, None], 0.0)
                g_ends = tl.where(counted[:, None], g_ends, 0.0)
                ends = gradient.ptr + g_begin[:, None] + end_cols[None, :]
                tl.store(ends, g_ends, mask=in_range[:, None] & at_ends[None, :])
            of = Rows(in_range, read, counted, place, m, level, hit, spread)
            if full < width:
                _write_gradient(logits, gradient, weight_ptr, base, g_base, full, width, of, scales, True, T, F)
            for done in tl.range(0, full, T.COLS):  # from the end: what was read last is in the cache for sure
                start = full - T.COLS - done
                _write_gradient(logits, gradient, weight_ptr, base, g_base, start, width, of, scales, False, T, F)

    if F.REDUCTION != "none":
        end_launch(out, partial, loss_sum, weight_sum, counted_sum, right_sum, T, F)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _backward(
    logits: Strided,
    target_ptr,  # (rows,)
    weight_ptr,  # (classes,) or None
    gradient: Strided,  # may be the logits
    upstream_ptr,  # (rows,) or ()
    scale_ptr,  # (): 1 / Σ w_y, for "mean"; or None
    row_max_ptr,  # (rows,): m
    row_sum_ptr,  # (rows,): Σ exp(z − m)
    scaling: Scaling,
    rows,
    classes,
    inner,
    upstream_stride,  # 0 for ()
    ignore_index,
    eps: fp64,
    z_scale: fp64,
    cap: fp64,
    factor: fp64,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Gradient from the logits and what the forward kept of each row. Reads the logits once, writes once."""
    eps, z_scale = tl.full([1], eps, tl.float64), tl.full([1], z_scale, tl.float64)
    scales = scales_of(cap, factor, scaling, T, F)
    row, in_range, outer, within = tile_rows(tl.program_id(0), rows, inner, T)
    label, counted, weight = labels(target_ptr, row, in_range, weight_ptr, classes, ignore_index, F.HAS_WEIGHT, T.ACC)
    m = tl.load(row_max_ptr + row, mask=in_range, other=0.0)
    s = tl.load(row_sum_ptr + row, mask=in_range, other=1.0)
    scale = tl.load(upstream_ptr + row.to(tl.int64) * upstream_stride, mask=in_range, other=0.0).to(tl.float64)
    if scale_ptr is not None:
        scale *= tl.load(scale_ptr)
    if F.SCALED:
        scale *= scales.slope
    w_total = tl.zeros([T.ROWS], T.ACC) + classes
    if F.SMOOTHING and F.HAS_WEIGHT:
        w_total = tl.zeros([T.ROWS], T.ACC) + sum_of_weights(weight_ptr, classes, T.ACC, T.COLS)
    _, level, hit, spread = row_results(s, m, m, m, m, w_total, weight, counted, eps, z_scale, classes, scales, F)
    base, g_base = row_offsets(logits, outer, within, T), row_offsets(gradient, outer, within, T)
    start = tl.program_id(1) * T.COLS
    read = rows_to_read(counted, in_range, T.BY_INNER)
    level, hit, spread = (level * scale / s).to(T.ACC), (hit * scale).to(T.ACC), (spread * scale).to(T.ACC)
    of = Rows(in_range, read, counted, label, m, level, hit, spread)
    _write_gradient(logits, gradient, weight_ptr, base, g_base, start, classes, of, scales, True, T, F)
