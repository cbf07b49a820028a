r"""The loss and the accuracy where ranks of process groups share the rows or the classes.

*The classes are shared.* Each rank visits its own logits and tells the others a few float64 numbers a row: lse over
its classes, the label's logit if it has that class, and as needed Σ_c w_c z_c and how many of its classes stand
before the label. One collective gathers them. From then on every rank knows the numbers over all classes,

    lse = log Σ_ranks exp(lse_rank),     z_y, Σ_c w_c z_c, rank: sums over the ranks

and puts the same loss together, in ordinary operations (``rows.py``). Ranks count against the label's logit, which
has to be known before the visit: where an accuracy is wanted a collective of one number a row goes first.

In backward each rank computes the upstream gradients of those numbers, all of them alike, and one more visit makes
the gradient of its own logits of them: it needs lse over all classes, which is known, and no collective. A second
derivative does: the first one's dependence on lse is spread over the ranks, and :func:`collectives.replicated`
adds up what each has to say of it.

*The rows are shared.* Each rank has a part of the sum; what it is divided by is summed over the ranks first, so that
the gradient is written at its final scale, in the visit that gives the loss, as on one device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends.contract import Backend, ExternalLabel, LossOptions, RowStatistics, compute_dtype
from ..ranks.collectives import Layout, all_reduce, all_reduce_detached, gather, replicated
from . import composite
from .autograd import as_labels, as_rows, fused_cross_entropy, is_differentiable
from .row_numbers import LabelLosses, SoftLosses, total_weight

__all__ = ["RowReduction", "ShardedLoss", "accuracy", "label_elsewhere", "loss_and_accuracy"]


def loss_and_accuracy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    layout: Layout,
    backend: Backend,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss in ``dtype`` and the accuracies: ``()``, the same on every rank, or of the shape of its labels.

    Args:
        input: this rank's logits, ``(C_r,)`` or ``(n, C_r, …)``.
        target: its rows' labels among all classes; or class probabilities of ``input``'s shape.
        weight: of all classes, ``(C,)``.
        options: checked.
        layout: where the other ranks' rows and classes lie.
        backend: whose functions visit the logits.
        dtype: of the loss.
    """
    labels = None if target.is_floating_point() else as_labels(target)
    share = RowReduction(input, labels, weight, options, layout)
    if layout.class_group is None:
        loss, right = _of_whole_rows(input, target, labels, weight, share, backend)
    else:
        loss, right = _of_shared_rows(input, target, labels, weight, share, backend)
    return share.finished(loss, right, dtype, _row_shape(input))


@torch.no_grad()
def accuracy(
    input: Tensor, target: Tensor, dense: bool, options: LossOptions, layout: Layout, backend: Backend
) -> tuple[Tensor, ...]:
    """The accuracies for each k of the options; ``dense``: a value for each class, whose argmax is the label."""
    labels = None if dense else as_labels(target)
    share = RowReduction(input, labels, None, options, layout)
    if layout.class_group is None:
        if labels is None:
            labels = _argmax(target)
            share.options = dataclasses.replace(options, ignore_index=-1)
        right = _right_in_whole_rows(input, labels, share.options, backend)
    else:
        label = label_elsewhere(input, target, labels, options, layout)
        rank = label.position.new_zeros(label.position.shape)
        if input.numel():
            rank = backend.label_ranks(as_rows(input), label)
        rank = all_reduce_detached(rank, (layout.class_group,))
        right = share.right(rank)
    return share.finished(None, right, torch.float32, _row_shape(input))[1]


