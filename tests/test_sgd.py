"""fastloss.SGD is torch.optim.SGD: the same numbers after every step, the same state, the same errors."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from places import Place
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastloss import SGD
from fastloss.backends.contract import FLAG_ELEMENTS, SGDBatch, SGDControls, SGDRule

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

(INFO,) = (info for info in optim_db if info.optim_cls is torch.optim.SGD)
TORCH_KEYS = set(torch.optim.SGD([torch.zeros(1)]).defaults)

SMALL, LARGE = (5, 7), (130, 140)  # LARGE: more elements than a CPU gathers, and several chunks of a kernel

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.4},
    "full dampening": {"momentum": 0.9, "dampening": 1.0},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "all": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.2, "maximize": True},
    "nesterov, all": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.2, "maximize": True},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "decoupled, all": {
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.3,
        "maximize": True,
        "decoupled_weight_decay": True,
    },
}


# ------------------------------------------------------------------------------------------------- the comparison


class TorchSGD(torch.optim.SGD):
    """torch's, and beside it the one option of ours that changes exact numbers: decoupled weight decay."""

    def __init__(self, params: Any, **options: Any) -> None:
        mine = {name: value for name, value in options.items() if name not in TORCH_KEYS}
        super().__init__(params, **{**{n: v for n, v in options.items() if n in TORCH_KEYS}, "foreach": False})
        self.defaults.update(mine)
        for group in self.param_groups:
            for name, value in mine.items():
                group.setdefault(name, value)

        self.register_step_pre_hook(_shrink)
        self.register_step_post_hook(_restore)


