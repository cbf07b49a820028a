"""What the ranks of a process group tell each other: numbers of rows, and whether they were called alike.

The collectives are torch.distributed's own, by whatever backend the group has. It is imported at the first use.

Two kinds of tensors meet here. A *replicated* one is the same on all ranks, and so is its gradient. A *sharded* one
is each rank's own. A sum over the ranks makes the first of the second: :func:`all_reduce`, whose gradient is free.
The way back is :func:`replicated`: nothing now, and a sum over the ranks in the backward pass.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = [
    "Layout",
    "agreed_layout",
    "all_reduce",
    "all_reduce_detached",
    "checked_group",
    "gather",
    "raise_together",
    "replicated",
]


@dataclass(frozen=True)
class Layout:
    """Where the rows and the classes of a loss over several ranks lie."""

    classes: int | Tensor  # C, of all ranks; a scalar on the device where the host does not know it
    start: int | Tensor = 0  # how many of them stand on the ranks before this one
    class_group: Any = None  # each of its ranks has a shard of the classes, in rank order; None: this one has all
    row_groups: tuple[Any, ...] = ()  # each of these cuts the rows up among its ranks
    rows: int = 0  # of all of them together
    most_classes: int | None = None  # of the rank that has the most, where the host knows


def gather(tensor: Tensor, group: Any) -> Tensor:
    """Those of all ranks, ``(ranks, …)``."""
    import torch.distributed._functional_collectives as functional

    # Named anew in torch 2.13, which warns of the older name.
    collective = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
    result = functional.wait_tensor(collective(tensor.contiguous().unsqueeze(0), 0, group))
    return cast(Tensor, result)


def all_reduce_detached(tensor: Tensor, groups: Sequence[Any]) -> Tensor:
    """The sum over the ranks of each group in turn, without a gradient."""
    import torch.distributed._functional_collectives as functional

    for group in groups:
        tensor = cast(Tensor, functional.wait_tensor(functional.all_reduce(tensor.contiguous(), "sum", group)))
    return tensor


def all_reduce(tensor: Tensor, groups: Sequence[Any]) -> Tensor:
    """The sum over the ranks of each group, replicated, of a sharded tensor."""
    return cast(Tensor, _Sum.apply(tensor, groups)) if groups else tensor


def replicated(tensor: Tensor, groups: Sequence[Any]) -> Tensor:
    """The same tensor, where each rank of the groups is to use it for a part of its own."""
    return cast(Tensor, _Replicated.apply(tensor, groups)) if groups else tensor


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, groups: Sequence[Any]) -> Tensor:
        ctx.groups = groups
        return all_reduce_detached(tensor, groups)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return replicated(upstream, ctx.groups), None


class _Replicated(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, groups: Sequence[Any]) -> Tensor:
        ctx.groups = groups
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_reduce(upstream, ctx.groups), None


def checked_group(group: object) -> Any:
    """A process group that this process is in."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("fastloss: group is given, but torch.distributed is not initialised: init_process_group")
    if not isinstance(group, dist.ProcessGroup):
        hint = "; pass mesh.get_group()" if type(group).__name__ == "DeviceMesh" else ""
        raise TypeError(f"fastloss: group must be a torch.distributed ProcessGroup, got {type(group).__name__}{hint}")
    if dist.get_rank(group) < 0:
        raise ValueError("fastloss: this process is no rank of the group that was given")
    return group


def agreed_layout(
    group: Any,
    classes: int,
    rows: int,
    *,
    device: torch.device,
    facts: object,
    labels: Tensor | None,
    fault: Exception | None,
    look: bool,
) -> Layout:
    """Each rank tells how many classes it has, and on a CPU whatever else shows that the calls fit together.

    Args:
        group: a rank has a shard of the classes.
        classes, rows: of this rank.
        device: where the tensors are.
        facts: what must be the same on all ranks, but for the number of rows; anything with a fixed ``repr``.
        labels: the class indices, the same on all ranks.
        fault: what this rank found wrong with its own arguments. It is raised here, after the others were told, so
            that none of them waits for this one.
        look: may the host look at what it is told? On a GPU it would have to wait: then a shape that differs is the
            collective's to find, and a fault is raised before anything is told.
    """
    import torch.distributed as dist

    rank = dist.get_rank(group)
    if not look:
        if fault is not None:
            raise fault
        shards = gather(torch.full((), classes, dtype=torch.int64, device=device), group)
        return Layout(shards.sum().double(), shards[:rank].sum(), group, rows=rows)
    total = 0 if labels is None or fault is not None else int(labels.sum(dtype=torch.int64))
    mine = [int(fault is not None), classes, rows, zlib.crc32(repr(facts).encode()), total]
    told: list[list[int]] = gather(torch.tensor(mine, dtype=torch.int64, device=device), group).tolist()
    if fault is not None:
        raise fault
    refused = [number for number, (failed, *_) in enumerate(told) if failed]
    if refused:
        raise RuntimeError(
            f"fastloss: rank {refused[0]} of the group refused its arguments, for the reason that its own error gives"
        )
    for name, column in (("rows", 2), ("options, dtype, class weights or kind of target", 3), ("labels", 4)):
        values = [line[column] for line in told]
        if len(set(values)) > 1:
            found = f": {', '.join(f'{value} on rank {r}' for r, value in enumerate(values))}" if column == 2 else ""
            raise RuntimeError(f"fastloss: the ranks of the group differ in their {name}{found}; expected the same")
    sizes = [line[1] for line in told]
    return Layout(sum(sizes), sum(sizes[:rank]), group, rows=rows, most_classes=max(sizes))


def raise_together(fault: Exception | None, groups: Sequence[Any], device: torch.device) -> None:
    """Raise on all ranks of the groups what was found wrong on one of them. The host waits for it."""
    faults = int(
        all_reduce_detached(torch.full((), float(fault is not None), dtype=torch.float64, device=device), groups)
    )
    if fault is not None:
        raise fault
    if faults:
        ranks = math.prod(group.size() for group in groups)
        raise IndexError(
            f"fastloss: target has a label that is out of bounds on another of the {ranks} ranks that share the "
            "rows; the error there names it"
        )
