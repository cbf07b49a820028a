"""What the compiler makes of the kernels, without a GPU: a subset of ``python -m benchmarks.codegen``.

The subset: for sm_90 every kernel in every form, in bfloat16, at the shapes of ``--quick``; for the other targets the
loss with an accuracy there, SGD, and a form that spilled. It takes some minutes; all of it takes hours of one core.

Here Triton interprets, so other processes compile. Each takes seconds to begin: one serves all tests of a target.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastloss.backends import choice

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    choice.triton_version() is None or not (ROOT / "benchmarks" / "codegen.py").exists(),
    reason="needs Triton and the repository's benchmarks",
)


def printed(program: str, folder: Path) -> str:
    """Return what a program prints in a process of its own, where Triton does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    path = folder / "program.py"  # Triton reads the source of a kernel in it
    path.write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def reports(runs: list[list[str]], folder: Path) -> list[list[str]]:
    """Return the lines of each report. No launch in any has a fault."""
    program = f"from benchmarks import codegen\nfor run in {runs}: print('exit code', codegen.main(run), flush=True)"
    *texts, end = re.split(r"^exit code 0\n", printed(program, folder), flags=re.MULTILINE)
    assert (len(texts), end) == (len(runs), ""), "".join(texts) + end
    return [text.splitlines() for text in texts]


LOSS_FORMS = ["plain", "accuracy", "weight", "none", "smoothing", "softcap", "chunk", "rescale"]
FORMS = [*LOSS_FORMS, "soft", "statistics", "divergence", "shard"]
BUDGETED = ["8192x32000 bfloat16 plain", "8192x32000 bfloat16 accuracy", "4096x128256 bfloat16 accuracy", "sgd "]


