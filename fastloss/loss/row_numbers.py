"""Losses from a few numbers of each row, in ordinary torch operations, N numbers at a time.

The numbers come from one visit to the logits, or from those of several ranks, each of which has some of the classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.contract import LossOptions, RowStatistics, SoftRowStatistics
from ..backends.view import wide_labels
from . import composite

__all__ = ["LabelLosses", "soft_losses", "total_weight"]


class LabelLosses:
    """The losses of class indices. Every tensor is ``(rows,)``, and every operation is differentiable.

    With lse, the label's logit z_y and Σ_c w_c z_c of each row,

        loss_row  =  w_y (1−ε) (lse − z_y)  +  λ w_y lse²  +  ε/C (W lse − Σ_c w_c z_c)

    Args:
        rows: the numbers, of all C classes.
        target: the labels, among all classes.
        weight: of all classes.
        options: ε, λ, the ignored index and the reduction.
        classes: C; a scalar tensor where the host does not know it.
    """

    def __init__(
        self,
        rows: RowStatistics,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        classes: int | Tensor,
    ) -> None:
        self.options, self.classes = options, classes
        self.lse, self.label_logit, self.weighted_sum = rows.lse, rows.label_logit, rows.weighted_sum
        self.class_weight = None if weight is None else weight.to(self.lse.dtype)
        labels = wide_labels(target)
        counted = labels != options.ignore_index
        label, invalid = labels, None
        # Off the CPU the host would have to wait for the labels.
        if not target.is_cpu or not bool(counted.all()):
            # With zeros for its numbers an ignored row adds nothing, and gets no gradient.
            self.lse = torch.where(counted, self.lse, 0.0)
            self.label_logit = torch.where(counted, self.label_logit, 0.0)
            if self.weighted_sum is not None:
                self.weighted_sum = torch.where(counted, self.weighted_sum, 0.0)
            label = labels * counted
        if not target.is_cpu:
            invalid = counted & ((labels < 0) | (labels >= classes))
            label = label * ~invalid
        self.counted = counted
        self.weight: Tensor | None = None  # w_y; None: 1 in every row that counts
        if self.class_weight is not None:
            self.weight = self.class_weight[label] * counted
        if invalid is not None:
            one = counted.to(self.lse.dtype) if self.weight is None else self.weight
            self.weight = one.masked_fill(invalid, float("nan"))

    def loss(self) -> Tensor:
        """Return the loss, reduced as the options say."""
        return self._reduced(self.values())

    def values(self) -> Tensor:
        """Return the rows' losses: 0 where a row is ignored, NaN where its label is invalid."""
        eps = self.options.label_smoothing
        value = self.lse - self.label_logit
        value = value * (1 - eps) if eps else value
        if self.options.lse_square_scale:
            value = value + self.options.lse_square_scale * self.lse.square()
        value = value if self.weight is None else value * self.weight
        return _with_spread(value, self.lse, self.weighted_sum, self.class_weight, eps, self.classes)

    def z_loss(self) -> Tensor:
        """Return the z-loss, the part of the loss with λ, reduced alike."""
        value = self.options.lse_square_scale * self.lse.square()
        return self._reduced(value if self.weight is None else value * self.weight)

    def _reduced(self, value: Tensor) -> Tensor:
        return composite.reduced(value, self.counted if self.weight is None else self.weight, self.options.reduction)


def soft_losses(
    rows: SoftRowStatistics, weight: Tensor | None, options: LossOptions, classes: int | Tensor
) -> Tensor:
    """Return the rows' losses against class probabilities t, ``(rows,)``; differentiable in all tensors.

    With lse, nll = Σ_c w_c t_c (lse − z_c), mass = Σ_c w_c t_c and Σ_c w_c z_c of each row,

        loss_row  =  (1−ε) nll  +  λ mass lse²  +  ε/C (W lse − Σ_c w_c z_c)

    The arguments are as of :class:`LabelLosses`.
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
