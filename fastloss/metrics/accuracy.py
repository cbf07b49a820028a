"""The running metric, a ``torchmetrics.Metric`` where torchmetrics is installed.

torchmetrics is imported with this module, when ``fastloss.Accuracy`` is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..backends.view import class_dim, wide_labels
from ..loss.functional import accuracy
from ..ranks import placements
from ..ranks.collectives import checked_group, group_property

if TYPE_CHECKING:
    from .standalone import Metric

    gather_all_tensors = None
else:
    try:
        from torchmetrics import Metric
        from torchmetrics.utilities.distributed import gather_all_tensors
    except ImportError:
        from .standalone import Metric

        gather_all_tensors = None

__all__ = ["Accuracy"]

_EXACT = 1 << 24  # float32 counts up to so many rows exactly


class Accuracy(Metric):
    """Computes :func:`fastloss.accuracy` over many batches, and over many processes.

    The value is the share of all rows so far whose label is among the k highest scores. Rows are counted, so that a
    batch weighs as much as it has rows that count. The counts are int64, on the metric's device (``.to(device)``);
    nothing waits for them, and no process for another, until :meth:`compute`.

    Where torchmetrics is installed this is a ``torchmetrics.Metric``, for ``MetricCollection``, Lightning's
    ``self.log`` and everything else there; it is the same class without it, without those.

    Args:
        topk: an int, or a tuple of ints; each at least 1.
        ignore_index: a label whose rows count neither as right nor in the total.
        sync_on_compute: let :meth:`compute` add up the counts of all processes, by one all-reduce, where
            ``torch.distributed`` is initialized. All of them must call it then.
        process_group: those that it adds up; None is all.
        group: each of its ranks has a shard of the classes, as in :func:`fastloss.accuracy`.

    Shape:
        ``metric(input, target)`` and ``metric.update(input, target)`` take what :func:`fastloss.accuracy` takes. Of a
        DTensor each process counts the rows that it has. Where several have the same rows, as where only the classes
        are sharded, all of these rows are counted as often, and the share stays what it is.

    Raises:
        TypeError, ValueError: ``topk`` or ``ignore_index`` don't fit.
        RuntimeError: a batch on another device than the metric; a state dict of another ``topk`` or ``ignore_index``.

    Example:
        >>> import fastloss, torch
        >>> metric = fastloss.Accuracy(topk=(1, 2))
        >>> metric.update(torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]), torch.tensor([0, 1]))
        >>> metric(torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([2]))  # counts this batch too, and gives its value
        (tensor(0.), tensor(0.))
        >>> metric.compute()
        (tensor(0.3333), tensor(0.6667))
        >>> metric.reset()
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    __jit_unused_properties__ = (*getattr(Metric, "__jit_unused_properties__", ()), "group", "process_group")

    if TYPE_CHECKING:  # TorchScript takes no annotation of a class that is a string
        counts: Tensor  # (2 + len(ks),) int64: rows, rows or sums without a value, rows right at each k
        settings: Tensor  # (1 + len(ks),) int64: ignore_index and the ks

    def __init__(
        self,
        topk: int | Sequence[int] = 1,
        *,
        ignore_index: int = -100,
        sync_on_compute: bool = True,
        process_group: Any = None,
        group: Any = None,
    ) -> None:
        super().__init__(sync_on_compute=sync_on_compute, process_group=process_group)
        self._ks = checks.checked_topk(topk)
        if not self._ks:
            raise ValueError("fastloss.Accuracy: topk is empty; expected an int, or at least one of them")
        self._ignore_index = checks.checked_ignore_index(ignore_index)
        self._is_tuple = isinstance(topk, Sequence)
        self.group = group
        # One state needs one collective. The constant settings are a state too, since a MetricCollection merges two
        # metrics whose states are equal after the first batch, as the counts for k = 1 and k = 5 may be.
        zeros = torch.zeros(2 + len(self._ks), dtype=torch.int64)
        self.add_state("counts", zeros, dist_reduce_fx="sum", persistent=True)
        settings = torch.tensor([self._ignore_index, *self._ks])
        self.add_state("settings", settings, dist_reduce_fx="max", persistent=True)

    @torch.no_grad()
    def update(self, input: Tensor, target: Tensor) -> None:
        """Count a batch."""
        if isinstance(input, Tensor) and input.device != self.counts.device:
            raise RuntimeError(
                f"fastloss.Accuracy: the metric is on {self.counts.device}, input on {input.device}; "
                f"expected one device: metric.to({str(input.device)!r})"
            )
        self.counts = self.counts + self._counts_of(input, target)

    @torch.no_grad()
    def compute(self) -> Any:
        """Return the share of right rows among all that were counted, in [0, 1].

        Returns:
            ``()`` float32 on the metric's device for an int ``topk``, a tuple of them for a tuple. NaN where no row
            was counted, or where a label was out of bounds and its batch on a GPU.
        """
        rows, invalid, *right = self.counts.to(_wide(self.counts)).unbind()
        values = tuple(torch.where(invalid > 0, torch.nan, r / rows).float() for r in right)
        return values if self._is_tuple else values[0]

    group = group_property("_group", "The group whose ranks have a shard of the classes each, or None.")
    process_group = group_property("_process_group", "The processes whose counts compute() adds up; None is all.")

    @torch.jit.unused
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Count a batch, and return its own value, on this process. A batch that raises changes nothing."""
        before = dict(self.__dict__)  # states are replaced, never written to
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            self.__dict__.update(before)
            raise

    def _counts_of(self, input: Tensor, target: Any) -> Tensor:
        is_dtensor = placements.is_uncompiled_dtensor(input)  # each process counts the rows that it has
        many = not isinstance(target, Tensor) or target.numel() > _EXACT
        values = accuracy(
            input,
            target,
            self._ks,
            ignore_index=self._ignore_index,
            reduction="none" if is_dtensor or many else "sum",
            group=self.group,
        )
        dense = checks.is_dense(input, target)
        if is_dtensor:
            if not dense and placements.is_dtensor(target):
                target = target.redistribute(placements=values[0].placements).to_local()
            values = tuple(value.to_local() for value in values)
        if not dense:
            rows = (wide_labels(target) != self._ignore_index).sum()
        else:  # every row counts
            number = values[0].numel() if is_dtensor else target.numel() // target.shape[class_dim(target)]
            rows = torch.full((), number, dtype=torch.int64, device=values[0].device)
        right = torch.stack([rows.to(_wide(rows)), *(value.sum(dtype=_wide(value)) for value in values)])
        return torch.cat([right[:1], right.isnan().any(0, keepdim=True), right[1:].nan_to_num()]).long()

    def _sync_dist(self, dist_sync_fn: Any = gather_all_tensors, process_group: Any = None) -> None:
        group = process_group or self.process_group
        if dist_sync_fn is not gather_all_tensors:  # the caller's own function
            super()._sync_dist(dist_sync_fn, group)
            return
        self.counts = self.counts.clone()
        torch.distributed.all_reduce(self.counts, group=None if group is None else checked_group(group))

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        device, settings = self.counts.device, self.settings.tolist()
        theirs = state_dict.get(prefix + "settings", self.settings).tolist()
        if theirs != settings:
            error_msgs.append(
                f"fastloss.Accuracy: the counts of {prefix or 'the state dict'} are for topk {tuple(theirs[1:])} and "
                f"ignore_index {theirs[0]}; this metric's are for {tuple(settings[1:])} and {settings[0]}"
            )
            state_dict.pop(prefix + "counts", None)
            state_dict.pop(prefix + "settings")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.counts, self.settings = self.counts.to(device), self.settings.to(device)
        self._computed = None

    def extra_repr(self) -> str:
        """Return the metric's arguments, for ``print``."""
        topk = self._ks if self._is_tuple else self._ks[0]
        return f"topk={topk}, ignore_index={self._ignore_index}"


def _wide(tensor: Tensor) -> torch.dtype:
    """Return float64 where the device has it, else float32."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
