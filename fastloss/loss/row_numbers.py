"""Losses from a few numbers of each row, in ordinary torch operations, N numbers at a time.

The numbers come from visits of several ranks to their logits, each of which has some of the classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.contract import LossOptions, RowStatistics, SoftRowStatistics
from ..backends.view import wide_labels

__all__ = ["label_losses", "label_z_losses", "soft_losses", "total_weight"]


def label_losses(
    rows: RowStatistics, target: Tensor, weight: Tensor | None, options: LossOptions, classes: int | Tensor
) -> Tensor:
    """Return the rows' losses of class indices, ``(rows,)``; every operation is differentiable.

    With lse, the label's logit z_y and Σ_c w_c z_c of each row,

        loss_row  =  w_y (1−ε) (lse − z_y)  +  λ w_y lse²  +  ε/C (W lse − Σ_c w_c z_c)

    It is 0 where a row is ignored, NaN where its label is invalid.

    Args:
        rows: the numbers, of all C classes; ``(rows,)`` each.
        target: the labels, among all classes.
        weight: of all classes.
        options: ε, λ and the ignored index.
        classes: C; a scalar tensor where the host does not know it.
    """
    eps = options.label_smoothing
    weight = None if weight is None else weight.to(rows.lse.dtype)
    labels = wide_labels(target)
    counted = labels != options.ignore_index
    # With zeros for its numbers an ignored row adds nothing, and gets no gradient.
    lse, label_logit = (torch.where(counted, number, 0.0) for number in (rows.lse, rows.label_logit))
    weighted_sum = None if rows.weighted_sum is None else torch.where(counted, rows.weighted_sum, 0.0)
    value = (lse - label_logit) * (1 - eps)
    if options.lse_square_scale:
        value = value + options.lse_square_scale * lse.square()
    value = _weighted(value, labels, counted, weight, classes)
    return _with_spread(value, lse, weighted_sum, weight, eps, classes)


def label_z_losses(
    lse: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, classes: int | Tensor
) -> Tensor:
    """Return λ w_y lse² of each row, the part of :func:`label_losses` that λ makes; its arguments are as there."""
    labels = wide_labels(target)
    counted = labels != options.ignore_index
    weight = None if weight is None else weight.to(lse.dtype)
    value = options.lse_square_scale * torch.where(counted, lse, 0.0).square()
    return _weighted(value, labels, counted, weight, classes)


def _weighted(value: Tensor, labels: Tensor, counted: Tensor, weight: Tensor | None, classes: int | Tensor) -> Tensor:
    """Return w_y times a number of each row, which is 0 in rows that don't count; NaN where the label is invalid."""
    label = labels * counted
    if not labels.is_cpu:
        invalid = counted & ((labels < 0) | (labels >= classes))
        label = label * ~invalid
        value = value * torch.where(invalid, float("nan"), 1.0)
    return value if weight is None else value * weight[label] * counted


def soft_losses(
    rows: SoftRowStatistics, weight: Tensor | None, options: LossOptions, classes: int | Tensor
) -> Tensor:
    """Return the rows' losses against class probabilities t, ``(rows,)``; differentiable in all tensors.

    With lse, nll = Σ_c w_c t_c (lse − z_c), mass = Σ_c w_c t_c and Σ_c w_c z_c of each row,

        loss_row  =  (1−ε) nll  +  λ mass lse²  +  ε/C (W lse − Σ_c w_c z_c)

    The arguments are as of :func:`label_losses`.
    """
    eps = options.label_smoothing
    value = rows.nll * (1 - eps) if eps else rows.nll
    if options.lse_square_scale:
        value = value + options.lse_square_scale * rows.mass * rows.lse.square()
    weight = None if weight is None else weight.to(rows.lse.dtype)
    return _with_spread(value, rows.lse, rows.weighted_sum, weight, eps, classes)


def _with_spread(
    value: Tensor, lse: Tensor, weighted_sum: Tensor | None, weight: Tensor | None, eps: float, classes: int | Tensor
) -> Tensor:
    """Add ε/C (W lse − Σ_c w_c z_c), the part of label smoothing; without it return ``value``."""
    if weighted_sum is None:
        return value
    total = classes if weight is None else weight.sum()
    return value + (total * lse - weighted_sum) * (eps / classes)


def total_weight(target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    """Return the divisor of a mean over labels, Σ w_y of the counted rows, in float64; NaN if a label is invalid."""
    target = wide_labels(target)
    counted = target != options.ignore_index
    if weight is None:
        return counted.sum(dtype=torch.float64)
    label = torch.where(counted, target, 0)
    inside = (label >= 0) & (label < len(weight))
    of_label = torch.where(inside, weight.double()[torch.where(inside, label, 0)], float("nan"))
    return torch.where(counted, of_label, 0.0).sum()
