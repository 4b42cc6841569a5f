"""What the generated code computes with: functions on arrays of unsigned bit patterns, one element a thread.

PTX ISA, "Integer Arithmetic Instructions", "Floating Point Instructions", "Data Movement and Conversion Instructions".
Floating-point division, square root, ``ex2`` and ``rcp`` are rounded from NumPy's, not approximate as on a GPU.
"""

from __future__ import annotations

import numpy as np

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I8, I16, I32, I64, F16, F32, F64 = np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64
UNSIGNED = {8: U8, 16: U16, 32: U32, 64: U64}
SIGNED = {8: I8, 16: I16, 32: I32, 64: I64}
_TWICE = {"i2": I32, "i4": I64, "u2": U32, "u4": U64}


def full(x, threads):
    """``x`` for every thread."""
    return x if getattr(x, "shape", ()) else np.full(threads, x)


def fit(x, kind, threads):
    """``full`` in a register of type ``kind``; signed values are extended by their sign, unsigned ones by zeros."""
    x = np.asarray(x)
    if x.shape == ():
        return np.full(threads, x, dtype=kind)
    return x if x.dtype == kind else x.astype(kind)


def put(condition, x, old, kind):
    """``old``, but ``x`` where ``condition``."""
    x = np.asarray(x)
    return np.where(condition, x if x.dtype == kind else x.astype(kind), old)


def shift_left(a, n):
    bits = a.dtype.itemsize * 8
    n = np.asarray(n)
    return np.where(n >= bits, a.dtype.type(0), a << np.minimum(n, bits - 1).astype(a.dtype))


def shift_right(a, n):
    """Arithmetic if ``a`` is signed."""
    bits = a.dtype.itemsize * 8
    n = np.asarray(n)
    fill = a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" else a.dtype.type(0)
    return np.where(n >= bits, fill, a >> np.minimum(n, bits - 1).astype(a.dtype))


def divide(a, b):
    """Quotient rounded to zero; all ones where b is 0, which PTX leaves unspecified."""
    zero = b == 0
    b = np.where(zero, b.dtype.type(1), b)
    q = a // b
    if a.dtype.kind == "i":
        q = q + (((a % b) != 0) & ((a < 0) != (b < 0))).astype(q.dtype)
    return np.where(zero, ~a.dtype.type(0), q)


def remainder(a, b):
    return a - divide(a, b) * np.asarray(b)


def mul_wide(a, b):
    wide = _TWICE[a.dtype.str[1:]]
    return a.astype(wide) * np.asarray(b).astype(wide)


def mul_hi(a, b):
    """The upper half of the product."""
    bits = a.dtype.itemsize * 8
    if bits == 64:
        pairs = np.broadcast(a, np.asarray(b))
        return np.array([int(p) * int(q) >> 64 for p, q in pairs], object).astype(a.dtype)
    return (mul_wide(a, b) >> _TWICE[a.dtype.str[1:]](bits)).astype(a.dtype)


def bfe(a, position, length, signed: bool):
    """Bit field extract, of the same position and length in every thread."""
    bits = a.dtype.itemsize * 8
    position, length = int(np.asarray(position).flat[0]) & 0xFF, int(np.asarray(length).flat[0]) & 0xFF
    length = min(length, bits - position)
    if length <= 0:
        return np.zeros_like(a)
    up = a << a.dtype.type(bits - position - length)
    s = up.view(SIGNED[bits]) if signed else up
    return (s >> s.dtype.type(bits - length)).view(a.dtype)


def bfi(a, b, position, length):
    """Bit field insert of ``a`` into ``b``."""
    position, length = int(np.asarray(position).flat[0]), int(np.asarray(length).flat[0])
    mask = b.dtype.type(((1 << length) - 1) << position)
    return (b & ~mask) | ((a << a.dtype.type(position)) & mask)


def prmt(a, b, selector):
    """Byte permute; a selector's fourth bit replicates the byte's sign."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    data = np.stack([a, b], 1).view(U8)
    out = np.empty((len(a), 4), U8)
    for i in range(4):
        nibble = (selector >> U32(4 * i)) & U32(15)
        byte = np.take_along_axis(data, (nibble & U32(7)).astype(int)[:, None], 1)[:, 0]
        out[:, i] = np.where(nibble & U32(8), np.where(byte & U8(0x80), U8(0xFF), U8(0)), byte)
    return out.view(U32).ravel()


def half_of(x, i):
    """Bits 16·i to 16·i + 15."""
    return (x >> U32(16 * i)).astype(U16)


def pack2(low, high):
    low, high = np.broadcast_arrays(low, high)
    return low.astype(U32) | (high.astype(U32) << U32(16))


# floating point


def nan(a, b):
    """Whether either is."""
    return np.isnan(a) | np.isnan(b)


def fma32(a, b, c):
    """The product is exact in float64; the sum is rounded to float64 and then to float32."""
    return (a.astype(F64) * np.asarray(b).astype(F64) + np.asarray(c).astype(F64)).astype(F32)


def flush(x):
    """``.ftz``: subnormal float32 becomes a zero of its sign."""
    return np.where(np.abs(x) < F32(2.0**-126), np.copysign(F32(0), x), x)


def from_bf16(bits):
    return (np.asarray(bits).astype(U32) << U32(16)).view(F32)


def to_bf16(x):
    """Round to nearest, ties to even; NaN becomes 0x7fff as on the GPU."""
    x = np.ascontiguousarray(x, F32)
    u = x.view(U32)
    r = ((u + U32(0x7FFF) + ((u >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    return np.where(np.isnan(x), U16(0x7FFF), r)


def to_f16(x):
    return np.asarray(x).astype(F16).view(U16)


def to_tf32(x):
    """``cvt.rna.tf32``: round to nearest, ties away from zero, to 10 bits of mantissa."""
    u = np.ascontiguousarray(x).view(U32)
    return np.where(np.isnan(x), U32(0x7FFFFFFF), (u + U32(0x1000)) & U32(0xFFFFE000))


def saturating(x, kind, low, high):
    """``cvt.rzi``: to an integer, towards zero; NaN gives 0."""
    x = np.asarray(x).astype(F64)
    y = np.where(np.isnan(x), 0, np.clip(np.trunc(x), low, high))
    over = y >= float(high)  # float64 rounds the greatest 64-bit integers up
    return np.where(over, kind(high), np.where(over, 0, y).astype(kind))


def widen(bits, kind):
    """Operands of the matrix instructions as float32; of tf32 the lowest 13 bits are ignored."""
    if kind == "bf16":
        return from_bf16(bits)
    if kind == "f16":
        return bits.view(F16).astype(F32)
    if kind == "tf32":
        return (bits & U32(0xFFFFE000)).view(F32)
    raise NotImplementedError(f"matrix operands of type {kind}")
