"""Blocks of a kernel to Python functions, made once: every register is an array over all threads, every instruction a
line or two of NumPy.

The families of instructions (arithmetic.py, moves.py, …) register here what emits the lines of an opcode
(:func:`instruction`) and what these lines call (:func:`runtime`). An opcode that none registered is an error.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from types import CodeType
from typing import Any

import numpy as np

from . import numbers
from .numbers import U32, U64, UNSIGNED
from .parser import Address, Instruction, Kernel
from .shared_memory import SHARED_BASE

PARAMETER_SPACE = 0x7000_0000
"""Address of the first parameter, one "byte" each; fits the 32-bit addresses of Triton 3.9."""

SPECIAL = {"%tid.x": "M.tid", "%laneid": "M.laneid", "%ntid.x": "M.ntid",
           **{f"%{name}.{axis}": f"M.{name}[{i}]" for name in ("ctaid", "nctaid") for i, axis in enumerate("xyz")},
           }  # fmt: skip
"""PTX ISA, "Special Registers"."""

_EMITTERS: dict[str, Callable[[Emission], list[str]]] = {}
_RUNTIME: dict[str, Any] = {"np": np, **{k: v for k, v in vars(numbers).items() if not k.startswith("__")}}


def instruction(*opcodes: str):
    """Registers what emits the code of all instructions that begin with one of ``opcodes``; the longest wins."""

    def register(emitter):
        _EMITTERS.update(dict.fromkeys(opcodes, emitter))
        return emitter

    return register


def runtime(function):
    """Makes ``function`` known to the generated code."""
    _RUNTIME[function.__name__] = function
    return function


def bits_of(kind: str) -> int:
    """Width of a PTX type such as "u32", "bf16" or "f16x2" (of one element)."""
    return int(re.sub(r"^\D*", "", kind.split("x")[0]))


@functools.lru_cache(4096)
def _code(text: str, name: str) -> CodeType:
    """Python's code of a block, which several programs of one kernel share: one that has lost a statement, say."""
    return compile(text, name, "exec")


class Program:
    """A kernel's blocks as functions ``f(R, M, m)`` of registers, machine and mask of active threads (None: all)."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.slots: dict[str, int] = {}
        self.bits: dict[str, int] = {}
        self.constants: list[Any] = []
        self.functions: dict[tuple[int, bool], Callable] = {}
        self.params = {name: i for i, (name, _) in enumerate(kernel.params)}

    def function(self, block: int, masked: bool) -> Callable:
        key = block, masked
        if key not in self.functions:
            lines = ["def block(R, M, m):", " T = M.threads"]
            for ins in self.kernel.blocks[block].body:
                lines += [" " + line for line in Emission(self, ins, masked).lines() if line]
            scope = dict(_RUNTIME, C=self.constants)
            exec(_code("\n".join(lines), f"<{self.kernel.name} block {block}>"), scope)
            self.functions[key] = scope["block"]
        return self.functions[key]

    def kind(self, name: str) -> str | None:
        """The type of a register; None if it is none."""
        if name in self.kernel.registers:
            return self.kernel.registers[name]
        match = re.match(r"(%[a-z]+)\d+$", name)
        return self.kernel.registers.get(match.group(1)) if match else None

    def slot(self, name: str) -> int:
        if name not in self.slots:
            self.slots[name] = len(self.slots)
            kind = self.kind(name)
            self.bits[name] = 1 if kind == "pred" else bits_of(kind)
        return self.slots[name]

    def constant(self, value: Any) -> str:
        self.constants.append(value)
        return f"C[{len(self.constants) - 1}]"

    def predicate(self, operand: str) -> str:
        name = operand.lstrip("!")
        value = f"R[{self.slot(name)}]" if self.kind(name) else self.constant(int(name, 0) != 0)
        return f"~{value}" if operand.startswith("!") else value


class Emission:
    """One instruction, in a function for all threads or for a mask ``m`` of them."""

    def __init__(self, program: Program, ins: Instruction, masked: bool):
        self.program, self.ins, self.masked = program, ins, masked
        self.op, self.ops, self.text = ins.modifiers, ins.operands, ins.text
        self.conditions = [f"({program.predicate(ins.guard)})"] if ins.guard else []
        if masked:
            self.conditions.append("m")

    def lines(self) -> list[str]:
        for length in range(len(self.op), 0, -1):
            if emitter := _EMITTERS.get(".".join(self.op[:length])):
                return emitter(self)
        raise self.unknown()

    def unknown(self) -> NotImplementedError:
        return NotImplementedError(f"the emulator does not know this instruction: {self.text}")

    def need(self, condition: bool) -> None:
        """Of an opcode with modifiers that are not implemented."""
        if not condition:
            raise self.unknown()

    @property
    def active(self) -> str:
        """The mask of threads that execute it, or "None"."""
        return " & ".join(self.conditions) or "None"

    @property
    def what(self) -> str:
        return self.program.constant(self.text)

    def put(self, name: str, expression: str) -> list[str]:
        """Assigns to a register."""
        if name == "_":
            return []
        slot, bits = self.program.slot(name), self.program.bits[name]
        kind = "bool" if bits == 1 else f"U{bits}"
        if self.conditions:
            return [f"R[{slot}] = put({self.active}, {expression}, R[{slot}], {kind})"]
        return [f"R[{slot}] = fit({expression}, {kind}, T)"]

    def put_all(self, names: list[str], variable: str) -> list[str]:
        return [line for i, name in enumerate(names) for line in self.put(name, f"{variable}[{i}]")]

    def value(self, operand: str, bits: int) -> str:
        """An operand as unsigned, an array or a scalar, of ``bits``; wider registers are truncated."""
        program = self.program
        if program.kind(operand):
            slot = program.slot(operand)
            have = program.bits[operand]
            if have < bits:
                raise self.unknown()
            return f"R[{slot}]" if have == bits else f"R[{slot}].astype(U{bits})"
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand[:2] in ("0f", "0F"):
            return program.constant(U32(int(operand[2:], 16)))
        if operand[:2] in ("0d", "0D"):
            return program.constant(U64(int(operand[2:], 16)))
        if operand == "global_smem":
            return program.constant(UNSIGNED[bits](SHARED_BASE))
        if operand in program.params:
            return program.constant(UNSIGNED[bits](PARAMETER_SPACE + program.params[operand]))
        return program.constant(UNSIGNED[bits](int(operand.rstrip("U"), 0) & ((1 << bits) - 1)))

    def values(self, operands: list[str], bits: int) -> str:
        return "[" + ", ".join(self.full(operand, bits) for operand in operands) + "]"

    def full(self, operand: str, bits: int) -> str:
        """The same, always an array."""
        return f"full({self.value(operand, bits)}, T)"

    def typed(self, operand: str, kind: str) -> str:
        """An operand as PTX type ``kind``; bf16 and f16 widened to float32."""
        if kind == "pred":
            return self.program.predicate(operand)
        bits = bits_of(kind)
        value = self.value(operand, bits)
        if kind == "bf16":
            return f"from_bf16({value})"
        if kind == "f16":
            return f"{value}.view(F16).astype(F32)"
        return f"{value}.view({kind[0].replace('s', 'I').upper()}{bits})" if kind[0] in "sf" else value

    def address(self, operand: Address, bits: int) -> str:
        """Base plus offset, for every thread."""
        offset = self.program.constant(UNSIGNED[bits](operand.offset & ((1 << bits) - 1)))
        return f"full({self.value(operand.base, bits)} + {offset}, T)"
