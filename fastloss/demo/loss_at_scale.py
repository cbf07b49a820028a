"""The loss alone, forward and backward, at the size of a language model's vocabulary."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from ..measuring.clock import Progress, in_turns, seconds
from ..measuring.inputs import loss_inputs
from ..measuring.machine import OtherPrograms, halved_to_fit, peak_bytes
from ..measuring.reference import Errors, LossReference, operation
from .training import FASTLOSS, PYTORCH

# The vocabularies of Llama 2 (arXiv:2307.09288, §2.2) and of Llama 3 (128000 tokens, arXiv:2407.21783, §3.2,
# and the 256 special ones that its published configuration adds).
VOCABULARIES = (32000, 128256)
DTYPES = (torch.float32, torch.bfloat16)
TOKENS = {"cpu": 512, "cuda": 8192}
FEWEST_TOKENS = 16
COPIES = 6  # of the logits' size, that a case takes at its highest: plain PyTorch's backward, and some room


class Case(NamedTuple):
    """The size of the logits, ``(tokens, classes)``, and their dtype."""

    tokens: int
    classes: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return " ".join(self.words)

    @property
    def words(self) -> tuple[str, str]:
        """``512 × 32000`` and ``float32``."""
        return f"{self.tokens} × {self.classes}", str(self.dtype).removeprefix("torch.")


class Timed(NamedTuple):
    """The forward and backward pass of one side."""

    median: float  # seconds
    peak_bytes: int  # beyond the logits and the labels


class Measured(NamedTuple):
    """The numbers of one side in one case."""

    loss: Timed
    loss_and_accuracy: Timed
    errors: Errors
    accuracy: float  # in [0, 1]


@dataclass(frozen=True)
class LossAtScale:
    """Both sides in one case."""

    case: Case
    pytorch: Measured
    fastloss: Measured
    accuracy: float  # in [0, 1], from the float64 reference
    rounds: int  # how often each step was timed
    others_share: float  # of the CPUs, that other programs took meanwhile


def cases_for(device: torch.device) -> list[Case]:
    """Return every vocabulary in every dtype, with as many tokens as there is memory for."""
    cases = []
    for classes, dtype in itertools.product(VOCABULARIES, DTYPES):
        size = COPIES * classes * dtype.itemsize
        tokens = halved_to_fit(TOKENS[device.type], FEWEST_TOKENS, lambda tokens, size=size: tokens * size, device)
        cases.append(Case(tokens, classes, dtype))
    return cases


def compare(
    case: Case, device: torch.device, *, seed: int, budget: float, progress: Progress = lambda share: None
) -> LossAtScale:
    """Check both sides against float64, then measure them."""
    inputs = loss_inputs(*case, device, seed=seed)
    calls = [operation(side, op) for side in (PYTORCH, FASTLOSS) for op in ("forward+backward", "loss+accuracy")]
    reference, outcomes = LossReference(inputs, topk=(1,), by_entry=False), [call(*inputs) for call in calls[1::2]]
    errors = reference.errors(*outcomes)
    accuracies = [float(outcome.accuracies[0]) for outcome in outcomes]
    del outcomes  # the memory of their gradients is measured next
    steps = [partial(call, *inputs) for call in calls]
    peaks = [peak_bytes(step, device) for step in steps]  # and a first, untimed, run of each
    others = OtherPrograms()
    times = in_turns(steps, partial(seconds, device=device), budget=budget, progress=progress)
    timed = list(map(Timed, map(statistics.median, times), peaks))
    pytorch, fastloss = map(Measured, timed[0::2], timed[1::2], errors, accuracies)
    return LossAtScale(case, pytorch, fastloss, reference.top1, len(times[0]), others.share())
