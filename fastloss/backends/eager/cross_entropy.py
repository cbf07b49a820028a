r"""Cross-entropy in plain torch ops, chunk by chunk.

With z the logits (scaled, and after the softcap), p their softmax, y the label, w the class weights, W = Σ w, ε the
label smoothing over C classes and λ the scale of the squared log-sum-exp, one row's loss is

    L   =  w_y (1−ε) (lse − z_y)  +  w_y λ lse²  +  ε/C (W lse − Σ_c w_c z_c)
    ∂L/∂z_c  =  p_c A  −  [c = y] w_y (1−ε)  −  ε/C w_c,      A = w_y (1−ε) + 2 λ w_y lse + ε/C W

(Label smoothing: Szegedy et al. 2016, arXiv:1512.00567, with weights as torch has them. λ lse²: the z-loss of
PaLM, arXiv:2204.02311, §5. Softcap: z = cap · tanh(x / cap), Gemma 2, arXiv:2408.00118, §2.)

A chunk is read from memory once: its exponentials go straight into the gradient's slice (or, for float16 and
bfloat16, into one small float32 buffer that is rounded once into that slice), and everything else is done in place
there. Besides the gradient no buffer grows with N·V.

A number that is the same for all rows stays a Python number (:data:`.chunks.Value`): without class weights and
ignored rows, as in most calls, no operation is spent on it. At a thousand classes a call's many small operations cost
as much as its passes over the logits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..contract import Forward, LossInputs, compute_dtype
from .accuracy import TargetRanks, inside_label, reduce_accuracy
from .chunks import Chunk, Value, chunks, row_dtype
from .sweep import LN_2, Piece, scaled, scaling_of, sweep
from .workers import for_each

__all__ = ["cross_entropy_backward", "cross_entropy_forward", "rescale"]


def cross_entropy_forward(
    inputs: LossInputs, *, loss_dtype: torch.dtype, gradient: bool | None, inplace: bool, divisor: Any = None
) -> Forward:
    """See :class:`fastloss.backends.contract.Backend`."""
    logits, options, rows = inputs.input, inputs.options, _Rows(inputs)
    scale = rows.mean_scale() if options.reduction == "mean" else 1.0
    slope = scale
    if divisor is not None:
        slope = divisor.reciprocal().item() if divisor.is_cpu else divisor.to(rows.dtype).reciprocal()
    ranks = TargetRanks(rows.label, options.topk) if options.topk else None
    result = None
    if gradient:
        result = logits if inplace else torch.empty_like(logits)
    losses, nll = _sweep(logits, rows, result, slope * rows.scaling.slope, ranks=ranks)

    loss = losses.flatten() if options.reduction == "none" else losses.sum()
    if isinstance(scale, Tensor):
        loss = torch.where(scale.isinf(), torch.nan, loss * scale)  # rows that weigh nothing have no mean
    elif scale != 1.0:
        loss = loss * scale
    accuracy: tuple[Tensor, ...] = ()
    if ranks is not None:
        accuracy = reduce_accuracy(ranks.right, rows.counted, rows.invalid, options.reduction)
    # A copy in any case: an autograd.Function must not return a view.
    return Forward(loss.to(loss_dtype, copy=True), accuracy, result, (), nll if gradient and not inplace else None)


def cross_entropy_backward(upstream: Tensor, inputs: LossInputs, saved: Sequence[Tensor], *, inplace: bool) -> Tensor:
    """See :class:`fastloss.backends.contract.Backend`; nothing is saved, the softmax is computed again."""
    logits, reduction, rows = inputs.input, inputs.options.reduction, _Rows(inputs)
    upstream = upstream.to(rows.dtype)
    scale: Value = upstream.reshape(rows.shape) if reduction == "none" else upstream
    if reduction == "mean":
        scale = scale * rows.mean_scale()
    result = logits if inplace else torch.empty_like(logits)
    _sweep(logits, rows, result, scale * rows.scaling.slope, ranks=None)
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
    """The numbers of each row that are known before its logits are read.

    Rows are few beside logits: their numbers are float64 where the device has it, and rounded once, at the end.
    """

    def __init__(self, inputs: LossInputs) -> None:
        logits, target, weight, options = inputs
        outer, classes, inner = logits.shape
        eps = options.label_smoothing
        self.options, self.scaling = options, scaling_of(options, logits.device)
        self.dtype = row_dtype(logits.device)
        self.shape = (outer, 1, inner)
        self.label = target.view(self.shape).long()
        self.ignored: Tensor | None = self.label == options.ignore_index  # None: no row is
        self.counted: Tensor | None = None  # the other rows; None: all
        self.invalid: Tensor | None = None  # counted rows whose label is out of bounds
        if self.ignored.is_cpu and not bool(self.ignored.any()):  # elsewhere the host would have to wait
            self.ignored = None
        else:
            self.counted = ~self.ignored
            self.label, self.invalid = inside_label(self.label, self.counted, classes)
        self.class_weight = None if weight is None else weight.to(self.dtype)  # w
        self.weight: Value = 1.0 if self.counted is None else self.counted.to(self.dtype)  # w_y, 0 if ignored
        self.smoothing: Value | None = self.weight * (eps / classes) if eps else None  # ε/C, 0 if ignored
        self.total_weight: Value = float(classes)  # W
        if self.class_weight is not None:
            self.weight = self.class_weight[self.label] * self.weight
            self.total_weight = self.class_weight.sum()
        if self.invalid is not None:
            self.weight = torch.where(self.invalid, float("nan"), self.weight)
        self.label_share = self.weight * (1 - eps) if eps else self.weight  # w_y (1−ε)

    def mean_scale(self) -> Value:
        """Return 1 / (the sum of the counted rows' weights): infinite without counted rows, as 0 / 0 must be NaN."""
        if isinstance(self.weight, Tensor):
            return self.weight.sum().reciprocal()
        return 1.0 / self.label.numel()

    def loss(self, nll: Tensor, lse: Tensor | None, uniform: Tensor | None) -> Tensor:
        """Return each row's loss from lse − z_y, lse and W lse − Σ_c w_c z_c, if the options need the last two."""
        loss = self.label_share * nll if isinstance(self.label_share, Tensor) or self.label_share != 1.0 else nll
        if lse is not None and self.options.lse_square_scale:
            loss += self.options.lse_square_scale * self.weight * lse.square()
        if self.smoothing is not None and uniform is not None:
            loss += self.smoothing * uniform
        return loss if self.ignored is None else loss.masked_fill_(self.ignored, 0)


def _sweep(
    logits: Tensor, rows: _Rows, gradient: Tensor | None, scale: Value, *, ranks: TargetRanks | None
) -> tuple[Tensor, Tensor]:
    """Return every row's loss and −log p_y, and write the gradient times ``scale``.

    ``scale``, which contains the slope of z, is a number, a scalar tensor, or a value per row. ``gradient`` may be
    ``logits`` itself.
    """
    dtype, options = compute_dtype(logits.dtype), rows.options
    sums = _RowSums(logits, rows, overwritten=gradient is logits)
    coefficients = None
    if gradient is not None:  # 16-bit logits don't resolve what float64 would save
        coefficients = _Coefficients(rows, scale, rows.dtype if logits.dtype == dtype else dtype)
    # Rows whose p_y underflows are computed anew after the sweep, unless it needs their lse or overwrites the logits.
    mends_at_once = gradient is logits or (gradient is not None and options.lse_square_scale != 0)

    def work(chunk: Chunk, piece: Piece) -> None:
        (total,) = piece.exponentials(lambda: sums.visit_exponents(chunk, piece.p))
        if mends_at_once:
            sums.mend_underflow(chunk)
        if coefficients is not None:
            coefficients.gradient_(chunk, piece.p, total, sums)

    sweep(logits, dtype, rows.scaling, work, gradient, zero_rows=rows.ignored, ranks=ranks)
    if not mends_at_once and sums.any_underflowed(sums.p_y):
        for_each(chunks(logits.shape, dtype), sums.mend_underflow, logits.device)
    nll, lse = sums.nll_and_lse(Chunk((0, logits.shape[0]), (0, logits.shape[2])))
    return rows.loss(nll, lse, sums.uniform), nll


class _RowSums:
    """The numbers of each row that are computed from its logits, ``(outer, 1, inner)`` each."""

    def __init__(self, logits: Tensor, rows: _Rows, overwritten: bool) -> None:
        dtype = compute_dtype(logits.dtype)
        self.logits, self.rows = logits, rows
        # The loss alone needs no lse; then the label's logits are left out, a cache miss each.
        self.z_y = self._label_logits() if overwritten or rows.options.lse_square_scale != 0 else None
        self.p_y = logits.new_empty(rows.shape, dtype=dtype)
        self.others = torch.empty_like(self.p_y)  # Σ_{c≠y} p_c
        self.least = torch.finfo(dtype).tiny / torch.finfo(dtype).eps  # of a p_y whose logarithm is right
        self.uniform: Tensor | None = None  # W lse − Σ_c w_c z_c
        if rows.smoothing is not None:
            self.uniform = torch.empty_like(rows.label, dtype=rows.dtype)
        self._lock = threading.Lock()  # chunks are visited by several threads
        # lse − z_y and lse where p_y has underflowed, NaN elsewhere; None: it has nowhere
        self.exact: tuple[Tensor, Tensor] | None = None

    def _label_logits(self) -> Tensor:
        z_y = self.logits.gather(1, self.rows.label).to(self.rows.dtype)
        return scaled(z_y, self.rows.scaling)

    def visit_exponents(self, chunk: Chunk, p: Tensor) -> tuple[Tensor]:
        """Turn the exponents in ``p`` into exponentials, 0 at the label; return their sums over each row.

        A row's numbers are relative to that sum, whatever was subtracted from its logits. The sum without the label
        gives 1 − p_y, and the loss without the cancellation at p_y near 1.
        """
        dot = None if self.uniform is None else self._weighted_sum(p)
        p.exp2_()
        label = chunk.of(self.rows.label)
        p_y, others = chunk.of(self.p_y), chunk.of(self.others)
        torch.gather(p, 1, label, out=p_y)
        p.scatter_(1, label, 0)
        torch.sum(p, 1, keepdim=True, out=others)
        total = others + p_y
        if self.uniform is not None and dot is not None:
            log_total = total.to(self.rows.dtype).log()
            chunk.of(self.uniform).copy_(self.rows.total_weight * log_total - dot.to(self.rows.dtype) * LN_2)
        return (total,)

    def _weighted_sum(self, p: Tensor) -> Tensor:
        if self.rows.class_weight is None:
            return p.sum(1, keepdim=True)
        with torch.autocast(p.device.type, enabled=False):
            return torch.matmul(self.rows.class_weight.to(p.dtype), p).unsqueeze(1)

    def any_underflowed(self, p_y: Tensor) -> bool:
        """Return whether some may be too small. Off the CPU, where the host would have to wait: True."""
        if not p_y.is_cpu:
            return True
        least = p_y.amin().item()
        return least < self.least or least != least  # a NaN hides the others

    def mend_underflow(self, chunk: Chunk) -> None:
        """Compute lse from the logits again where p_y is too small for its logarithm to be right."""
        p_y = chunk.of(self.p_y)
        if not self.any_underflowed(p_y):
            return
        underflowed = p_y < self.least
        with self._lock:
            if self.z_y is None:
                self.z_y = self._label_logits()
            if self.exact is None:
                nll, lse = (torch.full_like(self.z_y, float("nan")) for _ in range(2))
                self.exact = nll, lse
        z = scaled(chunk.of(self.logits).to(self.p_y.dtype), self.rows.scaling)
        nll = -z.log_softmax(1).gather(1, chunk.of(self.rows.label))  # of differences, not of lse
        for numbers, value in zip(self.exact, (nll, z.logsumexp(1, keepdim=True)), strict=True):
            chunk.of(numbers).copy_(torch.where(underflowed, value, float("nan")))

    def nll_and_lse(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """Return lse − z_y = −log p_y; and lse, where it is needed."""
        nll = torch.log1p(chunk.of(self.others).to(self.rows.dtype) / chunk.of(self.p_y))
        if self.z_y is None:
            return nll, None
        lse = chunk.of(self.z_y) + nll
        if self.exact is not None:
            exact_nll, exact_lse = map(chunk.of, self.exact)
            nll = torch.where(exact_nll.isnan(), nll, exact_nll)
            lse = torch.where(exact_lse.isnan(), lse, exact_lse)
        return nll, lse


class _Coefficients:
    """The coefficients of the gradient, times ``scale``; all that does not depend on the logits is computed once."""

    def __init__(self, rows: _Rows, scale: Value, dtype: torch.dtype) -> None:
        self.rows, self.dtype = rows, dtype
        self.label_share = rows.label_share * scale  # w_y (1−ε)
        if isinstance(self.label_share, Tensor):
            self.label_share = self.label_share.to(dtype)
        self.smoothing = None if rows.smoothing is None else rows.smoothing * scale  # ε/C
        self.uniform = None if self.smoothing is None else self.smoothing * rows.total_weight  # ε/C W
        self.z_loss = None  # 2 λ w_y
        if rows.options.lse_square_scale:
            self.z_loss = 2 * rows.options.lse_square_scale * rows.weight * scale

    def gradient_(self, chunk: Chunk, p: Tensor, total: Tensor, sums: _RowSums) -> None:
        """Write p_c A − [c = y] w_y (1−ε) − ε/C w_c over ``p``, whose rows add up to ``total``."""
        label, others = chunk.of(self.rows.label), chunk.of(sums.others)
        total = total.to(self.dtype)
        a = chunk.of_value(self.label_share) / total
        at_label = (a * others).neg_()
        rest = None if self.uniform is None else chunk.of_value(self.uniform)  # A − w_y (1−ε)
        if self.z_loss is not None:
            of_lse = chunk.of_value(self.z_loss) * sums.nll_and_lse(chunk)[1]  # type: ignore[operator]
            rest = of_lse if rest is None else rest + of_lse
        if rest is not None:
            rest = rest / total
            a, at_label = a + rest, at_label + rest * chunk.of(sums.p_y)
        p.mul_(a.to(p.dtype))
        if self.smoothing is not None:
            smoothing, weight = chunk.of_value(self.smoothing), self.rows.class_weight
            rounded = smoothing.to(p.dtype) if isinstance(smoothing, Tensor) else smoothing
            if weight is None:
                p.sub_(rounded)
                at_label = at_label - smoothing
            else:
                rounded = rounded if isinstance(rounded, Tensor) else p.new_full((), rounded)
                p.addcmul_(rounded, weight.to(p.dtype).view(1, -1, 1), value=-1)
                at_label = at_label - smoothing * weight[label]
        p.scatter_(1, label, at_label.to(p.dtype))
