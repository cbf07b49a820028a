"""``accuracy`` and ``cross_entropy_with_accuracy`` over both backends, against ranks found by sorting."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from places import Place
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastloss
from fastloss import Accuracy, LossAndAccuracy, accuracy, cross_entropy, cross_entropy_with_accuracy

KS = (1, 2, 5, 64)


def scores(shape: tuple[int, ...], dtype: torch.dtype, levels: int) -> torch.Tensor:
    """Random scores on few levels, so that ties abound, with some infinities and NaNs."""
    input = torch.randint(levels, shape).to(dtype)
    flat = input.view(-1)
    for value in (float("inf"), -float("inf"), float("nan")):
        flat[torch.randint(flat.numel(), (max(1, flat.numel() // 40),))] = value
    return input


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(30, 5), (12, 70), (9, 300), (3, 6, 8), (2, 80, 3, 2), (7,)], ids=str)
@pytest.mark.parametrize("levels", [2, 50])
def test_ties_nans_and_every_k(place: Place, shape: tuple[int, ...], dtype: torch.dtype, levels: int) -> None:
    input = scores(shape, dtype, levels)
    target = torch.randint(shape[min(1, len(shape) - 1)], shape[:1] + shape[2:] if len(shape) > 1 else ())
    if target.numel() > 2:
        target.view(-1)[2] = -7
    on = place.device
    expected = [reference.accuracy(input, target, k, -7) for k in KS]
    together = accuracy(input.to(on), target.to(on), KS, ignore_index=-7)
    assert [value.item() for value in together] == pytest.approx(expected, abs=1e-6)
    assert all(value.dtype == torch.float32 and value.shape == () for value in together)
    for k, value in zip(KS, together, strict=True):
        assert torch.equal(accuracy(input.to(on), target.to(on), k, ignore_index=-7), value)
    fused = cross_entropy_with_accuracy(input.to(on), target.to(on), topk=KS, ignore_index=-7).accuracy
    assert all(torch.equal(a, b) for a, b in zip(fused, together, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6, 1.0])
@pytest.mark.parametrize("classes", [50, 128, 1000, 1003])
def test_top_1_whatever_share_of_rows_is_right(place: Place, classes: int, share: float, dtype: torch.dtype) -> None:
    """The eager backend takes another road for each."""
    rows = 60 if place.interpreted else 3000
    input = torch.randn(rows, classes).to(dtype)
    target = torch.randint(classes, (rows,))
    right = torch.rand(rows) < share
    input[right, target[right]] = 9.0
    tied = torch.rand(rows) < 0.3
    input[tied, torch.randint(classes, (rows,))[tied]] = 9.0
    value = accuracy(input.to(place.device), target.to(place.device), reduction="sum")
    assert value.item() == (input.double().argmax(1) == target).sum().item()


@pytest.mark.slow(interpreted=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_constant_rows_are_right_only_at_the_first_k_classes(place: Place, dtype: torch.dtype) -> None:
    input = torch.full((300, 300), 0.5, dtype=dtype, device=place.device)
    target = torch.arange(300, device=place.device)
    ones = accuracy(input, target, (1, 3, 100), reduction="sum")
    assert [value.item() for value in ones] == [1, 3, 100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_in_rows_longer_than_a_block(place: Place, dtype: torch.dtype) -> None:
    """Every second logit equals the label's, in the block of the label and in those before and after it."""
    labels = [0, 8191, 8192, 8193, 2 * 8192, 2 * 8192 + 99]
    input = torch.randint(2, (len(labels), 2 * 8192 + 100)).to(dtype)
    target, rows = torch.tensor(labels), torch.arange(len(labels))
    input[rows, target] = 1
    before = torch.arange(input.shape[1]) < target.unsqueeze(1)
    ranks = ((input == 1) & before).sum(1)
    topk = tuple(sorted({k for rank in ranks.tolist() for k in (rank, rank + 1) if k}))
    on = input.to(place.device), target.to(place.device)
    for accuracies in (
        accuracy(*on, topk, reduction="none"),
        cross_entropy_with_accuracy(*on, topk=topk, reduction="none").accuracy,
    ):
        for k, right in zip(topk, accuracies, strict=True):
            assert torch.equal(right.cpu(), (ranks < k).float())


