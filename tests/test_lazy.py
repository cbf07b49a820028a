"""``without_logits``: a model as it is, with and without its logits."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastloss
from fastloss.faces.lazy import origin
from fastloss.faces.lazy.tensor import LazyLogits

CLASSES, WIDTH = 211, 8
Loss = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module", autouse=True)
def optimizers_unwatched_afterwards() -> Iterator[None]:
    """Reports that are not undone would let all later optimizers of the process see a hook."""
    yield
    gc.collect()
    origin.unwatch_optimizers(lambda: None)
    assert not origin._hooks


class Model(nn.Module):
    """A body and a head, and what a model does to its logits between them."""

    def __init__(self, then: Callable[[Tensor], Tensor] = lambda z: z, *, bias: bool = False) -> None:
        super().__init__()
        self.body, self.mix = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lm_head, self.then = nn.Linear(WIDTH, CLASSES, bias=bias), then

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        return self.then(self.lm_head(torch.tanh(self.mix(self.body(ids)))))


class NoLogits(TorchDispatchMode):
    """Sees that no operator takes or gives a tensor with memory for as many elements as the logits have."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(each, Tensor) and not isinstance(each, LazyLogits) and not each.is_meta:
                assert each.untyped_storage().nbytes() < self.elements * each.element_size(), (func, each.shape)
        return result


def pair(*arguments: Any, **options: Any) -> tuple[Model, Model]:
    """Two equal models."""
    model = Model(*arguments, **options)
    return model, copy.deepcopy(model)


def batch(rows: int = 4, length: int = 80) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, CLASSES, (rows, length))
    labels = torch.where(torch.rand(rows, length) < 0.2, -100, ids)
    return ids, labels


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, **tolerance: float) -> None:
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if one.grad is None or other.grad is None:
            assert one.grad is other.grad, name
        else:
            torch.testing.assert_close(one.grad, other.grad, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@contextmanager
def lazy(model: Model, *, fused: int | None = None, made: int | None = None) -> Iterator[fastloss.WithoutLogits]:
    with fastloss.without_logits(model) as report:
        yield report
    assert fused is None or report.fused == fused, report.audit()
    assert made is None or report.made == made, report.audit()


def next_token(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z[..., :-1, :].contiguous().view(-1, z.shape[-1]), labels[:, 1:].reshape(-1))


def by_padded_labels(z: Tensor, labels: Tensor) -> Tensor:
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    z = z.float().view(-1, z.shape[-1])
    return F.cross_entropy(z, labels.view(-1), ignore_index=-100, reduction="sum") / 7


def by_sample(z: Tensor, labels: Tensor) -> Tensor:
    return sum(nn.CrossEntropyLoss(label_smoothing=0.1)(z[n], labels[n]) for n in range(len(labels))) / len(labels)


FUSED_LOSSES: dict[str, Loss] = {
    "next token": next_token,
    "padded labels": by_padded_labels,
    "sample by sample": by_sample,
    "transposed": lambda z, y: F.cross_entropy(z.transpose(1, 2), y, reduction="none").sum(),
    "permuted": lambda z, y: F.cross_entropy(z.permute(0, 2, 1), y),
    "time first": lambda z, y: F.cross_entropy(z.transpose(0, 1).reshape(-1, CLASSES), y.T.flatten()),
    "chosen rows": lambda z, y: F.cross_entropy(z[y != -100], y[y != -100]),
    "class weights": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), torch.linspace(0.1, 1, CLASSES)),
    "fewer classes": lambda z, y: F.cross_entropy(z[..., :200].flatten(0, 1), y.clamp(max=199).flatten()),
    "clone": lambda z, y: next_token(z.clone(), y),
    "of this package": lambda z, y: fastloss.cross_entropy(z.flatten(0, 1), y.flatten(), lse_square_scale=0.1),
    "with accuracy": lambda z, y: fastloss.cross_entropy_with_accuracy(z.flatten(0, 1), y.flatten()).loss,
}
MADE_LOSSES: dict[str, Loss] = {
    "log-softmax": lambda z, y: F.nll_loss(F.log_softmax(z.flatten(0, 1), -1), y.flatten()),
    "focal": lambda z, y: ((1 - z.softmax(-1).gather(-1, y.clamp(min=0)[..., None])) ** 2).mean(),
    "with a penalty": lambda z, y: next_token(z, y) + 1e-3 * z.logsumexp(-1).square().mean(),
    "written to": lambda z, y: F.cross_entropy(z.mul_(0.5).flatten(0, 1), y.flatten()),
    "filled": lambda z, y: F.cross_entropy(z.masked_fill(y[..., None] == 3, 0.0).flatten(0, 1), y.flatten()),
    "set": lambda z, y: (z.__setitem__((slice(None), 0), 0.0), F.cross_entropy(z.flatten(0, 1), y.flatten()))[1],
    "soft targets": lambda z, y: F.cross_entropy(z.flatten(0, 1), torch.full((y.numel(), CLASSES), 1 / CLASSES)),
}
HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda z: z,
    "softcap": lambda z: torch.tanh(z / 3.0) * 3.0,
    "scaled": lambda z: 0.5 * z,
    "bias": lambda z: z + torch.linspace(-1, 1, CLASSES)[None],
    "over": lambda z: z.float() / 1.7,
}


