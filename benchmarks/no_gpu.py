"""A GPU that is not there: Triton compiles for it, and launches end at a driver that starts nothing.

So the host's side of a launch can be tested and timed where there is no GPU. Tensors lie in the host's memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastloss.backends import choice

__all__ = ["pretend"]

# An H100's.
_CAPABILITY, _PROCESSORS, _SHARED_BYTES, _L2_BYTES = 90, 132, 232448, 50 << 20

# Told of each launch: its source, and the arguments that follow the stream and the function.
Started = Callable[[Any, tuple[int, ...], tuple[Any, ...]], None]


class _Utilities:
    def load_binary(self, *_: object) -> tuple[object, ...]:
        return object(), 1, 32, 0, 1024  # module, function, registers, spills, the most threads

    def unload_module(self, module: object) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_BYTES}


class _Driver:
    utils = _Utilities()

    def __init__(self, started: Started) -> None:
        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.source = source

            def __call__(self, *arguments: Any) -> None:
                started(self.source, arguments[:3], arguments[9:])

        self.launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", _CAPABILITY, 32)


def pretend(started: Started = lambda *_: None) -> None:
    """From now on, serve this process's tensors by the kernels, as a GPU's would be. Its Triton is no interpreter."""
    os.environ["FASTLOSS_BACKEND"] = "triton"
    choice.load("triton")
    launch: Any = sys.modules["fastloss.kernels.launch"]
    tiles: Any = sys.modules["fastloss.kernels.tiles"]
    tiles._processors, tiles._l2_bytes = lambda device: _PROCESSORS, lambda device: _L2_BYTES
    launch._lasting_stream = lambda device: 0
    choice._obstacle_to_triton = lambda device: None
    driver.set_active(_Driver(started))  # type: ignore[arg-type]
