"""The box convolution with its channels and taps shared out among programs, for maps too small to fill a GPU.

An 8×8 map of 512 channels has 8 tiles of 64×64 for 132 multiprocessors, each with a sum over 4608 products. Here
``splits`` programs add up a share of each tile's sum in fp32, and a second kernel adds the shares in a fixed order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _launch, max_pool
from .box import add_box_source, box_tiles
from .convolution import ConvConfig, Convolution
from .descriptors import image_boxes, tap_sources
from .epilogue import bias_activation, tile_statistics

_JOINED_CHANNELS, JOINED_PIXELS = 16, 64


@triton.jit(do_not_specialize=["x_channels", "skip_channels", "offset", "tiles"])
def conv_relu_box_split_kernel(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels, offset,
                               partial_desc, tiles, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
                               BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
                               STAGES: tl.constexpr, PRECISION: tl.constexpr, FLIPPED: tl.constexpr):
    """partial (splits, N, H, W, C_out): the share of program axis 1 in the sum over the skip, if any, and over x.

    Boxes are those of the unsplit kernel, those of partial (1, BN, BH, BW, BK). ``tiles`` counts (h, w, C_out) tiles.
    """
    tiles_h, tiles_w, tiles_k = tiles
    split, splits = tl.program_id(1), tl.num_programs(1)
    k0, tile = tl.program_id(0) % tiles_k * BLOCK_K, tl.program_id(0) // tiles_k
    w0, h0 = tile % tiles_w * BLOCK_W, tile // tiles_w % tiles_h * BLOCK_H
    n0 = tile // (tiles_w * tiles_h) * BLOCK_N
    acc = tl.zeros((BLOCK_K, BLOCK_N * BLOCK_H * BLOCK_W), tl.float32)
    if skip_desc is not None:
        steps = 9 * tl.cdiv(skip_channels, BLOCK_C)
        acc = add_box_source(acc, skip_desc, skip_weight_desc, split * steps // splits, (split + 1) * steps // splits,
                             n0, h0 - offset[0], w0 - offset[1], k0, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_C, STAGES,
                             PRECISION, FLIPPED)
    steps = 9 * tl.cdiv(x_channels, BLOCK_C)
    acc = add_box_source(acc, x_desc, x_weight_desc, split * steps // splits, (split + 1) * steps // splits, n0,
                         h0 - offset[0], w0 - offset[1], k0, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_C, STAGES, PRECISION,
                         FLIPPED)
    partial_desc.store([split, n0, h0, w0, k0], tl.reshape(acc.T, (1, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K)))


@triton.jit(do_not_specialize=["splits", "H", "W"])
def conv_relu_join_kernel(partial_ptr, bias_ptr, mask_ptr, mask_strides, y_ptr, statistics_ptr, splits, count, H, W,
                          C_out, SLOPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr):
    """``y = relu(sum of partial (splits, count) + bias) * (mask > 0)`` of ``count`` NHWC elements, and tile statistics,
    each part optional.

    A tile is of one image. ``mask_strides`` are those of the mask's images, rows and pixels. All of partial has fewer
    than 2³¹ elements.
    """
    tiles_k, tiles_p = tl.cdiv(C_out, BLOCK_K), tl.cdiv(H * W, BLOCK_P)
    tile = tl.program_id(0) // tiles_k
    offs_k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    n, offs_p = tile // tiles_p, tile % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = offs_p < H * W
    y_mask = (offs_k < C_out)[:, None] & inside[None, :]
    offs_y = (n * H * W + offs_p)[None, :] * C_out + offs_k[:, None]
    acc = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    for split in range(splits):
        acc += tl.load(partial_ptr + split * count + offs_y, mask=y_mask, other=0.0)
    y = bias_activation(acc, bias_ptr, offs_k, C_out, SLOPE)
    if mask_ptr is not None:
        stride_n, stride_h, stride_w = mask_strides
        at = n.to(tl.int64) * stride_n + (offs_p // W).to(tl.int64) * stride_h + offs_p % W * stride_w
        y = tl.where(tl.load(mask_ptr + at[None, :] + offs_k[:, None], mask=y_mask, other=0.0) > 0, y, 0.0)
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=y_mask)
    if statistics_ptr is not None:
        tile_statistics(statistics_ptr, (y,), (inside,), tile, offs_k, C_out, y_ptr.dtype.element_ty)


def launch_box_split(conv: Convolution, y: torch.Tensor, pooled: torch.Tensor | None, statistics: torch.Tensor | None,
                     config: ConvConfig) -> None:
    """Writes the convolution to ``y``, its 2×2 max-pool to ``pooled`` and ``statistics`` of each JOINED_PIXELS of an
    image, unless None."""
    n, (h, w), k = conv.batch, conv.out_size, conv.c_out
    partial = _launch.empty((config.splits, n, h, w, k), torch.float32, y.device)
    box = [config.block_n, config.block_h, config.block_w]
    shares = TensorDescriptor(partial, list(partial.shape), list(partial.stride()), [1, *box, config.block_k])
    boxes = functools.partial(image_boxes, box=(*box, config.block_c))
    programs, tiles = box_tiles(conv, config)
    _launch.launch(conv_relu_box_split_kernel, (programs, config.splits),
                   *tap_sources(conv, boxes, config.block_k, config.block_c), conv.offset, shares, tiles,
                   BLOCK_K=config.block_k, BLOCK_N=config.block_n, BLOCK_H=config.block_h, BLOCK_W=config.block_w,
                   BLOCK_C=config.block_c, STAGES=config.num_stages,
                   PRECISION=_launch.dot_precision(y.dtype), FLIPPED=conv.flipped, num_warps=config.num_warps,
                   num_stages=config.num_stages)
    mask, strides = conv.mask, None if conv.mask is None else (*conv.mask.stride()[::2], conv.mask.stride(3))
    tiles = n * _launch.cdiv(h * w, JOINED_PIXELS) * _launch.cdiv(k, _JOINED_CHANNELS)
    _launch.launch(conv_relu_join_kernel, (tiles,), partial, conv.bias, mask, strides, y, statistics, config.splits,
                   y.numel(), h, w, k, SLOPE=conv.slope, BLOCK_K=_JOINED_CHANNELS, BLOCK_P=JOINED_PIXELS)
    if pooled is not None:
        max_pool.pool_into(y, pooled)
