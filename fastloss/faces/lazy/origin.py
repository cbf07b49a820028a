"""The tensors that logits are made of, and whether they are what they were when the head was called."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["Origin", "unwatch_optimizers", "watch_optimizers"]


class Origin:
    """Some tensors and the number of writes that each had seen.

    Fused optimizers of torch write without counting, so the start of a step voids the origins of its parameters.
    """

    def __init__(self, versions: tuple[tuple[Tensor, int], ...]) -> None:
        self.versions = versions
        self.is_void = False
        with _lock:
            _living.add(self)

    def joined_by(self, tensor: Tensor) -> Origin:
        """Return the origin of what is made of one tensor more."""
        return Origin((*self.versions, (tensor, tensor._version)))

    def check(self) -> None:
        """Raise an error if one of the tensors is not what it was."""
        for tensor, version in self.versions:
            if tensor.untyped_storage().nbytes() == 0 != tensor.numel():
                raise RuntimeError(
                    "fastloss: logits are read after the memory of the head's weight was given back (by a wrapper "
                    "that shards it); expected a read before, or report.undo() of fastloss.without_logits(model)"
                )
            if self.is_void or tensor._version != version:
                raise RuntimeError(
                    "fastloss: logits are read after a tensor that they are made of was written to (the head's "
                    "weight by an optimizer's step, perhaps); expected a read before: logits + 0 computes them"
                )


_living: weakref.WeakSet[Origin] = weakref.WeakSet()
_lock = threading.Lock()
_watchers: weakref.WeakSet[Any] = weakref.WeakSet()
_hooks: list[Any] = []


def watch_optimizers(watcher: object) -> None:
    """Let every step of an optimizer void the logits that exist and are made of its parameters."""
    with _lock:
        _watchers.add(watcher)
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before_step))


def unwatch_optimizers(watcher: object) -> None:
    """Let steps go unseen again, if nothing else watches them and no logits are left."""
    with _lock:
        _watchers.discard(watcher)
        if not _watchers and not _living and _hooks:
            _hooks.pop().remove()


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    with _lock:
        living = [origin for origin in _living if not origin.is_void]
    if living:
        written = {
            p.untyped_storage().data_ptr()
            for group in optimizer.param_groups
            for p in group["params"]
            if type(p) in (Tensor, torch.nn.Parameter)
        }
        for origin in living:
            origin.is_void = any(t.untyped_storage().data_ptr() in written for t, _ in origin.versions)
