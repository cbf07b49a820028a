"""The contenders: an adapter for each package, which imports it when it is loaded.

:meth:`Contender.absence` says why a package can't be used here, :meth:`Contender.obstacle` why it can't do an
operation.
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
from torch.optim import Optimizer

import fastloss

from .machine import first_line

LOSS_OPS = ("forward", "forward+backward", "accuracy", "loss+accuracy")
OPS = (*LOSS_OPS, "linear", "sgd", "host")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OURS = "fastloss"
REFERENCE = "torch"  # whose error is the measure of the others'
TOPK = (1, 5)
SGD_OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}

Loss = Callable[[Tensor, Tensor], Tensor]
Accuracies = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
LossAndAccuracies = Callable[[Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]]
LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Functions(NamedTuple):
    """A package's functions, None for those that it lacks."""

    loss: Loss | None = None  # the mean over the rows, from logits (N, V) and target
    accuracies: Accuracies | None = None  # top-1 and top-5, in [0, 1]
    loss_and_accuracies: LossAndAccuracies | None = None
    sgd: Callable[..., Optimizer] | None = None  # takes parameters, and SGD_OPTIONS by name
    linear: LinearLoss | None = None  # the mean over the rows, from hidden states (N, D), head (V, D) and labels


@dataclass(frozen=True)
class Contender:
    """A package, or one of a package's ways, to compute the operations of ``ops``."""

    name: str
    distribution: str  # its name for pip
    load: Callable[[], Functions]  # imports the package; called anew for each workload
    ops: tuple[str, ...]
    soft: bool = False  # it takes class probabilities
    cpu: bool = False
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES.values())
    overwrites: bool = False  # writes over the logits: it gets logits of its own
    unfit: str = ""  # why it has no loss of logits
    note: str = ""  # printed with its numbers
    install: str = ""  # the way to install it, where that is not pip install and the distribution's name

    def absence(self) -> str | None:
        """Return why the package can't be used here, None if it can."""
        try:
            self.load()
        except ModuleNotFoundError as error:
            return f"not installed ({error.name} is missing: {self.install or f'pip install {self.distribution}'})"
        except Exception as error:  # a package built for another torch or another GPU may raise anything
            return f"can't be imported: {first_line(error)}"
        return None

    def version(self) -> str:
        """Return the package's version: "unknown" if it has none, "" if the package is absent."""
        if self.distribution in ("torch", "fastloss"):
            return str({"torch": torch, "fastloss": fastloss}[self.distribution].__version__)
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "" if self.absence() else "unknown"

    def presence(self) -> str:
        """Return the version and the note, or why the package is absent; and why it has no loss of logits."""
        absence = self.absence()
        parts = [f"absent: {absence}"] if absence else [f"{self.distribution} {self.version()}", self.note]
        return "; ".join(filter(None, [*parts, self.unfit]))

    def obstacle(self, op: str, dtype: torch.dtype, device: torch.device, *, soft: bool = False) -> str | None:
        """Return why this contender can't do a workload; None if nothing speaks against trying it."""
        if op not in self.ops:
            unfit = self.unfit if op in LOSS_OPS else ""
            return unfit or f"has no {op}; it has {', '.join(self.ops)}"
        if device.type == "cpu" and not self.cpu:
            return "serves GPUs only"
        if soft and not self.soft:
            return "takes class indices only"
        if dtype not in self.dtypes:
            return f"does not take {str(dtype).removeprefix('torch.')}"
        return None


def contenders_of(op: str) -> list[Contender]:
    """Return the contenders that have ``op``, or that say why they have no loss of logits if ``op`` is one."""
    is_loss = op in LOSS_OPS
    return [contender for contender in CONTENDERS.values() if op in contender.ops or (is_loss and contender.unfit)]


# ----------------------------------------------------------------------------------------------- PyTorch and fastloss


def _accuracies(logits: Tensor, target: Tensor, topk: tuple[int, ...] = TOPK) -> tuple[Tensor, ...]:
    """Compute accuracies as one writes it in plain PyTorch; the labels of class probabilities are their argmax."""
    labels = target.argmax(1) if target.is_floating_point() else target
    if max(topk) == 1:
        return ((logits.detach().argmax(1) == labels).float().mean(),)
    hits = logits.detach().topk(min(max(topk), logits.shape[1]), 1).indices == labels[:, None]
    return tuple(hits[:, :k].any(1).float().mean() for k in topk)


def _with_accuracies(loss: Loss, topk: tuple[int, ...] = TOPK) -> LossAndAccuracies:
    """Return both together, the accuracies computed first: some losses write over the logits."""

    def both(logits: Tensor, target: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        accuracies = _accuracies(logits, target, topk)
        return loss(logits, target), accuracies

    return both


def _torch_linear_loss(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head), target)


def eager(topk: tuple[int, ...] = TOPK) -> Functions:
    """Return plain PyTorch's functions."""
    both = _with_accuracies(F.cross_entropy, topk)
    return Functions(F.cross_entropy, partial(_accuracies, topk=topk), both, torch.optim.SGD, _torch_linear_loss)


