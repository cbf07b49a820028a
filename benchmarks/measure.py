"""What the benchmarks share: turns and medians, bars, the machine's other work, and the head of a record."""

from __future__ import annotations

import datetime
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fastloss

ROOT = Path(__file__).resolve().parents[1]

_LEAST_CALLS = 5


class Budget(NamedTuple):
    """How long contenders are measured, and how many calls each of them makes in a turn."""

    seconds: float
    block: int


def medians(turns: Sequence[Callable[[], Sequence[float]]], seconds: float) -> list[float]:
    """The median in ms of what each turn returns, in seconds; every round takes each, until the time is up."""
    times: list[list[float]] = [[] for _ in turns]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < _LEAST_CALLS:
        for turn, mine in zip(turns, times, strict=True):
            mine.extend(turn())
    return [1e3 * statistics.median(mine) for mine in times]


def interleaved(calls: Sequence[Callable[[Tensor], object]], inputs: Sequence[Tensor], budget: Budget) -> list[float]:
    """The median time of each call in ms by the clock; every call takes the next of the inputs."""
    following = itertools.cycle(inputs)

    def turn(call: Callable[[Tensor], object]) -> list[float]:
        times = []
        for _ in range(budget.block):
            x = next(following)
            start = time.perf_counter()
            call(x)
            times.append(time.perf_counter() - start)
        return times

    for call in calls:
        call(next(following))
        call(next(following))
    return medians([partial(turn, call) for call in calls], budget.seconds)


def by_the_clock(call: Callable[[], object]) -> float:
    """The seconds until the call returns."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def by_events(call: Callable[[], object], block: int) -> float:
    """The seconds that a GPU takes for one of a block of calls."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(block):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / block


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of the call."""
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


def verdict(value: float, bar: float | None) -> str:
    """The bar, and whether it is met; nothing without one."""
    return "" if bar is None else f"≤ {bar:.2f} {'ok' if value <= bar else 'MISSED'}"


def others_share(before: tuple[float, float]) -> float:
    """The share of the machine's CPU time, since ``before``, that went to other processes."""
    busy, mine = cpu_seconds()
    total = busy - before[0]
    return max(0.0, 1 - (mine - before[1]) / total) if total > 0 else 0.0


def cpu_seconds() -> tuple[float, float]:
    """CPU time that the machine, and this process, have spent so far."""
    times = os.times()
    mine = times.user + times.system + times.children_user + times.children_system
    try:
        with open("/proc/stat") as stat:
            user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except (OSError, ValueError):
        return mine, mine
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), mine


def header(*details: str) -> str:
    """The first line of every benchmark's output."""
    return ", ".join([f"fastloss {fastloss.__version__}", f"torch {torch.__version__}", *details])


def circumstances(device: torch.device) -> str:
    """What a record says of the code and the machine that it was made with."""
    where = f"{os.cpu_count()} cores of {_processor()}"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, {where}"
    return (
        f"at {_commit()}, {datetime.date.today()}, on {where}, "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
    )


def _commit() -> str:
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "fastloss", "kernels", "benchmarks", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "an unknown commit"
    return f"commit {commit}" + (" and changes" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