def test_reductions_and_shapes(place: Place) -> None:
    input = torch.randn(4, 6, 5, device=place.device)
    target = torch.randint(6, (4, 5), device=place.device)
    target[0, 0] = 3
    none = accuracy(input, target, (1, 6), ignore_index=3, reduction="none")
    counted = target != 3
    assert all(value.shape == target.shape for value in none)
    assert torch.equal(none[1], counted.float())
    assert accuracy(input, target, ignore_index=3, reduction="sum") == none[0].sum()
    mean = accuracy(input, target, ignore_index=3)
    assert mean.item() == pytest.approx((none[0].sum() / counted.sum()).item())
    assert accuracy(input, target, ()) == ()
    assert isinstance(accuracy(input, target, [1]), tuple)


def test_no_row_counted_is_nan(place: Place) -> None:
    input = torch.randn(2, 6, device=place.device)
    target = torch.full((2,), -100, device=place.device)
    assert math.isnan(accuracy(input, target).item())
    assert accuracy(input, target, reduction="sum").item() == 0
    assert math.isnan(accuracy(input[:0], target[:0]).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_one_hot_and_probability_targets(place: Place, dtype: torch.dtype) -> None:
    for shape in ((20, 7), (4, 7, 5)):
        input = torch.randn(shape, device=place.device)
        label = torch.randint(7, shape[:1] + shape[2:], device=place.device)
        dense = torch.nn.functional.one_hot(label, 7).movedim(-1, 1).to(dtype)
        assert torch.equal(accuracy(input, dense, (1, 2))[1], accuracy(input, label, (1, 2))[1])
    probabilities = torch.tensor([[0.2, 0.4, 0.4], [0.5, 0.1, 0.4]], device=place.device)
    scores = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], device=place.device)
    assert accuracy(scores, probabilities).item() == 0.5


def test_the_loss_is_that_of_cross_entropy(place: Place) -> None:
    input = torch.randn(9, 33, device=place.device, requires_grad=True)
    target = torch.randint(33, (9,), device=place.device)
    weight = torch.rand(33, device=place.device)
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.01, "softcap": 4.0}
    for reduction in ("mean", "sum", "none"):
        both = cross_entropy_with_accuracy(input, target, weight, reduction=reduction, topk=(1, 5), **options)
        assert isinstance(both, LossAndAccuracy)
        alone = cross_entropy(input, target, weight, reduction=reduction, **options)
        assert torch.equal(both.loss, alone)
        gradients = [torch.autograd.grad(loss.sum(), input)[0] for loss in (both.loss, alone)]
        assert torch.equal(*gradients)
        for value, expected in zip(both.accuracy, accuracy(input, target, (1, 5), reduction=reduction), strict=True):
            assert torch.equal(value, expected)
            assert not value.requires_grad


def test_accuracy_has_no_graph(place: Place) -> None:
    input = torch.randn(3, 4, device=place.device, requires_grad=True)
    assert not accuracy(input, torch.tensor([0, 1, 2], device=place.device)).requires_grad


