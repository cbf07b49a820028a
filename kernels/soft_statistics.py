r"""What logits and soft targets say of each row, and the gradients of both tensors from it.

With z the logits (after the softcap), m their greatest, t the targets and w the class weights:

    lse = m + log Σ_c exp(z_c − m),   mass = Σ_c w_c t_c,   nll = mass (lse − m) + Σ_c w_c t_c (m − z_c)

No term of nll is below 0 for probabilities, so nothing cancels. With N rows, V classes, b bytes a logit and b' a
target, device memory moves (what is given a row left out):

=========  ================  =====================================================
forward    N·V·(b + b')      each element read once, in one launch
backward   2·N·V·(b + b')    read once, both gradients written once, in one launch
=========  ================  =====================================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.backends.contract import ExternalLabel, LossOptions, SoftRowStatistics

from .launch import launch, on_device
from .tile_helpers import (
    LOG2_E,
    before_label,
    class_offsets,
    finite,
    fp64,
    inside,
    nans_before,
    row_offsets,
    tanh,
    tile_rows,
)
from .tiles import ALL_REGISTERS, Tiles, arithmetic, in_blocks, plan, vector_width

__all__ = ["soft_statistics_backward", "soft_statistics_forward"]

# exp2() of it is 0 even in float64; so is its product with that 0, as −inf's is not.
_LOG_OF_0 = tl.constexpr(-2e3)


def soft_statistics_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    *,
    ranked: ExternalLabel | None = None,
) -> SoftRowStatistics:
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    outer, classes, inner = logits.shape
    rows, smoothing = outer * inner, options.label_smoothing != 0
    tiles = _plan(logits, target)

    def rowwise(dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(rows, dtype=dtype, device=logits.device)

    lse, nll, mass = rowwise(), rowwise(), rowwise()
    weighted_sum, near = (rowwise(), rowwise()) if smoothing else (None, None)
    rank = None if ranked is None else rowwise(torch.int64)
    with on_device(logits):
        launch(
            _soft_statistics,
            (tiles.number,),
            (
                *(logits, target, weight, lse, nll, mass, weighted_sum, near, rank),
                *((None, None) if ranked is None else ranked[:2]),
                *(rows, classes, inner, *logits.stride(), *target.stride(), options.softcap or 1.0),
            ),
            {"GROUP": tiles.group, **_constants(logits, target, weight, options), **tiles.constants()},
        )
    if weighted_sum is not None and near is not None:
        weighted_sum += (classes if weight is None else weight.sum(dtype=torch.float64)) * near
    return SoftRowStatistics(lse, nll, mass, weighted_sum, rank)


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
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    outer, classes, inner = logits.shape
    of_logits = (logits if inplace else torch.empty_like(logits)) if gradient else None
    of_target = torch.empty_like(target) if target_gradient else None
    of_lse, of_nll, of_mass, of_sum = (None if u is None else u.contiguous() for u in upstreams)
    level = torch.zeros_like(lse) if of_lse is None else of_lse
    if of_nll is not None:
        level = level + of_nll * mass
    results = (logits if of_logits is None else of_logits, target if of_target is None else of_target)
    tiles = _plan(logits, target, *results)
    tiles, blocks = in_blocks(tiles._replace(cols=max(16, min(tiles.cols, 2048 // tiles.rows)), warps=4), classes)
    with on_device(logits):
        launch(
            _soft_statistics_gradient,
            (tiles.number, blocks),
            (
                *(logits, target, weight, of_logits, of_target, lse, level.contiguous(), of_nll, of_mass, of_sum),
                *(outer * inner, classes, inner),
                *(stride for tensor in (logits, target, *results) for stride in tensor.stride()),
                options.softcap or 1.0,
            ),
            {**_constants(logits, target, weight, options), **tiles.constants()},
        )
    return of_logits, of_target


def _plan(logits: Tensor, target: Tensor, *results: Tensor) -> Tiles:
    """The logits' tiles, for programs that read the target beside them."""
    tiles = plan(logits)
    vec = vector_width(logits, target, *results, classes=logits.shape[1])
    tiles = tiles._replace(vec=vec, registers=ALL_REGISTERS)
    if tiles.looped and not tiles.by_inner:
        # Two tensors' blocks, and five numbers of each group, are to fit in the registers.
        tiles = tiles._replace(cols=min(tiles.cols, 4096 if tiles.vec > 1 else 2048))
    return tiles


