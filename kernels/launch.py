"""Launches that are made ready once, and the memory that the programs of a launch share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fastloss.backends.contract import may_keep_memory

from .arguments import Strided

__all__ = ["Launch", "Memory", "Prepared", "alike", "counter", "forget", "launch", "on_device", "scratch"]


class Launch:
    """A kernel, its grid and its constants, made ready to be started again and again.

    At each launch Triton examines every argument for what it may compile in: dtypes, ints that are 1 or a multiple of
    16, addresses that are a multiple of 16. That is most of a launch's host time, and the result is the same for
    arguments that are alike in all of that. The caller promises that all arguments of a ``Launch`` are: only the
    first start examines them.
    """

    __slots__ = ("_compiled_in", "_constants", "_grid", "_kernel", "_start")

    def __init__(self, kernel: Any, grid: tuple[int, ...], constants: dict[str, object]) -> None:
        self._kernel, self._grid, self._constants = kernel, grid, constants
        self._start: Callable[..., None] | None = None
        self._compiled_in: tuple[object, ...] = ()

    def __call__(self, *arguments: object) -> None:
        if self._start is not None:
            self._start(*arguments, *self._compiled_in)
            return
        compiled = self._kernel[self._grid](*arguments, **self._constants)
        if isinstance(compiled, CompiledKernel):  # the interpreter returns None; a compilation may still be running
            names = self._kernel.arg_names[len(arguments) :]
            self._compiled_in = tuple(self._constants[name] for name in names)
            self._start = compiled[(*self._grid, 1, 1)[:3]]


class Prepared(NamedTuple):
    """A launch, and what calls that are alike have in common."""

    start: Launch
    numbers: tuple[object, ...]  # the last arguments: they hold no tensor
    programs: int = 0
    counts: int = 0  # int32 that each program leaves to the last one

    def __call__(self, *tensors: object) -> None:
        self.start(*tensors, *self.numbers)


Ready = TypeVar("Ready")
_MOST_REMEMBERED = 1024
_memories: list[dict[Any, Any]] = []


class Memory(Generic[Ready]):
    """Values by what calls have in common: tiles, arguments, launches. It is emptied when it is full."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Ready] = {}
        _memories.append(self._known)

    def get(self, key: Hashable, make: Callable[[], Ready]) -> Ready:
        value = self._known.get(key)
        if value is None:
            value = make()
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            self._known[key] = value
        return value


def forget() -> None:
    """Empty all memories: after a change of what plans depend on, as tests and the tuner make."""
    for known in _memories:
        known.clear()


def alike(tensor: Tensor | None) -> Hashable:
    """Return what two tensors have in common that one :class:`Launch` can take, but for strides and device."""
    return None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16)


def _specialized(argument: object) -> Hashable:
    """Return what Triton may compile in of an argument."""
    if isinstance(argument, Tensor):
        return alike(argument)
    if isinstance(argument, tuple):
        return tuple(map(_specialized, argument))
    return argument if argument is None or type(argument) is int else (type(argument), argument)


_launches: Memory[Launch] = Memory()


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[object, ...], constants: dict[str, object]) -> None:
    """Start ``kernel[grid](*arguments, **constants)``, by a :class:`Launch` if arguments like these were seen before.

    This is for callers that compute the arguments anew at each call; others keep a :class:`Prepared`.
    """
    tensors = (a.ptr if isinstance(a, Strided) else a for a in arguments)
    device = next(a.device for a in tensors if isinstance(a, Tensor))
    key = (kernel, grid, device, tuple(map(_specialized, arguments)), tuple(constants.items()))
    _launches.get(key, lambda: Launch(kernel, grid, constants))(*arguments)


def counter(device: torch.device) -> Tensor:
    """Return an int32 zero that the programs of a launch count up, and that the last of them sets back to zero.

    Launches on one stream follow each other and share it. A CUDA graph may be replayed beside anything, so a captured
    launch gets its own; so does a launch in a compiled program, whose memory may belong to a pool in which nothing
    may stay behind.
    """
    stream = _lasting_stream(device)
    return torch.zeros(1, dtype=torch.int32, device=device) if stream is None else _stream_counter(device, stream)


def scratch(device: torch.device, programs: int, counts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the memory for what the programs of a launch leave to the last one.

    That is ``(programs, 2)`` in float64 for sums, ``(programs, counts)`` in int32, and a counter. Launches on one
    stream share all three, as they share the :func:`counter`.
    """
    stream = _lasting_stream(device)
    make = _stream_scratch.__wrapped__ if stream is None else _stream_scratch
    return make(device, stream, programs, counts)


def _lasting_stream(device: torch.device) -> int | None:
    """Return the current stream, or None if memory that its launches share may not be kept from call to call."""
    if device.type != "cuda" or not may_keep_memory.get() or torch.cuda.is_current_stream_capturing():
        return None
    return int(driver.active.get_current_stream(device.index))


@functools.cache
def _stream_counter(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


@functools.lru_cache(256)
def _stream_scratch(
    device: torch.device, stream: int | None, programs: int, counts: int
) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.empty((programs, 2), dtype=torch.float64, device=device)
    of_counts = torch.empty((programs, counts), dtype=torch.int32, device=device)
    return sums, of_counts, torch.zeros(1, dtype=torch.int32, device=device)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the tensor's own GPU, whichever is current."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
