"""scikit-learn's digits: 1797 scans of handwritten digits, 8 × 8 pixels, shipped inside that package.

(The test part of Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, doi:10.24432/C50P49.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HELD_OUT = 0.25  # the share of the scans that no run is trained on
BRIGHTEST = 16  # pixels are whole numbers from 0 to this


class Split(NamedTuple):
    """Scans, ``(N, 64)`` float32 in [0, 1], and their digits, ``(N,)`` int64."""

    train: Tensor
    train_digit: Tensor
    held_out: Tensor
    held_out_digit: Tensor


def digits(seed: int, device: torch.device) -> Split:
    """Return the scans, split so that both parts hold each digit in the same proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, digit = map(torch.as_tensor, load_digits(return_X_y=True))
    rows = train_test_split(range(len(digit)), test_size=HELD_OUT, stratify=digit, random_state=seed)
    scans = (pixels / BRIGHTEST).to(device, torch.float32)
    parts = [(scans[part], digit.to(device, torch.int64)[part]) for part in rows]
    return Split(*parts[0], *parts[1])
