r"""Cross-entropy against soft targets: loss and both gradients from one visit to the input and the target.

With z the logits (after the softcap), p their softmax, lse their log-sum-exp, t the target, w the class weights, ε
the label smoothing over C classes, u = (1−ε) t + ε/C, λ the scale of the squared log-sum-exp, S = Σ_c w_c u_c and
T = Σ_c w_c t_c, one row gives

    L        =  S lse − Σ_c w_c u_c z_c + λ lse² T  =  S ln s − Σ_c w_c u_c (z_c − m) + λ lse² T
    ∂L/∂z_c  =  p_c A − w_c u_c,      A = S + 2 λ lse T
    ∂L/∂t_c  =  w_c (1−ε) (lse − z_c) + λ w_c lse²

where m is the greatest logit and s = Σ_c exp(z_c − m). No term of S ln s − Σ w u (z − m) is below 0, so nothing
cancels, however great the logits. Of probabilities y instead of logits, where a coefficient of 0 makes a term 0:

    L  =  −Σ_c w_c u_c log y_c,      ∂L/∂y_c  =  −w_c u_c / y_c,      ∂L/∂t_c  =  −w_c (1−ε) log y_c

With N rows, b bytes an element of the input and b' of the target, device memory moves (class weights, and what is
kept a row, left out):

========================================  ==================  =====================================================
forward                                   N·C·(b + b')        each element read once
forward that writes both gradients        2·N·C·(b + b')      read once, gradients written once; rows longer than
                                                              a tile are read a second time, from the L2 cache
backward of both                          2·N·C·(b + b')      read once, written once; what the forward kept makes
                                                              the target's gradient need the input alone
========================================  ==================  =====================================================

A gradient that is not asked for is not written. A launch ends with the mean: every program stores what its rows add
up to, and the last to end adds those up, always in the same order, so that results are equal from run to run.
Nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.backends.contract import LossOptions, SoftForward

from .launch import counter, launch, on_device
from .tile_helpers import LOG2_E, class_offsets, fp64, inside, last_to_end, row_offsets, tanh, tile_count, tile_rows
from .tiles import ALL_REGISTERS, Tiles, arithmetic, in_blocks, in_cache, plan, power_of_2, vector_width

__all__ = ["soft_cross_entropy_backward", "soft_cross_entropy_forward"]

# Elements of either tensor that a program of the backward pass takes: 16 a thread.
_BACKWARD_TILE = 2048


def soft_cross_entropy_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    *,
    loss_dtype: torch.dtype,
    gradient: bool,
    target_gradient: bool,
    inplace: bool,
    divisor: float = 1.0,
) -> SoftForward:
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    rows, device = input.shape[0] * input.shape[2], input.device
    none = options.reduction == "none"
    result = (input if inplace else torch.empty_like(input)) if gradient else None
    target_result = torch.empty_like(target) if target_gradient else None
    tiles = _plan(input, target, result, target_result, options)
    loss = torch.empty(rows if none else (), dtype=loss_dtype, device=device)
    sums = None if none else torch.empty(tiles.grid, dtype=torch.float64, device=device)
    # The backward pass is wanted later only where no gradient is written now; then m, s and A are kept.
    saved: tuple[Tensor, ...] = ()
    if options.from_logits and not (gradient or target_gradient):
        saved = tuple(torch.empty(rows, dtype=_compute_dtype(input, target), device=device) for _ in range(3))

    with on_device(input):
        ends = (loss, sums, None if none else counter(device))
        shape = _shape_arguments(input, target, result, target_result)
        constants = {
            "REDUCTION": options.reduction,
            "G_PAD": power_of_2(tiles.grid),
            **_constants(input, target, weight, options, tiles),
        }
        tensors = (input, target, weight, result, target_result)
        if not options.from_logits:
            arguments = (*tensors, None, *ends, *shape, 0, *_scalars(input, options, divisor))
            launch(_probabilities, (tiles.grid,), arguments, {"LOOPED": tiles.looped, **constants})
        else:
            scalars = (*_scalars(input, options, divisor), options.lse_square_scale, options.softcap or 1.0)
            constants |= {**_logit_constants(options), **({"GROUP": tiles.group} if tiles.looped else {})}
            launch(
                _forward_loop if tiles.looped else _forward_tile,
                (tiles.grid,),
                (*tensors, *(saved or (None, None, None)), *ends, *shape, *scalars),
                constants,
            )
    return SoftForward(loss, result, target_result, saved)


def soft_cross_entropy_backward(
    upstream: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    saved: Sequence[Tensor],
    *,
    gradient: bool,
    target_gradient: bool,
    inplace: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """See :class:`fastloss.backends.contract.Backend`. One launch; none if neither gradient is asked for."""
    result = (input if inplace else torch.empty_like(input)) if gradient else None
    target_result = torch.empty_like(target) if target_gradient else None
    if result is None and target_result is None:
        return None, None
    tiles = _plan(input, target, result, target_result, options)
    tensors = (input, target, weight, result, target_result, upstream)
    shape = (
        *_shape_arguments(input, target, result, target_result),
        upstream.stride(0) if upstream.dim() else 0,
        *_scalars(input, options),
    )
    with on_device(input):
        if not options.from_logits:
            launch(
                _probabilities,
                (tiles.grid,),
                (*tensors, None, None, None, *shape),
                {
                    "REDUCTION": options.reduction,
                    "G_PAD": 1,
                    "LOOPED": tiles.looped,
                    **_constants(input, target, weight, options, tiles),
                },
            )
        else:
            # No row is held whole here: each program takes one tile of some rows and some classes.
            cols = min(tiles.cols, max(16, _BACKWARD_TILE // tiles.rows))
            tiles, blocks = in_blocks(tiles._replace(cols=cols, warps=4), input.shape[1])
            launch(
                _backward,
                (tiles.number, blocks),
                (*tensors, *saved, *shape, options.lse_square_scale, options.softcap or 1.0),
                {**_logit_constants(options), **_constants(input, target, weight, options, tiles)},
            )
    return result, target_result


def _plan(
    input: Tensor, target: Tensor, result: Tensor | None, target_result: Tensor | None, options: LossOptions
) -> Tiles:
    """The input's tiles, for programs that read the target beside it."""
    written = [t for t in (result, target_result) if t is not None]
    tiles = plan(input, written[0] if written else None)
    classes = input.shape[1]
    vec = vector_width(input, target, *written, classes=classes)
    many = len(written) == 2 or (written and options.softcap is not None)
    of_all = many or tiles.by_inner or (tiles.looped and (written or vec == 1))
    tiles = tiles._replace(vec=vec, registers=ALL_REGISTERS if of_all else 0)
    if written and not tiles.looped and _compute_dtype(input, target) == torch.float32:
        if tiles.warps > 8:
            # 32 elements a thread and two programs a processor, where with 16 there would be room for one alone: it
            # would wait for its own memory accesses.
            tiles = tiles._replace(warps=8)
        if tiles.by_inner:  # 16 elements a thread: with 32, each at an address of its own, registers would run out
            tiles = tiles._replace(warps=8)
    if tiles.looped:
        if not tiles.by_inner and (tiles.vec == 1 or options.softcap is not None):
            # Else there would be too many pointers, or too much of the softcap's arithmetic, for the registers.
            tiles = tiles._replace(cols=min(tiles.cols, 4096))
        if written:  # both tensors' rows are to be found in the L2 cache when they are visited again
            tiles = in_cache(tiles, input.device, classes * (input.element_size() + target.element_size()))
    return tiles


def _compute_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 if either tensor is float64, as torch promotes them, else float32."""
    return torch.float64 if torch.float64 in (input.dtype, target.dtype) else torch.float32


def _shape_arguments(
    input: Tensor, target: Tensor, result: Tensor | None, target_result: Tensor | None
) -> tuple[int, ...]:
    outer, classes, inner = input.shape
    tensors = (input, target, input if result is None else result, target if target_result is None else target_result)
    return (outer * inner, classes, inner, *(stride for tensor in tensors for stride in tensor.stride()))


def _scalars(input: Tensor, options: LossOptions, divisor: float = 1.0) -> tuple[float, float, float]:
    """1−ε, ε/C and what a row's loss counts in the result: arguments, which cost a kernel no register."""
    outer, classes, inner = input.shape
    eps = options.label_smoothing
    scale = 1.0 / max(outer * inner, 1) if options.reduction == "mean" else 1.0 / divisor
    return 1.0 - eps, eps / max(classes, 1), scale


def _constants(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, tiles: Tiles
) -> dict[str, object]:
    """What a kernel is compiled for. Options that are off cost nothing; values that vary are not among them."""
    return {
        "HAS_WEIGHT": weight is not None,
        "SMOOTHING": options.label_smoothing != 0,
        "ACC": arithmetic(_compute_dtype(input, target)),
        **tiles.constants(),
    }


def _logit_constants(options: LossOptions) -> dict[str, object]:
    return {"Z_LOSS": options.lse_square_scale != 0, "SOFTCAP": options.softcap is not None}


@triton.jit
def _narrowed(value, pointer):
    """A value to store: what is computed in float64 is rounded to float32 on its way to anything shorter."""
    if value.dtype == tl.float64 and pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    return value


