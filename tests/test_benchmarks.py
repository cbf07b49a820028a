"""The programs that measure: what they print and refuse, and that the documents show what was recorded."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastloss.measuring.clock import medians
from fastloss.measuring.contenders import Contender, Functions

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "sgd.py").exists(), reason="needs the repository's benchmarks"
)

TINY = ["--device", "cpu", "--scale", "1000", "--seconds", "0", "--block", "1"]
STEP = re.compile(
    r"(?P<name>\S.*?) {2,} *(?P<ms>\d+\.\d{3}) ms +(?P<speed>\d+\.\d\d) GB/s +(?P<share>\d+)% of a copy"
    r"  host +(?P<host>\d+\.\d{3}) us a tensor(  ratio +(?P<ratio>\d+\.\d{3})|  (?P<wrong>WRONG: off by \S+ x .*))?"
)
FORM = re.compile(
    r"\S.*? {2,} *\d+\.\d{3} ms +\d+\.\d\d GB/s +\d+% of a copy(  (?P<wrong>WRONG.*))?  at \d+ bytes each"
)
TORCH = ["torch fused=True", "torch foreach=True", "torch foreach=False"]


@pytest.fixture
def sgd(monkeypatch: pytest.MonkeyPatch) -> Any:
    return benchmark("sgd", monkeypatch)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    return benchmark("tables", monkeypatch)


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a program as a user runs it, on the backend that serves by default."""
    monkeypatch.delenv("FASTLOSS_BACKEND", raising=False)
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module(f"benchmarks.{name}")


def by_set(lines: list[str]) -> dict[str, list[str]]:
    """Return the lines of each table under the name that its first line gives."""
    tables: dict[str, list[str]] = {}
    for line in lines:
        if heading := re.match(r"((?:variants, )?\w+): \d+ tensors, ", line):
            tables[heading[1]] = []
        elif tables and " bars missed" not in line:
            list(tables.values())[-1].append(line)
    return tables


# -------------------------------------------------------------------------------------------------------------- SGD


