"""The loss alone, forward and backward, at the size of a language model's vocabulary."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from ..measuring.clock import Progress, in_turns, seconds
from ..measuring.inputs import loss_inputs
from ..measuring.machine import OtherPrograms, free_bytes, peak_bytes
from ..measuring.reference import Errors, LossReference, operation
from .runs import FASTLOSS, PYTORCH

# The vocabularies of Llama 2 (arXiv:2307.09288, §2.2) and of Llama 3 (128000 tokens, arXiv:2407.21783, §3.2,
# and the 256 special ones that its published configuration adds).
VOCABULARIES = (32000, 128256)
DTYPES = (torch.float32, torch.bfloat16)
TOKENS_ON_CPU = 512
TOKENS_ON_GPU = 8192
FEWEST_TOKENS = 16
COPIES = 6  # of the logits' size, that a case takes at its highest: plain PyTorch's backward, and some room


class Case(NamedTuple):
    """The size of the logits, ``(tokens, classes)``, and their dtype."""

    tokens: int
    classes: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.size} {self.dtype_name}"

    @property
    def size(self) -> str:
        """``512 × 32000``."""
        return f"{self.tokens} × {self.classes}"

    @property
    def dtype_name(self) -> str:
        """``float32``, ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")


class Timed(NamedTuple):
    """The forward and backward pass of one side."""

    seconds: list[float]  # one a round
    peak_bytes: int  # beyond the logits and the labels

    @property
    def median(self) -> float:
        """The median seconds."""
        return statistics.median(self.seconds)


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
    others_share: float  # of the CPUs, that other programs took meanwhile

    @property
    def rounds(self) -> int:
        """How often each step was timed."""
        return len(self.pytorch.loss.seconds)


def cases_for(device: torch.device) -> tuple[Case, ...]:
    """Return every vocabulary in every dtype, with as many tokens as there is memory for."""
    free = free_bytes(device)
    wanted = TOKENS_ON_GPU if device.type == "cuda" else TOKENS_ON_CPU
    return tuple(
        Case(_tokens_that_fit(wanted, classes * dtype.itemsize, free), classes, dtype)
        for classes in VOCABULARIES
        for dtype in DTYPES
    )


def _tokens_that_fit(wanted: int, bytes_a_token: int, free: int) -> int:
    """Return ``wanted``, halved until the case takes no more than half of the free memory."""
    tokens = wanted
    while tokens > FEWEST_TOKENS and COPIES * tokens * bytes_a_token > free / 2:
        tokens //= 2
    return tokens


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
    timed = list(map(Timed, times, peaks))
    pytorch, fastloss = map(Measured, timed[0::2], timed[1::2], errors, accuracies)
    return LossAtScale(case, pytorch, fastloss, reference.top1, others.share())