def _constants(logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> dict[str, object]:
    wide = torch.float64 in (logits.dtype, target.dtype)
    return {
        "HAS_WEIGHT": weight is not None,
        "SOFTCAP": options.softcap is not None,
        "ACC": arithmetic(torch.float64 if wide else torch.float32),
    }


@triton.jit
def _visit(
    m_group,  # (ROWS, groups): the running maximum of each group of classes
    s_group,  # (ROWS, groups): Σ exp(z − m)
    mass_group,  # (ROWS, groups): Σ w t
    below_group,  # (ROWS, groups): Σ w t (m − z)
    wz_group,  # (ROWS, groups): Σ w (z − near)
    rank_group,  # (ROWS, groups): how many classes stand before the label that is ranked
    logits_ptr,
    target_ptr,
    weight_ptr,
    base,
    t_base,
    start,
    classes,
    x_class,
    t_class,
    read,
    near,
    x_label,
    position,
    cap,
    WEIGHTED_SUM: tl.constexpr,
    RANKED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block of classes, joined to what the blocks before it gave."""
    SPLIT: tl.constexpr = [ROWS, COLS // GROUP, GROUP]
    cols = start + tl.arange(0, COLS)
    mask = read[:, None] & inside(cols, classes, VEC)[None, :]
    pointers = logits_ptr + base[:, None] + class_offsets(cols, x_class, VEC)[None, :]
    x = tl.load(pointers, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(ACC)
    pointers = target_ptr + t_base[:, None] + class_offsets(cols, t_class, VEC)[None, :]
    wt = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    if RANKED:
        rank_group += before_label(x, x_label, cols, start, position, GROUP, ROWS, COLS)
    z = x
    if SOFTCAP:
        t, _ = tanh(x / cap[:, None], ACC)
        z = tl.where(mask, t * cap[:, None], -float("inf"))
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + cols, mask=cols < classes, other=0.0).to(ACC)[None, :]
        wt *= w
    if WEIGHTED_SUM:
        wz = z - near[:, None]
        if HAS_WEIGHT:
            wz *= w
        wz_group += tl.sum(tl.reshape(tl.where(mask, wz, 0.0), SPLIT), axis=2)
    m_new = tl.maximum(m_group, tl.max(tl.reshape(z, SPLIT), axis=2))
    m = tl.where(m_new == -float("inf"), 0.0, m_new)
    m_from = tl.where(m_group == -float("inf"), 0.0, m_group)
    factor = tl.exp2(tl.maximum(m_group - m, _LOG_OF_0) * LOG2_E)
    below = tl.reshape(z, SPLIT) - m[:, :, None]
    s_group = s_group * factor + tl.sum(tl.exp2(below * LOG2_E), axis=2)
    # What is no class has wt = 0 beside z = −inf.
    part = tl.where(tl.reshape(mask, SPLIT), tl.reshape(wt, SPLIT) * below, 0.0)
    below_group += mass_group * (m - m_from) - tl.sum(part, axis=2)
    mass_group += tl.sum(tl.reshape(wt, SPLIT), axis=2)
    return m_new, s_group, mass_group, below_group, wz_group, rank_group


@triton.jit(do_not_specialize=["rows"])
def _soft_statistics(
    logits_ptr,  # (outer, classes, inner), any strides
    target_ptr,  # of that shape, with any other strides
    weight_ptr,  # (classes,) or None
    lse_ptr,  # (rows,), float64, as the next four
    nll_ptr,
    mass_ptr,
    weighted_sum_ptr,  # or None
    near_ptr,  # what weighted_sum_ptr's logits are relative to
    rank_ptr,  # (rows,), int64; or None
    ranked_logit_ptr,  # (rows,), float64; or None: the label whose rank is wanted
    ranked_position_ptr,  # (rows,), int64; or None
    rows,
    classes,
    inner,
    x_outer,
    x_class,
    x_inner,
    t_outer,
    t_class,
    t_inner,
    cap: fp64,
    HAS_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BY_INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Forward: an online softmax over blocks of classes, of which a short row has one. Reads each element once."""
    cap = tl.full([1], cap, ACC)
    row, in_range, outer, within = tile_rows(tl.program_id(0), rows, inner, ROWS, BY_INNER)
    base = row_offsets(outer, within, x_outer, x_inner, VEC)
    t_base = row_offsets(outer, within, t_outer, t_inner, VEC)
    m_group = tl.full([ROWS, COLS // GROUP], -float("inf"), ACC)
    s_group = tl.zeros([ROWS, COLS // GROUP], ACC)
    mass_group, below_group, wz_group, rank_group = s_group, s_group, s_group, s_group
    near, x_label, position = tl.zeros([ROWS], ACC), tl.zeros([ROWS], ACC), row
    if weighted_sum_ptr is not None:
        near = tl.load(logits_ptr + base, mask=in_range, other=0.0).to(ACC)
        if SOFTCAP:
            t, _ = tanh(near / cap, ACC)
            near = t * cap
        near = tl.where(finite(near), near, 0.0)
        tl.store(near_ptr + row, near.to(tl.float64), mask=in_range)
    if rank_ptr is not None:
        rank_group = tl.zeros([ROWS, COLS // GROUP], tl.int32)
        x_label = tl.load(ranked_logit_ptr + row, mask=in_range, other=0.0).to(ACC)
        position = tl.load(ranked_position_ptr + row, mask=in_range, other=0)
    for start in tl.range(0, classes, COLS):
        m_group, s_group, mass_group, below_group, wz_group, rank_group = _visit(
            m_group, s_group, mass_group, below_group, wz_group, rank_group,
            logits_ptr, target_ptr, weight_ptr, base, t_base, start, classes, x_class, t_class, in_range,
            near, x_label, position, cap,
            weighted_sum_ptr is not None, rank_ptr is not None,
            HAS_WEIGHT, SOFTCAP, ACC, VEC, ROWS, COLS, GROUP,
        )  # fmt: skip

    m = tl.max(m_group, axis=1)
    m = tl.where(m == -float("inf"), 0.0, m)
    m_from = tl.where(m_group == -float("inf"), m[:, None], m_group)
    s = tl.sum(s_group * tl.exp2(tl.maximum(m_group - m[:, None], _LOG_OF_0) * LOG2_E), axis=1)
    mass = tl.sum(mass_group, axis=1).to(tl.float64)
    below = tl.sum(below_group + mass_group * (m[:, None] - m_from), axis=1).to(tl.float64)
    log_s = tl.log(s).to(tl.float64)
    tl.store(lse_ptr + row, log_s + m.to(tl.float64), mask=in_range)
    tl.store(nll_ptr + row, mass * log_s + below, mask=in_range)
    tl.store(mass_ptr + row, mass, mask=in_range)
    if weighted_sum_ptr is not None:
        tl.store(weighted_sum_ptr + row, tl.sum(wz_group, axis=1).to(tl.float64), mask=in_range)
    if rank_ptr is not None:
        rank = tl.sum(rank_group, axis=1)
        is_nan = in_range & (x_label != x_label)
        if tl.max(is_nan.to(tl.int32), axis=0) > 0:
            rank = tl.where(is_nan, nans_before(logits_ptr, base, position, is_nan, x_class, VEC, COLS), rank)
        tl.store(rank_ptr + row, rank.to(tl.int64), mask=in_range)


@triton.jit
def _of_row(pointer, row, in_range, ACC: tl.constexpr):
    """A number of each row, as ``(ROWS, 1)``."""
    return tl.load(pointer + row, mask=in_range, other=0.0).to(ACC)[:, None]


@triton.jit(do_not_specialize=["rows"])
def _soft_statistics_gradient(
    logits_ptr,  # (outer, classes, inner), any strides
    target_ptr,  # of that shape, with any other strides
    weight_ptr,  # (classes,) or None
    gradient_ptr,  # as the logits; or None
    target_gradient_ptr,  # as the target; or None
    lse_ptr,  # (rows,), float64, as all that follow
    level_ptr,  # g_lse + g_nll mass
    of_nll_ptr,  # upstream gradients; None: 0
    of_mass_ptr,
    of_sum_ptr,
    rows,
    classes,
    inner,
    x_outer,
    x_class,
    x_inner,
    t_outer,
    t_class,
    t_inner,
    g_outer,
    g_class,
    g_inner,
    h_outer,
    h_class,
    h_inner,
    cap: fp64,
    HAS_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BY_INNER: tl.constexpr,
):
    """Both gradients from both tensors and each row's lse. Reads each element once, writes once."""
    cap = tl.full([1], cap, ACC)
    row, in_range, outer, within = tile_rows(tl.program_id(0), rows, inner, ROWS, BY_INNER)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = in_range[:, None] & inside(cols, classes, VEC)[None, :]
    base = row_offsets(outer, within, x_outer, x_inner, VEC)
    pointers = logits_ptr + base[:, None] + class_offsets(cols, x_class, VEC)[None, :]
    x = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    z, dz = x, x
    if SOFTCAP:
        t, dz = tanh(x / cap[:, None], ACC)
        z = t * cap[:, None]
    # lse in two parts, since the logits are near it and what is left of them must be exact.
    lse = tl.load(lse_ptr + row, mask=in_range, other=0.0)
    high = lse.to(ACC)
    log_p = z - high[:, None]
    if ACC != tl.float64:
        log_p -= (lse - high.to(tl.float64)).to(ACC)[:, None]
    w = tl.full([1, COLS], 1.0, ACC)
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + cols, mask=cols < classes, other=0.0).to(ACC)[None, :]
    if target_gradient_ptr is not None:
        d = tl.zeros([ROWS, COLS], ACC)
        if of_nll_ptr is not None:
            d -= _of_row(of_nll_ptr, row, in_range, ACC) * log_p
        if of_mass_ptr is not None:
            d += _of_row(of_mass_ptr, row, in_range, ACC)
        h_base = row_offsets(outer, within, h_outer, h_inner, VEC)
        out = target_gradient_ptr + h_base[:, None] + class_offsets(cols, h_class, VEC)[None, :]
        tl.store(out, _narrowed(d * w, target_gradient_ptr), mask=mask, eviction_policy="evict_first")
    if gradient_ptr is not None:
        g = tl.exp2(log_p * LOG2_E) * _of_row(level_ptr, row, in_range, ACC)
        if of_nll_ptr is not None:
            t_base = row_offsets(outer, within, t_outer, t_inner, VEC)
            pointers = target_ptr + t_base[:, None] + class_offsets(cols, t_class, VEC)[None, :]
            t = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
            g -= _of_row(of_nll_ptr, row, in_range, ACC) * t * w
        if of_sum_ptr is not None:
            g += _of_row(of_sum_ptr, row, in_range, ACC) * w
        if SOFTCAP:
            g *= dz
        g_base = row_offsets(outer, within, g_outer, g_inner, VEC)
        out = gradient_ptr + g_base[:, None] + class_offsets(cols, g_class, VEC)[None, :]
        tl.store(out, _narrowed(g, gradient_ptr), mask=mask, eviction_policy="evict_first")


@triton.jit
def _narrowed(value, pointer):
    """A value to store: what is computed in float64 is rounded to float32 on its way to anything shorter."""
    if value.dtype == tl.float64 and pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    return value
