"""What was measured, as tables for the terminal and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import fastloss

from ..measuring import machine
from ..measuring.contenders import OURS, Contender
from ..measuring.tables import NOTABLE_SHARE, TIMES, bytes_in_words, notes, plain_table
from .measure import Row
from .workloads import Workload

__all__ = ["heading", "legend", "table", "write_json"]


def heading(
    device: torch.device, contenders: Sequence[Contender], ops: Collection[str], *, chosen: bool = False
) -> RenderableType:
    """Where it runs, and who takes part with which version; who is absent, and why.

    Args:
        device: where it runs.
        contenders: all that could take part.
        ops: what is run; those who have none of it are left out, unless they were chosen by name.
        chosen: were the contenders chosen by name?
    """
    present = Table.grid(padding=(0, 2))
    for contender in contenders:
        if chosen or not contender.ops or set(contender.ops) & set(ops):
            present.add_row(contender.name, Text(contender.presence()), style="dim")
    return Group(
        Text("fastloss bench", style="bold"), Text(machine.description(device), style="dim"), Text(), present, Text()
    )


def table(workload: Workload, rows: Sequence[Row]) -> RenderableType:
    """One workload's contenders, the fastest first, then those that have no time, with the reason."""
    parts: list[RenderableType] = [Text(_title(workload), style="bold")]
    timed = sorted((row for row in rows if row.timed), key=lambda row: row.milliseconds or 0.0)
    if timed:
        parts.append(_timed(timed, workload.op))
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
    """What the columns are; and how busy others kept the machine, if they did."""
    words = (
        "ms: median of interleaved turns, of one call. GB/s: the bytes that must move, whatever a contender moves, "
        "over its time; of a copy: that over the bandwidth of a copy in the same turns. peak: bytes of tensors "
        "beyond the inputs. ratio: fastloss's time over this contender's, so below 1 fastloss is faster. Everybody "
        "was checked against float64 first; who is wrong has no time."
    )
    if any(row.host_milliseconds is not None for row in rows):
        words += (
            " On a GPU ms is its own time, taken while it has so much to do that it never waits for the host, as in "
            "training; host ms: until the call returns."
        )
    if any(row.op == "linear" and row.timed for row in rows):
        words += (
            " linear: Tflop/s counts the operations of three bare products of matrices, which take turns with the "
            "others; of the products: its time over theirs; peak: beyond inputs and gradients."
        )
    if device.type == "cpu" and any(row.op == "sgd" and row.timed for row in rows):
        words += (
            " On a CPU a step of SGD may be above 100 % of a copy: the memory that a copy writes to is "
            "read first, which is not counted, and small tensors stay in the caches."
        )
    busiest = max((row.others_share or 0.0 for row in rows), default=0.0)
    if busiest >= NOTABLE_SHARE:
        words += f" Other programs took up to {busiest:.0%} of the CPUs."
    return notes(words, above=1)


def write_json(path: Path | None, device: torch.device, rows: Sequence[Row], *, finished: bool) -> None:
    """All rows so far, in one step, so that the file is whole whenever the run ends."""
    if path is None:
        return
    record = {
        "fastloss": fastloss.__version__,
        "torch": torch.__version__,
        "device": machine.description(device),
        "finished": finished,
        "rows": [row.as_dict() for row in rows],
    }
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def _title(workload: Workload) -> str:
    n, v, d = workload.shape
    if workload.op == "linear":
        size = f"{n} {TIMES} {d} \N{RIGHTWARDS ARROW} {v}"
        return f"linear, {size}, {workload.dtype_name}: {workload.operations / 1e12:.3g} Tflop must be done"
    parts = [workload.op, f"{n} {TIMES} {v}", workload.dtype_name]
    if workload.op != "sgd":
        parts.append("class probabilities" if workload.soft else "class indices")
    title = ", ".join(parts)
    if workload.op == "host":
        return f"{title}: until the call returns"
    return f"{title}: {bytes_in_words(workload.moved_bytes)} must move"


class _Column(NamedTuple):
    heading: str
    cell: Callable[[Row], str]
    limit: str = ""  # the cell of the limit's row


def _timed(rows: Sequence[Row], op: str) -> Table:
    """Return the contenders' numbers, and those of the limit that took turns with them."""
    ours = next((row for row in rows if row.contender == OURS), None)
    first = rows[0]
    columns = [_Column("contender", lambda row: row.contender, "three products" if op == "linear" else "a copy")]
    bare, copied = first.products_milliseconds, first.copy_gigabytes_per_second
    columns += [_Column("ms", lambda row: f"{row.milliseconds:.4f}", f"{bare:.4f}" if bare else "")]
    if any(row.host_milliseconds is not None for row in rows):
        columns += [_Column("host ms", lambda row: f"{row.host_milliseconds or 0.0:.4f}")]
    if op == "linear":
        speed = (first.teraflops or 0.0) * (first.times_products or 0.0)
        columns += [_Column("Tflop/s", lambda row: f"{row.teraflops or 0.0:.4g}", f"{speed:.4g}")]
        columns += [_Column("of the products", lambda row: f"{row.times_products or 0.0:.3f}", "1.000")]
    elif op != "host":
        columns += [_Column("GB/s", lambda row: f"{row.gigabytes_per_second or 0.0:.2f}", f"{copied or 0.0:.2f}")]
        columns += [_Column("of a copy", lambda row: f"{row.share_of_copy or 0.0:.0%}", "100%")]
    if op != "host":
        columns += [_Column("peak", lambda row: bytes_in_words(max(0, row.peak_bytes or 0)))]
    columns += [_Column("ratio", lambda row: f"{ours.ratios[row.contender]:.3f}" if ours and row is not ours else "")]
    result = plain_table("", *(column.heading for column in columns))
    for row in rows:
        result.add_row(*(column.cell(row) for column in columns), style="cyan" if row is ours else "")
    if bare or copied:
        result.add_row(*(column.limit for column in columns), style="dim")
    return result
