r"""The projection, the loss and their gradients, some rows at a time: the logits of all rows never exist.

With x ``(N, D)`` the input, W ``(C, D)`` and b ``(C,)`` the linear map, a chunk of n rows takes

    z = x Wᵀ + b          (n, C), in one buffer for all chunks
    g = ∂L/∂z             written over z by the backend's cross-entropy kernel, in the visit that gives the loss
    ∂L/∂x = g W           ∂L/∂W += gᵀ x           ∂L/∂b += Σ_rows g

three products of 2 n C D operations each. The sums over all chunks, ∂L/∂W and ∂L/∂b, are kept in float32 for 16-bit
weights: a large sum that is rounded after every chunk would lose the chunks' small parts.

Where the gradient can't be written in the forward pass (reduction "none"; float16, whose gradients need the loss
scale before they are rounded), the backward pass computes the chunk's logits again: a fourth product.

:func:`rows_of_chunk` has the rule for the number of rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import short_road
from ..backends.contract import Backend, LossOptions, compute_dtype
from ..backends.view import in_memory
from ..loss import composite
from ..loss.autograd import gradients_from_input, visit
from ..loss.row_numbers import total_weight

__all__ = [
    "NO_GRADIENTS",
    "Chunk",
    "ChunkIterator",
    "ChunkLoss",
    "GradientAccumulator",
    "Gradients",
    "Index",
    "LinearOptions",
    "Losses",
    "Needs",
    "Result",
    "Saved",
    "Tensors",
    "backward",
    "dtype_of_chunk",
    "forward",
    "logits_of",
    "row_of_logits",
    "rows_of_chunk",
    "writes_gradients",
]

# A GPU's rows of logits begin at multiples of so many elements. Products of matrices whose rows are not aligned, such
# as 50257 classes in 16 bits, take slower kernels.
_PITCH = {"cuda": 64}
# The rows of a chunk, and the bytes of its logits: see rows_of_chunk.
_CPU_ROWS, _CPU_BYTES = 256, 96 << 20
_GPU_ROWS, _MANY_GPU_ROWS = 1536, 4096
_FEW_GPU_BYTES, _GPU_BYTES = 5 << 26, 5 << 28
_FEWEST_CPU_ROWS, _CPU_STEP, _GPU_STEP = 128, 64, 64
# Ignored rows are left out if they are at least this part of all.
_SHARE_LEFT_OUT = 1 / 16
# Elements of a 16-bit chunk that a CPU widens at a time.
_WIDENED = 1 << 22
# Elements of a 32-bit sum that are rounded first; the others are rounded into their memory.
_ROUNDED_FIRST = 1 << 10

Index = slice | Tensor  # of a chunk's rows


@dataclass(frozen=True)
class LinearOptions:
    """The options of one call, checked."""

    options: LossOptions
    compute_dtype: torch.dtype  # of the products: the tensors', or autocast's
    loss_dtype: torch.dtype
    chunk_size: int | None = None
    memory_budget: int | None = None
    skip_ignored: bool | None = None  # None: where the host knows the labels
    # Add to linear_weight.grad, in the backward pass, which knows the upstream gradient.
    accumulate_grad: bool = False
    logits_dtype: torch.dtype | None = None  # of a chunk, if it is wider than the products' own
    # Bytes of the numbers per row: its loss, its index, the numbers saved for the backward pass.
    row_bytes: int = 64
    # Bytes of a chunk's row beside those of these tensors' chunks.
    chunk_row_bytes: int = 0
    # The divisor of a mean over more rows than these; a float beside class probabilities. The accuracies are numbers
    # of rows then, not shares.
    total: Tensor | float | None = None

    @property
    def chunk_dtype(self) -> torch.dtype:
        """Return the dtype of the logits."""
        return dtype_of_chunk(self.compute_dtype, self.logits_dtype)


def dtype_of_chunk(compute_dtype: torch.dtype, logits_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the logits from that of the products and the one that is asked for."""
    return compute_dtype if logits_dtype is None else torch.promote_types(compute_dtype, logits_dtype)


