"""Checks of the public functions' arguments. Each error names the argument, its value and a value that would fit.

The types of the errors are torch's own for the same mistake.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .backends import choice
from .backends.contract import DivergenceOptions, LossOptions, Scalar
from .backends.torch_private import transforms_are_active
from .backends.view import class_dim, pieces_of_labels, row_shape

__all__ = [
    "LABEL_DTYPES",
    "check_dense_target",
    "check_index_target",
    "check_labels",
    "check_logits",
    "check_no_gradient",
    "check_scalars",
    "check_soft_target",
    "check_strided",
    "check_switches",
    "check_tensors",
    "check_weight",
    "check_weight_dtype",
    "checked_count",
    "checked_divergence",
    "checked_ignore_index",
    "checked_options",
    "checked_topk",
    "is_autocast",
    "is_dense",
    "is_soft",
    "is_symbolic",
    "loss_dtype",
    "parts_dtype",
    "symbolic",
]

_REDUCTIONS = ("none", "mean", "sum")
LABEL_DTYPES = (torch.int64, torch.int32, torch.uint8)
# x / softcap must be a normal number of float32, as small as logits may be.
_MOST_SOFTCAP = 1e30
# The quotient of two must be one too, and its square.
_MOST_SCALE = 1e9
_MOST_CLASSES = (1 << 63) - 1  # that a tensor can have


def check_tensors(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, *, look: bool) -> None:
    """Check shapes, dtypes and devices, and the labels' values if ``look``."""
    check_logits(input)
    if isinstance(target, Tensor) and is_soft(input, target):
        check_soft_target(input, target, weight, ignore_index)
        return
    check_index_target(input, target, weight)
    if look:
        check_labels(target, input.shape[class_dim(input)], ignore_index)


def is_soft(input: Tensor, target: Tensor) -> bool:
    """Return True if the target of a loss has one value per class: ``input``'s shape, and a floating-point dtype."""
    if target.is_nested:  # it may have no shape
        check_strided(target=target)
    return target.shape == input.shape and target.is_floating_point()


def is_dense(input: Tensor, target: object) -> bool:
    """Return True if the target of an accuracy has one value per class, in any dtype: one-hot or probabilities."""
    if isinstance(target, Tensor) and target.is_nested:  # it may have no shape
        check_strided(target=target)
    if not isinstance(target, Tensor) or target.shape != input.shape:
        return False
    # With one class, a target of shape (1,) is dense if its dtype is none of labels.
    return input.shape != (1,) or target.dtype not in LABEL_DTYPES


def check_dense_target(input: Tensor, target: Tensor, *, whole: bool) -> None:
    """Check that a target with one value per class is not the labels of a binary classifier's scores.

    Floating-point targets are class probabilities in any shape. ``whole``: ``input`` has all classes.
    """
    check_strided(target=target)
    if target.is_complex() or (target.is_floating_point() and target.dtype.itemsize < 2):
        raise RuntimeError(f"fastloss: target has dtype {target.dtype}; expected one-hot rows or class probabilities")
    if target.is_floating_point():
        return
    if input.dim() == 1 or (whole and input.shape[1] == 1):
        classes = "one row of scores" if input.dim() == 1 else "scores of a single class"
        raise ValueError(
            f"fastloss: target has dtype {target.dtype} and the shape of input, {tuple(input.shape)}, which is "
            f"{classes}; expected labels of shape {row_shape(input)}. For the accuracy of a binary classifier pass "
            "the scores of both classes, torch.stack([-scores, scores], 1), and labels of shape (N,)"
        )


def loss_dtype(input: Tensor, target: Tensor, weight: Tensor | None, dtype: torch.dtype | None = None) -> torch.dtype:
    """Return the loss's dtype, as torch has it.

    It is the input's, or a wider one of class probabilities and their weights; float32 for 16 bits under autocast.
    ``dtype`` is that of the logits, where ``input`` is not the logits themselves.
    """
    dtype = dtype or input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    return torch.float32 if dtype.itemsize == 2 and is_autocast(input) else dtype


