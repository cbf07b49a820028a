"""Rounding float32 numbers to 16 bits, in integer arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ..torch_private import transforms_are_active

__all__ = ["compensated", "round_stochastically", "round_to_nearest", "true_master", "without_infinities"]

# A compensation times this is surely less than half a unit in the last place: no tie of even and odd.
_WITHIN = 1 - 2.0**-6
# SplitMix64's constants, as signed numbers; the second step is the 64 bits of √2's fraction, odd.
_STEPS = 0x9E3779B97F4A7C15 - (1 << 64), 0x6A09E667F3BCC909
_MIXES = (30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))


def round_stochastically(wide: Tensor, dtype: torch.dtype, seed: Tensor | None = None) -> Tensor:
    """Round float32 numbers to one of their two neighbours in ``dtype``, the nearer the likelier: right on average.

    A random number is added to the bits that ``dtype`` lacks; a carry is a step up. Where float16 is a grid of steps
    of 2⁻²⁴, numbers are rounded on that grid. A seed, int64 ``(1,)``, is advanced; without one the numbers are those
    of torch's generator.
    """
    dropped = _dropped(dtype)
    noise = _random_bits(dropped, wide, seed)
    rounded = _rounded(wide, noise, dtype)
    if dtype == torch.float16:
        rounded = _on_grid(wide, (wide * 2.0**24 + noise * 2.0**-dropped).floor(), rounded)
    return rounded.to(dtype)


def round_to_nearest(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 numbers rounded to ``dtype``, as float32.

    ``wide.to(dtype).float()`` does not round in a compiled program: both conversions are left out there, and the
    program computes with more digits than were stored.
    """
    dropped = _dropped(dtype)
    last = (wide.view(torch.int32) >> dropped) & 1  # ties go to even
    rounded = _rounded(wide, last + ((1 << (dropped - 1)) - 1), dtype)
    if dtype == torch.float16:
        rounded = _on_grid(wide, (wide * 2.0**24).round(), rounded)
    return torch.where(rounded.abs() > torch.finfo(dtype).max, rounded * torch.inf, rounded)


def without_infinities(lost: Tensor) -> Tensor:
    """Set to 0, in place, the rounding errors of results that are no finite numbers."""
    return lost.nan_to_num_(0.0, 0.0, 0.0)


def true_master(master: Tensor, param: Tensor) -> Tensor:
    """Return the master weights that round to the parameter; elsewhere the program has written it, and it counts."""
    if _rounds_to(master, param):
        return master
    wide = param.to(master.dtype)
    return torch.where(round_to_nearest(master, param.dtype) == wide, master, wide)


def compensated(param: Tensor, compensation: Tensor) -> Tensor:
    """Return the parameter in float32 plus the error of its rounding.

    A compensation of more than half a unit of the parameter's last place is left out: the program has written to the
    parameter since.
    """
    wide = param.float()
    compensation = compensation.float()
    within = torch.add(wide, compensation, alpha=_WITHIN)
    if _rounds_to(within, param):
        return wide + compensation
    return wide + torch.where(round_to_nearest(within, param.dtype) == wide, compensation, 0.0)


def _random_bits(count: int, like: Tensor, seed: Tensor | None = None) -> Tensor:
    """Return up to 16 random bits for each element, as int32."""
    if seed is None and not like.is_cpu:
        return torch.randint(0, 1 << count, like.shape, dtype=torch.int32, device=like.device)
    # One random number for four elements: a CPU makes one after the other.
    numbers = -(-like.numel() // 4)
    if seed is None:
        four = torch.randint(-(1 << 63), (1 << 63) - 1, (numbers,), dtype=torch.int64, device=like.device)
    else:
        four = _hashed(seed, numbers)
        seed.add_(1)
    bits = four.view(torch.int16)[: like.numel()].view(like.shape)
    return bits.to(torch.int32) & ((1 << count) - 1)


def _hashed(seed: Tensor, count: int) -> Tensor:
    """Return ``count`` pseudorandom int64 numbers: SplitMix64 (Steele et al., 2014) of positions and seed."""
    x = torch.arange(count, dtype=torch.int64, device=seed.device).mul_(_STEPS[0]).add_(seed * _STEPS[1])
    for shift, factor in _MIXES:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # a logical shift
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _dropped(dtype: torch.dtype) -> int:
    """Return how many bits of float32's mantissa ``dtype`` lacks."""
    return 16 if dtype == torch.bfloat16 else 13


def _rounded(wide: Tensor, added: Tensor, dtype: torch.dtype) -> Tensor:
    """Add ``added`` to the float32 bit patterns and clear the mantissa bits that ``dtype`` lacks."""
    rounded = ((wide.view(torch.int32) + added) & -(1 << _dropped(dtype))).view(torch.float32)
    if _may_read(wide) and wide.sum().isfinite():
        return rounded
    return torch.where(wide.isfinite(), rounded, wide)


def _on_grid(wide: Tensor, steps: Tensor, rounded: Tensor) -> Tensor:
    """Return ``steps`` · 2⁻²⁴ where float16 has no finer steps, else ``rounded``."""
    return torch.where(wide.abs() < 2.0**-14, steps * 2.0**-24, rounded)


def _rounds_to(wide: Tensor, param: Tensor) -> bool:
    """Return whether all numbers are known to round to ``param``, in a tenth of the time that masks take on a CPU."""
    if not _may_read(param):
        return False
    if not param.numel():
        return True
    rounded = wide.to(param.dtype)
    if param.numel() % 4 == param.storage_offset() % 4 == 0 and param.is_contiguous() and rounded.is_contiguous():
        # The bits of four numbers are compared as fast as those of one.
        return torch.equal(rounded.view(-1).view(torch.int64), param.view(-1).view(torch.int64))
    return torch.equal(rounded.view(torch.int16), param.view(torch.int16))


def _may_read(tensor: Tensor) -> bool:
    """Return whether Python may read the numbers: not on a GPU, where it would wait, nor in a compiled program."""
    return (
        tensor.is_cpu
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not transforms_are_active()
    )
