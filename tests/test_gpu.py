"""What only a GPU can show: real launches, their memory, their streams, and sizes that no interpreter gets through.

The other files run there too, over the compiled kernels. All is skipped where there is no GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor, nn

from fastloss import (
    accuracy,
    cross_entropy,
    cross_entropy_with_accuracy,
    linear_cross_entropy,
    linear_cross_entropy_with_accuracy,
    linear_kl_div,
    linear_topk_log_probs,
    use_backend,
)
from fastloss.backends import choice
from fastloss.backends.contract import LossInputs, LossOptions
from fastloss.backends.view import as_rows
from fastloss.measuring import machine

pytestmark = pytest.mark.gpu

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
# Each shape with the form of the kernels that serves it.
WHOLE = [(4096, 10), (1003, 257), (513, 1000), (64, 8192)]
LOOPED = [(130, 32000), (65, 50257), (33, 128256)]
BY_INNER = [(8, 19, 4099), (3, 64, 33, 35), (4, 1000, 1024)]
GIGABYTE = 10**9


def make(place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and labels of which some are ignored."""
    logits = (2 * torch.randn(shape, device=place.device)).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=place.device)
    target.view(-1)[3::11] = -100
    return logits, target


def upstream_for(target: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    if reduction == "none":
        return torch.rand(target.shape, device=target.device).to(dtype)
    return torch.tensor(3.7, device=target.device, dtype=dtype)


def rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    """Some rows of ``(N, C, …)`` as ``(len(rows), C)``, without touching the others."""
    inner = tensor[0, 0].numel()
    return as_rows(tensor)[rows // inner, :, rows % inner]


# ----------------------------------------------------------------------------- every form, against float64


ONE_OF_EACH = [WHOLE[1], LOOPED[1], BY_INNER[0], BY_INNER[2]]
OPTIONS = [
    {"reduction": "sum", "softcap": 5.0, "lse_square_scale": 1e-3},
    {"reduction": "none", "label_smoothing": 0.1},
    {"weighted": True, "label_smoothing": 0.1, "lse_square_scale": 1e-3},
    {"weighted": True, "reduction": "none", "softcap": 5.0},
]
# Compilation takes most of the time: not each with each.
CASES: list[tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = [
    *((shape, dtype, {}) for shape in WHOLE + LOOPED + BY_INNER for dtype in FLOATS),
    *((shape, torch.float64, OPTIONS[2]) for shape in ONE_OF_EACH),
    *((shape, dtype, o) for shape in ONE_OF_EACH for dtype in (torch.bfloat16, torch.float32) for o in OPTIONS),
]


@pytest.mark.parametrize(("shape", "dtype", "options"), CASES, ids=str)
def test_no_worse_than_torch(
    kernels: Place, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Loss and gradient, forward alone and with the accuracy beside it."""
    options = dict(options)
    logits, target = make(kernels, shape, dtype)
    weight = torch.rand(shape[1], device=kernels.device).to(dtype) if options.pop("weighted", False) else None
    upstream = upstream_for(target, options.get("reduction", "mean"), dtype)
    exact = reference.exact_value_and_gradient(logits, target, weight, upstream, **options)
    theirs = reference.value_and_gradient(reference.loss, logits, target, weight, upstream, **options)

    def with_accuracy(*arguments: Any, **options: Any) -> Tensor:
        return cross_entropy_with_accuracy(*arguments, topk=(1, 5), **options).loss

    for function in (cross_entropy, with_accuracy):
        ours = reference.value_and_gradient(function, logits, target, weight, upstream, **options)
        for what, mine, other, right in zip(("loss", "gradient"), ours, theirs, exact, strict=True):
            reference.assert_no_worse(mine, other, right, what, ulps=2)
    with torch.no_grad():
        alone = cross_entropy(logits, target, weight, **options)
    torch.testing.assert_close(alone, ours[0], equal_nan=True)


@pytest.mark.parametrize("shape", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accuracy_with_ties(kernels: Place, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against counting in float64; half of the rows hold few different numbers, and some hold NaN."""
    logits, target = make(kernels, shape, dtype)
    logits[::2] = (logits[::2] / 2).round()
    logits[1::7, shape[1] // 2] = float("nan")
    label = torch.where(target == -100, 0, target).unsqueeze(1)
    exact = logits.double().nan_to_num(nan=1e30)
    mine = exact.gather(1, label)
    index = torch.arange(shape[1], device=kernels.device).view(1, -1, *[1] * (len(shape) - 2))
    rank = ((exact > mine) | ((exact == mine) & (index < label))).sum(1)
    counted = target != -100
    ks = (1, 2, 5, 100)
    rows = accuracy(logits, target, ks, reduction="none")
    shares = accuracy(logits, target, ks)
    beside = cross_entropy_with_accuracy(logits, target, topk=ks).accuracy
    for k, row, share, same in zip(ks, rows, shares, beside, strict=True):
        right = (rank < k) & counted
        assert torch.equal(row, right.float())
        assert float(share) == float(same) == pytest.approx(int(right.sum()) / int(counted.sum()))


# ----------------------------------------------------------------------------- more than 2³¹ logits


@pytest.mark.parametrize(
    "shape",
    [(20_000, 128_256), (2_200_000, 1000), (3, 40, 18_000_000), (3, 150, 4_800_000)],
    ids=["looped", "whole", "inner", "looped inner"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_more_than_2_31_logits(kernels: Place, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The first and last rows and those around element 2³¹, with the gradient of the forward pass and of backward."""
    numel, classes = torch.Size(shape).numel(), shape[1]
    assert numel > 1 << 31
    free, _ = torch.cuda.mem_get_info(kernels.device)
    if free < 4 * numel + 6 * GIGABYTE:
        pytest.skip(f"needs {4 * numel / GIGABYTE + 6:.0f} GB of free GPU memory")
    logits = torch.empty(shape, dtype=dtype, device=kernels.device)
    for part in logits.flatten().split(1 << 28):
        part.normal_()
    target = torch.randint(classes, (shape[0], *shape[2:]), device=kernels.device)
    number = numel // classes
    # In (N, C, d1) rows the element 2³¹ stands in the last outer index: so do these.
    middle = (1 << 31) // classes
    rows = torch.tensor([0, 1, middle - 1, middle, middle + 1, number - 2, number - 1], device=kernels.device)
    some, some_target = rows_of(logits, rows), target.flatten()[rows]
    one = torch.ones((), device=kernels.device, dtype=dtype)

    losses, exact_losses = (
        function(x, t, reduction="none")
        for function, x, t in (
            (cross_entropy, logits, target),
            (F.cross_entropy, some.double(), some_target),
        )
    )
    torch.testing.assert_close(losses.flatten()[rows].double(), exact_losses, rtol=0.01, atol=0)
    right = accuracy(logits, target, 100, reduction="none").flatten()[rows]
    assert right.tolist() == [
        float(reference.rank(row, int(t)) < 100) for row, t in zip(some, some_target, strict=True)
    ]
    del losses, right

    exact, theirs = (
        reference.value_and_gradient(reference.loss, some.to(d), some_target, None, one, reduction="sum")[1]
        for d in (torch.float64, dtype)
    )
    logits.requires_grad_()
    loss = cross_entropy(logits, target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits, one)
    reference.assert_no_worse(rows_of(gradient, rows), theirs, exact, "gradient")


# ----------------------------------------------------------------------------- streams and graphs


# Rows whole in registers and block by block, of each layout, dtype and reduction.
of_each_form = pytest.mark.parametrize(
    ("shape", "dtype", "reduction"),
    [
        ((4096, 10), torch.float32, "mean"),
        ((512, 1000), torch.bfloat16, "mean"),
        ((512, 1000), torch.float16, "mean"),
        ((130, 32000), torch.bfloat16, "sum"),
        ((8, 19, 4099), torch.float32, "none"),
        ((65, 50257), torch.float16, "sum"),
        ((8, 19, 4099), torch.bfloat16, "none"),
    ],
    ids=str,
)


def peak(device: torch.device, step: Callable[[], Any]) -> int:
    """The most bytes that ``step`` takes beside those that were taken before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def captured(step: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """A CUDA graph of ``step``: its replay, and the tensors that the replay fills."""
    results: list[Tensor] = []

    def kept() -> None:
        results[:] = step()

    return machine.captured(kept).replay, results


@of_each_form
def test_cuda_graph(kernels: Place, shape: tuple[int, ...], dtype: torch.dtype, reduction: str) -> None:
    """Forward, backward and accuracy are captured once and replayed on new numbers, over and over."""
    logits, target = make(kernels, shape, dtype)
    logits.requires_grad_()
    upstream = upstream_for(target, reduction, dtype)

    def step() -> list[Tensor]:
        loss, right = cross_entropy_with_accuracy(logits, target, reduction=reduction, topk=(1, 5))
        (gradient,) = torch.autograd.grad(loss, logits, upstream)
        return [loss.detach(), gradient, *right, accuracy(logits, target, 5, reduction=reduction)]

    replay, results = captured(step)
    for _ in range(3):
        new_logits, new_target = make(kernels, shape, dtype)
        with torch.no_grad():
            logits.copy_(new_logits)
            target.copy_(new_target)
        for _ in range(2):  # twice: the first replay must leave the counter as it was
            for result in results:
                result.zero_()
            replay()
        for result, expected in zip(results, step(), strict=True):
            assert torch.equal(result, expected)


def test_a_graph_beside_other_launches(kernels: Place) -> None:
    """A replay on one stream and launches on another do not count each other's programs."""
    logits, target = make(kernels, (4096, 1000), torch.bfloat16)
    replay, results = captured(lambda: [cross_entropy(logits, target)])
    expected = cross_entropy(logits, target)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    launched = []
    for _ in range(50):
        replay()
        with torch.cuda.stream(side):
            launched.append(cross_entropy(logits, target))
    torch.cuda.synchronize()
    assert all(torch.equal(loss, expected) for loss in [*results, *launched])


def test_several_streams_at_once(kernels: Place) -> None:
    """Launches on other streams than the default one, beside each other, give what they give alone."""
    cases = [make(kernels, shape, torch.bfloat16) for shape in [(2048, 1000), (512, 32000), (8, 19, 4099)]]

    def step(logits: Tensor, target: Tensor) -> list[Tensor]:
        x = logits.detach().requires_grad_()
        loss, right = cross_entropy_with_accuracy(x, target)
        assert isinstance(right, Tensor)
        (gradient,) = torch.autograd.grad(loss * 3.7, x)
        return [loss.detach(), gradient, right]

    alone = [step(*case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    rounds = []
    for _ in range(20):
        results = []
        for stream, case in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(*case))
        rounds.append(results)
    torch.cuda.synchronize()
    for results in rounds:
        for result, expected in zip(results, alone, strict=True):
            for mine, right in zip(result, expected, strict=True):
                assert torch.equal(mine, right)


@pytest.mark.parametrize("inplace", [False, True])
def test_cuda_graph_of_a_training_step(kernels: Place, inplace: bool) -> None:
    """Model, loss, backward and optimizer in one graph: its replays train as the same steps without one."""
    sizes = (64, 128, 1000)
    first = nn.Sequential(nn.Linear(*sizes[:2]), nn.GELU(), nn.Linear(*sizes[1:])).to(kernels.device)
    input = torch.randn(512, sizes[0], device=kernels.device)
    target = torch.randint(sizes[-1], (512,), device=kernels.device)

    def step_of(model: nn.Module, **options: Any) -> Callable[[], list[Tensor]]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

        def step() -> list[Tensor]:
            optimizer.zero_grad(set_to_none=True)  # in the capture the gradients get memory of the graph's own
            loss = cross_entropy(model(input), target, **options)
            loss.backward()
            optimizer.step()
            return [loss.detach()]

        return step

    graphed, plain = copy.deepcopy(first), copy.deepcopy(first)
    replay, (loss,) = captured(step_of(graphed, inplace=inplace))
    with torch.no_grad():
        for weight, start in zip(graphed.parameters(), first.parameters(), strict=True):
            weight.copy_(start)  # `captured` has trained it already
    step = step_of(plain)
    for _ in range(5):
        input.normal_()
        target.random_(sizes[-1])
        replay()
        torch.testing.assert_close(loss, step()[0])
    for weight, expected in zip(graphed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "reduction"),
    [
        ((2048, 1000), torch.bfloat16, "mean"),
        ((512, 32000), torch.float16, "mean"),
        ((8, 19, 4099), torch.float32, "none"),
    ],
    ids=str,
)
def test_backward_from_another_stream(
    kernels: Place, shape: tuple[int, ...], dtype: torch.dtype, reduction: str
) -> None:
    """The forward pass on a stream of its own, the backward pass asked for from the default one, without waiting."""
    logits, target = make(kernels, shape, dtype)
    upstream = upstream_for(target, reduction, dtype)
    x = logits.detach().requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(x, target, reduction=reduction), x, upstream)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for _ in range(10):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = cross_entropy(x, target, reduction=reduction)
        # autograd runs it on `side`, where the forward pass was, and makes this stream wait for the result.
        (gradient,) = torch.autograd.grad(loss, x, upstream)
        assert torch.equal(gradient, expected)


@of_each_form
def test_the_second_of_two_gpus(kernels: Place, shape: tuple[int, ...], dtype: torch.dtype, reduction: str) -> None:
    """Tensors on a GPU that is not the current one: launched there, with results there, equal bit for bit; and no
    memory taken on the current one.
    """
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    if torch.cuda.get_device_properties(first).name != torch.cuda.get_device_properties(second).name:
        pytest.skip("needs two GPUs of one kind")

    def step(logits: Tensor, target: Tensor, weight: Tensor, upstream: Tensor) -> list[Tensor]:
        x = logits.detach().requires_grad_()
        loss, right = cross_entropy_with_accuracy(x, target, weight, reduction=reduction, topk=(1, 5))
        (gradient,) = torch.autograd.grad(loss, x, upstream)
        return [loss.detach(), gradient, *right, accuracy(logits, target, 5, reduction=reduction)]

    with torch.cuda.device(first):
        logits, target = make(Place(kernels.name, first), shape, dtype)
        weight = torch.rand(shape[1], device=first).to(dtype)
        arguments = (logits, target, weight, upstream_for(target, reduction, dtype))
        there = tuple(a.to(second) for a in arguments)
        expected = step(*arguments)
        torch.cuda.synchronize(first)
        torch.cuda.synchronize(second)
        before = torch.cuda.memory_allocated(first)
        torch.cuda.reset_peak_memory_stats(first)
        results = step(*there)
        torch.cuda.synchronize(second)
        assert torch.cuda.max_memory_allocated(first) == before
        assert torch.cuda.current_device() == first.index
    for result, right in zip(results, expected, strict=True):
        assert result.device == second
        assert torch.equal(result.to(first), right)


# ----------------------------------------------------------------------------- the host does not wait


@pytest.fixture
def no_host_sync() -> Iterator[Callable[[], None]]:
    """Called: from here on, whatever makes the host wait for the GPU is an error."""
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


@of_each_form
def test_the_host_does_not_wait(
    kernels: Place, shape: tuple[int, ...], dtype: torch.dtype, reduction: str, no_host_sync: Callable[[], None]
) -> None:
    """Not in forward, backward, in-place forms, accuracy, autocast, nor for class weights and ignored rows."""
    logits, target = make(kernels, shape, dtype)
    weight = torch.rand(shape[1], device=kernels.device).to(dtype)
    upstream = upstream_for(target, reduction, dtype)

    def step() -> None:
        options: dict[str, Any]
        for options in ({}, {"label_smoothing": 0.1, "lse_square_scale": 1e-3}, {"softcap": 5.0}):
            x = logits.detach().requires_grad_()
            cross_entropy(x, target, weight, reduction=reduction, **options).backward(upstream)
            loss, _ = cross_entropy_with_accuracy(x, target, topk=(1, 5), reduction=reduction, **options)
            loss.backward(upstream, retain_graph=True)
            loss.backward(upstream)
            cross_entropy(x * 1, target, reduction=reduction, inplace=True, **options).backward(upstream)
        with torch.autocast(kernels.device.type, dtype=torch.bfloat16):
            cross_entropy(logits.detach().requires_grad_(), target).backward()
        with torch.no_grad():
            cross_entropy(logits, target, weight, reduction=reduction)
        accuracy(logits, target, (1, 5), reduction=reduction)

    step()  # compiles
    torch.cuda.synchronize()
    no_host_sync()
    step()


# ----------------------------------------------------------------------------- labels out of range


@pytest.mark.parametrize("name", ["triton", "eager"])
@pytest.mark.parametrize("shape", [(64, 1000), (64, 32000), (4, 19, 99)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_labels_out_of_range_leave_the_context_alive(
    kernels: Place, name: str, shape: tuple[int, ...], reduction: str
) -> None:
    """Whatever int64 holds: NaN in those rows, the others right, nothing else written, and the GPU still works."""
    number, classes = shape[0] * torch.Size(shape[2:]).numel(), shape[1]
    logits, target = make(kernels, shape, torch.float32)
    flat = target.view(-1)
    bad = torch.zeros(number, dtype=torch.bool, device=kernels.device)
    for row, label in enumerate([-1, classes, -(1 << 63), (1 << 63) - 1, (1 << 32) + 1, -99]):
        flat[5 * row + 1] = label
        bad[5 * row + 1] = True
    replaced = torch.where(bad.view_as(target), -100, target)
    with use_backend(name):
        x = logits.detach().requires_grad_()
        result, right = cross_entropy_with_accuracy(x, target, reduction=reduction, topk=(1, 5))
        (gradient,) = torch.autograd.grad(result, x, torch.ones_like(result))
        alone = accuracy(logits, target, (1, 5), reduction=reduction)
        torch.cuda.synchronize()
    if reduction == "mean":
        assert all(bool(value.isnan()) for value in (result, *right, *alone))
        return
    exact, of_exact = reference.value_and_gradient(
        reference.loss, logits, replaced, None, torch.ones(target.shape, device=kernels.device), reduction="none"
    )
    for value in (result.flatten(), *(v.flatten() for v in (*right, *alone))):
        assert torch.equal(value.isnan(), bad)
    torch.testing.assert_close(result.flatten()[~bad], exact.flatten()[~bad])
    rows, exact_rows = (as_rows(g).transpose(1, 2).reshape(number, classes) for g in (gradient, of_exact))
    assert bool(rows[bad].isnan().all())
    torch.testing.assert_close(rows[~bad], exact_rows[~bad])


# ----------------------------------------------------------------------------- equal from run to run


@pytest.mark.parametrize("shape", [(100_000, 10), (4096, 1000), (1030, 32000), (8, 19, 4099)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_equal_from_run_to_run(kernels: Place, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bit for bit, though the programs end in another order each time; and the mean is the right one each time."""
    logits, target = make(kernels, shape, dtype)
    weight = torch.rand(shape[1], device=kernels.device).to(dtype)
    first: list[Tensor] = []
    for _ in range(20):
        x = logits.detach().requires_grad_()
        loss, right = cross_entropy_with_accuracy(x, target, weight, topk=(1, 5), label_smoothing=0.1)
        (gradient,) = torch.autograd.grad(loss, x)
        run = [loss.detach(), gradient, *right, *accuracy(logits, target, (1, 5))]
        first = first or run
        assert all(torch.equal(a, b) for a, b in zip(run, first, strict=True))
    exact = reference.loss(logits.double(), target, weight.double(), label_smoothing=0.1)
    torch.testing.assert_close(first[0].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


# ----------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("shape", "dtype", "reduction", "softcap"),
    [
        ((2048, 1000), torch.bfloat16, "mean", None),
        ((2048, 1000), torch.float16, "mean", None),
        ((2048, 1000), torch.float32, "none", 5.0),
        ((512, 32000), torch.bfloat16, "mean", None),
        ((512, 32000), torch.float32, "mean", 5.0),
        ((512, 32000), torch.bfloat16, "none", None),
        ((8, 64, 16384), torch.float32, "mean", None),
        ((8, 64, 16384), torch.bfloat16, "none", None),
    ],
    ids=str,
)
def test_memory_is_one_gradient(
    kernels: Place, shape: tuple[int, ...], dtype: torch.dtype, reduction: str, softcap: float | None
) -> None:
    """Forward and backward hold one gradient besides the logits, a few numbers a row and nothing else; forward alone
    and the in-place form not even that.
    """
    logits, target = make(kernels, shape, dtype)
    upstream = upstream_for(target, reduction, dtype)
    small = 32 * target.numel() + (1 << 20)

    def extra(step: Callable[[], Any]) -> int:
        step()  # compiles, and keeps what is kept between calls
        return peak(kernels.device, step)

    def train() -> None:
        x = logits.detach().requires_grad_()
        cross_entropy(x, target, reduction=reduction, softcap=softcap).backward(upstream)

    def train_in_place() -> None:
        x = logits.detach().requires_grad_() * 1  # a copy: what a model's last layer would give
        loss = cross_entropy(x, target, reduction=reduction, softcap=softcap, inplace=True)
        torch.autograd.grad(loss, x, upstream)

    def look() -> None:
        with torch.no_grad():
            cross_entropy(logits, target, reduction=reduction, softcap=softcap)
        accuracy(logits, target, (1, 5), reduction=reduction)

    assert logits.nbytes > small
    assert extra(look) <= small
    assert extra(train) <= logits.nbytes + small
    assert extra(train_in_place) <= logits.nbytes + small  # the copy


# ----------------------------------------------------------------------------- compilations


def test_new_values_compile_nothing_anew(kernels: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that vary from step to step, on the real launcher (``test_peer_bugs.py`` asks its binder, anywhere)."""
    knobs = pytest.importorskip("triton").knobs
    compiled: list[str] = []

    def note(*, repr: str, **_: Any) -> None:
        compiled.append(repr)

    def step(shape: tuple[int, ...], **options: Any) -> None:
        logits, target = make(kernels, shape, torch.bfloat16)
        target.clamp_(min=0)
        x = logits.requires_grad_()
        cross_entropy_with_accuracy(x, target, topk=(1, 5), **options).loss.backward()
        cross_entropy(x, target, reduction="none", **options).sum().backward()

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", note)
    for shape in [(512, 1000), (64, 32000), (8, 19, 4096)]:
        for name, first, *others in [
            ("label_smoothing", 0.1, 0.2, 1.0),
            ("lse_square_scale", 1e-4, 1e-3, 1.0),
            ("softcap", 30.0, 50.0, 1.0),
            ("ignore_index", -100, 0, 1, 16),
        ]:
            step(shape, **{name: first})
            compiled.clear()
            for value in others:
                step(shape, **{name: value})
                assert not compiled, f"{name}={value} compiles {compiled}"


def test_the_hook_sees_compilations(kernels: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would pass whatever happened. Seven ks in float64 are asked for nowhere else."""
    knobs = pytest.importorskip("triton").knobs
    compiled: list[int] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **_: compiled.append(1))
    logits = torch.randn(3, 9, 2, device=kernels.device, dtype=torch.float64)
    target = torch.zeros(3, 2, device=kernels.device, dtype=torch.int32)
    choice.load("triton").cross_entropy_forward(
        LossInputs(logits, target.flatten(), None, LossOptions(topk=(1, 2, 3, 4, 5, 6, 7))),
        loss_dtype=torch.float64,
        gradient=False,
        inplace=False,
    )
    assert compiled


@pytest.mark.parametrize("soft", [False, True])
def test_compiled_into_cuda_graphs(kernels: Place, soft: bool) -> None:
    """``mode="reduce-overhead"``: memory comes from the graphs' own pool, where nothing may stay behind."""
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, mode="reduce-overhead", fullgraph=True)
    for n in (300, 41):
        for _ in range(5):
            x = torch.randn(n, 1000, device=kernels.device, requires_grad=True)
            t = torch.randint(1000, (n,), device=kernels.device)
            if soft:
                t = torch.rand(n, 1000, device=kernels.device)
            torch.compiler.cudagraph_mark_step_begin()
            loss = compiled(x, t)
            (gradient,) = torch.autograd.grad(loss, x)
            torch.testing.assert_close(loss, F.cross_entropy(x, t))
            torch.testing.assert_close(gradient, torch.autograd.grad(F.cross_entropy(x, t), x)[0])


# ----------------------------------------------------------------------------- the linear map and its loss


def linear_problem(
    place: Place, rows: int, features: int, classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a head that are trained, and labels of which some are ignored."""
    hidden = torch.randn(rows, features, device=place.device).to(dtype).requires_grad_()
    head = (torch.randn(classes, features, device=place.device) / features**0.5).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), device=place.device)
    target[3::11] = -100
    return hidden, head, target


LINEAR: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1, "lse_square_scale": 1e-3},
    {"softcap": 5.0, "reduction": "none"},
]


@pytest.mark.parametrize("options", LINEAR, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("chunk_size", [100, None])
def test_linear_no_worse_than_torch(
    kernels: Place, chunk_size: int | None, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Loss and gradients; those of 16-bit heads are summed in float32, by products that give it (``out_dtype``).

    Beside a reduced loss bfloat16 gradients are those of the forward pass times the upstream gradient, which rounds
    them once more: by as much as the exact ones lose when they are rounded.
    """
    problem = linear_problem(kernels, 1000, 128, 4099, dtype)
    upstream = upstream_for(problem[2], options.get("reduction", "mean"), dtype)

    def run(of: torch.dtype, function: Callable[..., Tensor], **how: Any) -> list[Tensor]:
        x, w = (t.detach().to(of).requires_grad_() for t in problem[:2])
        loss = function(x, w, problem[2], **options, **how)
        return [loss.detach(), *torch.autograd.grad(loss, (x, w), upstream.to(of))]

    def plain(x: Tensor, w: Tensor, target: Tensor, **options: Any) -> Tensor:
        return reference.loss(F.linear(x, w), target, **options)

    ours = run(dtype, linear_cross_entropy, chunk_size=chunk_size)
    theirs, exact = run(dtype, plain), run(torch.float64, plain)
    again = dtype == torch.bfloat16 and options.get("reduction") != "none"
    for name, mine, other, right in zip(("loss", "input", "weight"), ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype
        error, allowed, once = ((each.double() - right).norm() for each in (mine, other, right.to(dtype)))
        allowed = 1.2 * allowed + 4 * torch.finfo(dtype).eps * right.norm() * (dtype == torch.float32)
        if again and name != "loss":
            allowed = allowed + once
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_sums_of_16_bits(kernels: Place, dtype: torch.dtype) -> None:
    """Sixty-four chunks lose no more than one product over all rows."""
    hidden, head, _ = linear_problem(kernels, 4096, 64, 512, dtype)
    target = torch.zeros(4096, dtype=torch.int64, device=kernels.device)  # all rows pull one way

    def gradient(of: torch.dtype, **how: Any) -> Tensor:
        x, w = (t.detach().to(of).abs().requires_grad_() for t in (hidden, head))
        loss = linear_cross_entropy(x, w, target, **how) if how else F.cross_entropy(F.linear(x, w), target)
        return torch.autograd.grad(loss, w)[0].double()

    exact = gradient(torch.float64)
    one = (gradient(dtype, chunk_size=4096) - exact).norm()
    assert (gradient(dtype, chunk_size=64) - exact).norm() <= 1.1 * one


@pytest.mark.parametrize("how", [{}, {"accumulate_grad": True}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_holds_one_chunk(kernels: Place, dtype: torch.dtype, how: dict[str, Any]) -> None:
    """Beside inputs and gradients: the chunk, half of the float32 sum of 16-bit heads, a few numbers a row."""
    rows, features, classes, chunk = 4096, 256, 32000, 256
    hidden, head, target = linear_problem(kernels, rows, features, classes, dtype)
    gradients, sums = hidden.nbytes + head.nbytes, 0 if dtype == torch.float32 else 2 * head.numel()
    allowed = chunk * (classes + 4 * features) * dtype.itemsize + 64 * rows + (1 << 25)  # cuBLAS has its own

    def extra(step: Callable[[], Any]) -> int:
        step()
        hidden.grad = head.grad = None
        return peak(kernels.device, step)

    def train() -> None:
        linear_cross_entropy(hidden, head, target, chunk_size=chunk, **how).sum().backward()

    def look() -> None:
        with torch.no_grad():
            linear_cross_entropy(hidden, head, target, chunk_size=chunk)

    assert rows * classes * dtype.itemsize > 2 * allowed
    assert extra(train) <= gradients + (0 if "accumulate_grad" in how else sums) + allowed
    hidden.grad = head.grad = None
    assert extra(look) <= allowed


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_without_waiting(
    kernels: Place, dtype: torch.dtype, reduction: str, no_host_sync: Callable[[], None]
) -> None:
    """The host waits for nothing, with the arguments that it has by default."""
    hidden, head, target = linear_problem(kernels, 300, 64, 1003, dtype)
    weight = torch.rand(1003, device=kernels.device).to(dtype)

    def step() -> None:
        for options in ({}, {"weight": weight, "label_smoothing": 0.1}, {"accumulate_grad": True}, {"softcap": 5.0}):
            hidden.grad = None
            loss = linear_cross_entropy(hidden, head, target, reduction=reduction, chunk_size=128, **options)
            loss.sum().backward()
        linear_cross_entropy(hidden.view(3, 100, 64), head, target.view(3, 100), shift=True).backward()
        linear_cross_entropy_with_accuracy(hidden, head, target, topk=(1, 5))
        for beta in (0.0, 0.3, 1.0):
            teacher = hidden.detach().flip(0), head.detach()
            loss = linear_kl_div(
                hidden, head, *teacher, target=target, beta=beta, reduction=reduction, chunk_size=128
            )
            loss.sum().backward()
        linear_topk_log_probs(hidden, head, 5, chunk_size=128)
        with torch.autocast(kernels.device.type, dtype=torch.bfloat16):
            linear_cross_entropy(hidden, head, target).backward()
        with torch.no_grad():
            linear_cross_entropy(hidden, head, target)

    step()  # compiles
    torch.cuda.synchronize()
    no_host_sync()
    step()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("accumulate_grad", [False, True])
def test_linear_in_a_cuda_graph(kernels: Place, accumulate_grad: bool, dtype: torch.dtype) -> None:
    """A training step is captured once, and its replays train as the same steps without a graph."""
    hidden, head, target = linear_problem(kernels, 300, 64, 1003, dtype)
    hidden.requires_grad_(False)
    first = head.detach().clone()

    def step_of(head: Tensor) -> Callable[[], list[Tensor]]:
        head.grad = torch.zeros_like(head)

        def step() -> list[Tensor]:
            assert head.grad is not None
            head.grad.zero_()
            loss = linear_cross_entropy(hidden, head, target, chunk_size=128, accumulate_grad=accumulate_grad)
            loss.backward()
            with torch.no_grad():
                head.sub_(head.grad, alpha=0.5)
            return [loss.detach()]

        return step

    replay, (loss,) = captured(step_of(head))
    with torch.no_grad():
        head.copy_(first)  # `captured` has trained it already
    other = first.clone().requires_grad_()
    step = step_of(other)
    for _ in range(5):
        hidden.normal_()
        target.random_(1003)
        replay()
        assert torch.equal(loss, step()[0])
    assert torch.equal(head, other)
    assert not torch.equal(head, first)


def test_linear_label_out_of_range(kernels: Place) -> None:
    """NaN, and the context lives; ``skip_ignored=True`` may wait, and gives the same loss as without."""
    hidden, head, target = linear_problem(kernels, 300, 64, 1003, torch.float32)
    expected = linear_cross_entropy(hidden, head, target)
    torch.testing.assert_close(linear_cross_entropy(hidden, head, target, skip_ignored=True), expected)
    target[7] = 1003
    assert linear_cross_entropy(hidden, head, target, chunk_size=100).isnan()
    rows = linear_cross_entropy(hidden, head, target, chunk_size=100, reduction="none")
    assert rows.isnan().nonzero().flatten().tolist() == [7]
    torch.cuda.synchronize()


# ----------------------------------------------------------------------------- shards of the classes


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A group of one process, on NCCL."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_nccl_available() or dist.is_initialized():
        pytest.skip("needs a process that can start a group on NCCL")
    store = dist.FileStore(str(tmp_path_factory.mktemp("alone") / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), [(WHOLE[2], torch.bfloat16), (LOOPED[1], torch.float32)], ids=str)
def test_a_shard_that_is_all(
    kernels: Place, alone: Any, shape: tuple[int, ...], dtype: torch.dtype, soft: bool
) -> None:
    """By the kernels of shards, with a layout that only the device knows: what the others give."""
    logits, target = make(kernels, shape, dtype)
    if soft:
        target = torch.softmax(torch.randn(shape, device=kernels.device), 1).to(dtype)
    weight = torch.rand(shape[1], device=kernels.device).to(dtype)
    results = []
    for where in ({}, {"group": alone}):
        x = logits.detach().requires_grad_()
        loss, shares = cross_entropy_with_accuracy(
            *(x, target, weight), topk=(1, 5), label_smoothing=0.1, lse_square_scale=1e-3, softcap=20.0, **where
        )
        results.append((loss.detach(), shares, *torch.autograd.grad(loss, x)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("soft", [False, True])
def test_shards_without_waiting(kernels: Place, alone: Any, soft: bool, no_host_sync: Callable[[], None]) -> None:
    """Neither in forward nor in backward, of logits and of hidden states."""
    logits, target = make(kernels, (513, 1003), torch.bfloat16)
    hidden, head, _ = linear_problem(kernels, 513, 64, 1003, torch.bfloat16)
    if soft:
        target = torch.softmax(torch.randn(513, 1003, device=kernels.device), 1).bfloat16()
    weight = torch.rand(1003, device=kernels.device).bfloat16()

    def step() -> None:
        for reduction in ("mean", "none"):
            how: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1, "weight": weight, "group": alone}
            x = logits.detach().requires_grad_()
            cross_entropy(x, target, **how).sum().backward()
            cross_entropy_with_accuracy(x, target, topk=(1, 5), **how)[0].sum().backward()
            linear_cross_entropy(hidden, head, target, chunk_size=256, **how).sum().backward()
        accuracy(logits, target, (1, 5), group=alone)

    step()  # compiles
    torch.cuda.synchronize()
    no_host_sync()
    step()
