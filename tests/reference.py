"""The float64 reference, written apart from the package, and the rule by which errors are judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Options that torch's operator lacks, alone and together.
NOT_IN_TORCH: list[dict[str, float]] = [
    {"lse_square_scale": 0.01},
    {"softcap": 5.0},
    {"lse_square_scale": 0.1, "softcap": 2.0, "label_smoothing": 0.2},
]


def weighted_and_smoothed(test: Any) -> Any:
    """Run a test with and without class weights and smoothing, for each reduction, in each dtype but bfloat16."""
    for name, values, ids in (
        ("reduction", ["mean", "sum", "none"], None),
        ("weighted", [False, True], None),
        ("label_smoothing", [0.0, 0.1, 1.0], None),
        ("dtype", [torch.float32, torch.float64, torch.float16], str),
    ):
        test = pytest.mark.parametrize(name, values, ids=ids)(test)
    return test


def loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """The loss by torch's own operator (and its own dtype), with the terms and options that torch does not have."""
    z = logits_of(input, softcap, logit_scale, temperature)
    target = target.long()
    result = F.cross_entropy(
        z, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if lse_square_scale:
        dim = 1 if z.dim() > 1 else 0
        counted = target != ignore_index
        row_weight = torch.ones_like(target, dtype=z.dtype)
        if weight is not None:
            row_weight = weight[torch.where(counted, target, 0)]
        row_weight = torch.where(counted, row_weight, 0.0)
        squares = lse_square_scale * torch.where(counted, torch.logsumexp(z, dim) ** 2 * row_weight, 0.0)
        if reduction == "none":
            result = result + squares
        elif reduction == "sum":
            result = result + squares.sum()
        else:
            result = result + squares.sum() / row_weight.sum()
    return result


def logits_of(
    input: Tensor, softcap: float | None = None, logit_scale: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """z = softcap(logit_scale · input) / temperature."""
    x = input if logit_scale == 1.0 else input * logit_scale
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    return z if temperature == 1.0 else z / temperature


def projected(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, shift: int = 0
) -> tuple[Tensor, Tensor]:
    """The logits of all tokens that have a label ``shift`` positions on, and the labels."""
    if shift:
        input, target = input[..., :-shift, :], target[..., shift:]
    return F.linear(input, linear_weight, linear_bias), target


def of_map(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of :func:`projected` out of all options."""
    return {name: options.pop(name) for name in ("linear_bias", "shift") if name in options}


def rank(row: Tensor, label: int) -> int:
    """How many classes stand before the label, by sorting: greater first, NaN greatest, then the lower index."""
    values = row.double().tolist()
    order = sorted(
        range(len(values)), key=lambda c: (values[c] == values[c], -values[c] if values[c] == values[c] else 0, c)
    )
    return order.index(label)


def accuracy(input: Tensor, target: Tensor, k: int, ignore_index: int = -100) -> float:
    """The share of counted rows whose rank is below k; NaN if none counts."""
    rows = input.reshape(1, -1) if input.dim() == 1 else input.movedim(1, -1).reshape(-1, input.shape[1])
    labels = target.reshape(-1).tolist()
    counted = [i for i, label in enumerate(labels) if label != ignore_index]
    right = sum(rank(rows[i], labels[i]) < k for i in counted)
    return right / len(counted) if counted else float("nan")


def value_and_gradient(
    function: Callable[..., Tensor],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    upstream: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of ``input``, for an upstream gradient."""
    x = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    result = function(x, target, weight, **options)
    (gradient,) = torch.autograd.grad(result, x, upstream.to(result.dtype).expand_as(result))
    return result.detach(), gradient


def exact_value_and_gradient(
    input: Tensor, target: Tensor, weight: Tensor | None, upstream: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The same of :func:`loss` in float64."""
    wide = None if weight is None else weight.double()
    return value_and_gradient(loss, input.double(), target, wide, upstream.double(), **options)


def trained(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], options: dict[str, Any]
) -> tuple[torch.optim.SGD, list[float]]:
    """Train by torch's optimizer; return that, and the norms of the gradients if ``options`` have a ``max_norm``."""
    options = dict(options)
    max_norm = options.pop("max_norm", None)
    optimizer = torch.optim.SGD(model.parameters(), **options)
    norms = []
    for input, target in batches:
        optimizer.zero_grad()
        F.mse_loss(model(input), target).backward()
        if max_norm is not None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
    return optimizer, norms


def assert_no_worse(
    ours: Tensor, theirs: Tensor, exact: Tensor, what: str, ulps: float = 1.0, cancelled: float = 0.0
) -> None:
    """Our largest error is at most theirs, plus one unit in the last place of the largest value.

    float64 has nothing more exact to be held against here: there the two may differ by a few units. ``cancelled`` is
    what float32 arithmetic may lose where the result is a small difference of numbers that are not small.
    """
    assert ours.dtype == theirs.dtype, f"{what}: dtype {ours.dtype}, torch has {theirs.dtype}"
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, torch has {tuple(theirs.shape)}"
    ours, theirs, exact = ours.cpu(), theirs.cpu(), exact.cpu()
    kind = torch.finfo(ours.dtype)
    exact = torch.where(exact.abs() >= kind.max * (1 + kind.eps / 4), exact.sign() * torch.inf, exact)  # as it rounds
    special = ~exact.isfinite()
    assert torch.equal(ours[special].double().nan_to_num(7), exact[special].nan_to_num(7)), f"{what}: NaN or infinity"
    ours, theirs, exact = ours[~special], theirs[~special], exact[~special]
    if not ours.numel():
        return
    unit = torch.finfo(ours.dtype).eps * max(float(exact.abs().max()), torch.finfo(ours.dtype).tiny)
    if ours.dtype == torch.float64:
        ulps, unit = 128.0, max(unit, torch.finfo(torch.float64).eps / 16)
    limit = float((theirs.double() - exact).abs().nan_to_num(0).max()) + ulps * unit + cancelled
    error = float((ours.double() - exact).abs().max())
    assert error <= limit, f"{what}: error {error:.3e}, torch's plus {ulps} ulp {limit:.3e}"
