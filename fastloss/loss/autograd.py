"""The ``torch.autograd.Function`` between the public functions and the backends.

There are two ways to the gradient:

*Written in the forward pass* (reduction "mean" and "sum"). The one visit to the logits writes the gradient at an
upstream gradient of 1, G = ∂L/∂x; backward hands G over, scaled if the upstream is not 1. The logits are not saved. G
is an *output* of the node, so that an expression of G is an expression of the logits: the second derivative is this
node's backward at an upstream gradient V of G. It needs only the softmax p, which follows from G: with G = s (A p −
b),

    H V = s A (p ∘ V − p ⟨p, V⟩),     p = (G / s + b) / A

(A and b as in ``backends/eager/cross_entropy.py``; for class probabilities S and w u). It is written in
differentiable operators, so that the third derivative follows.

Where b_c is far greater than p_c, as at the label, G / s + b cancels, and G was rounded. So the forward pass keeps
one number per row that gives p there: −log p_y of class indices, the row's loss −Σ_c b_c log p_c of class
probabilities. The latter gives p at the class of the greatest b_c, if the others' p are exact enough (with one-hot
targets, smoothed or not, they are). Rows with several great b_c, as mixup makes them, need the logits: the node holds
a weak reference to them, and p is their softmax where the program still has them as they were. Where it has not, p at
those classes is only as exact as G. If p_c is a thousandth of b_c, its error is up to a third in bfloat16, and 10⁻⁵
in float32.

Where p does not follow from G (softcap, z-loss), the logits are saved for these derivatives.

*Computed in backward, from the logits* (reduction "none"; float16, where a gradient divided by N before the loss
scale arrives would flush to zero). Derivatives past the first go through :mod:`fastloss.loss.composite`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.weak import TensorWeakRef

from ..backends.contract import Backend, LossInputs, LossOptions, WantedGradients, compute_dtype
from ..backends.torch_private import graph_is_kept, is_legacy_batched
from ..backends.view import as_rows, in_memory
from . import composite

__all__ = ["fused_cross_entropy", "gradients_from_input", "handed_over", "is_differentiable", "visit"]


def fused_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    backend: Backend,
    loss_dtype: torch.dtype,
    inplace: bool,
    divisor: Tensor | float | None = None,
    record: Callable[[Callable[[], Any]], Any] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss, with a graph where a tensor needs one, and the accuracies; ``()`` or ``(rows,)``.

    Args:
        input: ``(C,)`` or ``(N, C, …)``.
        target: labels ``(rows,)``, or class probabilities of ``input``'s shape.
        weight: of the classes, contiguous.
        options: checked.
        backend: the backend whose functions visit the logits.
        loss_dtype: of the loss.
        inplace: write the gradient over ``input``.
        divisor: goes with reduction "sum": loss and gradient, not the accuracies, are divided by it, so that these
            rows give their part of a mean over more rows. ``()`` in float64; beside class probabilities a float.
        record: called with the function that does all of this, to run it, where the call may be recorded.
    """
    if not ((input.requires_grad or target.requires_grad) and torch.is_grad_enabled()):

        def numbers() -> tuple[Any, ...]:
            result = visit(backend, input, target, weight, options, loss_dtype, gradient=None)
            return (_divided(result.loss, divisor), None, *result.accuracy)

        loss, _, *accuracy = numbers() if record is None else record(numbers)
        return loss, tuple(accuracy)
    base = input._base if input._is_view() else None
    if (
        inplace
        and input.requires_grad
        and (input.is_leaf or (base is not None and base.is_leaf and base.requires_grad))
    ):
        raise RuntimeError(
            "fastloss: inplace=True would write the gradient over a leaf tensor that requires grad, or over a "
            "view of one; pass the output of an operation, or inplace=False"
        )

    def node() -> Any:
        return _CrossEntropy.apply(input, target, weight, options, backend, loss_dtype, inplace, divisor)

    loss, _, *accuracy = node() if record is None else record(node)
    return loss, tuple(accuracy)


class Visit(NamedTuple):
    """The result of a backend's forward pass, for labels or for class probabilities."""

    loss: Tensor
    accuracy: tuple[Tensor, ...]
    gradient: Tensor | None  # of the input, in its shape
    target_gradient: Tensor | None
    saved: tuple[Tensor, ...]
    of_rows: Tensor | None  # −log p_y or, of class probabilities, the loss of each row


