r"""The loss and the accuracy where ranks of process groups share the rows or the classes.

*The classes are shared.* Each rank visits its own logits and sends the others a few float64 numbers per row: lse over
its classes, the label's logit if it has that class, and as needed Σ_c w_c z_c and how many of its classes stand
before the label. One collective gathers them. From then on every rank knows the numbers over all classes,

    lse = log Σ_ranks exp(lse_rank),     z_y, Σ_c w_c z_c, rank: sums over the ranks

and computes the same loss from them, in ordinary operations (``row_numbers.py``). The statistics are some more
numbers in the same collective; with the ranks' shares π = exp(lse_rank − lse) of all probabilities,

    H = Σ_ranks π (H_rank − log π),   log Σ p² = log Σ_ranks π² Σ p_rank²,   Σ_c z_c: a sum over the ranks

and the prediction is that of the first rank whose greatest logit is the greatest. Ranks count against the label's
logit, which must be known before the visit: where an accuracy is wanted, a collective of one number per row goes
first.

In backward each rank computes the upstream gradients of those numbers, which are the same on all ranks, and one more
visit makes the gradient of its own logits from them: it needs lse over all classes, which is known, and no
collective. A second derivative would need one, and is refused.

*The rows are shared.* Each rank has a part of the sum. The divisor is summed over the ranks first, so that the visit
that gives the loss writes the gradient at its final scale, as on one device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from .. import checks
from ..backends import choice
from ..backends.contract import (
    Backend,
    ExternalLabel,
    LossInputs,
    LossOptions,
    RowStatistics,
    RowUpstreams,
    SoftRowStatistics,
    WantedGradients,
    WantedNumbers,
    WantedParts,
    compute_dtype,
)
from ..backends.torch_private import disable_dynamo
from ..backends.view import as_labels, as_rows, class_dim, in_memory, row_shape, wide_labels
from ..ranks import collectives, placements
from ..ranks.collectives import Layout, all_reduce, all_reduce_detached, gather, group_property
from . import composite
from .autograd import fused_cross_entropy, is_differentiable
from .row_numbers import label_losses, label_z_losses, soft_losses, total_weight

__all__ = [
    "Numbers",
    "RowReduction",
    "ShardedLoss",
    "StatisticsShard",
    "accuracies_over_ranks",
    "check_labels_together",
    "checked",
    "group_property",
    "loss_over_ranks",
    "numbers_over_ranks",
    "refuse",
    "right_rows",
    "sharded_loss",
    "statistics_over_ranks",
]


_Checked = TypeVar("_Checked")

# Numbers of rows, (rows,) each; None where an option does not need them.
Numbers = tuple[Tensor | None, ...]


@disable_dynamo
def loss_over_ranks(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, group: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss and the accuracies, ``()`` or of the labels' shape; the same on all ranks that share the rows.

    Args:
        input: this rank's logits, ``(C_r,)`` or ``(n, C_r, …)``; or a DTensor.
        target: its rows' labels among all classes; or class probabilities of ``input``'s shape.
        weight: of all classes, ``(C,)``.
        options: checked already.
        group: the group whose ranks share the classes; None beside a DTensor.
    """
    part = _part_of_rank(input, target, weight, options, group, only_accuracy=False)
    dtype = checks.loss_dtype(input, target, weight)
    reduction = RowReduction(part.input, part.labels, part.weight, options, part.layout)
    backend = choice.load(choice.choose(part.input))
    of_part = _of_whole_rows if part.layout.class_group is None else _of_shared_classes
    loss, right = of_part(part, reduction, backend)
    loss, values = reduction.finished(loss, right, dtype, row_shape(part.input))
    return part.placed(loss), tuple(part.placed(value) for value in values)


@disable_dynamo
@torch.no_grad()
def accuracies_over_ranks(input: Tensor, target: Tensor, options: LossOptions, group: Any) -> tuple[Tensor, ...]:
    """Return the accuracy for each k, as :func:`loss_over_ranks` does. ``target`` may have one value per class."""
    part = _part_of_rank(input, target, None, options, group, only_accuracy=True)
    reduction = RowReduction(part.input, part.labels, None, options, part.layout)
    backend = choice.load(choice.choose(part.input))
    if part.layout.class_group is None:
        right = _right_in_whole_rows(part, options, backend)
    else:
        label = _external_label(part.input, part.target, part.labels, options, part.layout)
        rank = backend.label_ranks(as_rows(part.input), label) if part.input.numel() else label.position * 0
        rank = all_reduce_detached(rank, (part.layout.class_group,))
        right = right_rows(rank, part.labels, options, part.layout.classes)
    return tuple(part.placed(value) for value in reduction.accuracies(right, row_shape(part.input)))


