"""Checks of the arguments of :func:`fastloss.linear_cross_entropy`, for one device and for several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends.contract import LossOptions
from ..loss.sharded import checked

__all__ = [
    "Arguments",
    "check_linear_map",
    "check_shapes",
    "checked_arguments",
    "checked_chunking",
    "dtype_of_logits",
    "labelled",
    "of_rows",
    "shifted_labels",
]


class Arguments(NamedTuple):
    """The arguments of a call, of which the options are checked already."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None
    weight: Tensor | None
    options: LossOptions
    shift: int
    chunking: dict[str, Any]


_TERMS = ("ignore_index", "reduction", "label_smoothing", "lse_square_scale")
_SCALES = ("softcap", "logit_scale", "temperature")


def checked_arguments(
    group: Any,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    terms: Sequence[object],
    scales: Sequence[object],
    chunking: Sequence[object],
    **options: Any,
) -> Arguments:
    """Check all arguments of a call but its tensors, in agreement with the other ranks, and return them.

    Args:
        tensors: the first five of :class:`Arguments`.
        terms: ``ignore_index``, ``reduction``, ``label_smoothing`` and ``lse_square_scale``, or the first of these.
        scales: ``softcap``, ``logit_scale`` and ``temperature``.
        chunking: the arguments of :func:`checked_chunking`.
        options: other arguments of :func:`fastloss.checks.checked_options`.
    """
    named = dict(zip(_TERMS, terms, strict=False)) | dict(zip(_SCALES, scales, strict=True))
    if named["ignore_index"] is None:
        named["ignore_index"] = -100
    input = tensors[0]
    checked_options = checked(group, input, checks.checked_options, **named, **options, logits=input)
    shift, of_chunks = checked(group, input, checked_chunking, *chunking)
    return Arguments(*tensors, checked_options, shift, of_chunks)


def checked_chunking(
    chunk_size: object,
    memory_budget: object,
    shift: object,
    skip_ignored: object,
    accumulate_grad: object,
    logits_dtype: object = None,
) -> tuple[int, dict[str, Any]]:
    """Return ``shift``, and the arguments that are about chunks, as fields of a :class:`LinearOptions`."""
    checks.check_switches(accumulate_grad=accumulate_grad)
    shift = _checked_shift(shift)
    if skip_ignored is not None and not isinstance(skip_ignored, bool):
        raise TypeError(f"fastloss: skip_ignored is {skip_ignored!r}; expected True, False or None")
    if logits_dtype not in (None, torch.float32):
        raise ValueError(f"fastloss: logits_dtype is {logits_dtype!r}; expected torch.float32, or None")
    chunking: dict[str, Any] = {
        "skip_ignored": skip_ignored,
        "accumulate_grad": accumulate_grad,
        "logits_dtype": logits_dtype,
    }
    for name, value in (("chunk_size", chunk_size), ("memory_budget", memory_budget)):
        if value is None:
            continue
        chunking[name] = checks.checked_count(value, name, "an int, or None")
    if chunking.get("chunk_size", 1) < 1:
        raise ValueError(f"fastloss: chunk_size is {chunk_size}; expected at least 1 row, or None")
    if chunk_size is not None and memory_budget is not None:
        raise ValueError(
            f"fastloss: chunk_size is {chunk_size} and memory_budget {memory_budget}; expected one of them"
        )
    return shift, chunking


def _checked_shift(shift: object) -> int:
    if isinstance(shift, bool):
        return int(shift)
    places = checks.checked_count(shift, "shift", "True, False or a number of positions")
    if places < 0:
        raise ValueError(f"fastloss: shift is {shift}; expected 0 positions or more (1 for the next token)")
    return places


def shifted_labels(target: Tensor, ignore_index: int, shift: int) -> Tensor:
    """Return the labels of the tokens ``shift`` positions on; the last positions have none, and are ignored."""
    count = min(shift, target.shape[-1])
    last = target.new_full((*target.shape[:-1], count), ignore_index, dtype=torch.int64)
    return torch.cat([target[..., shift:].long(), last], dim=-1)


def of_rows(values: Tensor, lead: tuple[int, ...], shift: int) -> Tensor:
    """Return numbers of flat rows in the rows' shape, without the positions that have no label; ``()`` as it is."""
    return labelled(values.view((*lead, *values.shape[1:])), len(lead), shift) if values.dim() else values


