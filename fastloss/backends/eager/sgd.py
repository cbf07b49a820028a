"""SGD by torch's fused operator, in forms in which it is fast and right.

The operator is right for tensors of float32 and float64 that are laid out alike, and since torch 2.14 for those of 16
bits, which it steps in float32 and rounds once. It takes one after the other, splits each over torch's threads, and
spends more on that than on the arithmetic where a tensor is small. So

- many small tensors are divided among threads of their own, each of which steps its share: a quarter of the time;
- large ones go to the operator as they are;
- tensors of another dtype are stepped in float32, a piece at a time that stays in a cache; small ones of that sort
  of all rules are gathered into one, side by side, where their momentum buffers lie for good (but for those that a
  program shares among processes); large ones, and small ones of which some have no gradient, go to the operator where
  it is right for them. Elsewhere those that have gradients are gathered, or, where each is worth a call, copied one
  by one to memory that stays in a cache;
- the factor of clipped gradients goes into the rule, where a rule can take it; elsewhere they are multiplied first,
  piece by piece too. They are not written to.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, compress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..contract import Addresses, SGDBatch, SGDControls, SGDRule, check_gradients, compute_dtype
from ..torch_private import (
    flatten,
    foreach_copy_,
    foreach_mul,
    foreach_mul_,
    foreach_norm,
    fused_sgd_,
    materialized,
    split_copy,
    unflatten,
    unscale_,
    write_back,
)
from .rounding import compensated, round_stochastically, true_master, without_infinities
from .workers import for_each

__all__ = ["sgd_squares", "sgd_step"]

# Elements up to which a tensor is small: the operator's fixed cost shows.
_SMALL = 16384
# So many small tensors are worth waking the workers, which takes a tenth of a millisecond.
_MANY = 256
# Elements of a large tensor that are stepped at a time: their float32 copies stay in a cache.
_PIECE = 1 << 18
# Elements of small tensors that are copied to float32 at a time; and those of one that make a call worth its while.
_BUNCH = 1 << 18
_WORTH_A_CALL = 2048
# Elements whose squares are added up in float32.
_NORM_PIECE = 1 << 14
_NORM_EPSILON = 1e-6
# Of factors from here on, 1 − (1 − factor) keeps ten digits.
_LEAST_FACTOR = 1e-6
_ALL = slice(None)
_NUMBER_TYPES = {float, int, bool}

_bytes_of = operator.attrgetter("nbytes")
_dtype_of = operator.attrgetter("dtype")


def sgd_squares(batch: SGDBatch, grads: list[Tensor], squares: Tensor) -> None:
    """See :class:`fastloss.backends.contract.Backend`."""
    wide = compute_dtype(batch.params[0].dtype)
    for part in _parts(batch, grads):
        if part.flat is not None:
            squares += _squares(part.flat.gather_gradients(batch, grads, wide), batch)
        if part.small is not None:
            chosen = _chosen(grads, part.small.indices)
            widest = torch.float64 if any(grad.dtype == torch.float64 for grad in chosen) else wide
            norms = foreach_norm(chosen, 2, dtype=widest)
            squares += torch.stack(norms).double().square().sum()
        for i in part.pieced + (part.large.indices if part.large is not None else []):
            grad = grads[i]
            dense = grad.as_strided((grad.numel(),), (1,)) if _is_dense(grad) else grad.reshape(-1)
            squares += _squares(dense, batch)


def _squares(flat: Tensor, batch: SGDBatch) -> Tensor:
    """Return Σ g², float64, by norms of short pieces: over 10⁷ numbers torch's norm loses 3 of float32's 7 digits."""
    wide = torch.promote_types(flat.dtype, compute_dtype(batch.params[0].dtype))
    whole = flat.numel() // _NORM_PIECE * _NORM_PIECE
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_PIECE), dim=1, dtype=wide)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=wide)
    return norms.double().square().sum() + rest.double().square()


def sgd_step(batch: SGDBatch, grads: list[Tensor], rules: Sequence[SGDRule], controls: SGDControls) -> None:
    """See :class:`fastloss.backends.contract.Backend`."""
    if controls.found_inf is not None and controls.found_inf.item() != 0:
        return
    if controls.grad_scale is not None:
        _unscale([grad for grad in grads if grad is not None], controls.grad_scale)
    given, factor = rules, _clip_factor(controls)
    for part in _parts(batch, grads):
        rules, clip = _with_factor(given, factor, first=part.first)
        if part.flat is not None:
            _step_flat(batch, part.flat, grads, rules, clip, first=part.first)
            continue
        rule = _Numbers.of(rules[part.rule])
        if part.small is not None:
            _step_small(batch, part.small, grads, rule, clip, first=part.first)
        if part.large is not None:
            _step_large(batch, part.large, grads, rule, clip, first=part.first)
        if part.pieced:
            check_gradients([batch.params[i] for i in part.pieced], [grads[i] for i in part.pieced])
        for i in part.pieced:
            if _step_directly(batch, [i], grads, rules, clip, first=part.first):
                continue
            _step_by_pieces(batch, i, _laid_out_as(batch.params[i], grads[i]), rule, clip, first=part.first)
    for i, flags in batch.begun.items():
        if batch.momentum[i] is not None and grads[i] is not None:
            flags.fill_(1)


class _Numbers(NamedTuple):
    """A rule with numbers in the place of tensors; for those on a GPU the host waits."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    decoupled: bool

    @staticmethod
    def of(rule: SGDRule) -> _Numbers:
        if _NUMBER_TYPES.issuperset(map(type, rule)):
            return cast("_Numbers", rule)
        values: list[Any] = [value.item() if isinstance(value, Tensor) else value for value in rule]
        return _Numbers(*values)


