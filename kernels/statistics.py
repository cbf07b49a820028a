r"""What the logits say of each row, for losses that are put together from it, and its gradient.

The formulas and their names are in ``backends/eager/statistics.py``. With N rows, V classes and b bytes a logit,
device memory moves (labels, and what is given a row, left out):

=========  =======  ===================================================
forward    N·V·b    each logit read once, in one launch for all parts
backward   2·N·V·b  read once, gradient written once, in one launch
=========  =======  ===================================================

Logits lose their row's maximum (in backward, lse in two parts) before they are multiplied by log2(e), so that z_y and
lse are in the same units and their difference is as exact as the sum of exponentials.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.backends.contract import ExternalLabel, LossOptions, RowStatistics

from .launch import ALL_REGISTERS, arithmetic, begin, in_blocks, on_device, plan
from .tile_helpers import (
    LOG2_E,
    before_label,
    class_offsets,
    finite,
    fp64,
    inside,
    labels,
    nans_before,
    rank_in_tile,
    row_offsets,
    rows_to_read,
    tanh,
    tile_rows,
)

__all__ = ["row_statistics_backward", "row_statistics_forward"]

# exp2() of it is 0 even in float64; so is its product with that 0, as −inf's is not.
_LOG_OF_0 = tl.constexpr(-2e3)
_NO_CLASS = tl.constexpr(0x7FFFFFFF)


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
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    outer, classes, inner = logits.shape
    rows = outer * inner
    tiles = plan(logits)
    extra = entropy or ranked is not None
    everything = extra and options.label_smoothing != 0 and options.softcap is not None
    many = everything or (ranked is not None and tiles.looped and tiles.by_inner)
    tiles = tiles._replace(registers=ALL_REGISTERS if many else tiles.registers)

    def rowwise(wanted: bool, dtype: torch.dtype = torch.float64) -> Tensor | None:
        return torch.empty(rows, dtype=dtype, device=logits.device) if wanted else None

    lse, label_logit = (torch.empty(rows, dtype=torch.float64, device=logits.device) for _ in range(2))
    row_entropy, weighted_sum = rowwise(entropy), rowwise(options.label_smoothing != 0)
    row_predicted, rank = rowwise(predicted, torch.int64), rowwise(ranked is not None, torch.int64)
    with on_device(logits):
        kernel = _statistics_loop if tiles.looped else _statistics_tile
        begin(
            kernel,
            (tiles.number,),
            (
                *(logits, target, weight, lse, label_logit, row_entropy, weighted_sum, row_predicted, rank),
                *((None, None, 0) if ranked is None else ranked),
                *(rows, classes, inner, *logits.stride(), options.ignore_index, options.softcap or 1.0),
            ),
            {
                "EVERY_ROW": every_row,
                **_constants(logits, weight, options),
                **tiles.constants(),
                **({"GROUP": tiles.group} if tiles.looped else {}),
            },
        )
    if weighted_sum is not None:
        total = classes if weight is None else weight.sum(dtype=torch.float64)
        weighted_sum += total * torch.where(label_logit.isfinite(), label_logit, 0.0)
    return RowStatistics(lse, label_logit, row_entropy, weighted_sum, row_predicted, rank)


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
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    outer, classes, inner = logits.shape
    result = logits if inplace else torch.empty_like(logits)
    tiles = plan(logits, result)
    # No row is held whole here: each program takes one tile of some rows and some classes.
    tiles, blocks = in_blocks(tiles._replace(cols=min(tiles.cols, 4096 // tiles.rows), warps=4), classes)
    with on_device(logits):
        begin(
            _statistics_gradient,
            (tiles.number, blocks),
            (
                *(logits, target, weight, result, lse, entropy),
                *(None if u is None else u.contiguous() for u in upstreams),
                *(outer * inner, classes, inner, *logits.stride(), *result.stride()),
                *(options.ignore_index, options.softcap or 1.0),
            ),
            {**_constants(logits, weight, options), **tiles.constants()},
        )
    return result


def _constants(logits: Tensor, weight: Tensor | None, options: LossOptions) -> dict[str, object]:
    """What the kernels are compiled for; which parts are asked for, they see by the pointers that are None."""
    return {
        "HAS_WEIGHT": weight is not None,
        "SOFTCAP": options.softcap is not None,
        "ACC": arithmetic(logits.dtype),
    }


@triton.jit
def _capped(x, cap, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """The logit z of x, for a vector of rows."""
    if SOFTCAP:
        t, _ = tanh(x / cap, ACC)
        return t * cap
    return x


@triton.jit
def _first_nan(logits_ptr, base, of_rows, classes, x_class, VEC: tl.constexpr, COLS: tl.constexpr):
    """The class of the first NaN of some rows: rare, so a pass of its own; no class in the others."""
    first = tl.zeros(base.shape, tl.int32) + _NO_CLASS
    for start in tl.range(0, classes, COLS):
        cols = start + tl.arange(0, COLS)
        mask = of_rows[:, None] & inside(cols, classes, VEC)[None, :]
        x = tl.load(logits_ptr + base[:, None] + class_offsets(cols, x_class, VEC)[None, :], mask=mask, other=0.0)
        first = tl.minimum(first, tl.min(tl.where(x != x, cols[None, :], _NO_CLASS), axis=1))
    return first


@triton.jit
def _store_label_logit(
    label_logit_ptr,
    logits_ptr,
    base,
    label,
    row,
    counted,
    in_range,
    x_class,
    cap,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
):
    """z_y. Before the visit, so that no register holds it on the way.

    But for Σ_c w_c z_c, a float32 sum of what may be far from 0: that is taken of z_c − z_y, where z_y is finite.
    """
    z_label = _capped(
        tl.load(logits_ptr + base + label * x_class, mask=counted, other=0.0).to(ACC), cap, SOFTCAP, ACC
    )
    tl.store(label_logit_ptr + row, z_label.to(tl.float64), mask=in_range)
    return tl.where(finite(z_label), z_label, 0.0)


@triton.jit
def _store_row(
    lse_ptr,
    entropy_ptr,
    weighted_sum_ptr,
    predicted_ptr,
    row,
    in_range,
    m,  # the row's maximum, or another finite number near it
    s,  # Σ exp(z − m)
    u,  # Σ exp(z − m) (z − m)
    wz,
    first,  # the first class of the greatest logit
):
    """What a visit has found, one number a row each; in float64, as only then lse keeps what s says."""
    log_s = tl.log(s).to(tl.float64)
    tl.store(lse_ptr + row, log_s + m.to(tl.float64), mask=in_range)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, log_s - (u / s).to(tl.float64), mask=in_range)
    if weighted_sum_ptr is not None:
        tl.store(weighted_sum_ptr + row, wz.to(tl.float64), mask=in_range)
    if predicted_ptr is not None:
        tl.store(predicted_ptr + row, first.to(tl.int64), mask=in_range)


@triton.jit
def _load_label(logit_ptr, position_ptr, row, in_range, ACC: tl.constexpr):
    """The label whose rank is wanted: its logit, and how many of the classes at hand have a lower index."""
    x_label = tl.load(logit_ptr + row, mask=in_range, other=0.0).to(ACC)
    return x_label, tl.load(position_ptr + row, mask=in_range, other=0)


@triton.jit(do_not_specialize=["rows", "ignore_index", "most_k"])
def _statistics_tile(
    logits_ptr,  # (outer, classes, inner), any strides
    target_ptr,  # (rows,)
    weight_ptr,  # (classes,) or None
    lse_ptr,  # (rows,), float64, as the next three
    label_logit_ptr,
    entropy_ptr,  # or None
    weighted_sum_ptr,  # or None
    predicted_ptr,  # (rows,), int64; or None
    rank_ptr,  # (rows,), int64; or None
    ranked_logit_ptr,  # (rows,), float64; or None: the label whose rank is wanted
    ranked_position_ptr,  # (rows,), int64; or None
    most_k,
    rows,
    classes,
    inner,
    x_outer,
    x_class,
    x_inner,
    ignore_index,
    cap: fp64,
    EVERY_ROW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BY_INNER: tl.constexpr,
):
    """Forward with whole rows in registers. Reads each logit once."""
    cap = tl.full([1], cap, ACC)
    row, in_range, outer, within = tile_rows(tl.program_id(0), rows, inner, ROWS, BY_INNER)
    label, counted, _ = labels(target_ptr, row, in_range, target_ptr, classes, ignore_index, False, ACC)
    read = in_range if EVERY_ROW else rows_to_read(counted, in_range, BY_INNER)
    base = row_offsets(outer, within, x_outer, x_inner, VEC)
    cols = tl.arange(0, COLS)
    col_mask = inside(cols, classes, VEC)
    pointers = logits_ptr + base[:, None] + class_offsets(cols, x_class, VEC)[None, :]
    x = tl.load(pointers, mask=read[:, None] & col_mask[None, :], other=-float("inf")).to(ACC)
    near = _store_label_logit(
        label_logit_ptr, logits_ptr, base, label, row, counted, in_range, x_class, cap, SOFTCAP, ACC
    )
    if rank_ptr is not None:
        x_label, position = _load_label(ranked_logit_ptr, ranked_position_ptr, row, in_range, ACC)
        rank = rank_in_tile(x, x_label, cols, position, read & in_range, most_k)
        tl.store(rank_ptr + row, rank.to(tl.int64), mask=in_range)

    x_max = tl.max(x, axis=1)
    m = _capped(x_max, cap, SOFTCAP, ACC)
    m = tl.where(m == -float("inf"), 0.0, m)
    z = x
    if SOFTCAP:
        t, _ = tanh(x / cap[:, None], ACC)
        z = tl.where(col_mask[None, :], t * cap[:, None], -float("inf"))
    below = z - m[:, None]
    e = tl.exp2(below * LOG2_E)
    s = tl.sum(e, axis=1)
    u, wz, first = s, s, row
    if entropy_ptr is not None:
        u = tl.sum(e * tl.maximum(below, _LOG_OF_0), axis=1)
    if weighted_sum_ptr is not None:
        weighted = z - near[:, None]
        if HAS_WEIGHT:
            weighted *= tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(ACC)[None, :]
        wz = tl.sum(tl.where(col_mask[None, :], weighted, 0.0), axis=1)
    if predicted_ptr is not None:
        first = tl.min(tl.where(x == x_max[:, None], cols[None, :], _NO_CLASS), axis=1)
        if tl.max((s != s).to(tl.int32), axis=0) > 0:  # some row holds a NaN, or +inf
            nan = tl.min(tl.where(x != x, cols[None, :], _NO_CLASS), axis=1)
            first = tl.where(nan != _NO_CLASS, nan, first)
    _store_row(lse_ptr, entropy_ptr, weighted_sum_ptr, predicted_ptr, row, in_range, m, s, u, wz, first)


@triton.jit
def _visit(
    m_group,  # (ROWS, groups): the running maximum of each group of classes
    s_group,  # (ROWS, groups): Σ exp(z − m_group)
    u_group,  # (ROWS, groups): Σ exp(z − m_group) (z − m_group)
    wz_group,  # (ROWS, groups): Σ_c w_c (z_c − near)
    first_group,  # (ROWS, groups): the first class of the group's greatest logit
    best_group,  # (ROWS, groups): that logit
    rank_group,  # (ROWS, groups): how many classes stand before the label that is ranked
    logits_ptr,
    weight_ptr,
    base,
    start,
    classes,
    x_class,
    read,
    near,
    x_label,
    position,
    cap,
    MASKED: tl.constexpr,
    ENTROPY: tl.constexpr,
    WEIGHTED_SUM: tl.constexpr,
    PREDICTED: tl.constexpr,
    RANKED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block of a looped row, joined to what the blocks before it gave."""
    cols = start + tl.arange(0, COLS)
    mask = read[:, None]
    if MASKED:
        mask = mask & inside(cols, classes, VEC)[None, :]
    pointers = logits_ptr + base[:, None] + class_offsets(cols, x_class, VEC)[None, :]
    x = tl.load(pointers, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(ACC)
    SPLIT: tl.constexpr = [ROWS, COLS // GROUP, GROUP]
    if PREDICTED:
        x_split = tl.reshape(x, SPLIT)
        best = tl.max(x_split, axis=2)
        here = tl.reshape(tl.zeros([ROWS, 1], tl.int32) + cols[None, :], SPLIT)
        first = tl.min(tl.where(x_split == best[:, :, None], here, _NO_CLASS), axis=2)
        first_group = tl.where(best > best_group, first, first_group)
        best_group = tl.maximum(best_group, best)
    if RANKED:
        rank_group += before_label(x, x_label, cols, start, position, GROUP, ROWS, COLS)
    z = x
    if SOFTCAP:
        t, _ = tanh(x / cap[:, None], ACC)
        z = t * cap[:, None]
        if MASKED:
            z = tl.where(mask, z, -float("inf"))
    if WEIGHTED_SUM:
        weighted = z - near[:, None]
        if HAS_WEIGHT:
            weighted *= tl.load(weight_ptr + cols, mask=cols < classes, other=0.0).to(ACC)[None, :]
        if MASKED:
            weighted = tl.where(mask, weighted, 0.0)
        wz_group += tl.sum(tl.reshape(weighted, SPLIT), axis=2)
    z = tl.reshape(z, SPLIT)
    m_new = tl.maximum(m_group, tl.max(z, axis=2))
    m = tl.where(m_new == -float("inf"), 0.0, m_new)
    fall = tl.maximum(m_group - m, _LOG_OF_0)
    factor = tl.exp2(fall * LOG2_E)
    below = z - m[:, :, None]
    e = tl.exp2(below * LOG2_E)
    if ENTROPY:
        u_group = (u_group + s_group * fall) * factor + tl.sum(e * tl.maximum(below, _LOG_OF_0), axis=2)
    s_group = s_group * factor + tl.sum(e, axis=2)
    return m_new, s_group, u_group, wz_group, first_group, best_group, rank_group


@triton.jit(do_not_specialize=["rows", "ignore_index", "most_k"])
def _statistics_loop(
    logits_ptr,  # the arguments are those of _statistics_tile
    target_ptr,
    weight_ptr,
    lse_ptr,
    label_logit_ptr,
    entropy_ptr,
    weighted_sum_ptr,
    predicted_ptr,
    rank_ptr,
    ranked_logit_ptr,
    ranked_position_ptr,
    most_k,
    rows,
    classes,
    inner,
    x_outer,
    x_class,
    x_inner,
    ignore_index,
    cap: fp64,
    EVERY_ROW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BY_INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Forward with rows longer than a tile: an online softmax over their blocks. Reads each logit once.

    A group of neighbouring classes takes its maximum before anything is rescaled, as in ``cross_entropy``. Where the
    maximum rises by r, Σ e (z − m) becomes (Σ e (z − m) − r Σ e) exp(−r).
    """
    cap = tl.full([1], cap, ACC)
    row, in_range, outer, within = tile_rows(tl.program_id(0), rows, inner, ROWS, BY_INNER)
    label, counted, _ = labels(target_ptr, row, in_range, target_ptr, classes, ignore_index, False, ACC)
    read = in_range if EVERY_ROW else rows_to_read(counted, in_range, BY_INNER)
    base = row_offsets(outer, within, x_outer, x_inner, VEC)
    near = _store_label_logit(
        label_logit_ptr, logits_ptr, base, label, row, counted, in_range, x_class, cap, SOFTCAP, ACC
    )
    m_group = tl.full([ROWS, COLS // GROUP], -float("inf"), ACC)
    s_group = tl.zeros([ROWS, COLS // GROUP], ACC)
    u_group, wz_group, best_group = s_group, s_group, m_group
    first_group = tl.zeros([ROWS, 1], tl.int32) + (tl.arange(0, COLS // GROUP) * GROUP)[None, :]
    rank_group, x_label, position = first_group, near, label
    if rank_ptr is not None:
        rank_group = tl.zeros([ROWS, COLS // GROUP], tl.int32)
        x_label, position = _load_label(ranked_logit_ptr, ranked_position_ptr, row, in_range, ACC)
    full = classes // COLS * COLS
    if tl.max(read.to(tl.int32), axis=0) > 0:
        for start in tl.range(0, full, COLS):
            m_group, s_group, u_group, wz_group, first_group, best_group, rank_group = _visit(
                m_group, s_group, u_group, wz_group, first_group, best_group, rank_group,
                logits_ptr, weight_ptr, base, start, classes, x_class, read, near, x_label, position, cap, False,
                entropy_ptr is not None, weighted_sum_ptr is not None, predicted_ptr is not None,
                rank_ptr is not None, HAS_WEIGHT, SOFTCAP, ACC, VEC, ROWS, COLS, GROUP,
            )  # fmt: skip
        if full < classes:
            m_group, s_group, u_group, wz_group, first_group, best_group, rank_group = _visit(
                m_group, s_group, u_group, wz_group, first_group, best_group, rank_group,
                logits_ptr, weight_ptr, base, full, classes, x_class, read, near, x_label, position, cap, True,
                entropy_ptr is not None, weighted_sum_ptr is not None, predicted_ptr is not None,
                rank_ptr is not None, HAS_WEIGHT, SOFTCAP, ACC, VEC, ROWS, COLS, GROUP,
            )  # fmt: skip

    m = tl.max(m_group, axis=1)
    m = tl.where(m == -float("inf"), 0.0, m)
    fall = tl.maximum(m_group - m[:, None], _LOG_OF_0)
    factor = tl.exp2(fall * LOG2_E)
    s = tl.sum(s_group * factor, axis=1)
    u, wz, first = s, s, row
    if entropy_ptr is not None:
        u = tl.sum((u_group + s_group * fall) * factor, axis=1)
    if weighted_sum_ptr is not None:
        wz = tl.sum(wz_group, axis=1)
    if rank_ptr is not None:
        rank = tl.sum(rank_group, axis=1)
        is_nan = read & (x_label != x_label)
        if tl.max(is_nan.to(tl.int32), axis=0) > 0:
            rank = tl.where(is_nan, nans_before(logits_ptr, base, position, is_nan, x_class, VEC, COLS), rank)
        tl.store(rank_ptr + row, rank.to(tl.int64), mask=in_range)
    if predicted_ptr is not None:
        best = tl.max(best_group, axis=1)
        first = tl.min(tl.where(best_group == best[:, None], first_group, _NO_CLASS), axis=1)
        has_nan = read & (s != s)
        if tl.max(has_nan.to(tl.int32), axis=0) > 0:  # or +inf
            nan = _first_nan(logits_ptr, base, has_nan, classes, x_class, VEC, COLS)
            first = tl.where(nan != _NO_CLASS, nan, first)
    _store_row(lse_ptr, entropy_ptr, weighted_sum_ptr, predicted_ptr, row, in_range, m, s, u, wz, first)


@triton.jit
def _upstream(upstream_ptr, row, in_range):
    return tl.load(upstream_ptr + row, mask=in_range, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _statistics_gradient(
    logits_ptr,  # (outer, classes, inner), any strides
    target_ptr,  # (rows,)
    weight_ptr,  # (classes,) or None
    gradient_ptr,  # as logits
    lse_ptr,  # (rows,)
    entropy_ptr,  # (rows,) or None
    of_lse_ptr,  # (rows,): upstream gradients; None: 0
    of_label_ptr,
    of_entropy_ptr,
    of_sum_ptr,
    rows,
    classes,
    inner,
    x_outer,  # strides of the logits
    x_class,
    x_inner,
    g_outer,  # and of the gradient
    g_class,
    g_inner,
    ignore_index,
    cap: fp64,
    HAS_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BY_INNER: tl.constexpr,
):
    """Gradient from the logits and each row's lse and entropy. Reads the logits once, writes once."""
    cap = tl.full([1], cap, ACC)
    row, in_range, outer, within = tile_rows(tl.program_id(0), rows, inner, ROWS, BY_INNER)
    label, _, _ = labels(target_ptr, row, in_range, target_ptr, classes, ignore_index, False, ACC)
    lse = tl.load(lse_ptr + row, mask=in_range, other=0.0).to(tl.float64)
    level = tl.zeros([ROWS], tl.float64)
    wanted = row < 0  # rows with a gradient: the others are not read, whatever they hold
    if of_lse_ptr is not None:
        level += _upstream(of_lse_ptr, row, in_range)
        wanted = wanted | (level != 0.0)
    if of_label_ptr is not None:
        of_label = _upstream(of_label_ptr, row, in_range)
        wanted = wanted | (of_label != 0.0)
    if of_sum_ptr is not None:
        of_sum = _upstream(of_sum_ptr, row, in_range)
        wanted = wanted | (of_sum != 0.0)
    if of_entropy_ptr is not None:
        of_entropy = _upstream(of_entropy_ptr, row, in_range)
        wanted = wanted | (of_entropy != 0.0)
        level -= of_entropy * tl.load(entropy_ptr + row, mask=in_range, other=0.0)

    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    col_mask = inside(cols, classes, VEC)
    base = row_offsets(outer, within, x_outer, x_inner, VEC)
    mask = rows_to_read(wanted & in_range, in_range, BY_INNER)[:, None] & col_mask[None, :]
    pointers = logits_ptr + base[:, None] + class_offsets(cols, x_class, VEC)[None, :]
    x = tl.load(pointers, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(ACC)
    z, dz = x, x
    if SOFTCAP:
        t, dz = tanh(x / cap[:, None], ACC)
        z = t * cap[:, None]
    # lse in two parts, since the logits are near it and what is left of them must be exact.
    high = lse.to(ACC)
    log_p = z - high[:, None]
    if ACC != tl.float64:
        log_p -= (lse - high.to(tl.float64)).to(ACC)[:, None]
    p = tl.exp2(log_p * LOG2_E)
    if of_entropy_ptr is not None:
        g = p * (level.to(ACC)[:, None] - of_entropy.to(ACC)[:, None] * tl.maximum(log_p, _LOG_OF_0))
    else:
        g = p * level.to(ACC)[:, None]
    if of_label_ptr is not None:
        g += tl.where(cols[None, :] == label[:, None], of_label.to(ACC)[:, None], 0.0)
    if of_sum_ptr is not None:
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(ACC)
            g += of_sum.to(ACC)[:, None] * w[None, :]
        else:
            g += of_sum.to(ACC)[:, None]
    if SOFTCAP:
        g *= dz
    g = tl.where(wanted[:, None], g, 0.0)
    g_base = row_offsets(outer, within, g_outer, g_inner, VEC)
    out = gradient_ptr + g_base[:, None] + class_offsets(cols, g_class, VEC)[None, :]
    tl.store(out, g, mask=in_range[:, None] & col_mask[None, :], eviction_policy="evict_first")
