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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress, repeat
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import Addresses, SGDBatch
from ..backends.torch_private import held_by, tensor_guard
from ..backends.view import may_overlap
from ..ranks.placements import is_dtensor, local
from .shards import Shards, ShardSums

__all__ = [
    "SERVED_DTYPES",
    "Batch",
    "Identities",
    "StepPlan",
    "gradients",
    "layouts_of",
    "overlapping",
    "params_of",
    "serves",
    "stored_in",
]

_MOST_DIMENSIONS = 6
# The share of gradients up to which it takes less time to compare the tensors of each parameter by themselves.
_FEW = 0.25
SERVED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_gradient_of = operator.attrgetter("grad")
_layout_of = operator.attrgetter("layout")
_dtype_of = operator.attrgetter("dtype")
_device_of = operator.attrgetter("device")
_get = dict.get
_HAVE_MEMORY = {Tensor, torch.nn.Parameter, type(None)}
# The attributes of a parameter that `.data =` can change without a change of address, and that a backend does not
# check itself: the kernels' tables hold all of them; the eager backend reads strides anew in every step, and needs to
# know of sizes and dtypes.
_ATTRIBUTES = {
    "eager": (operator.attrgetter("nbytes"), torch.Tensor.size, torch.Tensor.stride),
    "triton": (operator.attrgetter("dtype"), torch.Tensor.size, torch.Tensor.stride),
}


class Identities:
    """The identities of tensors, without references to them.

    A new tensor may take over a freed one's: what else counts is compared beside. (A weak reference would forbid
    ``torch.utils.swap_tensors``.)
    """

    def __init__(self, tensors: Iterable[Any] = ()) -> None:
        self._numbers = list(map(id, tensors))

    def __contains__(self, pair: tuple[int, Any]) -> bool:
        place, tensor = pair
        return self._numbers[place] == id(tensor)

    def are_of(self, tensors: Iterable[Any]) -> bool:
        """Return whether these are the tensors."""
        return list(map(id, tensors)) == self._numbers


@dataclass(eq=False)
class Batch:
    """Tensors that a backend steps together, and the numbers that their parameters have in the plan."""

    tensors: SGDBatch
    backend: str
    indices: list[int]
    shards: Shards | None  # if its tensors are the shards of DTensors
    has_momentum: list[bool]  # of each parameter
    companion: str | None  # the key of the companions in the states
    all_have_momentum: bool = False

    def take(self, values: list[Any]) -> list[Any]:
        """Return the batch's values among those of all parameters."""
        return values if len(self.indices) == len(values) else [values[i] for i in self.indices]

    def fetch(self, params: list[Any], buffers: dict[str, list[Any]]) -> None:
        """Get the tensors for one step: all of the optimizer's parameters, and each one's buffers by their keys."""
        tensors = self.tensors
        tensors.params, momentum = self.take(params), buffers.get("momentum_buffer")
        tensors.momentum = [None] * len(self.indices) if momentum is None else self.take(momentum)
        if momentum is not None and not self.all_have_momentum:
            having = zip(tensors.momentum, self.has_momentum, strict=True)
            tensors.momentum = [buffer if has else None for buffer, has in having]
        tensors.companions = (
            [None] * len(self.indices) if self.companion is None else self.take(buffers[self.companion])
        )
        if self.shards is not None:
            for name in ("params", "momentum", "companions"):
                setattr(tensors, name, [stored_in(tensor) for tensor in getattr(tensors, name)])

    def buffers(self) -> list[Any]:
        """Return the momentum buffers and companions of this step."""
        momentum, tensors = self.tensors.momentum, self.tensors
        if not self.all_have_momentum:
            momentum = [buffer for buffer, has in zip(momentum, self.has_momentum, strict=True) if has]
        return momentum if self.companion is None else momentum + tensors.companions


