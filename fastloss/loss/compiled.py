"""The loss as operators of torch, ``torch.ops.fastloss``: what ``torch.compile`` sees of it.

A compiler can't look into kernels and chunks, and need not: it is told the shapes of the results (the fake
implementations) and the derivative (a formula in terms of the operators). Which backend serves a call is decided by
the tensors when the compiled program runs; one that is asked for (``use_backend``) must be so when it is compiled,
too, since the shapes of what a forward pass keeps depend on it.

Outside of compiled programs nothing goes through here: :mod:`fastloss.loss.autograd` is lighter, and has second
derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import choice
from ..backends.contract import LossOptions, compute_dtype, may_keep_memory
from .autograd import as_rows

__all__ = ["KEPT", "OPTIONS", "loss_and_accuracy", "packed", "unpacked"]

# Numbers a row that the forward pass of a backend keeps for its backward pass: (class indices, soft targets).
KEPT = {"eager": (0, 0), "triton": (2, 3)}

OPTIONS = (
    "int ignore_index, float label_smoothing, str reduction, float lse_square_scale, float? softcap, int[] topk, "
    "bool from_logits"
)


def loss_and_accuracy(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, loss_dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and the accuracies through the operators, as ``()`` or ``(rows,)``; the arguments are checked.

    ``target`` is flat, or soft and of ``input``'s shape.
    """
    enabled = torch.is_grad_enabled()
    loss, accuracy, *_ = forward(
        input,
        target,
        weight,
        *packed(options),
        loss_dtype,
        enabled and input.requires_grad,
        enabled and target.requires_grad,
    )
    return loss, () if target.is_floating_point() else tuple(accuracy[i] for i in range(len(options.topk)))


def packed(options: LossOptions) -> tuple[Any, ...]:
    """The options in the order of the operators' schemas, which is that of their fields."""
    return (
        options.ignore_index,
        options.label_smoothing,
        options.reduction,
        options.lse_square_scale,
        options.softcap,
        list(options.topk),
        options.from_logits,
    )


def unpacked(packed: Sequence[Any]) -> LossOptions:
    ignore_index, label_smoothing, reduction, lse_square_scale, softcap, topk, from_logits = packed
    return LossOptions(ignore_index, label_smoothing, reduction, lse_square_scale, softcap, tuple(topk), from_logits)


def _is_written(input: Tensor, target: Tensor, options: LossOptions, input_needs: bool, target_needs: bool) -> bool:
    """Are the gradients that are needed written in the forward pass? As in :mod:`fastloss.loss.autograd`."""
    at_once = options.reduction != "none" and torch.float16 not in (input.dtype, target.dtype)
    return at_once and (input_needs or target_needs)


