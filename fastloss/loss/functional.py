"""The public functions: arguments → checks → the canonical view → autograd → a backend."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import _reduction as legacy

from .. import checks
from ..backends import choice
from ..backends.contract import LossOptions
from ..ranks import collectives, placements
from . import compiled, composite, sharded
from .autograd import as_labels, as_rows, fused_cross_entropy

__all__ = ["LossAndAccuracy", "accuracy", "cross_entropy", "cross_entropy_with_accuracy"]

# Logits of at most this many elements go to torch's own operator on a CPU, where a fused pass saves less than
# its Python costs (`python -m benchmarks.cpu --crossover` prints both).
SMALL_ON_CPU = 1 << 18
# And so do rows of so few classes: what is kept of a row would outweigh the row.
FEW_CLASSES = 8

FUSED_TYPES = (Tensor, torch.nn.Parameter)


class LossAndAccuracy(NamedTuple):
    """The result of :func:`cross_entropy_with_accuracy`."""

    loss: Tensor
    accuracy: Tensor | tuple[Tensor, ...]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    from_logits: bool = True,
    inplace: bool = False,
    group: Any = None,
) -> Tensor:
    r"""Cross-entropy of logits and labels or class probabilities, with its gradient from the same pass over them.

    Takes the place of :func:`torch.nn.functional.cross_entropy`: everything before the ``*`` is that function's,
    argument for argument and meaning for meaning. With z the logits, y a row's label, w the class weights, W = Σ w,
    ε the label smoothing over C classes and λ = ``lse_square_scale``, a row's loss is

        w_y (1−ε) (lse(z) − z_y)  +  w_y λ lse(z)²  +  ε/C (W lse(z) − Σ_c w_c z_c)

    and "mean" divides their sum by the sum of w_y over the rows that are not ignored. With a probability t_c for each
    class, and u_c = (1−ε) t_c + ε/C, it is

        Σ_c w_c u_c (lse(z) − z_c)  +  λ lse(z)² Σ_c w_c t_c

    and "mean" divides by the number of rows.

    Args:
        input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, …)``; float16, bfloat16, float32 or float64; any strides.
        target: class indices in [0, C), or ``ignore_index``; ``()``, ``(N,)`` or ``(N, d1, …)``; int64, int32 or
            uint8. Or class probabilities (one-hot rows, mixtures, any weights) of ``input``'s shape, in any
            floating-point dtype; one that requires grad gets its gradient.
        weight: a weight for each class, ``(C,)``, in ``input``'s dtype (or float32 beside 16-bit logits).
        size_average, reduce: torch's deprecated forms of ``reduction``.
        ignore_index: a label whose rows count neither in the loss nor in its mean, and whose gradient is 0. Class
            probabilities have no such label: beside them it must be negative.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: ε, in [0, 1] (Szegedy et al. 2016, arXiv:1512.00567).
        lse_square_scale: λ of the z-loss λ · lse², weighted as the row is (PaLM, arXiv:2204.02311, §5).
        softcap: z = softcap · tanh(input / softcap) (Gemma 2, arXiv:2408.00118, §2).
        from_logits: if False, ``input`` is probabilities y, and log y takes the place of z − lse(z): a row's loss is
            −w_y log y_y, or −Σ_c w_c t_c log y_c, where a class with t_c = 0 adds nothing, even at y_c = 0. Rows of y
            are taken as they are, whatever they add up to. There is no ``softcap`` or ``lse_square_scale`` then.
        inplace: write the gradient over ``input``, which then no longer holds the logits: saves the gradient's
            memory. autograd raises its own error where the overwritten values are still needed; reading them again
            without autograd gives the gradient. Compilers and function transforms do without it, and so do calls
            over several ranks.
        group: a ``torch.distributed`` process group, each of whose ranks has a shard of the classes, in rank order,
            of any sizes that add up to C. ``input`` is this rank's logits. Labels are among all C classes, and the
            same on every rank; class probabilities are this rank's, as ``input`` is; ``weight`` is that of all C
            classes. The loss is the same on every rank, and each has the gradient of its own logits. Every rank has
            to make the call, and to call ``backward`` where one does.

    ``input`` may be a DTensor instead, replicated or sharded on each dimension of the mesh, on one at most by class.
    ``target`` is a DTensor whose rows lie as ``input``'s; or a tensor that is the whole target on each rank, which
    serves as long as no rows are sharded (torch's own rule). ``weight`` is the whole of it, or a DTensor. The mean is
    the one over all rows that count. The loss is a DTensor: replicated, or, for "none", placed as the rows; gradients
    are placed as ``input``. Compilers take DTensors through torch's own operators.

    Returns:
        The loss, ``()``, or of a label's shape for each row for "none"; in ``input``'s dtype (float32 for 16-bit
        logits under autocast, as torch has it; beside class probabilities of a wider dtype, in that). No row counted:
        NaN for "mean", 0 for "sum".

    Raises:
        TypeError, ValueError, RuntimeError: arguments that don't fit, as torch raises them.
        IndexError: a label out of bounds, on a CPU. On a GPU the row's loss is NaN instead, since a look would
            make the host wait; ``FASTLOSS_VALIDATE=1`` in the environment raises there too. Over several ranks what
            one of them finds is raised on all of them.

    Example:
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]], requires_grad=True)
        >>> loss = cross_entropy(logits, torch.tensor([0, 1]))
        >>> loss
        tensor(0.6716, grad_fn=<NllLossBackward0>)
        >>> loss.backward()
        >>> logits.grad
        tensor([[-0.1072,  0.0876,  0.0196],
                [ 0.1503, -0.3339,  0.1836]])

        The textbook form: the outputs of a softmax and one-hot labels.

        >>> ys = torch.softmax(logits.detach(), 1)
        >>> ts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> cross_entropy(ys, ts, from_logits=False)
        tensor(0.6716)
    """
    if size_average is not None or reduce is not None:
        reduction = legacy.legacy_get_string(size_average, reduce)
    plain = lse_square_scale == 0.0 and softcap is None and from_logits is True
    if (
        plain
        and not inplace
        and group is None
        and label_smoothing.__class__ is float
        and is_small(input, target, weight)
    ):
        try:
            if not 0.0 <= label_smoothing <= 1.0:
                raise ValueError  # torch lets some of these pass
            return F.cross_entropy(
                input,
                target,
                weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
            )
        except (RuntimeError, ValueError, IndexError, TypeError):
            # Say the same in this package's words, if they have any for it.
            options = checks.checked_options(ignore_index, label_smoothing, reduction, 0.0, None)
            check_tensors(input, target, weight, options)
            raise
    options = checks.checked_options(
        ignore_index, label_smoothing, reduction, lse_square_scale, softcap, from_logits=from_logits
    )
    return loss_and_accuracy(input, target, weight, options, inplace, group)[0]


def cross_entropy_with_accuracy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    topk: int | Sequence[int] = 1,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    from_logits: bool = True,
    inplace: bool = False,
    group: Any = None,
) -> LossAndAccuracy:
    """:func:`cross_entropy` and :func:`accuracy` from one pass over the logits.

    Takes the arguments of the two; ``reduction`` is that of both. Class weights, smoothing and softcap do not touch
    the accuracy. Beside class probabilities, whose argmax is the label, the accuracy takes a pass of its own.

    Returns:
        ``(loss, accuracy)``, a NamedTuple, each as its own function returns it.

    Example:
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
        >>> loss, (top1, top2) = cross_entropy_with_accuracy(logits, torch.tensor([0, 1]), topk=(1, 2))
        >>> loss, top1, top2
        (tensor(0.6716), tensor(0.5000), tensor(1.))
    """
    if size_average is not None or reduce is not None:
        reduction = legacy.legacy_get_string(size_average, reduce)
    ks = checks.checked_topk(topk)
    options = checks.checked_options(
        ignore_index, label_smoothing, reduction, lse_square_scale, softcap, ks, from_logits
    )
    loss, values = loss_and_accuracy(input, target, weight, options, inplace, group)
    return LossAndAccuracy(loss, values if isinstance(topk, Sequence) else values[0])


@torch.no_grad()
def accuracy(
    input: Tensor,
    target: Tensor,
    topk: int | Sequence[int] = 1,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    group: Any = None,
) -> Any:
    """The share of rows whose label is among the k highest scores; every k from one pass over ``input``.

    A row is right at k if fewer than k classes stand before its label, and a class stands before it if its score is
    greater, or equal at a lower index. NaN counts as the greatest value, as in :func:`torch.argmax`.

    Args:
        input: scores, logits or probabilities alike: ``(C,)``, ``(N, C)`` or ``(N, C, d1, …)``, floating point.
        target: class indices ``()``, ``(N,)`` or ``(N, d1, …)`` in int64, int32 or uint8; or one-hot rows or class
            probabilities of ``input``'s shape, whose argmax is the label.
        topk: an int, or a tuple of ints; each at least 1. A k of C or more is always right.
        ignore_index: a label whose rows count neither as right nor in the total.
        reduction: ``"mean"``: the share in [0, 1]; ``"sum"``: the number; ``"none"``: 1 or 0 for each row (0 where
            it is ignored), of the labels' shape.
        group: each of its ranks has a shard of the classes, as in :func:`cross_entropy`; one-hot rows and
            probabilities are sharded as ``input``. Or ``input`` is a DTensor, as there.

    Returns:
        A float32 tensor for an int ``topk``, a tuple of them for a tuple. No row counted: NaN for "mean".

    Raises:
        TypeError, ValueError, RuntimeError: arguments that don't fit.
        IndexError: a label out of bounds, on a CPU; on a GPU the result is NaN. Compiled, such a row is wrong.

    Example:
        >>> scores = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
        >>> accuracy(scores, torch.tensor([0, 1]))
        tensor(0.5000)
        >>> accuracy(scores, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), topk=(1, 2))
        (tensor(0.5000), tensor(1.))
    """
    checks.check_logits(input)
    ks = checks.checked_topk(topk)
    options = checks.checked_options(ignore_index, 0.0, reduction, 0.0, None, ks)
    if group is not None or is_dtensor(input):
        values = _over_ranks(input, target, None, options, group, only_accuracy=True)[1]
        return values if isinstance(topk, Sequence) else values[0]
    if is_dense(input, target):
        target = _labels_of(target)
        options = dataclasses.replace(options, ignore_index=-1)  # argmax gives none to ignore
    checks.check_index_target(input, target, None)
    target = target.view(()) if input.dim() == 1 else target
    values = _accuracy(input, target, options)
    return values if isinstance(topk, Sequence) else values[0]


def is_small(input: Tensor, target: Tensor, weight: Tensor | None = None) -> bool:
    """Do torch's own operators serve these best: few logits on a CPU, with a target that they take?"""
    return (
        not torch.compiler.is_compiling()
        and type(input) in FUSED_TYPES
        and type(target) is Tensor
        and input.is_cpu
        and (input.numel() <= SMALL_ON_CPU or (input.dim() > 1 and input.shape[1] <= FEW_CLASSES))
        and (
            target.dtype is torch.int64
            or target.dtype is torch.uint8
            or (target.dtype is input.dtype and target.shape == input.shape)
        )
        and (weight is None or (isinstance(weight, Tensor) and weight.dtype is input.dtype))
        and not choice.is_forced()
    )


