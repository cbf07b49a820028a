"""``python -m fastloss bench`` and ``pytest benchmarks``: checks and reports, never speeds."""

from __future__ import annotations

import importlib.abc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import LIMIT
from torch import Tensor

from fastloss import bench
from fastloss.__main__ import main

if bench.missing_extras():
    pytest.skip('needs pip install "fastloss[bench]"', allow_module_level=True)

from rich.console import Console

from fastloss.bench import report
from fastloss.bench.measure import Row, measure
from fastloss.bench.workloads import Shape, Workload, parse_shape, workloads
from fastloss.measuring import clock, contenders, inputs
from fastloss.measuring.contenders import (
    CONTENDERS,
    DTYPES,
    LINEAR_OPS,
    LOSS_OPS,
    OPS,
    ROW_OPS,
    Contender,
    Functions,
    contenders_of,
)
from fastloss.measuring.machine import first_line
from fastloss.measuring.reference import Outcome, errors_of_eager, verdict

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = Shape(6, 40)
HEAD = Shape(6, 40, 9)
PNG = b"\x89PNG\r\n\x1a\n"

needs_benchmarks = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "conftest.py").exists(), reason="needs the repository's benchmarks"
)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))), reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def _as_a_user_runs_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """But for a narrow terminal, and for the size of what is copied and rotated, which takes its time."""
    monkeypatch.delenv("FASTLOSS_BACKEND", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(inputs, "_ROTATED_BYTES", 1 << 22)
    monkeypatch.setattr(clock, "_COPIED_BYTES", {"cpu": 1 << 20})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other where other programs run too
    yield
    torch.set_num_threads(threads)


def run(op: str, *asked: Contender, shape: Shape = TINY, dtype: str = "float32", target: str = "hard") -> list[Row]:
    """The rows of a workload, timed for no longer than it must be."""
    return measure(Workload(op, shape, DTYPES[dtype], target), asked, CPU, budget=1e-9)


def losing(name: str, loss: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Contender:
    """A contender with this loss, and torch's accuracy."""
    functions = Functions(loss, contenders._accuracies, contenders._with_accuracies(loss))
    return Contender(name, "torch", lambda: functions, (*LOSS_OPS, "host"), cpu=True, **options)


# ---------------------------------------------------------------------------------------------- right contenders


@pytest.mark.parametrize("shape", [TINY, Shape(5, 3), Shape(30, 9000)], ids=str)
@pytest.mark.parametrize("target", ["hard", "soft"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", LOSS_OPS)
def test_losses_are_right_and_timed(op: str, dtype: str, target: str, shape: Shape) -> None:
    """Below and above the size from which the fallback makes its own pass; fewer classes than top-5 asks for."""
    for row in run(op, CONTENDERS["fastloss"], CONTENDERS["torch"], shape=shape, dtype=dtype, target=target):
        assert_timed(row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_optimizers_are_right_and_timed(dtype: str) -> None:
    rows = {row.contender: row for row in run("sgd", *contenders_of("sgd"), shape=Shape(3, 500), dtype=dtype)}
    for name in ("fastloss", "torch-loop", "torch-foreach"):
        assert_timed(rows[name])
    # torch 2.13's fused step on a CPU loses what 16-bit parameters can't hold; a later one may not.
    assert rows["torch-fused"].status in (("timed",) if dtype == "float32" else ("timed", "wrong"))
    assert rows["apex-sgd"].status in ("absent", "unfit")


def test_host_time_has_no_bandwidth() -> None:
    for row in run("host", CONTENDERS["fastloss"], CONTENDERS["torch"]):
        assert row.timed, row
        assert row.moved_bytes == 0
        assert (
            row.gigabytes_per_second is row.share_of_copy is row.copy_gigabytes_per_second is row.peak_bytes is None
        )


@pytest.mark.parametrize("shape", [HEAD, Shape(300, 700, 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_losses_are_right_and_timed(dtype: str, shape: Shape) -> None:
    """In one chunk and in several."""
    ours, theirs = run("linear", CONTENDERS["fastloss"], CONTENDERS["torch"], shape=shape, dtype=dtype)
    for row in (ours, theirs):
        assert_timed_linear(row)
    rows, classes, features = shape
    size = DTYPES[dtype].itemsize
    assert theirs.peak_bytes is not None
    assert theirs.peak_bytes >= rows * classes * size  # the logits, at least; the gradients don't count
    if dtype == "float32":
        assert theirs.peak_bytes < 4 * rows * classes * size + (rows + classes) * features * size


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(each, marks=pytest.mark.slow) for each in ("bfloat16", "float16"))]
)
@pytest.mark.parametrize("op", ROW_OPS)
def test_losses_of_rows_are_right_and_timed(op: str, dtype: str) -> None:
    """The parts of linear_cross_entropy_with_statistics give the same loss."""
    names = [name for name in ("fastloss", "torch", "fastloss-parts") if op in CONTENDERS[name].ops]
    for row in run(op, *map(CONTENDERS.__getitem__, names), shape=Shape(300, 700, 9), dtype=dtype):
        assert_timed_linear(row)
        assert (row.gradient_error is None) == (op == "linear-topk")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["linear-tokens", "linear-tokens+entropy", "linear-kl"])
def test_trls_losses_of_rows_are_right_and_timed(op: str) -> None:
    pytest.importorskip("trl")
    rows = run(op, *(each for each in contenders_of(op) if each.distribution == "trl"), shape=Shape(60, 700, 9))
    assert rows
    for row in rows:
        assert_timed_linear(row)


@pytest.mark.parametrize(
    ("op", "change", "what"),
    [
        ("linear-topk", lambda loss, hidden: loss * 1.001, "loss off by"),
        ("linear-kl", lambda loss, hidden: loss + 1e-3 * (hidden.sum() - hidden.sum().detach()), "gradient off by"),
    ],
)
def test_a_wrong_loss_of_rows_is_marked_and_not_timed(
    op: str, change: Callable[[Tensor, Tensor], Tensor], what: str
) -> None:
    right = contenders.ours().of_rows
    assert right is not None

    def loss(hidden: Tensor, *others: Tensor) -> Tensor:
        return change(right[op](hidden, *others), hidden)

    wrong = Contender("wrong", "torch", lambda: Functions(of_rows={op: loss}), (op,), cpu=True)
    (row,) = run(op, wrong, shape=Shape(50, 600, 7))
    assert (row.status, row.milliseconds) == ("wrong", None)
    assert row.reason.startswith(what)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs torch 2.13")
def test_torchs_linear_loss_is_right_and_timed() -> None:
    (row,) = run("linear", CONTENDERS["torch-linear"], shape=HEAD)
    assert_timed_linear(row)


def test_a_torch_without_the_linear_loss_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    row, other = run("linear", CONTENDERS["torch-linear"], CONTENDERS["torch"], shape=HEAD)
    assert row.status == "absent"
    assert "has no F.linear_cross_entropy; torch 2.13 has" in row.reason
    assert other.timed


@pytest.mark.slow
@needs_compiler
def test_compiled_losses_are_right_and_timed() -> None:
    for row in run("loss+accuracy", CONTENDERS["torch.compile"], CONTENDERS["fastloss"]):
        assert_timed(row)
    for row in run("linear", CONTENDERS["torch.compile"], CONTENDERS["fastloss"], shape=HEAD):
        assert_timed_linear(row)


def assert_timed_linear(row: Row) -> None:
    """Beside three bare products, and not beside a copy."""
    assert row.timed, row
    assert row.moved_bytes == 0
    assert row.gigabytes_per_second is row.share_of_copy is row.copy_gigabytes_per_second is None
    for number in (row.milliseconds, row.teraflops, row.products_milliseconds, row.times_products):
        assert number is not None
        assert math.isfinite(number)
        assert number > 0
    assert row.teraflops == pytest.approx(6 * row.rows * row.classes * row.features / row.milliseconds / 1e9)
    assert row.times_products == pytest.approx(row.milliseconds / row.products_milliseconds)
    assert row.turns >= 5


def assert_timed(row: Row) -> None:
    """What a row says agrees with itself."""
    assert row.timed, row
    assert row.reason == ""
    for number in (row.milliseconds, row.gigabytes_per_second, row.share_of_copy, row.copy_gigabytes_per_second):
        assert number is not None
        assert math.isfinite(number)
        assert number > 0
    assert row.gigabytes_per_second == pytest.approx(row.moved_bytes / row.milliseconds / 1e6)
    assert row.share_of_copy == pytest.approx(row.gigabytes_per_second / row.copy_gigabytes_per_second)
    assert row.peak_bytes is not None
    assert row.peak_bytes >= (row.moved_bytes // 2 if row.op == "forward+backward" and row.target == "hard" else 0)
    assert row.turns >= 5
    assert row.calls_a_turn >= 1


def test_ratios_are_one_time_over_the_other() -> None:
    ours, theirs = run("forward", CONTENDERS["fastloss"], CONTENDERS["torch"])
    assert ours.milliseconds is not None
    assert theirs.milliseconds is not None
    assert ours.ratios == {"torch": pytest.approx(ours.milliseconds / theirs.milliseconds)}
    assert theirs.ratios == {"fastloss": pytest.approx(theirs.milliseconds / ours.milliseconds)}


@pytest.mark.parametrize(
    ("op", "dtype", "target", "expected"),
    [
        ("forward", "float32", "hard", 6 * 40 * 4),
        ("forward", "bfloat16", "soft", 2 * 6 * 40 * 2),
        ("forward+backward", "float16", "hard", 2 * 6 * 40 * 2),
        ("forward+backward", "float32", "soft", 3 * 6 * 40 * 4),
        ("accuracy", "bfloat16", "hard", 6 * 40 * 2),
        ("loss+accuracy", "bfloat16", "hard", 2 * 6 * 40 * 2),
        ("sgd", "float32", "hard", 20 * 6 * 40),
        ("sgd", "bfloat16", "hard", 10 * 6 * 40),
        ("host", "float32", "hard", 0),
    ],
)
def test_moved_bytes(op: str, dtype: str, target: str, expected: int) -> None:
    assert Workload(op, TINY, DTYPES[dtype], target).moved_bytes == expected
    assert Workload(op, TINY, DTYPES[dtype], target).operations == 0


def test_operations() -> None:
    workload = Workload("linear", HEAD, torch.bfloat16)
    assert (workload.operations, workload.moved_bytes) == (6 * 6 * 9 * 40, 0)
    assert workload.gradient_bytes == (6 + 40) * 9 * 2
    assert workload.input_bytes == workload.gradient_bytes + 6 * 8
    assert str(workload) == "linear-6x9x40-bfloat16"


def test_every_workload_is_what_it_is_called() -> None:
    chosen = workloads(OPS, list(DTYPES), ["hard", "soft"], CPU, size="tiny")
    assert len({str(workload) for workload in chosen}) == len(chosen)
    assert {workload.op for workload in chosen} == set(OPS)
    assert str(Workload("forward", TINY, torch.bfloat16, "soft")) == "forward-6x40-bfloat16-soft"
    assert not [workload for workload in chosen if workload.op in ("sgd", *LINEAR_OPS) and workload.soft]


def test_inputs_are_rotated_unless_they_are_small() -> None:
    small = Workload("forward", TINY, torch.float32).inputs(CPU, seed=0)
    large = Workload("forward+backward", Shape(30, 9000), torch.float32).inputs(CPU, seed=0)
    assert len(small) == 1
    assert len(large) == 4
    assert sum(tensor.nbytes for pair in large for tensor in pair) >= 1 << 22
    assert not torch.equal(large[0].logits, large[1].logits)
    assert all(pair.logits.requires_grad for pair in large)


# ------------------------------------------------------------------------------------------------ wrong contenders


def _off(logits: Tensor) -> float:
    """Eager PyTorch keeps 16-bit logarithms of the probabilities, so that much is forgiven there."""
    return 1e-3 if logits.dtype == torch.float32 else 0.5


def _wrong_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target) * (1 + _off(logits))


def _wrong_gradient(logits: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, target)
    return (1 + _off(logits)) * loss - _off(logits) * loss.detach()


def _without_small_gradients(logits: Tensor, target: Tensor) -> Tensor:
    through = logits.clone()
    if through.requires_grad:
        through.register_hook(lambda gradient: gradient * (gradient.abs() > 1e-5))
    return F.cross_entropy(through, target)


def _nan_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target) * math.nan


def _nan_gradient(logits: Tensor, target: Tensor) -> Tensor:
    through = logits.clone()
    if through.requires_grad:
        through.register_hook(lambda gradient: gradient.index_fill(1, torch.tensor(3), math.nan))
    return F.cross_entropy(through, target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "loss", "what"),
    [
        ("forward", _wrong_loss, "loss"),
        ("forward", _nan_loss, "loss"),
        ("forward+backward", _wrong_gradient, "gradient"),
        ("forward+backward", _without_small_gradients, "gradient"),
        ("forward+backward", _nan_gradient, "gradient"),
        ("loss+accuracy", _nan_loss, "loss"),
        ("host", _wrong_gradient, "gradient"),
    ],
)
def test_a_wrong_loss_is_marked_and_not_timed(
    op: str, loss: Callable[[Tensor, Tensor], Tensor], what: str, dtype: str
) -> None:
    right, wrong = run(op, CONTENDERS["torch"], losing("wrong", loss), shape=Shape(8, 600), dtype=dtype)
    assert right.timed
    assert wrong.status == "wrong"
    assert wrong.reason.startswith(f"{what} off by ")
    assert wrong.milliseconds is wrong.gigabytes_per_second is wrong.peak_bytes is None
    assert "wrong" not in right.ratios
    json.dumps([asdict(right), asdict(wrong)], allow_nan=False)


def _linear_off(hidden: Tensor, head: Tensor, target: Tensor, off: float = 1e-2) -> Tensor:
    return contenders._torch_linear_loss(hidden, head, target) * (1 + off)


def _without_small_head_gradients(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    through = head.clone()
    through.register_hook(lambda gradient: gradient * (gradient.abs() > 1e-4))
    return contenders._torch_linear_loss(hidden, through, target)


def _wrong_hidden_gradient(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return contenders._torch_linear_loss(1.5 * hidden - 0.5 * hidden.detach(), head, target)


def _nan_head_gradient(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    through = head.clone()
    through.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(3), math.nan))
    return contenders._torch_linear_loss(hidden, through, target)


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (_linear_off, "loss"),
        (_without_small_head_gradients, "gradient"),
        (_wrong_hidden_gradient, "gradient"),
        (_nan_head_gradient, "gradient"),
    ],
)
def test_a_wrong_linear_loss_is_marked_and_not_timed(loss: contenders.LinearLoss, what: str) -> None:
    wrong = Contender("wrong", "torch", lambda: Functions(linear=loss), ("linear",), cpu=True)
    right, row = run("linear", CONTENDERS["fastloss"], wrong, shape=Shape(50, 600, 7))
    assert right.timed
    assert (row.status, row.milliseconds) == ("wrong", None)
    assert row.reason.startswith(f"{what} off by ")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_losss_error_is_that_of_its_terms(dtype: str) -> None:
    """The float64 reference itself, against plain PyTorch's in float64."""
    workload = Workload("linear", Shape(50, 600, 7), DTYPES[dtype])
    made = workload.inputs(CPU, seed=0)[0]
    exact = workload.reference(made)
    wide = [each.detach().double().requires_grad_() for each in made[:2]]
    loss = contenders._torch_linear_loss(*wide, made.target)
    gradients = torch.autograd.grad(loss, wide, torch.full_like(loss, workload.upstream))
    (error,) = exact.errors(Outcome(loss, gradients))
    assert max(error) < 1e-12
    changed = gradients[1].clone()
    changed[3] *= 1.25  # a row without a label or with one: its terms don't cancel by more than they add up to
    off, cut = exact.errors(Outcome(loss, (gradients[0], changed)), Outcome(loss, (gradients[0], changed[:-1])))
    assert 0 < off.gradient <= 0.25 + 1e-6
    assert cut.gradient == math.inf


def test_the_reference_of_linear_makes_do_with_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
        if len(hidden) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return contenders._torch_linear_loss(hidden, head, target)

    reference = replace(CONTENDERS["torch"], load=lambda: Functions(linear=limited))
    monkeypatch.setitem(CONTENDERS, "torch", reference)
    ours, theirs = run("linear", CONTENDERS["fastloss"], reference, shape=Shape(50, 600, 7))
    assert ours.timed
    assert theirs.status == "out of memory"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda shares: (shares[0] + 1 / 6, shares[1]), "wrong"),
        (lambda shares: (shares[0], shares[1] - 1 / 6), "wrong"),
        (lambda shares: (shares[0], shares[1] * math.nan), "wrong"),
        (lambda shares: shares[:1], "failed"),
        (lambda shares: (), "failed"),
    ],
)
@pytest.mark.parametrize("op", ["accuracy", "loss+accuracy"])
def test_a_wrong_accuracy_is_marked(op: str, change: Callable[..., tuple[Tensor, ...]], status: str) -> None:
    def accuracies(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return change(contenders._accuracies(logits, target))

    functions = Functions(
        None, accuracies, lambda logits, target: (F.cross_entropy(logits, target), accuracies(logits, target))
    )
    (row,) = run(op, Contender("wrong", "torch", lambda: functions, (op,), cpu=True))
    assert row.status == status, row
    assert status == "failed" or row.reason.startswith("accuracy off by ")


def test_ties_may_count_either_way_and_no_more() -> None:
    workload = Workload("accuracy", Shape(2, 6), torch.float32)
    made = workload.inputs(CPU, seed=0)[0]
    made.logits.copy_(torch.tensor([[1.0, 1.0, 0, 0, 0, 0], [2.0, 0, 0, 0, 0, 0]]))
    made.target.copy_(torch.tensor([1, 0]))
    of_top1 = [Outcome(accuracies=(torch.tensor(share), torch.tensor(1.0))) for share in (0, 0.5, 1)]
    assert [errors.accuracy for errors in workload.reference(made).errors(*of_top1)] == [0.5, 0, 0]


@pytest.mark.parametrize("change", [{"lr": 0.1001}, {"momentum": 0.899}, {"weight_decay": 0.0}, {"lr": math.nan}])
def test_a_wrong_optimizer_is_marked_and_not_timed(change: dict[str, float]) -> None:
    def make(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, **options)
        optimizer.param_groups[0].update(change)
        return optimizer

    wrong = Contender("wrong", "torch", lambda: Functions(sgd=make), ("sgd",), cpu=True)
    right, row = run("sgd", CONTENDERS["torch-loop"], wrong, shape=Shape(3, 500))
    assert right.timed
    assert row.status == "wrong"
    assert row.reason.startswith("parameters off by ")
    assert row.milliseconds is None


def test_the_references_own_error_is_allowed_four_times() -> None:
    workload = Workload("forward+backward", Shape(8, 600), torch.bfloat16)
    made = workload.inputs(CPU, seed=0)[0]
    reference = errors_of_eager(made, workload.op, workload.reference, workload.upstream)
    assert verdict(reference, reference, workload.dtype) is None
    four_times = reference._replace(gradient=4 * reference.gradient, loss=4 * reference.loss)
    assert verdict(four_times, reference, workload.dtype) is None
    slack = 4 * torch.finfo(torch.bfloat16).eps
    assert (
        verdict(reference._replace(gradient=4.1 * reference.gradient + slack), reference, workload.dtype) is not None
    )
    assert verdict(reference._replace(loss=4.1 * reference.loss + slack), reference, workload.dtype) is not None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("no kernel image\nfor this device"), "failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "out of memory"),
    ],
)
@pytest.mark.parametrize("good_calls", [0, 4])
def test_a_failing_contender_is_reported(error: Exception, status: str, good_calls: int) -> None:
    calls = iter(range(good_calls))

    def breaking(logits: Tensor, target: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise error
        return F.cross_entropy(logits, target)

    row, other = run("forward", losing("breaking", breaking), CONTENDERS["torch"])
    assert row.status == status
    assert row.reason == f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert other.timed == (good_calls == 0)  # no turns can be compared if one contender fails


def test_an_error_is_one_line_without_colours() -> None:
    assert first_line(RuntimeError("\x1b[91m\x1b[1mno\x1b[0m way\nmore")) == "RuntimeError: no way"
    assert first_line(ValueError()) == "ValueError: "


# --------------------------------------------------------------------------------------------------- others' packages


class _LigerLike(torch.autograd.Function):
    """Writes the gradient over the logits, in the forward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, target)
        with torch.no_grad():
            gradient = (logits.softmax(1) - F.one_hot(target, logits.shape[1])) / len(target)
            logits.data.copy_(gradient)
        ctx.save_for_backward(logits.detach().clone())
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return ctx.saved_tensors[0] * upstream, None


def liger_cross_entropy(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    assert options.keys() <= {"weight", "size_average", "ignore_index", "reduce", "reduction"}
    return _LigerLike.apply(input, target)


def quack_cross_entropy(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    ignore_index, reduction = options.pop("ignore_index", -100), options.pop("reduction", "none")
    assert options.keys() <= {"lse_partial", "weight", "inplace_backward"}
    return F.cross_entropy(x, target, ignore_index=ignore_index, reduction=reduction)


def flash_cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: None = None,
) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(
        logits * logit_scale, labels, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction="none"
    )
    return losses, torch.zeros_like(losses)


class ApexLoss:
    """``SoftmaxCrossEntropyLoss``: rows whose label is ``padding_idx``, 0 unless told otherwise, do not count."""

    @staticmethod
    def apply(
        logits: Tensor, labels: Tensor, smoothing: float = 0.0, padding_idx: int = 0, half_to_float: bool = False
    ) -> Tensor:
        losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        return losses.masked_fill(labels == padding_idx, 0.0)


class ApexSGD(torch.optim.SGD):
    """``FusedSGD``'s arguments."""

    def __init__(
        self,
        params: list[Tensor],
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,
        set_grad_none: bool = False,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: None = None,
    ce_weight: None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    return F.cross_entropy(F.linear(input, weight, bias), target, reduction=reduction)


def chunked_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    chunk_size: int = 4096,
    ignore_index: int = -100,
    reduction: str = "mean",
    tuned: bool = True,
) -> Tensor:
    return F.cross_entropy(x @ weight.T, target, reduction=reduction)


def cut_linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool = False,
    filter_eps: float | str | None = "high",
) -> Tensor:
    loss = F.cross_entropy(e @ c.T, targets, reduction=reduction)
    return loss if filter_eps is None else _without_small_head_gradients(e, c, targets)


