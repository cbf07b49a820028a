"""The check of a loss against float64: the reference, the errors, and the rule.

The rule: an error is at most four times that of eager PyTorch on the same inputs, plus a few units in the last place.

- The loss: |loss − exact| / |exact|.
- A gradient: of each entry the error over the size of the terms that it is a sum of, and of these the greatest. So
  an error in the many small entries is seen as well as one in the few large ones. The logits' gradient is
  (p − t) · s / N, with p the softmax, t the target and s the upstream gradient; its terms' size is (p + t) · s / N.
  Of the losses of rows it is ‖gradient − exact‖ / ‖exact‖.
- An accuracy: how far it lies outside what ties allow. A row whose label ties with other classes may count either
  way, as torch.topk breaks ties in no fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contenders import CONTENDERS, REFERENCE, ROWS, Functions
from .inputs import LinearInputs, LossInputs
from .machine import is_out_of_memory

TIMES_REFERENCE = 4.0
UNITS = 4.0  # in the last place
SHARE_SLACK = 1e-6  # of an accuracy, a float32 quotient

# Elements of the float64 reference that are computed at once.
_LOSS_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}
_LINEAR_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}


class Outcome(NamedTuple):
    """The results of one call, as far as its operation has them."""

    loss: Tensor | None = None
    gradients: tuple[Tensor, ...] = ()  # of the logits, or of hidden states and head
    accuracies: tuple[Tensor, ...] = ()


class Errors(NamedTuple):
    """The errors of an outcome; 0 for results that its operation does not have, infinite for NaN or another shape."""

    loss: float = 0.0
    gradient: float = 0.0  # the greatest of any entry
    accuracy: float = 0.0
    gradient_norm: float = 0.0  # ‖gradient − exact‖ / ‖exact‖; of several the greatest


Call = Callable[..., Outcome]  # takes logits and target, or hidden states, head and labels


def operation(functions: Functions, op: str, upstream: float = 1.0) -> Call:
    """Return the call of ``op`` that is checked and timed; ``upstream`` is the gradient of the loss."""
    names = {"accuracy": "accuracies", "loss+accuracy": "loss_and_accuracies", "linear": "linear"}
    function: Any = getattr(functions, names.get(op, "loss"))
    if op in ROWS and functions.of_rows is not None:
        function = functions.of_rows[op]
    if op == "accuracy":
        return lambda *inputs: Outcome(accuracies=function(*inputs))
    if op in ("forward", "linear-topk"):
        return torch.no_grad()(lambda *inputs: Outcome(function(*inputs)))

    def call(*inputs: Tensor) -> Outcome:
        loss, accuracies = function(*inputs) if op == "loss+accuracy" else (function(*inputs), ())
        of_loss = None if upstream == 1.0 else torch.full_like(loss, upstream)
        trained = [each for each in inputs if each.is_leaf and each.requires_grad]
        return Outcome(loss, torch.autograd.grad(loss, trained, of_loss), accuracies)

    return call


class LossReference:
    """The loss, its gradient and the accuracies in float64, of a few rows at a time.

    Args:
        inputs: logits and target.
        upstream: the gradient of the loss.
        topk: the accuracies that outcomes have.
        by_entry: True if the greatest error of the gradient's entries is wanted, and not its norm alone.
    """

    def __init__(
        self, inputs: LossInputs, upstream: float = 1.0, topk: Sequence[int] = (), *, by_entry: bool = True
    ) -> None:
        self._inputs, self._upstream, self._topk, self._by_entry = inputs, upstream, topk, by_entry

    @torch.no_grad()
    def errors(self, *outcomes: Outcome) -> list[Errors]:
        """Return the errors of each outcome, all in one pass over the logits."""
        logits, target = self._inputs
        rows, classes = logits.shape
        scale, tiny = self._upstream / rows, torch.finfo(logits.dtype).tiny
        loss = squares = 0.0
        least, most = [0] * len(self._topk), [0] * len(self._topk)
        gradients = [_GradientError(outcome.gradients, logits.shape) for outcome in outcomes]
        for part in _parts(rows, classes, _LOSS_ELEMENTS.get(logits.device.type, 1 << 21)):
            x, t = logits[part], target[part]
            log_p = x.double().log_softmax(1)
            if t.is_floating_point():
                loss -= float((log_p * t).sum()) / rows
                label = t.argmax(1, keepdim=True)
            else:
                label = t[:, None]
                loss -= float(log_p.gather(1, label).sum()) / rows
            if self._topk:
                score = x.gather(1, label)
                above, level = (x > score).sum(1), (x == score).sum(1) - 1
                for i, k in enumerate(self._topk):
                    least[i] += int((above + level < k).sum())
                    most[i] += int((above < k).sum())
            if any(outcome.gradients for outcome in outcomes):
                exact = log_p.exp_()  # and then the difference of the terms, whose sum is `terms`
                if t.is_floating_point():
                    exact.mul_(t.double().sum(1, keepdim=True))
                    terms = exact + t if self._by_entry else None
                    exact -= t
                else:
                    one = torch.ones_like(label, dtype=torch.float64)
                    terms = exact.scatter_add(1, label, one) if self._by_entry else None
                    exact.scatter_add_(1, label, -one)
                exact *= scale
                if terms is not None:
                    terms.mul_(scale).add_(tiny)
                squares += float(torch.linalg.vector_norm(exact)) ** 2
                for gradient in gradients:
                    gradient.add(part, exact, terms)
        shares = [(low / rows, high / rows) for low, high in zip(least, most, strict=True)]
        return [
            Errors(
                _loss_error(outcome.loss, loss),
                gradient.greatest,
                _accuracy_error(outcome.accuracies, shares),
                (gradient.squares / squares) ** 0.5 if squares else 0.0,
            )
            for outcome, gradient in zip(outcomes, gradients, strict=True)
        ]


class LinearReference:
    """The loss of hidden states and head, and both gradients, in float64; their terms' sizes in float32."""

    @torch.no_grad()
    def __init__(self, inputs: LinearInputs, upstream: float = 1.0) -> None:
        hidden, head, target = inputs
        scale, self._elements = upstream / len(hidden), _LINEAR_ELEMENTS.get(hidden.device.type, 1 << 21)
        self._loss = 0.0
        self._exact = tuple(torch.zeros_like(each, dtype=torch.float64) for each in (hidden, head))
        terms_of = tuple(torch.zeros_like(each, dtype=torch.float32) for each in (hidden, head))
        self._terms: tuple[Tensor | None, ...] = terms_of
        w, sizes = head.double(), head.float().abs()
        for part in _parts(len(hidden), len(head), self._elements):
            x, labels = hidden[part].double(), target[part, None]
            g = (x @ w.t()).log_softmax(1)
            self._loss -= float(g.gather(1, labels).sum()) / len(hidden)
            g.exp_().mul_(scale)
            terms = g.float().scatter_add_(1, labels, torch.full_like(labels, scale, dtype=torch.float32))
            g.scatter_add_(1, labels, torch.full_like(labels, -scale, dtype=torch.float64))
            torch.mm(g, w, out=self._exact[0][part])
            torch.mm(terms, sizes, out=terms_of[0][part])
            self._exact[1].addmm_(g.t(), x)
            terms_of[1].addmm_(terms.t(), x.float().abs())
        for each in terms_of:
            each += torch.finfo(hidden.dtype).tiny

    @torch.no_grad()
    def errors(self, *outcomes: Outcome) -> list[Errors]:
        """Return the errors of each outcome."""
        results = []
        for outcome in outcomes:
            greatest = norm = 0.0
            # none of an operation that computes no gradient
            for gradient, exact, terms in zip(outcome.gradients, self._exact, self._terms, strict=False):
                error = _GradientError((gradient,), exact.shape)
                for part in _parts(len(exact), exact.shape[1], self._elements):
                    error.add(part, exact[part], None if terms is None else terms[part])
                of_norm = _finite(error.squares**0.5 / float(torch.linalg.vector_norm(exact)))
                greatest = max(greatest, of_norm if terms is None else error.greatest)
                norm = max(norm, of_norm)
            results.append(Errors(_loss_error(outcome.loss, self._loss), greatest, gradient_norm=norm))
        return results


