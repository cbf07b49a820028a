"""``patch_torch``: programs that call torch's loss get this package's, and torch's functions are back afterwards."""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastloss

TORCH = {name: getattr(F, name) for name in ("cross_entropy", "linear_cross_entropy") if hasattr(F, name)}
X, T = torch.randn(600, 500), torch.randint(500, (600,))  # so many logits that a fused pass serves them


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    sgd = torch.optim.SGD
    yield
    assert all(getattr(F, name) is function for name, function in TORCH.items())
    assert torch.optim.SGD is sgd


def gradient(loss: Any, x: Tensor = X) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


@pytest.mark.parametrize("rows", [8, 600, 40_000], ids=["few", "fused", "few classes"])
@pytest.mark.parametrize("soft", [False, True])
def test_a_patch_by_hand(monkeypatch: pytest.MonkeyPatch, rows: int, soft: bool) -> None:
    """``F.cross_entropy = fastloss.cross_entropy``: torch's function was bound before, and is not looked up again."""
    x = torch.randn(rows, 7 if rows == 40_000 else 500)
    t = x.softmax(1) if soft else torch.randint(x.shape[1], (rows,))
    expected = F.cross_entropy(x, t)
    with monkeypatch.context() as patched:
        patched.setattr(F, "cross_entropy", fastloss.cross_entropy)
        patched.setattr(nn, "CrossEntropyLoss", fastloss.CrossEntropyLoss)
        patched.setattr(torch.optim, "SGD", fastloss.SGD)
        if hasattr(F, "linear_cross_entropy"):
            patched.setattr(F, "linear_cross_entropy", fastloss.linear_cross_entropy)
        torch.testing.assert_close(F.cross_entropy(x, t), expected)
        torch.testing.assert_close(nn.CrossEntropyLoss()(x, t), expected)
        torch.testing.assert_close(fastloss.cross_entropy(x, t, softcap=1e9), expected)
        torch.testing.assert_close(torch.vmap(F.cross_entropy)(x, t).mean(), expected)
        (first,) = torch.autograd.grad(F.cross_entropy(y := x.clone().requires_grad_(), t), y, create_graph=True)
        torch.autograd.grad(first.square().sum(), y)
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        torch.optim.SGD([parameter], lr=0.5).step()
        assert parameter.tolist() == [0.5, 0.5]


def test_the_loss_and_its_module_follow(fused: list[tuple[int, ...]]) -> None:
    expected = F.cross_entropy(X, T, label_smoothing=0.1), gradient(lambda x: F.cross_entropy(x, T))
    module = nn.CrossEntropyLoss(label_smoothing=0.1)
    with fastloss.patch_torch() as patch:
        assert isinstance(patch, fastloss.Patch)
        assert F.cross_entropy is fastloss.cross_entropy
        torch.testing.assert_close(module(X, T), expected[0])
        torch.testing.assert_close(gradient(lambda x: F.cross_entropy(x, T)), expected[1])
    assert len(fused) == 2
    module(X, T)
    assert len(fused) == 2


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 has it")
def test_the_linear_loss_follows() -> None:
    module = nn.LinearCrossEntropyLoss(5, 500, bias=True)
    hidden = torch.randn(600, 5)
    expected = module(hidden, T)
    with fastloss.patch_torch():
        ours = module(hidden, T)
        assert "_LinearCrossEntropyBackward" in str(ours.grad_fn)
        torch.testing.assert_close(ours, expected)
        options = nn.LinearCrossEntropyOptions()
        torch.testing.assert_close(F.linear_cross_entropy(hidden, module.linear.weight, T, options=options),
                                   F.cross_entropy(hidden @ module.linear.weight.t(), T))  # fmt: skip


def test_sgd_by_choice() -> None:
    old = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with fastloss.patch_torch():
        assert torch.optim.SGD is type(old)
    with fastloss.patch_torch(sgd=True):
        assert torch.optim.SGD is fastloss.SGD
        new = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
        assert not isinstance(old, fastloss.SGD)
        assert type(pickle.loads(pickle.dumps(old))) is type(old)  # by the name where its class is defined
        assert type(pickle.loads(pickle.dumps(new))) is fastloss.SGD


def test_nested_and_in_any_order() -> None:
    first, second = fastloss.patch_torch(), fastloss.patch_torch(sgd=True)
    first.undo()
    first.undo()  # which is not the second's
    assert F.cross_entropy is fastloss.cross_entropy
    second.undo()
    assert F.cross_entropy is TORCH["cross_entropy"]
    with fastloss.patch_torch(), pytest.raises(ZeroDivisionError), fastloss.patch_torch():
        raise ZeroDivisionError
    first.undo()


def test_another_package_that_patches_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it put there is its own to undo; what was there before the patch comes back."""

    def other(*arguments: Any, **options: Any) -> Tensor:
        return TORCH["cross_entropy"](*arguments, **options)

    with monkeypatch.context() as patched:
        with fastloss.patch_torch():
            patched.setattr(F, "cross_entropy", other)
        assert F.cross_entropy is other
        with fastloss.patch_torch():
            assert F.cross_entropy is fastloss.cross_entropy
        assert F.cross_entropy is other
        patched.setattr(F, "cross_entropy", TORCH["cross_entropy"])
    F.cross_entropy = TORCH["cross_entropy"]


def test_threads() -> None:
    """Each thread that patches finds the patch until it undoes its own."""
    failures: list[str] = []

    def work() -> None:
        for _ in range(200):
            with fastloss.patch_torch():
                if F.cross_entropy is not fastloss.cross_entropy:
                    failures.append("torch's own inside a patch")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_compiled(fused: list[tuple[int, ...]]) -> None:
    """A program that is compiled under the patch calls the operator, and is compiled anew without it."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: F.cross_entropy(x, T), backend=backend, fullgraph=True)
    expected = F.cross_entropy(X, T)
    with fastloss.patch_torch():
        torch.testing.assert_close(compiled(X), expected)
    torch.testing.assert_close(compiled(X), expected)
    assert ["fastloss" in graph.code for graph in graphs] == [True, False]


