"""What the two backends, ``fastloss.backends.eager`` and ``fastloss.kernels``, promise to the layers above them.

Both offer the functions of the protocols below, with these signatures and these meanings, and the same tests
run over both. Neither knows autograd, argument checks or shapes beyond one canonical view:

- ``logits`` is ``(outer, classes, inner)``, with any strides. A *row* is one ``logits[o, :, i]``, and row number
  ``o * inner + i``. ``(N, C)`` becomes ``(N, C, 1)``; ``(N, C, d1, …)`` becomes ``(N, C, d1·…)``.
- ``target`` is ``(rows,)``, contiguous, int64 / int32 / uint8. A *soft* target holds a value for each class, and is
  ``(outer, classes, inner)`` like the logits, in any floating-point dtype and any strides.
- A result "a row" is ``(rows,)``; reduced, it is ``()``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "FLAG_ELEMENTS",
    "Addresses",
    "Backend",
    "ExternalLabel",
    "Forward",
    "LossOptions",
    "RowStatistics",
    "SGDBatch",
    "SGDControls",
    "SGDRule",
    "SoftForward",
    "SoftRowStatistics",
    "check_gradients",
    "compute_dtype",
    "materialized",
    "may_keep_memory",
]


_shape_of = operator.attrgetter("shape")

# May a backend keep small device tensors from one call to the next?
may_keep_memory: ContextVar[bool] = ContextVar("fastloss_may_keep_memory", default=True)


@dataclass(frozen=True)
class LossOptions:
    """The numbers and words of one loss call, checked."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    lse_square_scale: float = 0.0
    softcap: float | None = None
    topk: tuple[int, ...] = ()  # the accuracies to compute in the same pass; empty: none
    from_logits: bool = True  # False: the input is probabilities (soft targets alone)


class Forward(NamedTuple):
    """What a forward pass gives."""

    loss: Tensor  # () or (rows,), in the dtype that was asked for
    accuracy: tuple[Tensor, ...]  # one () or (rows,) float32 for each k of options.topk
    gradient: Tensor | None  # d(loss)/d(logits) at an upstream gradient of 1, laid out as logits
    saved: tuple[Tensor, ...]  # what this backend's `cross_entropy_backward` wants back
    scale: Tensor | None  # (): 1 / (sum of the counted rows' weights); given with a gradient for "mean"


class SoftForward(NamedTuple):
    """What a forward pass against soft targets gives."""

    loss: Tensor  # () or (rows,), in the dtype that was asked for
    gradient: Tensor | None  # d(loss)/d(input) at an upstream gradient of 1, laid out as the input
    target_gradient: Tensor | None  # d(loss)/d(target), laid out as the target
    saved: tuple[Tensor, ...]  # what this backend's `soft_cross_entropy_backward` wants back


class RowStatistics(NamedTuple):
    """What one visit to the logits z (after the softcap) tells of each row; ``(rows,)`` each.

    Numbers are float64 (float32 on a device without it), so that a difference of two of them is as exact as they are.
    """

    lse: Tensor  # log Σ_c exp(z_c)
    label_logit: Tensor  # z_y; any number where the row is ignored
    entropy: Tensor | None  # H = lse − Σ_c p_c z_c of the softmax p, if asked for
    weighted_sum: Tensor | None  # Σ_c w_c z_c, where options.label_smoothing is not 0; w = 1 without a weight
    predicted: Tensor | None  # int64: the class of the greatest logit, the first of equal ones; NaN is the greatest
    rank: Tensor | None = None  # int64: how many of these classes stand before the label, if asked for


class SoftRowStatistics(NamedTuple):
    """The same of a row with soft targets t, in float64; ``(rows,)`` each."""

    lse: Tensor  # log Σ_c exp(z_c)
    nll: Tensor  # Σ_c w_c t_c (lse − z_c)
    mass: Tensor  # Σ_c w_c t_c
    weighted_sum: Tensor | None  # Σ_c w_c z_c, where options.label_smoothing is not 0
    rank: Tensor | None  # as above


class ExternalLabel(NamedTuple):
    """Each row's label, which may be a class that the logits at hand do not have; ``(rows,)`` each.

    So the ranks that shards of the classes count add up to the rank among all of them.
    """

    logit: Tensor  # float64: the label's element of the input, before the softcap
    position: Tensor  # int64, in [0, classes]: how many of the classes at hand have a lower index than the label
    most_k: int  # a rank below it is exact; another is at least that


class SGDRule(NamedTuple):
    """The hyper-parameters of one parameter group. A tensor has one element, and is read on its own device."""

    lr: float | Tensor
    momentum: float | Tensor
    dampening: float
    weight_decay: float | Tensor
    nesterov: bool
    maximize: bool
    decoupled: bool  # weight decay scales the parameter by 1 − lr · weight_decay; else it is added to the gradient


