"""The K best classes, and divergences from a teacher, from hidden states, without the logits.

Everything is held against float64. bfloat16, which Triton's interpreter rounds by its own rules, is for the eager
backend alone there.
"""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastloss
from fastloss import linear_kl_div, linear_topk_log_probs
from fastloss.backends import choice
from fastloss.backends.contract import DivergenceInputs, DivergenceOptions, DivergenceRows, LossOptions
from fastloss.measuring.machine import peak_bytes

pytestmark = pytest.mark.backend_agnostic

CPU = torch.device("cpu")


def short(place: Place) -> torch.dtype:
    return torch.float16 if place.interpreted else torch.bfloat16


# ------------------------------------------------------------------------------------------------ the K best classes


def plain_log_probs(input: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = F.linear(input, weight, bias)
    return (z if softcap is None else softcap * torch.tanh(z / softcap)).log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, "16 bits"], ids=str)
@pytest.mark.parametrize("lead", [(), (11,), (2, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("k", [1, 5, 37])
@pytest.mark.parametrize("how", [{}, {"chunk_size": 4}, {"softcap": 2.0, "chunk_size": 3}], ids=str)
def test_best_classes(place: Place, how: dict[str, Any], k: int, lead: tuple[int, ...], dtype: Any) -> None:
    """Against float64, with logits that have no ties: those of 16 bits are small numbers, exact in every dtype."""
    dtype, exact = (short(place), True) if dtype == "16 bits" else (dtype, False)
    # The logits of a row are a permutation of 0 … 36, over 4: any product of 16 bits has them exactly.
    order = torch.rand(max(1, *lead, 1) * 12, 37).argsort(1)[: torch.Size(lead).numel()].view(*lead, 37)
    input = (order if exact else torch.randn(*lead, 6)).to(place.device, dtype)
    weight = (torch.eye(37) / 4 if exact else torch.randn(37, 6)).to(place.device, dtype)
    bias = (torch.zeros(37) if exact else torch.randn(37)).to(place.device, dtype)
    found = linear_topk_log_probs(input, weight, k, linear_bias=bias, **how)
    right = plain_log_probs(input.double(), weight.double(), bias.double(), how.get("softcap")).topk(k)
    assert found.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.ids.dtype == torch.int64
    assert found.ids.tolist() == right.indices.tolist()
    limit = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(found.log_probs.double(), right.values, rtol=limit, atol=limit)


def test_best_classes_of_equal_logits(place: Place) -> None:
    """The lower class comes first; a class that is masked comes last, and a row that has none is NaN."""
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, 3.0], [-torch.inf] * 5, [0.0, torch.nan, 2.0, 1.0, 0.0]])
    bias = logits.to(place.device)
    rows = [
        linear_topk_log_probs(
            torch.zeros(1, 2, device=place.device), torch.zeros(5, 2, device=place.device), 5, linear_bias=each
        )
        for each in bias
    ]
    assert rows[0].ids.tolist() == [[1, 2, 4, 0, 3]]
    torch.testing.assert_close(rows[0].log_probs[0], logits[0].log_softmax(0)[rows[0].ids[0].cpu()].to(place.device))
    assert rows[1].log_probs.isnan().all()
    assert rows[2].log_probs.isnan().all()
    assert rows[2].ids[0, 0] == 1
    assert rows[2].ids[0, 3:].tolist() == [0, 4]


def test_best_classes_have_no_gradient(place: Place) -> None:
    weight = torch.randn(7, 3, device=place.device, requires_grad=True)
    assert not linear_topk_log_probs(torch.randn(4, 3, device=place.device), weight, 2).log_probs.requires_grad


def test_best_classes_under_transforms_autocast_and_compilers(place: Place, fresh_compiler: None) -> None:
    input, weight = torch.randn(5, 4, 6, device=place.device), torch.randn(19, 6, device=place.device)

    def call(x: Tensor) -> Any:
        return linear_topk_log_probs(x, weight, 3, softcap=3.0, chunk_size=3)

    right = call(input)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(input)
    mapped = torch.func.vmap(call)(input)
    for found in (compiled, mapped):
        assert torch.equal(found.ids, right.ids)
        torch.testing.assert_close(found.log_probs, right.log_probs)
    with torch.autocast(place.device.type, dtype=torch.bfloat16):
        found = call(input)
    assert found.log_probs.dtype == torch.float32
    torch.testing.assert_close(found.log_probs, right.log_probs, rtol=0.05, atol=0.05)


