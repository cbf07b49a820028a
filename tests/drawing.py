"""Cases that hypothesis draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy


def drawn(*strategies: SearchStrategy[Any], examples: int) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Return a decorator that checks so many examples of the strategies, the same ones in every run."""
    chosen = settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    return lambda check: chosen(given(*strategies)(check))
