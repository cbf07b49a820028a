"""The demo: one network trained twice, with fastloss and in plain PyTorch; the loss and the optimizer alone at scale.

Every number it prints or draws is measured in that run. The modules, in the order in which they are used:

- :mod:`.contenders`: what is compared;
- :mod:`.data`, :mod:`.training`: the two runs on real scans of digits;
- :mod:`.loss_at_scale`: the loss alone, at language-model size;
- :mod:`.language_model`: the two runs on Python's own source, with logits and without;
- :mod:`.optimizer_step`: SGD's step alone, over the tensors of a ResNet-50;
- :mod:`.report`, :mod:`.picture`: the tables and the PNG.

The packages of the extra ``fastloss[demo]`` are imported where they are used, so that :func:`missing_extras`
can name those that are not there.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .language_model import LanguageModel, Size, size_for, train_language_model
from .loss_at_scale import Case, LossAtScale, cases_for, compare
from .optimizer_step import OptimizerStep, compare_steps, width_that_fits
from .training import Training, train_side_by_side

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

__all__ = ["Outcome", "Settings", "missing_extras", "run"]

# The packages of the extra, by the name that is imported.
_EXTRAS = {
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "psutil": "psutil",
    "rich": "rich",
    "sklearn": "scikit-learn",
}


@dataclass(frozen=True)
class Settings:
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


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured."""

    training: Training
    at_scale: tuple[LossAtScale, ...]
    language_model: LanguageModel
    optimizer: OptimizerStep


def missing_extras() -> list[str]:
    """The packages of ``fastloss[demo]`` that are not installed."""
    return [name for module, name in _EXTRAS.items() if importlib.util.find_spec(module) is None]


def run(settings: Settings) -> Outcome:
    """Train, compare, print, draw."""
    from rich.console import Console

    from ..measuring import machine
    from . import picture, report

    console = Console()
    device = settings.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(report.heading(device))
    training = _train(settings, device, console)
    console.print(report.training(training))
    at_scale = _compare(settings, device, console)
    console.print(report.at_scale(at_scale, device))
    language_model = _train_language_model(settings, device, console)
    console.print(report.language_model(language_model, device))
    optimizer = _compare_steps(settings, device, console)
    console.print(report.optimizer(optimizer, device))
    outcome = Outcome(training, at_scale, language_model, optimizer)
    picture.draw(outcome, settings.output, caption=machine.description(device))
    console.print(f"The picture: {settings.output}", highlight=False, markup=False, soft_wrap=True)
    return outcome


def _train(settings: Settings, device: torch.device, console: Console) -> Training:
    from ..measuring.tables import progress_bar
    from . import data

    split = data.digits(settings.seed, device)
    with progress_bar(console) as bar:
        task = bar.add_task("training, with fastloss and with PyTorch", total=2 * settings.epochs)
        return train_side_by_side(split, epochs=settings.epochs, seed=settings.seed, tell=lambda: bar.advance(task))


def _compare(settings: Settings, device: torch.device, console: Console) -> tuple[LossAtScale, ...]:
    from ..measuring.tables import progress_bar

    results = []
    with progress_bar(console) as bar:
        for case in cases_for(device) if settings.cases is None else settings.cases:
            done = functools.partial(_set_share, bar, bar.add_task(f"loss alone, {case}", total=1.0))
            results.append(compare(case, device, seed=settings.seed, budget=settings.seconds_a_case, tell=done))
            done(1.0)
    return tuple(results)


def _train_language_model(settings: Settings, device: torch.device, console: Console) -> LanguageModel:
    from ..measuring.tables import progress_bar

    size = settings.language_model or size_for(device)
    with progress_bar(console) as bar:
        done = functools.partial(
            _set_share, bar, bar.add_task("a language model, with logits and without", total=1.0)
        )
        return train_language_model(device, size=size, seed=settings.seed, tell=done)


def _compare_steps(settings: Settings, device: torch.device, console: Console) -> OptimizerStep:
    from ..measuring.tables import progress_bar

    width = settings.optimizer_width or width_that_fits(device)
    with progress_bar(console) as bar:
        done = functools.partial(_set_share, bar, bar.add_task("SGD's step alone", total=1.0))
        result = compare_steps(
            device, width=width, seed=settings.seed, budget=settings.seconds_of_optimizer, tell=done
        )
        done(1.0)
    return result


def _set_share(bar: Progress, task: TaskID, share: float) -> None:
    bar.update(task, completed=share)