def visit(
    backend: Backend,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    loss_dtype: torch.dtype,
    *,
    gradient: bool | None,
    target_gradient: bool = False,
    inplace: bool = False,
    divisor: Any = None,
) -> Visit:
    """Run the backend's forward pass. The arguments are as in :func:`fused_cross_entropy`.

    ``gradient``: write it; False: a backward pass may follow; None: none does.
    """
    weight = None if weight is None else in_memory(weight)
    if not target.is_floating_point():
        result = backend.cross_entropy_forward(
            LossInputs(as_rows(input), target, weight, options),
            loss_dtype=loss_dtype,
            gradient=gradient,
            inplace=inplace,
            divisor=divisor if gradient else None,
        )
        return Visit(result.loss, result.accuracy, _like(result.gradient, input), None, result.saved, result.nll)
    soft = backend.soft_cross_entropy_forward(
        LossInputs(as_rows(input), as_rows(target), weight, options),
        WantedGradients(bool(gradient), target_gradient, inplace, later=gradient is not None),
        loss_dtype=loss_dtype,
        divisor=1.0 if divisor is None else divisor,
    )
    gradients = _like(soft.gradient, input), _like(soft.target_gradient, target)
    return Visit(soft.loss, (), *gradients, soft.saved, soft.row_loss)


