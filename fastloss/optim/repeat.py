"""A step that is like the last one: what is compared, and nothing else is done."""

from __future__ import annotations

import operator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..backends import choice
from ..backends.contract import SGDControls, SGDRule
from .step_plan import StepPlan, gradients, params_of

__all__ = ["Repeat"]

_OPTIONS = operator.itemgetter(
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "maximize",
    "decoupled_weight_decay",
    "max_norm",
    "momentum_dtype",
    "master_weights",
    "kahan_sum",
    "stochastic_rounding",
)
_may_start = operator.methodcaller("may_start")


class Repeat:
    """A step like the last one: starts the backends at once, if everything else that they were told is the same.

    ================================== ===============================================================================
    what is compared                   because
    ================================== ===============================================================================
    every option of every group, by    the rules' numbers, ``max_norm`` and the form of the state are made of them; a
    identity; no option is a tensor    new number is another object, and a tensor may be written to
    how many parameters a group has    the order of all parameters does not say which rule is whose
    ``grad_scale``, ``found_inf``      must not be there: a step under a GradScaler does more
    the backend that is asked for      ``use_backend`` and ``FASTLOSS_BACKEND`` may change
    the states' keys, with parameters  a state is its parameter's
    parameters, buffers: type, dtype,  all that a launch or an operator is given, beside values
    device, sizes, strides, flags;
    addresses of parameters, and of
    buffers too where tables hold them
    gradients: the same but addresses  these may change: the backend uploads them if they have
    parameters that were not stepped   must still have no gradient
    ================================== ===============================================================================

    Everything else that changes a step ends the plan, to which this belongs (a group added, a state loaded), comes
    before it (hooks, profilers, a closure, a compiler), or is looked at by the backend (stream, device, capture).
    """

    def __init__(self, plan: StepPlan, groups: list[dict[str, Any]], rules: list[SGDRule]) -> None:
        self._plan = plan
        self._values = list(chain.from_iterable(map(_OPTIONS, groups)))
        self._lengths = [len(group["params"]) for group in groups]
        self._wanted = choice.wanted()
        controls = SGDControls()
        self._ready = [ready for batch in plan.batches if (ready := batch.tensors.memory.get("repeat")) is not None]
        self._starts = [
            batch.tensors.memory.get("repeat")
            or torch.no_grad()(
                partial(choice.load(batch.backend).sgd_step, batch.tensors, rules=rules, controls=controls)
            )
            for batch in plan.batches
        ]

    @staticmethod
    def of(plan: StepPlan, groups: list[dict[str, Any]], rules: list[SGDRule]) -> Repeat | None:
        """Return the repeated step; None where each step has to look at more than :class:`Repeat` compares."""
        numbers = (value for rule in rules for value in rule)
        if plan.last_step is None or not plan.complete or any(isinstance(value, Tensor) for value in numbers):
            return None
        for batch in plan.batches:
            of_kernels = batch.backend == "triton"
            if batch.tensors.begun or (of_kernels and batch.tensors.memory.get("repeat") is None):
                return None
        return Repeat(plan, groups, rules)

    def __call__(self, optimizer: Any) -> bool:
        """Make a step, if it is like the last one; return whether it was made."""
        groups, attributes, plan = optimizer.param_groups, optimizer.__dict__, self._plan
        values = list(chain.from_iterable(map(_OPTIONS, groups)))
        if (
            len(values) != len(self._values)
            or not all(map(operator.is_, values, self._values))
            or (len(groups) > 1 and [len(group["params"]) for group in groups] != self._lengths)
            or "found_inf" in attributes
            or "grad_scale" in attributes
            or choice.wanted() != self._wanted
        ):
            return False
        params = params_of(groups)
        grads = gradients(params)
        try:
            if not plan.is_like_before(params, optimizer.state, grads) or not all(map(_may_start, self._ready)):
                return False
            for batch, start in zip(plan.batches, self._starts, strict=True):
                batch.tensors.unchanged = batch.tensors.settled = True
                start(batch.take(grads))
        finally:
            plan.release()
        return True
