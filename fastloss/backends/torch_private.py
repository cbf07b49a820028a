"""The names of torch that it does not promise to keep, in one place.

===================================== ================================ =============================================
name of torch                         used for                         without it
===================================== ================================ =============================================
``_fused_sgd_``, ``_foreach_copy_``,  SGD on a CPU, in few calls       an error at the first step
``_foreach_mul``, ``_foreach_mul_``,
``_foreach_norm``,
``split_with_sizes_copy``
``_amp_foreach_non_finite_check_...`` division by a GradScaler's scale an error at that step
``Tensor._is_zerotensor``             gradients without memory         an error at the first step
``_C._nn.flatten_dense_tensors``,     SGD's small tensors of 16 bits   an error at import
``unflatten_dense_tensors``
``Tensor._values``                    sparse gradients                 an error at that step
``_C._dynamo.guards.TensorGuards``    "nothing has changed" in C       every step compares attribute by attribute
``_C._are_functorch_transforms_...``  not to read numbers under vmap   an error at import
``profiler._is_profiler_enabled``     no label for profilers that are  every step has its label
                                      not there
``optimizer._global_optimizer_...``,  no calls of hooks that are not   every step looks for hooks
``Optimizer._optimizer_step_...``     there
``torch._disable_dynamo``             losses over ranks stay eager     an error at import
``_functorch.is_legacy_batched...``   batched gradients                an error at import
``_get_current_graph_task_keep_...``  not to hand a gradient over      every gradient is copied
                                      twice
``_len_torch_dispatch_stack``,        calls under dispatch modes       an error at import
``_C._DisableTorchDispatch``,
``_C.DisableTorchFunction...``
``_get_current_dispatch_mode_stack``,
``utils._python_dispatch``
``Tensor._make_wrapper_subclass``,    logits without memory            an error at import
``utils._pytree``
``forward_ad._current_level``         forward-mode derivatives         an error at the first call
``_is_any_autocast_enabled``,         the short road, chunks           an error at import
``_len_torch_function_stack``,
``_top_saved_tensors_default_hooks``,
``_get_tracing_state``
``_C._cuda_getDevice``,               launches in less time            torch's own functions
``_C._cuda_isCurrentStream...``
``_C._FunctionBase.apply``            autograd nodes in less time      an error at import
``compiler._is_exporting_flag``       to tell compilers from export    torch's own answer
``symbolic_shapes.has_static_value``  floats that vary from call to    a graph for each value of an option
                                      call of a compiled program
``nn._reduction.legacy_get_string``   ``size_average`` and ``reduce``  an error at import
``_tensors_data_ptrs_at_indices_...`` to compare addresses in C        a comparison in Python
``_functional_collectives``           collectives                      an error at the first of them
``DeviceMesh._get_root_mesh``,        one all-reduce for several       an all-reduce for each mesh and dimension
``DeviceMesh._flatten_mapping``       meshes
``DTensor._local_tensor``             a plan of DTensors that holds    an error at their first step
``fake_tensor.FakeTensor``            norms of fake tensors            an error at a fake step with ``max_norm``
``GradScaler._maybe_opt_step`` and    to unscale in the step where     ``GradScaler`` unscales, before the step
others, see ``unscales_by_step``      nothing else would notice
``Parameter._fsdp_flattened``         an error for ``max_norm`` on     each process clips by its own norm
                                      parameters of FSDP1
===================================== ================================ =============================================
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.autograd import Function, forward_ad, profiler
from torch.nn import _reduction
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten, tree_map

try:
    from torch._C._dynamo import guards as _guards
except ImportError:
    _guards = None  # type: ignore[assignment]

__all__ = [
    "DispatchMode",
    "any_autocast",
    "apply_of",
    "are_constants",
    "current_gpu",
    "disable_dynamo",
    "dispatch_mode_count",
    "dispatch_modes",
    "flatten",
    "flattened_meshes",
    "foreach_copy_",
    "foreach_mul",
    "foreach_mul_",
    "foreach_norm",
    "forward_mode_is_active",
    "function_mode_count",
    "functional_collectives",
    "fused_sgd_",
    "graph_is_kept",
    "held_by",
    "is_exporting",
    "is_fake",
    "is_legacy_batched",
    "is_of_fsdp1",
    "is_under_way",
    "legacy_reduction",
    "lie_at",
    "materialized",
    "root_mesh",
    "saved_tensor_hooks",
    "sparse_values",
    "split_copy",
    "step_is_observed",
    "stream_is_captured",
    "tensor_guard",
    "tracing_state",
    "transforms_are_active",
    "tree_flatten",
    "tree_map",
    "unflatten",
    "unscale_",
    "unscales_by_step",
    "without_dispatch",
    "without_subclasses",
    "wrapper_subclass",
    "write_back",
]

fused_sgd_ = torch._fused_sgd_
foreach_copy_ = torch._foreach_copy_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
split_copy = torch.split_with_sizes_copy
unscale_ = torch._amp_foreach_non_finite_check_and_unscale_
sparse_values = Tensor._values
wrapper_subclass = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
flatten = torch._C._nn.flatten_dense_tensors
unflatten = torch._C._nn.unflatten_dense_tensors
transforms_are_active = torch._C._are_functorch_transforms_active
dispatch_mode_count = torch._C._len_torch_dispatch_stack
# True if autograd may come back to the node that runs (``retain_graph=True``), or if that can't be known.
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
current_gpu = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
stream_is_captured = getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)
function_mode_count = torch._C._len_torch_function_stack
any_autocast = torch._C._is_any_autocast_enabled
saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks
tracing_state = torch._C._get_tracing_state
DispatchMode = TorchDispatchMode
dispatch_modes = _get_current_dispatch_mode_stack
without_dispatch = torch._C._DisableTorchDispatch
without_subclasses = torch._C.DisableTorchFunctionSubclass
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
legacy_reduction = _reduction.legacy_get_string
disable_dynamo = torch._disable_dynamo  # torch.compiler.disable imports the compiler at once
# torch's builds for GPUs have a comparison of addresses of their own, which takes half of the time.
lie_at = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)


def apply_of(function: type[Function]) -> Callable[..., Any]:
    """Return the function's ``apply`` without what it does for transforms: none may be active."""
    return super(Function, function).apply  # type: ignore[misc, no-any-return]


