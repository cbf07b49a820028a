"""SGD on 16-bit parameters: what rounding loses, and what each option keeps.

On a GPU and by the eager backend the parameters are bfloat16; Triton's interpreter rounds that by its own rules, and
gets float16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from drawing import drawn
from places import Place
from torch import Tensor

import fastloss
from fastloss.backends.eager.rounding import compensated, round_stochastically, round_to_nearest, true_master

KEEPING = {
    "master": {"master_weights": True},
    "kahan": {"kahan_sum": True},
    "stochastic": {"stochastic_rounding": True},
}
keeping = pytest.mark.parametrize("options", KEEPING.values(), ids=KEEPING.keys())


def short(place: Place) -> torch.dtype:
    return torch.float16 if place.interpreted else torch.bfloat16


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def descend(params: list[Tensor], steps: int, **options: Any) -> tuple[list[Tensor], fastloss.SGD]:
    """Minimise ½ Σ (θ − 2)² from ``params``; the gradients are the θ − 2 of the parameters, in their dtype."""
    leaves = [torch.nn.Parameter(param.clone()) for param in params]
    optimizer = fastloss.SGD(leaves, **options)
    for _ in range(steps):
        for leaf in leaves:
            leaf.grad = leaf.detach() - 2
        optimizer.step()
    return [leaf.detach() for leaf in leaves], optimizer


def start(place: Place, *, shapes: tuple[tuple[int, ...], ...] = ((40,), (9, 7))) -> list[Tensor]:
    """Numbers in [1, 1.5], where neighbours are eps apart."""
    return [(1 + torch.rand(shape) / 2).to(place.device, short(place)) for shape in shapes]


def loss(params: list[Tensor]) -> float:
    return sum(float((param.double() - 2).square().sum()) for param in params)


# -------------------------------------------------------------------------------------- plain stalls, options learn


def test_without_an_option_small_steps_are_lost(place: Place) -> None:
    params = start(place)
    learned, _ = descend(params, 30, lr=eps(short(place)) / 4)
    for before, after in zip(params, learned, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.slow(interpreted=True)
@keeping
def test_with_an_option_small_steps_add_up(place: Place, options: dict[str, bool]) -> None:
    params, lr, steps = start(place), eps(short(place)) / 4, 60
    learned, _ = descend(params, steps, lr=lr, **options)
    exact = loss(params) * (1 - lr) ** (2 * steps)
    # Of what is to be learned, less than a tenth is missing; stochastic rounding of a hundred numbers is right on
    # average, and the average has a spread.
    share = (loss(params) - loss(learned)) / (loss(params) - exact)
    assert share == pytest.approx(1.0, abs=0.35 if "stochastic_rounding" in options else 0.1)


@pytest.mark.slow(interpreted=True)
@keeping
def test_with_momentum_too(place: Place, options: dict[str, bool]) -> None:
    params = start(place)
    plain, _ = descend(params, 40, lr=eps(short(place)) / 40, momentum=0.9)
    learned, _ = descend(params, 40, lr=eps(short(place)) / 40, momentum=0.9, momentum_dtype=torch.float32, **options)
    wide, _ = descend([p.double() for p in params], 40, lr=eps(short(place)) / 40, momentum=0.9)
    exact = loss(params) - loss(wide)
    assert abs(loss(params) - loss(plain)) < 0.1 * exact
    assert loss(params) - loss(learned) == pytest.approx(exact, rel=0.35 if "stochastic_rounding" in options else 0.1)


def test_a_short_momentum_stops_growing_and_a_float32_one_does_not(place: Place) -> None:
    """Under a constant gradient m → g / (1 − μ); in 16 bits it stops where the increments are below half a unit."""
    momentum = 1 - eps(short(place)) / 4
    ends = {}
    for dtype in (None, torch.float32):
        leaf = torch.nn.Parameter(torch.ones(16, device=place.device, dtype=short(place)))
        optimizer = fastloss.SGD([leaf], lr=0.0, momentum=momentum, momentum_dtype=dtype)
        optimizer.state[leaf]["momentum_buffer"] = torch.full_like(leaf, 300.0, dtype=dtype or leaf.dtype)
        for _ in range(50):
            leaf.grad = torch.full_like(leaf, 0.1)
            optimizer.step()
        ends[dtype] = optimizer.state[leaf]["momentum_buffer"].double().mean().item()
    gradient = torch.tensor(0.1, dtype=short(place)).item()
    exact = 300.0
    for _ in range(50):
        exact = momentum * exact + gradient
    assert ends[None] == 300.0
    assert ends[torch.float32] == pytest.approx(exact, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_classifier_of_16_bits_learns_with_each_option_alone(dtype: torch.dtype) -> None:
    """Logistic regression at a learning rate at which the plain one stands still."""
    inputs = torch.randn(256, 20)
    labels = (inputs @ torch.randn(20, 3)).argmax(dim=1)
    first = torch.randn(3, 20)
    losses = {}
    for name, options in {"plain": {}, **KEEPING}.items():
        weight = torch.nn.Parameter(first.clone().to(dtype))
        optimizer = fastloss.SGD([weight], lr=2e-3 if dtype == torch.bfloat16 else 2e-4, **options)
        steps = 300 if dtype == torch.bfloat16 else 1000
        for _ in range(steps):
            optimizer.zero_grad()
            value = fastloss.cross_entropy(inputs @ weight.float().T, labels)
            value.backward()
            optimizer.step()
        losses[name] = value.item()
    wide = torch.nn.Parameter(first.clone().to(dtype).double())
    optimizer = fastloss.SGD([wide], lr=2e-3 if dtype == torch.bfloat16 else 2e-4)
    before = fastloss.cross_entropy(inputs.double() @ wide.T, labels).item()
    for _ in range(steps):
        optimizer.zero_grad()
        value = fastloss.cross_entropy(inputs.double() @ wide.T, labels)
        value.backward()
        optimizer.step()
    learned = before - value.item()
    assert before - losses["plain"] < 0.5 * learned
    for name in KEEPING:
        assert before - losses[name] > 0.8 * learned, name


# -------------------------------------------------------------------------------------------------- one step, exactly


@pytest.mark.parametrize("momentum_dtype", [None, torch.float32])
@pytest.mark.parametrize("rounding", ["nearest", "master", "kahan"])
def test_a_step_is_computed_in_float32_and_rounded_once(
    place: Place, rounding: str, momentum_dtype: torch.dtype | None
) -> None:
    dtype = torch.float16  # which the interpreter rounds as a GPU does
    shapes = ((40,), (9, 7), (5000,), (20000,))
    params = [torch.randn(shape).to(place.device, dtype) for shape in shapes]
    leaves = [torch.nn.Parameter(param.clone()) for param in params]
    optimizer = fastloss.SGD(
        leaves,
        lr=0.1,
        momentum=0.9,
        weight_decay=0.01,
        nesterov=True,
        momentum_dtype=momentum_dtype,
        **KEEPING.get(rounding, {}),
    )
    wide = [param.double() for param in params]
    buffers = [torch.zeros_like(w) for w in wide]
    for _ in range(3):
        for leaf in leaves:
            leaf.grad = torch.randn_like(leaf)
        before = [leaf.detach().double() for leaf in leaves]
        optimizer.step()
        for i, leaf in enumerate(leaves):
            state = optimizer.state[leaf]
            theta = wide[i] if rounding != "nearest" else before[i]
            grad = leaf.grad.double() + 0.01 * theta
            buffers[i] = 0.9 * buffers[i] + grad
            wide[i] = theta - 0.1 * (grad + 0.9 * buffers[i])
            # One rounding of the result, and float32's errors before it.
            unit = torch.finfo(dtype).eps / 2
            torch.testing.assert_close(leaf.double(), wide[i], rtol=1.001 * unit, atol=1e-6)
            stored = state["momentum_buffer"]
            assert stored.dtype == (momentum_dtype or dtype)
            torch.testing.assert_close(
                stored.double(), buffers[i], rtol=1.001 * torch.finfo(stored.dtype).eps / 2 + 1e-6, atol=1e-6
            )
            buffers[i] = stored.double()
            if rounding == "master":
                assert state["master_param"].dtype == torch.float32
                torch.testing.assert_close(state["master_param"].double(), wide[i], rtol=1e-6, atol=1e-6)
                assert torch.equal(state["master_param"].to(dtype), leaf)
                wide[i] = state["master_param"].double()
            elif rounding == "kahan":
                assert state["kahan_comp"].dtype == dtype
                kept = leaf.double() + state["kahan_comp"].double()
                torch.testing.assert_close(kept, wide[i], rtol=2 * unit**2, atol=1e-6)
                wide[i] = kept


def test_stochastic_rounding_takes_one_of_the_two_neighbours_and_is_right_on_average(place: Place) -> None:
    dtype = torch.float16
    target = torch.tensor([1.0, 1.0 + eps(dtype) * 0.3, -3.0 - eps(dtype) * 0.5, 1e-5, 3.7e-7, -2.0e-8, 0.0])
    count = 4000
    start = torch.zeros(len(target), count, dtype=dtype, device=place.device)
    leaf = torch.nn.Parameter(start)
    optimizer = fastloss.SGD([leaf], lr=1.0, stochastic_rounding=True)
    leaf.grad = None
    optimizer.param_groups[0]["lr"] = -1.0  # θ ← 0 + g, and g has more digits than θ
    grad = target[:, None].expand(-1, count).contiguous().to(place.device)
    leaf.grad_dtype = None
    leaf.grad = grad
    optimizer.step()
    wide = target.double()
    up, down = leaf.detach().max(dim=1).values.double().cpu(), leaf.detach().min(dim=1).values.double().cpu()
    step = (up - down).clamp(min=1e-30)
    assert torch.all(down <= wide)
    assert torch.all(wide <= up)
    nearest = target.to(dtype)
    below = torch.nextafter(nearest, torch.tensor(-torch.inf, dtype=dtype)).double()
    above = torch.nextafter(nearest, torch.tensor(torch.inf, dtype=dtype)).double()
    assert torch.all((down >= below) & (up <= above))
    mean = leaf.detach().double().mean(dim=1).cpu()
    assert torch.all((mean - wide).abs() <= 5 * step / (2 * count**0.5) + 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_leaves_what_is_exact_and_what_is_no_number(dtype: torch.dtype) -> None:
    numbers = torch.randn(1000).to(dtype)
    numbers = torch.cat([numbers, torch.tensor([0.0, -0.0, float("inf"), -float("inf")], dtype=dtype)])
    numbers = torch.cat([numbers, torch.finfo(dtype).tiny * torch.arange(8).to(dtype) / 8])
    assert torch.equal(round_stochastically(numbers.float(), dtype), numbers)
    assert round_stochastically(torch.tensor([float("nan")]), dtype).isnan().all()


def test_stochastic_rounding_follows_the_seed_and_differs_from_step_to_step(place: Place) -> None:
    params = start(place)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(torch.cat([p.flatten() for p in descend(params, 3, lr=0.01, stochastic_rounding=True)[0]]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# ------------------------------------------------------------------------------------------------ state and mixtures


@pytest.mark.parametrize("options", [{}, KEEPING["master"], KEEPING["kahan"]], ids=str)
def test_a_group_for_each_parameter(place: Place, options: dict[str, bool]) -> None:
    """Bit for bit as with an optimizer for each."""
    dtype = short(place)
    shapes: list[tuple[int, ...]] = [(5,), (3, 4), (6,), (), (2, 7)]
    rules: list[dict[str, Any]] = [
        {"lr": 0.1},
        {"lr": 0.2, "momentum": 0.9, "nesterov": True},
        {"lr": torch.tensor(0.3), "momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1},
        {"lr": 0.4, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": 0.5, "momentum": 0.5, "maximize": True},
    ]
    values = [torch.randn(shape, device=place.device).to(dtype) for shape in shapes]
    together, apart = ([torch.nn.Parameter(value.clone()) for value in values] for _ in range(2))
    groups = [{"params": [p], **rule} for p, rule in zip(together, rules, strict=True)]
    optimizer = fastloss.SGD(groups, **options)
    others = [fastloss.SGD([p], **rule, **options) for p, rule in zip(apart, rules, strict=True)]
    for _ in range(4):
        for param, twin in zip(together, apart, strict=True):
            param.grad = torch.randn_like(param).detach()
            twin.grad = param.grad.clone()
        optimizer.step()
        for other in others:
            other.step()
        for param, twin in zip(together, apart, strict=True):
            assert torch.equal(param, twin)


def test_buffers_that_a_program_shares_stay_where_they_are() -> None:
    """In shared memory, as float32 buffers do."""
    values = [torch.randn(8).bfloat16() for _ in range(3)]
    runs = []
    for shared in (False, True):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        optimizer = fastloss.SGD(params, lr=0.1, momentum=0.9, master_weights=True)
        for number in range(4):
            for param, value in zip(params, values, strict=True):
                param.grad = value + number
            optimizer.step()
            buffers = [buffer for state in optimizer.state.values() for buffer in state.values()]
            if shared:
                for buffer in buffers:
                    buffer.share_memory_()
            optimizer.state_dict()
            assert all(buffer.is_shared() == shared for buffer in buffers)
        runs.append([*params, *buffers])
    assert all(map(torch.equal, *runs))


def test_state_that_is_stepped_in_parts_takes_no_more_memory() -> None:
    params = [torch.nn.Parameter(torch.randn(64).bfloat16()) for _ in range(20)]
    optimizer = fastloss.SGD(params, lr=0.1, momentum=0.9)
    for number in range(20):
        for i, param in enumerate(params):
            param.grad = torch.ones_like(param) if i >= number else None
        optimizer.step()
    buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
    storages = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in buffers}
    assert sum(storages.values()) == sum(buffer.nbytes for buffer in buffers)


@keeping
def test_parameters_of_32_bits_are_stepped_as_ever(place: Place, options: dict[str, bool]) -> None:
    leaf = torch.nn.Parameter(torch.randn(30, device=place.device))
    other = torch.nn.Parameter(leaf.detach().clone())
    ours, theirs = (
        fastloss.SGD([leaf], lr=0.1, momentum=0.9, **options),
        torch.optim.SGD([other], lr=0.1, momentum=0.9),
    )
    for _ in range(3):
        leaf.grad = torch.randn_like(leaf)
        other.grad = leaf.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(leaf, other)
    assert set(ours.state[leaf]) == {"momentum_buffer"}


@pytest.mark.parametrize("options", [KEEPING["master"], KEEPING["kahan"]], ids=["master", "kahan"])
def test_a_checkpoint_keeps_every_bit(place: Place, options: dict[str, bool], tmp_path: Any) -> None:
    """``Optimizer.load_state_dict`` alone would cast all of it to the parameters' 16 bits."""
    params = start(place)
    settings: dict[str, Any] = dict(lr=1e-3, momentum=0.9, momentum_dtype=torch.float32, **options)
    learned, optimizer = descend(params, 5, **settings)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    leaves = [torch.nn.Parameter(p.clone()) for p in learned]
    again = fastloss.SGD(leaves, **settings)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    olds = [p for group in optimizer.param_groups for p in group["params"]]
    for old, new in zip(olds, leaves, strict=True):
        for key, value in optimizer.state[old].items():
            assert again.state[new][key].dtype == value.dtype
            assert torch.equal(again.state[new][key], value), key
        gradient = torch.randn_like(new)
        old.grad, new.grad = gradient, gradient.clone()
    optimizer.step()
    again.step()
    for old, new in zip(olds, leaves, strict=True):
        assert torch.equal(old, new)


