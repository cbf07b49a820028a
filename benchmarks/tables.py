"""The tables of README.md and docs/, from the records: ``python -m benchmarks.tables``.

The lines between ``<!-- numbers: RECORD -->`` (or ``<!-- numbers: RECORD PART -->``) and the next empty line are made
from that record in benchmarks/results; ``--check`` only compares.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .shared import ROOT, markdown

# The newest record of a GPU, benchmarks/results/<gpu>-<date>.json, which `python -m benchmarks.record` writes.
GPU = "benchmarks/results/<gpu>-<date>.json"
NO_GPU = "**No GPU has been measured.**\n"
_DATED = re.compile(r"(?P<gpu>.+)-(?P<date>\d{4}-\d\d-\d\d)\.json")

DOCUMENTS = ("README.md", "docs/performance.md")
NOT_RECORDED = "*Not recorded yet.*"

_PLACE = re.compile(r"^(<!-- numbers: (\S+)(?: (\S+))? -->\n)((?:.+\n)*)", re.MULTILINE)  # to the next empty line
_PEER = re.compile(
    r"forward \+ backward (?P<shape>\(.*\) \w+) +(?P<ours>\S+ ms) +"
    r"(?P<peer>\S+) +(?P<theirs>\S+ ms) +ratio +(?P<ratio>\S+)"
)
_SET = re.compile(r"(?P<set>[\w, ]+): (?P<count>\d+) tensors, (?P<floats>\S+ M) ")
_STEP = re.compile(
    r"(?P<name>\S.*?) {2,}(?P<ms>\S+ ms) +(?P<speed>\S+ GB/s) +(?P<share>\S+%) of a copy"
    r"(?: +host +(?P<host>\S+) us a tensor)?(?P<rest>.*)"
)
_LINEAR_SHAPE = re.compile(r"(?P<shape>\(\d+, \d+\) x \d+ \w+)")
_LINEAR = re.compile(
    r"(?P<name>\S.*?) {2,}(?P<ms>\S+ ms)(?: +(?P<products>\S+) of the products +(?P<memory>\S+ MB) +error \S+)?"
    r"(?: +of the faster other (?P<ratio>\S+) .* of the plain form's memory (?P<saved>\S+) )?"
)
_RATIO = re.compile(r"ratio +(\S+)")
_BYTES = re.compile(r"at (\d+) bytes each")

_PEERS = ("fused=True", "foreach=True", "foreach=False")


def cross_entropy(record: Sequence[str]) -> str:
    """Return the table of cross-entropy's forward and backward beside torch's operator and the compiler."""
    rows: dict[str, dict[str, str]] = {}
    for line in filter(None, map(_PEER.match, record)):
        row = rows.setdefault(line["shape"], {"fastloss": line["ours"], "torch.compile": "– | –"})
        row[line["peer"]] = f"{line['theirs']} | {line['ratio']}"
    head = ["forward + backward", "fastloss", "`F.cross_entropy`", "ratio", "torch.compile", "ratio"]
    names = ("fastloss", "F.cross_entropy", "torch.compile")
    return _table(head, [[shape, *(row[name] for name in names)] for shape, row in rows.items()])


def sgd(record: Sequence[str]) -> str:
    """Return the table of a step beside each of torch's."""
    rows = []
    for heading, lines in _sets(record):
        if ours := lines.get("fastloss.SGD"):
            row = [f"{heading['set']}: {heading['count']}, {heading['floats']}"]
            row += [ours["host"], ours["ms"], ours["speed"], ours["share"] + _wrong(ours)]
            for line in (lines[f"torch {peer}"] for peer in _PEERS):
                ratio = _RATIO.search(line["rest"])
                row += [line["ms"], ratio[1] if ratio else "wrong"]
            rows.append(row)
    head = ["tensors, parameters", "host, µs a tensor", "fastloss", "bytes", "of a copy's"]
    return _table([*head, *(name for peer in _PEERS for name in (f"`{peer}`", "ratio"))], rows)


def variants(record: Sequence[str]) -> str:
    """Return the table of fastloss alone, in all its forms."""
    rows = []
    for heading, lines in _sets(record):
        name = heading["set"].removeprefix("variants, ")
        for line in lines.values():
            if size := _BYTES.search(line["rest"]):
                rows.append([name, line["name"], size[1], line["ms"], line["speed"], line["share"] + _wrong(line)])
    return _table(["tensors", "form", "bytes a parameter", "a step", "bytes", "of a copy's"], rows)


def linear(record: Sequence[str]) -> str:
    """Return the table of linear_cross_entropy's forward and backward beside torch's two ways to it."""
    rows: list[list[str]] = []
    for line in record:
        if heading := _LINEAR_SHAPE.match(line):
            rows.append([heading["shape"]])
        elif rows and (loss := _LINEAR.match(line)):
            rows[-1] += filter(None, (loss[name] for name in ("ms", "memory", "ratio", "saved")))
    head = ["(N, D) x V", "fastloss", "memory", "of the faster other", "of the plain form's memory"]
    head += ["`F.cross_entropy(F.linear)`", "memory", "`F.linear_cross_entropy`", "memory", "three bare products"]
    return _table(head, rows)