@triton.jit
def _weighted(
    t,  # (ROWS, COLS)
    cols,
    classes,
    weight_ptr,
    keep,  # 1−ε
    spread,  # ε/C
    MASKED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    """w u, w t, and w if HAS_WEIGHT: 0 in columns that are no classes, where t is 0."""
    wu, wt, w = t, t, t
    if SMOOTHING:
        wu = t * keep[:, None] + spread[:, None]
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + cols, mask=cols < classes, other=0.0).to(t.dtype)[None, :]
        wu, wt = wu * w, t * w
    elif SMOOTHING and MASKED:
        wu = tl.where((cols < classes)[None, :], wu, 0.0)
    return wu, wt, w


@triton.jit
def _target_slope(
    d,  # (ROWS, COLS): z − m
    w,  # (1, COLS), if HAS_WEIGHT
    log_s,  # ln s
    keep,  # 1−ε, times the scale
    tail,  # λ lse², times the scale, if Z_LOSS
    HAS_WEIGHT: tl.constexpr,
    Z_LOSS: tl.constexpr,
):
    """∂L/∂t = w ((1−ε) (lse − z) + λ lse²)."""
    h = (log_s[:, None] - d) * keep[:, None]
    if Z_LOSS:
        h += tail[:, None]
    if HAS_WEIGHT:
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
    Z_LOSS: tl.constexpr,
):
    """Each row's loss, ln s, A and λ lse² before any scale. In float64: rows are few beside logits."""
    log_s = tl.log(s).to(tl.float64)
    level = wu_sum.to(tl.float64)
    loss = level * log_s - wud.to(tl.float64)
    tail = log_s
    if Z_LOSS:
        lse = log_s + m.to(tl.float64)
        half = z_scale * lse
        tail = half * lse
        loss += tail * wt_sum.to(tl.float64)
        level += 2.0 * half * wt_sum.to(tl.float64)
    return tl.where(in_range, loss, 0.0), log_s, level, tail


