"""A process of several that train together: ``python sharded.py RANK COUNT FOLDER BACKEND...``.

The first of them writes to FOLDER what the tests of ``test_sgd_worlds.py`` then hold against one process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from processes import join, leave, whole
from torch import Tensor, nn

PROCESSES = 2
ROWS = 6  # of a batch, over all processes
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "clipped": {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "max_norm": 0.05},
    "tensor lr": {"lr": torch.tensor(0.1, dtype=torch.float64), "momentum": 0.9},
}
ROUNDINGS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "master": {"master_weights": True},
    "kahan": {"kahan_sum": True},
    "float32 momentum": {"momentum_dtype": torch.float32},
}
STEPS = 4


def network() -> nn.Module:
    """Float64; no layer's rows can be divided by two, and the last one's is only one."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    """A batch a step, of all processes together."""
    torch.manual_seed(4)
    return [(torch.randn(ROWS, 5).double(), torch.randn(ROWS, 1).double()) for _ in range(STEPS)]


def tensors(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters, and a gradient a step for each of them."""
    torch.manual_seed(5)
    shapes = [(7, 3), (3, 5), (4,), (6,), (5,)]
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    return params, [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(STEPS)]


def lies_as(state: dict[str, Any], param: Any) -> bool:
    """Return True if the momentum is a DTensor that lies as its parameter does."""
    buffer = state["momentum_buffer"]
    return bool(
        type(buffer).__name__ == "DTensor"
        and buffer.placements == param.placements
        and buffer.to_local().shape == param.to_local().shape
    )


