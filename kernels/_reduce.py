"""The second pass of every split reduction: fp32 partial sums to tensors, in an order that never changes.

The partial sums of a weight's gradient and of its bias's are rows of one matrix, so that one launch adds up both.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import _launch

_TILE = 2048  # elements of one tile: 16 a thread at 4 warps, loaded 16 bytes at a time where the columns allow
_TALL = 512, 16  # rows and columns of a tile where few programs walk many rows, each step waiting for memory once
_COLUMNS, _COLUMN_TILE = 64, 64 * 32  # of one program that sums columns; elements of a step of each of its warps


@triton.jit
def sum_columns(y_ptr, out_ptr, q0, row, rows_end, Q, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr):
    """out[q] = sum of y[row : rows_end, q] for BLOCK_Q columns of a matrix of Q columns; fixed order.

    A bias gradient's first pass. It has programs of its own in the launch of the weight gradient, which brings the same
    matrix to the L2 cache: sums inside the product's loop would make it wait for each product.
    """
    offs_q = q0 + tl.arange(0, BLOCK_Q)
    q_mask = offs_q < Q
    acc = tl.zeros((BLOCK_R, BLOCK_Q), tl.float32)
    for first in range(row, rows_end, BLOCK_R):
        offs_r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (offs_r < rows_end)[:, None] & q_mask[None, :]
        acc += tl.load(y_ptr + offs_r[:, None] * Q + offs_q[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_q, tl.sum(acc, axis=0), mask=q_mask)


def column_tile(columns: int, num_warps: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_Q) of :func:`sum_columns`: 16 KiB in flight and more, a multiprocessor's share of the memory."""
    block_q = min(_COLUMNS, _launch.next_power_of_2(columns))
    return _COLUMN_TILE * num_warps // block_q, block_q


@triton.jit
def sum_rows(partial_ptr, splits, row_size, offs_m, m_mask, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr):
    """sum_s partial[s, m]: row s goes to lane s % BLOCK_S in rising order, then the lanes are summed."""
    offs_s = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_S, BLOCK_M), tl.float32)
    for first in range(0, splits, BLOCK_S):
        rows = (first + offs_s).to(tl.int64)
        mask = (rows < splits)[:, None] & m_mask[None, :]
        acc += tl.load(partial_ptr + rows[:, None] * row_size + offs_m[None, :], mask=mask, other=0.0)
    if BLOCK_S > 32:
        # In two steps, because the interpreter adds one row after another: the error of 512 additions shows.
        acc = tl.sum(tl.reshape(acc, (32, BLOCK_S // 32, BLOCK_M)), axis=1)
    return tl.sum(acc, axis=0)


@triton.jit
def add_rows(pid, partial_ptr, out_ptr, bias_ptr, splits, M, row_size, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr):
    """out[m] = sum_s partial[s, m] of the first M columns; bias[m - M] that of the others, up to ``row_size``."""
    offs_m = pid.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    sums = sum_rows(partial_ptr, splits, row_size, offs_m, offs_m < row_size, BLOCK_S, BLOCK_M)
    sums = sums.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m, sums, mask=offs_m < M)
    if bias_ptr is not None:
        tl.store(bias_ptr + offs_m - M, sums, mask=(offs_m >= M) & (offs_m < row_size))


@triton.jit
def sum_splits_kernel(partial_ptr, out_ptr, bias_ptr, splits, M, row_size, BLOCK_S: tl.constexpr,
                      BLOCK_M: tl.constexpr):
    """:func:`add_rows` of a tile of columns."""
    add_rows(tl.program_id(0), partial_ptr, out_ptr, bias_ptr, splits, M, row_size, BLOCK_S, BLOCK_M)


def sum_splits(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sums contiguous fp32 ``partial`` (S, \\*shape) over S into a tensor of ``shape`` and ``dtype``.

    The order of the additions depends on the shape alone, so equal inputs give equal bits. S = 0 gives zeros.
    """
    out, _ = sum_gradients(partial.flatten(1), tuple(partial.shape[1:]), dtype)
    return out


def sum_gradients(partial: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """(dw of ``shape``, db) in ``dtype`` of fp32 ``partial`` (S, M + B), whose rows hold dw's M elements, then db's B.

    In the order of :func:`sum_splits`.
    """
    splits, row_size = partial.shape
    size = math.prod(shape)
    out = _launch.empty(shape, dtype, partial.device)
    bias = _launch.empty((row_size - size,), dtype, partial.device)
    block_s = 4 if splits <= 8 else 32
    block_m, num_warps = _TILE // block_s, 4
    if splits >= _TALL[0] and row_size <= _TILE:
        (block_s, block_m), num_warps = _TALL, 8
    _launch.launch(sum_splits_kernel, (_launch.cdiv(row_size, block_m),), partial, out,
                   bias if bias.numel() else None, splits, size, row_size, BLOCK_S=block_s, BLOCK_M=block_m,
                   num_warps=num_warps)
    return out, bias
