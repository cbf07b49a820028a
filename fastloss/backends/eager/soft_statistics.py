r"""The numbers of each row from logits and soft targets, in plain torch ops, chunk by chunk.

With z the logits (after the softcap), m a row's maximum, t its targets and w the class weights:

    lse = m + log Σ_c exp(z_c − m),   mass = Σ_c w_c t_c,   nll = mass (lse − m) + Σ_c w_c t_c (m − z_c)

The gradients are those of the contract's :class:`Backend`. Both tensors are read once, and each gradient is written
once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import ExternalLabel, LossInputs, SoftRowStatistics, WantedGradients, compute_dtype
from .chunks import Chunk, Scratch
from .statistics import sweep_softmax, visit_rows
from .sweep import LOG2_E, scaling_of, times

__all__ = ["soft_statistics_backward", "soft_statistics_forward"]


def soft_statistics_forward(inputs: LossInputs, *, ranked: ExternalLabel | None = None) -> SoftRowStatistics:
    """See :class:`fastloss.backends.contract.Backend`."""
    dtype = torch.promote_types(compute_dtype(inputs.input.dtype), compute_dtype(inputs.target.dtype))
    numbers = visit_rows(("lse", "nll", "mass"), inputs, ranked, dtype, soft=True)
    return SoftRowStatistics(**{**dict.fromkeys(SoftRowStatistics._fields), **numbers})


def soft_statistics_backward(
    upstreams: Sequence[Tensor | None], inputs: LossInputs, lse: Tensor, mass: Tensor, wanted: WantedGradients
) -> tuple[Tensor | None, Tensor | None]:
    """See :class:`fastloss.backends.contract.Backend`."""
    logits, target, weight, options = inputs
    rows = (logits.shape[0], 1, logits.shape[2])
    dtype = torch.promote_types(compute_dtype(logits.dtype), compute_dtype(target.dtype))
    zero, scaling = lse.new_zeros(rows), scaling_of(options, logits.device)
    of_lse, of_nll, of_mass, of_sum = (zero if u is None else u.reshape(rows) for u in upstreams)
    level, of_sum = (times(u, scaling.slope).to(dtype) for u in (of_lse + of_nll * mass.view(rows), of_sum))
    of_logit = -times(of_nll, scaling.slope).to(dtype)
    of_nll, of_mass = of_nll.to(dtype), of_mass.to(dtype)
    some_sum = upstreams[3] is not None
    w = None if weight is None else weight.to(dtype).view(1, -1, 1)
    of_logits, of_target = wanted.tensors(inputs)

    def work(chunk: Chunk, log_p: Tensor) -> None:
        if of_target is not None:
            d = Scratch("logits", dtype, log_p.device).like(log_p)
            torch.mul(log_p, -chunk.of(of_nll), out=d).add_(chunk.of(of_mass))
            chunk.of(of_target).copy_(d if w is None else d.mul_(w))
        if of_logits is None:
            return
        p = log_p.mul_(LOG2_E).exp2_().mul_(chunk.of(level))
        u = Scratch("target", dtype, p.device).like(p).copy_(chunk.of(target)).mul_(chunk.of(of_logit))
        if some_sum:
            u.add_(chunk.of(of_sum))
        p.add_(u) if w is None else p.addcmul_(u, w)

    sweep_softmax(logits, dtype, scaling, lse, work, of_logits)
    return of_logits, of_target
