"""What is measured: operations, shapes, dtypes and targets; the inputs, and the bytes that must move."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..demo.loss_at_scale import Case, random_logits

__all__ = [
    "DTYPES",
    "LOSS_OPS",
    "OPS",
    "SIZES",
    "TARGETS",
    "Inputs",
    "LinearInputs",
    "Shape",
    "Workload",
    "default_shapes",
    "fits",
    "make_inputs",
    "make_linear_inputs",
    "parse_shape",
    "rotated",
    "workloads",
]

Made = TypeVar("Made", Tensor, "Inputs", "LinearInputs")

LOSS_OPS = ("forward", "forward+backward", "accuracy", "loss+accuracy")
OPS = (*LOSS_OPS, "linear", "sgd", "host")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TARGETS = ("hard", "soft")  # class indices, class probabilities
SIZES = ("tiny", "quick", "full")

_SMALL_BYTES = 1 << 20  # inputs below this stay in the caches in training too
_ROTATED_BYTES = 1 << 27  # more than a CPU's caches hold
_CACHES = 4  # a GPU's inputs are at least so many times its L2 cache

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


class Inputs(NamedTuple):
    """Logits ``(N, V)``, requiring a gradient where the operation has one; the target, ``(N,)`` or ``(N, V)``."""

    logits: Tensor
    target: Tensor

    @property
    def nbytes(self) -> int:
        return self.logits.nbytes + self.target.nbytes


class LinearInputs(NamedTuple):
    """Hidden states ``(N, D)`` and a head ``(V, D)``, both requiring gradients; the labels ``(N,)``."""

    hidden: Tensor
    head: Tensor
    target: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)


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


def make_inputs(workload: Workload, device: torch.device, seed: int) -> list[Inputs]:
    """Random logits and targets: as many as no cache holds, so that each call finds its input in memory."""
    seeds = _seeds(seed)
    return rotated(lambda: _random_inputs(workload, device, next(seeds)), _rotated_bytes(device))


def make_linear_inputs(workload: Workload, device: torch.device, seed: int) -> list[LinearInputs]:
    """The same for "linear": logits of standard deviation 2."""
    seeds = _seeds(seed)
    return rotated(lambda: _random_linear_inputs(workload, device, next(seeds)), _rotated_bytes(device))


def _seeds(seed: int) -> Iterator[int]:
    return iter(range(seed * 1_000_003, (seed + 1) * 1_000_003))


def _rotated_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _ROTATED_BYTES
    return max(_ROTATED_BYTES, _CACHES * torch.cuda.get_device_properties(device).L2_cache_size)


def rotated(make: Callable[[], Made], total: int = _ROTATED_BYTES) -> list[Made]:
    """As many as come to ``total`` bytes, which no cache holds; small ones stay in the caches in training too."""
    result = [make()]
    if result[0].nbytes >= _SMALL_BYTES:
        result += [make() for _ in range(-(-total // result[0].nbytes) - 1)]
    return result


def _random_inputs(workload: Workload, device: torch.device, seed: int) -> Inputs:
    logits, target = random_logits(Case(*workload.shape[:2], workload.dtype), device, seed)
    if not workload.differentiates:
        logits = logits.detach()
    if workload.soft:
        generator = torch.Generator(device).manual_seed(seed + 1)
        target = torch.rand(workload.shape[:2], generator=generator, dtype=workload.dtype, device=device)
        target /= target.sum(1, keepdim=True)
    return Inputs(logits, target)


def _random_linear_inputs(workload: Workload, device: torch.device, seed: int) -> LinearInputs:
    rows, classes, features = workload.shape
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(rows, features, generator=generator, device=device)
    head = torch.randn(classes, features, generator=generator, device=device).mul_(2 / features**0.5)
    target = torch.randint(classes, (rows,), generator=generator, device=device)
    hidden, head = (each.to(workload.dtype).requires_grad_() for each in (hidden, head))
    return LinearInputs(hidden, head, target)


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
