"""``fastloss.SGD`` in the worlds that an optimizer lives in: compilers, several processes, averages of weights, loss
scales, modules that are rewritten, and programs that differentiate the step.

What is right is what ``torch.optim.SGD`` gives in the same place, where it can be there.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
import shutil
from collections.abc import Callable
from typing import Any

import processes
import pytest
import reference
import sharded
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import clip_grad_norm_, parametrizations, parametrize
from torch.optim import swa_utils

import fastloss
from fastloss.backends import choice

Optimizer = Callable[..., Any]
BOTH: tuple[Optimizer, Optimizer] = (fastloss.SGD, torch.optim.SGD)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def network(place: Place, seed: int = 1, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).to(place.device, dtype)


def batch(place: Place, number: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    input = torch.randn(8, 6, generator=generator).to(place.device, dtype)
    return input, torch.randn(8, 3, generator=generator).to(place.device, dtype)


def train(model: nn.Module, optimizer: Any, input: Tensor, target: Tensor) -> None:
    optimizer.zero_grad()
    F.mse_loss(model(input), target).backward()
    optimizer.step()


def close(mine: Any, other: Any, **tolerance: Any) -> None:
    torch.testing.assert_close(list(mine), list(other), **tolerance)


# ----------------------------------------------------------------------------- torch.compile


OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.4, "maximize": True},
    {"momentum": 0.9, "max_norm": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "max_norm": 100.0},
]
# Of bfloat16 parameters, and how near to each other two runs of float32 arithmetic are in them.
SIXTEEN_BITS: list[dict[str, Any]] = [
    {"master_weights": True},
    {"master_weights": True, "momentum_dtype": torch.float32, "max_norm": 0.5},
    {"kahan_sum": True},
    {"kahan_sum": True, "momentum_dtype": torch.float32},
    {"momentum_dtype": torch.float32},
    {},
]


def trained(
    place: Place,
    options: dict[str, Any],
    *,
    compiled: str = "",
    backend: str = "aot_eager",
    steps: int = 5,
    lr: float | Tensor = 0.1,
    set_lr: bool = False,
) -> tuple[nn.Module, Any]:
    """A network after some steps; ``compiled`` says ``c`` for each that is compiled, others are not."""
    model = network(place)
    optimizer = fastloss.SGD(model.parameters(), lr=lr, **options)
    step = torch.compile(optimizer.step, backend=backend, fullgraph=True)
    for number, how in zip(range(steps), itertools.cycle(compiled or "-")):
        input, target = batch(place, number)
        optimizer.zero_grad()
        F.mse_loss(model(input), target).backward()
        if set_lr:
            assert isinstance(lr, Tensor)
            lr.fill_(0.1 / (1 + number))
        (step if how == "c" else optimizer.step)()
    return model, optimizer


def assert_same_run(mine: tuple[nn.Module, Any], other: tuple[nn.Module, Any]) -> None:
    close(mine[0].parameters(), other[0].parameters())
    for param, twin in zip(mine[0].parameters(), other[0].parameters(), strict=True):
        state, expected = mine[1].state[param], other[1].state[twin]
        assert set(state) == set(expected)
        for key in state:
            torch.testing.assert_close(state[key], expected[key])
    if other[1].grad_norm is None:
        assert mine[1].grad_norm is None
    else:
        torch.testing.assert_close(mine[1].grad_norm, other[1].grad_norm)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("compiled", ["c", "-cc-"])
def test_compiled_step(place: Place, options: dict[str, Any], compiled: str) -> None:
    """One graph, which torch's optimizer is not; all steps compiled or some: weights, state and norm are the same."""
    assert_same_run(trained(place, options, compiled=compiled), trained(place, options))


by_inductor = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), reason="needs a C++ compiler"
)


@pytest.mark.slow
@by_inductor
@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[3]], ids=str)
def test_step_compiled_by_inductor(options: dict[str, Any]) -> None:
    place = Place("eager", torch.device("cpu"))
    assert_same_run(trained(place, options, compiled="c", backend="inductor"), trained(place, options))


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS[1:4], ids=str)
def test_compiled_training_step(options: dict[str, Any]) -> None:
    """Forward, backward and step in one compiled function, which may break the graph."""
    place = Place("eager", torch.device("cpu"))
    model = network(place)
    optimizer = fastloss.SGD(model.parameters(), lr=0.1, **options)

    @torch.compile(backend="aot_eager")
    def train(input: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(input), target)
        loss.backward()
        optimizer.step()
        return loss

    losses = [train(*batch(place, number)).item() for number in range(5)]
    assert len(set(losses)) == 5
    assert_same_run((model, optimizer), trained(place, options))


@pytest.mark.slow
@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[4]], ids=str)
def test_a_tensor_lr_compiles_nothing_anew(options: dict[str, Any]) -> None:
    """Filled with another number before each step."""
    place = Place("eager", torch.device("cpu"))
    counter = CompileCounterWithBackend("aot_eager")
    lr = torch.tensor(0.1, device=place.device)
    mine = trained(place, options, compiled="c", backend=counter, lr=lr, set_lr=True, steps=3)
    at_first = counter.frame_count
    assert 0 < at_first <= 2  # with the momentum to be made, and with it there
    torch._dynamo.reset()
    counter.clear()
    lr = torch.tensor(0.1, device=place.device)
    mine = trained(place, options, compiled="c", backend=counter, lr=lr, set_lr=True, steps=8)
    assert counter.frame_count == at_first
    expected = trained(place, options, lr=torch.tensor(0.1, device=place.device), set_lr=True, steps=8)
    assert_same_run(mine, expected)


