"""SGD by torch's fused operator, in forms in which it is fast and right.

The operator is right for tensors of float32 and float64 that are laid out alike. It takes one after the other, splits
each over torch's threads, and spends more on that than on the arithmetic where a tensor is small. So

- many small tensors are divided among threads of their own, each of which steps its share: a quarter of the time;
- large ones go to the operator as they are;
- tensors of another dtype are stepped in float32, a piece at a time that stays in a cache; small ones of that sort
  of all rules are gathered into one, side by side, where their momentum buffers lie for good (but for those that a
  program shares among processes);
- gradients that are clipped are multiplied first, piece by piece too, and are not written to.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
# Elements whose squares are added up in float32.
_NORM_PIECE = 1 << 14
_NORM_EPSILON = 1e-6
_ALL = slice(None)
_NUMBER_TYPES = {float, int, bool}

_bytes_of = operator.attrgetter("nbytes")


def sgd_squares(batch: SGDBatch, grads: list[Tensor], squares: Tensor) -> None:
    """See :class:`fastloss.backends.contract.Backend`."""
    if batch.incomplete:
        batch, grads = _present(batch, grads)
    wide = compute_dtype(batch.params[0].dtype)
    for part in _parts(batch):
        if part.flat is not None:
            squares += _squares(part.flat.gather(batch, _chosen(grads, part.flat.indices), wide), wide)
        if part.small is not None:
            chosen = _chosen(grads, part.small.indices)
            widest = torch.float64 if any(grad.dtype == torch.float64 for grad in chosen) else wide
            norms = foreach_norm(chosen, 2, dtype=widest)
            squares += torch.stack(norms).double().square().sum()
        for i in part.pieced + (part.large.indices if part.large is not None else []):
            grad = grads[i]
            dense = grad.as_strided((grad.numel(),), (1,)) if _is_dense(grad) else grad.reshape(-1)
            squares += _squares(dense, wide)


def _squares(flat: Tensor, wide: torch.dtype) -> Tensor:
    """Return Σ g², float64, by norms of short pieces: over 10⁷ numbers torch's norm loses 3 of float32's 7 digits."""
    if flat.dtype != wide:
        pieces = [_squares(flat[start : start + _PIECE].to(wide), wide) for start in range(0, flat.numel(), _PIECE)]
        return torch.stack(pieces).sum()
    whole = flat.numel() // _NORM_PIECE * _NORM_PIECE
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_PIECE), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return norms.double().square().sum() + rest.double().square()


def sgd_step(batch: SGDBatch, grads: list[Tensor], rules: Sequence[SGDRule], controls: SGDControls) -> None:
    """See :class:`fastloss.backends.contract.Backend`."""
    if controls.found_inf is not None and controls.found_inf.item() != 0:
        return
    if batch.incomplete:
        batch, grads = _present(batch, grads)
    if controls.grad_scale is not None:
        _unscale(grads, controls.grad_scale)
    clip = _clip_factor(controls)
    for part in _parts(batch):
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
            _step_by_pieces(batch, i, _laid_out_as(batch.params[i], grads[i]), rule, clip, first=part.first)
    for i, flags in batch.begun.items():
        if batch.momentum[i] is not None:
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
    vectors: bool  # all of the parameters have one dimension
    numels: list[int]  # of the parameters
    rules: list[int]  # of the parameters, those of one rule side by side
    gathered: bool = False  # the buffers lie elsewhere, and each step works on copies
    rooms: dict[tuple[str, torch.dtype], tuple[Tensor, list[Tensor]]] = field(default_factory=dict)

    @staticmethod
    def of(batch: SGDBatch, indices: list[int]) -> _Flat:
        params = _chosen(batch.params, indices)
        kinds = tuple(kind for kind in ("momentum", "companions") if getattr(batch, kind)[indices[0]] is not None)
        buffers = [_chosen(getattr(batch, kind), indices) for kind in kinds]
        gathered = any(any(map(Tensor.is_shared, some)) for some in buffers)
        for some in buffers if not gathered else ():
            _side_by_side(some)
        vectors, numels = all(param.dim() == 1 for param in params), list(map(Tensor.numel, params))
        rules = [batch.rules[i] for i in indices]
        return _Flat(indices, kinds, list(map(Addresses, buffers)), vectors, numels, rules, gathered)

    def chosen(self, number_of: dict[int, int]) -> _Flat | None:
        """Return some of the tensors, for one step; ``number_of`` has their new numbers."""
        places = [place for place, i in enumerate(self.indices) if i in number_of]
        if not places:
            return None
        numels, rules = [self.numels[place] for place in places], [self.rules[place] for place in places]
        numbers = [number_of[self.indices[place]] for place in places]
        return _Flat(numbers, self.kinds, [], self.vectors, numels, rules, gathered=True)

    def params(self, batch: SGDBatch) -> list[Tensor]:
        return _chosen(batch.params, self.indices)

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
        return _flattened(buffers) if self.gathered else buffers[0].as_strided((sum(self.numels),), (1,))

    def put_back(self, batch: SGDBatch, buffers: dict[str, Tensor | None]) -> None:
        """Write what has been gathered to the buffers."""
        for kind in self.kinds if self.gathered else ():
            flat, params = buffers[kind], self.params(batch)
            assert flat is not None
            foreach_copy_(_chosen(getattr(batch, kind), self.indices), _views(flat, params))

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """The rules, and how many elements are stepped by each."""
        lengths: dict[int, int] = {}
        for rule, numel in zip(self.rules, self.numels, strict=True):
            lengths[rule] = lengths.get(rule, 0) + numel
        return list(lengths.items())

    def gather(self, batch: SGDBatch, tensors: list[Tensor], dtype: torch.dtype, name: str = "grads") -> Tensor:
        """Return the tensors side by side, in ``dtype``."""
        if list(map(Tensor.numel, tensors)) != self.numels:
            check_gradients(self.params(batch), tensors)
        flat, views = self.room(batch, name, dtype)
        with torch.inference_mode():  # costs a fifth less than no_grad
            if self.vectors:
                torch.cat(tensors, out=flat)  # half of the time of the other
            else:
                foreach_copy_(views, tensors)
        return flat

    def scatter(self, batch: SGDBatch, views: list[Tensor]) -> None:
        """Write to the parameters."""
        params = self.params(batch)
        with torch.inference_mode():
            foreach_copy_(params, views)
        torch.autograd.graph.increment_version(params)  # which that mode does not

    def room(self, batch: SGDBatch, name: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Return a flat buffer for all parameters, and its parts in their shapes; the same in every step."""
        if (name, dtype) not in self.rooms:
            params = self.params(batch)
            flat = torch.empty(sum(self.numels), dtype=dtype, device=params[0].device)
            self.rooms[name, dtype] = flat, _views(flat, params)
        return self.rooms[name, dtype]


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

    def chosen(self, number_of: dict[int, int]) -> _Direct | None:
        """Return some of the tensors, for one step; ``number_of`` has their new numbers."""
        places = [place for place, i in enumerate(self.indices) if i in number_of]
        if not places:
            return None
        numbers = [number_of[self.indices[place]] for place in places]
        return _Direct(numbers, self.has_momentum, self.contiguous, [self.nbytes[place] for place in places])

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

    def chosen(self, number_of: dict[int, int]) -> _Part:
        """Return the part with some of its tensors, for one step; ``number_of`` has their new numbers."""
        return _Part(
            self.rule,
            self.first,
            None if self.small is None else self.small.chosen(number_of),
            None if self.large is None else self.large.chosen(number_of),
            None if self.flat is None else self.flat.chosen(number_of),
            [number_of[i] for i in self.pieced if i in number_of],
            [],
            [],
        )

    def holds(self, batch: SGDBatch) -> bool:
        """Return whether everything is where it was; a program may have moved buffers to another device and back."""
        return (self.flat is None or self.flat.lies_still(batch)) and (
            batch.unchanged or _strides(batch, self.strided) == self.strides
        )


