"""Global memory: host memory of which only the bytes of a launch's tensors may be touched (PTX ISA, "State Spaces")."""

from __future__ import annotations

import ctypes

import numpy as np

WIDTHS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
"""One element of each access width; sixteen bytes are copied as a complex number, never computed with."""


class Fault(Exception):
    """What a GPU would fault on, or what the PTX ISA leaves undefined."""


class GlobalMemory:
    """Only ``ranges`` [(first, last + 1, name)] may be touched, of tensors that may overlap."""

    def __init__(self, ranges: list[tuple[int, int, str]]):
        merged: list[list] = []
        for first, last, name in sorted(ranges):
            if merged and first < merged[-1][1]:  # merely adjacent ones stay apart
                merged[-1][1] = max(merged[-1][1], last)
                merged[-1][2] += "+" + name
            else:
                merged.append([first, last, name])
        self.names = [m[2] for m in merged]
        self.first = np.array([m[0] for m in merged], np.uint64)
        self.last = np.array([m[1] for m in merged], np.uint64)
        self.low = int(self.first[0]) & ~15 if merged else 0
        size = ((int(self.last[-1]) if merged else 16) - self.low + 15) & ~15
        raw = (ctypes.c_uint8 * size).from_address(self.low) if merged else (ctypes.c_uint8 * 16)()
        self.bytes = np.ctypeslib.as_array(raw)
        self.views = {width: self.bytes.view(kind) for width, kind in WIDTHS.items()}
        self.forget(False)

    def forget(self, detect: bool) -> None:
        """Begins a new run; with ``detect``, of each byte the program that writes it is kept."""
        sizes = (self.last - self.first).astype(np.int64)
        self.offset = np.cumsum(sizes) - sizes
        self.writer = np.zeros(int(sizes.sum()), np.int32) if detect else None

    def tensors(self) -> list[np.ndarray]:
        """The bytes of each range."""
        return [self.bytes[int(a) - self.low : int(b) - self.low] for a, b in zip(self.first, self.last)]

    def index(self, address: np.ndarray, size: int, what: str) -> np.ndarray:
        """Positions in ``views[size]`` of accesses of ``size`` bytes, which must be aligned to it and inside."""
        if (address & np.uint64(size - 1)).any():
            raise Fault(f"misaligned access of global memory, {size} bytes: {what}")
        where = np.searchsorted(self.first, address, side="right") - 1
        bad = (where < 0) | (address + np.uint64(size) > self.last[np.maximum(where, 0)])
        if bad.any():
            i = int(np.argmax(bad))
            r = max(int(where[i]), 0)
            raise Fault(f"access of global memory outside of every tensor: {int(bad.sum())} threads, the first "
                        f"{int(address[i]) - int(self.first[r])} bytes from the start of {self.names[r]}, "
                        f"{int(address[i]) - int(self.last[r])} from its end: {what}")  # fmt: skip
        return ((address - np.uint64(self.low)) // np.uint64(size)).astype(np.int64)

    def reading(self, address: np.ndarray, program: np.ndarray | int, what: str) -> None:
        """What another program of the launch writes may not be read: programs run in any order."""
        if self.writer is not None:
            writer = self.writer[self._place(address)]
            if ((writer != 0) & (writer != program)).any():
                raise Fault(f"race, read of global memory that another program wrote: {what}")

    def writing(self, address: np.ndarray, program: np.ndarray | int, what: str) -> None:
        """No two programs may write one element. ``program`` counts from 1; only first bytes are looked at."""
        if self.writer is not None:
            place = self._place(address)
            before = self.writer[place]
            self.writer[place] = program
            if ((before != 0) & (before != program)).any() or (self.writer[place] != program).any():
                raise Fault(f"race, two programs write one element of global memory: {what}")

    def _place(self, address: np.ndarray) -> np.ndarray:
        """Positions in ``writer`` of addresses inside of the ranges, which may lie far apart."""
        where = np.searchsorted(self.first, address, side="right") - 1
        return self.offset[where] + (address - self.first[where]).astype(np.int64)

    def load(self, address: np.ndarray, width: int, count: int, what: str) -> np.ndarray:
        """(threads, count) elements of ``width`` bytes."""
        found = self.views[width * count][self.index(address, width * count, what)]
        return found.view(WIDTHS[width]).reshape(len(address), count)

    def store(self, address: np.ndarray, values: np.ndarray, what: str) -> None:
        """The reverse, of ``values`` (threads, count)."""
        size = values.shape[1] * values.itemsize
        self.views[size][self.index(address, size, what)] = np.ascontiguousarray(values).view(WIDTHS[size])[:, 0]
