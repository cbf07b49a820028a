"""The contract of the two backends, ``fastloss.backends.eager`` and ``fastloss.kernels``.

Both offer the functions of :class:`Backend` with these signatures and meanings, and the same tests run over both.
Neither knows autograd, argument checks or shapes beyond one canonical view:

- The input, of logits or probabilities, is ``(outer, classes, inner)``, with any strides. A *row* is one
  ``input[o, :, i]``, and row number ``o * inner + i``. ``(N, C)`` becomes ``(N, C, 1)``; ``(N, C, d1, …)`` becomes
  ``(N, C, d1·…)``.
- ``target`` is ``(rows,)``, contiguous, int64 / int32 / uint8; a backend widens labels as it reads them. A
  *soft* target holds one value per class, and is ``(outer, classes, inner)`` like the input, in any floating-point
  dtype and any strides.
- A result with one element per row is ``(rows,)``; reduced, it is ``()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .batch import FLAG_ELEMENTS, Addresses, SGDBatch, SGDControls, SGDRule, check_gradients
from .memory import may_keep_memory

__all__ = [
    "FLAG_ELEMENTS",
    "Addresses",
    "Backend",
    "DivergenceOptions",
    "DivergenceRows",
    "ExternalLabel",
    "Factors",
    "Forward",
    "LossInputs",
    "LossOptions",
    "PartUpstreams",
    "RowStatistics",
    "RowUpstreams",
    "SGDBatch",
    "SGDControls",
    "SGDRule",
    "Scalar",
    "SoftForward",
    "SoftRowStatistics",
    "Statistics",
    "WantedGradients",
    "WantedParts",
    "check_gradients",
    "compute_dtype",
    "may_keep_memory",
]


class Scalar:
    """A number in a 0-d tensor on the logits' device, which the host does not read.

    Two are equal where a kernel that is ready for the one can take the other; their numbers are not compared.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scalar) and self._kind() == other._kind()

    def __hash__(self) -> int:
        return hash(self._kind())

    def __repr__(self) -> str:
        """Return what must be equal on all ranks of a call: on a CPU the number."""
        return f"Scalar({self.tensor.item() if self.tensor.is_cpu else self.tensor.dtype})"

    def _kind(self) -> tuple[Any, ...]:
        return self.tensor.dtype, self.tensor.device, self.tensor.data_ptr() % 16


class Factors(NamedTuple):
    """The numbers by which logits z come from the input x: floats, or 0-d tensors.

    With a softcap z = outer · tanh(x / divisor), and ∂z/∂x = slope (1 − tanh²); without z = outer · x, and ∂z/∂x =
    slope.
    """

    divisor: Any  # softcap / logit_scale; 1 without a softcap
    outer: Any  # softcap / temperature; logit_scale / temperature without a softcap
    slope: Any  # logit_scale / temperature


