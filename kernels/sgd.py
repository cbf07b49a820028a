"""SGD: every tensor of a kind in one launch, and the norm of all gradients in another.

The tensors lie anywhere. A table on the device holds a line of addresses for each of them, and a list of *items* says
which chunk of which tensor a program serves. Both are uploaded when something has moved, and not before.

Bytes for each float32 parameter with momentum: read θ, g and m, write θ and m, 20.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from fastloss.backends.contract import FLAG_ELEMENTS, Addresses, SGDBatch, SGDControls, SGDRule, check_gradients

from .launch import Launch, alike, on_device, scratch
from .tile_helpers import fp64, last_to_end
from .tiles import FUSED, arithmetic, at_most, grid_for, power_of_2

__all__ = ["sgd_squares", "sgd_step"]

# Elements of a chunk, which one program serves: the unit of SGDBatch.begun's flags.
CHUNK = tl.constexpr(FLAG_ELEMENTS)
# Elements of a chunk that a program holds at a time: 8 a thread.
BLOCK = tl.constexpr(1024)
_WARPS = 4
# Columns of the table.
THETA, GRAD, MOMENTUM, COMPANION, BEGUN, NUMEL, RULE, LAYOUT = (tl.constexpr(i) for i in range(8))
_COLUMNS = tl.constexpr(8)
# What the column LAYOUT says: all addresses are multiples of 16, and all strides agree; or the strides are in the
# table of strides; or neither.
ALIGNED, STRIDED = tl.constexpr(1), tl.constexpr(2)
# The table of strides: sizes, strides of θ and strides of g, from the buffers' fastest dimension to their slowest.
# Neighbouring dimensions that all tensors walk through alike are one, so that hardly any tensor has this many.
DIMS = tl.constexpr(6)
# Numbers of a rule, and of how many rules they are passed to the kernel one by one.
_NUMBERS = tl.constexpr(len(SGDRule._fields))
_MOST_PASSED = 4
_NORM_EPSILON = tl.constexpr(1e-6)

_TRITON = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_dtype_of = operator.attrgetter("dtype")
_PLAIN = {float, int, bool}


# ------------------------------------------------------------------------------------------------------- the tables


@dataclass(eq=False)
class Tables:
    """Tensors of a batch whose gradients and buffers have the same dtypes, and their tables."""

    indices: list[int]
    momentum: list[Tensor]
    companions: list[Tensor]
    sizes: list[torch.Size] = field(default_factory=list)  # of parameters
    grads: Addresses | None = None  # of gradients, at the last upload
    buffers: Addresses | None = None  # of momentum and companions, when the tables were laid out
    strides: list[tuple[int, ...]] = field(default_factory=list)  # of gradients and buffers, then
    lines: Tensor | None = None  # the table on the host
    by_16: Tensor | None = None  # a line each, of bools: may its blocks be read by 128 bits, but for the gradient?
    table: Tensor | None = None
    items: Tensor | None = None
    geometry: Tensor | None = None  # the table of strides, where there is one
    begun: dict[int, Tensor] | None = None
    rules: tuple[Any, ...] = ()
    rules_table: Tensor | None = None
    launches: dict[Any, Launch] = field(default_factory=dict)  # made ready, of both kernels
    reserve: Tensor | None = None  # pinned memory, ready for an upload inside a CUDA graph
    overlap: bool = False  # do elements of a gradient lie in one place?
    streams: set[int] = field(default_factory=set)  # those on which the tables have been read


def _resolved(batch: SGDBatch, grads: list[Tensor]) -> list[Tensor]:
    """Without those that are not what lies in their memory: negated when they are read, as autograd makes them of
    complex conjugates; or zeros that have no memory.
    """
    if not batch.unchanged:
        batch.memory["to_resolve"] = any(map(Tensor.is_neg, grads)) or any(map(Tensor._is_zerotensor, grads))
    if batch.memory.get("to_resolve", True):
        return [grad.clone() if grad._is_zerotensor() else grad.resolve_neg() for grad in grads]
    return grads


def _tables_of(batch: SGDBatch, grads: list[Tensor]) -> dict[Any, Tables]:
    """The tables of each of the batch's launches as they must be now, by dtype of gradient and momentum."""
    memory = batch.memory
    if not (batch.unchanged and "tables" in memory):
        momentum = [buffer for buffer in batch.momentum if buffer is not None]
        dtypes = list(map(_dtype_of, grads)), list(map(_dtype_of, momentum))  # .data = may change the latter
        if memory.get("dtypes") != dtypes:
            memory.update(tables=_divided(batch, dtypes[0]), dtypes=dtypes)
    divided: dict[Any, Tables] = memory["tables"]
    for tables in divided.values():
        mine = grads if len(tables.indices) == len(grads) else [grads[i] for i in tables.indices]
        _bring_up_to_date(tables, batch, mine)
    return divided


