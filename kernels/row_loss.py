"""The parts of the cross-entropy kernels: a row's loss, its gradient, and how the rows of a launch add up.

The formula and its names are in ``fastloss/backends/eager/cross_entropy.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Strided
from .tile_helpers import Scales, add_up_counts, in_units, labels, last_to_end

WEIGH_BLOCK = tl.constexpr(2048)


class Results(NamedTuple):
    """The pointers that a forward pass writes to."""

    loss: Any  # () or, for "none", (rows,)
    right: Any  # (K,) or (K, rows): accuracies
    scale: Any  # (): 1 / Σ w_y, for "mean" and a backward pass; or None
    row_max: Any  # (rows,): m, kept for a backward pass; or None
    row_sum: Any  # (rows,): Σ exp(z − m), likewise
    nll: Any  # (rows,): −log p_y, kept for derivatives of the gradient; or None


class Partial(NamedTuple):
    """The pointers to what each program leaves to the last one; all None where nothing is added up."""

    sums: Any  # (programs, 2): loss and weight of each program's rows
    counts: Any  # (programs, 1 + K_PAD): counted and right rows
    counter: Any  # (): programs that have ended


class Rows(NamedTuple):
    """The numbers that the gradient of some rows depends on beside their logits: (ROWS,) each."""

    in_range: Any  # the row exists
    read: Any  # its logits are read
    counted: Any
    label: Any
    m: Any
    level: Any  # A, over the sum of exponentials
    hit: Any  # w_y (1−ε)
    spread: Any  # ε/C


@triton.jit
def weigh_rows(
    target_ptr, weight_ptr, first, end, classes, ignore_index, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr
):
    """Return Σ w_y over the counted rows from ``first`` to ``end``."""
    total = tl.zeros([WEIGH_BLOCK], tl.float64)
    for start in tl.range(first, end, WEIGH_BLOCK):
        row = start + tl.arange(0, WEIGH_BLOCK)
        _, _, weight = labels(target_ptr, row, row < end, weight_ptr, classes, ignore_index, HAS_WEIGHT, ACC)
        total += weight.to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def gradient_scale(
    gradient: Strided,
    target_ptr,
    weight_ptr,
    weighed_ptr,  # parts of the divisor: of Σ w_y for "mean"
    rows,
    classes,
    ignore_index,
    N_WEIGHED: tl.constexpr,  # how many parts there are
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Return the factor of the gradient, (1,): 1 over the divisor.

    The divisor is the sum of its parts or, for the mean of few rows, is added up from the labels.
    """
    scale = tl.full([1], 1.0, tl.float64)
    if gradient.ptr is not None and (F.REDUCTION == "mean" or N_WEIGHED > 0):
        if N_WEIGHED > 0:
            part = tl.arange(0, N_WEIGHED)
            total = tl.sum(tl.load(weighed_ptr + part).to(tl.float64), axis=0)
        else:
            total = weigh_rows(target_ptr, weight_ptr, 0, rows, classes, ignore_index, F.HAS_WEIGHT, T.ACC)
        scale *= 1.0 / total
    return scale


@triton.jit
def slope(
    p,  # (ROWS, COLS): softmax
    cols,
    level,  # A, times the scale
    spread,  # ε/C, times the scale
    weight_ptr,
    col_mask,
    F: tl.constexpr,
):
    """Return ∂L/∂z = p A − ε/C w_c, of all classes but the label."""
    g = p * level[:, None]
    if F.SMOOTHING:
        if F.HAS_WEIGHT:
            w = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(p.dtype)
            g -= spread[:, None] * w[None, :]
        else:
            g -= spread[:, None]
    return g


