"""What was measured, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..backends import choice
from ..measuring import machine
from ..measuring.tables import TIMES, bytes_in_words, notes, plain_table
from .language_model import CLASSES, LanguageModel
from .loss_at_scale import LossAtScale, Timed
from .optimizer_step import RESNET50_WIDTH, OptimizerStep, resnet50_shapes
from .training import Training

__all__ = [
    "at_scale",
    "heading",
    "language_model",
    "optimizer",
    "tensors_of",
    "training",
]

EPOCHS_SHOWN = 7


def heading(device: torch.device) -> RenderableType:
    """Where the demo runs, and what serves it."""
    return Group(
        Text("fastloss beside plain PyTorch", style="bold"),
        Text(machine.description(device), style="dim"),
        Text(f"backend  {choice.reason(device)}", style="dim"),
    )


def training(result: Training) -> RenderableType:
    """The two runs by epoch, then side by side as wholes."""
    return Group("", _by_epoch(result), "", _a_step(result), "", _agreement(result), "")


def at_scale(results: Sequence[LossAtScale], device: torch.device) -> RenderableType:
    """Time, memory and errors of the loss alone."""
    table = plain_table(
        f"The loss alone at language-model size, on {device.type}: forward and backward",
        f"tokens {TIMES} classes",
        "",
        "PyTorch",
        "fastloss",
        "ratio",
    )
    for i, result in enumerate(results):
        if i:
            table.add_row()
        _add_case(table, result)
    words = (
        "Time: median of interleaved runs. Others' CPU: the share that other programs took meanwhile. "
        "Peak: bytes of tensors, beyond the logits and the labels. Ratio: PyTorch's number / fastloss's, so "
        "above 1 is in fastloss's favour. Errors: against float64, relative (of the gradient: the norm of "
        "the difference over the norm)."
    )
    return Group("", table, notes(words))


def language_model(result: LanguageModel, device: torch.device) -> RenderableType:
    """Losses, time and memory of the two runs."""
    a, b, size = result.pytorch, result.fastloss, result.size
    table = plain_table(
        f"A language model on {result.text_bytes / 1e6:.1f} MB of Python's own source, on {device.type}",
        f"{size.rows} tokens {TIMES} {CLASSES} classes a step",
        "PyTorch",
        "fastloss",
        "ratio",
    )
    table.add_row("loss of the first step", f"{a.losses[0]:.6f}", f"{b.losses[0]:.6f}", "")
    table.add_row(f"loss of step {size.steps}", f"{a.losses[-1]:.6f}", f"{b.losses[-1]:.6f}", "")
    times = a.median_step, b.median_step
    table.add_row("time of a step", *(f"{each * 1e3:.1f} ms" for each in times), f"{times[0] / times[1]:.2f}x")
    peaks = a.peak_bytes, b.peak_bytes
    table.add_row("peak of a step", *map(bytes_in_words, peaks), f"{peaks[0] / peaks[1]:.2f}x")
    saved = result.saved_bytes
    change = "saved" if saved >= 0 else "more taken"
    table.add_row(f"memory {change}", "", bytes_in_words(abs(saved)), f"{abs(saved) / peaks[0]:.0%}")
    words = (
        "PyTorch: F.cross_entropy(F.linear(hidden, head), labels). fastloss: linear_cross_entropy(hidden, head, "
        "tokens, shift=True), which never holds the logits. A token is a pair of bytes; the head is the embedding. "
        f"The loss curves differ by {result.largest_difference:.1e} at most. Peak: bytes of tensors beyond the "
        f"model, its gradients among them. Time: median of {size.steps} steps in turn; "
        f"others' CPU {result.neighbours:.0%}."
    )
    return Group("", table, notes(words))


def optimizer(result: OptimizerStep, device: torch.device) -> RenderableType:
    """Time, memory and errors of SGD's step."""
    table = plain_table(
        f"SGD's step alone, on {device.type}: {tensors_of(result)}", "", "", "PyTorch", "fastloss", "ratio"
    )
    for each in result.compared:
        a, b = each.seconds
        errors = [f"{error:.1e}" for error in each.errors]
        name = "clipping and step" if each.clipped else "step"
        table.add_row(each.name, f"{name}, time", f"{a * 1e3:.2f} ms", f"{b * 1e3:.2f} ms", f"{a / b:.2f}x")
        table.add_row("", f"{name}, error", *errors, "")
    words = (
        "In float32 with momentum and weight decay; the first column names PyTorch's way. Clipping: clip_grad_norm_ "
        "and the step, or fastloss's step with max_norm. "
        f"Time: median of {result.rounds} interleaved runs; others' CPU {result.neighbours:.0%}. "
        "Error: of a narrower network's parameters after a few steps, against float64, relative."
    )
    return Group("", table, notes(words))


