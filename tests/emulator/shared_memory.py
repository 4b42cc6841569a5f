"""Shared memory of the programs that run side by side, and what the PTX ISA forbids to do with it.

Each program's memory is a segment of one array; "flat" positions count through all segments. The rules that
:class:`Detector` checks (PTX ISA, "Memory Consistency Model", "Async proxy", "Asynchronous operations"):

* what one warp writes, another may read or write only after a barrier; what it reads, another may write only then;
* nobody may touch what an asynchronous copy in flight writes, nor write what an asynchronous operation in flight reads;
* what threads wrote, the asynchronous proxy may read only after ``fence.proxy.async``;
* nobody may read what nobody wrote.
"""

from __future__ import annotations

import numpy as np

from .global_memory import WIDTHS, Fault

SHARED_BASE = 1024
"""Address of the first byte of shared memory, so that address 0 is none."""


class Lanes:
    """Some of the threads that run side by side: their indices, their program and their warp inside of it."""

    def __init__(self, index: np.ndarray, program: np.ndarray, warp: np.ndarray):
        self.index, self.program, self.warp = index, program, warp

    def __len__(self) -> int:
        return len(self.index)

    def some(self, where: np.ndarray) -> Lanes:
        return Lanes(self.index[where], self.program[where], self.warp[where])


