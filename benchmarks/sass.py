"""What NVIDIA's disassembly says of a kernel's hot loops: instructions and special-function operations an element.

A *hot* loop is an innermost loop with 128-bit accesses to device memory that no predicate guards: the loops that a
kernel runs through for full, aligned blocks. Of a kernel that holds a tile whole it is the loop from tile to tile,
whose accesses a mask may guard, and which may have loops in it that hardly ever run. What a loop jumps over in all
but a few of its rounds (a branch forward, around code without such accesses) is told apart: ``usual`` leaves it out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Loop", "hot_loops", "tile_loops", "wide_loads"]

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_WIDE = re.compile(r"^(LDG|STG|LDGSTS)\b.*\.128\b")  # LDGSTS: into shared memory

_ACCESS = re.compile(r"^(LDG|STG|LDGSTS)\b")


@dataclass(frozen=True)
class Loop:
    """Instructions of one round of a loop, for each thread."""

    instructions: int  # all that stand in it
    usual: int  # those of a round that jumps over what is rare
    special: int  # MUFU operations among the usual ones
    loads: int  # 128-bit ones
    stores: int
    narrow: int  # usual accesses to device memory that are narrower


@dataclass(frozen=True)
class _Instruction:
    address: int
    predicate: str
    name: str
    target: int | None  # of a branch


def hot_loops(disassembly: str) -> list[Loop]:
    """Return the hot loops of a kernel that goes block by block, in the order of the code."""
    code = _code(disassembly)
    loops = _loops(code)
    innermost = [loop for loop in loops if not _contains_any(loop, loops)]
    return [
        _loop(code, first, last)
        for first, last in innermost
        if any(_WIDE.match(i.name) and not i.predicate for i in code[first : last + 1])
        or _guarded_by_the_row(code[first : last + 1])
    ]


def tile_loops(disassembly: str) -> list[Loop]:
    """Return the loops from tile to tile of a kernel that holds a tile whole: those next to the 128-bit accesses."""
    code = _code(disassembly)
    loops = [(a, b) for a, b in _loops(code) if any(_WIDE.match(i.name) for i in code[a : b + 1])]
    return [_loop(code, *loop) for loop in loops if not _contains_any(loop, loops)]


def wide_loads(disassembly: str) -> int:
    """Return how many 128-bit loads from device memory the code has, into registers or shared memory."""
    return sum(bool(_WIDE.match(i.name)) and i.name.startswith("LDG") for i in _code(disassembly))


def _code(disassembly: str) -> list[_Instruction]:
    return [
        _Instruction(int(address, 16), predicate, name, _target(name, operands))
        for address, predicate, name, operands in _LINE.findall(disassembly)
    ]


def _loops(code: list[_Instruction]) -> list[tuple[int, int]]:
    """Return the first and the last instruction of each loop."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    ranges = sorted(
        {
            (place[instruction.target], i)
            for i, instruction in enumerate(code)
            if instruction.target is not None
            and instruction.target <= instruction.address
            and place.get(instruction.target, i) != i
        }
    )
    # Loops lie in each other or apart. What begins in one and ends behind it comes back from code for warps that
    # have diverged, which stands behind everything.
    return [(c, d) for c, d in ranges if not any(a < c <= b < d for a, b in ranges)]


def _contains_any(loop: tuple[int, int], loops: list[tuple[int, int]]) -> bool:
    return any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)


def _loop(code: list[_Instruction], first: int, last: int) -> Loop:
    body = code[first : last + 1]
    usual = _without_detours(body, {instruction.address: i for i, instruction in enumerate(code)}, first)
    return Loop(
        len(body),
        len(usual),
        sum(i.name.startswith("MUFU") for i in usual),
        sum(i.name.startswith("LDG") and ".128" in i.name for i in body),
        sum(i.name.startswith("STG") and ".128" in i.name for i in body),
        sum(bool(_ACCESS.match(i.name)) and ".128" not in i.name for i in usual),
    )


def _target(name: str, operands: str) -> int | None:
    if not name.startswith("BRA"):
        return None
    address = re.search(r"0x([0-9a-f]+)\s*$", operands.strip())
    return int(address[1], 16) if address else None


def _guarded_by_the_row(body: list[_Instruction]) -> bool:
    """Return True if one predicate, that of a row which counts, guards all wide accesses."""
    wide = {i.predicate for i in body if _WIDE.match(i.name)}
    return len(wide) == 1


def _without_detours(body: list[_Instruction], place: dict[int, int], first: int) -> list[_Instruction]:
    """Return one round that takes each branch forward, unless it would jump over wide accesses."""
    usual, i = [], 0
    while i < len(body):
        instruction = body[i]
        usual.append(instruction)
        i += 1
        if instruction.target is not None and instruction.target > instruction.address:
            landing = place[instruction.target] - first
            if landing <= len(body) and not any(_WIDE.match(skipped.name) for skipped in body[i:landing]):
                i = landing
    return usual