@pytest.mark.parametrize("options", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("compiled", ["c", "-c"])
def test_compiled_step_of_16_bits(place: Place, options: dict[str, Any], compiled: str) -> None:
    """Buffers of the dtypes that they have without the compiler, and numbers as near as those are to float64's."""
    if place.interpreted:
        pytest.skip("the interpreter rounds bfloat16 by rules of its own")
    runs = []
    for how in (compiled, "-"):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(40, 3, device=place.device).bfloat16())
        optimizer = fastloss.SGD([param], lr=0.01, momentum=0.9, weight_decay=0.01, **options)
        step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
        for _, now in zip(range(6), itertools.cycle(how)):
            param.grad = torch.randn(40, 3, device=place.device).bfloat16()
            (step if now == "c" else optimizer.step)()
        runs.append((param.detach(), optimizer.state[param]))
    (mine, state), (other, expected) = runs
    assert {key: value.dtype for key, value in state.items()} == {key: v.dtype for key, v in expected.items()}
    if "master_weights" in options:
        torch.testing.assert_close(state["master_param"], expected["master_param"], atol=2e-4, rtol=1e-4)
        assert torch.equal(mine, state["master_param"].bfloat16())
    elif "kahan_sum" in options:
        whole, right = mine.float() + state["kahan_comp"].float(), other.float() + expected["kahan_comp"].float()
        torch.testing.assert_close(whole, right, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(mine, other)
    torch.testing.assert_close(state["momentum_buffer"], expected["momentum_buffer"])


@pytest.mark.slow
@by_inductor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compensation_compiled_by_inductor(dtype: torch.dtype) -> None:
    """A compiled program leaves out the way to 16 bits and back, by which the lost digits are found."""
    param = nn.Parameter(torch.ones(40, dtype=dtype))
    lr = torch.finfo(dtype).eps / 8
    optimizer = fastloss.SGD([param], lr=lr, kahan_sum=True)
    step = torch.compile(optimizer.step, backend="inductor", fullgraph=True)
    for _ in range(20):
        param.grad = -torch.ones_like(param)
        step()
    whole = param.detach().float() + optimizer.state[param]["kahan_comp"].float()
    torch.testing.assert_close(whole, torch.full((40,), 1 + 20 * lr), rtol=0, atol=lr / 8)


@pytest.mark.parametrize("compiled", ["c", "-"])
def test_momentum_of_another_dtype_than_its_parameters(place: Place, compiled: str) -> None:
    """Compiled or not, from the first step on."""
    model, optimizer = trained(place, {"momentum": 0.9, "momentum_dtype": torch.float64}, compiled=compiled)
    assert {optimizer.state[p]["momentum_buffer"].dtype for p in model.parameters()} == {torch.float64}
    expected, _ = trained(place, {"momentum": 0.9})
    close(model.parameters(), expected.parameters())


@pytest.mark.slow
def test_stochastic_rounding_compiled() -> None:
    """Right on average: a step of a quarter of the distance to the neighbour goes there one time in four."""
    param = nn.Parameter(torch.ones(20000, dtype=torch.bfloat16))
    optimizer = fastloss.SGD([param], lr=2.0**-9, stochastic_rounding=True)
    param.grad = -torch.ones_like(param)
    torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)()
    assert set(param.tolist()) == {1.0, 1.0 + 2.0**-7}
    assert (param > 1).float().mean().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.slow(interpreted=True)
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_grad_scaler_with_steps_by_operators(place: Place, differentiable: bool, max_norm: float | None) -> None:
    """Neither a compiled nor a differentiable step forgets the scale, nor an overflow."""
    runs = []
    for by_operators in (True, False):
        torch.manual_seed(0)
        params = [torch.randn(shape, device=place.device) for shape in [(5, 3), (7,)]]
        options: dict[str, Any] = {"differentiable": differentiable and by_operators}
        optimizer = fastloss.SGD(params, lr=0.1, momentum=0.9, max_norm=max_norm, **options)
        scaler = torch.amp.GradScaler(place.device.type, init_scale=8.0)
        if by_operators and not differentiable:
            optimizer.step = torch.compile(optimizer.step, backend="aot_eager")  # type: ignore[method-assign]
        for number in range(4):
            scale = float(scaler.scale(torch.ones((), device=place.device)))
            for param in params:
                param.grad = torch.randn_like(param) * scale
            if number == 2:
                params[1].grad[3] = float("inf")  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
        runs.append((params, optimizer.grad_norm, scaler.get_scale()))
    close(runs[0][0], runs[1][0])
    assert runs[0][2] == runs[1][2] == 4.0
    if max_norm is not None:
        torch.testing.assert_close(runs[0][1], runs[1][1])


@pytest.mark.parametrize("by_operators", [False, True])
def test_a_norm_beyond_float16(by_operators: bool) -> None:
    """Of gradients which float16 holds one by one: their norm clips, and stops nothing."""
    param = nn.Parameter(torch.zeros(64, 1024, dtype=torch.float16))
    optimizer = fastloss.SGD([param], lr=1.0, max_norm=1.0)
    param.grad = torch.full_like(param, 512.0)
    (torch.compile(optimizer.step, backend="aot_eager") if by_operators else optimizer.step)()
    torch.testing.assert_close(param.detach(), torch.full_like(param, -1 / 256))
    assert optimizer.grad_norm is not None
    assert float(optimizer.grad_norm) == 512.0 * 256


