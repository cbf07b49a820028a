"""Stochastic rounding."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["round_stochastically"]


def round_stochastically(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 numbers to one of their two neighbours in ``dtype``, the nearer the likelier: right on average.

    The bits that are to go get a random number of as many bits added to them; a carry is a step up. Numbers so small
    that float16 is a grid of steps of 2⁻²⁴ are rounded on that grid.
    """
    dropped = 16 if dtype == torch.bfloat16 else 13
    noise = torch.randint(0, 1 << dropped, wide.shape, dtype=torch.int32, device=wide.device)
    rounded = ((wide.view(torch.int32) + noise) & -(1 << dropped)).view(torch.float32)
    rounded = torch.where(wide.isfinite(), rounded, wide)
    if dtype == torch.float16:
        on_grid = (wide * 2.0**24 + noise * 2.0**-dropped).floor() * 2.0**-24
        rounded = torch.where(wide.abs() < 2.0**-14, on_grid, rounded)
    return rounded.to(dtype)
