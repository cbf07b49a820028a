"""The K best classes, and divergences from a teacher, from hidden states, without the logits.

Everything is held against float64. bfloat16, which Triton's interpreter rounds by its own rules, is for the eager
backend alone there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor

import fastloss
from fastloss import linear_topk_log_probs
from fastloss.measuring.machine import peak_bytes

pytestmark = pytest.mark.backend_agnostic

CPU = torch.device("cpu")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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