def parts_dtype(dtype: torch.dtype, reduction: str) -> torch.dtype:
    """Return the dtype of a loss beside other parts, which alone is of ``dtype``: of rows float32 or more.

    The negative loss of a row is a log-probability, which programs train on: differences of two are exponents.
    """
    return torch.promote_types(dtype, torch.float32) if reduction == "none" else dtype


def check_logits(input: object) -> None:
    """Check that ``input`` is a floating-point tensor with a class dimension."""
    if not isinstance(input, Tensor):
        raise TypeError(f"fastloss: input must be a Tensor of logits, got {type(input).__name__}")
    if not input.is_floating_point() or input.dtype.itemsize < 2:
        raise NotImplementedError(
            f"fastloss: input has dtype {input.dtype}; expected float16, bfloat16, float32 or float64"
        )
    check_strided(input=input)
    if input.dim() == 0:
        raise RuntimeError(
            "fastloss: input has no dimensions; expected logits of shape (C,), (N, C) or (N, C, d1, ...)"
        )


def checked_options(
    *,
    ignore_index: object,
    reduction: object,
    label_smoothing: object = 0.0,
    lse_square_scale: object = 0.0,
    softcap: object = None,
    topk: tuple[int, ...] = (),
    from_logits: bool = True,
    inplace: object = False,
    logit_scale: object = 1.0,
    temperature: object = 1.0,
    logits: object = None,
) -> LossOptions:
    """Check the arguments that are numbers, and return the options among them as plain ints and floats.

    ``logits``: a tensor on their device, where a ``logit_scale`` or ``temperature`` in a tensor must be.
    """
    check_switches(from_logits=from_logits, inplace=inplace)
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"fastloss: {reduction!r} is not a valid value for reduction; expected 'none', 'mean' or 'sum'"
        )
    smoothing, scale = _number(label_smoothing, "label_smoothing"), _number(lse_square_scale, "lse_square_scale")
    cap = None if softcap is None else _number(softcap, "softcap")
    if not 0.0 <= smoothing <= 1.0:
        raise RuntimeError(f"fastloss: label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    _check_softcap(cap, softcap, "softcap")
    if not abs(scale) < float("inf"):
        raise ValueError(f"fastloss: lse_square_scale is {lse_square_scale}; expected a finite number")
    if not from_logits and (cap is not None or scale != 0.0):
        name, value = ("softcap", softcap) if cap is not None else ("lse_square_scale", lse_square_scale)
        raise ValueError(f"fastloss: {name} is {value} beside from_logits=False; probabilities have no logits for it")
    factor, divisor = (
        _positive(value, name, logits) for name, value in (("logit_scale", logit_scale), ("temperature", temperature))
    )
    if not from_logits:
        for name, value in (("logit_scale", factor), ("temperature", divisor)):
            if isinstance(value, Scalar) or value != 1.0:
                shown = value.tensor if isinstance(value, Scalar) else value
                raise ValueError(
                    f"fastloss: {name} is {shown} beside from_logits=False; probabilities have no logits for it"
                )
    ignored = checked_ignore_index(ignore_index)
    return LossOptions(
        ignored, smoothing, str(reduction), scale, cap, topk, from_logits, logit_scale=factor, temperature=divisor
    )


def _positive(value: object, name: str, logits: object) -> float | Scalar:
    """Return a positive number, or the scalar tensor that holds one. On a GPU the host does not read it."""
    if isinstance(value, Tensor):
        return _scalar(value, name, logits)
    number = _number_not_bool(value, name)
    if not 1.0 / _MOST_SCALE <= number <= _MOST_SCALE:
        raise ValueError(
            f"fastloss: {name} is {value}; expected a positive finite number, {1.0 / _MOST_SCALE:g} to "
            f"{_MOST_SCALE:g}, and 1.0 for none"
        )
    return number


def _scalar(value: Tensor, name: str, logits: object) -> Scalar:
    """Check a number that a tensor holds."""
    if value.dim() != 0 or not value.is_floating_point() or value.dtype.itemsize < 2:
        raise ValueError(
            f"fastloss: {name} is a tensor of shape {tuple(value.shape)} and dtype {value.dtype}; expected a float, "
            "or a 0-d tensor of float16, bfloat16, float32 or float64"
        )
    if isinstance(logits, Tensor) and value.device != logits.device:
        raise RuntimeError(
            f"fastloss: {name} is on {value.device}; expected a float, or a tensor on {logits.device}, where input is"
        )
    if hasattr(value, "to_local"):
        raise RuntimeError(
            f"fastloss: {name} is a DTensor; expected a float or a plain tensor: pass {name}.to_local()"
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"fastloss: {name} requires grad, and the loss is not differentiable in it; multiply the logits (or the "
            f"hidden states) by it instead, or pass {name}.detach()"
        )
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_are_active()
    if not traced and type(value) in (Tensor, torch.nn.Parameter) and not value.is_meta and choice.may_look(value):
        _positive(float(value), name, None)
    return Scalar(value.detach())


def check_scalars(options: LossOptions) -> None:
    """Check the numbers of a loss's options that tensors hold, on a CPU."""
    for name, value in (("logit_scale", options.logit_scale), ("temperature", options.temperature)):
        if isinstance(value, Scalar) and choice.may_look(value.tensor):
            _positive(float(value.tensor), name, None)


def checked_divergence(
    beta: object, student: LossOptions, teacher_softcap: object, teacher_logit_scale: object, logits: object
) -> DivergenceOptions:
    """Check the options of a divergence from a teacher, beside the student's, which are checked already."""
    if isinstance(beta, Tensor):
        raise TypeError("fastloss: beta is a tensor, and there is no gradient to it; expected a float")
    share = _number_not_bool(beta, "beta")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"fastloss: beta is {beta}; expected a number from 0 (KL(t ‖ s)) to 1 (KL(s ‖ t))")
    cap = None if teacher_softcap is None else _number(teacher_softcap, "teacher_softcap")
    _check_softcap(cap, teacher_softcap, "teacher_softcap")
    scale = _positive(teacher_logit_scale, "teacher_logit_scale", logits)
    student = LossOptions(softcap=student.softcap, logit_scale=student.logit_scale, temperature=student.temperature)
    return DivergenceOptions(share, student, replace(student, softcap=cap, logit_scale=scale))