def test_memory_of_the_best_classes() -> None:
    """One chunk of logits, and what the backend and torch.topk take for it."""
    input, weight = torch.randn(512, 16), torch.randn(8192, 16)
    with fastloss.use_backend("eager"):
        step = lambda: linear_topk_log_probs(input, weight, 8, chunk_size=64)  # noqa: E731
        step()
        peak = peak_bytes(step, CPU)
    assert peak <= 1.2 * 64 * 8192 * 4 + 512 * 8 * 12 * 3


ones = torch.ones
BAD_TOPK: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "k=8": ({"k": 8}, ValueError, "k is 8, and linear_weight has 7 classes; expected 1 to 7"),
    "k=0": ({"k": 0}, ValueError, "k is 0; expected at least 1 class"),
    "k=True": ({"k": True}, TypeError, "k is True; expected a number of classes"),
    "k=2.0": ({"k": 2.0}, TypeError, "k is 2.0; expected a number of classes"),
    "features": ({"linear_weight": ones(7, 2)}, RuntimeError, r"input \(4, 3\), linear_weight \(7, 2\); expected"),
    "K dimensions": ({"linear_weight": ones(7, 2, 3)}, RuntimeError, r"expected a linear_weight of shape \(C, D\)"),
    "a list": ({"linear_weight": [1.0]}, TypeError, "linear_weight must be a Tensor, got list"),
    "bias": ({"linear_bias": ones(6)}, RuntimeError, r"linear_bias \(6,\); expected .* \(7,\)"),
    "bias a number": ({"linear_bias": 1.0}, TypeError, "linear_bias must be a Tensor or None, got float"),
    "dtype": ({"linear_weight": ones(7, 3).double()}, RuntimeError, "linear_weight has dtype torch.float64"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
    "both": ({"chunk_size": 2, "memory_budget": 10}, ValueError, "expected one of them"),
    "budget": ({"memory_budget": 10}, ValueError, "the least that would do is"),
}


@pytest.mark.parametrize("name", BAD_TOPK)
def test_best_classes_bad_input(name: str) -> None:
    changed, kind, words = BAD_TOPK[name]
    with pytest.raises(kind, match=words):
        linear_topk_log_probs(**{"input": ones(4, 3), "linear_weight": ones(7, 3), "k": 2, **changed})


# ----------------------------------------------------------------------------------------- divergences from a teacher

STUDENT, TEACHER = ("input", "linear_weight", "linear_bias"), ("teacher_input", "teacher_linear_weight")
BETAS = [0.0, 0.3, 1.0]
EVERYTHING = {"temperature": 2.0, "softcap": 3.0, "teacher_softcap": 2.0}
SCALED = {"temperature": 0.7, "logit_scale": 0.3, "teacher_logit_scale": 2.5}
OPTIONS = [{}, EVERYTHING, {**SCALED, "shift": 2}, {**EVERYTHING, **SCALED}, {"teacher_softcap": 2.0, **SCALED}]


def make(
    place: Place, *lead: int, dtype: torch.dtype = torch.float32, bias: bool = True, classes: int = 37
) -> dict[str, Any]:
    """The tensors of a call. The teacher has fewer features, and a third of the rows is ignored."""
    lead, on = lead or (11,), place.device
    target = torch.randint(classes, lead, device=on)
    target[torch.rand(lead, device=on) < 1 / 3] = -100
    case = {
        "input": torch.randn(*lead, 5),
        "linear_weight": torch.randn(classes, 5),
        "linear_bias": torch.randn(classes) if bias else None,
        "teacher_input": torch.randn(*lead, 3),
        "teacher_linear_weight": torch.randn(classes, 3),
        "teacher_linear_bias": torch.randn(classes) if bias else None,
    }
    return {name: None if each is None else each.to(on, dtype) for name, each in case.items()} | {"target": target}