class Needs(NamedTuple):
    """Which gradients are wanted."""

    input: bool
    linear_weight: bool
    linear_bias: bool
    target: bool


NO_GRADIENTS = Needs(False, False, False, False)


class Tensors(NamedTuple):
    """The tensors that may have a gradient."""

    input: Tensor  # x, (rows, D)
    linear_weight: Tensor  # W, (C, D)
    linear_bias: Tensor | None  # b, (C,)
    target: Tensor  # labels (rows,), or class probabilities (rows, C)

    def needs(self) -> Needs:
        """Return which of them require a gradient."""
        return Needs(*(tensor is not None and tensor.requires_grad for tensor in self))


class Gradients(NamedTuple):
    """The gradients in the shapes and dtypes of their tensors; None where none is wanted."""

    input: Tensor | None = None
    linear_weight: Tensor | None = None
    linear_bias: Tensor | None = None
    target: Tensor | None = None


class Result(NamedTuple):
    """The result of a forward pass."""

    loss: Tensor  # () or (rows,)
    accuracy: tuple[Tensor, ...]  # one () or (rows,) for each k of options.topk; float32, float64 beside call.total
    gradients: Gradients  # at an upstream gradient of 1, where they are written
    saved: Tensor  # (numbers, rows), for the backward pass; (0, rows) if it needs none, or there is no chunk


def writes_gradients(call: LinearOptions, needs: Needs, tensors: Tensors) -> bool:
    """Return True if the forward pass writes the gradients that are needed.

    Gradients in float16 wait for the backward pass, which knows the loss scale.
    """
    dtypes = {call.compute_dtype, *(t.dtype for t, n in zip(tensors, needs, strict=True) if n and t is not None)}
    at_once = call.options.is_reduced and torch.float16 not in dtypes
    return any(needs) and at_once and not call.accumulate_grad


