"""Convolution → norm → activation → [max-pool]: the convolution with its statistics, and a pass that reads it once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _launch, conv_strided
from ..conv.forward import forward_statistics
from .statistics import merge, statistics
from .tiles import (
    NormConfig,
    activated,
    channel_numbers,
    choose_config,
    contiguous,
    load_corner,
    program_tile,
    store_corner,
    window_pixels,
)


@triton.jit
def norm_forward_kernel(
    z_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, y_ptr, pooled_ptr, IMAGES, H, W, C, tiles, CHANNELS_A_GROUP, eps,
    SLOPE: tl.constexpr, VECTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = activation((z - mean) / sqrt(var + eps) * weight + bias), and its 2×2 maxima where ``pooled_ptr`` is."""
    C = C // VECTOR * VECTOR
    offs_c, c_mask, tile, s = program_tile(tiles, C, BLOCK_C)
    numbers = channel_numbers(mean_ptr, var_ptr, weight_ptr, bias_ptr, s, offs_c, c_mask, C, CHANNELS_A_GROUP, eps)
    pixel, masks, pooled = window_pixels(tile * BLOCK_P, s, IMAGES, H, W, BLOCK_P)
    y00 = activated(load_corner(z_ptr, pixel, masks[0], offs_c, c_mask, C), numbers, SLOPE)
    y01 = activated(load_corner(z_ptr, pixel + 1, masks[1], offs_c, c_mask, C), numbers, SLOPE)
    y10 = activated(load_corner(z_ptr, pixel + W, masks[2], offs_c, c_mask, C), numbers, SLOPE)
    y11 = activated(load_corner(z_ptr, pixel + W + 1, masks[3], offs_c, c_mask, C), numbers, SLOPE)
    store_corner(y_ptr, y00, pixel, masks[0], offs_c, c_mask, C)
    store_corner(y_ptr, y01, pixel + 1, masks[1], offs_c, c_mask, C)
    store_corner(y_ptr, y10, pixel + W, masks[2], offs_c, c_mask, C)
    store_corner(y_ptr, y11, pixel + W + 1, masks[3], offs_c, c_mask, C)
    if pooled_ptr is not None:
        upper = tl.maximum(y00, y01, propagate_nan=tl.PropagateNan.ALL)
        lower = tl.maximum(y10, y11, propagate_nan=tl.PropagateNan.ALL)
        largest = tl.maximum(upper, lower, propagate_nan=tl.PropagateNan.ALL)
        store_corner(pooled_ptr, largest, pooled, masks[3], offs_c, c_mask, C)


def forward(
    x: torch.Tensor,
    skip: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    pad: int,
    stride: int,
    groups: int,
    per_sample: bool,
    eps: float,
    slope: float,
    pool: bool,
    process_group: str,
) -> tuple[torch.Tensor, ...]:
    """(y, pooled, z, mean, var, count) of ``fastunet::conv_norm``; the last is of several processes, and empty."""
    if process_group:
        raise ValueError("the norm kernels take the statistics of one process")
    if stride == 1:
        z, partial = forward_statistics(x, skip, weight, bias, pad, per_sample)
    else:
        partial = None
        z = conv_strided.forward(x, weight, bias, pad, 1.0)
    if partial is None:
        mean, var = statistics(z, groups, per_sample)
    else:
        mean, var = merge(partial, len(z) if per_sample else 1, groups)
    y, pooled = normalise(z, mean, var, norm_weight, norm_bias, eps, slope, pool)
    return y, pooled, z, mean, var, _launch.empty((0,), torch.float32, z.device)


def normalise(
    z: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    slope: float,
    pool: bool,
    config: NormConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (N, C, H, W) of NHWC ``z`` and statistics (S, G), and its 2×2 max-pool, which is empty unless ``pool``."""
    n, c, h, w = z.shape
    norm_weight, norm_bias = contiguous(norm_weight), contiguous(norm_bias)
    y = _launch.empty_image((n, c, h, w), z.dtype, z.device)
    if pool:
        pooled = _launch.empty_image((n, c, h // 2, w // 2), z.dtype, z.device)
    else:
        pooled = _launch.empty((0,), z.dtype, z.device)
    config, rows = config or choose_config(z), mean.shape[0]
    images = n // max(rows, 1)
    tiles = _launch.cdiv(images * _launch.cdiv(h, 2) * _launch.cdiv(w, 2), config.block_p)
    _launch.launch(
        norm_forward_kernel, (rows * tiles * _launch.cdiv(c, config.block_c),), z, mean, var, norm_weight, norm_bias,
        y, pooled if pool else None, images, h, w, c, tiles, c // mean.shape[1], eps,
        SLOPE=slope, VECTOR=_launch.vector_width(z), BLOCK_P=config.block_p, BLOCK_C=config.block_c,
        num_warps=config.num_warps,
    )  # fmt: skip
    return y, pooled
