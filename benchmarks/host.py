"""Host time: microseconds from the Python call to its return, for a few logits: ``python -m benchmarks.host``.

On a GPU that is the time to check the arguments and to queue the launches; nothing is waited for. On a CPU it is all
of the work, which is next to none for (8, 10). Contenders take turns in one process and medians are compared. The bar
holds on the CPU.

``--launches``, where there is no GPU: the kernels' host side alone, up to launches that start nothing, beside
PyTorch's whole call for (8, 10) on the CPU. (PyTorch's calls on a GPU make launches too, five or six for a loss and
its gradient; none are counted on either side.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss

from .cpu import Call, Contest, Function, Pair, compare, forward, forward_backward, fused
from .shared import CPU, header, parsed_by, parser_of

_BAR = 1.5
_BLOCK = 20

Make = Callable[[Function, Tensor], Call]


def contests(device: torch.device) -> Iterator[Contest]:
    """Yield the loss alone and with its backward pass, and the accuracy, beside the same in plain PyTorch."""
    target, bar = torch.randint(10, (8,), device=device), _BAR if device.type == "cpu" else None
    module, torchs = fastloss.CrossEntropyLoss(label_smoothing=0.1), torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    rows: list[tuple[str, Make, Function, str, Function, float | None]] = [
        ("forward", forward, fastloss.cross_entropy, "F.cross_entropy", F.cross_entropy, bar),
        ("forward + backward", forward_backward, fastloss.cross_entropy, "F.cross_entropy", F.cross_entropy, bar),
        ("module, smoothed, forward + backward", forward_backward, module, "nn.CrossEntropyLoss", torchs, bar),
        ("accuracy", forward, fastloss.accuracy, "argmax, ==, mean", _accuracy, None),
    ]
    if device.type == "cpu":  # torch's own operator serves the calls above
        name = "fused pass all the same, forward + backward"
        rows.append((name, forward_backward, fused, "F.cross_entropy", F.cross_entropy, None))
    for name, make, ours, other, theirs, limit in rows:
        logits = torch.randn(8, 10, device=device, requires_grad=make is forward_backward)
        yield [logits], [Pair(f"{name} (8, 10)", make(ours, target), other, make(theirs, target), limit)]


def _accuracy(x: Tensor, target: Tensor) -> Tensor:
    return (x.argmax(1) == target).float().mean()


def launches() -> Iterator[Contest]:
    """Yield calls that the kernels serve, beside the same for few logits on the CPU. Launches end at the driver."""
    from .no_gpu import pretend

    pretend()
    torch.set_num_threads(1)
    target, labels = torch.randint(1000, (64,)), torch.randint(10, (8,))
    soft = torch.randn(64, 1000).softmax(1)
    few, leaf = torch.randn(8, 10), torch.randn(8, 10, requires_grad=True)
    torch_backward = forward_backward(F.cross_entropy, labels)

    def statistics(x: Tensor, y: Tensor) -> Tensor:
        return fastloss.cross_entropy_with_statistics(x, y, entropy=True, correct=True).loss

    def both(x: Tensor) -> None:
        fastloss.cross_entropy_with_accuracy(x, target).loss.backward()
        x.grad = None

    def torch_both(_: Tensor) -> None:
        torch_backward(leaf)
        _accuracy(leaf.detach(), labels)

    def alone(_: Tensor) -> None:
        F.cross_entropy(few, labels)

    def with_gradient(_: Tensor) -> None:
        torch_backward(leaf)

    def of_soft(x: Tensor, _: Tensor) -> Tensor:
        return fastloss.cross_entropy(x, soft)

    # Six chunks of (16, 8) x 64, beside torch's two functions.
    hidden, head = (torch.randn(n, 8, requires_grad=True) for n in (96, 64))
    next_tokens = torch.randint(64, (96,))

    def by_chunks(_: Tensor) -> None:
        fastloss.linear_cross_entropy(hidden, head, next_tokens, chunk_size=16).backward()
        hidden.grad = head.grad = None

    def plain(_: Tensor) -> None:
        F.cross_entropy(F.linear(hidden, head), next_tokens).backward()
        hidden.grad = head.grad = None

    other = "F.cross_entropy (8, 10)"
    rows: list[tuple[str, Call, str, Call, float | None]] = [
        ("forward", forward(fastloss.cross_entropy, target), other, alone, 2.0),
        ("forward + backward", forward_backward(fastloss.cross_entropy, target), other, with_gradient, 1.25),
        ("forward + backward + top-1", both, "the same (8, 10)", torch_both, 0.8),
        (
            "soft targets, forward + backward",
            forward_backward(of_soft, target),
            other,
            with_gradient,
            1.5,
        ),
        ("statistics, forward + backward", forward_backward(statistics, target), other, with_gradient, 2.0),
        ("accuracy", forward(fastloss.accuracy, target), other, alone, None),
    ]
    for name, ours, beside, theirs, bar in rows:
        logits = torch.randn(64, 1000, requires_grad="backward" in name)
        yield [logits], [Pair(f"{name} (64, 1000)", ours, beside, theirs, bar)]
    name = "linear, forward + backward, six chunks (96, 8) x 64"
    yield [few], [Pair(name, by_chunks, "F.linear, F.cross_entropy", plain, 1.5)]


def _form(pair: Pair, ours: float, theirs: float) -> str:
    bar = "" if pair.bar is None else f"  ≤ {pair.bar}"
    times = f"{1e6 * ours:8.1f} us  {pair.other:>25} {1e6 * theirs:8.1f} us"
    return f"{pair.name:52} {times}  ratio {ours / theirs:5.2f}{bar}"


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit code 1 if a bar is missed."""
    parser = parser_of("host", __doc__, seconds=2.0, each="line")
    parser.add_argument("--launches", action="store_true", help="the kernels' host side, without a GPU")
    options = parsed_by(parser, arguments)
    device = CPU if options.launches else torch.device(options.device)
    print(header("launches that start nothing" if options.launches else options.device))
    chosen = launches() if options.launches else contests(device)
    missed = compare(chosen, _form, budget=options.seconds, block=_BLOCK)
    if device.type == "cpu":  # elsewhere there are no bars
        print(f"{missed} bars missed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
