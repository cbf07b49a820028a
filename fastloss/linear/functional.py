"""The public functions of the linear map and its cross-entropy in one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..backends import choice
from ..backends.view import wide_labels
from ..loss import routes
from ..loss.functional import LossAndAccuracy
from ..loss.sharded import checked
from ..ranks import placements
from . import compiled, sharded
from .arguments import Arguments, check_shapes, checked_arguments, dtype_of_logits, of_rows, shifted_labels
from .autograd import by_chunks
from .chunks import LinearOptions, Losses, Tensors, dtype_of_chunk, logits_of, of_counted, rows_of_chunk

__all__ = ["linear_cross_entropy", "linear_cross_entropy_with_accuracy", "prepared"]


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
    shift: bool | int = False,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    skip_ignored: bool | None = None,
    accumulate_grad: bool = False,
    logits_dtype: torch.dtype | None = None,
    group: Any = None,
    logit_scale: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    r"""Compute ``cross_entropy(linear(input, linear_weight, linear_bias), target)`` without holding the logits.

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
        reduction, ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, temperature: as in
            :func:`fastloss.cross_entropy`: softcap(logit_scale · (x Wᵀ + b)) / temperature takes the place of the
            logits. An ``ignore_index`` of None is torch's way to say -100.
        shift: the label of position t is ``target[..., t + shift]``; the last ``shift`` positions have none and are
            ignored. True is 1, as in training on next tokens; a head that predicts later tokens has a greater one.
            ``input`` is ``(…, T, D)`` and ``target`` ``(…, T)``. Instead of copies of ``input[..., :-shift, :]`` and
            ``target[..., shift:]`` there is one of the labels. With ``shift`` ≥ T no token counts: a mean is NaN,
            as torch's is of ignored labels alone, and a sum 0.
        chunk_size: rows of a chunk. By default :func:`fastloss.linear.chunks.rows_of_chunk` has the rule.
        memory_budget: in bytes, for what is held beside inputs and gradients; the chunk is as large as it allows. On
            a CPU the few megabytes that its kernels keep from call to call come on top.
        skip_ignored: leave out the rows that are ignored, before they are projected. By default where the labels are
            on a CPU and many rows are ignored; True on a GPU, too, where the host has to wait for their number.
        accumulate_grad: add the weight's gradient to ``linear_weight.grad`` itself, chunk by chunk and in that
            tensor's dtype, in the backward pass, which computes the logits once more for it: no buffer of the
            weight's size beside it. The weight is a leaf then, and its ``.grad`` dense. Hooks on it don't see that
            gradient, ``torch.autograd.grad`` adds it there as ``backward`` does, and compilers do without.
        logits_dtype: ``torch.float32`` keeps the logits of 16-bit products, which add up in float32, as they are, in
            place of rounding them to 16 bits; the loss is float32 then. A chunk of as many rows has twice the bytes,
            and half as many again for the gradient's rounded copy. For training that drifts by rounded logits.
            Compilers take torch's operators over all logits for it.
        group: a ``torch.distributed`` process group, each of whose ranks has a shard of the classes, in rank order
            and of any size: ``linear_weight`` and ``linear_bias`` are this rank's, and so are class probabilities.
            ``input``, labels and ``weight`` are the same on every rank, and ``input``'s gradient is the whole of it.
            As for :func:`fastloss.cross_entropy`, and without second derivatives.

    ``linear_weight``, its bias, ``input`` and ``target`` may be DTensors: the first two replicated or, on one
    dimension of the mesh, ``Shard(0)``; ``input`` replicated or sharded by rows, on other dimensions. Beside a
    DTensor ``linear_weight`` a plain ``input`` or ``target`` is the whole of it. The result is a DTensor, and each
    gradient lies as its tensor.

    Returns:
        The loss, ``()``; for "none" ``(…)``, of ``input``'s rows (all but the last ``shift`` of each sequence).
        In ``input``'s dtype, float32 for 16 bits under autocast.

    Any of ``input``, ``linear_weight``, ``linear_bias`` and probabilities may require a gradient; nothing is computed
    for the others. Second backward passes, and second derivatives, are as those of the two functions (the latter hold
    the logits).

    Raises:
        TypeError, ValueError, RuntimeError: arguments that don't fit, as torch raises them; ``chunk_size`` below 1;
            a ``memory_budget`` that has no room for a row: the error names the least that has.
        IndexError: a label out of bounds, on a CPU; on a GPU the loss is NaN instead.

    Example:
        >>> import torch
        >>> hidden = torch.tensor([[1.0, 2.0], [0.5, -1.0]], requires_grad=True)
        >>> head = torch.tensor([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6]], requires_grad=True)
        >>> loss = linear_cross_entropy(hidden, head, torch.tensor([2, 1]))
        >>> loss
        tensor(0.6535, grad_fn=<_LinearCrossEntropyBackward>)
        >>> loss.backward()
        >>> head.grad.shape
        torch.Size([3, 2])
    """
    if checks.is_symbolic(input, linear_weight, target):
        return checks.symbolic(linear_cross_entropy, locals())
    terms, scales = (ignore_index, reduction, label_smoothing, lse_square_scale), (softcap, logit_scale, temperature)
    chunking = chunk_size, memory_budget, shift, skip_ignored, accumulate_grad, logits_dtype
    arguments = checked_arguments(group, (input, linear_weight, target, linear_bias, weight), terms, scales, chunking)
    return _loss_and_accuracies(arguments, group)[0]


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
    shift: bool | int = False,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    skip_ignored: bool | None = None,
    accumulate_grad: bool = False,
    logits_dtype: torch.dtype | None = None,
    group: Any = None,
    logit_scale: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
) -> LossAndAccuracy:
    """Compute :func:`linear_cross_entropy` and the accuracy of its logits from the same chunks.

    Takes the arguments of that function, and ``topk`` of :func:`fastloss.accuracy`; ``reduction`` is that of both.

    Returns:
        ``(loss, accuracy)``, a NamedTuple; the accuracy as :func:`fastloss.accuracy` gives it.

    Example:
        >>> import torch
        >>> hidden = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
        >>> head = torch.tensor([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6]])
        >>> linear_cross_entropy_with_accuracy(hidden, head, torch.tensor([2, 0]))
        LossAndAccuracy(loss=tensor(1.0035), accuracy=tensor(0.5000))
    """
    if checks.is_symbolic(input, linear_weight, target):
        return checks.symbolic(linear_cross_entropy_with_accuracy, locals())
    terms, scales = (ignore_index, reduction, label_smoothing, lse_square_scale), (softcap, logit_scale, temperature)
    chunking = chunk_size, memory_budget, shift, skip_ignored, accumulate_grad, logits_dtype
    of_topk = checked(group, input, checks.checked_topk, topk)
    tensors = input, linear_weight, target, linear_bias, weight
    arguments = checked_arguments(group, tensors, terms, scales, chunking, topk=of_topk)
    loss, values = _loss_and_accuracies(arguments, group)
    return LossAndAccuracy(loss, values if isinstance(topk, Sequence) else values[0])


def _loss_and_accuracies(arguments: Arguments, group: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss and an accuracy for each k, ``()`` or of the labels' shape."""
    input, linear_weight, target, linear_bias, weight, options, _, chunking = arguments
    if group is not None or any(map(placements.is_uncompiled_dtensor, (input, linear_weight))):
        return sharded.linear_loss_over_ranks(arguments, group)
    check_shapes(arguments, whole=True)
    if linear_weight.dim() > 2:  # torch's K-dimensional loss: each input has logits (C, d1, …, dK), and they are held
        _check_unchunked(linear_weight, chunking)
        flat = linear_weight.reshape(-1, linear_weight.shape[-1])
        logits = F.linear(input, flat, None if linear_bias is None else linear_bias.reshape(-1))
        logits = logits.view(*input.shape[:-1], *linear_weight.shape[:-1])
        return routes.loss_and_accuracies(logits, target, weight, options)
    tensors, weight, call, lead, composed = prepared(arguments)
    x, t = tensors.input, tensors.target
    traced = routes.is_traced(input, target) or routes.is_traced(linear_weight, target)
    by_operator = traced and type(linear_weight) in routes.FUSED_TYPES and call.chunk_dtype == call.compute_dtype
    modes = routes.watching_modes(x, t, weight, options) if by_operator else []
    if modes or (by_operator and routes.is_compiled(x, t, weight, options)):
        call = dataclasses.replace(call, accumulate_grad=False)
        compiled.count_operations_in(modes)
        loss, values = compiled.linear_loss_and_accuracies(tensors, weight, call)
    elif composed:
        counted = None if t.is_floating_point() else t != options.ignore_index
        logits = logits_of(tensors._replace(input=of_counted(x, counted)), call)
        loss, values = routes.composed(logits, t, weight, options)
    else:
        loss, *of_ks = by_chunks(tensors, Losses(weight, call, choice.load(choice.choose(input))))
        values = tuple(of_ks)
    return of_rows(loss, lead, arguments.shift), tuple(of_rows(value, lead, arguments.shift) for value in values)


