"""Bulk tensor copies (PTX ISA, "cp.async.bulk.tensor", "Tensors": tiled mode, boxes, out-of-bound access, swizzle)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .asynchronous import reading
from .barriers import find_barrier
from .compiler import PARAMETER_SPACE, Emission, instruction, runtime
from .global_memory import WIDTHS, Fault
from .wgmma import swizzle

_SPAN = {0: 16, 1: 32, 2: 64, 3: 128}
"""Bytes within which each swizzle of a tensor map permutes (CUDA driver API, CUtensorMapSwizzle)."""
_NAN = {2: 0x7FFF, 4: 0x7FFFFFFF}


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled is told; outermost dimension first, strides in elements; ``padding`` 1 fills NaN."""

    base: int
    swizzle: int
    element_size: int
    box: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: int = 0

    def __post_init__(self):
        """What the CUDA driver refuses (CUDA driver API, cuTensorMapEncodeTiled)."""
        inner = self.box[-1] * self.element_size
        steps = [s * self.element_size for s in self.strides[:-1]]
        for wrong, message in (
            (self.base % 16, f"base {self.base:#x} is not a multiple of 16"),
            (not 1 <= len(self.box) <= 5 or not len(self.box) == len(self.shape) == len(self.strides), "rank"),
            (not all(1 <= b <= 256 for b in self.box), f"box {self.box}"),
            (not all(1 <= s <= 1 << 32 for s in self.shape), f"shape {self.shape}"),
            (any(s % 16 or not 0 <= s < 1 << 40 for s in steps), f"strides of {steps} bytes"),
            (self.strides[-1] != 1, "a last dimension that is not dense"),
            (inner % 16, f"inner box of {inner} bytes"),
            (self.swizzle and inner > _SPAN[self.swizzle], f"{inner} bytes under swizzle {self.swizzle}"),
        ):
            if wrong:
                raise Fault(f"tensor map: {message}")

    @property
    def end(self) -> int:
        """The address behind its last element."""
        last = sum((s - 1) * t for s, t in zip(self.shape, self.strides))
        return self.base + (last + 1) * self.element_size


