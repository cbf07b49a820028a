"""What NVIDIA's disassembly says of a kernel's hot loops: instructions and special-function operations an element.

A *hot* loop is an innermost loop with 128-bit accesses to device memory that no predicate guards: the loops that a
kernel runs through for full, aligned blocks. Of a kernel that holds a tile whole it is the loop from tile to tile,
whose accesses a mask may guard, and which may have loops in it that hardly ever run. What a loop jumps over in all
but a few of its rounds (a branch forward, around code without such accesses) is told apart: ``usual`` leaves it out.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_ACCESS = re.compile(r"^(LDG|STG|LDGSTS)\b")  # LDGSTS: into shared memory


class Loop(NamedTuple):
    """Instructions of one round of a loop, for each thread."""

    instructions: int  # all that stand in it
    usual: int  # those of a round that jumps over what is rare
    special: int  # MUFU operations among the usual ones
    loads: int  # 128-bit ones
    stores: int
    narrow: int  # usual accesses to device memory that are narrower


class _Instruction(NamedTuple):
    address: int
    predicate: str
    name: str
    target: int | None  # of a branch

    @property
    def bits(self) -> int | None:
        """Return 128 for a 128-bit access to device memory, 0 for a narrower one, None for all else."""
        return (128 if ".128" in self.name else 0) if _ACCESS.match(self.name) else None


def hot_loops(disassembly: str, *, by_block: bool) -> list[Loop]:
    """Return the hot loops in the order of the code, of a kernel that goes block by block or from tile to tile."""
    code = _code(disassembly)
    loops = [(a, b) for a, b in _loops(code) if by_block or _predicates(code[a : b + 1])]
    innermost = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    if by_block:  # one predicate that guards all is that of a row which counts
        guards = {(a, b): _predicates(code[a : b + 1]) for a, b in innermost}
        innermost = [loop for loop in innermost if "" in guards[loop] or len(guards[loop]) == 1]
    return [_loop(code, *loop) for loop in innermost]


def wide_loads(disassembly: str) -> int:
    """Return how many 128-bit loads from device memory the code has, into registers or shared memory."""
    return sum(i.bits == 128 and i.name.startswith("LDG") for i in _code(disassembly))


def _code(disassembly: str) -> list[_Instruction]:
    def target(name: str, operands: str) -> int | None:
        address = re.search(r"0x([0-9a-f]+)\s*$", operands.strip()) if name.startswith("BRA") else None
        return int(address[1], 16) if address else None

    matches = _LINE.findall(disassembly)
    return [
        _Instruction(int(place, 16), guard, name, target(name, operands)) for place, guard, name, operands in matches
    ]


def _loops(code: list[_Instruction]) -> list[tuple[int, int]]:
    """Return the first and the last instruction of each loop."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    branches = ((place.get(each.target, i), i) for i, each in enumerate(code) if each.target is not None)
    ranges = sorted({(first, last) for first, last in branches if first < last})
    # Loops lie in each other or apart. What begins in one and ends behind it comes back from code for warps that
    # have diverged, which stands behind everything.
    return [(c, d) for c, d in ranges if not any(a < c <= b < d for a, b in ranges)]


def _predicates(body: list[_Instruction]) -> set[str]:
    """Return the predicates that guard the 128-bit accesses, "" for none."""
    return {i.predicate for i in body if i.bits == 128}


def _loop(code: list[_Instruction], first: int, last: int) -> Loop:
    body, usual = code[first : last + 1], _without_detours(code, first, last)
    special, narrow = sum(i.name.startswith("MUFU") for i in usual), sum(i.bits == 0 for i in usual)
    loads, stores = (sum(i.bits == 128 and i.name.startswith(kind) for i in body) for kind in ("LDG", "STG"))
    return Loop(len(body), len(usual), special, loads, stores, narrow)


def _without_detours(code: list[_Instruction], first: int, last: int) -> list[_Instruction]:
    """Return one round that takes each branch forward, unless it would jump over wide accesses."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    usual, i = [], first
    while i <= last:
        instruction = code[i]
        usual.append(instruction)
        i += 1
        if instruction.target is not None and instruction.target > instruction.address:
            landing = place[instruction.target]
            if landing <= last + 1 and not _predicates(code[i:landing]):
                i = landing
    return usual
