"""What the logits of a head are made of, and how they are made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .origin import Origin

__all__ = ["Recipe", "Step"]

# What a model does to each logit: ("times", number), ("over", number), ("tanh", None) or ("to", dtype).
Step = tuple[str, Any]
_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Recipe:
    """Logits: the steps, in order, of ``x Wᵀ + b``.

    Operators that choose or arrange positions are taken of ``x``, and those that choose classes of ``weight`` and
    ``bias``: all steps are elementwise, so the order does not matter.
    """

    x: Tensor  # (…, D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)
    dtype: torch.dtype  # of the product
    steps: tuple[Step, ...]
    class_dim: int  # where the classes are among the logits' dimensions; the others are x's, in x's order
    origin: Origin

    @classmethod
    def of_head(cls, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Recipe:
        """Begin a recipe: the head's product, in ``dtype``."""
        tensors = (x, weight) if bias is None else (x, weight, bias)
        return cls(x, weight, bias, dtype, (), x.dim() - 1, Origin(tuple((t, t._version) for t in tensors)))

    @property
    def classes_last(self) -> bool:
        """Return True if the classes are the last dimension."""
        return self.class_dim == self.x.dim() - 1

    def detached(self) -> Recipe:
        """Return the recipe of logits that have no gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, x=self.x.detach(), weight=self.weight.detach(), bias=bias)

    def requires_grad(self) -> bool:
        """Return True if any of its tensors requires a gradient."""
        return any(t is not None and t.requires_grad for t in (self.x, self.weight, self.bias))

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the logits from these tensors in the place of its own, with the operators that the model called."""
        given = [None if t is None else t.to(self.dtype) for t in (x, weight, bias)]
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = F.linear(*given)  # type: ignore[arg-type]
            for name, value in self.steps:
                if name == "times":
                    logits = logits * value
                elif name == "over":
                    logits = logits / value
                elif name == "tanh":
                    logits = torch.tanh(logits)
                else:
                    logits = logits.to(value)
        return logits if self.classes_last else logits.movedim(-1, self.class_dim)

    def options(self) -> dict[str, Any] | None:
        """Return the steps as arguments of the linear losses, or None if they are no such arguments."""
        scale, cap, after, seen_tanh, dtype = 1.0, None, 1.0, False, self.dtype
        for name, value in self.steps:
            if name == "to":
                if value != dtype and not (dtype in _NARROW and value == torch.float32):
                    return None
                dtype = value
                continue
            if name == "tanh":
                if seen_tanh:
                    return None
                seen_tanh = True
                continue
            factor = value if name == "times" else 1.0 / value
            if not seen_tanh:
                scale *= factor
            elif cap is None:
                cap = factor
            else:
                after *= factor
        if seen_tanh and cap is None:
            return None
        scale = scale if cap is None else scale * cap
        if not all(math.isfinite(v) and 1e-30 < v < 1e30 for v in (scale, after, 1.0 if cap is None else cap)):
            return None
        options: dict[str, Any] = {}
        if scale != 1.0:
            options["logit_scale"] = scale
        if cap is not None:
            options["softcap"] = cap
        if after != 1.0:
            options["temperature"] = 1.0 / after
        return options
