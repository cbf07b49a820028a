"""Past one GPU: the model of costs, the bytes that it counts, and the benchmark of losses with shared classes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not (ROOT / "benchmarks" / "scale.py").exists(),
    reason="needs the repository's benchmarks, and torch.distributed",
)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its modules, on the backend that serves by default."""
    monkeypatch.delenv("FASTLOSS_BACKEND", raising=False)
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("scale", "parallel")
    return type("Benchmarks", (), {name: importlib.import_module(f"benchmarks.{name}") for name in names})


# ----------------------------------------------------------------------------- what is sent


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch 2.13 has newer names for these, torch 2.11 has not
def test_bytes_of_known_collectives(benchmarks: Any) -> None:
    """Each of R processes sends (R − 1) / R of a gathered or scattered tensor, and twice that of a summed one."""
    import torch.distributed as dist
    import torch.distributed._functional_collectives as functional

    whole = torch.zeros(8, 3)  # 96 bytes

    def functional_ones() -> None:
        functional.wait_tensor(functional.all_gather_tensor(whole[:2], 0, dist.group.WORLD))
        functional.wait_tensor(functional.all_reduce(whole, "sum", dist.group.WORLD))
        functional.wait_tensor(functional.reduce_scatter_tensor(whole, "sum", 0, dist.group.WORLD))

    def others() -> None:
        dist.all_gather_into_tensor(whole, torch.zeros(2, 3))
        dist.all_reduce(whole, op=dist.ReduceOp.MAX)
        dist.reduce_scatter_tensor(torch.zeros(2, 3), whole)

    with benchmarks.scale.first_of(4):
        for calls in (functional_ones, others):
            assert benchmarks.parallel.sent_by(calls) == (3, 96 * 0.75 * (1 + 2 + 1))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of FSDP, about views and hooks
def test_bytes_of_fully_sharded_parameters(benchmarks: Any) -> None:
    """FSDP2 sends the formula's bytes, here in float32: parameters twice, and gradients once."""
    from torch.distributed.fsdp import fully_shard

    with benchmarks.scale.first_of(8) as mesh:
        model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
        for layer in model:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh)
        sent = benchmarks.parallel.sent_by(lambda: model(torch.zeros(2, 16)).sum().backward())
    assert sent.collectives == 3 * 3
    assert sent.bytes == benchmarks.scale.of_sharding(8, 3 * 256, gathered=4, scattered=4)


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_bytes_of_a_row(benchmarks: Any, ranks: int) -> None:
    """Each process sends two float64 numbers to each other one, for any number of classes, and never the logits."""
    sent = benchmarks.scale.of_a_row(benchmarks.parallel.on_a_dtensor, ranks)
    assert sent == (1, 16 * (ranks - 1))
    assert benchmarks.scale.of_a_mean(ranks) == (2, pytest.approx(2 * 24 * (ranks - 1) / ranks))
    assert benchmarks.scale.of_a_norm(ranks) == (1, pytest.approx(2 * 8 * (ranks - 1) / ranks))


# ----------------------------------------------------------------------------- the model


def test_latencies(benchmarks: Any) -> None:
    """By hand, from NCCL's numbers: within a node, on two of them, and on many."""
    scale = benchmarks.scale
    assert scale.ring(8, 1, 1) == pytest.approx(6.6 + 7 * 0.6)
    assert scale.ring(8, 1, 2) == pytest.approx(6.6 + 14 * 0.6)
    assert scale.ring(16, 2, 1) == pytest.approx(6.6 + 14 * 1.0 + 1 * 2.7)
    assert scale.ring(16, 2, 2, scale.LONG) == pytest.approx(8.4 + (30 - 4) * 3.4 + 4 * 14.0)
    assert scale.tree(64, 8) == pytest.approx(6.8 + 2 * (7 * 0.6 + 3 * 5.0))
    few = benchmarks.parallel.Sent(2, 8.0)
    assert scale.summing(few, 64) == pytest.approx(2 * scale.tree(64, 8) + 8 / 400e3)
    assert scale.summing(few, 8) == pytest.approx(2 * min(scale.ring(8, 1, 2), scale.tree(8, 1)) + 8 / 450e3)


def test_the_page_shows_what_is_printed(benchmarks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Every table of the section, and every number of its text."""
    benchmarks.scale.main([])
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Past one GPU$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    tables = re.findall(r"(<!-- printed: benchmarks\.scale \w+ -->\n(?:\|.*\n)+)", printed)
    assert len(tables) == len(benchmarks.scale.TABLES) == section.count("<!-- printed:")
    for table in tables:
        assert table in section
    assert printed.splitlines()[-2] in section  # of the step's arithmetic


# ----------------------------------------------------------------------------- the benchmark


LINE = re.compile(
    r"  (?P<name>\S.*?) +error (?P<error>\S+)  (?P<collectives>\d+) collectives +(?P<bytes>[\d.]+) bytes a row"
    r" +(?P<ms>[\d.]+) ms  ratio +(?P<ratio>[\d.]+)"
)


@pytest.mark.slow
def test_the_benchmark_runs(benchmarks: Any) -> None:
    arguments = ["--shape", "24,1001", "--shape", "16,64", "--rounds", "2", "--dtype", "float64"]
    out = processes.torchrun(2, "-m", "benchmarks.parallel", *arguments)
    head, what, *lines = out.splitlines()
    assert head.startswith("fastloss ")
    assert "2 processes, gloo" in head
    assert what.startswith("forward + backward")
    assert re.fullmatch(r"in \d+ s", lines.pop())
    each = len(benchmarks.parallel.CONTENDERS)
    shapes = [lines[: each + 1], lines[each + 1 :]]
    assert [shape.pop(0) for shape in shapes] == [
        "(24, 1001) float64, 500.5 classes for each process",
        "(16, 64) float64, 32 classes for each process",
    ]
    for shape in shapes:
        found = [LINE.fullmatch(line) for line in shape]
        assert all(found), shape
        by_name = {match["name"]: match for match in found if match}
        assert set(by_name) == set(benchmarks.parallel.CONTENDERS)
        assert all(float(match["error"]) < 1e-12 for match in by_name.values())
        assert by_name[benchmarks.parallel.OURS]["ratio"] == "1.000"
        assert by_name[benchmarks.parallel.OURS]["bytes"] == "16.0"


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """Of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'm'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tensor",))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["fastloss, DTensor", "fastloss, group", "loss_parallel"])
def test_a_wrong_contender_is_not_timed(
    benchmarks: Any, mesh: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A gradient that is off by a hundredth; the program fails if it is fastloss's."""

    def wrong(logits: Any, target: Tensor) -> Tensor:
        return torch.autograd.grad(F.cross_entropy(logits.full_tensor(), target) * 1.01, logits)[0]

    monkeypatch.setitem(benchmarks.parallel.CONTENDERS, name, wrong)
    said: list[str] = []
    right = benchmarks.parallel.compare((8, 32), torch.float32, mesh, 1, said.append)
    assert right == (name == "loss_parallel")
    for line in said[1:]:
        assert ("WRONG" in line) == line.startswith(f"  {name} ")
        assert ("ms" in line) == ("WRONG" not in line)
