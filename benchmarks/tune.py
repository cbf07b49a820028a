"""Which tiles are fastest on this GPU: ``python -m benchmarks.tune``.

``kernels/tiles.py`` chooses tiles by arithmetic, never by trial. This is where its numbers are looked for: each form
of the loss kernels is run with many tile shapes, warps, stages and programs a processor, and the table gives each
one's bandwidth beside the one that is chosen today and beside a copy. Compilation, most of the work, is shared out to
processes of their own, which fill Triton's cache.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.backends import choice as backends
from fastloss.backends.contract import LossInputs, LossOptions
from fastloss.measuring.clock import Copy, repeated, seconds
from fastloss.measuring.machine import captured

from .shared import header, parser_of, refuse

GPU = torch.device("cuda")
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
    Choice("loop", 1, cols, *sizes)
    for cols, ways in {
        4096: ((4, 3, 0), (8, 3, 0)),
        8192: ((8, 1, 128), (16, 1, 64), (16, 3, 64)),
        16384: ((16, 1, 128), (32, 1, 64), (32, 3, 64)),
    }.items()
    for sizes in ways
]
# Programs a processor; below 1, some processors have none, so that fewer rows are in flight.
RESIDENT = (1, 2, 3, 4, 6, 8)
SHARES = (0.5, 0.75, 0.9)


def whole(classes: int) -> list[Choice]:
    """Return the choices for rows that are held whole."""
    cols, choices = max(16, 1 << (classes - 1).bit_length()), []
    for elements, (per_thread, stages) in itertools.product((1024, 2048, 4096), ((16, 1), (32, 1), (64, 1), (64, 2))):
        rows = max(1, min(64, elements // cols))
        warps = rows * cols // (32 * per_thread)
        choices += [Choice("tile", rows, cols, warps, stages, 128 if per_thread == 64 else 0)] if warps else []
    return list(dict.fromkeys(choices))


def run(logits: Tensor, target: Tensor, form: str, choice: Choice | None, resident: float = 1) -> Callable[[], Any]:
    """Return a call with the tiles of ``choice``; None: with those that the package chooses."""
    backends.load("triton")
    modules: Any = sys.modules
    module, launch, tables = (modules[f"fastloss.kernels.{name}"] for name in ("cross_entropy", "launch", "tiles"))
    gradient, options = FORMS[form]

    def chosen(x: Tensor, result: Tensor | None = None, **how: bool) -> Any:
        tiles = tables.plan(x, result, **how)
        if choice is None:
            return tiles
        kind, *sizes = choice
        number = -(-x.shape[0] // choice.rows)
        programs = int(torch.cuda.get_device_properties(0).multi_processor_count * resident)
        changes = dict(zip(Choice._fields[1:], sizes, strict=True))
        return tiles._replace(**changes, looped=kind == "loop", number=number, grid=max(1, min(number, programs)))

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


def compile_all(forms: list[str], classes: list[int], jobs: int) -> None:
    """Compile every choice, on few rows, by ``jobs`` processes, whose results Triton's cache holds."""
    todo: dict[tuple[object, ...], tuple[str, int, int, Choice | None]] = {}
    for form, (rows, width), choices in problems(forms, classes):
        for choice in [None, *choices]:
            alike = width if choice is None or choice.kind == "tile" else width % 8 == 0
            todo.setdefault((form, choice, alike), (form, min(rows, 2304), width, choice))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, todo.values()))


def _compile(todo: tuple[str, int, int, Choice | None]) -> None:
    form, rows, classes, choice = todo
    try:
        run(*make(rows, classes), form, choice)()
    except Exception as error:
        print(f"{form} {classes} {choice}: {type(error).__name__}", file=sys.stderr)