def plain(
    input: Tensor, linear_weight: Tensor, teacher_input: Tensor, teacher_linear_weight: Tensor, **options: Any
) -> Tensor:
    """The same in torch's own operators, as trainers have it: the logits of both sides whole, in ``F.kl_div``."""
    beta, target, reduction = options.get("beta", 0.0), options.get("target"), options.get("reduction", "mean")
    shift, sides = int(options.get("shift", 0)), []
    if shift:
        input, teacher_input = input[..., :-shift, :], teacher_input[..., :-shift, :]
        target = None if target is None else target[..., shift:]
    for of, x, w in (("", input, linear_weight), ("teacher_", teacher_input, teacher_linear_weight)):
        z = F.linear(x, w, options.get(f"{of}linear_bias"))
        scales = options.get(f"{of}logit_scale", 1.0), options.get("temperature", 1.0)
        z = reference.logits_of(z, options.get(f"{of}softcap"), *map(float, scales))
        sides.append(z.log_softmax(-1))
    log_s, log_t = sides
    if beta in (0, 1):
        rows = F.kl_div(*((log_s, log_t) if beta == 0 else (log_t, log_s)), reduction="none", log_target=True).sum(-1)
    else:
        shares = torch.tensor([beta, 1 - beta], dtype=log_s.dtype, device=log_s.device).log()
        log_m = torch.logaddexp(log_t + shares[0], log_s + shares[1])
        of_t, of_s = (F.kl_div(log_m, each, reduction="none", log_target=True).sum(-1) for each in (log_t, log_s))
        rows = beta * of_t + (1 - beta) * of_s
    counted = torch.ones_like(rows, dtype=torch.bool) if target is None else target != -100
    rows = torch.where(counted, rows, 0.0)
    return rows if reduction == "none" else rows.sum() / (counted.sum() if reduction == "mean" else 1)


