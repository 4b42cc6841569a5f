"""Weight and bias gradient of the stride-2 transposed convolution of ``_stride2``: a product over all pixels, split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _launch
from ._stride2 import load_tile, phase_view, stack_images

_PROGRAMS = 264  # two programs for each of an H100's 132 multiprocessors


@dataclass(frozen=True)
class WeightGradConfig:
    """Tile: ``block_in`` by ``block_out`` channels, reduced over ``block_h * block_w`` low-resolution pixels a step.

    ``bulk`` loads through tensor descriptors, else by pointers.
    """

    block_h: int
    block_w: int
    block_in: int
    block_out: int
    num_warps: int
    num_stages: int
    bulk: bool


@triton.jit
def stride2_weight_grad_kernel(
    x_ptr, dy, partial_ptr, partial_bias_ptr, H, W, C_in, C_out, tiles_h, tiles_w, tiles, tiles_a_split,
    blocks_in, blocks_out, stride_in, stride_out, stride_tap,
    SIDE: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """partial[split, ci, co, (r, s)] = sum over the split's pixels of x[n, i, j, ci] dy[n, 2i - 1 + r, 2j - 1 + s, co].

    A program holds one tap row r, so that one tile of x meets the two or three taps of it. The programs of the first
    block of C_in also sum dy: those of r = 1 and 2 hold row phases 0 and 1, each column once in taps s = 1 and 2.
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    r = pid % SIDE + 3 - SIDE
    block = pid // SIDE
    ci0, co0 = (block % blocks_in) * BLOCK_IN, (block // blocks_in) * BLOCK_OUT
    sums_bias = (ci0 == 0) & (r > 0)
    left = tl.zeros((BLOCK_IN, BLOCK_OUT), tl.float32)
    even = tl.zeros((BLOCK_IN, BLOCK_OUT), tl.float32)
    odd = tl.zeros((BLOCK_IN, BLOCK_OUT), tl.float32)
    bias = tl.zeros((BLOCK_OUT,), tl.float32)
    first = split * tiles_a_split
    for tile in range(first, tl.minimum(first + tiles_a_split, tiles)):
        h, w, n = ((tile // tiles_w) % tiles_h) * BLOCK_H, (tile % tiles_w) * BLOCK_W, tile // (tiles_w * tiles_h)
        # A reshaped box reaches the product without a detour only as its right operand: x comes by pointers
        x = load_tile(x_ptr, n, h, 0, w, ci0, H, W, C_in, C_in, 1, BLOCK_H, BLOCK_W, BLOCK_IN, False)
        i, a = h + (r + 1) // 2 - 1, (r + 1) % 2
        g1 = load_tile(dy, n, i, a, w, co0, H, W, 2 * C_out, C_out, 2, BLOCK_H, BLOCK_W, BLOCK_OUT, BULK)
        g2 = load_tile(
            dy, n, i, a, w, C_out + co0, H, W, 2 * C_out, 2 * C_out, 2, BLOCK_H, BLOCK_W, BLOCK_OUT, BULK
        )  # fmt: skip
        even = _launch.mma(x.T, g1, even, PRECISION)
        odd = _launch.mma(x.T, g2, odd, PRECISION)
        if SIDE == 3:
            g0 = load_tile(
                dy, n, i, a, w - 1, C_out + co0, H, W, 2 * C_out, 2 * C_out, 2, BLOCK_H, BLOCK_W, BLOCK_OUT, BULK
            )  # fmt: skip
            left = _launch.mma(x.T, g0, left, PRECISION)
        if HAS_BIAS:  # noqa: SIM102 (a compile-time and a run-time condition)
            if sums_bias:
                bias += tl.sum(g1.to(tl.float32), axis=0) + tl.sum(g2.to(tl.float32), axis=0)

    offs_in, offs_out = ci0 + tl.arange(0, BLOCK_IN), co0 + tl.arange(0, BLOCK_OUT)
    mask = (offs_in < C_in)[:, None] & (offs_out < C_out)[None, :]
    size = SIDE * SIDE * C_in * C_out
    tap = (pid % SIDE) * SIDE
    out = partial_ptr + split.to(tl.int64) * size + offs_in[:, None] * stride_in + offs_out[None, :] * stride_out
    if SIDE == 3:
        tl.store(out + tap * stride_tap, left, mask=mask)
        tap += 1
    tl.store(out + tap * stride_tap, even, mask=mask)
    tl.store(out + (tap + 1) * stride_tap, odd, mask=mask)
    if HAS_BIAS:  # noqa: SIM102
        if sums_bias:
            row = split * 2 + r - 1
            tl.store(partial_bias_ptr + row * C_out + offs_out, bias, mask=offs_out < C_out)


def choose_config(dy: torch.Tensor, c_in: int) -> WeightGradConfig:
    """The heuristic for :func:`partial_sums`, from (C_in, C_out, W) in buckets, dtype and architecture."""
    precision, wide = _launch.dot_precision(dy.dtype), dy.element_size() == 4
    bulk = _launch.architecture() >= 90 and _launch.bulk_copy_fits(dy)
    if precision == "ieee":
        return WeightGradConfig(2, 8, 64, 32, 8, 2, bulk)
    if not bulk:
        return WeightGradConfig(4, 8, 64, 32, 4, 3, False)
    if c_in % 128 or dy.shape[1] % 64:
        return WeightGradConfig(8, 8, 64, 32, 4, 3 if wide else 4, True)
    return WeightGradConfig(4 if wide else 8, 8, 128, 64, 8, 4, True)


def partial_sums(
    dy: torch.Tensor, x: torch.Tensor, has_bias: bool, side: int, in_first: bool, config: WeightGradConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """fp32 partial sums of NHWC ``dy`` (N, C_out, 2H, 2W) and ``x`` (N, C_in, H, W).

    Returns the weight's (splits, C_in, SIDE², C_out) if ``in_first``, else (splits, C_out, SIDE², C_in), and the
    bias's (2 splits, C_out) or None.
    """
    c_in, c_out = x.shape[1], dy.shape[1]
    if side == 2:
        dy, x = stack_images(dy), stack_images(x)
    n, _, h, w = x.shape
    tiles_h, tiles_w = triton.cdiv(h, config.block_h), triton.cdiv(w, config.block_w)
    tiles = n * tiles_h * tiles_w
    blocks_in, blocks_out = triton.cdiv(c_in, config.block_in), triton.cdiv(c_out, config.block_out)
    programs = side * blocks_in * blocks_out
    tiles_a_split = max(1, triton.cdiv(tiles, max(1, _PROGRAMS // programs)))
    splits = triton.cdiv(tiles, tiles_a_split)
    taps, (rows, columns) = side * side, (c_in, c_out) if in_first else (c_out, c_in)
    partial = _launch.empty((splits, rows, taps, columns), torch.float32, x.device)
    partial_bias = _launch.empty((2 * splits, c_out), torch.float32, x.device) if has_bias else None
    stride_in, stride_out = (taps * c_out, 1) if in_first else (1, taps * c_in)
    _launch.launch(
        stride2_weight_grad_kernel, (programs, splits),
        x, phase_view(dy, 2, config, config.block_out), partial, partial_bias, h, w, c_in, c_out,
        tiles_h, tiles_w, tiles, tiles_a_split, blocks_in, blocks_out, stride_in, stride_out, columns,
        SIDE=side, HAS_BIAS=has_bias, PRECISION=_launch.dot_precision(dy.dtype),
        BLOCK_H=config.block_h, BLOCK_W=config.block_w, BLOCK_IN=config.block_in, BLOCK_OUT=config.block_out,
        BULK=config.bulk, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partial, partial_bias
