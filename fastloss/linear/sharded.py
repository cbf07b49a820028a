r"""The linear map and its loss over several ranks: rows of the input, or of the head (the classes), shared.

*The head's rows are shared.* Each rank projects a chunk of rows onto its own classes and sends the others a few
numbers per row, as in :mod:`fastloss.loss.sharded`; then the chunk's gradient is written over its logits, and two
products use it. So there is one collective per chunk (two where an accuracy is wanted), of O(rows) bytes. The other
way, all numbers in one collective after a first pass over all chunks, would need a fourth product of 2 n (C / ranks)
D operations: a third more time. A collective waits some 20 to 50 µs, while a chunk of 4096 rows with D = 4096 and
16384 classes on a rank takes 1.6·10¹² operations, some 3 ms on an H100: a hundredth of it.

Each rank's part of the input's gradient is added up once, after the last chunk: N·D elements. The weight's gradient
stays on the weight's rank.

*The input's rows are shared.* Each rank goes through its own chunks at the scale of the mean over all rows; autograd
adds up the weight's gradient in the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends import choice
from ..backends.contract import Backend, LossInputs, WantedParts
from ..backends.torch_private import disable_dynamo
from ..backends.view import as_labels, wide_labels
from ..loss.sharded import (
    Numbers,
    RowReduction,
    ShardedLoss,
    check_labels_together,
    numbers_over_ranks,
    refuse,
    right_rows,
    sharded_loss,
)
from ..ranks import collectives, placements
from ..ranks.collectives import Layout, all_reduce_detached, gather, replicated
from . import chunks
from .arguments import Arguments, check_shapes, dtype_of_logits, labelled, of_rows, shifted_labels
from .autograd import by_chunks
from .chunks import Chunk, ChunkLoss, Gradients, LinearOptions, Losses, Needs, Saved, Tensors
from .row_numbers import Numbers as NumbersByName
from .row_numbers import RowVisitor, scaled

__all__ = ["Part", "common_rows_of_chunk", "linear_loss_over_ranks", "part_of_rank"]


@disable_dynamo
def linear_loss_over_ranks(arguments: Arguments, group: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss and the accuracies of DTensors, or of a group's shards of the classes."""
    part = part_of_rank(arguments, group)
    results = _of_part(part)
    loss, *values = (part.placed(value, arguments.shift) for value in results)
    return loss, tuple(values)


class Part(NamedTuple):
    """This rank's part of a call, checked."""

    tensors: Tensors  # of flat rows, (n, …), and of this rank's classes
    weight: Tensor | None  # of all classes
    call: LinearOptions
    layout: Layout
    backend: Backend
    lead: tuple[int, ...]  # the shape of this rank's rows
    plan: placements.Plan | None  # of DTensors

    def placed(self, value: Tensor, shift: int) -> Tensor:
        """Return a result of flat rows, or of all of them, ``()``, as the caller gets it."""
        value = of_rows(value, self.lead, 0)
        return labelled(value if self.plan is None else self.plan.placed(value), len(self.lead), shift)

    def visitor(self, wanted: WantedParts, every_row: bool) -> RowVisitor:
        """Return a visitor of the rows' logits, whose numbers are those over all classes."""
        given = self.weight, self.call.options, self.backend, wanted, every_row
        return RowVisitor(*given) if self.layout.class_group is None else _SharedRows(self.layout, *given)

    def replicated_map(self) -> Tensors:
        """Return the tensors; gradients of the map are added up over the ranks that share the rows."""
        x, w, b, t = self.tensors
        groups = self.layout.row_groups
        return Tensors(x, replicated(w, groups), None if b is None else replicated(b, groups), t)


