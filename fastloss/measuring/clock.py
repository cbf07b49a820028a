"""Times of steps: a CPU's, a GPU's and the host's, in turns; and the steps that are the limits of others.

On an empty stream a GPU waits for the host, and events around a call measure the slower of the two. In training the
stream is not empty: the host queues the loss while the GPU is busy with the model. So :class:`FullStream` takes the
host's time first, by the clock until the call returns, and then queues copies that keep the GPU busy until the host
has queued the timed call. The copies also leave none of the first call's inputs in the L2 cache. (NVBench holds the
stream back by a kernel that waits for the host, for the same reason:
https://github.com/NVIDIA/nvbench/blob/main/docs/benchmarks.md.)

Some calls wait for the GPU themselves, to count the labels that are not ignored. The host then queues the rest of
such a call late, and the wait is part of its GPU's time, as it would be in training.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .machine import free_bytes

Measured = TypeVar("Measured")
Step = Callable[[], object]
Progress = Callable[[float], object]  # takes the share that is done, in [0, 1]

_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
# A turn's block of calls: on a CPU as many as settle the C library's allocator, on a GPU as its stream's queue holds.
_BLOCK_SECONDS = {"cuda": 5e-3, "cpu": 2e-2}
_LARGEST_BLOCK = {"cuda": 20, "cpu": 10}
# The copies last this many times the host's time, which is not the same in each call.
_MARGIN = 1.25
# A stream's queue holds about 1000 launches; the copies leave room in it, and delay a turn by no more than this.
_MOST_COPIES = 400
_MOST_SECONDS = 0.25


class Times(NamedTuple):
    """The seconds of a step."""

    device: float
    host: float | None = None  # until the step returned, on a GPU


Clock = Callable[[Step], Times]


def seconds(step: Step, device: torch.device) -> float:
    """Return the seconds of ``step``: by the clock on a CPU, between two events on a GPU's stream."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def by_the_clock(step: Step) -> Times:
    """Return the times of ``step`` on a CPU, or of the host alone."""
    return Times(seconds(step, torch.device("cpu")))


def in_turns(
    steps: Sequence[Step],
    measure: Callable[[Step], Measured],
    *,
    budget: float,
    least: int = 5,
    progress: Progress = lambda share: None,
) -> list[list[Measured]]:
    """Measure every step once a round, so that a busy moment of the machine hits all of them alike.

    Every step should have run before, so that none is timed cold. Every other round goes backwards.

    Args:
        steps: the steps.
        measure: takes the times of a step in its turn.
        budget: seconds until no further round begins.
        least: rounds that are made whatever they take.
        progress: called after each round with the share of the budget that is spent.
    """
    results: list[list[Measured]] = [[] for _ in steps]
    start, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - start < budget:
        for i in range(len(steps)) if rounds % 2 == 0 else reversed(range(len(steps))):
            results[i].append(measure(steps[i]))
        rounds += 1
        progress(min(1.0, (time.perf_counter() - start) / budget))
    return results


def medians(
    steps: Sequence[Step],
    device: torch.device,
    *,
    budget: float,
    block: int = 1,
    least: int = 5,
    before: Step = lambda: None,
) -> list[float]:
    """Return the median seconds of one call of each step, measured in turns of ``block`` calls.

    On a CPU each call is timed by itself, after a call of ``before``, on a GPU the calls of a turn together.
    There are at least ``least`` times.
    """
    on_gpu = device.type == "cuda"

    def turn(step: Step) -> list[float]:
        if on_gpu:
            return [seconds(partial(repeated, step, block), device) / block]
        times = []
        for _ in range(block):
            before()
            times.append(seconds(step, device))
        return times

    turns = in_turns(steps, turn, budget=max(budget, 1e-9), least=least if on_gpu else -(-least // block))
    return [statistics.median(itertools.chain(*times)) for times in turns]


def repeated(step: Step, times: int) -> None:
    """Call ``step`` several times."""
    for _ in range(times):
        step()


def block_size(step: Step, clock: Clock, device: torch.device) -> int:
    """Return how many calls of ``step`` make a turn."""
    fastest = min(clock(step).device for _ in range(3))
    wanted = _BLOCK_SECONDS.get(device.type, 0.0) / max(fastest, 1e-9)
    return max(1, min(_LARGEST_BLOCK.get(device.type, 1), math.ceil(wanted)))


class Copy:
    """A device copy, whose bandwidth is the limit that contenders are compared with."""

    def __init__(self, device: torch.device, nbytes: int | None = None) -> None:
        size = nbytes or min(_COPIED_BYTES.get(device.type, 1 << 27), free_bytes(device) // 8)
        self._source = torch.ones(max(size, 1 << 20), dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)

    def step(self) -> Tensor:
        """Copy once."""
        return self._target.copy_(self._source)

    def gigabytes_per_second(self, seconds: float) -> float:
        """Return the bandwidth of a copy that took ``seconds``, read and written bytes together."""
        return 2 * self._source.nbytes / seconds / 1e9


class Products:
    """The three products of matrices that every linear_cross_entropy needs, into memory that is there."""

    def __init__(self, hidden: Tensor, head: Tensor) -> None:
        self._hidden, self._head = hidden.detach(), head.detach()
        self._logits = hidden.new_empty(len(hidden), len(head))
        self._hidden_gradient, self._head_gradient = torch.empty_like(self._hidden), torch.empty_like(self._head)

    def step(self) -> None:
        """Compute the logits and both gradients once."""
        torch.mm(self._hidden, self._head.t(), out=self._logits)
        torch.mm(self._logits, self._head, out=self._hidden_gradient)
        torch.mm(self._logits.t(), self._hidden, out=self._head_gradient)


class FullStream:
    """A clock for steps on a GPU whose stream is kept full.

    Args:
        copy: the work that fills the stream; one copy is long beside a launch.
        device: the GPU.
    """

    def __init__(self, copy: Step, device: torch.device) -> None:
        self._copy, self._device = copy, device
        copy()
        self._copy_seconds = max(1e-9, min(seconds(copy, device) for _ in range(3)))

    def __call__(self, step: Step) -> Times:
        """Return the GPU's time of the step and the host's, which is taken first."""
        torch.cuda.synchronize(self._device)
        host = seconds(step, torch.device("cpu"))
        torch.cuda.synchronize(self._device)
        self.fill(host)
        return Times(seconds(step, self._device), host)

    def fill(self, host: float) -> None:
        """Queue copies that keep the GPU busy for ``host`` seconds of the host, up to the limit of a turn."""
        repeated(self._copy, self.copies(host))

    def copies(self, host: float) -> int:
        """Return the number of copies that :meth:`fill` queues."""
        most = min(_MOST_COPIES, int(_MOST_SECONDS / self._copy_seconds))
        return max(1, min(most, 1 + math.ceil(_MARGIN * host / self._copy_seconds)))


class EventClock:
    """A GPU's clock in seconds, for programs that read a clock before and after the code that they time.

    Every second reading ends a turn and waits for the GPU. ``before`` is called ahead of each turn, to fill a stream.
    """

    def __init__(self) -> None:
        self.before: Step = lambda: None
        self._first: torch.cuda.Event | None = None
        self._seconds = 0.0

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        if self._first is None:
            self.before()
            event.record()
            self._first = event
            return self._seconds
        event.record()
        event.synchronize()
        self._seconds += self._first.elapsed_time(event) / 1e3
        self._first = None
        return self._seconds