def labelled(values: Tensor, dims: int, shift: int) -> Tensor:
    """Return numbers of rows without the positions that have no label: the last ones of the last of ``dims``."""
    return values[(slice(None),) * (dims - 1) + (slice(0, -shift),)] if shift and values.dim() else values


def dtype_of_logits(input: Tensor) -> torch.dtype:
    """Return the dtype of the products: the tensors', or autocast's."""
    if checks.is_autocast(input) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


def check_linear_map(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, shapes: Callable[[], str], of: str = ""
) -> None:
    """Check that the shapes, devices and dtypes of a linear map and its input fit each other.

    Args:
        shapes: returns the words that name all shapes.
        of: the beginning of the arguments' names.
    """
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise RuntimeError(
            f"fastloss: {shapes()}; expected {of}input (..., D) and {of}linear_weight (C, D), with the same D"
        )
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device != input.device:
            raise RuntimeError(
                f"fastloss: {of}{name} is on {tensor.device}; expected {input.device}, where {of}input is"
            )
        if tensor.dtype != input.dtype and not checks.is_autocast(input):
            raise RuntimeError(
                f"fastloss: {of}{name} has dtype {tensor.dtype}; expected {input.dtype}, as {of}input has"
            )
    of_logits = tuple(linear_weight.shape[:-1])
    if isinstance(linear_bias, Tensor) and tuple(linear_bias.shape) != of_logits:
        raise RuntimeError(
            f"fastloss: {shapes()}; expected a {of}linear_bias of shape {of_logits}, a number for each class"
        )


def check_shapes(arguments: Arguments, *, whole: bool) -> None:
    """Check that the shapes fit each other, and that the target is labels or probabilities.

    The loss has its own checks of the rest. An error about a shape names all shapes. ``whole``: the class weights are
    of ``linear_weight``'s classes, and not of more ranks' classes.
    """
    input, linear_weight, target, linear_bias, weight, _, shift, _ = arguments
    weight = weight if whole else None
    checks.check_logits(input)
    for name, tensor in (("linear_weight", linear_weight), ("target", target), ("linear_bias", linear_bias)):
        if not isinstance(tensor, Tensor) and not (name == "linear_bias" and tensor is None):
            raise TypeError(f"fastloss: {name} must be a Tensor, got {type(tensor).__name__}")
    assert isinstance(input, Tensor)
    assert isinstance(linear_weight, Tensor)
    assert isinstance(target, Tensor)
    checks.check_strided(linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight)

    def shapes() -> str:
        names = ("input", "linear_weight", "target", "linear_bias", "weight")
        tensors = zip(names, (input, linear_weight, target, linear_bias, weight), strict=True)
        named = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors if isinstance(tensor, Tensor)]
        return "the shapes are " + ", ".join(named)

    check_linear_map(input, linear_weight, linear_bias, shapes)
    of_logits = tuple(linear_weight.shape[:-1])  # (C,), or torch's (C, d1, ..., dK)
    if isinstance(weight, Tensor) and tuple(weight.shape) != of_logits[:1]:
        raise RuntimeError(f"fastloss: {shapes()}; expected one weight for each class: {of_logits[:1]}")
    if len(of_logits) > 1 and (input.dim() != 2 or shift):
        raise RuntimeError(
            f"fastloss: {shapes()}: the K-dimensional loss; expected an input of shape (N, D), and no shift"
        )
    of_labels, soft = (*input.shape[:-1], *of_logits[1:]), (*input.shape[:-1], *of_logits)
    is_soft = tuple(target.shape) == soft and target.is_floating_point() and target.dtype.itemsize > 1
    if shift and (input.dim() < 2 or target.is_floating_point() or target.dtype == torch.bool):
        raise ValueError(
            f"fastloss: shift={shift}; {shapes()}; target is {target.dtype}; expected an "
            "input of shape (..., T, D) and class indices of shape (..., T)"
        )
    one_label = input.dim() == 1 and tuple(target.shape) == (1,)
    is_labels = (tuple(target.shape) == of_labels or one_label) and target.dtype in checks.LABEL_DTYPES
    if not is_soft and not is_labels:
        kind = ValueError if target.shape[:1] != input.shape[:1] else RuntimeError  # torch looks at the batch first
        raise kind(
            f"fastloss: {shapes()}; target is {target.dtype}; expected class indices of shape {of_labels} in "
            f"int64, int32 or uint8, or class probabilities of shape {soft}, floating point"
        )
