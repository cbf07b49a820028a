"""Bugs that users of other fused losses met: one test each, numbered as in the survey that gathered them.

From 21 on: those of the fused SGD in torch 2.13.

Left out here: 5, 11, 17 and 18, which belong to ``torch.compile``, to the options' own cases, to double backward
and to several processes (``test_parallel.py``).
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor

from fastloss import (
    SGD,
    accuracy,
    cross_entropy,
    cross_entropy_with_accuracy,
    cross_entropy_with_statistics,
    linear_cross_entropy,
    use_backend,
)
from fastloss.backends import choice
from fastloss.backends.contract import LossInputs, LossOptions
from fastloss.backends.view import as_rows

BLOCK = 8192  # classes that a looped row of aligned 16- and 32-bit logits is visited by at a time
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(params=["eager", "triton", "triton, looped"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """``place``, with the kernels once holding rows whole and once visiting them block by block, however short."""
    name, *looped = request.param.split(", ")
    if name == "triton" and choice.triton_version() is None:
        pytest.skip("needs Triton")
    if looped:
        loop_rows_longer_than(8, monkeypatch)
    on_gpu = name == "triton" and torch.cuda.is_available()
    with use_backend(name):
        yield Place(name, torch.device("cuda" if on_gpu else "cpu"))


def loop_rows_longer_than(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choice.load("triton")
    # The clone's `kernels` are no attribute of the package: its modules are found by their full names alone.
    monkeypatch.setattr(sys.modules["fastloss.kernels.tiles"], "LONGEST_TILE", classes)


def labels(place: Place, *shape: int, classes: int) -> Tensor:
    return torch.randint(classes, shape, device=place.device)


def gradient_of(loss: Callable[[Tensor], Tensor], logits: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, with ``logits`` themselves, in the layout they have, as the leaf."""
    x = logits.detach().requires_grad_()
    result = loss(x)
    (gradient,) = torch.autograd.grad(result, x, upstream)
    return result.detach(), gradient


def assert_as_torch(
    place: Place,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    upstream: Tensor | float = 1.0,
    ulps: float = 1.0,
    cancelled: tuple[float, float] = (0.0, 0.0),
    **options: Any,
) -> Tensor:
    """Loss and gradient are no worse than torch's, against float64. Gives our gradient.

    ``cancelled``: of the loss and of the gradient, see :func:`reference.assert_no_worse`.
    """
    if place.interpreted and logits.dtype == torch.bfloat16:
        ulps = max(ulps, 2.0)  # the interpreter rounds bfloat16 by truncation
    upstream = torch.as_tensor(upstream, dtype=logits.dtype, device=logits.device)
    dense = logits.detach().clone(memory_format=torch.contiguous_format)
    exact_weight = None if weight is None else weight.double()
    exact = reference.value_and_gradient(
        reference.loss, dense.double(), target, exact_weight, upstream.double(), **options
    )
    theirs = reference.value_and_gradient(reference.loss, dense, target, weight, upstream, **options)
    ours = gradient_of(lambda x: cross_entropy(x, target, weight, **options), logits, upstream.expand_as(theirs[0]))
    for what, mine, other, right, lost in zip(("loss", "gradient"), ours, theirs, exact, cancelled, strict=True):
        reference.assert_no_worse(mine, other, right, what, ulps, lost)
    return ours[1]


# ----------------------------------------------------------------------------- 1: logits overwritten


def exponential(x: Tensor) -> tuple[Tensor, Tensor]:
    logits = x.exp()
    return logits, logits.new_zeros(())


def view_of_exponential(x: Tensor) -> tuple[Tensor, Tensor]:
    logits = x.exp().view(-1, x.shape[1])
    return logits, logits.new_zeros(())


def read_by_another_loss(x: Tensor) -> tuple[Tensor, Tensor]:
    logits = x * 2
    return logits, logits.logsumexp(1).mean()


