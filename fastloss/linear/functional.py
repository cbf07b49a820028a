"""The linear map and its cross-entropy in one: arguments → checks → ``(rows, D)`` → autograd → chunks → a backend."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..backends import choice
from ..backends.contract import LossOptions
from ..loss import functional
from ..loss.autograd import as_labels
from ..loss.functional import LossAndAccuracy
from ..ranks import collectives, placements
from . import compiled, sharded
from .autograd import fused_linear_cross_entropy
from .chunks import LinearOptions, Needs, rows_of_chunk

__all__ = ["linear_cross_entropy", "linear_cross_entropy_with_accuracy"]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    skip_ignored: bool | None = None,
    accumulate_grad: bool = False,
    group: Any = None,
) -> Tensor:
    r"""``cross_entropy(linear(input, linear_weight, linear_bias), target)``, without ever holding the logits.

    Takes the place of :func:`torch.nn.functional.linear_cross_entropy` (torch 2.13). Some rows at a time are
    projected; their loss, and their logits' gradient g in the logits' place, come from the kernels of
    :func:`fastloss.cross_entropy`, and the gradients g W, gᵀ x and Σ g are added up before the next rows are
    projected. Beside the gradients there is one chunk of logits: ``chunk_size`` × C elements. Rounding and formulas
    are those of ``cross_entropy``; in bfloat16 the weight's gradient is summed in float32.

    Args:
        input: x, the hidden states, ``(D,)``, ``(N, D)`` or ``(…, D)``; float16, bfloat16, float32 or float64.
        linear_weight: W, ``(C, D)``; or ``(C, d1, …, dK, D)`` beside an input ``(N, D)``, torch's K-dimensional loss,
            which holds its logits ``(N, C, d1, …, dK)`` and takes no argument that is about chunks.
        target: class indices ``(…)``, one for each of ``input``'s rows, in int64, int32 or uint8; or class
            probabilities ``(…, C)``, floating point.
        linear_bias: b, ``(C,)``.
        weight: a weight for each class, ``(C,)``.
        reduction, ignore_index, label_smoothing, lse_square_scale, softcap: as in :func:`fastloss.cross_entropy`;
            an ``ignore_index`` of None is torch's way to say -100.
        shift: the label of position t is ``target[..., t + 1]``, as in training on next tokens; the last position has
            none and is ignored. ``input`` is ``(…, T, D)`` and ``target`` ``(…, T)``. Instead of copies of
            ``input[..., :-1, :]`` and ``target[..., 1:]`` there is one of the labels.
        chunk_size: rows of a chunk. By default :func:`fastloss.linear.chunks.rows_of_chunk` has the rule.
        memory_budget: in bytes, for what is held beside inputs and gradients; the chunk is as large as it allows. On
            a CPU the few megabytes that its kernels keep from call to call come on top.
        skip_ignored: leave out the rows that are ignored, before they are projected. By default where the labels are
            on a CPU and many rows are ignored; True on a GPU, too, where the host has to wait for their number.
        accumulate_grad: add the weight's gradient to ``linear_weight.grad`` itself, chunk by chunk and in that
            tensor's dtype, in the backward pass, which computes the logits once more for it: no buffer of the
            weight's size beside it. The weight is a leaf then, and its ``.grad`` dense. Hooks on it don't see that
            gradient, ``torch.autograd.grad`` adds it there as ``backward`` does, and compilers do without.
        group: a ``torch.distributed`` process group, each of whose ranks has a shard of the classes, in rank order
            and of any size: ``linear_weight`` and ``linear_bias`` are this rank's, and so are class probabilities.
            ``input``, labels and ``weight`` are the same on every rank, and ``input``'s gradient is the whole of it.
            As for :func:`fastloss.cross_entropy`, and without second derivatives.

    ``linear_weight``, its bias, ``input`` and ``target`` may be DTensors: the first two replicated or, on one
    dimension of the mesh, ``Shard(0)``; ``input`` replicated or sharded by rows, on other dimensions. Beside a
    DTensor ``linear_weight`` a plain ``input`` or ``target`` is the whole of it. The result is a DTensor, and each
    gradient lies as its tensor.

    Returns:
        The loss, ``()``; for "none" ``(…)``, of ``input``'s rows (with ``shift`` all but the last of each sequence).
        In ``input``'s dtype, float32 for 16 bits under autocast.

    Any of ``input``, ``linear_weight``, ``linear_bias`` and probabilities may require a gradient; for the others
    nothing is computed. Second backward passes, and second derivatives, are as those of the two functions (the latter
    hold the logits).

    Raises:
        TypeError, ValueError, RuntimeError: arguments that don't fit, as torch raises them; ``chunk_size`` below 1;
            a ``memory_budget`` that has no room for a row: the error says what would do.
        IndexError: a label out of bounds, on a CPU; on a GPU the loss is NaN instead.

    Example:
        >>> hidden = torch.tensor([[1.0, 2.0], [0.5, -1.0]], requires_grad=True)
        >>> head = torch.tensor([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6]], requires_grad=True)
        >>> loss = linear_cross_entropy(hidden, head, torch.tensor([2, 1]))
        >>> loss
        tensor(0.6535, grad_fn=<_LinearCrossEntropyBackward>)
        >>> loss.backward()
        >>> head.grad.shape
        torch.Size([3, 2])
    """
    options = checks.checked_options(
        -100 if ignore_index is None else ignore_index, label_smoothing, reduction, lse_square_scale, softcap
    )
    sizes = _checked_sizes(chunk_size, memory_budget, shift, skip_ignored, accumulate_grad)
    return _loss_and_accuracy(input, linear_weight, target, linear_bias, weight, options, shift, sizes, group)[0]


def linear_cross_entropy_with_accuracy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    topk: int | Sequence[int] = 1,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    skip_ignored: bool | None = None,
    accumulate_grad: bool = False,
    group: Any = None,
) -> LossAndAccuracy:
    """:func:`linear_cross_entropy` and the accuracy of its logits, from the same chunks.

    Takes the arguments of that function, and ``topk`` of :func:`fastloss.accuracy`; ``reduction`` is that of both.

    Returns:
        ``(loss, accuracy)``, a NamedTuple; the accuracy as :func:`fastloss.accuracy` gives it.

    Example:
        >>> hidden = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
        >>> head = torch.tensor([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6]])
        >>> linear_cross_entropy_with_accuracy(hidden, head, torch.tensor([2, 0]))
        LossAndAccuracy(loss=tensor(1.0035), accuracy=tensor(0.5000))
    """
    ks = checks.checked_topk(topk)
    options = checks.checked_options(
        -100 if ignore_index is None else ignore_index, label_smoothing, reduction, lse_square_scale, softcap, ks
    )
    sizes = _checked_sizes(chunk_size, memory_budget, shift, skip_ignored, accumulate_grad)
    loss, values = _loss_and_accuracy(input, linear_weight, target, linear_bias, weight, options, shift, sizes, group)
    return LossAndAccuracy(loss, values if isinstance(topk, Sequence) else values[0])


def _checked_sizes(
    chunk_size: object, memory_budget: object, shift: object, skip_ignored: object, accumulate_grad: object
) -> dict[str, Any]:
    """The arguments that say how, as fields of a :class:`LinearOptions`."""
    checks.check_switches(shift=shift, accumulate_grad=accumulate_grad)
    if skip_ignored is not None and not isinstance(skip_ignored, bool):
        raise TypeError(f"fastloss: skip_ignored is {skip_ignored!r}; expected True, False or None")
    sizes: dict[str, Any] = {"skip_ignored": skip_ignored, "accumulate_grad": accumulate_grad}
    for name, value in (("chunk_size", chunk_size), ("memory_budget", memory_budget)):
        if value is None:
            continue
        try:
            if isinstance(value, bool):  # meant for another argument
                raise TypeError
            sizes[name] = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"fastloss: {name} is {value!r}; expected an int, or None") from None
    if sizes.get("chunk_size", 1) < 1:
        raise ValueError(f"fastloss: chunk_size is {chunk_size}; expected at least 1 row, or None")
    if chunk_size is not None and memory_budget is not None:
        raise ValueError(
            f"fastloss: chunk_size is {chunk_size} and memory_budget {memory_budget}; expected one of them"
        )
    return sizes


def _loss_and_accuracy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    shift: bool,
    sizes: dict[str, Any],
    group: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    if group is not None or functional.is_dtensor(input) or functional.is_dtensor(linear_weight):
        return _over_ranks(input, linear_weight, target, linear_bias, weight, options, shift, sizes, group)
    _check_shapes(input, linear_weight, target, linear_bias, shift, weight)
    if linear_weight.dim() > 2:
        _check_unchunked(linear_weight, sizes)
        return _of_many_dimensions(input, linear_weight, target, linear_bias, weight, options)
    lead, classes = input.shape[:-1], len(linear_weight)
    if shift:
        target = _shifted(target, options.ignore_index)
    rows = math.prod(lead)
    x = input.reshape(rows, input.shape[-1])
    soft = target.is_floating_point() and target.dim() == input.dim()
    t = target.reshape(rows, classes) if soft else target.reshape(-1)
    dtype = _dtype_of_logits(input)
    stand_in = input.new_empty((), dtype=dtype).expand(len(x), classes)  # of the logits, for the checks
    if soft:
        checks.check_soft_target(stand_in, t, weight, options.ignore_index)
    else:
        checks.check_index_target(stand_in, t, weight)
    weight = None if weight is None else weight.contiguous()  # as the kernels read it
    if functional.is_traced(input, target) or functional.is_traced(linear_weight, target):
        loss, values = _traced(x, linear_weight, t, linear_bias, weight, options, sizes)
    elif len(x) == 0 or classes == 0 or (soft and weight is not None and weight.requires_grad):
        loss, values = functional.composed(F.linear(x, linear_weight, linear_bias), t, weight, options)
    else:
        if not soft and (t.is_cpu or choice.validates()):
            checks.check_labels(t.view(target.shape), classes, options.ignore_index, shifted=shift)
        call = LinearOptions(options, dtype, functional.loss_dtype(input, t, weight, dtype), **sizes)
        if call.accumulate_grad and linear_weight.requires_grad and not linear_weight.is_leaf:
            raise RuntimeError(
                "fastloss: accumulate_grad=True beside a linear_weight that is not a leaf and has no .grad to add "
                "to; pass the parameter itself, or accumulate_grad=False"
            )
        trained = (t is not None and t.requires_grad for t in (x, linear_weight, linear_bias, target))
        rows_of_chunk(call, len(x), linear_weight, Needs(*trained))  # has the budget room for a row?
        served = choice.load(choice.choose(input))
        loss, values = fused_linear_cross_entropy(x, linear_weight, t, linear_bias, weight, call, served)
    if options.reduction != "none":
        return loss, values
    if shift:
        return loss.view(lead)[..., :-1], tuple(v.view(lead)[..., :-1] for v in values)
    return loss.view(lead), tuple(v.view(lead) for v in values)


def _shifted(target: Tensor, ignore_index: int) -> Tensor:
    """The labels of the next tokens; the last position has none."""
    last = target.new_full((*target.shape[:-1], 1), ignore_index, dtype=torch.int64)
    return torch.cat([target[..., 1:].long(), last], dim=-1)[..., : target.shape[-1]]


@torch._disable_dynamo  # not torch.compiler.disable, which imports the compiler at once
def _over_ranks(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    shift: bool,
    sizes: dict[str, Any],
    group: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Of DTensors, or of a group's shards of the classes."""
    checks.check_no_gradient(weight)
    plan, fault = None, None
    x: Any
    of_classes: Tensor | None
    look = isinstance(input, Tensor) and (input.is_cpu or choice.validates())
    soft = isinstance(target, Tensor) and target.is_floating_point() and target.dim() == input.dim()
    by_mesh = any(placements.is_dtensor(tensor) for tensor in (input, linear_weight))
    if by_mesh and group is not None:
        raise ValueError("fastloss: group is given beside a DTensor, whose mesh says which ranks have what")
    group = None if by_mesh else collectives.checked_group(group)
    try:
        _check_shapes(input, linear_weight, target, linear_bias, shift)
        if linear_weight.dim() > 2:
            raise ValueError(
                f"fastloss: linear_weight has shape {tuple(linear_weight.shape)}, torch's K-dimensional loss, over "
                "several ranks; expected (C, D)"
            )
        rows = input.new_empty((), dtype=_dtype_of_logits(input)).expand(input.shape[:-1].numel(), len(linear_weight))
        if soft:
            checks.check_soft_target(rows, target, None, options.ignore_index)
        else:
            checks.check_weight_dtype(rows, weight)
        if sizes["accumulate_grad"] and (by_mesh or not linear_weight.is_leaf):
            raise RuntimeError(
                "fastloss: accumulate_grad=True beside a linear_weight that is a DTensor or not a leaf; pass a "
                "parameter with group=, or accumulate_grad=False"
            )
    except Exception as error:
        fault = error
    if by_mesh:
        if fault is not None:  # of whole tensors, which every rank knows alike
            raise fault
        plan = placements.plan_linear(input, linear_weight, target, linear_bias, soft)
        if shift and any(p.is_shard() and p.dim == len(plan.row_shape) - 1 for p in plan.of_rows):
            raise ValueError(
                f"fastloss: shift=True with positions that are sharded ({plan.of_rows}); expected whole sequences on "
                "each rank, or shift=False beside labels that are shifted already"
            )
        layout, t = plan.layout, plan.target
        x, w, b = (placements.local(tensor) for tensor in (input, linear_weight, linear_bias))
        of_classes = placements.whole(weight)
    else:
        layout = collectives.agreed_layout(
            group,
            len(linear_weight) if fault is None else 0,
            input.shape[:-1].numel() if fault is None else 0,
            device=input.device,
            facts=(options, input.shape, input.dtype, soft, shift, sizes, getattr(weight, "shape", None)),
            labels=None if soft else target,
            fault=fault,
            look=look,
        )
        x, w, b = input, linear_weight, linear_bias
        t, of_classes = target, weight
    if look:
        checks.check_weight(input.new_empty(()).expand(int(layout.classes)), of_classes)
    t = _shifted(t, options.ignore_index) if shift else t
    if not soft and look:
        functional.check_labels_together(t, layout, options.ignore_index, shifted=shift)
    lead = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    of_classes = None if of_classes is None else of_classes.contiguous()
    t = t.reshape(-1, t.shape[-1]) if soft else as_labels(t)
    dtype = _dtype_of_logits(x)
    call = LinearOptions(options, dtype, functional.loss_dtype(x, t, of_classes, dtype), **sizes)
    trained = (tensor is not None and tensor.requires_grad for tensor in (x, w, b, t))
    size = sharded.common_rows_of_chunk(call, len(x), w, Needs(*trained), layout)
    if layout.class_group is not None:
        call = dataclasses.replace(call, chunk_size=size, memory_budget=None)
    served = choice.load(choice.choose(x))
    loss, values = sharded.loss_and_accuracy(x, w, t, b, of_classes, call, layout, served)
    results = [loss, *values]
    if options.reduction == "none":
        results = [value.view(lead) for value in results]
    if plan is not None:
        results = [plan.placed(value) for value in results]
    if options.reduction == "none" and shift:
        results = [value[..., :-1] for value in results]
    return results[0], tuple(results[1:])