def part_of_rank(arguments: Arguments, group: Any, same: object = None) -> Part:
    """Check a call, together with the other ranks, and return this rank's part of it.

    ``same``: what must be equal on all ranks of ``group`` beside the arguments; anything with a fixed ``repr``.
    """
    input, linear_weight, target, linear_bias, weight, options, shift, chunking = arguments
    by_mesh = any(map(placements.is_dtensor, (input, linear_weight)))
    if by_mesh and group is not None:
        raise ValueError("fastloss: group is given beside a DTensor, whose mesh says which ranks have what")
    group = None if by_mesh else collectives.checked_group(group)
    if not by_mesh:
        input, target = collectives.waited(input), collectives.waited(target)
        arguments = arguments._replace(input=input, target=target)
    look = isinstance(input, Tensor) and choice.may_look(input)
    try:
        checks.check_no_gradient(weight)
        checks.check_logits(input)
        soft = isinstance(target, Tensor) and target.is_floating_point() and target.dim() == input.dim()
        _check_tensors(arguments, soft=soft)
        if chunking["accumulate_grad"] and (by_mesh or not linear_weight.is_leaf):
            raise RuntimeError(
                "fastloss: accumulate_grad=True beside a linear_weight that is a DTensor or not a leaf; pass a "
                "parameter with group=, or accumulate_grad=False"
            )
    except Exception:
        refuse(group, input)  # of DTensors all ranks know it: these checks are of the whole tensors
        raise
    plan = None
    x: Any
    if by_mesh:
        plan = placements.plan_linear(input, linear_weight, target, linear_bias, soft)
        if shift and any(p.is_shard() and p.dim == len(plan.row_shape) - 1 for p in plan.of_rows):
            raise ValueError(
                f"fastloss: shift={shift} with positions that are sharded ({plan.of_rows}); expected whole sequences "
                "on each rank, or shift=0 beside labels that are shifted already"
            )
        layout, t, weight = plan.layout, plan.target, placements.whole(weight)
        x, w, b = (placements.local(tensor) for tensor in (input, linear_weight, linear_bias))
    else:
        layout = collectives.agreed_layout(
            group,
            len(linear_weight),
            input.shape[:-1].numel(),
            device=input.device,
            # Backward adds up the input's gradient over the ranks.
            same=(
                *(options, input.shape, input.dtype, soft, shift, chunking, getattr(weight, "shape", None)),
                torch.is_grad_enabled() and input.requires_grad,
                *(() if same is None else (same,)),
            ),
            labels=None if soft else target,
            look=look,
        )
        x, w, b, t = input, linear_weight, linear_bias, target
    if look:
        checks.check_weight(input.new_empty(()).expand(int(layout.classes)), weight)
    t = shifted_labels(t, options.ignore_index, shift) if shift else t
    if not soft and look:
        check_labels_together(t, layout, options.ignore_index, shift=shift)
    lead = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    t = t.reshape(-1, t.shape[-1]) if soft else as_labels(wide_labels(t))
    weight = None if weight is None else weight.contiguous()
    dtype = dtype_of_logits(x)
    of_loss = checks.loss_dtype(x, t, weight, chunks.dtype_of_chunk(dtype, chunking["logits_dtype"]))
    call = LinearOptions(options, dtype, of_loss, **chunking)
    tensors = Tensors(x, w, b, t)
    rows = common_rows_of_chunk(call, tensors, layout)  # raises if the budget has no room for a row
    if layout.class_group is not None:
        call = dataclasses.replace(call, chunk_size=rows, memory_budget=None)
    return Part(tensors, weight, call, layout, choice.load(choice.choose(x)), lead, plan)


def _check_tensors(arguments: Arguments, *, soft: bool) -> None:
    """Check what one rank can check alone."""
    input, linear_weight, target, _, weight, options, _, _ = arguments
    check_shapes(arguments, whole=False)
    if linear_weight.dim() > 2:
        raise ValueError(
            f"fastloss: linear_weight has shape {tuple(linear_weight.shape)}, torch's K-dimensional loss, over "
            "several ranks; expected (C, D)"
        )
    rows, dtype = input.shape[:-1].numel(), dtype_of_logits(input)
    logits = input.new_empty((), dtype=dtype).expand(rows, len(linear_weight))
    if soft:
        checks.check_soft_target(logits, target, None, options.ignore_index)
    else:
        checks.check_weight_dtype(logits, weight)


def _of_part(part: Part) -> list[Tensor]:
    """Return the loss and the accuracies over all ranks, ``()`` or ``(rows,)``, from this rank's part."""
    _, weight, call, layout, backend, _, _ = part
    x, _, _, t = tensors = part.replicated_map()
    soft = t.is_floating_point()
    reduction = RowReduction(x, None if soft else t, weight, call.options, layout)
    total: Tensor | float = float(layout.rows) if soft else reduction.divisor
    of_part = dataclasses.replace(call, total=total, loss_dtype=torch.float64)
    losses = Losses(weight, of_part, backend)
    if layout.class_group is not None:
        losses = _SharedLosses(weight, of_part, backend, layout)
    loss, *of_ks = by_chunks(tensors, losses)
    right = torch.stack(of_ks).double() if of_ks else None
    loss, values = reduction.finished(loss, right, call.loss_dtype, (len(x),))
    return [loss, *values]


