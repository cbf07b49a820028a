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

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import Forward, LossOptions, compute_dtype
from .accuracy import TargetRanks, inside_label, reduce_accuracy
from .chunks import Chunk, Scratch, chunks
from .workers import for_each

__all__ = ["cross_entropy_backward", "cross_entropy_forward", "rescale"]

_LOG2_E = 1.4426950408889634


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
    losses = _sweep(logits, rows, result, scale, ranks=ranks)

    loss = losses.flatten() if options.reduction == "none" else losses.sum()
    if scale is not None:
        loss = torch.where(scale.isinf(), torch.nan, loss * scale)  # rows that weigh nothing have no mean
    accuracy: tuple[Tensor, ...] = ()
    if ranks is not None:
        accuracy = reduce_accuracy(ranks.right, rows.counted, rows.invalid, options.reduction)
    return Forward(
        loss.to(loss_dtype),
        accuracy,
        result,
        saved=(),
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
    """What is known of each row before its logits are read; a value a row is ``(outer, 1, inner)``.

    Rows are few beside logits: their numbers are float64 where the device has it, and rounded once, at the end.
    """

    def __init__(self, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> None:
        outer, classes, inner = logits.shape
        eps = options.label_smoothing
        self.options = options
        self.dtype = torch.float32 if logits.device.type == "mps" else torch.float64
        self.shape = (outer, 1, inner)
        target = target.view(self.shape).long()
        self.counted = target != options.ignore_index
        self.label, self.invalid = inside_label(target, self.counted, classes)
        self.class_weight = None if weight is None else weight.to(self.dtype)  # w
        if self.class_weight is None:
            self.weight = self.counted.to(self.dtype)  # w_y, 0 in an ignored row
            self.total_weight = logits.new_full((), classes, dtype=self.dtype)  # W
        else:
            self.weight = self.class_weight[self.label] * self.counted
            self.total_weight = self.class_weight.sum()
        if self.invalid is not None:
            self.weight = self.weight.masked_fill(self.invalid, float("nan"))
        self.hit = self.weight * (1 - eps)  # w_y (1−ε)
        self.spread = self.counted.to(self.dtype) * (eps / classes) if eps else None  # ε/C
        self.any_ignored = not _never(~self.counted)

    def mean_scale(self) -> Tensor:
        """1 / (the sum of the counted rows' weights): infinite where no row counts, as 0 / 0 must be NaN."""
        return self.weight.sum().reciprocal()

    def loss(self, nll: Tensor, lse: Tensor | None, weighted_sum: Tensor | None) -> Tensor:
        """Each row's loss, from lse − z_y, lse and Σ_c w_c z_c; the last two where the options need them."""
        loss = self.hit * nll
        if lse is None:
            return loss.masked_fill_(~self.counted, 0)
        if self.options.lse_square_scale:
            loss += self.options.lse_square_scale * self.weight * lse.square()
        if self.spread is not None and weighted_sum is not None:
            loss += self.spread * (self.total_weight * lse - weighted_sum)
        return loss.masked_fill_(~self.counted, 0)


def _sweep(
    logits: Tensor, rows: _Rows, gradient: Tensor | None, scale: Tensor | None, *, ranks: TargetRanks | None
) -> Tensor:
    """The one visit to the logits: every row's loss, and the gradient times ``scale``.

    ``scale`` is None (for 1), a scalar, or a value a row. ``gradient`` may be ``logits`` itself.
    """
    cap, dtype, device = rows.options.softcap, compute_dtype(logits.dtype), logits.device
    sums = _RowSums(logits, rows, overwritten=gradient is logits)
    slopes = None
    if gradient is not None:  # 16-bit logits don't resolve what float64 would save
        slopes = _Slopes(rows, scale, rows.dtype if logits.dtype == dtype else dtype)
    writes_p = gradient is not None and gradient is not logits and logits.dtype == dtype
    # The rows whose p_y underflows are looked at once, after the visit, unless it needs their lse or overwrites their
    # logits.
    looks_early = gradient is logits or (gradient is not None and rows.options.lse_square_scale != 0)

    def visit(chunk: Chunk) -> None:
        wide, scratch = Scratch("wide", dtype, device), Scratch("softmax", dtype, device)
        x = chunk.of(logits)
        z = x if x.dtype == dtype else wide.like(x).copy_(x)
        if ranks is not None:
            ranks.visit(chunk, z)
        p = z
        if gradient is not None and writes_p:
            p = chunk.of(gradient)
        elif z is x or cap is not None:
            p = scratch.like(z)  # z is the caller's, or needed again
        tanh = None
        if cap is not None:
            tanh = torch.div(z, cap, out=wide.like(x)).tanh_()
            z = torch.mul(tanh, cap, out=p)
        sums.visit_logits(chunk, z)
        if logits.dtype != dtype and cap is None and device.type == "cpu":
            # 16-bit logits resolve less than what a maximum subtracted first would save; exp2 is torch's fastest.
            total = sums.visit_softmax(chunk, z.mul_(_LOG2_E).exp2_())
            low, high = total.aminmax()
            if not (float(low) > 1e-9 and float(high) < 1e37):  # too small, too large, or NaN
                _softmax(z.copy_(x), out=p)
                total = sums.visit_softmax(chunk, p)
        else:
            _softmax(z, out=p)
            total = sums.visit_softmax(chunk, p)
        if looks_early:
            sums.look_for_underflow(chunk)
        if gradient is not None and slopes is not None:
            slopes.gradient_(chunk, p, total, sums)
            if tanh is not None:
                p.mul_(tanh.square_().neg_().add_(1))  # ∂z/∂x
            if rows.any_ignored:
                p.masked_fill_(~chunk.of(rows.counted), 0)  # whatever stands in an ignored row
            if not writes_p:
                chunk.of(gradient).copy_(p)

    for_each(chunks(logits.shape, logits.dtype), visit, device)
    if not looks_early and not _never(sums.underflowed(sums.p_y)):
        for_each(chunks(logits.shape, logits.dtype), sums.look_for_underflow, device)
    nll, lse = sums.nll_and_lse(Chunk((0, logits.shape[0]), (0, logits.shape[2])))
    return rows.loss(nll, lse, sums.weighted)


class _RowSums:
    """What the visits to the chunks leave of each row, ``(outer, 1, inner)`` each."""

    def __init__(self, logits: Tensor, rows: _Rows, overwritten: bool) -> None:
        dtype = compute_dtype(logits.dtype)
        self.logits, self.rows = logits, rows
        # The loss alone needs no lse; then the label's logits are left out, a cache miss each.
        self.wants_lse = rows.spread is not None or rows.options.lse_square_scale != 0
        self.z_y = self._label_logits() if self.wants_lse or overwritten else None
        self.p_y = logits.new_empty(rows.shape, dtype=dtype)
        self.others = torch.empty_like(self.p_y)  # Σ_{c≠y} p_c
        self.weighted = torch.empty_like(self.p_y) if rows.spread is not None else None  # Σ_c w_c z_c
        self._lock = threading.Lock()  # chunks are visited by several threads
        self.far_lse: Tensor | None = None  # lse where p_y has underflowed, NaN elsewhere

    def _label_logits(self) -> Tensor:
        z_y = self.logits.gather(1, self.rows.label).to(self.rows.dtype)
        return _capped(z_y, self.rows.options.softcap)

    def visit_logits(self, chunk: Chunk, z: Tensor) -> None:
        if self.weighted is None:
            return
        if self.rows.class_weight is None:
            value = z.sum(1, keepdim=True)
        else:
            with torch.autocast(z.device.type, enabled=False):
                value = torch.matmul(self.rows.class_weight.to(z.dtype), z).unsqueeze(1)
        chunk.of(self.weighted).copy_(value)

    def visit_softmax(self, chunk: Chunk, p: Tensor) -> Tensor:
        """Take p_y out of ``p`` (its entry is left 0), and the sum of the others; gives what each row adds up to.

        The rows of ``p`` need not add up to 1: all below is relative to what they add up to. torch's softmax sums a
        row's exponentials in few running sums; at 32000 classes that is off by tens of units in the last place,
        ``Tensor.sum`` by one. And a sum without the label gives 1 − p_y and the loss without the cancellation at p_y
        near 1.
        """
        label = chunk.of(self.rows.label)
        p_y, others = chunk.of(self.p_y), chunk.of(self.others)
        torch.gather(p, 1, label, out=p_y)
        p.scatter_(1, label, 0)
        torch.sum(p, 1, keepdim=True, out=others)
        return others + p_y

    def underflowed(self, p_y: Tensor) -> Tensor:
        limits = torch.finfo(p_y.dtype)
        return p_y < limits.tiny / limits.eps

    def look_for_underflow(self, chunk: Chunk) -> None:
        """Where p_y is too small for its logarithm to be right, take lse from the logits again."""
        far = self.underflowed(chunk.of(self.p_y))
        if _never(far):
            return
        with self._lock:
            if self.z_y is None:
                self.z_y = self._label_logits()
            if self.far_lse is None:
                self.far_lse = torch.full_like(self.z_y, float("nan"))
        z = _capped(chunk.of(self.logits).to(self.p_y.dtype), self.rows.options.softcap)
        lse = z.logsumexp(1, keepdim=True)
        chunk.of(self.far_lse).copy_(torch.where(far, lse, float("nan")))

    def nll_and_lse(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """lse − z_y = −log p_y; and lse, where anything wants it."""
        nll = torch.log1p(chunk.of(self.others).to(self.rows.dtype) / chunk.of(self.p_y))
        if self.z_y is None:
            return nll, None
        z_y = chunk.of(self.z_y)
        lse = z_y + nll
        if self.far_lse is not None:
            far_lse = chunk.of(self.far_lse)
            nll = torch.where(far_lse.isnan(), nll, far_lse - z_y)
            lse = torch.where(far_lse.isnan(), lse, far_lse)
        return nll, lse


class _Slopes:
    """The coefficients of the gradient, times ``scale``: what each chunk needs is ready before the loop."""

    def __init__(self, rows: _Rows, scale: Tensor | None, dtype: torch.dtype) -> None:
        one = 1.0 if scale is None else scale
        self.rows = rows
        self.hit = (rows.hit * one).to(dtype)  # w_y (1−ε)
        self.spread = None if rows.spread is None else rows.spread * one  # ε/C
        self.rest = None if self.spread is None else self.spread * rows.total_weight  # ε/C W
        self.z_slope = None
        if rows.options.lse_square_scale:
            self.z_slope = 2 * rows.options.lse_square_scale * rows.weight * one

    def gradient_(self, chunk: Chunk, p: Tensor, total: Tensor, sums: _RowSums) -> None:
        """p_c A − [c = y] w_y (1−ε) − ε/C w_c in place of ``p``, whose rows add up to ``total``."""
        label, hit, others = chunk.of(self.rows.label), chunk.of(self.hit), chunk.of(sums.others)
        a = hit / total
        at_label = (a * others).neg_()
        rest = None if self.rest is None else chunk.of(self.rest)  # A − w_y (1−ε)
        if self.z_slope is not None:
            of_lse = chunk.of(self.z_slope) * sums.nll_and_lse(chunk)[1]  # type: ignore[operator]
            rest = of_lse if rest is None else rest + of_lse
        if rest is not None:
            rest = rest / total
            a, at_label = a + rest, at_label + rest * chunk.of(sums.p_y)
        p.mul_(a.to(p.dtype))
        if self.spread is not None:
            spread = chunk.of(self.spread)
            weight = self.rows.class_weight
            if weight is None:
                p.sub_(spread.to(p.dtype))
                at_label = at_label - spread
            else:
                p.addcmul_(spread.to(p.dtype), weight.to(p.dtype).view(1, -1, 1), value=-1)
                at_label = at_label - spread * weight[label]
        p.scatter_(1, label, at_label.to(p.dtype))


def _capped(x: Tensor, softcap: float | None) -> Tensor:
    return x if softcap is None else torch.tanh(x / softcap) * softcap


def _softmax(z: Tensor, out: Tensor) -> None:
    """Softmax over the classes; torch's is the faster one where they are the last dimension."""
    if z.shape[2] == 1:
        torch.softmax(z.squeeze(2), 1, out=out.squeeze(2))
    else:
        torch.softmax(z, 1, out=out)


def _never(rows: Tensor) -> bool:
    """Is no row true? Off the CPU a look would make the host wait, and the answer is a careful no."""
    return rows.device.type == "cpu" and not bool(rows.any())
