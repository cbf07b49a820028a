"""Several processes that compute together, over gloo: started, and ended after a while come what may."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import fastloss

LIMIT = 300  # seconds, many for a busy machine, after which a process that waits for another gives up
HERE = Path(__file__).resolve().parent


def together(script: str, count: int, folder: Path, *arguments: str, limit: float = LIMIT) -> Any:
    """What the first of ``count`` processes of ``python tests/SCRIPT RANK COUNT FOLDER ARGUMENTS`` wrote.

    They are ended when the time is up, and when one of them has failed, for the others would wait for it.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    folder.mkdir(parents=True, exist_ok=True)
    codes = exit_codes(script, count, folder, *arguments, limit=limit, until_one_fails=True)
    if not (folder / "results.pt").exists() or any(code != 0 for code in codes):
        pytest.fail(f"the processes ended with {codes}\n{logs(folder)}")
    return torch.load(folder / "results.pt", weights_only=False)


def exit_codes(
    script: str, count: int, folder: Path, *arguments: str, limit: float, until_one_fails: bool = False
) -> list[int | None]:
    """Return the exit codes of so many processes, None for one that had to be killed.

    What they print is in ``folder / "RANK.log"``.
    """
    how = {"script": str(HERE / script), "count": count, "folder": str(folder), "arguments": arguments}
    ends = {"limit": limit, "until_one_fails": until_one_fails}
    forks = [sys.executable, str(HERE / "forks.py"), json.dumps({**how, **ends})]
    out, errors, code = _run(forks, _environment(), limit + LIMIT)
    assert code == 0, errors
    codes: list[int | None] = json.loads(out)
    return codes


def logs(folder: Path) -> str:
    """Return the end of what each process has printed."""
    return "\n".join(
        f"{log.name}:\n{log.read_text(encoding='utf-8')[-3000:]}" for log in sorted(folder.glob("*.log"))
    )


def torchrun(count: int, *command: str, limit: float = LIMIT) -> str:
    """What ``torchrun --nproc-per-node COUNT COMMAND`` prints, which must come to its end in time."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    run += [str(HERE / "leaving.py"), *command]
    environment = _environment()
    environment.pop("FASTLOSS_BACKEND", None)
    out, errors, code = _run(run, environment, limit)
    if code:
        pytest.fail(f"{' '.join(command)}\n{out[-3000:]}\n{errors[-6000:]}")
    return out


def _run(command: list[str], environment: dict[str, str], limit: float) -> tuple[str, str, int]:
    """Return what a program prints, and its exit code. It and those that it started end in time."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, cwd=HERE.parent, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            out, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            out, errors = "", f"not at its end after {limit} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return out, errors, process.returncode


def _environment() -> dict[str, str]:
    """This one's fastloss and tests, one thread each, no GPU."""
    path = os.pathsep.join([str(Path(fastloss.__file__).resolve().parents[1]), str(HERE)])
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def join(rank: int, count: int, folder: Path) -> None:
    """In each of them, before anything else."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=LIMIT),
    )


def leave(rank: int, folder: Path, results: Any) -> None:
    """In each of them, after everything else."""
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def whole(tensor: Any) -> torch.Tensor:
    """All of a DTensor, on every process."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
