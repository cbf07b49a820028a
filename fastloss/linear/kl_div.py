"""Divergences of a student's classes from a teacher's, from the hidden states of both, without their logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import choice
from ..backends.contract import Backend, DivergenceInputs, DivergenceOptions, DivergenceRows, compute_dtype
from ..backends.torch_private import disable_dynamo
from ..backends.view import as_labels, wide_labels
from ..loss import composite, routes
from ..loss.sharded import checked, refuse
from ..ranks import collectives, placements
from ..ranks.collectives import Layout, all_reduce_detached, gather
from .arguments import check_linear_map, checked_arguments, dtype_of_logits, shifted_labels
from .autograd import by_chunks
from .chunks import (
    Chunk,
    ChunkLoss,
    Gradients,
    Index,
    LinearOptions,
    Losses,
    Needs,
    Saved,
    Tensors,
    dtype_of_chunk,
    logits_of,
    of_counted,
    project,
    row_of_logits,
    rows_of_chunk,
)
from .sharded import common_rows_of_chunk

__all__ = ["linear_kl_div"]


def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    teacher_linear_bias: Tensor | None = None,
    target: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.0,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    shift: bool | int = False,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    skip_ignored: bool | None = None,
    accumulate_grad: bool = False,
    logits_dtype: torch.dtype | None = None,
    group: Any = None,
    logit_scale: float | Tensor = 1.0,
    teacher_logit_scale: float | Tensor = 1.0,
) -> Tensor:
    r"""Compute the divergence of a student's classes from a teacher's without holding the logits of either.

    With s = softmax(softcap(a (x Wᵀ + b)) / T) of the student, t the same of the teacher, T the ``temperature``, a
    the ``logit_scale`` and β ``beta``, a row has

        β = 0        KL(t ‖ s) = Σ_c t_c log (t_c / s_c)
        β = 1        KL(s ‖ t) = Σ_c s_c log (s_c / t_c)
        0 < β < 1    β KL(t ‖ m) + (1−β) KL(s ‖ m),   m = β t + (1−β) s

    which is the generalised Jensen-Shannon divergence of Agarwal et al., On-Policy Distillation of Language Models
    (arXiv 2306.13649, eq. 1), with β as TRL's ``generalized_jsd_loss`` and Liger's ``LigerFusedLinearJSD`` take it,
    its ends too. Towards an end the mixed form goes to 0, and at the end it is the KL divergence. Terms whose
    probability is 0 are 0.

    Some rows at a time are projected by both maps; a kernel visits both logits, gives the divergence and writes the
    gradient of the student's logits over them, and the gradients of the student's tensors are added up before the
    next rows are projected, as in :func:`fastloss.linear_cross_entropy`: four products, and beside the gradients a
    chunk of logits of either side. The arithmetic is float32 (float64 beside float64 tensors).

    Args:
        input: x, the student's hidden states, ``(D,)``, ``(N, D)`` or ``(…, D)``; float16, bfloat16, float32 or
            float64.
        linear_weight: W, ``(C, D)``.
        teacher_input, teacher_linear_weight: of the teacher, ``(…, D')`` and ``(C, D')``, of the same rows and
            classes; D' and the dtype may be others. They are constants: the teacher gets no gradient.
        linear_bias, teacher_linear_bias: ``(C,)`` each.
        target: labels of the rows, ``(…)``, in int64, int32 or uint8, of which only those that are ``ignore_index``
            matter: their rows do not count, and may hold anything. By default every row counts.
        ignore_index: a label whose rows count neither in the loss nor in its mean.
        beta: β, in [0, 1].
        temperature: T of both sides, as in :func:`fastloss.cross_entropy`. The loss is not multiplied by T².
        reduction: ``"mean"`` over the rows that count (TRL's ``"batchmean"``), ``"sum"`` or ``"none"``.
        softcap, teacher_softcap: of the student's and the teacher's logits, softcap · tanh(z / softcap).
        shift: as in :func:`fastloss.linear_cross_entropy`: position t counts if ``target[..., t + shift]`` does; the
            last ``shift`` positions don't.
        chunk_size, memory_budget, skip_ignored, accumulate_grad, logits_dtype: as in
            :func:`fastloss.linear_cross_entropy`, of both sides' logits.
        group: a ``torch.distributed`` process group, each of whose ranks has a shard of the classes, in rank order
            and of any size: ``linear_weight``, ``teacher_linear_weight`` and the biases are this rank's, of the same
            classes. The hidden states and the target are the same on every rank, and ``input``'s gradient is the
            whole of it. DTensors are refused.
        logit_scale, teacher_logit_scale: of the student's and the teacher's logits, as in
            :func:`fastloss.cross_entropy`.

    Returns:
        The divergence, ``()``; for "none" ``(…)``, of ``input``'s rows (all but the last ``shift`` of each sequence),
        where a row that does not count has 0. In ``input``'s dtype, float32 for 16 bits under autocast.

    Any of ``input``, ``linear_weight`` and ``linear_bias`` may require a gradient; nothing is computed for the
    others. Second derivatives hold the logits of both sides; with ``group=`` they are refused. ``torch.compile``
    leaves the call to the uncompiled program (a graph break).

    Raises:
        TypeError, ValueError, RuntimeError: arguments that don't fit: a teacher of other classes or rows, a ``beta``
            outside of [0, 1], a ``temperature`` of 0 or less.

    Example:
        >>> import torch
        >>> hidden = torch.tensor([[1.0, 2.0], [0.5, -1.0]], requires_grad=True)
        >>> head = torch.tensor([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6]], requires_grad=True)
        >>> teacher_hidden, teacher_head = torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5], [0.0], [1.0]])
        >>> loss = linear_kl_div(hidden, head, teacher_hidden, teacher_head, temperature=2.0)
        >>> loss
        tensor(0.0057, grad_fn=<_LinearCrossEntropyBackward>)
        >>> loss.backward()
        >>> head.grad.shape
        torch.Size([3, 2])
    """
    if checks.is_symbolic(input, linear_weight):
        return checks.symbolic(linear_kl_div, locals())
    terms, scales = (ignore_index, reduction), (softcap, logit_scale, temperature)
    chunking = chunk_size, memory_budget, shift, skip_ignored, accumulate_grad, logits_dtype
    tensors: Any = input, linear_weight, target, linear_bias, None
    arguments = checked_arguments(group, tensors, terms, scales, chunking)
    of_teacher = beta, arguments.options, teacher_softcap, teacher_logit_scale, input
    divergence = checked(group, input, checks.checked_divergence, *of_teacher)
    student = input, linear_weight, linear_bias
    teacher = teacher_input, teacher_linear_weight, teacher_linear_bias
    checked(group, input, _check_tensors, student, teacher, target, arguments.shift)
    call = LinearOptions(arguments.options, dtype_of_logits(input), input.dtype, **arguments.chunking)
    return _divergence(student, teacher, target, divergence, call, arguments.shift, group)


_Map = tuple[Tensor, Tensor, Tensor | None]  # the input, W and b of a linear map


def _check_tensors(student: _Map, teacher: _Map, target: Tensor | None, shift: int) -> None:
    named: dict[str, Any] = {}
    for of, tensors in (("", student), ("teacher_", teacher)):
        names = (f"{of}input", f"{of}linear_weight", f"{of}linear_bias")
        named |= dict(zip(names, tensors, strict=True))
    named["target"] = target
    for name, tensor in named.items():
        if tensor is None and (name == "target" or name.endswith("bias")):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"fastloss: {name} must be a Tensor, got {type(tensor).__name__}")
        if placements.is_uncompiled_dtensor(tensor):
            raise ValueError(
                f"fastloss: {name} is a DTensor; expected this rank's shard, {name}.to_local(), and group="
            )
    checks.check_strided(**named)

    def shapes() -> str:
        shown = [f"{name} {tuple(tensor.shape)}" for name, tensor in named.items() if isinstance(tensor, Tensor)]
        return "the shapes are " + ", ".join(shown)

    for of, (x, w, b) in (("", student), ("teacher_", teacher)):
        if not x.is_floating_point() or x.dtype.itemsize < 2:
            raise NotImplementedError(
                f"fastloss: {of}input has dtype {x.dtype}; expected float16, bfloat16, float32 or float64"
            )
        if x.dim() == 0:
            raise RuntimeError(f"fastloss: {of}input has no dimensions; expected (D,), (N, D) or (..., D)")
        check_linear_map(x, w, b, shapes, of)
        if w.dim() != 2:
            raise RuntimeError(f"fastloss: {shapes()}; expected a {of}linear_weight of shape (C, D)")
    (input, w, _), (teacher_input, teacher_w, _) = student, teacher
    if teacher_input.device != input.device:
        raise RuntimeError(
            f"fastloss: teacher_input is on {teacher_input.device}; expected {input.device}, where input is"
        )
    if len(w) != len(teacher_w):
        raise ValueError(
            f"fastloss: linear_weight has {len(w)} classes and teacher_linear_weight {len(teacher_w)}; expected the "
            "same vocabulary: leave out the rows of either head that the other lacks"
        )
    lead = tuple(input.shape[:-1])
    if tuple(teacher_input.shape[:-1]) != lead:
        raise ValueError(f"fastloss: {shapes()}; expected a teacher_input (..., D') of input's rows, {lead}")
    if target is not None:
        if tuple(target.shape) != lead or target.dtype not in checks.LABEL_DTYPES:
            raise ValueError(
                f"fastloss: {shapes()}; target is {target.dtype}; expected labels of shape {lead} in int64, int32 or "
                "uint8"
            )
        if target.device != input.device:
            raise RuntimeError(f"fastloss: target is on {target.device}; expected {input.device}, where input is")
    if shift and len(lead) < 1:
        raise ValueError(f"fastloss: shift={shift}; {shapes()}; expected an input of shape (..., T, D)")


@disable_dynamo
def _divergence(
    student: _Map,
    teacher: _Map,
    target: Tensor | None,
    options: DivergenceOptions,
    call: LinearOptions,
    shift: int,
    group: Any,
) -> Tensor:
    """Return the divergence. The arguments are checked, but for what several ranks must have alike."""
    (x, w, b), (y, teacher_w, teacher_b) = student, teacher
    layout = None
    if group is not None:
        group = collectives.checked_group(group)
        try:
            if call.accumulate_grad and w.requires_grad and not w.is_leaf:
                _refuse_accumulation()
        except RuntimeError:
            refuse(group, x)
            raise
        same = options, call.options, call.compute_dtype, x.shape, y.shape, y.dtype, shift, target is None
        layout = collectives.agreed_layout(
            *(group, len(w), x.shape[:-1].numel()),
            device=x.device,
            same=(*same, torch.is_grad_enabled() and x.requires_grad),
            labels=target,
            look=choice.may_look(x),
        )
    lead = x.shape[:-1]
    rows = lead.numel()
    if shift:
        if target is None:  # every label counts
            target = torch.full(lead, int(call.options.ignore_index == 0), dtype=torch.int64, device=x.device)
        target = shifted_labels(target, call.options.ignore_index, shift)
    x, y = x.reshape(rows, x.shape[-1]), y.detach().reshape(rows, y.shape[-1])
    # Where every row counts, the target has no elements.
    t = x.new_empty((rows, 0)) if target is None else as_labels(wide_labels(target))
    call = dataclasses.replace(call, loss_dtype=checks.loss_dtype(x, t, None, call.chunk_dtype))
    dtype = dtype_of_logits(y)
    of_chunk = dtype_of_chunk(dtype, call.logits_dtype)
    more = row_of_logits(teacher_w, of_chunk) + teacher_w.shape[1] * dtype.itemsize
    call = dataclasses.replace(call, chunk_row_bytes=more)
    map_of_teacher = y, teacher_w.detach(), None if teacher_b is None else teacher_b.detach()
    losses = _DivergenceLosses(map_of_teacher, dtype, options, call, choice.load(choice.choose(x)), layout)
    tensors = Tensors(x, w, b, t)
    if layout is None and (routes.is_traced(x, w.detach()) or rows == 0 or len(w) == 0):
        with torch.autocast(x.device.type, enabled=False):
            tensors = tensors._replace(input=of_counted(x, losses.counted(t)))
            narrow: Any = [None if each is None else each.to(call.compute_dtype) for each in tensors[:3]]
            logits = logits_of(Tensors._make([*narrow, t]), call)
            (loss,) = losses.composed(logits, t, None)
    else:
        if call.accumulate_grad and w.requires_grad and not w.is_leaf:
            _refuse_accumulation()
        if layout is None:
            rows_of_chunk(call, rows, w, tensors.needs())  # raises if the budget has no room for a row
        else:
            size = common_rows_of_chunk(call, tensors, layout)
            losses.call = dataclasses.replace(call, chunk_size=size, memory_budget=None)
        (loss,) = by_chunks(tensors, losses)
    if call.options.is_reduced:
        return loss
    loss = loss.view(lead)
    return loss[..., :-shift] if shift else loss


def _refuse_accumulation() -> None:
    raise RuntimeError(
        "fastloss: accumulate_grad=True beside a linear_weight that is not a leaf and has no .grad to add to; pass "
        "the parameter itself, or accumulate_grad=False"
    )


class _DivergenceLosses(Losses):
    """The divergences of chunks from a teacher, whose logits are made chunk by chunk too.

    Args:
        teacher: input ``(rows, D')``, W and b.
        teacher_dtype: of the teacher's products.
        divergence: β, the temperature and the softcaps.
        call: the options.
        backend: the backend whose functions visit the logits.
        layout: the place of the classes among those of all ranks; None: this rank has all.
    """

    def __init__(
        self,
        teacher: _Map,
        teacher_dtype: torch.dtype,
        divergence: DivergenceOptions,
        call: LinearOptions,
        backend: Backend,
        layout: Layout | None,
    ) -> None:
        super().__init__(None, call, backend)
        self.teacher, self.teacher_dtype, self.divergence, self.layout = teacher, teacher_dtype, divergence, layout
        self.upstream_dtype = torch.float64
        self._versions = self._teacher_versions()
        self._narrow: Any = None  # W and b of the teacher in the dtype of the products, during a pass
        self._buffer: Tensor | None = None

    def forward(self, chunk: Chunk, total: Tensor | float | None, needs: Needs) -> ChunkLoss:
        index, _, t, z = chunk
        counted = self.counted(t)
        upstream = None
        if any(needs):
            upstream = torch.ones(z.shape[0], dtype=torch.float64, device=z.device)
            upstream = of_counted(upstream if total is None else upstream / total, counted)
        rows = self._visited(self._teacher_logits(index), z, upstream)
        assert rows.loss is not None
        # A divergence is not negative; its sum may be, by rounding.
        loss = of_counted(rows.loss.clamp(min=0.0), counted)
        saved = [] if upstream is not None else [number for number in rows if number is not None]
        return ChunkLoss(loss.sum() if self.call.options.is_reduced else loss.to(self.loss_dtype), None, saved)

    def backward(self, chunk: Chunk, upstreams: Sequence[Tensor | None], saved: Saved, needs: Needs) -> None:
        index, _, t, z = chunk
        (upstream,) = upstreams
        assert upstream is not None
        if self._versions != self._teacher_versions():
            raise RuntimeError(
                "fastloss: a tensor of linear_kl_div's teacher was written to before the backward pass, which needs "
                "it; pass a clone of it"
            )
        upstream = of_counted(upstream, self.counted(t))
        known = DivergenceRows(*saved)
        self._kl_div(z, self._teacher_logits(index), upstream.contiguous(), known)

    def composed(self, logits: Tensor, t: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
        x, w, b = self.teacher
        counted = self.counted(t)
        tensors = of_counted(x, counted), w, b
        narrow: Any = [None if each is None else each.to(self.teacher_dtype) for each in tensors]
        call = dataclasses.replace(self.call, compute_dtype=self.teacher_dtype)
        loss = _composed_rows(logits, logits_of(Tensors._make([*narrow, t]), call), self.divergence)
        loss, total = of_counted(loss, counted), self.total(t)
        if self.call.options.is_reduced:
            loss = loss.sum() if total is None else loss.sum() / total
        return (loss.to(self.call.loss_dtype),)

    def whole(self, gradients: Gradients) -> Gradients:
        self._narrow = self._buffer = None  # the pass is over
        if self.layout is None or gradients.input is None:
            return gradients
        return gradients._replace(input=all_reduce_detached(gradients.input, (self.layout.class_group,)))

    def refuse_second_derivative(self) -> None:
        if self.layout is not None:
            raise RuntimeError(
                "fastloss: linear_kl_div over shards of the classes has no second derivative; with create_graph=True "
                "gather both heads first, and pass the whole of them"
            )

    def _visited(self, teacher: Tensor, z: Tensor, upstream: Tensor | None) -> DivergenceRows:
        """Return the numbers of the rows over all classes; with ``upstream``, write the gradient over z."""
        known = None
        if self.layout is not None:
            group = self.layout.class_group
            lse = self._kl_div(z, teacher, None, lse_only=True)
            known = DivergenceRows(*gather(torch.stack([*lse[:2]]), group).logsumexp(0))  # type: ignore[list-item]
            sums = self._kl_div(z, teacher, None, known)
            both = all_reduce_detached(torch.stack([*sums[2:]]), (group,))  # type: ignore[list-item]
            known = DivergenceRows(*known[:2], *both)
            if upstream is not None:
                self._kl_div(z, teacher, upstream, known)
            return known
        return self._kl_div(z, teacher, upstream, known)

    def _kl_div(
        self,
        z: Tensor,
        teacher: Tensor,
        upstream: Tensor | None,
        known: DivergenceRows | None = None,
        *,
        lse_only: bool = False,
    ) -> DivergenceRows:
        """Return the backend's numbers of these classes, of which a rank may have none."""
        if not z.shape[1]:
            zero = torch.zeros(z.shape[0], dtype=torch.float64, device=z.device)
            return DivergenceRows(zero - torch.inf, zero - torch.inf, zero, zero)
        inputs = DivergenceInputs(z.unsqueeze(2), teacher.unsqueeze(2), upstream, self.divergence)
        return self.backend.kl_div(inputs, known, lse_only=lse_only)

    def _teacher_logits(self, index: Index) -> Tensor:
        """Return the teacher's logits of some rows, ``(n, C)``, in one buffer for all chunks of a pass."""
        x, w, b = self.teacher
        if self._narrow is None:
            self._narrow = w.to(self.teacher_dtype), None if b is None else b.to(self.teacher_dtype)
        w, b = self._narrow
        x = x[index].to(self.teacher_dtype)
        if self._buffer is None or self._buffer.shape[0] < x.shape[0]:
            dtype = dtype_of_chunk(self.teacher_dtype, self.call.logits_dtype)
            shape = x.shape[0], row_of_logits(w, dtype) // dtype.itemsize
            self._buffer = torch.empty(shape, dtype=dtype, device=x.device)
        z = self._buffer[: x.shape[0], : w.shape[0]]
        project(x, w, b, z)
        return z

    def _teacher_versions(self) -> list[int]:
        tensors = *self.teacher, *self.divergence.teacher.scalars()
        return [each._version for each in tensors if each is not None and not each.is_inference()]


def _composed_rows(x: Tensor, y: Tensor, options: DivergenceOptions) -> Tensor:
    """Return the rows' divergences ``(rows,)`` from logits ``(rows, C)``, by torch's own differentiable operators."""
    dtype = torch.promote_types(compute_dtype(x.dtype), compute_dtype(y.dtype))

    def mean(p: Tensor, log: Tensor) -> Tensor:
        return (p * torch.where(p == 0, 0.0, log)).sum(1)

    sides = (x, options.student), (y, options.teacher)
    log_s, log_t = (composite.scaled(z.to(dtype), scales).log_softmax(1) for z, scales in sides)
    s, t, beta = log_s.exp(), log_t.exp(), options.beta
    if beta == 0:
        return mean(t, log_t - log_s)
    if beta == 1:
        return mean(s, log_s - log_t)
    neither = (s == 0) & (t == 0)
    log_s, log_t = log_s.masked_fill(neither, 0), log_t.masked_fill(neither, 0)
    # As in backends/eager/kl_div.py.
    low, e = min(beta, 1 - beta), log_t - log_s if beta <= 0.5 else log_s - log_t
    excess = low * torch.expm1(e.clamp(max=88.0 if dtype == torch.float32 else 700.0))
    far = excess >= 1
    of_far = -torch.log(low + (1 - low) * torch.exp(-e.clamp(min=0)))
    of_most = torch.where(far, of_far - e, -torch.log1p(torch.where(far, 0.0, excess)))
    of_other = torch.where(far, of_far, of_most + e)
    r, u = (of_most, of_other) if beta <= 0.5 else (of_other, of_most)
    return beta * mean(t, u) + (1 - beta) * mean(s, r)
