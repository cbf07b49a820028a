"""The ``torch.autograd.Function`` of :func:`fastloss.linear_cross_entropy`.

As in :mod:`fastloss.loss.autograd` the gradients are written in the forward pass where they can be, at an upstream
gradient of 1, and handed over in backward. Input, weights and target are kept all the same: they are somebody else's
tensors, so that it costs nothing, and derivatives past the first are taken from them by torch's own operators, which
hold the logits then.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..backends.contract import Backend
from ..loss import composite
from ..loss.autograd import graph_is_kept, is_differentiable
from . import chunks
from .chunks import LinearOptions, Needs

__all__ = ["fused_linear_cross_entropy", "gradient_of"]


def fused_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    call: LinearOptions,
    backend: Backend,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, with a graph where something needs one, and the accuracies; ``()`` or ``(rows,)``.

    Shapes as in :func:`fastloss.linear.chunks.forward`.
    """
    tensors = (input, linear_weight, linear_bias, target)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
            result = chunks.forward(
                input, linear_weight, target, linear_bias, weight, call, Needs(*[False] * 4), backend
            )
        return result.loss, result.accuracy
    loss, *accuracy = _LinearCrossEntropy.apply(input, linear_weight, linear_bias, target, weight, call, backend)
    return loss, tuple(accuracy)


class _LinearCrossEntropy(Function):
    """(input, linear_weight, linear_bias, target, …) → (loss, *accuracies)."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        call: LinearOptions,
        backend: Backend,
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.backend = call, backend
        # Itself: a saved tensor may come back as a copy, by a checkpoint or another hook, whose .grad nobody reads.
        ctx.accumulated = linear_weight if call.accumulate_grad and linear_weight.requires_grad else None
        needs = Needs(*ctx.needs_input_grad[:4])
        ctx.written = chunks.writes_gradients(call, needs, (input, linear_weight, linear_bias, target))
        with torch.autocast(input.device.type, enabled=False):
            result = chunks.forward(input, linear_weight, target, linear_bias, weight, call, needs, backend)
        ctx.mark_non_differentiable(*result.accuracy)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, result.kept, *result.gradients)
        return (result.loss, *result.accuracy)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream, nothing = upstreams[0], (None,) * 3
        if upstream is None:
            return (None,) * 7
        input, linear_weight, linear_bias, target, weight, kept, *written = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[:4])
        if is_differentiable(upstreams[:1]):
            return (*_differentiable(ctx, upstream), *nothing)
        if ctx.written:
            mine = not graph_is_kept()
            handed = (None if g is None else ctx.backend.rescale(g.detach(), upstream, inplace=mine) for g in written)
            return (*handed, *nothing)
        into = None if ctx.accumulated is None else gradient_of(ctx.accumulated)
        with torch.autocast(input.device.type, enabled=False), torch.no_grad():
            result = chunks.backward(
                *(upstream, input, linear_weight, target, linear_bias, weight, kept),
                *(ctx.call, needs, ctx.backend, into),
            )
        return (*result, *nothing)


def gradient_of(leaf: Tensor) -> Tensor:
    """Its ``.grad``, to add to."""
    if leaf.grad is None:
        leaf.grad = torch.zeros_like(leaf, dtype=leaf.grad_dtype)
    elif leaf.grad.layout != torch.strided:
        raise RuntimeError(
            f"fastloss: linear_weight.grad has layout {leaf.grad.layout} (of an embedding with sparse=True?), and "
            "accumulate_grad=True adds to a dense one; set it to None, or pass accumulate_grad=False"
        )
    return leaf.grad


def _differentiable(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions of the tensors and ``upstream`` that autograd can differentiate again."""
    input, linear_weight, linear_bias, target, weight, *_ = ctx.saved_tensors
    tensors = [input, linear_weight, linear_bias, target]
    create_graph = torch.is_grad_enabled()
    if create_graph:
        # One may be made of another, as hidden states of a tied embedding are: a view stands for its own part alone.
        tensors = [None if t is None else t.view_as(t) for t in tensors]
    else:
        tensors = [
            None if t is None else t.detach().requires_grad_(needed)
            for t, needed in zip(tensors, ctx.needs_input_grad, strict=False)
        ]
    wanted = [t for t, needed in zip(tensors, ctx.needs_input_grad, strict=False) if needed]
    x, w, b, t = tensors
    dtype = ctx.call.compute_dtype
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        narrow = (None if each is None else each.to(dtype) for each in (x, w, b))
        logits = F.linear(*narrow).to(ctx.call.loss_dtype)  # type: ignore[arg-type]
        of_classes = None if weight is None else weight.to(logits.dtype)
        options, total = ctx.call.options, ctx.call.total
        if total is not None and options.reduction == "mean":
            upstream, options = upstream / total, dataclasses.replace(options, reduction="sum")
        loss = composite.cross_entropy(logits, t, of_classes, options)
        results = iter(torch.autograd.grad(loss, wanted, upstream.to(loss.dtype), create_graph=create_graph))
    return tuple(next(results) if needed else None for needed in ctx.needs_input_grad[:4])
