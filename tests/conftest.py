"""What all tests share: the two backends, each on the device that it runs on here.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors: slow, and right or wrong as on a GPU but
for bfloat16, which NumPy lacks and the interpreter rounds by its own rules. It must be asked for before Triton is
imported.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")

from places import Place  # noqa: E402

import fastloss  # noqa: E402
from fastloss.backends import choice  # noqa: E402


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


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    """Tests that change what the kernels' plans are made of find none that was made before."""
    launch = sys.modules.get("fastloss.kernels.launch")
    if launch is not None:
        launch.forget()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped, and said so, where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU here"))
