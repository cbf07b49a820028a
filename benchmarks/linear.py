"""linear_cross_entropy beside torch's two ways to it: ``python -m benchmarks.linear``.

Forward and backward, with gradients of the hidden states and of the head; time in turns, and the most memory that is
held beyond inputs and gradients. Beside them stand the three bare products that every contender has to compute. All
are held against float64 before anything is timed, as by ``python -m fastloss bench --op linear``, and a contender
that is off is marked and not compared with. Other shapes than the chosen ones have no bars.
"""

from __future__ import annotations

import math
import sys

import torch

from fastloss.bench.measure import Row, measure
from fastloss.bench.workloads import Shape, Workload
from fastloss.measuring.contenders import CONTENDERS, OURS, REFERENCE

from .shared import compare_products, verdict

NAMES = {
    OURS: "fastloss.linear_cross_entropy",
    REFERENCE: "F.cross_entropy(F.linear)",
    "torch-linear": "F.linear_cross_entropy",  # since torch 2.13
}
SHAPES = {"cpu": ((1024, 256, 32000), (512, 512, 128256)), "cuda": ((8192, 4096, 128256),)}  # (N, D, V)
# Of the faster other's time, on a CPU in float32; of the plain form's memory; of the products' time, on a GPU.
TIME_BAR, MEMORY_BAR, GPU_TIME_BAR = 1.0, 0.25, 1.15


def compare(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seconds: float, bars: bool = True
) -> list[str]:
    """Return the lines of one shape."""
    rows, features, classes = shape
    workload = Workload("linear", Shape(rows, classes, features), dtype)
    results = measure(workload, [CONTENDERS[name] for name in NAMES], device, budget=seconds, timing_wrong=True)
    results = [row for row in results if row.status != "absent"]
    lines = [f"({rows}, {features}) x {classes} {workload.dtype_name}", *map(_line, results)]
    times = {row.contender: row.milliseconds for row in results if row.milliseconds is not None}
    if OURS in times and REFERENCE in times:
        ours, plain = (next(row for row in results if row.contender == name) for name in (OURS, REFERENCE))
        ratio = times[OURS] / min(row.milliseconds or 0.0 for row in results if row.timed and row is not ours)
        memory = _megabytes(ours) / _megabytes(plain)
        bar = TIME_BAR if bars and device.type == "cpu" and workload.dtype == torch.float32 else None
        lines[1] += f"  of the faster other {ratio:.3f} {verdict(ratio, bar)}"
        lines[1] += f"  of the plain form's memory {memory:.3f} {verdict(memory, MEMORY_BAR if bars else None)}"
        if bars and device.type == "cuda":
            lines[1] += f"  {verdict(ours.times_products or 0.0, GPU_TIME_BAR)}"
    return [*lines, f"{'three products':<29} {results[0].products_milliseconds or 0.0:9.2f} ms"]


def _line(row: Row) -> str:
    words = f"{NAMES[row.contender]:<29}"
    if row.milliseconds is None:
        words += f" {row.status}: {row.reason}"
    else:
        words += f" {row.milliseconds:9.2f} ms  {row.times_products:5.2f} of the products"
        words += (
            f"  {_megabytes(row):9.1f} MB  error {math.inf if row.gradient_error is None else row.gradient_error:.1e}"
        )
    words += " INEXACT" if row.status == "wrong" else ""
    return words + (" MISSED" if row.contender == OURS and not row.timed else "")


def _megabytes(row: Row) -> float:
    return max(row.peak_bytes or 0, 0) / 1e6


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit code 1 if fastloss misses a bar."""
    return compare_products("linear", __doc__, arguments, "linear_cross_entropy beside torch's", SHAPES, compare)


if __name__ == "__main__":
    sys.exit(main())
