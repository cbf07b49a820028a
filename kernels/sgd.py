"""SGD: one launch steps all tensors of the same dtypes, and another adds up the squares of their gradients.

The tensors may lie anywhere. A table on the device has a line for each tensor: its addresses, its size, its rule. A
list of *items* says which chunk of which tensor each program takes. The host uploads them when a tensor has moved.

Bytes per float32 parameter with momentum: 20 (reads θ, g and m, writes θ and m).
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from fastloss.backends.contract import FLAG_ELEMENTS, Addresses, SGDBatch, SGDControls, SGDRule, check_gradients
from fastloss.backends.torch_private import foreach_copy_, materialized, write_back

from .arguments import compiled_in
from .launch import Launch, alike, on_device, scratch
from .tile_helpers import fp64, last_to_end
from .tiles import FUSED, arithmetic, at_most, grid_for, power_of_2

__all__ = ["sgd_squares", "sgd_step"]

# Elements per chunk. One program steps one chunk, and SGDBatch.begun has one flag per chunk.
CHUNK = tl.constexpr(FLAG_ELEMENTS)
# Elements of a chunk that a program holds at a time: 8 per thread.
BLOCK = tl.constexpr(1024)
_WARPS = 4
# Columns of the table.
THETA, GRAD, MOMENTUM, COMPANION, BEGUN, NUMEL, RULE, LAYOUT = (tl.constexpr(i) for i in range(8))
_COLUMNS = tl.constexpr(8)
# Values of the column LAYOUT, beside 0. ALIGNED: all strides agree, and all addresses are multiples of 16. STRIDED:
# the strides are in the table of strides.
ALIGNED, STRIDED = tl.constexpr(1), tl.constexpr(2)
# Dimensions in the table of strides. Neighbouring dimensions that θ and g both run through without a jump are stored
# as one, so that hardly any tensor needs this many.
DIMS = tl.constexpr(6)
# Numbers per rule, and the number of rules up to which they are kernel arguments.
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
_NUMBER_TYPES = {float, int, bool}


class DeviceTables(NamedTuple):
    """The tables that both kernels read."""

    lines: Any = None  # int64 (tensors, _COLUMNS)
    items: Any = None  # int32 (items, 2): the tensor's line, the chunk's number
    strides: Any = (
        None  # int64 (tensors, 3, DIMS): sizes, strides of θ, strides of g, from the buffers' fastest dimension
    )
    # to their slowest; None if no tensor is STRIDED


class StepForm(NamedTuple):
    """The constants that a step is compiled for."""

    THETA: tl.dtype
    GRAD: tl.dtype
    MOMENTUM: tl.dtype
    ACC: tl.dtype
    RULES: int  # whose numbers are arguments; 0: the kernel reads them from a table
    TENSORS: int  # bit i: the i-th of those arguments is a pointer to its number
    HAS_MOMENTUM: bool
    HAS_BEGUN: bool
    ROUNDING: str


class StepNumbers(NamedTuple):
    """The numbers of one chunk's step, in the dtype of the arithmetic."""

    lr: Any
    momentum: Any
    keep: Any  # 1 − dampening
    decay: Any  # weight decay that is added to the gradient
    shrink: Any  # the parameter's factor by decoupled weight decay
    nesterov: Any
    first: Any  # the momentum buffer begins with this step
    inverse: Any  # 1 / loss scale
    clip: Any  # the gradient's factor: its sign, and max_norm / norm


# ------------------------------------------------------------------------------------------------------- the tables


