r"""Divergences of two softmaxes and their gradient over the student's logits, in plain torch ops, chunk by chunk.

With x a student's logits, z = softcap(x) / T, s their softmax, t a teacher's, d_c = log t_c − log s_c, and
m = β t + (1−β) s, a row has (Agarwal et al., On-Policy Distillation of Language Models, eq. 1; arXiv 2306.13649)

    β = 0        L = KL(t ‖ s) = Σ_c t_c d_c                          ∂L/∂z_c = s_c − t_c
    β = 1        L = KL(s ‖ t) = −Σ_c s_c d_c                         ∂L/∂z_c = s_c (−d_c − L)
    0 < β < 1    L = β Σ_c t_c u_c + (1−β) Σ_c s_c r_c                ∂L/∂z_c = (1−β) s_c (r_c − Σ_k s_k r_k)

with u_c = log t_c − log m_c and r_c = log s_c − log m_c. (The derivative of L by log s_c is s_c times −t_c / s_c,
log (s_c / t_c) + 1, or (1−β) log (s_c / m_c), since the terms of ∂m cancel; a softmax takes its mean away.) Products
with a probability of 0 are 0, whatever the logarithm beside it is.

Both logarithms of the mixture come from the difference d, so that nothing cancels and nothing overflows:

    d ≤ 0:  r = −log1p(β (e^d − 1)),         u = r + d
    d > 0:  u = −log1p((1−β) (e^−d − 1)),    r = u − d
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import DivergenceOptions, DivergenceRows
from .chunks import Chunk, Scratch, chunks, row_dtype
from .sweep import LOG2_E
from .workers import for_each

__all__ = ["kl_div"]


def kl_div(
    student: Tensor,
    teacher: Tensor,
    upstream: Tensor | None,
    options: DivergenceOptions,
    known: DivergenceRows | None = None,
    *,
    lse_only: bool = False,
) -> DivergenceRows:
    """See :class:`fastloss.backends.contract.Backend`; each chunk of rows is read once."""
    outer, _, inner = student.shape
    rows, device, beta = (outer, 1, inner), student.device, options.beta
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    known = DivergenceRows() if known is None else known
    sums = not lse_only and (known.level is None or known.loss is None)
    wanted = (True, True, sums, sums)
    numbers = [
        number.view(rows)
        if number is not None
        else student.new_empty(rows, dtype=row_dtype(device))
        if want
        else None
        for number, want in zip(known, wanted, strict=True)
    ]
    slopes = None if upstream is None else upstream.view(rows)

    def visit(chunk: Chunk) -> None:
        x, of_rows = chunk.of(student), [None if number is None else chunk.of(number) for number in numbers]
        given = [None if number is None else of_row for number, of_row in zip(known, of_rows, strict=True)]
        s = _softmax(x, options.softcap, options.temperature, given[0], dtype, "student")
        t = _softmax(chunk.of(teacher), options.teacher_softcap, options.temperature, given[1], dtype, "teacher")
        for number, lse in zip(of_rows[:2], (s.lse, t.lse), strict=True):
            if number is not None:
                number.copy_(lse)
        if lse_only:
            return
        # From here on log p of the student is the memory of d, and log p of the teacher that of the gradient.
        d = torch.sub(t.log_p, s.log_p, out=s.log_p)
        s_is_0, t_is_0 = s.p == 0, t.p == 0
        if beta == 0:
            loss = torch.mul(t.p, d, out=d).masked_fill_(t_is_0, 0).sum(1, keepdim=True)
            level, g = loss, s.p.sub_(t.p)
        elif beta == 1:
            g = torch.mul(s.p, d, out=d).neg_().masked_fill_(s_is_0, 0)
            level = loss = g.sum(1, keepdim=True)
        else:
            greater = torch.abs(d, out=t.log_p).neg_().expm1_()
            above = d > 0
            greater.mul_(torch.where(above, d.new_tensor(1 - beta), d.new_tensor(beta))).log1p_().neg_()
            of_t = torch.minimum(d, d.new_zeros(())).add_(greater)
            of_t.mul_(t.p).masked_fill_(t_is_0, 0)
            g = greater.sub_(d.clamp_(min=0)).mul_(s.p).masked_fill_(s_is_0, 0)
            level = g.sum(1, keepdim=True)
            loss = of_t.sum(1, keepdim=True).mul_(beta).add_(level, alpha=1 - beta)
        for number, value, old in zip(of_rows[2:], (loss, level), given[2:], strict=True):
            if number is not None and old is None:
                number.copy_(value)
        if slopes is None:
            return
        if beta != 0:
            level = level if given[3] is None else given[3].to(dtype)
            g.sub_(s.p.mul_(level))
        slope = chunk.of(slopes)
        g.mul_((slope * ((1 - beta) / options.temperature if 0 < beta < 1 else 1 / options.temperature)).to(dtype))
        if s.tanh is not None:  # times 1 − tanh², without the cancellation near tanh = 1
            g.mul_(1 - s.tanh).mul_(s.tanh.add_(1))
        x.copy_(g.masked_fill_(slope == 0, 0))  # a row without an upstream gradient may hold NaN

    for_each(chunks(student.shape, dtype), visit, device)
    return DivergenceRows(*(None if number is None else number.reshape(-1) for number in numbers))


class _Softmax(NamedTuple):
    """The softmax of a chunk."""

    p: Tensor
    log_p: Tensor
    lse: Tensor  # (outer, 1, inner)
    tanh: Tensor | None


def _softmax(
    x: Tensor, softcap: float | None, temperature: float, lse: Tensor | None, dtype: torch.dtype, use: str
) -> _Softmax:
    """Return the softmax of z = softcap(x) / temperature; with an ``lse``, p = exp(z − lse)."""
    log_p, p = (Scratch(f"{use}{number}", dtype, x.device).like(x) for number in range(2))
    z, tanh = log_p.copy_(x), None
    if softcap is not None:
        tanh = torch.div(z, softcap, out=Scratch(f"{use} tanh", dtype, x.device).like(x)).tanh_()
        z = torch.mul(tanh, softcap, out=log_p)
    if temperature != 1:
        z.div_(temperature)
    wide = row_dtype(x.device)
    if lse is None:
        m = z.amax(1, keepdim=True)
        m.masked_fill_(m == -torch.inf, 0)
        z.sub_(m)
        total = torch.mul(z, LOG2_E, out=p).exp2_().sum(1, keepdim=True)
        lse = total.to(wide).log()
        z.sub_(lse.to(dtype))
        return _Softmax(p.div_(total), z, lse + m, tanh)
    # In two parts, since the logits are near it and the difference must be exact.
    high = lse.to(dtype)
    z.sub_(high).sub_((lse - high).to(dtype))
    return _Softmax(torch.mul(z, LOG2_E, out=p).exp2_(), z, lse, tanh)
