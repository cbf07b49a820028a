r"""The loss and other numbers of each row that a trainer logs or trains on, all from one visit to the logits.

The visit gives a few numbers per row: lse, the label's logit z_y, and as needed H = lse − Σ p z, Σ_c w_c z_c and the
predicted class. They are the outputs of one autograd node, and the losses are computed from them in ordinary torch
operations, N numbers at a time:

    loss_row  =  w_y (1−ε) (lse − z_y)  +  λ w_y lse²  +  ε/C (W lse − Σ_c w_c z_c)

So each part may have an upstream gradient of its own. At the node one coefficient per row arrives for each number,
and backward is one more visit (the formula is in ``backends/eager/statistics.py``). The numbers are float64, so that
lse − z_y loses nothing. Since the gradient is computed in backward, float16's loss scale is known before anything is
rounded.

Tracing, function transforms, tiny tensors on a CPU and derivatives past the first take plain torch operations.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import checks
from ..backends import choice
from ..backends.contract import Backend, LossInputs, LossOptions, RowStatistics, compute_dtype
from ..backends.torch_private import legacy_reduction
from ..backends.view import as_labels, as_rows, class_dim, in_memory, row_shape, wide_labels
from . import composite, routes
from .autograd import is_differentiable
from .row_numbers import LabelLosses

__all__ = ["LossStatistics", "cross_entropy_with_statistics"]


class LossStatistics(NamedTuple):
    """The result of :func:`cross_entropy_with_statistics`; a part that was not asked for is None."""

    loss: Tensor
    z_loss: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    predicted: Tensor | None
    correct: Tensor | None


class _Wanted(NamedTuple):
    """The parts that were asked for."""

    z_loss: bool
    lse: bool
    entropy: bool
    predicted: bool
    correct: bool


def cross_entropy_with_statistics(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: bool = False,
    lse: bool = False,
    entropy: bool = False,
    predicted: bool = False,
    correct: bool = False,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
) -> LossStatistics:
    r"""Compute :func:`cross_entropy` and the z-loss, log-sum-exp, entropy, prediction and rightness of each row.

    One visit to the logits gives all parts that are asked for, and backward is one more, for any loss that is
    computed from them: ``loss``, ``z_loss``, ``lse`` and ``entropy`` are differentiable, and each takes any upstream
    gradient. With z the logits (after the softcap), p their softmax, y a row's label and w_y its class weight:

        loss     as :func:`cross_entropy` has it; with reduction "none" alone, −loss is log p_y
        z_loss   λ w_y lse², λ being ``lse_square_scale``: the part of ``loss`` that it makes, reduced alike
        lse      log Σ_c exp(z_c)
        entropy  H = lse − Σ_c p_c z_c = −Σ_c p_c log p_c, where 0 · log 0 is 0
        predicted  the class of the greatest logit, the first of equal ones; NaN is the greatest value
        correct  predicted = y, and y is not ignored

    The last four have one element per row, and the first three of them are given for ignored rows too. A row that
    holds NaN or +inf has NaN for all numbers; −inf, a class that can't be chosen, is ordinary.

    Args:
        input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, …)``; float16, bfloat16, float32 or float64; any strides.
        target: class indices in [0, C), or ``ignore_index``; ``()``, ``(N,)`` or ``(N, d1, …)``; int64, int32 or
            uint8. Or class probabilities of ``input``'s shape, where :func:`cross_entropy` takes them: then
            ``correct`` is whether the prediction is the most probable class, and no row is ignored.
        weight: a weight for each class, ``(C,)``, in ``input``'s dtype (or float32 beside 16-bit logits).
        size_average, reduce: torch's deprecated forms of ``reduction``.
        ignore_index: a label whose rows count neither in the losses nor in their mean, and are never correct.
        reduction: of ``loss`` and ``z_loss``: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: ε, in [0, 1].
        z_loss, lse, entropy, predicted, correct: which parts to compute. The others are None and cost nothing.
        lse_square_scale: λ of the z-loss, which ``loss`` contains.
        softcap: z = softcap · tanh(input / softcap). The prediction is that of ``input``.

    Returns:
        ``(loss, z_loss, lse, entropy, predicted, correct)``, a NamedTuple. ``loss`` and ``z_loss`` have the shape and
        dtype of :func:`cross_entropy`'s result. The others have the labels' shape: ``lse`` and ``entropy`` in float32
        (float64 for float64 logits), ``predicted`` in int64, ``correct`` in bool.

    Raises:
        TypeError, ValueError, RuntimeError: arguments that don't fit, as torch raises them.
        IndexError: a label out of bounds, on a CPU. On a GPU the row's loss and its gradient are NaN instead;
            ``FASTLOSS_VALIDATE=1`` in the environment raises there too.

    Example:
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]], requires_grad=True)
        >>> parts = cross_entropy_with_statistics(logits, torch.tensor([0, 1]), entropy=True, correct=True)
        >>> parts.loss, parts.correct
        (tensor(0.6716, grad_fn=<NllLossBackward0>), tensor([ True, False]))
        >>> parts.entropy.detach()
        tensor([0.6216, 1.0953])
        >>> (parts.loss - 0.01 * parts.entropy.mean()).backward()  # an entropy bonus
        >>> logits.grad
        tensor([[-0.1057,  0.0867,  0.0190],
                [ 0.1501, -0.3339,  0.1838]])
    """
    if checks.is_symbolic(input, target):
        return checks.symbolic(cross_entropy_with_statistics, locals())
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    options = checks.checked_options(
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
    )
    checks.check_switches(z_loss=z_loss, lse=lse, entropy=entropy, predicted=predicted, correct=correct)
    wanted = _Wanted(z_loss, lse, entropy, predicted, correct)
    checks.check_logits(input)
    if isinstance(target, Tensor) and checks.is_soft(input, target):
        return _of_probabilities(input, target, weight, options, wanted)
    traced = routes.is_traced(input, target)
    look = not traced and isinstance(target, Tensor) and choice.may_look(target)
    checks.check_tensors(input, target, weight, options.ignore_index, look=look)
    target = target.view(()) if input.dim() == 1 else target
    small = routes.is_small(input, target, weight, routes.WIDENED_TYPES)
    if traced or small or input.numel() == 0 or routes.has_too_many_rows(input):
        return _composed(input, target, weight, options, wanted)

    labels, every_row = as_labels(target), lse or entropy or predicted
    numbers = _row_statistics(input, labels, weight, options, entropy, predicted or correct, every_row)
    losses = LabelLosses(numbers, labels, weight, options, input.shape[class_dim(input)])
    dtype = checks.loss_dtype(input, target, weight)
    loss, of_lse = losses.loss().to(dtype), losses.z_loss().to(dtype) if z_loss else None
    if not options.is_reduced:
        loss, of_lse = loss.view(target.shape), None if of_lse is None else of_lse.view(target.shape)
    return LossStatistics(loss, of_lse, *_rows_of_visit(numbers, input, target, options, wanted, lse=lse))


def _of_probabilities(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, wanted: _Wanted
) -> LossStatistics:
    """Return the parts for class probabilities. Only the loss and the z-loss need more than the logits."""
    loss, _ = routes.loss_and_accuracies(input, target, weight, options)
    if not any(wanted):
        return LossStatistics(loss, None, None, None, None, None)
    dim, shape = class_dim(input), row_shape(input)
    labels = target.argmax(dim) if wanted.correct else torch.zeros(shape, dtype=torch.int64, device=input.device)
    # No row is ignored, and neither the label's logit nor Σ_c w_c z_c is used.
    of_rows = dataclasses.replace(options, ignore_index=-1, label_smoothing=0.0)
    if routes.is_traced(input, target) or input.numel() == 0 or routes.is_small(input, labels):
        parts = _composed_rows(input, labels, of_rows, wanted)
    else:
        argmax = wanted.predicted or wanted.correct
        numbers = _row_statistics(input, labels.reshape(-1), None, of_rows, wanted.entropy, argmax, True)
        parts = _rows_of_visit(numbers, input, labels, of_rows, wanted, lse=True)
    z_loss = None
    if wanted.z_loss and parts.lse is not None:
        mass = target.to(parts.lse.dtype)
        if weight is not None:
            mass = mass * composite.by_class(weight.to(parts.lse.dtype), input)
        value = options.lse_square_scale * parts.lse.square() * mass.sum(dim)
        z_loss = composite.reduced(value, None, options.reduction).to(loss.dtype)
    return LossStatistics(loss, z_loss, parts.lse if wanted.lse else None, *parts[1:])


class _Rows(NamedTuple):
    """The parts that have one element per row, of the labels' shape."""

    lse: Tensor | None
    entropy: Tensor | None
    predicted: Tensor | None
    correct: Tensor | None