def test_a_short_momentum_of_torch_becomes_a_float32_one(place: Place) -> None:
    leaf = torch.nn.Parameter(torch.randn(30, device=place.device).to(torch.float16))
    theirs = torch.optim.SGD([leaf], lr=0.1, momentum=0.9)
    leaf.grad = torch.randn_like(leaf)
    theirs.step()
    ours = fastloss.SGD([leaf], lr=0.1, momentum=0.9, momentum_dtype=torch.float32)
    ours.load_state_dict(theirs.state_dict())
    buffer = ours.state[leaf]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    assert torch.equal(buffer, theirs.state[leaf]["momentum_buffer"].float())


@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_were_written_over_are_the_truth(place: Place, whole: bool) -> None:
    """A model's load_state_dict after some steps is not undone by the master weights."""
    leaf = torch.nn.Parameter(torch.randn(30, device=place.device).to(short(place)))
    optimizer = fastloss.SGD([leaf], lr=1e-3, master_weights=True)
    for _ in range(3):
        leaf.grad = torch.randn_like(leaf)
        optimizer.step()
    kept = optimizer.state[leaf]["master_param"].clone()
    with torch.no_grad():
        leaf[slice(None) if whole else slice(10)] = 5.0
    leaf.grad = torch.zeros_like(leaf)
    optimizer.step()
    master = optimizer.state[leaf]["master_param"]
    if whole:
        assert torch.equal(master, torch.full_like(master, 5.0))
    else:
        assert torch.equal(master[10:], kept[10:])  # to the last bit
        assert torch.equal(master[:10], torch.full_like(master[:10], 5.0))
    assert torch.equal(leaf, master.to(leaf.dtype))


