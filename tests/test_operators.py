"""``torch.compile``: one graph, custom operators for both backends, and torch's own checks of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastloss import (
    CrossEntropyLoss,
    accuracy,
    cross_entropy,
    cross_entropy_with_accuracy,
    linear_cross_entropy,
    use_backend,
)
from fastloss.loss import compiled as operators

pytestmark = pytest.mark.backend_agnostic

KINDS = ["labels", "probabilities"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def targets(kind: str, n: int, classes: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    if kind == "labels":
        labels = torch.randint(classes, (n,), device=device)
        labels[::5] = -100
        return labels
    return torch.rand(n, classes, device=device).to(dtype)


def operator_names(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_any_batch_size(place: Place, kind: str) -> None:
    """``fullgraph``, this package's own operator in it, and no second compilation when the batch changes."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(x: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(cross_entropy_with_accuracy(x @ w, t, label_smoothing=0.1))  # type: ignore[return-value]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=keep)
    for n in (6, 17, 9, 40):
        x, t = torch.randn(n, 5, device=place.device), targets(kind, n, 30, place.device)
        w = torch.randn(5, 30, device=place.device, requires_grad=True)
        loss, share = compiled(x, w, t)
        expected, expected_share = step(x, w, t)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(share, expected_share)
        torch.testing.assert_close(torch.autograd.grad(loss, w), torch.autograd.grad(expected, w))
    assert len(graphs) == 1
    assert any("fastloss" in name for name in operator_names(graphs[0]))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_has_torch_s_operators_alone(place: Place, strict: bool) -> None:
    """It may be loaded where this package is not."""
    logits, target = torch.randn(6, 30, device=place.device), targets("labels", 6, 30, place.device)
    exported = torch.export.export(CrossEntropyLoss(), (logits, target), strict=strict)
    assert not any("fastloss" in name for name in operator_names(exported.graph_module))
    torch.testing.assert_close(exported.module()(logits, target), F.cross_entropy(logits, target))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_through_the_compilers_autograd(place: Place, dtype: torch.dtype, reduction: str, kind: str) -> None:
    """AOTAutograd traces the operators' derivative; ignored rows have a loss of 0, not what lay in memory."""
    logits, t = torch.randn(12, 21, device=place.device).to(dtype), targets(kind, 12, 21, place.device, dtype)
    upstream = torch.randn(12 if reduction == "none" else (), device=place.device)

    def step(x: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(x * 2, t, reduction=reduction, lse_square_scale=0.01)

    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        x = logits.clone().requires_grad_()
        loss = function(x, t)
        results.append((loss.detach(), torch.autograd.grad(loss, x, upstream.to(loss.dtype))[0]))
    (ours, gradient), (eager, eager_gradient) = results
    assert ours.dtype == eager.dtype
    torch.testing.assert_close(ours, eager)
    if kind == "labels" and reduction == "none":
        assert not ours[::5].any()
    torch.testing.assert_close(gradient, eager_gradient)


@pytest.mark.slow
def test_inductor_trains(place: Place) -> None:
    """A compiled training step, module and all, gives the uncompiled one's losses."""
    torch.manual_seed(0)
    models = [nn.Linear(8, 12, device=place.device)]
    models.append(copy.deepcopy(models[0]))
    loss = CrossEntropyLoss(label_smoothing=0.1)
    x, t = torch.randn(20, 8, device=place.device), targets("labels", 20, 12, place.device)
    losses = []
    for model, compiled in zip(models, (False, True), strict=True):

        def step(x: Tensor, t: Tensor, model: nn.Module = model) -> Tensor:
            return loss(model(x), t)

        run = torch.compile(step, fullgraph=True, backend="inductor" if place.name == "eager" else "aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            value = (run if compiled else step)(x, t)
            value.backward()
            optimizer.step()
            losses[-1].append(value.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_without_a_gradient_and_accuracy_alone(place: Place) -> None:
    x, t = torch.randn(6, 2, 7, device=place.device).transpose(1, 2), torch.randint(7, (6, 2), device=place.device)

    def evaluate(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(x, t, reduction="none"), accuracy(x, t)

    with torch.no_grad():
        for ours, expected in zip(
            torch.compile(evaluate, fullgraph=True, backend="aot_eager")(x, t), evaluate(x, t), strict=True
        ):
            torch.testing.assert_close(ours, expected)


def test_a_label_out_of_bounds_still_raises() -> None:
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"target\[1\] is 9"):
        compiled(torch.randn(3, 5), torch.tensor([0, 9, 1]))


@pytest.mark.parametrize("name", ["lse_square_scale", "softcap", "label_smoothing", "logit_scale", "temperature"])
@pytest.mark.parametrize("kind", [*KINDS, "linear"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_graphs_serve_all_values_of_an_option(name: str, kind: str, reduction: str) -> None:
    """One of the first value, as a constant, and one that takes the value as an argument."""
    counter = CompileCounterWithBackend("aot_eager")
    head = torch.randn(7, 33)

    def evaluate(x: Tensor, t: Tensor, value: float) -> Tensor:
        options: Any = {name: value, "reduction": reduction}
        if kind == "linear":
            return linear_cross_entropy(x, head, t, **options)
        return cross_entropy(x, t, **options)

    compiled = torch.compile(evaluate, fullgraph=True, backend=counter)
    for i in range(1, 5):
        x = torch.randn(6, 33, requires_grad=True)
        t = torch.rand(6, 33) if kind == "probabilities" else torch.randint(7, (6,))
        results = []
        for function in (compiled, evaluate):
            loss = function(x, t, 0.1 * i)
            results.append((loss, *torch.autograd.grad(loss.sum(), x)))
        torch.testing.assert_close(*results)
    assert counter.frame_count == 2


def test_function_transforms_inside_a_compiled_program(place: Place) -> None:
    x, t = torch.randn(4, 6, device=place.device), torch.randint(6, (4,), device=place.device)
    compiled = torch.compile(torch.func.grad(lambda x: cross_entropy(x, t)), backend="aot_eager")
    torch.testing.assert_close(compiled(x), torch.func.grad(lambda x: F.cross_entropy(x, t))(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(place: Place, weighted: bool, reduction: str, kind: str) -> None:
    """torch's own: schema, autograd registration, fake results, and AOTAutograd with symbolic shapes."""
    for shape in ((7, 11), (2, 5, 3), (6,)):
        x = torch.randn(shape, device=place.device, requires_grad=True)
        rows = x.numel() // (shape[0] if len(shape) == 1 else shape[1])
        if kind == "labels":
            t, needs = torch.randint(5, (rows,), device=place.device), False
        else:
            t, needs = torch.rand(shape, device=place.device, requires_grad=True), True
        classes = shape[0] if len(shape) == 1 else shape[1]
        w = torch.rand(classes, device=place.device) if weighted else None
        packed = (-100, 0.1, reduction, 0.0, None, [1, 3] if kind == "labels" else [], True)
        torch.library.opcheck(operators.forward, (x, t, w, *packed, torch.float32, True, needs))
        torch.library.opcheck(operators.forward, (x.detach(), t.detach(), w, *packed, torch.float32, False, False))
        numbers = torch.tensor([0.1, 0.0, 1.0], dtype=torch.float64)
        torch.library.opcheck(operators.forward, (x, t, w, *packed, torch.float32, True, needs, numbers))
        if reduction == "none":
            with torch.no_grad():
                _, _, _, _, scale, kept = operators.forward(x, t, w, *packed, torch.float32, True, needs)
                upstream = torch.randn(rows, device=place.device)
                torch.library.opcheck(operators.backward, (upstream, x, t, w, scale, kept, *packed, True, needs))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_probabilities_as_input(place: Place, reduction: str) -> None:
    ys, ts = torch.rand(6, 5, device=place.device), torch.rand(6, 5, device=place.device)
    for t in (ts, torch.randint(5, (6,), device=place.device)):
        results = []
        for function in (torch.compile(cross_entropy, fullgraph=True, backend="aot_eager"), cross_entropy):
            y = ys.clone().requires_grad_()
            loss = function(y, t, reduction=reduction, from_logits=False)
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), y)[0]))
        torch.testing.assert_close(*results)


def test_no_second_derivative_is_an_error(place: Place) -> None:
    """Not a wrong number: whoever needs one calls the loss uncompiled."""
    for reduction in ("mean", "none"):
        x = torch.randn(6, 5, device=place.device, requires_grad=True)
        compiled = torch.compile(cross_entropy, fullgraph=True, backend="eager")
        loss = compiled(x, torch.arange(6, device=place.device) % 5, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, x, create_graph=True)


def test_backward_by_the_backend_of_the_forward_pass() -> None:
    x, t = torch.randn(6, 5, requires_grad=True), torch.arange(6) % 5
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(F.cross_entropy(x, t, reduction="none").sum(), x)[0]
    for first, second in (("eager", "triton"), ("triton", "eager")):
        if not torch.cuda.is_available():
            torch._dynamo.reset()
            with use_backend(first):
                loss = compiled(x, t, reduction="none").sum()
            with use_backend(second):
                torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_compiled_autograd_goes_around_the_backends() -> None:
    x, t = torch.randn(6, 5, requires_grad=True), torch.rand(6, 5)
    with use_backend("eager"):
        loss = cross_entropy(x * 1, t, reduction="none").sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            loss.backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(F.cross_entropy(x, t, reduction="sum"), x)[0])