@pytest.mark.parametrize("by_operators", [False, True])
def test_the_norm_is_that_of_the_last_step(by_operators: bool) -> None:
    """Of one that overflowed too; and there is none of a step without gradients."""
    param = torch.ones(4)
    optimizer = fastloss.SGD([param], lr=0.1, max_norm=1.0, differentiable=by_operators)
    assert optimizer.grad_norm is None
    param.grad = torch.full((4,), 2.0)
    optimizer.step()
    assert optimizer.grad_norm == 4.0
    param.grad = torch.full((4,), float("inf"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert optimizer.grad_norm == float("inf")
    param.grad = None
    optimizer.step()
    assert optimizer.grad_norm is None


def test_the_norm_of_wide_gradients_of_narrow_parameters(place: Place) -> None:
    """``grad_dtype`` allows them: float64 gradients whose squares float32 does not hold."""
    params = [
        nn.Parameter(torch.zeros(64, device=place.device)),
        nn.Parameter(torch.zeros(3, 2, device=place.device)),
    ]
    for param in params:
        param.grad_dtype = None
        param.grad = torch.full_like(param, 1e25, dtype=torch.float64)
    optimizer = fastloss.SGD(params, lr=1.0, max_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert float(optimizer.grad_norm) == pytest.approx(70**0.5 * 1e25, rel=1e-6)
    for param in params:
        torch.testing.assert_close(param.detach(), torch.full_like(param, -(70**-0.5)))


def test_a_step_without_numbers() -> None:
    """Under ``FakeTensorMode``, by which programs find out what memory a step takes."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        model = nn.Linear(4, 4)
        optimizer = fastloss.SGD(model.parameters(), lr=0.1, momentum=0.9, max_norm=1.0)
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        assert isinstance(optimizer.grad_norm, FakeTensor)
        assert isinstance(optimizer.state[model.weight]["momentum_buffer"], FakeTensor)
    optimizer.step()


# ----------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes computed together."""
    names = ["eager"] + ["triton"] * (choice.triton_version() is not None and not torch.cuda.is_available())
    results: dict[str, Any] = processes.together(
        "sharded.py", sharded.PROCESSES, tmp_path_factory.mktemp("together"), *names
    )
    return results


@pytest.fixture(params=["eager", "triton"])
def shared(request: pytest.FixtureRequest, together: dict[str, Any]) -> dict[str, Any]:
    """The same, by one backend."""
    if request.param not in together:
        pytest.skip("Triton serves no CPU tensors here")
    results: dict[str, Any] = together[request.param]
    return results


def alone(options: dict[str, Any]) -> tuple[list[Tensor], list[float]]:
    """The network of ``sharded.py`` in one process, with torch's optimizer in float64."""
    model = sharded.network()
    _, norms = reference.trained(model, sharded.batches(), options)
    return [p.detach() for p in model.parameters()], norms


@pytest.mark.parametrize("name", list(sharded.NETWORKS))
def test_fully_sharded(shared: dict[str, Any], name: str) -> None:
    """FSDP2: shards of unequal lengths, and empty ones. The norm is that over all shards."""
    found = shared["networks"][name]
    params, norms = alone(sharded.NETWORKS[name])
    close(found["params"], params)
    assert all(found["placed"])
    assert bool(found["placed"]) == ("momentum" in sharded.NETWORKS[name])
    if norms:
        assert min(norms) > sharded.NETWORKS[name]["max_norm"]
        assert [float(norm) for norm in found["norms"]] == pytest.approx(norms, rel=1e-6)
    else:
        assert set(found["norms"]) == {None}


def test_checkpoints_of_shards(together: dict[str, Any]) -> None:
    """``torch.distributed.checkpoint.state_dict`` hands the state on, flattened too, and from torch's optimizer."""
    params, _ = alone(sharded.NETWORKS["nesterov"])
    found = together["checkpoints"]
    assert len(found) == 3
    for name, result in found.items():
        torch.testing.assert_close(result["params"], params, msg=lambda m, name=name: f"{name}: {m}")
        assert all(result["placed"]), name


def by_hand(
    dtype: torch.dtype, optimizer_class: Optimizer, max_norm: float | None = None, **options: Any
) -> tuple[list[Tensor], list[dict[str, Tensor]], list[Tensor]]:
    values, grads = sharded.tensors(dtype)
    params = [nn.Parameter(value) for value in values]
    optimizer = optimizer_class(params, lr=0.1, momentum=0.9, **options)
    norms = []
    for of_step in grads:
        for param, grad in zip(params, of_step, strict=True):
            param.grad = grad
        if max_norm is not None:
            norms.append(clip_grad_norm_(params, max_norm))
        optimizer.step()
    return [p.detach() for p in params], [optimizer.state[p] for p in params], norms


@pytest.mark.parametrize("name", list(sharded.ROUNDINGS))
def test_shards_of_16_bits(shared: dict[str, Any], name: str, request: pytest.FixtureRequest) -> None:
    """Every buffer lies as its parameter does, and holds what it holds in one process."""
    found = shared["by hand"][name]
    with fastloss.use_backend("triton" if "triton" in request.node.callspec.id else "eager"):
        params, states, _ = by_hand(torch.bfloat16, fastloss.SGD, **sharded.ROUNDINGS[name])
    assert found["placed"] == [True] * 4
    close(found["params"], params)
    for state, expected in zip(found["states"], states, strict=True):
        assert set(state) == set(expected)
        for key in state:  # not bit for bit: torch's operator computes the ends of a tensor otherwise than its middle
            atol = 0.02 if key == "kahan_comp" else 1e-5  # what is rounded otherwise is compensated otherwise
            torch.testing.assert_close(state[key], expected[key], rtol=0.016, atol=atol)


@pytest.mark.parametrize("name", ["float64", "clipped"])
def test_shards_and_replicas_in_one_optimizer(shared: dict[str, Any], name: str) -> None:
    """Cut along either dimension, replicated, and not distributed at all: each counts once in the norm."""
    options: dict[str, Any] = {"float64": {"weight_decay": 0.1}, "clipped": {"max_norm": 0.5}}[name]
    params, _, norms = by_hand(torch.float64, torch.optim.SGD, **options)
    found = shared["by hand"][name]
    close(found["params"], params)
    for norm, right in zip(found["norms"], norms or [None] * sharded.STEPS, strict=True):
        assert right is norm is None or float(norm) == pytest.approx(float(right), rel=1e-6)


def test_weights_loaded_into_shards_are_the_truth() -> None:
    """A DTensor and its local shard count their versions apart; neither is asked."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def shard(value: float) -> Tensor:
            return DTensor.from_local(torch.full((4, 4), value, dtype=torch.bfloat16), mesh, [Shard(0)])

        param = nn.Parameter(shard(1.0))
        optimizer = fastloss.SGD([param], lr=2.0**-10, master_weights=True)
        for _ in range(2):
            param.grad = torch.ones_like(param)
            optimizer.step()
            with torch.no_grad():
                param.copy_(shard(5.0))
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert torch.equal(param.to_local(), shard(5.0).to_local())  # type: ignore[attr-defined]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_gradients_placed_elsewhere(shared: dict[str, Any], max_norm: float | None) -> None:
    (value, *_), grads = sharded.tensors()
    param = nn.Parameter(value)
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    for grad, *_ in grads:
        param.grad = grad
        if max_norm is not None:
            clip_grad_norm_([param], max_norm)
        optimizer.step()
    torch.testing.assert_close(shared["elsewhere placed"][str(max_norm)], param.detach())


def test_shards_of_shards(shared: dict[str, Any]) -> None:
    """As FSDP cuts up what tensor parallelism has cut up: √(12 · 1² + 12 · 2²)."""
    assert float(shared["strided"]) == pytest.approx(60**0.5)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_overflow_in_one_shard(shared: dict[str, Any], max_norm: float | None) -> None:
    found = shared["overflow"][str(max_norm)]
    values, (grads, *_) = sharded.tensors(torch.float32)
    some = [0, 1, 2, 4]
    params = [nn.Parameter(values[i].clone()) for i in some]
    for after in found["params"][:2]:
        assert all(map(torch.equal, after, params))
    assert found["scale"] == 1.0
    for param, i in zip(params, some, strict=True):
        param.grad = grads[i]
    if max_norm is not None:
        clip_grad_norm_(params, max_norm)
    torch.optim.SGD(params, lr=0.1, momentum=0.9).step()
    close(found["params"][2], [p.detach() for p in params])


def test_compiled_step_of_shards(together: dict[str, Any]) -> None:
    params, _, _ = by_hand(torch.float64, torch.optim.SGD, weight_decay=0.1)
    close(together["compiled"], params)


def test_compiled_step_clips_shards_by_the_norm_of_all(together: dict[str, Any]) -> None:
    uncompiled, compiled = together["clipped"]
    values, (grads, *_) = sharded.tensors()
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    for found in (uncompiled, compiled):
        assert [float(of_rank) for of_rank in found["norm"]] == pytest.approx([float(norm)] * sharded.PROCESSES)
        close(
            found["params"],
            [v - 0.1 * 0.5 / norm * g for v, g in zip(values, grads, strict=True)],
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("kind", ["DDP", "HSDP", "DTensor"])
def test_replicas_are_rounded_alike(shared: dict[str, Any], kind: str) -> None:
    """Stochastic rounding, with another seed in each process."""
    first, second = shared["replicas"][kind]["replicas"]
    assert torch.equal(first, second)
    assert shared["replicas"][kind]["moved"]


def test_replicas_are_rounded_alike_by_a_compiled_step(together: dict[str, Any]) -> None:
    first, second = together["compiled replicas"]["replicas"]
    assert torch.equal(first, second)
    assert together["compiled replicas"]["moved"]


def test_shards_are_rounded_each_by_its_own_numbers(shared: dict[str, Any]) -> None:
    """Right on average, and anew in each step."""
    one, two = shared["rounded shards"]
    assert float(one.float().mean()) == pytest.approx(1 + 2.0**-9, abs=2.0**-13)
    assert float(two.float().mean()) == pytest.approx(1 + 2.0**-8, abs=2.0**-12)
    up = one > 1
    assert not torch.equal(up[:128], up[128:])
    assert 0.05 < float((up & (two > one)).float().mean()) < 0.08  # 1/16


def test_one_plan_for_steps_over_shards(shared: dict[str, Any]) -> None:
    assert shared["plans"] == 1


def test_a_shard_that_is_replaced_is_stepped(shared: dict[str, Any]) -> None:
    param, before = shared["replaced shard"]
    torch.testing.assert_close(param, torch.full((4, 3), 9.0))
    torch.testing.assert_close(before, torch.zeros(2, 3))


def test_whole_tensors_beside_dtensors_are_refused(together: dict[str, Any]) -> None:
    found = together["mixed"]
    said = r"a parameter of shape \(6, 4\) is a DTensor, and its gradient is a plain tensor; expected"
    assert re.search(said, found["first_gradient"])
    assert re.search(said, found["later_gradient"])
    assert "momentum_buffer of parameter 0 is a plain tensor, but the parameter is a DTensor" in found["loaded"]
    assert "a tensor of shape (6, 4) on cpu as its momentum_buffer; expected" in found["put"]


@pytest.mark.parametrize("original", [False, True])
def test_parameters_that_fsdp1_has_flattened(together: dict[str, Any], original: bool) -> None:
    """An overflow on one process skips the step on both; ``max_norm``, which can't be known, is refused."""
    found = together["flattened"]
    assert found[f"fastloss.optim.sgd {original}"] == found[f"torch.optim.sgd {original}"] == [[0.0, 2.0]] * 2
    assert "clip_grad_norm_ of the wrapped module" in found[f"max_norm {original}"]


# ----------------------------------------------------------------------------- averages, schedules, micro-batches


def each(place: Place, run: Callable[[Optimizer], list[Tensor]], **tolerance: Any) -> None:
    """The same program with either optimizer."""
    mine, other = (run(optimizer) for optimizer in BOTH)
    assert len(mine) == len(other) > 0
    close(mine, other, **tolerance)


@pytest.mark.parametrize("average", [None, swa_utils.get_ema_multi_avg_fn(0.8), swa_utils.get_swa_multi_avg_fn()])
def test_averaged_weights(place: Place, average: Any) -> None:
    """AveragedModel reads the weights after each step, SWALR sets the rate, update_bn runs over the average."""

    def run(optimizer_class: Optimizer) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)).to(place.device)
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
        optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        schedule = swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
        for number in range(5):
            train(model, optimizer, *batch(place, number))
            averaged.update_parameters(model)
            schedule.step()
        swa_utils.update_bn([batch(place, number)[0] for number in range(3)], averaged)
        assert schedule.get_last_lr() == [pytest.approx(0.02)]
        return [
            *model.parameters(),
            *averaged.parameters(),
            *(b for b in averaged.buffers() if b.is_floating_point()),
        ]

    each(place, run, rtol=1e-5, atol=1e-5)


def test_ema_by_avg_fn_and_swapped_weights(place: Place) -> None:
    """The averaged weights are swapped in for an evaluation, as ``.data``, and out again."""

    def run(optimizer_class: Optimizer) -> list[Tensor]:
        model = network(place)
        averaged = swa_utils.AveragedModel(model, avg_fn=lambda ema, new, _: 0.9 * ema + 0.1 * new)
        optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9)
        seen = []
        for number in range(4):
            input, target = batch(place, number)
            train(model, optimizer, input, target)
            averaged.update_parameters(model)
            pairs = list(zip(model.parameters(), averaged.module.parameters(), strict=True))
            for _ in range(2):
                for param, mean in pairs:
                    param.data, mean.data = mean.data, param.data
                seen.append(model(input).detach())
        return [*seen, *model.parameters()]

    each(place, run)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedules_of_rate_and_momentum(place: Place, tensor_lr: bool) -> None:
    def run(optimizer_class: Optimizer) -> list[Tensor]:
        model = network(place)
        lr = torch.tensor(0.1) if tensor_lr else 0.1
        optimizer = optimizer_class(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=6, cycle_momentum=not tensor_lr)
        for number in range(5):
            input, target = batch(place, number)
            optimizer.zero_grad()
            F.mse_loss(model(input), target).backward()
            optimizer.step()
            schedule.step()
        return list(model.parameters())

    each(place, run)


