"""``wgmma`` (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions") with its shared-memory descriptors.

Warp w of a warpgroup computes rows 16·w to 16·w + 15 of the 64; its accumulators are those of ``mma``. Products are
computed when they are issued. Until they are waited for, their operands in shared memory may not be written
(:class:`~.shared_memory.Detector`), those in registers may not change, and under a lazy schedule the accumulators hold
NaN for all but further products.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from .asynchronous import reading, wait_for
from .compiler import Emission, instruction, runtime
from .global_memory import Fault
from .numbers import widen
from .tensor_core import a_matrix, d_matrix, d_registers

SPAN = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes that each swizzle mode of a descriptor permutes within."""


def swizzle(address: np.ndarray, span: int) -> np.ndarray:
    """XORs 16-byte units with the 128-byte line, on absolute addresses (PTX ISA, "Swizzling Modes")."""
    return address ^ (((address >> 7) & (span // 16 - 1)) << 4)


@functools.lru_cache(4096)
def descriptor_bytes(descriptor: int, rows: int, element: int, transposed: bool) -> np.ndarray:
    """Addresses of the elements [row, k] of an operand of ``rows`` rows (M or N) and 32 bytes of k.

    PTX ISA, "Matrix Descriptor Format" and "Strides": units of 8 rows × 16 bytes, K-major unless ``transposed``.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise NotImplementedError("a base offset in a wgmma descriptor")
    span = SPAN[descriptor >> 62 & 3]
    row, k = np.arange(rows)[:, None], np.arange(32 // element)[None, :]
    if not transposed:
        byte = k * element
        if span == 16:
            linear = start + row // 8 * stride + row % 8 * 16 + byte // 16 * leading + byte % 16
        else:
            linear = start + row // 8 * stride + row % 8 * span + byte
    elif element != 2:
        raise NotImplementedError("a transposed wgmma operand that is not of 16 bits")
    elif span == 16:
        linear = start + row // 8 * stride + row % 8 * 2 + k // 8 * leading + k % 8 * 16
    else:
        linear = start + row // (span // 2) * leading + row % (span // 2) * 2 + k // 8 * stride + k % 8 * span
    return swizzle(linear, span)


@instruction("wgmma.mma_async.sync.aligned")
def wgmma(e: Emission) -> list[str]:
    """``wgmma.….m64nNkK.f32.type.type d, a, b-desc, scale-d, imm-scale-a, imm-scale-b[, imm-trans-a, imm-trans-b]``."""
    shape = re.match(r"m64n(\d+)k(\d+)$", e.op[4])
    kind = e.op[6]
    scale, *immediate = e.ops[3:]
    immediate = [int(o, 0) for o in immediate]
    e.need(e.op[5:] == ["f32", kind, kind] and int(shape[2]) == (8 if kind == "tf32" else 16))
    e.need(immediate[:2] == [1, 1])
    transposes = immediate[2:]
    trans_b = transposes[-1] if transposes else 0
    d = [e.program.slot(name) for name in e.ops[0]]
    if isinstance(e.ops[1], list):
        slots = [e.program.slot(name) for name in e.ops[1]]
        a = f"{slots}, None, 0"
    else:
        a = f"None, {e.full(e.ops[1], 64)}, {transposes[0] if len(transposes) == 2 else 0}"
    b = f"{e.full(e.ops[2], 64)}, {trans_b}"
    scale = f"full({e.typed(scale, 'pred')}, T)"
    return [f"multiply_async(M, R, {d}, {a}, {b}, {scale}, {shape[1]}, {kind!r}, {e.active}, {e.what})"]


@runtime
def multiply_async(machine, registers, d_slots, a_slots, a, trans_a, b, trans_b, scale, n, kind, active, what):
    warps = machine.warps(active, what)
    if active is not None:
        _release(machine)
    element = 4 if kind == "tf32" else 2
    if a_slots is None:
        found, of = _operand(machine, warps, a, 64, element, trans_a, kind, what)
        left = found.reshape(-1, 4, 16, 32 // element)[of, machine.lanes_at(warps * 32).warp % 4]
    else:
        held = [registers[slot] for slot in a_slots]
        left = a_matrix(held, kind)[warps]
        machine.wgmma.issue(warps * 32, _unchanged(registers, a_slots, held, warps, what))
    right, of = _operand(machine, warps, b, n, element, trans_b, kind, what)
    share = len(warps) // len(right)
    # one product a warp, however many warps come together: BLAS adds up larger ones in another order
    if share * len(right) == len(warps) and (of == np.arange(len(warps)) // share).all():
        product = left.reshape(len(right), share, *left.shape[1:]) @ right.swapaxes(1, 2)[:, None]
        product = product.reshape(-1, 16, n)
    else:
        product = left @ right[of].swapaxes(1, 2)
    kept = _uniform(scale, warps, "scale-d", what)[:, None, None]
    out = d_matrix([machine.products.get(slot, registers[slot]) for slot in d_slots])
    out[warps] = product + (out[warps] if kept.all() else np.where(kept, out[warps], np.float32(0)))
    machine.count("wgmma", len(warps) / 4)
    machine.count("flop", len(warps) * 2 * 16 * n * left.shape[2])
    results = d_registers(out)
    if machine.schedule.lazy and active is None:
        _hold(machine, registers, d_slots, results)
    else:
        for slot, result in zip(d_slots, results):
            registers[slot] = result if active is None else np.where(active, result, registers[slot])


def _hold(machine, registers, slots, results):
    """Puts NaN into the accumulators until the last product that they take part in is waited for.

    Of programs that have diverged nothing is held.
    """
    poison = np.full(machine.threads, 0x7FFFFFFF, np.uint32)
    machine.products.update(zip(slots, results))
    for slot in slots:
        registers[slot] = poison

    def finish(at):
        _release(machine, [s for s, result in zip(slots, results) if machine.products.get(s) is result])

    machine.wgmma.issue(np.array([machine.threads - 1]), finish)


def _release(machine, slots: list[int] | None = None):
    for slot in list(machine.products) if slots is None else slots:
        machine.registers[slot] = machine.products.pop(slot)


def _uniform(value, warps, name, what):
    """The value of each warp, which must be that of all its threads."""
    value = value.reshape(-1, 32)[warps]
    if (value != value[:, :1]).any():
        raise Fault(f"{name} differs within a warp: {what}")
    return value[:, 0]


def _operand(machine, warps, descriptor, rows, element, transposed, kind, what):
    """The different matrices (m, rows, k) that ``descriptor`` says, and which of them is each warp's."""
    lanes = machine.lanes_at(warps * 32)
    different, which = np.unique(_uniform(descriptor, warps, "descriptor", what), return_inverse=True)
    pairs, of = np.unique(lanes.program * len(different) + which, return_inverse=True)
    out = np.empty((len(pairs), rows, 32 // element), np.float32)
    shared = machine.shared
    for i, one in enumerate(different):
        where = descriptor_bytes(int(one), rows, element, bool(transposed))
        if where.min() < shared.first or where.max() + element > shared.limit:
            raise Fault(f"wgmma operand outside of shared memory: {what}")
        at = np.nonzero(pairs % len(different) == i)[0]
        flat = where + (pairs[at] // len(different) * shared.stride)[:, None, None]
        out[at] = widen(shared.views[element][flat // element], kind)
        if shared.detector:
            mine = which == i
            units = _units(int(one), rows, element, bool(transposed), shared.detector.unit)
            machine.wgmma.issue(warps[mine] * 32, reading(machine, units, lanes.some(mine), what))
    return out, of


@functools.lru_cache(4096)
def _units(descriptor: int, rows: int, element: int, transposed: bool, unit: int) -> np.ndarray:
    return np.unique(descriptor_bytes(descriptor, rows, element, transposed) // unit)


def _unchanged(registers, slots, held, warps, what):
    """A check for the wait: the operand's registers are as they were ("wgmma.wait_group": else undefined)."""

    def finish(at):
        for slot, before in zip(slots, held):
            now = registers[slot]
            if now is not before and (now.reshape(-1, 32)[warps[at]] != before.reshape(-1, 32)[warps[at]]).any():
                raise Fault(f"registers of an operand were written while the product was in flight: {what}")

    return finish


@instruction("wgmma.fence")
def wgmma_fence(e: Emission) -> list[str]:
    """Orders registers before ``wgmma``, as this machine always does."""
    return []


@instruction("wgmma.commit_group")
def wgmma_commit(e: Emission) -> list[str]:
    return [f"M.wgmma.commit(M.lanes({e.active}).index)"]


@instruction("wgmma.wait_group")
def wgmma_wait(e: Emission) -> list[str]:
    return [f"wait_for_products(M, {int(e.ops[0], 0)}, {e.active}, {e.what})"]


@runtime
def wait_for_products(machine, left, active, what):
    if active is not None:
        _release(machine)
    wait_for(machine, machine.wgmma, left, active, what)
