"""What was measured, as one PNG: the two runs above, the loss and the optimizer alone below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from ..measuring.pictures import FAINT, FASTLOSS, PYTORCH, STYLE, title
from ..measuring.tables import NOTABLE_SHARE, TIMES
from .language_model import CLASSES, LanguageModel
from .loss_at_scale import LossAtScale
from .optimizer_step import Compared, OptimizerStep
from .report import tensors_of
from .training import Training

if TYPE_CHECKING:
    from . import Outcome

__all__ = ["draw"]

BAR_WIDTH = 0.4  # of the distance between two pairs
LEFT, RIGHT = 0.052, 0.974  # of the panels, as shares of the picture's width


def draw(outcome: Outcome, path: Path, *, caption: str) -> None:
    """Write the picture to ``path``, a PNG; ``caption`` names the machine."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 9.2), dpi=120, facecolor="white")
        above = figure.add_gridspec(
            1, 3, left=LEFT, right=RIGHT, top=0.805, bottom=0.54, wspace=0.17, width_ratios=[3.3, 3, 1.9]
        )
        pairs = [len(outcome.at_scale), len(outcome.at_scale), len(_steps_shown(outcome.optimizer))]
        below = figure.add_gridspec(
            1, 3, left=LEFT, right=RIGHT, top=0.38, bottom=0.115, wspace=0.1, width_ratios=[max(n, 3) for n in pairs]
        )
        _draw_losses(figure.add_subplot(above[0]), outcome.training)
        _draw_held_out(figure.add_subplot(above[1]), outcome.training)
        _draw_language_model(figure.add_subplot(above[2]), outcome.language_model)
        _draw_times(figure.add_subplot(below[0]), outcome.at_scale)
        _draw_peaks(figure.add_subplot(below[1]), outcome.at_scale)
        _draw_steps(figure.add_subplot(below[2]), outcome.optimizer)
        _draw_head(figure)
        figure.text(LEFT, 0.03, caption + _noise(outcome), fontsize=9.5, color=FAINT)
        figure.savefig(path, format="png")


def _draw_head(figure: Figure) -> None:
    figure.text(LEFT, 0.945, "fastloss beside PyTorch", fontsize=24, fontweight="bold")
    figure.text(
        LEFT,
        0.913,
        "Above, a small network trained twice from one seed on scans of handwritten digits; right, a language model. "
        "Below, the loss alone at language-model size, and SGD's step alone.",
        fontsize=11.5,
        color=FAINT,
    )
    figure.legend(
        handles=[Patch(color=PYTORCH, label="PyTorch"), Patch(color=FASTLOSS, label="fastloss")],
        loc="upper right",
        bbox_to_anchor=(0.977, 0.99),
        ncols=2,
        fontsize=13,
        handlelength=1.0,
        handleheight=1.0,
    )


def _noise(outcome: Outcome) -> str:
    """A word on the machine's other programs, if they were in the way."""
    share = max([outcome.optimizer.neighbours, *(result.neighbours for result in outcome.at_scale)])
    return f" · other programs took up to {share:.0%} of the CPUs" if share >= NOTABLE_SHARE else ""


def _draw_losses(axes: Axes, training: Training) -> None:
    steps = range(1, len(training.pytorch.losses) + 1)
    _two_lines(axes, steps, training.pytorch.losses, training.fastloss.losses)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, len(steps))
    axes.set_xlabel("step")
    title(
        axes,
        f"Training loss: {_difference(training.largest_difference)}",
        "each step's loss; PyTorch's line is drawn broad, fastloss's thin, on top of it",
    )


def _draw_language_model(axes: Axes, result: LanguageModel) -> None:
    name = f"{result.size.rows} {TIMES} {CLASSES}\nfloat32"
    _bars(axes, [name], [(result.pytorch.peak_bytes / 1e6, result.fastloss.peak_bytes / 1e6)], _MEGABYTES)
    axes.set_xlim(-1, 1)
    title(
        axes,
        "A language model's memory",
        "peak of a step; fastloss holds no logits",
    )


def _difference(largest: float) -> str:
    if largest == 0:
        return "the two curves are bitwise equal"
    return f"the two curves differ by {largest:.0e} at most"


