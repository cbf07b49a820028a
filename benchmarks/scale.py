"""The cost of the collectives on 2 to 16384 GPUs, on paper: ``python -m benchmarks.scale``.

Their number and their bytes are counted: the first process of a group makes the calls, and the others are not there.
Their time is a model: a latency by the number of steps, and the bytes by the bandwidth.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import fastloss

from .parallel import Sent, Step, by_loss_parallel, on_a_dtensor, sent_by
from .shared import markdown

GPUS_IN_A_NODE = 8
# GB/s of one GPU in one direction: NVLink 4 has 900 in both, and each GPU has an InfiniBand adapter of 400 Gbit/s
# (NVIDIA DGX H100 User Guide, https://docs.nvidia.com/dgx/dgxh100-user-guide). Whole nodes use all of their adapters.
NVLINK, ADAPTER = 450.0, 50.0
MEMORY, COMPUTE = 3000.0, 800.0  # GB/s and Tflop/s of an H100, as everywhere in docs/performance.md
ROWS, CLASSES, PARAMETERS, LAYERS = 8192, 128256, 8.03e9, 32  # Llama 3 8B and a batch of 8192 tokens
SHARDS = 64  # of HSDP: processes that share one copy of the parameters

SHARING = (2, 8, 64, 512, 4096, 16384)
PROCESSES = (8, 64, 512, 4096, 16384)


class Protocol(NamedTuple):
    """Latencies of NCCL in µs: of a start, and of a step over NVLink and over the network."""

    tree: tuple[float, float, float]
    ring: tuple[float, float, float]
    proxy: float  # the least that a ring's step over NVLink costs where there is a network too


# NCCL's own model, by which it chooses: src/graph/tuning.cc, baseLat, hwLat and the latencies made of them,
# https://github.com/NVIDIA/nccl/blob/b6475625fbcaa2c3c0e50eed2fa1255d7514d4a2/src/graph/tuning.cc
SHORT = Protocol(tree=(6.8, 0.6, 5.0), ring=(6.6, 0.6, 2.7), proxy=1.0)  # LL
LONG = Protocol(tree=(0.0, 28.0, 28.0), ring=(8.4, 3.4, 14.0), proxy=3.0)  # Simple


def ring(ranks: int, nodes: int, rounds: int, protocol: Protocol = SHORT) -> float:
    """Return the µs until a ring has gone round: once to gather or to scatter, twice to sum."""
    start, near, far = protocol.ring
    if nodes == 1:
        return start + rounds * (ranks - 1) * near
    between = 2 * nodes if rounds == 2 else nodes - 1
    return start + (rounds * (ranks - 1) - between) * max(near, protocol.proxy) + between * far


def tree(ranks: int, nodes: int, protocol: Protocol = SHORT) -> float:
    """Return the µs until a sum has gone up a tree and down again."""
    start, near, far = protocol.tree
    return start + 2 * ((ranks // nodes - 1) * near + int(math.log2(nodes)) * far)


def nodes_of(ranks: int) -> int:
    """Return the number of nodes, which processes fill one after the other."""
    return -(-ranks // GPUS_IN_A_NODE)


def bandwidth(ranks: int) -> float:
    """Return the GB/s at which each process of whole nodes sends."""
    return NVLINK if nodes_of(ranks) == 1 else min(NVLINK, ADAPTER * GPUS_IN_A_NODE)


def gathering(sent: Sent, ranks: int) -> float:
    """Return the µs of all-gathers."""
    return sent.collectives * ring(ranks, nodes_of(ranks), 1) + sent.bytes / bandwidth(ranks) / 1e3


def summing(sent: Sent, ranks: int) -> float:
    """Return the µs of all-reduces."""
    nodes = nodes_of(ranks)
    latency = min(ring(ranks, nodes, 2), tree(ranks, nodes))
    return sent.collectives * latency + sent.bytes / bandwidth(ranks) / 1e3


# ----------------------------------------------------------------------------- what is sent, counted


@contextmanager
def first_of(ranks: int) -> Iterator[Any]:
    """Make a mesh of processes of which only the first is there; what it sends goes nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def of_a_row(step: Step, ranks: int, rows: int = 16) -> Sent:
    """Count for a row whose classes all processes share, forward and backward in bfloat16."""
    with first_of(ranks) as mesh:
        logits = DTensor.from_local(torch.zeros(rows, 2, dtype=torch.bfloat16), mesh, [Shard(1)], run_check=False)
        target = torch.zeros(rows, dtype=torch.int64)
        sent = sent_by(lambda: step(logits.requires_grad_(), target))
    return Sent(sent.collectives, sent.bytes / rows)


def of_a_mean(ranks: int) -> Sent:
    """Count for the mean over rows that all processes share, forward and backward."""
    with first_of(ranks) as mesh:
        logits = DTensor.from_local(torch.zeros(4, 2), mesh, [Shard(0)], run_check=False).requires_grad_()
        target = DTensor.from_local(torch.zeros(4, dtype=torch.int64), mesh, [Shard(0)], run_check=False)
        sent = sent_by(lambda: fastloss.cross_entropy(logits, target).backward())
    check = 8 * 2 * (ranks - 1) / ranks  # of labels out of bounds, which the processes make on a CPU alone
    return Sent(sent.collectives - 1, sent.bytes - check)


def of_a_norm(ranks: int) -> Sent:
    """Count for the norm of gradients that are sharded over all processes, within ``SGD.step``."""
    with first_of(ranks) as mesh:
        local = [DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False) for _ in range(8)]
        params = [nn.Parameter(p) for p in local]
        for param in params:
            param.grad = torch.ones_like(param)
        return sent_by(fastloss.SGD(params, lr=0.1, momentum=0.9, max_norm=1.0).step)


def of_sharding(ranks: int, parameters: float, gathered: int = 2, scattered: int = 4) -> float:
    """Return the bytes that a process sends in a step of FSDP2: parameters forward and backward, and gradients."""
    return (2 * gathered + scattered) * parameters * (ranks - 1) / ranks


# ----------------------------------------------------------------------------- the tables


def sharing_the_classes() -> list[str]:
    """Return a table of a loss whose classes some processes share."""
    head = ["processes", "fastloss: collectives, bytes a row", "µs"]
    head += ["`loss_parallel`: collectives, bytes a row", "µs", "gathered logits: bytes a row", "µs"]
    rows = []
    for ranks in SHARING:
        cells = [f"{ranks}"]
        for step, time in ((on_a_dtensor, gathering), (by_loss_parallel, summing)):
            sent = of_a_row(step, ranks)
            batch = Sent(sent.collectives, sent.bytes * ROWS)
            cells += [f"{sent.collectives}, {sent.bytes:,.0f}", f"{time(batch, ranks):,.0f}"]
        logits = 2 * CLASSES * (ranks - 1) / ranks
        visits = 3 * ROWS * CLASSES / ranks * 2 / MEMORY / 1e3
        rows.append([*cells, f"{logits:,.0f}", f"{gathering(Sent(1, logits * ROWS), ranks):,.0f}", f"{visits:,.1f}"])
    return markdown([*head, "visits to the logits, µs"], rows)


def sharing_the_rows() -> list[str]:
    """Return a table of the other collectives of a step, where all processes share the rows."""
    compute = 6 * PARAMETERS * ROWS / COMPUTE / 1e12 * 1e3
    head = ["processes", "mean: collectives, bytes", "µs", "`max_norm`: collectives, bytes", "µs"]
    head += ["both, of a step's arithmetic", "FSDP2: GB", "ms", f"HSDP, {SHARDS} shards: GB", "ms"]
    rows = []
    for ranks in PROCESSES:
        sums = of_a_mean(ranks), of_a_norm(ranks)
        times = [summing(sent, ranks) for sent in sums]
        cells = [f"{ranks}"]
        for sent, time in zip(sums, times, strict=True):
            cells += [f"{sent.collectives}, {sent.bytes:.0f}", f"{time:.0f}"]
        flat, sharded = of_sharding(ranks, PARAMETERS), of_sharding(min(ranks, SHARDS), PARAMETERS)
        copies = max(1, ranks // SHARDS)
        summed = 2 * 4 * PARAMETERS / SHARDS * (copies - 1) / copies
        hsdp = _sharded_ms(min(ranks, SHARDS), sharded)
        if copies > 1:  # each process with those of the other copies that have its shards: one of a node
            hsdp += summed / ADAPTER / 1e6 + (LAYERS + 1) * tree(copies, copies, LONG) / 1e3
        cells += [
            f"{100 * sum(times) / 1e3 / compute:.3f} %",
            f"{flat / 1e9:.1f}",
            f"{_sharded_ms(ranks, flat):,.0f}",
        ]
        rows.append([*cells, f"{(sharded + summed) / 1e9:.1f}", f"{hsdp:,.0f}"])
    words = f"A step's arithmetic: 6 x {PARAMETERS:.3g} x {ROWS} operations, {compute:.0f} ms."
    return [*markdown(head, rows), "", words]


def _sharded_ms(ranks: int, sent: float) -> float:
    """Return the ms of two all-gathers and a reduce-scatter for each layer, and for the other parameters."""
    return sent / bandwidth(ranks) / 1e6 + 3 * (LAYERS + 1) * ring(ranks, nodes_of(ranks), 1, LONG) / 1e3


TABLES: dict[str, Callable[[], list[str]]] = {"classes": sharing_the_classes, "rows": sharing_the_rows}


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__).parse_args(argv)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    for name, table in TABLES.items():
        print(f"<!-- printed: benchmarks.scale {name} -->", *table(), "", sep="\n")
    return 0


if __name__ == "__main__":
    main()
