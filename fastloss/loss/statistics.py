r"""The loss together with what a trainer logs or trains on beside it, all from one visit to the logits.

The visit gives a few numbers a row: lse, the label's logit z_y, and as needed H = lse − Σ p z, Σ_c w_c z_c and the
predicted class. They are the outputs of one autograd node, and the losses are put together from them in ordinary
torch operations, N numbers at a time:

    loss_row  =  w_y (1−ε) (lse − z_y)  +  λ w_y lse²  +  ε/C (W lse − Σ_c w_c z_c)

So each part may have an upstream gradient of its own: however they are used, what arrives at the node is one
coefficient a row for each number, and backward is one more visit (the formula is in
``backends/eager/statistics.py``). The numbers are float64, so that lse − z_y loses nothing. Since the gradient is
computed in backward, float16's loss scale is known before anything is rounded.

Tracing, function transforms, tiny tensors on a CPU and derivatives past the first take plain torch operations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import _reduction as legacy

from .. import checks
from ..backends import choice
from ..backends.contract import Backend, LossOptions, RowStatistics, compute_dtype
from ..backends.view import as_labels, as_rows, class_dim, row_shape
from . import composite, routes
from .autograd import is_differentiable
from .row_numbers import LabelLosses

__all__ = ["LossStatistics", "cross_entropy_with_statistics"]


class LossStatistics(NamedTuple):
    """The result of :func:`cross_entropy_with_statistics`; what was not asked for is None."""

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
    r""":func:`cross_entropy`, and with it the z-loss, log-sum-exp, entropy, prediction and rightness of each row.

    One visit to the logits gives all that is asked for, and backward is one more, whatever the loss that is made of
    the parts: ``loss``, ``z_loss``, ``lse`` and ``entropy`` are differentiable, and each takes any upstream gradient.
    With z the logits (after the softcap), p their softmax, y a row's label and w_y its class weight:

        loss     as :func:`cross_entropy` has it; with reduction "none" alone, −loss is log p_y
        z_loss   λ w_y lse², λ being ``lse_square_scale``: the part of ``loss`` that it makes, reduced alike
        lse      log Σ_c exp(z_c)
        entropy  H = lse − Σ_c p_c z_c = −Σ_c p_c log p_c, where 0 · log 0 is 0
        predicted  the class of the greatest logit, the first of equal ones; NaN is the greatest value
        correct  predicted = y, and y is not ignored

    The last four are given a row, and the first three of those for ignored rows too. A row that holds NaN or +inf has
    NaN for all numbers; −inf, a class that can't be chosen, is ordinary.

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
        z_loss, lse, entropy, predicted, correct: the parts to give; False: it is None, and nothing is spent on it.
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
    if size_average is not None or reduce is not None:
        reduction = legacy.legacy_get_string(size_average, reduce)
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
    if traced or input.numel() == 0 or routes.has_too_many_rows(input) or routes.is_small(input, target, weight):
        return _composed(input, target, weight, options, wanted)

    every_row = lse or entropy or predicted
    labels = as_labels(target)
    rows = _row_statistics(input, labels, weight, options, entropy, predicted or correct, every_row)
    losses = LabelLosses(rows, labels, weight, options, input.shape[class_dim(input)])
    loss_dtype = checks.loss_dtype(input, target, weight)
    loss, of_lse = losses.loss().to(loss_dtype), losses.z_loss().to(loss_dtype) if z_loss else None
    if not options.is_reduced:
        loss, of_lse = loss.view(target.shape), None if of_lse is None else of_lse.view(target.shape)
    dtype = compute_dtype(input.dtype)
    return LossStatistics(
        loss,
        of_lse,
        _given(rows.lse, dtype, target.shape) if lse else None,
        None if rows.entropy is None else _given(rows.entropy, dtype, target.shape),
        *_predicted_and_correct(rows.predicted, target, options.ignore_index, wanted),
    )


