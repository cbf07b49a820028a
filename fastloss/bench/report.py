"""Tables for the terminal, the rows as JSON, and GB/s against V as one PNG.

The picture has a panel for each operation and dtype, and in it a line for each contender and the limit.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..measuring import info, machine
from ..measuring.contenders import CONTENDERS, LINEAR_OPS, OURS, Contender
from ..measuring.style import FAINT, FASTLOSS, NOTABLE_SHARE, STYLE, TIMES, notes, plain_table, title
from .measure import COLUMNS, Row
from .workloads import Workload

PANELS = 2  # beside each other
OTHERS = ("#f2a65a", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf")

LEGEND = (
    "ms: median of interleaved turns, of one call. GB/s: the bytes that must move, whatever a contender moves, "
    "over its time; of a copy: that over the bandwidth of a copy in the same turns. peak: bytes of tensors "
    "beyond the inputs. ratio: fastloss's time over this contender's, so below 1 fastloss is faster. Everybody "
    "was checked against float64 first; a wrong one has no time."
)
HOST_LEGEND = (
    " On a GPU ms is its own time, taken while it has so much to do that it never waits for the host, as in "
    "training; host ms: until the call returns."
)
LINEAR_LEGEND = (
    " linear: Tflop/s counts the operations of three bare products of matrices, which take turns with the "
    "others; of the products: its time over theirs; peak: beyond inputs and gradients."
)
SGD_LEGEND = (
    " On a CPU a step of SGD may be above 100 % of a copy: the memory that a copy writes to is "
    "read first, which is not counted, and small tensors stay in the caches."
)


def heading(
    device: torch.device, contenders: Sequence[Contender], ops: Collection[str], *, chosen: bool = False
) -> RenderableType:
    """Return the machine, and each contender's version or why it is absent.

    Contenders that have none of the operations ``ops`` are left out, unless they were ``chosen`` by name.
    """
    present = Table.grid(padding=(0, 2))
    for contender in contenders:
        if chosen or not contender.ops or set(contender.ops) & set(ops):
            present.add_row(contender.name, Text(contender.presence()), style="dim")
    title, place = Text("fastloss bench", style="bold"), Text(machine.description(device), style="dim")
    return Group(title, place, Text(), present, Text())


def table(workload: Workload, rows: Sequence[Row]) -> RenderableType:
    """Return one workload's contenders, the fastest first, then those that have no time, with the reason."""
    parts: list[RenderableType] = [Text(_title(workload), style="bold")]
    timed = sorted((row for row in rows if row.timed), key=lambda row: row.milliseconds or 0.0)
    if timed:
        parts.append(_timed(timed))
    rest = Table.grid(padding=(0, 2))
    for row in rows:
        if not row.timed and row.status != "absent":  # those are listed above
            style = "red" if row.status in ("wrong", "failed") else "dim"
            name = row.status.upper() if row.status == "wrong" else row.status
            rest.add_row(f" {row.contender}", Text(f"{name}: {row.reason}", overflow="fold"), style=style)
    if rest.row_count:
        parts += [rest, Text()]
    return Group(*parts)


def legend(rows: Sequence[Row], device: torch.device) -> RenderableType:
    """Return the meaning of the columns, and how busy other programs kept the machine, if they did."""
    timed = {row.op for row in rows if row.timed}
    words = LEGEND
    words += HOST_LEGEND if any(row.host_milliseconds is not None for row in rows) else ""
    words += LINEAR_LEGEND if timed.intersection(LINEAR_OPS) else ""
    words += SGD_LEGEND if "sgd" in timed and device.type == "cpu" else ""
    busiest = max((row.others_share or 0.0 for row in rows), default=0.0)
    words += f" Other programs took up to {busiest:.0%} of the CPUs." if busiest >= NOTABLE_SHARE else ""
    return notes(words, above=1)


def write_json(path: Path | None, device: torch.device, rows: Sequence[Row], *, finished: bool) -> None:
    """Write all rows so far in one step, so that the file is whole whenever the run ends."""
    if path is None:
        return
    record = {
        "fastloss": info.VERSION,
        "torch": torch.__version__,
        "device": machine.description(device),
        "finished": finished,
        "rows": [asdict(row) for row in rows],
    }
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def _title(workload: Workload) -> str:
    n, v, d = workload.shape
    if d:
        size = f"{n} {TIMES} {d} \N{RIGHTWARDS ARROW} {v}"
        work = f"{workload.operations / 1e12:.3g} Tflop"
        words = f"{work} must be done" if workload.op == "linear" else f"three products are {work}"
        return f"{workload.op}, {size}, {workload.dtype_name}: {words}"
    target = [] if workload.op == "sgd" else ["class probabilities" if workload.soft else "class indices"]
    title = ", ".join([workload.op, f"{n} {TIMES} {v}", workload.dtype_name, *target])
    if workload.op == "host":
        return f"{title}: until the call returns"
    return f"{title}: {machine.bytes_in_words(workload.moved_bytes)} must move"


def _timed(rows: Sequence[Row]) -> Table:
    """Return the contenders' numbers, and those of the limit that took turns with them."""
    ours, first = next((row for row in rows if row.contender == OURS), None), rows[0]
    limit = {"contender": "a copy", "GB/s": f"{first.copy_gigabytes_per_second or 0.0:.2f}", "of a copy": "100%"}
    if bare := first.products_milliseconds:
        speed = (first.teraflops or 0.0) * (first.times_products or 0.0)
        limit = {"contender": "three products", "ms": f"{bare:.4f}", "Tflop/s": f"{speed:.4g}"}
        limit["of the products"] = "1.000"
    ratios = {name: f"{ratio:.3f}" for name, ratio in ours.ratios.items()} if ours else {}
    columns = ["contender", *(head for head in COLUMNS if head in first.cells()), "ratio"]
    result = plain_table("", *columns)
    for row in rows:
        cells = {"contender": row.contender, **row.cells(), "ratio": ratios.get(row.contender, "")}
        result.add_row(*(cells.get(head, "") for head in columns), style="cyan" if row is ours else "")
    if bare or first.copy_gigabytes_per_second:
        result.add_row(*(limit.get(head, "") for head in columns), style="dim")
    return result


def draw(rows: Sequence[Row], path: Path, *, caption: str) -> bool:
    """Write the picture to ``path``; False, and no picture, if no row has a speed. ``caption`` names the machine."""
    parts = panels(rows)
    if not parts:
        return False
    with matplotlib.rc_context(STYLE):
        lines = math.ceil(len(parts) / PANELS)
        figure = Figure(figsize=(15, 1.2 + 4.6 * lines), dpi=110, facecolor="white", layout="constrained")
        for number, (name, of_panel) in enumerate(parts.items(), 1):
            _draw_panel(figure.add_subplot(lines, min(PANELS, len(parts)), number), name, of_panel)
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