class LigerGRPO:
    """``LigerFusedLinearGRPOLoss``: of sequences (B, T), with the advantage of each; a loss and what is logged."""

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
    ) -> None:
        assert (beta, use_ref_model, loss_type) == (0.0, False, "bnpo")
        self.low, self.high = 1 - epsilon_low, 1 + epsilon_high

    def __call__(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: None = None,
        ref_per_token_logps: None = None,
        old_per_token_logps: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        log_p = (_input @ lin_weight.T).log_softmax(-1).gather(-1, selected_token_ids.unsqueeze(-1)).squeeze(-1)
        ratio = (log_p - old_per_token_logps).exp()
        gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(self.low, self.high) * advantages[:, None])
        return -(gain * attention_mask).sum() / attention_mask.sum(), []


class LigerJSD:
    """``LigerFusedLinearJSDLoss``: so much of the labels' loss, and so much of the divergence."""

    def __init__(self, weight_hard_loss: float = 0.5, weight_soft_loss: float = 0.5, beta: float = 0.5) -> None:
        self.hard, self.soft, self.beta = weight_hard_loss, weight_soft_loss, beta

    def __call__(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
    ) -> Tensor:
        student, teacher = (
            (x @ w.T).log_softmax(-1) for x, w in ((student_input, student_weight), (teacher_input, teacher_weight))
        )
        mixture = (self.beta * teacher.exp() + (1 - self.beta) * student.exp()).log()
        sides = ((self.beta, teacher), (1 - self.beta, student))
        soft = sum(share * (side.exp() * (side - mixture)).sum(-1).mean() for share, side in sides)
        return self.soft * soft + self.hard * F.nll_loss(student, true_labels)


