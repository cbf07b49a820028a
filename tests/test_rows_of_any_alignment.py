"""Long rows that begin anywhere within an access: whole accesses, and ends apart (``ENDS`` of the kernels)."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from places import Place
from torch import Tensor

from fastloss.backends import choice
from fastloss.backends.contract import LossInputs, LossOptions

ROWS = 11
OPTIONS = {
    "accuracy": LossOptions(topk=(1, 5)),
    "smoothing": LossOptions(label_smoothing=0.1, topk=(1,)),
    "z-loss": LossOptions(lse_square_scale=1e-3, reduction="sum"),
}


def plan_of(logits: Tensor, gradient: Tensor | None, **how: bool) -> Any:
    choice.load("triton")
    return sys.modules["fastloss.kernels.tiles"].plan(logits, gradient, plain=True, **how)


def make(classes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ties, −inf before and at labels, the least floats, a row that is ignored and holds NaN."""
    logits = 3 * torch.randn(ROWS, classes)
    logits[1] = (logits[1] / 3).round()
    logits[2] = -torch.inf
    logits[2, 5] = 1.0
    logits[3, : classes // 2] = -1e30
    logits[4, 1] = -torch.inf
    logits[6] = torch.nan
    target = torch.randint(classes, (ROWS,))
    target[2], target[4], target[6], target[7], target[8] = 3, 1, -100, 0, classes - 1
    logits[7:10].scatter_(1, target[7:10, None], 20.0)
    return logits.to(device, dtype).unsqueeze(2), target.to(device)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("classes", "dtype", "inplace"), [(8999, torch.float32, True), (17001, torch.bfloat16, False)]
)
def test_as_the_eager_backend(
    kernels: Place, classes: int, dtype: torch.dtype, inplace: bool, options: LossOptions
) -> None:
    """Loss, accuracies and gradient; the gradient over the logits too."""
    logits, target = make(classes, dtype, kernels.device)
    assert plan_of(logits, logits, ranked=bool(options.topk)).ends
    how: dict[str, Any] = {"loss_dtype": torch.float32, "gradient": True}
    right = choice.load("eager").cross_entropy_forward(
        LossInputs(logits.cpu(), target.cpu(), None, options), inplace=False, **how
    )
    found = choice.load("triton").cross_entropy_forward(
        LossInputs(logits, target, None, options), inplace=inplace, **how
    )
    torch.testing.assert_close(found.loss.cpu(), right.loss, rtol=2e-6, atol=0.0)
    for mine, other in zip(found.accuracy, right.accuracy, strict=True):
        assert mine.item() == other.item()
    assert found.gradient is not None
    assert right.gradient is not None
    assert (found.gradient.data_ptr() == logits.data_ptr()) == inplace
    # Beside a label of p ≈ 1 both have what float32 leaves of 1 − p.
    torch.testing.assert_close(
        found.gradient.cpu(), right.gradient, rtol=max(2e-5, 2 * torch.finfo(dtype).eps), atol=3e-7
    )


def test_without_a_gradient_and_a_row_at_a_time(kernels: Place) -> None:
    """What is kept for a backward pass, losses and ranks of each row."""
    logits, target = make(8997, torch.float32, kernels.device)
    logits[5, 3] = torch.nan
    options = LossOptions(reduction="none", topk=(1, 3), label_smoothing=0.1)
    how: dict[str, Any] = {"loss_dtype": torch.float32, "gradient": False, "inplace": False}
    right = choice.load("eager").cross_entropy_forward(LossInputs(logits.cpu(), target.cpu(), None, options), **how)
    found = choice.load("triton").cross_entropy_forward(LossInputs(logits, target, None, options), **how)
    torch.testing.assert_close(found.loss.cpu(), right.loss, rtol=2e-6, atol=0.0, equal_nan=True)
    for mine, other in zip(found.accuracy, right.accuracy, strict=True):
        assert mine.cpu().equal(other)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "loss"])
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(16385, torch.bfloat16), (8192 + 9, torch.float32), (2 * 8192 + 15, torch.float16)],
    ids=str,
)
def test_labels_in_the_ends_of_a_row(kernels: Place, classes: int, dtype: torch.dtype, gradient: bool) -> None:
    """Rows that begin at each place in an access and end at each; a row's blocks end where it does, or do not.

    Labels in the first and the last logits, with logits like theirs in the ends and between, and below them all −inf.
    """
    places = (0, 1, 6, 7, 8, classes // 2, classes - 9, classes - 8, classes - 2, classes - 1)
    target = torch.tensor(places).repeat(3)
    logits = torch.randn(len(target), classes).round()
    rows = torch.arange(len(target))
    logits[rows[:10], target[:10]] = 3.0  # ties, before it and behind it
    logits[rows[10:20], target[10:20]] = -torch.inf
    logits[20:] = -torch.inf  # all alike, but for a great logit at each end
    logits[20:, 2], logits[20:, classes - 3] = 200.0, 199.0
    logits = logits.to(kernels.device, dtype).unsqueeze(2)
    target = target.to(kernels.device)
    assert plan_of(logits, logits if gradient else None, ranked=True).ends
    options = LossOptions(reduction="none", topk=(1, 3, 9, classes // 2, classes - 8, classes - 1))
    how: dict[str, Any] = {"loss_dtype": torch.float32, "gradient": gradient, "inplace": False}
    right = choice.load("eager").cross_entropy_forward(LossInputs(logits.cpu(), target.cpu(), None, options), **how)
    found = choice.load("triton").cross_entropy_forward(LossInputs(logits, target, None, options), **how)
    torch.testing.assert_close(found.loss.cpu(), right.loss, rtol=2e-6, atol=0.0)
    for mine, other in zip(found.accuracy, right.accuracy, strict=True):
        assert mine.cpu().equal(other)
    if right.gradient is not None:
        assert found.gradient is not None
        torch.testing.assert_close(
            found.gradient.cpu(), right.gradient, rtol=max(2e-5, 2 * torch.finfo(dtype).eps), atol=3e-7
        )


def test_nothing_is_written_beside_a_row(kernels: Place) -> None:
    """Rows that lie further apart than they are long keep what is between them."""
    wide = torch.randn(5, 9001, device=kernels.device)
    logits, before = wide[:, 0:8997].unsqueeze(2), wide.clone()
    assert plan_of(logits, logits).ends
    target = torch.tensor([0, 8996, 17, 4000, -100], device=kernels.device)
    choice.load("triton").cross_entropy_forward(
        LossInputs(logits, target, None, LossOptions()), loss_dtype=torch.float32, gradient=True, inplace=True
    )
    assert wide[:, 8997:].equal(before[:, 8997:])
    assert not (wide[:4, :8997] == before[:4, :8997]).any()
    assert (wide[4, :8997] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_label_that_is_nan(kernels: Place, dtype: torch.dtype) -> None:
    """Those before it are above it."""
    logits = torch.zeros(3, 9001)
    logits[:, 5] = logits[:, 900] = logits[:, 9000] = torch.nan
    logits, target = (
        logits.to(kernels.device, dtype).unsqueeze(2),
        torch.tensor([5, 900, 9000], device=kernels.device),
    )
    options = LossOptions(reduction="none", topk=(1, 2, 3))
    how: dict[str, Any] = {"loss_dtype": torch.float32, "gradient": False, "inplace": False}
    assert plan_of(logits, None, ranked=True).ends
    found = choice.load("triton").cross_entropy_forward(LossInputs(logits, target, None, options), **how)
    assert torch.stack(found.accuracy).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
