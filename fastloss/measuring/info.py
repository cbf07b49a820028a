"""The backend that serves this machine, and the versions that a bug report needs."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import fastloss

from ..backends import choice

VERSION = fastloss.__version__


def show() -> None:
    """Print :func:`facts`."""
    rows = facts()
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def facts() -> list[tuple[str, str]]:
    """Return names and values in the order in which they are shown."""
    rows = [
        ("fastloss", VERSION),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("Triton", choice.triton_version() or "not installed"),
    ]
    rows += [
        (name, version) for name, version in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)) if version
    ]
    rows.append(("CPU", f"{processor()}, {torch.get_num_threads()} threads used by torch"))
    rows.append(("backend on the CPU", reason(torch.device("cpu"))))
    devices = _accelerators()
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        rows += [(f"GPU {device}", name), (f"backend on {device}", reason(device))]
    rows += [] if devices else [("GPU", "none that torch can use")]
    return rows


def processor() -> str:
    """Return the system's name of the processor."""
    listing = Path("/proc/cpuinfo")  # Linux, where platform.processor() is often empty
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _accelerators() -> list[torch.device]:
    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return []
    return [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]


def reason(device: torch.device) -> str:
    """Return :func:`fastloss.backends.choice.reason`, or its error about ``FASTLOSS_BACKEND``."""
    try:
        return choice.reason(device)
    except ValueError as error:
        return str(error)
