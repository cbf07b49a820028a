"""What the compiler makes of the kernels, for GPUs that are not here: ``python -m benchmarks.codegen``.

Every launch that the package would make for a list of shapes, dtypes and options is recorded on meta tensors and
compiled for each target. The shapes are those that are measured, and, unless ``--quick`` is given, as many of a sweep
over all sizes as bring a tile of a kernel (classes, warps, registers, stages) that none before them brought: so there
is every one that the selection in ``kernels/tiles.py`` can choose. For NVIDIA targets ptxas reports registers and
spilled bytes, and the disassembly shows how wide the accesses to device memory are, and what a round of each hot loop
(see ``sass.py``) costs: instructions and special-function operations an element, and the share of an H100's issue
slots that they take if its accesses go at the full bandwidth of its memory. No GPU is needed, and none is asked.

The exit code is 1 if something spills, doesn't compile, or needs more shared memory than the target has; if aligned
logits, or parameters, are not loaded by 128-bit accesses, or a loop over blocks has any that is narrower; if a
product is taken from itself (see :func:`rounding_errors`); or if a kernel is over its budget, or has none of the
loops that its budget is for. (Class weights may be read narrow where the logits' neighbours in memory are rows, as
one number serves a line of the tile, and beside a shard of the classes, which begins anywhere.)
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastloss.backends import contract
from fastloss.backends.contract import LossInputs, LossOptions, WantedGradients

from .no_gpu import PROCESSORS, SHARED_BYTES, pretend_to_be_an_h100
from .sass import Loop, hot_loops, wide_loads
from .shared import refuse

TARGETS = {
    **{f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 86, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The most shared memory that a program can have there.
SHARED = {name: SHARED_BYTES.get(target.arch, 65536) for name, target in TARGETS.items()}
# Each processor of an H100 issues four warps' instructions a cycle.
INSTRUCTIONS_PER_SECOND = PROCESSORS * 4 * 32 * 1.755e9
BYTES_PER_SECOND = 3e12  # what is reached of its 3.35


@dataclass
class Launch:
    """One recorded launch: what to compile, and what it was made for."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    label: str

    @property
    def constants(self) -> dict[str, Any]:
        """Return the options, with the members of the constants that are given together."""
        constants = dict(self.options)
        for group in self.options.values():
            if isinstance(group, tuple):
                names = group._fields  # type: ignore[attr-defined]
                constants |= {name: value.value for name, value in zip(names, group, strict=True)}
        return constants


@dataclass
class Compiled:
    """What a target's compiler made of a launch."""

    label: str
    kernel: str
    target: str
    registers: int | None = None
    spills: int | None = None  # bytes
    shared: int = 0  # bytes
    widths: Counter[str] = field(default_factory=Counter)  # "LDG.128" → how many stand in the code
    loops: list[Loop] = field(default_factory=list)
    elements: int = 1  # that a thread takes in a round of those
    faults: list[str] = field(default_factory=list)  # the words that the report counts against the launch

    @property
    def instructions(self) -> float | None:
        """Return the instructions an element, over all hot loops: a kernel that visits its logits twice has two."""
        return sum(loop.usual for loop in self.loops) / self.elements if self.loops else None

    @property
    def special(self) -> float | None:
        """Return the MUFU operations an element, of the loop that has the most."""
        return max(loop.special for loop in self.loops) / self.elements if self.loops else None

    @property
    def slots(self) -> float | None:
        """Return the share of the issue slots, of the loop that needs the most, at the full bandwidth."""
        needed = max((loop.usual / (16 * (loop.loads + loop.stores)) for loop in self.loops), default=None)
        return None if needed is None else needed * BYTES_PER_SECOND / INSTRUCTIONS_PER_SECOND


class Budget(NamedTuple):
    """The most that a kernel may need."""

    instructions: float | None = None  # an element
    special: float | None = None  # an element
    slots: float | None = None  # share of all


# On sm_90. The first two are for every element read once, or read and written; at 3 TB/s the H100 can issue 19.8
# instructions for each bfloat16 element that it reads, 39 for one that it reads and writes.
_SGD_FORMS = ("float32 momentum", "float32 momentum+amp+clip", "bfloat16 momentum", "bfloat16 master")
BUDGETS = {
    "8192x32000 bfloat16 plain forward": Budget(instructions=16, special=1.2),
    "8192x32000 bfloat16 accuracy forward": Budget(instructions=16, special=1.2),
    "8192x32000 bfloat16 accuracy forward+gradient": Budget(instructions=26, special=1.2),
    "4096x128256 bfloat16 accuracy forward+gradient": Budget(instructions=26, special=1.2),
    **dict.fromkeys([f"sgd {form} step" for form in _SGD_FORMS], Budget(slots=0.5)),
}


def recorded(launches: list[Launch], label: str) -> AbstractContextManager[object]:
    """Record launches instead of making them."""

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, args, kwargs, label))

    return mock.patch.object(JITFunction, "run", record)


def compile_for(launch: Launch, target: GPUTarget) -> Any:
    """Compile a recorded launch for a target, as a launch on it would."""
    backend = make_backend(target)
    kernel = launch.kernel
    chosen = {name: value for name, value in launch.options.items() if name != "maxnreg" or target.backend == "cuda"}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*launch.arguments, **chosen, debug=False)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, {**chosen, "debug": False}, bound, specialization, options
    )
    return triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=target, options=options.__dict__)


def examine(launch: Launch, name: str, target: GPUTarget) -> Compiled:
    """Compile a launch; read registers, spills, shared memory and access widths off it, and its faults."""
    result = Compiled(launch.label, launch.kernel.__name__.strip("_"), name)
    try:
        compiled = compile_for(launch, target)
    except Exception as error:
        result.faults.append(f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:120]}")
        return result
    result.shared = compiled.metadata.shared
    narrow = residues = missing = 0
    if target.backend == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            usage, sass = (_tool("cuobjdump", option, str(cubin)) for option in ("-res-usage", "-sass"))
        result.registers = _number(r"REG:(\d+)", usage)
        result.spills = _number(r"STACK:(\d+)", usage) if re.search(r"\b(STL|LDL)\b", sass) else 0  # or lies unused
        for kind, modifiers in re.findall(r"\b(LDGSTS|LDG|STG)((?:\.\w+)*)", sass):
            width = re.search(r"\.(64|128|U8|U16|S16|S8|256)\b", modifiers)
            result.widths[f"{kind[:3]}.{width[1] if width else '32'}"] += 1
        by_block, result.elements = _goes_block_by_block(launch), _elements(launch)
        result.loops = hot_loops(sass, by_block=by_block)
        # From tile to tile there are numbers of rows.
        narrow = sum(loop.narrow for loop in result.loops) if by_block and not _may_be_narrow(launch) else 0
        residues = len(rounding_errors(compiled.asm["ptx"]))
        if _is_aligned(launch):
            missing = max(0, result.elements * _itemsize(launch) - 16 * wide_loads(sass))
    else:
        text = compiled.asm["amdgcn"]
        result.registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        result.spills = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text)
        accesses = re.findall(r"(?:global|buffer)_(load|store)_(\w+)", text)
        result.widths.update(f"{'LDG' if kind == 'load' else 'STG'}.{width}" for kind, width in accesses)
    most = SHARED[name]
    counted = {
        "spills {} bytes": result.spills,
        f"{{}} bytes of shared memory, over {most}": result.shared if result.shared > most else 0,
        "{} narrow accesses in hot loops": narrow,
        "{} products taken from themselves": residues,
        "{} bytes a thread without 128-bit accesses": missing,
    }
    result.faults += [words.format(value) for words, value in counted.items() if value]
    for what, limit in BUDGETS.get(launch.label, Budget())._asdict().items():
        number = getattr(result, what)
        if None not in (number, limit) and number > limit:
            result.faults.append(f"{number:.2f} {what}, over {limit}")
    return result


def _number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])  # type: ignore[index]


def rounding_errors(ptx: str) -> list[str]:
    """Return the registers that hold a·b less what a·b was rounded to: fma(a, b, −(a·b)).

    ``x - x == 0``, which asks whether x is finite, becomes that where x is a product, and is false of most numbers.
    The interpreter, which fuses nothing, shows no such thing. Operations on two numbers at once count as two.
    """
    products: dict[str, list[str]] = {}
    negated: dict[str, str] = {}
    halves: dict[str, list[str]] = {}  # of a register of two numbers
    names: dict[str, str] = {}  # by which a register that was taken out of such a one is known here
    residues = []

    def half(register: str, which: int) -> str:
        return halves.get(register, [f"{register}.0", f"{register}.1"])[which]

    def factors(registers: list[str]) -> tuple[list[str], int]:
        """Return the factors without their signs, in order, and the number of signs."""
        return sorted(negated.get(name, name) for name in registers), sum(name in negated for name in registers)

    pattern = r"\b(?:(mul|neg|fma)(?:\.\w+)*?\.f(?:32|64)|mov\.b64)(x2)?\s+(\{[^}]*\}|%\w+), ([^;]+);"
    for operation, two, result, rest in re.findall(pattern, ptx):
        results, operands = (re.split(r",\s*", registers.strip("{}")) for registers in (result, rest))
        if not operation and len(operands) == 2:
            halves[result] = [names.get(register, register) for register in operands]
        elif not operation and len(results) == 2:
            names |= {register: half(rest, which) for which, register in enumerate(results)}
        for which in range(0 if not operation else 2 if two else 1):
            known = [half(each, which) if two else names.get(each, each) for each in (result, *operands)]
            if operation == "mul":
                products[known[0]] = known[1:]
            elif operation == "neg":
                negated[known[0]] = known[1]
            else:
                term = known[3]
                (left, signs), (right, more) = factors(known[1:3]), factors(products.get(negated.get(term, term), []))
                if left == right and (signs + more + (term in negated)) % 2:
                    residues.append(known[0])
    return residues


def _goes_block_by_block(launch: Launch) -> bool:
    """Return whether the hot loop goes over the blocks of a row or chunk; else it goes from row to row."""
    constants = launch.constants
    return "COLS" not in constants or bool(constants.get("LOOPED")) or constants.get("GROUP", 1) > 1


def _elements(launch: Launch) -> int:
    """Return how many elements a thread takes of a tile or a block."""
    from fastloss.kernels import sgd

    constants = launch.constants
    block = constants.get("BLOCK") or sgd.BLOCK.value
    tile = constants.get("ROWS", 1) * constants["COLS"] if "COLS" in constants else block
    return int(tile) // (32 * constants["num_warps"])


def _itemsize(launch: Launch) -> int:
    """Return the bytes of an element of the logits, or of the parameters: the label says its dtype."""
    return getattr(torch, launch.label.split()[1]).itemsize


def _may_be_narrow(launch: Launch) -> bool:
    """Return True if logits begin anywhere, or class weights are read one for each line of a tile wide in rows."""
    by_line = launch.constants.get("BY_INNER") or "soft_statistics" in launch.kernel.__name__
    return bool(by_line and launch.constants.get("HAS_WEIGHT")) or "@" in launch.label.split()[0]


def _is_aligned(launch: Launch) -> bool:
    """Return True if 128-bit accesses reach every element. Numbers of rows, which two kernels read, don't count."""
    shape, widest = launch.label.split()[0], 16 // _itemsize(launch)
    if launch.kernel.__name__ in ("_weigh_kernel", "_losses_of_rows") or _elements(launch) < widest or "@" in shape:
        return False
    if launch.constants.get("BY_INNER"):
        return int(shape.split("x")[2]) % widest == 0
    if launch.kernel.__name__ == "_rescale_kernel":  # which has rows one after the other
        return math.prod(map(int, shape.split("x"))) % 16 == 0
    return bool(launch.constants.get("VEC", widest) == widest)


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


SHAPES = [(4096, 10), (4096, 1000), (8192, 21841), (8192, 32000), (8192, 50257), (4096, 128256), (1, 1000)]
QUICK_SHAPES = SHAPES[1::2]
# (N, C, d1): neighbouring rows are neighbours in memory. And logits that begin between two 128-bit accesses.
VIEWS = [(8, 19, 65536), (8, 1000, 4096)]
MORE_VIEWS = [(64, 10, 4096), (64, 50, 4096), (64, 19, 49), (64, 1000, 49)]
UNALIGNED = [(8192, 50257), (8192, 32000)]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Forms of the loss, of class probabilities, of the numbers of each row, and beside a shard of the classes. The sum of
# logits of "smoothing+softcap" is relative to a product, the label's capped logit.
HARD = (
    *("plain", "accuracy", "smoothing", "smoothing+accuracy", "weight+smoothing+accuracy", "none+accuracy"),
    *("softcap+z", "smoothing+softcap", "weight+smoothing+softcap+z+accuracy"),
    *("plain+scale+accuracy", "weight+smoothing+scale+temperature", "smoothing+softcap+scale+temperature+z"),
)
SOFT = ("soft", "soft-weight+smoothing", "soft-softcap+z", "soft-probabilities", "soft-weight+smoothing+scale+z")
STATISTICS = (  # "every": the parts that are none of "squares" and "mean"
    *("statistics", "statistics-every", "statistics-every+weight+smoothing+softcap"),
    *("statistics-squares+mean", "statistics-every+squares+mean+weight+smoothing+softcap"),
    "statistics-every+squares+mean+weight+smoothing+scale+temperature",
)
SHARDS = ("shard", "shard-weight+smoothing+softcap", "shard-weight+smoothing+scale+temperature")
DIVERGENCES = {"forward": 0.0, "reverse": 1.0, "mixed": 0.5, "mixed+softcap": 0.5}
_OPTIONS: dict[str, tuple[str, Any]] = {  # of a form's words
    "accuracy": ("topk", (1, 5)),
    "smoothing": ("label_smoothing", 0.1),
    "none": ("reduction", "none"),
    "softcap": ("softcap", 30.0),
    "z": ("lse_square_scale", 1e-4),
    "probabilities": ("from_logits", False),
    "scale": ("logit_scale", 0.5),
    "temperature": ("temperature", contract.Scalar(torch.empty((), device="meta"))),
}


def sweep() -> Iterator[tuple[int, int]]:
    """Yield one row, few and many, of 2ⁿ classes and of some fewer, of which an access can have 4, 2 or 1."""
    for exponent in range(4, 20):
        for classes in ((1 << exponent) - fewer for fewer in (0, 12, 10, 9)):
            yield from ((rows, classes) for rows in (1, 64, (1 << 28) // classes))


Case = tuple[str, Callable[[], Any]]  # a label, and a call


def cases(
    shapes: Sequence[tuple[int, ...]], dtypes: Iterable[str] = tuple(DTYPES), offset: int = 0
) -> Iterator[Case]:
    """Yield the calls whose launches are compiled: every kernel of the loss and the accuracy in every form.

    Args:
        shapes: of the logits, ``(N, C)`` or ``(N, C, d1)``.
        dtypes: of the logits.
        offset: elements by which they begin after a multiple of 128 bits.
    """

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(math.prod(shape) + offset, dtype=dtype, device="meta")[offset:].view(shape)

    places = f"@{offset}" if offset else ""
    for shape, dtype in itertools.product(shapes, dtypes):
        outer, classes, inner = (*shape, 1)[:3]
        logits = meta(outer, classes, inner, dtype=DTYPES[dtype])
        target = meta(outer * inner, dtype=torch.int64)
        for form, call in _forms(logits, target, meta):
            yield f"{'x'.join(map(str, shape))}{places} {dtype} {form}", call


def _forms(logits: Tensor, target: Tensor, meta: Callable[..., Tensor]) -> Iterator[Case]:
    """Yield the forms of a shape, and their calls."""
    from fastloss import kernels

    row, one = meta(target.numel(), dtype=torch.float64), meta(dtype=logits.dtype)
    neither, first, both = (WantedGradients(*wanted) for wanted in ((False, False), (True, False), (True, True)))

    def inputs(form: str, labels: Tensor = target) -> LossInputs:
        words = re.split("[-+]", form)
        weight = meta(logits.shape[1], dtype=logits.dtype) if "weight" in words else None
        options = dict(_OPTIONS[word] for word in words if word in _OPTIONS)
        return LossInputs(logits, labels, weight, LossOptions(**options))

    for form in HARD:
        given, waits = inputs(form), "none" in form
        forward = partial(kernels.cross_entropy_forward, given, loss_dtype=logits.dtype, inplace=False)
        yield f"{form} forward", partial(forward, gradient=False)
        if not waits:  # whose gradient waits for the upstream one
            yield f"{form} forward+gradient", partial(forward, gradient=True)
        backward = partial(kernels.cross_entropy_backward, meta(*target.shape, dtype=logits.dtype) if waits else one)
        yield f"{form} backward", partial(_after, partial(forward, gradient=False), backward, given, inplace=False)
    chunk = LossInputs(logits, target, None, LossOptions(reduction="sum", topk=(1,)))
    how = {"loss_dtype": torch.float32, "gradient": True, "inplace": True, "divisor": meta(dtype=torch.float64)}
    yield "chunk of a larger batch", partial(kernels.cross_entropy_forward, chunk, **how)
    yield "rescale", partial(kernels.rescale, logits, one, inplace=True)
    yield "accuracy alone", partial(kernels.accuracy, logits, target, (1, 5), -100, "mean")
    for form in SOFT:
        given = inputs(form, logits)
        forward = partial(kernels.soft_cross_entropy_forward, given, loss_dtype=logits.dtype)
        for words, wanted in (("forward", neither), ("forward+gradient", first), ("forward+gradients", both)):
            yield f"{form} {words}", partial(forward, wanted)
        backward = partial(kernels.soft_cross_entropy_backward, one)
        yield f"{form} backward", partial(_after, partial(forward, neither), backward, given, first)
    for form in STATISTICS:
        every, squares, mean = (word in re.split("[-+]", form) for word in ("every", "squares", "mean"))
        given, part = inputs(form), meta(*target.shape, dtype=torch.float32)
        parts = contract.WantedParts(*(every,) * 5, log_sum_sq_probs=squares, mean_logit=mean)
        upstreams = contract.PartUpstreams(one, *(one, part, part) if every else ())
        upstreams = upstreams._replace(log_sum_sq_probs=part if squares else None, mean_logit=part if mean else None)
        forward = partial(kernels.statistics_forward, given, parts, loss_dtype=logits.dtype)
        yield f"{form} forward", forward
        backward = partial(kernels.statistics_backward, upstreams)
        yield f"{form} backward", partial(_after, forward, backward, given)
    for form, beta in DIVERGENCES.items():
        cap = 30.0 if "softcap" in form else None
        of_side = LossOptions(softcap=cap, temperature=2.0)
        of_beta = contract.DivergenceOptions(beta, of_side, of_side)
        yield f"divergence-{form}", partial(kernels.kl_div, contract.DivergenceInputs(logits, logits, row, of_beta))
    mixed, lse = contract.DivergenceInputs(logits, logits, None, of_beta), contract.DivergenceRows(row, row)
    yield "divergence-mixed loss", partial(kernels.kl_div, mixed)
    yield "divergence-mixed shard lse", partial(kernels.kl_div, mixed, lse_only=True)
    yield "divergence-mixed shard loss", partial(kernels.kl_div, mixed, lse)
    known = lse._replace(loss=row, level=row)
    yield "divergence-mixed shard gradient", partial(kernels.kl_div, mixed._replace(upstream=row), known)
    # A shard of the classes.
    elsewhere = contract.ExternalLabel(row, target, 5)
    yield "shard ranks", partial(kernels.label_ranks, logits, elsewhere)
    saved = row, None, None
    for form in SHARDS:
        hard, soft = inputs(form), inputs(form, logits)
        yield f"{form} forward", partial(kernels.row_statistics_forward, hard, contract.WantedNumbers(), elsewhere)
        yield f"{form} soft forward", partial(kernels.soft_statistics_forward, soft, ranked=elsewhere)
        of_rows = (row, row, None, row if "smoothing" in form else None)
        yield f"{form} backward", partial(kernels.row_statistics_backward, of_rows, hard, saved, inplace=False)
        yield f"{form} soft backward", partial(kernels.soft_statistics_backward, of_rows, soft, row, row, first)


def _after(
    forward: Callable[[], Any], backward: Callable[..., Any], given: LossInputs, *wanted: Any, **how: Any
) -> Any:
    """Call backward with what the forward pass saves."""
    return backward(given, forward().saved, *wanted, **how)


# An SGD step's forms: the parameters' dtype, then the momentum's, where it is another, or the rounding; and more.
SGD = (
    *(f"float32 {form}" for form in ("plain", "momentum", "momentum+4groups", "momentum+5groups")),
    *("float32 momentum+amp+clip", "float32 momentum+amp+clip+begun+strided+tensors", "float64 momentum"),
    *(f"bfloat16 {form}" for form in ("momentum", "float32-momentum", "master", "kahan", "stochastic")),
    "float16 stochastic",
)


def sgd_cases() -> Iterator[Case]:
    """Yield an optimizer's launches. They are recorded from tensors that exist: their addresses are in a table."""
    from fastloss import kernels

    for name in SGD:
        dtype, form = getattr(torch, name.split()[0]), name.split()[1]
        param, grad = torch.empty(64, 64, dtype=dtype), torch.empty(64, 64, dtype=dtype)
        if "strided" in form:
            grad = grad.T
        wide = form in ("master", "float32-momentum")
        momentum = None if form == "plain" else torch.empty_like(param, dtype=torch.float32 if wide else dtype)
        companion = {"master": param.float(), "kahan": param.clone()}.get(form)
        begun = {0: torch.zeros(1, dtype=torch.uint8)} if "begun" in form else {}
        rounding = form if form in ("master", "kahan", "stochastic") else "nearest"
        batch = contract.SGDBatch([param], [momentum], [companion], [0], rounding, begun)
        scalar = torch.ones(())
        lr = scalar if "tensors" in form else 0.1
        groups = next((n for n in (4, 5) if f"{n}groups" in form), 1)
        rule = contract.SGDRule(lr, 0.9 if momentum is not None else 0.0, 0.0, 1e-4, False, False, False)
        scale = scalar if "amp" in form else None
        controls = contract.SGDControls(scale, scale, scalar.double() if "clip" in form else None, 1.0)
        yield f"sgd {name} step", partial(kernels.sgd_step, batch, [grad], [rule] * groups, controls)
        if "clip" in form or dtype == torch.bfloat16:
            yield f"sgd {name} squares", partial(kernels.sgd_squares, batch, [grad], scalar.double())


def chosen(quick: bool, only: str = "") -> list[Launch]:
    """Return the launches that are compiled; with ``only``, those whose labels contain it."""
    launches: list[Launch] = []

    def record(calls: Iterable[Case]) -> Iterator[Launch]:
        for label, call in calls:
            if only in label:
                of_call: list[Launch] = []
                with recorded(of_call, label):
                    call()
                yield from of_call

    if quick:
        launches += record(itertools.chain(cases([*QUICK_SHAPES, *VIEWS], ["bfloat16"]), sgd_cases()))
    else:
        launches += record(itertools.chain(cases([*SHAPES, *VIEWS]), cases(UNALIGNED, offset=1), sgd_cases()))
        reached = {form_and_tile(launch) for launch in launches}
        for launch in record(cases([*MORE_VIEWS, *sweep()])):
            if form_and_tile(launch) not in reached:
                reached.add(form_and_tile(launch))
                launches.append(launch)
    return launches


def form_and_tile(launch: Launch) -> tuple[object, ...]:
    """Return the kernel, the dtype, what was asked of it, and the tile that was chosen for the shape."""
    _, dtype, form = launch.label.split(maxsplit=2)
    names = ("VEC", "COLS", "BLOCK", "BY_INNER", "LOOPED", "STAGES", "SPLIT", "num_warps", "maxnreg")
    constants = launch.constants
    tile = tuple(str(constants.get(name)) for name in names)
    return launch.kernel.__name__, dtype, form, *tile


def distinct(launches: Iterable[Launch], targets: Sequence[str]) -> list[tuple[Launch, str]]:
    """Pair each launch with each target, once where Triton would compile the same; those with a budget always."""
    pairs, seen = [], set()
    for launch, target in itertools.product(launches, targets):
        constants = tuple(sorted((name, str(value)) for name, value in launch.options.items()))
        key = launch.kernel.__name__, target, constants, launch.label.split()[1], str(_specialized(launch.arguments))
        if key not in seen or launch.label in BUDGETS:
            pairs.append((launch, target))
        seen.add(key)
    return pairs


def examined(work: Sequence[tuple[Launch, str]], jobs: int) -> Iterator[Compiled]:
    """Compile each launch, by ``jobs`` processes, and yield the results in their order."""
    global _work
    _work = work  # which the processes inherit: launches hold functions that can't be sent
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_examine_number, range(len(work)))


_work: Sequence[tuple[Launch, str]] = ()


def _examine_number(number: int) -> Compiled:
    launch, name = _work[number]
    return examine(launch, name, TARGETS[name])


_COLUMNS = (  # titles, numbers and their forms, and meanings
    ("regs", "registers", "", "registers of a thread"),
    ("spill", "spills", "", "bytes that a thread spills"),
    ("shared", "shared", "", "bytes of shared memory of a program"),
    ("instr", "instructions", ".1f", "instructions an element, of all hot loops (NVIDIA's targets, as the next two)"),
    ("MUFU", "special", ".2f", "special-function operations an element, of the hot loop that has the most"),
    ("slots", "slots", ".0%", "share of an H100's issue slots that the hottest loop takes at 3 TB/s"),
)
_REST = (
    ("accesses", "to device memory: LDG loads, STG stores, of so many bits, × how many stand in the code; faults"),
    ("made for", "shape, dtype and form of the launch"),
)


def _line(r: Compiled) -> str:
    numbers = [(len(title), getattr(r, name), form) for title, name, form, _ in _COLUMNS]
    cells = " ".join(("-" if number is None else format(number, form)).rjust(size) for size, number, form in numbers)
    widths = " ".join(f"{kind}×{count}" for kind, count in sorted(r.widths.items()))
    faults = "".join(f" FAULT: {fault};" for fault in r.faults)
    return f"{r.kernel:19} {r.target:7} {cells}  {widths};{faults} {r.label}"


def main(arguments: list[str] | None = None) -> int:
    """Print one line a compiled kernel; exit code 1 if any has a fault."""
    meanings = [*((name, meaning) for name, *_, meaning in _COLUMNS), *_REST]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.codegen",
        description=__doc__,
        epilog="\n".join(["columns:", *(f"  {name:10}{meaning}" for name, meaning in meanings)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="bfloat16 at three shapes and two views, and SGD")
    parser.add_argument("--only", default="", help="compile only labels that contain this")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (default: %(default)s)"
    )
    parsed = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return refuse("codegen", "it compiles; unset TRITON_INTERPRET")
    if parsed.jobs < 1:
        return refuse("codegen", f"--jobs is {parsed.jobs}; expected 1 or more")
    work = []
    targets = parsed.target or list(TARGETS)
    # AMD's compiler puts no stages into shared memory: plan() asks NVIDIA's devices alone.
    planned = {name: SHARED[name if TARGETS[name].backend == "cuda" else "sm_90"] for name in targets}
    for shared_bytes in sorted(set(planned.values()), reverse=True):
        pretend_to_be_an_h100(shared_bytes)
        launches = chosen(parsed.quick, parsed.only)
        work += distinct(launches, [name for name in targets if planned[name] == shared_bytes])
    if not work:
        return refuse("codegen", f"--only is {parsed.only!r}; no label contains it")
    titles = " ".join(title for title, *_ in _COLUMNS)
    print(f"{'kernel':19} {'target':7} {titles}  {'; '.join(title for title, _ in _REST)}")
    faults, with_loops = 0, dict[tuple[str, str], bool]()
    for r in examined(work, parsed.jobs):
        faults += bool(r.faults)
        if r.label in BUDGETS and TARGETS[r.target].backend == "cuda":
            with_loops[r.label, r.target] = with_loops.get((r.label, r.target), False) or bool(r.loops)
        print(_line(r), flush=True)
    for label, target in sorted(key for key, has_loops in with_loops.items() if not has_loops):
        faults += 1
        print(f"FAULT: a budget, and no hot loop found; {target} {label}")
    print(f"{len(work)} compiled, {faults} with faults")
    return 1 if faults else 0


def _specialized(argument: Any) -> Any:
    """Return what Triton specializes on: pointers that are None or multiples of 16, integers that are 1 or that."""
    if isinstance(argument, tuple):
        return tuple(map(_specialized, argument))
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument >= 1 << 31
    if isinstance(argument, Tensor):
        return str(argument.dtype), argument.data_ptr() % 16 == 0
    return argument is None


if __name__ == "__main__":
    sys.exit(main())
