"""The check of SGD's step against float64, and steps that are ready to be timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .contenders import SGD_OPTIONS

Shape = tuple[int, ...]


MakeOptimizer = Callable[[list[Tensor]], Optimizer]  # with SGD_OPTIONS

_LR, _MOMENTUM, _DECAY = (SGD_OPTIONS[name] for name in ("lr", "momentum", "weight_decay"))
_CHECKED_STEPS = 4
_NORM_ERROR = 1e-5  # of the norm that gradients are clipped to: a long float32 sum, but not a naive one


class StepErrors(NamedTuple):
    """The errors of parameters after a few steps."""

    of_rounding: float  # the greatest error over the error that rounding explains: more than 1 is wrong
    relative: float  # ‖θ − exact‖ / ‖exact‖


def step_errors(
    optimizers: Sequence[MakeOptimizer],
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device,
    *,
    max_norm: float | None = None,
) -> list[StepErrors]:
    """Return each optimizer's errors after a few steps with new random gradients in each.

    Args:
        optimizers: each makes an optimizer of parameters; all clip to ``max_norm``, or none does.
        shapes: of the parameters.
        dtype: of parameters and gradients.
        device: of parameters and gradients.
        max_norm: the gradients' greatest norm.
    """
    results = []
    for make in optimizers:
        params = list(_random(shapes, dtype, device, 0))
        optimizer = make(params)
        for step in range(1, _CHECKED_STEPS + 1):
            for param, grad in zip(params, _random(shapes, dtype, device, step), strict=True):
                param.grad = grad
            optimizer.step()
        for param in params:
            param.grad = None
        results.append(params)
    factors = [1.0] * _CHECKED_STEPS
    for step in range(_CHECKED_STEPS if max_norm is not None else 0):
        norms = [float(grad.double().norm()) for grad in _random(shapes, dtype, device, step + 1)]
        factors[step] = min(1.0, (max_norm or 0.0) / (math.hypot(*norms) + 1e-6))
    greatest, squares, norm = [0.0] * len(results), [0.0] * len(results), 0.0
    for i, shape in enumerate(shapes):
        theta, *gradients = (next(_random([shape], dtype, device, step, i)) for step in range(_CHECKED_STEPS + 1))
        exact, slack = _exact(theta, gradients, factors)
        norm += float(exact.square().sum())
        for number, params in enumerate(results):
            error = params[i].detach() - exact
            squares[number] += float(error.square().sum())
            over = float((error.abs_() / slack).max())
            greatest[number] = max(greatest[number], math.inf if math.isnan(over) else over)
    return [StepErrors(over, (square / norm) ** 0.5) for over, square in zip(greatest, squares, strict=True)]


def _random(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, step: int, first: int = 0
) -> Iterator[Tensor]:
    """Yield parameters, or their gradients in a step from 1: the same numbers in each call."""
    for i, shape in enumerate(shapes, first):
        generator = torch.Generator(device).manual_seed(1_000_003 * step + i)
        yield torch.randn(shape, generator=generator, dtype=dtype, device=device)


def _exact(theta: Tensor, gradients: Sequence[Tensor], factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return a parameter after the steps, in float64, and how far rounding may take it from there.

    Every number that an implementation may round is taken to be off by a whole unit in its last place, which is what
    stochastic rounding may do, and errors are carried on from step to step.
    """
    eps, theta = torch.finfo(theta.dtype).eps, theta.double()
    m, theta_off, m_off = torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros_like(theta)
    for gradient, factor in zip(gradients, factors, strict=True):
        g = gradient.double().mul_(factor)
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


def random_parameters(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return random parameters with random gradients."""
    params = list(_random(shapes, dtype, device, 0))
    for param, grad in zip(params, _random(shapes, dtype, device, 1), strict=True):
        param.grad = grad
    return params


def ready_step(
    make: MakeOptimizer, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """Return the step of an optimizer with random parameters and gradients of its own; it has run a few times."""
    step = make(random_parameters(shapes, dtype, device)).step
    for _ in range(3):
        step()
    return step