def test_accumulated_micro_batches(place: Place) -> None:
    """Over one backward pass or over four; gradients kept and zeroed in place in between, or given up."""

    def run(optimizer_class: Optimizer, parts: int, to_none: bool) -> list[Tensor]:
        model = network(place)
        optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9)
        for number in range(4):
            input, target = batch(place, number)
            for some, wanted in zip(input.chunk(parts), target.chunk(parts), strict=True):
                (F.mse_loss(model(some), wanted) / parts).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        return list(model.parameters())

    expected = run(torch.optim.SGD, 1, True)
    for parts, to_none in itertools.product((1, 4), (False, True)):
        close(run(fastloss.SGD, parts, to_none), expected)


@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_clipped_before_the_step_or_within(place: Place, max_norm: float) -> None:
    def run(optimizer_class: Optimizer, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
        model = network(place)
        optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9, **options)
        norms = []
        for number in range(4):
            input, target = batch(place, number)
            optimizer.zero_grad()
            F.mse_loss(model(input), target).backward()
            norms.append(optimizer.grad_norm if options else clip_grad_norm_(model.parameters(), max_norm))
            optimizer.step()
            if options:
                norms[-1] = optimizer.grad_norm
        return list(model.parameters()), norms

    expected, norms = run(torch.optim.SGD)
    for mine, of_mine in (run(fastloss.SGD), run(fastloss.SGD, max_norm=max_norm)):
        close(mine, expected)
        close(of_mine, norms)