def swapped(leaf: Tensor, value: float) -> None:
    leaf.data = torch.full_like(leaf, value)


def by_data(leaf: Tensor, value: float) -> None:
    leaf.data.fill_(value)


def filled(leaf: Tensor, value: float) -> None:
    with torch.no_grad():
        leaf.fill_(value)


@pytest.mark.parametrize("value", [4.0, -(2.0**-12)])
@pytest.mark.parametrize("write", [filled, swapped, by_data])
@pytest.mark.parametrize("options", [KEEPING["master"], KEEPING["kahan"]], ids=["master", "kahan"])
@pytest.mark.parametrize("before", ["steps", "load", "deepcopy", "torch's steps", "a sparse step", "compiled steps"])
def test_who_writes_to_a_parameter_is_followed(
    place: Place, before: str, options: dict[str, bool], write: Callable[[Tensor, float], None], value: float
) -> None:
    """What was kept beside the old number changes no bit of the new one."""
    if before == "compiled steps" and place.interpreted:
        pytest.skip("a compiled step is the same for all backends")
    leaf = torch.nn.Parameter(1 + torch.rand(30, device=place.device).to(short(place)))
    optimizer = fastloss.SGD([leaf], lr=eps(short(place)) / 3, **options)
    for _ in range(3):
        leaf.grad = torch.ones_like(leaf)
        optimizer.step()
    if before == "load":
        optimizer.load_state_dict(optimizer.state_dict())
    if before == "deepcopy":
        leaf, optimizer = copy.deepcopy((leaf, optimizer))
    step: Callable[[], Any] = optimizer.step
    if before == "torch's steps":
        torch.optim.SGD([leaf], lr=1.0).step()
    elif before == "a sparse step":
        leaf.grad = torch.ones_like(leaf).to_sparse()
        optimizer.step()
    elif before == "compiled steps":
        step = torch.compile(optimizer.step, backend="aot_eager")
        leaf.grad = torch.ones_like(leaf)
        step()
    write(leaf, value)
    leaf.grad = torch.zeros_like(leaf)
    if before == "a sparse step":
        leaf.grad = leaf.grad.to_sparse()
    step()
    assert torch.equal(leaf.detach(), torch.full_like(leaf, value))
    state = optimizer.state[leaf]
    if "master_param" in state:
        assert torch.equal(state["master_param"], torch.full_like(state["master_param"], value))
    else:
        assert state["kahan_comp"].abs().max().item() <= eps(leaf.dtype) * abs(value) / 2


