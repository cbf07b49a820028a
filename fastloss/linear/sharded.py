r"""The linear map and its loss over several ranks: rows of the input, or of the head (the classes), shared.

*The head's rows are shared.* Each rank projects a chunk of rows onto its own classes and tells the others a few
numbers of each row, as in :mod:`fastloss.loss.sharded`; then the chunk's gradient is written over its logits, and two
products take it on. So there is one collective a chunk (two where an accuracy is wanted), of O(rows) bytes. The
other way, all numbers in one collective after a first pass over all chunks, would need a fourth product of
2 n (C / ranks) D operations: a third more time. A collective waits some 20 to 50 µs, while a chunk of 4096 rows with
D = 4096 and 16384 classes on a rank takes 1.6·10¹² operations, some 3 ms on an H100: a hundredth of it.

What the input's gradient owes to the other ranks' classes is added up once, after the last chunk: N·D elements. The
weight's gradient stays where the weight is.

*The input's rows are shared.* Each rank goes through its own chunks at the scale of the mean over all rows; the
weight's gradient is added up by autograd, in the backward pass.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends.contract import Backend
from ..loss.autograd import graph_is_kept, is_differentiable
from ..loss.sharded import RowReduction, ShardedLoss, label_elsewhere
from ..ranks.collectives import Layout, all_reduce_detached, gather, replicated
from . import chunks
from .autograd import fused_linear_cross_entropy, gradient_of
from .chunks import ChunkIterator, GradientAccumulator, LinearOptions, Needs

__all__ = ["common_rows_of_chunk", "loss_and_accuracy"]


def loss_and_accuracy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    call: LinearOptions,
    layout: Layout,
    backend: Backend,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and the accuracies, ``()``, the same on every rank, or ``(rows,)``.

    Args:
        input: x, this rank's rows, ``(rows, D)``.
        linear_weight: its classes, ``(C_r, D)``.
        target: its rows' labels among all classes; or its part of class probabilities ``(rows, C_r)``.
        linear_bias: its classes, ``(C_r,)``.
        weight: of all classes, ``(C,)``.
        call: the rest.
        layout: where the other ranks' rows and classes lie.
        backend: whose functions visit the logits.
    """
    options, dtype = call.options, call.loss_dtype
    soft = target.is_floating_point()
    share = RowReduction(input, None if soft else target, weight, options, layout)
    linear_weight = replicated(linear_weight, layout.row_groups)
    linear_bias = None if linear_bias is None else replicated(linear_bias, layout.row_groups)
    total: Tensor | float = float(layout.rows) if soft else share.divisor
    call = dataclasses.replace(call, total=total, loss_dtype=torch.float64)
    if layout.class_group is None:
        loss, values = fused_linear_cross_entropy(input, linear_weight, target, linear_bias, weight, call, backend)
    else:
        if not torch.is_grad_enabled():
            input, linear_weight, target = input.detach(), linear_weight.detach(), target.detach()
            linear_bias = None if linear_bias is None else linear_bias.detach()
        loss, *values = _SharedClasses.apply(  # type: ignore[assignment]
            input, linear_weight, linear_bias, target, weight, call, layout, backend
        )
    right = torch.stack(tuple(values)).double() if len(values) else None
    return share.finished(loss, right, dtype, (len(input),))


def common_rows_of_chunk(call: LinearOptions, rows: int, linear_weight: Tensor, needs: Needs, layout: Layout) -> int:
    """:func:`linear_chunks.rows_of_chunk`, the same on all ranks that share the classes: a chunk has collectives.

    That of the rank that has the most classes. On a GPU with ``group=`` the host doesn't know of it: there the rule
    leaves the width of the head out, and for a ``memory_budget`` the host waits once.

    Raises:
        ValueError: the budget has no room for a row; on all ranks.
    """
    if layout.class_group is None:
        return chunks.rows_of_chunk(call, rows, linear_weight, needs)
    most = layout.most_classes
    if most is None and call.memory_budget is not None:
        mine = torch.full((), len(linear_weight), dtype=torch.int64, device=linear_weight.device)
        most = int(gather(mine, layout.class_group).max())
    stand_in = linear_weight.new_empty(()).expand(1 if most is None else most, linear_weight.shape[1])
    return chunks.rows_of_chunk(call, rows, stand_in, needs)


class _SharedClasses(Function):
    """(input, linear_weight, linear_bias, target, …) → (loss, *right rows): of this rank's rows, all classes."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        call: LinearOptions,
        layout: Layout,
        backend: Backend,
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.layout, ctx.backend = call, layout, backend
        ctx.accumulated = linear_weight if call.accumulate_grad and linear_weight.requires_grad else None
        needs = Needs(*ctx.needs_input_grad[:4])
        ctx.written = chunks.writes_gradients(call, needs, (input, linear_weight, linear_bias, target))
        ctx.set_materialize_grads(False)
        with torch.autocast(input.device.type, enabled=False):
            loss, right, gradients, kept = _forward(
                input, linear_weight, target, linear_bias, weight, call, layout, needs, ctx.written, backend
            )
        ctx.mark_non_differentiable(*right)
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, kept, *gradients)
        return (loss, *right)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream, nothing = upstreams[0], (None,) * 4
        if upstream is None:
            return (None,) * 8
        if is_differentiable(upstreams[:1]):
            raise RuntimeError(
                "fastloss: linear_cross_entropy over shards of the classes has no second derivative; with "
                "create_graph=True use cross_entropy(torch.nn.functional.linear(input, linear_weight), ...) instead"
            )
        input, linear_weight, linear_bias, target, weight, kept, *written = ctx.saved_tensors
        if ctx.written:
            mine = not graph_is_kept()
            handed = (None if g is None else ctx.backend.rescale(g.detach(), upstream, inplace=mine) for g in written)
            return (*handed, *nothing)
        into = None if ctx.accumulated is None else gradient_of(ctx.accumulated)
        needs = Needs(*ctx.needs_input_grad[:4])
        with torch.autocast(input.device.type, enabled=False), torch.no_grad():
            found = _backward(
                *(upstream, input, linear_weight, target, linear_bias, weight, kept),
                *(ctx.call, ctx.layout, needs, ctx.backend, into),
            )
        return (*found, *nothing)


def _kind(
    z: Tensor, t: Tensor, weight: Tensor | None, call: LinearOptions, layout: Layout, *, ranked: bool
) -> ShardedLoss:
    """What the loss asks of a chunk's rows."""
    labels = None if t.is_floating_point() else t
    label = label_elsewhere(z, t, labels, call.options, layout) if ranked else None
    return ShardedLoss(z, t, labels, weight, call.options, layout, label)