def gradients_from_input(
    backend: Backend,
    upstream: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    saved: Sequence[Tensor],
    *,
    gradient: bool = True,
    target_gradient: bool = False,
    inplace: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Run the backend's backward pass; return the gradients of ``input`` and ``target``."""
    weight, upstream = None if weight is None else in_memory(weight), in_memory(upstream)
    if not target.is_floating_point():
        inputs = LossInputs(as_rows(input), target, weight, options)
        return backend.cross_entropy_backward(upstream, inputs, saved, inplace=inplace).view(input.shape), None
    inputs = LossInputs(as_rows(input), as_rows(target), weight, options)
    wanted = WantedGradients(gradient, target_gradient, inplace)
    of_logits, of_target = backend.soft_cross_entropy_backward(upstream, inputs, saved, wanted)
    return _like(of_logits, input), _like(of_target, target)


def _like(gradient: Tensor | None, tensor: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.view(tensor.shape)


def _divided(loss: Tensor, divisor: Tensor | float | None) -> Tensor:
    return loss if divisor is None else (loss / divisor).to(loss.dtype)


class _CrossEntropy(Function):
    """(input, target, …) → (loss, G or None, *accuracies).

    The gradient of class probabilities is written or computed together with G, but is no output: where they require
    grad, the logits are saved, and derivatives past the first come from those.
    """

    replayed = 1  # a backward pass at an upstream gradient of the loss alone may be: backends/short_road.py

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
        weight, options, backend, loss_dtype, inplace, divisor = arguments
        of_input, of_target = ctx.needs_input_grad[:2]
        # Where the view has to be a copy, the logits' own memory stays as it is.
        inplace = inplace and of_input and as_rows(input).data_ptr() == input.data_ptr()
        ctx.options, ctx.backend, ctx.inplace, ctx.divisor = options, backend, inplace, divisor
        ctx.set_materialize_grads(False)
        # In float16 the loss scale must be known before the gradient is rounded.
        ctx.written = options.is_reduced and torch.float16 not in (input.dtype, target.dtype)
        ctx.overwrites = inplace and ctx.written
        ctx.from_logits = not ctx.overwrites and (not ctx.written or options.hides_softmax or of_target)
        is_soft = target.is_floating_point()
        ctx.logits = _Unheld(input) if is_soft and of_input and not (ctx.overwrites or ctx.from_logits) else None
        loss, accuracy, gradient, target_gradient, saved, of_rows = visit(
            *(backend, input, target, weight, options, loss_dtype),
            gradient=ctx.written and of_input,
            target_gradient=ctx.written and of_target,
            inplace=ctx.overwrites,
            divisor=divisor,
        )
        loss = _divided(loss, divisor)
        ctx.mark_non_differentiable(*accuracy)
        if ctx.overwrites:
            torch.autograd.graph.increment_version(input)
            # An alias of the input shares its version, so that a later write over the gradient is noticed.
            ctx.save_for_backward(input.detach(), target_gradient)
            return (loss, None, *accuracy)
        logits = input if ctx.from_logits else None
        tensors = logits, target, weight, gradient, target_gradient, of_rows
        ctx.save_for_backward(*tensors, *options.scalars(), *saved)
        return (loss, gradient, *accuracy)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        of_loss, of_gradient = upstreams[:2]
        nothing = (None,) * 6
        differentiable = is_differentiable(upstreams[:2])
        if ctx.overwrites:
            if differentiable:
                raise RuntimeError(
                    "fastloss: the logits were overwritten (inplace=True), so there is no second derivative; "
                    "use inplace=False with create_graph=True"
                )
            return (*handed_over(ctx.backend, ctx.saved_tensors, of_loss), *nothing)
        input, target, weight, gradient, target_gradient, of_rows, *saved = ctx.saved_tensors
        options, saved = ctx.options.with_scalars(saved)
        if differentiable and ctx.from_logits:
            return (*_differentiable_gradients(ctx, input, target, weight, options, of_loss), *nothing)
        if not ctx.written:
            if of_loss is None:
                return (None, None, *nothing)
            of_input, of_target = ctx.needs_input_grad[:2]
            inplace = ctx.inplace and not graph_is_kept()
            gradients = gradients_from_input(
                ctx.backend,
                of_loss if ctx.divisor is None else of_loss / ctx.divisor,
                *(input, target, weight, options, saved),
                gradient=of_input,
                target_gradient=of_target,
                inplace=inplace,
            )
            if inplace:
                torch.autograd.graph.increment_version(input)
            return (*gradients, *nothing)
        if not differentiable and of_gradient is None:
            return (*handed_over(ctx.backend, (gradient, target_gradient), of_loss), *nothing)
        total = None if of_loss is None else gradient * of_loss
        if of_gradient is not None:
            find = _soft_row_terms if target.is_floating_point() else _hard_row_terms
            logits = None if ctx.logits is None else ctx.logits.recall()
            slope = options.factors(lambda number: number.to(compute_dtype(gradient.dtype))).slope
            second = _second(gradient, of_gradient, find(gradient, target, weight, ctx), slope, of_rows, logits)
            total = second if total is None else total + second
        return (total, None, *nothing)


def handed_over(
    backend: Backend, gradients: Sequence[Tensor | None], upstream: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients that the forward pass wrote, times ``upstream``; in place where autograd is done."""
    inplace = not graph_is_kept()
    upstream = None if upstream is None else in_memory(upstream)
    return tuple(
        None if g is None or upstream is None else backend.rescale(g.detach(), upstream, inplace=inplace)
        for g in gradients
    )


def is_differentiable(upstreams: Sequence[Tensor | None]) -> bool:
    """Return True if backward itself must be differentiable (``create_graph=True``).

    A batched upstream (``is_grads_batched=True``) needs the same: torch's own operators, out of place.
    """
    return torch.is_grad_enabled() or any(u is not None and is_legacy_batched(u) for u in upstreams)


class _Unheld:
    """A weak reference to a tensor as it is now."""

    of_each_call = True  # a replayed call makes its own, of its input

    def __init__(self, tensor: Tensor) -> None:
        # A view is often the argument of the call alone, and dies with it.
        base = tensor._base if tensor._is_view() and not tensor.is_neg() else None
        owner = tensor if base is None or base.dtype != tensor.dtype else base
        self._owner, self._version = TensorWeakRef(owner), tensor._version
        self._place = tensor.size(), tensor.stride(), tensor.storage_offset()
        self._memory = _memory_of(owner)

    def recall(self) -> Tensor | None:
        """Return the tensor, detached; None if it is no longer there, or was written over."""
        owner = self._owner()
        if owner is None or owner._version != self._version or _memory_of(owner) != self._memory:
            return None
        return owner.detach().as_strided(*self._place)


def _memory_of(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor's memory is: ``.data =`` and ``resize_`` move it and count as no write."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


class _RowTerms(NamedTuple):
    """The terms of G = s (A p − b), as at the top of this file."""

    level: Tensor  # A; 0 in ignored rows
    b: Tensor
    s: Tensor | float
    label: Tensor | None  # None: class probabilities


def _hard_row_terms(gradient: Tensor, target: Tensor, weight: Tensor | None, ctx: Any) -> _RowTerms:
    """Return the terms of class indices."""
    dtype, options = compute_dtype(gradient.dtype), ctx.options
    outer, classes, inner = as_rows(gradient).shape
    target = target.view(outer, 1, inner).long()
    counted = target != options.ignore_index
    label = target * (counted & (target >= 0) & (target < classes))
    w = torch.ones(classes, dtype=dtype, device=gradient.device) if weight is None else weight.to(dtype)
    w_y, eps = w[label] * counted, options.label_smoothing
    spread = counted.to(dtype) * (eps / classes)
    hit = w_y * (1 - eps)
    b = (spread * w.view(1, -1, 1)).scatter_add(1, label, hit)
    s: Tensor | float = 1.0
    if ctx.divisor is not None:
        s = ctx.divisor.reciprocal().to(dtype)
    elif options.reduction == "mean":
        total = w_y.sum()
        s = torch.where(total == 0, 1.0, total).reciprocal()  # no row counts: G is 0, and so is H
    return _RowTerms(hit + spread * w.sum(), b, s, label)


def _soft_row_terms(gradient: Tensor, target: Tensor, weight: Tensor | None, ctx: Any) -> _RowTerms:
    """Return the terms of class probabilities: b_c = w_c u_c, and A is their sum."""
    dtype = compute_dtype(gradient.dtype)
    b = as_rows(target).to(dtype)
    outer, classes, inner = b.shape
    eps = ctx.options.label_smoothing
    b = b * (1 - eps) + eps / classes
    if weight is not None:
        b = b * weight.to(dtype).view(1, -1, 1)
    s = 1.0 / (outer * inner) if ctx.options.reduction == "mean" else 1.0 / (ctx.divisor or 1.0)
    return _RowTerms(b.sum(1, keepdim=True), b, s, None)


def _second(
    gradient: Tensor,
    v: Tensor,
    terms: _RowTerms,
    slope: Tensor | float,
    of_rows: Tensor,
    logits: Tensor | None,
) -> Tensor:
    """Return H V, from G, in differentiable operators, as at the top of this file.

    Args:
        gradient: G.
        v: V.
        terms: of each row, without the scale of the logits.
        slope: the scale f of the logits, z = f x: G is f times, and H V is f² times as great.
        of_rows: −log p_y or, of class probabilities, the loss of each row.
        logits: x, if they are there.
    """
    dtype = compute_dtype(gradient.dtype)
    g, v = as_rows(gradient).to(dtype), as_rows(v).to(dtype)
    level, b, s, label = terms
    s = s * slope
    # A row of weight 0 has G = 0 and H = 0 for any p.
    known = level != 0
    p = torch.where(known, (g / s + b) / torch.where(known, level, 1.0), 0.0)
    of_rows = of_rows.view(level.shape).to(dtype)
    with torch.no_grad():
        if logits is not None:
            z = as_rows(logits).to(dtype)
            exact = ((z - z.amax(1, keepdim=True)) * slope).exp_()
            exact /= exact.sum(1, keepdim=True)  # more exact than torch's softmax of long rows
        elif label is None:
            error = torch.finfo(gradient.dtype).eps * (g / s / level).abs()
            exact = p.scatter(1, *_most_likely(p, b, of_rows, error))
        else:
            exact = p.scatter(1, label, (-of_rows).exp())
        exact = torch.where(known, exact, 0.0)
        middle = v.gather(1, exact.argmax(1, keepdim=True))  # H 1 = 0: where p is near 1, v − ⟨p, v⟩ cancels no digit
    v = v - middle
    p = exact + (p - p.detach())  # the value of the one, the derivative of the other
    result = s * slope * p * level * (v - (p * v).sum(1, keepdim=True))
    return result.view(gradient.shape).to(gradient.dtype)


def _most_likely(p: Tensor, b: Tensor, loss: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Return the class of each row's greatest b_c, and its p: by the row's loss, or as it is where that is as exact.

    Args:
        p: ``(outer, classes, inner)``, computed from G.
        b: of that shape.
        loss: −Σ_c b_c log p_c, ``(outer, 1, inner)``.
        error: of ``p``.
    """
    label = b.argmax(1, keepdim=True)
    at_label, others = b.gather(1, label), b.scatter(1, label, 0)
    least = p.clamp(min=torch.finfo(p.dtype).tiny)
    by_loss = (-(loss + torch.xlogy(others, least).sum(1, keepdim=True)) / at_label).exp()
    error_by_loss = by_loss / at_label * (others * error / least).sum(1, keepdim=True)
    return label, torch.where(error_by_loss < error.gather(1, label), by_loss, p.gather(1, label))


def _differentiable_gradients(
    ctx: Any,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    upstream: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients as functions of all three tensors that autograd can differentiate again."""
    if upstream is None:
        return None, None
    create_graph = torch.is_grad_enabled()
    if create_graph:
        # The target may be computed from the input. Each view gets its own part of the derivative alone.
        input, target = input.view_as(input), target.view_as(target)
    else:
        input = input.detach().requires_grad_(ctx.needs_input_grad[0])
        target = target.detach().requires_grad_(ctx.needs_input_grad[1])
    wanted = [t for t, needed in zip((input, target), ctx.needs_input_grad, strict=False) if needed]
    dtype = compute_dtype(input.dtype)
    with torch.enable_grad():
        rows, labels = _flat(input).to(dtype), target
        if target.is_floating_point():
            labels = _flat(target)
        elif input.dim() == 1:
            labels = target.view(())
        loss = composite.cross_entropy(rows, labels, None if weight is None else weight.to(dtype), options)
        upstream = upstream if ctx.divisor is None else upstream / ctx.divisor
        results = iter(
            torch.autograd.grad(loss, wanted, upstream.to(loss.dtype).view(loss.shape), create_graph=create_graph)
        )
    return tuple(next(results) if needed else None for needed in ctx.needs_input_grad[:2])  # type: ignore[return-value]


def _flat(tensor: Tensor) -> Tensor:
    """Return ``(rows, classes)``; ``(classes,)`` as it is."""
    return tensor if tensor.dim() == 1 else as_rows(tensor).movedim(1, -1).flatten(0, 1)
