"""``linear_cross_entropy_with_statistics``: every part and every gradient, from hidden states, against float64.

The plain form is ``cross_entropy_with_statistics`` of ``F.linear(…)`` in float64, which ``test_statistics.py`` holds
against torch's operators, and those operators themselves where errors are judged.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from places import Place
from test_linear import (
    CLASSES,
    CPU,
    NAMES,
    OPTIONS,
    REDUCTIONS,
    ROWS,
    assert_no_worse,
    check_again,
    held_by,
    make,
    products,
    with_leaves,
)
from torch import Tensor

import fastloss
from fastloss import LossStatistics, linear_cross_entropy, linear_cross_entropy_with_statistics
from fastloss.backends import choice

pytestmark = pytest.mark.backend_agnostic

SWITCHES = ("z_loss", "lse", "entropy", "predicted", "correct", "log_sum_sq_probs", "mean_logit")
EVERY = dict.fromkeys(SWITCHES, True)
NUMBERS = ("loss", "z_loss", "lse", "entropy", "log_sum_sq_probs", "mean_logit", "selected")


def plain(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, selected: Tensor | None = None, **options: Any
) -> LossStatistics:
    """The same in torch's own operators, the logits whole and in the tensors' dtype."""
    options = {name: value for name, value in options.items() if name not in SWITCHES}
    if options.get("shift") and selected is not None:
        selected = selected[..., :-1, :]
    weight = options.pop("weight", None)
    logits, target = reference.projected(input, linear_weight, target, **reference.of_map(options))
    flat, labels = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    if options.get("reduction") == "none" and flat.dtype.itemsize == 2:  # log-probabilities
        flat, weight = flat.float(), None if weight is None else weight.float()
    loss, without = (
        reference.loss(flat, labels, weight, **{**options, "lse_square_scale": scale})
        for scale in (options.get("lse_square_scale", 0.0), 0.0)
    )
    cap = options.get("softcap")
    z = logits if cap is None else cap * torch.tanh(logits / cap)
    z = z if z.dtype == torch.float64 else z.float()
    log_p, predicted = z.log_softmax(-1), logits.argmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    shape = target.shape if loss.dim() else ()
    return LossStatistics(
        loss.view(shape),
        (loss - without).view(shape),
        z.logsumexp(-1),
        entropy,
        predicted,
        (predicted == target) & (target != options.get("ignore_index", -100)),
        (2 * log_p).logsumexp(-1),
        z.mean(-1),
        None if selected is None else log_p.gather(-1, selected),
    )


def run(
    function: Callable[..., LossStatistics],
    case: dict[str, Any],
    upstreams: dict[str, Tensor],
    dtype: torch.dtype | None = None,
    trained: tuple[str, ...] = NAMES,
    create_graph: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """The parts, and the gradients of those that are trained, for an upstream gradient of each of some parts."""
    tensors, leaves = with_leaves(case, dtype, trained)
    parts = function(**tensors, **options)
    outputs = [getattr(parts, name) for name in upstreams]
    given = [up.to(output) for up, output in zip(upstreams.values(), outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), given, create_graph=create_graph)
    named = {name: part.detach() for name, part in parts._asdict().items() if part is not None}
    named_gradients = zip([f"gradient of {name}" for name in leaves], gradients, strict=True)
    return named | {name: gradient.detach() for name, gradient in named_gradients}


def upstreams_of(case: dict[str, Any], names: tuple[str, ...], **options: Any) -> dict[str, Tensor]:
    """A random upstream gradient of each part."""
    with torch.no_grad():
        parts = plain(**case, **options)
    return {name: torch.randn(getattr(parts, name).shape, device=case["input"].device).double() for name in names}


def check(
    case: dict[str, Any], names: tuple[str, ...] = NUMBERS, how: dict[str, Any] | None = None, **options: Any
) -> None:
    """Parts and gradients against torch's operators, in the same dtype and in float64."""
    ulps = options.pop("ulps", 8.0)
    upstreams = upstreams_of(case, names, **options)
    ours = run(linear_cross_entropy_with_statistics, case, upstreams, **options, **EVERY, **(how or {}))
    theirs = run(plain, case, upstreams, **options)
    exact = run(plain, case, upstreams, torch.float64, **options)
    if case.get("selected") is None:
        ours.pop("selected", None)
    for name in ("predicted", "correct"):
        mine, right, _ = (parts.pop(name) for parts in (ours, theirs, exact))
        assert mine.dtype == right.dtype, name
        if case["input"].dtype.itemsize >= 4:  # elsewhere two products may round two logits to one
            assert torch.equal(mine, right), name
    assert_no_worse(ours, theirs, exact, ulps)


