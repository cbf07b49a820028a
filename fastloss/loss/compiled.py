"""The loss as operators of torch, ``torch.ops.fastloss``, for ``torch.compile``.

A compiler does not look into kernels. It gets the shapes of the results (the fake implementations) and the derivative
(a formula in terms of the operators). The backend of a call is chosen from the tensors when the compiled program
runs. A backend that the user asks for (``use_backend``) must be the same when the program is compiled, since the
shapes of what a forward pass saves depend on it.

A compiler takes an operator's float for a constant, and would compile the program again for each value. So numbers
that vary from call to call reach the operators in a tensor on the CPU, and those that lie on the device in another.

Outside of compiled programs :mod:`fastloss.loss.autograd` serves the loss: it costs less per call, and has second
derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import choice
from ..backends.contract import LossOptions, Scalar, compute_dtype
from ..backends.memory import forgetful
from ..backends.torch_private import are_constants
from ..backends.view import class_dim, row_shape
from .autograd import gradients_from_input, visit

__all__ = ["NUMBERS", "OPTIONS", "filled", "loss_and_accuracies", "packed", "register_gradients", "unpacked"]

OPTIONS = (
    "SymInt ignore_index, float label_smoothing, str reduction, float lse_square_scale, float? softcap, int[] topk, "
    "bool from_logits"
)
_COUNT = OPTIONS.count(",") + 1
Numbers = tuple[Tensor | None, float, float, Tensor | None]
# The last arguments. ``numbers``, (5,) float64 on the CPU, take the place of all floats, or (3,) of those among the
# options; ``scalars``, (2,) on the device, that of logit_scale and temperature.
NUMBERS = "Tensor? numbers=None, float logit_scale=1.0, float temperature=1.0, Tensor? scalars=None"
_NO_NUMBERS: Numbers = (None, 1.0, 1.0, None)


def loss_and_accuracies(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, loss_dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss and the accuracies by the operators, ``()`` or ``(rows,)``. The arguments are checked already.

    ``target`` is labels ``(rows,)``, or class probabilities of ``input``'s shape.
    """
    enabled = torch.is_grad_enabled()
    arguments, numbers = packed(options, input.device)
    loss, accuracy, *_ = forward(
        input,
        target,
        weight,
        *arguments,
        loss_dtype,
        enabled and input.requires_grad,
        enabled and target.requires_grad,
        *numbers,
    )
    return loss, () if target.is_floating_point() else tuple(accuracy[i] for i in range(len(options.topk)))


def packed(options: LossOptions, device: torch.device) -> tuple[tuple[Any, ...], Numbers]:
    """Return the options in the order of the operators' schemas, which is that of the fields, and the numbers.

    There is no tensor of numbers where the floats are constants of the program. Else 1 stands for those that are
    used.
    """
    smoothing, scale, cap = options.label_smoothing, options.lse_square_scale, options.softcap
    scales = options.logit_scale, options.temperature
    factor, divisor = (1.0 if isinstance(number, Scalar) else number for number in scales)
    floats = smoothing, scale, 1.0 if cap is None else cap, factor, divisor
    numbers = scalars = None
    if options.scalars():
        wide = torch.float32 if device.type == "mps" else torch.float64
        one = torch.ones((), dtype=wide, device=device)
        scalars = torch.stack([n.tensor.to(wide) if isinstance(n, Scalar) else one * n for n in scales])
        factor = divisor = 1.0
    if torch.compiler.is_dynamo_compiling() and not are_constants(*floats):
        # A compiler makes a tensor of a number that is multiplied, and a constant of one that a tensor is made of.
        one = torch.ones((), dtype=torch.float64, device="cpu")
        numbers = torch.stack([one * number for number in floats])
        smoothing, scale = (0.0 if number == 0 else 1.0 for number in (smoothing, scale))
        cap = None if cap is None else 1.0
        factor = divisor = 1.0
    return (
        options.ignore_index,
        smoothing,
        options.reduction,
        scale,
        cap,
        list(options.topk),
        options.from_logits,
    ), (numbers, factor, divisor, scalars)


