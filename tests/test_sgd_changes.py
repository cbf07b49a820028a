"""Whatever is changed between two steps of ``fastloss.SGD`` is noticed: the next step is that of ``torch.optim.SGD``.

A step is compared with the one before it in a few passes, and where that sees no change the backends do not look
again. So every change here comes after steps in which nothing changed, and is made twice.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from places import Place
from torch import Tensor, nn

import fastloss
from fastloss.backends import choice
from fastloss.optim.repeat import Repeat

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
}
# After these the next step always looks closely.
NEVER_ALIKE = {"two parameters in one memory", "a state of somebody else's"}


class Pair:
    """Our optimizer and torch's, on equal parameters of float64."""

    def __init__(self, place: Place, **options: Any) -> None:
        # Square ones can be turned where they are. One is longer than what is small for a CPU, or than a chunk.
        large = (66, 66) if place.interpreted else (140, 140)
        shapes: list[tuple[int, ...]] = [(6, 6), (3, 5), (), large, (6, 6)]
        values = [torch.randn(shape, dtype=torch.float64, device=place.device) for shape in shapes]
        self.optimizers: list[torch.optim.Optimizer] = [
            make([nn.Parameter(value.clone()) for value in values], **options)
            for make in (fastloss.SGD, torch.optim.SGD)
        ]

    def params(self, k: int) -> list[Tensor]:
        return [param for group in self.optimizers[k].param_groups for param in group["params"]]

    def give(self, *, anew: bool = True) -> None:
        """New gradients; or other values in those that are there."""
        for mine, other in zip(self.params(0), self.params(1), strict=True):
            gradient = torch.randn_like(other).detach()
            for param in (mine, other):
                if anew or param.grad is None:
                    param.grad = gradient.clone()
                else:
                    param.grad.copy_(gradient)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        self.compare()

    def compare(self) -> None:
        states = [optimizer.state for optimizer in self.optimizers]
        for params in zip(self.params(0), self.params(1), strict=True):
            mine, other = (param.detach() for param in params)
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
            buffers = [
                of[p].get("momentum_buffer") if p in of else None for of, p in zip(states, params, strict=True)
            ]
            assert (buffers[0] is None) == (buffers[1] is None)
            if buffers[0] is not None:
                torch.testing.assert_close(*buffers, rtol=1e-12, atol=1e-12)

    def saw_no_change(self) -> bool:
        batches = self.optimizers[0]._plan.batches  # type: ignore[attr-defined]
        return bool(batches) and all(batch.tensors.unchanged for batch in batches)


# -------------------------------------------------------------------------------------------------------- the changes

Change = Callable[[torch.optim.Optimizer, list[Tensor]], object]
CHANGES: dict[str, Change] = {}


def change(name: str) -> Callable[[Change], Change]:
    def add(function: Change) -> Change:
        CHANGES[name] = function
        return function

    return add


def of_gradients(name: str, other: Callable[[Tensor], Tensor]) -> None:
    """Of every second one, as far as it has dimensions."""

    def apply(_: torch.optim.Optimizer, params: list[Tensor]) -> None:
        for param in params[::3]:
            assert param.grad is not None
            param.grad = other(param.grad)

    CHANGES[name] = apply


def sliced(tensor: Tensor) -> Tensor:
    wider = tensor.new_full([2 * size + 1 for size in tensor.shape], 77.0)
    return wider[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)


of_gradients("gradients of another layout", lambda g: g.t().contiguous().t())
of_gradients("sliced gradients", sliced)
of_gradients("expanded gradients", lambda g: g[:1].expand_as(g))
of_gradients("negated gradients", torch._neg_view)
of_gradients("zeros without memory", lambda g: torch._efficientzerotensor(g.shape, dtype=g.dtype, device=g.device))
of_gradients("gradients made in inference mode", lambda g: torch.inference_mode()(Tensor.clone)(g))
of_gradients("sparse gradients", Tensor.to_sparse)
of_gradients("gradients that are parameters", nn.Parameter)
of_gradients("gradients of a subclass", lambda g: g.as_subclass(Subclass))


