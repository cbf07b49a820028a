"""The ``torch.autograd.Function`` between the public functions and the backends.

There are two ways to the gradient:

*Written in the forward pass* (reduction "mean" and "sum"). The one visit to the logits leaves the gradient at
an upstream gradient of 1, G = ∂L/∂x; backward hands G over, scaled if the upstream is not 1. The logits are not
kept. G is an *output* of the node, so that an expression of G is an expression of the logits: the second
derivative is this node's backward at an upstream gradient V of G. It needs only the softmax p, which G gives
back: with G = s (A p − b),

    H V = s A (p ∘ V − p ⟨p, V⟩),     p = (G / s + b) / A

(A and b as in ``backends/eager/cross_entropy.py``; for soft targets S and w u), itself written in differentiable ops,
so that the third derivative follows. Where a softcap or the z-loss hides p, the logits are kept after all, for those
derivatives.

*Computed in backward, from the logits* (reduction "none"; float16, where a gradient divided by N before the loss
scale arrives would flush to zero). Derivatives past the first go through :mod:`fastloss.loss.composite`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends.contract import Backend, LossOptions, compute_dtype
from . import composite

__all__ = ["as_labels", "as_rows", "fused_cross_entropy", "graph_is_kept", "is_differentiable"]


def fused_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    backend: Backend,
    loss_dtype: torch.dtype,
    inplace: bool,
    divisor: Tensor | float | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss (with a graph where ``input`` needs one) and the accuracies, all as ``()`` or ``(rows,)``.

    ``divisor`` goes with reduction "sum": loss and gradient, not the accuracies, are divided by it. So these rows
    give their part of a mean over more rows than they are. It is ``()`` in float64; beside a soft target a float.

    ``input`` is ``(C,)`` or ``(N, C, …)``; ``target``, unless it is soft and shaped like ``input``, and what comes
    back "a row" are flat.
    """
    soft = target.is_floating_point()
    if not ((input.requires_grad or target.requires_grad) and torch.is_grad_enabled()):
        if soft:
            loss = backend.soft_cross_entropy_forward(
                as_rows(input),
                as_rows(target),
                weight,
                options,
                loss_dtype=loss_dtype,
                gradient=False,
                target_gradient=False,
                inplace=False,
            ).loss
            return _divided(loss, divisor), ()
        result = backend.cross_entropy_forward(
            as_rows(input), target, weight, options, loss_dtype=loss_dtype, gradient=False, inplace=False
        )
        return _divided(result.loss, divisor), result.accuracy
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
    function = _SoftCrossEntropy if soft else _CrossEntropy
    loss, _, *accuracy = function.apply(input, target, weight, options, backend, loss_dtype, inplace, divisor)
    return loss, tuple(accuracy)


def _divided(loss: Tensor, divisor: Tensor | float | None) -> Tensor:
    return loss if divisor is None else (loss / divisor).to(loss.dtype)


def as_rows(input: Tensor) -> Tensor:
    """The canonical ``(outer, classes, inner)``: a view wherever strides allow one."""
    if input.dim() == 1:
        return input[None, :, None]
    if input.dim() == 2:
        return input.unsqueeze(2)
    # Not flatten(2), which a batched upstream (is_grads_batched=True) has no rule for.
    return input.reshape(*input.shape[:2], math.prod(input.shape[2:]))


def as_labels(target: Tensor) -> Tensor:
    """One label a row, in the order of :func:`as_rows`, side by side."""
    return target if target.dim() == 1 and target.is_contiguous() else target.reshape(-1).contiguous()


