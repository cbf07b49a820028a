"""What is compared: the loss, the top-1 accuracy and SGD, in plain PyTorch and in fastloss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

import fastloss

__all__ = ["FASTLOSS", "PYTORCH", "Contender"]


class Contender(NamedTuple):
    """One way to the same numbers: of a loss, from logits ``(N, C)`` and labels ``(N,)``, and of an optimizer."""

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    loss_and_accuracy: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    sgd: Callable[..., Optimizer]


def _pytorch_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def _pytorch_loss_and_accuracy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(logits, target)
    return loss, (logits.detach().argmax(1) == target).float().mean()


def _fastloss_loss(logits: Tensor, target: Tensor) -> Tensor:
    return fastloss.cross_entropy(logits, target)


def _fastloss_loss_and_accuracy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    loss, accuracy = fastloss.cross_entropy_with_accuracy(logits, target)
    assert isinstance(accuracy, Tensor)  # a tuple only where a tuple of ks was asked for
    return loss, accuracy


PYTORCH = Contender("PyTorch", _pytorch_loss, _pytorch_loss_and_accuracy, torch.optim.SGD)
FASTLOSS = Contender("fastloss", _fastloss_loss, _fastloss_loss_and_accuracy, fastloss.SGD)
