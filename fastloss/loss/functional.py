"""The public functions of the loss and the accuracy; :mod:`fastloss.loss.routes` serves their calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy

from .. import checks
from ..backends import short_road
from ..backends.torch_private import legacy_reduction
from . import routes
from .sharded import checked

__all__ = ["LossAndAccuracy", "accuracy", "cross_entropy", "cross_entropy_with_accuracy"]


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
    logit_scale: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    r"""Compute the cross-entropy of logits and labels or class probabilities, and its gradient in the same pass.

    Takes the place of :func:`torch.nn.functional.cross_entropy`: everything before the ``*`` is that function's,
    argument for argument and meaning for meaning. With z = softcap(logit_scale · input) / temperature the logits, y a
    row's label, w the class weights, W = Σ w, ε the label smoothing over C classes and λ = ``lse_square_scale``, a
    row's loss is

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
        softcap: softcap(x) = softcap · tanh(x / softcap) (Gemma 2, arXiv:2408.00118, §2); x for None.
        from_logits: if False, ``input`` is probabilities y, and log y takes the place of z − lse(z): a row's loss is
            −w_y log y_y, or −Σ_c w_c t_c log y_c, where a class with t_c = 0 adds nothing, even at y_c = 0. Rows of y
            are taken as they are, whatever they add up to. The gradient of t_c is −(1−ε) w_c log y_c, at t_c = 0 too.
            There is no ``softcap``, ``lse_square_scale``, ``logit_scale`` or ``temperature`` then.
        inplace: write the gradient over ``input``, which then no longer holds the logits: saves the gradient's
            memory. Its rows may not overlap in memory. autograd raises its own error where the overwritten values are
            still needed; reading them again without autograd gives the gradient. Compilers and function transforms do
            without it, and so do calls over several ranks.
        group: a ``torch.distributed`` process group, each of whose ranks has a shard of the classes, in rank order,
            of any sizes that add up to C. ``input`` is this rank's logits. Labels are among all C classes, and the
            same on every rank; class probabilities are this rank's, as ``input`` is; ``weight`` is that of all C
            classes. The loss is the same on every rank, and each has the gradient of its own logits. Every rank has
            to make the call, and to call ``backward`` where one does. Second derivatives are refused.
        logit_scale: a factor of the logits before the softcap, from 1e-9 to 1e9 (Cohere, Granite; CLIP,
            arXiv:2103.00020). A float, or a 0-d tensor of floating point on ``input``'s device, which may hold
            another number at each call without a wait for the host; no gradient flows to it.
        temperature: what the logits are divided by after the softcap; as ``logit_scale``.

    ``input`` may be a DTensor instead, replicated or sharded on each dimension of the mesh, on one at most by class.
    ``target`` is a DTensor whose rows lie as ``input``'s; or a tensor that is the whole target on each rank, which
    serves as long as no rows are sharded (torch's own rule). ``weight`` is the whole of it, or a DTensor. The mean is
    the one over all rows that count. The loss is a DTensor: replicated, or, for "none", placed as the rows; gradients
    are placed as ``input``. Compilers take DTensors through torch's own operators.

    Returns:
        The loss, ``()``, or of a label's shape for each row for "none"; in ``input``'s dtype (float32 for 16-bit
        logits under autocast, as torch has it; beside class probabilities of a wider dtype, in that). No row counted:
        NaN for "mean", 0 for "sum".

    Second derivatives are as exact as torch's, with one exception: "mean" and "sum" beside rows of class
    probabilities of which several are great (mixup). There the program must hold ``input``, unchanged, until they are
    computed. Otherwise they are inexact without an error: in bfloat16 some elements are off by a third.

    Raises:
        TypeError, ValueError, RuntimeError: arguments that don't fit, as torch raises them.
        IndexError: a label out of bounds, on a CPU. On a GPU the row's loss is NaN instead, since a look would
            make the host wait; ``FASTLOSS_VALIDATE=1`` in the environment raises there too, and for a
            ``logit_scale`` or ``temperature`` in a tensor that is not positive, whose loss means nothing. Over
            several ranks an error on one of them is raised on all.

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
    call = None
    if not torch.compiler.is_compiling() and short_road.is_open and group is size_average is reduce is None:
        given: tuple[Any, ...] = ("loss", ignore_index, reduction, label_smoothing, lse_square_scale, softcap)
        given += (from_logits, inplace, logit_scale, temperature)
        given += short_road.place_of(input) if inplace else ()
        served, call = short_road.serve(input, target, weight, given, logit_scale, temperature)
        if served is not None:
            return served[0] if reduction != "none" else routes.in_rows(served[0], input)
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    if (
        lse_square_scale == 0.0
        and softcap is None
        and from_logits is True
        and inplace is False
        and group is None
        and label_smoothing.__class__ is float
        and logit_scale.__class__ is float
        and temperature.__class__ is float
        and logit_scale == temperature == 1.0
        and routes.is_small(input, target, weight)
        and 0.0 <= label_smoothing <= 1.0
    ):
        try:
            return torch_cross_entropy(
                input,
                target,
                weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
            )
        except (RuntimeError, ValueError, IndexError, TypeError):
            pass  # The checks below raise this package's own error, if it has one, or else torch's again.
    if checks.is_symbolic(input, target):
        return checks.symbolic(cross_entropy, locals())
    options = checked(
        group,
        input,
        checks.checked_options,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        from_logits=from_logits,
        inplace=inplace,
        logit_scale=logit_scale,
        temperature=temperature,
        logits=input,
    )
    return routes.loss_and_accuracies(input, target, weight, options, inplace, group, call)[0]


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
    logit_scale: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
) -> LossAndAccuracy:
    """Compute :func:`cross_entropy` and :func:`accuracy` in one pass over the logits.

    Takes the arguments of the two; ``reduction`` is that of both. Class weights, smoothing, softcap and scales
    do not touch the accuracy. Beside class probabilities, whose argmax is the label, the accuracy takes a pass of its
    own.

    Returns:
        ``(loss, accuracy)``, a NamedTuple, each as its own function returns it.

    Example:
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
        >>> loss, (top1, top2) = cross_entropy_with_accuracy(logits, torch.tensor([0, 1]), topk=(1, 2))
        >>> loss, top1, top2
        (tensor(0.6716), tensor(0.5000), tensor(1.))
    """
    call = None
    if not torch.compiler.is_compiling() and short_road.is_open and group is size_average is reduce is None:
        given: tuple[Any, ...] = ("both", ignore_index, reduction, label_smoothing, lse_square_scale, softcap)
        given += (from_logits, inplace, logit_scale, temperature)
        given += short_road.place_of(input) if inplace else ()
        served, call = short_road.serve(input, target, weight, (*given, *_flat(topk)), logit_scale, temperature)
        if served is not None:
            loss, _, *values = served
            if reduction == "none":
                loss, *values = (routes.in_rows(value, input) for value in (loss, *values))
            return LossAndAccuracy(loss, values[0] if topk.__class__ is int else tuple(values))
    if checks.is_symbolic(input, target):
        return checks.symbolic(cross_entropy_with_accuracy, locals())
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    options = checked(
        group,
        input,
        checks.checked_options,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        topk=checked(group, input, checks.checked_topk, topk),
        from_logits=from_logits,
        inplace=inplace,
        logit_scale=logit_scale,
        temperature=temperature,
        logits=input,
    )
    loss, of_ks = routes.loss_and_accuracies(input, target, weight, options, inplace, group, call)
    return LossAndAccuracy(loss, of_ks if isinstance(topk, Sequence) else of_ks[0])


