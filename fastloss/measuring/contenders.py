"""The contenders: an adapter for each package, which imports it when it is loaded.

:meth:`Contender.absence` says why a package can't be used here, :meth:`Contender.obstacle` why it can't do an
operation.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Callable, Mapping
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
ROW_OPS = ("linear-tokens", "linear-tokens+entropy", "linear-kl", "linear-topk")
LINEAR_OPS = ("linear", *ROW_OPS)  # of hidden states and a head
OPS = (*LOSS_OPS, *LINEAR_OPS, "sgd", "host")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OURS = "fastloss"
REFERENCE = "torch"  # whose error is the measure of the others'
TOPK = (1, 5)
SGD_OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}

Loss = Callable[[Tensor, Tensor], Tensor]
Accuracies = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
LossAndAccuracies = Callable[[Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]]
LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
RowLoss = Callable[
    ..., Tensor
]  # from hidden states (N, D), head (V, D), labels (N,), and what inputs.py adds to them


class Functions(NamedTuple):
    """A package's functions, None for those that it lacks."""

    loss: Loss | None = None  # the mean over the rows, from logits (N, V) and target
    accuracies: Accuracies | None = None  # top-1 and top-5, in [0, 1]
    loss_and_accuracies: LossAndAccuracies | None = None
    sgd: Callable[..., Optimizer] | None = None  # takes parameters, and SGD_OPTIONS by name
    linear: LinearLoss | None = None  # the mean over the rows, from hidden states (N, D), head (V, D) and labels
    of_rows: Mapping[str, RowLoss] | None = None  # those of ROW_OPS that it has: the mean over the rows


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


# A loss of each row, (N,), over the logits: what ROW_OPS compute, in any dtype.

_CLIP, _BONUS, _BETA, _BEST = 0.2, 0.01, 0.5, 64


def clipped(log_probs: Tensor, entropy: Tensor | None, old: Tensor, advantages: Tensor) -> Tensor:
    """Compute PPO's loss of each token, with a bonus for the entropy where there is one."""
    ratio = (log_probs - old).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - _CLIP, 1 + _CLIP) * advantages)
    return loss if entropy is None else loss - _BONUS * entropy


def _log_softmax(hidden: Tensor, head: Tensor) -> Tensor:
    logits = F.linear(hidden, head)
    return logits.log_softmax(1, dtype=torch.float32 if logits.dtype.itemsize == 2 else None)


def clipped_rows(
    hidden: Tensor, head: Tensor, target: Tensor, old: Tensor, advantages: Tensor, *, entropy: bool
) -> Tensor:
    """Compute :func:`clipped` over the logits."""
    log_p = _log_softmax(hidden, head)
    log_probs = log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    return clipped(log_probs, -(log_p.exp() * log_p).sum(1) if entropy else None, old, advantages)