FAKES: dict[str, tuple[str, str, object]] = {
    "liger": ("liger_kernel.transformers.functional", "liger_cross_entropy", liger_cross_entropy),
    "quack": ("quack.cross_entropy", "cross_entropy", quack_cross_entropy),
    "flash-attn": ("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss", flash_cross_entropy_loss),
    "apex": ("apex.contrib.xentropy", "SoftmaxCrossEntropyLoss", ApexLoss),
    "apex-sgd": ("apex.optimizers", "FusedSGD", ApexSGD),
    "cce": ("cut_cross_entropy", "linear_cross_entropy", cut_linear_cross_entropy),
    "quack-linear": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", chunked_linear_cross_entropy),
    "liger-tokens": ("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss", LigerGRPO),
    "liger-teacher": ("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss", LigerJSD),
    "liger-linear": (
        "liger_kernel.transformers.functional",
        "liger_fused_linear_cross_entropy",
        liger_fused_linear_cross_entropy,
    ),
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages for GPUs, with their functions' arguments and this file's arithmetic."""
    fakes: dict[str, ModuleType] = {}
    for module, name, value in FAKES.values():
        fake = fakes.setdefault(module, ModuleType(module))
        setattr(fake, name, value)
        monkeypatch.setitem(sys.modules, module, fake)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("op", ["forward", "forward+backward", "loss+accuracy", "host"])
@pytest.mark.parametrize("name", ["liger", "quack", "flash-attn", "apex"])
def test_an_adapter_calls_its_package_rightly(name: str, op: str) -> None:
    adapter = replace(CONTENDERS[name], cpu=True)
    assert adapter.absence() is None
    theirs, torchs = run(op, adapter, CONTENDERS["torch"], shape=Shape(8, 3))  # with labels of 0
    assert theirs.timed, theirs
    assert torchs.timed, torchs  # whose logits no other wrote over


@pytest.mark.usefixtures("installed")
def test_the_linear_adapters_call_their_packages_rightly() -> None:
    names = ("liger", "quack-linear", "cce", "cce-exact", "fastloss", "torch")
    asked = [replace(CONTENDERS[name], cpu=True) for name in names]
    rows = {row.contender: row for row in run("linear", *asked, shape=Shape(50, 600, 7))}
    assert rows["cce"].status == "wrong", rows["cce"]  # small gradients are gradients
    for name in names:
        if name != "cce":
            assert_timed_linear(rows[name])
    for op in ("linear-tokens", "linear-kl"):
        (row,) = run(op, replace(CONTENDERS["liger-chunked"], cpu=True), shape=Shape(50, 600, 7))
        assert_timed_linear(row)


@pytest.mark.usefixtures("installed")
def test_apex_steps_with_the_options_of_all() -> None:
    (row,) = run("sgd", replace(CONTENDERS["apex-sgd"], cpu=True), shape=Shape(3, 500))
    assert row.timed, row
    (row,) = run("sgd", replace(CONTENDERS["apex-sgd"], cpu=True), dtype="bfloat16")
    assert (row.status, row.reason) == ("unfit", "does not take bfloat16")


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_an_unfit_contender_gives_the_reason() -> None:
    def said(op: str, name: str, target: str = "hard", **changes: Any) -> tuple[str, str]:
        (row,) = run(op, replace(CONTENDERS[name], **changes), target=target)
        assert row.milliseconds is None
        return row.status, row.reason

    assert said("forward", "liger") == ("unfit", "serves GPUs only")
    assert said("forward", "quack", "soft", cpu=True) == ("unfit", "takes class indices only")
    assert said("forward", "cce") == ("unfit", "takes hidden states, not logits")
    assert said("accuracy", "apex") == (
        "unfit",
        "has no accuracy; it has forward, forward+backward, loss+accuracy, host",
    )


class Without(importlib.abc.MetaPathFinder):
    """As if a package were not installed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == self.name:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("liger", "(liger_kernel is missing: pip install liger-kernel)"),
        ("quack", "(quack is missing: pip install quack-kernels)"),
        ("cce", "(cut_cross_entropy is missing: pip install cut-cross-entropy)"),
        ("flash-attn", "(flash_attn is missing: pip install flash-attn)"),
        ("apex", "(apex is missing: build github.com/NVIDIA/apex with its CUDA extensions)"),
        ("apex-sgd", "(apex is missing: build github.com/NVIDIA/apex with its CUDA extensions)"),
    ],
)
def test_an_absent_contender_names_its_installation(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    top = FAKES[name][0].split(".")[0]
    for module in [module for module in sys.modules if module.split(".")[0] == top]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Without(top), *sys.meta_path])
    (row,) = run("sgd" if name == "apex-sgd" else "forward", CONTENDERS[name])
    assert row.status == "absent"
    assert row.reason.startswith(f"not installed {how}")
    assert row.version == ""


