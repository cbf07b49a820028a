"""The collectives of a call: their number, and the bytes that each process sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._pytree import tree_leaves

__all__ = ["Sent", "sent_by"]


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