def _check_softcap(cap: float | None, given: object, name: str) -> None:
    if cap is not None and not 1.0 / _MOST_SOFTCAP <= cap <= _MOST_SOFTCAP:
        raise ValueError(
            f"fastloss: {name} is {given}; expected a positive finite number, {1.0 / _MOST_SOFTCAP:g} to "
            f"{_MOST_SOFTCAP:g}, or None for no cap"
        )


def checked_ignore_index(ignore_index: object) -> int:
    """Return the label to ignore as an int of 64 bits."""
    try:
        # A compiler's int, which may vary from call to call, must stay one.
        ignored = ignore_index if type(ignore_index) is int else operator.index(ignore_index)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"fastloss: ignore_index is {ignore_index!r}; expected an int") from None
    if not -(2**63) <= ignored < 2**63:
        raise ValueError(f"fastloss: ignore_index is {ignored}; expected a number of 64 bits")
    return ignored


def checked_count(value: object, name: str, expected: str) -> int:
    """Return ``value`` as an int. True and False are none: they are meant for another argument."""
    try:
        if isinstance(value, bool):
            raise TypeError
        # A compiler's int, which may vary from call to call, must stay one.
        return value if type(value) is int else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"fastloss: {name} is {value!r}; expected {expected}") from None


def _number_not_bool(value: object, name: str) -> float:
    """Return a number where True and False are none: they are meant for another argument."""
    if isinstance(value, bool):
        raise TypeError(f"fastloss: {name} is {value}; expected a number")
    return _number(value, name)


