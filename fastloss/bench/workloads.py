"""What is measured: operations, shapes, dtypes and targets; the inputs, and the bytes that must move."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..measuring.contenders import DTYPES, LOSS_OPS, OPS, TOPK
from ..measuring.inputs import LinearInputs, LossInputs, linear_inputs, loss_inputs, rotated
from ..measuring.reference import LinearReference, LossReference, Reference

__all__ = [
    "DTYPES",
    "LOSS_OPS",
    "OPS",
    "SIZES",
    "TARGETS",
    "Shape",
    "Workload",
    "default_shapes",
    "fits",
    "parse_shape",
    "workloads",
]

TARGETS = ("hard", "soft")  # class indices, class probabilities
SIZES = ("tiny", "quick", "full")

_SGD_TENSORS = 5  # θ, g and m are read, θ and m written
_PRODUCTS = 3  # of linear_cross_entropy: the logits, and the gradients of either factor


class Shape(NamedTuple):
    """Of logits, N rows of V classes; of an optimizer, N tensors of V elements each; of a head, D features too."""

    rows: int
    classes: int
    features: int = 0  # only a head has them

    def __str__(self) -> str:
        return "x".join(map(str, (self.rows, *([self.features] if self.features else []), self.classes)))

    @property
    def numel(self) -> int:
        return self.rows * self.classes


@dataclass(frozen=True)
class Workload:
    """One operation at one shape."""

    op: str  # of OPS
    shape: Shape
    dtype: torch.dtype
    target: str = "hard"  # of TARGETS; SGD has none, and "linear" has no other

    def __str__(self) -> str:
        target = [] if self.op in ("sgd", "linear") else [self.target]
        return "-".join([self.op, str(self.shape), self.dtype_name, *target])

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def soft(self) -> bool:
        """Is the target a probability for each class, in the logits' dtype?"""
        return self.target == "soft"

    @property
    def differentiates(self) -> bool:
        return self.op in ("forward+backward", "loss+accuracy", "linear", "host")

    @property
    def input_bytes(self) -> int:
        """Of one input: logits and target; hidden states, head and target; or parameters and gradients."""
        size = self.shape.numel * self.dtype.itemsize
        if self.op == "sgd":
            return 2 * size
        if self.op == "linear":
            return self.gradient_bytes + self.shape.rows * torch.int64.itemsize
        return 2 * size if self.soft else size + self.shape.rows * torch.int64.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients of hidden states and head; 0 for other operations."""
        return (self.shape.rows + self.shape.classes) * self.shape.features * self.dtype.itemsize

    @property
    def operations(self) -> int:
        """What three products of matrices take, for "linear": 6·N·D·V; 0 where bytes are what counts."""
        return 2 * _PRODUCTS * self.shape.numel * self.shape.features

    @property
    def moved_bytes(self) -> int:
        """What the operation must read and write at least, as docs/performance.md counts it.

        0 for host time, and for "linear", whose limit is the products.

        One read of the logits and of class probabilities, one write of the gradient; accuracy comes out of the read.
        What is small beside N·V·b is left out. SGD with momentum: 5 b bytes a parameter.
        """
        size = self.shape.numel * self.dtype.itemsize
        if self.op in ("host", "linear"):
            return 0
        if self.op == "sgd":
            return _SGD_TENSORS * size
        return size * (1 + self.differentiates + self.soft)

    @property
    def upstream(self) -> float:
        """The gradient of the loss: in float16 a loss scale, without which most of the logits' gradient is 0.

        It is the power of two next below N, 2¹⁵ at most; in other dtypes 1.
        """
        return float(1 << min(15, self.shape.rows.bit_length() - 1)) if self.dtype is torch.float16 else 1.0

    def inputs(self, device: torch.device, seed: int) -> list[LossInputs] | list[LinearInputs]:
        """Return as many random inputs as no cache holds."""
        (rows, classes, features), seeds = self.shape, iter(range(seed * 1_000_003, (seed + 1) * 1_000_003))
        if self.op == "linear":
            return rotated(
                lambda: linear_inputs(rows, features, classes, self.dtype, device, seed=next(seeds)), device
            )
        options = {"probabilities": self.soft, "requires_grad": self.differentiates}
        return rotated(lambda: loss_inputs(rows, classes, self.dtype, device, seed=next(seeds), **options), device)

    def reference(self, inputs: Any) -> Reference:
        """Return the same in float64."""
        if self.op == "linear":
            return LinearReference(inputs, self.upstream)
        has_accuracy = self.op in ("accuracy", "loss+accuracy")
        return LossReference(inputs, self.upstream, TOPK if has_accuracy else ())


def parse_shape(text: str) -> Shape:
    """``4096x1000``, or ``8192x4096x128256``: rows, features, classes.

    Raises:
        ValueError: it is not of that form, or not positive.
    """
    found = re.fullmatch(r"(\d{1,12})x(?:(\d{1,12})x)?(\d{1,12})", text)
    sizes = [int(each) for each in found.groups() if each is not None] if found else []
    if not sizes or 0 in sizes:
        raise ValueError(f"{text!r} is not NxV or NxDxV")
    return Shape(sizes[0], sizes[-1], *sizes[1:-1])


def default_shapes(op: str, device: torch.device, size: str = "full") -> list[Shape]:
    """The shapes of ``op``, of a vision model's classes and of a language model's vocabulary.

    Args:
        op: of :data:`OPS`.
        device: a CPU gets fewer rows.
        size: ``"full"``; ``"quick"``, a few; or ``"tiny"``, whose work is done in milliseconds on a CPU.
    """
    on_gpu = device.type == "cuda"
    if op == "host":
        return [Shape(8, 10)]
    if op == "sgd":
        # As many tensors and parameters as a ResNet-50, a few large ones, many small ones.
        resnet, large, small = Shape(161, 158740), Shape(12, 4194304), Shape(2000, 256)
        return {"tiny": [Shape(3, 1000)], "quick": [resnet, small], "full": [resnet, large, small]}[size]
    if op == "linear":
        if size == "tiny":
            return [Shape(64, 10, 8), Shape(300, 9000, 16)]  # the second has several chunks
        if not on_gpu:
            return [Shape(1024, 32000, 256), *([Shape(512, 128256, 512)] if size == "full" else [])]
        return [Shape(8192, 128256, 4096), *([Shape(16384, 32000, 2048)] if size == "full" else [])]
    if size == "tiny":
        return [Shape(64, 10), Shape(32, 9000)]  # the second is large enough for a CPU's fused pass
    if size == "quick":
        return [Shape(4096, 1000), Shape(8192, 128256)] if on_gpu else [Shape(512, 32000)]
    if not on_gpu:
        vision = [Shape(n, c) for n in (64, 1024) for c in (10, 100, 1000, 21841)]
        return [*vision, Shape(4096, 1000), Shape(512, 32000), Shape(512, 50257), Shape(256, 128256)]
    vision = [Shape(n, c) for c in (10, 100, 1000, 21841) for n in (64, 512, 4096, 8192)]
    return [*vision, *(Shape(n, v) for v in (32000, 50257, 128256, 262144) for n in (1024, 4096, 8192, 32768))]


def fits(op: str, shape: Shape) -> bool:
    """Has ``shape`` features where ``op`` has a head, and none elsewhere?"""
    return bool(shape.features) == (op == "linear")


def workloads(
    ops: Sequence[str],
    dtypes: Sequence[str],
    targets: Sequence[str],
    device: torch.device,
    *,
    shapes: Sequence[Shape] = (),
    size: str = "full",
) -> list[Workload]:
    """Every operation at each of ``shapes`` that fits it, or at its default ones, in every dtype, with every target.

    A shape with features fits "linear", the others fit the other operations.
    """
    return [
        Workload(op, shape, DTYPES[dtype], target)
        for op in ops
        for dtype in dtypes
        for target in (("hard",) if op in ("sgd", "linear") else targets)
        for shape in ([each for each in shapes if fits(op, each)] if shapes else default_shapes(op, device, size))
    ]
