"""The options, bars, tables and records of the programs."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastloss
from fastloss.measuring.contenders import DTYPES
from fastloss.measuring.info import processor
from fastloss.measuring.machine import OtherPrograms, description

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def parser_of(
    name: str, doc: str | None, *, seconds: float, each: str, device: bool = True, output: bool = False
) -> argparse.ArgumentParser:
    """Return a parser for ``python -m benchmarks.NAME``: ``--seconds`` for ``each``, a device, a record's file."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=seconds, help=f"time for each {each} (default: %(default)s)")
    if device:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="(default here: %(default)s)")
    if output:
        parser.add_argument("--output", type=Path, help="write a record there, in Markdown")
    return parser


def parsed_by(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and refuse values that no program can work with."""
    options = parser.parse_args(arguments)
    for name, least in (("seconds", 0), ("block", 1), ("scale", 1)):
        value = getattr(options, name, least)
        if not least <= value < math.inf:
            parser.error(f"--{name} is {value}; expected {least} or more")
    if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        parser.error("--device is 'cuda', and torch finds no GPU here")
    output = getattr(options, "output", None)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        parser.error(f"--output is {str(output)!r}; expected a file in a folder that exists")
    return options


def compare_products(
    name: str,
    doc: str | None,
    arguments: list[str] | None,
    title: str,
    shapes: Mapping[str, Sequence[Any]],
    compare: Callable[..., Iterable[str]],
) -> int:
    """Run a benchmark of a head's products, (N, D) → V, in bfloat16 on a GPU; exit code 1 if a bar is missed.

    Args:
        title: of the record.
        shapes: (N, D, V), of each kind of device.
        compare: (shape, dtype, device, seconds, bars=True or False) → lines.
    """
    parser = parser_of(name, doc, seconds=60.0, each="shape", output=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "V"), help="rows, features, classes")
    options = parsed_by(parser, arguments)
    if min(options.shape or [1]) < 1:
        parser.error(f"--shape is {options.shape}; expected three numbers of at least 1")
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    report = Report(name, arguments, f"{torch.get_num_threads()} threads", options.device)
    for shape in [tuple(options.shape)] if options.shape else shapes[device.type]:
        report.say(*compare(shape, dtype, device, options.seconds, bars=not options.shape))
    code = report.close()
    words = "Medians of interleaved turns in one process; memory is what is held beyond inputs and gradients."
    report.write(options.output, title, device, words)
    return code


def name_of(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def verdict(value: float, bar: float | None) -> str:
    """Say what the bar is and whether the value meets it; nothing without a bar."""
    return "" if bar is None else f"≤ {bar:.2f} {'ok' if value <= bar else 'MISSED'}"


def header(*details: str) -> str:
    """Return the first line of a program's output."""
    return ", ".join([f"fastloss {fastloss.__version__}", f"torch {torch.__version__}", *details])


def refuse(name: str, words: str) -> int:
    """Print why ``python -m benchmarks.NAME`` can't begin; return its exit code."""
    print(f"benchmarks.{name}: {words}", file=sys.stderr)
    return 2


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    first, *others = ("| " + " ".join(f"{cell} |".lstrip() for cell in cells) for cells in (head, *rows))
    return [first, f"|{'---|' * len(head)}", *others]


class Report:
    """The lines that ``python -m benchmarks.NAME`` prints, which ``--output`` writes as a record."""

    def __init__(self, name: str, arguments: Sequence[str] | None, *details: str) -> None:
        self._name, self._arguments = name, sys.argv[1:] if arguments is None else arguments
        self._lines: list[str] = []
        self.say(header(*details))
        self._others = OtherPrograms()

    def say(self, *lines: object) -> None:
        """Print lines."""
        self._lines += map(str, lines)
        print(*lines, sep="\n", flush=True)

    def close(self, more: str = "") -> int:
        """Print the number of missed bars, which the lines say, and ``more``; return the exit code."""
        missed = sum(line.count("MISSED") for line in self._lines)
        self.say(f"{missed} bars missed; {more}others used {self._others.share():.0%} of the CPU time")
        return int(missed > 0 or bool(more))

    def write(self, path: Path | None, title: str, device: torch.device, words: str) -> None:
        """Write how the lines were made, and the lines. The record does not say where it lies."""
        if path is None:
            return
        shown, remaining = [], iter(self._arguments)
        for argument in remaining:
            if argument == "--output":
                next(remaining)
            elif not argument.startswith("--output="):
                shown.append(argument)
        command = shlex.join(["python", "-m", f"benchmarks.{self._name}", *shown])
        text = [f"# {title}", "", f"`{command}` {circumstances(device)}. {words}", "", "```", *self._lines, "```", ""]
        path.write_text("\n".join(text), encoding="utf-8")


def circumstances(device: torch.device) -> str:
    """Name the code and the machine that a record was made with."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = f"commit {git('rev-parse', '--short', 'HEAD')}"
        sources = ("fastloss", "kernels", "benchmarks", ":!benchmarks/results")
        commit += " and changes" if git("status", "--porcelain", "--", *sources) else ""
    except (OSError, subprocess.CalledProcessError):
        commit = "an unknown commit"
    cores = f"{os.cpu_count()} cores" + (f" of {processor()}" if device.type == "cuda" else "")
    return f"at {commit}, {datetime.date.today()}, on {cores}, {description(device)}"
