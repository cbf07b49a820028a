"""The one line by which a model's head returns logits without memory."""

from __future__ import annotations

import inspect
import sys
import threading
import types
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...backends.torch_private import transforms_are_active
from .origin import unwatch_optimizers, watch_optimizers
from .recipe import Recipe
from .tensor import lazy_logits

__all__ = ["MadeLogits", "WithoutLogits", "without_logits"]


def without_logits(
    model: nn.Module, head: str | nn.Module | None = None, *, on_unsupported: str = "raise"
) -> WithoutLogits:
    """Let a language model train without its logits, which are computed only if something needs their elements.

    The head, a linear map, returns a tensor that has the shape, dtype and device of the logits and no memory. What
    the model and the loss do to it (scale, softcap, casts, slices of positions or of classes, views, transposes, a
    bias) is recorded, and ``F.cross_entropy`` of it, ``nn.CrossEntropyLoss`` or this package's
    ``cross_entropy``, ``cross_entropy_with_accuracy`` and ``accuracy`` become :func:`fastloss.linear_cross_entropy`
    and its kin; ``argmax`` over the classes goes chunk by chunk. **Everything else makes the logits, once and
    differentiably**, and takes them: such a model is no faster than before, and as right. The model's code, its
    loss and the training loop stay as they are.

    Loss and gradients are those of the model itself but for rounding. Of 16-bit logits that the model casts to
    float32, as Hugging Face's losses do, the loss is in float32, and of logits that were not rounded to 16 bits.

    In ``torch.inference_mode``, under ``torch.compile``, tracing and function transforms, and for tensors of other
    classes (DTensor) the head computes its logits as ever. A copy of the model, and one that is saved and loaded as a
    whole, have the model's own head.

    Three uses raise an error where plain logits would serve: those of the logits' own gradient (``retain_grad``,
    ``torch.autograd.grad``) after a loss was computed without them, those of logits after the head's weight has
    changed (after ``optimizer.step()``; a write through ``weight.data`` outside of a ``torch.optim.Optimizer`` is not
    noticed), and those of logits after a write in place to another view of their memory.

    Args:
        model: any module. It need not be a transformers model.
        head: the module that makes the logits, or its name in ``model.named_modules()``. By default it is
            ``model.get_output_embeddings()``.
        on_unsupported: "raise", or "warn" to leave alone a head that is no plain linear map (quantised, offloaded,
            wrapped by an adapter, or of a class with its own ``forward``).

    Returns:
        A :class:`WithoutLogits`: its ``undo()`` ends it, and so does the end of a ``with`` block; ``fused`` and
        ``made`` count calls, and ``audit()`` tells which lines made the logits.

    Raises:
        ValueError: the model has no such head; or the head is unsupported, and the error says why.

    Example:
        >>> import torch, fastloss
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.lm_head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50, bias=False)
        ...     def forward(self, ids):
        ...         return self.lm_head(self.body(ids))
        >>> model, ids = Model(), torch.arange(12).view(2, 6)
        >>> report = fastloss.without_logits(model, "lm_head")
        >>> logits = model(ids)
        >>> loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        >>> loss.backward()
        >>> report.fused, report.made
        (1, 0)
        >>> report.undo()
    """
    if on_unsupported not in ("raise", "warn"):
        raise ValueError(f'fastloss: on_unsupported is {on_unsupported!r}; expected "raise" or "warn"')
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastloss: model is a {type(model).__name__}; expected a torch.nn.Module")
    name, module = _head_of(model, head)
    reason = _unsupported(module)
    if reason is None:
        return WithoutLogits(name, module)
    message = f"fastloss: the head {name!r}, a {type(module).__name__}, {reason}; expected a torch.nn.Linear"
    if on_unsupported == "raise":
        raise ValueError(f'{message}. on_unsupported="warn" leaves such a model as it is')
    warnings.warn(f"{message}: it is left as it is, and makes its logits", stacklevel=2)
    return WithoutLogits(name, None)


class MadeLogits(NamedTuple):
    """A line that made logits."""

    operator: str  # the operator that needed their elements
    file: str
    line: int
    function: str
    times: int


