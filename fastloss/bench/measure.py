"""One workload: why contenders can't take part, which are wrong, and the times and memory of the others.

Contenders take turns, and a device copy with them (with linear_cross_entropy three bare products), so that a busy
moment hits all alike and the limit is that of the same seconds. A turn is a block of calls.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..measuring import clock
from ..measuring.clock import Clock, Copy, Products, Progress, Step, Times
from ..measuring.contenders import SGD_OPTIONS, Contender
from ..measuring.machine import OtherPrograms, bytes_in_words, first_line, free_bytes, is_out_of_memory, peak_bytes
from ..measuring.reference import LinearReference, LossReference, errors_of_eager, operation, verdict
from ..measuring.sgd import ready_step, step_errors
from .workloads import Workload

# Returns a maker of a contender's step, why its results are wrong, if they are, and the error of its gradient.
Check = Callable[[Contender], tuple[Callable[[], Step], "str | None", "float | None"]]

_HOST_BLOCK = 20
_CHECKED_PARAMETERS = 1 << 22  # of an optimizer; the first tensors
_LOGITS_COPIES = 6  # of the logits' size: plain PyTorch's backward on a CPU, and some room
_SGD_SETS = 3  # parameters, gradients and momentum of each contender
_EXACT_SGD_BYTES = 80  # an element of one tensor: what the check against float64 holds at a time
_LINEAR_BYTES = 24  # an element of hidden states and head: two of float64, two of float32


@dataclass(frozen=True)
class Row:
    """One contender in one workload: its numbers, or why it has none."""

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
    peak_bytes: int | None = None  # beyond the inputs (of LINEAR_OPS their gradients too), or parameters and state
    turns: int = 0
    calls_a_turn: int = 0
    others_share: float | None = None  # of the CPUs' time, that other programs took meanwhile
    ratios: dict[str, float] = field(default_factory=dict)  # this contender's time over another's
    features: int = 0  # of LINEAR_OPS, as all that follows
    teraflops: float | None = None  # the three products' operations over the time
    products_milliseconds: float | None = None  # of three bare products in the same turns
    times_products: float | None = None
    gradient_error: float | None = None  # ‖gradient − exact‖ / ‖exact‖, if it is finite

    @classmethod
    def of(cls, workload: Workload, contender: Contender, status: str = "timed", reason: str = "") -> Row:
        """Return a row without numbers."""
        op, (rows, classes, features), dtype = workload.op, workload.shape, workload.dtype_name
        target, note = "" if op == "sgd" or features else workload.target, contender.note
        about = (op, str(workload.shape), rows, classes, dtype, target, contender.name, contender.version())
        return cls(*about, status, reason, note, workload.moved_bytes, features=features)

    @property
    def timed(self) -> bool:
        """True if the row has a time."""
        return self.status == "timed"

    def cells(self) -> dict[str, str]:
        """Return the numbers that the row has, as they are printed, by the heads of their columns."""
        return {
            head: form(number)
            for head, (name, form) in COLUMNS.items()
            if (number := getattr(self, name)) is not None
        }


# Heads, fields and forms.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "ms": ("milliseconds", "{:.4f}".format),
    "host ms": ("host_milliseconds", "{:.4f}".format),
    "Tflop/s": ("teraflops", "{:.4g}".format),
    "of the products": ("times_products", "{:.3f}".format),
    "GB/s": ("gigabytes_per_second", "{:.2f}".format),
    "of a copy": ("share_of_copy", "{:.0%}".format),
    "peak": ("peak_bytes", bytes_in_words),
}


@dataclass
class Prepared:
    """A workload, the steps that are ready to be timed, and a row of each contender."""

    workload: Workload
    device: torch.device
    rows: dict[str, Row]
    steps: dict[str, Step] = field(default_factory=dict)  # one call each
    products: Callable[[], Products] | None = None  # makes the limit of LINEAR_OPS

    def change(self, name: str, **fields: Any) -> None:
        """Change a contender's row."""
        self.rows[name] = replace(self.rows[name], **fields)

    @contextlib.contextmanager
    def failing(self, names: Iterable[str], full: str = "out of memory") -> Iterator[None]:
        """Write an error into the rows of the contenders that are named."""
        try:
            yield
        except Exception as error:
            for name in names:
                self.change(name, status=full if is_out_of_memory(error) else "failed", reason=first_line(error))


