"""Accuracy alone: the rank of each row's label, and from it every top-k at once.

    rank = #{c: x_c > x_y} + #{c < y: x_c = x_y},    right at k iff rank < k,    NaN being the greatest value.

Reads N·V·b bytes; writes one number a k (or one a row and k). Rows are served as in ``cross_entropy``: whole in
registers, or block by block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.backends.contract import ExternalLabel

from .arguments import Form, Strided, block, compiled_in, pointers, row_offsets, strided, tile_count, tile_rows
from .launch import Launch, Memory, alike, launch, on_device, scratch
from .tile_helpers import (
    add_up_counts,
    before_label,
    ks_of,
    labels,
    last_to_end,
    rank_in_tile,
    rank_with_nans,
    rows_to_read,
    store_ranks,
)
from .tiles import ALL_REGISTERS, Tiles, plan, power_of_2

__all__ = ["accuracy", "label_ranks"]


def accuracy(
    logits: Tensor, target: Tensor, topk: tuple[int, ...], ignore_index: int, reduction: str
) -> tuple[Tensor, ...]:
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    rows, none = logits.shape[0] * logits.shape[2], reduction == "none"
    key = (logits.shape, logits.stride(), logits.device, topk, ignore_index, reduction, alike(logits), alike(target))
    ranked = _launches.get(key, lambda: _prepare(logits, topk, ignore_index, reduction))
    right = torch.empty((len(topk), rows) if none else (len(topk),), dtype=torch.float32, device=logits.device)
    with on_device(logits):
        _, counts, arrived = (
            (None, None, None) if none else scratch(logits.device, ranked.grid[0], 1 + power_of_2(len(topk)))
        )
        ranked(strided(logits), target, right, counts, arrived)
    return right.unbind(0)


_launches: Memory[Launch] = Memory()


def _prepare(logits: Tensor, topk: tuple[int, ...], ignore_index: int, reduction: str) -> Launch:
    outer, classes, inner = logits.shape
    tiles, k_pad = _plan(logits), power_of_2(len(topk))
    constants = {
        "T": tiles.tile(logits.dtype, G_PAD=tiles.added_at_once),
        "F": compiled_in(Form(REDUCTION=reduction, K=len(topk), K_PAD=k_pad)),
        **tiles.options(),
    }
    numbers = (outer * inner, classes, inner, ignore_index, topk)
    return Launch(_rank_kernel, (tiles.grid,), constants, numbers)


def _plan(logits: Tensor) -> Tiles:
    tiles = plan(logits)
    return tiles._replace(registers=ALL_REGISTERS) if tiles.by_inner else tiles


def label_ranks(logits: Tensor, label: ExternalLabel) -> Tensor:
    """See :class:`fastloss.backends.contract.Backend`. One launch."""
    outer, classes, inner = logits.shape
    rank = torch.empty(outer * inner, dtype=torch.int64, device=logits.device)
    tiles = _plan(logits)
    with on_device(logits):
        launch(
            _label_rank_kernel,
            (tiles.number,),
            (strided(logits), *label[:2], rank, outer * inner, classes, inner, label.most_k),
            {"T": tiles.tile(logits.dtype), **tiles.options()},
        )
    return rank


@triton.jit
def _ranks_of_block(
    logits: Strided, base, start, x_label, label, read, classes, MASKED: tl.constexpr, T: tl.constexpr
):
    """Return what :func:`before_label` does, of a block that begins with class ``start``."""
    cols, mask = block(start, classes, read, MASKED, T)
    x = tl.load(pointers(logits, base, cols, T), mask=mask, other=-float("inf")).to(T.ACC)
    return before_label(x, x_label, cols, start, label, T.GROUP, T.ROWS, T.COLS)


@triton.jit
def _ranks_of_tile(
    logits: Strided,
    base,  # where the tile's rows begin
    x_label,  # (ROWS,): the label's logit
    label,  # (ROWS,): the label, in [0, classes]
    counted,  # the rows whose rank is wanted
    read,  # the rows that are read
    classes,
    most_k,
    T: tl.constexpr,
):
    """Return how many classes stand before each row's label, of whole rows at once or block by block."""
    if T.LOOPED:
        group_rank = tl.zeros([T.ROWS, T.COLS // T.GROUP], tl.int32)
        if tl.max(counted.to(tl.int32), axis=0) > 0:
            full = classes // T.COLS * T.COLS
            for start in tl.range(0, full, T.COLS):
                group_rank += _ranks_of_block(logits, base, start, x_label, label, read, classes, False, T)
            if full < classes:
                group_rank += _ranks_of_block(logits, base, full, x_label, label, read, classes, True, T)
        rank = rank_with_nans(tl.sum(group_rank, axis=1), x_label, label, counted, logits, base, T)
    else:
        cols, mask = block(0, classes, read, True, T)
        places = pointers(logits, base, cols, T)
        x = tl.load(places, mask=mask, other=-float("inf")).to(T.ACC)
        rank = rank_in_tile(x, x_label, cols, label, counted, most_k)
    return rank


@triton.jit(do_not_specialize=["rows", "most_k"])
def _label_rank_kernel(
    logits: Strided,
    label_logit_ptr,  # (rows,), float64
    position_ptr,  # (rows,), int64: in [0, classes]
    rank_ptr,  # (rows,), int64
    rows,
    classes,
    inner,
    most_k,
    T: tl.constexpr,
):
    """Store the rank of each row's label, whose logit is given. Reads each logit once."""
    row, in_range, outer, within = tile_rows(tl.program_id(0), rows, inner, T)
    base = row_offsets(logits, outer, within, T)
    x_label = tl.load(label_logit_ptr + row, mask=in_range, other=0.0).to(T.ACC)
    position = tl.load(position_ptr + row, mask=in_range, other=0)
    rank = _ranks_of_tile(logits, base, x_label, position, in_range, in_range, classes, most_k, T)
    tl.store(rank_ptr + row, rank.to(tl.int64), mask=in_range)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _rank_kernel(
    logits: Strided,
    target_ptr,  # (rows,)
    right_ptr,  # (K,) or (K, rows)
    counts_ptr,  # (programs, 1 + K_PAD): counted and right rows
    counter_ptr,  # (): programs that have ended
    rows,
    classes,
    inner,
    ignore_index,
    ks,  # K ints
    T: tl.constexpr,
    F: tl.constexpr,
):
    """Store the accuracies of all rows, or each row's. Reads each logit of a counted row once."""
    k_vector, most_k = ks_of(ks, F.K, F.K_PAD)
    counted_sum, right_sum = tl.zeros([T.ROWS], tl.int32), tl.zeros([T.ROWS, F.K_PAD], tl.int32)
    invalid_sum = tl.zeros([T.ROWS], tl.int32)
    for tile in tl.range(tl.program_id(0), tile_count(rows, inner, T), tl.num_programs(0)):
        row, in_range, outer, within = tile_rows(tile, rows, inner, T)
        label, counted, weight = labels(target_ptr, row, in_range, target_ptr, classes, ignore_index, False, T.ACC)
        base = row_offsets(logits, outer, within, T)
        x_label = tl.load(logits.ptr + base + label * logits.stride_class, mask=counted, other=0.0).to(T.ACC)
        read = rows_to_read(counted, in_range, T.BY_INNER)
        rank = _ranks_of_tile(logits, base, x_label, label, counted, read, classes, most_k, T)
        if F.REDUCTION == "none":
            store_ranks(right_ptr, rank, row, rows, in_range, counted, weight == weight, ks, F.K)
        else:
            right_sum += ((rank[:, None] < k_vector[None, :]) & counted[:, None]).to(tl.int32)
            counted_sum += counted.to(tl.int32)
            invalid_sum += (weight != weight).to(tl.int32)

    if F.REDUCTION != "none":
        program = tl.program_id(0)
        invalid = tl.sum(invalid_sum, axis=0) > 0
        right_total = tl.where(invalid, -1, tl.sum(right_sum, axis=0))
        tl.store(counts_ptr + program * (1 + F.K_PAD), tl.sum(counted_sum, axis=0))
        tl.store(counts_ptr + program * (1 + F.K_PAD) + 1 + tl.arange(0, F.K_PAD), right_total)
        if last_to_end(counter_ptr):
            tl.store(counter_ptr, 0)
            add_up_counts(counts_ptr, right_ptr, F.K, F.K_PAD, T.G_PAD, F.REDUCTION == "mean")
