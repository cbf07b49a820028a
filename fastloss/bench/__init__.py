"""``python -m fastloss bench``: every contender beside the others and beside the bandwidth of a copy.

Every number is measured in the run that prints it. The modules, in the order in which they are used:

- :mod:`.workloads`: operations, shapes, inputs, and the bytes that must move;
- :mod:`.measure`: the check against float64, turns, medians, peak memory, and a row for each contender;
- :mod:`.report`: the tables, the JSON and the PNG; it needs rich and matplotlib.

``pytest benchmarks --benchmark-only``, in a clone, runs the same workloads and contenders under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..measuring import machine
from ..measuring.contenders import CONTENDERS, DTYPES, LINEAR_OPS, LOSS_OPS, OPS, OURS, contenders_of
from . import measure
from .workloads import TARGETS, Shape, Workload, default_shapes, fits, parse_shape, workloads

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Settings", "add_arguments", "missing_extras", "run", "settings_from"]

QUICK_OPS = ("forward+backward", "loss+accuracy", "accuracy", "linear", "sgd", "host")
SECONDS, QUICK_SECONDS = 2.0, 0.5  # of timing for each workload
INTERRUPTED = 130  # the exit code that a shell gives for Ctrl-C

_SHAPE_HELP = (
    "N rows of V classes, NxDxV for linear and linear-..., or for sgd N tensors of V elements (may be given again); "
    "alone: of the losses, or of linear"
)
_DTYPE_HELP = "of logits and parameters (may be given again; default: bfloat16 on a GPU, float32 on a CPU)"
_SECONDS_HELP = f"of timing for each workload (default: {SECONDS}; {QUICK_SECONDS} with --quick)"
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "--op": {"action": "append", "metavar": "OP", "help": "only this operation (may be given again)"},
    "--dtype": {"action": "append", "metavar": "DTYPE", "help": _DTYPE_HELP},
    "--shape": {"action": "append", "metavar": "NxV", "help": _SHAPE_HELP},
    "--contender": {"action": "append", "metavar": "NAME", "help": "only this one (may be given again)"},
    "--target": {
        "default": "hard",
        "metavar": "hard|soft",
        "help": "class indices or class probabilities (default: hard)",
    },
    "--device": {"metavar": "DEVICE", "help": "cpu, cuda or cuda:1 (default: cuda where there is one)"},
    "--quick": {"action": "store_true", "help": "few shapes, little time: under two minutes"},
    "--seconds": {"type": float, "metavar": "SECONDS", "help": _SECONDS_HELP},
    "--json": {"metavar": "PATH", "help": "write the rows there, after each workload"},
    "--plot": {"metavar": "PATH", "help": "draw GB/s against V there, a PNG"},
}


class Settings(NamedTuple):
    """The workloads, the device, the contenders, and the files of the results."""

    workloads: Sequence[Workload]
    device: torch.device
    contenders: Sequence[str] = ()  # by name; none: all that have the operation
    seconds: float = SECONDS
    json: Path | None = None
    plot: Path | None = None


def missing_extras() -> list[str]:
    """Return the packages of ``fastloss[bench]`` that the command needs and that are not installed."""
    return machine.missing("matplotlib", "psutil", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command; :func:`settings_from` checks their values."""
    for name, options in _ARGUMENTS.items():
        parser.add_argument(name, **options)


def settings_from(options: argparse.Namespace) -> Settings:
    """Return the options of :func:`add_arguments`, checked.

    Raises:
        ValueError: one is unknown or does not fit; the message, one line, lists the known values.
    """
    device, target = _device(options.device), options.target
    texts: list[str] = options.shape or []
    chosen: dict[str, list[str]] = {}  # each once
    for name, known in {"op": OPS, "dtype": tuple(DTYPES), "contender": tuple(CONTENDERS)}.items():
        chosen[name] = list(dict.fromkeys(getattr(options, name) or ()))
        for value in chosen[name]:
            _check_known(f"--{name}", value, known)
    _check_known("--target", target, TARGETS)
    ops = chosen["op"] or list(QUICK_OPS if options.quick else OPS)
    if target != TARGETS[0] and not set(ops) & set(LOSS_OPS):
        raise ValueError(f"--target is {target!r}, and {' and '.join(ops)} has none; it is for the losses alone")
    seconds = (QUICK_SECONDS if options.quick else SECONDS) if options.seconds is None else options.seconds
    if not 0 < seconds < math.inf:
        raise ValueError(f"--seconds is {seconds}; expected a positive number")
    shapes = [_shape(text, ops, device) for text in texts]
    if shapes and not options.op:
        ops = [op for op in (*LOSS_OPS, "linear") if any(fits(op, shape) for shape in shapes)]
    for text, shape in zip(texts, shapes, strict=True):
        if not any(fits(op, shape) for op in ops):
            raise _unfit_shape(text, ops[0], device)
    for op in ops if shapes else ():
        if not any(fits(op, shape) for shape in shapes):
            raise _unfit_shape(texts[0], op, device)
    dtypes = chosen["dtype"] or ["bfloat16" if device.type == "cuda" else "float32"]
    json = _writable("--json", options.json)
    plot = _writable("--plot", options.plot, ".png")
    if json is not None and json == plot:
        raise ValueError(f"--plot is {str(plot)!r}, and --json too; expected two files")
    size = "quick" if options.quick else "full"
    wanted = workloads(ops, dtypes, [target], device, shapes=shapes, size=size)
    return Settings(wanted, device, chosen["contender"], seconds, json=json, plot=plot)


