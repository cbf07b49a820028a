"""Launches made ready once: that they start what Triton would start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import Place
from torch import Tensor

import fastloss
from fastloss.backends import choice

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.skipif(choice.triton_version() is None, reason="needs Triton")


def without_gpu(cache: Path, *command: str, codes: tuple[int, ...] = (0,)) -> str:
    """Return the output of a program that compiles for a GPU which is not there; it ends with one of these codes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode in codes, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_ready_launches_start_what_triton_would(tmp_path: Path) -> None:
    """Calls alike and not, in turns, and each with nothing remembered."""
    assert "launches of" in without_gpu(tmp_path, "tests.fake_gpu")


FORMS = ["plain forward+gradient", "accuracy forward+gradient", "smoothing", "softcap", "none", "backward", "soft"]
FORMS += ["statistics", "shard", "chunk", "rescale", "accuracy alone", "sgd "]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 120])
def test_no_launch_needs_more_shared_memory_than_the_gpu_has(tmp_path: Path, capability: int) -> None:
    """Programs have 64 KB of it, 99, 163 or 227, by the GPU."""
    lines = without_gpu(tmp_path, "tests.fake_gpu", str(capability)).splitlines()
    for form in FORMS:
        assert any(form in line and line.endswith(" fits") for line in lines), form


@pytest.mark.parametrize(
    ("shared", "stages"), [(65536, [2, 1]), (101376, [3, 2]), (166912, [3, 3]), (232448, [3, 3])]
)
def test_rows_on_their_way_lie_in_shared_memory(
    monkeypatch: pytest.MonkeyPatch, shared: int, stages: list[int]
) -> None:
    """Rows of 32 KB and of 64 KB; where no row fits beside the one in registers, blocks of them are visited."""
    choice.load("triton")
    tiles: Any = sys.modules["fastloss.kernels.tiles"]
    monkeypatch.setattr(tiles, "_shared_bytes", lambda device: shared)
    rows = [(torch.bfloat16, 16384), (torch.bfloat16, 32768), (torch.float32, 16384)]
    for (dtype, classes), expected in zip(rows, (*stages, stages[1]), strict=True):
        logits = torch.empty(4096, classes, 1, dtype=dtype, device="meta")
        chosen = tiles.plan(logits, logits, plain=True)
        assert (chosen.stages, chosen.looped) == (expected, expected == 1)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_launch_is_shared_by_calls_that_differ(
    kernels: Place, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, reduction: str
) -> None:
    """In dtypes, alignments or numbers: of the losses, and of the linear map's, whose chunks begin at any row."""
    choice.load("triton")
    kept: dict[int, tuple[object, object]] = {}
    launch: Any = sys.modules["fastloss.kernels.launch"].Launch
    call = launch.__call__

    def kinds(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(kinds, argument))
        return (argument.dtype, argument.data_ptr() % 16) if isinstance(argument, Tensor) else argument

    def checked(self: Any, *arguments: Any) -> None:
        before = kept.setdefault(id(self), (self, kinds(arguments)))[1]
        assert kinds(arguments) == before, self._kernel
        call(self, *arguments)

    monkeypatch.setattr(launch, "__call__", checked)
    rows, classes = 6, 64
    how: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}
    for start in (0, 1):
        memory = torch.randn(rows * classes + 1, device=kernels.device).to(dtype)
        x = memory[start : start + rows * classes].view(rows, classes).requires_grad_()
        labels = torch.randint(classes, (rows,), device=kernels.device)
        soft = torch.rand(rows, classes, device=kernels.device).to(dtype).requires_grad_()
        hidden, head = (torch.randn(n, 8, device=kernels.device).to(dtype).requires_grad_() for n in (rows, classes))
        for target in (labels, soft[:, :1].expand(rows, classes)):
            loss = fastloss.cross_entropy(x, target, **how)
            loss.backward(torch.ones_like(loss))
        for size in (None, 5):
            more: dict[str, Any] = {**how, "chunk_size": size}
            for accumulate_grad in (False, True):
                loss = fastloss.linear_cross_entropy(hidden, head, labels, accumulate_grad=accumulate_grad, **more)
                loss.backward(torch.ones_like(loss))
        fastloss.accuracy(x.detach(), labels)


@pytest.mark.slow
def test_the_tuner_prints_what_it_tried(tmp_path: Path) -> None:
    """And writes it; that the numbers are wrong is said, as nothing has run."""
    record = tmp_path / "tiles.jsonl"
    head, *lines = without_gpu(tmp_path, "tests.fake_gpu", "tune", str(record)).splitlines()
    assert "A GPU compiled in " in head
    for shape in ("64x50257", "64x1000"):
        (number,) = (i for i, line in enumerate(lines) if line.startswith(f"gradient {shape} copy "))
        assert re.search(r"; now as it is: \d+\.\d{4} ms \d+ GB/s \d+\.\d{3}", lines[number])
        assert re.match(r"  (as it is|loop|tile).*: \d+\.\d{4} ms ", lines[number + 1])
    tried = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    assert [each["classes"] for each in tried if each["choice"] == "as it is"] == [50257, 1000]
    assert any(each["choice"].startswith("loop 1x4096 w4 s3, ") for each in tried)


@pytest.mark.slow
def test_the_host_side_is_timed(tmp_path: Path) -> None:
    lines = without_gpu(tmp_path, "benchmarks.host", "--launches", "--seconds", "0.05", codes=(0, 1)).splitlines()
    names = ["forward", "forward + backward", "forward + backward + top-1", "soft targets, forward + backward"]
    names += ["statistics, forward + backward", "accuracy", "linear, forward + backward, six chunks"]
    assert [line.split(" (")[0] for line in lines[1:-1]] == names
    assert lines[-1].endswith("bars missed")


@pytest.mark.slow
def test_the_host_side_of_a_step_is_timed(tmp_path: Path) -> None:
    options = ("--launches", "--scale", "100", "--seconds", "0.05")
    _, _, *lines, last = without_gpu(tmp_path, "benchmarks.sgd", *options).splitlines()
    assert [line.split(":")[0] for line in lines] == ["resnet50", "large", "small"]
    assert all("us a tensor" in line and line.endswith("where gradients have moved") for line in lines)
    assert all(re.search(r"  fused=True +\d+\.\d{3} ratio +\d+\.\d{3}  ", line) for line in lines)
    assert last.startswith("0 bars missed")