def unpacked(packed: Sequence[Any], numbers: Numbers = _NO_NUMBERS) -> LossOptions:
    """Return the options from :func:`packed`. Without ``numbers`` the floats tell only whether they are used."""
    ignore_index, smoothing, reduction, scale, cap, topk, from_logits = packed
    of_call, *pair, scalars = numbers
    factor: float | Scalar
    divisor: float | Scalar
    factor, divisor = pair
    if of_call is not None:
        smoothing, scale, number, *scales = of_call.tolist()
        cap = None if cap is None else number
        factor, divisor = scales or (factor, divisor)
    if scalars is not None:
        factor, divisor = map(Scalar, scalars.unbind(0))
    return LossOptions(
        *(ignore_index, smoothing, reduction, scale, cap, tuple(topk), from_logits),
        logit_scale=factor,
        temperature=divisor,
    )


def filled(arguments: tuple[Any, ...], count: int) -> tuple[tuple[Any, ...], Numbers]:
    """Return an operator's arguments and the numbers behind them, of which torch leaves out the last defaults.

    ``count``: of the arguments without the numbers.
    """
    return arguments[:count], (*arguments[count:], *_NO_NUMBERS[len(arguments) - count :])  # type: ignore[return-value]


def _is_written(input: Tensor, target: Tensor, options: LossOptions, input_needs: bool, target_needs: bool) -> bool:
    """Return True if the forward pass writes the gradients that are needed, as in :mod:`fastloss.loss.autograd`."""
    at_once = options.is_reduced and torch.float16 not in (input.dtype, target.dtype)
    return at_once and (input_needs or target_needs)


