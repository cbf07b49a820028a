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


def count(rank: int, classes: Any) -> dict[str, Any]:
    from torch.distributed.tensor.debug import CommDebugMode

    alone = torch.distributed.new_group([0])
    both = torch.distributed.new_group([0, 1])
    together, apart = classes((1, 3), group=both), classes((1, 3), sync_on_compute=False)
    first = classes((1, 3), group=alone)
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
    return results


def main(rank: int, processes: int, folder: Path) -> None:
    join(rank, processes, folder)
    results = {name: count(rank, metric_class(name)) for name in ALONE}
    every: list[Any] = [None] * processes
    torch.distributed.all_gather_object(every, results)
    leave(rank, folder, every)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
