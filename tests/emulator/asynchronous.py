"""Groups of asynchronous operations, and ``cp.async`` (PTX ISA, "Asynchronous Data Movement Instructions").

A thread commits what it issued so far as a group, and waits until at most so many of its groups are under way. A
schedule is *eager*, with every copy made at once, or *lazy*, with every copy made at the wait for it, and NaN in its
place until then: what a GPU does lies between the two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .compiler import Emission, instruction, runtime
from .global_memory import WIDTHS, Fault
from .shared_memory import Lanes


class Groups:
    """Operations under way, with the group of each thread that issued it."""

    def __init__(self, threads: int):
        self.committed = np.zeros(threads, np.int64)
        self.pending: list[tuple[np.ndarray, np.ndarray, np.ndarray, Callable[[np.ndarray], None]]] = []

    def issue(self, threads: np.ndarray, finish: Callable[[np.ndarray], None]) -> None:
        """``finish(positions)`` completes it for ``threads[positions]``."""
        self.pending.append((threads, self.committed[threads], np.arange(len(threads)), finish))

    def commit(self, threads: np.ndarray | slice) -> None:
        self.committed[threads] += 1

    def wait(self, left: int, active: np.ndarray | None) -> None:
        """``active`` threads wait until at most ``left`` of their groups are under way."""
        done, self.pending, before = self.committed - left, [], self.pending
        for threads, group, positions, finish in before:
            ready = group < done[threads]
            if active is not None:
                ready &= active[threads]
            if ready.any():
                finish(positions[ready])
            if not ready.all():
                self.pending.append((threads[~ready], group[~ready], positions[~ready], finish))


@instruction("cp.async.ca", "cp.async.cg")
def cp_async(e: Emission) -> list[str]:
    """``cp.async [shared], [global], size[, source size]``; what exceeds the source size becomes zero."""
    size = int(e.ops[2], 0)
    read = e.full(e.ops[3], 32) if len(e.ops) > 3 else f"np.full(T, {size}, U32)"
    to, source = e.address(e.ops[0], 32), e.address(e.ops[1], 64)
    return [f"copy_async(M, {to}, {source}, {size}, {read}, {e.active}, {e.what})"]


@runtime
def copy_async(machine, to, source, size, read, active, what):
    lanes = machine.lanes(active)
    flat = machine.shared.flat(to[lanes.index], size, lanes.program, what)
    amount = read[lanes.index]
    some = amount > 0
    if (amount[some] != size).any():
        raise NotImplementedError(f"cp.async of a part of its bytes: {what}")
    machine.count("global load", int(some.sum()) * size)
    machine.count_tile("global load", source, size)
    machine.count("shared store", len(lanes) * size)
    address = source[lanes.index][some]
    index = machine.memory.index(address, size, what)
    machine.memory.reading(address, machine.number[lanes.index][some], what)
    to_view, from_view = machine.shared.views[size], machine.memory.views[size]
    detector = machine.shared.detector
    if detector:
        units = detector.units(flat, size)
        detector.begin_copy(units, lanes, what)
    position = np.cumsum(some) - 1

    def copy(at):
        data = np.zeros(len(at), WIDTHS[size])
        data[some[at]] = from_view[index[position[at][some[at]]]]
        to_view[flat[at] // size] = data

    def finish(at):
        if machine.schedule.lazy:
            copy(at)
        if detector:
            detector.end_copy(units[at], lanes.some(at))

    if machine.schedule.lazy:
        machine.shared.bytes[flat[:, None] + np.arange(size)] = 0xFF
    else:
        copy(np.arange(len(lanes)))
    machine.cp_async.issue(lanes.index, finish)


@instruction("cp.async.commit_group")
def cp_async_commit(e: Emission) -> list[str]:
    return [f"M.cp_async.commit(M.lanes({e.active}).index)"]


@instruction("cp.async.wait_group", "cp.async.wait_all")
def cp_async_wait(e: Emission) -> list[str]:
    lines = [f"wait_for(M, M.cp_async, {int(e.ops[0], 0) if e.ops else 0}, {e.active}, {e.what})"]
    return (cp_async_commit(e) if "wait_all" in e.op else []) + lines


@runtime
def wait_for(machine, groups, left, active, what):
    if left < 0:
        raise Fault(f"waiting for {left} groups: {what}")
    machine.count("waits", len(machine.lanes(active)) // 32)
    groups.wait(left, active)


def reading(machine, units: np.ndarray, lanes: Lanes, what: str) -> Callable[[np.ndarray], None]:
    """An asynchronous read of the same ``units`` of each program, issued by ``lanes``: what completes it for some."""
    detector = machine.shared.detector
    programs, of = np.unique(lanes.program, return_inverse=True)
    flat = units + programs[:, None] * (machine.shared.stride // detector.unit)
    detector.begin_asynchronous_read(flat, programs, int(lanes.warp[0]) if len(lanes) == len(programs) else -1, what)
    left = np.bincount(of)

    def finish(at):
        bits = np.zeros(len(programs), np.uint32)
        np.bitwise_or.at(bits, of[at], np.uint32(1) << lanes.warp[at].astype(np.uint32))
        left[:] -= np.bincount(of[at], minlength=len(programs))
        detector.read_in_flight[flat[(left == 0) & (bits != 0)]] -= 1
        detector.mark_read(flat[bits != 0], programs[bits != 0], bits[bits != 0])

    return finish
