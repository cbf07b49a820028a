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
to launches that start nothing, for as many tensors of one element: with the same gradients in every step, beside
torch's whole ``fused=True`` on the CPU, and with others, which lie elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

import fastloss
from fastloss.measuring.clock import Copy, medians, repeated
from fastloss.measuring.contenders import DTYPES, SGD_OPTIONS
from fastloss.measuring.inputs import count, resnet50_shapes
from fastloss.measuring.sgd import MakeOptimizer, Shape, ready_step, step_errors

from .shared import CPU, Report, name_of, parsed_by, parser_of, verdict

_COPIED_BYTES = 100_000_000
OURS, _FUSED = "fastloss.SGD", "torch fused=True"
CONTENDERS: dict[str, MakeOptimizer] = {
    OURS: partial(fastloss.SGD, **SGD_OPTIONS),
    _FUSED: partial(torch.optim.SGD, fused=True, **SGD_OPTIONS),
    "torch foreach=True": partial(torch.optim.SGD, foreach=True, **SGD_OPTIONS),
    "torch foreach=False": partial(torch.optim.SGD, foreach=False, **SGD_OPTIONS),
}

# In float32. On a CPU: our time over theirs.
_BARS = {
    ("resnet50", _FUSED): 1.05,
    ("large", _FUSED): 1.05,
    ("small", _FUSED): 0.5,
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


# fastloss alone: the bytes that a step must move for each parameter, and the options. Random gradients are far longer
# than a norm of 1.
_VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "float32": (20, {}),
    "float32, max_norm, clipped": (24, {"max_norm": 1.0}),
    "float32, max_norm, not clipped": (24, {"max_norm": 1e9}),
    "bfloat16": (10, {}),
    "bfloat16, max_norm, clipped": (12, {"max_norm": 1.0}),
    "bfloat16, momentum_dtype=float32": (14, {"momentum_dtype": torch.float32}),
    "bfloat16, master_weights": (18, {"master_weights": True}),
    "bfloat16, kahan_sum": (14, {"kahan_sum": True}),
    "bfloat16, stochastic_rounding": (10, {"stochastic_rounding": True}),
}
VARIANTS = [
    Form(name, partial(fastloss.SGD, **SGD_OPTIONS, **how), DTYPES[name.split(",")[0]], size, how.get("max_norm"))
    for name, (size, how) in _VARIANTS.items()
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
    bars: tuple[float | None, float | None] = None, None  # of host and ratio

    @property
    def wrong(self) -> bool:
        return not self.deviation <= 1.0

    def __str__(self) -> str:
        line = f"{self.name:32} {self.ms:9.3f} ms  {self.speed:8.2f} GB/s  {self.speed / self.copied:5.0%} of a copy"
        if self.host is not None:
            line += f"  host {self.host:7.3f} us a tensor {verdict(self.host, self.bars[0])}".rstrip()
        if self.wrong:
            line += f"  WRONG: off by {self.deviation:.3g} x what rounding explains"
        elif self.ratio is not None:
            line += f"  ratio {self.ratio:5.3f} {verdict(self.ratio, self.bars[1])}".rstrip()
        return line


@dataclass
class Run:
    """The options of a run, and what it prints."""

    report: Report
    dtype: torch.dtype
    device: torch.device
    seconds: float
    block: int
    scale: int
    wrong: int = 0  # lines in which fastloss is

    def lines(self, forms: Sequence[Form], shapes: Sequence[Shape]) -> list[Line]:
        """Check and time the steps of all forms, and a copy in turn with them."""
        off: dict[str, float] = {}
        for dtype, max_norm in dict.fromkeys((form.dtype, form.max_norm) for form in forms):
            alike = {form.name: form.make for form in forms if (form.dtype, form.max_norm) == (dtype, max_norm)}
            errors = step_errors([*alike.values()], shapes, dtype, self.device, max_norm=max_norm)
            off.update(zip(alike, (error.of_rounding for error in errors), strict=True))
        copy, elements = Copy(self.device, _COPIED_BYTES), count(shapes)
        steps = [ready_step(form.make, shapes, form.dtype, self.device) for form in forms]
        *times, copying = medians([*steps, copy.step], self.device, budget=self.seconds, block=self.block)
        copied = copy.gigabytes_per_second(copying)
        lines = [
            Line(form.name, 1e3 * time, elements * form.bytes / time / 1e9, copied, off[form.name])
            for form, time in zip(forms, times, strict=True)
        ]
        self.wrong += sum(line.wrong for line in lines if line.name == OURS or forms is VARIANTS)
        return lines

    def contest(self, name: str) -> None:
        """Check, time and print all contenders on one set."""
        shapes, size = shrunk(name, self.scale), 5 * self.dtype.itemsize
        forms = [Form(each, make, self.dtype, size) for each, make in CONTENDERS.items()]
        lines = self.lines(forms, shapes)
        few = shapes if self.device.type == "cuda" else _of_one_element(shapes)
        steps = [ready_step(make, few, self.dtype, self.device) for make in CONTENDERS.values()]
        # On a GPU a call may wait for room in a full queue: it begins with an empty one.
        empty = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        hosts = medians(steps, CPU, budget=self.seconds / 4, block=self.block, before=empty)
        words = f"{count(shapes) / 1e6:.2f} M {name_of(self.dtype)}, {size} bytes each"
        self.report.say(f"{name}: {len(shapes)} tensors, {words}; a copy moves {lines[0].copied:.2f} GB/s")
        for line, host in zip(lines, hosts, strict=True):
            line.host = 1e6 * host / len(shapes)
            line.ratio = lines[0].ms / line.ms if line.name != OURS else None
            if self.dtype == torch.float32 and self.scale == 1:
                ratio = _BARS.get((name, line.name)) if self.device.type == "cpu" else None
                line.bars = _HOST_BAR if line.name == OURS else None, ratio
        self.report.say(*lines)

    def launches(self, name: str) -> None:
        """Time the host alone, with gradients that stay and with others."""
        shapes = _of_one_element(shrunk(name, self.scale))
        params, *gradients = ([torch.randn(shape, dtype=self.dtype) for shape in shapes] for _ in range(3))
        step = CONTENDERS[OURS](params).step
        fused = ready_step(CONTENDERS[_FUSED], shapes, self.dtype, CPU)

        def move() -> None:
            gradients.reverse()
            for param, gradient in zip(params, gradients[0], strict=True):
                param.grad = gradient

        move()
        repeated(step, 3)
        stayed, theirs = medians([step, fused], CPU, budget=self.seconds / 2, block=self.block)
        (moved,) = medians([step], CPU, budget=self.seconds / 2, before=move)
        host, theirs, moved = (1e6 * time / len(shapes) for time in (stayed, theirs, moved))
        bar = verdict(host, _HOST_BAR if self.scale == 1 else None)
        words = f"{name + ':':10} {len(shapes):5} tensors  host {host:7.3f} us a tensor {bar}".rstrip()
        beside = f"fused=True {theirs:7.3f} ratio {host / theirs:5.3f}"
        self.report.say(f"{words}  {beside}  {moved:7.3f} where gradients have moved")

    def variants(self, name: str) -> None:
        """Check, time and print fastloss alone, in all its forms, on one set."""
        shapes = shrunk(name, self.scale)
        lines = self.lines(VARIANTS, shapes)
        words = f"{len(shapes)} tensors, {count(shapes) / 1e6:.2f} M parameters"
        self.report.say(f"variants, {name}: {words}; a copy moves {lines[0].copied:.2f} GB/s")
        self.report.say(*(f"{line}  at {form.bytes} bytes each" for line, form in zip(lines, VARIANTS, strict=True)))


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; exit code 1 if a bar is missed or fastloss is wrong."""
    parser = parser_of("sgd", __doc__, seconds=10.0, each="table", output=True)
    parser.add_argument("--set", choices=SETS, help="only this one")
    parser.add_argument("--block", type=int, default=10, help="steps in a turn (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--variants", action="store_true", help="and fastloss alone, with clipping and in 16 bits")
    parser.add_argument("--launches", action="store_true", help="the kernels' host side alone, without a GPU")
    parser.add_argument("--scale", type=int, default=1, help="make the sets so many times smaller; no bars then")
    options = parsed_by(parser, arguments)
    if options.launches and (options.variants or options.output is not None):
        parser.error("argument --launches: goes with neither --variants nor --output")
    device = CPU if options.launches else torch.device(options.device)
    where = "launches that start nothing" if options.launches else options.device
    report = Report("sgd", arguments, f"{torch.get_num_threads()} threads", where, options.dtype)
    run = Run(report, DTYPES[options.dtype], device, options.seconds, options.block, options.scale)
    if options.scale != 1:
        report.say(f"sets of a {options.scale}th of their size: no bars")
    if options.launches:
        from .no_gpu import pretend

        pretend()
    parts = [run.launches] if options.launches else [run.contest, run.variants] if options.variants else [run.contest]
    for part in parts:
        for name in [options.set] if options.set else SETS:
            part(name)
    code = report.close(f"fastloss WRONG in {run.wrong} lines; " if run.wrong else "")
    words = f"Medians of turns of {options.block} steps in one process. "
    words += "A line's ratio is fastloss's time over this contender's."
    report.write(options.output, "SGD beside torch's", device, words)
    return code


if __name__ == "__main__":
    sys.exit(main())