def measure(
    workload: Workload,
    contenders: Sequence[Contender],
    device: torch.device,
    *,
    budget: float,
    timing_wrong: bool = False,
    progress: Progress = lambda share: None,
) -> list[Row]:
    """Check every contender, then time those that are right; return a row for each, in their order.

    Args:
        workload: the operation and its shape.
        contenders: the contenders, whether they can serve or not.
        device: the device.
        budget: seconds of timing; there are at least five turns.
        timing_wrong: True if wrong contenders are timed too.
        progress: called with the share of the timing that is done.
    """
    try:
        prepared = prepare(workload, contenders, device, timing_wrong=timing_wrong)
        with prepared.failing(prepared.steps):  # if one fails now, no contender's turns can be compared
            prepared.rows.update(_timed(prepared, budget, progress) if prepared.steps else {})
        return [prepared.rows[contender.name] for contender in contenders]
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def prepare(
    workload: Workload, contenders: Sequence[Contender], device: torch.device, *, timing_wrong: bool = False
) -> Prepared:
    """Sort the contenders: absent, unfit, too large, wrong, failed; or checked, run and ready."""
    prepared = Prepared(workload, device, {each.name: Row.of(workload, each) for each in contenders})
    candidates: dict[str, Contender] = {}
    for contender in contenders:
        obstacle = contender.obstacle(workload.op, workload.dtype, device, soft=workload.soft)
        if (absence := contender.absence()) is not None:
            unfit = f"; {contender.unfit}" if contender.unfit and workload.op not in contender.ops else ""
            prepared.change(contender.name, status="absent", reason=absence + unfit)
        elif obstacle is not None:
            prepared.change(contender.name, status="unfit", reason=obstacle)
        else:
            candidates[contender.name] = contender
    needed, free = _least_bytes(workload, len(candidates), device), free_bytes(device)
    if needed > free:
        words = f"needs {needed / 1e9:.1f} GB or more, {free / 1e9:.1f} GB are free on {device}"
        for name in candidates:
            prepared.change(name, status="too large", reason=words)
        candidates = {}
    check: Check | None = None
    makers: dict[str, Callable[[], Step]] = {}
    with prepared.failing(candidates, "too large"):
        if candidates:
            check = _sgd_check(prepared) if workload.op == "sgd" else _loss_check(prepared)
    if check is None:
        return prepared
    for name, contender in candidates.items():
        with prepared.failing([name]):
            make, wrong, error = check(contender)
            prepared.change(name, status="wrong" if wrong else "timed", reason=wrong or "", gradient_error=error)
            if timing_wrong or not wrong:
                makers[name] = make
    del check  # whose reference is large for LINEAR_OPS; the contenders' peaks need its memory
    for name, make in makers.items():
        with prepared.failing([name]):
            step = make()
            step()
            peak = None if workload.op == "host" else max(0, peak_bytes(step, device) - workload.gradient_bytes)
            prepared.change(name, peak_bytes=peak)
            prepared.steps[name] = step
    return prepared


def _loss_check(prepared: Prepared) -> Check:
    workload, is_linear = prepared.workload, bool(prepared.workload.shape.features)
    inputs: list[Any] = list(workload.inputs(prepared.device, seed=0))
    exact = workload.reference(inputs[0])

    def reference(first: Any) -> LossReference | LinearReference:
        return exact if first is inputs[0] else workload.reference(first)

    allowed = errors_of_eager(inputs[0], workload.op, reference, workload.upstream)
    if is_linear:
        prepared.products = partial(Products, *inputs[0][:2])

    def check(contender: Contender) -> tuple[Callable[[], Step], str | None, float | None]:
        call = operation(contender.load(), workload.op, workload.upstream)
        overwrites = contender.overwrites and not is_linear
        (errors,) = exact.errors(call(*(inputs[0].copy() if overwrites else inputs[0])))

        def make() -> Step:
            own = [each.copy() for each in inputs] if overwrites else inputs
            return partial(_next_call, call, itertools.cycle(own))

        is_known = workload.differentiates and math.isfinite(errors.gradient_norm)
        return make, verdict(errors, allowed, workload.dtype), errors.gradient_norm if is_known else None

    return check