def run(
    function: Any,
    case: dict[str, Any],
    upstream: Tensor | float = 1.0,
    trained: tuple[str, ...] = STUDENT,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The loss and the gradients of those that are trained, by name."""
    tensors, leaves = dict(case), {}
    for name, tensor in tensors.items():
        if tensor is None or not tensor.is_floating_point():
            continue
        tensors[name] = tensor.detach().to(dtype or tensor.dtype)
        if name in trained:
            leaves[name] = tensors[name] = tensors[name].clone().requires_grad_()
    loss = function(**tensors, **options)
    upstream = torch.as_tensor(upstream, device=loss.device).to(loss.dtype).expand_as(loss)
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream) if leaves else ()
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(case: dict[str, Any], upstream: Tensor | float = 1.0, how: Any = None, **options: Any) -> dict[str, Tensor]:
    ours = run(linear_kl_div, case, upstream, **options, **(how or {}))
    theirs = run(plain, case, upstream, **options)
    exact = run(plain, case, upstream, dtype=torch.float64, **options)
    for name, tensor in ours.items():
        # At most twice the plain form's error, and some units of the terms that a gradient is made of: those of
        # the divergence, times the head's.
        error = float((theirs[name].double() - exact[name]).abs().nan_to_num().max()) if tensor.numel() else 0.0
        terms = float(exact["loss"].nan_to_num().max()) * float(case["linear_weight"].abs().max()) if error else 0.0
        cancelled = 0.0 if tensor.dtype == torch.float64 else error + max(2e-6, 4 * 2**-23 * terms)
        reference.assert_no_worse(tensor, theirs[name], exact[name].double(), name, 4.0, cancelled)
    return ours


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "options",
    [{}, EVERYTHING, {**SCALED, "shift": 2}, {**EVERYTHING, **SCALED}, {"teacher_softcap": 2.0, **SCALED}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, "16 bits"], ids=str)
@pytest.mark.parametrize("ignored", [False, True])
def test_divergence(
    place: Place, ignored: bool, dtype: Any, options: dict[str, Any], beta: float, reduction: str
) -> None:
    """Loss and all gradients, over chunks that do not divide the rows, with an upstream gradient that is not 1."""
    case = make(place, 2, 7, dtype=short(place) if dtype == "16 bits" else dtype)
    if not ignored:
        case["target"] = None
    rows = (2, 7 - options.get("shift", 0))
    upstream = torch.rand(rows if reduction == "none" else (), device=place.device) + 0.5
    check(case, upstream, {"chunk_size": 4}, beta=beta, reduction=reduction, **options)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_scales_of_a_divergence_in_tensors(place: Place, beta: float, softcap: float | None) -> None:
    """Of any dtype; each is read when the call is made, and the backward pass refuses others."""
    case, on = make(place), place.device
    numbers = {"temperature": 0.5, "logit_scale": 0.25, "teacher_logit_scale": 3.0}
    dtypes = torch.float32, torch.bfloat16, torch.float64
    tensors = {n: torch.tensor(v, dtype=d, device=on) for (n, v), d in zip(numbers.items(), dtypes, strict=True)}
    how = {"beta": beta, "softcap": softcap, "chunk_size": 4}
    for reduction in ("mean", "none"):
        ours, expected = (
            run(linear_kl_div, case, **how, **given, reduction=reduction) for given in (tensors, numbers)
        )
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    case["input"].requires_grad_()
    for name in tensors:
        loss = linear_kl_div(**case, **how, **tensors, reduction="none").sum()
        tensors[name].mul_(2)
        with pytest.raises(RuntimeError, match=r"by an inplace operation|was written to before the backward"):
            loss.backward()


@pytest.mark.parametrize("beta", BETAS)
def test_a_divergence_of_logits_in_float32(place: Place, beta: float) -> None:
    """Products of 16 bits are not rounded to 16 bits; the loss is float32."""
    case = make(place, dtype=short(place))
    ours = run(linear_kl_div, case, beta=beta, logits_dtype=torch.float32, chunk_size=4)
    exact = run(plain, case, beta=beta, dtype=torch.float64)
    assert ours["loss"].dtype == torch.float32
    torch.testing.assert_close(ours["loss"].double(), exact["loss"], rtol=1e-5, atol=1e-5)
    for name in ("input", "linear_weight"):
        assert (ours[name].double() - exact[name]).norm() <= 0.01 * exact[name].norm()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("classes", [1, 2, 4097, 12001])
def test_divergence_of_other_numbers_of_classes(place: Place, classes: int, beta: float) -> None:
    check(make(place, 3, classes=classes, bias=False), beta=beta)


@pytest.mark.parametrize("trained", [("input",), ("linear_weight",), ("linear_bias",), ("input", "linear_bias"), ()])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_parts_of_a_divergence(place: Place, reduction: str, trained: tuple[str, ...]) -> None:
    """The others' gradients are those that all have; the teacher has none, whatever it requires."""
    case, how = make(place), {"beta": 0.5, "chunk_size": 4, "reduction": reduction}
    whole, part = run(linear_kl_div, case, **how), run(linear_kl_div, case, trained=trained, **how)
    for name, tensor in part.items():
        torch.testing.assert_close(tensor, whole[name], msg=name)
    case = {name: each.requires_grad_() if name in TEACHER else each for name, each in case.items()}
    assert not linear_kl_div(**case, **how).requires_grad


def test_ignored_rows_of_a_divergence_may_hold_anything(place: Place) -> None:
    """Neither the student's rows nor the teacher's reach the loss or a gradient."""
    for reduction in ("mean", "none"):
        for how in ({"skip_ignored": False}, {"skip_ignored": True}):
            case = make(place)
            expected = run(linear_kl_div, case, beta=0.3, reduction=reduction, chunk_size=4, **how)
            case["input"][case["target"] < 0] = torch.nan
            case["teacher_input"][case["target"] < 0] = torch.inf
            found = run(linear_kl_div, case, beta=0.3, reduction=reduction, chunk_size=4, **how)
            for name, tensor in found.items():
                torch.testing.assert_close(tensor, expected[name], msg=name)
    x = case["input"].requires_grad_()
    (gradient,) = torch.autograd.grad(linear_kl_div(**case, beta=0.3), x, create_graph=True)
    (expected,) = torch.autograd.grad(linear_kl_div(**case, beta=0.3), x)
    torch.testing.assert_close(gradient.detach(), expected)
    w = case.pop("linear_weight")
    of_func = torch.func.grad(lambda w: linear_kl_div(linear_weight=w, **case, beta=0.3))(w)
    assert of_func.isfinite().all()
    case["linear_weight"] = w
    case["target"].fill_(-100)
    assert linear_kl_div(**case).isnan()
    assert linear_kl_div(**case, reduction="sum") == 0


def test_divergence_of_empty_inputs(place: Place) -> None:
    assert linear_kl_div(**make(place, 3, 0)).isnan()
    assert linear_kl_div(**make(place, 3, 4), shift=4, reduction="none").shape == (3, 0)
    assert linear_kl_div(**make(place, 3, 4), shift=5).isnan()
    case = make(place)
    row = {name: each[0] if name in ("input", "teacher_input") else each for name, each in case.items()}
    row["target"] = None
    assert linear_kl_div(**row).shape == ()


@pytest.mark.parametrize("beta", BETAS)
def test_classes_without_probability(place: Place, beta: float) -> None:
    """0 · log 0 is 0; a class that one side alone has makes KL infinite in one direction, and not the mixture."""
    inf, on = torch.inf, place.device
    s = torch.tensor([[1.0, 2.0, -inf, 0.5], [1.0, 2.0, -inf, 0.5], [1.0, 2.0, 0.0, 0.5]], device=on)
    t = torch.tensor([[0.3, -1.0, -inf, 2.0], [0.3, -1.0, 1.0, 2.0], [0.3, -1.0, -inf, 2.0]], device=on)
    found, gradients = [], []
    for bias, of_teacher in zip(s, t, strict=True):
        zero, b = torch.zeros(1, 2, device=on), bias.clone().requires_grad_()
        head = torch.zeros(4, 2, device=on)
        loss = linear_kl_div(zero, head, zero, head, linear_bias=b, teacher_linear_bias=of_teacher, beta=beta)
        found.append(loss.item())
        gradients.append(torch.autograd.grad(loss, b)[0])
    p, q = (each[0, [0, 1, 3]].double().softmax(0).cpu() for each in (s, t))
    m = beta * q + (1 - beta) * p
    both = {0.0: q @ (q / p).log(), 1.0: p @ (p / q).log()}.get(
        beta, beta * q @ (q / m).log() + (1 - beta) * p @ (p / m).log()
    )
    torch.testing.assert_close(found[0], both.item(), rtol=1e-5, atol=1e-6)
    assert found[1] == inf if beta == 0 else found[1] < inf
    assert found[2] == inf if beta == 1 else found[2] < inf
    for gradient in gradients[: 3 if beta < 1 else 2]:
        assert gradient.isfinite().all()
        assert abs(gradient.sum()) < 1e-6
    assert gradients[0][2] == 0


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_equal_sides_and_great_logits(place: Place, beta: float) -> None:
    """A teacher that is the student: 0, and no gradient. Logits of 1e5 on either side overflow nothing."""
    case = make(place, dtype=torch.float64)
    same = {name: case[name.removeprefix("teacher_")] for name in (*TEACHER, "teacher_linear_bias")}
    for name, tensor in run(linear_kl_div, case | same, beta=beta).items():
        assert float(tensor.abs().max()) < 1e-14, name
    case = make(place)
    for name in ("input", "teacher_input"):
        case[name] = case[name] * 1e5
    ours, exact = (run(f, case, dtype=d, beta=beta) for f, d in ((linear_kl_div, None), (plain, torch.float64)))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), exact[name], rtol=1e-2, atol=1e-2, msg=name)


