"""The examples in the docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest

MODULES = {
    "fastloss": {""},
    "fastloss.loss.functional": {"accuracy", "cross_entropy", "cross_entropy_with_accuracy"},
    "fastloss.linear.functional": {"linear_cross_entropy", "linear_cross_entropy_with_accuracy"},
    "fastloss.loss.statistics": {"cross_entropy_with_statistics"},
    "fastloss.metrics.accuracy": {"Accuracy"},
    "fastloss.modules": {"CrossEntropyLoss", "LinearCrossEntropyLoss"},
    "fastloss.backends.choice": {"use_backend"},
    "fastloss.optim.sgd": {"SGD"},
}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user has them: CPU tensors, and the backend that serves them by default."""
    monkeypatch.delenv("FASTLOSS_BACKEND", raising=False)
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_has_an_example(name: str) -> None:
    """doctest finds nothing to complain of in a docstring without examples."""
    module: Any = importlib.import_module(name)
    prefix = len(name) + 1
    tests = {test.name[prefix:] for test in doctest.DocTestFinder().find(module) if test.examples}
    assert MODULES[name] <= tests