@disable_dynamo
def statistics_over_ranks(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    wanted: WantedParts,
    group: Any,
    of_whole_rows: Callable[..., dict[str, Any]],
) -> dict[str, Tensor]:
    """Return the loss and the parts that are wanted by their names, as :func:`loss_over_ranks` returns the loss.

    Args:
        input, target, weight, options, group: as there.
        wanted: the parts.
        of_whole_rows: returns the parts, without a reduction and with losses in float64, of labels of rows that this
            process has all classes of: (input, target, weight, options, wanted) → their names and values, or None.
    """
    part = _part_of_rank(input, target, weight, options, group, only_accuracy=False, parts=wanted)
    reduction = RowReduction(part.input, part.labels, part.weight, options, part.layout)
    of_target = _statistics_of_probabilities if part.labels is None else _statistics_of_labels
    losses, rows = of_target(part, reduction, wanted, of_whole_rows)
    shape, dtype = row_shape(part.input), compute_dtype(part.input.dtype)
    found = dict(zip(losses, reduction.whole(list(losses.values()), shape), strict=True))
    of_loss = checks.parts_dtype(checks.loss_dtype(input, target, weight), options.reduction)
    found = {name: value.to(of_loss) for name, value in found.items()}
    for name, values in rows.items():
        found[name] = (values.to(dtype) if values.is_floating_point() else values).view(shape)
    return {name: part.placed(value) for name, value in found.items()}


class _Part(NamedTuple):
    """This rank's part of a call."""

    input: Tensor
    target: Tensor
    labels: Tensor | None  # (rows,); None where the target has one value per class
    weight: Tensor | None  # of all classes
    options: LossOptions
    layout: Layout
    plan: placements.Plan | None  # of DTensors

    def placed(self, result: Tensor) -> Tensor:
        """Return a result as a DTensor, if the input was one."""
        return result if self.plan is None else self.plan.placed(result)


def _part_of_rank(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    group: Any,
    *,
    only_accuracy: bool,
    parts: WantedParts | None = None,
) -> _Part:
    """Check the arguments, together with the other ranks, and return this rank's part of them.

    ``parts``: what else must be equal on the ranks of a group, beside the options.
    """
    if placements.is_dtensor(input):
        checks.check_no_gradient(weight)
        if group is not None:
            raise ValueError("fastloss: group is given beside a DTensor, whose mesh says which ranks have what")
        checks.check_logits(input)
        dense = _check_target(input, target, weight, options, only_accuracy)
        plan = placements.plan(input, target, dense)
        x, t, layout = placements.local(input), plan.target, plan.layout
        if not dense and choice.may_look(x):
            check_labels_together(t, layout, options.ignore_index)
        return _Part(
            x, t, None if dense else as_labels(wide_labels(t)), placements.whole(weight), options, layout, plan
        )
    group = collectives.checked_group(group)
    try:
        input, target = collectives.waited(input), collectives.waited(target)
        checks.check_no_gradient(weight)
        checks.check_logits(input)
        checks.check_strided(input=input, target=target)
        # The weight is of all classes, whose number is known only when the ranks have exchanged theirs.
        dense = _check_target(input, target, None, options, only_accuracy)
        if not dense:
            checks.check_weight_dtype(input, weight)
    except Exception:
        refuse(group, input)
        raise
    shape, look = row_shape(input), choice.may_look(input)
    layout = collectives.agreed_layout(
        group,
        input.shape[class_dim(input)],
        math.prod(shape),
        device=input.device,
        same=(options, shape, input.dtype, dense, only_accuracy, getattr(weight, "shape", None), parts),
        labels=None if dense else target,
        look=look,
    )
    if look:
        checks.check_weight(input.new_empty(()).expand(int(layout.classes)), weight)
        if not dense:
            checks.check_labels(target, int(layout.classes), options.ignore_index)
    return _Part(input, target, None if dense else as_labels(wide_labels(target)), weight, options, layout, None)


def checked(group: Any, input: object, check: Callable[..., _Checked], *arguments: Any, **options: Any) -> _Checked:
    """Return ``check(…)`` of a call's arguments. Where it raises, the other ranks of ``group`` do too, on a CPU."""
    try:
        return check(*arguments, **options)
    except Exception:
        refuse(group, input)
        raise


def refuse(group: Any, input: object) -> None:
    """Let the other ranks of a call with ``group=`` know, on a CPU, that this one refuses its arguments."""
    if group is None:
        return
    if not isinstance(input, Tensor):
        collectives.refuse_together(group, torch.device("cpu"))
    elif choice.may_look(input):
        collectives.refuse_together(group, input.device)


