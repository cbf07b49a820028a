"""What the forms of the cross-entropy kernel say of a row: its loss, its gradient, and how a launch's rows add up.

The formula and its names are in ``fastloss/backends/eager/cross_entropy.py``; what a row is, in ``rows.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_helpers import add_up_counts, labels, last_to_end


@triton.jit
def weigh_rows(
    target_ptr,
    weight_ptr,
    first,
    end,
    classes,
    ignore_index,
    HAS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(first, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        _, _, weight = labels(target_ptr, row, row < end, weight_ptr, classes, ignore_index, HAS_WEIGHT, ACC)
        total += weight.to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def scale_of_mean(
    target_ptr,
    weight_ptr,
    weighed_ptr,
    rows,
    classes,
    ignore_index,
    N_WEIGHED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 / Σ w_y, from the parts of ``_weigh_kernel`` or, for few rows, from the labels themselves."""
    if N_WEIGHED > 0:
        part = tl.arange(0, N_WEIGHED)
        total = tl.sum(tl.load(weighed_ptr + part).to(tl.float64), axis=0)
    else:
        total = weigh_rows(target_ptr, weight_ptr, 0, rows, classes, ignore_index, HAS_WEIGHT, ACC, BLOCK)
    return 1.0 / total


@triton.jit
def slope(
    p,  # (ROWS, COLS): softmax
    cols,
    level,  # A, times the scale
    spread,  # ε/C, times the scale
    weight_ptr,
    col_mask,
    HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    """∂L/∂z = p A − ε/C w_c, of all classes but the label."""
    g = p * level[:, None]
    if SMOOTHING:
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(p.dtype)
            g -= spread[:, None] * w[None, :]
        else:
            g -= spread[:, None]
    return g


@triton.jit
def subtract_at_label(g, label, hit, start, ROWS: tl.constexpr, COLS: tl.constexpr):
    """g − [c = y] hit, of columns that begin with class ``start``.

    Columns are told apart by their group of 8 and by their place in it: each thread has registers for the numbers of
    its groups, but not for those of all its columns, which the compiler would make once for all rows.
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
    SMOOTHING: tl.constexpr,
):
    """Each row's loss, and A, w_y (1−ε) and ε/C before any scale. In float64: rows are few beside logits.

    lse − z_y and lse − r are small where m, z_y and r are large alike: they are taken from differences.
    """
    log_s, m, r, z_label = tl.log(s).to(tl.float64), m.to(tl.float64), r.to(tl.float64), z_label.to(tl.float64)
    weight, wz, w_total = weight.to(tl.float64), wz.to(tl.float64), w_total.to(tl.float64)
    lse = log_s + m
    # 1 − ε and 2 λ would be kept in registers from row to row: ε and λ are not.
    hit = weight - weight * eps if SMOOTHING else weight
    tail = weight * z_scale * lse
    loss = hit * (log_s + (m - z_label)) + tail * lse
    level = hit + 2.0 * tail
    spread = eps / classes + weight * 0.0
    if SMOOTHING:
        loss += spread * (w_total * (log_s + (m - r)) - wz)
        level += spread * w_total
    return tl.where(counted, loss, 0.0), level, hit, spread


@triton.jit
def end_launch(
    loss_ptr,
    right_ptr,
    scale_ptr,
    sums_ptr,
    counts_ptr,
    counter_ptr,
    loss_sum,
    weight_sum,
    counted_sum,
    right_sum,  # (K_PAD,)
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    MEAN: tl.constexpr,
    ACC: tl.constexpr,
):
    """Store what this program's rows add up to; the last program adds up the programs, in their order."""
    program = tl.program_id(0)
    tl.store(sums_ptr + program * 2, loss_sum)
    tl.store(sums_ptr + program * 2 + 1, weight_sum)
    if K > 0:
        tl.store(counts_ptr + program * (1 + K_PAD), counted_sum)
        tl.store(counts_ptr + program * (1 + K_PAD) + 1 + tl.arange(0, K_PAD), right_sum)
    if last_to_end(counter_ptr):
        tl.store(counter_ptr, 0)
        losses, weights = tl.zeros([G_PAD], tl.float64), tl.zeros([G_PAD], tl.float64)
        for start in tl.range(0, tl.num_programs(0), G_PAD):
            index = start + tl.arange(0, G_PAD)
            there = index < tl.num_programs(0)
            losses += tl.load(sums_ptr + index * 2, mask=there, other=0.0, cache_modifier=".cg")
            if MEAN:
                weights += tl.load(sums_ptr + index * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        loss = tl.sum(losses, axis=0)
        if MEAN:
            total = tl.sum(weights, axis=0)
            loss = tl.where(total == 0.0, float("nan"), loss / total)
            tl.store(scale_ptr, 1.0 / total)
        tl.store(loss_ptr, loss.to(ACC))
        if K > 0:
            add_up_counts(counts_ptr, right_ptr, K, K_PAD, G_PAD, MEAN)


@triton.jit
def sum_of_weights(weight_ptr, classes, ACC: tl.constexpr, COLS: tl.constexpr):
    """W, the sum of the class weights."""
    total = tl.zeros([COLS], ACC)
    for start in tl.range(0, classes, COLS):
        cols = start + tl.arange(0, COLS)
        total += tl.load(weight_ptr + cols, mask=cols < classes, other=0.0).to(ACC)
    return tl.sum(total, axis=0)