@dataclass(eq=False)
class Tables:
    """The tensors of a batch whose gradients and momentum have the same dtypes, and their tables."""

    indices: list[int]
    has_momentum: list[bool]
    sizes: list[torch.Size] = field(default_factory=list)  # of the parameters
    grads: Addresses | None = None  # of the gradients, at the last upload
    buffers: Addresses | None = None  # of momentum and companions, when the tables were laid out
    strides: list[tuple[int, ...]] = field(default_factory=list)  # of gradients and buffers, at that time
    lines: Tensor | None = None  # the table of lines, on the host
    by_16: Tensor | None = None  # bool per line: all addresses but the gradient's allow 128-bit accesses
    device: DeviceTables = field(default_factory=DeviceTables)
    begun: dict[int, Tensor] | None = None
    rules: tuple[Any, ...] = ()  # the numbers in rules_table
    rules_table: Tensor | None = None
    launches: dict[Any, Launch] = field(default_factory=dict)  # of both kernels, for each number of items
    start: Callable[[DeviceTables], None] = field(default=lambda device: None)  # the last launch of a step anew
    reserve: Tensor | None = None  # pinned memory for an upload inside a CUDA graph
    sizes_of_lines: Tensor | None = None  # on the host
    lacking: list[int] = field(default_factory=list)  # lines whose tensors have no gradient: no item names them
    overlap: bool = False  # a gradient has elements that share memory
    streams: set[int] = field(default_factory=set)  # on which the tables have been read


def _materialized(batch: SGDBatch, grads: list[Tensor]) -> list[Tensor]:
    """Return the gradients without lazy ones, as :func:`materialized` does; look for these after changes only."""
    if batch.unchanged and not batch.memory.get("lazy_gradients", True):
        return grads
    result = materialized(grads)
    batch.memory["lazy_gradients"] = result is not grads
    return result


def _stand_ins(batch: SGDBatch, grads: list[Any]) -> tuple[list[Tensor], frozenset[int]]:
    """Return gradients for the tables, the parameters themselves where they lack, and the numbers of these."""
    if not batch.incomplete:
        return grads, frozenset()
    lacking = frozenset(i for i, grad in enumerate(grads) if grad is None)
    return [batch.params[i] if grad is None else grad for i, grad in enumerate(grads)], lacking


def _tables_of(batch: SGDBatch, grads: list[Tensor], lacking: frozenset[int]) -> dict[Any, Tables]:
    """Return the batch's up-to-date tables by the dtypes of gradient and momentum: one launch for each."""
    memory = batch.memory
    if not (batch.unchanged and "tables" in memory):
        momentum = [buffer for buffer in batch.momentum if buffer is not None]
        dtypes = list(map(_dtype_of, grads)), list(map(_dtype_of, momentum))  # .data = may change the latter
        if memory.get("dtypes") != dtypes:
            memory.update(tables=_by_dtypes(batch, dtypes[0]), dtypes=dtypes)
    by_dtypes: dict[Any, Tables] = memory["tables"]
    for tables in by_dtypes.values():
        _bring_up_to_date(tables, batch, _of(tables, grads))
        _leave_out([line for line, i in enumerate(tables.indices) if i in lacking] if lacking else [], tables, batch)
    return by_dtypes


def _by_dtypes(batch: SGDBatch, grad_dtypes: list[torch.dtype]) -> dict[Any, Tables]:
    by_dtypes: dict[Any, Tables] = {}
    # Parameters without momentum join those whose momentum has the dtype of the batch's first momentum buffer.
    default = next((m.dtype for m in batch.momentum if m is not None), batch.params[0].dtype)
    for i, (dtype, momentum) in enumerate(zip(grad_dtypes, batch.momentum, strict=True)):
        if not batch.params[i].numel():
            continue
        dtypes = dtype, default if momentum is None else momentum.dtype
        tables = by_dtypes.setdefault(dtypes, Tables([], []))
        tables.indices.append(i)
        tables.sizes.append(batch.params[i].size())
        tables.has_momentum.append(momentum is not None)
    return by_dtypes


def _bring_up_to_date(tables: Tables, batch: SGDBatch, grads: list[Tensor]) -> None:
    buffers = _buffers(tables, batch)
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
    _move_gradients(tables, batch, Addresses(grads))


def _move_gradients(tables: Tables, batch: SGDBatch, addresses: Addresses) -> None:
    """Write the gradients' addresses to the table of lines, and upload it."""
    assert tables.lines is not None
    assert tables.by_16 is not None
    tables.grads = None
    column = _int64(addresses.values)
    tables.lines[:, GRAD.value] = column
    layout = tables.lines[:, LAYOUT.value]
    layout[layout != STRIDED.value] = 0
    layout[tables.by_16 & (column % 16 == 0)] = ALIGNED.value
    tables.device = tables.device._replace(lines=_uploaded(tables.lines, batch.params[0].device, tables))
    tables.grads = addresses


