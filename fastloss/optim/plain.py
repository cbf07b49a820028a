"""SGD in torch's own operators, one parameter after the other.

It serves where the backends don't: sparse and complex gradients, tensor subclasses, parameters that overlap, other
devices; and programs that differentiate or compile the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.contract import SGDRule, compute_dtype
from ..backends.eager.rounding import (
    compensated,
    round_stochastically,
    round_to_nearest,
    true_master,
    without_infinities,
)
from ..backends.eager.sgd import multiply
from ..backends.torch_private import is_fake, sparse_values
from ..ranks.placements import is_dtensor, placed_as

__all__ = ["norm", "step", "unscale"]


def norm(grad: Tensor) -> Tensor:
    """Return |g|, ``()``, float64 where the device has it; over all shards of a DTensor."""
    values = grad.coalesce().values() if grad.is_sparse else grad
    wide = compute_dtype(values.dtype) if values.is_floating_point() else None  # complex numbers have 32 bits or more
    result = torch.linalg.vector_norm(values, dtype=wide)
    if is_dtensor(grad):  # under a compiler the result does not say that it is one
        result = result.full_tensor()  # type: ignore[attr-defined]
    elif type(result) is not Tensor and not is_fake(result):  # another subclass's: the backends take plain tensors
        result = torch.full((), result.item(), dtype=result.dtype, device=result.device)
    return result if result.device.type == "mps" else result.double()


def unscale(grad: Tensor, grad_scale: Tensor) -> None:
    """Divide a gradient by the loss scale in place: g ← g / grad_scale, in float32 and rounded once."""
    values = sparse_values(grad) if grad.is_sparse else grad
    if values.is_complex():
        values = torch.view_as_real(values.conj() if values.is_conj() else values)  # the factor is real
    inverse = grad_scale.double().reciprocal().float().to(values.device)
    multiply([values], inverse)


def step(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    rule: SGDRule,
    rounding: str,
    *,
    clip: Tensor | None = None,
    momentum_dtype: torch.dtype | None = None,
    out_of_place: bool = False,
    seed: Tensor | None = None,
) -> None:
    """Step one parameter; its buffers are in ``state``, and are made where they are missing.

    Args:
        param: any tensor that torch's operators work on.
        grad: of its shape; may be sparse.
        state: holds ``momentum_buffer``, and ``master_param`` or ``kahan_comp`` after ``rounding``.
        rule: of its group.
        rounding: as in :class:`fastloss.backends.contract.SGDBatch`.
        clip: the gradient is multiplied by it.
        momentum_dtype: the dtype of a momentum buffer that is made here; None is the parameter's own.
        out_of_place: buffers are replaced by new tensors, so that autograd can go back through many steps.
        seed: of stochastic rounding, as in :class:`fastloss.backends.contract.SGDBatch`.
    """
    wide = _wide(param, state, rounding)
    grad = grad if grad.dtype == wide.dtype or grad.is_complex() else grad.to(wide.dtype)
    if clip is not None:
        grad = grad * clip.to(device=grad.device, dtype=grad.dtype)
    if rule.maximize:
        grad = -grad
    lr, momentum, decay = (_on(value, wide) for value in (rule.lr, rule.momentum, rule.weight_decay))

    if rule.decoupled:
        if isinstance(decay, Tensor) or decay != 0:
            wide.mul_(1 - lr * decay)
    elif isinstance(decay, Tensor):
        grad = grad + (wide.clone() if decay.requires_grad else wide) * decay
    elif decay != 0:
        grad = grad.add(wide, alpha=decay)

    if isinstance(momentum, Tensor) or momentum != 0:
        buffer = state.get("momentum_buffer")
        if buffer is None:
            value = grad.clone()
            dtype = param.dtype if momentum_dtype is None or param.is_complex() else momentum_dtype
            state["momentum_buffer"] = value.to(dtype)
        elif out_of_place:
            value = buffer * momentum + grad * (1 - rule.dampening)
            state["momentum_buffer"] = value.to(buffer.dtype)
        else:
            value = _add(buffer.to(grad.dtype).mul_(momentum), grad, 1 - rule.dampening)
            if value is not buffer:
                buffer.copy_(value)
        grad = grad + value * momentum if rule.nesterov else value

    if isinstance(lr, Tensor):
        if lr.requires_grad:
            wide.addcmul_(grad, lr, value=-1)
        else:
            _add(wide, grad * lr, -1)
    else:
        _add(wide, grad, -lr)
    _store(param, wide, state, rounding, seed)


def _add(tensor: Tensor, other: Tensor, factor: float) -> Tensor:
    """Add in place: tensor ← tensor + factor · other.

    On a CPU torch adds a sparse tensor without dense dimensions to memory at twice the storage offset of the other.
    """
    if other.is_sparse and other.dense_dim() == 0 and tensor.storage_offset() != 0:
        return tensor.copy_(tensor.add(other, alpha=factor))
    return tensor.add_(other, alpha=factor)


def _wide(param: Tensor, state: dict[str, Any], rounding: str) -> Tensor:
    """Return the parameter in the dtype of the arithmetic: itself, or in float32 if it has 16 bits."""
    if not param.is_floating_point() or param.dtype.itemsize >= 4:
        return param
    if rounding == "master":
        if "master_param" not in state:
            state["master_param"] = param.detach().float()
        master: Tensor = state["master_param"]
        return master.copy_(true_master(master, param))
    if rounding == "kahan" and "kahan_comp" in state:
        return compensated(param, state["kahan_comp"])
    return param.to(compute_dtype(param.dtype))


def _store(param: Tensor, wide: Tensor, state: dict[str, Any], rounding: str, seed: Tensor | None) -> None:
    if wide is param:
        return
    if rounding == "stochastic":
        shard: Any = wide.to_local() if is_dtensor(wide) else wide  # type: ignore[attr-defined]
        rounded = round_stochastically(shard, param.dtype, seed)
        param.copy_(placed_as(rounded, wide) if is_dtensor(wide) else rounded)
        return
    if rounding == "kahan":
        stored = round_to_nearest(wide, param.dtype)
        param.copy_(stored)
        state["kahan_comp"] = without_infinities(wide - stored).to(param.dtype)
    else:
        param.copy_(wide)


def _on(value: float | Tensor, param: Tensor) -> Any:
    """Return a hyper-parameter on the parameter's device, so that the host never waits for it."""
    if not isinstance(value, Tensor):
        return value
    if value.device == param.device or value.requires_grad:
        return value.reshape(())
    return value.item() if value.device.type == "cpu" else value.reshape(()).to(param.device)
