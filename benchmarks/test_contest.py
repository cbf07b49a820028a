"""Each contender in each workload: ``pytest benchmarks --benchmark-only``; see conftest.py.

A contender that is absent or can't serve is skipped, with the reason. One that is wrong or fails is an expected
failure where it is another's package, and a failure where it is fastloss. ``extra_info`` holds the bytes that must
move, GB/s, the share of a copy's bandwidth in this run, the peak memory and, on a GPU, the host's time.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING

import pytest

from fastloss.bench.measure import block_of
from fastloss.measuring.clock import EventClock, FullStream, repeated
from fastloss.measuring.contenders import CONTENDERS, OURS

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from .conftest import Contest

_SECONDS = {"tiny": 0.02, "quick": 0.5, "full": 1.0}  # of each benchmark
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 200


def test_cross_entropy(
    contest: Contest, contender: str, benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> None:
    """Time one contender in one workload of the operations that conftest.py names for the test."""
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
