"""Launches on a GPU that is not there: what they would start, and with which arguments.

Triton compiles for sm_90 as on a GPU, and a driver that starts nothing takes what the launcher is given. Tensors lie
in the host's memory. Run as a program by ``test_launch.py``, in a process whose Triton is not its interpreter.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.nvidia import compiler

import fastloss.backends.choice as backends
from benchmarks import codegen
from benchmarks import tune as tuner
from benchmarks.no_gpu import pretend
from fastloss.backends.contract import (
    LossInputs,
    LossOptions,
    SGDBatch,
    SGDControls,
    SGDRule,
    WantedGradients,
    WantedNumbers,
)
from fastloss.measuring.clock import Copy

Started = tuple[object, ...]
started: list[Started] = []


def note(source: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    constants = {str(place): str(value) for place, value in source.constants.items()}
    numbers = str(without_tensors(arguments))
    started.append((source.name, str(source.signature), str(constants), str(source.attrs), grid, numbers))


def without_tensors(argument: Any) -> Any:
    """Return the argument with each tensor's dtype and alignment in its place."""
    if isinstance(argument, tuple):
        return tuple(map(without_tensors, argument))
    return (argument.dtype, argument.data_ptr() % 16) if isinstance(argument, Tensor) else argument


def at(offset: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers that begin so many elements past a multiple of 64 bytes."""
    count = math.prod(shape)
    return torch.randn(count + 64, dtype=torch.float32).to(dtype)[offset : offset + count].view(shape)


def calls() -> dict[str, Callable[[], object]]:
    """Alike and not: in shape, layout, dtype, alignment, options."""
    kernels: Any = backends.load("triton")
    found: dict[str, Callable[[], object]] = {}
    whole, shared, long = (48, 96, 1), (4, 33, 16), (2, 8999, 1)
    places = [
        *((whole, torch.float32, offset) for offset in (0, 1, 4)),
        *(((64, 96, 1), torch.bfloat16, offset) for offset in (0, 1)),
        ((3000, 16, 1), torch.float32, 0),
        (shared, torch.float32, 0),
        *((long, torch.float32, offset) for offset in (0, 1)),
    ]
    plain, ranked, none = LossOptions(), LossOptions(topk=(1, 5)), LossOptions(reduction="none")
    for shape, dtype, offset in places:
        logits, rows = at(offset, *shape, dtype=dtype), shape[0] * shape[2]
        target = torch.randint(shape[1], (rows,))
        name = f"{shape} {dtype} {offset}"

        def loss(
            options: LossOptions, gradient: bool, loss_dtype: torch.dtype, x: Tensor = logits, y: Tensor = target
        ) -> None:
            inputs = LossInputs(x, y, None, options)
            kernels.cross_entropy_forward(inputs, loss_dtype=loss_dtype, gradient=gradient, inplace=False)

        def backward(upstream: Tensor, numbers: Tensor, x: Tensor = logits, y: Tensor = target) -> None:
            kernels.cross_entropy_backward(upstream, LossInputs(x, y, None, none), (numbers, numbers), inplace=False)

        def add(what: str, call: Callable[..., object], *arguments: object, name: str = name) -> None:
            found[f"{what} {name}"] = functools.partial(call, *arguments)

        add("loss and gradient", loss, plain, True, dtype)
        add("loss and gradient, the loss in float32", loss, plain, True, torch.float32)
        if shape[0] >= 48:
            add("loss, accuracy and gradient", loss, ranked, True, dtype)
            add("loss", loss, plain, False, torch.float32)
            add("accuracy", kernels.accuracy, logits, target, (1,), -100, "mean")
            add("backward", backward, torch.ones(rows, dtype=dtype), torch.ones(rows))
            add("rescale", functools.partial(kernels.rescale, inplace=True), logits, torch.ones(()))
        if shape == whole:
            add("accuracies", kernels.accuracy, logits, target, (1, 5), -100, "mean")
            add("labels of 32 bits", kernels.accuracy, logits, target.int(), (1,), -100, "mean")
            add("backward of one", backward, torch.ones(()).expand(rows), torch.ones(rows))
            double = torch.ones((), dtype=torch.float64)
            add("rescale by 64 bits", functools.partial(kernels.rescale, inplace=True), logits, double)
    for shape, strides in (((48, 96, 1), (1, 48, 1)), ((96, 96, 1), (96, 1, 1)), ((96, 96, 1), (1, 96, 1))):
        logits = torch.randn(shape[0] * shape[1]).as_strided(shape, strides)
        target, soft = torch.randint(96, shape[:1]), torch.softmax(logits, 1)
        name = f"{shape} {strides}"
        add("loss and gradient", loss, plain, True, torch.float32, logits, target, name=name)
        add("loss", loss, plain, False, torch.float32, logits, target, name=name)
        add("accuracy", kernels.accuracy, logits, target, (1,), -100, "mean", name=name)
        of_soft = functools.partial(kernels.soft_cross_entropy_forward, loss_dtype=torch.float32)
        for form in (plain, LossOptions(reduction="sum")):
            inputs, wanted = LossInputs(logits, soft, None, form), WantedGradients(True, False)
            add(f"soft loss and gradient, {form.reduction}", of_soft, inputs, wanted, name=name)
        for entropy in (False, True):
            inputs, numbers = LossInputs(logits, target, None, plain), WantedNumbers(entropy=entropy)
            add(f"entropy {entropy}", kernels.row_statistics_forward, inputs, numbers, name=name)
    return found | steps()


def steps() -> dict[str, Callable[[], object]]:
    """Of SGD, with one set of tables for many of them: what else differs from step to step."""
    kernels: Any = backends.load("triton")
    launch: Any = sys.modules["fastloss.kernels.launch"]
    found: dict[str, Callable[[], object]] = {}
    number = functools.partial(at, dtype=torch.float32)  # () at such an offset
    rule = SGDRule(0.1, 0.9, 0.0, 1e-4, False, False, False)
    nothing = SGDControls()
    sizes = (5, 3, 4096, 70001)
    for dtype, rounding in (
        (torch.float32, "nearest"),
        (torch.float64, "nearest"),
        (torch.bfloat16, "nearest"),
        (torch.bfloat16, "master"),
        (torch.bfloat16, "stochastic"),
    ):
        params, grads, momentum = ([at(0, size, dtype=dtype) for size in sizes] for _ in range(3))
        companions = [param.float() if rounding == "master" else None for param in params]
        batch = SGDBatch(params, list(momentum), list(companions), [0, 1, 0, 1], rounding, {})
        launch._memories.append(batch.memory)
        flags = {1: torch.zeros(1, dtype=torch.uint8)}
        moved = [at(offset, size, dtype=dtype) for offset, size in enumerate(sizes)]

        def step(
            rules: list[SGDRule],
            controls: SGDControls,
            grads: list[Tensor] = grads,
            begun: Any = None,
            batch: SGDBatch = batch,
        ) -> None:
            batch.begun = begun or {}
            if controls.max_norm:
                kernels.sgd_squares(batch, grads, controls.squares)
            kernels.sgd_step(batch, grads, rules, controls)

        def add(what: str, *arguments: Any, kind: str = f"{dtype} {rounding}", step: Any = step, **more: Any) -> None:
            found[f"step of {kind}, {what}"] = functools.partial(step, *arguments, **more)

        two = [rule, rule._replace(lr=0.2)]
        add("numbers", two, nothing)
        add("whole numbers", [rule._replace(lr=1, momentum=1)] * 2, nothing)
        add("moved gradients", two, nothing, grads=moved)
        add("flags", two, nothing, begun=flags)
        for offset in (0, 1, 4):
            add(f"a rate at {offset}", [rule._replace(lr=number(offset)), rule], nothing)
            add(f"another rate at {offset}", [rule, rule._replace(lr=number(offset))], nothing)
            add(f"a scale at {offset}", two, SGDControls(number(offset), number(0)))
            add(f"an overflow at {offset}", two, SGDControls(None, number(offset)))
            add(f"a norm at {offset}", two, SGDControls(squares=at(offset, dtype=torch.float64), max_norm=1.0))
        add("a rate of 64 bits", [rule._replace(lr=torch.tensor(0.1, dtype=torch.float64)), rule], nothing)
        add("another norm", two, SGDControls(squares=at(0, dtype=torch.float64), max_norm=2.0))
        add("a momentum in a tensor", [rule._replace(momentum=number(0)), rule], nothing)
        add("a strided gradient", two, nothing, grads=[at(0, 2 * g.numel(), dtype=dtype)[::2] for g in grads])
    return found


def main() -> None:
    """Each call twice in a row, all of them mixed, and each with nothing remembered: they start the same."""
    pretend(note)
    stop_at_shared_memory()
    launch: Any = sys.modules["fastloss.kernels.launch"]
    torch.manual_seed(0)
    problems = calls()

    def starts(call: Callable[[], object]) -> list[Started]:
        started.clear()
        call()
        return list(started)

    expected = {}
    for name, call in problems.items():
        launch.forget()
        expected[name] = starts(call)
    launch.forget()
    looked: list[object] = []
    run = triton.runtime.jit.JITFunction.run
    triton.runtime.jit.JITFunction.run = lambda self, *a, **k: (looked.append(self), run(self, *a, **k))[1]
    names = list(problems)
    for number, name in enumerate(names):
        for again in range(2):
            before = len(looked)
            assert starts(problems[name]) == expected[name], f"{name}, call {again}"
            assert not again or len(looked) == before, f"{name}: Triton looked at its arguments again"
        other = names[torch.randint(number + 1, ()).item()]
        assert starts(problems[other]) == expected[other], other
    different = len({start[:4] for starts in expected.values() for start in starts})
    print(f"{len(problems)} calls, {sum(map(len, expected.values()))} launches of {different} kernels")


def fit(capability: int) -> None:
    """Start every kernel in every form, at rows that take the most shared memory: the driver refuses none.

    Args:
        capability: of the GPU, 10 times its version.
    """
    pretend(capability=capability)
    stop_at_shared_memory()
    # On a meta device: of such tensors the driver takes no more than of others. float16 is there on every GPU.
    long, wide = codegen.cases([(64, 32000), (64, 9000)], ["float16"]), codegen.cases([(64, 16384)], ["float32"])
    calls = [*long, *(case for case in wide if "forward" in case[0])]
    calls += [*codegen.cases([(8, 1000, 4096)], ["float16"]), *codegen.sgd_cases()]
    for label, call in calls:
        call()
        print(f"{label} fits")


def stop_at_shared_memory() -> None:
    """From now on, compile as far as shared memory is laid out: a launch needs no code, which takes most of the time.

    What is compiled so has a key of its own in Triton's cache.
    """

    def without_code(*arguments: Any) -> tuple[str, str]:
        if arguments:
            stages = arguments[1]
            stages["ptx"] = lambda source, metadata: metadata.update(name="kernel") or ""
            stages["cubin"] = lambda source, metadata: b""
        return ("without code",) * 2

    triton.knobs.runtime.add_stages_inspection_hook = without_code
    triton.knobs.compilation.disable_line_info = True  # which are LLVM's lines
    compiler.nvidia.passes.ttgpuir.add_to_llvmir = lambda *_: None
    compiler.nvidia.has_extern_deps = compiler.nvidia.set_nvvm_reflect_ftz = lambda module: False
    compiler.llvm = mock.MagicMock()


def tune(record: str) -> None:
    """Try out some tiles at two shapes, as on a GPU. What the launches would write is not there."""
    pretend()
    problems = [("gradient", (64, 50257), tuner.LOOPED[:2]), ("gradient", (64, 1000), tuner.whole(1000)[:1])]
    small, processors = functools.partial(Copy, nbytes=1 << 20), SimpleNamespace(multi_processor_count=132)
    with (
        mock.patch.multiple(tuner, GPU=torch.device("cpu"), Copy=small, problems=lambda *_: problems),
        mock.patch.multiple(tuner, compile_all=lambda *_: None, captured=lambda call: SimpleNamespace(replay=call)),
        mock.patch.multiple(torch.cuda, is_available=lambda: True, get_device_name=lambda: "A GPU"),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=processors),
        mock.patch.object(sys, "argv", ["tune", "--output", record]),
    ):
        assert tuner.main() == 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["tune"]:
        tune(*sys.argv[2:])
    elif sys.argv[1:]:
        fit(int(sys.argv[1]))
    else:
        main()
