"""The operators that a recipe takes up, in the place of computing the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .recipe import Recipe

__all__ = ["RECORDED", "Recorded"]

# (recipe, the logits as a tensor without memory, the operator's other arguments) → the same of its result, or None
# where the logits have to be made. A result with the given tensor itself is the given logits themselves.
Recorded = tuple[Recipe, Tensor]
_Handler = Callable[[Callable[..., Any], Recipe, Tensor, tuple[Any, ...], dict[str, Any]], "Recorded | None"]


def _number(value: object) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and value and math.isfinite(value) else None  # type: ignore[arg-type]


def _factor(name: str) -> _Handler:
    def handler(
        function: Callable[..., Any], recipe: Recipe, meta: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Recorded | None:
        number = _number(args[0]) if len(args) == 1 and not kwargs else None
        if number is None:
            return None
        return replace(recipe, steps=(*recipe.steps, (name, number))), torch.empty_like(meta)

    return handler


def _tanh(
    function: Callable[..., Any], recipe: Recipe, meta: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Recorded | None:
    if args or kwargs:
        return None
    return replace(recipe, steps=(*recipe.steps, ("tanh", None))), torch.empty_like(meta)


def _cast(
    function: Callable[..., Any], recipe: Recipe, meta: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Recorded | None:
    values = [*args, *(kwargs.pop(name) for name in ("dtype", "device") if name in kwargs)]
    dtypes = [value for value in values if isinstance(value, torch.dtype)]
    devices = [torch.device(value) for value in values if isinstance(value, (torch.device, str))]
    if kwargs or len(dtypes) + len(devices) < len(values) or any(d != recipe.x.device for d in devices):
        return None
    out = meta.to(dtypes[0]) if dtypes else (meta if function is Tensor.to else function(meta))
    if out.dtype == meta.dtype:
        return recipe, meta
    return (replace(recipe, steps=(*recipe.steps, ("to", out.dtype))), out) if out.is_floating_point() else None


def _bias(
    function: Callable[..., Any], recipe: Recipe, meta: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Recorded | None:
    other: Any = args[0] if len(args) == 1 and not kwargs else None
    if (
        type(other) not in (Tensor, torch.nn.Parameter)
        or recipe.bias is not None
        or recipe.steps
        or not recipe.classes_last
        or other.dim() > meta.dim()
        or other.shape[-1:] != meta.shape[-1:]
        or other.numel() != meta.shape[-1]
        or other.dtype != recipe.dtype
        or other.device != recipe.x.device
        or other.is_inference()
    ):
        return None
    bias: Tensor = other
    return replace(recipe, bias=bias.reshape(-1), origin=recipe.origin.joined_by(bias)), torch.empty_like(meta)


def _same(
    function: Callable[..., Any], recipe: Recipe, meta: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Recorded | None:
    """Take up ``contiguous`` and ``clone``: the same numbers in other memory, or in the same."""
    out = function(meta, *args, **kwargs)
    return recipe, (meta if out is meta else out)


def _detach(
    function: Callable[..., Any], recipe: Recipe, meta: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Recorded | None:
    return recipe.detached(), meta.detach()


def _view(
    function: Callable[..., Any], recipe: Recipe, meta: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Recorded | None:
    if not recipe.classes_last or any(isinstance(a, (torch.dtype, Tensor)) for a in (*args, *kwargs.values())):
        return None
    if not meta.numel():
        return None
    out = function(meta, *args, **kwargs)
    if not out.dim() or out.shape[-1] != meta.shape[-1]:
        return None
    x = recipe.x.reshape(*out.shape[:-1], recipe.x.shape[-1])
    return replace(recipe, x=x, class_dim=x.dim() - 1), out


def _permuted(
    function: Callable[..., Any], recipe: Recipe, meta: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Recorded | None:
    """Take up an operator that puts the dimensions in another order."""
    if meta.dim() < 2:
        return None
    # A tensor whose sizes are all different shows the order.
    marks = torch.empty([n + 2 for n in range(meta.dim())], device="meta")
    order = [n - 2 for n in function(marks, *args, **kwargs).shape]
    rows = [d if d < recipe.class_dim else d - 1 for d in order if d != recipe.class_dim]
    x = recipe.x.permute(*rows, recipe.x.dim() - 1)
    return replace(recipe, x=x, class_dim=order.index(recipe.class_dim)), function(meta, *args, **kwargs)


def _index(
    function: Callable[..., Any], recipe: Recipe, meta: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Recorded | None:
    index = args[0] if isinstance(args[0], tuple) else args
    if kwargs or not recipe.classes_last or not all(_is_plain_index(i, recipe.x.device) for i in index):
        return None
    widths = [0 if i is None or i is Ellipsis else i.dim() if _is_mask(i) else 1 for i in index]
    free = [slice(None)] * (meta.dim() - sum(widths))
    at = [n for n, i in enumerate(index) if i is Ellipsis]
    if len(at) > 1 or len(free) + sum(widths) != meta.dim():
        return None
    index = (*index[: at[0]], *free, *index[at[0] + 1 :]) if at else (*index, *free)
    of_rows, of_classes = index[:-1], index[-1]
    if not isinstance(of_classes, slice) or of_classes.step not in (None, 1):
        return None
    x = recipe.x.__getitem__((*of_rows, slice(None)))
    whole = of_classes == slice(None)
    weight = recipe.weight if whole else recipe.weight[of_classes]
    bias = recipe.bias if whole or recipe.bias is None else recipe.bias[of_classes]
    shape = (*x.shape[:-1], weight.shape[0])
    if any(isinstance(i, Tensor) for i in of_rows):
        out = torch.empty(shape, dtype=meta.dtype, device="meta")
    else:
        out = meta[index]
    if out.shape != shape:
        return None
    return replace(recipe, x=x, weight=weight, bias=bias, class_dim=x.dim() - 1), out


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _is_plain_index(index: object, device: torch.device) -> bool:
    if isinstance(index, Tensor):
        fits = type(index) is Tensor and index.dtype in (torch.int64, torch.bool)
        return fits and (index.device == device or index.device.type == "cpu")
    if isinstance(index, slice):
        return all(n is None or isinstance(n, int) for n in (index.start, index.stop, index.step))
    return index is None or index is Ellipsis or (isinstance(index, int) and not isinstance(index, bool))


def _table() -> dict[Any, _Handler]:
    names: dict[_Handler, tuple[str, ...]] = {
        _factor("times"): ("mul", "multiply", "__mul__", "__rmul__"),
        _factor("over"): ("div", "divide", "true_divide", "__truediv__"),
        _tanh: ("tanh",),
        _bias: ("add", "__add__", "__radd__"),
        _cast: ("to", "float", "double", "half", "bfloat16"),
        _same: ("contiguous", "clone"),
        _detach: ("detach",),
        _view: ("view", "reshape", "flatten", "unflatten"),
        _permuted: ("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis"),
        _index: ("__getitem__",),
    }
    table: dict[Any, _Handler] = {F.tanh: _tanh, Tensor.mT.__get__: _permuted}  # type: ignore[attr-defined]
    for handler, group in names.items():
        for name in group:
            for owner in (torch, Tensor):
                if callable(getattr(owner, name, None)):
                    table[getattr(owner, name)] = handler
    return table


RECORDED = _table()
