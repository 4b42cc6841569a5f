"""Tiles of (classes, pixels) in registers, whatever the memory order: what ``sums.py`` and ``regions.py`` share.

``LAYOUT`` names the memory order of one sample's C × S values and how it is read in 16-byte pieces:

- "planes": (C, S), a vector of neighbouring pixels of one class;
- "rows": (S, C), a vector of neighbouring classes of one pixel;
- "packed": (S, C) with a small power of two of classes: a flat vector holds whole pixels;
- "triplets": (S, 3): three flat vectors hold as many pixels as one has elements, told apart in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .. import _launch

_INTERPRETED = tl.constexpr(_launch.INTERPRETED)


@triton.jit
def load_tile(
    ptr, first, S, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, LAYOUT: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """(BLOCK_C, BLOCK_S) float32 from pixel ``first`` of the sample at ``ptr``; 0 beyond the last pixel or class."""
    offs_c = tl.arange(0, BLOCK_C)
    offs_s = first + tl.arange(0, BLOCK_S)
    if LAYOUT == "planes":
        at = ptr + offs_c.to(tl.int64)[:, None] * S + offs_s[None, :]
        x = tl.load(at, mask=(offs_c < C)[:, None] & (offs_s < S)[None, :], other=0.0)
    elif LAYOUT == "rows":
        at = ptr + offs_s.to(tl.int64)[:, None] * C + offs_c[None, :]
        x = tl.load(at, mask=(offs_s < S)[:, None] & (offs_c < C)[None, :], other=0.0).T
    elif LAYOUT == "packed":
        flat = tl.arange(0, BLOCK_S * C)
        x = tl.load(ptr + first.to(tl.int64) * C + flat, mask=flat < tl.minimum(S - first, BLOCK_S) * C, other=0.0)
        x = tl.reshape(x, (BLOCK_S, C)).T
    else:
        flat = _triplet_offsets(BLOCK_S, VECTOR)
        at = ptr + first.to(tl.int64) * 3
        last = tl.minimum(S - first, BLOCK_S) * 3
        a = tl.load(at + flat, mask=flat < last, other=0.0)
        b = tl.load(at + VECTOR + flat, mask=VECTOR + flat < last, other=0.0)
        c = tl.load(at + 2 * VECTOR + flat, mask=2 * VECTOR + flat < last, other=0.0)
        z0, z1, z2 = _channels(a, b, c, BLOCK_S, VECTOR)
        x = tl.join(tl.join(z0, z2), tl.join(z1, tl.zeros_like(z0)))
        x = tl.reshape(x, (BLOCK_S, 4)).T
    return x.to(tl.float32)


@triton.jit
def store_tile(
    ptr, x, first, S, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, LAYOUT: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """The inverse of :func:`load_tile`: writes the values of existing pixels and classes."""
    x = x.to(ptr.dtype.element_ty)
    offs_c = tl.arange(0, BLOCK_C)
    offs_s = first + tl.arange(0, BLOCK_S)
    if LAYOUT == "planes":
        at = ptr + offs_c.to(tl.int64)[:, None] * S + offs_s[None, :]
        tl.store(at, x, mask=(offs_c < C)[:, None] & (offs_s < S)[None, :])
    elif LAYOUT == "rows":
        at = ptr + offs_s.to(tl.int64)[:, None] * C + offs_c[None, :]
        tl.store(at, x.T, mask=(offs_s < S)[:, None] & (offs_c < C)[None, :])
    elif LAYOUT == "packed":
        flat = tl.arange(0, BLOCK_S * C)
        last = tl.minimum(S - first, BLOCK_S) * C
        tl.store(ptr + first.to(tl.int64) * C + flat, tl.reshape(x.T, (BLOCK_S * C,)), mask=flat < last)
    else:
        even, odd = tl.split(tl.reshape(x.T, (BLOCK_S, 2, 2)))
        z0, z2 = tl.split(even)
        z1, _ = tl.split(odd)
        a, b, c = _vectors(z0, z1, z2, BLOCK_S, VECTOR)
        flat = _triplet_offsets(BLOCK_S, VECTOR)
        at = ptr + first.to(tl.int64) * 3
        last = tl.minimum(S - first, BLOCK_S) * 3
        tl.store(at + flat, a, mask=flat < last)
        tl.store(at + VECTOR + flat, b, mask=VECTOR + flat < last)
        tl.store(at + 2 * VECTOR + flat, c, mask=2 * VECTOR + flat < last)


@triton.jit
def load_labels(targets_ptr, first, S, CLASSES: tl.constexpr, BLOCK_S: tl.constexpr, IGNORE: tl.constexpr):
    """Per pixel the class (-1 where it counts nowhere), whether it counts, and whether it is ignored."""
    offs_s = first + tl.arange(0, BLOCK_S)
    inside = offs_s < S
    label = tl.load(targets_ptr + offs_s, mask=inside, other=0)
    if label.dtype != tl.int64:
        label = label.to(tl.int32)
    valid = inside & (label >= 0) & (label < CLASSES)
    ignored = offs_s < 0
    if IGNORE is not None:
        ignored = inside & (label == IGNORE)
        valid &= label != IGNORE
    return tl.where(valid, label, -1).to(tl.int32), valid, ignored


@triton.jit
def folded(x, KEEP: tl.constexpr, LAYOUT: tl.constexpr):
    """(rows, BLOCK_S) summed to (rows, KEEP) within the threads: over neighbours where a vector is made of pixels."""
    if x.shape[1] == KEEP:
        return x
    elif LAYOUT == "rows":
        return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // KEEP, KEEP)), axis=1)
    else:
        return tl.sum(tl.reshape(x, (x.shape[0], KEEP, x.shape[1] // KEEP)), axis=2)


@triton.jit
def folded_pair(x, KEEP: tl.constexpr, LAYOUT: tl.constexpr):
    """:func:`folded` of (rows, BLOCK_S, 2)."""
    if x.shape[1] == KEEP:
        return x
    elif LAYOUT == "rows":
        return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // KEEP, KEEP, 2)), axis=1)
    else:
        return tl.sum(tl.reshape(x, (x.shape[0], KEEP, x.shape[1] // KEEP, 2)), axis=2)


@triton.jit
def _triplet_offsets(BLOCK_S: tl.constexpr, VECTOR: tl.constexpr):
    """(BLOCK_S / VECTOR, VECTOR) offsets of the first of the three vectors that hold VECTOR pixels."""
    return tl.arange(0, BLOCK_S // VECTOR)[:, None] * (3 * VECTOR) + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _channels(a, b, c, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr):
    """The three classes, (BLOCK_S,) each, of pixels stored as vectors a b c of 4 or 8 elements."""
    if VECTOR == 4:
        z0, z1, z2 = _channels_of_four(a, b, c)
    else:
        a, a_high = _halves(a)
        b, b_high = _halves(b)
        c, c_high = _halves(c)
        x0, x1, x2 = _channels_of_four(a, a_high, b)
        y0, y1, y2 = _channels_of_four(b_high, c, c_high)
        z0, z1, z2 = _joined(x0, y0), _joined(x1, y1), _joined(x2, y2)
    return tl.reshape(z0, (BLOCK_S,)), tl.reshape(z1, (BLOCK_S,)), tl.reshape(z2, (BLOCK_S,))


@triton.jit
def _vectors(z0, z1, z2, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr):
    """The inverse of :func:`_channels`."""
    shape: tl.constexpr = (BLOCK_S // VECTOR, VECTOR)
    z0, z1, z2 = tl.reshape(z0, shape), tl.reshape(z1, shape), tl.reshape(z2, shape)
    if VECTOR == 4:
        a, b, c = _vectors_of_four(z0, z1, z2)
    else:
        x0, y0 = _halves(z0)
        x1, y1 = _halves(z1)
        x2, y2 = _halves(z2)
        a, a_high, b = _vectors_of_four(x0, x1, x2)
        b_high, c, c_high = _vectors_of_four(y0, y1, y2)
        a, b, c = _joined(a, a_high), _joined(b, b_high), _joined(c, c_high)
    return a, b, c


@triton.jit
def _channels_of_four(a, b, c):
    """Of four pixels in twelve elements a b c, (groups, 4) each: the three classes, (groups, 4) each."""
    a0, a1, a2, a3 = _elements(a)
    b0, b1, b2, b3 = _elements(b)
    c0, c1, c2, c3 = _elements(c)
    return _vector(a0, a3, b2, c1), _vector(a1, b0, b3, c2), _vector(a2, b1, c0, c3)


@triton.jit
def _vectors_of_four(z0, z1, z2):
    """The inverse of :func:`_channels_of_four`."""
    r0, r1, r2, r3 = _elements(z0)
    g0, g1, g2, g3 = _elements(z1)
    b0, b1, b2, b3 = _elements(z2)
    return _vector(r0, g0, b0, r1), _vector(g1, b1, r2, g2), _vector(b2, r3, g3, b3)


@triton.jit
def _elements(x):
    """(groups, 4) → its four columns."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _vector(x0, x1, x2, x3):
    """Four columns → (groups, 4)."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (x0.shape[0], 4))


@triton.jit
def _halves(x):
    """(groups, 8) → its first and last four columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, 4)), (0, 2, 1)))


@triton.jit
def _joined(low, high):
    """Two (groups, 4) side by side: (groups, 8)."""
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (low.shape[0], 8))


@triton.jit
def fast_exp(x):
    """exp(x), 0 where it is below 1e-38: the numbers for which ``tl.exp`` takes three instructions a value more."""
    if _INTERPRETED:
        return tl.exp(x)
    return libdevice.fast_expf(x)