class SharedMemory:
    """``size`` bytes for each of ``programs``, of ``garbage`` until written; the detector tells ``unit`` apart."""

    def __init__(self, size: int, programs: int, unit: int | None, garbage: int = 0xFF):
        self.first, self.limit = SHARED_BASE, SHARED_BASE + size
        self.stride = (self.limit + 1023) & ~1023
        self.bytes = np.full(self.stride * programs, garbage, np.uint8)
        self.views = {width: self.bytes.view(kind) for width, kind in WIDTHS.items()}
        self.detector = Detector(len(self.bytes) // unit, programs, unit) if unit else None

    def flat(self, address: np.ndarray, size: int, program: np.ndarray, what: str) -> np.ndarray:
        """Flat positions of accesses of ``size`` bytes, which must be aligned to it and inside."""
        address = address.astype(np.int64)
        if address.size and (int(address.min()) < self.first or int(address.max()) + size > self.limit):
            raise Fault(f"access outside of {self.limit - self.first} bytes of shared memory, "
                        f"{int(address.min()) - self.first} .. {int(address.max()) - self.first + size}: {what}")
        if (address & (size - 1)).any():
            raise Fault(f"misaligned access of shared memory, {size} bytes: {what}")
        return address + program * self.stride

    def load(self, address: np.ndarray, width: int, count: int, lanes: Lanes, what: str) -> np.ndarray:
        """(threads, count) elements of ``width`` bytes."""
        size = width * count
        flat = self.flat(address, size, lanes.program, what)
        if self.detector:
            self.detector.read(self.detector.units(flat, size), lanes, what, count)
        return self.views[size][flat // size].view(WIDTHS[width]).reshape(len(flat), count)

    def store(self, address: np.ndarray, values: np.ndarray, lanes: Lanes, what: str) -> None:
        """The reverse, of ``values`` (threads, count)."""
        size = values.shape[1] * values.itemsize
        flat = self.flat(address, size, lanes.program, what)
        values = np.ascontiguousarray(values)
        if self.detector:
            before = self.bytes[flat[:, None] + np.arange(size)]
            same = (before == values.view(np.uint8)).reshape(len(flat), -1, self.detector.unit)
            self.detector.write(self.detector.units(flat, size), lanes, what, same.all(2))
        self.views[size][flat // size] = values.view(WIDTHS[size])[:, 0]


class Detector:
    """For each unit of shared memory who wrote and read it last; an epoch is the time between two barriers."""

    def __init__(self, count: int, programs: int, unit: int):
        self.unit, self.count = unit, count
        self.epoch = np.ones(programs, np.int32)
        self.writer_epoch = np.zeros(count, np.int32)
        self.writer_warp = np.zeros(count, np.int8)
        self.reader_epoch = np.zeros(count, np.int32)
        self.reader_warps = np.zeros(count, np.uint32)  # a bit each
        self.written = np.zeros(count, bool)
        self.dirty = np.zeros(count, bool)  # written by threads, not yet passed to the asynchronous proxy
        self.written_in_flight = np.zeros(count, bool)
        self.read_in_flight = np.zeros(count, np.int16)

    def units(self, flat: np.ndarray, size: int) -> np.ndarray:
        """(accesses, units) of ``size`` bytes at each flat position."""
        return (flat // self.unit)[:, None] + np.arange(max(1, size // self.unit))

    def read(self, units: np.ndarray, lanes: Lanes, what: str, parts: int = 1) -> None:
        """Threads read ``units`` (threads, units) into ``parts`` registers each.

        Of a register some bytes may be nobody's: Triton passes one byte a thread on through words of four.
        """
        epoch, warp = self.epoch[lanes.program][:, None], lanes.warp[:, None]
        self._none_in_flight(units, what)
        parts = min(parts, units.shape[1])
        known = self.written[units].reshape(len(units), parts, units.shape[1] // parts).any(2)
        if not known.all():
            self._fault("read of shared memory that nothing wrote", units, ~self.written[units], what)
        clash = (self.writer_epoch[units] == epoch) & (self.writer_warp[units] != warp)
        if clash.any():
            self._fault("race, read after write by another warp", units, clash, what)
        self.mark_read(units, lanes.program, np.uint32(1) << lanes.warp.astype(np.uint32))

    def mark_read(self, units: np.ndarray, program: np.ndarray, warps: np.ndarray) -> None:
        """``warps`` is a bit each, for each row of ``units``."""
        epoch = np.broadcast_to(self.epoch[program][:, None], units.shape)
        old = self.reader_epoch[units] != epoch
        self.reader_warps[units[old]] = 0
        self.reader_epoch[units[old]] = epoch[old]
        np.bitwise_or.at(self.reader_warps, units.ravel(), np.repeat(warps, units.shape[1]))

    def write(self, units: np.ndarray, lanes: Lanes, what: str, same: np.ndarray | bool = False) -> None:
        """Threads write; ``same`` where that changes nothing."""
        epoch, warp = self.epoch[lanes.program][:, None], lanes.warp[:, None]
        self.begin_write(units, lanes, what, same)
        self.writer_epoch[units] = epoch
        self.writer_warp[units] = warp
        self.written[units] = self.dirty[units] = True

    def begin_write(self, units: np.ndarray, lanes: Lanes, what: str, same: np.ndarray | bool = False) -> None:
        """Checks a write by threads or one that is issued by them."""
        epoch, warp = self.epoch[lanes.program][:, None], lanes.warp[:, None]
        self._none_in_flight(units, what)
        if self.read_in_flight[units].any():
            self._fault("write of what an asynchronous operation in flight reads", units,
                        self.read_in_flight[units] > 0, what)
        others = self.reader_warps[units] & ~(np.uint32(1) << warp.astype(np.uint32))
        clash = (self.reader_epoch[units] == epoch) & (others != 0) & ~np.asarray(same)
        if clash.any():
            self._fault("race, write after read by another warp", units, clash, what)
        clash = (self.writer_epoch[units] == epoch) & (self.writer_warp[units] != warp) & ~np.asarray(same)
        if clash.any():
            self._fault("race, write after write by another warp", units, clash, what)

    def begin_copy(self, units: np.ndarray, lanes: Lanes, what: str) -> None:
        """An asynchronous copy into shared memory is issued."""
        self.begin_write(units, lanes, what)
        self.written_in_flight[units] = True

    def end_copy(self, units: np.ndarray, lanes: Lanes | None) -> None:
        """It is complete: for all threads if it went by a barrier (``lanes`` None), else for those that waited."""
        self.written_in_flight[units] = self.dirty[units] = False
        self.written[units] = True
        self.reader_epoch[units] = 0
        self.writer_epoch[units] = 0 if lanes is None else self.epoch[lanes.program][:, None]
        if lanes is not None:
            self.writer_warp[units] = lanes.warp[:, None]

    def begin_asynchronous_read(self, units: np.ndarray, program: np.ndarray, warp: int, what: str) -> None:
        """``wgmma`` (``warp`` -1: for all warps) or a bulk store reads ``units`` (n, units), of ``program`` (n)."""
        self._none_in_flight(units, what)
        if not self.written[units].all():
            self._fault("asynchronous read of shared memory that nothing wrote", units, ~self.written[units], what)
        clash = (self.writer_epoch[units] == self.epoch[program][:, None]) & (self.writer_warp[units] != warp)
        if clash.any():
            self._fault("race, asynchronous read after write by another warp", units, clash, what)
        if self.dirty[units].any():
            self._fault("no fence.proxy.async between the threads' writes and an asynchronous read", units,
                        self.dirty[units], what)
        self.read_in_flight[units] += 1

    def fence(self, program: np.ndarray, warp: np.ndarray) -> None:
        """``fence.proxy.async`` by ``warp`` of ``program``: passes on its writes and those before the last barrier."""
        if not self.dirty.any():
            return
        fencing = np.zeros((len(self.epoch), 64), bool)
        fencing[program, warp] = True
        at = np.nonzero(self.dirty)[0]
        of = at // (self.count // len(self.epoch))
        earlier = self.writer_epoch[at] < self.epoch[of]
        self.dirty[at[fencing[of].any(1) & (earlier | fencing[of, self.writer_warp[at]])]] = False

    def _none_in_flight(self, units: np.ndarray, what: str) -> None:
        if self.written_in_flight[units].any():
            self._fault("access of what an asynchronous copy in flight writes", units, self.written_in_flight[units],
                        what)

    def _fault(self, kind: str, units: np.ndarray, where: np.ndarray, what: str) -> None:
        per_program = self.count // len(self.epoch)
        unit = int(units[tuple(int(i[0]) for i in np.nonzero(where))])
        raise Fault(f"{kind}: {int(where.sum()) * self.unit} bytes, first "
                    f"{unit % per_program * self.unit - SHARED_BASE}, epoch {self.epoch[unit // per_program]}: {what}")