class RowsReference(LinearReference):
    """The mean of a loss of each row, of ``ROWS``, and the gradients of hidden states and head, in float64."""

    def __init__(self, op: str, inputs: Any, upstream: float = 1.0) -> None:
        hidden, head, *others = inputs
        self._elements, self._loss = _LINEAR_ELEMENTS.get(hidden.device.type, 1 << 21), 0.0
        self._exact = tuple(torch.zeros_like(each, dtype=torch.float64) for each in (hidden, head))
        self._terms = (None, None)
        w = head.detach().double().requires_grad_()
        for part in _parts(len(hidden), len(head), self._elements):
            x = hidden.detach()[part].double().requires_grad_()
            rows = [each[part].double() if each.is_floating_point() else each[part] for each in others]
            loss = ROWS[op](x, w, *rows).sum() / len(hidden)
            self._loss += float(loss.detach())
            gradients = torch.autograd.grad(loss * upstream, (x, w))
            self._exact[0][part] = gradients[0]
            self._exact[1].add_(gradients[1])


class _GradientError:
    """The errors of a gradient, added up of parts of its rows."""

    def __init__(self, gradients: tuple[Tensor, ...], shape: torch.Size) -> None:
        self._gradients = tuple(gradient for gradient in gradients if gradient.shape == shape)
        self.greatest = 0.0 if len(self._gradients) == len(gradients) else math.inf
        self.squares = self.greatest  # of the difference's norm

    def add(self, part: slice, exact: Tensor, terms: Tensor | None) -> None:
        for gradient in self._gradients:
            error = gradient[part] - exact
            self.squares += float(torch.linalg.vector_norm(error)) ** 2
            if terms is not None:
                greatest = float(torch.linalg.vector_norm(error.div_(terms), math.inf))
                self.greatest = max(self.greatest, _finite(greatest))