@dataclass(frozen=True)
class LossOptions:
    """The options of one loss call, checked."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    lse_square_scale: float = 0.0
    softcap: float | None = None
    topk: tuple[int, ...] = ()  # the accuracies to compute in the same pass; empty: none
    from_logits: bool = True  # False: the input is probabilities (soft targets alone)
    logit_scale: float | Scalar = 1.0
    temperature: float | Scalar = 1.0

    @property
    def is_reduced(self) -> bool:
        """Return True if the loss is one number."""
        return self.reduction != "none"

    @property
    def hides_softmax(self) -> bool:
        """Return True if the softmax does not follow from the gradient."""
        return self.softcap is not None or self.lse_square_scale != 0 or not self.from_logits

    @property
    def is_scaled(self) -> bool:
        """Return True if the logits are scaled: ``logit_scale`` or ``temperature`` is not the float 1."""
        numbers = self.logit_scale, self.temperature
        return any(isinstance(number, Scalar) or number != 1.0 for number in numbers)

    def factors(self, number: Callable[[Tensor], Any]) -> Factors:
        """Return the factors of the logits; ``number`` is called with the tensor of each :class:`Scalar`."""
        scale, temperature = (
            number(value.tensor) if isinstance(value, Scalar) else value
            for value in (self.logit_scale, self.temperature)
        )
        slope = scale / temperature
        if self.softcap is None:
            return Factors(1.0, slope, slope)
        return Factors(self.softcap / scale, self.softcap / temperature, slope)

    def scales(self) -> dict[str, Any]:
        """Return ``logit_scale`` and ``temperature`` as arguments of a public function."""
        numbers = {"logit_scale": self.logit_scale, "temperature": self.temperature}
        return {name: value.tensor if isinstance(value, Scalar) else value for name, value in numbers.items()}

    def scalars(self) -> tuple[Tensor, ...]:
        """Return the tensors of the options, for autograd to save."""
        numbers = self.logit_scale, self.temperature
        return tuple(number.tensor for number in numbers if isinstance(number, Scalar))

    def with_scalars(self, tensors: Sequence[Tensor]) -> tuple[LossOptions, Sequence[Tensor]]:
        """Return the options with the first of ``tensors`` in the place of :meth:`scalars`, and the other tensors."""
        count = len(self.scalars())
        if not count:
            return self, tensors
        names = [name for name in ("logit_scale", "temperature") if isinstance(getattr(self, name), Scalar)]
        given = {name: Scalar(tensor) for name, tensor in zip(names, tensors, strict=False)}
        return replace(self, **given), tensors[count:]  # type: ignore[arg-type]


class LossInputs(NamedTuple):
    """The tensors and options that every function of a loss takes, in the canonical view."""

    input: Tensor  # (outer, classes, inner), floating-point: logits, or probabilities without options.from_logits
    target: Tensor  # (rows,) int64, int32 or uint8; soft: (outer, classes, inner), floating-point
    weight: Tensor | None  # (classes,), floating-point, contiguous: w
    options: LossOptions


class WantedGradients(NamedTuple):
    """The gradients that a function with soft targets writes, and the place of the input's."""

    input: bool
    target: bool
    inplace: bool = False  # over the input
    later: bool = True  # a backward pass may follow

    def tensors(self, inputs: LossInputs) -> tuple[Tensor | None, Tensor | None]:
        """Return the tensors to write to, laid out as the input and the target; None for one that is not wanted."""
        input, target = inputs[:2]
        of_input = (input if self.inplace else torch.empty_like(input)) if self.input else None
        return of_input, torch.empty_like(target) if self.target else None


class Forward(NamedTuple):
    """The result of a forward pass."""

    loss: Tensor  # () or (rows,), in the dtype that was asked for
    accuracy: tuple[Tensor, ...]  # one () or (rows,) float32 for each k of options.topk
    gradient: Tensor | None  # d(loss)/d(logits) at an upstream gradient of 1, laid out as logits
    saved: tuple[Tensor, ...]  # for this backend's `cross_entropy_backward`
    nll: Tensor | None = None  # −log p_y, a number per row; given with a gradient that is not in place


class SoftForward(NamedTuple):
    """The result of a forward pass against soft targets."""

    loss: Tensor  # () or (rows,), in the dtype that was asked for
    gradient: Tensor | None  # d(loss)/d(input) at an upstream gradient of 1, laid out as the input
    target_gradient: Tensor | None  # d(loss)/d(target), laid out as the target
    saved: tuple[Tensor, ...]  # for this backend's `soft_cross_entropy_backward`
    row_loss: Tensor | None = None  # −Σ_c w_c u_c log p_c per row; given with a gradient of logits, not in place


class WantedParts(NamedTuple):
    """The parts of :class:`Statistics` that are asked for, beside the loss."""

    z_loss: bool
    lse: bool
    entropy: bool
    predicted: bool
    correct: bool
    log_sum_sq_probs: bool = False
    mean_logit: bool = False

    @property
    def every_row(self) -> bool:
        """Return True if ignored rows have parts too."""
        return self.lse or self.entropy or self.predicted or self.log_sum_sq_probs or self.mean_logit

    def numbers(self) -> WantedNumbers:
        """Return the numbers of rows that the parts are made of."""
        best = self.predicted or self.correct
        return WantedNumbers(self.every_row, self.entropy, best, self.log_sum_sq_probs, self.mean_logit)