@torch.no_grad()
def _shrink(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        group["kept"] = group["weight_decay"]
        if group.get("decoupled_weight_decay"):
            for param in group["params"]:
                if param.grad is not None:
                    param.mul_(1 - float(group["lr"]) * float(group["weight_decay"]))
            group["weight_decay"] = 0.0


def _restore(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = group.pop("kept")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in other places."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "last first" and tensor.dim() > 2:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced" and tensor.dim():
        wider = torch.full([2 * size + 1 for size in tensor.shape], 77.0, dtype=tensor.dtype, device=tensor.device)
        view = wider[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if layout == "expanded" and tensor.dim():
        return tensor[:1].expand_as(tensor)
    return tensor.clone(memory_format=torch.contiguous_format)


LAYOUTS = ("contiguous", "transposed", "last first", "sliced")


class Twins:
    """Our optimizer and torch's on equal parameters; a third, in float64, where those have fewer bits.

    ``groups`` holds a group's shapes and what the group says for itself, if anything.
    """

    def __init__(
        self,
        place: Place,
        groups: Sequence[tuple[Sequence[tuple[int, ...]], dict[str, Any]]],
        *,
        dtype: torch.dtype = torch.float64,
        layout: str = "contiguous",
        **options: Any,
    ) -> None:
        self.place, self.steps = place, 0
        self.magnitudes: dict[Tensor, dict[str, Tensor]] = {}  # see add_up_magnitudes
        self.params: list[tuple[Tensor, Tensor, Tensor]] = []
        named = [(self._new(shapes, dtype, layout), own) for shapes, own in groups]
        options.setdefault("lr", 0.1)
        self.ours = SGD([{"params": [p[0] for p in params], **own} for params, own in named], **options)
        self.theirs = TorchSGD([{"params": [p[1] for p in params], **own} for params, own in named], **options)
        self.exact = TorchSGD([{"params": [p[2] for p in params], **own} for params, own in named], **options)

    @property
    def optimizers(self) -> tuple[SGD, TorchSGD, TorchSGD]:
        return self.ours, self.theirs, self.exact

    def _new(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, layout: str
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        added = []
        for shape in shapes:
            values = torch.randn(shape, dtype=dtype, device=self.place.device)
            added.append(
                (
                    laid_out(values, layout).requires_grad_(),
                    values.clone().requires_grad_(),
                    values.to(torch.float64, copy=True),
                )
            )
        self.params += added
        return added

    def add_group(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype = torch.float64,
        layout: str = "contiguous",
        **own: Any,
    ) -> None:
        added = self._new(shapes, dtype, layout)
        for k, optimizer in enumerate(self.optimizers):
            optimizer.add_param_group({"params": [tensors[k] for tensors in added], **own})

    def say(self, group: int = 0, **values: Any) -> None:
        """Change a group's settings."""
        for optimizer in self.optimizers:
            optimizer.param_groups[group].update(values)

    def give(self, without: Sequence[int] = (), layout: str = "contiguous") -> None:
        """New gradients."""
        for i, (ours, theirs, exact) in enumerate(self.params):
            if i in without:
                ours.grad = theirs.grad = exact.grad = None
                continue
            gradient = laid_out(torch.randn_like(theirs).detach(), layout)
            ours.grad, theirs.grad, exact.grad = gradient, gradient.clone(), gradient.to(torch.float64, copy=True)

    def step(
        self, times: int = 1, without: Sequence[int] = (), layout: str = "contiguous", state: bool = True
    ) -> None:
        for _ in range(times):
            self.give(without, layout)
            for optimizer in self.optimizers:
                optimizer.step()
            self.compare(state=state)

    def scaled_step(self, overflow: bool = False, without: Sequence[int] = ()) -> None:
        """As torch.amp.GradScaler steps an optimizer that unscales for itself."""
        self.give(without)
        with torch.no_grad():
            for ours, *_ in self.params:
                if ours.grad is not None:
                    ours.grad *= 8.0
                    if overflow and ours.numel():
                        ours.grad.view(-1)[0] = float("inf")
        self.ours.grad_scale = torch.tensor(8.0, device=self.place.device)  # type: ignore[attr-defined]
        self.ours.found_inf = torch.tensor(float(overflow), device=self.place.device)  # type: ignore[attr-defined]
        self.ours.step()
        del self.ours.grad_scale, self.ours.found_inf  # type: ignore[attr-defined]
        if not overflow:
            self.theirs.step()
            self.exact.step()
            for ours, theirs, _ in self.params:
                if ours.grad is not None:
                    assert theirs.grad is not None
                    assert torch.equal(ours.grad, theirs.grad), "the gradient is not left unscaled"
        self.compare(state=False)

    def add_up_magnitudes(self) -> None:
        """From now on, let rounding be compared with the magnitudes of the terms that a number is the sum of.

        Random steps may cancel; what is left is small beside its own rounding error.
        """
        self.exact.register_step_pre_hook(self._add_up)

    @torch.no_grad()
    def _add_up(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            lr, momentum, decay = (float(group[name]) for name in ("lr", "momentum", "kept"))
            for param in group["params"]:
                if param.grad is None:
                    continue
                of_param = self.magnitudes.setdefault(param, {"parameter": param.abs()})
                if "momentum_buffer" not in optimizer.state.get(param, {}):
                    of_param["momentum"] = torch.zeros_like(param)
                step = param.grad.abs() + decay * of_param["parameter"]
                if momentum != 0:
                    of_param["momentum"] = momentum * of_param["momentum"] + step
                    step = step + momentum * of_param["momentum"] if group["nesterov"] else of_param["momentum"]
                of_param["parameter"] = of_param["parameter"] + lr * step

    def compare(self, state: bool = True) -> None:
        self.steps += 1
        for i, (ours, theirs, exact) in enumerate(self.params):
            magnitudes = self.magnitudes.get(exact, {})
            self._compare(f"parameter {i} at step {self.steps}", ours, theirs, exact, magnitudes.get("parameter"))
            states = [o.state.get(p, {}) for o, p in zip(self.optimizers, self.params[i], strict=True)]
            if state:
                assert set(states[0]) == set(states[1]), f"state of parameter {i} at step {self.steps}"
            if states[1]:
                buffers = [s["momentum_buffer"] for s in states]
                self._compare(f"momentum {i} at step {self.steps}", *buffers, magnitudes.get("momentum"))

    def _compare(self, what: str, ours: Tensor, theirs: Tensor, exact: Tensor, magnitudes: Tensor | None) -> None:
        ours, theirs, exact = ours.detach(), theirs.detach(), exact.detach()
        if ours.dtype == torch.float64:
            torch.testing.assert_close(
                ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True, msg=lambda m: f"{what}: {m}"
            )
        else:
            cancelled = 0.0
            if magnitudes is not None and magnitudes.numel():
                left = float(magnitudes.max() - exact.abs().max())
                cancelled = 4.0 * torch.finfo(ours.dtype).eps * max(left, 0.0)
            reference.assert_no_worse(ours, theirs, exact, what, ulps=4.0, cancelled=cancelled)


# ------------------------------------------------------------------------------------------- the step, step by step


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", RULES)
def test_rules(place: Place, rule: str, dtype: torch.dtype) -> None:
    shapes = [(3,), SMALL, (2, 3, 4)] if place.interpreted else [(3,), SMALL, (2, 3, 4), LARGE]
    Twins(place, [(shapes, {})], dtype=dtype, **RULES[rule]).step(5)


@pytest.mark.parametrize("rule", ["dampening", "nesterov, all"])
def test_many_chunks(place: Place, rule: str) -> None:
    Twins(place, [([(4096,), (4097,), LARGE, (3,)], {})], **RULES[rule]).step(2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("rounding", ["nearest", "master"])
def test_elements_beyond_2_31(kernels: Place, tmp_path: Path, layout: str, rounding: str) -> None:
    """The last chunks of tensors in files with holes, by the kernels; nobody has to have the memory of the rest."""
    if not kernels.interpreted:
        pytest.skip("test_gpu_sgd.py has whole ones")
    from fastloss.kernels import sgd

    rows, columns = (1 << 16) + 3, 1 << 15
    count, last = rows * columns, 5000

    def in_a_file(name: str, dtype: torch.dtype) -> Tensor:
        return torch.from_file(str(tmp_path / name), shared=True, size=count, dtype=dtype)

    theta, grad, momentum = (in_a_file(name, torch.float16) for name in ("theta", "grad", "momentum"))
    master = in_a_file("master", torch.float32) if rounding == "master" else None
    theta[-last:] = torch.arange(last) % 7
    momentum[-last:] = 2.0
    if master is not None:
        master[-last:] = theta[-last:]
    if layout == "transposed":
        laid_out_as_theta, grad = torch.arange(count - last, count), grad.view(columns, rows).t()
        row, column = laid_out_as_theta // columns, laid_out_as_theta % columns
        grad[row, column] = (laid_out_as_theta % 5).to(torch.float16)
    else:
        grad[-last:] = torch.arange(count - last, count) % 5
        grad = grad.view(rows, columns)
    param = theta.view(rows, columns)
    companions = [None if master is None else master.view(rows, columns)]
    batch = SGDBatch([param], [momentum.view(rows, columns)], companions, [0], rounding, {})
    (tables,) = sgd._tables_of(batch, [grad], frozenset()).values()
    assert len(tables.device.items) == -(-count // FLAG_ELEMENTS) > (1 << 19)
    tables.device = tables.device._replace(items=tables.device.items[-2:].clone())
    sgd.sgd_step(batch, [grad], [SGDRule(0.5, 0.5, 0.0, 0.0, False, False, False)], SGDControls())
    places = torch.arange(count - last, count)
    expected = (torch.arange(last) % 7).double() - 0.5 * (0.5 * 2.0 + (places % 5).double())
    assert torch.equal(theta[-last:].double(), expected)
    squares = torch.zeros((), dtype=torch.float64)
    sgd.sgd_squares(batch, [grad], squares)
    in_items = places[places >= (count - 1) // FLAG_ELEMENTS * FLAG_ELEMENTS - FLAG_ELEMENTS]
    assert squares == (in_items % 5).double().square().sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_groups_of_different_rules(place: Place, dtype: torch.dtype) -> None:
    """More than four: the kernels take those from a table."""
    groups = [([SMALL, (3,)], {**rule, "lr": 0.01 * (i + 1)}) for i, rule in enumerate(RULES.values())]
    for some in (groups[:2], groups[3:6], groups[4:8], groups):
        Twins(place, some, dtype=dtype).step(3)


def test_two_dtypes(place: Place) -> None:
    twins = Twins(place, [([SMALL], {})], momentum=0.9, weight_decay=0.1)
    twins.add_group([SMALL, (3,)], torch.float32, momentum=0.5)
    twins.step(3)


@pytest.mark.parametrize("rule", ["momentum", "dampening", "decoupled, all"])
def test_group_added_in_mid_run(place: Place, rule: str) -> None:
    twins = Twins(place, [([SMALL, (3,)], {})], **RULES[rule])
    twins.step(2)
    twins.add_group([(4,), (2, 2)], lr=0.5)
    twins.step(2)
    twins.add_group([(1,)], weight_decay=0.7)
    twins.step(2, without=[0])


@pytest.mark.parametrize("rule", ["plain", "momentum", "dampening", "nesterov, all"])
@pytest.mark.parametrize("size", ["small", "mixed"])
def test_first_gradient_late(place: Place, rule: str, size: str) -> None:
    shapes = [(3,), SMALL, (4,)] if size == "small" or place.interpreted else [(3,), LARGE, SMALL, (7000, 3)]
    twins = Twins(place, [(shapes, {})], **RULES[rule])
    twins.step(2, without=[1])
    twins.step(2)
    twins.step(2, without=[0, 2])
    twins.step(2)


def test_no_gradient_at_all(place: Place) -> None:
    twins = Twins(place, [([SMALL, (3,)], {})], momentum=0.9, weight_decay=0.1)
    twins.step(1, without=[0, 1])
    twins.step(2)
    twins.step(1, without=[0, 1])


def test_frozen_and_unfrozen(place: Place) -> None:
    """``requires_grad`` is nobody's business: what has a gradient steps."""
    twins = Twins(place, [([SMALL, (3,)], {})], momentum=0.9)
    twins.step(2)
    for tensors in twins.params[0][:2]:
        tensors.requires_grad_(False)
    twins.step(1)
    twins.step(1, without=[0])
    for tensors in twins.params[0][:2]:
        tensors.requires_grad_(True)
    twins.step(2)


@pytest.mark.parametrize("rule", ["plain", "dampening", "nesterov, all"])
def test_no_elements_and_no_dimensions(place: Place, rule: str) -> None:
    twins = Twins(place, [([(), (0,), (3, 0, 2), (1,), (1, 1, 1)], {})], **RULES[rule])
    twins.step(2, without=[1])
    twins.step(2)


def test_only_empty_tensors(place: Place) -> None:
    Twins(place, [([(0,), (2, 0)], {})], momentum=0.9, dampening=0.5).step(2)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_turned_on_and_off(place: Place, dampening: float) -> None:
    twins = Twins(place, [([SMALL, (3,)], {})], dampening=dampening)
    for momentum in (0, 0.9, 0, 0.9, 0.0, 0.3):
        twins.say(momentum=momentum)
        twins.step(2)


def test_settings_changed_in_mid_run(place: Place) -> None:
    twins = Twins(place, [([SMALL, (3,)], {}), ([(4,)], {"lr": 0.3})], momentum=0.9)
    for change in ({"nesterov": True}, {"weight_decay": 0.2}, {"maximize": True}, {"lr": 0}, {"lr": 2.0}):
        twins.say(1, **change)
        twins.step(2)


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_settings_in_tensors(place: Place, shape: tuple[int, ...], where: str) -> None:
    """They are read anew at every step."""
    device = place.device if where == "device" else "cpu"
    names = ("lr", "momentum", "weight_decay")
    values = {name: torch.full(shape, 0.5, dtype=torch.float64, device=device) for name in names}
    twins = Twins(place, [([SMALL, (3,)], {})], dampening=0.25)
    for optimizer in (twins.theirs, twins.exact):
        optimizer.param_groups[0].update(dict.fromkeys(values, 0.5))
    twins.ours.param_groups[0].update(values)
    for factor in (1.0, 0.5, 1.25):
        for name, value in values.items():
            value.mul_(factor)
            for optimizer in (twins.theirs, twins.exact):
                optimizer.param_groups[0][name] *= factor
        twins.step(2)
    constructed = SGD([torch.zeros(3)], **values)
    assert all(constructed.param_groups[0][name] is value for name, value in values.items())


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_tensor_of_0_is_no_momentum(place: Place, dampening: float) -> None:
    """Without momentum there is neither dampening nor a buffer, whoever holds the number."""
    momentum = torch.tensor(0.0)
    twins = Twins(place, [([SMALL, (3,)], {})], momentum=momentum, dampening=dampening)
    for value in (0.0, 0.9, 0.0, 0.5):
        momentum.fill_(value)
        twins.step(2)


def test_numbers_of_numpy(place: Place) -> None:
    """What ``np.linspace`` and the like give."""
    values: dict[str, Any] = {"lr": np.float32(0.5), "momentum": np.float64(0.25), "weight_decay": np.float32(0.125)}
    Twins(place, [([SMALL, (3,)], {})], dampening=np.float32(0.5), **values).step(3)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("rule", ["plain", "full dampening", "all", "nesterov, all", "decoupled, all"])
def test_special_gradients(place: Place, rule: str, value: float) -> None:
    twins = Twins(place, [([SMALL, (3,)], {})], **RULES[rule])
    twins.step(2)
    twins.give()
    for tensors in twins.params:
        for tensor in tensors:
            assert tensor.grad is not None
            tensor.grad.view(-1)[1] = value
    for optimizer in twins.optimizers:
        optimizer.step()
    twins.compare()
    twins.step(2)


def test_infinite_parameter_without_decay(place: Place) -> None:
    """0 · inf must not come up."""
    twins = Twins(place, [([(3,)], {})], lr=0.1, weight_decay=0.0)
    with torch.no_grad():
        for tensor in twins.params[0]:
            tensor[0] = float("inf")
    twins.step(2)


@pytest.mark.parametrize("where", ["contiguous", "transposed", "last first", "sliced"])
@pytest.mark.parametrize("rule", ["plain", "dampening", "nesterov, all"])
def test_strides(place: Place, rule: str, where: str) -> None:
    """Gradients lie as they like; around a slice nothing is written."""
    shapes = [(3, 4, 5), SMALL, (6,)]
    twins = Twins(place, [(shapes, {})], layout=where, **RULES[rule])
    twins.step(1, without=[1])
    for layout in (*LAYOUTS, "expanded"):
        twins.step(1, layout=layout)
    if where == "sliced":
        for ours, *_ in twins.params:
            whole = torch.empty(0, dtype=ours.dtype, device=ours.device).set_(ours.untyped_storage())
            assert int((whole == 77.0).sum()) == whole.numel() - ours.numel()


@pytest.mark.parametrize("where", ["contiguous", "transposed", "sliced"])
def test_strides_of_large_tensors(place: Place, where: str) -> None:
    twins = Twins(place, [([LARGE, (3,)], {})], layout=where, momentum=0.9, dampening=0.5)
    for layout in ("contiguous", "transposed") if place.interpreted else LAYOUTS:
        twins.step(1, layout=layout)


def test_tensor_whose_elements_share_memory(place: Place) -> None:
    """What comes of it is up to torch's operators."""
    if place.device.type != "cpu":
        pytest.skip("on a GPU torch's own result is a matter of chance")
    memories = [torch.zeros(8) for _ in range(2)]
    views = [memory.as_strided((3, 3), (1, 1)) for memory in memories]
    gradient = torch.ones(3, 3)
    for view, make in zip(views, (SGD, TorchSGD), strict=True):
        view.grad = gradient.clone()
        make([view], lr=0.5).step()
    assert torch.equal(*memories)


@pytest.mark.parametrize("make", [SGD, TorchSGD])
def test_expanded_parameter_is_an_error(place: Place, make: Callable[..., torch.optim.Optimizer]) -> None:
    param = torch.zeros(1, device=place.device).expand(4)
    param.grad = torch.ones(4, device=place.device)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        make([param], lr=0.5).step()


# ---------------------------------------------------------------------------------------------- closures and hooks


def test_closure(place: Place) -> None:
    twins = Twins(place, [([SMALL], {})], momentum=0.9)
    values = []
    for optimizer, param in zip(twins.optimizers[:2], twins.params[0][:2], strict=True):

        def closure(optimizer: Any = optimizer, param: Tensor = param) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = param.square().sum()
            loss.backward()
            return loss

        with torch.no_grad():
            values.append([optimizer.step(closure).item() for _ in range(3)])
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    torch.testing.assert_close(twins.params[0][0], twins.params[0][1], rtol=1e-12, atol=1e-12)


def test_hooks(place: Place) -> None:
    """A hook may change arguments, gradients and what there is to step."""
    twins = Twins(place, [([SMALL, (3,)], {})], momentum=0.9)
    seen: dict[torch.optim.Optimizer, list[str]] = {optimizer: [] for optimizer in twins.optimizers}

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        seen[optimizer].append("before")
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad.mul_(2.0)

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        seen[optimizer].append("after")
        optimizer.param_groups[0]["lr"] *= 0.5

    handles = [optimizer.register_step_pre_hook(before) for optimizer in twins.optimizers]
    handles += [optimizer.register_step_post_hook(after) for optimizer in twins.optimizers]
    twins.step(3)
    for handle in handles:
        handle.remove()
    twins.step(1)
    assert all(calls == ["before", "after"] * 3 for calls in seen.values())


def test_hooks_of_all_optimizers_and_of_a_subclass(place: Place) -> None:
    """As many calls as with torch's optimizers, where a class of the user's calls ours too."""

    class Counting(SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)

    for make in (SGD, Counting):
        param = torch.zeros(3, device=place.device)
        param.grad = torch.ones_like(param)
        optimizer = make([param], lr=0.1)
        calls: list[str] = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_, c=calls: c.append("all before")),
            register_optimizer_step_post_hook(lambda *_, c=calls: c.append("all after")),
            optimizer.register_step_pre_hook(lambda *_, c=calls: c.append("before")),
            optimizer.register_step_post_hook(lambda *_, c=calls: c.append("after")),
        ]
        try:
            optimizer.step()
        finally:
            for handle in handles:
                handle.remove()
        expected = ["all before", "before", "after", "all after"]
        if make is Counting:  # as of torch's optimizers, if one of the class itself was made before
            assert calls == [*expected[:2], *expected, *expected[2:]]
            assert optimizer.steps == 1
        else:
            assert calls == expected
        optimizer.step()
        assert len(calls) == (4 if make is SGD else 8)
        torch.testing.assert_close(param, torch.full_like(param, -0.2))


def test_a_profiler_sees_the_step(place: Place) -> None:
    param = torch.zeros(3, device=place.device)
    param.grad = torch.ones_like(param)
    optimizer = SGD([param], lr=0.1)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}


def test_step_in_backward(place: Place) -> None:
    """An optimizer for each parameter, stepped as soon as its gradient is there."""
    ours, theirs = (nn.Linear(3, 2, dtype=torch.float64, device=place.device) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    for model, make in ((ours, SGD), (theirs, TorchSGD)):
        for param in model.parameters():
            optimizer = make([param], lr=0.1, momentum=0.9)

            def hook(param: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            param.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        x = torch.randn(4, 3, dtype=torch.float64, device=place.device)
        for model in (ours, theirs):
            model(x).square().mean().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is None
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ schedulers


def warm_up_then_cosine(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, lr_scheduler.CosineAnnealingLR(optimizer, 7)], [3])


def chained(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 4), lr_scheduler.ExponentialLR(optimizer, 0.8)]
    )


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, 0.9, 5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": warm_up_then_cosine,
    "ChainedScheduler": chained,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, 0.01),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, 3, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=12),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, 4),
}


