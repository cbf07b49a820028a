"""A GPU that is not there: Triton compiles for it, and launches end at a driver that starts nothing.

So the host's side of a launch can be tested and timed where there is no GPU. Tensors lie in the host's memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastloss.backends import choice

# The most shared memory of a program, by compute capability, in bytes: CUDA C++ Programming Guide, "Compute
# Capabilities", table "Technical Specifications".
SHARED_BYTES = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
PROCESSORS, _L2_BYTES = 132, 50 << 20  # an H100's

# Told of each launch: its source, and the arguments that follow the stream and the function.
Started = Callable[[Any, tuple[int, ...], tuple[Any, ...]], None]


def pretend_to_be_an_h100(shared_bytes: int = SHARED_BYTES[90]) -> None:
    """From now on, plan grids for an H100, and tiles for so much shared memory a program."""
    choice.load("triton")
    launch: Any = sys.modules["fastloss.kernels.launch"]
    tiles: Any = sys.modules["fastloss.kernels.tiles"]
    launch.forget()
    tiles._processors, tiles._l2_bytes = lambda device: PROCESSORS, lambda device: _L2_BYTES
    tiles._shared_bytes = lambda device: shared_bytes


def pretend(started: Started | None = None, capability: int = 90) -> None:
    """From now on, serve this process's tensors by the kernels, as a GPU's would be. Its Triton is no interpreter.

    Args:
        started: told of each launch.
        capability: of the GPU, 10 times its version; a launch that needs more shared memory than it has is an error.
    """
    os.environ["FASTLOSS_BACKEND"] = "triton"
    pretend_to_be_an_h100(SHARED_BYTES[capability])
    choice._obstacle_to_triton = lambda device: None
    choice.may_look = lambda tensor: False
    driver.set_active(_driver(started, capability))


def _driver(started: Started | None, capability: int) -> Any:
    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.source = source

        def __call__(self, *arguments: Any) -> None:
            if started is not None:
                started(self.source, arguments[:3], arguments[9:])

    utils = SimpleNamespace(
        load_binary=lambda *_: (object(), 1, 32, 0, 1024),  # module, function, registers, spills, the most threads
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[capability]},
    )
    return SimpleNamespace(
        utils=utils,
        launcher_cls=Launcher,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