# ----------------------------------------------------------------------------- loss scales


@pytest.mark.parametrize("unscaled_before", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.2])
def test_training_in_float16_with_a_scaler(place: Place, unscaled_before: bool, max_norm: float | None) -> None:
    """Float16 autocast with a scale that overflows at first and grows back into overflows: the same steps are left
    out, the same scales follow, the same weights come of it.
    """

    def run(optimizer_class: Optimizer) -> tuple[list[Tensor], list[float]]:
        mine = optimizer_class is fastloss.SGD
        model = network(place)
        options = {"max_norm": max_norm} if mine else {}
        optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9, dampening=0.2, **options)
        scaler = torch.amp.GradScaler(place.device.type, init_scale=2.0**20, growth_interval=2)
        scales = []
        for number in range(12):
            input, target = batch(place, number)
            optimizer.zero_grad()
            with torch.autocast(place.device.type, dtype=torch.float16):
                output = model(input)
            scaler.scale(F.mse_loss(output.float(), target)).backward()
            if unscaled_before or (max_norm is not None and not mine):
                scaler.unscale_(optimizer)
            if max_norm is not None and not mine:
                clip_grad_norm_(model.parameters(), max_norm)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        close([p.grad for p in model.parameters()], [p.grad for p in model.parameters()])
        return [*model.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values())], scales

    (mine, scales), (other, expected) = (run(optimizer) for optimizer in BOTH)
    assert scales == expected
    assert min(scales) < 2.0**20, "nothing has overflowed"
    assert any(b > a for a, b in itertools.pairwise(scales)), "nothing has not"
    close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapped", ["nothing", "step", "optimizer", "schedule", "scaler", "a method of the scaler"])
def test_a_skipped_step_is_seen_by_wrappers(place: Place, wrapped: str) -> None:
    """After an overflow ``step`` is not called where something would notice, as with torch's optimizer by default."""

    class Scaler(torch.amp.GradScaler):
        def _maybe_opt_step(self, *args: Any, **kwargs: Any) -> Any:
            return super()._maybe_opt_step(*args, **kwargs)

    class Wrapper:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    param = nn.Parameter(torch.ones(4, device=place.device))
    optimizer: Any = fastloss.SGD([param], lr=0.1)
    make: Any = Scaler if wrapped == "scaler" else torch.amp.GradScaler
    scaler = make(place.device.type, init_scale=4.0)
    if wrapped == "a method of the scaler":
        scaler.unscale_ = lambda given: torch.amp.GradScaler.unscale_(scaler, given)
    elif wrapped == "schedule":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls: list[Any] = []
    inner = optimizer.step
    if wrapped == "step":
        optimizer.step = lambda *args: (calls.append(None), inner(*args))
    scaler.scale(torch.ones((), device=place.device))
    given = Wrapper(optimizer) if wrapped == "optimizer" else optimizer
    for number, (grad, moved) in enumerate([(float("inf"), 0.0), (4.0, 0.1 * 4 / 2)]):
        param.grad = torch.full((4,), grad, device=place.device)
        if wrapped != "step":
            handler = optimizer.register_step_pre_hook(lambda *_: calls.append(None))
        scaler.step(given)
        scaler.update()
        if wrapped != "step":
            handler.remove()
        torch.testing.assert_close(param.detach(), torch.full_like(param, 1 - moved))
        fused = wrapped in ("nothing", "schedule")
        assert len(calls) == number + fused
    assert float(param.grad[0]) == 2.0  # type: ignore[index]


