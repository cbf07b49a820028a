"""``logit_scale`` and ``temperature``: z = softcap(logit_scale · x) / temperature, as floats and in tensors.

Every number and gradient is held against float64, its error against that of the plain form, ``x.float() *
logit_scale`` and so on in torch's operators.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor

import fastloss
from fastloss import CrossEntropyLoss, LinearCrossEntropyLoss, cross_entropy, cross_entropy_with_statistics
from fastloss.backends.contract import compute_dtype

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 5.0},
    {"label_smoothing": 0.1, "lse_square_scale": 0.01},
    {"softcap": 7.0, "label_smoothing": 0.2, "lse_square_scale": 0.02, "reduction": "sum"},
    {"reduction": "none", "lse_square_scale": 0.01},
]
SCALES = {"both": (0.3, 2.5), "scale": (12.0, 1.0), "temperature": (1.0, 0.2)}
NUMBERS = ("loss", "z_loss", "lse", "entropy", "log_sum_sq_probs", "mean_logit")


def scales(place: Place, name: str, in_tensors: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the two arguments, and the numbers that they hold."""
    given = dict(zip(("logit_scale", "temperature"), SCALES[name], strict=True))
    if not in_tensors:
        return dict(given), given
    dtypes = {"logit_scale": torch.bfloat16, "temperature": torch.float32}
    tensors = {n: torch.tensor(value, dtype=dtypes[n], device=place.device) for n, value in given.items()}
    return dict(tensors), {n: float(tensor) for n, tensor in tensors.items()}


def plain(
    x: Tensor,
    t: Tensor,
    weight: Tensor | None,
    *,
    logit_scale: float,
    temperature: float,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Return the loss and the numbers of rows, in the dtype of the arithmetic."""
    x = x.to(compute_dtype(x.dtype)) * logit_scale
    z = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
    log_p, lse = torch.log_softmax(z, 1), torch.logsumexp(z, 1)
    weight = None if weight is None else weight.to(z.dtype)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    if not t.is_floating_point():
        of_rows = reference.loss(z, t, weight, lse_square_scale=lse_square_scale, **options)  # type: ignore[arg-type]
        without = reference.loss(z, t, weight, **options)  # type: ignore[arg-type]
    else:
        t = t.to(z.dtype)
        w = 1.0 if weight is None else weight.view(-1, *[1] * (t.dim() - 2))
        mass = (t * w).sum(1)
        rows = F.cross_entropy(z, t, weight, reduction="none", label_smoothing=label_smoothing)
        reduced: Callable[[Tensor], Tensor] = {
            "none": lambda rows: rows,
            "sum": torch.sum,
            "mean": torch.mean,
        }[reduction]
        of_rows, without = reduced(rows + lse_square_scale * mass * lse.square()), reduced(rows)
    entropy = -(log_p.exp() * log_p).sum(1)
    of_squares = {"log_sum_sq_probs": torch.logsumexp(2 * log_p, 1), "mean_logit": z.mean(1)}
    return {"loss": of_rows, "z_loss": of_rows - without, "lse": lse, "entropy": entropy, **of_squares}


def compare(
    place: Place,
    function: Callable[..., dict[str, Tensor]],
    x: Tensor,
    t: Tensor,
    weight: Tensor | None,
    arguments: dict[str, Any],
    numbers: dict[str, float],
    ulps: float = 4.0,
    **options: Any,
) -> None:
    """Hold ``function``'s results, and the gradients for random upstream gradients of all, against float64."""
    if place.interpreted and x.dtype == torch.bfloat16:
        ulps = max(ulps, 3.0)  # the interpreter rounds bfloat16 by truncation
    upstreams: dict[str, Tensor] = {}

    def evaluate(call: Callable[..., dict[str, Tensor]], dtype: torch.dtype, **given: Any) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_()]
        target = t
        if t.is_floating_point():
            target = t.detach().to(torch.promote_types(t.dtype, dtype) if dtype == torch.float64 else t.dtype)
            leaves.append(target.requires_grad_())
        w = None if weight is None else weight.to(dtype)
        results = call(leaves[0], target, w, **given, **options)
        for name, result in results.items():
            upstreams.setdefault(name, torch.randn(result.shape, dtype=torch.float64))
        given_ups = [upstreams[name].to(result) for name, result in results.items()]
        return [
            *(r.detach() for r in results.values()),
            *torch.autograd.grad(list(results.values()), leaves, given_ups),
        ]

    ours = evaluate(function, x.dtype, **arguments)
    names = list(upstreams)

    def composed(*tensors: Any, **given: Any) -> dict[str, Tensor]:
        results = plain(*tensors, **given)
        return {name: results[name] for name in names}

    theirs, exact = evaluate(composed, x.dtype, **numbers), evaluate(composed, torch.float64, **numbers)
    largest_z = float(reference.logits_of(x.detach().double(), options.get("softcap"), **numbers).abs().max())
    for name, mine, torchs, true in zip([*names, "gradient", "target's"], ours, theirs, exact, strict=False):
        largest = max(1.0, 1.0 / max(float(true.abs().max()), 1e-3)) if name in NUMBERS[1:] else 1.0
        # Twice torch's own, where a few rows' largest errors are compared.
        own = float((torchs.double() - true).abs().max())
        if x.dtype == torch.float64:  # nothing is more exact here: what a few roundings of z do to p = exp(z − lse)
            own = max(1e-13, 4 * torch.finfo(x.dtype).eps * largest_z * float(true.abs().max()))
        what = f"{name} {options} {numbers}"
        reference.assert_no_worse(mine, torchs.to(mine.dtype), true, what, ulps * largest, cancelled=own)


