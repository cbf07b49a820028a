"""The loss among torch's other parts: autocast, loss scaling, transforms, checkpoints, hooks, determinism, files.

Each against the same use of torch's own operator. Derivatives of the loss alone are in ``test_autograd.py``.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from fastloss import (
    Accuracy,
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    accuracy,
    cross_entropy,
    cross_entropy_with_accuracy,
)

pytestmark = pytest.mark.backend_agnostic

REDUCTIONS = ["mean", "sum", "none"]
BOTH: tuple[Callable[..., Tensor], ...] = (cross_entropy, F.cross_entropy)


def labels(place: Place, *shape: int, classes: int) -> Tensor:
    """Some labels, the second of them ignored."""
    target = torch.randint(classes, shape, device=place.device)
    target.view(-1)[1] = -100
    return target


def model_for(place: Place, classes: int, dtype: torch.dtype = torch.float32, inputs: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, classes)).to(place.device, dtype)


def gradients(loss: Tensor, model: nn.Module, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), **options))


# ----------------------------------------------------------------------------- autocast and loss scaling


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_under_autocast(place: Place, dtype: torch.dtype, reduction: str) -> None:
    """The last layer's output is 16-bit; the loss is float32 and no worse than torch's, and each parameter's gradient
    is as torch's. With class weights in float32, as a training loop has them: under autocast torch takes those too.

    On a GPU torch's loss has the logarithms of the softmax rounded to 16 bits: its composite asks ``log_softmax`` for
    the logits' dtype, which autocast then leaves alone.
    """
    low = torch.bfloat16 if dtype == torch.float32 else dtype
    model, input = model_for(place, 30), torch.randn(12, 6, device=place.device)
    target, weight = labels(place, 12, classes=30), torch.rand(30, device=place.device)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}
    results = []
    for function in BOTH:
        with torch.autocast(place.device.type, dtype=low):
            logits = model(input)
            assert logits.dtype == low
            logits = logits.to(dtype)
            loss = function(logits, target, weight, **options)
        exact = F.cross_entropy(logits.detach().double(), target, weight.double(), **options)
        results.append((loss, exact, gradients(loss, model, grad_outputs=torch.full_like(loss, 0.5))))
    (ours, exact, of_ours), (theirs, their_exact, of_theirs) = results
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(exact, their_exact)  # of the same logits
    reference.assert_no_worse(ours.detach(), theirs.detach(), exact, "loss", ulps=4.0)
    for a, b in zip(of_ours, of_theirs, strict=True):
        # The logits' gradient is rounded to 16 bits before the matrix products: by us and by torch elsewhere.
        torch.testing.assert_close(
            a, b, rtol=4 * torch.finfo(low).eps, atol=4 * torch.finfo(low).eps * float(b.abs().max())
        )


def test_autocast_off_inside_autocast(place: Place) -> None:
    """Where the loss is taken out of autocast, its dtype is the logits', as torch's."""
    logits = torch.randn(4, 30, device=place.device).to(torch.bfloat16)
    target = labels(place, 4, classes=30)
    with torch.autocast(place.device.type, dtype=torch.bfloat16):
        inside = [function(logits, target).dtype for function in BOTH]
        with torch.autocast(place.device.type, enabled=False):
            outside = [function(logits, target).dtype for function in BOTH]
    assert inside == [torch.float32] * 2
    assert outside == [torch.bfloat16] * 2


def repeated(device: torch.device, rows: int, classes: int, some: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float16 logits of few different rows, and those rows: float64 need not see all."""
    block = torch.randn(some, classes, device=device).to(torch.float16)
    target = torch.randint(classes, (some,), device=device)
    return block.repeat(rows // some, 1), target.repeat(rows // some), block, target


@pytest.mark.slow(interpreted=True)
@pytest.mark.parametrize("size", ["small", "full"])
def test_grad_scaler_in_float16(place: Place, size: str) -> None:
    """A scale of 65536, which float16 itself can't hold, over N = 4096 rows of 16384 classes: the gradient at the
    logits is as good as torch's, and nearly none of it is lost. Without the scale most of it would be.
    """
    if size == "full" and place.interpreted:
        pytest.skip("the interpreter would take minutes")
    rows, classes, some = (4096, 16384, 16) if size == "full" else (512, 640, 8)
    logits, target, block, block_target = repeated(place.device, rows, classes, some)
    logits.requires_grad_()
    scaler = torch.amp.GradScaler(place.device.type, init_scale=65536.0)
    with torch.autocast(place.device.type, dtype=torch.float16):
        loss = cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    gradient = logits.grad
    assert gradient is not None
    assert gradient.dtype == torch.float16

    upstream = torch.tensor(65536.0 / rows, device=place.device)  # what is left of the mean over all rows

    def summed(x: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
        with torch.autocast(place.device.type, dtype=torch.float16):
            return F.cross_entropy(x, target, weight, **options)

    exact = reference.value_and_gradient(
        F.cross_entropy, block.double(), block_target, None, upstream, reduction="sum"
    )[1]
    theirs = reference.value_and_gradient(summed, block, block_target, None, upstream, reduction="sum")[1]
    normal = exact.abs() > torch.finfo(torch.float16).tiny
    assert float(normal.double().mean()) > 0.9
    for part in (gradient[:some], gradient[-some:]):
        reference.assert_no_worse(part, theirs, exact, "gradient")
        # Each of them is right to float16's rounding, not only the greatest.
        error = ((part.double() - exact) / exact)[normal].abs().max()
        assert float(error) <= torch.finfo(torch.float16).eps
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(block.double(), block_target)), rel=1e-5)
    if size == "full":
        lost = (exact / 65536).to(torch.float16) == 0
        assert float(lost.double().mean()) > 0.5


