"""SGD as a ``torch.optim.Optimizer``: its state and its groups. The backends do the arithmetic."""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable
from numbers import Real
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..backends import choice
from ..backends.contract import FLAG_ELEMENTS, SGDBatch, SGDControls, SGDRule, check_gradients
from ..backends.torch_private import step_is_observed, unscales_by_step
from ..ranks.placements import is_dtensor
from . import plain
from .checkpoint import check_loaded, restore_dtypes
from .repeat import Repeat
from .shards import Shards, ShardSums, check_kind, check_whole, local_as, place_of, shards_of
from .step_plan import (
    SERVED_DTYPES,
    Batch,
    Identities,
    StepPlan,
    gradients,
    layouts_of,
    overlapping,
    params_of,
    serves,
    stored_in,
)

__all__ = ["SGD"]

# torch.nn.utils.clip_grad_norm_ adds it to the norm that it divides by.
_NORM_EPSILON = 1e-6
_ROUNDINGS = ("master_weights", "kahan_sum", "stochastic_rounding")
_COMPANION = {"master": "master_param", "kahan": "kahan_comp"}
# The options of a group that a plan depends on, beside the momentum.
_STATE_OPTIONS = itemgetter("momentum_dtype", *_ROUNDINGS)


class SGD(Optimizer):
    r"""Stochastic gradient descent: ``torch.optim.SGD`` in one launch (a batched step on a CPU), and with more in it.

    Each step, for a parameter θ with gradient g, learning rate γ, momentum μ, dampening τ and weight decay λ:

    .. math::
        g &\leftarrow \pm g + \lambda \theta \\
        b &\leftarrow \mu b + (1 - \tau) g, \quad\text{at a parameter's first step } b \leftarrow g \\
        \theta &\leftarrow \theta - \gamma b, \quad\text{with nesterov } \theta - \gamma (g + \mu b)

    as in torch (the nesterov form is that of Sutskever et al., "On the importance of initialization and momentum in
    deep learning", 2013). Numbers are computed in float32 (float64 for float64) and rounded where they are stored.

    Args:
        params: tensors, named tensors or dicts that define parameter groups, as for every optimizer of torch.
            Any floating dtype and strides; sparse and complex gradients, and tensor subclasses, go through torch's
            own operators, and a DTensor's shard is stepped where it lies.
        lr: learning rate γ. This, ``momentum`` and ``weight_decay`` may be a one-element tensor; on the parameters'
            device it is read there, without a sync, so that a captured CUDA graph follows its changes.
        momentum: μ.
        dampening: τ.
        weight_decay: λ.
        nesterov: needs a momentum, and no dampening.
        maximize: climb instead of descend.
        foreach, fused: taken for the sake of programs written for ``torch.optim.SGD``. There is one implementation,
            and it has no need to choose.
        differentiable: let autograd go through the step, by torch's operators; with none of the three ways to round
            below, which have no derivatives.
        decoupled_weight_decay: θ ← θ (1 − γ λ) before the step, instead of λ θ in the gradient (Loshchilov and
            Hutter, "Decoupled Weight Decay Regularization", 2019).
        max_norm: clip the gradients of all groups together to this Euclidean norm, as
            ``torch.nn.utils.clip_grad_norm_`` does, within the step: ``p.grad`` is left as it was, and the host does
            not wait. :attr:`grad_norm` has the norm. Of DTensors all shards count. Other parameters must be whole on
            each process: those of ``FullyShardedDataParallel`` are refused (under ``NO_SHARD`` too), and within
            ``ZeroRedundancyOptimizer``, which can't be known here, each process would clip by the norm of its own
            parameters; call ``clip_grad_norm_`` before the step there.
        momentum_dtype: of the momentum buffers; None is each parameter's own. float32 is more exact than bfloat16.
        master_weights: for float16 and bfloat16 parameters, keep float32 weights in the state, step those, and round
            them to the parameter.
        kahan_sum: for float16 and bfloat16 parameters, keep the rounding error in a second number of that dtype, and
            add it again in the next step (Kahan, "Further remarks on reducing truncation errors", 1965).
        stochastic_rounding: round float16 and bfloat16 parameters up or down at random, right on average. The random
            numbers are those of torch's generator; in a program of several processes they depend on the number of
            steps and the shard alone, so that replicas stay equal.

    The last three exclude each other, and change nothing for parameters of other dtypes. A program may write to a
    parameter between steps: a master weight that does not round to the parameter is replaced by it, and a
    compensation that is more than the error of its rounding can be is dropped.

    With :class:`torch.amp.GradScaler` the step itself divides the gradients by the scale, and does nothing if one of
    them has overflowed, without the host waiting to know; ``p.grad`` holds the unscaled gradient then.
    A scaler that overrides how gradients are unscaled (FSDP1's ``ShardedGradScaler``), or a program that watches for
    calls of ``step`` (accelerate), finds what ``torch.optim.SGD`` has by default: the scaler unscales the gradients,
    and does not call ``step`` after an overflow.

    Raises:
        ValueError: a negative or not one-element ``lr``, ``momentum`` or ``weight_decay``, a negative ``max_norm``
            (and, in the step, one for parameters of ``FullyShardedDataParallel``);
            nesterov without momentum or with dampening; options that exclude each other; no parameters at all.
        TypeError: ``params`` is a tensor, ``momentum_dtype`` no floating dtype; a hyper-parameter is no number.

    Example:
        >>> import fastloss, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastloss.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        >>> fastloss.cross_entropy(model(torch.randn(3, 4)), torch.tensor([0, 1, 1])).backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    # torch.amp.GradScaler hands its scale, and whether a gradient has overflowed, to step() as attributes.
    _step_supports_amp_scaling = unscales_by_step()

    _plan: StepPlan | None
    # Flags of SGDBatch.begun, by the number of the momentum buffer that has them, which is not held on to.
    _begun: dict[int, tuple[Callable[[], Any], Tensor]]
    # Squares and scale of the last step with max_norm. In a dict: torch.compile forgets the attributes that a
    # compiled step sets on an optimizer.
    _clipped: dict[str, Tensor | None]
    _seeds: dict[tuple[torch.device, int], Tensor]  # of stochastic rounding, by the device and the shard

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float | Tensor = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        momentum_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        kahan_sum: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        if foreach and fused:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "max_norm": max_norm,
            "momentum_dtype": momentum_dtype,
            "master_weights": master_weights,
            "kahan_sum": kahan_sum,
            "stochastic_rounding": stochastic_rounding,
        }
        _check(defaults)
        self._seeds = {}
        self._forget()
        super().__init__(params, defaults)

    # ------------------------------------------------------------------------------------------------- the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of every parameter that has a gradient.

        Args:
            closure: computes the loss anew, with gradients, and returns it.

        Returns:
            What ``closure`` returned, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        differentiable, plan = self.defaults["differentiable"], self._plan
        by_operators = differentiable or torch.compiler.is_compiling()
        if not by_operators and plan is not None and plan.repeat is not None and plan.repeat(self):
            return loss
        with torch.set_grad_enabled(differentiable):
            if by_operators:
                self._step_by_operators(differentiable)
            else:
                self._step()
        return loss

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``step`` for hooks and profilers, as torch does with the class of every optimizer.

        A label for profilers costs as much of the host's time as dozens of tensors do: without a profiler of
        ``torch.profiler`` or ``torch.autograd.profiler``, and without hooks, the step runs bare.
        """
        observed = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: SGD, *args: Any, **kwargs: Any) -> Any:
            return (observed if step_is_observed(self) else func)(self, *args, **kwargs)

        return step

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients, unscaled and before clipping, at the last step.

        ``()`` float32 on the device; None if that step had no ``max_norm`` or no gradients, or there was none yet.
        """
        squares = self._clipped["squares"]
        return None if squares is None else _norm(squares, self._clipped["scale"]).float()

    def _step(self) -> None:
        max_norm = self._max_norm()
        params = params_of(self.param_groups)
        grads = gradients(params)
        try:
            self._step_planned(self._planned(params, grads), params, grads, max_norm)
        finally:
            if self._plan is not None:
                self._plan.release()

    def _step_planned(self, plan: StepPlan, params: list[Tensor], grads: list[Any], max_norm: float | None) -> None:
        self._clipped["squares"], self._clipped["scale"] = None, None
        if (not plan.batches and not plan.plain) or not (plan.complete or any(grad is not None for grad in grads)):
            return
        for i in plan.sharded:
            if grads[i] is not None:
                grads[i] = local_as(grads[i], params[i])
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scaled = scale is not None or found_inf is not None
        squares = None if max_norm is None else self._sum_of_squares(plan, params, grads)
        if squares is not None:
            self._clipped["squares"], self._clipped["scale"] = squares, scale
        if found_inf is not None and (plan.plain or all(batch.backend == "eager" for batch in plan.batches)):
            # On a CPU the number is at hand. Torch's operators can't be called off by a number elsewhere: they wait.
            if found_inf.item() != 0:
                return
            found_inf = None
        rules = [_rule(group) for group in self.param_groups]
        controls = _ControlsByDevice(SGDControls(scale, found_inf, squares, max_norm or 0.0))
        for batch in plan.batches:
            here, taken = controls.on(batch.tensors.params[0].device), batch.take(grads)
            if not batch.tensors.incomplete or any(grad is not None for grad in taken):
                choice.load(batch.backend).sgd_step(batch.tensors, taken, rules, here)
        if plan.plain:
            # As in torch, each place in which a parameter is listed begins its momentum.
            begin = {i for i in plan.repeated if "momentum_buffer" not in self.state.get(params[i], {})}
            for i in plan.plain:
                if grads[i] is None:
                    continue
                if i in begin:
                    self.state.get(params[i], {}).pop("momentum_buffer", None)
                self._step_plainly(params[i], plan.group_of[i], grads[i], rules, controls)
        plan.finish_step(grads)
        plan.repeat = Repeat.of(plan, self.param_groups, rules) if max_norm is None and not scaled else None
        if self._begun and found_inf is None and not _capturing():
            for batch in plan.batches:
                with_momentum = [
                    i
                    for i in batch.tensors.begun
                    if batch.tensors.momentum[i] is not None
                    and grads[batch.indices[i]] is not None
                    and _on_host(rules[batch.tensors.rules[i]].momentum)
                ]
                for i in with_momentum:
                    self._begun.pop(id(self.state[params[batch.indices[i]]]["momentum_buffer"]), None)
                if with_momentum:
                    left = {i: flags for i, flags in batch.tensors.begun.items() if i not in with_momentum}
                    batch.tensors.begun = left

    def _step_plainly(
        self, param: Tensor, number: int, grad: Tensor, rules: list[SGDRule], controls: _ControlsByDevice
    ) -> None:
        group = self.param_groups[number]
        here = controls.on(grad.device)
        if here.grad_scale is not None:
            plain.unscale(grad, here.grad_scale)
        clip = None if here.squares is None else _clip_factor(_norm(here.squares, here.grad_scale), here.max_norm)
        state = self.state.get(param, {})
        rule, dtype = _read(rules[number]), group["momentum_dtype"]
        rounding = _rounding(group, param)
        seed = self._seed(param, rounding)
        plain.step(param, grad, state, rule, rounding, clip=clip, momentum_dtype=dtype, seed=seed)
        if state:
            self.state[param] = state

    def _sum_of_squares(self, plan: StepPlan, params: list[Tensor], grads: list[Any]) -> Tensor:
        """Return Σ g² over all gradients as they come, ``()`` on the device of the first."""
        totals: dict[Shards | None, Tensor] = {}  # one for each set of shards, on one device each

        def total(shards: Shards | None, device: torch.device) -> Tensor:
            if shards not in totals:
                totals[shards] = torch.zeros((), dtype=torch.float64, device=device)
            return totals[shards]

        for batch in plan.batches:
            device, taken = batch.tensors.params[0].device, batch.take(grads)
            if batch.tensors.incomplete and all(grad is None for grad in taken):
                continue
            squares = total(batch.shards, device)
            here = squares if squares.device == device else torch.zeros((), dtype=torch.float64, device=device)
            choice.load(batch.backend).sgd_squares(batch.tensors, taken, here)
            if here is not squares:
                squares += here.to(squares.device)
        for i in plan.plain:
            if i not in plan.repeated and grads[i] is not None:
                param, grad = params[i], grads[i]
                shards = shards_of(param) if is_dtensor(grad) else None
                squares = plain.norm(grad if shards is None else local_as(grad, param)).square()
                sum_of_set = totals.setdefault(shards, torch.zeros_like(squares))
                sum_of_set += squares.to(sum_of_set.device)
        sums = plan.sums if plan.complete else None
        if sums is None:
            check_whole(params)
            sums = ShardSums(p for p, grad in zip(params, grads, strict=True) if grad is not None)
            plan.sums = sums if plan.complete else None
        first, *others = sums(totals)  # a step without gradients has ended before
        for other in others:
            first = first + other.to(first.device)
        return first

    def _step_by_operators(self, differentiable: bool) -> None:
        """Step by torch's operators alone, which autograd and compilers can follow."""
        if self._begun:  # buffers made by steps that may have been called off
            self._settle(list(self.state))
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        max_norm = self._max_norm()
        self._clipped["squares"], self._clipped["scale"] = None, None
        clip = None
        if grads and max_norm is not None:
            check_whole(param for group in self.param_groups for param in group["params"])
            norms = torch.stack([plain.norm(grad).to(grads[0].device) for grad in grads])
            norm = torch.linalg.vector_norm(norms)
            self._clipped["squares"], self._clipped["scale"] = norm.detach().square(), scale
            clip = _clip_factor(norm if scale is None else norm / scale.to(norm.device), max_norm)
        if found_inf is not None and found_inf.item() != 0:
            return
        if scale is not None:
            with torch.no_grad():
                for grad in grads:
                    plain.unscale(grad, scale)
        for group in self.param_groups:
            rule, dtype = _rule(group), group["momentum_dtype"]
            for param in group["params"]:
                if param.grad is not None:
                    rounding = _rounding(group, param)
                    has_state = rounding in _COMPANION or isinstance(rule.momentum, Tensor) or rule.momentum != 0
                    plain.step(
                        param,
                        param.grad,
                        self.state[param] if has_state else {},
                        rule,
                        rounding,
                        clip=clip,
                        momentum_dtype=dtype,
                        out_of_place=differentiable,
                        seed=self._seed(param, rounding),
                    )

    # ------------------------------------------------------------------------------------------------- the plan

    def _planned(self, params: list[Tensor], grads: list[Any]) -> StepPlan:
        """Return a plan that holds now; its batches have their tensors."""
        groups, plan = self.param_groups, self._plan
        settings: list[Any] = [
            (_has_momentum(group["momentum"]), len(group["params"]), *_STATE_OPTIONS(group)) for group in groups
        ]
        settings.append(choice.wanted())
        if plan is not None:
            if plan.holds(settings, params, self.state, grads) and self._have_flags(plan, params):
                return plan
            plan.release()
        layouts = layouts_of(grads)
        if plan is not None and plan.settings == settings and len(plan.layouts) == len(params):
            # Parameters that lack a gradient today may have one tomorrow.
            for i, (old, param) in enumerate(zip(plan.layouts, params, strict=True)):
                if layouts[i] is None and old is not None and (i, param) in plan.params:
                    g = plan.group_of[i]
                    layouts[i] = old if self._has_buffers(param, groups[g], settings[g][0]) else None
        self._plan = plan = self._new_plan(settings, params, layouts)
        plan.begin(grads)
        return plan

    def _new_plan(self, settings: list[Any], params: list[Tensor], layouts: list[Any]) -> StepPlan:
        group_of = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]
        plan = StepPlan(settings, Identities(params), group_of, layouts)
        memory: dict[int, Tensor] = {}
        seen: set[Tensor] = set()
        twice: set[Tensor] = set()
        for i, (param, layout) in enumerate(zip(params, layouts, strict=True)):
            if layout is None:
                continue
            stored = stored_in(param)
            grad = param.grad
            if grad is not None:
                check_gradients([param], [grad])
                check_kind(param, grad)
            if param in seen:
                plan.repeated.add(i)
                twice.add(param)
            elif layout == torch.strided and serves(stored):
                memory[i] = stored
            seen.add(param)
        memory = {i: stored for i, stored in memory.items() if params[i] not in twice}
        numbers = list(memory)
        for position in overlapping(list(memory.values())):
            del memory[numbers[position]]
        plan.plain = [i for i, layout in enumerate(layouts) if layout is not None and i not in memory]
        self._settle([params[i] for i in plan.plain])

        together: dict[Any, Batch] = {}
        for i, stored in memory.items():
            param, group = params[i], self.param_groups[group_of[i]]
            rounding, name = _rounding(group, stored), choice.choose(stored)
            shards, companion = shards_of(param), _COMPANION.get(rounding)
            key = (name, stored.device, stored.dtype, rounding, shards)
            if key not in together:
                tensors = SGDBatch([], [], [], [], rounding, {}, seed=self._seed(param, rounding))
                together[key] = Batch(tensors, name, [], shards, [], companion)
            batch = together[key]
            if stored is not param:
                plan.sharded.append(i)
            batch.indices.append(i)
            batch.tensors.rules.append(group_of[i])
            batch.has_momentum.append(settings[group_of[i]][0])
            if batch.has_momentum[-1]:
                self._prepare_buffer(param, stored, group, "momentum_buffer", group["momentum_dtype"])
            if companion is not None:
                self._prepare_buffer(param, stored, group, companion)
            flags = self._flags(self.state.get(param, {}).get("momentum_buffer"))
            if flags is not None:
                batch.tensors.begun[len(batch.indices) - 1] = flags
        self._begun = {number: pair for number, pair in self._begun.items() if pair[0]() is not None}
        plan.batches = list(together.values())
        plan.finish(params, self.state)
        return plan

    def _have_flags(self, plan: StepPlan, params: list[Tensor]) -> bool:
        """Return whether the plan's flags are still those of the momentum buffers that may not have begun."""
        return all(
            self._flags(self.state[params[batch.indices[i]]]["momentum_buffer"]) is flags
            for batch in plan.batches
            for i, flags in batch.tensors.begun.items()
        )

    def _flags(self, buffer: Any) -> Tensor | None:
        """Return the flags of a momentum buffer that may not have begun; None where it has."""
        reference, flags = self._begun.get(id(buffer), (None, None))
        return flags if reference is not None and reference() is buffer else None

    def _has_buffers(self, param: Tensor, group: dict[str, Any], has_momentum: bool) -> bool:
        state, key = self.state.get(param, {}), _COMPANION.get(_rounding(group, param))
        return (not has_momentum or state.get("momentum_buffer") is not None) and (key is None or key in state)

    def _prepare_buffer(
        self, param: Tensor, stored: Tensor, group: dict[str, Any], key: str, dtype: torch.dtype | None = None
    ) -> None:
        """Make a parameter's buffer where it is missing, and bring it into the form that the backend takes."""
        state = self.state[param]
        if state.get(key) is None:
            if stored.is_cuda and _capturing():
                raise RuntimeError(
                    f"fastloss.SGD: the {key} of a parameter of shape {tuple(param.shape)} would be made inside a "
                    "CUDA graph, and anew by every replay; take a step with the same parameters before capturing"
                )
            if key == "master_param":
                state[key] = param.detach().float()
            else:
                state[key] = torch.zeros_like(param, dtype=dtype or param.dtype, requires_grad=False)
            if key == "momentum_buffer" and (group["dampening"] != 0 or getattr(self, "found_inf", None) is not None):
                # The host doesn't know yet whether the buffer begins with this step. (Without dampening and overflows
                # that does not matter: μ · 0 + g is g.)
                flags = -(-stored.numel() // FLAG_ELEMENTS)
                begun = torch.zeros(max(1, flags), dtype=torch.uint8, device=stored.device)
                self._begun[id(state[key])] = weakref.ref(state[key]), begun
        buffer: Tensor = state[key]
        if isinstance(buffer, Tensor) and buffer.layout != torch.strided:
            buffer = state[key] = buffer.to_dense()
        fits = isinstance(buffer, Tensor) and buffer.shape == param.shape and buffer.device == param.device
        if not fits or is_dtensor(buffer) != is_dtensor(param):
            raise ValueError(
                f"fastloss.SGD: a parameter of shape {tuple(param.shape)} on {param.device} has "
                f"{_described(buffer)} as its {key}; expected a tensor of its shape, on its device"
                + (" and mesh" if is_dtensor(param) else "")
            )
        dtype = _buffer_dtype(key, buffer, param)
        if buffer.dtype != dtype:
            state[key] = buffer.detach().to(dtype)

    def _seed(self, param: Tensor, rounding: str) -> Tensor | None:
        """Return the seed for a parameter's stochastic rounding; None: torch's generator.

        Among several processes it depends on the number of steps and the shard alone, so that replicas stay equal:
        their processes may have generators with seeds of their own.
        """
        place = place_of(param) if rounding == "stochastic" else None
        if place is None:
            return None
        key = param.device, place
        if key not in self._seeds:
            if param.is_cuda and _capturing():
                raise RuntimeError(
                    "fastloss.SGD: the seed for stochastic_rounding would be made inside a CUDA graph, and anew by "
                    "every replay; take a step with the same parameters before capturing"
                )
            self._seeds[key] = torch.full((1,), place << 32, dtype=torch.int64, device=param.device)
        return self._seeds[key]

    def _max_norm(self) -> float | None:
        values = {group["max_norm"] for group in self.param_groups}
        if len(values) > 1:
            raise ValueError(
                "max_norm must be the same in all parameter groups, whose gradients are clipped together; got "
                + ", ".join(map(str, values))
            )
        value: float | None = values.pop() if values else None  # a program may take all groups away for a while
        return value

    def _forget(self) -> None:
        """Reset all that is not part of the optimizer's state, and can be made anew."""
        self._plan = None
        self._begun = {}
        self._clipped = {"squares": None, "scale": None}

    # ---------------------------------------------------------------------------------------- groups, checkpoints

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for every optimizer of torch. One that does not fit leaves the optimizer as it was."""
        if isinstance(param_group, dict):
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._plan = None

    def state_dict(self) -> dict[str, Any]:
        """Return a state that ``torch.optim.SGD`` can load; ``master_param`` and ``kahan_comp`` are extra.

        On a GPU, after steps under a GradScaler, it waits to know which of them overflowed.
        """
        self._settle(list(self.state))
        self._separate()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of another SGD, of this class or of torch's.

        Buffers take the dtype that this optimizer keeps them in, without a detour through the parameter's. Options
        that the other does not know stay as they are.

        Raises:
            ValueError: the groups are not as many or not as long as this optimizer's; a buffer has another shape than
                its parameter; a buffer is whole and its parameter a DTensor; options exclude each other. The
                optimizer is left as it was. (Numbers that the constructor refuses are loaded: a program may have set
                them.)
        """
        final: dict[str, Any] = {}
        before = [dict(group) for group in self.param_groups]

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            check_loaded(loaded, self.param_groups)
            for own_group, loaded_group in zip(before, loaded["param_groups"], strict=True):
                _check({**own_group, **loaded_group}, loaded=True)
            final.update(loaded)

        def restore(_: Optimizer) -> None:
            for group, own_group, loaded_group in zip(self.param_groups, before, final["param_groups"], strict=True):
                group.update((name, own_group[name]) for name in self.defaults if name not in loaded_group)
            restore_dtypes(self, final)

        # The last hook before the load gets the state that is loaded. After it this one comes first: those that the
        # program has registered get the finished state, and may change it.
        hooks = self.register_load_state_dict_pre_hook(check), self.register_load_state_dict_post_hook(restore, True)
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._settle(list(self.state))
        self._separate()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self.__dict__.setdefault("_seeds", {})
        self._forget()

    def _separate(self) -> None:
        """Give every buffer on the CPU memory of its own: pickle writes shared memory once for each buffer."""
        for state in self.state.values():
            for buffer in state.values() if isinstance(state, dict) else ():  # a program may store other things there
                on_cpu = type(buffer) is Tensor and buffer.device.type == "cpu" and buffer.layout == torch.strided
                if on_cpu and buffer.untyped_storage().nbytes() > buffer.nbytes and not buffer.is_shared():
                    buffer.data = buffer.clone()

    def _settle(self, params: list[Tensor]) -> None:
        """Remove the momentum buffers of those parameters that have not made a step: all were skipped."""
        for param in params if self._begun else ():
            state = self.state.get(param, {})
            buffer = state.get("momentum_buffer") if isinstance(state, dict) else None
            flags = self._flags(buffer)
            if flags is not None:
                if self._plan is not None:
                    self._plan.end()
                del self._begun[id(buffer)]
                if not flags.any():
                    del state["momentum_buffer"]
                    if not state:
                        del self.state[param]


class _ControlsByDevice:
    """A step's controls on every device that needs them."""

    def __init__(self, controls: SGDControls) -> None:
        self._controls = controls
        self._copies: dict[torch.device, SGDControls] = {}

    def on(self, device: torch.device) -> SGDControls:
        """Return the controls with their tensors on the device."""
        scale, found_inf, squares, max_norm = self._controls
        if scale is None and found_inf is None and squares is None:
            return self._controls
        if device not in self._copies:
            self._copies[device] = SGDControls(
                _moved(scale, device), _moved(found_inf, device), _moved(squares, device), max_norm
            )
        return self._copies[device]


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=device.type != "cpu")  # the host would not wait


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _norm(squares: Tensor, scale: Tensor | None) -> Tensor:
    norm = squares.sqrt()
    return norm if scale is None else norm / scale.to(norm.device)