def ours(topk: tuple[int, ...] = TOPK) -> Functions:
    """Return fastloss's functions."""
    both, accuracies = partial(fastloss.cross_entropy_with_accuracy, topk=topk), partial(fastloss.accuracy, topk=topk)
    return Functions(fastloss.cross_entropy, accuracies, both, fastloss.SGD, fastloss.linear_cross_entropy)  # type: ignore[arg-type]


def _compiled() -> Functions:
    """Forget earlier graphs: else the ninth shape would get a graph for any shape, or none."""
    torch.compiler.reset()
    plain = eager()
    compiled: Any = partial(torch.compile, dynamic=False)
    loss, accuracies, both = map(compiled, (plain.loss, _accuracies, plain.loss_and_accuracies))
    return Functions(loss, accuracies, both, linear=compiled(plain.linear))


def _torch_linear() -> Functions:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy; torch 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()  # without it torch holds the logits
    return Functions(linear=partial(F.linear_cross_entropy, options=options))


# ----------------------------------------------------------------------------------------------------- other packages


def _of(call: Callable[..., Tensor] | None = None, *, options: Any = (), **places: str) -> Callable[[], Functions]:
    """Return the adapter of functions at ``module:name``; ``call``, if given, calls a function with its inputs."""

    def load() -> Functions:
        functions: dict[str, Any] = {}
        for name, place in places.items():
            module, _, attribute = place.partition(":")
            function = getattr(importlib.import_module(module), attribute)
            functions[name] = partial(function, **dict(options)) if call is None else partial(call, function)
        both = _with_accuracies(functions["loss"]) if "loss" in functions else None  # torch's accuracies
        return Functions(**functions, loss_and_accuracies=both)

    return load


# ----------------------------------------------------------------------------------------------------------- the list

_ALL_LOSSES = (*LOSS_OPS, "linear", "host")
_WITHOUT_ACCURACY = ("forward", "forward+backward", "loss+accuracy", "host")
_NOTE = "its accuracy is torch.topk's"
_LIGER_NOTE = f"writes its gradient over the logits; {_NOTE}; linear: sums the head's gradient in its dtype"
_UNFIT = "takes hidden states, not logits"

_LIGER = "liger_kernel.transformers.functional:liger_"
_FLASH = "flash_attn.ops.triton.cross_entropy:cross_entropy_loss"
_APEX = "apex.contrib.xentropy:SoftmaxCrossEntropyLoss"
_CCE, _SGD = "cut_cross_entropy:linear_cross_entropy", "torch.optim:SGD"

_liger = _of(loss=f"{_LIGER}cross_entropy", linear=f"{_LIGER}fused_linear_cross_entropy")
_quack = _of(loss="quack.cross_entropy:cross_entropy", options={"reduction": "mean"})
_quack_linear = _of(linear="quack.linear_cross_entropy:chunked_linear_cross_entropy")
_flash = _of(lambda function, *inputs: function(*inputs)[0].mean(), loss=_FLASH)
# 0.0: no label smoothing; -100: the label that is ignored
_apex = _of(lambda function, *inputs: function.apply(*inputs, 0.0, -100).mean(), loss=_APEX)

_torch = partial(Contender, distribution="torch", cpu=True)
_apexs = partial(Contender, distribution="apex", install="build github.com/NVIDIA/apex with its CUDA extensions")
_cce = partial(Contender, distribution="cut-cross-entropy", ops=("linear",))

_LIST = [
    Contender(OURS, "fastloss", ours, (*_ALL_LOSSES, "sgd"), soft=True, cpu=True),
    _torch(REFERENCE, load=eager, ops=_ALL_LOSSES, soft=True),
    _torch("torch.compile", load=_compiled, ops=_ALL_LOSSES, soft=True),
    _torch("torch-linear", load=_torch_linear, ops=("linear",)),
    Contender("liger", "liger-kernel", _liger, (*_WITHOUT_ACCURACY, "linear"), overwrites=True, note=_LIGER_NOTE),
    Contender("quack", "quack-kernels", _quack, _WITHOUT_ACCURACY, note=_NOTE),
    Contender("quack-linear", "quack-kernels", _quack_linear, ("linear",), note="in chunks of 4096 rows"),
    _cce("cce", load=_of(linear=_CCE), unfit=_UNFIT, note="leaves out small gradients"),
    _cce("cce-exact", load=_of(linear=_CCE, options={"filter_eps": None}), note="leaves no gradient out"),
    Contender("flash-attn", "flash-attn", _flash, _WITHOUT_ACCURACY, note=_NOTE),
    _apexs("apex", load=_apex, ops=_WITHOUT_ACCURACY, note=_NOTE),
    _torch("torch-loop", load=_of(sgd=_SGD, options={"foreach": False}), ops=("sgd",)),
    _torch("torch-foreach", load=_of(sgd=_SGD, options={"foreach": True}), ops=("sgd",)),
    _torch("torch-fused", load=_of(sgd=_SGD, options={"fused": True}), ops=("sgd",)),
    _apexs("apex-sgd", load=_of(sgd="apex.optimizers:FusedSGD"), ops=("sgd",), dtypes=(torch.float16, torch.float32)),
]
CONTENDERS = {contender.name: contender for contender in _LIST}
