"""Chunks of ``(outer, classes, inner)`` logits that stay in a CPU's cache while they are worked on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..contract import compute_dtype

__all__ = ["FEW", "Chunk", "Scratch", "Value", "chunks", "row_dtype"]

# A number for each row, (outer, 1, inner), or one for all of them: a float, or a scalar tensor.
Value: TypeAlias = Tensor | float

# Bytes that one chunk takes in the dtype of the arithmetic: a core's share of the caches, or a little more.
# Smaller, and the cost of starting each operation shows; larger, and the passes over a chunk leave the cache.
CHUNK_BYTES = 1 << 22
# Fewer chunks than this are worked on one after the other, more by threads of their own (`workers.for_each`).
FEW = 8


class Chunk(NamedTuple):
    """A box of rows: ``logits[outer, :, inner]``, each a first index and a length."""

    outer: tuple[int, int]
    inner: tuple[int, int]

    def of(self, tensor: Tensor) -> Tensor:
        """Return this chunk of an ``(outer, classes or 1, inner)`` tensor: a view."""
        if tensor.shape[0] != self.outer[1]:
            tensor = tensor.narrow(0, *self.outer)
        if tensor.shape[2] != self.inner[1]:
            tensor = tensor.narrow(2, *self.inner)
        return tensor

    def of_value(self, value: Value) -> Value:
        """Return this chunk of a number for each row; a number for all rows is returned as it is."""
        return self.of(value) if isinstance(value, Tensor) and value.dim() else value


def chunks(shape: torch.Size, dtype: torch.dtype) -> Iterator[Chunk]:
    """Divide ``(outer, classes, inner)``: whole outer slices while they fit, else pieces of one of them."""
    outer, classes, inner = shape
    itemsize = compute_dtype(dtype).itemsize
    # Few chunks are worked on by torch's own threads together: fewer and larger, so that they meet less often.
    nbytes = CHUNK_BYTES if shape.numel() * itemsize >= FEW * CHUNK_BYTES else 2 * CHUNK_BYTES
    rows = max(1, nbytes // (itemsize * max(classes, 1)))
    if rows >= inner:
        outer_step, inner_step = max(1, rows // max(inner, 1)), max(inner, 1)
    else:
        outer_step, inner_step = 1, rows
    for o in range(0, outer, outer_step):
        for i in range(0, inner, inner_step):
            yield Chunk((o, min(outer_step, outer - o)), (i, min(inner_step, inner - i)))


def row_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of numbers per row, which are few: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class _Buffers(threading.local):
    """Each thread's own buffers, by their use and dtype."""

    def __init__(self) -> None:
        self.by_use: dict[tuple[str, torch.dtype], Tensor] = {}


class Scratch:
    """One buffer, used again for every chunk, and on a CPU by the next call of the same thread.

    New memory costs a CPU as much as a pass over it: the system hands it over page by page, and zeroed. So the few
    megabytes of a chunk are reused (:data:`REUSED_BYTES` at most, for each use, dtype and thread).
    """

    REUSED_BYTES = 1 << 25
    _buffers = _Buffers()

    def __init__(self, use: str, dtype: torch.dtype, device: torch.device) -> None:
        self._use, self._dtype, self._device = (use, dtype), dtype, device
        self._flat: Tensor | None = self._buffers.by_use.get(self._use) if device.type == "cpu" else None

    def like(self, tensor: Tensor) -> Tensor:
        """Return a contiguous view of the buffer, of ``tensor``'s shape; not initialised."""
        n = tensor.numel()
        if self._flat is None or self._flat.numel() < n:
            with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
                self._flat = torch.empty(n, dtype=self._dtype, device=self._device)
            if self._device.type == "cpu" and self._flat.nbytes <= self.REUSED_BYTES:
                self._buffers.by_use[self._use] = self._flat
        return self._flat[:n].view(tensor.shape)