def labels(shape: tuple[int, ...], soft: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    if soft:
        return torch.randn(shape).softmax(1).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target.view(-1)[1] = -100
    return target


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 33), (2, 6000), (3, 5, 4)], ids=str)
@pytest.mark.parametrize("name", list(SCALES))
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("in_tensors", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients(
    place: Place,
    weighted: bool,
    in_tensors: bool,
    soft: bool,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    x, weight = (4 * torch.randn(shape)).to(dtype), (torch.rand(shape[1]) + 0.1).to(dtype) if weighted else None
    arguments, numbers = scales(place, name, in_tensors)

    def loss(x: Tensor, t: Tensor, weight: Tensor | None, **given: Any) -> dict[str, Tensor]:
        on = place.device
        return {"loss": cross_entropy(x.to(on), t.to(on), None if weight is None else weight.to(on), **given).cpu()}

    compare(place, loss, x, labels(shape, soft, dtype), weight, arguments, numbers, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 33), (2, 6000)], ids=str)
@pytest.mark.parametrize("name", list(SCALES))
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("in_tensors", [False, True], ids=["floats", "tensors"])
def test_statistics(
    place: Place,
    in_tensors: bool,
    soft: bool,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    x = (4 * torch.randn(shape)).to(dtype)
    arguments, numbers = scales(place, name, in_tensors)

    def statistics(x: Tensor, t: Tensor, weight: None, **given: Any) -> dict[str, Tensor]:
        on = place.device
        parts = cross_entropy_with_statistics(x.to(on), t.to(on), **dict.fromkeys(NUMBERS[1:], True), **given)
        return {name: getattr(parts, name).cpu() for name in NUMBERS}

    compare(place, statistics, x, labels(shape, soft, dtype), None, arguments, numbers, ulps=6.0, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("in_tensors", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_hidden_states(
    place: Place, soft: bool, in_tensors: bool, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """The gradients of hidden states and head, in chunks, are those of the loss of the logits."""
    arguments, numbers = scales(place, "both", in_tensors)
    on, target = place.device, labels((9, 21), soft, dtype)
    hidden, head = torch.randn(9, 6, dtype=dtype), torch.randn(21, 6, dtype=dtype)
    losses = {
        "ours": (lambda x, w, t: fastloss.linear_cross_entropy(x, w, t, chunk_size=4, **arguments, **options), dtype),
        "plain": (lambda x, w, t: plain(x @ w.t(), t, None, **numbers, **options)["loss"], dtype),
        "exact": (lambda x, w, t: plain(x @ w.t(), t, None, **numbers, **options)["loss"], torch.float64),
    }
    results: dict[str, list[Tensor]] = {}
    upstream = torch.randn(9 if options.get("reduction") == "none" else (), dtype=torch.float64, device=on)
    for name, (function, kind) in losses.items():
        x, w = (tensor.to(on, kind).requires_grad_() for tensor in (hidden, head))
        loss = function(x, w, target.to(on, kind) if soft else target.to(on))
        results[name] = [loss.detach(), *torch.autograd.grad(loss, (x, w), upstream.to(kind))]
    for ours, torchs, exact in zip(*results.values(), strict=True):
        reference.assert_no_worse(ours, torchs, exact, str(options), 4.0)


@pytest.mark.parametrize("in_tensors", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_second_derivatives(place: Place, soft: bool, softcap: float | None, in_tensors: bool) -> None:
    arguments, numbers = scales(place, "both", in_tensors)
    x = torch.randn(4, 6, dtype=torch.float64, device=place.device, requires_grad=True)
    t = labels((4, 6), soft, torch.float64).to(place.device)
    v = torch.randn_like(x)
    results = []
    for loss in (
        cross_entropy(x, t, softcap=softcap, **arguments),
        plain(x, t, None, softcap=softcap, **numbers)["loss"],
    ):
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad((gradient * v).sum(), x)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(3, 40), (2, 6000)], ids=str)
@pytest.mark.parametrize("function", ["loss", "statistics"])
def test_rows_of_great_negative_logits(place: Place, shape: tuple[int, int], function: str) -> None:
    """Rows that are -1e30 throughout, and classes that are masked by the least number or -inf."""
    x = torch.full(shape, -1e30, device=place.device)
    x[1:, :-5] = torch.finfo(torch.float32).min
    x[1, 0] = -torch.inf
    x[1:, -5:] = torch.randn(shape[0] - 1, 5, device=place.device)
    x.requires_grad_()
    t = torch.full(shape[:1], shape[1] - 1, device=place.device)
    options = {"logit_scale": 3.7, "temperature": 0.9, "reduction": "none"}
    if function == "loss":
        loss = cross_entropy(x, t, **options)
    else:
        loss = cross_entropy_with_statistics(x, t, lse=True, entropy=True, **options).loss
    expected = [torch.tensor(float(shape[1])).log()]
    expected += [-(x[row, -5:].detach() * (3.7 / 0.9)).log_softmax(0)[-1] for row in range(1, shape[0])]
    # In float32 lse of the first row is -1e30 and no more: its loss is lost where it is a difference of two.
    first = 0 if function == "loss" else 1
    torch.testing.assert_close(loss[first:].cpu(), torch.stack([e.cpu() for e in expected])[first:])
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert gradient.isfinite().all()


def test_one_is_what_there_is_without(place: Place) -> None:
    """1.0 gives the same bits, as a float and, but for rounding, in a tensor."""
    x, t = torch.randn(8, 50, device=place.device), torch.randint(50, (8,), device=place.device)
    results = []
    for options in ({}, {"logit_scale": 1.0, "temperature": 1}, {"temperature": torch.ones((), device=place.device)}):
        leaf = x.clone().requires_grad_()
        loss = cross_entropy(leaf, t, **options)  # type: ignore[arg-type]
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert all(map(torch.equal, *results[:2]))  # type: ignore[arg-type]
    torch.testing.assert_close(results[0], results[2])


def test_a_tensor_is_read_at_each_call(place: Place) -> None:
    """The number in a tensor may change between calls, also where calls are like earlier ones."""
    x, t = torch.randn(20, 64, device=place.device, requires_grad=True), torch.arange(20, device=place.device)
    scale, temperature = torch.ones((), device=place.device), torch.ones((), dtype=torch.float64, device=place.device)
    for number in range(6):
        scale.fill_(0.5 + number)
        temperature.fill_(2.0 - number / 4)
        other = torch.tensor(3.0 + number, device=place.device)  # another tensor for each call
        for arguments in ({"logit_scale": scale, "temperature": temperature}, {"logit_scale": other}):
            numbers = {n: float(arguments[n]) if n in arguments else 1.0 for n in ("logit_scale", "temperature")}
            for function in (cross_entropy, lambda *a, **k: cross_entropy_with_statistics(*a, lse=True, **k)[0]):
                expected = plain(x, t, None, **numbers)["loss"]
                loss = function(x, t, **arguments)  # type: ignore[arg-type]
                torch.testing.assert_close(loss, expected)
                ours, theirs = (torch.autograd.grad(value * 2, x)[0] for value in (loss, expected))
                torch.testing.assert_close(ours, theirs)


def test_a_tensor_that_is_written_to_before_backward(place: Place) -> None:
    x, t = torch.randn(4, 9, device=place.device, requires_grad=True), torch.arange(4, device=place.device)
    scale = torch.tensor(2.0, device=place.device)
    loss = cross_entropy(x, t, reduction="none", logit_scale=scale).sum()
    scale.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_accuracies_and_modules(place: Place) -> None:
    x, t = torch.randn(6, 11, device=place.device), torch.randint(11, (6,), device=place.device)
    options: dict[str, Any] = {"logit_scale": 0.25, "temperature": 3.0}
    expected = cross_entropy(x * 0.25 / 3, t)
    loss, accuracy = fastloss.cross_entropy_with_accuracy(x, t, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(accuracy, fastloss.accuracy(x, t))
    module = CrossEntropyLoss(**options)
    torch.testing.assert_close(module(x, t), expected)
    assert "logit_scale=0.25, temperature=3.0" in repr(module)
    assert "temperature" not in repr(CrossEntropyLoss())
    linear = LinearCrossEntropyLoss(11, 5, device=place.device, **options)
    logits = linear.linear(x) * 0.25 / 3
    torch.testing.assert_close(linear(x, t % 5), cross_entropy(logits, t % 5))
    loss, accuracy = fastloss.linear_cross_entropy_with_accuracy(x, linear.linear.weight, t % 5, **options)
    torch.testing.assert_close(loss, cross_entropy(logits, t % 5))
    assert "temperature=3.0" in repr(linear)


def test_tensors_of_modules_go_where_the_module_goes(place: Place) -> None:
    """They are in no ``state_dict``, copies have their own, and another number is taken in the next call."""
    modules = (
        CrossEntropyLoss(temperature=torch.tensor(2.0)),
        LinearCrossEntropyLoss(11, 5, logit_scale=torch.tensor(0.5)),
    )
    x, t = torch.randn(6, 11, device=place.device), torch.randint(5, (6,), device=place.device)
    for module, name in zip(modules, ("temperature", "logit_scale"), strict=True):
        module = module.to(place.device)
        assert getattr(module, name).device == x.device
        assert not any("temperature" in key or "logit_scale" in key for key in module.state_dict())
        assert getattr(module.to("meta"), name).is_meta
    for again in (
        copy.deepcopy(modules[0].to_empty(device=place.device)),
        CrossEntropyLoss(temperature=torch.ones(())),
    ):
        again = again.to(place.device)
        again.temperature.fill_(4.0)
        torch.testing.assert_close(again(x, t), cross_entropy(x / 4, t))


def test_the_linear_module_has_every_option_of_the_function() -> None:
    names = inspect.signature(fastloss.linear_cross_entropy).parameters.keys()
    names -= {"input", "linear_weight", "target", "linear_bias"}
    for name in names:
        LinearCrossEntropyLoss(4, 7, **{name: None})


@pytest.mark.backend_agnostic
@pytest.mark.parametrize("kind", ["labels", "probabilities", "linear"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_with_tensors(place: Place, reduction: str, kind: str) -> None:
    """The tensors are operands: one program serves all numbers."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter, head = CompileCounterWithBackend("aot_eager"), torch.randn(33, 12, device=place.device)

    def evaluate(x: Tensor, t: Tensor, scale: Tensor) -> Tensor:
        options: dict[str, Any] = {"logit_scale": scale, "temperature": 1.5, "reduction": reduction}
        if kind == "linear":
            return fastloss.linear_cross_entropy(x, head.t(), t, **options)
        return cross_entropy(x, t, **options)

    compiled = torch.compile(evaluate, fullgraph=True, backend=counter)
    for number in range(3):
        x = torch.randn(6, 33, device=place.device, requires_grad=True)
        t = torch.rand(6, 33) if kind == "probabilities" else torch.randint(12, (6,))
        results = []
        for function in (compiled, evaluate):
            loss = function(x, t.to(place.device), torch.tensor(0.5 + number, device=place.device))
            results.append((loss, *torch.autograd.grad(loss.sum(), x)))
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


def test_transforms(place: Place) -> None:
    """Function transforms go through torch's operators, also over the temperature."""
    x, t = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    temperatures = torch.tensor([0.5, 1.0, 2.0])
    loss = torch.func.vmap(lambda x, t, tau: cross_entropy(x, t, temperature=tau))(x, t, temperatures)
    expected = [F.cross_entropy(a / b, c) for a, b, c in zip(x, temperatures, t, strict=True)]
    torch.testing.assert_close(loss, torch.stack(expected))
    gradient = torch.func.grad(lambda x: cross_entropy(x, t[0], logit_scale=0.5, softcap=2.0))(x[0])
    leaf = x[0].clone().requires_grad_()
    plain(leaf, t[0], None, logit_scale=0.5, temperature=1.0, softcap=2.0)["loss"].backward()
    torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("in_tensors", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("route", ["chunks", "composed", "compiled"])
def test_numbers_of_hidden_states(place: Place, route: str, softcap: float | None, in_tensors: bool) -> None:
    """Statistics, losses of tokens and the K best classes are those of the scaled logits."""
    arguments, numbers = scales(place, "both", in_tensors)
    hidden, head = torch.randn(7, 5, device=place.device), torch.randn(23, 5, device=place.device)
    t = torch.randint(23, (7,), device=place.device)
    options: dict[str, Any] = {"softcap": softcap, **arguments}
    ids = torch.randint(23, (7, 3), device=place.device)

    def statistics(x: Tensor) -> Tensor:
        parts = fastloss.linear_cross_entropy_with_statistics(
            x, head, t, **dict.fromkeys(NUMBERS[1:], True), selected=ids, lse_square_scale=0.1, **options
        )
        return parts.loss + parts.selected.sum() + sum(getattr(parts, n).sum() for n in NUMBERS[1:])  # type: ignore

    def of_tokens(x: Tensor) -> Tensor:
        def loss(log_probs: Tensor, entropy: Tensor) -> Tensor:
            return -log_probs.exp() - 0.1 * entropy.square()

        return fastloss.linear_token_loss(x, head, t, loss, entropy=True, **options).loss

    def best(x: Tensor) -> Tensor:
        return fastloss.linear_topk_log_probs(x, head, 4, **options).log_probs

    def expected(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = reference.logits_of(x @ head.t(), softcap, **numbers)
        log_p, parts = (
            z.log_softmax(1),
            plain(x @ head.t(), t, None, softcap=softcap, lse_square_scale=0.1, **numbers),
        )
        label = log_p.gather(1, t.unsqueeze(1)).squeeze(1)
        all_parts = sum(part.sum() for part in parts.values()) + log_p.gather(1, ids).sum()
        return all_parts, (-label.exp() - 0.1 * parts["entropy"].square()).mean(), log_p.topk(4).values  # type: ignore

    def by_transform(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.func.vmap(function)(x.unsqueeze(0)).squeeze(0)

    functions: list[Callable[[Tensor], Tensor]] = [statistics, of_tokens, best]
    if route == "composed":
        functions = [by_transform(function) for function in functions]
    elif route == "compiled":
        torch.compiler.reset()
        functions = [torch.compile(best, fullgraph=True, backend="aot_eager")]
    x = hidden.clone().requires_grad_()
    for function, value in zip(functions, expected(x)[-len(functions) :], strict=True):
        ours = function(x)
        torch.testing.assert_close(ours, value.to(ours.dtype), rtol=1e-4, atol=1e-5)
        if ours.requires_grad:
            torch.testing.assert_close(
                *(torch.autograd.grad(number, x, retain_graph=True)[0] for number in (ours, value)),
                rtol=1e-4,
                atol=1e-5,
            )
