"""linear_cross_entropy: the call that is timed, its check against float64, and its limit, three bare products.

The rule of :mod:`.check` holds. The errors are those of the loss, |loss − exact| / |exact|, and of the gradients of
hidden states and head: of each entry, a sum of products, the error over the sum of its terms' sizes; and of these the
greatest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .check import Errors, is_out_of_memory, upstream, upstream_value
from .contenders import CONTENDERS, REFERENCE, LinearLoss
from .workloads import LinearInputs, Workload

__all__ = ["Exact", "Outcome", "Products", "errors_of_reference", "operation"]

_ELEMENTS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}  # of the float64 reference


class Outcome(NamedTuple):
    """What one call gives."""

    loss: Tensor
    of_hidden: Tensor
    of_head: Tensor


Call = Callable[[Tensor, Tensor, Tensor], Outcome]  # from hidden states, head and labels


def operation(loss: LinearLoss, workload: Workload) -> Call:
    """The call that is checked and timed: forward and backward."""

    def call(hidden: Tensor, head: Tensor, target: Tensor) -> Outcome:
        value = loss(hidden, head, target)
        return Outcome(value, *torch.autograd.grad(value, (hidden, head), upstream(workload, value)))

    return call


class Exact:
    """The same in float64, a few rows at a time; the sizes of the terms in float32."""

    @torch.no_grad()
    def __init__(self, workload: Workload, inputs: LinearInputs) -> None:
        hidden, head, target = inputs
        rows, device = len(hidden), hidden.device
        scale = upstream_value(workload) / rows
        self._tiny = torch.finfo(workload.dtype).tiny
        self._loss = 0.0
        self._of_hidden = torch.empty(hidden.shape, dtype=torch.float64, device=device)
        self._hidden_terms = torch.empty(hidden.shape, dtype=torch.float32, device=device)
        self._of_head = torch.zeros(head.shape, dtype=torch.float64, device=device)
        self._head_terms = torch.zeros(head.shape, dtype=torch.float32, device=device)
        w, sizes = head.double(), head.float().abs()
        for part in _parts(rows, len(head), device):
            x, labels = hidden[part].double(), target[part, None]
            g = (x @ w.t()).log_softmax(1)
            self._loss -= float(g.gather(1, labels).sum()) / rows
            g.exp_().mul_(scale)
            terms = g.float().scatter_add_(1, labels, torch.full_like(labels, scale, dtype=torch.float32))
            g.scatter_add_(1, labels, torch.full_like(labels, -scale, dtype=torch.float64))
            torch.mm(g, w, out=self._of_hidden[part])
            torch.mm(terms, sizes, out=self._hidden_terms[part])
            self._of_head.addmm_(g.t(), x)
            self._head_terms.addmm_(terms.t(), x.float().abs())

    @torch.no_grad()
    def errors(self, outcome: Outcome) -> Errors:
        """Of a contender's outcome; infinite where it is NaN or of another shape."""
        off = abs(float(outcome.loss) - self._loss) / max(abs(self._loss), 1e-300)
        gradient = max(
            self._greatest(outcome.of_hidden, self._of_hidden, self._hidden_terms),
            self._greatest(outcome.of_head, self._of_head, self._head_terms),
        )
        return Errors(math.inf if math.isnan(off) else off, gradient)

    def _greatest(self, found: Tensor, exact: Tensor, terms: Tensor) -> float:
        if found.shape != exact.shape:
            return math.inf
        worst = 0.0
        for part in _parts(len(found), found.shape[1], found.device):
            error = float((exact[part] - found[part]).abs_().div_(terms[part] + self._tiny).max())
            worst = max(worst, math.inf if math.isnan(error) else error)
        return worst


def _parts(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    step = max(1, _ELEMENTS_AT_ONCE.get(device.type, 1 << 21) // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def errors_of_reference(workload: Workload, inputs: LinearInputs, exact: Exact) -> Errors:
    """Eager PyTorch's; on as many of the first rows as it has memory for. ``exact`` is of all rows."""
    loss = CONTENDERS[REFERENCE].load().linear
    assert loss is not None
    call, rows = operation(loss, workload), len(inputs.hidden)
    while True:
        mine = LinearInputs(
            inputs.hidden.detach()[:rows].requires_grad_(),
            inputs.head.detach().requires_grad_(),
            inputs.target[:rows],
        )
        try:
            outcome = call(*mine)
            return (exact if rows == len(inputs.hidden) else Exact(workload, mine)).errors(outcome)
        except Exception as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
            rows //= 2


class Products:
    """The three products that nobody can do without, into memory that is there: the limit."""

    def __init__(self, workload: Workload, inputs: LinearInputs) -> None:
        self._hidden, self._head = inputs.hidden.detach(), inputs.head.detach()
        self._operations = workload.operations
        self._logits = self._hidden.new_empty(len(self._hidden), len(self._head))
        self._of_hidden, self._of_head = torch.empty_like(self._hidden), torch.empty_like(self._head)

    def step(self) -> None:
        torch.mm(self._hidden, self._head.t(), out=self._logits)
        torch.mm(self._logits, self._head, out=self._of_hidden)
        torch.mm(self._logits.t(), self._hidden, out=self._of_head)

    def teraflops(self, times: Sequence[float]) -> float:
        """At the median of the times in seconds."""
        return self._operations / statistics.median(times) / 1e12