@pytest.mark.slow
def test_every_form_on_sm_90(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing spills, aligned accesses are wide, and budgets are kept."""
    sm_90 = ["--target", "sm_90"]
    quick, single_row = reports([[*sm_90, "--quick"], [*sm_90, "--only", "1x1000 bfloat16"]], tmp_path)
    for form in FORMS:
        assert any(f"bfloat16 {form}" in line for line in quick), form

    for label in BUDGETED:
        hot = r"(forward_loop|forward_tile|step_kernel|squares_kernel) "
        loops = [line for line in quick if label in line and re.match(hot, line)]
        assert loops, label
        for line in loops:
            assert re.search(r" \d+\.\d \d\.\d\d +\d+%", line), line  # a hot loop was found in each

    # The capped logit is a product, t·c; whether it is finite must not hang on how it was rounded.
    for form, kernels in (
        ("smoothing+softcap forward", {"forward_loop", "statistics_loop", "statistics_tile"}),
        ("smoothing+softcap soft forward", {"soft_statistics"}),
    ):
        assert {line.split()[0] for line in quick if form in line} >= kernels

    # Triton makes constants of arguments that are 1.
    assert any("none+accuracy forward" in line for line in single_row)

    kernel, target, *names = quick[0].replace("made for", "made-for").replace(";", "").split()
    assert (kernel, target) == ("kernel", "target")
    assert names == legend(capsys)


def legend(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the names of the columns that the command's help explains."""
    from benchmarks import codegen

    with pytest.raises(SystemExit):
        codegen.main(["--help"])
    help_text = capsys.readouterr().out.replace("made for", "made-for")
    lines = help_text.partition("columns:\n")[2].splitlines()
    assert all(len(line.split()) > 2 for line in lines)
    return [line.split()[0] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_nothing_spills_and_hot_accesses_are_wide(target: str, tmp_path: Path) -> None:
    labels = "bfloat16 accuracy forward", "8192x32000 bfloat16 soft-weight+smoothing forward"
    accuracy, _, _ = reports(
        [
            *(["--target", target, "--quick", "--only", label] for label in labels),
            ["--target", target, "--only", "sgd "],
        ],
        tmp_path,
    )
    lines = [line for line in accuracy if "forward+gradient" in line and "weigh" not in line]
    assert len(lines) >= 4, accuracy
    for line in lines:
        if "x1000 " in line or "x32000" in line or "x128256" in line:
            wide = ("LDG.128", "STG.128") if target.startswith("sm") else ("LDG.dwordx4", "STG.dwordx4")
            assert all(access in line for access in wide), line


def test_products_taken_from_themselves_are_found_two_at_a_time() -> None:
    """Accesses of sm_100 are put together of two registers, and taken apart."""
    from benchmarks.codegen import rounding_errors

    packed = "mul.f32x2 %rd1, %rd2, %rd3; neg.f32x2 %rd4, %rd1; fma.rn.f32x2 %rd5, %rd2, %rd3, %rd4;"
    assert rounding_errors(packed) == ["%rd5.0", "%rd5.1"]
    assert rounding_errors(packed.replace("x2", "")) == ["%rd5"]
    assert rounding_errors(
        "mov.b64 %rd1, {%r1, %r2}; mov.b64 %rd2, {%r3, %r4}; mul.f32x2 %rd3, %rd1, %rd2;"
        "mov.b64 {%r5, %r6}, %rd3; neg.f32 %r7, %r6; fma.rn.f32 %r8, %r2, %r4, %r7;"
        "neg.f32 %r9, %r5; fma.rn.f32 %r10, %r2, %r4, %r9;"
    ) == ["%r8"]
    assert rounding_errors("mul.f32x2 %rd1, %rd2, %rd3; fma.rn.f32x2 %rd5, %rd2, %rd4, %rd1;") == []


@pytest.mark.slow
def test_bad_kernels_are_caught_and_good_ones_are_not(tmp_path: Path) -> None:
    *lines, count = printed(BAD_KERNELS, tmp_path).splitlines()
    of_kernel = {line.rpartition(" ")[2]: line for line in lines}
    for kernel, fault in (
        ("spilling", "spills"),
        ("narrow", "narrow accesses in hot loops"),
        ("narrow_throughout", "32 bytes a thread without 128-bit accesses"),
        ("narrow_tile", "32 bytes a thread without 128-bit accesses"),
        ("costly", "instructions, over 0.5"),
        ("inexact", "8 products taken from themselves"),
        ("costly_tile", "instructions, over 0.5"),
    ):
        assert fault in of_kernel[kernel]
    for kernel in ("good", "good_tile"):
        assert "LDG.128" in of_kernel[kernel]
        assert "FAULT" not in of_kernel[kernel]
    # A budget without a loop would be kept whatever the kernel did.
    assert "FAULT: a budget, and no hot loop found; sm_90 4096x1000 bfloat16 shard ranks" in lines
    assert count == "exit code 1"


BAD_KERNELS = """
import torch
import triton
import triton.language as tl

from benchmarks import codegen


@triton.jit
def spilling(x_ptr, n, COLS: tl.constexpr):  # a row of 131072 numbers by 128 threads: 1024 registers each
    x = tl.load(x_ptr + tl.arange(0, COLS))
    x = x - tl.max(x, axis=0)
    tl.store(x_ptr + tl.arange(0, COLS), tl.exp2(x) / tl.sum(tl.exp2(x), axis=0))


@triton.jit
def narrow(x_ptr, n, BLOCK: tl.constexpr):  # of the stores every second element is left out
    lane = tl.arange(0, BLOCK)
    for start in tl.range(0, n, BLOCK):
        x = tl.load(x_ptr + start + lane)
        tl.store(x_ptr + start + 2 * lane, x * 2.0)


@triton.jit
def narrow_throughout(x_ptr, n, BLOCK: tl.constexpr):  # and of the loads
    lane = tl.arange(0, BLOCK)
    for start in tl.range(0, n, BLOCK):
        x = tl.load(x_ptr + start + 2 * lane)
        tl.store(x_ptr + start + 2 * lane, x * 2.0)


@triton.jit
def narrow_tile(x_ptr, n, COLS: tl.constexpr, LOOPED: tl.constexpr, VEC: tl.constexpr):
    lane = tl.arange(0, COLS)
    for row in tl.range(tl.program_id(0), n, tl.num_programs(0)):
        x = tl.load(x_ptr + row * 2 * COLS + 2 * lane)
        tl.store(x_ptr + row, tl.sum(x, axis=0))


@triton.jit
def costly(x_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    for start in tl.range(0, n, BLOCK):
        x = tl.load(x_ptr + start + lane)
        for _ in tl.static_range(8):
            x = x * x + 1.0
        tl.store(x_ptr + start + lane, x)


@triton.jit
def inexact(x_ptr, n, BLOCK: tl.constexpr):  # 0 for most finite numbers too; 8 of them a thread
    x = tl.load(x_ptr + tl.arange(0, BLOCK)) * 3.0
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.where(x - x == 0.0, x, 0.0))


@triton.jit
def costly_tile(x_ptr, n, COLS: tl.constexpr, LOOPED: tl.constexpr, VEC: tl.constexpr):
    lane = tl.arange(0, COLS)
    for row in tl.range(tl.program_id(0), n, tl.num_programs(0)):
        x = tl.load(x_ptr + row * COLS + lane)
        tl.store(x_ptr + row * COLS + lane, x / tl.sum(x, axis=0))


good, good_tile = costly, costly_tile

for name in (
    "spilling", "narrow", "narrow_throughout", "narrow_tile", "costly", "inexact", "costly_tile", "good", "good_tile"
):
    options = {"num_warps": 4}
    if name.endswith("tile") or name == "spilling":
        options |= {"COLS": {"spilling": 131072}.get(name, 1024)}
        options |= {} if name == "spilling" else {"LOOPED": False, "VEC": 4}
    else:
        options |= {"BLOCK": 1024}
    launch = codegen.Launch(globals()[name], (torch.empty(1 << 20), 1 << 20), options, f"bad float32 {name}")
    most = 99 if name.startswith("good") else 0.5
    codegen.BUDGETS[launch.label] = codegen.Budget(instructions=most)
    print(codegen._line(codegen.examine(launch, "sm_90", codegen.TARGETS["sm_90"])))

label = "4096x1000 bfloat16 shard ranks"  # whose programs take one tile each
codegen.BUDGETS[label] = codegen.Budget(instructions=99)
print("exit code", codegen.main(["--target", "sm_90", "--only", label]))
"""


LAUNCHES = """
import json
import random

import torch

from benchmarks import codegen

codegen.pretend_to_be_an_h100()
results = {}
quick = [launch.label for launch in codegen.chosen(quick=True)]
words = {label.split()[2] for label in quick if not label.startswith("sgd")}
results["forms"] = sorted({word.split("-")[0].split("+")[0] for word in words})


def recorded(shapes, form="", **options):
    for label, call in codegen.cases(shapes, **options):
        if label.endswith(form):
            launches = []
            with codegen.recorded(launches, label):
                call()
            yield from launches


launches = [
    launch
    for offset in (0, 1)
    for launch in recorded([(4096, 1024)], "bfloat16 none+accuracy backward", dtypes=["bfloat16"], offset=offset)
]
results["launches"] = len(launches)
results["elsewhere"] = sorted({launch.label.split()[0] for launch, _ in codegen.distinct(launches, ["sm_90"])})


def moved(argument):  # to an odd address, and nothing else
    return argument.new_empty(argument.numel() + 1)[1:] if isinstance(argument, torch.Tensor) else argument


first = launches[0]
given, odd = first.arguments, moved(torch.ones(8))
kinds = given, tuple(map(moved, given)), given, (*given, (1.0,)), (*given, (odd,))
alike = [codegen.Launch(first.kernel, each, first.options, first.label) for each in kinds]
results["distinct"] = len(codegen.distinct(alike, ["sm_90"]))

compiled = {codegen.form_and_tile(launch) for launch in codegen.chosen(quick=False)}
shapes = []
for _ in range(100):
    classes = int(2 ** random.uniform(0, 18.2))
    step = random.choice([1, 2, 4, 8])
    classes = -(-classes // step) * step
    rows = max(1, min(int(2 ** random.uniform(0, 28)), (1 << 31) // classes))
    shapes.append((rows, classes))
shapes += [(random.randint(1, 64), random.randint(1, 3000), random.randint(2, 5000)) for _ in range(10)]
others = (launch for launch in recorded(shapes) if codegen.form_and_tile(launch) not in compiled)
results["compiled"] = len(compiled)
results["not compiled"] = [(launch.label, str(codegen.form_and_tile(launch))) for launch in others]
print(json.dumps(results))
"""


@pytest.mark.slow
def test_what_is_compiled(tmp_path: Path) -> None:
    results: dict[str, Any] = json.loads(printed(LAUNCHES, tmp_path))
    assert results["forms"] == sorted(FORMS)
    # Triton compiles other code for logits that begin elsewhere; what is compiled once stands for its like alone.
    assert results["launches"] == 4
    assert results["elsewhere"] == ["4096x1024", "4096x1024@1"]
    assert results["distinct"] == 4  # of five, two are the same
    # The list of shapes has every tile that can be chosen, against shapes that nobody chose.
    assert results["not compiled"] == []
    assert results["compiled"] >= 1000


def test_it_refuses_the_interpreter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import codegen

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert codegen.main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--only", "no such thing"], "no label contains it"), (["--jobs", "0"], "--jobs is 0; expected 1 or more")],
)
def test_what_it_refuses(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import codegen

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(codegen, "pretend_to_be_an_h100", lambda shared_bytes: None)
    assert codegen.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.codegen: ")
    assert words in line
