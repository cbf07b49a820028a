"""A process of two that count together: ``python counting.py RANK COUNT FOLDER``.

What each counted, and what they made of it, with torchmetrics and without.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from metric_classes import ALONE, metric_class
from processes import join, leave
from torch import Tensor

BATCHES = 3


def batch(rank: int, number: int) -> tuple[Tensor, Tensor]:
    """Of unequal lengths; the last process's first one counts no row."""
    generator = torch.Generator().manual_seed(10 * rank + number)
    rows = 5 + 3 * rank + number
    target = torch.randint(7, (rows,), generator=generator)
    return torch.randn(rows, 7, generator=generator), torch.full_like(target, -100) if rank and not number else target


def sharded_batch() -> tuple[Tensor, Tensor]:
    """For both processes together; an odd number of rows, and of classes."""
    generator = torch.Generator().manual_seed(5)
    target = torch.randint(7, (11,), generator=generator)
    target[2] = target[9] = -100
    return torch.randn(11, 7, generator=generator), target


def count_sharded(rank: int, classes: Any) -> dict[str, dict[str, Any]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    scores, target = sharded_batch()
    by_rows = distribute_tensor(scores, mesh, [Shard(0)])
    one_hot = torch.nn.functional.one_hot(target.clamp(min=0), 7)
    batches: dict[str, tuple[Any, Any]] = {
        "rows": (by_rows, distribute_tensor(target, mesh, [Shard(0)])),
        "replicated target": (by_rows, distribute_tensor(target, mesh, [Replicate()])),
        "dense rows": (by_rows, distribute_tensor(one_hot, mesh, [Shard(0)])),
        "classes": (distribute_tensor(scores, mesh, [Shard(1)]), target),
        "group": (scores.tensor_split(2, dim=1)[rank], target),
    }
    results = {}
    for name, pair in batches.items():
        metric = classes((1, 3), group=torch.distributed.group.WORLD if name == "group" else None)
        metric.update(*pair)
        results[name] = {"own": metric.counts, "all": metric.compute()}
    return results


def count(rank: int, classes: Any) -> dict[str, Any]:
    from torch.distributed.tensor.debug import CommDebugMode

    alone = torch.distributed.new_group([0])
    both = torch.distributed.new_group([0, 1])
    together, apart = classes((1, 3), process_group=both), classes((1, 3), sync_on_compute=False)
    first = classes((1, 3), process_group=alone)
    results: dict[str, Any] = {"batches": []}
    for number in range(BATCHES):
        for metric in (apart, first):
            value = metric(*batch(rank, number))
        results["batches"].append(value)
    with CommDebugMode() as communication:
        for number in range(BATCHES):
            together.update(*batch(rank, number))
    results["before compute"] = communication.get_total_counts()
    with CommDebugMode() as communication:
        results["together"] = together.compute()
    results["of compute"] = communication.get_total_counts()
    results["apart"] = apart.compute()
    results["first"] = first.compute() if rank == 0 else None
    results["still its own"] = together.counts
    together.update(*batch(rank, 0))
    results["one more"] = together.compute()
    results["copied"] = copy.deepcopy(together).compute()
    together.sync()
    results["synced"] = together.counts
    together.unsync()
    results["sharded"] = count_sharded(rank, classes)
    return results


def main(rank: int, processes: int, folder: Path) -> None:
    join(rank, processes, folder)
    results = {name: count(rank, metric_class(name)) for name in ALONE}
    every: list[Any] = [None] * processes
    torch.distributed.all_gather_object(every, results)
    leave(rank, folder, every)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
