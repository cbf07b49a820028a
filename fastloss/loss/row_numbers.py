"""Losses put together from a few numbers of each row, in ordinary torch operations, N numbers at a time.

What the numbers are made of does not matter here: one visit to the logits, or those of several ranks, each of which
has some of the classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.contract import LossOptions, RowStatistics
from . import composite

__all__ = ["LabelLosses", "SoftLosses", "total_weight"]


class LabelLosses:
    """The losses of class indices; every tensor is ``(rows,)``, and every operation differentiable.

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
        labels = target.long()
        counted = labels != options.ignore_index
        label, invalid = labels, None
        # Off the CPU a look at the labels would make the host wait.
        if not target.is_cpu or not bool(counted.all()):
            # With zeros for its numbers an ignored row adds nothing, and no gradient goes to it.
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
        """Reduced as the options say."""
        return self._reduced(self.values())

    def values(self) -> Tensor:
        """Of each row; 0 where it is ignored, NaN where its label is none."""
        eps = self.options.label_smoothing
        value = self.lse - self.label_logit
        value = value * (1 - eps) if eps else value
        if self.options.lse_square_scale:
            value = value + self.options.lse_square_scale * self.lse.square()
        value = value if self.weight is None else value * self.weight
        if self.weighted_sum is not None:
            total = self.classes if self.class_weight is None else self.class_weight.sum()
            value = value + (total * self.lse - self.weighted_sum) * (eps / self.classes)
        return value

    def z_loss(self) -> Tensor:
        """The part of the loss that λ makes, reduced alike."""
        value = self.options.lse_square_scale * self.lse.square()
        return self._reduced(value if self.weight is None else value * self.weight)

    def _reduced(self, value: Tensor) -> Tensor:
        return composite.reduced(value, self.counted if self.weight is None else self.weight, self.options.reduction)


class SoftLosses:
    """The losses of class probabilities t; every tensor is ``(rows,)``, and every operation differentiable.

    With lse, nll = Σ_c w_c t_c (lse − z_c), mass = Σ_c w_c t_c and Σ_c w_c z_c of each row,

        loss_row  =  (1−ε) nll  +  λ mass lse²  +  ε/C (W lse − Σ_c w_c z_c)
    """

    def __init__(
        self,
        lse: Tensor,
        nll: Tensor,
        mass: Tensor,
        weighted_sum: Tensor | None,
        weight: Tensor | None,
        options: LossOptions,
        classes: int | Tensor,
    ) -> None:
        self.lse, self.nll, self.mass, self.weighted_sum = lse, nll, mass, weighted_sum
        self.class_weight = None if weight is None else weight.to(lse.dtype)
        self.options, self.classes = options, classes

    def values(self) -> Tensor:
        """Of each row."""
        eps = self.options.label_smoothing
        value = self.nll * (1 - eps) if eps else self.nll
        if self.options.lse_square_scale:
            value = value + self.options.lse_square_scale * self.mass * self.lse.square()
        if self.weighted_sum is not None:
            total = self.classes if self.class_weight is None else self.class_weight.sum()
            value = value + (total * self.lse - self.weighted_sum) * (eps / self.classes)
        return value


def total_weight(target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    """What a mean divides by, float64: Σ w_y of the rows that count, NaN if a label is none; the rows, if soft."""
    if target.is_floating_point():
        return torch.full((), float(len(target)), dtype=torch.float64, device=target.device)
    counted = target != options.ignore_index
    if weight is None:
        return counted.sum(dtype=torch.float64)
    label = torch.where(counted, target, 0).long()
    inside = (label >= 0) & (label < len(weight))
    of_label = torch.where(inside, weight.double()[torch.where(inside, label, 0)], float("nan"))
    return torch.where(counted, of_label, 0.0).sum()
