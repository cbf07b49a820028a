"""The parts that several kernels share: labels, ranks, the softcap, and how counts add up.

``arguments.py`` has the names that all kernels use, and where a tile's elements lie.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Scaling, Strided, pointers

fp64 = tl.float64  # annotates scalar arguments that stay doubles; Triton makes floats of the others
LOG2_E = tl.constexpr(1.4426950408889634)
# Its exp2() is 0 even in float64, and so is its product with that 0; with −inf the product would be NaN.
LOG_OF_0 = tl.constexpr(-2e3)


@triton.jit
def rows_to_read(counted, in_range, BY_INNER: tl.constexpr):
    """Return a mask of the rows to read: ignored rows are not read, unless their neighbours share their accesses."""
    return in_range if BY_INNER else counted


@triton.jit
def labels(target_ptr, row, in_range, weight_ptr, classes, ignore_index, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr):
    """Return each row's label (0 for none), whether the row counts, and its weight.

    The weight of a row that does not count is 0; that of a label out of bounds is NaN.
    """
    target = tl.load(target_ptr + row, mask=in_range, other=0).to(tl.int64)
    counted = in_range & (target != ignore_index)
    valid = (target >= 0) & (target < classes)
    label = tl.where(counted & valid, target, 0)
    weight = tl.full(label.shape, 1.0, ACC)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + label, mask=counted & valid, other=0.0).to(ACC)
    weight = tl.where(counted, tl.where(valid, weight, float("nan")), 0.0)
    return label, counted, weight.to(ACC)


@triton.jit
def label_logit(logits_ptr, offset, counted, PAIRS: tl.constexpr, ACC: tl.constexpr):
    """Return the logit at ``offset``, 0 in a row that does not count.

    ``PAIRS``: a logit of 16 bits is loaded with its neighbour: fewer than 32 bits can't be prefetched, and each row
    would wait for a load that is not. The logits then begin at a multiple of 4 bytes.
    """
    if PAIRS and logits_ptr.dtype.element_ty.primitive_bitwidth == 16:
        pair = tl.load(logits_ptr.to(tl.pointer_type(tl.int32)) + offset // 2, mask=counted, other=0)
        half = tl.where(offset % 2 == 0, pair, pair >> 16).to(tl.int16)
        return half.to(logits_ptr.dtype.element_ty, bitcast=True).to(ACC)
    return tl.load(logits_ptr + offset, mask=counted, other=0.0).to(ACC)


@triton.jit
def tanh(u, ACC: tl.constexpr):
    """Return tanh and its derivative, without cancellation (near 0 in float32; in float64 it is negligible)."""
    e = tl.exp2(tl.abs(u) * (-2.0 * LOG2_E))
    t = (1.0 - e) / (1.0 + e)
    t = tl.where(u < 0.0, -t, t)
    if ACC == tl.float32:
        s = u * u
        series = -17.0 / 315.0 + s * (62.0 / 2835.0 + s * (-1382.0 / 155925.0 + s * (21844.0 / 6081075.0)))
        series = 1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * series))
        t = tl.where(tl.abs(u) < 0.3, u * series, t)
    return tl.where(u == u, t, u), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def finite(x):
    """Return whether x is finite. (Not by x − x = 0: where x is t·c, that is fma(t, c, −t·c), a rounding error.)"""
    return tl.abs(x) < float("inf")


@triton.jit
def next_below(x):
    """Return the greatest number below ``x``: then "≥ x" is "> next_below(x)". For −inf it is NaN: not (y ≤ NaN)."""
    x = x + 0.0  # −0 becomes +0
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        least = tl.full(bits.shape, -0x7FFFFFFFFFFFFFFF, tl.int64)
    else:
        bits = x.to(tl.int32, bitcast=True)
        least = tl.full(bits.shape, -0x7FFFFFFF, tl.int32)  # the smallest number below 0
    bits = tl.where(bits == 0, least, tl.where(bits > 0, bits - 1, bits + 1))
    return bits.to(x.dtype, bitcast=True)


@triton.jit
def rank_in_tile(x, x_label, cols, label, counted, most_k):
    """Return how many classes stand before the label: those with a greater logit, or an equal one at a lower index.

    NaN is the greatest value. The rank is exact where it is below ``most_k``. Ties are not counted if no row of the
    tile has so few greater logits.
    """
    threshold, label = x_label[:, None], label.to(tl.int32)  # as the columns are
    rank = tl.sum((~(x <= threshold)).to(tl.int32), axis=1)  # greater, or NaN
    is_nan = x_label != x_label
    open_rows = (counted & ((rank < most_k) | is_nan)).to(tl.int32)
    if tl.max(open_rows, axis=0) > 0:
        lower = cols[None, :] < label[:, None]
        rank += tl.sum(((x == threshold) & lower).to(tl.int32), axis=1)
        if tl.max((counted & is_nan).to(tl.int32), axis=0) > 0:
            nans = tl.sum(((x != x) & lower).to(tl.int32), axis=1)
            rank = tl.where(is_nan, nans, rank)
    return rank


@triton.jit
def rank_held(
    x,  # (ROWS, COLS)
    x_label,
    label,
    counted,
    most_k,
    logits: Strided,
    base,
    T: tl.constexpr,
):
    """Return what :func:`rank_in_tile` does, of logits that leave no registers for the numbers of their columns.

    A logit equal to the label's, and a label whose logit is NaN, are rare: then the classes before it are read again.
    """
    threshold = x_label[:, None]
    rank = tl.sum((~(x <= threshold)).to(tl.int32), axis=1)  # greater, or NaN
    is_nan = x_label != x_label
    open_rows = counted & ((rank < most_k) | is_nan)
    if tl.max(open_rows.to(tl.int32), axis=0) > 0:
        equal = tl.sum((x == threshold).to(tl.int32), axis=1)
        tied = open_rows & ((equal > 1) | is_nan)
        if tl.max(tied.to(tl.int32), axis=0) > 0:
            BLOCK: tl.constexpr = min(T.COLS, max(16, 1024 // T.ROWS))
            last = tl.where(tied, label, 0)
            again = tl.zeros(rank.shape, tl.int32)
            for start in tl.range(0, tl.max(last, axis=0).to(tl.int32), BLOCK):
                cols = start + tl.arange(0, BLOCK)
                places = logits.ptr + base[:, None] + cols.to(tl.int64)[None, :] * logits.stride_class
                z = tl.load(places, mask=cols[None, :] < last[:, None], other=0.0).to(x.dtype)
                before = ((z == threshold) | ((z != z) & is_nan[:, None])) & (cols[None, :] < last[:, None])
                again += tl.sum(before.to(tl.int32), axis=1)
            rank = tl.where(tied, tl.where(is_nan, again, rank + again), rank)
    return rank


@triton.jit
def before_label(x, x_label, cols, start, label, GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return how many classes of a block stand before the label, for each group of ``GROUP`` classes.

    For a label whose logit is NaN the count is wrong: :func:`nans_before` returns the right one.
    """
    SPLIT: tl.constexpr = [ROWS, COLS // GROUP, GROUP]
    label = label.to(tl.int32)  # as the columns are
    if ROWS > 1:
        threshold = x_label[:, None]
        before = ~(x <= threshold) | ((x == threshold) & (cols[None, :] < label[:, None]))
        return tl.sum(tl.reshape(before.to(tl.int32), SPLIT), axis=2)
    # One comparison a logit: "≥" in the blocks before the label's, ">" from it on. Only in the label's own block are
    # equal logits before the label counted apart.
    threshold = tl.where(start + COLS <= label, next_below(x_label), x_label)
    count = tl.sum(tl.reshape((~(x <= threshold[:, None])).to(tl.int32), SPLIT), axis=2)
    at = tl.max(label, axis=0)
    if (at >= start) & (at < start + COLS):
        # By its group and its place in it, as in `subtract_at_label`.
        place = (label - start)[:, None, None]
        group, within = tl.arange(0, COLS // GROUP)[None, :, None], tl.arange(0, GROUP)[None, None, :]
        lower = (group < place // GROUP) | ((group == place // GROUP) & (within < place % GROUP))
        tied = (tl.reshape(x, SPLIT) == x_label[:, None, None]) & lower
        count += tl.sum(tied.to(tl.int32), axis=2)
    return count


@triton.jit
def nans_before(logits: Strided, base, label, of_rows, T: tl.constexpr):
    """Return how many NaNs stand before a label whose own logit is NaN. They are rare: a pass of its own."""
    nans = tl.zeros(label.shape, tl.int32)
    for start in tl.range(0, tl.max(label, axis=0), T.COLS):
        cols = start + tl.arange(0, T.COLS)
        mask = of_rows[:, None] & (cols[None, :] < label[:, None])
        x = tl.load(pointers(logits, base, cols, T), mask=mask, other=0.0)
        x = x.to(tl.float32)  # the interpreter knows no NaN in bfloat16
        nans += tl.sum((x != x).to(tl.int32), axis=1)
    return nans


@triton.jit
def rank_with_nans(rank, x_label, label, counted, logits: Strided, base, T: tl.constexpr):
    """Return the ranks that are the sums of :func:`before_label`, right for labels whose logits are NaN too."""
    is_nan = counted & (x_label != x_label)
    if tl.max(is_nan.to(tl.int32), axis=0) > 0:
        nans = nans_before(logits, base, label, is_nan, T)
        rank = tl.where(is_nan, nans, rank)
    return rank


class Scales(NamedTuple):
    """The numbers that make logits of inputs, (1,) each, as in ``fastloss.backends.contract.Factors``.

    Without a softcap no logit is multiplied: exponents and the numbers of rows are. A product taken from another
    would be one fused multiply-add, whose error is that of the product: too much where logits are -1e30.
    """

    divisor: Any  # in the dtype of the arithmetic, as the next two
    outer: Any
    unit: Any  # outer · log2(e)
    wide: Any  # outer, float64
    slope: Any  # ∂z/∂x without the softcap's part, float64


@triton.jit
def scales_of(cap, factor, scaling: Scaling, T: tl.constexpr, F: tl.constexpr):
    """Return the numbers of a launch; those that are not used cost nothing."""
    divisor = tl.full([1], cap, T.ACC)
    scales = Scales(divisor, divisor, divisor, divisor, divisor)
    if F.SCALED:
        under, over = tl.full([1], cap, tl.float64), tl.full([1], factor, tl.float64)
        if scaling.logit_scale is not None:
            scale = tl.load(scaling.logit_scale).to(tl.float64)
            if F.SOFTCAP:
                under = under / scale
            else:
                over = over * scale
        if scaling.temperature is not None:
            over = over / tl.load(scaling.temperature).to(tl.float64)
        slope = over / under if F.SOFTCAP else over
        scales = Scales(under.to(T.ACC), over.to(T.ACC), (over * LOG2_E).to(T.ACC), over, slope)
    return scales


@triton.jit
def exponential(d, scales: Scales, F: tl.constexpr):
    """Return exp of differences d of logits, (ROWS, …), that are in the units of :func:`softcapped`."""
    if F.SCALED and not F.SOFTCAP:
        e = tl.exp2(d * scales.unit[:, None])
    else:
        e = tl.exp2(d * LOG2_E)
    return e


@triton.jit
def of_logits(d, scales: Scales, F: tl.constexpr):
    """Return differences d, (ROWS, …), that are in the units of :func:`softcapped`, in those of the logits."""
    if F.SCALED and not F.SOFTCAP:
        d = d * scales.outer[:, None]
    return d


@triton.jit
def in_units(x, scales: Scales, F: tl.constexpr):
    """Return numbers of rows, (ROWS,), that are in the units of :func:`softcapped`, in those of the logits."""
    if F.SCALED and not F.SOFTCAP:
        x = x.to(tl.float64) * scales.wide
    return x


@triton.jit
def softcapped(x, mask, scales: Scales, MASKED: tl.constexpr, T: tl.constexpr, F: tl.constexpr):
    """Return z and its slope for a block x of inputs; z is −inf, as x is, where a ``MASKED`` block has no class.

    Without a softcap z is in units of ``scales.outer``. The slope lacks ``scales.slope``.
    """
    z, dz = x, x
    if F.SOFTCAP:
        t, dz = tanh(x / scales.divisor[:, None], T.ACC)
        z = t * scales.outer[:, None]
        if MASKED:
            z = tl.where(mask, z, -float("inf"))
    return z, dz


@triton.jit
def softcapped_rows(x, scales: Scales, T: tl.constexpr, F: tl.constexpr):
    """Return z of one input x a row, as :func:`softcapped` does."""
    if F.SOFTCAP:
        t, _ = tanh(x / scales.divisor, T.ACC)
        x = t * scales.outer
    return x


@triton.jit
def log_softmax(z, lse, scales: Scales, T: tl.constexpr, F: tl.constexpr):
    """Return log p = z − lse. The float64 lse is taken in two parts: z is near it, and their difference is exact."""
    if F.SCALED and not F.SOFTCAP:
        lse = lse / scales.wide
    high = lse.to(T.ACC)
    log_p = z - high[:, None]
    if T.ACC != tl.float64:
        log_p -= (lse - high.to(tl.float64)).to(T.ACC)[:, None]
    return of_logits(log_p, scales, F)


@triton.jit
def finite_maximum(m):
    """Return a maximum to take logits relative to: 0 where none is above −∞."""
    return tl.where(m == -float("inf"), 0.0, m)


class OnlineStep(NamedTuple):
    """An online softmax of each group of classes, with one more block, z, of a looped row."""

    m: Any  # (ROWS, groups): the running maximum
    s: Any  # (ROWS, groups): Σ exp(z − m)
    u: Any  # (ROWS, groups): Σ exp(z − m) (z − m), if ENTROPY
    below: Any  # (ROWS, groups, GROUP): z − m


@triton.jit
def online_step(m, s, u, z, scales: Scales, ENTROPY: tl.constexpr, T: tl.constexpr, F: tl.constexpr):
    """Return the sums with one more block of logits.

    Where the maximum rises by r, Σ e (z − m) becomes (Σ e (z − m) − r Σ e) exp(−r). The maximum is in the units of
    z, and so is ``below`` without ``ENTROPY``; with it the differences are those of logits.
    """
    UNIT: tl.constexpr = F.SCALED and not F.SOFTCAP
    z = tl.reshape(z, [T.ROWS, T.COLS // T.GROUP, T.GROUP])
    m_new = tl.maximum(m, tl.max(z, axis=2))
    base = finite_maximum(m_new)
    fall = m - base
    if ENTROPY:
        if UNIT:
            fall = fall * scales.outer[:, None]
        fall = tl.maximum(fall, LOG_OF_0)
    factor = tl.exp2(fall * (scales.unit[:, None] if UNIT and not ENTROPY else LOG2_E))
    below = z - base[:, :, None]
    if UNIT and ENTROPY:
        below = below * scales.outer[:, None, None]
    e = tl.exp2(below * (scales.unit[:, None, None] if UNIT and not ENTROPY else LOG2_E))
    if ENTROPY:
        u = (u + s * fall) * factor + tl.sum(e * tl.maximum(below, LOG_OF_0), axis=2)
    return OnlineStep(m_new, s * factor + tl.sum(e, axis=2), u, below)


@triton.jit
def weighted_sums(z, near, weight_ptr, cols, classes, mask, MASKED: tl.constexpr, T: tl.constexpr, F: tl.constexpr):
    """Return Σ_c w_c (z_c − near) over each group of a block's classes."""
    weighted = z - near[:, None]
    if F.HAS_WEIGHT:
        weighted *= tl.load(weight_ptr + cols, mask=cols < classes, other=0.0).to(T.ACC)[None, :]
    if MASKED:
        weighted = tl.where(mask, weighted, 0.0)
    return tl.sum(tl.reshape(weighted, [T.ROWS, T.COLS // T.GROUP, T.GROUP]), axis=2)


@triton.jit
def ks_of(ks, K: tl.constexpr, K_PAD: tl.constexpr):
    """Return the ks as a vector, padded with 0 (at which no row is right), and the greatest of them."""
    index = tl.arange(0, K_PAD)
    vector = tl.zeros([K_PAD], tl.int32)
    for j in tl.static_range(K):
        vector = tl.where(index == j, ks[j], vector)
    return vector, tl.max(vector, axis=0)


@triton.jit
def last_to_end(counter_ptr):
    """Return whether this is the last of the grid's programs to arrive: all that the others stored is visible to it.

    On AMD the barrier orders only the stores of the first wave: sums must be stored as scalars, or in vectors of at
    most 64 elements (32 on RDNA).
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    return arrived == tl.num_programs(0) - 1


@triton.jit
def add_up_counts(
    counts_ptr, right_ptr, K: tl.constexpr, K_PAD: tl.constexpr, G_PAD: tl.constexpr, MEAN: tl.constexpr
):
    """Store the accuracies from the programs' counts ``(programs, 1 + K_PAD)``: counted rows, and right ones by k."""
    counted = tl.zeros([G_PAD], tl.int64)
    for start in tl.range(0, tl.num_programs(0), G_PAD):
        program = start + tl.arange(0, G_PAD)
        there = program < tl.num_programs(0)
        counted += tl.load(counts_ptr + program * (1 + K_PAD), mask=there, other=0, cache_modifier=".cg")
    total = tl.sum(counted, axis=0)
    for j in tl.static_range(K):
        right, least = tl.zeros([G_PAD], tl.int64), tl.zeros([G_PAD], tl.int32)
        for start in tl.range(0, tl.num_programs(0), G_PAD):
            program = start + tl.arange(0, G_PAD)
            there = program < tl.num_programs(0)
            count = tl.load(counts_ptr + program * (1 + K_PAD) + 1 + j, mask=there, other=0, cache_modifier=".cg")
            right += count
            least = tl.minimum(least, count)
        value = tl.sum(right, axis=0).to(tl.float64)
        # A label out of bounds makes its program's count of right rows negative: NaN.
        value = tl.where(tl.min(least, axis=0) < 0, float("nan"), value)
        if MEAN:
            value = value / total.to(tl.float64)
        tl.store(right_ptr + j, value.to(tl.float32))


@triton.jit
def store_ranks(right_ptr, rank, row, rows, in_range, counted, valid, ks, K: tl.constexpr):
    """Store 1 or 0 for each row and k, ``(k, rows)``; NaN for a label out of bounds."""
    offset = row.to(tl.int64)
    for j in tl.static_range(K):
        value = tl.where(counted & (rank < ks[j]), 1.0, 0.0)
        value = tl.where(counted & ~valid, float("nan"), value)
        tl.store(right_ptr + offset, value, mask=in_range)
        offset += rows