class WantedNumbers(NamedTuple):
    """The numbers of :class:`RowStatistics` that are asked for, beside lse and z_y.

    Without ``every_row`` those of ignored rows are arbitrary, and their logits need not be read.
    """

    every_row: bool = False
    entropy: bool = False
    predicted: bool = False
    log_sum_sq_probs: bool = False
    logit_sum: bool = False


class Statistics(NamedTuple):
    """The loss, and numbers of each row, ``(rows,)`` each; a part that was not asked for is None."""

    loss: Tensor  # () or (rows,), in the dtype that was asked for
    z_loss: Tensor | None  # the part of the loss that λ makes, likewise
    lse: Tensor | None  # log Σ_c exp(z_c), in the dtype of the arithmetic
    entropy: Tensor | None  # H = lse − Σ_c p_c z_c of the softmax p, likewise
    predicted: Tensor | None  # as in RowStatistics
    correct: Tensor | None  # bool: the label is predicted, and not ignored
    log_sum_sq_probs: Tensor | None  # log Σ_c p_c², in the dtype of the arithmetic
    mean_logit: Tensor | None  # the mean of z over the classes, likewise
    saved: tuple[Tensor | None, ...]  # for this backend's `statistics_backward`


class PartUpstreams(NamedTuple):
    """The upstream gradients of the differentiable parts of :class:`Statistics`, in any strides; None is 0."""

    loss: Tensor | None = None
    z_loss: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None


class RowStatistics(NamedTuple):
    """The numbers of each row from one visit to the logits z (after the softcap); ``(rows,)`` each.

    They are float64 (float32 on a device without it), so that a difference of two of them is as exact as they are.
    """

    lse: Tensor  # log Σ_c exp(z_c)
    label_logit: Tensor  # z_y; any number where the row is ignored
    entropy: Tensor | None  # H = lse − Σ_c p_c z_c of the softmax p, if asked for
    weighted_sum: Tensor | None  # Σ_c w_c z_c, where options.label_smoothing is not 0; w = 1 without a weight
    predicted: Tensor | None  # int64: the class of the greatest logit, the first of equal ones; NaN is the greatest
    rank: Tensor | None = None  # int64: how many of these classes stand before the label, if asked for
    log_sum_sq_probs: Tensor | None = None  # log Σ_c p_c², if asked for
    logit_sum: Tensor | None = None  # Σ_c z_c, if asked for


class RowUpstreams(NamedTuple):
    """The upstream gradients of the differentiable numbers of :class:`RowStatistics`, ``(rows,)`` each; None is 0."""

    lse: Tensor | None = None
    label_logit: Tensor | None = None
    entropy: Tensor | None = None
    weighted_sum: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    logit_sum: Tensor | None = None


class SoftRowStatistics(NamedTuple):
    """The numbers of each row with soft targets t, in float64; ``(rows,)`` each."""

    lse: Tensor  # log Σ_c exp(z_c)
    nll: Tensor  # Σ_c w_c t_c (lse − z_c)
    mass: Tensor  # Σ_c w_c t_c
    weighted_sum: Tensor | None  # Σ_c w_c z_c, where options.label_smoothing is not 0
    rank: Tensor | None  # as above


class ExternalLabel(NamedTuple):
    """Each row's label, which may be a class that these logits do not have; ``(rows,)`` each.

    So the ranks that shards of the classes count add up to the rank among all classes.
    """

    logit: Tensor  # float64: the label's element of the input, before the softcap
    position: Tensor  # int64, in [0, classes]: how many of these classes have a lower index than the label
    most_k: int  # a rank below it is exact; a higher one is at least that


@dataclass(frozen=True)
class DivergenceOptions:
    """The options of a divergence of two softmaxes, a student's s and a teacher's t, checked."""

    beta: float = 0.0  # 0: KL(t ‖ s); 1: KL(s ‖ t); between: β KL(t ‖ m) + (1−β) KL(s ‖ m), m = β t + (1−β) s
    # The softcap, logit_scale and temperature of either side; their other options are not used.
    student: LossOptions = LossOptions()
    teacher: LossOptions = LossOptions()


