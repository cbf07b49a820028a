"""Long rows that begin anywhere within an access: shared by programs (``kernels/cross_entropy_parts.py``)."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from places import Place
from torch import Tensor

from fastloss import backend
from fastloss.contract import LossOptions

ROWS = 11
OPTIONS = {
    "accuracy": LossOptions(topk=(1, 5)),
    "smoothing": LossOptions(label_smoothing=0.1, topk=(1,)),
    "z-loss": LossOptions(lse_square_scale=1e-3, reduction="sum"),
}


@pytest.fixture
def many_processors(kernels: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """In the interpreter, more of them, so that four programs may share a row."""
    backend.load("triton")
    if kernels.interpreted:
        monkeypatch.setattr(sys.modules["fastloss.kernels.launch"], "_processors", lambda device: 16)
    return kernels


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
    many_processors: Place, classes: int, dtype: torch.dtype, inplace: bool, options: LossOptions
) -> None:
    """Loss, accuracies and gradient; the gradient over the logits too."""
    logits, target = make(classes, dtype, many_processors.device)
    plan = sys.modules["fastloss.kernels.launch"].plan(logits, logits, plain=True)
    assert plan.split > 0
    how: dict[str, Any] = {"loss_dtype": torch.float32, "gradient": True}
    right = backend.load("eager").cross_entropy_forward(
        logits.cpu(), target.cpu(), None, options, inplace=False, **how
    )
    found = backend.load("triton").cross_entropy_forward(logits, target, None, options, inplace=inplace, **how)
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


def test_without_a_gradient_and_a_row_at_a_time(many_processors: Place) -> None:
    """What is kept for a backward pass, losses and ranks of each row."""
    logits, target = make(8997, torch.float32, many_processors.device)
    logits[5, 3] = torch.nan
    options = LossOptions(reduction="none", topk=(1, 3), label_smoothing=0.1)
    how: dict[str, Any] = {"loss_dtype": torch.float32, "gradient": False, "inplace": False}
    right = backend.load("eager").cross_entropy_forward(logits.cpu(), target.cpu(), None, options, **how)
    found = backend.load("triton").cross_entropy_forward(logits, target, None, options, **how)
    torch.testing.assert_close(found.loss.cpu(), right.loss, rtol=2e-6, atol=0.0, equal_nan=True)
    for mine, other in zip(found.accuracy, right.accuracy, strict=True):
        assert mine.cpu().equal(other)
