"""``cross_entropy`` over both backends, against float64: our error is held to torch's own, plus one ulp."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from places import Place
from processes import LIMIT
from torch import Tensor

import fastloss
from fastloss import CrossEntropyLoss, cross_entropy
from fastloss.backends import choice
from fastloss.checks import check_labels
from fastloss.measuring.machine import peak_bytes

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
REDUCTIONS = ["mean", "sum", "none"]


def compare(
    place: Place, input: Tensor, target: Tensor, weight: Tensor | None = None, ulps: float = 1.0, **options: Any
) -> None:
    """Loss and gradient against float64 and against torch in the same dtype."""
    upstream = options.pop("upstream", None)
    if place.interpreted and input.dtype == torch.bfloat16:
        ulps = max(ulps, 2.0)  # the interpreter rounds bfloat16 by truncation
    none = options.get("reduction") == "none"
    if upstream is None:
        upstream = torch.randn(target.shape) if none else torch.tensor(1.0)
    on = place.device
    moved = None if weight is None else weight.to(on)
    ours = reference.value_and_gradient(cross_entropy, input.to(on), target.to(on), moved, upstream.to(on), **options)
    theirs = reference.value_and_gradient(reference.loss, input, target, weight, upstream, **options)
    exact = reference.exact_value_and_gradient(input, target, weight, upstream, **options)
    for name, mine, torchs, true in zip(("loss", "gradient"), ours, theirs, exact, strict=True):
        reference.assert_no_worse(mine, torchs, true.double(), f"{name} {options}", ulps)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (33, 40), (3, 1000), (11,), (2, 5, 3), (3, 6, 2, 5)], ids=str)
def test_shapes_and_dtypes(place: Place, shape: tuple[int, ...], dtype: torch.dtype, reduction: str) -> None:
    input = (4 * torch.randn(shape)).to(dtype)
    classes = shape[0] if len(shape) == 1 else shape[1]
    target = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if target.dim():
        target.view(-1)[1] = -100
    compare(place, input, target, reduction=reduction)


@reference.weighted_and_smoothed
def test_weight_smoothing_and_ignored_rows(
    place: Place, dtype: torch.dtype, label_smoothing: float, weighted: bool, reduction: str
) -> None:
    input, target = (2 * torch.randn(9, 12, 3)).to(dtype), torch.randint(12, (9, 3))
    target[2:4] = 11
    weight = torch.rand(12).to(dtype) + 0.1 if weighted else None
    compare(
        place, input, target, weight, reduction=reduction, label_smoothing=label_smoothing, ignore_index=11, ulps=1.5
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", reference.NOT_IN_TORCH, ids=str)
def test_z_loss_and_softcap(place: Place, options: dict[str, float], weighted: bool, reduction: str) -> None:
    input, target = 3 * torch.randn(6, 19), torch.randint(19, (6,))
    target[0] = -100
    weight = torch.rand(19) if weighted else None
    # Of the two terms torch has no operator, and its composition rounds elsewhere.
    compare(place, input, target, weight, reduction=reduction, ulps=3.0, **options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 0, 3, 255, -1])
def test_label_dtypes_and_any_ignore_index(place: Place, dtype: torch.dtype, ignore_index: int) -> None:
    input, target = torch.randn(8, 6), torch.randint(6, (8,))
    if ignore_index >= 0 or dtype != torch.uint8:
        target[5] = ignore_index
    on = place.device
    ours = cross_entropy(input.to(on), target.to(dtype).to(on), ignore_index=ignore_index)
    torch.testing.assert_close(ours.cpu(), F.cross_entropy(input, target, ignore_index=ignore_index))
    input, target = input.T[None], target[None]
    ours = cross_entropy(input.to(on), target.to(dtype).to(on), ignore_index=ignore_index)
    torch.testing.assert_close(ours.cpu(), F.cross_entropy(input, target, ignore_index=ignore_index))


@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 63, 64, 65, 257])
def test_odd_numbers_of_classes(place: Place, classes: int) -> None:
    compare(place, torch.randn(5, classes), torch.randint(classes, (5,)))
    compare(place, torch.randn(2, classes, 3), torch.randint(classes, (2, 3)))


def strided(kind: str, dtype: torch.dtype) -> Tensor:
    """Logits (4, 24, 3, 2), or (8, 24), of one and the same shape for each kind of strides."""
    if kind == "channels-last":
        return torch.randn(4, 24, 3, 2).to(dtype).contiguous(memory_format=torch.channels_last)
    if kind == "transposed":
        return torch.randn(24, 8).to(dtype).t()
    if kind == "sliced":
        return torch.randn(8, 50).to(dtype)[:, 1:49:2]
    if kind == "rows apart":
        return torch.randn(16, 24).to(dtype)[::2]
    if kind == "expanded":
        return torch.randn(1, 24).to(dtype).expand(8, 24)
    if kind == "not to be flattened":
        return torch.randn(4, 24, 6, 4).to(dtype)[:, :, ::2, ::2]
    return torch.randn(24, 3, 2, 4).to(dtype).permute(3, 0, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind",
    ["channels-last", "transposed", "sliced", "rows apart", "expanded", "not to be flattened", "permuted"],
)
def test_strided_inputs(place: Place, kind: str, dtype: torch.dtype) -> None:
    input = strided(kind, dtype)
    target = torch.randint(24, input.shape[:1] + input.shape[2:])
    compare(place, input, target)
    compare(place, input, target, reduction="none")


def test_a_target_that_is_not_contiguous(place: Place) -> None:
    compare(place, torch.randn(5, 9, 4), torch.randint(9, (4, 5)).t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_logits(place: Place, dtype: torch.dtype) -> None:
    """Neither overflow nor a probability that underflows disturbs the loss or the gradient."""
    input = (200 * torch.randn(12, 31)).to(dtype)
    compare(place, input, torch.randint(31, (12,)), reduction="none")
    compare(place, input, torch.randint(31, (12,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_logits(place: Place, dtype: torch.dtype) -> None:
    """−inf is ordinary; NaN and +inf make their own row NaN, as in torch."""
    inf, nan = float("inf"), float("nan")
    input = torch.randn(7, 20).to(dtype)
    input[0, 3:9] = -inf
    input[1, :] = -inf
    input[2, 4] = inf
    input[3, 5] = nan
    input[4, 7] = -inf
    target = torch.tensor([0, 1, 2, 3, 7, 5, 6])
    compare(place, input, target, reduction="none")
    rows = [0, 4, 5, 6]
    compare(place, input[rows], target[rows], label_smoothing=0.0)


def test_a_row_that_is_ignored_has_no_gradient_whatever_it_holds(place: Place) -> None:
    """torch gives NaN there, 0 times the row's NaN; ours is 0 wherever a fused pass serves the call."""
    input = torch.randn(4, 30, device=place.device)
    input[1] = float("nan")
    input.requires_grad_()
    loss = cross_entropy(input, torch.tensor([1, -100, 2, 3], device=place.device))
    loss.backward()
    assert loss.isfinite()
    assert torch.equal(input.grad[1].cpu(), torch.zeros(30))  # type: ignore[index]


