"""What the compiler makes of the kernels, without a GPU: a subset of ``python -m benchmarks.codegen``."""

from __future__ import annotations

import os
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
