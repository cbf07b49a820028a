"""One workload: who can't take part and why, who is wrong, and what the others take.

Contenders take turns, with a device copy among them (beside linear_cross_entropy three bare products), so that a
busy moment hits all alike and the limit that they are held against is that of the same seconds. A turn is a block
of calls: on a CPU as many as settle the C library's allocator, on a GPU no more than its stream's queue holds. How a
GPU's time is told from the host's is in :mod:`.clock`.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..demo.loss_at_scale import COPIES
from ..demo.measure import Neighbours, Step, free_bytes, in_turns, peak_bytes
from . import linear
from .check import Exact, copies, errors_of_reference, in_words, is_out_of_memory, operation, verdict
from .clock import Clock, FullStream, by_the_clock
from .contenders import OURS, Contender
from .optimizer import Kind, deviations, ready
from .workloads import Shape, Workload, make_inputs, make_linear_inputs

__all__ = ["Copy", "Prepared", "Row", "block_of", "clock_of", "measure", "prepare", "repeated"]

Tell = Callable[[float], None]

_BLOCK_SECONDS = {"cuda": 5e-3, "cpu": 2e-2}
_LARGEST_BLOCK = {"cuda": 20, "cpu": 10}
_HOST_BLOCK = 20
_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
_CHECKED_PARAMETERS = 1 << 22  # of an optimizer; the first tensors
_SGD_SETS = 3  # parameters, gradients and momentum of each contender
_EXACT_SGD_BYTES = 60  # an element of one tensor: what the check against float64 holds at a time
_LINEAR_BYTES = 24  # an element of hidden states and head: two of float64, two of float32


@dataclass(frozen=True)
class Row:
    """One contender in one workload: what it took, or why there is nothing to say."""

    op: str
    shape: str
    rows: int
    classes: int
    dtype: str
    target: str
    contender: str
    version: str
    status: str  # timed, wrong, absent, unfit, too large, out of memory, failed
    reason: str = ""  # of any status but "timed"
    note: str = ""
    moved_bytes: int = 0  # that the operation must move
    milliseconds: float | None = None  # the median of the turns, of one call; on a GPU, its time
    host_milliseconds: float | None = None  # on a GPU, the host's: until the call returns
    gigabytes_per_second: float | None = None  # moved_bytes over the time
    share_of_copy: float | None = None
    copy_gigabytes_per_second: float | None = None  # of a copy in the same turns, read and written
    peak_bytes: int | None = None  # beyond the inputs (of "linear" their gradients too), or parameters and state
    turns: int = 0
    calls_a_turn: int = 0
    others_share: float | None = None  # of the CPUs' time, that went to other programs meanwhile
    ratios: dict[str, float] = field(default_factory=dict)  # this one's time over another's
    features: int = 0  # of "linear", as all that follows
    teraflops: float | None = None  # the three products' operations over the time
    products_milliseconds: float | None = None  # of three bare products in the same turns
    times_products: float | None = None

    @classmethod
    def of(cls, workload: Workload, contender: Contender, status: str, reason: str = "") -> Row:
        target = "" if workload.op in ("sgd", "linear") else workload.target
        return cls(
            workload.op,
            str(workload.shape),
            *workload.shape[:2],
            workload.dtype_name,
            target,
            contender.name,
            contender.version(),
            status,
            reason,
            contender.note if contender.name != OURS else "",
            workload.moved_bytes,
            features=workload.shape.features,
        )

    @property
    def timed(self) -> bool:
        return self.status == "timed"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Copy:
    """A device copy: the bandwidth that everything is held against."""

    def __init__(self, device: torch.device) -> None:
        size = min(_COPIED_BYTES.get(device.type, 1 << 27), free_bytes(device) // 8)
        self._source = torch.ones(max(size, 1 << 20), dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)

    def step(self) -> Tensor:
        return self._target.copy_(self._source)

    def gigabytes_per_second(self, times: Sequence[float]) -> float:
        """Read and written, at the median of the times in seconds."""
        return 2 * self._source.nbytes / statistics.median(times) / 1e9


@dataclass
class Prepared:
    """A workload with everybody who was found right, ready to be timed; the others have their rows."""

    workload: Workload
    device: torch.device
    steps: dict[str, Step] = field(default_factory=dict)  # one call each
    peaks: dict[str, int | None] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)  # of those that are not to be timed, or have been
    products: Callable[[], linear.Products] | None = None  # makes the limit of "linear"


def measure(
    workload: Workload,
    contenders: Sequence[Contender],
    device: torch.device,
    *,
    budget: float,
    seed: int = 0,
    tell: Tell = lambda share: None,
) -> list[Row]:
    """Check every contender, then time those that are right; a row for each, in their order.

    Args:
        workload: what is measured.
        contenders: who is asked.
        device: where.
        budget: seconds of timing; there are at least five turns.
        seed: of the inputs.
        tell: hears the share of the timing that is done.
    """
    try:
        prepared = prepare(workload, contenders, device, seed=seed)
        if prepared.steps:
            _time(prepared, contenders, budget, tell)
        return [prepared.rows[each.name] for each in contenders]
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def prepare(workload: Workload, contenders: Sequence[Contender], device: torch.device, *, seed: int = 0) -> Prepared:
    """Sort the contenders: absent, unfit, too large, wrong, failed; or checked, run and ready."""
    prepared = Prepared(workload, device)
    candidates = []
    for contender in contenders:
        absence = contender.absence()
        obstacle = contender.obstacle(workload, device)
        if absence is not None:
            unfit = f"; {contender.unfit}" if contender.unfit and workload.op not in contender.ops else ""
            prepared.rows[contender.name] = Row.of(workload, contender, "absent", absence + unfit)
        elif obstacle is not None:
            prepared.rows[contender.name] = Row.of(workload, contender, "unfit", obstacle)
        else:
            candidates.append(contender)
    if not candidates:
        return prepared
    needed, free = _least_bytes(workload, len(candidates), device), free_bytes(device)
    if needed > free:
        words = f"needs {needed / 1e9:.1f} GB or more, {free / 1e9:.1f} GB are free on {device}"
        prepared.rows.update({each.name: Row.of(workload, each, "too large", words) for each in candidates})
        return prepared
    prepare_each = {"sgd": _prepare_sgd, "linear": _prepare_linear}.get(workload.op, _prepare_loss)
    prepare_each(prepared, candidates, seed)
    return prepared


def clock_of(workload: Workload, device: torch.device) -> tuple[Copy | None, Clock]:
    """What takes the times, and a copy that is run for it or for the limit."""
    if workload.op == "host" or device.type != "cuda":  # the host's time is that until a call returns
        return (Copy(device) if workload.moved_bytes else None), by_the_clock
    copy = Copy(device)
    return copy, FullStream(copy.step, device)


def block_of(step: Step, clock: Clock, device: torch.device, op: str = "") -> int:
    """How many calls a turn has."""
    if op == "host":
        return _HOST_BLOCK
    longest = _LARGEST_BLOCK.get(device.type, 1)
    fastest = min(clock(step).device for _ in range(3))
    wanted = _BLOCK_SECONDS.get(device.type, 0.0) / max(fastest, 1e-9)
    return max(1, min(longest, math.ceil(wanted)))


def _least_bytes(workload: Workload, contenders: int, device: torch.device) -> int:
    """On a CPU what all of it may take, since no error comes there when memory runs out; on a GPU what it must."""
    size = workload.shape.numel * workload.dtype.itemsize
    if workload.op == "sgd":
        return _SGD_SETS * contenders * size + _EXACT_SGD_BYTES * workload.shape.classes
    if workload.op == "linear":  # its exact gradients in float64 and their terms; on a CPU eager PyTorch's logits
        gradients = workload.gradient_bytes // workload.dtype.itemsize
        logits = COPIES * size if device.type == "cpu" else size
        return workload.input_bytes + _LINEAR_BYTES * gradients + logits
    return workload.input_bytes + (COPIES if device.type == "cpu" else workload.differentiates) * size


def _prepare_loss(prepared: Prepared, candidates: Sequence[Contender], seed: int) -> None:
    workload, device = prepared.workload, prepared.device
    try:
        inputs = make_inputs(workload, device, seed)
        exact, reference = Exact(workload, inputs[0]), errors_of_reference(workload, inputs[0])
    except Exception as error:
        rows = {each.name: _failed(workload, each, error, "too large") for each in candidates}
        prepared.rows.update(rows)
        return
    for contender in candidates:
        try:
            call = operation(contender.load(), workload)
            judged = copies(inputs[:1])[0] if contender.overwrites else inputs[0]
            wrong = verdict(exact.errors(call(*judged)), reference, workload)
            if wrong is not None:
                prepared.rows[contender.name] = Row.of(workload, contender, "wrong", wrong)
                continue
            own = copies(inputs) if contender.overwrites else inputs
            step = partial(_next_call, call, itertools.cycle(own))
            step()
            prepared.peaks[contender.name] = None if workload.op == "host" else peak_bytes(step, device)
            prepared.steps[contender.name] = step
        except Exception as error:
            prepared.rows[contender.name] = _failed(workload, contender, error)


def _next_call(call: Callable[..., object], following: Iterator[Iterable[Tensor]]) -> None:
    """The result is dropped at the end, as it is in training: each call takes its memory anew."""
    call(*next(following))


def _prepare_linear(prepared: Prepared, candidates: Sequence[Contender], seed: int) -> None:
    workload, device = prepared.workload, prepared.device
    try:
        inputs = make_linear_inputs(workload, device, seed)
        exact = linear.Exact(workload, inputs[0])
        reference = linear.errors_of_reference(workload, inputs[0], exact)
    except Exception as error:
        rows = {each.name: _failed(workload, each, error, "too large") for each in candidates}
        prepared.rows.update(rows)
        return
    calls = {}
    for contender in candidates:
        try:
            loss = contender.load().linear
            assert loss is not None
            call = linear.operation(loss, workload)
            wrong = verdict(exact.errors(call(*inputs[0])), reference, workload)
            if wrong is not None:
                prepared.rows[contender.name] = Row.of(workload, contender, "wrong", wrong)
                continue
            calls[contender.name] = call
        except Exception as error:
            prepared.rows[contender.name] = _failed(workload, contender, error)
    del exact  # large, and in the way of those that follow
    prepared.products = partial(linear.Products, workload, inputs[0])
    for contender in candidates:
        if contender.name not in calls:
            continue
        try:
            step: Step = partial(_next_call, calls[contender.name], itertools.cycle(inputs))
            step()
            prepared.peaks[contender.name] = peak_bytes(step, device) - workload.gradient_bytes
            prepared.steps[contender.name] = step
        except Exception as error:
            prepared.rows[contender.name] = _failed(workload, contender, error)


def _prepare_sgd(prepared: Prepared, candidates: Sequence[Contender], seed: int) -> None:
    workload, device = prepared.workload, prepared.device
    kind = Kind(workload.dtype, device)
    tensors, elements = workload.shape[:2]
    checked = Shape(min(tensors, max(1, _CHECKED_PARAMETERS // elements)), elements)
    for contender in candidates:
        try:
            make = contender.load().optimizer
            assert make is not None
            (off,) = deviations([make], _vectors(checked), kind)
            if not off <= 1.0:
                words = f"parameters off by {off:.3g} x what rounding explains"
                prepared.rows[contender.name] = Row.of(workload, contender, "wrong", words)
                continue
            step = ready(make, _vectors(workload.shape), kind)
            prepared.peaks[contender.name] = peak_bytes(step, device)
            prepared.steps[contender.name] = step
        except Exception as error:
            prepared.rows[contender.name] = _failed(workload, contender, error)


def _vectors(shape: Shape) -> list[tuple[int, ...]]:
    return [(shape.classes,)] * shape.rows


def _failed(workload: Workload, contender: Contender, error: Exception, full: str = "out of memory") -> Row:
    return Row.of(workload, contender, full if is_out_of_memory(error) else "failed", in_words(error))


def _time(prepared: Prepared, contenders: Sequence[Contender], budget: float, tell: Tell) -> None:
    """Adds the rows of those that are ready; if one breaks down now, nobody's turns can be compared."""
    ready = [contender for contender in contenders if contender.name in prepared.steps]
    try:
        rows = _timed(prepared, ready, budget, tell)
    except Exception as error:
        rows = {each.name: _failed(prepared.workload, each, error) for each in ready}
    prepared.rows.update(rows)


