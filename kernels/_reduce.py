"""The second pass of every split reduction: fp32 partial sums to one tensor, in an order that never changes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch

_TILE = 2048  # elements of one tile: 16 a thread at 4 warps, loaded 16 bytes at a time where the columns allow
_TALL = 512, 16  # rows and columns of a tile where few programs walk many rows, each step waiting for memory once


@triton.jit
def sum_splits_kernel(partial_ptr, out_ptr, splits, M, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr):
    """out[m] = sum_s partial[s, m]: row s goes to lane s % BLOCK_S in rising order, then the lanes are summed."""
    offs_s = tl.arange(0, BLOCK_S)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = offs_m < M
    acc = tl.zeros((BLOCK_S, BLOCK_M), tl.float32)
    for first in range(0, splits, BLOCK_S):
        rows = (first + offs_s).to(tl.int64)
        mask = (rows < splits)[:, None] & m_mask[None, :]
        acc += tl.load(partial_ptr + rows[:, None] * M + offs_m[None, :], mask=mask, other=0.0)
    if BLOCK_S > 32:
        # In two steps, because the interpreter adds one row after another: the error of 512 additions shows.
        acc = tl.sum(tl.reshape(acc, (32, BLOCK_S // 32, BLOCK_M)), axis=1)
    tl.store(out_ptr + offs_m, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=m_mask)


def sum_splits(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sums contiguous fp32 ``partial`` (S, \\*shape) over S into a tensor of ``shape`` and ``dtype``.

    The order of the additions depends on the shape alone, so equal inputs give equal bits. S = 0 gives zeros.
    """
    splits = partial.shape[0]
    out = _launch.empty(tuple(partial.shape[1:]), dtype, partial.device)
    block_s = 4 if splits <= 8 else 32
    block_m, num_warps = _TILE // block_s, 4
    if splits >= _TALL[0] and out.numel() <= _TILE:
        (block_s, block_m), num_warps = _TALL, 8
    _launch.launch(
        sum_splits_kernel, (_launch.cdiv(out.numel(), block_m),), partial, out, splits, out.numel(),
        BLOCK_S=block_s, BLOCK_M=block_m, num_warps=num_warps,
    )  # fmt: skip
    return out
