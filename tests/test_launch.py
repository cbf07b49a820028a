"""Launches made ready once: that they start what Triton would start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastloss import backend

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.skipif(backend.triton_version() is None, reason="needs Triton")


def without_gpu(cache: Path, *command: str) -> str:
    """What a program prints that compiles for a GPU which is not there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_ready_launches_start_what_triton_would(tmp_path: Path) -> None:
    """Calls alike and not, in turns, and each with nothing remembered."""
    assert "launches of" in without_gpu(tmp_path, "tests.fake_gpu")


def test_the_host_side_is_timed(tmp_path: Path) -> None:
    lines = without_gpu(tmp_path, "benchmarks.host", "--launches", "--seconds", "0.05").splitlines()
    assert [line.split(" (")[0] for line in lines[1:-1]] == ["forward", "forward + backward", "accuracy"]


def test_the_host_side_of_a_step_is_timed(tmp_path: Path) -> None:
    options = ("--launches", "--scale", "100", "--seconds", "0.05")
    _, _, *lines, last = without_gpu(tmp_path, "benchmarks.sgd", *options).splitlines()
    assert [line.split(":")[0] for line in lines] == ["resnet50", "large", "small"]
    assert all("us a tensor" in line and line.endswith("where gradients have moved") for line in lines)
    assert last.startswith("0 bars missed")
