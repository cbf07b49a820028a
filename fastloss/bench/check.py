"""Right or wrong: what a contender returns, held against float64 before it is timed.

The rule: its error is at most four times that of eager PyTorch on the same inputs, plus a few units in the last
place. Three errors are looked at.

- The loss: |loss − exact| / |exact|.
- The gradient: of each entry (p − t) · s / N, with p the softmax, t the target and s the upstream gradient, the error
  over the size of the terms that it is made of, (p + t) · s / N; and of these the greatest. So an error in the many
  small entries is seen as well as one in the few large ones.
- Each accuracy: how far it lies outside what the ties allow. Rows whose label ties with other classes may count
  either way, as torch.topk breaks ties in no fixed order.

The reference is made of a few rows at a time, so that it needs little memory beside the contender's gradient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .contenders import CONTENDERS, REFERENCE, TOPK, Functions
from .workloads import Inputs, Workload

__all__ = [
    "Call",
    "Errors",
    "Exact",
    "Outcome",
    "copies",
    "errors_of_reference",
    "in_words",
    "is_out_of_memory",
    "operation",
    "upstream",
    "upstream_value",
    "verdict",
]

TIMES_REFERENCE = 4.0
UNITS = 4.0  # in the last place
SHARE_SLACK = 1e-6  # of an accuracy, a float32 quotient

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ELEMENTS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 25}  # of the float64 reference


class Outcome(NamedTuple):
    """What one call gives, as far as its operation has it."""

    loss: Tensor | None = None
    gradient: Tensor | None = None
    accuracies: tuple[Tensor, ...] = ()


Call = Callable[[Tensor, Tensor], Outcome]  # from logits and target


def operation(functions: Functions, workload: Workload) -> Call:
    """The call that is checked and timed."""
    loss, accuracies, both = functions.loss, functions.accuracies, functions.loss_and_accuracies

    def gradient(value: Tensor, logits: Tensor) -> Tensor:
        (result,) = torch.autograd.grad(value, logits, upstream(workload, value))
        return result

    if workload.op == "accuracy":
        assert accuracies is not None
        return lambda logits, target: Outcome(accuracies=accuracies(logits, target))
    if workload.op == "loss+accuracy":
        assert both is not None

        def loss_and_accuracy(logits: Tensor, target: Tensor) -> Outcome:
            value, shares = both(logits, target)
            return Outcome(value, gradient(value, logits), shares)

        return loss_and_accuracy
    assert loss is not None
    if workload.op == "forward":
        return torch.no_grad()(lambda logits, target: Outcome(loss(logits, target)))

    def forward_backward(logits: Tensor, target: Tensor) -> Outcome:
        value = loss(logits, target)
        return Outcome(value, gradient(value, logits))

    return forward_backward


def upstream(workload: Workload, loss: Tensor) -> Tensor | None:
    """In float16 a loss scale, as a GradScaler's, without which most of the gradient is 0; else None, for 1."""
    scale = upstream_value(workload)
    return None if scale == 1.0 else torch.full_like(loss, scale)


def upstream_value(workload: Workload) -> float:
    """The power of two next below N in float16, 2¹⁵ at most."""
    if workload.dtype is not torch.float16:
        return 1.0
    return float(1 << min(15, workload.shape.rows.bit_length() - 1))


class Errors(NamedTuple):
    """How far an outcome is from the exact one; 0 for what the operation does not have."""

    loss: float = 0.0
    gradient: float = 0.0
    accuracy: float = 0.0


