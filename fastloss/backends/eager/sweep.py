"""The sweep over chunks of logits ``(outer, classes, inner)``, and the softmax of a chunk in fast operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import LossOptions
from .accuracy import TargetRanks
from .chunks import Chunk, Scratch, Value, chunks, row_dtype
from .workers import for_each

__all__ = [
    "LN_2",
    "LOG2_E",
    "Piece",
    "Scaling",
    "chunk_buffer",
    "scaled",
    "scaling_of",
    "sweep",
    "times",
]

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# Whether torch rounds α · z + m once. Where it rounds the product first, large logits would lose their differences.
_FUSED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


class Piece:
    """The logits of one chunk: ``x`` as they were given, ``z`` in the dtype of the arithmetic, times ``unit``.

    ``p`` is a buffer of their shape and that dtype. ``z`` is ``x`` itself where that will do; else it lies in ``p``.
    ``unit`` is a number by which it is still to be multiplied: 1 beside a softcap.
    """

    def __init__(self, chunk: Chunk, x: Tensor, p: Tensor, scaling: Scaling, ranks: TargetRanks | None) -> None:
        self.x, self.p, self._scaling = x, p, scaling
        self.z = x if x.dtype == p.dtype else p.copy_(x)
        if ranks is not None:
            ranks.visit(chunk, self.z)
        self.tanh: Tensor | None = None
        self.unit: Value = scaling.outer
        if scaling.capped:
            self.tanh = torch.div(self.z, scaling.divisor, out=Scratch("tanh", p.dtype, x.device).like(x)).tanh_()
            self.z, self.unit = torch.mul(self.tanh, scaling.outer, out=p), 1.0

    def exponentials(self, sums: Callable[[], tuple[Tensor, ...]], *, level: bool = False) -> list[Tensor]:
        """Compute exp(z − m) with a number m for each row; return sums over each row, and m if ``level``.

        ``sums`` turns the exponents log₂e (z − m) in ``p`` into exponentials and returns sums, first theirs. It is
        called again where the fast way to the exponents was not right.
        """
        if self.x.is_cpu:  # elsewhere reading the sums would make the host wait
            maximum = _exponents(self.z, self.p, self.unit)
            result = sums()
            if _is_resolved(result[0]):
                return [*result, times(maximum, self.unit)] if level else [*result]
            if self.tanh is not None:
                self.z = torch.mul(self.tanh, self._scaling.outer, out=self.p)
            elif self.z is not self.x:
                self.z = self.p.copy_(self.x)
        z = times(self.z, self.unit)
        lse = [z.logsumexp(1, keepdim=True)] if level else []
        torch.mul(z.log_softmax(1), LOG2_E, out=self.p)  # slower, and right for every logit there is
        return [*sums(), *lse]


def sweep(
    logits: Tensor,
    dtype: torch.dtype,
    scaling: Scaling,
    work: Callable[[Chunk, Piece], object],
    gradient: Tensor | None,
    *,
    zero_rows: Tensor | None = None,
    ranks: TargetRanks | None = None,
    reads_once: bool = False,
) -> None:
    """Call ``work`` with every chunk of the logits, on several cores, with arithmetic in ``dtype``.

    Where there is a ``gradient``, ``work`` leaves that of z, times ``scaling.slope``, in ``piece.p``. Here it is
    multiplied by the softcap's slope, set to 0 in ``zero_rows`` ``(outer, 1, inner)``, whatever stands there, and
    rounded into ``gradient``. That may be ``logits``; with ``reads_once`` (``work`` doesn't read the logits after it
    has written to ``p``) no buffer lies between the two. ``ranks`` visits the chunks before the softcap.
    """
    result = gradient if reads_once or gradient is not logits else None

    def visit(chunk: Chunk) -> None:
        x = chunk.of(logits)
        piece = Piece(chunk, x, p := chunk_buffer("softmax", dtype, chunk, x, result), scaling, ranks)
        work(chunk, piece)
        if gradient is None:
            return
        if piece.tanh is not None:  # times 1 − tanh², without the cancellation near tanh = 1
            p.mul_(1 - piece.tanh)
            p.mul_(piece.tanh.add_(1))
        if zero_rows is not None:
            p.masked_fill_(chunk.of(zero_rows), 0)
        if result is None or p.dtype != gradient.dtype:
            chunk.of(gradient).copy_(p)

    for_each(chunks(logits.shape, dtype), visit, logits.device)


def chunk_buffer(use: str, dtype: torch.dtype, chunk: Chunk, x: Tensor, result: Tensor | None) -> Tensor:
    """Return memory for as many numbers as ``x`` has: that of ``result`` if it has the dtype, else a buffer."""
    if result is not None and result.dtype == dtype:
        return chunk.of(result)
    return Scratch(use, dtype, x.device).like(x)


class Scaling(NamedTuple):
    """The way from an input x to the logits z, as in :class:`fastloss.backends.contract.Factors`.

    The numbers are floats on a CPU, elsewhere floats or 0-d tensors, which the host does not read.
    """

    capped: bool  # there is a softcap
    divisor: Value
    outer: Value
    slope: Value


def scaling_of(options: LossOptions, device: torch.device) -> Scaling:
    """Return the way from input to logits; on a CPU the numbers in tensors are read."""
    on_cpu, dtype = device.type == "cpu", row_dtype(device)
    factors = options.factors(lambda tensor: tensor.item() if on_cpu else tensor.to(dtype))
    return Scaling(options.softcap is not None, *factors)


def scaled(x: Tensor, scaling: Scaling) -> Tensor:
    """Return the logits of inputs."""
    return torch.tanh(x / scaling.divisor) * scaling.outer if scaling.capped else times(x, scaling.outer)


def times(numbers: Tensor, factor: Value) -> Tensor:
    """Return the product; the numbers themselves for a factor of 1."""
    return numbers if not isinstance(factor, Tensor) and factor == 1.0 else numbers * factor


def _exponents(z: Tensor, out: Tensor, unit: Value) -> Tensor:
    """Write log₂e · unit · (z − m) to ``out``, which may be ``z``; return m, the rows' maxima ``(outer, 1, inner)``.

    A small error of m, the same for the whole row, cancels wherever the exponents are used. exp2, which comes next,
    is torch's fastest exponential.
    """
    m, factor = z.amax(1, keepdim=True), LOG2_E * unit
    if _FUSED:
        torch.add(m * -factor, z, alpha=factor, out=out)  # type: ignore[arg-type]
    else:
        torch.sub(z, m, out=out).mul_(factor)
    return m


def _is_resolved(total: Tensor) -> bool:
    """Return whether :func:`_exponents` was right for a chunk, by the sums of its rows' exponentials.

    A sum is at least about 1, for the maximum itself, unless there is a NaN or an infinity, or the logits are so
    large that their product with log₂e is none.
    """
    low, high = total.aminmax()
    return low.item() > 0.25 and high.item() < 1e30
