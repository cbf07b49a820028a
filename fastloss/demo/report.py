"""The tables for the terminal; and the numbers as one PNG: the runs above, the loss and the optimizer alone below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from rich.console import Group, RenderableType
from rich.text import Text

from ..measuring import machine
from ..measuring.info import reason
from ..measuring.inputs import count, resnet50_shapes
from ..measuring.machine import bytes_in_words
from ..measuring.style import FAINT, FASTLOSS, NOTABLE_SHARE, PYTORCH, STYLE, TIMES, notes, plain_table, title
from .alone import LossAtScale, Measured, OptimizerStep
from .language_model import CLASSES, LanguageModel
from .training import Training, largest_difference

if TYPE_CHECKING:
    from . import Outcome

EPOCHS_SHOWN = 7
BAR_WIDTH = 0.4  # of the distance between two pairs
LEFT, RIGHT = 0.052, 0.974  # of the panels, as shares of the picture's width

_loss, _error, _share, _tenths = "{:.6f}".format, "{:.1e}".format, "{:.2%}".format, "{:.1f} ms".format


def heading(device: torch.device) -> RenderableType:
    """Return the machine and the backend that serves it."""
    return Group(
        Text("fastloss beside plain PyTorch", style="bold"),
        Text(machine.description(device), style="dim"),
        Text(f"backend  {reason(device)}", style="dim"),
    )


def _cells(form: Callable[[Any], str], pytorch: float, fastloss: float, *, ratio: bool = False) -> list[str]:
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
    head = f"The loss alone at language-model size, on {device.type}: forward and backward"
    table = plain_table(head, f"tokens {TIMES} classes", "", "PyTorch", "fastloss", "ratio")
    for i, result in enumerate(results):
        if i:
            table.add_row()
        names = [*result.case.words, f"{result.rounds} runs", f"others' CPU {result.others_share:.0%}", "", "", ""]
        for name, (words, form, number, ratio) in zip(names, _AT_SCALE, strict=True):
            numbers = _cells(form, number(result.pytorch), number(result.fastloss), ratio=ratio)
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
    head = f"A language model on {result.text_bytes / 1e6:.1f} MB of Python's own source, on {device.type}"
    table = plain_table(head, f"{size.rows} tokens {TIMES} {CLASSES} classes a step", "PyTorch", "fastloss", "ratio")
    for name, form, pytorch, fastloss, ratio in (
        ("loss of the first step", _loss, a.losses[0], b.losses[0], False),
        (f"loss of step {size.steps}", _loss, a.losses[-1], b.losses[-1], False),
        ("time of a step", _tenths, a.median_step * 1e3, b.median_step * 1e3, True),
        ("peak of a step", bytes_in_words, a.peak_bytes, b.peak_bytes, True),
    ):
        table.add_row(name, *_cells(form, pytorch, fastloss, ratio=ratio))
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
    head = f"SGD's step alone, on {device.type}: {tensors_of(result)}"
    table = plain_table(head, "", "", "PyTorch", "fastloss", "ratio")
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


# ------------------------------------------------------------------------------------------------------- the picture


class _Unit(NamedTuple):
    name: str
    factor: float
    better: str
    worse: str


_MILLISECONDS = _Unit("ms", 1e3, "faster", "slower")
_MEGABYTES = _Unit("MB", 1e-6, "less", "more")


def draw(outcome: Outcome, path: Path, *, caption: str) -> None:
    """Write the picture to ``path``, a PNG; ``caption`` names the machine."""
    at_scale, model, optimizer = outcome.at_scale, outcome.language_model, outcome.optimizer
    sizes = ["\n".join(result.case.words) for result in at_scale]
    both = [(result.pytorch.loss_and_accuracy, result.fastloss.loss_and_accuracy) for result in at_scale]
    ways = [optimizer.compared[i] for i in (0, 1, 3)]  # without PyTorch's slower way a second time
    names = [way.name.replace(" (", "\n(") + (",\nclipped" if way.clipped else "") for way in ways]
    others_share = max([optimizer.others_share, *(result.others_share for result in at_scale)])
    noise = f" · other programs took up to {others_share:.0%} of the CPUs" if others_share >= NOTABLE_SHARE else ""
    rounds = min((result.rounds for result in at_scale), default=0)
    widths = [max(pairs, 3) for pairs in (len(at_scale), len(at_scale), len(ways))]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 9.2), dpi=120, facecolor="white")
        place = {"left": LEFT, "right": RIGHT}
        above = figure.add_gridspec(1, 3, top=0.805, bottom=0.54, wspace=0.17, width_ratios=[3.3, 3, 1.9], **place)
        below = figure.add_gridspec(1, 3, top=0.38, bottom=0.115, wspace=0.1, width_ratios=widths, **place)
        losses, held_out, memory, times, peaks, steps = (
            figure.add_subplot(grid[i]) for grid in (above, below) for i in range(3)
        )
        _draw_losses(losses, outcome.training)
        _draw_held_out(held_out, outcome.training)
        pairs = [(model.pytorch.peak_bytes, model.fastloss.peak_bytes)]
        _bars(memory, [f"{model.size.rows} {TIMES} {CLASSES}\nfloat32"], pairs, _MEGABYTES)
        memory.set_xlim(-1, 1)
        title(memory, "A language model's memory", "peak of a step; fastloss holds no logits")
        _bars(times, sizes, [(a.median, b.median) for a, b in both], _MILLISECONDS)
        detail = f"forward and backward, tokens {TIMES} classes; median of {rounds} or more turns"
        title(times, "Time of cross-entropy with top-1 accuracy", detail)
        _bars(peaks, sizes, [(a.peak_bytes, b.peak_bytes) for a, b in both], _MEGABYTES)
        title(peaks, "Peak memory of the same", "bytes of tensors, beyond the logits and the labels")
        _bars(steps, names, [way.seconds for way in ways], _MILLISECONDS)
        detail = tensors_of(optimizer).replace("million parameters", "M numbers")
        title(steps, "Time of SGD's step, beside torch's", detail)
        _draw_head(figure)
        figure.text(LEFT, 0.03, caption + noise, fontsize=9.5, color=FAINT)
        figure.savefig(path, format="png")


def _draw_head(figure: Figure) -> None:
    figure.text(LEFT, 0.945, "fastloss beside PyTorch", fontsize=24, fontweight="bold")
    words = (
        "Above, a small network trained twice from one seed on scans of handwritten digits; right, a language model. "
        "Below, the loss alone at language-model size, and SGD's step alone."
    )
    figure.text(LEFT, 0.913, words, fontsize=11.5, color=FAINT)
    handles = [Patch(color=PYTORCH, label="PyTorch"), Patch(color=FASTLOSS, label="fastloss")]
    where: dict[str, Any] = {"loc": "upper right", "bbox_to_anchor": (0.977, 0.99)}
    figure.legend(handles=handles, ncols=2, fontsize=13, handlelength=1.0, handleheight=1.0, **where)


def _draw_losses(axes: Axes, training: Training) -> None:
    _two_lines(axes, training.pytorch.losses, training.fastloss.losses)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    largest = largest_difference(training.pytorch, training.fastloss)
    words = f"the two curves differ by {largest:.0e} at most" if largest else "the two curves are bitwise equal"
    detail = "each step's loss; PyTorch's line is drawn broad, fastloss's thin, on top of it"
    title(axes, f"Training loss: {words}", detail)


def _draw_held_out(axes: Axes, training: Training) -> None:
    _two_lines(axes, training.pytorch.held_out, training.fastloss.held_out)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(top=1)
    axes.set_xlabel("epoch")
    a, b = (f"{run.held_out[-1]:.1%}" for run in (training.pytorch, training.fastloss))
    equal, scans = training.equal_predictions, training.held_out
    detail = f"after each epoch; at the end the two agree on {equal} of {scans} scans"
    title(axes, f"Held-out accuracy: {a} for both" if a == b else f"Held-out accuracy: {a} and {b}", detail)


def _two_lines(axes: Axes, pytorch: Sequence[float], fastloss: Sequence[float]) -> None:
    """Draw a broad line under a thin one, so that both are seen where they are one."""
    x = range(1, len(pytorch) + 1)
    axes.plot(x, pytorch, color=PYTORCH, linewidth=5.5, alpha=0.8, solid_capstyle="round")
    axes.plot(x, fastloss, color=FASTLOSS, linewidth=1.4)
    axes.set_xlim(0, len(pytorch))


def _bars(axes: Axes, names: Sequence[str], pairs: Sequence[tuple[float, float]], unit: _Unit) -> None:
    """Draw PyTorch's and fastloss's bar for each name, their values on them, and their ratio in words above."""
    tallest = max(map(max, pairs), default=1.0)
    for i, pair in enumerate(pairs):
        for side, value, color in zip((-0.5, 0.5), pair, (PYTORCH, FASTLOSS), strict=True):
            bars = axes.bar(i + side * BAR_WIDTH, value, BAR_WIDTH * 0.94, color=color)
            scaled = value * unit.factor
            label = f"{scaled:.{0 if scaled >= 10 else 1 if scaled >= 1 else 2}f} {unit.name}"
            axes.bar_label(bars, [label], padding=3, fontsize=9, color=FAINT)
        words, color = _verdict(*pair, better=unit.better, worse=unit.worse)
        axes.text(i, max(pair) + tallest * 0.115, words, ha="center", fontweight="bold", color=color)
    axes.set_ylim(0, tallest * 1.22)
    axes.set_xticks(range(len(names)), names, fontsize=10)
    axes.set_yticks([])


def _verdict(pytorch: float, fastloss: float, *, better: str, worse: str) -> tuple[str, str]:
    """Return ``2.9 × less``, and fastloss's colour if that is in its favour."""
    factor, word, color = pytorch / fastloss, better, FASTLOSS
    if factor < 1:
        factor, word, color = 1 / factor, worse, FAINT
    return ("the same", FAINT) if factor < 1.05 else (f"{factor:.1f}{TIMES} {word}", color)
