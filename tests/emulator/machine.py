"""Runs programs of a kernel side by side: threads, control flow and ``bar.sync``.

Threads that are at the same block form a group. The group furthest behind runs first, so that threads that diverged
meet again (PTX ISA, "SIMT", leaves the order open). One group of all threads is the common case and needs no mask.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from . import arithmetic, barriers, bulk_copies, moves, tensor_core, warps, wgmma  # noqa: F401, they register
from .asynchronous import Groups
from .compiler import Program
from .global_memory import Fault, GlobalMemory
from .moves import GARBAGE
from .numbers import F32, U32, UNSIGNED
from .parser import Instruction
from .shared_memory import Lanes, SharedMemory

_MOST_BLOCKS = 2_000_000


@dataclass(frozen=True)
class Schedule:
    """One of the orders of events that a GPU may take.

    Attributes:
        lazy: asynchronous copies are made at the wait for them, with NaN in their place until then; else at once.
        detect: shared memory is checked for races (:class:`~.shared_memory.Detector`).
        reverse: programs start with the last.
        leader: the lane that ``elect.sync`` chooses.
        warps: "together", or "ascending" or "descending": each runs until it has to wait.
        tiles: bytes of tiles are counted (:meth:`Machine.count_tile`).
    """

    lazy: bool = False
    detect: bool = False
    reverse: bool = False
    leader: int = 0
    warps: str = "together"
    tiles: bool = False


class Machine:
    """``programs`` (x, y, z) of a launch on ``grid``; ``parameters`` are numbers and tensor maps."""

    def __init__(self, program: Program, memory: GlobalMemory, parameters: list, programs: list[tuple[int, int, int]],
                 grid: tuple[int, int, int], shared: int, schedule: Schedule):  # fmt: skip
        self.program, self.memory, self.parameters, self.schedule = program, memory, parameters, schedule
        self.size = program.kernel.threads
        self.threads = self.size * len(programs)
        index = np.arange(self.threads)
        self.all_lanes = Lanes(index, index // self.size, index % self.size // 32)
        self.tid = (index % self.size).astype(U32)
        self.laneid = (index % 32).astype(U32)
        self.ntid, self.nctaid = U32(self.size), [U32(g) for g in grid]
        self.ctaid = list(np.repeat(np.array(programs, U32), self.size, axis=0).T)
        x, y, z = (axis.astype(np.int64) for axis in self.ctaid)
        self.number = (1 + x + grid[0] * (y + grid[1] * z)).astype(np.int32)  # of the program in its grid, from 1
        unit = shared_unit(program) if schedule.detect else None
        self.shared = SharedMemory(shared, len(programs), unit, garbage=0xFF if schedule.lazy else 0x5A)  # 0xFF… is NaN
        self.barriers: dict[int, barriers.Barrier] = {}
        self.cp_async, self.bulk, self.wgmma = (Groups(self.threads) for _ in range(3))
        self.registers: list[np.ndarray] = []
        self.products: dict[int, np.ndarray] = {}  # accumulators in flight, by their slot
        self.counts: Counter[str] = Counter()
        self.mask: np.ndarray | None = None
        self.stalled = False

    # what instructions ask for

    def lanes(self, active: np.ndarray | None) -> Lanes:
        return self.all_lanes if active is None else self.all_lanes.some(np.nonzero(active)[0])

    def lanes_at(self, index: np.ndarray) -> Lanes:
        return self.all_lanes.some(index)

    def warps(self, active: np.ndarray | None, what: str) -> np.ndarray:
        """The warps that execute an instruction of whole warps."""
        if active is None:
            return np.arange(self.threads // 32)
        active = active.reshape(-1, 32)
        if (active != active[:, :1]).any():
            raise Fault(f"an instruction of whole warps by some threads of a warp: {what}")
        return np.nonzero(active[:, 0])[0]

    def parameter(self, index: int, kind: type) -> np.unsignedinteger:
        value = self.parameters[index]
        if isinstance(value, float):
            return kind(F32(value).view(U32))
        return kind(value & ((1 << np.dtype(kind).itemsize * 8) - 1))

    def count(self, name: str, amount: float) -> None:
        self.counts[name] += amount

    def count_tile(self, name: str, address: np.ndarray, size: int) -> None:
        """Bytes of a program's tile: masked off or not, but once where several threads have the same address."""
        if self.schedule.tiles:
            lanes = slice(None) if self.mask is None else self.mask
            pairs = address[lanes] << np.uint64(8) | self.all_lanes.program[lanes].astype(np.uint64)
            self.counts[f"{name} of tiles"] += len(np.unique(pairs)) * size

    # control flow

    def run(self) -> None:
        """To the end of all programs.

        Raises:
            Fault: what a GPU would fault on, or what the PTX ISA leaves undefined.
        """
        index = np.arange(self.threads)
        warp = self.all_lanes.warp if self.schedule.warps != "together" else np.zeros_like(index)
        self.rank = warp.max() - warp if self.schedule.warps == "descending" else warp
        self.groups: dict[tuple[int, int], np.ndarray | None] = {}  # (rank of the warp, block)
        self.waiting: dict[int, np.ndarray] = {}  # at the bar.sync that ends a block
        self.spinning: dict[tuple[int, int], np.ndarray | None] = {}  # at an mbarrier that is not complete
        self._spread(0, np.ones(self.threads, bool))
        blocks, progress = 0, True
        with np.errstate(all="ignore"):
            while self.groups or self.spinning:
                if not self.groups:
                    if not progress:
                        raise Fault(f"waiting for ever at an mbarrier: {self._missing()}")
                    self.groups, self.spinning, progress = self.spinning, {}, False
                key = min(self.groups)
                self._run_block(*key, self.groups.pop(key))
                progress |= not self.stalled
                blocks += 1
                if blocks > _MOST_BLOCKS:
                    raise Fault(f"no end after {blocks} blocks")
        self._check_end()

    def _run_block(self, rank: int, index: int, mask: np.ndarray | None) -> None:
        block, program, registers = self.program.kernel.blocks[index], self.program, self.registers
        function = program.function(index, mask is not None)
        if len(registers) < len(program.slots):
            for bits in list(program.bits.values())[len(registers) :]:
                registers.append(np.zeros(self.threads, bool) if bits == 1 else
                                 np.full(self.threads, GARBAGE & ((1 << bits) - 1), UNSIGNED[bits]))  # fmt: skip
        self.mask, self.stalled = mask, False
        function(registers, self, mask)
        self.counts["instructions"] += len(block.body) * (self.threads if mask is None else int(mask.sum())) // 32
        end = block.end
        if end is None:
            self._join(rank, index + 1, mask)
        elif end.modifiers[0] == "bra":
            taken, rest = self._split(end, mask)
            if taken is not False:
                self._join(rank, block.target, taken)
            if rest is not False:
                self._join(rank, index + 1, rest)
        elif end.modifiers[0] in ("ret", "exit"):
            _, rest = self._split(end, mask)
            if rest is not False:
                self._join(rank, index + 1, rest)
        else:
            self._synchronise(end, index, mask)

    def _split(self, end: Instruction, mask: np.ndarray | None):
        """The masks of threads that take a branch and of those that do not; False for none, None for all."""
        if end.guard is None:
            return mask, False
        taken = self.registers[self.program.slot(end.guard.lstrip("!"))]
        if end.guard[0] == "!":
            taken = ~taken
        yes, no = (taken, ~taken) if mask is None else (taken & mask, ~taken & mask)
        if not no.any():
            return mask, False
        if not yes.any():
            return False, mask
        return yes, no

    def _join(self, rank: int, index: int, mask: np.ndarray | None) -> None:
        groups, key = (self.spinning if self.stalled else self.groups), (rank, index)
        if key in groups and mask is not None:
            mask = mask | groups[key]
        groups[key] = None if mask is None or mask.all() else mask

    def _spread(self, index: int, mask: np.ndarray) -> None:
        """Threads go on at block ``index``, a group for each rank."""
        self.stalled = False
        for rank in [0] if self.schedule.warps == "together" else np.unique(self.rank[mask]).tolist():
            self._join(rank, index, mask & (self.rank == rank))

    def _synchronise(self, end: Instruction, index: int, mask: np.ndarray | None) -> None:
        """``bar.sync a[, b]`` (PTX ISA, "bar"): programs of which all threads have come go on."""
        numbers = [int(o, 0) for o in end.operands]
        if not 0 <= numbers[0] < 16 or (len(numbers) > 1 and (numbers[1] % 32 or not 0 < numbers[1] <= self.size)):
            raise Fault(f"barrier number or count out of range, of {self.size} threads: {end.text}")
        if numbers[0] or numbers[1:] not in ([], [self.size]) or end.guard:
            raise NotImplementedError(f"a barrier of some of the threads: {end.text}")
        arriving = np.ones(self.threads, bool) if mask is None else mask
        self.counts["barriers"] += int(arriving.sum()) // 32
        self.waiting[index] = self.waiting[index] | arriving if index in self.waiting else arriving
        arrived = np.logical_or.reduce(list(self.waiting.values())).reshape(-1, self.size)
        complete = arrived.all(1)
        if not complete.any():
            return
        if self.shared.detector:
            self.shared.detector.epoch[complete] += 1
        released = np.repeat(complete, self.size)
        for at, mask in list(self.waiting.items()):
            if (mask & released).any():
                self._spread(at + 1, mask & released)
            self.waiting[at] = mask & ~released
            if not self.waiting[at].any():
                del self.waiting[at]

    def _missing(self) -> list[str]:
        return [f"{b.pending} of {b.count} arrivals, {b.bytes} bytes" for b in self.barriers.values()]

    def _check_end(self) -> None:
        if self.waiting:
            raise Fault("threads wait for ever at a bar.sync that the others do not reach")
        if any(b.copies for b in self.barriers.values()):
            raise Fault("the program ends with bulk loads under way that nobody waited for")
        if self.bulk.pending:
            raise Fault("the program ends while bulk stores may still read its shared memory")
        if self.wgmma.pending:
            raise Fault("the program ends with wgmma under way that nobody waited for")


def shared_unit(program: Program) -> int:
    """The greatest number of bytes, 16 at most, of which all of a kernel's accesses of shared memory are multiples."""
    unit = 16
    for block in program.kernel.blocks:
        for ins in block.body:
            op = ins.modifiers
            if op[0] in ("ld", "st") and op[1].startswith("shared"):
                vector = int(op[-2][1:]) if op[-2] in ("v2", "v4", "v8") else 1
                unit = min(unit, int(op[-1][1:]) // 8 * vector)
            elif op[0] == "mbarrier":
                unit = min(unit, 8)
            elif op[:2] == ["cp", "async"] and op[2] in ("ca", "cg"):
                unit = min(unit, int(ins.operands[2], 0))
    return unit