def test_divergence_accumulates_into_the_weights_gradient(place: Place) -> None:
    case = make(place)
    expected = run(linear_kl_div, case, 0.5, beta=0.3)
    case["linear_weight"].requires_grad_()
    for _ in range(2):
        linear_kl_div(**case, beta=0.3, chunk_size=4, accumulate_grad=True).backward(torch.tensor(0.5))
    torch.testing.assert_close(case["linear_weight"].grad, 2 * expected["linear_weight"])
    case["linear_weight"] = case["linear_weight"] * 1
    with pytest.raises(RuntimeError, match="not a leaf"):
        linear_kl_div(**case, accumulate_grad=True)


@pytest.mark.parametrize("beta", BETAS)
def test_derivatives_of_a_divergence(place: Place, beta: float) -> None:
    """By numbers, of both orders; twice from one graph."""
    case = make(place, 2, dtype=torch.float64, classes=4)
    tensors = [case[name].requires_grad_() for name in STUDENT]

    def call(*student: Tensor) -> Tensor:
        given = case | dict(zip(STUDENT, student, strict=True))
        return linear_kl_div(**given, beta=beta, temperature=1.5, softcap=4.0, chunk_size=1)

    assert torch.autograd.gradcheck(call, tensors, fast_mode=place.interpreted)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=place.interpreted)
    loss = call(*tensors)
    first = torch.autograd.grad(loss, tensors, torch.tensor(2.0, dtype=torch.float64), retain_graph=True)
    second = torch.autograd.grad(loss, tensors)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, 2 * other)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_divergence_under_compilers_checkpoints_and_transforms(
    place: Place, reduction: str, fresh_compiler: None
) -> None:
    case = make(place)
    how = {"beta": 0.3, "reduction": reduction, "chunk_size": 4}
    right = run(linear_kl_div, case, **how)

    def compiled(**call: Any) -> Tensor:  # a graph break
        return torch.compile(lambda: linear_kl_div(**call) * 1.0, backend="aot_eager")()

    def checkpointed(**call: Any) -> Tensor:
        body = lambda x: linear_kl_div(**call | {"input": x.clone()})  # noqa: E731
        return checkpoint(body, call["input"], use_reentrant=False)

    for function in (compiled, checkpointed):
        for name, tensor in run(function, case, **how).items():
            torch.testing.assert_close(tensor, right[name], msg=name)
    pair = torch.stack([case["input"], case["input"] * 2])
    found = torch.func.vmap(lambda x: linear_kl_div(**case | {"input": x}, **how))(pair)
    torch.testing.assert_close(found[0], right["loss"])