class WithoutLogits:
    """A model whose head is lazy, until ``undo`` or the end of a ``with`` block."""

    def __init__(self, name: str, module: nn.Module | None) -> None:
        self.head = name  #: the head's name in the model
        self.is_lazy = module is not None  #: False: the head is unsupported or was undone
        self.fused = 0  #: calls that were served without logits
        self.made = 0  #: logits that were made
        self._lock = threading.Lock()
        self._lines: Counter[tuple[str, str, int, str]] = Counter()
        self._module = module
        self._forward = None if module is None else _LazyForward(module, self)
        if module is not None:
            watch_optimizers(self)
            module.forward = self._forward  # type: ignore[assignment]

    def undo(self) -> None:
        """Give the head its own ``forward`` back. Logits that exist stay lazy; a second call does nothing."""
        with self._lock:
            self.is_lazy = False
            if self._module is not None and vars(self._module).get("forward") is self._forward:
                del self._module.forward
            self._module = None
        unwatch_optimizers(self)

    def audit(self) -> list[MadeLogits]:
        """Return the lines that made logits, and for which operator; the most frequent first."""
        with self._lock:
            return [MadeLogits(*key, times) for key, times in self._lines.most_common()]

    def count_fused(self) -> None:
        """Count a call that was served without logits."""
        with self._lock:
            self.fused += 1

    def count_made(self, operator: str) -> None:
        """Count logits that were made, for an operator, and note the line of the caller's code."""
        line = _calling_line()
        with self._lock:
            self.made += 1
            self._lines[operator, line[0], line[1], line[2]] += 1

    def __enter__(self) -> WithoutLogits:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "lazy" if self.is_lazy else "as it was"
        return f"WithoutLogits(head={self.head!r}, {state}, fused={self.fused}, made={self.made})"


class _LazyForward:
    """The ``forward`` of a lazy head. Copied or saved with its head, it is the head's own."""

    def __init__(self, head: nn.Module, report: WithoutLogits) -> None:
        self._head, self._report = head, report
        self.__signature__ = inspect.signature(nn.Linear.forward.__get__(head))

    def __reduce__(self) -> Any:
        return _own_forward, (self._head,)

    def __call__(self, input: Tensor) -> Tensor:
        head: Any = self._head
        dtype = self._dtype(input)
        if dtype is None:
            return type(head).forward(head, input)  # type: ignore[no-any-return]
        weight, bias = head.weight, head.bias
        recipe = Recipe.of_head(input, weight, bias, dtype)
        meta = torch.empty((*input.shape[:-1], weight.shape[0]), dtype=dtype, device="meta")
        return lazy_logits(recipe, meta, None, self._report)

    def _dtype(self, input: Tensor) -> torch.dtype | None:
        """Return the dtype of the product, or None if the head has to compute it now."""
        if not self._report.is_lazy or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return None
        if torch.jit.is_tracing() or transforms_are_active():
            return None
        head: Any = self._head
        weight, bias = head.weight, head.bias
        tensors = [t for t in (input, weight, bias) if t is not None]
        if any(
            type(t) not in (Tensor, nn.Parameter) or t.is_meta or t.is_inference() or not t.is_floating_point()
            for t in tensors
        ):
            return None
        if input.dim() < 2 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
            return None
        if len({t.device for t in tensors}) > 1:
            return None
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.dtype != torch.float64 != weight.dtype:
            return torch.get_autocast_dtype(device)
        return input.dtype if len({t.dtype for t in tensors}) == 1 else None


def _own_forward(head: nn.Module) -> Any:
    return types.MethodType(type(head).forward, head)


def _head_of(model: nn.Module, head: str | nn.Module | None) -> tuple[str, nn.Module]:
    if isinstance(head, str):
        modules = dict(model.named_modules())
        if head not in modules:
            raise ValueError(f"fastloss: head is {head!r}; expected the name of a module of {type(model).__name__}")
        return head, modules[head]
    if head is None:
        get = getattr(model, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if head is None:
            raise ValueError(
                f"fastloss: {type(model).__name__} does not say what its head is (get_output_embeddings()); expected "
                'head="lm_head", say: the name of the linear map that makes the logits, or the module'
            )
    for name, module in model.named_modules(remove_duplicate=False):
        if module is head:
            return name, head
    raise ValueError(
        f"fastloss: head is a {type(head).__name__} that is no part of model; expected one of its modules"
    )


def _unsupported(head: nn.Module) -> str | None:
    """Return why the head can't be lazy, or None."""
    if isinstance(getattr(head, "forward", None), _LazyForward):
        return "is lazy already, by an earlier call: undo that one"
    if not isinstance(head, nn.Linear):
        return "is no linear map that this package knows"
    if type(head).forward is not nn.Linear.forward:
        return "has a forward of its own (an adapter or a quantised map has one)"
    if "forward" in vars(head):
        return "has had its forward replaced (offloading does so)"
    if head.weight.is_meta:
        return "has its weight on the device meta (it is offloaded or not loaded)"
    if not head.weight.is_floating_point():
        return f"has a weight in {head.weight.dtype} (it is quantised)"
    return None


_OWN_FOLDERS = (str(Path(__file__).parents[2]), str(Path(torch.__file__).parent))


def _calling_line() -> tuple[str, int, str]:
    """Return file, line and function of the innermost caller outside torch and this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN_FOLDERS):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
