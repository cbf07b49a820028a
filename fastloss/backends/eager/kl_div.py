r"""Divergences of two softmaxes and their gradient over the student's logits, in plain torch ops, chunk by chunk.

With x a student's logits, z = softcap(x) / T, s their softmax, t a teacher's, d_c = log t_c − log s_c, and
m = β t + (1−β) s, a row has (Agarwal et al., On-Policy Distillation of Language Models, eq. 1; arXiv 2306.13649)

    β = 0        L = KL(t ‖ s) = Σ_c t_c d_c                          ∂L/∂z_c = s_c − t_c
    β = 1        L = KL(s ‖ t) = −Σ_c s_c d_c                         ∂L/∂z_c = s_c (−d_c − L)
    0 < β < 1    L = β Σ_c t_c u_c + (1−β) Σ_c s_c r_c                ∂L/∂z_c = (1−β) s_c (r_c − Σ_k s_k r_k)

with u_c = log t_c − log m_c and r_c = log s_c − log m_c. (The derivative of L by log s_c is s_c times −t_c / s_c,
log (s_c / t_c) + 1, or (1−β) log (s_c / m_c), since the terms of ∂m cancel; a softmax takes its mean away.) Products
with a probability of 0 are 0, whatever the logarithm beside it is.

Both logarithms of the mixture come from the difference d, so that nothing cancels and nothing overflows. For β ≤ ½

    β (e^d − 1) < 1:  r = −log1p(β (e^d − 1)),       u = r + d
    elsewhere:        u = −log(β + (1−β) e^−d),      r = u − d

and for β > ½ with the sides, and β and 1−β, exchanged. Near an end the mixture is nearly one side, whose logarithm
is small, and is exact to its own size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import DivergenceInputs, DivergenceRows
from .chunks import Chunk, Scratch, chunks, row_dtype
from .sweep import LOG2_E, Scaling, scaling_of
from .workers import for_each

__all__ = ["kl_div"]

# Exponents whose exponentials are finite.
_MOST_EXPONENT = {torch.float32: 88.0, torch.float64: 700.0}
# Buffers of a piece's size, about: a piece is so much smaller than the chunks of other functions.
_BUFFERS = 4


def kl_div(
    inputs: DivergenceInputs, known: DivergenceRows | None = None, *, lse_only: bool = False
) -> DivergenceRows:
    """See :class:`fastloss.backends.contract.Backend`; each chunk of rows is read once."""
    student, teacher, upstream, _ = inputs
    outer, classes, inner = student.shape
    rows, device = (outer, 1, inner), student.device
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    known = DivergenceRows() if known is None else known
    sums = not lse_only and (known.level is None or known.loss is None)
    numbers = DivergenceRows(
        *(
            number.view(rows)
            if number is not None
            else student.new_empty(rows, dtype=row_dtype(device))
            if wanted
            else None
            for number, wanted in zip(known, (True, True, sums, sums), strict=True)
        )
    )
    slopes = None if upstream is None else upstream.view(rows)

    def visit(chunk: Chunk) -> None:
        piece = _Piece(chunk, inputs, numbers, known, dtype)
        if not lse_only:
            level = piece.sums()
            if slopes is not None:
                piece.write_gradient(chunk.of(slopes), level)

    # A piece has several buffers, which stay in a cache together if it is small.
    for_each(chunks(torch.Size((outer, _BUFFERS * classes, inner)), dtype), visit, device)
    return DivergenceRows(*(None if number is None else number.reshape(-1) for number in numbers))


class _Piece:
    """The logits of one chunk, of both sides."""

    def __init__(
        self,
        chunk: Chunk,
        inputs: DivergenceInputs,
        numbers: DivergenceRows,
        known: DivergenceRows,
        dtype: torch.dtype,
    ) -> None:
        student, teacher, _, self.options = inputs
        self.x, self.dtype = chunk.of(student), dtype
        self.scalings = [scaling_of(each, student.device) for each in (self.options.student, self.options.teacher)]
        self.numbers = [None if number is None else chunk.of(number) for number in numbers]
        self.known = [number is not None for number in known]
        self._teacher = chunk.of(teacher)
        self.s, self.t = self._sides()

    def _sides(self) -> tuple[_Side, _Side]:
        sides = (self.x, self._teacher), self.scalings, self.numbers[:2], self.known[:2], ("student", "teacher")
        return tuple(_side(*of_side, self.dtype) for of_side in zip(*sides, strict=True))  # type: ignore[return-value]

    def sums(self) -> Tensor:
        """Compute the rows' sums, and return what their gradient needs; ``below`` of the student holds its terms."""
        loss, level = self._sums(careful=not self.x.is_cpu)
        if self.x.is_cpu and not loss.isfinite().all():
            # Elsewhere the host would have to wait for that. Some logarithm was infinite, beside a probability of 0.
            self.s, self.t = self._sides()
            loss, level = self._sums(careful=True)
        for number, value, known in zip(self.numbers[2:], (loss, level), self.known[2:], strict=True):
            if number is not None and not known:
                number.copy_(value)
        return self.numbers[3].to(self.dtype) if self.known[3] and self.numbers[3] is not None else level

    def _sums(self, *, careful: bool) -> tuple[Tensor, Tensor]:
        s, t, beta = self.s, self.t, self.options.beta
        s_is_0, t_is_0 = (s.e == 0, t.e == 0) if careful else (None, None)
        shift = s.log_total - t.log_total
        d = torch.sub(t.below, s.below, out=s.below)
        d.add_(shift.to(self.dtype))

        def mean(terms: Tensor, is_0: Tensor | None, total: Tensor) -> Tensor:
            terms = terms if is_0 is None else terms.masked_fill_(is_0, 0)
            return terms.sum(1, keepdim=True) / total

        if beta == 0:
            loss = mean(torch.mul(t.e, d, out=d), t_is_0, t.total)
            return loss, loss
        if beta == 1:
            loss = mean(torch.mul(s.e, d, out=d).neg_(), s_is_0, s.total)
            return loss, loss
        low, e = min(beta, 1 - beta), d if beta <= 0.5 else d.neg_()
        excess = torch.clamp(e, max=_MOST_EXPONENT[self.dtype], out=t.below).expm1_().mul_(low)
        far = excess >= 1
        of_near = Scratch("mixture", self.dtype, d.device).like(d)
        if not far.is_cpu or far.any():
            of_far = torch.clamp(e, min=0, out=of_near).neg_().exp_().mul_(1 - low).add_(low).log_().neg_()
            of_most = torch.where(far, of_far - e, excess.log1p_().neg_(), out=excess)
            of_other = torch.where(far, of_far, e.add_(of_most), out=of_near)
        else:
            of_most = excess.log1p_().neg_()
            of_other = torch.add(of_most, e, out=of_near)
        r, u = (of_most, of_other) if beta <= 0.5 else (of_other, of_most)
        of_t = mean(u.mul_(t.e), t_is_0, t.total)
        of_s = mean(torch.mul(r, s.e, out=d), s_is_0, s.total)
        return of_t * beta + of_s * (1 - beta), of_s

    def write_gradient(self, slope: Tensor, level: Tensor) -> None:
        """Write the gradient over the student's logits, at upstream gradients of the rows."""
        s, t, beta, x = self.s, self.t, self.options.beta, self.x
        factor = self.scalings[0].slope * (1 - beta if 0 < beta < 1 else 1.0)
        of_s = (slope * factor / s.total).to(self.dtype)
        out = x if x.dtype == self.dtype and s.tanh is None else s.below
        if beta == 0:
            of_t = (slope * -factor / t.total).to(self.dtype)
            g = torch.addcmul(s.e.mul_(of_s), t.e, of_t, out=out)
        else:
            g = torch.addcmul(s.e.mul_(of_s * -level), s.below, of_s, out=out)
        if s.tanh is not None:  # times 1 − tanh², without the cancellation near tanh = 1
            g.mul_(1 - s.tanh).mul_(s.tanh.add_(1))
        idle = slope == 0  # such a row may hold NaN
        if not idle.is_cpu or idle.any():
            g.masked_fill_(idle, 0)
        if g is not x:
            x.copy_(g)


