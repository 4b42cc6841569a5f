"""Binaries of kernels as lists of instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

from fastunet.inspection.control_flow import Instruction, found_in

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Code:
    """A kernel's registers a thread, bytes of stack, instructions that spill to it or load from it, and all of them."""

    registers: int
    stack: int
    spills: int
    instructions: list[Instruction]


def nvidia(cubins: Sequence[bytes], architecture: int) -> list[Code]:
    """The code of binaries of one kernel each, for a compute capability times ten.

    nvdisasm takes half a second to start, so the kernels' text sections are given to it as one.
    """
    usages, ends = [], [0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "sections", "wb") as sections:
            for cubin in cubins:
                (folder / "cubin").write_bytes(cubin)
                usages.append(_run("cuobjdump", "--dump-resource-usage", "cubin", folder=folder))
                _run("cuobjdump", "--extract-text", "all", "cubin", folder=folder)
                (section,) = folder.glob("*.bin")
                sections.write(section.read_bytes())
                section.unlink()
                ends.append(sections.tell())
        target = f"SM{architecture}{'a' if architecture >= 90 else ''}"
        text = _run("nvdisasm", "--binary", target, "--no-dataflow", "sections", folder=folder)
    lines = [(int(address, 16), line) for address, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text)]
    starts, codes = [address for address, _ in lines], []
    for usage, start, end in zip(usages, ends, ends[1:]):
        registers, stack = map(int, found_in(r"REG:(\d+) STACK:(\d+)", usage).groups())
        instructions = sass(lines[bisect_left(starts, start) : bisect_left(starts, end)])
        spills = sum(i.opcode.startswith(("LDL", "STL")) for i in instructions)
        codes.append(Code(registers, stack, spills, instructions))
    return codes


def sass(lines: Sequence[tuple[int, str]]) -> list[Instruction]:
    """Instructions of their addresses and texts; an address is the label of an instruction to which a branch goes."""
    parts = [found_in(r"^(@!?U?P\w+\s+)?(\S+)\s*(.*)", text).groups() for _, text in lines]
    targets = [_target(opcode, rest) for _, opcode, rest in parts]
    reached, instructions = set(targets), []
    for (address, _), (guard, opcode, rest), target in zip(lines, parts, targets):
        # a branch is conditional by its guard or by a predicate operand: "BRA.U UP0, 0x1230"
        conditional = guard is not None or "P" in rest.partition("0x")[0]
        ends = opcode.startswith(("BRA", "EXIT", "RET", "BRX")) and not conditional
        labels = (f"{address:#x}",) if f"{address:#x}" in reached else ()
        instructions.append(Instruction(address, opcode, labels, target, falls_through=not ends,
                                        text=f"{opcode} {rest}"))  # fmt: skip
    return instructions


def _target(opcode: str, operands: str) -> str | None:
    found = re.search(r"0x[0-9a-f]+$", operands) if opcode.startswith("BRA") else None
    return found and found[0]


def amd(text: str) -> Code:
    """The code of an assembly text for AMD, with instructions on scratch memory as spills."""
    code = text.partition("s_endpgm")[0] + "s_endpgm"
    instructions: list[Instruction] = []
    labels: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels.append(label[1])
        elif found := re.match(r"\t([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|scratch_\w+)\s*([^;]*)", line):
            opcode, operands = found[1], found[2].strip()
            target = operands if opcode.startswith(("s_branch", "s_cbranch")) else None
            ends = opcode in ("s_branch", "s_endpgm")
            instructions.append(Instruction(len(instructions), opcode, tuple(labels), target, falls_through=not ends))
            labels = []
    # registers that the compiler calls spilled but keeps in other registers cost no memory traffic
    spills = sum(i.opcode.startswith("scratch_") for i in instructions)
    registers, scratch = (int(found_in(rf"\.{field}:\s+(\d+)", text)[1])
                          for field in ("vgpr_count", "private_segment_fixed_size"))  # fmt: skip
    return Code(registers, scratch, spills, instructions)


def _run(tool: str, *arguments: str, folder: Path) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout
