r"""The projection, the loss and their gradients, some rows at a time: the logits of all rows never exist.

With x ``(N, D)`` the input, W ``(C, D)`` and b ``(C,)`` the linear map, a chunk of n rows takes

    z = x Wᵀ + b          (n, C), the one buffer, which every chunk uses anew
    g = ∂L/∂z             written over z by the backend's cross-entropy kernel, in the visit that gives the loss
    ∂L/∂x = g W           ∂L/∂W += gᵀ x           ∂L/∂b += Σ_rows g

three products of 2 n C D operations each. What all chunks add to, ∂L/∂W and ∂L/∂b, is kept in float32 for 16-bit
weights: rounded after every chunk, it would lose what a chunk has to add to a sum that is already large.

Where the gradient can't be written in the forward pass (reduction "none"; float16, whose gradients need the loss
scale before they are rounded), the backward pass computes the chunk's logits again: a fourth product.

How many rows a chunk has follows from arithmetic; see :func:`rows_of_chunk`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import Backend, LossOptions, compute_dtype
from ..loss.row_numbers import total_weight

__all__ = [
    "ChunkIterator",
    "GradientAccumulator",
    "Gradients",
    "LinearOptions",
    "Needs",
    "Result",
    "backward",
    "forward",
    "rows_of_chunk",
    "writes_gradients",
]

# Elements that a row of a GPU's logits begins at a multiple of: products of matrices whose rows begin anywhere, as
# those of 50257 classes in 16 bits would, take slower kernels.
_PITCH = {"cuda": 64}
# The rows of a chunk, and the bytes of its logits: see rows_of_chunk.
_CPU_ROWS, _CPU_BYTES = 256, 96 << 20
_GPU_ROWS, _MANY_GPU_ROWS = 1536, 4096
_FEW_GPU_BYTES, _GPU_BYTES = 5 << 26, 5 << 28
_FEWEST_CPU_ROWS, _CPU_STEP, _GPU_STEP = 128, 64, 64
# Rows are left out where at least so many of them are ignored.
_SHARE_LEFT_OUT = 1 / 16
# Elements of a 16-bit chunk that a CPU widens at a time.
_WIDENED = 1 << 22
# Elements of a 32-bit sum that are rounded before their own memory takes the others.
_ROUNDED_FIRST = 1 << 10
# Bytes of the numbers that every row has: its loss, its place, what is kept of it for the backward pass.
_ROW_NUMBERS = 64


@dataclass(frozen=True)
class LinearOptions:
    """What one call asks for beside its tensors."""

    options: LossOptions
    compute_dtype: torch.dtype  # of the products: the tensors', or autocast's
    loss_dtype: torch.dtype
    chunk_size: int | None = None
    memory_budget: int | None = None
    skip_ignored: bool | None = None  # None: where the host knows the labels
    # Add to linear_weight.grad, in the backward pass, which knows the upstream gradient.
    accumulate_grad: bool = False
    # What a mean divides by, where it is one over more rows than these; a float beside class probabilities. Then the
    # accuracies are numbers of rows, not shares.
    total: Tensor | float | None = None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    input: bool
    linear_weight: bool
    linear_bias: bool
    target: bool


class Gradients(NamedTuple):
    """In the shapes and dtypes of their tensors; None where none is wanted."""

    input: Tensor | None = None
    linear_weight: Tensor | None = None
    linear_bias: Tensor | None = None
    target: Tensor | None = None


class Result(NamedTuple):
    """What a forward pass gives."""

    loss: Tensor  # () or (rows,)
    accuracy: tuple[Tensor, ...]  # one () or (rows,) float32 for each k of options.topk
    gradients: Gradients  # at an upstream gradient of 1, where they are written
    kept: Tensor  # (numbers, rows): what the backend wants back for the backward pass; (0, rows) if nothing


def writes_gradients(call: LinearOptions, needs: Needs, tensors: Sequence[Tensor | None]) -> bool:
    """Does the forward pass write the gradients that are needed? ``tensors`` in the order of :class:`Needs`.

    Not those in float16, before the loss scale is known.
    """
    dtypes = {call.compute_dtype, *(t.dtype for t, n in zip(tensors, needs, strict=True) if n and t is not None)}
    at_once = call.options.reduction != "none" and torch.float16 not in dtypes
    return any(needs) and at_once and not call.accumulate_grad


def rows_of_chunk(call: LinearOptions, rows: int, linear_weight: Tensor, needs: Needs) -> int:
    """How many rows a chunk has: ``chunk_size``, or what ``memory_budget`` has room for, or a rule.

    The rule. A chunk of n rows does 6 n C D operations, and beside its own n C logits it reads W twice and reads and
    writes ∂L/∂W once: about 4 C D b bytes, with b those of an element, whatever n is. At F operations and B bytes a
    second that traffic takes a share of 2 b F / (3 n B) of the products' time. An H100 has F / B ≈ 300 in bfloat16:
    with sums of b = 4 and n = 1536 the share is a half, behind the products; up to n = 4096, a fifth, it gets as many
    rows as 0.3 GB of logits have. (1536 rows are whole tiles of its products, whose number at 4096 features is twice
    that of its processors; with 1664 rows a tenth of the tiles would be empty.) A CPU core's F / B is below 10, and
    n = 256 leaves a tenth at most. Larger chunks would only take more memory: n C b bytes.

    On a GPU, rows that fit into one chunk in the memory that several take are one chunk. Its weight gradient needs no
    sums in 32 bits: in 16 bits that is the memory of the logits of D more rows.

    Heads so wide that a chunk's logits are more than 1.3 GB on a GPU, or 96 MiB on a CPU, get fewer rows. In float32
    on a CPU that is past 98304 classes: 192 rows of 128256, and a seventh at most. There are 128 rows or more, a
    fifth at most, and multiples of 64, as the products' own blocks are.

    Raises:
        ValueError: the budget has no room for a row.
    """
    on_cpu = linear_weight.device.type == "cpu"
    if call.chunk_size is not None:
        return min(call.chunk_size, max(rows, 1))
    if call.memory_budget is not None:
        return _rows_within(call.memory_budget, call, max(rows, 1), linear_weight, needs)
    row_bytes = max(_pitch(len(linear_weight), linear_weight.device) * call.compute_dtype.itemsize, 1)
    if on_cpu:
        most = max(_FEWEST_CPU_ROWS, _CPU_BYTES // row_bytes // _CPU_STEP * _CPU_STEP)
        return max(1, min(_CPU_ROWS, most, rows))
    several = min(max(_GPU_ROWS, min(_FEW_GPU_BYTES // row_bytes, _MANY_GPU_ROWS)), _GPU_BYTES // row_bytes)
    alone = several + _bytes_of_sums(call, linear_weight, needs) // row_bytes
    return max(1, rows if rows <= alone else several)


def _pitch(classes: int, device: torch.device) -> int:
    """How far apart the logits' rows lie."""
    step = _PITCH.get(device.type, 1)
    return -(-classes // step) * step


def _bytes_of_sums(call: LinearOptions, linear_weight: Tensor, needs: Needs) -> int:
    """What the weight gradient's sums in 32 bits take beside the gradient: their rounding needs no more memory."""
    if call.accumulate_grad or not needs.linear_weight:
        return 0
    return linear_weight.numel() * max(_wide(call.compute_dtype).itemsize - linear_weight.dtype.itemsize, 0)


def _rows_within(budget: int, call: LinearOptions, rows: int, linear_weight: Tensor, needs: Needs) -> int:
    """How many rows a chunk may have, if everything held beside inputs and gradients is to be ``budget`` bytes."""
    (classes, features), dtype = linear_weight.shape, call.compute_dtype
    narrow, wide = dtype.itemsize, _wide(dtype).itemsize
    sums, on_cpu = needs.linear_weight, linear_weight.device.type == "cpu"
    # Of each row: logits, the target's gradient; on a CPU what is widened of them for the sums, or a softcap's slope;
    # x and its gradient in another dtype.
    row = _pitch(classes, linear_weight.device) * narrow + features * (narrow + 2 * wide)
    row += (
        classes * wide * (needs.target + (on_cpu and (call.options.softcap is not None or (sums and wide > narrow))))
    )
    # Whatever the chunk: the numbers of every row, and the weights in the dtype of the products.
    always = rows * _ROW_NUMBERS + (linear_weight.numel() * narrow if linear_weight.dtype != dtype else 0)
    if on_cpu and narrow < wide and needs.input:
        always += linear_weight.numel() * narrow  # oneDNN lays W out anew for g W
    of_sums = _bytes_of_sums(call, linear_weight, needs)
    one_chunk = always + rows * row + (of_sums if linear_weight.dtype != dtype else 0)
    if budget >= one_chunk:
        return rows
    room = (budget - always - of_sums) // row
    if room < 1:
        least = min(one_chunk, always + of_sums + row)
        raise ValueError(
            f"fastloss: memory_budget is {budget} bytes; the least that would do is {least}: "
            f"a row of {classes} logits"
            + (f", {always} bytes beside it" if least > row else "")
            + (" and the weight gradient's sums in float32" if of_sums and least < one_chunk else "")
        )
    return int(min(room, rows))


def forward(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    call: LinearOptions,
    needs: Needs,
    backend: Backend,
) -> Result:
    """Loss, accuracies and, where they can be written now, the gradients.

    Args:
        input: x, ``(rows, D)``.
        linear_weight: W, ``(C, D)``.
        target: labels ``(rows,)``, or class probabilities ``(rows, C)``.
        linear_bias: b, ``(C,)``.
        weight: of the classes, ``(C,)``.
        call: the rest.
        needs: which gradients are wanted. Nothing is computed for the others.
        backend: whose kernels take the loss.
    """
    rows, none, soft = len(input), call.options.reduction == "none", target.is_floating_point()
    written = writes_gradients(call, needs, (input, linear_weight, linear_bias, target))
    part_dtype = call.loss_dtype if none else torch.promote_types(call.loss_dtype, torch.float32)
    part = dataclasses.replace(call.options, reduction="none" if none else "sum")
    total: Any = total_weight(target, weight, call.options) if call.total is None else call.total
    divisor = total if call.options.reduction == "mean" else None
    ks = len(part.topk)
    loss = torch.zeros(
        rows if none else (), dtype=torch.float64 if not none else call.loss_dtype, device=input.device
    )
    right = torch.zeros((ks, rows) if none else (ks,), dtype=torch.float64, device=input.device)
    visit = ChunkIterator(rows, linear_weight, target, call, needs)
    sums = GradientAccumulator(
        input, linear_weight, linear_bias, target, visit, needs if written else Needs(*[False] * 4)
    )
    kept = input.new_empty((0, rows))
    for index, x, t, z in visit.chunks(input, linear_bias):
        logits = z.unsqueeze(2)
        if soft:
            probabilities = t.unsqueeze(2)
            if ks:
                values = backend.accuracy(logits, t.argmax(1), part.topk, -1, part.reduction)
            result = backend.soft_cross_entropy_forward(
                *(logits, probabilities, weight, part),
                loss_dtype=part_dtype,
                gradient=written and any(needs[:3]),
                target_gradient=written and needs.target,
                inplace=written and any(needs[:3]),
                divisor=1.0 if divisor is None else float(rows if call.total is None else total),
            )
            sums.add_target(index, result.target_gradient)
        else:
            result = backend.cross_entropy_forward(  # type: ignore[assignment]
                *(logits, t, weight, part),
                loss_dtype=part_dtype,
                gradient=written,
                inplace=written,
                divisor=divisor if written else None,
            )
            values = result.accuracy  # type: ignore[attr-defined]
        if none:
            loss[index] = result.loss
        else:
            loss += result.loss
        if ks and none:
            right[:, index] = torch.stack(values).double()
        elif ks:
            right += torch.stack(values)
        if any(needs) and not written and result.saved:
            numbers = torch.stack(tuple(result.saved))
            if not len(kept):
                kept = numbers.new_zeros((len(numbers), rows))
            kept[:, index] = numbers
        if written:
            sums.add(index, x, z)
        # The target's gradient among it, and the chunk: the sums are rounded, and the next x is made, without them.
        del result, logits, x, z
    if divisor is not None:
        loss = loss / divisor
    if call.total is None:
        right = _shares(right, target, call.options)
    accuracy = tuple(right.to(torch.float32).unbind(0))
    return Result(loss.to(call.loss_dtype), accuracy, sums.finished(), kept)


def backward(
    upstream: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    kept: Tensor,
    call: LinearOptions,
    needs: Needs,
    backend: Backend,
    into: Tensor | None = None,
) -> Gradients:
    """The gradients from the logits, computed once more.

    Args:
        upstream: the gradient of the loss, ``()`` or ``(rows,)``.
        into: the weight's gradient so far, to which its gradient is added chunk by chunk; it is not returned then.
    """
    part = dataclasses.replace(call.options, reduction="none", topk=())
    if call.options.reduction == "mean":
        total = total_weight(target, weight, call.options) if call.total is None else call.total
        upstream = upstream.double() / total
    wide = torch.float32 if compute_dtype(call.compute_dtype) == torch.float32 else torch.float64
    upstream = upstream.to(wide).expand(len(input))
    visit = ChunkIterator(len(input), linear_weight, target, call, needs)
    sums = GradientAccumulator(input, linear_weight, linear_bias, target, visit, needs, into=into)
    for index, x, t, z in visit.chunks(input, linear_bias):
        saved = tuple(kept[:, index].contiguous().unbind(0)) if len(kept) else ()
        mine, logits = upstream[index].contiguous(), z.unsqueeze(2)
        if t.is_floating_point():
            _, of_target = backend.soft_cross_entropy_backward(
                *(mine, logits, t.unsqueeze(2), weight, part, saved),
                gradient=any(needs[:3]),
                target_gradient=needs.target,
                inplace=any(needs[:3]),
            )
            sums.add_target(index, of_target)
            del of_target
        else:
            backend.cross_entropy_backward(mine, logits, t, weight, part, saved, inplace=True)
        sums.add(index, x, z)
        del logits, x, z  # the chunk: the sums are rounded, and the next x is made, without it
    return sums.finished()


Index = slice | Tensor


class ChunkIterator:
    """Which rows are visited, how many at a time, and W in the dtype of the products."""

    def __init__(self, rows: int, linear_weight: Tensor, target: Tensor, call: LinearOptions, needs: Needs) -> None:
        self.target, self.call = target, call
        self.chosen, self.holds_ignored = _counted_rows(target, call)  # None: all of them
        self.count = rows if self.chosen is None else len(self.chosen)
        self.size = rows_of_chunk(call, self.count, linear_weight, needs)
        by_rule = call.chunk_size is None and call.memory_budget is None
        self.starts = _starts(self.count, self.size, even=by_rule and not target.is_cpu)
        self.w = linear_weight.to(call.compute_dtype)

    def chunks(self, input: Tensor, linear_bias: Tensor | None) -> Iterator[tuple[Index, Tensor, Tensor, Tensor]]:
        """Where its rows are, x, the target, and the logits, in memory that the next chunk writes to."""
        dtype, w = self.call.compute_dtype, self.w
        b = None if linear_bias is None else linear_bias.to(dtype)
        shape = (min(self.size, self.count), _pitch(len(w), input.device))
        buffer = torch.empty(shape, dtype=dtype, device=input.device)[:, : len(w)]
        for start, end in itertools.pairwise(self.starts):
            index: Index = slice(start, end)
            if self.chosen is not None:
                index = self.chosen[index]
            x, t = input[index].to(dtype), self.target[index]
            if self.holds_ignored:
                # Padding may hold NaN, which a gradient of 0 does not keep out of gᵀ x.
                x = torch.where((t != self.call.options.ignore_index).unsqueeze(1), x, 0.0)
            z = buffer[: len(x)]
            if b is None:
                torch.mm(x, w.t(), out=z)
            else:
                torch.addmm(b, x, w.t(), out=z)
            yield index, x, t.contiguous(), z
            del x, z  # one chunk's copies at a time


def _starts(rows: int, size: int, *, even: bool) -> list[int]:
    """Where the chunks begin, and where the last one ends.

    ``even``: a rest of less than half a chunk shares its rows with the chunk before it, as products of few rows are
    slow; in multiples of 64 where a chunk has several of them.
    """
    starts = list(range(0, rows, size))
    rest = rows - starts[-1] if starts else 0
    if even and len(starts) > 1 and 2 * rest < size:
        half = -(-(size + rest) // 2)
        starts[-1] = starts[-2] + (-(-half // _GPU_STEP) * _GPU_STEP if size >= 4 * _GPU_STEP else half)
    return [*starts, rows]


def _counted_rows(target: Tensor, call: LinearOptions) -> tuple[Tensor | None, bool]:
    """The rows that count, if the others are to be left out, else None; and may those visited be ignored ones?"""
    if target.is_floating_point():
        return None, False
    if call.skip_ignored is not True and not target.is_cpu:
        return None, True
    counted = (target != call.options.ignore_index).nonzero().flatten()
    ignored = len(target) - len(counted)
    if call.skip_ignored is not False and ignored >= _SHARE_LEFT_OUT * len(target) > 0:
        return counted, False
    return None, ignored > 0


def _shares(right: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    if options.reduction == "mean" and options.topk:
        counted = len(target) if target.is_floating_point() else (target != options.ignore_index).sum()
        right = right / counted
    return right


class GradientAccumulator:
    """The gradients while chunks add to them."""

    def __init__(
        self,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        visit: ChunkIterator,
        needs: Needs,
        into: Tensor | None = None,
    ) -> None:
        self._needs = needs
        self._weight, self._bias = linear_weight, linear_bias
        self._narrow = visit.w
        self._input = torch.zeros_like(input, memory_format=torch.contiguous_format) if needs.input else None
        self._target = torch.zeros_like(target, memory_format=torch.contiguous_format) if needs.target else None
        self._into = into
        self._of_weight = [] if into is None else [into]  # of all its rows, or of their two halves
        self._of_bias: Tensor | None = None
        self._rows = visit.count

    def add(self, index: Index, x: Tensor, g: Tensor) -> None:
        """A chunk's part, from its input and its logits' gradient."""
        if self._input is not None:
            if isinstance(index, slice) and self._input.dtype == g.dtype:
                torch.mm(g, self._narrow, out=self._input[index])
            else:
                self._input[index] = torch.mm(g, self._narrow).to(self._input.dtype)
        if self._needs.linear_weight:
            self._add_to_weight(x, g)
        if self._needs.linear_bias:
            part = g.sum(0, dtype=_wide(g.dtype))
            self._of_bias = part if self._of_bias is None else self._of_bias.add_(part)

    def add_target(self, index: Index, gradient: Tensor | None) -> None:
        """A chunk's part of the class probabilities' gradient, ``(n, C, 1)``."""
        if self._target is not None and gradient is not None:
            self._target[index] = gradient.squeeze(2)

    def finished(self) -> Gradients:
        """In their tensors' dtypes."""
        of_weight, of_bias = self._finished_weight(), self._of_bias
        if self._needs.linear_bias and of_bias is None and self._bias is not None:
            of_bias = torch.zeros_like(self._bias)
        return Gradients(
            self._input,
            of_weight,
            None if of_bias is None or self._bias is None else of_bias.to(self._bias.dtype),
            self._target,
        )

    def _add_to_weight(self, x: Tensor, g: Tensor) -> None:
        dtype = torch.promote_types(self._weight.dtype, _wide(g.dtype))
        before = int(bool(self._of_weight))
        if not before:
            only = len(x) == self._rows and g.dtype == self._weight.dtype  # the only chunk is rounded once
            if only or dtype == g.dtype:
                self._of_weight = [torch.mm(g.t(), x)]
                return
            rows, columns = self._weight.shape
            parts = [rows]
            if dtype.itemsize > self._weight.dtype.itemsize:
                half = min(rows, -(-rows // 128) * 64)  # at which addresses are multiples of 128 bytes
                parts = [half, rows - half]
            self._of_weight = [torch.empty((part, columns), dtype=dtype, device=x.device) for part in parts]
        start = 0
        for total in self._of_weight:
            _add_product(total, g[:, start : start + len(total)], x, before=before)
            start += len(total)

    def _finished_weight(self) -> Tensor | None:
        if not self._needs.linear_weight or self._into is not None:
            return None
        like, sums = self._weight, self._of_weight
        self._of_weight = []
        if not sums:  # no chunk at all
            return torch.zeros_like(like, memory_format=torch.contiguous_format)
        return _rounded(sums[0], sums[1], like) if len(sums) == 2 else sums[0].to(like.dtype)


def _add_product(total: Tensor, g: Tensor, x: Tensor, *, before: int) -> None:
    """``total = before * total + gᵀ x``, ``(C, D)``; with a 0, what was in it is not read."""
    if total.dtype == g.dtype:
        total.addmm_(g.t(), x, beta=before)
    elif total.is_cuda and total.dtype == torch.float32 and torch.version.hip is None:
        torch.addmm(total, g.t(), x, beta=before, out_dtype=torch.float32, out=total)
    else:  # widened by parts
        x = x.to(total.dtype)
        step = max(1, _WIDENED // max(len(x), 1))
        for start in range(0, len(total), step):
            part = g[:, start : start + step].t().to(total.dtype)
            total[start : start + step].addmm_(part, x, beta=before)


def _rounded(first: Tensor, second: Tensor, like: Tensor) -> Tensor:
    """Two halves of a sum in 32 bits, rounded to 16 bits in the memory of the first, which has room for both.

    Nothing is held beside the sums: another tensor would be, whole, while they are.
    """
    result = torch.empty(0, dtype=like.dtype, device=like.device)
    result.set_(first.untyped_storage(), 0, like.shape)  # type: ignore[call-overload]
    narrow, wide, count = result.view(-1), first.view(-1), first.numel()
    done = min(count, _ROUNDED_FIRST)
    narrow[:done] = wide[:done].to(like.dtype)
    while done < count:
        # Written are the bytes from 2 · done to 4 · done, of numbers that are rounded; read are those from there on.
        following = slice(done, min(2 * done, count))
        narrow[following].copy_(wide[following])
        done = following.stop
    narrow[count:].copy_(second.view(-1))
    return result


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype
