"""The ``torch.autograd.Function`` of :func:`fastloss.linear_cross_entropy`.

As in :mod:`fastloss.loss.autograd` the gradients are written in the forward pass where they can be, at an upstream
gradient of 1, and handed over in backward. Input, weights and target are saved all the same, which costs nothing:
they are the caller's tensors. Derivatives past the first are taken from them by torch's own operators, which hold the
logits then.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends.torch_private import any_autocast
from ..loss.autograd import handed_over, is_differentiable
from . import chunks
from .chunks import NO_GRADIENTS, Losses, Needs, Tensors

__all__ = ["by_chunks"]


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast leaves the products on ``tensor``'s device as they are."""
    return torch.autocast(tensor.device.type, enabled=False) if any_autocast() else nullcontext()


def by_chunks(tensors: Tensors, losses: Losses) -> tuple[Tensor, ...]:
    """Return the outputs of ``losses``, with a graph where a tensor needs one; ``()`` or ``(rows,)`` each."""
    if torch.is_grad_enabled() and any(tensors.needs()):
        return cast("tuple[Tensor, ...]", _LinearCrossEntropy.apply(*tensors, losses))
    with torch.no_grad(), _without_autocast(tensors.input):
        return losses.outputs(chunks.forward(tensors, NO_GRADIENTS, losses), tensors.target)


class _LinearCrossEntropy(Function):
    """(*tensors, losses) → the losses' outputs: (loss, *accuracies), or numbers of each row."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        tensors, losses = Tensors(*arguments[:4]), arguments[4]
        needs, call = Needs(*ctx.needs_input_grad[:4]), losses.call
        ctx.losses, ctx.written = losses, chunks.writes_gradients(call, needs, tensors)
        # The tensor itself: a saved one may come back as a copy, by a checkpoint or a hook, whose .grad is not read.
        weight = tensors.linear_weight
        ctx.accumulated = weight if call.accumulate_grad and weight.requires_grad else None
        with _without_autocast(weight):
            result = chunks.forward(tensors, needs, losses)
        outputs = losses.outputs(result, tensors.target)
        ctx.mark_non_differentiable(*outputs[losses.differentiable :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, losses.weight, result.saved, *result.gradients, *call.options.scalars())
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        losses = ctx.losses
        upstreams = upstreams[: losses.differentiable]
        if all(upstream is None for upstream in upstreams):
            return (None,) * 5
        if is_differentiable(upstreams):
            losses.refuse_second_derivative()
            return (*_differentiable(ctx, upstreams), None)
        input, linear_weight, linear_bias, target, _, saved, *written = ctx.saved_tensors
        if ctx.written:
            return (*handed_over(losses.backend, written[:4], upstreams[0]), None)
        tensors, needs = Tensors(input, linear_weight, linear_bias, target), Needs(*ctx.needs_input_grad[:4])
        into = None if ctx.accumulated is None else _gradient_of(ctx.accumulated)
        with _without_autocast(input), torch.no_grad():
            gradients = chunks.backward(upstreams, tensors, saved, needs, losses, into)
        return (*gradients, None)


def _gradient_of(leaf: Tensor) -> Tensor:
    """Return ``leaf.grad``, creating zeros if it is None."""
    if leaf.grad is None:
        leaf.grad = torch.zeros_like(leaf, dtype=leaf.grad_dtype)
    elif leaf.grad.layout != torch.strided:
        raise RuntimeError(
            f"fastloss: linear_weight.grad has layout {leaf.grad.layout} (of an embedding with sparse=True?), and "
            "accumulate_grad=True adds to a dense one; set it to None, or pass accumulate_grad=False"
        )
    return leaf.grad


def _differentiable(ctx: Any, upstreams: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the gradients as functions of the tensors and ``upstreams`` that autograd can differentiate again."""
    input, linear_weight, linear_bias, target, weight, *_ = ctx.saved_tensors
    tensors = [input, linear_weight, linear_bias, target]
    call = ctx.losses.call
    create_graph = torch.is_grad_enabled()
    if create_graph:
        # One tensor may be computed from another (hidden states of a tied embedding). Each view gets its own part
        # alone.
        tensors = [None if t is None else t.view_as(t) for t in tensors]
    else:
        tensors = [
            None if t is None else t.detach().requires_grad_(needed)
            for t, needed in zip(tensors, ctx.needs_input_grad, strict=False)
        ]
    wanted = [t for t, needed in zip(tensors, ctx.needs_input_grad, strict=False) if needed]
    x, w, b, t = tensors
    dtype = call.compute_dtype
    with torch.enable_grad(), _without_autocast(x):
        x = chunks.of_counted(x, ctx.losses.counted(t))
        narrow = Tensors(x.to(dtype), w.to(dtype), None if b is None else b.to(dtype), t)
        logits = chunks.logits_of(narrow, call).to(call.loss_dtype)
        of_classes = None if weight is None else weight.to(logits.dtype)
        outputs = ctx.losses.composed(logits, t, of_classes)
        pairs = [(output, up) for output, up in zip(outputs, upstreams, strict=True) if up is not None]
        given = [up.to(output.dtype) for output, up in pairs]
        gradients = torch.autograd.grad([output for output, _ in pairs], wanted, given, create_graph=create_graph)
    results = iter(gradients)
    return tuple(next(results) if needed else None for needed in ctx.needs_input_grad[:4])
