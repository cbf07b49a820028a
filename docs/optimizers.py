"""The experiments of docs/optimizers.md: ``python docs/optimizers.py``. Needs ``pip install "fastloss[demo]"``.

One small network on scikit-learn's digits:

1. a sweep of the learning rate, of equal size for each optimizer, judged on scans that are kept for it;
2. all optimizers at the rates so chosen, over several seeds, judged on the held-out scans, which no choice has seen;
3. SGD with momentum without the warm-up, without any schedule, and with clipped gradients;
4. bfloat16 parameters under a small learning rate;
5. a bfloat16 momentum buffer under a constant gradient.

Prints Markdown tables, and draws docs/optimizers.png. Everything is computed on one thread of the CPU, from fixed
seeds: a second run on the same machine prints the same.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

import fastloss
from fastloss.demo.training import digits
from fastloss.measuring import style
from fastloss.measuring.style import progress_bar

HIDDEN = 128
BATCH = 64
EPOCHS = 20
SEEDS = 5
FEWER_SEEDS = 3  # of the sweep and of the experiments after the comparison
FIRST_SWEEP_SEED = 100  # so that the sweep and the comparison share no seed
KEPT = 300  # of the 1347 training scans, for the sweep to judge by
WARM_UP = 0.1  # of all steps
WARM_UP_FROM = 0.01  # of the learning rate
MOMENTUM = 0.9

HIGHER = 3  # times the chosen rate: where schedules and clipping are compared too
MAX_NORM = 1.0

SMALL_RATE = 0.002
LONGER = 3  # the experiment with bfloat16 has so many times the epochs

CPU = torch.device("cpu")
Build = Callable[[Iterable[nn.Parameter], float], Optimizer]


class Contender(NamedTuple):
    """An optimizer, and the learning rates that it is tried at."""

    name: str
    build: Build
    rates: tuple[float, ...]
    color: str


CONTENDERS = (
    Contender("SGD", lambda params, lr: fastloss.SGD(params, lr), (0.03, 0.1, 0.3, 1, 3), "#93b4f5"),
    Contender(
        "SGD, momentum",
        lambda params, lr: fastloss.SGD(params, lr, momentum=MOMENTUM),
        (0.01, 0.03, 0.1, 0.3, 1),
        style.FASTLOSS,
    ),
    Contender(
        "SGD, nesterov",
        lambda params, lr: fastloss.SGD(params, lr, momentum=MOMENTUM, nesterov=True),
        (0.01, 0.03, 0.1, 0.3, 1),
        "#0f9d7a",
    ),
    Contender(
        "torch's Adam",
        lambda params, lr: torch.optim.Adam(params, lr),
        (0.001, 0.003, 0.01, 0.03, 0.1),
        style.PYTORCH,
    ),
)


class Stored(NamedTuple):
    """A way to store the parameters and the optimizer's state."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any]
    color: str
    line: str = "-"


STORED = (
    Stored("float32", torch.float32, {}, style.FAINT),
    Stored("bfloat16", torch.bfloat16, {}, "#dc2626"),
    Stored("momentum_dtype=torch.float32", torch.bfloat16, {"momentum_dtype": torch.float32}, "#f2a65a", ":"),
    Stored("stochastic_rounding=True", torch.bfloat16, {"stochastic_rounding": True}, "#0f9d7a"),
    Stored("kahan_sum=True", torch.bfloat16, {"kahan_sum": True}, "#93b4f5", "--"),
    Stored("master_weights=True", torch.bfloat16, {"master_weights": True}, style.FASTLOSS, ":"),
)


# ------------------------------------------------------------------------------------------------------- training


class Scans(NamedTuple):
    """What a run is trained on, and what it is judged by."""

    train: Tensor
    train_digit: Tensor
    judge: Tensor
    judge_digit: Tensor


@dataclass
class Run:
    """One network's way."""

    losses: list[float]  # the mean of each epoch's steps
    judged_losses: list[float]  # after each epoch
    accuracies: list[float]  # after each epoch, in [0, 1]
    rates: list[float]  # of each step
    bytes_a_parameter: tuple[int, int]  # of the parameters, and of the optimizer's state


def warm_up_then_cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    warm_steps = max(1, round(WARM_UP * steps))
    warm_up = LinearLR(optimizer, start_factor=WARM_UP_FROM, total_iters=warm_steps)
    cosine = CosineAnnealingLR(optimizer, T_max=steps - warm_steps)
    return SequentialLR(optimizer, [warm_up, cosine], milestones=[warm_steps])