@functools.lru_cache(4096)
def box_elements(tensor: TensorMap, start: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which elements of the box at ``start`` are inside of the tensor, and the addresses of those."""
    inside, offset = np.ones(tensor.box, bool), np.zeros(tensor.box, np.int64)
    for axis, (first, length, extent, stride) in enumerate(zip(start, tensor.box, tensor.shape, tensor.strides)):
        position = (first + np.arange(length)).reshape([-1 if i == axis else 1 for i in range(len(start))])
        inside &= (position >= 0) & (position < extent)
        offset = offset + position * stride
    return inside, (tensor.base + offset[inside] * tensor.element_size).astype(np.uint64)


@functools.lru_cache(1024)
def box_in_shared_memory(address: int, tensor: TensorMap) -> np.ndarray:
    """Shared addresses of the box's elements."""
    linear = address + np.arange(int(np.prod(tensor.box))).reshape(tensor.box) * tensor.element_size
    return swizzle(linear, _SPAN[tensor.swizzle])


@functools.lru_cache(1024)
def box_units(address: int, tensor: TensorMap, unit: int) -> np.ndarray:
    """What the box takes of shared memory, in units of the race detector."""
    return np.unique(box_in_shared_memory(address, tensor) // unit)


@instruction("cp.async.bulk.tensor")
def bulk_tensor(e: Emission) -> list[str]:
    """To shared memory ``[to], [map, {x, y, …}], [mbarrier]``; to global memory ``[map, {x, y, …}], [from]``."""
    e.need(not {"multicast::cluster", "im2col", "gather4", "scatter4"} & set(e.op))
    load = e.op[5] != "global"
    to, source, *barrier = e.ops
    tensor, local = (source, to) if load else (to, source)
    coordinates = e.values(tensor.coordinates, 32)
    operands = f"{e.full(tensor.base, 64)}, {coordinates}, {e.address(local, 32)}"
    if load:
        return [f"bulk_load(M, {operands}, {e.address(barrier[0], 32)}, {e.active}, {e.what})"]
    return [f"bulk_store(M, {operands}, {e.active}, {e.what})"]


def _box(machine, tensor, coordinates, local, lane, what, load):
    """The tensor map that ``lane`` means; which elements are inside, their addresses and their positions in global
    memory; their flat shared positions, and the detector's units of these."""
    index = int(tensor[lane]) - PARAMETER_SPACE
    found = machine.parameters[index] if 0 <= index < len(machine.parameters) else None
    if not isinstance(found, TensorMap):
        raise Fault(f"not a tensor map: {what}")
    start = tuple(int(c[lane].astype(np.int32)) for c in coordinates)[::-1]
    if min(start) < 0 and not load:  # CUDA programming guide, "Tensor Memory Access"
        raise Fault(f"bulk store at negative coordinates {start}: {what}")
    if len(start) != len(found.box):
        raise Fault(f"{len(start)} coordinates for a tensor of {len(found.box)} dimensions: {what}")
    address = int(local[lane])
    if address % 128:
        raise Fault(f"bulk copy to or from a shared address that is not a multiple of 128: {what}")
    if found.swizzle and found.box[-1] * found.element_size != _SPAN[found.swizzle]:
        raise NotImplementedError(f"a box narrower than its swizzle: {what}")
    where = box_in_shared_memory(address, found)
    if where.min() < machine.shared.first or where.max() + found.element_size > machine.shared.limit:
        raise Fault(f"bulk copy outside of shared memory: {what}")
    inside, addresses = box_elements(found, start)
    detector = machine.shared.detector
    units = box_units(address, found, detector.unit) if detector else None
    return found, inside, addresses, machine.memory.index(addresses, found.element_size, what), where, units


def _elected(machine, active, what):
    """Threads that issue a bulk copy: at most one a warp."""
    lanes = machine.lanes(active).index
    if len(np.unique(lanes // 32)) != len(lanes):
        raise Fault(f"a bulk copy by more than one thread of a warp: {what}")
    return lanes.tolist()


@runtime
def bulk_load(machine, tensor, coordinates, local, barrier, active, what):
    for lane in _elected(machine, active, what):
        _load(machine, *_box(machine, tensor, coordinates, local, lane, what, True), barrier, lane, what)


def _load(machine, tensor, inside, addresses, positions, where, units, barrier, lane, what):
    size, lanes = tensor.element_size, machine.lanes_at(np.array([lane]))
    view, detector = machine.shared.views[size], machine.shared.detector
    bar = find_barrier(machine, int(machine.shared.flat(barrier[lanes.index], 8, lanes.program, what)[0]), what)
    index = (where + lanes.program[0] * machine.shared.stride) // size
    machine.count("bulk loads", 1)
    machine.count("bulk load", inside.sum() * size)
    machine.count("bulk load of tiles", inside.size * size)
    if detector:
        units = (units + lanes.program[0] * (machine.shared.stride // detector.unit))[None]
        detector.begin_copy(units, lanes, what)

    def copy():
        data = np.zeros(tensor.box, WIDTHS[size])
        if tensor.padding:
            data[...] = _NAN[size]
        data[inside] = machine.memory.views[size][positions]
        machine.memory.reading(addresses, machine.number[lane], what)
        view[index] = data
        if detector:
            detector.end_copy(units, None)
        bar.expect(-data.nbytes)

    if machine.schedule.lazy:
        view[index] = view.dtype.type(~view.dtype.type(0))
        bar.copies.append(copy)
    else:
        copy()


@runtime
def bulk_store(machine, tensor, coordinates, local, active, what):
    for lane in _elected(machine, active, what):
        _store(machine, *_box(machine, tensor, coordinates, local, lane, what, False), lane, what)


def _store(machine, tensor, inside, addresses, positions, where, units, lane, what):
    size, lanes = tensor.element_size, machine.lanes_at(np.array([lane]))
    view, detector = machine.shared.views[size], machine.shared.detector
    index = (where + lanes.program[0] * machine.shared.stride) // size
    machine.count("bulk stores", 1)
    machine.count("bulk store", inside.sum() * size)
    machine.count("bulk store of tiles", inside.size * size)
    done = reading(machine, units, lanes, what) if detector else None

    def copy():
        machine.memory.views[size][positions] = view[index][inside]
        machine.memory.writing(addresses, machine.number[lane], what)

    def finish(at):
        if machine.schedule.lazy:
            copy()
        if done:
            done(at)

    if not machine.schedule.lazy:
        copy()
    machine.bulk.issue(lanes.index, finish)


@instruction("cp.async.bulk.commit_group")
def bulk_commit(e: Emission) -> list[str]:
    return [f"M.bulk.commit(M.lanes({e.active}).index)"]


@instruction("cp.async.bulk.wait_group")
def bulk_wait(e: Emission) -> list[str]:
    """With ``.read``, only the reads of shared memory need be done; both complete the store here."""
    return [f"wait_for(M, M.bulk, {int(e.ops[0], 0)}, {e.active}, {e.what})"]


@instruction("fence.proxy.async")
def proxy_fence(e: Emission) -> list[str]:
    return [f"fence_proxy(M, {e.active})"]


@runtime
def fence_proxy(machine, active):
    if detector := machine.shared.detector:
        lanes = machine.lanes(active)
        machine.count("proxy fences", len(lanes) // 32)
        detector.fence(lanes.program, lanes.warp)
