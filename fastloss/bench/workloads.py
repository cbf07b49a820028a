"""Workloads: operations, shapes, dtypes and targets; their inputs, and the bytes that they must move."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from ..measuring.contenders import DTYPES, LINEAR_OPS, LOSS_OPS, TOPK
from ..measuring.inputs import linear_inputs, loss_inputs, rotated, teacher_inputs, token_inputs
from ..measuring.reference import LinearReference, LossReference, RowsReference

TARGETS = ("hard", "soft")  # class indices, class probabilities
SIZES = ("tiny", "quick", "full")

_SGD_TENSORS = 5  # θ, g and m are read, θ and m written
_PRODUCTS = 3  # of linear_cross_entropy: the logits, and the gradients of either factor
_WITHOUT_TARGETS = ("sgd", *LINEAR_OPS)  # none to choose


class Shape(NamedTuple):
    """Of logits, N rows of V classes; of an optimizer, N tensors of V elements each; of a head, D features too."""

    rows: int
    classes: int
    features: int = 0  # only a head has them

    def __str__(self) -> str:
        return "x".join(map(str, (self.rows, *([self.features] if self.features else []), self.classes)))

    @property
    def numel(self) -> int:
        """N · V."""
        return self.rows * self.classes


@dataclass(frozen=True)
class Workload:
    """One operation at one shape."""

    op: str  # of OPS
    shape: Shape
    dtype: torch.dtype
    target: str = "hard"  # of TARGETS; SGD has none, and LINEAR_OPS have no other

    def __str__(self) -> str:
        target = [] if self.op in _WITHOUT_TARGETS else [self.target]
        return "-".join([self.op, str(self.shape), self.dtype_name, *target])

    @property
    def dtype_name(self) -> str:
        """``float32``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def soft(self) -> bool:
        """True if the target is a probability for each class, in the logits' dtype."""
        return self.target == "soft"

    @property
    def differentiates(self) -> bool:
        """True if the operation computes a gradient."""
        return self.op in ("forward+backward", "loss+accuracy", "host", *LINEAR_OPS) and self.op != "linear-topk"

    @property
    def nbytes(self) -> int:
        """The bytes of the logits, or of an optimizer's parameters."""
        return self.shape.numel * self.dtype.itemsize

    @property
    def input_bytes(self) -> int:
        """The bytes of logits and target, of hidden states, head and target, or of parameters and gradients."""
        if self.op == "sgd" or self.soft:
            return 2 * self.nbytes
        return (self.factor_bytes or self.nbytes) + self.shape.rows * torch.int64.itemsize

    @property
    def factor_bytes(self) -> int:
        """The bytes of hidden states and head; 0 for other operations."""
        return (self.shape.rows + self.shape.classes) * self.shape.features * self.dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        """The bytes of the gradients of hidden states and head; 0 where there are none."""
        return self.factor_bytes * self.differentiates

    @property
    def operations(self) -> int:
        """The operations of three products of matrices, 6·N·D·V, with a head; 0 where bytes are what counts."""
        return 2 * _PRODUCTS * self.shape.numel * self.shape.features

    @property
    def moved_bytes(self) -> int:
        """The bytes that the operation must read and write at least, as docs/performance.md counts them.

        One read of the logits and of class probabilities, one write of the gradient; accuracy comes out of the read.
        Less than N·V·b is left out. SGD with momentum: 5 b bytes a parameter. 0 for host time, and with a head,
        whose limit is the products.
        """
        reads_and_writes = {"host": 0, **dict.fromkeys(LINEAR_OPS, 0), "sgd": _SGD_TENSORS}
        return self.nbytes * reads_and_writes.get(self.op, 1 + self.differentiates + self.soft)

    @property
    def upstream(self) -> float:
        """The gradient of the loss: in float16 a loss scale, without which most of the logits' gradient is 0.

        It is the power of two next below N, 2¹⁵ at most; in other dtypes 1.
        """
        return float(1 << min(15, self.shape.rows.bit_length() - 1)) if self.dtype is torch.float16 else 1.0

    def inputs(self, device: torch.device, seed: int) -> list[Any]:
        """Return as many random inputs as no cache holds."""
        (rows, classes, features), seeds = self.shape, iter(range(seed * 1_000_003, (seed + 1) * 1_000_003))
        if features:

            def make_linear(seed: int) -> Any:
                inputs = linear_inputs(rows, features, classes, self.dtype, device, seed=seed)
                if self.op.startswith("linear-tokens"):
                    return token_inputs(inputs, seed=seed + 1)
                return teacher_inputs(inputs, seed=seed + 1) if self.op == "linear-kl" else inputs

            return rotated(lambda: make_linear(seed=next(seeds)), device)
        make = partial(loss_inputs, rows, classes, self.dtype, device, probabilities=self.soft)
        return rotated(lambda: make(seed=next(seeds), requires_grad=self.differentiates), device)

    def reference(self, inputs: Any) -> LossReference | LinearReference:
        """Return the same in float64."""
        if self.op == "linear":
            return LinearReference(inputs, self.upstream)
        if self.shape.features:
            return RowsReference(self.op, inputs, self.upstream)
        return LossReference(inputs, self.upstream, TOPK if self.op in ("accuracy", "loss+accuracy") else ())


