"""``fastloss.SGD`` on meshes of processes: FSDP2, HSDP, tensor parallelism, both, and checkpoints between them.

What is right is what ``torch.optim.SGD`` gives in one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import meshes
import processes
import pytest
import reference
import torch
from torch import Tensor, nn

import fastloss

needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
pytestmark = [needs_processes, pytest.mark.slow]


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of checkpoints that two processes have written in the middle of a run."""
    folder = tmp_path_factory.mktemp("meshes")
    processes.together("meshes.py", 2, folder / "two", "save")
    return folder / "checkpoints"


@pytest.fixture(scope="module")
def four(saved_by_two: Path) -> dict[str, Any]:
    """What four processes computed together, and made of the checkpoints of two."""
    results: dict[str, Any] = processes.together("meshes.py", 4, saved_by_two.parent / "four", "train")
    return results


def alone(options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """In one process, by torch's optimizer in float64: parameters, momentum buffers and norms."""
    model = meshes.network()
    optimizer, norms = reference.trained(model, meshes.batches(), options)
    params = list(model.parameters())
    return [p.detach() for p in params], [optimizer.state[p]["momentum_buffer"] for p in params], norms


@pytest.mark.parametrize("options", list(meshes.OPTIONS))
@pytest.mark.parametrize("mesh", [name for name, sizes in meshes.MESHES.items() if sum(sizes.values()) == 4])
def test_training_on_a_mesh(four: dict[str, Any], mesh: str, options: str) -> None:
    """Step by step as in one process; each momentum lies as its parameter does; no gradient counts twice in the norm,
    and that takes one collective a step.
    """
    found = four[mesh][options]
    params, buffers, norms = alone(meshes.OPTIONS[options])
    torch.testing.assert_close(found["params"], params)
    torch.testing.assert_close(found["buffers"], buffers)
    assert found["sharded"] == (4 if mesh == "tensor" else len(params))
    assert found["placed"] == [True] * len(params)
    if "max_norm" in meshes.OPTIONS[options]:
        assert min(norms) > meshes.OPTIONS[options]["max_norm"]
        assert [float(norm) for norm in found["norms"]] == pytest.approx(norms, rel=1e-6)
        assert found["collectives"] == [1] * meshes.STEPS
    else:
        assert found["collectives"] == [0] * meshes.STEPS


# ----------------------------------------------------------------------------- checkpoints


def uninterrupted(checkpoint: str) -> list[Tensor]:
    """The whole run in one process: by torch's optimizer; in bfloat16, which it rounds otherwise, by this one."""
    dtype, options = meshes.CHECKPOINTS[checkpoint]
    if dtype == torch.float64:
        return alone(options)[0]
    model = meshes.network(dtype)
    optimizer = fastloss.SGD(model.parameters(), **options)
    for input, target in meshes.batches(dtype):
        meshes.step(model, optimizer, input, target)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("checkpoint", list(meshes.CHECKPOINTS))
@pytest.mark.parametrize("mesh", [name for name, sizes in meshes.MESHES.items() if sum(sizes.values()) == 4])
def test_saved_by_two_loaded_by_four(four: dict[str, Any], mesh: str, checkpoint: str) -> None:
    """``torch.distributed.checkpoint``; the tensors are cut up otherwise by those that go on with them."""
    torch.testing.assert_close(four[f"{mesh}: {checkpoint}"], uninterrupted(checkpoint))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # as it is meant
@pytest.mark.parametrize("checkpoint", list(meshes.CHECKPOINTS))
def test_saved_by_two_loaded_by_one(saved_by_two: Path, checkpoint: str) -> None:
    """In a program that knows nothing of processes."""
    found = meshes.second_half("one", checkpoint, saved_by_two / checkpoint)
    torch.testing.assert_close(found, uninterrupted(checkpoint))


# ----------------------------------------------------------------------------- collectives


@pytest.fixture
def eight() -> Iterator[None]:
    """The first of eight processes, the others of which are not there: what it sends is counted, and goes nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    torch.distributed.destroy_process_group()


def collectives(params: list[Any]) -> int:
    """Of a step with ``max_norm``."""
    from torch.distributed.tensor.debug import CommDebugMode

    params = [nn.Parameter(p) for p in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = fastloss.SGD(params, lr=0.1, max_norm=1.0)
    with CommDebugMode() as communication:
        optimizer.step()
    total: int = communication.get_total_counts()
    return total


@pytest.mark.usefixtures("eight")
def test_how_many_collectives_a_norm_takes() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def cut(mesh: Any, *places: Any) -> Any:
        return distribute_tensor(torch.ones(8, 8), mesh, places)

    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "shard", "tensor"))
    plane = mesh["shard", "tensor"]
    both = [cut(plane, Shard(0), Shard(1)), cut(plane, Shard(0), Replicate()), cut(plane, Replicate(), Shard(0))]
    whole_mesh = cut(mesh, Shard(0), Shard(0), Shard(1))
    line = cut(mesh["shard"], Shard(0))

    assert collectives([torch.ones(3)]) == 0
    assert collectives([cut(plane, Replicate(), Replicate()), torch.ones(3)]) == 0
    assert collectives([line, cut(mesh["replicate", "shard"], Replicate(), Shard(0)), torch.ones(3)]) == 1
    assert collectives([whole_mesh, *both, line, cut(mesh["tensor"], Shard(1))]) == 1  # over all processes
    assert collectives([line, cut(mesh["tensor"], Shard(1))]) == 2  # lines that neither holds
    assert collectives([*both, line]) == 2  # a plane of a greater mesh, dimension by dimension
    plane._flatten("shard_tensor")
    assert collectives([*both, line]) == 1  # there is a group of that plane now
    other = init_device_mesh("cpu", (4, 2), mesh_dim_names=("shard", "tensor"))
    assert collectives([line, cut(other["shard"], Shard(0))]) == 2  # of meshes that know nothing of each other