def with_ids(place: Place, *lead: int, ids: int = 3, **options: Any) -> dict[str, Any]:
    """The tensors of a call with classes whose log-probabilities are wanted, among them one twice."""
    case = make(place, *lead, **options)
    classes = case["linear_weight"].shape[0]
    selected = torch.randint(classes, (*case["input"].shape[:-1], ids), device=place.device)
    selected[..., -1] = selected[..., 0]
    return {**case, "selected": selected}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("bias", "weighted"), [(False, False), (True, True)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(place: Place, options: dict[str, Any], bias: bool, weighted: bool, reduction: str) -> None:
    """All parts, and all gradients for upstream gradients of all of them, over chunks that do not divide the rows."""
    check(with_ids(place, bias=bias, weighted=weighted), how={"chunk_size": 4}, reduction=reduction, **options)


@pytest.mark.parametrize("names", [*((name,) for name in NUMBERS), ("loss", "entropy")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_each_part_alone_in_other_dtypes(place: Place, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    if place.interpreted and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds bfloat16 by its own rules")
    options = {"lse_square_scale": 0.02, "softcap": 8.0, "ulps": 200.0 if dtype == torch.float64 else 8.0}
    check(with_ids(place, dtype=dtype, bias=True), names, how={"chunk_size": 4}, **options)
    check(with_ids(place, dtype=dtype), names, reduction="none", **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("lead", "shift"), [((), False), ((2, 3, 4), False), ((3, 5), True), ((2, 2, 5), True)], ids=str
)
def test_leading_dimensions_and_shift(place: Place, lead: tuple[int, ...], shift: bool, reduction: str) -> None:
    case = with_ids(place, *(lead or (1,)))
    if not lead:
        case |= {"input": case["input"][0], "target": case["target"][0] * 0, "selected": case["selected"][0]}
    check(case, how={"chunk_size": 3}, reduction=reduction, **({"shift": True} if shift else {}))


def test_log_probabilities_are_those_of_the_loss(place: Place) -> None:
    """With reduction "none" −loss is log p, to the bit that of the loss alone, and "selected" gives the same."""
    case = make(place, bias=True)
    case["target"].clamp_(min=0)
    parts = linear_cross_entropy_with_statistics(
        **case, selected=case["target"].unsqueeze(1), reduction="none", chunk_size=4
    )
    alone = linear_cross_entropy(**case, reduction="none", chunk_size=4)
    torch.testing.assert_close(parts.loss, alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(-parts.loss, parts.selected[:, 0], rtol=1e-6, atol=1e-6)


def test_selected_classes_of_any_dtype_of_labels(place: Place) -> None:
    case = with_ids(place)
    expected = linear_cross_entropy_with_statistics(**case).selected
    for dtype in (torch.int32, torch.uint8):
        ours = linear_cross_entropy_with_statistics(**{**case, "selected": case["selected"].to(dtype)}).selected
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("skip_ignored", [None, False, True])
@pytest.mark.parametrize("names", [("loss",), ("lse", "entropy")], ids="+".join)
def test_ignored_rows_and_rows_without_a_gradient_may_hold_nan(
    place: Place, names: tuple[str, ...], skip_ignored: bool | None
) -> None:
    """The loss gives ignored rows no gradient; of the rows' own parts an upstream gradient of 0 gives none."""
    case = with_ids(place, bias=True)
    ignored = case["target"] == -100
    case["input"][ignored] = torch.nan
    clean = {**case, "input": case["input"].nan_to_num(0.5)}
    upstreams = upstreams_of(clean, names)
    for name, upstream in upstreams.items():
        upstreams[name] = upstream if not upstream.dim() else upstream.masked_fill(ignored, 0.0)
    how = {"chunk_size": 3, "skip_ignored": skip_ignored, **EVERY}
    ours = run(linear_cross_entropy_with_statistics, case, upstreams, **how)
    exact = run(plain, clean, upstreams, torch.float64)
    for name in ("loss", "gradient of input", "gradient of linear_weight", "gradient of linear_bias"):
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-5, atol=1e-5)
    for name in ("lse", "entropy", "selected"):
        torch.testing.assert_close(ours[name][~ignored].double(), exact[name][~ignored], rtol=1e-5, atol=1e-5)
        assert (ours[name][ignored] == 0).all() if skip_ignored else ours[name][ignored].isnan().all()


@pytest.mark.parametrize("form", ["by chunks", "create_graph", "compiled"])
@pytest.mark.parametrize("few", [False, True])  # some are visited all the same where they are few
def test_rows_that_are_skipped_have_no_numbers_and_no_gradient(place: Place, few: bool, form: str) -> None:
    """Whatever upstream gradients they have, and whatever they hold."""
    case = with_ids(place, 40, bias=True)
    ignored = torch.zeros(40, dtype=torch.bool, device=place.device)
    ignored[[3] if few else [0, 3, 4, 5, 17, 39]] = True
    case["target"].clamp_(min=0).masked_fill_(ignored, -100)
    clean = {**case, "input": case["input"].clone()}
    case["input"][ignored] = torch.nan
    upstreams = upstreams_of(clean, NUMBERS, reduction="sum")
    counted = {
        name: up if not up.dim() else up.masked_fill(ignored if up.dim() == 1 else ignored.unsqueeze(1), 0.0)
        for name, up in upstreams.items()
    }
    function: Any = linear_cross_entropy_with_statistics
    if form == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    how = {
        "chunk_size": 16,
        "skip_ignored": True,
        "reduction": "sum",
        "create_graph": form == "create_graph",
        **EVERY,
    }
    ours = run(function, case, upstreams, **how)
    exact = run(plain, clean, counted, torch.float64, reduction="sum")
    for name, part in ours.items():
        expected = exact[name]
        if part.shape[:1] == (40,):
            hidden = ignored if part.dim() == 1 else ignored.unsqueeze(1)
            expected = expected.masked_fill(hidden, 0)
        torch.testing.assert_close(
            part.to(expected), expected, rtol=2e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def drawn_call(place: Place, seed: int, form: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any], Any]:
    """A call, upstream gradients of some parts, its options, and what chunks and which gradients there are."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    lead, classes = draw.choice([(3,), (17,), (2, 9), (40,)]), draw.choice([2, 5, 33])
    options = {
        "reduction": draw.choice(REDUCTIONS),
        "label_smoothing": draw.choice([0.0, 0.2]),
        "lse_square_scale": draw.choice([0.0, 0.1]),
        "softcap": draw.choice([None, 2.5]),
        "ignore_index": draw.choice([-100, 0, 1]),
        "shift": len(lead) > 1 and draw.random() < 0.5,
    }
    sizes: dict[str, Any] = {"dtype": torch.float64, "features": draw.choice([1, 5]), "classes": classes}
    bias, weighted, ids = draw.random() < 0.5, draw.random() < 0.5, draw.choice([None, 1, 3])
    case = with_ids(place, *lead, ids=ids or 1, bias=bias, weighted=weighted, **sizes)
    case["selected"] = None if ids is None else case["selected"]
    ignored = torch.rand(lead, device=place.device) < draw.choice([0.0, 0.05, 0.5])
    case["target"].clamp_(min=0).masked_fill_(ignored, options["ignore_index"])
    names = NUMBERS if ids is not None else NUMBERS[:-1]
    upstreams = upstreams_of(case, tuple(draw.sample(names, draw.randint(1, len(names)))), **options)
    trained = [name for name in ("linear_weight", "linear_bias") if case[name] is not None and draw.random() < 0.7]
    how = {
        "trained": ("input", *trained),
        "skip_ignored": draw.choice([None, True, False]),
        "chunk_size": draw.choice([None, 1, 4, 16]),
        "create_graph": form == "create_graph",
    }
    return case, upstreams, options, how


def check_drawn(place: Place, seed: int, form: str) -> None:
    """Parts and gradients in float64; rows that are skipped have none of both, whatever they hold."""
    case, upstreams, options, how = drawn_call(place, seed, form)
    target, shift = case["target"], options["shift"]
    skipped = (target == options["ignore_index"]) & (how["skip_ignored"] is True)
    hidden = skipped[..., 1:] if shift else skipped

    def of_counted(values: Tensor) -> Tensor:
        mask = hidden if values.dim() == hidden.dim() else hidden.unsqueeze(-1)
        return values.masked_fill(mask, 0) if values.dim() else values

    counted = {name: of_counted(upstream) for name, upstream in upstreams.items()}
    exact = run(plain, case, counted, trained=how["trained"], **options)
    x = case["input"].clone()
    (x[..., :-1, :] if shift else x)[hidden] = torch.nan
    function: Any = linear_cross_entropy_with_statistics
    if form == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    ours = run(function, {**case, "input": x}, upstreams, **how, **options, **EVERY)
    assert ours.keys() == exact.keys()
    for name, part in ours.items():
        right = exact[name] if "gradient" in name else of_counted(exact[name])
        torch.testing.assert_close(
            part, right, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda words, name=name: f"{seed} {name}: {words}"
        )


@pytest.mark.parametrize(
    ("form", "seeds"), [("by chunks", range(40)), ("create_graph", range(20)), ("compiled", range(3))], ids=str
)
def test_random_calls(place: Place, form: str, seeds: range) -> None:
    for seed in seeds:
        check_drawn(place, seed, form)


@pytest.mark.parametrize("skip_ignored", [None, True])
def test_no_row_counts(place: Place, skip_ignored: bool | None) -> None:
    case = with_ids(place)
    case["target"].fill_(-100)
    parts = linear_cross_entropy_with_statistics(**case, reduction="sum", skip_ignored=skip_ignored, **EVERY)
    assert float(parts.loss) == 0
    assert not parts.correct.any()
    assert parts.selected.shape == case["selected"].shape


@pytest.mark.parametrize("trained", [("input",), ("linear_weight",), ("linear_bias",)], ids=str)
def test_four_products_and_nothing_for_the_frozen(place: Place, trained: tuple[str, ...]) -> None:
    case = make(place, 12, bias=True)
    leaves = [case[name].requires_grad_() for name in trained]
    case["target"].clamp_(min=0)

    def step() -> None:
        parts = linear_cross_entropy_with_statistics(**case, entropy=True, chunk_size=6)
        torch.autograd.grad(parts.loss + parts.entropy.sum(), leaves)

    frozen_head = 2 * (2 + (trained != ("linear_bias",)))  # chunks × (logits twice, and a product of the gradient)
    assert products(step) == frozen_head
    with torch.no_grad():
        assert products(lambda: linear_cross_entropy_with_statistics(**case, entropy=True, chunk_size=6)) == 2


def test_rows_without_an_upstream_gradient_are_left_out_of_the_backward_pass(place: Place) -> None:
    """Where the host knows them: on a CPU."""
    case = make(place, 12)
    case["input"].requires_grad_()
    parts = linear_cross_entropy_with_statistics(**case, lse=True, chunk_size=3, skip_ignored=True)
    upstream = torch.zeros_like(parts.lse)
    upstream[4] = 1.0
    assert products(lambda: torch.autograd.grad(parts.lse, case["input"], upstream)) == 2


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_gradcheck_and_gradgradcheck(place: Place, options: dict[str, Any]) -> None:
    case = with_ids(place, 4, dtype=torch.float64, features=3, classes=6, bias=True)
    names = ("input", "linear_weight", "linear_bias")

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        parts = linear_cross_entropy_with_statistics(
            **{**case, **dict(zip(names, tensors, strict=True))}, chunk_size=3, **options, **EVERY
        )
        return tuple(getattr(parts, name) for name in NUMBERS)

    tensors = [case[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_and_two_backward_passes(place: Place, use_reentrant: bool) -> None:
    case = with_ids(place, bias=True)
    x = case.pop("input").requires_grad_()

    def call(x: Tensor) -> Tensor:
        parts = linear_cross_entropy_with_statistics(x * 2, **case, chunk_size=4, entropy=True)
        return parts.loss + (parts.entropy * parts.selected.sum(-1)).mean()

    check_again(call, x, use_reentrant)


@pytest.mark.parametrize("before", [None, 1.0])
def test_accumulate_grad(place: Place, before: float | None) -> None:
    case = with_ids(place)
    head = case["linear_weight"].requires_grad_()

    def step(accumulate_grad: bool) -> Tensor:
        head.grad = None if before is None else torch.full_like(head, before)
        parts = linear_cross_entropy_with_statistics(
            **case, chunk_size=4, entropy=True, accumulate_grad=accumulate_grad
        )
        (parts.loss + parts.entropy.sum() + parts.selected.mean()).backward()
        return head.grad

    torch.testing.assert_close(step(True), step(False), rtol=1e-5, atol=1e-6)


def test_float16_with_a_loss_scale(place: Place) -> None:
    """Gradients that float16 could not hold without the scale: none is flushed."""
    case = make(place, 64, features=4, classes=512)
    case["target"].random_(512)

    def under(**arguments: Any) -> LossStatistics:
        with torch.autocast(place.device.type, dtype=torch.float16):
            return linear_cross_entropy_with_statistics(**arguments, chunk_size=32, entropy=True)

    upstreams = {name: torch.tensor(8192.0, device=place.device) for name in ("loss",)}
    ours, exact = run(under, case, upstreams), run(plain, case, upstreams, torch.float64)
    assert ours["loss"].dtype == torch.float32
    for name in ("gradient of input", "gradient of linear_weight"):
        assert (ours[name].double() - exact[name]).norm() <= 2e-3 * exact[name].norm(), name


@pytest.mark.parametrize("options", [{}, {"reduction": "none", "label_smoothing": 0.1, "shift": True}], ids=str)
def test_compiled_in_one_graph(place: Place, options: dict[str, Any], fresh_compiler: None) -> None:
    case = with_ids(place, 3, 5, bias=True, weighted=True)
    upstreams = upstreams_of(case, NUMBERS, **options)
    options = {**options, **EVERY, "chunk_size": 4}
    compiled = torch.compile(linear_cross_entropy_with_statistics, fullgraph=True, backend="aot_eager")
    ours = run(compiled, case, upstreams, **options)
    expected = run(linear_cross_entropy_with_statistics, case, upstreams, **options)
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_class_probabilities(place: Place, reduction: str) -> None:
    case = make(place, soft=True, bias=True, weighted=True)
    ids = torch.randint(CLASSES, (ROWS, 2), device=place.device)
    options = {"reduction": reduction, "lse_square_scale": 0.1, "label_smoothing": 0.1}
    parts = linear_cross_entropy_with_statistics(**case, selected=ids, chunk_size=4, **options, **EVERY)
    wide = {name: None if tensor is None else tensor.double() for name, tensor in case.items()}
    logits = F.linear(wide["input"], wide["linear_weight"], wide["linear_bias"])
    right = fastloss.cross_entropy_with_statistics(logits, wide["target"], wide["weight"], **options, **EVERY)
    right = right._replace(selected=logits.log_softmax(-1).gather(-1, ids))
    for mine, exact in zip(parts, right, strict=True):
        if exact is not None:
            torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_one_chunk_is_held() -> None:
    """Beside inputs and gradients: a chunk of logits, one of its widened exponentials, and numbers of rows."""

    def loss(**case: Any) -> Tensor:
        parts = linear_cross_entropy_with_statistics(**case, chunk_size=50, entropy=True)
        return parts.loss - parts.entropy.mean()

    assert held_by(loss) <= 2 * 50 * 4000 * 4 + 256 * 600


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a list": ({"selected": [1, 2]}, TypeError, "selected must be a Tensor of classes or None, got list"),
    "floats": (
        {"selected": torch.zeros(ROWS, 2)},
        ValueError,
        r"selected is torch.float32 of shape \(11, 2\); expected classes in int64, int32 or uint8",
    ),
    "other rows": (
        {"selected": torch.zeros(3, 2).long()},
        ValueError,
        r"of shape \(3, 2\); expected .* for each of input's rows \(11,\)",
    ),
    "out of bounds": (
        {"selected": torch.full((ROWS, 1), CLASSES)},
        IndexError,
        r"selected\[\d+, \d\] is 37, which is out of bounds: expected a class in \[0, 37\)",
    ),
    "a number": ({"entropy": 1}, TypeError, "entropy is 1; expected True or False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    arguments, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        linear_cross_entropy_with_statistics(**make(Place("eager", CPU)), **arguments)


def test_a_head_of_several_dimensions_is_refused() -> None:
    x, w, t = torch.randn(3, 5), torch.randn(4, 2, 5), torch.zeros(3, 2).long()
    with pytest.raises(ValueError, match=r"K-dimensional loss; expected \(C, D\)"):
        linear_cross_entropy_with_statistics(x, w, t)


def test_a_class_out_of_bounds_where_nobody_looks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number is NaN, its gradient 0, and the others' are as they are."""
    case = with_ids(place)
    case["selected"][3, 0], case["selected"][4, 1] = CLASSES, -1
    monkeypatch.setattr(choice, "may_look", lambda tensor: False)
    case["input"].requires_grad_()
    parts = linear_cross_entropy_with_statistics(**case, chunk_size=4)
    (gradient,) = torch.autograd.grad(parts.selected.nansum(), case["input"])
    assert parts.selected.isnan().nonzero().tolist() == [[3, 0], [4, 1]]
    assert gradient.isfinite().all()
