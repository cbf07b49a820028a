"""The losses as modules of ``torch.nn``.

Annotations are evaluated here: TorchScript does not read strings.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..linear.functional import linear_cross_entropy
from ..loss.functional import cross_entropy
from ..loss.sharded import group_property

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss"]


class _Grouped:
    """The attribute ``group`` of a module: the process group whose ranks have a shard of the classes each, or None.

    TorchScript leaves it out, as it does ``forward``: a model that holds the module can be scripted.
    """

    __jit_unused_properties__ = ("group",)

    group = group_property("_group", "The process group, or None.")

    @torch.jit.unused
    def _of_every_loss(self: Any) -> dict[str, Any]:
        """Return the arguments of every loss."""
        return {
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "lse_square_scale": self.lse_square_scale,
            "softcap": self.softcap,
            "group": self._group.value,
            "logit_scale": self.logit_scale,
            "temperature": self.temperature,
        }

    def _hold(self: Any, **numbers: Any) -> None:
        """Keep numbers as attributes. Those in tensors go where the module goes, and into no ``state_dict``."""
        for name, number in numbers.items():
            if isinstance(number, Tensor):
                self.register_buffer(name, number, persistent=False)
            else:
                setattr(self, name, number)


def _scales(logit_scale: Any, temperature: Any) -> str:
    """Return the two arguments, for ``print``; those that are 1.0 are left out."""
    numbers = {"logit_scale": logit_scale, "temperature": temperature}
    return "".join(
        f", {name}={value}" for name, value in numbers.items() if isinstance(value, Tensor) or value != 1.0
    )


class CrossEntropyLoss(_Grouped, nn.CrossEntropyLoss):
    """Computes :func:`fastloss.cross_entropy`; takes the place of ``torch.nn.CrossEntropyLoss``.

    Args:
        weight: a weight for each class, shape ``(C,)``; a buffer of the module.
        size_average, reduce: torch's deprecated forms of ``reduction``.
        ignore_index: a label whose rows count neither in the loss nor in its mean.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1].
        lse_square_scale: λ of the z-loss λ · lse².
        softcap: bounds the logits by ``softcap * tanh(logits / softcap)``.
        logit_scale, temperature: as in :func:`fastloss.cross_entropy`; a tensor is a buffer that no file holds.
        from_logits: if False, the input is probabilities.
        inplace: write the gradient over the logits.
        group: a process group whose ranks have a shard of the classes each. Copies of the module share it. No file
            holds it: after ``torch.load`` set the attribute ``group``.

    Example:
        >>> import torch
        >>> from fastloss import CrossEntropyLoss
        >>> loss = CrossEntropyLoss(label_smoothing=0.1)
        >>> loss(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        from_logits: bool = True,
        inplace: bool = False,
        group: Any = None,
        logit_scale: float | Tensor = 1.0,
        temperature: float | Tensor = 1.0,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.lse_square_scale = lse_square_scale
        self.softcap = softcap
        self.from_logits = from_logits
        self.inplace = inplace
        self.group = group
        self._hold(logit_scale=logit_scale, temperature=temperature)

    @torch.jit.unused
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of ``input`` ``(N, C, …)`` and ``target`` ``(N, …)``, or probabilities of its shape."""
        return cross_entropy(
            input,
            target,
            from_logits=self.from_logits,
            inplace=self.inplace,
            **self._of_every_loss(),
        )

    def extra_repr(self) -> str:
        """Return the module's arguments, for ``print``."""
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}, lse_square_scale={self.lse_square_scale}, "
            f"softcap={self.softcap}, from_logits={self.from_logits}, inplace={self.inplace}"
            f"{_scales(self.logit_scale, self.temperature)}"
        )


class LinearCrossEntropyLoss(_Grouped, nn.modules.loss._WeightedLoss):
    """Owns a linear map and computes :func:`fastloss.linear_cross_entropy`.

    Takes the place of ``torch.nn.LinearCrossEntropyLoss`` (torch 2.13): each loads the other's ``state_dict``.

    Args:
        in_features: D.
        num_classes: C; beside ``group`` the number of this rank's classes.
        out_features: ``(d1, …, dK)`` of torch's K-dimensional loss.
        bias: whether the linear map has a bias.
        device, dtype: of the linear map.
        reduction, weight, ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, temperature, shift,
            chunk_size, memory_budget, skip_ignored, accumulate_grad, logits_dtype, group: as in
            :func:`fastloss.linear_cross_entropy`. A ``logit_scale`` or ``temperature`` in a tensor is a buffer that
            no file holds. The linear map's parameters may be made DTensors instead.

    Example:
        >>> import torch
        >>> from fastloss import LinearCrossEntropyLoss
        >>> loss = LinearCrossEntropyLoss(8, 10)
        >>> loss(torch.randn(4, 8), torch.tensor([0, 9, 3, 3])).backward()
        >>> loss.linear.weight.grad.shape
        torch.Size([10, 8])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        **options: Any,
    ) -> None:
        if weight is not None and options.get("group") is None and tuple(weight.shape) != (num_classes,):
            raise RuntimeError(
                f"fastloss: weight has shape {tuple(weight.shape)}; "
                f"expected one weight for each class: ({num_classes},)"
            )
        known = (
            *("shift", "chunk_size", "memory_budget", "skip_ignored", "accumulate_grad", "group"),
            *("logits_dtype", "logit_scale", "temperature"),
        )
        for name in options:
            if name not in known:
                raise TypeError(
                    f"fastloss: LinearCrossEntropyLoss has no argument {name!r}; expected {', '.join(known)}"
                )
        super().__init__(weight=weight, size_average=None, reduce=None, reduction=reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.lse_square_scale, self.softcap = lse_square_scale, softcap
        self.group = options.pop("group", None)
        self._hold(**{name: options.pop(name, 1.0) for name in ("logit_scale", "temperature")})
        self.options = options
        features = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, features, bias=bias, device=device, dtype=dtype)

    @torch.jit.unused
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of ``input`` ``(…, D)`` and ``target`` ``(…)``, or class probabilities ``(…, C)``."""
        shape, bias = (self.num_classes, *self.out_features), self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.view(*shape, self.linear.in_features) if self.out_features else self.linear.weight,
            target,
            linear_bias=bias if bias is None or not self.out_features else bias.view(shape),
            **self._of_every_loss(),
            **self.options,
        )

    def extra_repr(self) -> str:
        """Return the module's arguments, for ``print``."""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return (
            f"num_classes={self.num_classes}, out_features={self.out_features}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, "
            f"lse_square_scale={self.lse_square_scale}, softcap={self.softcap}"
            f"{_scales(self.logit_scale, self.temperature)}{options}"
        )
