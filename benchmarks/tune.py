"""Which tiles are fastest on this GPU: ``python -m benchmarks.tune``.

``kernels/tiles.py`` chooses tiles by arithmetic, never by trial. This is where its numbers are looked for: each form
of the loss kernels is run with many tile shapes, warps, stages and programs a processor, and the table gives each
one's bandwidth beside the one that is chosen today and beside a copy. Compilation, most of the work, is shared out to
processes of their own, which fill Triton's cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.backends import choice as backends
from fastloss.backends.contract import LossInputs, LossOptions
from fastloss.measuring.clock import repeated, seconds

from .shared import captured, header

FORMS = {
    "gradient": (True, LossOptions()),
    "gradient+accuracy": (True, LossOptions(topk=(1, 5))),
    "gradient+smoothing": (True, LossOptions(label_smoothing=0.1)),
    "forward": (False, LossOptions()),
    "accuracy": (False, LossOptions(topk=(1, 5))),
}
LONG = (32000, 128256, 262144, 50257)

SHORT = ((4096, 1000), (1 << 20, 16), (262144, 128), (131072, 512), (65536, 1024), (65536, 2048), (32768, 8192))


class Choice(NamedTuple):
    """A way to cut up the rows."""

    kind: str  # "loop" or "tile" (whole rows)
    rows: int
    cols: int
    warps: int
    stages: int = 1
    registers: int = 0

    def __str__(self) -> str:
        limit = f" {self.registers} registers" if self.registers else ""
        return f"{self.kind} {self.rows}x{self.cols} w{self.warps} s{self.stages}{limit}"


LOOPED = [
    Choice("loop", 1, *sizes)
    for sizes in (
        (4096, 4, 3, 0),
        (4096, 8, 3, 0),
        (8192, 8, 1, 128),
        (8192, 16, 1, 64),
        (8192, 16, 3, 64),
        (16384, 16, 1, 128),
        (16384, 32, 1, 64),
        (16384, 32, 3, 64),
    )
]
# Programs a processor; below 1, some processors have none, so that fewer rows are in flight.
RESIDENT = (1, 2, 3, 4, 6, 8)
SHARES = (0.5, 0.75, 0.9)


def whole(classes: int) -> list[Choice]:
    """Return the choices for rows that are held whole."""
    cols = max(16, 1 << (classes - 1).bit_length())
    found = []
    for elements in (1024, 2048, 4096):
        rows = max(1, min(64, elements // cols))
        for per_thread, stages in ((16, 1), (32, 1), (64, 1), (64, 2)):
            warps = rows * cols // (32 * per_thread)
            choice = Choice("tile", rows, cols, warps, stages, 128 if per_thread == 64 else 0)
            if choice not in found and warps:
                found.append(choice)
    return found


def _loss_kernels() -> Any:
    backends.load("triton")
    return sys.modules["fastloss.kernels.cross_entropy"]


def run(logits: Tensor, target: Tensor, form: str, choice: Choice | None, resident: float = 1) -> Callable[[], Any]:
    """Return a call with the tiles of ``choice``; None: with those that the package chooses."""
    module = _loss_kernels()
    gradient, options = FORMS[form]
    launch, tables = sys.modules["fastloss.kernels.launch"], sys.modules["fastloss.kernels.tiles"]

    def chosen(x: Tensor, result: Tensor | None = None, **how: bool) -> Any:
        tiles = tables.plan(x, result, **how)
        if choice is None:
            return tiles
        kind, *sizes = choice
        number = -(-x.shape[0] // choice.rows)
        programs = int(torch.cuda.get_device_properties(0).multi_processor_count * resident)
        return tiles._replace(
            **dict(zip(Choice._fields[1:], sizes, strict=True)),
            looped=kind == "loop",
            number=number,
            grid=max(1, min(number, programs)),
        )

    def call() -> Any:
        launch.forget()
        module.plan, added_at_once = chosen, tables.Tiles.added_at_once
        # Alike for any grid: else each would be compiled anew.
        tables.Tiles.added_at_once = property(lambda tiles: 128 * tiles.warps)
        try:
            inputs = LossInputs(logits[:, :, None], target, None, options)
            return module.cross_entropy_forward(inputs, loss_dtype=logits.dtype, gradient=gradient, inplace=False)
        finally:
            module.plan, tables.Tiles.added_at_once = tables.plan, added_at_once
            launch.forget()

    return call


def problems(only: list[str], only_classes: list[int]) -> Iterator[tuple[str, tuple[int, int], list[Choice]]]:
    """Yield form, shape, and the choices that are tried."""
    for form in only or FORMS:
        for classes in only_classes or LONG:
            rows = (1 << 28) // classes // 64 * 64 + 64
            yield form, (rows, classes), LOOPED if form != "gradient+smoothing" else []
        for shape in SHORT if form.startswith("gradient") and not only_classes else ():
            yield form, shape, [] if form == "gradient+smoothing" else whole(shape[1])


def compile_share(share: int, of: int, only: list[str], only_classes: list[int]) -> None:
    """Compile one choice in ``of``, from number ``share`` on, on few rows."""
    todo, seen = [], set()
    for form, (rows, classes), choices in problems(only, only_classes):
        for choice in [None, *choices]:
            alike = (form, choice, classes if choice is None or choice.kind == "tile" else classes % 8 == 0)
            if alike not in seen:
                todo.append((form, min(rows, 2304), classes, choice))
            seen.add(alike)
    cache: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for form, rows, classes, choice in todo[share::of]:
        if (rows, classes) not in cache:
            cache.clear()
            cache[rows, classes] = make(rows, classes)
        try:
            run(*cache[rows, classes], form, choice)()
        except Exception as error:
            print(f"{form} {classes} {choice}: {type(error).__name__}", file=sys.stderr)


def make(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16, generator=generator) * 3
    return logits, torch.randint(classes, (rows,), device="cuda", generator=generator)


def off_by(mine: Tensor, right: Tensor) -> str:
    """Return words that say where two gradients differ."""
    few = slice(None, None, max(1, len(mine) // 64))
    off = float((mine[few].float() - right[few].float()).abs().max()) / max(
        float(right[few].float().abs().max()), 1e-30
    )
    return "" if off < 0.01 else f" GRADIENT WRONG by {off:.3g}"


def by_graph(call: Callable[[], Any], block: int) -> float:
    """Return the seconds that a GPU takes for a call when the host does not hold it up."""
    graph = captured(lambda: [call() for _ in range(block)])
    graph.replay()
    return min(seconds(graph.replay, torch.device("cuda")) for _ in range(3)) / block


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--form", action="append", choices=tuple(FORMS), default=[])
    parser.add_argument("--classes", type=int, action="append", default=[], help="of rows of 2²⁸ logits in all")
    parser.add_argument("--output", type=Path, help="JSON lines")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of timing, after compilation (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.tune: needs a GPU, and torch finds none", file=sys.stderr)
        return 2
    if options.share:
        compile_share(options.share[0], options.share[1], options.form, options.classes)
        return 0
    start = time.perf_counter()
    forms = [text for form in options.form for text in ("--form", form)]
    forms += [text for classes in options.classes for text in ("--classes", str(classes))]
    command = [sys.executable, "-m", "benchmarks.tune", *forms, "--share"]
    workers = [subprocess.Popen([*command, str(i), str(options.workers)]) for i in range(options.workers)]
    for worker in workers:
        worker.wait()
    print(header(torch.cuda.get_device_name()), f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    found = []
    end = time.perf_counter() + options.seconds
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    sink = torch.empty_like(source)
    for form, (rows, classes), choices in problems(options.form, options.classes):
        if time.perf_counter() > end:
            print("out of time", flush=True)
            break
        logits, target = make(rows, classes)
        bytes_moved = logits.nbytes * (2 if form.startswith("gradient") else 1)
        copied = min(seconds(lambda: repeated(lambda: sink.copy_(source), 5), source.device) for _ in range(3)) / 5
        copy = 2 * source.nbytes / copied
        long = classes not in [v for _, v in SHORT]
        residents = (*(SHARES if form.startswith("gradient") and classes > 1 << 17 else ()), *RESIDENT)
        residents = residents if long else (4, 8, 12)
        exact = run(logits, target, form, None)()
        results: list[tuple[float, str]] = []
        for choice, resident in [(None, 0), *itertools.product(choices, residents)]:
            if choice and resident * choice.warps * 32 * max(choice.registers, 32) > 65536:
                continue
            try:
                call = run(logits, target, form, choice, resident)
                mine = call()
                wrong = "" if mine.gradient is None else off_by(mine.gradient, exact.gradient)
                off = abs(float(mine.loss) - float(exact.loss))
                bad = wrong or ("" if off < 0.05 else f" WRONG by {off:.3g}")
                del mine
                seconds = by_graph(call, 6 if long else 20)
            except Exception as error:
                results.append((float("inf"), f"{choice} {resident} {type(error).__name__}: {str(error)[:80]}"))
                continue
            words = "as it is" if choice is None else f"{choice}, {resident} a processor"
            share = bytes_moved / seconds / copy
            results.append(
                (seconds, f"{words}: {1e3 * seconds:.4f} ms {bytes_moved / seconds / 1e9:.0f} GB/s {share:.3f}{bad}")
            )
            found.append(
                {
                    "form": form,
                    "rows": rows,
                    "classes": classes,
                    "choice": words,
                    "ms": 1e3 * seconds,
                    "share": share,
                    "copy": copy / 1e9,
                }
            )
        now = results[0]
        results.sort()
        print(
            f"{form} {rows}x{classes} copy {copy / 1e9:.0f}; now {now[1]}",
            *(f"  {text}" for _, text in results[:8]),
            sep="\n",
            flush=True,
        )
        if options.output:
            options.output.write_text("\n".join(map(json.dumps, found)) + "\n")
        del logits, target, exact
    return 0


if __name__ == "__main__":
    sys.exit(main())
