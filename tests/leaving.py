"""Run a program and end the process by it: ``python leaving.py SCRIPT ARGUMENTS``, or ``-m MODULE ARGUMENTS``.

gloo's threads may still hold tensors of a collective that is over. When such a thread frees one while Python shuts
down, the process aborts: https://github.com/pytorch/pytorch/pull/179291. So Python does not shut down here.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from typing import NoReturn


def run(program: list[str]) -> NoReturn:
    """Run a program with its arguments as ``__main__``, and end the process with its exit code."""
    code = 0
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run(sys.argv[1:])
