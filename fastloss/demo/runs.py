"""The two sides of every comparison, and a training run."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..measuring.clock import Progress, seconds
from ..measuring.contenders import eager, ours
from ..measuring.machine import peak_bytes

PYTORCH, FASTLOSS = eager(topk=(1,)), ours(topk=(1,))


@dataclass
class Run:
    """A network in training, and the losses and times of its steps."""

    model: nn.Module
    loss: Callable[..., Tensor]  # takes the model and a batch
    optimizer: Optimizer
    losses: list[float] = field(default_factory=list)  # one a step
    seconds: list[float] = field(default_factory=list)  # one a step
    peak_bytes: int = 0  # of one step, beyond the model and its momentum

    @property
    def median_step(self) -> float:
        """The median seconds of a step."""
        return statistics.median(self.seconds)

    def step(self, *batch: Tensor) -> None:
        """Train one step."""
        losses: list[Tensor] = []
        self.seconds.append(seconds(lambda: losses.append(self._step(*batch)), batch[0].device))
        self.losses.append(float(losses[0]))

    def measure_peak(self, *batch: Tensor) -> None:
        """Measure the second step of a copy of the network: the first one makes the momentum."""
        trial = copy.deepcopy(self)
        trial._step(*batch)
        trial.optimizer.zero_grad()
        self.peak_bytes = peak_bytes(lambda: trial._step(*batch), batch[0].device)

    def _step(self, *batch: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(self.model, *batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def in_turn(runs: Sequence[Run], rounds: int, advance: Callable[[Any, int], object], progress: Progress) -> None:
    """Advance the runs round by round. The first alternates: else one would always find the other's data cached."""
    for number in range(rounds):
        for run in runs if number % 2 == 0 else reversed(runs):
            advance(run, number)
        progress((number + 1) / rounds)


def largest_difference(first: Run, second: Run) -> float:
    """Return the largest difference between two runs' losses, over all steps."""
    return max(abs(a - b) for a, b in zip(first.losses, second.losses, strict=True))