def _divided(batch: SGDBatch, dtypes: list[torch.dtype]) -> dict[Any, Tables]:
    divided: dict[Any, Tables] = {}
    without = [m.dtype for m in batch.momentum if m is not None][:1] or [batch.params[0].dtype]
    for i, (dtype, momentum, companion) in enumerate(zip(dtypes, batch.momentum, batch.companions, strict=True)):
        if not batch.params[i].numel():
            continue
        # Parameters without momentum go with any of those that have one.
        kind = dtype, without[0] if momentum is None else momentum.dtype
        tables = divided.setdefault(kind, Tables([], [], []))
        tables.indices.append(i)
        tables.sizes.append(batch.params[i].size())
        tables.momentum += [] if momentum is None else [momentum]
        tables.companions += [] if companion is None else [companion]
    return divided


def _bring_up_to_date(tables: Tables, batch: SGDBatch, grads: list[Tensor]) -> None:
    buffers = tables.momentum + tables.companions
    fits = tables.begun is batch.begun and tables.buffers is not None and tables.buffers.are_of(buffers)
    if not batch.unchanged:
        if list(map(Tensor.size, grads)) != tables.sizes:
            check_gradients([batch.params[i] for i in tables.indices], grads)
        fits = fits and list(map(Tensor.stride, grads + buffers)) == tables.strides
    if fits and tables.grads is not None and tables.grads.are_of(grads):
        return
    tables.grads = None
    if not fits:
        tables.buffers = None
        _lay_out(tables, batch, grads)
        tables.strides = list(map(Tensor.stride, grads + buffers))
        tables.begun, tables.buffers = batch.begun, Addresses(buffers)
    assert tables.lines is not None
    assert tables.by_16 is not None
    addresses = Addresses(grads)
    column = _numbers(addresses.values)
    tables.lines[:, GRAD.value] = column
    layout = tables.lines[:, LAYOUT.value]
    layout[layout != STRIDED.value] = 0
    layout[tables.by_16 & (column % 16 == 0)] = ALIGNED.value
    tables.table = _uploaded(tables.lines, batch.params[0].device, tables)
    tables.grads = addresses


def _lay_out(tables: Tables, batch: SGDBatch, grads: list[Tensor]) -> None:
    """The parts of the tables that don't change when gradients move.

    Buffers that lie otherwise than their parameters are moved to memory where they don't.
    """
    device = batch.params[0].device
    params = [batch.params[i] for i in tables.indices]
    sizes = _numbers(param.numel() for param in params)
    lines = torch.zeros(len(params), _COLUMNS.value, dtype=torch.int64, device="cpu")
    lines[:, THETA.value] = _numbers(param.data_ptr() for param in params)
    lines[:, NUMEL.value] = sizes
    lines[:, RULE.value] = _numbers(batch.rules[i] for i in tables.indices)
    for line, i in enumerate(tables.indices):
        if i in batch.begun:
            lines[line, BEGUN.value] = batch.begun[i].data_ptr()
    geometry = torch.ones(len(params), 3, DIMS.value, dtype=torch.int64, device="cpu")
    tables.overlap = False
    for line, (i, param, grad) in enumerate(zip(tables.indices, params, grads, strict=True)):
        walk = _walk(param)
        for buffer in (batch.momentum[i], batch.companions[i]):
            if buffer is not None and not _follows(buffer, walk):
                buffer.data = _laid_out(buffer, walk)
        if not (_follows(param, walk) and _follows(grad, walk)):
            lines[line, LAYOUT.value] = STRIDED.value
            _write_geometry(geometry[line], walk, param, grad)
            tables.overlap |= any(grad.stride(d) == 0 for d in walk)
    for column, buffers in ((MOMENTUM, batch.momentum), (COMPANION, batch.companions)):
        chosen = (buffers[i] for i in tables.indices)
        lines[:, column.value] = _numbers(0 if buffer is None else buffer.data_ptr() for buffer in chosen)
    others = lines[:, [THETA.value, MOMENTUM.value, COMPANION.value]]
    tables.by_16 = (others % 16 == 0).all(dim=1) & (lines[:, LAYOUT.value] != STRIDED.value)
    chunks = (sizes + FLAG_ELEMENTS - 1) // FLAG_ELEMENTS
    tensor = torch.repeat_interleave(torch.arange(len(params), device="cpu"), chunks)
    chunk = torch.arange(len(tensor), device="cpu") - torch.repeat_interleave(chunks.cumsum(0) - chunks, chunks)
    tables.lines = lines
    tables.items = _uploaded(torch.stack([tensor, chunk], dim=1).to(torch.int32), device, tables)
    strided = bool((lines[:, LAYOUT.value] == STRIDED.value).any())
    tables.geometry = _uploaded(geometry, device, tables) if strided else None