def test_saved_modules_and_functions() -> None:
    module = nn.CrossEntropyLoss(ignore_index=3)
    with fastloss.patch_torch():
        file = io.BytesIO()
        torch.save(module, file)
        assert pickle.loads(pickle.dumps(F.cross_entropy)) is fastloss.cross_entropy
    file.seek(0)
    again = torch.load(file, weights_only=False)
    torch.testing.assert_close(again(X, T), module(X, T))


def test_a_language_model_as_transformers_computes_it(fused: list[tuple[int, ...]]) -> None:
    """``ForCausalLMLoss``, which a model of transformers calls with its labels."""
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    logits, labels = torch.randn(2, 300, 500), torch.randint(500, (2, 300))
    labels[0, :40] = -100
    for items in (None, 500):
        call = {"logits": logits, "labels": labels, "vocab_size": 500, "num_items_in_batch": items}
        expected = loss_utils.ForCausalLMLoss(**call)
        assert not fused
        with fastloss.patch_torch():
            torch.testing.assert_close(loss_utils.ForCausalLMLoss(**call), expected)
        assert fused.pop() == (600, 500)


class Classifier(nn.Module):
    """A classifier whose steps are written as in Lightning and in timm's ``train.py``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 500)
        self.train_loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.body(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("kind", ["timm", "lightning"])
def test_training(kind: str, fused: list[tuple[int, ...]]) -> None:
    batches = [(torch.randn(600, 8), torch.randint(500, (600,))) for _ in range(3)]

    def train() -> tuple[Classifier, torch.optim.Optimizer]:
        model = Classifier()
        optimizer = model.configure_optimizers()
        for batch in batches:
            loss = (
                model.training_step(batch)
                if kind == "lightning"
                else model.train_loss_fn(model.body(batch[0]), batch[1])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model, optimizer

    theirs, _ = train()
    assert not fused
    with fastloss.patch_torch(sgd=True):
        ours, optimizer = train()
    assert isinstance(optimizer, fastloss.SGD)
    assert len(fused) == 3
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


class Model(nn.Module):
    """A model that calls everything here."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.loss = fastloss.CrossEntropyLoss(torch.rand(3), label_smoothing=0.1)
        self.linear_loss = fastloss.LinearCrossEntropyLoss(4, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        z = self.body(x)
        loss, (top1, top2) = fastloss.cross_entropy_with_accuracy(z, t, topk=(1, 2))
        parts = fastloss.cross_entropy_with_statistics(z, t, entropy=True)
        loss = loss + top1 + top2 + self.loss(z, t) + self.linear_loss(x, t) + fastloss.accuracy(z, t) + parts.loss
        loss = loss + fastloss.cross_entropy(z, t, reduction="sum") + parts.entropy.sum()
        linear, accuracy = fastloss.linear_cross_entropy_with_accuracy(x, self.body.weight, t)
        return loss + linear + accuracy + fastloss.linear_cross_entropy(x, self.body.weight, t)


def test_symbolic_traces() -> None:
    """Each function is a node of the graph, as torch's own is."""
    model = Model()
    traced = torch.fx.symbolic_trace(model)
    functions = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert [f.__name__ for f in functions].count("cross_entropy") == 2
    assert {fastloss.accuracy, fastloss.linear_cross_entropy, fastloss.cross_entropy_with_statistics} <= set(
        functions
    )
    x, t = torch.randn(5, 4), torch.randint(3, (5,))
    torch.testing.assert_close(traced(x, t), model(x, t))
    traced.recompile()
    torch.testing.assert_close(traced(x, t), model(x, t))
    with fastloss.patch_torch():
        graph = torch.fx.symbolic_trace(lambda x, t: F.cross_entropy(x, t)).graph
    assert fastloss.cross_entropy in {node.target for node in graph.nodes}
    with pytest.raises(TypeError, match="input must be a Tensor"):
        fastloss.cross_entropy([1.0], t)


class Holds(nn.Module):
    """A model that holds a loss or a metric, which its forward pass does not call."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.body, self.part = nn.Linear(4, 3), part

    def forward(self, x):  # TorchScript reads no annotation that is a string
        return self.body(x)


@pytest.mark.parametrize(
    "part",
    [fastloss.CrossEntropyLoss(torch.rand(3)), fastloss.LinearCrossEntropyLoss(4, 3), fastloss.Accuracy()],
    ids=lambda part: type(part).__name__,
)
@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_scripts_of_models_that_hold_a_module(part: nn.Module) -> None:
    model, x, file = Holds(part), torch.randn(2, 4), io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_scripts_of_programs_that_call_the_loss() -> None:
    """A program that was scripted before the patch keeps torch's loss. One that is traced under it has the same."""

    def program(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t, label_smoothing=0.1)

    program.__annotations__.clear()
    z, t = torch.randn(5, 3), torch.randint(3, (5,))
    expected = program(z, t)
    with fastloss.patch_torch():
        with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments"):
            torch.jit.script(program)
        traced = torch.jit.trace(program, (z, t))
    scripted = torch.jit.script(program)
    with fastloss.patch_torch():
        for function in (scripted, traced):
            torch.testing.assert_close(function(z, t), expected)
