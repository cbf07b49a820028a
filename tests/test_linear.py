"""``linear_cross_entropy``: the projection, the loss and their gradients, without the logits.

Everything is held against float64, and errors against those of ``F.cross_entropy(F.linear(…))`` in the same dtype.
bfloat16, which Triton's interpreter rounds by its own rules, is for the eager backend alone there.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import pickle
import re
import shutil
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import torch
import torch.nn.functional as F
from drawing import drawn
from places import Place
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastloss
from fastloss import LinearCrossEntropyLoss, linear_cross_entropy, linear_cross_entropy_with_accuracy
from fastloss.backends.contract import LossOptions
from fastloss.linear import chunks as linear_chunks
from fastloss.linear.chunks import LinearOptions, Needs, rows_of_chunk
from fastloss.measuring.machine import peak_bytes

pytestmark = pytest.mark.backend_agnostic

REDUCTIONS = ["mean", "sum", "none"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"lse_square_scale": 0.01},
    {"softcap": 3.0},
    {"label_smoothing": 0.2, "lse_square_scale": 0.02, "softcap": 5.0},
]
ROWS, FEATURES, CLASSES = 11, 5, 37
CPU = torch.device("cpu")
NAMES = ("input", "linear_weight", "linear_bias", "target")


def short(place: Place) -> torch.dtype:
    return torch.float16 if place.interpreted else torch.bfloat16


def make(
    place: Place,
    *lead: int,
    dtype: torch.dtype = torch.float32,
    features: int = FEATURES,
    classes: int = CLASSES,
    soft: bool = False,
    bias: bool = False,
    weighted: bool = False,
) -> dict[str, Any]:
    """The tensors of a call; a third of the labels is ignored."""
    lead, on = lead or (ROWS,), place.device
    target = torch.randint(classes, lead, device=on)
    target[torch.rand(lead, device=on) < 1 / 3] = -100
    if soft:
        target = torch.rand(*lead, classes, device=on).to(dtype)
    return {
        "input": torch.randn(*lead, features, device=on).to(dtype),
        "linear_weight": torch.randn(classes, features, device=on).to(dtype),
        "target": target,
        "linear_bias": torch.randn(classes, device=on).to(dtype) if bias else None,
        "weight": (torch.rand(classes, device=on) + 0.1).to(dtype) if weighted else None,
    }


def with_leaves(
    case: dict[str, Any], dtype: torch.dtype | None, trained: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The tensors of a call in ``dtype`` (None: their own), and those of them that are trained."""
    tensors, leaves = dict(case), {}
    for name, tensor in case.items():
        if tensor is not None and tensor.is_floating_point():
            tensors[name] = tensor = tensor.detach().to(dtype or tensor.dtype)
            if name in trained:
                leaves[name] = tensors[name] = tensor.clone().requires_grad_()
    return tensors, leaves


def held_by(loss: Callable[..., Tensor], rows: int = 600, features: int = 64, classes: int = 4000) -> int:
    """The most bytes that the loss of a case and its backward pass take beside the gradients; the eager backend."""
    case = make(Place("eager", CPU), rows, features=features, classes=classes)
    leaves = [case[name].requires_grad_() for name in ("input", "linear_weight")]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(**case).backward()

    with fastloss.use_backend("eager"):
        step()
        step()
        return peak_bytes(step, CPU) - sum(leaf.nbytes for leaf in leaves)


def check_again(call: Callable[[Tensor], Tensor], x: Tensor, use_reentrant: bool) -> None:
    """A second backward pass of one graph, and a checkpoint, give the gradient of the first."""
    loss = call(x)
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x)
    assert torch.equal(again, expected)
    checkpoint(call, x, use_reentrant=use_reentrant).backward()
    assert torch.equal(x.grad, expected)


def plain(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The same loss in torch's own operators, the logits whole."""
    logits, target = reference.projected(input, linear_weight, target, **reference.of_map(options))
    shape, classes = logits.shape[:-1], logits.shape[-1]
    logits = logits.reshape(-1, classes)
    if target.is_floating_point():
        loss = plain_soft(logits, target.reshape(-1, classes), **options)
    else:
        loss = reference.loss(logits, target.reshape(-1), **options)
    return loss.view(shape) if loss.dim() else loss


def plain_soft(
    z: Tensor,
    t: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z, t, weight, reduction="none", label_smoothing=label_smoothing)
    if lse_square_scale:
        mass = (t if weight is None else t * weight).sum(1)
        loss = loss + lse_square_scale * mass * z.logsumexp(1).square()
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def run(
    function: Callable[..., Tensor],
    case: dict[str, Any],
    upstream: Tensor | float = 1.0,
    trained: tuple[str, ...] = NAMES,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The loss and the gradients of those that are trained, by name."""
    tensors, leaves = with_leaves(case, dtype, trained)
    loss = function(**tensors, **options)
    upstream = torch.as_tensor(upstream, device=loss.device).to(loss.dtype).expand_as(loss)
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream) if leaves else ()
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_no_worse(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    exact: dict[str, Tensor],
    ulps: float = 4.0,
    of_loss: float = 0.0,
) -> None:
    """Each error is at most twice torch's own and a few units in the last place of the largest value.

    ``of_loss`` is torch's error of the loss if it is more than what is seen of it.
    """
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, mine in ours.items():
        assert mine.dtype == theirs[name].dtype, name
        assert mine.shape == theirs[name].shape, name
        right = exact[name].double()
        assert torch.equal(mine.isnan(), right.isnan()), f"{name}: NaN"
        if not right.numel():
            continue
        # A loss or gradient of 0 is the difference of numbers near 1, which are rounded.
        unit = torch.finfo(mine.dtype).eps * max(1 / 16, float(right.nan_to_num().abs().max()))
        allowed = float((theirs[name].double() - right).abs().nan_to_num().max())
        limit = 2 * max(allowed, of_loss if name == "loss" else 0.0) + ulps * unit
        error = float((mine.double() - right).abs().nan_to_num().max())
        assert error <= limit, f"{name}: error {error:.3e}, allowed {limit:.3e}"


def check(
    case: dict[str, Any],
    upstream: Tensor | float = 1.0,
    trained: tuple[str, ...] = NAMES,
    how: dict[str, Any] | None = None,
    ulps: float = 4.0,
    **options: Any,
) -> dict[str, Tensor]:
    """Against torch's operators, in the same dtype and in float64; gives ours."""
    ours = run(linear_cross_entropy, case, upstream, trained, **options, **(how or {}))
    theirs = run(plain, case, upstream, trained, **options)
    exact = run(plain, case, upstream, trained, torch.float64, **options)
    assert_no_worse(ours, theirs, exact, ulps)
    return ours


# ----------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("bias", "weighted"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(
    place: Place, options: dict[str, Any], soft: bool, bias: bool, weighted: bool, reduction: str
) -> None:
    """Loss and all gradients, over chunks that do not divide the rows, with an upstream gradient that is not 1."""
    case = make(place, soft=soft, bias=bias, weighted=weighted)
    upstream = torch.rand(ROWS if reduction == "none" else (), device=place.device) + 0.5
    check(case, upstream, how={"chunk_size": 4}, reduction=reduction, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(place: Place, dtype: torch.dtype, options: dict[str, Any], soft: bool, reduction: str) -> None:
    if place.interpreted and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds bfloat16 by its own rules")
    case = make(place, dtype=dtype, soft=soft, bias=True, weighted=True)
    ulps = 64.0 if dtype == torch.float64 else 4.0
    check(case, 1.5, how={"chunk_size": 4}, ulps=ulps, reduction=reduction, **options)


@pytest.mark.parametrize("classes", [1, 2, 700])
def test_other_numbers_of_classes(place: Place, classes: int) -> None:
    check(make(place, classes=classes, bias=True), how={"chunk_size": 5})


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("classes", [65, 128, 129, 300])
def test_16_bit_heads_of_many_classes(place: Place, classes: int, reduction: str) -> None:
    """The sum of the head's gradient over chunks is held in two parts from 65 classes on; each part is compared."""
    case = make(place, 40, dtype=short(place), classes=classes, bias=True)
    check(case, how={"chunk_size": 16}, reduction=reduction)


def test_the_sum_of_the_biass_gradient_over_many_chunks_in_16_bits() -> None:
    """All rows pull one way: a sum in 16 bits would lose each chunk's small part."""
    case = make(Place("eager", CPU), 2048, dtype=torch.bfloat16, bias=True)
    case["target"].fill_(0)
    with fastloss.use_backend("eager"):
        check(case, how={"chunk_size": 2}, reduction="sum")


@pytest.mark.parametrize(
    "kind",
    [
        "head of a transposed matrix",
        "expanded input",
        "sliced rows",
        "class weights of a column",
        "one class weight expanded",
    ],
)
@pytest.mark.parametrize("soft", [False, True])
def test_any_strides(place: Place, soft: bool, kind: str) -> None:
    case = make(place, soft=soft, bias=True)
    if kind == "head of a transposed matrix":
        case["linear_weight"] = case["linear_weight"].t().contiguous().t()
    elif kind == "class weights of a column":
        case["weight"] = torch.rand(CLASSES, 2, device=place.device)[:, 0]
    elif kind == "one class weight expanded":
        case["weight"] = torch.rand(1, device=place.device).expand(CLASSES)
    elif kind == "expanded input":
        case["input"] = case["input"][:1].expand(ROWS, FEATURES)
    else:
        case["input"] = case["input"].repeat_interleave(2, 0)[::2]
        case["target"] = case["target"].repeat_interleave(2, 0)[::2]
    for reduction in ("mean", "none"):  # the gradients are written in the forward pass, or in the backward pass
        check(case, how={"chunk_size": 4}, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_other_labels(place: Place, dtype: torch.dtype, shift: bool) -> None:
    """As their int64 selves; 255 is ignored, which is in either."""
    case = make(place, 3, 6)
    case["target"][case["target"] < 0] = 255
    expected = run(linear_cross_entropy, case, ignore_index=255, shift=shift)
    case["target"] = case["target"].to(dtype)
    ours = run(linear_cross_entropy, case, ignore_index=255, shift=shift)
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name


def test_soft_targets_of_another_dtype(place: Place) -> None:
    """The loss has the wider dtype, and its digits."""
    case = make(place, soft=True)
    case["target"] = case["target"].double()
    ours = run(linear_cross_entropy, case, chunk_size=4)
    exact = run(plain, case, dtype=torch.float64)
    assert ours["loss"].dtype == ours["target"].dtype == torch.float64
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), exact[name], rtol=1e-5, atol=1e-6)


torch_has_it = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.13 on")


@torch_has_it
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("out_features", [(), (2, 3)], ids=str)
def test_torchs_own_call_gives_the_same(
    place: Place, out_features: tuple[int, ...], soft: bool, reduction: str
) -> None:
    """With the arguments that both have, K-dimensional weights among them."""
    n, c, on = 4, 7, place.device
    input, linear_weight = torch.randn(n, 5, device=on), torch.randn(c, *out_features, 5, device=on)
    bias = torch.randn(c, *out_features, device=on)
    target = torch.randint(c, (n, *out_features), device=on)
    if soft:
        target = torch.randn(n, c, *out_features, device=on).softmax(1)
    case = {"input": input, "linear_weight": linear_weight, "target": target, "linear_bias": bias}
    case["weight"] = torch.rand(c, device=on)
    results = [
        run(function, case, 0.5, reduction=reduction, label_smoothing=0.1)
        for function in (linear_cross_entropy, F.linear_cross_entropy)
    ]
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], msg=lambda words, name=name: f"{name}: {words}")


