"""One network trained twice from the same seed: once with each contender, epoch by epoch in turn."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..measuring.clock import seconds
from ..measuring.machine import peak_bytes
from .contenders import FASTLOSS, PYTORCH, Contender
from .data import Split

__all__ = ["Run", "Training", "train_side_by_side"]

HIDDEN = 128
BATCH = 64
LEARNING_RATE = 0.05
MOMENTUM = 0.9


@dataclass
class Run:
    """One contender's network, and what became of it."""

    contender: Contender
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # one a step
    epoch_losses: list[float] = field(default_factory=list)  # the mean of an epoch's steps
    held_out: list[float] = field(default_factory=list)  # accuracy after each epoch, in [0, 1]
    seconds: list[float] = field(default_factory=list)  # one a step
    predictions: Tensor = field(default_factory=lambda: torch.empty(0))  # of the held-out scans, at the end
    peak_bytes: int = 0  # of one step

    @property
    def median_step(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Training:
    """The two runs, and how far they agree."""

    pytorch: Run
    fastloss: Run
    trained_on: int  # scans
    held_out: int  # scans

    @property
    def largest_difference(self) -> float:
        """Between the two loss curves, over all steps."""
        pairs = zip(self.pytorch.losses, self.fastloss.losses, strict=True)
        return max(abs(a - b) for a, b in pairs)

    @property
    def equal_predictions(self) -> int:
        """Of the held-out scans, how many both networks read as the same digit."""
        return int((self.pytorch.predictions == self.fastloss.predictions).sum())


def train_side_by_side(split: Split, *, epochs: int, seed: int, tell: Callable[[], None] = lambda: None) -> Training:
    """Train both; ``tell`` hears of the end of each run's epoch."""
    runs = [_new_run(contender, split, seed) for contender in (PYTORCH, FASTLOSS)]
    with _one_thread():
        for run in runs:
            run.peak_bytes = _peak_of_a_step(run, split)
        for epoch in range(epochs):
            # Who goes first alternates, so that neither always finds the other's data in the cache.
            for run in runs if epoch % 2 == 0 else reversed(runs):
                _train_epoch(run, split, seed=seed + epoch)
                _evaluate(run, split)
                tell()
    pytorch, fastloss = runs
    return Training(pytorch, fastloss, len(split.train), len(split.held_out))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """On a CPU the network is too small to gain from more, and on a busy one they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _new_run(contender: Contender, split: Split, seed: int) -> Run:
    """The same weights for every contender; the caller's random state stays as it is.

    GELU is smooth: a unit that switches on in one run and not in the other, for a difference in the last bit,
    would pull the two apart.
    """
    device = split.train.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(split.train.shape[1], HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, int(split.train_digit.max()) + 1),
        ).to(device)
    optimizer = contender.sgd(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    return Run(contender, model, optimizer)


def _train_epoch(run: Run, split: Split, *, seed: int) -> None:
    losses = []
    for scans, digit in _batches(split, seed):

        def step(scans: Tensor = scans, digit: Tensor = digit) -> None:
            losses.append(_step(run, scans, digit))

        run.seconds.append(seconds(step, split.train.device))
    values = torch.stack(losses).tolist()
    run.losses += values
    run.epoch_losses.append(statistics.fmean(values))


def _step(run: Run, scans: Tensor, digit: Tensor) -> Tensor:
    """One step of training; gives the loss."""
    run.optimizer.zero_grad()
    loss, _ = run.contender.loss_and_accuracy(run.model(scans), digit)
    loss.backward()
    run.optimizer.step()
    return loss.detach()


def _batches(split: Split, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training scans, in an order that ``seed`` decides; what fills no batch waits for another epoch."""
    order = torch.randperm(len(split.train), generator=torch.Generator().manual_seed(seed))
    for rows in order.to(split.train.device).split(BATCH):
        if len(rows) == BATCH or len(order) < BATCH:  # a few scans left over would make a wild step
            yield split.train[rows], split.train_digit[rows]


@torch.no_grad()
def _evaluate(run: Run, split: Split) -> None:
    logits = run.model(split.held_out)
    run.predictions = logits.argmax(1)
    run.held_out.append(float(run.contender.loss_and_accuracy(logits, split.held_out_digit)[1]))


def _peak_of_a_step(run: Run, split: Split) -> int:
    """Measured on a copy of the network, in its second step: the first one makes the momentum."""
    trial = copy.deepcopy(Run(run.contender, run.model, run.optimizer))
    scans, digit = next(_batches(split, seed=0))
    _step(trial, scans, digit)
    trial.optimizer.zero_grad()
    return peak_bytes(lambda: _step(trial, scans, digit), split.train.device)