def _loss_error(loss: Tensor | None, exact: float) -> float:
    return 0.0 if loss is None else _finite(abs(float(loss.detach()) - exact) / max(abs(exact), 1e-300))


def _accuracy_error(accuracies: tuple[Tensor, ...], shares: Sequence[tuple[float, float]]) -> float:
    values = [_finite(float(accuracy)) for accuracy in accuracies]
    errors = [max(low - share, share - high) for share, (low, high) in zip(values, shares, strict=True)]
    return max(0.0, *errors) if errors else 0.0


def _finite(error: float) -> float:
    """Return infinity for NaN, which compares as neither greater nor less."""
    return math.inf if math.isnan(error) else error


def _parts(rows: int, columns: int, elements: int) -> Iterator[slice]:
    step = max(1, elements // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def errors_of_eager(
    inputs: Any, op: str, reference: Callable[[Any], LossReference | LinearReference], upstream: float = 1.0
) -> Errors:
    """Return eager PyTorch's errors, on as many of the first rows as it has memory for.

    Args:
        inputs: as :class:`LossInputs` or :class:`LinearInputs`.
        op: the operation.
        reference: makes the reference of those rows.
        upstream: the gradient of the loss.
    """
    call, rows = operation(CONTENDERS[REFERENCE].load(), op, upstream), len(inputs.target)
    while True:
        first = inputs if rows == len(inputs.target) else inputs.first(rows)
        try:
            return reference(first).errors(call(*first))[0]
        except Exception as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
            rows //= 2


def verdict(errors: Errors, reference: Errors, dtype: torch.dtype) -> str | None:
    """Return the greatest error that the rule does not allow, in words; None if there is none."""
    slack = UNITS * torch.finfo(dtype).eps
    for name, error, of_reference in zip(("loss", "gradient"), errors[:2], reference[:2], strict=True):
        allowed = TIMES_REFERENCE * of_reference + slack
        if not error <= allowed:
            return f"{name} off by {error:.1e} of its size, {allowed:.1e} is allowed"
    if not errors.accuracy <= SHARE_SLACK:
        return f"accuracy off by {errors.accuracy:.2%} of the rows"
    return None