@pytest.mark.parametrize("right", [0.0, 0.02, 0.08, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_share_of_right_rows(place: Place, dtype: torch.dtype, right: float) -> None:
    """However many are right, wherever they stand, ignored rows first: top-1 has several ways, all exact."""
    x, target = torch.randn(300, 40).to(dtype), torch.randint(40, (300,))
    hits = torch.rand(300) < right
    hits[:20] = False
    x[hits, target[hits]] = 9.0
    x[hits.nonzero()[::7].squeeze(1), 0] = 9.0  # ties with a lower index
    target[:40:2] = -100
    shaped = [(x, target), (x.view(30, 10, 40).transpose(1, 2), target.view(30, 10)), (x.t()[None], target[None])]
    for scores, labels in shaped:
        ours = accuracy(scores.to(place.device), labels.to(place.device))
        assert float(ours) == pytest.approx(reference.accuracy(scores, labels, 1), abs=1e-6)


@pytest.mark.slow(interpreted=True)
def test_accuracy_does_not_hang_on_the_default_dtype(place: Place) -> None:
    torch.set_default_dtype(torch.float16)
    try:
        scores = torch.zeros(70000, 3, dtype=torch.float32, device=place.device)
        labels = torch.zeros(70000, dtype=torch.int64, device=place.device)
        value = accuracy(scores, labels)
        assert value == 1
        assert value.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        (torch.tensor([0.9, 0.2, 0.8, 0.1]), torch.tensor([0, 1, 1, 0])),
        (torch.tensor([0.9, 0.2, 0.8, 0.1]), torch.tensor([False, True, True, False])),
        (torch.randn(4, 1), torch.tensor([[0], [1], [1], [0]])),
        (torch.randn(4, 1, 2), torch.ones(4, 1, 2).long()),
    ],
    ids=["(N,)", "(N,) bool", "(N, 1)", "maps"],
)
def test_scores_of_a_binary_classifier_are_refused(scores: torch.Tensor, labels: torch.Tensor) -> None:
    """They have the shape of one-hot rows, of which each would be right, or of a single row."""
    metric = fastloss.Accuracy()
    for call in (lambda: accuracy(scores, labels), lambda: metric.update(scores, labels)):
        with pytest.raises(ValueError, match=r"target has dtype .* torch.stack\(\[-scores, scores\], 1\)"):
            call()
    assert metric.counts.tolist() == [0, 0, 0]


def test_the_advice_for_a_binary_classifier() -> None:
    scores, labels = torch.tensor([0.9, -0.2, 0.8, -0.1]), torch.tensor([0, 1, 1, 0])
    assert accuracy(torch.stack([-scores, scores], 1), labels) == 0.5


class Labels(torch.Tensor):
    """A tensor of a dataset that keeps its class, as fastai's and torchvision's do."""


class Scores(torch.Tensor):
    """A second subclass, which does not know the first."""


@pytest.mark.parametrize("topk", [1 << 31, 1 << 63, 10**30])
def test_every_row_is_right_at_a_k_of_any_size(place: Place, topk: int) -> None:
    x, y = torch.randn(6, 7, device=place.device), torch.randint(7, (6,), device=place.device)
    for values in (accuracy(x, y, (1, topk)), cross_entropy_with_accuracy(x, y, topk=(1, topk)).accuracy):
        assert values[0] == (x.argmax(1) == y).float().mean()
        assert values[1] == 1.0
    metric = Accuracy(topk)
    metric.update(x, y)
    assert metric.compute() == 1.0


@pytest.mark.parametrize("topk", [1, (1, 2)])
def test_a_label_out_of_bounds_of_any_class_and_under_any_mode(topk: int | tuple[int, ...]) -> None:
    x, bad, good = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 77]), torch.tensor([0, 1, 2, 3, 4, 0])
    with pytest.raises(IndexError, match=r"target\[5\] is 77"):
        accuracy(x, bad.as_subclass(Labels), topk)
    with FlopCounterMode(display=False), pytest.raises(IndexError, match=r"target\[5\] is 77"):
        accuracy(x, bad, topk)
    plain, mixed = accuracy(x, good, topk), accuracy(x, good.as_subclass(Labels), topk)
    assert plain == mixed
    with pytest.raises(TypeError):  # as F.cross_entropy's
        accuracy(x.as_subclass(Scores), good.as_subclass(Labels), topk)
    with FakeTensorMode() as mode:  # there is no value to look at
        accuracy(mode.from_tensor(x), mode.from_tensor(bad), topk)
