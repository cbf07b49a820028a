"""Labels in uint8 and int32: whatever they are compared with, it is as a number, not in the labels' own dtype.

In uint8, 156 equals -100 and 50 equals 306.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from places import Place
from torch import Tensor

import fastloss
from fastloss import accuracy, cross_entropy, cross_entropy_with_statistics, linear_cross_entropy

CLASSES = 306
LABELS = torch.tensor([156] * 5 + [50, 0, 255, 49, 17])  # 50 is 306 in 8 bits
HEAD = torch.randn(CLASSES, 4, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.randn(len(LABELS), 4, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.linspace(0.1, 1.0, CLASSES)

Call = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]
CALLS: dict[str, Call] = {
    "cross_entropy": lambda x, t, o: cross_entropy(x, t, **o),
    "weight, smoothing": lambda x, t, o: cross_entropy(x, t, WEIGHT.to(x.device), label_smoothing=0.1, **o),
    "z-loss": lambda x, t, o: cross_entropy(x, t, lse_square_scale=0.1, **o),
    "probabilities": lambda x, t, o: cross_entropy(x.softmax(1), t, from_logits=False, label_smoothing=0.1, **o),
    "statistics": lambda x, t, o: cross_entropy_with_statistics(x, t, WEIGHT.to(x.device), **o).loss,
    "z-loss apart": lambda x, t, o: (
        cross_entropy_with_statistics(x, t, WEIGHT.to(x.device), z_loss=True, lse_square_scale=0.1, **o).z_loss
    ),
    "accuracy": lambda x, t, o: accuracy(x, t, 100, **o),
    "linear": lambda x, t, o: linear_cross_entropy(HIDDEN.to(x.device), HEAD.to(x.device), t, **o),
    "all rows": lambda x, t, o: linear_cross_entropy(
        HIDDEN.to(x.device), HEAD.to(x.device), t, skip_ignored=False, **o
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("dtype", "ignore_index"),
    [(torch.uint8, -100), (torch.uint8, 255), (torch.uint8, 306), (torch.int32, -(2**63)), (torch.int32, 2**32)],
    ids=str,
)
def test_narrow_labels_are_numbers(
    place: Place, name: str, dtype: torch.dtype, ignore_index: int, reduction: str
) -> None:
    target = LABELS.clone()
    target[7:] *= dtype is torch.uint8  # 0 is 2**32 in 32 bits
    logits = (HIDDEN @ HEAD.t()).to(place.device)
    options = {"ignore_index": ignore_index, "reduction": reduction}
    ours = CALLS[name](logits, target.to(dtype).to(place.device), options)
    torch.testing.assert_close(ours, CALLS[name](logits, target.to(place.device), options))


@pytest.mark.parametrize("name", CALLS)
def test_narrow_labels_as_users_call_it(name: str) -> None:
    """Few logits on a CPU, which go to torch's own operators."""
    logits, options = HIDDEN @ HEAD.t(), {"ignore_index": -100, "reduction": "mean"}
    ours = CALLS[name](logits, LABELS.to(torch.uint8), options)
    torch.testing.assert_close(ours, CALLS[name](logits, LABELS, options))


@pytest.mark.parametrize("name", ["cross_entropy", "weight, smoothing", "z-loss", "accuracy", "linear"])
def test_narrow_labels_compiled(name: str) -> None:
    logits, options = HIDDEN @ HEAD.t(), {"ignore_index": -100, "reduction": "mean"}
    compiled = torch.compile(lambda x, t: CALLS[name](x, t, options), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, LABELS.to(torch.uint8)), CALLS[name](logits, LABELS, options))


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_narrow_labels(place: Place, create_graph: bool) -> None:
    gradients = []
    for dtype in (torch.uint8, torch.int64):
        x = (HIDDEN @ HEAD.t()).to(place.device).requires_grad_()
        loss = cross_entropy(x, LABELS.to(dtype).to(place.device), lse_square_scale=0.1, label_smoothing=0.1)
        gradients += torch.autograd.grad(loss, x, create_graph=create_graph)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("ignore_index", [-100, 255, 306])
def test_the_metric_counts_rows_of_narrow_labels(ignore_index: int) -> None:
    metric = fastloss.Accuracy(ignore_index=ignore_index)
    metric.update(HIDDEN @ HEAD.t(), LABELS.to(torch.uint8))
    assert metric.counts[0] == (ignore_index != LABELS).sum()


@pytest.fixture
def alone() -> Iterator[Any]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_narrow_labels_over_ranks(alone: Any) -> None:
    logits, narrow = HIDDEN @ HEAD.t(), LABELS.to(torch.uint8)
    for options in ({}, {"weight": WEIGHT, "label_smoothing": 0.1}, {"reduction": "none"}):
        expected = F.cross_entropy(logits, LABELS, **options)
        torch.testing.assert_close(cross_entropy(logits, narrow, group=alone, **options), expected)
        torch.testing.assert_close(linear_cross_entropy(HIDDEN, HEAD, narrow, group=alone, **options), expected)
    assert accuracy(logits, narrow, 100, group=alone) == accuracy(logits, LABELS, 100)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "weight": torch.rand(21)}], ids=["plain", "weighted"]
)
@pytest.mark.parametrize("size", [(8, 8), (100, 70)], ids=["few", "many"])
def test_uint8_maps(size: tuple[int, int], options: dict[str, Any]) -> None:
    """torch's operator takes uint8 labels of (N, C) alone, without smoothing beside weights."""
    input, target = torch.randn(2, 21, *size), torch.randint(21, (2, *size))
    target[0, 0] = 255
    loss = cross_entropy(input, target.to(torch.uint8), ignore_index=255, **options)
    torch.testing.assert_close(loss, F.cross_entropy(input, target, ignore_index=255, **options))