@pytest.mark.parametrize("saved_by", [exponential, view_of_exponential, read_by_another_loss])
@pytest.mark.parametrize("reduction", ["mean", "none"])  # overwritten in the forward pass, and in the backward
def test_bug_01_logits_overwritten_in_place(
    place: Place, saved_by: Callable[[Tensor], tuple[Tensor, Tensor]], reduction: str
) -> None:
    """A loss wrote its gradient over the logits without a word to autograd; an operation before it that had kept
    those logits then computed a wrong gradient, silently. (Liger #272, #343; Unsloth #5002)
    """
    x, target = torch.randn(5, 37, device=place.device), labels(place, 5, classes=37)

    def backward(function: Callable[..., Tensor], **options: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        logits, beside = saved_by(leaf)
        loss = function(logits, target, reduction=reduction, **options).sum() + beside
        loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(cross_entropy, inplace=True)
    torch.testing.assert_close(backward(cross_entropy), backward(reference.loss))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_bug_01_logits_stay_unless_told(place: Place, dtype: torch.dtype, reduction: str) -> None:
    """The same peers overwrite at every call. Here ``inplace=False`` leaves each logit as it is, and ``inplace=True``
    gives the same gradient where the logits are no longer needed.
    """
    target = labels(place, 5, classes=37)
    head = torch.randn(11, 37, device=place.device, dtype=dtype)
    leaf = torch.randn(5, 11, device=place.device, dtype=dtype).requires_grad_()
    upstream = torch.rand(5 if reduction == "none" else (), device=place.device).to(dtype)
    gradients = []
    for inplace in (False, True):
        logits = leaf @ head
        before = logits.detach().clone()
        loss = cross_entropy(logits, target, reduction=reduction, inplace=inplace)
        (gradient,) = torch.autograd.grad(loss, leaf, upstream)
        gradients.append(gradient)
        assert torch.equal(logits, before) is not inplace
    assert torch.equal(*gradients)


# ----------------------------------------------------------------------------- 2: ignored rows zeroed


@pytest.mark.parametrize("grad", [False, True])
def test_bug_02_ignored_rows_of_the_logits_zeroed(place: Place, grad: bool) -> None:
    """The caller's logits were set to zero wherever a row was ignored, under ``no_grad`` too. (Liger; ran)"""
    logits = torch.randn(6, 50, device=place.device).requires_grad_(grad)
    target = labels(place, 6, classes=50)
    target[1::2] = -100
    before, version = logits.detach().clone(), logits._version
    calls: list[Callable[..., Any]] = [cross_entropy, cross_entropy_with_accuracy, accuracy]
    for call in calls:
        for reduction in ("mean", "none"):
            call(logits, target, reduction=reduction)
    with torch.no_grad():
        cross_entropy(logits, target)
        cross_entropy(logits, target, inplace=True)  # there is no gradient to write
        cross_entropy_with_accuracy(logits, target, inplace=True)
    assert torch.equal(logits, before)
    assert logits._version == version


# ----------------------------------------------------------------------------- 3: two backward passes


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("dtype", "reduction"), [(torch.float32, "mean"), (torch.float32, "none"), (torch.float16, "sum")]
)
def test_bug_03_second_backward_scaled_twice(place: Place, dtype: torch.dtype, reduction: str, inplace: bool) -> None:
    """Backward multiplied the stored gradient by the upstream gradient in place, so that a second pass over a kept
    graph multiplied it again, and a gradient handed out before changed under its owner. (Liger; ran)
    """
    leaf = torch.randn(5, 37, device=place.device, dtype=dtype).requires_grad_()
    target = labels(place, 5, classes=37)
    loss = cross_entropy(leaf * 1, target, reduction=reduction, inplace=inplace)
    upstream = torch.full_like(loss, 3.7)

    (first,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
    (double,) = torch.autograd.grad(loss, leaf, 2 * upstream, retain_graph=True)
    loss.backward(upstream, retain_graph=True)
    accumulated = leaf.grad
    assert accumulated is not None
    (last,) = torch.autograd.grad(loss, leaf, upstream)
    assert torch.equal(first, kept)
    for other in (second, accumulated, last):
        assert torch.equal(other, kept)
    torch.testing.assert_close(double, 2 * kept)
    exact = reference.value_and_gradient(
        reference.loss, leaf.detach().double(), target, None, upstream.double(), reduction=reduction
    )[1]
    torch.testing.assert_close(kept.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


def test_bug_03_accumulates_over_a_kept_graph(place: Place) -> None:
    """``x.grad`` of two backward passes is twice that of one, and a ``x.grad`` set aside between them stays."""
    leaf = torch.randn(4, 20, device=place.device).requires_grad_()
    loss = cross_entropy(leaf, labels(place, 4, classes=20)) * 3.7
    loss.backward(retain_graph=True)
    aside = leaf.grad
    assert aside is not None
    kept, leaf.grad = aside.clone(), None
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * kept)
    assert torch.equal(aside, kept)


# ----------------------------------------------------------------------------- 4: float16 and the loss scale


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_bug_04_float16_gradient_flushed_before_the_loss_scale(place: Place, reduction: str) -> None:
    """The gradient was divided by N and rounded to float16 in the forward pass, before backward brought the loss
    scale: most of it became zero. (Liger; ran) Here one class takes nearly all, and p / N of the others is below
    the smallest number of float16.
    """
    rows, classes, scale = 8, 200, 32768.0
    logits = (torch.randn(rows, classes, device=place.device) / 4).to(torch.float16)
    logits[:, 0] += 16
    target = torch.zeros(rows, dtype=torch.int64, device=place.device)
    upstream = torch.full((rows,) if reduction == "none" else (), scale, device=place.device)
    if reduction != "mean":
        upstream /= rows
    unscaled = logits.double().softmax(1)[:, 1:] / rows
    assert bool((unscaled.to(torch.float16) == 0).double().mean() > 0.5)

    # A row's loss log s and its label's gradient 1/s - 1 are what is left of a float32 sum s near 1, of which a tree
    # of log2(classes) additions rounds each to 2^-24. Its order, and so its luck, is each implementation's own.
    of_a_row = (math.ceil(math.log2(classes)) + 1) * 2.0**-24
    cancelled = of_a_row * (rows if reduction == "sum" else 1), of_a_row * scale / rows
    gradient = assert_as_torch(place, logits, target, upstream=upstream, reduction=reduction, cancelled=cancelled)[
        :, 1:
    ]
    assert bool((gradient != 0).all())
    exact = unscaled * scale
    # Each of them, not only the greatest, is right to float16's rounding: of numbers that are not subnormal.
    assert bool((exact > torch.finfo(torch.float16).tiny).all())
    error = ((gradient.double() - exact) / exact).abs().max()
    assert float(error) <= torch.finfo(torch.float16).eps


def test_bug_04_under_autocast(place: Place) -> None:
    """Under autocast the loss is float32, so that the scale may pass float16's greatest number, 65504."""
    logits = torch.randn(4, 30, device=place.device, dtype=torch.float16)
    logits[:, 0] += 10
    target = torch.zeros(4, dtype=torch.int64, device=place.device)
    x = logits.clone().requires_grad_()
    with torch.autocast(place.device.type, dtype=torch.float16):
        loss = cross_entropy(x, target)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss * 2**20, x)
    exact = reference.value_and_gradient(
        reference.loss, logits.double(), target, None, torch.tensor(2.0**20, device=place.device)
    )[1]
    torch.testing.assert_close(gradient.double(), exact, rtol=torch.finfo(torch.float16).eps, atol=0)


