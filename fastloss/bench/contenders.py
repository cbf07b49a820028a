"""Everybody who takes part: one adapter each, which imports its package when it is asked to load.

An adapter says why its package is absent, and which workloads it can't serve. Nobody is dropped without a word:
:meth:`Contender.absence` and :meth:`Contender.obstacle` give the words.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss

from .optimizer import OPTIONS, Make
from .workloads import DTYPES, LOSS_OPS, Workload

__all__ = ["CONTENDERS", "OURS", "REFERENCE", "Contender", "Functions", "LinearLoss", "contenders_of"]

OURS = "fastloss"
REFERENCE = "torch"  # whose error is the measure of the others'
TOPK = (1, 5)

Loss = Callable[[Tensor, Tensor], Tensor]
Accuracies = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
LossAndAccuracies = Callable[[Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]]
LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Functions(NamedTuple):
    """What an adapter offers, None for what its package lacks."""

    loss: Loss | None = None  # the mean over the rows
    accuracies: Accuracies | None = None  # top-1 and top-5, in [0, 1]
    loss_and_accuracies: LossAndAccuracies | None = None
    optimizer: Make | None = None  # SGD with OPTIONS
    linear: LinearLoss | None = None  # the mean over the rows, from hidden states, head and labels


@dataclass(frozen=True)
class Contender:
    """One package's, or one way of a package's, to the same numbers."""

    name: str
    distribution: str  # what pip calls it
    load: Callable[[], Functions]  # imports the package; called anew for each workload
    ops: tuple[str, ...]
    soft: bool = False  # takes class probabilities?
    cpu: bool = False
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES.values())
    overwrites: bool = False  # writes over the logits: it gets logits of its own
    unfit: str = ""  # why it has no loss of logits
    note: str = ""  # what a reader of its numbers should know
    install: str = ""  # how to, where it is not pip install and the distribution's name

    def absence(self) -> str | None:
        """Why its package can't be used here; None if it can."""
        try:
            self.load()
        except ModuleNotFoundError as error:
            how = self.install or f"pip install {self.distribution}"
            return f"not installed ({error.name} is missing: {how})"
        except Exception as error:  # a package built for another torch or another GPU may raise anything
            return f"can't be imported: {_first_line(error)}"
        return None

    def version(self) -> str:
        """Of the package; "unknown" if it does not tell, "" if it is not there."""
        if self.distribution in ("torch", "fastloss"):
            return str({"torch": torch, "fastloss": fastloss}[self.distribution].__version__)
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "" if self.absence() else "unknown"

    def obstacle(self, workload: Workload, device: torch.device) -> str | None:
        """Why it can't serve a workload; None if it can, as far as is known before it is tried."""
        if workload.op not in self.ops:
            return (
                self.unfit if workload.op in LOSS_OPS else ""
            ) or f"has no {workload.op}; it has {', '.join(self.ops)}"
        if device.type == "cpu" and not self.cpu:
            return "serves GPUs only"
        if workload.soft and not self.soft:
            return "takes class indices only"
        if workload.dtype not in self.dtypes:
            return f"does not take {workload.dtype_name}"
        return None


def contenders_of(op: str) -> list[Contender]:
    """Those that an operation brings up by itself: all that have it, and all that say why they can't."""
    is_loss = op in LOSS_OPS
    return [contender for contender in CONTENDERS.values() if op in contender.ops or (is_loss and contender.unfit)]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------------- losses


