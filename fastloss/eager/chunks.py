"""Cutting ``(outer, classes, inner)`` logits into pieces that stay in a CPU's cache while they are worked on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import compute_dtype

__all__ = ["Chunk", "Scratch", "chunks"]

# Bytes that one chunk takes in the dtype of the arithmetic, for each thread: near one core's share of the caches.
# Smaller, and the cost of starting each operation shows; larger, and the passes over a chunk leave the cache.
BYTES_PER_THREAD = 1 << 21


class Chunk(NamedTuple):
    """A box of rows: ``logits[outer, :, inner]``."""

    outer: slice
    inner: slice

    def of(self, tensor: Tensor) -> Tensor:
        """This chunk of an ``(outer, classes, inner)`` tensor: a view."""
        return tensor[self.outer, :, self.inner]

    def of_rows(self, rows: Tensor) -> Tensor:
        """This chunk of an ``(outer, 1, inner)`` tensor that holds one value a row: a view."""
        return rows[self.outer, :, self.inner]


def chunks(shape: torch.Size, dtype: torch.dtype) -> Iterator[Chunk]:
    """Cover ``(outer, classes, inner)``: whole outer slices while they fit, else pieces of one of them."""
    outer, classes, inner = shape
    itemsize = compute_dtype(dtype).itemsize
    rows = max(1, BYTES_PER_THREAD * torch.get_num_threads() // (itemsize * max(classes, 1)))
    if rows >= inner:
        outer_step, inner_step = max(1, rows // max(inner, 1)), max(inner, 1)
    else:
        outer_step, inner_step = 1, rows
    for o in range(0, outer, outer_step):
        for i in range(0, inner, inner_step):
            yield Chunk(slice(o, min(o + outer_step, outer)), slice(i, min(i + inner_step, inner)))


class Scratch:
    """One buffer, used again for every chunk; grown on first need, never shrunk."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = torch.empty(0, dtype=dtype, device=device)

    def like(self, tensor: Tensor) -> Tensor:
        """A contiguous ``(outer, classes, inner)`` view of the buffer, of ``tensor``'s shape; not initialised."""
        if self._flat.numel() < tensor.numel():
            self._flat = torch.empty(tensor.numel(), dtype=self._flat.dtype, device=self._flat.device)
        return self._flat[: tensor.numel()].view(tensor.shape)
