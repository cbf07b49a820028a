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

__all__ = ["SHARED_BYTES", "pretend"]

# The most shared memory of a program, by compute capability, in bytes: CUDA C++ Programming Guide, "Compute
# Capabilities", table "Technical Specifications".
SHARED_BYTES = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
_PROCESSORS, _L2_BYTES = 132, 50 << 20  # an H100's

# Told of each launch: its source, and the arguments that follow the stream and the function.
Started = Callable[[Any, tuple[int, ...], tuple[Any, ...]], None]


class _Utilities:
    def __init__(self, capability: int) -> None:
        self.shared_bytes = SHARED_BYTES[capability]

    def load_binary(self, *_: object) -> tuple[object, ...]:
        return object(), 1, 32, 0, 1024  # module, function, registers, spills, the most threads

    def unload_module(self, module: object) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_bytes}


class _Driver:
    def __init__(self, started: Started | None, capability: int) -> None:
        self.utils, self.capability = _Utilities(capability), capability

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.source = source

            def __call__(self, *arguments: Any) -> None:
                if started is not None:
                    started(self.source, arguments[:3], arguments[9:])

        self.launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def pretend(started: Started | None = None, capability: int = 90) -> None:
    """From now on, serve this process's tensors by the kernels, as a GPU's would be. Its Triton is no interpreter.

    Args:
        started: told of each launch.
        capability: of the GPU, 10 times its version; a launch that needs more shared memory than it has is an error.
    """
    os.environ["FASTLOSS_BACKEND"] = "triton"
    choice.load("triton")
    tiles: Any = sys.modules["fastloss.kernels.tiles"]
    tiles._processors, tiles._l2_bytes = lambda device: _PROCESSORS, lambda device: _L2_BYTES
    choice._obstacle_to_triton = lambda device: None
    choice.may_look = lambda tensor: False
    tiles._shared_bytes = lambda device: SHARED_BYTES[capability]
    driver.set_active(_Driver(started, capability))  # type: ignore[arg-type]