def _topk_accuracies(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """As one writes it in plain PyTorch; the labels of class probabilities are their argmax."""
    labels = target.argmax(1) if target.is_floating_point() else target
    k = min(max(TOPK), logits.shape[1])
    hits = logits.detach().topk(k, 1).indices == labels[:, None]
    return tuple(hits[:, :each].any(1).float().mean() for each in TOPK)


def _beside(loss: Loss) -> LossAndAccuracies:
    """The accuracy first: some losses write over the logits."""

    def both(logits: Tensor, target: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        accuracies = _topk_accuracies(logits, target)
        return loss(logits, target), accuracies

    return both


def _torch_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def _torch_linear_loss(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head), target)


def _eager() -> Functions:
    return Functions(_torch_loss, _topk_accuracies, _beside(_torch_loss), linear=_torch_linear_loss)


def _compiled() -> Functions:
    """Forgets what was compiled before: else the ninth shape would be served by a graph for any shape, or by none."""
    torch.compiler.reset()
    compiled = partial(torch.compile, dynamic=False)
    of_logits = (compiled(_torch_loss), compiled(_topk_accuracies), compiled(_beside(_torch_loss)))
    return Functions(*of_logits, linear=compiled(_torch_linear_loss))


def _fastloss() -> Functions:
    def loss_and_accuracies(logits: Tensor, target: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, accuracies = fastloss.cross_entropy_with_accuracy(logits, target, topk=TOPK)
        assert isinstance(accuracies, tuple)  # as topk is
        return loss, accuracies

    return Functions(
        fastloss.cross_entropy,
        lambda logits, target: fastloss.accuracy(logits, target, TOPK),
        loss_and_accuracies,
        lambda params: fastloss.SGD(params, **OPTIONS),
        fastloss.linear_cross_entropy,
    )


def _imported(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _liger() -> Functions:
    loss: Loss = _imported("liger_kernel.transformers.functional", "liger_cross_entropy")
    linear: LinearLoss = _imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    return Functions(loss, None, _beside(loss), linear=linear)


def _quack() -> Functions:
    cross_entropy = _imported("quack.cross_entropy", "cross_entropy")
    loss: Loss = partial(cross_entropy, reduction="mean")
    return Functions(loss, None, _beside(loss))


def _quack_linear() -> Functions:
    return Functions(linear=_imported("quack.linear_cross_entropy", "chunked_linear_cross_entropy"))


def _cut_cross_entropy(**options: Any) -> Functions:
    return Functions(linear=partial(_imported("cut_cross_entropy", "linear_cross_entropy"), **options))


def _flash_attention() -> Functions:
    cross_entropy_loss = _imported("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        losses, _ = cross_entropy_loss(logits, target)
        return losses.mean()

    return Functions(loss, None, _beside(loss))


def _apex() -> Functions:
    function = _imported("apex.contrib.xentropy", "SoftmaxCrossEntropyLoss")

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return function.apply(logits, target, 0.0, -100).mean()  # smoothing, and the label that it ignores

    return Functions(loss, None, _beside(loss))


def _torch_linear() -> Functions:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy; torch 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()  # without it torch holds the logits
    return Functions(linear=partial(F.linear_cross_entropy, options=options))


# ---------------------------------------------------------------------------------------------------------------- SGD


def _torch_sgd(form: str) -> Functions:
    forms = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    options: dict[str, Any] = {**OPTIONS, **forms[form]}
    return Functions(optimizer=lambda params: torch.optim.SGD(params, **options))


def _apex_sgd() -> Functions:
    return Functions(optimizer=partial(_imported("apex.optimizers", "FusedSGD"), **OPTIONS))


# ----------------------------------------------------------------------------------------------------------- the list

_WITHOUT_ACCURACY = ("forward", "forward+backward", "loss+accuracy", "host")
_TOPK_NOTE = "its accuracy is torch.topk's"
_BUILD_APEX = "build github.com/NVIDIA/apex with its CUDA extensions"

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(OURS, "fastloss", _fastloss, (*LOSS_OPS, "linear", "host", "sgd"), soft=True, cpu=True),
        Contender(REFERENCE, "torch", _eager, (*LOSS_OPS, "linear", "host"), soft=True, cpu=True),
        Contender("torch.compile", "torch", _compiled, (*LOSS_OPS, "linear", "host"), soft=True, cpu=True),
        Contender("torch-linear", "torch", _torch_linear, ("linear",), cpu=True),
        Contender(
            "liger",
            "liger-kernel",
            _liger,
            (*_WITHOUT_ACCURACY, "linear"),
            overwrites=True,
            note=f"writes its gradient over the logits; {_TOPK_NOTE}; linear: sums the head's gradient in its dtype",
        ),
        Contender("quack", "quack-kernels", _quack, _WITHOUT_ACCURACY, note=_TOPK_NOTE),
        Contender("quack-linear", "quack-kernels", _quack_linear, ("linear",), note="in chunks of 4096 rows"),
        Contender(
            "cce",
            "cut-cross-entropy",
            _cut_cross_entropy,
            ("linear",),
            unfit="takes hidden states, not logits",
            note="leaves out small gradients",
        ),
        Contender(
            "cce-exact",
            "cut-cross-entropy",
            partial(_cut_cross_entropy, filter_eps=None),
            ("linear",),
            note="leaves no gradient out",
        ),
        Contender("flash-attn", "flash-attn", _flash_attention, _WITHOUT_ACCURACY, note=_TOPK_NOTE),
        Contender("apex", "apex", _apex, _WITHOUT_ACCURACY, note=_TOPK_NOTE, install=_BUILD_APEX),
        Contender("torch-loop", "torch", partial(_torch_sgd, "loop"), ("sgd",), cpu=True),
        Contender("torch-foreach", "torch", partial(_torch_sgd, "foreach"), ("sgd",), cpu=True),
        Contender("torch-fused", "torch", partial(_torch_sgd, "fused"), ("sgd",), cpu=True),
        Contender(
            "apex-sgd", "apex", _apex_sgd, ("sgd",), dtypes=(torch.float16, torch.float32), install=_BUILD_APEX
        ),
    )
}
