"""torch's own suites for the operator and its module, run over this package's: the same samples, the same errors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import reference
import torch
from places import Place
from torch import Tensor, nn

import fastloss

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")


@contextmanager
def without_their_settings() -> Iterator[None]:
    """torch's test modules, once imported, freeze ``torch.backends`` and choose a hypothesis profile for everyone."""
    hypothesis = pytest.importorskip("hypothesis")
    mine = hypothesis.settings()
    with mock.patch.object(torch.backends, "disable_global_flags"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    hypothesis.settings.register_profile("as before torch's suites", mine)
    hypothesis.settings.load_profile("as before torch's suites")


with without_their_settings():
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

(OP,) = (op for op in op_db if op.name == "nn.functional.cross_entropy")
(MODULE,) = (module for module in module_db if module.module_cls is nn.CrossEntropyLoss)
OP_DTYPES = sorted(OP.dtypes, key=str)
MODULE_DTYPES = sorted(MODULE.dtypes, key=str)


# The first seed from 0 on by which no sample ignores all of its rows: its mean would be NaN. For such rows there is
# test_the_mean_over_no_row_is_nan_and_its_gradient_zero in test_cross_entropy.py.
SEED = 1


@functools.cache
def op_samples(device: torch.device, dtype: torch.dtype) -> list[Any]:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return list(OP.sample_inputs(device, dtype, requires_grad=True))


@functools.cache
def module_samples(device: torch.device, dtype: torch.dtype) -> list[Any]:
    make = MODULE.module_inputs_func
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return list(make(MODULE, device=device, dtype=dtype, requires_grad=True, training=True))


def module_errors(device: torch.device, dtype: torch.dtype) -> list[Any]:
    make = getattr(MODULE, "module_error_inputs_func", None)  # the older torch, the fewer
    return make(MODULE, device=device, dtype=dtype, requires_grad=False, training=True) if make else []


def name_of(sample: Any) -> str:
    """What is particular to a sample of the operator."""
    (target,) = sample.args
    parts = ["x".join(map(str, sample.input.shape)), "probabilities" if target.is_floating_point() else "indices"]
    parts += [str(value) if name == "reduction" else name for name, value in sample.kwargs.items()]
    return " ".join(parts)


# Only the numbers and the names: the samples are made once for each device and dtype.
CPU = torch.device("cpu")
OP_CASES = [
    pytest.param(index, id=f"{index} {name_of(sample)}")
    for index, sample in enumerate(op_samples(CPU, torch.float64))
]
MODULE_CASES = [
    pytest.param(index, id=f"{index} {sample.desc}")
    for index, sample in enumerate(module_samples(CPU, torch.float64))
]


def to(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor in another dtype, as a leaf if it was one that has a gradient; all else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad and value.is_leaf)


def run(function: Any, *arguments: Any, upstream: Tensor | None = None, **options: Any) -> list[Tensor]:
    """The loss, and the gradient of each argument that has one."""
    result = function(*arguments, **options)
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    upstream = torch.ones_like(result) if upstream is None else upstream.to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream)]


