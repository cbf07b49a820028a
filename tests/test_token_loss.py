"""``linear_token_loss``: losses of tokens from hidden states, each beside its plain form in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from places import Place
from test_clients import recipe
from test_linear import (
    CLASSES,
    NAMES,
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

from fastloss import TokenLoss, linear_cross_entropy, linear_token_loss

pytestmark = pytest.mark.backend_agnostic


RECIPE = recipe("Losses of tokens")(__name__=__name__)  # a compiler looks for the module
grpo, ppo = RECIPE["grpo"], RECIPE["ppo"]


def dft(log_probs: Tensor, entropy: Tensor | None, *_: Tensor) -> Tensor:
    return RECIPE["dynamic_fine_tuning"](log_probs, entropy)


def penalty(log_probs: Tensor, entropy: Tensor | None, old: Tensor, reference: Tensor, advantages: Tensor) -> Tensor:
    return RECIPE["kl_penalty"](log_probs, entropy, reference)


def nonlinear(log_probs: Tensor, entropy: Tensor, old: Tensor, reference: Tensor, advantages: Tensor) -> Tensor:
    return log_probs.exp() * entropy.square() * advantages + torch.sigmoid(log_probs - old)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "GRPO": (grpo, False),
    "PPO": (ppo, True),
    "DFT": (dft, False),
    "KL penalty": (penalty, False),
    "not linear": (nonlinear, True),
}


def token_inputs(case: dict[str, Any], seed: int = 1) -> list[Tensor]:
    """Old log-probabilities, the reference's, and advantages; near the ones at hand, so that some are clipped."""
    with torch.no_grad():
        log_p = plain(**case, token_loss=dft, inputs=()).log_probs
    return [log_p + 0.3 * torch.randn_like(log_p), log_p + torch.randn_like(log_p), torch.randn_like(log_p)]


def plain(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    token_loss: Callable[..., Tensor],
    inputs: Any,
    linear_bias: Tensor | None = None,
    weight: None = None,
    reduction: str = "mean",
    softcap: float | None = None,
    entropy: bool = False,
    ignore_index: int = -100,
) -> TokenLoss:
    """The same in torch's own operators, the logits whole."""
    z = F.linear(input, linear_weight, linear_bias)
    z = z if z.dtype == torch.float64 else z.float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p, counted = z.log_softmax(-1), target != ignore_index
    of_labels = log_p.gather(-1, torch.where(counted, target, 0).unsqueeze(-1)).squeeze(-1)
    h = -(log_p.exp() * log_p).sum(-1) if entropy else None
    rows = torch.where(counted, token_loss(of_labels, h, *(each.to(z.dtype) for each in inputs)), 0.0)
    loss = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / counted.sum()}[reduction]
    return TokenLoss(loss, torch.where(counted, of_labels, 0.0), h)


