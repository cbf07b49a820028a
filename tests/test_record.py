"""The record of a GPU: its files, what an interruption leaves of them, and its tables in the README."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "record.py").exists(), reason="needs the repository's benchmarks"
)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("FASTLOSS_BACKEND", raising=False)
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.record")
    workloads = importlib.import_module("fastloss.bench.workloads")
    tiny = [workloads.Workload("sgd", workloads.Shape(n, 10), torch.float32) for n in (2, 3)]
    monkeypatch.setattr(module, "workloads", lambda device: tiny)
    monkeypatch.setattr(module, "measure", partial(short, module.measure))
    return module


def short(measure: Any, *arguments: Any, budget: float) -> Any:
    """Measure for a moment: the minutes are many, for machines that are busy."""
    return measure(*arguments, budget=min(budget, 0.1))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.tables")


def written(folder: Path) -> tuple[dict[str, Any], str]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(record: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert record.main([]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.record: needs a GPU")


def test_a_folder_that_is_not_there(record: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert record.main(["--device", "cpu", "--output", str(tmp_path / "nowhere")]) == 2
    assert "expected a folder that exists" in capsys.readouterr().err


def test_every_contender_is_in_the_record(record: Any, tmp_path: Path) -> None:
    assert record.main(["--device", "cpu", "--minutes", "10", "--no-tests", "--output", str(tmp_path)]) == 0
    found, text = written(tmp_path)
    assert found["finished"]
    assert found["versions"]["torch"] == torch.__version__
    assert "commit" in found["circumstances"]
    assert {row["contender"] for row in found["rows"]} == set(found["contenders"])
    assert {row["shape"] for row in found["rows"]} == {"2x10", "3x10"}
    assert "absent" in found["contenders"]["apex-sgd"] or "apex" in found["contenders"]["apex-sgd"]
    assert "| sgd | 3x10 | float32 | fastloss |" in text


def test_an_interrupted_run_keeps_what_it_finished(
    record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, calls = record.measure, []

    def interrupted(workload: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(workload)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(workload, *arguments, **options)

    monkeypatch.setattr(record, "measure", interrupted)
    assert record.main(["--device", "cpu", "--minutes", "10", "--no-tests", "--output", str(tmp_path)]) == 130
    found, text = written(tmp_path)
    assert {row["shape"] for row in found["rows"]} == {"2x10"}
    assert not found["finished"]
    assert "the run was not finished" in text
    assert "interrupted" in capsys.readouterr().out


def test_tests_that_fail_or_take_too_long_are_in_the_record(record: Any) -> None:
    failing = [sys.executable, "-c", "print('FAILED tests/a.py::b - no'); print('1 failed in 0.1s'); exit(1)"]
    found = record.run_tests(60.0, python=failing)
    assert (found["exit_code"], found["summary"]) == (1, "1 failed in 0.1s")
    assert found["failures"] == ["FAILED tests/a.py::b - no"]
    found = record.run_tests(0.0, python=[sys.executable, "-c", "import time; time.sleep(60)"])
    assert found["exit_code"] is None
    assert found["summary"].startswith("not finished after")


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print("worker", worker.pid, flush=True)
time.sleep(300)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at /proc")
def test_tests_that_do_not_end_are_ended_with_their_workers(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_LAST_WORDS", 0.5)
    for seconds in (2.0, 10.0, 60.0):  # a busy machine takes long to start the worker
        found = record.run_tests(seconds, python=[sys.executable, "-c", STUBBORN])
        if worker := re.fullmatch(r"not finished after \d+ s: worker (\d+)", found["summary"]):
            break
    else:
        pytest.fail(str(found))
    status = Path("/proc", worker[1], "stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the worker lives on")


@pytest.mark.slow
def test_the_gpu_tests_are_asked_for_by_file(record: Any) -> None:
    """No other file is; the tests of the memory checker are among them, for losses and for SGD."""
    files = record.gpu_tests()
    assert "tests/test_gpu.py" in files
    assert "tests/test_linear.py" not in files
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in files}
    for name in record.CHECKED:
        assert re.search(rf"def test_\w*{name}", texts["tests/test_gpu.py"] + texts["tests/test_gpu_sgd.py"])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""},
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d{3} skipped, \d+ deselected", done.stdout.splitlines()[-1]), done.stdout


def test_failures_and_what_was_cut_off_are_in_the_text(record: Any) -> None:
    made = record.Record("H100", "at commit abc", {}, {})
    made.tests = {"exit_code": 1, "summary": "2 failed", "failures": ["FAILED tests/a.py::b", "FAILED tests/a.py::c"]}
    made.left_out = ["host-64x1000-float32-hard"]
    made.graphs = [{"shape": "4096x10", "error": "RuntimeError: no"}]
    text = made.markdown()
    assert "- tests: 2 failed\n  - FAILED tests/a.py::b\n  - FAILED tests/a.py::c\n" in text
    assert "- memory checker: not reached\n" in text
    assert "- no time was left for host-64x1000-float32-hard\n- the run was not finished\n" in text
    assert "| 4096x10 | RuntimeError: no | | | | |" in text


def test_a_record_is_good_if_every_part_is(record: Any) -> None:
    def made(**changes: Any) -> bool:
        parts: dict[str, Any] = {"tests": {"exit_code": 0}, "memory_checker": {"summary": "none"}, "finished": True}
        good = record.Record("H100", "at commit abc", {}, {}, **{**parts, **changes}).is_good
        assert isinstance(good, bool)
        return good

    assert made()
    assert not made(finished=False)
    for code in (1, None):
        assert not made(tests={"exit_code": code})
    assert not made(memory_checker={"exit_code": 9})
    assert not made(graphs=[{"shape": "4096x10", "error": "no"}])


def test_out_of_time(record: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record.main(["--device", "cpu", "--minutes", "0", "--no-tests", "--output", str(tmp_path)]) == 1
    found, text = written(tmp_path)
    assert found["left_out"] == ["sgd-2x10-float32", "sgd-3x10-float32"]
    assert "no time was left for sgd-2x10-float32, sgd-3x10-float32" in text
    assert "- tests: left out (--no-tests)" in text
    assert "out of time" in capsys.readouterr().out


@pytest.mark.parametrize("classes", [3, 10])
def test_what_is_captured_in_graphs(record: Any, classes: int) -> None:
    """Both contenders agree in loss, gradient and accuracies, of labels and logits as the record has them."""
    workloads = importlib.import_module("fastloss.bench.workloads")
    ours, eager = record.contest_of_graphs(workloads.Shape(64, classes), torch.device("cpu"))
    torch.testing.assert_close(ours(), eager())


@pytest.mark.parametrize("error", [None, "ours | both", "eager | it"])
def test_a_contender_without_a_graph_has_a_reason(
    record: Any, monkeypatch: pytest.MonkeyPatch, error: str | None
) -> None:
    """Without PyTorch's graph the others keep their times; without fastloss's there is nothing to compare."""
    workloads = importlib.import_module("fastloss.bench.workloads")
    calls = {"ours": lambda: 2e-3, "eager": lambda: 8e-3}

    def captured(call: Any) -> Any:
        if error and call is calls[error.split()[0]]:
            raise RuntimeError(f"{error}\nand more")
        return SimpleNamespace(replay=lambda: call() / 2)

    monkeypatch.setattr(record, "contest_of_graphs", lambda shape, device: tuple(calls.values()))
    monkeypatch.setattr(record, "captured", captured)
    monkeypatch.setattr(record, "medians", lambda calls, device, budget, block: [call() for call in calls])
    graph = record.under_a_graph(workloads.Shape(64, 10), torch.device("cuda"), 0.0)
    made = record.Record("H100", "at commit abc", {}, {}, graphs=[graph], finished=True)
    head, _, line = [line for line in made.markdown().splitlines() if line.startswith("|")][-3:]
    assert head.startswith("| loss, accuracy, gradient, float32 | fastloss in a graph, ms | torch in a graph, ms |")
    assert line.count("|") == head.count("|")
    if error is None:
        assert line == "| 64x10 | 1.0000 | 4.0000 | 2.0000 | 8.0000 | 0.125 |"
    elif error.startswith("eager"):
        assert line == "| 64x10 | 1.0000 | RuntimeError: eager / it | 2.0000 | 8.0000 | 0.125 |"
    else:
        assert line == "| 64x10 | RuntimeError: ours / both | | | | |"
    assert made.is_good == (error is None or error.startswith("eager"))


def test_no_memory_checker(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(record, "_CHECKER_FOLDERS", ())
    assert record.check_memory(1.0)["summary"].startswith("none is installed")


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_memory_checker_is_found_and_run(record: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is not in PATH; its last line and its exit code are in the record."""
    checker = tmp_path / "compute-sanitizer"
    checker.write_text("#!/bin/sh\necho \"$@\"\necho '========= ERROR SUMMARY: 1 error'\nexit 9\n")
    checker.chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(record, "_CHECKER_FOLDERS", (str(tmp_path),))
    found = record.check_memory(30.0)
    assert (found["exit_code"], found["summary"]) == (9, "ERROR SUMMARY: 1 error")
    assert "--error-exitcode 9" in found["command"]
    assert found["command"].endswith(" ".join(record.gpu_tests()))