@pytest.mark.parametrize("loss", FUSED_LOSSES, ids=str)
def test_a_loss_without_logits(loss: str) -> None:
    (ours, theirs), (ids, labels) = pair(), batch()
    with lazy(ours, made=0) as report, NoLogits(labels.numel() * CLASSES):
        result = FUSED_LOSSES[loss](ours(ids), labels)
        result.backward()
    expected = FUSED_LOSSES[loss](theirs(ids), labels)
    expected.backward()
    assert report.fused
    torch.testing.assert_close(result, expected)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_what_a_model_does_to_its_logits(head: str, bias: bool) -> None:
    (ours, theirs), (ids, labels) = pair(HEADS[head], bias=bias), batch()
    with lazy(ours) as report:
        logits = ours(ids)
        result = next_token(logits, labels)
        assert (report.fused, report.made) == ((0, 1) if head == "bias" and bias else (1, 0))
        torch.testing.assert_close(logits + 0, theirs(ids), rtol=0, atol=0)
        result.backward()
    expected = next_token(theirs(ids), labels)
    expected.backward()
    torch.testing.assert_close(result, expected)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("loss", MADE_LOSSES, ids=str)
def test_other_losses_make_the_logits_once(loss: str) -> None:
    (ours, theirs), (ids, labels) = pair(), batch()
    with lazy(ours, made=1) as report:
        result = MADE_LOSSES[loss](ours(ids), labels)
        result.backward()
    expected = MADE_LOSSES[loss](theirs(ids), labels)
    expected.backward()
    torch.testing.assert_close(result, expected)
    assert_same_gradients(ours, theirs)
    (line,) = report.audit()
    assert line.file == __file__
    assert line.times == 1


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
def test_the_loss_of_16_bit_logits_has_the_dtype_of_the_models_loss(upcast: bool, autocast: bool) -> None:
    (ours, theirs), (ids, labels) = pair(), batch()
    exact = next_token(theirs.double()(ids), labels)
    theirs.float()
    if not autocast:
        ours.bfloat16(), theirs.bfloat16()
        exact = next_token(copy.deepcopy(theirs).double()(ids), labels)
    loss: Loss = (lambda z, y: next_token(z.float(), y)) if upcast else next_token
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with lazy(ours, fused=1, made=0):
            result = loss(ours(ids), labels)
        expected = loss(theirs(ids), labels)
    result.backward(), expected.backward()
    assert result.dtype == expected.dtype == (torch.float32 if upcast or autocast else torch.bfloat16)
    ours_off, theirs_off = (abs(each.double() - exact).item() for each in (result, expected))
    assert ours_off <= theirs_off + (2e-3 if result.dtype == torch.float32 else 3e-2)
    assert_same_gradients(ours, theirs, rtol=3e-2, atol=1e-3)


