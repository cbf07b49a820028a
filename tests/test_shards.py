"""What both backends give for a shard of the classes: ranks of labels elsewhere, and soft targets' numbers.

How shards make a whole, ``test_parallel.py`` shows.
"""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from places import Place
from torch import Tensor

from fastloss.backends import choice
from fastloss.backends.contract import ExternalLabel, LossInputs, LossOptions, WantedGradients, WantedNumbers

# (outer, classes, inner): several rows a program, one in registers, one block by block, rows that are neighbours.
SHAPES = [(7, 37, 1), (2, 1000, 1), (2, 8200, 1), (3, 20, 5), (2, 130, 70)]


def served(place: Place) -> Any:
    return choice.load(choice.choose(torch.empty(1, device=place.device)))


def labels(logits: Tensor, place: Place, most_k: int) -> ExternalLabel:
    """In every row another place: before the shard, in it, behind it."""
    outer, classes, inner = logits.shape
    rows = outer * inner
    position = torch.randint(0, classes + 1, (rows,))
    position[0], position[-1] = classes, 0
    score = torch.randn(rows).mul(2).round().div(2).to(logits.dtype).double()
    flat = logits.movedim(1, -1).reshape(rows, classes).double().cpu()
    own = flat.gather(1, position.clamp(max=classes - 1)[:, None])[:, 0]
    score = torch.where((position > 0) & (position < classes), own, score)
    score[1] = torch.nan  # in a row of its own, whose label stands somewhere
    return ExternalLabel(score.to(place.device), position.to(place.device), most_k)


