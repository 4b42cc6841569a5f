"""Weight and bias gradient of the stride-2 transposed convolution of ``_stride2``: a product over all pixels, split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _launch, _tuned
from ._reduce import column_tile, sum_columns
from ._stride2 import bulk_copies_fit, key_of, load_tile, phase_view, stack_images
from .conv.cost import device

_PROGRAMS = 2  # for each multiprocessor


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
def sum_products(
    x, dy, partial_ptr, r, first, tiles_end, ci0, co0, shape, tiles, strides,
    SIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BULK: tl.constexpr,
    X_BULK: tl.constexpr,
):  # fmt: skip
    """partial[ci, co, (r, s)] = sum of x[n, i, j, ci] dy[n, 2i - 1 + r, 2j - 1 + s, co], for one tap row r.

    ``shape`` is (H, W, C_in, C_out), ``tiles`` their number along (h, w), ``strides`` those of partial along ci, co and
    the tap.
    """
    H, W, C_in, C_out = shape
    tiles_h, tiles_w = tiles
    stride_in, stride_out, stride_tap = strides
    left = tl.zeros((BLOCK_IN, BLOCK_OUT), tl.float32)
    even = tl.zeros((BLOCK_IN, BLOCK_OUT), tl.float32)
    odd = tl.zeros((BLOCK_IN, BLOCK_OUT), tl.float32)
    Q = 2 * C_out
    for tile in range(first, tiles_end):
        h, w, n = ((tile // tiles_w) % tiles_h) * BLOCK_H, (tile % tiles_w) * BLOCK_W, tile // (tiles_w * tiles_h)
        # 16-bit x comes by pointers: as left operand a reshaped box would pass through registers, as all fp32 does
        x_tile = load_tile(x, n, h, 0, w, ci0, H, W, C_in, C_in, 1, BLOCK_H, BLOCK_W, BLOCK_IN, X_BULK).T
        i, a = h + (r + 1) // 2 - 1, (r + 1) % 2
        g1 = load_tile(dy, n, i, a, w, co0, H, W, Q, C_out, 2, BLOCK_H, BLOCK_W, BLOCK_OUT, BULK)
        g2 = load_tile(dy, n, i, a, w, C_out + co0, H, W, Q, Q, 2, BLOCK_H, BLOCK_W, BLOCK_OUT, BULK)
        even = _launch.mma(x_tile, g1, even, PRECISION)
        odd = _launch.mma(x_tile, g2, odd, PRECISION)
        if SIDE == 3:
            g0 = load_tile(dy, n, i, a, w - 1, C_out + co0, H, W, Q, Q, 2, BLOCK_H, BLOCK_W, BLOCK_OUT, BULK)
            left = _launch.mma(x_tile, g0, left, PRECISION)

    offs_in, offs_out = ci0 + tl.arange(0, BLOCK_IN), co0 + tl.arange(0, BLOCK_OUT)
    mask = (offs_in < C_in)[:, None] & (offs_out < C_out)[None, :]
    out = partial_ptr + offs_in[:, None] * stride_in + offs_out[None, :] * stride_out
    out += (r + SIDE - 3) * SIDE * stride_tap
    if SIDE == 3:
        tl.store(out, left, mask=mask)
        out += stride_tap
    tl.store(out, even, mask=mask)
    tl.store(out + stride_tap, odd, mask=mask)


@triton.jit
def stride2_weight_grad_kernel(
    x, dy, summed_ptr, partial_ptr, row_size, shape, tiles, all_tiles, summed, blocks, strides,
    SIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BULK: tl.constexpr, X_BULK: tl.constexpr,
):  # fmt: skip
    """Partial sums of one split. Those of axis 0 hold a tap row and a block of channels each, the last ones the bias.

    The bias is the sum of ``summed_ptr``, a matrix of ``summed`` (rows, those of a split, columns). ``all_tiles`` are
    (their number, those of a split), ``blocks`` of channels (in, out); for the others see :func:`sum_products`.
    """
    _, _, C_in, C_out = shape
    blocks_in, blocks_out = blocks
    pid, split = tl.program_id(0), tl.program_id(1)
    partial_ptr += split.to(tl.int64) * row_size
    block = pid // SIDE
    if block < blocks_in * blocks_out:
        first = split * all_tiles[1]
        sum_products(
            x, dy, partial_ptr, pid % SIDE + 3 - SIDE, first, tl.minimum(first + all_tiles[1], all_tiles[0]),
            (block % blocks_in) * BLOCK_IN, (block // blocks_in) * BLOCK_OUT, shape, tiles, strides,
            SIDE, PRECISION, BLOCK_H, BLOCK_W, BLOCK_IN, BLOCK_OUT, BULK, X_BULK,
        )  # fmt: skip
    else:
        rows, rows_a_split, columns = summed
        row = split * rows_a_split
        q0 = (pid - SIDE * blocks_in * blocks_out) * BLOCK_Q
        out_ptr = partial_ptr + SIDE * SIDE * C_in * C_out
        sum_columns(summed_ptr, out_ptr, q0, row, tl.minimum(row + rows_a_split, rows), columns, BLOCK_R, BLOCK_Q)


def choose_config(dy: torch.Tensor, x: torch.Tensor, side: int) -> WeightGradConfig:
    """The committed winner for :func:`partial_sums` on this GPU, else a heuristic."""
    fits = bulk_copies_fit(x, dy)
    return _tuned.choose(
        "stride2_weight_grad", key_of(x, dy.shape[1], side), WeightGradConfig,
        lambda: _heuristic(dy, x, side, fits), lambda config: fits or not config.bulk,
    )  # fmt: skip


def _heuristic(dy: torch.Tensor, x: torch.Tensor, side: int, fits: bool) -> WeightGradConfig:
    wide, architecture = x.element_size() == 4, _launch.architecture()
    if _launch.dot_precision(x.dtype) == "ieee":
        return WeightGradConfig(4, 8, 32, 16, 4, 2, fits)
    if not fits:  # asynchronous copies would bring the transposed operand in pieces of 4 bytes where they are 32-bit
        return WeightGradConfig(2 if wide else 4, 8, 64, 32, 4, 1 if wide else 3, False)
    if x.shape[1] % 128 or dy.shape[1] % 64:
        return WeightGradConfig(8, 8, 64, 32, 4, 3 if wide else 4, True)
    if side == 3 and architecture < 100:  # a third accumulator of 128 rows spills in four warps, and makes eight wait
        return WeightGradConfig(4 if wide else 8, 8, 64, 64, 4, 3, True)
    # from compute capability 10.0 on accumulators are not in registers, and eight warps leave each thread too few
    return WeightGradConfig(4 if wide else 8, 8, 128, 64, 4 if architecture >= 100 else 8, 4, True)


def partial_sums(
    dy: torch.Tensor, x: torch.Tensor, summed: torch.Tensor | None, side: int, in_first: bool,
    config: WeightGradConfig,
) -> torch.Tensor:  # fmt: skip
    """fp32 partial sums of NHWC ``dy`` (N, C_out, 2H, 2W) and ``x`` (N, C_in, H, W), a row for each split.

    A row is the weight's (C_in, SIDE², C_out) if ``in_first``, else (C_out, SIDE², C_in), then the sum of all pixels of
    ``summed``, which is one of both, unless None.
    """
    c_in, c_out = x.shape[1], dy.shape[1]
    if side == 2:
        dy, x = stack_images(dy), stack_images(x)
    n, _, h, w = x.shape
    tiles_h, tiles_w = _launch.cdiv(h, config.block_h), _launch.cdiv(w, config.block_w)
    tiles = n * tiles_h * tiles_w
    blocks_in, blocks_out = _launch.cdiv(c_in, config.block_in), _launch.cdiv(c_out, config.block_out)
    programs = side * blocks_in * blocks_out
    tiles_a_split = max(1, _launch.cdiv(tiles, max(1, _PROGRAMS * device().multiprocessors // programs)))
    splits = _launch.cdiv(tiles, tiles_a_split)
    columns = 0 if summed is None else summed.shape[1]
    rows = summed.numel() // columns if columns else 0
    block_r, block_q = column_tile(max(1, columns), config.num_warps)
    taps = side * side
    partial = _launch.empty((splits, c_in * taps * c_out + columns), torch.float32, x.device)
    strides = (taps * c_out, 1, c_out) if in_first else (1, taps * c_in, c_in)
    x_bulk = config.bulk and x.element_size() == 4
    _launch.launch(
        stride2_weight_grad_kernel, (programs + _launch.cdiv(columns, block_q), splits),
        phase_view(x, 1, config, config.block_in) if x_bulk else x, phase_view(dy, 2, config, config.block_out),
        partial if summed is None else summed, partial, partial.shape[1], (h, w, c_in, c_out), (tiles_h, tiles_w),
        (tiles, tiles_a_split), (rows, _launch.cdiv(rows, max(1, splits)), columns), (blocks_in, blocks_out), strides,
        SIDE=side, PRECISION=_launch.dot_precision(dy.dtype),
        BLOCK_H=config.block_h, BLOCK_W=config.block_w, BLOCK_IN=config.block_in, BLOCK_OUT=config.block_out,
        BLOCK_R=block_r, BLOCK_Q=block_q, BULK=config.bulk, X_BULK=x_bulk, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return partial