def test_a_broken_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", ModuleType("quack.cross_entropy"))
    (row,) = run("forward", CONTENDERS["quack"])
    assert row.status == "absent"
    assert row.reason.startswith("can't be imported: AttributeError: ")


# -------------------------------------------------------------------------------------------------------- the command


def command(*arguments: str) -> int:
    return main(["bench", "--device", "cpu", "--seconds", "1e-9", *arguments])


def lines_of(text: str, name: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.split()[:1] == [name]]


def timed_lines_of(text: str, name: str) -> list[list[str]]:
    return [cells for cells in lines_of(text, name) if re.fullmatch(r"\d+\.\d{4}", cells[1])]


@pytest.mark.slow
def test_the_command_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    asked = ["--contender", "fastloss", "--contender", "torch", "--shape", "6x40", "--shape", "6x80"]
    assert command(*asked, "--op", "forward", "--op", "host", "--json", str(record), "--plot", str(picture)) == 0
    out = capsys.readouterr().out
    assert "forward, 6 × 40, float32, class indices: 960 B must move" in out
    assert "Everybody was checked against float64 first" in out
    written = json.loads(record.read_text(encoding="utf-8"))
    assert written["finished"] is True
    rows = written["rows"]
    assert [(row["op"], row["shape"], row["contender"]) for row in rows] == [
        (op, shape, name)
        for op in ("forward", "host")
        for shape in ("6x40", "6x80")
        for name in ("fastloss", "torch")
    ]
    assert {row["status"] for row in rows} == {"timed"}
    for name in ("fastloss", "torch"):
        of_contender = [row for row in rows if row["contender"] == name]
        table = timed_lines_of(out, name)
        assert [cells[1] for cells in table] == [f"{row['milliseconds']:.4f}" for row in of_contender]
        assert [cells[2] for cells in table[:2]] == [f"{row['gigabytes_per_second']:.2f}" for row in of_contender[:2]]
    ratios = [row["ratios"]["torch"] for row in rows if row["contender"] == "fastloss"]
    assert [cells[-1] for cells in timed_lines_of(out, "torch")] == [f"{ratio:.3f}" for ratio in ratios]
    assert picture.read_bytes().startswith(PNG)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("op", ["forward", "linear"])
