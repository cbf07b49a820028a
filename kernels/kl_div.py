r"""Divergences of two softmaxes, a student's s and a teacher's t, and their gradient over the student's logits.

The formulas are in ``backends/eager/kl_div.py``. A program visits its rows two or three times: for the log-sum-exp of
both, for the row's sums, and for the gradient; KL(t ‖ s), whose gradient needs no sum, has the last two in one. With
N rows, C classes, and b and b' bytes a logit, device memory moves these bytes, the numbers of each row left out:

=====================  =================  ==========================================================================
without a gradient     N·C·(b + b')       each logit read once, and again from a cache
with it                N·C·(2 b + b')     the gradient is written once, over the student's logits
=====================  =================  ==========================================================================
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.backends.contract import DivergenceInputs, DivergenceOptions, DivergenceRows

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
    tile_count,
    tile_rows,
)
from .launch import launch, on_device
from .soft_cross_entropy import narrowed
from .tile_helpers import (
    LOG2_E,
    LOG_OF_0,
    Scales,
    finite_maximum,
    fp64,
    in_units,
    log_softmax,
    of_logits,
    online_step,
    scales_of,
    softcapped,
)
from .tiles import ALL_REGISTERS, Tiles, in_cache, plan, vector_width

__all__ = ["kl_div"]

# Logits of either side that a program has at once: 16 a thread.
_TILE = 2048


class Numbers(NamedTuple):
    """The pointers to the numbers of each row, float64, ``(rows,)`` each; None: neither read nor written."""

    lse: Any
    teacher_lse: Any
    loss: Any
    level: Any


def kl_div(
    inputs: DivergenceInputs, known: DivergenceRows | None = None, *, lse_only: bool = False
) -> DivergenceRows:
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    student, teacher, upstream, options = inputs
    outer, classes, inner = student.shape
    rows, beta = outer * inner, options.beta
    known = DivergenceRows() if known is None else known
    kind = "forward" if beta == 0 else "reverse" if beta == 1 else "mixed"
    sides = options.student, options.teacher
    forms = [form_of(None, side) for side in sides]
    tiles = _plan(student, teacher, options)

    def rowwise(number: Tensor | None, wanted: bool) -> Tensor | None:
        if number is not None or not wanted:
            return None
        return torch.empty(rows, dtype=torch.float64, device=student.device)

    sums = not lse_only and (known.level is None or known.loss is None)
    found = DivergenceRows(
        rowwise(known.lse, True),
        rowwise(known.teacher_lse, True),
        rowwise(known.loss, sums),
        rowwise(known.level, sums),
    )
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    with on_device(student):
        launch(
            _kl_div,
            (tiles.grid,),
            (
                *(rows, classes, inner, strided(student), strided(teacher), upstream),
                *(Numbers(*known), Numbers(*found)),
                *(*map(scaling, sides), beta, *cap_and_factor(sides[0]), *cap_and_factor(sides[1])),
            ),
            {"KIND": kind, "F": forms[0], "G": forms[1], "T": tiles.tile(dtype), **tiles.options()},
        )
    return DivergenceRows(*(k if f is None else f for k, f in zip(known, found, strict=True)))


def _plan(student: Tensor, teacher: Tensor, options: DivergenceOptions) -> Tiles:
    """Return the tiles of a kernel that visits both sides' rows block by block."""
    tiles = plan(student, student)
    vec = vector_width(student, teacher, classes=student.shape[1])
    cols = min(tiles.cols, max(16, _TILE // tiles.rows))
    group = cols if tiles.by_inner else min(16 // student.element_size(), cols)
    tiles = tiles._replace(
        cols=cols, warps=4, looped=True, group=group, vec=vec, registers=ALL_REGISTERS, stages=1, ends=False
    )
    row_bytes = student.shape[1] * (student.element_size() + teacher.element_size())
    return in_cache(tiles, student.device, row_bytes)


class Block(NamedTuple):
    """A block of both sides: (ROWS, COLS) each. A class that does not exist has probability 0 on either."""

    s: Any
    t: Any
    d: Any  # log t − log s
    dz: Any  # ∂z/∂x of the student, if it has a softcap
    mask: Any


@triton.jit
def _logits(x: Strided, base, start, classes, in_range, scales: Scales, T: tl.constexpr, F: tl.constexpr):
    """Return z of one block and its slope as :func:`softcapped` does, −inf where there is no class."""
    cols, mask = block(start, classes, in_range, True, T)
    z = tl.load(pointers(x, base, cols, T), mask=mask, other=-float("inf")).to(T.ACC)
    z, dz = softcapped(z, mask, scales, True, T, F)
    return z, dz, mask


@triton.jit
def _lse(x: Strided, base, classes, in_range, scales: Scales, T: tl.constexpr, F: tl.constexpr):
    """Return log Σ_c exp(z_c) of some rows, in float64."""
    m = tl.full([T.ROWS, T.COLS // T.GROUP], -float("inf"), T.ACC)
    s = tl.zeros([T.ROWS, T.COLS // T.GROUP], T.ACC)
    for start in tl.range(0, classes, T.COLS):
        z, _, _ = _logits(x, base, start, classes, in_range, scales, T, F)
        step = online_step(m, s, s, z, scales, False, T, F)
        m, s = step.m, step.s
    m_row = finite_maximum(tl.max(m, axis=1))
    fall = tl.maximum(of_logits(m - m_row[:, None], scales, F), LOG_OF_0)
    total = tl.sum(s * tl.exp2(fall * LOG2_E), axis=1)
    return tl.log(total).to(tl.float64) + in_units(m_row, scales, F).to(tl.float64)


@triton.jit
def _block(
    x: Strided,
    y: Strided,
    base,
    y_base,
    start,
    classes,
    in_range,
    lse,
    y_lse,
    scales: Scales,
    y_scales: Scales,
    T: tl.constexpr,
    F: tl.constexpr,
    G: tl.constexpr,
):
    z, dz, mask = _logits(x, base, start, classes, in_range, scales, T, F)
    log_s = log_softmax(z, lse, scales, T, F)
    z, _, _ = _logits(y, y_base, start, classes, in_range, y_scales, T, G)
    log_t = log_softmax(z, y_lse, y_scales, T, G)
    return Block(tl.exp2(log_s * LOG2_E), tl.exp2(log_t * LOG2_E), log_t - log_s, dz, mask)


@triton.jit
def _times(p, number):
    """Return p · number, which is 0 where p is."""
    return tl.where(p == 0.0, 0.0, p * number)


@triton.jit
def _log1p(x, T: tl.constexpr):
    """Return log(1 + x) for x from −1/2 to 1. Near 1 the hardware's logarithm has no digit of a small x."""
    if T.ACC == tl.float64:
        y = 1.0 + x
        result = tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))
    else:  # 2 artanh(x / (2 + x)), whose argument is at most 1/3
        a = x / (2.0 + x)
        b = a * a
        series = 1.0 / 7.0 + b * (1.0 / 9.0 + b * (1.0 / 11.0 + b * (1.0 / 13.0)))
        result = 2.0 * a * (1.0 + b * (1.0 / 3.0 + b * (1.0 / 5.0 + b * series)))
    return result


@triton.jit
def _mixture(d, beta, T: tl.constexpr):
    """Return u = log t − log m and r = log s − log m, with d = log t − log s; see ``backends/eager/kl_div.py``."""
    MOST: tl.constexpr = 700.0 if T.ACC == tl.float64 else 88.0
    is_low = beta <= 0.5
    low = tl.minimum(beta, 1.0 - beta).to(T.ACC)[:, None]
    e = tl.where(is_low[:, None], d, -d)
    excess = low * (tl.exp2(tl.where(e > MOST, MOST, e) * LOG2_E) - 1.0)
    far = excess >= 1.0
    of_far = -tl.log(low + (1.0 - low) * tl.exp2(-tl.where(far, e, 0.0) * LOG2_E))
    of_most = tl.where(far, of_far - e, -_log1p(tl.where(far, 0.0, excess), T))
    of_other = tl.where(far, of_far, of_most + e)
    return tl.where(is_low[:, None], of_other, of_most), tl.where(is_low[:, None], of_most, of_other)


@triton.jit
def _summed(terms, T: tl.constexpr):
    """Return the sums over each group of classes."""
    return tl.sum(tl.reshape(terms, [T.ROWS, T.COLS // T.GROUP, T.GROUP]), axis=2)


@triton.jit(do_not_specialize=["rows"])
def _kl_div(
    rows,
    classes,
    inner,
    x: Strided,  # the student's logits, over which the gradient is written
    y: Strided,  # the teacher's
    upstream_ptr,  # (rows,), float64: of each row's loss; None: no gradient
    known: Numbers,  # the numbers of more classes than these
    found: Numbers,  # the numbers to store
    scaling: Scaling,
    y_scaling: Scaling,
    beta: fp64,
    cap: fp64,
    factor: fp64,
    y_cap: fp64,
    y_factor: fp64,
    KIND: tl.constexpr,  # "forward": KL(t ‖ s); "reverse": KL(s ‖ t); "mixed": the divergence from m
    T: tl.constexpr,
    F: tl.constexpr,  # of the student
    G: tl.constexpr,  # of the teacher
):
    """Compute each row's log-sum-exps, divergence and gradient: those that are wanted and not known."""
    wide_beta = tl.full([1], beta, tl.float64)
    beta, rest = wide_beta.to(T.ACC), (1.0 - wide_beta).to(T.ACC)
    scales, y_scales = scales_of(cap, factor, scaling, T, F), scales_of(y_cap, y_factor, y_scaling, T, G)
    WRITTEN: tl.constexpr = upstream_ptr is not None
    # KL(t ‖ s) has a gradient that needs no sum: its loss comes from the same visit.
    AT_ONCE: tl.constexpr = WRITTEN and KIND == "forward" and found.loss is not None
    SUMS: tl.constexpr = found.loss is not None and not AT_ONCE
    for tile in tl.range(tl.program_id(0), tile_count(rows, inner, T), tl.num_programs(0)):
        row, in_range, outer, within = tile_rows(tile, rows, inner, T)
        base, y_base = row_offsets(x, outer, within, T), row_offsets(y, outer, within, T)
        if known.lse is None:
            lse = _lse(x, base, classes, in_range, scales, T, F)
            tl.store(found.lse + row, lse, mask=in_range)
        else:
            lse = tl.load(known.lse + row, mask=in_range, other=0.0)
        if known.teacher_lse is None:
            y_lse = _lse(y, y_base, classes, in_range, y_scales, T, G)
            tl.store(found.teacher_lse + row, y_lse, mask=in_range)
        else:
            y_lse = tl.load(known.teacher_lse + row, mask=in_range, other=0.0)

        of_row = tl.zeros([T.ROWS], T.ACC)
        if WRITTEN:
            upstream = tl.load(upstream_ptr + row, mask=in_range, other=0.0)
            of_row = upstream.to(T.ACC)
        level = of_row
        loss_group = tl.zeros([T.ROWS, T.COLS // T.GROUP], T.ACC)
        if SUMS:
            level_group = loss_group
            for done in tl.range(0, classes, T.COLS):  # from the end: the cache holds what was read last
                start = (classes - 1) // T.COLS * T.COLS - done
                b = _block(
                    x, y, base, y_base, start, classes, in_range, lse, y_lse, scales, y_scales, T, F, G
                )  # fmt: skip
                if KIND == "forward":
                    loss_group += _summed(_times(b.t, b.d), T)
                elif KIND == "reverse":
                    loss_group -= _summed(_times(b.s, b.d), T)
                else:
                    of_t, of_s = _mixture(b.d, wide_beta, T)
                    of_s = _times(b.s, of_s)
                    level_group += _summed(of_s, T)
                    loss_group += _summed(beta[:, None] * _times(b.t, of_t) + rest[:, None] * of_s, T)
            loss = tl.sum(loss_group, axis=1)
            level = loss
            if KIND == "mixed":
                level = tl.sum(level_group, axis=1)
            tl.store(found.loss + row, loss.to(tl.float64), mask=in_range)
            tl.store(found.level + row, level.to(tl.float64), mask=in_range)
        elif known.level is not None:
            level = tl.load(known.level + row, mask=in_range, other=0.0).to(T.ACC)

        if WRITTEN:
            for start in tl.range(0, classes, T.COLS):
                b = _block(
                    x, y, base, y_base, start, classes, in_range, lse, y_lse, scales, y_scales, T, F, G
                )  # fmt: skip
                if KIND == "forward":
                    if AT_ONCE:
                        loss_group += _summed(_times(b.t, b.d), T)
                    g = b.s - b.t
                elif KIND == "reverse":
                    g = -_times(b.s, b.d) - b.s * level[:, None]
                else:
                    _, of_s = _mixture(b.d, wide_beta, T)
                    g = rest[:, None] * (_times(b.s, of_s) - b.s * level[:, None])
                g *= of_row[:, None]
                if F.SCALED:
                    g *= scales.slope.to(T.ACC)[:, None]
                if F.SOFTCAP:
                    g *= b.dz
                # A row without an upstream gradient may hold NaN.
                g = tl.where(of_row[:, None] == 0.0, 0.0, g)
                cols = start + tl.arange(0, T.COLS)
                tl.store(pointers(x, base, cols, T), narrowed(g, x.ptr), mask=b.mask)
            if AT_ONCE:
                loss = tl.sum(loss_group, axis=1).to(tl.float64)
                tl.store(found.loss + row, loss, mask=in_range)
                tl.store(found.level + row, loss, mask=in_range)