def run(
    case: dict[str, Any],
    token_loss: Callable[..., Tensor],
    inputs: list[Tensor],
    upstream: Tensor | float = 1.0,
    dtype: torch.dtype | None = None,
    trained: tuple[str, ...] = NAMES,
    of: Any = "ours",
    create_graph: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Loss, log-probabilities and the gradients of those that are trained, by name."""
    tensors, leaves = with_leaves(case, dtype, trained)
    if of != "plain":
        tensors.pop("weight", None)
        x, w, t = (tensors.pop(name) for name in ("input", "linear_weight", "target"))
        function = linear_token_loss if of == "ours" else of
        result = function(x, w, t, token_loss, *inputs, **tensors, **options)
    else:
        result = plain(**tensors, token_loss=token_loss, inputs=inputs, **options)
    upstream = torch.as_tensor(upstream, device=result.loss.device).to(result.loss.dtype).expand_as(result.loss)
    gradients = torch.autograd.grad(result.loss, list(leaves.values()), upstream, create_graph=create_graph)
    found = {"loss": result.loss.detach(), "log_probs": result.log_probs.detach()}
    return found | dict(zip(leaves, gradients, strict=True))


def check(
    case: dict[str, Any],
    name: str,
    upstream: Tensor | float = 1.0,
    how: dict[str, Any] | None = None,
    ulps: float = 8.0,
    **options: Any,
) -> None:
    """Against torch's operators, in the same dtype and in float64."""
    token_loss, entropy = FUNCTIONS[name]
    inputs, options = token_inputs(case), {**options, "entropy": entropy}
    ours = run(case, token_loss, inputs, upstream, **options, **(how or {}))
    theirs = run(case, token_loss, inputs, upstream, of="plain", **options)
    exact = run(case, token_loss, inputs, upstream, torch.float64, of="plain", **options)
    assert_no_worse(ours, theirs, exact, ulps)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_plain_form(place: Place, dtype: torch.dtype, name: str, reduction: str) -> None:
    """Loss, log-probabilities and all gradients; some rows are ignored, and chunks do not divide the rows."""
    if place.interpreted and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds bfloat16 by its own rules")
    upstream = torch.rand(ROWS if reduction == "none" else (), device=place.device) + 0.5
    case = make(place, dtype=dtype, bias=True)
    ulps = 64.0 if dtype == torch.float64 else 8.0
    check(case, name, upstream, {"chunk_size": 4}, ulps, reduction=reduction)


@pytest.mark.parametrize("name", ["GRPO", "PPO"])
@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"ignore_index": 5}], ids=str)
@pytest.mark.parametrize("lead", [(7,), (2, 3, 4)], ids=str)
def test_options_and_leading_dimensions(
    place: Place, lead: tuple[int, ...], options: dict[str, Any], name: str
) -> None:
    case = make(place, *lead)
    if "ignore_index" in options:
        case["target"].clamp_(min=5)
    check(case, name, how={"chunk_size": 5}, **options)


def test_minus_log_p_is_the_cross_entropy(place: Place) -> None:
    case = make(place, bias=True)
    del case["weight"]
    leaves = [case[name].requires_grad_() for name in ("input", "linear_weight", "linear_bias")]
    x, w, t = (case[name] for name in ("input", "linear_weight", "target"))
    ours = linear_token_loss(x, w, t, lambda log_p, _: -log_p, linear_bias=case["linear_bias"], chunk_size=4).loss
    theirs = linear_cross_entropy(**case, chunk_size=4)
    torch.testing.assert_close(ours, theirs)
    for mine, right in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own_shape", [False, True])
def test_shift(place: Place, own_shape: bool) -> None:
    """The token inputs stand where the labels stand, or have the shape of the result."""
    case = make(place, 3, 5)
    x, t = case["input"].clone().requires_grad_(), case["target"]
    cut = {**case, "input": case["input"][:, :-1].reshape(-1, 5), "target": t[:, 1:].reshape(-1)}
    inputs = [each.view(3, 4) for each in token_inputs(cut)]
    given = inputs if own_shape else [F.pad(each, (1, 0), value=torch.nan) for each in inputs]
    ours = linear_token_loss(x, case["linear_weight"], t, ppo, *given, entropy=True, shift=True, chunk_size=4)
    assert ours.log_probs.shape == ours.entropy.shape == (3, 4)
    flat = [each.reshape(-1) for each in inputs]
    right = run(cut, ppo, flat, trained=("input",), of="plain", entropy=True)
    torch.testing.assert_close(ours.loss.detach(), right["loss"])
    torch.testing.assert_close(ours.log_probs.reshape(-1), right["log_probs"])
    (gradient,) = torch.autograd.grad(ours.loss, x)
    torch.testing.assert_close(gradient[:, :-1].reshape(-1, 5), right["input"])


@pytest.mark.parametrize("skip_ignored", [None, False, True])
def test_padding_may_hold_nan(place: Place, skip_ignored: bool | None) -> None:
    """In the hidden states and in the token inputs; log p and entropy are 0 there."""
    case = make(place, bias=True)
    ignored, inputs = case["target"] == -100, token_inputs(case)
    expected = run(case, ppo, inputs, of="plain", entropy=True)
    case["input"][ignored] = torch.nan
    for each in inputs:
        each[ignored] = torch.nan
    ours = run(case, ppo, inputs, entropy=True, skip_ignored=skip_ignored, chunk_size=4)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert (ours["input"][ignored] == 0).all()


