"""3×3 convolution that feeds each loaded input row to all the output rows that need it, for sm_90 and newer.

A tile is four output rows of one image. For each column shift six input rows are loaded once and serve twelve products,
where a tap-by-tap kernel loads twenty-four: for 64 and 128 channels the L2 cache is what limits that one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import _launch
from .._launch import mma
from .convolution import ConvConfig, Convolution, Head
from .descriptors import image_boxes, output_boxes, tap_sources, tap_weight
from .epilogue import bias_activation, head_store, max_of_pairs, store_images, tile_statistics

ROWS = 4


@triton.jit
def input_row(x_desc, n, h, w, c):
    """One row of pixels as operand B [BC, BW] of a product."""
    x = x_desc.load([n, h, w, c])
    return tl.reshape(x, (x.shape[2], x.shape[3])).T


@triton.jit
def add_rows_source(y0, y1, y2, y3, x_desc, weight_desc, C, n, h0, w0, k0, BLOCK_C: tl.constexpr,
                    STAGES: tl.constexpr, PRECISION: tl.constexpr, FLIPPED: tl.constexpr):
    """Adds 9 taps and C channels to four output rows; (h0, w0) is the input pixel of tap (0, 0) of the first."""
    for i in tl.range(0, 3 * tl.cdiv(C, BLOCK_C), num_stages=STAGES):
        s = i % 3
        c = i // 3 * BLOCK_C
        top, middle = tap_weight(weight_desc, s, k0, c, FLIPPED), tap_weight(weight_desc, 3 + s, k0, c, FLIPPED)
        bottom = tap_weight(weight_desc, 6 + s, k0, c, FLIPPED)
        x0, x1 = input_row(x_desc, n, h0, w0 + s, c), input_row(x_desc, n, h0 + 1, w0 + s, c)
        x2, x3 = input_row(x_desc, n, h0 + 2, w0 + s, c), input_row(x_desc, n, h0 + 3, w0 + s, c)
        x4, x5 = input_row(x_desc, n, h0 + 4, w0 + s, c), input_row(x_desc, n, h0 + 5, w0 + s, c)
        y0 = mma(bottom, x2, mma(middle, x1, mma(top, x0, y0, PRECISION), PRECISION), PRECISION)
        y1 = mma(bottom, x3, mma(middle, x2, mma(top, x1, y1, PRECISION), PRECISION), PRECISION)
        y2 = mma(bottom, x4, mma(middle, x3, mma(top, x2, y2, PRECISION), PRECISION), PRECISION)
        y3 = mma(bottom, x5, mma(middle, x4, mma(top, x3, y3, PRECISION), PRECISION), PRECISION)
    return y0, y1, y2, y3


@triton.jit
def accumulate_rows(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels, offset, n, h0, w0,
                    k0, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
                    PRECISION: tl.constexpr, FLIPPED: tl.constexpr = False):
    """The sums of four output rows over the skip, if any, then over x."""
    y0, y1 = tl.zeros((BLOCK_K, BLOCK_W), tl.float32), tl.zeros((BLOCK_K, BLOCK_W), tl.float32)
    y2, y3 = tl.zeros((BLOCK_K, BLOCK_W), tl.float32), tl.zeros((BLOCK_K, BLOCK_W), tl.float32)
    h0, w0 = h0 - offset[0], w0 - offset[1]
    if skip_desc is not None:
        y0, y1, y2, y3 = add_rows_source(y0, y1, y2, y3, skip_desc, skip_weight_desc, skip_channels, n, h0, w0, k0,
                                         BLOCK_C, STAGES, PRECISION, FLIPPED)
    return add_rows_source(y0, y1, y2, y3, x_desc, x_weight_desc, x_channels, n, h0, w0, k0, BLOCK_C, STAGES, PRECISION,
                           FLIPPED)


@triton.jit
def finish_row(acc, bias_ptr, mask_desc, y_desc, second_mask_desc, second_desc, n, h, w0, k0, C_out,
               SLOPE: tl.constexpr):
    """Stores one output row and returns it in fp32."""
    y = bias_activation(acc, bias_ptr, k0 + tl.arange(0, acc.shape[0]), C_out, SLOPE)
    return store_images(y, mask_desc, y_desc, second_mask_desc, second_desc, n, h, w0, k0)


@triton.jit
def pool_rows(upper, lower, pooled_desc, n, h, w, k0):
    """Stores the 2×2 maxima of two rows."""
    BLOCK_K: tl.constexpr = upper.shape[0]
    HALF_W: tl.constexpr = upper.shape[1] // 2
    rows = tl.maximum(upper, lower, propagate_nan=tl.PropagateNan.ALL)
    pooled = max_of_pairs(tl.reshape(rows, (BLOCK_K, HALF_W, 2)))
    pooled_desc.store([n, h, w, k0], tl.reshape(pooled.to(pooled_desc.dtype).T, (1, 1, HALF_W, BLOCK_K)))


@triton.jit(do_not_specialize=["x_channels", "skip_channels", "offset", "C_out", "tiles"])
def conv_relu_rows_kernel(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels, offset,
                          bias_ptr, mask_desc, y_desc, second_mask_desc, second_desc, pooled_desc, statistics_ptr,
                          C_out, tiles, SLOPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
                          BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, FLIPPED: tl.constexpr):
    """``y = relu(conv(skip) + conv(x) + bias) * (mask > 0)``, its 2×2 max-pool and tile statistics, each part optional.

    Boxes: x, skip [1, 1, BW, BC]; weights those of :func:`tap_weight`; masks and outputs, see :func:`store_images`,
    [1, 1, BW, BK or half]; pooled [1, 1, BW/2, BK]. ``tiles`` counts the tiles along (h, w, C_out).
    """
    tiles_h, tiles_w, tiles_k = tiles
    k0, tile = tl.program_id(0) % tiles_k * BLOCK_K, tl.program_id(0) // tiles_k
    w0, h0, n = tile % tiles_w * BLOCK_W, tile // tiles_w % tiles_h * 4, tile // (tiles_w * tiles_h)
    y0, y1, y2, y3 = accumulate_rows(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels,
                                     offset, n, h0, w0, k0, BLOCK_K, BLOCK_W, BLOCK_C, STAGES, PRECISION, FLIPPED)
    y0 = finish_row(y0, bias_ptr, mask_desc, y_desc, second_mask_desc, second_desc, n, h0, w0, k0, C_out, SLOPE)
    y1 = finish_row(y1, bias_ptr, mask_desc, y_desc, second_mask_desc, second_desc, n, h0 + 1, w0, k0, C_out, SLOPE)
    if pooled_desc is not None:
        pool_rows(y0, y1, pooled_desc, n, h0 // 2, w0 // 2, k0)
    y2 = finish_row(y2, bias_ptr, mask_desc, y_desc, second_mask_desc, second_desc, n, h0 + 2, w0, k0, C_out, SLOPE)
    y3 = finish_row(y3, bias_ptr, mask_desc, y_desc, second_mask_desc, second_desc, n, h0 + 3, w0, k0, C_out, SLOPE)
    if pooled_desc is not None:
        pool_rows(y2, y3, pooled_desc, n, h0 // 2 + 1, w0 // 2, k0)
    if statistics_ptr is not None:
        offs_p = tl.arange(0, 4 * BLOCK_W)
        y = tl.reshape(tl.join(tl.join(y0, y2), tl.join(y1, y3)), (BLOCK_K, 4 * BLOCK_W))  # rows side by side
        inside = (h0 + offs_p % 4 < y_desc.shape[1]) & (w0 + offs_p // 4 < y_desc.shape[2])
        tile_statistics(statistics_ptr, y, inside, tile, k0 + tl.arange(0, BLOCK_K), C_out, y_desc.dtype)


@triton.jit
def head_row(acc, bias_ptr, head_weight_ptr, head_bias_ptr, out_ptr, n, h, w0, y_shape, SLOPE: tl.constexpr,
             NUM_CLASSES: tl.constexpr, BLOCK_CLASSES: tl.constexpr, OUTPUT: tl.constexpr, PRECISION: tl.constexpr):
    """The 1×1 head of one output row."""
    _, H, W, C_out = y_shape
    offs_k, w = tl.arange(0, acc.shape[0]), w0 + tl.arange(0, acc.shape[1])
    y = bias_activation(acc, bias_ptr, offs_k, C_out, SLOPE)
    head_store(y, head_weight_ptr, head_bias_ptr, out_ptr, (n.to(tl.int64) * H + h) * W + w,
               w < tl.where(h < H, W, 0), offs_k, C_out, NUM_CLASSES, BLOCK_CLASSES, OUTPUT, PRECISION)


@triton.jit(do_not_specialize=["x_channels", "skip_channels", "offset", "y_shape", "tiles"])
def conv_relu_rows_head_kernel(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels, offset,
                               bias_ptr, head_weight_ptr, head_bias_ptr, out_ptr, y_shape, tiles, SLOPE: tl.constexpr,
                               NUM_CLASSES: tl.constexpr, BLOCK_CLASSES: tl.constexpr, OUTPUT: tl.constexpr,
                               BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
                               STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """The same convolution, whose C_out channels fit one tile, and the 1×1 head on them; only the head is written."""
    tiles_h, tiles_w, _ = tiles
    tile = tl.program_id(0)
    w0, h0, n = tile % tiles_w * BLOCK_W, tile // tiles_w % tiles_h * 4, tile // (tiles_w * tiles_h)
    y0, y1, y2, y3 = accumulate_rows(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels,
                                     offset, n, h0, w0, 0, BLOCK_K, BLOCK_W, BLOCK_C, STAGES, PRECISION)
    head_row(y0, bias_ptr, head_weight_ptr, head_bias_ptr, out_ptr, n, h0, w0, y_shape, SLOPE, NUM_CLASSES,
             BLOCK_CLASSES, OUTPUT, PRECISION)
    head_row(y1, bias_ptr, head_weight_ptr, head_bias_ptr, out_ptr, n, h0 + 1, w0, y_shape, SLOPE, NUM_CLASSES,
             BLOCK_CLASSES, OUTPUT, PRECISION)
    head_row(y2, bias_ptr, head_weight_ptr, head_bias_ptr, out_ptr, n, h0 + 2, w0, y_shape, SLOPE, NUM_CLASSES,
             BLOCK_CLASSES, OUTPUT, PRECISION)
    head_row(y3, bias_ptr, head_weight_ptr, head_bias_ptr, out_ptr, n, h0 + 3, w0, y_shape, SLOPE, NUM_CLASSES,
             BLOCK_CLASSES, OUTPUT, PRECISION)


def _tiles(conv: Convolution, config: ConvConfig) -> tuple[int, tuple[int, int, int]]:
    """The number of programs, and the tiles along output rows, columns and channels."""
    h, w = conv.out_size
    tiles = _launch.cdiv(h, ROWS), _launch.cdiv(w, config.block_w), _launch.cdiv(conv.c_out, config.block_k)
    return conv.batch * tiles[0] * tiles[1] * tiles[2], tiles


def launch_rows(conv: Convolution, y, pooled, statistics, config: ConvConfig, second=None) -> None:
    """Writes the convolution to ``y`` and ``second``, its 2×2 max-pool to ``pooled`` and each tile's ``statistics``,
    unless None."""
    programs, tiles = _tiles(conv, config)
    half = (1, 1, config.block_w // 2, config.block_k)
    _launch.launch(conv_relu_rows_kernel, (programs,),
                   *tap_sources(conv, (1, 1, config.block_w, config.block_c), config.block_k), conv.offset, conv.bias,
                   *output_boxes(conv, y, second, (1, 1, config.block_w), config.block_k),
                   None if pooled is None else image_boxes(pooled, half), statistics, conv.c_out, tiles,
                   SLOPE=conv.slope, BLOCK_K=config.block_k, BLOCK_W=config.block_w, BLOCK_C=config.block_c,
                   STAGES=config.num_stages, PRECISION=_launch.dot_precision(y.dtype), FLIPPED=conv.flipped,
                   num_warps=config.num_warps, num_stages=config.num_stages)


def launch_rows_head(conv: Convolution, head: Head, out, config: ConvConfig) -> None:
    """Writes the head's logits, probabilities or labels of the convolution to ``out``."""
    programs, tiles = _tiles(conv, config)
    _launch.launch(conv_relu_rows_head_kernel, (programs,),
                   *tap_sources(conv, (1, 1, config.block_w, config.block_c), config.block_k), conv.offset, conv.bias,
                   head.weight, head.bias, out, (conv.batch, *conv.out_size, conv.c_out), tiles, SLOPE=conv.slope,
                   NUM_CLASSES=head.classes, BLOCK_CLASSES=head.block, OUTPUT=head.output, BLOCK_K=config.block_k,
                   BLOCK_W=config.block_w, BLOCK_C=config.block_c, STAGES=config.num_stages,
                   PRECISION=_launch.dot_precision(conv.x.dtype), num_warps=config.num_warps,
                   num_stages=config.num_stages)