def test_all_schedulers_are_here() -> None:
    missing = set(lr_scheduler.__all__) - set(SCHEDULERS) - {"LRScheduler"}
    assert not missing, f"new schedulers in torch: {missing}"


@pytest.mark.parametrize(
    ("name", "lr"),
    [
        *((name, "number") for name in SCHEDULERS),
        *((name, "tensor") for name in ("StepLR", "OneCycleLR", "CyclicLR")),
    ],
)
def test_schedulers(place: Place, name: str, lr: str) -> None:
    """Also those that cycle the momentum."""
    twins = Twins(place, [([SMALL], {}), ([(3,)], {"weight_decay": 0.1})], momentum=0.9)
    schedulers = []
    for optimizer in twins.optimizers:
        if lr == "tensor":
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(0.1, dtype=torch.float64)
        schedulers.append(SCHEDULERS[name](optimizer))
    for _ in range(10):
        twins.step()
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    for ours, theirs in zip(twins.ours.param_groups, twins.theirs.param_groups, strict=True):
        assert float(ours["lr"]) == pytest.approx(float(theirs["lr"]), rel=1e-12)
        assert ours["momentum"] == theirs["momentum"]


# ------------------------------------------------------------------------------------------- torch's own test cases

CASES = INFO.optim_inputs_func(torch.device("cpu"))
ERRORS = INFO.optim_error_inputs_func(torch.device("cpu"), torch.float32)
FLAGS: list[dict[str, Any]] = [
    {"foreach": True, "fused": False},
    {"foreach": False, "fused": True},
    {"differentiable": True},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.desc)
def test_cases_of_torch(place: Place, case: Any, flags: dict[str, Any]) -> None:
    """torch's flags are taken, and say nothing here."""
    twins = Twins(place, [([SMALL, (3,)], {})], **case.kwargs)
    for tensors in twins.params:
        for tensor in tensors:
            tensor.requires_grad_(False)  # a differentiable step of a leaf that does is an error, in torch too
    twins.ours = SGD([tensors[0] for tensors in twins.params], **{"lr": 0.1, **case.kwargs}, **flags)
    twins.step(4)
    for name, value in flags.items():
        assert twins.ours.param_groups[0][name] is value


@pytest.mark.parametrize("number", range(len(ERRORS)), ids=lambda number: ERRORS[number].optimizer_error_input.desc)
def test_errors_of_torch(place: Place, number: int) -> None:
    error = INFO.optim_error_inputs_func(torch.device("cpu"), torch.float32)[number]
    assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    params, kwargs = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
    params = [nn.Parameter(torch.zeros(2))] if params is None else params
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            SGD(params, **kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            SGD(params, **kwargs)


@pytest.mark.parametrize("number", range(len(INFO.scheduler_inputs)))
def test_scheduler_cases_of_torch(place: Place, number: int) -> None:
    twins = Twins(place, [([SMALL], {}), ([(3,)], {"lr": 0.01})], lr=0.05, momentum=0.9)
    schedulers = [[make(optimizer) for make in INFO.scheduler_inputs[number]] for optimizer in twins.optimizers]
    for _ in range(12):
        twins.step()
        for of_one in schedulers:
            for scheduler in of_one:
                plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([1.0] if plateau else []))


@pytest.mark.parametrize(
    "flags", [{"foreach": True, "fused": True}, {"fused": True, "differentiable": True}], ids=str
)
def test_flags_that_contradict_each_other(flags: dict[str, Any]) -> None:
    for make in (SGD, torch.optim.SGD):
        with pytest.raises(RuntimeError, match="`fused`"):
            make([torch.zeros(2)], **flags)


def test_sparse_gradients(place: Place) -> None:
    params = [torch.randn(6, 2, dtype=torch.float64, device=place.device)]
    params.append(params[0].clone())
    optimizers = [make([p], lr=0.1) for make, p in zip((SGD, TorchSGD), params, strict=True)]
    for _ in range(3):
        gradient = torch.zeros(6, 2, dtype=torch.float64, device=place.device)
        gradient[torch.randint(6, (2,))] = 0.5
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = gradient.to_sparse()
            optimizer.step()
    torch.testing.assert_close(*params, rtol=1e-12, atol=1e-12)


def test_sparse_and_dense_in_turn(place: Place) -> None:
    twins = Twins(place, [([SMALL, (3,)], {})], momentum=0.9)
    for sparse in (False, True, False, False, True):
        twins.give()
        if sparse:
            for tensor in twins.params[0]:
                assert tensor.grad is not None
                tensor.grad = tensor.grad.to_sparse()
        for optimizer in twins.optimizers:
            optimizer.step()
        twins.compare()


def test_sparse_gradients_of_tensors_within_others(place: Place) -> None:
    """torch adds a sparse tensor to other memory than that of a tensor with a storage offset."""
    for dtype, options in ((torch.float64, {}), (torch.bfloat16, {"momentum_dtype": torch.float32})):
        around = torch.zeros(40, dtype=dtype, device=place.device)
        params = [nn.Parameter(around[start : start + 6].view(2, 3)) for start in (0, 10)]
        optimizer = SGD(params, lr=0.5, momentum=0.5, **options)
        for to_sparse in (False, True):
            for param in params:
                param.grad = torch.ones_like(param)
                param.grad = param.grad.to_sparse() if to_sparse else param.grad
            optimizer.step()
        for param in params:
            torch.testing.assert_close(param.detach(), torch.full_like(param, -1.25), rtol=0, atol=0)
            momentum = optimizer.state[param]["momentum_buffer"]
            torch.testing.assert_close(momentum, torch.full_like(momentum, 1.5), rtol=0, atol=0)
        assert around.count_nonzero() == 12