def _rows_of_visit(
    numbers: RowStatistics, input: Tensor, target: Tensor, options: LossOptions, wanted: _Wanted, *, lse: bool
) -> _Rows:
    """Return the rows' parts from the numbers that a backend gave: copies, since backward needs the numbers."""

    def given(number: Tensor) -> Tensor:
        return number.view(target.shape).to(compute_dtype(input.dtype), copy=True)

    return _Rows(
        given(numbers.lse) if lse else None,
        None if numbers.entropy is None else given(numbers.entropy),
        *_predicted_and_correct(numbers.predicted, target, options.ignore_index, wanted),
    )


def _predicted_and_correct(
    predicted: Tensor | None, target: Tensor, ignore_index: int, wanted: _Wanted
) -> tuple[Tensor | None, Tensor | None]:
    """Return the predicted class and whether it is right, of the target's shape; None where it is not wanted."""
    if predicted is None:
        return None, None
    predicted = predicted.view(target.shape)
    correct = None
    if wanted.correct:
        labels = wide_labels(target)
        correct = (predicted == labels) & (labels != ignore_index)
    return predicted if wanted.predicted else None, correct


# ------------------------------------------------------------------------------------------------ plain operations


def _composed(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, wanted: _Wanted
) -> LossStatistics:
    """Return the parts from torch's own differentiable operations."""
    target = wide_labels(target)
    loss = composite.cross_entropy(input, target, weight, options, checks.loss_dtype(input, target, weight))
    parts = _composed_rows(input, target, options, wanted)
    z_loss = None
    if wanted.z_loss and parts.lse is not None:
        counted, row_weight = composite.row_weight(target, weight, parts.lse.dtype, options)
        value = options.lse_square_scale * torch.where(counted, parts.lse, 0.0).square() * row_weight
        z_loss = composite.reduced(value, row_weight, options.reduction).to(loss.dtype)
    return LossStatistics(loss, z_loss, parts.lse if wanted.lse else None, *parts[1:])