def _numbers(values: Iterable[int]) -> Tensor:
    """On the CPU, whatever torch's default device is."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)  # torch.tensor() takes twice as long


def _walk(param: Tensor) -> list[int]:
    """A parameter's dimensions longer than 1, from the one with the least stride to the one with the greatest."""
    return sorted((d for d, size in enumerate(param.shape) if size > 1), key=param.stride)


def _follows(tensor: Tensor, walk: Sequence[int]) -> bool:
    """Does the walk meet the tensor's elements one after the other, without gaps?"""
    expected = 1
    for d in walk:
        if tensor.stride(d) != expected:
            return False
        expected *= tensor.shape[d]
    return True


def _laid_out(tensor: Tensor, walk: Sequence[int]) -> Tensor:
    """A copy whose elements lie in the order of the walk."""
    strides, step = [1] * tensor.dim(), 1
    for d in walk:
        strides[d], step = step, step * tensor.shape[d]
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _write_geometry(line: Tensor, walk: Sequence[int], param: Tensor, grad: Tensor) -> None:
    runs: list[list[int]] = []  # [size, stride of θ, stride of g]
    for d in walk:
        size, steps = param.shape[d], (param.stride(d), grad.stride(d))
        if runs and steps == (runs[-1][0] * runs[-1][1], runs[-1][0] * runs[-1][2]):
            runs[-1][0] *= size
        else:
            runs.append([size, *steps])
    for d, run in enumerate(runs):
        line[:, d] = _numbers(run)


def _uploaded(host: Tensor, device: torch.device, tables: Tables) -> Tensor:
    """On the device, without waiting for it."""
    if device.type != "cuda":
        return host.clone()
    if not torch.cuda.is_current_stream_capturing():
        if host is tables.lines and (tables.reserve is None or tables.reserve.shape != host.shape):
            tables.reserve = torch.empty_like(host, pin_memory=True)
        return host.pin_memory().to(device, non_blocking=True)
    # Every replay of the graph will read the host's copy again: it is never written again, and lives on. Pinned: from
    # other memory torch copies nothing inside a capture. It may be allocated there, in the graph's own pool (torch
    # 2.11), but not by whoever captures without torch's classes; hence the reserve.
    if tables.reserve is not None and tables.reserve.shape == host.shape:
        source, tables.reserve = tables.reserve.copy_(host), None
    else:
        source = torch.empty_like(host, pin_memory=True).copy_(host)
    copy = source.to(device, non_blocking=True)
    _of_graphs.append((source, copy))
    return copy