def _number(value: object, name: str) -> float:
    if type(value) is float:  # a compiler's float, which may vary from call to call, must stay one
        return value
    try:
        # A tensor that is no scalar, or whose gradient would be lost: as torch's own operators refuse it.
        if isinstance(value, str) or (isinstance(value, Tensor) and (value.dim() != 0 or value.requires_grad)):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"fastloss: {name} is an int too large for a float; expected a number") from None
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"fastloss: {name} is {value!r}; expected a number") from None


def check_index_target(input: Tensor, target: object, weight: object) -> None:
    """Check that class indices and a class weight fit ``input``, without reading an element."""
    if not isinstance(target, Tensor):
        raise TypeError(f"fastloss: target must be a Tensor, got {type(target).__name__}")
    expected = row_shape(input)
    if target.dtype not in LABEL_DTYPES:
        # torch looks at the batch first, and takes anything in another shape for labels.
        other_batch = input.dim() > 1 and target.shape[:1] != input.shape[:1]
        raise (ValueError if other_batch else RuntimeError)(
            f"fastloss: target has dtype {target.dtype} and shape {tuple(target.shape)} beside an input of dtype "
            f"{input.dtype} and shape {tuple(input.shape)}; expected class indices in int64, int32 or uint8, of "
            f"shape {expected}, or class probabilities: floating point, in the shape of input"
        )
    if target.shape == input.shape and input.dim() > 1:
        raise RuntimeError(
            f"fastloss: target has dtype {target.dtype} and the shape of input, {tuple(input.shape)}; class "
            f"probabilities must be floating point, as {input.dtype}; expected class indices are of shape {expected}"
        )
    if tuple(target.shape) != expected and not (input.dim() == 1 and tuple(target.shape) == (1,)):
        kind = ValueError if target.shape[:1] != input.shape[:1] else RuntimeError  # torch looks at the batch first
        raise kind(
            f"fastloss: target has shape {tuple(target.shape)}; expected {expected} "
            f"for an input of shape {tuple(input.shape)}"
        )
    check_strided(target=target)
    _check_beside(input, target, weight)
    check_weight_dtype(input, weight)


def check_weight_dtype(input: Tensor, weight: object) -> None:
    """Check that class weights beside labels have a dtype that fits ``input``, and require no gradient."""
    if not isinstance(weight, Tensor):
        return
    fitting = {input.dtype, torch.float32} if input.dtype.itemsize == 2 else {input.dtype}
    if is_autocast(input) and torch.float64 not in fitting:
        fitting = {torch.float16, torch.bfloat16, torch.float32}
    if weight.dtype not in fitting:
        raise RuntimeError(f"fastloss: weight has dtype {weight.dtype}; expected {input.dtype}, as input has")
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("fastloss: weight requires grad, and the loss is not differentiable in it; detach it")


def check_strided(**tensors: object) -> None:
    """Check that none of the tensors is sparse or nested."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise RuntimeError(f"fastloss: {name} has layout {tensor.layout}; expected {torch.strided}")
        if isinstance(tensor, Tensor) and tensor.is_nested:
            raise RuntimeError(f"fastloss: {name} is a nested tensor; expected one with a shape")


def check_no_gradient(weight: object) -> None:
    """Check that class weights of a loss over several ranks require no gradient."""
    if isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "fastloss: weight requires grad, and over several ranks the loss is not differentiable in it; detach it"
        )


def check_soft_target(input: Tensor, target: Tensor, weight: object, ignore_index: int) -> None:
    """Check that class probabilities of ``input``'s shape fit it, without reading an element."""
    if target.dtype.itemsize < 2 or not target.is_floating_point():
        raise RuntimeError(
            f"fastloss: target has dtype {target.dtype}; expected class probabilities in float16, bfloat16, float32 "
            f"or float64, as input's {input.dtype}"
        )
    if ignore_index >= 0:
        raise RuntimeError(
            f"fastloss: ignore_index is {ignore_index} beside class probabilities, which have no index to ignore; "
            "expected a negative number (the default), or class indices as target"
        )
    _check_beside(input, target, weight)


