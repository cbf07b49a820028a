"""What was measured, as one PNG: the two runs above, the loss alone at language-model size below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from .loss_at_scale import TIMES, LossAtScale, Timed
from .training import Training

if TYPE_CHECKING:
    from . import Outcome

__all__ = ["draw"]

PYTORCH = "#f2a65a"
FASTLOSS = "#1d4ed8"
INK = "#1f2937"
FAINT = "#6b7280"
GRID = "#e5e7eb"
BAR_WIDTH = 0.36  # of the distance between two cases
NOTABLE_SHARE = 0.1  # of the CPUs: where less goes to other programs, nothing is said

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 26,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "ytick.left": False,
    "xtick.bottom": False,
    "legend.frameon": False,
}


def draw(outcome: Outcome, path: Path, *, caption: str) -> None:
    """Write the picture to ``path``, a PNG; ``caption`` names the machine."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(14, 9.2), dpi=120, facecolor="white")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 2)
        figure.subplots_adjust(left=0.06, right=0.97, top=0.805, bottom=0.115, hspace=0.54, wspace=0.17)
        _draw_losses(panels[0, 0], outcome.training)
        _draw_held_out(panels[0, 1], outcome.training)
        _draw_times(panels[1, 0], outcome.at_scale)
        _draw_peaks(panels[1, 1], outcome.at_scale)
        _draw_head(figure)
        figure.text(0.06, 0.03, caption + _noise(outcome.at_scale), fontsize=9.5, color=FAINT)
        figure.savefig(path, format="png")


def _draw_head(figure: Figure) -> None:
    figure.text(0.06, 0.945, "fastloss beside PyTorch", fontsize=24, fontweight="bold")
    figure.text(
        0.06,
        0.913,
        "Above, one small network trained twice from one seed on scans of handwritten digits. "
        "Below, the loss alone at language-model size.",
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


def _noise(results: Sequence[LossAtScale]) -> str:
    """A word on the machine's other programs, if they were in the way."""
    share = max((result.neighbours for result in results), default=0.0)
    return f" · other programs took up to {share:.0%} of the CPUs" if share >= NOTABLE_SHARE else ""


def _title(axes: Axes, title: str, detail: str) -> None:
    """What is seen, and under it, in grey, how it was got."""
    axes.set_title(title)
    axes.annotate(
        detail, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", fontsize=10, color=FAINT
    )


def _draw_losses(axes: Axes, training: Training) -> None:
    steps = range(1, len(training.pytorch.losses) + 1)
    _two_lines(axes, steps, training.pytorch.losses, training.fastloss.losses)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, len(steps))
    axes.set_xlabel("step")
    _title(
        axes,
        f"Training loss: {_difference(training.largest_difference)}",
        "each step's loss; PyTorch's line is drawn broad, fastloss's thin, on top of it",
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
    _title(
        axes,
        f"Held-out accuracy: {a} for both" if a == b else f"Held-out accuracy: {a} and {b}",
        f"after each epoch; at the end the two agree on {equal} of {scans} scans",
    )


def _two_lines(axes: Axes, x: Sequence[int], pytorch: Sequence[float], fastloss: Sequence[float]) -> None:
    """A broad line under a thin one, so that both are seen where they are one."""
    axes.plot(x, pytorch, color=PYTORCH, linewidth=5.5, alpha=0.8, solid_capstyle="round")
    axes.plot(x, fastloss, color=FASTLOSS, linewidth=1.4)


def _draw_times(axes: Axes, results: Sequence[LossAtScale]) -> None:
    _bars(axes, results, lambda timed: timed.median * 1e3, unit="ms", better="faster", worse="slower")
    rounds = min((result.rounds for result in results), default=0)
    _title(
        axes,
        "Time of cross-entropy with top-1 accuracy",
        f"forward and backward, by tokens {TIMES} classes; median of {rounds} or more interleaved runs",
    )


def _draw_peaks(axes: Axes, results: Sequence[LossAtScale]) -> None:
    _bars(axes, results, lambda timed: timed.peak_bytes / 1e6, unit="MB", better="less", worse="more")
    _title(axes, "Peak memory of the same", "bytes of tensors, beyond the logits and the labels")


def _bars(
    axes: Axes,
    results: Sequence[LossAtScale],
    value_of: Callable[[Timed], float],
    *,
    unit: str,
    better: str,
    worse: str,
) -> None:
    """A pair of bars for each case, their values on them, and over them what that says of fastloss."""
    pairs = [
        (value_of(result.pytorch.loss_and_accuracy), value_of(result.fastloss.loss_and_accuracy))
        for result in results
    ]
    tallest = max(map(max, pairs), default=1.0)
    for i, pair in enumerate(pairs):
        for side, value, color in zip((-0.5, 0.5), pair, (PYTORCH, FASTLOSS), strict=True):
            x = i + side * BAR_WIDTH
            axes.bar(x, value, BAR_WIDTH * 0.94, color=color)
            axes.text(x, value + tallest * 0.02, f"{value:.0f} {unit}", ha="center", fontsize=9, color=FAINT)
        words, color = _verdict(*pair, better=better, worse=worse)
        axes.text(i, max(pair) + tallest * 0.115, words, ha="center", fontweight="bold", color=color)
    axes.set_ylim(0, tallest * 1.22)
    axes.set_xticks(range(len(results)), [f"{result.case.size}\n{result.case.dtype_name}" for result in results])
    axes.set_yticks([])


def _verdict(pytorch: float, fastloss: float, *, better: str, worse: str) -> tuple[str, str]:
    """``2.9 × less``, in fastloss's colour if that is in its favour."""
    factor, word, color = pytorch / fastloss, better, FASTLOSS
    if factor < 1:
        factor, word, color = 1 / factor, worse, FAINT
    if factor < 1.05:
        return "the same", FAINT
    return f"{factor:.1f}{TIMES} {word}", color