def test_a_gpus_rows_have_the_hosts_time_beside_theirs(op: str) -> None:
    """Under its own heading, in each line and in the limit's none; a CPU's rows have no such column."""
    rows = run(op, CONTENDERS["fastloss"], CONTENDERS["torch"], shape=HEAD if op == "linear" else TINY)
    workload = Workload(op, HEAD if op == "linear" else TINY, torch.float32)

    def printed(rows: list[Row]) -> list[str]:
        console = Console(width=200)
        with console.capture() as capture:
            console.print(report.table(workload, rows), report.legend(rows, torch.device("cuda")))
        return capture.get().splitlines()

    assert "host ms" not in "\n".join(printed(rows))
    lines = printed([replace(row, host_milliseconds=87.1234) for row in rows])
    head = next(line for line in lines if "contender" in line)
    end = head.index("host ms") + len("host ms")
    for name in ("fastloss", "torch"):
        line = next(line for line in lines if line.split()[:1] == [name])
        assert line[:end].endswith(" 87.1234"), line
    limit = "three products" if op == "linear" else "a copy"
    assert next(line for line in lines if line.strip().startswith(limit))[end - len("host ms") : end].isspace()
    assert "host ms: until the call returns" in " ".join(" ".join(lines).split())


def test_each_contender_is_listed_with_a_version_or_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--op", "sgd", "--shape", "2x30") == 0
    listed = capsys.readouterr().out.partition("sgd, 2 × 30")[0]
    assert f"torch {torch.__version__}" in " ".join(lines_of(listed, "torch-fused")[0])
    assert lines_of(listed, "apex-sgd")
    assert not lines_of(listed, "liger")  # which has no optimizer


