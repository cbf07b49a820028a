r"""Cross-entropy in plain torch ops, chunk by chunk.

With z the logits (after the softcap), p their softmax, y the label, w the class weights, W = Σ w, ε the label
smoothing over C classes and λ the scale of the squared log-sum-exp, one row's loss is

    L   =  w_y (1−ε) (lse − z_y)  +  w_y λ lse²  +  ε/C (W lse − Σ_c w_c z_c)
    ∂L/∂z_c  =  p_c A  −  [c = y] w_y (1−ε)  −  ε/C w_c,      A = w_y (1−ε) + 2 λ w_y lse + ε/C W

(Label smoothing: Szegedy et al. 2016, arXiv:1512.00567, with weights as torch has them. λ lse²: the z-loss of
PaLM, arXiv:2204.02311, §5. Softcap: z = cap · tanh(x / cap), Gemma 2, arXiv:2408.00118, §2.)

A chunk is read from memory once: softmax goes straight into the gradient's slice (or, for float16 and bfloat16,
into one small float32 buffer that is rounded once into that slice), and everything else is done in place there.
Besides the gradient no buffer grows with N·V.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import Forward, LossOptions, compute_dtype
from .accuracy import TargetRanks, inside_label, reduce_accuracy
from .chunks import Chunk, Scratch, chunks

__all__ = ["cross_entropy_backward", "cross_entropy_forward", "rescale"]


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    *,
    loss_dtype: torch.dtype,
    gradient: bool,
    inplace: bool,
) -> Forward:
    """See :class:`fastloss.contract.Backend`."""
    rows = _Rows(logits, target, weight, options)
    scale = rows.mean_scale() if options.reduction == "mean" else None
    ranks = TargetRanks(logits, rows.label, options.topk) if options.topk else None
    result = None
    if gradient:
        result = logits if inplace else torch.empty_like(logits)
    losses, lse = _sweep(logits, rows, result, scale, ranks=ranks)

    loss = losses.flatten() if options.reduction == "none" else losses.sum()
    if scale is not None:
        loss = loss * scale
    accuracy: tuple[Tensor, ...] = ()
    if ranks is not None:
        accuracy = reduce_accuracy(ranks.right, rows.counted, rows.invalid, options.reduction)
    return Forward(
        loss.to(loss_dtype),
        accuracy,
        result,
        saved=(),
        lse=lse.flatten() if gradient and options.lse_square_scale else None,
        scale=scale if gradient else None,
    )


def cross_entropy_backward(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    saved: Sequence[Tensor],
    *,
    inplace: bool,
) -> Tensor:
    """See :class:`fastloss.contract.Backend`; nothing is saved, the softmax is computed again."""
    rows = _Rows(logits, target, weight, options)
    scale = upstream.to(rows.dtype)
    if options.reduction == "none":
        scale = scale.reshape(rows.shape)
    elif options.reduction == "mean":
        scale = scale * rows.mean_scale()
    result = logits if inplace else torch.empty_like(logits)
    _sweep(logits, rows, result, scale, ranks=None)
    return result


def rescale(gradient: Tensor, factor: Tensor, *, inplace: bool) -> Tensor:
    """See :class:`fastloss.contract.Backend`."""
    if not inplace:
        return gradient * factor
    # Reading the factor makes a GPU's host wait, so only a CPU asks whether it is 1.
    if factor.device.type == "cpu" and factor == 1:
        return gradient
    return gradient.mul_(factor)


class _Rows:
    """What is known of each row before its logits are read; a value a row is ``(outer, 1, inner)``."""

    def __init__(self, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> None:
        outer, classes, inner = logits.shape
        eps = options.label_smoothing
        self.options = options
        self.dtype = compute_dtype(logits.dtype)
        self.shape = (outer, 1, inner)
        target = target.view(self.shape).long()
        self.counted = target != options.ignore_index
        self.label, self.invalid = inside_label(target, self.counted, classes)
        self.class_weight = None if weight is None else weight.to(self.dtype)  # w
        if self.class_weight is None:
            self.weight = self.counted.to(self.dtype)  # w_y, 0 in an ignored row
            self.total = logits.new_full((), classes, dtype=self.dtype)  # W
        else:
            self.weight = self.class_weight[self.label] * self.counted
            self.total = self.class_weight.sum()
        if self.invalid is not None:
            self.weight = self.weight.masked_fill(self.invalid, float("nan"))
        self.hit = self.weight * (1 - eps)  # w_y (1−ε)
        self.spread = self.counted.to(self.dtype) * (eps / classes) if eps else None  # ε/C
        self.ignores = not _never(~self.counted)

    def mean_scale(self) -> Tensor:
        """1 / (the sum of the counted rows' weights): infinite where no row counts, as 0 / 0 must be NaN."""
        return self.weight.sum().reciprocal()


def _sweep(
    logits: Tensor, rows: _Rows, gradient: Tensor | None, scale: Tensor | None, *, ranks: TargetRanks | None
) -> tuple[Tensor, Tensor]:
    """The one visit to the logits: every row's loss and log-sum-exp, and the gradient times ``scale``.

    ``scale`` is None (for 1), a scalar, or a value a row. ``gradient`` may be ``logits`` itself.
    """
    options, dtype = rows.options, rows.dtype
    nll = logits.new_empty(rows.shape, dtype=dtype)  # lse − z_y
    lse = torch.empty_like(nll)
    weighted_sum = torch.empty_like(nll) if rows.spread is not None else None  # Σ_c w_c z_c
    wide, scratch = Scratch(dtype, logits.device), Scratch(dtype, logits.device)
    p_is_gradient = gradient is not None and gradient is not logits and logits.dtype == dtype

    for chunk in chunks(logits.shape, logits.dtype):
        x, label = chunk.of(logits), chunk.of_rows(rows.label)
        z = _logits_of(x, dtype, options.softcap, wide)
        if ranks is not None:
            ranks.visit(chunk, x, widened=None if options.softcap is not None else z)
        if weighted_sum is not None:
            chunk.of_rows(weighted_sum).copy_(_weighted_sum(z, rows.class_weight))

        if p_is_gradient:
            p = chunk.of(gradient)
        elif z is x or options.softcap is not None:
            p = scratch.like(z)  # z is the caller's, or still needed for the softcap's derivative
        else:
            p = z
        label_nll, label_lse, p_y, q_y = _softmax_(x, z, p, label, options.softcap)
        chunk.of_rows(nll).copy_(label_nll)
        chunk.of_rows(lse).copy_(label_lse)

        if gradient is not None:
            row_scale = chunk.of_rows(scale) if scale is not None and scale.dim() else scale
            _softmax_to_gradient_(p, label, p_y, q_y, label_lse, rows, chunk, row_scale)
            if options.softcap is not None:
                p.mul_(z.mul_(1 / options.softcap).square_().neg_().add_(1))  # ∂z/∂x = 1 − (z / cap)²
            if rows.ignores:
                p.masked_fill_(~chunk.of_rows(rows.counted), 0)  # whatever stands in an ignored row
            if not p_is_gradient:
                chunk.of(gradient).copy_(p)

    loss = rows.hit * nll
    if options.lse_square_scale:
        loss += options.lse_square_scale * rows.weight * lse.square()
    if rows.spread is not None and weighted_sum is not None:
        loss += rows.spread * (rows.total * lse - weighted_sum)
    return loss.masked_fill_(~rows.counted, 0), lse


def _logits_of(x: Tensor, dtype: torch.dtype, softcap: float | None, buffer: Scratch) -> Tensor:
    """z, in the dtype of the arithmetic: ``x`` itself if it is that already, else in ``buffer``."""
    if softcap is not None:
        return buffer.like(x).copy_(x).mul_(1 / softcap).tanh_().mul_(softcap)
    return x if x.dtype == dtype else buffer.like(x).copy_(x)


def _weighted_sum(z: Tensor, class_weight: Tensor | None) -> Tensor:
    if class_weight is None:
        return z.sum(1, keepdim=True)
    return torch.matmul(class_weight, z).unsqueeze(1)


def _softmax_(
    x: Tensor, z: Tensor, p: Tensor, label: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax of ``z`` into ``p`` (which may be ``z``); gives nll, lse, p_y and 1 − p_y of each row.

    The label's own entry of ``p`` is left undefined. 1 − p_y loses its digits as p_y nears 1, and so would the
    loss: there it is summed over the other classes instead. Where p_y underflows, so would its logarithm.
    """
    dtype = z.dtype
    z_y = z.gather(1, label)
    torch.softmax(z, 1, out=p)
    p_y = p.gather(1, label)
    q_y = 1 - p_y
    nll = p_y.log().neg_()
    sure = p_y > 0.5
    if not _never(sure):
        p.scatter_(1, label, 0)
        q_y = torch.where(sure, p.sum(1, keepdim=True), q_y)
        nll = torch.where(sure, q_y.neg().log1p_().neg_(), nll)
    lse = z_y + nll
    faint = p_y < torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    if not _never(faint):
        again = _logits_of(x, dtype, softcap, Scratch(dtype, x.device))
        lse = torch.where(faint, again.logsumexp(1, keepdim=True), lse)
        nll = torch.where(faint, lse - z_y, nll)
    return nll, lse, p_y, q_y


def _softmax_to_gradient_(
    p: Tensor,
    label: Tensor,
    p_y: Tensor,
    q_y: Tensor,
    lse: Tensor,
    rows: _Rows,
    chunk: Chunk,
    scale: Tensor | None,
) -> None:
    """p_c A − [c = y] w_y (1−ε) − ε/C w_c, times ``scale``, in place of ``p``."""
    hit, weight = chunk.of_rows(rows.hit), chunk.of_rows(rows.weight)
    spread = None if rows.spread is None else chunk.of_rows(rows.spread)
    rest = torch.zeros_like(hit)  # A − w_y (1−ε)
    if rows.options.lse_square_scale:
        rest = rest + 2 * rows.options.lse_square_scale * weight * lse
    if spread is not None:
        rest = rest + spread * rows.total
    at_label = p_y * rest - q_y * hit
    if spread is not None:
        at_label = at_label - spread * (1 if rows.class_weight is None else rows.class_weight[label])
    a = hit + rest
    if scale is not None:
        a, at_label, spread = a * scale, at_label * scale, None if spread is None else spread * scale
    p.mul_(a)
    if spread is not None and rows.class_weight is None:
        p.sub_(spread)
    elif spread is not None and rows.class_weight is not None:
        p.addcmul_(spread, rows.class_weight.view(1, -1, 1), value=-1)
    p.scatter_(1, label, at_label)


def _never(rows: Tensor) -> bool:
    """Is no row true? Off the CPU a look would make the host wait, and the answer is a careful no."""
    return rows.device.type == "cpu" and not bool(rows.any())
