"""The short road: a call that is like an earlier one starts the earlier one's kernels, with its own addresses.

The long road checks a call, chooses a backend and plans its launches. A recorder (:mod:`fastloss.backends.recorder`)
watches it: the memory that it allocates and the kernels that it starts. If it does nothing else, that is all the work
of the call, and the recorder writes a function that does the same for other tensors. The first call of a key takes
the long road, the second one is recorded, and those that follow are replayed. (The road opens when the kernels are
imported, by a process's first call.) Where the long road does anything more (it copies a tensor, say), nothing is
replayed, and every call takes it. A replayed call has an autograd node of its own. It saves the tensors that the long
road's node saves; its backward pass is replayed alike, or done by the long road's node.

The key of a call holds:

======================================= ==============================================================================
entry                                   it decides
======================================= ==============================================================================
the function, the options, their types  checks and formulas (1, 1.0 and True are equal, but not all are taken); with
                                        ``inplace``, whether the input may be written over
shape, strides, dtype and device of     checks, tiles, the kernels' form
each tensor, or None (of a scalar for
logits: no strides, and its name)
address modulo 16                       the kernels' form: the width of accesses
the negative bit                        whether memory holds the values
``requires_grad``, ``is_grad_enabled``  the gradients that are written, and whether there is a graph
autocast                                the loss's dtype
``use_backend``, ``FASTLOSS_BACKEND``   the backend
======================================= ==============================================================================

Some calls take the long road whatever their key: those with tensors of a subclass, or with options that are tensors
(but for ``logit_scale`` and ``temperature``) or other objects that can be written to; those under function modes
(``torch.set_default_device`` is one), dispatch modes, transforms, tracers, compilers, forward-mode derivatives, hooks
of saved tensors, hooks of launches or ``FASTLOSS_VALIDATE``; and those on a stream that is captured into a graph, or
on a GPU that is not the current one.
A backward pass takes the long road where it is differentiated itself, where the graph is kept for another one, and
where there is an upstream gradient of the gradient. Else it is replayed, by the kinds of its upstream gradients and
by which of them share their memory.

The long road reads nothing else. It sees no number of a tensor on a GPU; on a CPU, where the host looks at labels,
the short road does too. It hands addresses to kernels, and looks at their alignment alone. From call to call it
remembers the memory that the programs of a launch share, one for each stream, and the short road takes that of its
stream.

``FASTLOSS_SHORT_ROAD=0`` in the environment turns the short road off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import Function

from . import choice
from .recorder import Recorder
from .torch_private import (
    any_autocast,
    apply_of,
    dispatch_mode_count,
    forward_mode_is_active,
    function_mode_count,
    graph_is_kept,
    saved_tensor_hooks,
    tracing_state,
    transforms_are_active,
)

__all__ = ["Call", "is_open", "known", "open_for", "place_of", "replayed", "serve"]

_MOST_KNOWN = 1024  # keys; at more, all are forgotten
_MOST_UPSTREAMS = 16  # kinds of upstream gradients of one key
_MOST_TRIES = 3  # recordings of one key
_TYPES = (Tensor, torch.nn.Parameter)
# The types of options. (A tensor is equal to itself, whatever has been written to it.)
_PLAIN = {bool, int, float, str, type(None)}

_BACKEND, _SHORT_ROAD = map(choice.encoded, ("FASTLOSS_BACKEND", "FASTLOSS_SHORT_ROAD"))

known: dict[Any, Call] = {}
is_open = False  # calls may be recorded and replayed
_stream_of: Callable[[int], int | None] = lambda device: None  # noqa: E731


def open_for(stream_of: Callable[[int], int | None]) -> None:
    """Record and replay calls from now on.

    Args:
        stream_of: returns the stream of a GPU's next launch, by the GPU's number, −1 for a CPU; None where launches
            can't be replayed now.
    """
    global _stream_of, is_open
    _stream_of, is_open = stream_of, True


def serve(
    input: Any,
    target: Any,
    weight: Any,
    options: tuple[Any, ...],
    logit_scale: Any = 1.0,
    temperature: Any = 1.0,
) -> tuple[Sequence[Any] | None, Call | None]:
    """Return the outputs of a call that is like one before, or None; and where to record the call, or None.

    For callers that have seen that the short road is open, and that no compiler traces them.

    Args:
        input, target, weight: tensors of a public function.
        options: the function's name, all of its other arguments, and all else that the long road asks of it.
        logit_scale, temperature: those of the options that may be tensors, whose numbers are no part of the key.
    """
    if input.__class__ not in _TYPES or target.__class__ not in _TYPES or _is_watched():
        return None, None
    scalars: tuple[Tensor, ...] = ()
    if not (logit_scale.__class__ is float is temperature.__class__):
        scalars = tuple([number for number in (logit_scale, temperature) if number.__class__ in _TYPES])
        options = tuple([None if option.__class__ in _TYPES else option for option in options])
    try:
        key, stream = _key(input, target, weight, options, scalars), _stream_of(input.get_device())
        call = known.get(key)
    except (AttributeError, RuntimeError, TypeError):  # arguments that the long road refuses, or no memory of its own
        return None, None
    if stream is None:
        return None, None
    if call is None:
        return None, _known(key) if _PLAIN.issuperset(map(type, options)) else None
    if call.forward is None:
        return None, call
    if call.check is not None:
        call.check(target, *scalars)
    return call.forward(input, target, weight, *scalars, stream), call


def replayed(options: tuple[Any, ...], inputs: Sequence[Tensor | None], run: Callable[[], Sequence[Any]]) -> Any:
    """Return the outputs of ``run()``, a part of the long road without a graph: replayed if it is like one before.

    Args:
        options: all that the part depends on beside its tensors. They are compared by ``==``: 1 is 1.0 and True.
        inputs: its tensors.
        run: returns its outputs: tensors that it allocates, or None.
    """
    if not is_open or _is_watched():
        return run()
    key = options, tuple([None if t is None else (t.shape, t.device, *_kind(t)) for t in inputs])
    stream = _stream_of(inputs[0].get_device())  # type: ignore[union-attr]
    if stream is None:
        return run()
    call = _known(key)
    return call.recorded(inputs, run) if call.forward is None else call.forward(*inputs, stream)


def _known(key: Any) -> Call:
    """Return what the calls of a key have in common."""
    call = known.get(key)
    if call is None:
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[key] = call = Call()
    return call


def _is_watched() -> bool:
    """Return True where something other than a key's entries may matter."""
    return bool(
        transforms_are_active()
        or dispatch_mode_count()
        or function_mode_count()
        or tracing_state() is not None
        or forward_mode_is_active()
        or saved_tensor_hooks(True) is not None
        or choice.validates()
        or (_SHORT_ROAD in choice.variables and os.environ["FASTLOSS_SHORT_ROAD"] == "0")
    )