def _check_beside(input: Tensor, target: Tensor, weight: object) -> None:
    """Check that ``target`` and ``weight`` are on ``input``'s device, and that there is a weight for each class."""
    if target.device != input.device:
        raise RuntimeError(f"fastloss: target is on {target.device}; expected {input.device}, where input is")
    check_weight(input, weight)


def check_weight(input: Tensor, weight: object) -> None:
    """Check that ``weight`` is None, or has one element for each class, on ``input``'s device."""
    classes = input.shape[class_dim(input)]
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"fastloss: weight must be a Tensor or None, got {type(weight).__name__}")
    check_strided(weight=weight)
    if tuple(weight.shape) != (classes,):
        raise RuntimeError(
            f"fastloss: weight has shape {tuple(weight.shape)}; expected one weight for each class: ({classes},)"
        )
    if weight.device != input.device:
        raise RuntimeError(f"fastloss: weight is on {weight.device}; expected {input.device}, where input is")


def check_labels(target: Tensor, classes: int, ignore_index: int, *, shift: int = 0) -> None:
    """Check that every label is in [0, classes) or ``ignore_index``. On a GPU the host waits for them.

    ``shift``: the labels are so many places before their place in the caller's tensor, which the error names.
    """
    if target.numel() == 0:
        return
    low, high = target.aminmax()
    if int(low) >= 0 and int(high) < classes:
        return
    before = 0
    for labels in pieces_of_labels(target):
        bad = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
        if bad.any():
            row = int(bad.nonzero()[0])
            place = tuple(int(i) for i in torch.unravel_index(torch.tensor(before + row), target.shape))
            if shift:
                place = (*place[:-1], place[-1] + shift)
            where = "" if not place else f"[{', '.join(map(str, place))}]"
            raise IndexError(
                f"fastloss: target{where} is {int(labels[row])}, which is out of bounds: "
                f"expected a class index in [0, {classes}) or ignore_index ({ignore_index})"
            )
        before += labels.numel()


def is_symbolic(*tensors: object) -> bool:
    """Return True if one of them stands for a tensor, as in ``torch.fx.symbolic_trace``, which records the call.

    A class of tensors whose elements do not exist yet says so by ``stands_for_elements = True``.
    """
    plain = all(isinstance(t, Tensor) and not getattr(t.__class__, "stands_for_elements", False) for t in tensors)
    return not plain and torch.overrides.has_torch_function(tensors)


def symbolic(function: Callable[..., Any], variables: dict[str, Any]) -> Any:
    """Let the tensors of a call stand for it.

    Args:
        function: a public function.
        variables: its variables, among them its arguments.
    """
    code = function.__code__
    arguments = {name: variables[name] for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
    tensors = [arguments[name] for name in ("input", "linear_weight", "target") if name in arguments]
    return torch.overrides.handle_torch_function(function, tensors, **arguments)


def is_autocast(input: Tensor) -> bool:
    """Return True if autocast is on for ``input``'s device. (For meta tensors torch would raise: they have none.)"""
    return not input.is_meta and torch.is_autocast_enabled(input.device.type)


def checked_topk(topk: int | Sequence[int]) -> tuple[int, ...]:
    """Return ``topk``, an int or a sequence of ints of at least 1, as a tuple."""
    several = isinstance(topk, Sequence) and not isinstance(topk, str | bytes)
    given: tuple[Any, ...] = tuple(topk) if several else (topk,)  # type: ignore[arg-type]
    try:
        if any(isinstance(k, bool) for k in given):  # meant for another argument
            raise TypeError
        ks = tuple(map(operator.index, given))
    except TypeError:
        raise TypeError(f"fastloss: topk is {topk!r}; expected an int or a tuple of ints") from None
    for k in ks:
        if k < 1:
            raise ValueError(f"fastloss: topk holds {k}; expected every k to be at least 1")
    return tuple(min(k, _MOST_CLASSES) for k in ks)


def check_switches(**switches: object) -> None:
    """Check that each argument is True or False; a number there was meant for another argument."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"fastloss: {name} is {value!r}; expected True or False")