@torch_has_it
def test_torchs_chunked_form_is_no_better() -> None:
    """Its gradients, too, are held against float64."""
    case = make(Place("eager", CPU), 200, features=32, classes=300)
    options = nn.LinearCrossEntropyOptions()
    ours = run(linear_cross_entropy, case, chunk_size=64)
    theirs = run(lambda **call: F.linear_cross_entropy(**call, options=options), case)
    assert_no_worse(ours, theirs, run(plain, case, dtype=torch.float64))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.integers(1, 9))
    return {
        "shape": draw(st.sampled_from([(rows,), (rows, 2), (2, 1, rows)])),
        "features": draw(st.integers(1, 6)),
        "classes": draw(st.sampled_from([1, 2, 3, 17, 40])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.float16])),
        "soft": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "weighted": draw(st.booleans()),
        "chunk_size": draw(st.one_of(st.none(), st.integers(1, 12), st.just(1000))),
        "trained": tuple(sorted(draw(st.sets(st.sampled_from(NAMES))))),
        "skip_ignored": draw(st.sampled_from([None, True, False])),
        "options": {
            "reduction": draw(st.sampled_from(REDUCTIONS)),
            "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
            "lse_square_scale": draw(st.sampled_from([0.0, 0.01])),
            "softcap": draw(st.sampled_from([None, None, 4.0])),
        },
    }


@pytest.mark.slow
def test_any_call(place: Place) -> None:
    @drawn(cases(), examples=80 if place.name == "eager" else 25)
    def any_call(drawn: dict[str, Any]) -> None:
        names = ("features", "classes", "dtype", "soft", "bias", "weighted")
        case = make(place, *drawn["shape"], **{name: drawn[name] for name in names})
        reduction = drawn["options"]["reduction"]
        upstream = torch.rand(drawn["shape"] if reduction == "none" else (), device=place.device)
        check(
            case,
            upstream,
            drawn["trained"],
            {"chunk_size": drawn["chunk_size"], "skip_ignored": drawn["skip_ignored"]},
            ulps=128.0 if drawn["dtype"] == torch.float64 else 8.0,
            **drawn["options"],
        )

    any_call()


