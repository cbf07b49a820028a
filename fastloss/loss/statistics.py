r"""The loss and other numbers of each row that a trainer logs or trains on, all from one visit to the logits.

All parts are the outputs of one autograd node, so that each may have an upstream gradient of its own; backward is one
more visit (the formulas are in ``backends/eager/statistics.py``). The numbers of a row are float64 meanwhile, so that
lse − z_y loses nothing. Since the gradient is computed in backward, float16's loss scale is known before anything is
rounded.

Tracing, function transforms, tiny tensors on a CPU and derivatives past the first take plain torch operations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import checks
from ..backends import choice, short_road
from ..backends.contract import (
    Backend,
    LossInputs,
    LossOptions,
    PartUpstreams,
    Statistics,
    WantedParts,
    compute_dtype,
)
from ..backends.torch_private import legacy_reduction
from ..backends.view import as_labels, as_rows, class_dim, in_memory, row_shape, wide_labels
from ..ranks import placements
from . import composite, routes, sharded
from .autograd import is_differentiable
from .functional import cross_entropy

__all__ = ["LossStatistics", "cross_entropy_with_statistics"]


class LossStatistics(NamedTuple):
    """The result of :func:`cross_entropy_with_statistics`; a part that was not asked for is None."""

    loss: Tensor
    z_loss: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    predicted: Tensor | None
    correct: Tensor | None
    log_sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None
    selected: Tensor | None = None


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
    log_sum_sq_probs: bool = False,
    mean_logit: bool = False,
    group: Any = None,
    logit_scale: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
) -> LossStatistics:
    r"""Compute :func:`cross_entropy` and the z-loss, log-sum-exp, entropy, prediction and rightness of each row.

    One visit to the logits gives all parts that are asked for, and backward is one more, for any loss that is
    computed from them: all but ``predicted`` and ``correct`` are differentiable, and each takes any upstream
    gradient. With z = softcap(logit_scale · input) / temperature the logits, p their softmax, y a row's label and
    w_y its class weight:

        loss     as :func:`cross_entropy` has it; with reduction "none" alone, −loss is log p_y
        z_loss   λ w_y lse², λ being ``lse_square_scale``: the part of ``loss`` that it makes, reduced alike
        lse      log Σ_c exp(z_c)
        entropy  H = lse − Σ_c p_c z_c = −Σ_c p_c log p_c, where 0 · log 0 is 0
        predicted  the class of the greatest logit, the first of equal ones; NaN is the greatest value
        correct  predicted = y, and y is not ignored
        log_sum_sq_probs  log Σ_c p_c², from −log C of a flat row to 0 of a certain one
        mean_logit  the mean of z over the C classes

    All but the first two have one element per row, and all of these but ``correct`` are given for ignored rows too. A
    row that holds NaN or +inf has NaN for all numbers but ``mean_logit``, which is what :func:`torch.mean` gives;
    −inf, a class that can't be chosen, is ordinary, and makes ``mean_logit`` −inf.

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
        z_loss, lse, entropy, predicted, correct, log_sum_sq_probs, mean_logit: which parts to compute. The others
            are None and cost nothing.
        lse_square_scale: λ of the z-loss, which ``loss`` contains.
        softcap: softcap(x) = softcap · tanh(x / softcap); x for None. The prediction is that of ``input``.
        logit_scale, temperature: as in :func:`cross_entropy`.
        group: each of its ranks has a shard of the classes, as in :func:`cross_entropy`; or ``input`` is a DTensor,
            as there. Each part is then that of all classes, on every rank that has the row.

    Returns:
        ``(loss, z_loss, lse, entropy, predicted, correct, log_sum_sq_probs, mean_logit, selected)``, a NamedTuple.
        ``loss`` and ``z_loss`` have the shape and dtype of :func:`cross_entropy`'s result; with reduction "none",
        where −``loss`` is a log-probability, float32 for 16 bits. The others have the labels' shape: ``predicted`` in
        int64, ``correct`` in bool, the rest in float32 (float64 for float64 logits).
        ``selected`` is of :func:`linear_cross_entropy_with_statistics`, and None here.

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
    switches = (z_loss, lse, entropy, predicted, correct, log_sum_sq_probs, mean_logit)
    call = None
    if not torch.compiler.is_compiling() and short_road.is_open and group is size_average is reduce is None:
        given: tuple[Any, ...] = ("statistics", ignore_index, reduction, label_smoothing, lse_square_scale, softcap)
        given += (logit_scale, temperature, *switches)
        served, call = short_road.serve(input, target, weight, given, logit_scale, temperature)
        if served is not None:
            return _in_rows(served, input, reduction)
    if checks.is_symbolic(input, target):
        return checks.symbolic(cross_entropy_with_statistics, locals())
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    options = sharded.checked(
        *(group, input, checks.checked_options),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        logits=input,
    )
    wanted = WantedParts(*switches)
    sharded.checked(group, input, checks.check_switches, **wanted._asdict())
    if group is not None or placements.is_uncompiled_dtensor(input):
        of_ranks = sharded.statistics_over_ranks(input, target, weight, options, wanted, group, _of_whole_rows)
        return LossStatistics(*map(of_ranks.get, LossStatistics._fields))  # type: ignore[arg-type]
    checks.check_logits(input)
    if isinstance(target, Tensor) and checks.is_soft(input, target):
        return _of_probabilities(input, target, weight, options, wanted)
    traced = routes.is_traced(input, target)
    look = not traced and isinstance(target, Tensor) and choice.may_look(target)
    checks.check_tensors(input, target, weight, options.ignore_index, look=look)
    if call is not None and look:
        call.check = routes.check_of_values(input, target, options)
    small = routes.is_small(input, target, weight, routes.WIDENED_TYPES)
    if traced or small or input.numel() == 0 or routes.has_too_many_rows(input):
        target = target.view(()) if input.dim() == 1 else target
        return _composed(input, target, weight, options, wanted)

    dtype = checks.parts_dtype(checks.loss_dtype(input, target, weight), reduction)
    run = _fused(input, target, weight, options, wanted, dtype)
    parts = run() if call is None else call.recorded((input, target, weight, *options.scalars()), run)
    return _in_rows(parts, input, reduction)


