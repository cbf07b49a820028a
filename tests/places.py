"""Where a backend is tested."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """A backend and the device that it is tested on."""

    name: str
    device: torch.device

    @property
    def interpreted(self) -> bool:
        """Return True if the kernels run in Triton's interpreter."""
        return self.name == "triton" and self.device.type == "cpu"