def _composed_rows(input: Tensor, target: Tensor, options: LossOptions, wanted: _Wanted) -> _Rows:
    """Return the rows' parts from torch's own operations; lse where the z-loss needs it, too."""
    plain = _PlainRows(input, options)
    predicted = input.detach().argmax(plain.dim) if wanted.predicted or wanted.correct else None
    return _Rows(
        plain.lse() if wanted.lse or wanted.z_loss else None,
        plain.entropy() if wanted.entropy else None,
        *_predicted_and_correct(predicted, target, options.ignore_index, wanted),
    )


class _PlainRows:
    """The numbers of each row, from torch's own differentiable operations, in the dtype of the arithmetic."""

    def __init__(self, input: Tensor, options: LossOptions) -> None:
        self.input, self.options, self.dim = input, options, class_dim(input)

    def logits(self) -> Tensor:
        x, cap = self.input.to(compute_dtype(self.input.dtype)), self.options.softcap
        return x if cap is None else cap * torch.tanh(x / cap)

    def lse(self) -> Tensor:
        lse = torch.logsumexp(self.logits(), self.dim)
        return torch.where(lse == torch.inf, float("nan"), lse)  # as in the loss and in the kernels

    def entropy(self) -> Tensor:
        log_p = torch.log_softmax(self.logits(), self.dim)
        # A masked logit's p and its derivatives are 0, and so must be their products with log p.
        return -(log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)).sum(self.dim)

    def label_logit(self, target: Tensor) -> Tensor:
        labels = wide_labels(target)
        usable = (labels != self.options.ignore_index) & (labels >= 0) & (labels < self.input.shape[self.dim])
        return self.logits().gather(self.dim, (labels * usable).unsqueeze(self.dim)).squeeze(self.dim)

    def weighted_sum(self, weight: Tensor | None) -> Tensor:
        z = self.logits()
        return (z if weight is None else z * composite.by_class(weight.to(z.dtype), z)).sum(self.dim)