def check_drawn(place: Place, seed: int, form: str) -> None:
    """Loss, numbers and gradients in float64; ignored tokens have none, whatever they hold."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    lead, shift = draw.choice([((3,), False), ((17,), False), ((40,), False), ((2, 9), False), ((2, 9), True)])
    case = make(place, *lead, dtype=torch.float64, classes=draw.choice([2, 5, 33]), bias=draw.random() < 0.5)
    del case["weight"]
    ignore_index = draw.choice([-100, 1])
    ignored = torch.rand(lead, device=place.device) < draw.choice([0.0, 0.05, 0.5])
    case["target"].clamp_(min=0).masked_fill_(ignored, ignore_index)
    token_loss, entropy = FUNCTIONS[draw.choice(list(FUNCTIONS))]
    options = {"entropy": entropy, "reduction": draw.choice(REDUCTIONS), "ignore_index": ignore_index}
    options["softcap"] = draw.choice([None, 2.5])
    inputs = [torch.randn(lead, device=place.device).double() - 1 for _ in range(3)]
    trained = ("input", *(name for name in ("linear_weight", "linear_bias") if draw.random() < 0.7))
    cut, moved = dict(case), inputs
    if shift:
        cut |= {"input": case["input"][:, :-1], "target": case["target"][:, 1:]}
        moved = [each[:, 1:] for each in inputs]
    counted = cut["target"] != ignore_index
    upstream = torch.randn(cut["target"].shape if options["reduction"] == "none" else (), dtype=torch.float64)
    exact = run(cut, token_loss, moved, upstream, trained=trained, of="plain", **options)
    for each, hidden in ((cut["input"], ~counted), *((each, ~counted) for each in moved)):
        each[hidden] = torch.nan  # views of what is given
    function: Any = linear_token_loss
    if form == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    how = {"skip_ignored": draw.choice([None, True, False]), "chunk_size": draw.choice([None, 1, 4, 16])}
    ours = run(case, token_loss, inputs, upstream, trained=trained, of=function, create_graph=form == "create_graph",
               shift=shift, **how, **options)  # fmt: skip
    if shift:
        assert (ours["input"][:, -1] == 0).all()
        ours["input"] = ours["input"][:, :-1]
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, exact[name], rtol=1e-8, atol=1e-8, equal_nan=True, msg=lambda w, name=name: f"{seed} {name}: {w}"
        )


@pytest.mark.parametrize(
    ("form", "seeds"), [("by chunks", range(30)), ("create_graph", range(15)), ("compiled", range(2))], ids=str
)
def test_random_calls(place: Place, form: str, seeds: range) -> None:
    for seed in seeds:
        check_drawn(place, seed, form)


def test_no_row_counts(place: Place) -> None:
    case = make(place)
    case["target"].fill_(-100)
    x = case["input"].requires_grad_()
    result = linear_token_loss(x, case["linear_weight"], case["target"], ppo, *[torch.zeros(ROWS)] * 3, entropy=True,
                               reduction="sum", skip_ignored=True)  # fmt: skip
    assert float(result.loss) == 0
    assert (result.log_probs == 0).all()
    assert (torch.autograd.grad(result.loss, x)[0] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("skip_ignored", [None, False, True])
def test_gradients_are_none_where_no_token_counts(place: Place, skip_ignored: bool | None, reduction: str) -> None:
    """Though a mean is NaN then."""
    for dtype in (torch.float32, torch.float16):
        case = make(place, dtype=dtype)
        leaves = [case[name].requires_grad_() for name in ("input", "linear_weight")]
        case["target"].fill_(-100)
        result = linear_token_loss(*leaves, case["target"], dft, reduction=reduction, skip_ignored=skip_ignored)
        assert bool(result.loss.isnan().all()) == (reduction == "mean")
        assert all(not gradient.any() for gradient in torch.autograd.grad(result.loss.sum(), leaves))


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 3), ({"reduction": "sum"}, 3), ({"reduction": "none"}, 4), ({"accumulate_grad": True}, 4)],
    ids=str,
)
def test_products(place: Place, options: dict[str, Any], expected: int) -> None:
    """Three, where the gradient is written in the forward pass."""
    case = make(place, 12)
    case["target"].clamp_(min=0)
    x, w = (case[name].requires_grad_() for name in ("input", "linear_weight"))

    def step() -> None:
        linear_token_loss(x, w, case["target"], dft, chunk_size=6, **options).loss.sum().backward()

    assert products(step) == 2 * expected


def test_one_chunk_is_held() -> None:
    def loss(**case: Any) -> Tensor:
        case.pop("weight")
        return linear_token_loss(**case, token_loss=dft, chunk_size=50).loss

    assert held_by(loss) <= 2 * 50 * 4000 * 4 + 256 * 600


def test_the_function_is_called_once_a_chunk_and_its_results_have_no_graph(place: Place) -> None:
    case, calls = make(place, 10), []

    def counted(log_probs: Tensor, entropy: Tensor, number: Tensor) -> Tensor:
        calls.append((log_probs.shape, number.tolist(), entropy is not None, log_probs.requires_grad))
        return -log_probs * number

    case["target"].clamp_(min=0)
    x, number = case["input"].requires_grad_(), torch.arange(10.0, device=place.device)
    result = linear_token_loss(x, case["linear_weight"], case["target"], counted, number, entropy=True, chunk_size=4)
    result.loss.backward()
    assert [(shape[0], numbers[0], given, graph) for shape, numbers, given, graph in calls] == [
        (4, 0.0, True, True),
        (4, 4.0, True, True),
        (2, 8.0, True, True),
    ]
    assert not result.log_probs.requires_grad
    assert not result.entropy.requires_grad
    with torch.no_grad():
        again = linear_token_loss(x, case["linear_weight"], case["target"], counted, number, chunk_size=4)
    torch.testing.assert_close(again.loss, result.loss.detach())
    assert again.entropy is None


@pytest.mark.parametrize("name", ["PPO", "not linear"])
def test_gradcheck_and_gradgradcheck(place: Place, name: str) -> None:
    case = make(place, 5, dtype=torch.float64, features=3, classes=6, bias=True)
    token_loss, entropy = FUNCTIONS[name]
    inputs = token_inputs(case)

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_token_loss(
            x, w, case["target"], token_loss, *inputs, linear_bias=b, entropy=entropy, chunk_size=3
        ).loss

    tensors = [case[each].requires_grad_() for each in ("input", "linear_weight", "linear_bias")]
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_and_two_backward_passes(place: Place, use_reentrant: bool) -> None:
    case = make(place)
    inputs, x = token_inputs(case), case["input"].requires_grad_()

    def call(x: Tensor) -> Tensor:
        return linear_token_loss(x * 2, case["linear_weight"], case["target"], grpo, *inputs, chunk_size=4).loss

    check_again(call, x, use_reentrant)


def test_accumulate_grad(place: Place) -> None:
    case = make(place)
    inputs, head = token_inputs(case), case["linear_weight"].requires_grad_()

    def step(accumulate_grad: bool) -> Tensor:
        head.grad = torch.ones_like(head)
        linear_token_loss(
            case["input"], head, case["target"], grpo, *inputs, chunk_size=4, accumulate_grad=accumulate_grad
        ).loss.backward()
        return head.grad

    torch.testing.assert_close(step(True), step(False), rtol=1e-5, atol=1e-6)


def test_float16_with_a_loss_scale(place: Place) -> None:
    """Gradients that float16 could not hold without the scale: none is flushed."""
    case = make(place, 64, features=4, classes=512)
    case["target"].random_(512)
    inputs = token_inputs(case)
    with torch.autocast(place.device.type, dtype=torch.float16):
        ours = run(case, penalty, inputs, 4096.0, chunk_size=32)
    exact = run(case, penalty, inputs, 4096.0, torch.float64, of="plain")
    assert ours["loss"].dtype == torch.float32
    for name in ("input", "linear_weight"):
        assert (ours[name].double() - exact[name]).norm() <= 2e-3 * exact[name].norm(), name


@pytest.mark.parametrize("name", ["GRPO", "PPO"])
def test_compiled_in_one_graph(place: Place, name: str, fresh_compiler: None) -> None:
    case = make(place, 3, 5)
    token_loss, entropy = FUNCTIONS[name]
    inputs, x, w = token_inputs(case), case["input"].requires_grad_(), case["linear_weight"].requires_grad_()

    def call(x: Tensor, w: Tensor) -> TokenLoss:
        return linear_token_loss(x, w, case["target"], token_loss, *inputs, entropy=entropy, chunk_size=4)

    ours, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(x, w), call(x, w)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.log_probs, expected.log_probs)
    for mine, right in zip(
        torch.autograd.grad(ours.loss, (x, w)), torch.autograd.grad(expected.loss, (x, w)), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


def test_symbolic_traces_hold_no_functions() -> None:
    """A graph of torch.fx may hold a call of a function around it."""
    x, w, t = torch.randn(3, 5), torch.randn(CLASSES, 5), torch.zeros(3).long()
    with pytest.raises(TypeError, match=r"torch\.fx\.symbolic_trace, whose graphs hold no function"):
        torch.fx.symbolic_trace(lambda x, w, t: linear_token_loss(x, w, t, dft).loss)
    wrapped = torch.fx.symbolic_trace(lambda x, w, t: dft_loss(x, w, t))
    torch.testing.assert_close(wrapped(x, w, t), dft_loss(x, w, t))


@torch.fx.wrap
def dft_loss(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return linear_token_loss(x, w, t, dft).loss


TRAINED = torch.ones(3, requires_grad=True)
ONES = torch.ones(ROWS)


REFUSED: dict[str, tuple[Any, tuple[Any, ...], type[Exception], str]] = {
    "a mean": (lambda p, h: p.mean(), (), ValueError, r"float32 of shape \(\); expected a .* of shape \(11,\)"),
    "no tensor": (lambda p, h: 3.0, (), ValueError, r"token_loss returned 3.0; expected .* of shape \(11,\)"),
    "no graph": (lambda p, h: p.detach(), (), RuntimeError, "without a graph; expected a function of log_probs"),
    "a parameter": (
        lambda p, h: p * TRAINED.sum(),
        (),
        RuntimeError,
        r"requires grad, or one that is made of it: torch.float32 of shape \(3,\)",
    ),
    "tokens mixed": (lambda p, h: p - p.mean(), (), RuntimeError, "token_loss mixes tokens"),
    "neighbours": (lambda p, h: p * p.roll(1), (), RuntimeError, "token_loss mixes tokens"),
    "no function": (3, (), TypeError, r"token_loss is 3; expected a function of \(log_probs, entropy"),
    "a number": (dft, (2.0,), TypeError, r"token input 0 is a float; expected a Tensor of target's shape \(11,\)"),
    "a short one": (dft, (ONES, ONES[:3]), ValueError, r"token input 1 has shape \(3,\); expected \(11,\)"),
    "a write": (lambda p, h, a: -p * a.mul_(2), (ONES.clone(),), RuntimeError, "token_loss writes to token input 0"),
    "a write to log p": (lambda p, h: p.clamp_(max=-1), (), RuntimeError, "token_loss writes to log_probs"),
    "of one argument": (
        lambda p: p,
        (ONES,),
        TypeError,
        r"takes \(p\); it is called with log_probs, .* 1 token inputs",
    ),
    "a leaf": (dft, (ONES.clone().requires_grad_(),), RuntimeError, "token input 0 requires grad, and gets none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(place: Place, name: str) -> None:
    token_loss, inputs, error, words = REFUSED[name]
    case = make(place)
    x = case["input"].requires_grad_()
    inputs = tuple(each.to(place.device) if isinstance(each, Tensor) else each for each in inputs)
    with pytest.raises(error, match=words):
        linear_token_loss(x, case["linear_weight"], case["target"], token_loss, *inputs, skip_ignored=False)


MIXTURES: dict[str, Any] = {
    "a mask's sum": lambda p, h, mask: -p * mask / mask.sum(),
    "a small share": lambda p, h, mask: -1e-7 * p * mask / mask.sum(),
    "the greatest": lambda p, h, mask: p * mask / mask.amax(),
    "a detached mean": lambda p, h, mask: -p * (p - p.mean()).detach(),
    "the number of tokens": lambda p, h, mask: -p / len(p),
    "places": lambda p, h, mask: p * torch.arange(1.0, len(p) + 1, device=p.device),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("name", MIXTURES)
def test_other_mixtures_are_found_where_validation_is_on(
    place: Place, name: str, chunk_size: int | None, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of one token, too."""
    case = make(place)
    case["input"].requires_grad_(trained)
    mask = torch.linspace(0.5, 1.5, ROWS, device=place.device)
    arguments, mixture = (case["input"], case["linear_weight"], case["target"]), MIXTURES[name]
    linear_token_loss(*arguments, mixture, mask)
    monkeypatch.setenv("FASTLOSS_VALIDATE", "1")
    with pytest.raises(RuntimeError, match=r"token_loss mixes tokens: it gives .* beside others"):
        linear_token_loss(*arguments, mixture, mask, chunk_size=chunk_size)
    linear_token_loss(*arguments, lambda p, h, mask: -p * mask / 3, mask, chunk_size=chunk_size)