def run(settings: Settings) -> int:
    """Measure, print, write, draw.

    Returns:
        The exit code: 1 if fastloss was wrong or failed anywhere, 130 if the run was interrupted, else 0. Rows
        that were finished before an interruption are printed, written and drawn all the same.
    """
    from rich.console import Console

    from . import report

    console, device, names = Console(), settings.device, settings.contenders
    rows: list[measure.Row] = []
    contenders = [CONTENDERS[name] for name in names or CONTENDERS]
    ops = {workload.op for workload in settings.workloads}
    interrupted = False
    try:
        console.print(report.heading(device, contenders, ops, chosen=bool(names)))
        _measure(settings, console, rows)
    except KeyboardInterrupt:
        interrupted = True
        console.print(f"Interrupted: {len(rows)} rows were finished.", highlight=False)
    report.write_json(settings.json, device, rows, finished=not interrupted)
    console.print(report.legend(rows, device))
    if not interrupted and not any(row.timed for row in rows):
        console.print("Nothing was timed.", highlight=False)
    if settings.plot is not None:
        drawn = report.draw(rows, settings.plot, caption=machine.description(device))
        words = f"The picture: {settings.plot}" if drawn else "No picture: nothing that moves bytes was timed."
        console.print(words, highlight=False, markup=False, soft_wrap=True)
    if interrupted:
        return INTERRUPTED
    return int(any(row.contender == OURS and row.status in ("wrong", "failed") for row in rows))


def _measure(settings: Settings, console: Console, rows: list[measure.Row]) -> None:
    """Add a workload's rows when it is finished."""
    from ..measuring.style import progress_bar
    from . import report

    names, device = settings.contenders, settings.device
    with progress_bar(console) as bar:
        task = bar.add_task("", total=float(len(settings.workloads)))
        for done, workload in enumerate(settings.workloads):
            bar.update(task, completed=done, description=str(workload))
            contenders = [CONTENDERS[name] for name in names] if names else contenders_of(workload.op)

            def progress(share: float, done: int = done) -> None:
                bar.update(task, completed=done + share)

            new = measure.measure(workload, contenders, device, budget=settings.seconds, progress=progress)
            rows += new
            report.write_json(settings.json, device, rows, finished=False)
            console.print(report.table(workload, new))
        bar.update(task, completed=float(len(settings.workloads)), description="done")


def _check_known(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")


def _shape(text: str, ops: Sequence[str], device: torch.device) -> Shape:
    try:
        return parse_shape(text)
    except ValueError:
        raise _unfit_shape(text, ops[0], device) from None


def _unfit_shape(text: str, op: str, device: torch.device) -> ValueError:
    known = ", ".join(map(str, default_shapes(op, device)))
    form = "NxDxV, three positive numbers" if op in LINEAR_OPS else "NxV, two positive numbers"
    return ValueError(f"--shape is {text!r}; for {op} expected {form}; the default: {known}")


def _device(text: str | None) -> torch.device:
    gpus = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    name = text or (gpus or ["cpu"])[0]
    _check_known("--device", name, ["cpu", *gpus])
    return torch.device(name)


def _writable(name: str, text: str | None, suffix: str = "") -> Path | None:
    """Check before the work that a file can be written after it."""
    if text is None:
        return None
    path = Path(text)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ValueError(f"{name} is {text!r}; expected a file in a folder that exists")
    if suffix and path.suffix.lower() != suffix:
        raise ValueError(f"{name} is {text!r}; expected a name that ends in {suffix}")
    return path
