r"""Statistics of logits and soft targets per row, and the gradients of both tensors from those of the statistics.

With z the logits (after the softcap), m the greatest of a row, t the targets and w the class weights:

    lse = m + log Σ_c exp(z_c − m),   mass = Σ_c w_c t_c,   nll = mass (lse − m) + Σ_c w_c t_c (m − z_c)

No term of nll is below 0 for probabilities, so nothing cancels. With N rows, V classes, b bytes per logit and b' per
target, the kernels move these bytes, beside the numbers per row:

=========  ================  =====================================================
forward    N·V·(b + b')      each element read once, in one launch
backward   2·N·V·(b + b')    read once, both gradients written once, in one launch
=========  ================  =====================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.backends.contract import ExternalLabel, LossInputs, SoftRowStatistics, WantedGradients

from .arguments import (
    Scaling,
    Strided,
    block,
    cap_and_factor,
    form_of,
    pointers,
    row_offsets,
    scaling,
    strided,
    tile_rows,
)
from .launch import launch, on_device
from .soft_cross_entropy import narrowed
from .statistics import Ranked, load_label
from .tile_helpers import (
    LOG2_E,
    LOG_OF_0,
    Scales,
    before_label,
    finite,
    finite_maximum,
    fp64,
    in_units,
    log_softmax,
    of_logits,
    online_step,
    rank_with_nans,
    scales_of,
    softcapped,
    softcapped_rows,
)
from .tiles import ALL_REGISTERS, Tiles, in_blocks, plan, vector_width

__all__ = ["soft_statistics_backward", "soft_statistics_forward"]


class _Statistics(NamedTuple):
    """The results of a forward pass: (rows,) each."""

    lse: Any  # float64, as the next four
    nll: Any
    mass: Any
    weighted_sum: Any  # Σ_c w_c (z_c − near); or None
    near: Any  # a finite number near the row's logits; or None
    rank: Any  # int64; or None


class _Upstreams(NamedTuple):
    """Gradients per row that the kernel reads: (rows,), float64."""

    level: Any  # g_lse + g_nll mass
    nll: Any  # as the next two, None: 0
    mass: Any
    weighted_sum: Any


class _GroupSums(NamedTuple):
    """The sums over each group of classes so far: (ROWS, groups)."""

    m: Any  # the group's maximum
    s: Any  # Σ exp(z − m)
    mass: Any  # Σ w t
    below: Any  # Σ w t (m − z)
    wz: Any  # Σ w (z − near)
    rank: Any  # the number of classes before the label that is ranked


def soft_statistics_forward(inputs: LossInputs, *, ranked: ExternalLabel | None = None) -> SoftRowStatistics:
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    logits, target, weight, options = inputs
    outer, classes, inner = logits.shape
    rows, smoothing = outer * inner, options.label_smoothing != 0
    tiles = _plan(logits, target)

    def rowwise(dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(rows, dtype=dtype, device=logits.device)

    lse, nll, mass = rowwise(), rowwise(), rowwise()
    weighted_sum, near = (rowwise(), rowwise()) if smoothing else (None, None)
    rank = None if ranked is None else rowwise(torch.int64)
    out = _Statistics(lse, nll, mass, weighted_sum, near, rank)
    label = Ranked(None, None) if ranked is None else Ranked(*ranked[:2])
    with on_device(logits):
        launch(
            _soft_statistics,
            (tiles.number,),
            (
                *(rows, classes, inner, strided(logits), strided(target), weight, out, label),
                *(scaling(options), *cap_and_factor(options)),
            ),
            _constants(inputs, tiles._replace(looped=True)),
        )
    if weighted_sum is not None and near is not None:
        weighted_sum += (classes if weight is None else weight.sum(dtype=torch.float64)) * near
    return SoftRowStatistics(lse, nll, mass, weighted_sum, rank)


def soft_statistics_backward(
    upstreams: Sequence[Tensor | None], inputs: LossInputs, lse: Tensor, mass: Tensor, wanted: WantedGradients
) -> tuple[Tensor | None, Tensor | None]:
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    logits, target, weight, options = inputs
    outer, classes, inner = logits.shape
    of_logits, of_target = wanted.tensors(inputs)
    of_lse, of_nll, of_mass, of_sum = (None if u is None else u.contiguous() for u in upstreams)
    level = torch.zeros_like(lse) if of_lse is None else of_lse
    if of_nll is not None:
        level = level + of_nll * mass
    results = (logits if of_logits is None else of_logits, target if of_target is None else of_target)
    tiles = _plan(logits, target, *results)
    cols = max(16, min(tiles.cols, 2048 // tiles.rows))
    tiles, blocks = in_blocks(tiles._replace(cols=cols, warps=4), classes)
    tensors = strided(logits), strided(target), strided(of_logits, logits), strided(of_target, target), weight
    of_row = _Upstreams(level.contiguous(), of_nll, of_mass, of_sum)
    with on_device(logits):
        launch(
            _soft_statistics_gradient,
            (tiles.number, blocks),
            (outer * inner, classes, inner, *tensors, lse, of_row, scaling(options), *cap_and_factor(options)),
            _constants(inputs, tiles),
        )
    return of_logits, of_target


def _plan(logits: Tensor, target: Tensor, *results: Tensor) -> Tiles:
    """Return the logits' tiles for programs that read the target too."""
    tiles = plan(logits)
    vec = vector_width(logits, target, *results, classes=logits.shape[1])
    tiles = tiles._replace(vec=vec, registers=ALL_REGISTERS)
    if tiles.looped and not tiles.by_inner:
        # Blocks of two tensors, and five numbers per group, must fit in the registers.
        tiles = tiles._replace(cols=min(tiles.cols, 4096 if tiles.vec > 1 else 2048))
    return tiles