def test_an_overflow_is_no_first_step(place: Place) -> None:
    """The momentum begins without dampening at the first step that is taken; there is none in the state before."""
    grad = torch.randn(5, device=place.device)
    runs = []
    for optimizer_class in BOTH:
        param = nn.Parameter(torch.zeros(5, device=place.device))
        optimizer = optimizer_class([param], lr=0.1, momentum=0.9, dampening=0.5)
        scaler = torch.amp.GradScaler(place.device.type, init_scale=4.0)
        for number in range(4):
            scale = float(scaler.scale(torch.ones((), device=place.device)))
            param.grad = grad * scale if number > 1 else torch.full_like(grad, float("inf"))
            scaler.step(optimizer)
            scaler.update()
            if number == 1:
                assert not any("momentum_buffer" in s for s in optimizer.state_dict()["state"].values())
        runs.append(param.detach())
    torch.testing.assert_close(*runs)


def test_momentum_that_begins_after_an_overflow(place: Place) -> None:
    """Groups without momentum get theirs when it is set; what was called off before has left nothing behind."""
    runs = []
    for optimizer_class in BOTH:
        torch.manual_seed(0)
        params = [torch.zeros(5, device=place.device), torch.ones(3, device=place.device)]
        groups = [{"params": params[:1], "momentum": 0.0}, {"params": params[1:]}]
        optimizer = optimizer_class(groups, lr=0.1, momentum=0.9, dampening=0.5)
        scaler = torch.amp.GradScaler(place.device.type, init_scale=4.0)
        for number in range(6):
            scale = float(scaler.scale(torch.ones((), device=place.device)))
            for param in params:
                param.grad = torch.randn_like(param) * scale
            if number in (0, 3):
                params[1].grad[0] = float("inf")  # type: ignore[index]
            optimizer.param_groups[0]["momentum"] = 0.9 if number > 2 else 0.0
            scaler.step(optimizer)
            scaler.update()
        runs.append([p.detach() for p in params])
    close(*runs)


def test_an_overflow_is_no_first_step_for_a_compiled_one_either(place: Place) -> None:
    """The first step is called off after its momentum buffer has been made; the second is compiled."""
    param = nn.Parameter(torch.zeros(5, device=place.device))
    optimizer = fastloss.SGD([param], lr=1.0, momentum=0.9, dampening=0.5)
    param.grad = torch.ones_like(param)
    optimizer.found_inf = torch.ones((), device=place.device)  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
    torch.compile(optimizer.step, backend="aot_eager")()
    torch.testing.assert_close(param.detach(), -torch.ones_like(param))


# ----------------------------------------------------------------------------- modules and parameters of all kinds


def test_parametrized_and_spectral_normed_modules(place: Place) -> None:
    class Symmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.triu() + x.triu(1).transpose(-1, -2)

    def run(optimizer_class: Optimizer) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5), nn.Linear(5, 3)).to(place.device)
        parametrize.register_parametrization(model[0], "weight", Symmetric())
        parametrizations.spectral_norm(model[2])
        parametrizations.weight_norm(model[3])
        optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9)
        for number in range(4):
            input, target = batch(place, number)
            optimizer.zero_grad()
            with parametrize.cached():
                F.mse_loss(model(input), target).backward()
            optimizer.step()
        parametrize.remove_parametrizations(model[0], "weight")
        return [*model.parameters(), model(batch(place, 0)[0]).detach()]

    each(place, run)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("how", ["plainly", "clipped", "scaled", "clipped and scaled", "tensor lr"])
def test_sparse_embedding_beside_dense_parameters(place: Place, momentum: float, how: str) -> None:
    """Against a dense embedding where nothing is sparse to torch: its gradients are the same."""

    def run(optimizer_class: Optimizer, sparse: bool) -> list[Tensor]:
        mine = optimizer_class is fastloss.SGD
        torch.manual_seed(0)
        embedding, head = nn.Embedding(11, 4, sparse=sparse).to(place.device), nn.Linear(4, 3).to(place.device)
        params = [*embedding.parameters(), *head.parameters()]
        lr = torch.tensor(0.05, device=place.device) if how == "tensor lr" else 0.05
        options = {"max_norm": 0.1} if "clipped" in how and mine else {}
        optimizer = optimizer_class(params, lr=lr, momentum=momentum, nesterov=momentum > 0, **options)
        scaler = torch.amp.GradScaler(place.device.type, init_scale=16.0, enabled="scaled" in how)
        for number in range(5):
            words = torch.tensor([number, 3, 3, 5], device=place.device)
            optimizer.zero_grad()
            scaler.scale(head(embedding(words)).square().mean()).backward()
            assert embedding.weight.grad.is_sparse == sparse
            if number == 2 and "scaled" in how:
                head.bias.grad[0] = float("inf")
            if "clipped" in how and not mine:
                scaler.unscale_(optimizer)
                clip_grad_norm_(params, 0.1)
            scaler.step(optimizer)
            scaler.update()
        return params

    close(run(fastloss.SGD, True), run(torch.optim.SGD, False))


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("options", [{}, OPTIONS[1], OPTIONS[2]], ids=str)
def test_complex_parameters(place: Place, options: dict[str, Any], max_norm: float | None) -> None:
    """Beside real ones; conjugated gradients too, which are views to be resolved."""

    def run(optimizer_class: Optimizer) -> list[Tensor]:
        mine = optimizer_class is fastloss.SGD
        torch.manual_seed(0)
        params = [
            nn.Parameter(torch.randn(3, 4, dtype=torch.complex64, device=place.device)),
            nn.Parameter(torch.randn(4, dtype=torch.complex128, device=place.device)),
            nn.Parameter(torch.randn(5, device=place.device)),
        ]
        more = {"max_norm": max_norm} if mine else {}
        optimizer = optimizer_class(params, lr=0.1, **options, **more)
        for _ in range(4):
            for param in params:
                param.grad = torch.randn_like(param).conj()
            if max_norm is not None and not mine:
                for param in params:
                    param.grad = param.grad.resolve_conj()  # which torch's clipping asks for
                clip_grad_norm_(params, max_norm)
            optimizer.step()
        return params

    each(place, run)


