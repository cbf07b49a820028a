"""Rounding float32 numbers to 16 bits, in integer arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ...torch_private import transforms_are_active

__all__ = ["compensated", "round_stochastically", "round_to_nearest", "true_master", "without_infinities"]

# A compensation a little smaller is surely less than half a unit in the last place: no tie of even and odd.
_WITHIN = 1 - 2.0**-6


def round_stochastically(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 numbers to one of their two neighbours in ``dtype``, the nearer the likelier: right on average.

    The bits that are to go get a random number of as many bits added to them; a carry is a step up. Numbers so small
    that float16 is a grid of steps of 2⁻²⁴ are rounded on that grid.
    """
    dropped = _dropped(dtype)
    noise = _random_bits(dropped, wide)
    rounded = _rounded(wide, noise, dtype)
    if dtype == torch.float16:
        rounded = _on_grid(wide, (wide * 2.0**24 + noise * 2.0**-dropped).floor(), rounded)
    return rounded.to(dtype)


def round_to_nearest(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 numbers rounded to ``dtype``, as float32.

    What ``wide.to(dtype).float()`` is to give, and does not in a compiled program: that leaves the way there and back
    out, and computes with more digits than were stored.
    """
    dropped = _dropped(dtype)
    last = (wide.view(torch.int32) >> dropped) & 1  # ties go to even
    rounded = _rounded(wide, last + ((1 << (dropped - 1)) - 1), dtype)
    if dtype == torch.float16:
        rounded = _on_grid(wide, (wide * 2.0**24).round(), rounded)
    return torch.where(rounded.abs() > torch.finfo(dtype).max, rounded * torch.inf, rounded)


def without_infinities(lost: Tensor) -> Tensor:
    """What rounding took away, in place; nothing, where the result is no finite number."""
    return lost.nan_to_num_(0.0, 0.0, 0.0)


def true_master(master: Tensor, param: Tensor) -> Tensor:
    """The master weights that round to the parameter; where somebody else wrote to it, the parameter itself."""
    if _alike(master, param):
        return master
    wide = param.to(master.dtype)
    return torch.where(round_to_nearest(master, param.dtype) == wide, master, wide)


def compensated(param: Tensor, compensation: Tensor) -> Tensor:
    """The parameter, widened, and what its rounding took away.

    After somebody else wrote to it, a compensation that is more than half a unit of its last place is left out.
    """
    wide = param.float()
    compensation = compensation.float()
    within = torch.add(wide, compensation, alpha=_WITHIN)
    if _alike(within, param):
        return wide + compensation
    return wide + torch.where(round_to_nearest(within, param.dtype) == wide, compensation, 0.0)


def _random_bits(count: int, like: Tensor) -> Tensor:
    """Up to 16 random bits for each element, as int32."""
    if not like.is_cpu:
        return torch.randint(0, 1 << count, like.shape, dtype=torch.int32, device=like.device)
    # One random number for four elements: a CPU makes one after the other.
    four = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-like.numel() // 4),), dtype=torch.int64, device=like.device)
    bits = four.view(torch.int16)[: like.numel()].view(like.shape)
    return bits.to(torch.int32) & ((1 << count) - 1)


def _dropped(dtype: torch.dtype) -> int:
    """How many of float32's bits ``dtype`` has no room for."""
    return 16 if dtype == torch.bfloat16 else 13


def _rounded(wide: Tensor, added: Tensor, dtype: torch.dtype) -> Tensor:
    """With that much added to the bits, and without those that are to go."""
    rounded = ((wide.view(torch.int32) + added) & -(1 << _dropped(dtype))).view(torch.float32)
    if _may_look(wide) and wide.sum().isfinite():
        return rounded
    return torch.where(wide.isfinite(), rounded, wide)


def _on_grid(wide: Tensor, steps: Tensor, rounded: Tensor) -> Tensor:
    """So many steps of 2⁻²⁴ where float16 has no finer ones."""
    return torch.where(wide.abs() < 2.0**-14, steps * 2.0**-24, rounded)


def _alike(wide: Tensor, param: Tensor) -> bool:
    """Is it known that the numbers round to the parameter? A CPU finds out in a tenth of the time that masks take."""
    if not _may_look(param):
        return False
    if not param.numel():
        return True
    rounded = wide.to(param.dtype)
    if param.numel() % 4 == param.storage_offset() % 4 == 0 and param.is_contiguous() and rounded.is_contiguous():
        # The bits of four numbers are compared as fast as those of one.
        return torch.equal(rounded.view(-1).view(torch.int64), param.view(-1).view(torch.int64))
    return torch.equal(rounded.view(torch.int16), param.view(torch.int16))


def _may_look(tensor: Tensor) -> bool:
    """May the program depend on the numbers? A GPU would have to be waited for, a compiled program would break."""
    return (
        tensor.is_cpu
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not transforms_are_active()
    )
