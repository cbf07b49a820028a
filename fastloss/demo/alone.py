"""The loss alone at the size of a language model's vocabulary, and SGD's step alone over a ResNet-50's tensors.

The loss is timed forward and backward. The step has momentum and weight decay, and is timed with clipping too.
"""

from __future__ import annotations

import itertools
import operator
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastloss

from ..measuring.clock import Progress, in_turns, seconds
from ..measuring.contenders import SGD_OPTIONS
from ..measuring.inputs import RESNET50_WIDTH, count, loss_inputs, resnet50_shapes
from ..measuring.machine import OtherPrograms, halved_to_fit, peak_bytes
from ..measuring.reference import Errors, LossReference, operation
from ..measuring.sgd import MakeOptimizer, Shape, random_parameters, step_errors
from .training import FASTLOSS, PYTORCH

# The vocabularies of Llama 2 (arXiv:2307.09288, §2.2) and of Llama 3 (128000 tokens, arXiv:2407.21783, §3.2,
# and the 256 special ones that its published configuration adds).
VOCABULARIES = (32000, 128256)
DTYPES = (torch.float32, torch.bfloat16)
TOKENS = {"cpu": 512, "cuda": 8192}
FEWEST_TOKENS = 16
LOGITS_COPIES = 6  # that a case takes at its highest: plain PyTorch's backward, and some room

NARROWEST = 8
# Of the parameters' size: two sets, their gradients, six sets of momentum buffers, and PyTorch's own copies.
SGD_COPIES = 12
MAX_NORM = 1.0  # far below the norm of the random gradients
CHECKED_WIDTH = 8  # of the check against float64


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


class LossAtScale(NamedTuple):
    """Both sides in one case."""

    case: Case
    pytorch: Measured
    fastloss: Measured
    accuracy: float  # in [0, 1], the share of rows whose first greatest logit is the label's
    rounds: int  # how often each step was timed
    others_share: float  # of the CPUs, that other programs took meanwhile


def cases_for(device: torch.device) -> list[Case]:
    """Return every vocabulary in every dtype, with as many tokens as there is memory for."""
    cases = []
    for classes, dtype in itertools.product(VOCABULARIES, DTYPES):
        needed = partial(operator.mul, LOGITS_COPIES * classes * dtype.itemsize)
        tokens = halved_to_fit(TOKENS[device.type], FEWEST_TOKENS, needed, device)
        cases.append(Case(tokens, classes, dtype))
    return cases


def compare_losses(
    case: Case, device: torch.device, *, seed: int, budget: float, progress: Progress = lambda share: None
) -> LossAtScale:
    """Check both sides against float64, then measure them."""
    inputs = loss_inputs(*case, device, seed=seed)
    calls = [operation(side, op) for side in (PYTORCH, FASTLOSS) for op in ("forward+backward", "loss+accuracy")]
    outcomes = [call(*inputs) for call in calls[1::2]]
    errors = LossReference(inputs, topk=(1,), by_entry=False).errors(*outcomes)
    accuracies = [float(outcome.accuracies[0]) for outcome in outcomes]
    del outcomes  # the memory of their gradients is measured next
    steps = [partial(call, *inputs) for call in calls]
    peaks = [peak_bytes(step, device) for step in steps]  # and a first, untimed, run of each
    others = OtherPrograms()
    times = in_turns(steps, partial(seconds, device=device), budget=budget, progress=progress)
    timed = list(map(Timed, map(statistics.median, times), peaks))
    pytorch, ours = map(Measured, timed[0::2], timed[1::2], errors, accuracies)
    right = float((inputs.logits.argmax(1) == inputs.target).double().mean())
    return LossAtScale(case, pytorch, ours, right, len(times[0]), others.share())


class Compared(NamedTuple):
    """One way of PyTorch's, and fastloss beside it; first PyTorch's number, then fastloss's."""

    name: str
    clipped: bool
    seconds: tuple[float, float]  # medians
    errors: tuple[float, float]  # ‖θ − reference‖ / ‖reference‖ after a few steps


class OptimizerStep(NamedTuple):
    """All ways, over the same shapes."""

    tensors: int
    parameters: int
    compared: list[Compared]
    rounds: int  # how often each step was timed
    others_share: float  # of the CPUs, that other programs took meanwhile


def _clipping(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    """Return PyTorch's optimizer, whose step clips first, which writes to the gradients."""
    optimizer = torch.optim.SGD(params, **options)

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def width_that_fits(device: torch.device) -> int:
    """Return a ResNet-50's own width, halved until the step takes no more than half of the free memory."""
    return halved_to_fit(
        RESNET50_WIDTH, NARROWEST, lambda width: SGD_COPIES * 4 * count(resnet50_shapes(width)), device
    )


def _optimizers(device: torch.device) -> list[tuple[str, bool, MakeOptimizer]]:
    """Return names, whether gradients are clipped, and makers: PyTorch's two ways, then fastloss's; clipped last."""
    default = f"default ({'foreach' if device.type == 'cuda' else 'loop'})"
    return [
        (name, clipped, partial(make, **options, **SGD_OPTIONS))
        for clipped, torchs, max_norm in ((False, torch.optim.SGD, None), (True, _clipping, MAX_NORM))
        for name, make, options in (
            (default, torchs, {}),
            ("fused=True", torchs, {"fused": True}),
            ("fastloss", fastloss.SGD, {"max_norm": max_norm}),
        )
    ]


def _errors(shapes: Sequence[Shape], device: torch.device) -> list[float]:
    """Return the relative errors of the parameters after a few steps, for each of :func:`_optimizers`."""
    makers = [make for _, _, make in _optimizers(device)]
    plain = step_errors(makers[:3], shapes, torch.float32, device)
    clipped = step_errors(makers[3:], shapes, torch.float32, device, max_norm=MAX_NORM)
    return [errors.relative for errors in (*plain, *clipped)]


def compare_steps(
    device: torch.device, *, width: int, budget: float, progress: Progress = lambda share: None
) -> OptimizerStep:
    """Check every way against float64, then measure."""
    errors = _errors(resnet50_shapes(min(width, CHECKED_WIDTH)), device)
    shapes, optimizers = resnet50_shapes(width), _optimizers(device)
    # PyTorch's clipping writes to the gradients, so fastloss has parameters of its own.
    torchs, ours = (random_parameters(shapes, torch.float32, device) for _ in range(2))
    steps = [make(ours if name == "fastloss" else torchs).step for name, _, make in optimizers]
    for step in steps:
        step()  # the first one makes the momentum
    others = OtherPrograms()
    times = in_turns(steps, partial(seconds, device=device), budget=budget, progress=progress)
    medians = list(map(statistics.median, times))
    compared = [
        Compared(optimizers[i][0], optimizers[i][1], (medians[i], medians[j]), (errors[i], errors[j]))
        for i, j in ((0, 2), (1, 2), (3, 5), (4, 5))
    ]
    return OptimizerStep(len(shapes), count(shapes), compared, len(times[0]), others.share())