def test_complex_parameters(place: Place) -> None:
    params = [torch.randn(3, dtype=torch.complex128, device=place.device)]
    params.append(params[0].clone())
    optimizers = [
        make([p], lr=0.1, momentum=0.9, weight_decay=0.1) for make, p in zip((SGD, TorchSGD), params, strict=True)
    ]
    for _ in range(3):
        gradient = torch.randn_like(params[0])
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(*params, rtol=1e-12, atol=1e-12)


def test_gradient_that_is_negated_when_read(place: Place) -> None:
    """Autograd leaves such a one behind ``z.conj().imag``."""
    twins = Twins(place, [([(), (3,)], {})], momentum=0.9)
    twins.step()
    twins.give()
    for ours, *_ in twins.params:
        assert ours.grad is not None
        ours.grad = torch._neg_view(-ours.grad)
        assert ours.grad.is_neg()
    for optimizer in twins.optimizers:
        optimizer.step()
    twins.compare()


# ------------------------------------------------------------------------------------------------------ state dicts


def fresh(twins: Twins) -> tuple[SGD, TorchSGD]:
    """Optimizers on the same tensors that know nothing yet."""
    sizes = [len(group["params"]) for group in twins.ours.param_groups]
    made = []
    for k, make in enumerate((SGD, TorchSGD)):
        tensors = iter([tensors[k] for tensors in twins.params])
        made.append(make([{"params": [next(tensors) for _ in range(size)]} for size in sizes], lr=7.0))
    return made[0], made[1]


def by_torch(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


THROUGH: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": by_torch,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}
SHAPES = [([SMALL, (3,)], {}), ([(4097,), ()], {"lr": 0.3, "weight_decay": 0.1}), ([(0,), (2,)], {"momentum": 0.0})]


@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours", "exchanged", "ours to ours"])
@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("rule", ["dampening", "nesterov"])
def test_state_dict(place: Place, rule: str, through: str, direction: str) -> None:
    groups = [(shapes, {**own, "nesterov": False} if "momentum" in own else own) for shapes, own in SHAPES]
    twins = Twins(place, groups, **RULES[rule])
    twins.step(2, without=[1])
    ours, theirs = fresh(twins)
    carry = THROUGH[through]
    mine, others = twins.ours.state_dict(), twins.theirs.state_dict()
    if direction in ("torch to ours", "exchanged"):
        ours.load_state_dict(carry(others))
        twins.ours = ours
    if direction in ("ours to torch", "exchanged"):
        theirs.load_state_dict(carry(mine))
        twins.theirs = theirs
    if direction == "ours to ours":
        ours.load_state_dict(carry(mine))
        twins.ours = ours
    twins.step(1, without=[1])
    twins.step(2)


def test_state_dict_is_that_of_torch(place: Place) -> None:
    twins = Twins(place, SHAPES, momentum=0.9)
    twins.step(2, without=[3])
    ours, theirs = twins.ours.state_dict(), twins.theirs.state_dict()
    assert set(ours["state"]) == set(theirs["state"])
    for number, state in theirs["state"].items():
        assert set(ours["state"][number]) == set(state)
    for mine, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert {name: mine[name] for name in other if name != "foreach"} == {
            n: v for n, v in other.items() if n != "foreach"
        }


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_whole_optimizer(place: Place, through: str) -> None:
    """With its parameters: the copy goes on with its own."""
    twins = Twins(place, [([SMALL, (3,)], {}), ([(4,)], {"lr": 0.3})], momentum=0.9, dampening=0.5)
    twins.step(2, without=[1])
    kept = [tensors[0].detach().clone() for tensors in twins.params]
    old = twins.ours
    twins.ours = THROUGH[through](old)
    copies = [param for group in twins.ours.param_groups for param in group["params"]]
    twins.params = [(mine, *others) for mine, (_, *others) in zip(copies, twins.params, strict=True)]  # type: ignore[misc]
    twins.step(3)
    for before, group in zip(kept, [p for g in old.param_groups for p in g["params"]], strict=True):
        assert torch.equal(before, group), "the original has moved"


def test_module_and_optimizer_in_one_deepcopy(place: Place) -> None:
    model = nn.Linear(3, 2, device=place.device)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3, device=place.device)).sum().backward()
    optimizer.step()
    model, optimizer = copy.deepcopy((model, optimizer))
    before = model.weight.detach().clone()
    model(torch.ones(1, 3, device=place.device)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.weight)


def test_pickled_size(place: Place) -> None:
    """The buffers of small tensors lie side by side in one piece of memory, which is not to be written each time."""
    sizes = []
    for make in (SGD, TorchSGD):
        params = [torch.zeros(500, device=place.device) for _ in range(8)]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = make(params, lr=0.1, momentum=0.9)
        optimizer.step()
        sizes.append(len(pickle.dumps(optimizer.state_dict())))
        optimizer.step()
        sizes.append(len(pickle.dumps(optimizer)))
    assert sizes[0] < sizes[2] + 2000
    assert sizes[1] < sizes[3] + 2000


@pytest.mark.parametrize("through", THROUGH)
def test_sparse_momentum_in_a_checkpoint(place: Place, through: str) -> None:
    """The buffer of a parameter whose first gradient was sparse is sparse."""
    param = nn.Parameter(torch.randn(6, 2, dtype=torch.float64, device=place.device))
    optimizer = SGD([param], lr=0.1, momentum=0.9)
    twin = nn.Parameter(param.detach().clone())
    other = torch.optim.SGD([twin], lr=0.1, momentum=0.9)
    for number in range(4):
        gradient = torch.zeros_like(param)
        gradient[torch.randint(6, (2,))] = 0.5
        for each, its in ((param, optimizer), (twin, other)):
            each.grad = gradient.to_sparse()
            its.step()
        if number == 1:
            state = THROUGH[through](optimizer.state_dict())
            assert state["state"][0]["momentum_buffer"].is_sparse
            optimizer = SGD([param], lr=0.1, momentum=0.9)
            optimizer.load_state_dict(state)
    torch.testing.assert_close(param, twin, rtol=1e-12, atol=1e-12)


def test_state_dict_in_mid_run_disturbs_nothing(place: Place) -> None:
    twins = Twins(place, SHAPES, momentum=0.9, dampening=0.5)
    for _ in range(4):
        twins.step()
        before = twins.ours.state_dict()["state"]
        for tensors, number in zip(twins.params, range(len(twins.params)), strict=True):
            if number in before:
                assert before[number]["momentum_buffer"] is twins.ours.state[tensors[0]]["momentum_buffer"]


@pytest.mark.parametrize("through", ["state_dict", "pickle", "deepcopy"])
def test_state_of_somebody_else(place: Place, through: str) -> None:
    """A program may keep what it likes in ``optimizer.state``: it is saved and loaded with the rest, as by torch."""
    param = torch.zeros(3, device=place.device)
    optimizer = SGD([param], lr=0.1, momentum=0.9)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.state[param]["mine"] = [1, 2]
        optimizer.state["steps"] = 1 + optimizer.state.get("steps", 0)
        optimizer.step()
    if through == "state_dict":
        other = SGD([param], lr=0.5)
        other.load_state_dict(optimizer.state_dict())
    else:
        other = pickle.loads(pickle.dumps(optimizer)) if through == "pickle" else copy.deepcopy(optimizer)
    (twin,) = other.param_groups[0]["params"]
    assert other.state["steps"] == 3
    assert other.state[twin]["mine"] == [1, 2]
    assert torch.equal(other.state[twin]["momentum_buffer"], optimizer.state[param]["momentum_buffer"])
    twin.grad = torch.ones_like(twin)
    other.step()
    torch.testing.assert_close(twin, torch.full_like(twin, -0.1 * (1 + 1.9 + 2.71 + 3.439)))


def test_named_parameters(place: Place) -> None:
    model = nn.Linear(3, 2, device=place.device)
    optimizer = SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3, device=place.device)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == ["weight", "bias"]
    theirs = torch.optim.SGD(model.named_parameters(), lr=0.1)
    theirs.load_state_dict(by_torch(state))
    again = SGD(model.named_parameters(), lr=0.5)
    again.load_state_dict(theirs.state_dict())
    assert again.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert again.param_groups[0]["lr"] == 0.1
    again.step()


