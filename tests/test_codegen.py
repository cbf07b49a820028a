"""What the compiler makes of the kernels, without a GPU: a subset of ``python -m benchmarks.codegen``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastloss import backend

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    backend.triton_version() is None or not (ROOT / "benchmarks" / "codegen.py").exists(),
    reason="needs Triton and the repository's benchmarks",
)


def codegen(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.codegen", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_nothing_spills_and_hot_accesses_are_wide(target: str) -> None:
    done = codegen("--target", target, "--quick", "--only", "bfloat16 accuracy forward")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "forward+gradient" in line and "weigh" not in line]
    assert len(lines) >= 4, done.stdout
    for line in lines:
        if "x1000 " in line or "x32000" in line or "x128256" in line:
            wide = ("LDG.128", "STG.128") if target.startswith("sm") else ("LDG.dwordx4", "STG.dwordx4")
            assert all(access in line for access in wide), line


@pytest.mark.parametrize(
    "label", ["8192x32000 bfloat16 plain forward", "8192x32000 bfloat16 accuracy forward", "sgd "]
)
def test_hot_loops_are_within_their_budgets(label: str) -> None:
    done = codegen("--target", "sm_90", "--only", label)
    assert done.returncode == 0, done.stdout + done.stderr
    loops = [
        line for line in done.stdout.splitlines() if re.match(r"(forward_loop|step_kernel|squares_kernel) ", line)
    ]
    assert loops
    for line in loops:
        assert re.search(r" \d+\.\d \d\.\d\d +\d+%", line), line  # a hot loop was found in each


@pytest.mark.parametrize("form", ["smoothing+softcap forward", "smoothing+softcap soft forward"])
def test_no_product_is_taken_from_itself(form: str) -> None:
    """The capped logit is a product, t·c; whether it is finite must not hang on how it was rounded."""
    done = codegen("--target", "sm_90", "--quick", "--only", form)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = {line.split()[0] for line in done.stdout.splitlines() if form in line}
    assert kernels >= (
        {"soft_statistics"} if "soft forward" in form else {"forward_loop", "statistics_loop", "statistics_tile"}
    )


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_sgd_spills_nowhere(target: str) -> None:
    done = codegen("--target", target, "--only", "sgd ")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("spilling", "spills"),
        ("narrow", "narrow accesses in hot loops"),
        ("costly", "instructions, over 0.5"),
        ("inexact", "8 products taken from themselves"),
    ],
)
def test_a_bad_kernel_is_caught(kernel: str, fault: str, tmp_path: Path) -> None:
    """In a process of its own: here Triton interprets."""
    program = tmp_path / "bad_kernels.py"
    program.write_text(BAD_KERNELS, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(program), kernel]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert fault in done.stdout, done.stdout + done.stderr


BAD_KERNELS = """
import sys

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
def narrow(x_ptr, n, COLS: tl.constexpr):  # of the stores every second element is left out
    lane = tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float32)
    for start in tl.range(0, n, COLS):
        x = tl.load(x_ptr + start + lane)
        tl.store(x_ptr + start + 2 * lane, x * 2.0)


@triton.jit
def costly(x_ptr, n, COLS: tl.constexpr):
    lane = tl.arange(0, COLS)
    for start in tl.range(0, n, COLS):
        x = tl.load(x_ptr + start + lane)
        for _ in tl.static_range(8):
            x = x * x + 1.0
        tl.store(x_ptr + start + lane, x)


@triton.jit
def inexact(x_ptr, n, COLS: tl.constexpr):  # 0 for most finite numbers too; 8 of them a thread
    x = tl.load(x_ptr + tl.arange(0, COLS)) * 3.0
    tl.store(x_ptr + tl.arange(0, COLS), tl.where(x - x == 0.0, x, 0.0))


name = sys.argv[1]
cols = {"spilling": 131072}.get(name, 1024)
launch = codegen.Launch(globals()[name], (torch.empty(1 << 20), 1 << 20, cols), {"num_warps": 4}, f"bad {name}")
codegen.BUDGETS[launch.label] = codegen.Budget(instructions=0.5)
codegen._elements = lambda launch: cols // 128
print(codegen._line(codegen.examine(launch, "sm_90", codegen.TARGETS["sm_90"])))
"""


def test_a_single_row_compiles() -> None:
    """Triton makes constants of arguments that are 1."""
    done = codegen("--target", "sm_90", "--only", "1x1000 bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none+accuracy forward" in done.stdout


def test_it_refuses_the_interpreter() -> None:
    command = [sys.executable, "-m", "benchmarks.codegen"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