def make(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(GPU).manual_seed(0)
    logits = torch.randn(rows, classes, device=GPU, dtype=torch.bfloat16, generator=generator) * 3
    return logits, torch.randint(classes, (rows,), device=GPU, generator=generator)


def off_by(result: Any, exact: Any) -> str:
    """Return words that say where two results differ."""
    if result.gradient is not None:
        few = slice(None, None, max(1, len(exact.gradient) // 64))
        gradient, right = result.gradient[few].float(), exact.gradient[few].float()
        off = float((gradient - right).abs().max()) / max(float(right.abs().max()), 1e-30)
        if not off < 0.01:
            return f" GRADIENT WRONG by {off:.3g}"
    off = abs(float(result.loss) - float(exact.loss))
    return "" if off < 0.05 else f" WRONG by {off:.3g}"


def by_graph(call: Callable[[], Any], block: int) -> float:
    """Return the seconds that a GPU takes for a call when the host does not hold it up."""
    graph = captured(lambda: [call() for _ in range(block)])
    graph.replay()
    return min(seconds(graph.replay, GPU) for _ in range(3)) / block


def trials(form: str, rows: int, classes: int, choices: list[Choice], copy: float) -> Iterator[dict[str, Any]]:
    """Yield the record of each choice, of the one that is made today first; ``copy`` is a copy's bytes a second."""
    logits, target = make(rows, classes)
    moved = logits.nbytes * (2 if form.startswith("gradient") else 1)
    long = classes not in [v for _, v in SHORT]
    shares = SHARES if form.startswith("gradient") and classes > 1 << 17 else ()
    exact = run(logits, target, form, None)()
    for choice, resident in [(None, 0), *itertools.product(choices, (*shares, *RESIDENT) if long else (4, 8, 12))]:
        if choice and resident * choice.warps * 32 * max(choice.registers, 32) > 65536:
            continue
        record = {"form": form, "rows": rows, "classes": classes}
        try:
            call = run(logits, target, form, choice, resident)
            words = off_by(call(), exact)
            took = by_graph(call, 6 if long else 20)
        except Exception as error:
            yield {
                **record,
                "choice": f"{choice} {resident} {type(error).__name__}: {str(error)[:80]}",
                "ms": math.inf,
            }
            continue
        share, name = moved / took / copy, "as it is" if choice is None else f"{choice}, {resident} a processor"
        words = f"{name}: {1e3 * took:.4f} ms {moved / took / 1e9:.0f} GB/s {share:.3f}{words}"
        yield {**record, "choice": name, "ms": 1e3 * took, "share": share, "copy": copy / 1e9, "words": words}


def main() -> int:
    parser = parser_of("tune", __doc__, seconds=60.0, each="run, after compilation", device=False)
    parser.add_argument("--form", action="append", choices=tuple(FORMS), default=[])
    parser.add_argument("--classes", type=int, action="append", default=[], help="of rows of 2²⁸ logits in all")
    parser.add_argument("--output", type=Path, help="JSON lines")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        return refuse("tune", "needs a GPU, and torch finds none")
    start = time.perf_counter()
    compile_all(options.form, options.classes, options.workers)
    print(header(torch.cuda.get_device_name()), f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    records: list[dict[str, Any]] = []
    end, device_copy = time.perf_counter() + options.seconds, Copy(GPU)
    for form, (rows, classes), choices in problems(options.form, options.classes):
        if time.perf_counter() > end:
            print("out of time", flush=True)
            break
        took = min(seconds(partial(repeated, device_copy.step, 5), GPU) for _ in range(3)) / 5
        copy = 1e9 * device_copy.gigabytes_per_second(took)
        results = list(trials(form, rows, classes, choices, copy))
        said = [each.pop("words", each["choice"]) for each in results]
        best = sorted(zip((each["ms"] for each in results), said, strict=True))[:8]
        print(f"{form} {rows}x{classes} copy {copy / 1e9:.0f}; now {said[0]}")
        print(*(f"  {words}" for _, words in best), sep="\n", flush=True)
        records += [each for each in results if "share" in each]
        if options.output:
            options.output.write_text("\n".join(map(json.dumps, records)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
