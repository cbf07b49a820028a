"""SGD's step: what it is made of, and the check of an optimizer's parameters against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["OPTIONS", "Kind", "Make", "Shape", "deviations", "ready"]

Shape = tuple[int, ...]
Make = Callable[[list[Tensor]], torch.optim.Optimizer]

_LR, _MOMENTUM, _DECAY = 0.1, 0.9, 1e-4
OPTIONS: dict[str, Any] = {"lr": _LR, "momentum": _MOMENTUM, "weight_decay": _DECAY}  # of every optimizer

_CHECKED_STEPS = 4
# Of the norm that gradients are clipped to: a long float32 sum, but not a naive one.
_NORM_ERROR = 1e-5


class Kind(NamedTuple):
    """What tensors are made of."""

    dtype: torch.dtype
    device: torch.device

    def random(self, shape: Shape, seed: int | None = None) -> Tensor:
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)


def deviations(
    makes: Sequence[Make], shapes: Sequence[Shape], kind: Kind, max_norm: float | None = None
) -> list[float]:
    """Of each optimizer the greatest error of a few steps over what rounding explains: more than 1 is wrong."""
    results = [_stepped(make, shapes, kind) for make in makes]
    factors = [_clip_factor(shapes, kind, step, max_norm) for step in range(1, _CHECKED_STEPS + 1)]
    worst = [0.0 for _ in makes]
    for i, shape in enumerate(shapes):
        exact, slack = _exact(i, shape, kind, factors)
        for number, params in enumerate(results):
            error = ((params[i] - exact).abs_() / slack).max().item()
            worst[number] = max(worst[number], math.inf if math.isnan(error) else error)
    return worst


def _stepped(make: Make, shapes: Sequence[Shape], kind: Kind) -> list[Tensor]:
    """The parameters after the steps of an optimizer."""
    params = [kind.random(shape, _seed(0, i)) for i, shape in enumerate(shapes)]
    optimizer = make(params)
    for step in range(1, _CHECKED_STEPS + 1):
        for i, (param, shape) in enumerate(zip(params, shapes, strict=True)):
            param.grad = kind.random(shape, _seed(step, i))
        optimizer.step()
    for param in params:
        param.grad = None
    return params


def _clip_factor(shapes: Sequence[Shape], kind: Kind, step: int, max_norm: float | None) -> float:
    if max_norm is None:
        return 1.0
    gradients = (kind.random(shape, _seed(step, i)).double() for i, shape in enumerate(shapes))
    norm = math.sqrt(sum(gradient.square_().sum().item() for gradient in gradients))
    return min(1.0, max_norm / (norm + 1e-6))


def _exact(i: int, shape: Shape, kind: Kind, factors: list[float]) -> tuple[Tensor, Tensor]:
    """The parameter after the steps, in float64, and how far rounding may take it from there.

    Every number that an implementation may round is taken to be off by a whole unit in its last place, which is what
    stochastic rounding may do, and errors are carried on from step to step.
    """
    eps = torch.finfo(kind.dtype).eps
    theta = kind.random(shape, _seed(0, i)).double()
    m, theta_off, m_off = torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros_like(theta)
    for step, factor in enumerate(factors, 1):
        g = kind.random(shape, _seed(step, i)).double().mul_(factor)
        of_gradient = eps if factor == 1.0 else eps + _NORM_ERROR
        m_off.mul_(_MOMENTUM).add_(theta_off, alpha=_DECAY).add_(g.abs(), alpha=of_gradient)
        g.add_(theta, alpha=_DECAY)
        m.mul_(_MOMENTUM)
        m_off.add_(g.abs(), alpha=eps).add_(m.abs(), alpha=eps)
        m.add_(g)
        m_off.add_(m.abs(), alpha=eps)
        theta.add_(m, alpha=-_LR)
        theta_off.add_(m_off, alpha=_LR).add_(theta.abs(), alpha=eps).add_(m.abs(), alpha=eps * _LR)
    return theta, theta_off


def _seed(step: int, i: int) -> int:
    return 1_000_003 * step + i


def ready(make: Make, shapes: Sequence[Shape], kind: Kind) -> Callable[[], object]:
    """The step of a contender with tensors of its own; it has been made a few times."""
    params = [kind.random(shape) for shape in shapes]
    for param in params:
        param.grad = kind.random(tuple(param.shape))
    step = make(params).step
    for _ in range(3):
        step()
    return step