@torch.library.custom_op(
    "fastloss::cross_entropy",
    mutates_args=(),
    schema=f"(Tensor input, Tensor target, Tensor? weight, {OPTIONS}, ScalarType loss_dtype, "
    f"bool input_needs_grad, bool target_needs_grad, {NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def forward(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """Return (loss, accuracies, ∂loss/∂input, ∂loss/∂target, 1 / Σ w_y, the backend's numbers of each row).

    A result that the call does not need is empty.
    """
    (*packed, loss_dtype, input_needs, target_needs), numbers = filled(rest, _COUNT + 3)
    options = unpacked(packed, numbers)
    name, soft = choice.choose(input), target.is_floating_point()
    written = _is_written(input, target, options, input_needs, target_needs)
    if not soft and choice.may_look(target):
        checks.check_labels(target, input.shape[class_dim(input)], options.ignore_index)
    with forgetful():
        loss, accuracy, of_input, of_target, saved, _ = visit(
            *(choice.load(name), input, target, weight, options, loss_dtype),
            gradient=written and (input_needs or not soft),
            target_gradient=written and target_needs,
        )
    count = choice.NUMBERS_SAVED[name][soft]
    of_rows, scale = saved[:count], saved[count:]
    return (
        loss,
        torch.stack(accuracy) if accuracy else input.new_empty(0, dtype=torch.float32),
        _laid_out_as(input, of_input),
        _laid_out_as(target, of_target),
        scale[0] if scale else input.new_empty(0, dtype=torch.float64),
        torch.stack(of_rows) if of_rows else input.new_empty(0),
    )


@forward.register_fake
def _(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    (*packed, loss_dtype, input_needs, target_needs), _ = filled(rest, _COUNT + 3)
    options = unpacked(packed)
    written = _is_written(input, target, options, input_needs, target_needs)
    soft = target.is_floating_point()
    rows = math.prod(row_shape(input))
    per_row = () if options.is_reduced else (rows,)
    saved = 0 if written or not options.from_logits else choice.NUMBERS_SAVED[choice.choose(input)][soft]
    saved_dtype = compute_dtype(input.dtype)
    if soft:
        saved_dtype = torch.promote_types(saved_dtype, compute_dtype(target.dtype))
    has_scale = bool(saved) and not soft and options.reduction == "mean"
    accuracies = (len(options.topk), *per_row) if options.topk and not soft else (0,)
    return (
        input.new_empty(per_row, dtype=loss_dtype),
        input.new_empty(accuracies, dtype=torch.float32),
        _empty_like(input, written and input_needs),
        _empty_like(target, written and target_needs),
        input.new_empty(() if has_scale else (0,), dtype=torch.float64),
        input.new_empty((saved, rows), dtype=saved_dtype) if saved else input.new_empty(0),
    )


@torch.library.custom_op(
    "fastloss::cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor input, Tensor target, Tensor? weight, Tensor scale, Tensor kept, "
    f"{OPTIONS}, bool input_needs_grad, bool target_needs_grad, {NUMBERS}) -> (Tensor, Tensor)",
)
def backward(upstream: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients from the input, the target, and the numbers that the forward pass saved."""
    (input, target, weight, scale, kept, *packed, input_needs, target_needs), numbers = filled(inputs, _COUNT + 7)
    options = unpacked(packed, numbers)
    saved = kept.unbind(0) if kept.dim() == 2 else ()
    # Probabilities as input: neither backend saves numbers of them.
    backend = choice.backend_that_saved(len(saved)) if options.from_logits else choice.load(choice.choose(input))
    of_input, of_target = gradients_from_input(
        *(backend, upstream.contiguous(), input, target, weight, options),
        (*saved, scale) if scale.dim() == 0 else saved,
        gradient=input_needs,
        target_gradient=target_needs,
    )
    return _laid_out_as(input, of_input), _laid_out_as(target, of_target)


@backward.register_fake
def _(upstream: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    (input, target, *_, input_needs, target_needs), _ = filled(inputs, _COUNT + 7)
    return _empty_like(input, input_needs), _empty_like(target, target_needs)


def register_gradients(
    forward: Any,
    backward: Any,
    trained: Sequence[int],
    is_written: Callable[..., bool],
    needs_of: Callable[[tuple[Any, ...]], Sequence[bool]],
    backward_options: Callable[[tuple[Any, ...]], tuple[Any, ...]],
) -> None:
    """Register the derivative of an operator that returns (loss, accuracies, *gradients, *saved).

    The gradients are written in the forward pass, at an upstream gradient of 1; or ``backward`` computes them from
    the input tensors and what was saved.

    Args:
        forward: the operator. Tensors, as many as there are gradients and one more, come first in its inputs, and the
            numbers last.
        backward: the operator of the gradients; the numbers are its last inputs.
        trained: which of the inputs have the gradients, in the order of the outputs.
        is_written: whether the forward pass writes the gradients, from its inputs but for the numbers.
        needs_of: which gradients are needed, from the inputs that follow the tensors.
        backward_options: the last arguments of ``backward``, from the same.
    """
    count = len(trained)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (numbers, *ctx.scales, scalars), inputs = inputs[-4:], inputs[:-4]
        tensors, ctx.options = inputs[: count + 1], inputs[count + 1 :]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.written = is_written(*inputs)
        needed = output[2 : 2 + count] if ctx.written else (*tensors, *output[2 + count :], numbers, scalars)
        ctx.save_for_backward(*needed)

    def differentiate(ctx: Any, of_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "fastloss: the loss as an operator, of compilers and dispatch modes, has no second derivative; "
                "call it outside of torch.compile with create_graph=True, and outside of the mode"
            )
        results: list[Tensor | None] = [None] * (count + 5 + len(ctx.options))
        if of_loss is not None:
            if ctx.written:
                gradients = [gradient * of_loss for gradient in ctx.saved_tensors]
            else:
                *saved, numbers, scalars = ctx.saved_tensors
                options = *backward_options(ctx.options), numbers, *ctx.scales, scalars
                gradients = backward(of_loss, *saved, *options)
            for place, gradient, needed in zip(trained, gradients, needs_of(ctx.options), strict=True):
                results[place] = gradient if needed else None
        return tuple(results)

    forward.register_autograd(differentiate, setup_context=setup_context)


register_gradients(
    forward,
    backward,
    trained=(0, 1),
    is_written=lambda input, target, weight, *rest: _is_written(input, target, unpacked(rest[:-3]), *rest[-2:]),
    needs_of=lambda options: options[-2:],
    backward_options=lambda options: (*options[:-3], *options[-2:]),
)


def _laid_out_as(like: Tensor, gradient: Tensor | None) -> Tensor:
    """Return ``gradient`` with the strides that the fake implementation foretold; an empty tensor for None."""
    if gradient is None:
        return like.new_empty(0)
    expected = torch.empty_like(like, device="meta").stride()
    if gradient.stride() == expected:
        return gradient
    return torch.empty_strided(like.shape, expected, dtype=like.dtype, device=like.device).copy_(gradient)


def _empty_like(tensor: Tensor, needed: bool) -> Tensor:
    return torch.empty_like(tensor) if needed else tensor.new_empty(0)
