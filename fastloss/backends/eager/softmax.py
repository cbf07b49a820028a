"""The softmax of a chunk of logits ``(outer, classes, inner)``, but for a factor a row, in fast operations."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LN_2", "capped", "exponents", "is_resolved", "sure_exponents", "tanh_slope_"]

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# Does torch round α · z + m once? Where it rounds the product first, large logits would lose their differences.
_FUSED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def exponents(z: Tensor, out: Tensor) -> Tensor:
    """log₂e · (z − m) into ``out``, which may be ``z``; m, ``(outer, 1, inner)``, is the row's maximum.

    But for one small difference, the same for the whole row, which cancels wherever it is used. exp2, which comes
    next, is torch's fastest exponential. :func:`is_resolved` tells whether that went well.
    """
    m = z.amax(1, keepdim=True)
    if _FUSED:
        torch.add(m * -LOG2_E, z, alpha=LOG2_E, out=out)
    else:
        torch.sub(z, m, out=out).mul_(LOG2_E)
    return m


def sure_exponents(z: Tensor, out: Tensor) -> None:
    """The same from torch's log_softmax, slower; m is the row's log-sum-exp. Right for every logit there is."""
    torch.mul(z.log_softmax(1), LOG2_E, out=out)


def is_resolved(total: Tensor) -> bool:
    """Did :func:`exponents` serve a chunk, by what the exponentials of its rows add up to?

    That is at least about 1, for the maximum itself, unless there is a NaN or an infinity, or the logits are so large
    that their product with log₂e is none.
    """
    low, high = total.aminmax()
    return low.item() > 0.25 and high.item() < 1e30


def tanh_slope_(p: Tensor, tanh: Tensor) -> None:
    """``p`` times 1 − tanh², without the cancellation near tanh = 1; ``tanh`` is used up."""
    p.mul_(1 - tanh)
    p.mul_(tanh.add_(1))


def capped(x: Tensor, softcap: float | None) -> Tensor:
    """cap · tanh(x / cap)."""
    return x if softcap is None else torch.tanh(x / softcap) * softcap
