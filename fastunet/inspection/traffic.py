"""Bytes and operations of a recorded launch, counted from its own tiling: halos read again and padding included.

A kernel's Triton IR has straight scalar arithmetic around its tiles: which loops run how often follows from the
launch's integers and the program index alone. :func:`count` evaluates that arithmetic for all programs at once and adds
up what every load, store and product asks for. Masked and out-of-range elements count as if they were there, so the
result is what the tiles move between the cache and the multiprocessors, to be held against the operator's floor.

A product's tile may be smaller than one instruction of each warp together (16 × 16 for 2 × 2 warps of 16 × 8): then
warps compute the same. Only the GPU's own IR tells, whose layouts are chosen behind the Triton IR.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from triton.tools.tensor_descriptor import TensorDescriptor

from fastunet.inspection.control_flow import found_in
from fastunet.kernels._launch import Launch

_SIZES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "f8E4M3FN": 1, "f8E5M2": 1,
          "i64": 8, "i32": 4, "i16": 2, "i8": 1, "i1": 1}  # fmt: skip

_BINARY: dict[str, Callable[..., Any]] = {
    "addi": np.add, "subi": np.subtract, "muli": np.multiply,
    "divsi": lambda a, b: np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)),
    "remsi": np.fmod, "divui": np.floor_divide, "remui": np.mod,
    "minsi": np.minimum, "maxsi": np.maximum, "minui": np.minimum, "maxui": np.maximum,
    "andi": np.bitwise_and, "ori": np.bitwise_or, "xori": np.bitwise_xor,
    "shli": np.left_shift, "shrsi": np.right_shift, "shrui": np.right_shift,
    "addf": np.add, "subf": np.subtract, "mulf": np.multiply, "maxnumf": np.fmax, "minnumf": np.fmin,
}  # fmt: skip
_COMPARE = {"eq": np.equal, "ne": np.not_equal, "slt": np.less, "sle": np.less_equal, "sgt": np.greater,
            "sge": np.greater_equal, "ult": np.less, "ule": np.less_equal, "ugt": np.greater,
            "uge": np.greater_equal}  # fmt: skip


@dataclass(frozen=True)
class Traffic:
    """What one launch asks for in all: bytes read and written, and floating-point operations of its products."""

    read: int
    written: int
    flop: int

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def count(launch: Launch, ttir: str, ttgir: str = "") -> Traffic:
    """The traffic of ``launch``, whose kernel has the Triton IR ``ttir`` (``compiled.asm["ttir"]``).

    With ``ttgir`` (``compiled.asm["ttgir"]``) a product counts once for each warp that computes it, else once.

    Raises:
        ValueError: a loop's length or a branch depends on loaded data or on a value carried around a loop, or products
            of one shape are computed once here and several times there.
    """
    return _Counter(launch, ttir, _repeats(ttgir)).run(_tree(ttir.splitlines()))


_LAYOUT = r"(#\w+) = #ttg\.nvidia_mma<.*warpsPerCTA = \[(.*?)\].*instrShape = \[(.*?)\]"


def _repeats(ttgir: str) -> dict[str, int]:
    """How many warps compute the same element of a product, by the product's shape ("16x16")."""
    steps = {name: [w * i for w, i in zip(_integers(warps), _integers(instruction))]
             for name, warps, instruction in re.findall(_LAYOUT, ttgir)}  # fmt: skip
    found: dict[str, int] = {}
    for shape, layout in re.findall(r"\b(?:tt\.dot|ttng\.warp_group_dot) .*-> tensor<([\dx]+)xf32, (#\w+)>", ttgir):
        sides = _integers(shape)
        warps = math.prod(max(1, step // side) for step, side in zip(steps.get(layout, sides), sides))
        if found.setdefault(shape, warps) != warps:
            raise ValueError(f"products of {shape} are computed by {found[shape]} and by {warps} warps")
    return found


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


class _UnknownError(ValueError):
    """A count needs a value that was not evaluated."""


@dataclass
class _Region:
    """A line of IR and, if it opens them, its regions: the body of a loop, or both branches of an if."""

    line: str
    bodies: list[list[_Region]]


def _tree(lines: list[str]) -> list[_Region]:
    """The function's statements as a tree."""
    start = next(i for i, line in enumerate(lines) if "tt.func public" in line)
    root: list[_Region] = []
    stack = [root]
    for line in lines[start + 1 :]:
        text = re.sub(r"\s+loc\(.*", "", line).strip()
        if text.startswith("} else"):
            stack.pop()
            stack[-1][-1].bodies.append([])
            stack.append(stack[-1][-1].bodies[-1])
        elif text.startswith("}"):
            stack.pop()
            if not stack:
                break
        elif text.endswith("{"):
            stack[-1].append(_Region(text, [[]]))
            stack.append(stack[-1][-1].bodies[0])
        elif text:
            stack[-1].append(_Region(text, []))
    return root


class _Counter:
    """Runs the scalar arithmetic for all programs of a grid side by side: values are arrays over the programs."""

    def __init__(self, launch: Launch, ttir: str, repeats: dict[str, int]):
        grid = (*launch.grid, 1, 1)[:3]
        index = np.arange(math.prod(grid), dtype=np.int64)
        self.programs = dict(x=index % grid[0], y=index // grid[0] % grid[1], z=index // (grid[0] * grid[1]))
        self.grid = dict(zip("xyz", grid))
        self.values: dict[str, Any] = {}
        self.repeats = repeats
        for name, value in launch.args.items():
            self.values |= _parameters(name, value, ttir)
        self.read = self.written = self.flop = 0
        self.ones = np.ones(len(index), np.int64)

    def run(self, statements: list[_Region]) -> Traffic:
        self.block(statements, self.ones)
        return Traffic(self.read, self.written, self.flop)

    def block(self, statements: list[_Region], times: np.ndarray) -> None:
        """Counts ``statements``, which each program executes ``times`` times."""
        for statement in statements:
            if "scf.for" in statement.line:
                self.loop(statement, times)
            elif "scf.if" in statement.line:
                self.branch(statement, times)
            elif "scf.while" in statement.line:
                raise ValueError(f"cannot count a loop of unknown length: {statement.line}")
            elif not self.memory(statement.line, int(times.sum())):
                self.scalar(statement.line)

    def loop(self, statement: _Region, times: np.ndarray) -> None:
        pattern = r"scf\.for (%\S+) = (%\S+) to (%\S+) step (%\S+)"
        variable, *bounds = found_in(pattern, statement.line).groups()
        first, last, step = (self.need(b, statement) for b in bounds)
        trips = np.maximum(0, -((first - last) // step)) * self.ones
        self.forget(statement.line)
        before = self.read, self.written, self.flop
        try:
            self.values.pop(variable, None)
            self.block(statement.bodies[0], times * trips)
        except _UnknownError:
            self.read, self.written, self.flop = before
            for trip in range(int(trips.max(initial=0))):
                self.values[variable] = first + trip * step
                self.block(statement.bodies[0], times * (trip < trips))

    def branch(self, statement: _Region, times: np.ndarray) -> None:
        condition = self.need(found_in(r"scf\.if (%\S+)", statement.line)[1], statement)
        for body, taken in zip(statement.bodies, (condition != 0, condition == 0)):
            self.block(body, times * taken)
        self.forget(statement.line)

    def memory(self, line: str, times: int) -> bool:
        """Adds a load, a store or a product that runs ``times`` times over all programs; False for other lines."""
        if re.search(r"tt\.(load|descriptor_load|descriptor_gather)\b", line):
            self.read += times * _bytes(line)
        elif re.match(r"tt\.(store|descriptor_store|descriptor_scatter|descriptor_reduce)\b", line):
            self.written += times * _bytes(line)
        elif dot := re.search(r"tt\.dot\b.*: tensor<([\dx]+)x\w+> \* tensor<[\dx]+x\w+> -> tensor<([\dx]+)xf32>", line):
            inner = int(dot[1].split("x")[-1])
            self.flop += times * 2 * inner * math.prod(_integers(dot[2])) * self.repeats.get(dot[2], 1)
        else:
            return False
        self.forget(line)
        return True

    def scalar(self, line: str) -> None:
        """Evaluates a line of scalar arithmetic of integers and float32; other lines leave their result unknown."""
        assignment = re.match(r"(%\S+) = (?:arith|tt)\.(\w+) (.*)", line)
        if not assignment or re.search(r"tensor<|!tt\.ptr|\bb?f(16|64)\b", line):
            return self.forget(line)
        result, operation, rest = assignment.groups()
        operands: list[Any] = [self.values.get(name) for name in re.findall(r"%[\w#.$-]+", rest)]
        self.values.pop(result, None)
        if operation == "constant":
            self.values[result] = _constant(rest)
        elif operation in ("get_program_id", "get_num_programs"):
            self.values[result] = (self.programs if operation == "get_program_id" else self.grid)[rest[0]]
        elif any(operand is None for operand in operands):
            return None
        elif operation in _BINARY:
            self.values[result] = _BINARY[operation](*operands)
        elif operation == "cmpi":
            self.values[result] = _COMPARE[rest.partition(",")[0]](*operands).astype(np.int64)
        elif operation == "select":
            self.values[result] = np.where(operands[0] != 0, operands[1], operands[2])
        elif operation in ("extsi", "extui", "trunci", "index_cast"):
            self.values[result] = operands[0]
        elif operation in ("sitofp", "fptosi"):
            self.values[result] = np.asarray(operands[0]).astype(np.float32 if operation == "sitofp" else np.int64)
        return None

    def need(self, name: str, statement: _Region) -> Any:
        if name in self.values:
            return self.values[name]
        if name.startswith("%"):
            raise _UnknownError(f"cannot count, since {name} is unknown in: {statement.line}")
        return np.int64(name)

    def forget(self, line: str) -> None:
        """Drops what was known of the names that ``line`` assigns."""
        if assigned := re.match(r"(%[\w.$-]+)(?::\d+)? = ", line):
            self.values.pop(assigned[1], None)


def _constant(text: str) -> Any:
    """The value of a constant, as in ``-2 : i32``, ``true`` or ``0x7F800000 : f32``."""
    word = text.split(" ")[0]
    if ": f32" in text:
        return np.uint32(int(word, 16)).view(np.float32) if word.startswith("0x") else np.float32(word)
    value = {"true": 1, "false": 0}.get(word)
    return np.int64(int(word) if value is None else value)


def _parameters(name: str, value: Any, ttir: str) -> dict[str, Any]:
    """The IR's names and values of an argument that is a number or a tuple of integers, or of a descriptor's shape.

    A tuple's elements are ``%name.0``, ``%name.1``, … in Triton 3.9. In 3.6 they are numbered at will and told by their
    location, and those that are 1 are missing, since they were compiled in.
    """
    if isinstance(value, int):
        return {f"%{name}": np.int64(value)}
    if isinstance(value, float):
        return {f"%{name}": np.float32(value)}
    if isinstance(value, TensorDescriptor):
        names = re.findall(rf'(%[\w.]+): i32 [^(]*?loc\("{name}(?:\.shape\.\d)?"', ttir)
        return {key: np.int64(side) for key, side in zip(names, value.shape)}
    if not isinstance(value, tuple):
        return {}
    names = re.findall(rf'(%[\w.]+): i\d+ [^(]*?loc\("{name}"', ttir)
    if names:
        present = value if len(names) == len(value) else [element for element in value if element != 1]
        return {key: np.int64(element) for key, element in zip(names, present, strict=True)}
    return {f"%{name}.{i}": np.int64(element) for i, element in enumerate(value)}


def _bytes(line: str) -> int:
    """Bytes of the tile that a load or store line moves."""
    kind = re.findall(r"tensor<([^<>]*(?:<[^<>]*>)?[^<>]*)>|!tt\.ptr<(\w+)>", line)
    tile, scalar = kind[-1]
    if scalar:
        return _SIZES[scalar]
    *sides, element = re.sub(r"!tt\.ptr<(\w+)>", r"\1", tile).split("x")
    return math.prod(map(int, sides)) * _SIZES[element]
