"""One network trained twice from the same seed: once with each side, epoch by epoch in turn."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..measuring.clock import Progress
from ..measuring.contenders import Functions
from .data import Split
from .runs import FASTLOSS, PYTORCH, Run

HIDDEN = 128
BATCH = 64
LEARNING_RATE = 0.05
MOMENTUM = 0.9


@dataclass
class TrainingRun(Run):
    """A run with its accuracies."""

    epoch_losses: list[float] = field(default_factory=list)  # the mean of an epoch's steps
    held_out: list[float] = field(default_factory=list)  # accuracy after each epoch, in [0, 1]
    predictions: Tensor = field(default_factory=lambda: torch.empty(0))  # of the held-out scans, at the end


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
    runs = [(_new_run(side, split, seed), side) for side in (PYTORCH, FASTLOSS)]
    with _one_thread():
        for run, _ in runs:
            run.measure_peak(*next(_batches(split, seed=0)))
        for epoch in range(epochs):
            # The first of the two alternates, so that neither always finds the other's data in the cache.
            for run, side in runs if epoch % 2 == 0 else reversed(runs):
                steps = len(run.losses)
                for batch in _batches(split, seed + epoch):
                    run.step(*batch)
                run.epoch_losses.append(statistics.fmean(run.losses[steps:]))
                _evaluate(run, side, split)
            progress((epoch + 1) / epochs)
    return Training(runs[0][0], runs[1][0], len(split.train), len(split.held_out))


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
    assert side.sgd is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(split.train.shape[1], HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, int(split.train_digit.max()) + 1),
        ).to(split.train.device)
    optimizer = side.sgd(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    return TrainingRun(model, lambda model, scans, digit: _loss(side, model(scans), digit)[0], optimizer)


def _loss(side: Functions, logits: Tensor, digit: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss and accuracy, together as in any training loop."""
    assert side.loss_and_accuracies is not None
    loss, (accuracy,) = side.loss_and_accuracies(logits, digit)
    return loss, accuracy


def _batches(split: Split, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the training scans in an order that ``seed`` decides; the last few, less than a batch, are left out."""
    order = torch.randperm(len(split.train), generator=torch.Generator().manual_seed(seed))
    for rows in order.to(split.train.device).split(BATCH):
        if len(rows) == BATCH or len(order) < BATCH:  # a few scans left over would make a wild step
            yield split.train[rows], split.train_digit[rows]


@torch.no_grad()
def _evaluate(run: TrainingRun, side: Functions, split: Split) -> None:
    logits = run.model(split.held_out)
    run.predictions = logits.argmax(1)
    run.held_out.append(float(_loss(side, logits, split.held_out_digit)[1]))
