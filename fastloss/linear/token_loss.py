"""Losses that are sums over tokens of a function of log p and the entropy, from hidden states in three products."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..backends import choice
from ..backends.contract import WantedParts, compute_dtype
from ..backends.torch_private import disable_dynamo
from ..loss.row_numbers import total_weight
from ..loss.sharded import checked
from ..ranks import placements
from ..ranks.collectives import all_reduce, all_reduce_detached
from .arguments import Arguments, check_shapes, checked_arguments, of_rows
from .autograd import by_chunks
from .chunks import logits_of, of_counted
from .functional import prepared
from .row_numbers import RowVisitor, TokenLosses
from .sharded import part_of_rank

__all__ = ["TokenLoss", "linear_token_loss"]


class TokenLoss(NamedTuple):
    """The result of :func:`linear_token_loss`."""

    loss: Tensor
    log_probs: Tensor
    entropy: Tensor | None


def linear_token_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    token_loss: Callable[..., Tensor],
    *token_inputs: Tensor,
    entropy: bool = False,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    softcap: float | None = None,
    shift: bool | int = False,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    skip_ignored: bool | None = None,
    accumulate_grad: bool = False,
    logits_dtype: torch.dtype | None = None,
    group: Any = None,
    logit_scale: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
) -> TokenLoss:
    r"""Compute a loss of each token, a function of its log-probability and entropy, without the logits.

    With z = softcap(logit_scale · ``linear(input, linear_weight, linear_bias)``) / temperature, p its softmax and y
    the labels, the loss is

        reduce over the tokens that count:  token_loss(log p_y, H, *token_inputs),   H = −Σ_c p_c log p_c

    as the losses of GRPO, PPO, dynamic fine-tuning and penalties of KL are. ``token_loss`` is called once a chunk, in
    the forward pass. Its derivative, two numbers a token, makes the gradient of the chunk's logits in the same visit,
    so that forward and backward are three products, as of :func:`linear_cross_entropy`.

    Args:
        input, linear_weight, target, linear_bias: as in :func:`linear_cross_entropy`; ``target`` is class indices.
        token_loss: called as ``token_loss(log_probs, entropy, *token_inputs)`` with the n tokens of a chunk, ``(n,)``
            each; ``entropy`` is None unless it is asked for. It returns a loss for each of them, ``(n,)``, by torch's
            operators, and writes to none of its arguments. A token's loss may depend on its own numbers alone: a mean
            over tokens, or over a sequence, is none of a chunk, and changes with the chunks. (On a CPU a function
            that mixes the log-probabilities of tokens is refused; elsewhere with ``FASTLOSS_VALIDATE=1``, which also
            finds mixtures of token inputs and of what is detached: in the first chunk it calls the function for
            tokens beside other ones too. Functions with randomness or a state, and those that take no other number of
            tokens, are not compared; nor is anything where a compiler or a transform sees all tokens at once.)
            Tensors that require grad are refused: nothing but ``log_probs`` and ``entropy`` gets a gradient. Tokens
            that are ignored may be among them, with a log-probability of 0; their losses are not used.
        token_inputs: constants of each token, in ``target``'s shape: advantages, old log-probabilities, a mask.
            Divide a mask by its sum before the call: within, the sum is that of a chunk. With ``shift`` they stand
            where the labels stand, and are moved with them; those of the result's shape are taken as they are.
        entropy: compute H too.
        reduction: of the losses of tokens: ``"mean"`` over those that count, ``"sum"``, or ``"none"``. For a mean
            over sequences give each token its weight in a token input, and take ``"sum"``.
        ignore_index: a label whose tokens do not count.
        softcap, shift, chunk_size, memory_budget, skip_ignored, accumulate_grad, logits_dtype, group, logit_scale,
        temperature: as in :func:`linear_cross_entropy`. Beside ``group`` the token inputs are the same on every rank.

    Where the gradient can't be written in the forward pass (float16, whose loss scale comes in backward; reduction
    "none"; ``accumulate_grad``), the backward pass computes the logits once more: four products. ``token_loss`` is
    called in the forward pass all the same, and not again.

    Returns:
        ``(loss, log_probs, entropy)``, a NamedTuple, in float32 (float64 for float64 logits). ``loss`` alone has a
        graph. The others have the labels' shape (without the last ``shift`` positions), and are 0 where a token is
        ignored; ``entropy`` is None unless it is asked for.

    Raises:
        TypeError, ValueError, RuntimeError: arguments that don't fit, as in :func:`linear_cross_entropy`; a
            ``token_loss`` that returns something else, mixes tokens, or uses tensors that require grad.

    Example:
        >>> import torch
        >>> hidden = torch.tensor([[1.0, 2.0], [0.5, -1.0]], requires_grad=True)
        >>> head = torch.tensor([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6]], requires_grad=True)
        >>> old, advantages = torch.tensor([-0.7, -0.5]), torch.tensor([1.0, -2.0])
        >>> def clipped(log_probs, entropy, old, advantages):  # PPO
        ...     ratio = (log_probs - old).exp()
        ...     return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        >>> result = linear_token_loss(hidden, head, torch.tensor([2, 1]), clipped, old, advantages)
        >>> result.loss, result.log_probs
        (tensor(0.4709, grad_fn=<_LinearCrossEntropyBackward>), tensor([-0.7514, -0.5557]))
        >>> result.loss.backward()
    """
    if checks.is_symbolic(input, linear_weight, target):
        raise TypeError(
            "fastloss: linear_token_loss in torch.fx.symbolic_trace, whose graphs hold no function as token_loss is; "
            "torch.compile and torch.export trace it, or mark the function that calls it with torch.fx.wrap"
        )
    terms, scales = (ignore_index, reduction), (softcap, logit_scale, temperature)
    chunking = chunk_size, memory_budget, shift, skip_ignored, accumulate_grad, logits_dtype
    arguments = checked_arguments(group, (input, linear_weight, target, linear_bias, None), terms, scales, chunking)
    checked(group, input, checks.check_switches, entropy=entropy)
    checked(group, input, _check, arguments, token_loss, token_inputs)
    wanted = WantedParts(False, False, entropy, False, False)
    if group is not None or any(map(placements.is_uncompiled_dtensor, (input, linear_weight))):
        return TokenLoss(*_over_ranks(arguments, wanted, token_loss, token_inputs, group))
    check_shapes(arguments, whole=True)
    tensors, _, call, lead, composed = prepared(arguments)
    backend = None if composed else choice.load(choice.choose(input))
    losses = TokenLosses(
        dataclasses.replace(call, loss_dtype=compute_dtype(call.compute_dtype)),
        RowVisitor(None, call.options, backend, wanted, every_row=False),
        token_loss,
        [_flat(each, tuple(target.shape), arguments.shift) for each in token_inputs],
        trained=torch.is_grad_enabled() and any(tensors.needs()),
        classes=len(linear_weight),
    )
    if composed:
        tensors = tensors._replace(input=of_counted(tensors.input, losses.counted(tensors.target)))
        outputs = losses.outputs_of_logits(logits_of(tensors, call), tensors.target)
    else:
        outputs = by_chunks(tensors, losses)
    return _result([of_rows(output, lead, arguments.shift) for output in outputs])


def _result(outputs: list[Tensor]) -> TokenLoss:
    return TokenLoss(outputs[0], outputs[1], outputs[2] if len(outputs) > 2 else None)


def _check(arguments: Arguments, token_loss: object, token_inputs: tuple[object, ...]) -> None:
    """Check what :func:`linear_cross_entropy` does not refuse."""
    input, linear_weight, target = arguments[:3]
    if not callable(token_loss):
        raise TypeError(
            f"fastloss: token_loss is {token_loss!r}; expected a function of (log_probs, entropy, *token_inputs)"
        )
    if not torch.compiler.is_compiling():
        _check_signature(token_loss, len(token_inputs))
    if not isinstance(target, Tensor) or not isinstance(linear_weight, Tensor) or not isinstance(input, Tensor):
        return  # later checks name it
    if linear_weight.dim() > 2:
        raise ValueError(
            f"fastloss: linear_weight has shape {tuple(linear_weight.shape)}, torch's K-dimensional loss; "
            "expected (C, D) beside a token_loss"
        )
    if target.is_floating_point():
        raise ValueError(
            f"fastloss: target has dtype {target.dtype}; expected class indices in int64, int32 or uint8 beside a "
            "token_loss, whose log_probs are theirs"
        )
    shapes = [tuple(target.shape)]
    if arguments.shift and target.dim():
        shapes.append((*target.shape[:-1], max(target.shape[-1] - arguments.shift, 0)))
    for number, each in enumerate(token_inputs):
        if not isinstance(each, Tensor):
            raise TypeError(
                f"fastloss: token input {number} is a {type(each).__name__}; expected a Tensor of target's shape "
                f"{shapes[0]} (a constant of all tokens belongs into token_loss itself)"
            )
        if tuple(each.shape) not in shapes:
            raise ValueError(
                f"fastloss: token input {number} has shape {tuple(each.shape)}; expected "
                f"{' or '.join(map(str, shapes))}, a number for each label"
            )
        if each.device != input.device:
            raise RuntimeError(
                f"fastloss: token input {number} is on {each.device}; expected {input.device}, where input is"
            )
        if each.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"fastloss: token input {number} requires grad, and gets none: detach() it, or use "
                "linear_cross_entropy_with_statistics, whose parts take any upstream gradient"
            )


def _check_signature(token_loss: Callable[..., Tensor], token_inputs: int) -> None:
    """Check that the function takes its arguments, where Python knows which it takes."""
    try:
        signature = inspect.signature(token_loss)
    except (TypeError, ValueError):  # of a builtin
        return
    try:
        signature.bind(*[None] * (2 + token_inputs))
    except TypeError as error:
        raise TypeError(
            f"fastloss: token_loss takes {signature}; it is called with log_probs, entropy (or None) and "
            f"{token_inputs} token inputs: {error}"
        ) from error


def _flat(each: Tensor, shape: tuple[int, ...], shift: int) -> Tensor:
    """Return a token input as ``(rows,)``, moved as the labels are."""
    if shift:
        moved = each[..., shift:] if tuple(each.shape) == shape else each
        each = F.pad(moved, (0, shape[-1] - moved.shape[-1]))
    return each.reshape(-1)


@disable_dynamo
def _over_ranks(
    arguments: Arguments,
    wanted: WantedParts,
    token_loss: Callable[..., Tensor],
    token_inputs: tuple[Tensor, ...],
    group: Any,
) -> TokenLoss:
    """Return the result over DTensors, or over a group's shards of the classes."""
    part = part_of_rank(arguments, group, (wanted, len(token_inputs)))
    if part.plan is not None:
        token_inputs = tuple(
            part.plan.of_this_rank(each, f"token input {number}") for number, each in enumerate(token_inputs)
        )
    tensors, options, total = part.replicated_map(), part.call.options, None
    if options.reduction == "mean":
        total = all_reduce_detached(total_weight(tensors.target, None, options), part.layout.row_groups)
    dtype = compute_dtype(part.call.compute_dtype)
    losses = TokenLosses(
        dataclasses.replace(part.call, total=total, loss_dtype=torch.float64 if options.is_reduced else dtype),
        part.visitor(wanted, every_row=False),
        token_loss,
        [_flat(each, part.lead, arguments.shift) for each in token_inputs],
        trained=torch.is_grad_enabled() and any(tensors.needs()),
        classes=part.layout.classes,
    )
    loss, *numbers = by_chunks(tensors, losses)
    if options.is_reduced:
        loss = all_reduce(loss, part.layout.row_groups).to(dtype)
    return _result([part.placed(output, arguments.shift) for output in (loss, *numbers)])
