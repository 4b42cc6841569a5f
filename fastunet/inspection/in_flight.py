"""Registers of a Hopper product in flight that another instruction touches: undefined, and silent.

``wgmma`` runs on while its warps do. Until a wait for its group, nobody may touch its accumulators nor write the
registers of a left operand that is not in shared memory (PTX ISA, ``wgmma.wait_group``). Triton before 3.8 can emit
such code (triton#9433), and ptxas before 13.3 may assemble it as it stands. :func:`touched` finds it in PTX and in
SASS, by what may be in flight at each instruction on any path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastunet.inspection.control_flow import Instruction, basic_blocks, block_successors, found_in

_MOST_GROUPS = 32
"""Groups told apart at a time; older ones are taken together."""

_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Group:
    """Products that are waited for together: their accumulators, and their operands in registers."""

    sums: frozenset[str] = _NOTHING
    operands: frozenset[str] = _NOTHING

    def __or__(self, other: _Group) -> _Group:
        return _Group(self.sums | other.sums, self.operands | other.operands)


_State = tuple[_Group, ...]
"""Groups that may be in flight, oldest first; the last one is still open."""


@dataclass(frozen=True)
class _Effect:
    """What an instruction does: products it starts, whether it closes their group, how many groups it leaves in flight
    (None: all), and the registers that it reads and writes as any other instruction."""

    started: _Group | None = None
    closes: bool = False
    leaves: int | None = None
    read: frozenset[str] = _NOTHING
    written: frozenset[str] = _NOTHING


def touched(instructions: list[Instruction], dialect: str) -> list[str]:
    """The instructions, of "ptx" or "sass", that touch a register of a product that may be in flight, in order."""
    effect_of = {"ptx": _ptx_effect, "sass": _sass_effect}[dialect]
    effects = {i.address: effect_of(i.text) for i in instructions}
    if not any(effect.started for effect in effects.values()):
        return []
    blocks = basic_blocks(instructions)
    followers = block_successors(blocks)
    entering: list[_State | None] = [None] * len(blocks)
    entering[0] = (_Group(),)
    pending, found = [0], set()
    while pending:
        index = pending.pop()
        state = entering[index] or ()
        for instruction in blocks[index]:
            effect = effects[instruction.address]
            flying = _Group()
            for group in state:
                flying |= group
            if (effect.read | effect.written) & flying.sums or effect.written & flying.operands:
                found.add(instruction.address)
            state = _after(state, effect)
        for follower in followers[index]:
            joined = _joined(entering[follower], state)
            if joined != entering[follower]:
                entering[follower] = joined
                pending.append(follower)
    return [i.text for i in instructions if i.address in found]


def _after(state: _State, effect: _Effect) -> _State:
    if effect.leaves is not None:
        *closed, opened = state
        state = (*closed[max(0, len(closed) - effect.leaves) :], opened)
    if effect.started:
        state = (*state[:-1], state[-1] | effect.started)
    if effect.closes:
        state = (*state, _Group())
        if len(state) > _MOST_GROUPS:
            state = (state[0] | state[1], *state[2:])
    return state


def _joined(known: _State | None, other: _State) -> _State:
    """What may be in flight where two paths meet, by the age of the groups."""
    if known is None:
        return other
    length = max(len(known), len(other))
    padded = ((_Group(),) * (length - len(state)) + state for state in (known, other))
    return tuple(a | b for a, b in zip(*padded))


def parse_ptx(text: str) -> list[Instruction]:
    """The instructions of a PTX text with one kernel.

    Labels of inline assembly are local to their braces and occur again; a branch there goes back to the last one.
    """
    instructions: list[Instruction] = []
    labels: list[str] = []
    local: dict[str, str] = {}
    for line in text.partition(".entry")[2].partition("{")[2].splitlines():
        line = line.partition("//")[0].strip()
        if label := re.match(r"([$\w]+):", line):
            local[label[1]] = label[1] if label[1].startswith("$") else f"{label[1]} {len(instructions)}"
            labels.append(local[label[1]])
        for part in re.sub(r"^([$\w]+:|\{(?!.*\}.*;))", "", line).split(";"):
            found = re.match(r"\s*(@!?%?\w+\s+)?([a-z][\w.:]*)\s*(.*)", part)
            if not found:
                continue
            guard, opcode, rest = found.groups()
            branch = rest.split()[-1] if opcode.startswith("bra") else None
            branch = branch and local.get(branch, branch)
            ends = guard is None and opcode.startswith(("bra", "ret", "exit", "trap"))
            address = len(instructions)
            statement = f"{opcode} {rest}"
            instructions.append(Instruction(address, opcode, tuple(labels), branch, not ends, statement))
            labels = []
    return instructions


def _ptx_effect(text: str) -> _Effect:
    opcode, _, rest = text.partition(" ")
    if opcode.startswith("wgmma.mma_async"):
        sums, operand = found_in(r"^\{([^}]*)\}\s*,\s*(\{[^}]*\})?", rest).groups()
        return _Effect(started=_Group(_registers(sums), _registers(operand or "")))
    if opcode.startswith("wgmma"):
        leaves = int(rest) if "wait_group" in opcode else None
        return _Effect(closes="commit_group" in opcode, leaves=leaves)
    if opcode.startswith(("st.", "stmatrix", "cp.", "mbarrier", "red.", "bra")):
        return _Effect(read=_registers(rest))
    target = found_in(r"^(\{[^}]*\}|[^,]*)", rest)[0]
    return _Effect(read=_registers(rest[len(target) :]), written=_registers(target))


def _registers(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"%[a-z]+\d+", text))


_SASS_WITHOUT_TARGET = ("ST", "WARP", "BAR", "BRA", "BRX", "RED", "LDGSTS", "DEPBAR", "LDGDEPBAR", "EXIT", "RET",
                        "CALL", "SYNCS", "UTMA", "ISETP", "FSETP", "DSETP", "HSETP", "MEMBAR", "CCTL",
                        "NANOSLEEP")  # fmt: skip


def _sass_effect(text: str) -> _Effect:
    """The accumulators of SASS are left out: ptxas orders their uses itself, and may not the operands'."""
    opcode, _, rest = text.partition(" ")
    if opcode.startswith("HGMMA"):
        operand = re.match(r"R\d+, R(\d+),", rest)  # else a descriptor in uniform registers
        operands = _range(int(operand[1]), 4) if operand else _NOTHING
        return _Effect(started=_Group(operands=operands), closes="gsb0" in rest)
    if wait := re.match(r"gsb0, (0x[0-9a-f]+)", rest):
        return _Effect(leaves=int(wait[1], 16))
    target = re.match(r"(?:P\w+, )*R(\d+)\b", rest)
    if target is None or opcode.startswith(_SASS_WITHOUT_TARGET):
        return _Effect()
    count = 4 if ".128" in opcode or opcode.startswith(("LDSM", "HMMA")) else 1
    if ".64" in opcode or "WIDE" in opcode or opcode == "CS2R":
        count = 2
    return _Effect(written=_range(int(target[1]), count))


def _range(first: int, count: int) -> frozenset[str]:
    return frozenset(f"R{first + i}" for i in range(count))