def _next_call(call: Callable[..., object], following: Iterator[Iterable[Tensor]]) -> None:
    """Drop the result at the end, as training does: each call takes its memory anew."""
    call(*next(following))


def _sgd_check(prepared: Prepared) -> Check:
    (tensors, elements, _), dtype, device = prepared.workload.shape, prepared.workload.dtype, prepared.device
    shapes = [(elements,)] * tensors

    def check(contender: Contender) -> tuple[Callable[[], Step], str | None, float | None]:
        sgd: Any = contender.load().sgd
        make = partial(sgd, **SGD_OPTIONS)
        (errors,) = step_errors([make], shapes[: max(1, _CHECKED_PARAMETERS // elements)], dtype, device)
        wrong = f"parameters off by {errors.of_rounding:.3g} x what rounding explains"
        return partial(ready_step, make, shapes, dtype, device), None if errors.of_rounding <= 1.0 else wrong, None

    return check


def clock_of(workload: Workload, device: torch.device) -> tuple[Copy | None, Clock]:
    """Return the clock of a workload, and the copy that it or the limit needs."""
    if workload.op == "host" or device.type != "cuda":  # the host's time is that until a call returns
        return (Copy(device) if workload.moved_bytes else None), clock.by_the_clock
    copy = Copy(device)
    return copy, clock.FullStream(copy.step, device)


def block_of(step: Step, timer: Clock, device: torch.device, op: str = "") -> int:
    """Return how many calls make a turn."""
    return _HOST_BLOCK if op == "host" else clock.block_size(step, timer, device)


def _least_bytes(workload: Workload, contenders: int, device: torch.device) -> int:
    """Return the bytes that a workload needs: at least on a GPU, at most on a CPU, where running out is no error."""
    logits = workload.nbytes * (_LOGITS_COPIES if device.type == "cpu" else workload.differentiates)
    if workload.op == "sgd":
        return _SGD_SETS * contenders * workload.nbytes + _EXACT_SGD_BYTES * workload.shape.classes
    if workload.shape.features:  # with the exact gradients in float64 and their terms
        logits += _LINEAR_BYTES * workload.factor_bytes // workload.dtype.itemsize
    return workload.input_bytes + logits


def _timed(prepared: Prepared, budget: float, progress: Progress) -> dict[str, Row]:
    workload, device, steps = prepared.workload, prepared.device, prepared.steps
    copy, timer = clock_of(workload, device)
    blocks = {name: block_of(step, timer, device, workload.op) for name, step in steps.items()}
    turns: list[Step] = [partial(clock.repeated, step, blocks[name]) for name, step in steps.items()]
    products = prepared.products() if prepared.products else None
    limit = products or (copy if workload.moved_bytes else None)
    if limit is not None:
        limit.step()
        turns.append(limit.step)
    others = OtherPrograms()
    times = clock.in_turns(turns, timer, budget=max(budget, 1e-6), progress=progress)
    others_share = others.share()
    copied = copy.gigabytes_per_second(_median(times[-1])) if copy and limit is copy else None
    bare = _median(times[-1]) if products else None
    medians = {name: _median(turn) / blocks[name] for name, turn in zip(steps, times, strict=False)}
    rows = {}
    for (name, median), turn in zip(medians.items(), times, strict=False):
        hosts = [each.host for each in turn if each.host is not None]
        speed = workload.moved_bytes / median / 1e9 if workload.moved_bytes else None
        rows[name] = replace(
            prepared.rows[name],
            milliseconds=1e3 * median,
            host_milliseconds=1e3 * statistics.median(hosts) / blocks[name] if hosts else None,
            gigabytes_per_second=speed,
            share_of_copy=speed / copied if speed and copied else None,
            copy_gigabytes_per_second=copied,
            turns=len(turn),
            calls_a_turn=blocks[name],
            others_share=others_share,
            ratios={other: median / theirs for other, theirs in medians.items() if other != name},
            teraflops=workload.operations / median / 1e12 if workload.operations else None,
            products_milliseconds=1e3 * bare if bare else None,
            times_products=median / bare if bare else None,
        )
    return rows


def _median(turns: Sequence[Times]) -> float:
    return statistics.median(times.device for times in turns)
