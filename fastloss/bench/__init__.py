"""``python -m fastloss bench``: every contender beside the others and beside the bandwidth of a copy.

Every number is measured in the run that prints it. The modules, in the order in which they are used:

- :mod:`.workloads`: operations, shapes, inputs, and the bytes that must move;
- :mod:`.measure`: the check against float64, turns, medians, peak memory, and a row for each contender;
- :mod:`.report`, :mod:`.plot`: the tables, the JSON and the PNG.

``pytest benchmarks --benchmark-only``, in a clone, runs the same workloads and contenders under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..measuring.machine import missing

if TYPE_CHECKING:
    from rich.console import Console

    from .measure import Row
    from .workloads import Shape, Workload

__all__ = ["Settings", "add_arguments", "missing_extras", "run", "settings_from"]

QUICK_OPS = ("forward+backward", "loss+accuracy", "accuracy", "linear", "sgd", "host")
SECONDS, QUICK_SECONDS = 2.0, 0.5  # of timing for each workload
INTERRUPTED = 130  # the exit code that a shell gives for Ctrl-C


@dataclass(frozen=True)
class Settings:
    """What is measured, where, and where the results go."""

    workloads: Sequence[Workload]
    device: torch.device
    contenders: Sequence[str] = ()  # by name; none: all that have the operation
    seconds: float = SECONDS
    seed: int = 0
    json: Path | None = None
    plot: Path | None = None


def missing_extras() -> list[str]:
    """Return the packages of ``fastloss[bench]`` that the command needs and that are not installed."""
    return missing("matplotlib", "psutil", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; :func:`settings_from` judges their values."""
    parser.add_argument("--op", action="append", metavar="OP", help="only this operation (may be given again)")
    parser.add_argument(
        "--dtype",
        action="append",
        metavar="DTYPE",
        help="of logits and parameters (may be given again; default: bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="NxV",
        help="N rows of V classes, NxDxV for linear, or for sgd N tensors of V elements (may be given again); "
        "alone: of the losses, or of linear",
    )
    parser.add_argument("--contender", action="append", metavar="NAME", help="only this one (may be given again)")
    parser.add_argument(
        "--target", default="hard", metavar="hard|soft", help="class indices or class probabilities (default: hard)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    parser.add_argument("--quick", action="store_true", help="few shapes, little time: under two minutes")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="SECONDS",
        help=f"of timing for each workload (default: {SECONDS}; {QUICK_SECONDS} with --quick)",
    )
    parser.add_argument("--json", metavar="PATH", help="write the rows there, after each workload")
    parser.add_argument("--plot", metavar="PATH", help="draw GB/s against V there, a PNG")


def settings_from(options: argparse.Namespace) -> Settings:
    """The options of :func:`add_arguments`, checked.

    Raises:
        ValueError: one is unknown or does not fit; the message, one line, lists what is known.
    """
    from ..measuring.contenders import CONTENDERS
    from .workloads import DTYPES, LOSS_OPS, OPS, TARGETS, fits, workloads

    device = _device(options.device)
    chosen: dict[str, list[str]] = {}  # each once
    for name, known in (("op", OPS), ("dtype", tuple(DTYPES)), ("contender", tuple(CONTENDERS))):
        chosen[name] = list(dict.fromkeys(getattr(options, name) or ()))
        for value in chosen[name]:
            _check_known(f"--{name}", value, known)
    _check_known("--target", options.target, TARGETS)
    ops = chosen["op"] or (QUICK_OPS if options.quick else OPS)
    if options.target != TARGETS[0] and not set(ops) & set(LOSS_OPS):
        raise ValueError(
            f"--target is {options.target!r}, and {' and '.join(ops)} has none; it is for the losses alone"
        )
    seconds = options.seconds
    if seconds is None:
        seconds = QUICK_SECONDS if options.quick else SECONDS
    if not 0 < seconds < math.inf:
        raise ValueError(f"--seconds is {seconds}; expected a positive number")
    size = "quick" if options.quick else "full"
    shapes = [_shape(text, ops, device) for text in options.shape or ()]
    if shapes and not options.op:
        ops = [op for op in (*LOSS_OPS, "linear") if any(fits(op, shape) for shape in shapes)]
    for text, shape in zip(options.shape or (), shapes, strict=True):
        if not any(fits(op, shape) for op in ops):
            raise _unfit_shape(text, ops, device)
    for op in ops if shapes else ():
        if not any(fits(op, shape) for shape in shapes):
            raise _unfit_shape(options.shape[0], [op], device)
    dtypes = chosen["dtype"] or ["bfloat16" if device.type == "cuda" else "float32"]
    json, plot = _writable("--json", options.json), _writable("--plot", options.plot, ".png")
    if json is not None and json == plot:
        raise ValueError(f"--plot is {str(plot)!r}, and --json too; expected two files")
    return Settings(
        workloads(ops, dtypes, [options.target], device, shapes=shapes, size=size),
        device,
        chosen["contender"],
        seconds,
        json=json,
        plot=plot,
    )


