"""Which tests the fast selection leaves out."""

from __future__ import annotations

import itertools
import os
import random
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], 16 + 4 + 1),
        (["--all"], 64 + 6 + 1 + 2),
        (["-k", "slow or eager"], 3 + 1 + 2),
        (["test_made.py::test_slow"], 1),
        (["test_made.py::test_agnostic"], 6),
    ],
    ids=str,
)
def test_what_is_selected(arguments: list[str], expected: int, tmp_path: Path) -> None:
    (tmp_path / "test_made.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "conftest.py").write_text(
        (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8"
    )
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert sum("::" in line for line in listed.splitlines()) == expected, listed
    assert ("pytest --all" in listed) == (not arguments)