def _sets(record: Sequence[str]) -> list[tuple[re.Match[str], dict[str, re.Match[str]]]]:
    """Return each line that names a set, and the lines below it by their contenders' names."""
    sets: list[tuple[re.Match[str], dict[str, re.Match[str]]]] = []
    for line in record:
        if heading := _SET.match(line):
            sets.append((heading, {}))
        elif sets and (step := _STEP.match(line)):
            sets[-1][1][step["name"]] = step
    return sets


def _wrong(line: re.Match[str]) -> str:
    return " (wrong)" if "WRONG" in line["rest"] else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"{line}\n" for line in markdown(head, rows)) if rows else f"{NOT_RECORDED}\n"


TABLES: dict[tuple[str, str | None], Callable[[Sequence[str]], str]] = {
    ("benchmarks/results/cpu.md", None): cross_entropy,
    ("benchmarks/results/linear-cpu.md", None): linear,
    ("benchmarks/results/sgd-cpu.md", None): sgd,
    ("benchmarks/results/sgd-cpu.md", "variants"): variants,
}


def newest_gpu_record(folder: Path) -> Path | None:
    """Return the record with the latest date in its name, those of CPUs aside."""
    dated = [(name["date"], path) for path in folder.glob("*.json") if (name := _DATED.fullmatch(path.name))]
    return max((each for each in dated if not each[1].name.startswith("cpu-")), default=(None, None))[1]


# The operations of each of a record's tables: their contenders are the same.
_OPS = (("forward+backward", "forward", "loss+accuracy", "accuracy", "host"), ("linear",), ("sgd",))


def gpu(path: Path) -> str:
    """Return tables of each chosen shape: fastloss, its share of the limit, the others' times and the host's times.

    The limit is a copy's bandwidth; of linear_cross_entropy it is the time of three bare products. The host's times,
    which older records do not have, are fastloss's and, of the others, eager PyTorch's. A comment, at which a table
    ends too, stands between tables: the lines that are replaced end with the first empty line.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    tables = [_of_ops(record, ops) for ops in _OPS if any(row["op"] in ops for row in record["rows"])]
    sentence = textwrap.fill(f"{record['device']}, {record['circumstances']}:", 116, break_on_hyphens=False)
    return sentence + "\n" + "<!-- -->\n".join(tables)


def _of_ops(record: dict[str, Any], ops: Sequence[str]) -> str:
    rows = sorted((row for row in record["rows"] if row["op"] in ops), key=lambda row: ops.index(row["op"]))
    by_workload: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        dtype = row["dtype"] + (", soft" if row["target"] == "soft" else "")
        by_workload.setdefault((row["op"], row["shape"], dtype), {})[row["contender"]] = row
    timed = {row["contender"] for row in rows if row["status"] == "timed"}
    others = [name for name in record["contenders"] if name in timed and name != "fastloss"]
    with_host = {row["contender"] for row in rows if row.get("host_milliseconds")}
    hosts = [name for name in ("fastloss", "torch") if name in with_host]

    def cell(row: dict[str, Any], number: str = "milliseconds") -> str:
        unknown = number != "milliseconds" or row.get("status", "absent") in ("absent", "unfit")
        return f"{row[number]:.3f}" if row.get(number) is not None else "–" if unknown else row["status"]

    lines = []
    for workload, by_contender in by_workload.items():
        ours, *theirs = (by_contender.get(name, {}) for name in ("fastloss", *others))
        share = 1 / ours["times_products"] if ours.get("times_products") else ours.get("share_of_copy")
        lines.append([*workload, cell(ours), f"{share:.0%}" if share else "–", *map(cell, theirs)])
        lines[-1] += [cell(by_contender.get(name, {}), "host_milliseconds") for name in hosts]
    head = ["ms", "N x V", "dtype", "fastloss", "of the limit", *others, *(f"host: {name}" for name in hosts)]
    return _table(head, lines)


def filled(text: str, root: Path) -> str:
    """Return the document with its tables made from the records under ``root``."""

    def table(place: re.Match[str]) -> str:
        record, part = place[2], place[3]
        if record == GPU:
            newest = newest_gpu_record(root / "benchmarks" / "results")
            return NO_GPU if newest is None else gpu(newest)
        if (record, part) not in TABLES:
            known = "; ".join([GPU, *(" ".join(filter(None, key)) for key in TABLES)])
            raise ValueError(f"no table is made from {record} {part or ''}; known: {known}")
        path = root / record
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return TABLES[record, part](lines)

    return _PLACE.sub(lambda place: place[1] + table(place), text)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write the tables; with ``--check``, exit code 1 if a table is not its record's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    texts = {root / name: (root / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    differing = {path: text for path, old in texts.items() if (text := filled(old, root)) != old}
    for path, text in differing.items():
        print(f"{path.relative_to(root)}: {'its tables are not those of the records' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    if not differing:
        print(f"{' and '.join(DOCUMENTS)} show the records")
    return int(check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
