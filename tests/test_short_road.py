"""The short road: calls that are like earlier ones have the long road's results, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import Place
from test_launch import without_gpu
from torch import Tensor

import fastloss
from fastloss.backends import choice, short_road
from fastloss.backends.contract import WantedParts

pytestmark = pytest.mark.skipif(choice.triton_version() is None, reason="needs Triton")

Loss = Callable[[Tensor, Tensor], Any]
ROWS, CLASSES = 6, 40


@pytest.fixture(autouse=True)
def open_road(kernels: Place) -> Iterator[Place]:
    """Nothing is known at first."""
    choice.load("triton")
    short_road.known.clear()
    yield kernels
    short_road.known.clear()


def replayed() -> list[Any]:
    """Return what keys of replayed calls have in common."""
    return [call for call in short_road.known.values() if call.forward is not None]


def logits(place: Place, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(ROWS, CLASSES, device=place.device).to(dtype)


def labels(place: Place) -> Tensor:
    return torch.randint(CLASSES, (ROWS,), device=place.device)


def results(loss: Loss, x: Tensor, target: Tensor, *, behind: bool = False) -> list[Tensor | None]:
    """Return what a call returns, and the gradients of both tensors at an upstream gradient of 2."""
    tensors = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in (x, target)]
    outcome = loss(tensors[0] * 1 if behind else tensors[0], tensors[1])
    flat = [
        value
        for part in (outcome if isinstance(outcome, tuple) else (outcome,))
        for value in (part if isinstance(part, tuple) else (part,))
    ]
    if flat[0].requires_grad:
        (flat[0] * 2).sum().backward()
    return [*(value.detach() for value in flat), *(tensor.grad for tensor in tensors)]


def by_the_long_road(loss: Loss, x: Tensor, target: Tensor, **options: Any) -> list[Tensor | None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLOSS_SHORT_ROAD", "0")
        return results(loss, x, target, **options)


def same(one: list[Any], other: list[Any]) -> bool:
    """Return True if the tensors are equal in shape, dtype and every bit; NaN equals NaN."""
    return len(one) == len(other) and all(
        (a is None and b is None)
        or (a.dtype is b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()))
        for a, b in zip(one, other, strict=True)
    )


def test_pairs_of_calls_that_differ_in_one_thing(tmp_path: Path) -> None:
    """Each starts what it starts in a package that has forgotten everything, and every entry of the key is needed."""
    assert "entries of the key" in without_gpu(tmp_path, "tests.short_roads")


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path: Path) -> None:
    """Over 10⁵ calls of changing shapes."""
    assert "calls of" in without_gpu(tmp_path, "tests.short_roads", "100000")


SOFT_CALLS = {"soft": {}, "soft, probabilities": {"from_logits": False}, "soft, smoothed": {"label_smoothing": 0.1}}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum", "softcap": 3.0},
    "none": {"reduction": "none", "lse_square_scale": 0.1},
    "smoothed": {"label_smoothing": 0.1, "ignore_index": 7},
    "inplace": {"inplace": True},
    **SOFT_CALLS,
}


@pytest.mark.parametrize("topk", [None, 1, (1, 3)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(CALLS))
def test_a_replayed_call_has_the_bits_of_a_recorded_one(
    kernels: Place, name: str, dtype: torch.dtype, weighted: bool, topk: Any
) -> None:
    """Each call has new numbers."""
    soft, options = name in SOFT_CALLS, CALLS[name]
    weight = torch.rand(CLASSES, device=kernels.device).to(dtype) if weighted else None

    def loss(x: Tensor, y: Tensor) -> Any:
        if topk is None:
            return fastloss.cross_entropy(x, y, weight, **options)
        return fastloss.cross_entropy_with_accuracy(x, y, weight, topk=topk, **options)

    for number in range(4):
        x, target = logits(kernels, dtype), labels(kernels)
        if soft:
            x = x.softmax(1) if "probabilities" in name else x
            target = logits(kernels, dtype).softmax(1)
        expected = by_the_long_road(loss, x, target, behind=name == "inplace")
        assert same(results(loss, x, target, behind=name == "inplace"), expected), number
    assert len(replayed()) == (0 if soft and topk else 1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(ROWS, CLASSES), (2, CLASSES, 3), (CLASSES,)], ids=str)
def test_statistics_are_replayed(kernels: Place, shape: tuple[int, ...], reduction: str) -> None:
    """At upstream gradients of the loss, of all parts, of sums and means of them."""
    names = WantedParts._fields
    weight = torch.rand(CLASSES, device=kernels.device) if len(shape) > 2 else None
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1, "lse_square_scale": 0.1}
    options |= dict.fromkeys(names, True)
    totals: list[Callable[[Any], Any]] = [
        lambda parts: parts.loss.sum(),
        lambda parts: (parts.loss * 2).sum() + parts.z_loss.sum() + (parts.lse * parts.entropy).mean(),
        lambda parts: parts.entropy.sum() + parts.lse.sum(),
        lambda parts: parts.log_sum_sq_probs.sum() - (parts.mean_logit * parts.lse).sum(),
    ]

    def values_and_gradients(x: Tensor, y: Tensor) -> list[Any]:
        with torch.no_grad():
            values = [*fastloss.cross_entropy_with_statistics(x, y, weight, **options)[: 1 + len(names)]]
        for total in totals:
            x = x.detach().requires_grad_()
            parts = fastloss.cross_entropy_with_statistics(x, y, weight, **options)
            values += [*parts[: 1 + len(names)], *torch.autograd.grad(total(parts), x)]
        return values

    for _ in range(3):
        x, y = torch.randn(shape, device=kernels.device), torch.randint(CLASSES, shape[:1] + shape[2:])
        y = (y if len(shape) > 1 else y[0]).to(kernels.device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTLOSS_SHORT_ROAD", "0")
            expected = values_and_gradients(x, y)
        assert same(values_and_gradients(x, y), expected)
    assert [len(call.texts) for call in replayed()] == [1, 5]  # a pass forward; one, and four kinds back


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("topk", [1, (1, 3)])
def test_accuracy_is_replayed(kernels: Place, topk: Any, reduction: str) -> None:
    def accuracy(x: Tensor, y: Tensor) -> Any:
        return fastloss.accuracy(x.detach(), y, topk, reduction=reduction)

    for _ in range(4):
        x, y = logits(kernels), labels(kernels)
        assert same(results(accuracy, x, y), by_the_long_road(accuracy, x, y))
    assert len(replayed()) == 1


def replayed_loss(place: Place, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, labels and a loss of them that is replayed, and whose backward pass has been before."""
    for _ in range(4):
        x, y = logits(place).requires_grad_(), labels(place)
        loss = fastloss.cross_entropy(x, y, **options)
        loss.sum().backward(retain_graph=True)
        x.grad = None
    assert len(replayed()) == 1
    return x, y, loss


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_that_come_again(kernels: Place, reduction: str) -> None:
    """``retain_graph``, second derivatives, and a graph that is used up."""
    x, y, loss = replayed_loss(kernels, reduction=reduction)
    x64 = x.detach().double().requires_grad_()
    loss64 = torch.nn.functional.cross_entropy(x64, y, reduction=reduction)
    expected = torch.autograd.grad(loss64.sum(), x64, create_graph=True)[0]
    for _ in range(2):
        (again,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
        torch.testing.assert_close(again.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    (first,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    v = torch.randn_like(x)
    (second,) = torch.autograd.grad(first, x, v, retain_graph=True)
    (expected_second,) = torch.autograd.grad(expected, x64, v.double())
    torch.testing.assert_close(second.double(), expected_second, rtol=1e-4, atol=1e-7)
    loss.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.sum().backward()


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"softcap": 3.0}, {"lse_square_scale": 0.1}, {}], ids=str)
def test_derivatives_of_maps(kernels: Place, options: dict[str, Any]) -> None:
    """Whose labels the long road saves in another shape: kept graphs, second derivatives, batched upstreams."""
    for _ in range(4):
        x, y = (
            torch.randn(2, 7, 3, device=kernels.device).requires_grad_(),
            torch.randint(7, (2, 3)).to(kernels.device),
        )
        loss = fastloss.cross_entropy(x, y, **options)
        (first,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first, x, x.detach(), retain_graph=True)
        both = torch.stack([torch.ones_like(loss), 2 * torch.ones_like(loss)])
        (batched,) = torch.autograd.grad(loss, x, both, is_grads_batched=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTLOSS_SHORT_ROAD", "0")
            expected = fastloss.cross_entropy(x, y, **options)
            (expected_first,) = torch.autograd.grad(expected.sum(), x, create_graph=True)
            (expected_second,) = torch.autograd.grad(expected_first, x, x.detach())
        assert same([loss, first, second], [expected, expected_first, expected_second])
        torch.testing.assert_close(batched, torch.stack([first, 2 * first]))
    assert len(replayed()) == 1


def test_options_that_can_be_written_to(kernels: Place) -> None:
    cap, x, y = torch.tensor(3.0), logits(kernels), labels(kernels)
    for value in (3.0, 3.0, 3.0, 1.0):
        cap.fill_(value)
        assert fastloss.cross_entropy(x, y, softcap=cap) == fastloss.cross_entropy(x, y, softcap=value)
    k = torch.tensor(2)
    for value in (2, 2, 2, 9):
        k.fill_(value)
        assert fastloss.accuracy(x, y, (k, 1)) == fastloss.accuracy(x, y, (value, 1))


def test_ints_of_numpy(kernels: Place) -> None:
    for _ in range(4):
        assert isinstance(fastloss.accuracy(logits(kernels), labels(kernels), np.int64(2)), Tensor)


def test_second_derivatives_are_of_the_call_itself(kernels: Place) -> None:
    """Second derivatives of mixed classes read the call's own logits while those of other calls are still there."""
    kept = []
    for _ in range(4):
        x, target = logits(kernels).requires_grad_(), (4 * logits(kernels)).softmax(1)
        loss = fastloss.cross_entropy(x, target)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(first, x, torch.ones_like(x) * x.detach())
        x64 = x.detach().double().requires_grad_()
        loss64 = torch.nn.functional.cross_entropy(x64, target.double())
        (first64,) = torch.autograd.grad(loss64, x64, create_graph=True)
        (second64,) = torch.autograd.grad(first64, x64, x64.detach())
        torch.testing.assert_close(second.double(), second64, rtol=1e-4, atol=1e-7)
        kept.append((x, loss))
    assert len(replayed()) == 1


def test_a_label_out_of_bounds_is_found(kernels: Place) -> None:
    """On a CPU; on a GPU the loss is NaN."""
    replayed_loss(kernels)
    y = labels(kernels)
    y[2] = CLASSES
    for function in (fastloss.cross_entropy, fastloss.accuracy):
        for _ in range(4):
            function(logits(kernels), labels(kernels))
        if kernels.device.type == "cpu":
            with pytest.raises(IndexError, match=r"target\[2\] is 40"):
                function(logits(kernels), y)
        else:
            assert bool(function(logits(kernels), y).isnan())


def test_gradients_of_two_losses_of_one_key_are_their_own(kernels: Place) -> None:
    """A gradient is handed over once, and later calls don't write over it."""
    replayed_loss(kernels)
    both = [(logits(kernels).requires_grad_(), labels(kernels)) for _ in range(2)]
    losses = [fastloss.cross_entropy(x, y) for x, y in both]
    for loss in reversed(losses):
        loss.backward()
    for x, y in both:
        x64 = x.detach().double().requires_grad_()
        torch.nn.functional.cross_entropy(x64, y).backward()
        torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-7)


def test_overwritten_logits_are_noticed(kernels: Place) -> None:
    """``inplace=True`` counts as a write, and autograd raises its own error where the logits are needed."""
    for _ in range(4):
        leaf = logits(kernels).requires_grad_()
        x = leaf * 1
        y = (x * x).sum()
        loss = fastloss.cross_entropy(x, labels(kernels), inplace=True)
        assert x._version == 1
    assert len(replayed()) == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + y).backward()


def test_the_text_of_a_replay_can_be_read(kernels: Place) -> None:
    replayed_loss(kernels)
    (call,) = replayed()
    forward, *backwards = call.texts
    assert forward.startswith("def replay(ctx, a0, a1, a2, stream):")
    assert all(text.startswith("def replay(a0, ") for text in backwards)


def test_few_keys_are_remembered(kernels: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_road, "_MOST_KNOWN", 3)
    for rows in range(1, 9):
        for _ in range(3):
            fastloss.accuracy(torch.randn(rows, CLASSES, device=kernels.device), labels(kernels)[:1].expand(rows))
        assert len(short_road.known) <= 3