def test_master_weights_of_another_run_do_not_undo_what_was_loaded(place: Place) -> None:
    """Written to between the load of a state and the first step: the parameter is the truth there too."""
    leaf = torch.nn.Parameter(torch.ones(30, device=place.device).to(short(place)))
    optimizer = fastloss.SGD([leaf], lr=0.25, master_weights=True)
    leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    state = optimizer.state_dict()
    later = torch.nn.Parameter(torch.full_like(leaf, 8.0))
    optimizer = fastloss.SGD([later], lr=0.25, master_weights=True)
    optimizer.load_state_dict(state)
    later.grad = torch.ones_like(later)
    optimizer.step()
    assert torch.equal(later.detach(), torch.full_like(later, 7.75))


def test_a_compensation_of_what_is_infinite_is_nothing(place: Place) -> None:
    """∞ − ∞ would be NaN, and NaN would stay after the parameter has been mended."""
    leaf = torch.nn.Parameter(torch.ones(20, device=place.device, dtype=torch.float16))
    optimizer = fastloss.SGD([leaf], lr=1.0, kahan_sum=True)
    leaf.grad = torch.full_like(leaf, -6e4)
    optimizer.step()
    optimizer.step()
    assert torch.equal(leaf.detach(), torch.full_like(leaf, float("inf")))
    assert torch.equal(optimizer.state[leaf]["kahan_comp"], torch.zeros_like(leaf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_nearest_is_the_conversion(dtype: torch.dtype) -> None:
    """Of every exponent, of ties, and of what is too large or no number."""
    wide = torch.randn(100_000) * 2.0 ** torch.randint(-40, 20, (100_000,))
    grid = torch.randn(1000).to(dtype).float() * 2.0 ** torch.randint(-20, 10, (1000,))
    neighbour = (grid.view(torch.int32) + (1 << (16 if dtype == torch.bfloat16 else 13))).view(torch.float32)
    special = torch.tensor([0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e38, float("inf"), -float("inf"), 2.0**-25])
    for numbers in (wide, (grid + neighbour) / 2, special, -special):
        assert torch.equal(round_to_nearest(numbers, dtype), numbers.to(dtype).float())
    assert round_to_nearest(torch.tensor([float("nan")]), dtype).isnan().all()


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {  # of 64 numbers
    "whole": lambda x: x,
    "from the third": lambda x: x[2:62],
    "61": lambda x: x[:61],
    "transposed": lambda x: x.view(8, 8).T,
    "every second": lambda x: x[::2],
    "one": lambda x: x[7],
    "none": lambda x: x[::2][:0],
}


@pytest.mark.parametrize("written", [False, True], ids=["nobody wrote", "somebody wrote"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_belongs_to_a_parameter_is_found_in_any_view(dtype: torch.dtype, view: str, written: bool) -> None:
    """By comparing bits as by comparing numbers, of which a compiled program knows how."""
    wide = torch.randn(64)
    wide[3] = torch.nan
    memory = wide.to(dtype)
    lost = (wide - memory.float()).to(dtype)
    if written:
        memory[5::3] += 1
    param, master, compensation = (VIEWS[view](x) for x in (memory, wide, lost))
    others = param.float() != master.to(dtype).float()
    expected = torch.where(others, param.float(), master)
    torch.testing.assert_close(true_master(master.clone(), param), expected, rtol=0, atol=0, equal_nan=True)

    eased = compensation.float() * (1 - 2.0**-6)
    belongs = (param.float() + eased).to(dtype) == param
    expected = param.float() + torch.where(belongs, compensation.float(), 0.0)
    torch.testing.assert_close(compensated(param, compensation), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7), (4096,)], ids=str)
def test_random_bits_are_one_lot_for_each_element(shape: tuple[int, ...]) -> None:
    """Up or down, each by itself: of numbers half way between two, about half go up."""
    wide = torch.full(shape, 1 + 2.0**-8)
    ups = sum(round_stochastically(wide, torch.bfloat16).double().sub(1).mul(2.0**7) for _ in range(64))
    assert ups.shape == torch.Size(shape)
    assert torch.all((ups > 8) & (ups < 56))
    if shape == (4096,):
        drawn = round_stochastically(wide, torch.bfloat16) > 1
        for shift in range(1, 5):  # neighbours share a random number, and not its bits
            alike = (drawn[shift:] == drawn[:-shift]).double().mean().item()
            assert 0.45 < alike < 0.55


# ------------------------------------------------------------------------------------------------- whatever may come


class ByOperators(fastloss.SGD):
    """The same rules by torch's operators, one parameter after the other."""

    def _step(self) -> None:
        self._step_by_operators(differentiable=False)


DTYPES = (torch.float16, torch.float32, torch.float64)


@st.composite
def drawn_options(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
    nesterov = momentum > 0 and draw(st.booleans())
    return {
        "lr": draw(st.sampled_from([0.01, 0.1])),
        "momentum": momentum,
        "nesterov": nesterov,
        "dampening": 0.0 if nesterov else draw(st.sampled_from([0.0, 0.3])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "maximize": draw(st.booleans()),
        "decoupled_weight_decay": draw(st.booleans()),
        "max_norm": draw(st.sampled_from([None, 1e-9, 1e-3, 0.1, 1.0])),
        "momentum_dtype": draw(st.sampled_from([None, *DTYPES])),
        **draw(st.sampled_from([{}, KEEPING["master"], KEEPING["kahan"]])),
    }


drawn_tensor = st.tuples(st.sampled_from([(), (0,), (3,), (5, 7), (2, 3, 4), (4097,)]), st.sampled_from(DTYPES))
drawn_event = st.tuples(
    st.sampled_from(["step"] * 4 + ["scaled", "overflow", "load", "deepcopy", "add", "write", "momentum", "forget"]),
    st.integers(0, 5),
    st.sets(st.integers(0, 5), max_size=3),
)


def happen(
    optimizers: list[fastloss.SGD], event: str, number: int, without: set[int], device: torch.device
) -> list[fastloss.SGD]:
    """An event of the same numbers for both optimizers; which of them there are after it."""
    lists = [[param for group in o.param_groups for param in group["params"]] for o in optimizers]
    twins = list(zip(*lists, strict=True))
    which = twins[number % len(twins)]
    if event in ("step", "scaled", "overflow"):
        for i, params in enumerate(twins):
            grad = torch.randn(params[0].shape, device=device).to(params[0].dtype) * (1 if event == "step" else 8)
            if event == "overflow" and grad.numel():
                grad.view(-1)[0] = float("inf")
            for param in params:
                param.grad = None if i in without else grad.clone()
        for optimizer in optimizers:
            if event != "step":
                optimizer.grad_scale = torch.tensor(8.0, device=device)  # type: ignore[attr-defined]
                optimizer.found_inf = torch.tensor(float(event == "overflow"), device=device)  # type: ignore[attr-defined]
            optimizer.step()
            if event != "step":
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        norms = [optimizer.grad_norm for optimizer in optimizers]
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=1e-6)
    elif event == "load":  # each the other's
        states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
        for optimizer, state in zip(optimizers, reversed(states), strict=True):
            optimizer.load_state_dict(state)
    elif event == "deepcopy":
        return copy.deepcopy(optimizers)
    elif event == "add":
        numbers = torch.randn(6, 5, device=device).to(DTYPES[number % 2])
        for optimizer in optimizers:
            optimizer.add_param_group({"params": [torch.nn.Parameter(numbers.clone())], "lr": 0.05})
    elif event == "write":
        numbers = torch.randn(which[0].shape, device=device)
        for param in which:
            with torch.no_grad():
                param.copy_(numbers)
    elif event == "momentum":
        for optimizer in optimizers:
            optimizer.param_groups[0].update(momentum=(0.0, 0.7)[number % 2], nesterov=False)
    else:
        for optimizer, param in zip(optimizers, which, strict=True):
            optimizer.state.pop(param, None)
    return optimizers


@pytest.mark.slow
@pytest.mark.parametrize("examples", [150])
def test_any_run_of_any_options(place: Place, examples: int) -> None:
    """Dtypes and options mixed, clipped, scaled: what the backends do is what the operators do, but for rounding."""

    @drawn(
        drawn_options(),
        st.lists(drawn_tensor, min_size=1, max_size=4),
        st.lists(drawn_event, min_size=2, max_size=8),
        examples=examples if place.name == "eager" else examples // 4,
    )
    def check(options: dict[str, Any], tensors: list[Any], events: list[Any]) -> None:
        torch.manual_seed(len(events))
        first = [torch.randn(shape, device=place.device).to(dtype) for shape, dtype in tensors]
        optimizers: list[fastloss.SGD] = [
            make([torch.nn.Parameter(param.clone()) for param in first], **options)
            for make in (fastloss.SGD, ByOperators)
        ]
        for event in (*events, ("step", 0, set())):
            optimizers = happen(optimizers, *event, device=place.device)
        ours, theirs = ([p.detach() for group in o.param_groups for p in group["params"]] for o in optimizers)
        short = torch.float16 in (options["momentum_dtype"], *(p.dtype for p in ours))
        for mine, other in zip(ours, theirs, strict=True):
            tolerance = 2e-2 if short else 1e-4
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True)

    check()