def _traced(
    x: Tensor,
    linear_weight: Tensor,
    t: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    sizes: dict[str, Any],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """By the operator that a compiler sees, or by torch's own."""
    dtype = _dtype_of_logits(x)
    if functional.is_compiled(x, t, weight, options) and type(linear_weight) in functional.FUSED_TYPES:
        call = LinearOptions(
            options, dtype, functional.loss_dtype(x, t, weight, dtype), **{**sizes, "accumulate_grad": False}
        )
        return compiled.loss_and_accuracy(x, linear_weight, t, linear_bias, weight, call)
    return functional.composed(F.linear(x, linear_weight, linear_bias), t, weight, options)


def _of_many_dimensions(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """torch's K-dimensional loss: each input has logits ``(C, d1, …, dK)``, and they are held."""
    flat = linear_weight.reshape(-1, linear_weight.shape[-1])
    logits = F.linear(input, flat, None if linear_bias is None else linear_bias.reshape(-1))
    logits = logits.view(*input.shape[:-1], *linear_weight.shape[:-1])
    return functional.loss_and_accuracy(logits, target, weight, options, inplace=False)


def _check_unchunked(linear_weight: Tensor, sizes: dict[str, Any]) -> None:
    """Whoever sets a limit must not find it passed over."""
    for name, value in sizes.items():
        if value is not None and value is not False:
            raise ValueError(
                f"fastloss: {name} is {value} beside a linear_weight of shape {tuple(linear_weight.shape)}; the "
                "K-dimensional loss holds all of its logits: leave it out, or pass a linear_weight of shape (C, D)"
            )


def _dtype_of_logits(input: Tensor) -> torch.dtype:
    if checks.is_autocast(input) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


def _check_shapes(
    input: object, linear_weight: object, target: object, linear_bias: object, shift: bool, weight: object = None
) -> None:
    """The shapes fit each other, and the target is labels or probabilities; everything else is the loss's to check.

    An error about a shape names all of them. ``weight`` is given where its classes are those of ``linear_weight``.
    """
    checks.check_logits(input)
    for name, tensor in (("linear_weight", linear_weight), ("target", target), ("linear_bias", linear_bias)):
        if not isinstance(tensor, Tensor) and not (name == "linear_bias" and tensor is None):
            raise TypeError(f"fastloss: {name} must be a Tensor, got {type(tensor).__name__}")
    assert isinstance(input, Tensor)
    assert isinstance(linear_weight, Tensor)
    assert isinstance(target, Tensor)

    for name, tensor in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        if tensor.layout != torch.strided:
            raise RuntimeError(f"fastloss: {name} has layout {tensor.layout}; expected {torch.strided}")

    def shapes() -> str:
        names = ("input", "linear_weight", "target", "linear_bias", "weight")
        tensors = zip(names, (input, linear_weight, target, linear_bias, weight), strict=True)
        named = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors if isinstance(tensor, Tensor)]
        return "the shapes are " + ", ".join(named)

    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise RuntimeError(f"fastloss: {shapes()}; expected input (..., D) and linear_weight (C, D), with the same D")
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device != input.device:
            raise RuntimeError(f"fastloss: {name} is on {tensor.device}; expected {input.device}, where input is")
        if tensor.dtype != input.dtype and not checks.is_autocast(input):
            raise RuntimeError(f"fastloss: {name} has dtype {tensor.dtype}; expected {input.dtype}, as input has")
    of_logits = tuple(linear_weight.shape[:-1])  # (C,), or torch's (C, d1, ..., dK)
    if isinstance(linear_bias, Tensor) and tuple(linear_bias.shape) != of_logits:
        raise RuntimeError(
            f"fastloss: {shapes()}; expected a linear_bias of shape {of_logits}, a number for each class"
        )
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
            f"fastloss: shift=True; {shapes()}; target is {target.dtype}; expected an "
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