def tensors_of(result: OptimizerStep) -> str:
    """``161 tensors of a ResNet-50, 25.6 million parameters``."""
    whole = sum(torch.Size(shape).numel() for shape in resnet50_shapes(RESNET50_WIDTH)) == result.parameters
    kind = "a ResNet-50" if whole else "a narrow ResNet-50"
    return f"{result.tensors} tensors of {kind}, {result.parameters / 1e6:.1f} million parameters"


def _by_epoch(result: Training) -> Table:
    table = plain_table(
        f"Training on {result.trained_on} scans of digits, {result.held_out} held out",
        "epoch",
        "PyTorch loss",
        "fastloss loss",
        "PyTorch held out",
        "fastloss held out",
    )
    a, b = result.pytorch, result.fastloss
    for epoch in _spread(len(a.epoch_losses)):
        table.add_row(
            str(epoch + 1),
            f"{a.epoch_losses[epoch]:.6f}",
            f"{b.epoch_losses[epoch]:.6f}",
            f"{a.held_out[epoch]:.2%}",
            f"{b.held_out[epoch]:.2%}",
        )
    return table


def _spread(epochs: int) -> list[int]:
    """A handful of epochs, the first and the last among them."""
    last = epochs - 1
    return sorted({round(last * i / (EPOCHS_SHOWN - 1)) for i in range(EPOCHS_SHOWN)})


def _a_step(result: Training) -> Table:
    a, b = result.pytorch, result.fastloss
    table = plain_table("One step of training", "", "PyTorch", "fastloss")
    table.add_row(
        f"time, median of {len(a.seconds)}", f"{a.median_step * 1e6:.0f} µs", f"{b.median_step * 1e6:.0f} µs"
    )
    table.add_row("peak memory beyond the model", bytes_in_words(a.peak_bytes), bytes_in_words(b.peak_bytes))
    return table


def _agreement(result: Training) -> Text:
    equal, scans = result.equal_predictions, result.held_out
    agreement = (
        f"The two loss curves differ by {result.largest_difference:.1e} at most; "
        f"{equal} of {scans} held-out predictions are equal ({equal / scans:.2%})."
    )
    if not torch.cuda.is_available():
        agreement += " On a CPU so few logits go to PyTorch's own operator; those below go through the fused pass."
    return Text(agreement)


def _add_case(table: Table, result: LossAtScale) -> None:
    a, b = result.pytorch, result.fastloss
    rows = [
        ("time, loss + accuracy", *_times(a.loss_and_accuracy, b.loss_and_accuracy)),
        ("time, loss", *_times(a.loss, b.loss)),
        ("peak, loss + accuracy", *_peaks(a.loss_and_accuracy, b.loss_and_accuracy)),
        ("peak, loss", *_peaks(a.loss, b.loss)),
        ("error of the loss", f"{a.errors.loss:.1e}", f"{b.errors.loss:.1e}", ""),
        ("error of the gradient", f"{a.errors.gradient:.1e}", f"{b.errors.gradient:.1e}", ""),
        (f"accuracy (float64: {result.accuracy:.2%})", f"{a.accuracy:.2%}", f"{b.accuracy:.2%}", ""),
    ]
    case = result.case
    names = [case.size, case.dtype_name, f"{result.rounds} runs", f"others' CPU {result.neighbours:.0%}"]
    for name, row in zip_longest(names, rows, fillvalue=""):
        table.add_row(str(name), *row)


def _times(pytorch: Timed, fastloss: Timed) -> tuple[str, str, str]:
    a, b = pytorch.median, fastloss.median
    return f"{a * 1e3:.1f} ms", f"{b * 1e3:.1f} ms", f"{a / b:.2f}x"


def _peaks(pytorch: Timed, fastloss: Timed) -> tuple[str, str, str]:
    a, b = pytorch.peak_bytes, fastloss.peak_bytes
    return bytes_in_words(a), bytes_in_words(b), f"{a / b:.2f}x"
