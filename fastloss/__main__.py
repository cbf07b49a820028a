"""``python -m fastloss demo | bench | info``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import fastloss

from . import bench


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    return {"bench": _bench, "demo": _demo, "info": _info}[options.command](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastloss", description="Cross-entropy, accuracy and SGD in one pass each."
    )
    parser.add_argument("--version", action="version", version=f"fastloss {fastloss.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{demo,bench,info}", title="commands")

    demo = commands.add_parser(
        "demo",
        help="train beside plain PyTorch and compare: under a minute, measured here and now",
        description="Trains one network twice on scikit-learn's scans of digits, with fastloss and in plain "
        "PyTorch; then the loss alone at language-model size, a language model on the source of Python's standard "
        "library, with its logits and without them, and SGD's step alone. Prints all of it and draws it.",
    )
    demo.add_argument(
        "--output",
        type=_png,
        default=Path("fastloss-demo.png"),
        metavar="PATH",
        help="the picture (default: %(default)s)",
    )
    demo.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the split, the weights, the batches and the logits (default: %(default)s)",
    )
    measuring = commands.add_parser(
        "bench",
        help="time, bandwidth and memory beside every other package that is installed here",
        description="Cross-entropy, accuracy and SGD by every contender that is installed, checked against float64 "
        "and then timed in turns with a device copy, which is the limit that all are held against.",
    )
    bench.add_arguments(measuring)
    commands.add_parser(
        "info",
        help="which backend serves this machine, and why; versions",
        description="Which backend serves this machine, and why; versions.",
    )
    return parser


def _png(text: str) -> Path:
    """Return the picture's path; refuse before the work a path that can't be written to."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.resolve().parent)!r}")
    return path


def _info(_: argparse.Namespace) -> int:
    from .measuring import info

    info.show()
    return 0


def _lacks(command: str, packages: list[str], extra: str) -> bool:
    """Return True if packages are missing, and print how to install them."""
    if packages:
        print(f'fastloss: {command} needs {", ".join(packages)}: pip install "fastloss[{extra}]"', file=sys.stderr)
    return bool(packages)


def _demo(options: argparse.Namespace) -> int:
    from . import demo

    if _lacks("the demo", demo.missing_extras(), "demo"):
        return 2
    demo.run(demo.Settings(output=options.output, seed=options.seed))
    return 0


def _bench(options: argparse.Namespace) -> int:
    if _lacks("bench", bench.missing_extras(), "bench"):
        return 2
    try:
        settings = bench.settings_from(options)
    except ValueError as error:
        print(f"fastloss bench: {error}", file=sys.stderr)
        return 2
    return bench.run(settings)


if __name__ == "__main__":
    sys.exit(main())
