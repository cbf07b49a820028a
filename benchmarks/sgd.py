"""SGD beside torch's: ``python -m benchmarks.sgd``.

Prints, for each set of tensors, the time of a step by fastloss.SGD and by torch.optim.SGD in its three forms, the
bytes a second that it amounts to beside those of a plain copy, the host's time a tensor, and the bars that are held
to on a CPU. Momentum 0.9, weight decay 1e-4; a step must read parameter, gradient and momentum and write parameter
and momentum, and these are the bytes counted, whatever a contender moves.

Contenders take turns of ten steps in one process, each on tensors and random gradients of its own, and medians are
compared; the copy takes its turns among them. Gradients stay where they are from step to step. Before it is timed
each contender makes a few steps with ever new gradients, and its parameters are compared with those of float64: a
contender that is off by more than rounding explains is marked WRONG and not compared with.

The host's time a tensor is, on a CPU, that of a step on as many tensors of one element. On a GPU it is the time until
step() returns; nothing is waited for. With ``--launches``, where there is no GPU, it is that of the kernels' path, up
to launches that start nothing, for as many tensors of one element: with the same gradients in every step, and with
others, which lie elsewhere.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

import fastloss
from fastloss.measuring.clock import Step, in_turns, medians, repeated, seconds
from fastloss.measuring.contenders import SGD_OPTIONS
from fastloss.measuring.inputs import resnet50_shapes
from fastloss.measuring.limits import Copy
from fastloss.measuring.machine import OtherPrograms
from fastloss.measuring.sgd import MakeOptimizer, Shape, ready_step, step_errors

from .shared import CPU, closing, header, name_of, parsed_by, parser_of, verdict, write_record

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


class Form(NamedTuple):
    """A form of an optimizer."""

    name: str
    make: MakeOptimizer
    dtype: torch.dtype
    bytes: int  # that a step must move for each parameter
    max_norm: float | None = None


def _variant(name: str, bytes: int, max_norm: float | None = None, **options: Any) -> Form:
    dtype = getattr(torch, name.partition(",")[0])
    return Form(name, partial(fastloss.SGD, **SGD_OPTIONS, max_norm=max_norm, **options), dtype, bytes, max_norm)


_MAX_NORM = 1.0  # random gradients are far longer
VARIANTS = [
    _variant("float32", 20),
    _variant("float32, max_norm, clipped", 24, _MAX_NORM),
    _variant("float32, max_norm, not clipped", 24, 1e9),
    _variant("bfloat16", 10),
    _variant("bfloat16, max_norm, clipped", 12, _MAX_NORM),
    _variant("bfloat16, momentum_dtype=float32", 14, momentum_dtype=torch.float32),
    _variant("bfloat16, master_weights", 18, master_weights=True),
    _variant("bfloat16, kahan_sum", 14, kahan_sum=True),
    _variant("bfloat16, stochastic_rounding", 10, stochastic_rounding=True),
]

SETS: dict[str, list[Shape]] = {
    "resnet50": resnet50_shapes(),
    "large": [*[(2000, 2000)] * 10, *[(2500, 2000)] * 2],
    "small": [(256,)] * 2000,
}


def shrunk(name: str, scale: int) -> list[Shape]:
    """Return a set's shapes with the first dimension divided by ``scale``; of "small" there are fewer instead."""
    if name == "small":
        return SETS[name][: max(2, len(SETS[name]) // scale)]
    return [(max(1, shape[0] // scale), *shape[1:]) for shape in SETS[name]]


def _elements(shapes: Sequence[Shape]) -> int:
    return sum(map(math.prod, shapes))


def _of_one_element(shapes: Sequence[Shape]) -> list[Shape]:
    return [tuple(1 for _ in shape) for shape in shapes]


@dataclass
class Line:
    """The printed line of a contender; its speed counts the bytes that a step must move."""

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
        line = f"{self.name:32} {self.ms:9.3f} ms  {self.speed:8.2f} GB/s  {self.speed / self.copied:5.0%} of a copy"
        if self.host is not None:
            line += f"  host {self.host:7.3f} us a tensor {verdict(self.host, self.bars.get('host'))}".rstrip()
        if self.wrong:
            line += f"  WRONG: off by {self.deviation:.3g} x what rounding explains"
        elif self.ratio is not None:
            line += f"  ratio {self.ratio:5.3f} {verdict(self.ratio, self.bars.get('ratio'))}".rstrip()
        return line


@dataclass
class Run:
    """The options of a run, and the lines that it has printed."""

    dtype: torch.dtype
    device: torch.device
    seconds: float
    block: int
    scale: int
    printed: list[str] = field(default_factory=list)

    def say(self, line: object) -> None:
        print(line, flush=True)
        self.printed.append(str(line))

    def lines(self, forms: Sequence[Form], shapes: Sequence[Shape]) -> list[Line]:
        """Check and time the steps of all forms, and a copy in turn with them."""
        off: dict[str, float] = {}
        for dtype, max_norm in dict.fromkeys((form.dtype, form.max_norm) for form in forms):
            alike = [form for form in forms if (form.dtype, form.max_norm) == (dtype, max_norm)]
            errors = step_errors([form.make for form in alike], shapes, dtype, self.device, max_norm=max_norm)
            off.update((form.name, error.of_rounding) for form, error in zip(alike, errors, strict=True))
        copy, elements = Copy(self.device, _COPIED_BYTES), _elements(shapes)
        steps = [ready_step(form.make, shapes, form.dtype, self.device) for form in forms]
        *times, copying = medians([*steps, copy.step], self.device, budget=self.seconds, block=self.block)
        copied = copy.gigabytes_per_second(copying)
        return [
            Line(form.name, 1e3 * time, elements * form.bytes / time / 1e9, copied, off[form.name])
            for form, time in zip(forms, times, strict=True)
        ]

    def contest(self, name: str) -> list[Line]:
        """Check, time and print all contenders on one set."""
        shapes, size = shrunk(name, self.scale), 5 * self.dtype.itemsize
        lines = self.lines([Form(each, make, self.dtype, size) for each, make in CONTENDERS.items()], shapes)
        few = shapes if self.device.type == "cuda" else _of_one_element(shapes)
        steps = [ready_step(make, few, self.dtype, self.device) for make in CONTENDERS.values()]
        hosts = in_turns(steps, self.until_return, budget=max(self.seconds / 4, 1e-9), least=-(-5 // self.block))
        is_held = self.dtype == torch.float32 and self.scale == 1
        words = f"{_elements(shapes) / 1e6:.2f} M {name_of(self.dtype)}, {size} bytes each"
        self.say(f"{name}: {len(shapes)} tensors, {words}; a copy moves {lines[0].copied:.2f} GB/s")
        for line, times in zip(lines, hosts, strict=True):
            line.host = 1e6 * statistics.median(itertools.chain(*times)) / len(shapes)
            if line.name != OURS and not line.wrong:
                line.ratio = lines[0].ms / line.ms
            if is_held and line.name == OURS:
                line.bars["host"] = _HOST_BAR
            if is_held and self.device.type == "cpu" and (name, line.name) in _BARS:
                line.bars["ratio"] = _BARS[name, line.name]
            self.say(line)
        return lines

    def until_return(self, step: Step) -> list[float]:
        """Return the seconds until ``step`` returns, of a block of calls."""
        times = []
        for _ in range(self.block):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # else the call may wait for room in a full queue
            times.append(seconds(step, CPU))
        return times

    def launches(self, name: str) -> int:
        """Time the host alone, with gradients that stay and with others; return 1 if the bar is missed."""
        shapes = _of_one_element(shrunk(name, self.scale))
        params, *gradients = ([torch.randn(shape, dtype=self.dtype) for shape in shapes] for _ in range(3))
        step = CONTENDERS[OURS](params).step

        def move() -> None:
            gradients.reverse()
            for param, gradient in zip(params, gradients[0], strict=True):
                param.grad = gradient

        def turn(prepare: Step) -> list[float]:
            prepare()
            return self.until_return(step)

        move()
        repeated(step, 3)
        stayed, after_moves = in_turns([lambda: None, move], turn, budget=max(self.seconds, 1e-9))
        host = 1e6 * statistics.median(itertools.chain(*stayed)) / len(shapes)
        moved = 1e6 * statistics.median(times[0] for times in after_moves) / len(shapes)
        bar = _HOST_BAR if self.scale == 1 else None
        words = f"{name + ':':10} {len(shapes):5} tensors  host {host:7.3f} us a tensor {verdict(host, bar)}".rstrip()
        self.say(f"{words}  {moved:7.3f} where gradients have moved")
        return int(bar is not None and host > bar)

    def variants(self, name: str) -> list[Line]:
        """Check, time and print fastloss alone, in all its forms, on one set."""
        shapes = shrunk(name, self.scale)
        lines = self.lines(VARIANTS, shapes)
        words = f"{len(shapes)} tensors, {_elements(shapes) / 1e6:.2f} M parameters"
        self.say(f"variants, {name}: {words}; a copy moves {lines[0].copied:.2f} GB/s")
        for line, form in zip(lines, VARIANTS, strict=True):
            self.say(f"{line}  at {form.bytes} bytes each")
        return lines


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; exit code 1 if a bar is missed or fastloss is wrong."""
    options = _parsed(arguments)
    device = torch.device(options.device)
    run = Run(getattr(torch, options.dtype), device, options.seconds, options.block, options.scale)
    where = "launches that start nothing" if options.launches else options.device
    run.say(header(f"{torch.get_num_threads()} threads", where, options.dtype))
    if options.scale != 1:
        run.say(f"sets of a {options.scale}th of their size: no bars")
    names, wrong = [options.set] if options.set else list(SETS), 0
    others = OtherPrograms()
    if options.launches:
        from .no_gpu import pretend

        pretend()
        missed = sum(map(run.launches, names))
    else:
        tables = list(map(run.contest, names))
        alone = list(map(run.variants, names)) if options.variants else []
        missed = sum(line.missed for line in itertools.chain(*tables))
        wrong = sum(line.wrong for line in itertools.chain((ours for ours, *_ in tables), *alone))
    run.say(closing(missed, others, f"fastloss WRONG in {wrong} lines; " if wrong else ""))
    if options.output is not None:
        words = f"Medians of turns of {options.block} steps in one process. "
        words += "A line's ratio is fastloss's time over this contender's."
        write_record(options.output, "SGD beside torch's", "sgd", arguments, device, words, run.printed)
    return int(missed > 0 or wrong > 0)


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("sgd", __doc__, seconds=10.0, each="table", output=True)
    parser.add_argument("--set", choices=SETS, help="only this one")
    parser.add_argument("--block", type=int, default=10, help="steps in a turn (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--variants", action="store_true", help="and fastloss alone, with clipping and in 16 bits")
    parser.add_argument("--launches", action="store_true", help="the kernels' host side alone, without a GPU")
    parser.add_argument("--scale", type=int, default=1, help="make the sets so many times smaller; no bars then")
    options = parsed_by(parser, arguments)
    if options.launches:
        if options.variants or options.output is not None:
            parser.error("argument --launches: goes with neither --variants nor --output")
        options.device = "cpu"
    return options


if __name__ == "__main__":
    sys.exit(main())