def _divergence_rows(hidden: Tensor, head: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
    """Compute the generalised Jensen-Shannon divergence to a teacher that has the same head."""
    of_student, of_teacher = _log_softmax(hidden, head), _log_softmax(teacher, head.detach())
    mixture = torch.logaddexp(of_student + math.log(1 - _BETA), of_teacher + math.log(_BETA))
    parts = [(each.exp() * (each - mixture)).sum(1) for each in (of_teacher, of_student)]
    return _BETA * parts[0] + (1 - _BETA) * parts[1]


def _topk_rows(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return _log_softmax(hidden, head).topk(min(_BEST, len(head)), 1).values.mean(1)


ROWS: dict[str, RowLoss] = {
    "linear-tokens": partial(clipped_rows, entropy=False),
    "linear-tokens+entropy": partial(clipped_rows, entropy=True),
    "linear-kl": _divergence_rows,
    "linear-topk": _topk_rows,
}


def _mean_of(rows: RowLoss, *inputs: Tensor) -> Tensor:
    return rows(*inputs).mean()


def by_tokens(*inputs: Tensor, entropy: bool) -> Tensor:
    """Compute the mean of :func:`clipped` by linear_token_loss."""
    hidden, head, target, *constants = inputs
    return fastloss.linear_token_loss(hidden, head, target, clipped, *constants, entropy=entropy).loss


def by_parts(*inputs: Tensor, entropy: bool) -> Tensor:
    """Compute the mean of :func:`clipped` from the parts of linear_cross_entropy_with_statistics."""
    hidden, head, target, *constants = inputs
    wide = torch.float32 if hidden.dtype.itemsize == 2 else None  # else the log-probabilities have 16 bits too
    parts = fastloss.linear_cross_entropy_with_statistics(
        hidden, head, target, reduction="none", entropy=entropy, logits_dtype=wide
    )
    return clipped(-parts.loss, parts.entropy, *constants).mean()


def _our_divergence(hidden: Tensor, head: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
    return fastloss.linear_kl_div(hidden, head, teacher, head.detach(), beta=_BETA)


def _our_topk(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return fastloss.linear_topk_log_probs(hidden, head, min(_BEST, len(head)))[0].mean()


def _with_and_without(loss: RowLoss) -> dict[str, RowLoss]:
    return {f"linear-tokens{words}": partial(loss, entropy=bool(words)) for words in ("", "+entropy")}


def eager(topk: tuple[int, ...] = TOPK) -> Functions:
    """Return plain PyTorch's functions."""
    both = _with_accuracies(F.cross_entropy, topk)
    of_rows = {op: partial(_mean_of, rows) for op, rows in ROWS.items()}
    accuracies = partial(_accuracies, topk=topk)
    return Functions(F.cross_entropy, accuracies, both, torch.optim.SGD, _torch_linear_loss, of_rows)


def ours(topk: tuple[int, ...] = TOPK) -> Functions:
    """Return fastloss's functions."""
    both, accuracies = partial(fastloss.cross_entropy_with_accuracy, topk=topk), partial(fastloss.accuracy, topk=topk)
    of_rows = {**_with_and_without(by_tokens), "linear-kl": _our_divergence, "linear-topk": _our_topk}
    linear: LinearLoss = fastloss.linear_cross_entropy
    return Functions(fastloss.cross_entropy, accuracies, both, fastloss.SGD, linear, of_rows)  # type: ignore[arg-type]


def _compiled() -> Functions:
    """Forget earlier graphs: else the ninth shape would get a graph for any shape, or none."""
    torch.compiler.reset()
    plain = eager()
    compiled: Any = partial(torch.compile, dynamic=False)
    loss, accuracies, both = map(compiled, (plain.loss, _accuracies, plain.loss_and_accuracies))
    of_rows = {op: compiled(partial(_mean_of, rows)) for op, rows in ROWS.items()}
    return Functions(loss, accuracies, both, linear=compiled(plain.linear), of_rows=of_rows)


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


def _liger_chunked() -> Functions:
    """Return Liger's losses of tokens and of a teacher, in chunks of 1024 rows."""
    losses = importlib.import_module("liger_kernel.chunked_loss")
    of_tokens = losses.LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, chunk_size=1024, epsilon_low=_CLIP, epsilon_high=_CLIP, loss_type="bnpo"
    )
    of_teacher = losses.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_BETA)

    def tokens(hidden: Tensor, head: Tensor, target: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        """Compute the loss of sequences of one token."""
        ids, states = target.unsqueeze(1), hidden.unsqueeze(1)
        loss: Tensor = of_tokens(
            states, head, ids, torch.ones_like(ids), advantages, old_per_token_logps=old.unsqueeze(1)
        )[0]
        return loss

    def divergence(hidden: Tensor, head: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
        loss: Tensor = of_teacher(hidden, head, teacher, head.detach(), target)
        return loss

    return Functions(of_rows={"linear-tokens": tokens, "linear-kl": divergence})


def _trl() -> Functions:
    """Return what TRL's trainers compute from hidden states."""
    of_tokens = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    of_teacher = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def tokens(*inputs: Tensor, entropy: bool) -> Tensor:
        hidden, head, target, *constants = inputs
        wanted = ("log_probs", *(["entropy"] if entropy else []))
        numbers = of_tokens.apply(hidden, head, None, target, 1.0, 32768, None, 1.0, wanted)
        return clipped(numbers[0], numbers[1] if entropy else None, *constants).mean()

    def divergence(hidden: Tensor, head: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
        loss: Tensor = of_teacher.apply(hidden, head, None, teacher, head.detach(), None, _BETA)[0]
        return loss.mean()

    return Functions(of_rows={**_with_and_without(tokens), "linear-kl": divergence})


def _trl_of_logits() -> Functions:
    """Return TRL's functions of logits that are held."""
    utilities = importlib.import_module("trl.trainer.utils")

    def tokens(*inputs: Tensor, entropy: bool) -> Tensor:
        hidden, head, target, *constants = inputs
        logits = F.linear(hidden, head)
        entropies = utilities.entropy_from_logits(logits) if entropy else None
        return clipped(utilities.selective_log_softmax(logits, target), entropies, *constants).mean()

    return Functions(of_rows=_with_and_without(tokens))


# ----------------------------------------------------------------------------------------------------------- the list

_ALL_LOSSES = (*LOSS_OPS, *LINEAR_OPS, "host")
_TOKENS = ("linear-tokens", "linear-tokens+entropy")
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
    Contender(
        "fastloss-parts", "fastloss", lambda: Functions(of_rows=_with_and_without(by_parts)), _TOKENS, cpu=True
    ),
    Contender("trl", "trl", _trl, (*_TOKENS, "linear-kl"), cpu=True),
    Contender("trl-logits", "trl", _trl_of_logits, _TOKENS, cpu=True),
    Contender("liger", "liger-kernel", _liger, (*_WITHOUT_ACCURACY, "linear"), overwrites=True, note=_LIGER_NOTE),
    Contender("liger-chunked", "liger-kernel", _liger_chunked, ("linear-tokens", "linear-kl")),
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