class SGDControls(NamedTuple):
    """What one step says of all of its tensors at once; tensors are ``()``, on the batch's device."""

    grad_scale: Tensor | None = None  # gradients are divided by it, and stored so, as torch.amp.GradScaler expects
    found_inf: Tensor | None = None  # float32; the step does nothing if it is not 0
    squares: Tensor | None = None  # float64: Σ g² over all gradients as they come; with it, clip to max_norm
    max_norm: float = 0.0


# A momentum buffer's flags: one byte for so many elements.
FLAG_ELEMENTS = 4096


@dataclass(eq=False)
class SGDBatch:
    """Tensors that one SGD step treats together: one device, one dtype of parameters, one way of rounding.

    All lists are of one length, an entry a parameter. Parameters overlap neither each other nor themselves.
    """

    params: list[Tensor]
    momentum: list[Tensor | None]  # None: this parameter's rule has no momentum
    companions: list[Tensor | None]  # float32 master weights or Kahan compensation, after `rounding`
    rules: list[int]  # which of the step's rules is the parameter's
    rounding: str  # "nearest", "stochastic", "master" or "kahan"
    # For some of the parameters, uint8, an element for FLAG_ELEMENTS of the parameter's, one at least: has the
    # momentum buffer begun? (Of the others it has.) One that has not becomes the gradient, without dampening, at the
    # first step that is not skipped; that step sets the flags.
    begun: dict[int, Tensor]
    memory: dict[str, Any] = field(default_factory=dict)  # what the backend keeps from step to step
    # Nothing but addresses has changed since the backend was last told otherwise: parameters and buffers are the
    # tensors that they were, they and the gradients have the dtypes, sizes, strides and flags that they had, and the
    # parameters lie where they lay.
    unchanged: bool = False


# In builds for GPUs torch has a comparison of its own, which takes half of the time.
_lie_at = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)