def common_rows_of_chunk(call: LinearOptions, tensors: Tensors, layout: Layout) -> int:
    """Return a chunk's rows, the same on all ranks that share the classes, since a chunk has collectives.

    It is :func:`chunks.rows_of_chunk` of the rank that has the most classes. On a GPU with ``group=`` the host
    doesn't know their number: there the rule leaves the width of the head out, and for a ``memory_budget`` the host
    waits once.

    Raises:
        ValueError: the budget has no room for a row; on all ranks.
    """
    rows, linear_weight, needs = len(tensors.input), tensors.linear_weight, tensors.needs()
    if layout.class_group is None:
        return chunks.rows_of_chunk(call, rows, linear_weight, needs)
    most = layout.most_classes
    if most is None and call.memory_budget is not None:
        own = torch.full((), len(linear_weight), dtype=torch.int64, device=linear_weight.device)
        most = int(gather(own, layout.class_group).max())
    stand_in = linear_weight.new_empty(()).expand(1 if most is None else most, linear_weight.shape[1])
    return chunks.rows_of_chunk(call, rows, stand_in, needs)


class _SharedLosses(Losses):
    """The losses of chunks whose classes are shared: one collective per chunk, two with an accuracy."""

    per_row = True

    def __init__(self, weight: Tensor | None, call: LinearOptions, backend: Backend, layout: Layout) -> None:
        super().__init__(weight, call, backend)
        self.layout, self.upstream_dtype = layout, torch.float64

    def forward(self, chunk: Chunk, total: Tensor | float | None, needs: Needs) -> ChunkLoss:
        _, _, t, z = chunk
        options, labels = self.call.options, None if t.is_floating_point() else t
        shard = sharded_loss(z, t, self.weight, options, self.layout, self.backend, ranked=bool(options.topk))
        *numbers, rank = shard.numbers(z, t)
        if any(needs):
            values, upstreams = _differentiated(shard, tuple(numbers), self._scale(total, z))
            of_target = self._gradients(shard, upstreams, z, t, tuple(numbers), needs)
        else:  # nor could it be differentiated in inference mode
            values, of_target = shard.values(tuple(numbers)), None
        right = None if rank is None else right_rows(rank, labels, options, self.layout.classes)
        return ChunkLoss(values, right, tuple(number for number in numbers if number is not None), of_target)

    def finished(self, loss: Tensor, total: Tensor | float | None) -> Tensor:
        return loss.sum() * self._scale(total, loss) if self.call.options.is_reduced else loss

    def backward(self, chunk: Chunk, upstreams: Sequence[Tensor | None], saved: Saved, needs: Needs) -> Any:
        _, _, t, z = chunk
        (upstream,) = upstreams
        assert upstream is not None
        sums = 2 + t.is_floating_point()
        numbers = (*saved[:sums], saved[sums] if len(saved) > sums else None)
        shard = sharded_loss(z, t, self.weight, self.call.options, self.layout, self.backend, ranked=False)
        _, of_numbers = _differentiated(shard, numbers, upstream)
        return self._gradients(shard, of_numbers, z, t, numbers, needs)

    def whole(self, gradients: Gradients) -> Gradients:
        return _whole(gradients, self.layout)

    def refuse_second_derivative(self) -> None:
        _refuse_second_derivative("linear_cross_entropy over shards of the classes has")

    def _scale(self, total: Tensor | float | None, like: Tensor) -> Tensor:
        one = torch.ones((), dtype=torch.float64, device=like.device)
        return one if total is None else one / total

    def _gradients(
        self, shard: ShardedLoss, upstreams: Numbers, z: Tensor, t: Tensor, numbers: Numbers, needs: Needs
    ) -> Tensor | None:
        """Write the gradient over the logits z, and return that of the probabilities, ``(n, C_r)``, or None."""
        of_logits = any(needs[:3])
        _, of_target = shard.gradients(upstreams, z, t, numbers, (of_logits, needs.target), inplace=of_logits)
        return of_target


