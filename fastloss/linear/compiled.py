"""The linear map and its loss as operators of torch, for ``torch.compile``; compare :mod:`fastloss.loss.compiled`.

One operator for the loss and, where they can be written at once, the gradients; one for the gradients that must wait
for the upstream one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import choice
from ..backends.contract import may_keep_memory
from ..loss.compiled import KEPT, OPTIONS, packed, unpacked
from . import chunks
from .chunks import Gradients, LinearOptions, Needs

__all__ = ["loss_and_accuracy"]

_TENSORS = "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight"
_HOW = (
    f"{OPTIONS}, ScalarType compute_dtype, ScalarType loss_dtype, int? chunk_size, int? memory_budget, "
    "bool? skip_ignored, bool[] needs"
)


def loss_and_accuracy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    call: LinearOptions,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and the accuracies, ``()`` or ``(rows,)``; the arguments are checked."""
    enabled = torch.is_grad_enabled()
    needs = [enabled and t is not None and t.requires_grad for t in (input, linear_weight, linear_bias, target)]
    loss, accuracy, *_ = forward(
        *(input, linear_weight, target, linear_bias, weight, *packed(call.options)),
        *(call.compute_dtype, call.loss_dtype, call.chunk_size, call.memory_budget, call.skip_ignored, needs),
    )
    return loss, tuple(accuracy[i] for i in range(len(call.options.topk)))


def _unpacked(how: tuple[Any, ...]) -> tuple[LinearOptions, Needs]:
    *options, compute_dtype, loss_dtype, chunk_size, memory_budget, skip_ignored, needs = how
    call = LinearOptions(unpacked(options), compute_dtype, loss_dtype, chunk_size, memory_budget, skip_ignored)
    return call, Needs(*needs)


@torch.library.custom_op(
    "fastloss::linear_cross_entropy",
    mutates_args=(),
    schema=f"({_TENSORS}, {_HOW}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def forward(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    *how: Any,
) -> tuple[Tensor, ...]:
    """(loss, accuracies, the gradients of input, linear_weight, linear_bias and target, the backend's numbers).

    What a call has no use for is empty.
    """
    call, needs = _unpacked(how)
    if not target.is_floating_point() and (target.is_cpu or choice.validates()):
        checks.check_labels(target, len(linear_weight), call.options.ignore_index)
    forgetful = may_keep_memory.set(False)
    try:
        loss, accuracy, gradients, kept = chunks.forward(
            *(input, linear_weight, target, linear_bias, weight, call, needs), choice.load(choice.choose(input))
        )
    finally:
        may_keep_memory.reset(forgetful)
    right = torch.stack(accuracy) if accuracy else input.new_empty(0, dtype=torch.float32)
    expected = _fake_kept(input, linear_weight, linear_bias, target, call, needs)
    if kept.shape != expected[0]:  # every row is ignored, and was left out
        kept = input.new_zeros(expected[0], dtype=expected[1])
    return loss, right, *_filled(gradients, input), kept


@forward.register_fake
def _(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    *how: Any,
) -> tuple[Tensor, ...]:
    call, needs = _unpacked(how)
    options, rows = call.options, input.shape[0]
    per_row = (rows,) if options.reduction == "none" else ()
    written = chunks.writes_gradients(call, needs, (input, linear_weight, linear_bias, target))
    kept_shape, kept_dtype = _fake_kept(input, linear_weight, linear_bias, target, call, needs)
    return (
        input.new_empty(per_row, dtype=call.loss_dtype),
        input.new_empty((len(options.topk), *per_row) if options.topk else (0,), dtype=torch.float32),
        *_fake_gradients(input, linear_weight, linear_bias, target, needs if written else Needs(*[False] * 4)),
        input.new_empty(kept_shape, dtype=kept_dtype),
    )


@torch.library.custom_op(
    "fastloss::linear_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {_TENSORS}, Tensor kept, {_HOW}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward(
    upstream: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    kept: Tensor,
    *how: Any,
) -> tuple[Tensor, ...]:
    """The gradients of input, linear_weight, linear_bias and target, from the logits, computed once more."""
    call, needs = _unpacked(how)
    # The forward pass's own backend, whichever would be chosen now: it is known by what it kept.
    served = choice.load("triton" if len(kept) else "eager")
    gradients = chunks.backward(
        upstream, input, linear_weight, target, linear_bias, weight, kept, call, needs, served
    )
    return _filled(gradients, input)


@backward.register_fake
def _(
    upstream: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    kept: Tensor,
    *how: Any,
) -> tuple[Tensor, ...]:
    return _fake_gradients(input, linear_weight, linear_bias, target, _unpacked(how)[1])


def _fake_kept(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    call: LinearOptions,
    needs: Needs,
) -> tuple[tuple[int, int], torch.dtype]:
    """The shape and dtype of the backend's numbers."""
    written = chunks.writes_gradients(call, needs, (input, linear_weight, linear_bias, target))
    kept = KEPT[choice.choose(input)][target.is_floating_point()] if any(needs) and not written else 0
    if not kept:
        return (0, input.shape[0]), input.dtype
    wide = torch.float64 in (call.compute_dtype, target.dtype)
    return (kept, input.shape[0]), torch.float64 if wide else torch.float32


def _filled(gradients: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients)


def _fake_gradients(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, needs: Needs
) -> tuple[Tensor, ...]:
    tensors = (input, linear_weight, linear_bias, target)
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed and t is not None else input.new_empty(0)
        for t, needed in zip(tensors, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.how = *inputs[:5], inputs[5:]
    call, ctx.needs = _unpacked(ctx.how)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    input, linear_weight, target, linear_bias, _ = tensors
    ctx.written = chunks.writes_gradients(call, ctx.needs, (input, linear_weight, linear_bias, target))
    ctx.save_for_backward(*(output[2:6] if ctx.written else (*tensors, output[6])))


def _differentiate(ctx: Any, of_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.how)
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            "fastloss: the compiled loss has no second derivative, as nothing compiled by AOTAutograd has; "
            "call it outside of torch.compile with create_graph=True"
        )
    if of_loss is None:
        return (None,) * 5 + nothing
    if ctx.written:
        found = [g * of_loss for g in ctx.saved_tensors]
    else:
        found = list(backward(of_loss, *ctx.saved_tensors, *ctx.how))
    of_input, of_weight, of_bias, of_target = (g if n else None for g, n in zip(found, ctx.needs, strict=True))
    return (of_input, of_weight, of_target, of_bias, None, *nothing)


forward.register_autograd(_differentiate, setup_context=_setup_context)