def parse_shape(text: str) -> Shape:
    """Parse ``4096x1000``, or ``8192x4096x128256``: rows, features, classes.

    Raises:
        ValueError: it is not of that form, or not positive.
    """
    match = re.fullmatch(r"(\d{1,12})x(?:(\d{1,12})x)?(\d{1,12})", text)
    sizes = [int(size) for size in match.groups() if size is not None] if match else []
    if not sizes or 0 in sizes:
        raise ValueError(f"{text!r} is not NxV or NxDxV")
    return Shape(sizes[0], sizes[-1], *sizes[1:-1])


def fits(op: str, shape: Shape) -> bool:
    """Return True if ``shape`` has features where ``op`` has a head, and none elsewhere."""
    return bool(shape.features) == (op in LINEAR_OPS)


# By operation and device, by size. A CPU gets fewer rows. SGD: as many tensors and parameters as a ResNet-50, a few
# large ones, many small ones. Of the tiny ones, which take a CPU milliseconds, the second is large enough for its
# fused pass, or for several chunks.
_HEADS = {"tiny": "64x8x10 300x16x9000"}
_LOGITS = {"tiny": "64x10 32x9000"}
_VISION, _LANGUAGE = (10, 100, 1000, 21841), (32000, 50257, 128256, 262144)
_SHAPES = {
    "host": dict.fromkeys(SIZES, "8x10"),
    "sgd": {"tiny": "3x1000", "quick": "161x158740 2000x256", "full": "161x158740 12x4194304 2000x256"},
    "linear cpu": {**_HEADS, "quick": "1024x256x32000", "full": "1024x256x32000 512x512x128256"},
    "linear cuda": {**_HEADS, "quick": "8192x4096x128256", "full": "8192x4096x128256 16384x2048x32000"},
    "loss cpu": {
        **_LOGITS,
        "quick": "512x32000",
        "full": " ".join(f"{n}x{c}" for n in (64, 1024) for c in _VISION)
        + " 4096x1000 512x32000 512x50257 256x128256",
    },
    "loss cuda": {
        **_LOGITS,
        "quick": "4096x1000 8192x128256",
        "full": " ".join(
            [f"{n}x{c}" for c in _VISION for n in (64, 512, 4096, 8192)]
            + [f"{n}x{v}" for v in _LANGUAGE for n in (1024, 4096, 8192, 32768)]
        ),
    },
}


def default_shapes(op: str, device: torch.device, size: str = "full") -> list[Shape]:
    """Return the shapes of an operation, of a vision model's classes and of a language model's vocabulary."""
    name = "loss" if op in LOSS_OPS else "linear" if op in LINEAR_OPS else op
    sizes = _SHAPES.get(name) or _SHAPES[f"{name} {'cuda' if device.type == 'cuda' else 'cpu'}"]
    return [parse_shape(text) for text in sizes[size].split()]


def workloads(
    ops: Sequence[str],
    dtypes: Sequence[str],
    targets: Sequence[str],
    device: torch.device,
    *,
    shapes: Sequence[Shape] = (),
    size: str = "full",
) -> list[Workload]:
    """Return each operation at those of ``shapes`` that fit it, or at its default ones, in every dtype and target."""
    return [
        Workload(op, shape, DTYPES[dtype], target)
        for op in ops
        for dtype in dtypes
        for target in (("hard",) if op in _WITHOUT_TARGETS else targets)
        for shape in ([shape for shape in shapes if fits(op, shape)] if shapes else default_shapes(op, device, size))
    ]