def _fused(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    wanted: WantedParts,
    loss_dtype: torch.dtype,
) -> Callable[[], Sequence[Any]]:
    """Return what visits the logits and returns the parts, flat."""
    class_weight = None if weight is None else in_memory(weight.detach()).contiguous()
    backend = choice.load(choice.choose(input))
    arguments = as_labels(target), class_weight, options, backend, wanted, loss_dtype
    if input.requires_grad and torch.is_grad_enabled():
        return functools.partial(_Statistics.apply, input, *arguments)
    return functools.partial(_visited, input, *arguments)


def _of_whole_rows(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, wanted: WantedParts
) -> dict[str, Tensor | None]:
    """Return the parts of rows that this rank has all classes of, with losses in float64."""
    if input.numel() == 0 or routes.has_too_many_rows(input):
        return _composed(input, target, weight, options, wanted)._asdict()
    parts = _fused(input, target, weight, options, wanted, torch.float64)()
    return dict(zip(LossStatistics._fields, parts, strict=False))


def _in_rows(parts: Sequence[Any], input: Tensor, reduction: str) -> LossStatistics:
    """Return parts that are flat in the labels' shape."""
    if input.dim() == 2:
        return LossStatistics(*parts)
    losses, rows = (parts[:2], parts[2:]) if reduction != "none" else ((), parts)
    return LossStatistics(*losses, *(None if part is None else routes.in_rows(part, input) for part in rows))


def _of_probabilities(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, wanted: WantedParts
) -> LossStatistics:
    """Return the parts for class probabilities. Only the loss and the z-loss need more than the logits."""
    target = target.to(checks.parts_dtype(target.dtype, options.reduction))  # the loss has its dtype
    loss = cross_entropy(
        *(input, target, weight, None, options.ignore_index, None, options.reduction, options.label_smoothing),
        lse_square_scale=options.lse_square_scale,
        softcap=options.softcap,
        **options.scales(),
    )
    if not any(wanted):
        return LossStatistics(loss, *[None] * len(wanted))
    dim, shape = class_dim(input), row_shape(input)
    labels = target.argmax(dim) if wanted.correct else torch.zeros(shape, dtype=torch.int64, device=input.device)
    # No row is ignored, and the loss of these labels is not used.
    of_rows = dataclasses.replace(options, ignore_index=-1)
    wanted_rows = wanted._replace(z_loss=False, lse=wanted.lse or wanted.z_loss)
    if routes.is_traced(input, target) or input.numel() == 0 or routes.is_small(input, labels):
        rows = _composed_rows(input, labels, of_rows, wanted_rows)
    else:
        switches = wanted_rows._asdict()
        of_labels = cross_entropy_with_statistics(
            input, labels, ignore_index=-1, softcap=options.softcap, **switches, **options.scales()
        )
        rows = _Rows(*(getattr(of_labels, name) for name in _Rows._fields))
    z_loss = None
    if wanted.z_loss and rows.lse is not None:
        mass = target.to(rows.lse.dtype)
        if weight is not None:
            mass = mass * composite.by_class(weight.to(rows.lse.dtype), input)
        value = options.lse_square_scale * rows.lse.square() * mass.sum(dim)
        z_loss = composite.reduced(value, None, options.reduction).to(loss.dtype)
    return LossStatistics(loss, z_loss, rows.lse if wanted.lse else None, *rows[1:])


# ------------------------------------------------------------------------------------------------ plain operations


def _composed(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, wanted: WantedParts
) -> LossStatistics:
    """Return the parts from torch's own differentiable operations."""
    target = wide_labels(target)
    dtype = checks.parts_dtype(checks.loss_dtype(input, target, weight), options.reduction)
    loss = composite.cross_entropy(input, target, weight, options, dtype)
    parts = _composed_rows(input, target, options, wanted)
    z_loss = None
    if wanted.z_loss and parts.lse is not None:
        counted, row_weight = composite.row_weight(target, weight, parts.lse.dtype, options)
        value = options.lse_square_scale * torch.where(counted, parts.lse, 0.0).square() * row_weight
        z_loss = composite.reduced(value, row_weight, options.reduction).to(loss.dtype)
    return LossStatistics(loss, z_loss, parts.lse if wanted.lse else None, *parts[1:])


