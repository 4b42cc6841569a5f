"""``mma.sync``, ``ldmatrix`` and ``stmatrix`` (PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions").

Fragments, with g = lane / 4 and t = lane % 4 (figures of "Matrix Fragments for mma.m16n8k16"): register r of A, half h,
holds row g + 8·(r % 2) and column 2t + h + 8·(r / 2); of B row 2t + h + 8r of column g; accumulator i holds row
g + 8·(i / 2 % 2), column 8·(i / 4) + 2t + i % 2. Of tf32 a register is one element, with t for 2t + h and 4 for 8.
Products are exact in float32; their sums are rounded in NumPy's order.
"""

from __future__ import annotations

import numpy as np

from .compiler import Emission, instruction, runtime
from .numbers import F32, U16, U32, widen


def a_matrix(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """(warps, 16, k) float32 from four registers of all threads."""
    half = 1 if kind == "tf32" else 2
    values = widen(np.stack(registers).view(U32 if half == 1 else U16), kind)
    r = values.reshape(2, 2, -1, 8, 4, half)  # r / 2, r % 2, warp, g, t, h
    return r.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 8 * half)


def b_matrix(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """(warps, k, 8) float32 from two registers of all threads."""
    half = 1 if kind == "tf32" else 2
    values = widen(np.stack(registers).view(U32 if half == 1 else U16), kind)
    r = values.reshape(2, -1, 8, 4, half)  # r, warp, g, t, h
    return r.transpose(1, 0, 3, 4, 2).reshape(-1, 8 * half, 8)


def d_matrix(registers: list[np.ndarray]) -> np.ndarray:
    """(warps, 16, n) float32 from n / 2 registers of all threads."""
    values = np.stack(registers).view(F32)
    r = values.reshape(len(registers) // 4, 2, 2, -1, 8, 4)  # i / 4, i / 2 % 2, i % 2, warp, g, t
    return r.transpose(3, 1, 4, 0, 5, 2).reshape(-1, 16, 2 * len(registers))


def d_registers(matrix: np.ndarray) -> list[np.ndarray]:
    """The reverse."""
    warps, _, n = matrix.shape
    r = matrix.reshape(warps, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return list(np.ascontiguousarray(r).reshape(n // 2, warps * 32).view(U32))


@instruction("mma.sync.aligned")
def mma(e: Emission) -> list[str]:
    """``mma.sync.aligned.m16n8k16.row.col.f32.type.type.f32 d, a, b, c``; k is 8 for tf32."""
    shape, layout, kinds = e.op[3], e.op[4:6], e.op[6:]
    kind = kinds[1]
    e.need(layout == ["row", "col"] and kinds == ["f32", kind, kind, "f32"])
    e.need(shape == ("m16n8k8" if kind == "tf32" else "m16n8k16"))
    a, b, c = (e.values(group, 32) for group in e.ops[1:4])
    return [f"x = multiply(M, {a}, {b}, {c}, {kind!r}, {e.active}, {e.what})", *e.put_all(e.ops[0], "x")]


@runtime
def multiply(machine, a, b, c, kind, active, what):
    left, right = a_matrix(a, kind), b_matrix(b, kind)
    machine.count("mma", len(machine.warps(active, what)))
    machine.count("flop", len(machine.warps(active, what)) * 2 * left[0].size * 8)
    return d_registers(left @ right + d_matrix(c))


def _matrix_operands(e: Emission, names: str | list[str]) -> list[str]:
    e.need(e.op[1:4] == ["sync", "aligned", "m8n8"] and e.op[-1] == "b16")
    names = names if isinstance(names, list) else [names]
    e.need(len(names) == int(e.op[4][1:]))
    return names


@instruction("ldmatrix")
def ldmatrix(e: Emission) -> list[str]:
    """Each of 1, 2 or 4 matrices has eight rows of 16 bytes, addressed by eight lanes; lane l gets row l / 4."""
    names = _matrix_operands(e, e.ops[0])
    address = e.address(e.ops[1], 32)
    call = f"load_matrices(M, {address}, {len(names)}, {'trans' in e.op}, {e.active}, {e.what})"
    return [f"x = {call}", *e.put_all(names, "x")]


@instruction("stmatrix")
def stmatrix(e: Emission) -> list[str]:
    names = _matrix_operands(e, e.ops[1])
    address = e.address(e.ops[0], 32)
    return [f"store_matrices(M, {address}, {e.values(names, 32)}, {'trans' in e.op}, {e.active}, {e.what})"]


def _rows(machine, address, count, active, what):
    """The addresses of the rows, and whose they are."""
    lanes = machine.warps(active, what)[:, None] * 32 + np.arange(8 * count)
    return address[lanes].ravel(), machine.lanes_at(lanes.ravel())


@runtime
def load_matrices(machine, address, count, transposed, active, what):
    address, lanes = _rows(machine, address, count, active, what)
    machine.count("shared load", 16 * len(lanes))
    data = machine.shared.load(address, 4, 4, lanes, what).view(U16).reshape(-1, count, 8, 8)
    if transposed:
        data = data.swapaxes(2, 3)
    data = np.ascontiguousarray(data).view(U32).reshape(-1, count, 32)  # lane = row * 4 + pair
    out = np.zeros((count, machine.threads // 32, 32), U32)
    out[:, machine.warps(active, what)] = data.swapaxes(0, 1)
    return out.reshape(count, -1)


@runtime
def store_matrices(machine, address, registers, transposed, active, what):
    address, lanes = _rows(machine, address, len(registers), active, what)
    machine.count("shared store", 16 * len(lanes))
    data = np.stack([r.reshape(-1, 32) for r in registers], 1)[machine.warps(active, what)]  # warp, matrix, lane
    data = data.view(U16).reshape(-1, len(registers), 8, 8)
    if transposed:
        data = data.swapaxes(2, 3)
    machine.shared.store(address, np.ascontiguousarray(data).view(U32).reshape(-1, 4), lanes, what)