def test_options_that_torch_does_not_know_stay(place: Place) -> None:
    params = [torch.zeros(3, device=place.device), torch.zeros(2, device=place.device)]
    own: dict[str, Any] = {"decoupled_weight_decay": True, "momentum_dtype": torch.float64}
    optimizer = SGD([{"params": params[:1], **own}, {"params": params[1:]}], lr=0.1, max_norm=3.0)
    theirs = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.5, momentum=0.9)
    for param in params:
        param.grad = torch.ones_like(param)
    theirs.step()
    optimizer.load_state_dict(theirs.state_dict())
    assert {name: optimizer.param_groups[0][name] for name in own} == own
    assert not optimizer.param_groups[1]["decoupled_weight_decay"]
    assert [group["max_norm"] for group in optimizer.param_groups] == [3.0, 3.0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert optimizer.state[params[0]]["momentum_buffer"].dtype == torch.float64
    assert optimizer.state[params[1]]["momentum_buffer"].dtype == torch.float32


def test_state_dict_hooks(place: Place) -> None:
    """What a hook makes of a state dict is what is loaded, and what is looked at."""
    param = torch.zeros(3, device=place.device)
    optimizer = SGD([param], lr=0.1)
    state = optimizer.state_dict()

    def halve(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        return {**loaded, "param_groups": [{**group, "lr": group["lr"] / 2} for group in loaded["param_groups"]]}

    handle = optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.05
    handle.remove()
    optimizer.register_load_state_dict_pre_hook(lambda _, loaded: {**loaded, "param_groups": []})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state)


def test_hooks_after_a_load(place: Place) -> None:
    """They find the options and dtypes of this optimizer, and what they put in their place stays."""
    param = nn.Parameter(torch.ones(4, dtype=torch.float16, device=place.device))
    param.grad = torch.ones_like(param)
    theirs = torch.optim.SGD([param], lr=0.1, momentum=0.5)
    theirs.step()
    group = {"params": [param], "max_norm": 7.0, "momentum_dtype": torch.float32}
    optimizer = SGD([group], lr=0.1, momentum=0.5)
    found = []

    def reset(loaded: torch.optim.Optimizer) -> None:
        buffer = loaded.state[param]["momentum_buffer"]
        found.append((loaded.param_groups[0]["max_norm"], buffer.dtype))
        loaded.state[param]["momentum_buffer"] = torch.zeros_like(buffer)

    optimizer.register_load_state_dict_post_hook(reset)
    optimizer.load_state_dict(theirs.state_dict())
    assert found == [(7.0, torch.float32)]
    assert not optimizer.state[param]["momentum_buffer"].any()


def spoilt(state: dict[str, Any], how: str) -> tuple[dict[str, Any], str]:
    """A state dict that does not fit, and what is to be said of it."""
    state = copy.deepcopy(state)
    groups, first = state["param_groups"], state["state"][0]
    if how == "fewer groups":
        groups.pop()
        return state, "different number of parameter groups: it has 1, the optimizer has 2"
    if how == "longer group":
        groups[0]["params"].append(9)
        return state, "group 0 has 3 parameters, the optimizer's has 2"
    if how == "shape":
        first["momentum_buffer"] = torch.zeros(7, 5)
        return state, r"momentum_buffer of parameter 0 has shape \(7, 5\), but the parameter has shape \(5, 7\)"
    if how == "fits by broadcasting":
        first["momentum_buffer"] = torch.zeros(1, 7)
        return state, r"has shape \(1, 7\)"
    if how == "no tensor":
        first["momentum_buffer"] = [1.0]
        return state, "momentum_buffer of parameter 0 is a list, expected a tensor"
    assert how == "exclusive"
    groups[0].update(master_weights=True, kahan_sum=True)
    return state, "master_weights and kahan_sum exclude each other"


@pytest.mark.parametrize(
    "how",
    ["fewer groups", "longer group", "shape", "fits by broadcasting", "no tensor", "exclusive"],
)
def test_state_dict_that_does_not_fit(place: Place, how: str) -> None:
    """It is refused with what it says, and the optimizer goes on as if nothing had been."""
    twins = Twins(place, [([SMALL, (3,)], {}), ([(4,)], {"lr": 0.3})], momentum=0.9)
    twins.step(2)
    before = copy.deepcopy(twins.ours.state_dict())
    state, message = spoilt(before, how)
    with pytest.raises(ValueError, match=message):
        twins.ours.load_state_dict(state)
    after = twins.ours.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert set(after["state"]) == set(before["state"])
    for number, buffers in before["state"].items():
        assert torch.equal(after["state"][number]["momentum_buffer"], buffers["momentum_buffer"])
    twins.step(2)
    twins.ours.load_state_dict(twins.ours.state_dict())
    twins.step(1)


@pytest.mark.parametrize(("name", "value"), [("momentum", 0.0), ("lr", -1e-19), ("dampening", 0.5)])
def test_options_that_ran_can_be_loaded(place: Place, name: str, value: float) -> None:
    """Numbers that the constructor refuses, and that a schedule may have set."""
    twins = Twins(place, [([SMALL, (3,)], {})], momentum=0.9, nesterov=True)
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups[0][name] = value
    twins.step(2)
    for optimizer in (twins.ours, twins.theirs):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer.param_groups[0][name] == value
    twins.step(2)


# -------------------------------------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lr": ({"lr": -0.1}, ValueError, "Invalid learning rate: -0.1"),
    "lr tensor": ({"lr": torch.tensor(-0.5)}, ValueError, "Invalid learning rate: -0.5"),
    "lr of two": ({"lr": torch.tensor([0.1, 0.2])}, ValueError, r"Tensor lr must be 1-element, got shape \(2,\)"),
    "lr of none": ({"lr": torch.tensor([])}, ValueError, r"Tensor lr must be 1-element, got shape \(0,\)"),
    "lr in words": ({"lr": "fast"}, TypeError, "lr must be a number.*got str 'fast'"),
    "no lr": ({"lr": None}, TypeError, "lr must be a number.*got NoneType"),
    "momentum": ({"momentum": -0.9}, ValueError, "Invalid momentum value: -0.9"),
    "momentum of two": ({"momentum": torch.zeros(2)}, ValueError, "Tensor momentum must be 1-element"),
    "momentum in words": ({"momentum": "0.9"}, TypeError, "momentum must be a number.*got str '0.9'"),
    "dampening in words": ({"momentum": 0.9, "dampening": "0"}, TypeError, "dampening must be a number, got str"),
    "decay": ({"weight_decay": -1e-4}, ValueError, "Invalid weight_decay value: -0.0001"),
    "decay of two": ({"weight_decay": torch.zeros(2)}, ValueError, "Tensor weight_decay must be 1-element"),
    "nesterov alone": ({"nesterov": True}, ValueError, "Nesterov momentum requires a momentum.*momentum 0"),
    "nesterov dampened": (
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        ValueError,
        "Nesterov momentum requires.*dampening 0.1",
    ),
    "norm": ({"max_norm": -1.0}, ValueError, "Invalid max_norm value: -1.0"),
    "NaN norm": ({"max_norm": float("nan")}, ValueError, "Invalid max_norm value: nan"),
    "norm in words": ({"max_norm": "1"}, TypeError, "max_norm must be a number or None, got str '1'"),
    "norm as a tensor": ({"max_norm": torch.ones(())}, TypeError, "max_norm must be a number or None, got Tensor"),
    "norm as a switch": ({"max_norm": True}, TypeError, "max_norm must be a number or None, got bool True"),
    "complex lr": ({"lr": torch.tensor(1j)}, TypeError, "lr must be a real number, got a tensor of torch.complex64"),
    "dampening as a switch": (
        {"momentum": 0.9, "dampening": True},
        TypeError,
        "dampening must be a number, got bool",
    ),
    "integer momentum": ({"momentum_dtype": torch.int32}, TypeError, "momentum_dtype must be.*got torch.int32"),
    "complex momentum": ({"momentum_dtype": torch.complex64}, TypeError, "momentum_dtype must be.*torch.complex64"),
    "momentum of 8 bits": ({"momentum_dtype": torch.float8_e4m3fn}, TypeError, "momentum_dtype must be.*float8"),
    "momentum type in words": ({"momentum_dtype": "float32"}, TypeError, "momentum_dtype must be.*'float32'"),
    **{
        f"huge {name}": ({name: 10**400}, ValueError, rf"{name} is about 2\^1328; expected at most 1.797.*e\+308")
        for name in ("lr", "momentum", "weight_decay", "dampening", "max_norm")
    },
    **{
        f"{name}={value!r}": ({name: value}, TypeError, f"{name} is {value!r}; expected True or False")
        for name, value in [
            *(("master_weights", "no"), ("kahan_sum", 1), ("stochastic_rounding", None)),
            ("decoupled_weight_decay", 0.01),
        ]
    },
    "two ways of rounding": (
        {"master_weights": True, "kahan_sum": True},
        ValueError,
        "master_weights and kahan_sum exclude each other",
    ),
    "two others": (
        {"kahan_sum": True, "stochastic_rounding": True},
        ValueError,
        "kahan_sum and stochastic_rounding exclude each other",
    ),
    "rounding and derivatives": (
        {"differentiable": True, "kahan_sum": True},
        ValueError,
        "kahan_sum has no derivative, differentiable=True needs one",
    ),
    "all three": (
        {"master_weights": True, "kahan_sum": True, "stochastic_rounding": True},
        ValueError,
        "master_weights and kahan_sum and stochastic_rounding exclude",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_settings(what: str) -> None:
    options, error, message = BAD[what]
    with pytest.raises(error, match=message):
        SGD([torch.zeros(3)], **{"lr": 0.1, **options})
    with pytest.raises(error, match=message):
        SGD([{"params": [torch.zeros(3)], **options}], lr=0.1)


@pytest.mark.parametrize("what", BAD)
def test_bad_settings_of_a_further_group(place: Place, what: str) -> None:
    options, error, message = BAD[what]
    twins = Twins(place, [([SMALL], {})])
    twins.step()
    with pytest.raises(error, match=message):
        twins.ours.add_param_group({"params": [torch.zeros(3)], **options})
    assert len(twins.ours.param_groups) == 1
    twins.step()


def non_leaf() -> Tensor:
    return torch.zeros(2, requires_grad=True) * 2


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (list, ValueError, "optimizer got an empty parameter list"),
        (lambda: torch.zeros(3), TypeError, "params argument given to the optimizer should be an iterable"),
        (lambda: [1.0], TypeError, "optimizer can only optimize Tensors, but one of the params is float"),
        (lambda: [non_leaf()], ValueError, "can't optimize a non-leaf Tensor"),
        (lambda: [{"lr": 0.1}], KeyError, "params"),
    ],
)
def test_bad_parameters(params: Callable[[], Any], error: type[Exception], message: str) -> None:
    for make in (SGD, torch.optim.SGD):
        with pytest.raises(error, match=message):
            make(params(), lr=0.1)