SCHEDULES: dict[str, Callable[[Optimizer, int], LRScheduler | None]] = {
    "constant": lambda optimizer, steps: None,
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps),
    "warm-up, then cosine": warm_up_then_cosine,
}


def train(
    build: Build,
    rate: float,
    scans: Scans,
    *,
    seed: int,
    epochs: int,
    schedule: str = "warm-up, then cosine",
    dtype: torch.dtype = torch.float32,
) -> Run:
    """One run, from the weights and with the batches that ``seed`` decides."""
    torch.manual_seed(seed)
    hidden = [nn.Linear(scans.train.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(HIDDEN, 10)).to(dtype)
    optimizer = build(model.parameters(), rate)
    steps_an_epoch = len(scans.train) // BATCH
    scheduler = SCHEDULES[schedule](optimizer, steps_an_epoch * epochs)
    run = Run([], [], [], [], (0, 0))
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(scans.train))[: steps_an_epoch * BATCH].split(BATCH):
            loss = fastloss.cross_entropy(model(scans.train[rows].to(dtype)).float(), scans.train_digit[rows])
            optimizer.zero_grad()
            loss.backward()
            run.rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            losses.append(loss.item())
        run.losses.append(statistics.fmean(losses))
        with torch.no_grad():
            logits = model(scans.judge.to(dtype)).float()
            judged_loss, accuracy = fastloss.cross_entropy_with_accuracy(logits, scans.judge_digit)
        run.judged_losses.append(judged_loss.item())
        run.accuracies.append(accuracy.item())
    run.bytes_a_parameter = _bytes_a_parameter(model, optimizer)
    return run


def _bytes_a_parameter(model: nn.Module, optimizer: Optimizer) -> tuple[int, int]:
    params = list(model.parameters())
    count = sum(param.numel() for param in params)
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
    return sum(p.nbytes for p in params) // count, sum(value.nbytes for value in state) // count


# ---------------------------------------------------------------------------------------------------- experiments

Advance = Callable[[], None]


def repeated(
    build: Build, rate: float, scans: Scans, seeds: Sequence[int], done: Advance, **options: Any
) -> list[Run]:
    """Train once for each seed."""
    runs = []
    for seed in seeds:
        runs.append(train(build, rate, scans, seed=seed, **options))
        done()
    return runs


def sweep(scans: Scans, seeds: Sequence[int], epochs: int, done: Advance) -> dict[str, dict[float, list[Run]]]:
    """Train every contender at each of its rates."""
    return {
        name: {rate: repeated(build, rate, scans, seeds, done, epochs=epochs) for rate in rates}
        for name, build, rates, _ in CONTENDERS
    }


def chosen_rates(results: dict[str, dict[float, list[Run]]]) -> dict[str, float]:
    """Return the rate of the least loss on the scans that were kept for the choice."""
    return {name: min(by_rate, key=lambda rate: _judged_loss(by_rate[rate])) for name, by_rate in results.items()}


def compare(
    rates: dict[str, float], scans: Scans, seeds: Sequence[int], epochs: int, done: Advance
) -> dict[str, list[Run]]:
    """Train every contender at its own rate."""
    return {name: repeated(build, rates[name], scans, seeds, done, epochs=epochs) for name, build, _, _ in CONTENDERS}


class Scheduled(NamedTuple):
    """SGD with momentum under one schedule."""

    rate: float
    schedule: str
    max_norm: float | None
    runs: list[Run]


def schedules(rate: float, scans: Scans, seeds: Sequence[int], epochs: int, done: Advance) -> list[Scheduled]:
    """Train under every schedule with and without clipping, at the chosen rate and at a higher one."""
    results = []
    for each, max_norm, schedule in itertools.product((rate, HIGHER * rate), (None, MAX_NORM), SCHEDULES):
        build = partial(fastloss.SGD, momentum=MOMENTUM, max_norm=max_norm)
        runs = repeated(build, each, scans, seeds, done, epochs=epochs, schedule=schedule)
        results.append(Scheduled(each, schedule, max_norm, runs))
    return results


