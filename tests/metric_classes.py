"""``fastloss.Accuracy`` in both of its worlds: with torchmetrics, and as it is without."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import fastloss

HAS_TORCHMETRICS = importlib.util.find_spec("torchmetrics") is not None
ALONE = {"alone": True} | ({"torchmetrics": False} if HAS_TORCHMETRICS else {})


def metric_class(name: str) -> Any:
    """The class; the one without torchmetrics comes of a second copy of its module, which finds none."""
    if not ALONE[name]:
        return fastloss.Accuracy
    module = "fastloss.metrics.accuracy_alone"
    if module not in sys.modules:
        path = Path(fastloss.__file__).parent / "metrics" / "accuracy.py"
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, {"torchmetrics": None}):
            spec.loader.exec_module(sys.modules[module])
    return sys.modules[module].Accuracy