def test_bad_parameters_of_a_further_group(place: Place) -> None:
    twins = Twins(place, [([SMALL], {})], momentum=0.9)
    twins.step()
    cases: list[tuple[Any, type[Exception], str]] = [
        ([1.0], TypeError, "param_group must be a dict"),
        ({"params": [non_leaf()]}, ValueError, "can't optimize a non-leaf Tensor"),
        ({"params": {torch.zeros(2)}}, TypeError, "ordered collections"),
        ({"params": [twins.params[0][0]]}, ValueError, "some parameters appear in more than one parameter group"),
    ]
    for group, error, message in cases:
        with pytest.raises(error, match=message):
            twins.ours.add_param_group(group)
        assert len(twins.ours.param_groups) == 1
        twins.step()


def test_norms_that_differ_among_groups(place: Place) -> None:
    """Said at the step, when it is known that they stay different; nothing has moved then."""
    params = [torch.ones(3, device=place.device), torch.ones(2, device=place.device)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = SGD([{"params": params[:1], "max_norm": 1.0}, {"params": params[1:]}], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"max_norm must be the same in all parameter groups.*got.*1\.0"):
        optimizer.step()
    assert all(torch.equal(param, torch.ones_like(param)) for param in params)
    assert not optimizer.state
    optimizer.param_groups[1]["max_norm"] = 1.0
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == pytest.approx(5**0.5)


@pytest.mark.parametrize("sizes", ["small", "large"])
def test_parameter_listed_twice(place: Place, sizes: str) -> None:
    """A warning, and two steps in one, as in torch."""
    shape = (3,) if sizes == "small" else LARGE
    values = torch.randn(shape, dtype=torch.float64, device=place.device)
    results = []
    for make in (SGD, TorchSGD):
        param, other = values.clone(), values.clone()
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = make([param, other, param], lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1)
        for factor in (1.0, 2.0, -0.5):
            param.grad, other.grad = factor * values.sign(), factor * values
            optimizer.step()
        results.append((param, other, optimizer.state[param]["momentum_buffer"]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------- what lives in memory


@pytest.mark.parametrize("how", ["overlapping", "the same", "interleaved", "neighbours"])
def test_parameters_in_one_memory(place: Place, how: str) -> None:
    cut: dict[str, tuple[slice, slice]] = {
        "overlapping": (slice(0, 8), slice(4, 12)),
        "the same": (slice(0, 8), slice(0, 8)),
        "interleaved": (slice(0, 12, 2), slice(1, 12, 2)),
        "neighbours": (slice(0, 6), slice(6, 12)),
    }
    memory = torch.randn(12, dtype=torch.float64, device=place.device)
    memories = [memory.clone(), memory.clone()]
    optimizers, views = [], []
    for make, own in zip((SGD, TorchSGD), memories, strict=True):
        views.append([own[part] for part in cut[how]])
        optimizers.append(make(views[-1], lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1))
    for _ in range(3):
        gradients = [torch.randn_like(view) for view in views[0]]
        for of_one, optimizer in zip(views, optimizers, strict=True):
            for view, gradient in zip(of_one, gradients, strict=True):
                view.grad = gradient
            optimizer.step()
        torch.testing.assert_close(*memories, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 6), LARGE], ids=str)
def test_data_swapped(place: Place, shape: tuple[int, ...]) -> None:
    """Other memory, other strides in the same memory, memory around other memory."""
    twins = Twins(place, [([shape, (3,)], {})], momentum=0.9, dampening=0.5)
    square = shape[0] == shape[1]
    swaps: list[Callable[[Tensor], Tensor]] = [
        lambda p: p.clone(),
        lambda p: p.t().contiguous().t(),
        lambda p: laid_out(p, "sliced"),
        lambda p: p.clone() + 1,
        lambda p: p.t() if square else p,
        lambda p: p.t() if square else p,
    ]
    for swap in swaps:
        twins.step(2)
        for tensor in twins.params[0]:
            tensor.data = swap(tensor.data)
    twins.step(2)


def test_data_transposed_where_it_is(place: Place) -> None:
    twins = Twins(place, [([(140, 140), (6, 6)], {})], momentum=0.9)
    for _ in range(3):
        twins.step()
        for tensors in twins.params:
            for tensor in tensors:
                tensor.data = tensor.data.t()


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
def test_data_swapped_to_another_dtype(place: Place, shape: tuple[int, ...]) -> None:
    """``model.float()`` after some steps: the momentum stays what it was, as in torch."""
    params = [torch.randn(shape, dtype=torch.float64, device=place.device)]
    params.append(params[0].clone())
    optimizers = [make([p], lr=0.1, momentum=0.9) for make, p in zip((SGD, TorchSGD), params, strict=True)]
    for dtype in (torch.float64, torch.float32, torch.float64):
        for _ in range(2):
            gradient = torch.randn(shape, dtype=torch.float64, device=place.device).to(dtype)
            for param, optimizer in zip(params, optimizers, strict=True):
                param.grad = None
                param.data = param.data.to(dtype)
                param.grad = gradient.clone()
                optimizer.step()
        torch.testing.assert_close(params[0].double(), params[1].double(), rtol=1e-6, atol=1e-6)
        assert params[0].dtype == dtype


def test_same_address_another_dtype(place: Place) -> None:
    """An allocator gives out memory again: the address alone says nothing."""
    memories = [torch.zeros(64, dtype=torch.uint8, device=place.device) for _ in range(2)]
    others = [torch.zeros(3, device=place.device) for _ in range(2)]
    params = [memory[:32].view(torch.float32) for memory in memories]
    optimizers = [make([o, p], lr=0.5) for make, o, p in zip((SGD, TorchSGD), others, params, strict=True)]
    for dtype in (torch.float32, torch.float64):
        for memory, other, param, optimizer in zip(memories, others, params, optimizers, strict=True):
            param.grad = None
            param.data = memory[: 8 * dtype.itemsize].view(dtype)
            param.grad = torch.full((8,), 1 / 3, dtype=dtype, device=place.device)
            other.grad = torch.ones_like(other)
            optimizer.step()
        assert torch.equal(*params)


def test_compensation_follows_another_dtype(place: Place) -> None:
    if place.interpreted:
        pytest.skip("the interpreter rounds bfloat16 by its own rules")
    param = torch.ones(5, dtype=torch.bfloat16, device=place.device)
    optimizer = SGD([param], lr=1.0, kahan_sum=True)
    param.grad = torch.full_like(param, 2.0**-12)
    optimizer.step()
    param.grad = None
    param.data = param.data.half()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param.double(), torch.full_like(param, 1 - 2.0**-12).double())


@pytest.mark.parametrize("shape", [(3,), LARGE], ids=str)
@pytest.mark.parametrize("how", ["contiguous", "transposed", "sliced", "expanded", "float32"])
def test_buffer_replaced_by_the_user(place: Place, how: str, shape: tuple[int, ...]) -> None:
    """In the middle of others."""
    twins = Twins(place, [([(4,), shape, (5,)], {})], momentum=0.9)
    twins.step(2)
    value = torch.randn(shape, dtype=torch.float64, device=place.device).float().double()
    value = value[:1].expand(shape).clone() if how == "expanded" else value
    for k, optimizer in enumerate(twins.optimizers):
        replacement = laid_out(value, how) if k == 0 else value.clone()
        optimizer.state[twins.params[1][k]]["momentum_buffer"] = replacement
    if how == "float32":
        twins.ours.state[twins.params[1][0]]["momentum_buffer"] = value.float()
        twins.give()
        for optimizer in twins.optimizers:
            optimizer.step()
        torch.testing.assert_close(twins.params[1][0], twins.params[1][1], rtol=1e-6, atol=1e-6)
    else:
        twins.step(2)


def test_data_of_a_buffer_replaced(place: Place) -> None:
    """As those do who bring states to another device and back."""
    twins = Twins(place, [([(4,), (3,), (5,)], {})], momentum=0.9)
    twins.step(2)
    for k, optimizer in enumerate(twins.optimizers):
        buffer = optimizer.state[twins.params[1][k]]["momentum_buffer"]
        buffer.data = torch.full_like(buffer, 2.0)
    twins.step(2)


def test_buffer_written_to(place: Place) -> None:
    twins = Twins(place, [([(4,), (3,), LARGE], {})], momentum=0.9)
    twins.step(2)
    for k, optimizer in enumerate(twins.optimizers):
        for tensors in twins.params:
            optimizer.state[tensors[k]]["momentum_buffer"].zero_()
    twins.step(2)


@pytest.mark.parametrize("shape", [(3,), LARGE], ids=str)
def test_buffer_replaced_by_something_else(place: Place, shape: tuple[int, ...]) -> None:
    """Nothing is read or written outside of it."""
    twins = Twins(place, [([shape], {})], momentum=0.9)
    twins.step(1)
    param = twins.params[0][0]
    before = param.detach().clone()
    for wrong in (
        torch.zeros(2, dtype=torch.float64, device=place.device),
        torch.zeros((), device=place.device),
        1.0,
    ):
        twins.ours.state[param]["momentum_buffer"] = wrong
        with pytest.raises(ValueError, match="as its momentum_buffer; expected a tensor of its shape"):
            twins.ours.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_state_cleared(place: Place, dampening: float) -> None:
    twins = Twins(place, [([SMALL, (3,)], {})], momentum=0.9, dampening=dampening)
    twins.step(2)
    for optimizer in twins.optimizers:
        optimizer.state.clear()
    twins.step(2)
    for k, optimizer in enumerate(twins.optimizers):
        del optimizer.state[twins.params[1][k]]
    twins.step(2)
    for k, optimizer in enumerate(twins.optimizers):
        del optimizer.state[twins.params[0][k]]["momentum_buffer"]
    twins.step(2)