class Subclass(Tensor):
    pass


@change("gradients written to")
def _(_: Any, params: list[Tensor]) -> None:
    for param in params:
        assert param.grad is not None
        param.grad.mul_(-2)


@change("no gradient")
def _(_: Any, params: list[Tensor]) -> None:
    params[1].grad = None


@change("a gradient for one alone")
def _(_: Any, params: list[Tensor]) -> None:
    for param in params[1:]:
        param.grad = None


@change("no gradient at all")
def _(_: Any, params: list[Tensor]) -> None:
    for param in params:
        param.grad = None


@change("other memory under the same gradients")
def _(_: Any, params: list[Tensor]) -> None:
    for param in params:
        assert param.grad is not None
        param.grad.data = param.grad.data * 3


@change("memory set under the same gradients")
def _(_: Any, params: list[Tensor]) -> None:
    for param in params:
        assert param.grad is not None
        param.grad.set_(param.grad * 3)  # type: ignore[call-overload]


@change("the same gradients turned where they are")
def _(_: Any, params: list[Tensor]) -> None:
    for param in (params[0], params[3]):
        assert param.grad is not None
        param.grad.data = param.grad.data.t()


@change("one gradient for two")
def _(_: Any, params: list[Tensor]) -> None:
    params[4].grad = params[0].grad


@change("parameters elsewhere")
def _(_: Any, params: list[Tensor]) -> None:
    for param in params[1:4]:
        param.data = param.data + 1


@change("parameters in another layout")
def _(_: Any, params: list[Tensor]) -> None:
    for param in (params[0], params[3]):
        param.data = sliced(param.data)


@change("parameters turned where they are")
def _(_: Any, params: list[Tensor]) -> None:
    for param in (params[0], params[3]):
        param.data = param.data.t()


@change("memory set under parameters")
def _(_: Any, params: list[Tensor]) -> None:
    with torch.no_grad():
        params[3].set_(params[3] + 1)  # type: ignore[call-overload]


@change("two parameters in one memory")
def _(_: Any, params: list[Tensor]) -> None:
    params[4].data = params[0].data


@change("parameters written to")
def _(_: Any, params: list[Tensor]) -> None:
    with torch.no_grad():
        for param in params:
            param.add_(1)


@change("parameters frozen, with their gradients")
def _(_: Any, params: list[Tensor]) -> None:
    params[0].requires_grad_(not params[0].requires_grad)


@change("parameters swapped for others")
def _(_: Any, params: list[Tensor]) -> None:
    other = nn.Parameter(params[3].detach() + 1)
    other.grad = torch.ones_like(other)
    torch.utils.swap_tensors(params[3], other)


