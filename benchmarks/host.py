"""Host time: microseconds from the Python call to its return, for a few logits: ``python -m benchmarks.host``.

On a GPU that is what it takes to check the arguments and to queue the launches (nothing is waited for); on a CPU the
whole of the work, which for (8, 10) is next to none. Contenders take turns in one process and medians are compared.
The bar holds on the CPU.

``--launches``, where there is no GPU: the kernels' host side alone, up to launches that start nothing, beside
PyTorch's whole call for (8, 10) on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss

from .cpu import Row, forward_backward
from .measure import Budget, header, interleaved

_BAR = 1.5

Contest = tuple[str, str, "float | None", Tensor, Callable[[Tensor], object], Callable[[Tensor], object]]


def rows(device: torch.device, budget: Budget) -> list[Row]:
    """Loss alone, with its backward pass, and with accuracy, beside what one would write without fastloss."""
    x = torch.randn(8, 10, device=device)
    leaf = torch.randn(8, 10, device=device).requires_grad_()
    target = torch.randint(10, (8,), device=device)
    bar = _BAR if device.type == "cpu" else None
    module, theirs = fastloss.CrossEntropyLoss(label_smoothing=0.1), torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    def fused(x: Tensor, target: Tensor) -> Tensor:
        with fastloss.use_backend("eager"):
            return fastloss.cross_entropy(x, target)

    contests: list[Contest] = [
        (
            "forward",
            "F.cross_entropy",
            bar,
            x,
            lambda x: fastloss.cross_entropy(x, target),
            lambda x: F.cross_entropy(x, target),
        ),
        (
            "forward + backward",
            "F.cross_entropy",
            bar,
            leaf,
            forward_backward(fastloss.cross_entropy, target),
            forward_backward(F.cross_entropy, target),
        ),
        (
            "module, smoothed, forward + backward",
            "nn.CrossEntropyLoss",
            bar,
            leaf,
            forward_backward(module, target),
            forward_backward(theirs, target),
        ),
        (
            "accuracy",
            "argmax, ==, mean",
            None,
            x,
            lambda x: fastloss.accuracy(x, target),
            lambda x: (x.argmax(1) == target).float().mean(),
        ),
    ]
    if device.type == "cpu":  # what the calls above spare
        contests.append(
            (
                "fused pass all the same, forward + backward",
                "F.cross_entropy",
                None,
                leaf,
                forward_backward(fused, target),
                forward_backward(F.cross_entropy, target),
            )
        )
    return _measured(contests, budget)


def launches(budget: Budget) -> list[Row]:
    """The same for logits that the kernels serve, whose launches end at the driver."""
    from .no_gpu import pretend

    pretend()
    torch.set_num_threads(1)
    target = torch.randint(1000, (64,))
    small, labels = torch.randn(8, 10), torch.randint(10, (8,))

    def torch_forward(_: Tensor) -> object:
        return F.cross_entropy(small, labels)

    leaf = torch.randn(8, 10).requires_grad_()
    backward = forward_backward(F.cross_entropy, labels)
    x, wanted = torch.randn(64, 1000), torch.randn(64, 1000).requires_grad_()
    ours = forward_backward(fastloss.cross_entropy, target)
    other = "F.cross_entropy (8, 10)"  # as small as can be, on the CPU
    contests: list[Contest] = [
        ("forward", other, None, x, lambda x: fastloss.cross_entropy(x, target), torch_forward),
        ("forward + backward", other, None, wanted, ours, lambda _: backward(leaf)),
        ("accuracy", other, None, x, lambda x: fastloss.accuracy(x, target), torch_forward),
    ]
    return _measured(contests, budget, "(64, 1000)")


def _measured(contests: list[Contest], budget: Budget, shape: str = "(8, 10)") -> list[Row]:
    results = []
    for name, other, limit, tensor, ours, their in contests:
        mine, others = interleaved([ours, their], [tensor], budget)
        results.append(Row(f"{name} {shape}", other, mine, others, limit))
        print(
            f"{results[-1].name:52} {1e3 * mine:8.1f} us  {other:>23} {1e3 * others:8.1f} us  "
            f"ratio {mine / others:5.2f}" + ("" if limit is None else f"  ≤ {limit}"),
            flush=True,
        )
    return results


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each line (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--launches", action="store_true", help="the kernels' host side, without a GPU")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch finds none")
    print(header("launches that start nothing" if parsed.launches else parsed.device))
    budget = Budget(parsed.seconds, 20)
    results = launches(budget) if parsed.launches else rows(torch.device(parsed.device), budget)
    are_missed = [row.ratio > row.bar for row in results if row.bar is not None]
    if are_missed:
        print(f"{sum(are_missed)} bars missed")
    return int(any(are_missed))


if __name__ == "__main__":
    sys.exit(main())
