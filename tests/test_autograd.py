"""Derivatives: first, second and third, repeated, scaled, in place, and through torch's transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor

import fastloss
from fastloss import cross_entropy

pytestmark = pytest.mark.backend_agnostic

OPTIONS: list[dict[str, Any]] = [
    {},
    {"weighted": True},
    {"label_smoothing": 0.2, "weighted": True},
    {"lse_square_scale": 0.1},
    {"lse_square_scale": 0.1, "label_smoothing": 0.1, "weighted": True},
    {"softcap": 2.0},
]


def float64_case(place: Place, options: dict[str, Any]) -> tuple[Any, Tensor]:
    options = dict(options)
    weight = torch.rand(5, dtype=torch.float64, device=place.device) if options.pop("weighted", False) else None
    target = torch.tensor([[0, 4], [-100, 2]], device=place.device)[:, : 1 if place.interpreted else 2]
    input = torch.randn(2, 5, target.shape[1], dtype=torch.float64, device=place.device, requires_grad=True)

    def loss(input: Tensor, reduction: str) -> Tensor:
        return cross_entropy(input, target, weight, reduction=reduction, **options)

    return loss, input


@pytest.mark.slow(interpreted=True)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_and_gradgradcheck(place: Place, options: dict[str, Any], reduction: str) -> None:
    loss, input = float64_case(place, options)
    assert torch.autograd.gradcheck(lambda x: loss(x, reduction), input)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, reduction), input)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_third_derivative(place: Place, options: dict[str, Any]) -> None:
    loss, input = float64_case(place, options)

    def third(value: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(value, input, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), input, create_graph=True)
        return torch.autograd.grad(second.sin().sum(), input)[0]

    ours = third(loss(input, "mean"))
    with fastloss.use_backend("auto"):  # so small, and without the fused pass: torch's own operators
        if place.device.type == "cpu":
            torch.testing.assert_close(ours, third(loss(input, "mean")), rtol=1e-9, atol=1e-12)


def test_a_second_derivative_beside_another_path(place: Place) -> None:
    """A gradient penalty: the term through the loss must not be dropped."""
    target = torch.tensor([1, 0, 3], device=place.device)
    results = []
    for function in (cross_entropy, F.cross_entropy):
        torch.manual_seed(0)
        input = torch.randn(3, 4, dtype=torch.float64).to(place.device).requires_grad_()
        loss = function(input, target)
        (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
        (loss + gradient.pow(2).sum()).backward()
        results.append(input.grad)
    torch.testing.assert_close(*results)


@pytest.mark.slow(interpreted=True)
@pytest.mark.parametrize(
    "targets",
    ["labels", "one-hot", "smoothed labels", "smoothed one-hot", "ignored", "weighted", "mixup", "mixup of sum"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(64, 300), (600, 5000), (40, 32000)], ids=str)
def test_second_derivatives_are_as_exact_as_torchs(
    place: Place, shape: tuple[int, int], dtype: torch.dtype, targets: str
) -> None:
    """Of a gradient penalty, where every class has its part, and of the label's own, p_y (1 − p_y).

    Where both are as exact as float32 is, one may have some roundings more. Smoothed one-hot rows give p_y by the
    row's loss, a sum over the classes: some times torch's error in float32.
    """
    most = 1.0 if dtype != torch.float32 else 5.0 if targets == "smoothed one-hot" else 1.5
    rows, classes = shape
    if (
        place.interpreted
        and classes > 300
        and (dtype != torch.bfloat16 or targets not in ("labels", "one-hot", "mixup"))
    ):
        pytest.skip("takes the interpreter some seconds")
    rows = min(rows, 100) if place.interpreted else rows
    torch.manual_seed(0)
    logits = torch.randn(rows, classes, device=place.device).to(dtype)
    labels = torch.randint(classes, (rows,), device=place.device)
    at_label = F.one_hot(labels, classes)
    target = at_label.to(dtype) if "one-hot" in targets else labels.clone()
    if "mixup" in targets:
        target = (0.6 * at_label + 0.4 * at_label.roll(1, 0)).to(dtype)
    if targets == "ignored":
        target[::3] = -100
    weight = torch.rand(classes, device=place.device) + 0.5 if targets == "weighted" else None
    options = {"label_smoothing": 0.1 if "smoothed" in targets else 0.0}
    reduction = "sum" if "of sum" in targets else "mean"

    def derivatives(function: Any, dtype: torch.dtype) -> list[Tensor]:
        x = logits.detach().to(dtype).requires_grad_()
        y = target.to(dtype) if target.is_floating_point() else target
        w = None if weight is None else weight.to(dtype)
        loss = function(x, y, w, reduction=reduction, **options)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        wide = torch.promote_types(dtype, torch.float32)
        penalty = first.to(wide).mul(rows if reduction == "mean" else 1).square().sum()
        results = [torch.autograd.grad(penalty, x, retain_graph=True)[0]]
        (of_label,) = torch.autograd.grad(first, x, at_label.to(dtype))
        return [t.double() for t in (*results, of_label, of_label * at_label)]

    expected = derivatives(F.cross_entropy, torch.float64)
    ours, theirs = derivatives(cross_entropy, dtype), derivatives(F.cross_entropy, dtype)
    for right, of_ours, of_theirs in zip(expected, ours, theirs, strict=True):
        assert (of_ours - right).norm() <= most * (of_theirs - right).norm()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_derivative_where_every_row_is_ignored(place: Place, reduction: str) -> None:
    x = torch.randn(4, 6, device=place.device, requires_grad=True)
    ignored = torch.full((4,), -100, device=place.device)
    (first,) = torch.autograd.grad(cross_entropy(x, ignored, reduction=reduction), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert torch.equal(second, torch.zeros_like(x))


def test_second_derivative_of_sure_rows(place: Place) -> None:
    """Where one class has nearly all of the probability, v − ⟨p, v⟩ is a small difference of great numbers."""
    torch.manual_seed(0)
    logits, target = 4 * torch.randn(40, 5000), torch.randint(5000, (40,))

    def penalty(function: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        x = logits.to(device, dtype).requires_grad_()
        (first,) = torch.autograd.grad(function(x, target.to(device), reduction="sum"), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0].cpu().double()

    cpu = torch.device("cpu")
    exact = penalty(F.cross_entropy, torch.float64, cpu)
    error = (penalty(cross_entropy, torch.float32, place.device) - exact).norm()
    assert error <= (penalty(F.cross_entropy, torch.float32, cpu) - exact).norm() / 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_retained_graph_twice_with_the_gradient_kept_between(
    place: Place, dtype: torch.dtype, reduction: str
) -> None:
    input = torch.randn(4, 40, device=place.device, dtype=dtype, requires_grad=True)
    loss = cross_entropy(input, torch.randint(40, (4,), device=place.device), reduction=reduction).sum() * 3
    loss.backward(retain_graph=True)
    first = input.grad
    assert first is not None
    kept = first.clone()
    (again,) = torch.autograd.grad(loss, input, retain_graph=True)
    (last,) = torch.autograd.grad(loss, input)
    assert torch.equal(again, kept)
    assert torch.equal(last, kept)
    assert torch.equal(first, kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_accumulation(place: Place) -> None:
    input = torch.randn(4, 40, device=place.device, requires_grad=True)
    target = torch.randint(40, (4,), device=place.device)
    for _ in range(3):
        (cross_entropy(input, target) / 2).backward()
    (once,) = torch.autograd.grad(cross_entropy(input, target), input)
    torch.testing.assert_close(input.grad, 1.5 * once)


def test_logits_may_be_written_over_after_the_loss(place: Place) -> None:
    """The gradient was taken already; torch allows it too."""
    leaf = torch.randn(4, 40, device=place.device, requires_grad=True)
    target = torch.randint(40, (4,), device=place.device)
    logits = leaf * 1
    loss = cross_entropy(logits, target)
    with torch.no_grad():
        logits.zero_()
    loss.backward()
    (expected,) = torch.autograd.grad(cross_entropy(leaf, target), leaf)
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_inplace(place: Place, dtype: torch.dtype, reduction: str) -> None:
    """The gradient takes the logits' memory, and equals the one that does not."""
    leaf = torch.randn(6, 40, device=place.device).to(dtype).requires_grad_()
    target = torch.randint(40, (6,), device=place.device)
    logits = leaf * 1
    loss = cross_entropy(logits, target, reduction=reduction, inplace=True)
    (ours,) = torch.autograd.grad(loss.sum(), leaf)
    (expected,) = torch.autograd.grad(cross_entropy(leaf, target, reduction=reduction).sum(), leaf)
    assert torch.equal(ours, expected)
    assert torch.equal(logits.detach(), expected)


def test_inplace_refuses_what_it_would_break(place: Place) -> None:
    leaf = torch.randn(6, 40, device=place.device, requires_grad=True)
    target = torch.randint(40, (6,), device=place.device)
    with pytest.raises(RuntimeError, match="leaf"):
        cross_entropy(leaf, target, inplace=True)
    logits = leaf.exp()  # keeps its result for backward
    loss = cross_entropy(logits, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = leaf * 1
    loss = cross_entropy(logits, target, inplace=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = cross_entropy(leaf * 1, target, inplace=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="expanded"):
        cross_entropy((leaf * 1)[:1].expand(6, 40), target, inplace=True)
    untouched = leaf.detach().clone()
    cross_entropy(untouched, target, inplace=True)  # no gradient wanted, none written
    assert torch.equal(untouched, leaf.detach())


def test_weight_has_no_gradient(place: Place) -> None:
    weight = torch.rand(4, device=place.device, requires_grad=True)
    with pytest.raises(RuntimeError, match="weight"):
        cross_entropy(torch.randn(2, 4, device=place.device), torch.tensor([0, 1], device=place.device), weight)


def test_function_transforms_and_compile(place: Place) -> None:
    input, target = torch.randn(6, 5, device=place.device), torch.randint(5, (6,), device=place.device)
    ours, theirs = (torch.func.grad(lambda x, f=f: f(x, target))(input) for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)
    rows = torch.func.vmap(cross_entropy)(input, target)
    torch.testing.assert_close(rows, F.cross_entropy(input, target, reduction="none"))
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    x = input.clone().requires_grad_()
    compiled(x, target).backward()
    torch.testing.assert_close(x.grad, theirs)


def test_inplace_on_a_view_that_had_to_be_copied(place: Place) -> None:
    """The gradient is right, and does not pretend that the logits' memory holds it."""
    leaf = torch.randn(2, 20, 4, 3, device=place.device, requires_grad=True)
    target = torch.randint(20, (2, 3, 4), device=place.device)
    (ours,) = torch.autograd.grad(cross_entropy((leaf * 1).transpose(2, 3), target, inplace=True), leaf)
    (expected,) = torch.autograd.grad(cross_entropy(leaf.transpose(2, 3), target), leaf)
    assert torch.equal(ours, expected)


def test_inplace_refuses_a_view_of_a_leaf(place: Place) -> None:
    leaf = torch.randn(6, 40, device=place.device, requires_grad=True)
    with pytest.raises(RuntimeError, match="view"):
        cross_entropy(leaf.view(6, 40), torch.zeros(6, dtype=torch.int64, device=place.device), inplace=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_gradients(place: Place, reduction: str) -> None:
    input, target = torch.randn(3, 5, device=place.device), torch.tensor([1, 0, 4], device=place.device)

    def jacobian(function: Any, vectorize: bool) -> Tensor:
        return torch.autograd.functional.jacobian(
            lambda x: function(x, target, reduction=reduction), input, vectorize=vectorize
        )

    torch.testing.assert_close(jacobian(cross_entropy, True), jacobian(F.cross_entropy, False))


def test_forward_mode(place: Place) -> None:
    input, tangent = torch.randn(2, 3, 5, device=place.device)
    target = torch.tensor([1, 0, 4], device=place.device)
    derivatives = []
    for function in (cross_entropy, F.cross_entropy):
        with torch.autograd.forward_ad.dual_level():
            value = function(torch.autograd.forward_ad.make_dual(input, tangent), target)
            derivatives.append(torch.autograd.forward_ad.unpack_dual(value).tangent)
    torch.testing.assert_close(*derivatives)


def test_traces(place: Place) -> None:
    input, target = torch.randn(6, 5, device=place.device), torch.randint(5, (6,), device=place.device)
    other = torch.randn(6, 5, device=place.device)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x, y: cross_entropy(x, y))(input, target)
    torch.testing.assert_close(traced(other, target), F.cross_entropy(other, target))


def negated(tensor: Tensor) -> Tensor:
    """The same numbers, which memory holds negated: the imaginary part of a conjugate is such a view."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("which", ["input", "weight", "target", "upstream", "inplace"])
def test_negative_bits(place: Place, which: str, reduction: str, soft: bool) -> None:
    """Kernels read and write memory, which holds the negative of such a tensor's values."""
    x, weight, target = torch.randn(3, 33), torch.rand(33), torch.randint(33, (3,))
    target = torch.rand(3, 33).softmax(1) if soft else target
    upstream = torch.randn(3) if reduction == "none" else torch.tensor(-2.0)
    x, weight, target, upstream = (each.to(place.device) for each in (x, weight, target, upstream))
    results = []
    for mark in (lambda tensor: tensor, negated):
        leaf = (mark(x) if which == "input" else x).detach().requires_grad_()
        logits, t = (
            mark(leaf * 1) if which == "inplace" else leaf,
            mark(target) if which == "target" and soft else target,
        )
        loss = cross_entropy(
            logits, t, mark(weight) if which == "weight" else weight, reduction=reduction, inplace=which == "inplace"
        )
        loss.backward(mark(upstream) if which == "upstream" else upstream)
        results.append((loss.detach(), leaf.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_negative_bits_elsewhere(place: Place) -> None:
    x, target = torch.randn(3, 33, device=place.device), torch.randint(33, (3,), device=place.device)
    assert fastloss.accuracy(negated(x), x.argmax(1)) == 1
    head = torch.randn(33, 4, device=place.device)
    results = []
    for mark in (lambda tensor: tensor, negated):
        hidden = (x[:, :4]).clone().requires_grad_()
        loss = fastloss.linear_cross_entropy(hidden, mark(head), target, reduction="none")
        (of_hidden,) = torch.autograd.grad(loss, hidden, mark(x[:, 0]))
        leaf = x.clone().requires_grad_()
        parts = fastloss.cross_entropy_with_statistics(leaf, target, lse=True, entropy=True)
        (of_lse,) = torch.autograd.grad((parts.lse, parts.entropy), leaf, (mark(x[:, 1]), mark(x[:, 2])))
        results.append((of_hidden, of_lse))
    torch.testing.assert_close(*results)
