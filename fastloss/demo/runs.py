"""The two sides of every comparison, and what is kept of a training run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from ..measuring.contenders import eager, ours

__all__ = ["FASTLOSS", "PYTORCH", "Run", "largest_difference"]

PYTORCH, FASTLOSS = eager(topk=(1,)), ours(topk=(1,))


@dataclass
class Run:
    """The losses and times of one run's steps."""

    losses: list[float] = field(default_factory=list)  # one a step
    seconds: list[float] = field(default_factory=list)  # one a step
    peak_bytes: int = 0  # of one step

    @property
    def median_step(self) -> float:
        """The median seconds of a step."""
        return statistics.median(self.seconds)


def largest_difference(first: Run, second: Run) -> float:
    """Return the largest difference between two runs' losses, over all steps."""
    return max(abs(a - b) for a, b in zip(first.losses, second.losses, strict=True))
