"""The fast selection: the tests that ``pytest`` runs when nothing was selected by hand.

``pytest --all`` runs every test. A test selected by its node id, ``-k`` or ``-m`` is always run, and so are recorded
failures with ``--lf``. All else leaves out three kinds of cases:

- tests marked ``slow``, or ``slow(interpreted=True)`` for their cases in Triton's interpreter alone;
- of a function with more than ``MOST_CASES`` cases, those that no pair of parameters' values needs: any two values
  that meet in one of the cases still meet in one of the cases that are run;
- of a function marked ``backend_agnostic``, all cases in Triton's interpreter but one.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Hashable, Mapping, Sequence

import pytest
from places import Place

MOST_CASES = 12


def is_by_hand(config: pytest.Config) -> bool:
    """Return True if the command line names single tests."""
    option = config.option
    return bool(
        option.keyword or option.markexpr or any("::" in name for name in config.args) or _has_failures(config)
    )


def _has_failures(config: pytest.Config) -> bool:
    """Return True if ``--lf`` is given and a failure is recorded: without one it selects all tests."""
    if not config.getoption("lf", False):
        return False
    # Before the session starts, when pytest-xdist asks for the number of processes, config.cache is not there yet.
    record = config.rootpath / config.getini("cache_dir") / "v" / "cache" / "lastfailed"
    return record.exists() and json.loads(record.read_text(encoding="utf-8")) != {}


def fast(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return the tests of the fast selection, in their order; all of them if none is fast.

    Tests marked ``skip`` are no cases of it: they stay, so that their reasons are shown.
    """
    functions: dict[str, list[pytest.Item]] = {}
    selected = set()
    for item in items:
        if _is_slow(item):
            continue
        if item.get_closest_marker("skip"):
            selected.add(item)
        else:
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    selected.update(item for cases in functions.values() for item in _of_one_function(cases))
    return [item for item in items if item in selected] or list(items)


def _of_one_function(cases: list[pytest.Item]) -> list[pytest.Item]:
    if "backend_agnostic" in cases[0].keywords:
        interpreted = [item for item in cases if _is_interpreted(item)]
        cases = [item for item in cases if item not in interpreted[1:]]
    if len(cases) <= MOST_CASES:
        return cases
    return [cases[index] for index in pairwise([item.callspec.params for item in cases])]  # type: ignore[attr-defined]


def _is_slow(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("slow")
    return marker is not None and (not marker.kwargs.get("interpreted") or _is_interpreted(item))


def _is_interpreted(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and any(
        isinstance(value, Place) and value.interpreted for value in callspec.params.values()
    )


def pairwise(cases: Sequence[Mapping[str, object]]) -> list[int]:
    """Return the positions of cases in which each pair of values of the whole table occurs.

    The choice is greedy: the next case is the one with the most pairs that no case before it has, and the first of
    several. It is the same in every process.
    """
    pairs = [set(itertools.combinations(_values(case), min(2, len(case)))) for case in cases]
    missing = set().union(*pairs)
    queue = [(-len(pairs[index]), index) for index in range(len(cases))]
    heapq.heapify(queue)
    chosen = []
    while missing:
        _, index = heapq.heappop(queue)
        gain = len(pairs[index] & missing)  # less than in the queue if other cases were chosen since then
        if queue and (-gain, index) > queue[0]:
            heapq.heappush(queue, (-gain, index))
            continue
        missing -= pairs[index]
        chosen.append(index)
    return sorted(chosen)


def _values(case: Mapping[str, object]) -> list[Hashable]:
    return [(name, _key(value)) for name, value in sorted(case.items())]


def _key(value: object) -> Hashable:
    """Return the words of a plain value, so that 1 and True, 0.0 and -0.0 differ; else the value.

    A value that has no hash is told by its identity: all cases share the objects of a parameter's list.
    """
    if _is_plain(value):
        return type(value), repr(value)
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value


def _is_plain(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)
