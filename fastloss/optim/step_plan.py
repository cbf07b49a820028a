"""The plan of an optimizer's step: which tensors step together, and whether they still lie where they lay.

A plan is made when something has changed: a parameter got its first gradient, a group was added, a checkpoint loaded.
Parameters may lack their gradients in any step; the plan goes on with the others.
In every other step it is only checked, in one of two ways.

- :meth:`StepPlan.holds` compares attribute by attribute. Its answer counts.
- :class:`_LastStep` compares with the step before, in as few passes over lists as there can be, all of them in C. It
  may report a change where there is none; then :meth:`StepPlan.holds` goes on. Where it reports none, the backends
  need not check again either: ``SGDBatch.unchanged``.

For each parameter that is one pass to get its gradient, and one for its identity and for that of each buffer; then,
for each of these tensors, one for its type, sizes, strides and flags, and one for its address.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import Addresses, SGDBatch
from ..backends.torch_private import held_by, tensor_guard
from ..backends.view import may_overlap
from ..ranks.placements import is_dtensor
from .shards import Shards, ShardSums

__all__ = ["SERVED_DTYPES", "Batch", "StepPlan", "gradients", "layouts_of", "overlapping", "serves"]

_MOST_DIMENSIONS = 6
SERVED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_gradient_of = operator.attrgetter("grad")
_layout_of = operator.attrgetter("layout")
_dtype_of = operator.attrgetter("dtype")
_get = dict.get
_HAVE_MEMORY = {Tensor, torch.nn.Parameter, type(None)}
# The attributes of a parameter that `.data =` can change without a change of address, and that a backend does not
# check itself: the kernels' tables hold all of them; the eager backend reads strides anew in every step, and needs to
# know of sizes and dtypes.
_ATTRIBUTES = {
    "eager": (operator.attrgetter("nbytes"), torch.Tensor.size, torch.Tensor.stride),
    "triton": (operator.attrgetter("dtype"), torch.Tensor.size, torch.Tensor.stride),
}


@dataclass(eq=False)
class Batch:
    """Tensors that a backend steps together, and the numbers that their parameters have in the plan."""

    tensors: SGDBatch
    backend: str
    indices: list[int]
    shards: Shards | None  # if its tensors are the shards of DTensors

    def take(self, grads: list[Any]) -> list[Any]:
        """Return the batch's gradients among those of all parameters."""
        return grads if len(self.indices) == len(grads) else [grads[i] for i in self.indices]


