"""A loss whose vocabulary is divided among 2 to 8 processes: ``torchrun --nproc-per-node N -m benchmarks.parallel``.

fastloss on a DTensor and on a process group, beside torch's ``loss_parallel`` and beside gathering the logits.
Forward and backward, in turns; the time is that of the slowest process. Each is held against float64 before it is
timed. On GPUs with NCCL, where there is one for each process, else on the CPU with gloo.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils._pytree import tree_leaves

import fastloss
from fastloss.measuring.clock import in_turns, seconds
from fastloss.measuring.machine import peak_bytes

from .shared import circumstances, header, name_of

Step = Callable[[Any, Tensor], Any]  # the gradient of logits that are a DTensor, from them and labels

GPU_SHAPES = ((8192, 32000), (4096, 128256), (8192, 128256), (8192, 262144))
CPU_SHAPES = ((512, 32000),)
CHECKED_ROWS = 64
OURS = "fastloss, DTensor"
GATHERED = "gathered, F.cross_entropy"
_AT_ONCE = 1e-9  # seconds: as many rounds as are asked for, and no more
_TIMES_GATHERED = 4.0  # an error past so many times that of the gathered form is wrong


def _step(loss: Callable[[Any, Tensor], Tensor]) -> Step:
    """Return the step of a loss; to add the gradient to ``.grad`` torch 2.11 gathers shards of unequal sizes."""
    return lambda logits, target: torch.autograd.grad(loss(logits, target), logits)[0]


def _on_a_group(logits: Any, target: Tensor) -> Tensor:
    return fastloss.cross_entropy(logits.to_local(), target, group=logits.device_mesh.get_group())


on_a_dtensor, by_loss_parallel = _step(fastloss.cross_entropy), loss_parallel()(_step(F.cross_entropy))
CONTENDERS: dict[str, Step] = {
    OURS: on_a_dtensor,
    "fastloss, group": _step(_on_a_group),
    "loss_parallel": by_loss_parallel,
    GATHERED: _step(lambda logits, target: F.cross_entropy(logits.full_tensor(), target)),
    "gathered, fastloss": _step(lambda logits, target: fastloss.cross_entropy(logits.full_tensor(), target)),
}


def random_inputs(
    rows: int, classes: int, dtype: torch.dtype, mesh: DeviceMesh, *, seed: int = 0
) -> tuple[Any, Tensor]:
    """Return logits ``(rows, classes)``, of which each process makes its own shard, and labels that all have."""
    device, rank, shard = mesh.device_type, mesh.get_local_rank(), -(-classes // mesh.size())
    generator = torch.Generator(device).manual_seed(seed * 1000 + rank)
    width = max(0, min(shard, classes - rank * shard))
    local = torch.randn(rows, width, generator=generator, device=device).mul_(3).to(dtype)
    shape, stride = torch.Size([rows, classes]), (classes, 1)
    logits = DTensor.from_local(local, mesh, [Shard(1)], run_check=False, shape=shape, stride=stride)
    target = torch.randint(classes, (rows,), generator=torch.Generator(device).manual_seed(seed), device=device)
    target[::7] = -100
    return logits.requires_grad_(), target


class Sent(NamedTuple):
    """The collectives and bytes of one process."""

    collectives: int
    bytes: float


def sent_by(call: Callable[[], object]) -> Sent:
    """Count the collectives of ``call`` and their bytes, those of its backward passes too."""
    with _Wire() as wire:
        call()
    return Sent(wire.collectives, wire.bytes)


class _Wire(CommDebugMode):
    """CommDebugMode, and the bytes: each of R processes sends (R − 1) / R of a tensor that is gathered or scattered,
    and twice that of one that is summed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives, self.bytes = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.get_total_counts()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.get_total_counts() > before:
            name, ranks = func._schema.name, _group(args).size()
            whole = max(tensor.nbytes for tensor in tree_leaves((args, out)) if isinstance(tensor, Tensor))
            twice = 2 if "reduce" in name and "scatter" not in name else 1
            self.collectives += 1
            self.bytes += twice * whole * (ranks - 1) / ranks
        return out


