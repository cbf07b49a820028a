"""A differential fuzzer: random calls of the losses, each held against float64 and against torch in the same dtype.

A case draws the dtype of the labels, the ignored index, the layout of the logits, the options and the size. The
errors of the value and the derivatives may be those of the plain form in the same dtype, and a few units in the last
place more. ``pytest --examples N`` draws N cases a test. ``test_properties.py`` draws infinities, NaN and ties.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from places import Place
from torch import Tensor

from fastloss import checks, cross_entropy, cross_entropy_with_statistics, linear_cross_entropy

# torch's default, the label that it is in 8 bits, masks' usual one, a class, and one that int64 alone holds.
IGNORED = (-100, 156, 255, 1, -(2**63))
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dtypes_of(name: str, place: Place | None = None) -> tuple[torch.dtype, ...]:
    """The dtypes that a function is drawn in."""
    left_out = set()
    if name == "probabilities":  # small ones are 0 in float16
        left_out.add(torch.float16)
    if place is not None and place.interpreted:  # the interpreter rounds bfloat16 by its own rules
        left_out.add(torch.bfloat16)
    return tuple(dtype for dtype in FLOATS if dtype not in left_out)


def drawn(examples: int) -> settings:
    return settings(
        max_examples=max(1, examples),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
        phases=(Phase.generate,),  # a case is small as it is, and a smaller one says no more
        report_multiple_bugs=False,
    )


# ------------------------------------------------------------------------------------------------------ the cases


@st.composite
def layouts(draw: st.DrawFn, values: Tensor) -> Tensor:
    """The same numbers, somewhere in memory; or, expanded, the first row's numbers in every row."""
    layouts = ["contiguous", "class last", "sliced", "expanded", "odd address"]
    layout = draw(st.sampled_from(layouts))
    if layout == "class last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        wider = torch.zeros((2 * values.shape[0], values.shape[1] + 3, *values.shape[2:]), dtype=values.dtype)
        wider[::2, 1 : values.shape[1] + 1] = values
        return wider[::2, 1 : values.shape[1] + 1]
    if layout == "expanded":
        return values[:1].expand_as(values)
    if layout == "odd address":
        memory = torch.zeros(values.numel() + 1, dtype=values.dtype)
        memory[1:] = values.reshape(-1)
        return memory[1:].view(values.shape)
    return values


@st.composite
def cases(draw: st.DrawFn, *, dtypes: tuple[torch.dtype, ...] = FLOATS, large: bool = False) -> dict[str, Any]:
    """One call. ``large``: more logits than torch's own operator is given on a CPU."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    classes = draw(st.sampled_from([13, 300, 1031] if large else [2, 5, 33, 70, 260]))
    extra = draw(st.sampled_from([(), (3,), (2, 2)]))
    rows = draw(st.integers(1, 7))
    if large:
        rows = -(-(2**18 + 1) // (classes * torch.Size(extra).numel()))
    dtype = draw(st.sampled_from(dtypes))
    scale = draw(st.sampled_from([0.5, 4.0]))
    logits = (scale * torch.randn((rows, classes, *extra), generator=generator, dtype=torch.float64)).to(dtype)
    labels_of = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8, None, None]))
    ignored = draw(st.sampled_from(IGNORED))
    if labels_of is None:  # class probabilities
        target = torch.rand(logits.shape, generator=generator, dtype=torch.float64).softmax(1)
        if draw(st.booleans()):  # mixtures of one, two or three classes
            picks = torch.randint(classes, (draw(st.integers(1, 3)), rows, *extra), generator=generator)
            target = F.one_hot(picks, classes).double().mean(0).movedim(-1, 1)
        target = target.to(dtype)
        ignored = -100
    else:
        target = torch.randint(min(classes, 256), (rows, *extra), generator=generator)
        target[torch.rand(target.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = ignored
        if classes > 156:
            target.view(-1)[:1] = 156
        bounds = torch.iinfo(labels_of)
        target = torch.where((target >= bounds.min) & (target <= bounds.max), target, 0).to(labels_of)
    weight = None
    if draw(st.booleans()):
        weight = (torch.rand(classes, generator=generator, dtype=torch.float64) + 0.1).to(dtype)
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(["mean", "sum", "none"])), "ignore_index": ignored}
    for name, value in (("label_smoothing", 0.1), ("lse_square_scale", 0.01), ("softcap", 6.0)):
        if draw(st.integers(0, 3)) == 0:
            options[name] = value
    upstream = torch.randn((rows, *extra) if options["reduction"] == "none" else (), generator=generator) + 2
    case = {"input": draw(layouts(logits)), "target": target, "weight": weight, "upstream": upstream}
    negated = draw(st.sampled_from([None, *case]))  # of this tensor, memory holds the negative
    if negated is not None and case[negated] is not None and case[negated].is_floating_point():
        case[negated] = torch._neg_view(-case[negated])
    for name, value in (("logit_scale", 1.7), ("temperature", 1.3)):
        if draw(st.integers(0, 3)) == 0:
            options[name] = value
    return {**case, "options": options}


# ---------------------------------------------------------------------------------------------------- the functions

Loss = Callable[..., Tensor]


def plain(input: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    """The loss in torch's own operators."""
    if not target.is_floating_point():
        return reference.loss(input, target, weight, **options)
    names, scale = ("softcap", "logit_scale", "temperature"), options.get("lse_square_scale", 0.0)
    z = reference.logits_of(input, **{name: options[name] for name in names if name in options})
    rows = F.cross_entropy(
        z, target.to(z.dtype), weight, reduction="none", label_smoothing=options.get("label_smoothing", 0.0)
    )
    if scale:
        rows = rows + scale * of_classes(target, weight).to(z.dtype).sum(1) * z.logsumexp(1).square()
    return reduced(rows, options)


