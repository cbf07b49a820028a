"""Losses of tokens from hidden states, beside linear_cross_entropy: ``python -m benchmarks.tokens``.

Forward and backward of PPO's clipped loss, alone and with a bonus for the entropy: by linear_token_loss, by the parts
of linear_cross_entropy_with_statistics, and over all logits. Times are in turns, and the bars are multiples of the
time of linear_cross_entropy; the memory is what is held beyond inputs and gradients, and its bar is a part of the
plain form's. Each is held against float64 first, over a part of the rows. Other shapes than the chosen ones have no
bars.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import fastloss
from fastloss.measuring.clock import medians
from fastloss.measuring.contenders import by_parts, by_tokens, clipped_rows
from fastloss.measuring.inputs import TokenInputs, linear_inputs, token_inputs
from fastloss.measuring.machine import peak_bytes

from .shared import compare_products, verdict

SHAPES = {"cpu": ((1024, 256, 32000), (512, 512, 128256)), "cuda": ((8192, 4096, 151936),)}
# Of linear_cross_entropy's time: a loss of tokens, and one of the parts, whose fourth product comes on top.
TOKEN_BAR, PARTS_BAR, MEMORY_BAR = {"cpu": 1.1, "cuda": 1.05}, {"cpu": 1.4, "cuda": 1.4}, 0.25
_CHECKED_ROWS = 64
# Of a gradient's largest element, by the dtype: beyond it a contender is marked, and its bars are missed.
_MOST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


Loss = Callable[[TokenInputs], Tensor]


def of_tokens(problem: TokenInputs, entropy: bool) -> Tensor:
    """Compute it by linear_token_loss."""
    return by_tokens(*problem, entropy=entropy)


def of_parts(problem: TokenInputs, entropy: bool) -> Tensor:
    """Compute it of the parts of linear_cross_entropy_with_statistics."""
    return by_parts(*problem, entropy=entropy)


def plain(problem: TokenInputs, entropy: bool) -> Tensor:
    """Compute it over all logits."""
    return clipped_rows(*problem, entropy=entropy).mean()


def compare(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seconds: float, bars: bool
) -> list[str]:
    """Return the lines of one shape."""
    rows, features, classes = shape
    problem = token_inputs(linear_inputs(rows, features, classes, dtype, device, seed=0), seed=1)
    losses: dict[str, Loss] = {"linear_cross_entropy": lambda p: fastloss.linear_cross_entropy(*p[:3])}
    bar_of: dict[str, float] = {}
    kinds = (("linear_token_loss", of_tokens, TOKEN_BAR), ("..._with_statistics", of_parts, PARTS_BAR))
    for words, entropy in (("", False), (", entropy", True)):
        for name, function, by_device in kinds:
            losses[name + words] = lambda p, f=function, e=entropy: f(p, e)  # type: ignore[misc]
            bar_of[name + words] = by_device[device.type]
        losses["over the logits" + words] = lambda p, e=entropy: plain(p, e)  # type: ignore[misc]

    def step_of(loss: Loss) -> Callable[[], None]:
        def step() -> None:
            problem.hidden.grad = problem.head.grad = None
            loss(problem).backward()

        return step

    steps = {name: step_of(loss) for name, loss in losses.items()}
    for step in (*steps.values(), *steps.values()):
        step()
    times = dict(zip(steps, medians(list(steps.values()), device, budget=seconds, least=3), strict=True))
    gradients = problem.hidden.nbytes + problem.head.nbytes
    problem.hidden.grad = problem.head.grad = None
    held = {}
    for name, step in steps.items():
        problem.hidden.grad = problem.head.grad = None
        held[name] = max(peak_bytes(step, device) - gradients, 0)
    lines = [f"({rows}, {features}) x {classes} {str(dtype).removeprefix('torch.')}"]
    for name, loss in losses.items():
        line = f"{name:<30} {1e3 * times[name]:9.2f} ms  {held[name] / 1e6:9.1f} MB"
        if name in bar_of:
            words = ", entropy" if name.endswith(", entropy") else ""
            ratio = times[name] / times["linear_cross_entropy"]
            memory = held[name] / max(held["over the logits" + words], 1)
            error = _error(loss, problem, entropy=bool(words))
            line += f"  of linear_cross_entropy {ratio:.3f} {verdict(ratio, bar_of[name] if bars else None)}"
            line += f"  of the plain form's memory {memory:.3f} {verdict(memory, MEMORY_BAR if bars else None)}"
            line += f"  error {error:.1e}" + (" INEXACT MISSED" if error > _MOST_ERROR[dtype] else "")
        lines.append(line)
    return lines


def _error(loss: Loss, problem: TokenInputs, entropy: bool) -> float:
    """Return the largest error of the gradients of a part of the rows, of their largest element."""
    leaves = [problem.hidden[:_CHECKED_ROWS].detach(), problem.head.detach()]
    constants = [each[:_CHECKED_ROWS] for each in problem[2:]]

    def gradients(loss: Loss, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, w = (leaf.to(dtype).requires_grad_() for leaf in leaves)
        floats = (each.to(dtype) if dtype == torch.float64 else each for each in constants[1:])
        return torch.autograd.grad(loss(TokenInputs(x, w, constants[0], *floats)), (x, w))

    ours, exact = gradients(loss, leaves[0].dtype), gradients(lambda p: plain(p, entropy), torch.float64)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, exact, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit code 1 if fastloss misses a bar."""
    return compare_products(
        "tokens", __doc__, arguments, "Losses of tokens beside linear_cross_entropy", SHAPES, compare
    )


if __name__ == "__main__":
    sys.exit(main())
