"""The numbers as one PNG: the runs above, the loss and the optimizer alone below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from ..measuring.style import FAINT, FASTLOSS, NOTABLE_SHARE, PYTORCH, STYLE, TIMES, title
from .language_model import CLASSES
from .report import tensors_of
from .training import Training, largest_difference

if TYPE_CHECKING:
    from . import Outcome

BAR_WIDTH = 0.4  # of the distance between two pairs
LEFT, RIGHT = 0.052, 0.974  # of the panels, as shares of the picture's width


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
