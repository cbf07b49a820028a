"""The ``torch.nn.Module`` faces of :mod:`fastloss.functional`."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import cross_entropy

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:func:`fastloss.cross_entropy` as a module; takes the place of ``torch.nn.CrossEntropyLoss``.

    Args:
        weight: a weight for each class, shape ``(C,)``; a buffer of the module.
        size_average, reduce: torch's deprecated forms of ``reduction``.
        ignore_index: a label whose rows count neither in the loss nor in its mean.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1].
        lse_square_scale: λ of the z-loss λ · lse².
        softcap: bounds the logits by ``softcap * tanh(logits / softcap)``.
        from_logits: if False, the input is probabilities.
        inplace: write the gradient over the logits.

    Example:
        >>> import torch
        >>> from fastloss import CrossEntropyLoss
        >>> loss = CrossEntropyLoss(label_smoothing=0.1)
        >>> loss(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """

    lse_square_scale: float
    softcap: float | None
    from_logits: bool
    inplace: bool

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
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.lse_square_scale = lse_square_scale
        self.softcap = softcap
        self.from_logits = from_logits
        self.inplace = inplace

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` ``(N, C, …)`` and ``target`` ``(N, …)``, or class probabilities like ``input``."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            from_logits=self.from_logits,
            inplace=self.inplace,
        )

    def extra_repr(self) -> str:
        """What the module computes, for ``print``."""
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}, lse_square_scale={self.lse_square_scale}, "
            f"softcap={self.softcap}, from_logits={self.from_logits}, inplace={self.inplace}"
        )
