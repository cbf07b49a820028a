"""SGD beside torch's: ``python -m benchmarks.sgd``.

Prints, for each set of tensors, the time of a step by fastloss.SGD and by torch.optim.SGD in its three forms, the
bytes a second that it amounts to beside those of a plain copy, the host's time a tensor, and the bars that are held
to on a CPU. Momentum 0.9, weight decay 1e-4; a step must read parameter, gradient and momentum and write parameter
and momentum, and these are the bytes counted, whatever a contender moves.

Contenders take turns of ten steps in one process, each on tensors and random gradients of its own, and medians are
compared; the copy takes its turns among them. Gradients stay where they are from step to step. Before it is timed
each contender makes a few steps with ever new gradients, and its parameters are compared with those of float64: one
that is off by more than rounding explains is marked WRONG, and nobody is compared with it.

The host's time a tensor is, on a CPU, that of a step on as many tensors of one element. On a GPU it is the time until
step() returns; nothing is waited for. With ``--launches``, where there is no GPU, it is that of the kernels' path, up
to launches that start nothing, for as many tensors of one element: with the same gradients in every step, and with
others, which lie elsewhere.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastloss
from fastloss.measuring.contenders import SGD_OPTIONS
from fastloss.measuring.sgd import MakeOptimizer, Shape, ready_step, step_errors

from .measure import (
    Budget,
    by_events,
    by_the_clock,
    circumstances,
    cpu_seconds,
    header,
    medians,
    others_share,
    verdict,
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_COPIED_BYTES = 100_000_000

OURS = "fastloss.SGD"
CONTENDERS: dict[str, MakeOptimizer] = {
    OURS: partial(fastloss.SGD, **SGD_OPTIONS),
    "torch fused=True": partial(torch.optim.SGD, fused=True, **SGD_OPTIONS),
    "torch foreach=True": partial(torch.optim.SGD, foreach=True, **SGD_OPTIONS),
    "torch foreach=False": partial(torch.optim.SGD, foreach=False, **SGD_OPTIONS),
}

# In float32. On a CPU: our time over theirs.
_BARS = {
    ("resnet50", "torch fused=True"): 1.05,
    ("large", "torch fused=True"): 1.05,
    ("small", "torch fused=True"): 0.5,
    ("resnet50", "torch foreach=True"): 0.35,
}
_HOST_BAR = 1.0  # microseconds a tensor


class Kind(NamedTuple):
    """Of tensors."""

    dtype: torch.dtype
    device: torch.device


class Variant(NamedTuple):
    """A form of fastloss.SGD."""

    name: str
    dtype: torch.dtype
    bytes: int  # that a step must move for each parameter
    options: dict[str, Any]


_MAX_NORM = 1.0  # random gradients are far longer
VARIANTS = [
    Variant("float32", torch.float32, 20, {}),
    Variant("float32, max_norm, clipped", torch.float32, 24, {"max_norm": _MAX_NORM}),
    Variant("float32, max_norm, not clipped", torch.float32, 24, {"max_norm": 1e9}),
    Variant("bfloat16", torch.bfloat16, 10, {}),
    Variant("bfloat16, max_norm, clipped", torch.bfloat16, 12, {"max_norm": _MAX_NORM}),
    Variant("bfloat16, momentum_dtype=float32", torch.bfloat16, 14, {"momentum_dtype": torch.float32}),
    Variant("bfloat16, master_weights", torch.bfloat16, 18, {"master_weights": True}),
    Variant("bfloat16, kahan_sum", torch.bfloat16, 14, {"kahan_sum": True}),
    Variant("bfloat16, stochastic_rounding", torch.bfloat16, 10, {"stochastic_rounding": True}),
]


# --------------------------------------------------------------------------------------------------------- the sets


def resnet50() -> list[Shape]:
    """ResNet-50 (He et al., "Deep Residual Learning for Image Recognition", 2015) for 1000 classes."""

    def convolution(wide: int, narrow: int, size: int) -> list[Shape]:
        return [(wide, narrow, size, size), (wide,), (wide,)]  # with its batch norm

    shapes = convolution(64, 3, 7)
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            shapes += (
                convolution(width, channels, 1) + convolution(width, width, 3) + convolution(4 * width, width, 1)
            )
            if block == 0:
                shapes += convolution(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def _scaled(shapes: Sequence[Shape], scale: int) -> list[Shape]:
    return [(max(1, shape[0] // scale), *shape[1:]) for shape in shapes]


# Each takes the number by which the set is to be smaller.
SETS: dict[str, Callable[[int], list[Shape]]] = {
    "resnet50": lambda scale: _scaled(resnet50(), scale),
    "large": lambda scale: _scaled([(2000, 2000)] * 10 + [(2500, 2000)] * 2, scale),
    "small": lambda scale: [(256,)] * max(2, 2000 // scale),
}


# ----------------------------------------------------------------------------------------------------------- timing


def _turn(call: Callable[[], object], block: int, device: torch.device) -> list[float]:
    if device.type == "cuda":
        return [by_events(call, block)]
    return [by_the_clock(call) for _ in range(block)]


def _host_turn(call: Callable[[], object], block: int, device: torch.device) -> list[float]:
    if device.type != "cuda":
        return [by_the_clock(call) for _ in range(block)]
    times = []
    for _ in range(block):
        torch.cuda.synchronize(device)  # else the call may wait for room in a full queue
        times.append(by_the_clock(call))
    return times


class Timed(NamedTuple):
    """Medians, in ms, of the contenders' steps; and what a copy's bytes come to, read and written, in GB/s."""

    steps: list[float]
    copied: float


def _timed(calls: Sequence[Callable[[], object]], device: torch.device, budget: Budget, scale: int) -> Timed:
    source = torch.randn(_COPIED_BYTES // 4 // scale, device=device)
    target = torch.zeros_like(source)
    copy: Callable[[], object] = partial(target.copy_, source)
    turns = [partial(_turn, call, budget.block, device) for call in (*calls, copy)]
    *steps, copying = medians(turns, budget.seconds)
    return Timed(steps, 2 * source.nbytes / copying / 1e6)


def _host_times(calls: Sequence[Callable[[], object]], device: torch.device, budget: Budget) -> list[float]:
    """Of a step, in microseconds."""
    turns = [partial(_host_turn, call, budget.block, device) for call in calls]
    return [1e3 * median for median in medians(turns, budget.seconds / 4)]


# ----------------------------------------------------------------------------------------------------------- tables


@dataclass
class Line:
    """What is printed of a contender; its speed counts the bytes that a step must move."""

    name: str
    ms: float
    speed: float  # GB/s
    copied: float  # a copy's GB/s
    deviation: float
    host: float | None = None  # µs a tensor
    ratio: float | None = None  # of our time to this one's
    bars: dict[str, float] = field(default_factory=dict)  # of "host" and "ratio"

    @property
    def wrong(self) -> bool:
        return not self.deviation <= 1.0

    @property
    def missed(self) -> int:
        values = {"host": self.host, "ratio": self.ratio}
        return sum((value := values[name]) is not None and value > bar for name, bar in self.bars.items())

    def __str__(self) -> str:
        parts = [
            f"{self.name:32} {self.ms:9.3f} ms  {self.speed:8.2f} GB/s  {self.speed / self.copied:5.0%} of a copy",
        ]
        if self.host is not None:
            parts.append(f"host {self.host:7.3f} us a tensor {verdict(self.host, self.bars.get('host'))}".rstrip())
        if self.wrong:
            parts.append(f"WRONG: off by {self.deviation:.3g} x what rounding explains")
        elif self.ratio is not None:
            parts.append(f"ratio {self.ratio:5.3f} {verdict(self.ratio, self.bars.get('ratio'))}".rstrip())
        return "  ".join(parts)


@dataclass
class Run:
    """The options of a run, and what it has printed."""

    kind: Kind
    budget: Budget
    scale: int
    printed: list[str] = field(default_factory=list)

    def say(self, line: object) -> None:
        print(line, flush=True)
        self.printed.append(str(line))

    def contest(self, name: str) -> list[Line]:
        """All contenders on one set."""
        shapes, (dtype, device) = SETS[name](self.scale), self.kind
        floats, size = sum(map(math.prod, shapes)), 5 * dtype.itemsize
        makes = list(CONTENDERS.values())
        off = [errors.of_rounding for errors in step_errors(makes, shapes, *self.kind)]
        calls = [ready_step(make, shapes, *self.kind) for make in makes]
        times, copied = _timed(calls, device, self.budget, self.scale)
        if device.type != "cuda":
            calls = [ready_step(make, [(1,) * len(shape) for shape in shapes], *self.kind) for make in makes]
        hosts = _host_times(calls, device, self.budget)
        is_held = dtype == torch.float32 and self.scale == 1
        lines = []
        for contender, ms, host, mine in zip(CONTENDERS, times, hosts, off, strict=True):
            line = Line(contender, ms, floats * size / ms / 1e6, copied, mine, host / len(shapes))
            if contender != OURS and not line.wrong:
                line.ratio = times[0] / ms
            if is_held and contender == OURS:
                line.bars["host"] = _HOST_BAR
            if is_held and device.type == "cpu" and (name, contender) in _BARS:
                line.bars["ratio"] = _BARS[name, contender]
            lines.append(line)
        self.say(
            f"{name}: {len(shapes)} tensors, {floats / 1e6:.2f} M {_named(dtype)}, {size} bytes each; "
            f"a copy moves {copied:.2f} GB/s"
        )
        for line in lines:
            self.say(line)
        return lines

    def launches(self, name: str) -> int:
        """The host's time alone, with gradients that stay and with others; 1 if the bar is missed."""
        shapes = [(1,) * len(shape) for shape in SETS[name](self.scale)]
        options = self.kind._asdict()
        params, *sets = ([torch.randn(shape, **options) for shape in shapes] for _ in range(3))
        step = CONTENDERS[OURS](params).step

        def give() -> None:
            for param, grad in zip(params, sets[0], strict=True):
                param.grad = grad
            sets.reverse()

        def moved() -> list[float]:
            give()
            return [by_the_clock(step)]

        give()
        for _ in range(3):
            step()
        stay = partial(_host_turn, step, self.budget.block, self.kind.device)
        host, elsewhere = (1e3 * median / len(shapes) for median in medians([stay, moved], self.budget.seconds))
        bar = _HOST_BAR if self.scale == 1 else None
        self.say(
            f"{name + ':':10} {len(shapes):5} tensors  host {host:7.3f} us a tensor {verdict(host, bar)}".rstrip()
            + f"  {elsewhere:7.3f} where gradients have moved"
        )
        return int(bar is not None and host > bar)

    def variants(self, name: str) -> list[Line]:
        """Fastloss alone, in all its forms, on one set."""
        shapes, device = SETS[name](self.scale), self.kind.device
        floats = sum(map(math.prod, shapes))
        makes = [partial(fastloss.SGD, **SGD_OPTIONS, **variant.options) for variant in VARIANTS]
        kinds = [Kind(variant.dtype, device) for variant in VARIANTS]
        off = [0.0 for _ in VARIANTS]
        alike: dict[Any, list[int]] = {}  # those that have one float64 run in common
        for number, (variant, kind) in enumerate(zip(VARIANTS, kinds, strict=True)):
            alike.setdefault((kind, variant.options.get("max_norm")), []).append(number)
        for (kind, max_norm), numbers in alike.items():
            found = step_errors([makes[number] for number in numbers], shapes, *kind, max_norm=max_norm)
            for number, errors in zip(numbers, found, strict=True):
                off[number] = errors.of_rounding
        calls = [ready_step(make, shapes, *kind) for make, kind in zip(makes, kinds, strict=True)]
        times, copied = _timed(calls, device, self.budget, self.scale)
        self.say(
            f"variants, {name}: {len(shapes)} tensors, {floats / 1e6:.2f} M parameters; "
            f"a copy moves {copied:.2f} GB/s"
        )
        lines = []
        for variant, ms, mine in zip(VARIANTS, times, off, strict=True):
            lines.append(Line(variant.name, ms, floats * variant.bytes / ms / 1e6, copied, mine))
            self.say(f"{lines[-1]}  at {variant.bytes} bytes each")
        return lines


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------- command


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; exit code 1 if a bar is missed or fastloss is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parsed = _parsed(arguments)
    kind = Kind(_DTYPES[parsed.dtype], torch.device(parsed.device))
    run = Run(kind, Budget(parsed.seconds, parsed.block), parsed.scale)
    where = "launches that start nothing" if parsed.launches else parsed.device
    run.say(header(f"{torch.get_num_threads()} threads", where, parsed.dtype))
    if parsed.scale != 1:
        run.say(f"sets of a {parsed.scale}th of their size: no bars")
    before = cpu_seconds()
    names = [parsed.set] if parsed.set else list(SETS)
    if parsed.launches:
        from .no_gpu import pretend

        pretend()
        missed = sum(run.launches(name) for name in names)
        run.say(f"{missed} bars missed; others used {others_share(before):.0%} of the CPU time")
        return 1 if missed else 0
    tables = [run.contest(name) for name in names]
    ours = [table[0] for table in tables]
    if parsed.variants:
        alone = [run.variants(name) for name in names]
        ours += [line for table in alone for line in table]
    missed = sum(line.missed for table in tables for line in table)
    wrong = sum(line.wrong for line in ours)
    found = f"{missed} bars missed; " + (f"fastloss WRONG in {wrong} lines; " if wrong else "")
    run.say(f"{found}others used {others_share(before):.0%} of the CPU time")
    if parsed.output is not None:
        parsed.output.write_text(_record(run, arguments), encoding="utf-8")
    return 1 if missed or wrong else 0


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sgd", description=__doc__, allow_abbrev=False)
    parser.add_argument("--set", choices=SETS, help="only this one")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each table (default: %(default)s)")
    parser.add_argument("--block", type=int, default=10, help="steps in a turn (default: %(default)s)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: cuda where there is one; here: %(default)s)",
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="(default: %(default)s)")
    parser.add_argument("--variants", action="store_true", help="and fastloss alone, with clipping and in 16 bits")
    parser.add_argument("--launches", action="store_true", help="the kernels' host side alone, without a GPU")
    parser.add_argument("--scale", type=int, default=1, help="make the sets so many times smaller; no bars then")
    parser.add_argument("--output", type=Path, help="write a record in Markdown to this file")
    parsed = parser.parse_args(arguments)
    if not 0 <= parsed.seconds < math.inf:
        parser.error(f"argument --seconds: {parsed.seconds} is not a time")
    for name in ("block", "scale"):
        if getattr(parsed, name) < 1:
            parser.error(f"argument --{name}: must be 1 or more, got {getattr(parsed, name)}")
    if parsed.launches:
        if parsed.variants or parsed.output is not None:
            parser.error("argument --launches: goes with neither --variants nor --output")
        parsed.device = "cpu"
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no cuda here (choose cpu)")
    if parsed.output is not None and (parsed.output.is_dir() or not parsed.output.parent.is_dir()):
        parser.error(f"argument --output: no file can be written at {parsed.output}")
    return parsed


def _record(run: Run, arguments: list[str]) -> str:
    """The record: how it was made and what was printed. Where it lies is not part of it."""
    shown, following = [], iter(arguments)
    for argument in following:
        if argument == "--output":
            next(following)
        elif not argument.startswith("--output="):
            shown.append(argument)
    command = shlex.join(["python", "-m", "benchmarks.sgd", *shown])
    block = run.budget.block
    text = (
        f"`{command}` {circumstances(run.kind.device)}. Medians of turns of {block} steps in one process. A line's "
        "ratio is fastloss's time over this contender's."
    )
    return "\n".join(["# SGD beside torch's", "", text, "", "```", *run.printed, "```", ""])


if __name__ == "__main__":
    sys.exit(main())
