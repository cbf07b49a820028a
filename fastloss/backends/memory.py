"""Permission to keep device memory between calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["forgetful", "may_keep_memory"]

# May a backend keep small device tensors from one call to the next?
may_keep_memory: ContextVar[bool] = ContextVar("fastloss_may_keep_memory", default=True)


@contextmanager
def forgetful() -> Iterator[None]:
    """Let no backend keep memory from a call in the ``with`` block."""
    token = may_keep_memory.set(False)
    try:
        yield
    finally:
        may_keep_memory.reset(token)
