"""DTensors: which dimensions of the mesh cut the rows up, which one the classes, and the local tensors of both.

Nothing is imported before there is a DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .collectives import Layout

__all__ = ["Plan", "is_dtensor", "plan", "whole"]


def is_dtensor(tensor: object) -> bool:
    """Is it a DTensor?"""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@dataclass
class Plan:
    """How a loss of a DTensor is computed by the ranks of its mesh."""

    input: Any
    target: Any  # a DTensor too
    classes: int  # of all ranks
    layout: Layout
    of_rows: tuple[Any, ...]  # placements of what has a number a row: replicated over the ranks that share a row

    def local_input(self) -> Tensor:
        """This rank's logits; their gradient goes back into their placement."""
        return cast(Tensor, self.input.to_local(grad_placements=self.input.placements))

    def local_target(self) -> Tensor:
        """Its rows' labels; or its part of the class probabilities."""
        return cast(Tensor, self.target.to_local(grad_placements=self.target.placements))

    def placed(self, local: Tensor) -> Tensor:
        """A result as a DTensor: replicated, or the rows' own."""
        return placed(local, self.input.device_mesh, self.of_rows, _row_shape(self.input.shape))


def placed(local: Tensor, mesh: Any, of_rows: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """A DTensor of what is the same on every rank, ``()``, or of this rank's part of a number a row."""
    from torch.distributed.tensor import DTensor, Replicate

    if not local.dim():
        return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(local, mesh, of_rows, run_check=False, shape=size, stride=stride)


def whole(tensor: Tensor | None) -> Tensor | None:
    """The whole of a small tensor, on every rank."""
    return cast(Any, tensor).full_tensor() if is_dtensor(tensor) else tensor


def _row_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:1], *shape[2:]) if len(shape) > 1 else ()


def plan(input: Any, target: Tensor, dense: bool) -> Plan:
    """Which rank does what for logits ``(C,)`` or ``(N, C, …)``.

    Args:
        input: a DTensor.
        target: labels, or, if ``dense``, a value for each class. A DTensor, or the whole of it on each rank.

    Raises:
        ValueError: placements that can't be served; the error names them and what would do.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, dim = input.device_mesh, min(1, input.dim() - 1)
    row_groups, class_dims, of_rows, expected = [], [], [], []
    for mesh_dim, placement in enumerate(input.placements):
        if placement.is_replicate():
            of_rows.append(placement)
            expected.append(placement)
            continue
        if type(placement) is not Shard:
            raise ValueError(
                f"fastloss: input is placed as {input.placements}, and {placement!r} can't be served; expected "
                "Replicate() or Shard(dim) on each dimension of the mesh: input.redistribute(placements=...)"
            )
        cut = placement.dim % input.dim()
        if cut == dim:
            class_dims.append(mesh_dim)
            of_rows.append(Replicate())
            expected.append(placement if dense else Replicate())
        else:
            row_groups.append(mesh.get_group(mesh_dim))
            of_rows.append(Shard(cut - (cut > dim)))
            expected.append(placement if dense else of_rows[-1])
    if len(class_dims) > 1:
        raise ValueError(
            f"fastloss: input is placed as {input.placements}, which shards the classes (dim {dim}) over dimensions "
            f"{class_dims} of the mesh; expected one at most: input.redistribute(placements=...)"
        )
    if not is_dtensor(target):
        if row_groups:
            raise ValueError(
                f"fastloss: target is a plain tensor beside an input that is placed as {input.placements}, whose "
                "rows are sharded; it could be the whole or this rank's part: expected a DTensor placed as "
                f"{tuple(expected)}: DTensor.from_local(target, mesh, placements)"
            )
        target = DTensor.from_local(target, mesh, [Replicate()] * mesh.ndim, run_check=False)
    given = cast(Any, target)
    if given.device_mesh != mesh:
        raise ValueError(f"fastloss: target is on {given.device_mesh}; expected {mesh}, input's mesh")
    for has, wants in zip(given.placements, expected, strict=True):
        if has != wants and not (has.is_replicate() and wants.is_shard()):
            raise ValueError(
                f"fastloss: target is placed as {given.placements} beside an input placed as {input.placements}; "
                f"expected {tuple(expected)}, or Replicate() in place of a Shard"
            )
    if given.placements != tuple(expected):
        given = given.redistribute(placements=expected)  # each rank takes its part of what it has
    classes = int(input.shape[dim])
    start = 0
    for mesh_dim in class_dims:
        size = mesh.size(mesh_dim)
        start = min(-(-classes // size) * mesh.get_local_rank(mesh_dim), classes)  # torch.chunk's sizes
        here, least = input.to_local().shape[dim], min(-(-classes // size), classes - start)
        if here != least:
            raise ValueError(
                f"fastloss: input has {classes} classes over {size} ranks, and {here} of them on this one; expected "
                f"{least}, as torch.chunk has it: input by distribute_tensor, or group= for shards of other sizes"
            )
    rows = 1
    for size in _row_shape(input.shape):
        rows *= size
    group = mesh.get_group(class_dims[0]) if class_dims else None
    return Plan(input, given, classes, Layout(classes, start, group, tuple(row_groups), rows), tuple(of_rows))