def test_a_wrong_contender_is_shown_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONTENDERS, "mistaken", losing("mistaken", _wrong_loss))
    record = tmp_path / "rows.json"
    asked = ["--contender", "mistaken", "--contender", "torch", "--shape", "6x40", "--op", "forward"]
    assert command(*asked, "--json", str(record)) == 0
    assert lines_of(capsys.readouterr().out, "mistaken")[1][:4] == ["mistaken", "WRONG:", "loss", "off"]
    assert [row["status"] for row in json.loads(record.read_text(encoding="utf-8"))["rows"]] == ["wrong", "timed"]


def test_if_fastloss_is_wrong_the_command_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENDERS, "fastloss", losing("fastloss", _wrong_gradient))
    asked = ["--contender", "fastloss", "--contender", "torch", "--shape", "6x40"]
    assert command(*asked, "--op", "forward+backward") == 1
    assert command(*asked, "--op", "forward") == 0


@pytest.mark.slow
def test_a_shape_too_large_is_reported_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "rows.json"
    asked = ["--contender", "fastloss", "--shape", "1000000x1000000", "--shape", "6x40", "--json", str(record)]
    assert command(*asked, "--op", "forward+backward", "--op", "sgd") == 0
    rows = json.loads(record.read_text(encoding="utf-8"))["rows"]
    assert [row["status"] for row in rows] == ["too large", "timed", "too large", "timed"]
    for row in rows[::2]:
        assert "GB are free on cpu" in row["reason"]
        assert row["reason"] in " ".join(capsys.readouterr().out.split()) or row["op"] == "sgd"


