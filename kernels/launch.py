"""What every launch needs: the shape of the tiles, the grid, the counter of the programs that have ended.

The choices are made by arithmetic on the shape, never by trial at run time: no call stalls to tune itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Tiles", "arithmetic", "choose_tiles", "counter", "grid_size", "on_device", "power_of_2", "vector_width"]

# A whole row is held in registers up to this many classes: 32 warps of 32 logits a thread.
LONGEST_TILE = 32768
# Programs of the interpreter's grids: few, so that each serves several tiles and the adding up is exercised.
_INTERPRETED_PROCESSORS = 3


class Tiles(NamedTuple):
    """The tile that a program holds at once, and how many warps hold it."""

    rows: int
    cols: int
    warps: int
    looped: bool  # the row is longer than the tile: it is visited block by block


def choose_tiles(rows: int, classes: int, itemsize: int, class_is_last: bool) -> Tiles:
    """The tile for logits of ``rows`` × ``classes``; ``class_is_last``: neighbouring classes are neighbours in memory.

    - A short row shares its program with others: about 4096 logits a program, 32 a thread.
    - A row of up to :data:`LONGEST_TILE` classes is a program's registers, read once.
    - A longer row is visited block by block, twice where a gradient is written; so few rows are in flight that the
      second visit finds them in the L2 cache.
    - Where neighbouring rows, not classes, are neighbours in memory, ``(N, C, d1, …)``, a tile is wide in rows.
    """
    cols = max(power_of_2(classes), 16)
    if not class_is_last:
        if cols <= 64:
            return Tiles(min(4096 // cols, max(power_of_2(rows), 16)), cols, 4, looped=False)
        return Tiles(min(128, max(power_of_2(rows), 16)), 32, 4, looped=True)
    if cols > LONGEST_TILE:
        return Tiles(1, 32768 // itemsize, 16, looped=True)
    if cols >= 4096:
        return Tiles(1, cols, min(max(cols // 1024, 4), 32), looped=False)
    return Tiles(min(4096 // cols, power_of_2(rows)), cols, 4, looped=False)


def grid_size(tiles: int, warps: int, device: torch.device) -> int:
    """Programs to start: as many as the GPU holds at once, each serving every so-many-th tile."""
    return max(1, min(tiles, _processors(device) * max(1, 32 // warps)))


def vector_width(*tensors: Tensor, classes: int) -> int:
    """How many neighbouring classes can be taken by one 128-bit access, in every one of these 3-D tensors."""
    width = 16 // max(t.element_size() for t in tensors)
    for tensor in tensors:
        outer, _, inner = tensor.stride()
        if tensor.stride(1) != 1:
            return 1
        steps = [classes]  # the alignment of the first element is Triton's own to find out
        steps += [outer] if tensor.shape[0] > 1 else []
        steps += [inner] if tensor.shape[2] > 1 else []
        while any(step % width for step in steps):
            width //= 2
    return width


def power_of_2(n: int) -> int:
    """The least power of 2 that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def arithmetic(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of the dtype that sums and exponentials are computed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def counter(device: torch.device) -> Tensor:
    """An int32 zero that the programs of one launch count up, and the last of them sets back to zero.

    Launches on one stream follow each other and can share it. A CUDA graph may be replayed beside anything, so a
    captured launch gets its own.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _stream_counter(device.index, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _stream_counter(index: int, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", index))


@contextlib.contextmanager
def on_device(tensor: Tensor) -> Iterator[None]:
    """Launch on the tensor's own GPU, whichever is current."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return triton.cdiv(a, b)
