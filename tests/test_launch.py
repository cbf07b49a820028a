"""Launches made ready once: that they start what Triton would start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastloss import backend

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(backend.triton_version() is None, reason="needs Triton")
def test_ready_launches_start_what_triton_would(tmp_path: Path) -> None:
    """Compiled for a GPU that is not there: calls alike and not, in turns, and each with nothing remembered."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "tests" / "fake_gpu.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "launches of" in done.stdout