def _draw_held_out(axes: Axes, training: Training) -> None:
    epochs = range(1, len(training.pytorch.held_out) + 1)
    _two_lines(axes, epochs, training.pytorch.held_out, training.fastloss.held_out)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(top=1)
    axes.set_xlim(0, len(epochs))
    axes.set_xlabel("epoch")
    a, b = (f"{run.held_out[-1]:.1%}" for run in (training.pytorch, training.fastloss))
    equal, scans = training.equal_predictions, training.held_out
    title(
        axes,
        f"Held-out accuracy: {a} for both" if a == b else f"Held-out accuracy: {a} and {b}",
        f"after each epoch; at the end the two agree on {equal} of {scans} scans",
    )


def _two_lines(axes: Axes, x: Sequence[int], pytorch: Sequence[float], fastloss: Sequence[float]) -> None:
    """A broad line under a thin one, so that both are seen where they are one."""
    axes.plot(x, pytorch, color=PYTORCH, linewidth=5.5, alpha=0.8, solid_capstyle="round")
    axes.plot(x, fastloss, color=FASTLOSS, linewidth=1.4)


def _draw_times(axes: Axes, results: Sequence[LossAtScale]) -> None:
    pairs = [(result.pytorch.loss_and_accuracy, result.fastloss.loss_and_accuracy) for result in results]
    _bars(axes, _sizes(results), [(a.median * 1e3, b.median * 1e3) for a, b in pairs], _MILLISECONDS)
    rounds = min((result.rounds for result in results), default=0)
    title(
        axes,
        "Time of cross-entropy with top-1 accuracy",
        f"forward and backward, tokens {TIMES} classes; median of {rounds} or more turns",
    )


def _draw_peaks(axes: Axes, results: Sequence[LossAtScale]) -> None:
    pairs = [(result.pytorch.loss_and_accuracy, result.fastloss.loss_and_accuracy) for result in results]
    _bars(axes, _sizes(results), [(a.peak_bytes / 1e6, b.peak_bytes / 1e6) for a, b in pairs], _MEGABYTES)
    title(axes, "Peak memory of the same", "bytes of tensors, beyond the logits and the labels")


def _draw_steps(axes: Axes, result: OptimizerStep) -> None:
    shown = _steps_shown(result)
    names = [each.name.replace(" (", "\n(") + (",\nclipped" if each.clipped else "") for each in shown]
    pairs = [(each.seconds[0] * 1e3, each.seconds[1] * 1e3) for each in shown]
    _bars(axes, names, pairs, _MILLISECONDS)
    title(axes, "Time of SGD's step, beside torch's", tensors_of(result).replace("million parameters", "M numbers"))


def _steps_shown(result: OptimizerStep) -> tuple[Compared, ...]:
    """Not PyTorch's slower way a second time."""
    return result.default, result.fused, result.clipped_fused


def _sizes(results: Sequence[LossAtScale]) -> list[str]:
    return [f"{result.case.size}\n{result.case.dtype_name}" for result in results]


class _Unit(NamedTuple):
    name: str
    better: str
    worse: str


_MILLISECONDS = _Unit("ms", "faster", "slower")
_MEGABYTES = _Unit("MB", "less", "more")


def _bars(axes: Axes, names: Sequence[str], pairs: Sequence[tuple[float, float]], unit: _Unit) -> None:
    """PyTorch's and fastloss's bar for each name, their values on them, and over them what that says of fastloss."""
    tallest = max(map(max, pairs), default=1.0)
    for i, pair in enumerate(pairs):
        for side, value, color in zip((-0.5, 0.5), pair, (PYTORCH, FASTLOSS), strict=True):
            x = i + side * BAR_WIDTH
            axes.bar(x, value, BAR_WIDTH * 0.94, color=color)
            axes.text(x, value + tallest * 0.02, _value(value, unit), ha="center", fontsize=9, color=FAINT)
        words, color = _verdict(*pair, better=unit.better, worse=unit.worse)
        axes.text(i, max(pair) + tallest * 0.115, words, ha="center", fontweight="bold", color=color)
    axes.set_ylim(0, tallest * 1.22)
    axes.set_xticks(range(len(names)), names, fontsize=10)
    axes.set_yticks([])


def _value(value: float, unit: _Unit) -> str:
    digits = 0 if value >= 10 else 1 if value >= 1 else 2
    return f"{value:.{digits}f} {unit.name}"


def _verdict(pytorch: float, fastloss: float, *, better: str, worse: str) -> tuple[str, str]:
    """``2.9 × less``, in fastloss's colour if that is in its favour."""
    factor, word, color = pytorch / fastloss, better, FASTLOSS
    if factor < 1:
        factor, word, color = 1 / factor, worse, FAINT
    if factor < 1.05:
        return "the same", FAINT
    return f"{factor:.1f}{TIMES} {word}", color