def of_classes(target: Tensor, weight: Tensor | None) -> Tensor:
    return target if weight is None else target * weight.view(1, -1, *[1] * (target.dim() - 2))


def reduced(rows: Tensor, options: dict[str, Any]) -> Tensor:
    return rows if options["reduction"] == "none" else getattr(rows, options["reduction"])()


def by_statistics(input: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    loss = cross_entropy_with_statistics(input, target, weight, **options).loss
    if options["reduction"] != "none":
        return loss
    assert loss.dtype.itemsize >= 4  # −loss is a log-probability
    return loss.to(checks.loss_dtype(input, target, weight))


def by_a_linear_map(input: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    """The logits are their own hidden states."""
    head = torch.eye(input.shape[1], dtype=input.dtype, device=input.device)
    target = target.movedim(1, -1) if target.is_floating_point() else target
    return linear_cross_entropy(input.movedim(1, -1), head, target, weight=weight, chunk_size=5, **options)


def of_probabilities(input: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    options = {name: options[name] for name in ("reduction", "ignore_index")}
    return cross_entropy(input.softmax(1), target, weight, from_logits=False, **options)


def plain_of_probabilities(input: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    logs = input.softmax(1).log()
    if target.is_floating_point():
        return reduced(-(of_classes(target, weight) * logs).sum(1), options)
    return F.nll_loss(logs, target, weight, ignore_index=options["ignore_index"], reduction=options["reduction"])


FUNCTIONS: dict[str, tuple[Loss, Loss]] = {
    "cross_entropy": (cross_entropy, plain),
    "statistics": (by_statistics, plain),
    "linear": (by_a_linear_map, plain),
    "probabilities": (of_probabilities, plain_of_probabilities),
}


# ------------------------------------------------------------------------------------------------------ the judgement


def derivatives(function: Loss, case: dict[str, Any], order: int) -> list[Tensor]:
    """The value, the gradient, and the gradient of the gradient's squares."""
    x = case["input"].detach().requires_grad_()
    value = function(x, case["target"], case["weight"], **case["options"])
    upstream = case["upstream"].to(value.dtype)
    (gradient,) = torch.autograd.grad(value, x, upstream, create_graph=order > 1)
    results = [value.detach(), gradient.detach()]
    if order > 1:
        results += torch.autograd.grad(
            gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square().sum(), x
        )
    return results


def check(functions: tuple[Loss, Loss], case: dict[str, Any], order: int, device: torch.device | str = "cpu") -> None:
    """Compare a function with its plain form, in the case's dtype and in float64."""
    ours, theirs = functions
    on = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in case.items()}
    usual = {name: value.resolve_neg() if isinstance(value, Tensor) else value for name, value in case.items()}
    if not usual["target"].is_floating_point():
        usual["target"] = usual["target"].long()
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in usual.items()
    }
    results = derivatives(ours, on, order), derivatives(theirs, usual, order), derivatives(theirs, wide, order)
    words = {**case["options"], "shape": tuple(case["input"].shape), "strides": case["input"].stride()}
    words |= {"dtype": case["input"].dtype, "target": case["target"].dtype, "weight": case["weight"] is not None}
    for what, a, b, exact in zip(("value", "gradient", "second derivative"), *results, strict=False):
        # float16 and bfloat16 lose up to two units where the plain form rounds the same number twice by luck. And the
        # float64 to compare with loses digits itself, where its second derivative is a small difference.
        lost = 16 * torch.finfo(torch.float64).eps * float(results[2][1].abs().nan_to_num(0).max())
        reference.assert_no_worse(a, b, exact.double(), f"{what} of {words}", 4.0, lost)


# --------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture
def examples(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--examples") or 60


@pytest.mark.slow(interpreted=True)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_calls_of_one_backend(place: Place, name: str, examples: int) -> None:
    @drawn(examples // 2 if place.interpreted else examples)
    @given(case=cases(dtypes=dtypes_of(name, place)))
    def run(case: dict[str, Any]) -> None:
        check(FUNCTIONS[name], case, 1, place.device)

    run()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_calls_of_few_logits(name: str, examples: int) -> None:
    """As users call it: few logits go to torch's own operators."""

    @drawn(examples)
    @given(case=cases(dtypes=dtypes_of(name)))
    def run(case: dict[str, Any]) -> None:
        check(FUNCTIONS[name], case, 1)

    run()


def test_calls_of_many_logits(examples: int) -> None:
    """As users call it: the backend is chosen by the tensor."""

    @drawn(examples // 4)
    @given(case=cases(large=True))
    def run(case: dict[str, Any]) -> None:
        check(FUNCTIONS["cross_entropy"], case, 1)

    run()


def test_second_derivatives(place: Place, examples: int) -> None:
    @drawn(examples if place.interpreted else 8 * examples)
    @given(case=cases(dtypes=dtypes_of("cross_entropy", place)))
    def run(case: dict[str, Any]) -> None:
        check(FUNCTIONS["cross_entropy"], case, 2, place.device)

    run()


def test_compiled_calls(examples: int) -> None:
    @drawn(examples // 10)
    @given(case=cases())
    def run(case: dict[str, Any]) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
        check((compiled, plain), case, 1)

    run()