def _group(args: Any) -> Any:
    """Return a collective's group: its last argument's name or, in torch.distributed's own, an object among them."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(arg)
            except RuntimeError:  # another object
                continue
    name = [arg for arg in args if isinstance(arg, str)][-1]
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def error_of(step: Step, logits: Any, target: Tensor) -> float:
    """Return the norm of the gradient's error over that of the float64 gradient, over all processes."""
    local = step(logits, target).redistribute(placements=logits.placements).to_local().double()
    whole = logits.detach().full_tensor().double().requires_grad_()
    exact, mesh = _step(F.cross_entropy)(whole, target), logits.device_mesh
    shard = exact[:, mesh.get_local_rank() * -(-exact.shape[1] // mesh.size()) :][:, : local.shape[1]]
    squares = torch.stack([(local - shard).square().sum(), shard.square().sum()])
    dist.all_reduce(squares)
    return float((squares[0] / squares[1]).sqrt())


def times(steps: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[float]:
    """Return the median in ms of each step, of the slowest process; every round takes each of them."""

    def of_this_process(step: Callable[[], object]) -> float:
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return seconds(step, device)

    in_turns(steps, of_this_process, budget=_AT_ONCE, least=2)  # to warm up
    turns = in_turns(steps, of_this_process, budget=_AT_ONCE, least=rounds)
    table = torch.tensor(turns, dtype=torch.float64, device=device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return [1e3 * statistics.median(times) for times in table.tolist()]


def compare(shape: tuple[int, int], dtype: torch.dtype, mesh: Any, rounds: int, say: Callable[[str], None]) -> bool:
    """Check and time all contenders at one shape; return False if fastloss is wrong."""
    rows, classes = shape
    say(f"({rows}, {classes}) {name_of(dtype)}, {classes / mesh.size():g} classes for each process")
    few = random_inputs(min(rows, CHECKED_ROWS), classes, dtype, mesh, seed=1)
    errors = {name: error_of(step, *few) for name, step in CONTENDERS.items()}
    bar = _TIMES_GATHERED * max(errors[GATHERED], torch.finfo(dtype).eps)
    sent = {name: sent_by(partial(step, *few)) for name, step in CONTENDERS.items()}
    inputs = random_inputs(rows, classes, dtype, mesh)
    right = {name: partial(step, *inputs) for name, step in CONTENDERS.items() if errors[name] <= bar}
    took = dict(zip(right, times(list(right.values()), rounds, inputs[1].device), strict=True))
    for name, error in errors.items():
        line = f"  {name:26} error {error:.1e}"
        line += f"  {sent[name].collectives} collectives  {sent[name].bytes / len(few[1]):10.1f} bytes a row"
        if name not in right:
            say(f"{line}  WRONG: more than {_TIMES_GATHERED:g} x that of the gathered form")
            continue
        line += f"  {took[name]:9.3f} ms"
        if OURS in took:
            line += f"  ratio {took[OURS] / took[name]:6.3f}"
        if inputs[1].is_cuda:
            line += f"  {peak_bytes(right[name], inputs[1].device) / 1e6:9.1f} MB"
        say(line)
    return all(name in right for name in CONTENDERS if name.startswith("fastloss"))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; exit code 1 if fastloss is wrong."""
    parser = argparse.ArgumentParser(prog="torchrun -m benchmarks.parallel", description=__doc__)
    parser.add_argument("--shape", action="append", metavar="ROWS,CLASSES", help="may be given again")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32", "float64"])
    parser.add_argument("--rounds", type=int, default=20, help="calls of each (default 20)")
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("several processes are needed: torchrun --nproc-per-node 2 -m benchmarks.parallel")
    on_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("tensor",))

    def say(line: str) -> None:
        if dist.get_rank() == 0:
            print(line, flush=True)

    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpus else "float32"))
    shapes: Sequence[tuple[int, ...]] = GPU_SHAPES if on_gpus else CPU_SHAPES
    if arguments.shape:
        shapes = [tuple(map(int, shape.split(","))) for shape in arguments.shape]
    say(header(f"{mesh.size()} processes, {'NCCL' if on_gpus else 'gloo'}", circumstances(device)))
    say("forward + backward; ratio: fastloss's time on a DTensor over the other's")
    start = time.monotonic()
    right = [compare((rows, classes), dtype, mesh, arguments.rounds, say) for rows, classes in shapes]
    say(f"in {time.monotonic() - start:.0f} s")
    dist.barrier()  # a process that leaves first takes its connections with it
    dist.destroy_process_group()
    return 0 if all(right) else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # gloo's threads may still hold tensors, and one that is freed while Python shuts down aborts the process:
    # https://github.com/pytorch/pytorch/pull/179291
    os._exit(code)