class Exact:
    """The same in float64."""

    def __init__(self, workload: Workload, inputs: Inputs) -> None:
        self._workload, self._inputs = workload, inputs
        rows = len(inputs.logits)
        self._loss = 0.0
        self._has_accuracy = workload.op in ("accuracy", "loss+accuracy")
        least, most = [0] * len(TOPK), [0] * len(TOPK)
        for _, log_p, target, logits in self._chunks():
            self._loss -= float((log_p * target).sum()) / rows
            if self._has_accuracy:
                score = logits.gather(1, target.argmax(1, keepdim=True))
                above, level = (logits > score).sum(1), (logits == score).sum(1) - 1
                for i, k in enumerate(TOPK):
                    least[i] += int((above + level < k).sum())
                    most[i] += int((above < k).sum())
        self._shares = [(low / rows, high / rows) for low, high in zip(least, most, strict=True)]

    @torch.no_grad()
    def errors(self, outcome: Outcome) -> Errors:
        """Of a contender's outcome; infinite where it is NaN or of another shape."""
        loss = gradient = accuracy = 0.0
        if outcome.loss is not None:
            loss = _or_inf(abs(float(outcome.loss) - self._loss) / max(abs(self._loss), 1e-300))
        if outcome.gradient is not None:
            gradient = self._gradient_error(outcome.gradient)
        if self._has_accuracy:
            for share, (low, high) in zip(map(float, outcome.accuracies), self._shares, strict=True):
                accuracy = max(accuracy, low - share, share - high, math.inf if math.isnan(share) else 0.0)
        return Errors(loss, gradient, accuracy)

    def _gradient_error(self, found: Tensor) -> float:
        if found.shape != self._inputs.logits.shape:
            return math.inf
        scale = upstream_value(self._workload) / len(found)
        tiny = torch.finfo(self._workload.dtype).tiny
        worst = 0.0
        for rows, log_p, target, _ in self._chunks():
            p = log_p.exp_().mul_(target.sum(1, keepdim=True))
            exact, terms = (p - target).mul_(scale), p.add_(target).mul_(scale).add_(tiny)
            worst = max(worst, _or_inf(float((exact.sub_(found[rows])).abs_().div_(terms).max())))
        return worst

    @torch.no_grad()
    def _chunks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Rows; their log-softmax and target probabilities in float64, ``(n, V)``; the logits, in float64."""
        logits, target = self._inputs
        at_once = max(1, _ELEMENTS_AT_ONCE.get(logits.device.type, 1 << 21) // logits.shape[1])
        for start in range(0, len(logits), at_once):
            rows = slice(start, start + at_once)
            chunk, t = logits[rows].detach().double(), target[rows]
            dense = t.double() if t.is_floating_point() else torch.zeros_like(chunk).scatter_(1, t[:, None], 1.0)
            yield rows, chunk.log_softmax(1), dense, chunk


def errors_of_reference(workload: Workload, inputs: Inputs) -> Errors:
    """Eager PyTorch's; on as many of the first rows as it has memory for."""
    call = operation(CONTENDERS[REFERENCE].load(), workload)
    rows = len(inputs.logits)
    while True:
        logits, target = inputs.logits.detach()[:rows], inputs.target[:rows]
        try:
            outcome = call(logits.requires_grad_(workload.differentiates), target)
            return Exact(workload, Inputs(logits, target)).errors(outcome)
        except Exception as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
            rows //= 2


def verdict(found: Errors, reference: Errors, workload: Workload) -> str | None:
    """What is wrong, in words; None if nothing is."""
    slack = UNITS * torch.finfo(workload.dtype).eps
    for name, error, theirs in zip(("loss", "gradient"), found[:2], reference[:2], strict=True):
        allowed = TIMES_REFERENCE * theirs + slack
        if not error <= allowed:
            return f"{name} off by {error:.1e} of its size, {allowed:.1e} is allowed"
    if not found.accuracy <= SHARE_SLACK:
        return f"accuracy off by {found.accuracy:.2%} of the rows"
    return None


def copies(inputs: list[Inputs]) -> list[Inputs]:
    """The same, in memory of their own."""
    return [Inputs(logits.detach().clone().requires_grad_(logits.requires_grad), target) for logits, target in inputs]


def in_words(error: Exception) -> str:
    """Its kind and its first line, without a terminal's colours, which some bring along."""
    lines = _COLOURS.sub("", str(error)).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's allocator has a class for it, a CPU's only words."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _or_inf(error: float) -> float:
    return math.inf if math.isnan(error) else error
