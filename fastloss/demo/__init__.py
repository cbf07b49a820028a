"""The demo: one network trained twice, with fastloss and in plain PyTorch; the loss and the optimizer alone at scale.

Every number it prints or draws is measured in that run. The modules, in the order in which they are used:

- :mod:`.training`: the two runs on real scans of digits;
- :mod:`.alone`: the loss alone, at language-model size; SGD's step alone, over the tensors of a ResNet-50;
- :mod:`.language_model`: the two runs on Python's own source, with logits and without;
- :mod:`.report`: the tables and the PNG.

The packages of the extra ``fastloss[demo]`` are imported where they are used, so that :func:`missing_extras`
can name those that are not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..measuring.machine import missing
from .alone import Case, LossAtScale, OptimizerStep, cases_for, compare_losses, compare_steps, width_that_fits
from .language_model import LanguageModel, Size, size_for, train_language_model
from .training import Training, digits, train_side_by_side

__all__ = ["Outcome", "Settings", "missing_extras", "run"]

Result = TypeVar("Result")


class Settings(NamedTuple):
    """How large the demo is, where it runs and where its picture goes."""

    output: Path
    seed: int = 0
    device: torch.device | None = None  # None: the GPU if there is one, else the CPU
    epochs: int = 30
    cases: Sequence[Case] | None = None  # None: what fits this machine
    seconds_a_case: float = 3.0  # of timing; it takes longer where five rounds do
    language_model: Size | None = None  # None: what takes seconds
    optimizer_width: int | None = None  # None: a ResNet-50's, or the widest that fits this machine
    seconds_of_optimizer: float = 1.5  # of timing


class Outcome(NamedTuple):
    """Everything that was measured."""

    training: Training
    at_scale: tuple[LossAtScale, ...]
    language_model: LanguageModel
    optimizer: OptimizerStep


def missing_extras() -> list[str]:
    """Return the packages of ``fastloss[demo]`` that are not installed."""
    return missing("matplotlib", "numpy", "psutil", "rich", "sklearn")


def run(settings: Settings) -> Outcome:
    """Train, compare, print, draw."""
    from rich.console import Console

    from ..measuring import machine
    from ..measuring.style import progress_bar, task
    from . import report

    console, seed = Console(), settings.seed
    device = settings.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def measured(words: str, measure: Callable[..., Result], *given: Any, **options: Any) -> Result:
        with progress_bar(console) as bar:
            return measure(*given, **options, progress=task(bar, words))

    console.print(report.heading(device))
    words = "training, with fastloss and with PyTorch"
    training = measured(words, train_side_by_side, digits(seed, device), epochs=settings.epochs, seed=seed)
    console.print(report.training(training))
    cases, budget = cases_for(device) if settings.cases is None else settings.cases, settings.seconds_a_case
    at_scale = [
        measured(f"loss alone, {case}", compare_losses, case, device, seed=seed, budget=budget) for case in cases
    ]
    console.print(report.at_scale(at_scale, device))
    words, size = "a language model, with logits and without", settings.language_model or size_for(device)
    language_model = measured(words, train_language_model, device, size=size, seed=seed)
    console.print(report.language_model(language_model, device))
    width, budget = settings.optimizer_width or width_that_fits(device), settings.seconds_of_optimizer
    optimizer = measured("SGD's step alone", compare_steps, device, width=width, budget=budget)
    console.print(report.optimizer(optimizer, device))
    outcome = Outcome(training, tuple(at_scale), language_model, optimizer)
    report.draw(outcome, settings.output, caption=machine.description(device))
    console.print(f"The picture: {settings.output}", highlight=False, markup=False, soft_wrap=True)
    return outcome