def _constants(inputs: LossInputs, tiles: Tiles) -> dict[str, object]:
    logits, target, weight, options = inputs
    wide = torch.float64 in (logits.dtype, target.dtype)
    tile = tiles.tile(torch.float64 if wide else torch.float32)
    return {"T": tile, "F": form_of(weight, options, SMOOTHING=False), **tiles.options()}


@triton.jit
def _visit(
    sums: _GroupSums,
    logits: Strided,
    target: Strided,
    weight_ptr,
    out: _Statistics,  # the parts that are wanted
    base,
    t_base,
    start,
    classes,
    read,
    near,
    x_label,
    position,
    scales: Scales,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Return the sums with one more block of classes."""
    SPLIT: tl.constexpr = [T.ROWS, T.COLS // T.GROUP, T.GROUP]
    wz_group, rank_group = sums.wz, sums.rank
    cols, mask = block(start, classes, read, True, T)
    places = pointers(logits, base, cols, T)
    z = tl.load(places, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(T.ACC)
    places = pointers(target, t_base, cols, T)
    wt = tl.load(places, mask=mask, other=0.0, eviction_policy="evict_first").to(T.ACC)
    if out.rank is not None:
        rank_group += before_label(z, x_label, cols, start, position, T.GROUP, T.ROWS, T.COLS)
    z, _ = softcapped(z, mask, scales, True, T, F)
    if F.HAS_WEIGHT:
        w = tl.load(weight_ptr + cols, mask=cols < classes, other=0.0).to(T.ACC)[None, :]
        wt *= w
    if out.weighted_sum is not None:
        wz = z - near[:, None]
        if F.HAS_WEIGHT:
            wz *= w
        wz_group += tl.sum(tl.reshape(tl.where(mask, wz, 0.0), SPLIT), axis=2)
    step = online_step(sums.m, sums.s, sums.s, z, scales, False, T, F)
    # A column that is no class has wt = 0 beside z = −inf.
    part = tl.where(tl.reshape(mask, SPLIT), tl.reshape(wt, SPLIT) * step.below, 0.0)
    rise = finite_maximum(step.m) - finite_maximum(sums.m)
    below_group = sums.below + (sums.mass * rise - tl.sum(part, axis=2))
    mass = sums.mass + tl.sum(tl.reshape(wt, SPLIT), axis=2)
    return _GroupSums(step.m, step.s, mass, below_group, wz_group, rank_group)


@triton.jit(do_not_specialize=["rows"])
def _soft_statistics(
    rows,
    classes,
    inner,
    logits: Strided,
    target: Strided,
    weight_ptr,  # (classes,) or None
    out: _Statistics,
    ranked: Ranked,
    scaling: Scaling,
    cap: fp64,
    factor: fp64,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Forward: an online softmax over blocks of classes; a short row has one block. Reads each element once."""
    scales = scales_of(cap, factor, scaling, T, F)
    row, in_range, outer, within = tile_rows(tl.program_id(0), rows, inner, T)
    base = row_offsets(logits, outer, within, T)
    t_base = row_offsets(target, outer, within, T)
    m_group = tl.full([T.ROWS, T.COLS // T.GROUP], -float("inf"), T.ACC)
    zeros = tl.zeros([T.ROWS, T.COLS // T.GROUP], T.ACC)
    rank_group = zeros
    near, x_label, position = tl.zeros([T.ROWS], T.ACC), tl.zeros([T.ROWS], T.ACC), row
    if out.weighted_sum is not None:
        near = tl.load(logits.ptr + base, mask=in_range, other=0.0).to(T.ACC)
        near = softcapped_rows(near, scales, T, F)
        near = tl.where(finite(near), near, 0.0)
        tl.store(out.near + row, in_units(near, scales, F).to(tl.float64), mask=in_range)
    if out.rank is not None:
        rank_group = tl.zeros([T.ROWS, T.COLS // T.GROUP], tl.int32)
        x_label, position = load_label(ranked, row, in_range, T)
    sums = _GroupSums(m_group, zeros, zeros, zeros, zeros, rank_group)
    for start in tl.range(0, classes, T.COLS):
        sums = _visit(
            sums, logits, target, weight_ptr, out, base, t_base, start, classes, in_range, near, x_label, position,
            scales, T, F,
        )  # fmt: skip

    m = finite_maximum(tl.max(sums.m, axis=1))
    m_from = tl.where(sums.m == -float("inf"), m[:, None], sums.m)
    fall = tl.maximum(of_logits(sums.m - m[:, None], scales, F), LOG_OF_0)
    s = tl.sum(sums.s * tl.exp2(fall * LOG2_E), axis=1)
    mass = tl.sum(sums.mass, axis=1).to(tl.float64)
    below = tl.sum(sums.below + sums.mass * (m[:, None] - m_from), axis=1)
    below = in_units(below, scales, F).to(tl.float64)
    log_s = tl.log(s).to(tl.float64)
    tl.store(out.lse + row, log_s + in_units(m, scales, F).to(tl.float64), mask=in_range)
    tl.store(out.nll + row, mass * log_s + below, mask=in_range)
    tl.store(out.mass + row, mass, mask=in_range)
    if out.weighted_sum is not None:
        wz = in_units(tl.sum(sums.wz, axis=1), scales, F)
        tl.store(out.weighted_sum + row, wz.to(tl.float64), mask=in_range)
    if out.rank is not None:
        rank = rank_with_nans(tl.sum(sums.rank, axis=1), x_label, position, in_range, logits, base, T)
        tl.store(out.rank + row, rank.to(tl.int64), mask=in_range)


@triton.jit
def _column(pointer, row, in_range, T: tl.constexpr):
    """Return one number per row, as ``(ROWS, 1)``."""
    return tl.load(pointer + row, mask=in_range, other=0.0).to(T.ACC)[:, None]


@triton.jit(do_not_specialize=["rows"])
def _soft_statistics_gradient(
    rows,
    classes,
    inner,
    logits: Strided,
    target: Strided,
    of_logits: Strided,  # the logits' gradient
    of_target: Strided,
    weight_ptr,  # (classes,) or None
    lse_ptr,  # (rows,), float64
    upstream: _Upstreams,
    scaling: Scaling,
    cap: fp64,
    factor: fp64,
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Compute both gradients from both tensors and lse. Reads each element once, writes once."""
    scales = scales_of(cap, factor, scaling, T, F)
    row, in_range, outer, within = tile_rows(tl.program_id(0), rows, inner, T)
    cols, mask = block(tl.program_id(1) * T.COLS, classes, in_range, True, T)
    places = pointers(logits, row_offsets(logits, outer, within, T), cols, T)
    x = tl.load(places, mask=mask, other=0.0, eviction_policy="evict_first").to(T.ACC)
    z, dz = softcapped(x, mask, scales, False, T, F)
    log_p = log_softmax(z, tl.load(lse_ptr + row, mask=in_range, other=0.0), scales, T, F)
    w = tl.full([1, T.COLS], 1.0, T.ACC)
    if F.HAS_WEIGHT:
        w = tl.load(weight_ptr + cols, mask=cols < classes, other=0.0).to(T.ACC)[None, :]
    if of_target.ptr is not None:
        d = tl.zeros([T.ROWS, T.COLS], T.ACC)
        if upstream.nll is not None:
            d -= _column(upstream.nll, row, in_range, T) * log_p
        if upstream.mass is not None:
            d += _column(upstream.mass, row, in_range, T)
        places = pointers(of_target, row_offsets(of_target, outer, within, T), cols, T)
        tl.store(places, narrowed(d * w, of_target.ptr), mask=mask, eviction_policy="evict_first")
    if of_logits.ptr is not None:
        g = tl.exp2(log_p * LOG2_E) * _column(upstream.level, row, in_range, T)
        if upstream.nll is not None:
            places = pointers(target, row_offsets(target, outer, within, T), cols, T)
            t = tl.load(places, mask=mask, other=0.0, eviction_policy="evict_first").to(T.ACC)
            g -= _column(upstream.nll, row, in_range, T) * t * w
        if upstream.weighted_sum is not None:
            g += _column(upstream.weighted_sum, row, in_range, T) * w
        if F.SOFTCAP:
            g *= dz
        if F.SCALED:
            g *= scales.slope.to(T.ACC)[:, None]
        places = pointers(of_logits, row_offsets(of_logits, outer, within, T), cols, T)
        tl.store(places, narrowed(g, of_logits.ptr), mask=mask, eviction_policy="evict_first")