class Process:
    """One of them."""

    def __init__(self, rank: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.rank = rank
        self.mesh = init_device_mesh("cpu", (PROCESSES,))

    def sharded_network(self) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        model = network()
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)
        return model

    def step(self, model: nn.Module, optimizer: Any, input: Tensor, target: Tensor) -> None:
        mine = slice(self.rank * ROWS // PROCESSES, (self.rank + 1) * ROWS // PROCESSES)
        optimizer.zero_grad()
        F.mse_loss(model(input[mine]), target[mine]).backward()  # FSDP takes the mean over the processes
        optimizer.step()

    def networks(self) -> dict[str, Any]:
        import fastloss

        results = {}
        for name, options in NETWORKS.items():
            model = self.sharded_network()
            optimizer = fastloss.SGD(model.parameters(), **options)
            norms = []
            for input, target in batches():
                self.step(model, optimizer, input, target)
                norms.append(optimizer.grad_norm)
            results[name] = {
                "params": [whole(p) for p in model.parameters()],
                "placed": [lies_as(optimizer.state[p], p) for p in model.parameters() if optimizer.state[p]],
                "norms": norms,
            }
        return results

    def checkpoints(self) -> dict[str, Any]:
        """Half of the steps, then a new network and a new optimizer take over; with torch's optimizer too."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        import fastloss

        results = {}
        common = NETWORKS["nesterov"]
        for flat in (False, True):
            for first, second in [(fastloss.SGD, fastloss.SGD), (torch.optim.SGD, fastloss.SGD)]:
                options = StateDictOptions(flatten_optimizer_state_dict=flat)
                model = self.sharded_network()
                optimizer: Any = first(model.parameters(), **common)
                for number, (input, target) in enumerate(batches()):
                    if number == STEPS // 2:
                        weights = get_model_state_dict(model)
                        saved = get_optimizer_state_dict(model, optimizer, options=options)
                        model = self.sharded_network()
                        optimizer = second(model.parameters(), **{**common, "lr": 7.0, "momentum": 0.1})
                        set_model_state_dict(model, weights)
                        if flat and first is not second:
                            break  # the groups' other options are not in torch's
                        set_optimizer_state_dict(model, optimizer, saved, options=options)
                    self.step(model, optimizer, input, target)
                else:
                    placed = [lies_as(optimizer.state[p], p) for p in model.parameters()]
                    params = [whole(p) for p in model.parameters()]
                    results[f"{first.__module__} {flat}"] = {"params": params, "placed": placed}
        return results

    def placed(self, values: list[Tensor]) -> list[Any]:
        """Two shards, a replica, a plain tensor and one more shard."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        places = [Shard(0), Shard(1), Replicate(), None, Shard(0)]
        return [
            value.clone() if place is None else distribute_tensor(value, self.mesh, [place])
            for value, place in zip(values, places, strict=True)
        ]

    def by_hand(self, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
        """DTensors of all placements in one optimizer, with gradients that are given."""
        import fastloss

        values, grads = tensors(dtype)
        params = [nn.Parameter(p) for p in self.placed(values)]
        optimizer = fastloss.SGD(params, lr=0.1, momentum=0.9, **options)
        norms = []
        for of_step in grads:
            for param, grad in zip(params, self.placed(of_step), strict=True):
                param.grad = grad
            optimizer.step()
            norms.append(optimizer.grad_norm)
        states = [{key: whole(value) for key, value in optimizer.state[p].items()} for p in params]
        placed = [lies_as(optimizer.state[p], p) for p in params if hasattr(p, "placements")]
        return {"params": [whole(p) for p in params], "states": states, "placed": placed, "norms": norms}

    def elsewhere_placed(self) -> dict[str, Any]:
        """Gradients that lie otherwise than their parameters: replicated, and as sums that are still to be taken."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

        import fastloss

        results = {}
        for max_norm in (None, 0.5):
            (value, *_), grads = tensors()
            param = nn.Parameter(distribute_tensor(value, self.mesh, [Shard(0)]))
            optimizer = fastloss.SGD([param], lr=0.1, momentum=0.9, max_norm=max_norm)
            for number, (grad, *_) in enumerate(grads):
                if number % 2:
                    param.grad = distribute_tensor(grad, self.mesh, [Replicate()])  # type: ignore[assignment]
                else:
                    param.grad = DTensor.from_local(grad / PROCESSES, self.mesh, [Partial()])  # type: ignore[assignment]
                optimizer.step()
            results[str(max_norm)] = whole(param)
        return results

    def strided(self) -> Tensor | None:
        """The norm of a parameter that is cut up as FSDP cuts up what tensor parallelism has cut up before."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor.placement_types import _StridedShard

        import fastloss

        place = [_StridedShard(0, split_factor=2)]
        param = nn.Parameter(DTensor.from_local(torch.zeros(4, 3), self.mesh, place))
        param.grad = DTensor.from_local(torch.full((4, 3), 1.0 + self.rank), self.mesh, place)
        optimizer = fastloss.SGD([param], lr=0.1, max_norm=1.0)
        optimizer.step()
        return optimizer.grad_norm

    def overflow(self) -> dict[str, Any]:
        """An infinity in one process's shard stops all of them, and none waits for another that has stopped."""
        import fastloss

        results = {}
        for max_norm in (None, 0.5):
            values, (grads, *_) = tensors(torch.float32)
            params = [nn.Parameter(p) for p in self.placed(values) if type(p) is not Tensor]
            optimizer = fastloss.SGD(params, lr=0.1, momentum=0.9, max_norm=max_norm)
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            after = []
            for number in range(3):
                scaler.scale(torch.zeros(()))
                scale = scaler.get_scale()
                with_infinity = [g.clone() * scale for g in grads]
                if number < 2:
                    with_infinity[0][-1 if number else 0, 0] = float("inf")  # of the last process, of the first one
                placed = [g for g in self.placed(with_infinity) if type(g) is not Tensor]  # torch's scaler mixes none
                for param, grad in zip(params, placed, strict=True):
                    param.grad = grad
                scaler.step(optimizer)
                scaler.update()
                after.append([whole(p) for p in params])
            results[str(max_norm)] = {"params": after, "scale": scaler.get_scale()}
        return results

    def compiled(self) -> list[Tensor]:
        """A compiled step over DTensors."""
        import fastloss

        values, grads = tensors()
        params = [nn.Parameter(p) for p in self.placed(values)]
        optimizer = fastloss.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)
        step = torch.compile(optimizer.step, backend="aot_eager")
        for of_step in grads:
            for param, grad in zip(params, self.placed(of_step), strict=True):
                param.grad = grad
            step()
        return [whole(p) for p in params]


def main(rank: int, count: int, folder: Path, names: list[str]) -> None:
    import fastloss

    join(rank, count, folder)
    process = Process(rank)
    results: dict[str, Any] = {}
    for name in names:
        with fastloss.use_backend(name):
            results[name] = {
                "networks": process.networks(),
                "by hand": {
                    **{name: process.by_hand(torch.bfloat16, **options) for name, options in ROUNDINGS.items()},
                    "float64": process.by_hand(torch.float64, weight_decay=0.1),
                    "clipped": process.by_hand(torch.float64, max_norm=0.5),
                },
                "elsewhere placed": process.elsewhere_placed(),
                "strided": process.strided(),
                "overflow": process.overflow(),
            }
    results["checkpoints"] = process.checkpoints()
    results["compiled"] = process.compiled()
    leave(rank, folder, results)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