class Tagged(Tensor):
    """A tensor of one's own, which changes nothing."""


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("kind", ["tagged", "two"])
def test_tensor_subclasses(place: Place, kind: str, max_norm: float | None) -> None:
    """One that is a tensor as any other, and one that holds two tensors, each of which is to be stepped."""
    two = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor

    def wrapped(tensor: Tensor) -> Tensor:
        made: Tensor = tensor.as_subclass(Tagged) if kind == "tagged" else two(tensor, tensor.clone())
        return made

    def run(optimizer_class: Optimizer) -> list[Tensor]:
        mine = optimizer_class is fastloss.SGD
        torch.manual_seed(0)
        params = [
            nn.Parameter(wrapped(torch.randn(4, 3, device=place.device))),
            nn.Parameter(torch.randn(5, device=place.device)),
        ]
        more = {"max_norm": max_norm} if mine else {}
        optimizer = optimizer_class(params, lr=0.1, momentum=0.9, weight_decay=0.1, **more)
        for _ in range(3):
            params[0].grad = wrapped(torch.randn(4, 3, device=place.device))
            params[1].grad = torch.randn(5, device=place.device)
            if max_norm is not None and not mine:
                plain = [nn.Parameter(torch.zeros(p.shape, device=place.device)) for p in params]
                for one, param in zip(plain, params, strict=True):
                    one.grad = getattr(param.grad, "a", param.grad).as_subclass(Tensor).clone()
                factor = (max_norm / (clip_grad_norm_(plain, 1e9) + 1e-6)).clamp(max=1)
                for param in params:
                    param.grad = param.grad * float(factor)
            optimizer.step()
        first = params[0].detach()
        return [*([first.a, first.b] if kind == "two" else [first.as_subclass(Tensor)]), params[1].detach()]

    each(place, run)


@pytest.mark.parametrize("max_norm", [None, 0.01])
def test_optimizer_in_backward(place: Place, max_norm: float | None) -> None:
    """One optimizer a parameter, which steps as soon as the gradient is there and gives it up."""

    def run(optimizer_class: Optimizer) -> list[Tensor]:
        mine = optimizer_class is fastloss.SGD
        model = network(place)
        more = {"max_norm": max_norm} if mine else {}
        optimizers = {p: optimizer_class([p], lr=0.1, momentum=0.9, **more) for p in model.parameters()}

        def hook(param: Tensor) -> None:
            if max_norm is not None and not mine:
                clip_grad_norm_([param], max_norm)
            optimizers[param].step()
            optimizers[param].zero_grad()

        for param in model.parameters():
            param.register_post_accumulate_grad_hook(hook)
        for number in range(4):
            input, target = batch(place, number)
            F.mse_loss(model(input), target).backward()
            assert all(p.grad is None for p in model.parameters())
        return list(model.parameters())

    each(place, run)


@pytest.mark.parametrize("to", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_module_changes_its_dtype(place: Place, to: torch.dtype, swapped: bool) -> None:
    """Between steps, there and back, without momentum, whose buffers torch leaves as they were."""

    def run(optimizer_class: Optimizer) -> list[Tensor]:
        model = network(place)
        optimizer = optimizer_class(model.parameters(), lr=0.1)
        for number in range(8):
            dtype = to if number % 4 >= 2 else torch.float32
            before = torch.__future__.get_swap_module_params_on_conversion()
            torch.__future__.set_swap_module_params_on_conversion(swapped)
            try:
                optimizer.zero_grad()
                model.to(dtype)
            finally:
                torch.__future__.set_swap_module_params_on_conversion(before)
            input, target = batch(place, number, dtype)
            F.mse_loss(model(input), target).backward()
            optimizer.step()
            assert all(p.dtype == dtype for p in model.parameters())
        return list(model.parameters())

    each(place, run, **({} if to == torch.float64 else {"rtol": 1e-3, "atol": 2e-3}))


def test_a_module_changes_its_dtype_under_a_momentum(place: Place) -> None:
    """The momentum goes on from what it was: against float64 all the way."""

    def run(optimizer_class: Optimizer, dtypes: list[torch.dtype]) -> list[Tensor]:
        model = network(place)
        optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9)
        for number, dtype in enumerate(dtypes):
            optimizer.zero_grad()
            model.to(dtype)
            input, target = batch(place, number, dtype)
            F.mse_loss(model(input), target).backward()
            optimizer.step()
        return [p.double() for p in model.parameters()]

    changing = [torch.float32, torch.float64, torch.float64, torch.float32, torch.float32]
    close(run(fastloss.SGD, changing), run(torch.optim.SGD, [torch.float64] * 5), rtol=1e-5, atol=1e-6)


def test_the_16_bit_options_follow_a_change_of_dtype(place: Place) -> None:
    """Master weights are kept from where the parameter has 16 bits; the address of the old one may be taken again."""
    param = nn.Parameter(torch.ones(64, device=place.device))
    optimizer = fastloss.SGD([param], lr=2.0**-12, master_weights=True)
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        param.grad = None
        memory = param.data
        # As an allocator may do: the new numbers lie where the old ones lay.
        param.data = _in_place_of(memory, dtype)
        param.grad = -torch.ones_like(param)
        optimizer.step()
    assert "master_param" in optimizer.state[param]
    torch.testing.assert_close(
        optimizer.state[param]["master_param"], torch.full((64,), 1 + 2.0**-11, device=place.device)
    )