class _Side(NamedTuple):
    """The softmax of a chunk, exp(below) / total."""

    e: Tensor  # exp(below)
    below: Tensor  # z less a number for each row
    total: Tensor  # (outer, 1, inner), as the next one
    log_total: Tensor  # in the dtype of numbers of rows
    tanh: Tensor | None


def _side(x: Tensor, scaling: Scaling, lse: Any, known: bool, use: str, dtype: torch.dtype) -> _Side:
    """Return the softmax of the logits of x, of a known lse, or one that is written to ``lse``."""
    below, e = (Scratch(f"{use}{number}", dtype, x.device).like(x) for number in range(2))
    z, tanh = x if x.dtype == dtype else below.copy_(x), None
    if scaling.capped:
        z = tanh = torch.div(z, scaling.divisor, out=Scratch(f"{use} tanh", dtype, x.device).like(x)).tanh_()
    if scaling.capped or isinstance(scaling.outer, Tensor) or scaling.outer != 1.0:
        z = torch.mul(z, scaling.outer, out=below)
    if known:
        # In two parts, since the logits are near it and the difference must be exact.
        high = lse.to(dtype)
        below = torch.sub(z, high, out=below).sub_((lse - high).to(dtype))
        one = torch.ones_like(high)
        return _Side(torch.mul(below, LOG2_E, out=e).exp2_(), below, one, torch.zeros_like(lse), tanh)
    m = z.amax(1, keepdim=True)
    m.masked_fill_(m == -torch.inf, 0)
    below = torch.sub(z, m, out=below)
    total = torch.mul(below, LOG2_E, out=e).exp2_().sum(1, keepdim=True)
    log_total = total.to(row_dtype(x.device)).log()
    lse.copy_(log_total + m)
    return _Side(e, below, total, log_total, tanh)
