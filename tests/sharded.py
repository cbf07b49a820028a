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

    def clipped_by_operators(self, compiled: bool) -> dict[str, Any]:
        """A step with ``max_norm`` over DTensors, compiled or not."""
        import fastloss

        torch._dynamo.reset()
        values, (grads, *_) = tensors()
        params = [nn.Parameter(p) for p in self.placed(values)]
        optimizer = fastloss.SGD(params, lr=0.1, max_norm=0.5)
        for param, grad in zip(params, self.placed(grads), strict=True):
            param.grad = grad
        (torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiled else optimizer.step)()
        return {"norm": self.of_all(optimizer.grad_norm), "params": [whole(p) for p in params]}

    def of_all(self, tensor: Any) -> list[Tensor]:
        """Return the tensor of each process."""
        found = [torch.empty_like(tensor) for _ in range(PROCESSES)]
        torch.distributed.all_gather(found, tensor)
        return found

    def replicas(self, kind: str) -> dict[str, Any]:
        """Weights of 16 bits with stochastic rounding, where each process has a seed of its own."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Replicate, distribute_tensor
        from torch.nn.parallel import DistributedDataParallel

        import fastloss

        torch._dynamo.reset()
        torch.manual_seed(0)
        layer: Any = nn.Linear(16, 16, bias=False).bfloat16()
        if kind == "HSDP":
            mesh = init_device_mesh("cpu", (PROCESSES, 1), mesh_dim_names=("replicate", "shard"))
            model = fully_shard(layer, mesh=mesh)
        elif kind == "DDP":
            model = DistributedDataParallel(layer)
        else:
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), self.mesh, [Replicate()]))
            model = layer
        torch.manual_seed(5 + self.rank)
        before = whole(layer.weight)
        optimizer = fastloss.SGD(model.parameters(), lr=0.01, stochastic_rounding=True)
        step = torch.compile(optimizer.step, backend="aot_eager") if kind == "compiled" else optimizer.step
        for number in range(20):
            optimizer.zero_grad()
            if kind in ("DDP", "HSDP"):
                model(torch.randn(4, 16).bfloat16()).float().square().mean().backward()
            else:
                torch.manual_seed(number)
                grad = torch.randn(16, 16).bfloat16()
                layer.weight.grad = distribute_tensor(grad, self.mesh, [Replicate()])
                torch.manual_seed(7 * number + self.rank)
            step()
        found = self.of_all(layer.weight.to_local() if kind != "DDP" else layer.weight.detach())
        return {"replicas": found, "moved": bool((found[0] != before).any())}

    def rounded_shards(self) -> list[Tensor]:
        """Steps of a quarter of the distance of two numbers: the rows of two shards, rounded at random."""
        from torch.distributed.tensor import Shard, distribute_tensor

        import fastloss

        param = nn.Parameter(distribute_tensor(torch.ones(256, 64, dtype=torch.bfloat16), self.mesh, [Shard(0)]))
        param.grad = distribute_tensor(torch.full((256, 64), -(2.0**-9)).bfloat16(), self.mesh, [Shard(0)])
        optimizer = fastloss.SGD([param], lr=1.0, stochastic_rounding=True)
        values = []
        for _ in range(2):
            optimizer.step()
            values.append(whole(param))
        return values

    def mixed(self) -> dict[str, str]:
        """Return the errors that are raised for a whole gradient or state beside a DTensor parameter."""
        from torch.distributed.tensor import Shard, distribute_tensor

        import fastloss

        def cut() -> Any:
            return distribute_tensor(torch.ones(6, 4), self.mesh, [Shard(0)])

        param = nn.Parameter(cut())
        plain = nn.Parameter(torch.ones(6, 4))
        plain.grad = torch.ones(6, 4)
        whole_one = fastloss.SGD([plain], lr=0.1, momentum=0.9)
        whole_one.step()

        def first_gradient() -> None:
            param.grad = torch.ones(6, 4)
            fastloss.SGD([param], lr=0.1).step()

        def later_gradient() -> None:
            optimizer = fastloss.SGD([param], lr=0.1)
            for grad in (cut(), torch.ones(6, 4)):
                param.grad = grad
                optimizer.step()

        def loaded() -> None:
            fastloss.SGD([param], lr=0.1, momentum=0.9).load_state_dict(whole_one.state_dict())

        def put() -> None:
            optimizer = fastloss.SGD([param], lr=0.1, momentum=0.9)
            optimizer.state[param]["momentum_buffer"] = torch.ones(6, 4)
            param.grad = cut()
            optimizer.step()

        results = {}
        for call in (first_gradient, later_gradient, loaded, put):
            try:
                call()
            except (RuntimeError, ValueError) as error:
                results[call.__name__] = str(error)
        return results

    def plans(self) -> int:
        """The number of plans of ten steps over DTensors."""
        import fastloss

        values, grads = tensors()
        params = [nn.Parameter(p) for p in self.placed(values)]
        optimizer = fastloss.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)
        made = set()
        for number in range(10):
            for param, grad in zip(params, self.placed(grads[number % STEPS]), strict=True):
                param.grad = grad
            optimizer.step()
            made.add(optimizer._plan)
        return len(made)

    def replaced_shard(self) -> tuple[Tensor, Tensor]:
        """A DTensor that holds another local tensor after some steps, as FSDP2 gives it one."""
        from torch.distributed.tensor import Shard, distribute_tensor

        import fastloss

        param: Any = nn.Parameter(distribute_tensor(torch.ones(4, 3), self.mesh, [Shard(0)]))
        optimizer = fastloss.SGD([param], lr=0.5)
        for number in range(4):
            param.grad = distribute_tensor(torch.ones(4, 3), self.mesh, [Shard(0)])
            if number == 2:
                before = param._local_tensor
                param._local_tensor = before + 10.0
            optimizer.step()
        return whole(param), before.detach().clone()

    def flattened(self) -> dict[str, Any]:
        """FSDP1: an overflow on one process's shard; and ``max_norm``."""
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        import fastloss

        results: dict[str, Any] = {}
        for original in (False, True):
            for make in (torch.optim.SGD, fastloss.SGD):
                torch.manual_seed(0)
                layers = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
                model = FullyShardedDataParallel(layers, device_id=torch.device("cpu"), use_orig_params=original)
                optimizer: Any = make(model.parameters(), lr=0.1)
                scaler = ShardedGradScaler(device="cpu", init_scale=4.0)
                scaler.scale(model(torch.randn(4, 6)).square().mean()).backward()
                if self.rank == 0:
                    grad = next(p.grad for p in model.parameters() if p.grad is not None and p.grad.numel())
                    grad.view(-1)[0] = float("inf")
                before = [p.detach().clone() for p in model.parameters()]
                scaler.step(optimizer)
                scaler.update()
                moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
                found = self.of_all(torch.tensor([float(moved), scaler.get_scale()]))
                results[f"{make.__module__} {original}"] = [value.tolist() for value in found]
            try:
                fastloss.SGD(model.parameters(), lr=0.1, max_norm=1.0).step()
            except ValueError as error:
                results[f"max_norm {original}"] = str(error)
        return results


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
                "replicas": {kind: process.replicas(kind) for kind in ("DDP", "HSDP", "DTensor")},
                "rounded shards": process.rounded_shards(),
                "plans": process.plans(),
                "replaced shard": process.replaced_shard(),
            }
    results["checkpoints"] = process.checkpoints()
    results["compiled"] = process.compiled()
    results["clipped"] = [process.clipped_by_operators(compiled) for compiled in (False, True)]
    results["compiled replicas"] = process.replicas("compiled")
    results["mixed"] = process.mixed()
    results["flattened"] = process.flattened()
    leave(rank, folder, results)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
