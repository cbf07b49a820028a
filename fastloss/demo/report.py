"""The tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text

from ..measuring import machine
from ..measuring.info import reason
from ..measuring.inputs import resnet50_shapes
from ..measuring.machine import bytes_in_words
from ..measuring.style import TIMES, notes, plain_table
from .language_model import CLASSES, LanguageModel
from .loss_at_scale import LossAtScale, Measured
from .optimizer_step import OptimizerStep, count
from .training import Training, largest_difference

EPOCHS_SHOWN = 7

_loss, _error, _share, _tenths = "{:.6f}".format, "{:.1e}".format, "{:.2%}".format, "{:.1f} ms".format


def heading(device: torch.device) -> RenderableType:
    """Return the machine and the backend that serves it."""
    return Group(
        Text("fastloss beside plain PyTorch", style="bold"),
        Text(machine.description(device), style="dim"),
        Text(f"backend  {reason(device)}", style="dim"),
    )


def _cells(form: Callable[[Any], str], pytorch: float, fastloss: float, ratio: bool = False) -> list[str]:
    """Return the cells of PyTorch, fastloss and their ratio."""
    return [form(pytorch), form(fastloss), f"{pytorch / fastloss:.2f}x" if ratio else ""]


def training(result: Training) -> RenderableType:
    """Return the two runs by epoch, then side by side as wholes."""
    a, b = result.pytorch, result.fastloss
    columns = ("epoch", "PyTorch loss", "fastloss loss", "PyTorch held out", "fastloss held out")
    by_epoch = plain_table(f"Training on {result.trained_on} scans of digits, {result.held_out} held out", *columns)
    last = len(a.epoch_losses) - 1
    for epoch in sorted({round(last * i / (EPOCHS_SHOWN - 1)) for i in range(EPOCHS_SHOWN)}):
        losses, accuracies = [run.epoch_losses[epoch] for run in (a, b)], [run.held_out[epoch] for run in (a, b)]
        by_epoch.add_row(str(epoch + 1), *map(_loss, losses), *map(_share, accuracies))
    step = plain_table("One step of training", "", "PyTorch", "fastloss")
    step.add_row(f"time, median of {len(a.seconds)}", *(f"{run.median_step * 1e6:.0f} µs" for run in (a, b)))
    step.add_row("peak memory beyond the model", *(bytes_in_words(run.peak_bytes) for run in (a, b)))
    equal, scans = result.equal_predictions, result.held_out
    words = (
        f"The two loss curves differ by {largest_difference(a, b):.1e} at most; "
        f"{equal} of {scans} held-out predictions are equal ({equal / scans:.2%})."
    )
    if not torch.cuda.is_available():
        words += " On a CPU so few logits go to PyTorch's own operator; those below go through the fused pass."
    return Group("", by_epoch, "", step, "", Text(words), "")


def at_scale(results: Sequence[LossAtScale], device: torch.device) -> RenderableType:
    """Return time, memory and errors of the loss alone."""
    title = f"The loss alone at language-model size, on {device.type}: forward and backward"
    table = plain_table(title, f"tokens {TIMES} classes", "", "PyTorch", "fastloss", "ratio")
    for i, result in enumerate(results):
        if i:
            table.add_row()
        names = [*result.case.words, f"{result.rounds} runs", f"others' CPU {result.others_share:.0%}", "", "", ""]
        for name, (words, form, number, ratio) in zip(names, _AT_SCALE, strict=True):
            numbers = _cells(form, number(result.pytorch), number(result.fastloss), ratio)
            table.add_row(name, words.format(result), *numbers)
    words = (
        "Time: median of interleaved runs. Others' CPU: the share that other programs took meanwhile. "
        "Peak: bytes of tensors, beyond the logits and the labels. Ratio: PyTorch's number / fastloss's, so "
        "above 1 is in fastloss's favour. Errors: against float64, relative (of the gradient: the norm of "
        "the difference over the norm)."
    )
    return Group("", table, notes(words))


# The rows of each case: words, the form of a number, each side's number, and whether their ratio is shown.
_AT_SCALE: list[tuple[str, Callable[[Any], str], Callable[[Measured], float], bool]] = [
    ("time, loss + accuracy", _tenths, lambda side: side.loss_and_accuracy.median * 1e3, True),
    ("time, loss", _tenths, lambda side: side.loss.median * 1e3, True),
    ("peak, loss + accuracy", bytes_in_words, lambda side: side.loss_and_accuracy.peak_bytes, True),
    ("peak, loss", bytes_in_words, lambda side: side.loss.peak_bytes, True),
    ("error of the loss", _error, lambda side: side.errors.loss, False),
    ("error of the gradient", _error, lambda side: side.errors.gradient_norm, False),
    ("accuracy (float64: {0.accuracy:.2%})", _share, lambda side: side.accuracy, False),
]


def language_model(result: LanguageModel, device: torch.device) -> RenderableType:
    """Return losses, time and memory of the two runs."""
    a, b, size, saved = result.pytorch, result.fastloss, result.size, result.saved_bytes
    title = f"A language model on {result.text_bytes / 1e6:.1f} MB of Python's own source, on {device.type}"
    table = plain_table(title, f"{size.rows} tokens {TIMES} {CLASSES} classes a step", "PyTorch", "fastloss", "ratio")
    for name, form, pytorch, fastloss, ratio in (
        ("loss of the first step", _loss, a.losses[0], b.losses[0], False),
        (f"loss of step {size.steps}", _loss, a.losses[-1], b.losses[-1], False),
        ("time of a step", _tenths, a.median_step * 1e3, b.median_step * 1e3, True),
        ("peak of a step", bytes_in_words, a.peak_bytes, b.peak_bytes, True),
    ):
        table.add_row(name, *_cells(form, pytorch, fastloss, ratio))
    change = "saved" if saved >= 0 else "more taken"
    table.add_row(f"memory {change}", "", bytes_in_words(abs(saved)), f"{abs(saved) / a.peak_bytes:.0%}")
    words = (
        "PyTorch: F.cross_entropy(F.linear(hidden, head), labels). fastloss: linear_cross_entropy(hidden, head, "
        "tokens, shift=True), which never holds the logits. A token is a pair of bytes; the head is the embedding. "
        f"The loss curves differ by {largest_difference(a, b):.1e} at most. Peak: bytes of tensors beyond the "
        f"model, its gradients among them. Time: median of {size.steps} steps in turn; "
        f"others' CPU {result.others_share:.0%}."
    )
    return Group("", table, notes(words))


def optimizer(result: OptimizerStep, device: torch.device) -> RenderableType:
    """Return time and errors of SGD's step."""
    title = f"SGD's step alone, on {device.type}: {tensors_of(result)}"
    table = plain_table(title, "", "", "PyTorch", "fastloss", "ratio")
    for way in result.compared:
        name, times = "clipping and step" if way.clipped else "step", [seconds * 1e3 for seconds in way.seconds]
        table.add_row(way.name, f"{name}, time", *_cells("{:.2f} ms".format, *times, ratio=True))
        table.add_row("", f"{name}, error", *_cells(_error, *way.errors))
    words = (
        "In float32 with momentum and weight decay; the first column names PyTorch's way. Clipping: clip_grad_norm_ "
        "and the step, or fastloss's step with max_norm. "
        f"Time: median of {result.rounds} interleaved runs; others' CPU {result.others_share:.0%}. "
        "Error: of a narrower network's parameters after a few steps, against float64, relative."
    )
    return Group("", table, notes(words))


def tensors_of(result: OptimizerStep) -> str:
    """Return ``161 tensors of a ResNet-50, 25.6 million parameters``."""
    network = "a ResNet-50" if count(resnet50_shapes()) == result.parameters else "a narrow ResNet-50"
    return f"{result.tensors} tensors of {network}, {result.parameters / 1e6:.1f} million parameters"
