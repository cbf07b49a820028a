"""Arguments that don't fit, and inputs at the edge of what does.

An error is of torch's own kind for the same mistake, says which argument it was, what it was and what would fit, and
leaves nothing written. Every case goes three ways: the choice that a user gets by default (torch's own operator, for
tensors as small as these), and each backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor

import fastloss
from fastloss import CrossEntropyLoss, accuracy, checks, cross_entropy, cross_entropy_with_accuracy
from fastloss.backends import choice

NAN = float("nan")


@pytest.fixture(params=["auto", "eager", "triton"])
def served(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way that small CPU tensors can go."""
    if request.param == "triton" and (choice.triton_version() is None or torch.cuda.is_available()):
        pytest.skip("the kernels serve no CPU tensors here")
    with contextlib.nullcontext() if request.param == "auto" else fastloss.use_backend(request.param):
        yield request.param


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def good() -> dict[str, Any]:
    """A call that fits; each case below spoils one argument of it."""
    return {"input": torch.randn(4, 10), "target": ints(0, 1, 9, -100), "weight": torch.rand(10)}


def images() -> dict[str, Any]:
    return {"input": torch.randn(2, 5, 3), "target": torch.randint(5, (2, 3)), "weight": None}


# The arguments passed instead, the kind of error, which is torch's too, and what the message must hold.
Case = tuple[dict[str, Any], type[Exception], tuple[str, ...]]
# How the cases begin in which torch has no error: it lacks the argument, or takes what can't be meant.
NOT_IN_TORCH = (
    *("softcap is", "lse_square_scale is", "label_smoothing is -0.1", "label_smoothing is nan", "int32 label"),
    *("logit_scale is", "temperature is", "a temperature of"),
    *("class probabilities elsewhere", "a softcap of", "a z-loss of", "inplace is", "from_logits is"),
)
SHAPES_DTYPES_DEVICES: dict[str, Case] = {
    "input is a list": ({"input": [[0.5, 1.5]]}, TypeError, ("input", "list", "Tensor")),
    **{
        f"input is {name}": (
            {"input": torch.ones(4, 10).to(dtype)},
            NotImplementedError,
            ("input", str(dtype), "float16, bfloat16, float32 or float64"),
        )
        for name, dtype in (
            ("integer", torch.int32),
            ("complex", torch.complex64),
            ("float8", torch.float8_e4m3fn),
        )
    },
    "input has no dimensions": (
        {"input": torch.tensor(1.0), "target": torch.tensor(0), "weight": None},
        RuntimeError,
        ("input", "no dimensions", "(C,), (N, C) or (N, C, d1, ...)"),
    ),
    "target is a list": ({"target": [0, 1, 2, 3]}, TypeError, ("target", "list", "Tensor")),
    "target is None": ({"target": None}, TypeError, ("target", "NoneType", "Tensor")),
    **{
        f"target is {name}": (
            {"target": ints(0, 1, 1, 1).to(dtype)},
            RuntimeError,
            ("target", str(dtype), "int64, int32 or uint8"),
        )
        for name, dtype in (("int16", torch.int16), ("bool", torch.bool), ("float", torch.float32))
    },
    "target is short": ({"target": ints(0, 1, 2)}, ValueError, ("target", "(3,)", "(4,)", "(4, 10)")),
    "target is long": ({"target": ints(0, 1, 2, 3, 4)}, ValueError, ("target", "(5,)", "(4,)")),
    "target is empty": ({"target": ints()}, ValueError, ("target", "(0,)", "(4,)")),
    "target has one dimension more": (
        {"target": torch.zeros(4, 1, dtype=torch.int64)},
        RuntimeError,
        ("target", "(4, 1)", "(4,)"),
    ),
    "target holds indices in input's shape": (
        {"target": torch.zeros(4, 10, dtype=torch.int64)},
        RuntimeError,
        ("target", "(4, 10)", "(4,)"),
    ),
    "target of one row is long": (
        {"input": torch.randn(10), "target": ints(0, 1)},
        ValueError,
        ("target", "(2,)", "()", "(10,)"),
    ),
    "target of images is wide": (
        {**images(), "target": torch.zeros(2, 4, dtype=torch.int64)},
        RuntimeError,
        ("target", "(2, 4)", "(2, 3)", "(2, 5, 3)"),
    ),
    "target of images is long": (
        {**images(), "target": torch.zeros(3, 3, dtype=torch.int64)},
        ValueError,
        ("target", "(3, 3)", "(2, 3)"),
    ),
    "target of images lacks a dimension": (
        {**images(), "target": ints(0, 1)},
        RuntimeError,
        ("target", "(2,)", "(2, 3)"),
    ),
    "target is elsewhere": (
        {"target": torch.zeros(4, dtype=torch.int64, device="meta")},
        RuntimeError,
        ("target", "meta", "cpu"),
    ),
    "weight is a list": ({"weight": [1.0] * 10}, TypeError, ("weight", "list", "Tensor or None")),
    "weight is short": ({"weight": torch.ones(9)}, RuntimeError, ("weight", "(9,)", "(10,)")),
    "weight is a column": ({"weight": torch.ones(10, 1)}, RuntimeError, ("weight", "(10, 1)", "(10,)")),
    "weight is double": (
        {"weight": torch.ones(10, dtype=torch.float64)},
        RuntimeError,
        ("weight", "torch.float64", "torch.float32"),
    ),
    "weight is half beside float32": (
        {"weight": torch.ones(10, dtype=torch.float16)},
        RuntimeError,
        ("weight", "torch.float16", "torch.float32"),
    ),
    "weight is elsewhere": ({"weight": torch.ones(10, device="meta")}, RuntimeError, ("weight", "meta", "cpu")),
    "weight requires grad": (
        {"weight": torch.ones(10, requires_grad=True)},
        RuntimeError,
        ("weight", "requires grad", "detach"),
    ),
}
OPTIONS: dict[str, Case] = {
    **{
        f"reduction is {word!r}": ({"reduction": word}, ValueError, ("reduction", repr(word), "'mean'"))
        for word in ("avg", "Mean", None, 1, ["mean"])
    },
    **{
        f"label_smoothing is {number}": (
            {"label_smoothing": number},
            RuntimeError,
            ("label_smoothing", str(number), "between 0.0 and 1.0"),
        )
        for number in (-0.1, 1.1, NAN, float("inf"))
    },
    **{
        f"softcap is {number}": ({"softcap": number}, ValueError, ("softcap", str(number), "positive finite"))
        for number in (0, -30.0, NAN, float("inf"))
    },
    **{
        f"{name} is {number}": ({name: given}, ValueError, (name, str(number), "positive finite"))
        for name in ("logit_scale", "temperature")
        for number in (0.0, -2.0, NAN, float("inf"), 1e10)
        for given in ((number, torch.tensor(number)) if number == number else (number,))
    },
    **{
        f"{name} is {words}": ({name: value}, kind, (name, *expected))
        for name in ("logit_scale", "temperature")
        for words, value, kind, expected in (
            ("text", "a", TypeError, ("'a'", "a number")),
            ("of another shape", torch.ones(1), ValueError, ("(1,)", "0-d tensor")),
            ("an integer tensor", torch.tensor(2), ValueError, ("int64", "float32")),
            ("elsewhere", torch.ones((), device="meta"), RuntimeError, ("meta", "cpu")),
            ("trained", torch.ones((), requires_grad=True), RuntimeError, ("requires grad", "multiply the logits")),
        )
    },
    **{
        f"lse_square_scale is {number}": (
            {"lse_square_scale": number},
            ValueError,
            ("lse_square_scale", str(number), "finite"),
        )
        for number in (NAN, float("inf"), -float("inf"))
    },
    **{
        f"{name} is {value!r}": ({name: value}, TypeError, (name, repr(value)))
        for name, value in [
            *(("label_smoothing", "a"), ("label_smoothing", None)),
            *(("ignore_index", "a"), ("ignore_index", None), ("ignore_index", 1.5)),
            *(("lse_square_scale", "a"), ("lse_square_scale", None), ("softcap", "a")),
            *((name, torch.ones(1)) for name in ("label_smoothing", "lse_square_scale", "softcap")),
            *(
                (name, torch.ones((), requires_grad=True))
                for name in ("label_smoothing", "lse_square_scale", "softcap")
            ),
            *(("logit_scale", True), ("temperature", True)),
        ]
    },
    **{
        f"{name} is {value!r}": ({name: value}, TypeError, (f"{name} is {value!r}; expected True or False",))
        for name, value in [
            *(("inplace", "no"), ("inplace", None), ("inplace", 1)),
            *(("from_logits", "False"), ("from_logits", None), ("from_logits", 0)),
        ]
    },
}
SOFT: dict[str, Case] = {
    "class probabilities of another shape": (
        {"target": torch.rand(4, 9)},
        RuntimeError,
        ("target", "(4, 9)", "(4, 10)", "float32", "class probabilities"),
    ),
    "class probabilities in integers": (
        {"target": torch.ones(4, 10, dtype=torch.int64)},
        RuntimeError,
        ("target", "int64", "(4, 10)", "floating point"),
    ),
    "class probabilities in bool": (
        {"target": torch.ones(4, 10, dtype=torch.bool)},
        RuntimeError,
        ("target", "bool", "float32", "floating point"),
    ),
    "class probabilities in float8": (
        {"target": torch.ones(4, 10).to(torch.float8_e5m2)},
        RuntimeError,
        ("target", "float8_e5m2", "float32"),
    ),
    "class probabilities elsewhere": (
        {"target": torch.rand(4, 10, device="meta")},
        RuntimeError,
        ("target", "meta", "cpu"),
    ),
    "class probabilities and an ignore_index": (
        {"target": torch.rand(4, 10), "ignore_index": 3},
        RuntimeError,
        ("ignore_index", "3", "class probabilities", "negative"),
    ),
    "class probabilities and a short weight": (
        {"target": torch.rand(4, 10), "weight": torch.rand(9)},
        RuntimeError,
        ("weight", "(9,)", "(10,)"),
    ),
    "class probabilities of another batch": (
        {"target": torch.rand(3, 10)},
        ValueError,
        ("target", "(3, 10)", "(4, 10)", "float32"),
    ),
    "a softcap of probabilities": (
        {"from_logits": False, "softcap": 5.0},
        ValueError,
        ("softcap", "5.0", "from_logits=False"),
    ),
    "a temperature of probabilities": (
        {"from_logits": False, "temperature": 2.0},
        ValueError,
        ("temperature", "2.0", "from_logits=False"),
    ),
    "a z-loss of probabilities": (
        {"from_logits": False, "lse_square_scale": 0.1},
        ValueError,
        ("lse_square_scale", "0.1", "from_logits=False"),
    ),
}
LABELS: dict[str, Case] = {
    **{
        f"label is {label}": (
            {"target": ints(0, label, 9, -100)},
            IndexError,
            ("target[1]", str(label), "[0, 10)", "ignore_index (-100)"),
        )
        for label in (10, -1, -99, 1 << 40, (1 << 32) + 3)
    },
    "uint8 label is 255": (
        {"target": ints(0, 1, 255, 3, dtype=torch.uint8)},
        IndexError,
        ("target[2]", "255", "[0, 10)"),
    ),
    "int32 label is 10": (
        {"target": ints(0, 1, 2, 10, dtype=torch.int32)},
        IndexError,
        ("target[3]", "10", "[0, 10)"),
    ),
    "label is another ignore_index": (
        {"target": ints(0, 1, 2, -100), "ignore_index": -1},
        IndexError,
        ("target[3]", "-100", "[0, 10)", "ignore_index (-1)"),
    ),
    "label of one row": (
        {"input": torch.randn(10), "target": torch.tensor(10)},
        IndexError,
        ("target is 10", "[0, 10)"),
    ),
    "label of images": (
        {**images(), "target": torch.tensor([[0, 1, 2], [3, 4, 5]])},
        IndexError,
        ("target[1, 2]", "5", "[0, 5)"),
    ),
    "label where there are no classes": (
        {"input": torch.randn(2, 0), "target": ints(0, 0), "weight": None},
        IndexError,
        ("target[0]", "0", "[0, 0)"),
    ),
}
CASES = {**SHAPES_DTYPES_DEVICES, **OPTIONS, **SOFT, **LABELS}


