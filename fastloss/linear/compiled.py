"""The linear map and its loss as operators of torch, for ``torch.compile``, as in :mod:`fastloss.loss.compiled`.

One operator gives the loss and, where they can be written at once, the gradients; another gives the gradients that
must wait for the upstream gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import choice
from ..backends.contract import compute_dtype
from ..backends.memory import forgetful
from ..loss.compiled import OPTIONS, packed, register_gradients, unpacked
from . import chunks
from .chunks import NO_GRADIENTS, Gradients, LinearOptions, Losses, Needs

__all__ = ["linear_loss_and_accuracies"]

_TENSORS = "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight"
_OPTIONS = (
    f"{OPTIONS}, ScalarType compute_dtype, ScalarType loss_dtype, int? chunk_size, int? memory_budget, "
    "bool? skip_ignored, bool[] needs"
)


def linear_loss_and_accuracies(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    call: LinearOptions,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss and the accuracies by the operators, ``()`` or ``(rows,)``. The arguments are checked."""
    needs = Needs.of(input, linear_weight, linear_bias, target) if torch.is_grad_enabled() else NO_GRADIENTS
    loss, accuracy, *_ = forward(
        *(input, linear_weight, target, linear_bias, weight, *packed(call.options)),
        *(call.compute_dtype, call.loss_dtype, call.chunk_size, call.memory_budget, call.skip_ignored, list(needs)),
    )
    return loss, tuple(accuracy[i] for i in range(len(call.options.topk)))


def _unpacked(packed_options: Sequence[Any]) -> tuple[LinearOptions, Needs]:
    """Return the options, and which gradients are needed."""
    *options, compute_dtype, loss_dtype, chunk_size, memory_budget, skip_ignored, needs = packed_options
    call = LinearOptions(unpacked(options), compute_dtype, loss_dtype, chunk_size, memory_budget, skip_ignored)
    return call, Needs(*needs)


@torch.library.custom_op(
    "fastloss::linear_cross_entropy",
    mutates_args=(),
    schema=f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def forward(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    *packed_options: Any,
) -> tuple[Tensor, ...]:
    """Return the loss, the accuracies, four gradients and the backend's numbers of each row.

    The gradients are of input, linear_weight, linear_bias and target. A result that the call does not need is empty.
    """
    call, needs = _unpacked(packed_options)
    if not target.is_floating_point() and choice.may_look(target):
        checks.check_labels(target, len(linear_weight), call.options.ignore_index)
    losses = Losses(weight, call, choice.load(choice.choose(input)))
    with forgetful():
        loss, accuracy, gradients, saved = chunks.forward(input, linear_weight, target, linear_bias, needs, losses)
    right = torch.stack(accuracy) if accuracy else input.new_empty(0, dtype=torch.float32)
    shape, dtype = _saved(input, linear_weight, linear_bias, target, call, needs)
    if saved.shape != shape:  # every row is ignored, and was left out
        saved = input.new_zeros(shape, dtype=dtype)
    return loss, right, *_filled(gradients, input), saved


@forward.register_fake
def _(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    *packed_options: Any,
) -> tuple[Tensor, ...]:
    call, needs = _unpacked(packed_options)
    options, rows = call.options, input.shape[0]
    per_row = () if options.is_reduced else (rows,)
    written = chunks.writes_gradients(call, needs, (input, linear_weight, linear_bias, target))
    saved_shape, saved_dtype = _saved(input, linear_weight, linear_bias, target, call, needs)
    return (
        input.new_empty(per_row, dtype=call.loss_dtype),
        input.new_empty((len(options.topk), *per_row) if options.topk else (0,), dtype=torch.float32),
        *_fake_gradients(input, linear_weight, linear_bias, target, needs if written else NO_GRADIENTS),
        input.new_empty(saved_shape, dtype=saved_dtype),
    )


@torch.library.custom_op(
    "fastloss::linear_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {_TENSORS}, Tensor kept, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward(
    upstream: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    kept: Tensor,
    *packed_options: Any,
) -> tuple[Tensor, ...]:
    """Return the gradients of input, linear_weight, linear_bias and target from the logits, computed once more."""
    call, needs = _unpacked(packed_options)
    losses = Losses(weight, call, choice.backend_that_saved(len(kept)))
    gradients = chunks.backward(upstream, input, linear_weight, target, linear_bias, kept, needs, losses)
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
    *packed_options: Any,
) -> tuple[Tensor, ...]:
    return _fake_gradients(input, linear_weight, linear_bias, target, _unpacked(packed_options)[1])


def _saved(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    call: LinearOptions,
    needs: Needs,
) -> tuple[tuple[int, int], torch.dtype]:
    """Return the shape and dtype of the numbers that the forward pass saves."""
    written = chunks.writes_gradients(call, needs, (input, linear_weight, linear_bias, target))
    name, soft = choice.choose(input), target.is_floating_point()
    count = choice.NUMBERS_SAVED[name][soft] if any(needs) and not written else 0
    if not count:
        return (0, input.shape[0]), input.dtype
    wide = torch.promote_types(call.compute_dtype, target.dtype) if soft else call.compute_dtype
    return (count, input.shape[0]), compute_dtype(wide)


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


def _is_written(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    *packed_options: Any,
) -> bool:
    return chunks.writes_gradients(*_unpacked(packed_options), (input, linear_weight, linear_bias, target))


register_gradients(
    forward,
    backward,
    inputs=(0, 1, 3, 2),
    is_written=_is_written,
    needs_of=lambda options: options[-1],
    backward_options=lambda options: options,
)
