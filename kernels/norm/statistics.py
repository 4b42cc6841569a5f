"""Mean and biased variance over the pixels of NHWC images: Welford's sums by each program, merged in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _launch
from .tiles import NormConfig, choose_config, shares

_BLOCK = 512


@triton.jit
def norm_statistics_kernel(
    z_ptr, partial_ptr, rows, C, rows_a_share, splits, plane,
    VECTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[0 | 1, s, c, split] = mean | sum of squared distances from it, of the split's rows of z [S, rows, C].

    Each of the BLOCK_P lanes runs Welford's recurrence over its rows; the lanes are merged at the end.
    """
    C = C // VECTOR * VECTOR  # shows the compiler that it may load VECTOR elements at once
    blocks_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    split, s = pid // blocks_c % splits, (pid // blocks_c // splits).to(tl.int64)
    c_mask = offs_c < C
    begin = split * rows_a_share
    end = tl.minimum(begin + rows_a_share, rows)
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    count = tl.zeros((BLOCK_P,), tl.float32)
    for first in range(begin, end, BLOCK_P):
        row = first + tl.arange(0, BLOCK_P)
        inside = row < end
        z = tl.load(z_ptr + (s * rows + row)[:, None] * C + offs_c[None, :],
                    mask=inside[:, None] & c_mask[None, :], other=0.0).to(tl.float32)
        count += inside.to(tl.float32)
        delta = tl.where(inside[:, None], z - mean, 0.0)
        mean += delta * (1 / tl.maximum(count, 1.0))[:, None]
        squares += delta * (z - mean)
    total = (end - begin).to(tl.float32)
    merged = tl.sum(mean * (count / total)[:, None], axis=0)
    off = mean - merged[None, :]
    squares = tl.sum(squares + off * off * count[:, None], axis=0)
    at = (s * C + offs_c) * splits + split
    tl.store(partial_ptr + at, merged, mask=c_mask)
    tl.store(partial_ptr + plane + at, squares, mask=c_mask)


@triton.jit
def norm_merge_kernel(partial_ptr, mean_ptr, var_ptr, rows, rows_a_share, splits, CHANNELS_A_GROUP, plane,
                      BLOCK: tl.constexpr):  # fmt: skip
    """mean[p], var[p] of all splits and channels of group p: CHANNELS_A_GROUP * splits neighbours in ``partial``."""
    pid = tl.program_id(0)
    length = CHANNELS_A_GROUP * splits
    partial_ptr += pid.to(tl.int64) * length
    total = tl.maximum(rows, 1).to(tl.float32) * CHANNELS_A_GROUP
    mean = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        count = tl.minimum(rows_a_share, rows - offs % splits * rows_a_share).to(tl.float32)
        mean += tl.load(partial_ptr + offs, mask=offs < length, other=0.0) * (count / total)
    mean = tl.sum(mean)
    var = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < length
        count = tl.minimum(rows_a_share, rows - offs % splits * rows_a_share).to(tl.float32)
        off = tl.load(partial_ptr + offs, mask=mask, other=0.0) - mean
        squares = tl.load(partial_ptr + plane + offs, mask=mask, other=0.0)
        var += tl.where(mask, squares + off * off * count, 0.0)
    tl.store(mean_ptr + pid, mean)
    tl.store(var_ptr + pid, tl.sum(var) / total)


def statistics(
    z: torch.Tensor, groups: int, per_sample: bool, config: NormConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 (S, groups) mean and biased variance of NHWC ``z`` (N, C, H, W); S is N if ``per_sample``, else 1."""
    n, c, h, w = z.shape
    config = config or choose_config(z)
    s, rows = (n, h * w) if per_sample else (1, n * h * w)
    mean, var = (_launch.empty((s, groups), torch.float32, z.device) for _ in range(2))
    blocks_c = _launch.cdiv(c, config.block_c)
    tiles, splits = shares(_launch.cdiv(rows, config.block_p), s * blocks_c)
    partial = _launch.empty((2, s, c, splits), torch.float32, z.device)
    share, plane = tiles * config.block_p, s * c * splits
    _launch.launch(
        norm_statistics_kernel, (s * splits * blocks_c,), z, partial, rows, c, share, splits, plane,
        VECTOR=_launch.vector_width(z), BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.num_warps,
    )  # fmt: skip
    _launch.launch(
        norm_merge_kernel, (s * groups,), partial, mean, var, rows, share, splits, c // groups, plane,
        BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return mean, var
