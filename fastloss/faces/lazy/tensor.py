"""The tensor that a lazy head returns."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from ...backends.torch_private import disable_dynamo, tree_flatten, tree_map, without_subclasses, wrapper_subclass
from .fused import FUSED
from .recipe import Recipe
from .recorded import RECORDED

__all__ = ["LazyLogits", "Listener", "lazy_logits"]


class Listener(Protocol):
    """What is told what becomes of the logits."""

    def count_fused(self) -> None:
        """Count a call that was served without logits."""

    def count_made(self, operator: str) -> None:
        """Count logits that were made, for an operator."""


class _Memory:
    """The memory that some lazy tensors stand for. One of them may be written to, and the others are void then."""

    def __init__(self) -> None:
        self.writer: LazyLogits | None = None
        self.made: list[
            tuple[Tensor, int]
        ] = []  # elements of its tensors, and the writes that they had seen when made

    def is_void_for(self, value: Tensor | None) -> bool:
        """Return True if others than the tensor with these elements were written to."""
        if self.writer is not None and (value is None or self.writer._value is not value):
            return True
        return any(other is not value and other._version != version for other, version in self.made)


class LazyLogits(Tensor):
    """Logits without memory, whose elements are computed when an operator needs them.

    Operators that a recipe takes up return another lazy tensor; losses are served from the hidden states. All others
    compute the logits, as the model would have, and take them; from then on the tensor passes everything on to them.
    """

    stands_for_elements = True

    _recipe: Recipe
    _meta: Tensor  # the same tensor on the device "meta": the strides, and whose memory is whose
    _memory: _Memory
    _listener: Listener
    _node: Any  # the autograd node that it was made with
    _value: Tensor | None
    _is_used: bool  # True: a gradient goes past its elements, to x and W
    _lock: threading.RLock  # type: ignore[valid-type]

    def materialize(self, operator: str = "materialize") -> Tensor:
        """Compute the logits, once and differentiably. Return them."""
        with without_subclasses(), self._lock:
            self._check_memory()
            if self._value is None:
                recipe = self._recipe
                recipe.origin.check()
                self._listener.count_made(operator)
                with torch.inference_mode(False), torch.set_grad_enabled(self._node is not None):
                    value = recipe.logits(recipe.x, recipe.weight, recipe.bias)
                    # What may be viewed must stay so: a permuted tensor has its strides.
                    if value.stride() != torch.empty_like(self._meta).stride():
                        value = torch.empty_like(self._meta, device=value.device).copy_(value)
                if self._is_handed_on():
                    with torch.inference_mode(False), torch.enable_grad():
                        value = _Elements.apply(self, value)
                self._value = value
                self._memory.made.append((value, value._version))
            return self._value

    def _is_handed_on(self) -> bool:
        """Return True if an ``autograd.Function`` returned it, so that its gradient takes another way."""
        with without_subclasses():
            return self.grad_fn is not self._node or self.requires_grad != (self._node is not None)

    def _check_memory(self) -> None:
        if self._memory.is_void_for(self._value):
            raise RuntimeError(
                "fastloss: logits are read whose memory was written to in place through another view of them; "
                "expected a write before the view, or out of place (masked_fill for masked_fill_), or report.undo() "
                "of fastloss.without_logits(model)"
            )

    def __repr__(  # type: ignore[override]
        self, *, tensor_contents: Any = None
    ) -> str:
        with without_subclasses():
            if self._value is not None:
                return repr(self._value)
            return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    @disable_dynamo  # compiled code that is given lazy logits breaks its graph at what is done to them
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Take up an operator, serve a loss, or make the logits."""
        kwargs = dict(kwargs or {})
        first = args[0] if args else kwargs.get("input")
        if isinstance(first, LazyLogits) and first._value is None:
            if func in _METADATA:
                with without_subclasses():
                    return func(*args, **kwargs)
            result = _without_elements(func, first, args, kwargs)
        elif len(args) == 2 and isinstance(args[1], LazyLogits) and func in _SYMMETRIC and not kwargs:
            result = _without_elements(func, args[1], (args[1], first), kwargs) if args[1]._value is None else None
        else:
            result = None
        return _with_elements(func, args, kwargs) if result is None else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Serve what does not see ``__torch_function__``: autograd itself, C++, compiled operators."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            given = args[0]
            return _wrapped(given._recipe.detached(), given._meta, given._memory, given._listener)
        if func._schema.is_mutable:
            raise RuntimeError(
                f"fastloss: {func} writes to logits that were not made; expected logits + 0, or report.undo() of "
                "fastloss.without_logits(model)"
            )
        args, kwargs = tree_map(
            lambda a: a.materialize(str(func)).detach() if isinstance(a, LazyLogits) else a, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def lazy_logits(recipe: Recipe, meta: Tensor, memory: _Memory | None, listener: Listener) -> LazyLogits:
    """Return the tensor of a recipe: with a gradient, if gradients are recorded and the recipe's tensors have one.

    Args:
        recipe: how the logits are made.
        meta: the logits on the device "meta".
        memory: that of the logits that these are a view of.
        listener: is told what becomes of them.
    """
    memory = _Memory() if memory is None else memory
    if not (torch.is_grad_enabled() and recipe.requires_grad()):
        return _wrapped(recipe.detached(), meta, memory, listener)
    lazy: LazyLogits = _Deferred.apply(recipe.x, recipe.weight, recipe.bias, recipe, meta, memory, listener)
    with without_subclasses():
        lazy._node = lazy.grad_fn
    return lazy


def _wrapped(recipe: Recipe, meta: Tensor, memory: _Memory, listener: Listener) -> LazyLogits:
    with without_subclasses():
        lazy = wrapper_subclass(
            LazyLogits,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=recipe.x.device,
        )
    lazy._recipe, lazy._meta, lazy._memory, lazy._listener = recipe, meta, memory, listener
    lazy._node, lazy._value, lazy._is_used, lazy._lock = None, None, False, threading.RLock()
    return lazy  # type: ignore[no-any-return]


class _Deferred(torch.autograd.Function):
    """Gives lazy logits a node, for what takes their gradient without their elements."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        recipe: Recipe,
        meta: Tensor,
        memory: _Memory,
        listener: Listener,
    ) -> LazyLogits:
        ctx.recipe, ctx.memory = recipe, memory
        ctx.set_materialize_grads(False)
        return _wrapped(recipe, meta, memory, listener)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        recipe = ctx.recipe
        recipe.origin.check()
        if ctx.memory.is_void_for(None):
            raise RuntimeError(
                "fastloss: logits were written to in place, and then taken by code that does not see the write; "
                "expected a write out of place, or report.undo() of fastloss.without_logits(model)"
            )
        tensors = [
            None if t is None else t.detach().requires_grad_(needed)
            for t, needed in zip((recipe.x, recipe.weight, recipe.bias), ctx.needs_input_grad, strict=False)
        ]
        with torch.enable_grad():
            logits = recipe.logits(*tensors)
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        grads = iter(torch.autograd.grad(logits, wanted, upstream))
        return (*(next(grads) if t is not None and t.requires_grad else None for t in tensors), *[None] * 4)


class _Elements(torch.autograd.Function):
    """Takes the elements for the lazy tensor; their gradient is its gradient."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


def _without_elements(
    func: Callable[..., Any], lazy: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return the operator's result, or None if it needs the elements."""
    if lazy._is_handed_on() or lazy._memory.is_void_for(None) or "out" in kwargs:
        return None
    recipe, meta = lazy._recipe, lazy._meta
    others, _ = tree_flatten((args[1:], kwargs))
    if any(isinstance(other, LazyLogits) and other is not lazy for other in others):
        return None
    handler = RECORDED.get(func)
    if handler is not None and args:
        recipe.origin.check()
        with torch.autocast(recipe.x.device.type, enabled=False):
            recorded = handler(func, recipe, meta, args[1:], dict(kwargs))
        if recorded is None:
            return None
        recipe, out = recorded
        if out is meta and recipe is lazy._recipe:
            return lazy
        lazy._is_used |= torch.is_grad_enabled() and lazy._node is not None and func not in _DETACHING
        is_view = out.untyped_storage()._cdata == meta.untyped_storage()._cdata
        return lazy_logits(recipe, out, lazy._memory if is_view else None, lazy._listener)
    if func not in FUSED:
        return None
    serve, names = FUSED[func]
    if len(args) > len(names):
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    given.pop("input")
    recipe.origin.check()
    # Gradients are recorded as the logits have them: logits that were made without one have none.
    result = serve(recipe if lazy._node is not None else recipe.detached(), meta.dtype, given)
    if result is NotImplemented:
        return None
    lazy._is_used |= torch.is_grad_enabled() and lazy._node is not None and func not in _DETACHING
    lazy._listener.count_fused()
    return result


def _with_elements(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the operator with the logits. A write to them makes all other views of the lazy tensor void."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        name = getattr(func.__self__, "__name__", name)  # type: ignore[attr-defined]
    name = name if isinstance(name, str) else str(func)
    with without_subclasses():
        leaves, _ = tree_flatten((args, kwargs))
    lazies = [leaf for leaf in leaves if isinstance(leaf, LazyLogits)]
    if func in _OF_GRADIENTS and any(lazy._is_used for lazy in lazies):
        message = (
            f"fastloss: {name} is asked of logits from which a loss was computed without them, so that their "
            "gradient does not exist; expected this call before the logits are used, or report.undo() of "
            "fastloss.without_logits(model)"
        )
        if func is not Tensor.register_hook:  # wrappers that shard register hooks on all outputs
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=3)
    values = [lazy.materialize(name) for lazy in lazies]
    written = [None if value.is_inference() else value._version for value in values]
    args, kwargs = tree_map(lambda a: a.materialize(name) if isinstance(a, LazyLogits) else a, (args, kwargs))
    result = func(*args, **kwargs)
    for lazy, value, version in zip(lazies, values, written, strict=True):
        if version is not None and value._version != version:
            lazy._memory.writer = lazy
        if result is value:
            return lazy
    return result


_SYMMETRIC = {torch.mul, torch.multiply, torch.add, Tensor.add, Tensor.__add__, Tensor.mul}
_DETACHING = {Tensor.detach, torch.detach, torch.argmax, Tensor.argmax}
_OF_GRADIENTS = {torch.autograd.grad, Tensor.register_hook, Tensor.retain_grad}
# What is asked about a tensor and not about its elements.
_METADATA = {
    getattr(Tensor, name).__get__
    for name in (
        *("shape", "dtype", "device", "layout", "requires_grad", "ndim", "is_leaf", "is_cuda", "is_cpu", "is_sparse"),
        *("is_quantized", "is_meta", "is_nested", "is_mkldnn", "is_xpu", "is_mps", "itemsize", "nbytes", "_base"),
    )
} | {
    getattr(owner, name)
    for owner in (Tensor, torch)
    for name in (
        *("size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "is_contiguous"),
        *("stride", "element_size", "get_device", "is_inference", "is_signed", "__len__", "__hash__"),
        *("storage_offset",),
    )
    if hasattr(owner, name)
}