class _CrossEntropy(Function):
    """(input, …) → (loss, G or None, *accuracies)."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        backend: Backend,
        loss_dtype: torch.dtype,
        inplace: bool,
        divisor: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        logits = as_rows(input)
        # Where the view had to be a copy, the logits' own memory stays as it is.
        inplace = inplace and logits.data_ptr() == input.data_ptr()
        ctx.options, ctx.backend, ctx.inplace = options, backend, inplace
        ctx.set_materialize_grads(False)
        # In float16 the loss scale must be known before the gradient is rounded.
        written = options.reduction != "none" and input.dtype != torch.float16
        hides_softmax = options.softcap is not None or options.lse_square_scale != 0
        ctx.from_logits = not written or (hides_softmax and not inplace)
        result = backend.cross_entropy_forward(
            *(logits, target, weight, options),
            loss_dtype=loss_dtype,
            gradient=written,
            inplace=inplace and written,
            divisor=divisor if written else None,
        )
        loss, ctx.divisor = _divided(result.loss, divisor), divisor
        scale = result.scale if divisor is None else divisor.reciprocal()
        ctx.mark_non_differentiable(*result.accuracy)
        ctx.written = written
        gradient = None if result.gradient is None else result.gradient.view(input.shape)
        if gradient is not None and inplace:
            torch.autograd.graph.increment_version(input)
            # An alias of the input shares its version: whoever writes over the gradient is found out.
            ctx.save_for_backward(input.detach())
            return (loss, None, *result.accuracy)
        ctx.save_for_backward(input if ctx.from_logits else None, target, weight, gradient, scale, *result.saved)
        return (loss, gradient, *result.accuracy)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        of_loss, of_gradient = upstreams[:2]
        differentiable = is_differentiable(upstreams[:2])
        nothing = (None,) * 7
        if ctx.inplace and ctx.written:
            _refuse_second_derivative(upstreams[:2])
            return (*_handed_over(ctx, ctx.saved_tensors, of_loss), *nothing)

        input, target, weight, gradient, scale, *saved = ctx.saved_tensors
        if differentiable and ctx.from_logits:
            return (*_differentiable_gradients(ctx, input, target, weight, of_loss), *nothing[1:])
        if not ctx.written:
            if of_loss is None:
                return (None, *nothing)
            result = ctx.backend.cross_entropy_backward(
                of_loss if ctx.divisor is None else of_loss / ctx.divisor,
                as_rows(input),
                target,
                weight,
                ctx.options,
                saved,
                inplace=ctx.inplace and not graph_is_kept(),
            )
            if ctx.inplace and not graph_is_kept():
                torch.autograd.graph.increment_version(input)
            return (result.view(input.shape), *nothing)

        if not differentiable and of_gradient is None:
            return (*_handed_over(ctx, (gradient,), of_loss), *nothing)
        total = None if of_loss is None else gradient * of_loss
        if of_gradient is not None:
            slopes = _hard_slopes(gradient, target, weight, ctx.options, scale)
            second = _second(gradient, of_gradient, *slopes)
            total = second if total is None else total + second
        return (total, *nothing)


class _SoftCrossEntropy(Function):
    """(input, soft target, …) → (loss, G or None): as :class:`_CrossEntropy`, with a gradient for the target too.

    That one is written or computed together with G, but is no output: derivatives past the first of a target that
    requires grad come from the logits, which are kept then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        backend: Backend,
        loss_dtype: torch.dtype,
        inplace: bool,
        divisor: float | None,
    ) -> tuple[Tensor | None, ...]:
        of_input, of_target = ctx.needs_input_grad[:2]
        logits, soft = as_rows(input), as_rows(target)
        inplace = inplace and of_input and logits.data_ptr() == input.data_ptr()
        ctx.options, ctx.backend, ctx.inplace = options, backend, inplace
        ctx.set_materialize_grads(False)
        ctx.written = options.reduction != "none" and torch.float16 not in (input.dtype, target.dtype)
        hides_softmax = options.softcap is not None or options.lse_square_scale != 0 or not options.from_logits
        overwrites = inplace and ctx.written
        ctx.from_logits = not overwrites and (not ctx.written or hides_softmax or of_target)
        result = backend.soft_cross_entropy_forward(
            logits,
            soft,
            weight,
            options,
            loss_dtype=loss_dtype,
            gradient=ctx.written and of_input,
            target_gradient=ctx.written and of_target,
            inplace=overwrites,
            divisor=1.0 if divisor is None else divisor,
        )
        loss, ctx.divisor = _divided(result.loss, divisor), divisor
        gradient = None if result.gradient is None else result.gradient.view(input.shape)
        target_gradient = None if result.target_gradient is None else result.target_gradient.view(target.shape)
        if overwrites:
            torch.autograd.graph.increment_version(input)
            ctx.save_for_backward(input.detach(), target_gradient)
            return loss, None
        ctx.save_for_backward(
            input if ctx.from_logits else None, target, weight, gradient, target_gradient, *result.saved
        )
        return loss, gradient

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        of_loss, of_gradient = upstreams
        nothing = (None,) * 6
        if ctx.inplace and ctx.written:
            _refuse_second_derivative(upstreams)
            return (*_handed_over(ctx, ctx.saved_tensors, of_loss), *nothing)
        input, target, weight, gradient, target_gradient, *saved = ctx.saved_tensors
        differentiable = is_differentiable(upstreams)
        if differentiable and ctx.from_logits:
            return (*_differentiable_gradients(ctx, input, target, weight, of_loss), *nothing)
        if not ctx.written:
            if of_loss is None:
                return (None, None, *nothing)
            of_input, of_target = ctx.needs_input_grad[:2]
            inplace = ctx.inplace and not graph_is_kept()
            g, d = ctx.backend.soft_cross_entropy_backward(
                of_loss if ctx.divisor is None else of_loss / ctx.divisor,
                as_rows(input),
                as_rows(target),
                weight,
                ctx.options,
                saved,
                gradient=of_input,
                target_gradient=of_target,
                inplace=inplace,
            )
            if inplace:
                torch.autograd.graph.increment_version(input)
            return (
                None if g is None else g.view(input.shape),
                None if d is None else d.view(target.shape),
                *nothing,
            )
        if differentiable or of_gradient is not None:
            total = None if of_loss is None else gradient * of_loss
            if of_gradient is not None:
                second = _second(gradient, of_gradient, *_soft_slopes(gradient, target, weight, ctx))
                total = second if total is None else total + second
            return (total, None, *nothing)
        return (*_handed_over(ctx, (gradient, target_gradient), of_loss), *nothing)