@torch.library.custom_op(
    "fastloss::cross_entropy",
    mutates_args=(),
    schema=f"(Tensor input, Tensor target, Tensor? weight, {OPTIONS}, ScalarType loss_dtype, "
    "bool input_needs_grad, bool target_needs_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def forward(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """(loss, accuracies, ∂loss/∂input, ∂loss/∂target, 1 / Σ w_y, the backend's numbers of each row).

    What a call has no use for is empty.
    """
    kept = may_keep_memory.set(False)
    try:
        return _forward(input, target, weight, *rest)
    finally:
        may_keep_memory.reset(kept)


def _forward(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *packed, loss_dtype, input_needs, target_needs = rest
    options = unpacked(packed)
    served = choice.load(choice.choose(input))
    logits = as_rows(input)
    written = _is_written(input, target, options, input_needs, target_needs)
    scale = of_target = None
    accuracy: tuple[Tensor, ...] = ()
    if target.is_floating_point():
        loss, of_input, of_target, saved = served.soft_cross_entropy_forward(
            logits,
            as_rows(target),
            weight,
            options,
            loss_dtype=loss_dtype,
            gradient=written and input_needs,
            target_gradient=written and target_needs,
            inplace=False,
        )
    else:
        if target.is_cpu or choice.validates():
            checks.check_labels(target, logits.shape[1], options.ignore_index)
        loss, accuracy, of_input, saved, _ = served.cross_entropy_forward(
            logits, target, weight, options, loss_dtype=loss_dtype, gradient=written, inplace=False
        )
        if len(saved) > 2:
            *saved, scale = saved  # type: ignore[assignment]
    return (
        loss,
        torch.stack(accuracy) if accuracy else input.new_empty(0, dtype=torch.float32),
        input.new_empty(0) if of_input is None else _laid_out_as(input, of_input),
        target.new_empty(0) if of_target is None else _laid_out_as(target, of_target),
        input.new_empty(0, dtype=torch.float64) if scale is None else scale,
        torch.stack(tuple(saved)) if saved else input.new_empty(0),
    )


@forward.register_fake
def _(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *packed, loss_dtype, input_needs, target_needs = rest
    options = unpacked(packed)
    written = _is_written(input, target, options, input_needs, target_needs)
    soft = target.is_floating_point()
    rows = as_rows(input).shape[0] * as_rows(input).shape[2]
    per_row = (rows,) if options.reduction == "none" else ()
    kept = 0 if written or not options.from_logits else KEPT[choice.choose(input)][soft]
    kept_dtype = compute_dtype(input.dtype)
    if soft:
        kept_dtype = torch.promote_types(kept_dtype, compute_dtype(target.dtype))
    has_scale = bool(kept) and not soft and options.reduction == "mean"
    accuracies = (len(options.topk), *per_row) if options.topk and not soft else (0,)
    return (
        input.new_empty(per_row, dtype=loss_dtype),
        input.new_empty(accuracies, dtype=torch.float32),
        torch.empty_like(input) if written and input_needs else input.new_empty(0),
        torch.empty_like(target) if written and target_needs else target.new_empty(0),
        input.new_empty(() if has_scale else (0,), dtype=torch.float64),
        input.new_empty((kept, rows), dtype=kept_dtype) if kept else input.new_empty(0),
    )


@torch.library.custom_op(
    "fastloss::cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor input, Tensor target, Tensor? weight, Tensor scale, Tensor kept, "
    f"{OPTIONS}, bool input_needs_grad, bool target_needs_grad) -> (Tensor, Tensor)",
)
def backward(
    upstream: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    kept: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """The gradients from the input and the target, and what the forward pass kept."""
    *packed, input_needs, target_needs = rest
    options = unpacked(packed)
    saved = kept.unbind(0) if kept.dim() == 2 else ()
    # The forward pass's own backend, whichever would be chosen now: it is known by what it kept.
    name = choice.choose(input) if not options.from_logits else "triton" if saved else "eager"
    served = choice.load(name)
    of_target = None
    upstream = upstream.contiguous()
    if target.is_floating_point():
        of_input, of_target = served.soft_cross_entropy_backward(
            upstream,
            as_rows(input),
            as_rows(target),
            weight,
            options,
            saved,
            gradient=input_needs,
            target_gradient=target_needs,
            inplace=False,
        )
    else:
        saved = (*saved, scale) if scale.dim() == 0 else saved
        of_input = served.cross_entropy_backward(
            upstream, as_rows(input), target, weight, options, saved, inplace=False
        )
    return (
        input.new_empty(0) if of_input is None else _laid_out_as(input, of_input),
        target.new_empty(0) if of_target is None else _laid_out_as(target, of_target),
    )


@backward.register_fake
def _(
    upstream: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    kept: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *_, input_needs, target_needs = rest
    return (
        torch.empty_like(input) if input_needs else input.new_empty(0),
        torch.empty_like(target) if target_needs else target.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, target, weight, *packed, _, input_needs, target_needs = inputs
    _, _, of_input, of_target, scale, kept = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.needs = input_needs, target_needs
    ctx.packed = packed
    ctx.written = _is_written(input, target, unpacked(packed), input_needs, target_needs)
    ctx.save_for_backward(*((of_input, of_target) if ctx.written else (input, target, weight, scale, kept)))


def _differentiate(ctx: Any, of_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    of_input = of_target = None
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            "fastloss: the compiled loss has no second derivative, as nothing compiled by AOTAutograd has; "
            "call it outside of torch.compile with create_graph=True"
        )
    if of_loss is not None and ctx.written:
        of_input, of_target = (g * of_loss for g in ctx.saved_tensors)
    elif of_loss is not None:
        input, target, weight, scale, kept = ctx.saved_tensors
        of_input, of_target = backward(of_loss, input, target, weight, scale, kept, *ctx.packed, *ctx.needs)
    nothing = (None,) * (len(ctx.packed) + 4)
    input_needs, target_needs = ctx.needs
    return (of_input if input_needs else None, of_target if target_needs else None, *nothing)


forward.register_autograd(_differentiate, setup_context=_setup_context)


def _laid_out_as(like: Tensor, gradient: Tensor) -> Tensor:
    """``gradient`` in the shape and the strides that the fake implementation foretold."""
    gradient = gradient.view(like.shape)
    expected = torch.empty_like(like, device="meta").stride()
    if gradient.stride() == expected:
        return gradient
    return torch.empty_strided(like.shape, expected, dtype=like.dtype, device=like.device).copy_(gradient)
