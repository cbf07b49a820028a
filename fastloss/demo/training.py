"""One network trained twice from the same seed: once with each side, epoch by epoch in turn."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..measuring.clock import Progress, seconds
from ..measuring.contenders import Functions
from ..measuring.machine import peak_bytes
from .data import Split
from .runs import FASTLOSS, PYTORCH, Run

__all__ = ["Training", "TrainingRun", "train_side_by_side"]

HIDDEN = 128
BATCH = 64
LEARNING_RATE = 0.05
MOMENTUM = 0.9


@dataclass(kw_only=True)
class TrainingRun(Run):
    """A run with its network and its accuracies."""

    side: Functions
    model: nn.Module
    optimizer: torch.optim.Optimizer
    epoch_losses: list[float] = field(default_factory=list)  # the mean of an epoch's steps
    held_out: list[float] = field(default_factory=list)  # accuracy after each epoch, in [0, 1]
    predictions: Tensor = field(default_factory=lambda: torch.empty(0))  # of the held-out scans, at the end

    def loss_and_accuracy(self, logits: Tensor, digit: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, by the functions of this side."""
        assert self.side.loss_and_accuracies is not None
        loss, (accuracy,) = self.side.loss_and_accuracies(logits, digit)
        return loss, accuracy

    def step(self, scans: Tensor, digit: Tensor) -> Tensor:
        """Train one step; return the loss."""
        self.optimizer.zero_grad()
        loss, _ = self.loss_and_accuracy(self.model(scans), digit)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def epoch(self, split: Split, seed: int) -> None:
        """Train one epoch."""
        losses: list[Tensor] = []
        for batch in _batches(split, seed):
            step = lambda: losses.append(self.step(*batch))  # noqa: B023, E731
            self.seconds.append(seconds(step, split.train.device))
        values = torch.stack(losses).tolist()
        self.losses += values
        self.epoch_losses.append(statistics.fmean(values))

    @torch.no_grad()
    def evaluate(self, split: Split) -> None:
        """Predict the held-out scans."""
        logits = self.model(split.held_out)
        self.predictions = logits.argmax(1)
        self.held_out.append(float(self.loss_and_accuracy(logits, split.held_out_digit)[1]))

    def measure_peak(self, split: Split) -> None:
        """Measure the second step of a copy of the network: the first one makes the momentum."""
        trial = copy.deepcopy(self)
        batch = next(_batches(split, seed=0))
        trial.step(*batch)
        trial.optimizer.zero_grad()
        self.peak_bytes = peak_bytes(lambda: trial.step(*batch), split.train.device)


@dataclass(frozen=True)
class Training:
    """The two runs."""

    pytorch: TrainingRun
    fastloss: TrainingRun
    trained_on: int  # scans
    held_out: int  # scans

    @property
    def equal_predictions(self) -> int:
        """The number of held-out scans that both networks read as the same digit."""
        return int((self.pytorch.predictions == self.fastloss.predictions).sum())


def train_side_by_side(split: Split, *, epochs: int, seed: int, progress: Progress = lambda share: None) -> Training:
    """Train both."""
    pytorch, fastloss = (_new_run(side, split, seed) for side in (PYTORCH, FASTLOSS))
    with _one_thread():
        for run in (pytorch, fastloss):
            run.measure_peak(split)
        for epoch in range(epochs):
            # The first of the two alternates, so that neither always finds the other's data in the cache.
            for run in (pytorch, fastloss) if epoch % 2 == 0 else (fastloss, pytorch):
                run.epoch(split, seed + epoch)
                run.evaluate(split)
            progress((epoch + 1) / epochs)
    return Training(pytorch, fastloss, len(split.train), len(split.held_out))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: the network is too small to gain from more, and on a busy CPU they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _new_run(side: Functions, split: Split, seed: int) -> TrainingRun:
    """Return a run with the same weights for both sides; the caller's random state stays as it is.

    GELU is smooth: a unit that switches on in one run and not in the other, for a difference in the last bit,
    would pull the two apart.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(split.train.shape[1], HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, int(split.train_digit.max()) + 1),
        ).to(split.train.device)
    assert side.sgd is not None
    optimizer = side.sgd(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    return TrainingRun(side=side, model=model, optimizer=optimizer)


def _batches(split: Split, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the training scans in an order that ``seed`` decides; the last few, less than a batch, are left out."""
    order = torch.randperm(len(split.train), generator=torch.Generator().manual_seed(seed))
    for rows in order.to(split.train.device).split(BATCH):
        if len(rows) == BATCH or len(order) < BATCH:  # a few scans left over would make a wild step
            yield split.train[rows], split.train_digit[rows]
