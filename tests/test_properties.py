"""hypothesis draws shapes, strides, dtypes, options, and rows full of infinities, NaN, ties and ignored labels."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import torch
from drawing import drawn
from places import Place
from torch import Tensor

from fastloss import accuracy, cross_entropy_with_accuracy

IGNORED = -3


@st.composite
def cases(draw: st.DrawFn, largest: float) -> dict[str, Any]:
    """One call: logits, target, weight and options."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    classes = draw(st.sampled_from([2, 3, 5, 16, 33, 70, 130]))
    extra = draw(st.sampled_from([(), (3,), (2, 2)]))
    rows = draw(st.integers(1, 6))
    dtype = draw(st.sampled_from([torch.float16, torch.float32, torch.float64]))
    scale = draw(st.sampled_from([0.1, 3.0, largest]))
    input = scale * torch.randn((rows, classes, *extra), generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        input = input.round()  # ties
    for value in draw(st.lists(st.sampled_from([float("inf"), -float("inf"), float("nan")]), max_size=2)):
        input.view(-1)[torch.randint(input.numel(), (1,), generator=generator)] = value
    input = input.to(dtype)
    layout = draw(st.sampled_from(["contiguous", "class last", "sliced"]))
    if layout == "class last":
        input = input.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "sliced":
        wider = torch.zeros((2 * rows, classes + 3, *extra), dtype=dtype)
        wider[::2, 1 : classes + 1] = input
        input = wider[::2, 1 : classes + 1]
    target = torch.randint(classes, (rows, *extra), generator=generator)
    target[torch.rand(target.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = IGNORED
    weight = torch.rand(classes, generator=generator).to(dtype) + 0.01 if draw(st.booleans()) else None
    return {
        "input": input,
        "target": target,
        "weight": weight,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "lse_square_scale": draw(st.sampled_from([0.0, 0.01])),
        "softcap": draw(st.sampled_from([None, None, 4.0])),
    }


def rows_of(tensor: Tensor) -> Tensor:
    """(N, C, …) as (rows, C)."""
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


@pytest.mark.slow(interpreted=True)
@pytest.mark.parametrize("examples", [60])
def test_any_call(place: Place, examples: int) -> None:
    # The interpreter has no fused multiply-add, which keeps float32 exponents exact for large logits.
    @drawn(
        cases(largest=6.0 if place.interpreted else 60.0),
        examples=examples if place.name == "eager" else examples // 2,
    )
    def check(case: dict[str, Any]) -> None:
        run_case(place, case)

    check()


def run_case(place: Place, case: dict[str, Any]) -> None:
    input, target, weight = case.pop("input"), case.pop("target"), case.pop("weight")
    counted = (target != IGNORED).reshape(-1)
    # A row that is ignored gives torch's gradient NaN if it holds one; ours gives it 0.
    clean = torch.where((target == IGNORED).unsqueeze(1), torch.zeros_like(input), input)
    upstream = torch.randn(target.shape) if case["reduction"] == "none" else torch.tensor(1.5)
    on = place.device
    before = input.clone()
    ours = reference.value_and_gradient(
        lambda x, t, w, **o: cross_entropy_with_accuracy(x, t, w, topk=(1, 3), **o).loss,
        input.to(on),
        target.to(on),
        None if weight is None else weight.to(on),
        upstream.to(on),
        ignore_index=IGNORED,
        **case,
    )
    assert torch.equal(before.nan_to_num(7), input.nan_to_num(7))
    theirs = reference.value_and_gradient(
        reference.loss, clean, target, weight, upstream, ignore_index=IGNORED, **case
    )
    exact = reference.exact_value_and_gradient(clean, target, weight, upstream, ignore_index=IGNORED, **case)
    composed = case["softcap"] is not None or case["lse_square_scale"]
    ulps = 4.0 if composed else 2.0
    reference.assert_no_worse(ours[0], theirs[0], exact[0].double(), f"loss {case}", ulps)
    reference.assert_no_worse(ours[1], theirs[1], exact[1].double(), f"gradient {case}", ulps)
    ignored = rows_of(ours[1].cpu())[~counted]
    assert torch.equal(ignored, torch.zeros_like(ignored))
    for k, value in zip((1, 3), accuracy(input.to(on), target.to(on), (1, 3), ignore_index=IGNORED), strict=True):
        expected = reference.accuracy(input, target, k, IGNORED)
        assert value.item() == pytest.approx(expected, abs=1e-6, nan_ok=True)