def check_tensors(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> None:
    """Everything about the tensors of a loss, the labels themselves where a look is free or asked for."""
    _check_shapes(input, target, weight, options)
    if not target.is_floating_point() and (target.is_cpu or choice.validates()):
        checks.check_labels(target, input.shape[min(1, input.dim() - 1)], options.ignore_index)


def _check_shapes(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> None:
    """Everything about the tensors but their elements."""
    checks.check_logits(input)
    if isinstance(target, Tensor) and composite.is_soft(input, target):
        checks.check_soft_target(input, target, weight, options.ignore_index)
    else:
        checks.check_index_target(input, target, weight)


def loss_and_accuracy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    inplace: bool,
    group: Any = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and the accuracies of options that are checked."""
    if group is not None or is_dtensor(input):
        return _over_ranks(input, target, weight, options, group)
    if is_traced(input, target):
        _check_shapes(input, target, weight, options)
        if is_compiled(input, target, weight, options):
            return _operated(input, target, weight, options)
        return composed(input, target, weight, options)
    check_tensors(input, target, weight, options)
    soft = target.is_floating_point()
    if not soft and input.dim() == 1:
        target = target.view(())
    if not inplace and input.numel() > 0 and is_small(input, target, weight):
        return composed(input, target, weight, options)
    if inplace and torch._debug_has_internal_overlap(input) == 1:
        raise RuntimeError(
            f"fastloss: inplace=True needs an input whose elements have memory of their own; "
            f"got strides {input.stride()} for shape {tuple(input.shape)} (an expanded tensor: clone it)"
        )
    dtype = loss_dtype(input, target, weight)
    served = input.numel() > 0 and (soft or options.from_logits) and not has_too_many_rows(input)
    if not served or (soft and weight is not None and weight.requires_grad and torch.is_grad_enabled()):
        return composed(input, target, weight, options)
    loss, values = fused_cross_entropy(
        input,
        target if soft else as_labels(target),
        None if weight is None else weight.contiguous(),
        options,
        choice.load(choice.choose(input)),
        dtype,
        inplace,
    )
    if soft:
        values = _accuracies(input, target, options)
    if options.reduction == "none":
        shape = _row_shape(input)
        return loss.view(shape), tuple(value.view(shape) for value in values)
    return loss, values


def is_dtensor(input: object) -> bool:
    """Is it a DTensor, to be served shard by shard? A compiler's are left to torch's operators."""
    return type(input) not in FUSED_TYPES and placements.is_dtensor(input) and not torch.compiler.is_compiling()


@torch._disable_dynamo  # not torch.compiler.disable, which imports the compiler at once
def _over_ranks(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    group: Any,
    *,
    only_accuracy: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and the accuracies of a DTensor, or of a group's shards of the classes."""
    checks.check_no_gradient(weight)
    if placements.is_dtensor(input):
        if group is not None:
            raise ValueError("fastloss: group is given beside a DTensor, whose mesh says which ranks have what")
        return _of_dtensor(input, target, weight, options, only_accuracy)
    group = collectives.checked_group(group)
    checks.check_logits(input)
    look, fault = input.is_cpu or choice.validates(), None
    try:
        dense = _check_part(input, target, weight, only_accuracy, options)
    except Exception as error:
        fault, dense = error, True
    rows = _row_shape(input)
    layout = collectives.agreed_layout(
        group,
        input.shape[min(1, input.dim() - 1)],
        math.prod(rows),
        device=input.device,
        facts=(options, rows, input.dtype, dense, only_accuracy, getattr(weight, "shape", None)),
        labels=None if dense else target,
        fault=fault,
        look=look,
    )
    if look:
        classes = int(layout.classes)
        checks.check_weight(input.new_empty(()).expand(classes), weight)
        if not dense:
            checks.check_labels(target, classes, options.ignore_index)
    served = choice.load(choice.choose(input))
    if only_accuracy:
        return input, sharded.accuracy(input, target, dense, options, layout, served)
    return sharded.loss_and_accuracy(
        input, target, weight, options, layout, served, loss_dtype(input, target, weight)
    )


def check_labels_together(target: Tensor, layout: collectives.Layout, ignore_index: int, **how: bool) -> None:
    """:func:`checks.check_labels` of rows that several ranks share: what one finds is raised on all."""
    fault = None
    try:
        checks.check_labels(target, int(layout.classes), ignore_index, **how)
    except IndexError as error:
        fault = error
    collectives.raise_together(fault, layout.row_groups, target.device)


def _check_part(
    input: Tensor, target: Tensor, weight: Tensor | None, only_accuracy: bool, options: LossOptions
) -> bool:
    """Checks a rank's tensors, but for what all ranks' classes must be known for. Is the target dense?"""
    if only_accuracy and is_dense(input, target):
        return True
    if not only_accuracy and isinstance(target, Tensor) and composite.is_soft(input, target):
        checks.check_soft_target(input, target, None, options.ignore_index)
        return True
    checks.check_index_target(input, target, None)
    checks.check_weight_dtype(input, weight)
    return False


def _of_dtensor(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, only_accuracy: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """By the shards that this rank has, and DTensors again."""
    if only_accuracy and is_dense(input, target):
        dense = True
    else:
        _check_shapes(input, target, weight, options)
        dense = composite.is_soft(input, target)
    plan = placements.plan(input, target, dense)
    x, t, w = placements.local(input), plan.target, placements.whole(weight)
    if not dense and (x.is_cpu or choice.validates()):
        check_labels_together(t, plan.layout, options.ignore_index)
    served = choice.load(choice.choose(x))
    if only_accuracy:
        values = sharded.accuracy(x, t, dense, options, plan.layout, served)
        return input, tuple(plan.placed(value) for value in values)
    loss, values = sharded.loss_and_accuracy(x, t, w, options, plan.layout, served, loss_dtype(input, target, weight))
    return plan.placed(loss), tuple(plan.placed(value) for value in values)


def loss_dtype(input: Tensor, target: Tensor, weight: Tensor | None, dtype: torch.dtype | None = None) -> torch.dtype:
    """As torch has it: the input's, or a wider one of class probabilities and their weights; autocast's float32.

    ``dtype`` is that of the logits, where ``input`` is not the logits themselves.
    """
    dtype = dtype or input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    half = dtype.itemsize == 2
    return torch.float32 if half and checks.is_autocast(input) else dtype


def is_compiled(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> bool:
    """Is this traced by a compiler, to be served by this package's operators?"""
    return (
        torch.compiler.is_dynamo_compiling()
        and not _is_exporting()
        and type(input) in FUSED_TYPES
        and type(target) in FUSED_TYPES
        and (target.is_floating_point() or options.from_logits)
        and not (target.is_floating_point() and weight is not None and weight.requires_grad)
        and not torch._C._are_functorch_transforms_active()
        and input.numel() > 0
        and not has_too_many_rows(input)
    )


def _is_exporting() -> bool:
    """As ``torch.compiler.is_exporting``, which dynamo answers with yes in torch 2.11, export or not."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else bool(flag)


def has_too_many_rows(input: Tensor) -> bool:
    """More than the kernels can count in 32 bits, with a tile to spare; logits may be any number."""
    return not input.is_cpu and input.dim() > 1 and input.numel() // max(input.shape[1], 1) > (1 << 31) - (1 << 13)


def _operated(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and accuracies by the operators that a compiler sees."""
    soft = target.is_floating_point()
    labels = target if soft else as_labels(target)
    weight = None if weight is None else weight.contiguous()
    loss, values = compiled.loss_and_accuracy(input, labels, weight, options, loss_dtype(input, target, weight))
    if soft:
        values = _accuracies(input, target, options)
    if options.reduction != "none":
        return loss, values
    shape = _row_shape(input)
    return loss.view(shape), tuple(value.view(shape) for value in values)


def _row_shape(input: Tensor) -> tuple[int, ...]:
    """The shape of what has one value a row."""
    return (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()


def composed(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and accuracies where no fused pass serves the loss."""
    loss = composite.cross_entropy(input, target, weight, options, loss_dtype(input, target, weight))
    return loss, _accuracies(input, target, options)


def _accuracies(input: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, ...]:
    """The accuracies beside a loss that did not give them; its arguments are checked."""
    if not options.topk:
        return ()
    if composite.is_soft(input, target):
        target = _labels_of(target)
        options = dataclasses.replace(options, ignore_index=-1)  # argmax gives none to ignore
    return _accuracy(input.detach(), target, options, checked=True)


def _accuracy(input: Tensor, target: Tensor, options: LossOptions, *, checked: bool = False) -> tuple[Tensor, ...]:
    if not options.topk:
        return ()
    if is_traced(input, target):
        return composite.accuracy(input, target, options)
    if not checked and (target.is_cpu or choice.validates()):
        checks.check_labels(target, input.shape[min(1, input.dim() - 1)], options.ignore_index)
    if input.numel() == 0 or (input.numel() <= SMALL_ON_CPU // 16 and is_small(input, target)):
        return composite.accuracy(input, target, options)
    served = choice.load(choice.choose(input))
    labels = as_labels(target)
    values = served.accuracy(as_rows(input), labels, options.topk, options.ignore_index, options.reduction)
    return tuple(v.view(target.shape) for v in values) if options.reduction == "none" else values


def is_dense(input: Tensor, target: object) -> bool:
    """Does ``target`` hold a value for each class: one-hot rows, or probabilities?"""
    if not isinstance(target, Tensor) or target.shape != input.shape:
        return False
    # One class: a target of shape (1,) is dense if it can't be a label.
    return input.shape != (1,) or target.dtype not in (torch.int64, torch.int32, torch.uint8)


def _labels_of(target: Tensor) -> Tensor:
    """The labels of one-hot rows or class probabilities: their argmax, the lower index where two are equal."""
    dim = min(1, target.dim() - 1)
    if target.shape[dim] == 0:
        raise ValueError(f"fastloss: target has shape {tuple(target.shape)}; expected at least one class")
    return (target.to(torch.uint8) if target.dtype == torch.bool else target).argmax(dim)


def is_traced(input: Tensor, target: Tensor) -> bool:
    """Must every step be a torch op: a transform, a trace, forward-mode derivatives, a tensor subclass?"""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
    ):
        return True
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        return False
    return (
        type(input) not in FUSED_TYPES
        or type(target) is not Tensor
        or input.is_meta
        or not (input.layout is target.layout is torch.strided)
    )