def test_groups_changed_by_hand(place: Place) -> None:
    """Parameters taken out of a group, or put into another order."""
    twins = Twins(place, [([SMALL, (3,), (4,)], {}), ([(2,)], {"lr": 0.5})], momentum=0.9)
    twins.step(2)
    for optimizer in twins.optimizers:
        optimizer.param_groups[0]["params"].reverse()
        optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    twins.step(2)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradients_are_not_kept_alive(place: Place, momentum: float) -> None:
    params = [torch.zeros(shape, device=place.device) for shape in (SMALL, LARGE)]
    optimizer = SGD(params, lr=0.1, momentum=momentum, max_norm=1.0)
    for _ in range(2):
        watched = []
        for param in params:
            gradient = torch.ones_like(param)
            param.grad = gradient
            watched.append(weakref.ref(gradient))
            del gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        assert [gradient() for gradient in watched] == [None, None]


def test_optimizer_and_parameters_are_freed(place: Place) -> None:
    param = torch.zeros(SMALL, device=place.device)
    param.grad = torch.ones_like(param)
    optimizer = SGD([param], lr=0.1, momentum=0.9)
    optimizer.step()
    watched = weakref.ref(param), weakref.ref(optimizer.state[param]["momentum_buffer"])
    del param, optimizer
    gc.collect()
    assert [tensor() for tensor in watched] == [None, None]


