"""The route that a loss or an accuracy takes: shards, torch's own operators, a compiler's operator, or a backend."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import choice
from ..backends.contract import LossOptions
from ..backends.short_road import Call
from ..backends.torch_private import (
    dispatch_mode_count,
    dispatch_modes,
    forward_mode_is_active,
    is_exporting,
    transforms_are_active,
    without_dispatch,
    without_subclasses,
)
from ..backends.view import as_labels, as_rows, class_dim, may_overlap, pieces_of_labels, row_shape
from ..ranks import placements
from . import compiled, composite, sharded
from .autograd import fused_cross_entropy

__all__ = [
    "FUSED_TYPES",
    "SMALL_ON_CPU",
    "WIDENED_TYPES",
    "accuracies",
    "check_of_values",
    "composed",
    "has_too_many_rows",
    "in_rows",
    "is_compiled",
    "is_small",
    "is_traced",
    "loss_and_accuracies",
    "watching_modes",
]

# Logits of at most this many elements go to torch's own operator on a CPU, where a fused pass saves less than
# its Python costs (`python -m benchmarks.cpu --crossover` prints both).
SMALL_ON_CPU = 1 << 18
# So do rows of at most this many classes: the numbers that a fused pass saves per row would outweigh the row.
FEW_CLASSES = 8

# And maps of at most this many classes in 16 bits where pixels are ignored, as those rows have more numbers.
FEW_CLASSES_OF_MAPS = 12

FUSED_TYPES = (Tensor, torch.nn.Parameter)
# Labels that go to torch's operators where the logits are few, widened if need be.
WIDENED_TYPES = (torch.int64, torch.uint8)


def loss_and_accuracies(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    inplace: bool = False,
    group: Any = None,
    call: Call | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss and an accuracy for each k, ``()`` or of the labels' shape. The options are checked already.

    ``call``: where to record this call, if it may be recorded.
    """
    given = input, target, weight, *options.scalars()
    route = _route(input, target, weight, options, inplace, group)
    if route == "shards":
        return sharded.loss_over_ranks(input, target, weight, options, group)
    traced = route in ("compiled", "traced")
    look = not traced and isinstance(target, Tensor) and choice.may_look(target)
    checks.check_tensors(input, target, weight, options.ignore_index, look=look)
    if call is not None and look and (options.scalars() or not target.is_floating_point()):
        call.check = check_of_values(input, target, options)
    dtype = checks.loss_dtype(input, target, weight)
    soft = target.is_floating_point()
    if not traced and not soft and input.dim() == 1:
        target = target.view(())
    if inplace and not traced and may_overlap(input):
        raise RuntimeError(
            f"fastloss: inplace=True needs an input whose elements have memory of their own; "
            f"got strides {input.stride()} for shape {tuple(input.shape)} (expanded, or overlapping windows: clone)"
        )
    values: tuple[Tensor, ...] = ()
    flat = route in ("fused", "compiled")
    if flat:
        labels = target if soft else as_labels(target)
        weight = None if weight is None else weight.contiguous()
    if route == "fused":
        backend, record = choice.load(choice.choose(input)), None
        if call is not None and not (soft and options.topk):
            record = functools.partial(call.recorded, given)
        loss, values = fused_cross_entropy(input, labels, weight, options, backend, dtype, inplace, record=record)
    elif route == "compiled":
        loss, values = compiled.loss_and_accuracies(input, labels, weight, options, dtype)
    else:
        loss = composite.cross_entropy(input, target, weight, options, dtype)
    if soft or not flat:
        values = _accuracies_beside(input, target, options)
    elif not options.is_reduced:
        values = tuple(in_rows(value, input) for value in values)
    return in_rows(loss, input) if flat and not options.is_reduced else loss, values


def in_rows(values: Tensor, input: Tensor) -> Tensor:
    """Return numbers ``(rows,)`` in the shape of the labels of ``input``."""
    return values if input.dim() == 2 else values.view(row_shape(input))


