"""Accuracy in plain torch ops, by counting: a row is right at k iff fewer than k classes stand before its label.

A class stands before the label y if its logit is greater, or equal at a lower index; NaN is the greatest value.
That makes ties exact and serves every k at once, without a sort. For k = 1 alone not even a count is needed: the
label's logit must be the row's maximum, and no equal one may stand before it. Both use the maxima of runs of 64
classes, which cost hardly more than the row's maximum itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import compute_dtype
from .chunks import Chunk, Scratch, chunks

__all__ = ["TargetRanks", "accuracy", "reduce_accuracy"]

_RUN = 64  # classes whose maximum is kept, to find a tie without a second look at the row


def accuracy(
    logits: Tensor, target: Tensor, topk: tuple[int, ...], ignore_index: int, reduction: str
) -> tuple[Tensor, ...]:
    """See :class:`fastloss.contract.Backend`."""
    outer, classes, inner = logits.shape
    target = target.view(outer, 1, inner).long()
    counted = target != ignore_index
    label, invalid = inside_label(target, counted, classes)
    ranks = TargetRanks(logits, label, topk)
    if topk == (1,) and logits.dtype == ranks.dtype:
        ranks.visit(Chunk(slice(0, outer), slice(0, inner)), logits)  # run maxima are the only temporaries
    else:
        for chunk in chunks(logits.shape, logits.dtype):
            ranks.visit(chunk, chunk.of(logits))
    return reduce_accuracy(ranks.right, counted, invalid, reduction)


def inside_label(target: Tensor, counted: Tensor, classes: int) -> tuple[Tensor, Tensor | None]:
    """A label that can be used as an index in every row, and the counted rows whose own could not.

    The layers above have refused such labels on a CPU; elsewhere a look at them would make the host wait, so those
    rows become NaN instead.
    """
    if target.device.type == "cpu":
        return target * counted, None
    inside = (target >= 0) & (target < classes)
    return target * (counted & inside), counted & ~inside


def reduce_accuracy(
    right: tuple[Tensor, ...], counted: Tensor, invalid: Tensor | None, reduction: str
) -> tuple[Tensor, ...]:
    """The rows' rightness as the caller asked for it: a share, a number, or a value a row; float32."""
    result = []
    for rows in right:
        value = (rows & counted).to(torch.float32)
        if invalid is not None:
            value = value.masked_fill(invalid, float("nan"))
        if reduction == "none":
            result.append(value.flatten())
        else:
            number = value.sum(dtype=torch.float64)
            result.append((number / counted.sum() if reduction == "mean" else number).to(torch.float32))
    return tuple(result)


class TargetRanks:
    """Visits chunks of logits in any order and keeps, for each k, which rows are right.

    ``label`` is ``(outer, 1, inner)``, int64, in [0, classes). ``right`` holds one bool tensor of that shape a k.
    """

    def __init__(self, logits: Tensor, label: Tensor, topk: tuple[int, ...]) -> None:
        self.topk = topk
        self.label = label
        self.right = tuple(torch.empty_like(label, dtype=torch.bool) for _ in topk)
        self.dtype = compute_dtype(logits.dtype)
        self._wide = Scratch(self.dtype, logits.device)  # half-precision logits, widened
        # A count is a sum of ones: exact in float32 below 2²⁴ classes.
        self._count = Scratch(torch.float32 if logits.shape[1] < 1 << 24 else torch.float64, logits.device)
        self._mostly_right = False

    def visit(self, chunk: Chunk, logits: Tensor, widened: Tensor | None = None) -> None:
        """Judge one chunk. ``widened`` is the chunk in the dtype of the arithmetic, where the caller has it."""
        label = chunk.of_rows(self.label)
        if self.topk == (1,):
            chunk.of_rows(self.right[0]).copy_(self._right_at_1(logits, label, widened))
            return
        rank = self._rank(logits, label)
        for k, right in zip(self.topk, self.right, strict=True):
            chunk.of_rows(right).copy_(rank < k)

    def _right_at_1(self, logits: Tensor, label: Tensor, widened: Tensor | None) -> Tensor:
        if widened is None and logits.dtype == self.dtype:
            widened = logits
        if widened is None and not self._mostly_right:
            # Widening costs more than the maximum. Where few rows are right the maximum alone settles most.
            maximum = logits.amax(1, keepdim=True)
            right = _same(logits.gather(1, label), maximum)
            self._mostly_right = _share(right) > 0.25
            if _share(right) > 0:
                right = right & self._right_at_1(logits, label, self._wide.like(logits).copy_(logits))
            return right
        if widened is None:
            widened = self._wide.like(logits).copy_(logits)
        right = _is_first_maximum(widened, label)
        self._mostly_right = _share(right) > 0.25
        return right

    def _rank(self, logits: Tensor, label: Tensor) -> Tensor:
        """How many classes stand before the label: exact where that is below the largest k, else at least that."""
        classes = logits.shape[1]
        mine = logits.gather(1, label)
        ones = self._count.like(logits)
        # "Not less or equal" is "greater or NaN".
        before = classes - torch.le(logits, mine, out=ones).sum(1, keepdim=True)
        before.masked_fill_(mine.isnan(), 0)
        open_rows = before < max(self.topk)
        if not _share(open_rows):
            return before
        equal = torch.eq(logits, mine, out=ones).sum(1, keepdim=True)
        tied = open_rows & (equal != 1)  # 0 for a NaN
        if _share(tied):
            o, _, i = tied.nonzero(as_tuple=True)
            row, row_mine, row_label = logits[o, :, i], mine[o, :, i], label[o, :, i]
            earlier = torch.arange(classes, device=logits.device) < row_label
            before[o, :, i] += (_same(row, row_mine) & earlier).sum(1, keepdim=True).to(before.dtype)
        return before


def _is_first_maximum(logits: Tensor, label: Tensor) -> Tensor:
    """Is the label's logit the row's greatest, and no equal one before it? ``(outer, 1, inner)``."""
    classes = logits.shape[1]
    run = min(_RUN, classes)
    whole = classes // run * run
    maxima = logits[:, :whole].unflatten(1, (-1, run)).amax(2)
    if whole < classes:
        maxima = torch.cat([maxima, logits[:, whole:].amax(1, keepdim=True)], dim=1)
    maximum = maxima.amax(1, keepdim=True)
    right = _same(logits.gather(1, label), maximum)
    if not _share(right):
        return right
    o, _, i = right.nonzero(as_tuple=True)
    row_label, row_maximum = label[o, :, i], maximum[o, :, i]  # (candidates, 1)
    # A tie in an earlier run, or earlier in the label's own run (the last `run` classes, for a label near the end).
    runs = torch.arange(maxima.shape[1], device=logits.device)
    tie = (_same(maxima[o, :, i], row_maximum) & (runs < row_label // run)).any(1)
    start = (row_label // run * run).clamp_(max=classes - run)
    near = logits.unfold(1, run, 1)[o, start[:, 0], i]  # (candidates, run)
    position = start + torch.arange(run, device=logits.device)
    tie |= (_same(near, row_maximum) & (position < row_label)).any(1)
    right[o, :, i] = ~tie[:, None]
    return right


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Equal, or both NaN."""
    equal = a == b
    return equal | (a.isnan() & b.isnan()) if _share(b.isnan()) else equal


def _share(rows: Tensor) -> float:
    """The share of true rows. Off the CPU, where a look would make the host wait: 1, "possibly all"."""
    if rows.device.type != "cpu":
        return 1.0
    return int(rows.count_nonzero()) / max(rows.numel(), 1)
