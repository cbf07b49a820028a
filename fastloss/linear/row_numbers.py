r"""Losses of chunks that are made of a few numbers of each row, as functions of the hidden states and the head.

A chunk's visit gives lse = log Σ_c exp(z_c), the label's logit z_y and, as they are wanted, the entropy and others of
:class:`fastloss.backends.contract.RowStatistics`; in float64, so that lse − z_y loses nothing. Their gradient is
written over the logits by the backend, from one upstream gradient of each number of each row.

:class:`RowLosses` has the numbers themselves for outputs. Their upstream gradients are known in the backward pass,
which computes the logits once more: four products. :class:`TokenLosses` computes a loss of each token from log p and
the entropy, by the caller's function, whose derivative is two numbers of each row. They are known in the visit of the
forward pass, so that the gradient of the logits is written there: three products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..backends import choice
from ..backends.contract import Backend, LossInputs, LossOptions, RowUpstreams, WantedParts, compute_dtype
from ..backends.view import as_rows, in_memory, wide_labels
from ..loss import composite
from .chunks import Chunk, ChunkLoss, Gradients, Index, LinearOptions, Losses, Needs, Result, Saved, of_counted

__all__ = ["Numbers", "RowLosses", "RowVisitor", "TokenFunction", "TokenLosses", "numbers_of_logits", "scaled"]

_MIXTURE_HINT = (
    "expected a function of each token alone, or use linear_cross_entropy_with_statistics, whose parts take any "
    "upstream gradient"
)

# Elements that an operator's loop takes at a time, or a multiple; and the most tokens of a chunk that are looked at.
_BLOCK, _MOST_CHECKED = 64, 1024

Numbers = dict[str, Tensor]  # by the names of RowStatistics, (n,) each; "selected" is (n, K)
# (log p, entropy or None, *token inputs) → the loss of each token, (n,)
TokenFunction = Callable[..., Tensor]


class RowVisitor:
    """Visits the logits of a chunk for numbers of each row over all classes, and for the gradient of the numbers.

    Args:
        weight: of the classes, ``(C,)``.
        options: ε decides whether Σ_c w_c z_c is among the numbers.
        backend: the backend whose functions visit the logits; None where nothing is visited.
        wanted: the parts that need more numbers than lse and z_y.
        every_row: ignored rows have numbers too.
    """

    def __init__(
        self,
        weight: Tensor | None,
        options: LossOptions,
        backend: Backend | None,
        wanted: WantedParts,
        every_row: bool,
    ) -> None:
        self.weight = None if weight is None else weight.detach()
        if self.weight is not None and backend is not None:  # a compiler does not ask where numbers lie
            self.weight = in_memory(self.weight)
        self.options, self.backend, self.every_row = options, cast(Backend, backend), every_row
        self.wanted = wanted.numbers()._replace(every_row=every_row)
        given = {"lse": True, "label_logit": True, "weighted_sum": options.label_smoothing != 0}
        given |= self.wanted._asdict()
        self.names = tuple(name for name in RowUpstreams._fields if given[name])
        self.predicts = self.wanted.predicted

    def numbers(self, t: Tensor, z: Tensor, ids: Tensor | None) -> Numbers:
        """Return the numbers that are wanted; "selected" are the z of ``ids``, ``(n, K)``."""
        numbers = self.visited(self.inputs(t, z))
        if ids is not None:
            local, inside = self.own(ids, z)
            numbers["selected"] = scaled(z.gather(1, local), self.options).double().masked_fill(~inside, float("nan"))
        return numbers

    def write_gradient(self, upstreams: Numbers, t: Tensor, z: Tensor, numbers: Numbers, ids: Tensor | None) -> None:
        """Write the gradient of the logits over them. ``upstreams`` has those of the numbers that have one."""
        of_selected, local = upstreams.get("selected"), None
        if of_selected is not None and ids is not None:
            local, inside = self.own(ids, z)
            of_selected = _times_slope(torch.where(inside, of_selected, 0.0), z.gather(1, local), self.options)
        given = RowUpstreams(**{name: upstream for name, upstream in upstreams.items() if name != "selected"})
        saved = numbers["lse"], numbers.get("entropy"), numbers.get("log_sum_sq_probs")
        self.backend.row_statistics_backward(given, self.inputs(t, z), saved, inplace=True)
        if of_selected is not None and local is not None:
            z.scatter_add_(1, local, of_selected)

    def whole(self, gradients: Gradients) -> Gradients:
        """Return the gradients over all classes."""
        return gradients

    def refuse_second_derivative(self) -> None:
        """Raise an error if there is no second derivative."""

    def visited(self, inputs: LossInputs) -> Numbers:
        """Return the numbers that a visit to these logits gives."""
        rows = self.backend.row_statistics_forward(inputs, self.wanted)
        return {name: getattr(rows, name) for name in (*self.names, *(("predicted",) if self.predicts else ()))}

    def inputs(self, t: Tensor, z: Tensor) -> LossInputs:
        """Return the arguments of a visit."""
        return LossInputs(as_rows(z), t, self.weight, self.options)

    def own(self, ids: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return classes that are among these logits, and which of ``ids`` they are."""
        inside = (ids >= 0) & (ids < z.shape[1])
        return torch.where(inside, ids, 0), inside