def _timed(prepared: Prepared, contenders: Sequence[Contender], budget: float, tell: Tell) -> dict[str, Row]:
    workload, device = prepared.workload, prepared.device
    steps = prepared.steps
    copy, clock = clock_of(workload, device)
    blocks = {name: block_of(step, clock, device, workload.op) for name, step in steps.items()}
    turns: list[Step] = [partial(repeated, step, blocks[name]) for name, step in steps.items()]
    products = prepared.products() if prepared.products else None
    if not workload.moved_bytes:
        copy = None  # which is no limit of it
    limits = [limit.step for limit in (copy, products) if limit is not None]
    for step in limits:
        step()
    with Neighbours() as neighbours:
        times = in_turns([*turns, *limits], clock, budget=max(budget, 1e-6), tell=tell)
    seconds = [[each.device for each in mine] for mine in times]
    copied = copy.gigabytes_per_second(seconds[-1]) if copy else None
    bare = statistics.median(seconds[-1]) if products else None
    medians = {name: statistics.median(mine) / blocks[name] for name, mine in zip(steps, seconds, strict=False)}
    hosts = {}
    for name, mine in zip(steps, times, strict=False):
        found = [each.host for each in mine if each.host is not None]
        hosts[name] = 1e3 * statistics.median(found) / blocks[name] if found else None
    rows = {}
    for contender in contenders:
        median = medians[contender.name]
        speed = workload.moved_bytes / median / 1e9 if workload.moved_bytes else None
        rows[contender.name] = replace(
            Row.of(workload, contender, "timed"),
            milliseconds=1e3 * median,
            host_milliseconds=hosts[contender.name],
            gigabytes_per_second=speed,
            share_of_copy=speed / copied if speed and copied else None,
            copy_gigabytes_per_second=copied,
            peak_bytes=prepared.peaks[contender.name],
            turns=len(times[0]),
            calls_a_turn=blocks[contender.name],
            others_share=neighbours.share,
            ratios={other: median / theirs for other, theirs in medians.items() if other != contender.name},
            teraflops=workload.operations / median / 1e12 if workload.operations else None,
            products_milliseconds=1e3 * bare if bare else None,
            times_products=median / bare if bare else None,
        )
    return rows


def repeated(step: Step, block: int) -> None:
    for _ in range(block):
        step()