def _in_place_of(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype of no more bytes, in its own memory."""
    numbers = tensor.to(dtype, copy=True)
    there = torch.empty(0, dtype=dtype, device=tensor.device).set_(tensor.untyped_storage(), 0, tensor.shape)
    return there.copy_(numbers)


def test_a_parameter_is_cut_short(place: Place) -> None:
    """Pruning by ``.data``: what lies beyond the new end is not touched, and no gradient is read there."""

    def run(optimizer_class: Optimizer) -> list[Tensor]:
        torch.manual_seed(0)
        whole = torch.randn(12, device=place.device)
        param = nn.Parameter(whole)
        optimizer = optimizer_class([param], lr=0.1)
        for length in (12, 7, 7, 3):
            param.grad = None
            param.data = param.data[:length]
            param.grad = torch.randn(length, device=place.device)
            optimizer.step()
        return [param.detach(), whole.detach()]

    each(place, run)


@pytest.mark.parametrize("size", [6, 300])
def test_a_parameter_is_turned(place: Place, size: int) -> None:
    """Transposed by ``.data``, where it lies; small and beyond what is gathered on a CPU."""
    if place.interpreted and size > 6:
        size = 70

    def run(optimizer_class: Optimizer) -> list[Tensor]:
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(size, size, device=place.device))
        optimizer = optimizer_class([param], lr=0.1)
        for number in range(3):
            param.grad = None
            if number:
                param.data = param.data.t()
            param.grad = torch.randn(size, size, device=place.device)
            optimizer.step()
        return [param.detach()]

    each(place, run)


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_several_dtypes_in_one_optimizer(place: Place, max_norm: float | None) -> None:
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float16]
    if not place.interpreted:
        dtypes.append(torch.bfloat16)

    def run(optimizer_class: Optimizer, exact: bool) -> list[Tensor]:
        mine = optimizer_class is fastloss.SGD
        torch.manual_seed(0)
        shapes = [(7,), (3, 5), (4, 2), (33,), (2, 3, 4)][: len(dtypes)]
        params = [
            nn.Parameter(torch.randn(s, device=place.device).to(d)) for s, d in zip(shapes, dtypes, strict=True)
        ]
        params = [nn.Parameter(p.detach().double()) for p in params] if exact else params
        more = {"max_norm": max_norm, "momentum_dtype": torch.float64} if mine else {}
        optimizer = optimizer_class(params, lr=0.1, momentum=0.9, weight_decay=0.1, **more)
        for _ in range(4):
            for param, dtype in zip(params, dtypes, strict=True):
                param.grad = torch.randn(param.shape, device=place.device).to(dtype).to(param.dtype)
            if max_norm is not None and not mine:
                clip_grad_norm_(params, max_norm)
            optimizer.step()
        return params

    for mine, right in zip(run(fastloss.SGD, False), run(torch.optim.SGD, True), strict=True):
        # The norm of float32 gradients has float32's precision, and clips float64's too.
        error = 3 * max(torch.finfo(mine.dtype).eps, 0 if max_norm is None else torch.finfo(torch.float32).eps)
        torch.testing.assert_close(mine.double(), right, rtol=error, atol=error)


# ----------------------------------------------------------------------------- through the step


def inner_loop(optimizer_class: Optimizer, start: Tensor, steps: int = 3, **options: Any) -> Tensor:
    """Some steps on a loss that is not quadratic, whose gradients are part of the graph."""
    param = start.clone()
    max_norm = options.pop("max_norm", None) if optimizer_class is torch.optim.SGD else None
    optimizer = optimizer_class([param], differentiable=True, **options)
    for number in range(steps):
        here = param.clone()  # the step writes over the parameter, and the graph needs what it was
        loss = (here.sin() * torch.arange(1, 1 + len(here))).sum() + (here**4).sum() / (1 + number)
        (grad,) = torch.autograd.grad(loss, param, create_graph=True)
        if max_norm is not None:
            grad = grad * (max_norm / (grad.norm() + 1e-6)).clamp(max=1)
        param.grad = grad
        optimizer.step()
    return param


THROUGH: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3, "maximize": True},
    {"momentum": 0.9, "max_norm": 0.7},
    {"weight_decay": 0.2, "decoupled_weight_decay": True},
]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("options", THROUGH, ids=str)
def test_derivative_through_the_steps(options: dict[str, Any]) -> None:
    """With respect to the rate and to where the parameter began: finite differences, and torch's own."""
    start = torch.randn(4, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)

    def outer(optimizer_class: Optimizer, start: Tensor, lr: Tensor) -> Tensor:
        return inner_loop(optimizer_class, start, lr=lr, **options)

    assert torch.autograd.gradcheck(lambda *inputs: outer(fastloss.SGD, *inputs), (start, lr))
    if "decoupled_weight_decay" not in options:
        runs = [outer(optimizer_class, start, lr) for optimizer_class in BOTH]
        torch.testing.assert_close(*runs)
        if "momentum" not in options:  # torch's own derivative stops at the buffers, or fails there
            torch.testing.assert_close(*(torch.autograd.grad(run.sum(), (start, lr)) for run in runs))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_derivative_by_momentum_and_weight_decay() -> None:
    start = torch.randn(4, dtype=torch.float64, requires_grad=True)
    numbers = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.05, 0.8, 0.1)]
    for more in ({}, {"nesterov": True}, {"decoupled_weight_decay": True}, {"max_norm": 0.7}):

        def outer(start: Tensor, lr: Tensor, momentum: Tensor, decay: Tensor, more: Any = more) -> Tensor:
            return inner_loop(fastloss.SGD, start, lr=lr, momentum=momentum, weight_decay=decay, **more)

        assert torch.autograd.gradcheck(outer, (start, *numbers))


def test_differentiable_with_leaves(place: Place) -> None:
    """A step under no_grad's opposite needs parameters that are no leaves, and says so as torch does."""
    for optimizer_class in BOTH:
        param = nn.Parameter(torch.ones(3, device=place.device))
        param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            optimizer_class([param], lr=0.1, differentiable=True).step()


def test_copied_and_pickled_amid_training(place: Place) -> None:
    """A deep copy of model and optimizer together goes on alone, and leaves the first as it is."""

    def steps(model: nn.Module, optimizer: Any, numbers: range) -> None:
        for number in numbers:
            input, target = batch(place, number)
            optimizer.zero_grad()
            F.mse_loss(model(input), target).backward()
            optimizer.step()

    def run(optimizer_class: Optimizer) -> list[Tensor]:
        model = network(place)
        optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9)
        steps(model, optimizer, range(2))
        other, of_other = copy.deepcopy((model, optimizer))
        steps(other, of_other, range(2, 5))
        steps(model, optimizer, range(5, 7))
        return [*model.parameters(), *other.parameters()]

    each(place, run)