@dataclass(eq=False)
class StepPlan:
    """The way in which the parameters of an optimizer are stepped, as long as everything stays where it is.

    Its tensors are compared by identity. Gradients alone may move, and are not held on to.
    """

    settings: list[Any]  # the options of the groups that the plan depends on
    params: list[Tensor]  # of all groups, in their order
    group_of: list[int]  # of each parameter
    layouts: list[Any]  # of their gradients, see layouts_of(); they had them when the plan was made or before
    complete: bool = True  # none of those gradients lacks in this step
    batches: list[Batch] = field(default_factory=list)
    plain: list[int] = field(default_factory=list)  # stepped one by one, by torch's operators
    repeated: set[int] = field(default_factory=set)  # of those: named by the groups before, and stepped once more
    sharded: list[int] = field(default_factory=list)  # DTensors among the batches
    dtensors: list[Tensor] = field(default_factory=list)  # those, and those among the buffers
    shards: list[Any] = field(default_factory=list)  # the local tensors that they hold
    shard_addresses: Addresses = field(default_factory=lambda: Addresses(()))
    states: list[dict[str, Any]] = field(default_factory=list)  # every parameter's state
    buffers: list[Tensor] = field(default_factory=list)  # momentum buffers, master weights, compensations
    buffer_states: list[dict[str, Any]] = field(default_factory=list)  # buffer i is buffer_states[i][buffer_keys[i]]
    buffer_keys: list[str] = field(default_factory=list)
    companions: list[Tensor] = field(default_factory=list)  # of the buffers, all but the momentum
    companion_dtypes: list[torch.dtype] = field(default_factory=list)
    stored: list[Tensor] = field(default_factory=list)  # parameters whose own memory is stepped
    addresses: Addresses = field(default_factory=lambda: Addresses(()))  # of those
    attributes: list[list[Any]] = field(default_factory=list)  # of those, see _ATTRIBUTES
    sums: ShardSums | None = None  # over the shards of all DTensors that are stepped; made when it is needed
    last_step: _LastStep | None = None

    def add_buffer(self, state: dict[str, Any], key: str) -> None:
        """Add ``state[key]`` to the buffers; the plan ends when another tensor takes its place."""
        self.buffer_states.append(state)
        self.buffer_keys.append(key)
        self.buffers.append(state[key])
        if key != "momentum_buffer":  # which the backends take in any dtype
            self.companions.append(state[key])
            self.companion_dtypes.append(state[key].dtype)

    def end(self) -> None:
        """Let the plan hold for no step any more. (An optimizer can't drop it in a step compiled by torch 2.11.)"""
        self.settings = []

    def finish(self, states: Iterable[dict[str, Any]]) -> None:
        """Store everything that :meth:`holds` compares; the batches and buffers are complete."""
        self.states = list(states)
        self.stored = [self.params[i] for batch in self.batches for i in batch.indices if i not in self.sharded]
        self.addresses = Addresses(self.stored)
        self.dtensors = [self.params[i] for i in self.sharded] + list(filter(is_dtensor, self.buffers))
        self.shards = list(map(held_by, self.dtensors))
        self.shard_addresses = Addresses(self.shards)
        self.attributes = self._attributes()

    def begin(self, grads: list[Any]) -> None:
        """Look which gradients lack in the first step of the plan."""
        self._set_complete(grads, layouts_of(grads) == self.layouts)

    def holds(
        self,
        settings: list[Any],
        groups: list[dict[str, Any]],
        states: Collection[dict[str, Any]],
        grads: list[Tensor | None],
    ) -> bool:
        """Return whether everything is as it was when the plan was made."""
        if self.settings != settings:
            return False
        unchanged = self.last_step is not None and self.last_step.is_like(groups, states, grads)
        for batch in self.batches:
            batch.tensors.unchanged = unchanged
        if unchanged:
            self._set_complete(grads, True)
            return True
        self.last_step = None
        try:
            layouts = layouts_of(grads)
            complete = self.layouts == layouts
            self._set_complete(grads, complete)
            return (
                (complete or all(new is None or new == old for new, old in zip(layouts, self.layouts, strict=True)))
                and _identical(_params_of(groups), self.params)
                and _identical(states, self.states)
                and _identical(list(map(operator.getitem, self.buffer_states, self.buffer_keys)), self.buffers)
                and list(map(_dtype_of, self.companions)) == self.companion_dtypes
                and self.addresses.are_of(self.stored)
                and self._attributes() == self.attributes
                and (not self.dtensors or self._shards_are_held())
            )
        except KeyError:  # the program has removed a buffer
            return False

    def _set_complete(self, grads: list[Any], complete: bool) -> None:
        """Store which of the batches lack gradients."""
        if complete and self.complete:
            return
        self.complete = complete
        for batch in self.batches:
            batch.tensors.incomplete = not complete and any(grad is None for grad in batch.take(grads))

    def _shards_are_held(self) -> bool:
        """Return whether the DTensors hold the local tensors that they held. (``to_local`` may make new views.)"""
        return _identical(list(map(held_by, self.dtensors)), self.shards) and self.shard_addresses.are_of(self.shards)

    def finish_step(self, states: Collection[dict[str, Any]], grads: list[Tensor | None]) -> None:
        """Let the next step be compared with this one, which was carried out with these gradients."""
        # (The shards of DTensors' gradients are other tensors in every step.)
        if self.last_step is None and self.batches and self.complete and not self.sharded:
            with contextlib.suppress(TypeError):  # a state that is no dict, or a torch without guards
                self.last_step = _LastStep(self, states, grads)

    def _attributes(self) -> list[list[Any]]:
        names = sorted({batch.backend for batch in self.batches})
        return [list(map(attribute, self.stored)) for name in names for attribute in _ATTRIBUTES[name]]


