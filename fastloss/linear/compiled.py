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
from ..loss.compiled import NUMBERS, OPTIONS, filled, packed, register_gradients, unpacked
from . import chunks
from .chunks import NO_GRADIENTS, Gradients, LinearOptions, Losses, Needs, Tensors

__all__ = ["count_operations_in", "linear_loss_and_accuracies"]

_TENSORS = "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight"
_OPTIONS = (
    f"{OPTIONS}, ScalarType compute_dtype, ScalarType loss_dtype, SymInt? chunk_size, SymInt? memory_budget, "
    "bool? skip_ignored, bool[] needs"
)
_COUNT = f"{_TENSORS}, {_OPTIONS}".count(",") + 1


def linear_loss_and_accuracies(
    tensors: Tensors, weight: Tensor | None, call: LinearOptions
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss and the accuracies by the operators, ``()`` or ``(rows,)``. The arguments are checked."""
    needs = tensors.needs() if torch.is_grad_enabled() else NO_GRADIENTS
    input, linear_weight, linear_bias, target = tensors
    options, numbers = packed(call.options, input.device)
    with torch.autocast(input.device.type, enabled=False):
        loss, accuracy, *_ = forward(
            *(input, linear_weight, target, linear_bias, weight, *options, call.compute_dtype, call.loss_dtype),
            *(call.chunk_size, call.memory_budget, call.skip_ignored, list(needs), *numbers),
        )
    return loss, tuple(accuracy[i] for i in range(len(call.options.topk)))


def _unpacked(inputs: tuple[Any, ...], *, reads: bool = False) -> tuple[Tensors, Tensor | None, LinearOptions, Needs]:
    """Return the tensors, the class weights, the options and the needs from the inputs of an operator.

    ``reads``: the numbers that vary from call to call are read.
    """
    (input, linear_weight, target, linear_bias, weight, *options), numbers = filled(inputs, _COUNT)
    *loss_options, compute_dtype, loss_dtype, chunk_size, memory_budget, skip_ignored, needs = options
    of_loss = unpacked(loss_options, numbers) if reads else unpacked(loss_options)
    call = LinearOptions(of_loss, compute_dtype, loss_dtype, chunk_size, memory_budget, skip_ignored)
    return Tensors(input, linear_weight, linear_bias, target), weight, call, Needs(*needs)


@torch.library.custom_op(
    "fastloss::linear_cross_entropy",
    mutates_args=(),
    schema=f"({_TENSORS}, {_OPTIONS}, {NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def forward(*inputs: Any) -> tuple[Tensor, ...]:
    """Return the loss, the accuracies, four gradients and the backend's numbers of each row.

    The gradients are of input, linear_weight, linear_bias and target. A result that the call does not need is empty.
    """
    tensors, weight, call, needs = _unpacked(inputs, reads=True)
    input, target = tensors.input, tensors.target
    if not target.is_floating_point() and choice.may_look(target):
        checks.check_labels(target, len(tensors.linear_weight), call.options.ignore_index)
    with forgetful():
        losses = Losses(weight, call, choice.load(choice.choose(input)))
        loss, accuracy, gradients, saved = chunks.forward(tensors, needs, losses)
    right = torch.stack(accuracy) if accuracy else input.new_empty(0, dtype=torch.float32)
    shape, dtype = _saved(tensors, call, needs)
    if saved.shape != shape:  # every row is ignored, and was left out
        saved = input.new_zeros(shape, dtype=dtype)
    return loss, right, *_filled(gradients, input), saved


@forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    tensors, _, call, needs = _unpacked(inputs)
    input, ks = tensors.input, len(call.options.topk)
    per_row = () if call.options.is_reduced else (input.shape[0],)
    written = chunks.writes_gradients(call, needs, tensors)
    shape, dtype = _saved(tensors, call, needs)
    return (
        input.new_empty(per_row, dtype=call.loss_dtype),
        input.new_empty((ks, *per_row) if ks else (0,), dtype=torch.float32),
        *_fake_gradients(tensors, needs if written else NO_GRADIENTS),
        input.new_empty(shape, dtype=dtype),
    )


@torch.library.custom_op(
    "fastloss::linear_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {_TENSORS}, Tensor kept, {_OPTIONS}, {NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward(upstream: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Return the gradients of input, linear_weight, linear_bias and target from the logits, computed once more."""
    saved = inputs[5]
    tensors, weight, call, needs = _unpacked((*inputs[:5], *inputs[6:]), reads=True)
    losses = Losses(weight, call, choice.backend_that_saved(len(saved)))
    return _filled(chunks.backward((upstream,), tensors, saved, needs, losses), tensors.input)


@backward.register_fake
def _(upstream: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    tensors, _, _, needs = _unpacked((*inputs[:5], *inputs[6:]))
    return _fake_gradients(tensors, needs)


def _saved(tensors: Tensors, call: LinearOptions, needs: Needs) -> tuple[tuple[int, int], torch.dtype]:
    """Return the shape and dtype of the numbers that the forward pass saves."""
    input, target = tensors.input, tensors.target
    name, soft = choice.choose(input), target.is_floating_point()
    written = chunks.writes_gradients(call, needs, tensors)
    count = choice.NUMBERS_SAVED[name][soft] if any(needs) and not written else 0
    if not count:
        return (0, input.shape[0]), input.dtype
    wide = torch.promote_types(call.compute_dtype, target.dtype) if soft else call.compute_dtype
    return (count, input.shape[0]), compute_dtype(wide)


def _filled(gradients: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients)


def _fake_gradients(tensors: Tensors, needs: Needs) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device)
        if needed and t is not None
        else tensors.input.new_empty(0)
        for t, needed in zip(tensors, needs, strict=True)
    )


def count_operations_in(modes: Sequence[Any]) -> None:
    """Let those of the dispatch modes that are torch's ``FlopCounterMode`` count the products in these operators."""
    for mode in modes:
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(registry, dict):
            registry.setdefault(torch.ops.fastloss.linear_cross_entropy, _operations)
            registry.setdefault(torch.ops.fastloss.linear_cross_entropy_backward, _operations_backward)


def _operations(*inputs: Any, out_val: Any = None) -> int:
    tensors, _, call, needs = _unpacked(inputs)
    written = chunks.writes_gradients(call, needs, tensors)
    return _of_a_product(tensors) * (1 + written * (needs.input + needs.linear_weight))


def _operations_backward(upstream: Tensor, *inputs: Any, out_val: Any = None) -> int:
    tensors, _, _, needs = _unpacked((*inputs[:5], *inputs[6:]))
    return _of_a_product(tensors) * (1 + needs.input + needs.linear_weight)


def _of_a_product(tensors: Tensors) -> int:
    return 2 * tensors.input.shape[0] * tensors.linear_weight.numel()


def _is_written(*inputs: Any) -> bool:
    tensors, _, call, needs = _unpacked(inputs)
    return chunks.writes_gradients(call, needs, tensors)


register_gradients(
    forward,
    backward,
    trained=(0, 1, 3, 2),
    is_written=_is_written,
    needs_of=lambda options: options[-1],
    backward_options=lambda options: options,
)
