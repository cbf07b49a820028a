"""A GPU's record in one command: ``python -m benchmarks.record``.

Inside eight minutes it runs the tests that wait for a GPU, a memory checker over a few of them where one is
installed, and the suite's chosen shapes with every contender; it writes ``benchmarks/results/<gpu>-<date>.json`` and
``.md``, after each part anew, so that an interrupted run keeps what it has finished. ``python -m benchmarks.tables``
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.backends import choice
from fastloss.bench.measure import Row, measure
from fastloss.bench.workloads import LOSS_OPS, Shape, Workload
from fastloss.measuring.contenders import contenders_of
from fastloss.measuring.machine import first_line

from .measure import ROOT, by_events, captured, circumstances, medians

MINUTES = 8.0
# Of the time, at most: the tests, the memory checker; the rest is the measurements'.
_TESTS_SHARE, _CHECKER_SHARE = 0.35, 0.15
# Tests for the memory checker: of the loss and the accuracy, and of SGD.
CHECKED = ("labels_out_of_range", "layouts_sizes_and_offsets", "gradients_change_their_layout")
CHECKERS = ("compute-sanitizer",)
_CHECKER_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")  # beside those of PATH
_LAST_WORDS = 15.0  # seconds that interrupted tests have to say what they know

LANGUAGE = tuple(Shape((1 << 28) // v // 64 * 64 + 64, v) for v in (32000, 50257, 128256, 262144))  # N·V ≥ 2²⁸
VISION = tuple(Shape(4096, c) for c in (10, 100, 1000))
HEAD = Shape(8192, 128256, 4096)
OPTIMIZER = (Shape(161, 158740), Shape(12, 4194304), Shape(2000, 256))
_TINY = (Shape(64, 10), Shape(32, 9000))
_TINY_HEAD = Shape(300, 9000, 16)


@dataclass
class Record:
    """What was found so far."""

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
        """Was every part finished, and nothing of fastloss's wrong?"""
        codes = [part.get("exit_code", 0) for part in (self.tests, self.memory_checker)]
        wrong = [row for row in self.rows if row.contender == "fastloss" and row.status in ("wrong", "failed")]
        errors = [graph for graph in self.graphs if "error" in graph]
        return self.finished and not wrong and not errors and all(code in (0, 5) for code in codes)  # 5: no test

    def write(self, path: Path) -> None:
        """As JSON, and as Markdown beside it."""
        found = {**vars(self), "rows": [row.as_dict() for row in self.rows]}
        path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """For people: how it was made, then a table."""
        lines = [f"# {self.device}", "", f"`python -m benchmarks.record` {self.circumstances}.", ""]
        lines += [f"- {name}: {version}" for name, version in {**self.versions, **self.contenders}.items()]
        for name, found in (("tests", self.tests), ("memory checker", self.memory_checker)):
            lines += [f"- {name}: {found.get('summary', 'not reached')}"]
            lines += [f"  - {failure}" for failure in found.get("failures", ())]
        lines += [f"- no time was left for {', '.join(self.left_out)}"] if self.left_out else []
        lines += [] if self.finished else ["- the run was not finished"]
        lines += [
            "",
            "| | shape | dtype | contender | ms | host, ms | GB/s | of a copy | peak, MB |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in self.rows if row.status not in ("absent", "unfit")]
        if self.graphs:
            names = ("fastloss in a graph", "torch in a graph", "fastloss", "torch")
            head = ["loss, accuracy, gradient, float32", *(f"{name}, ms" for name in names)]
            lines += ["", f"| {' | '.join([*head, 'the first over the last'])} |", f"|{'---|' * 6}"]
            for graph in self.graphs:
                if "error" in graph:
                    lines.append(f"| {graph['shape']} | {_in_a_cell(graph['error'])} | | | | |")
                    continue
                times = [_in_a_cell(graph[name]) for name in names]
                ratio = f"{graph[names[0]] / graph[names[-1]]:.3f}"
                lines.append(f"| {' | '.join([graph['shape'], *times, ratio])} |")
        return "\n".join(lines) + "\n"


def _in_a_cell(found: float | str) -> str:
    """A time, or why there is none."""
    return found.replace("|", "/") if isinstance(found, str) else f"{found:.4f}"


def _line(row: Row) -> str:
    cells = [row.op, row.shape, row.dtype, row.contender]
    if not row.timed:
        return f"| {' | '.join(cells)} | {row.status}: {_in_a_cell(row.reason)} | | | | |"
    speed, share, peak = row.gigabytes_per_second, row.share_of_copy, row.peak_bytes
    cells += [f"{row.milliseconds:.4f}", "" if row.host_milliseconds is None else f"{row.host_milliseconds:.4f}"]
    if row.teraflops is not None and row.times_products is not None:
        cells += [
            f"{row.teraflops:.4g} Tflop/s",
            f"{row.times_products:.3f} of 3 products",
        ]
        return f"| {' | '.join([*cells, '' if peak is None else f'{peak / 1e6:.1f}'])} |"
    cells += [
        "" if speed is None else f"{speed:.0f}",
        "" if share is None else f"{share:.0%}",
        "" if peak is None else f"{peak / 1e6:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def workloads(device: torch.device) -> list[Workload]:
    """The shapes of the bars, most important first: what an interruption leaves out is at the end."""
    if device.type != "cuda":
        chosen = [Workload(op, shape, torch.float32) for op in (*LOSS_OPS, "sgd") for shape in _TINY]
        return [*chosen, Workload("linear", _TINY_HEAD, torch.float32)]
    narrow, wide = torch.bfloat16, torch.float32
    chosen = [Workload("forward+backward", shape, narrow) for shape in LANGUAGE]
    chosen += [Workload("sgd", shape, wide) for shape in OPTIMIZER]
    chosen += [Workload("linear", HEAD, narrow)]
    chosen += [Workload("forward", shape, narrow) for shape in LANGUAGE]
    chosen += [Workload("loss+accuracy", shape, narrow) for shape in LANGUAGE]
    chosen += [Workload("loss+accuracy", shape, wide) for shape in VISION]
    chosen += [Workload("accuracy", LANGUAGE[2], narrow), Workload("forward+backward", LANGUAGE[2], narrow, "soft")]
    return [*chosen, Workload("host", Shape(64, 1000), wide)]


def gpu_tests() -> list[str]:
    """The files with tests that wait for a GPU: to collect the others takes longer than to run some of these."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def run_tests(seconds: float, *, python: Sequence[str] = (sys.executable,), only: str = "") -> dict[str, Any]:
    """pytest's last line, its exit code, and the failures; all of its output is in a temporary file.

    Compiling the kernels takes most of the time: where pytest-xdist is installed, several processes share it.
    """
    command = [*python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *(["-k", only] if only else [])]
    if importlib.util.find_spec("xdist") is not None and len(python) == 1:
        command += ["-n", str(max(1, min(14, (os.cpu_count() or 2) - 2))), "--dist", "worksteal"]
    command += gpu_tests()
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that all that it starts can be ended with it
    )
    finished = True
    try:
        output, _ = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        finished = False
        process.send_signal(signal.SIGINT)  # it still says what has failed so far
        try:
            output, _ = process.communicate(timeout=_LAST_WORDS)
        except subprocess.TimeoutExpired:
            _end(process)
            output, _ = process.communicate()
    finally:
        _end(process)
    with tempfile.NamedTemporaryFile("w", prefix="fastloss-tests-", suffix=".log", delete=False) as log:
        log.write(output)
        print(f"what the tests printed: {log.name}", flush=True)
    lines = output.strip().splitlines() or [""]
    took = f"{time.monotonic() - start:.0f} s"
    last = lines[-1].strip("= ")
    return {
        "command": " ".join([Path(command[0]).name, *command[1:]]),
        "exit_code": process.returncode if finished else None,
        "summary": last if finished else f"not finished after {took}: {last}",
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }


def _end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of its session, its workers too."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is
        os.killpg(process.pid, signal.SIGKILL)


def memory_checker() -> str | None:
    """Where one is installed."""
    folders = os.pathsep.join(filter(None, (os.environ.get("PATH"), *_CHECKER_FOLDERS)))
    return next(filter(None, (shutil.which(name, path=folders) for name in CHECKERS)), None)


def check_memory(seconds: float) -> dict[str, Any]:
    """A few of the tests under a memory checker."""
    found = memory_checker()
    if found is None:
        return {"summary": f"none is installed ({', '.join(CHECKERS)})"}
    checker = [found, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    return run_tests(seconds, python=[*checker, sys.executable], only=" or ".join(CHECKED))


def contest_of_graphs(shape: Shape, device: torch.device) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Loss, top-1 and top-5 accuracy, and gradient, by fastloss and by eager PyTorch; a call gives the gradient."""
    logits = torch.randn(shape.rows, shape.classes, device=device, requires_grad=True)
    target = torch.randint(shape.classes, (shape.rows,), device=device)

    def ours() -> Tensor:
        loss, _ = fastloss.cross_entropy_with_accuracy(logits, target, topk=(1, 5))
        return torch.autograd.grad(loss, logits)[0]

    def eager() -> Tensor:
        hits = logits.detach().topk(min(5, shape.classes), 1).indices == target[:, None]
        _ = hits[:, 0].float().mean(), hits.any(1).float().mean()
        return torch.autograd.grad(F.cross_entropy(logits, target), logits)[0]

    return ours, eager


def under_a_graph(shape: Shape, device: torch.device, seconds: float) -> dict[str, Any]:
    """Each of the two from a CUDA graph, and called without one: milliseconds; or why PyTorch has no graph."""
    found: dict[str, Any] = {"shape": str(shape)}
    try:
        ours, eager = contest_of_graphs(shape, device)
        turns = {"fastloss in a graph": captured(ours).replay, "fastloss": ours, "torch": eager}
        try:
            turns["torch in a graph"] = captured(eager).replay
        except Exception as error:
            found["torch in a graph"] = first_line(error)
        times = medians([partial(_turn, call) for call in turns.values()], seconds)
    except Exception as error:
        return {"shape": str(shape), "error": first_line(error)}
    return found | dict(zip(turns, times, strict=True))


def _turn(call: Callable[[], object]) -> list[float]:
    return [by_events(call, 20)]


def _versions(device: torch.device) -> dict[str, str]:
    found = {"fastloss": fastloss.__version__, "torch": torch.__version__}
    found["triton"] = choice.triton_version() or "not installed"
    if device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda or torch.version.hip)
        found["driver"] = _driver()
    return found


def _driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def file_name(device: torch.device) -> str:
    """``nvidia-h100-80gb-hbm3-2026-01-31``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{datetime.date.today()}"


def main(arguments: list[str] | None = None) -> int:
    """Make the record; exit code 1 if a part of it failed or was cut off, 2 without a GPU, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tiny shapes, to try the command"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="the folder")
    parser.add_argument("--no-tests", action="store_true", help="measurements alone")
    parser.add_argument("--no-checker", action="store_true", help="tests, but none under a memory checker")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.record: needs a GPU, and torch finds none (--device cpu tries the command)", file=sys.stderr
        )
        return 2
    if not 0 <= options.minutes < math.inf:
        print(f"benchmarks.record: --minutes is {options.minutes}; expected 0 or more", file=sys.stderr)
        return 2
    if not options.output.is_dir():
        print(
            f"benchmarks.record: --output is {str(options.output)!r}; expected a folder that exists", file=sys.stderr
        )
        return 2
    device, end = torch.device(options.device), time.monotonic() + 60 * options.minutes
    chosen = workloads(device)
    asked = {each.name: each for workload in chosen for each in contenders_of(workload.op)}
    path = options.output / f"{file_name(device)}.json"
    record = Record(
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        circumstances(device),
        _versions(device),
        {name: each.presence() for name, each in asked.items()},
    )
    try:
        _make(
            record,
            path,
            chosen,
            device,
            end,
            tests=not options.no_tests,
            checker=not options.no_checker,
            minutes=options.minutes,
        )
    except KeyboardInterrupt:
        record.write(path)
        print(f"interrupted; what was finished is in {path}")
        return 130
    onward = "; python -m benchmarks.tables puts it into README.md" if device.type == "cuda" else ""
    print(f"written: {path} and {path.with_suffix('.md').name}{onward}")
    return int(not record.is_good)


