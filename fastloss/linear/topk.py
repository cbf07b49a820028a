"""The K best classes of each row and their log-probabilities, from hidden states, without the logits of all rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends import choice
from ..backends.contract import LossInputs, LossOptions, WantedNumbers, compute_dtype
from ..backends.memory import forgetful
from ..backends.torch_private import disable_dynamo, is_exporting
from ..loss import composite, routes
from ..loss.compiled import NUMBERS, filled, packed, unpacked
from ..loss.sharded import checked, refuse
from ..ranks import collectives, placements
from ..ranks.collectives import gather
from .arguments import check_linear_map, checked_chunking, dtype_of_logits
from .chunks import NO_GRADIENTS, ChunkIterator, LinearOptions, Tensors

__all__ = ["TopKLogProbs", "linear_topk_log_probs"]

# Rows whose classes the ranks tell each other at a time.
_ROWS_AT_A_TIME = 1024
# The class of a place that no class has: it comes after all classes.
_NO_CLASS = 1 << 62


class TopKLogProbs(NamedTuple):
    """The result of :func:`linear_topk_log_probs`."""

    log_probs: Tensor
    ids: Tensor


def linear_topk_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    k: int,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    group: Any = None,
    logit_scale: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
) -> TopKLogProbs:
    r"""Return the K most probable classes of each row and their log-probabilities, without holding the logits.

    With z = softcap(logit_scale · (x Wᵀ + b)) / temperature, ``log_probs`` are z_c − log Σ_c exp(z_c), the sum being
    over all C classes.
    Some rows at a time are projected, as in :func:`fastloss.linear_cross_entropy`; beside the results there is one
    chunk of logits. A teacher's K best classes are what a student is distilled from where the teacher's logits would
    be too many to store.

    Args:
        input: x, the hidden states, ``(D,)``, ``(N, D)`` or ``(…, D)``; float16, bfloat16, float32 or float64.
        linear_weight: W, ``(C, D)``.
        k: K, from 1 to C.
        linear_bias: b, ``(C,)``.
        softcap, logit_scale, temperature: as in :func:`fastloss.cross_entropy`. The classes are ordered by x Wᵀ + b.
        chunk_size, memory_budget: as in :func:`fastloss.linear_cross_entropy`
        group: a ``torch.distributed`` process group, each of whose ranks has a shard of the classes, in rank order
            and of any size: ``linear_weight`` and ``linear_bias`` are this rank's. ``input`` and ``k`` are the same
            on every rank, and so are the results, whose ids are among all classes. Each rank gives away its own K
            best classes. DTensors are taken as :func:`fastloss.linear_cross_entropy` takes them.

    Returns:
        ``(log_probs, ids)``, a NamedTuple; both ``(…, K)``, the most probable class first: ``log_probs`` in float32
        (float64 for float64 tensors), ``ids`` in int64. Of classes with equal logits the lower one comes first; where
        such a tie goes past the K-th place, it is not determined which of them are among the K. NaN is the greatest
        value.

    There is no gradient: the results require none, whatever the arguments do.

    Raises:
        TypeError, ValueError, RuntimeError: arguments that don't fit; a ``k`` below 1 or above the number of classes.
            On a GPU with ``group=``, where the host does not know that number, the places beyond it hold the id -1
            and a log-probability of -inf.

    Example:
        >>> import torch
        >>> hidden = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
        >>> head = torch.tensor([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6]])
        >>> linear_topk_log_probs(hidden, head, 2)
        TopKLogProbs(log_probs=tensor([[-0.7514, -0.9514],
                [-0.5557, -1.2557]]), ids=tensor([[2, 0],
                [1, 0]]))
    """
    if checks.is_symbolic(input, linear_weight):
        return checks.symbolic(linear_topk_log_probs, locals())
    scales = {"logit_scale": logit_scale, "temperature": temperature, "logits": input}
    options = checked(
        group, input, checks.checked_options, ignore_index=-100, reduction="none", softcap=softcap, **scales
    )
    _, chunking = checked(group, input, checked_chunking, chunk_size, memory_budget, False, None, False)
    count = checked(group, input, _checked_k, k)
    with torch.no_grad():
        if group is not None or any(map(placements.is_uncompiled_dtensor, (input, linear_weight))):
            return _over_ranks(input, linear_weight, linear_bias, count, options, chunking, group)
        _check_shapes(input, linear_weight, linear_bias)
        _check_count(count, len(linear_weight))
        call = _call(input, options, chunking)
        lead = input.shape[:-1]
        x = input.reshape(lead.numel(), input.shape[-1])
        if torch.compiler.is_dynamo_compiling() and not is_exporting():
            (*_, cap, _, _), numbers = packed(options, input.device)
            results = topk_log_probs(
                *(x.detach(), linear_weight.detach(), None if linear_bias is None else linear_bias.detach(), count),
                *(cap, call.chunk_size, call.memory_budget, call.compute_dtype, *numbers),
            )
        elif routes.is_traced(input, linear_weight.detach()):
            results = _composed(x, linear_weight, linear_bias, count, call)
        else:
            best = _best_of_part(x, linear_weight, linear_bias, count, call)
            results = best.log_probs(best.lse, options), best.ids
        return TopKLogProbs(*(result.view(*lead, count) for result in results))


def _checked_k(k: object) -> int:
    count = checks.checked_count(k, "k", "a number of classes")
    if count < 1:
        raise ValueError(f"fastloss: k is {k}; expected at least 1 class")
    return count


def _check_count(k: int, classes: int) -> None:
    if k > classes:
        raise ValueError(f"fastloss: k is {k}, and linear_weight has {classes} classes; expected 1 to {classes}")


def _check_shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    checks.check_logits(input)
    if not isinstance(linear_weight, Tensor):
        raise TypeError(f"fastloss: linear_weight must be a Tensor, got {type(linear_weight).__name__}")
    if linear_bias is not None and not isinstance(linear_bias, Tensor):
        raise TypeError(f"fastloss: linear_bias must be a Tensor or None, got {type(linear_bias).__name__}")
    checks.check_strided(linear_weight=linear_weight, linear_bias=linear_bias)

    def shapes() -> str:
        of_bias = "" if linear_bias is None else f", linear_bias {tuple(linear_bias.shape)}"
        return f"the shapes are input {tuple(input.shape)}, linear_weight {tuple(linear_weight.shape)}{of_bias}"

    check_linear_map(input, linear_weight, linear_bias, shapes)
    if linear_weight.dim() != 2:
        raise RuntimeError(f"fastloss: {shapes()}; expected a linear_weight of shape (C, D)")


def _call(input: Tensor, options: LossOptions, chunking: dict[str, Any]) -> LinearOptions:
    dtype = dtype_of_logits(input)
    return LinearOptions(options, dtype, compute_dtype(dtype), **chunking)


class _Best(NamedTuple):
    """The best of some classes of each row, the best one first."""

    logits: Tensor  # (rows, k), before the softcap, in the dtype of the results
    ids: Tensor  # (rows, k), int64
    lse: Tensor  # (rows,), float64: log Σ_c exp(z_c) of all of these classes

    def log_probs(self, lse: Tensor, options: LossOptions) -> Tensor:
        """Return the log-probabilities, of an lse ``(rows,)`` over more classes."""
        z = composite.scaled(self.logits.to(lse.dtype), options)
        return (z - lse.unsqueeze(1)).to(self.logits.dtype)


def _best_of_part(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, k: int, call: LinearOptions) -> _Best:
    """Return the best of the classes at hand, of rows x ``(rows, D)``."""
    rows, device, backend = len(x), x.device, choice.load(choice.choose(x))
    logits = torch.empty((rows, k), dtype=call.loss_dtype, device=device)
    ids = torch.empty((rows, k), dtype=torch.int64, device=device)
    lse = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
    every_row = x.new_empty((rows, 0))  # a target without elements, of which no row is ignored
    tensors = Tensors(x, linear_weight, linear_bias, every_row)
    if not len(linear_weight):  # a rank without classes
        return _Best(logits, ids, lse)
    with torch.autocast(device.type, enabled=False):
        for index, _, _, z in ChunkIterator(tensors, call, NO_GRADIENTS, None).chunks():
            labels = torch.zeros(len(z), dtype=torch.int64, device=device)
            inputs = LossInputs(z.unsqueeze(2), labels, None, call.options)
            numbers = backend.row_statistics_forward(inputs, WantedNumbers(every_row=True))
            lse[index] = numbers.lse.to(lse.dtype)
            logits[index], ids[index] = _ordered(*z.topk(k), k)
    return _Best(logits, ids, lse)


def _ordered(logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best of some classes ``(rows, classes)``, the lower one of equal ones first."""
    ids, place = ids.sort(-1)
    logits, order = logits.gather(-1, place).sort(dim=-1, descending=True, stable=True)
    return logits[..., :k], ids.gather(-1, order)[..., :k]