def sixteen_bits(scans: Scans, seeds: Sequence[int], epochs: int, done: Advance) -> dict[str, list[Run]]:
    """Train by SGD with momentum at a small constant rate, for each way to store."""
    results = {}
    for name, dtype, options, *_ in STORED:
        build = partial(fastloss.SGD, momentum=MOMENTUM, **options)
        settings = {"epochs": epochs, "schedule": "constant", "dtype": dtype}
        results[name] = repeated(build, SMALL_RATE, scans, seeds, done, **settings)
    return results


def buffers_of_a_constant(momentum: float) -> list[float]:
    """Return the last value of a momentum buffer whose gradient is always 1, in bfloat16 and in float32."""
    results = []
    for dtype in (None, torch.float32):
        param = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        param.grad = torch.ones_like(param)
        optimizer = fastloss.SGD([param], 1e-3, momentum=momentum, momentum_dtype=dtype)
        for _ in range(round(12 / (1 - momentum))):
            optimizer.step()
        results.append(optimizer.state[param]["momentum_buffer"].item())
    return results


# --------------------------------------------------------------------------------------------------------- tables


def _judged_loss(runs: Sequence[Run]) -> float:
    return statistics.fmean(run.judged_losses[-1] for run in runs)


def _spread(values: Sequence[float], digits: int, unit: str = "") -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f}{unit} ± {deviation:.{digits}f}"


def _accuracy(runs: Sequence[Run]) -> str:
    return _spread([100 * run.accuracies[-1] for run in runs], 1, " %")


def _table(name: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"<!-- printed: {name} -->")
    print(f"| {' | '.join(header)} |")
    print("|" + "---|" * len(header))
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def print_sweep(results: dict[str, dict[float, list[Run]]], rates: dict[str, float]) -> None:
    rows = []
    for name, by_rate in results.items():
        cells = []
        for rate, runs in by_rate.items():
            text = f"{rate:g}: {_judged_loss(runs):.3f}"
            cells.append(f"**{text}**" if rate == rates[name] else text)
        rows.append([name, *cells])
    _table("sweep", ["optimizer", *["rate: loss"] * 5], rows)


def print_comparison(runs: dict[str, list[Run]], rates: dict[str, float]) -> None:
    rows = [
        [
            name,
            f"{rates[name]:g}",
            _spread([run.losses[-1] for run in each], 4),
            _spread([run.judged_losses[-1] for run in each], 3),
            _accuracy(each),
        ]
        for name, each in runs.items()
    ]
    _table("comparison", ["optimizer", "learning rate", "training loss", "test loss", "test accuracy"], rows)


def print_schedules(results: Sequence[Scheduled]) -> None:
    rows = [
        [
            f"{each.rate:g}",
            "–" if each.max_norm is None else f"{each.max_norm:g}",
            each.schedule,
            _spread([run.losses[-1] for run in each.runs], 4),
            _accuracy(each.runs),
        ]
        for each in results
    ]
    _table("schedules", ["learning rate", "max_norm", "schedule", "training loss", "test accuracy"], rows)


def print_sixteen_bits(runs: dict[str, list[Run]]) -> None:
    rows = []
    for name, each in runs.items():
        weights, state = each[0].bytes_a_parameter
        losses = [_spread([run.losses[at] for run in each], 3) for at in (0, -1)]
        rows.append([name, f"{weights} + {state} = {weights + state}", *losses, _accuracy(each)])
    header = [
        "parameters, options",
        "bytes: weight + state",
        "loss, first epoch",
        "loss, last epoch",
        "test accuracy",
    ]
    _table("16 bits", header, rows)


def print_buffers() -> None:
    rows = []
    for momentum in (0.9, 0.99, 0.999):
        narrow, wide = buffers_of_a_constant(momentum)
        rows.append([f"{momentum:g}", f"{1 / (1 - momentum):.0f}", f"{narrow:.2f}", f"{wide:.2f}"])
    _table("buffers", ["momentum", "1 / (1 − μ)", "bfloat16 buffer", "float32 buffer"], rows)


# -------------------------------------------------------------------------------------------------------- picture