# ------------------------------------------------------------------------------------------------- the autograd node


def _row_statistics(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    entropy: bool,
    predicted: bool,
    every_row: bool,
) -> RowStatistics:
    """Return a backend's numbers of each row, with a graph where ``input`` needs one. ``target`` is ``(rows,)``."""
    weight = None if weight is None else in_memory(weight.detach()).contiguous()
    backend = choice.load(choice.choose(input))
    switches: dict[str, Any] = {"entropy": entropy, "predicted": predicted, "every_row": every_row}
    if not (input.requires_grad and torch.is_grad_enabled()):
        return backend.row_statistics_forward(LossInputs(as_rows(input), target, weight, options), **switches)
    return RowStatistics(*_RowStatistics.apply(input, target, weight, options, backend, switches))


class _RowStatistics(Function):
    """(input, …) → the fields of RowStatistics."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        backend: Backend,
        switches: dict[str, Any],
    ) -> tuple[Tensor | None, ...]:
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        rows = backend.row_statistics_forward(LossInputs(as_rows(input), target, weight, options), **switches)
        if rows.predicted is not None:
            ctx.mark_non_differentiable(rows.predicted)
        ctx.save_for_backward(input, target, weight, rows.lse, rows.entropy)
        return tuple(rows)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        upstreams = upstreams[:4]  # the prediction has none
        nothing = (None,) * 5
        if all(upstream is None for upstream in upstreams):
            return (None, *nothing)
        input, target, weight, lse, entropy = ctx.saved_tensors
        if is_differentiable(upstreams):
            return (_differentiable_gradient(input, target, weight, ctx.options, upstreams), *nothing)
        upstreams = tuple(None if upstream is None else in_memory(upstream) for upstream in upstreams)
        inputs = LossInputs(as_rows(input), target, weight, ctx.options)
        gradient = ctx.backend.row_statistics_backward(upstreams, inputs, lse, entropy, inplace=False)
        return (gradient.view(input.shape), *nothing)


def _differentiable_gradient(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    upstreams: tuple[Tensor | None, ...],
) -> Tensor:
    """Return the gradient as a function of ``input`` and the upstreams that autograd can differentiate again."""
    create_graph = torch.is_grad_enabled()
    if not create_graph:
        input = input.detach().requires_grad_()
    with torch.enable_grad():
        plain = _PlainRows(input, options)
        formulas = (
            plain.lse,
            lambda: plain.label_logit(target.view(row_shape(input))),
            plain.entropy,
            lambda: plain.weighted_sum(weight),
        )
        pairs = [(formula().flatten(), up) for formula, up in zip(formulas, upstreams, strict=True) if up is not None]
        numbers = [number for number, _ in pairs]
        given = [upstream.to(number.dtype) for number, upstream in pairs]
        (gradient,) = torch.autograd.grad(numbers, input, given, create_graph=create_graph)
    return gradient
