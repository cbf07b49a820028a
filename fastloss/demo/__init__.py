"""The demo: one network trained twice, with fastloss and in plain PyTorch, and the loss alone at scale.

Every number it prints or draws is measured in that run. The modules, in the order in which they are used:

- :mod:`.contenders`: what is compared;
- :mod:`.measure`: time and memory of one step;
- :mod:`.data`, :mod:`.training`: the two runs on real scans of digits;
- :mod:`.loss_at_scale`: the loss alone, at language-model size;
- :mod:`.report`, :mod:`.picture`: the tables and the PNG.

The packages behind the extra ``fastloss[demo]`` are imported inside :func:`run`, after :func:`missing_extras`
had its chance to name those that are not there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .loss_at_scale import Case, LossAtScale, cases_for, compare
from .training import Training, train_side_by_side

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
    epochs: int = 40
    cases: Sequence[Case] | None = None  # None: what fits this machine
    seconds_a_case: float = 4.0  # timing budget for each case


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured."""

    training: Training
    at_scale: tuple[LossAtScale, ...]


def missing_extras() -> list[str]:
    """The packages of ``fastloss[demo]`` that are not installed."""
    return [name for module, name in _EXTRAS.items() if importlib.util.find_spec(module) is None]


def run(settings: Settings) -> Outcome:
    """Train, compare, print, draw."""
    from rich.console import Console

    from . import data, picture, report

    console = Console()
    device = settings.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(report.heading(device))

    with report.progress(console) as bar:
        split = data.digits(settings.seed, device)
        task = bar.add_task("training, with fastloss and with PyTorch", total=2 * settings.epochs)
        training = train_side_by_side(
            split, epochs=settings.epochs, seed=settings.seed, tell=lambda: bar.advance(task)
        )
    console.print(report.training(training))

    cases = cases_for(device) if settings.cases is None else settings.cases
    at_scale = []
    with report.progress(console) as bar:
        for case in cases:
            task = bar.add_task(f"loss alone, {case}", total=1.0)
            at_scale.append(
                compare(
                    case,
                    device,
                    seed=settings.seed,
                    budget=settings.seconds_a_case,
                    tell=lambda share, task=task: bar.update(task, completed=share),  # type: ignore[misc]
                )
            )
    outcome = Outcome(training, tuple(at_scale))
    console.print(report.at_scale(outcome.at_scale, device))

    picture.draw(outcome, settings.output, caption=report.machine(device))
    console.print(f"The picture: {settings.output}", highlight=False)
    return outcome
