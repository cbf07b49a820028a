"""How the benchmarks tell a GPU's time from the host's, on a GPU that is a model of one."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fastloss.bench import measure
from fastloss.bench.workloads import Shape, Workload
from fastloss.measuring.clock import Copy, EventClock, FullStream, by_the_clock, repeated
from fastloss.measuring.contenders import CONTENDERS

GPU = torch.device("cuda")
COPY = 7e-4  # seconds that a copy takes


class Model:
    """A host, and a GPU with a stream: work begins when it has been queued and what is before it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.done = 0.0
        self.copies = 0
        model = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = model.done = max(model.done, model.host)

            def synchronize(self) -> None:
                model.host = max(model.host, self.at)

            def elapsed_time(self, other: Event) -> float:
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.wait())
        monkeypatch.setattr(time, "perf_counter", lambda: self.host)

    def wait(self) -> None:
        self.host = max(self.host, self.done)

    def queue(self, host: float, gpu: float) -> None:
        """A call: so long the host needs to queue it, and the GPU to do it."""
        self.host += host
        self.done = max(self.done, self.host) + gpu

    def copy(self) -> None:
        self.copies += 1
        self.queue(5e-6, COPY)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(monkeypatch)


@pytest.mark.parametrize("calls", [1, 20])
@pytest.mark.parametrize(("host", "gpu"), [(9e-4, 4e-4), (4e-4, 9e-4), (3e-4, 1e-5)])
def test_each_has_its_own_time(model: Model, host: float, gpu: float, calls: int) -> None:
    """Whichever is slower."""
    step = partial(repeated, partial(model.queue, host, gpu), calls)
    times = FullStream(model.copy, GPU)(step)
    assert times.host == pytest.approx(calls * host)
    assert times.device == pytest.approx(calls * gpu)


def test_a_call_that_waits_for_the_gpu_is_timed_with_the_wait(model: Model) -> None:
    def step() -> None:
        model.queue(1e-4, 2e-4)
        model.wait()
        model.queue(3e-4, 2e-4)

    assert FullStream(model.copy, GPU)(step).device == pytest.approx(2e-4 + 3e-4 + 2e-4)


def test_the_copies_last_longer_than_the_host_and_are_not_too_many(model: Model) -> None:
    stream = FullStream(model.copy, GPU)
    for host in (1e-6, 1e-3, 1e-1):
        assert stream.copies(host) * COPY > 1.2 * host
        before = model.copies
        stream.fill(host)
        assert model.copies - before == stream.copies(host)
    assert 0.2 < stream.copies(1e9) * COPY <= 0.25


@pytest.mark.parametrize(("seconds", "most"), [(1e-6, 400), (7e-3, 35), (1.0, 1)])
def test_copies_of_any_length_leave_room_and_do_not_keep_a_turn_waiting(
    model: Model, seconds: float, most: int
) -> None:
    """Of a small device the copies are short, of a slow one long."""
    assert FullStream(partial(model.queue, 5e-7, seconds), GPU).copies(1e9) == most


def test_a_clock_that_is_read_twice_a_turn(model: Model) -> None:
    timer, stream = EventClock(), FullStream(model.copy, GPU)
    timer.before = partial(stream.fill, 9e-4)
    for _ in range(3):
        start = timer()
        model.queue(9e-4, 4e-4)
        assert timer() - start == pytest.approx(4e-4)


def test_blocks_fit_a_queue(model: Model) -> None:
    """Of calls that are short for the GPU, whatever the host takes; a long one is a turn by itself."""
    stream = FullStream(model.copy, GPU)
    for gpu, block in ((1e-6, 20), (1e-3, 5), (1.0, 1)):
        assert measure.block_of(partial(model.queue, 9e-4, gpu), stream, GPU) == block
    assert measure.block_of(partial(model.queue, 9e-4, 1e-6), by_the_clock, GPU, "host") == 20


@pytest.mark.parametrize("op", ["forward", "linear", "host"])
def test_rows_have_both(model: Model, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """The host's op has one time, the host's; of linear the limit is three products, timed alike, and no copy is."""

    class ModelCopy(Copy):
        step = staticmethod(model.copy)
        _source = torch.empty(1)

        def __init__(self, device: torch.device) -> None:
            assert device == GPU

    monkeypatch.setattr(measure, "Copy", ModelCopy)
    steps: dict[str, Callable[[], object]] = {
        "fastloss": partial(model.queue, 5e-4, 4e-4),
        "torch": partial(model.queue, 2e-4, 8e-4),
    }
    workload = Workload(op, Shape(64, 1000, 8 if op == "linear" else 0), torch.float32)
    of_contenders = {name: measure.Row.of(workload, CONTENDERS[name]) for name in steps}
    prepared = measure.Prepared(workload, GPU, of_contenders, steps)
    if op == "linear":
        prepared.products = lambda: SimpleNamespace(step=partial(model.queue, 9e-4, 3e-4))
    rows = measure._timed(prepared, 1e-9, lambda share: None)
    ours, other = rows["fastloss"], rows["torch"]
    if op == "host":
        assert (ours.milliseconds, other.milliseconds) == (pytest.approx(0.5), pytest.approx(0.2))
        assert ours.host_milliseconds is other.host_milliseconds is None
        return
    assert (ours.milliseconds, other.milliseconds) == (pytest.approx(0.4), pytest.approx(0.8))
    assert (ours.host_milliseconds, other.host_milliseconds) == (pytest.approx(0.5), pytest.approx(0.2))
    assert ours.ratios["torch"] == pytest.approx(0.5)
    if op == "linear":
        assert ours.products_milliseconds == pytest.approx(0.3)
        assert ours.copy_gigabytes_per_second is None
    else:
        assert ours.copy_gigabytes_per_second == pytest.approx(2 * ModelCopy._source.nbytes / COPY / 1e9)
