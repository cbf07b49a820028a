"""The contest under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

``--shapes`` chooses how much of it: ``tiny`` (seconds, on a CPU: what CI runs), ``quick`` or ``full``; ``-k`` picks
by operation, shape, dtype, target and contender. ``python -m fastloss bench`` measures the same with all contenders
in turns; here each is timed by itself, as pytest-benchmark has it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from fastloss.bench.measure import Prepared, clock_of, prepare
from fastloss.bench.workloads import SIZES, TARGETS, Workload, workloads
from fastloss.measuring.clock import Clock, Copy, EventClock
from fastloss.measuring.contenders import CONTENDERS, DTYPES, contenders_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS = {
    "test_cross_entropy": ("forward", "forward+backward", "loss+accuracy"),
    "test_accuracy": ("accuracy",),
    "test_linear": ("linear",),
    "test_sgd": ("sgd",),
    "test_host": ("host",),
}
_COPIES = 5  # that the bandwidth is the median of
# A workload that is ready for all of its contenders, a copy's GB/s at that time, and the clock.
Contest = tuple[Prepared, float, Clock]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shapes", choices=SIZES, default="quick", help="how much of the contest (default: quick)")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Time in this process alone: pytest-benchmark times nothing where others work at the same time."""
    return 0


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"contest: shapes {config.getoption('--shapes')}, on {DEVICE.type}"]
    return lines + [f"contender {contender.name}: {contender.presence()}" for contender in CONTENDERS.values()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contest" not in metafunc.fixturenames:
        return
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