def scaled(x: Tensor, options: LossOptions) -> Tensor:
    """Return z, which the softmax is of, from the logits x, in the dtype of the arithmetic."""
    return composite.scaled(x.to(compute_dtype(x.dtype)), options)


def _times_slope(upstream: Tensor, x: Tensor, options: LossOptions) -> Tensor:
    """Return ``upstream`` · ∂z/∂x, in x's dtype."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        z = scaled(x, options)
        return torch.autograd.grad(z, x, upstream.to(z.dtype))[0]


def numbers_of_logits(
    x: Tensor,
    t: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    names: Sequence[str],
    ids: Tensor | None,
) -> Numbers:
    """Return the numbers of each row from all logits ``(rows, C)``, by torch's own differentiable operators."""
    z = scaled(x, options)
    labels, classes = wide_labels(t), x.shape[1]
    label = torch.where((labels >= 0) & (labels < classes), labels, 0).unsqueeze(1)
    # Without its maximum, a row's numbers are as exact as torch's log-softmax.
    shift = z.detach().amax(1, keepdim=True) if classes else z.new_zeros((len(z), 1))
    shift = torch.where(shift.isfinite(), shift, 0.0)
    z, level = z - shift, shift.squeeze(1).double()
    numbers: Numbers = {}
    lse = torch.logsumexp(z, 1)
    lse = torch.where(lse == torch.inf, float("nan"), lse)  # as in the kernels
    for name in names:
        if name == "lse":
            numbers[name] = lse.double() + level
        elif name == "label_logit":
            numbers[name] = (z.gather(1, label).squeeze(1) if classes else lse).double() + level
        elif name == "weighted_sum":
            w = None if weight is None else weight.to(z.dtype)
            total = classes if w is None else w.sum(dtype=torch.float64)
            numbers[name] = (z if w is None else z * w).sum(1).double() + level * total
        elif name == "logit_sum":
            numbers[name] = z.sum(1).double() + level * classes
        elif name == "log_sum_sq_probs":
            numbers[name] = torch.logsumexp(2 * (z - lse.unsqueeze(1)), 1).double()
        elif name == "entropy":
            log_p = z - lse.unsqueeze(1)
            # A masked logit's p and its derivatives are 0, and so must be their products with log p.
            numbers[name] = -(log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)).sum(1).double()
        elif name == "predicted":
            numbers[name] = x.detach().argmax(1) if classes else labels * 0
    if ids is not None:
        inside = (ids >= 0) & (ids < classes)
        values = z.gather(1, torch.where(inside, ids, 0)) + shift
        numbers["selected"] = torch.where(inside, values.double(), float("nan"))
    return numbers


