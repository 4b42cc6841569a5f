"""Weight and bias gradient of the stride-2 transposed convolution of ``_stride2``: a product over all pixels, split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _launch, _tuned
from ._stride2 import bulk_copies_fit, key_of, load_tile, phase_view, stack_images
from .conv.cost import device

_PROGRAMS = 2  # for each multiprocessor
_BLOCK_Q = 64  # columns of one program that sums the bias


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
def sum_columns(y_ptr, out_ptr, q0, row, rows_end, Q, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr):
    """out[q] = sum of y[row : rows_end, q] for BLOCK_Q columns of a matrix of Q columns; fixed order."""
    offs_q = q0 + tl.arange(0, BLOCK_Q)
    q_mask = offs_q < Q
    acc = tl.zeros((BLOCK_R, BLOCK_Q), tl.float32)
    for first in range(row, rows_end, BLOCK_R):
        offs_r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (offs_r < rows_end)[:, None] & q_mask[None, :]
        acc += tl.load(y_ptr + offs_r[:, None] * Q + offs_q[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_q, tl.sum(acc, axis=0), mask=q_mask)


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
    x, dy, dy_ptr, partial_ptr, partial_bias_ptr, shape, tiles, all_tiles, rows, blocks, strides,
    SIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BULK: tl.constexpr, X_BULK: tl.constexpr,
):  # fmt: skip
    """Partial sums of one split. Those of axis 0 hold a tap row and a block of channels each, the last ones the bias.

    The bias sums have programs of their own because a branch inside the product's loop makes it wait for each product.
    They read dy (``dy_ptr``) as a matrix of 2 C_out columns, while the products bring it to the L2 cache. ``all_tiles``
    and ``rows`` of that matrix are (their number, those of a split), ``blocks`` of channels (in, out); for the others
    see :func:`sum_products`.
    """
    _, _, C_in, C_out = shape
    blocks_in, blocks_out = blocks
    pid, split = tl.program_id(0), tl.program_id(1)
    block = pid // SIDE
    if block < blocks_in * blocks_out:
        first = split * all_tiles[1]
        sum_products(
            x, dy, partial_ptr + split.to(tl.int64) * SIDE * SIDE * C_in * C_out, pid % SIDE + 3 - SIDE,
            first, tl.minimum(first + all_tiles[1], all_tiles[0]),
            (block % blocks_in) * BLOCK_IN, (block // blocks_in) * BLOCK_OUT, shape, tiles, strides,
            SIDE, PRECISION, BLOCK_H, BLOCK_W, BLOCK_IN, BLOCK_OUT, BULK, X_BULK,
        )  # fmt: skip
    else:
        row = split * rows[1]
        q0 = (pid - SIDE * blocks_in * blocks_out) * BLOCK_Q
        out_ptr = partial_bias_ptr + split * 2 * C_out
        sum_columns(dy_ptr, out_ptr, q0, row, tl.minimum(row + rows[1], rows[0]), 2 * C_out, 64, BLOCK_Q)


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
    tiles_h, tiles_w = _launch.cdiv(h, config.block_h), _launch.cdiv(w, config.block_w)
    tiles = n * tiles_h * tiles_w
    blocks_in, blocks_out = _launch.cdiv(c_in, config.block_in), _launch.cdiv(c_out, config.block_out)
    programs = side * blocks_in * blocks_out
    tiles_a_split = max(1, _launch.cdiv(tiles, max(1, _PROGRAMS * device().multiprocessors // programs)))
    splits = _launch.cdiv(tiles, tiles_a_split)
    rows = 2 * n * h * w
    taps, (first, last) = side * side, (c_in, c_out) if in_first else (c_out, c_in)
    partial = _launch.empty((splits, first, taps, last), torch.float32, x.device)
    partial_bias = _launch.empty((2 * splits, c_out), torch.float32, x.device) if has_bias else None
    stride_in, stride_out = (taps * c_out, 1) if in_first else (1, taps * c_in)
    x_bulk = config.bulk and x.element_size() == 4
    bias_programs = _launch.cdiv(2 * c_out, _BLOCK_Q) if has_bias else 0
    _launch.launch(
        stride2_weight_grad_kernel, (programs + bias_programs, splits),
        phase_view(x, 1, config, config.block_in) if x_bulk else x, phase_view(dy, 2, config, config.block_out), dy,
        partial, partial_bias if has_bias else partial, (h, w, c_in, c_out), (tiles_h, tiles_w), (tiles, tiles_a_split),
        (rows, _launch.cdiv(rows, max(1, splits))), (blocks_in, blocks_out), (stride_in, stride_out, last),
        SIDE=side, PRECISION=_launch.dot_precision(dy.dtype),
        BLOCK_H=config.block_h, BLOCK_W=config.block_w, BLOCK_IN=config.block_in, BLOCK_OUT=config.block_out,
        BLOCK_Q=_BLOCK_Q, BULK=config.bulk, X_BULK=x_bulk, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partial, partial_bias
