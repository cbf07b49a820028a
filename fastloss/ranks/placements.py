"""DTensors: which dimensions of the mesh shard the rows, which one the classes, and the local tensors.

torch's DTensor module is not imported before there is a DTensor.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

from .collectives import Layout, waited

__all__ = [
    "Plan",
    "is_dtensor",
    "is_uncompiled_dtensor",
    "local",
    "placed_as",
    "plan",
    "plan_linear",
    "replicated_beside",
    "whole",
]


def is_dtensor(tensor: object) -> bool:
    """Return True for a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_uncompiled_dtensor(tensor: object) -> bool:
    """Return True for a DTensor that is served shard by shard; a compiler's are left to torch's operators."""
    return type(tensor) not in (Tensor, Parameter) and is_dtensor(tensor) and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class Plan:
    """This rank's part of a loss whose logits lie on a mesh."""

    mesh: Any
    target: Tensor  # this rank's part: its rows' labels, or its part of the class probabilities
    layout: Layout
    of_rows: tuple[Any, ...]  # placements of a tensor with one element per row
    row_shape: tuple[int, ...]  # of all rows

    def placed(self, local: Tensor) -> Tensor:
        """Return a result as a DTensor: replicated if it is ``()``, else placed as the rows are."""
        return _placed(local, self.mesh, self.of_rows, (*self.row_shape, *local.shape[len(self.row_shape) :]))

    def of_this_rank(self, tensor: Any, name: str) -> Tensor:
        """Return this rank's part of a tensor that has the rows' shape, or first dimensions: of its rows.

        Raises:
            ValueError: a plain tensor beside rows that are sharded.
        """
        if is_dtensor(tensor):
            return cast(Tensor, local(tensor.redistribute(placements=self.of_rows)))
        if any(not placement.is_replicate() for placement in self.of_rows):
            raise ValueError(
                f"fastloss: {name} is a plain tensor, and the rows are sharded ({self.of_rows}): it could be the "
                f"whole or this rank's part; expected a DTensor placed as {self.of_rows}: "
                "DTensor.from_local(tensor, mesh, placements)"
            )
        return cast(Tensor, tensor)


def local(tensor: Any) -> Any:
    """Return a DTensor's part on this rank, whose gradient is placed as the DTensor; another tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    # Without a gradient it is the tensor that the DTensor holds, whose memory SGD may move.
    trained = tensor.requires_grad and torch.is_grad_enabled()
    return waited(_Local.apply(tensor) if trained else tensor.to_local())


class _Local(Function):
    """``DTensor.to_local``, whose gradient has the DTensor's own strides, and a graph.

    In torch 2.11 that of ``to_local`` has no graph; and of shards of unequal sizes it has strides for which autograd
    gathers all of it on every rank.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        ctx.place = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
        shard = tensor.to_local()
        return cast(Tensor, shard.view_as(shard))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _of_shard(gradient, *ctx.place)


