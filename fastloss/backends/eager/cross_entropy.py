r"""Cross-entropy in plain torch ops, chunk by chunk.

With z the logits (after the softcap), p their softmax, y the label, w the class weights, W = Σ w, ε the label
smoothing over C classes and λ the scale of the squared log-sum-exp, one row's loss is

    L   =  w_y (1−ε) (lse − z_y)  +  w_y λ lse²  +  ε/C (W lse − Σ_c w_c z_c)
    ∂L/∂z_c  =  p_c A  −  [c = y] w_y (1−ε)  −  ε/C w_c,      A = w_y (1−ε) + 2 λ w_y lse + ε/C W

(Label smoothing: Szegedy et al. 2016, arXiv:1512.00567, with weights as torch has them. λ lse²: the z-loss of
PaLM, arXiv:2204.02311, §5. Softcap: z = cap · tanh(x / cap), Gemma 2, arXiv:2408.00118, §2.)

A chunk is read from memory once: its exponentials go straight into the gradient's slice (or, for float16 and
bfloat16, into one small float32 buffer that is rounded once into that slice), and everything else is done in place
there. Besides the gradient no buffer grows with N·V.

What is the same for all rows stays a Python number (:data:`.chunks.Value`): without class weights and ignored rows,
which is most calls, no operation is spent on it. At a thousand classes a call's many small operations
cost as much as its passes over the logits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import Forward, LossOptions, compute_dtype
from .accuracy import TargetRanks, inside_label, reduce_accuracy
from .chunks import Chunk, Scratch, Value, chunks, row_dtype
from .softmax import LN_2, capped, exponents, is_resolved, sure_exponents, tanh_slope_
from .workers import for_each

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
    divisor: Tensor | None = None,
) -> Forward:
    """See :class:`fastloss.backends.contract.Backend`."""
    rows = _Rows(logits, target, weight, options)
    scale = rows.mean_scale() if options.reduction == "mean" else 1.0
    slope = scale
    if divisor is not None:
        slope = divisor.reciprocal().item() if divisor.is_cpu else divisor.to(rows.dtype).reciprocal()
    ranks = TargetRanks(logits, rows.label, options.topk) if options.topk else None
    result = None
    if gradient:
        result = logits if inplace else torch.empty_like(logits)
    losses = _sweep(logits, rows, result, slope, ranks=ranks)

    loss = losses.flatten() if options.reduction == "none" else losses.sum()
    if isinstance(scale, Tensor):
        loss = torch.where(scale.isinf(), torch.nan, loss * scale)  # rows that weigh nothing have no mean
    elif scale != 1.0:
        loss = loss * scale
    accuracy: tuple[Tensor, ...] = ()
    if ranks is not None:
        accuracy = reduce_accuracy(ranks.right, rows.counted, rows.invalid, options.reduction)
    kept = None
    if gradient and options.reduction == "mean":
        kept = scale if isinstance(scale, Tensor) else loss.new_full((), scale)
    # A copy in any case: what an autograd.Function returns must not be a view.
    return Forward(loss.to(loss_dtype, copy=True), accuracy, result, saved=(), scale=kept)


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
    """See :class:`fastloss.backends.contract.Backend`; nothing is saved, the softmax is computed again."""
    rows = _Rows(logits, target, weight, options)
    upstream = upstream.to(rows.dtype)
    scale: Value = upstream.reshape(rows.shape) if options.reduction == "none" else upstream
    if options.reduction == "mean":
        scale = scale * rows.mean_scale()
    result = logits if inplace else torch.empty_like(logits)
    _sweep(logits, rows, result, scale, ranks=None)
    return result


def rescale(gradient: Tensor, factor: Tensor, *, inplace: bool) -> Tensor:
    """See :class:`fastloss.backends.contract.Backend`."""
    if not inplace:
        return gradient * factor
    # Reading the factor makes a GPU's host wait, so only a CPU asks whether it is 1.
    if factor.is_cpu and factor.item() == 1:
        return gradient
    return gradient.mul_(factor)


class _Rows:
    """What is known of each row before its logits are read.

    Rows are few beside logits: their numbers are float64 where the device has it, and rounded once, at the end.
    """

    def __init__(self, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> None:
        outer, classes, inner = logits.shape
        eps = options.label_smoothing
        self.options = options
        self.dtype = row_dtype(logits.device)
        self.shape = (outer, 1, inner)
        target = target.view(self.shape).long()
        ignored = target == options.ignore_index
        self.counted: Tensor | None = None  # None: every row counts
        self.label, self.invalid = target, None
        if not _never(ignored):
            self.counted = ~ignored
            self.label, self.invalid = inside_label(target, self.counted, classes)
        self.class_weight = None if weight is None else weight.to(self.dtype)  # w
        self.weight: Value = 1.0 if self.counted is None else self.counted.to(self.dtype)  # w_y, 0 if ignored
        self.spread: Value | None = self.weight * (eps / classes) if eps else None  # ε/C
        self.total_weight: Value = float(classes)  # W
        if self.class_weight is not None:
            self.weight = self.class_weight[self.label] * self.weight
            self.total_weight = self.class_weight.sum()
        if self.invalid is not None:
            self.weight = torch.where(self.invalid, float("nan"), self.weight)
        self.hit = self.weight * (1 - eps) if eps else self.weight  # w_y (1−ε)

    def mean_scale(self) -> Value:
        """1 / (the sum of the counted rows' weights): infinite where no row counts, as 0 / 0 must be NaN."""
        if isinstance(self.weight, Tensor):
            return self.weight.sum().reciprocal()
        return 1.0 / self.label.numel()

    def loss(self, nll: Tensor, lse: Tensor | None, spread: Tensor | None) -> Tensor:
        """Each row's loss, from lse − z_y, lse and W lse − Σ_c w_c z_c; the last two where the options need them."""
        loss = self.hit * nll if isinstance(self.hit, Tensor) or self.hit != 1.0 else nll
        if lse is not None and self.options.lse_square_scale:
            loss += self.options.lse_square_scale * self.weight * lse.square()
        if self.spread is not None and spread is not None:
            loss += self.spread * spread
        return loss if self.counted is None else loss.masked_fill_(~self.counted, 0)


def _sweep(
    logits: Tensor, rows: _Rows, gradient: Tensor | None, scale: Value, *, ranks: TargetRanks | None
) -> Tensor:
    """The one visit to the logits: every row's loss, and the gradient times ``scale``.

    ``scale`` is a number, a scalar tensor, or a value a row. ``gradient`` may be ``logits`` itself.
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
        x = chunk.of(logits)
        p = chunk.of(gradient) if writes_p and gradient is not None else Scratch("softmax", dtype, device).like(x)
        z = x if x.dtype == dtype else p.copy_(x)
        if ranks is not None:
            ranks.visit(chunk, z)
        tanh = None
        if cap is not None:
            tanh = torch.div(z, cap, out=Scratch("tanh", dtype, device).like(x)).tanh_()
            z = torch.mul(tanh, cap, out=p)
        settled = False
        if device.type == "cpu":  # elsewhere a look at the sums would make the host wait
            exponents(z, p)
            total = sums.visit_exponents(chunk, p)
            settled = is_resolved(total)
            if not settled:
                z = torch.mul(tanh, cap, out=p) if tanh is not None and cap is not None else p.copy_(x)
        if not settled:
            sure_exponents(z, p)
            total = sums.visit_exponents(chunk, p)
        if looks_early:
            sums.look_for_underflow(chunk)
        if gradient is not None and slopes is not None:
            slopes.gradient_(chunk, p, total, sums)
            if tanh is not None:
                tanh_slope_(p, tanh)  # ∂z/∂x
            if rows.counted is not None:
                p.masked_fill_(~chunk.of(rows.counted), 0)  # whatever stands in an ignored row
            if not writes_p:
                chunk.of(gradient).copy_(p)

    for_each(chunks(logits.shape, logits.dtype), visit, device)
    if not looks_early and sums.any_underflowed(sums.p_y):
        for_each(chunks(logits.shape, logits.dtype), sums.look_for_underflow, device)
    nll, lse = sums.nll_and_lse(Chunk((0, logits.shape[0]), (0, logits.shape[2])))
    return rows.loss(nll, lse, sums.spread)


class _RowSums:
    """What the visits to the chunks leave of each row, ``(outer, 1, inner)`` each."""

    def __init__(self, logits: Tensor, rows: _Rows, overwritten: bool) -> None:
        dtype = compute_dtype(logits.dtype)
        self.logits, self.rows = logits, rows
        # The loss alone needs no lse; then the label's logits are left out, a cache miss each.
        self.wants_lse = rows.options.lse_square_scale != 0
        self.z_y = self._label_logits() if self.wants_lse or overwritten else None
        self.p_y = logits.new_empty(rows.shape, dtype=dtype)
        self.others = torch.empty_like(self.p_y)  # Σ_{c≠y} p_c
        self.least = torch.finfo(dtype).tiny / torch.finfo(dtype).eps  # of a p_y whose logarithm is right
        self.spread = None if rows.spread is None else torch.empty_like(rows.label, dtype=rows.dtype)  # W lse − Σ w z
        self._lock = threading.Lock()  # chunks are visited by several threads
        # lse − z_y and lse where p_y has underflowed, NaN elsewhere
        self.far_nll: Tensor | None = None
        self.far_lse: Tensor | None = None

    def _label_logits(self) -> Tensor:
        z_y = self.logits.gather(1, self.rows.label).to(self.rows.dtype)
        return capped(z_y, self.rows.options.softcap)

    def visit_exponents(self, chunk: Chunk, p: Tensor) -> Tensor:
        """Turn the exponents in ``p`` into exponentials, 0 at the label; gives what each row adds up to.

        What is kept of a row is relative to that sum, whatever was subtracted from its logits. The sum without the
        label gives 1 − p_y, and the loss without the cancellation at p_y near 1.
        """
        dot = None if self.spread is None else self._weighted_sum(p)
        p.exp2_()
        label = chunk.of(self.rows.label)
        p_y, others = chunk.of(self.p_y), chunk.of(self.others)
        torch.gather(p, 1, label, out=p_y)
        p.scatter_(1, label, 0)
        torch.sum(p, 1, keepdim=True, out=others)
        total = others + p_y
        if self.spread is not None and dot is not None:
            log_total = total.to(self.rows.dtype).log()
            chunk.of(self.spread).copy_(self.rows.total_weight * log_total - dot.to(self.rows.dtype) * LN_2)
        return total

    def _weighted_sum(self, p: Tensor) -> Tensor:
        if self.rows.class_weight is None:
            return p.sum(1, keepdim=True)
        with torch.autocast(p.device.type, enabled=False):
            return torch.matmul(self.rows.class_weight.to(p.dtype), p).unsqueeze(1)

    def any_underflowed(self, p_y: Tensor) -> bool:
        """May some be too small? Off the CPU a look would make the host wait, and the answer is a careful yes."""
        if not p_y.is_cpu:
            return True
        least = p_y.amin().item()
        return least < self.least or least != least  # a NaN hides the others

    def look_for_underflow(self, chunk: Chunk) -> None:
        """Where p_y is too small for its logarithm to be right, take lse from the logits again."""
        p_y = chunk.of(self.p_y)
        if not self.any_underflowed(p_y):
            return
        far = p_y < self.least
        with self._lock:
            if self.z_y is None:
                self.z_y = self._label_logits()
            if self.far_nll is None or self.far_lse is None:
                self.far_nll, self.far_lse = (torch.full_like(self.z_y, float("nan")) for _ in range(2))
        z = capped(chunk.of(self.logits).to(self.p_y.dtype), self.rows.options.softcap)
        for numbers, value in (
            (self.far_nll, -z.log_softmax(1).gather(1, chunk.of(self.rows.label))),  # of differences, not of lse
            (self.far_lse, z.logsumexp(1, keepdim=True)),
        ):
            chunk.of(numbers).copy_(torch.where(far, value, float("nan")))

    def nll_and_lse(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """lse − z_y = −log p_y; and lse, where anything wants it."""
        nll = torch.log1p(chunk.of(self.others).to(self.rows.dtype) / chunk.of(self.p_y))
        if self.z_y is None:
            return nll, None
        z_y = chunk.of(self.z_y)
        lse = z_y + nll
        if self.far_nll is not None and self.far_lse is not None:
            far_nll, far_lse = chunk.of(self.far_nll), chunk.of(self.far_lse)
            nll = torch.where(far_nll.isnan(), nll, far_nll)
            lse = torch.where(far_lse.isnan(), lse, far_lse)
        return nll, lse


class _Slopes:
    """The coefficients of the gradient, times ``scale``: what each chunk needs is ready before the loop."""

    def __init__(self, rows: _Rows, scale: Value, dtype: torch.dtype) -> None:
        self.rows, self.dtype = rows, dtype
        self.hit = rows.hit * scale  # w_y (1−ε)
        if isinstance(self.hit, Tensor):
            self.hit = self.hit.to(dtype)
        self.spread = None if rows.spread is None else rows.spread * scale  # ε/C
        self.rest = None if self.spread is None else self.spread * rows.total_weight  # ε/C W
        self.z_slope = None
        if rows.options.lse_square_scale:
            self.z_slope = 2 * rows.options.lse_square_scale * rows.weight * scale

    def gradient_(self, chunk: Chunk, p: Tensor, total: Tensor, sums: _RowSums) -> None:
        """p_c A − [c = y] w_y (1−ε) − ε/C w_c in place of ``p``, whose rows add up to ``total``."""
        label, others = chunk.of(self.rows.label), chunk.of(sums.others)
        total = total.to(self.dtype)
        a = chunk.of_value(self.hit) / total
        at_label = (a * others).neg_()
        rest = None if self.rest is None else chunk.of_value(self.rest)  # A − w_y (1−ε)
        if self.z_slope is not None:
            of_lse = chunk.of_value(self.z_slope) * sums.nll_and_lse(chunk)[1]  # type: ignore[operator]
            rest = of_lse if rest is None else rest + of_lse
        if rest is not None:
            rest = rest / total
            a, at_label = a + rest, at_label + rest * chunk.of(sums.p_y)
        p.mul_(a.to(p.dtype))
        if self.spread is not None:
            spread = chunk.of_value(self.spread)
            weight = self.rows.class_weight
            if weight is None:
                p.sub_(spread.to(p.dtype) if isinstance(spread, Tensor) else spread)
                at_label = at_label - spread
            else:
                rounded = spread.to(p.dtype) if isinstance(spread, Tensor) else p.new_full((), spread)
                p.addcmul_(rounded, weight.to(p.dtype).view(1, -1, 1), value=-1)
                at_label = at_label - spread * weight[label]
        p.scatter_(1, label, at_label.to(p.dtype))


def _never(rows: Tensor) -> bool:
    """Is no row true? Off the CPU a look would make the host wait, and the answer is a careful no."""
    return rows.device.type == "cpu" and not bool(rows.any())