def _clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    return (max_norm / (norm + _NORM_EPSILON)).clamp(max=1.0)


def _rule(group: dict[str, Any]) -> SGDRule:
    return SGDRule(
        _number(group["lr"]),
        _number(group["momentum"]),
        float(group["dampening"]),
        _number(group["weight_decay"]),
        group["nesterov"],
        group["maximize"],
        group["decoupled_weight_decay"],
    )


def _number(value: Any) -> float | Tensor:
    return value if isinstance(value, (float, int, Tensor)) else float(value)


def _has_momentum(momentum: float | Tensor) -> bool:
    """Return whether the momentum is not 0; True for a number on a GPU, which the kernels check again."""
    return bool(momentum != 0) if _on_host(momentum) else True


def _on_host(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def _read(rule: SGDRule) -> SGDRule:
    """Replace a rule's tensors on the CPU by numbers."""
    values: list[Any] = [v.item() if isinstance(v, Tensor) and _on_host(v) else v for v in rule]
    return SGDRule(*values)


def _buffer_dtype(key: str, buffer: Tensor, param: Tensor) -> torch.dtype:
    """Return the dtype in which a buffer is stepped: for momentum any that the backends serve."""
    if key == "master_param":
        return torch.float32
    return buffer.dtype if key == "momentum_buffer" and buffer.dtype in SERVED_DTYPES else param.dtype


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "DTensor" if is_dtensor(value) else "tensor"
        return f"a {kind} of shape {tuple(value.shape)} on {value.device}"
    return f"a {type(value).__name__}"


def _rounding(group: dict[str, Any], param: Tensor) -> str:
    """Return how a parameter's new value is rounded; see :class:`fastloss.backends.contract.SGDBatch`."""
    if param.dtype not in (torch.float16, torch.bfloat16):
        return "nearest"
    if group["master_weights"]:
        return "master"
    if group["kahan_sum"]:
        return "kahan"
    return "stochastic" if group["stochastic_rounding"] else "nearest"


def _check_range(name: str, value: Any) -> None:
    try:
        if isinstance(value, Real):
            float(value)
    except OverflowError:
        sign, size = "-" if value < 0 else "", f"2^{math.floor(abs(value)).bit_length() - 1}"
        raise ValueError(f"{name} is about {sign}{size}; expected at most {sys.float_info.max}") from None


def _check(group: dict[str, Any], *, loaded: bool = False) -> None:
    """Check the options of a parameter group; of one that is loaded, all but what numbers they are."""
    for name in ("lr", "momentum", "weight_decay", "dampening", "max_norm"):
        _check_range(name, group[name])
    named = {"lr": "learning rate", "momentum": "momentum value", "weight_decay": "weight_decay value"}
    for name, words in named.items():
        value = group[name]
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
            if value.is_complex():
                raise TypeError(f"{name} must be a real number, got a tensor of {value.dtype}")
        elif isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number or a one-element tensor, got {type(value).__name__} {value!r}")
        if not loaded and value < 0.0:
            raise ValueError(f"Invalid {words}: {value}; expected 0 or more")
    dampening = group["dampening"]
    one_number = isinstance(dampening, Tensor) and dampening.numel() == 1 and not dampening.is_complex()
    if not one_number and (isinstance(dampening, bool) or not isinstance(dampening, Real)):
        raise TypeError(f"dampening must be a number, got {type(dampening).__name__}")
    if not loaded and group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            "Nesterov momentum requires a momentum and zero dampening; "
            f"got momentum {group['momentum']}, dampening {group['dampening']}"
        )
    max_norm, dtype = group["max_norm"], group["momentum_dtype"]
    if max_norm is not None and (isinstance(max_norm, bool) or not isinstance(max_norm, Real)):
        raise TypeError(f"max_norm must be a number or None, got {type(max_norm).__name__} {max_norm!r}")
    if not loaded and max_norm is not None and not float(max_norm) >= 0.0:
        raise ValueError(f"Invalid max_norm value: {max_norm}; expected 0 or more, or None for no clipping")
    if dtype is not None and dtype not in SERVED_DTYPES:
        raise TypeError(f"momentum_dtype must be a floating torch.dtype of 16, 32 or 64 bits, or None; got {dtype!r}")
    for name in (*_ROUNDINGS, "decoupled_weight_decay"):
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} is {group[name]!r}; expected True or False")
    chosen = [name for name in _ROUNDINGS if group[name]]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} exclude each other; choose one")
    if chosen and group["differentiable"]:
        raise ValueError(f"{chosen[0]} has no derivative, differentiable=True needs one; choose one of them")