class _RowwiseLosses(Losses):
    """What :class:`RowLosses` and :class:`TokenLosses` share."""

    keeps_numbers = True

    def __init__(self, weight: Tensor | None, call: LinearOptions, visitor: RowVisitor) -> None:
        super().__init__(weight, call, visitor.backend)
        self.visitor = visitor

    def whole(self, gradients: Gradients) -> Gradients:
        return self.visitor.whole(gradients)

    def refuse_second_derivative(self) -> None:
        self.visitor.refuse_second_derivative()


class RowLosses(_RowwiseLosses):
    """Numbers of each row: the outputs are those of the visitor's names, then "selected" and "predicted".

    Args:
        call: with reduction "none".
        visitor: see there.
        ids: of classes, ``(rows, K)``; or None.
    """

    def __init__(self, call: LinearOptions, visitor: RowVisitor, ids: Tensor | None) -> None:
        super().__init__(visitor.weight, call, visitor)
        self.ids = ids
        self.names = (*visitor.names, *(() if ids is None else ("selected",)))
        self.all_names = (*self.names, *(("predicted",) if visitor.predicts else ()))
        self.differentiable = len(self.names)
        self.skips = call.skip_ignored is True  # ignored rows have no numbers, but 0

    def counted(self, target: Tensor) -> Tensor | None:
        return None if self.visitor.every_row and not self.skips else super().counted(target)

    def forward(self, chunk: Chunk, total: Tensor | float | None, needs: Needs) -> ChunkLoss:
        index, _, t, z = chunk
        numbers = self.visitor.numbers(t, z, self._ids(index))
        selected = numbers.pop("selected", None)
        kept = [number.double() for number in numbers.values()]
        return ChunkLoss(None, None, kept if selected is None else [*kept, *selected.unbind(1)])

    def outputs(self, result: Result, target: Tensor) -> tuple[Tensor, ...]:
        numbers = self._numbers(result.saved)
        if numbers.get("predicted") is not None:
            numbers["predicted"] = numbers["predicted"].long()
        counted = self.counted(target) if self.skips else None
        return tuple(
            numbers[name].clone() if counted is None else of_counted(numbers[name], counted)
            for name in self.all_names
        )

    def upstreams(self, given: Sequence[Tensor | None], target: Tensor) -> list[Tensor | None]:
        counted = self.counted(target) if self.skips else None
        wide = [None if upstream is None else in_memory(upstream).double() for upstream in given]
        return [None if upstream is None else of_counted(upstream, counted) for upstream in wide]

    def counted_backward(self, upstreams: Sequence[Tensor | None], target: Tensor) -> Tensor | None:
        # Rows without an upstream gradient may hold NaN.
        counted = torch.zeros(target.shape[0], dtype=torch.bool, device=target.device)
        for upstream in upstreams:
            if upstream is not None:
                counted |= upstream != 0 if upstream.dim() == 1 else (upstream != 0).any(1)
        return counted

    def backward(self, chunk: Chunk, upstreams: Sequence[Tensor | None], saved: Saved, needs: Needs) -> None:
        index, _, t, z = chunk
        given = {name: up for name, up in zip(self.names, upstreams, strict=True) if up is not None}
        numbers = dict(zip(self.visitor.names, saved, strict=False))
        self.visitor.write_gradient(given, t, z, numbers, self._ids(index))

    def composed(self, logits: Tensor, t: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
        return self.outputs_of_logits(logits, t)[: self.differentiable]

    def outputs_of_logits(self, logits: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs from all logits, by torch's own operators."""
        numbers = numbers_of_logits(logits, t, self.weight, self.call.options, self.all_names, self.ids)
        counted = self.counted(t) if self.skips else None
        return tuple(of_counted(numbers[name], counted) for name in self.all_names)

    def _ids(self, index: Index) -> Tensor | None:
        return None if self.ids is None else self.ids[index]

    def _numbers(self, saved: Tensor) -> Numbers:
        """Return the numbers of all rows, by name, from those that the chunks kept."""
        count, names = 0 if self.ids is None else self.ids.shape[1], [n for n in self.all_names if n != "selected"]
        if not len(saved):  # every row was left out
            saved = saved.new_zeros((len(names) + count, saved.shape[1]), dtype=torch.float64)
        numbers = dict(zip(names, saved, strict=False))
        if self.ids is not None:
            numbers["selected"] = saved[len(names) :].t()
        return numbers


class TokenLosses(_RowwiseLosses):
    """A loss of each token from its log p and entropy: the outputs are the loss, log p and the entropy if wanted.

    Args:
        call: the options.
        visitor: see there; it wants the entropy, or nothing.
        function: see :func:`fastloss.linear_token_loss`.
        token_inputs: of each row, ``(rows,)`` each.
        trained: a gradient is needed, now or later.
        classes: C, of all ranks; a scalar tensor where the host does not know it.
    """

    def __init__(
        self,
        call: LinearOptions,
        visitor: RowVisitor,
        function: TokenFunction,
        token_inputs: Sequence[Tensor],
        *,
        trained: bool,
        classes: int | Tensor,
    ) -> None:
        super().__init__(None, call, visitor)
        self.function, self.token_inputs, self.trained, self.classes = function, token_inputs, trained, classes
        self.of_tokens = ("log_p", "entropy") if "entropy" in visitor.names else ("log_p",)
        self.dtype, self.upstream_dtype = compute_dtype(call.compute_dtype), torch.float64
        self._is_checked = False

    def forward(self, chunk: Chunk, total: Tensor | float | None, needs: Needs) -> ChunkLoss:
        index, _, t, z = chunk
        numbers = self.visitor.numbers(t, z, None)
        counted = self._counted(t)
        given = self._of_tokens(t, counted, numbers)
        values, derivatives = self._values(index, counted, given)
        if not self._is_checked and choice.validates():
            self._check_alone(index, given)
        self._is_checked = True
        kept = [number.double() for number in given]
        if any(needs):
            # Where no token counts the mean is 0 / 0, and no token has a gradient.
            upstreams = (each if total is None else of_counted(each / total, counted) for each in derivatives)
            self._write(list(upstreams), t, z, numbers)
        elif self.trained:
            kept += [*derivatives, *(numbers[name] for name in self.visitor.names)]
        loss = values.sum(dtype=torch.float64) if self.call.options.is_reduced else values
        return ChunkLoss(loss, None, kept)

    def outputs(self, result: Result, target: Tensor) -> tuple[Tensor, ...]:
        count, rows = len(self.of_tokens), result.saved.shape[1]
        # Without a chunk every row was left out.
        numbers = result.saved[:count] if len(result.saved) else result.saved.new_zeros((count, rows))
        return (result.loss, *numbers.to(self.dtype, copy=True).unbind(0))

    def backward(self, chunk: Chunk, upstreams: Sequence[Tensor | None], saved: Saved, needs: Needs) -> None:
        _, _, t, z = chunk
        (upstream,), count = upstreams, len(self.of_tokens)
        assert upstream is not None
        derivatives, numbers = (
            saved[count : 2 * count],
            dict(zip(self.visitor.names, saved[2 * count :], strict=True)),
        )
        counted = self._counted(t)
        self._write([of_counted(derivative * upstream, counted) for derivative in derivatives], t, z, numbers)

    def composed(self, logits: Tensor, t: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
        return self.outputs_of_logits(logits, t)[:1]

    def outputs_of_logits(self, logits: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs from all logits, by torch's own operators."""
        numbers = numbers_of_logits(logits, t, None, self.call.options, self.visitor.names, None)
        counted = self._counted(t)
        given = self._of_tokens(t, counted, numbers)
        values = self._called(counted, given, self.token_inputs)
        if self.call.options.is_reduced:
            total = self.total(t)
            values = values.sum(dtype=torch.float64)
            values = values if total is None else values / total
        return (values.to(self.call.loss_dtype), *(number.detach() for number in given))

    def _counted(self, t: Tensor) -> Tensor:
        return t != self.call.options.ignore_index

    def _of_tokens(self, t: Tensor, counted: Tensor, numbers: Numbers) -> list[Tensor]:
        """Return log p and, if wanted, the entropy; 0 where the row is ignored, NaN where its label is invalid."""
        log_p = numbers["label_logit"] - numbers["lse"]
        if not t.is_cpu:
            log_p = log_p.masked_fill((t < 0) | (t >= self.classes), float("nan"))
        given = [log_p, *(numbers[name] for name in self.of_tokens[1:])]
        return [torch.where(counted, number, 0.0).to(self.dtype) for number in given]

    def _called(self, counted: Tensor, given: Sequence[Tensor], token_inputs: Sequence[Tensor]) -> Tensor:
        """Return the losses of tokens, 0 where the row is ignored."""
        # Copies: the numbers are results too, and the token inputs are the caller's.
        names = ["log_probs", "entropy", *(f"token input {number}" for number in range(len(token_inputs)))]
        arguments = (given[0], given[1] if len(given) > 1 else None, *token_inputs)
        copies = [None if each is None else each.clone() for each in arguments]
        values = self.function(*copies)
        if not torch.compiler.is_compiling():
            for name, each in zip(names, copies, strict=True):
                if each is not None and not each.is_inference() and each._version:
                    raise RuntimeError(
                        f"fastloss: token_loss writes to {name}; expected a function that writes to none of its "
                        "arguments"
                    )
        if not isinstance(values, Tensor) or values.shape != counted.shape or not values.is_floating_point():
            what = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)
            raise ValueError(
                f"fastloss: token_loss returned {what}; expected a floating-point tensor of shape "
                f"{tuple(counted.shape)}, the loss of each token of the chunk: log_probs, entropy and the token "
                "inputs have that shape"
            )
        return torch.where(counted, values, 0.0)

    def _values(self, index: Index, counted: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the losses of a chunk's tokens and, where there is training, their derivatives, in float64."""
        inputs = [each[index] for each in self.token_inputs]
        if not self.trained:
            return self._called(counted, given, inputs), []
        with torch.enable_grad():
            given = [number.detach().requires_grad_() for number in given]
            values = self._called(counted, given, inputs)
            if not values.requires_grad:
                raise RuntimeError(
                    "fastloss: token_loss returned losses without a graph; expected a function of log_probs and "
                    "entropy in torch's operators, without detach() or no_grad()"
                )
            if not self._is_checked:
                _check_leaves(values, given)
            ones = torch.ones_like(values)
            found = torch.autograd.grad(values, given, ones, retain_graph=True, allow_unused=True)
            if not self._is_checked and choice.may_look(values):
                _check_apart(values, given, found)
        derivatives = [
            torch.where(counted, torch.zeros_like(values) if slope is None else slope, 0.0).detach().double()
            for slope in found
        ]
        return values.detach(), derivatives

    def _check_alone(self, index: Index, given: Sequence[Tensor]) -> None:
        """Check that a token's loss is the same beside other tokens and at another place, if it is in each call.

        An operator may round the last elements otherwise, which fill no block of a processor's registers. So tokens
        move by whole blocks here, and their losses are equal to the bit.
        """
        count, device = min(len(given[0]), _MOST_CHECKED), given[0].device
        row = index if isinstance(index, Tensor) else torch.arange(index.start, index.stop, device=device)
        places = torch.arange(-(-count // _BLOCK) * _BLOCK, device=device) % count
        # For each parity of places the rows that stand where those of the other parity do.
        fillers = [each.expand(_BLOCK + len(places)) for each in row[:2]]
        if count == 1 and self.token_inputs and device.type == "cpu":  # a function that fails at them is served
            fillers = [(row + 1 + torch.arange(_BLOCK + len(places))) % len(self.token_inputs[0])]
        every, before = torch.ones_like(places, dtype=torch.bool), places.new_zeros(_BLOCK)

        def losses(places: Tensor, same: Tensor, filler: Tensor) -> Tensor:
            """Return the losses of the tokens at these places, some of them with other numbers."""
            log_p, *entropy = (number.detach()[places] for number in given)
            numbers = [torch.where(same, log_p, log_p - 1), *(torch.where(same, h, h / 2) for h in entropy)]
            rows = torch.where(same, row[places], filler[: len(places)])
            return self._called(torch.ones_like(same), numbers, [each[rows] for each in self.token_inputs])

        def apart(one: Tensor, other: Tensor) -> Tensor:
            return (one != other) & ~(one.isnan() & other.isnan())

        try:
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                values = losses(places, every, fillers[0])
                for parity, filler in enumerate(fillers):
                    same = torch.cat([before > 0, places % 2 == parity])
                    beside_others = losses(torch.cat([before, places]), same, filler)[_BLOCK:]
                    bad = apart(values, beside_others) & same[_BLOCK:]
                    if bad.any():
                        break
                else:
                    return
                if apart(values, losses(places, every, fillers[0])).any():
                    return  # random, or with a state
        except Exception:  # the function takes the chunk's number of tokens alone: there is nothing to compare
            return
        token = int(bad.nonzero()[0])
        raise RuntimeError(
            f"fastloss: token_loss mixes tokens: it gives {float(values[token])} to a token beside those of a chunk, "
            f"and {float(beside_others[token])} to it beside others; {_MIXTURE_HINT}"
        )

    def _write(self, upstreams: Sequence[Tensor], t: Tensor, z: Tensor, numbers: Numbers) -> None:
        given = {"lse": -upstreams[0], "label_logit": upstreams[0]}
        given.update(zip(self.of_tokens[1:], upstreams[1:], strict=True))
        self.visitor.write_gradient(given, t, z, numbers, None)


def _check_leaves(values: Tensor, given: Sequence[Tensor]) -> None:
    """Check that the losses depend on no other tensor that requires grad: its gradient would be lost."""
    seen: set[Any] = set()
    waiting = [values.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is number for number in given):
            raise RuntimeError(
                f"fastloss: token_loss uses a tensor that requires grad, or one that is made of it: {leaf.dtype} of "
                f"shape {tuple(leaf.shape)}; no gradient would reach it: detach() it, or use "
                "linear_cross_entropy_with_statistics, whose parts take any upstream gradient"
            )
        waiting += [function for function, _ in node.next_functions]


def _check_apart(values: Tensor, given: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> None:
    """Check that each token's loss depends on its own numbers alone.

    Then the slopes at upstream gradients of 1 and −1 are those at 1 with these signs, exactly.
    """
    number = torch.arange(len(values), device=values.device)
    signs = 1.0 - 2.0 * (number * 2654435761 >> 16 & 1).to(values.dtype)
    signed = torch.autograd.grad(values, given, signs, retain_graph=True, allow_unused=True)
    for slope, other in zip(slopes, signed, strict=True):
        if slope is None or other is None:
            continue
        expected = slope * signs.to(slope.dtype)
        if not bool(((other == expected) | (other.isnan() & expected.isnan())).all()):
            raise RuntimeError(
                "fastloss: token_loss mixes tokens: the loss of one depends on the log-probability or the entropy of "
                f"another, and it sees one chunk of them at a time; {_MIXTURE_HINT}"
            )
