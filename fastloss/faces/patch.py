"""The replacement of torch's own functions by this package's, for the length of a program or of a ``with`` block."""

from __future__ import annotations

import functools
import threading
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear.functional import linear_cross_entropy
from ..loss.functional import cross_entropy
from ..optim import SGD

__all__ = ["Patch", "patch_torch"]

_lock = threading.Lock()
# How many patches a name has, and what it was before the first of them.
_patched: dict[tuple[ModuleType, str], tuple[int, Any]] = {}


def patch_torch(*, sgd: bool = False) -> Patch:
    """Let a program use this package wherever it calls torch's loss.

    ``torch.nn.functional.cross_entropy`` becomes :func:`fastloss.cross_entropy`, and where torch has it (2.13)
    ``torch.nn.functional.linear_cross_entropy`` becomes :func:`fastloss.linear_cross_entropy`. The modules of
    ``torch.nn`` look these names up at each call, so ``nn.CrossEntropyLoss`` follows, and so do libraries that write
    ``F.cross_entropy(...)``. A program that took the function itself before (``from torch.nn.functional import
    cross_entropy``) keeps torch's. The ``options=`` of ``linear_cross_entropy`` are about torch's own chunks, and
    change nothing here.

    The patch holds for all threads of the process. Patches may be nested and undone in any order: torch's functions
    are back when the last patch is undone.

    ``torch.jit.script`` of a program that calls the loss raises an error under the patch, as TorchScript knows no
    keyword-only arguments: script it before or without the patch. Scripted programs keep torch's loss.

    Args:
        sgd: replace ``torch.optim.SGD`` by :class:`fastloss.SGD` too. Optimizers that exist stay as they are.

    Returns:
        A :class:`Patch`: its ``undo()`` ends the patch, and so does the end of a ``with`` block.

    Example:
        >>> import fastloss, torch
        >>> with fastloss.patch_torch():
        ...     torch.nn.CrossEntropyLoss()(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
        >>> patch = fastloss.patch_torch(sgd=True)  # for the rest of the program, or
        >>> patch.undo()
    """
    replacements: list[tuple[ModuleType, str, Any]] = [(F, "cross_entropy", cross_entropy)]
    if hasattr(F, "linear_cross_entropy"):
        replacements.append((F, "linear_cross_entropy", _linear_cross_entropy))
    if sgd:
        replacements.append((torch.optim, "SGD", SGD))
    return Patch(replacements)


class Patch:
    """Replacements of names in modules, until ``undo`` or the end of a ``with`` block."""

    def __init__(self, replacements: list[tuple[ModuleType, str, Any]]) -> None:
        self._replacements = replacements
        with _lock:
            for module, name, replacement in replacements:
                count, before = _patched.get((module, name), (0, getattr(module, name)))
                _patched[module, name] = count + 1, before
                setattr(module, name, replacement)

    def undo(self) -> None:
        """End the patch. A second call does nothing, and a name that another package has replaced since stays."""
        with _lock:
            for module, name, replacement in self._replacements:
                count, before = _patched.pop((module, name))
                if count > 1:
                    _patched[module, name] = count - 1, before
                elif getattr(module, name) is replacement:
                    setattr(module, name, before)
            self._replacements = []

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


@functools.wraps(getattr(F, "linear_cross_entropy", linear_cross_entropy))
def _linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, options: object = None, **others: Any
) -> Tensor:
    """Compute the loss with torch's arguments."""
    return linear_cross_entropy(input, linear_weight, target, **others)
