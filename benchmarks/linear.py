"""linear_cross_entropy beside torch's two ways to it: ``python -m benchmarks.linear``.

Forward and backward, with gradients of the hidden states and of the head; time in turns, and the most memory that is
held beyond inputs and gradients. Beside them stand the three bare products that nobody can do without. On a CPU
everybody's gradients are held against float64 before anything is timed, and who is off is no one's measure;
``python -m fastloss bench --op linear`` does so on a GPU too. Other shapes than the chosen ones have no bars.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.measuring.machine import peak_bytes

from .measure import by_events, by_the_clock, circumstances, cpu_seconds, header, medians, others_share, verdict

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

CPU_SHAPES = ((1024, 256, 32000), (512, 512, 128256))
GPU_SHAPES = ((8192, 4096, 128256),)
TIME_BAR, MEMORY_BAR, GPU_TIME_BAR = 1.0, 0.25, 1.15
_TIMES_PLAIN = 4.0  # an error past so many times the plain form's is pointed at
_OURS, _PLAIN, _TORCH = "fastloss.linear_cross_entropy", "F.cross_entropy(F.linear)", "F.linear_cross_entropy"


def plain(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """The two functions."""
    return F.cross_entropy(F.linear(x, w), target)


def contenders() -> dict[str, Loss]:
    """Who is there, by name."""
    found: dict[str, Loss] = {_OURS: fastloss.linear_cross_entropy, _PLAIN: plain}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        found[_TORCH] = partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
    return found


@dataclass(frozen=True)
class Problem:
    """Hidden states ``(N, D)`` and head ``(C, D)``, which require gradients, and labels ``(N,)``."""

    x: Tensor
    w: Tensor
    target: Tensor

    @staticmethod
    def random(rows: int, features: int, classes: int, dtype: torch.dtype, device: torch.device) -> Problem:
        x = torch.randn(rows, features, device=device).to(dtype).requires_grad_()
        w = (torch.randn(classes, features, device=device) * 2 / features**0.5).to(dtype).requires_grad_()
        return Problem(x, w, torch.randint(classes, (rows,), device=device))

    def step(self, loss: Loss) -> None:
        """Forward and backward; the gradients are dropped at the next step."""
        self.x.grad = self.w.grad = None
        loss(self.x, self.w, self.target).backward()

    def products(self) -> None:
        """The three products alone."""
        with torch.no_grad():
            z = self.x @ self.w.t()
            _ = z @ self.w, z.t() @ self.x

    def errors(self, losses: dict[str, Loss]) -> dict[str, float]:
        """Of the gradients, relative: the norm of the difference over the norm, the greater of the two."""
        gradients = {}
        for name, loss in losses.items():
            self.step(loss)
            gradients[name] = self.x.grad, self.w.grad
        x, w = (t.detach().double().requires_grad_() for t in (self.x, self.w))
        exact = Problem(x, w, self.target)
        exact.step(plain)
        self.x.grad = self.w.grad = None

        def error(found: Tensor | None, right: Tensor | None) -> float:
            assert found is not None
            assert right is not None
            return float((found.double() - right).norm() / right.norm())

        return {
            name: max(error(of_x, exact.x.grad), error(of_w, exact.w.grad))
            for name, (of_x, of_w) in gradients.items()
        }


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seconds: float, bars: bool = True
) -> list[str]:
    """The lines of one shape."""
    problem, losses = Problem.random(*shape, dtype, device), contenders()
    errors = problem.errors(losses) if device.type == "cpu" else {}
    beside = problem.x.nbytes + problem.w.nbytes
    peaks = {}
    for name, loss in losses.items():
        problem.step(loss)
        problem.x.grad = problem.w.grad = None
        peaks[name] = peak_bytes(partial(problem.step, loss), device) - beside
    calls = [*(partial(problem.step, loss) for loss in losses.values()), problem.products]
    turn = partial(by_events, block=3) if device.type == "cuda" else by_the_clock
    times = medians([partial(lambda call: [turn(call)], call) for call in calls], seconds)
    *by_loss, products = times
    took = dict(zip(losses, by_loss, strict=True))
    inexact = {name for name, e in errors.items() if e > _TIMES_PLAIN * errors[_PLAIN] + 4 * torch.finfo(dtype).eps}
    others = [time for name, time in took.items() if name != _OURS and name not in inexact]
    rows, features, classes = shape
    lines = [f"({rows}, {features}) x {classes} {str(dtype).removeprefix('torch.')}"]
    for name, time in took.items():
        words = f"{name:<29} {time:9.2f} ms  {time / products:5.2f} of the products  {peaks[name] / 1e6:9.1f} MB"
        if errors:
            words += f"  error {errors[name]:.1e}"
            words += " INEXACT" if name in inexact else ""
            words += " MISSED" if name in inexact and name == _OURS else ""
        if name == _OURS:
            ratio, memory = time / min(others), peaks[name] / peaks[_PLAIN]
            bar = TIME_BAR if bars and device.type == "cpu" and dtype == torch.float32 else None
            words += f"  of the faster other {ratio:.3f} {verdict(ratio, bar)}"
            words += f"  of the plain form's memory {memory:.3f} {verdict(memory, MEMORY_BAR if bars else None)}"
            if bars and device.type == "cuda":
                words += f"  {verdict(time / products, GPU_TIME_BAR)}"
        lines.append(words)
    lines.append(f"{'three products':<29} {products:9.2f} ms")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit code 1 if fastloss misses a bar."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing for each shape (default: %(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "V"), help="rows, features, classes")
    parser.add_argument("--output", type=Path, help="write a record there, in Markdown")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch finds none")
    if min(options.shape or [1]) < 1:
        parser.error(f"--shape is {options.shape}; expected three numbers of at least 1")
    if not 0 <= options.seconds < math.inf:
        parser.error(f"--seconds is {options.seconds}; expected 0 or more")
    if options.output is not None and not options.output.parent.is_dir():
        parser.error(f"--output is {str(options.output)!r}; expected a file in a folder that exists")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    shapes = [tuple(options.shape)] if options.shape else CPU_SHAPES if device.type == "cpu" else GPU_SHAPES
    lines = [header(f"{torch.get_num_threads()} threads", str(device))]
    print(lines[0])
    before = cpu_seconds()
    for shape in shapes:
        found = measure(shape, dtype, device, options.seconds, bars=not options.shape)
        print(*found, sep="\n", flush=True)
        lines += found
    missed = sum(line.count("MISSED") for line in lines)
    lines.append(f"{missed} bars missed; others used {others_share(before):.0%} of the CPU time")
    print(lines[-1])
    if options.output is not None:
        command = " ".join(["python -m benchmarks.linear", *(arguments or sys.argv[1:])])
        command = command.partition(" --output")[0]
        options.output.write_text(
            f"# linear_cross_entropy beside torch's\n\n`{command}` {circumstances(device)}. Medians of interleaved "
            "turns in one process; memory is what is held beyond inputs and gradients.\n\n```\n"
            + "\n".join(lines)
            + "\n```\n",
            encoding="utf-8",
        )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
