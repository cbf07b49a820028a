"""linear_cross_entropy beside torch's two ways to it: ``python -m benchmarks.linear``.

Forward and backward, with gradients of the hidden states and of the head; time in turns, and the most memory that is
held beyond inputs and gradients. Beside them stand the three bare products that every contender has to compute. On a
CPU all gradients are held against float64 before anything is timed, and a contender that is off is marked and not
compared with; ``python -m fastloss bench --op linear`` does so on a GPU too. Other shapes than the chosen ones have
no bars.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.measuring.clock import medians
from fastloss.measuring.contenders import CONTENDERS
from fastloss.measuring.inputs import linear_inputs
from fastloss.measuring.machine import OtherPrograms, peak_bytes

from .shared import closing, header, name_of, parsed_by, parser_of, verdict, write_record

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

CPU_SHAPES = ((1024, 256, 32000), (512, 512, 128256))
GPU_SHAPES = ((8192, 4096, 128256),)
TIME_BAR, MEMORY_BAR, GPU_TIME_BAR = 1.0, 0.25, 1.15
_TIMES_PLAIN = 4.0  # an error past so many times the plain form's is marked
_OURS, _PLAIN, _TORCH = "fastloss.linear_cross_entropy", "F.cross_entropy(F.linear)", "F.linear_cross_entropy"


def plain(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """Compute the loss by PyTorch's two functions."""
    return F.cross_entropy(F.linear(x, w), target)


def contenders() -> dict[str, Loss]:
    """Return the losses by name; torch's own is there since torch 2.13."""
    losses: dict[str, Loss] = {_OURS: fastloss.linear_cross_entropy, _PLAIN: plain}
    torchs = CONTENDERS["torch-linear"]
    if torchs.absence() is None and (loss := torchs.load().linear) is not None:
        losses[_TORCH] = loss
    return losses


def step(loss: Loss, x: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of hidden states and head."""
    return torch.autograd.grad(loss(x, w, target), (x, w))


@torch.no_grad()
def products(x: Tensor, w: Tensor) -> None:
    """Compute the three products alone."""
    z = x @ w.t()
    _ = z @ w, z.t() @ x


def errors(losses: dict[str, Loss], x: Tensor, w: Tensor, target: Tensor) -> dict[str, float]:
    """Return the norm of the gradients' error over the norm of the exact gradients, the greater of the two."""
    exact = step(plain, x.double(), w.double(), target)
    return {
        name: max(
            float((gradient.double() - right).norm() / right.norm())
            for gradient, right in zip(step(loss, x, w, target), exact, strict=True)
        )
        for name, loss in losses.items()
    }


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seconds: float, bars: bool = True
) -> list[str]:
    """Return the lines of one shape."""
    rows, features, classes = shape
    x, w, _ = inputs = linear_inputs(rows, features, classes, dtype, device, seed=0)
    losses = contenders()
    off = errors(losses, *inputs) if device.type == "cpu" else {}
    steps = [partial(step, loss, *inputs) for loss in losses.values()]
    peaks = []
    for each in steps:
        each()
        peaks.append(max(peak_bytes(each, device) - x.nbytes - w.nbytes, 0))
    block = 3 if device.type == "cuda" else 1
    *times, bare = medians([*steps, partial(products, x, w)], device, budget=seconds, block=block)
    inexact = {name for name, error in off.items() if error > _TIMES_PLAIN * off[_PLAIN] + 4 * torch.finfo(dtype).eps}
    others = [time for name, time in zip(losses, times, strict=True) if name != _OURS and name not in inexact]
    lines = [f"({rows}, {features}) x {classes} {name_of(dtype)}"]
    for name, time, peak in zip(losses, times, peaks, strict=True):
        words = f"{name:<29} {1e3 * time:9.2f} ms  {time / bare:5.2f} of the products  {peak / 1e6:9.1f} MB"
        words += f"  error {off[name]:.1e}" if off else ""
        words += " INEXACT" if name in inexact else ""
        words += " MISSED" if name in inexact and name == _OURS else ""
        if name == _OURS:
            ratio, memory = time / min(others), peak / peaks[list(losses).index(_PLAIN)]
            bar = TIME_BAR if bars and device.type == "cpu" and dtype == torch.float32 else None
            words += f"  of the faster other {ratio:.3f} {verdict(ratio, bar)}"
            words += f"  of the plain form's memory {memory:.3f} {verdict(memory, MEMORY_BAR if bars else None)}"
            words += f"  {verdict(time / bare, GPU_TIME_BAR)}" if bars and device.type == "cuda" else ""
        lines.append(words)
    return [*lines, f"{'three products':<29} {1e3 * bare:9.2f} ms"]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit code 1 if fastloss misses a bar."""
    parser = parser_of("linear", __doc__, seconds=60.0, each="shape", output=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "V"), help="rows, features, classes")
    options = parsed_by(parser, arguments)
    if min(options.shape or [1]) < 1:
        parser.error(f"--shape is {options.shape}; expected three numbers of at least 1")
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    shapes = [tuple(options.shape)] if options.shape else CPU_SHAPES if device.type == "cpu" else GPU_SHAPES
    lines = [header(f"{torch.get_num_threads()} threads", str(device))]
    print(lines[0])
    others = OtherPrograms()
    for shape in shapes:
        lines += (new := measure(shape, dtype, device, options.seconds, bars=not options.shape))
        print(*new, sep="\n", flush=True)
    missed = sum(line.count("MISSED") for line in lines)
    lines.append(closing(missed, others))
    print(lines[-1])
    if options.output is not None:
        words = "Medians of interleaved turns in one process; memory is what is held beyond inputs and gradients."
        title = "linear_cross_entropy beside torch's"
        write_record(options.output, title, "linear", arguments, device, words, lines)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