def test_the_mean_over_no_row_is_nan_and_its_gradient_zero(place: Place) -> None:
    input = torch.randn(3, 5, device=place.device, requires_grad=True)
    target = torch.full((3,), -100, device=place.device)
    loss = cross_entropy(input, target)
    loss.backward()
    assert loss.isnan()
    assert torch.equal(input.grad.cpu(), torch.zeros(3, 5))  # type: ignore[union-attr]
    assert cross_entropy(input, target, reduction="sum").item() == 0
    assert torch.equal(cross_entropy(input, target, reduction="none").cpu(), torch.zeros(3))


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)], ids=str)
def test_empty_batches(place: Place, shape: tuple[int, ...]) -> None:
    input = torch.randn(shape, device=place.device, requires_grad=True)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=place.device)
    for reduction in REDUCTIONS:
        ours, theirs = (f(input, target, reduction=reduction) for f in (cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    cross_entropy(input, target).backward()
    assert input.grad is not None
    assert input.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_autocast_as_torch(place: Place, dtype: torch.dtype) -> None:
    input, target = torch.randn(8, 40).to(dtype), torch.randint(40, (8,))
    ours_input = input.to(place.device).detach().requires_grad_()
    theirs_input = input.detach().clone().requires_grad_()
    with torch.autocast(place.device.type, dtype=torch.bfloat16):
        ours = cross_entropy(ours_input, target.to(place.device))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = F.cross_entropy(theirs_input, target)
    ours.backward()
    theirs.backward()
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.cpu(), theirs)
    torch.testing.assert_close(ours_input.grad.cpu(), theirs_input.grad, rtol=8e-3, atol=1e-5)  # type: ignore[union-attr]


def test_deprecated_reductions(place: Place) -> None:
    input, target = torch.randn(4, 5, device=place.device), torch.tensor([0, 1, 2, 3], device=place.device)
    with pytest.warns(UserWarning, match="reduction"):
        summed = cross_entropy(input, target, None, False)
    torch.testing.assert_close(summed, cross_entropy(input, target, reduction="sum"))


def test_module(place: Place) -> None:
    input, target = torch.randn(6, 5, device=place.device), torch.randint(5, (6,), device=place.device)
    weight = torch.rand(5, device=place.device)
    module = CrossEntropyLoss(weight, label_smoothing=0.1, lse_square_scale=0.01, ignore_index=2)
    expected = cross_entropy(input, target, weight, label_smoothing=0.1, lse_square_scale=0.01, ignore_index=2)
    assert torch.equal(module(input, target), expected)
    assert "lse_square_scale=0.01" in repr(module)
    torch.nn.CrossEntropyLoss(weight).load_state_dict(module.state_dict())


def test_equal_from_run_to_run(place: Place) -> None:
    input, target = torch.randn(37, 130, device=place.device), torch.randint(130, (37,), device=place.device)
    input.requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        loss = cross_entropy(input, target, label_smoothing=0.1)
        return loss.detach(), torch.autograd.grad(loss, input)[0]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_small_tensors_on_a_cpu_go_to_torch_and_agree() -> None:
    input, target = torch.randn(64, 10), torch.randint(10, (64,))
    by_default = reference.value_and_gradient(cross_entropy, input, target, None, torch.tensor(1.0))
    with fastloss.use_backend("eager"):
        by_us = reference.value_and_gradient(cross_entropy, input, target, None, torch.tensor(1.0))
    for ours, theirs in zip(by_us, by_default, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", [9000, 12289, 20000])
def test_the_mean_over_many_rows(place: Place, rows: int) -> None:
    """What the rows weigh is added up in parts, whose number is no power of 2."""
    if place.interpreted:
        rows = rows // 10 + 1
        choice.load("triton")
        patched = pytest.MonkeyPatch()
        patched.setattr(sys.modules["fastloss.kernels.cross_entropy"], "_WEIGHED_BY_EACH", 100)
        row_loss = sys.modules["fastloss.kernels.row_loss"]
        patched.setattr(row_loss, "WEIGH_BLOCK", type(row_loss.WEIGH_BLOCK)(256))
    else:
        patched = pytest.MonkeyPatch()
    with patched.context():
        compare(place, torch.randn(rows, 9), torch.randint(9, (rows,)), torch.rand(9), ulps=4.0)
    patched.undo()


def test_rows_that_weigh_nothing_have_no_mean(place: Place) -> None:
    weight = torch.ones(6)
    weight[0] = 0
    for smoothing in (0.0, 0.1):
        loss = cross_entropy(
            torch.randn(4, 6, device=place.device),
            torch.zeros(4, dtype=torch.int64, device=place.device),
            weight.to(place.device),
            label_smoothing=smoothing,
        )
        assert loss.isnan()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weight_and_smoothing_where_every_row_counts(place: Place, reduction: str) -> None:
    """In full float64, too, where what is the same for all rows is a Python number."""
    for dtype in (torch.float64, torch.float32):
        input, weight = torch.randn(9, 12, dtype=dtype), torch.rand(12, dtype=dtype) + 0.1
        compare(place, input, torch.randint(12, (9,)), weight, reduction=reduction, label_smoothing=0.3, ulps=1.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_logits_far_from_zero(place: Place, label_smoothing: float, dtype: torch.dtype) -> None:
    """What is common to a row's logits is subtracted before anything is rounded."""
    for offset in (80.0, 1000.0):
        input, target = (torch.randn(40, 30) + offset).to(dtype), torch.randint(30, (40,))
        compare(place, input, target, reduction="none", label_smoothing=label_smoothing, ulps=1.5)
        compare(place, input, target, label_smoothing=label_smoothing, ulps=1.5)


@pytest.mark.parametrize("extreme", [torch.finfo(torch.float32).min, 3e38, -1e30, 1e30])
def test_a_row_of_one_extreme_value(place: Place, extreme: float) -> None:
    input, target = torch.randn(6, 20), torch.randint(20, (6,))
    input[3] = extreme
    for label_smoothing in (0.0, 0.1):
        ours = cross_entropy(
            input.to(place.device), target.to(place.device), reduction="none", label_smoothing=label_smoothing
        )
        theirs = F.cross_entropy(input, target, reduction="none", label_smoothing=label_smoothing)
        torch.testing.assert_close(ours.cpu(), theirs)


def test_autocast_loss_of_16_bit_logits_is_as_exact_as_torchs(place: Place) -> None:
    """There the row's loss is float32, and an error that 16 bits would hide shows."""
    for dtype in (torch.bfloat16, torch.float16):
        input, target = (torch.randn(300, 30) * 0.5 + 80).to(dtype), torch.randint(30, (300,))
        exact = F.cross_entropy(input.double(), target, reduction="none")
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast(place.device.type, dtype=dtype):
            ours = cross_entropy(input.to(place.device), target.to(place.device), reduction="none")
            theirs = F.cross_entropy(input, target, reduction="none")
        assert ours.dtype == torch.float32
        reference.assert_no_worse(ours, theirs, exact, "loss")


@pytest.mark.slow
def test_a_processor_without_fused_multiply_add() -> None:
    """torch's oldest code path rounds products first; large offsets must not feel it."""
    code = """
import torch, torch.nn.functional as F, fastloss
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
x, target = torch.randn(64, 100) + 1e4, torch.randint(100, (64,))
gradients = []
for f in (fastloss.cross_entropy, F.cross_entropy):
    leaf = x.clone().requires_grad_()
    f(leaf, target).backward()
    gradients.append(leaf.grad)
torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "FASTLOSS_BACKEND": "eager"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=LIMIT)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6, 1e8])
def test_a_label_whose_probability_underflows_far_from_zero(place: Place, offset: float) -> None:
    input = torch.tensor([[offset, offset, offset, offset - 96.0]]).repeat(3, 1)
    compare(place, input, torch.tensor([3, 3, 0]), reduction="none")
    compare(place, input, torch.tensor([3, 3, 0]))


def test_losses_of_rows_may_be_written_over(place: Place) -> None:
    """As torch's may: a mask is multiplied into them, say."""
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(6, 5, dtype=dtype, device=place.device, requires_grad=True)
        loss = cross_entropy(x, torch.arange(6, device=place.device) % 5, reduction="none")
        loss *= torch.arange(6, dtype=dtype, device=place.device)
        loss.sum().backward()
        parts = fastloss.cross_entropy_with_statistics(
            x, torch.zeros(6, dtype=torch.int64, device=place.device), lse=True
        )
        assert parts.lse is not None
        parts.lse.mul_(2)
        (parts.loss + parts.lse.sum()).backward()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_any_dtype_under_autocast(place: Place, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, t, w = torch.randn(6, 5).to(dtype), torch.arange(6) % 5, torch.rand(5).to(weight_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast(place.device.type, dtype=torch.bfloat16):
        ours = cross_entropy(x.to(place.device), t.to(place.device), w.to(place.device))
        theirs = F.cross_entropy(x, t, w)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.cpu(), theirs)


@pytest.mark.parametrize("classes", [10, 9000])
def test_a_masked_class_of_weight_0_beside_smoothing(place: Place, classes: int) -> None:
    """0 times −inf: the loss is NaN, as torch's is, and the gradient, which has no such term, is a number."""
    x = torch.randn(2, classes)
    x[:, 3] = -torch.inf
    weight, target = torch.ones(classes), torch.tensor([1, 2])
    weight[3] = 0.0
    leaf = x.clone().to(place.device).requires_grad_()
    loss = fastloss.cross_entropy(leaf, target.to(place.device), weight.to(place.device), label_smoothing=0.1)
    exact = x.double().requires_grad_()
    F.cross_entropy(exact, target, weight.double(), label_smoothing=0.1).backward()
    loss.backward()
    assert loss.isnan()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.cpu().double(), exact.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("shape", [(2, 9, 128, 128), (2, 12, 128, 128), (2, 13, 128, 128), (40_000, 9)], ids=str)
def test_thin_maps_with_ignored_pixels(shape: tuple[int, ...], ignored: bool, dtype: torch.dtype) -> None:
    """On a CPU the numbers of such rows would take more memory than torch's operator: it serves them."""
    input = torch.randn(shape).to(dtype).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target.view(-1)[::5] = -100 if ignored else 0
    loss = cross_entropy(input, target.to(torch.int32))
    thin = ignored and dtype is torch.bfloat16 and shape[1] <= 12 and len(shape) > 2
    assert ("Nll" in str(loss.grad_fn)) == thin
    torch.testing.assert_close(loss, F.cross_entropy(input.float(), target).to(dtype), rtol=1e-2, atol=0.0)


def test_a_look_at_label_maps_takes_little_memory() -> None:
    """Comparisons of all labels at once would take as much memory as two classes of 16-bit logits."""
    target = torch.full((4, 512, 512), 255)
    target[3, 511, 511] = 20
    assert peak_bytes(lambda: check_labels(target, 21, 255), target.device) < target.numel() // 2
    with pytest.raises(IndexError, match=r"target\[3, 511, 511\] is 20, .* \[0, 20\)"):
        check_labels(target, 20, 255)