def test_divergence_under_autocast(place: Place) -> None:
    """The products are in 16 bits, the loss in float32, and each gradient in its tensor's dtype."""
    case, dtype = make(place, 40), short(place)
    narrow = {name: each.to(dtype) if torch.is_floating_point(each) else each for name, each in case.items()}
    exact = run(plain, narrow, dtype=torch.float64, beta=0.3)
    with torch.autocast(place.device.type, dtype=dtype):
        found = run(linear_kl_div, case, beta=0.3, chunk_size=16)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        scale = float(exact[name].abs().max())
        torch.testing.assert_close(tensor.double(), exact[name], rtol=0, atol=scale * 64 * torch.finfo(dtype).eps)


def test_a_teacher_of_another_dtype(place: Place) -> None:
    """The student's products are in its own dtype, the arithmetic in the wider one."""
    case = make(place)
    wide = case | {name: case[name].double() for name in (*TEACHER, "teacher_linear_bias")}
    found = run(linear_kl_div, wide | {}, beta=0.3)
    assert found["loss"].dtype == torch.float32
    for name, tensor in run(linear_kl_div, case, beta=0.3).items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_a_teacher_that_is_written_to(place: Place) -> None:
    """The backward pass that needs its logits again says so."""
    case = make(place)
    case["input"].requires_grad_()
    loss = linear_kl_div(**case, reduction="none")
    case["teacher_input"].add_(1)
    with pytest.raises(RuntimeError, match="teacher was written to before the backward pass"):
        loss.sum().backward()
    with torch.inference_mode():
        teacher = {name: case[name].clone() for name in TEACHER}
    linear_kl_div(**case | teacher, reduction="none").sum().backward()


