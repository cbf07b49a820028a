"""The methods of torchmetrics that :mod:`fastloss.metrics.accuracy` needs, where torchmetrics is not installed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Metric"]


class Metric(nn.Module):
    """A module whose states, which are tensors, add up over batches and over processes to a value.

    Names and meanings are those of ``torchmetrics.Metric``. A subclass calls :meth:`add_state`, and defines
    ``update``, ``compute`` and ``_sync_dist``.

    The states are no buffers: DistributedDataParallel would overwrite them with those of the first process.
    """

    update: Callable[..., None]
    compute: Callable[[], Any]
    _sync_dist: Callable[..., None]
    process_group: Any

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        compute: Callable[[Metric], Any] = cls.compute  # type: ignore[assignment]

        @functools.wraps(compute)
        def synchronised(self: Metric) -> Any:
            with self._sync_context(self._to_sync):
                return compute(self)

        cls.compute = synchronised  # type: ignore[method-assign, assignment]

    def __init__(self, *, sync_on_compute: bool = True, process_group: Any = None) -> None:
        super().__init__()
        self.sync_on_compute = self._to_sync = sync_on_compute
        self.process_group = process_group
        self._defaults: dict[str, Tensor] = {}
        self._persistent: dict[str, bool] = {}
        self._reductions: dict[str, str] = {}
        self._cache: dict[str, Tensor] | None = None  # this process's states, while self has the sums

    def add_state(self, name: str, default: Tensor, dist_reduce_fx: str, persistent: bool = False) -> None:
        """Add a state, and say whether two of it are merged by ``"sum"`` or ``"max"``."""
        setattr(self, name, default)
        self._defaults[name] = default.clone()
        self._persistent[name] = persistent
        self._reductions[name] = dist_reduce_fx

    def persistent(self, mode: bool = False) -> None:
        """Set whether the states are in ``state_dict()``."""
        self._persistent = dict.fromkeys(self._persistent, mode)

    def reset(self) -> None:
        """Forget all batches."""
        self._cache = None
        for name, default in self._defaults.items():
            setattr(self, name, default.clone().to(getattr(self, name).device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Count a batch, and return its own value, on this process."""
        before = self._states()
        self.reset()
        self._to_sync = False
        try:
            self.update(*args, **kwargs)
            return self.compute()
        finally:
            self._to_sync = self.sync_on_compute
            for name, state in before.items():
                merge = torch.add if self._reductions[name] == "sum" else torch.maximum
                setattr(self, name, merge(state, getattr(self, name)))

    def sync(self, should_sync: bool = True) -> None:
        """Give each process the states of all."""
        if self._cache is not None and should_sync:
            raise RuntimeError("The Metric has already been synced.")
        if should_sync and torch.distributed.is_available() and torch.distributed.is_initialized():
            self._cache = self._states()
            self._sync_dist(None, self.process_group)

    def unsync(self) -> None:
        """Give each process its own states again."""
        if self._cache is None:
            raise RuntimeError("The Metric has already been un-synced.")
        for name, state in self._cache.items():
            setattr(self, name, state)
        self._cache = None

    @contextmanager
    def _sync_context(self, should_sync: bool) -> Iterator[None]:
        before = self._cache
        self.sync(should_sync)
        try:
            yield
        finally:
            if self._cache is not before:
                self.unsync()

    def _states(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._defaults}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for states in (self._defaults, self.__dict__, self._cache or {}):
            for name in self._defaults:
                if name in states:  # to another device; counts keep their dtype
                    states[name] = states[name].to(fn(torch.empty_like(states[name])).device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, state in self._states().items():
            if self._persistent[name]:
                destination[prefix + name] = state.clone()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in self._defaults:
            if prefix + name in state_dict:
                setattr(self, name, state_dict.pop(prefix + name))
        super()._load_from_state_dict(state_dict, prefix, *rest)
