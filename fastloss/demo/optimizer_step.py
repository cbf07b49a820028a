"""SGD's step alone, over the tensors of a ResNet-50, with momentum and weight decay; also with clipped gradients."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastloss

from ..measuring.clock import Progress, in_turns, seconds
from ..measuring.contenders import SGD_OPTIONS
from ..measuring.inputs import RESNET50_WIDTH, resnet50_shapes
from ..measuring.machine import OtherPrograms, halved_to_fit
from ..measuring.sgd import MakeOptimizer, Shape, random_parameters, step_errors

NARROWEST = 8
# Of the parameters' size: two sets, their gradients, six sets of momentum buffers, and PyTorch's own copies.
COPIES = 12
MAX_NORM = 1.0  # far below the norm of the random gradients
CHECKED_WIDTH = 8  # of the check against float64


class Compared(NamedTuple):
    """One way of PyTorch's, and fastloss beside it; first PyTorch's number, then fastloss's."""

    name: str
    clipped: bool
    seconds: tuple[float, float]  # medians
    errors: tuple[float, float]  # ‖θ − reference‖ / ‖reference‖ after a few steps


@dataclass(frozen=True)
class OptimizerStep:
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
    return halved_to_fit(RESNET50_WIDTH, NARROWEST, lambda width: COPIES * 4 * count(resnet50_shapes(width)), device)


def count(shapes: Sequence[Shape]) -> int:
    """Return the number of parameters."""
    return sum(torch.Size(shape).numel() for shape in shapes)


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
