"""DTensors: their local shards, and sums over all shards by as few collectives as the meshes allow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.torch_private import flattened_meshes, is_of_fsdp1, root_mesh
from ..ranks.placements import is_dtensor, local

__all__ = ["ShardSums", "Shards", "check_kind", "check_whole", "local_as", "place_of", "shards_of"]

Shards = tuple[Any, tuple[int, ...]]  # a DeviceMesh, and the dimensions of it that cut a tensor up


def local_as(tensor: Any, param: Any) -> Tensor:
    """Return the local shard of a DTensor, brought into the placement of ``param``."""
    if not hasattr(tensor, "placements"):
        check_kind(param, tensor)
    if tensor.placements != param.placements:
        tensor = tensor.redistribute(placements=param.placements)
    shard: Tensor = local(tensor)
    return shard


def shards_of(param: Any) -> Shards | None:
    """Return the mesh of a DTensor and those of its dimensions that cut the tensor up; None for other tensors."""
    if not is_dtensor(param):
        return None
    return param.device_mesh, tuple(d for d, placement in enumerate(param.placements) if not placement.is_replicate())


def place_of(param: Any) -> int | None:
    """Return the number of this process's shard of a tensor: 0 for a whole one; None in a program of one process.

    Processes with the same number have replicas.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    place, shards = 0, shards_of(param)
    if shards is not None:
        mesh, dims = shards
        coordinate = mesh.get_coordinate() or [0] * mesh.ndim
        for d in dims:
            place = place * mesh.size(d) + coordinate[d]
    return place


def check_kind(param: Any, grad: Any) -> None:
    """Check that a gradient is a DTensor where its parameter is one, and only there.

    Raises:
        RuntimeError: it is not.
    """
    if is_dtensor(param) != is_dtensor(grad):
        kinds = ["a DTensor" if is_dtensor(tensor) else "a plain tensor" for tensor in (param, grad)]
        raise RuntimeError(
            f"fastloss.SGD: a parameter of shape {tuple(param.shape)} is {kinds[0]}, and its gradient is {kinds[1]}; "
            "expected two of one kind: distribute_tensor(grad, mesh, placements), or grad.full_tensor()"
        )


def check_whole(params: Iterable[Tensor]) -> None:
    """Check that the norm of all gradients can be known.

    Raises:
        ValueError: this process has parts of parameters, and they are no DTensors.
    """
    if any(map(is_of_fsdp1, params)) and torch.distributed.get_world_size() > 1:
        raise ValueError(
            "fastloss.SGD: max_norm is given, and FullyShardedDataParallel has cut up the parameters: each process "
            "would clip by the norm of its own part; expected max_norm=None and clip_grad_norm_ of the wrapped "
            "module before the step, or parameters of fully_shard (FSDP2)"
        )


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
        self._vectors: list[_Vector] = []
        self._places: dict[Shards, tuple[_Vector, int]] = {}  # by the set: its own copy's place
        sets = [s for s in dict.fromkeys(map(shards_of, params)) if s is not None and _is_cut(*s)]
        # In an order that is the same for every process: by size, then as the parameters come.
        meshes = sorted(dict.fromkeys(mesh for mesh, _ in sets), key=lambda mesh: (-mesh.size(), -mesh.ndim))
        within: dict[Any, dict[Shards, tuple[int, ...]]] = {}  # by the mesh of U: sets, dimensions
        for shards in sets:
            mesh, dims = next((mesh, dims) for mesh in meshes if (dims := _dims_in(mesh, *shards)) is not None)
            within.setdefault(mesh, {})[shards] = dims
        for mesh, dims_of in within.items():
            vector = _Vector(mesh, sorted(set().union(*dims_of.values())))
            self._vectors.append(vector)
            for shards, dims in dims_of.items():
                self._places[shards] = vector, vector.place(dims)

    def __call__(self, values: dict[Shards | None, Tensor]) -> list[Tensor]:
        """Return the sums over the shards, and the values that need none as they are.

        Args:
            values: ``()``, by the set of shards; None: of no DTensor. Every set that the object was made for takes
                part, whether it has a value here or not.
        """
        sums = [value for shards, value in values.items() if shards not in self._places]
        dtype = next(iter(values.values())).dtype
        for vector in self._vectors:
            numbers = torch.zeros(vector.length, dtype=dtype, device=vector.device)
            for shards, (other, place) in self._places.items():
                if other is vector and shards in values:
                    numbers[place] += values[shards].to(vector.device)
            for group in vector.groups:
                torch.distributed.all_reduce(numbers, group=group)
            sums += [numbers[place] for place in vector.places.values()]
        return sums


class _Vector:
    """The vector that is added up over U: some dimensions of a mesh, through this process."""

    def __init__(self, mesh: Any, dims: list[int]) -> None:
        self._mesh, self._dims = mesh, dims
        self.device = torch.device(mesh.device_type)
        if self.device.type != "cpu":
            self.device = torch.device(mesh.device_type, torch.get_device_module(self.device).current_device())
        self.groups = _groups(mesh, [d for d in dims if mesh.size(d) > 1])  # to all-reduce over, one after the other
        self.places: dict[tuple[int, ...], int] = {}  # by the dimensions of a set: that of this process's copy
        self.length = 0

    def place(self, dims: tuple[int, ...]) -> int:
        """Return the place of this process's copy of a set that is cut up along ``dims``."""
        if dims not in self.places:
            coordinate, place, copies = self._mesh.get_coordinate(), 0, 1
            for d in self._dims:
                if d not in dims:
                    place, copies = place * self._mesh.size(d) + coordinate[d], copies * self._mesh.size(d)
            self.places[dims] = self.length + place
            self.length += copies
        return self.places[dims]


def _is_cut(mesh: Any, dims: tuple[int, ...]) -> bool:
    """Return whether this process has a shard, and others have the rest."""
    return mesh.get_coordinate() is not None and any(mesh.size(d) > 1 for d in dims)


def _groups(mesh: Any, dims: Sequence[int]) -> list[Any]:
    """Return groups over which all-reduces, one after the other, are one over all of the dimensions."""
    if len(dims) > 1:
        ranks = _ranks(mesh, dims)
        if len(ranks) == torch.distributed.get_world_size():
            return [torch.distributed.group.WORLD]
        for flat in flattened_meshes(mesh):
            if flat.device_type == mesh.device_type and sorted(flat.mesh.flatten().tolist()) == ranks:
                return [flat.get_group()]
    return [mesh.get_group(d) for d in dims]


def _ranks(mesh: Any, dims: Sequence[int]) -> list[int]:
    """Return the processes that differ from this one in those dimensions alone."""
    through = tuple(slice(None) if d in dims else c for d, c in enumerate(mesh.get_coordinate()))
    return sorted(mesh.mesh[through].flatten().tolist())


def _dims_in(other: Any, mesh: Any, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the dimensions of the other mesh along which those of ``mesh`` lie; None where there are none."""
    if mesh == other:
        return dims
    if other.get_coordinate() is None or root_mesh(other) != root_mesh(mesh):
        return None
    ranks = _ranks(mesh, dims)
    positions = torch.isin(other.mesh, torch.tensor(ranks)).nonzero()
    if len(positions) != len(ranks):
        return None
    varying = tuple(d for d in range(other.ndim) if len(positions[:, d].unique()) > 1)
    return varying if math.prod(other.size(d) for d in varying) == len(ranks) else None