def _make(
    record: Record,
    path: Path,
    chosen: Sequence[Workload],
    device: torch.device,
    end: float,
    *,
    tests: bool,
    checker: bool,
    minutes: float,
) -> None:
    record.tests = {} if tests else {"summary": "left out (--no-tests)"}
    if not (tests and checker):
        record.memory_checker = {"summary": "left out (--no-checker)" if tests else "left out (--no-tests)"}
    if tests:
        record.tests = run_tests(60 * minutes * _TESTS_SHARE)
        print(f"tests: {record.tests['summary']}", *record.tests["failures"], sep="\n", flush=True)
        record.write(path)
    if tests and checker:
        record.memory_checker = check_memory(60 * minutes * _CHECKER_SHARE)
        print(f"memory checker: {record.memory_checker['summary']}", flush=True)
        record.write(path)
    graphs = VISION if device.type == "cuda" else ()
    for shape in graphs:
        record.graphs.append(under_a_graph(shape, device, 2.0))
        print(f"under a CUDA graph: {record.graphs[-1]}", flush=True)
    for done, workload in enumerate(chosen):
        left = end - time.monotonic()
        if left < 0:
            record.left_out = [str(each) for each in chosen[done:]]
            record.write(path)
            print(f"out of time: {len(record.left_out)} workloads are left out", flush=True)
            return
        share = left / (len(chosen) - done)
        new = measure(workload, contenders_of(workload.op), device, budget=share / 4)
        record.rows += new
        record.write(path)
        timed = [f"{row.contender} {row.milliseconds:.3f} ms" for row in new if row.timed]
        print(f"{workload}: {', '.join(timed) or 'nothing timed'}", flush=True)
    record.finished = True
    record.write(path)


if __name__ == "__main__":
    sys.exit(main())
