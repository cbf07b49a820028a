"""Accuracy in plain torch ops, by counting: a row is right at k iff fewer than k classes stand before its label.

A class stands before the label y if its logit is greater, or equal at a lower index; NaN is the greatest value.
That makes ties exact and serves every k at once, without a sort. For k = 1 alone not even a count is needed: the
label's logit must beat the greatest of the others, and only where it equals that is the row counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import ExternalLabel, compute_dtype
from .chunks import Chunk, Scratch, chunks, row_dtype
from .workers import for_each

__all__ = ["TargetRanks", "accuracy", "label_ranks", "rank_of", "reduce_accuracy", "run_maxima"]

_PIECE = 1 << 20  # logits that are copied at once where single rows are compared
_SAMPLE_ROWS = 16
_FEW_RIGHT = 0.05  # argmax takes 5 (float32) to 20 (bfloat16) times as long as amax


def accuracy(
    logits: Tensor, target: Tensor, topk: tuple[int, ...], ignore_index: int, reduction: str
) -> tuple[Tensor, ...]:
    """See :class:`fastloss.backends.contract.Backend`."""
    outer, classes, inner = logits.shape
    label = target.view(outer, 1, inner).long()
    counted = invalid = None
    ignored = label == ignore_index
    if _true_share(ignored):
        counted = ~ignored
        label, invalid = inside_label(label, counted, classes)
    if topk == (1,):
        return reduce_accuracy((_top_1(logits, label, counted),), counted, invalid, reduction)
    ranks = TargetRanks(label, topk)
    for_each(chunks(logits.shape, logits.dtype), lambda chunk: ranks.visit(chunk, chunk.of(logits)), logits.device)
    return reduce_accuracy(ranks.right, counted, invalid, reduction)


def label_ranks(logits: Tensor, label: ExternalLabel) -> Tensor:
    """See :class:`fastloss.backends.contract.Backend`."""
    rows = (logits.shape[0], 1, logits.shape[2])
    label_logit, position = label.logit.to(logits.dtype).view(rows), label.position.view(rows)
    rank = torch.empty_like(position)

    def visit(chunk: Chunk) -> None:
        chunk.of(rank).copy_(rank_of(chunk.of(logits), chunk.of(label_logit), chunk.of(position), label.most_k))

    for_each(chunks(logits.shape, logits.dtype), visit, logits.device)
    return rank.flatten()


def _top_1(logits: Tensor, label: Tensor, counted: Tensor | None) -> Tensor:
    """Return whether no logit is greater than the label's, and no equal one before it; ``(outer, 1, inner)``.

    Where few rows are right, the row's maximum decides all but those few. Where many are, the greatest of the *other*
    classes decides all but ties. A sample of rows tells which it will be; rows that are not counted may be anything.
    """
    outer, _, inner = logits.shape
    o_step = max(1, outer // _SAMPLE_ROWS)
    i_step = max(1, inner * min(outer, _SAMPLE_ROWS) // _SAMPLE_ROWS)
    x, y = logits[::o_step, :, ::i_step], label[::o_step, :, ::i_step]
    hits = x.gather(1, y) >= x.amax(1, keepdim=True)
    if counted is not None:
        hits &= counted[::o_step, :, ::i_step]
    if not hits.is_cpu or _true_share(hits) <= _FEW_RIGHT:
        best = logits.amax(1, keepdim=True)
        right = ~(logits.gather(1, label) < best)  # or a NaN in the row
        if counted is not None:
            right &= counted
        if not right.is_cpu or _true_share(right) <= 2 * _FEW_RIGHT:
            _settle_(right, logits, label)
            return right
    if logits.dtype == compute_dtype(logits.dtype):
        return is_right_at_1(logits, label)
    return _beats_others(logits, label, logits.gather(1, label))


def _beats_others(logits: Tensor, label: Tensor, label_logit: Tensor) -> Tensor:
    """Return whether the label's logit is greater than all others, or equal to some of greater index."""
    dtype = compute_dtype(logits.dtype)
    best = torch.empty_like(label_logit, dtype=dtype)

    def visit(chunk: Chunk) -> None:
        x = chunk.of(logits)
        wide = Scratch("rank", dtype, x.device).like(x).copy_(x)
        torch.amax(wide.scatter_(1, chunk.of(label), -torch.inf), 1, keepdim=True, out=chunk.of(best))

    for_each(chunks(logits.shape, logits.dtype), visit, logits.device)
    right = label_logit > best
    _settle_(right, logits, label, ~(label_logit < best) & ~right)
    return right


