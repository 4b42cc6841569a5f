"""Loops of a list of machine instructions: basic blocks, dominators and natural loops.

The textbook construction (Aho, Lam, Sethi, Ullman, "Compilers", 9.6). Labels' positions alone would not do: compilers
move waiting loops behind the end of a kernel, and their way back looks like a loop around everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction: the ``labels`` before it, the label it may branch to, and whether the next one may follow.

    ``text`` is the whole instruction, its guard excepted.
    """

    address: int
    opcode: str
    labels: tuple[str, ...]
    branch: str | None
    falls_through: bool
    text: str = ""


def innermost_loops(instructions: list[Instruction], marked: Iterable[int]) -> list[list[Instruction]]:
    """The innermost loops around the instructions whose addresses are ``marked``, each as its instructions in order.

    A marked instruction outside of every loop contributes nothing.
    """
    blocks = basic_blocks(instructions)
    loops = _natural_loops(block_successors(blocks))
    home = {i.address: index for index, block in enumerate(blocks) for i in block}
    chosen = set()
    for address in marked:
        around = [loop for loop in loops if home[address] in loop]
        if around:
            chosen.add(min(around, key=len))
    return [[i for index in sorted(loop) for i in blocks[index]] for loop in sorted(chosen, key=min)]


def basic_blocks(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Runs of instructions that are entered at their first one and left after their last one only."""
    blocks: list[list[Instruction]] = []
    for previous, instruction in zip([None, *instructions], instructions):
        if previous is None or instruction.labels or previous.branch or not previous.falls_through:
            blocks.append([])
        blocks[-1].append(instruction)
    return blocks


def block_successors(blocks: list[list[Instruction]]) -> list[list[int]]:
    """The blocks that may follow each block."""
    place = {label: index for index, block in enumerate(blocks) for label in block[0].labels}
    result = []
    for index, block in enumerate(blocks):
        last = block[-1]
        following = [index + 1] if last.falls_through and index + 1 < len(blocks) else []
        result.append(following + ([place[last.branch]] if last.branch in place else []))
    return result


def _natural_loops(successors: list[list[int]]) -> list[frozenset[int]]:
    """Blocks of each loop; loops that share their header are one."""
    predecessors: list[list[int]] = [[] for _ in successors]
    for block, following in enumerate(successors):
        for successor in following:
            predecessors[successor].append(block)
    dominators = _dominators(predecessors)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for header in following:
            if header in dominators[block]:
                bodies.setdefault(header, {header}).update(_reaching(block, header, predecessors))
    return [frozenset(body) for body in bodies.values()]


def _dominators(predecessors: list[list[int]]) -> list[set[int]]:
    """Blocks through which every path from the entry passes; unreachable blocks keep the full set."""
    everything = set(range(len(predecessors)))
    result = [{0}] + [set(everything) for _ in predecessors[1:]]
    changed = True
    while changed:
        changed = False
        for block in range(1, len(predecessors)):
            before = [result[p] for p in predecessors[block]]
            updated = {block} | (set.intersection(*before) if before else everything)
            if updated != result[block]:
                result[block], changed = updated, True
    return result


def _reaching(block: int, header: int, predecessors: list[list[int]]) -> set[int]:
    """Blocks from which ``block`` is reached without passing ``header``."""
    found, pending = {header}, [block]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending += predecessors[current]
    return found


def found_in(pattern: str, text: str) -> re.Match[str]:
    """The first match in a compiler's output; ``ValueError`` where it is written in another way than is known here."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"cannot read {text[:80]!r}: expected {pattern}")
    return match
