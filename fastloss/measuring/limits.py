"""The limits that contenders are compared with: a device copy, and the bare products of linear_cross_entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from .machine import free_bytes

_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}


class Copy:
    """A device copy, whose bandwidth is the limit that contenders are compared with."""

    def __init__(self, device: torch.device, nbytes: int | None = None) -> None:
        size = nbytes or min(_COPIED_BYTES.get(device.type, 1 << 27), free_bytes(device) // 8)
        self._source = torch.ones(max(size, 1 << 20), dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)

    def step(self) -> Tensor:
        """Copy once."""
        return self._target.copy_(self._source)

    def gigabytes_per_second(self, seconds: float) -> float:
        """Return the bandwidth of a copy that took ``seconds``, read and written bytes together."""
        return 2 * self._source.nbytes / seconds / 1e9


class Products:
    """The three products of matrices that every linear_cross_entropy needs, into memory that is there."""

    def __init__(self, hidden: Tensor, head: Tensor) -> None:
        self._hidden, self._head = hidden.detach(), head.detach()
        self._logits = hidden.new_empty(len(hidden), len(head))
        self._hidden_gradient, self._head_gradient = torch.empty_like(self._hidden), torch.empty_like(self._head)

    def step(self) -> None:
        """Compute the logits and both gradients once."""
        torch.mm(self._hidden, self._head.t(), out=self._logits)
        torch.mm(self._logits, self._head, out=self._hidden_gradient)
        torch.mm(self._logits.t(), self._hidden, out=self._head_gradient)
