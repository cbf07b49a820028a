"""Class-probability targets, and probabilities as input, over both backends: no worse than torch, beside float64."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor

import fastloss
from fastloss import accuracy, cross_entropy, cross_entropy_with_accuracy

REDUCTIONS = ["mean", "sum", "none"]


def plain(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: str = "mean", **options: Any
) -> Tensor:
    """The formula of the documentation, in torch ops, and torch's operator where there is one."""
    label_smoothing, softcap = options.get("label_smoothing", 0.0), options.get("softcap")
    dim = 1 if input.dim() > 1 else 0
    shape = [-1] + [1] * (input.dim() - dim - 1)
    w = torch.ones(input.shape[dim], dtype=input.dtype) if weight is None else weight
    if not options.get("from_logits", True):
        u = (1 - label_smoothing) * target + label_smoothing / input.shape[dim]
        rows = -torch.xlogy(w.view(shape) * u, input).sum(dim)
        return rows.mean() if reduction == "mean" else rows.sum() if reduction == "sum" else rows
    z = input if softcap is None else softcap * torch.tanh(input / softcap)
    loss = F.cross_entropy(z, target, weight, reduction=reduction, label_smoothing=label_smoothing)
    if options.get("lse_square_scale"):
        rows = options["lse_square_scale"] * z.logsumexp(dim) ** 2 * (w.view(shape) * target).sum(dim)
        loss = loss + (rows.mean() if reduction == "mean" else rows.sum() if reduction == "sum" else rows)
    return loss


def compare(
    place: Place, input: Tensor, target: Tensor, weight: Tensor | None = None, ulps: float = 1.0, **options: Any
) -> None:
    """Loss and both gradients, each for its own need of one, no worse than torch's in the same dtype."""
    if place.interpreted and torch.bfloat16 in (input.dtype, target.dtype):
        ulps = max(ulps, 2.0)  # the interpreter rounds bfloat16 by truncation
    none = options.get("reduction") == "none"
    upstream = (
        torch.randn(input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()) if none else torch.tensor(1.0)
    )

    def run(function: Any, x: Tensor, t: Tensor, w: Tensor | None, which: int) -> list[Tensor]:
        tensors = [v.detach().clone(memory_format=torch.preserve_format) for v in (x, t)]
        needing = [v.requires_grad_() for i, v in enumerate(tensors) if which >> i & 1]
        loss = function(*tensors, w, **options)
        gradients = torch.autograd.grad(loss, needing, upstream.to(loss).expand_as(loss))
        return [loss.detach(), *gradients]

    for which in (1, 2, 3):
        on = place.device
        moved = None if weight is None else weight.to(on)
        ours = run(cross_entropy, input.to(on), target.to(on), moved, which)
        theirs = run(plain, input, target, weight, which)
        exact = run(plain, input.double(), target.double(), None if weight is None else weight.double(), which)
        for name, mine, torchs, true in zip(("loss", "first", "second"), ours, theirs, exact, strict=False):
            reference.assert_no_worse(mine, torchs, true, f"{name} of {which} {options}", ulps)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (33, 40), (3, 1000), (11,), (2, 5, 3), (3, 6, 2, 5)], ids=str)
def test_shapes_and_dtypes(place: Place, shape: tuple[int, ...], dtype: torch.dtype, reduction: str) -> None:
    input, target = 4 * torch.randn(shape), torch.randn(shape).softmax(min(1, len(shape) - 1))
    compare(place, input.to(dtype), target.to(dtype), reduction=reduction)


@reference.weighted_and_smoothed
def test_weight_and_smoothing(
    place: Place, dtype: torch.dtype, label_smoothing: float, weighted: bool, reduction: str
) -> None:
    input, target = (2 * torch.randn(9, 12, 3)).to(dtype), torch.rand(9, 12, 3).to(dtype)
    weight = torch.rand(12).to(dtype) + 0.1 if weighted else None
    compare(place, input, target, weight, reduction=reduction, label_smoothing=label_smoothing, ulps=2.0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", reference.NOT_IN_TORCH, ids=str)
def test_z_loss_and_softcap(place: Place, options: dict[str, float], weighted: bool, reduction: str) -> None:
    input, target = 3 * torch.randn(6, 19), torch.rand(6, 19)
    weight = torch.rand(19) if weighted else None
    # Of the two terms torch has no operator, and its composition rounds elsewhere.
    compare(place, input, target, weight, reduction=reduction, ulps=3.0, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_softcap_of_narrow_logits_is_not_rounded_to_their_dtype(place: Place, dtype: torch.dtype) -> None:
    input, target = (10 * torch.randn(6, 300)).to(dtype), torch.rand(6, 300).softmax(1)
    exact = plain(input.double(), target.double(), softcap=7.0, reduction="none")
    loss = cross_entropy(input.to(place.device), target.to(place.device), softcap=7.0, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_probabilities_as_input(place: Place, dtype: torch.dtype, label_smoothing: float, reduction: str) -> None:
    ys, ts = torch.randn(7, 13).softmax(1).to(dtype), torch.rand(7, 13).to(dtype)
    weight = torch.rand(13).to(dtype) + 0.1
    for w in (None, weight):
        compare(place, ys, ts, w, reduction=reduction, label_smoothing=label_smoothing, from_logits=False, ulps=2.0)


def test_the_textbook_form(place: Place) -> None:
    """Softmax outputs and one-hot targets, even where an output has underflowed to 0."""
    on = place.device
    logits, labels = torch.randn(6, 5, device=on), torch.randint(5, (6,), device=on)
    logits[2, 0], labels[2] = -1e4, 1
    ys = logits.softmax(1).requires_grad_()
    ts = F.one_hot(labels, 5).float()
    assert ys[2, 0] == 0
    for reduction in REDUCTIONS:
        loss = cross_entropy(ys, ts, from_logits=False, reduction=reduction)
        torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction=reduction))
        (gradient,) = torch.autograd.grad(loss.sum(), ys)
        share = 1 / 6 if reduction == "mean" else 1.0
        torch.testing.assert_close(gradient, torch.where(ts > 0, -share / ys.detach(), 0.0))
    assert accuracy(ys, ts) == accuracy(logits, labels)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_as_input_and_labels(
    place: Place, weighted: bool, label_smoothing: float, reduction: str
) -> None:
    on = place.device
    ys = torch.randn(6, 5, 2, device=on, dtype=torch.float64).softmax(1).requires_grad_()
    labels = torch.randint(5, (6, 2), device=on)
    labels[1, 1] = -100
    weight = torch.rand(5, device=on, dtype=torch.float64) if weighted else None
    ours = cross_entropy(ys, labels, weight, reduction=reduction, label_smoothing=label_smoothing, from_logits=False)
    # Rows that add up to 1 are their own softmax's logits, but for the logarithm.
    expected = F.cross_entropy(ys.log(), labels, weight, reduction=reduction, label_smoothing=label_smoothing)
    torch.testing.assert_close(ours, expected)
    assert torch.autograd.gradcheck(
        lambda y: cross_entropy(
            y, labels, weight, reduction=reduction, label_smoothing=label_smoothing, from_logits=False
        ),
        ys,
    )


def test_different_dtypes(place: Place) -> None:
    """16-bit logits beside float32 targets, as mixup under mixed precision gives them: the loss is float32."""
    for dtype in (torch.float16, torch.bfloat16):
        compare(place, torch.randn(6, 33).to(dtype), torch.rand(6, 33))
    compare(place, torch.randn(6, 33), torch.rand(6, 33).double())
    compare(place, torch.randn(6, 33).half(), torch.rand(6, 33).half(), torch.rand(33))


def test_strides(place: Place) -> None:
    """Neither tensor need be contiguous, and they need not be alike."""
    logits = torch.randn(8, 50)
    kinds = [logits[:, 1:49:2], torch.randn(24, 8).t(), torch.randn(1, 24).expand(8, 24), torch.randn(8, 24)]
    targets = [torch.rand(24, 8).t(), torch.rand(8, 1).expand(8, 24), torch.rand(8, 24), torch.rand(16, 24)[::2]]
    for input, target in zip(kinds, targets, strict=True):
        compare(place, input, target)
        compare(place, input, target, reduction="none")
    images = torch.randn(2, 10, 4, 3).contiguous(memory_format=torch.channels_last)
    compare(place, images, torch.rand(2, 10, 4, 3))
    compare(place, torch.randn(2, 10, 4, 3), images.softmax(1), reduction="none")


def test_long_rows(place: Place) -> None:
    """Longer than a tile of the kernels, the maximum in the last block, and a first block of −inf."""
    input = torch.randn(2, 9001)
    input[0, 8999] = 30.0
    compare(place, input, torch.rand(2, 9001).softmax(1))
    compare(place, input, torch.rand(2, 9001).softmax(1), reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("from_logits", [True, False])
def test_many_chunks(dtype: torch.dtype, from_logits: bool) -> None:
    """The fallback at a size that takes it through several chunks, threads and its own path, not torch's."""
    input, target = torch.randn(300, 9000).to(dtype), torch.rand(300, 9000).softmax(1).to(dtype)
    if not from_logits:
        input = (input.float().softmax(1) + 1e-6).to(dtype)
    place = Place("eager", torch.device("cpu"))
    compare(place, input, target, label_smoothing=0.1, from_logits=from_logits, ulps=2.0)


@pytest.mark.parametrize("kind", ["huge", "offset", "-inf", "inf", "nan", "all -inf"])
def test_special_logits(place: Place, kind: str) -> None:
    """As torch has it, 0 · ∞ and all."""
    input, target = torch.randn(4, 20), torch.rand(4, 20)
    if kind == "huge":
        input[1] *= 1e38
    elif kind == "offset":
        input += 1e4
    elif kind == "all -inf":
        input[1] = -torch.inf
    else:
        input[1, 3] = float(kind)
        target[0] = 0
    for smoothing in (0.0, 0.1):
        x, y = input.to(place.device, copy=True).requires_grad_(), input.clone().requires_grad_()
        ours = cross_entropy(x, target.to(place.device), reduction="none", label_smoothing=smoothing)
        theirs = F.cross_entropy(y, target, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(ours.cpu(), theirs, equal_nan=True, rtol=1e-5, atol=1e-5)
        finite = theirs.isfinite()
        ours[finite].sum().backward()
        theirs[finite].sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad.cpu()[finite], y.grad[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.slow(interpreted=True)
def test_derivatives(place: Place) -> None:
    rows, classes = (2, 3) if place.interpreted else (3, 4)
    input = torch.randn(rows, classes, dtype=torch.float64, device=place.device, requires_grad=True)
    target = torch.rand(rows, classes, dtype=torch.float64, device=place.device, requires_grad=True)
    weight = torch.rand(classes, dtype=torch.float64, device=place.device)
    for reduction in REDUCTIONS:
        for options in ({}, {"lse_square_scale": 0.1, "softcap": 3.0}, {"label_smoothing": 0.3}):

            def both(x: Tensor, t: Tensor, reduction: str = reduction, options: Any = options) -> Tensor:
                return cross_entropy(x, t, weight, reduction=reduction, **options)

            assert torch.autograd.gradcheck(both, (input, target))
            assert torch.autograd.gradgradcheck(both, (input, target))
            assert torch.autograd.gradcheck(both, (input, target.detach()))
            assert torch.autograd.gradgradcheck(both, (input, target.detach()))
            assert torch.autograd.gradgradcheck(both, (input.detach(), target))
    ys = torch.rand(rows, classes, dtype=torch.float64, device=place.device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, t: cross_entropy(y, t, from_logits=False), (ys, target))
    assert torch.autograd.gradgradcheck(lambda y, t: cross_entropy(y, t, from_logits=False), (ys, target))


def test_second_derivative_from_the_written_gradient(place: Place) -> None:
    """Where only the logits need a gradient, they are not kept: they may be written over, and H V is right."""
    x = torch.randn(5, 6, dtype=torch.float64, device=place.device, requires_grad=True)
    t, v = torch.rand(5, 6, dtype=torch.float64, device=place.device), torch.randn(5, 6, dtype=torch.float64)
    logits = x * 1
    (gradient,) = torch.autograd.grad(cross_entropy(logits, t, label_smoothing=0.1), logits, create_graph=True)
    (ours,) = torch.autograd.grad(gradient, x, v.to(place.device))
    (again,) = torch.autograd.grad(F.cross_entropy(x, t, label_smoothing=0.1), x, create_graph=True)
    (theirs,) = torch.autograd.grad(again, x, v.to(place.device))
    torch.testing.assert_close(ours, theirs)

    logits = x * 1
    loss = cross_entropy(logits, t)
    logits.detach().zero_()
    loss.backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(F.cross_entropy(x, t), x)[0])


@pytest.mark.parametrize("passed", ["itself", "view", "negative"])
def test_second_derivative_of_mixtures(place: Place, passed: str) -> None:
    """It comes from the logits that the program holds; without them it is as exact as the gradient."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, 500, device=place.device).to(torch.bfloat16)
    a, b = (F.one_hot(torch.randint(500, (24,)), 500) for _ in range(2))
    t = (0.6 * a + 0.4 * b).to(place.device, torch.bfloat16)

    def penalty(function: Any, dtype: torch.dtype, then: str = "") -> Tensor:
        leaf = x.detach().to(dtype).requires_grad_()
        logits = torch._neg_view(leaf * -1) if passed == "negative" else leaf * 1
        if passed == "view":
            loss = function(logits.view(24, 500), t.to(dtype))
        else:
            logits = logits.flatten(0, 1)
            loss = function(logits, t.to(dtype))
        if then == "freed":
            del logits
        elif then == "written over":
            logits.detach().zero_()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(gradient.float().square().sum(), leaf)[0].double()

    exact = penalty(F.cross_entropy, torch.float64)
    errors = [
        (penalty(function, torch.bfloat16, then) - exact).norm() / exact.norm()
        for function, then in (
            (cross_entropy, ""),
            (F.cross_entropy, ""),
            (cross_entropy, "freed"),
            (cross_entropy, "written over"),
        )
    ]
    assert errors[0] <= errors[1]
    assert errors[2] == errors[3]
    assert errors[2] < 1


def test_logits_beside_probabilities_are_freed(place: Place) -> None:
    x = torch.randn(5, 600, device=place.device, requires_grad=True)
    logits = x * 1
    reference = weakref.ref(logits)
    loss = cross_entropy(logits, torch.rand(5, 600, device=place.device))
    del logits
    assert reference() is None
    loss.backward()


def test_backward_twice_and_inplace(place: Place) -> None:
    x = torch.randn(5, 6, device=place.device, requires_grad=True)
    t = torch.rand(5, 6, device=place.device, requires_grad=True)
    expected = torch.autograd.grad(F.cross_entropy(x, t), (x, t))
    loss = cross_entropy(x, t) * 3
    for _ in range(2):
        for ours, theirs in zip(torch.autograd.grad(loss, (x, t), retain_graph=True), expected, strict=True):
            torch.testing.assert_close(ours, 3 * theirs)
    for reduction in ("mean", "none"):
        expected = torch.autograd.grad(F.cross_entropy(x, t, reduction=reduction).sum(), (x, t))
        logits = x * 1
        loss = cross_entropy(logits, t, reduction=reduction, inplace=True).sum()
        for ours, theirs in zip(torch.autograd.grad(loss, (x, t)), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert logits._version > 0


def test_float16_scaled_gradient_survives(place: Place) -> None:
    """A loss scale reaches the gradient before it is rounded."""
    x, t = torch.randn(512, 256).half(), torch.rand(512, 256).softmax(1).half()
    gradients = []
    for function, on in ((cross_entropy, place.device), (F.cross_entropy, torch.device("cpu"))):
        leaf = x.to(on, copy=True).requires_grad_()
        (function(leaf, t.to(on)).float() * 16384).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.cpu())
    leaf = x.double().requires_grad_()
    (F.cross_entropy(leaf, t.double()) * 16384).backward()
    assert leaf.grad is not None
    reference.assert_no_worse(*gradients, leaf.grad, "gradient")


@pytest.mark.slow(interpreted=True)
def test_accuracy_beside_the_loss(place: Place) -> None:
    scores, ts = torch.randn(9, 7, 2, device=place.device), torch.rand(9, 7, 2, device=place.device)
    labels = ts.argmax(1)
    for reduction in REDUCTIONS:
        loss, (top1, top3) = cross_entropy_with_accuracy(scores, ts, reduction=reduction, topk=(1, 3))
        torch.testing.assert_close(loss, F.cross_entropy(scores, ts, reduction=reduction))
        assert torch.equal(top1, accuracy(scores, labels, reduction=reduction))
        assert torch.equal(top3, accuracy(scores, labels, 3, reduction=reduction))


def test_a_weight_that_requires_grad(place: Place) -> None:
    """torch differentiates the loss of soft targets with respect to the class weights; so it is here."""
    x, t = torch.randn(600, 500, device=place.device), torch.rand(600, 500, device=place.device)
    w = torch.rand(500, device=place.device, requires_grad=True)
    ours, theirs = (torch.autograd.grad(f(x, t, w), w)[0] for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)


def test_empty(place: Place) -> None:
    for shape in ((0, 5), (3, 5, 0)):
        for reduction in REDUCTIONS:
            x = torch.randn(shape, device=place.device, requires_grad=True)
            t = torch.rand(shape, device=place.device)
            ours, theirs = (f(x, t, reduction=reduction) for f in (cross_entropy, F.cross_entropy))
            torch.testing.assert_close(ours, theirs, equal_nan=True)
            ours.sum().backward()


def test_targets_of_integers_in_the_shape_of_the_input(place: Place) -> None:
    """One-hot labels as integers are the likeliest mistake; the error says what to do."""
    with pytest.raises(RuntimeError, match=r"class probabilities must be floating point"):
        fastloss.cross_entropy(torch.randn(3, 4, device=place.device), torch.eye(4, device=place.device)[:3].long())


def test_inplace_where_only_the_target_needs_a_gradient(place: Place) -> None:
    """Nothing is written over then, and nothing refused."""
    x, t = torch.randn(6, 5, device=place.device), torch.rand(6, 5, device=place.device, requires_grad=True)
    before = x.clone()
    ours = torch.autograd.grad(cross_entropy(x, t, inplace=True), t)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(F.cross_entropy(x, t), t)[0])
    assert torch.equal(x, before)


def test_integer_weights_and_sparse_targets(place: Place) -> None:
    """torch takes both."""
    x, t = torch.randn(6, 5, device=place.device), torch.rand(6, 5, device=place.device)
    w = torch.arange(5, device=place.device)
    torch.testing.assert_close(cross_entropy(x, t, w), F.cross_entropy(x, t, w))
    if place.device.type == "cpu":
        torch.testing.assert_close(cross_entropy(x, t.to_sparse()), F.cross_entropy(x, t.to_sparse()))


@pytest.mark.parametrize("options", [{"from_logits": False}, {"softcap": 5.0}, {"lse_square_scale": 0.1}], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_dtype_and_digits_under_autocast(soft: bool, options: dict[str, Any]) -> None:
    """float32, rounded once, whichever road the size of the logits takes."""
    for n, backend in ((6, "auto"), (600, "auto"), (6, "eager")):
        x = torch.randn(n, 1000).softmax(1).bfloat16()
        t = torch.rand(n, 1000).bfloat16() if soft else torch.randint(1000, (n,))
        with torch.autocast("cpu", dtype=torch.bfloat16), fastloss.use_backend(backend):
            ours = cross_entropy(x, t, **options)
        assert ours.dtype == torch.float32
        with fastloss.use_backend("eager"):
            exact = cross_entropy(x.double(), t.double() if soft else t, **options)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("y", [0.3, 0.0])
def test_gradient_of_probabilities_that_are_0(place: Place, y: float, weighted: bool, label_smoothing: float) -> None:
    """It is −(1−ε) w log y at t = 0 as elsewhere, on every path: in one pass, and in torch's own operators."""
    ys = torch.tensor([[0.7, y, 0.2], [0.1, 0.3, 0.6]], device=place.device)
    ts = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], device=place.device)
    weight = torch.tensor([0.5, 1.0, 2.0], device=place.device) if weighted else None
    exact = -(1 - label_smoothing) * ys.log() * (1.0 if weight is None else weight)

    def loss(t: Tensor, y: Tensor = ys) -> Tensor:
        options = {"from_logits": False, "reduction": "sum", "label_smoothing": label_smoothing}
        return cross_entropy(y, t, weight, **options)

    for create_graph in (False, True):
        t = ts.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(t), t, create_graph=create_graph)[0], exact)
    torch.testing.assert_close(torch.func.grad(loss)(ts), exact)
    with fastloss.use_backend("auto"):
        t = ts.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(t), t)[0], exact)
    if y:
        u = ts * (1 - label_smoothing) + label_smoothing / 3
        torch.testing.assert_close(
            torch.func.grad(lambda y: loss(ts, y))(ys), -u / ys * (1.0 if weight is None else weight)
        )
        assert torch.autograd.gradgradcheck(lambda y, t: loss(t, y), (ys.double().requires_grad_(), t.double()))
