"""The same loss from torch's own differentiable operators: slower, but every transform of torch can go through it.

It serves calls that a fused pass does not: function transforms (``torch.func``), tracing by ``torch.compile``, tiny
tensors on a CPU, and derivatives past the first where the logits were saved.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy

from .. import checks
from ..backends.contract import LossOptions, Scalar, compute_dtype
from ..backends.view import class_dim, wide_labels
from ..ranks import placements

__all__ = ["accuracy", "by_class", "cross_entropy", "labels_of", "reduced", "row_weight", "scaled"]


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the loss in ``dtype``, by default torch's; the shapes are as in :func:`fastloss.cross_entropy`."""
    soft = checks.is_soft(input, target)
    target = wide_labels(target)
    if dtype is None:
        dtype = torch.promote_types(input.dtype, target.dtype) if soft else input.dtype
    plain = not (options.hides_softmax or options.is_scaled or (not soft and dtype.itemsize > input.dtype.itemsize))
    # Of sharded rows torch takes the mean of the ranks' own means, however many rows each rank counts.
    over_ranks = options.reduction == "mean" and not soft and placements.is_dtensor(input)
    # A loss of several operators is computed in float32, and rounded once.
    logits = input if plain and not over_ranks else input.to(compute_dtype(input.dtype))
    if not options.from_logits:
        return _of_probabilities(logits, target, weight, options).to(dtype)
    logits = scaled(logits, options)
    if weight is not None and not soft and not torch.is_autocast_enabled(input.device.type):
        weight = weight.to(logits.dtype)
    loss = torch_cross_entropy(
        logits,
        target,
        weight,
        ignore_index=-100 if soft else options.ignore_index,
        reduction="sum" if over_ranks else options.reduction,
        label_smoothing=options.label_smoothing,
    )
    if over_ranks:
        loss = loss / row_weight(target, weight, logits.dtype, options)[1].sum()
    elif plain:
        return loss
    if options.lse_square_scale:
        loss = loss + _z_loss(logits, target, weight, options)
    return loss.to(dtype)


def scaled(x: Tensor, options: LossOptions) -> Tensor:
    """Return the logits z of the input x, in its dtype."""
    scale, temperature = (
        number.tensor.to(x.dtype) if isinstance(number, Scalar) else number
        for number in (options.logit_scale, options.temperature)
    )
    if isinstance(scale, Tensor) or scale != 1.0:
        x = x * scale
    if options.softcap is not None:
        x = options.softcap * torch.tanh(x / options.softcap)
    if isinstance(temperature, Tensor) or temperature != 1.0:
        x = x / temperature
    return x


def _z_loss(logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    lse = torch.logsumexp(logits, class_dim(logits))
    if checks.is_soft(logits, target):
        mass = (target if weight is None else target * by_class(weight, target)).sum(class_dim(target))
        return reduced(options.lse_square_scale * mass * lse.square(), None, options.reduction)
    counted, weights = row_weight(target, weight, logits.dtype, options)
    # The inner `where` keeps an ignored row's infinities out of the gradient of the outer one.
    squares = torch.where(counted, torch.where(counted, lse, 0.0).square() * weights, 0.0)
    return reduced(options.lse_square_scale * squares, weights, options.reduction)


def _of_probabilities(y: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    """Return −Σ t log y. With class indices it reads N values, so that there is nothing to fuse."""
    dim, eps = class_dim(y), options.label_smoothing
    w = None if weight is None else by_class(weight.to(y.dtype), y)
    if checks.is_soft(y, target):
        u = target * (1 - eps) + eps / y.shape[dim]
        u = u if w is None else u * w
        # The derivative by u is log y, at u = 0 too. Where y is 0 as well, u log y is NaN. There −√u stands for it,
        # which is 0 and has the slope −inf; and log's slope stays out of the gradient of y.
        limit = (u == 0) & ~((y > 0) & (y < torch.inf))
        products = u * torch.where(limit, 1.0, y).log()
        rows = -torch.where(limit, -torch.where(limit, u, 1.0).sqrt(), products).sum(dim)
        return reduced(rows, None, options.reduction)
    counted, weights = row_weight(target, weight, y.dtype, options)
    label = torch.where(counted, target, 0)
    p_y = torch.where(counted, y.gather(dim, label.unsqueeze(dim)).squeeze(dim), 1.0)
    rows = -(1 - eps) * weights * p_y.log()
    if eps:
        logs = y.log() if w is None else y.log() * w
        rows = rows - torch.where(counted, eps / y.shape[dim] * logs.sum(dim), 0.0)
    return reduced(rows, weights, options.reduction)


def row_weight(
    target: Tensor, weight: Tensor | None, dtype: torch.dtype, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Return which rows count, and w_y, which is 0 in the others. The labels are wide."""
    counted = target != options.ignore_index
    if weight is None:
        return counted, counted.to(dtype)
    return counted, weight.to(dtype)[torch.where(counted, target, 0)] * counted


def reduced(rows: Tensor, row_weight: Tensor | None, reduction: str) -> Tensor:
    """Return the rows' values, their sum, or their mean over the rows' weights (None: over their number)."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.mean() if row_weight is None else rows.sum() / row_weight.sum()


def by_class(weight: Tensor, input: Tensor) -> Tensor:
    """Return the class weights in a shape that broadcasts with ``input``."""
    return weight.view([-1] + [1] * (input.dim() - class_dim(input) - 1))


def labels_of(target: Tensor) -> Tensor:
    """Return the labels of rows with one value per class: their argmax, the lower index where two are equal."""
    dim = class_dim(target)
    if target.shape[dim] == 0:
        raise ValueError(f"fastloss: target has shape {tuple(target.shape)}; expected at least one class")
    return (target.to(torch.uint8) if target.dtype == torch.bool else target).argmax(dim)


def accuracy(input: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, ...]:
    """Return the accuracy for each k of the options, against class indices, as :func:`fastloss.accuracy` does."""
    dim = class_dim(input)
    classes = input.shape[dim]
    target = wide_labels(target).view(input.shape[:dim] + input.shape[dim + 1 :])
    counted = target != options.ignore_index
    if classes == 0:
        rank = torch.zeros_like(target)
    elif options.topk == (1,):  # torch.argmax gives the first of equal maxima, and NaN is its greatest value
        rank = torch.ne(input.argmax(dim), target).long()  # not !=, which hides torch's errors
    else:
        label = torch.where(counted, target, 0).unsqueeze(dim)
        score = input.gather(dim, label)
        index = torch.arange(classes, device=input.device).view([-1] + [1] * (input.dim() - dim - 1))
        if placements.is_dtensor(input):
            index = placements.replicated_beside(index, input)
        nan, score_nan = input.isnan(), score.isnan()
        before = torch.where(score_nan, False, nan | (input > score))
        tied = (index < label) & ((input == score) | (nan & score_nan))
        rank = (before | tied).sum(dim)
    values = []
    for k in options.topk:
        right = ((rank < k) & counted).to(torch.float32)
        if options.reduction != "none":
            number = right.sum(dtype=torch.float64)
            right = (number / counted.sum() if options.reduction == "mean" else number).to(torch.float32)
        values.append(right)
    return tuple(values)
