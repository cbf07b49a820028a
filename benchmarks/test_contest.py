"""Each contender in each workload: ``pytest benchmarks --benchmark-only``; options and hooks: conftest.py.

A contender that is absent or can't serve is skipped, with the reason. One that is wrong or fails is an expected
failure where it is another's package, and a failure where it is fastloss. ``extra_info`` holds the bytes that must
move, GB/s, the share of a copy's bandwidth in this run, the peak memory and, on a GPU, the host's time.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from fastloss.bench.measure import Prepared, block_of, clock_of, prepare
from fastloss.bench.workloads import TARGETS, Workload, workloads
from fastloss.measuring.clock import Clock, Copy, EventClock, FullStream, repeated
from fastloss.measuring.contenders import CONTENDERS, DTYPES, LINEAR_OPS, OURS, contenders_of

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS = {
    "test_cross_entropy": ("forward", "forward+backward", "loss+accuracy"),
    "test_accuracy": ("accuracy",),
    "test_linear": LINEAR_OPS,
    "test_sgd": ("sgd",),
    "test_host": ("host",),
}
_COPIES = 5  # that the bandwidth is the median of
# A workload that is ready for all of its contenders, a copy's GB/s at that time, and the clock.
Contest = tuple[Prepared, float, Clock]
_SECONDS = {"tiny": 0.02, "quick": 0.5, "full": 1.0}  # of each benchmark
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 200


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size, name = metafunc.config.getoption("--shapes"), metafunc.definition.originalname
    dtypes = {"tiny": ["float32"], "quick": ["bfloat16", "float32"], "full": list(DTYPES)}[size]
    targets = ["hard"] if size == "quick" or name == "test_host" else TARGETS
    chosen = workloads(OPS[name], dtypes, targets, DEVICE, size=size)
    pairs = []
    for workload, contender in ((each, contender) for each in chosen for contender in contenders_of(each.op)):
        # A table for each workload; on a GPU its own clock, but for the host's time.
        on_gpu = DEVICE.type == "cuda" and workload.op != "host"
        timer: Callable[[], float] = EventClock() if on_gpu else time.perf_counter
        marks, name = pytest.mark.benchmark(group=str(workload), timer=timer), f"{workload}-{contender.name}"
        pairs.append(pytest.param(workload, contender.name, marks=marks, id=name))
    metafunc.parametrize(("contest", "contender"), pairs, indirect=["contest"], scope="session")


@pytest.fixture(scope="session")
def contest(request: pytest.FixtureRequest) -> Iterator[Contest]:
    """Make the workload ready once for all of its contenders, which follow each other."""
    workload: Workload = request.param
    chosen = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    names = [params["contender"] for params in chosen if params.get("contest") == workload]  # -k may have left few
    prepared = prepare(workload, [CONTENDERS[name] for name in names], DEVICE)
    copy, clock = clock_of(workload, DEVICE)
    copy = copy or Copy(DEVICE)
    copy.step()
    copied = copy.gigabytes_per_second(statistics.median(clock(copy.step).device for _ in range(_COPIES)))
    yield prepared, copied, clock
    prepared.steps.clear()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def test_cross_entropy(
    contest: Contest, contender: str, benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> None:
    """Time one contender in one workload of the operations that OPS names for the test."""
    prepared, copied, clock = contest
    workload, device = prepared.workload, prepared.device
    row = prepared.rows[contender]
    if contender not in prepared.steps:
        words = f"{contender} is {row.status}: {row.reason}"
        if row.status not in ("wrong", "failed"):
            pytest.skip(words)
        (pytest.fail if contender == OURS else pytest.xfail)(words)
    step = prepared.steps[contender]
    block = block_of(step, clock, device, workload.op)
    times = clock(partial(repeated, step, block))
    timer = request.node.get_closest_marker("benchmark").kwargs["timer"]
    if isinstance(timer, EventClock) and isinstance(clock, FullStream) and times.host is not None:
        timer.before = partial(clock.fill, times.host)
        benchmark.extra_info["host_milliseconds"] = 1e3 * times.host / block
    rounds = int(_SECONDS[request.config.getoption("--shapes")] / max(times.device, 1e-9))
    benchmark.extra_info.update(
        contender=contender,
        version=CONTENDERS[contender].version(),
        note=CONTENDERS[contender].note,
        device=str(device),
        moved_bytes=workload.moved_bytes,
        peak_bytes=row.peak_bytes,
        copy_gigabytes_per_second=copied,
    )
    rounds = max(_LEAST_ROUNDS, min(_MOST_ROUNDS, rounds))
    benchmark.pedantic(step, rounds=rounds, iterations=block, warmup_rounds=1)
    if benchmark.stats is None:  # with --benchmark-disable
        return
    median = benchmark.stats.stats.median
    if workload.moved_bytes:
        speed = workload.moved_bytes / median / 1e9
        benchmark.extra_info.update(gigabytes_per_second=speed, share_of_copy=speed / copied)
    if prepared.products is not None:
        products = prepared.products()
        products.step()
        bare = statistics.median(clock(products.step).device for _ in range(_LEAST_ROUNDS))
        benchmark.extra_info.update(
            operations=workload.operations,
            teraflops=workload.operations / median / 1e12,
            products_teraflops=workload.operations / bare / 1e12,
        )


# The same for other operations, under names that -k can pick.
test_accuracy = test_linear = test_sgd = test_host = test_cross_entropy
