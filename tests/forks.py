"""Several processes forked off one that has imported what they need, which takes seconds: ``python forks.py JSON``.

Each runs ``python SCRIPT RANK COUNT FOLDER ARGUMENTS`` and prints to FOLDER/RANK.log. The exit codes are printed.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import leaving


def main(
    script: str, count: int, folder: str, arguments: list[str], limit: float, until_one_fails: bool
) -> list[int | None]:
    """Return the exit codes, None for a process that had to be killed."""
    for name in imported_by(script):
        with contextlib.suppress(ImportError):  # of an extra that is not there
            importlib.import_module(name)
    ranks: dict[int, int] = {}  # of those that run, by their process
    codes: list[int | None] = [None] * count
    for rank in range(count):
        process = os.fork()
        if process == 0:
            log = os.open(Path(folder) / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            leaving.run([script, str(rank), str(count), folder, *arguments])
        ranks[process] = rank
    end = time.monotonic() + limit
    while ranks and time.monotonic() < end and not (until_one_fails and any(codes)):
        time.sleep(0.05)
        note_ended(ranks, codes)
    for process in ranks:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return codes


def imported_by(script: str) -> set[str]:
    """Return the modules that a program imports, at its head or later."""
    names = set()
    for node in ast.walk(ast.parse(Path(script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names - {"__future__"}


def note_ended(ranks: dict[int, int], codes: list[int | None]) -> None:
    """Move those that have ended from the ranks that run to the exit codes."""
    for process in list(ranks):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            codes[ranks.pop(process)] = os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    asked: dict[str, Any] = json.loads(sys.argv[1])
    print(json.dumps(main(**asked)))