def test_predictions_without_logits() -> None:
    (ours, theirs), (ids, labels) = pair(), batch()
    with lazy(ours, made=0), torch.no_grad():
        ours.eval()
        best, best_kept = ours(ids).argmax(-1), torch.argmax(ours(ids), dim=2, keepdim=True)
        rate = fastloss.accuracy(ours(ids).flatten(0, 1), labels.flatten(), topk=(1, 5))
    assert best.equal(theirs(ids).argmax(-1))
    assert best_kept.equal(theirs(ids).argmax(-1, keepdim=True))
    assert rate == fastloss.accuracy(theirs(ids).flatten(0, 1), labels.flatten(), topk=(1, 5))


def test_tied_weights_and_steps() -> None:
    (ours, theirs), (ids, labels) = pair(), batch()
    for model in (ours, theirs):
        model.lm_head.weight = model.body.weight
    with lazy(ours, fused=3, made=0):
        for _ in range(3):
            for model in (ours, theirs):
                optimizer = torch.optim.SGD(model.parameters(), 0.1)
                next_token(model(ids), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


OPERATORS: list[Callable[[Tensor], Tensor]] = [
    lambda z: z * 0.7,
    lambda z: 3 * z,
    lambda z: z / -2.0,
    lambda z: torch.tanh(z),
    lambda z: z.float(),
    lambda z: z.double(),
    lambda z: z.to(torch.bfloat16),
    lambda z: z + torch.linspace(-1, 1, z.shape[-1]).to(z.dtype),
    lambda z: z + 1.0,
    lambda z: z.transpose(0, -1),
    lambda z: z.mT if z.dim() > 1 else z,
    lambda z: z.movedim(0, -1),
    lambda z: z.permute(*reversed(range(z.dim()))),
    lambda z: z.contiguous(),
    lambda z: z.clone(),
    lambda z: z.flatten(0, 1) if z.dim() > 1 else z,
    lambda z: z.flatten(),
    lambda z: z.reshape(-1, z.shape[-1]),
    lambda z: z.reshape(2, -1, z.shape[-1]) if z.numel() % (2 * z.shape[-1]) == 0 else z,
    lambda z: z.unflatten(-1, (1, -1)),
    lambda z: z[..., 1:],
    lambda z: z[:, None],
    lambda z: z[0] if z.dim() > 2 else z,
    lambda z: z[None],
    lambda z: z[:, ::2],
    lambda z: z[..., :-1, :] if z.dim() > 1 else z,
    lambda z: z[torch.tensor([1, 0, 1])],
    lambda z: z[torch.arange(len(z)) != 1],
    lambda z: z[:, torch.tensor([0, 1])] if z.dim() > 1 else z,
    lambda z: z[torch.tensor([0, 1]), :, torch.tensor([0, 1])] if z.dim() > 2 and min(z.shape) > 1 else z,
    lambda z: z.detach() * 0.0 + z,
    lambda z: z.softmax(-1),
    lambda z: z.squeeze(0),
    lambda z: z.view_as(z),
    lambda z: torch.cat([z, z]),
]


@pytest.mark.parametrize("seed", range(40))
def test_random_operators(seed: int) -> None:
    (ours, theirs), draw = pair(bias=bool(seed % 2)), random.Random(seed)
    ids = torch.randint(0, CLASSES, (3, 4))
    chain = draw.choices(OPERATORS, k=draw.randint(1, 6))
    results = {}
    for model in (ours, theirs):
        with lazy(ours):
            z = model(ids)
            for operator in chain:
                if z.dim() > 1 and min(z.shape) > 1:
                    z = operator(z)
            assert z.requires_grad
            labels = torch.zeros((z.shape[0], *z.shape[2:]) if z.dim() > 1 else (), dtype=torch.int64)
            loss = F.cross_entropy(z, labels)
            loss.backward()
            results[model] = (z + 0).detach(), loss.detach(), z.shape, z.dtype
    assert results[ours][2:] == results[theirs][2:]
    narrow = loss.dtype == torch.bfloat16
    how = {"rtol": 5e-2, "atol": 2e-2} if narrow else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(results[ours][0], results[theirs][0], **how)
    torch.testing.assert_close(results[ours][1], results[theirs][1], **how)
    assert_same_gradients(ours, theirs, rtol=5e-2, atol=5e-3 if narrow else 1e-4)


# --------------------------------------------------------------------------------------------------- hazards


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.AdamW(p, fused=True), lambda p: torch.optim.SGD(p, 0.1), lambda p: fastloss.SGD(p, 0.1)],
    ids=["fused AdamW, which counts no writes", "SGD", "this package's SGD"],
)
def test_logits_that_are_read_after_the_step_raise(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model, (ids, labels) = Model(), batch()
    with lazy(model):
        logits = model(ids)
        next_token(logits, labels).backward()
        other = nn.Parameter(torch.ones(2))
        other.grad = torch.ones(2)
        optimizer([other]).step()
        assert logits[0, 0].sum().isfinite()  # that step was of other parameters
        logits = model(ids)
        optimizer(model.parameters()).step()
        with pytest.raises(RuntimeError, match="written to"):
            logits.sum()
        with pytest.raises(RuntimeError, match="written to"):
            next_token(logits, labels)


def test_a_write_in_place_voids_the_other_views() -> None:
    (ours, theirs), (ids, labels) = pair(), batch()
    with lazy(ours):
        logits = ours(ids)
        view, apart = logits[:, :-1], logits * 2
        logits[..., 0] = -1.0
        with pytest.raises(RuntimeError, match="in place"):
            view.sum()
        torch.testing.assert_close(apart + 0, theirs(ids) * 2)  # memory of its own
        stock = theirs(ids)
        stock[..., 0] = -1.0
        torch.testing.assert_close(logits[:, :-1] + 0, stock[:, :-1])
        logits = ours(ids)
        view = logits[:, :-1]
        view += 1
        with pytest.raises(RuntimeError, match="in place"):
            next_token(logits, labels)
        logits = ours(ids)
        before, _ = logits[:, :-1], logits.sum()
        logits[:, 2:].zero_()  # a plain tensor's write
        with pytest.raises(RuntimeError, match="in place"):
            before.sum()
        assert logits[:, 2:].abs().max() == 0


class Reversed(torch.autograd.Function):
    """Turns the gradient round."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, how: str) -> Tensor:
        return {"clone": z.clone, "view": lambda: z.view_as(z), "itself": lambda: z, "made": lambda: z * 1.0}[how]()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return -upstream, None


@pytest.mark.parametrize("how", ["clone", "view", "itself", "made"])
def test_functions_that_do_not_see_torch_function(how: str) -> None:
    (ours, theirs), (ids, labels) = pair(), batch()
    with lazy(ours):
        next_token(Reversed.apply(ours(ids), how), labels).backward()
    next_token(Reversed.apply(theirs(ids), how), labels).backward()
    assert_same_gradients(ours, theirs)


def test_hooks_see_the_gradient() -> None:
    (ours, theirs), (ids, labels) = pair(), batch()
    seen: list[Tensor] = []
    for model in (ours, theirs):
        with lazy(ours):
            logits = model(ids)
            logits.register_hook(seen.append)
            logits.retain_grad()
            next_token(logits, labels).backward()
            seen.append(logits.grad)
    for one, other in zip(seen[:2], seen[2:], strict=True):
        torch.testing.assert_close(one, other)
    ours.zero_grad(), theirs.zero_grad()
    with lazy(ours):
        for model in (ours, theirs):
            model.lm_head.register_full_backward_hook(lambda module, x, z: (x[0] * 2,))
            next_token(model(ids), labels).backward()
    assert_same_gradients(ours, theirs)


def test_gradients_of_logits_that_do_not_exist() -> None:
    (ours, theirs), (ids, labels) = pair(), batch()
    with lazy(ours):
        logits = ours(ids)
        loss = next_token(logits, labels)
        for ask in (lambda: torch.autograd.grad(loss, logits, allow_unused=True), logits.retain_grad):
            with pytest.raises(RuntimeError, match="gradient does not exist"):
                ask()
        with pytest.warns(UserWarning, match="register_hook"):
            logits.register_hook(print)
        logits = ours(ids)
        logits.argmax(-1), logits.detach().sum()
        logits = logits + 0
        (gradient,) = torch.autograd.grad(next_token(logits, labels), logits)
    stock = theirs(ids)
    torch.testing.assert_close(gradient, torch.autograd.grad(next_token(stock, labels), stock)[0])


def test_copies_and_pickles() -> None:
    (ours, theirs), (ids, _) = pair(), batch()
    with lazy(ours):
        for copied in (copy.deepcopy(ours.lm_head), pickle.loads(pickle.dumps(ours.lm_head))):
            hidden = torch.randn(2, 3, WIDTH)
            assert type(copied(hidden)) is Tensor
            assert copied(hidden).equal(F.linear(hidden, ours.lm_head.weight))
        with torch.no_grad():
            logits = ours(ids)
        file = io.BytesIO()
        torch.save(logits, file)
        file.seek(0)
        for copied in (copy.deepcopy(logits), torch.load(file)):
            assert type(copied) is Tensor
            assert copied.equal(theirs(ids))
        with pytest.raises(RuntimeError, match="deepcopy"):  # as torch has it
            copy.deepcopy(ours(ids))
    assert "forward" not in vars(ours.lm_head)
    assert ours(ids).equal(theirs(ids))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    (ours, theirs), (ids, labels) = pair(), batch()
    for model in (ours, theirs):
        with lazy(ours):
            hidden = model.mix(model.body(ids))
            next_token(checkpoint(model.lm_head, hidden, use_reentrant=reentrant), labels).backward()
    assert_same_gradients(ours, theirs)
    ours.zero_grad(), theirs.zero_grad()
    for model in (ours, theirs):
        with lazy(ours):
            hidden = model.mix(model.body(ids))
            checkpoint(
                lambda h, m=model: next_token(m.lm_head(h), labels), hidden, use_reentrant=reentrant
            ).backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_modes_of_gradients(mode: Callable[[], Any]) -> None:
    (ours, theirs), (ids, labels) = pair(), batch()
    with lazy(ours), mode():
        logits = ours(ids)
        result, best = next_token(logits, labels), logits.argmax(-1)
        assert result.requires_grad == logits.requires_grad == next_token(theirs(ids), labels).requires_grad
        torch.testing.assert_close(result, next_token(theirs(ids), labels))
        assert best.equal(theirs(ids).argmax(-1))
        assert not logits.detach().requires_grad
        assert not next_token(logits.detach(), labels).requires_grad
    with lazy(ours, made=1):  # read first without gradients, in a mode, then with them
        logits = ours(ids)
        with torch.inference_mode():
            logits.sum()
        next_token(logits, labels).backward()
    next_token(theirs(ids), labels).backward()
    assert_same_gradients(ours, theirs)
    with lazy(ours):
        with torch.no_grad():
            logits = ours(ids)
        assert not next_token(logits, labels).requires_grad
        with torch.no_grad():
            result = next_token(ours(ids), labels)
        assert not result.requires_grad


def test_threads_make_the_logits_once() -> None:
    (ours, theirs), (ids, _) = pair(), batch()
    sums: list[Tensor] = []
    with lazy(ours, made=1):
        logits = ours(ids)
        threads = [threading.Thread(target=lambda: sums.append(logits.sum(-1))) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert len(sums) == 8
    assert all(each.equal(theirs(ids).sum(-1)) for each in sums)


def test_the_second_derivative_of_a_hidden_gradient_raises() -> None:
    model = Model()
    with lazy(model):
        hidden = torch.randn(2, 3, WIDTH, requires_grad=True)
        (gradient,) = torch.autograd.grad(
            Reversed.apply(model.lm_head(hidden), "made").square().sum(), hidden, create_graph=True
        )
        with pytest.raises(RuntimeError):
            gradient.sum().backward()


@pytest.mark.parametrize("patched", [False, True])
def test_beside_patch_torch(patched: bool) -> None:
    (ours, theirs), (ids, labels) = pair(), batch()
    with lazy(ours, fused=1, made=0), fastloss.patch_torch() if patched else nullcontext():
        result = nn.CrossEntropyLoss()(ours(ids).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(result, F.cross_entropy(theirs(ids).flatten(0, 1), labels.flatten()))


def test_compiled_models_compute_their_logits(fresh_compiler: None) -> None:
    (ours, theirs), (ids, labels) = pair(), batch()
    with lazy(ours):
        next_token(torch.compile(ours, backend="aot_eager")(ids), labels).backward()
    next_token(theirs(ids), labels).backward()
    assert_same_gradients(ours, theirs)


def test_compiled_losses_of_lazy_logits(fresh_compiler: None) -> None:
    (ours, theirs), (ids, labels) = pair(), batch()
    with lazy(ours, fused=1, made=0):
        torch.compile(next_token, backend="aot_eager")(ours(ids), labels).backward()
    next_token(theirs(ids), labels).backward()
    assert_same_gradients(ours, theirs)


# --------------------------------------------------------------------------------------------- transformers

SMALL: dict[str, Any] = {"vocab_size": CLASSES, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": CLASSES, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
GPT2 = {"vocab_size": CLASSES, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
BART = {"vocab_size": CLASSES, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 128}
BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
CLASSES_OF_MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": SMALL,
    "Gemma2ForCausalLM": SMALL,  # a softcap
    "CohereForCausalLM": SMALL,  # a scale
    "GraniteForCausalLM": {**SMALL, "logits_scaling": 3.0},
    "MixtralForCausalLM": {**SMALL, "num_local_experts": 2, "output_router_logits": True},  # a second loss
    "GPT2LMHeadModel": GPT2,
    "BloomForCausalLM": {"vocab_size": CLASSES, "hidden_size": 16, "n_layer": 1, "n_head": 2},
    "MambaForCausalLM": {"vocab_size": CLASSES, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "T5ForConditionalGeneration": {**T5, "decoder_start_token_id": 0},  # scaled hidden states
    "BartForConditionalGeneration": BART,  # a bias that is a buffer
    "BertForMaskedLM": SMALL,  # a head with a bias
    "DistilBertForMaskedLM": {"vocab_size": CLASSES, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2},
}


@pytest.mark.parametrize("name", CLASSES_OF_MODELS)
def test_models_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model_class = getattr(transformers, name)
    ours = model_class(model_class.config_class(**CLASSES_OF_MODELS[name])).eval()
    theirs = copy.deepcopy(ours)
    ids = torch.randint(3, CLASSES, (3, 100))
    labels = torch.where(torch.rand(ids.shape) < 0.2, -100, ids)
    with fastloss.without_logits(ours) as report:
        with NoLogits(labels.numel() * CLASSES):
            result = ours(input_ids=ids, labels=labels)
            result.loss.backward()
        assert (report.fused, report.made) == (1, 0), report.audit()
        expected = theirs(input_ids=ids, labels=labels)
        expected.loss.backward()
        torch.testing.assert_close(result.loss, expected.loss)
        assert_same_gradients(ours, theirs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result.logits + 0, expected.logits)
        if ours.can_generate() and "Causal" in name:
            how = {"max_new_tokens": 4, "do_sample": False}
            assert ours.generate(ids[:1], **how).equal(theirs.generate(ids[:1], **how))
            few = ours(input_ids=ids, logits_to_keep=2).logits
            torch.testing.assert_close(few + 0, theirs(input_ids=ids, logits_to_keep=2).logits)


# --------------------------------------------------------------------------------------------- heads, report


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (OwnForward(WIDTH, CLASSES), "forward of its own"),
        (nn.Embedding(CLASSES, WIDTH), "no linear map"),
        (nn.Linear(WIDTH, CLASSES, device="meta"), "device meta"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unsupported_heads(head: nn.Module, reason: str) -> None:
    model = Model()
    model.lm_head = head  # type: ignore[assignment]
    with pytest.raises(ValueError, match=reason):
        fastloss.without_logits(model)
    with pytest.warns(UserWarning, match=reason):
        report = fastloss.without_logits(model, on_unsupported="warn")
    assert not report.is_lazy
    assert "forward" not in vars(head)


def test_heads_by_name_and_errors() -> None:
    model, (ids, _) = Model(), batch()
    for head in ("lm_head", model.lm_head, None):
        with fastloss.without_logits(model, head) as report:
            assert report.head == "lm_head"
            assert isinstance(model(ids), LazyLogits)
            with pytest.raises(ValueError, match="lazy already"):
                fastloss.without_logits(model)
        assert type(model(ids)) is Tensor
    for wrong in ("head", nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="head is"):
            fastloss.without_logits(model, wrong)
    with pytest.raises(ValueError, match="lm_head"):
        fastloss.without_logits(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="on_unsupported"):
        fastloss.without_logits(model, on_unsupported="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastloss.without_logits(model, on_unsupported="warn").undo()