def test_memory_of_a_divergence() -> None:
    """A chunk of logits of either side, and the few megabytes of the backend's pieces."""
    case = make(Place("eager", CPU), 512, classes=8192, bias=False)
    case["linear_weight"].requires_grad_()
    chunk, budget = 64, 3 * 64 * 8192 * 4 + (1 << 20)
    with fastloss.use_backend("eager"):
        for how in ({"chunk_size": chunk}, {"memory_budget": budget}):
            step = lambda how=how: linear_kl_div(**case, beta=0.3, **how).backward()  # noqa: E731
            step()
            case["linear_weight"].grad = None
            peak = peak_bytes(step, CPU)
            # The pieces of the backend: at most 2²⁰ numbers in each of some ten buffers.
            assert peak <= (2 * chunk * 8192 * 4 if "chunk_size" in how else budget) + (12 << 22)
        with pytest.raises(ValueError, match="the least that would do is"):
            linear_kl_div(**case, memory_budget=8192 * 7)


@pytest.mark.parametrize("scale", [0.3, 1.0, 12.0])
@pytest.mark.parametrize("beta", [1e-30, 1e-6, 0.5, 1 - 1e-6])
def test_divergences_near_an_end(place: Place, beta: float, scale: float) -> None:
    """The mixture is nearly one side; each divergence is exact to its own size, however small; none is negative."""
    case = make(place, 40)
    del case["target"]
    options = {"beta": beta, "logit_scale": scale, "teacher_logit_scale": scale, "reduction": "none"}
    ours = run(linear_kl_div, case, **options)
    wide = {name: tensor.double() for name, tensor in case.items()}
    log_s, log_t = (
        (scale * F.linear(*(wide[f"{of}{name}"] for name in ("input", "linear_weight", "linear_bias")))).log_softmax(
            1
        )
        for of in ("", "teacher_")
    )
    if beta <= 0.5:
        r = -torch.log1p(beta * torch.expm1(log_t - log_s))
        u = log_t - log_s + r
    else:
        u = -torch.log1p((1 - beta) * torch.expm1(log_s - log_t))
        r = log_s - log_t + u
    loss, level = beta * (log_t.exp() * u).sum(1) + (1 - beta) * (log_s.exp() * r).sum(1), (log_s.exp() * r).sum(1)
    g = scale * (1 - beta) * log_s.exp() * (r - level.unsqueeze(1))
    assert (ours["loss"] >= 0).all()
    torch.testing.assert_close(ours["loss"].double(), loss, rtol=3e-5 * max(1.0, scale), atol=0)
    exact = {"input": g @ wide["linear_weight"], "linear_weight": g.t() @ wide["input"], "linear_bias": g.sum(0)}
    for name, gradient in exact.items():
        assert ours[name].isfinite().all(), name
        if scale <= 1:  # beyond, a row whose best class has nearly all is a small difference of numbers near 1
            assert (ours[name].double() - gradient).norm() <= 1e-4 * gradient.norm(), name


