"""Chunks on several threads: errors, transforms of the caller's state, forks, callers at the same time."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import LIMIT

from fastloss import accuracy, cross_entropy
from fastloss.backends.eager import workers
from fastloss.backends.eager.workers import for_each

CPU = torch.device("cpu")
LARGE = (700, 16000)  # more pieces than are worked on by the caller itself


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Several workers, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_piece_once_and_on_threads_of_its_own() -> None:
    seen, threads = [], set()

    def work(piece: int) -> None:
        seen.append(piece)
        threads.add((threading.current_thread().name, torch.get_num_threads()))
        assert not torch.is_grad_enabled()

    for_each(range(200), work, CPU)
    assert sorted(seen) == list(range(200))
    assert all(name.startswith("fastloss") and count == 1 for name, count in threads)
    assert torch.get_num_threads() == 2


def test_an_error_reaches_the_caller_and_ends_the_work() -> None:
    done = []

    def work(piece: int) -> None:
        if piece == 3:
            raise IndexError("piece 3")
        time.sleep(0.001)  # all pieces take 5 s, in which the error has long reached the other worker
        done.append(piece)

    with pytest.raises(IndexError, match="piece 3"):
        for_each(range(10_000), work, CPU)
    assert len(done) < 5_000


def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LARGE, generator=generator).requires_grad_()
    loss = cross_entropy(logits, torch.randint(LARGE[1], LARGE[:1], generator=generator))
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def test_callers_at_the_same_time() -> None:
    expected = loss_and_gradient()
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    callers = [threading.Thread(target=lambda: results.append(loss_and_gradient())) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))


def in_a_child(queue: multiprocessing.Queue[float]) -> None:
    torch.set_num_threads(2)
    queue.put(float(loss_and_gradient()[0]))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_workers_of_its_own() -> None:
    expected = float(loss_and_gradient()[0])
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[float] = context.Queue()
    child = context.Process(target=in_a_child, args=(queue,), daemon=True)
    child.start()
    try:
        assert queue.get(timeout=LIMIT) == expected
    finally:
        child.kill()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference(mode: type[torch.inference_mode] | type[torch.no_grad]) -> None:
    with mode():
        logits, target = torch.randn(LARGE), torch.randint(LARGE[1], LARGE[:1])
        torch.testing.assert_close(cross_entropy(logits, target), F.cross_entropy(logits, target))
        expected = (logits.argmax(1) == target).float().mean()
        assert accuracy(logits, target) == expected
        assert accuracy(logits, target, (1, 5))[0] == expected


def test_one_thread_gives_the_same_bits() -> None:
    several = loss_and_gradient()
    torch.set_num_threads(1)
    one = loss_and_gradient()
    assert all(torch.equal(a, b) for a, b in zip(several, one, strict=True))


def test_a_pool_that_is_taken_away_while_work_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread with another number of threads ends this pool: what was begun is waited for all the same."""
    torch.set_num_threads(2)
    pool = workers._pool(2)
    done: list[int] = []
    submitted, real = 0, pool.submit

    def submit(work: Callable[[], None]) -> Any:
        nonlocal submitted
        submitted += 1
        if submitted == 2:
            time.sleep(0.05)
            workers._pool(3)
        return real(work)

    monkeypatch.setattr(pool, "submit", submit)

    def work(piece: int) -> None:
        time.sleep(0.3 if piece == 1 else 0.02)
        done.append(piece)

    try:
        for_each(range(8), work, CPU)
        assert sorted(done) == list(range(8))
    finally:
        torch.set_num_threads(2)