def _settle_(right: Tensor, logits: Tensor, label: Tensor, unsettled: Tensor | None = None) -> None:
    """Decide the few rows of ``unsettled`` (if None, of ``right``) by the class of their first maximum, or NaN."""
    o, _, i = (right if unsettled is None else unsettled).nonzero(as_tuple=True)
    step = max(1, _PIECE // logits.shape[1])
    for start in range(0, len(o), step):
        some_o, some_i = o[start : start + step], i[start : start + step]
        first = logits[some_o, :, some_i].argmax(1, keepdim=True)
        right[some_o, :, some_i] = first == label[some_o, :, some_i]


def inside_label(target: Tensor, counted: Tensor, classes: int) -> tuple[Tensor, Tensor | None]:
    """Return labels that can be used as an index in every row, and the counted rows whose label could not.

    The layers above have refused such labels on a CPU. Elsewhere reading them would make the host wait, and those
    rows become NaN instead.
    """
    if target.device.type == "cpu":
        return target * counted, None
    inside = (target >= 0) & (target < classes)
    return target * (counted & inside), counted & ~inside


def reduce_accuracy(
    right: tuple[Tensor, ...], counted: Tensor | None, invalid: Tensor | None, reduction: str
) -> tuple[Tensor, ...]:
    """Reduce which rows are right to a share, a number, or a value per row; float32.

    ``counted`` is None where every row counts.
    """
    result = []
    for rows in right:
        if counted is not None:
            rows = rows & counted
        value = rows.flatten()
        if reduction != "none":
            value = rows.sum()
            if reduction == "mean":
                value = value.to(row_dtype(rows.device)) / (rows.numel() if counted is None else counted.sum())
        value = value.to(torch.float32)
        if invalid is not None:
            value = value.masked_fill(invalid.flatten() if reduction == "none" else invalid.any(), float("nan"))
        result.append(value)
    return tuple(result)


class TargetRanks:
    """Visits chunks of logits in any order and stores, for each k, which rows are right.

    ``label`` is ``(outer, 1, inner)``, int64, in [0, classes). ``right`` holds a bool tensor of that shape per k.
    """

    def __init__(self, label: Tensor, topk: tuple[int, ...]) -> None:
        self.topk = topk
        self.label = label
        self.right = tuple(torch.empty_like(label, dtype=torch.bool) for _ in topk)

    def visit(self, chunk: Chunk, logits: Tensor) -> None:
        """Visit one chunk, in the dtype of the arithmetic if only k = 1 is asked for."""
        label = chunk.of(self.label)
        if self.topk == (1,):
            chunk.of(self.right[0]).copy_(is_right_at_1(logits, label))
            return
        rank = rank_of(logits, logits.gather(1, label), label, max(self.topk))
        for k, right in zip(self.topk, self.right, strict=True):
            chunk.of(right).copy_(rank < k)


def rank_of(logits: Tensor, label_logit: Tensor, position: Tensor, most_k: int) -> Tensor:
    """Return how many classes stand before a label: exact where that is below ``most_k``, else at least that.

    ``position``, in [0, classes], is the number of classes with a lower index than the label. The label is one of the
    classes unless that is 0 or ``classes``. All three tensors are ``(outer, classes or 1, inner)``.
    """
    classes = logits.shape[1]
    # A count is a sum of ones: exact in float32 below 2²⁴ classes.
    ones = Scratch("ones", torch.float32 if classes < 1 << 24 else torch.float64, logits.device).like(logits)
    # "Not less or equal" is "greater or NaN".
    before = classes - torch.le(logits, label_logit, out=ones).sum(1, keepdim=True)
    label_nan = label_logit.isnan()
    before.masked_fill_(label_nan, 0)
    open_rows = (before < most_k) & (position > 0)
    if not _true_share(open_rows):
        return before
    equal = torch.eq(logits, label_logit, out=ones).sum(
        1, keepdim=True
    )  # 0 for a NaN, which is counted below in any case
    tied = open_rows & ((equal != (position < classes)) | label_nan)
    if _true_share(tied):
        o, _, i = tied.nonzero(as_tuple=True)
        before[o, :, i] = _before(logits, position, label_logit, o, i).to(before.dtype)
    return before


def is_right_at_1(logits: Tensor, label: Tensor) -> Tensor:
    """Return whether no logit is greater than the label's, and no equal one before it; ``(outer, 1, inner)``.

    The maxima of runs of classes cost as much as the row's maximum alone. They tell which rows can be right, and for
    those only the label's own run is read again, to see that nothing else in the row is as great.
    """
    classes = logits.shape[1]
    run = _run_length(classes)
    maxima = run_maxima(logits, run)
    label_logit = logits.gather(1, label)
    right = ~(label_logit < maxima.amax(1, keepdim=True))  # or a NaN in the row
    if not _true_share(right):
        return right
    # From here on one row is one line: (candidates, …).
    o, _, i = right.nonzero(as_tuple=True)
    row_label, row_logit = label[o, :, i], label_logit[o, :, i]
    others = maxima[o, :, i].scatter_(1, row_label // run, -torch.inf).amax(1, keepdim=True)
    if classes % run == 0 and logits.is_contiguous() and logits.shape[2] == 1:
        start = row_label // run * run  # the runs are rows of a matrix, and whole rows are fast to copy
        near = logits.view(-1, run).index_select(0, o * (classes // run) + row_label.squeeze(1) // run)
    else:
        start = (row_label // run * run).clamp_(max=classes - run)
        near = logits.unfold(1, run, 1)[o, start.squeeze(1), i]
    near.scatter_(1, row_label - start, -torch.inf)
    tied = torch.zeros_like(right)
    tied[o, :, i] = ~(torch.maximum(others, near.amax(1, keepdim=True)) < row_logit)  # or NaN
    _settle_(right, logits, label, tied)
    return right


def run_maxima(x: Tensor, run: int) -> Tensor:
    """Return the maxima of runs of ``run`` classes; the last one may be shorter. ``(outer, runs, inner)``."""
    classes = x.shape[1]
    whole = classes // run * run
    maxima = x.narrow(1, 0, whole).unflatten(1, (-1, run)).amax(2)
    if whole == classes:
        return maxima
    return torch.cat([maxima, x.narrow(1, whole, classes - whole).amax(1, keepdim=True)], dim=1)


def _run_length(classes: int) -> int:
    """Return the length of a run: 64 to 256, a divisor of ``classes`` where possible, and a multiple of vectors."""
    if classes <= 64:
        return classes
    return next((run for run in range(64, 257, 4) if classes % run == 0), 64)


def _before(logits: Tensor, label: Tensor, label_logit: Tensor, o: Tensor, i: Tensor) -> Tensor:
    """Return how many classes stand before the label in the rows (o, i); ``(len(o), 1)``."""
    row, row_label, row_logit = logits[o, :, i], label[o, :, i], label_logit[o, :, i]
    earlier = torch.arange(logits.shape[1], device=logits.device) < row_label
    nan, label_nan = row.isnan(), row_logit.isnan()
    greater = ~label_nan & (nan | (row > row_logit))
    return (greater | (earlier & ((row == row_logit) | (nan & label_nan)))).sum(1, keepdim=True)


def _true_share(rows: Tensor) -> float:
    """Return the share of true rows; 1 ("possibly all") off the CPU, where the host would have to wait."""
    if rows.device.type != "cpu":
        return 1.0
    return int(rows.count_nonzero()) / max(rows.numel(), 1)