def _buffers(tables: Tables, batch: SGDBatch) -> list[Tensor]:
    """Return the momentum buffers and companions of the tables' tensors."""
    momentum: list[Any] = _of(tables, batch.momentum)
    if not all(tables.has_momentum):
        momentum = [buffer for buffer in momentum if buffer is not None]
    companions: list[Any] = _of(tables, batch.companions) if batch.rounding in ("master", "kahan") else []
    return momentum + companions if companions else momentum


def _of(tables: Tables, values: list[Any]) -> list[Any]:
    return values if len(tables.indices) == len(values) else [values[i] for i in tables.indices]


def _leave_out(lacking: list[int], tables: Tables, batch: SGDBatch) -> None:
    """Bring the items up to date: none for the tensors of these lines."""
    if tables.lacking == lacking:
        return
    assert tables.sizes_of_lines is not None
    sizes = tables.sizes_of_lines.clone()
    sizes[lacking] = 0
    tables.lacking = lacking
    items = _uploaded(_items(sizes), batch.params[0].device, tables)
    tables.device = tables.device._replace(items=items)


def _lay_out(tables: Tables, batch: SGDBatch, grads: list[Tensor]) -> None:
    """Fill in the tables but for the gradients' addresses.

    A buffer whose strides differ from its parameter's order moves to new memory.
    """
    device = batch.params[0].device
    params = [batch.params[i] for i in tables.indices]
    sizes = _int64(param.numel() for param in params)
    lines = torch.zeros(len(params), _COLUMNS.value, dtype=torch.int64, device="cpu")
    lines[:, THETA.value] = _int64(param.data_ptr() for param in params)
    lines[:, NUMEL.value] = sizes
    lines[:, RULE.value] = _int64(batch.rules[i] for i in tables.indices)
    for line, i in enumerate(tables.indices):
        if i in batch.begun:
            lines[line, BEGUN.value] = batch.begun[i].data_ptr()
    strides = torch.ones(len(params), 3, DIMS.value, dtype=torch.int64, device="cpu")
    tables.overlap = False
    for line, (i, param, grad) in enumerate(zip(tables.indices, params, grads, strict=True)):
        order = _by_stride(param)
        for buffer in (batch.momentum[i], batch.companions[i]):
            if buffer is not None and not _is_dense(buffer, order):
                buffer.data = _laid_out(buffer, order)
        if not (_is_dense(param, order) and _is_dense(grad, order)):
            lines[line, LAYOUT.value] = STRIDED.value
            _write_strides(strides[line], order, param, grad)
            tables.overlap |= any(grad.stride(d) == 0 for d in order)
    for column, buffers in ((MOMENTUM, batch.momentum), (COMPANION, batch.companions)):
        chosen = (buffers[i] for i in tables.indices)
        lines[:, column.value] = _int64(0 if buffer is None else buffer.data_ptr() for buffer in chosen)
    others = lines[:, [THETA.value, MOMENTUM.value, COMPANION.value]]
    strided = lines[:, LAYOUT.value] == STRIDED.value
    tables.sizes_of_lines, tables.lacking = sizes, []
    tables.lines, tables.by_16 = lines, (others % 16 == 0).all(dim=1) & ~strided
    items = _uploaded(_items(sizes), device, tables)
    tables.device = DeviceTables(None, items, _uploaded(strides, device, tables) if bool(strided.any()) else None)


def _items(sizes: Tensor) -> Tensor:
    """Return each tensor's chunks, int32 ``(items, 2)``: the tensor's line and the chunk's number."""
    chunks = (sizes + FLAG_ELEMENTS - 1) // FLAG_ELEMENTS
    line = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), chunks)
    chunk = torch.arange(len(line), device="cpu") - torch.repeat_interleave(chunks.cumsum(0) - chunks, chunks)
    return torch.stack([line, chunk], dim=1).to(torch.int32)


