"""The machine: its memory, its other programs, its name; and the errors that it raises."""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import profile

import fastloss

from ..backends import choice
from . import info

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class OtherPrograms:
    """The share of all CPUs' time that other programs took since this object was made.

    Counted is the time that the system lists as neither idle nor waiting for a disk, less the time of this process
    and of its ended children. Time that a virtual machine's host gave to others counts.
    """

    def __init__(self) -> None:
        self._start = self._times()

    def share(self) -> float:
        """Return the share, in [0, 1]."""
        total, idle, own = (now - before for now, before in zip(self._times(), self._start, strict=True))
        return max(0.0, total - idle - own) / total if total > 0 else 0.0

    @staticmethod
    def _times() -> tuple[float, float, float]:
        import psutil

        cpus = psutil.cpu_times()._asdict()
        idle = cpus["idle"] + cpus.get("iowait", 0.0)
        # Linux counts a guest's time in "user" and "nice" as well.
        total = sum(cpus.values()) - cpus.get("guest", 0.0) - cpus.get("guest_nice", 0.0)
        return total, idle, sum(os.times()[:4])


def free_bytes(device: torch.device) -> int:
    """Return the bytes of free memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def halved_to_fit(size: int, least: int, nbytes: Callable[[int], int], device: torch.device) -> int:
    """Return ``size``, halved until its ``nbytes`` are no more than half of the free memory, or ``least``."""
    free = free_bytes(device)
    while size > least and nbytes(size) > free / 2:
        size //= 2
    return size


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors that ``step`` holds at one time, beyond those alive before it.

    On a GPU this is the caching allocator's own high-water mark. On a CPU torch's profiler records each allocation
    and release of the tensor allocator, and this is the highest point of their running sum. (Compared with the
    high-water mark of the process's resident memory on Linux, for steps of 65 to 790 MB in float32: within 1 %.)
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(itertools.accumulate(_cpu_allocations(step), initial=0))


def _cpu_allocations(step: Callable[[], object]) -> list[int]:
    """Return each change of the CPU allocator's bytes during ``step``: positive if taken, negative if given back."""
    # The profiler's library writes its start and end to stderr at every level below this one. It reads the
    # variable once, when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(profile_memory=True) as record:
        step()
    results: Any = record.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    changes = [event for event in events if event.device_type() == DeviceType.CPU]
    return [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]


def description(device: torch.device) -> str:
    """Return the machine's name and the versions, in one line."""
    versions = [f"fastloss {fastloss.__version__}", f"torch {torch.__version__}"]
    name = f"{info.processor()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions.append(f"Triton {choice.triton_version() or 'not installed'}")
    return " · ".join([name, *versions, f"Python {platform.python_version()}"])


def missing(*modules: str) -> list[str]:
    """Return the packages, by their names for pip, whose modules are not installed."""
    names = {"sklearn": "scikit-learn"}
    return [names.get(module, module) for module in modules if importlib.util.find_spec(module) is None]


def first_line(error: BaseException) -> str:
    """Return an error's class and the first line of its message, without a terminal's colours."""
    lines = _COLOURS.sub("", str(error)).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if memory ran out: a GPU's allocator has a class for that, a CPU's a message only."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def bytes_in_words(number: int) -> str:
    """Return ``1.2 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture the call in a CUDA graph, after three calls on another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph
