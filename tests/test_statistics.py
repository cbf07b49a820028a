"""``cross_entropy_with_statistics`` over both backends: every part, and every gradient, against float64."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastloss
from fastloss import LossStatistics, cross_entropy, cross_entropy_with_statistics
from fastloss.backends import choice
from fastloss.backends.contract import LossInputs, LossOptions, WantedNumbers, WantedParts
from fastloss.loss import routes

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
REDUCTIONS = ["mean", "sum", "none"]
NUMBERS = ("loss", "z_loss", "lse", "entropy", "log_sum_sq_probs", "mean_logit")  # the differentiable parts
EVERY: dict[str, bool] = dict.fromkeys(WantedParts._fields, True)


def by_torch(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> LossStatistics:
    """The same from torch's operators, in the dtype of ``input`` (the rows' numbers in float32 at least)."""
    dim = min(1, input.dim() - 1)
    wide, given, of_classes = input if input.dtype == torch.float64 else input.float(), input, weight
    if options.get("reduction") == "none":  # −loss is a log-probability
        given, of_classes = wide, None if weight is None else weight.to(wide.dtype)
    loss = reference.loss(given, target, of_classes, **options)
    without = reference.loss(given, target, of_classes, **{**options, "lse_square_scale": 0.0})
    cap = options.get("softcap")
    z = wide if cap is None else cap * torch.tanh(wide / cap)
    log_p = torch.log_softmax(z, dim)
    lse = torch.logsumexp(z, dim)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(dim)
    predicted = input.argmax(dim)
    squares = torch.logsumexp(2 * log_p, dim)
    correct = predicted == target.long()
    return LossStatistics(loss, loss - without, lse, entropy, predicted, correct, squares, z.mean(dim))


def differentiable(parts: LossStatistics) -> list[Any]:
    return [getattr(parts, name) for name in NUMBERS]


def values_and_gradient(
    function: Any,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    upstreams: dict[str, Tensor],
    **options: Any,
) -> tuple[LossStatistics, Tensor]:
    """All parts, and the gradient for an upstream gradient of each of some."""
    x = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    parts = function(x, target, weight, **options)
    outputs = [getattr(parts, name) for name in upstreams]
    given = [u.to(output) for u, output in zip(upstreams.values(), outputs, strict=True)]
    (gradient,) = torch.autograd.grad(outputs, x, given)
    return parts, gradient


def compare(
    place: Place,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    parts: tuple[str, ...] = NUMBERS,
    ulps: float = 1.5,
    **options: Any,
) -> None:
    """Values, and the gradient for random upstream gradients of ``parts`` at once, with torch's error as the bar."""
    if place.interpreted and input.dtype == torch.bfloat16:
        ulps = max(ulps, 2.0)  # the interpreter rounds bfloat16 by truncation
    shape = target.shape if options.get("reduction") == "none" else ()
    upstreams = {p: torch.randn(shape if "loss" in p else target.shape, dtype=torch.float64) for p in parts}
    on = place.device
    moved = None if weight is None else weight.to(on)
    ours, our_gradient = values_and_gradient(
        cross_entropy_with_statistics, input.to(on), target.to(on), moved, upstreams, **options, **EVERY
    )
    theirs, their_gradient = values_and_gradient(by_torch, input, target, weight, upstreams, **options)
    wide = None if weight is None else weight.double()
    exact, exact_gradient = values_and_gradient(by_torch, input.double(), target, wide, upstreams, **options)
    for name in NUMBERS:
        mine, torchs, true = (getattr(parts, name).detach() for parts in (ours, theirs, exact))
        assert_no_worse(mine, torchs, true, f"{name} {options}", ulps)
    assert_no_worse(our_gradient, their_gradient, exact_gradient, f"gradient {options}", ulps)
    ignored = target.long() == options.get("ignore_index", -100)
    assert ours.predicted is not None
    assert ours.correct is not None
    assert torch.equal(ours.predicted.cpu(), input.argmax(min(1, input.dim() - 1)))
    assert torch.equal(ours.correct.cpu(), exact.correct & ~ignored)  # type: ignore[operator]
    assert ours.predicted.dtype == torch.int64
    assert ours.correct.dtype == torch.bool


def assert_no_worse(ours: Tensor, theirs: Tensor, exact: Tensor, what: str, ulps: float) -> None:
    """A unit in the last place is at least that of 1: sums of probabilities are rounded there."""
    largest = float(exact[exact.isfinite()].abs().max()) if exact.isfinite().any() else 1.0
    reference.assert_no_worse(ours, theirs, exact, what, ulps * max(1.0, 1.0 / max(largest, 1e-3)))


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Logits and labels; one row, if there are several, is ignored."""
    input = (scale * torch.randn(shape)).to(dtype)
    target = torch.randint(shape[min(1, len(shape) - 1)], shape[:1] + shape[2:] if len(shape) > 1 else ())
    if target.dim():
        target.view(-1)[1] = -100
    return input, target


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (33, 40), (3, 1000), (11,), (2, 5, 3), (3, 6, 2, 5)], ids=str)
def test_shapes_and_dtypes(place: Place, shape: tuple[int, ...], dtype: torch.dtype, reduction: str) -> None:
    compare(place, *case(shape, dtype), reduction=reduction, lse_square_scale=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 9001), (3, 8192 + 64), (2, 130, 3), (1, 70, 40)], ids=str)
def test_rows_longer_than_a_tile(place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(place, *case(shape, dtype), reduction="none", lse_square_scale=0.01)
    compare(place, *case(shape, dtype), torch.rand(shape[1]).to(dtype), label_smoothing=0.1, softcap=20.0, ulps=6.0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"lse_square_scale": 0.01}, {"softcap": 5.0}, {"lse_square_scale": 0.1, "softcap": 2.0}],
    ids=str,
)
def test_weight_smoothing_z_loss_and_softcap(
    place: Place, options: dict[str, float], label_smoothing: float, weighted: bool, reduction: str
) -> None:
    input, target = 2 * torch.randn(5, 19, 3), torch.randint(19, (5, 3))
    target[2:4] = 11
    compare(
        place,
        input,
        target,
        torch.rand(19) + 0.1 if weighted else None,
        reduction=reduction,
        ignore_index=11,
        label_smoothing=label_smoothing,
        ulps=3.0,  # of z-loss and softcap torch has no operator, and its composition rounds elsewhere
        **options,
    )


@pytest.mark.parametrize(
    "parts",
    [*((name,) for name in NUMBERS), ("loss", "entropy"), ("z_loss", "lse"), ("loss", "log_sum_sq_probs")],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_each_part_alone_has_its_gradient(place: Place, dtype: torch.dtype, parts: tuple[str, ...]) -> None:
    compare(place, *case((6, 50), dtype), parts=parts, lse_square_scale=0.02, softcap=8.0, ulps=6.0)
    compare(place, *case((6, 50), dtype), parts=parts, lse_square_scale=0.02, reduction="none", ulps=2.0)


def test_per_token_log_probabilities_of_large_logits(place: Place) -> None:
    """−loss is log p_y, and far from 0 a float32 lse would have lost the digits that are left of lse − z_y."""
    input = 3 * torch.randn(20, 60) + 500
    target = input.argmax(1)
    compare(place, input, target, reduction="none", parts=("loss",))
    compare(place, input, target, reduction="none")
    compare(place, (300 * torch.randn(12, 31)), torch.randint(31, (12,)), reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [40, 8300])
def test_masked_classes(place: Place, classes: int, dtype: torch.dtype) -> None:
    """−inf is ordinary: 0 · log 0 is 0, in the first block of a row too, and its gradient is 0."""
    input, target = case((4, classes), dtype)
    input[0, : classes - 3] = -torch.inf
    input[1, ::2] = -torch.inf
    input[3, 1:] = -torch.inf
    target[0], target[3] = classes - 1, 0
    compare(place, input, target, reduction="none", ulps=2.0)
    parts, x = on_device(place, input, target, entropy=True, softcap=3.0)
    (gradient,) = torch.autograd.grad(parts.entropy.sum(), x)
    assert gradient.isfinite().all()


def test_masked_classes_in_plain_operations(place: Place) -> None:
    """Second derivatives, and tiny tensors by default, come from torch's own operations, where 0 · log 0 is NaN."""
    input, target = case((4, 6))
    input[0, 1:3] = input[3, 2:] = -torch.inf
    target[0] = target[3] = 0
    with fastloss.use_backend("auto"):
        compare(place, input, target, ulps=2.0)
    parts, x = on_device(place, input.double(), target, entropy=True)
    (gradient,) = torch.autograd.grad(parts.loss + parts.entropy.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.pow(2).sum(), x)
    assert gradient.isfinite().all()
    assert second.isfinite().all()


def on_device(place: Place, input: Tensor, target: Tensor, **options: Any) -> tuple[Any, Tensor]:
    """The parts, and the logits that they came from, as a leaf that needs a gradient."""
    x = input.detach().to(place.device).requires_grad_()
    return cross_entropy_with_statistics(x, target.to(place.device), **options), x


@pytest.mark.parametrize("classes", [30, 9001])
def test_special_rows(place: Place, classes: int) -> None:
    """All-masked rows, NaN and +inf are NaN for themselves alone; lse of nothing is −inf, and NaN the greatest."""
    input, target = case((5, classes))
    target[1] = 2
    input[0] = -torch.inf
    input[1, 7], input[1, 9], input[1, 3] = torch.nan, torch.nan, torch.inf
    input[2, classes - 1] = input[2, 5] = torch.inf
    parts, x = on_device(place, input, target, reduction="none", **EVERY)
    assert torch.equal(parts.predicted.cpu(), input.argmax(1))
    assert parts.lse[0].item() == -torch.inf
    assert parts.lse[1:3].isnan().all()
    for part in (parts.loss, parts.entropy, parts.log_sum_sq_probs):
        assert part[:3].isnan().all()
        assert part[3:].isfinite().all()
    torch.testing.assert_close(parts.mean_logit.cpu(), input.mean(1), equal_nan=True)
    upstreams = [torch.ones_like(parts.loss), torch.tensor([0.0, 0, 0, 2, 0], device=place.device)]
    (of_mean,) = torch.autograd.grad([parts.mean_logit, parts.lse], x, upstreams, retain_graph=True)
    torch.testing.assert_close(of_mean[[0, 1, 2, 4]].cpu(), torch.full((4, classes), 1 / classes))
    (gradient,) = torch.autograd.grad((parts.loss + parts.entropy)[[0, 1, 3]].sum(), x)
    assert gradient[:2].isnan().any(1).all()
    assert torch.equal(gradient[[2, 4]].cpu(), torch.zeros(2, classes))  # whatever row 2 holds
    assert gradient[3].isfinite().all()


@pytest.mark.parametrize("classes", [5, 1000, 9001, 131072])
def test_flat_and_peaked_rows(place: Place, classes: int) -> None:
    """Σ p² of a flat row is 1 / C, that of a peaked one all but 1; p² itself is below the least float32."""
    input = torch.zeros(6, classes)
    input[1, classes // 2] = 20.0
    input[2] = torch.linspace(-200, 0, classes)
    input[3], input[4, 1:] = 500.0 + torch.randn(classes), -torch.inf
    input[5, : classes // 2] = -torch.inf
    input = input[:3] if place.interpreted and classes > 10_000 else input
    target = torch.zeros(len(input), dtype=torch.int64)
    upstreams = {name: torch.ones(len(input), dtype=torch.float64) for name in ("log_sum_sq_probs",)}
    ours, our_gradient = values_and_gradient(
        cross_entropy_with_statistics, input.to(place.device), target.to(place.device), None, upstreams, **EVERY
    )
    theirs, their_gradient = values_and_gradient(by_torch, input, target, None, upstreams)
    exact, exact_gradient = values_and_gradient(by_torch, input.double(), target, None, upstreams)
    for name in ("log_sum_sq_probs", "mean_logit"):
        mine, torchs, true = (getattr(parts, name).detach() for parts in (ours, theirs, exact))
        for row in range(len(input)):
            assert_no_worse(mine[row], torchs[row], true[row], f"{name} of row {row}", 1.5)
    assert_no_worse(our_gradient, their_gradient, exact_gradient, "gradient", 1.5)
    assert ours.log_sum_sq_probs is not None
    torch.testing.assert_close(ours.log_sum_sq_probs[0].cpu(), -torch.tensor(float(classes)).log())


@pytest.mark.parametrize("classes", [17, 300, 9001])
@pytest.mark.parametrize("shape", ["rows", "by inner"])
def test_the_first_of_equal_logits_is_predicted(place: Place, classes: int, shape: str) -> None:
    input = torch.randint(-2, 2, (8, classes)).float()
    input[0] = 1.5
    input[1, -1] = input[1, 3] = 9.0
    input[2, classes // 2 :] = 4.0
    input[3] = -torch.inf
    input[4, -1] = 9.0
    if shape == "by inner":
        input = input[:, : min(classes, 300)].reshape(2, 4, -1).transpose(1, 2).contiguous()
    target = torch.zeros(input.shape[:1] + input.shape[2:], dtype=torch.int64)
    parts, _ = on_device(place, input, target, predicted=True)
    assert torch.equal(parts.predicted.cpu(), input.argmax(1))


def test_ignored_rows(place: Place) -> None:
    """They have lse, entropy and a prediction of their own, with their gradients, and no loss whatever they hold."""
    input, target = case((4, 30))
    parts, x = on_device(place, input, target, reduction="none", lse_square_scale=0.1, **EVERY)
    assert parts.loss[1].item() == parts.z_loss[1].item() == 0
    assert not parts.correct[1].item()
    assert torch.equal(parts.predicted.cpu(), input.argmax(1))
    torch.testing.assert_close(parts.lse.cpu(), input.logsumexp(1))
    (of_entropy,) = torch.autograd.grad(parts.entropy[1], x, retain_graph=True)
    assert of_entropy[1].abs().max() > 0
    input[1] = torch.nan
    for every in (True, False):
        parts, x = on_device(place, input, target, lse_square_scale=0.1, lse=every, label_smoothing=0.1)
        (gradient,) = torch.autograd.grad(parts.loss, x)
        assert parts.loss.isfinite()
        assert torch.equal(gradient[1].cpu(), torch.zeros(30))
        assert gradient.isfinite().all()


def test_no_row_counted(place: Place) -> None:
    input, target = torch.randn(3, 5), torch.full((3,), -100)
    parts, x = on_device(place, input, target, lse_square_scale=0.1, **EVERY)
    (gradient,) = torch.autograd.grad(parts.loss, x)
    assert parts.loss.isnan()
    assert parts.z_loss.isnan()
    assert torch.equal(gradient.cpu(), torch.zeros(3, 5))
    summed, _ = on_device(place, input, target, reduction="sum", z_loss=True)
    assert summed.loss.item() == summed.z_loss.item() == 0


@pytest.mark.parametrize("scale", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(3, 5), (300, 200)], ids=str)
def test_the_mean_over_no_weight_at_all_is_nan(place: Place, shape: tuple[int, int], scale: float) -> None:
    """As torch's own mean is, with its gradient: the z-loss's too, whatever its scale."""
    logits = torch.randn(shape, device=place.device, requires_grad=True)
    target, weight = torch.zeros(shape[0], dtype=torch.int64), torch.zeros(shape[1])
    parts = fastloss.cross_entropy_with_statistics(
        logits, target.to(place.device), weight.to(place.device), lse_square_scale=scale, z_loss=True
    )
    for value in (parts.loss, parts.z_loss):
        assert value is not None
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert value.isnan()
        assert gradient.isnan().all()


def strided(kind: str) -> Tensor:
    if kind == "transposed":
        return torch.randn(24, 8).t()
    if kind == "sliced":
        return torch.randn(8, 50)[:, 1:49:2]
    if kind == "expanded":
        return torch.randn(1, 24).expand(8, 24)
    if kind == "channels-last":
        return torch.randn(4, 24, 3, 2).contiguous(memory_format=torch.channels_last)
    return torch.randn(4, 24, 6, 4)[:, :, ::2, ::2]


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "channels-last", "not to be flattened"])
def test_strided_inputs(place: Place, kind: str) -> None:
    input = strided(kind)
    compare(place, input, torch.randint(24, input.shape[:1] + input.shape[2:]), lse_square_scale=0.1, ulps=2.0)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)], ids=str)
def test_empty_batches(place: Place, shape: tuple[int, ...]) -> None:
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    parts, x = on_device(place, torch.randn(shape), target, reduction="sum", **EVERY)
    assert parts.loss.item() == parts.z_loss.item() == 0
    assert all(getattr(parts, name).shape == target.shape for name in EVERY if name != "z_loss")
    parts.loss.backward()
    assert x.grad is not None
    assert x.grad.shape == shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_is_cross_entropys(place: Place, dtype: torch.dtype, reduction: str) -> None:
    input, target = case((9, 40), dtype)
    options: dict[str, Any] = {"reduction": reduction, "lse_square_scale": 0.01, "label_smoothing": 0.1}
    input, target = input.to(place.device), target.to(place.device)
    for autocast in (False, True):
        with torch.autocast(place.device.type, dtype=torch.bfloat16, enabled=autocast):
            ours = cross_entropy_with_statistics(input, target, z_loss=True, lse=True, **options)
            theirs = cross_entropy(input, target, **options)
        if reduction == "none":  # −loss is a log-probability
            theirs = cross_entropy(input if dtype == torch.float64 else input.float(), target, **options)
        torch.testing.assert_close(ours.loss, theirs)  # dtypes too
        assert ours.z_loss is not None
        assert ours.z_loss.dtype == theirs.dtype
        assert ours.lse is not None
        assert ours.lse.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_float16_gradients_wait_for_the_loss_scale(place: Place) -> None:
    """A gradient divided by the number of rows is next to 0 in float16; the loss scale comes before it is rounded."""
    input, target = case((1000, 8), torch.float16, scale=2.0)
    parts, x = on_device(place, input, target, lse=True)
    (gradient,) = torch.autograd.grad(parts.loss, x, torch.full_like(parts.loss, 2.0**15))
    x = input.double().requires_grad_()
    (exact,) = torch.autograd.grad(F.cross_entropy(x, target) * 2.0**15, x)
    torch.testing.assert_close(gradient.double().cpu(), exact, rtol=1e-3, atol=2e-6)


# ------------------------------------------------------------------------------------------ derivatives, transforms

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2, "weighted": True, "lse_square_scale": 0.1},
    {"softcap": 2.0, "lse_square_scale": 0.1},
]


def float64_case(place: Place, options: dict[str, Any], reduction: str) -> tuple[Any, Tensor]:
    options = dict(options)
    weight = torch.rand(5, dtype=torch.float64, device=place.device) if options.pop("weighted", False) else None
    target = torch.tensor([[0, 4], [-100, 2]], device=place.device)[:, : 1 if place.interpreted else 2]
    input = torch.randn(2, 5, target.shape[1], dtype=torch.float64, device=place.device, requires_grad=True)

    def numbers(input: Tensor) -> tuple[Tensor | None, ...]:
        parts = cross_entropy_with_statistics(input, target, weight, reduction=reduction, **options, **EVERY)
        return tuple(differentiable(parts))

    return numbers, input


@pytest.mark.backend_agnostic
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_and_gradgradcheck(place: Place, options: dict[str, Any], reduction: str) -> None:
    numbers, input = float64_case(place, options, reduction)
    assert torch.autograd.gradcheck(numbers, input)
    assert torch.autograd.gradgradcheck(numbers, input)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_transforms_and_batched_gradients(place: Place, options: dict[str, Any]) -> None:
    numbers, input = float64_case(place, options, "none")

    def total(x: Tensor) -> Tensor:
        return sum(((i + 1) * number.sin()).sum() for i, number in enumerate(numbers(x)))  # type: ignore[union-attr]

    value = total(input)
    (expected,) = torch.autograd.grad(value, input, retain_graph=True)
    torch.testing.assert_close(torch.func.grad(total)(input.detach()), expected)
    _, derivative = torch.func.jvp(total, (input.detach(),), (torch.ones_like(input),))
    torch.testing.assert_close(derivative, expected.sum())
    upstreams = torch.tensor([1.0, -2.0], dtype=torch.float64, device=place.device)
    (batched,) = torch.autograd.grad(value, input, upstreams, is_grads_batched=True)
    torch.testing.assert_close(batched, upstreams.view(2, 1, 1, 1) * expected)


def test_compiled_without_a_graph_break(place: Place) -> None:
    input, target = case((4, 12))
    input, target = input.to(place.device).requires_grad_(), target.to(place.device)

    def total(x: Tensor) -> Tensor:
        parts = cross_entropy_with_statistics(x, target, lse_square_scale=0.1, **EVERY)
        return sum(number.sin().sum() for number in differentiable(parts)) + parts.correct.sum()  # type: ignore[union-attr]

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    results = [(f(input), torch.autograd.grad(f(input), input)[0]) for f in (total, compiled)]
    torch.testing.assert_close(results[1], results[0])


def test_upstream_gradients_of_any_strides(place: Place) -> None:
    """Gives every part upstream gradients that are expanded, transposed and strided."""
    input, target = case((4, 30, 6))
    options: dict[str, Any] = {"reduction": "none", "lse_square_scale": 0.1, "label_smoothing": 0.1}
    expected: Any = None
    for form in (lambda t: t, lambda t: t.t().contiguous().t(), lambda t: t.repeat_interleave(2, 1)[:, ::2]):
        torch.manual_seed(0)
        parts, x = on_device(place, input, target, **options, **EVERY)
        upstreams = [form(torch.randn(4, 6, device=place.device)) for _ in NUMBERS]
        upstreams[1] = torch.randn(6, device=place.device).expand(4, 6)
        (gradient,) = torch.autograd.grad(differentiable(parts), x, upstreams)
        expected = gradient if expected is None else expected
        assert torch.equal(gradient, expected)


def test_rows_without_an_upstream_gradient_may_hold_anything(place: Place) -> None:
    input, target = case((6, 30))
    input[0], input[1], input[2, 3], input[5] = torch.nan, torch.inf, torch.nan, -torch.inf
    parts, x = on_device(place, input, target, reduction="none", lse_square_scale=0.1, label_smoothing=0.1, **EVERY)
    upstreams = [
        torch.zeros(6, device=place.device).index_fill(0, torch.tensor(3), number + 1.0)
        for number in range(len(NUMBERS))
    ]
    (gradient,) = torch.autograd.grad(differentiable(parts), x, upstreams)
    others = gradient[[0, 1, 2, 4, 5]]
    assert torch.equal(others, torch.zeros_like(others))
    assert gradient[3].isfinite().all()


def test_a_label_out_of_bounds_where_nobody_looks(kernels: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row's losses and gradient are NaN, and so are means."""
    monkeypatch.setattr(choice, "may_look", lambda tensor: False)
    input, target = torch.randn(4, 30), torch.tensor([2, 30, -100, -1])
    for reduction in REDUCTIONS:
        parts, x = on_device(kernels, input, target, reduction=reduction, **EVERY)
        (gradient,) = torch.autograd.grad(parts.loss.sum() + parts.z_loss.sum(), x)
        assert parts.correct.tolist()[1:] == [False] * 3
        assert parts.lse.isfinite().all()
        if reduction == "none":
            assert parts.loss.isnan().tolist() == parts.z_loss.isnan().tolist() == [False, True, False, True]
        else:
            assert parts.loss.isnan()
        assert gradient[[1, 3]].isnan().all()
        assert torch.equal(gradient[2].cpu(), torch.zeros(30))
        assert gradient[0].isnan().all() == (reduction == "mean")


def test_retained_graphs_and_separate_backwards(place: Place) -> None:
    input, target = case((5, 40))
    parts, x = on_device(place, input, target, **EVERY)
    (both,) = torch.autograd.grad(parts.loss + parts.entropy.sum(), x, retain_graph=True)
    (loss,) = torch.autograd.grad(parts.loss, x, retain_graph=True)
    (entropy,) = torch.autograd.grad(parts.entropy.sum(), x)
    torch.testing.assert_close(loss + entropy, both)


# ---------------------------------------------------------------------------------------------- what is not asked for


@pytest.mark.parametrize("part", EVERY)
def test_parts_that_are_off_are_none(place: Place, part: str) -> None:
    input, target = case((5, 40))
    for tensor in (input, input[:0], input.expand(2, 5, 40)[0]):
        labels = target[: len(tensor)].to(place.device)
        parts = cross_entropy_with_statistics(tensor.to(place.device), labels, **{part: True})
        given = {name for name, value in parts._asdict().items() if value is not None}
        assert given == {"loss", part}
        none = cross_entropy_with_statistics(tensor.to(place.device), labels)
        assert {name for name, value in none._asdict().items() if value is not None} == {"loss"}


class _Count(TorchDispatchMode):
    """How many torch operations are made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_launches(kernels: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forward, and one back for all upstream gradients at once."""
    choice.load("triton")
    launch: Any = sys.modules["fastloss.kernels.launch"].Launch
    started: list[Any] = []
    monkeypatch.setattr(launch, "start", lambda self, *_: started.append(self))
    monkeypatch.setenv("FASTLOSS_SHORT_ROAD", "0")
    parts, x = on_device(kernels, *case((6, 40)), label_smoothing=0.1, lse_square_scale=0.1, **EVERY)
    assert len(started) == 2
    torch.autograd.grad(differentiable(parts), x, [torch.ones_like(part) for part in differentiable(parts)])
    assert len(started) == 3


def test_parts_that_are_off_cost_no_operation() -> None:
    eager = choice.load("eager")
    input, target = case((5, 400))
    counts = {}
    for asked in ("", "entropy", "predicted", "log_sum_sq_probs", "logit_sum", "label_smoothing"):
        options = LossOptions(label_smoothing=0.1 * (asked == "label_smoothing"))
        inputs = LossInputs(input.unsqueeze(2), target, None, options)
        parts: dict[str, bool] = dict.fromkeys(("entropy", "predicted"), False)
        if asked and not options.label_smoothing:
            parts[asked] = True
        with _Count() as count:
            eager.row_statistics_forward(inputs, WantedNumbers(every_row=True, **parts))
        counts[asked] = count.names
    plain = counts.pop("")
    assert all(len(names) > len(plain) for names in counts.values())
    assert sum("exp2" in name for name in plain) == 1
    assert sum(name.startswith("aten.sum") for name in plain) == 1
    assert not any(word in name for name in plain for word in ("argmax", "clamp", "div"))


# --------------------------------------------------------------------------------------------------------- arguments


def test_the_first_arguments_are_cross_entropys() -> None:
    ours = list(inspect.signature(cross_entropy_with_statistics).parameters.values())
    theirs = list(inspect.signature(cross_entropy).parameters.values())
    assert [(p.name, p.default) for p in ours[:8]] == [(p.name, p.default) for p in theirs[:8]]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"input": [1.0]}, TypeError, "input must be a Tensor"),
        ({"input": torch.zeros(3, 5, dtype=torch.int64)}, NotImplementedError, "torch.int64"),
        ({"input": torch.zeros(())}, RuntimeError, "no dimensions"),
        ({"target": [0, 1, 2]}, TypeError, "target must be a Tensor"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"\(4,\).*\(3,\)"),
        ({"target": torch.zeros(3)}, RuntimeError, "torch.float32"),
        ({"target": torch.tensor([0, 5, 1])}, IndexError, r"target\[1\] is 5"),
        ({"weight": torch.ones(4)}, RuntimeError, r"\(4,\).*\(5,\)"),
        ({"weight": torch.ones(5, requires_grad=True)}, RuntimeError, "weight requires grad"),
        ({"reduction": "max"}, ValueError, "'max'"),
        ({"label_smoothing": 1.5}, RuntimeError, "1.5"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"lse_square_scale": "a"}, TypeError, "lse_square_scale is 'a'"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index is 0.5"),
        ({"z_loss": 1e-4}, TypeError, "z_loss is 0.0001; expected True or False"),
        ({"entropy": None}, TypeError, "entropy is None; expected True or False"),
    ],
    ids=str,
)
def test_bad_arguments(place: Place, change: dict[str, Any], error: type[Exception], words: str) -> None:
    if error is IndexError and place.device.type != "cpu":
        pytest.skip("on a GPU the row is NaN instead")
    arguments: dict[str, Any] = {"input": torch.randn(3, 5), "target": torch.tensor([0, 1, 2]), **change}
    arguments = {name: v.to(place.device) if isinstance(v, Tensor) else v for name, v in arguments.items()}
    with pytest.raises(error, match=words):
        cross_entropy_with_statistics(**arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_label_dtypes(place: Place, dtype: torch.dtype) -> None:
    input, target = torch.randn(6, 9), torch.randint(9, (6,))
    compare(place, input, target.to(dtype), ignore_index=3)


def test_deprecated_reductions(place: Place) -> None:
    input, target = torch.randn(4, 5, device=place.device), torch.tensor([0, 1, 2, 3], device=place.device)
    with pytest.warns(UserWarning, match="reduction"):
        summed = cross_entropy_with_statistics(input, target, None, False).loss
    torch.testing.assert_close(summed, cross_entropy(input, target, reduction="sum"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(4, 30), (2, 9, 3), (7,)], ids=str)
def test_class_probabilities(
    place: Place, shape: tuple[int, ...], reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is whatever cross_entropy makes of them; here it is torch's, so that this test is of the rest."""
    dim, scale = min(1, len(shape) - 1), 0.1

    def soft_loss(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, *_: Any) -> Any:
        return soft_loss_value(input, target, weight, options.lse_square_scale), ()

    def soft_loss_value(input: Tensor, target: Tensor, weight: Tensor | None, z_scale: float) -> Tensor:
        loss = F.cross_entropy(input, target, weight, reduction=reduction)
        squares = z_scale * input.logsumexp(dim).square() * target.sum(dim)
        if reduction == "none":
            return loss + squares
        return loss + squares.sum() / (1 if reduction == "sum" else max(1, squares.numel()))

    monkeypatch.setattr(routes, "loss_and_accuracies", soft_loss)
    input = torch.randn(shape, dtype=torch.float64, device=place.device, requires_grad=True)
    target = torch.rand(shape, dtype=torch.float64, device=place.device).softmax(dim).requires_grad_()
    parts: Any = cross_entropy_with_statistics(input, target, reduction=reduction, lse_square_scale=scale, **EVERY)
    plain = F.cross_entropy(input, target, reduction=reduction)
    torch.testing.assert_close(parts.loss - parts.z_loss, plain)
    expected = torch.distributions.Categorical(logits=input.movedim(dim, -1)).entropy()
    torch.testing.assert_close(parts.entropy, expected)
    torch.testing.assert_close(parts.lse, input.logsumexp(dim))
    torch.testing.assert_close(parts.log_sum_sq_probs, input.softmax(dim).square().sum(dim).log())
    torch.testing.assert_close(parts.mean_logit, input.mean(dim))
    assert torch.equal(parts.predicted, input.argmax(dim))
    assert torch.equal(parts.correct, input.argmax(dim) == target.argmax(dim))
    ours = torch.autograd.grad((parts.loss - parts.z_loss + parts.entropy).sum(), (input, target))
    torch.testing.assert_close(ours, torch.autograd.grad((plain + expected).sum(), (input, target)))


@pytest.mark.parametrize("part", ["predicted", "entropy", "log_sum_sq_probs", "mean_logit"])
def test_small_tensors_on_a_cpu_agree(part: str) -> None:
    input, target = case((6, 20))
    options: dict[str, Any] = {"lse_square_scale": 0.1, "label_smoothing": 0.1, part: True}
    by_default = cross_entropy_with_statistics(input, target, **options)
    with fastloss.use_backend("eager"):
        by_us = cross_entropy_with_statistics(input, target, **options)
    torch.testing.assert_close(by_us.loss, by_default.loss)
    torch.testing.assert_close(getattr(by_us, part), getattr(by_default, part))


@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
def test_smoothed_loss_far_from_zero(place: Place, label_smoothing: float) -> None:
    """What is common to a row's logits is subtracted before they are added up."""
    for classes in (30, 9001):
        input, target = torch.randn(8, classes) + 1000, torch.randint(classes, (8,))
        options: dict[str, Any] = {"reduction": "none", "label_smoothing": label_smoothing}
        ours = cross_entropy_with_statistics(input.to(place.device), target.to(place.device), **options).loss
        theirs, exact = (F.cross_entropy(x, target, **options) for x in (input, input.double()))
        reference.assert_no_worse(ours, theirs, exact, "loss")