class _Rows(NamedTuple):
    """The parts that have one element per row, of the labels' shape."""

    lse: Tensor | None
    entropy: Tensor | None
    predicted: Tensor | None
    correct: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logit: Tensor | None


def _composed_rows(input: Tensor, target: Tensor, options: LossOptions, wanted: WantedParts) -> _Rows:
    """Return the rows' parts from torch's own operations; lse where the z-loss needs it, too."""
    dim, lse, entropy, predicted, correct = class_dim(input), None, None, None, None
    z = composite.scaled(input.to(compute_dtype(input.dtype)), options)
    if wanted.lse or wanted.z_loss:
        lse = torch.logsumexp(z, dim)
        lse = torch.where(lse == torch.inf, float("nan"), lse)  # as in the loss and in the kernels
    log_p = torch.log_softmax(z, dim) if wanted.entropy or wanted.log_sum_sq_probs else None
    log_sum_sq_probs = torch.logsumexp(2 * log_p, dim) if wanted.log_sum_sq_probs and log_p is not None else None
    if wanted.entropy and log_p is not None:
        # A masked logit's p and its derivatives are 0, and so must be their products with log p.
        entropy = -(log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)).sum(dim)
    if wanted.predicted or wanted.correct:
        predicted, labels = input.detach().argmax(dim), wide_labels(target)
        correct = (predicted == labels) & (labels != options.ignore_index) if wanted.correct else None
    mean_logit = z.mean(dim) if wanted.mean_logit else None
    return _Rows(lse, entropy, predicted if wanted.predicted else None, correct, log_sum_sq_probs, mean_logit)


# ------------------------------------------------------------------------------------------------- the autograd node


def _visited(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    backend: Backend,
    wanted: WantedParts,
    loss_dtype: torch.dtype,
) -> Sequence[Any]:
    """Return the parts, flat, without a graph."""
    inputs = LossInputs(as_rows(input), target, weight, options)
    return backend.statistics_forward(inputs, wanted, loss_dtype=loss_dtype)[:-1]


class _Statistics(Function):
    """(input, target, weight, options, backend, wanted parts, dtype of the loss) → the parts, flat."""

    # A backward pass at upstream gradients of these outputs, which are all, may be: backends/short_road.py.
    replayed = len(Statistics._fields) - 1

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
        weight, options, backend, wanted, loss_dtype = arguments
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        inputs = LossInputs(as_rows(input), target, weight, options)
        *parts, saved = backend.statistics_forward(inputs, wanted, loss_dtype=loss_dtype)
        ctx.mark_non_differentiable(*(part for part in parts[4:6] if part is not None))
        ctx.save_for_backward(input, target, weight, *options.scalars(), *saved)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        # The prediction has no gradient.
        upstreams, nothing = PartUpstreams(*upstreams[:4], *upstreams[6:]), (None,) * 6
        if all(upstream is None for upstream in upstreams):
            return (None, *nothing)
        input, target, weight, *saved = ctx.saved_tensors
        options, saved = ctx.options.with_scalars(saved)
        if is_differentiable(upstreams):
            return (_differentiable_gradient(input, target, weight, options, upstreams), *nothing)
        upstreams = PartUpstreams(*(None if upstream is None else in_memory(upstream) for upstream in upstreams))
        inputs = LossInputs(as_rows(input), target, weight, options)
        return (ctx.backend.statistics_backward(upstreams, inputs, saved).view(input.shape), *nothing)


def _differentiable_gradient(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    upstreams: PartUpstreams,
) -> Tensor:
    """Return the gradient as a function of ``input`` and the upstreams that autograd can differentiate again."""
    create_graph, dtype = torch.is_grad_enabled(), compute_dtype(input.dtype)
    if not create_graph:
        input = input.detach().requires_grad_()
    with torch.enable_grad():
        target, x = wide_labels(target).view(row_shape(input)), input.to(dtype)
        if not target.is_cpu:  # no operator of torch takes a label out of bounds: its row is NaN
            classes = input.shape[class_dim(input)]
            invalid = (target != options.ignore_index) & ((target < 0) | (target >= classes))
            target = target.masked_fill(invalid, 0)
            x = x * torch.where(invalid, float("nan"), 1.0).unsqueeze(class_dim(input)).to(dtype)
        named = {name: upstream for name, upstream in upstreams._asdict().items() if upstream is not None}
        wanted = WantedParts(**{name: name in named for name in WantedParts._fields})
        parts = _composed(x, target, None if weight is None else weight.to(dtype), options, wanted)
        numbers = [getattr(parts, name).view(upstream.shape) for name, upstream in named.items()]
        given = [upstream.to(dtype) for upstream in named.values()]
        (gradient,) = torch.autograd.grad(numbers, input, given, create_graph=create_graph)
    return gradient
