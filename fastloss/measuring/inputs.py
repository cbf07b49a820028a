"""Random tensors to measure with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made", bound="Tensor | tuple[Tensor, ...]")

# Random logits as a half-trained model might give them: normal, and the label's raised by a uniform share of
# LABEL_LIFT, which makes it the highest in about four rows of ten.
SPREAD = 2.0
LABEL_LIFT = 15.0

_SMALL_BYTES = 1 << 20  # inputs below this stay in the caches in training too
_ROTATED_BYTES = 1 << 27  # more than a CPU's caches hold
_L2_CACHES = 4  # a GPU's inputs are at least so many times its L2 cache

# He and others, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), table 1: the bottlenecks of each
# stage. Convolutions without a bias, each followed by a scale and a shift.
BOTTLENECKS = (3, 4, 6, 3)
EXPANSION = 4
RESNET50_CLASSES = 1000
RESNET50_WIDTH = 64  # channels of the first convolution


class LossInputs(NamedTuple):
    """Logits ``(N, V)``, and labels ``(N,)`` or class probabilities ``(N, V)``."""

    logits: Tensor
    target: Tensor

    def first(self, rows: int) -> LossInputs:
        """Return the first rows alone, as leaves."""
        return LossInputs(_leaf(self.logits, self.logits.detach()[:rows]), self.target[:rows])

    def copy(self) -> LossInputs:
        """Return the same with the logits in memory of their own."""
        return LossInputs(_leaf(self.logits, self.logits.detach().clone()), self.target)


class LinearInputs(NamedTuple):
    """Hidden states ``(N, D)`` and a head ``(V, D)``, both requiring gradients; labels ``(N,)``."""

    hidden: Tensor
    head: Tensor
    target: Tensor

    def first(self, rows: int) -> LinearInputs:
        """Return the first rows and the whole head, as leaves."""
        return LinearInputs(_leaf(self.hidden, self.hidden.detach()[:rows]), self.head, self.target[:rows])


class TokenInputs(NamedTuple):
    """As LinearInputs; and of each token the log-probability before, and the advantage."""

    hidden: Tensor
    head: Tensor
    target: Tensor
    old: Tensor  # (N,), float32
    advantages: Tensor  # (N,), float32

    def first(self, rows: int) -> TokenInputs:
        """Return the first rows and the whole head, as leaves."""
        return TokenInputs(*LinearInputs(*self[:3]).first(rows), *(each[:rows] for each in self[3:]))


class TeacherInputs(NamedTuple):
    """As LinearInputs; and a teacher's hidden states, whose head is the same."""

    hidden: Tensor
    head: Tensor
    target: Tensor
    teacher: Tensor  # (N, D)

    def first(self, rows: int) -> TeacherInputs:
        """Return the first rows and the whole head, as leaves."""
        return TeacherInputs(*LinearInputs(*self[:3]).first(rows), self.teacher[:rows])


def _leaf(original: Tensor, data: Tensor) -> Tensor:
    return data.requires_grad_(original.requires_grad)


def loss_inputs(
    rows: int,
    classes: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int,
    probabilities: bool = False,
    requires_grad: bool = True,
) -> LossInputs:
    """Return random logits, and labels or class probabilities in the logits' dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn((rows, classes), generator=generator, dtype=dtype, device=device).mul_(SPREAD)
    target = torch.randint(classes, (rows,), generator=generator, device=device)
    lift = torch.rand((rows, 1), generator=generator, device=device) * LABEL_LIFT
    logits.scatter_add_(1, target[:, None], lift.to(dtype))
    if probabilities:
        generator = torch.Generator(device).manual_seed(seed + 1)
        target = torch.rand((rows, classes), generator=generator, dtype=dtype, device=device)
        target /= target.sum(1, keepdim=True)
    return LossInputs(logits.requires_grad_(requires_grad), target)


def linear_inputs(
    rows: int, features: int, classes: int, dtype: torch.dtype, device: torch.device, *, seed: int
) -> LinearInputs:
    """Return random hidden states, a head and labels, whose logits have a standard deviation of 2."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(rows, features, generator=generator, device=device)
    head = torch.randn(classes, features, generator=generator, device=device).mul_(2 / features**0.5)
    target = torch.randint(classes, (rows,), generator=generator, device=device)
    return LinearInputs(hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), target)


def token_inputs(inputs: LinearInputs, *, seed: int) -> TokenInputs:
    """Return tokens whose log-probabilities have moved by about 0.3, and advantages between −0.5 and 1.5.

    The logits are normal with a standard deviation of 2, so that their log-sum-exp is about log V + 2.
    """
    (rows, _), classes, device = inputs.hidden.shape, len(inputs.head), inputs.hidden.device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        label_logits = (inputs.hidden.float() * inputs.head[inputs.target].float()).sum(1)
    moved = 0.3 * torch.randn(rows, generator=generator, device=device)
    advantages = 2 * torch.rand(rows, generator=generator, device=device) - 0.5
    return TokenInputs(*inputs, label_logits - (math.log(classes) + 2) + moved, advantages)


def teacher_inputs(inputs: LinearInputs, *, seed: int) -> TeacherInputs:
    """Return the hidden states of a teacher that is half the student."""
    generator = torch.Generator(inputs.hidden.device).manual_seed(seed)
    noise = torch.randn(inputs.hidden.shape, generator=generator, device=inputs.hidden.device)
    return TeacherInputs(*inputs, ((inputs.hidden.detach().float() + noise) / 2**0.5).to(inputs.hidden.dtype))


def rotated(make: Callable[[], Made], device: torch.device | None = None) -> list[Made]:
    """Return as many inputs as no cache holds together, so that each call finds its own in memory.

    Inputs that are small stay in the caches in training too, and one of them is enough.
    """
    total = _ROTATED_BYTES
    if device is not None and device.type == "cuda":
        total = max(total, _L2_CACHES * torch.cuda.get_device_properties(device).L2_cache_size)
    result = [make()]
    size = sum(tensor.nbytes for tensor in (result[0] if isinstance(result[0], tuple) else (result[0],)))
    if size >= _SMALL_BYTES:
        result += [make() for _ in range(-(-total // size) - 1)]
    return result


def resnet50_shapes(width: int = RESNET50_WIDTH) -> list[tuple[int, ...]]:
    """Return the shapes of a ResNet-50's parameters, or of a narrower one's."""

    def convolution(channels: int, filters: int, size: int) -> list[tuple[int, ...]]:
        return [(filters, channels, size, size), (filters,), (filters,)]

    shapes, channels = convolution(3, width, 7), width
    for stage, blocks in enumerate(BOTTLENECKS):
        inner = width << stage
        for block in range(blocks):
            shapes += convolution(channels, inner, 1) + convolution(inner, inner, 3)
            shapes += convolution(inner, inner * EXPANSION, 1)
            if block == 0:
                shapes += convolution(channels, inner * EXPANSION, 1)
            channels = inner * EXPANSION
    return [*shapes, (RESNET50_CLASSES, channels), (RESNET50_CLASSES,)]


def count(shapes: Sequence[tuple[int, ...]]) -> int:
    """Return the number of parameters."""
    return sum(map(math.prod, shapes))