def assert_as_torch(
    place: Place, mine: Any, torchs: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Loss and gradients are no worse than torch's, against torch's in float64."""
    dtype = arguments[0].dtype
    # Their logits and weights are in [−9, 9]: terms of a sum cancel, to less than any of them was rounded to.
    ulps = 2.0
    if place.interpreted and dtype == torch.float32:
        ulps = 8.0  # no fused multiply-add, which keeps the exponents of such logits exact
    exact_arguments = tuple(to(a, torch.float64) for a in arguments)
    exact_options = {name: to(value, torch.float64) for name, value in options.items()}
    shape = torchs(*exact_arguments, **exact_options).shape
    upstream = torch.rand(shape, device=place.device) + 0.5
    ours, theirs = (run(function, *arguments, upstream=upstream, **options) for function in (mine, torchs))
    exact = run(torchs, *exact_arguments, upstream=upstream.to(dtype), **exact_options)
    assert len(ours) == len(theirs)
    for what, a, b, c in zip(("loss", "gradient", "target's gradient"), ours, theirs, exact, strict=False):
        reference.assert_no_worse(a, b, c, what, ulps)


# ----------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("dtype", OP_DTYPES, ids=str)
@pytest.mark.parametrize("index", OP_CASES)
def test_operator(place: Place, index: int, dtype: torch.dtype) -> None:
    sample = op_samples(place.device, dtype)[index]
    arguments = (sample.input, *sample.args)
    assert_as_torch(place, fastloss.cross_entropy, OP.op, arguments, sample.kwargs)


@pytest.mark.parametrize("index", OP_CASES)
def test_operator_of_strided_tensors(place: Place, index: int) -> None:
    """The same numbers with gaps between them in memory give the same result."""
    sample = op_samples(place.device, torch.float32)[index]
    strided = sample.noncontiguous()
    dense, spread = (run(fastloss.cross_entropy, s.input, *s.args, **s.kwargs) for s in (sample, strided))
    for a, b in zip(dense, spread, strict=True):
        torch.testing.assert_close(b, a)


def of_leaves(sample: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The operator as a function of the sample's tensors that have a gradient: of these gradcheck wants to hear."""
    arguments = (sample.input, *sample.args)
    where = [i for i, a in enumerate(arguments) if a.requires_grad]

    def function(*leaves: Tensor) -> Tensor:
        filled = list(arguments)
        for i, leaf in zip(where, leaves, strict=True):
            filled[i] = leaf
        return fastloss.cross_entropy(*filled, **sample.kwargs)

    return function, tuple(arguments[i] for i in where)


def as_torch_checks(place: Place) -> dict[str, Any]:
    """What torch's own tests ask of both checks."""
    # All directions one by one take the interpreter 5 s a sample, random ones 0.2 s.
    return {"check_grad_dtypes": True, "nondet_tol": OP.gradcheck_nondet_tol, "fast_mode": place.interpreted}


@pytest.mark.backend_agnostic
@pytest.mark.parametrize("index", OP_CASES)
def test_operator_gradcheck(place: Place, index: int) -> None:
    """Backward and forward mode, with batched and with undefined gradients, as torch's own test asks it."""
    assert torch.autograd.gradcheck(
        *of_leaves(op_samples(place.device, torch.float64)[index]),
        **as_torch_checks(place),
        check_undefined_grad=True,
        check_batched_grad=OP.check_batched_grad,
        check_forward_ad=OP.supports_forward_ad,
        check_batched_forward_grad=OP.check_batched_forward_grad,
    )


@pytest.mark.backend_agnostic
@pytest.mark.parametrize("strided_upstream", [False, True])
@pytest.mark.parametrize("index", OP_CASES)
def test_operator_gradgradcheck(place: Place, index: int, strided_upstream: bool) -> None:
    assert torch.autograd.gradgradcheck(
        *of_leaves(op_samples(place.device, torch.float64)[index]),
        **as_torch_checks(place),
        gen_non_contig_grad_outputs=strided_upstream,
        check_batched_grad=OP.check_batched_gradgrad,
    )


def test_operator_errors(place: Place) -> None:
    """torch lists none for the operator itself as yet (2.13); what it lists, ours raises too."""
    if OP.error_inputs_func is None:
        pytest.skip("this torch lists no error of the operator")
    for error in OP.error_inputs(place.device):
        sample = error.sample_input
        with pytest.raises(error.error_type):
            fastloss.cross_entropy(sample.input, *sample.args, **sample.kwargs)


# ----------------------------------------------------------------------------- the module


def make(cls: type[nn.Module], sample: Any) -> nn.Module:
    constructor = sample.constructor_input
    return cls(*constructor.args, **constructor.kwargs)


@pytest.mark.parametrize("dtype", MODULE_DTYPES, ids=str)
@pytest.mark.parametrize("index", MODULE_CASES)
def test_module(place: Place, index: int, dtype: torch.dtype) -> None:
    """Against torch's module, and against the reference that torch holds its own module to."""
    sample = module_samples(place.device, dtype)[index]
    ours, theirs = (make(cls, sample) for cls in (fastloss.CrossEntropyLoss, nn.CrossEntropyLoss))

    def of(module: nn.Module) -> Any:
        def function(input: Tensor, target: Tensor) -> Tensor:
            return module.to(input.dtype)(input, target)  # in float64 the weights too

        return function

    input, target = (to(a, a.dtype) for a in sample.forward_input.args)
    assert_as_torch(place, of(ours), of(theirs), (input, target), {})
    if dtype != torch.float16:
        ours.to(dtype)
        expected = sample.reference_fn(ours, input, target)
        torch.testing.assert_close(ours(input, target), expected)


@pytest.mark.parametrize("index", range(len(module_errors(CPU, torch.float32))))
def test_module_errors(place: Place, index: int) -> None:
    """The kind of error that torch's module raises, at the same step."""
    error = module_errors(place.device, torch.float32)[index]
    sample = error.module_error_input
    if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(error.error_type):
            make(fastloss.CrossEntropyLoss, sample)
        return
    for cls, words in ((nn.CrossEntropyLoss, error.error_regex), (fastloss.CrossEntropyLoss, "fastloss: ")):
        with pytest.raises(error.error_type, match=words) as raised:
            make(cls, sample)(*sample.forward_input.args)
        assert raised.type is error.error_type