def test_bug_04_at_the_size_where_it_was_met() -> None:
    """N = 4096, V = 16384, where 88 % of the gradient was lost. Rows repeat, so that a few tell of all."""
    rows, classes, some, scale = 4096, 16384, 16, 32768.0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    block = torch.randn(some, classes, device=device).to(torch.float16)
    labels_of_block = torch.randint(classes, (some,), device=device)
    x = block.repeat(rows // some, 1).requires_grad_()
    loss = cross_entropy(x, labels_of_block.repeat(rows // some))
    (gradient,) = torch.autograd.grad(loss, x, torch.full_like(loss, scale))
    lost = (block.double().softmax(1) / rows).to(torch.float16) == 0
    assert bool(lost.double().mean() > 0.5)
    assert int(torch.count_nonzero(gradient)) > 0.99 * gradient.numel()

    upstream = torch.tensor(scale / rows, device=device)
    exact, theirs = (
        reference.value_and_gradient(
            reference.loss, block.to(dtype), labels_of_block, None, upstream, reduction="sum"
        )[1]
        for dtype in (torch.float64, torch.float16)
    )
    reference.assert_no_worse(gradient[-some:], theirs, exact, "gradient")


# ----------------------------------------------------------------------------- 6: the gradient at the label


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bug_05_compiled_loss_of_ignored_rows(place: Place, reduction: str) -> None:
    """Under torch.compile an ignored row's loss was what lay in memory, never having been stored (Liger #1338)."""
    torch._dynamo.reset()
    logits, target = torch.randn(40, 30, device=place.device), torch.randint(30, (40,), device=place.device)
    target[::3] = -100
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        garbage = torch.full((4096,), float("nan"), device=place.device)  # the memory that is handed out next
        del garbage
        ours = compiled(logits, target, reduction=reduction)
        torch.testing.assert_close(ours, F.cross_entropy(logits, target, reduction=reduction))


@pytest.mark.parametrize("gap", [6.0, 10.0])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bug_06_gradient_at_the_label_where_p_is_near_1(
    form: Place, reduction: str, dtype: torch.dtype, gap: float
) -> None:
    """p − 1 was taken from a p that had been rounded to bfloat16, or by adding −1 to the rounded gradient: at
    p = 0.999 it was wrong by 100 %. (Liger #1268, #1329)
    """
    rows, classes = 6, 24
    logits = (torch.randn(rows, classes, device=form.device) / 8).to(dtype)
    target = labels(form, rows, classes=classes)
    at = torch.arange(rows, device=form.device), target
    logits[at] += gap
    upstream = torch.ones(rows if reduction == "none" else (), device=form.device)
    exact, theirs = (
        reference.value_and_gradient(reference.loss, logits.to(d), target, None, upstream, reduction=reduction)[1]
        for d in (torch.float64, dtype)
    )
    ours = gradient_of(lambda x: cross_entropy(x, target, reduction=reduction), logits, upstream.to(dtype))[1]
    # Arithmetic is in float32, whose p has a last form of its own: in units of what is left of p − 1.
    left = float(exact[at].abs().min())
    ulps = 1 + torch.finfo(torch.float32).eps / torch.finfo(dtype).eps / left
    reference.assert_no_worse(ours[at], theirs[at], exact[at], f"gradient at the label, 1 − p = {left:.1e}", ulps)


# ----------------------------------------------------------------------------- 7: masked classes


@pytest.mark.parametrize(
    "shape", [(3, BLOCK + 808), (3, BLOCK + 807), (2, 70, 17)], ids=["aligned", "unaligned", "inner"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bug_07_first_block_of_minus_infinity(
    place: Place, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running maximum of −inf met a first block of logits that were all −inf (masked classes), and −inf − (−inf)
    made the row NaN. (flash-attn #1930; Liger; ran)
    """
    if place.name == "triton":
        loop_rows_longer_than(4096, monkeypatch)
    classes = shape[1]
    masked = BLOCK if len(shape) == 2 else 32
    logits = torch.randn(*shape, device=place.device).to(dtype)
    logits[:, :masked] = -torch.inf
    target = torch.randint(masked, classes, (shape[0], *shape[2:]), device=place.device)
    gradient = assert_as_torch(place, logits, target)
    assert bool((gradient[:, :masked] == 0).all())
    gradient = assert_as_torch(place, logits, target, reduction="none")
    assert bool(gradient.isfinite().all())
    for k in (1, 5):
        assert float(accuracy(logits, target, topk=k)) == pytest.approx(reference.accuracy(logits, target, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bug_07_rows_of_minus_infinity_as_torch(form: Place, dtype: torch.dtype) -> None:
    """A masked label costs infinity and a row that is all masked is NaN, as in torch; the other rows are neither."""
    logits = torch.randn(4, 40, device=form.device).to(dtype)
    target = labels(form, 4, classes=40)
    logits[1, target[1]] = -torch.inf
    logits[2] = -torch.inf
    assert_as_torch(form, logits, target, reduction="none")


@pytest.mark.parametrize("shape", [(5, 100), (5, 101), (2, 19, 23), (2, 70, 23)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bug_07_padded_lanes_after_a_softcap(form: Place, shape: tuple[int, ...], reduction: str) -> None:
    """Lanes beyond the last class were filled with −inf, which the softcap turned into −softcap, a logit like any
    other. (Unsloth #10616) Masked classes, whose −inf is the caller's, do become −softcap.
    """
    logits = torch.randn(*shape, device=form.device) * 4
    logits[:, 3] = -torch.inf
    target = torch.randint(4, shape[1], (shape[0], *shape[2:]), device=form.device)
    target[0] = -100
    upstream = torch.rand(target.shape if reduction == "none" else (), device=form.device)
    assert_as_torch(form, logits, target, upstream=upstream, ulps=4, softcap=1.5, reduction=reduction)


# ----------------------------------------------------------------------------- 8: the upstream gradient


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "lse_square_scale": 1e-3}], ids=["plain", "terms"])
def test_bug_08_upstream_gradient_taken_as_one(form: Place, dtype: torch.dtype, options: dict[str, float]) -> None:
    """The gradient of the forward pass was returned as it was, or rows were given other rows' factors.
    (Megatron #1627; TransformerEngine #2139; Liger #678, #968)
    """
    logits = torch.randn(7, 30, device=form.device).to(dtype)
    target = labels(form, 7, classes=30)
    target[2] = -100
    each = torch.tensor([3.7, 0.0, 5.0, -1.0, 0.25, 100.0, 1.0], device=form.device)
    for reduction, upstream in (("mean", 3.7), ("sum", -1.0), ("sum", 0.0)):
        assert_as_torch(form, logits, target, upstream=upstream, ulps=2, reduction=reduction, **options)
    assert_as_torch(form, logits, target, upstream=each, ulps=2, reduction="none", **options)


def test_bug_08_rows_and_factors_in_more_dimensions(place: Place) -> None:
    """The same where a row's number is not its place in memory: ``(N, C, d1, d2)``."""
    logits = torch.randn(2, 5, 3, 4, device=place.device)
    target = labels(place, 2, 3, 4, classes=5)
    assert_as_torch(
        place, logits, target, upstream=torch.randn(2, 3, 4, device=place.device), ulps=2, reduction="none"
    )


def test_bug_08_loss_inside_an_expression(place: Place) -> None:
    """A loss among others, used twice, and weighted a row: what a training step makes of the upstream gradient."""
    target = labels(place, 6, classes=12)
    weights = torch.rand(6, device=place.device)

    def step(function: Callable[..., Tensor], leaf: Tensor) -> Tensor:
        mean = function(leaf * 2, target)
        total = (function(leaf * 3, target, reduction="none") * weights).sum() + 0.3 * mean + mean.exp()
        return torch.autograd.grad(total, leaf)[0]

    leaf = torch.randn(6, 12, device=place.device).requires_grad_()
    torch.testing.assert_close(step(cross_entropy, leaf), step(reference.loss, leaf))


# ----------------------------------------------------------------------------- 9: 32-bit offsets

FAR = 1 << 30
FAR_LAYOUTS = {
    "rows": ((3, 40), (FAR, 1)),
    "classes": ((5, 3), (1, FAR)),
    "inner": ((1, 40, 3), (0, 1, FAR)),
    "outer": ((3, 7, 20), (FAR, 20, 1)),
    "classes of inner": ((2, 3, 20), (20, FAR, 1)),
    "looped outer": ((3, 70, 20), (FAR, 20, 1)),
}


def far_apart(place: Place, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Random float16 logits that reach past the element 2³¹ of their memory, of which little else is touched."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert span > 1 << 31
    try:  # 4 GB, but on a CPU only the pages that are written
        memory = torch.empty(span, dtype=torch.float16, device=place.device)
    except RuntimeError:
        pytest.skip("no room for a tensor of 4 GB")
    view = memory.as_strided(shape, strides)
    view.copy_(torch.randn(shape))
    return view


@pytest.mark.parametrize("layout", FAR_LAYOUTS)
def test_bug_09_offsets_past_2_31(form: Place, layout: str) -> None:
    """An element's form was computed in 32 bits: past 2³¹ elements it was another element's, or no memory at all.
    (pytorch #85005, #190139; flash-attn #714; Liger #803) ``test_gpu.py`` has the size at which it is met.
    """
    logits = far_apart(form, *FAR_LAYOUTS[layout])
    classes = logits.shape[1]
    target = labels(form, logits.shape[0], *logits.shape[2:], classes=classes)
    near = logits.clone(memory_format=torch.contiguous_format)
    assert_as_torch(form, logits, target, reduction="mean")
    for k in (1, 2):
        assert float(accuracy(logits, target, topk=k)) == pytest.approx(reference.accuracy(near, target, k))


def test_bug_09_gradient_written_past_2_31(form: Place) -> None:
    """The same for what is written, which only ``inplace=True`` puts so far apart, and for the upstream gradient."""
    logits = far_apart(form, *FAR_LAYOUTS["rows"])
    target = labels(form, 3, classes=40)
    near = logits.clone(memory_format=torch.contiguous_format)
    upstream = far_apart(form, (3,), (FAR,))
    served, inputs = choice.load(form.name), LossInputs(as_rows(logits), target, None, LossOptions(reduction="none"))
    forward = served.cross_entropy_forward(inputs, loss_dtype=logits.dtype, gradient=False, inplace=False)
    gradient = served.cross_entropy_backward(upstream, inputs, forward.saved, inplace=True)
    assert gradient.data_ptr() == logits.data_ptr()
    exact, theirs = (
        reference.value_and_gradient(
            reference.loss, near.to(dtype), target, None, upstream.to(dtype), reduction="none"
        )[1]
        for dtype in (torch.float64, torch.float16)
    )
    reference.assert_no_worse(logits.contiguous(), theirs, exact, "gradient")


@pytest.mark.parametrize("layout", FAR_LAYOUTS)
def test_bug_09_soft_targets_and_statistics_past_2_31(form: Place, layout: str) -> None:
    """The other kernels, with logits far apart and then targets."""
    far = far_apart(form, *FAR_LAYOUTS[layout])
    near, other = far.clone(memory_format=torch.contiguous_format), torch.rand_like(far.contiguous())
    torch.testing.assert_close(cross_entropy(far, other), F.cross_entropy(near, other), rtol=2e-3, atol=2e-3)
    positive = far.abs_()
    torch.testing.assert_close(
        cross_entropy(other, positive, reduction="none"),
        F.cross_entropy(other, near.abs(), reduction="none"),
        rtol=2e-3,
        atol=2e-2,
    )
    target = labels(form, far.shape[0], *far.shape[2:], classes=far.shape[1])
    parts = cross_entropy_with_statistics(positive, target, entropy=True, predicted=True)
    expected = cross_entropy_with_statistics(near.abs(), target, entropy=True, predicted=True)
    assert torch.equal(parts.predicted, expected.predicted)
    torch.testing.assert_close((parts.loss, parts.entropy), (expected.loss, expected.entropy))


# ----------------------------------------------------------------------------- 10: every row ignored


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"lse_square_scale": 1e-3}], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_bug_10_every_row_ignored(place: Place, reduction: str, options: dict[str, float], ignore_index: int) -> None:
    """The mean over no rows raised ZeroDivisionError, or was 0, where torch gives NaN. (Liger #177;
    pytorch #70348) The gradient is 0 in every row.
    """
    logits = torch.randn(4, 33, device=place.device)
    target = torch.full((4,), ignore_index, device=place.device)
    upstream = torch.full((4,) if reduction == "none" else (), 2.0, device=place.device)
    ours, theirs = (
        reference.value_and_gradient(
            function, logits, target, None, upstream, reduction=reduction, ignore_index=ignore_index, **options
        )
        for function in (cross_entropy, reference.loss)
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0, equal_nan=True)
    assert bool(ours[0].isnan()) if reduction == "mean" else not ours[0].count_nonzero()
    assert not ours[1].count_nonzero()
    assert not theirs[1].count_nonzero()

    loss, both = cross_entropy_with_accuracy(
        logits, target, reduction=reduction, ignore_index=ignore_index, topk=(1, 5), **options
    )
    torch.testing.assert_close(loss, theirs[0], rtol=0, atol=0, equal_nan=True)
    alone = accuracy(logits, target, (1, 5), reduction=reduction, ignore_index=ignore_index)
    for value in (*both, *alone):
        assert bool(value.isnan()) if reduction == "mean" else not value.count_nonzero()


# ----------------------------------------------------------------------------- 12: the wrong GPU


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_bug_11_smoothing_weight_and_ignored_rows_together(
    place: Place, smoothing: float, ignore_index: int, reduction: str
) -> None:
    """Each of the three was right without the others (pytorch #73205, #69339, #104776).

    By hand: ignored rows add nothing, smoothing weighs each class by its own weight, and the mean divides by the
    weights of the labels that count.
    """
    logits, weight = torch.randn(14, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.1
    target = torch.randint(6, (14,))
    target[::4] = ignore_index
    log_p, expected, total = logits.log_softmax(1), [], 0.0
    for row, label in zip(log_p, target.tolist(), strict=True):
        if label == ignore_index:
            expected.append(0.0)
            continue
        hard, spread = -weight[label] * row[label], -(weight * row).sum() / 6
        expected.append(float((1 - smoothing) * hard + smoothing * spread))
        total += float(weight[label])
    by_hand = torch.tensor(expected, dtype=torch.float64)
    if reduction != "none":
        by_hand = by_hand.sum() / (total if reduction == "mean" else 1.0)
    ours = cross_entropy(
        logits.to(place.device),
        target.to(place.device),
        weight.to(place.device),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=smoothing,
    )
    torch.testing.assert_close(ours.cpu(), by_hand)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_bug_12_launched_on_the_wrong_gpu(kernels: Place) -> None:
    """Kernels were launched on the current GPU, not on the tensors': an illegal access, or a silent wrong result.
    (Liger #401, #1303)
    """
    other = Place("triton", torch.device("cuda", 1))
    with torch.cuda.device(0):
        logits, target = torch.randn(64, 1000, device=other.device), labels(other, 64, classes=1000)
        for reduction in ("mean", "none"):
            upstream = torch.rand(64 if reduction == "none" else (), device=other.device)
            gradient = assert_as_torch(other, logits, target, upstream=upstream, reduction=reduction)
            assert gradient.device == other.device
        share = accuracy(logits, target, topk=5)
        assert float(share) == pytest.approx(reference.accuracy(logits, target, 5))
        assert torch.cuda.current_device() == 0


# ----------------------------------------------------------------------------- 13: strides

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one row for all": lambda x: x[:1].expand_as(x),
    "one class for all": lambda x: x[:, :1].expand_as(x),
    "one number for all": lambda x: x[:1, :1].expand_as(x),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second class": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "from the third class on": lambda x: torch.cat([x[:, :3] * 9, x], 1)[:, 3:],
    "up to the last class but one": lambda x: torch.cat([x, x[:, :1] * 9], 1)[:, :-1],
}
INNER_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: torch.nn.functional.pad(x, (2, 3, 1, 0), value=9.0)[:, :, 1:, 2:-3],
    "one position for all": lambda x: x[..., :1].expand_as(x),
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bug_13_stride_0_and_non_contiguous_logits(form: Place, layout: str) -> None:
    """Kernels took rows to lie one behind the other, and classes to be neighbours. (quack #126;
    TransformerEngine #3193)
    """
    logits = LAYOUTS[layout](torch.randn(6, 36, device=form.device))
    target = labels(form, 12, classes=36)[::2]
    weight = torch.rand(36, device=form.device)
    assert_as_torch(form, logits, target, weight, ulps=2, lse_square_scale=0.01)
    upstream = torch.rand(6, 3, device=form.device)[:, 1]
    assert_as_torch(form, logits, target, weight, upstream, ulps=2, reduction="none")
    for k in (1, 3):
        assert float(accuracy(logits, target, topk=k)) == pytest.approx(reference.accuracy(logits, target, k))


@pytest.mark.parametrize("layout", INNER_LAYOUTS)
def test_bug_13_non_contiguous_images(form: Place, layout: str) -> None:
    """The same for ``(N, C, H, W)`` logits, with labels and upstream gradients in layouts of their own."""
    logits = INNER_LAYOUTS[layout](torch.randn(2, 19, 3, 5, device=form.device))
    target = labels(form, 2, 5, 3, classes=19).transpose(1, 2)
    assert_as_torch(form, logits, target, ulps=2)
    upstream = torch.rand(2, 5, 3, device=form.device).transpose(1, 2)
    assert_as_torch(form, logits, target, upstream=upstream, ulps=2, reduction="none")
    assert float(accuracy(logits, target, topk=3)) == pytest.approx(reference.accuracy(logits, target, 3))


def test_bug_13_expanded_upstream_gradients_and_inputs(place: Place) -> None:
    """``loss.sum()`` hands back an upstream gradient of stride 0; an expanded input takes its gradients' sum."""
    leaf = torch.randn(1, 21, device=place.device).requires_grad_()
    target = labels(place, 1, classes=21).expand(6)

    def step(function: Callable[..., Tensor]) -> Tensor:
        loss = function(leaf.expand(6, 21), target, reduction="none").sum()
        return torch.autograd.grad(loss, leaf)[0]

    torch.testing.assert_close(step(cross_entropy), step(reference.loss))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("layout", ["every second", "one for all"])
def test_bug_13_class_weights_with_strides(place: Place, layout: str, smoothing: float) -> None:
    """The same for the weights: a column of a table, or one number expanded."""
    logits, target = torch.randn(6, 36, device=place.device), labels(place, 6, classes=36)
    memory = torch.rand(72, device=place.device)
    weight = memory[::2] if layout == "every second" else memory[:1].expand(36)
    for reduction in ("mean", "none"):
        assert_as_torch(place, logits, target, weight, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bug_13_in_place_into_a_slice(form: Place, reduction: str) -> None:
    """A gradient written over a slice stays inside it."""
    target = labels(form, 5, classes=21)
    x = torch.randn(5, 40, device=form.device)
    upstream = torch.full((5,) if reduction == "none" else (), 3.7, device=form.device)
    leaf = x.clone().requires_grad_()
    whole = leaf * 1
    loss = cross_entropy(whole[:, 7:28], target, reduction=reduction, inplace=True)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    exact = reference.value_and_gradient(
        lambda x, *rest, **options: reference.loss(x[:, 7:28], *rest, **options),
        x,
        target,
        None,
        upstream,
        reduction=reduction,
    )[1]
    torch.testing.assert_close(gradient, exact)
    torch.testing.assert_close(whole[:, 7:28], exact[:, 7:28])
    assert torch.equal(whole[:, :7], x[:, :7])
    assert torch.equal(whole[:, 28:], x[:, 28:])


def test_bug_13_in_place_refuses_expanded_logits(place: Place) -> None:
    """Rows that share their memory can't each hold their own gradient."""
    logits = (torch.randn(1, 9, device=place.device).requires_grad_() * 1).expand(4, 9)
    before = logits.detach().clone()
    with pytest.raises(RuntimeError, match=r"inplace=True needs .* strides \(0, 1\)"):
        cross_entropy(logits, labels(place, 4, classes=9), inplace=True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("layout", ["channels last", "one position for all", "turned"])
def test_bug_13_no_hidden_copy(layout: str) -> None:
    """Where strides can say it, the kernels read the caller's own memory."""
    logits = torch.randn(2, 19, 5, 1 if layout == "turned" else 7)
    view = INNER_LAYOUTS[layout](logits)
    if layout == "one position for all":
        view = view[:, :, :1]
    assert as_rows(view).data_ptr() == view.data_ptr()


# ----------------------------------------------------------------------------- 14: new values, no new compilation

# Triton compiles a kernel once for each specialization of its arguments: what the launcher takes from them.
SPECIALIZATIONS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from fastloss import kernels
from fastloss.backends.contract import LossInputs, LossOptions

TARGET = make_backend(GPUTarget("cuda", 90, 32))
seen = []

def record(self, *args, grid, warmup, **kwargs):
    binder = create_function_from_signature(self.signature, self.params, TARGET)
    _, specialization, options = binder(*args, **kwargs, debug=False)
    seen.append((self.__name__, str(specialization), str(sorted(options.items()))))

JITFunction.run = record

def compiled_for(shape, reduction, dtype, **values):
    options = LossOptions(reduction=reduction, topk=(1, 5), **values)
    logits = torch.empty(shape, dtype=dtype, device="meta")
    target = torch.empty(shape[0] * shape[2], dtype=torch.int64, device="meta")
    upstream = torch.empty((target.numel(),) if reduction == "none" else (), dtype=dtype, device="meta")
    inputs, before = LossInputs(logits, target, None, options), len(seen)
    written = reduction != "none"
    forward = lambda gradient: kernels.cross_entropy_forward(
        inputs, loss_dtype=dtype, gradient=gradient, inplace=False)
    if written:
        forward(True)
    kernels.cross_entropy_backward(upstream, inputs, forward(False).saved, inplace=False)
    kernels.accuracy(logits, target, options.topk, options.ignore_index, reduction)
    return seen[before:]

VALUES = {
    "label_smoothing": (0.1, 0.2, 0.5, 1.0, 1, 1e-300),
    "lse_square_scale": (1e-4, 1e-3, 1.0, 1, 16, -0.5),
    "softcap": (30.0, 50.0, 1.0, 1, 16, 1e30),
    "ignore_index": (-100, -1, 0, 1, 2, 16, 255),
}
for shape in ((4096, 1000, 1), (64, 32000, 1), (8, 19, 4096)):
    for reduction in ("mean", "none"):
        for dtype in (torch.bfloat16, torch.float64):
            for name, values in VALUES.items():
                first, *others = (compiled_for(shape, reduction, dtype, **{name: value}) for value in values)
                assert len(first) >= 3, first
                for value, other in zip(values[1:], others):
                    for a, b in zip(first, other, strict=True):
                        assert a == b, f"{name}={value} compiles {a[0]} again: {a} {b}"
# Would a difference be seen? An option that is switched on does compile another kernel.
shape = (4096, 1000, 1)
plain, smoothed = (compiled_for(shape, "mean", torch.bfloat16, label_smoothing=e) for e in (0.0, 0.1))
assert plain != smoothed
print("launches:", len(seen))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_bug_14_new_values_compile_nothing_anew() -> None:
    """Every new ``label_smoothing`` or z-loss value was a compile-time constant, and a schedule of them a compilation
    a step. (Liger) No GPU is needed: Triton's own binder says what a launch would be compiled for.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SPECIALIZATIONS], env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 100


# ----------------------------------------------------------------------------- 15: wrong words and lengths


@pytest.mark.parametrize("reduction", ["SUM", "batchmean", "", None])
def test_bug_15_unknown_reduction_taken_as_a_sum(place: Place, reduction: object) -> None:
    """Whatever was not "mean" or "none" was summed. (Liger; ran)"""
    logits, target = torch.randn(3, 8, device=place.device), labels(place, 3, classes=8)
    calls: list[Callable[..., Any]] = [cross_entropy, cross_entropy_with_accuracy, accuracy]
    for call in calls:
        with pytest.raises(ValueError, match=r"reduction; expected 'none', 'mean' or 'sum'"):
            call(logits, target, reduction=reduction)


@pytest.mark.parametrize("rows", [2, 4, 6])
def test_bug_15_target_of_another_length(place: Place, rows: int) -> None:
    """A target longer than the batch gave a wrong loss. (Liger; ran)"""
    logits, target = torch.randn(3, 8, device=place.device), labels(place, rows, classes=8)
    calls: list[Callable[..., Any]] = [cross_entropy, cross_entropy_with_accuracy, accuracy]
    for call in calls:
        with pytest.raises(ValueError, match=rf"target has shape \({rows},\); expected \(3,\)"):
            call(logits, target)


# ----------------------------------------------------------------------------- 16: labels out of range


@pytest.mark.parametrize("label", [-1, 8, 1 << 20, (1 << 32) + 3, -(1 << 40)])
def test_bug_16_label_out_of_range_is_an_error_on_a_cpu(place: Place, label: int) -> None:
    """As in torch; on a GPU the next test holds."""
    if place.device.type != "cpu":
        pytest.skip("a GPU's labels are not looked at")
    logits, target = torch.randn(3, 8), torch.tensor([0, label, 7])
    calls: list[Callable[..., Any]] = [cross_entropy, cross_entropy_with_accuracy, accuracy]
    for call in calls:
        with pytest.raises(IndexError, match=rf"target\[1\] is {label}, .*\[0, 8\)"):
            call(logits, target)


@pytest.mark.parametrize(
    ("label", "weighted", "classes_last", "longest"),
    [
        (-1, True, True, 8192),
        (37, False, True, 8),
        (37, True, False, 8192),
        ((1 << 32) + 3, True, True, 8),
        ((1 << 32) + 3, False, False, 8),
        (-(1 << 40), True, False, 8),
        (1 << 62, False, True, 8192),
    ],
)
def test_bug_16_label_out_of_range_makes_its_row_nan(
    kernels: Place, label: int, weighted: bool, classes_last: bool, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A label out of range killed the CUDA context, or read memory that was not the tensor's. (pytorch #1328, #40858;
    quack) The kernels read and write inside the tensor, and that row alone is NaN.
    """
    device, classes, bad = kernels.device, 37, 2
    target = labels(kernels, 5, classes=classes)
    target[4] = -100
    weight = torch.rand(classes, device=device) if weighted else None
    served = choice.load("triton")
    good = torch.arange(5, device=device) != bad
    replaced = target.clone()
    target[bad], replaced[bad] = label, 0
    loop_rows_longer_than(longest, monkeypatch)
    # Rows before and behind, which nobody may touch.
    memory = torch.randn(7, classes, device=device)
    if not classes_last:
        memory = memory.t().contiguous().t()
    untouched, logits = memory.clone(), memory[1:6]
    view = as_rows(logits) if classes_last else logits.t()[None]
    exact, gradient = reference.value_and_gradient(
        reference.loss, logits, replaced, weight, torch.ones(5, device=device), reduction="none"
    )

    inputs = LossInputs(view, target, weight, LossOptions(reduction="none", topk=(1, 5)))
    forward = served.cross_entropy_forward(inputs, loss_dtype=torch.float32, gradient=False, inplace=False)
    assert forward.loss.isnan().tolist() == [False, False, True, False, False]
    torch.testing.assert_close(forward.loss[good], exact[good])
    for k, right in zip((1, 5), forward.accuracy, strict=True):
        alone = served.accuracy(view, target, (k,), -100, "none")[0]
        for value in (right, alone):
            assert value.isnan().tolist() == [False, False, True, False, False]
            expected = [reference.rank(logits[i], int(target[i])) < k for i in (0, 1, 3)]
            assert value[[0, 1, 3]].tolist() == [float(e) for e in expected]
            assert float(value[4]) == 0

    upstream = torch.ones(5, device=device)
    written = served.cross_entropy_backward(upstream, inputs, forward.saved, inplace=True)
    assert written.data_ptr() == logits.data_ptr()
    assert bool(logits[bad].isnan().all())
    torch.testing.assert_close(logits[good], gradient[good])
    assert torch.equal(memory[0], untouched[0])
    assert torch.equal(memory[6], untouched[6])

    memory.copy_(untouched)
    for reduction in ("sum", "mean"):
        inputs = LossInputs(view, target, weight, LossOptions(reduction=reduction, topk=(1, 5)))
        forward = served.cross_entropy_forward(inputs, loss_dtype=torch.float32, gradient=True, inplace=False)
        assert bool(forward.loss.isnan())
        assert all(bool(value.isnan()) for value in forward.accuracy)
        assert all(bool(v.isnan()) for v in served.accuracy(view, target, (1, 5), -100, reduction))
        assert forward.gradient is not None
        rows = forward.gradient.transpose(1, 2).reshape(5, classes)
        assert bool(rows[bad].isnan().all())
        assert not rows[4].count_nonzero()
        if reduction == "sum":
            torch.testing.assert_close(rows[good], gradient[good])


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bug_17_second_derivative_beside_another_path(place: Place, reduction: str, soft: bool) -> None:
    """A gradient penalty: the loss's own part of the second derivative was dropped, the other path's was not."""
    x = torch.randn(5, 7, dtype=torch.float64, device=place.device, requires_grad=True)
    target = torch.randint(7, (5,), device=place.device)
    if soft:
        target = torch.rand(5, 7, dtype=torch.float64, device=place.device)
    results = []
    for function in (cross_entropy, F.cross_entropy):
        loss = function(x * x, target, reduction=reduction).sum() + (x**3).sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad((loss + gradient.square().sum()), x)[0])
    torch.testing.assert_close(*results)


# ----------------------------------------------------------------------------- 19: frozen hidden states


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bug_19_frozen_hidden_states_and_a_trainable_head(place: Place, dtype: torch.dtype, reduction: str) -> None:
    """The gradients hung on the input's: without one the head got none, and nobody was told. (Liger, linear)"""
    hidden, target = torch.randn(7, 5, device=place.device).to(dtype), labels(place, 7, classes=37)
    head = torch.randn(37, 5, device=place.device).to(dtype).requires_grad_()
    bias = torch.randn(37, device=place.device).to(dtype).requires_grad_()
    assert not hidden.requires_grad
    linear_cross_entropy(hidden, head, target, linear_bias=bias, reduction=reduction, chunk_size=3).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (head, bias)]
    F.cross_entropy(F.linear(hidden.double(), *exact), target, reduction=reduction).sum().backward()
    for mine, right in zip((head.grad, bias.grad), (t.grad for t in exact), strict=True):
        assert mine is not None
        assert right is not None
        assert (mine.double() - right).norm() <= 4 * torch.finfo(dtype).eps * right.norm()


# ----------------------------------------------------------------------------- 20: 16-bit sums of the head's gradient


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_bug_20_sums_of_the_heads_gradient_in_16_bits(place: Place, chunk_size: int) -> None:
    """The chunks' parts were added up in bfloat16, and what came late was rounded away. However many chunks there
    are, our error is that of one product over all rows. (Liger #512, #827, #830)
    """
    dtype = torch.float16 if place.interpreted else torch.bfloat16
    rows, classes = (96, 11) if place.interpreted else (1024, 40)
    # All rows pull one way, so that the sum is large and each part of it small.
    hidden = (torch.randn(rows, 6, device=place.device) / 8 + 1).to(dtype)
    head = torch.randn(classes, 6, device=place.device).to(dtype)
    target = torch.zeros(rows, dtype=torch.int64, device=place.device)

    def gradient(loss: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        leaf = head.to(dtype).requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0].double()

    def product(head: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden.to(head.dtype), head), target, reduction="sum")

    def chunked(head: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, head, target, reduction="sum", chunk_size=chunk_size)

    exact = gradient(product, torch.float64)
    ours, theirs = ((gradient(loss, dtype) - exact).norm() for loss in (chunked, product))
    assert ours <= 1.1 * theirs


# ----------------------------------------------------------------------------- 21 to 24: torch's fused SGD


def scaled_step(optimizer: torch.optim.Optimizer, overflow: bool, device: torch.device) -> None:
    """As torch.amp.GradScaler steps an optimizer that looks at the scale itself."""
    optimizer.grad_scale = torch.tensor(4.0, device=device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(float(overflow), device=device)  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


@pytest.mark.parametrize("looked_at", [False, True])
@pytest.mark.parametrize("size", [5, 20000])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_bug_21_overflow_at_the_first_step(place: Place, dampening: float, size: int, looked_at: bool) -> None:
    """The step was skipped, its momentum buffer was not: it stayed as it was allocated, uninitialised, and was taken
    for a momentum by every step after. Here the first step that is not skipped is the first, whoever looks at the
    state before.
    """
    theirs = torch.randn(size, dtype=torch.float64, device=place.device)
    ours, before = theirs.clone(), theirs.clone()
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": dampening}
    optimizer, other = SGD([ours], **options), torch.optim.SGD([theirs], foreach=False, **options)
    for _ in range(2):
        ours.grad = torch.full_like(ours, float("inf"))
        scaled_step(optimizer, True, place.device)
        assert torch.equal(ours, before)
        if looked_at:
            assert not optimizer.state_dict()["state"]
    for overflow in (False, False, True, False):
        gradient = torch.randn_like(theirs)
        ours.grad, theirs.grad = gradient * 4, gradient
        scaled_step(optimizer, overflow, place.device)
        if not overflow:
            other.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    mine, others = optimizer.state_dict()["state"], other.state_dict()["state"]
    torch.testing.assert_close(mine[0]["momentum_buffer"], others[0]["momentum_buffer"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("size", [1003, 20000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bug_22_parameters_of_16_bits_stay_or_drift_on_a_cpu(dtype: torch.dtype, size: int, momentum: float) -> None:
    """On a CPU the fused step of 16-bit parameters lost what it had computed. After many small steps ours are as near
    to float64 as those of torch's ``foreach``.
    """
    start = torch.randn(size).to(dtype)
    ours, theirs, exact = start.clone(), start.clone(), start.double()
    options: dict[str, Any] = {"lr": 0.05, "momentum": momentum, "weight_decay": 0.01}
    with use_backend("eager"):
        optimizers = [
            SGD([ours], **options),
            torch.optim.SGD([theirs], foreach=True, **options),
            torch.optim.SGD([exact], foreach=False, **options),
        ]
        for _ in range(60):
            gradient = (torch.randn(size) + 0.3).to(dtype)
            ours.grad, theirs.grad, exact.grad = gradient, gradient.clone(), gradient.double()
            for optimizer in optimizers:
                optimizer.step()
    assert (ours != start).double().mean() > 0.95
    errors = [(param.double() - exact).square().mean().sqrt().item() for param in (ours, theirs)]
    assert errors[0] <= 1.1 * errors[1], errors


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(6, 4), (160, 120)])
@pytest.mark.parametrize("transposed", ["parameter", "gradient"])
def test_bug_23_gradient_in_another_memory_layout(
    place: Place, transposed: str, shape: tuple[int, int], momentum: float
) -> None:
    """The gradient's elements were taken in the order of memory, not of the parameter's indices."""
    start = torch.randn(shape, dtype=torch.float64, device=place.device)
    theirs, ours = start.clone(), start.clone()
    if transposed == "parameter":
        ours = start.t().contiguous().t()
    options: dict[str, Any] = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.1}
    optimizer, other = SGD([ours], **options), torch.optim.SGD([theirs], foreach=False, **options)
    for _ in range(3):
        gradient = torch.randn_like(theirs)
        ours.grad = gradient.t().contiguous().t() if transposed == "gradient" else gradient.clone()
        theirs.grad = gradient
        optimizer.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [5, 20000])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_bug_24_first_gradient_after_those_of_the_others(place: Place, dampening: float, size: int) -> None:
    """The step stopped with an error: one parameter had no momentum yet, and the others had."""
    theirs = [torch.randn(size, dtype=torch.float64, device=place.device) for _ in range(3)]
    ours = [param.clone() for param in theirs]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": dampening}
    optimizer, other = SGD(ours, **options), torch.optim.SGD(theirs, foreach=False, **options)
    for without in ([1, 2], [1], [0], [], []):
        for i, (mine, their) in enumerate(zip(ours, theirs, strict=True)):
            gradient = None if i in without else torch.randn_like(their)
            mine.grad, their.grad = gradient, gradient
        optimizer.step()
        other.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
