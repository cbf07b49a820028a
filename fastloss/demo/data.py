"""scikit-learn's digits: 1797 scans of handwritten digits, 8 × 8 pixels, shipped inside that package.

(The test part of Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, doi:10.24432/C50P49.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Split", "digits"]

HELD_OUT = 0.25  # the share of the scans that no run is trained on
BRIGHTEST = 16  # pixels are whole numbers from 0 to this


class Split(NamedTuple):
    """Scans, ``(N, 64)`` float32 in [0, 1], and their digits, ``(N,)`` int64."""

    train: Tensor
    train_digit: Tensor
    held_out: Tensor
    held_out_digit: Tensor


def digits(seed: int, device: torch.device) -> Split:
    """The scans, split so that both parts hold each digit in the same proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, digit = load_digits(return_X_y=True)
    train, held_out, train_digit, held_out_digit = train_test_split(
        pixels, digit, test_size=HELD_OUT, stratify=digit, random_state=seed
    )
    return Split(
        torch.as_tensor(train / BRIGHTEST, dtype=torch.float32, device=device),
        torch.as_tensor(train_digit, dtype=torch.int64, device=device),
        torch.as_tensor(held_out / BRIGHTEST, dtype=torch.float32, device=device),
        torch.as_tensor(held_out_digit, dtype=torch.int64, device=device),
    )
