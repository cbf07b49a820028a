"""Which tensors step together, and whether they are still where they were.

A plan is made when something changed: a parameter got its first gradient, a group was added, a checkpoint loaded. In
every other step the plan is only checked, by a few passes over lists that run in C: about 0.2 µs a parameter.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..contract import SGDBatch
from .shards import Shards, ShardSums, is_sharded, local

__all__ = ["SERVED_DTYPES", "Batch", "Plan", "gradients", "overlapping", "serves"]

_MOST_DIMENSIONS = 6
SERVED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_gradient_of = operator.attrgetter("grad")
_layout_of = operator.attrgetter("layout")
_dtype_of = operator.attrgetter("dtype")
_address_of = torch.Tensor.data_ptr
_HAVE_MEMORY = {Tensor, torch.nn.Parameter, type(None)}
# What `.data =` can change without a change of address, as far as a backend does not look itself: the kernels' tables
# hold all of it; the eager backend reads strides anew in every step, and needs to know of sizes and dtypes.
_FORMS_OF = {
    "eager": (operator.attrgetter("nbytes"),),
    "triton": (operator.attrgetter("dtype"), torch.Tensor.size, torch.Tensor.stride),
}


@dataclass(eq=False)
class Batch:
    """Tensors that a backend steps together, and the numbers that their parameters have in the plan."""

    tensors: SGDBatch
    backend: str
    indices: list[int]
    shards: Shards | None  # of what all of them are the shards

    def take(self, grads: list[Tensor]) -> list[Tensor]:
        """The batch's gradients among all."""
        return grads if len(self.indices) == len(grads) else [grads[i] for i in self.indices]


@dataclass(eq=False)
class Plan:
    """How the parameters of an optimizer are stepped, as long as everything stays where it is.

    What it remembers is compared by identity; gradients alone may move, and are not held on to.
    """

    settings: list[Any]  # what the groups say that the plan depends on
    params: list[Tensor]  # of all groups, in their order
    group_of: list[int]  # of each
    layouts: list[torch.layout | None]  # of their gradients; None where there is none
    batches: list[Batch] = field(default_factory=list)
    plain: list[int] = field(default_factory=list)  # stepped one by one, by torch's operators
    repeated: set[int] = field(default_factory=set)  # of those: named by the groups before, and stepped once more
    sharded: dict[int, Tensor] = field(default_factory=dict)  # DTensors among the batches: their local shards
    states: list[dict[str, Any]] = field(default_factory=list)  # every parameter's state
    holders: list[dict[str, Any]] = field(default_factory=list)  # states[i][keys[i]] is kept[i]
    keys: list[str] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    companions: list[Tensor] = field(default_factory=list)  # of those, all but the momentum
    dtypes: list[torch.dtype] = field(default_factory=list)  # of the companions
    stored: list[Tensor] = field(default_factory=list)  # parameters whose memory is stepped
    addresses: list[int] = field(default_factory=list)
    forms: list[list[Any]] = field(default_factory=list)  # of those, see _FORMS_OF
    sums: ShardSums | None = None  # over the shards of all DTensors that are stepped; made when it is needed

    def keep(self, state: dict[str, Any], key: str) -> None:
        """The plan uses this tensor: it is to be noticed when another takes its place."""
        self.holders.append(state)
        self.keys.append(key)
        self.kept.append(state[key])
        if key != "momentum_buffer":  # which the backends take in any dtype
            self.companions.append(state[key])
            self.dtypes.append(state[key].dtype)

    def remember(self, states: Iterable[dict[str, Any]]) -> None:
        """The plan is complete."""
        self.states = list(states)
        self.stored = [self.params[i] for batch in self.batches for i in batch.indices if i not in self.sharded]
        self.addresses = list(map(_address_of, self.stored))
        self.forms = self._forms()

    def holds(
        self,
        settings: list[Any],
        groups: Iterable[dict[str, Any]],
        states: Iterable[dict[str, Any]],
        layouts: list[torch.layout | None],
    ) -> bool:
        """Is everything as it was when the plan was made?"""
        try:
            return (
                self.settings == settings
                and self.layouts == layouts
                and _identical(chain.from_iterable(group["params"] for group in groups), self.params)
                and _identical(states, self.states)
                and _identical(map(operator.getitem, self.holders, self.keys), self.kept)
                and list(map(_dtype_of, self.companions)) == self.dtypes
                and list(map(_address_of, self.stored)) == self.addresses
                and self._forms() == self.forms
                and all(local(self.params[i]) is shard for i, shard in self.sharded.items())
            )
        except KeyError:  # somebody removed a buffer
            return False

    def _forms(self) -> list[list[Any]]:
        names = sorted({batch.backend for batch in self.batches})
        return [list(map(form, self.stored)) for name in names for form in _FORMS_OF[name]]


def gradients(params: Iterable[Tensor]) -> tuple[list[Tensor | None], list[torch.layout | None]]:
    """The gradients and their layouts; None where there is none.

    Of a tensor subclass, which may have no memory of its own, the type takes the place of the layout.
    """
    grads = list(map(_gradient_of, params))
    try:
        layouts = list(map(_layout_of, grads))
    except AttributeError:
        layouts = [None if grad is None else grad.layout for grad in grads]
    if not _HAVE_MEMORY.issuperset(map(type, grads)):
        for i, grad in enumerate(grads):
            if type(grad) not in _HAVE_MEMORY and not is_sharded(grad):
                layouts[i] = type(grad)
    return grads, layouts


def serves(param: Tensor) -> bool:
    """Can the backends step this tensor, if its gradient is dense?"""
    return (
        type(param).__torch_dispatch__ is Tensor.__torch_dispatch__
        and param.layout == torch.strided
        and param.dtype in SERVED_DTYPES
        and param.device.type in ("cpu", "cuda")
        and not param.is_neg()
        and param.dim() <= _MOST_DIMENSIONS  # of the kernels' table of strides
        and not _overlaps_itself(param)
    )


def overlapping(tensors: Sequence[Tensor]) -> set[int]:
    """Which of the tensors may share memory with another of them."""
    spans = []
    for i, tensor in enumerate(tensors):
        if tensor.numel():
            reach = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((start, start + reach * tensor.element_size(), i))
    shared: set[int] = set()
    furthest, owner = -1, -1
    for start, end, i in sorted(spans):
        if start < furthest:
            shared |= {i, owner}
        if end > furthest:
            furthest, owner = end, i
    return shared


def _overlaps_itself(tensor: Tensor) -> bool:
    """May two of its elements be one in memory?"""
    reach = 0
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=operator.itemgetter(1)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _identical(some: Iterable[Any], others: Sequence[Any]) -> bool:
    some = list(some)
    return len(some) == len(others) and all(map(operator.is_, some, others))
