"""The same loss from torch's own differentiable ops: slower, but every transform of torch can go through it.

It serves what a fused pass cannot: function transforms (``torch.func``), tracing by ``torch.compile``, tiny
tensors on a CPU, and derivatives past the first where the logits were kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import LossOptions

__all__ = ["accuracy", "cross_entropy"]


def cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    """The loss of class-index targets in ``input``'s dtype; shapes as in :func:`fastloss.cross_entropy`."""
    logits = input
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(input / options.softcap)
    if weight is not None:
        weight = weight.to(logits.dtype)
    if target.dtype not in (torch.int64, torch.uint8):
        target = target.long()
    loss = F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=options.ignore_index,
        reduction=options.reduction,
        label_smoothing=options.label_smoothing,
    )
    if not options.lse_square_scale:
        return loss
    counted = target != options.ignore_index
    label = torch.where(counted, target, 0).long()
    row_weight = counted.to(logits.dtype) if weight is None else weight[label] * counted
    lse = torch.logsumexp(logits, 1 if logits.dim() > 1 else 0)
    # The inner `where` keeps an ignored row's infinities out of the gradient of the outer one.
    squares = torch.where(counted, torch.where(counted, lse, 0.0).square() * row_weight, 0.0)
    squares = options.lse_square_scale * squares
    if options.reduction == "none":
        return loss + squares
    if options.reduction == "sum":
        return loss + squares.sum()
    return loss + squares.sum() / row_weight.sum()


def accuracy(input: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, ...]:
    """For each k of the options the accuracy of class-index targets, as :func:`fastloss.accuracy` has it."""
    dim = 1 if input.dim() > 1 else 0
    classes = input.shape[dim]
    target = target.long().view(input.shape[:dim] + input.shape[dim + 1 :])
    counted = target != options.ignore_index
    if classes == 0:
        rank = torch.zeros_like(target)
    elif options.topk == (1,):  # torch.argmax gives the first of equal maxima, and NaN is its greatest value
        rank = (input.argmax(dim) != target).long()
    else:
        label = torch.where(counted, target, 0).unsqueeze(dim)
        mine = input.gather(dim, label)
        index = torch.arange(classes, device=input.device).view([-1] + [1] * (input.dim() - dim - 1))
        nan, mine_nan = input.isnan(), mine.isnan()
        before = torch.where(mine_nan, False, nan | (input > mine))
        tied = (index < label) & ((input == mine) | (nan & mine_nan))
        rank = (before | tied).sum(dim)
    values = []
    for k in options.topk:
        right = ((rank < k) & counted).to(torch.float32)
        if options.reduction != "none":
            number = right.sum(dtype=torch.float64)
            right = (number / counted.sum() if options.reduction == "mean" else number).to(torch.float32)
        values.append(right)
    return tuple(values)
