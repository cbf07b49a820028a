"""The one view of logits that backends know, ``(outer, classes, inner)``; see :mod:`fastloss.backends.contract`."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["as_labels", "as_rows", "class_dim", "row_shape"]


def class_dim(input: Tensor) -> int:
    """Return the dimension of the classes in ``(C,)`` or ``(N, C, …)``."""
    return 1 if input.dim() > 1 else 0


def row_shape(input: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor that has one element per row of ``(C,)`` or ``(N, C, …)``."""
    return (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()


def as_rows(input: Tensor) -> Tensor:
    """Return ``input`` as ``(outer, classes, inner)``: a view wherever its strides allow one."""
    if input.dim() == 1:
        return input[None, :, None]
    if input.dim() == 2:
        return input.unsqueeze(2)
    # Not flatten(2), which a batched upstream (is_grads_batched=True) has no rule for.
    return input.reshape(*input.shape[:2], math.prod(input.shape[2:]))


def as_labels(target: Tensor) -> Tensor:
    """Return the labels as ``(rows,)``, contiguous, in the order of :func:`as_rows`."""
    return target if target.dim() == 1 and target.is_contiguous() else target.reshape(-1).contiguous()
