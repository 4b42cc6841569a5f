"""Mean and biased variance over the pixels of NHWC images: those of tiles, merged by Chan's formula in a fixed order.

Tiles' come from the convolution that writes the image; or, where it cannot give them, from a pass of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _launch
from ..conv.epilogue import store_statistics
from .tiles import NormConfig, choose_config, program_tile, shares

_MERGED = 4096
"""Elements of one step of the merge: few steps, each of which waits for memory."""


@triton.jit
def norm_statistics_kernel(
    z_ptr, partial_ptr, rows, C, rows_a_share, splits,
    VECTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[s, split] (4, C): the statistics of the split's rows of z [S, rows, C], see ``store_statistics``.

    Each of the BLOCK_P lanes runs Welford's recurrence over its rows, less the first, which may be far from zero; the
    lanes are merged at the end.
    """
    C = C // VECTOR * VECTOR  # shows the compiler that it may load VECTOR elements at once
    offs_c, c_mask, split, s = program_tile(splits, C, BLOCK_C)
    s = s.to(tl.int64)
    begin = split * rows_a_share
    end = tl.minimum(begin + rows_a_share, rows)
    near = tl.load(z_ptr + (s * rows + begin) * C + offs_c, mask=c_mask, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    count = tl.zeros((BLOCK_P,), tl.float32)
    for first in range(begin, end, BLOCK_P):
        row = first + tl.arange(0, BLOCK_P)
        inside = row < end
        z = tl.load(z_ptr + (s * rows + row)[:, None] * C + offs_c[None, :],
                    mask=inside[:, None] & c_mask[None, :], other=0.0).to(tl.float32)
        count += inside.to(tl.float32)
        z -= near[None, :]
        delta = tl.where(inside[:, None], z - mean, 0.0)
        mean += delta * (1 / tl.maximum(count, 1.0))[:, None]
        squares += delta * (z - mean)
    total = (end - begin).to(tl.float32)
    merged = tl.sum(mean * (count / total)[:, None], axis=0)
    off = mean - merged[None, :]
    squares = tl.sum(squares + off * off * count[:, None], axis=0)
    mean = near + merged
    store_statistics(partial_ptr, mean, (near - mean) + merged, squares, total, s * splits + split, offs_c, C)


@triton.jit
def norm_merge_kernel(
    partial_ptr, mean_ptr, var_ptr, tiles, C, groups, CHANNELS_A_GROUP, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """mean[s, g], var[s, g] of the tiles and channels of group g in partial [S, tiles, 4, C].

    Each of the BLOCK_T lanes merges its tiles and channels by Chan's formula; the lanes are merged at the end. Means
    are taken less the first, so that those far from zero do not lose the digits in which they differ.
    """
    blocks_g = tl.cdiv(groups, BLOCK_G)
    s = tl.program_id(0) // blocks_g
    g = tl.program_id(0) % blocks_g * BLOCK_G + tl.arange(0, BLOCK_G)
    partial_ptr += s.to(tl.int64) * tiles * (4 * C)
    near = tl.load(partial_ptr + g * CHANNELS_A_GROUP, mask=g < tl.where(tiles > 0, groups, 0), other=0.0)
    mean = tl.zeros((BLOCK_T, BLOCK_G), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_G), tl.float32)
    count = tl.zeros((BLOCK_T, BLOCK_G), tl.float32)
    for first in range(0, tiles * CHANNELS_A_GROUP, BLOCK_T):
        offs = first + tl.arange(0, BLOCK_T)
        tile, c = offs // CHANNELS_A_GROUP, offs % CHANNELS_A_GROUP
        mask = (tile < tiles)[:, None] & (g < groups)[None, :]
        at = partial_ptr + (tile.to(tl.int64) * (4 * C) + c)[:, None] + (g * CHANNELS_A_GROUP)[None, :]
        number = tl.load(at + 3 * C, mask=mask, other=0.0)
        share = number / tl.maximum(count + number, 1.0)
        off = tl.load(at, mask=mask, other=0.0) - near[None, :] + tl.load(at + C, mask=mask, other=0.0) - mean
        squares += tl.load(at + 2 * C, mask=mask, other=0.0) + off * off * count * share
        mean += off * share
        count += number
    total = tl.maximum(tl.sum(count, axis=0), 1.0)
    merged = tl.sum(mean * (count / total[None, :]), axis=0)
    off = mean - merged[None, :]
    var = tl.sum(squares + off * off * count, axis=0) / total
    tl.store(mean_ptr + s * groups + g, near + merged, mask=g < groups)
    tl.store(var_ptr + s * groups + g, var, mask=g < groups)


def statistics(
    z: torch.Tensor, groups: int, per_sample: bool, config: NormConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 (S, groups) mean and biased variance of NHWC ``z`` (N, C, H, W); S is N if ``per_sample``, else 1."""
    n, c, h, w = z.shape
    config = config or choose_config(z)
    s, rows = (n, h * w) if per_sample else (1, n * h * w)
    blocks_c = _launch.cdiv(c, config.block_c)
    tiles, splits = shares(_launch.cdiv(rows, config.block_p), s * blocks_c)
    partial = _launch.empty((s * splits, 4, c), torch.float32, z.device)
    _launch.launch(
        norm_statistics_kernel, (s * splits * blocks_c,), z, partial, rows, c, tiles * config.block_p, splits,
        VECTOR=_launch.vector_width(z), BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.num_warps,
    )  # fmt: skip
    return merge(partial, s, groups)


def merge(partial: torch.Tensor, s: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`statistics` from those of tiles, (S · tiles, 4, C) fp32, as the convolution writes them."""
    tiles, c = partial.shape[0] // max(s, 1), partial.shape[2]
    mean, var = (_launch.empty((s, groups), torch.float32, partial.device) for _ in range(2))
    channels = c // groups
    # eight neighbours fill a sector of the cache
    block_g = min(_launch.next_power_of_2(groups), max(1, 8 // channels))
    block_t = min(_launch.next_power_of_2(max(1, tiles * channels)), _MERGED // block_g)
    _launch.launch(
        norm_merge_kernel, (s * _launch.cdiv(groups, block_g),), partial, mean, var, tiles, c, groups, channels,
        BLOCK_T=block_t, BLOCK_G=block_g, num_warps=max(1, block_t * block_g // 256),
    )  # fmt: skip
    return mean, var
