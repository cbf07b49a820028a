"""Chunks of rows on several cores: each worker takes one chunk at a time through all of its passes.

torch would split every single operation over its threads, and join them after it. A chunk's operations are
short, so that much of the time would go to joining; and where another program holds one of the cores, each join would
wait until the scheduler lets that thread run: measured beside one busy process on two cores, 5 to 50 × the time.
Workers that share nothing but a list of chunks meet once, at the end.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from .chunks import FEW

__all__ = ["for_each"]

# Between operations a worker needs Python's lock; more of them would mostly wait for it.
MOST_WORKERS = 16

T = TypeVar("T")


def for_each(pieces: Iterable[T], work: Callable[[T], object], device: torch.device, few: int = FEW) -> None:
    """Call ``work(piece)`` for every piece, in no fixed order, on as many cores as ``torch.get_num_threads`` allows.

    ``work`` runs without autograd. It runs in the calling thread on devices other than the CPU, with one thread, and
    for fewer than ``few`` pieces, where waking the workers would cost more than the joins of torch's own threads.
    """
    waiting = deque(pieces)
    workers = min(torch.get_num_threads(), MOST_WORKERS, len(waiting))
    if workers < 2 or len(waiting) < few or device.type != "cpu":
        with torch.no_grad():
            for piece in waiting:
                work(piece)
        return
    inference = torch.is_inference_mode_enabled()

    def run() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                try:
                    piece = waiting.popleft()
                except IndexError:
                    return
                try:
                    work(piece)
                except BaseException:
                    waiting.clear()
                    raise

    running = []
    try:
        pool = _pool(torch.get_num_threads())
        for _ in range(workers):
            running.append(pool.submit(run))
    except RuntimeError:  # no threads: the interpreter is ending, the system refuses, or another thread changed pools
        run()
    try:
        wait(running)
    except BaseException:  # Ctrl-C: no worker may go on writing to the caller's memory
        waiting.clear()
        wait(running)
        raise
    for future in running:
        future.result()


_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}  # at most one, for the present number of threads


def _pool(threads: int) -> ThreadPoolExecutor:
    """Return a pool of threads, none of which splits its torch operations."""
    with _lock:
        if threads not in _pools:
            for old in _pools.values():
                old.shutdown(wait=False)
            _pools.clear()
            _pools[threads] = _new_pool(threads)
        return _pools[threads]


def _new_pool(threads: int) -> ThreadPoolExecutor:
    size = min(threads, MOST_WORKERS)
    pool = ThreadPoolExecutor(size, thread_name_prefix="fastloss", initializer=_work_alone)
    all_started = threading.Barrier(size)
    try:
        for future in [pool.submit(all_started.wait) for _ in range(size)]:
            future.result()
    except BaseException:
        all_started.abort()
        raise
    finally:
        # Each thread has its own number of threads; but the number that new ones start with, and MKL's, is global.
        torch.set_num_threads(threads)
    return pool


def _work_alone() -> None:
    """Let this thread's torch operations use no other thread."""
    torch.get_num_threads()  # the first call takes over the process's number; it must not come later
    torch.set_num_threads(1)


def _forget() -> None:
    """Drop the pools in a forked child, which has none of its parent's threads."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
