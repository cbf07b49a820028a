r"""The loss from hidden states together with numbers of each row, without the logits.

The autograd node has the numbers of rows for outputs (``row_numbers.py``). The losses and the other parts are made of
those in ordinary operations, so that any part may have an upstream gradient.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import choice
from ..backends.contract import RowStatistics, WantedParts, compute_dtype
from ..backends.torch_private import disable_dynamo
from ..loss import routes
from ..loss.row_numbers import label_losses, total_weight
from ..loss.sharded import checked
from ..loss.statistics import LossStatistics
from ..ranks import placements
from ..ranks.collectives import Layout, all_reduce, all_reduce_detached
from .arguments import Arguments, check_shapes, checked_arguments, of_rows
from .autograd import by_chunks
from .chunks import LinearOptions, logits_of, of_counted
from .functional import linear_cross_entropy, prepared
from .row_numbers import Numbers, RowLosses, RowVisitor
from .sharded import part_of_rank

__all__ = ["linear_cross_entropy_with_statistics"]


def linear_cross_entropy_with_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: bool = False,
    lse: bool = False,
    entropy: bool = False,
    predicted: bool = False,
    correct: bool = False,
    log_sum_sq_probs: bool = False,
    mean_logit: bool = False,
    selected: Tensor | None = None,
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
) -> LossStatistics:
    r"""Compute :func:`cross_entropy_with_statistics` of ``linear(input, linear_weight, linear_bias)`` by chunks.

    The logits never exist as a whole. All parts but ``predicted`` and ``correct`` are differentiable, and each
    takes any upstream gradient: the backward pass computes the logits once more, a chunk at a time, writes their
    gradient over them, and multiplies it by the weight and the input. That is four products; a loss that is a
    sum over tokens takes three by :func:`linear_token_loss`. With reduction "none", −loss is log p of the labels.

    Args:
        input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, lse_square_scale:
            as in :func:`linear_cross_entropy`, and so are softcap, logit_scale, temperature, shift, chunk_size,
            memory_budget, accumulate_grad and logits_dtype.
        z_loss, lse, entropy, predicted, correct, log_sum_sq_probs, mean_logit: which parts to compute, as in
            :func:`cross_entropy_with_statistics`.
        selected: classes whose log-probabilities are wanted, ``(…, K)`` for rows ``(…)``, in int64, int32 or
            uint8. With ``shift`` they stand at the positions of ``input``, and are not moved.
        skip_ignored: True leaves out the ignored rows, before they are projected. The parts that have one element
            per row are 0 there then. By default they have theirs, and are left out where no such
            part is asked for, as in :func:`linear_cross_entropy`. In backward the rows without an upstream gradient
            are left out likewise; they may hold NaN.
        group: as in :func:`linear_cross_entropy`: every rank gets all parts. ``selected`` is the same on every rank,
            among all classes, and so must be what is computed from the parts.

    DTensors are taken as by :func:`linear_cross_entropy`. Class probabilities as ``target`` are served on one device,
    by :func:`linear_cross_entropy` for the loss and a second round of chunks for the other parts.

    Returns:
        ``LossStatistics``: a part that was not asked for is None. ``loss`` and ``z_loss`` are as
        :func:`linear_cross_entropy` has the loss; with reduction "none" float32 for 16 bits (whose logits are rounded
        to 16 bits all the same, unless ``logits_dtype=torch.float32``). The others have the labels' shape (without
        the last ``shift`` positions), and ``selected``, the log-probabilities, has K more: in float32, float64 for
        float64 logits; ``predicted`` in int64 and ``correct`` in bool.

    Raises:
        TypeError, ValueError, RuntimeError: arguments that don't fit, as in :func:`linear_cross_entropy`.
        IndexError: a label or a class of ``selected`` out of bounds, on a CPU; on a GPU the number is NaN instead.

    Example:
        >>> import torch
        >>> hidden = torch.tensor([[1.0, 2.0], [0.5, -1.0]], requires_grad=True)
        >>> head = torch.tensor([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6]])
        >>> labels = torch.tensor([2, 1])
        >>> parts = linear_cross_entropy_with_statistics(hidden, head, labels, entropy=True, reduction="none")
        >>> log_probs, entropy = -parts.loss, parts.entropy
        >>> log_probs.detach(), entropy.detach()
        (tensor([-0.7514, -0.5557]), tensor([0.9991, 0.9532]))
        >>> (-log_probs - 0.01 * entropy).sum().backward()  # with an entropy bonus
    """
    if checks.is_symbolic(input, linear_weight, target):
        return checks.symbolic(linear_cross_entropy_with_statistics, locals())
    terms, scales = (ignore_index, reduction, label_smoothing, lse_square_scale), (softcap, logit_scale, temperature)
    chunking = chunk_size, memory_budget, shift, skip_ignored, accumulate_grad, logits_dtype
    arguments = checked_arguments(group, (input, linear_weight, target, linear_bias, weight), terms, scales, chunking)
    wanted = WantedParts(z_loss, lse, entropy, predicted, correct, log_sum_sq_probs, mean_logit)
    checked(group, input, checks.check_switches, **wanted._asdict())
    over_ranks = group is not None or any(map(placements.is_uncompiled_dtensor, (input, linear_weight)))
    checked(group, input, _check, arguments, selected, over_ranks)
    if over_ranks:
        return _over_ranks(arguments, wanted, selected, group)
    check_shapes(arguments, whole=True)
    if target.is_floating_point() and target.dim() == input.dim():
        return _of_probabilities(arguments, wanted, selected)
    tensors, weight, call, lead, composed = prepared(arguments)
    classes = len(linear_weight)
    ids = None if selected is None else _flat_ids(selected, lead, classes)
    every_row = wanted.every_row or ids is not None
    backend = None if composed else choice.load(choice.choose(input))
    losses = _losses(call, RowVisitor(weight, call.options, backend, wanted, every_row), ids)
    if composed:
        tensors = tensors._replace(input=of_counted(tensors.input, losses.counted(tensors.target)))
        outputs = losses.outputs_of_logits(logits_of(tensors, call), tensors.target)
    else:
        outputs = by_chunks(tensors, losses)
    numbers = dict(zip(losses.all_names, outputs, strict=True))
    layout = Layout(classes, rows=len(tensors.input))
    parts = _parts(numbers, tensors.target, weight, call, wanted, layout)
    return LossStatistics._make([None if part is None else of_rows(part, lead, arguments.shift) for part in parts])


def _check(arguments: Arguments, selected: object, over_ranks: bool) -> None:
    """Check what :func:`linear_cross_entropy` does not refuse."""
    input, linear_weight, target = arguments[:3]
    tensors = (input, linear_weight, target)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return  # later checks name it
    if linear_weight.dim() > 2:
        raise ValueError(
            f"fastloss: linear_weight has shape {tuple(linear_weight.shape)}, torch's K-dimensional loss; "
            "expected (C, D) beside parts of the logits"
        )
    if over_ranks and target.is_floating_point():
        raise ValueError(
            f"fastloss: target is {target.dtype} over several ranks; expected class indices in int64, int32 or uint8 "
            "(the parts beside class probabilities are given on one device; linear_cross_entropy gives their loss)"
        )
    if selected is None:
        return
    if not isinstance(selected, Tensor):
        raise TypeError(f"fastloss: selected must be a Tensor of classes or None, got {type(selected).__name__}")
    if selected.dtype not in checks.LABEL_DTYPES or selected.shape[:-1] != input.shape[:-1] or not selected.dim():
        raise ValueError(
            f"fastloss: selected is {selected.dtype} of shape {tuple(selected.shape)}; expected classes in int64, "
            f"int32 or uint8, some for each of input's rows {tuple(input.shape[:-1])}: a last dimension more"
        )
    if selected.device != input.device:
        raise RuntimeError(f"fastloss: selected is on {selected.device}; expected {input.device}, where input is")


def _flat_ids(selected: Tensor, lead: tuple[int, ...], classes: int | Tensor) -> Tensor:
    """Return the classes of ``selected``, ``(rows, K)`` in int64; on a CPU they are checked."""
    ids = selected.reshape(math.prod(lead), selected.shape[-1]).long()
    if not routes.is_traced(selected, selected) and choice.may_look(ids):
        bad = (ids < 0) | (ids >= classes)
        if bad.any():
            place = [int(i) for i in bad.view(selected.shape).nonzero()[0]]
            raise IndexError(
                f"fastloss: selected{place} is {int(ids[bad][0])}, which is out of bounds: expected a class in "
                f"[0, {int(classes)})"
            )
    return ids


def _losses(call: LinearOptions, visitor: RowVisitor, ids: Tensor | None) -> RowLosses:
    options = dataclasses.replace(call.options, reduction="none")
    return RowLosses(dataclasses.replace(call, options=options), visitor, ids)


def _parts(
    numbers: Numbers, t: Tensor, weight: Tensor | None, call: LinearOptions, wanted: WantedParts, layout: Layout
) -> LossStatistics:
    """Return the parts of flat rows from their numbers over all classes; reduced over all ranks' rows."""
    options, dtype = call.options, compute_dtype(call.compute_dtype)
    lse = numbers["lse"]
    of_loss = RowStatistics(lse, numbers["label_logit"], None, numbers.get("weighted_sum"), None)
    divisor = None
    if options.reduction == "mean":
        divisor = total_weight(t, weight, options)
        divisor = all_reduce_detached(divisor, layout.row_groups) if layout.row_groups else divisor

    def reduced(values: Tensor) -> Tensor:
        if options.is_reduced:
            values = values.sum() if divisor is None else values.sum() / divisor
            values = all_reduce(values, layout.row_groups)
        return values.to(checks.parts_dtype(call.loss_dtype, options.reduction))

    loss = reduced(label_losses(of_loss, t, weight, options, layout.classes))
    counted, z_loss = t != options.ignore_index, None
    if wanted.z_loss:
        plain = dataclasses.replace(options, label_smoothing=0.0, lse_square_scale=0.0)
        one = RowStatistics(torch.ones_like(lse), torch.zeros_like(lse), None, None, None)
        row_weight = label_losses(one, t, weight, plain, layout.classes).detach()
        z_loss = reduced(options.lse_square_scale * row_weight * torch.where(counted, lse, 0.0).square())
    predicted, selected, logit_sum = (numbers.get(name) for name in ("predicted", "selected", "logit_sum"))
    entropy, squares = (
        None if number is None else number.to(dtype)
        for number in (numbers.get("entropy"), numbers.get("log_sum_sq_probs"))
    )
    return LossStatistics(
        loss,
        z_loss,
        lse.to(dtype) if wanted.lse else None,
        entropy,
        predicted if wanted.predicted else None,
        (predicted == t) & counted if wanted.correct and predicted is not None else None,
        squares,
        None if logit_sum is None else (logit_sum / layout.classes).to(dtype),
        None if selected is None else (selected - lse.unsqueeze(1)).to(dtype),
    )


