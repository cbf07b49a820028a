"""A recorder of what a call does on the way to its launches, and the function that does it again.

It sees torch's operators as a dispatch mode, and :class:`fastloss.kernels.launch.Launch` tells it of the launches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .torch_private import DispatchMode

__all__ = ["Compiled", "Recorder", "recorder"]

_ALLOCATIONS = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default)
_MOST_STREAMS = 256
_thread = threading.local()


class Compiled(NamedTuple):
    """A kernel that is compiled, and all that is the same at each of its starts."""

    run: Callable[..., None]  # takes the grid, stream, function, metadata, three hooks, and then the arguments
    grid: tuple[int, int, int]
    function: Any
    metadata: Any
    constants: tuple[object, ...]  # the last of the arguments


def recorder() -> Recorder | None:
    """Return this thread's recorder, if a call is being recorded."""
    return getattr(_thread, "recorder", None)


class Recorder(DispatchMode):
    """Notes the memory that is allocated and the kernels that are started, and whether anything else is done."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.inputs = inputs  # of the call
        self.versions = list(map(_version, inputs))
        self.allocated: list[Tensor] = []
        self.started: list[tuple[Any, tuple[Any, ...]]] = []  # (launch, its arguments)
        self.shared: list[tuple[Callable[[], Sequence[Tensor]], Sequence[Tensor]]] = []  # (its maker, the memory)
        self.does_more = False

    def __enter__(self) -> Recorder:
        _thread.recorder = self
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *error: Any) -> None:
        _thread.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.allocated.append(result)
        elif not func.is_view:
            self.does_more = True

        return result

    def replay(self, returned: Sequence[Tensor | None], node: Any = None) -> Callable[..., Any] | None:
        """Return a function that does the same for other tensors; None if what was recorded can't be had that way.

        Args:
            returned: the results of the call: allocations, parts of them, or inputs that were written over.
            node: the autograd node that the call made, or None.

        Returns:
            ``(*inputs, stream)`` → the results. Beside a node it is the forward pass of an autograd function:
            ``(ctx, *inputs, stream)`` → the results; ``ctx`` saves the tensors that the node has saved. Its docstring
            is its text.
        """
        if self.does_more or not self.started:  # threads of the eager backend are not seen at work
            return None
        try:
            return _Program(self).compiled(returned, node)
        except LookupError:
            return None


class _Program:
    """The text of a function ``(*inputs, stream)`` that allocates and starts kernels, as a recorded call did.

    ``a0``, ``a1``, … are its inputs and allocations, ``shared`` the addresses of the memory that launches share, and
    ``c0``, ``c1``, … whatever is the same in each call.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.inputs = recorder, (inputs := recorder.inputs)
        self.interpreted = any(launch.compiled() is None for launch, _ in recorder.started)
        self.constants: dict[str, Any] = {"empty_like": torch.empty_like}
        self.names: dict[Any, str] = {}  # by dtype and address
        self.allocated = {f"a{n}": t for n, t in enumerate(recorder.allocated, len(inputs)) if t.numel() > 0}
        memory = [tensor for _, tensors in recorder.shared for tensor in tensors]
        self.given = [f"a{n}" for n in range(len(inputs))]
        names = [*self.given, *self.allocated, *(f"shared[{n}]" for n in range(len(memory)))]
        for name, tensor in zip(names, (*inputs, *self.allocated.values(), *memory), strict=True):
            if tensor is not None and self.names.setdefault(_address(tensor), name) != name:
                raise LookupError  # which of the two a kernel took can't be known

    def compiled(self, returned: Sequence[Tensor | None], node: Any) -> Callable[..., Any]:
        """Return the function."""
        shapes: dict[str, Tensor] = {}  # of allocations, as they are returned
        names = [self._result(tensor, shapes) for tensor in returned]
        # An input that was written over is returned as a tensor of its own.
        names = [f"{name}.detach()" if name.split(".")[0] in self.given else name for name in names]
        to_save = [] if node is None else [self._result(tensor, shapes) for tensor in node.saved_tensors]
        starts = [self._start(launch, arguments) for launch, arguments in self.recorder.started]
        lines = [f"def replay({', '.join([*(() if node is None else ('ctx',)), *self.given, 'stream'])}):"]
        for name, tensor in self.allocated.items():
            lines.append(f"{name} = empty_like({self._template(shapes.get(name, tensor))})")
        if self.recorder.shared:
            self.constants["share"] = _share([make for make, _ in self.recorder.shared], self.interpreted)
            lines.append("shared = share(stream)")
        for name, given, version in zip(self.given, self.inputs, self.recorder.versions, strict=True):
            if _version(given) != version:
                starts.append(f"{self._constant(torch.autograd.graph.increment_version)}({name})")
        if node is not None:
            starts += ["ctx.set_materialize_grads(False)", f"ctx.save_for_backward({', '.join(to_save)})"]
            for name, value in vars(node).items():
                if getattr(value, "of_each_call", False):
                    starts.append(f"ctx.{name} = {self._constant(type(value))}(a0)")
            constant = [n for n, tensor in enumerate(returned) if tensor is not None and tensor.grad_fn is None]
            for number in constant:
                starts.append(f"r{number} = {names[number]}")
                names[number] = f"r{number}"
            if constant:
                starts.append(f"ctx.mark_non_differentiable({', '.join(names[number] for number in constant)})")
        text = "\n    ".join([*lines, *starts, f"return {_tuple(names)}"])
        exec(text, self.constants)
        replay: Callable[..., Any] = self.constants["replay"]
        replay.__doc__ = text
        return replay

    def _result(self, result: Tensor | None, shapes: dict[str, Tensor]) -> str:
        if result is None:
            return "None"
        name = self.names.get(_address(result))
        if name is not None and name not in self.allocated:
            given = self.inputs[self.given.index(name)] if name in self.given else result
            if given is not None and given.shape == result.shape and given.stride() == result.stride():
                return name
            return f"{name}.as_strided({tuple(result.shape)}, {result.stride()})"  # flat labels, say
        for name, whole in self.allocated.items():
            offset = (result.data_ptr() - whole.data_ptr()) // whole.element_size()
            if result.dtype is whole.dtype and 0 <= offset < whole.numel():
                if result.numel() == whole.numel():
                    shapes[name] = result
                    return name
                return f"{name}.as_strided({tuple(result.shape)}, {result.stride()}, {offset})"
        raise LookupError

    def _template(self, result: Tensor) -> str:
        """Return the name of a tensor that ``empty_like`` makes this one of: an input, or one without memory."""
        for number, tensor in enumerate(self.inputs):
            if tensor is not None and tensor.dtype is result.dtype and tensor.shape == result.shape:
                like = torch.empty_strided(tensor.shape, tensor.stride(), device="meta")
                if torch.empty_like(like).stride() == result.stride():
                    return f"a{number}"
        if not result.is_contiguous():
            raise LookupError
        return self._constant(torch.empty((), dtype=result.dtype, device=result.device).expand(result.shape))

    def _start(self, launch: Any, arguments: tuple[Any, ...]) -> str:
        kernel, first = launch.compiled(), []
        if kernel is not None:
            hooks = [None] * 3
            first = [
                *map(str, kernel.grid),
                "stream",
                *map(self._constant, (kernel.function, kernel.metadata, *hooks)),
            ]
            arguments = (*arguments, *kernel.constants)
        run = self._constant(launch.start if kernel is None else kernel.run)
        return f"{run}({', '.join([*first, *map(self._argument, arguments)])})"

    def _argument(self, value: Any) -> str:
        if isinstance(value, Tensor):
            if value.numel() == 0:
                return self._constant(value) if self.interpreted else "0"
            name = self.names[_address(value)]
            return name if self.interpreted or name.startswith("shared") else f"{name}.data_ptr()"
        if not _has_memory(value):
            return self._constant(value)
        members = _tuple(list(map(self._argument, value)))
        return f"{self._constant(type(value)._make)}({members})" if self.interpreted else members

    def _constant(self, value: Any) -> str:
        if value is None or type(value) in (bool, int):
            return repr(value)
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name


def _tuple(members: Sequence[str]) -> str:
    return f"({''.join(f'{member}, ' for member in members)})"


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _has_memory(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(map(_has_memory, value)))


def _address(tensor: Tensor) -> tuple[torch.dtype, int]:
    return tensor.dtype, tensor.data_ptr()


def _share(makers: Sequence[Callable[[], Sequence[Tensor]]], interpreted: bool) -> Callable[[int], Sequence[Any]]:
    """Return a function of a stream that gives the addresses of the memory that its launches share.

    ``interpreted``: it gives the tensors.
    """
    known: dict[int, tuple[Sequence[Any], Sequence[Tensor]]] = {}

    def share(stream: int) -> Sequence[Any]:
        ready = known.get(stream)
        if ready is None:
            if len(known) >= _MOST_STREAMS:
                known.clear()
            memory = [tensor for make in makers for tensor in make()]
            ready = known[stream] = (memory if interpreted else [tensor.data_ptr() for tensor in memory], memory)
        return ready[0]

    return share
