"""The arguments that kernels take together, and where a tile's elements lie in memory.

Triton takes a NamedTuple apart: each member is compiled as a parameter of its own would be, None and 1 included. Some
arguments have to stay on their own:

- A float: as a member it would be rounded to float32. As a parameter it is annotated ``fp64``.
- An int that varies from call to call (the number of rows, ``ignore_index``): specialization is turned off by
  parameter, not by member.

Names used in all kernels:

- ``T``: the :class:`Tile`, ``ROWS`` × ``COLS`` logits that a program holds at once, as (rows, classes).
- m: a row's maximum, or the maximum so far. Exponentials are ``exp2((z - m) * log2(e))``. With
  ``z * log2(e) - m * log2(e)``, one fused multiply-add, they would cost an instruction less, and fail where the
  second product overflows or rounds by more than a few units: rows of -1e30, of the least float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import triton
import triton.language as tl
from torch import Tensor

from fastloss.backends.contract import LossOptions, Scalar

Members = TypeVar("Members", bound=NamedTuple)


class Strided(NamedTuple):
    """A tensor ``(outer, classes, inner)`` of any strides."""

    ptr: Any  # None: the tensor is neither read nor written
    stride_outer: Any
    stride_class: Any
    stride_inner: Any


class Scaling(NamedTuple):
    """The pointers to the numbers of the options that lie on the device, of any floating dtype; None where none does.

    Numbers of the host are in the arguments ``cap`` and ``factor``: softcap / logit_scale and softcap / temperature
    or, without a softcap, 1 and logit_scale / temperature.
    """

    logit_scale: Any = None
    temperature: Any = None


class Tile(NamedTuple):
    """The compile-time constants of a tile."""

    ROWS: Any
    COLS: Any
    BY_INNER: Any  # neighbouring rows are neighbours in memory: a tile stays within one outer index
    VEC: Any  # neighbouring classes that are known to be aligned together: one access takes them all
    ACC: Any  # the dtype of the arithmetic: float32, or float64 for float64 logits
    LOOPED: Any = False  # rows are longer than the tile: they are visited block by block
    GROUP: Any = 1  # neighbouring classes that take their maximum together, in rows longer than the tile
    STAGES: Any = 1  # tiles or blocks that are on their way from memory at once, the current one included
    ENDS: Any = False  # a long row begins anywhere in an access: the ends that no whole access holds are apart
    G_PAD: Any = 1  # programs whose sums the last program adds up at a time


class Form(NamedTuple):
    """The options that a kernel is compiled for. An option that is off costs nothing."""

    HAS_WEIGHT: Any = False
    SMOOTHING: Any = False
    SOFTCAP: Any = False
    Z_LOSS: Any = False
    REDUCTION: Any = "none"
    K: Any = 0  # the number of accuracies
    K_PAD: Any = 1  # its next power of 2
    SCALED: Any = False  # logit_scale or temperature is not 1


def compiled_in(members: Members) -> Members:
    """Mark each member as a constant.

    Triton 3.6 takes an unmarked member as a bare int, which no list may hold. The interpreter wants bare values: in
    it, a marked one compared with a tensor is a constant, which ``tl.where`` refuses.
    """
    if triton.knobs.runtime.interpret:
        return members
    return type(members)(*map(tl.constexpr, members))  # type: ignore[arg-type]


def form_of(weight: Tensor | None, options: LossOptions, **more: object) -> Form:
    """Return the options that a kernel is compiled for; numbers that vary from call to call are not among them."""
    form = Form(
        HAS_WEIGHT=weight is not None,
        SMOOTHING=options.label_smoothing != 0,
        SOFTCAP=options.softcap is not None,
        SCALED=options.is_scaled,
    )
    return compiled_in(form._replace(**more))


def scaling(options: LossOptions) -> Scaling:
    """Return the numbers of the options that lie on the device."""
    numbers = options.logit_scale, options.temperature
    return Scaling(*(number.tensor if isinstance(number, Scalar) else None for number in numbers))


def cap_and_factor(options: LossOptions) -> tuple[float, float]:
    """Return the numbers of the options that the host knows, as :class:`Scaling` has them."""
    factors = options.factors(lambda tensor: 1.0)
    return factors.divisor, factors.outer


def strided(tensor: Tensor | None, like: Tensor | None = None) -> Strided:
    """Return the tensor with its strides; for None, those of the tensor ``like`` which it would resemble."""
    return Strided(tensor, *(like if tensor is None else tensor).stride())  # type: ignore[union-attr]


@triton.jit
def tile_count(rows, inner, T: tl.constexpr):
    """Return the number of tiles of rows."""
    return rows // inner * tl.cdiv(inner, T.ROWS) if T.BY_INNER else tl.cdiv(rows, T.ROWS)


@triton.jit
def tile_rows(tile, rows, inner, T: tl.constexpr):
    """Return the rows of a tile, a mask of those that exist, and their outer and inner indices."""
    if T.BY_INNER:
        tiles = tl.cdiv(inner, T.ROWS)
        outer = tile // tiles
        within = tile % tiles * T.ROWS + tl.arange(0, T.ROWS)
        row, in_range = outer * inner + within, within < inner
    else:
        row = tile * T.ROWS + tl.arange(0, T.ROWS)
        outer, within, in_range = row // inner, row % inner, row < rows
    return row, in_range, outer, within


@triton.jit
def row_offsets(x: Strided, outer, within, T: tl.constexpr):
    """Return where each row begins, int64: N·V passes 2³¹ in ordinary training."""
    offset = outer.to(tl.int64) * x.stride_outer + within.to(tl.int64) * x.stride_inner
    # Written as a product, so that the compiler knows its alignment wherever it is used.
    return offset // T.VEC * T.VEC if T.VEC > 1 and not T.ENDS else offset


@triton.jit
def class_offsets(x: Strided, cols, T: tl.constexpr):
    """Return where each class lies within its row, int64."""
    if T.VEC > 1:  # then the stride is 1
        return cols.to(tl.int64)
    return cols.to(tl.int64) * x.stride_class


@triton.jit
def pointers(x: Strided, base, cols, T: tl.constexpr):
    """Return the addresses of some classes of the rows that begin at ``base``: (rows, classes)."""
    return x.ptr + base[:, None] + class_offsets(x, cols, T)[None, :]


@triton.jit
def block(start, classes, rows, MASKED: tl.constexpr, T: tl.constexpr):
    """Return a block's columns, and a mask of those rows' classes. ``MASKED``: it reaches beyond the last class."""
    cols = start + tl.arange(0, T.COLS)
    mask = rows[:, None]
    if MASKED:
        mask = mask & inside(cols, classes, T)[None, :]
    return cols, mask


@triton.jit
def inside(cols, classes, T: tl.constexpr):
    """Return a mask of the columns that are classes.

    It is the same for each aligned group of ``VEC`` columns, so that masked accesses stay wide.
    """
    if T.VEC > 1:
        return (cols // T.VEC) < (classes // T.VEC)
    return cols < classes
