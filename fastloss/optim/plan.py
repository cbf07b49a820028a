"""Which tensors step together, and whether they are still where they were.

A plan is made when something changed: a parameter got its first gradient, a group was added, a checkpoint loaded. In
every other step it is only checked, in one of two ways.

- :meth:`Plan.holds` looks at everything, attribute by attribute. It decides.
- :class:`Watch` compares everything with the last step in as few passes over lists as there can be, all of them in C.
  It may say "something has changed" where nothing has; then the other decides. Where it says that nothing has, the
  backends need not look again either: ``SGDBatch.unchanged``.

For each parameter that is one pass to get its gradient, and one for its identity and for that of each buffer; then,
for each of these tensors, one for what it looks like and one for its address.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import Addresses, SGDBatch
from .shards import Shards, ShardSums, is_dtensor, local

try:  # what torch.compile asks whether a compiled program fits other tensors; documented nowhere
    from torch._C._dynamo import guards as _guards
except ImportError:
    _guards = None  # type: ignore[assignment]

__all__ = ["SERVED_DTYPES", "Batch", "Plan", "gradients", "kinds", "overlapping", "serves"]

_MOST_DIMENSIONS = 6
SERVED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_gradient_of = operator.attrgetter("grad")
_layout_of = operator.attrgetter("layout")
_dtype_of = operator.attrgetter("dtype")
_get = dict.get
_HAVE_MEMORY = {Tensor, torch.nn.Parameter, type(None)}
# What `.data =` can change without a change of address, as far as a backend does not look itself: the kernels' tables
# hold all of it; the eager backend reads strides anew in every step, and needs to know of sizes and dtypes.
_FORMS_OF = {
    "eager": (operator.attrgetter("nbytes"), torch.Tensor.size, torch.Tensor.stride),
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
    kinds: list[Any]  # of their gradients, see kinds()
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
    addresses: Addresses = field(default_factory=lambda: Addresses(()))  # of those
    forms: list[list[Any]] = field(default_factory=list)  # of those, see _FORMS_OF
    sums: ShardSums | None = None  # over the shards of all DTensors that are stepped; made when it is needed
    watch: _Watch | None = None

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
        self.addresses = Addresses(self.stored)
        self.forms = self._forms()

    def holds(
        self,
        settings: list[Any],
        groups: list[dict[str, Any]],
        states: Collection[dict[str, Any]],
        grads: list[Tensor | None],
    ) -> bool:
        """Is everything as it was when the plan was made?"""
        if self.settings != settings:
            return False
        unchanged = self.watch is not None and self.watch.sees_no_change(groups, states, grads)
        for batch in self.batches:
            batch.tensors.unchanged = unchanged
        if unchanged:
            return True
        self.watch = None
        try:
            return (
                self.kinds == kinds(grads)
                and _identical(_params_of(groups), self.params)
                and _identical(states, self.states)
                and _identical(list(map(operator.getitem, self.holders, self.keys)), self.kept)
                and list(map(_dtype_of, self.companions)) == self.dtypes
                and self.addresses.are_of(self.stored)
                and self._forms() == self.forms
                and all(local(self.params[i]) is shard for i, shard in self.sharded.items())
            )
        except KeyError:  # somebody removed a buffer
            return False

    def stepped(self, states: Collection[dict[str, Any]], grads: list[Tensor | None]) -> None:
        """The plan has been carried out with these gradients: the next step can be compared with it."""
        # (The shards of DTensors' gradients are other tensors in every step.)
        if self.watch is None and self.batches and not self.sharded and _guards is not None:
            with contextlib.suppress(TypeError):  # a state that is no dict; or a torch with other guards
                self.watch = _Watch(self, states, grads)

    def _forms(self) -> list[list[Any]]:
        names = sorted({batch.backend for batch in self.batches})
        return [list(map(form, self.stored)) for name in names for form in _FORMS_OF[name]]


class _Watch:
    """All that a step has found, for the next one to compare itself with. Gradients may lie elsewhere then."""

    def __init__(self, plan: Plan, states: Collection[dict[str, Any]], grads: list[Tensor | None]) -> None:
        self._params, self._stored, self._addresses = plan.params, plan.stored, plan.addresses
        batched = [i for batch in plan.batches for i in batch.indices]
        self._batched = None if batched == list(range(len(grads))) else batched  # None: all, as they come
        self._others = sorted(set(range(len(grads))).difference(batched))  # no gradient, or torch's to step
        self._kinds = [plan.kinds[i] for i in self._others]
        # Of the keys that the plan uses: what the optimizer's states have there, state by state.
        self._buffers = [(key, list(map(_get, states, repeat(key)))) for key in set(plan.keys)]
        self._held = (*plan.stored, *plan.kept)
        self._held_look_so = _looks(self._held)
        self._grads_look_so = _looks(self._of_batches(grads))

    def sees_no_change(
        self, groups: list[dict[str, Any]], states: Collection[dict[str, Any]], grads: list[Tensor | None]
    ) -> bool:
        try:
            for key, buffers in self._buffers:
                if len(buffers) != len(states) or not all(map(operator.is_, map(_get, states, repeat(key)), buffers)):
                    return False
        except TypeError:  # a state that is no dict
            return False
        return (
            self._grads_look_so(*self._of_batches(grads))
            and (not self._others or kinds([grads[i] for i in self._others]) == self._kinds)
            and _identical(_params_of(groups), self._params)
            and self._held_look_so(*self._held)
            and self._addresses.are_of(self._stored)
        )

    def _of_batches(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        return grads if self._batched is None else [grads[i] for i in self._batched]


def _looks(tensors: Sequence[Any]) -> Callable[..., bool]:
    """Are as many tensors, each, of the type, dtype, device, sizes, strides and flags that these have?

    The tensors must all be different ones, and are not held on to.
    """
    return _guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


def gradients(params: Iterable[Tensor]) -> list[Any]:
    """The gradients; None where there is none."""
    return list(map(_gradient_of, params))


def kinds(grads: list[Any]) -> list[Any]:
    """The layouts of gradients; None where there is none.

    Of a tensor subclass, which may have no memory of its own, the type takes the place of the layout.
    """
    try:
        found = list(map(_layout_of, grads))
    except AttributeError:
        found = [None if grad is None else grad.layout for grad in grads]
    if not _HAVE_MEMORY.issuperset(map(type, grads)):
        for i, grad in enumerate(grads):
            if type(grad) not in _HAVE_MEMORY and not is_dtensor(grad):
                found[i] = type(grad)
    return found


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


def _params_of(groups: list[dict[str, Any]]) -> list[Tensor]:
    if len(groups) == 1:
        params: list[Tensor] = groups[0]["params"]
        return params
    return list(chain.from_iterable(group["params"] for group in groups))


def _identical(some: Collection[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))