def test_sgd_prints_every_contender_of_every_set(sgd: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert sgd.main([*TINY, "--variants"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tables = by_set(lines)
    assert list(tables) == ["resnet50", "large", "small", *(f"variants, {name}" for name in sgd.SETS)]
    assert "a copy moves" in next(line for line in lines if line.startswith("resnet50: 161 tensors"))
    for name in sgd.SETS:
        steps = [STEP.fullmatch(line) for line in tables[name]]
        assert all(steps), tables[name]
        assert [step["name"] for step in steps if step] == ["fastloss.SGD", *TORCH]
        assert [step["ratio"] is None for step in steps if step] == [True, False, False, False]
        forms = [FORM.fullmatch(line) for line in tables[f"variants, {name}"]]
        assert len(forms) == len(sgd.VARIANTS)
        assert all(form and not form["wrong"] for form in forms), tables[f"variants, {name}"]
    assert re.fullmatch(r"0 bars missed; others used \d+% of the CPU time", lines[-1])


def test_sgd_marks_a_contender_that_is_wrong(
    sgd: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose learning rate is a thousandth too high, and one that makes NaN; the others are as right as before."""
    off = {**sgd.SGD_OPTIONS, "lr": 1.001 * sgd.SGD_OPTIONS["lr"]}
    monkeypatch.setitem(sgd.CONTENDERS, "torch, off", partial(torch.optim.SGD, **off))
    monkeypatch.setitem(sgd.CONTENDERS, "torch, NaN", partial(torch.optim.SGD, lr=float("nan")))
    assert sgd.main([*TINY, "--set", "large"]) == 0  # only a wrong fastloss is an error
    steps = [STEP.fullmatch(line) for line in by_set(capsys.readouterr().out.splitlines())["large"]]
    wrong = {step["name"]: step["wrong"] for step in steps if step}
    assert [name for name in wrong if wrong[name]] == ["torch, off", "torch, NaN"]
    assert wrong["torch, NaN"].startswith("WRONG: off by inf x")


def test_sgd_fails_if_fastloss_is_wrong(
    sgd: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    off = {**sgd.SGD_OPTIONS, "momentum": 0.899}
    monkeypatch.setitem(sgd.CONTENDERS, sgd.OURS, partial(torch.optim.SGD, **off))
    assert sgd.main([*TINY, "--set", "small"]) == 1
    assert "fastloss WRONG in 1 lines" in capsys.readouterr().out.splitlines()[-1]


def test_sgd_in_bfloat16_counts_its_bytes(sgd: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert sgd.main([*TINY, "--set", "resnet50", "--dtype", "bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("resnet50: 161 tensors, ") and "bfloat16, 10 bytes each" in line for line in lines)
    right = [line for line in by_set(lines)["resnet50"] if "fused=True" not in line]  # torch 2.13's is wrong
    assert not any("WRONG" in line for line in right), right


@pytest.mark.parametrize("name", ["mom", "decay", "nesterov"])
def test_sgd_check_sees_small_mistakes(sgd: Any, name: str) -> None:
    changed = {"mom": {"momentum": 0.9001}, "decay": {"weight_decay": 0.9e-4}, "nesterov": {"nesterov": True}}[name]
    makes = [partial(torch.optim.SGD, **{**sgd.SGD_OPTIONS, **change}) for change in ({}, changed)]
    right, wrong = sgd.step_errors(makes, [(300, 7), (64,), (1, 1)], torch.float32, torch.device("cpu"))
    assert right.of_rounding < 1 < wrong.of_rounding


def test_sgd_check_knows_clipping(sgd: Any) -> None:
    makes = [partial(sgd.fastloss.SGD, **sgd.SGD_OPTIONS, max_norm=max_norm) for max_norm in (1.0, 1.01, None)]
    found = sgd.step_errors(makes, [(300, 7), (64,)], torch.float32, torch.device("cpu"), max_norm=1.0)
    right, *wrong = (errors.of_rounding for errors in found)
    assert right < 1 < min(wrong)


def test_sgd_sets_are_those_that_the_bars_are_for(sgd: Any) -> None:
    sizes = {name: [torch.Size(shape).numel() for shape in sgd.shrunk(name, 1)] for name in sgd.SETS}
    assert {name: (len(size), sum(size)) for name, size in sizes.items()} == {
        "resnet50": (161, 25_557_032),  # as torchvision.models.resnet50 has them
        "large": (12, 50_000_000),
        "small": (2000, 512_000),
    }
    assert {name for name, _ in sgd._BARS} <= set(sgd.SETS)
    assert {contender for _, contender in sgd._BARS} <= set(sgd.CONTENDERS)


def test_sgd_counts_missed_bars(sgd: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def line(ratio: float, host: float, deviation: float = 0.5) -> Any:
        return sgd.Line("x", 1.0, 10.0, 20.0, deviation, host, ratio, bars=(1.0, 0.5))

    lines = [line(0.4, 0.9), line(0.6, 0.9), line(0.6, 1.1), line(0.6, 0.9, deviation=2.0)]
    assert [str(each).count("MISSED") for each in lines] == [0, 1, 2, 0]
    report = sgd.Report("sgd", [])
    report.say(*lines)
    assert report.close() == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 bars missed; others used ")
    assert "ratio 0.600 ≤ 0.50 MISSED" in str(line(0.6, 0.9))
    assert "us a tensor ≤ 1.00 ok" in str(line(0.6, 0.9))
    assert line(0.6, 0.9, deviation=float("nan")).wrong


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_sgd_refuses_a_gpu_that_is_not_there() -> None:
    command = [sys.executable, "-m", "benchmarks.sgd", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--device" in done.stderr.splitlines()[-1]


# -------------------------------------------------------------------------------------------- linear_cross_entropy


def test_linear_prints_every_contender_and_marks_the_inexact(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Times are not asserted, nor the exit code, which depends on them and on the memory of so small a shape."""
    linear = benchmark("linear", monkeypatch)

    def loss(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 1.001 * F.cross_entropy(F.linear(x, w), target)

    off = Contender("off", "torch", lambda: Functions(linear=loss), ("linear",), cpu=True)
    monkeypatch.setitem(linear.CONTENDERS, "off", off)
    monkeypatch.setitem(linear.NAMES, "off", "off")
    names = [words for name, words in linear.NAMES.items() if linear.CONTENDERS[name].absence() is None]
    record = tmp_path / "linear.md"
    monkeypatch.setitem(linear.SHAPES, "cpu", ((300, 8, 700),))
    arguments = ["--device", "cpu", "--seconds", "0", "--output", str(record)]
    code = linear.main(arguments)
    head, shape, *lines, products, last = capsys.readouterr().out.splitlines()
    assert head.startswith("fastloss ")
    assert shape == "(300, 8) x 700 float32"
    assert [line.split("  ")[0] for line in lines] == names
    for line in lines:
        assert re.search(r"\d+\.\d\d ms +\d+\.\d\d of the products +\d+\.\d MB  error \d\.\de-\d\d", line), line
        if not line.startswith("F.linear_cross_entropy"):  # torch's own may be, on another machine
            assert ("INEXACT" in line) == line.startswith("off")
    assert re.search(r"of the faster other \d+\.\d{3} ≤ 1\.00 (ok|MISSED)", lines[0])
    assert re.search(r"of the plain form's memory \d+\.\d{3} ≤ 0\.25 (ok|MISSED)", lines[0])
    assert products.startswith("three products")
    missed = sum(line.count("MISSED") for line in lines)
    assert last.startswith(f"{missed} bars missed")
    assert code == int(missed > 0)
    text = record.read_text(encoding="utf-8")
    assert "`python -m benchmarks.linear --device cpu --seconds 0` at " in text
    assert lines[0] in text

    assert linear.main(["--shape", "30", "8", "70", "--device", "cpu", "--seconds", "0"]) == 0
    assert "≤" not in capsys.readouterr().out  # another shape has no bars


def test_tokens_holds_losses_against_float64_and_beside_linear_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = benchmark("tokens", monkeypatch)
    monkeypatch.setitem(tokens.SHAPES, "cpu", ((90, 8, 70),))
    monkeypatch.setattr(tokens, "of_parts", lambda problem, entropy: 1.01 * tokens.plain(problem, entropy))
    code = tokens.main(["--device", "cpu", "--seconds", "0"])
    _, shape, *lines, last = capsys.readouterr().out.splitlines()
    assert shape == "(90, 8) x 70 float32"
    assert [line[:30].strip() for line in lines] == [
        "linear_cross_entropy",
        *("linear_token_loss", "..._with_statistics", "over the logits"),
        *("linear_token_loss, entropy", "..._with_statistics, entropy", "over the logits, entropy"),
    ]
    for line in lines:
        judged = line.startswith(("linear_token_loss", "..._with"))
        assert bool(re.search(r"of linear_cross_entropy \d+\.\d{3} ≤ 1\.[14]0 (ok|MISSED)", line)) == judged
        assert ("INEXACT" in line) == line.startswith("..._with")
    assert code == 1
    assert last.startswith(f"{sum(line.count('MISSED') for line in lines)} bars missed")


# ------------------------------------------------------------------------------------------------- medians, options


def test_medians_are_of_single_calls_in_turns_of_blocks() -> None:
    calls: list[str] = []
    steps = [partial(calls.append, "a"), partial(calls.append, "b")]
    assert len(medians(steps, torch.device("cpu"), budget=0.0, block=3, least=5)) == 2
    assert "".join(calls) == "aaabbb" + "bbbaaa"  # every other round goes backwards; 5 calls need two


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        ("sgd", ["--set", "huge"], ["'huge'", "resnet50", "large", "small"]),
        ("sgd", ["--dtype", "float8"], ["'float8'", "float32", "bfloat16"]),
        ("sgd", ["--device", "tpu"], ["'tpu'", "cpu", "cuda"]),
        ("sgd", ["--block", "0"], ["--block", "1 or more"]),
        ("sgd", ["--scale", "0"], ["--scale", "1 or more"]),
        ("sgd", ["--seconds", "nan"], ["--seconds", "nan"]),
        ("sgd", ["--seconds", "-1"], ["--seconds", "-1"]),
        ("sgd", ["--output", "nowhere/at/all.md"], ["--output", "nowhere"]),
        ("sgd", ["--launches", "--variants"], ["--launches", "--variants"]),
        ("linear", ["--shape", "0", "8", "70"], ["--shape is [0, 8, 70]; expected three numbers of at least 1"]),
        ("linear", ["--seconds", "nan"], ["--seconds is nan; expected 0 or more"]),
        (
            "linear",
            ["--output", "nowhere/linear.md"],
            ["--output is 'nowhere/linear.md'; expected a file in a folder that exists"],
        ),
        ("cpu", ["--block", "0"], ["--block is 0; expected 1 or more"]),
        ("cpu", ["--block", "-1"], ["--block is -1; expected 1 or more"]),
        ("cpu", ["--seconds", "nan"], ["--seconds is nan; expected 0 or more"]),
        ("host", ["--seconds", "-1"], ["--seconds is -1.0; expected 0 or more"]),
    ],
)
def test_a_program_refuses_before_it_measures(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: str,
    arguments: list[str],
    words: list[str],
) -> None:
    with pytest.raises(SystemExit) as error:
        benchmark(program, monkeypatch).main(arguments)
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert all(word in err.splitlines()[-1] for word in words), err
    assert not out


# -------------------------------------------------------------------------------------------------------------- host


@pytest.mark.parametrize(("bar", "missed"), [(1e9, 0), (0.0, 3)])
def test_host_counts_missed_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bar: float, missed: int
) -> None:
    host = benchmark("host", monkeypatch)
    monkeypatch.setattr(host, "_BAR", bar)
    assert host.main(["--device", "cpu", "--seconds", "0"]) == int(missed > 0)
    assert capsys.readouterr().out.splitlines()[-1] == f"{missed} bars missed"


# --------------------------------------------------------------------------------------------- records and documents


def test_documents_show_the_records(tables: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_record_of_tables_has_its_place(tables: Any) -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in tables.DOCUMENTS)
    for record, part in tables.TABLES:
        assert f"<!-- numbers: {' '.join(filter(None, (record, part)))} -->\n" in text


def test_tables_are_made_from_a_record(
    sgd: Any, tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the program that prints to the document that shows."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    record = tmp_path / "benchmarks" / "results" / "sgd-cpu.md"
    record.unlink(missing_ok=True)
    tables.main([], tmp_path)
    before = (tmp_path / "docs" / "performance.md").read_text(encoding="utf-8")
    assert before.count(tables.NOT_RECORDED) == 2
    assert tables.main(["--check"], tmp_path) == 0

    wrong = partial(torch.optim.SGD, **{**sgd.SGD_OPTIONS, "lr": 0.2})
    monkeypatch.setitem(sgd.CONTENDERS, "torch foreach=True", wrong)
    sgd.main([*TINY, "--variants", "--output", str(record)])
    text = record.read_text(encoding="utf-8")
    assert "python -m benchmarks.sgd --device cpu --scale 1000" in text
    assert str(tmp_path) not in text
    assert tables.main(["--check"], tmp_path) == 1
    assert (tmp_path / "docs" / "performance.md").read_text(encoding="utf-8") == before
    assert tables.main([], tmp_path) == 0
    assert tables.main(["--check"], tmp_path) == 0

    document = (tmp_path / "docs" / "performance.md").read_text(encoding="utf-8")
    assert tables.NOT_RECORDED not in document
    printed = by_set(text.splitlines())
    for name in sgd.SETS:
        steps = [STEP.fullmatch(line) for line in printed[name]]
        fast, fused, foreach, _ = (step.groupdict() for step in steps if step)
        (row,) = (line for line in document.splitlines() if line.startswith(f"| {name}: "))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:5] == [fast["host"], f"{fast['ms']} ms", f"{fast['speed']} GB/s", f"{fast['share']}%"]
        assert cells[5:9] == [f"{fused['ms']} ms", fused["ratio"], f"{foreach['ms']} ms", "wrong"]
        assert document.count(f"| {name} | float32") == 3
        assert document.count(f"| {name} | bfloat16") == 6


def test_an_unknown_record_is_named(tables: Any) -> None:
    with pytest.raises(ValueError, match="from benchmarks/results/none"):
        tables.filled("<!-- numbers: benchmarks/results/none.md -->\n", ROOT)