def refused(
    call: Callable[..., Any], arguments: dict[str, Any], kind: type[Exception], words: tuple[str, ...]
) -> None:
    """The call raises exactly ``kind``, in words of fastloss's own, and writes nothing."""
    tensors = {
        name: (value, None if value.is_meta else value.detach().clone(), value._version)
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    }
    with pytest.raises(Exception) as caught:  # noqa: PT011 the kind is looked at below
        call(**arguments)
    assert type(caught.value) is kind, repr(caught.value)
    message = str(caught.value)
    assert message.startswith("fastloss: ")
    for word in words:
        assert word in message
    for name, (value, before, version) in tensors.items():
        assert value._version == version, name
        assert value.grad is None, name
        assert before is None or torch.equal(value.detach(), before), name


@pytest.mark.parametrize("case", CASES)
def test_a_loss_refuses(served: str, case: str) -> None:
    spoiled, kind, words = CASES[case]
    for leaf in (False, True):
        arguments = {**good(), **spoiled}
        if leaf and isinstance(arguments["input"], Tensor) and arguments["input"].dtype == torch.float32:
            arguments["input"] = arguments["input"].clone().requires_grad_()
        refused(cross_entropy, arguments, kind, words)
        refused(cross_entropy_with_accuracy, {**arguments, "topk": (1, 5)}, kind, words)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(NOT_IN_TORCH)])