def forward_mode_is_active() -> bool:
    """Return True inside ``forward_ad.dual_level()``."""
    return forward_ad._current_level >= 0


def is_exporting() -> bool:
    """Return ``torch.compiler.is_exporting()``, which in torch 2.11 is always True under dynamo."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else bool(flag)


def are_constants(*numbers: float) -> bool:
    """Return True if none of the numbers varies from call to call of the program that dynamo traces."""
    try:
        from torch.fx.experimental.symbolic_shapes import has_static_value  # imported by dynamo
    except ImportError:
        return True
    return all(has_static_value(number) for number in numbers)


def functional_collectives() -> Any:
    """Return torch's module of functional collectives, imported at the first use."""
    import torch.distributed._functional_collectives as functional

    return functional


def is_under_way(tensor: Tensor) -> bool:
    """Return True if the tensor is the result of a collective that may still run."""
    functional = sys.modules.get("torch.distributed._functional_collectives")
    return functional is not None and isinstance(tensor, functional.AsyncCollectiveTensor)


def materialized(grads: list[Tensor]) -> list[Tensor]:
    """Return the gradients as they are in memory; the same list where all of them are.

    The others are negated when they are read, as autograd makes them of complex conjugates, or zeros without memory.
    """
    if not any(map(Tensor.is_neg, grads)) and not any(map(Tensor._is_zerotensor, grads)):
        return grads
    return [grad.clone() if grad._is_zerotensor() else grad.resolve_neg() for grad in grads]


def write_back(grads: list[Tensor], products: list[Tensor]) -> None:
    """Write multiples of :func:`materialized` gradients to the gradients that these were made of.

    One by one: torch's operators for lists write to no negated tensor. Zeros without memory stay what they are.
    """
    if products is not grads:
        for grad, product in zip(grads, products, strict=True):
            if product is not grad and not grad._is_zerotensor():
                grad.copy_(product)


def tensor_guard(tensors: Sequence[Any]) -> Callable[..., bool]:
    """Return a function that compares as many tensors with these, one by one.

    It returns whether they have the same types, dtypes, devices, sizes, strides and flags. The tensors must all be
    different ones, and are not held on to.

    Raises:
        TypeError: this torch has no guards, or others.
    """
    if _guards is None:
        raise TypeError("this torch has no guards")
    return _guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


def step_is_observed(optimizer: Any) -> bool:
    """Return whether a profiler or a hook wants to see this optimizer's steps."""
    return bool(
        getattr(profiler, "_is_profiler_enabled", True)
        or getattr(optimizer, "_optimizer_step_pre_hooks", True)
        or getattr(optimizer, "_optimizer_step_post_hooks", True)
        or getattr(optimizers, "_global_optimizer_pre_hooks", True)
        or getattr(optimizers, "_global_optimizer_post_hooks", True)
    )


def root_mesh(mesh: Any) -> Any:
    """Return the mesh that this one is a slice of: what holds there holds for every process of that mesh."""
    return mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh


def flattened_meshes(mesh: Any) -> list[Any]:
    """Return the meshes of one dimension that a program has made of several of this one's."""
    return list(getattr(root_mesh(mesh), "_flatten_mapping", {}).values())


def held_by(tensor: Any) -> Any:
    """Return the local tensor that a DTensor holds: the same object until another takes its place."""
    return tensor._local_tensor


def is_fake(tensor: object) -> bool:
    """Return True for a tensor without numbers, as ``FakeTensorMode`` makes them."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def is_of_fsdp1(param: object) -> bool:
    """Return True for a parameter that ``FullyShardedDataParallel`` has flattened and cut up."""
    return hasattr(param, "_fsdp_flattened")


_SCALER_METHODS = ("unscale_", "_unscale_grads_", "_check_inf_per_device", "_maybe_opt_step")


class unscales_by_step:  # noqa: N801
    """The attribute by which ``torch.amp.GradScaler`` asks an optimizer to unscale gradients in its step.

    It is False for ``GradScaler.step`` where something relies on the other way, in which the scaler unscales, and
    does not call ``step`` after an overflow, as with ``torch.optim.SGD`` by default:

    - a scaler that overrides a method of that way, as FSDP1's ``ShardedGradScaler`` does;
    - a program that has wrapped the optimizer's ``step`` to see whether it is called, as accelerate does (torch's
      learning rate schedules wrap it too, and need not know);
    - an object around the optimizer, which would get the scale in the optimizer's place.
    """

    def __get__(self, optimizer: Any, owner: type | None = None) -> bool:
        caller = sys._getframe(1)
        if optimizer is None or caller.f_code is not GradScaler.step.__code__:
            return caller.f_back is None or caller.f_back.f_code is not GradScaler.step.__code__
        scaler, step = caller.f_locals["self"], optimizer.step
        return all(
            getattr(getattr(scaler, name), "__func__", None) is getattr(GradScaler, name) for name in _SCALER_METHODS
        ) and (
            getattr(step, "__func__", None) is type(optimizer).step or getattr(step, "_wrapped_by_lr_sched", False)
        )
