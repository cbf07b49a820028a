"""A small language model, trained twice on real text: by its logits in plain PyTorch, and without them in fastloss.

The text is on any machine: the source of Python's standard library, as bytes. A token is a pair of bytes, so that
there are 65536 of them, as many as a language model's vocabulary has, and no vocabulary to learn or to download.
"""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastloss

from ..measuring.clock import Progress
from ..measuring.machine import OtherPrograms
from .training import Run, in_turn, new_model

CLASSES = 1 << 16  # pairs of bytes
LEARNING_RATE, MOMENTUM = 0.5, 0.5
EMBEDDING_SPREAD = 0.1
TEXT_BYTES = 1 << 22  # of the source, at most


class Size(NamedTuple):
    """The size of the model, its batches and its run."""

    passages: int = 8  # a batch
    tokens: int = 64  # a passage
    features: int = 32
    steps: int = 12

    @property
    def rows(self) -> int:
        """The tokens of a batch that have a next one."""
        return self.passages * (self.tokens - 1)


class LanguageModel(NamedTuple):
    """The two runs; their peaks are those of a step beyond the model, gradients and all."""

    size: Size
    text_bytes: int
    pytorch: Run
    fastloss: Run
    others_share: float  # of the CPUs, that other programs took meanwhile

    @property
    def saved_bytes(self) -> int:
        """The bytes by which fastloss's peak is below PyTorch's."""
        return self.pytorch.peak_bytes - self.fastloss.peak_bytes


def size_for(device: torch.device) -> Size:
    """Return a size that takes seconds."""
    return Size(passages=32, tokens=256, features=512, steps=40) if device.type == "cuda" else Size()


def source_tokens(device: torch.device) -> Tensor:
    """Return the source of the standard library's modules, in the order of their names: pairs of bytes, int64."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = bytearray()
    while modules and len(text) < TEXT_BYTES:
        text += modules.pop(0).read_bytes()
    pairs = torch.frombuffer(text[: len(text) // 2 * 2], dtype=torch.uint8).view(-1, 2).long()
    return (pairs[:, 0] * 256 + pairs[:, 1]).to(device)


def train_language_model(
    device: torch.device, *, size: Size, seed: int, progress: Progress = lambda share: None
) -> LanguageModel:
    """Train both, step by step in turn."""
    text = source_tokens(device)
    runs = []
    for loss in (_by_logits, _without_logits):
        model = new_model(partial(_Network, size, seed), seed, device)
        runs.append(Run(model, loss, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)))
        runs[-1].measure_peak(next(_batches(text, size, seed)))
    others, batches = OtherPrograms(), list(itertools.islice(_batches(text, size, seed), size.steps))
    in_turn(runs, size.steps, lambda run, step: run.step(batches[step]), progress)
    return LanguageModel(size, 2 * len(text), runs[0], runs[1], others.share())


class _Network(nn.Module):
    """A recurrent network whose head is its embedding."""

    def __init__(self, size: Size, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, size.features)
        self.body = nn.GRU(size.features, size.features, batch_first=True)
        generator = torch.Generator().manual_seed(seed)
        nn.init.trunc_normal_(self.embedding.weight, std=EMBEDDING_SPREAD, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the hidden states ``(B, T, D)``."""
        return self.body(self.embedding(tokens))[0]


def _by_logits(model: _Network, tokens: Tensor) -> Tensor:
    logits = F.linear(model(tokens)[:, :-1], model.embedding.weight)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _without_logits(model: _Network, tokens: Tensor) -> Tensor:
    return fastloss.linear_cross_entropy(model(tokens), model.embedding.weight, tokens, shift=True)


def _batches(text: Tensor, size: Size, seed: int) -> Iterator[Tensor]:
    """Yield ``(passages, tokens)`` from random places of the text, without end."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(size.tokens)
    while True:
        starts = torch.randint(len(text) - size.tokens, (size.passages, 1), generator=generator)
        yield text[(starts + offsets).to(text.device)]