def test_torch_raises_the_same_kind(case: str) -> None:
    """What the table above says of torch is so."""
    spoiled, kind, _ = CASES[case]
    with pytest.raises(kind) as caught:
        F.cross_entropy(**{**good(), **spoiled})
    assert caught.type is kind


@pytest.mark.parametrize("case", ["target is short", "reduction is 'avg'", "label is 10", "weight is short"])
def test_nothing_is_written_in_place(served: str, case: str) -> None:
    """Neither is the gradient begun where it would go over the logits."""
    spoiled, kind, _ = CASES[case]
    arguments = {**good(), **spoiled, "inplace": True}
    leaf = torch.randn(4, 10, requires_grad=True)
    arguments["input"] = leaf * 1
    before = arguments["input"].detach().clone()
    with pytest.raises(kind):
        cross_entropy(**arguments)
    assert torch.equal(arguments["input"], before)
    assert leaf.grad is None
    arguments["input"].sum().backward()  # the graph before it is whole
    assert leaf.grad is not None


@pytest.mark.parametrize("case", ["target is short", "label_smoothing is 1.1", "label is 10", "softcap is 0"])
def test_the_module_refuses(served: str, case: str) -> None:
    spoiled, kind, words = CASES[case]
    arguments = {**good(), **spoiled}
    tensors = [arguments.pop("input"), arguments.pop("target")]
    module = CrossEntropyLoss(**arguments)
    with pytest.raises(kind) as caught:
        module(*tensors)
    for word in words:
        assert word in str(caught.value)


