"""GB/s against V, as one PNG: a panel for each operation and dtype, a line for each contender, the limit drawn in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..measuring.contenders import CONTENDERS, OURS
from ..measuring.style import FAINT, FASTLOSS, STYLE, title
from .measure import Row

COLUMNS = 2
OTHERS = ("#f2a65a", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf")


def draw(rows: Sequence[Row], path: Path, *, caption: str) -> bool:
    """Write the picture to ``path``; False, and no picture, if no row has a speed. ``caption`` names the machine."""
    parts = panels(rows)
    if not parts:
        return False
    with matplotlib.rc_context(STYLE):
        lines = math.ceil(len(parts) / COLUMNS)
        figure = Figure(figsize=(15, 1.2 + 4.6 * lines), dpi=110, facecolor="white", layout="constrained")
        for number, (name, of_panel) in enumerate(parts.items(), 1):
            _draw_panel(figure.add_subplot(lines, min(COLUMNS, len(parts)), number), name, of_panel)
        figure.supxlabel(caption, fontsize=9.5, color=FAINT)
        figure.savefig(path, format="png")
    return True


def panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows that have a speed, by operation, dtype and target, which make them comparable."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        if row.gigabytes_per_second is not None:
            target = {"hard": ", class indices", "soft": ", class probabilities"}.get(row.target, "")
            parts.setdefault(f"{row.op}, {row.dtype}{target}", []).append(row)
    return parts


def _draw_panel(axes: Axes, name: str, rows: Sequence[Row]) -> None:
    """Draw for each V the shape with the most rows."""
    others = [other for other in CONTENDERS if other != OURS]
    for contender in dict.fromkeys(row.contender for row in rows):
        # Of equal V the row with the most rows comes last, and stays.
        of_contender = sorted((row for row in rows if row.contender == contender), key=lambda row: row.rows)
        speeds = dict(sorted({row.classes: row.gigabytes_per_second or 0.0 for row in of_contender}.items()))
        style: dict[str, Any] = {"linewidth": 2.6, "color": FASTLOSS, "zorder": 3}
        if contender != OURS:  # in the same colour in every panel
            style = {"linewidth": 1.6, "color": OTHERS[others.index(contender) % len(OTHERS)], "zorder": 2}
        axes.plot(list(speeds), list(speeds.values()), marker="o", label=contender, clip_on=False, **style)
    if copies := [row.copy_gigabytes_per_second for row in rows if row.copy_gigabytes_per_second]:
        limit = statistics.median(copies)
        axes.axhline(limit, color=FAINT, linestyle="--", linewidth=1.2, label=f"a copy: {limit:.0f} GB/s")
    sizes = sorted({row.classes for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes], rotation=30, horizontalalignment="right")
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GB/s of the bytes that must move")
    axes.legend(fontsize=9)
    if rows[0].op == "sgd":
        axes.set_xlabel("elements of a tensor")
        title(axes, name, "at each size the set with the most tensors")
    else:
        axes.set_xlabel("V, classes")
        title(axes, name, "at each V the shape with the most rows")
