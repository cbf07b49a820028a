"""The one view of logits that backends know, ``(outer, classes, inner)``; see :mod:`fastloss.backends.contract`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = [
    "as_labels",
    "as_rows",
    "class_dim",
    "in_memory",
    "may_overlap",
    "pieces_of_labels",
    "row_shape",
    "wide_labels",
]


def class_dim(input: Tensor) -> int:
    """Return the dimension of the classes in ``(C,)`` or ``(N, C, …)``."""
    return 1 if input.dim() > 1 else 0


def row_shape(input: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor that has one element per row of ``(C,)`` or ``(N, C, …)``."""
    return (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()


def as_rows(input: Tensor) -> Tensor:
    """Return ``input`` as ``(outer, classes, inner)``: a view wherever its strides allow one.

    Its memory holds its values.
    """
    input = in_memory(input)
    if input.dim() == 1:
        return input[None, :, None]
    if input.dim() == 2:
        return input.unsqueeze(2)
    # Not flatten(2), which a batched upstream (is_grads_batched=True) has no rule for.
    return input.reshape(*input.shape[:2], math.prod(input.shape[2:]))


def in_memory(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if its memory holds its values negated (``conj().imag``): kernels read memory."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def as_labels(target: Tensor) -> Tensor:
    """Return the labels as ``(rows,)``, contiguous, in the order of :func:`as_rows`."""
    return target if target.dim() == 1 and target.is_contiguous() else target.reshape(-1).contiguous()


def may_overlap(tensor: Tensor) -> bool:
    """Return True unless the strides show that no two elements share memory."""
    reach = 0  # of the dimensions so far: the distance between the first and the last of their elements
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def wide_labels(target: Tensor) -> Tensor:
    """Return class indices in int64; a target of another kind as it is.

    torch compares a tensor with a number in the tensor's dtype: in uint8, 156 equals -100, and 50 equals 306. So
    labels are widened before anything is compared with them, here or as a backend reads them.
    """
    return target.long() if target.dtype in (torch.uint8, torch.int32) else target


def pieces_of_labels(target: Tensor) -> Iterator[Tensor]:
    """Yield class indices, flat and in int64; on a CPU in pieces, so that what is computed of them stays small."""
    flat = target.flatten()
    for piece in flat.split(1 << 16) if target.is_cpu else (flat,):
        yield piece.long()
