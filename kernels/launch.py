"""What every launch needs: the shape of the tiles, the grid, the counter of the programs that have ended.

The choices are made by arithmetic on the shape, never by trial at run time: no call stalls to tune itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fastloss.backends.contract import may_keep_memory

from .arguments import Strided, Tile, compiled_in

__all__ = [
    "ALL_REGISTERS",
    "FUSED",
    "Launch",
    "Memory",
    "Tiles",
    "alike",
    "arithmetic",
    "at_most",
    "begin",
    "counter",
    "forget",
    "in_blocks",
    "on_device",
    "plan",
    "power_of_2",
    "scratch",
    "spread",
    "vector_width",
]

# A whole row is held in registers up to this many classes: 16 warps of 16 logits a thread. Compiled for sm_90, twice
# as many still fit without spills in the plain forms, but not with class weights and smoothing; the second visit of
# a row of this length finds it in the L1 cache.
LONGEST_TILE = 8192
# Every launch says so itself: a multiplication and an addition may be fused. Triton's own default changes in 3.10.
FUSED = {"enable_fp_fusion": True}
_MOST_BLOCKS = 65535
# As many as a thread can have: fewer where a program has more than 256 of them.
ALL_REGISTERS = 255
# Programs of the interpreter's grids: few, so that each serves several tiles and the adding up is exercised.
_INTERPRETED_PROCESSORS = 3


class Tiles(NamedTuple):
    """How the rows are cut up among programs."""

    rows: int  # of a tile
    cols: int  # of a tile
    warps: int
    looped: bool  # the row is longer than the tile: it is visited block by block
    by_inner: bool  # neighbouring rows, not classes, are neighbours in memory: a tile stays within one outer index
    group: int  # classes that take their maximum together, in a looped row
    vec: int  # classes that one access takes
    number: int  # of tiles
    grid: int  # programs
    registers: int = 0  # the most that a thread may have; 0: what the compiler thinks best
    stages: int = 1  # tiles or blocks that are on their way from memory at once, this one among them
    ends: bool = False  # a looped row begins anywhere in an access: what no whole access has is visited apart

    @property
    def added_at_once(self) -> int:
        """How many programs' sums the last of them adds up at a time: 4 or fewer a thread, a power of 2."""
        return min(power_of_2(self.grid), 128 * self.warps)

    def tile(self, dtype: torch.dtype, **more: object) -> Tile:
        """Return the constants of a kernel that computes with logits of the dtype."""
        if self.looped:
            more = {"LOOPED": True, "GROUP": self.group, "ENDS": self.ends, **more}
        shape = (self.rows, self.cols, self.by_inner, self.vec)
        return compiled_in(Tile(*shape, arithmetic(dtype), STAGES=self.stages, **more))

    def constants(self) -> dict[str, object]:
        """Return what :meth:`options` does, and the tile's constants one by one."""
        tile = {"VEC": self.vec, "ROWS": self.rows, "COLS": self.cols, "BY_INNER": self.by_inner}
        return {**tile, **self.options()}

    def options(self) -> dict[str, object]:
        """Return the compiler's options for a kernel.

        ptxas aims at more programs on a processor than one, and spills a few bytes for that: at 64 registers for 512
        threads. With :data:`ALL_REGISTERS` it may take as many as there are; AMD's compiler has no such option.
        """
        most = min(self.registers, 65536 // (32 * self.warps))
        return {"num_warps": self.warps, **(at_most(most) if most else {}), **FUSED}


class Launch:
    """A kernel, its grid and what it is compiled for, made ready to be started again and again.

    At each launch Triton looks at every argument for what it may compile in: dtypes, ints that are 1 or a multiple of
    16, addresses that are. For arguments that are alike in all of that the answer is the same, and that look is most
    of a launch's host time: whoever keeps a ``Launch`` promises that they are, and only the first start takes it.
    """

    __slots__ = ("_compiled_in", "_constants", "_grid", "_kernel", "_start")

    def __init__(self, kernel: Any, grid: tuple[int, ...], constants: dict[str, object]) -> None:
        self._kernel, self._grid, self._constants = kernel, grid, constants
        self._start: Callable[..., None] | None = None
        self._compiled_in: tuple[object, ...] = ()

    def __call__(self, *arguments: object) -> None:
        if self._start is not None:
            self._start(*arguments, *self._compiled_in)
            return
        compiled = self._kernel[self._grid](*arguments, **self._constants)
        if isinstance(compiled, CompiledKernel):  # not what the interpreter gives, nor a compilation that still runs
            names = self._kernel.arg_names[len(arguments) :]
            self._compiled_in = tuple(self._constants[name] for name in names)
            self._start = compiled[(*self._grid, 1, 1)[:3]]


Ready = TypeVar("Ready")
_MOST_REMEMBERED = 1024
_memories: list[dict[Any, Any]] = []


class Memory(Generic[Ready]):
    """What was worked out for calls that are alike: tiles, arguments, launches. When it is full it begins anew."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Ready] = {}
        _memories.append(self._known)

    def get(self, key: Hashable, make: Callable[[], Ready]) -> Ready:
        found = self._known.get(key)
        if found is None:
            found = make()
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            self._known[key] = found
        return found


def forget() -> None:
    """Work everything out anew: after a change of what plans are made of, as tests and the tuner make."""
    for known in _memories:
        known.clear()


def alike(tensor: Tensor | None) -> Hashable:
    """What is the same of two tensors that one :class:`Launch` can take: all but shape, strides and device."""
    return None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16)


def _specialized(argument: object) -> Hashable:
    """Return what Triton may compile in of an argument."""
    if isinstance(argument, Tensor):
        return alike(argument)
    if isinstance(argument, tuple):
        return tuple(map(_specialized, argument))
    return argument if argument is None or type(argument) is int else (type(argument), argument)


_launches: Memory[Launch] = Memory()


def begin(kernel: Any, grid: tuple[int, ...], arguments: tuple[object, ...], constants: dict[str, object]) -> None:
    """``kernel[grid](*arguments, **constants)``, by a :class:`Launch` if arguments alike were seen before.

    For callers that work out everything else at each call.
    """
    tensors = (a.ptr if isinstance(a, Strided) else a for a in arguments)
    device = next(a.device for a in tensors if isinstance(a, Tensor))
    key = (kernel, grid, device, tuple(map(_specialized, arguments)), tuple(constants.items()))
    _launches.get(key, lambda: Launch(kernel, grid, constants))(*arguments)


def plan(
    logits: Tensor,
    gradient: Tensor | None = None,
    *,
    plain: bool = False,
    ranked: bool = False,
    smoothed: bool = False,
) -> Tiles:
    """The tiles for ``(outer, classes, inner)`` logits, and a gradient of that shape where one is written.

    - A short row shares its program with up to 63 others.
    - A row of up to :data:`LONGEST_TILE` classes, or half of that where no 128-bit access fits, is held in its
      program's registers and read once.
    - A longer row is visited block by block, twice where a gradient is written; few enough rows are in flight that
      the second visit finds them in a cache.
    - Where rows begin anywhere, or their length is odd, so that no 128-bit access fits, more of a thread's registers
      are addresses. It has 8 logits or, in a row that is held whole, up to 16, and all registers that there are.
    - Where neighbouring rows are neighbours in memory, ``(N, C, d1, …)``, a tile is wide in rows.

    ``plain``: the kernel keeps so little beside the logits (no class weights, no softcap) that a thread can have 64
    of them; then :func:`_plan_plain` knows better. ``ranked``, ``smoothed``: for it, the kernel counts ranks or adds
    up the logits too.
    """
    outer, classes, inner = logits.shape
    rows, itemsize = outer * inner, logits.element_size()
    written = [] if gradient is None else [gradient]
    vec = vector_width(logits, *written, classes=classes)
    cols = max(power_of_2(classes), 16)
    by_inner = inner > 1 and logits.stride(1) != 1
    if plain and not by_inner and logits.stride(1) == 1 and logits.dtype != torch.float64:
        better = _plan_plain(logits, gradient, vec, cols, ranked, smoothed)
        if better is not None:
            return better
    narrow = not by_inner and vec < 16 // itemsize  # an access for each element, or for two or four
    looped = cols > (64 if by_inner else LONGEST_TILE // 2 if narrow else LONGEST_TILE)
    if by_inner:
        cols = 32 if looped else cols
        tile_rows = min(64 if looped else min(4096 // cols, 128), max(power_of_2(inner), 16))
        warps, group = 8 if looped else 4, cols  # beside what a long row keeps, 16 logits a thread would spill
        number = outer * triton.cdiv(inner, tile_rows)
    else:
        if looped:
            cols, warps = (2048, 8) if narrow else (8192, 16)
        else:
            warps = max(4, cols // 512)
        tile_rows, group = max(1, min((1024 if narrow else 4096) // cols, 64, power_of_2(rows))), 16 // itemsize
        number = triton.cdiv(rows, tile_rows)
    resident = max(1, 32 // warps)
    if looped and written:
        resident = min(
            resident, max(1, _l2_bytes(logits.device) // (2 * classes * itemsize * _processors(logits.device)))
        )
    grid = max(1, min(number, _processors(logits.device) * resident))
    registers = ALL_REGISTERS if narrow else 0
    return Tiles(tile_rows, cols, warps, looped, by_inner, group, vec, number, grid, registers)


def _plan_plain(
    logits: Tensor, gradient: Tensor | None, vec: int, cols: int, ranked: bool, smoothed: bool
) -> Tiles | None:
    """Tiles of up to 64 logits a thread (32 of 32 bits), for as few warps a row as can hold it.

    What a row costs beside its logits, its sums over threads above all, each warp pays. ``python -m benchmarks.tune``
    measures them.

    - Up to 1024 classes of 16 bits: tiles of 2048 logits, 32 a thread, as a thread has parts of several rows.
    - Up to 8192 classes: as above, in half or a quarter of the warps; or, where there are too few rows to fill the
      GPU several times, small tiles of 16 logits a thread.
    - Up to 64 KB a row: whole rows still, the next two on their way into shared memory meanwhile.
    - Longer rows with a gradient are visited twice, by two programs of 512 threads a processor or by one of 1024: so
      few rows are in flight that the second visit finds most of them in the L2 cache. Without a gradient, in small
      blocks.
    - Long rows that begin anywhere in an access, as those of odd lengths do, are visited like the others, but for
      their ends. Short ones are not for here.

    Where ranks are counted, or the logits added up for label smoothing, some of these forms would spill: there a
    thread has fewer logits, or more registers beside fewer programs.
    """
    outer, classes, inner = logits.shape
    rows, itemsize, processors = outer * inner, logits.element_size(), _processors(logits.device)
    widest = 16 // itemsize

    def tiles(
        tile_rows: int, cols: int, warps: int, resident: int, stages: int, registers: int, looped: bool = False
    ) -> Tiles:
        number = triton.cdiv(rows, tile_rows)
        grid = max(1, min(number, processors * resident))
        if registers == ALL_REGISTERS:  # that there are for so many programs
            registers = min(registers, 65536 // (32 * warps * resident) // 8 * 8)
        return Tiles(
            tile_rows, cols, warps, looped, False, widest, vec, number, grid, registers=registers, stages=stages
        )

    if cols <= LONGEST_TILE:
        if vec < widest:
            return None
        most = ALL_REGISTERS if ranked or smoothed else 0
        if triton.cdiv(rows * cols, 4096) < 4 * 8 * processors:
            tile_rows = max(1, min(2048 // cols, 64, power_of_2(rows)))
            if 512 <= cols <= 1024:
                return tiles(tile_rows, cols, 2, 6 if most else 8, 1, most)
            resident = max(1, (8 if ranked and smoothed else 12 if most else 16) * 1024 // max(cols, 2048))
            return tiles(tile_rows, cols, max(4, cols // 512), resident, 1, most)
        if cols <= 1024 and itemsize == 2:  # 32 logits a thread
            tile_rows = min(2048 // cols, 64)
            resident = 5 if ranked and smoothed else 6 if most and cols <= 512 else 8 if most else 12
            return tiles(tile_rows, cols, max(1, tile_rows * cols // 1024), resident, 1, most)
        tile_rows = max(1, min(4096 // cols, 64))
        of_thread = 32 if itemsize == 4 else 64
        warps = max(1, tile_rows * cols // (32 * of_thread))
        if of_thread == 32:
            tile_rows = tile_rows // 2 if most and cols <= 1024 else tile_rows  # 16: of parts of many rows
            return tiles(tile_rows, cols, warps, max(1, (12 if ranked and smoothed else 16) // warps), 1, most)
        if tile_rows > 1:
            resident, registers = (5, 200) if (ranked or smoothed) and gradient is not None else (6, 168)
            return tiles(tile_rows, cols, warps, resident, 1, registers)
        if ranked and smoothed and warps == 2:
            return tiles(tile_rows, cols, warps, 6, 1, ALL_REGISTERS)
        return tiles(tile_rows, cols, warps, 16 // warps, 1, 128)
    # Anywhere in an access, but both at the same place in one: then their whole accesses are taken as such.
    ends = vec < widest and all(t.data_ptr() % 16 == 0 for t in (logits, gradient) if t is not None)
    ends = ends and (gradient is None or gradient.stride() == logits.stride())
    if vec < widest and not ends:
        return None
    # Whole rows, unless ranks take the registers that the rows on their way need.
    longest = 32768 if ranked else 65536  # bytes
    if gradient is not None and cols * itemsize <= longest and not ends:
        warps = max(1, cols * itemsize // 4096)
        stages = 3 if not ranked or warps < 8 else 2
        return tiles(1, cols, warps, 16 // warps, stages, 128)
    in_flight = 2 * processors * classes * itemsize  # bytes of rows, of two programs a processor
    few = in_flight <= _l2_bytes(logits.device) * 5 // 8
    if gradient is None and ranked and (smoothed or itemsize == 4):
        looped = tiles(1, 4096, 4, 3, 3, 168, looped=True)
    elif gradient is None:
        looped = tiles(1, 4096, 4, 4, 3, 0, looped=True)
    elif ranked and smoothed and itemsize == 2 and few:
        looped = tiles(1, 8192, 8, 2, 1, 128, looped=True)
    elif (ranked and smoothed) or ((ranked or smoothed) and itemsize == 4):
        looped = tiles(1, 8192, 16, 1, 1, 128, looped=True)
    elif few:
        looped = tiles(1, 8192, 16, 2, 1, 64, looped=True)
    else:
        looped = tiles(1, 16384, 32, 1, 1, 64, looped=True)
    return looped._replace(vec=widest, ends=ends)


def in_blocks(tiles: Tiles, classes: int) -> tuple[Tiles, int]:
    """For programs that each take one tile of some rows and some classes: how many cover all classes.

    That is a grid's second dimension, which has 16 bits; for millions of classes the tiles grow.
    """
    while triton.cdiv(classes, tiles.cols) > _MOST_BLOCKS:
        tiles = tiles._replace(cols=2 * tiles.cols)
    return tiles, triton.cdiv(classes, tiles.cols)


def vector_width(*tensors: Tensor, classes: int) -> int:
    """How many neighbouring classes can be taken by one 128-bit access, in every one of these 3-D tensors."""
    width = 16 // max(t.element_size() for t in tensors)
    for tensor in tensors:
        outer, _, inner = tensor.stride()
        if tensor.stride(1) != 1:
            return 1
        steps = [classes, tensor.data_ptr() // tensor.element_size()]
        steps += [outer] if tensor.shape[0] > 1 else []
        steps += [inner] if tensor.shape[2] > 1 else []
        while any(step % width for step in steps):
            width //= 2
    return width


def spread(count: int, device: torch.device) -> int:
    """Programs for ``count`` pieces of work that anyone can take: as many as the GPU holds at once."""
    return max(1, min(count, _processors(device) * 8))


def power_of_2(n: int) -> int:
    """The least power of 2 that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def arithmetic(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of the dtype that sums and exponentials are computed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def counter(device: torch.device) -> Tensor:
    """An int32 zero that the programs of one launch count up, and the last of them sets back to zero.

    Launches on one stream follow each other and can share it. A CUDA graph may be replayed beside anything, so a
    captured launch gets its own; so does one in a compiled program, whose memory may belong to a pool in which
    nothing is to stay behind.
    """
    stream = _lasting_stream(device)
    return torch.zeros(1, dtype=torch.int32, device=device) if stream is None else _stream_counter(device, stream)


def scratch(device: torch.device, programs: int, counts: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the programs of a launch leave to the last of them: ``(programs, 2)`` sums in float64, ``(programs,
    counts)`` int32, and the :func:`counter`. Launches on one stream share them, as they do that.
    """
    stream = _lasting_stream(device)
    make = _stream_scratch.__wrapped__ if stream is None else _stream_scratch
    return make(device, stream, programs, counts)


def _lasting_stream(device: torch.device) -> int | None:
    """The current stream, if what launches on it share may be kept from one call to the next."""
    if device.type != "cuda" or not may_keep_memory.get() or torch.cuda.is_current_stream_capturing():
        return None
    return int(driver.active.get_current_stream(device.index))


@functools.cache
def _stream_counter(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


@functools.lru_cache(256)
def _stream_scratch(
    device: torch.device, stream: int | None, programs: int, counts: int
) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.empty((programs, 2), dtype=torch.float64, device=device)
    of_counts = torch.empty((programs, counts), dtype=torch.int32, device=device)
    return sums, of_counts, torch.zeros(1, dtype=torch.int32, device=device)


def at_most(registers: int) -> dict[str, int]:
    """The launch option by which a thread has so many registers; AMD's compiler knows none."""
    return {"maxnreg": registers} if torch.version.hip is None else {}


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the tensor's own GPU, whichever is current."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@functools.cache
def _l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
