"""Multiply a gradient by the upstream gradient, in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Memory, alike, on_device
from .tiles import FUSED, grid_for

__all__ = ["rescale"]

_BLOCK = 8192
_launches: Memory[Launch] = Memory()


def rescale(gradient: Tensor, factor: Tensor, *, inplace: bool) -> Tensor:
    """See :class:`fastloss.backends.contract.Backend`."""
    if not inplace:
        return gradient * factor
    span = gradient.numel()
    if not gradient.is_contiguous():
        reach = 1 + sum((n - 1) * step for n, step in zip(gradient.shape, gradient.stride(), strict=True))
        if span != reach:  # there are gaps between the elements
            return gradient.mul_(factor)

    def make() -> Launch:
        programs = grid_for(triton.cdiv(span, _BLOCK), gradient.device)
        return Launch(_rescale_kernel, (programs,), {"BLOCK": _BLOCK, "num_warps": 4, **FUSED})

    launch = _launches.get((span, gradient.device, alike(gradient), alike(factor)), make)
    with on_device(gradient):
        launch(gradient, factor, span)
    return gradient


@triton.jit
def _rescale_kernel(gradient_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    """Multiply in place: g ← g · factor. Reads the factor alone if it is 1; else reads and writes g once."""
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
