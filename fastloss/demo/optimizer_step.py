"""SGD's step alone, over the tensors of a ResNet-50, with momentum and weight decay; also with clipped gradients."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..measuring.clock import Step, in_turns, seconds
from ..measuring.machine import OtherPrograms, free_bytes
from .contenders import FASTLOSS, PYTORCH

__all__ = ["RESNET50_WIDTH", "Compared", "OptimizerStep", "compare_steps", "resnet50_shapes", "width_that_fits"]

# He and others, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), table 1: the bottlenecks of each
# stage. Convolutions without a bias, each followed by a scale and a shift.
BOTTLENECKS = (3, 4, 6, 3)
EXPANSION = 4
CLASSES = 1000
RESNET50_WIDTH = 64  # channels of the first convolution
NARROWEST = 8
COPIES = (
    10  # of the parameters' size: two sets, their gradients, four sets of momentum buffers, and PyTorch's own copies
)

LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
MAX_NORM = 1.0  # far below the norm of the random gradients

NAMES = ("default", "fused", "fastloss", "clipped default", "clipped fused", "clipped fastloss")
CHECKED_STEPS = 3
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
    default: Compared
    fused: Compared
    clipped_default: Compared
    clipped_fused: Compared
    rounds: int  # how often each step was timed
    neighbours: float  # the share of the CPUs that other programs took meanwhile

    @property
    def compared(self) -> tuple[Compared, ...]:
        """In the order in which they are shown."""
        return self.default, self.fused, self.clipped_default, self.clipped_fused


def resnet50_shapes(width: int = RESNET50_WIDTH) -> list[tuple[int, ...]]:
    """The shapes of a ResNet-50's parameters, or of a narrower one's."""
    shapes = [*_convolution(3, width, 7)]
    channels = width
    for stage, blocks in enumerate(BOTTLENECKS):
        inner = width << stage
        for block in range(blocks):
            shapes += _convolution(channels, inner, 1)
            shapes += _convolution(inner, inner, 3)
            shapes += _convolution(inner, inner * EXPANSION, 1)
            if block == 0:
                shapes += _convolution(channels, inner * EXPANSION, 1)
            channels = inner * EXPANSION
    return [*shapes, (CLASSES, channels), (CLASSES,)]


def width_that_fits(device: torch.device) -> int:
    """A ResNet-50's own width, halved until the sets take no more than half of the memory that is free."""
    width, free = RESNET50_WIDTH, free_bytes(device)
    while width > NARROWEST and COPIES * 4 * _count(resnet50_shapes(width)) > free / 2:
        width //= 2
    return width


def compare_steps(
    device: torch.device,
    *,
    width: int,
    seed: int,
    budget: float,
    tell: Callable[[float], None] = lambda share: None,
) -> OptimizerStep:
    """Check every way against float64, then measure; ``tell`` hears the share that is done."""
    errors = _errors(resnet50_shapes(min(width, CHECKED_WIDTH)), device, seed)
    shapes = resnet50_shapes(width)
    params = _parameters(shapes, device, seed)
    steps = _steps(params, _copies(params))
    for step in steps.values():
        step()  # the first one makes the momentum
    others = OtherPrograms()
    times = in_turns(list(steps.values()), partial(seconds, device=device), budget=budget, progress=tell)
    medians = dict(zip(steps, map(statistics.median, times), strict=True))

    def compared(name: str, theirs: str) -> Compared:
        clipped = theirs.startswith("clipped")
        ours = "clipped fastloss" if clipped else "fastloss"
        return Compared(name, clipped, (medians[theirs], medians[ours]), (errors[theirs], errors[ours]))

    default = f"default ({'foreach' if device.type == 'cuda' else 'loop'})"
    return OptimizerStep(
        len(shapes),
        _count(shapes),
        compared(default, "default"),
        compared("fused=True", "fused"),
        compared(default, "clipped default"),
        compared("fused=True", "clipped fused"),
        len(times[0]),
        others.share(),
    )


def _convolution(channels: int, filters: int, size: int) -> list[tuple[int, ...]]:
    return [(filters, channels, size, size), (filters,), (filters,)]


def _count(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def _parameters(shapes: Sequence[tuple[int, ...]], device: torch.device, seed: int) -> list[nn.Parameter]:
    """Random numbers, and random gradients on them."""
    generator = torch.Generator(device).manual_seed(seed)
    numbers = torch.randn(2 * _count(shapes), generator=generator, device=device).mul_(0.05)
    pieces = iter(numbers.split([torch.Size(shape).numel() for shape in shapes] * 2))
    params = [nn.Parameter(next(pieces).view(shape).clone()) for shape in shapes]
    for param in params:
        param.grad = next(pieces).view_as(param).clone()
    return params


def _copies(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    for copy, param in zip(copies, params, strict=True):
        copy.grad = None if param.grad is None else param.grad.clone()
    return copies


def _steps(theirs: list[nn.Parameter], ours: list[nn.Parameter]) -> dict[str, Step]:
    """What is timed, by name. PyTorch's clipping writes to the gradients, so fastloss has parameters of its own."""
    default, fused = (_sgd(PYTORCH.sgd, theirs, **options) for options in ({}, {"fused": True}))
    steps = (
        default.step,
        fused.step,
        _sgd(FASTLOSS.sgd, ours).step,
        _clipped(default, theirs),
        _clipped(fused, theirs),
        _sgd(FASTLOSS.sgd, ours, max_norm=MAX_NORM).step,
    )
    return dict(zip(NAMES, steps, strict=True))


def _sgd(kind: Callable[..., Optimizer], params: list[nn.Parameter], **options: object) -> Optimizer:
    return kind(params, lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **options)


def _clipped(optimizer: Optimizer, params: list[nn.Parameter]) -> Step:
    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


def _errors(shapes: Sequence[tuple[int, ...]], device: torch.device, seed: int) -> dict[str, float]:
    """Of the parameters after a few steps, for each of :func:`_steps`."""
    params = _parameters(shapes, device, seed)
    references = {clipped: _in_float64(params, clipped) for clipped in (False, True)}
    errors = {}
    for name in NAMES:
        theirs, ours = _copies(params), _copies(params)
        step = _steps(theirs, ours)[name]
        for _ in range(CHECKED_STEPS):
            step()
        reference = references[name.startswith("clipped")]
        found = torch.cat([p.detach().double().flatten() for p in (ours if name.endswith("fastloss") else theirs)])
        errors[name] = float((found - reference).norm() / reference.norm())
    return errors


@torch.no_grad()
def _in_float64(params: list[nn.Parameter], clipped: bool) -> Tensor:
    """The formula of SGD, on everything in one vector."""
    value = torch.cat([p.double().flatten() for p in params])
    grad = torch.cat([p.grad.double().flatten() for p in params if p.grad is not None])
    if clipped:
        grad *= min(1.0, MAX_NORM / float(grad.norm()))
    momentum = torch.zeros_like(value)
    for _ in range(CHECKED_STEPS):
        momentum = MOMENTUM * momentum + grad + WEIGHT_DECAY * value
        value = value - LEARNING_RATE * momentum
    return value
