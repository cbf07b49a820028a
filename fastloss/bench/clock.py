"""A GPU's time of a call and the host's, one apart from the other.

On an empty stream a GPU waits for the host, and events around a call say which of the two is slower. In training the
stream is not empty: the host queues the loss while the GPU is busy with the model. So copies are queued before the
calls that are timed, for the GPU to do until the host has queued those, and the host's own time is taken before, by
the clock, until the calls return. The copies also leave none of the first call's inputs in the L2 cache. (NVBench
holds the stream back by a kernel that waits for the host, for the same:
https://github.com/NVIDIA/nvbench/blob/main/docs/benchmarks.md.)

A call that waits for the GPU itself, as some do to count the labels that are not ignored, has the host queue the rest
of it late, and that is in its GPU's time, as it would be in training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..demo.measure import Step, seconds

__all__ = ["Clock", "EventClock", "FullStream", "Times", "by_the_clock"]

# The copies' time over the host's: it is not the same each time.
_MARGIN = 1.25
# No more of them than leave room for launches in a stream's queue, which holds about 1000, and no longer than that.
_MOST_COPIES = 400
_MOST_SECONDS = 0.25


class Times(NamedTuple):
    """Seconds of a step."""

    device: float
    host: float | None = None  # until it returned, on a GPU


Clock = Callable[[Step], Times]


def by_the_clock(step: Step) -> Times:
    """On a CPU; or of the host alone."""
    return Times(seconds(step, torch.device("cpu")))


class FullStream:
    """Takes the times of steps on a GPU that has something else to do first.

    Args:
        copy: what it has to do, several times, each long beside a launch.
        device: the GPU.
    """

    def __init__(self, copy: Step, device: torch.device) -> None:
        self._copy, self._device = copy, device
        copy()
        self._copy_seconds = max(1e-9, min(seconds(copy, device) for _ in range(3)))

    def __call__(self, step: Step) -> Times:
        """The host's time of the step, then the GPU's."""
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        step()
        host = time.perf_counter() - start
        torch.cuda.synchronize(self._device)
        self.fill(host)
        return Times(seconds(step, self._device), host)

    def fill(self, host: float) -> None:
        """Queue what keeps the GPU busy for the host's ``host`` seconds, or for as many as a turn may wait."""
        for _ in range(self.copies(host)):
            self._copy()

    def copies(self, host: float) -> int:
        """How many those are."""
        most = min(_MOST_COPIES, int(_MOST_SECONDS / self._copy_seconds))
        return max(1, min(most, 1 + math.ceil(_MARGIN * host / self._copy_seconds)))


class EventClock:
    """Seconds, by the GPU's own clock, for programs that read a clock before and after what they time.

    Every other reading ends a turn, and waits for the GPU. ``before`` a turn, the GPU gets something to do.
    """

    def __init__(self) -> None:
        self.before: Step = lambda: None
        self._begun: torch.cuda.Event | None = None
        self._seconds = 0.0

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        if self._begun is None:
            self.before()
            event.record()
            self._begun = event
            return self._seconds
        event.record()
        event.synchronize()
        self._seconds += self._begun.elapsed_time(event) / 1e3
        self._begun = None
        return self._seconds