def draw(compared: dict[str, list[Run]], narrow: dict[str, list[Run]], path: Path) -> None:
    """Curves over the epochs, means over the seeds, with a band from the least to the greatest; and the schedule."""
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(14, 9.2), dpi=110, facecolor="white")
        FigureCanvasAgg(figure)
        (losses, accuracies), (schedule, bits) = figure.subplots(2, 2)
        figure.subplots_adjust(left=0.06, right=0.975, top=0.905, bottom=0.07, hspace=0.48, wspace=0.14)
        seeds = len(next(iter(compared.values())))
        detail = f"each epoch's mean loss; mean of {seeds} seeds, band from the least to the greatest"
        for contender in CONTENDERS:
            runs = compared[contender.name]
            _curve(losses, [run.losses for run in runs], contender.name, contender.color)
            _curve(accuracies, [run.accuracies for run in runs], contender.name, contender.color)
        losses.set_yscale("log")
        accuracies.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        accuracies.set_ylim(0.8, 1)
        accuracies.yaxis.set_major_locator(MultipleLocator(0.05))
        style.title(losses, "Training loss, logarithmic", detail)
        style.title(accuracies, "Accuracy on held-out scans, from 80 % up", "after each epoch; as on the left")
        for axes in (losses, accuracies):
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 5, 10]))
            axes.legend(loc="upper right" if axes is losses else "lower right", fontsize=10)

        rates = compared[CONTENDERS[0].name][0].rates
        schedule.plot(
            range(1, len(rates) + 1), [rate / max(rates) for rate in rates], color=style.FASTLOSS, linewidth=2
        )
        schedule.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        schedule.set_xlabel("step")
        schedule.set_ylim(0)
        style.title(schedule, "Learning rate", "as a share of the chosen one: linear warm-up, then a cosine")

        for stored in STORED:
            _curve(bits, [run.losses for run in narrow[stored.name]], stored.name, stored.color, stored.line)
        bits.set_ylim(0)
        bits.set_xlabel("epoch")
        bits.legend(loc="center right", bbox_to_anchor=(1.0, 0.66), fontsize=9.5)
        style.title(
            bits,
            f"Training loss, SGD with momentum at {SMALL_RATE:g}",
            "bfloat16 parameters with the option named, and float32; four curves are as one",
        )
        figure.savefig(path, format="png")


def _curve(axes: Axes, values: Sequence[Sequence[float]], name: str, color: str, line: str = "-") -> None:
    by_epoch = list(zip(*values, strict=True))
    epochs = range(1, len(by_epoch) + 1)
    axes.fill_between(
        epochs, [min(v) for v in by_epoch], [max(v) for v in by_epoch], color=color, alpha=0.18, linewidth=0
    )
    axes.plot(epochs, [statistics.fmean(v) for v in by_epoch], line, color=color, linewidth=2, label=name)


# ----------------------------------------------------------------------------------------------------------- main


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"), help="the picture")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--fewer-seeds", type=int, default=FEWER_SEEDS)
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is too small to gain from more, and sums have one order
    try:
        with torch.random.fork_rng(devices=[]):
            _run(options.output, options.epochs, range(options.seeds), options.fewer_seeds)
    finally:
        torch.set_num_threads(threads)


def _run(output: Path, epochs: int, seeds: Sequence[int], fewer_seeds: int) -> None:
    split = digits(0, CPU)
    scans = Scans(*split)
    for_sweep = Scans(scans.train[KEPT:], scans.train_digit[KEPT:], scans.train[:KEPT], scans.train_digit[:KEPT])
    tried = range(FIRST_SWEEP_SEED, FIRST_SWEEP_SEED + fewer_seeds)
    with progress_bar(Console(stderr=True)) as bar:

        def task(words: str, runs: int) -> Advance:
            number = bar.add_task(words, total=runs)
            return lambda: bar.advance(number)

        trials = sum(len(contender.rates) for contender in CONTENDERS) * fewer_seeds
        tried_rates = sweep(for_sweep, tried, epochs, task("sweep", trials))
        rates = chosen_rates(tried_rates)
        compared = compare(rates, scans, seeds, epochs, task("comparison", len(CONTENDERS) * len(seeds)))
        rate = rates[CONTENDERS[1].name]
        fewer = range(fewer_seeds)
        scheduled = schedules(rate, scans, fewer, epochs, task("schedules", 4 * len(SCHEDULES) * fewer_seeds))
        narrow = sixteen_bits(scans, fewer, LONGER * epochs, task("16 bits", len(STORED) * fewer_seeds))
    print_sweep(tried_rates, rates)
    print_comparison(compared, rates)
    print_schedules(scheduled)
    print_sixteen_bits(narrow)
    print_buffers()
    draw(compared, narrow, output)


if __name__ == "__main__":
    main()
