"""A GPU's record in one command: ``python -m benchmarks.record``.

Inside eight minutes it runs the tests that wait for a GPU, a memory checker over a few of them where one is
installed, and the chosen shapes with every contender. It writes ``benchmarks/results/<gpu>-<date>.json`` and ``.md``
anew after each part, so that an interrupted run keeps the parts that it has finished. ``python -m benchmarks.tables``
puts the newest record into README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastloss.bench.measure import COLUMNS, Row, measure
from fastloss.bench.workloads import Shape, Workload
from fastloss.measuring import info
from fastloss.measuring.clock import Step, medians
from fastloss.measuring.contenders import LOSS_OPS, contenders_of, eager, ours
from fastloss.measuring.inputs import loss_inputs
from fastloss.measuring.machine import captured, first_line
from fastloss.measuring.reference import operation

from .shared import ROOT, circumstances, markdown, refuse

MINUTES = 8.0
# Of the time, at most: the tests, the memory checker; the rest is the measurements'.
_TESTS_SHARE, _CHECKER_SHARE = 0.35, 0.15
# Tests for the memory checker: of the loss and the accuracy, and of SGD.
CHECKED = ("labels_out_of_range", "layouts_sizes_and_offsets", "gradients_change_their_layout")
CHECKERS = ("compute-sanitizer",)
_CHECKER_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")  # beside those of PATH
_LAST_WORDS = 15.0  # seconds that interrupted tests have to print their failures

LANGUAGE = tuple(Shape((1 << 28) // v // 64 * 64 + 64, v) for v in (32000, 50257, 128256, 262144))  # N·V ≥ 2²⁸
VISION = tuple(Shape(4096, c) for c in (10, 100, 1000))
HEAD = Shape(8192, 128256, 4096)
OPTIMIZER = (Shape(161, 158740), Shape(12, 4194304), Shape(2000, 256))
_TINY = (Shape(64, 10), Shape(32, 9000))
_TINY_HEAD = Shape(300, 9000, 16)
_IN_GRAPHS = ("fastloss in a graph", "torch in a graph", "fastloss", "torch")


@dataclass
class Record:
    """The results so far."""

    device: str
    circumstances: str
    versions: dict[str, str]
    contenders: dict[str, str]  # versions, or why they are absent
    tests: dict[str, Any] = field(default_factory=dict)
    memory_checker: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    graphs: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # workloads that there was no time for
    finished: bool = False

    @property
    def is_good(self) -> bool:
        """Return True if every part was finished and fastloss was wrong in none."""
        codes = [part.get("exit_code", 0) for part in (self.tests, self.memory_checker)]
        wrong = [row for row in self.rows if row.contender == "fastloss" and row.status in ("wrong", "failed")]
        errors = [graph for graph in self.graphs if "error" in graph]
        return self.finished and not wrong and not errors and all(code in (0, 5) for code in codes)  # 5: no test

    def write(self, path: Path) -> None:
        """Write JSON, and Markdown beside it."""
        record = {**vars(self), "rows": [asdict(row) for row in self.rows]}
        path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """Return how the record was made, and its tables."""
        lines = [f"# {self.device}", "", f"`python -m benchmarks.record` {self.circumstances}.", ""]
        lines += [f"- {name}: {version}" for name, version in {**self.versions, **self.contenders}.items()]
        for name, part in (("tests", self.tests), ("memory checker", self.memory_checker)):
            lines += [f"- {name}: {part.get('summary', 'not reached')}"]
            lines += [f"  - {failure}" for failure in part.get("failures", ())]
        lines += [f"- no time was left for {', '.join(self.left_out)}"] if self.left_out else []
        lines += [] if self.finished else ["- the run was not finished"]
        shown = [row for row in self.rows if row.status not in ("absent", "unfit")]
        tables = [(["", "shape", "dtype", "contender", *COLUMNS], list(map(_cells, shown)))]
        times = [f"{name}, ms" for name in _IN_GRAPHS]
        head = ["loss, accuracy, gradient, float32", *times, "the first over the last"]
        tables += [(head, list(map(_cells_of_graph, self.graphs)))] if self.graphs else []
        for head, rows in tables:
            lines += ["", *markdown(head, [[cell.replace("|", "/") for cell in cells] for cells in rows])]
        return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    cells = row.cells() if row.timed else {"ms": f"{row.status}: {row.reason}"}
    return [row.op, row.shape, row.dtype, row.contender, *(cells.get(head, "") for head in COLUMNS)]


def _cells_of_graph(graph: dict[str, Any]) -> list[str]:
    if "error" in graph:
        return [graph["shape"], graph["error"], *[""] * len(_IN_GRAPHS)]
    times = [graph[name] for name in _IN_GRAPHS]
    cells = [time if isinstance(time, str) else f"{time:.4f}" for time in times]
    return [graph["shape"], *cells, f"{times[0] / times[-1]:.3f}"]


def workloads(device: torch.device) -> list[Workload]:
    """Return the shapes of the bars, most important first: an interruption leaves out the last ones."""
    narrow, wide = torch.bfloat16, torch.float32
    if device.type != "cuda":
        chosen = [Workload(op, shape, wide) for op in (*LOSS_OPS, "sgd") for shape in _TINY]
        return [*chosen, Workload("linear", _TINY_HEAD, wide)]
    groups: list[tuple[str, Sequence[Shape], torch.dtype]] = [
        ("forward+backward", LANGUAGE, narrow),
        ("sgd", OPTIMIZER, wide),
        ("linear", [HEAD], narrow),
        ("forward", LANGUAGE, narrow),
        ("loss+accuracy", LANGUAGE, narrow),
        ("loss+accuracy", VISION, wide),
        ("accuracy", [LANGUAGE[2]], narrow),
    ]
    chosen = [Workload(op, shape, dtype) for op, shapes, dtype in groups for shape in shapes]
    soft = Workload("forward+backward", LANGUAGE[2], narrow, "soft")
    return [*chosen, soft, Workload("host", Shape(64, 1000), wide)]


def gpu_tests() -> list[str]:
    """Return the files with tests that wait for a GPU; to collect the others takes longer than to run these."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def run_tests(seconds: float, *, python: Sequence[str] = (sys.executable,), only: str = "") -> dict[str, Any]:
    """Return pytest's last line, its exit code and the failures; all of its output stays in a temporary file.

    Compiling the kernels takes most of the time: where pytest-xdist is installed, several processes share it.
    """
    command = [*python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *(["-k", only] if only else [])]
    if importlib.util.find_spec("xdist") is not None and len(python) == 1:
        command += ["-n", str(max(1, min(14, (os.cpu_count() or 2) - 2))), "--dist", "worksteal"]
    command += gpu_tests()
    start, code = time.monotonic(), None
    with tempfile.NamedTemporaryFile(prefix="fastloss-tests-", suffix=".log", delete=False) as log:
        # In a session of its own, so that all processes that it starts can be ended with it.
        tests = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = tests.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            tests.send_signal(signal.SIGINT)  # it still prints the failures so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                tests.wait(_LAST_WORDS)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # none is left
                os.killpg(tests.pid, signal.SIGKILL)
            tests.wait()
    print(f"what the tests printed: {log.name}", flush=True)
    lines = Path(log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    last = lines[-1].strip("= ")
    return {
        "command": " ".join([Path(command[0]).name, *command[1:]]),
        "exit_code": code,
        "summary": last if code is not None else f"not finished after {time.monotonic() - start:.0f} s: {last}",
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }


def check_memory(seconds: float) -> dict[str, Any]:
    """Run a few of the tests under a memory checker, where one is installed."""
    folders = os.pathsep.join(filter(None, (os.environ.get("PATH"), *_CHECKER_FOLDERS)))
    installed = list(filter(None, (shutil.which(name, path=folders) for name in CHECKERS)))
    if not installed:
        return {"summary": f"none is installed ({', '.join(CHECKERS)})"}
    checker = [installed[0], "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    return run_tests(seconds, python=[*checker, sys.executable], only=" or ".join(CHECKED))


def contest_of_graphs(shape: Shape, device: torch.device) -> list[Step]:
    """Return calls by fastloss and by eager PyTorch: the loss, its gradient, and top-1 and top-5 accuracy."""
    inputs = loss_inputs(shape.rows, shape.classes, torch.float32, device, seed=0)
    return [partial(operation(functions(), "loss+accuracy"), *inputs) for functions in (ours, eager)]


def under_a_graph(shape: Shape, device: torch.device, seconds: float) -> dict[str, Any]:
    """Return the milliseconds of both, from a CUDA graph and without one, or why PyTorch has no graph."""
    result: dict[str, Any] = {"shape": str(shape)}
    try:
        fast, plain = contest_of_graphs(shape, device)
        calls = {"fastloss in a graph": captured(fast).replay, "fastloss": fast, "torch": plain}
        try:
            calls["torch in a graph"] = captured(plain).replay
        except Exception as error:
            result["torch in a graph"] = first_line(error)
        times = medians(list(calls.values()), device, budget=seconds, block=20)
    except Exception as error:
        return {"shape": str(shape), "error": first_line(error)}
    return result | {name: 1e3 * time for name, time in zip(calls, times, strict=True)}


def _versions(device: torch.device) -> dict[str, str]:
    versions = dict(info.facts())
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
            versions["driver"] = subprocess.check_output(query, text=True, timeout=30).split()[0]
    return versions


def _make(record: Record, device: torch.device, options: argparse.Namespace) -> Iterator[str]:
    """Add to the record; after each part, yield what is printed of it."""
    seconds = 60 * options.minutes
    end = time.monotonic() + seconds
    if options.no_tests:
        record.tests = record.memory_checker = {"summary": "left out (--no-tests)"}
    else:
        record.tests = run_tests(seconds * _TESTS_SHARE)
        yield "\n".join([f"tests: {record.tests['summary']}", *record.tests["failures"]])
        left_out = {"summary": "left out (--no-checker)"}
        record.memory_checker = left_out if options.no_checker else check_memory(seconds * _CHECKER_SHARE)
        yield f"memory checker: {record.memory_checker['summary']}"
    for shape in VISION if device.type == "cuda" else ():
        record.graphs.append(under_a_graph(shape, device, 2.0))
        yield f"under a CUDA graph: {record.graphs[-1]}"
    chosen = workloads(device)
    for done, workload in enumerate(chosen):
        left = end - time.monotonic()
        if left < 0:
            record.left_out = [str(each) for each in chosen[done:]]
            yield f"out of time: {len(record.left_out)} workloads are left out"
            return
        new = measure(workload, contenders_of(workload.op), device, budget=left / (len(chosen) - done) / 4)
        record.rows += new
        timed = [f"{row.contender} {row.milliseconds:.3f} ms" for row in new if row.timed]
        yield f"{workload}: {', '.join(timed) or 'nothing timed'}"
    record.finished = True


def main(arguments: list[str] | None = None) -> int:
    """Make the record; exit code 1 if a part of it failed or was cut off, 2 without a GPU, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    devices = ("cuda", "cpu")
    parser.add_argument("--device", default="cuda", choices=devices, help="cpu: tiny shapes, to try the command")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="the folder")
    parser.add_argument("--no-tests", action="store_true", help="measurements alone")
    parser.add_argument("--no-checker", action="store_true", help="tests, but none under a memory checker")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        return refuse("record", "needs a GPU, and torch finds none (--device cpu tries the command)")
    if not 0 <= options.minutes < math.inf:
        return refuse("record", f"--minutes is {options.minutes}; expected 0 or more")
    if not options.output.is_dir():
        return refuse("record", f"--output is {str(options.output)!r}; expected a folder that exists")
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")  # nvidia-h100-80gb-hbm3-2026-01-31
    path = options.output / f"{slug}-{datetime.date.today()}.json"
    contenders = {each.name: each.presence() for workload in workloads(device) for each in contenders_of(workload.op)}
    record = Record(name, circumstances(device), _versions(device), contenders)
    try:
        for words in _make(record, device, options):
            record.write(path)
            print(words, flush=True)
    except KeyboardInterrupt:
        record.write(path)
        print(f"interrupted; what was finished is in {path}")
        return 130
    record.write(path)
    onward = "; python -m benchmarks.tables puts it into README.md" if device.type == "cuda" else ""
    print(f"written: {path} and {path.with_suffix('.md').name}{onward}")
    return int(not record.is_good)


if __name__ == "__main__":
    sys.exit(main())
