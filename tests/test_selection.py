"""Which tests the fast selection leaves out."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import selection

ROOT = Path(__file__).resolve().parents[1]

TESTS = """
import pytest
import torch
from places import Place

PLACES = [Place("eager", torch.device("cpu")), Place("triton", torch.device("cpu"))]

@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(4))
@pytest.mark.parametrize("c", range(4))
def test_table(a, b, c): ...

@pytest.mark.backend_agnostic
@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_agnostic(place, a): ...

@pytest.mark.slow
def test_slow(): ...

@pytest.mark.slow(interpreted=True)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_slow_interpreted(place): ...
"""
FEW = "def test_one(): ..."


@pytest.mark.parametrize("sizes", [(2, 13), (3, 4, 5), (2, 2, 3, 4, 5)], ids=str)
def test_every_pair_that_the_table_has_is_in_the_cover(sizes: tuple[int, ...]) -> None:
    table = [dict(zip("abcde", values, strict=False)) for values in itertools.product(*map(range, sizes))]
    table = random.Random(0).sample(table, len(table) * 3 // 4)  # a table may lack cases

    def pairs(cases: list[dict[str, int]]) -> set[object]:
        return {pair for case in cases for pair in itertools.combinations(case.items(), 2)}

    cover = [table[index] for index in selection.pairwise(table)]
    assert pairs(cover) == pairs(table)
    assert len(cover) <= (len(table) if len(sizes) == 2 else len(table) * 2 // 3)


def test_values_without_a_hash_are_told_apart() -> None:
    options: list[dict[str, int]] = [{}, {"k": 1}]
    assert selection.pairwise([{"options": each, "n": n} for each in options for n in range(3)]) == list(range(6))
    assert len(selection.pairwise([{"options": options[0]}] * 3)) == 1


@pytest.mark.parametrize("values", [((1,), (True,)), (0.0, -0.0), (1, True, 1.0), (None, "None")], ids=str)
def test_values_that_are_equal_but_not_the_same_are_told_apart(values: tuple[object, ...]) -> None:
    assert selection.pairwise([{"value": value} for value in values]) == list(range(len(values)))
    assert selection.pairwise([{"value": values[0]}, {"value": values[0]}]) == [0]


@pytest.mark.slow
def test_what_is_selected(tmp_path: Path) -> None:
    expected: dict[tuple[str, ...], int] = {
        (): 16 + 4 + 1,
        ("--all",): 64 + 6 + 1 + 2,
        ("-k", "slow or eager"): 3 + 1 + 2,
        ("-m", "slow"): 1 + 2,
        ("test_made.py::test_slow",): 1,
        ("test_made.py::test_agnostic",): 6,
    }
    options = ("--collect-only", "-q", "-p", "no:cacheprovider")
    lists = pytest_over(TESTS, tmp_path, *([*options, *arguments] for arguments in expected))
    for (arguments, count), listed in zip(expected.items(), lists, strict=True):
        assert sum("::" in line for line in listed.splitlines()) == count, listed
        assert ("pytest --all" in listed) == (not arguments)


@pytest.mark.slow
def test_the_last_failures_are_by_hand_if_there_are_any(tmp_path: Path) -> None:
    tests = (
        "import pytest\n@pytest.mark.slow\ndef test_slow(): ...\ndef test_good(): ...\ndef test_bad(): assert False"
    )
    options = ["--lf", "-n", "logical", "--maxprocesses", "1"]
    first, second = pytest_over(tests, tmp_path, options, options)
    assert "1 failed, 1 passed" in first
    assert " worker" in first
    assert "pytest --all" in first
    assert "1 failed" in second
    assert "passed" not in second
    assert " worker" not in second
    assert "pytest --all" not in second


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["0", "1"])
def test_the_fast_selection_is_named_only_where_it_left_tests_out(processes: str, tmp_path: Path) -> None:
    (tmp_path / "test_few.py").write_text(FEW, encoding="utf-8")
    few, some = pytest_over(TESTS, tmp_path, ["-n", processes, "test_few.py"], ["-n", processes, "test_made.py"])
    assert "pytest --all" not in few
    assert "pytest --all" in some


@pytest.mark.slow
def test_skipped_cases_take_no_place_in_the_cover(tmp_path: Path) -> None:
    """Each pair occurs in a case that runs; the skipped ones are shown."""
    table = """
import pytest
CASES = [pytest.param(n, n, marks=pytest.mark.skip) for n in range(20)] + [(n, 20 + n) for n in range(20)]
@pytest.mark.parametrize(("a", "b"), CASES)
@pytest.mark.parametrize("c", range(2))
def test_skips(a, b, c): ...
"""
    (done,) = pytest_over(table, tmp_path, ["-n", "0"])
    assert "40 passed, 40 skipped" in done


def pytest_over(tests: str, folder: Path, *runs: list[str]) -> list[str]:
    """Return what pytest prints over these tests in each run, with this project's conftest.py.

    One process runs them in turn: it takes seconds to begin.
    """
    (folder / "test_made.py").write_text(tests, encoding="utf-8")
    conftest = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    (folder / "conftest.py").write_text(conftest, encoding="utf-8")
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    outer = ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    program = f"import pytest\nfor run in {runs}: print('exit code', int(pytest.main(run)), flush=True)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    *printed, end = re.split(r"^exit code [01]\n", done.stdout, flags=re.MULTILINE)
    assert (len(printed), end) == (len(runs), ""), done.stdout + done.stderr
    return printed
