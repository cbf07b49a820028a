"""Tiles: how the rows of a launch are divided among its programs, and its grid."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from .arguments import Tile, compiled_in

__all__ = [
    "ALL_REGISTERS",
    "FUSED",
    "Tiles",
    "arithmetic",
    "grid_for",
    "in_blocks",
    "in_cache",
    "plan",
    "power_of_2",
    "vector_width",
    "without_spills",
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
    """How the rows are divided among programs."""

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
        """Return how many programs' sums the last one adds up at a time: 4 or fewer a thread, a power of 2."""
        return min(power_of_2(self.grid), 128 * self.warps)

    def tile(self, dtype: torch.dtype, **more: object) -> Tile:
        """Return the constants of a kernel that computes with logits of the dtype."""
        if self.looped:
            more = {"LOOPED": True, "GROUP": self.group, "ENDS": self.ends, **more}
        shape = (self.rows, self.cols, self.by_inner, self.vec)
        return compiled_in(Tile(*shape, arithmetic(dtype), STAGES=self.stages, **more))

    def options(self) -> dict[str, object]:
        """Return the compiler's options for a kernel.

        ptxas aims at more programs on a processor than one, and spills a few bytes for that: at 64 registers for 512
        threads. With :data:`ALL_REGISTERS` it may take as many as there are; AMD's compiler has no such option.
        """
        most = min(self.registers, 65536 // (32 * self.warps))
        return {"num_warps": self.warps, **(at_most(most) if most else {}), **FUSED}


class Rule(NamedTuple):
    """A line of the tables: the tile of rows of up to so many classes, rounded up to a power of 2."""

    classes: int
    logits: int  # of a tile of up to 64 rows
    warps: int
    resident: int  # warps on a processor
    registers: int = 0  # the most that a thread may have; ALL_REGISTERS: all that there are for the resident warps
    stages: int = 1


# The tables of :func:`_plan_by_tables`. Within a table the first rule whose classes suffice holds. What a row costs
# beside its logits, its sums over threads above all, each warp pays: so a row has as few warps as can hold it.
# ``python -m benchmarks.tune`` measured the rules on an H100, and ``python -m benchmarks.codegen`` shows that none of
# them spills: where ranks are counted, or logits added up for label smoothing, a thread has fewer logits, or more
# registers beside fewer programs.
_ALL = ALL_REGISTERS
# Whole rows, too few to fill the GPU several times: small tiles of 16 logits a thread.
_FEW_ROWS = {
    "plain": (
        *(Rule(256, 2048, 4, 32), Rule(1024, 2048, 2, 16), Rule(2048, 2048, 4, 32)),
        *(Rule(4096, 4096, 8, 32), Rule(8192, 8192, 16, 32)),
    ),
    "ranked or smoothed": (
        *(Rule(256, 2048, 4, 24, _ALL), Rule(1024, 2048, 2, 12, _ALL), Rule(2048, 2048, 4, 24, _ALL)),
        *(Rule(4096, 4096, 8, 24, _ALL), Rule(8192, 8192, 16, 24, _ALL)),
    ),
    "both": (
        *(Rule(256, 2048, 4, 16, _ALL), Rule(1024, 2048, 2, 12, _ALL), Rule(2048, 2048, 4, 16, _ALL)),
        *(Rule(4096, 4096, 8, 16, _ALL), Rule(8192, 8192, 16, 16, _ALL)),
    ),
}
# Whole rows of 16 bits: up to 1024 classes 32 logits a thread, which has parts of several rows; then 64.
_MANY_ROWS_OF_16_BITS = {
    "plain": (
        *(Rule(16, 2048, 1, 12), Rule(1024, 2048, 2, 24), Rule(2048, 4096, 2, 12, 168)),
        *(Rule(4096, 4096, 2, 16, 128), Rule(8192, 8192, 4, 16, 128)),
    ),
    "ranked or smoothed": (
        *(Rule(16, 2048, 1, 6, _ALL), Rule(512, 2048, 2, 12, _ALL), Rule(1024, 2048, 2, 16, _ALL)),
        *(Rule(2048, 4096, 2, 12, 168), Rule(4096, 4096, 2, 16, 128), Rule(8192, 8192, 4, 16, 128)),
    ),
    "both": (
        *(Rule(16, 2048, 1, 5, _ALL), Rule(1024, 2048, 2, 10, _ALL), Rule(2048, 4096, 2, 12, 168)),
        *(Rule(4096, 4096, 2, 12, _ALL), Rule(8192, 8192, 4, 16, 128)),
    ),
}
_WITH_GRADIENT = Rule(2048, 4096, 2, 10, 200)  # in the place of 168 registers, where ranked or smoothed
# Whole rows of 32 bits: 32 logits a thread, or 16 where it has parts of many rows.
_MANY_ROWS_OF_32_BITS = {
    "plain": (Rule(16, 4096, 1, 16), Rule(32, 4096, 2, 16), Rule(4096, 4096, 4, 16), Rule(8192, 8192, 8, 16)),
    "ranked or smoothed": (
        *(Rule(16, 512, 1, 16, _ALL), Rule(32, 1024, 2, 16, _ALL), Rule(1024, 2048, 4, 16, _ALL)),
        *(Rule(4096, 4096, 4, 16, _ALL), Rule(8192, 8192, 8, 16, _ALL)),
    ),
    "both": (
        *(Rule(16, 512, 1, 12, _ALL), Rule(32, 1024, 2, 12, _ALL), Rule(1024, 2048, 4, 12, _ALL)),
        *(Rule(4096, 4096, 4, 12, _ALL), Rule(8192, 8192, 8, 12, _ALL)),
    ),
}
# Whole rows with a gradient, of more than 8192 classes and up to so many bytes: the next two rows, or the next one,
# are on their way into shared memory meanwhile, as far as it has room. By (warps, stages).
_STAGED_BYTES, _STAGED_BYTES_RANKED = 65536, 32768
# Rows in blocks of ``classes``, without a gradient: small blocks, three of them on their way.
_READ_ONCE = Rule(4096, 4096, 4, 16, 0, stages=3)
_READ_ONCE_RANKED = Rule(4096, 4096, 4, 12, 168, stages=3)  # beside label smoothing, or of 32 bits
# With a gradient, rows are visited twice, and so few are in flight that the second visit finds most of them in the L2
# cache: two programs of 512 threads a processor where their rows fit, else one of 1024.
_READ_TWICE = {"fits": Rule(8192, 8192, 16, 32, 64), "too long": Rule(16384, 16384, 32, 32, 64)}
_READ_TWICE_LOADED = {"fits": Rule(8192, 8192, 8, 16, 128), "too long": Rule(8192, 8192, 16, 16, 128)}


def plan(
    logits: Tensor,
    gradient: Tensor | None = None,
    *,
    plain: bool = False,
    ranked: bool = False,
    smoothed: bool = False,
) -> Tiles:
    """Return the tiles for ``(outer, classes, inner)`` logits, and a gradient of that shape where one is written.

    The choice is made by arithmetic on the shape, never by trial at run time: no call stalls to tune itself.

    - A short row shares its program with up to 63 others.
    - A row of up to :data:`LONGEST_TILE` classes, or half of that where no 128-bit access fits, is held in its
      program's registers and read once.
    - A longer row is visited block by block, twice where a gradient is written; few enough rows are in flight that
      the second visit finds them in a cache.
    - Where rows begin anywhere, or their length is odd, so that no 128-bit access fits, more of a thread's registers
      are addresses. It has 8 logits or, in a row that is held whole, up to 16, and all registers that there are.
    - Where neighbouring rows are neighbours in memory, ``(N, C, d1, …)``, a tile is wide in rows.

    ``plain``: the kernel keeps so little beside the logits (no class weights, no softcap) that a thread can have 64
    of them; then the tables decide. ``ranked``, ``smoothed``: the kernel counts ranks, or adds up the logits, too.
    """
    outer, classes, inner = logits.shape
    rows, itemsize = outer * inner, logits.element_size()
    written = [] if gradient is None else [gradient]
    vec = vector_width(logits, *written, classes=classes)
    cols = max(power_of_2(classes), 16)
    by_inner = inner > 1 and logits.stride(1) != 1
    if plain and not by_inner and logits.stride(1) == 1 and logits.dtype != torch.float64:
        better = _plan_by_tables(logits, gradient, vec, cols, ranked, smoothed)
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
    grid = max(1, min(number, _processors(logits.device) * max(1, 32 // warps)))
    registers = ALL_REGISTERS if narrow else 0
    tiles = Tiles(tile_rows, cols, warps, looped, by_inner, group, vec, number, grid, registers)
    return in_cache(tiles, logits.device, classes * itemsize) if looped and written else tiles


def _plan_by_tables(
    logits: Tensor, gradient: Tensor | None, vec: int, cols: int, ranked: bool, smoothed: bool
) -> Tiles | None:
    """Return tiles of up to 64 logits a thread (32 of 32 bits); None where the tables have no rule.

    Long rows that begin anywhere in an access, as those of odd lengths do, are visited as others are, but for their
    ends. For short ones there is no rule.
    """
    rows, itemsize = logits.shape[0] * logits.shape[2], logits.element_size()
    widest = 16 // itemsize
    load = "both" if ranked and smoothed else "ranked or smoothed" if ranked or smoothed else "plain"
    looped = ends = few = False
    if cols <= LONGEST_TILE:
        if vec < widest:
            return None
        few = triton.cdiv(rows * cols, 4096) < 4 * 8 * _processors(logits.device)
        table = _FEW_ROWS if few else _MANY_ROWS_OF_16_BITS if itemsize == 2 else _MANY_ROWS_OF_32_BITS
        rule = next(rule for rule in table[load] if cols <= rule.classes)
        if rule.registers == 168 and load != "plain" and gradient is not None:
            rule = _WITH_GRADIENT
    else:
        # Anywhere in an access, but both tensors at the same place in one: their whole accesses are taken as such.
        ends = vec < widest and all(t.data_ptr() % 16 == 0 for t in (logits, gradient) if t is not None)
        ends = ends and (gradient is None or gradient.stride() == logits.stride())
        if vec < widest and not ends:
            return None
        row_bytes, most = cols * itemsize, _STAGED_BYTES_RANKED if ranked else _STAGED_BYTES
        stages = 3 if not ranked or row_bytes < 8 * 4096 else 2
        # All stages but one lie in shared memory, beside a few numbers.
        stages = min(stages, 1 + (_shared_bytes(logits.device) - 1) // row_bytes)
        looped = gradient is None or row_bytes > most or ends or stages < 2
        if looped:
            rule = _rule_of_long_rows(logits, gradient is not None, ranked, smoothed)
            cols, vec = rule.classes, widest
        else:
            rule = Rule(cols, cols, max(1, row_bytes // 4096), 16, 128, stages)
    tile_rows = 1 if cols > LONGEST_TILE or looped else max(1, min(rule.logits // cols, 64))
    if few:
        tile_rows = min(tile_rows, power_of_2(rows))
    number, resident = triton.cdiv(rows, tile_rows), max(1, rule.resident // rule.warps)
    registers = rule.registers
    if registers == ALL_REGISTERS:  # as many as there are for so many programs
        registers = min(registers, 65536 // (32 * rule.warps * resident) // 8 * 8)
    grid = max(1, min(number, _processors(logits.device) * resident))
    return Tiles(
        *(tile_rows, cols, rule.warps, looped, False, widest, vec, number, grid),
        registers=registers,
        stages=rule.stages,
        ends=ends,
    )


def _rule_of_long_rows(logits: Tensor, gradient: bool, ranked: bool, smoothed: bool) -> Rule:
    classes, itemsize = logits.shape[1], logits.element_size()
    if not gradient:
        return _READ_ONCE_RANKED if ranked and (smoothed or itemsize == 4) else _READ_ONCE
    in_flight = 2 * _processors(logits.device) * classes * itemsize  # bytes of rows, of two programs a processor
    length = "fits" if in_flight <= _l2_bytes(logits.device) * 5 // 8 else "too long"
    if itemsize == 4 and (ranked or smoothed):
        return _READ_TWICE_LOADED["too long"]
    return (_READ_TWICE_LOADED if ranked and smoothed else _READ_TWICE)[length]


# Forward kernels of the hard loss that spill 8 bytes, compiled for sm_80 or sm_100, with the registers that ptxas
# thinks best, and the most that each may have: ``python -m benchmarks.codegen`` shows it. A kernel is the first of
# the lines that it is like in all that the line names.
_BY_INNER_IN_BLOCKS = {"by_inner": True, "looped": True}
_SPILLING: tuple[tuple[dict[str, bool], int], ...] = (
    # Two programs a processor: ptxas takes 112 registers of 128, and 139 of all.
    (
        {**_BY_INNER_IN_BLOCKS, "capped": True, **dict.fromkeys(("ranked", "smoothed", "written", "double"), False)},
        128,
    ),
    (_BY_INNER_IN_BLOCKS, ALL_REGISTERS),
    ({"by_inner": True, "capped": True}, ALL_REGISTERS),
    ({"by_inner": True, "ranked": True}, ALL_REGISTERS),
    ({"looped": True, "capped": True, "written": True}, ALL_REGISTERS),
    ({"looped": False, "smoothed": True, "ranked": True}, ALL_REGISTERS),
    ({"looped": False, "divided": True}, ALL_REGISTERS),
    ({"tiny": True, "ranked": True, "written": False}, ALL_REGISTERS),
)


def without_spills(tiles: Tiles, **form: bool) -> Tiles:
    """Return the tiles of a forward kernel of the hard loss, with more registers where it would spill.

    Args:
        form: ``capped``, ``ranked``, ``smoothed``, ``written`` with a gradient, ``divided`` by parts that are given,
            ``double`` for float64.
    """
    form |= {"by_inner": tiles.by_inner, "looped": tiles.looped, "tiny": tiles.cols <= 16}
    for line, registers in _SPILLING:
        if not tiles.registers and line.items() <= form.items():
            return tiles._replace(registers=registers)
    return tiles


def in_cache(tiles: Tiles, device: torch.device, row_bytes: int) -> Tiles:
    """Return the tiles with so few rows in flight that a second visit finds them in half of the L2 cache."""
    processors = _processors(device)
    resident = max(1, _l2_bytes(device) // (2 * row_bytes * processors))
    return tiles._replace(grid=max(1, min(tiles.grid, processors * resident)))


def in_blocks(tiles: Tiles, classes: int) -> tuple[Tiles, int]:
    """Return tiles for programs that take one tile of some rows and some classes, and how many cover all classes.

    That number is a grid's second dimension, which has 16 bits: for millions of classes the tiles grow.
    """
    tiles = tiles._replace(looped=False)
    while triton.cdiv(classes, tiles.cols) > _MOST_BLOCKS:
        tiles = tiles._replace(cols=2 * tiles.cols)
    return tiles, triton.cdiv(classes, tiles.cols)


def vector_width(*tensors: Tensor, classes: int) -> int:
    """Return how many neighbouring classes one 128-bit access takes, in every one of these 3-D tensors."""
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


def grid_for(count: int, device: torch.device) -> int:
    """Return the number of programs for ``count`` pieces of work: at most as many as the GPU holds at once."""
    return max(1, min(count, _processors(device) * 8))


def power_of_2(n: int) -> int:
    """Return the least power of 2 that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def arithmetic(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name of the dtype in which sums and exponentials are computed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def at_most(registers: int) -> dict[str, int]:
    """Return the launch option by which a thread has so many registers; AMD's compiler knows none."""
    return {"maxnreg": registers} if torch.version.hip is None else {}


@functools.cache
def _l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Return the most shared memory that a program can have: 64 KB to 227 KB. AMD's compiler puts no stages there."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 1 << 30
    return int(driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