def _coefficients(
    kind: ShardedLoss, numbers: tuple[Tensor | None, ...], upstream: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The rows' losses, and the upstream gradients of the numbers that they are made of."""
    with torch.enable_grad():
        numbers = tuple(None if number is None else number.detach().requires_grad_() for number in numbers)
        values = kind.values(numbers)
        given = [number for number in numbers if number is not None]
        found = iter(
            torch.autograd.grad(values, given, torch.as_tensor(upstream).expand_as(values), allow_unused=True)
        )
    return values.detach(), tuple(None if number is None else next(found) for number in numbers)


def _forward(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    call: LinearOptions,
    layout: Layout,
    needs: Needs,
    written: bool,
    backend: Backend,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...], Tensor]:
    """The loss, the right rows, the gradients where they can be written now, and what the backward pass needs."""
    options, rows = call.options, len(input)
    none, soft, ks = options.reduction == "none", target.is_floating_point(), len(options.topk)
    wide: Any = {"dtype": torch.float64, "device": input.device}
    total: Any = call.total if options.reduction == "mean" else 1.0
    scale = torch.ones((), **wide) / total
    losses = torch.zeros(rows, **wide)
    right = torch.zeros((ks, rows) if none else (ks,), **wide)
    visit = ChunkIterator(rows, linear_weight, target, call, needs)
    sums = GradientAccumulator(
        input, linear_weight, linear_bias, target, visit, needs if written else Needs(*[False] * 4)
    )
    kept = (
        input.new_zeros((3 + soft, rows), dtype=torch.float64) if any(needs) and not written else input.new_empty(0)
    )
    for index, x, t, z in visit.chunks(input, linear_bias):
        kind = _kind(z, t, weight, call, layout, ranked=ks > 0)
        *numbers, rank = kind.visit(z, t, backend)
        values, coefficients = _coefficients(kind, tuple(numbers), scale)
        losses[index] = values
        if rank is not None:
            share = RowReduction(z, None if soft else t, None, options, Layout(layout.classes, rows=len(t)))
            found = share.right(rank)
            if none:
                right[:, index] = found
            else:
                right += found
        if len(kept):
            for place, number in enumerate(numbers):
                if number is not None:
                    kept[place, index] = number
        if written:
            of_logits, of_target = kind.gradients(
                coefficients, z, t, tuple(numbers), (any(needs[:3]), needs.target), backend, inplace=any(needs[:3])
            )
            if of_logits is not None:
                sums.add(index, x, of_logits)
            sums.add_target(index, None if of_target is None else of_target.unsqueeze(2))
            del of_logits, of_target
        del kind, z  # the sums are rounded without the chunk
    loss = losses if none else losses.sum() * scale
    gradients = sums.finished()
    return loss, tuple(right.unbind(0)), _whole_input(gradients, layout), kept


def _backward(
    upstream: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    kept: Tensor,
    call: LinearOptions,
    layout: Layout,
    needs: Needs,
    backend: Backend,
    into: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients from the logits, computed once more; the numbers of their rows are known."""
    smoothing, soft = call.options.label_smoothing != 0, target.is_floating_point()
    total: Any = call.total if call.options.reduction == "mean" else 1.0
    upstream = (upstream.double() / total).expand(len(input))
    visit = ChunkIterator(len(input), linear_weight, target, call, needs)
    sums = GradientAccumulator(input, linear_weight, linear_bias, target, visit, needs, into=into)
    for index, x, t, z in visit.chunks(input, linear_bias):
        kind = _kind(z, t, weight, call, layout, ranked=False)
        numbers = (*kept[: 2 + soft, index].unbind(0), kept[-1, index] if smoothing else None)
        _, coefficients = _coefficients(kind, numbers, upstream[index])
        of_logits, of_target = kind.gradients(
            coefficients, z, t, numbers, (any(needs[:3]), needs.target), backend, inplace=any(needs[:3])
        )
        if of_logits is not None:
            sums.add(index, x, of_logits)
        sums.add_target(index, None if of_target is None else of_target.unsqueeze(2))
        del of_logits, of_target, z  # the sums are rounded without the chunk
    return _whole_input(sums.finished(), layout)


def _whole_input(gradients: chunks.Gradients, layout: Layout) -> tuple[Tensor | None, ...]:
    """The gradients, that of the input over all classes."""
    of_input = gradients.input
    if of_input is not None:
        of_input = all_reduce_detached(of_input, (layout.class_group,))
    return (of_input, *gradients[1:])
