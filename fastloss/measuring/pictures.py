"""The style of pictures, with matplotlib."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

PYTORCH = "#f2a65a"
FASTLOSS = "#1d4ed8"
INK = "#1f2937"
FAINT = "#6b7280"
GRID = "#e5e7eb"

STYLE: Any = {
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


def title(axes: Axes, text: str, detail: str) -> None:
    """Write the title of a panel and, in grey under it, how its numbers were measured."""
    axes.set_title(text)
    axes.annotate(
        detail, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", fontsize=10, color=FAINT
    )