def _keep_until_read(tables: Tables, batch: SGDBatch) -> None:
    """After a launch: what it reads lives until it has been read.

    That is so on the stream on which it was made. On another one the allocator has to be told: when the tables are
    replaced, or with them the plan, it would hand their memory to the first stream while the other still reads it.
    """
    device = batch.params[0].device
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():  # see _leave_to_graph
        return
    if tables.streams == {driver.active.get_current_stream(device.index)}:  # an object for it takes 20 times as long
        return
    stream = torch.cuda.current_stream(device)
    flags = [] if stream.cuda_stream in tables.streams else list(batch.begun.values())
    tables.streams.add(stream.cuda_stream)
    read = (tables.table, tables.items, tables.geometry, tables.rules_table) if len(tables.streams) > 1 else ()
    for tensor in (*read, *flags):
        if tensor is not None:
            tensor.record_stream(stream)


_of_graphs: list[Any] = []


def _leave_to_graph(batch: SGDBatch) -> None:
    """After a step inside a capture: what it reads lives as long as the process, and nothing of it is used again.

    A graph knows addresses alone, and what was uploaded inside it is not there before its first replay.
    """
    for tables in batch.memory["tables"].values():
        _of_graphs.append((tables.table, tables.items, tables.geometry, tables.rules_table))
    _of_graphs.append(list(batch.begun.values()))
    batch.memory.clear()


def _passed(
    tables: Tables, rules: Sequence[SGDRule], device: torch.device, acc: tl.dtype
) -> tuple[tuple[Any, ...], Tensor | None, int]:
    """The rules as the kernel's arguments: some numbers (or tensors of one), or a table on the device; and, a bit for
    each number, which of them are tensors.

    Arguments are float32; float64 parameters, and optimizers of many groups, read a table.
    """
    if len(rules) <= _MOST_PASSED and acc == tl.float32:
        values = tuple(chain(*rules, *[rules[0]] * (power_of_2(len(rules)) - len(rules))))
        if _PLAIN.issuperset(map(type, values)):
            return tuple(map(float, values)), None, 0
        numbers = tuple([_number(value, device) for value in values])
        return numbers, None, sum(isinstance(number, Tensor) << bit for bit, number in enumerate(numbers))
    numbers = tuple(_number(value, device) for rule in rules for value in rule)
    tensors = {place: value for place, value in enumerate(numbers) if isinstance(value, Tensor)}
    known = tuple(0.0 if place in tensors else value for place, value in enumerate(numbers))
    if tables.rules != known or tables.rules_table is None:
        tables.rules = known
        tables.rules_table = _uploaded(torch.tensor(known, dtype=torch.float64, device="cpu"), device, tables)
    if not tensors:
        return (), tables.rules_table, 0
    table = tables.rules_table.clone()
    torch._foreach_copy_([table[place] for place in tensors], [value.reshape(()) for value in tensors.values()])
    return (), table, 0


def _number(value: float | Tensor, device: torch.device) -> float | Tensor:
    if not isinstance(value, Tensor):
        return float(value)
    if value.device.type == "cpu" and device.type != "cpu":
        return float(value.item())
    return value.to(device)


# ------------------------------------------------------------------------------------------------------ the launches


def sgd_step(batch: SGDBatch, grads: list[Tensor], rules: Sequence[SGDRule], controls: SGDControls) -> None:
    """See :class:`fastloss.backends.contract.Backend`."""
    first, given = batch.params[0], grads
    grads = _resolved(batch, grads)
    with on_device(first):
        divided = _tables_of(batch, grads)
        if controls.grad_scale is not None and any(tables.overlap for tables in divided.values()):
            raise RuntimeError(
                "fastloss.SGD: a gradient that is to be divided by a loss scale has elements that share memory; "
                "expected one that was not expanded, or its clone()"
            )
        for (grad_dtype, momentum_dtype), tables in divided.items():
            _start_step(batch, tables, grad_dtype, momentum_dtype, rules, controls)
            _keep_until_read(tables, batch)
    _begin_empty(batch, controls)
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        _leave_to_graph(batch)
    torch.autograd.graph.increment_version(batch.params)
    if controls.grad_scale is not None:
        torch.autograd.graph.increment_version(grads)
        if grads is not given:
            for mine, resolved in zip(given, grads, strict=True):
                if mine is not resolved:
                    mine.copy_(resolved)