def test_grad_scaler_steps_as_with_torch(place: Place) -> None:
    """Whole steps: scale, backward, unscale, clip, step, update; a step whose gradient overflows is left out."""
    input, target = torch.randn(16, 6, device=place.device), labels(place, 16, classes=50)
    first = model_for(place, 50)
    ends = []
    for function in BOTH:
        model = copy.deepcopy(first)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        scaler = torch.amp.GradScaler(place.device.type, init_scale=65536.0)
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast(place.device.type, dtype=torch.float16):
                loss = function(model(input), target, label_smoothing=0.1)
            scaler.scale(loss * (1e30 if step == 2 else 1.0)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        ends.append((scaler.get_scale(), list(model.parameters())))
    (our_scale, ours), (their_scale, theirs) = ends
    assert our_scale == their_scale == 32768.0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


# ----------------------------------------------------------------------------- transforms


def flat_model(place: Place) -> tuple[nn.Module, Tensor, Tensor]:
    model = model_for(place, 5, torch.float64, inputs=3)
    return model, torch.randn(4, 3, dtype=torch.float64, device=place.device), labels(place, 4, classes=5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_transforms_of_a_model(place: Place, reduction: str, label_smoothing: float) -> None:
    """torch.func's jvp, jacrev, jacfwd, hessian and gradients for each sample, over a model's parameters."""
    model, input, target = flat_model(place)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    options = {"reduction": reduction, "label_smoothing": label_smoothing}

    def results(function: Callable[..., Tensor]) -> dict[str, Any]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return function(functional_call(model, parameters, (input,)), target, **options)

        def loss_of_one(parameters: dict[str, Tensor], input: Tensor, target: Tensor) -> Tensor:
            return function(functional_call(model, parameters, (input[None],)), target[None], **options)

        return {
            "jvp": jvp(loss, (parameters,), (tangents,)),
            "jvp of the gradient": jvp(grad(loss), (parameters,), (tangents,)),
            "jacrev": jacrev(loss)(parameters),
            "jacfwd": jacfwd(loss)(parameters),
            "hessian": hessian(loss)(parameters),
            "each sample's": vmap(grad(loss_of_one), (None, 0, 0))(parameters, input[2:], target[2:]),
        }

    ours, theirs = map(results, BOTH)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}")


def test_hessian_by_double_backward(place: Place) -> None:
    """The same Hessian from the fused pass's own second derivative, which torch.func does not go through."""
    model, input, target = flat_model(place)
    last = model[2].weight.detach()
    hidden = model[:2](input).detach()

    def of(function: Callable[..., Tensor]) -> Tensor:
        return torch.autograd.functional.hessian(
            lambda w: function(hidden @ w.t(), target, label_smoothing=0.1), last
        )

    torch.testing.assert_close(*map(of, BOTH))


def test_vmap_over_logits_labels_and_both(place: Place) -> None:
    logits, target = torch.randn(3, 4, 5, device=place.device), torch.randint(5, (3, 4), device=place.device)
    for dims, arguments in (
        ((0, 0), (logits, target)),
        ((0, None), (logits, target[0])),
        ((None, 0), (logits[0], target)),
        ((2, 1), (logits.movedim(0, 2), target.t())),
    ):
        ours, theirs = (vmap(function, dims)(*arguments) for function in BOTH)
        torch.testing.assert_close(ours, theirs)


# ----------------------------------------------------------------------------- in place, and the logits used again


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_beside_an_operation_that_keeps_the_logits(place: Place, reduction: str) -> None:
    """What kept the logits can no longer go backward once the gradient is written over them: autograd says so, and
    nothing gives a wrong gradient without a word. Until then it can.
    """
    leaf = torch.randn(5, 30, device=place.device, requires_grad=True)
    target = labels(place, 5, classes=30)
    (expected,) = torch.autograd.grad(F.cross_entropy(leaf, target, reduction=reduction).sum(), leaf)

    def loss_and_penalty() -> tuple[Tensor, Tensor]:
        logits = leaf * 1
        if reduction == "mean":  # the gradient is written in the forward pass: only what came before saw logits
            penalty = logits.square().sum()
            return cross_entropy(logits, target, inplace=True), penalty
        loss = cross_entropy(logits, target, reduction="none", inplace=True).sum()
        return loss, logits.square().sum()

    loss, penalty = loss_and_penalty()
    if reduction == "none":  # written by the backward pass: before it the logits are whole
        (of_penalty,) = torch.autograd.grad(penalty, leaf, retain_graph=True)
        torch.testing.assert_close(of_penalty, 2 * leaf.detach())
    loss.backward()
    torch.testing.assert_close(leaf.grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_inplace_then_another_loss_of_the_same_logits(place: Place) -> None:
    """Two losses share logits that the first is to write over: "none" keeps them until backward, and then the second
    to go backward raises; it does not take a gradient for logits.
    """
    leaf = torch.randn(5, 30, device=place.device, requires_grad=True)
    target = labels(place, 5, classes=30)
    logits = leaf * 1
    first = cross_entropy(logits, target, reduction="none", inplace=True)
    second = cross_entropy(logits, target, reduction="none", inplace=True)
    torch.testing.assert_close(first, second)
    first.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.sum().backward()


# ----------------------------------------------------------------------------- checkpoints and hooks


class Trunk(nn.Module):
    """A model that ends in its loss, in the manner of a language model's last layer."""

    def __init__(self, function: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Tanh())
        self.head = nn.Linear(8, 30)
        self.function, self.options = function, options
        self.runs = 0

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        self.runs += 1
        return self.function(self.head(self.body(input)), target, **self.options)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_activation_checkpointing(
    place: Place, dtype: torch.dtype, use_reentrant: bool, reduction: str, inplace: bool
) -> None:
    """Model and loss inside one checkpoint, whose forward pass is run again in backward: the same gradients as
    without it, bit for bit, dropout included; and those of torch's loss.
    """
    model = Trunk(cross_entropy, reduction=reduction, inplace=inplace).to(place.device, dtype)
    input = torch.randn(7, 6, device=place.device).to(dtype).requires_grad_()  # the reentrant form asks for one
    target = labels(place, 7, classes=30)
    leaves = [input, *model.parameters()]
    results = []
    for function, checkpointed in ((cross_entropy, True), (cross_entropy, False), (F.cross_entropy, False)):
        model.function = function
        model.options = {"reduction": reduction} if function is F.cross_entropy else model.options
        model.runs = 0
        torch.manual_seed(0)
        run = partial(checkpoint, model, use_reentrant=use_reentrant) if checkpointed else model
        loss = run(input, target)
        for leaf in leaves:
            leaf.grad = None
        (loss.sum() * 3).backward()
        assert model.runs == 1 + checkpointed
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for inside, outside, theirs in zip(*results, strict=True):
        assert torch.equal(inside, outside)
        torch.testing.assert_close(inside, theirs, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensors_moved_by_hooks(place: Place, dtype: torch.dtype, reduction: str) -> None:
    """What is kept for backward may be packed away and come back as another tensor (``save_on_cpu`` does so): through
    the ctx, since no hook sees what is kept anywhere else.
    """
    input = torch.randn(5, 30, device=place.device).to(dtype).requires_grad_()
    target = labels(place, 5, classes=30)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        packed.append(tensor)
        return tensor.device, tensor.detach().cpu().clone()

    def unpack(kept: tuple[torch.device, Tensor]) -> Tensor:
        return kept[1].to(kept[0])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = cross_entropy(input, target, reduction=reduction).sum()
    assert any(tensor.shape == input.shape for tensor in packed)
    (hooked,) = torch.autograd.grad(loss * 3, input)
    (plain,) = torch.autograd.grad(cross_entropy(input, target, reduction=reduction).sum() * 3, input)
    assert torch.equal(hooked, plain)


def test_hooks_on_the_logits_see_and_change_the_gradient(place: Place) -> None:
    """The gradient that a hook is shown is its to keep: no later pass writes over it."""
    leaf = torch.randn(5, 30, device=place.device, requires_grad=True)
    target = labels(place, 5, classes=30)
    logits = leaf * 1
    seen: list[Tensor] = []

    def hook(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return gradient * 2

    logits.register_hook(hook)
    logits.retain_grad()
    loss = cross_entropy(logits, target) * 3
    loss.backward(retain_graph=True)
    kept = seen[0].clone()
    loss.backward()
    assert torch.equal(seen[0], kept)
    assert torch.equal(seen[1], kept)
    (expected,) = torch.autograd.grad(F.cross_entropy(leaf, target) * 3, leaf)
    torch.testing.assert_close(kept, expected)
    torch.testing.assert_close(leaf.grad, 4 * expected)
    torch.testing.assert_close(logits.grad, 4 * expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_two_calls_of_one_tensor_add_up(place: Place, dtype: torch.dtype) -> None:
    """Two losses of the same logits, of other labels, in one backward pass and in two: their gradients' sum."""
    leaf = torch.randn(5, 30, device=place.device).to(dtype).requires_grad_()
    one, other = labels(place, 5, classes=30), labels(place, 5, classes=30)
    together = torch.autograd.grad(cross_entropy(leaf, one) + 0.5 * cross_entropy(leaf, other), leaf)[0]
    cross_entropy(leaf, one).backward()
    (0.5 * cross_entropy(leaf, other)).backward()
    expected = torch.autograd.grad(
        F.cross_entropy(leaf.double(), one) + 0.5 * F.cross_entropy(leaf.double(), other), leaf
    )[0]
    for gradient in (together, leaf.grad):
        torch.testing.assert_close(gradient, expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_anomaly_mode(place: Place) -> None:
    """No NaN passes through backward on the way to a finite gradient, not even for rows that are ignored."""
    leaf = torch.randn(5, 30, device=place.device, requires_grad=True)
    target = labels(place, 5, classes=30)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        for reduction in REDUCTIONS:
            loss = cross_entropy(leaf, target, reduction=reduction, label_smoothing=0.1).sum()
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            torch.autograd.grad(gradient.square().sum(), leaf)


# ----------------------------------------------------------------------------- deterministic mode


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic mode, in which memory that nobody has written to yet is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.slow(interpreted=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(40, 70), (3, 17, 11)], ids=str)
def test_deterministic_mode(
    place: Place, shape: tuple[int, ...], reduction: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """No operation is refused; each run gives the same bits, and those that it gives outside of this mode: so none of
    them comes from memory that was not written.
    """
    input = torch.randn(shape, device=place.device).to(dtype)
    target = labels(place, shape[0], *shape[2:], classes=shape[1])
    weight = torch.rand(shape[1], device=place.device).to(dtype)

    def run(**options: Any) -> list[Tensor]:
        x = input.clone().requires_grad_()
        loss, right = cross_entropy_with_accuracy(x, target, weight, reduction=reduction, topk=(1, 5), **options)
        (gradient,) = torch.autograd.grad(loss, x, torch.full_like(loss, 0.7))
        return [loss.detach(), gradient, *right, *accuracy(x, target, (1, 5), reduction=reduction)]

    every = ({}, {"label_smoothing": 0.1}, {"lse_square_scale": 0.01, "softcap": 5.0})
    outside = [run(**options) for options in every]
    request.getfixturevalue("deterministic")
    for _ in range(2):
        for options, expected in zip(every, outside, strict=True):
            for value, right in zip(run(**options), expected, strict=True):
                assert torch.equal(value, right)


def test_second_derivative_in_deterministic_mode(place: Place, deterministic: None) -> None:
    input = torch.randn(6, 30, dtype=torch.float64, device=place.device, requires_grad=True)
    target = labels(place, 6, classes=30)

    def second() -> Tensor:
        (gradient,) = torch.autograd.grad(cross_entropy(input, target, label_smoothing=0.1), input, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), input)[0]

    assert torch.equal(second(), second())


# ----------------------------------------------------------------------------- the module, kept and exchanged

OPTIONS: dict[str, Any] = {
    "ignore_index": 3,
    "reduction": "sum",
    "label_smoothing": 0.1,
    "lse_square_scale": 0.01,
    "softcap": 4.0,
}


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("copied", [through_pickle, copy.deepcopy, copy.copy, through_torch_save])
def test_the_module_is_kept_whole(place: Place, copied: Callable[[nn.Module], nn.Module], weighted: bool) -> None:
    """Every option and the weights survive: the copy gives the same bits. A deep copy's weights are its own."""
    weight = torch.rand(7, device=place.device) if weighted else None
    module = CrossEntropyLoss(weight, **OPTIONS)
    again = copied(module)
    assert type(again) is CrossEntropyLoss
    assert repr(again) == repr(module)
    logits, target = torch.randn(6, 7, device=place.device), torch.arange(6, device=place.device)
    before = module(logits, target)
    assert torch.equal(again(logits, target), before)
    if weighted and copied is not copy.copy:
        again.weight.zero_()
        assert torch.equal(module(logits, target), before)


@pytest.fixture
def one_process() -> Iterator[Any]:
    """A process group of this process."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class HoldsAGroup(nn.Module):
    """A model that is copied with its loss, as an average of weights does."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.body, self.part = nn.Linear(4, 7), part


@pytest.mark.parametrize("copied", [through_pickle, copy.deepcopy, copy.copy, through_torch_save])
@pytest.mark.parametrize("make", [CrossEntropyLoss, partial(LinearCrossEntropyLoss, 4, 7), Accuracy])
def test_a_module_with_a_group_is_kept(
    one_process: Any, make: Callable[..., nn.Module], copied: Callable[[nn.Module], nn.Module]
) -> None:
    """Copies have the same group. A file has none: a call says so, until the attribute is set."""
    module = make(group=one_process)
    again = copied(module)
    assert type(again) is type(module)
    assert module.group is one_process
    x, t = torch.randn(5, 4 if isinstance(module, LinearCrossEntropyLoss) else 7), torch.randint(7, (5,))
    if copied not in (copy.copy, copy.deepcopy):
        with pytest.raises(RuntimeError, match="set its attribute group to a group of this program"):
            again(x, t)
        again.group = one_process
    assert again.group is one_process
    torch.testing.assert_close(again(x, t), module(x, t))
    average = torch.optim.swa_utils.AveragedModel(HoldsAGroup(module))
    assert average.module.part.group is one_process


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("source", "sink"), [(CrossEntropyLoss, nn.CrossEntropyLoss), (nn.CrossEntropyLoss, CrossEntropyLoss)]
)
def test_state_dicts_are_exchanged_with_torch(
    place: Place, source: type[nn.Module], sink: type[nn.Module], weighted: bool
) -> None:
    """Strictly, through a file, both ways: the weights are all there is, under the same name."""
    weight = torch.rand(7, device=place.device) if weighted else None
    giver = source(weight)
    taker = sink(None if weight is None else torch.ones_like(weight))
    file = io.BytesIO()
    torch.save(giver.state_dict(), file)
    file.seek(0)
    result = taker.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert list(giver.state_dict()) == list(taker.state_dict()) == (["weight"] if weighted else [])
    logits, target = torch.randn(6, 7, device=place.device), torch.arange(6, device=place.device)
    torch.testing.assert_close(taker(logits, target), giver(logits, target))


def test_the_module_moves_with_its_model(place: Place) -> None:
    """``to`` and ``half`` reach the weights of a loss that is part of a model, and it has nothing to train."""
    model = nn.ModuleDict({"body": nn.Linear(4, 7), "loss": CrossEntropyLoss(torch.rand(7))})
    assert "loss.weight" in model.state_dict()
    assert not any(name.startswith("loss") for name, _ in model.named_parameters())
    model.to(place.device, torch.float64)
    loss = model["loss"]
    assert loss.weight.dtype == torch.float64
    logits = torch.randn(6, 7, dtype=torch.float64, device=place.device)
    target = torch.arange(6, device=place.device)
    torch.testing.assert_close(loss(logits, target), F.cross_entropy(logits, target, loss.weight))
