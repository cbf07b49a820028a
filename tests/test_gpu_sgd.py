"""What only a GPU can show of ``fastloss.SGD``: its launches, captured graphs, the host that does not wait, sizes.

``test_gpu.py`` has the same of the losses. All is skipped where there is no GPU.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor, nn

import fastloss

pytestmark = pytest.mark.gpu

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Beside each other: shorter than a program's block, than its chunk, than two of them, and no multiple of anything.
SIZES = [1, 3, 17, 1023, 1024, 1025, 4095, 4096, 4097, 12345, 70001]
ROUNDINGS = ["nearest", "master_weights", "kahan_sum", "stochastic_rounding"]


def rounding_option(rounding: str) -> dict[str, bool]:
    return {} if rounding == "nearest" else {rounding: True}


def network(place: Place) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 129), nn.GELU(), nn.Linear(129, 11)).to(place.device)


class Exact:
    """The step in float64, written apart from the package."""

    def __init__(self, params: list[Tensor], *, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.params = [param.detach().double().clone() for param in params]
        self.buffers: list[Tensor | None] = [None] * len(params)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay

    def step(self, grads: list[Tensor], max_norm: float | None = None) -> None:
        wide = [grad.double() for grad in grads]
        factor = 1.0
        if max_norm is not None:
            norm = sum(float(grad.square().sum()) for grad in wide) ** 0.5
            factor = min(1.0, max_norm / (norm + 1e-6))
        for i, (param, grad) in enumerate(zip(self.params, wide, strict=True)):
            grad = grad * factor + self.weight_decay * param
            if self.momentum:
                buffer = self.buffers[i]
                grad = grad if buffer is None else self.momentum * buffer + grad
                self.buffers[i] = grad
            param -= self.lr * grad


# ----------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_rounding_against_float64(
    kernels: Place, dtype: torch.dtype, momentum_dtype: torch.dtype | None, rounding: str
) -> None:
    """Ten steps of tensors of all sizes. What is stored is off by its dtype's rounding, once (with master weights or
    Kahan's compensation), or once a step; and by that of the momentum.
    """
    steps, lr, eps = 10, 0.01, torch.finfo(dtype).eps
    params = [nn.Parameter((1 + torch.rand(size, device=kernels.device)).to(dtype)) for size in SIZES]
    first = [param.detach().clone() for param in params]
    options: dict[str, Any] = {"lr": lr, "momentum": 0.9, "weight_decay": 0.01}
    optimizer = fastloss.SGD(params, momentum_dtype=momentum_dtype, **options, **rounding_option(rounding))
    exact = Exact(params, **options)
    for _ in range(steps):
        grads = [torch.randn_like(param) for param in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        exact.step(grads)
    # A momentum that is rounded is off by eps/2 of itself (at most about 6) a step, and that error is stepped too.
    of_momentum = 0.0 if momentum_dtype is torch.float32 else steps * lr * 10 * 6 * eps
    for param, start, right in zip(params, first, exact.params, strict=True):
        state = optimizer.state[param]
        assert state["momentum_buffer"].dtype == (momentum_dtype or dtype)
        error = (param.double() - right).abs().max().item()
        assert not torch.equal(param, start) or param.numel() < 8
        size = float(right.abs().max())
        if rounding == "master_weights":
            assert (state["master_param"].double() - right).abs().max().item() <= 1e-5 + of_momentum
            assert torch.equal(param, state["master_param"].to(dtype))
        elif rounding == "kahan_sum":
            whole = param.double() + state["kahan_comp"].double()
            assert (whole - right).abs().max().item() <= steps * size * eps**2 + 1e-5 + of_momentum
            assert error <= size * eps + 1e-5 + of_momentum
        else:
            assert (
                error <= steps * size * eps * (1 if rounding == "stochastic_rounding" else 0.5) + 1e-5 + of_momentum
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum_dtype", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_wide_parameters_against_float64(
    kernels: Place, dtype: torch.dtype, momentum_dtype: torch.dtype | None, max_norm: float | None
) -> None:
    params = [nn.Parameter(torch.randn(size, device=kernels.device, dtype=dtype)) for size in SIZES]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizer = fastloss.SGD(params, momentum_dtype=momentum_dtype, max_norm=max_norm, **options)
    exact = Exact(params, **options)
    for _ in range(4):
        grads = [torch.randn_like(param) for param in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        exact.step(grads, max_norm)
    assert {optimizer.state[param]["momentum_buffer"].dtype for param in params} == {momentum_dtype or dtype}
    tolerance = 0.2 if momentum_dtype == torch.bfloat16 else 1e-12 if dtype == torch.float64 else 2e-5
    for param, right in zip(params, exact.params, strict=True):
        torch.testing.assert_close(param.double(), right, rtol=0, atol=tolerance)


def test_stochastic_rounding_is_right_on_average(kernels: Place) -> None:
    """A step of a quarter of the distance to the neighbour goes there one time in four, and otherwise each step."""
    param = nn.Parameter(torch.ones(1 << 20, dtype=torch.bfloat16, device=kernels.device))
    optimizer = fastloss.SGD([param], lr=2.0**-9, stochastic_rounding=True)
    ups = []
    for _ in range(2):
        with torch.no_grad():
            param.fill_(1)
        param.grad = -torch.ones_like(param)
        optimizer.step()
        ups.append(param > 1)
        assert set(param.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
        assert ups[-1].float().mean().item() == pytest.approx(0.25, abs=0.005)
    both = (ups[0] & ups[1]).float().mean().item()
    assert both == pytest.approx(1 / 16, abs=0.005)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_layouts_sizes_and_offsets(kernels: Place, dtype: torch.dtype, max_norm: float | None) -> None:
    """Parameters and gradients in layouts of their own, and at addresses that are no multiples of 16."""
    device = kernels.device

    def at_an_offset(*shape: int) -> Tensor:
        numel = torch.Size(shape).numel()
        return torch.randn(numel + 1, device=device).to(dtype)[1:].view(shape)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    pairs = [
        (randn(33, 65), randn(65, 33).t()),
        (randn(65, 33).t(), randn(33, 65)),
        (randn(8, 5, 9, 7).to(memory_format=torch.channels_last), randn(8, 5, 9, 7)),
        (randn(8, 5, 9, 7), randn(8, 5, 9, 7).to(memory_format=torch.channels_last)),
        (randn(41), randn(1).expand(41)),
        (randn(19, 23), randn(1, 23).expand(19, 23)),
        (randn(50, 60)[::2, 5:55], randn(25, 50)),
        (randn(25, 50), randn(50, 60)[::2, 5:55]),
        (at_an_offset(4097), at_an_offset(4097)),
        (at_an_offset(4100), randn(4100)),
        (randn(4100), at_an_offset(4100)),
        (randn(3, 5, 7, 2, 4).permute(4, 1, 3, 0, 2), randn(4, 5, 2, 3, 7)),
        (randn(), randn()),
        (randn(0, 4), randn(0, 4)),
    ]
    params = [nn.Parameter(param) for param, _ in pairs]
    optimizer = fastloss.SGD(params, lr=0.1, momentum=0.5, max_norm=max_norm)
    exact = Exact(params, lr=0.1, momentum=0.5)
    for _ in range(3):
        for param, (_, grad) in zip(params, pairs, strict=True):
            param.grad = grad
        optimizer.step()
        exact.step([grad for _, grad in pairs], max_norm)
    eps = torch.finfo(dtype).eps
    for param, right in zip(params, exact.params, strict=True):
        assert param.untyped_storage().nbytes() >= param.numel() * param.element_size()
        torch.testing.assert_close(param.double(), right, rtol=6 * eps, atol=max(6 * eps, 1e-12))


def test_gradients_change_their_layout_and_memory(kernels: Place) -> None:
    """From step to step, and back."""
    params = [nn.Parameter(torch.randn(70, 90, device=kernels.device)) for _ in range(3)]
    optimizer = fastloss.SGD(params, lr=0.1, momentum=0.9)
    exact = Exact(params, lr=0.1, momentum=0.9)
    for number in range(6):
        for param in params:
            param.grad = (
                torch.randn(90, 70, device=kernels.device).t() if number % 3 == 1 else torch.randn_like(param)
            )
        optimizer.step()
        exact.step([param.grad for param in params if param.grad is not None])
    for param, right in zip(params, exact.params, strict=True):
        torch.testing.assert_close(param.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rounding", ["nearest", "master_weights", "kahan_sum"])
def test_more_than_2_31_elements(kernels: Place, rounding: str) -> None:
    """The first and the last ones, and those around element 2³¹."""
    numel = (1 << 31) + 12_345
    bytes_each = {"nearest": 4, "master_weights": 8, "kahan_sum": 6}[rounding] + 2  # and the momentum
    free, _ = torch.cuda.mem_get_info(kernels.device)
    if free < bytes_each * numel + 6 * 10**9:
        pytest.skip(f"needs {bytes_each * numel / 10**9 + 6:.0f} GB of free GPU memory")
    torch.cuda.empty_cache()
    param = nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device=kernels.device))
    param.grad = torch.full_like(param, 2.0)
    some = torch.tensor([0, 1, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, numel - 2, numel - 1], device=kernels.device)
    param.grad[some] = torch.arange(1.0, 8.0, device=kernels.device).bfloat16()
    optimizer = fastloss.SGD([param], lr=0.125, momentum=0.5, **rounding_option(rounding))
    optimizer.step()
    optimizer.step()
    right = 1 - 0.125 * 2.5 * torch.arange(1.0, 8.0, device=kernels.device)
    torch.testing.assert_close(param.detach()[some].float(), right, rtol=0.01, atol=0.01)
    for part in param.detach().split(1 << 28):
        beyond = (part != 1 - 0.125 * 2.5 * 2).sum()
        assert int(beyond) <= len(some)


# ----------------------------------------------------------------------------- graphs


def warmed_up(step: Callable[[], Any], times: int = 3) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"momentum": 0.9, "max_norm": 0.5},
        {"momentum": 0.9, "momentum_dtype": torch.float64},
    ],
    ids=str,
)
def test_graph_of_a_training_step(kernels: Place, options: dict[str, Any], to_none: bool) -> None:
    """Forward, backward and step are captured once; replays follow the learning rate that is filled in between, and
    train as steps without a graph do.
    """
    input, target = torch.randn(32, 64, device=kernels.device), torch.randint(11, (32,), device=kernels.device)

    def prepared() -> tuple[nn.Module, Any, Tensor, Callable[[], None]]:
        model = network(kernels)
        lr = torch.tensor(0.1, device=kernels.device)
        optimizer = fastloss.SGD(model.parameters(), lr=lr, **options)

        def step() -> None:
            optimizer.zero_grad(set_to_none=to_none)
            F.cross_entropy(model(input), target).backward()
            optimizer.step()

        return model, optimizer, lr, step

    def reset(model: nn.Module, optimizer: Any) -> None:
        with torch.no_grad():
            for param, start in zip(model.parameters(), network(kernels).parameters(), strict=True):
                param.copy_(start)
            for state in optimizer.state.values():
                for buffer in state.values():
                    buffer.zero_()

    graphed, its_optimizer, lr, step = prepared()
    warmed_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    reset(graphed, its_optimizer)
    plain, optimizer, other_lr, plain_step = prepared()
    warmed_up(plain_step, 1)
    reset(plain, optimizer)
    for number in range(8):
        input.normal_()
        target.random_(11)
        lr.fill_(0.2 / (1 + number))
        other_lr.fill_(0.2 / (1 + number))
        graph.replay()
        plain_step()
        if options.get("max_norm") is not None:
            torch.testing.assert_close(its_optimizer.grad_norm, optimizer.grad_norm)
    for mine, right in zip(graphed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, right)
    assert any(
        not torch.equal(a, b) for a, b in zip(graphed.parameters(), network(kernels).parameters(), strict=True)
    )


def test_two_graphs_and_steps_between(kernels: Place) -> None:
    """Gradients of each graph lie in memory of its own; a step outside does not change what the graphs read."""
    param = nn.Parameter(torch.zeros(5000, device=kernels.device))
    optimizer = fastloss.SGD([param], lr=1.0, momentum=0.0)
    param.grad = torch.zeros_like(param)
    warmed_up(optimizer.step)
    graphs, grads = [], []
    for value in (1.0, 10.0):
        grads.append(torch.full_like(param, value))
        param.grad = grads[-1]
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            optimizer.step()
    expected = 0.0
    for number in range(4):
        for graph, value in zip(graphs, (1.0, 10.0), strict=True):
            graph.replay()
            expected -= value
        param.grad = torch.full_like(param, 100.0 + number)
        optimizer.step()
        expected -= 100.0 + number
    assert torch.equal(param.detach(), torch.full_like(param, expected))


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"master_weights": True}, {"kahan_sum": True}], ids=str)
def test_a_first_step_is_not_captured(kernels: Place, options: dict[str, Any]) -> None:
    """Its buffers would be made by every replay; the error says what to do, and leaves an optimizer that works."""
    param = nn.Parameter(torch.ones(100, dtype=torch.bfloat16, device=kernels.device))
    param.grad = torch.ones_like(param)
    optimizer = fastloss.SGD([param], lr=0.5, **options)
    with pytest.raises(RuntimeError, match="take a step with the same parameters before capturing"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
    torch.cuda.synchronize()
    optimizer.step()
    assert torch.equal(param.detach(), torch.full_like(param, 0.5))


@pytest.mark.parametrize("overflows", [False, True])
def test_graph_under_a_scaler(kernels: Place, overflows: bool) -> None:
    """Scale and finding are read where they lie, by each replay."""
    param = nn.Parameter(torch.zeros(5000, device=kernels.device))
    grad = param.grad = torch.ones_like(param)
    optimizer = fastloss.SGD([param], lr=1.0, momentum=0.9)
    scale, found_inf = (torch.ones((), device=kernels.device) for _ in range(2))
    optimizer.grad_scale, optimizer.found_inf = scale, found_inf  # type: ignore[attr-defined]
    warmed_up(optimizer.step)  # all called off
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    grad.fill_(8.0)
    scale.fill_(4.0)
    found_inf.fill_(float(overflows))
    graph.replay()
    expected = 0.0 if overflows else -2.0
    assert torch.equal(param.detach(), torch.full_like(param, expected))
    assert torch.equal(grad, torch.full_like(param, 8.0 if overflows else 2.0))


@pytest.mark.parametrize("between", ["new gradients", "the same gradients"])
def test_a_step_between_capture_and_replay(kernels: Place, between: str) -> None:
    """What was uploaded inside the graph is not on the device before its first replay, and stays as it was after a
    step that moves the tables."""
    param = nn.Parameter(torch.zeros(5000, device=kernels.device))
    optimizer = fastloss.SGD([param], lr=1.0)
    static = param.grad = torch.ones_like(param)
    optimizer.step()
    moved = param.grad = torch.full_like(param, 2.0)  # the tables of the capture differ from those on the device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    if between == "new gradients":
        param.grad = torch.full_like(param, 4.0)
    optimizer.step()
    graph.replay()
    param.grad = static
    optimizer.step()
    graph.replay()
    assert torch.equal(moved, torch.full_like(param, 2.0))
    expected = -1.0 - (4.0 if between == "new gradients" else 2.0) - 2.0 - 1.0 - 2.0
    assert torch.equal(param.detach(), torch.full_like(param, expected))


def test_state_dict_between_capture_and_replay(kernels: Place) -> None:
    """Reading the state settles which momentum buffers have begun; the graph keeps the flags that it knows."""
    param = nn.Parameter(torch.zeros(5000, device=kernels.device))
    param.grad = torch.ones_like(param)
    optimizer = fastloss.SGD([param], lr=1.0, momentum=0.5, dampening=0.5)
    scale, found_inf = (torch.ones((), device=kernels.device) for _ in range(2))
    optimizer.grad_scale, optimizer.found_inf = scale, found_inf  # type: ignore[attr-defined]
    found_inf.zero_()
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    momentum = torch.ones(())
    expected = -momentum
    for _ in range(3):
        assert torch.equal(optimizer.state_dict()["state"][0]["momentum_buffer"].cpu(), momentum.expand(5000))
        graph.replay()
        momentum = 0.5 * momentum + 0.5
        expected = expected - momentum
    torch.testing.assert_close(param.detach().cpu(), expected.expand(5000))


# ----------------------------------------------------------------------------- the host does not wait


@pytest.fixture
def no_host_sync() -> Iterator[Callable[[], None]]:
    """Called: from here on, whatever makes the host wait for the GPU is an error."""
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "dampening": 0.1, "max_norm": 1.0},
        {"momentum": 0.9, "momentum_dtype": torch.float32, "master_weights": True},
        {"kahan_sum": True},
        {"stochastic_rounding": True},
    ],
    ids=str,
)
def test_the_host_does_not_wait(
    kernels: Place, options: dict[str, Any], groups: int, tensor_lr: bool, no_host_sync: Callable[[], None]
) -> None:
    """Not with a scale and a finding on the device, a rate there, a norm to clip to; nor where gradients are new
    tensors in each step.
    """
    lr = torch.tensor(0.1, device=kernels.device) if tensor_lr else 0.1
    params = [
        nn.Parameter(torch.randn(size, device=kernels.device).to(dtype))
        for size, dtype in itertools.product((7, 5000), (torch.bfloat16, torch.float32, torch.float64))
    ]
    optimizer = fastloss.SGD([{"params": params[g::groups]} for g in range(groups)], lr=lr, **options)
    scale, found_inf = torch.tensor(4.0, device=kernels.device), torch.zeros((), device=kernels.device)

    def step(*, scaled: bool) -> None:
        for param in params:
            param.grad = torch.randn_like(param)
        if scaled:
            optimizer.grad_scale, optimizer.found_inf = scale, found_inf  # type: ignore[attr-defined]
        optimizer.step()
        if scaled:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]

    for scaled in (True, False):
        step(scaled=scaled)  # compiles
    torch.cuda.synchronize()
    no_host_sync()
    for scaled in (True, False, True):
        step(scaled=scaled)
        assert (optimizer.grad_norm is None) == ("max_norm" not in options)


# ----------------------------------------------------------------------------- launches


def launched(step: Callable[[], None]) -> list[str]:
    """The names of the kernels that a step launches; copies, memsets and the range of the step itself left out."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memcpy", "Memset", "Optimizer."))]


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_launch_for_2000_tensors(kernels: Place, dtype: torch.dtype, max_norm: float | None) -> None:
    """And one more for the norm; in several groups, in all sizes."""
    params = [nn.Parameter(torch.zeros(1 + 37 * (i % 301), dtype=dtype, device=kernels.device)) for i in range(2000)]
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [{"params": params[:700]}, {"params": params[700:], "weight_decay": 0.1}]
    optimizer = fastloss.SGD(groups, lr=1e-3, momentum=0.9, max_norm=max_norm)
    optimizer.step()  # makes the buffers
    names = launched(optimizer.step)
    assert sum("step_kernel" in name for name in names) == 1
    assert sum("squares_kernel" in name for name in names) == (max_norm is not None)
    others = [name for name in names if "step_kernel" not in name and "squares_kernel" not in name]
    assert len(others) <= (0 if max_norm is None else 2), others  # the sum that starts from zero