@change("another parameter of the same memory")
def _(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    other = nn.Parameter(params[3].detach())
    other.grad = params[3].grad
    optimizer.param_groups[0]["params"][3] = other


def _buffers(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]


@change("buffers replaced")
def _(optimizer: torch.optim.Optimizer, _: Any) -> None:
    for state in list(optimizer.state.values())[::3]:
        if "momentum_buffer" in state:
            state["momentum_buffer"] = state["momentum_buffer"] + 1


@change("buffers elsewhere")
def _(optimizer: torch.optim.Optimizer, _: Any) -> None:
    for buffer in _buffers(optimizer):
        buffer.data = buffer.data + 1


@change("buffers turned where they are")
def _(optimizer: torch.optim.Optimizer, _: Any) -> None:
    for buffer in _buffers(optimizer):
        if buffer.dim() == 2 and buffer.size(0) == buffer.size(1):
            buffer.data = buffer.data.t()


@change("buffers written to")
def _(optimizer: torch.optim.Optimizer, _: Any) -> None:
    for buffer in _buffers(optimizer):
        buffer.add_(1)


@change("other states, of the same buffers")
def _(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    for param in params:
        if param in optimizer.state:
            optimizer.state[param] = dict(optimizer.state[param])


@change("other states, of other buffers")
def _(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    for param in params:
        if param in optimizer.state:
            optimizer.state[param] = {k: v + 1 for k, v in optimizer.state[param].items() if v is not None}


@change("states exchanged")
def _(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    if _buffers(optimizer):
        first, last = optimizer.state[params[0]], optimizer.state[params[4]]
        optimizer.state[params[0]], optimizer.state[params[4]] = last, first


@change("states in another order")
def _(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    if params[0] in optimizer.state:
        optimizer.state[params[0]] = optimizer.state.pop(params[0])


@change("a state without a buffer")
def _(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    optimizer.state[params[3]].pop("momentum_buffer", None)


@change("no states")
def _(optimizer: torch.optim.Optimizer, _: Any) -> None:
    optimizer.state.clear()


@change("a state of somebody else's")
def _(optimizer: torch.optim.Optimizer, _: Any) -> None:
    optimizer.state["mine"] = len(optimizer.state)


@change("a key of somebody else's")
def _(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    optimizer.state[params[0]]["mine"] = 5


@change("another learning rate")
def _(optimizer: torch.optim.Optimizer, _: Any) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


@change("a learning rate in a tensor")
def _(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.05, dtype=torch.float64)


@change("all other settings")
def _(optimizer: torch.optim.Optimizer, _: Any) -> None:
    group = optimizer.param_groups[0]
    group.update(weight_decay=group["weight_decay"] + 0.1, maximize=not group["maximize"], dampening=0.25)


@change("a momentum, or none")
def _(optimizer: torch.optim.Optimizer, _: Any) -> None:
    group = optimizer.param_groups[0]
    group["momentum"] = 0.8 if group["momentum"] == 0 else 0


@change("parameters in another order")
def _(optimizer: torch.optim.Optimizer, _: Any) -> None:
    optimizer.param_groups[0]["params"].reverse()


@change("a parameter in the group before")
def _(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    """All parameters are in the order that they had."""
    groups = optimizer.param_groups
    if len(groups) == 1:
        groups[0]["params"] = params[:2]
        optimizer.add_param_group({"params": params[2:], "lr": 0.01, "momentum": groups[0]["momentum"]})
    else:
        groups[0]["params"].append(groups[1]["params"].pop(0))


@change("a parameter of other dimensions where it is")
def _(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    for param in (params[1], params[3]):
        flat = param.dim() == 2
        sizes = (-1,) if flat else (3, 5) if param.numel() == 15 else (int(param.numel() ** 0.5),) * 2
        turned = param.data.view(sizes) if flat else param.data.view(sizes).t()
        param.data = turned
        param.grad = torch.randn(turned.shape, dtype=param.dtype, generator=torch.manual_seed(7)).to(param.device)
        if "momentum_buffer" in optimizer.state.get(param, {}):
            optimizer.state[param]["momentum_buffer"] = torch.ones_like(turned)


@change("a parameter less")
def _(optimizer: torch.optim.Optimizer, _: Any) -> None:
    optimizer.param_groups[0]["params"].pop()


@change("a group more")
def _(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    other = nn.Parameter(torch.ones(4, dtype=torch.float64, device=params[0].device))
    other.grad = torch.full_like(other, 0.5)
    optimizer.add_param_group({"params": [other], "lr": 0.3})


@change("a loaded state")
def _(optimizer: torch.optim.Optimizer, _: Any) -> None:
    saved = optimizer.state_dict()
    saved["state"] = {number: dict(state) for number, state in saved["state"].items() if isinstance(state, dict)}
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("options", "anew"),
    [("plain", True), ("momentum", True), ("momentum", False), ("dampening", False)],
    ids=["plain", "momentum", "momentum, the same gradients", "dampening, the same gradients"],
)
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_is_noticed(place: Place, name: str, options: str, anew: bool) -> None:
    pair = Pair(place, **OPTIONS[options])
    for _ in range(2):
        pair.give(anew=anew)
        pair.step()
    assert pair.saw_no_change()
    for _ in range(2):
        pair.give(anew=anew or "gradient" in name or name == "zeros without memory")
        for k, optimizer in enumerate(pair.optimizers):
            CHANGES[name](optimizer, pair.params(k))
        pair.step()
    for _ in range(2):
        pair.give()
        pair.step()
    assert pair.saw_no_change() or name in NEVER_ALIKE


COMPANION_CHANGES: dict[str, Callable[[dict[str, Any], str], object]] = {
    "another dtype": lambda state, key: setattr(state[key], "data", state[key].data.double()),
    "other memory": lambda state, key: setattr(state[key], "data", state[key].data.clone()),
    "another tensor": lambda state, key: state.update({key: state[key].clone()}),
    "written to": lambda state, key: state[key].mul_(1 + 2**-9),
    "missing": lambda state, key: state.pop(key),
}


@pytest.mark.parametrize("name", COMPANION_CHANGES)
@pytest.mark.parametrize(
    ("options", "key"), [({"master_weights": True}, "master_param"), ({"kahan_sum": True}, "kahan_comp")], ids=str
)
def test_changed_companions_are_noticed(place: Place, options: dict[str, Any], key: str, name: str) -> None:
    """An optimizer steps to the same bits as one that makes its plan anew in every step."""
    values = [torch.randn(shape, dtype=torch.float16, device=place.device) for shape in ((6, 6), (3, 5), (66, 66))]
    params = [[nn.Parameter(value.clone()) for value in values] for _ in range(2)]
    planned, anew = (fastloss.SGD(each, lr=0.1, momentum=0.9, **options) for each in params)
    for step in range(6):
        for pair in zip(*params, strict=True):
            gradient = torch.randn_like(pair[0].detach())
            for optimizer, param in zip((planned, anew), pair, strict=True):
                param.grad = gradient.clone()
                if step > 1:
                    COMPANION_CHANGES[name](optimizer.state[param], key)
        anew._plan = None
        planned.step()
        anew.step()
        for mine, other in zip(*params, strict=True):
            assert torch.equal(mine, other)
            states = planned.state[mine], anew.state[other]
            assert states[0].keys() == states[1].keys()
            for buffer, expected in zip(states[0].values(), states[1].values(), strict=True):
                assert buffer.dtype == expected.dtype
                assert torch.equal(buffer, expected)


def test_tables_are_uploaded_when_something_has_moved(kernels: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing where all lies where it lay, whatever the numbers; one table for moved gradients; all for buffers."""
    from fastloss.kernels import sgd

    uploaded: list[Tensor] = []
    upload = sgd._uploaded

    def counting(host: Tensor, *others: Any) -> Tensor:
        uploaded.append(host)
        return upload(host, *others)

    monkeypatch.setattr(sgd, "_uploaded", counting)
    params = [torch.zeros(shape, device=kernels.device) for shape in ((3, 4), (5,))]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = fastloss.SGD(params, lr=0.1, momentum=0.9, max_norm=1.0)

    def uploads() -> int:
        uploaded.clear()
        optimizer.step()
        return len(uploaded)

    assert uploads() == 2  # the table, and which program serves what
    for _ in range(3):
        optimizer.param_groups[0]["lr"] *= 0.5
        for param in params:
            assert param.grad is not None
            param.grad.add_(1)
        assert uploads() == 0
    others = []
    for _ in range(2):
        for param in params:
            others.append(param.grad)  # their memory is not free
            param.grad = torch.ones_like(param)
        assert uploads() == 1
    assert uploads() == 0
    for param in params:
        optimizer.state[param]["momentum_buffer"].data = torch.zeros_like(param)
    assert uploads() == 2
    assert uploads() == 0


@pytest.mark.parametrize("found_inf", [False, True])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float64, {"momentum": 0.9, "dampening": 0.5, "max_norm": 0.5}),
        (torch.float32, {"momentum": 0.9, "momentum_dtype": torch.bfloat16}),
        (torch.float16, {"momentum": 0.9, "weight_decay": 0.1, "max_norm": 0.5}),
        (torch.float16, {"momentum": 0.9, "dampening": 0.5, "master_weights": True}),
        (torch.float16, {"momentum": 0.9, "kahan_sum": True}),
    ],
    ids=str,
)
def test_gradients_that_come_and_go(
    place: Place, dtype: torch.dtype, options: dict[str, Any], found_inf: bool
) -> None:
    """Every step is bit for bit that of an optimizer that makes its plan anew, and the plan is not made anew."""
    large = (66, 66) if place.interpreted else (140, 140)
    shapes: list[tuple[int, ...]] = [(6, 6), (3, 5), (), large, (6, 6), (0,), (5,)]
    values = [torch.randn(shape, device=place.device).to(dtype) for shape in shapes]
    ours, anew = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    groups = [[{"params": params[:4]}, {"params": params[4:], "lr": 0.03}] for params in (ours, anew)]
    optimizers = [fastloss.SGD(of, lr=0.1, **options) for of in groups]
    plans = set()
    for number in range(10):
        present = [number == 2 or (7 * i + number * number) % 5 > 1 for i in range(len(shapes))]
        if number == 7:
            present = [False] * len(shapes)
        for param, twin, has in zip(ours, anew, present, strict=True):
            grad = torch.randn_like(param).detach()
            param.grad, twin.grad = (grad, grad.clone()) if has else (None, None)
        optimizers[1]._plan = None
        for optimizer in optimizers:
            if found_inf:
                optimizer.found_inf = torch.full((), float(number == 5), device=place.device)  # type: ignore[attr-defined]
            optimizer.step()
        if number > 2:
            plans.add(optimizers[0]._plan)
        for param, twin in zip(ours, anew, strict=True):
            assert torch.equal(param, twin)
            state, expected = optimizers[0].state.get(param, {}), optimizers[1].state.get(twin, {})
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], expected[key]) for key in state)
        assert (optimizers[0].grad_norm is None) == (optimizers[1].grad_norm is None)
    assert len(plans) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", [[(40,)], [(5, 8)], [(40,), (5, 8)], [(2, 1050)]], ids=str)
@pytest.mark.parametrize(("groups", "shared"), [(1, False), (1, True), (20, False)])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum_dtype": torch.float32}, {"master_weights": True}, {"kahan_sum": True}, {"max_norm": 20.0}],
    ids=str,
)
def test_some_gradients_of_small_tensors_in_16_bits(
    dtype: torch.dtype, shapes: list[tuple[int, ...]], groups: int, shared: bool, options: dict[str, Any]
) -> None:
    """No less exact than torch's own step, beside float64; what has no gradient stays, its buffers too."""
    count, rates, generator = 60, {"momentum": 0.9, "weight_decay": 0.01}, torch.Generator().manual_seed(3)
    values = [torch.randn(shapes[i % len(shapes)], generator=generator).to(dtype) for i in range(count)]
    ours, theirs, exact = (
        [nn.Parameter(value.to(wide, copy=True)) for value in values] for wide in (dtype, dtype, torch.float64)
    )

    def grouped(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[i::groups], "lr": 0.1 + 0.01 * i} for i in range(groups)]

    optimizer = fastloss.SGD(grouped(ours), **rates, **options)
    others = torch.optim.SGD(grouped(theirs), foreach=True, **rates), torch.optim.SGD(grouped(exact), **rates)
    for step in range(12):
        present = [step == 0 or bool(torch.rand((), generator=generator) < 0.7) for _ in range(count)]
        for param, other, wide, has in zip(ours, theirs, exact, present, strict=True):
            grad = torch.randn(param.shape, generator=generator).to(dtype) if has else None
            param.grad = grad
            other.grad = grad if grad is None else grad.clone()
            wide.grad = grad if grad is None else grad.double()
        before = [[tensor.clone() for tensor in (p, *optimizer.state[p].values())] for p in ours if p.grad is None]
        if "max_norm" in options:
            for params in (theirs, exact):
                torch.nn.utils.clip_grad_norm_(params, options["max_norm"])
        optimizer.step()
        for other in others:
            other.step()
        after = [[p, *optimizer.state[p].values()] for p in ours if p.grad is None]
        for old, new in zip(before, after, strict=True):
            assert all(map(torch.equal, old, new))
        for state in optimizer.state.values() if shared and step == 3 else ():
            for buffer in state.values():
                buffer.share_memory_()

    def error(params: list[nn.Parameter]) -> float:
        return sum(float((p.detach().double() - e).square().sum()) for p, e in zip(params, exact, strict=True)) ** 0.5

    assert error(ours) <= 1.01 * error(theirs)  # both round the parameters


@pytest.mark.parametrize("moved", ["param", "buffer", "param without gradient", "buffer without gradient"])
@pytest.mark.parametrize("then", ["few", "all of the small ones", "all"])
@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"master_weights": True}], ids=str)
def test_what_moves_while_gradients_lack(moved: str, then: str, options: dict[str, Any]) -> None:
    """Bit for bit as with a plan made anew; a step of few gradients looks at no more than it touches."""
    values = [torch.randn(140, 140) if i == 11 else torch.randn(4, 5) for i in range(12)]
    ours, anew = ([nn.Parameter(value.half()) for value in values] for _ in range(2))
    optimizers = [fastloss.SGD(params, lr=0.1, momentum=0.9, **options) for params in (ours, anew)]
    having = {"few": [3, 5], "all of the small ones": list(range(11)), "all": list(range(12))}
    for number, present in enumerate(["all", "all", "few", "few", then, "few", "all"]):
        for i, pair in enumerate(zip(ours, anew, strict=True)):
            grad = torch.randn_like(pair[0]).detach()
            for param in pair:
                param.grad = grad.clone() if i in having[present] else None
        for optimizer, params in zip(optimizers, (ours, anew), strict=True):
            if number == 4:
                param = params[4 if "without" in moved else 3]
                tensor = param if "param" in moved else optimizer.state[param]["momentum_buffer"]
                tensor.data = tensor.data.t().contiguous().t()  # elsewhere, and in another order
        optimizers[1]._plan = None
        for optimizer in optimizers:
            optimizer.step()
        for param, twin in zip(ours, anew, strict=True):
            assert torch.equal(param, twin)
            state, expected = optimizers[0].state[param], optimizers[1].state[twin]
            assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{"nesterov": True}, {"decoupled_weight_decay": True}, {"max_norm": 1.0}, {"momentum": 0.0}], ids=str
)
def test_16_bits_by_torchs_operator_are_the_same(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares with float32 copies, but for a last bit: large tensors, and small ones, some without a gradient."""
    eager_sgd = sys.modules[choice.load("eager").sgd_step.__module__]
    if not eager_sgd._is_right_in(dtype):
        pytest.skip("this torch's operator is wrong in 16 bits")
    shapes, results = [(40,), (5, 8), (17,), (30000,), (3, 9000)], []
    for is_right_in in (eager_sgd._is_right_in, lambda dtype: False):
        monkeypatch.setattr(eager_sgd, "_is_right_in", is_right_in)
        generator = torch.Generator().manual_seed(5)
        params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in 4 * shapes]
        groups = [{"params": params[i::2], "lr": 0.1 + 0.05 * i} for i in range(2)]
        optimizer = fastloss.SGD(groups, **{"momentum": 0.9, "weight_decay": 0.01, **options})
        for step in range(5):
            for param in params:
                grad = torch.randn(param.shape, generator=generator).to(dtype)
                param.grad = grad if step == 0 or torch.rand((), generator=generator) < 0.6 else None
            optimizer.step()
        results.append([t for p in params for t in (p.detach(), *optimizer.state[p].values())])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_16_bits_where_the_default_device_is_another_one() -> None:
    param = nn.Parameter(torch.zeros(20000, dtype=torch.bfloat16))
    optimizer, param.grad = fastloss.SGD([param], lr=1.0), torch.ones_like(param)
    sys.modules[choice.load("eager").sgd_step.__module__]._is_right_in.cache_clear()
    with torch.device("meta"):
        optimizer.step()
    assert torch.equal(param.detach(), -torch.ones_like(param))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"master_weights": True}, {"max_norm": 1.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [20, 20000])
def test_a_gradient_with_the_negative_bit(count: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    options = {} if dtype == torch.float32 and "master_weights" in options else options
    param = nn.Parameter(torch.zeros(count, dtype=dtype))
    optimizer = fastloss.SGD([param], lr=1.0, **options)
    param.grad = torch._neg_view(torch.ones(count, dtype=dtype))  # -1
    optimizer.step()
    assert bool((param > 0).all())


def test_each_group_has_its_own_momentum_dtype() -> None:
    params = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((8,), (4, 3), (8,))]
    groups = [
        {"params": [param], "momentum_dtype": dtype}
        for param, dtype in zip(params, (None, torch.float32, None), strict=True)
    ]
    optimizer = fastloss.SGD(groups, lr=0.1, momentum=0.9)
    for absent in (None, 1, 0, None):
        for i, param in enumerate(params):
            param.grad = None if i == absent else torch.ones_like(param)
        optimizer.step()
        dtypes = [optimizer.state[param]["momentum_buffer"].dtype for param in params]
        assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_a_gradient_comes_back_in_another_layout(place: Place) -> None:
    """A step without a gradient starts fewer programs; tables that are laid out after it need all of them."""
    ours, theirs = ([nn.Parameter(torch.ones(6, 4, device=place.device)) for _ in range(3)] for _ in range(2))
    optimizers = fastloss.SGD(ours, 0.1, 0.9), torch.optim.SGD(theirs, 0.1, 0.9)
    for layout in ("plain", "lacking", "transposed", "plain"):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            grad, lacks = torch.randn(6, 4, device=place.device), layout == "lacking" and i != 1
            if layout == "transposed":
                grad = grad.t().contiguous().t()
            for param in pair:
                param.grad = None if lacks else grad.clone(memory_format=torch.preserve_format)
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


# ------------------------------------------------------------------------------- a step like the last one, and others


def _forgetting(optimizer: torch.optim.Optimizer) -> None:
    optimizer._plan = None  # type: ignore[attr-defined]


def _of_group(**options: Any) -> Callable[[fastloss.SGD], object]:
    return lambda optimizer: optimizer.param_groups[0].update(options)


def _scaled(found_inf: float | None, scale: float | None = 4.0) -> Callable[[fastloss.SGD], object]:
    def set_attributes(optimizer: fastloss.SGD) -> None:
        device = optimizer.param_groups[0]["params"][0].device
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale, device=device)  # type: ignore[attr-defined]
        if found_inf is not None:
            optimizer.found_inf = torch.tensor(found_inf, device=device)  # type: ignore[attr-defined]

    return set_attributes


def _halve(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.grad.mul_(0.5)


OTHER_STEPS: dict[str, Callable[[fastloss.SGD], object]] = {
    "lr": _of_group(lr=0.03),
    "lr, a tensor": lambda o: o.param_groups[0].update(lr=torch.tensor(0.03)),
    "momentum": _of_group(momentum=0.5),
    "no momentum": _of_group(momentum=0.0),
    "dampening": _of_group(dampening=0.5),
    "weight_decay": _of_group(weight_decay=0.3),
    "nesterov": _of_group(nesterov=True),
    "maximize": _of_group(maximize=True),
    "decoupled_weight_decay": _of_group(decoupled_weight_decay=True, weight_decay=0.3),
    "max_norm": lambda o: [group.update(max_norm=0.1) for group in o.param_groups],
    "momentum_dtype": _of_group(momentum_dtype=torch.float64),
    "kahan_sum": _of_group(master_weights=False, kahan_sum=True),
    "no rounding": _of_group(master_weights=False),
    "a scale": _scaled(0.0),
    "a scale alone": _scaled(None),
    "an overflow": _scaled(1.0),
    "an overflow without a scale": _scaled(1.0, None),
    "a hook": lambda o: o.register_step_pre_hook(_halve),
    "a parameter in the group before": lambda o: o.param_groups[0]["params"].append(
        o.param_groups[1]["params"].pop(0)
    ),
    "another tensor's memory": lambda o: setattr(
        o.param_groups[0]["params"][0], "data", torch.ones_like(o.param_groups[0]["params"][0].data)
    ),
    "a gradient less": lambda o: setattr(o.param_groups[0]["params"][0], "grad", None),
    "a state loaded": lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "a closure": lambda o: setattr(o, "step", functools.partial(o.step, lambda: _halve(o))),
    "autograd turned off": lambda o: setattr(o, "step", torch.no_grad()(o.step)),
    "inference mode": lambda o: setattr(o, "step", torch.inference_mode()(o.step)),
    "another thread": lambda o: setattr(o, "step", functools.partial(_in_a_thread, o.step)),
    "the other backend": lambda o: setattr(o, "step", fastloss.use_backend("eager")(o.step)),
}


def _in_a_thread(step: Callable[[], object]) -> None:
    thread = threading.Thread(target=contextvars.copy_context().run, args=(step,))
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"momentum": 0.9}),
        (torch.float16, {"momentum": 0.9, "master_weights": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", OTHER_STEPS)
def test_a_step_is_not_taken_for_the_last_one(
    place: Place, name: str, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is bit for bit that of an optimizer that has forgotten all steps before."""
    repeated: list[bool] = []
    call = Repeat.__call__
    monkeypatch.setattr(Repeat, "__call__", lambda self, of: repeated.append(call(self, of)) or repeated[-1])
    values = [torch.randn(shape, device=place.device).to(dtype) for shape in ((6, 6), (3, 5), (), (66, 66))]
    ours, anew = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    optimizers = [
        fastloss.SGD([{"params": params[:2]}, {"params": params[2:], "lr": 0.2}], lr=0.1, **options)
        for params in (ours, anew)
    ]
    for number in range(6):
        for pair in zip(ours, anew, strict=True):
            grad = torch.randn_like(pair[0]).detach()
            for param in pair:
                param.grad = grad.clone()
        _forgetting(optimizers[1])
        for optimizer in optimizers:
            if number == 3:
                OTHER_STEPS[name](optimizer)
            optimizer.step()
            for attribute in ("grad_scale", "found_inf"):
                optimizer.__dict__.pop(attribute, None)
        assert repeated[-1:] == [True] or number not in (1, 2), "the steps before are repeated"
        for param, twin in zip(ours, anew, strict=True):
            assert torch.equal(param, twin)
            assert param.grad is None or torch.equal(param.grad, twin.grad)
            state, expected = optimizers[0].state.get(param, {}), optimizers[1].state.get(twin, {})
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], expected[key]) for key in state)
        assert (optimizers[0].grad_norm is None) == (optimizers[1].grad_norm is None)


@pytest.mark.parametrize("how", ["offloaded", "offloaded by data", "cleared", "deleted", "groups and state cleared"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"dampening": 0.5}),
        (torch.float16, {"master_weights": True}),
        (torch.float16, {"kahan_sum": True, "max_norm": 1.0}),
    ],
    ids=str,
)
def test_state_is_freed(place: Place, how: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Tensors that a program takes out of the state or the groups are not held on to, as with torch."""
    params = [nn.Parameter(torch.ones(size, dtype=dtype, device=place.device)) for size in (300, 20000)]
    optimizer = fastloss.SGD(params, lr=0.1, momentum=0.9, **options)
    for lacks in (False, False, True, False):
        for param in params:
            param.grad = None if lacks and param is params[0] else torch.ones_like(param)
        optimizer.step()
    optimizer.zero_grad()
    watched = [buffer for state in optimizer.state.values() for buffer in state.values()]
    watched = [buffer.untyped_storage() for buffer in watched] if how == "offloaded by data" else watched
    references = list(map(weakref.ref, [*watched, *(params if "groups" in how else [])]))
    del watched
    if "offloaded" in how:
        for state in optimizer.state.values():
            for key in state:
                if how == "offloaded":
                    state[key] = state[key].clone()
                else:
                    state[key].data = state[key].data.clone()
    elif how == "deleted":
        for param in params:
            del optimizer.state[param]
    else:
        optimizer.state.clear()
        if "groups" in how:
            optimizer.param_groups.clear()
            params.clear()
    param = state = None  # type: ignore[assignment]
    gc.collect()
    assert [reference() is not None for reference in references] == [False] * len(references)