class DivergenceInputs(NamedTuple):
    """The logits of a divergence, ``(outer, classes, inner)`` of any dtypes and strides, and what is made of them."""

    student: Tensor
    teacher: Tensor
    upstream: Tensor | None  # the gradient of each row's divergence, (rows,) float64, contiguous
    options: DivergenceOptions


class DivergenceRows(NamedTuple):
    """The numbers of each row, ``(rows,)`` float64 each; None: not computed."""

    lse: Tensor | None = None  # log Σ_c exp(z_c) of the student
    teacher_lse: Tensor | None = None
    loss: Tensor | None = None  # the divergence
    # What the gradient needs: KL(s ‖ t) for β = 1, KL(s ‖ m) for 0 < β < 1; any number for β = 0.
    level: Tensor | None = None


class Backend(Protocol):
    """The functions of a backend."""

    def cross_entropy_forward(
        self,
        inputs: LossInputs,
        *,
        loss_dtype: torch.dtype,
        gradient: bool | None,
        inplace: bool,
        divisor: Any = None,
    ) -> Forward:
        """Return the loss, the accuracies and, if ``gradient``, the gradient (over the logits if ``inplace``).

        ``gradient`` needs a reduced loss. Where it is False ``saved`` is filled for ``cross_entropy_backward``; where
        it is None no backward pass follows.
        ``divisor``, ``()`` float64, goes with reduction "sum": the gradient, not the loss, is divided by it. So some
        of the rows get their part of the gradient of the mean over all rows.
        """
        ...

    def cross_entropy_backward(
        self, upstream: Tensor, inputs: LossInputs, saved: Sequence[Tensor], *, inplace: bool
    ) -> Tensor:
        """Return the gradient from the logits; ``upstream`` is ``()``, or ``(rows,)`` for reduction "none"."""
        ...

    def soft_cross_entropy_forward(
        self, inputs: LossInputs, wanted: WantedGradients, *, loss_dtype: torch.dtype, divisor: float = 1.0
    ) -> SoftForward:
        """Return the loss of soft targets t, with u = (1−ε) t + ε/C, and the gradients that are wanted.

        Of logits:        L = Σ_c w_c u_c (lse − z_c) + λ lse² Σ_c w_c t_c;  "mean" divides by the number of rows. Of
        probabilities: L = −Σ_c w_c u_c log y_c (``options.from_logits`` is False), where 0 · log y is 0.
        ``options.ignore_index`` and ``options.topk`` are not used. A gradient needs a reduced loss. ``divisor`` is as
        in :meth:`cross_entropy_forward`, for both gradients.
        """
        ...

    def soft_cross_entropy_backward(
        self, upstream: Tensor, inputs: LossInputs, saved: Sequence[Tensor], wanted: WantedGradients
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients from the input and the target; ``upstream`` is ``()``, or ``(rows,)`` for "none"."""
        ...

    def statistics_forward(self, inputs: LossInputs, wanted: WantedParts, *, loss_dtype: torch.dtype) -> Statistics:
        """Return the loss and the parts that are wanted. A label out of bounds (off the CPU) makes its row NaN."""
        ...

    def statistics_backward(
        self, upstreams: PartUpstreams, inputs: LossInputs, saved: Sequence[Tensor | None]
    ) -> Tensor:
        """Return the gradient from the logits.

        A row whose upstreams are all 0 has a gradient of 0, even if it holds NaN.
        """
        ...

    def row_statistics_forward(
        self, inputs: LossInputs, wanted: WantedNumbers, ranked: ExternalLabel | None = None
    ) -> RowStatistics:
        """Return the numbers of each row, from which the layers above compute losses.

        It uses the options ``ignore_index``, ``softcap``, and whether ``label_smoothing`` is 0. A label out of bounds
        (off the CPU) is taken for 0: the layers above make such a row NaN. ``ranked`` asks for the ranks too, of
        labels that may differ from ``target``.
        """
        ...

    def row_statistics_backward(
        self, upstreams: Sequence[Tensor | None], inputs: LossInputs, saved: Sequence[Tensor | None], *, inplace: bool
    ) -> Tensor:
        """Return the gradient from the logits x. ``upstreams`` are those of :class:`RowUpstreams`, in its order.

        (p_c g_lse − g_H p_c (log p_c + H) + [c = y] g_zy + g_wz w_c + 2 g_q p_c (p_c / Σ p² − 1) + g_z) ∂z_c/∂x_c,

        where 0 · log 0 is 0, g_q is of log Σ p² and g_z of Σ_c z_c; and 0 in a row whose upstreams are all 0, even if
        it holds NaN. ``saved`` are lse and, where there is a g_H or a g_q, the entropy and log Σ p², else None: from
        the forward pass, or of more classes than these logits have: p is that of all of them then.
        """
        ...

    def soft_statistics_forward(
        self, inputs: LossInputs, *, ranked: ExternalLabel | None = None
    ) -> SoftRowStatistics:
        """Return the numbers of each row with soft targets, as :meth:`row_statistics_forward` does."""
        ...

    def soft_statistics_backward(
        self,
        upstreams: Sequence[Tensor | None],
        inputs: LossInputs,
        lse: Tensor,
        mass: Tensor,
        wanted: WantedGradients,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients from both tensors. ``upstreams`` are of lse, nll, mass and Σ_c w_c z_c, or None.

        Of the logits x: (p_c (g_lse + g_nll mass) − g_nll w_c t_c + g_wz w_c) ∂z_c/∂x_c,  with p_c = exp(z_c − lse);
        of the target:   w_c (g_nll (lse − z_c) + g_mass).

        ``lse`` and ``mass`` may be of more classes than these logits have.
        """
        ...

    def kl_div(
        self, inputs: DivergenceInputs, known: DivergenceRows | None = None, *, lse_only: bool = False
    ) -> DivergenceRows:
        """Return the numbers of each row; with an ``upstream``, write the gradient over the student's logits.

        A row whose upstream is 0 has a gradient of 0, even if it holds NaN. 0 · log 0 is 0.

        Numbers that are ``known`` are of more classes than these logits have, and are returned as they are; the
        others are of these classes, so that ``loss`` and ``level`` beside a known lse are this part of their sums.
        ``lse_only``: compute the log-sum-exps alone.
        """
        ...

    def rescale(self, gradient: Tensor, factor: Tensor, *, inplace: bool) -> Tensor:
        """Return ``gradient * factor``, with a scalar on the device; in place it costs nothing where that is 1."""
        ...

    def sgd_squares(self, batch: SGDBatch, grads: list[Tensor], squares: Tensor) -> None:
        """Add Σ g² over all gradients to ``squares``, ``()`` float64."""
        ...

    def sgd_step(self, batch: SGDBatch, grads: list[Tensor], rules: Sequence[SGDRule], controls: SGDControls) -> None:
        """Do one step of SGD for every parameter θ with gradient g (of its shape; any strides and floating dtype):

        g ← ± clip · g / grad_scale,  g ← g + λ θ,  m ← μ m + (1 − τ) g,  θ ← θ − γ · (m, or g + μ m with nesterov).

        It computes in float32 (float64 for float64 parameters), and rounds each result once.
        """
        ...

    def accuracy(
        self, logits: Tensor, target: Tensor, topk: tuple[int, ...], ignore_index: int, reduction: str
    ) -> tuple[Tensor, ...]:
        """Return for each k the share (mean) or number (sum) of right rows, or 0 / 1 per row (none); float32."""
        ...

    def label_ranks(self, logits: Tensor, label: ExternalLabel) -> Tensor:
        """Return how many classes stand before each row's label, ``(rows,)`` int64.

        A class stands before it if its logit is greater, or equal at a lower index. NaN is the greatest value.
        """
        ...


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and exponentials: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