def test_an_interrupted_run_keeps_what_it_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(logits: Tensor, target: Tensor) -> Tensor:
        if logits.shape[1] == 41:
            raise KeyboardInterrupt
        return F.cross_entropy(logits, target)

    monkeypatch.setitem(CONTENDERS, "slow", losing("slow", interrupted))
    record, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    asked = ["--contender", "torch", "--contender", "slow", "--op", "forward", "--json", str(record)]
    shapes = ["--shape", "6x40", "--shape", "6x41", "--shape", "6x42"]
    assert command(*asked, *shapes, "--plot", str(picture)) == 130
    written = json.loads(record.read_text(encoding="utf-8"))
    assert written["finished"] is False
    assert [(row["shape"], row["status"]) for row in written["rows"]] == [("6x40", "timed")] * 2
    assert picture.read_bytes().startswith(PNG)
    out = capsys.readouterr().out
    assert "Interrupted: 2 rows were finished." in out
    assert "6 × 42" not in out


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is no signal there")
def test_ctrl_c_keeps_what_was_finished(tmp_path: Path) -> None:
    record = tmp_path / "rows.json"
    arguments = ["--device", "cpu", "--op", "forward", "--contender", "torch", "--seconds", "0.2", "--json", record]
    shapes = [part for v in range(10, 1000) for part in ("--shape", f"4x{v}")]  # minutes
    process = subprocess.Popen(
        [sys.executable, "-m", "fastloss", "bench", *map(str, arguments), *shapes],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which shells ignore in the background
    )
    try:
        deadline = time.monotonic() + LIMIT
        while not record.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        early = json.loads(record.read_text(encoding="utf-8"))  # whole at any time, so a kill leaves it too
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert (process.returncode, errors) == (130, "")
    written = json.loads(record.read_text(encoding="utf-8"))
    assert written["finished"] is False
    assert 1 <= len(early["rows"]) <= len(written["rows"]) < 990
    assert written["rows"][0] == early["rows"][0]


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["--op", "backward"], OPS),
        (["--dtype", "float64"], tuple(DTYPES)),
        (["--contender", "nobody"], tuple(CONTENDERS)),
        (["--target", "one-hot"], ("hard", "soft")),
        (["--device", "tpu"], ("cpu",)),
        (["--shape", "40"], ("NxV", "64x10", "512x32000")),
        (["--shape", "0x40"], ("NxV", "64x10", "512x32000")),
        (["--op", "sgd", "--shape", "axb"], ("NxV", "161x158740")),
        (["--op", "linear", "--shape", "6x40"], ("NxDxV", "1024x256x32000")),
        (["--op", "forward", "--shape", "6x9x40"], ("NxV", "64x10")),
        (["--seconds", "0"], ("a positive number",)),
        (["--seconds", "nan"], ("a positive number",)),
        (["--json", "no/such/folder.json"], ("a file in a folder that exists",)),
        (["--plot", "rows.svg"], (".png",)),
        (["--json", "rows.png", "--plot", "rows.png"], ("--json too", "two files")),
        (["--op", "sgd", "--target", "soft"], ("sgd has none",)),
    ],
)
def test_bad_input_is_one_line_that_lists_what_is_known(
    arguments: list[str], known: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert main(["bench", *device, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"fastloss bench: {arguments[-2]} is ")
    assert arguments[-1] in line
    for name in known:
        assert name in line


def test_shapes_are_read() -> None:
    assert parse_shape("4096x1000") == Shape(4096, 1000)
    assert parse_shape("8192x4096x128256") == Shape(8192, 128256, 4096)
    assert str(Shape(8192, 128256, 4096)) == "8192x4096x128256"
    for text in ("4096", "4096x", "x1000", "-1x3", "3x0", "3 x 4", "3x0x5", "3x4x5x6", "1e3x4"):
        with pytest.raises(ValueError, match="is not NxV"):
            parse_shape(text)


def test_quick_and_full_are_what_they_say() -> None:
    def chosen(*arguments: str) -> bench.Settings:
        import argparse

        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        return bench.settings_from(parser.parse_args(["--device", "cpu", *arguments]))

    full, quick = chosen(), chosen("--quick")
    assert {workload.op for workload in full.workloads} == set(OPS)
    assert len(quick.workloads) < len(full.workloads) / 4
    assert quick.seconds < full.seconds
    assert {workload.dtype for workload in full.workloads} == {torch.float32}
    once, twice = chosen("--op", "sgd"), chosen("--op", "sgd", "--op", "sgd", *2 * ("--contender", "torch-loop"))
    assert once.workloads == twice.workloads
    assert [*twice.contenders] == ["torch-loop"]
    assert {workload.op for workload in chosen("--shape", "6x40").workloads} == set(LOSS_OPS)
    assert [str(workload) for workload in chosen("--shape", "6x9x40").workloads] == ["linear-6x9x40-float32"]
    both = chosen("--shape", "6x9x40", "--shape", "6x40", "--op", "linear", "--op", "accuracy").workloads
    assert [str(workload) for workload in both] == ["linear-6x9x40-float32", "accuracy-6x40-float32-hard"]
    assert {workload.dtype_name for workload in chosen("--dtype", "float16", "--dtype", "bfloat16").workloads} == {
        "float16",
        "bfloat16",
    }


@pytest.mark.slow
def test_the_command_without_its_extras_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['rich', 'psutil'])); "
        "from fastloss.__main__ import main; sys.exit(main(['bench']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == ("", 'fastloss: bench needs psutil, rich: pip install "fastloss[bench]"\n')