def _composed(
    x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, k: int, call: LinearOptions
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities and classes by torch's own operators over all logits, for transforms."""
    logits = torch.nn.functional.linear(x, linear_weight, linear_bias)
    lse = composite.scaled(logits.to(call.loss_dtype), call.options).logsumexp(-1)
    best, ids = _ordered(*logits.topk(k), k)
    return _Best(best.to(call.loss_dtype), ids, lse).log_probs(lse, call.options), ids


# ------------------------------------------------------------------------------------------------------ several ranks


@disable_dynamo
def _over_ranks(
    input: Any,
    linear_weight: Any,
    linear_bias: Any,
    k: int,
    options: LossOptions,
    chunking: dict[str, Any],
    group: Any,
) -> TopKLogProbs:
    """Return the results of DTensors, or of a group's shards of the classes."""
    by_mesh = any(map(placements.is_dtensor, (input, linear_weight)))
    if by_mesh and group is not None:
        raise ValueError("fastloss: group is given beside a DTensor, whose mesh says which ranks have what")
    group = None if by_mesh else collectives.checked_group(group)
    if not by_mesh:
        input = collectives.waited(input)
    try:
        _check_shapes(input, linear_weight, linear_bias)
        if by_mesh:
            _check_count(k, len(linear_weight))
    except Exception:
        refuse(group, input)
        raise
    plan = None
    if by_mesh:
        # A number for each row, placed as the rows are.
        of_rows = input.detach().new_zeros(input.shape[:-1]) if not placements.is_dtensor(input) else input[..., 0]
        plan = placements.plan_linear(input, linear_weight, of_rows, linear_bias, False)
        layout = plan.layout
        x, w, b = (placements.local(tensor) for tensor in (input, linear_weight, linear_bias))
    else:
        x, w, b = input, linear_weight, linear_bias
        same, look = (options, k, x.shape, x.dtype, chunking), choice.may_look(x)
        rows = x.shape[:-1].numel()
        layout = collectives.agreed_layout(group, len(w), rows, device=x.device, same=same, labels=None, look=look)
        if look:
            _check_count(k, int(layout.classes))
    lead = x.shape[:-1]
    x = x.reshape(lead.numel(), x.shape[-1])
    best = _best_of_part(x, w, b, min(k, len(w)), _call(x, options, chunking))
    if layout.class_group is not None:
        best = _best_of_ranks(best, k, layout)
    log_probs, ids = best.log_probs(best.lse, options), best.ids
    ids = ids.masked_fill(ids == _NO_CLASS, -1)
    results = [result.view(*lead, k) for result in (log_probs, ids)]
    return TopKLogProbs(*(results if plan is None else [plan.placed(result) for result in results]))


def _best_of_ranks(best: _Best, k: int, layout: collectives.Layout) -> _Best:
    """Return the best classes of all ranks, each of which has its own best ones."""
    logits, ids, lse = best
    missing = k - logits.shape[1]  # a rank may have fewer classes
    logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
    ids = torch.nn.functional.pad(ids + layout.start, (0, missing), value=_NO_CLASS)

    def of_all(tensor: Tensor) -> Tensor:  # (rows, ranks · k)
        return gather(tensor, layout.class_group).transpose(0, 1).flatten(1)

    for start in range(0, len(lse), _ROWS_AT_A_TIME):
        at = slice(start, start + _ROWS_AT_A_TIME)
        logits[at], ids[at] = _ordered(of_all(logits[at]), of_all(ids[at]), k)
    return _Best(logits, ids, gather(lse, layout.class_group).logsumexp(0))


# --------------------------------------------------------------------------------------------------------- compilers


@torch.library.custom_op(
    "fastloss::linear_topk_log_probs",
    mutates_args=(),
    schema=(
        "(Tensor input, Tensor linear_weight, Tensor? linear_bias, SymInt k, float? softcap, SymInt? chunk_size, "
        f"SymInt? memory_budget, ScalarType compute_dtype, {NUMBERS}) -> (Tensor, Tensor)"
    ),
)
def topk_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    k: int,
    softcap: float | None,
    chunk_size: int | None,
    memory_budget: int | None,
    compute_dtype_: torch.dtype,
    *numbers: Any,
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities and classes of rows ``(rows, D)``. The arguments are checked."""
    options = unpacked((-100, 0.0, "none", 0.0, softcap, (), True), filled(numbers, 0)[1])
    call = LinearOptions(options, compute_dtype_, compute_dtype(compute_dtype_), chunk_size, memory_budget)
    with forgetful():
        best = _best_of_part(input, linear_weight, linear_bias, k, call)
    return best.log_probs(best.lse, options), best.ids


@topk_log_probs.register_fake
def _(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, k: int, *options: Any
) -> tuple[Tensor, Tensor]:
    shape = (input.shape[0], k)
    return input.new_empty(shape, dtype=compute_dtype(options[3])), input.new_empty(shape, dtype=torch.int64)