ACCURACY: dict[str, Case] = {
    **{
        name: case
        for name, case in {**SHAPES_DTYPES_DEVICES, **LABELS}.items()
        if "weight" not in name and "float8" not in name
    },
    **{name: case for name, case in OPTIONS.items() if name.startswith(("reduction", "ignore_index"))},
    **{
        f"topk is {ks}": ({"topk": ks}, ValueError, ("topk", str(worst), "at least 1"))
        for ks, worst in ((0, 0), (-1, -1), ((1, 0), 0), ([5, -2], -2))
    },
    **{
        f"topk is {ks!r}": ({"topk": ks}, TypeError, ("topk", repr(ks), "an int or a tuple of ints"))
        for ks in (1.5, "5", None, True, (1, 2.0), (1, True))
    },
}
del ACCURACY["target holds indices in input's shape"]  # one-hot rows: right here


@pytest.mark.parametrize("case", ACCURACY)
def test_accuracy_refuses(served: str, case: str) -> None:
    spoiled, kind, words = ACCURACY[case]
    arguments = {**good(), **spoiled}
    del arguments["weight"]
    refused(accuracy, arguments, kind, words)
    if "topk" in spoiled:
        refused(cross_entropy_with_accuracy, arguments, kind, words)


# ----------------------------------------------------------------------------- labels on a GPU


