"""Checks of a loaded state, and the dtypes of its buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..ranks.placements import is_dtensor

__all__ = ["check_loaded", "restore_dtypes"]

_BUFFERS = ("momentum_buffer", "master_param", "kahan_comp")


def check_loaded(loaded: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Check that the groups and buffers of a state dict fit an optimizer's groups.

    Raises:
        ValueError: they don't.
    """
    saved = loaded["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"it has {len(saved)}, the optimizer has {len(groups)}"
        )
    for g, (saved_group, group) in enumerate(zip(saved, groups, strict=True)):
        if len(saved_group["params"]) != len(group["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {g} has {len(saved_group['params'])} parameters, the optimizer's has {len(group['params'])}"
            )
    for number, param, _ in _numbered(saved, groups):
        for key, buffer in _buffers(loaded, number):
            if not isinstance(buffer, Tensor):
                raise ValueError(
                    f"loaded state dict: {key} of parameter {number} is a {type(buffer).__name__}, expected a tensor"
                )
            if buffer.shape != param.shape:
                raise ValueError(
                    f"loaded state dict: {key} of parameter {number} has shape {tuple(buffer.shape)}, "
                    f"but the parameter has shape {tuple(param.shape)}"
                )
            if is_dtensor(buffer) != is_dtensor(param):
                kinds = ["a DTensor" if is_dtensor(tensor) else "a plain tensor" for tensor in (buffer, param)]
                raise ValueError(
                    f"loaded state dict: {key} of parameter {number} is {kinds[0]}, but the parameter is {kinds[1]}; "
                    "expected one placed as the parameter, as torch.distributed.checkpoint.state_dict."
                    "set_optimizer_state_dict makes them"
                )


def restore_dtypes(optimizer: Optimizer, loaded: dict[str, Any]) -> None:
    """Give every buffer the dtype that this optimizer has for it, from the loaded one.

    ``Optimizer.load_state_dict`` has cast it to its parameter's dtype, which a float32 momentum does not survive.
    """
    for number, param, group in _numbered(loaded["param_groups"], optimizer.param_groups):
        for key, buffer in _buffers(loaded, number):
            dtype = param.dtype
            if key == "master_param":
                dtype = torch.float32
            elif key == "momentum_buffer" and param.is_floating_point():
                dtype = group["momentum_dtype"] or dtype
            if buffer.dtype != param.dtype or dtype != param.dtype:
                optimizer.state[param][key] = buffer.detach().to(param.device, dtype, copy=True)


def _numbered(
    saved: list[dict[str, Any]], groups: list[dict[str, Any]]
) -> Iterator[tuple[Any, Tensor, dict[str, Any]]]:
    """Yield the numbers of the parameters in a state dict, the parameters, and their groups."""
    for saved_group, group in zip(saved, groups, strict=True):
        for number, param in zip(saved_group["params"], group["params"], strict=True):
            yield number, param, group


def _buffers(loaded: dict[str, Any], number: Any) -> list[tuple[str, Any]]:
    state = loaded["state"].get(number, {})
    return [(key, state[key]) for key in _BUFFERS if state.get(key) is not None]