def run(settings: Settings) -> int:
    """Measure, print, write, draw.

    Returns:
        The exit code: 1 if fastloss was wrong or failed anywhere, 130 if the run was interrupted, else 0. What was
        finished before an interruption is printed, written and drawn all the same.
    """
    from rich.console import Console

    from ..measuring import machine
    from ..measuring.contenders import CONTENDERS, OURS
    from . import plot, report

    console = Console()
    rows: list[Row] = []
    names = settings.contenders
    asked = [CONTENDERS[name] for name in names] if names else list(CONTENDERS.values())
    ops = {workload.op for workload in settings.workloads}
    interrupted = False
    try:
        console.print(report.heading(settings.device, asked, ops, chosen=bool(names)))
        _measure(settings, console, rows)
    except KeyboardInterrupt:
        interrupted = True
        console.print(f"Interrupted: {len(rows)} rows were finished.", highlight=False)
    report.write_json(settings.json, settings.device, rows, finished=not interrupted)
    console.print(report.legend(rows, settings.device))
    if not interrupted and not any(row.timed for row in rows):
        console.print("Nothing was timed.", highlight=False)
    if settings.plot is not None:
        drawn = plot.draw(rows, settings.plot, caption=machine.description(settings.device))
        words = f"The picture: {settings.plot}" if drawn else "No picture: nothing that moves bytes was timed."
        console.print(words, highlight=False, markup=False, soft_wrap=True)
    if interrupted:
        return INTERRUPTED
    return int(any(row.contender == OURS and row.status in ("wrong", "failed") for row in rows))


def _measure(settings: Settings, console: Console, rows: list[Row]) -> None:
    """Adds a workload's rows as it is finished."""
    from ..measuring.contenders import CONTENDERS, contenders_of
    from ..measuring.tables import progress_bar
    from . import report
    from .measure import measure

    with progress_bar(console) as bar:
        task = bar.add_task("", total=float(len(settings.workloads)))
        for done, workload in enumerate(settings.workloads):
            bar.update(task, completed=done, description=str(workload))

            def tell(share: float, done: int = done) -> None:
                bar.update(task, completed=done + share)

            names = settings.contenders
            contenders = [CONTENDERS[name] for name in names] if names else contenders_of(workload.op)
            new = measure(
                workload, contenders, settings.device, budget=settings.seconds, seed=settings.seed, progress=tell
            )
            rows += new
            report.write_json(settings.json, settings.device, rows, finished=False)
            console.print(report.table(workload, new))
        bar.update(task, completed=float(len(settings.workloads)), description="done")


def _check_known(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")


def _shape(text: str, ops: Sequence[str], device: torch.device) -> Shape:
    from .workloads import parse_shape

    try:
        return parse_shape(text)
    except ValueError:
        raise _unfit_shape(text, ops, device) from None


def _unfit_shape(text: str, ops: Sequence[str], device: torch.device) -> ValueError:
    from .workloads import default_shapes

    known = ", ".join(map(str, default_shapes(ops[0], device)))
    form = "NxDxV, three positive numbers" if ops[0] == "linear" else "NxV, two positive numbers"
    return ValueError(f"--shape is {text!r}; for {ops[0]} expected {form}; the default: {known}")


def _device(text: str | None) -> torch.device:
    found = torch.cuda.is_available()
    if text is None:
        return torch.device("cuda" if found else "cpu")
    known = ["cpu", *(["cuda"] if found else []), *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    _check_known("--device", text, known)
    return torch.device(text)


def _writable(name: str, text: str | None, suffix: str = "") -> Path | None:
    """Found out before the work, not after it."""
    if text is None:
        return None
    path = Path(text)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ValueError(f"{name} is {text!r}; expected a file in a folder that exists")
    if path.suffix.lower() != suffix and suffix:
        raise ValueError(f"{name} is {text!r}; expected a name that ends in {suffix}")
    return path
