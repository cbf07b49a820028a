"""The examples in the docstrings run, and print what they say; the documents name files that there are."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

FOLDERS = ("benchmarks", "docs", "fastloss", "kernels", "tests")

MODULES = {
    "fastloss": {""},
    "fastloss.loss.functional": {"accuracy", "cross_entropy", "cross_entropy_with_accuracy"},
    "fastloss.linear.functional": {"linear_cross_entropy", "linear_cross_entropy_with_accuracy"},
    "fastloss.linear.statistics": {"linear_cross_entropy_with_statistics"},
    "fastloss.linear.token_loss": {"linear_token_loss"},
    "fastloss.linear.kl_div": {"linear_kl_div"},
    "fastloss.linear.topk": {"linear_topk_log_probs"},
    "fastloss.loss.statistics": {"cross_entropy_with_statistics"},
    "fastloss.metrics.accuracy": {"Accuracy"},
    "fastloss.faces.modules": {"CrossEntropyLoss", "LinearCrossEntropyLoss"},
    "fastloss.faces.lazy.heads": {"without_logits"},
    "fastloss.faces.patch": {"patch_torch"},
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


def test_documents_name_files_that_there_are() -> None:
    """Placeholders (``X.py``) and torch's own files are left out."""
    files = [path for folder in ROOT.iterdir() if folder.name in FOLDERS for path in folder.rglob("*.py")]
    paths = [f"/{path.relative_to(ROOT).as_posix()}" for path in files]
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    wrong = [
        f"{document.name}: {name}"
        for document in documents
        for name in re.findall(r"`([\w./]+\.py)`", document.read_text(encoding="utf-8"))
        if not name.startswith("torch/")
        and Path(name).name != "X.py"
        and not any(path.endswith(f"/{name}") for path in paths)
    ]
    assert documents
    assert not wrong, "\n".join(wrong)