def gpu_record(name: str, milliseconds: float) -> dict[str, Any]:
    row = {"op": "forward", "shape": "8x9", "dtype": "bfloat16", "target": "hard", "share_of_copy": 0.915}
    timed = {"status": "timed", "milliseconds": milliseconds}
    rows = [
        {**row, **timed, "contender": "fastloss"},
        {**row, **timed, "contender": "torch"},
        {**row, "status": "wrong", "contender": "liger"},
        {**row, "status": "absent", "contender": "apex"},
    ]
    rows.append({**rows[2], **timed, "shape": "4x9"})
    contenders = dict.fromkeys(("fastloss", "torch", "liger", "apex"), "1")
    return {"device": name, "circumstances": "at commit abc", "contenders": contenders, "rows": rows}


def test_the_readme_shows_the_newest_record_and_no_other(tables: Any, tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    text = f"before\n\n<!-- numbers: {tables.GPU} -->\nanything\n\nafter\n"
    assert tables.filled(text, tmp_path) == text.replace("anything\n", tables.NO_GPU)
    (results / "cpu-2099-01-01.json").write_text("{}")
    assert tables.NO_GPU in tables.filled(text, tmp_path)
    for date, milliseconds in (("2026-01-02", 2.0), ("2025-12-31", 1.0)):
        (results / f"nvidia-h100-{date}.json").write_text(json.dumps(gpu_record(f"H100 {date}", milliseconds)))
    filled = tables.filled(text, tmp_path)
    assert "H100 2026-01-02, at commit abc" in filled
    assert "| forward | 8x9 | bfloat16 | 2.000 | 92% | 2.000 | wrong |" in filled
    assert "apex" not in filled
    assert "2025" not in filled
    assert tables.filled(filled, tmp_path) == filled


def test_the_readme_shows_the_hosts_times_where_a_record_has_them(tables: Any, tmp_path: Path) -> None:
    found = gpu_record("H100", 2.0)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(found))
    assert "| of the limit | torch | liger |\n" in tables.gpu(path)  # an older record
    found["rows"][0]["host_milliseconds"], found["rows"][1]["host_milliseconds"] = 0.4, 0.2
    path.write_text(json.dumps(found))
    text = tables.gpu(path)
    assert "| of the limit | torch | liger | host: fastloss | host: torch |\n" in text
    assert "| forward | 8x9 | bfloat16 | 2.000 | 92% | 2.000 | wrong | 0.400 | 0.200 |\n" in text


@pytest.mark.parametrize("op", ["forward", "linear"])
def test_a_records_lines_have_as_many_cells(record: Any, op: str) -> None:
    """A wrong and a timed contender, of each operation, with a GPU's time and the host's."""
    workloads, measure = (importlib.import_module(f"fastloss.bench.{name}") for name in ("workloads", "measure"))
    contender = importlib.import_module("fastloss.measuring.contenders").CONTENDERS["fastloss"]
    workload = workloads.Workload(op, workloads.Shape(8, 9, 4), torch.bfloat16)
    row = measure.Row.of(workload, contender, "wrong", "by a | b")
    timed = dataclasses.replace(row, status="timed", milliseconds=1.5, host_milliseconds=0.25, peak_bytes=5)
    if op == "linear":
        timed = dataclasses.replace(timed, teraflops=3.0, times_products=1.25)
    made = record.Record("H100", "at commit abc", {}, {}, rows=[row, timed])
    head, _, *lines = [line for line in made.markdown().splitlines() if line.startswith("|")]
    assert [line.count("|") for line in lines] == [head.count("|")] * 2
    assert "| 1.5000 | 0.2500 |" in lines[1]