@disable_dynamo
def _over_ranks(arguments: Arguments, wanted: WantedParts, selected: Tensor | None, group: Any) -> LossStatistics:
    """Return the parts of DTensors, or of a group's shards of the classes."""
    part = part_of_rank(arguments, group, (wanted, None if selected is None else tuple(selected.shape)))
    ids = None
    if selected is not None:
        selected = selected if part.plan is None else part.plan.of_this_rank(selected, "selected")
        ids = _flat_ids(selected, part.lead, part.layout.classes)
    losses = _losses(part.call, part.visitor(wanted, wanted.every_row or ids is not None), ids)
    tensors = part.replicated_map()
    numbers = dict(zip(losses.all_names, by_chunks(tensors, losses), strict=True))
    parts = _parts(numbers, tensors.target, part.weight, part.call, wanted, part.layout)
    return LossStatistics._make([None if each is None else part.placed(each, arguments.shift) for each in parts])


def _of_probabilities(arguments: Arguments, wanted: WantedParts, selected: Tensor | None) -> LossStatistics:
    """Return the parts for class probabilities. Only the loss and the z-loss need more than the logits."""
    input, linear_weight, target, linear_bias, weight, options, _, chunking = arguments
    target = target.to(checks.parts_dtype(target.dtype, options.reduction))  # the loss has its dtype
    common: dict[str, Any] = {"linear_bias": linear_bias, "softcap": options.softcap, **options.scales(), **chunking}
    loss = linear_cross_entropy(
        *(input, linear_weight, target),
        weight=weight,
        reduction=options.reduction,
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
        lse_square_scale=options.lse_square_scale,
        **common,
    )
    labels = target.argmax(-1) if wanted.correct else target.new_zeros(target.shape[:-1], dtype=torch.int64)
    switches = wanted._replace(z_loss=False, lse=wanted.lse or wanted.z_loss)._asdict()
    rows = linear_cross_entropy_with_statistics(
        input, linear_weight, labels, ignore_index=-1, selected=selected, **switches, **common
    )
    z_loss = None
    if wanted.z_loss and rows.lse is not None:
        mass = target.to(rows.lse.dtype)
        mass = (mass if weight is None else mass * weight.to(mass.dtype)).sum(-1)
        z_loss = options.lse_square_scale * mass * rows.lse.square()
        z_loss = {"none": z_loss, "sum": z_loss.sum(), "mean": z_loss.mean()}[options.reduction].to(loss.dtype)
    return rows._replace(loss=loss, z_loss=z_loss, lse=rows.lse if wanted.lse else None)