@dataclass(eq=False)
class _Flat:
    """Small tensors, stepped as one: their momentum buffers lie side by side for good."""

    indices: list[int]
    kinds: tuple[str, ...]  # the buffers that there are: "momentum", "companions"
    addresses: list[Addresses]  # of each kind
    rest: tuple[int, ...] | None  # the parameters' sizes but for the first, if all have the same: rows of one matrix
    numels: list[int]  # of the parameters
    rules: list[int]  # of the parameters, those of one rule side by side
    gathered: bool = False  # the buffers lie elsewhere, and each step works on copies
    rooms: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)
    cuts: dict[tuple[str, torch.dtype], list[Tensor]] = field(default_factory=dict)  # views of rooms
    rooms_of_chosen: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)
    places: dict[str, list[Tensor]] = field(default_factory=dict)  # see slots()

    @staticmethod
    def of(batch: SGDBatch, indices: list[int]) -> _Flat:
        params = _chosen(batch.params, indices)
        kinds = tuple(kind for kind in ("momentum", "companions") if getattr(batch, kind)[indices[0]] is not None)
        buffers = [_chosen(getattr(batch, kind), indices) for kind in kinds]
        gathered = any(any(map(Tensor.is_shared, some)) for some in buffers)
        for some in buffers if not gathered else ():
            _side_by_side(some)
        rests = {tuple(param.shape[1:]) if param.dim() else None for param in params}
        rest, numels = rests.pop() if len(rests) == 1 else None, list(map(Tensor.numel, params))
        rules = [batch.rules[i] for i in indices]
        return _Flat(indices, kinds, list(map(Addresses, buffers)), rest, numels, rules, gathered)

    def chosen(self, batch: SGDBatch, grads: list[Any]) -> _Flat | None:
        """Return those of the tensors that have gradients, for one step."""
        having = _having(self.indices, grads)
        if not any(having):
            return None
        if all(having) and (not self.may_be_copied(batch) or self.lies_still(batch)):
            return self
        return _ChosenFlat(
            list(compress(self.indices, having)),
            self.kinds,
            [],
            self.rest,
            list(compress(self.numels, having)),
            list(compress(self.rules, having)),
            gathered=True,
            rooms=self.rooms_of_chosen,
            whole=self,
            having=having,
        )

    def params(self, batch: SGDBatch) -> list[Tensor]:
        return _chosen(batch.params, self.indices)

    def may_be_copied(self, batch: SGDBatch) -> bool:
        """Return whether this step works on copies of the buffers, wherever they are, if some have no gradient."""
        return batch.incomplete and self.rest is not None

    def lies_still(self, batch: SGDBatch) -> bool:
        """Return whether the buffers are where they were."""
        return all(
            addresses.are_of(_chosen(getattr(batch, kind), self.indices))
            for kind, addresses in zip(self.kinds, self.addresses, strict=False)
        )

    def buffer(self, batch: SGDBatch, kind: str) -> Tensor | None:
        """Return the buffers of a kind as one tensor: their own memory, or a copy if they are gathered."""
        if kind not in self.kinds:
            return None
        buffers: list[Tensor] = _chosen(getattr(batch, kind), self.indices)
        if not self.gathered:
            return buffers[0].as_strided((self.numel,), (1,))
        return self.gather(batch, kind, buffers, buffers[0].dtype, buffers[0].dtype)

    def put_back(self, batch: SGDBatch) -> None:
        """Write what has been copied to the buffers."""
        for kind in self.kinds if self.gathered else ():
            buffers = _chosen(getattr(batch, kind), self.indices)
            self.distribute(batch, kind, buffers[0].dtype, buffers)

    @functools.cached_property
    def numel(self) -> int:
        """The elements of all of the parameters."""
        return sum(self.numels)

    @functools.cached_property
    def offsets(self) -> list[int]:
        """Where each of the parameters begins, and where the last one ends."""
        return list(accumulate(self.numels, initial=0))

    @functools.cached_property
    def bunches(self) -> list[tuple[int, int]]:
        """Neighbours whose float32 copies stay in a cache: the first, and the one after the last."""
        bunches, first, numel = [], 0, 0
        for i, more in enumerate(self.numels):
            if numel and numel + more > _BUNCH:
                bunches.append((first, i))
                first, numel = i, 0
            numel += more
        return [*bunches, (first, len(self.numels))]

    def slots(self, batch: SGDBatch, name: str) -> list[Tensor]:
        """Return a place for a float32 copy of each parameter, in memory that all bunches share."""
        if name not in self.places:
            params, numels = self.params(batch), [sum(self.numels[slice(*bunch)]) for bunch in self.bunches]
            room = torch.empty(max(numels), device=params[0].device)
            bunches = zip(self.bunches, numels, strict=True)
            self.places[name] = [p for at, n in bunches for p in unflatten(room[:n], params[slice(*at)])]
        return self.places[name]

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """The rules, and how many elements are stepped by each."""
        if len(set(self.rules)) == 1:
            return [(self.rules[0], self.numel)]
        lengths: dict[int, int] = {}
        for rule, numel in zip(self.rules, self.numels, strict=True):
            lengths[rule] = lengths.get(rule, 0) + numel
        return list(lengths.items())

    def gather_gradients(self, batch: SGDBatch, grads: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the gradients side by side, in ``dtype``."""
        params, chosen = self.params(batch), _chosen(grads, self.indices)
        if list(map(Tensor.numel, chosen)) != self.numels:
            check_gradients(params, chosen)
        dtypes = set(map(_dtype_of, chosen))
        return self.gather(batch, "grads", chosen, dtypes.pop() if len(dtypes) == 1 else dtype, dtype)

    def gather(
        self, batch: SGDBatch, name: str, tensors: list[Tensor], given: torch.dtype, dtype: torch.dtype
    ) -> Tensor:
        """Return tensors of the dtype ``given``, or of several, side by side in ``dtype``."""
        flat = self.room(batch, name, dtype)
        with torch.inference_mode():  # costs a fifth less than no_grad
            if self.rest is None:
                self.gather_shapes(batch, name, tensors, dtype)
            elif given == dtype:
                torch.cat(tensors, out=self.rows(flat))  # half of the time of the other
            else:  # to convert them one by one would take ten times as long
                narrow = self.room(batch, name, given)
                torch.cat(tensors, out=self.rows(narrow))
                flat.copy_(narrow)
        return flat

    def gather_shapes(self, batch: SGDBatch, name: str, tensors: list[Tensor], dtype: torch.dtype) -> None:
        """Copy tensors of any shapes to a room."""
        foreach_copy_(self.views(batch, name, dtype), tensors)

    def scatter(self, batch: SGDBatch, dtype: torch.dtype) -> None:
        """Write to the parameters what has been gathered of them in ``dtype``."""
        params = self.params(batch)
        with torch.inference_mode():
            self.distribute(batch, "params", dtype, params)
        torch.autograd.graph.increment_version(params)  # which that mode does not

    def distribute(self, batch: SGDBatch, name: str, dtype: torch.dtype, tensors: list[Tensor]) -> None:
        """Copy a room to tensors."""
        foreach_copy_(tensors, self.views(batch, name, dtype))

    def rows(self, flat: Tensor) -> Tensor:
        """Return a flat tensor as the matrix of which tensors with the same :attr:`rest` have some rows each."""
        return flat.view(-1, *self.rest) if self.rest else flat

    def room(self, batch: SGDBatch, name: str, dtype: torch.dtype) -> Tensor:
        """Return a flat buffer for all parameters: the same memory in every step."""
        room = self.rooms.get((name, dtype))
        if room is None or room.numel() < self.numel:
            self.cuts.clear()
            with torch.inference_mode(False):  # it is written to in that mode and out of it
                room = torch.empty(self.numel, dtype=dtype, device=batch.params[0].device)
            self.rooms[name, dtype] = room
        return room[: self.numel]

    def views(self, batch: SGDBatch, name: str, dtype: torch.dtype) -> list[Tensor]:
        """Return the parts of a room in the parameters' shapes."""
        if (name, dtype) not in self.cuts:
            room = self.room(batch, name, dtype)
            self.cuts[name, dtype] = list(
                room.split(self.numels) if self.rest == () else unflatten(room, self.params(batch))
            )
        return self.cuts[name, dtype]


@dataclass(eq=False, kw_only=True)
class _ChosenFlat(_Flat):
    """Holds those of a flat's tensors that have gradients in a step, which works on copies.

    Nothing is made for each of them: neighbours are copied together, between their own flat buffers and the whole's.
    """

    whole: _Flat
    having: list[bool]  # of each tensor of the whole: whether it has a gradient
    memory: dict[str, list[Tensor]] = field(default_factory=dict)  # of neighbours' buffers

    def buffer(self, batch: SGDBatch, kind: str) -> Tensor | None:
        whole = None if self.whole.gathered or self.rest is not None else self.whole.buffer(batch, kind)
        if whole is None:
            return super().buffer(batch, kind)
        stretches = self.memory[kind] = self.stretches(whole)
        return torch.cat(stretches, out=self.room(batch, kind, whole.dtype))

    def put_back(self, batch: SGDBatch) -> None:
        if not self.memory:
            super().put_back(batch)
        for kind, stretches in self.memory.items():
            foreach_copy_(stretches, self.pieces(self.room(batch, kind, stretches[0].dtype)))

    def gather_shapes(self, batch: SGDBatch, name: str, tensors: list[Tensor], dtype: torch.dtype) -> None:
        self.room(batch, name, dtype).copy_(flatten(tensors))

    def views(self, batch: SGDBatch, name: str, dtype: torch.dtype) -> list[Tensor]:
        """Return the parts of a room, copied to the whole's, whose views are there."""
        whole, views = self.whole.room(batch, name, dtype), self.whole.views(batch, name, dtype)
        foreach_copy_(self.stretches(whole), self.pieces(self.room(batch, name, dtype)))
        return list(compress(views, self.having))

    def distribute(self, batch: SGDBatch, name: str, dtype: torch.dtype, tensors: list[Tensor]) -> None:
        if self.rest is None:
            super().distribute(batch, name, dtype, tensors)
            return
        room, narrow = self.room(batch, name, dtype), tensors[0].dtype
        if dtype != narrow:
            room = self.room(batch, name, narrow).copy_(room)
        row = math.prod(self.rest)
        split_copy(self.rows(room), [numel // row for numel in self.numels], out=tensors)

    @functools.cached_property
    def runs(self) -> list[int]:
        """The elements of tensors without gradients, of neighbours that have them, and so on in turn."""
        turns = map(operator.is_not, [*self.having, False], [False, *self.having])
        bounds = [0, *compress(self.whole.offsets, turns), self.whole.numel]
        return list(map(operator.sub, bounds[1:], bounds))

    def stretches(self, whole: Tensor) -> list[Tensor]:
        return list(whole.split(self.runs))[1::2]

    def pieces(self, room: Tensor) -> list[Tensor]:
        return list(room.split(self.runs[1::2]))


@dataclass(eq=False)
class _Direct:
    """Tensors of one rule that torch's operator takes as they are, with their buffers."""

    indices: list[int]
    has_momentum: bool
    contiguous: bool  # all of the parameters are
    nbytes: list[int]  # of the parameters
    fit: bool = False  # the gradients of the step before were taken as they came

    @staticmethod
    def of(batch: SGDBatch, indices: list[int]) -> _Direct:
        params = _chosen(batch.params, indices)
        contiguous, has_momentum = all(map(Tensor.is_contiguous, params)), batch.momentum[indices[0]] is not None
        return _Direct(indices, has_momentum, contiguous, list(map(_bytes_of, params)))

    def chosen(self, grads: list[Any]) -> _Direct | None:
        """Return those of the tensors that have gradients, for one step."""
        having = _having(self.indices, grads)
        if not any(having):
            return None
        indices, nbytes = (list(compress(values, having)) for values in (self.indices, self.nbytes))
        return _Direct(indices, self.has_momentum, self.contiguous, nbytes)

    def params(self, batch: SGDBatch) -> list[Tensor]:
        return _chosen(batch.params, self.indices)

    def momentum(self, batch: SGDBatch) -> list[Tensor]:
        chosen: list[Any] = _chosen(batch.momentum, self.indices) if self.has_momentum else []
        return chosen

    def known_to_fit(self, *, unchanged: bool) -> bool:
        """Return whether it is known that gradients can be taken as they come; else :meth:`fitting` finds out."""
        known = unchanged and self.fit
        self.fit = True
        return known

    def fitting(self, params: list[Tensor], given: list[Tensor], share: slice = _ALL, *, known: bool) -> list[Tensor]:
        """Return the gradients of a share of the tensors, in the form that the operator needs."""
        if known:
            return given
        chosen = given
        if list(map(_bytes_of, chosen)) != self.nbytes[share]:  # of another dtype, or another shape
            check_gradients(params, chosen)
            chosen = [grad.to(params[0].dtype) for grad in chosen]
        if not (self.contiguous and all(map(Tensor.is_contiguous, chosen))):
            chosen = [_laid_out_as(param, grad) for param, grad in zip(params, chosen, strict=True)]
        if not all(map(operator.is_, chosen, given)):
            self.fit = False  # from several threads
        return chosen


@dataclass(eq=False)
class _Part:
    """The tensors of one rule whose momentum buffers begin with this step, or those whose have begun.

    Or a flat alone, of several rules.
    """

    rule: int
    first: bool
    small: _Direct | None
    large: _Direct | None
    flat: _Flat | None
    pieced: list[int]  # large ones, of other dtypes than are computed in
    strided: list[int]  # those whose strides must stay, and those of their buffers
    strides: list[tuple[int, ...]]

    @staticmethod
    def of(batch: SGDBatch, rule: int, first: bool, indices: list[int], flat: list[int]) -> _Part:
        """Return the part without those that belong in a flat; these are added to ``flat``."""
        wide = compute_dtype(batch.params[0].dtype)
        small: list[int] = []
        large: list[int] = []
        pieced: list[int] = []
        strided: list[int] = []
        for i in indices:
            param, momentum, companion = batch.params[i], batch.momentum[i], batch.companions[i]
            is_small = param.numel() <= _SMALL and param.device.type == "cpu"
            direct = (
                batch.rounding == "nearest" and param.dtype == wide and (momentum is None or momentum.dtype == wide)
            )
            if not _is_dense(param) or (is_small and not direct):
                flat.append(i)
                continue
            for buffer in (momentum, companion):
                if buffer is not None and buffer.stride() != param.stride():
                    buffer.data = _laid_out_as(param, buffer)
            (pieced if not direct else small if is_small else large).append(i)
            if not direct or param.dim() > 1:
                strided.append(i)
        return _Part(
            rule,
            first,
            _Direct.of(batch, small) if small else None,
            _Direct.of(batch, large) if large else None,
            None,
            pieced,
            strided,
            _strides(batch, strided),
        )

    def chosen(self, batch: SGDBatch, grads: list[Any]) -> _Part:
        """Return the part with those of its tensors that have gradients, for one step."""
        return _Part(
            self.rule,
            self.first,
            None if self.small is None else self.small.chosen(grads),
            None if self.large is None else self.large.chosen(grads),
            None if self.flat is None else self.flat.chosen(batch, grads),
            [i for i in self.pieced if grads[i] is not None],
            [],
            [],
        )

    def holds(self, batch: SGDBatch) -> bool:
        """Return whether everything is where it was; a program may have moved buffers to another device and back."""
        return (self.flat is None or self.flat.may_be_copied(batch) or self.flat.lies_still(batch)) and (
            batch.settled or _strides(batch, self.strided) == self.strides
        )


def _strides(batch: SGDBatch, indices: list[int]) -> list[tuple[int, ...]]:
    """Return the strides of parameters and their buffers."""
    lists = (batch.params, batch.momentum, batch.companions)
    return [tensor.stride() for values in lists for i in indices if (tensor := values[i]) is not None]


def _parts(batch: SGDBatch, grads: list[Any]) -> list[_Part]:
    """Return the parts in which the tensors are stepped: those of the step before, if nothing has changed."""
    first = {i for i, flags in batch.begun.items() if not flags.any()} if batch.begun else set()
    parts: list[_Part] = batch.memory.get("parts", [])
    holds = parts and batch.memory["first"] == first and all(part.holds(batch) for part in parts)
    dtypes = (
        batch.memory["dtypes"]
        if holds and batch.settled
        else [None if m is None else m.dtype for m in batch.momentum]
    )
    if not holds or batch.memory["dtypes"] != dtypes:
        together: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for i, (param, number) in enumerate(zip(batch.params, batch.rules, strict=True)):
            if param.numel():
                together[number, i in first].append(i)
        flats: dict[tuple[bool, torch.dtype | None], list[int]] = defaultdict(list)
        parts = []
        for (rule, begins), indices in together.items():
            flat: list[int] = []
            part = _Part.of(batch, rule, begins, indices, flat)
            if len(flat) < len(indices):
                parts.append(part)
            for i in flat:
                momentum = batch.momentum[i]
                flats[begins, None if momentum is None else momentum.dtype].append(i)
        for (begins, _), indices in flats.items():
            parts.append(_Part(-1, begins, None, None, _Flat.of(batch, indices), [], [], []))
        batch.memory.update(parts=parts, first=first, dtypes=dtypes)
    return [part.chosen(batch, grads) for part in parts] if batch.incomplete else parts


def _having(indices: list[int], grads: list[Any]) -> list[bool]:
    """Return of each index whether its tensor has a gradient."""
    return [grad is not None for grad in _chosen(grads, indices)]


def _side_by_side(buffers: list[Tensor]) -> None:
    """Move the buffers' memory into one tensor, where they lie one after the other."""
    flat = flatten([buffer.contiguous() for buffer in buffers])
    if len(buffers) == 1:
        flat = flat.clone()  # of one tensor it is a view
    for buffer, view in zip(buffers, unflatten(flat, buffers), strict=True):
        buffer.data = view


def _step_flat(
    batch: SGDBatch, flat: _Flat, grads: list[Tensor], rules: Sequence[SGDRule], clip: float, *, first: bool
) -> None:
    wide, narrow = compute_dtype(batch.params[0].dtype), batch.params[0].dtype
    params = flat.params(batch)
    if isinstance(flat, _ChosenFlat) and (
        _step_directly(batch, flat.indices, grads, rules, clip, first=first)
        or _step_copies(batch, flat, grads, rules, clip, first=first)
    ):
        return
    grad = flat.gather_gradients(batch, grads, wide)
    momentum, companions = flat.buffer(batch, "momentum"), flat.buffer(batch, "companions")
    advance = functools.partial(
        _advance_flat, batch, flat, momentum=momentum, grad=grad, rules=rules, clip=clip, first=first
    )
    if batch.rounding == "master":
        assert companions is not None
        result = flat.room(batch, "params", narrow)
        companions.copy_(true_master(companions, flat.gather(batch, "params", params, narrow, narrow)))
        advance(companions)
        result.copy_(companions)  # one rounding of all; lists of tensors of two dtypes are copied one by one
    elif batch.rounding == "nearest":
        result = flat.gather(batch, "params", params, narrow, wide)
        advance(result)
    else:
        result = flat.gather(batch, "params", params, narrow, narrow)
        _advance_rounded(batch, result, companions, advance)
    flat.scatter(batch, result.dtype)
    flat.put_back(batch)


def _advance_flat(
    batch: SGDBatch,
    flat: _Flat,
    result: Tensor,
    *,
    momentum: Tensor | None,
    grad: Tensor,
    rules: Sequence[SGDRule],
    clip: float,
    first: bool,
) -> None:
    """Step a flat tensor, each rule's stretch of it by that rule."""
    spans, buffer = flat.spans, _in_dtype(batch, "momentum", momentum, result.dtype)
    if clip != 1.0:
        grad.mul_(clip)
    lengths = [length for _, length in spans]
    buffers = [[]] * len(spans) if buffer is None else [[piece] for piece in buffer.split(lengths)]
    stretches = zip(spans, result.split(lengths), grad.split(lengths), buffers, strict=True)
    for (number, _), of_result, of_grad, of_buffer in stretches:
        _advance([of_result], [of_grad], of_buffer, _Numbers.of(rules[number]), first=first)
    if momentum is not None and buffer is not momentum:
        momentum.copy_(buffer)


def _step_small(
    batch: SGDBatch, small: _Direct, grads: list[Tensor], rule: _Numbers, clip: float, *, first: bool
) -> None:
    known = small.known_to_fit(unchanged=batch.unchanged)
    all_params, all_grads, momentum = small.params(batch), _chosen(grads, small.indices), small.momentum(batch)

    def step(share: slice) -> None:
        # All of it in the threads: while one is in the operator, another one checks the gradients of its share.
        params = all_params[share]
        chosen = small.fitting(params, all_grads[share], share, known=known)
        if clip != 1.0:
            chosen = list(foreach_mul(chosen, clip))
        _advance(params, chosen, momentum[share], rule, first=first)
        torch.autograd.graph.increment_version(params)  # which torch's operator does not

    count = len(all_params)
    if count < _MANY:
        step(_ALL)
    else:
        threads = torch.get_num_threads()  # one share each: between calls of operators threads wait for each other
        shares = [slice(count * i // threads, count * (i + 1) // threads) for i in range(threads)]
        for_each(shares, step, all_params[0].device, few=2)


def _step_large(
    batch: SGDBatch, large: _Direct, grads: list[Tensor], rule: _Numbers, clip: float, *, first: bool
) -> None:
    params, known = large.params(batch), large.known_to_fit(unchanged=batch.unchanged)
    chosen = large.fitting(params, _chosen(grads, large.indices), known=known)
    if clip == 1.0:
        _advance(params, chosen, large.momentum(batch), rule, first=first)
        torch.autograd.graph.increment_version(params)
    else:
        for i, grad in zip(large.indices, chosen, strict=True):
            _step_by_pieces(batch, i, grad, rule, clip, first=first)


def _step_directly(
    batch: SGDBatch,
    indices: list[int],
    grads: list[Tensor],
    rules: Sequence[SGDRule],
    clip: float,
    *,
    first: bool,
) -> bool:
    """Step tensors of 16 bits by torch's operator, if it can take all of them as they are; return whether it did."""
    dtype = batch.params[indices[0]].dtype
    if clip != 1.0 or batch.rounding != "nearest" or not _is_right_in(dtype):
        return False
    params, chosen = _chosen(batch.params, indices), _chosen(grads, indices)
    has_momentum = batch.momentum[indices[0]] is not None
    momentum: list[Any] = _chosen(batch.momentum, indices) if has_momentum else []
    tensors = [*params, *chosen, *momentum]
    if set(map(_dtype_of, tensors)) != {dtype} or not all(map(Tensor.is_contiguous, tensors)):
        return False
    numbers = {number: _Numbers.of(rules[number]) for number in {batch.rules[i] for i in indices}}
    if any(rule.decoupled and rule.weight_decay != 0 for rule in numbers.values()):
        return False  # two roundings
    check_gradients(params, chosen)
    _advance_lists([params, chosen, momentum], [batch.rules[i] for i in indices], numbers, first=first)
    torch.autograd.graph.increment_version(params)
    return True


def _step_copies(
    batch: SGDBatch, flat: _ChosenFlat, grads: list[Tensor], rules: Sequence[SGDRule], clip: float, *, first: bool
) -> bool:
    """Step tensors of 16 bits by float32 copies of each, if they are rounded to nearest; return whether it did.

    Copies that lie apart need no views that depend on the set of gradients.
    """
    params, whole = flat.params(batch), flat.whole
    is_narrow = batch.rounding == "nearest" and params[0].dtype.itemsize == 2
    if clip != 1.0 or not is_narrow or flat.numel < _WORTH_A_CALL * len(params):
        return False
    chosen = _chosen(grads, flat.indices)
    check_gradients(params, chosen)
    narrow = {"params": params, "grads": materialized(chosen)}
    momentum: list[Tensor] = _chosen(batch.momentum, flat.indices) if "momentum" in flat.kinds else []
    if momentum and momentum[0].dtype != torch.float32:
        narrow["momentum"] = momentum
    wide = {name: list(compress(whole.slots(batch, name), flat.having)) for name in narrow}
    numbers = {number: _Numbers.of(rules[number]) for number in set(flat.rules)}
    before = list(accumulate(flat.having, initial=0))
    with torch.inference_mode():
        for first_of_bunch, end in whole.bunches:
            bunch = slice(before[first_of_bunch], before[end])
            if bunch.start < bunch.stop:
                for name, tensors in narrow.items():
                    foreach_copy_(wide[name][bunch], tensors[bunch])
                lists = [some[bunch] for some in (wide["params"], wide["grads"], wide.get("momentum", momentum))]
                _advance_lists(lists, flat.rules[bunch], numbers, first=first)
                for name in narrow.keys() - {"grads"}:
                    foreach_copy_(narrow[name][bunch], wide[name][bunch])
    torch.autograd.graph.increment_version(params)
    return True


def _advance_lists(lists: list[list[Tensor]], rules: list[int], numbers: dict[int, _Numbers], *, first: bool) -> None:
    """Step tensors (lists of parameters, gradients and momentum), each by its own of several rules."""
    for number, rule in numbers.items():
        of_rule = [other == number for other in rules] if len(numbers) > 1 else None
        params, grads, momentum = lists if of_rule is None else [list(compress(some, of_rule)) for some in lists]
        if params:
            _advance(params, grads, momentum, rule, first=first)


@functools.cache
def _is_right_in(dtype: torch.dtype) -> bool:
    """Return whether torch's operator steps tensors of a dtype of 16 bits in float32. Before torch 2.14 it is wrong.

    It is asked for a step in the middle of memory that it may spoil.
    """
    if dtype.itemsize != 2:
        return False
    given = [row[448:576] for row in torch.linspace(-3, 3, 3 * 1024, device="cpu").view(3, 1024).to(dtype)]
    exact = [row.float() for row in given]
    rule = _Numbers(0.1, 0.9, 0.1, 0.01, True, False, False)
    for param, grad, momentum in (given, exact):
        _advance([param], [grad], [momentum], rule, first=False)
    return torch.equal(given[0], exact[0].to(dtype)) and torch.equal(given[2], exact[2].to(dtype))


def _step_by_pieces(batch: SGDBatch, i: int, grad: Tensor, rule: _Numbers, clip: float, *, first: bool) -> None:
    tensors, count = (batch.params[i], grad, batch.momentum[i], batch.companions[i]), -(-grad.numel() // _PIECE)
    lines: Any = (
        [None] * count if tensor is None else tensor.as_strided((tensor.numel(),), (1,)).split(_PIECE)
        for tensor in tensors
    )
    for param, piece, momentum, companion in zip(*lines, strict=True):
        wide = compute_dtype(param.dtype)
        piece_of_grad = _in_dtype(batch, "grads", piece, wide, clip)
        advance = functools.partial(_advance_piece, batch, piece_of_grad, momentum, rule, first)
        if batch.rounding == "master":
            companion.copy_(true_master(companion, param))
            advance(companion)
            param.copy_(companion)
        elif param.dtype == wide:
            advance(param)
        else:
            _advance_rounded(batch, param, companion, advance)
    torch.autograd.graph.increment_version([batch.params[i]])


def _advance_piece(
    batch: SGDBatch, grad: Tensor, momentum: Tensor | None, rule: _Numbers, first: bool, wide: Tensor
) -> None:
    buffer = _in_dtype(batch, "momentum", momentum, wide.dtype)
    _advance([wide], [grad], _listed(buffer), rule, first=first)
    if momentum is not None and buffer is not momentum:
        momentum.copy_(buffer)


def _in_dtype(batch: SGDBatch, name: str, tensor: Any, dtype: torch.dtype, factor: float = 1.0) -> Any:
    """Return a flat tensor, or None, in ``dtype`` and times a factor.

    A copy has the same memory in every step: new memory takes longer.
    """
    if tensor is None or (tensor.dtype == dtype and factor == 1.0):
        return tensor
    rooms: dict[str, Tensor] = batch.memory.setdefault("rooms", {})
    room, numel = rooms.get(name), tensor.numel()
    if room is None or room.numel() < numel:
        room = rooms[name] = torch.empty(numel, dtype=dtype, device=tensor.device)
    result = room[:numel]
    if tensor.dtype == dtype:
        return torch.mul(tensor, factor, out=result)
    result.copy_(tensor)
    return result if factor == 1.0 else result.mul_(factor)


def _advance_rounded(
    batch: SGDBatch, param: Tensor, compensation: Tensor | None, advance: Callable[[Tensor], None]
) -> None:
    """Step one flat tensor of 16 bits in float32 by ``advance``, and round it."""
    if compensation is None:
        wide = _in_dtype(batch, "params", param, torch.float32)
    else:
        wide = compensated(param, compensation)
    advance(wide)
    if batch.rounding == "stochastic":
        param.copy_(round_stochastically(wide, param.dtype, batch.seed))
    else:
        param.copy_(wide)
    if compensation is not None:
        compensation.copy_(without_infinities(wide.sub_(param)))


def _advance(
    params: list[Tensor], grads: list[Tensor], momentum: list[Tensor], rule: _Numbers, *, first: bool
) -> None:
    """Step tensors of one dtype: float32 or float64, or 16 bits where the operator is right for them."""
    if rule.decoupled and rule.weight_decay != 0:
        foreach_mul_(params, 1.0 - rule.lr * rule.weight_decay)
    step = functools.partial(
        fused_sgd_,
        params,
        momentum_buffer_list=momentum,
        weight_decay=0.0 if rule.decoupled else rule.weight_decay,
        momentum=rule.momentum,
        lr=rule.lr,
        dampening=rule.dampening,
        nesterov=rule.nesterov,
        maximize=rule.maximize,
        is_first_step=first,
    )
    try:
        step(grads=grads)
    except RuntimeError:  # before it does anything, about a gradient that is negated when it is read
        plain = materialized(grads)
        if plain is grads:
            raise
        step(grads=plain)


def _laid_out_as(param: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor with the parameter's strides, and without a negative bit, which copies to float32 ignore."""
    tensor = tensor.resolve_neg()
    if tensor.stride() == param.stride():
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def _chosen(tensors: list[Any], indices: list[int]) -> list[Any]:
    return tensors if len(indices) == len(tensors) else [tensors[i] for i in indices]


def _listed(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


def _unscale(grads: list[Tensor], grad_scale: Tensor) -> None:
    of_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for grad in grads:
        of_dtype[grad.dtype].append(grad)
    inverse = grad_scale.double().reciprocal().float()
    for some in of_dtype.values():
        multiply(some, inverse)


def multiply(grads: list[Tensor], factor: Tensor) -> None:
    """g ← g · factor for gradients of one dtype and device, in float32 (float64 in its own), rounded once."""
    products = materialized(grads)
    if grads[0].dtype == torch.bfloat16 and not grads[0].is_cpu:  # torch's operator for it takes none on a GPU
        for product in products:
            product.copy_(product.float().mul_(factor))
    else:
        unscale_(products, torch.zeros((), dtype=torch.float32, device=factor.device), factor)
    write_back(grads, products)


def _clip_factor(controls: SGDControls) -> float:
    if controls.squares is None:
        return 1.0
    norm = controls.squares.sqrt()
    if controls.grad_scale is not None:
        norm = norm / controls.grad_scale
    factor: float = (controls.max_norm / (norm + _NORM_EPSILON)).clamp(max=1.0).item()
    return factor


def _with_factor(rules: Sequence[SGDRule], factor: float, *, first: bool) -> tuple[Sequence[SGDRule], float]:
    """Return rules whose steps with g are those of ``rules`` with factor · g, and 1; or ``rules`` and the factor.

    The gradients need no pass of their own then. With momentum, factor · g + λθ enters the buffer times
    1 − dampening, as g + λ/factor · θ does times factor · (1 − dampening). A buffer that begins, and Nesterov's step,
    take the gradient without dampening. Without momentum the learning rate takes the factor.
    """
    if factor == 1.0:
        return rules, factor
    numbers = list(map(_Numbers.of, rules))
    with_momentum = [rule.momentum != 0 for rule in numbers]
    can_be = all(not (has and (first or rule.nesterov)) for has, rule in zip(with_momentum, numbers, strict=True))
    if not can_be or not factor >= _LEAST_FACTOR:
        return rules, factor
    with_factor: list[Any] = []
    for rule, has in zip(numbers, with_momentum, strict=True):
        decay = rule.weight_decay if rule.decoupled and has else rule.weight_decay / factor
        if has:
            scaled = rule._replace(weight_decay=decay, dampening=1.0 - factor * (1.0 - rule.dampening))
        else:
            scaled = rule._replace(weight_decay=decay, lr=rule.lr * factor)
        with_factor.append(scaled)
    return with_factor, 1.0


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill a stretch of memory, in some order."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