def _differentiated(shard: ShardedLoss, numbers: Numbers, upstream: Tensor) -> tuple[Tensor, Numbers]:
    """Return the rows' losses, and the upstream gradients of the numbers that they are made of."""
    with torch.enable_grad():
        numbers = tuple(None if number is None else number.detach().requires_grad_() for number in numbers)
        values = shard.values(numbers)
        given = [number for number in numbers if number is not None]
        gradients = iter(torch.autograd.grad(values, given, upstream.expand_as(values), allow_unused=True))
    return values.detach(), tuple(None if number is None else next(gradients) for number in numbers)


def _whole(gradients: Gradients, layout: Layout) -> Gradients:
    """Return the gradients with the input's over the classes of all ranks."""
    if gradients.input is None:
        return gradients
    return gradients._replace(input=all_reduce_detached(gradients.input, (layout.class_group,)))


def _refuse_second_derivative(of: str) -> None:
    raise RuntimeError(
        f"fastloss: {of} no second derivative; with create_graph=True gather linear_weight first (of a DTensor: "
        "redistribute) and pass the whole of it"
    )


class _SharedRows(RowVisitor):
    """Visits the logits of this rank's classes: one collective per chunk in forward, none in backward."""

    def __init__(self, layout: Layout, *of_visitor: Any) -> None:
        super().__init__(*of_visitor)
        self.layout = layout

    def numbers(self, t: Tensor, z: Tensor, ids: Tensor | None) -> NumbersByName:
        shard = self._shard(t, z)
        own = self._own_numbers(shard, z)
        if ids is not None:
            local, inside = self.own(ids, z)
            values = scaled(z.gather(1, local), self.options).double() if z.shape[1] else local.double()
            invalid = (ids < 0) | (ids >= self.layout.classes)
            of_ids = torch.where(inside, values, 0.0).masked_fill(invalid, float("nan"))
            own |= {f"selected {k}": column for k, column in enumerate(of_ids.unbind(1))}
        by_rank = dict(zip(own, shard.gathered(list(own.values())), strict=True))
        numbers = numbers_over_ranks(by_rank)
        if ids is not None:
            numbers["selected"] = torch.stack([numbers.pop(f"selected {k}") for k in range(ids.shape[1])], 1)
        return numbers

    def _own_numbers(self, shard: Any, z: Tensor) -> NumbersByName:
        """Return the numbers of this rank's classes; beside the prediction its logit, "best"."""
        if not z.shape[1]:
            zero = torch.zeros(len(z), dtype=torch.float64, device=z.device)
            names = (*self.names, *(("predicted", "best") if self.predicts else ()))
            return {name: zero - torch.inf if name in ("lse", "best") else zero for name in names}
        own = self.visited(shard.inputs(z, shard.local))
        own["label_logit"] = torch.where(shard.is_own, own["label_logit"], 0.0)
        if self.predicts:
            own["best"] = z.gather(1, own["predicted"].unsqueeze(1)).squeeze(1)
            own["predicted"] = own["predicted"] + self.layout.start
        return own

    def write_gradient(
        self, upstreams: NumbersByName, t: Tensor, z: Tensor, numbers: NumbersByName, ids: Tensor | None
    ) -> None:
        if not z.shape[1]:
            return
        if "label_logit" in upstreams:
            of_label = torch.where(self._shard(t, z).is_own, upstreams["label_logit"], 0.0)
            upstreams = {**upstreams, "label_logit": of_label}
        super().write_gradient(upstreams, t, z, numbers, ids)

    def whole(self, gradients: Gradients) -> Gradients:
        return _whole(gradients, self.layout)

    def refuse_second_derivative(self) -> None:
        _refuse_second_derivative("numbers of rows over shards of the classes have")

    def _shard(self, t: Tensor, z: Tensor) -> Any:
        return sharded_loss(z, t, self.weight, self.options, self.layout, self.backend, ranked=False)

    def inputs(self, t: Tensor, z: Tensor) -> LossInputs:
        shard = self._shard(t, z)
        return shard.inputs(z, shard.local)

    def own(self, ids: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return super().own(ids - self.layout.start, z)
