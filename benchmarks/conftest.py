"""The contest under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

``--shapes`` chooses how much of it: ``tiny`` (seconds, on a CPU: what CI runs), ``quick`` or ``full``; ``-k`` picks
by operation, shape, dtype, target and contender. ``python -m fastloss bench`` measures the same with all contenders
in turns; here each is timed by itself, as pytest-benchmark has it.
"""

from __future__ import annotations

import pytest
import torch

from fastloss.bench.workloads import SIZES
from fastloss.measuring.contenders import CONTENDERS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shapes", choices=SIZES, default="quick", help="how much of the contest (default: quick)")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Time in this process alone: pytest-benchmark times nothing where others work at the same time."""
    return 0


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"contest: shapes {config.getoption('--shapes')}, on {'cuda' if torch.cuda.is_available() else 'cpu'}"]
    return lines + [f"contender {contender.name}: {contender.presence()}" for contender in CONTENDERS.values()]