BAD_DIVERGENCES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "beta": ({"beta": 1.5}, ValueError, "beta is 1.5; expected a number from 0"),
    "beta's type": ({"beta": "1"}, TypeError, "beta is '1'; expected a number"),
    "no temperature": ({"temperature": 0}, ValueError, "temperature is 0; expected a positive finite number"),
    "temperature": ({"temperature": -1.0}, ValueError, "temperature is -1.0; expected a positive"),
    "a temperature past float32": ({"temperature": 1e10}, ValueError, "temperature is 10000000000.0; expected a pos"),
    "a switch": ({"temperature": True}, TypeError, "temperature is True; expected a number"),
    "a trained temperature": (
        {"temperature": torch.ones((), requires_grad=True)},
        RuntimeError,
        "temperature requires grad, and the loss",
    ),
    "teacher_logit_scale": ({"teacher_logit_scale": 0.0}, ValueError, "teacher_logit_scale is 0.0; expected a pos"),
    "a trained beta": ({"beta": torch.ones(())}, TypeError, "beta is a tensor, and there is no gradient to it"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    "teacher_softcap": ({"teacher_softcap": 0}, ValueError, "teacher_softcap is 0; expected a positive"),
    "reduction": ({"reduction": "batchmean"}, ValueError, "'batchmean' is not a valid value for reduction"),
    "vocabularies": (
        {"teacher_linear_weight": ones(8, 2)},
        ValueError,
        "linear_weight has 7 classes and teacher_linear_weight 8",
    ),
    "rows": ({"teacher_input": ones(5, 2)}, ValueError, r"input \(4, 3\).* teacher_input \(5, 2\)"),
    "features": ({"teacher_input": ones(4, 3)}, RuntimeError, r"expected teacher_input .* teacher_linear_weight"),
    "teacher's bias": ({"teacher_linear_bias": ones(6)}, RuntimeError, r"a teacher_linear_bias of shape \(7,\)"),
    "teacher's dtype": (
        {"teacher_linear_weight": ones(7, 2).double()},
        RuntimeError,
        "teacher_linear_weight has dtype torch.float64; expected torch.float32, as teacher_input has",
    ),
    "integers": ({"teacher_input": ones(4, 2).long()}, NotImplementedError, "teacher_input has dtype torch.int64"),
    "a list": ({"teacher_input": [1.0]}, TypeError, "teacher_input must be a Tensor, got list"),
    "K dimensions": ({"linear_weight": ones(7, 2, 3)}, RuntimeError, r"a linear_weight of shape \(C, D\)"),
    "target": ({"target": ones(3).long()}, ValueError, r"expected labels of shape \(4,\)"),
    "a mask": ({"target": ones(4).bool()}, ValueError, "target is torch.bool; expected labels"),
    "shift of a row": (
        {"shift": 1, "input": ones(3), "teacher_input": ones(2)},
        ValueError,
        r"shift=1; .* expected an input of shape \(..., T, D\)",
    ),
    "device": ({"teacher_input": ones(4, 2, device="meta")}, RuntimeError, "teacher_linear_weight is on cpu"),
}


@pytest.mark.parametrize("name", BAD_DIVERGENCES)
def test_divergence_bad_input(name: str) -> None:
    changed, kind, words = BAD_DIVERGENCES[name]
    case = {
        "input": ones(4, 3),
        "linear_weight": ones(7, 3),
        "teacher_input": ones(4, 2),
        "teacher_linear_weight": ones(7, 2),
    }
    with pytest.raises(kind, match=words):
        linear_kl_div(**case | changed)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", [(5, 37, 1), (2, 33, 3)], ids=str)
def test_parts_of_the_classes(place: Place, shape: tuple[int, ...], beta: float) -> None:
    """The backend's numbers of two shards add up to those of the whole, and so does the gradient."""
    backend, options = (
        choice.load(place.name),
        DivergenceOptions(beta, LossOptions(softcap=4.0, temperature=1.5), LossOptions(temperature=1.5)),
    )
    x, y = (torch.randn(shape, device=place.device) * 3 for _ in range(2))
    upstream = torch.rand(shape[0] * shape[2], dtype=torch.float64, device=place.device)
    gradient = x.clone()
    whole = backend.kl_div(DivergenceInputs(gradient, y, upstream, options))
    shards = [(x[:, :20].clone(), y[:, :20]), (x[:, 20:].clone(), y[:, 20:])]
    lses = [backend.kl_div(DivergenceInputs(*shard, None, options), lse_only=True) for shard in shards]
    known = DivergenceRows(*(torch.stack([lse[i] for lse in lses]).logsumexp(0) for i in range(2)))
    sums = [backend.kl_div(DivergenceInputs(*shard, None, options), known) for shard in shards]
    known = DivergenceRows(*known[:2], *(sum(each[i] for each in sums) for i in (2, 3)))
    for shard in shards:
        backend.kl_div(DivergenceInputs(*shard, upstream, options), known)
    torch.testing.assert_close(known.loss, whole.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([shard[0] for shard in shards], 1), gradient, rtol=1e-4, atol=1e-6)