def _key(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: tuple[Any, ...],
    scalars: tuple[Tensor, ...] = (),
) -> Any:
    """Return what must be equal for one call to be served by what another one left behind."""
    device = input.device
    return (
        tuple(map(type, options)),
        options,
        is_grad_enabled(),
        any_autocast() and torch.is_autocast_enabled(device.type),
        choice.forced.get(),
        choice.variables.get(_BACKEND),
        input.shape,
        input.stride(),
        input.dtype,
        device,
        input.data_ptr() & 15,
        input.is_neg(),
        input.requires_grad,
        target.shape,
        target.stride(),
        target.dtype,
        target.device,
        target.data_ptr() & 15,
        target.is_neg(),
        target.requires_grad,
        None if weight is None else (weight.shape, weight.device, weight.requires_grad, *_kind(weight)),
        tuple([(s.shape, s.device, s.requires_grad, *_kind(s)) for s in scalars]) if scalars else (),
    )


class Call:
    """All that the calls of one key have in common."""

    __slots__ = ("check", "forward", "texts", "tries")

    def __init__(self) -> None:
        self.tries = 0
        # Of the values of the target and the scalars, where the host may look at them.
        self.check: Callable[..., None] | None = None
        self.forward: Callable[..., Any] | None = None  # (input, target, weight, *scalars, stream) → outputs
        self.texts: list[str] = []  # of what is replayed, for people

    def recorded(self, inputs: Sequence[Tensor | None], run: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """Return the outputs of ``run()``, and keep what it did, from the second call on.

        Args:
            inputs: the tensors of the public function.
            run: an autograd function's ``apply``, or a function without a graph.
        """
        self.tries += 1
        if not 1 < self.tries <= 1 + _MOST_TRIES:
            return run()
        with Recorder(inputs) as recorder:
            outputs = run()
        node = outputs[0].grad_fn
        replay = recorder.replay(outputs, node)
        if replay is not None:  # another thread may have recorded one
            self.texts = [str(replay.__doc__)]
            device = outputs[0].get_device()
            self.forward = replay if node is None else _function(replay, node, device, self.texts)
        return outputs


def _function(replay: Callable[..., Any], node: Any, device: int, texts: list[str]) -> Callable[..., Any]:
    """Return ``apply`` of an autograd function: (input, target, weight, *scalars, stream) → the long road's outputs.

    Args:
        replay: its forward pass.
        node: the long road's node, whose function does the backward passes that are not replayed. ``replayed`` of its
            first outputs may have upstream gradients in those that are.
        device: the number of the GPU.
        texts: takes those of replayed backward passes.
    """
    function, attributes = node._forward_cls, dict(vars(node))
    count = function.replayed
    for name in [name for name, value in attributes.items() if getattr(value, "of_each_call", False)]:
        del attributes[name]  # the forward pass makes its own
    replays: dict[Any, Callable[..., Any]] = {}  # of backward passes, by the kinds of their upstream gradients

    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        first, stream = upstreams[:count], None
        if not (
            (count < len(upstreams) and upstreams[count] is not None)
            or is_grad_enabled()
            or graph_is_kept()
            or transforms_are_active()
            or dispatch_mode_count()
        ):
            try:
                key = _kind(upstreams[0]) if count == 1 else _kinds(first)
                stream = _stream_of(device)
            except (AttributeError, RuntimeError):  # a batched upstream has no memory of its own
                pass
            if stream is not None and (replayed := replays.get(key)) is not None:
                return replayed(*first, *ctx.saved_tensors, stream)  # type: ignore[no-any-return]
        for name, value in attributes.items():
            setattr(ctx, name, value)
        if stream is None or len(replays) >= _MOST_UPSTREAMS:
            return function.backward(ctx, *upstreams)  # type: ignore[no-any-return]
        # An argument that lies in the memory of one before is taken for that one.
        distinct = [
            upstream if n == place else None
            for n, (upstream, place) in enumerate(zip(first, _firsts(first), strict=True))
        ]
        with Recorder((*distinct, *ctx.saved_tensors)) as recorder:
            gradients = function.backward(ctx, *upstreams)
        recorded = recorder.replay((*gradients[:2], None, None, None, None))
        if recorded is not None:
            replays[key] = recorded
            texts.append(str(recorded.__doc__))
        return gradients  # type: ignore[no-any-return]

    methods = {"forward": staticmethod(replay), "backward": staticmethod(backward)}
    return apply_of(type(function.__name__, (Function,), methods))


def _kinds(upstreams: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return what must be equal for upstream gradients to be taken as others were."""
    kinds = [None if upstream is None else _kind(upstream) for upstream in upstreams]
    return (*kinds, *_firsts(upstreams))


def _firsts(upstreams: Sequence[Tensor | None]) -> list[int]:
    """Return for each the number of the first in the same memory, as the upstream gradients of a sum's terms are."""
    places = [None if upstream is None else upstream.data_ptr() for upstream in upstreams]
    return list(map(places.index, places))


def _kind(tensor: Any) -> tuple[Any, ...]:
    """Return what must be equal for one upstream gradient, of its output's shape, to be taken as another was."""
    return tensor.__class__, tensor.dtype, tensor.stride(), tensor.data_ptr() & 15, tensor.is_neg()


def place_of(input: Any) -> Any:
    """Return what decides whether a gradient may be written over the input."""
    base = input._base if isinstance(input, Tensor) and input._is_view() else None
    return isinstance(input, Tensor) and input.is_leaf, base is not None and base.is_leaf and base.requires_grad
