"""Collectives: numbers of rows, and a check that all ranks made the same call.

They are torch.distributed's own, by whatever backend the group has. It is imported at the first use.

There are two kinds of tensors. A *replicated* one is the same on all ranks, and so is its gradient. A *sharded* one
is each rank's own. :func:`all_reduce` makes a replicated tensor of a sharded one; its gradient needs no collective.
:func:`replicated` is the way back: the identity in forward, and a sum over the ranks in backward.
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

from ..backends.torch_private import functional_collectives, is_under_way

__all__ = [
    "Layout",
    "SharedGroup",
    "agreed_layout",
    "all_reduce",
    "all_reduce_detached",
    "checked_group",
    "gather",
    "group_property",
    "raise_together",
    "refuse_together",
    "replicated",
    "waited",
]


@dataclass(frozen=True)
class Layout:
    """The place of this rank's rows and classes among those of all ranks."""

    classes: int | Tensor  # C, of all ranks; a scalar on the device where the host does not know it
    start: int | Tensor = 0  # how many classes the ranks before this one have
    class_group: Any = None  # each of its ranks has a shard of the classes, in rank order; None: this rank has all
    row_groups: tuple[Any, ...] = ()  # the ranks of each of these groups share the rows
    rows: int = 0  # of all ranks together
    most_classes: int | None = None  # of the rank that has the most, where the host knows


class SharedGroup:
    """Holds a module's process group. Copies of the module share it. A file holds that there was one, not which."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: Any) -> SharedGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedGroup, (None if self.value is None else _NOT_SAVED,)


def group_property(attribute: str, doc: str) -> property:
    """Return the property of a module whose ``attribute`` holds a group in a :class:`SharedGroup`."""

    def get(module: Any) -> Any:
        return getattr(module, attribute).value

    def set_(module: Any, value: Any) -> None:
        setattr(module, attribute, SharedGroup(value))

    return property(get, set_, doc=doc)


_NOT_SAVED = "not saved"


def gather(tensor: Tensor, group: Any) -> Tensor:
    """Return the tensors of all ranks, ``(ranks, …)``."""
    functional = functional_collectives()
    # torch 2.13 renamed it, and warns of the older name.
    collective = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
    result = functional.wait_tensor(collective(tensor.contiguous().unsqueeze(0), 0, group))
    return cast(Tensor, result)


def all_reduce_detached(tensor: Tensor, groups: Sequence[Any]) -> Tensor:
    """All-reduce over each group in turn, without a gradient."""
    functional = functional_collectives()
    for group in groups:
        tensor = cast(Tensor, functional.wait_tensor(functional.all_reduce(tensor.contiguous(), "sum", group)))
    return tensor


def all_reduce(tensor: Tensor, groups: Sequence[Any]) -> Tensor:
    """All-reduce in forward; identity in backward."""
    return cast(Tensor, _Sum.apply(tensor, groups)) if groups else tensor


def replicated(tensor: Tensor, groups: Sequence[Any]) -> Tensor:
    """Identity in forward; all-reduce of the gradient in backward (Megatron's copy_to_tensor_parallel_region)."""
    return cast(Tensor, _Replicated.apply(tensor, groups)) if groups else tensor


def waited(tensor: Tensor) -> Tensor:
    """Wait for the tensor of a collective under way, an ``AsyncCollectiveTensor``; return others as they are."""
    if type(tensor) is Tensor or not is_under_way(tensor):
        return tensor
    return cast(Tensor, _Waited.apply(tensor))


class _Waited(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        result = tensor.wait()
        return cast(Tensor, result.view_as(result))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # type: ignore[override]
        return upstream


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
    """Return ``group`` if it is a process group that this process is in."""
    import torch.distributed as dist

    if group == _NOT_SAVED:
        raise RuntimeError(
            "fastloss: the module was saved with a process group, which no file holds; set its attribute group to "
            "a group of this program"
        )
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
    same: object,
    labels: Tensor | None,
    look: bool,
) -> Layout:
    """Exchange the numbers of classes, and on a CPU check that the ranks' calls fit together.

    Args:
        group: each of its ranks has a shard of the classes.
        classes, rows: of this rank.
        device: of the tensors.
        same: what must be equal on all ranks, beside the number of rows; anything with a fixed ``repr``.
        labels: the class indices, which must be equal on all ranks too.
        look: the host may look at the numbers of the other ranks. On a GPU it would have to wait. There a shape that
            differs is found by the collective.
    """
    import torch.distributed as dist

    rank = dist.get_rank(group)
    if not look:
        shards = gather(torch.full((), classes, dtype=torch.int64, device=device), group)
        return Layout(shards.sum().double(), shards[:rank].sum(), group, rows=rows)
    total = 0 if labels is None else int(labels.sum(dtype=torch.int64))
    own = [0, classes, rows, zlib.crc32(repr(same).encode()), total]
    by_rank: list[list[int]] = gather(torch.tensor(own, dtype=torch.int64, device=device), group).tolist()
    refused = [number for number, (failed, *_) in enumerate(by_rank) if failed]
    if refused:
        raise RuntimeError(
            f"fastloss: rank {refused[0]} of the group refused its arguments, for the reason that its own error gives"
        )
    alike = "options, parts, dtype, class weights, kind of target or need of input's gradient"
    for name, column in (("rows", 2), (alike, 3), ("labels", 4)):
        values = [numbers[column] for numbers in by_rank]
        if len(set(values)) > 1:
            listed = f": {', '.join(f'{value} on rank {r}' for r, value in enumerate(values))}" if column == 2 else ""
            raise RuntimeError(f"fastloss: the ranks of the group differ in their {name}{listed}; expected the same")
    sizes = [numbers[1] for numbers in by_rank]
    return Layout(sum(sizes), sum(sizes[:rank]), group, rows=rows, most_classes=max(sizes))


def refuse_together(group: Any, device: torch.device) -> None:
    """Take part in the exchange of :func:`agreed_layout` as the rank whose arguments are refused.

    The other ranks raise then, and don't wait. A ``group`` that is none, as one that this process is not in, is left.
    """
    import torch.distributed as dist

    there = dist.is_available() and dist.is_initialized() and isinstance(group, dist.ProcessGroup)
    if there and dist.get_rank(group) >= 0:
        gather(torch.tensor([1, 0, 0, 0, 0], dtype=torch.int64, device=device), group)


def raise_together(error: Exception | None, groups: Sequence[Any], device: torch.device) -> None:
    """Raise on all ranks of the groups if one of them has an error. The host waits for the others."""
    own = torch.full((), float(error is not None), dtype=torch.float64, device=device)
    errors = int(all_reduce_detached(own, groups))
    if error is not None:
        raise error
    if errors:
        ranks = math.prod(group.size() for group in groups)
        raise IndexError(
            f"fastloss: target has a label that is out of bounds on another of the {ranks} ranks that share the "
            "rows; the error there names it"
        )
