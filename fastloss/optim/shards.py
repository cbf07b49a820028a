"""DTensors: their local shards, and sums over all shards by as few collectives as the meshes allow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ranks.placements import is_dtensor, local
from ..torch_private import flattened_meshes, root_mesh

__all__ = ["ShardSums", "Shards", "local_as", "shards_of"]

Shards = tuple[Any, tuple[int, ...]]  # a DeviceMesh, and the dimensions of it that cut a tensor up


def local_as(tensor: Any, param: Any) -> Tensor:
    """Return the local shard of a DTensor, brought into the placement of ``param``."""
    if tensor.placements != param.placements:
        tensor = tensor.redistribute(placements=param.placements)
    shard: Tensor = local(tensor)
    return shard


def shards_of(param: Any) -> Shards | None:
    """The mesh of a DTensor and those of its dimensions that cut the tensor up; None for other tensors."""
    if not is_dtensor(param):
        return None
    return param.device_mesh, tuple(d for d, placement in enumerate(param.placements) if not placement.is_replicate())


class ShardSums:
    """Adds up a number of each process, for several sets of shards at once.

    The processes among which a tensor is cut up are a line, a plane, … of its mesh: S. All sets that lie within one
    such part U of one mesh are added up by one all-reduce over U, of a vector: a set has a place in it for each of
    the |U| / |S| copies of S that U is made of. A process adds to the place of its own copy, and reads it again.
    Nothing is counted twice then, and nothing is assumed of the other copies, which may be replicas or not.

    FSDP2 alone is one collective over the processes that shard (not over those that replicate: HSDP). So is FSDP2
    with tensor parallelism, where some parameters are cut by both dimensions of a mesh and others by one. It takes

    - one for each dimension of U, if U is neither all processes nor a flattened mesh that the program has made: a new
      group of processes, with its memory on each GPU, is not worth 8 bytes;
    - one for each of those parts of meshes that neither hold each other nor are slices of one mesh that does.

    All processes of a mesh must have the same parameters in the same order, as DTensors have it anyway.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._parts: list[_Part] = []
        self._place: dict[Shards, tuple[_Part, int]] = {}  # the part of a set, and its own copy's place there
        every = [s for s in dict.fromkeys(map(shards_of, params)) if s is not None and self.are_cut(s)]
        # In an order that is the same for every process: by size, then as the parameters come.
        hosts = sorted(dict.fromkeys(mesh for mesh, _ in every), key=lambda mesh: (-mesh.size(), -mesh.ndim))
        within: dict[Any, list[tuple[Shards, tuple[int, ...]]]] = {}
        for shards in every:
            for host in hosts:
                dims = _seen_from(host, *shards)
                if dims is not None:
                    within.setdefault(host, []).append((shards, dims))
                    break
        for host, sets in within.items():
            part = _Part.of(host, sorted({d for _, dims in sets for d in dims}))
            self._parts.append(part)
            for shards, dims in sets:
                self._place[shards] = part, part.add(dims)

    @staticmethod
    def are_cut(shards: Shards) -> bool:
        """Is there anybody to add up with?"""
        mesh, dims = shards
        return mesh.get_coordinate() is not None and any(mesh.size(d) > 1 for d in dims)

    def __call__(self, values: dict[Shards | None, Tensor]) -> list[Tensor]:
        """The sums over the shards, and the values that need none as they are.

        Args:
            values: ``()``, by the shards that they are of; None: of no DTensor. Every set that the object was made
                for takes part, whether it has a value here or not.
        """
        result = [value for shards, value in values.items() if shards not in self._place]
        for part in self._parts:
            mine = [(shards, place) for shards, (owner, place) in self._place.items() if owner is part]
            dtype = next(iter(values.values())).dtype
            vector = torch.zeros(part.length, dtype=dtype, device=part.device)
            for shards, place in mine:
                if shards in values:
                    vector[place] += values[shards].to(part.device)
            for group in part.groups:
                torch.distributed.all_reduce(vector, group=group)
            result += [vector[place] for place in part.places.values()]
        return result


@dataclass(eq=False)
class _Part:
    """Some dimensions of a mesh, through this process: U."""

    mesh: Any
    dims: Sequence[int]
    groups: list[Any]  # all-reduces over these, in turn, are one over the part
    device: torch.device
    places: dict[tuple[int, ...], int] = field(default_factory=dict)  # of this process, by the dimensions of a set
    length: int = 0

    @classmethod
    def of(cls, mesh: Any, dims: Sequence[int]) -> _Part:
        device = torch.device(mesh.device_type)
        if device.type != "cpu":
            device = torch.device(device.type, torch.get_device_module(device).current_device())
        return cls(mesh, dims, _groups(mesh, [d for d in dims if mesh.size(d) > 1]), device)

    def add(self, dims: tuple[int, ...]) -> int:
        """The place of this process's copy of a set that is cut up along ``dims``."""
        if dims not in self.places:
            coordinate, place, copies = self.mesh.get_coordinate(), 0, 1
            for d in self.dims:
                if d not in dims:
                    place, copies = place * self.mesh.size(d) + coordinate[d], copies * self.mesh.size(d)
            self.places[dims] = self.length + place
            self.length += copies
        return self.places[dims]


def _groups(mesh: Any, dims: Sequence[int]) -> list[Any]:
    if len(dims) > 1:
        ranks = _span(mesh, dims)
        if len(ranks) == torch.distributed.get_world_size():
            return [torch.distributed.group.WORLD]
        for flat in flattened_meshes(mesh):
            if flat.device_type == mesh.device_type and _ranks(flat) == ranks:
                return [flat.get_group()]
    return [mesh.get_group(d) for d in dims]


def _ranks(mesh: Any) -> list[int]:
    return sorted(mesh.mesh.flatten().tolist())


def _span(mesh: Any, dims: Sequence[int]) -> list[int]:
    """The processes that differ from this one in those dimensions alone."""
    through = tuple(slice(None) if d in dims else c for d, c in enumerate(mesh.get_coordinate()))
    return sorted(mesh.mesh[through].flatten().tolist())


def _seen_from(host: Any, mesh: Any, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """The dimensions of ``host`` that are those dimensions of ``mesh``; None where there are none such."""
    if mesh == host:
        return dims
    if host.get_coordinate() is None or root_mesh(host) != root_mesh(mesh):
        return None
    ranks = _span(mesh, dims)
    positions = torch.isin(host.mesh, torch.tensor(ranks)).nonzero()
    if len(positions) != len(ranks):
        return None
    varying = tuple(d for d in range(host.ndim) if len(positions[:, d].unique()) > 1)
    return varying if math.prod(host.size(d) for d in varying) == len(ranks) else None