def check_of_values(input: Tensor, target: Tensor, options: LossOptions) -> Callable[..., None]:
    """Return the check of what calls like this one may be given: their labels, and the scalars of the options."""
    classes, ignored, soft = input.shape[class_dim(input)], options.ignore_index, target.is_floating_point()

    def check(target: Tensor, *scalars: Tensor) -> None:
        if not soft:
            checks.check_labels(target, classes, ignored)
        checks.check_scalars(options.with_scalars(scalars)[0])

    return check


def _route(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, inplace: bool, group: Any
) -> str:
    """Return "shards", "compiled", "traced", "composed" or "fused". The tensors are not checked yet."""
    if group is None and not is_traced(input, target):
        if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
            return "composed"  # the checks will refuse them
        if not inplace and (is_small(input, target, weight, WIDENED_TYPES) or _is_thin(input, target, options)):
            return "composed"
        soft = target.is_floating_point()
        served = input.numel() > 0 and (soft or options.from_logits) and not has_too_many_rows(input)
        trained = soft and isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled()
        return "fused" if served and not trained else "composed"
    if group is None and is_compiled(input, target, weight, options):
        return "compiled"
    return "shards" if group is not None or placements.is_uncompiled_dtensor(input) else "traced"


def composed(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss by torch's own operators, and the accuracies. The arguments are checked already."""
    dtype = checks.loss_dtype(input, target, weight)
    return composite.cross_entropy(input, target, weight, options, dtype), _accuracies_beside(input, target, options)


def accuracies(
    input: Tensor, target: Tensor, options: LossOptions, group: Any = None, call: Call | None = None
) -> tuple[Tensor, ...]:
    """Return an accuracy for each k, ``()`` or of the labels' shape. ``input`` is checked already.

    ``call``: where to record this call, if it may be recorded.
    """
    given = input, target, None
    if group is not None or placements.is_uncompiled_dtensor(input):
        return sharded.accuracies_over_ranks(input, target, options, group)
    if checks.is_dense(input, target):
        checks.check_dense_target(input, target, whole=True)
        target = composite.labels_of(target)
        options = dataclasses.replace(options, ignore_index=-1)  # argmax gives no label to ignore
    checks.check_index_target(input, target, None)
    target = target.view(()) if input.dim() == 1 else target
    if options.topk and _has_values(target) and choice.may_look(target):
        check = check_of_values(input, target, options)
        if call is not None:
            call.check = check
        with without_dispatch(), without_subclasses():
            check(target.as_subclass(Tensor))
    return _accuracies(input, target, options, None if call is None else functools.partial(call.recorded, given))


def _accuracies_beside(input: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, ...]:
    """Return the accuracies beside a loss that did not give them."""
    if options.topk and checks.is_soft(input, target):
        target = composite.labels_of(target)
        options = dataclasses.replace(options, ignore_index=-1)  # argmax gives no label to ignore
    return _accuracies(input.detach(), target, options)


def _accuracies(
    input: Tensor, target: Tensor, options: LossOptions, record: Callable[[Any], Any] | None = None
) -> tuple[Tensor, ...]:
    """Return the accuracies for labels that are checked already."""
    if not options.topk:
        return ()
    small = input.numel() == 0 or (
        input.numel() <= SMALL_ON_CPU // 16 and is_small(input, target, labels=WIDENED_TYPES)
    )
    if small or is_traced(input, target):
        return composite.accuracy(input, target, options)
    rows, labels = as_rows(input), as_labels(target)
    backend = choice.load(choice.choose(input))

    def numbers() -> tuple[Tensor, ...]:
        return backend.accuracy(rows, labels, options.topk, options.ignore_index, options.reduction)

    values = tuple(numbers() if record is None else record(numbers))
    return values if options.is_reduced else tuple(in_rows(value, input) for value in values)


def is_small(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    labels: tuple[torch.dtype, ...] = (torch.int64,),
) -> bool:
    """Return True where torch's own operators are faster: few logits on a CPU, and a target that they take.

    ``labels``: the dtypes of class indices that are taken. torch's operators are right for int64 alone.
    """
    return (
        not torch.compiler.is_compiling()
        and type(input) in FUSED_TYPES
        and type(target) is Tensor
        and input.is_cpu
        and not target.is_nested
        and (input.numel() <= SMALL_ON_CPU or (input.dim() > 1 and input.shape[1] <= FEW_CLASSES))
        and (target.dtype in labels or (target.dtype is input.dtype and target.shape == input.shape))
        and (weight is None or (isinstance(weight, Tensor) and weight.dtype is input.dtype))
        and not choice.is_forced()
    )


def _is_thin(input: Tensor, target: Tensor, options: LossOptions) -> bool:
    """Return True for maps on a CPU whose rows' numbers would outweigh the rows, as the labels of all rows tell.

    ``(N, C)`` is not among them: torch's operator takes several times as long for it.
    """
    return (
        input.is_cpu
        and input.dim() > 2
        and input.shape[1] <= FEW_CLASSES_OF_MAPS
        and input.dtype.itemsize == 2
        and target.dtype in checks.LABEL_DTYPES
        and not (options.topk or options.hides_softmax or options.is_scaled or choice.is_forced())
        and any(bool((labels == options.ignore_index).any()) for labels in pieces_of_labels(target))
    )


def is_traced(input: Tensor, target: Tensor) -> bool:
    """Return True if every step must be an operator of torch.

    That is so for transforms, traces, forward-mode derivatives and subclasses of tensors.
    """
    if (
        torch.compiler.is_compiling()
        or transforms_are_active()
        or dispatch_mode_count() > 0
        or torch.jit.is_tracing()
        or forward_mode_is_active()
    ):
        return True
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        return False
    return (
        type(input) not in FUSED_TYPES
        or type(target) is not Tensor
        or input.is_meta
        or not (input.layout is target.layout is torch.strided)
    )


def _has_values(tensor: Tensor) -> bool:
    """Return True if the tensor holds its own values, whatever its class, and nothing traces what is read of them."""
    return not (
        torch.compiler.is_compiling()
        or transforms_are_active()
        or torch.jit.is_tracing()
        or tensor.is_meta
        or tensor.layout is not torch.strided
        or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    )


def is_compiled(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> bool:
    """Return True if a compiler traces the call, and this package's operators serve it."""
    return (
        torch.compiler.is_dynamo_compiling() and not is_exporting() and _has_operator(input, target, weight, options)
    )


def watching_modes(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> list[Any]:
    """Return the dispatch modes that see the call's operators, and that this package's operators serve.

    Such modes count, cache or print (``FlopCounterMode``, selective checkpointing). Tracers are none, nor is there
    any beside a compiler or a transform.
    """
    others = torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_mode_is_active()
    if others or dispatch_mode_count() == 0 or not _has_operator(input, target, weight, options):
        return []
    modes = dispatch_modes()
    return [] if any(getattr(mode, "_mode_key", None) is not None for mode in modes) else modes


def _has_operator(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> bool:
    return (
        type(input) in FUSED_TYPES
        and type(target) in FUSED_TYPES
        and (target.is_floating_point() or options.from_logits)
        and not (target.is_floating_point() and weight is not None and weight.requires_grad)
        and not transforms_are_active()
        and input.numel() > 0
        and not has_too_many_rows(input)
    )


def has_too_many_rows(input: Tensor) -> bool:
    """Return True if the row count overflows the kernels' int32 row index; the logit count may be larger.

    A tile of rows is spared.
    """
    return not input.is_cpu and input.dim() > 1 and input.numel() // max(input.shape[1], 1) > (1 << 31) - (1 << 13)