def prepared(arguments: Arguments) -> tuple[Tensors, Tensor | None, LinearOptions, tuple[int, ...], bool]:
    """Check a call on one device, whose shapes are checked, and return it for rows that are flat.

    Returns:
        The tensors, of ``(rows, …)``; the class weights; the options; the shape of the rows; and True where torch's
        own operators over all logits serve the call.

    Raises:
        ValueError: the budget has no room for a row.
    """
    input, linear_weight, target, linear_bias, weight, options, shift, chunking = arguments
    if shift:
        target = shifted_labels(target, options.ignore_index, shift)
    lead, classes = input.shape[:-1], len(linear_weight)
    rows = math.prod(lead)
    x = input.reshape(rows, input.shape[-1])
    soft = target.is_floating_point() and target.dim() == input.dim()
    t = target.reshape(rows, classes) if soft else wide_labels(target.reshape(-1))
    dtype = dtype_of_logits(input)
    logits = input.new_empty((), dtype=dtype).expand(rows, classes)  # without memory, for the checks
    if soft:
        checks.check_soft_target(logits, t, weight, options.ignore_index)
    else:
        checks.check_index_target(logits, t, weight)
    weight = None if weight is None else weight.contiguous()  # as the kernels read it
    of_loss = checks.loss_dtype(input, t, weight, dtype_of_chunk(dtype, chunking["logits_dtype"]))
    call = LinearOptions(options, dtype, of_loss, **chunking)
    tensors = Tensors(x, linear_weight, linear_bias, t)
    traced = routes.is_traced(input, target) or routes.is_traced(linear_weight, target)
    trained_weight = soft and weight is not None and weight.requires_grad
    if not (traced or soft) and choice.may_look(t):
        checks.check_labels(t.view(target.shape), classes, options.ignore_index, shift=shift)
    if traced or rows == 0 or classes == 0 or trained_weight:
        return tensors, weight, call, lead, True
    if call.accumulate_grad and linear_weight.requires_grad and not linear_weight.is_leaf:
        raise RuntimeError(
            "fastloss: accumulate_grad=True beside a linear_weight that is not a leaf and has no .grad to add "
            "to; pass the parameter itself, or accumulate_grad=False"
        )
    rows_of_chunk(call, rows, linear_weight, tensors.needs())  # raises if the budget has no room for a row
    return tensors, weight, call, lead, False


def _check_unchunked(linear_weight: Tensor, chunking: dict[str, Any]) -> None:
    """Refuse arguments about chunks beside K-dimensional weights, whose loss holds all logits."""
    for name, value in chunking.items():
        if value is not None and value is not False:
            raise ValueError(
                f"fastloss: {name} is {value} beside a linear_weight of shape {tuple(linear_weight.shape)}; the "
                "K-dimensional loss holds all of its logits: leave it out, or pass a linear_weight of shape (C, D)"
            )
