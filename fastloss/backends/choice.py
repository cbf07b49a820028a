"""The choice of the backend that serves a tensor."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .contract import Backend

__all__ = [
    "BACKENDS",
    "NUMBERS_SAVED",
    "backend_that_saved",
    "choose",
    "encoded",
    "forced",
    "is_forced",
    "load",
    "may_look",
    "reason",
    "triton_version",
    "use_backend",
    "validates",
    "variables",
    "wanted",
]

BACKENDS = ("auto", "triton", "eager")

# Numbers per row that a forward pass without gradients saves for the backward pass: (labels, class probabilities).
NUMBERS_SAVED = {"eager": (0, 0), "triton": (2, 3)}

forced: ContextVar[str | None] = ContextVar("fastloss_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call inside the ``with`` block, by this thread, by one backend.

    Args:
        name: ``"auto"`` (Triton for GPU tensors where Triton can be imported, eager for the rest),
            ``"triton"`` or ``"eager"``. Outside such a block the environment variable ``FASTLOSS_BACKEND``
            decides, ``auto`` if it is not set or empty.

    Raises:
        ValueError: ``name`` is none of the three.

    Example:
        >>> import fastloss, torch
        >>> with fastloss.use_backend("eager"):
        ...     fastloss.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """
    token = forced.set(_checked(name, "use_backend(name)"))
    try:
        yield
    finally:
        forced.reset(token)


def encoded(name: str) -> Any:
    """Return the name of a variable of the environment as :data:`variables` has it."""
    return name if variables is os.environ else os.environ.encodekey(name)  # type: ignore[attr-defined]


# The environment as it is now. ``os.environ.get`` encodes each name, and raises and catches an error for a variable
# that is not set, which takes longer than all else that a call asks.
variables: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
_BACKEND, _VALIDATE = encoded("FASTLOSS_BACKEND"), encoded("FASTLOSS_VALIDATE")


def is_forced() -> bool:
    """Return True if the user chose a backend, by ``use_backend`` or by ``FASTLOSS_BACKEND``."""
    return forced.get() is not None or (_BACKEND in variables and os.environ["FASTLOSS_BACKEND"] not in ("", "auto"))


def may_look(tensor: Tensor) -> bool:
    """Return True if the host may read the tensor's values: on a CPU, or if ``FASTLOSS_VALIDATE`` asks for it.

    On a GPU that costs a synchronisation.
    """
    return tensor.is_cpu or validates()


def validates() -> bool:
    """Return True if ``FASTLOSS_VALIDATE`` asks for a look at labels on a GPU."""
    return _VALIDATE in variables and os.environ["FASTLOSS_VALIDATE"] not in ("", "0")


def choose(tensor: Tensor) -> str:
    """Return the backend that serves ``tensor``, ``"triton"`` or ``"eager"``.

    Raises:
        RuntimeError: Triton is asked for and can't serve the tensor.
        ValueError: ``FASTLOSS_BACKEND`` holds an unknown name.
    """
    name = wanted()
    if name == "eager":
        return "eager"
    if name == "auto":
        return "triton" if tensor.is_cuda and triton_version() is not None else "eager"
    obstacle = _obstacle_to_triton(tensor.device)
    if obstacle is not None:
        raise RuntimeError(f"fastloss: backend 'triton' can't serve a tensor on {tensor.device}: {obstacle}")
    return "triton"


def reason(device: torch.device) -> str:
    """Return one line that says which backend serves tensors on ``device``, and why."""
    name = wanted()
    source = "use_backend()" if forced.get() is not None else "FASTLOSS_BACKEND"
    if name == "eager":
        return f"eager: {source} asks for it"
    if name == "triton":
        obstacle = _obstacle_to_triton(device)
        return f"triton: {source} asks for it" + ("" if obstacle is None else f", but {obstacle}")
    if device.type != "cuda":
        return f"eager: Triton's kernels serve GPU tensors, and this is {device.type}"
    if triton_version() is None:
        return "eager: Triton can't be imported (pip install triton)"
    return f"triton: the tensor is on a GPU and Triton {triton_version()} is there"


@functools.cache
def load(name: str) -> Backend:
    """Return the backend's module. Triton is imported here, at its first use, and nowhere else."""
    module = "fastloss.kernels" if name == "triton" else "fastloss.backends.eager"
    return cast("Backend", importlib.import_module(module))


def backend_that_saved(numbers: int) -> Backend:
    """Return the backend whose forward pass saved so many numbers per row, whichever would be chosen now."""
    return load("triton" if numbers else "eager")


def wanted() -> str:
    """Return the backend that the user asks for: a name of :data:`BACKENDS`."""
    return forced.get() or _checked(os.environ.get("FASTLOSS_BACKEND") or "auto", "FASTLOSS_BACKEND")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"fastloss: {source} is {name!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    return name


def _obstacle_to_triton(device: torch.device) -> str | None:
    if triton_version() is None:
        return "Triton can't be imported (pip install triton)"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return "Triton's kernels run on GPUs (for a slow test on a CPU, set TRITON_INTERPRET=1 before starting)"
    if device.type not in ("cpu", "cuda"):
        return f"its kernels run on CUDA and ROCm devices, not on {device.type}"
    return None


@functools.cache
def triton_version() -> str | None:
    """Return the version of Triton; None if it can't be imported."""
    try:
        return str(importlib.import_module("triton").__version__)
    except Exception:  # a broken Triton may raise anything; the eager backend serves then
        return None