def _int64(values: Iterable[int]) -> Tensor:
    """Return the values on the CPU, also where torch's default device is another."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)  # torch.tensor() takes twice as long


def _by_stride(param: Tensor) -> list[int]:
    """Return the dimensions longer than 1, sorted by the parameter's strides, the least first."""
    return sorted((d for d, size in enumerate(param.shape) if size > 1), key=param.stride)


def _is_dense(tensor: Tensor, order: Sequence[int]) -> bool:
    """Return True if the tensor's elements lie without gaps when its dimensions are taken in this order."""
    expected = 1
    for d in order:
        if tensor.stride(d) != expected:
            return False
        expected *= tensor.shape[d]
    return True


def _laid_out(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Return a dense copy with the dimensions in this order."""
    strides, step = [1] * tensor.dim(), 1
    for d in order:
        strides[d], step = step, step * tensor.shape[d]
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _write_strides(line: Tensor, order: Sequence[int], param: Tensor, grad: Tensor) -> None:
    runs: list[list[int]] = []  # [size, stride of θ, stride of g]
    for d in order:
        size, steps = param.shape[d], (param.stride(d), grad.stride(d))
        if runs and steps == (runs[-1][0] * runs[-1][1], runs[-1][0] * runs[-1][2]):
            runs[-1][0] *= size
        else:
            runs.append([size, *steps])
    for d, run in enumerate(runs):
        line[:, d] = _int64(run)


def _uploaded(host: Tensor, device: torch.device, tables: Tables) -> Tensor:
    """Return a copy on the device, without waiting for it."""
    if device.type != "cuda":
        return host.clone()
    if not torch.cuda.is_current_stream_capturing():
        if host is tables.lines and (tables.reserve is None or tables.reserve.shape != host.shape):
            tables.reserve = torch.empty_like(host, pin_memory=True)
        return host.pin_memory().to(device, non_blocking=True)
    # Every replay of the graph reads the host's copy again, so that copy must live on unchanged. It must be pinned:
    # inside a capture torch copies nothing from other memory. torch.cuda.graph can allocate pinned memory in the
    # graph's own pool (torch 2.11), other ways to capture can't; they use the reserve.
    if tables.reserve is not None and tables.reserve.shape == host.shape:
        source, tables.reserve = tables.reserve.copy_(host), None
    else:
        source = torch.empty_like(host, pin_memory=True).copy_(host)
    copy = source.to(device, non_blocking=True)
    _read_by_graphs.append((source, copy))
    return copy


def _keep_until_read(tables: Tables, batch: SGDBatch) -> None:
    """Keep the memory that the last launch reads until it has been read.

    torch's allocator sees to that on the stream on which the memory was allocated. It must be told of every other
    stream: else, when the tables or the plan are replaced, the first stream reuses memory that another still reads.
    """
    device = batch.params[0].device
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():  # see _leave_to_graph
        return
    if tables.streams == {driver.active.get_current_stream(device.index)}:  # an object for it takes 20 times as long
        return
    stream = torch.cuda.current_stream(device)
    flags = [] if stream.cuda_stream in tables.streams else list(batch.begun.values())
    tables.streams.add(stream.cuda_stream)
    read = (*tables.device, tables.rules_table) if len(tables.streams) > 1 else ()
    for tensor in (*read, *flags):
        if tensor is not None:
            tensor.record_stream(stream)


_read_by_graphs: list[Any] = []


def _leave_to_graph(batch: SGDBatch) -> None:
    """Keep the memory that a captured step reads as long as the process, and forget the batch's tables.

    A graph holds addresses only. Tables that are uploaded inside it are not there before its first replay, so no
    later step may use them.
    """
    for tables in batch.memory["tables"].values():
        _read_by_graphs.append((*tables.device, tables.rules_table))
    _read_by_graphs.append((*batch.begun.values(), batch.seed))
    batch.memory.clear()


def _rule_arguments(
    tables: Tables, rules: Sequence[SGDRule], device: torch.device, acc: tl.dtype
) -> tuple[tuple[Any, ...], Tensor | None, int]:
    """Return the kernel's arguments for the rules: their numbers, the table of rules, and StepForm.TENSORS.

    Scalar arguments are float32. A table holds the rules of float64 parameters, and of optimizers with many groups.
    """
    if len(rules) <= _MOST_PASSED and acc == tl.float32:
        values = tuple(chain(*rules, *[rules[0]] * (power_of_2(len(rules)) - len(rules))))
        if _NUMBER_TYPES.issuperset(map(type, values)):
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
    foreach_copy_([table[place] for place in tensors], [value.reshape(()) for value in tensors.values()])
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
    first = batch.params[0]
    given, lacking = _stand_ins(batch, grads)
    grads = _materialized(batch, given)
    with on_device(first):
        by_dtypes = _tables_of(batch, grads, lacking)
        if controls.grad_scale is not None and any(tables.overlap for tables in by_dtypes.values()):
            raise RuntimeError(
                "fastloss.SGD: a gradient that is to be divided by a loss scale has elements that share memory; "
                "expected one that was not expanded, or its clone()"
            )
        for (grad_dtype, momentum_dtype), tables in by_dtypes.items():
            if items := len(tables.device.items):
                _launch_step(batch, tables, items, grad_dtype, momentum_dtype, rules, controls)
            _keep_until_read(tables, batch)
    _begin_empty(batch, controls)
    batch.memory["repeat"] = _Repeat.of(batch, controls, lazy=grads is not given)
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        _leave_to_graph(batch)
    torch.autograd.graph.increment_version(batch.params)
    if controls.grad_scale is not None:
        torch.autograd.graph.increment_version(grads)
        write_back(given, grads)


class _Repeat:
    """The launches of the last step, for one in which nothing has changed but the gradients and where they lie."""

    def __init__(self, batch: SGDBatch) -> None:
        self._batch, device = batch, batch.params[0].device
        self._gpu = device.index if device.type == "cuda" else None
        self._tables = [tables for tables in batch.memory["tables"].values() if len(tables.device.items)]

    @staticmethod
    def of(batch: SGDBatch, controls: SGDControls, *, lazy: bool) -> _Repeat | None:
        """Return None where a step has to do more than to start its launches."""
        more = lazy or batch.incomplete or batch.begun or batch.rounding == "stochastic" or controls != SGDControls()
        return None if more else _Repeat(batch)

    def may_start(self) -> bool:
        """Return whether the launches would be queued as the last ones were."""
        return self._gpu is None or (
            self._gpu == torch.cuda.current_device() and not torch.cuda.is_current_stream_capturing()
        )

    def __call__(self, grads: list[Tensor]) -> None:
        batch = self._batch
        for tables in self._tables:
            chosen = _of(tables, grads)
            assert tables.grads is not None
            if not tables.grads.are_of(chosen):
                _move_gradients(tables, batch, Addresses(chosen))
            tables.start(tables.device)
            if self._gpu is not None:
                _keep_until_read(tables, batch)
        torch.autograd.graph.increment_version(batch.params)


def _launch_step(
    batch: SGDBatch,
    tables: Tables,
    items: int,
    grad_dtype: torch.dtype,
    momentum_dtype: torch.dtype,
    rules: Sequence[SGDRule],
    controls: SGDControls,
) -> None:
    first = batch.params[0]
    acc = arithmetic(first.dtype)
    numbers, rules_table, tensors = _rule_arguments(tables, rules, first.device, acc)
    scale, found_inf, squares, max_norm = controls
    seed = None
    if batch.rounding == "stochastic":
        if batch.seed is None:
            seed = torch.randint(2**31 - 1, (1,), device=first.device)
        else:
            seed = batch.seed.add_(1)
    has_begun = bool(batch.begun)
    # The grid, and all that Triton compiles in and that may differ between two launches of one set of tables. (The
    # tables and the seed always begin at multiples of 16.)
    alignments = (alike(value) for value in numbers if isinstance(value, Tensor)) if tensors else ()
    switches = items, has_begun, tables.device.strides is None, len(numbers), tensors
    key = *switches, alike(scale), alike(found_inf), alike(squares), *alignments
    if key not in tables.launches:
        types = (_TRITON[dtype] for dtype in (first.dtype, grad_dtype, momentum_dtype))
        passed = len(numbers) // _NUMBERS.value
        form = *types, acc, passed, tensors, any(tables.has_momentum), has_begun, batch.rounding
        constants = {"FORM": compiled_in(StepForm(*form)), "num_warps": _WARPS, **FUSED}
        tables.launches[key] = Launch(_step_kernel, (items,), constants)
    launch, others = tables.launches[key], (numbers, rules_table, scale, found_inf, squares, float(max_norm), seed)
    launch(tables.device, *others)
    tables.start = lambda device: launch(device, *others)


def _launch_squares(batch: SGDBatch, tables: Tables, items: int, grad_dtype: torch.dtype, squares: Tensor) -> None:
    first = batch.params[0]
    grid = grid_for(items, first.device)
    key = "squares", grid, tables.device.strides is None, alike(squares)
    if key not in tables.launches:
        constants = {
            "GRAD_TYPE": _TRITON[grad_dtype],
            "ACC": arithmetic(torch.promote_types(first.dtype, grad_dtype)),
            "G_PAD": power_of_2(grid_for(1 << 30, first.device)),  # the same for any number of items
            "num_warps": _WARPS,
            **at_most(255),  # compiled for sm_100 strided gradients would spill 8 bytes
            **FUSED,
        }
        tables.launches[key] = Launch(_squares_kernel, (grid,), constants)
    partial, _, arrived = scratch(first.device, grid, 0)
    tables.launches[key](tables.device, partial, squares, arrived, items)


def _begin_empty(batch: SGDBatch, controls: SGDControls) -> None:
    """Set the flags of tensors without elements, which no program steps."""
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
    given, lacking = _stand_ins(batch, grads)
    grads = _materialized(batch, given)
    with on_device(first):
        for (grad_dtype, _), tables in _tables_of(batch, grads, lacking).items():
            if items := len(tables.device.items):
                _launch_squares(batch, tables, items, grad_dtype, squares)
            _keep_until_read(tables, batch)


# ------------------------------------------------------------------------------------------------------- the kernels


@triton.jit(do_not_specialize=["items"])
def _squares_kernel(
    tables,  # DeviceTables
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
        line_ptr, _chunk, start, end, layout = _item(tables, item)
        address = tl.load(line_ptr + GRAD)
        for offset in tl.range(start, end, BLOCK):
            if (layout == ALIGNED) & (offset + BLOCK <= end):
                g = tl.load(_pointer(address, GRAD_TYPE, True) + offset + lane).to(ACC)
            else:
                at = tl.full([], offset, tl.int64) + lane  # in the interpreter offset is a Python int
                if tables.strides is not None:
                    _theta_at, at = _places(tables, item, at, layout)
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
    tables,  # DeviceTables
    rules,  # the numbers of FORM.RULES rules, each a scalar or a pointer to one
    rules_ptr,  # float64 (rules, numbers), where FORM.RULES is 0
    scale_ptr,  # or None
    found_inf_ptr,  # or None
    squares_ptr,  # float64 (), or None: no clipping
    max_norm: fp64,
    seed_ptr,  # int64 (1,), for stochastic rounding
    FORM: tl.constexpr,  # StepForm
):
    """Make one step of one chunk:  g ← ± clip · g / scale + λ θ,  m ← μ m + (1 − τ) g,  θ ← θ − γ (m or g + μ m).

    Reads θ, g, m and writes θ, m (and g, where there is a scale) once.
    """
    active = True
    if found_inf_ptr is not None:
        active = tl.load(found_inf_ptr) == 0.0
    if active:
        line_ptr, chunk, start, end, layout = _item(tables, tl.program_id(0))
        numbers = _step_numbers(line_ptr, chunk, rules, rules_ptr, scale_ptr, squares_ptr, max_norm, FORM)
        seed = 0
        if FORM.ROUNDING == "stochastic":
            seed = tl.load(seed_ptr)
        addresses = (
            tl.load(line_ptr + THETA), tl.load(line_ptr + GRAD),
            tl.load(line_ptr + MOMENTUM), tl.load(line_ptr + COMPANION),
        )  # fmt: skip
        for offset in tl.range(start, end, BLOCK):
            if (layout == ALIGNED) & (offset + BLOCK <= end):
                _step_block(addresses, tables, offset, end, layout, numbers, scale_ptr, seed, True, FORM)
            else:
                _step_block(addresses, tables, offset, end, layout, numbers, scale_ptr, seed, False, FORM)


@triton.jit
def _step_numbers(line_ptr, chunk, rules, rules_ptr, scale_ptr, squares_ptr, max_norm, FORM: tl.constexpr):
    """Return the numbers of one chunk's step. Set the chunk's flag if its momentum buffer begins."""
    ACC: tl.constexpr = FORM.ACC
    rule = tl.load(line_ptr + RULE)
    lr = _rule_number(rules, rules_ptr, rule, 0, FORM)
    momentum = _rule_number(rules, rules_ptr, rule, 1, FORM)
    keep = 1.0 - _rule_number(rules, rules_ptr, rule, 2, FORM)
    decay = _rule_number(rules, rules_ptr, rule, 3, FORM)
    nesterov = _rule_number(rules, rules_ptr, rule, 4, FORM) != 0.0
    sign = 1.0 - 2.0 * _rule_number(rules, rules_ptr, rule, 5, FORM)
    decoupled = _rule_number(rules, rules_ptr, rule, 6, FORM)
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
    if FORM.HAS_BEGUN:
        begun = tl.load(line_ptr + BEGUN)
        flag_ptr = begun.to(tl.pointer_type(tl.uint8)) + chunk
        first = tl.load(flag_ptr, mask=begun != 0, other=1) == 0
        tl.debug_barrier()  # all threads have read it
        tl.store(flag_ptr, tl.full([], 1, tl.uint8), mask=(begun != 0) & (momentum != 0.0))
    return StepNumbers(
        lr.to(ACC), momentum.to(ACC), keep.to(ACC), decay, shrink, nesterov, first, inverse.to(ACC), clip.to(ACC)
    )


@triton.jit
def _step_block(
    addresses, tables, offset, end, layout, numbers, scale_ptr, seed, WHOLE: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """Step a block of a chunk. ``WHOLE``: it has BLOCK elements, which are contiguous and aligned."""
    theta_address, grad_address, momentum_address, companion_address = addresses
    ACC: tl.constexpr = FORM.ACC
    ROUNDING: tl.constexpr = FORM.ROUNDING
    COMPANION_TYPE: tl.constexpr = tl.float32 if ROUNDING == "master" else FORM.THETA
    lane = tl.arange(0, BLOCK)
    offset = tl.full([], offset, tl.int64)  # in the interpreter it is a Python int
    mask = None if WHOLE else lane < end - offset
    theta_ptr = _pointer(theta_address, FORM.THETA, WHOLE)
    grad_ptr = _pointer(grad_address, FORM.GRAD, WHOLE)
    if WHOLE or tables.strides is None:
        theta_ptr += offset + lane
        grad_ptr += offset + lane
    else:
        theta_at, grad_at = _places(tables, tl.program_id(0), offset + lane, layout)
        theta_ptr += theta_at
        grad_ptr += grad_at

    g = tl.load(grad_ptr, mask=mask).to(ACC)
    if scale_ptr is not None:
        g = g * numbers.inverse
        tl.store(grad_ptr, g.to(FORM.GRAD), mask=mask)
    g = g * numbers.clip
    if ROUNDING == "master" or ROUNDING == "kahan":
        companion_ptr = _pointer(companion_address, COMPANION_TYPE, WHOLE) + offset + lane
    theta = tl.load(theta_ptr, mask=mask).to(ACC)
    # Where the parameter was written to since the last step, its companion is out of date; see eager/rounding.py.
    if ROUNDING == "master":
        master = tl.load(companion_ptr, mask=mask)
        theta = tl.where(master.to(FORM.THETA).to(ACC) == theta, master, theta)
    if ROUNDING == "kahan":
        compensation = tl.load(companion_ptr, mask=mask).to(ACC)
        belongs = (theta + compensation * 0.984375).to(FORM.THETA).to(ACC) == theta
        theta += tl.where(belongs, compensation, 0.0)

    g = tl.where(numbers.decay != 0.0, g + numbers.decay * theta, g)
    theta = theta * numbers.shrink
    if FORM.HAS_MOMENTUM:
        if (momentum_address != 0) & (numbers.momentum != 0.0):  # a number that the host may not have read
            momentum_ptr = _pointer(momentum_address, FORM.MOMENTUM, WHOLE) + offset + lane
            m = tl.load(momentum_ptr, mask=mask).to(ACC)
            m = tl.where(numbers.first, g, numbers.momentum * m + numbers.keep * g)
            tl.store(momentum_ptr, m.to(FORM.MOMENTUM), mask=mask)
            g = tl.where(numbers.nesterov, g + numbers.momentum * m, m)
    theta -= numbers.lr * g

    if ROUNDING == "stochastic":
        within = (offset % CHUNK).to(tl.int32)
        noise = tl.randint(seed, tl.program_id(0) * CHUNK + within + lane)
        stored = _stochastically(theta, noise, FORM.THETA)
    else:
        stored = theta.to(FORM.THETA)
    tl.store(theta_ptr, stored, mask=mask)
    if ROUNDING == "master":
        tl.store(companion_ptr, theta, mask=mask)
    if ROUNDING == "kahan":
        lost = theta - stored.to(ACC)
        lost = tl.where(tl.abs(lost) < float("inf"), lost, 0.0)
        tl.store(companion_ptr, lost.to(COMPANION_TYPE), mask=mask)


@triton.jit
def _item(tables, item):
    """Return an item's line, the chunk's number, its first element, the one after its last, and the layout."""
    line_ptr = tables.lines + tl.load(tables.items + 2 * item).to(tl.int64) * _COLUMNS
    chunk = tl.load(tables.items + 2 * item + 1).to(tl.int64)
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, tl.load(line_ptr + NUMEL))
    return line_ptr, chunk, start, end, tl.load(line_ptr + LAYOUT)


@triton.jit
def _rule_number(rules, rules_ptr, rule, NUMBER: tl.constexpr, FORM: tl.constexpr):
    """Return one number of the rule with number ``rule``."""
    if FORM.RULES == 0:
        value = tl.load(rules_ptr + rule * _NUMBERS + NUMBER)
    else:
        value = _rule_argument(rules, NUMBER, FORM.TENSORS)
        for other in tl.static_range(1, FORM.RULES):
            another = _rule_argument(rules, other * _NUMBERS + NUMBER, FORM.TENSORS)
            value = tl.where(rule == other, another, value)
    return value


@triton.jit
def _rule_argument(rules, PLACE: tl.constexpr, TENSORS: tl.constexpr):
    value = rules[PLACE]
    if tl.constexpr(TENSORS) >> PLACE & 1:
        value = tl.load(value)
    return tl.full([], value, tl.float32)


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED_TO_16: tl.constexpr):
    """Return the address as a pointer that the compiler knows to be a multiple of 16, if it is."""
    if ALIGNED_TO_16:
        return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(TYPE)), 16)
    return address.to(tl.pointer_type(TYPE))


@triton.jit
def _places(tables, item, index, layout):
    """Return the offsets in θ and in g of the elements at these offsets in the buffers."""
    theta_at = index
    grad_at = index
    if layout == STRIDED:
        line_ptr = tables.strides + tl.load(tables.items + 2 * item).to(tl.int64) * (3 * DIMS)
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
    """Round at random to one of the two neighbours in 16 bits, to the nearer more often; see eager/rounding.py."""
    DROPPED: tl.constexpr = 16 if TYPE == tl.bfloat16 else 13
    noise = noise.to(tl.uint32) >> (32 - DROPPED)
    bits = x.to(tl.uint32, bitcast=True) + noise
    rounded = ((bits >> DROPPED) << DROPPED).to(tl.float32, bitcast=True)
    rounded = tl.where(tl.abs(x) < float("inf"), rounded, x)
    if TYPE == tl.float16:
        on_grid = tl.floor(x * 16777216.0 + noise.to(tl.float32) * (1.0 / 8192.0)) * (1.0 / 16777216.0)
        rounded = tl.where(tl.abs(x) < 0.00006103515625, on_grid, rounded)
    return rounded.to(TYPE)