def test_validate_asks_for_a_look_at_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)]:
        if value is None:
            monkeypatch.delenv("FASTLOSS_VALIDATE", raising=False)
        else:
            monkeypatch.setenv("FASTLOSS_VALIDATE", value)
        assert choice.may_look(torch.empty(1, device="meta")) is expected


@pytest.mark.parametrize("value", ["0", "1"])
def test_validate_changes_nothing_on_a_cpu(served: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOSS_VALIDATE", value)
    spoiled, kind, words = CASES["label is 10"]
    refused(cross_entropy, {**good(), **spoiled}, kind, words)
    fits = good()
    del fits["weight"]
    assert bool(cross_entropy(**fits).isfinite())
    assert bool(accuracy(**fits).isfinite())


@pytest.mark.parametrize("call", [cross_entropy, accuracy])
@pytest.mark.parametrize("asked", [False, True])
def test_labels_elsewhere_are_looked_at_when_asked(
    call: Callable[..., Any], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off the CPU a look makes the host wait. No GPU is needed to see whether there is one."""
    monkeypatch.setenv("FASTLOSS_VALIDATE", "1" if asked else "0")
    looks = []
    monkeypatch.setattr(checks, "check_labels", lambda target, *rest: looks.append(rest))
    monkeypatch.setattr(Tensor, "is_cpu", False)
    with fastloss.use_backend("eager"):
        call(torch.randn(3, 7), ints(0, 1, 6), ignore_index=-5)
    assert looks == ([(7, -5)] if asked else [])


def test_the_first_bad_label_is_named() -> None:
    with pytest.raises(IndexError, match=r"^fastloss: target\[0, 2\] is -7, .* \[0, 5\) or ignore_index \(-100\)$"):
        checks.check_labels(torch.tensor([[0, -100, -7], [9, 1, 1]]), 5, -100)
    checks.check_labels(torch.tensor([[0, -100, 4]]), 5, -100)
    checks.check_labels(torch.tensor([300, 4]), 5, 300)


@pytest.mark.gpu
def test_a_label_out_of_range_on_a_gpu(kernels: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN without ``FASTLOSS_VALIDATE``, IndexError with it; and the context lives."""
    logits = torch.randn(4, 10, device=kernels.device)
    target = ints(0, 10, 9, -100).to(kernels.device)
    monkeypatch.delenv("FASTLOSS_VALIDATE", raising=False)
    assert cross_entropy(logits, target, reduction="none").isnan().tolist() == [False, True, False, False]
    assert bool(accuracy(logits, target).isnan())
    monkeypatch.setenv("FASTLOSS_VALIDATE", "1")
    for call in (cross_entropy, accuracy):
        with pytest.raises(IndexError, match=r"target\[1\] is 10, .*\[0, 10\)"):
            call(logits, target)
    torch.cuda.synchronize()


# ----------------------------------------------------------------------------- nothing to count


@pytest.mark.parametrize("shape", [(0, 7), (0, 7, 3), (3, 7, 0), (0, 7, 2, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("grad", [False, True])
def test_an_empty_batch_as_torch(served: str, shape: tuple[int, ...], reduction: str, grad: bool) -> None:
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    pairs = []
    for function in (cross_entropy, F.cross_entropy):
        x = torch.randn(shape).requires_grad_(grad)
        loss = function(x, target, reduction=reduction)
        assert loss.requires_grad is grad
        if grad:
            loss.sum().backward()
            assert x.grad is not None
            assert x.grad.shape == shape
        pairs.append(loss.detach())
    torch.testing.assert_close(*pairs, rtol=0, atol=0, equal_nan=True)
    loss, (top1, top5) = cross_entropy_with_accuracy(torch.randn(shape), target, reduction=reduction, topk=(1, 5))
    torch.testing.assert_close(loss, pairs[1], rtol=0, atol=0, equal_nan=True)
    for value in (top1, top5, accuracy(torch.randn(shape), target, reduction=reduction)):
        expected = {"mean": torch.tensor(NAN), "sum": torch.tensor(0.0), "none": torch.zeros(target.shape)}
        torch.testing.assert_close(value, expected[reduction], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_row_ignored_as_torch(served: str, reduction: str) -> None:
    logits, target = torch.randn(3, 7), ints(-100, -100, -100)
    ours, theirs = (f(logits, target, reduction=reduction) for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    expected = {"mean": torch.tensor(NAN), "sum": torch.tensor(0.0), "none": torch.zeros(3)}[reduction]
    value = accuracy(logits, target, reduction=reduction)
    torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_classes_as_torch(served: str, reduction: str) -> None:
    """Then every label but ``ignore_index`` is out of bounds."""
    logits, target = torch.randn(3, 0), ints(-100, -100, -100)
    ours, theirs = (f(logits, target, reduction=reduction) for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weights_that_add_up_to_nothing_as_torch(served: str, reduction: str) -> None:
    """0 / 0 is NaN, as where no row counts."""
    logits, target, weight = torch.randn(3, 7), ints(0, 0, 1), torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    ours, theirs = (f(logits, target, weight, reduction=reduction) for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


# ----------------------------------------------------------------------------- NaN and infinite logits


@pytest.mark.parametrize("special", [NAN, float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("at_label", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nan_and_infinite_logits_as_torch(served: str, special: float, at_label: bool, dtype: torch.dtype) -> None:
    """The rows that hold one are what torch makes of them, and the others are as if it was not there."""
    logits, target = torch.randn(5, 11).to(dtype), ints(3, 4, 5, -100, 6)
    rows = torch.tensor([1, 3])
    logits[rows, 4 if at_label else 9] = special
    counted = torch.tensor([0, 1, 2, 4])
    ulps = 2.0 if served == "triton" and dtype == torch.bfloat16 else 1.0  # the interpreter truncates
    for reduction in ("none", "sum"):
        upstream = torch.ones(5 if reduction == "none" else (), dtype=dtype)
        exact, theirs, ours = (
            reference.value_and_gradient(f, logits.to(d), target, None, upstream.to(d), reduction=reduction)
            for f, d in ((F.cross_entropy, torch.float64), (F.cross_entropy, dtype), (cross_entropy, dtype))
        )
        if served != "auto":  # torch lets the NaNs of an ignored row through
            assert not ours[1][3].count_nonzero()
        for what, *values in zip(("loss", "gradient"), ours, theirs, exact, strict=True):
            mine, other, right = (value[counted] if value.dim() else value for value in values)
            assert torch.equal(mine.isnan(), other.isnan()), what
            assert torch.equal(mine.isinf(), other.isinf()), what
            reference.assert_no_worse(mine, other, right, what, ulps)
    for function in (cross_entropy, cross_entropy_with_accuracy):
        reduced = function(logits, target)
        loss = reduced if isinstance(reduced, Tensor) else reduced.loss
        torch.testing.assert_close(loss, F.cross_entropy(logits, target), equal_nan=True)
    for k in (1, 3):
        assert float(accuracy(logits, target, topk=k)) == pytest.approx(reference.accuracy(logits, target, k))


# ----------------------------------------------------------------------------- what fits, though it looks odd


def test_a_single_row_takes_both_shapes_of_target_as_torch(served: str) -> None:
    row = torch.randn(6)
    for target in (torch.tensor(2), ints(2)):
        for reduction in ("mean", "none"):
            ours, theirs = (f(row, target, reduction=reduction) for f in (cross_entropy, F.cross_entropy))
            torch.testing.assert_close(ours, theirs)
            assert ours.shape == theirs.shape


def test_float32_weights_beside_16_bit_logits(served: str) -> None:
    """The one mixture of dtypes that is taken: under autocast the weights stay float32."""
    logits, target, weight = torch.randn(4, 10).to(torch.bfloat16), ints(0, 1, 2, 3), torch.rand(10)
    loss = cross_entropy(logits, target, weight)
    torch.testing.assert_close(
        loss.double(), F.cross_entropy(logits.double(), target, weight.double()), rtol=0.02, atol=0
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ignore_index", np.int64(1)),
        ("ignore_index", torch.tensor(1)),
        ("label_smoothing", np.float32(0.25)),
        ("label_smoothing", 1),
        ("softcap", np.float32(2.0)),
        ("lse_square_scale", np.float64(0.5)),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_other_kinds_of_numbers(served: str, name: str, value: Any) -> None:
    """What torch, or Python, takes for an int or a float is one."""
    logits, target = torch.randn(4, 10), ints(0, 1, 2, 3)
    plain = value.item() if hasattr(value, "item") else float(value)
    for reduction in ("mean", "none"):
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        ours = cross_entropy(x, target, reduction=reduction, **{name: value})
        expected = reference.loss(y, target, reduction=reduction, **{name: plain})
        torch.testing.assert_close(ours, expected)
        ours.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    if name == "ignore_index":
        assert float(accuracy(logits, target, 3, ignore_index=value)) == pytest.approx(
            reference.accuracy(logits, target, 3, plain)
        )


def test_accuracy_of_a_single_class(served: str) -> None:
    """Class probabilities of ``input``'s shape stay class probabilities where there is one class."""
    assert float(accuracy(torch.tensor([0.3]), torch.tensor([1.0]))) == 1.0
    assert float(accuracy(torch.tensor([[0.3], [0.2]]), torch.tensor([[1.0], [1.0]]))) == 1.0


@pytest.mark.parametrize("softcap", [1e40, 3e38, 1e-40, float("inf")])
def test_a_softcap_that_float32_does_not_hold(place: Place, softcap: float) -> None:
    with pytest.raises(ValueError, match=r"softcap is .*; expected a positive finite number, 1e-30 to 1e\+30"):
        fastloss.cross_entropy(
            torch.randn(2, 3, device=place.device), torch.zeros(2, device=place.device).long(), softcap=softcap
        )


def test_in_place_over_windows(place: Place) -> None:
    """Rows that overlap can't each hold their own gradient."""
    windows = (torch.randn(12, device=place.device).requires_grad_() * 1).unfold(0, 4, 1)
    with pytest.raises(RuntimeError, match=r"inplace=True needs .* strides \(1, 1\)"):
        fastloss.cross_entropy(windows, torch.zeros(9, device=place.device).long(), inplace=True)
    apart = (torch.randn(12, device=place.device).requires_grad_() * 1).unfold(0, 4, 4)
    fastloss.cross_entropy(apart, torch.zeros(3, device=place.device).long(), inplace=True).backward()


SPARSE = {
    "input": (lambda **given: {**given, "input": given["input"].to_sparse()}),
    "target": (lambda **given: {**given, "target": given["target"].to_sparse()}),
    "nested input": (lambda **given: {**given, "input": torch.nested.nested_tensor(list(given["input"]))}),
    "nested target": (lambda **given: {**given, "target": torch.nested.nested_tensor([given["target"]] * 4)}),
    "probabilities in a nested target": (
        lambda **given: {**given, "target": torch.nested.nested_tensor(list(given["input"].softmax(1)))}
    ),
}


@pytest.mark.parametrize("function", [cross_entropy, accuracy, fastloss.cross_entropy_with_statistics])
@pytest.mark.parametrize("name", list(SPARSE))
def test_sparse_and_nested_tensors(place: Place, function: Callable[..., Any], name: str) -> None:
    given = SPARSE[name](input=torch.randn(4, 7), target=ints(0, 1, 2, 6))
    with pytest.raises(RuntimeError, match=f"{name.split()[-1]} (has layout torch.sparse_coo|is a nested tensor)"):
        function(**given)


def test_sparse_class_weights(place: Place) -> None:
    weight = torch.ones(7).to_sparse()
    for function in (cross_entropy, fastloss.cross_entropy_with_statistics):
        with pytest.raises(RuntimeError, match=r"weight has layout torch.sparse_coo; expected torch.strided"):
            function(torch.randn(4, 7), ints(0, 1, 2, 6), weight)


@pytest.mark.parametrize("name", ["label_smoothing", "lse_square_scale", "softcap", "logit_scale"])
def test_ints_that_no_float_holds(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is an int too large for a float"):
        cross_entropy(torch.randn(4, 7), ints(0, 1, 2, 6), **{name: 10**400})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dense_targets_of_accuracy_in_odd_dtypes(place: Place, dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=f"target has dtype {dtype}"):
        accuracy(torch.randn(4, 7), torch.ones(4, 7).to(dtype))


@pytest.mark.parametrize("topk", ["", "1", b"\x01\x02"])
def test_text_is_no_topk(topk: Any) -> None:
    with pytest.raises(TypeError, match="topk is"):
        accuracy(torch.randn(4, 7), ints(0, 1, 2, 6), topk)
