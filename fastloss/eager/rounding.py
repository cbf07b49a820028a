"""Rounding float32 numbers to 16 bits, in integer arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compensated", "round_stochastically", "round_to_nearest", "true_master", "without_infinities"]

# A compensation a little smaller is surely less than half a unit in the last place: no tie of even and odd.
_WITHIN = 1 - 2.0**-6


def round_stochastically(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 numbers to one of their two neighbours in ``dtype``, the nearer the likelier: right on average.

    The bits that are to go get a random number of as many bits added to them; a carry is a step up. Numbers so small
    that float16 is a grid of steps of 2⁻²⁴ are rounded on that grid.
    """
    dropped = _dropped(dtype)
    noise = torch.randint(0, 1 << dropped, wide.shape, dtype=torch.int32, device=wide.device)
    on_grid = (wide * 2.0**24 + noise * 2.0**-dropped).floor() * 2.0**-24
    return _rounded(wide, noise, on_grid, dtype).to(dtype)


def round_to_nearest(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 numbers rounded to ``dtype``, as float32.

    What ``wide.to(dtype).float()`` is to give, and does not in a compiled program: that leaves the way there and back
    out, and computes with more digits than were stored.
    """
    dropped = _dropped(dtype)
    last = (wide.view(torch.int32) >> dropped) & 1  # ties go to even
    on_grid = (wide * 2.0**24).round() * 2.0**-24
    rounded = _rounded(wide, last + ((1 << (dropped - 1)) - 1), on_grid, dtype)
    return torch.where(rounded.abs() > torch.finfo(dtype).max, rounded * torch.inf, rounded)


def without_infinities(lost: Tensor) -> Tensor:
    """What rounding took away, in place; nothing, where the result is no finite number."""
    return lost.nan_to_num_(0.0, 0.0, 0.0)


def true_master(master: Tensor, param: Tensor) -> Tensor:
    """The master weights that round to the parameter; where somebody else wrote to it, the parameter itself."""
    wide = param.to(master.dtype)
    return torch.where(round_to_nearest(master, param.dtype) == wide, master, wide)


def compensated(wide: Tensor, compensation: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter of ``dtype``, widened, and what its rounding took away.

    After somebody else wrote to it, a compensation that is more than half a unit of its last place is left out.
    """
    compensation = compensation.to(wide.dtype)
    belongs = round_to_nearest(wide + _WITHIN * compensation, dtype) == wide
    return wide + torch.where(belongs, compensation, 0.0)


def _dropped(dtype: torch.dtype) -> int:
    """How many of float32's bits ``dtype`` has no room for."""
    return 16 if dtype == torch.bfloat16 else 13


def _rounded(wide: Tensor, added: Tensor, on_grid: Tensor, dtype: torch.dtype) -> Tensor:
    dropped = _dropped(dtype)
    rounded = ((wide.view(torch.int32) + added) & -(1 << dropped)).view(torch.float32)
    rounded = torch.where(wide.isfinite(), rounded, wide)
    return torch.where(wide.abs() < 2.0**-14, on_grid, rounded) if dtype == torch.float16 else rounded