POINTWISE: dict[str, Callable[..., Tensor]] = {
    "small differences": lambda p, h, m: 1e4 * ((p.detach() + 1e-4 * m - p).exp() - (p.detach() + 1e-4 * m - p) - 1),
    "sigmoid": lambda p, h, m: torch.sigmoid(p) ** 0.3 * h.log1p() * m.tanh(),
    "special": lambda p, h, m: torch.special.erfcx(-p) * torch.lgamma(h + 1.5) + m.sin().atan2(p),
    "dropout": lambda p, h, m: F.dropout(p, 0.5) * m,
    "infinite": lambda p, h, m: torch.where(m > 1, p / (m - m), -p),
    "whole numbers": lambda p, h, m: p * (m > 0.5) * m.long(),
    "of one chunk alone": lambda p, h, m: p * torch.arange(ROWS, device=p.device),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", POINTWISE)
def test_what_does_not_mix_tokens_is_served(
    place: Place, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of tokens; the check changes no random number and no argument of the caller."""
    monkeypatch.setenv("FASTLOSS_VALIDATE", "1")
    for rows, chunk_size in ((ROWS, None), (1, None), (2, 1), (77, None), (77, 75), (300, 130)):
        if name == "of one chunk alone" and rows != ROWS:
            continue
        case = make(place, rows, dtype=dtype)
        case["target"].clamp_(min=0)
        inputs = torch.randn(rows, device=place.device, dtype=dtype)
        before, x = inputs.clone(), case["input"].requires_grad_()

        def plain_loss(x: Tensor, case: dict[str, Any] = case, inputs: Tensor = inputs) -> Tensor:
            log_p = F.linear(x, case["linear_weight"]).log_softmax(-1)
            h, p = -(log_p.exp() * log_p).sum(-1), log_p.gather(1, case["target"].unsqueeze(1)).squeeze(1)
            return POINTWISE[name](p * 1, h * 1, inputs.clone())

        torch.manual_seed(5)
        ours = linear_token_loss(
            x, case["linear_weight"], case["target"], POINTWISE[name], inputs, entropy=True, reduction="none",
            chunk_size=chunk_size,
        )  # fmt: skip
        after = torch.rand(1)
        assert torch.equal(inputs, before)
        torch.manual_seed(5)
        exact = plain_loss(x)
        if chunk_size is None and rows <= 256:
            assert torch.equal(after, torch.rand(1))
        if name not in ("dropout", "small differences"):
            torch.testing.assert_close(ours.loss, exact, rtol=1e-4, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(ours.log_probs, plain_log_probs(case), rtol=1e-4, atol=1e-4)


def plain_log_probs(case: dict[str, Any]) -> Tensor:
    log_p = F.linear(case["input"], case["linear_weight"]).log_softmax(-1)
    return log_p.gather(1, case["target"].unsqueeze(1)).squeeze(1).detach()


def test_other_targets_are_refused() -> None:
    x, w = torch.randn(3, 5), torch.randn(CLASSES, 5)
    with pytest.raises(ValueError, match=r"target has dtype torch.float32; expected class indices"):
        linear_token_loss(x, w, torch.rand(3, CLASSES), dft)
    with pytest.raises(ValueError, match=r"K-dimensional loss; expected \(C, D\)"):
        linear_token_loss(x, torch.randn(4, 2, 5), torch.zeros(3, 2).long(), dft)