class Addresses:
    """Where tensors lie, without the tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.values = list(map(Tensor.data_ptr, tensors))
        self._places = list(range(len(self.values)))

    def are_of(self, tensors: list[Tensor]) -> bool:
        """Does each of these tensors lie at its address?"""
        if _lie_at is None or len(tensors) != len(self.values):
            return list(map(Tensor.data_ptr, tensors)) == self.values
        return bool(_lie_at(tensors, self.values, self._places))


class Backend(Protocol):
    """The functions that a backend offers."""

    def cross_entropy_forward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        *,
        loss_dtype: torch.dtype,
        gradient: bool,
        inplace: bool,
        divisor: Tensor | None = None,
    ) -> Forward:
        """Loss, accuracies and, if ``gradient``, the gradient (over the logits themselves if ``inplace``).

        ``gradient`` asks for a reduced loss. Without it ``saved`` is filled for ``cross_entropy_backward``.
        ``divisor``, ``()`` float64, goes with reduction "sum": the gradient, not the loss, is divided by it. So some
        of the rows get their part of the gradient of the mean over all.
        """
        ...

    def cross_entropy_backward(
        self,
        upstream: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        saved: Sequence[Tensor],
        *,
        inplace: bool,
    ) -> Tensor:
        """The gradient from the logits; ``upstream`` is ``()``, or ``(rows,)`` for reduction "none"."""
        ...

    def soft_cross_entropy_forward(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        *,
        loss_dtype: torch.dtype,
        gradient: bool,
        target_gradient: bool,
        inplace: bool,
        divisor: float = 1.0,
    ) -> SoftForward:
        """The loss of soft targets t, with u = (1−ε) t + ε/C, and either gradient if asked for (a reduced loss then).

        Of logits:        L = Σ_c w_c u_c (lse − z_c) + λ lse² Σ_c w_c t_c;  "mean" divides by the number of rows.
        Of probabilities: L = −Σ_c w_c u_c log y_c (``options.from_logits`` is False), where 0 · log y is 0.
        ``options.ignore_index`` and ``options.topk`` mean nothing here. ``divisor`` is as above, of both gradients.
        """
        ...

    def soft_cross_entropy_backward(
        self,
        upstream: Tensor,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        saved: Sequence[Tensor],
        *,
        gradient: bool,
        target_gradient: bool,
        inplace: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients from the input and the target; ``upstream`` is ``()``, or ``(rows,)`` for "none"."""
        ...

    def row_statistics_forward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        *,
        entropy: bool,
        predicted: bool,
        every_row: bool,
        ranked: ExternalLabel | None = None,
    ) -> RowStatistics:
        """What the logits say of each row, for losses that are put together from it.

        Of the options it heeds ``ignore_index``, ``softcap``, and whether ``label_smoothing`` is 0. Without
        ``every_row`` what is given for ignored rows means nothing, and their logits need not be read.
        A label out of bounds (off the CPU) is taken for 0: the layers above make such a row NaN.
        ``ranked`` asks for the ranks too, of labels that need not be those of ``target``.
        """
        ...

    def row_statistics_backward(
        self,
        upstreams: Sequence[Tensor | None],
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        lse: Tensor,
        entropy: Tensor | None,
        *,
        inplace: bool = False,
    ) -> Tensor:
        """The gradient from the logits x, for ``upstreams`` of lse, z_y, H and Σ_c w_c z_c, each ``(rows,)`` or None.

        (p_c g_lse − g_H p_c (log p_c + H) + [c = y] g_zy + g_wz w_c) ∂z_c/∂x_c,  where 0 · log 0 is 0;

        and 0 in a row whose upstreams are all 0, whatever it holds. ``lse`` and, if there is a g_H, ``entropy`` are
        the forward's, or, where p is to be that of more classes than those at hand, theirs.
        """
        ...

    def soft_statistics_forward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        *,
        ranked: ExternalLabel | None = None,
    ) -> SoftRowStatistics:
        """What logits and soft targets say of each row, from one visit to both; options and ``ranked`` as above."""
        ...

    def soft_statistics_backward(
        self,
        upstreams: Sequence[Tensor | None],
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        lse: Tensor,
        mass: Tensor,
        *,
        gradient: bool,
        target_gradient: bool,
        inplace: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients from both tensors, for ``upstreams`` of lse, nll, mass and Σ_c w_c z_c, ``(rows,)`` or None.

        Of the logits x: (p_c (g_lse + g_nll mass) − g_nll w_c t_c + g_wz w_c) ∂z_c/∂x_c,  with p_c = exp(z_c − lse);
        of the target:   w_c (g_nll (lse − z_c) + g_mass).

        ``lse`` and ``mass`` may be of more classes than those at hand.
        """
        ...

    def rescale(self, gradient: Tensor, factor: Tensor, *, inplace: bool) -> Tensor:
        """``gradient * factor``, ``factor`` a scalar on the device; in place it costs nothing where that is 1."""
        ...

    def sgd_squares(self, batch: SGDBatch, grads: list[Tensor], squares: Tensor) -> None:
        """``squares`` ``()`` float64 += Σ g² over all gradients."""
        ...

    def sgd_step(self, batch: SGDBatch, grads: list[Tensor], rules: Sequence[SGDRule], controls: SGDControls) -> None:
        """One step of SGD for every parameter θ with gradient g (of its shape; any strides and floating dtype):

        g ← ± clip · g / grad_scale,  g ← g + λ θ,  m ← μ m + (1 − τ) g,  θ ← θ − γ · (m, or g + μ m with nesterov).

        In float32 (float64 for float64 parameters); what is stored is rounded once.
        """
        ...

    def accuracy(
        self, logits: Tensor, target: Tensor, topk: tuple[int, ...], ignore_index: int, reduction: str
    ) -> tuple[Tensor, ...]:
        """For each k: the share (mean), number (sum) or 0 / 1 a row (none) of rows right at k, float32."""
        ...

    def label_ranks(self, logits: Tensor, label: ExternalLabel) -> Tensor:
        """How many classes stand before each row's label: a greater logit, or an equal one at a lower index.

        ``(rows,)``, int64. NaN is the greatest value.
        """
        ...


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and exponentials are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_gradients(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Has every gradient its parameter's shape? ``.data =`` and ``resize_`` let others pass.

    Raises:
        RuntimeError: one hasn't.
    """
    if list(map(_shape_of, grads)) == list(map(_shape_of, params)):
        return
    for param, grad in zip(params, grads, strict=True):
        if grad.shape != param.shape:
            raise RuntimeError(
                f"fastloss.SGD: a parameter of shape {tuple(param.shape)} has a gradient of shape "
                f"{tuple(grad.shape)}; expected its own shape"
            )


def materialized(grads: list[Tensor]) -> list[Tensor]:
    """Return the gradients with lazy ones replaced by tensors that hold their values; if there are none, ``grads``.

    Lazy are tensors that are negated when they are read, as autograd makes them of complex conjugates, and zeros that
    have no memory. Kernels, and torch's fused operators, read memory as it is.
    """
    if not any(map(Tensor.is_neg, grads)) and not any(map(Tensor._is_zerotensor, grads)):
        return grads
    return [grad.clone() if grad._is_zerotensor() else grad.resolve_neg() for grad in grads]