def _row_shape(input: Tensor) -> tuple[int, ...]:
    return (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()


def _argmax(target: Tensor) -> Tensor:
    """The labels of dense rows, flat."""
    rows = as_rows(target.to(torch.uint8) if target.dtype == torch.bool else target)
    return rows.argmax(1).flatten()


class RowReduction:
    """This rank's rows among all rows: what a mean divides by, and how parts become wholes."""

    def __init__(
        self, input: Tensor, labels: Tensor | None, weight: Tensor | None, options: LossOptions, layout: Layout
    ) -> None:
        self.options, self.layout, self.labels = options, layout, labels
        if labels is None:
            self.divisor = self.counts = torch.full((), layout.rows, dtype=torch.float64, device=input.device)
        else:
            counted = labels != options.ignore_index
            self.counted, self.invalid = counted, None
            if not labels.is_cpu:
                self.invalid = counted & ((labels < 0) | (labels >= layout.classes))
            counts = counted.sum(dtype=torch.float64)
            total = counts if weight is None else total_weight(labels, weight, options)
            totals = torch.stack([total, counts])
            if options.reduction != "none":
                totals = all_reduce_detached(totals, layout.row_groups)
            self.divisor, self.counts = totals.unbind(0)  # of the loss, of the accuracy

    def scaled(self, values: Tensor) -> Tensor:
        """This rank's part of the loss from its rows' values; or those."""
        if self.options.reduction == "none":
            return values
        total = values.sum()
        return total / self.divisor if self.options.reduction == "mean" else total

    def right(self, rank: Tensor) -> Tensor:
        """For each k which rows are right, ``(k, rows)``, or how many, ``(k,)``; float64."""
        right = torch.stack([rank < k for k in self.options.topk])
        if self.labels is not None:
            right = (right & self.counted).double()
            if self.invalid is not None:
                right = right.masked_fill(self.invalid, float("nan"))
        right = right.double()
        return right if self.options.reduction == "none" else right.sum(1)

    def finished(
        self, loss: Tensor | None, right: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The whole loss and accuracies from this rank's parts; where there is no loss, any number."""
        groups = self.layout.row_groups
        parts = [part for part in (None if loss is None else loss.double().reshape(-1), right) if part is not None]
        if self.options.reduction == "none":
            values = () if right is None else tuple(value.to(torch.float32).view(shape) for value in right.unbind(0))
            return torch.empty(0) if loss is None else loss.to(dtype).view(shape), values
        whole = all_reduce(torch.cat(parts), groups)
        value = whole[0].to(dtype)
        if right is None:
            return value, ()
        shares = whole[len(whole) - len(right) :].detach()
        if self.options.reduction == "mean":
            shares = shares / self.counts
        return value, tuple(shares.to(torch.float32).unbind(0))


# ------------------------------------------------------------------------------------------ rows that are whole here


def _of_whole_rows(
    input: Tensor, target: Tensor, labels: Tensor | None, weight: Tensor | None, share: RowReduction, backend: Backend
) -> tuple[Tensor, Tensor | None]:
    """This rank's part of the loss, and its right rows: as on one device, at the scale of all rows."""
    options = share.options
    none = options.reduction == "none"
    divisor: Tensor | float | None = None
    if options.reduction == "mean":
        divisor = float(share.layout.rows) if labels is None else share.divisor
    part = dataclasses.replace(options, reduction="none" if none else "sum", topk=())
    soft_weight_grad = labels is None and weight is not None and weight.requires_grad
    if input.numel() and (labels is None or options.from_logits) and not soft_weight_grad:
        with_topk = part if labels is None else dataclasses.replace(part, topk=options.topk)
        loss, values = fused_cross_entropy(
            input,
            target if labels is None else labels,
            None if weight is None else weight.contiguous(),
            with_topk,
            backend,
            torch.float64,
            False,
            divisor,
        )
    else:
        rows = target if labels is None else target.view(_row_shape(input))
        loss, values = composite.cross_entropy(input, rows, weight, part, torch.float64), ()
        loss = loss if divisor is None else loss / divisor
    if not options.topk:
        return loss, None
    if len(values):
        return loss, torch.stack(values).double()
    if labels is None:
        labels, options = _argmax(target), dataclasses.replace(options, ignore_index=-1)
    return loss, _right_in_whole_rows(input.detach(), labels, options, backend)


def _right_in_whole_rows(input: Tensor, labels: Tensor, options: LossOptions, backend: Backend) -> Tensor:
    reduction = "none" if options.reduction == "none" else "sum"
    if not input.numel():
        shape = (len(options.topk), labels.numel()) if reduction == "none" else (len(options.topk),)
        return torch.zeros(shape, dtype=torch.float64, device=input.device)
    values = backend.accuracy(as_rows(input), labels, options.topk, options.ignore_index, reduction)
    return torch.stack(values).double()


# ----------------------------------------------------------------------------------- rows whose classes are spread


def _of_shared_rows(
    input: Tensor, target: Tensor, labels: Tensor | None, weight: Tensor | None, share: RowReduction, backend: Backend
) -> tuple[Tensor, Tensor | None]:
    """This rank's part of the loss (its rows, all classes), and its right rows."""
    options, layout = share.options, share.layout
    label = label_elsewhere(input, target, labels, options, layout) if options.topk else None
    kind = ShardedLoss(input, target, labels, weight, options, layout, label)
    if not options.from_logits:
        rank = None
        if label is not None:
            rank = backend.label_ranks(as_rows(input.detach()), label) if input.numel() else label.position * 0
            rank = all_reduce_detached(rank, (layout.class_group,))
        values = all_reduce(kind.values_of_probabilities(input, target, backend), (layout.class_group,))
    else:
        *numbers, rank = _Numbers.apply(input, target, kind, backend)
        values = kind.values(tuple(numbers))
    right = None if rank is None else share.right(rank)
    return share.scaled(values), right


def label_elsewhere(
    input: Tensor, target: Tensor, labels: Tensor | None, options: LossOptions, layout: Layout
) -> ExternalLabel:
    """Each row's label and its score, which one rank has and tells the others: an accuracy's first collective."""
    x, most_k = as_rows(input.detach()), max(options.topk)
    outer, classes, inner = x.shape
    if labels is None:
        score = as_rows(target.detach().to(torch.uint8) if target.dtype == torch.bool else target.detach())
        if classes:
            best = score.argmax(1, keepdim=True)
            mine = [score.gather(1, best), best + layout.start, x.gather(1, best)]
        else:
            nothing = x.new_full((outer, 1, inner), -torch.inf)
            mine = [nothing, nothing * 0, nothing * 0]
        told = gather(torch.stack([number.flatten().double() for number in mine]), layout.class_group)
        winner = told[:, 0].argmax(0).expand(1, 3, -1)  # the first of equal ones: on the rank of the lower classes
        _, label, logit = told.gather(0, winner)[0].unbind(0)
        labels = label.long()
    else:
        local, own = _own_labels(labels, classes, options, layout)
        logit = x.new_zeros(len(labels), dtype=torch.float64)
        if classes:
            at = torch.where(own, local, 0).view(outer, 1, inner)
            logit = torch.where(own, x.gather(1, at).flatten().double(), 0.0)
        logit = all_reduce_detached(logit, (layout.class_group,))
    position = (labels.long() - layout.start).clamp(0, classes)
    return ExternalLabel(logit.contiguous(), position, most_k)


def _own_labels(labels: Tensor, classes: int, options: LossOptions, layout: Layout) -> tuple[Tensor, Tensor]:
    """Labels among this rank's classes: -100 where the row is ignored, 0 where another rank has it; and if it has."""
    local = labels.long() - layout.start
    counted = labels != options.ignore_index
    own = counted & (local >= 0) & (local < classes)
    return torch.where(counted, torch.where(own, local, 0), -100), own


class ShardedLoss:
    """What a loss over shared classes asks of each row, of labels or of class probabilities.

    Everything but the visits is a few numbers a row. ``numbers`` are, of labels, (lse, z_y, Σ w z or None); of
    probabilities (lse, nll, mass, Σ w z or None); over all classes.
    """

    def __init__(
        self,
        input: Tensor,
        target: Tensor,
        labels: Tensor | None,
        weight: Tensor | None,
        options: LossOptions,
        layout: Layout,
        label: ExternalLabel | None,
    ) -> None:
        self.labels, self.weight, self.options, self.layout, self.label = labels, weight, options, layout, label
        self.of_visit = dataclasses.replace(options, ignore_index=-100)
        classes = as_rows(input).shape[1]
        self.own_weight = None if weight is None else _own_part(weight, classes, layout)
        if labels is not None:
            self.local, self.own = _own_labels(labels, classes, options, layout)

    def visit(self, input: Tensor, target: Tensor, backend: Backend) -> tuple[Tensor | None, ...]:
        """This rank's numbers, one collective, and the numbers over all classes; the rank, or None, comes last."""
        logits = as_rows(input)
        rows = logits.shape[0] * logits.shape[2]
        weight = None if self.own_weight is None else self.own_weight.detach()
        smoothing, ranked = self.options.label_smoothing != 0, self.label is not None
        zero = torch.zeros(rows, dtype=torch.float64, device=input.device)
        parts: list[Tensor | None]
        if not logits.numel():
            parts = [zero - torch.inf, zero, *([] if self.labels is not None else [zero])]
            parts += [zero if smoothing else None, zero if ranked else None]
        elif self.labels is not None:
            found = backend.row_statistics_forward(
                *(logits, self.local, weight, self.of_visit),
                entropy=False,
                predicted=False,
                every_row=False,
                ranked=self.label,  # type: ignore[arg-type]
            )
            parts = [found.lse, torch.where(self.own, found.label_logit, 0.0), found.weighted_sum, found.rank]
        else:
            parts = list(
                backend.soft_statistics_forward(logits, as_rows(target), weight, self.of_visit, ranked=self.label)
            )
        told = gather(torch.stack([part.double() for part in parts if part is not None]), self.layout.class_group)
        columns = iter(told.unbind(1))  # (ranks, rows) each
        of_ranks = [None if part is None else next(columns) for part in parts]
        lse = torch.logsumexp(of_ranks[0], 0)  # type: ignore[arg-type]
        if self.labels is None:  # nll is relative to each rank's own lse so far
            local_lse, nll, mass = of_ranks[:3]
            assert local_lse is not None
            assert nll is not None
            assert mass is not None
            of_ranks[1] = nll + torch.where(mass == 0, 0.0, mass * (lse - local_lse))
        whole = [None if part is None else part.sum(0) for part in of_ranks[1:]]
        return lse, *whole

    def values(self, numbers: tuple[Any, ...]) -> Tensor:
        """The rows' losses, differentiable in the numbers."""
        layout, options = self.layout, self.options
        if self.labels is not None:
            lse, label_logit, weighted_sum = numbers
            rows = RowStatistics(lse, label_logit, None, weighted_sum, None)
            weight = None if self.weight is None else self.weight.detach()
            return LabelLosses(rows, self.labels, weight, options, layout.classes).values()
        lse, nll, mass, weighted_sum = numbers
        return SoftLosses(lse, nll, mass, weighted_sum, self.weight, options, layout.classes).values()

    def gradients(
        self,
        upstreams: tuple[Tensor | None, ...],
        input: Tensor,
        target: Tensor,
        numbers: tuple[Any, ...],
        needs: tuple[bool, bool],
        backend: Backend,
        *,
        inplace: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of this rank's logits and probabilities, for upstream gradients of the numbers: a visit, no collective."""
        if not input.numel():
            return torch.zeros_like(input), torch.zeros_like(target) if needs[1] else None
        logits, weight = as_rows(input), None if self.own_weight is None else self.own_weight.detach()
        if self.labels is not None:
            of_lse, of_label, of_sum = upstreams
            of_label = None if of_label is None else torch.where(self.own, of_label, 0.0)
            found = backend.row_statistics_backward(
                *((of_lse, of_label, None, of_sum), logits, self.local, weight, self.of_visit, numbers[0], None),
                inplace=inplace,
            )
            return found.view(input.shape), None
        of_input, of_target = backend.soft_statistics_backward(
            *(upstreams, logits, as_rows(target), weight, self.of_visit, numbers[0], numbers[2]),
            gradient=needs[0],
            target_gradient=needs[1],
            inplace=inplace,
        )
        return (
            None if of_input is None else of_input.view(input.shape),
            None if of_target is None else of_target.view(target.shape),
        )

    def differentiable_gradients(
        self, upstreams: tuple[Tensor | None, ...], input: Tensor, target: Tensor, numbers: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """The same in operations that autograd can differentiate again; numbers and upstreams are alike on all ranks.

        Each rank's logits have a part in lse; what the others' gradients owe to lse comes over :func:`replicated`.
        """
        groups = (self.layout.class_group,) if torch.is_grad_enabled() else ()
        x = as_rows(input)
        dtype, rows = compute_dtype(x.dtype), (x.shape[0], 1, x.shape[2])

        def of_rows(number: Tensor | None) -> Tensor | None:
            return None if number is None else replicated(number, groups).to(dtype).view(rows)

        x = x.to(dtype)
        cap = self.options.softcap
        tanh = None if cap is None else torch.tanh(x / cap)
        z = x if tanh is None or cap is None else cap * tanh
        lse = of_rows(numbers[0])
        assert lse is not None
        log_p = z - lse
        p = log_p.exp()
        weight = None if self.own_weight is None else self.own_weight.to(dtype).view(1, -1, 1)
        of_target = None
        zero = torch.zeros_like(z)
        if self.labels is not None:
            of_lse, of_label, of_sum = map(of_rows, upstreams)
            gradient = zero if of_lse is None else p * of_lse
            if of_label is not None:
                hit = torch.where(self.own, 1.0, 0.0).to(dtype).view(rows)
                gradient = gradient.scatter_add(1, self.local.clamp(min=0).view(rows), of_label * hit)
        else:
            of_lse, of_nll, of_mass, of_sum = map(of_rows, upstreams)
            t = as_rows(target).to(dtype)
            mass = of_rows(numbers[2])
            assert mass is not None
            w = torch.ones((), dtype=dtype, device=z.device) if weight is None else weight
            gradient = zero if of_lse is None else p * of_lse
            of_target = zero if of_mass is None else w * of_mass
            if of_nll is not None:
                gradient = gradient + of_nll * (p * mass - w * t)
                of_target = of_target - w * of_nll * log_p
            of_target = of_target.expand(z.shape).to(target.dtype).view(target.shape)
        if of_sum is not None:
            gradient = gradient + (of_sum if weight is None else of_sum * weight)
        if tanh is not None:
            gradient = gradient * (1 - tanh.square())
        idle = torch.ones(rows, dtype=torch.bool, device=z.device)
        for upstream in upstreams:
            if upstream is not None:
                idle = idle & (upstream.detach() == 0).view(rows)
        gradient = torch.where(idle, 0.0, gradient)
        return gradient.to(input.dtype).view(input.shape), of_target

    def values_of_probabilities(self, input: Tensor, target: Tensor, backend: Backend) -> Tensor:
        """This rank's part of −Σ_c w_c u_c log y_c, which is a sum over classes; differentiable."""
        eps, classes = self.options.label_smoothing, self.layout.classes
        if self.labels is None:
            mixed = target * (1 - eps) + eps / classes if eps else target
            part = dataclasses.replace(self.options, reduction="none", label_smoothing=0.0, topk=())
            weight = self.own_weight
            if (weight is not None and weight.requires_grad) or not input.numel():
                return composite.cross_entropy(input, mixed, weight, part, torch.float64).reshape(-1)
            weight = None if weight is None else weight.contiguous()
            return fused_cross_entropy(input, mixed, weight, part, backend, torch.float64, False)[0]
        y = as_rows(input)
        y = y.to(compute_dtype(y.dtype))
        counted = self.labels != self.options.ignore_index
        loss = torch.zeros(len(self.labels), dtype=torch.float64, device=y.device)
        weight = None if self.own_weight is None else self.own_weight.detach().to(y.dtype)
        if not y.shape[1]:
            return loss + input.sum() * 0
        at = torch.where(self.own, self.local, 0)
        p_y = torch.where(self.own, y.gather(1, at.view(y.shape[0], 1, y.shape[2])).flatten(), 1.0)
        hit = p_y.log().double() * (1 - eps)
        loss = loss - (hit if weight is None else hit * weight[at])
        if eps:
            logs = y.log() if weight is None else y.log() * weight.view(1, -1, 1)
            loss = loss - torch.where(counted, (eps / classes) * logs.sum(1).flatten().double(), 0.0)
        if not self.labels.is_cpu:
            invalid = counted & ((self.labels < 0) | (self.labels >= classes))
            loss = loss.masked_fill(invalid, float("nan"))
        return loss


def _own_part(weight: Tensor, classes: int, layout: Layout) -> Tensor:
    """The weights of this rank's classes."""
    if isinstance(layout.start, int):
        return weight[layout.start : layout.start + classes].contiguous()
    index = (layout.start + torch.arange(classes, device=weight.device)).clamp_(max=len(weight) - 1)
    return weight[index]


class _Numbers(Function):
    """(this rank's logits, its probabilities) → the numbers of each row over all classes, and the rank."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, kind: ShardedLoss, backend: Backend
    ) -> tuple[Tensor | None, ...]:
        ctx.kind, ctx.backend = kind, backend
        ctx.set_materialize_grads(False)
        found = kind.visit(input, target, backend)
        if found[-1] is not None:
            ctx.mark_non_differentiable(found[-1])
        ctx.save_for_backward(input, target, *found[:-1])
        return found

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        upstreams, nothing = upstreams[:-1], (None, None)
        if all(upstream is None for upstream in upstreams):
            return (None, None, *nothing)
        input, target, *numbers = ctx.saved_tensors
        if is_differentiable(upstreams):
            return (*ctx.kind.differentiable_gradients(upstreams, input, target, numbers), *nothing)
        needs = ctx.needs_input_grad[:2]
        return (*ctx.kind.gradients(upstreams, input, target, numbers, needs, ctx.backend), *nothing)
