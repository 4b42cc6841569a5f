"""A launch: all programs of a grid under every schedule, on memory that holds the launch's tensors and no more."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .bulk_copies import TensorMap
from .compiler import Program
from .global_memory import Fault, GlobalMemory
from .machine import Machine, Schedule

EAGER = Schedule(reverse=True, leader=17)
LAZY = Schedule(lazy=True, detect=True)
THREADS_AT_ONCE = 4096
"""Programs of so many threads run side by side."""

_RANGES = {"u8": (-128, 256), "u16": (-1 << 15, 1 << 16), "u32": (-1 << 31, 1 << 32), "u64": (-1 << 63, 1 << 64)}


@dataclass
class Record:
    """What one launch did under one schedule."""

    kernel: str
    grid: tuple[int, int, int]
    programs: int
    counts: Counter[str]
    seconds: float


@dataclass
class Emulator:
    """Every launch runs under all ``schedules``, which must leave the same bytes.

    ``only(grid)`` may name the programs of a launch that run, where all would be too many. ``operands`` are the tensors
    of a repeated launch, which passes addresses alone.
    """

    schedules: tuple[Schedule, ...] = (EAGER, LAZY)
    only: Callable[[tuple[int, int, int]], list[tuple[int, int, int]]] | None = None
    records: list[Record] = field(default_factory=list)
    operands: tuple[list[torch.Tensor], ...] = ()

    def run(self, program: Program, grid: tuple[int, int, int], arguments: list[Any], num_warps: int,
            shared: int) -> None:  # fmt: skip
        """Raises Fault, which names the kernel, its program and the instruction."""
        kernel = program.kernel
        if len(arguments) != len(kernel.params) or kernel.threads != 32 * num_warps:
            raise Fault(f"{kernel.name}: {len(arguments)} arguments and {num_warps} warps for {len(kernel.params)} "
                        f"parameters and {kernel.threads} threads")  # fmt: skip
        if not (grid[0] < 1 << 31 and grid[1] < 1 << 16 and grid[2] < 1 << 16):
            raise Fault(f"{kernel.name}: a grid of {grid}")
        ranges, parameters = [], []
        for (name, kind), value in zip(kernel.params, arguments):
            label = name.removeprefix(kernel.name + "_")
            parameters.append(_parameter(kernel.name, label, kind, value))
            if kind == "map":
                ranges.append((value.base, value.end, label))
            elif kind == "ptr" and isinstance(value, torch.Tensor):
                ranges += [(*_extent(value), label)] if value.numel() else []
            elif kind == "ptr" and value:
                ranges.append((*self._owner(value), label))
        memory = GlobalMemory(ranges)
        programs = self.only(grid) if self.only else [
            (x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]  # fmt: skip
        before = [tensor.copy() for tensor in memory.tensors()] if len(self.schedules) > 1 else []
        first: list = []
        for schedule in self.schedules:
            for tensor, old in zip(memory.tensors(), before if first else []):
                tensor[:] = old
            self._execute(program, memory, parameters, programs, grid, shared, schedule)
            if first:
                _compare(kernel.name, schedule, memory, first)
            elif len(self.schedules) > 1:
                first = [tensor.copy() for tensor in memory.tensors()]

    def _owner(self, address: int) -> tuple[int, int]:
        """From ``address`` to the end of the storage that holds it, among the operands of a repeated launch."""
        for tensor in (tensor for operands in self.operands for tensor in operands):
            first, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            if first <= address < first + size:
                return address, first + size
        raise Fault(f"pointer {address:#x} belongs to no operand of a repeated launch")

    def _execute(self, program, memory, parameters, programs, grid, shared, schedule) -> None:
        started, counts = time.perf_counter(), Counter()
        memory.forget(schedule.detect)
        order = programs[::-1] if schedule.reverse else programs
        at_once = max(1, THREADS_AT_ONCE // program.kernel.threads)
        for i in range(0, len(order), at_once):
            machine = Machine(program, memory, parameters, order[i : i + at_once], grid, shared, schedule)
            try:
                machine.run()
            except Fault as fault:
                raise Fault(f"{program.kernel.name}, programs {order[i]} to {order[min(i + at_once, len(order)) - 1]} "
                            f"of {grid}, {schedule}: {fault}") from None  # fmt: skip
            counts.update(machine.counts)
        self.records.append(Record(program.kernel.name, grid, len(order), counts, time.perf_counter() - started))


def _compare(name: str, schedule: Schedule, memory: GlobalMemory, first: list) -> None:
    for now, before, label in zip(memory.tensors(), first, memory.names):
        other = now != before
        if other.any():
            raise Fault(f"{name}: other bytes in {label} under {schedule} than under the first schedule: "
                        f"{int(other.sum())} of {len(now)}, first {int(other.argmax())}")  # fmt: skip


def _parameter(kernel: str, label: str, kind: str, value: Any) -> Any:
    """The value that a parameter of type ``kind`` holds."""
    if kind == "map":
        right = isinstance(value, TensorMap)
    elif isinstance(value, torch.Tensor):
        right, value = kind == "ptr", value.data_ptr()
    elif isinstance(value, float):
        right = kind == "f32"
    elif kind == "ptr":
        right, value = value is None or isinstance(value, int), int(value or 0)
    else:
        low, high = _RANGES.get(kind, (0, 0))
        right, value = isinstance(value, int) and low <= value < high, int(value)
    if not right:
        raise Fault(f"{kernel}: {label}, of type {kind}, is {value!r}")
    return value


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address and the one behind the last element."""
    last = sum((s - 1) * t for s, t in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