def _strides(batch: SGDBatch, indices: list[int]) -> list[tuple[int, ...]]:
    """Return the strides of parameters and their buffers."""
    lists = (batch.params, batch.momentum, batch.companions)
    return [tensor.stride() for values in lists for i in indices if (tensor := values[i]) is not None]


def _parts(batch: SGDBatch) -> list[_Part]:
    """Return the parts in which the tensors are stepped: those of the step before, if nothing has changed."""
    first = {i for i, flags in batch.begun.items() if not flags.any()} if batch.begun else set()
    parts: list[_Part] = batch.memory.get("parts", [])
    holds = parts and batch.memory["first"] == first and all(part.holds(batch) for part in parts)
    if not holds:
        together: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for i, (param, number) in enumerate(zip(batch.params, batch.rules, strict=True)):
            if param.numel():
                together[number, i in first].append(i)
        flats: dict[tuple[bool, bool], list[int]] = defaultdict(list)
        parts = []
        for (rule, begins), indices in together.items():
            flat: list[int] = []
            part = _Part.of(batch, rule, begins, indices, flat)
            if len(flat) < len(indices):
                parts.append(part)
            for i in flat:
                flats[begins, batch.momentum[i] is None].append(i)
        for (begins, _), indices in flats.items():
            parts.append(_Part(-1, begins, None, None, _Flat.of(batch, indices), [], [], []))
        batch.memory.update(parts=parts, first=first)
    return parts