# ----------------------------------------------------------------------------- the frozen cost nothing


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("classes", [CLASSES, 64, 1030])
def test_rows_of_logits_that_lie_apart(
    place: Place, classes: int, soft: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose products want rows that begin at round addresses."""
    monkeypatch.setattr(linear_chunks, "_PITCH", {"cuda": 64, "cpu": 64})
    case = make(place, classes=classes, soft=soft, bias=True)
    upstream = torch.rand(ROWS, device=place.device) if "reduction" in options else 1.5
    check(case, upstream, how={"chunk_size": 4}, **options)


def products(step: Callable[[], object]) -> int:
    """How many matrix products ``step`` does."""
    with torch.autograd.profiler.profile() as record:
        step()
    counted = {"aten::mm", "aten::addmm", "aten::addmm_"}
    return sum(event.count for event in record.key_averages() if event.key in counted)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [c for n in range(4) for c in itertools.combinations(NAMES[:3], n)], ids=str)
def test_nothing_is_computed_for_the_frozen(place: Place, trained: tuple[str, ...], reduction: str) -> None:
    """A product a chunk for the logits, twice if the gradient must wait; one each for input and weight if trained."""
    case, chunks = make(place, 12, bias=True), 3
    case["target"] = case["target"].abs() % CLASSES
    found = products(lambda: run(linear_cross_entropy, case, 1.0, trained, chunk_size=4, reduction=reduction))
    of_logits = 1 if reduction == "mean" or not trained else 2
    assert found == chunks * (of_logits + ("input" in trained) + ("linear_weight" in trained))
    check(case, 1.0, trained, {"chunk_size": 4}, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_probabilities_are_trained(place: Place, reduction: str) -> None:
    case = make(place, 12, soft=True, bias=True)
    found = products(lambda: run(linear_cross_entropy, case, 1.0, ("target",), chunk_size=4, reduction=reduction))
    assert found == (3 if reduction == "mean" else 6)
    check(case, 1.0, ("target",), {"chunk_size": 4}, reduction=reduction)


# ----------------------------------------------------------------------------- shapes, shift


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("lead", [(6,), (2, 5), (2, 1, 3), (1,)], ids=str)
def test_leading_dimensions(place: Place, lead: tuple[int, ...], soft: bool, reduction: str) -> None:
    ours = check(make(place, *lead, soft=soft), how={"chunk_size": 4}, reduction=reduction)
    assert ours["loss"].shape == (lead if reduction == "none" else ())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["label", "label of shape (1,)", "probabilities"])
def test_a_single_row_without_a_dimension(place: Place, kind: str, reduction: str) -> None:
    case = make(place, 1, soft=kind == "probabilities", bias=True)
    case["input"] = case["input"][0]
    if kind == "probabilities":
        case["target"] = case["target"][0]
    else:
        case["target"] = torch.tensor([3], device=place.device)
        if kind == "label":
            case["target"] = case["target"][0]
    ours = run(linear_cross_entropy, case, reduction=reduction)

    def torchs(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor, weight: None) -> Tensor:
        target = target if target.is_floating_point() else target.view(())
        return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, reduction=reduction)

    assert_no_worse(ours, run(torchs, case), run(torchs, case, dtype=torch.float64))


@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
@pytest.mark.parametrize("form", ["transformed", "compiled", "create_graph"])
def test_padding_may_hold_nan_in_every_form(place: Place, form: str, logits_dtype: torch.dtype | None) -> None:
    case = make(place, 12, dtype=torch.float64 if logits_dtype is None else torch.bfloat16)
    case["target"].clamp_(min=0)[3:6] = -100
    padded = case["input"].clone()
    padded[3:6] = torch.nan

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, case["target"], chunk_size=5, logits_dtype=logits_dtype)

    def gradients(x: Tensor, form: str) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, case["linear_weight"])]
        if form == "transformed":
            return torch.func.grad(loss, (0, 1))(x, case["linear_weight"])
        torch._dynamo.reset()
        function = torch.compile(loss, backend="aot_eager", fullgraph=True) if form == "compiled" else loss
        return torch.autograd.grad(function(*leaves), leaves, create_graph=form == "create_graph")

    for mine, right in zip(gradients(padded, form), gradients(case["input"], "by chunks"), strict=True):
        tolerance = 1e-9 if logits_dtype is None else 1e-2
        torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(place: Place, shape: tuple[int, ...], reduction: str) -> None:
    ours = check(make(place, *shape), reduction=reduction)
    assert not ours["linear_weight"].nan_to_num().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_meta_tensors_have_shapes(reduction: str, dtype: torch.dtype) -> None:
    x = torch.empty(2, 5, 3, device="meta", dtype=dtype, requires_grad=True)
    w = torch.empty(7, 3, device="meta", dtype=dtype, requires_grad=True)
    target = torch.empty(2, 5, device="meta", dtype=torch.int64)
    loss = linear_cross_entropy(x, w, target, reduction=reduction)
    assert loss.is_meta
    assert loss.shape == ((2, 5) if reduction == "none" else ())
    loss.sum().backward()
    assert (x.grad.shape, w.grad.shape) == (x.shape, w.shape)


def test_no_features(place: Place) -> None:
    check(make(place, 3, features=0, bias=True))
    check(make(place, 3, features=0, soft=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shift", [True, 2, 4])
@pytest.mark.parametrize("lead", [(7,), (3, 6), (2, 2, 5), (2, 1), (2, 3)], ids=str)
def test_shift(place: Place, lead: tuple[int, ...], shift: int, reduction: str) -> None:
    """The label of position t is target t + shift; for "none" the last positions of each sequence are gone."""
    case = make(place, *lead, bias=True)
    rows = (*lead[:-1], max(lead[-1] - shift, 0))
    upstream = torch.rand(rows if reduction == "none" else (), device=place.device)
    ours = check(case, upstream, how={"chunk_size": 4}, reduction=reduction, shift=shift)
    assert ours["loss"].shape == (rows if reduction == "none" else ())
    assert not ours["input"][..., -shift:, :].any()
    result = linear_cross_entropy_with_accuracy(**case, shift=shift, reduction=reduction, topk=(1, 3))
    logits = F.linear(case["input"], case["linear_weight"], case["linear_bias"])[..., :-shift, :].flatten(0, -2)
    expected = fastloss.accuracy(logits, case["target"][..., shift:].flatten(), (1, 3), reduction=reduction)
    for mine, other in zip(result.accuracy, expected, strict=True):
        torch.testing.assert_close(mine, other.view(mine.shape), equal_nan=True)


@pytest.mark.parametrize("length", [0, 1, 4])
def test_shift_past_the_end(place: Place, length: int) -> None:
    """No row counts then; a shift so great would not even fit into memory as labels."""
    for shift in (max(length, 1), 10**15):
        assert linear_cross_entropy(**make(place, 3, length), shift=shift).isnan()
        assert linear_cross_entropy(**make(place, 3, length), shift=shift, reduction="none").shape == (3, 0)


def test_shifts_that_are_one_number(place: Place) -> None:
    """True is 1, False is 0, and any integer that Python takes for an index will do."""
    case = make(place, 3, 6)
    for shifts in ((True, 1, torch.tensor(1)), (False, 0)):
        losses = [linear_cross_entropy(**case, shift=shift, reduction="none") for shift in shifts]
        for loss in losses[1:]:
            assert torch.equal(loss, losses[0])


def test_shift_copies_no_hidden_states() -> None:
    """Beside the one chunk there is nothing of the hidden states' size, in a forward pass alone."""
    case = make(Place("eager", CPU), 4, 200, features=256, classes=16)
    chunk, rows = 8, 800
    with fastloss.use_backend("eager"), torch.no_grad():
        step = lambda: linear_cross_entropy(**case, shift=True, chunk_size=chunk)  # noqa: E731
        step()
        peak = peak_bytes(step, CPU)
    assert peak <= chunk * (16 + 2 * 256) * 4 + 64 * rows
    assert peak < case["input"].nbytes / 4


# ----------------------------------------------------------------------------- ignored rows, labels out of range


@pytest.mark.parametrize(
    ("dtype", "reduction"), [(torch.float32, "mean"), (torch.float32, "none"), (torch.float16, "sum")], ids=str
)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_ignored_rows_are_left_out_or_not(place: Place, share: float, dtype: torch.dtype, reduction: str) -> None:
    """The same loss, accuracy and gradients whether they are visited or not; NaN where no row counts."""
    rows = 40
    case = make(place, rows, dtype=dtype, classes=9, bias=True)
    case["target"] = torch.randint(9, (rows,), device=place.device)
    case["target"][: int(share * rows)] = -100
    case["target"] = case["target"][torch.randperm(rows)].contiguous()
    for skip in (None, True, False):
        how = {"skip_ignored": skip, "chunk_size": 16}
        ours = check(case, how=how, reduction=reduction)
        if reduction == "none":
            assert not ours["loss"][case["target"] == -100].any()
        result = linear_cross_entropy_with_accuracy(**case, reduction=reduction, topk=2, **how)
        logits = F.linear(case["input"], case["linear_weight"], case["linear_bias"])
        expected = fastloss.accuracy(logits, case["target"], 2, reduction=reduction)
        torch.testing.assert_close(result.accuracy, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "reduction"), [(torch.float32, "mean"), (torch.float32, "none"), (torch.float16, "mean")], ids=str
)
@pytest.mark.parametrize("number", [float("nan"), -float("inf")])
@pytest.mark.parametrize("skip", [None, True, False])
def test_padding_may_hold_anything(
    place: Place, skip: bool | None, number: float, dtype: torch.dtype, reduction: str
) -> None:
    """What stands in ignored rows reaches neither the loss nor any gradient."""
    case = make(place, 40, dtype=dtype, bias=True)
    case["target"] = case["target"].abs() % CLASSES
    case["target"][::7] = -100
    clean = run(linear_cross_entropy, case, skip_ignored=skip, chunk_size=16, reduction=reduction)
    case["input"][::7] = number
    ours = run(linear_cross_entropy, case, skip_ignored=skip, chunk_size=16, reduction=reduction)
    assert not ours["input"][::7].any()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, clean[name])


def test_rows_that_are_left_out_are_not_projected(place: Place) -> None:
    case = make(place, 32)
    case["target"] = case["target"].abs() % CLASSES
    case["target"][4:] = -100
    assert products(lambda: run(linear_cross_entropy, case, chunk_size=4, skip_ignored=False)) == 24
    assert products(lambda: run(linear_cross_entropy, case, chunk_size=4, skip_ignored=True)) == 3


def test_a_label_out_of_range() -> None:
    """On a CPU the error says where it is in the caller's tensor; with ``shift`` the first labels are nobody's."""
    case = make(Place("eager", CPU), 2, 5)
    case["target"] = case["target"].clamp(min=0)
    case["target"][1, 3] = CLASSES
    for shift in (False, True, 3):
        with pytest.raises(IndexError, match=rf"target\[1, 3\] is {CLASSES}.*\[0, {CLASSES}\)"):
            linear_cross_entropy(**case, shift=shift)
    case["target"][1, 3] = 0
    case["target"][0, 0] = -7
    assert linear_cross_entropy(**case, shift=True).isfinite()
    with pytest.raises(IndexError, match=r"target\[0, 0\] is -7"):
        linear_cross_entropy(**case)


# ----------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("topk", [1, (1, 3, 100)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_accuracy(place: Place, chunk_size: int | None, soft: bool, reduction: str, topk: Any) -> None:
    """That of the logits, with many ties; the loss and the gradients beside it are the same as without."""
    case = make(place, soft=soft)
    case["input"], case["linear_weight"] = (case[name].round().clamp(-1, 1) for name in NAMES[:2])
    ours = linear_cross_entropy_with_accuracy(**case, reduction=reduction, topk=topk, chunk_size=chunk_size)
    logits = case["input"] @ case["linear_weight"].t()
    expected = fastloss.accuracy(logits, case["target"], topk, reduction=reduction)
    torch.testing.assert_close(ours.accuracy, expected)

    def loss_beside_it(**call: Any) -> Tensor:
        return linear_cross_entropy_with_accuracy(**call, topk=topk, chunk_size=chunk_size).loss

    beside = run(loss_beside_it, case, reduction=reduction)
    alone = run(linear_cross_entropy, case, reduction=reduction, chunk_size=chunk_size)
    for name, tensor in beside.items():
        torch.testing.assert_close(tensor, alone[name])
    torch.testing.assert_close(ours.loss, alone["loss"])


# ----------------------------------------------------------------------------- memory