def _handed_over(ctx: Any, written: Sequence[Tensor | None], upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass wrote, times ``upstream``."""
    mine = not graph_is_kept()
    return tuple(
        None if g is None or upstream is None else ctx.backend.rescale(g.detach(), upstream, inplace=mine)
        for g in written
    )


def is_differentiable(upstreams: Sequence[Tensor | None]) -> bool:
    """Must backward itself be differentiable (``create_graph=True``)?

    A batched upstream (``is_grads_batched=True``) takes the same road: out of place, in torch's own ops.
    """
    return torch.is_grad_enabled() or any(
        u is not None and torch._C._functorch.is_legacy_batchedtensor(u) for u in upstreams
    )


def _refuse_second_derivative(upstreams: Sequence[Tensor | None]) -> None:
    if is_differentiable(upstreams):
        raise RuntimeError(
            "fastloss: the logits were overwritten (inplace=True), so there is no second derivative; "
            "use inplace=False with create_graph=True"
        )


def _hard_slopes(
    gradient: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A, b and s of class indices, where G = s (A p − b): see the head of this file. A is 0 in ignored rows."""
    dtype = compute_dtype(gradient.dtype)
    outer, classes, inner = as_rows(gradient).shape
    target = target.view(outer, 1, inner).long()
    counted = target != options.ignore_index
    label = target * (counted & (target >= 0) & (target < classes))
    w = torch.ones(classes, dtype=dtype, device=gradient.device) if weight is None else weight.to(dtype)
    eps = options.label_smoothing
    hit, spread = w[label] * counted * (1 - eps), counted.to(dtype) * (eps / classes)
    b = (spread * w.view(1, -1, 1)).scatter_add(1, label, hit)
    s = torch.ones((), dtype=dtype, device=gradient.device) if scale is None else scale.to(dtype)
    return hit + spread * w.sum(), b, s


def _soft_slopes(gradient: Tensor, target: Tensor, weight: Tensor | None, ctx: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same of soft targets: b_c = w_c u_c, and A their sum."""
    dtype = compute_dtype(gradient.dtype)
    b = as_rows(target).to(dtype)
    outer, classes, inner = b.shape
    eps = ctx.options.label_smoothing
    b = b * (1 - eps) + eps / classes
    if weight is not None:
        b = b * weight.to(dtype).view(1, -1, 1)
    s = 1.0 / (outer * inner) if ctx.options.reduction == "mean" else 1.0 / (ctx.divisor or 1.0)
    return b.sum(1, keepdim=True), b, torch.full((), s, dtype=dtype, device=gradient.device)


def _second(gradient: Tensor, v: Tensor, level: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """H V, from G, in differentiable ops: see the head of this file."""
    dtype = compute_dtype(gradient.dtype)
    g, v = as_rows(gradient).to(dtype), as_rows(v).to(dtype)
    # A row of weight 0 has G = 0 and H = 0, whatever its p.
    known = level != 0
    p = torch.where(known, (g / s + b) / torch.where(known, level, 1.0), 0.0)
    result = s * p * level * (v - (p * v).sum(1, keepdim=True))
    return result.view(gradient.shape).to(gradient.dtype)


def _differentiable_gradients(
    ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, upstream: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients as functions of ``input``, ``target`` and ``upstream`` that autograd can differentiate again."""
    if upstream is None:
        return None, None
    create_graph = torch.is_grad_enabled()
    if create_graph:
        # The target may be made of the input: a view stands for its own part of the derivative alone.
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
        loss = composite.cross_entropy(rows, labels, None if weight is None else weight.to(dtype), ctx.options)
        upstream = upstream if ctx.divisor is None else upstream / ctx.divisor
        results = iter(
            torch.autograd.grad(loss, wanted, upstream.to(loss.dtype).view(loss.shape), create_graph=create_graph)
        )
    return tuple(next(results) if needed else None for needed in ctx.needs_input_grad[:2])  # type: ignore[return-value]


def _flat(tensor: Tensor) -> Tensor:
    """``(rows, classes)``, or ``(classes,)`` as it is."""
    return tensor if tensor.dim() == 1 else as_rows(tensor).movedim(1, -1).flatten(0, 1)


def graph_is_kept() -> bool:
    """Will autograd come back to this node (``retain_graph=True``)? If that can't be known: yes."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