def _start_step(
    batch: SGDBatch,
    tables: Tables,
    grad_dtype: torch.dtype,
    momentum_dtype: torch.dtype,
    rules: Sequence[SGDRule],
    controls: SGDControls,
) -> None:
    """The launch for one set of tables."""
    first = batch.params[0]
    acc = arithmetic(first.dtype)
    numbers, rules_table, tensors = _passed(tables, rules, first.device, acc)
    scale, found_inf, squares, max_norm = controls
    seed = None
    if batch.rounding == "stochastic":
        seed = torch.randint(2**31 - 1, (1,), device=first.device)
    has_begun = bool(batch.begun)
    # What may differ between two launches of one set of tables, as far as it is compiled in. (The tables themselves,
    # whatever uploads them, begin at multiples of 16, and so does the seed.)
    kinds = (alike(value) for value in numbers if isinstance(value, Tensor)) if tensors else ()
    switches = has_begun, tables.geometry is None, len(numbers), tensors
    key = *switches, alike(scale), alike(found_inf), alike(squares), *kinds
    if key not in tables.launches:
        assert tables.items is not None
        constants = {
            "THETA_TYPE": _TRITON[first.dtype],
            "GRAD_TYPE": _TRITON[grad_dtype],
            "MOMENTUM_TYPE": _TRITON[momentum_dtype],
            "ACC": acc,
            "RULES": len(numbers) // _NUMBERS.value,
            "TENSORS": tensors,
            "HAS_MOMENTUM": bool(tables.momentum),
            "HAS_BEGUN": has_begun,
            "ROUNDING": batch.rounding,
            "num_warps": _WARPS,
            **FUSED,
        }
        tables.launches[key] = Launch(_step_kernel, (len(tables.items),), constants)
    tables.launches[key](
        tables.table,
        tables.items,
        tables.geometry,
        numbers,
        rules_table,
        scale,
        found_inf,
        squares,
        float(max_norm),
        seed,
    )


def _start_squares(batch: SGDBatch, tables: Tables, grad_dtype: torch.dtype, squares: Tensor) -> None:
    assert tables.items is not None
    first, items = batch.params[0], len(tables.items)
    grid = grid_for(items, first.device)
    key = "squares", tables.geometry is None, alike(squares)
    if key not in tables.launches:
        constants = {
            "GRAD_TYPE": _TRITON[grad_dtype],
            "ACC": arithmetic(torch.promote_types(first.dtype, grad_dtype)),
            "G_PAD": power_of_2(grid_for(1 << 30, first.device)),  # alike for any number of items
            "num_warps": _WARPS,
            **at_most(255),  # compiled for sm_100 strided gradients would spill 8 bytes
            **FUSED,
        }
        tables.launches[key] = Launch(_squares_kernel, (grid,), constants)
    partial, _, arrived = scratch(first.device, grid, 0)
    tables.launches[key](tables.table, tables.items, tables.geometry, partial, squares, arrived, items)


def _begin_empty(batch: SGDBatch, controls: SGDControls) -> None:
    """Tensors without elements, which no program serves, begin their momentum with the others."""
    if "empty" not in batch.memory:
        batch.memory["empty"] = [flags for i, flags in batch.begun.items() if not batch.params[i].numel()]
    for flags in batch.memory["empty"]:
        if controls.found_inf is None:
            flags.fill_(1)
        else:
            flags.logical_or_(controls.found_inf == 0)


def sgd_squares(batch: SGDBatch, grads: list[Tensor], squares: Tensor) -> None:
    """See :class:`fastloss.backends.contract.Backend`."""
    first = batch.params[0]
    grads = _resolved(batch, grads)
    with on_device(first):
        for (grad_dtype, _), tables in _tables_of(batch, grads).items():
            _start_squares(batch, tables, grad_dtype, squares)
            _keep_until_read(tables, batch)


# ------------------------------------------------------------------------------------------------------- the kernels