def test_new_numbers_compile_nothing_anew(kernels: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule changes the rate in each step, to 1 and 0 too; the number of tensors may change."""
    knobs = pytest.importorskip("triton").knobs
    compiled: list[str] = []

    def note(*, repr: str, **_: Any) -> None:
        compiled.append(repr)

    def step(number: int, **options: Any) -> None:
        params = [nn.Parameter(torch.zeros(5000, device=kernels.device)) for _ in range(number)]
        optimizer = fastloss.SGD(params, momentum=0.9, max_norm=options.pop("max_norm", 1.0), **options)
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", note)
    step(2, lr=0.1)
    compiled.clear()
    for number, lr, decay, max_norm in [
        (2, 1.0, 0.0, 1.0),
        (16, 0.0, 0.1, 0.5),
        (1, 1e-4, 1.0, 16.0),
        (17, 2.0, 0, 0),
    ]:
        step(number, lr=lr, weight_decay=decay, max_norm=max_norm)
        assert not compiled, f"{number} tensors, lr {lr}: {compiled}"


# ----------------------------------------------------------------------------- scalers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_overflow_at_the_first_steps(kernels: Place, dtype: torch.dtype, dampening: float) -> None:
    """The momentum begins without dampening at the first step that is taken: as torch's optimizer, which waits."""
    runs = []
    for optimizer_class in (fastloss.SGD, torch.optim.SGD):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.ones(size, device=kernels.device).to(dtype)) for size in (5, 9000)]
        optimizer = optimizer_class(params, lr=0.125, momentum=0.5, dampening=dampening)
        scaler = torch.amp.GradScaler("cuda", init_scale=16.0)
        for number in range(5):
            scale = scaler.scale(torch.ones((), device=kernels.device))
            for param in params:
                param.grad = torch.ones_like(param) * scale.to(dtype)
            overflows = number in (0, 1, 3)
            if overflows:
                params[1].grad[-1] = float("inf")  # type: ignore[index]
            if dtype == torch.float32:
                scaler.step(optimizer)
                scaler.update()
            else:  # which torch's scaler has no kernel to look at: as it does, by hand
                found_inf = torch.full((), float(overflows), device=kernels.device)
                if optimizer_class is fastloss.SGD:
                    optimizer.grad_scale, optimizer.found_inf = scale, found_inf
                    optimizer.step()
                elif not overflows:
                    for param in params:
                        param.grad /= scale  # type: ignore[operator]
                    optimizer.step()
                scaler.update(scale * (0.5 if overflows else 1.0))
            if number == 1:
                state = optimizer.state_dict()["state"]
                assert not any("momentum_buffer" in of_param for of_param in state.values())
        runs.append([*(p.detach() for p in params), *(optimizer.state[p]["momentum_buffer"] for p in params)])
        assert scaler.get_scale() == 2.0
    for mine, right in zip(*runs, strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("through", ["kernels", "eager", "operators"])
def test_bfloat16_gradients_are_unscaled(kernels: Place, through: str) -> None:
    """By a scale that is no power of two, rounded once; torch has no kernel for it."""
    params = [nn.Parameter(torch.randn(size, device=kernels.device).to(torch.bfloat16)) for size in (5, 9000)]
    if through == "operators":  # parameters that overlap
        params += [nn.Parameter(param.detach()[1:]) for param in params]
    before = [param.detach().clone() for param in params]
    optimizer = fastloss.SGD(params, lr=0.0)
    for param in params:
        param.grad = torch.randn_like(param)
    grads = [param.grad.float() for param in params]  # type: ignore[union-attr]
    optimizer.grad_scale = torch.tensor(3.0, device=kernels.device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.zeros((), device=kernels.device)  # type: ignore[attr-defined]
    with fastloss.use_backend("eager" if through == "eager" else "auto"):
        optimizer.step()
    inverse = torch.tensor(3.0, dtype=torch.float64).reciprocal().float().to(kernels.device)
    for param, start, grad in zip(params, before, grads, strict=True):
        assert torch.equal(param.detach(), start)
        assert param.grad is not None
        assert torch.equal(param.grad, (grad * inverse).to(torch.bfloat16))


@pytest.mark.parametrize("unscaled_before", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.2])
def test_training_in_float16(kernels: Place, unscaled_before: bool, max_norm: float | None) -> None:
    """Autocast, a scale that overflows at first and grows: scales and weights are those of torch's optimizer."""
    runs = []
    for optimizer_class in (fastloss.SGD, torch.optim.SGD):
        mine = optimizer_class is fastloss.SGD
        model = network(kernels)
        options: dict[str, Any] = {"max_norm": max_norm} if mine else {}
        optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9, **options)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24, growth_interval=2)
        scales = []
        torch.manual_seed(2)
        for _ in range(16):
            input, target = (
                torch.randn(32, 64, device=kernels.device),
                torch.randint(11, (32,), device=kernels.device),
            )
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                loss = F.cross_entropy(model(input), target)
            scaler.scale(loss).backward()
            if unscaled_before or (max_norm is not None and not mine):
                scaler.unscale_(optimizer)
            if max_norm is not None and not mine:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        runs.append((scales, [p.detach() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert min(runs[0][0]) < 2.0**24
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------- memory and devices


def test_state_goes_to_the_cpu_and_back(kernels: Place) -> None:
    """By ``.data``, as offloading does: the memory may have gone to others in between."""
    models = [network(kernels) for _ in range(2)]
    optimizers = [fastloss.SGD(model.parameters(), lr=0.1, momentum=0.9, max_norm=1.0) for model in models]
    for number in range(6):
        input, target = torch.randn(32, 64, device=kernels.device), torch.randint(11, (32,), device=kernels.device)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(input), target).backward()
            optimizer.step()
        if number % 2:
            tensors = [state["momentum_buffer"] for state in optimizers[0].state.values()]
            tensors += list(models[0].parameters()) if number == 3 else []
            for tensor in tensors:
                tensor.data = tensor.data.cpu()
            taken = torch.full((1 << 20,), float("nan"), device=kernels.device)
            for tensor in tensors:
                tensor.data = tensor.data.to(kernels.device)
            del taken
    for mine, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, right)


def test_memory_is_the_state_and_small_tables(kernels: Place) -> None:
    """A step takes no copy of anything."""
    params = [nn.Parameter(torch.zeros(1 << 20, device=kernels.device)) for _ in range(16)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = fastloss.SGD(params, lr=0.1, momentum=0.9, max_norm=1.0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(kernels.device)
    optimizer.step()
    assert torch.cuda.memory_allocated(kernels.device) - before <= 16 * (1 << 22) + (1 << 20)
    torch.cuda.reset_peak_memory_stats(kernels.device)
    before = torch.cuda.memory_allocated(kernels.device)
    optimizer.step()
    assert torch.cuda.max_memory_allocated(kernels.device) - before <= 1 << 20


@pytest.mark.parametrize("then", ["new plan", "new tables"])
@pytest.mark.parametrize("max_norm", [None, 1e9])
def test_tables_live_until_another_stream_has_read_them(kernels: Place, max_norm: float | None, then: str) -> None:
    """They were made on one stream, and are given up while a step on another one has still to read them."""
    param = nn.Parameter(torch.zeros(5000, device=kernels.device))
    gradient = param.grad = torch.ones_like(param)  # lives as long as this name
    optimizer = fastloss.SGD([param], lr=1.0, momentum=0.5, dampening=0.5, max_norm=max_norm)
    optimizer.grad_scale = torch.ones((), device=kernels.device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.zeros((), device=kernels.device)  # type: ignore[attr-defined]
    optimizer.step()  # compiles, and makes the tables on this stream
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(1 << 29)  # a quarter of a second
        optimizer.step()
        if then == "new plan":
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, device=kernels.device))]})
        else:
            param.grad = gradient.clone()
        optimizer.step()
    # What of it the allocator has back, is written over here; tables of zeros tell of tensors without elements.
    taken = [torch.zeros(16, dtype=torch.int64, device=kernels.device) for _ in range(200)]
    torch.cuda.synchronize()
    del taken, gradient
    torch.testing.assert_close(param.detach(), torch.full_like(param, -1.0 - 1.0 - 1.0))


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("scaled", [False, True])
def test_parameters_on_two_gpus(kernels: Place, max_norm: float | None, scaled: bool) -> None:
    """Each stepped where it lies, whichever device is current; one norm over both; an overflow on one stops both."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    torch.manual_seed(0)
    values = [torch.randn(size) for size in (9, 5000, 4096, 77)]
    params = [nn.Parameter(v.to(device)) for v, device in zip(values, itertools.cycle(devices))]
    exact = Exact(values, lr=0.1, momentum=0.9)
    optimizer = fastloss.SGD(params, lr=0.1, momentum=0.9, max_norm=max_norm)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0, enabled=scaled)
    for number in range(5):
        scaler.scale(torch.ones((), device=devices[0]))
        scale = scaler.get_scale()
        grads = [torch.randn(v.shape) for v in values]
        for param, grad in zip(params, grads, strict=True):
            param.grad = (grad * scale).to(param.device)
        overflows = scaled and number in (0, 2)
        if overflows:
            params[number // 2].grad[0] = float("inf")  # type: ignore[index]
        with torch.cuda.device(devices[number % 2]):
            scaler.step(optimizer)
        scaler.update()
        if not overflows:
            exact.step(grads, max_norm)
    for param, right in zip(params, exact.params, strict=True):
        torch.testing.assert_close(param.detach().cpu().double(), right, rtol=1e-5, atol=1e-5)


def test_the_second_of_two_gpus(kernels: Place) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = network(kernels).to("cuda:1")
    twin = copy.deepcopy(model)
    optimizer = fastloss.SGD(model.parameters(), lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    with torch.cuda.device(0):
        before = torch.cuda.memory_allocated(0)
        for _ in range(3):
            for param, other in zip(model.parameters(), twin.parameters(), strict=True):
                param.grad = torch.randn_like(param)
                other.grad = param.grad.clone()
            optimizer.step()
            theirs.step()
        assert torch.cuda.memory_allocated(0) == before
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, other)