@pytest.mark.parametrize("shape", [(3,), SMALL, LARGE], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_backward_notices_the_step(place: Place, shape: tuple[int, ...], layout: str) -> None:
    """A graph that kept a parameter is out of date after the step, and says so."""
    param = laid_out(torch.ones(shape, device=place.device), layout).requires_grad_()
    optimizer = SGD([param], lr=0.1)
    for _ in range(2):
        loss = param.square().sum()
        param.grad = torch.ones_like(param)
        version = param._version
        optimizer.step()
        assert param._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.slow(interpreted=True)
def test_many_small_tensors_and_some_large(place: Place) -> None:
    shapes: list[tuple[int, ...]] = [(i % 7 + 1, i % 3 + 1) for i in range(40)]
    shapes[5] = shapes[20] = LARGE
    if not place.interpreted:
        shapes += [(16384,), (16385,), (2**18 + 3,)]
    for dtype in (torch.float64, torch.float32):
        twins = Twins(place, [(shapes[::2], {}), (shapes[1::2], {"lr": 0.01})], dtype=dtype, momentum=0.9)
        twins.step(2)
        twins.step(1, without=range(0, len(shapes), 3))


def test_step_in_inference_mode_and_after(place: Place) -> None:
    twins = Twins(place, [([SMALL, (3,)], {})], momentum=0.0)
    twins.step()
    with torch.inference_mode():
        for tensors in twins.params:
            for tensor in tensors:
                assert tensor.grad is not None
        for optimizer in twins.optimizers:
            optimizer.step()
    twins.compare()
    twins.step()


# -------------------------------------------------------------------------------------------- whatever may come

SHAPES_DRAWN = [(), (1,), (3,), (0,), (2, 3), (4, 4), (2, 3, 2), (1, 2, 1, 3)]


@st.composite
def group_settings(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
    nesterov = momentum > 0 and draw(st.booleans())
    return {
        "lr": draw(st.sampled_from([0.0, 0.01, 0.5])),
        "momentum": momentum,
        "nesterov": nesterov,
        "dampening": 0.0 if nesterov else draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "maximize": draw(st.booleans()),
        "decoupled_weight_decay": draw(st.booleans()),
    }


@st.composite
def drawn_group(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "shapes": draw(st.lists(st.sampled_from(SHAPES_DRAWN), min_size=1, max_size=3)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        **draw(group_settings()),
    }


@st.composite
def drawn_event(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(
        st.sampled_from(
            ["step"] * 5
            + ["scaled", "overflow", "swap", "load", "deepcopy", "add", "lr", "momentum", "forget", "swap data"]
        )
    )
    details = {
        "without": draw(st.sets(st.integers(0, 5), max_size=3)),
        "layout": draw(st.sampled_from((*LAYOUTS, "expanded"))),
        "group": draw(drawn_group()) if name == "add" else None,
        "number": draw(st.integers(0, 5)),
        "value": draw(st.sampled_from([0.0, 0.25, 0.9])),
    }
    return name, details


def happen(twins: Twins, name: str, details: dict[str, Any]) -> None:
    number = details["number"]
    if name == "step":
        twins.step(without=list(details["without"]), layout=details["layout"], state=False)
    elif name in ("scaled", "overflow"):
        twins.scaled_step(overflow=name == "overflow", without=list(details["without"]))
    elif name == "swap":  # the state of each goes to the other
        ours, theirs = fresh(twins)
        mine, others = copy.deepcopy(twins.ours.state_dict()), copy.deepcopy(twins.theirs.state_dict())
        ours.load_state_dict(others)
        theirs.load_state_dict(mine)
        twins.ours, twins.theirs = ours, theirs
    elif name == "load":
        ours, _ = fresh(twins)
        ours.load_state_dict(by_torch(twins.ours.state_dict()))
        twins.ours = ours
    elif name == "deepcopy":
        twins.ours = copy.deepcopy(twins.ours)
        copies = [param for group in twins.ours.param_groups for param in group["params"]]
        twins.params = [(mine, theirs, exact) for mine, (_, theirs, exact) in zip(copies, twins.params, strict=True)]
    elif name == "add":
        twins.add_group(**details["group"])
    elif name == "forget":
        param = number % len(twins.params)
        for k, optimizer in enumerate(twins.optimizers):
            optimizer.state.pop(twins.params[param][k], None)
    elif name == "swap data":
        ours = twins.params[number % len(twins.params)][0]
        ours.data = laid_out(ours.data, details["layout"] if details["layout"] != "expanded" else "contiguous")
    else:
        group = number % len(twins.ours.param_groups)
        value = details["value"]
        if name == "momentum" and value == 0.0:
            twins.say(group, nesterov=False)
        twins.say(group, **{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("examples", [200])
def test_any_run(place: Place, examples: int) -> None:
    @settings(
        max_examples=examples if place.name == "eager" else examples // 25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(st.lists(drawn_group(), min_size=1, max_size=5), st.lists(drawn_event(), min_size=2, max_size=9))
    def check(groups: list[dict[str, Any]], events: list[tuple[str, dict[str, Any]]]) -> None:
        torch.manual_seed(len(events))
        group, *further = groups
        own = {name: value for name, value in group.items() if name not in ("shapes", "dtype", "layout")}
        twins = Twins(place, [(group["shapes"], own)], dtype=group["dtype"], layout=group["layout"])
        twins.add_up_magnitudes()
        for another in further:
            twins.add_group(**another)
        for name, details in events:
            happen(twins, name, details)
        twins.step(state=False)

    check()


# ------------------------------------------------------------------------------- what is not to be taken for granted


def against_float64(param: Tensor, options: dict[str, Any], change: Callable[[Tensor, Any], None]) -> float:
    """The greatest error after steps before and after ``change(parameter, optimizer)``."""
    leaf, exact = nn.Parameter(param.clone()), nn.Parameter(param.double())
    ours, theirs = SGD([leaf], lr=0.1, momentum=0.9, **options), torch.optim.SGD([exact], lr=0.1, momentum=0.9)
    for number in range(3):
        grad = torch.randn(leaf.shape, device=leaf.device)
        leaf.grad, exact.grad = grad.to(leaf.dtype), grad.to(leaf.dtype).double()
        ours.step()
        theirs.step()
        leaf.grad = exact.grad = None
        if number == 0:
            change(leaf, ours)
    return float((leaf.double() - exact).abs().max())


def relaid(tensor: Tensor) -> Tensor:
    """The same numbers in another order, in memory of the same address."""
    copy = tensor.t().contiguous()
    tensor.untyped_storage().copy_(copy.untyped_storage())
    return tensor.as_strided(tensor.shape, (1, tensor.shape[0]))


@pytest.mark.slow(interpreted=True)
@pytest.mark.parametrize("size", [20, 200])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum_dtype": torch.float32}, {"master_weights": True}, {"kahan_sum": True}],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_strides_changed_at_the_same_address(
    place: Place, dtype: torch.dtype, options: dict[str, Any], size: int
) -> None:
    """As when the allocator hands out a parameter's address again; and for its buffers, by ``.data =``."""

    def of_parameter(leaf: Tensor, _: Any) -> None:
        leaf.data = relaid(leaf.data)

    def of_momentum(leaf: Tensor, optimizer: Any) -> None:
        buffer = optimizer.state[leaf]["momentum_buffer"]
        buffer.data = buffer.data.t().contiguous().t()

    param = torch.randn(size, size, device=place.device).to(dtype)
    for change in (of_parameter, of_momentum):
        assert against_float64(param, options, change) < 60 * torch.finfo(dtype).eps


def test_default_device_and_dtype_are_somebody_elses(place: Place) -> None:
    param = nn.Parameter(torch.ones(5, device=place.device))
    param.grad = torch.ones_like(param)
    optimizer = SGD([param], lr=0.5, momentum=0.9, max_norm=100.0)
    with torch.device("meta"):
        optimizer.step()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        optimizer.grad_scale = torch.tensor(2.0, device=place.device, dtype=torch.float32)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(0.0, device=place.device, dtype=torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(param.detach(), torch.full_like(param, 1 - 0.5 - 0.5 * 1.4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradient_of_another_shape(place: Place, dtype: torch.dtype) -> None:
    """Which ``.data =`` leaves behind: nothing beyond the gradient is read or written."""
    around = torch.full((40,), 8.0, device=place.device, dtype=dtype)
    param = nn.Parameter(torch.zeros(10, device=place.device, dtype=dtype))
    param.grad = around[:10]
    optimizer = SGD([param], lr=1.0)
    optimizer.step()
    param.data = torch.zeros(20, device=place.device, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"parameter of shape \(20,\) has a gradient of shape \(10,\)"):
        optimizer.step()
    assert torch.equal(around, torch.full_like(around, 8.0))
    assert torch.equal(param.detach(), torch.zeros_like(param))


def test_gradients_without_memory_of_their_own(place: Place) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    ones = torch.ones(4, device=place.device)
    for grad in (TwoTensor(ones, ones), torch._efficientzerotensor(4, device=place.device)):
        params = [nn.Parameter(torch.zeros(4, device=place.device)) for _ in range(2)]
        for make, param in zip((SGD, TorchSGD), params, strict=True):
            param.grad = grad
            make([param], lr=1.0).step()
        torch.testing.assert_close(*(param.detach() for param in params))


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_lazy_gradients_under_a_scale(place: Place, dtype: torch.dtype, by_torch: bool) -> None:
    """Gradients that are negated when they are read, and zeros without memory, are divided by the scale too.

    ``by_torch``: the parameters share memory, so that torch's operators step them.
    """
    around = torch.zeros(3 * 5, dtype=dtype, device=place.device)
    starts = (0, 4, 8) if by_torch else (0, 5, 10)
    params = [nn.Parameter(around[start : start + 5]) for start in starts]
    params[0].grad = torch._neg_view(torch.full((5,), 8.0, dtype=dtype, device=place.device))
    params[1].grad = torch._efficientzerotensor(5, dtype=dtype, device=place.device)
    params[2].grad = torch.full((5,), 16.0, dtype=dtype, device=place.device)
    optimizer = SGD(params, lr=1.0)
    optimizer.grad_scale = torch.tensor(8.0, device=place.device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(0.0, device=place.device)  # type: ignore[attr-defined]
    optimizer.step()
    expected = torch.zeros_like(around)
    expected[:5], expected[starts[2] : starts[2] + 5] = 1.0, -2.0
    torch.testing.assert_close(around, expected, rtol=0, atol=0)
    gradients = [torch.full_like(around[:5], value) for value in (-1.0, 0.0, 2.0)]
    torch.testing.assert_close([param.grad.clone() for param in params], gradients, rtol=0, atol=0)  # type: ignore[union-attr]


def test_conjugated_gradient_under_a_scale(place: Place) -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.complex64, device=place.device))
    param.grad = torch.full_like(param, 8.0 + 16.0j).conj()
    optimizer = SGD([param], lr=1.0)
    optimizer.grad_scale = torch.tensor(8.0, device=place.device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(0.0, device=place.device)  # type: ignore[attr-defined]
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full_like(param, -1.0 + 2.0j), rtol=0, atol=0)
    torch.testing.assert_close(param.grad.resolve_conj(), torch.full_like(param, 1.0 - 2.0j), rtol=0, atol=0)


@pytest.mark.parametrize("then", ["cleared", "replaced"])
def test_state_touched_after_a_first_step_that_was_skipped(place: Place, then: str) -> None:
    param = nn.Parameter(torch.zeros(4, device=place.device))
    param.grad = torch.ones_like(param)
    optimizer = SGD([param], lr=1.0, momentum=0.5)
    optimizer.grad_scale = torch.ones((), device=place.device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.ones((), device=place.device)  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    if then == "cleared":
        optimizer.state.clear()
        assert optimizer.state_dict()["state"] == {}
    else:
        optimizer.state[param]["momentum_buffer"] = torch.full_like(param, 10.0)
    optimizer.step()
    assert torch.equal(param.detach(), torch.full_like(param, -1.0 if then == "cleared" else -6.0))


def test_seven_dimensions_in_another_order(place: Place) -> None:
    param = nn.Parameter(torch.zeros((2,) * 7, device=place.device))
    param.grad = torch.randn((2,) * 7, device=place.device).permute(6, 5, 4, 3, 2, 1, 0)
    SGD([param], lr=1.0).step()
    torch.testing.assert_close(param.detach(), -param.grad)


def test_numbers_of_other_kinds(place: Place) -> None:
    from fractions import Fraction

    param = nn.Parameter(torch.zeros(4, device=place.device))
    param.grad = torch.ones_like(param)
    SGD([param], lr=Fraction(1, 4), momentum=Fraction(1, 2), dampening=torch.tensor(0.5)).step()  # type: ignore[arg-type]
    assert torch.equal(param.detach(), torch.full_like(param, -0.25))
    SGD([param], lr=float("inf")).step()
    assert torch.equal(param.detach(), torch.full_like(param, -float("inf")))


@pytest.mark.parametrize("options", [{"master_weights": True}, {"kahan_sum": True}], ids=str)
def test_parameters_made_in_inference_mode(place: Place, options: dict[str, Any]) -> None:
    with torch.inference_mode():
        param = torch.ones(5, dtype=torch.float16, device=place.device)
        param.grad = torch.ones_like(param)
        optimizer = SGD([param], lr=0.25, **options)
        for _ in range(2):
            optimizer.step()
        assert torch.equal(param, torch.full_like(param, 0.5))


def test_all_groups_taken_away(place: Place) -> None:
    """As programs do that build them anew."""
    twins = Twins(place, [([SMALL, (3,)], {})], momentum=0.9)
    twins.step()
    for optimizer in twins.optimizers:
        optimizer.param_groups.clear()
        optimizer.state.clear()
        optimizer.step()
    for k, optimizer in enumerate(twins.optimizers):
        optimizer.add_param_group({"params": [tensors[k] for tensors in twins.params]})
    twins.step(2)


@pytest.mark.parametrize("how", ["data", "resize"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(50,), SMALL, LARGE], ids=str)
def test_gradient_that_shrinks_between_steps(
    place: Place, shape: tuple[int, ...], dtype: torch.dtype, how: str
) -> None:
    """Under a plan that has been made: no memory of others is read."""
    params = [nn.Parameter(torch.zeros(shape, device=place.device, dtype=dtype)) for _ in range(2)]
    optimizer = SGD(params, lr=1.0)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    grad = params[1].grad
    assert grad is not None
    if how == "data":
        grad.data = torch.ones(3, device=place.device, dtype=dtype)
    else:
        grad.resize_(3)
    with pytest.raises(RuntimeError, match=r"has a gradient of shape \(3,\); expected its own shape"):
        optimizer.step()
    assert torch.equal(params[1].detach(), torch.full_like(params[1], -1.0))
    params[1].grad = torch.ones_like(params[1])
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[1].detach(), torch.full_like(params[1], -2.0))


def test_gradient_that_would_be_spread_out(place: Place) -> None:
    """A row is no gradient of a matrix, whatever copies of it would fit."""
    param = nn.Parameter(torch.zeros(SMALL, device=place.device))
    param.grad = torch.ones_like(param)
    optimizer = SGD([param], lr=1.0)
    optimizer.step()
    param.grad.data = torch.ones(SMALL[1], device=place.device)
    with pytest.raises(RuntimeError, match="expected its own shape"):
        optimizer.step()


@pytest.mark.parametrize("count", [20, 5000])
def test_expanded_gradient_under_a_scale(place: Place, count: int) -> None:
    """One number in memory is not divided once for each element that it stands for."""
    param = nn.Parameter(torch.zeros(count, device=place.device))
    optimizer = SGD([param], lr=1.0)
    param.grad = torch.full((1,), 8.0, device=place.device).expand(count)
    optimizer.grad_scale = torch.tensor(8.0, device=place.device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(0.0, device=place.device)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="memory"):
        optimizer.step()
    assert not param.any()
    param.grad = param.grad.clone()
    optimizer.step()
    assert torch.equal(param.detach(), torch.full_like(param, -1.0))


@pytest.mark.parametrize("to", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [3000, 30000])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float16, {}),
        (torch.float16, {"master_weights": True}),
        (torch.float16, {"kahan_sum": True}),
    ],
    ids=str,
)
def test_buffers_given_another_dtype(
    place: Place, dtype: torch.dtype, options: dict[str, Any], count: int, to: torch.dtype
) -> None:
    """By ``.data =``, as to save memory between steps: they stay the tensors that they were."""
    param = nn.Parameter(torch.zeros(count, device=place.device, dtype=dtype))
    optimizer = SGD([param], lr=0.5, momentum=0.5, **options)
    for _ in range(4):
        param.grad = torch.ones_like(param)
        optimizer.step()
        for buffer in optimizer.state[param].values():
            buffer.data = buffer.data.to(to)
    assert torch.equal(param.detach(), torch.full_like(param, -3.0625))


def test_tensor_without_elements_under_a_scale(place: Place) -> None:
    """Its momentum begins when that of the others does: shards of one parameter must not differ in their state."""
    params = [nn.Parameter(torch.zeros(size, device=place.device)) for size in (0, 5)]
    optimizer = SGD(params, lr=1.0, momentum=0.5)
    for overflow in (True, False, True):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.grad_scale = torch.ones((), device=place.device)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.full((), float(overflow), device=place.device)  # type: ignore[attr-defined]
        optimizer.step()
    state = optimizer.state_dict()["state"]
    assert [list(state[number]) for number in range(2)] == [["momentum_buffer"]] * 2
    other = SGD(params, lr=1.0, momentum=0.5)
    other.grad_scale, other.found_inf = optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    other.step()
    assert other.state_dict()["state"] == {}


def test_momentum_that_the_host_does_not_know(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's number of 0 begins no momentum; who turns it on later gets the gradient as its beginning."""
    if place.device.type == "cpu":
        if not place.interpreted:
            pytest.skip("a CPU's numbers are read")
        monkeypatch.setattr("fastloss.optim.sgd._on_host", lambda value: not isinstance(value, Tensor))
    momentum = torch.zeros((), device=place.device)
    param = nn.Parameter(torch.zeros(5, device=place.device))
    optimizer = SGD([param], lr=1.0, momentum=momentum, dampening=0.5)
    param.grad = torch.ones_like(param)
    for value, expected in ((0.0, -1.0), (0.0, -2.0), (0.5, -3.0), (0.5, -4.0)):
        momentum.fill_(value)
        optimizer.step()
        assert torch.equal(param.detach(), torch.full_like(param, expected))
