"""Pairs of calls that differ in one thing, on a GPU that is not there: what each starts on the short road.

Each call of a pair is made again and again, in turns with the other one. It must start what it starts in a package
that has forgotten everything, with its own tensors, and return the same kind of results. Then each entry of the short
road's key is left out in turn: some pair must notice. Run as a program by ``test_short_road.py``, in a process whose
Triton is not its interpreter.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastloss
from benchmarks.no_gpu import pretend
from fastloss.backends import short_road
from fastloss.backends.contract import WantedParts
from tests.fake_gpu import stop_at_shared_memory

Case = dict[str, Any]
started: list[tuple[Any, ...]] = []

BASE: Case = {
    "function": "cross_entropy",
    "shape": (48, 96),
    "layout": "contiguous",
    "dtype": torch.float32,
    "offset": 0,
    "leaf": True,
    "negative": False,
    "device": "cpu",
    "labels": torch.int64,  # a dtype of floating point: class probabilities
    "rows": None,  # of the target; None: as many as there are
    "target_offset": 0,
    "target_layout": "contiguous",
    "target_leaf": False,
    "target_negative": False,
    "target_device": "cpu",
    "weight": None,  # its dtype
    "weight_offset": 0,
    "weight_device": "cpu",
    "options": {},
    "scalars": {},  # a tensor's dtype and its offset for each of logit_scale and temperature
    "world": "plain",
    "upstream": torch.float32,
    "upstream_offset": 0,
    "upstreams": ("loss",),  # of the statistics: those that are backward's
}
SOFT = {**BASE, "labels": torch.float32, "target_leaf": True}
HALF = {**BASE, "dtype": torch.bfloat16, "upstream": torch.bfloat16}
NONE = {**BASE, "options": {"reduction": "none"}}
WEIGHTED = {**BASE, "weight": torch.float32}
SCALED = {**BASE, "scalars": {"logit_scale": (torch.float32, 0)}}
RANKED = {**BASE, "function": "cross_entropy_with_accuracy"}
ALONE = {**BASE, "function": "accuracy", "leaf": False}
WRITTEN = {**BASE, "options": {"inplace": True}, "leaf": False, "world": "behind an operation"}
EVERY = dict.fromkeys(WantedParts._fields, True)
STATISTICS = {**BASE, "function": "cross_entropy_with_statistics", "options": EVERY}
SUMMED = {**STATISTICS, "upstreams": ("sum", "lse", "entropy")}
SUMMED_ROWS = {
    **STATISTICS,
    "options": {**EVERY, "reduction": "none"},
    "upstreams": ("sum", "lse", "z_loss", "entropy"),
}
WORLDS = ["no_grad", "autocast", "eager", "FASTLOSS_BACKEND", "FASTLOSS_VALIDATE", "dispatch mode", "function mode"]
WORLDS += ["hooks of saved tensors", "thread", "inference_mode"]

# What else may be in the place of an entry. Any two of a base and these make a pair.
CHANGES: list[tuple[Case, dict[str, list[Any]]]] = [
    (
        BASE,
        {
            "function": ["cross_entropy_with_accuracy", "accuracy"],
            "shape": [(64, 96), (48, 97), (96,), (48, 96, 4)],
            "layout": ["transposed", "wide"],
            "dtype": [torch.bfloat16, torch.float64, torch.float16],
            "offset": [1, 4],
            "leaf": [False],
            "negative": [True],
            "device": ["meta"],
            "labels": [torch.int32, torch.uint8, torch.float32],
            "rows": [47],
            "target_offset": [1],
            "target_layout": ["strided"],
            "target_device": ["meta"],
            "weight": [torch.float32],
            "options": [
                *({"reduction": name} for name in ("sum", "none", "nothing")),
                *({"ignore_index": number} for number in (3, True, 1.0)),
                *({"label_smoothing": number} for number in (0.1, 0, 2.0, 0j)),
                *({"lse_square_scale": 0.5}, {"softcap": 3.0}, {"from_logits": 1}, {"inplace": 0}),
                *({"logit_scale": number} for number in (2.0, 1, -1.0, None)),
                *({"temperature": number} for number in (2.0, 3.0)),
            ],
            "scalars": [{"logit_scale": (torch.float32, 0)}, {"temperature": (torch.float32, 0)}],
            "world": WORLDS,
            "upstream_offset": [1],
        },
    ),
    (SOFT, {"target_leaf": [False], "target_offset": [1], "target_negative": [True], "labels": [torch.float64]}),
    (SOFT, {"target_layout": ["transposed"], "options": [{"from_logits": False}], "weight": [torch.float32]}),
    (HALF, {"world": ["autocast"], "weight": [torch.float32, torch.bfloat16], "offset": [8, 1]}),
    (NONE, {"upstream_offset": [1], "shape": [(48, 96, 4)], "dtype": [torch.float16]}),
    (WEIGHTED, {"weight": [None], "weight_offset": [1], "weight_device": ["meta"], "shape": [(3000, 96)]}),
    (
        SCALED,
        {
            "scalars": [
                *({"logit_scale": kind} for kind in ((torch.bfloat16, 0), (torch.float32, 1), (torch.int64, 0))),
                *(
                    {name: (torch.float32, 0), "temperature": (torch.float32, 0)}
                    for name in ("temperature", "logit_scale")
                ),
            ],
            "options": [{"temperature": 2.0}, {"softcap": 3.0}, {"reduction": "none"}],
            "shape": [(1, 96)],
            "leaf": [False],
            "function": ["cross_entropy_with_accuracy", "cross_entropy_with_statistics"],
            "labels": [torch.float32],
        },
    ),
    (RANKED, {"options": [{"topk": k} for k in ((1,), (1, 5), True, (True,), 1.0)], "labels": [torch.float32]}),
    (ALONE, {"options": [{"topk": k} for k in ((1,), (1, 5), True, (True,))], "labels": [torch.float32]}),
    (ALONE, {"world": ["eager"], "target_offset": [1], "leaf": [True]}),
    (WRITTEN, {"options": [{"inplace": False}], "world": ["plain"], "leaf": [True]}),
    (
        STATISTICS,
        {
            "options": [
                *({**EVERY, name: False} for name in EVERY),
                *({**EVERY, "reduction": name} for name in ("sum", "none")),
                *({**EVERY, "softcap": 3.0}, {**EVERY, "label_smoothing": 0.1}, {**EVERY, "lse_square_scale": 0.5}),
            ],
            "labels": [torch.int32, torch.float32],
            "weight": [torch.float32],
            "shape": [(48, 97), (96,), (48, 96, 4)],
            "leaf": [False],
            "world": ["no_grad", "eager"],
            "upstream_offset": [1],
            "upstreams": [
                *(("lse",), ("loss", "entropy"), ("z_loss",), ("loss", "z_loss", "lse", "entropy")),
                *(("log_sum_sq_probs",), ("mean_logit",), ("entropy", "log_sum_sq_probs", "mean_logit")),
            ],
        },
    ),
    (SUMMED, {"upstreams": [("lse", "entropy"), ("mean of lse",)]}),
    (SUMMED_ROWS, {"upstreams": [("sum", "z_loss", "lse", "entropy")]}),
]


def pairs() -> Iterator[tuple[Case, Case]]:
    yield {**BASE, "shape": (48, 192)}, {**BASE, "layout": "wide"}  # the same strides
    for base, changes in CHANGES:
        for name, values in changes.items():
            for value in values:
                yield base, {**base, name: value}


# ------------------------------------------------------------------------------------------------------- one call


def tensor(shape: tuple[int, ...], dtype: torch.dtype, offset: int, layout: str, device: str) -> Tensor:
    """Return random numbers that begin so many elements past a multiple of 64 bytes."""
    shape = (*shape[:-1], 2 * shape[-1]) if layout == "wide" else shape
    count = torch.Size(shape).numel()
    numbers = torch.rand(2 * count + 64)
    memory = numbers.to(dtype) if dtype.is_floating_point else (numbers * 90).to(dtype)
    memory = memory.to(device)
    if layout == "strided":
        return memory[offset : offset + 2 * count].view(*shape[:-1], 2 * shape[-1])[..., ::2]
    values = memory[offset : offset + count].view(shape)
    if layout == "transposed":
        return values.view(shape[1], shape[0]).t()
    return values[..., : shape[-1] // 2] if layout == "wide" else values


def leaf(values: Tensor, requires_grad: bool, negative: bool) -> Tensor:
    values = torch._neg_view(values) if negative and values.is_floating_point() else values
    return values.requires_grad_() if requires_grad else values


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class PassingFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def entered(world: str) -> contextlib.AbstractContextManager[Any]:
    """Return what a call is made in."""
    worlds: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "eager": lambda: fastloss.use_backend("eager"),
        "FASTLOSS_BACKEND": lambda: variable("FASTLOSS_BACKEND", "eager"),
        "FASTLOSS_VALIDATE": lambda: variable("FASTLOSS_VALIDATE", "1"),
        "dispatch mode": Passing,
        "function mode": PassingFunctions,
        "hooks of saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    }
    return worlds.get(world, contextlib.nullcontext)()


def upstreams_of(parts: Any, names: tuple[str, ...], memory: Tensor, offset: int) -> dict[str, Tensor]:
    """Return an upstream gradient, in ``memory``, for each output that backward begins at."""

    def like(part: Tensor, row: int) -> Tensor:
        numbers = memory[row].view(part.dtype)
        return numbers[offset : offset + part.numel()].view(part.shape)

    if names == ("loss",):
        return {"loss": like(parts[0] if isinstance(parts, tuple) else parts, 0)}
    if names == ("mean of lse",):
        return {"lse": memory[0, 0].expand(parts.lse.shape)}
    if names[0] == "sum":  # of the last two, whose upstream gradients lie in the same memory
        *others, one, two = names[1:]
        return {
            **upstreams_of(parts, tuple(others), memory[1:], offset),
            **dict.fromkeys((one, two), like(parts.lse, 0)),
        }
    return {name: like(getattr(parts, name), row) for row, name in enumerate(names)}


def call(case: Case) -> tuple[Any, ...]:
    """Return what a call and its backward pass start, with new tensors, and of what kind their results are."""
    started.clear()
    if case["world"] == "thread":
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(call({**case, "world": "plain"})))
        thread.start()
        thread.join()
        return tuple(results)
    shape, soft = case["shape"], case["labels"].is_floating_point
    rows = (case["rows"] or shape[0], *shape[2:]) if len(shape) > 1 else ()
    x = tensor(shape, case["dtype"], case["offset"], case["layout"], case["device"])
    x = leaf(x, case["leaf"], case["negative"])
    y = tensor(shape if soft else (rows or (1,)), case["labels"], case["target_offset"], case["target_layout"],
               case["target_device"])  # fmt: skip
    y = leaf(y if rows or soft else y[0], case["target_leaf"], case["target_negative"])
    tensors = {"input": x, "target": y}
    arguments = [x, y]
    if case["weight"] is not None:
        classes = shape[1] if len(shape) > 1 else shape[0]
        w = tensor((classes,), case["weight"], case["weight_offset"], "contiguous", case["weight_device"])
        tensors["weight"] = w
        arguments.append(w)
    scalars = {
        name: torch.empty(9, dtype=dtype)[offset].fill_(2) for name, (dtype, offset) in case["scalars"].items()
    }
    tensors |= scalars
    memory = torch.rand(4, 4096)  # of the upstream gradients: what is free later may have been a launch's
    results: Any = None
    kinds: list[Any] = []
    try:
        with entered(case["world"]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if case["world"] == "behind an operation":
                arguments[0] = tensors["behind"] = x.detach().clone().requires_grad_() * 2
            results = getattr(fastloss, case["function"])(*arguments, **case["options"], **scalars)
            parts, results = results, results if isinstance(results, tuple) else (results,)
            flat = [r for result in results for r in (result if isinstance(result, tuple) else (result,))]
            kinds += [None if r is None else (r.shape, r.dtype, r.device, r.requires_grad, r._version) for r in flat]
            if flat[0].requires_grad:
                given = upstreams_of(parts, case["upstreams"], memory, case["upstream_offset"])
                tensors |= {f"of {name}": upstream for name, upstream in given.items()}
                roots = [flat[0] if name == "loss" else getattr(parts, name) for name in given]
                torch.autograd.backward(roots, [t.to(flat[0].device) for t in given.values()])
    except Exception as error:
        kinds.append((type(error).__name__, str(error)))
    for leaf_ in (x, y):
        kinds.append(None if leaf_.grad is None else (leaf_.grad.shape, leaf_.grad.stride(), leaf_.grad.dtype))
    names = {t.data_ptr(): name for name, t in tensors.items() if t.device.type == "cpu"}

    def named(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(named, argument))
        if isinstance(argument, int) and argument > 1 << 22:  # an address: other numbers are small
            return names.get(argument, f"memory {argument % 16}")
        return argument

    return tuple((*launch[:5], named(launch[5])) for launch in started), tuple(kinds)


def note(source: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    """Take a launch down: tensors by their addresses, as the memory of some is free when the call is over."""

    def address(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(address, argument))
        return argument.data_ptr() if isinstance(argument, Tensor) else argument

    constants = {str(place): str(value) for place, value in source.constants.items()}
    kept = tuple(map(address, arguments))
    started.append((source.name, str(source.signature), str(constants), str(source.attrs), grid, kept))


# ---------------------------------------------------------------------------------------------------------- pairs


def expected_of(cases: list[Case], forget: Callable[[], None]) -> dict[str, tuple[Any, ...]]:
    expected = {}
    for case in cases:
        if str(case) not in expected:
            forget()
            call(case)  # compiles
            forget()
            expected[str(case)] = call(case)
    return expected


def differences(
    pairs_of: list[tuple[Case, Case]], expected: dict[str, Any], forget: Callable[[], None]
) -> Iterator[str]:
    """Yield what calls did otherwise than in a package that has forgotten everything."""
    for one, other in pairs_of:
        forget()
        for case in (one, one, one, other, other, other, one, other):
            result = call(case)
            if result != expected[str(case)]:
                changed = {name: value for name, value in other.items() if value != one[name]}
                first = one if case is one else changed
                yield f"{one['function']} {changed}, by {first}:\n{result}\n{expected[str(case)]}"
                break


def of_changing_shapes(calls: int) -> None:
    """Make so many calls of random shapes; the process needs no more memory after a tenth of them."""
    pretend()
    stop_at_shared_memory()
    rows, classes = (torch.randint(most, (calls,)).tolist() for most in (270, 4))
    memory = torch.randn(500 * 32)
    labels = torch.zeros(500, dtype=torch.int64)
    counts = []
    for number in range(calls):
        n, c = 1 + rows[number], 8 * (1 + classes[number])
        fastloss.cross_entropy(memory[: n * c].view(n, c).detach().requires_grad_(), labels[:n]).backward()
        if number in (calls // 10, calls - 1):
            gc.collect()
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
    grown = counts[1] - counts[0]
    assert len(short_road.known) <= 1024
    assert grown < 16 << 20, grown
    print(f"{calls} calls of {len(set(zip(rows, classes, strict=True)))} shapes: {grown >> 10} KB more")


def in_threads() -> None:
    """Let threads make the same calls at once: each starts kernels with its own tensors."""
    failures: list[str] = []

    def run(x: Tensor, y: Tensor) -> None:
        for _ in range(300):
            x.grad = None
            fastloss.cross_entropy(x, y).backward()
            if x.grad is None or x.grad.shape != x.shape:
                failures.append("no gradient")

    tensors = [(torch.randn(48, 96).requires_grad_(), torch.randint(96, (48,))) for _ in range(4)]
    started.clear()
    threads = [threading.Thread(target=run, args=pair) for pair in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]
    known = {x.data_ptr(): y.data_ptr() for x, y in tensors}
    launches = [launch[5] for launch in started if launch[0].startswith("_forward")]
    assert len(launches) == 1200
    shared: dict[int, set[Any]] = {}
    for arguments in launches:
        assert known[arguments[0][0]] == arguments[1]
        shared.setdefault(arguments[0][0], set()).add(arguments[5])
    assert len({memory for each in shared.values() for memory in each}) == 4, "threads share memory"


def main() -> None:
    pretend(note)
    stop_at_shared_memory()
    forget: Callable[[], None] = sys.modules["fastloss.kernels.launch"].forget
    torch.manual_seed(0)
    both = list(pairs())
    expected = expected_of([case for pair in both for case in pair], forget)
    wrong = list(differences(both, expected, forget))
    assert not wrong, f"{len(wrong)} pairs\n" + "\n\n".join(wrong[:5])

    replayed = 0
    for base, _ in CHANGES:
        forget()
        for _ in range(4):
            call(base)
        replayed += any(c.forward is not None for c in short_road.known.values())
    assert replayed == len(CHANGES), replayed

    key = short_road._key
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    entries, survivors = len(key(x, y, None, ())), []
    for entry in range(entries):
        short_road._key = lambda *a, entry=entry: key(*a)[:entry] + key(*a)[entry + 1 :]
        if next(differences(both, expected, forget), None) is None:
            survivors.append(entry)
    short_road._key = key
    assert not survivors, f"entries of the key that nothing needs: {survivors}"
    in_threads()
    print(f"{len(both)} pairs, {len(expected)} calls, {entries} entries of the key")


if __name__ == "__main__":
    if sys.argv[1:]:
        of_changing_shapes(int(sys.argv[1]))
    else:
        main()
