"""The gradient of norm, activation and max-pool: one pass for its sums, one that gives that of the convolution."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _launch, _reduce
from .tiles import (
    NormConfig,
    channel_numbers,
    choose_config,
    contiguous,
    program_tile,
    shares,
    store_corner,
    window_gradients,
    window_pixels,
)


@triton.jit
def norm_sums_kernel(
    dy_ptr, d_pooled_ptr, z_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, partial_ptr, IMAGES, H, W, C, tiles,
    tiles_a_share, splits, plane, CHANNELS_A_GROUP, eps,
    SLOPE: tl.constexpr, VECTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[0 | 1, s, c, split] = sum g | sum g (z - mean) rstd of the split's windows, g before the activation."""
    C = C // VECTOR * VECTOR
    offs_c, c_mask, split, s = program_tile(splits, C, BLOCK_C)
    numbers = channel_numbers(mean_ptr, var_ptr, weight_ptr, bias_ptr, s, offs_c, c_mask, C, CHANNELS_A_GROUP, eps)
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_gh = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tile in range(split * tiles_a_share, tl.minimum((split + 1) * tiles_a_share, tiles)):
        pixel, masks, pooled = window_pixels(tile * BLOCK_P, s, IMAGES, H, W, BLOCK_P)
        g, h = window_gradients(z_ptr, dy_ptr, d_pooled_ptr, pixel, masks, pooled, numbers, offs_c, c_mask, C, W, SLOPE)
        sum_g += (g[0] + g[1]) + (g[2] + g[3])
        sum_gh += (g[0] * h[0] + g[1] * h[1]) + (g[2] * h[2] + g[3] * h[3])
    at = (s.to(tl.int64) * C + offs_c) * splits + split
    tl.store(partial_ptr + at, tl.sum(sum_g, axis=0), mask=c_mask)
    tl.store(partial_ptr + plane + at, tl.sum(sum_gh, axis=0) * numbers[1], mask=c_mask)


