"""The loss alone, forward and backward, at the size of a language model's vocabulary."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measuring.clock import Step, in_turns
from ..measuring.clock import seconds as seconds_of
from ..measuring.machine import OtherPrograms, free_bytes, peak_bytes
from ..measuring.tables import TIMES
from .contenders import FASTLOSS, PYTORCH, Contender

__all__ = ["TIMES", "Case", "Errors", "LossAtScale", "Measured", "Timed", "cases_for", "compare", "random_logits"]

# The vocabularies of Llama 2 (arXiv:2307.09288, §2.2) and of Llama 3 (128000 tokens, arXiv:2407.21783, §3.2,
# and the 256 special ones that its published configuration adds).
VOCABULARIES = (32000, 128256)
DTYPES = (torch.float32, torch.bfloat16)
TOKENS_ON_CPU = 512
TOKENS_ON_GPU = 8192
FEWEST_TOKENS = 16
COPIES = 6  # of the logits' size, that a case takes at its highest: plain PyTorch's backward, and some room

# Random logits as a half-trained model might give them: normal, and the label's raised by a uniform share of
# LABEL_LIFT, which makes it the highest in about four rows of ten.
SPREAD = 2.0
LABEL_LIFT = 15.0

ROWS_AT_ONCE = 16  # of the float64 reference


@dataclass(frozen=True)
class Case:
    """Logits of one size, ``(tokens, classes)``."""

    tokens: int
    classes: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.size} {self.dtype_name}"

    @property
    def size(self) -> str:
        """``512 × 32000``."""
        return f"{self.tokens} {TIMES} {self.classes}"

    @property
    def dtype_name(self) -> str:
        """``float32``, ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")


class Timed(NamedTuple):
    """One contender's forward and backward."""

    seconds: list[float]  # one a round
    peak_bytes: int  # beyond the logits and the labels

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


class Errors(NamedTuple):
    """How far one contender is from the same in float64."""

    loss: float  # |loss − reference| / reference
    gradient: float  # ‖gradient − reference‖ / ‖reference‖, Euclidean norms over all entries


@dataclass(frozen=True)
class Measured:
    """One contender in one case."""

    loss: Timed
    loss_and_accuracy: Timed
    errors: Errors
    accuracy: float  # in [0, 1]


@dataclass(frozen=True)
class LossAtScale:
    """Both contenders in one case."""

    case: Case
    pytorch: Measured
    fastloss: Measured
    accuracy: float  # in [0, 1], from the float64 reference
    neighbours: float  # the share of the CPUs that other programs took meanwhile

    @property
    def rounds(self) -> int:
        """How often each step was timed."""
        return len(self.pytorch.loss.seconds)


def cases_for(device: torch.device) -> tuple[Case, ...]:
    """Every vocabulary in every dtype, with as many tokens as there is memory for."""
    free = free_bytes(device)
    wanted = TOKENS_ON_GPU if device.type == "cuda" else TOKENS_ON_CPU
    return tuple(
        Case(_tokens_that_fit(wanted, classes * dtype.itemsize, free), classes, dtype)
        for classes in VOCABULARIES
        for dtype in DTYPES
    )


def compare(
    case: Case,
    device: torch.device,
    *,
    seed: int,
    budget: float,
    tell: Callable[[float], None] = lambda share: None,
) -> LossAtScale:
    """Check both contenders, then measure them; ``tell`` hears the share of the case that is done."""
    logits, target = random_logits(case, device, seed)
    results = [_Result.of(contender, logits, target) for contender in (PYTORCH, FASTLOSS)]
    accuracy, errors = _against_float64(results, logits, target)
    accuracies = [result.accuracy for result in results]
    del results  # their gradients would stand in the way of the measuring

    others = OtherPrograms()
    losses, losses_and_accuracies = _timed(logits, target, budget=budget, tell=tell)
    pytorch, fastloss = map(Measured, losses, losses_and_accuracies, errors, accuracies)
    return LossAtScale(case, pytorch, fastloss, accuracy, others.share())


def _tokens_that_fit(wanted: int, bytes_a_token: int, free: int) -> int:
    """``wanted``, halved until the case takes no more than half of what is free."""
    tokens = wanted
    while tokens > FEWEST_TOKENS and COPIES * tokens * bytes_a_token > free / 2:
        tokens //= 2
    return tokens


def random_logits(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """``(N, V)`` logits that require a gradient, and ``(N,)`` labels."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.tokens, case.classes)
    logits = torch.randn(shape, generator=generator, dtype=case.dtype, device=device).mul_(SPREAD)
    target = torch.randint(case.classes, (case.tokens,), generator=generator, device=device)
    lift = torch.rand((case.tokens, 1), generator=generator, device=device) * LABEL_LIFT
    logits.scatter_add_(1, target[:, None], lift.to(case.dtype))
    return logits.requires_grad_(), target


class _Result(NamedTuple):
    loss: float
    accuracy: float
    gradient: Tensor  # (N, V)

    @classmethod
    def of(cls, contender: Contender, logits: Tensor, target: Tensor) -> _Result:
        loss, accuracy = contender.loss_and_accuracy(logits, target)
        (gradient,) = torch.autograd.grad(loss, logits)
        return cls(float(loss.detach()), float(accuracy), gradient)


@torch.no_grad()
def _against_float64(results: list[_Result], logits: Tensor, target: Tensor) -> tuple[float, list[Errors]]:
    """The accuracy and each result's errors; the reference is made of a few rows at a time."""
    tokens = len(target)
    loss, right, squares = 0.0, 0, 0.0
    differences = [0.0] * len(results)  # squared
    for start in range(0, tokens, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        label = target[rows, None]
        log_p = F.log_softmax(logits[rows].double(), 1)
        loss -= float(log_p.gather(1, label).sum()) / tokens
        right += int((log_p.argmax(1, keepdim=True) == label).sum())
        one = torch.ones_like(label, dtype=torch.float64)
        gradient = log_p.exp_().scatter_add_(1, label, -one).div_(tokens)  # (softmax − one-hot) / N
        squares += float(gradient.square().sum())
        for i, result in enumerate(results):
            differences[i] += float((result.gradient[rows] - gradient).square_().sum())
    errors = [
        Errors(abs(result.loss - loss) / loss, (difference / squares) ** 0.5)
        for result, difference in zip(results, differences, strict=True)
    ]
    return right / tokens, errors


def _timed(
    logits: Tensor, target: Tensor, *, budget: float, tell: Callable[[float], None]
) -> tuple[list[Timed], list[Timed]]:
    """PyTorch's and fastloss's loss, and the two with the accuracy, all timed in the same rounds."""
    device = logits.device
    steps = [step for contender in (PYTORCH, FASTLOSS) for step in _steps(contender, logits, target)]
    peaks = [peak_bytes(step, device) for step in steps]  # and a first, untimed, run of each
    seconds = in_turns(steps, partial(seconds_of, device=device), budget=budget, progress=tell)
    timed = list(map(Timed, seconds, peaks))
    return timed[0::2], timed[1::2]


def _steps(contender: Contender, logits: Tensor, target: Tensor) -> tuple[Step, Step]:
    """Forward and backward of the loss, and of the loss with the accuracy.

    The gradient is dropped at the end, as it is in training: each step takes its memory anew.
    """

    def loss() -> None:
        torch.autograd.grad(contender.loss(logits, target), logits)

    def loss_and_accuracy() -> None:
        value, _ = contender.loss_and_accuracy(logits, target)
        torch.autograd.grad(value, logits)

    return loss, loss_and_accuracy