def _present(batch: SGDBatch, grads: list[Any]) -> tuple[SGDBatch, list[Tensor]]:
    """Return those of a batch's tensors that have gradients, as a batch for one step, and the gradients."""
    parts = _parts(batch)
    present = [i for i, grad in enumerate(grads) if grad is not None]
    number_of = {i: number for number, i in enumerate(present)}
    lists = (batch.params, batch.momentum, batch.companions, batch.rules)
    chosen: list[Any] = [[values[i] for i in present] for values in lists]
    begun = {number_of[i]: flags for i, flags in batch.begun.items() if i in number_of}
    first = {number_of[i] for i in batch.memory["first"] if i in number_of}
    memory = {"parts": [part.chosen(number_of) for part in parts], "first": first}
    params, momentum, companions, rules = chosen
    return (
        SGDBatch(params, momentum, companions, rules, batch.rounding, begun, memory, seed=batch.seed),
        [grads[i] for i in present],
    )


def _side_by_side(buffers: list[Tensor]) -> None:
    """Move the buffers' memory into one tensor, where they lie one after the other."""
    flat = _flattened(buffers)
    if len(buffers) == 1:
        flat = flat.clone()  # of one tensor it is a view
    for buffer, view in zip(buffers, _views(flat, buffers), strict=True):
        buffer.data = view


def _flattened(buffers: list[Tensor]) -> Tensor:
    flat: Tensor = flatten([buffer.contiguous() for buffer in buffers])
    return flat


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return list(unflatten(flat, list(like)))


def _step_flat(
    batch: SGDBatch, flat: _Flat, grads: list[Tensor], rules: Sequence[SGDRule], clip: float, *, first: bool
) -> None:
    wide, narrow = compute_dtype(batch.params[0].dtype), batch.params[0].dtype
    params = flat.params(batch)
    grad = flat.gather(batch, _chosen(grads, flat.indices), wide)
    buffers = {kind: flat.buffer(batch, kind) for kind in ("momentum", "companions")}
    momentum, companions = buffers["momentum"], buffers["companions"]
    advance = functools.partial(
        _advance_flat, flat, momentum=momentum, grad=grad, rules=rules, clip=clip, first=first
    )
    if batch.rounding == "master":
        assert companions is not None
        result, views = flat.room(batch, "params", narrow)
        companions.copy_(true_master(companions, flat.gather(batch, params, narrow, "params")))
        advance(companions)
        result.copy_(companions)  # one rounding of all; lists of tensors of two dtypes are copied one by one
    elif batch.rounding == "nearest":
        result, views = flat.room(batch, "params", wide)
        flat.gather(batch, params, wide, "params")
        advance(result)
    else:
        result, views = flat.room(batch, "params", narrow)
        flat.gather(batch, params, narrow, "params")
        _advance_rounded(batch, result, companions, advance)
    flat.scatter(batch, views)
    flat.put_back(batch, buffers)


