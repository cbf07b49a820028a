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
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fastloss

from .measure import by_events, by_the_clock, circumstances, header
from .wire import sent_by

Step = Callable[[Any, Tensor], None]  # forward and backward of logits that are a DTensor, and labels

GPU_SHAPES = ((8192, 32000), (4096, 128256), (8192, 128256), (8192, 262144))
CPU_SHAPES = ((512, 32000),)
CHECKED_ROWS = 64
OURS = "fastloss, DTensor"
GATHERED = "gathered, F.cross_entropy"
_TIMES_PLAIN = 4.0  # an error past so many times that of the gathered form is pointed at


def on_a_dtensor(logits: Any, target: Tensor) -> None:
    fastloss.cross_entropy(logits, target).backward()


def on_a_group(logits: Any, target: Tensor) -> None:
    """Of what each process has, without DTensors."""
    fastloss.cross_entropy(logits.to_local(), target, group=logits.device_mesh.get_group()).backward()


def by_loss_parallel(logits: Any, target: Tensor) -> None:
    from torch.distributed.tensor.parallel import loss_parallel

    with loss_parallel():
        F.cross_entropy(logits, target).backward()


def by_gathering(logits: Any, target: Tensor) -> None:
    F.cross_entropy(logits.full_tensor(), target).backward()


def by_gathering_for_ours(logits: Any, target: Tensor) -> None:
    fastloss.cross_entropy(logits.full_tensor(), target).backward()


CONTENDERS: dict[str, Step] = {
    OURS: on_a_dtensor,
    "fastloss, group": on_a_group,
    "loss_parallel": by_loss_parallel,
    GATHERED: by_gathering,
    "gathered, fastloss": by_gathering_for_ours,
}


@dataclass(frozen=True)
class Problem:
    """Logits ``(rows, classes)``, cut up by class, and labels that all processes have."""

    logits: Any
    target: Tensor

    @staticmethod
    def random(rows: int, classes: int, dtype: torch.dtype, mesh: Any, seed: int = 0) -> Problem:
        """Each process makes its own shard, for the whole may not fit."""
        from torch.distributed.tensor import DTensor, Shard

        shard = -(-classes // mesh.size())
        rank = mesh.get_local_rank()
        mine = max(0, min(shard, classes - rank * shard))
        generator = torch.Generator(mesh.device_type).manual_seed(seed * 1000 + rank)
        local = torch.randn(rows, mine, generator=generator, device=mesh.device_type).mul_(3).to(dtype)
        shape, stride = torch.Size([rows, classes]), (classes, 1)
        logits = DTensor.from_local(local, mesh, [Shard(1)], run_check=False, shape=shape, stride=stride)
        labels = torch.Generator(mesh.device_type).manual_seed(seed)
        target = torch.randint(classes, (rows,), generator=labels, device=mesh.device_type)
        target[::7] = -100
        return Problem(logits.requires_grad_(), target)

    def step(self, step: Step) -> None:
        self.logits.grad = None
        step(self.logits, self.target)

    def error(self, step: Step) -> float:
        """Of the gradient against float64, relative: the norm of the difference over the norm, over all processes."""
        self.step(step)
        mine = self.logits.grad.redistribute(placements=self.logits.placements).to_local().double()
        whole = self.logits.detach().full_tensor().double().requires_grad_()
        F.cross_entropy(whole, self.target).backward()
        assert whole.grad is not None
        shard = -(-whole.shape[1] // self.logits.device_mesh.size())
        exact = whole.grad[:, self.logits.device_mesh.get_local_rank() * shard :][:, : mine.shape[1]]
        squares = torch.stack([(mine - exact).square().sum(), exact.square().sum()])
        dist.all_reduce(squares)
        return float((squares[0] / squares[1]).sqrt())


def times(problem: Problem, steps: Sequence[Step], rounds: int) -> list[float]:
    """The median in ms of each, of the slowest process; every round takes each of them."""
    on_gpus = problem.target.is_cuda
    found = torch.zeros(rounds, len(steps), dtype=torch.float64)
    for round in range(-2, rounds):  # two to warm up
        for number, step in enumerate(steps):
            dist.barrier()
            if on_gpus:
                seconds = by_events(lambda step=step: problem.step(step), 1)  # type: ignore[misc]
            else:
                seconds = by_the_clock(lambda step=step: problem.step(step))  # type: ignore[misc]
            if round >= 0:
                found[round, number] = seconds
    found = found.to(problem.target.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [1e3 * statistics.median(column) for column in found.t().tolist()]


def peak(problem: Problem, step: Step) -> int:
    """The most bytes that a GPU holds beyond the logits."""
    torch.cuda.synchronize()
    problem.logits.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    problem.step(step)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def compare(shape: tuple[int, int], dtype: torch.dtype, mesh: Any, rounds: int, say: Callable[[str], None]) -> bool:
    """Checks and times everybody at one shape. Is fastloss right?"""
    rows, classes = shape
    say(
        f"({rows}, {classes}) {str(dtype).removeprefix('torch.')}, {classes / mesh.size():g} classes for each process"
    )
    small = Problem.random(min(rows, CHECKED_ROWS), classes, dtype, mesh, seed=1)
    errors = {name: small.error(step) for name, step in CONTENDERS.items()}
    bar = _TIMES_PLAIN * max(errors[GATHERED], torch.finfo(dtype).eps)
    right = {name: error <= bar for name, error in errors.items()}
    sent = {name: sent_by(lambda step=step: small.step(step)) for name, step in CONTENDERS.items()}  # type: ignore[misc]
    problem = Problem.random(rows, classes, dtype, mesh)
    names = [name for name in CONTENDERS if right[name]]
    took = dict(zip(names, times(problem, [CONTENDERS[name] for name in names], rounds), strict=True))
    for name, error in errors.items():
        line = f"  {name:26} error {error:.1e}"
        line += f"  {sent[name].collectives} collectives  {sent[name].bytes / len(small.target):10.1f} bytes a row"
        if not right[name]:
            say(f"{line}  WRONG: more than {_TIMES_PLAIN:g} x that of the gathered form")
            continue
        line += f"  {took[name]:9.3f} ms"
        if OURS in took:
            line += f"  ratio {took[OURS] / took[name]:6.3f}"
        if problem.target.is_cuda:
            line += f"  {peak(problem, CONTENDERS[name]) / 1e6:9.1f} MB"
        say(line)
    return all(right[name] for name in CONTENDERS if name.startswith("fastloss"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.parallel", description=__doc__)
    parser.add_argument("--shape", action="append", metavar="ROWS,CLASSES", help="may be given again")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32", "float64"])
    parser.add_argument("--rounds", type=int, default=20, help="calls of each (default 20)")
    arguments = parser.parse_args(argv)

    from torch.distributed.device_mesh import init_device_mesh

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
    start, right = time.monotonic(), True
    for rows, classes in shapes:
        right &= compare((rows, classes), dtype, mesh, arguments.rounds, say)
    say(f"in {time.monotonic() - start:.0f} s")
    dist.destroy_process_group()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