def rows_of_chunk(call: LinearOptions, rows: int, linear_weight: Tensor, needs: Needs) -> int:
    """Return the number of rows of a chunk: ``chunk_size``, or what ``memory_budget`` has room for, or a rule.

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
    row_bytes = max(_pitch(len(linear_weight), linear_weight.device) * call.chunk_dtype.itemsize, 1)
    if on_cpu:
        most = max(_FEWEST_CPU_ROWS, _CPU_BYTES // row_bytes // _CPU_STEP * _CPU_STEP)
        return max(1, min(_CPU_ROWS, most, rows))
    several = min(max(_GPU_ROWS, min(_FEW_GPU_BYTES // row_bytes, _MANY_GPU_ROWS)), _GPU_BYTES // row_bytes)
    alone = several + _bytes_of_sums(call, linear_weight, needs) // row_bytes
    return max(1, rows if rows <= alone else several)


def row_of_logits(linear_weight: Tensor, dtype: torch.dtype) -> int:
    """Return the bytes of a row of logits."""
    return _pitch(len(linear_weight), linear_weight.device) * dtype.itemsize


def _pitch(classes: int, device: torch.device) -> int:
    """Return the distance of the logits' rows in memory, in elements."""
    step = _PITCH.get(device.type, 1)
    return -(-classes // step) * step


def _bytes_of_sums(call: LinearOptions, linear_weight: Tensor, needs: Needs) -> int:
    """Return the bytes of the weight gradient's sums beyond those of the gradient. Their rounding needs no more."""
    if call.accumulate_grad or not needs.linear_weight:
        return 0
    return linear_weight.numel() * max(_wide(call.compute_dtype).itemsize - linear_weight.dtype.itemsize, 0)


def _rows_within(budget: int, call: LinearOptions, rows: int, linear_weight: Tensor, needs: Needs) -> int:
    """Return a chunk's rows if all that is held beside inputs and gradients may be ``budget`` bytes."""
    (classes, features), dtype = linear_weight.shape, call.compute_dtype
    narrow, wide = dtype.itemsize, _wide(dtype).itemsize
    sums, on_cpu = needs.linear_weight, linear_weight.device.type == "cpu"
    # Per row: the logits and the target's gradient; on a CPU their widened parts for the sums, or a softcap's slope;
    # x and its gradient in another dtype.
    row = row_of_logits(linear_weight, call.chunk_dtype) + features * (narrow + 2 * wide) + call.chunk_row_bytes
    row += classes * narrow * (call.chunk_dtype != dtype)  # the gradient, rounded for the products
    row += (
        classes * wide * (needs.target + (on_cpu and (call.options.softcap is not None or (sums and wide > narrow))))
    )
    # For chunks of any size: the numbers of all rows, and the weights in the dtype of the products.
    always = rows * call.row_bytes + (linear_weight.numel() * narrow if linear_weight.dtype != dtype else 0)
    if on_cpu and narrow < wide and needs.input:
        always += linear_weight.numel() * narrow  # oneDNN copies W into a layout of its own for g W
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


class Chunk(NamedTuple):
    """Some rows."""

    rows: Index
    x: Tensor  # (n, D)
    target: Tensor  # (n,), or (n, C)
    logits: Tensor  # (n, C)


Saved = tuple[Tensor, ...]  # numbers of a chunk's rows, (n,) each


class ChunkLoss(NamedTuple):
    """The loss of one chunk of n rows."""

    loss: Tensor | None  # (n,), or () for a sum; None: numbers of each row alone
    right: Tensor | None  # for each k of options.topk the right rows, (k, n), or their number, (k,)
    saved: Sequence[Tensor]  # numbers of each row, (n,) each
    target_gradient: Tensor | None = None  # (n, C)


class Losses:
    """The losses of chunks; the gradient of a chunk's logits is written over them.

    Args:
        weight: of the classes, ``(C,)``.
        call: the options.
        backend: the backend whose functions visit the logits.
    """

    per_row = False  # if True, a chunk's loss is (n,) for every reduction
    keeps_numbers = False  # if True, the chunks' numbers are results: they are kept in each case
    differentiable = 1  # how many of the outputs are

    def __init__(self, weight: Tensor | None, call: LinearOptions, backend: Backend) -> None:
        self.weight, self.call, self.backend = weight, call, backend
        self.upstream_dtype = compute_dtype(call.compute_dtype)
        # Of a chunk: sums, in 32 bits or more, which the sum over all chunks is made of.
        self.part = dataclasses.replace(call.options, reduction="sum" if call.options.is_reduced else "none")
        wide = torch.promote_types(call.loss_dtype, torch.float32)
        self.loss_dtype = wide if call.options.is_reduced else call.loss_dtype

    def total(self, target: Tensor) -> Tensor | float | None:
        """Return the divisor of the mean: the sum of the counted rows' weights; None for another reduction."""
        if self.call.options.reduction != "mean":
            return None
        if self.call.total is not None:
            return self.call.total
        if target.is_floating_point():
            return float(len(target))
        return total_weight(target, self.weight, self.call.options)

    def counted(self, target: Tensor) -> Tensor | None:
        """Return which rows have a loss, ``(rows,)`` bool; None: all of them. The others may hold NaN."""
        return None if target.is_floating_point() else target != self.call.options.ignore_index

    def forward(self, chunk: Chunk, total: Tensor | float | None, needs: Needs) -> ChunkLoss:
        """Return the loss of logits z, ``(n, C)``, against t, and the gradients that are needed now."""
        _, _, t, z = chunk
        part, of_logits, right = self.part, any(needs[:3]), None
        if part.topk and t.is_floating_point():  # before the gradient is written over the logits
            values = self.backend.accuracy(z.unsqueeze(2), t.argmax(1), part.topk, -1, part.reduction)
            right = torch.stack(values)

        def visited() -> tuple[Any, ...]:
            result = visit(
                *(self.backend, z, t, self.weight, part, self.loss_dtype),
                gradient=of_logits,
                target_gradient=needs.target,
                inplace=of_logits,
                divisor=total,
            )
            return (result.loss, result.target_gradient, *result.accuracy, *result.saved)

        divisor = (total, None) if isinstance(total, Tensor) else (None, total)
        options = ("chunk", self.backend, part, self.loss_dtype, of_logits, needs.target, divisor[1])
        outputs = short_road.replayed(options, (z, t, self.weight, divisor[0], *part.scalars()), visited)
        ks = 0 if t.is_floating_point() else len(part.topk)
        loss, of_target, *numbers = outputs
        return ChunkLoss(loss, torch.stack(numbers[:ks]) if ks else right, numbers[ks:], of_target)

    def outputs(self, result: Result, target: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the autograd node."""
        return (result.loss, *result.accuracy)

    def upstreams(self, given: Sequence[Tensor | None], target: Tensor) -> list[Tensor | None]:
        """Return the upstream gradients of a row, ``(rows,)`` each, from those of the differentiable outputs."""
        assert given[0] is not None
        total, upstream = self.total(target), in_memory(given[0])
        upstream = upstream if total is None else upstream.double() / total
        return [upstream.to(self.upstream_dtype).expand(target.shape[0])]

    def counted_backward(self, upstreams: Sequence[Tensor | None], target: Tensor) -> Tensor | None:
        """Return which rows have a gradient, as :meth:`counted` does."""
        return self.counted(target)

    def backward(self, chunk: Chunk, upstreams: Sequence[Tensor | None], saved: Saved, needs: Needs) -> Any:
        """Write the gradient over the logits z, and return that of the probabilities, ``(n, C)``, or None.

        ``upstreams`` are ``(n,)`` each.
        """
        _, _, t, z = chunk
        (upstream,) = upstreams
        assert upstream is not None
        part = dataclasses.replace(self.call.options, reduction="none", topk=())
        of_logits = any(needs[:3])
        return gradients_from_input(
            *(self.backend, upstream, z, t, self.weight, part, saved),
            gradient=of_logits,
            target_gradient=needs.target,
            inplace=of_logits,
        )[1]

    def composed(self, logits: Tensor, t: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
        """Return the differentiable outputs from all logits, by torch's own operators."""
        options, total = self.call.options, self.call.total
        if total is None or options.reduction != "mean":
            return (composite.cross_entropy(logits, t, weight, options),)
        return (composite.cross_entropy(logits, t, weight, dataclasses.replace(options, reduction="sum")) / total,)

    def finished(self, loss: Tensor, total: Tensor | float | None) -> Tensor:
        """Return the loss from the sum of its chunks' losses."""
        return loss if total is None else loss / total

    def whole(self, gradients: Gradients) -> Gradients:
        """Return the gradients over all classes."""
        return gradients

    def refuse_second_derivative(self) -> None:
        """Raise an error if there is no second derivative."""


def forward(tensors: Tensors, needs: Needs, losses: Losses) -> Result:
    """Return the loss, the accuracies and, where they can be written now, the gradients that are needed."""
    call, rows, none = losses.call, len(tensors.input), not losses.call.options.is_reduced
    device, target = tensors.input.device, tensors.target
    written = writes_gradients(call, needs, tensors)
    needs_now = needs if written else NO_GRADIENTS
    total, ks = losses.total(target), len(call.options.topk)
    dtype = call.loss_dtype if none else torch.float64
    loss = torch.zeros(rows if none or losses.per_row else (), dtype=dtype, device=device)
    right = torch.zeros((ks, rows) if none else (ks,), dtype=torch.float64, device=device) if ks else None
    visit = ChunkIterator(tensors, call, needs, losses.counted(target))
    sums = GradientAccumulator(tensors, visit, needs_now)
    saved = tensors.input.new_empty((0, rows))
    keeps = losses.keeps_numbers or (any(needs) and not written)
    for chunk in visit.chunks():
        part, index = losses.forward(chunk, total, needs_now), chunk.rows
        if part.loss is not None:
            if loss.dim():
                loss[index] = part.loss
            else:
                loss += part.loss
        if right is not None and part.right is not None:
            if none:
                right[:, index] = part.right.double()
            else:
                right += part.right
        if keeps and part.saved:
            numbers = torch.stack(tuple(part.saved))
            if not len(saved):
                saved = numbers.new_zeros((len(numbers), rows))
            saved[:, index] = numbers
        sums.add_target(index, part.target_gradient)
        sums.add(index, chunk.x, chunk.logits)
        # Free the target's gradient and the chunk, before the sums are rounded and the next x is made.
        del part, chunk
    if right is not None and call.total is None:
        right = _shares(right, target, call.options).to(torch.float32)
    loss = losses.finished(loss, total).to(call.loss_dtype)
    return Result(loss, () if right is None else tuple(right.unbind(0)), losses.whole(sums.finished()), saved)


def backward(
    given: Sequence[Tensor | None],
    tensors: Tensors,
    saved: Tensor,
    needs: Needs,
    losses: Losses,
    into: Tensor | None = None,
) -> Gradients:
    """Return the gradients from the logits, computed once more.

    Args:
        given: the gradients of the differentiable outputs: of a loss one, ``()`` or ``(rows,)``.
        saved: from the forward pass.
        into: the weight's gradient so far, to which its gradient is added chunk by chunk; it is not returned then.
    """
    upstreams = losses.upstreams(given, tensors.target)
    visit = ChunkIterator(tensors, losses.call, needs, losses.counted_backward(upstreams, tensors.target))
    sums = GradientAccumulator(tensors, visit, needs, into)
    for chunk in visit.chunks():
        index = chunk.rows
        numbers = tuple(saved[:, index].contiguous().unbind(0)) if len(saved) else ()
        of_rows = [None if upstream is None else upstream[index].contiguous() for upstream in upstreams]
        sums.add_target(index, losses.backward(chunk, of_rows, numbers, needs))
        sums.add(index, chunk.x, chunk.logits)
        del chunk  # before the sums are rounded and the next x is made
    return losses.whole(sums.finished())


class ChunkIterator:
    """Visits rows a chunk at a time: projects them, and yields their logits.

    Args:
        tensors: the input and the linear map.
        call: the options.
        needs: which gradients are wanted.
        counted: which rows count; None: all of them. The others are left out, or their input is taken for 0.
    """

    def __init__(self, tensors: Tensors, call: LinearOptions, needs: Needs, counted: Tensor | None) -> None:
        self.tensors, self.call = tensors, call
        self.chosen, self.counted = _rows_to_visit(counted, call)
        self.count = (tensors.input if self.chosen is None else self.chosen).shape[0]
        self.size = rows_of_chunk(call, self.count, tensors.linear_weight, needs)
        by_rule = call.chunk_size is None and call.memory_budget is None
        starts = _starts(self.count, self.size, even=by_rule and not tensors.target.is_cpu)
        self.sizes = [end - start for start, end in itertools.pairwise(starts)]
        self.w = tensors.linear_weight.to(call.compute_dtype)

    def chunks(self) -> Iterator[Chunk]:
        """Yield each chunk. The next chunk's logits overwrite these."""
        input, _, b, _ = self.tensors
        dtype, classes, most = self.call.compute_dtype, self.w.shape[0], min(self.size, self.count)
        b = None if b is None else b.to(dtype)
        shape = most, _pitch(classes, input.device)
        buffer = torch.empty(shape, dtype=self.call.chunk_dtype, device=input.device)[:, :classes]
        for index, x, t in self._parts():
            rows = x.shape[0]
            x = x.to(dtype)
            x = x if self.counted is None else of_counted(x, self.counted[index])
            z = buffer if rows == most else buffer[:rows]
            project(x, self.w, b, z)
            yield Chunk(index, x, t.contiguous(), z)
            del x, z  # one chunk's copies at a time

    def _parts(self) -> Iterator[tuple[Index, Tensor, Tensor]]:
        """Yield each chunk's index, and the input and the target there: views, unless rows are left out."""
        input, target, sizes = self.tensors.input, self.tensors.target, self.sizes
        if self.chosen is not None:
            for index in self.chosen.split(sizes):
                yield index, input[index], target[index]
            return
        start = 0
        for size, x, t in zip(sizes, input.split(sizes), target.split(sizes), strict=True):
            yield slice(start, start + size), x, t
            start += size


def _starts(rows: int, size: int, *, even: bool) -> list[int]:
    """Return the chunks' first rows, and the end of the last chunk.

    ``even``: a rest of less than half a chunk shares its rows with the chunk before it, since products of few rows
    are slow; in multiples of 64 where a chunk has several of them.
    """
    starts = list(range(0, rows, size))
    rest = rows - starts[-1] if starts else 0
    if even and len(starts) > 1 and 2 * rest < size:
        half = -(-(size + rest) // 2)
        starts[-1] = starts[-2] + (-(-half // _GPU_STEP) * _GPU_STEP if size >= 4 * _GPU_STEP else half)
    return [*starts, rows]


def _rows_to_visit(counted: Tensor | None, call: LinearOptions) -> tuple[Tensor | None, Tensor | None]:
    """Return the indices of the rows to visit, None for all, and ``counted`` if others may be among them."""
    if counted is None or (call.skip_ignored is not True and not counted.is_cpu):
        return None, counted
    chosen = counted.nonzero().flatten()
    rows, ignored = counted.shape[0], counted.shape[0] - chosen.shape[0]
    if call.skip_ignored is not False and ignored >= _SHARE_LEFT_OUT * rows > 0:
        return chosen, None
    return None, counted if ignored else None


def _shares(right: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """Return the accuracies from the number of right rows."""
    if options.reduction == "mean" and options.topk:
        counted = len(target) if target.is_floating_point() else (target != options.ignore_index).sum()
        right = right / counted
    return right


class GradientAccumulator:
    """Adds up the gradients of chunks."""

    def __init__(self, tensors: Tensors, visit: ChunkIterator, needs: Needs, into: Tensor | None = None) -> None:
        self._needs = needs
        input, self._weight, self._bias, target = tensors
        self._narrow = visit.w
        self._input = torch.zeros_like(input, memory_format=torch.contiguous_format) if needs.input else None
        self._target = torch.zeros_like(target, memory_format=torch.contiguous_format) if needs.target else None
        self._into = into
        self._of_weight = [] if into is None else [into]  # of all its rows, or of their two halves
        self._of_bias: Tensor | None = None
        self._rows = visit.count
        self._sum_dtype = torch.promote_types(self._weight.dtype, _wide(self._narrow.dtype))

    def add(self, index: Index, x: Tensor, g: Tensor) -> None:
        """Add a chunk's part, from its input x and its logits' gradient g."""
        if self._needs.linear_bias:
            part = g.sum(0, dtype=_wide(g.dtype))
            self._of_bias = part if self._of_bias is None else self._of_bias.add_(part)
        if self._needs.input or self._needs.linear_weight:
            g = g.to(self._narrow.dtype)
        if self._input is not None:
            if isinstance(index, slice) and self._input.dtype == g.dtype:
                torch.mm(g, self._narrow, out=self._input[index])
            else:
                self._input[index] = torch.mm(g, self._narrow).to(self._input.dtype)
        if self._needs.linear_weight:
            self._add_to_weight(x, g)

    def add_target(self, index: Index, gradient: Tensor | None) -> None:
        """Store a chunk's part of the class probabilities' gradient, ``(n, C)``."""
        if self._target is not None and gradient is not None:
            self._target[index] = gradient

    def finished(self) -> Gradients:
        """Return the gradients in their tensors' dtypes."""
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
        dtype, before = self._sum_dtype, int(bool(self._of_weight))
        if not before:
            only = x.shape[0] == self._rows and g.dtype == self._weight.dtype  # the only chunk is rounded once
            if only or dtype == g.dtype:
                self._of_weight = [torch.mm(g.t(), x)]
                return
            rows, columns = self._weight.shape
            parts = [rows]
            if dtype.itemsize > self._weight.dtype.itemsize:
                half = min(rows, -(-rows // 128) * 64)  # at which addresses are multiples of 128 bytes
                parts = [half, rows - half]
            self._of_weight = [torch.empty((part, columns), dtype=dtype, device=x.device) for part in parts]
        parts_of_g = (g,) if len(self._of_weight) == 1 else g.split([len(total) for total in self._of_weight], 1)
        for total, part in zip(self._of_weight, parts_of_g, strict=True):
            _add_product(total, part, x, before=before)

    def _finished_weight(self) -> Tensor | None:
        if not self._needs.linear_weight or self._into is not None:
            return None
        like, sums = self._weight, self._of_weight
        self._of_weight = []
        if not sums:  # no chunk at all
            return torch.zeros_like(like, memory_format=torch.contiguous_format)
        return _rounded(sums[0], sums[1], like) if len(sums) == 2 else sums[0].to(like.dtype)


def project(x: Tensor, w: Tensor, b: Tensor | None, z: Tensor) -> None:
    """Compute ``z = x wᵀ + b``, ``(n, C)``; z may be wider than x and w, and is then not rounded to their dtype."""
    if z.dtype == x.dtype:
        torch.mm(x, w.t(), out=z) if b is None else torch.addmm(b, x, w.t(), out=z)
        return
    if z.is_cuda and torch.version.hip is None:
        torch.mm(x, w.t(), out_dtype=z.dtype, out=z)
    else:  # widened by parts
        x = x.to(z.dtype)
        step = max(1, _WIDENED // max(w.shape[1], 1))
        for start in range(0, w.shape[0], step):
            part = w[start : start + step].to(z.dtype)
            torch.mm(x, part.t(), out=z[:, start : start + step])
    if b is not None:
        z += b


def of_counted(values: Tensor, counted: Tensor | None) -> Tensor:
    """Return the rows with 0 in the place of those that do not count: padding may hold NaN, and 0 · NaN is NaN."""
    if counted is None:
        return values
    return torch.where(counted if values.dim() == 1 else counted.unsqueeze(1), values, 0)


def logits_of(tensors: Tensors, call: LinearOptions) -> Tensor:
    """Return all logits, by torch's own differentiable operators, as the caller's context has them."""
    x, w, b, _ = tensors
    if call.chunk_dtype == call.compute_dtype:
        return F.linear(x, w, b)
    with torch.autocast(x.device.type, enabled=False):
        # Products of numbers of 16 bits are exact in float32.
        wide = (None if each is None else each.to(call.compute_dtype).to(call.chunk_dtype) for each in (x, w, b))
        return F.linear(*wide)  # type: ignore[arg-type]


def _add_product(total: Tensor, g: Tensor, x: Tensor, *, before: int) -> None:
    """Compute ``total = before * total + gᵀ x``, ``(C, D)``, in place; if ``before`` is 0, total is not read."""
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
    """Return the two halves of a sum in 32 bits, rounded to 16 bits in the memory of the first half.

    It has room for both. A result of its own would be held beside the sums.
    """
    result = torch.empty(0, dtype=like.dtype, device=like.device)
    result.set_(first.untyped_storage(), 0, like.shape)  # type: ignore[call-overload]
    narrow, wide, count = result.view(-1), first.view(-1), first.numel()
    done = min(count, _ROUNDED_FIRST)
    narrow[:done] = wide[:done].to(like.dtype)
    while done < count:
        # This writes the bytes from 2 · done to 4 · done, whose numbers are rounded already, and reads those after.
        following = slice(done, min(2 * done, count))
        narrow[following].copy_(wide[following])
        done = following.stop
    narrow[count:].copy_(second.view(-1))
    return result


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums."""
    return torch.float32 if dtype.itemsize < 4 else dtype