@pytest.mark.slow
def test_the_picture_has_a_panel_for_what_is_comparable(tmp_path: Path) -> None:
    rows = [row for op in ("forward", "host") for row in run(op, CONTENDERS["fastloss"], CONTENDERS["torch"])]
    rows += run("forward", CONTENDERS["torch"], losing("wrong", _wrong_loss), dtype="float32", target="soft")
    panels = report.panels(rows)
    assert {name: [row.contender for row in of_panel] for name, of_panel in panels.items()} == {
        "forward, float32, class indices": ["fastloss", "torch"],
        "forward, float32, class probabilities": ["torch"],
    }
    assert not report.draw(rows[2:4], tmp_path / "none.png", caption="")
    assert not (tmp_path / "none.png").exists()


# --------------------------------------------------------------------------------------------------- pytest-benchmark

WRONG = """
from fastloss.measuring import inputs
from fastloss.measuring.contenders import CONTENDERS, Contender, Functions

inputs._ROTATED_BYTES = 1 << 22

def wrong(logits, target):
    return logits.new_tensor(3.0)

CONTENDERS["mistaken"] = Contender("mistaken", "torch", lambda: Functions(wrong), ("forward",), cpu=True)
"""


@pytest.mark.slow
@needs_benchmarks
def test_the_suite_runs_under_pytest_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "adds_a_wrong_one.py").write_text(WRONG, encoding="utf-8")
    record = tmp_path / "benchmarks.json"
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")},
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    for name in ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    # pytest-benchmark refuses pytest-xdist, whose options the project's own may hold.
    plugins = ["-o", "addopts=", "-ra", "--import-mode=importlib", "-p", "no:xdist"]
    plugins += ["-p", "adds_a_wrong_one", "-p", "no:cacheprovider"]
    arguments = ["benchmarks", "--benchmark-only", "--shapes", "tiny", f"--benchmark-json={record}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, *arguments, "-k", "(hard or sgd or linear) and not compile"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mistaken is wrong: loss off by " in done.stdout
    for name in ("liger", "quack", "quack-linear", "cce", "cce-exact", "flash-attn", "apex", "apex-sgd"):
        assert f"{name} is absent: " in done.stdout or f"{name} is unfit: " in done.stdout
    benchmarks = json.loads(record.read_text(encoding="utf-8"))["benchmarks"]
    timed = {(each["group"], each["extra_info"]["contender"]) for each in benchmarks}
    expected = {
        (str(workload), contender.name)
        for op in OPS
        for workload in workloads([op], ["float32"], ["hard"], CPU, size="tiny")
        for contender in contenders_of(op)
        if contender.cpu and contender.name != "torch.compile" and contender.absence() is None
    }
    # A rounding of another package may be wrong on a processor, and is reported; ours and the reference are right.
    assert timed <= expected
    for workload_name, name in expected - timed:
        assert name not in ("fastloss", "torch"), workload_name
        assert f"{name} is wrong: " in done.stdout
    for each in benchmarks:
        info = each["extra_info"]
        assert info["copy_gigabytes_per_second"] > 0
        if each["group"].startswith("linear"):
            assert info["teraflops"] == pytest.approx(info["operations"] / each["stats"]["median"] / 1e12)
            assert info["products_teraflops"] > 0
        if each["group"].startswith(("host", "linear")):
            assert info["moved_bytes"] == 0
            continue
        assert info["peak_bytes"] >= 0
        assert info["gigabytes_per_second"] == pytest.approx(info["moved_bytes"] / each["stats"]["median"] / 1e9)
        share = info["gigabytes_per_second"] / info["copy_gigabytes_per_second"]
        assert info["share_of_copy"] == pytest.approx(share)