def _advance_flat(
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
    spans = flat.spans
    if len(spans) == 1:
        rule = _Numbers.of(rules[spans[0][0]])
        _advance([result], [grad], _listed(momentum), rule, clip, first=first, scratch=True)
        return
    if clip != 1.0:
        grad.mul_(clip)
    lengths = [length for _, length in spans]
    buffer = None if momentum is None else momentum.to(result.dtype)
    buffers = [[]] * len(spans) if buffer is None else [[piece] for piece in buffer.split(lengths)]
    stretches = zip(spans, result.split(lengths), grad.split(lengths), buffers, strict=True)
    for (number, _), of_result, of_grad, of_buffer in stretches:
        _advance([of_result], [of_grad], of_buffer, _Numbers.of(rules[number]), first=first)
    if buffer is not None and momentum is not None and buffer is not momentum:
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


def _step_by_pieces(batch: SGDBatch, i: int, grad: Tensor, rule: _Numbers, clip: float, *, first: bool) -> None:
    tensors = (batch.params[i], grad, batch.momentum[i], batch.companions[i])
    lines = [None if t is None else t.as_strided((t.numel(),), (1,)) for t in tensors]
    for start in range(0, grad.numel(), _PIECE):
        param, piece, momentum, companion = (t if t is None else t[start : start + _PIECE] for t in lines)
        assert param is not None
        assert piece is not None
        wide = compute_dtype(param.dtype)
        piece = piece.to(wide) if clip == 1.0 else _clipped(batch, piece, clip, wide)
        advance = functools.partial(_advance_piece, piece, momentum, rule, first)
        if batch.rounding == "master":
            assert companion is not None
            companion.copy_(true_master(companion, param))
            advance(companion)
            param.copy_(companion)
        elif param.dtype == wide:
            advance(param)
        else:
            _advance_rounded(batch, param, companion, advance)
    torch.autograd.graph.increment_version([batch.params[i]])


def _advance_piece(grad: Tensor, momentum: Tensor | None, rule: _Numbers, first: bool, wide: Tensor) -> None:
    _advance([wide], [grad], _listed(momentum), rule, first=first)


def _clipped(batch: SGDBatch, piece: Tensor, clip: float, wide: torch.dtype) -> Tensor:
    """Return a clipped piece of a gradient in a buffer that is the same in every step: new memory takes longer."""
    buffer = batch.memory.get("clipped")
    if buffer is None or len(buffer) < len(piece):
        buffer = batch.memory["clipped"] = torch.empty_like(piece, dtype=wide)
    result: Tensor = buffer[: len(piece)]
    return torch.mul(piece, clip, out=result) if piece.dtype == wide else result.copy_(piece).mul_(clip)


def _advance_rounded(
    batch: SGDBatch, param: Tensor, compensation: Tensor | None, advance: Callable[[Tensor], None]
) -> None:
    """Step one flat tensor of 16 bits in float32 by ``advance``, and round it."""
    wide = param.float() if compensation is None else compensated(param, compensation)
    advance(wide)
    if batch.rounding == "stochastic":
        param.copy_(round_stochastically(wide, param.dtype, batch.seed))
    else:
        param.copy_(wide)
    if compensation is not None:
        compensation.copy_(without_infinities(wide.sub_(param)))


def _advance(
    params: list[Tensor],
    grads: list[Tensor],
    momentum: list[Tensor],
    rule: _Numbers,
    clip: float = 1.0,
    *,
    first: bool = False,
    scratch: bool = False,
) -> None:
    """Step float32 or float64 parameters; with ``scratch`` the gradients may be written to.

    Momentum buffers are of one dtype: that of the parameters, or there is one.
    """
    if clip != 1.0:
        grads = [grad.mul_(clip) for grad in grads] if scratch else [grad * clip for grad in grads]
    if rule.decoupled and rule.weight_decay != 0:
        foreach_mul_(params, 1.0 - rule.lr * rule.weight_decay)
    wide, buffers = params[0].dtype, momentum
    if momentum and momentum[0].dtype != wide:
        buffers = [m.to(wide) for m in momentum]
    step = functools.partial(
        fused_sgd_,
        params,
        momentum_buffer_list=buffers,
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
    if buffers is not momentum:
        foreach_copy_(momentum, buffers)


def _laid_out_as(param: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor with the parameter's strides."""
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


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill a stretch of memory, in some order."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