def _check_target(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, only_accuracy: bool
) -> bool:
    """Check what one rank can check alone. Return True if the target has one value per class."""
    if only_accuracy and checks.is_dense(input, target):
        checks.check_dense_target(input, target, whole=placements.is_dtensor(input))
        return True
    if not only_accuracy and isinstance(target, Tensor) and checks.is_soft(input, target):
        checks.check_soft_target(input, target, weight, options.ignore_index)
        return True
    checks.check_index_target(input, target, weight)
    return False


def check_labels_together(target: Tensor, layout: Layout, ignore_index: int, *, shift: int = 0) -> None:
    """Check the labels of rows that several ranks share; a bad label on one rank is an error on all."""
    error = None
    try:
        checks.check_labels(target, int(layout.classes), ignore_index, shift=shift)
    except IndexError as raised:
        error = raised
    collectives.raise_together(error, layout.row_groups, target.device)


class RowReduction:
    """Makes the result over all rows from a rank's part of them."""

    def __init__(
        self, input: Tensor, labels: Tensor | None, weight: Tensor | None, options: LossOptions, layout: Layout
    ) -> None:
        self.options, self.layout = options, layout
        # The divisors of the mean of the loss and of the accuracy.
        self.divisor = self.counts = torch.full((), layout.rows, dtype=torch.float64, device=input.device)
        if labels is not None:
            counts = (labels != options.ignore_index).sum(dtype=torch.float64)
            total = counts if weight is None else total_weight(labels, weight, options)
            totals = torch.stack([total, counts])
            if options.is_reduced:
                totals = all_reduce_detached(totals, layout.row_groups)
            self.divisor, self.counts = totals.unbind(0)

    def part(self, values: Tensor) -> Tensor:
        """Return this rank's part of a reduced loss from its rows' values; or, for "none", the values."""
        if not self.options.is_reduced:
            return values
        total = values.sum()
        return total / self.divisor if self.options.reduction == "mean" else total

    def finished(
        self, loss: Tensor, right: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss and the accuracies over all rows from this rank's parts, by one all-reduce.

        Args:
            loss: :meth:`part` of it.
            right: :func:`right_rows`, or None where no accuracy is wanted.
            dtype: of the loss.
            shape: of the labels.
        """
        if not self.options.is_reduced:
            return loss.to(dtype).view(shape), () if right is None else self.accuracies(right, shape)
        parts = loss.double().reshape(1)
        whole = all_reduce(parts if right is None else torch.cat([parts, right]), self.layout.row_groups)
        return whole[0].to(dtype), self._shares(whole[1:].detach())

    def whole(self, parts: list[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
        """Return several reduced losses over all rows from this rank's parts of them; or, for "none", the values."""
        if not self.options.is_reduced:
            return [values.view(shape) for values in parts]
        return list(all_reduce(torch.stack(parts).double(), self.layout.row_groups).unbind(0))

    def accuracies(self, right: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Return the accuracies over all rows from this rank's right rows."""
        if not self.options.is_reduced:
            return tuple(value.to(torch.float32).view(shape) for value in right.unbind(0))
        return self._shares(all_reduce(right, self.layout.row_groups))

    def _shares(self, right: Tensor) -> tuple[Tensor, ...]:
        shares = right / self.counts if self.options.reduction == "mean" else right
        return tuple(shares.to(torch.float32).unbind(0))


def right_rows(rank: Tensor, labels: Tensor | None, options: LossOptions, classes: int | Tensor) -> Tensor:
    """Return for each k which rows are right, ``(k, rows)``, or how many, ``(k,)``; in float64.

    Args:
        rank: how many classes stand before each row's label.
        labels: the labels among all classes; None where every row counts.
        options: the ks, the ignored label and the reduction.
        classes: C.
    """
    right = torch.stack([rank < k for k in options.topk])
    if labels is not None:
        counted = labels != options.ignore_index
        right = (right & counted).double()
        if not labels.is_cpu:
            right = right.masked_fill(counted & ((labels < 0) | (labels >= classes)), float("nan"))
    right = right.double()
    return right.sum(1) if options.is_reduced else right


# --------------------------------------------------------------------------------------- ranks that have all classes


def _of_whole_rows(part: _Part, reduction: RowReduction, backend: Backend) -> tuple[Tensor, Tensor | None]:
    """Return this rank's part of the loss and its right rows: as on one device, at the scale of all rows."""
    input, target, labels, weight, options, layout, _ = part
    divisor: Tensor | float | None = None
    if options.reduction == "mean":
        divisor = float(layout.rows) if labels is None else reduction.divisor
    own = dataclasses.replace(options, reduction="sum" if options.is_reduced else "none", topk=())
    trained_weight = labels is None and weight is not None and weight.requires_grad
    if input.numel() and (labels is None or options.from_logits) and not trained_weight:
        loss, values = fused_cross_entropy(
            input,
            target if labels is None else labels,
            None if weight is None else weight.contiguous(),
            own if labels is None else dataclasses.replace(own, topk=options.topk),
            backend,
            torch.float64,
            False,
            divisor,
        )
    else:
        rows = target if labels is None else target.view(row_shape(input))
        loss, values = composite.cross_entropy(input, rows, weight, own, torch.float64), ()
        loss = loss if divisor is None else loss / divisor
    if values:
        return loss, torch.stack(values).double()
    return loss, _right_in_whole_rows(part, options, backend) if options.topk else None


def _right_in_whole_rows(part: _Part, options: LossOptions, backend: Backend) -> Tensor:
    """Return :func:`right_rows` of a rank that has all classes."""
    input, labels, ignore_index = part.input.detach(), part.labels, options.ignore_index
    if labels is None:  # argmax gives no label to ignore
        labels, ignore_index = composite.labels_of(part.target).reshape(-1), -1
    reduction = "sum" if options.is_reduced else "none"
    if not input.numel():
        shape = (len(options.topk),) if options.is_reduced else (len(options.topk), labels.numel())
        return torch.zeros(shape, dtype=torch.float64, device=input.device)
    return torch.stack(backend.accuracy(as_rows(input), labels, options.topk, ignore_index, reduction)).double()


# -------------------------------------------------------------------------------------- ranks that share the classes


def _of_shared_classes(part: _Part, reduction: RowReduction, backend: Backend) -> tuple[Tensor, Tensor | None]:
    """Return this rank's part of the loss (its rows, all classes) and its right rows."""
    input, target, labels, weight, options, layout, _ = part
    shard = sharded_loss(input, target, weight, options, layout, backend, ranked=bool(options.topk))
    if options.from_logits:
        *numbers, rank = _Numbers.apply(input, target, shard)
        values = shard.values(tuple(numbers))
    else:
        rank = None
        if shard.label is not None:
            rank = shard.label.position * 0
            if input.numel():
                rank = backend.label_ranks(as_rows(input.detach()), shard.label)
            rank = all_reduce_detached(rank, (layout.class_group,))
        values = all_reduce(shard.values_of_probabilities(input, target), (layout.class_group,))
    right = None if rank is None else right_rows(rank, labels, options, layout.classes)
    return reduction.part(values), right


def _statistics_of_labels(
    part: _Part, reduction: RowReduction, wanted: WantedParts, of_whole_rows: Callable[..., dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return this rank's parts of the losses, and the numbers of its rows, by their names. One visit."""
    input, target, labels, weight, options, layout, _ = part
    assert labels is not None
    if layout.class_group is None:
        own = dataclasses.replace(options, reduction="none")
        rows = of_whole_rows(input, target.view(row_shape(input)), weight, own, wanted)
    else:
        shard = _statistics_shard(input, labels, weight, options, layout, wanted)
        numbers = _Numbers.apply(input, target, shard)
        rows = {"loss": shard.values(numbers), **shard.parts(numbers)}
        if wanted.z_loss:
            rows["z_loss"] = label_z_losses(numbers[0], labels, weight, options, layout.classes)
    rows = {name: values.flatten() for name, values in rows.items() if values is not None}
    losses = {name: reduction.part(values) for name, values in rows.items() if name in ("loss", "z_loss")}
    return losses, {name: values for name, values in rows.items() if name not in losses}


def _statistics_of_probabilities(
    part: _Part, reduction: RowReduction, wanted: WantedParts, of_whole_rows: Callable[..., dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what :func:`_statistics_of_labels` does, by a visit to logits and target, and one to the logits alone.

    Over shared classes the second visit, and its collective, are left out where nothing but lse and the z-loss is
    wanted; the labels that the target stands for take a small collective of their own.
    """
    input, target, _, weight, options, layout, _ = part
    backend, shared = choice.load(choice.choose(input)), layout.class_group is not None
    # Labels of rows of which none is ignored; the loss of these labels is not used.
    labels = torch.zeros(row_shape(input), dtype=torch.int64, device=input.device)
    plain: dict[str, Any] = {"label_smoothing": 0.0, "lse_square_scale": 0.0, "topk": ()}
    of_rows = dataclasses.replace(options, ignore_index=-1, reduction="none", **plain)
    argmax = wanted.predicted or wanted.correct
    more = wanted._replace(z_loss=False, predicted=argmax, correct=False)
    if shared:
        shard = sharded_loss(input, target, weight, options, layout, backend, ranked=False)
        *numbers, _ = _Numbers.apply(input, target, shard)
        lse, _, mass, _ = numbers
        loss, rows = reduction.part(shard.values(tuple(numbers))), {}
        more = more._replace(lse=False)
        if any(more):
            of_labels = _statistics_shard(input, labels.flatten(), None, of_rows, layout, more)
            rows = of_labels.parts(_Numbers.apply(input, target, of_labels))
        rows["lse"] = lse
    else:
        loss, _ = _of_whole_rows(part, reduction, backend)
        rows = of_whole_rows(input, labels, None, of_rows, more._replace(lse=wanted.lse or wanted.z_loss))
        rows = {name: values.flatten() for name, values in rows.items() if values is not None}
    losses = {"loss": loss}
    if wanted.z_loss:
        if not shared:
            mass = as_rows(target).double() if weight is None else as_rows(target).double() * weight.view(1, -1, 1)
            mass = mass.sum(1).flatten()
        losses["z_loss"] = reduction.part(options.lse_square_scale * mass * rows["lse"].double().square())
    if wanted.correct:
        of_target = _label_of_all(target, layout)[1].long() if shared else composite.labels_of(target).flatten()
        rows["correct"] = rows["predicted"] == of_target
    return losses, {name: values for name, values in rows.items() if name != "loss" and getattr(wanted, name)}


def _statistics_shard(
    input: Tensor, labels: Tensor, weight: Tensor | None, options: LossOptions, layout: Layout, wanted: WantedParts
) -> StatisticsShard:
    backend = choice.load(choice.choose(input))
    return StatisticsShard(labels, input.shape[class_dim(input)], weight, options, layout, backend, wanted)


def _external_label(
    input: Tensor, target: Tensor, labels: Tensor | None, options: LossOptions, layout: Layout
) -> ExternalLabel:
    """Return each row's label and its score, which one rank has and sends to the others, by one collective."""
    x = as_rows(input.detach())
    outer, classes, inner = x.shape
    if labels is None:
        _, label, logit = _label_of_all(target, layout, x)
        labels = label.long()
    else:
        local, is_own = _own_labels(labels, classes, options, layout)
        logit = x.new_zeros(len(labels), dtype=torch.float64)
        if classes:
            index = torch.where(is_own, local, 0).view(outer, 1, inner)
            logit = torch.where(is_own, x.gather(1, index).flatten().double(), 0.0)
        logit = all_reduce_detached(logit, (layout.class_group,))
    position = (labels - layout.start).clamp(0, classes)
    return ExternalLabel(logit.contiguous(), position, max(options.topk))


def _label_of_all(target: Tensor, layout: Layout, *more: Tensor) -> tuple[Tensor, ...]:
    """Return the greatest value of each row over all ranks, its class, and what ``more`` have there; in float64.

    ``more`` are in the canonical view. One collective.
    """
    score = as_rows(target.detach().to(torch.uint8) if target.dtype == torch.bool else target.detach())
    outer, classes, inner = score.shape
    if classes:
        best = score.argmax(1, keepdim=True)
        own = [score.gather(1, best), best + layout.start, *(x.gather(1, best) for x in more)]
    else:
        nothing = torch.zeros((outer, 1, inner), dtype=torch.float64, device=score.device)
        own = [nothing - torch.inf, *[nothing] * (1 + len(more))]
    return _of_first_greatest(
        gather(torch.stack([number.flatten().double() for number in own]), layout.class_group)
    ).unbind(0)


def _of_first_greatest(by_rank: Tensor) -> Tensor:
    """Return the numbers, ``(count, rows)``, of the rank whose first one is the greatest; ``(ranks, count, rows)``.

    NaN is the greatest value. Of equal ones it is the rank of the lower classes.
    """
    winner = by_rank[:, 0].argmax(0).expand(1, by_rank.shape[1], -1)
    return by_rank.gather(0, winner)[0]


def _own_labels(labels: Tensor, classes: int, options: LossOptions, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the labels among this rank's classes, and which rows' labels those are.

    A label is -100 where the row is ignored, and 0 where another rank has it.
    """
    local = labels - layout.start
    counted = labels != options.ignore_index
    is_own = counted & (local >= 0) & (local < classes)
    return torch.where(counted, torch.where(is_own, local, 0), -100), is_own


def _own_weight(weight: Tensor, classes: int, layout: Layout) -> Tensor:
    """Return the weights of this rank's classes."""
    if isinstance(layout.start, int):
        return weight[layout.start : layout.start + classes].contiguous()
    index = (layout.start + torch.arange(classes, device=weight.device)).clamp_(max=len(weight) - 1)
    return weight[index]


def sharded_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    layout: Layout,
    backend: Backend,
    *,
    ranked: bool,
) -> ShardedLoss:
    """Return the loss of rows whose classes are shared. ``ranked`` asks for the labels' ranks, by a collective."""
    labels = None if target.is_floating_point() else as_labels(wide_labels(target))
    label = _external_label(input, target, labels, options, layout) if ranked else None
    classes = input.shape[class_dim(input)]
    if labels is None:
        return _SoftShard(classes, weight, options, layout, backend, label)
    return _LabelShard(labels, classes, weight, options, layout, backend, label)


class _Shard:
    """A loss over shared classes. Everything but the visits to the logits is a few numbers per row."""

    def __init__(
        self,
        classes: int,
        weight: Tensor | None,
        options: LossOptions,
        layout: Layout,
        backend: Backend,
        label: ExternalLabel | None,
    ) -> None:
        self.weight, self.options, self.layout = weight, options, layout
        self.backend, self.label = backend, label
        self.own_weight = None if weight is None else in_memory(_own_weight(weight, classes, layout))
        # The labels of a visit are this rank's, -100 where a row is ignored.
        self.of_visit = dataclasses.replace(options, ignore_index=-100)

    def inputs(self, input: Tensor, target: Tensor) -> LossInputs:
        """Return the arguments of a visit to this rank's logits; ``target`` is in the canonical view."""
        return LossInputs(as_rows(input), target, self.visit_weight(), self.of_visit)

    def visit_weight(self) -> Tensor | None:
        """Return the weights of this rank's classes, without a graph."""
        return None if self.own_weight is None else self.own_weight.detach()

    def without_classes(self, input: Tensor, sums: int) -> Numbers:
        """Return the numbers of an empty shard: lse, so many sums, Σ w z and the rank."""
        zero = torch.zeros(math.prod(row_shape(input)), dtype=torch.float64, device=input.device)
        smoothed, ranked = self.options.label_smoothing != 0, self.label is not None
        return (zero - torch.inf, *[zero] * sums, zero if smoothed else None, zero if ranked else None)

    def gathered(self, own: Sequence[Tensor | None]) -> list[Any]:
        """Return the numbers of all ranks, ``(ranks, rows)`` each, from this rank's; None where it has None."""
        stacked = torch.stack([number.double() for number in own if number is not None])
        columns = iter(gather(stacked, self.layout.class_group).unbind(1))
        return [None if number is None else next(columns) for number in own]


class _LabelShard(_Shard):
    """The loss of class indices. A row's numbers are (lse, z_y, Σ w z or None)."""

    def __init__(self, labels: Tensor, classes: int, *rest: Any) -> None:
        super().__init__(classes, *rest)
        self.labels = labels
        self.local, self.is_own = _own_labels(labels, classes, self.options, self.layout)

    def numbers(self, input: Tensor, target: Tensor) -> Numbers:
        """Return each row's numbers over all classes, and its label's rank or None. A visit and one collective."""
        own: Numbers
        if input.numel():
            rows = self.backend.row_statistics_forward(self.inputs(input, self.local), WantedNumbers(), self.label)
            own = rows.lse, torch.where(self.is_own, rows.label_logit, 0.0), rows.weighted_sum, rows.rank
        else:
            own = self.without_classes(input, 1)
        lse, *sums = self.gathered(own)
        return torch.logsumexp(lse, 0), *_summed(sums)

    def values(self, numbers: Any) -> Tensor:
        """Return the rows' losses, differentiable in the numbers."""
        lse, label_logit, weighted_sum = numbers
        rows = RowStatistics(lse, label_logit, None, weighted_sum, None)
        weight = None if self.weight is None else self.weight.detach()
        return label_losses(rows, self.labels, weight, self.options, self.layout.classes)

    def gradients(
        self, upstreams: Numbers, input: Tensor, target: Tensor, numbers: Any, needs: Any, inplace: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradient of this rank's logits, from those of the numbers. A visit, no collective."""
        if not input.numel():
            return torch.zeros_like(input), None
        of_lse, of_label, of_sum = upstreams
        of_label = None if of_label is None else torch.where(self.is_own, of_label, 0.0)
        gradient = self.backend.row_statistics_backward(
            (of_lse, of_label, None, of_sum),
            self.inputs(input, self.local),
            (numbers[0], None, None),
            inplace=inplace,
        )
        return gradient.view(input.shape), None

    def values_of_probabilities(self, input: Tensor, target: Tensor) -> Tensor:
        """Return this rank's part of the rows' −Σ_c w_c u_c log y_c, a sum over classes; differentiable."""
        eps, classes = self.options.label_smoothing, self.layout.classes
        y = as_rows(input)
        y = y.to(compute_dtype(y.dtype))
        counted = self.labels != self.options.ignore_index
        loss = torch.zeros(len(self.labels), dtype=torch.float64, device=y.device)
        if not y.shape[1]:
            return loss + input.sum() * 0
        weight = self.visit_weight()
        weight = None if weight is None else weight.to(y.dtype)
        index = torch.where(self.is_own, self.local, 0)
        p_y = torch.where(self.is_own, y.gather(1, index.view(y.shape[0], 1, y.shape[2])).flatten(), 1.0)
        hit = p_y.log().double() * (1 - eps)
        loss = loss - (hit if weight is None else hit * weight[index])
        if eps:
            logs = y.log() if weight is None else y.log() * weight.view(1, -1, 1)
            loss = loss - torch.where(counted, (eps / classes) * logs.sum(1).flatten().double(), 0.0)
        if not self.labels.is_cpu:
            invalid = counted & ((self.labels < 0) | (self.labels >= classes))
            loss = loss.masked_fill(invalid, float("nan"))
        return loss


def numbers_over_ranks(by_rank: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the numbers of rows over all classes from those over each rank's, ``(ranks, rows)`` each; None is left.

    The names are those of ``RowStatistics``, "best" (the logit of the class that a rank predicts), and others, of
    which the sums are taken.
    """
    given = {name: numbers for name, numbers in by_rank.items() if numbers is not None}
    lse = torch.logsumexp(given["lse"], 0)
    nothing, some = given["lse"] == -torch.inf, lse != -torch.inf  # ranks and rows without a class to choose
    log_share = given["lse"] - lse
    best = [given.pop(name) for name in ("best", "predicted") if name in given]
    found = {name: numbers.sum(0) for name, numbers in given.items()} | {"lse": lse}
    if "entropy" in given:
        parts = torch.where(nothing, 0.0, log_share.exp() * (given["entropy"] - log_share))
        found["entropy"] = torch.where(some, parts.sum(0), float("nan"))
    if "log_sum_sq_probs" in given:
        parts = torch.where(nothing, -torch.inf, 2 * log_share + given["log_sum_sq_probs"])
        found["log_sum_sq_probs"] = torch.where(some, torch.logsumexp(parts, 0), float("nan"))
    if best:
        found["predicted"] = _of_first_greatest(torch.stack(best, 1))[1].long()
    return found


_ORDER = ("lse", "label_logit", "weighted_sum", "entropy", "log_sum_sq_probs", "logit_sum", "predicted")


class StatisticsShard(_LabelShard):
    """The loss of class indices, and other numbers of each row, as far as they are wanted.

    A row's numbers are (lse, z_y, Σ w z, H, log Σ p², Σ z); None where one is not wanted.
    """

    def __init__(
        self,
        labels: Tensor,
        classes: int,
        weight: Tensor | None,
        options: LossOptions,
        layout: Layout,
        backend: Backend,
        wanted: WantedParts,
    ) -> None:
        super().__init__(labels, classes, weight, options, layout, backend, None)
        self.wanted = wanted

    def numbers(self, input: Tensor, target: Tensor) -> Numbers:
        """Return each row's numbers over all classes, and the predicted class or None. A visit and one collective."""
        wanted = self.wanted.numbers()
        own: dict[str, Tensor | None]
        if input.numel():
            inputs = self.inputs(input, self.local)
            rows = self.backend.row_statistics_forward(inputs, wanted)
            own = rows._asdict()
            own["label_logit"] = torch.where(self.is_own, rows.label_logit, 0.0)
            if rows.predicted is not None:
                x = inputs.input
                own["best"] = x.gather(1, rows.predicted.view(x.shape[0], 1, x.shape[2])).flatten()
                own["predicted"] = rows.predicted + self.layout.start
        else:
            zero = torch.zeros(math.prod(row_shape(input)), dtype=torch.float64, device=input.device)
            given = {**wanted._asdict(), "label_logit": True, "weighted_sum": self.options.label_smoothing != 0}
            own = {name: zero if is_given else None for name, is_given in given.items()} | {"lse": zero - torch.inf}
            if wanted.predicted:
                own |= {"best": zero - torch.inf, "predicted": zero + self.layout.start}
        names = (*_ORDER, "best")
        of_all = numbers_over_ranks(dict(zip(names, self.gathered(list(map(own.get, names))), strict=True)))
        return tuple(map(of_all.get, _ORDER))

    def values(self, numbers: Any) -> Tensor:
        """See :meth:`_LabelShard.values`."""
        return super().values(numbers[:3])

    def parts(self, numbers: Any) -> dict[str, Tensor]:
        """Return the wanted parts but the losses, ``(rows,)`` each, from the numbers and the prediction."""
        lse, _, _, entropy, squares, logits, predicted = numbers
        found = {"lse": lse, "entropy": entropy, "predicted": predicted, "log_sum_sq_probs": squares}
        if predicted is not None:
            found["correct"] = (predicted == self.labels) & (self.labels != self.options.ignore_index)
        if logits is not None:
            found["mean_logit"] = logits / self.layout.classes
        return {name: values for name, values in found.items() if getattr(self.wanted, name)}

    def gradients(
        self, upstreams: Numbers, input: Tensor, target: Tensor, numbers: Any, needs: Any, inplace: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """See :meth:`_LabelShard.gradients`."""
        if not input.numel():
            return torch.zeros_like(input), None
        of_lse, of_label, of_weighted, of_entropy, of_squares, of_logits = upstreams
        of_label = None if of_label is None else torch.where(self.is_own, of_label, 0.0)
        lse, _, _, entropy, squares, _ = numbers
        gradient = self.backend.row_statistics_backward(
            RowUpstreams(of_lse, of_label, of_entropy, of_weighted, of_squares, of_logits),
            *(self.inputs(input, self.local), (lse, entropy, squares)),
            inplace=inplace,
        )
        return gradient.view(input.shape), None


class _SoftShard(_Shard):
    """The loss of class probabilities, sharded as the logits. A row's numbers are (lse, nll, mass, Σ w z or None)."""

    def numbers(self, input: Tensor, target: Tensor) -> Numbers:
        """See :meth:`_LabelShard.numbers`."""
        own: Numbers
        if input.numel():
            own = self.backend.soft_statistics_forward(self.inputs(input, as_rows(target)), ranked=self.label)
        else:
            own = self.without_classes(input, 2)
        own_lse, nll, mass, *sums = self.gathered(own)
        lse = torch.logsumexp(own_lse, 0)
        # A rank's nll is relative to its own lse.
        nll = nll + torch.where(mass == 0, 0.0, mass * (lse - own_lse))
        return lse, *_summed((nll, mass, *sums))

    def values(self, numbers: Any) -> Tensor:
        """Return the rows' losses, differentiable in the numbers."""
        lse, nll, mass, weighted_sum = numbers
        rows = SoftRowStatistics(lse, nll, mass, weighted_sum, None)
        return soft_losses(rows, self.weight, self.options, self.layout.classes)

    def gradients(
        self, upstreams: Numbers, input: Tensor, target: Tensor, numbers: Any, needs: Any, inplace: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of this rank's logits and probabilities, as :meth:`_LabelShard.gradients` does."""
        if not input.numel():
            return torch.zeros_like(input), torch.zeros_like(target) if needs[1] else None
        of_input, of_target = self.backend.soft_statistics_backward(
            *(upstreams, self.inputs(input, as_rows(target)), numbers[0], numbers[2]),
            WantedGradients(needs[0], needs[1], inplace),
        )
        return (
            None if of_input is None else of_input.view(input.shape),
            None if of_target is None else of_target.view(target.shape),
        )

    def values_of_probabilities(self, input: Tensor, target: Tensor) -> Tensor:
        """See :meth:`_LabelShard.values_of_probabilities`."""
        eps, weight = self.options.label_smoothing, self.own_weight
        mixed = target * (1 - eps) + eps / self.layout.classes if eps else target
        own = dataclasses.replace(self.options, reduction="none", label_smoothing=0.0, topk=())
        if (weight is not None and weight.requires_grad) or not input.numel():
            return composite.cross_entropy(input, mixed, weight, own, torch.float64).reshape(-1)
        weight = None if weight is None else weight.contiguous()
        return fused_cross_entropy(input, mixed, weight, own, self.backend, torch.float64, False)[0]


ShardedLoss = _LabelShard | _SoftShard


def _summed(numbers: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Return the sums over the ranks."""
    return [None if number is None else number.sum(0) for number in numbers]


class _Numbers(Function):
    """(this rank's logits, its probabilities) → the numbers of each row over all classes, and a last one of integers.

    That is the label's rank, or the prediction.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, shard: ShardedLoss) -> Numbers:
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        *numbers, last = shard.numbers(input, target)
        if last is not None:
            ctx.mark_non_differentiable(last)
        ctx.save_for_backward(input, target, *numbers)
        return (*numbers, last)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        upstreams = upstreams[:-1]
        if all(upstream is None for upstream in upstreams):
            return (None,) * 3
        if is_differentiable(upstreams):
            raise RuntimeError(
                "fastloss: a loss over shards of the classes has no second derivative; with create_graph=True "
                "gather the classes first (of a DTensor: input.redistribute) and pass whole rows"
            )
        input, target, *numbers = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        upstreams = tuple(None if upstream is None else in_memory(upstream) for upstream in upstreams)
        return (*ctx.shard.gradients(upstreams, input, target, numbers, needs), None)
