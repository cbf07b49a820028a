"""The ``torch.autograd.Function`` between the public functions and the backends.

There are two ways to the gradient:

*Written in the forward pass* (reduction "mean" and "sum"). The one visit to the logits leaves the gradient at
an upstream gradient of 1, G = ∂L/∂x; backward hands G over, scaled if the upstream is not 1. The logits are not
kept. G is an *output* of the node, so that an expression of G is an expression of the logits: the second
derivative is this node's backward at an upstream gradient V of G. It needs only the softmax p, which G gives
back: with G = s (A p − b),

    H V = s A (p ∘ V − p ⟨p, V⟩),     p = (G / s + b) / A

(A and b as in ``fastloss/eager/cross_entropy.py``), itself written in differentiable ops, so that the third
derivative follows. Where a softcap or the z-loss hides p, the logits are kept after all, for those derivatives.

*Computed in backward, from the logits* (reduction "none"; float16, where a gradient divided by N before the loss
scale arrives would flush to zero). Derivatives past the first go through :mod:`fastloss.composite`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import composite
from .contract import Backend, LossOptions, compute_dtype

__all__ = ["fused_cross_entropy"]


def fused_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    backend: Backend,
    loss_dtype: torch.dtype,
    inplace: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss (with a graph where ``input`` needs one) and the accuracies, all as ``()`` or ``(rows,)``.

    ``input`` is ``(C,)`` or ``(N, C, …)``; ``target`` and what comes back "a row" are flat.
    """
    if not (input.requires_grad and torch.is_grad_enabled()):
        result = backend.cross_entropy_forward(
            as_rows(input), target, weight, options, loss_dtype=loss_dtype, gradient=False, inplace=False
        )
        return result.loss, result.accuracy
    base = input._base if input._is_view() else None
    if inplace and (input.is_leaf or (base is not None and base.is_leaf and base.requires_grad)):
        raise RuntimeError(
            "fastloss: inplace=True would write the gradient over a leaf tensor that requires grad, or over a "
            "view of one; pass the output of an operation, or inplace=False"
        )
    loss, _, *accuracy = _CrossEntropy.apply(input, target, weight, options, backend, loss_dtype, inplace)
    return loss, tuple(accuracy)


def as_rows(input: Tensor) -> Tensor:
    """The canonical ``(outer, classes, inner)``: a view wherever strides allow one."""
    if input.dim() == 1:
        return input[None, :, None]
    return input.unsqueeze(2) if input.dim() == 2 else input.flatten(2)


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
            logits, target, weight, options, loss_dtype=loss_dtype, gradient=written, inplace=inplace and written
        )
        ctx.mark_non_differentiable(*result.accuracy)
        ctx.written = written
        gradient = None if result.gradient is None else result.gradient.view(input.shape)
        if gradient is not None and inplace:
            torch.autograd.graph.increment_version(input)
            # An alias of the input shares its version: whoever writes over the gradient is found out.
            ctx.save_for_backward(input.detach())
            return (result.loss, None, *result.accuracy)
        ctx.save_for_backward(
            input if ctx.from_logits else None, target, weight, gradient, result.scale, *result.saved
        )
        return (result.loss, gradient, *result.accuracy)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        of_loss, of_gradient = upstreams[:2]
        # A batched upstream (is_grads_batched=True) takes the same road: out of place, in torch's own ops.
        differentiable = torch.is_grad_enabled() or any(
            u is not None and torch._C._functorch.is_legacy_batchedtensor(u) for u in (of_loss, of_gradient)
        )
        nothing = (None,) * 6
        if ctx.inplace and ctx.written:
            if differentiable:
                raise RuntimeError(
                    "fastloss: the logits were overwritten (inplace=True), so there is no second derivative; "
                    "use inplace=False with create_graph=True"
                )
            (gradient,) = ctx.saved_tensors
            if of_loss is None:
                return (None, *nothing)
            return (ctx.backend.rescale(gradient, of_loss, inplace=not _graph_is_kept()), *nothing)

        input, target, weight, gradient, scale, *saved = ctx.saved_tensors
        if differentiable and ctx.from_logits:
            return (_differentiable_gradient(input, target, weight, ctx.options, of_loss), *nothing)
        if not ctx.written:
            if of_loss is None:
                return (None, *nothing)
            result = ctx.backend.cross_entropy_backward(
                of_loss,
                as_rows(input),
                target,
                weight,
                ctx.options,
                saved,
                inplace=ctx.inplace and not _graph_is_kept(),
            )
            if ctx.inplace and not _graph_is_kept():
                torch.autograd.graph.increment_version(input)
            return (result.view(input.shape), *nothing)

        total: Tensor | None = None
        if of_loss is not None:
            if differentiable:
                total = gradient * of_loss
            else:
                mine = not _graph_is_kept() and of_gradient is None
                total = ctx.backend.rescale(gradient.detach(), of_loss, inplace=mine)
        if of_gradient is not None:
            second = _second(ctx.options, target, weight, gradient, scale, of_gradient)
            total = second if total is None else total + second
        return (total, *nothing)


def _second(
    options: LossOptions, target: Tensor, weight: Tensor | None, gradient: Tensor, scale: Tensor | None, v: Tensor
) -> Tensor:
    """H V, from G, in differentiable ops: see the head of this file."""
    dtype = compute_dtype(gradient.dtype)
    g, v = as_rows(gradient).to(dtype), as_rows(v).to(dtype)
    outer, classes, inner = g.shape
    target = target.view(outer, 1, inner).long()
    counted = target != options.ignore_index
    label = target * (counted & (target >= 0) & (target < classes))
    w = torch.ones(classes, dtype=dtype, device=g.device) if weight is None else weight.to(dtype)
    eps = options.label_smoothing
    hit, spread = w[label] * counted * (1 - eps), counted.to(dtype) * (eps / classes)
    level = hit + spread * w.sum()  # A
    b = (spread * w.view(1, -1, 1)).scatter_add(1, label, hit)
    s = torch.ones((), dtype=dtype, device=g.device) if scale is None else scale.to(dtype)
    # A row of weight 0 has G = 0 and H = 0, whatever its p.
    known = counted & (level != 0)
    p = torch.where(known, (g / s + b) / torch.where(known, level, 1.0), 0.0)
    result = s * p * level * (v - (p * v).sum(1, keepdim=True))
    return result.view(gradient.shape).to(gradient.dtype)


def _differentiable_gradient(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, upstream: Tensor | None
) -> Tensor | None:
    """The gradient as a function of ``input`` and ``upstream`` that autograd can differentiate again."""
    if upstream is None:
        return None
    create_graph = torch.is_grad_enabled()
    if not create_graph:
        input = input.detach().requires_grad_()
    dtype = compute_dtype(input.dtype)
    with torch.enable_grad():
        wide = input.to(dtype)
        rows = wide if input.dim() == 1 else as_rows(wide).movedim(1, -1).flatten(0, 1)
        labels = target if input.dim() > 1 else target.view(())
        loss = composite.cross_entropy(rows, labels, None if weight is None else weight.to(dtype), options)
        upstream = upstream.to(dtype).view(loss.shape)
        (result,) = torch.autograd.grad(loss, input, upstream, create_graph=create_graph)
    return result


def _graph_is_kept() -> bool:
    """Will autograd come back to this node (``retain_graph=True``)? If that can't be known: yes."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