class _LastStep:
    """The tensors of the step before, to compare the next one with. Gradients may lie elsewhere then."""

    def __init__(self, plan: StepPlan, states: Collection[dict[str, Any]], grads: list[Tensor | None]) -> None:
        self._params, self._stored, self._addresses = plan.params, plan.stored, plan.addresses
        batched = [i for batch in plan.batches for i in batch.indices]
        self._batched = None if batched == list(range(len(grads))) else batched  # None: all, as they come
        self._others = sorted(set(range(len(grads))).difference(batched))  # no gradient, or torch's to step
        self._layouts = [plan.layouts[i] for i in self._others]
        # For each key of the plan's buffers: the values of all of the optimizer's states there.
        self._values = [(key, list(map(_get, states, repeat(key)))) for key in set(plan.buffer_keys)]
        self._tensors = (*plan.stored, *plan.buffers)
        self._tensors_are_alike = tensor_guard(self._tensors)
        self._grads_are_alike = tensor_guard(self._of_batches(grads))

    def is_like(
        self, groups: list[dict[str, Any]], states: Collection[dict[str, Any]], grads: list[Tensor | None]
    ) -> bool:
        """Return whether nothing has changed since."""
        try:
            for key, values in self._values:
                if len(values) != len(states) or not all(map(operator.is_, map(_get, states, repeat(key)), values)):
                    return False
        except TypeError:  # a state that is no dict
            return False
        return (
            self._grads_are_alike(*self._of_batches(grads))
            and (not self._others or layouts_of([grads[i] for i in self._others]) == self._layouts)
            and _identical(_params_of(groups), self._params)
            and self._tensors_are_alike(*self._tensors)
            and self._addresses.are_of(self._stored)
        )

    def _of_batches(self, grads: list[Any]) -> list[Any]:
        return grads if self._batched is None else [grads[i] for i in self._batched]


def gradients(params: Iterable[Tensor]) -> list[Any]:
    """Return the gradients; None where there is none."""
    return list(map(_gradient_of, params))


def layouts_of(grads: list[Any]) -> list[Any]:
    """Return the layouts of gradients; None where there is none.

    For a tensor subclass, which may have no memory of its own, the type takes the place of the layout.
    """
    try:
        layouts = list(map(_layout_of, grads))
    except AttributeError:
        layouts = [None if grad is None else grad.layout for grad in grads]
    if not _HAVE_MEMORY.issuperset(map(type, grads)):
        for i, grad in enumerate(grads):
            if type(grad) not in _HAVE_MEMORY and not is_dtensor(grad):
                layouts[i] = type(grad)
    return layouts


def serves(param: Tensor) -> bool:
    """Return whether the backends can step this tensor, if its gradient is dense."""
    return (
        type(param).__torch_dispatch__ is Tensor.__torch_dispatch__
        and param.layout == torch.strided
        and param.dtype in SERVED_DTYPES
        and param.device.type in ("cpu", "cuda")
        and not param.is_neg()
        and param.dim() <= _MOST_DIMENSIONS  # of the kernels' table of strides
        and not may_overlap(param)
    )


def overlapping(tensors: Sequence[Tensor]) -> set[int]:
    """Return the positions of tensors that may share memory with another of them."""
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


def _params_of(groups: list[dict[str, Any]]) -> list[Tensor]:
    if len(groups) == 1:
        params: list[Tensor] = groups[0]["params"]
        return params
    return list(chain.from_iterable(group["params"] for group in groups))


def _identical(some: Collection[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))
