"""What was measured, as tables for the terminal and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import fastloss

from ..demo.loss_at_scale import TIMES
from ..demo.report import bytes_in_words, machine, plain_table, progress
from .contenders import OURS, Contender
from .measure import Row
from .workloads import Workload

__all__ = ["heading", "legend", "machine", "progress", "table", "write_json"]

NOTABLE_SHARE = 0.1  # of the CPUs: where less goes to other programs, nothing is said


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
            present.add_row(contender.name, Text(presence(contender)), style="dim")
    return Group(Text("fastloss bench", style="bold"), Text(machine(device), style="dim"), Text(), present, Text())


def presence(contender: Contender) -> str:
    """Its version and what to know of its numbers, or why it is absent; and what it can't do."""
    absence = contender.absence()
    there = [f"{contender.distribution} {contender.version()}", contender.note]
    return "; ".join(filter(None, [*([f"absent: {absence}"] if absence else there), contender.unfit]))


def table(workload: Workload, rows: Sequence[Row]) -> RenderableType:
    """One workload's contenders, the fastest first, then those that have no time, with the reason."""
    parts: list[RenderableType] = [Text(_title(workload), style="bold")]
    timed = sorted((row for row in rows if row.timed), key=lambda row: row.milliseconds or 0.0)
    if timed:
        is_linear = workload.op == "linear"
        parts.append(_timed_linear(timed) if is_linear else _timed(timed, is_host=workload.op == "host"))
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
    return Padding(Text(words, style="dim"), (1, 0, 1, 0))


def write_json(path: Path | None, device: torch.device, rows: Sequence[Row], *, finished: bool) -> None:
    """All rows so far, in one step, so that the file is whole whenever the run ends."""
    if path is None:
        return
    record = {
        "fastloss": fastloss.__version__,
        "torch": torch.__version__,
        "device": machine(device),
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


def _timed(rows: Sequence[Row], *, is_host: bool) -> Table:
    """Those that have a time, and the copy that they took turns with."""
    host = _host_column(rows)
    columns = ["contender", "ms", *host, *([] if is_host else ["GB/s", "of a copy", "peak"]), "ratio"]
    result = plain_table("", *columns)
    ours = next((row for row in rows if row.contender == OURS), None)
    for row in rows:
        speed, share, peak = row.gigabytes_per_second, row.share_of_copy, row.peak_bytes
        cells = _times(row, host)
        if not is_host:
            cells += [f"{speed or 0.0:.2f}", f"{share or 0.0:.0%}", bytes_in_words(peak or 0)]
        ratio = f"{ours.ratios[row.contender]:.3f}" if ours is not None and row is not ours else ""
        result.add_row(*cells, ratio, style="cyan" if row is ours else "")
    copied = rows[0].copy_gigabytes_per_second
    if copied is not None:
        result.add_row("a copy", "", *("" for _ in host), f"{copied:.2f}", "100%", "", "", style="dim")
    return result


def _timed_linear(rows: Sequence[Row]) -> Table:
    """Those that have a time, and the three products that they took turns with."""
    host = _host_column(rows)
    result = plain_table("", "contender", "ms", *host, "Tflop/s", "of the products", "peak", "ratio")
    ours = next((row for row in rows if row.contender == OURS), None)
    for row in rows:
        ratio = f"{ours.ratios[row.contender]:.3f}" if ours is not None and row is not ours else ""
        cells = [*_times(row, host), f"{row.teraflops or 0.0:.4g}"]
        cells += [f"{row.times_products or 0.0:.3f}", bytes_in_words(max(0, row.peak_bytes or 0)), ratio]
        result.add_row(*cells, style="cyan" if row is ours else "")
    bare = rows[0].products_milliseconds
    if bare:
        speed = (rows[0].teraflops or 0.0) * (rows[0].times_products or 0.0)
        times = [f"{bare:.4f}", *("" for _ in host)]
        result.add_row("three products", *times, f"{speed:.4g}", "1.000", "", "", style="dim")
    return result


def _host_column(rows: Sequence[Row]) -> list[str]:
    """Its name, where the host's time is known."""
    return ["host ms"] if any(row.host_milliseconds is not None for row in rows) else []


def _times(row: Row, host: Sequence[str]) -> list[str]:
    return [row.contender, f"{row.milliseconds:.4f}", *(f"{row.host_milliseconds or 0.0:.4f}" for _ in host)]
