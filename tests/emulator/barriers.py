"""``mbarrier`` objects (PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier").

A phase is complete when all arrivals it expects have come and all bytes it expects have been copied. ``bar.sync`` ends
a block and is the business of machine.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .compiler import Emission, instruction, runtime
from .global_memory import Fault

_MOST = (1 << 20) - 1
"""Arrivals and bytes of one phase."""


@dataclass
class Barrier:
    """``phase`` is the parity of the phase under way; ``copies`` are those that a lazy schedule has put off."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    copies: list[Callable[[], None]] = field(default_factory=list)

    def expect(self, count: int) -> None:
        """``count`` bytes more (fewer, when they have come)."""
        self.bytes += count
        if abs(self.bytes) > _MOST:
            raise Fault(f"an mbarrier that expects {self.bytes} bytes")
        self.settle()

    def arrive(self, count: int, what: str) -> None:
        self.pending -= count
        if self.pending < 0:
            raise Fault(f"more arrivals than the mbarrier expects: {what}")
        self.settle()

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count

    def passed(self, parity: int) -> bool:
        """Whether the phase of ``parity`` is complete, once the copies under way are."""
        while self.phase == parity and self.copies:
            self.copies.pop(0)()
        return self.phase != parity


@instruction("mbarrier.init")
def init(e: Emission) -> list[str]:
    return [f"init_barrier(M, {e.address(e.ops[0], 32)}, {int(e.ops[1], 0)}, {e.active}, {e.what})"]


@instruction("mbarrier.inval")
def inval(e: Emission) -> list[str]:
    return [f"end_barrier(M, {e.address(e.ops[0], 32)}, {e.active}, {e.what})"]


@instruction("mbarrier.arrive")
def arrive(e: Emission) -> list[str]:
    """``mbarrier.arrive[.expect_tx] _, [address][, bytes]``."""
    e.need(e.ops[0] == "_")
    expect = "expect_tx" in e.op
    e.need(len(e.ops) == 2 + expect)
    expected = e.full(e.ops[2], 32) if expect else "np.zeros(T, U32)"
    return [f"arrive_at(M, {e.address(e.ops[1], 32)}, {expected}, {e.active}, {e.what})"]


@instruction("mbarrier.try_wait.parity")
def try_wait(e: Emission) -> list[str]:
    call = f"wait_at(M, {e.address(e.ops[1], 32)}, {e.full(e.ops[2], 32)}, {e.active}, {e.what})"
    return e.put(e.ops[0], call)


def _touch(machine, lane, address, what, write):
    """For the race detector, a barrier is eight bytes that are written at its start and end and read otherwise."""
    lanes = machine.lanes_at(lane)
    flat = machine.shared.flat(address[lane], 8, lanes.program, what)
    if detector := machine.shared.detector:
        (detector.write if write else detector.read)(detector.units(flat, 8), lanes, what)
    return flat.tolist()


@runtime
def init_barrier(machine, address, count, active, what):
    if not 1 <= count <= _MOST:
        raise Fault(f"an mbarrier of {count} arrivals: {what}")
    for flat in _touch(machine, machine.lanes(active).index, address, what, True):
        machine.barriers[flat] = Barrier(count, count)


@runtime
def end_barrier(machine, address, active, what):
    for flat in _touch(machine, machine.lanes(active).index, address, what, True):
        barrier = find_barrier(machine, flat, what)
        if barrier.copies or barrier.bytes:
            raise Fault(f"an mbarrier ends with copies under way: {what}")
        del machine.barriers[flat]


def find_barrier(machine, flat: int, what: str) -> Barrier:
    if flat not in machine.barriers:
        raise Fault(f"no mbarrier was initialised here: {what}")
    return machine.barriers[flat]


@runtime
def arrive_at(machine, address, expected, active, what):
    lanes = machine.lanes(active).index
    machine.count("arrivals", len(lanes))
    for flat, count in zip(_touch(machine, lanes, address, what, False), expected[lanes].tolist()):
        barrier = find_barrier(machine, flat, what)
        if count:
            barrier.bytes += count  # before the arrival, which may complete the phase
            barrier.expect(0)
        barrier.arrive(1, what)


@runtime
def wait_at(machine, address, parity, active, what):
    """Whether the phase is over, for each thread; where it is for none, other threads go on first."""
    lanes = machine.lanes(active).index
    machine.count("waits", len(lanes) // 32)
    starts = np.diff(lanes // 32, prepend=-1) != 0
    firsts, warp = lanes[starts], np.cumsum(starts) - 1
    leader = firsts[warp]
    if (address[lanes] != address[leader]).any() or (parity[lanes] != parity[leader]).any():
        raise Fault(f"threads of a warp wait for different phases: {what}")
    barriers = [find_barrier(machine, flat, what) for flat in _touch(machine, firsts, address, what, False)]
    over = np.array([barrier.passed(p & 1) for barrier, p in zip(barriers, parity[firsts].tolist())])
    passed = np.zeros(machine.threads, bool)
    passed[lanes] = over[warp]
    machine.stalled = not over.any()
    return passed
