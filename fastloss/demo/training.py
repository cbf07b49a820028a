"""One network trained twice from the same seed: once with each side, epoch by epoch in turn.

It reads scikit-learn's digits: 1797 scans of handwritten digits, 8 × 8 pixels, shipped inside that package. (The test
part of Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
doi:10.24432/C50P49.)
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..measuring.clock import Progress, seconds
from ..measuring.contenders import Functions, eager, ours
from ..measuring.machine import peak_bytes

Model = TypeVar("Model", bound=nn.Module)
PYTORCH, FASTLOSS = eager(topk=(1,)), ours(topk=(1,))

HELD_OUT = 0.25  # the share of the scans that no run is trained on
BRIGHTEST = 16  # pixels are whole numbers from 0 to this
HIDDEN = 128
BATCH = 64
LEARNING_RATE = 0.05
MOMENTUM = 0.9


class Split(NamedTuple):
    """Scans, ``(N, 64)`` float32 in [0, 1], and their digits, ``(N,)`` int64."""

    train: Tensor
    train_digit: Tensor
    held_out: Tensor
    held_out_digit: Tensor


def digits(seed: int, device: torch.device) -> Split:
    """Return the scans, split so that both parts hold each digit in the same proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, digit = map(torch.as_tensor, load_digits(return_X_y=True))
    rows = train_test_split(range(len(digit)), test_size=HELD_OUT, stratify=digit, random_state=seed)
    scans = (pixels / BRIGHTEST).to(device, torch.float32)
    parts = [(scans[part], digit.to(device, torch.int64)[part]) for part in rows]
    return Split(*parts[0], *parts[1])


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


@dataclass
class TrainingRun(Run):
    """A run with its accuracies."""

    side: Functions = PYTORCH
    epoch_losses: list[float] = field(default_factory=list)  # the mean of an epoch's steps
    held_out: list[float] = field(default_factory=list)  # accuracy after each epoch, in [0, 1]
    predictions: Tensor = field(default_factory=lambda: torch.empty(0))  # of the held-out scans, at the end


class Training(NamedTuple):
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
    pytorch, ours = runs = [_new_run(side, split, seed) for side in (PYTORCH, FASTLOSS)]

    def advance(run: TrainingRun, epoch: int) -> None:
        steps = len(run.losses)
        for batch in _batches(split, seed + epoch):
            run.step(*batch)
        run.epoch_losses.append(statistics.fmean(run.losses[steps:]))
        _evaluate(run, split)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is too small to gain from more, and on a busy CPU they wait for each other
    try:
        for run in runs:
            run.measure_peak(*next(_batches(split, seed=0)))
        in_turn(runs, epochs, advance, progress)
    finally:
        torch.set_num_threads(threads)
    return Training(pytorch, ours, len(split.train), len(split.held_out))


def new_model(make: Callable[[], Model], seed: int, device: torch.device) -> Model:
    """Return a model whose weights ``seed`` decides; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(device)


def _new_run(side: Functions, split: Split, seed: int) -> TrainingRun:
    """Return a run with the same weights for both sides.

    GELU is smooth: a unit that switches on in one run and not in the other, for a difference in the last bit,
    would pull the two apart.
    """
    assert side.sgd is not None
    pixels, digits = split.train.shape[1], int(split.train_digit.max()) + 1

    def network() -> nn.Module:
        hidden = nn.Linear(pixels, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU()
        return nn.Sequential(*hidden, nn.Linear(HIDDEN, digits))

    model = new_model(network, seed, split.train.device)
    optimizer = side.sgd(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    return TrainingRun(model, lambda model, scans, digit: _loss(side, model(scans), digit)[0], optimizer, side=side)


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
def _evaluate(run: TrainingRun, split: Split) -> None:
    logits = run.model(split.held_out)
    run.predictions = logits.argmax(1)
    run.held_out.append(float(_loss(run.side, logits, split.held_out_digit)[1]))
