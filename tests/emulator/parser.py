"""PTX text to basic blocks of instructions.

Blocks end at labels, branches, ``ret`` and ``bar.sync``, so that threads can be suspended between any two of them.
Grammar: PTX ISA, "Syntax" (statements, labels, guards ``@p``) and "Kernel and Function Directives".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Address:
    """``[base + offset]``, or ``[base, {coordinates}]`` of a tensor map."""

    base: str
    offset: int
    coordinates: list[str] | None


@dataclass(frozen=True)
class Instruction:
    """``guard`` is a predicate register, with "!" in front if negated; an operand in braces is a list."""

    guard: str | None
    opcode: str
    operands: list[str | list[str] | Address]
    text: str
    scope: int

    @property
    def modifiers(self) -> list[str]:
        """The opcode's parts."""
        return self.opcode.split(".")


@dataclass
class Block:
    """``end`` is the branch, ``ret`` or ``bar.sync`` that ends it; None falls through."""

    body: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None
    target: int = -1


@dataclass(frozen=True)
class Kernel:
    """``params`` are (name, type), the type "ptr" for pointers and "map" for tensor maps; ``registers`` name → type."""

    name: str
    params: list[tuple[str, str]]
    registers: dict[str, str]
    blocks: list[Block]
    text: str
    threads: int


def parse(text: str) -> Kernel:
    """The one kernel in a module's text."""
    clean = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.S))
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", clean, flags=re.S)
    threads = int(re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry.group(3)).group(1))
    registers: dict[str, str] = {}
    items: list[tuple[str, int] | Instruction] = []  # labels with their scope, and instructions
    for statement, scope in _statements(clean[entry.end() :]):
        if statement.endswith(":"):
            items.append((statement[:-1], scope))
        elif statement.startswith(".reg"):
            kind, name = re.match(r"\.reg\s+\.(\w+)\s+([%\w]+)(?:<\d+>)?$", statement).groups()
            registers[name] = kind
        else:
            items.append(_instruction(statement, scope))
    return Kernel(entry.group(1), _parameters(entry.group(2)), registers, _blocks(items), text, threads)


def _parameters(text: str) -> list[tuple[str, str]]:
    params = []
    for line in text.split(","):
        words = line.split()
        if ".b8" in words:
            assert "[128]" in words[-1], f"a parameter that is no tensor map: {line}"
            params.append((words[-1].split("[")[0], "map"))
        elif words:
            params.append((words[-1], "ptr" if ".ptr" in words else words[1].lstrip(".")))
    return params


def _statements(text: str) -> Iterator[tuple[str, int]]:
    """Statements and labels (with their colon) up to the kernel's closing brace, each with the number of its scope."""
    scopes, count, position = [0], 0, 0
    token = re.compile(r"\s*(?:([{}])|([\w$]+:)|(\.(?:loc|pragma|section)[^\n]*\n)|([^;{}]*(?:\{[^;]*?\}[^;]*?)*);)")
    while match := token.match(text, position):
        position = match.end()
        brace, label, _, statement = match.groups()
        if brace == "{":
            count += 1
            scopes.append(count)
        elif brace == "}":
            if len(scopes) == 1:
                return
            scopes.pop()
        elif label:
            yield label, scopes[-1]
        elif statement and statement.strip():
            yield " ".join(statement.split()), scopes[-1]
    raise ValueError(f"no PTX statement: {text[position : position + 80]!r}")


def _instruction(statement: str, scope: int) -> Instruction:
    guard, body = None, statement
    if match := re.match(r"@(!?)([%\w]+)\s+(.*)$", body):
        guard, body = match.group(1) + match.group(2), match.group(3)
    opcode, _, rest = body.partition(" ")
    return Instruction(guard, opcode, [_operand(part) for part in _split(rest)], statement, scope)


def _split(text: str) -> list[str]:
    """Operands at the commas outside of all brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def _operand(text: str) -> str | list[str] | Address:
    if text.startswith("{"):
        return [part.strip() for part in text[1:-1].split(",")]
    if not text.startswith("["):
        return text
    inner, coordinates = text[1:-1].strip(), None
    if match := re.match(r"^(.*?),\s*\{(.*)\}$", inner):
        inner, coordinates = match.group(1).strip(), [c.strip() for c in match.group(2).split(",")]
    base, offset = re.match(r"^([^\s+]+)\s*(?:\+\s*(-?\w+))?$", inner).groups()
    return Address(base, int(offset or "0", 0), coordinates)


def _blocks(items: list[tuple[str, int] | Instruction]) -> list[Block]:
    blocks = [Block()]
    labels: dict[tuple[str, int], int] = {}
    for item in items:
        if isinstance(item, tuple):
            if blocks[-1].body or blocks[-1].end:
                blocks.append(Block())
            labels[item] = len(blocks) - 1
        elif item.modifiers[0] in ("bra", "ret", "exit") or item.opcode.startswith(("bar.sync", "barrier.sync")):
            blocks[-1].end = item
            blocks.append(Block())
        else:
            blocks[-1].body.append(item)
    for block in blocks:
        if block.end is not None and block.end.modifiers[0] == "bra":
            name = block.end.operands[0]
            block.target = labels.get((name, block.end.scope), labels.get((name, 0), -1))
            if block.target < 0:
                raise ValueError(f"no such label: {block.end.text}")
    return blocks