@dataclass(eq=False)
class StepPlan:
    """The way in which the parameters of an optimizer are stepped, as long as everything stays where it is.

    It holds no tensor between steps: a program may free parameters, buffers and gradients. Each step fetches them
    from the groups and states, and puts them into the batches, until :meth:`release`.
    """

    settings: list[Any]  # the options of the groups that the plan depends on
    params: Identities  # of all groups, in their order
    group_of: list[int]  # of each parameter
    layouts: list[Any]  # of their gradients, see layouts_of(); they had them when the plan was made or before
    complete: bool = True  # none of those gradients lacks in this step
    batches: list[Batch] = field(default_factory=list)
    plain: list[int] = field(default_factory=list)  # stepped one by one, by torch's operators
    repeated: set[int] = field(default_factory=set)  # of those: named by the groups before, and stepped once more
    sharded: list[int] = field(default_factory=list)  # DTensors among the batches
    buffer_keys: list[str] = field(default_factory=list)  # of the batches' buffers in the states
    with_state: list[int] = field(default_factory=list)  # parameters that have such buffers
    places: list[int] | None = None  # of their states among all states; None: as they come, and there are no others
    states: int = 0  # of the optimizer
    buffers: Identities = field(default_factory=Identities)
    buffer_attributes: list[list[Any]] = field(default_factory=list)
    addresses: Addresses = field(default_factory=lambda: Addresses(()))  # of the batches' parameters
    attributes: list[list[Any]] = field(default_factory=list)  # of those, see _ATTRIBUTES
    held: Identities = field(default_factory=Identities)  # what DTensors among parameters and buffers hold
    sums: ShardSums | None = None  # over the shards of all DTensors that are stepped; made when it is needed
    last_step: _LastStep | None = None
    repeat: Callable[[Any], bool] | None = None  # makes a step of the optimizer, if it is like the last one

    def end(self) -> None:
        """Let the plan hold for no step any more. (An optimizer can't drop it in a step compiled by torch 2.11.)"""
        self.settings, self.last_step, self.repeat = [], None, None

    def finish(self, params: list[Tensor], state: dict[Any, Any]) -> None:
        """Fetch the tensors, and store everything that :meth:`holds` compares; the batches are complete."""
        batched = [i for batch in self.batches for i in batch.indices]
        companions = {batch.companion for batch in self.batches if batch.companion is not None}
        has_momentum = any(any(batch.has_momentum) for batch in self.batches)
        for batch in self.batches:
            batch.all_have_momentum = all(batch.has_momentum)
        self.buffer_keys = [*(["momentum_buffer"] if has_momentum else []), *sorted(companions)]
        self.with_state = sorted(i for i in batched if params[i] in state) if self.buffer_keys else []
        place_of = {id(param): place for place, param in enumerate(state)}
        places = [place_of[id(params[i])] for i in self.with_state]
        self.states = len(state)
        self.places = None if places == list(range(self.states)) else places
        self._fetch(params, state)
        stored = self._stored()
        self.addresses, self.attributes = Addresses(stored), self._attributes(stored)
        self.buffers, self.buffer_attributes = Identities(self._buffers()), self._buffer_attributes()
        self.held = Identities(map(held_by, self._dtensors(params, state)))

    def begin(self, grads: list[Any]) -> None:
        """Look which gradients lack in the first step of the plan."""
        self._set_complete(grads, layouts_of(grads) == self.layouts)

    def holds(
        self, settings: list[Any], params: list[Tensor], state: dict[Any, Any], grads: list[Tensor | None]
    ) -> bool:
        """Return whether everything is as it was when the plan was made; then the batches have their tensors."""
        if self.settings != settings or not self._fetch(params, state):
            return False
        last = self.last_step
        if last is not None and not (last.has_tensors(self) if self.complete else last.has_those(self, grads)):
            last = self.last_step = None
        unchanged = last is not None and last.has_gradients(grads)
        self.repeat = self.repeat if unchanged else None
        for batch in self.batches:
            batch.tensors.unchanged, batch.tensors.settled = unchanged, last is not None
        if unchanged:
            self._set_complete(grads, True)
            return True
        layouts = layouts_of(grads)
        complete = self.layouts == layouts
        self._set_complete(grads, complete)
        if not complete and self.layouts != [new or old for new, old in zip(layouts, self.layouts, strict=True)]:
            return False
        if last is not None:
            last.forget_gradients()
            return True
        stored = self._stored()
        return (
            self.params.are_of(params)
            and self.buffers.are_of(self._buffers())
            and self._buffer_attributes() == self.buffer_attributes
            and self.addresses.are_of(stored)
            and self._attributes(stored) == self.attributes
            and (not self.sharded or self.held.are_of(map(held_by, self._dtensors(params, state))))
        )

    def is_like_before(self, params: list[Tensor], state: dict[Any, Any], grads: list[Tensor | None]) -> bool:
        """Return whether only the gradients' addresses may differ from the last step's, with all gradients there."""
        last = self.last_step
        return (
            last is not None and self._fetch(params, state) and last.has_gradients(grads) and last.has_tensors(self)
        )

    def release(self) -> None:
        """Let go of the tensors, at the end of a step."""
        for batch in self.batches:
            batch.tensors.params, batch.tensors.momentum, batch.tensors.companions = [], [], []

    def finish_step(self, grads: list[Tensor | None]) -> None:
        """Let the next step be compared with this one, which was carried out with these gradients."""
        # (The shards of DTensors' gradients are other tensors in every step.)
        if self.batches and not self.sharded and not self.plain:
            with contextlib.suppress(TypeError):  # a torch without guards
                self.last_step = self.last_step or _LastStep(self)
                if self.complete:
                    self.last_step.store_gradients(grads)

    def _fetch(self, params: list[Any], state: dict[Any, Any]) -> bool:
        """Put the tensors of this step into the batches; return False if parameters or states have come or gone."""
        if len(params) != len(self.group_of):
            return False
        buffers: dict[str, list[Any]] = {}
        if self.buffer_keys:
            if len(state) != self.states:
                return False
            all_own = len(self.with_state) == len(params)
            owners = params if all_own else [params[i] for i in self.with_state]
            keys: Iterable[Any] = state
            states: Iterable[Any] = state.values()
            if self.places is not None:
                every_key, every_state = list(state), list(state.values())
                keys = [every_key[place] for place in self.places]
                states = [every_state[place] for place in self.places]
            if not all(map(operator.is_, keys, owners)):
                return False
            try:
                for key in self.buffer_keys:
                    values = list(map(_get, states, repeat(key)))
                    if not all_own:
                        of_param: list[Any] = [None] * len(params)
                        for i, value in zip(self.with_state, values, strict=True):
                            of_param[i] = value
                        values = of_param
                    buffers[key] = values
            except TypeError:  # a state that is no dict
                return False
        for batch in self.batches:
            batch.fetch(params, buffers)
        return True

    def _set_complete(self, grads: list[Any], complete: bool) -> None:
        """Store which of the batches lack gradients."""
        if complete and self.complete:
            return
        self.complete = complete
        for batch in self.batches:
            batch.tensors.incomplete = not complete and any(grad is None for grad in batch.take(grads))

    def _stored(self) -> list[Tensor]:
        if len(self.batches) == 1:
            return self.batches[0].tensors.params
        return list(chain.from_iterable(batch.tensors.params for batch in self.batches))

    def _buffers(self) -> list[Any]:
        if len(self.batches) == 1:
            return self.batches[0].buffers()
        return list(chain.from_iterable(batch.buffers() for batch in self.batches))

    def _buffer_attributes(self) -> list[list[Any]]:
        buffers = self._buffers()
        companions = [c for batch in self.batches if batch.companion is not None for c in batch.tensors.companions]
        dtypes = list(map(_dtype_of, companions))  # the backends take momentum of any dtype
        return [list(map(Tensor.size, buffers)), list(map(_device_of, buffers)), dtypes]

    def _dtensors(self, params: list[Any], state: dict[Any, Any]) -> list[Any]:
        """Return the DTensors among the batches' parameters, and their buffers."""
        owners = [params[i] for i in self.sharded]
        values = (state[owner].get(key) for owner in owners if owner in state for key in self.buffer_keys)
        return owners + [value for value in values if is_dtensor(value)]

    def _attributes(self, stored: list[Tensor]) -> list[list[Any]]:
        names = sorted({batch.backend for batch in self.batches})
        return [list(map(attribute, stored)) for name in names for attribute in _ATTRIBUTES[name]]