def _given(numbers: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A row's numbers as the caller gets them: a copy, since the originals are needed in backward."""
    return numbers.view(shape).to(dtype, copy=True)


def _predicted_and_correct(
    predicted: Tensor | None, target: Tensor, ignore_index: int, wanted: _Wanted
) -> tuple[Tensor | None, Tensor | None]:
    """Each if it is wanted, of the target's shape."""
    if predicted is None:
        return None, None
    predicted = predicted.view(target.shape)
    correct = None
    if wanted.correct:
        labels = target.long()
        correct = (predicted == labels) & (labels != ignore_index)
    return predicted if wanted.predicted else None, correct


def _of_probabilities(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, wanted: _Wanted
) -> LossStatistics:
    """The same of class probabilities: :func:`cross_entropy` knows their loss, and the rest is the logits' alone."""
    loss, _ = routes.loss_and_accuracies(input, target, weight, options)
    if not any(wanted):
        return LossStatistics(loss, None, None, None, None, None)
    dim, shape = class_dim(input), row_shape(input)
    labels = target.argmax(dim) if wanted.correct else torch.zeros(shape, dtype=torch.int64, device=input.device)
    # No row is ignored, and neither the label's logit nor Σ_c w_c z_c is looked at.
    options = dataclasses.replace(options, ignore_index=-1, label_smoothing=0.0)
    traced = routes.is_traced(input, target)
    if traced or input.numel() == 0 or routes.is_small(input, labels):
        parts = _composed_rows(input, labels, options, wanted)
    else:
        argmax = wanted.predicted or wanted.correct
        rows = _row_statistics(input, labels.reshape(-1), None, options, wanted.entropy, argmax, True)
        dtype = compute_dtype(input.dtype)
        parts = _Rows(
            _given(rows.lse, dtype, shape),
            None if rows.entropy is None else _given(rows.entropy, dtype, shape),
            *_predicted_and_correct(rows.predicted, labels, -1, wanted),
        )
    z_loss = None
    if wanted.z_loss and parts.lse is not None:
        share = target.to(parts.lse.dtype)
        if weight is not None:
            share = share * composite.by_class(weight.to(parts.lse.dtype), input)
        value = options.lse_square_scale * parts.lse.square() * share.sum(dim)
        z_loss = composite.reduced(value, None, options.reduction).to(loss.dtype)
    return LossStatistics(loss, z_loss, parts.lse if wanted.lse else None, *parts[1:])


# ------------------------------------------------------------------------------------------------ plain operations


class _Rows(NamedTuple):
    """The parts that are given a row, of the target's shape."""

    lse: Tensor | None
    entropy: Tensor | None
    predicted: Tensor | None
    correct: Tensor | None


def _composed(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, wanted: _Wanted
) -> LossStatistics:
    """All of it from torch's own differentiable operations, for what no fused pass serves."""
    loss = composite.cross_entropy(input, target, weight, options, checks.loss_dtype(input, target, weight))
    parts = _composed_rows(input, target, options, wanted)
    z_loss = None
    if wanted.z_loss and parts.lse is not None:
        counted, row_weight = composite.row_weight(target, weight, parts.lse.dtype, options)
        value = options.lse_square_scale * torch.where(counted, parts.lse, 0.0).square() * row_weight
        z_loss = composite.reduced(value, row_weight, options.reduction).to(loss.dtype)
    return LossStatistics(loss, z_loss, parts.lse if wanted.lse else None, *parts[1:])


def _composed_rows(input: Tensor, target: Tensor, options: LossOptions, wanted: _Wanted) -> _Rows:
    """The parts that are given a row, and lse where the z-loss needs it."""
    plain = _PlainRows(input, options)
    predicted = input.detach().argmax(plain.dim) if wanted.predicted or wanted.correct else None
    return _Rows(
        plain.lse() if wanted.lse or wanted.z_loss else None,
        plain.entropy() if wanted.entropy else None,
        *_predicted_and_correct(predicted, target, options.ignore_index, wanted),
    )


class _PlainRows:
    """Each row's numbers from torch's own differentiable operations, in the dtype of the arithmetic."""

    def __init__(self, input: Tensor, options: LossOptions) -> None:
        self.input, self.options, self.dim = input, options, class_dim(input)

    def logits(self) -> Tensor:
        x, cap = self.input.to(compute_dtype(self.input.dtype)), self.options.softcap
        return x if cap is None else cap * torch.tanh(x / cap)

    def lse(self) -> Tensor:
        lse = torch.logsumexp(self.logits(), self.dim)
        return torch.where(lse == torch.inf, float("nan"), lse)  # as the loss is, and as the kernels have it

    def entropy(self) -> Tensor:
        log_p = torch.log_softmax(self.logits(), self.dim)
        # Of a masked logit both p and its derivatives are 0, and so must be their products with log p.
        return -(log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)).sum(self.dim)

    def label_logit(self, target: Tensor) -> Tensor:
        labels = target.long()
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
    """What a backend gives of each row, with a graph where ``input`` needs one. ``target`` is flat."""
    weight = None if weight is None else weight.detach().contiguous()
    backend = choice.load(choice.choose(input))
    if not (input.requires_grad and torch.is_grad_enabled()):
        return backend.row_statistics_forward(
            as_rows(input), target, weight, options, entropy=entropy, predicted=predicted, every_row=every_row
        )
    return RowStatistics(
        *_RowStatistics.apply(input, target, weight, options, backend, entropy, predicted, every_row)
    )


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
        entropy: bool,
        predicted: bool,
        every_row: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        rows = backend.row_statistics_forward(
            as_rows(input), target, weight, options, entropy=entropy, predicted=predicted, every_row=every_row
        )
        if rows.predicted is not None:
            ctx.mark_non_differentiable(rows.predicted)
        ctx.save_for_backward(input, target, weight, rows.lse, rows.entropy)
        return tuple(rows)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        upstreams = upstreams[:4]  # that of the prediction is None
        nothing = (None,) * 7
        if all(upstream is None for upstream in upstreams):
            return (None, *nothing)
        input, target, weight, lse, entropy = ctx.saved_tensors
        if is_differentiable(upstreams):
            return (_differentiable_gradient(input, target, weight, ctx.options, upstreams), *nothing)
        gradient = ctx.backend.row_statistics_backward(
            upstreams, as_rows(input), target, weight, ctx.options, lse, entropy
        )
        return (gradient.view(input.shape), *nothing)


def _differentiable_gradient(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    upstreams: tuple[Tensor | None, ...],
) -> Tensor:
    """The gradient as a function of ``input`` and the upstream gradients that autograd can differentiate again."""
    create_graph = torch.is_grad_enabled()
    if not create_graph:
        input = input.detach().requires_grad_()
    of_lse, of_label, of_entropy, of_sum = upstreams
    numbers, given = [], []
    with torch.enable_grad():
        plain = _PlainRows(input, options)
        if of_lse is not None:
            numbers.append(plain.lse())
            given.append(of_lse)
        if of_label is not None:
            numbers.append(plain.label_logit(target.view(row_shape(input))))
            given.append(of_label)
        if of_entropy is not None:
            numbers.append(plain.entropy())
            given.append(of_entropy)
        if of_sum is not None:
            numbers.append(plain.weighted_sum(weight))
            given.append(of_sum)
        flat = [number.flatten() for number in numbers]
        given = [upstream.to(flat[0].dtype) for upstream in given]
        (gradient,) = torch.autograd.grad(flat, input, given, create_graph=create_graph)
    return gradient