@triton.jit
def subtract_at_label(g, label, hit, start, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return g − [c = y] hit, of columns that begin with class ``start``.

    A column is identified by its group of 8 and its place in the group: a thread has registers for the numbers of its
    groups, but not for those of all its columns, which the compiler would compute once for all rows.
    """
    SPLIT: tl.constexpr = [ROWS, COLS // 8, 8]
    place = label.to(tl.int32) - start
    group = tl.arange(0, COLS // 8)[None, :, None] == (place >> 3)[:, None, None]
    here = group & (tl.arange(0, 8)[None, None, :] == (place & 7)[:, None, None])
    g = tl.reshape(g, SPLIT)
    g = tl.where(here, g - hit[:, None, None], g)
    return tl.reshape(g, [ROWS, COLS])


@triton.jit
def row_results(
    s,  # Σ exp(z − m)
    m,  # the row's maximum
    z_label,
    wz,  # Σ_c w_c (z_c − r), if SMOOTHING
    r,  # a number near the row's logits
    w_total,  # W
    weight,  # w_y
    counted,
    eps,
    z_scale,
    classes,
    scales: Scales,
    F: tl.constexpr,
):
    """Return each row's loss, and A, w_y (1−ε) and ε/C before any scale. In float64: rows are few beside logits.

    lse − z_y and lse − r are small where m, z_y and r are all large: they are computed from differences. These four
    numbers come in the units of the visit.
    """
    m, z_label, wz, r = (
        in_units(m, scales, F),
        in_units(z_label, scales, F),
        in_units(wz, scales, F),
        in_units(r, scales, F),
    )
    log_s, m, r, z_label = tl.log(s).to(tl.float64), m.to(tl.float64), r.to(tl.float64), z_label.to(tl.float64)
    weight, wz, w_total = weight.to(tl.float64), wz.to(tl.float64), w_total.to(tl.float64)
    lse = log_s + m
    # 1 − ε and 2 λ would be kept in registers from row to row: ε and λ are not.
    hit = weight - weight * eps if F.SMOOTHING else weight
    tail = weight * z_scale * lse
    loss = hit * (log_s + (m - z_label)) + tail * lse
    level = hit + 2.0 * tail
    spread = eps / classes + weight * 0.0
    if F.SMOOTHING:
        loss += spread * (w_total * (log_s + (m - r)) - wz)
        level += spread * w_total
    return tl.where(counted, loss, 0.0), level, hit, spread


@triton.jit
def end_launch(
    out: Results,
    partial: Partial,
    loss_sum,  # (ROWS,), as the next two: what the rows of this program add up to
    weight_sum,
    counted_sum,
    right_sum,  # (ROWS, K_PAD)
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Store this program's sums; the last program adds up those of all programs, in their order."""
    weights = tl.sum(weight_sum, axis=0)  # NaN where a label is out of bounds
    loss, counted = tl.sum(loss_sum, axis=0), tl.sum(counted_sum, axis=0)
    right = tl.where(weights == weights, tl.sum(right_sum, axis=0), -1)
    MEAN: tl.constexpr = F.REDUCTION == "mean"
    program = tl.program_id(0)
    tl.store(partial.sums + program * 2, loss)
    tl.store(partial.sums + program * 2 + 1, weights)
    if F.K > 0:
        tl.store(partial.counts + program * (1 + F.K_PAD), counted)
        tl.store(partial.counts + program * (1 + F.K_PAD) + 1 + tl.arange(0, F.K_PAD), right)
    if last_to_end(partial.counter):
        tl.store(partial.counter, 0)
        losses, totals = tl.zeros([T.G_PAD], tl.float64), tl.zeros([T.G_PAD], tl.float64)
        for start in tl.range(0, tl.num_programs(0), T.G_PAD):
            index = start + tl.arange(0, T.G_PAD)
            there = index < tl.num_programs(0)
            losses += tl.load(partial.sums + index * 2, mask=there, other=0.0, cache_modifier=".cg")
            if MEAN:
                totals += tl.load(partial.sums + index * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        loss = tl.sum(losses, axis=0)
        if MEAN:
            total = tl.sum(totals, axis=0)
            loss = tl.where(total == 0.0, float("nan"), loss / total)
            if out.scale is not None:
                tl.store(out.scale, 1.0 / total)
        tl.store(out.loss, loss.to(T.ACC))
        if F.K > 0:
            add_up_counts(partial.counts, out.right, F.K, F.K_PAD, T.G_PAD, MEAN)


@triton.jit
def sum_of_weights(weight_ptr, classes, ACC: tl.constexpr, COLS: tl.constexpr):
    """Return W, the sum of the class weights."""
    total = tl.zeros([COLS], ACC)
    for start in tl.range(0, classes, COLS):
        cols = start + tl.arange(0, COLS)
        total += tl.load(weight_ptr + cols, mask=cols < classes, other=0.0).to(ACC)
    return tl.sum(total, axis=0)
