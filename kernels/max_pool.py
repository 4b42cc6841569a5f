"""2x2 max-pooling with stride 2 (odd sizes floor), and its gradient without an index tensor.

Both kernels are bound by memory: every element is read once and written once. A program walks along one row of
windows in vectors of ``VECTOR`` channels, the widest power of two up to 16 bytes that divides C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _launch, _tuned


@dataclass(frozen=True)
class MaxPoolConfig:
    """Vectors of one program and its warps."""

    block: int
    num_warps: int = 4


def choose_config(row_vectors: int, dtype: torch.dtype, backward: bool) -> MaxPoolConfig:
    """The committed winner for rows of ``row_vectors`` channel vectors, else a heuristic.

    A thread of the backward pass holds nine vectors at once, so its tiles stay small.
    """
    block = 128 if backward or row_vectors <= 128 else 256
    key = (_launch.next_power_of_2(row_vectors), dtype, backward)
    return _tuned.choose("max_pool", key, MaxPoolConfig, lambda: MaxPoolConfig(block))


@triton.jit
def max_pool_forward_kernel(
    x_ptr, y_ptr, H, W, out_h, out_w, groups, tiles, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """y[n,i,j,c] = max of the four x[n, 2i + (0, 1), 2j + (0, 1), c]; C = groups * VECTOR."""
    row = tl.program_id(0) // tiles
    n, i = row // out_h, row % out_h
    vector = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    j, group = vector // groups, vector % groups
    C = groups * VECTOR
    lane = tl.arange(0, VECTOR)
    mask = (j < out_w)[:, None]

    top = x_ptr + (n.to(tl.int64) * H + 2 * i) * W * C + ((2 * j * groups + group) * VECTOR)[:, None] + lane[None, :]
    below = tl.cast(W, tl.int64) * C
    x00 = tl.load(top, mask=mask, other=0.0).to(tl.float32)
    x01 = tl.load(top + C, mask=mask, other=0.0).to(tl.float32)
    x10 = tl.load(top + below, mask=mask, other=0.0).to(tl.float32)
    x11 = tl.load(top + below + C, mask=mask, other=0.0).to(tl.float32)
    upper = tl.maximum(x00, x01, propagate_nan=tl.PropagateNan.ALL)
    lower = tl.maximum(x10, x11, propagate_nan=tl.PropagateNan.ALL)
    y = tl.maximum(upper, lower, propagate_nan=tl.PropagateNan.ALL)
    out = y_ptr + row.to(tl.int64) * out_w * C + (vector * VECTOR)[:, None] + lane[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def first_maximum(y00, y01, y10, y11):
    """Which of the four PyTorch takes: it scans in row-major order and moves on for a greater value or any NaN."""
    take01 = (y01 > y00) | (y01 != y01)
    largest = tl.where(take01, y01, y00)
    take10 = (y10 > largest) | (y10 != y10)
    largest = tl.where(take10, y10, largest)
    take11 = (y11 > largest) | (y11 != y11)
    take10 = take10 & (take11 == 0)
    take01 = take01 & ((take10 | take11) == 0)
    return (take01 | take10 | take11) == 0, take01, take10, take11


@triton.jit
def _gradient(at, skip_at, taken, d_pool, y, mask, HAS_SKIP: tl.constexpr, SLOPE: tl.constexpr):
    """Writes (d_skip + d_pool where taken), times the derivative of the activation, at one corner of the windows."""
    d = tl.where(taken, d_pool, 0.0)
    if HAS_SKIP:
        d += tl.load(skip_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, _launch.activation_gradient(d, y, SLOPE).to(at.dtype.element_ty), mask=mask)


@triton.jit
def max_pool_backward_kernel(
    d_pool_ptr, d_skip_ptr, y_ptr, dz_ptr, H, W, groups, tiles,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, HAS_SKIP: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """One row of windows, the incomplete ones of odd sizes included; y is the pool's input, C = groups * VECTOR."""
    row = tl.program_id(0) // tiles
    windows_h = tl.cdiv(H, 2)
    n, i = (row // windows_h).to(tl.int64), row % windows_h
    vector = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    j, group = vector // groups, vector % groups
    C = groups * VECTOR
    lane = tl.arange(0, VECTOR)
    lower_W = tl.where(2 * i + 1 < H, W, 0)
    m00, m01 = (2 * j < W)[:, None], (2 * j + 1 < W)[:, None]
    m10, m11 = (2 * j < lower_W)[:, None], (2 * j + 1 < lower_W)[:, None]

    at00 = (n * H + 2 * i) * W * C + ((2 * j * groups + group) * VECTOR)[:, None] + lane[None, :]
    at10 = at00 + tl.cast(W, tl.int64) * C
    y00 = tl.load(y_ptr + at00, mask=m00, other=0.0).to(tl.float32)
    y01 = tl.load(y_ptr + at00 + C, mask=m01, other=0.0).to(tl.float32)
    y10 = tl.load(y_ptr + at10, mask=m10, other=0.0).to(tl.float32)
    y11 = tl.load(y_ptr + at10 + C, mask=m11, other=0.0).to(tl.float32)
    pooled_at = (n * (H // 2) + i) * (W // 2) * C + (vector * VECTOR)[:, None] + lane[None, :]
    d_pool = tl.load(d_pool_ptr + pooled_at, mask=m11, other=0.0).to(tl.float32)

    take00, take01, take10, take11 = first_maximum(y00, y01, y10, y11)
    _gradient(dz_ptr + at00, d_skip_ptr + at00, take00, d_pool, y00, m00, HAS_SKIP, SLOPE)
    _gradient(dz_ptr + at00 + C, d_skip_ptr + at00 + C, take01, d_pool, y01, m01, HAS_SKIP, SLOPE)
    _gradient(dz_ptr + at10, d_skip_ptr + at10, take10, d_pool, y10, m10, HAS_SKIP, SLOPE)
    _gradient(dz_ptr + at10 + C, d_skip_ptr + at10 + C, take11, d_pool, y11, m11, HAS_SKIP, SLOPE)


def forward(x: torch.Tensor, config: MaxPoolConfig | None = None) -> torch.Tensor:
    """The maximum of each 2x2 window of ``x`` (N, C, H, W): (N, C, H // 2, W // 2), NaN wins as in PyTorch.

    Raises:
        ValueError: H or W is 1, so that no window fits.
    """
    n, c, h, w = x.shape
    if h < 2 or w < 2:
        raise ValueError(f"max_pool: an image of {h}x{w} pixels holds no 2x2 window")
    x = _launch.channels_last(x)
    y = _launch.empty_image((n, c, h // 2, w // 2), x.dtype, x.device)
    pool_into(x, y, config)
    return y


def pool_into(x: torch.Tensor, y: torch.Tensor, config: MaxPoolConfig | None = None) -> None:
    """:func:`forward` of an image in NHWC memory to ``y``."""
    n, c, h, w = x.shape
    vector = _launch.vector_width(x)
    groups = c // vector
    config = config or choose_config(w // 2 * groups, x.dtype, backward=False)
    tiles = _launch.cdiv(w // 2 * groups, config.block)
    _launch.launch(
        max_pool_forward_kernel, (n * (h // 2) * tiles,), x, y, h, w, h // 2, w // 2, groups, tiles,
        BLOCK=config.block, VECTOR=vector, num_warps=config.num_warps,
    )  # fmt: skip


def backward(
    d_pool: torch.Tensor,
    d_skip: torch.Tensor | None,
    y: torch.Tensor,
    slope: float,
    config: MaxPoolConfig | None = None,
) -> torch.Tensor:
    """dz = (d_skip + unpool(d_pool, y)) times the derivative of the activation that gave y, in one pass.

    ``y`` (N, C, H, W) is the pool's input, which is where the first maximum of each window is found again; ``d_pool``
    is (N, C, H // 2, W // 2); ``d_skip`` like ``y``, or None for zero. An odd last row or column gets d_skip alone.

    Raises:
        ValueError: the shapes do not belong together.
    """
    n, c, h, w = y.shape
    if d_pool.shape != (n, c, h // 2, w // 2) or (d_skip is not None and d_skip.shape != y.shape):
        skip = "" if d_skip is None else f" and {tuple(d_skip.shape)}"
        raise ValueError(f"max_pool backward: gradients {tuple(d_pool.shape)}{skip} for an input {tuple(y.shape)}")
    y, d_pool = _launch.channels_last(y), _launch.channels_last(d_pool)
    d_skip_or_y = y if d_skip is None else _launch.channels_last(d_skip)
    dz = _launch.empty_image((n, c, h, w), y.dtype, y.device)
    vector = _launch.vector_width(y)
    groups, windows_h, windows_w = c // vector, _launch.cdiv(h, 2), _launch.cdiv(w, 2)
    config = config or choose_config(windows_w * groups, y.dtype, backward=True)
    tiles = _launch.cdiv(windows_w * groups, config.block)
    _launch.launch(
        max_pool_backward_kernel, (n * windows_h * tiles,), d_pool, d_skip_or_y, y, dz, h, w, groups, tiles,
        BLOCK=config.block, VECTOR=vector, HAS_SKIP=d_skip is not None, SLOPE=slope, num_warps=config.num_warps,
    )  # fmt: skip
    return dz
