"""A process of several that train on meshes of processes: ``python meshes.py RANK COUNT FOLDER JOB``.

The first of them writes to FOLDER what the tests of ``test_sgd_meshes.py`` then hold against one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from processes import join, leave, whole
from torch import Tensor, nn

ROWS = 8  # of a batch, over all processes
STEPS = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "nesterov": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "clipped": {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "max_norm": 0.05},
}
# What checkpoints are made of.
CHECKPOINTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float64": (torch.float64, {**OPTIONS["nesterov"], "max_norm": 0.5}),
    "bfloat16": (torch.bfloat16, {"lr": 0.01, "momentum": 0.9, "master_weights": True}),
    "float32 momentum": (torch.bfloat16, {"lr": 0.01, "momentum": 0.9, "momentum_dtype": torch.float32}),
}
# Sizes of the meshes, and which dimension does what.
MESHES: dict[str, dict[str, int]] = {
    "one": {},
    "shard": {"shard": 4},
    "shard 2": {"shard": 2},
    "replicate x shard": {"replicate": 2, "shard": 2},
    "tensor": {"tensor": 4},
    "shard x tensor": {"shard": 2, "tensor": 2},
}


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two layers that tensor parallelism cuts up, and two that it leaves alone; the last of them has one row."""
    torch.manual_seed(3)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 1)]
    return nn.Sequential(*layers).to(dtype)


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """A batch a step, of all processes together."""
    torch.manual_seed(4)
    return [(torch.randn(ROWS, 6).to(dtype), torch.randn(ROWS, 1).to(dtype)) for _ in range(STEPS)]


def step(model: nn.Module, optimizer: Any, input: Tensor, target: Tensor) -> None:
    """In bfloat16, whose mean over processes is rounded otherwise than one process's, with gradients made up."""
    optimizer.zero_grad()
    if input.dtype == torch.bfloat16:
        for param in model.parameters():
            param.grad = param.detach() * 0.375 + 1
    else:
        F.mse_loss(model(input), target).backward()
    optimizer.step()


def on_mesh(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The network on the mesh of that name, and a batch's share of this process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, sizes = network(dtype), MESHES[name]
    if not sizes:
        return model, lambda batch: batch
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    data = tuple(dim for dim in sizes if dim != "tensor")
    if "tensor" in sizes:
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if not data:
        return model, lambda batch: batch
    for layer in model:
        if not isinstance(layer, nn.Tanh):
            fully_shard(layer, mesh=mesh[data])
    fully_shard(model, mesh=mesh[data])
    parts = mesh[data].size()
    part = mesh[data].mesh.flatten().tolist().index(torch.distributed.get_rank())
    return model, lambda batch: batch.chunk(parts)[part]


def train(name: str, options: dict[str, Any]) -> dict[str, Any]:
    from torch.distributed.tensor.debug import CommDebugMode

    import fastloss

    model, share = on_mesh(name)
    optimizer = fastloss.SGD(model.parameters(), **options)
    norms, collectives = [], []
    for input, target in batches():
        optimizer.zero_grad()
        F.mse_loss(model(share(input)), share(target)).backward()
        with CommDebugMode() as communication:
            optimizer.step()
        collectives.append(communication.get_total_counts())
        norms.append(optimizer.grad_norm)
    placed = [
        type(buffer) is type(param.data)
        and getattr(buffer, "placements", None) == getattr(param, "placements", None)
        and getattr(buffer, "device_mesh", None) == getattr(param, "device_mesh", None)
        for param, buffer in ((p, optimizer.state[p]["momentum_buffer"]) for p in model.parameters())
    ]
    return {
        "params": [whole(p) for p in model.parameters()],
        "buffers": [whole(optimizer.state[p]["momentum_buffer"]) for p in model.parameters()],
        "placed": placed,
        "norms": norms,
        "collectives": collectives,
        "sharded": sum(hasattr(p, "placements") for p in model.parameters()),
    }


def first_half(name: str, checkpoint: str, to: Path) -> None:
    """Half of the steps, and a checkpoint by all processes together."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    import fastloss

    dtype, options = CHECKPOINTS[checkpoint]
    model, share = on_mesh(name, dtype)
    optimizer = fastloss.SGD(model.parameters(), **options)
    for input, target in batches(dtype)[: STEPS // 2]:
        step(model, optimizer, share(input), share(target))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=to)


def second_half(name: str, checkpoint: str, of: Path) -> list[Tensor]:
    """What comes of a new network and a new optimizer that take over there, on any mesh or on none."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    import fastloss

    dtype, options = CHECKPOINTS[checkpoint]
    model, share = on_mesh(name, dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    optimizer = fastloss.SGD(model.parameters(), **{**options, "lr": 7.0, "momentum": 0.1})
    weights, state = get_state_dict(model, optimizer)
    dcp.load(
        {"model": weights, "optimizer": state},
        checkpoint_id=of,
        no_dist=not torch.distributed.is_initialized(),
    )
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for input, target in batches(dtype)[STEPS // 2 :]:
        step(model, optimizer, share(input), share(target))
    return [whole(p) for p in model.parameters()]


def main(rank: int, count: int, folder: Path, job: str) -> None:
    join(rank, count, folder)
    names = [name for name, sizes in MESHES.items() if torch.Size(sizes.values()).numel() == count]
    results: dict[str, Any] = {}
    saved = folder.parent / "checkpoints"
    for name in names:
        if job == "train":
            results[name] = {which: train(name, options) for which, options in OPTIONS.items()}
        for checkpoint in CHECKPOINTS if job == "save" else ():
            first_half(name, checkpoint, saved / checkpoint)
        for checkpoint in CHECKPOINTS if job == "train" else ():
            results[f"{name}: {checkpoint}"] = second_half(name, checkpoint, saved / checkpoint)
    leave(rank, folder, results)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