@triton.jit
def norm_averages_kernel(
    partial_ptr, weight_ptr, sum_g_ptr, sum_gh_ptr, averages_ptr, splits, C, groups, CHANNELS_A_GROUP, count, plane,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The sums [s, c] over the splits, and averages[0 | 1, s, group] of weight times these, of one group a program."""
    pid = tl.program_id(0)
    s, group = (pid // groups).to(tl.int64), pid % groups
    total_g = tl.zeros((BLOCK_C,), tl.float32)
    total_gh = tl.zeros((BLOCK_C,), tl.float32)
    for first_c in range(0, CHANNELS_A_GROUP, BLOCK_C):
        offs = first_c + tl.arange(0, BLOCK_C)
        c_mask = offs < CHANNELS_A_GROUP
        c = group * CHANNELS_A_GROUP + offs
        g = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
        gh = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
        for first in range(0, splits, BLOCK_S):
            offs_s = first + tl.arange(0, BLOCK_S)
            at = (s * C + c)[:, None] * splits + offs_s[None, :]
            mask = c_mask[:, None] & (offs_s < splits)[None, :]
            g += tl.load(partial_ptr + at, mask=mask, other=0.0)
            gh += tl.load(partial_ptr + plane + at, mask=mask, other=0.0)
        sum_g, sum_gh = tl.sum(g, axis=1), tl.sum(gh, axis=1)
        tl.store(sum_g_ptr + s * C + c, sum_g, mask=c_mask)
        tl.store(sum_gh_ptr + s * C + c, sum_gh, mask=c_mask)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
            sum_g *= weight
            sum_gh *= weight
        total_g += sum_g
        total_gh += sum_gh
    tl.store(averages_ptr + pid, tl.sum(total_g) / count)
    tl.store(averages_ptr + tl.num_programs(0) + pid, tl.sum(total_gh) / count)


@triton.jit
def norm_data_grad_kernel(
    dy_ptr, d_pooled_ptr, z_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, averages_ptr, dz_ptr, IMAGES, H, W, C, tiles,
    plane, CHANNELS_A_GROUP, eps,
    SLOPE: tl.constexpr, VECTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz = rstd (weight g - averages[0] - (z - mean) rstd averages[1])."""
    C = C // VECTOR * VECTOR
    offs_c, c_mask, tile, s = program_tile(tiles, C, BLOCK_C)
    numbers = channel_numbers(mean_ptr, var_ptr, weight_ptr, bias_ptr, s, offs_c, c_mask, C, CHANNELS_A_GROUP, eps)
    at = s * (C // CHANNELS_A_GROUP) + offs_c // CHANNELS_A_GROUP
    rstd = numbers[1]
    constant = (rstd * tl.load(averages_ptr + at, mask=c_mask, other=0.0))[None, :]
    factor = (rstd * rstd * tl.load(averages_ptr + plane + at, mask=c_mask, other=0.0))[None, :]
    scale = (rstd * numbers[2])[None, :]
    pixel, masks, pooled = window_pixels(tile * BLOCK_P, s, IMAGES, H, W, BLOCK_P)
    g, h = window_gradients(z_ptr, dy_ptr, d_pooled_ptr, pixel, masks, pooled, numbers, offs_c, c_mask, C, W, SLOPE)
    store_corner(dz_ptr, scale * g[0] - constant - factor * h[0], pixel, masks[0], offs_c, c_mask, C)
    store_corner(dz_ptr, scale * g[1] - constant - factor * h[1], pixel + 1, masks[1], offs_c, c_mask, C)
    store_corner(dz_ptr, scale * g[2] - constant - factor * h[2], pixel + W, masks[2], offs_c, c_mask, C)
    store_corner(dz_ptr, scale * g[3] - constant - factor * h[3], pixel + W + 1, masks[3], offs_c, c_mask, C)


def backward(
    dy: torch.Tensor | None,
    d_pooled: torch.Tensor | None,
    z: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    count: torch.Tensor,
    eps: float,
    slope: float,
    process_group: str,
    config: NormConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dz, dweight, dbias) of ``fastunet::norm_backward``: dy like z (N, C, H, W), d_pooled half its size, or None."""
    if process_group:
        raise ValueError("the norm kernels take the statistics of one process")
    z = _launch.channels_last(z)
    dy, d_pooled = (None if each is None else _launch.channels_last(each) for each in (dy, d_pooled))
    norm_weight, norm_bias = contiguous(norm_weight), contiguous(norm_bias)
    n, c, h, w = z.shape
    rows, groups = mean.shape
    config, images = config or choose_config(z), n // max(rows, 1)
    blocks_c = _launch.cdiv(c, config.block_c)
    windows = images * _launch.cdiv(h, 2) * _launch.cdiv(w, 2)
    tiles = _launch.cdiv(windows, config.block_p)
    each, splits = shares(tiles, rows * blocks_c)
    partial = _launch.empty((2, rows, c, splits), torch.float32, z.device)
    sum_g, sum_gh = (_launch.empty((rows, c), torch.float32, z.device) for _ in range(2))
    averages = _launch.empty((2, rows, groups), torch.float32, z.device)
    dz = _launch.empty_image((n, c, h, w), z.dtype, z.device)
    read = dy, d_pooled, z, mean, var, norm_weight, norm_bias
    tile = dict(SLOPE=slope, VECTOR=_launch.vector_width(z), BLOCK_P=config.block_p, BLOCK_C=config.block_c,
                num_warps=config.num_warps)  # fmt: skip
    _launch.launch(
        norm_sums_kernel, (rows * splits * blocks_c,), *read, partial, images, h, w, c, tiles, each, splits,
        rows * c * splits, c // groups, eps, **tile,
    )  # fmt: skip
    _launch.launch(
        norm_averages_kernel, (rows * groups,), partial, norm_weight, sum_g, sum_gh, averages, splits, c, groups,
        c // groups, float(max(1, images * h * w * (c // groups))), rows * c * splits,
        BLOCK_C=min(16, _launch.next_power_of_2(c // groups)), BLOCK_S=128, num_warps=4,
    )  # fmt: skip
    _launch.launch(
        norm_data_grad_kernel, (rows * tiles * blocks_c,), *read, averages, dz, images, h, w, c, tiles, rows * groups,
        c // groups, eps, **tile,
    )  # fmt: skip
    return dz, *(_affine_grad(p, each) for p, each in ((norm_weight, sum_gh), (norm_bias, sum_g)))


def _affine_grad(parameter: torch.Tensor | None, sums: torch.Tensor) -> torch.Tensor:
    """(C,) of the sums (S, C), or nothing where there is no parameter."""
    if parameter is None:
        return _launch.empty((0,), torch.float32, sums.device)
    return sums.view(-1) if len(sums) == 1 else _reduce.sum_splits(sums, torch.float32)
