"""The CPU fallback beside torch: ``python -m benchmarks.cpu``.

Prints, for each shape, the time of fastloss over that of torch's own operator (and of torch.compile's, with
``--compile``), and the bar that it is held to. Contenders take turns in one process and medians are compared. The
share of the CPU time that other processes used is printed: it decides how far a ratio can be believed.

A turn is a block of calls, as in a training loop: the C library hands pages that one contender freed to the next, so
that single calls in turn would time each other's allocations (``--block 1`` does). Every call takes the next of
several inputs that together are larger than the caches: a training step's logits are never the last step's.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.measuring.clock import medians
from fastloss.measuring.inputs import rotated

from .shared import CPU, Report, name_of, parsed_by, parser_of, verdict

Function = Callable[[Tensor, Tensor], Any]  # takes logits and labels
Call = Callable[[Tensor], object]  # takes logits

_DTYPES = (torch.float32, torch.bfloat16)
# Rows, classes, and the bars of forward + backward in float32 and in bfloat16.
_BARS = ((64, 10, 1.08, 1.08), (4096, 1000, 0.6, 0.95), (1024, 32000, 0.5, 0.65), (256, 128256, 0.5, 0.65))
_ACCURACY_SHAPES = ((4096, 1000), (2048, 32000), (512, 128256))
# Random logits and those of a trained model: by how much the label's is raised, and the bar of top-1.
_MARGINS = {"random": (0.0, 1.5), "trained": (8.0, 2.5)}
_FEW = ((64, 10), (128, 100), (1024, 10), (256, 100), (64, 1000), (512, 100), (128, 1000), (8192, 10))  # crossover


class Pair(NamedTuple):
    """A call of ours and another's, and the bar for the quotient of their times."""

    name: str
    ours: Call
    other: str
    theirs: Call
    bar: float | None


Contest = tuple[Sequence[Tensor], list[Pair]]  # calls that take turns, each with the next of the inputs


def compare(
    contests: Iterable[Contest],
    form: Callable[[Pair, float, float], str],
    *,
    budget: float,
    block: int,
    say: Callable[[str], object] = print,
) -> int:
    """Time each contest, say a line for each of its pairs, and return the number of bars that are missed."""
    missed = 0
    for inputs, pairs in contests:
        following = itertools.cycle(inputs)
        calls = list(dict.fromkeys(call for pair in pairs for call in (pair.ours, pair.theirs)))
        steps = [partial(call, *inputs) if len(inputs) == 1 else partial(_next, call, following) for call in calls]
        for step in (*steps, *steps):
            step()
        seconds = dict(zip(calls, medians(steps, CPU, budget=budget, block=block), strict=True))
        for pair in pairs:
            ours, theirs = seconds[pair.ours], seconds[pair.theirs]
            missed += pair.bar is not None and ours / theirs > pair.bar
            say(form(pair, ours, theirs))
    return missed


def _next(call: Call, following: Iterator[Tensor]) -> None:
    call(next(following))


def forward(function: Function, target: Tensor) -> Call:
    """Return a call of the function alone."""
    return lambda x: function(x, target)


def forward_backward(loss: Function, target: Tensor) -> Call:
    """Return a call that runs the loss and its backward pass on a leaf."""

    def call(x: Tensor) -> None:
        loss(x, target).backward()
        x.grad = None

    return call


def fused(x: Tensor, target: Tensor) -> Tensor:
    """Compute the loss by the fused pass, where torch's operator would serve so few logits."""
    with fastloss.use_backend("eager"):
        return fastloss.cross_entropy(x, target)


def losses(compiled: bool) -> Iterator[Contest]:
    """Yield forward and backward at the shapes of the project's bars."""
    by_compiler = torch.compile(F.cross_entropy) if compiled else None
    for number, dtype in enumerate(_DTYPES):
        for rows, classes, *bars in _BARS:
            name, target = f"forward + backward ({rows}, {classes}) {name_of(dtype)}", torch.randint(classes, (rows,))
            ours, theirs = forward_backward(fastloss.cross_entropy, target), forward_backward(F.cross_entropy, target)
            pairs = [Pair(name, ours, "F.cross_entropy", theirs, bars[number])]
            if by_compiler is not None and rows > 64:
                pairs.append(Pair(name, ours, "torch.compile", forward_backward(by_compiler, target), 1.0))
            yield _leaves(rows, classes, dtype), pairs


def crossover() -> Iterator[Contest]:
    """Yield the fused pass and torch's operator where logits are few: which of the two should serve them."""
    for dtype, (rows, classes) in itertools.product(_DTYPES, _FEW):
        name = f"fused ({rows}, {classes}) = {rows * classes} {name_of(dtype)}"
        target = torch.randint(classes, (rows,))
        ours, theirs = forward_backward(fused, target), forward_backward(F.cross_entropy, target)
        yield _leaves(rows, classes, dtype), [Pair(name, ours, "F.cross_entropy", theirs, None)]


def _leaves(rows: int, classes: int, dtype: torch.dtype) -> list[Tensor]:
    return rotated(lambda: torch.randn(rows, classes).to(dtype).requires_grad_())


def accuracies() -> Iterator[Contest]:
    """Yield top-1 beside one ``amax`` and top-5 beside one ``topk``, of random and of mostly right rows."""
    return itertools.starmap(_accuracy, itertools.product(_DTYPES, _ACCURACY_SHAPES, _MARGINS))


def _accuracy(dtype: torch.dtype, shape: tuple[int, int], rows: str) -> Contest:
    target = torch.randint(shape[1], shape[:1])
    margin, bar = _MARGINS[rows]

    def logits() -> Tensor:
        x = torch.randn(shape)
        x[torch.arange(shape[0]), target] += margin
        return x.to(dtype)

    name = f"{shape} {name_of(dtype)} {rows}"
    top_1, top_5 = forward(fastloss.accuracy, target), forward(partial(fastloss.accuracy, topk=(1, 5)), target)
    return rotated(logits), [
        Pair(f"accuracy top-1 {name}", top_1, "amax", lambda x: x.amax(1), bar),
        Pair(f"accuracy top-1 and 5 {name}", top_5, "topk(5)", lambda x: x.topk(5, 1), 1.0),
    ]


def _form(pair: Pair, ours: float, theirs: float) -> str:
    ratio = ours / theirs
    return (
        f"{pair.name:44} {1e3 * ours:9.3f} ms  {pair.other:>16} {1e3 * theirs:9.3f} ms  "
        f"ratio {ratio:5.3f}  {verdict(ratio, pair.bar)}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit code 1 if a bar is missed."""
    parser = parser_of("cpu", __doc__, seconds=5.0, each="shape", device=False)
    parser.add_argument("--block", type=int, default=10, help="calls in a turn (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="beside torch.compile too")
    parser.add_argument("--crossover", action="store_true", help="only where fused and torch's operator meet")
    parser.add_argument("--op", choices=("cross_entropy", "accuracy"), help="only this one")
    options = parsed_by(parser, arguments)
    report = Report("cpu", arguments, f"{torch.get_num_threads()} threads")
    by_op = {"cross_entropy": losses(options.compile), "accuracy": accuracies()}
    chosen = [crossover()] if options.crossover else [by_op[options.op]] if options.op else by_op.values()
    compare(itertools.chain(*chosen), _form, budget=options.seconds, block=options.block, say=report.say)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
