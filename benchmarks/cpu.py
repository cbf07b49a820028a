"""The CPU fallback beside torch: ``python -m benchmarks.cpu``.

Prints, for each shape, the time of fastloss over that of torch's own operator (and of torch.compile's, with
``--compile``), and the bar that it is held to. Contenders take turns in one process and medians are compared; the
operating system's share of other work is printed, because it decides how far a ratio can be believed.

A turn is a block of calls, as in a training loop: the C library hands pages that one contender freed to the next, so
that single calls in turn would time each other's allocations (``--block 1`` does). Every call takes the next of
several inputs that together are larger than the caches: a training step's logits are never the last step's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.bench.workloads import rotated

from .measure import Budget, cpu_seconds, header, interleaved, others_share, verdict

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Row:
    """One line of the table."""

    name: str
    theirs: str
    ours_ms: float
    theirs_ms: float
    bar: float | None

    @property
    def ratio(self) -> float:
        return self.ours_ms / self.theirs_ms

    def __str__(self) -> str:
        return (
            f"{self.name:44} {self.ours_ms:9.3f} ms  {self.theirs:>16} {self.theirs_ms:9.3f} ms  "
            f"ratio {self.ratio:5.3f}  {verdict(self.ratio, self.bar)}"
        )


def forward_backward(loss: Callable[[Tensor, Tensor], Tensor], target: Tensor) -> Callable[[Tensor], None]:
    """A call that runs the loss and its backward pass on a leaf."""

    def call(x: Tensor) -> None:
        loss(x, target).backward()
        x.grad = None

    return call


def cross_entropy_rows(budget: Budget, compiled: bool) -> list[Row]:
    """Forward + backward, at the shapes of the project's bars."""
    bars = {
        ("float32", 64, 10): 1.15,
        ("float32", 4096, 1000): 0.6,
        ("float32", 1024, 32000): 0.5,
        ("float32", 256, 128256): 0.5,
        ("bfloat16", 64, 10): 1.15,
        ("bfloat16", 4096, 1000): 0.95,
        ("bfloat16", 1024, 32000): 0.65,
        ("bfloat16", 256, 128256): 0.65,
    }
    by_compiler = torch.compile(F.cross_entropy) if compiled else None
    rows = []
    for (dtype, n, classes), bar in bars.items():
        inputs = rotated(lambda: torch.randn(n, classes).to(_DTYPES[dtype]).requires_grad_())  # noqa: B023
        target = torch.randint(classes, (n,))
        calls = [forward_backward(f, target) for f in (fastloss.cross_entropy, F.cross_entropy)]
        if by_compiler is not None and n > 64:
            calls.append(forward_backward(by_compiler, target))
        ours, theirs, *compiler = interleaved(calls, inputs, budget)
        name = f"forward + backward ({n}, {classes}) {dtype}"
        rows.append(Row(name, "F.cross_entropy", ours, theirs, bar))
        if compiler:
            rows.append(Row(name, "torch.compile", ours, compiler[0], 1.0))
        print(*rows[-1 - len(compiler) :], sep="\n", flush=True)
    return rows


def accuracy_rows(budget: Budget) -> list[Row]:
    """Accuracy alone: top-1 beside one ``amax``, top-5 beside one ``topk``; random and mostly right rows."""
    rows = []
    for dtype in _DTYPES.values():
        for n, classes in ((4096, 1000), (2048, 32000), (512, 128256)):
            target = torch.randint(classes, (n,))
            for kind, margin, bar in (("random", 0.0, 1.5), ("trained", 8.0, 2.5)):

                def logits() -> Tensor:
                    x = torch.randn(n, classes)  # noqa: B023
                    x[torch.arange(n), target] += margin  # noqa: B023
                    return x.to(dtype)  # noqa: B023

                shape = f"({n}, {classes}) {str(dtype).removeprefix('torch.')} {kind}"
                ours, theirs, five, topk = interleaved(
                    [
                        lambda x: fastloss.accuracy(x, target),  # noqa: B023
                        lambda x: torch.amax(x, 1),
                        lambda x: fastloss.accuracy(x, target, (1, 5)),  # noqa: B023
                        lambda x: torch.topk(x, 5, 1),
                    ],
                    rotated(logits),
                    budget,
                )
                rows.append(Row(f"accuracy top-1 {shape}", "amax", ours, theirs, bar))
                rows.append(Row(f"accuracy top-1 and 5 {shape}", "topk(5)", five, topk, 1.0))
                print(*rows[-2:], sep="\n", flush=True)
    return rows


def crossover_rows(budget: Budget) -> list[Row]:
    """The fused pass beside torch's operator where logits are few: which of the two should serve them."""
    rows = []
    for dtype, torch_dtype in _DTYPES.items():
        for n, classes in (
            (64, 10),
            (128, 100),
            (1024, 10),
            (256, 100),
            (64, 1000),
            (512, 100),
            (128, 1000),
            (8192, 10),
        ):
            inputs = rotated(lambda: torch.randn(n, classes).to(torch_dtype).requires_grad_())  # noqa: B023
            target = torch.randint(classes, (n,))

            def fused(x: Tensor, target: Tensor) -> Tensor:
                with fastloss.use_backend("eager"):
                    return fastloss.cross_entropy(x, target)

            calls = [forward_backward(f, target) for f in (fused, F.cross_entropy)]
            ours, theirs = interleaved(calls, inputs, budget)
            rows.append(Row(f"fused ({n}, {classes}) = {n * classes} {dtype}", "F.cross_entropy", ours, theirs, None))
            print(rows[-1], flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each shape (default: %(default)s)")
    parser.add_argument("--block", type=int, default=10, help="calls in a turn (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="beside torch.compile too")
    parser.add_argument("--crossover", action="store_true", help="only where fused and torch's operator meet")
    parser.add_argument("--op", choices=("cross_entropy", "accuracy"), help="only this one")
    parsed = parser.parse_args(arguments)
    if parsed.block < 1:
        parser.error(f"--block is {parsed.block}; expected 1 or more")
    print(header(f"{torch.get_num_threads()} threads"))
    budget = Budget(parsed.seconds, parsed.block)
    before = cpu_seconds()
    rows: list[Row] = []
    if parsed.crossover:
        rows = crossover_rows(budget)
    else:
        if parsed.op != "accuracy":
            rows += cross_entropy_rows(budget, parsed.compile)
        if parsed.op != "cross_entropy":
            rows += accuracy_rows(budget)
    missed = [row for row in rows if row.bar is not None and row.ratio > row.bar]
    print(f"{len(missed)} bars missed; others used {others_share(before):.0%} of the CPU time")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
