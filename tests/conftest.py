"""What all tests share: the two backends, each on the device that it runs on here, and the selection of tests.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors: slow, and right or wrong as on a GPU but
for bfloat16, which NumPy lacks and the interpreter rounds by its own rules. It must be asked for before Triton is
imported.

Several processes share the tests, so each has one thread. The number must be set before torch is imported.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import selection  # noqa: E402
from places import Place  # noqa: E402

import fastloss  # noqa: E402
from fastloss.backends import choice  # noqa: E402
from fastloss.loss import routes  # noqa: E402


def _hasten_interpreter() -> None:
    """Let functions that a kernel calls do without what has been done before.

    In each call Triton's interpreter looks through the members of ``triton.language`` for builtins to replace, which
    takes half of a kernel's time. The launch has replaced them for all that import ``triton.language``; Triton's own
    functions import ``triton.language.core``, whose builtins the first call replaces for good.
    """
    from triton.runtime import interpreter

    replaced = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("triton.") and module not in replaced:
            interpreter._patch_lang(self.fn)
            replaced.add(module)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call  # type: ignore[method-assign]


if not HAS_GPU and choice.triton_version() is not None:
    _hasten_interpreter()


def _places() -> list[Place]:
    places = [Place("eager", torch.device("cpu"))]
    if choice.triton_version() is not None:
        places.append(Place("triton", torch.device("cuda" if HAS_GPU else "cpu")))
    return places


@pytest.fixture(params=_places(), ids=lambda place: place.name)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Each backend in turn, forced for the length of the test."""
    with fastloss.use_backend(request.param.name):
        yield request.param


@pytest.fixture(params=[p for p in _places() if p.name == "triton"], ids=lambda place: place.name)
def kernels(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The Triton kernels, forced for the length of the test."""
    with fastloss.use_backend("triton"):
        yield request.param


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Other random inputs in every test, and the same ones in every run of it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the logits that a fused pass served, so that torch's own operator is not held against itself."""
    shapes: list[tuple[int, ...]] = []
    original = routes.fused_cross_entropy

    def counted(input: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        shapes.append(tuple(input.shape))
        return original(input, *arguments, **options)

    monkeypatch.setattr(routes, "fused_cross_entropy", counted)
    return shapes


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    """Tests that change what the kernels' plans are made of find none that was made before."""
    launch = sys.modules.get("fastloss.kernels.launch")
    if launch is not None:
        launch.forget()


# ----------------------------------------------------------------------------- the selection of tests


LEFT_OUT = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="Run every test, not the fast selection (tests/selection.py)")
    parser.addoption(
        "--examples", type=int, metavar="N", help="Draw N random calls in each test of tests/test_fuzz.py"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped where there is none")
    config.addinivalue_line("markers", "slow: takes a second or more; left out of the fast selection")
    config.addinivalue_line(
        "markers", "backend_agnostic: a layer above the backends; the fast selection has one interpreted case of it"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Start no workers for tests selected by hand, which are few, nor where they would share one GPU."""
    return 0 if HAS_GPU or selection.is_by_hand(config) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU here"))
    if _is_fast(config):
        selected = selection.fast(items)
        left_out = set(items).difference(selected)
        if left_out:
            _set_left_out(config)
            config.hook.pytest_deselected(items=[item for item in items if item in left_out])
            items[:] = selected


def _set_left_out(config: pytest.Config) -> None:
    """Record that tests were left out. A worker of pytest-xdist tells it to the process that reports."""
    config.stash[LEFT_OUT] = True
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = True


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if getattr(node, "workeroutput", {}).get("left_out"):
        node.config.stash[LEFT_OUT] = True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash.get(LEFT_OUT, False):
        terminalreporter.write_line("The fast selection; every test: pytest --all, or name it by its id or -k.")


def _is_fast(config: pytest.Config) -> bool:
    return not (config.option.all or selection.is_by_hand(config))
