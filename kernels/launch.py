"""Launches that are made ready once, and the memory that the programs of a launch share."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fastloss.backends.contract import may_keep_memory
from fastloss.backends.recorder import Compiled, recorder
from fastloss.backends.short_road import known, open_for
from fastloss.backends.torch_private import current_gpu, stream_is_captured, without_dispatch

from .arguments import Strided

__all__ = ["Launch", "Memory", "alike", "forget", "launch", "on_device", "scratch"]


class Launch:
    """A kernel, its grid and its constants, made ready to be started again and again.

    At each launch Triton examines every argument for what it may compile in: dtypes, ints that are 1 or a multiple of
    16, addresses that are a multiple of 16. That is most of a launch's host time, and the result is the same for
    arguments that are alike in all of that. The caller promises that all arguments of a ``Launch`` are: only the
    first start examines them.

    Args:
        numbers: the last arguments of every start, which hold no tensor.
    """

    __slots__ = ("_compiled", "_constants", "_kernel", "_numbers", "_start", "grid")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], constants: dict[str, object], numbers: tuple[object, ...] = ()
    ) -> None:
        self.grid, self._kernel, self._constants, self._numbers = grid, kernel, constants, numbers
        self._start: Callable[..., None] | None = None
        self._compiled: Compiled | None = None

    def __call__(self, *arguments: object) -> None:
        arguments += self._numbers
        recording = recorder()
        if recording is None:
            self.start(*arguments)
            return
        recording.started.append((self, arguments))
        with without_dispatch():
            self.start(*arguments)

    def start(self, *arguments: object) -> None:
        """Start the kernel with all of its arguments."""
        if self._compiled is not None and self._start is not None:
            self._start(*arguments, *self._compiled.constants)
            return
        compiled = self._kernel[self.grid](*arguments, **self._constants)
        if isinstance(compiled, CompiledKernel):  # the interpreter returns None; a compilation may still be running
            names = self._kernel.arg_names[len(arguments) :]
            constants = tuple(self._constants[name] for name in names)
            x, y, z = (*self.grid, 1, 1)[:3]
            self._start = compiled[x, y, z]
            self._compiled = Compiled(compiled.run, (x, y, z), compiled.function, compiled.packed_metadata, constants)

    def compiled(self) -> Compiled | None:
        """Return the compiled kernel, to be started by addresses; None in the interpreter.

        Raises:
            LookupError: it is not compiled yet.
        """
        if self._compiled is None and not knobs.runtime.interpret:
            raise LookupError
        return self._compiled


Ready = TypeVar("Ready")
_MOST_REMEMBERED = 1024
_memories: list[dict[Any, Any]] = [known]


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
    for memory in _memories:
        memory.clear()


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

    This is for callers that compute the arguments anew at each call; others keep the launch in a :class:`Memory`.
    """
    tensors = (a.ptr if isinstance(a, Strided) else a for a in arguments)
    device = next(a.device for a in tensors if isinstance(a, Tensor))
    key = (kernel, grid, device, tuple(map(_specialized, arguments)), tuple(constants.items()))
    _launches.get(key, lambda: Launch(kernel, grid, constants))(*arguments)


def scratch(device: torch.device, programs: int, counts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the memory for what the programs of a launch leave to the last one.

    That is ``(programs, 2)`` in float64 for sums, ``(programs, counts)`` in int32, and a counter: an int32 zero that
    the programs count up, and that the last of them sets back to zero.

    Launches on one stream follow each other and share all three. A CUDA graph may be replayed beside anything, so a
    captured launch gets its own; so does a launch in a compiled program, whose memory may belong to a pool in which
    nothing may stay behind.
    """
    stream = _lasting_stream(device.index if device.type == "cuda" else -1)
    if stream is None:
        return _scratch_of.__wrapped__(stream, device, programs, counts)
    recording = recorder()
    if recording is None:
        return _scratch_of(stream, device, programs, counts)
    with without_dispatch():
        memory = _scratch_of(stream, device, programs, counts)
    recording.shared.append((functools.partial(scratch, device, programs, counts), memory))
    return memory


def _lasting_stream(gpu: int) -> int | None:
    """Return a GPU's current stream, or None if memory that its launches share may not be kept from call to call.

    Args:
        gpu: its number; -1 for a CPU, where, in the interpreter, a thread is a stream.
    """
    if not may_keep_memory.get():
        return None
    if gpu < 0:
        return threading.get_ident()
    return None if stream_is_captured() else int(driver.active.get_current_stream(gpu))


def _stream_to_replay(gpu: int) -> int | None:
    """Return the stream of a GPU's next launch; None where a launch takes more than its arguments."""
    runtime = knobs.runtime
    if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or (gpu >= 0 and gpu != current_gpu()):
        return None
    return _lasting_stream(gpu)


@functools.lru_cache(256)
def _scratch_of(
    stream: int | None, device: torch.device, programs: int, counts: int
) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.empty((programs, 2), dtype=torch.float64, device=device)
    of_counts = torch.empty((programs, counts), dtype=torch.int32, device=device)
    return sums, of_counts, torch.zeros(1, dtype=torch.int32, device=device)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the tensor's own GPU, whichever is current."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


open_for(_stream_to_replay)