def _flat(topk: Any) -> tuple[Any, ...]:
    """Return ``topk``, and whether it is a sequence, as options of the short road."""
    return ("several", *topk) if topk.__class__ in (tuple, list) else (topk,)


def accuracy(
    input: Tensor,
    target: Tensor,
    topk: int | Sequence[int] = 1,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    group: Any = None,
) -> Any:
    """Compute the share of rows whose label is among the k highest scores, for all k in one pass over ``input``.

    A row is right at k if fewer than k classes stand before its label, and a class stands before it if its score is
    greater, or equal at a lower index. NaN counts as the greatest value, as in :func:`torch.argmax`.

    Args:
        input: scores, logits or probabilities alike: ``(C,)``, ``(N, C)`` or ``(N, C, d1, …)``, floating point.
        target: class indices ``()``, ``(N,)`` or ``(N, d1, …)`` in int64, int32 or uint8; or one-hot rows or class
            probabilities of ``input``'s shape, whose argmax is the label. Not 0 or 1 for each of a binary
            classifier's scores ``(N,)`` or ``(N, 1)``: those need ``torch.stack([-scores, scores], 1)`` and ``(N,)``.
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
    call = None
    if not torch.compiler.is_compiling() and short_road.is_open and group is None:
        served, call = short_road.serve(input, target, None, ("accuracy", ignore_index, reduction, *_flat(topk)))
        if served is not None:
            values = tuple(served) if reduction != "none" else tuple(routes.in_rows(v, input) for v in served)
            return values[0] if topk.__class__ is int else values
    if checks.is_symbolic(input, target):
        return checks.symbolic(accuracy, locals())
    with torch.no_grad():
        checked(group, input, checks.check_logits, input)
        ks = checked(group, input, checks.checked_topk, topk)
        options = checked(
            group, input, checks.checked_options, ignore_index=ignore_index, reduction=reduction, topk=ks
        )
        values = routes.accuracies(input, target, options, group, call)
    return values if isinstance(topk, Sequence) else values[0]
