"""Gradient times upstream gradient, where that is not 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, on_device, spread

__all__ = ["rescale"]

_BLOCK = 8192


def rescale(gradient: Tensor, factor: Tensor, *, inplace: bool) -> Tensor:
    """See :class:`fastloss.contract.Backend`."""
    if not inplace:
        return gradient * factor
    span = 1 + sum((size - 1) * stride for size, stride in zip(gradient.shape, gradient.stride(), strict=True))
    if gradient.numel() != span:  # there are gaps between its elements
        return gradient.mul_(factor)
    flat = gradient.as_strided((span,), (1,))
    with on_device(gradient):
        _rescale_kernel[(spread(triton.cdiv(span, _BLOCK), gradient.device),)](
            flat, factor, span, BLOCK=_BLOCK, num_warps=4, **FUSED
        )
    return gradient


@triton.jit
def _rescale_kernel(gradient_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    """g ← g · factor. Reads 4 bytes and ends where the factor is 1; else reads and writes g once."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        for start in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
            index = start + tl.arange(0, BLOCK)
            mask = index < n
            g = tl.load(gradient_ptr + index, mask=mask)
            if g.dtype == tl.float64:
                g = g * factor.to(tl.float64)
            else:
                g = (g.to(tl.float32) * factor.to(tl.float32)).to(g.dtype)
            tl.store(gradient_ptr + index, g, mask=mask)