def _placed(local: Tensor, mesh: Any, of_rows: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """Return a DTensor of a ``()`` that is the same on every rank, or of this rank's part of the rows."""
    from torch.distributed.tensor import DTensor, Replicate

    if not local.dim():
        return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(local, mesh, of_rows, run_check=False, shape=size, stride=stride)


def replicated_beside(tensor: Tensor, other: Any) -> Tensor:
    """Return a tensor that is the same on every rank as a DTensor on the mesh of ``other``."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = other.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def placed_as(shard: Tensor, like: Any) -> Tensor:
    """Return a DTensor of a local shard of the shape of that of ``like``."""
    return _of_shard(shard, like.device_mesh, like.placements, like.shape, like.stride())


def _of_shard(shard: Tensor, mesh: Any, placements: Any, shape: Any, stride: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=shape, stride=stride)


def whole(tensor: Tensor | None) -> Tensor | None:
    """Return the whole of a small tensor on every rank."""
    return cast(Any, tensor).full_tensor() if is_dtensor(tensor) else tensor


def plan(input: Any, target: Tensor, dense: bool) -> Plan:
    """Return the plan for logits ``(C,)`` or ``(N, C, …)``.

    Args:
        input: a DTensor.
        target: a DTensor, or the whole of it on each rank.
        dense: the target has one value per class; else it is labels.

    Raises:
        ValueError: placements that can't be served. The error names them and some that can.
    """
    _check_rank(input, "input")
    dim = min(1, input.dim() - 1)
    return _plan(
        f"input is placed as {input.placements}",
        input.device_mesh,
        [_checked(placement, "input", input) for placement in input.placements],
        tuple(input.shape),
        dim,
        input.to_local().shape[dim],
        target,
        dense,
    )


def plan_linear(input: Any, linear_weight: Any, target: Tensor, linear_bias: Any, dense: bool) -> Plan:
    """Return the plan for ``linear(input, linear_weight)``, ``(…, C)``, whose logits never exist.

    Args:
        input: ``(…, D)``: a DTensor whose rows may be sharded, or the whole of it on each rank.
        linear_weight: ``(C, D)``, a DTensor whose classes may be sharded.
        target: as in :func:`plan`.
        linear_bias: ``(C,)``, placed as the weight; or None.
        dense: as in :func:`plan`.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not is_dtensor(linear_weight) or (linear_bias is not None and not is_dtensor(linear_bias)):
        name = "linear_bias" if is_dtensor(linear_weight) else "linear_weight"
        raise ValueError(f"fastloss: {name} is a plain tensor beside DTensors; expected one, placed on their mesh")
    _check_rank(linear_weight, "linear_weight")
    mesh = linear_weight.device_mesh
    if not is_dtensor(input):
        input = DTensor.from_local(input, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if input.device_mesh != mesh:
        raise ValueError(f"fastloss: input is on {input.device_mesh}; expected {mesh}, linear_weight's mesh")
    if linear_bias is not None and tuple(linear_bias.placements) != tuple(linear_weight.placements):
        raise ValueError(
            f"fastloss: linear_bias is placed as {linear_bias.placements}; expected {linear_weight.placements}, as "
            "linear_weight is"
        )
    placements, last = [], input.dim() - 1
    where = f"input is placed as {input.placements} and linear_weight as {linear_weight.placements}"
    for of_input, of_weight in zip(input.placements, linear_weight.placements, strict=True):
        _checked(of_input, "input", input)
        _checked(of_weight, "linear_weight", linear_weight, strided=False)
        cut_input, cut_weight = not of_input.is_replicate(), not of_weight.is_replicate()
        by_features = (cut_input and of_input.dim % input.dim() == last) or (cut_weight and of_weight.dim % 2 == 1)
        if by_features or (cut_input and cut_weight):
            raise ValueError(
                f"fastloss: {where}; expected on each dimension of the mesh at most one of the two sharded: input by "
                "rows, or linear_weight by classes (Shard(0))"
            )
        placements.append(Shard(last) if cut_weight else of_input)
    classes = int(linear_weight.shape[0])
    shape, here = (*input.shape[:-1], classes), linear_weight.to_local().shape[0]
    return _plan(where, mesh, placements, shape, last, here, target, dense)


def _checked(placement: Any, name: str, tensor: Any, *, strided: bool = True) -> Any:
    """Return ``placement`` if it can be served: ``_StridedShard`` of rows, which a flattened Shard is, if allowed."""
    from torch.distributed.tensor import Shard

    served = placement.is_replicate() or type(placement) is Shard or (strided and _is_strided(placement))
    if not served:
        raise ValueError(
            f"fastloss: {name} is placed as {tensor.placements}, and {placement!r} can't be served; expected "
            f"Replicate() or Shard(dim) on each dimension of the mesh: {name}.redistribute(placements=...)"
        )
    return placement


def _check_rank(tensor: Any, name: str) -> None:
    """Check that this process has a part of the DTensor."""
    if tensor.device_mesh.get_coordinate() is None:
        raise RuntimeError(
            f"fastloss: {name} is on {tensor.device_mesh}, and this process (rank {torch.distributed.get_rank()}) is "
            "none of its ranks; expected the call on the mesh's ranks alone"
        )


def _is_strided(placement: Any) -> bool:
    return type(placement).__name__ == "_StridedShard"


def _moved(placement: Any, dim: int) -> Any:
    """Return the same cut of another dimension."""
    return type(placement)(dim, **({"split_factor": placement.split_factor} if _is_strided(placement) else {}))


def _plan(
    where: str,
    mesh: Any,
    placements: Sequence[Any],
    shape: tuple[int, ...],
    dim: int,
    classes_here: int,
    target: Tensor,
    dense: bool,
) -> Plan:
    """Return the plan for logits of that shape and those placements, with the classes in ``dim``.

    ``where`` begins the errors: it names the caller's tensors.
    """
    from torch.distributed.tensor import DTensor, Replicate

    row_groups, class_dims, of_rows, expected = [], [], [], []
    for mesh_dim, placement in enumerate(placements):
        cut = None if placement.is_replicate() else placement.dim % len(shape)
        if cut is None:
            of_rows.append(placement)
        elif cut == dim:
            if _is_strided(placement):
                raise ValueError(
                    f"fastloss: {where}, whose classes are cut by {placement!r}; expected Shard({dim}): "
                    "redistribute(placements=...)"
                )
            class_dims.append(mesh_dim)
            of_rows.append(Replicate())
        else:
            row_groups.append(mesh.get_group(mesh_dim))
            of_rows.append(_moved(placement, cut - (cut > dim)))
        expected.append(placement if dense else of_rows[-1])
    if len(class_dims) > 1:
        raise ValueError(
            f"fastloss: {where}, which shards the classes over dimensions {class_dims} of the mesh; expected one at "
            "most: redistribute(placements=...)"
        )
    if not is_dtensor(target):
        if row_groups:
            raise ValueError(
                f"fastloss: target is a plain tensor, and {where}: the rows are sharded, and it could be the whole "
                f"or this rank's part; expected a DTensor placed as {tuple(expected)}: "
                "DTensor.from_local(target, mesh, placements)"
            )
        target = DTensor.from_local(target, mesh, [Replicate()] * mesh.ndim, run_check=False)
    given = cast(Any, target)
    if given.device_mesh != mesh:
        raise ValueError(f"fastloss: target is on {given.device_mesh}; expected {mesh}, input's mesh")
    for has, wants in zip(given.placements, expected, strict=True):
        if has != wants and not (has.is_replicate() and not wants.is_replicate() and not _is_strided(wants)):
            raise ValueError(
                f"fastloss: target is placed as {given.placements}, and {where}; expected the target as "
                f"{tuple(expected)}, or with Replicate() in place of a Shard"
            )
    if given.placements != tuple(expected):
        given = given.redistribute(placements=expected)  # each rank takes its part of what it has
    classes, start, most = int(shape[dim]), 0, int(shape[dim])
    for mesh_dim in class_dims:
        size = mesh.size(mesh_dim)
        start = min(-(-classes // size) * mesh.get_local_rank(mesh_dim), classes)  # torch.chunk's sizes
        most = -(-classes // size)
        least = min(most, classes - start)
        if classes_here != least:
            raise ValueError(
                f"fastloss: {where}: {classes_here} of {classes} classes are on rank "
                f"{mesh.get_local_rank(mesh_dim)} of {size}; expected {least}, as torch.chunk has "
                "it (distribute_tensor does), or group= for shards of other sizes"
            )
    row_shape = (*shape[:dim], *shape[dim + 1 :])
    group = mesh.get_group(class_dims[0]) if class_dims else None
    layout = Layout(classes, start, group, tuple(row_groups), math.prod(row_shape), most)
    return Plan(mesh, local(given), layout, tuple(of_rows), row_shape)