def held(case: dict[str, Any], train: bool = True, autocast: bool = False, **options: Any) -> int:
    """The most bytes held at one time beside the inputs and their gradients; buffers that stay are there already."""
    leaves = [case[name] for name in NAMES if isinstance(case[name], Tensor) and case[name].is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_(train)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(**case, **options).sum()
        if train:
            loss.backward()

    with fastloss.use_backend("eager"):
        step()
        for leaf in leaves:
            leaf.grad = None
        peak = peak_bytes(step, CPU)
    return peak - sum(leaf.nbytes for leaf in leaves) if train else peak


LARGE = {"features": 64, "classes": 4000}


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_one_chunk_is_held(train: bool, soft: bool, options: dict[str, Any]) -> None:
    """Of the logits of 600 rows those of 50, and on a CPU another such buffer where a softcap's slope or the
    probabilities' gradient is computed.
    """
    rows, chunk = 600, 50
    case = make(Place("eager", CPU), rows, soft=soft, bias=True, **LARGE)
    peak = held(case, train, chunk_size=chunk, **options)
    buffers = 1 + (train and soft) + (train and "softcap" in options)
    assert peak <= buffers * chunk * (4000 + 2 * 64) * 4 + 64 * rows
    assert peak >= chunk * 4000 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 5000), (64, 100), (65, 100), (127, 3), (129, 100), (3001, 7), (5, 0)], ids=str
)
def test_sums_are_rounded_in_their_own_memory(shape: tuple[int, int], dtype: torch.dtype) -> None:
    total = torch.randn(shape)
    half = min(shape[0], -(-shape[0] // 128) * 64)
    first, second = total[:half].clone(), total[half:].clone()
    place = first.data_ptr()
    found = linear_chunks._rounded(first, second, torch.empty(shape, dtype=dtype))
    assert torch.equal(found, total.to(dtype))
    assert found.data_ptr() == place
    assert found.is_contiguous()


@pytest.mark.parametrize(
    ("classes", "dtype", "rows", "expected"),
    [
        (32000, torch.float32, 1024, 256),
        (98304, torch.float32, 1024, 256),
        (98305, torch.float32, 1024, 192),
        (128256, torch.float32, 512, 192),
        (128256, torch.float32, 100, 100),
        (128256, torch.bfloat16, 512, 256),
        (262144, torch.float32, 512, 128),
        (1, torch.float32, 0, 1),
    ],
)
def test_wide_heads_have_chunks_of_fewer_rows(classes: int, dtype: torch.dtype, rows: int, expected: int) -> None:
    """No more than 96 MiB of logits, and no fewer than 128 rows for the products."""
    call = LinearOptions(LossOptions(), dtype, torch.float32)
    weight = torch.empty(1, dtype=dtype).expand(classes, 4)
    assert rows_of_chunk(call, rows, weight, Needs(True, True, False, False)) == expected


def test_a_gpus_rows_are_one_chunk_where_that_takes_no_more_memory() -> None:
    """By the arithmetic alone: of meta tensors, whose device is no CPU."""
    weight = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    call, trained = LinearOptions(LossOptions(), torch.bfloat16, torch.float32), Needs(True, True, False, False)
    several = rows_of_chunk(call, 1 << 20, weight, trained)
    row, sums = 128256 * 2, 128256 * 4096 * 2
    assert several * row + sums <= 1.5e9  # the bar at 8192 rows
    assert rows_of_chunk(call, 8192, weight, trained) == several
    assert rows_of_chunk(call, several + 4096, weight, trained) == several + 4096
    assert rows_of_chunk(call, several + 4097, weight, trained) == several
    assert several == 1536
    for classes, expected in ((32000, 4096), (65536, 2560), (1 << 20, 640)):  # 0.3 GB of logits, and 1.3 at most
        head = torch.empty(classes, 1, dtype=torch.bfloat16, device="meta")
        assert rows_of_chunk(call, 1 << 20, head, trained) == expected
    # Frozen, or in float32, or summed up in its .grad, the head has no sums that a single chunk would spare.
    for frozen_call, needs, head in (
        (call, Needs(True, False, False, False), weight),
        (dataclasses.replace(call, accumulate_grad=True), trained, weight),
        (call, trained, weight.float()),
    ):
        assert rows_of_chunk(frozen_call, several + 1, head, needs) == several


@pytest.mark.parametrize("size", [1536, 640, 187, 128, 100, 10, 3, 1])
def test_no_chunk_of_a_gpu_is_a_small_rest(size: int) -> None:
    """All rows are in one chunk, none has more than the rule's, and the last of several has about half of that."""
    for rows, even in itertools.product([*range(5 * min(size, 200)), 8191, 8192, 9999], (False, True)):
        starts = linear_chunks._starts(rows, size, even=even)
        sizes = [end - start for start, end in itertools.pairwise(starts)]
        assert (starts[-1], sum(sizes)) == (rows, rows)
        assert all(0 < each <= size for each in sizes)
        assert even or all(each == size for each in sizes[:-1])
        assert not even or rows <= size or min(sizes) >= (size // 2 - 64 if size >= 256 else size // 2)
    assert linear_chunks._starts(8192, 1536, even=True) == [0, 1536, 3072, 4608, 6144, 7168, 8192]


def test_a_wide_head_takes_a_quarter_of_the_plain_forms_memory() -> None:
    """Two of torch's (N, C) tensors are alive at one time at least; (512, 512, 128256) with fewer features."""
    case = make(Place("eager", CPU), 512, classes=128256, features=2)
    case["target"].clamp_(min=0)
    assert held(case) <= 0.25 * 2 * 512 * 128256 * 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sums_of_16_bits_take_half_of_their_size(dtype: torch.dtype, reduction: str) -> None:
    """The gradient, rounded, lies in their own memory; the logits are gone when it is rounded."""
    rows, chunk, classes, features = 64, 16, 9001, 300
    case = make(Place("eager", CPU), rows, dtype=dtype, classes=classes, features=features)
    case["target"].clamp_(min=0)
    peak = held(case, chunk_size=chunk, reduction=reduction)
    assert peak <= 0.75 * classes * features * 4  # half of the sums, a chunk, and what is widened of it


BUDGETED: list[dict[str, Any]] = [
    {},
    {"train": False},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "accumulate_grad": True},
    {"dtype": torch.float16},
    {"autocast": True},
    {"soft": True},
    {"reduction": "none"},
    {"softcap": 5.0},
    {"skip_ignored": True},
    {"skip_ignored": False},
]


@pytest.mark.parametrize("kind", BUDGETED, ids=str)
@pytest.mark.parametrize("of_logits", [0.2, 0.6, 2.0])
def test_memory_budget(kind: dict[str, Any], of_logits: float) -> None:
    """What is held keeps to it, and makes use of it."""
    kind = dict(kind)
    rows, dtype = 400, kind.pop("dtype", torch.float32)
    case = make(Place("eager", CPU), rows, dtype=dtype, soft=kind.pop("soft", False), **LARGE)
    budget = int(of_logits * rows * 4000 * 4)
    soft = case["target"].is_floating_point()
    peak = held(case, memory_budget=budget, **kind)
    assert peak <= budget
    if dtype == torch.float32 and of_logits < 1 and not soft and not {"autocast", "softcap"} & kind.keys():
        assert peak >= 0.7 * budget


@pytest.mark.parametrize("kind", [kind for kind in BUDGETED if "train" not in kind], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 50])
def test_the_least_budget_is_what_the_error_says(kind: dict[str, Any], rows: int) -> None:
    """Named by the error, it does; one byte less does not."""
    kind = dict(kind)
    case = make(Place("eager", CPU), rows, dtype=kind.pop("dtype", torch.float32), soft=kind.pop("soft", False))
    case["linear_weight"].requires_grad_()
    autocast = kind.pop("autocast", False)

    def call(budget: int) -> None:
        with fastloss.use_backend("eager"), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            linear_cross_entropy(**case, memory_budget=budget, **kind)

    with pytest.raises(ValueError, match="memory_budget is 0 bytes; the least that would do is") as error:
        call(0)
    (least,) = re.findall(r"would do is (\d+)", str(error.value))
    call(int(least))
    with pytest.raises(ValueError, match=f"would do is {least}"):
        call(int(least) - 1)


# ----------------------------------------------------------------------------- what is refused


def words(**changes: Any) -> dict[str, Any]:
    return {"linear_bias": None, "weight": None, **changes}


ones = torch.ones
K_DIMENSIONAL = {"linear_weight": torch.ones(7, 2, 3), "target": torch.ones(4, 2).long()}
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "chunk_size 0": ({"chunk_size": 0}, ValueError, "chunk_size is 0; expected at least 1"),
    "chunk_size -3": ({"chunk_size": -3}, ValueError, "chunk_size is -3"),
    "chunk_size True": ({"chunk_size": True}, TypeError, "chunk_size is True; expected an int"),
    "chunk_size 2.5": ({"chunk_size": 2.5}, TypeError, "chunk_size is 2.5; expected an int"),
    "memory_budget '1GB'": ({"memory_budget": "1GB"}, TypeError, "memory_budget is '1GB'; expected an int"),
    "memory_budget True": ({"memory_budget": True}, TypeError, "memory_budget is True; expected an int"),
    "a negative budget": ({"memory_budget": -1}, ValueError, "the least that would do"),
    "chunks of the K-dimensional loss": (
        {**K_DIMENSIONAL, "chunk_size": 2},
        ValueError,
        r"chunk_size is 2 beside a linear_weight of shape \(7, 2, 3\); the K-dimensional loss holds all",
    ),
    "no budget of the K-dimensional loss": (
        {**K_DIMENSIONAL, "memory_budget": 0},
        ValueError,
        "memory_budget is 0 beside",
    ),
    "a budget of the K-dimensional loss": (
        {**K_DIMENSIONAL, "memory_budget": 10**9},
        ValueError,
        "memory_budget is 1000000000 beside",
    ),
    "accumulate_grad of the K-dimensional loss": (
        {**K_DIMENSIONAL, "accumulate_grad": True},
        ValueError,
        "accumulate_grad is True beside",
    ),
    "both": ({"chunk_size": 2, "memory_budget": 10**9}, ValueError, "expected one of them"),
    "shift=-1": ({"shift": -1}, ValueError, "shift is -1; expected 0 positions or more"),
    "shift=1.0": ({"shift": 1.0}, TypeError, "shift is 1.0; expected True, False or a number of positions"),
    "shift=None": ({"shift": None}, TypeError, "shift is None; expected True"),
    "skip_ignored=0": ({"skip_ignored": 0}, TypeError, "skip_ignored is 0"),
    "accumulate_grad='yes'": ({"accumulate_grad": "yes"}, TypeError, "accumulate_grad is 'yes'"),
    "reduction": ({"reduction": "avg"}, ValueError, "'avg' is not a valid value for reduction"),
    "label_smoothing": ({"label_smoothing": 2}, RuntimeError, "between 0.0 and 1.0"),
    "input a list": ({"input": [[1.0]]}, TypeError, "input must be a Tensor"),
    "linear_weight a list": ({"linear_weight": [[1.0]]}, TypeError, "linear_weight must be a Tensor, got list"),
    "linear_bias a number": ({"linear_bias": 1.0}, TypeError, "linear_bias must be a Tensor, got float"),
    "target a list": ({"target": [0]}, TypeError, "target must be a Tensor, got list"),
    "integers": ({"input": ones(4, 3).long()}, NotImplementedError, "input has dtype torch.int64"),
    "no dimension": ({"input": torch.tensor(1.0)}, RuntimeError, "input has"),
    "features": ({"linear_weight": ones(7, 2)}, RuntimeError, r"input \(4, 3\), linear_weight \(7, 2\), target"),
    "one-dimensional weight": (
        {"linear_weight": ones(3)},
        RuntimeError,
        r"input \(4, 3\), linear_weight \(3,\), target",
    ),
    "bias": ({"linear_bias": ones(6)}, RuntimeError, r"linear_bias \(6,\); expected .* \(7,\)"),
    "rows": ({"target": ones(5).long()}, ValueError, r"target \(5,\); .* indices of shape \(4,\)"),
    "target's shape": ({"target": ones(4, 1).long()}, RuntimeError, r"linear_weight \(7, 3\), target \(4, 1\)"),
    "classes": ({"target": ones(4, 6)}, RuntimeError, r"target \(4, 6\); .* probabilities of shape \(4, 7\)"),
    "class weights": ({"weight": ones(6)}, RuntimeError, r", weight \(6,\); expected .*\(7,\)"),
    "weight that is trained": ({"weight": ones(7, requires_grad=True)}, RuntimeError, "weight requires grad"),
    "dtype of the weight": (
        {"linear_weight": ones(7, 3).double()},
        RuntimeError,
        "linear_weight has dtype torch.float64; expected torch.float32",
    ),
    "skip_ignored 2": ({"skip_ignored": 2}, TypeError, "skip_ignored is 2; expected True, False or None"),
    "a sparse input": (
        {"input": ones(4, 3).to_sparse()},
        RuntimeError,
        "input has layout torch.sparse_coo; expected",
    ),
    "dtype of the bias": ({"linear_bias": ones(7).half()}, RuntimeError, "linear_bias has dtype torch.float16"),
    "dtype of the labels": ({"target": ones(4)}, RuntimeError, "target is torch.float32; expected class indices"),
    "int16 labels": ({"target": ones(4).short()}, RuntimeError, "target is torch.int16; .* in int64, int32 or uint8"),
    "labels of the K-dimensional loss": (
        {**K_DIMENSIONAL, "target": ones(4, 3).long()},
        RuntimeError,
        r"target \(4, 3\); .* indices of shape \(4, 2\) .* probabilities of shape \(4, 7, 2\)",
    ),
    "device of the weight": (
        {"linear_weight": ones(7, 3, device="meta")},
        RuntimeError,
        "linear_weight is on meta; expected cpu",
    ),
    "device of the target": ({"target": ones(4, device="meta").long()}, RuntimeError, "target is on meta"),
    "shift of rows": ({"shift": True, "input": ones(3), "target": ones(()).long()}, ValueError, "shift=1;"),
    "shift of probabilities": ({"shift": True, "target": ones(4, 7)}, ValueError, "shift=1;"),
    "shift of float labels": ({"shift": True, "target": ones(4)}, ValueError, "class indices of shape"),
    "shift of bool labels": ({"shift": True, "target": ones(4).bool()}, ValueError, "class indices of shape"),
    "shift of K dimensions": ({"shift": True, "linear_weight": ones(7, 2, 3)}, RuntimeError, "no shift"),
    "K dimensions of (…, D)": ({"input": ones(2, 2, 3), "linear_weight": ones(7, 2, 3)}, RuntimeError, "K-dim"),
    "ignore_index beside probabilities": ({"target": ones(4, 7), "ignore_index": 1}, RuntimeError, "ignore_index"),
    "accumulate_grad of a result": (
        {"linear_weight": ones(7, 3, requires_grad=True) * 1, "accumulate_grad": True},
        RuntimeError,
        "not a leaf",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    changes, kind, message = REFUSED[name]
    good = {"input": ones(4, 3), "linear_weight": ones(7, 3), "target": torch.tensor([0, 6, -100, 2])}
    assert linear_cross_entropy(**good).isfinite()
    for function in (linear_cross_entropy, linear_cross_entropy_with_accuracy):
        with pytest.raises(kind, match=message) as error:
            function(**{**good, **changes})
        assert str(error.value).startswith("fastloss: ")


@pytest.mark.parametrize("name", ["input", *NAMES[1:], "weight"])
def test_shapes_that_do_not_fit_are_all_named(name: str) -> None:
    """Whichever is wrong, and none is called by the shape of the logits, which the caller never sees."""
    case: dict[str, Any] = {"input": ones(4, 3), "linear_weight": ones(7, 3), "target": ones(4).long()}
    case |= {"linear_bias": ones(7), "weight": ones(7)}
    assert linear_cross_entropy(**case).isfinite()
    case[name] = ones(5, 2).to(case[name].dtype)
    with pytest.raises((RuntimeError, ValueError)) as error:
        linear_cross_entropy(**case)
    given = ", ".join(f"{each} {tuple(tensor.shape)}" for each, tensor in case.items())
    assert f"the shapes are {given}; " in str(error.value)


# ----------------------------------------------------------------------------- autograd


def leaves(case: dict[str, Any], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Those that may be trained, made leaves of the case."""
    found = []
    for name in NAMES:
        tensor = case[name]
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            case[name] = tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()
            found.append(case[name])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_two_backward_passes(place: Place, soft: bool, reduction: str, dtype: torch.dtype) -> None:
    """With the gradients of the first kept between, and an upstream of its own for each."""
    case = make(place, dtype=dtype, soft=soft, bias=True)
    params = leaves(case)
    loss = linear_cross_entropy(**case, reduction=reduction, chunk_size=4).sum()
    first = torch.autograd.grad(loss, params, torch.tensor(3.0, device=place.device, dtype=dtype), retain_graph=True)
    before = [g.clone() for g in first]
    (loss * 2).backward(retain_graph=True)
    loss.backward()
    rounding = 4 * torch.finfo(dtype).eps
    for param, g, kept in zip(params, first, before, strict=True):
        assert torch.equal(g, kept)
        torch.testing.assert_close(param.grad, g, rtol=rounding, atol=rounding * float(g.abs().max()))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def small(place: Place, **options: Any) -> dict[str, Any]:
    case = make(place, 3, features=2, classes=4, dtype=torch.float64, **options)
    if not options.get("soft"):
        case["target"] = torch.tensor([0, -100, 3], device=place.device)
    return case


DERIVED: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "softcap": 2.0},
    {"reduction": "none", "lse_square_scale": 0.1, "label_smoothing": 0.1},
]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", DERIVED, ids=str)
def test_gradcheck_and_gradgradcheck(place: Place, options: dict[str, Any], soft: bool) -> None:
    case = small(place, soft=soft, bias=True, weighted=True)
    names = [name for name in NAMES if case[name].is_floating_point()]

    def loss(*tensors: Tensor) -> Tensor:
        return linear_cross_entropy(**{**case, **dict(zip(names, tensors, strict=True))}, chunk_size=2, **options)

    params = leaves(case)
    assert torch.autograd.gradcheck(loss, params, fast_mode=place.interpreted)
    assert torch.autograd.gradgradcheck(loss, params, fast_mode=True)


def test_second_derivative_of_one_tensor_in_two_places(place: Place) -> None:
    """Hidden states that are made of the head, as a tied embedding's are: nothing is counted twice."""
    table = torch.randn(6, 4, dtype=torch.float64, device=place.device, requires_grad=True)
    target = torch.tensor([1, 2, 0, 5, 5, -100], device=place.device)
    found = []
    for function in (linear_cross_entropy, plain):
        (first,) = torch.autograd.grad(function(table.tanh(), table, target), table, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), table)
        found.append((first.detach(), second))
    torch.testing.assert_close(found[0], found[1])


def test_second_derivative_where_the_target_is_made_of_the_input(place: Place) -> None:
    """Of ``cross_entropy`` and of ``linear_cross_entropy``."""
    x = torch.randn(5, 6, dtype=torch.float64, device=place.device, requires_grad=True)
    head = torch.eye(6, dtype=torch.float64, device=place.device)
    found = []
    for function in (
        fastloss.cross_entropy,
        lambda x, t: linear_cross_entropy(x, head, t),
        lambda x, t: fastloss.cross_entropy(x, t, softcap=1e9),
        F.cross_entropy,
    ):
        (first,) = torch.autograd.grad(function(x, (2 * x).softmax(1)), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        found.append((first.detach(), second))
    for ours in found[:-1]:
        torch.testing.assert_close(ours, found[-1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True])
def test_batched_gradients(place: Place, soft: bool, reduction: str) -> None:
    case = small(place, soft=soft, bias=True)
    params, rows = leaves(case), (3,) if reduction == "none" else ()
    upstreams = torch.randn(4, *rows, dtype=torch.float64, device=place.device)
    found = [
        torch.autograd.grad(function(**case, reduction=reduction), params, upstreams, is_grads_batched=True)
        for function in (linear_cross_entropy, plain)
    ]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_function_transforms(place: Place, reduction: str) -> None:
    """``torch.func``'s grad, jvp and vmap, over each of the arguments, the bias alone too."""
    case = small(place, bias=True, weighted=True)
    case.pop("weight")
    tensors = {name: case[name] for name in NAMES[:3]}

    def losses(function: Callable[..., Tensor]) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda some: function(**{**case, **some}, reduction=reduction).sum()

    for names in [NAMES[:3], *((name,) for name in NAMES[:3])]:
        some = {name: tensors[name] for name in names}
        several = {name: torch.stack([t, t * 2, -t]) for name, t in some.items()}
        tangents = {name: torch.randn_like(t) for name, t in some.items()}
        ours, theirs = (
            (
                torch.func.grad(losses(function))(some),
                torch.func.jvp(losses(function), (some,), (tangents,)),
                torch.vmap(losses(function))(several),
                torch.vmap(torch.func.grad(losses(function)))(several),
            )
            for function in (linear_cross_entropy, plain)
        )
        torch.testing.assert_close(ours, theirs)
    per_row = torch.vmap(lambda x, t: linear_cross_entropy(x, case["linear_weight"], t, reduction="none"))
    expected = plain(case["input"], case["linear_weight"], case["target"], reduction="none")
    torch.testing.assert_close(per_row(case["input"], case["target"]), expected)


@pytest.mark.parametrize("accumulate_grad", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(place: Place, use_reentrant: bool, accumulate_grad: bool) -> None:
    case = make(place, bias=True)
    x, w, b = leaves(case)
    body = torch.randn(FEATURES, FEATURES, device=place.device, requires_grad=True)

    def tail(x: Tensor) -> Tensor:
        return linear_cross_entropy(
            (x @ body).tanh(), w, case["target"], linear_bias=b, chunk_size=4, accumulate_grad=accumulate_grad
        )

    (checkpoint(tail, x, use_reentrant=use_reentrant) * 2).backward()
    ours = [t.grad for t in (x, w, b, body)]
    expected = torch.autograd.grad(2 * plain((x @ body).tanh(), w, case["target"], linear_bias=b), (x, w, b, body))
    torch.testing.assert_close(ours, list(expected))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_and_batched_gradients_in_a_checkpoint(place: Place, reduction: str) -> None:
    """It lets each saved tensor be read once."""
    case = make(place)
    x, w = leaves(case)

    def loss(x: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, case["target"], reduction=reduction)

    found = []
    for function in (loss, lambda x: checkpoint(loss, x, use_reentrant=False)):
        value = function(x)
        (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), (x, w))
        eye = torch.eye(value.numel(), device=place.device).view(-1, *value.shape)
        (batched,) = torch.autograd.grad(function(x), x, eye, is_grads_batched=True)
        found.append([*second, batched])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operations_are_counted_without_all_logits(place: Place, reduction: str) -> None:
    """Counters and other dispatch modes see one operator, whose chunks are as large as without them."""
    case = make(place, bias=True)
    params = leaves(case)
    found, totals, largest = [], [], []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = function(*args, **(kwargs or {}))
            tensors = [t for t in torch.utils._pytree.tree_leaves(results) if isinstance(t, Tensor)]
            largest.append(max((t.untyped_storage().nbytes() for t in tensors), default=0))
            return results

    for function in (functools.partial(linear_cross_entropy, chunk_size=2), plain):
        with FlopCounterMode(display=False) as counter:
            loss = function(**case, reduction=reduction)
            found.append((loss.detach(), *torch.autograd.grad(loss.sum(), params)))
        totals.append(counter.get_total_flops())
        with Largest():
            function(**case, reduction=reduction).sum().backward()
        largest.append(-1)
    torch.testing.assert_close(*found)
    again = reduction == "none"  # the logits are computed once more
    assert totals[0] * 3 == totals[1] * (3 + again)
    ours, theirs = (max(part) for part in (largest[: largest.index(-1)], largest[largest.index(-1) + 1 : -1]))
    assert ours < theirs


def test_saved_tensors_moved_by_hooks(place: Place) -> None:
    """Copies come back; ``accumulate_grad`` still finds the parameter."""
    for accumulate_grad in (False, True):
        case = make(place, bias=True)
        params = leaves(case)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            loss = linear_cross_entropy(**case, chunk_size=4, accumulate_grad=accumulate_grad)
        loss.backward()
        expected = torch.autograd.grad(plain(**case), params)
        torch.testing.assert_close([param.grad for param in params], list(expected))


def test_the_weights_must_stay_until_the_backward_pass(place: Place) -> None:
    """As with torch's two functions autograd finds out, and no wrong gradient comes of it."""
    case = make(place)
    _, w = leaves(case)
    loss = linear_cross_entropy(**case)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tied_weights(place: Place, dtype: torch.dtype) -> None:
    """The head is the embedding: its gradient is the sum of both uses."""
    tokens = torch.randint(CLASSES, (2, 6), device=place.device)
    table = torch.randn(CLASSES, FEATURES, device=place.device).to(dtype)

    def loss_of(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda table: function(F.embedding(tokens, table).tanh(), table, tokens, shift=True)

    results = []
    for function, of in ((linear_cross_entropy, dtype), (plain, dtype), (plain, torch.float64)):
        leaf = table.to(of).clone().requires_grad_()
        loss = loss_of(function)(leaf)
        loss.backward()
        results.append({"loss": loss.detach(), "table": leaf.grad})
    assert_no_worse(*results)


def test_the_same_weights_twice_in_one_loss(place: Place) -> None:
    """Two heads' losses over one weight, weighted differently, one of them twice."""
    case, other = make(place, bias=True), make(place)
    x, w, b = leaves(case)
    other["linear_weight"] = w

    def total(function: Callable[..., Tensor]) -> Tensor:
        near = function(**case)
        far = function(**{**other, "input": x * 2}, reduction="none")
        return near + 0.3 * far.sum() + near * 0.5

    total(linear_cross_entropy).backward()
    expected = torch.autograd.grad(total(plain), (x, w, b))
    torch.testing.assert_close([x.grad, w.grad, b.grad], list(expected))


# ----------------------------------------------------------------------------- accumulation into .grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("before", ["none", "some"])
def test_accumulate_grad(place: Place, before: str, reduction: str) -> None:
    """Into the tensor that is there, over two micro-batches, with a scaled loss; the others' gradients are theirs."""
    case = make(place, bias=True, weighted=True)
    x, w, b = leaves(case)
    if before == "some":
        w.grad = torch.ones_like(w)
    memory = w.grad
    for scale in (0.5, 3.0):
        loss = linear_cross_entropy(**case, reduction=reduction, chunk_size=4, accumulate_grad=True)
        (loss.sum() * scale).backward()
        assert memory is None or w.grad is memory
        memory = w.grad
    expected = torch.autograd.grad(3.5 * plain(**case, reduction=reduction).sum(), (x, w, b))
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(w.grad, expected[1] + (before == "some"))
    torch.testing.assert_close(b.grad, expected[2])


@pytest.mark.slow(interpreted=True)
def test_accumulate_grad_in_float32(place: Place) -> None:
    """A 16-bit weight whose ``grad_dtype`` says so gathers many small gradients without losing them."""
    dtype, batches = short(place), 20
    case = make(place, 16, dtype=dtype)
    case["target"] = case["target"].abs() % CLASSES
    w = case["linear_weight"].requires_grad_()
    w.grad_dtype = torch.float32
    for _ in range(batches):
        linear_cross_entropy(**case, chunk_size=4, accumulate_grad=True).backward()
    assert w.grad.dtype == torch.float32
    exact = batches * run(plain, case, dtype=torch.float64)["linear_weight"]
    one = run(plain, case)["linear_weight"].double() * batches
    assert (w.grad - exact).norm() <= 1.1 * (one - exact).norm() + 1e-3 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("grad_dtype", [None, torch.float32], ids=str)
def test_accumulate_grad_where_the_dtype_is_free(place: Place, grad_dtype: torch.dtype | None) -> None:
    case = make(place, dtype=short(place))
    w = case["linear_weight"].requires_grad_()
    w.grad_dtype = grad_dtype
    w.grad = torch.zeros(w.shape, device=place.device)
    linear_cross_entropy(**case, chunk_size=4, accumulate_grad=True).backward()
    assert w.grad.dtype == torch.float32
    exact = run(plain, case, dtype=torch.float64)["linear_weight"]
    torch.testing.assert_close(w.grad.double(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


def test_accumulate_grad_holds_nothing_of_the_weights_size() -> None:
    case = make(Place("eager", CPU), 64, features=256, classes=2000)
    weight = case["linear_weight"].requires_grad_()
    weight.grad = torch.zeros_like(weight)
    with fastloss.use_backend("eager"):
        step = lambda: linear_cross_entropy(**case, chunk_size=8, accumulate_grad=True).backward()  # noqa: E731
        step()
        assert peak_bytes(step, CPU) < weight.nbytes / 4


def test_accumulate_grad_of_a_frozen_weight(place: Place) -> None:
    case = make(place)
    case["input"].requires_grad_()
    linear_cross_entropy(**case, accumulate_grad=True).backward()
    assert case["linear_weight"].grad is None
    torch.testing.assert_close(case["input"].grad, run(plain, case)["input"])


def test_accumulate_grad_by_autograd_grad(place: Place) -> None:
    """Whatever is asked for, the weight's gradient goes where it always does."""
    case = make(place)
    x, w = leaves(case)
    found = torch.autograd.grad(linear_cross_entropy(**case, accumulate_grad=True), (x, w), allow_unused=True)
    expected = torch.autograd.grad(plain(**case), (x, w))
    assert found[1] is None
    torch.testing.assert_close((found[0], w.grad), expected)


def test_accumulate_grad_in_another_layout(place: Place) -> None:
    """A transposed one is added to where it lies; a sparse one is refused, and left as it was."""
    case = make(place)
    _, w = leaves(case)
    w.grad = torch.ones(FEATURES, CLASSES, device=place.device).t()
    memory = w.grad
    linear_cross_entropy(**case, chunk_size=4, accumulate_grad=True).backward()
    assert w.grad is memory
    torch.testing.assert_close(memory, 1 + torch.autograd.grad(plain(**case), w)[0])
    w.grad = torch.ones(CLASSES, FEATURES, device=place.device).to_sparse()
    with pytest.raises(RuntimeError, match=r"linear_weight\.grad has layout torch\.sparse_coo"):
        linear_cross_entropy(**case, chunk_size=4, accumulate_grad=True).backward()
    assert bool((w.grad.to_dense() == 1).all())


def test_accumulate_grad_beside_a_second_derivative(place: Place) -> None:
    """With ``create_graph`` the gradient is autograd's to give."""
    case = small(place)
    x, w = leaves(case)
    first = torch.autograd.grad(linear_cross_entropy(**case, accumulate_grad=True), (x, w), create_graph=True)
    expected = torch.autograd.grad(plain(**case), (x, w), create_graph=True)
    assert w.grad is None
    torch.testing.assert_close(first, expected)
    sums = [sum(g.square().sum() for g in each) for each in (first, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(s, (x, w)) for s in sums))


# ----------------------------------------------------------------------------- logits in float32


def with_wide_logits(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The plain form: products of 16-bit numbers, which float32 holds exactly, and a float32 loss."""
    bias = options.pop("linear_bias")
    return plain(
        input.float(), linear_weight.float(), target, linear_bias=None if bias is None else bias.float(), **options
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_in_float32(place: Place, dtype: torch.dtype, soft: bool, bias: bool, reduction: str) -> None:
    """The loss's error is that of float32; the gradients' that of one rounding before the products, and one after."""
    if place.interpreted and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds bfloat16 by its own rules")
    case = make(place, dtype=dtype, bias=bias, soft=soft)
    how = {"logits_dtype": torch.float32, "chunk_size": 4}
    ours = run(linear_cross_entropy, case, 0.7, reduction=reduction, **how)
    exact = run(plain, case, 0.7, dtype=torch.float64, reduction=reduction)
    theirs = run(with_wide_logits, case, 0.7, reduction=reduction)
    assert ours["loss"].dtype == torch.float32
    assert_no_worse(ours, theirs, exact)
    rounded = run(linear_cross_entropy, case, 0.7, reduction=reduction, chunk_size=4)
    error, before = ((each["loss"].double() - exact["loss"]).abs().max() for each in (ours, rounded))
    assert error < before / 16


@pytest.mark.parametrize("function", ["statistics", "tokens"])
def test_other_functions_of_logits_in_float32(place: Place, function: str) -> None:
    """Log-probabilities as exact as float32's, where 16 bits would leave two digits."""
    case = make(place, dtype=torch.float16)
    case["target"].clamp_(min=0)
    x, w, t = (case[name] for name in ("input", "linear_weight", "target"))
    how: dict[str, Any] = {"logits_dtype": torch.float32, "chunk_size": 4}
    if function == "tokens":
        ours = fastloss.linear_token_loss(x, w, t, lambda log_p, _: -log_p, **how).log_probs
    else:
        ours = -fastloss.linear_cross_entropy_with_statistics(x, w, t, reduction="none", **how).loss
    exact = F.linear(x.double(), w.double()).log_softmax(-1).gather(1, t.unsqueeze(1)).squeeze(1)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_autocast_with_logits_in_float32(place: Place) -> None:
    low, case = short(place), make(place, bias=True)
    with torch.autocast(place.device.type, dtype=low):
        ours = run(linear_cross_entropy, case, logits_dtype=torch.float32, chunk_size=4)
    narrow = {name: t.to(low).float() if t is not None and t.is_floating_point() else t for name, t in case.items()}
    torch.testing.assert_close(ours["loss"], plain(**narrow))
    assert all(tensor.dtype == torch.float32 for tensor in ours.values())


def test_compiled_with_logits_in_float32(place: Place, fresh_compiler: None) -> None:
    case = make(place, 6, bias=True, dtype=torch.float16)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    ours = run(compiled, case, logits_dtype=torch.float32)
    assert_no_worse(ours, run(with_wide_logits, case), run(plain, case, dtype=torch.float64))


@pytest.mark.parametrize("value", [torch.bfloat16, "float32", 32])
def test_other_dtypes_of_logits_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"logits_dtype is .*; expected torch\.float32, or None"):
        linear_cross_entropy(**make(Place("eager", CPU)), logits_dtype=value)


# ----------------------------------------------------------------------------- autocast and loss scaling


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True])
def test_autocast(place: Place, soft: bool, reduction: str) -> None:
    """The products are of 16 bits, the loss float32, gradients in their parameters' dtypes; no worse than torch."""
    low = short(place)
    case = make(place, bias=True, soft=soft)

    def under(function: Callable[..., Tensor], **how: Any) -> Callable[..., Tensor]:
        def call(**arguments: Any) -> Tensor:
            with torch.autocast(place.device.type, dtype=low):
                return function(**arguments, **how)

        return call

    ours = run(under(linear_cross_entropy, chunk_size=4), case, 0.3, reduction=reduction)
    theirs = run(under(plain), case, 0.3, reduction=reduction)
    exact = run(plain, case, 0.3, dtype=torch.float64, reduction=reduction)
    assert all(tensor.dtype == torch.float32 for tensor in ours.values())
    # The logits' rounding errors are different ones in other products, on a GPU, and may cancel out among the rows: a
    # sum is held to the rows' errors together.
    rows_theirs, rows_exact = (
        run(function, case, dtype=of, reduction="none")["loss"].double()
        for function, of in ((under(plain), None), (plain, torch.float64))
    )
    together = (rows_theirs - rows_exact).abs().sum()
    if reduction != "sum":
        together = together / (len(rows_exact) if soft else (case["target"] >= 0).sum())
    assert_no_worse(ours, theirs, exact, of_loss=float(together) if reduction != "none" else 0.0)
    half = {name: t.to(low) if t is not None and t.is_floating_point() else t for name, t in case.items()}
    ours = run(under(linear_cross_entropy, chunk_size=4), half, 0.3, reduction=reduction)
    assert ours["loss"].dtype == torch.float32
    assert ours["input"].dtype == ours["linear_weight"].dtype == ours["linear_bias"].dtype == low


@pytest.mark.slow(interpreted=True)
def test_float16_with_a_loss_scale(place: Place) -> None:
    """A scale of 65536, which float16 can't hold, and gradients that it could not hold without: none is flushed."""
    case = make(place, 128, features=4, classes=2048)
    labels = case["target"] = torch.randint(16, (128,), device=place.device)

    def under(**arguments: Any) -> Tensor:
        with torch.autocast(place.device.type, dtype=torch.float16):
            return linear_cross_entropy(**arguments, chunk_size=64)

    ours, exact = run(under, case, 65536.0), run(plain, case, 65536.0, dtype=torch.float64)
    assert labels.max() < 16
    for name, rows in (("linear_weight", slice(16, None)), ("input", slice(None))):
        mine, right = ours[name][rows].double(), exact[name][rows]
        assert (mine - right).norm() <= 2e-3 * right.norm(), name


def test_float16_probabilities_with_a_loss_scale(place: Place) -> None:
    """Their gradient alone is of 16 bits, and waits for the scale too."""
    case = make(place, 64, soft=True)
    case["target"] = case["target"].half()
    ours, exact = run(linear_cross_entropy, case, 65536.0), run(plain, case, 65536.0, dtype=torch.float64)
    eps = torch.finfo(torch.float16).eps
    torch.testing.assert_close(ours["target"].double(), exact["target"], rtol=eps, atol=eps)


# ----------------------------------------------------------------------------- torch.compile


COMPILED: list[dict[str, Any]] = [
    {},
    {"reduction": "none"},
    {"dtype": torch.float16},
    {"soft": True},
    {"soft": True, "reduction": "none", "dtype": torch.float16},
    {"shift": 2, "reduction": "none", "softcap": 5.0},
    {"skip_ignored": True, "reduction": "none", "all_ignored": True},
    {"skip_ignored": True, "accumulate_grad": True},
    {"strided_weight": True, "label_smoothing": 0.1},
]


@pytest.mark.parametrize("kind", COMPILED, ids=str)
def test_through_the_compilers_autograd(place: Place, kind: dict[str, Any], fresh_compiler: None) -> None:
    """One graph, forward and backward, with this package's operator in it."""
    kind = dict(kind)
    case = make(place, 3, 5, bias=True, dtype=kind.pop("dtype", torch.float32), soft=kind.pop("soft", False))
    if kind.pop("all_ignored", False):
        case["target"].fill_(-100)
    if kind.pop("strided_weight", False):
        case["weight"] = torch.rand(CLASSES, 2, device=place.device)[:, 0]
    compare_compiled(case, backend="aot_eager", **kind)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", [{}, {"reduction": "none"}], ids=str)
def test_inductor(place: Place, kind: dict[str, Any], fresh_compiler: None) -> None:
    compare_compiled(make(place, 3, 5, bias=True), backend="inductor", **kind)


def compare_compiled(case: dict[str, Any], backend: str, **options: Any) -> None:
    uncompiled = {**options, "accumulate_grad": False}  # compilers do without

    def loss(**arguments: Any) -> Tensor:
        arguments["input"] = arguments["input"] * 2
        result = linear_cross_entropy_with_accuracy(**arguments, chunk_size=4, topk=(1, 3), **uncompiled)
        shares.append(result.accuracy)
        return result.loss

    shares: list[tuple[Tensor, ...]] = []
    upstream: Any = 0.7
    operator = torch.ops.fastloss.linear_cross_entropy.default
    found = []

    def spied(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(any(node.target is operator for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def returning_both(**arguments: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        arguments["input"] = arguments["input"] * 2
        return linear_cross_entropy_with_accuracy(**arguments, chunk_size=4, topk=(1, 3), **options)

    compiled = torch.compile(returning_both, fullgraph=True, backend=spied)

    def compiled_loss(**arguments: Any) -> Tensor:
        value, share = compiled(**arguments)
        shares.append(share)
        return value

    expected = run(loss, case, upstream)
    ours = run(compiled_loss, case, upstream)
    assert any(found)
    for name, tensor in ours.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.shape == expected[name].shape
        torch.testing.assert_close(tensor, expected[name])
    torch.testing.assert_close(*shares, equal_nan=True)


def test_compiled_without_gradients(place: Place, fresh_compiler: None) -> None:
    """No gradient is computed, and none is asked for."""
    case = make(place, 12, bias=True)
    leaves(case)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert products(lambda: compiled(**case, chunk_size=4, skip_ignored=False)) == 3
        torch.testing.assert_close(compiled(**case), plain(**case))


def test_compiled_for_any_number_of_rows(place: Place, fresh_compiler: None) -> None:
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True, backend=counted)
    for rows in (6, 9, 14):
        case = make(place, rows)
        torch.testing.assert_close(compiled(**case), plain(**case))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["ignore_index", "chunk_size"])
def test_two_graphs_serve_all_whole_numbers(fresh_compiler: None, name: str) -> None:
    """One for the first, and one for any."""
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    case = make(Place("eager", CPU))
    compiled = torch.compile(lambda number: linear_cross_entropy(**case, **{name: number}), backend=counted)
    for number in (7, 2, 3, 5, 11, 4):
        how = {name: number}
        if name == "ignore_index":
            case["target"] = case["target"].where(case["target"] >= 0, number)
        expected = plain(**case, **(how if name == "ignore_index" else {}))
        torch.testing.assert_close(compiled(number), expected)
    assert len(graphs) <= 2


def test_compiled_has_no_second_derivative(place: Place, fresh_compiler: None) -> None:
    case = make(place)
    x, _ = leaves(case)
    loss = torch.compile(linear_cross_entropy, fullgraph=True, backend="eager")(**case)
    with pytest.raises(RuntimeError, match=r"outside of torch\.compile with create_graph=True"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_compiled_label_out_of_range(fresh_compiler: None) -> None:
    case = make(Place("eager", CPU))
    case["target"][0] = CLASSES
    with pytest.raises(IndexError, match="out of bounds"):
        torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")(**case)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(place: Place, reduction: str, soft: bool) -> None:
    case = make(place, bias=True, soft=soft)
    leaves(case)
    tensors = [case[name] for name in ("input", "linear_weight", "target", "linear_bias", "weight")]
    needs = [True, True, True, soft]
    options = (-100, 0.0, reduction, 0.0, None, [1], True, torch.float32, torch.float32, 4, None, None, needs)
    torch.library.opcheck(
        torch.ops.fastloss.linear_cross_entropy.default,
        (*tensors, *options),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


# ----------------------------------------------------------------------------- the module


@torch_has_it
@pytest.mark.parametrize("out_features", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_state_dicts_are_exchanged_with_torch(
    place: Place, weighted: bool, bias: bool, out_features: tuple[int, ...]
) -> None:
    """Strictly, both ways, and the losses are the same then."""
    weight = torch.rand(7, device=place.device) if weighted else None
    arguments: dict[str, Any] = {"out_features": out_features, "bias": bias, "device": place.device}
    kinds = (LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss)
    x = torch.randn(6, 4, device=place.device)
    target = torch.randint(7, (6, *out_features), device=place.device)
    for source, sink in (kinds, kinds[::-1]):
        giver = source(4, 7, weight=weight, **arguments)
        taker = sink(4, 7, weight=None if weight is None else torch.ones_like(weight), **arguments)
        result = taker.load_state_dict(giver.state_dict(), strict=True)
        assert not result.missing_keys
        assert not result.unexpected_keys
        torch.testing.assert_close(taker(x, target), giver(x, target))


def test_the_module_is_kept_whole(place: Place) -> None:
    options: dict[str, Any] = {
        "reduction": "none",
        "ignore_index": 3,
        "label_smoothing": 0.1,
        "lse_square_scale": 0.01,
        "softcap": 5.0,
        "shift": True,
    }
    module = LinearCrossEntropyLoss(4, 7, bias=True, weight=torch.rand(7), **options, chunk_size=2).to(place.device)
    for option in (
        "num_classes=7",
        "reduction='none'",
        "ignore_index=3",
        "softcap=5.0",
        "shift=True",
        "chunk_size=2",
    ):
        assert option in repr(module)
    x, target = torch.randn(2, 5, 4, device=place.device), torch.randint(7, (2, 5), device=place.device)
    expected = linear_cross_entropy(
        x,
        module.linear.weight,
        target,
        linear_bias=module.linear.bias,
        weight=module.weight,
        **options,
    )
    for again in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(again) == repr(module)
        torch.testing.assert_close(again(x, target), expected)


def test_the_module_trains(place: Place) -> None:
    """Weight and bias get their gradients, and none of it is the class weights'."""
    module = LinearCrossEntropyLoss(4, 7, bias=True, weight=torch.rand(7)).to(place.device)
    x, target = torch.randn(5, 4, device=place.device), torch.randint(7, (5,), device=place.device)
    module(x, target).backward()
    names = [name for name, _ in module.named_parameters()]
    assert names == ["linear.weight", "linear.bias"]
    expected = torch.autograd.grad(
        F.cross_entropy(module.linear(x), target, module.weight), list(module.parameters())
    )
    torch.testing.assert_close([p.grad for p in module.parameters()], list(expected))


def test_what_the_module_refuses() -> None:
    with pytest.raises(TypeError, match="no argument 'chunks'; expected shift, chunk_size"):
        LinearCrossEntropyLoss(4, 7, chunks=3)
    with pytest.raises(RuntimeError, match=r"weight has shape \(6,\).*\(7,\)"):
        LinearCrossEntropyLoss(4, 7, weight=torch.ones(6))


@pytest.mark.parametrize("name", ["input", "linear_weight", "target", "linear_bias", "weight"])
def test_sparse_tensors_are_refused_by_name(name: str) -> None:
    given = {
        "input": torch.randn(4, 7),
        "linear_weight": torch.randn(5, 7),
        "target": torch.tensor([0, 1, 2, 3]),
        "linear_bias": torch.randn(5),
        "weight": torch.ones(5),
    }
    with pytest.raises(RuntimeError, match=f"{name} has layout torch.sparse_coo"):
        linear_cross_entropy(**given | {name: given[name].to_sparse()})


def test_labels_beside_no_classes(place: Place) -> None:
    x, t = torch.randn(2, 7, device=place.device), torch.tensor([-100, 1], device=place.device)
    with pytest.raises(IndexError, match=r"target\[1\] is 1, .* \[0, 0\)"):
        linear_cross_entropy(x, x.new_empty(0, 7), t)