class _LastStep:
    """Holds the layout of the last step's tensors, to compare the next step's with it.

    Only gradients may lie elsewhere then. Where a tensor has been replaced by another one at the same address, with
    the same attributes, no backend can tell them apart. (A parameter's state is found by its identity.)
    """

    def __init__(self, plan: StepPlan) -> None:
        count, batched = len(plan.group_of), [i for batch in plan.batches for i in batch.indices]
        self._batched = None if batched == list(range(count)) else batched  # None: all, as they come
        self._others = sorted(set(range(count)).difference(batched))  # no gradient
        self._with_buffers = any(batch.backend == "triton" for batch in plan.batches)  # whose tables have addresses
        stored, tensors = self._tensors(plan)
        self._addresses = Addresses(tensors if self._with_buffers else stored)
        self._tensors_are_alike = tensor_guard(tensors)
        self._grads_are_alike: Callable[..., bool] | None = None
        self._apart: list[list[Callable[..., bool]]] = []  # of each batch: guards of its parameters and their buffers

    def store_gradients(self, grads: list[Any]) -> None:
        """Let gradients be compared with these, unless there are others that they are like."""
        if self._grads_are_alike is None:
            self._grads_are_alike = tensor_guard(self._of_batches(grads))

    def forget_gradients(self) -> None:
        """Let no gradients be like those before."""
        self._grads_are_alike = None

    def has_gradients(self, grads: list[Any]) -> bool:
        """Return whether the last step had gradients like these, all of them."""
        return (
            self._grads_are_alike is not None
            and self._grads_are_alike(*self._of_batches(grads))
            and not (self._others and any(grads[i] is not None for i in self._others))
        )

    def has_tensors(self, plan: StepPlan) -> bool:
        """Return whether parameters and buffers are like those of the last step, where they were."""
        stored, tensors = self._tensors(plan)
        return self._tensors_are_alike(*tensors) and self._addresses.are_of(tensors if self._with_buffers else stored)

    def has_those(self, plan: StepPlan, grads: list[Any]) -> bool:
        """Do as :meth:`has_tensors` for all that a step without some of the gradients touches, or more than that."""
        having = [grad is not None for grad in grads]
        if self._with_buffers or sum(having) > _FEW * len(having):
            return self.has_tensors(plan)
        start = 0
        for number, batch in enumerate(plan.batches):
            held = zip(batch.tensors.params, batch.tensors.momentum, batch.tensors.companions, strict=True)
            present = batch.take(having)
            if len(self._apart) == number:
                if not self.has_tensors(plan):
                    return False
                self._apart.append([tensor_guard([x for x in tensors if x is not None]) for tensors in held])
            else:
                for is_alike, tensors in zip(
                    compress(self._apart[number], present), compress(held, present), strict=True
                ):
                    if not is_alike(*[tensor for tensor in tensors if tensor is not None]):
                        return False
                stored = compress(batch.tensors.params, present)
                addresses = compress(self._addresses.values[start : start + len(present)], present)
                if list(map(Tensor.data_ptr, stored)) != list(addresses):
                    return False
            start += len(present)
        return True

    @staticmethod
    def _tensors(plan: StepPlan) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        stored = plan._stored()
        return stored, (*stored, *plan._buffers())

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


def params_of(groups: list[dict[str, Any]]) -> list[Tensor]:
    """Return the parameters of all groups, in their order."""
    if len(groups) == 1:
        params: list[Tensor] = groups[0]["params"]
        return params
    return list(chain.from_iterable(group["params"] for group in groups))


def stored_in(tensor: Any) -> Any:
    """Return the tensor that is stepped in the place of this one: what a DTensor holds on this process."""
    if not is_dtensor(tensor):
        return tensor
    held = held_by(tensor)
    return held if type(held) is Tensor else local(tensor)  # which waits for it
