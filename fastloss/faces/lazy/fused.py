"""The functions of logits that are served from hidden states, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...linear.functional import linear_cross_entropy, linear_cross_entropy_with_accuracy
from ...linear.topk import linear_topk_log_probs
from ...loss.functional import accuracy, cross_entropy, cross_entropy_with_accuracy
from .recipe import Recipe

__all__ = ["FUSED"]

_NARROW = (torch.float16, torch.bfloat16)
_NAMES = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
# Arguments of fastloss's losses that the linear ones have too.
_SHARED = {"weight", "ignore_index", "reduction", "label_smoothing", "lse_square_scale", "topk"}


def _tensors(recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of a linear function that stand for the logits."""
    x, weight, bias = (None if t is None else t.to(recipe.dtype) for t in (recipe.x, recipe.weight, recipe.bias))
    given: dict[str, Any] = {"input": x, "linear_weight": weight, "linear_bias": bias}
    # The model's loss is in float32 where it casts the logits, or autocast does: so is this one, of exact logits.
    if recipe.dtype in _NARROW and dtype == torch.float32:
        given["logits_dtype"] = torch.float32
    return given


def _labels_fit(recipe: Recipe, target: object) -> bool:
    """Return True if the labels are those of ``x``'s rows, the classes being where the loss looks for them."""
    dims = recipe.x.dim()
    return (
        type(target) is Tensor
        and target.dtype == torch.int64
        and target.device == recipe.x.device
        and target.shape == recipe.x.shape[:-1]
        and recipe.class_dim == (0 if dims == 1 else 1)
        and recipe.weight.shape[0] > 0
        and target.numel() > 0
    )


def _loss(function: Callable[..., Any], recipe: Recipe, dtype: torch.dtype, given: dict[str, Any]) -> Any:
    target, options = given.pop("target", None), recipe.options()
    given = {name: value for name, value in given.items() if not _is_default(name, value)}
    if options is None or not _labels_fit(recipe, target) or set(given) - _SHARED:
        return NotImplemented
    if type(given.get("weight")) not in (type(None), Tensor, torch.nn.Parameter):
        return NotImplemented
    device = recipe.x.device.type
    if torch.is_autocast_enabled(device) and dtype in _NARROW:
        dtype = torch.float32
    if given.get("weight") is not None and given["weight"].dtype != dtype:
        return NotImplemented
    with torch.autocast(device, enabled=False):
        arguments = _tensors(recipe, dtype)
        if "weight" in given:
            arguments["weight"] = given.pop("weight")
        result = function(**arguments, target=target, **options, **given)
    return result


_DEFAULTS: dict[str, Any] = {
    "weight": None,
    "size_average": None,
    "reduce": None,
    "softcap": None,
    "group": None,
    "from_logits": True,
    "inplace": False,
    "logit_scale": 1.0,
    "temperature": 1.0,
}


def _is_default(name: str, value: object) -> bool:
    return name in _DEFAULTS and not isinstance(value, Tensor) and value == _DEFAULTS[name]


def _cross_entropy(recipe: Recipe, dtype: torch.dtype, given: dict[str, Any]) -> Any:
    return _loss(linear_cross_entropy, recipe, dtype, given)


def _with_accuracy(recipe: Recipe, dtype: torch.dtype, given: dict[str, Any]) -> Any:
    return _loss(linear_cross_entropy_with_accuracy, recipe, dtype, given)


def _accuracy(recipe: Recipe, dtype: torch.dtype, given: dict[str, Any]) -> Any:
    with torch.no_grad():
        result = _loss(linear_cross_entropy_with_accuracy, recipe.detached(), dtype, given)
    return result if result is NotImplemented else result.accuracy


def _argmax(recipe: Recipe, dtype: torch.dtype, given: dict[str, Any]) -> Any:
    dim, keepdim = given.pop("dim", None), given.pop("keepdim", False)
    last = recipe.x.dim() - 1
    if given or dim is None or dim not in (last, -1) or not recipe.classes_last or recipe.options() != {}:
        return NotImplemented
    if recipe.x.numel() == 0 or recipe.weight.shape[0] == 0:
        return NotImplemented
    arguments = _tensors(recipe.detached(), dtype)
    arguments.pop("logits_dtype", None)
    with torch.autocast(recipe.x.device.type, enabled=False):
        ids = linear_topk_log_probs(**arguments, k=1).ids
    return ids if keepdim else ids.squeeze(-1)


_LOSS, _ARGMAX = _NAMES, ("input", "dim", "keepdim")
# The function as it is called → what serves it, and the names of its arguments by position.
FUSED: dict[Any, tuple[Callable[[Recipe, torch.dtype, dict[str, Any]], Any], tuple[str, ...]]] = {
    F.cross_entropy: (_cross_entropy, _LOSS),
    torch.argmax: (_argmax, _ARGMAX),
    Tensor.argmax: (_argmax, _ARGMAX),
    cross_entropy: (_cross_entropy, _LOSS),
    cross_entropy_with_accuracy: (_with_accuracy, _LOSS),
    accuracy: (_accuracy, ("input", "target", "topk")),
}