def ranks(logits: Tensor, label: ExternalLabel) -> Tensor:
    """By definition."""
    outer, classes, inner = logits.shape
    x, (mine, position) = logits.double(), (each.view(outer, 1, inner) for each in label[:2])
    nan, mine_nan, lower = x.isnan(), mine.isnan(), torch.arange(classes, device=x.device).view(1, -1, 1) < position
    before = (~mine_nan & (nan | (x > mine))) | (lower & ((x == mine) | (nan & mine_nan)))
    return before.sum(1).flatten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ranks_of_labels_elsewhere(place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Ties, NaN and infinities; alone, beside the numbers of labels, and beside those of soft targets."""
    x = torch.randn(shape).mul(2).round().div(2).to(place.device, dtype)
    x[0, 3, 0], x[0, 5, 0], x[-1, 2, -1] = torch.nan, -torch.inf, torch.inf
    backend = served(place)
    for most_k in (shape[1] + 1, 3):
        label = labels(x, place, most_k)
        expected = ranks(x, label)
        target = torch.zeros(len(expected), dtype=torch.int64, device=place.device)
        parts = backend.row_statistics_forward(LossInputs(x, target, None, LossOptions()), WantedNumbers(), label)
        soft = backend.soft_statistics_forward(LossInputs(x, torch.ones_like(x), None, LossOptions()), ranked=label)
        for found in (backend.label_ranks(x, label), parts.rank, soft.rank):
            assert found.dtype == torch.int64
            assert torch.equal(found < most_k, expected < most_k)
            assert torch.equal(found[found < most_k], expected[found < most_k])


def numbers(
    x: Tensor, t: Tensor, weight: Tensor | None, options: LossOptions, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """lse, nll, mass and Σ w z by torch's operators."""
    z, t = x.to(dtype), t.to(dtype)
    z = z * options.logit_scale
    z = (z if options.softcap is None else options.softcap * torch.tanh(z / options.softcap)) / options.temperature
    w = torch.ones(x.shape[1], dtype=dtype, device=x.device) if weight is None else weight.to(dtype)
    w = w.view(1, -1, 1)
    log_p = torch.log_softmax(z, 1)
    results = [torch.logsumexp(z, 1), -(w * t * log_p).sum(1), (w * t).sum(1)]
    results += [(w * z).sum(1)] if options.label_smoothing else []
    return [result.flatten() for result in results]


SOFT = [
    (False, LossOptions()),
    (True, LossOptions(label_smoothing=0.1)),
    (True, LossOptions(label_smoothing=0.1, softcap=3.0)),
    (True, LossOptions(label_smoothing=0.1, logit_scale=0.3, temperature=0.7)),
    (False, LossOptions(softcap=3.0, logit_scale=0.3, temperature=0.7)),
]


def of_each_kind(test: Any) -> Any:
    for names, values, ids in (
        ("dtype", [torch.float32, torch.float64, torch.float16], str),
        ("shape", SHAPES, str),
        (("weighted", "options"), SOFT, ["plain", "weighted", "all", "scaled", "scaled cap"]),
    ):
        test = pytest.mark.parametrize(names, values, ids=ids)(test)
    return test


@of_each_kind
def test_numbers_of_soft_targets(
    place: Place, shape: tuple[int, ...], dtype: torch.dtype, weighted: bool, options: LossOptions
) -> None:
    """Values and gradients no worse than torch's operators in the dtype of the arithmetic; in place too."""
    x = (3 * torch.randn(shape)).to(place.device, dtype)
    t = torch.softmax(4 * torch.randn(shape), 1).to(place.device, dtype)
    weight = (torch.rand(shape[1]) + 0.5).to(place.device, dtype) if weighted else None
    backend, arithmetic = served(place), torch.promote_types(dtype, torch.float32)
    found = backend.soft_statistics_forward(LossInputs(x, t, weight, options))
    exact, theirs = (numbers(x, t, weight, options, d) for d in (torch.float64, arithmetic))
    whole = list(found[:3])
    if options.label_smoothing:  # what a loss makes of it, Σ w (lse − z), which has no cancellation
        total = shape[1] if weight is None else weight.double().sum()
        whole.append(total * found.lse - found.weighted_sum)
        exact[3] = total * exact[0] - exact[3]
        theirs[3] = numbers(x, (t * 0 + 1), weight, options, arithmetic)[1]
    for name, mine, other, truth in zip(("lse", "nll", "mass", "spread"), whole, theirs, exact, strict=False):
        assert mine.dtype == torch.float64
        reference.assert_no_worse(mine.to(arithmetic), other, truth, name, ulps=4.0)

    upstreams = [torch.randn(len(exact[0]), dtype=torch.float64, device=place.device) for _ in exact]
    gradients = []
    for d in (torch.float64, arithmetic):
        wide = [each.to(d).requires_grad_() for each in (x, t)]
        gradients.append(torch.autograd.grad(numbers(*wide, weight, options, d), wide, [u.to(d) for u in upstreams]))
    given = upstreams if options.label_smoothing else [*upstreams, None]
    for inplace in (False, True):
        logits = x.clone()
        of_input, of_target = backend.soft_statistics_backward(
            *(given, LossInputs(logits, t, weight, options), found.lse, found.mass),
            WantedGradients(True, True, inplace),
        )
        assert (of_input.data_ptr() == logits.data_ptr()) == inplace
        for name, mine, truth, other in zip(("input", "target"), (of_input, of_target), *gradients, strict=True):
            reference.assert_no_worse(mine, other.to(dtype), truth, f"gradient of the {name}", ulps=4.0)


@of_each_kind
def test_numbers_of_labels(
    place: Place, shape: tuple[int, ...], dtype: torch.dtype, weighted: bool, options: LossOptions
) -> None:
    """The same of class indices. Away from 0: what Σ w z is summed relative to has to be given back."""
    x = (3 * torch.randn(shape) + 5).to(place.device, dtype)
    weight = (torch.rand(shape[1]) + 0.5).to(place.device, dtype) if weighted else None
    target = torch.randint(shape[1], (shape[0] * shape[2],), device=place.device)
    found = served(place).row_statistics_forward(LossInputs(x, target, weight, options), WantedNumbers())
    arithmetic = torch.promote_types(dtype, torch.float32)
    hot = torch.zeros_like(x).scatter_(1, target.view(shape[0], 1, shape[2]), 1.0)
    total = shape[1] if weight is None else weight.double().sum()
    cases = [("lse", found.lse, hot, None, 0), ("nll", found.lse - found.label_logit, hot, None, 1)]
    if options.label_smoothing:
        assert found.weighted_sum is not None
        cases.append(("spread", total * found.lse - found.weighted_sum, torch.ones_like(x), weight, 1))
    for name, mine, t, w, at in cases:
        exact, theirs = (numbers(x, t, w, options, d)[at] for d in (torch.float64, arithmetic))
        assert mine.dtype == torch.float64
        # Σ w (z − z_y) is a sum in float32, of numbers as large as z_y is far from the others.
        reference.assert_no_worse(mine.to(arithmetic), theirs, exact, name, ulps=32.0 if name == "spread" else 4.0)


def test_gradients_that_are_not_asked_for(place: Place) -> None:
    x, t = torch.randn(4, 20, 1, device=place.device), torch.rand(4, 20, 1, device=place.device)
    backend, inputs = served(place), LossInputs(x, t, None, LossOptions())
    found = backend.soft_statistics_forward(inputs)
    one = torch.ones(4, dtype=torch.float64, device=place.device)
    upstreams = (None, one, None, None)
    arguments = (upstreams, inputs, found.lse, found.mass)
    both = backend.soft_statistics_backward(*arguments, WantedGradients(True, True))
    first = backend.soft_statistics_backward(*arguments, WantedGradients(True, False))
    second = backend.soft_statistics_backward(*arguments, WantedGradients(False, True))
    assert first[1] is None
    assert second[0] is None
    assert torch.equal(first[0], both[0])
    assert torch.equal(second[1], both[1])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_gradient_of_labels_over_the_logits(place: Place, softcap: float | None) -> None:
    """In place it is the same, bit for bit."""
    x, target = torch.randn(3, 8200, 1, device=place.device), torch.tensor([1, 8199, 7], device=place.device)
    backend, options = served(place), LossOptions(label_smoothing=0.1, softcap=softcap)
    inputs = LossInputs(x, target, None, options)
    found = backend.row_statistics_forward(inputs, WantedNumbers())
    upstreams = tuple(torch.randn(3, dtype=torch.float64, device=place.device) for _ in range(3))
    arguments = ((*upstreams[:2], None, upstreams[2]), inputs, (found.lse, None, None))
    apart = backend.row_statistics_backward(*arguments, inplace=False)
    over = backend.row_statistics_backward(*arguments, inplace=True)
    assert over.data_ptr() == x.data_ptr()
    assert torch.equal(over, apart)