@triton.jit(do_not_specialize=["items"])
def _squares_kernel(
    table_ptr,  # int64 (tensors, columns)
    items_ptr,  # int32 (items, 2): tensor, chunk
    geometry_ptr,  # int64 (tensors, 3, DIMS), or None
    partial_ptr,  # float64 (programs,)
    squares_ptr,  # float64 ()
    counter_ptr,
    items,
    GRAD_TYPE: tl.constexpr,
    ACC: tl.constexpr,
    G_PAD: tl.constexpr,
):
    """squares += Σ g² over all tensors. Reads each gradient once."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], ACC)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        line_ptr, _chunk, start, end, layout = _item(table_ptr, items_ptr, item)
        address = tl.load(line_ptr + GRAD)
        for offset in tl.range(start, end, BLOCK):
            if (layout == ALIGNED) & (offset + BLOCK <= end):
                g = tl.load(_pointer(address, GRAD_TYPE, True) + offset + lane).to(ACC)
            else:
                at = tl.full([], offset, tl.int64) + lane  # the interpreter's offset is Python's
                if geometry_ptr is not None:
                    _theta_at, at = _places(geometry_ptr, items_ptr, item, at, layout)
                g = tl.load(_pointer(address, GRAD_TYPE, False) + at, mask=lane < end - offset, other=0.0).to(ACC)
            total += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total.to(tl.float64), axis=0))
    if last_to_end(counter_ptr):
        program = tl.arange(0, G_PAD)
        sums = tl.load(partial_ptr + program, mask=program < tl.num_programs(0), other=0.0, cache_modifier=".cg")
        tl.store(squares_ptr, tl.load(squares_ptr) + tl.sum(sums, axis=0))
        tl.store(counter_ptr, 0)


@triton.jit
def _step_kernel(
    table_ptr,  # int64 (tensors, columns)
    items_ptr,  # int32 (items, 2): tensor, chunk
    geometry_ptr,  # int64 (tensors, 3, DIMS), or None
    rules,  # the numbers of RULES rules, each a scalar or a pointer to one
    rules_ptr,  # float64 (rules, numbers), where RULES is 0
    scale_ptr,  # or None
    found_inf_ptr,  # or None
    squares_ptr,  # float64 (), or None: no clipping
    max_norm: fp64,
    seed_ptr,  # int64 (1,), for stochastic rounding
    THETA_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    MOMENTUM_TYPE: tl.constexpr,
    ACC: tl.constexpr,
    RULES: tl.constexpr,
    TENSORS: tl.constexpr,  # a bit for each number of the rules: is it a pointer?
    HAS_MOMENTUM: tl.constexpr,
    HAS_BEGUN: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """One step of one chunk:  g ← ± clip · g / scale + λ θ,  m ← μ m + (1 − τ) g,  θ ← θ − γ (m or g + μ m).

    Reads θ, g, m and writes θ, m (and g, where there is a scale) once.
    """
    active = True
    if found_inf_ptr is not None:
        active = tl.load(found_inf_ptr) == 0.0
    if active:
        line_ptr, chunk, start, end, layout = _item(table_ptr, items_ptr, tl.program_id(0))
        number = tl.load(line_ptr + RULE)
        lr = _rule(rules, rules_ptr, number, 0, RULES, TENSORS)
        momentum = _rule(rules, rules_ptr, number, 1, RULES, TENSORS)
        keep = 1.0 - _rule(rules, rules_ptr, number, 2, RULES, TENSORS)
        decay = _rule(rules, rules_ptr, number, 3, RULES, TENSORS)
        nesterov = _rule(rules, rules_ptr, number, 4, RULES, TENSORS) != 0.0
        sign = 1.0 - 2.0 * _rule(rules, rules_ptr, number, 5, RULES, TENSORS)
        decoupled = _rule(rules, rules_ptr, number, 6, RULES, TENSORS)
        shrink = tl.where(decoupled != 0.0, 1.0 - lr * decay, 1.0).to(ACC)  # lr may be infinite
        decay = (decay * (1.0 - decoupled)).to(ACC)

        inverse = tl.full([], 1.0, tl.float64)
        if scale_ptr is not None:
            inverse = 1.0 / tl.load(scale_ptr).to(tl.float64)
        clip = sign.to(tl.float64)
        if squares_ptr is not None:
            factor = max_norm / (tl.sqrt(tl.load(squares_ptr)) * inverse + _NORM_EPSILON)
            clip = clip * tl.where(factor > 1.0, 1.0, factor)  # NaN stays

        first = False
        if HAS_BEGUN:
            begun = tl.load(line_ptr + BEGUN)
            flag_ptr = begun.to(tl.pointer_type(tl.uint8)) + chunk
            first = tl.load(flag_ptr, mask=begun != 0, other=1) == 0
            tl.debug_barrier()  # all threads have read it
            tl.store(flag_ptr, tl.full([], 1, tl.uint8), mask=(begun != 0) & (momentum != 0.0))

        seed = 0
        if ROUNDING == "stochastic":
            seed = tl.load(seed_ptr)
        numbers = (
            lr.to(ACC), momentum.to(ACC), keep.to(ACC), decay, shrink, nesterov, first, inverse.to(ACC), clip.to(ACC)
        )  # fmt: skip
        addresses = (
            tl.load(line_ptr + THETA), tl.load(line_ptr + GRAD),
            tl.load(line_ptr + MOMENTUM), tl.load(line_ptr + COMPANION),
        )  # fmt: skip
        for offset in tl.range(start, end, BLOCK):
            if (layout == ALIGNED) & (offset + BLOCK <= end):
                _block(
                    addresses, geometry_ptr, items_ptr, offset, end, layout, numbers, scale_ptr, seed, True,
                    THETA_TYPE, GRAD_TYPE, MOMENTUM_TYPE, ACC, HAS_MOMENTUM, ROUNDING,
                )  # fmt: skip
            else:
                _block(
                    addresses, geometry_ptr, items_ptr, offset, end, layout, numbers, scale_ptr, seed, False,
                    THETA_TYPE, GRAD_TYPE, MOMENTUM_TYPE, ACC, HAS_MOMENTUM, ROUNDING,
                )  # fmt: skip


@triton.jit
def _block(
    addresses, geometry_ptr, items_ptr, offset, end, layout, numbers, scale_ptr, seed, WHOLE: tl.constexpr,
    THETA_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, MOMENTUM_TYPE: tl.constexpr, ACC: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """A block of a chunk. ``WHOLE``: all of its elements exist, one after the other, and are aligned."""
    theta_address, grad_address, momentum_address, companion_address = addresses
    lr, momentum, keep, decay, shrink, nesterov, first, inverse, clip = numbers
    COMPANION_TYPE: tl.constexpr = tl.float32 if ROUNDING == "master" else THETA_TYPE
    lane = tl.arange(0, BLOCK)
    offset = tl.full([], offset, tl.int64)  # the interpreter's is Python's
    mask = None if WHOLE else lane < end - offset
    theta_ptr = _pointer(theta_address, THETA_TYPE, WHOLE)
    grad_ptr = _pointer(grad_address, GRAD_TYPE, WHOLE)
    if WHOLE or geometry_ptr is None:
        theta_ptr += offset + lane
        grad_ptr += offset + lane
    else:
        theta_at, grad_at = _places(geometry_ptr, items_ptr, tl.program_id(0), offset + lane, layout)
        theta_ptr += theta_at
        grad_ptr += grad_at

    g = tl.load(grad_ptr, mask=mask).to(ACC)
    if scale_ptr is not None:
        g = g * inverse
        tl.store(grad_ptr, g.to(GRAD_TYPE), mask=mask)
    g = g * clip
    if ROUNDING == "master" or ROUNDING == "kahan":
        companion_ptr = _pointer(companion_address, COMPANION_TYPE, WHOLE) + offset + lane
    theta = tl.load(theta_ptr, mask=mask).to(ACC)
    # The parameter is the truth, whoever wrote to it since the last step; see eager/rounding.py.
    if ROUNDING == "master":
        master = tl.load(companion_ptr, mask=mask)
        theta = tl.where(master.to(THETA_TYPE).to(ACC) == theta, master, theta)
    if ROUNDING == "kahan":
        compensation = tl.load(companion_ptr, mask=mask).to(ACC)
        belongs = (theta + compensation * 0.984375).to(THETA_TYPE).to(ACC) == theta
        theta += tl.where(belongs, compensation, 0.0)

    g = tl.where(decay != 0.0, g + decay * theta, g)
    theta = theta * shrink
    if HAS_MOMENTUM:
        if (momentum_address != 0) & (momentum != 0.0):  # a tensor's value: the host has not read it
            momentum_ptr = _pointer(momentum_address, MOMENTUM_TYPE, WHOLE) + offset + lane
            m = tl.load(momentum_ptr, mask=mask).to(ACC)
            m = tl.where(first, g, momentum * m + keep * g)
            tl.store(momentum_ptr, m.to(MOMENTUM_TYPE), mask=mask)
            g = tl.where(nesterov, g + momentum * m, m)
    theta -= lr * g

    if ROUNDING == "stochastic":
        within = (offset % CHUNK).to(tl.int32)
        noise = tl.randint(seed, tl.program_id(0) * CHUNK + within + lane)
        stored = _stochastically(theta, noise, THETA_TYPE)
    else:
        stored = theta.to(THETA_TYPE)
    tl.store(theta_ptr, stored, mask=mask)
    if ROUNDING == "master":
        tl.store(companion_ptr, theta, mask=mask)
    if ROUNDING == "kahan":
        lost = theta - stored.to(ACC)
        lost = tl.where(tl.abs(lost) < float("inf"), lost, 0.0)
        tl.store(companion_ptr, lost.to(COMPANION_TYPE), mask=mask)


@triton.jit
def _item(table_ptr, items_ptr, item):
    """The line of an item's tensor, the item's chunk, the first and the last element of it, and the layout."""
    line_ptr = table_ptr + tl.load(items_ptr + 2 * item).to(tl.int64) * _COLUMNS
    chunk = tl.load(items_ptr + 2 * item + 1).to(tl.int64)
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, tl.load(line_ptr + NUMEL))
    return line_ptr, chunk, start, end, tl.load(line_ptr + LAYOUT)


@triton.jit
def _rule(rules, rules_ptr, number, NUMBER: tl.constexpr, RULES: tl.constexpr, TENSORS: tl.constexpr):
    """One number of rule ``number``."""
    if RULES == 0:
        value = tl.load(rules_ptr + number * _NUMBERS + NUMBER)
    else:
        value = _scalar(rules[NUMBER], TENSORS >> NUMBER & 1)
        for other in tl.static_range(1, RULES):
            another = _scalar(
                rules[other * _NUMBERS + NUMBER], tl.constexpr(TENSORS) >> (other * _NUMBERS + NUMBER) & 1
            )
            value = tl.where(number == other, another, value)
    return value


@triton.jit
def _scalar(value, IS_TENSOR: tl.constexpr):
    if IS_TENSOR:
        value = tl.load(value)
    return tl.full([], value, tl.float32)


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED_TO_16: tl.constexpr):
    """A pointer from the table; the compiler is told where it is a multiple of 16."""
    if ALIGNED_TO_16:
        return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(TYPE)), 16)
    return address.to(tl.pointer_type(TYPE))


@triton.jit
def _places(geometry_ptr, items_ptr, item, index, layout):
    """Where those elements of θ and of g lie that stand at these places of the buffers."""
    theta_at = index
    grad_at = index
    if layout == STRIDED:
        line_ptr = geometry_ptr + tl.load(items_ptr + 2 * item).to(tl.int64) * (3 * DIMS)
        theta_at = tl.zeros_like(index)
        grad_at = tl.zeros_like(index)
        for d in tl.static_range(DIMS):
            size = tl.load(line_ptr + d)
            along = index % size
            index = index // size
            theta_at += along * tl.load(line_ptr + DIMS + d)
            grad_at += along * tl.load(line_ptr + 2 * DIMS + d)
    return theta_at, grad_at


@triton.jit
def _stochastically(x, noise, TYPE: tl.constexpr):
    """Round to one of the two neighbours in 16 bits, the nearer the likelier; see eager/rounding.py."""
    DROPPED: tl.constexpr = 16 if TYPE == tl.bfloat16 else 13
    noise = noise.to(tl.uint32) >> (32 - DROPPED)
    bits = x.to(tl.uint32, bitcast=True) + noise
    rounded = ((bits >> DROPPED) << DROPPED).to(tl.float32, bitcast=True)
    rounded = tl.where(tl.abs(x) < float("inf"), rounded, x)
    if TYPE == tl.float16:
        on_grid = tl.floor(x * 16777216.0 + noise.to(tl.float32) * (1.0 / 8192.0)) * (1.0 / 16777216.0)
        rounded = tl.where(tl.abs(x) < 0.00006103515625, on_grid, rounded)
    return rounded.to(TYPE)