@triton.jit
def _end(
    loss_ptr,
    sums_ptr,
    counter_ptr,
    loss_sum,
    rows,
    G_PAD: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Store what this program's rows add up to; the last program adds up the programs, in their order."""
    tl.store(sums_ptr + tl.program_id(0), loss_sum)
    if last_to_end(counter_ptr):
        tl.store(counter_ptr, 0)
        index = tl.arange(0, G_PAD)
        there = index < tl.num_programs(0)
        loss = tl.sum(tl.load(sums_ptr + index, mask=there, other=0.0, cache_modifier=".cg"), axis=0)
        if MEAN:
            loss = loss / rows
        tl.store(loss_ptr, _narrowed(loss, loss_ptr))


@triton.jit
def _forward_tile(
    input_ptr,  # (outer, classes, inner), any strides
    target_ptr,  # of that shape, with any other strides
    weight_ptr,  # (classes,) or None
    gradient_ptr,  # as the input, and may be it; None: not written
    target_gradient_ptr,  # as the target; None: not written
    row_max_ptr,  # (rows,): m, kept for a backward pass; or None
    row_sum_ptr,  # (rows,): s, likewise
    level_ptr,  # (rows,): A, likewise
    loss_ptr,  # () or, for "none", (rows,)
    sums_ptr,  # (programs,): loss of each program's rows
    counter_ptr,  # (): programs that have ended
    rows,
    classes,
    inner,
    x_outer,  # strides of the input
    x_class,
    x_inner,
    t_outer,  # of the target
    t_class,
    t_inner,
    g_outer,  # of the gradient
    g_class,
    g_inner,
    h_outer,  # and of the target's gradient
    h_class,
    h_inner,
    keep: fp64,  # 1−ε
    spread: fp64,  # ε/C
    scale: fp64,  # 1 / rows for "mean", else 1
    z_scale: fp64,
    cap: fp64,
    REDUCTION: tl.constexpr,
    G_PAD: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BY_INNER: tl.constexpr,
):
    """Forward with whole rows in registers: reads both tensors once, writes each gradient once."""
    keep, spread = tl.full([1], keep, ACC), tl.full([1], spread, ACC)
    scale, z_scale, cap = tl.full([1], scale, tl.float64), tl.full([1], z_scale, tl.float64), tl.full([1], cap, ACC)
    cols = tl.arange(0, COLS)
    col_mask = inside(cols, classes, VEC)
    x_cols, t_cols = class_offsets(cols, x_class, VEC), class_offsets(cols, t_class, VEC)
    loss_sum = tl.zeros([ROWS], tl.float64)

    for tile in tl.range(tl.program_id(0), tile_count(rows, inner, ROWS, BY_INNER), tl.num_programs(0)):
        row, in_range, outer, within = tile_rows(tile, rows, inner, ROWS, BY_INNER)
        mask = in_range[:, None] & col_mask[None, :]
        base = row_offsets(outer, within, x_outer, x_inner, VEC)
        x = tl.load(input_ptr + base[:, None] + x_cols[None, :], mask=mask, other=-float("inf")).to(ACC)
        t_base = row_offsets(outer, within, t_outer, t_inner, VEC)
        t = tl.load(target_ptr + t_base[:, None] + t_cols[None, :], mask=mask, other=0.0).to(ACC)
        z, dz = x, x
        if SOFTCAP:
            tanh_x, dz = tanh(x / cap[:, None], ACC)
            z = tl.where(col_mask[None, :], tanh_x * cap[:, None], -float("inf"))
        m = tl.max(z, axis=1)
        m = tl.where(m == -float("inf"), 0.0, m)
        d = z - m[:, None]
        e = tl.exp2(d * LOG2_E)
        s = tl.sum(e, axis=1)
        wu, wt, w = _weighted(t, cols, classes, weight_ptr, keep, spread, True, HAS_WEIGHT, SMOOTHING)
        wud = tl.sum(tl.where(col_mask[None, :], wu * d, 0.0), axis=1)
        wu_sum = tl.sum(wu, axis=1)
        wt_sum = wu_sum
        if Z_LOSS and SMOOTHING:
            wt_sum = tl.sum(wt, axis=1)
        loss, log_s, level, tail = _row_results(s, m, wud, wu_sum, wt_sum, in_range, z_scale, Z_LOSS)
        if REDUCTION == "none":
            tl.store(loss_ptr + row, _narrowed(loss, loss_ptr), mask=in_range)
        else:
            loss_sum += loss
        if row_max_ptr is not None:
            tl.store(row_max_ptr + row, m, mask=in_range)
            tl.store(row_sum_ptr + row, s, mask=in_range)
            tl.store(level_ptr + row, level.to(ACC), mask=in_range)
        if gradient_ptr is not None:
            g = e * (level * scale / s).to(ACC)[:, None] - wu * scale.to(ACC)[:, None]
            if SOFTCAP:
                g *= dz
            g_base = row_offsets(outer, within, g_outer, g_inner, VEC)
            out = gradient_ptr + g_base[:, None] + class_offsets(cols, g_class, VEC)[None, :]
            tl.store(out, _narrowed(g, gradient_ptr), mask=mask)
        if target_gradient_ptr is not None:
            tail = (tail * scale).to(ACC)
            h = _target_slope(d, w, log_s.to(ACC), keep * scale.to(ACC), tail, HAS_WEIGHT, Z_LOSS)
            h_base = row_offsets(outer, within, h_outer, h_inner, VEC)
            out = target_gradient_ptr + h_base[:, None] + class_offsets(cols, h_class, VEC)[None, :]
            tl.store(out, _narrowed(h, target_gradient_ptr), mask=mask)

    if REDUCTION != "none":
        _end(loss_ptr, sums_ptr, counter_ptr, tl.sum(loss_sum, axis=0), rows, G_PAD, REDUCTION == "mean")


@triton.jit
def _visit(
    m_group,  # (ROWS, groups): the running maximum of each group of classes
    s_group,  # (ROWS, groups): Σ exp(z − m_group)
    wud_group,  # (ROWS, groups): Σ w u (z − m_group)
    wu_group,  # (ROWS, groups): Σ w u
    wt_group,  # (ROWS, groups): Σ w t, if Z_LOSS and SMOOTHING
    input_ptr,
    target_ptr,
    weight_ptr,
    base,
    t_base,
    start,
    classes,
    x_class,
    t_class,
    in_range,
    keep,
    spread,
    cap,
    MASKED: tl.constexpr,
    TWICE: tl.constexpr,  # these elements will be read again
    HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block of a looped row, joined to what the blocks before it gave.

    A group that has met nothing above −∞ counts its differences from 0: they are −∞, or there are none.
    """
    cols = start + tl.arange(0, COLS)
    mask = in_range[:, None]
    if MASKED:
        mask = mask & inside(cols, classes, VEC)[None, :]
    policy: tl.constexpr = "evict_last" if TWICE else "evict_first"
    pointers = input_ptr + base[:, None] + class_offsets(cols, x_class, VEC)[None, :]
    x = tl.load(pointers, mask=mask, other=-float("inf"), eviction_policy=policy).to(ACC)
    pointers = target_ptr + t_base[:, None] + class_offsets(cols, t_class, VEC)[None, :]
    t = tl.load(pointers, mask=mask, other=0.0, eviction_policy=policy).to(ACC)
    SPLIT: tl.constexpr = [ROWS, COLS // GROUP, GROUP]
    z = x
    if SOFTCAP:
        tanh_x, _ = tanh(x / cap[:, None], ACC)
        z = tanh_x * cap[:, None]
        if MASKED:
            z = tl.where(mask, z, -float("inf"))
    wu, wt, _ = _weighted(t, cols, classes, weight_ptr, keep, spread, MASKED, HAS_WEIGHT, SMOOTHING)
    z, wu_split = tl.reshape(z, SPLIT), tl.reshape(wu, SPLIT)
    m_new = tl.maximum(m_group, tl.max(z, axis=2))
    m_from = tl.where(m_group == -float("inf"), 0.0, m_group)
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    d = z - m_safe[:, :, None]
    wud = wu_split * d
    if MASKED:
        there = tl.reshape(tl.broadcast_to(mask, [ROWS, COLS]), SPLIT)
        wud = tl.where(there, wud, 0.0)
    s_group = s_group * tl.exp2((m_group - m_safe) * LOG2_E) + tl.sum(tl.exp2(d * LOG2_E), axis=2)
    wud_group += wu_group * (m_from - m_safe) + tl.sum(wud, axis=2)
    wu_group += tl.sum(wu_split, axis=2)
    if Z_LOSS and SMOOTHING:
        wt_group += tl.sum(tl.reshape(wt, SPLIT), axis=2)
    return m_new, s_group, wud_group, wu_group, wt_group


@triton.jit
def _write_gradients(
    input_ptr,
    target_ptr,
    weight_ptr,
    gradient_ptr,
    target_gradient_ptr,
    base,
    t_base,
    g_base,
    h_base,
    start,
    classes,
    x_class,
    t_class,
    g_class,
    h_class,
    in_range,
    m,
    log_s,
    level,  # A times the scale, over s
    scale,
    tail,  # λ lse², times the scale
    keep,  # 1−ε
    spread,  # ε/C
    cap,
    MASKED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    COLS: tl.constexpr,
):
    """The gradients of one block of rows whose softmax is known. Reads the block once, writes it once.

    The target itself is read for the input's gradient alone.
    """
    cols = start + tl.arange(0, COLS)
    mask = in_range[:, None]
    if MASKED:
        mask = mask & inside(cols, classes, VEC)[None, :]
    pointers = input_ptr + base[:, None] + class_offsets(cols, x_class, VEC)[None, :]
    x = tl.load(pointers, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(ACC)
    z, dz, t = x, x, x
    if gradient_ptr is not None:
        pointers = target_ptr + t_base[:, None] + class_offsets(cols, t_class, VEC)[None, :]
        t = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    if SOFTCAP:
        tanh_x, dz = tanh(x / cap[:, None], ACC)
        z = tanh_x * cap[:, None]
    d = z - m[:, None]
    wu, _, w = _weighted(t, cols, classes, weight_ptr, keep, spread, MASKED, HAS_WEIGHT, SMOOTHING)
    if gradient_ptr is not None:
        g = tl.exp2(d * LOG2_E) * level[:, None] - wu * scale[:, None]
        if SOFTCAP:
            g *= dz
        out = gradient_ptr + g_base[:, None] + class_offsets(cols, g_class, VEC)[None, :]
        tl.store(out, _narrowed(g, gradient_ptr), mask=mask, eviction_policy="evict_first")
    if target_gradient_ptr is not None:
        h = _target_slope(d, w, log_s, keep * scale, tail, HAS_WEIGHT, Z_LOSS)
        out = target_gradient_ptr + h_base[:, None] + class_offsets(cols, h_class, VEC)[None, :]
        tl.store(out, _narrowed(h, target_gradient_ptr), mask=mask, eviction_policy="evict_first")


@triton.jit
def _forward_loop(
    input_ptr,  # (outer, classes, inner), any strides
    target_ptr,  # of that shape, with any other strides
    weight_ptr,  # (classes,) or None
    gradient_ptr,  # as the input, and may be it; None: not written
    target_gradient_ptr,  # as the target; None: not written
    row_max_ptr,  # (rows,): m, kept for a backward pass; or None
    row_sum_ptr,  # (rows,): s, likewise
    level_ptr,  # (rows,): A, likewise
    loss_ptr,  # () or, for "none", (rows,)
    sums_ptr,  # (programs,): loss of each program's rows
    counter_ptr,  # (): programs that have ended
    rows,
    classes,
    inner,
    x_outer,  # strides of the input
    x_class,
    x_inner,
    t_outer,  # of the target
    t_class,
    t_inner,
    g_outer,  # of the gradient
    g_class,
    g_inner,
    h_outer,  # and of the target's gradient
    h_class,
    h_inner,
    keep: fp64,  # 1−ε
    spread: fp64,  # ε/C
    scale: fp64,  # 1 / rows for "mean", else 1
    z_scale: fp64,
    cap: fp64,
    REDUCTION: tl.constexpr,
    G_PAD: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BY_INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Forward with rows longer than a tile: an online softmax over their blocks, then gradients, last block first.

    Reads both tensors once from memory and, for gradients, once from the L2 cache; writes each gradient once. As in
    ``cross_entropy._forward_loop`` a group of neighbouring classes takes its maximum before anything is rescaled.
    """
    WRITTEN: tl.constexpr = gradient_ptr is not None or target_gradient_ptr is not None
    keep, spread = tl.full([1], keep, ACC), tl.full([1], spread, ACC)
    scale, z_scale, cap = tl.full([1], scale, tl.float64), tl.full([1], z_scale, tl.float64), tl.full([1], cap, ACC)
    full = classes // COLS * COLS
    loss_sum = tl.zeros([ROWS], tl.float64)

    for tile in tl.range(tl.program_id(0), tile_count(rows, inner, ROWS, BY_INNER), tl.num_programs(0)):
        row, in_range, outer, within = tile_rows(tile, rows, inner, ROWS, BY_INNER)
        base = row_offsets(outer, within, x_outer, x_inner, VEC)
        t_base = row_offsets(outer, within, t_outer, t_inner, VEC)
        m_group = tl.full([ROWS, COLS // GROUP], -float("inf"), ACC)
        s_group = tl.zeros([ROWS, COLS // GROUP], ACC)
        wud_group = tl.zeros([ROWS, COLS // GROUP], ACC)
        wu_group = tl.zeros([ROWS, COLS // GROUP], ACC)
        wt_group = tl.zeros([ROWS, COLS // GROUP], ACC)
        for start in tl.range(0, full, COLS):
            m_group, s_group, wud_group, wu_group, wt_group = _visit(
                m_group, s_group, wud_group, wu_group, wt_group, input_ptr, target_ptr, weight_ptr, base, t_base,
                start, classes, x_class, t_class, in_range, keep, spread, cap, False, WRITTEN,
                HAS_WEIGHT, SMOOTHING, Z_LOSS, SOFTCAP, ACC, VEC, ROWS, COLS, GROUP,
            )  # fmt: skip
        if full < classes:
            m_group, s_group, wud_group, wu_group, wt_group = _visit(
                m_group, s_group, wud_group, wu_group, wt_group, input_ptr, target_ptr, weight_ptr, base, t_base,
                full, classes, x_class, t_class, in_range, keep, spread, cap, True, WRITTEN,
                HAS_WEIGHT, SMOOTHING, Z_LOSS, SOFTCAP, ACC, VEC, ROWS, COLS, GROUP,
            )  # fmt: skip

        m = tl.max(m_group, axis=1)
        m = tl.where(m == -float("inf"), 0.0, m)
        m_from = tl.where(m_group == -float("inf"), 0.0, m_group)
        s = tl.sum(s_group * tl.exp2((m_group - m[:, None]) * LOG2_E), axis=1)
        wud = tl.sum(wud_group + wu_group * (m_from - m[:, None]), axis=1)
        wu_sum = tl.sum(wu_group, axis=1)
        wt_sum = wu_sum
        if Z_LOSS and SMOOTHING:
            wt_sum = tl.sum(wt_group, axis=1)
        loss, log_s, level, tail = _row_results(s, m, wud, wu_sum, wt_sum, in_range, z_scale, Z_LOSS)
        if REDUCTION == "none":
            tl.store(loss_ptr + row, _narrowed(loss, loss_ptr), mask=in_range)
        else:
            loss_sum += loss
        if row_max_ptr is not None:
            tl.store(row_max_ptr + row, m, mask=in_range)
            tl.store(row_sum_ptr + row, s, mask=in_range)
            tl.store(level_ptr + row, level.to(ACC), mask=in_range)
        if WRITTEN:
            g_base = row_offsets(outer, within, g_outer, g_inner, VEC)
            h_base = row_offsets(outer, within, h_outer, h_inner, VEC)
            log_s, level, tail = log_s.to(ACC), (level * scale / s).to(ACC), (tail * scale).to(ACC)
            if full < classes:
                _write_gradients(
                    input_ptr, target_ptr, weight_ptr, gradient_ptr, target_gradient_ptr, base, t_base, g_base,
                    h_base, full, classes, x_class, t_class, g_class, h_class, in_range,
                    m, log_s, level, scale.to(ACC), tail, keep, spread, cap,
                    True, HAS_WEIGHT, SMOOTHING, Z_LOSS, SOFTCAP, ACC, VEC, COLS,
                )  # fmt: skip
            for done in tl.range(0, full, COLS):  # from the end: what was read last is in the cache for sure
                _write_gradients(
                    input_ptr, target_ptr, weight_ptr, gradient_ptr, target_gradient_ptr, base, t_base, g_base,
                    h_base, full - COLS - done, classes, x_class, t_class, g_class, h_class, in_range,
                    m, log_s, level, scale.to(ACC), tail, keep, spread, cap,
                    False, HAS_WEIGHT, SMOOTHING, Z_LOSS, SOFTCAP, ACC, VEC, COLS,
                )  # fmt: skip

    if REDUCTION != "none":
        _end(loss_ptr, sums_ptr, counter_ptr, tl.sum(loss_sum, axis=0), rows, G_PAD, REDUCTION == "mean")


@triton.jit
def _backward(
    input_ptr,  # (outer, classes, inner), any strides
    target_ptr,  # of that shape, with any other strides
    weight_ptr,  # (classes,) or None
    gradient_ptr,  # as the input, and may be it; None: not written
    target_gradient_ptr,  # as the target; None: not written
    upstream_ptr,  # (rows,) or ()
    row_max_ptr,  # (rows,): m
    row_sum_ptr,  # (rows,): s
    level_ptr,  # (rows,): A
    rows,
    classes,
    inner,
    x_outer,  # strides of the input
    x_class,
    x_inner,
    t_outer,  # of the target
    t_class,
    t_inner,
    g_outer,  # of the gradient
    g_class,
    g_inner,
    h_outer,  # and of the target's gradient
    h_class,
    h_inner,
    upstream_stride,  # 0 for ()
    keep: fp64,  # 1−ε
    spread: fp64,  # ε/C
    scale: fp64,  # 1 / rows for "mean", else 1
    z_scale: fp64,
    cap: fp64,
    HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BY_INNER: tl.constexpr,
):
    """Gradients from both tensors and what the forward kept of each row. Reads each once, writes each once."""
    keep, spread = tl.full([1], keep, ACC), tl.full([1], spread, ACC)
    scale, z_scale, cap = tl.full([1], scale, tl.float64), tl.full([1], z_scale, tl.float64), tl.full([1], cap, ACC)
    row, in_range, outer, within = tile_rows(tl.program_id(0), rows, inner, ROWS, BY_INNER)
    m = tl.load(row_max_ptr + row, mask=in_range, other=0.0)
    s = tl.load(row_sum_ptr + row, mask=in_range, other=1.0)
    level = tl.load(level_ptr + row, mask=in_range, other=0.0).to(tl.float64)
    scale *= tl.load(upstream_ptr + row.to(tl.int64) * upstream_stride, mask=in_range, other=0.0).to(tl.float64)
    log_s = tl.log(s)
    tail = scale
    if Z_LOSS:
        lse = log_s.to(tl.float64) + m.to(tl.float64)
        tail = z_scale * lse * lse * scale
    _write_gradients(
        input_ptr, target_ptr, weight_ptr, gradient_ptr, target_gradient_ptr,
        row_offsets(outer, within, x_outer, x_inner, VEC), row_offsets(outer, within, t_outer, t_inner, VEC),
        row_offsets(outer, within, g_outer, g_inner, VEC), row_offsets(outer, within, h_outer, h_inner, VEC),
        tl.program_id(1) * COLS, classes, x_class, t_class, g_class, h_class, in_range,
        m, log_s, (level * scale / s).to(ACC), scale.to(ACC), tail.to(ACC),
        keep, spread, cap,
        True, HAS_WEIGHT, SMOOTHING, Z_LOSS, SOFTCAP, ACC, VEC, COLS,
    )  # fmt: skip


@triton.jit
def _visit_probabilities(
    input_ptr,
    target_ptr,
    weight_ptr,
    gradient_ptr,
    target_gradient_ptr,
    base,
    t_base,
    g_base,
    h_base,
    start,
    classes,
    x_class,
    t_class,
    g_class,
    h_class,
    in_range,
    scale,
    keep,
    spread,
    LOSS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    COLS: tl.constexpr,
):
    """One block of rows of probabilities: w u log y, and the gradients written."""
    cols = start + tl.arange(0, COLS)
    mask = in_range[:, None] & inside(cols, classes, VEC)[None, :]
    pointers = input_ptr + base[:, None] + class_offsets(cols, x_class, VEC)[None, :]
    y = tl.load(pointers, mask=mask, other=1.0, eviction_policy="evict_first").to(ACC)
    t = y
    if LOSS or gradient_ptr is not None:
        pointers = target_ptr + t_base[:, None] + class_offsets(cols, t_class, VEC)[None, :]
        t = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    wu, _, w = _weighted(t, cols, classes, weight_ptr, keep, spread, True, HAS_WEIGHT, SMOOTHING)
    log_y = tl.log(y)
    if gradient_ptr is not None:
        g = wu * -scale[:, None]
        if input_ptr.dtype.element_ty == tl.float32 and ACC == tl.float32:
            g = tl.div_rn(g, y)  # rounded as torch rounds it
        else:
            g = g / y
        g = tl.where(wu == 0.0, 0.0, g)
        out = gradient_ptr + g_base[:, None] + class_offsets(cols, g_class, VEC)[None, :]
        tl.store(out, _narrowed(g, gradient_ptr), mask=mask, eviction_policy="evict_first")
    if target_gradient_ptr is not None:
        factor = keep * -scale
        h = log_y * factor[:, None]
        if HAS_WEIGHT:
            h = tl.where(w == 0.0, 0.0, h * w)
        out = target_gradient_ptr + h_base[:, None] + class_offsets(cols, h_class, VEC)[None, :]
        tl.store(out, _narrowed(h, target_gradient_ptr), mask=mask, eviction_policy="evict_first")
    return tl.where(wu == 0.0, 0.0, wu * log_y)


@triton.jit
def _probabilities(
    input_ptr,  # (outer, classes, inner), any strides: probabilities
    target_ptr,  # of that shape, with any other strides
    weight_ptr,  # (classes,) or None
    gradient_ptr,  # as the input, and may be it; None: not written
    target_gradient_ptr,  # as the target; None: not written
    upstream_ptr,  # (rows,) or (); None: 1
    loss_ptr,  # () or, for "none", (rows,); None: not written
    sums_ptr,  # (programs,): loss of each program's rows
    counter_ptr,  # (): programs that have ended
    rows,
    classes,
    inner,
    x_outer,  # strides of the input
    x_class,
    x_inner,
    t_outer,  # of the target
    t_class,
    t_inner,
    g_outer,  # of the gradient
    g_class,
    g_inner,
    h_outer,  # and of the target's gradient
    h_class,
    h_inner,
    upstream_stride,  # 0 for ()
    keep: fp64,  # 1−ε
    spread: fp64,  # ε/C
    scale: fp64,  # 1 / rows for "mean", else 1
    REDUCTION: tl.constexpr,
    G_PAD: tl.constexpr,
    LOOPED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BY_INNER: tl.constexpr,
):
    """Loss of probabilities and its gradients, or those alone: no class waits for another, so one visit is enough."""
    keep, spread = tl.full([1], keep, ACC), tl.full([1], spread, ACC)
    loss_sum = tl.zeros([ROWS], tl.float64)

    for tile in tl.range(tl.program_id(0), tile_count(rows, inner, ROWS, BY_INNER), tl.num_programs(0)):
        row, in_range, outer, within = tile_rows(tile, rows, inner, ROWS, BY_INNER)
        base = row_offsets(outer, within, x_outer, x_inner, VEC)
        t_base = row_offsets(outer, within, t_outer, t_inner, VEC)
        g_base = row_offsets(outer, within, g_outer, g_inner, VEC)
        h_base = row_offsets(outer, within, h_outer, h_inner, VEC)
        of_row = tl.full([ROWS], scale, tl.float64)
        if upstream_ptr is not None:
            upstream = tl.load(upstream_ptr + row.to(tl.int64) * upstream_stride, mask=in_range, other=0.0)
            of_row *= upstream.to(tl.float64)
        terms = tl.zeros([ROWS, COLS], ACC)
        if LOOPED:
            for start in tl.range(0, classes, COLS):
                terms += _visit_probabilities(
                    input_ptr, target_ptr, weight_ptr, gradient_ptr, target_gradient_ptr, base, t_base, g_base,
                    h_base, start, classes, x_class, t_class, g_class, h_class, in_range, of_row.to(ACC), keep,
                    spread, loss_ptr is not None, HAS_WEIGHT, SMOOTHING, ACC, VEC, COLS,
                )  # fmt: skip
        else:
            terms = _visit_probabilities(
                input_ptr, target_ptr, weight_ptr, gradient_ptr, target_gradient_ptr, base, t_base, g_base, h_base,
                0, classes, x_class, t_class, g_class, h_class, in_range, of_row.to(ACC), keep, spread,
                loss_ptr is not None, HAS_WEIGHT, SMOOTHING, ACC, VEC, COLS,
            )  # fmt: skip
        if loss_ptr is not None:
            loss = tl.where(in_range, -tl.sum(terms, axis=1).to(tl.float64), 0.0)
            if REDUCTION == "none":
                tl.store(loss_ptr + row, _narrowed(loss, loss_ptr), mask=in_range)
            else:
                loss_sum += loss

    if loss_ptr is not None and REDUCTION != "none":
        _end(loss_ptr, sums_ptr, counter_ptr, tl.sum(loss_sum, axis=0), rows, G_PAD, REDUCTION == "mean")
