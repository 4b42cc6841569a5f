"""3×3 convolution by bulk tensor copies of pixel boxes [BN, BH, BW, BC], for sm_90 and newer.

The product is weights × pixels: the box, reshaped to [pixels, BC] and transposed, is operand B straight from shared
memory. What lies outside of the image arrives as zero, so padding, cropping and ragged edges cost no mask.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from .. import _launch
from .._launch import mma
from .convolution import ConvConfig, Convolution, Head
from .descriptors import image_boxes, output_boxes, tap_sources, tap_weight
from .epilogue import bias_activation, head_store, max_of_pairs, store_images, tile_statistics


@triton.jit
def add_box_source(acc, x_desc, weight_desc, first, last, n0, h0, w0, k0, BLOCK_N: tl.constexpr,
                   BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
                   PRECISION: tl.constexpr, FLIPPED: tl.constexpr):
    """Adds steps ``first`` to ``last``, excluded, to ``acc``: 9 taps of the first BLOCK_C channels, of the next, …

    (h0, w0) is the input pixel of tap (0, 0) of the first output.
    """
    for i in tl.range(first, last, num_stages=STAGES):
        tap = i % 9
        c = i // 9 * BLOCK_C
        x = x_desc.load([n0, h0 + tap // 3, w0 + tap % 3, c])
        weight = tap_weight(weight_desc, tap, k0, c, FLIPPED)
        acc = mma(weight, tl.reshape(x, (BLOCK_N * BLOCK_H * BLOCK_W, BLOCK_C)).T, acc, PRECISION)
    return acc


@triton.jit
def accumulate_boxes(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels,
                     offset, n0, h0, w0, k0, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
                     BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
                     FLIPPED: tl.constexpr = False):
    """The sums of one tile over the skip, if any, then over x: two loops, for a choice inside one is not pipelined."""
    acc = tl.zeros((BLOCK_K, BLOCK_N * BLOCK_H * BLOCK_W), tl.float32)
    if skip_desc is not None:
        acc = add_box_source(acc, skip_desc, skip_weight_desc, 0, 9 * tl.cdiv(skip_channels, BLOCK_C), n0,
                             h0 - offset[0], w0 - offset[1], k0, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_C, STAGES, PRECISION,
                             FLIPPED)
    return add_box_source(acc, x_desc, x_weight_desc, 0, 9 * tl.cdiv(x_channels, BLOCK_C), n0, h0 - offset[0],
                          w0 - offset[1], k0, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_C, STAGES, PRECISION, FLIPPED)


@triton.jit(do_not_specialize=["x_channels", "skip_channels", "offset", "C_out", "tiles"])
def conv_relu_box_kernel(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels,
                         offset, bias_ptr, mask_desc, y_desc, second_mask_desc, second_desc, pooled_desc,
                         statistics_ptr, C_out, tiles, SLOPE: tl.constexpr, BLOCK_K: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
                         STAGES: tl.constexpr, PRECISION: tl.constexpr, FLIPPED: tl.constexpr):
    """``y = relu(conv(skip) + conv(x) + bias) * (mask > 0)``, its 2×2 max-pool and tile statistics, each part optional.

    Boxes: x, skip [BN, BH, BW, BC]; weights as :func:`tap_weight` reads them; masks and outputs, see
    :func:`store_images`, [BN, BH, BW, BK or half]; pooled halves BH and BW, and tiles start on even pixels, so no
    window crosses a tile. ``tiles`` counts (h, w, C_out) tiles.
    """
    tiles_h, tiles_w, tiles_k = tiles
    pid = tl.program_id(0)
    k0, tile = pid % tiles_k * BLOCK_K, pid // tiles_k
    w0, h0 = tile % tiles_w * BLOCK_W, tile // tiles_w % tiles_h * BLOCK_H
    n0 = tile // (tiles_w * tiles_h) * BLOCK_N
    acc = accumulate_boxes(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels,
                           offset, n0, h0, w0, k0, BLOCK_K, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_C, STAGES, PRECISION,
                           FLIPPED)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    y = bias_activation(acc, bias_ptr, offs_k, C_out, SLOPE)
    y = store_images(y, mask_desc, y_desc, second_mask_desc, second_desc, n0, h0, w0, k0)
    if pooled_desc is not None:
        rows: tl.constexpr = BLOCK_N * BLOCK_H // 2
        pairs = max_of_pairs(tl.reshape(y, (BLOCK_K, rows, 2, BLOCK_W // 2, 2)))
        pooled = max_of_pairs(tl.permute(pairs, (0, 1, 3, 2)))
        pooled = tl.reshape(pooled.to(pooled_desc.dtype), (BLOCK_K, rows * BLOCK_W // 2))
        pooled_desc.store([n0, h0 // 2, w0 // 2, k0],
                          tl.reshape(pooled.T, (BLOCK_N, BLOCK_H // 2, BLOCK_W // 2, BLOCK_K)))
    if statistics_ptr is not None:
        offs_p = tl.arange(0, BLOCK_N * BLOCK_H * BLOCK_W)
        n, h, w = n0 + offs_p // (BLOCK_H * BLOCK_W), h0 + offs_p // BLOCK_W % BLOCK_H, w0 + offs_p % BLOCK_W
        inside = (n < y_desc.shape[0]) & (h < y_desc.shape[1]) & (w < y_desc.shape[2])
        tile_statistics(statistics_ptr, (y,), (inside,), tile, offs_k, C_out, y_desc.dtype)


@triton.jit(do_not_specialize=["x_channels", "skip_channels", "offset", "y_shape", "tiles"])
def conv_relu_box_head_kernel(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels,
                              offset, bias_ptr, head_weight_ptr, head_bias_ptr, out_ptr, y_shape, tiles,
                              SLOPE: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
                              OUTPUT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
                              BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
                              STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """The same convolution, whose C_out channels fit one tile, and the 1×1 head on them; only the head is written.

    ``y_shape`` is the (N, H, W, C_out) of what is not written.
    """
    N, H, W, C_out = y_shape
    tiles_h, tiles_w, _ = tiles
    tile = tl.program_id(0)
    w0, h0 = tile % tiles_w * BLOCK_W, tile // tiles_w % tiles_h * BLOCK_H
    n0 = tile // (tiles_w * tiles_h) * BLOCK_N
    acc = accumulate_boxes(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels,
                           offset, n0, h0, w0, 0, BLOCK_K, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_C, STAGES, PRECISION)
    offs_k, offs_p = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N * BLOCK_H * BLOCK_W)
    y = bias_activation(acc, bias_ptr, offs_k, C_out, SLOPE)
    n, h, w = n0 + offs_p // (BLOCK_H * BLOCK_W), h0 + offs_p // BLOCK_W % BLOCK_H, w0 + offs_p % BLOCK_W
    head_store(y, head_weight_ptr, head_bias_ptr, out_ptr, (n.to(tl.int64) * H + h) * W + w,
               (n < N) & (h < H) & (w < W), offs_k, C_out, NUM_CLASSES, BLOCK_CLASSES, OUTPUT, PRECISION)


def box_tiles(conv: Convolution, config: ConvConfig) -> tuple[int, tuple[int, int, int]]:
    """The number of programs, and the tiles along output rows, columns and channels."""
    h, w = conv.out_size
    tiles = _launch.cdiv(h, config.block_h), _launch.cdiv(w, config.block_w), _launch.cdiv(conv.c_out, config.block_k)
    return _launch.cdiv(conv.batch, config.block_n) * tiles[0] * tiles[1] * tiles[2], tiles


def launch_box(conv: Convolution, y, pooled, statistics, config: ConvConfig, second=None) -> None:
    """Writes the convolution to ``y`` and ``second``, its 2×2 max-pool to ``pooled`` and each tile's ``statistics``,
    unless None."""
    n, h, w = config.block_n, config.block_h, config.block_w
    programs, tiles = box_tiles(conv, config)
    half = (n, h // 2, w // 2, config.block_k)
    boxes = functools.partial(image_boxes, box=(n, h, w, config.block_c))
    _launch.launch(conv_relu_box_kernel, (programs,), *tap_sources(conv, boxes, config.block_k, config.block_c),
                   conv.offset, conv.bias, *output_boxes(conv, y, second, (n, h, w), config.block_k),
                   None if pooled is None else image_boxes(pooled, half), statistics, conv.c_out, tiles,
                   SLOPE=conv.slope, BLOCK_K=config.block_k, BLOCK_N=n, BLOCK_H=h, BLOCK_W=w,
                   BLOCK_C=config.block_c, STAGES=config.num_stages, PRECISION=_launch.dot_precision(y.dtype),
                   FLIPPED=conv.flipped, num_warps=config.num_warps, num_stages=config.num_stages)


def launch_box_head(conv: Convolution, head: Head, out, config: ConvConfig) -> None:
    """Writes the head's logits, probabilities or labels of the convolution to ``out``."""
    n, h, w = config.block_n, config.block_h, config.block_w
    programs, tiles = box_tiles(conv, config)
    boxes = functools.partial(image_boxes, box=(n, h, w, config.block_c))
    _launch.launch(conv_relu_box_head_kernel, (programs,),
                   *tap_sources(conv, boxes, config.block_k, config.block_c), conv.offset, conv.bias, head.weight,
                   head.bias, out, (conv.batch, *conv.out_size, conv.c_out), tiles, SLOPE=conv.slope,
                   NUM_CLASSES=head.classes, BLOCK_CLASSES=head.block, OUTPUT=head.output, BLOCK_K=config.block_k,
                   BLOCK_N=n, BLOCK_H=h, BLOCK_W=w, BLOCK_C=config.block_c, STAGES=config.num_stages,
                   PRECISION=_launch.dot_precision(conv.x.dtype), num_warps=config.num_warps,
                   num_stages=config.num_stages)
