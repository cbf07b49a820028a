r"""Cross-entropy of long rows that begin where no wide access may, as those of an odd number of classes do.

Whole aligned groups of logits are read and written; what such a group holds of a neighbouring row is dropped, and the
ends of a row are written one by one (``_write_ends``). That takes registers: several programs share a row, and nobody
waits for anybody.

Each program has a part of the classes, the same in all of its rows. Of its part of row i it computes the maximum m,
the sum of exponentials s and, if asked for, the rank of the label, and publishes them. Then it does not wait for what
its partners say of row i: it goes on with its part of row i + 1, and finishes row i after that, when their numbers
have long been there. So few rows are in flight that it finds its part of row i in the L2 cache.

Bytes of device memory for N rows, V classes, b bytes a logit: 2·N·V·b with a gradient (read once, written once, and
read a second time from the cache), N·V·b without.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_loss import end_launch, row_results, scale_of_mean, slope, subtract_at_label
from .rows import LOG2_E, finite, fp64, ks_of, label_logit, labels, rank_held, row_offsets, store_ranks

__all__ = ["WORDS", "forward_parts"]

# What is published of a part: words of 64 bits, so that none can be seen half. (m, s), (rank, z_y), and with label
# smoothing (Σ_c (z_c − r), 0) and one that fills them up to a power of 2. All ones: not there yet. A sum never has
# the bits of that NaN, nor is a rank negative.
WORDS = {False: 2, True: 4}  # with label smoothing?


@triton.jit
def _word(high, low):
    high, low = high.to(tl.int32, bitcast=True).to(tl.int64), low.to(tl.int32, bitcast=True).to(tl.int64)
    return (high << 32) | (low & 0xFFFFFFFF)


@triton.jit
def _high(word):
    return (word >> 32).to(tl.int32)


@triton.jit
def _low(word):
    return word.to(tl.int32)


@triton.jit
def _part(
    logits_ptr,
    base,  # (1,): of the aligned group in which the row begins
    start,  # (1,): of the row
    lanes,  # (COLS,): of this part, counted from there
    end,  # of them
    counted,
    classes,
    VEC: tl.constexpr,
):
    """This part of a row ``(1, COLS)``, −inf where it is not; where its lanes' classes begin; and the row's shift."""
    pointers = logits_ptr + base[:, None] + lanes.to(tl.int64)[None, :]
    # One bound for what is read, other in each row: masks that are the same for all rows would be kept in registers.
    end = tl.max(tl.where(counted, end, 0), axis=0)
    shift = tl.max(start - base, axis=0).to(tl.int32)
    mask = (lanes // VEC < tl.minimum(tl.cdiv(shift + classes, VEC), end // VEC))[None, :]
    x = tl.load(pointers, mask=mask, other=-float("inf")).to(tl.float32)
    # Neither the row before nor the one behind: below 0 unsigned numbers are great.
    within = (lanes - shift).to(tl.uint32, bitcast=True) < tl.minimum(end - shift, classes).to(tl.uint32)
    x = tl.where(within[None, :], x, -float("inf"))
    return x, shift


@triton.jit
def _write_ends(
    logits_ptr,
    gradient_ptr,
    base,  # (1,): of the group in which the row begins
    g_base,
    shift,  # where it begins there
    classes,
    there,
    counted,
    label,
    m,
    level,  # over the sum of exponentials
    hit,
    spread,
    SMOOTHING: tl.constexpr,
    VEC: tl.constexpr,
):
    """The gradient of a row's ends, in groups of ``VEC`` that it shares with its neighbours."""
    after = (shift + classes) // VEC  # the group in which the row ends
    lane = tl.arange(0, 2 * VEC)
    lane = tl.where(lane < VEC, lane, tl.maximum(after, 1) * VEC + lane - VEC)
    cols = lane - shift
    partial = (lane // VEC < tl.cdiv(shift, VEC)) | (lane // VEC >= after)
    mask = there[:, None] & (partial & (cols >= 0) & (cols < classes))[None, :]
    pointers = logits_ptr + base[:, None] + lane[None, :]
    x = tl.load(pointers, mask=mask & counted[:, None], other=-float("inf")).to(tl.float32)
    g = tl.exp2((x - m[:, None]) * LOG2_E) * level[:, None]
    g -= tl.where(cols[None, :] == label[:, None], hit[:, None], 0.0)
    if SMOOTHING:
        g -= spread[:, None]
    g = tl.where(counted[:, None], g, 0.0)
    tl.store(gradient_ptr + g_base[:, None] + lane[None, :], g, mask=mask)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def forward_parts(
    logits_ptr,  # (outer, classes, inner), classes are neighbours
    target_ptr,  # (rows,)
    gradient_ptr,  # as logits, with rows that begin alike in a group of VEC; may be the logits; None: not written
    loss_ptr,  # () or, for "none", (rows,)
    right_ptr,  # (K,) or (K, rows): accuracies
    scale_ptr,  # (): 1 / Σ w_y, for "mean"
    row_max_ptr,  # (rows,): m, kept for a backward pass; or None
    row_sum_ptr,  # (rows,): Σ exp(z − m), likewise
    sums_ptr,  # (programs, 2): loss and weight of each program's rows
    counts_ptr,  # (programs, 1 + K_PAD): counted and right rows
    weighed_ptr,  # parts of what a gradient is divided by: of Σ w_y for "mean"; or None
    counter_ptr,  # (): programs that have ended
    words_ptr,  # (rows, SPLIT, WORDS), all bits 1
    rows,
    classes,
    inner,
    x_outer,  # strides of the logits
    x_inner,
    g_outer,  # and of the gradient
    g_inner,
    ignore_index,
    eps: fp64,
    z_scale: fp64,
    ks,  # K ints
    N_WEIGHED: tl.constexpr,
    REDUCTION: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    WEIGH_BLOCK: tl.constexpr,
    SMOOTHING: tl.constexpr,
    VEC: tl.constexpr,
    COLS: tl.constexpr,
    SPLIT: tl.constexpr,  # programs that share a row, neighbours in the grid; a power of 2
    WORDS: tl.constexpr,
    THREADS: tl.constexpr,  # of a program
    STAGES: tl.constexpr,
    STEP: tl.constexpr,
):
    """Forward of rows that programs share.

    A program that comes to finish a row before its partners have published theirs waits for them. They will: programs
    start in their order, so that all parts of the first unfinished row are running or next to run, whatever else the
    GPU does. ``STEP``: where programs run one after the other (the interpreter), and on AMD, two launches do the
    work, "publish" and "finish", so that nobody waits.
    """
    part, team, teams = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT, tl.num_programs(0) // SPLIT
    # All parts begin where a 128-bit access may.
    share = tl.cdiv(tl.cdiv(classes + VEC - 1, SPLIT), 8) * 8
    first = part * share
    end = first + share
    lanes = first + tl.arange(0, COLS)
    place = tl.arange(0, THREADS) % (SPLIT * WORDS)
    kind = place % WORDS
    TIMES: tl.constexpr = THREADS // (SPLIT * WORDS)  # how often a word is looked at
    eps, z_scale = tl.full([1], eps, tl.float64), tl.full([1], z_scale, tl.float64)
    scale = tl.full([1], 1.0, tl.float64)
    if gradient_ptr is not None and (REDUCTION == "mean" or N_WEIGHED > 0):
        scale *= scale_of_mean(
            target_ptr, None, weighed_ptr, rows, classes, ignore_index, N_WEIGHED, False, tl.float32, WEIGH_BLOCK
        )
    loss_sum, weight_sum = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
    counted_sum, right_sum = tl.zeros([1], tl.int32), tl.zeros([1, K_PAD], tl.int32)
    invalid_sum = tl.zeros([1], tl.int32)
    once = tl.zeros([1], tl.int32) + part == 0  # what is said of a row as a whole, the first part's program says
    k_vector, most_k = ks_of(ks, K, K_PAD)

    for new in tl.range(team, rows + teams, teams, num_stages=STAGES):
        if STEP != "finish":
            row = new + tl.arange(0, 1)
            label, counted, _ = labels(target_ptr, row, row < rows, None, classes, ignore_index, False, tl.float32)
            start = row_offsets(row // inner, row % inner, x_outer, x_inner, 1)
            base = row_offsets(row // inner, row % inner, x_outer, x_inner, VEC)
            x, shift = _part(logits_ptr, base, start, lanes, end, counted, classes, VEC)
            z_label = label_logit(logits_ptr, start + label, counted, True, tl.float32)
            rank = tl.zeros([1], tl.int32)
            if K > 0:
                begin, stop = tl.maximum(first - shift, 0), tl.minimum(end - shift, classes)
                own = (label >= begin) & (label < stop)
                rank = rank_held(x, z_label, label, counted, most_k, own, logits_ptr, start, begin, stop, 1, 1, COLS)
            m = tl.max(x, axis=1)
            m = tl.where(m == -float("inf"), 0.0, m)
            s = tl.sum(tl.exp2((x - m[:, None]) * LOG2_E), axis=1)
            own = words_ptr + (row.to(tl.int64) * SPLIT + part) * WORDS
            if SMOOTHING:
                r = tl.where(finite(z_label), z_label, 0.0)
                cols = lanes - shift
                of_part = (cols >= 0) & (cols < tl.minimum(end - shift, classes))
                wz = tl.sum(tl.where(of_part[None, :], x - r[:, None], 0.0), axis=1)
                tl.store(own + 2, _word(wz, tl.zeros([1], tl.float32)), mask=row < rows)
                tl.store(own + 3, tl.zeros([1], tl.int64), mask=row < rows)
            tl.store(own + 1, _word(rank, z_label), mask=row < rows)
            tl.store(own, _word(m, s), mask=row < rows)

        if STEP != "publish" and new >= teams:
            row = new - teams + tl.arange(0, 1)
            there = row < rows
            label, counted, weight = labels(target_ptr, row, there, None, classes, ignore_index, False, tl.float32)
            # Every thread looks at one word, so that all of them learn the same and leave together.
            all_own = words_ptr + (new - teams).to(tl.int64) * (SPLIT * WORDS) + place
            words = tl.load(all_own, volatile=True)
            if STEP == "both":
                missing = tl.max((words == -1).to(tl.int32), axis=0)
                while missing > 0:
                    words = tl.load(all_own, volatile=True)
                    missing = tl.max((words == -1).to(tl.int32), axis=0)
            high, low = _high(words).to(tl.float32, bitcast=True), _low(words).to(tl.float32, bitcast=True)
            s_parts = tl.where(kind == 0, low, 0.0)
            m_parts = tl.where(s_parts == 0.0, -float("inf"), high)
            greatest = tl.max(m_parts, axis=0)
            greatest = tl.where(greatest == -float("inf"), 0.0, greatest)
            s_parts = tl.where(s_parts == 0.0, 0.0, s_parts * tl.exp2((m_parts - greatest) * LOG2_E))
            m = tl.zeros([1], tl.float32) + greatest
            s = tl.zeros([1], tl.float32) + tl.sum(s_parts, axis=0) * (1.0 / TIMES)
            z_label = tl.zeros([1], tl.float32) + tl.max(tl.where(kind == 1, low, -float("inf")), axis=0)
            r, wz = tl.where(finite(z_label), z_label, 0.0), tl.zeros([1], tl.float32)
            if SMOOTHING:
                wz += tl.sum(tl.where(kind == 2, high, 0.0), axis=0) * (1.0 / TIMES)
            w_total = tl.zeros([1], tl.float32) + classes
            loss, level, hit, spread = row_results(
                s, m, z_label, wz, r, w_total, weight, counted, eps, z_scale, classes, SMOOTHING
            )
            if K > 0:
                rank = tl.zeros([1], tl.int32) + tl.sum(tl.where(kind == 1, _high(words), 0), axis=0) // TIMES
                if REDUCTION == "none":
                    store_ranks(right_ptr, rank, row, rows, there & once, counted, weight == weight, ks, K)
                else:
                    right_sum += ((rank[:, None] < k_vector[None, :]) & (counted & once)[:, None]).to(tl.int32)
                    counted_sum += (counted & once).to(tl.int32)
                    invalid_sum += ((weight != weight) & once).to(tl.int32)
            if REDUCTION == "none":
                tl.store(loss_ptr + row, loss.to(tl.float32), mask=there & once)
            else:
                loss_sum += tl.where(once, loss, 0.0)
                weight_sum += tl.where(once, weight, 0.0).to(tl.float64)
            if row_max_ptr is not None:
                tl.store(row_max_ptr + row, m, mask=there & once)
                tl.store(row_sum_ptr + row, s, mask=there & once)
            if gradient_ptr is not None:
                start = row_offsets(row // inner, row % inner, x_outer, x_inner, 1)
                base = row_offsets(row // inner, row % inner, x_outer, x_inner, VEC)
                g_base = row_offsets(row // inner, row % inner, g_outer, g_inner, VEC)
                x, shift = _part(logits_ptr, base, start, lanes, end, counted, classes, VEC)
                level = tl.where(counted, (level * scale / s).to(tl.float32), 0.0)
                hit, spread = (hit * scale).to(tl.float32), tl.where(counted, spread * scale, 0.0).to(tl.float32)
                e = tl.exp2((x - m[:, None]) * LOG2_E)
                g = slope(e, lanes, level, spread, None, None, False, SMOOTHING)
                at = tl.max(label, axis=0)
                if (at >= first - shift) & (at < first - shift + COLS):
                    g = subtract_at_label(g, label, hit, first - shift, 1, COLS)
                group, after = lanes // VEC, tl.max(tl.where(there, end, 0), axis=0) // VEC
                after = tl.minimum((shift + classes) // VEC, after)
                whole = (group >= tl.cdiv(shift, VEC)) & (group < after)
                if part == 0:
                    _write_ends(
                        logits_ptr, gradient_ptr, base, g_base, shift, classes, there, counted, label, m, level,
                        hit, spread, SMOOTHING, VEC,
                    )  # fmt: skip
                pointers = gradient_ptr + g_base[:, None] + lanes.to(tl.int64)[None, :]
                tl.store(pointers, g, mask=whole[None, :])
    if REDUCTION != "none" and STEP != "publish":
        invalid = tl.sum(invalid_sum, axis=0) > 0
        end_launch(
            loss_ptr,
            right_ptr,
            scale_ptr,
            sums_ptr,
            counts_ptr,
            counter_ptr,
            tl.sum(loss_sum, axis=0),
            tl.sum(weight_sum, axis=0),
            tl.sum(counted_sum, axis=0),
            tl.where(invalid, -1, tl.sum(right_sum, axis=0)),
            K,
            K_PAD,
            G_PAD,
            REDUCTION == "mean",
            tl.float32,
        )
