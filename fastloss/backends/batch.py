"""The arguments of a backend's SGD step; :class:`fastloss.backends.contract.Backend` says what it does with them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .torch_private import lie_at

__all__ = ["FLAG_ELEMENTS", "Addresses", "SGDBatch", "SGDControls", "SGDRule", "check_gradients"]

_shape_of = operator.attrgetter("shape")


class SGDRule(NamedTuple):
    """The hyper-parameters of one parameter group. A tensor has one element, and is read on its own device."""

    lr: float | Tensor
    momentum: float | Tensor
    dampening: float
    weight_decay: float | Tensor
    nesterov: bool
    maximize: bool
    decoupled: bool  # weight decay scales the parameter by 1 − lr · weight_decay; else it is added to the gradient


class SGDControls(NamedTuple):
    """The options of one step that hold for all of its tensors. Tensors are ``()``, on the batch's device."""

    grad_scale: Tensor | None = None  # gradients are divided by it, and stored so, as torch.amp.GradScaler expects
    found_inf: Tensor | None = None  # float32; the step does nothing if it is not 0
    squares: Tensor | None = None  # float64: Σ g² over all gradients as they come; with it, clip to max_norm
    max_norm: float = 0.0


# A momentum buffer has one byte of flags per so many elements.
FLAG_ELEMENTS = 4096


@dataclass(eq=False)
class SGDBatch:
    """Tensors that one SGD step treats together: one device, one dtype of parameters, one way of rounding.

    All lists have one entry per parameter. Parameters overlap neither each other nor themselves. Between steps no
    tensor of theirs is held on to: the lists are those of one step, and ``memory`` holds none of their tensors.
    """

    params: list[Tensor]
    momentum: list[Tensor | None]  # None: this parameter's rule has no momentum
    companions: list[Tensor | None]  # float32 master weights or Kahan compensation, after `rounding`
    rules: list[int]  # which of the step's rules is the parameter's
    rounding: str  # "nearest", "stochastic", "master" or "kahan"
    # Flags of some of the parameters, uint8, one per FLAG_ELEMENTS elements and at least one: 1 if the momentum
    # buffer has begun. (Other parameters' buffers have.) A buffer that has not begun becomes the gradient, without
    # dampening, at the first step that is not skipped; that step sets the flags.
    begun: dict[int, Tensor]
    memory: dict[str, Any] = field(default_factory=dict)  # the backend's own, from step to step
    # True if only addresses changed since the last step: parameters and buffers are the same tensors; they and the
    # gradients have the same dtypes, sizes, strides and flags; and the parameters' addresses are the same.
    unchanged: bool = False
    # True if all of that holds but for the gradients.
    settled: bool = False
    # True if some of the step's gradients are None: their parameters and buffers stay as they are.
    incomplete: bool = False
    # Of stochastic rounding: int64 (1,), on the batch's device, advanced by each use. None: torch's generator.
    seed: Tensor | None = None


class Addresses:
    """The addresses of tensors, without references to the tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.values = list(map(Tensor.data_ptr, tensors))
        self._places = list(range(len(self.values)))

    def are_of(self, tensors: Sequence[Tensor]) -> bool:
        """Return True if these tensors have the same addresses."""
        if lie_at is None or len(tensors) != len(self.values):
            return list(map(Tensor.data_ptr, tensors)) == self.values
        return bool(lie_at(list(tensors), self.values, self._places))


def check_gradients(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Check that every gradient has its parameter's shape: ``.data =`` and ``resize_`` may change it.

    Raises:
        RuntimeError: a gradient has another shape.
    """
    if list(map(_shape_of, grads)) == list(map(_shape_of, params)):
        return
    for param, grad in zip(params, grads, strict=True):
        if grad.shape != param.shape:
            raise RuntimeError(
                f"fastloss.SGD: a parameter of shape {tuple(param.shape)} has a gradient of shape "
                f"{tuple(grad.shape)}; expected its own shape"
            )
