"""3×3 convolution to at most 32 channels: two output rows share the M side of the product, for sm_90 and newer.

`wgmma` multiplies at least 64 rows of weights. For 32 channels those are the taps of two kernel rows: input row
2i + j - off_h meets row j of the kernel for output row 2i, and row j - 1 for output row 2i + 1. Four input rows and
three columns give both output rows; 3/4 of the products count, where padding the channels to 64 would waste half. The
other quarter multiplies by zero, so that an infinity or NaN of the input reaches both rows of a pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import _launch
from .._launch import mma
from .._weights import stacked_rows
from .convolution import ConvConfig, Convolution, Head
from .descriptors import image_boxes, matrix_boxes, row_pair_boxes
from .epilogue import bias_activation, head_store, max_of_pairs, tile_statistics


@triton.jit
def add_row_pairs_source(acc, x_desc, weight_desc, C, offset, n, i0, w0, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
                         BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """Adds 9 taps and C channels to ``acc`` [(odd row's, even row's channels), row pairs i0.. × columns w0..]."""
    STACK: tl.constexpr = acc.shape[0]
    for i in tl.range(0, 12 * tl.cdiv(C, BLOCK_C), num_stages=STAGES):
        j, s = i % 12 % 4, i % 12 // 4
        c = i // 12 * BLOCK_C
        row = j - offset[0]
        x = x_desc.load([n, i0 + (row >> 1), row & 1, w0 + s - offset[1], c])
        weight = tl.reshape(weight_desc.load([s, (j - 1) * (STACK // 2), c]), (STACK, BLOCK_C))
        acc = mma(weight, tl.reshape(x, (BLOCK_H * BLOCK_W, BLOCK_C)).T, acc, PRECISION)
    return acc


@triton.jit
def accumulate_row_pairs(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels, offset, n, i0,
                         w0, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
                         BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """The sums of one tile over the skip, if any, then over x."""
    acc = tl.zeros((2 * BLOCK_K, BLOCK_H * BLOCK_W), tl.float32)
    if skip_desc is not None:
        acc = add_row_pairs_source(acc, skip_desc, skip_weight_desc, skip_channels, offset, n, i0, w0,
                                   BLOCK_H, BLOCK_W, BLOCK_C, STAGES, PRECISION)
    return add_row_pairs_source(acc, x_desc, x_weight_desc, x_channels, offset, n, i0, w0,
                                BLOCK_H, BLOCK_W, BLOCK_C, STAGES, PRECISION)


@triton.jit
def unstacked(y, i0, w0, BLOCK_W: tl.constexpr):
    """``y`` as [channels, (odd row's, even row's) pixels], and (h, w) of these pixels."""
    BLOCK_K: tl.constexpr = y.shape[0] // 2
    PIXELS: tl.constexpr = y.shape[1]
    offs_p = tl.arange(0, 2 * PIXELS)
    h = 2 * (i0 + offs_p % PIXELS // BLOCK_W) + 1 - offs_p // PIXELS
    y = tl.reshape(tl.permute(tl.reshape(y, (2, BLOCK_K, PIXELS)), (1, 0, 2)), (BLOCK_K, 2 * PIXELS))
    return y, h, w0 + offs_p % BLOCK_W


@triton.jit(do_not_specialize=["x_channels", "skip_channels", "offset", "y_shape", "tiles"])
def conv_relu_two_rows_kernel(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels, offset,
                              bias_ptr, mask_ptr, y_ptr, pooled_desc, statistics_ptr, y_shape, tiles,
                              SLOPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
                              BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr,
                              STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """``y = relu(conv(skip) + conv(x) + bias) * (mask > 0)``, its 2×2 max-pool and tile statistics, each part optional.

    Boxes: x, skip [1, BH, 1, BW, BC] of (N, H/2, 2, W, C); weights [1, 2·BK, BC] of (3, 3·BK, C);
    pooled [1, BH, BW/2, BK]. ``y_shape`` (N, H, W, C_out <= BK); ``tiles`` counts the tiles along (row pairs, columns).
    """
    _, H, W, C_out = y_shape
    C_out = C_out // VECTOR * VECTOR  # a multiple of VECTOR; shows the compiler that it may store VECTOR at once
    tiles_h, tiles_w = tiles
    tile = tl.program_id(0)
    w0, i0, n = tile % tiles_w * BLOCK_W, tile // tiles_w % tiles_h * BLOCK_H, tile // (tiles_w * tiles_h)
    acc = accumulate_row_pairs(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels, offset,
                               n, i0, w0, BLOCK_K, BLOCK_H, BLOCK_W, BLOCK_C, STAGES, PRECISION)
    offs_m, offs_p = tl.arange(0, 2 * BLOCK_K), tl.arange(0, BLOCK_H * BLOCK_W)
    offs_k, odd = offs_m % BLOCK_K, 1 - offs_m // BLOCK_K
    y = bias_activation(acc, bias_ptr, offs_k, C_out, SLOPE)
    h = 2 * (i0 + offs_p // BLOCK_W)[None, :] + odd[:, None]
    w = w0 + offs_p % BLOCK_W
    y_mask = (offs_k < C_out)[:, None] & (h < H) & (w < W)[None, :]
    first = ((n.to(tl.int64) * H + 2 * i0) * W + w0) * C_out
    offs_y = ((h - 2 * i0) * W + (w - w0)[None, :]) * C_out + offs_k[:, None]
    if mask_ptr is not None:
        y = tl.where(tl.load(mask_ptr + first + offs_y, mask=y_mask, other=0.0) > 0, y, 0.0)
    tl.store(y_ptr + first + offs_y, y.to(y_ptr.dtype.element_ty), mask=y_mask)
    if pooled_desc is not None:
        pairs = max_of_pairs(tl.reshape(y, (2, BLOCK_K, BLOCK_H * BLOCK_W // 2, 2)))
        pooled = max_of_pairs(tl.permute(pairs, (1, 2, 0)))
        pooled_desc.store([n, i0, w0 // 2, 0],
                          tl.reshape(pooled.to(pooled_desc.dtype).T, (1, BLOCK_H, BLOCK_W // 2, BLOCK_K)))
    if statistics_ptr is not None:
        y, h, w = unstacked(y, i0, w0, BLOCK_W)
        tile_statistics(statistics_ptr, y, (h < H) & (w < W), tile, tl.arange(0, BLOCK_K), C_out,
                        y_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["x_channels", "skip_channels", "offset", "y_shape", "tiles"])
def conv_relu_two_rows_head_kernel(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels,
                                   offset, bias_ptr, head_weight_ptr, head_bias_ptr, out_ptr, y_shape, tiles,
                                   SLOPE: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
                                   OUTPUT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
                                   BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
                                   PRECISION: tl.constexpr):
    """The same convolution and the 1×1 head on its channels; only the head is written."""
    _, H, W, C_out = y_shape
    tiles_h, tiles_w = tiles
    tile = tl.program_id(0)
    w0, i0, n = tile % tiles_w * BLOCK_W, tile // tiles_w % tiles_h * BLOCK_H, tile // (tiles_w * tiles_h)
    acc = accumulate_row_pairs(x_desc, x_weight_desc, x_channels, skip_desc, skip_weight_desc, skip_channels, offset,
                               n, i0, w0, BLOCK_K, BLOCK_H, BLOCK_W, BLOCK_C, STAGES, PRECISION)
    y = bias_activation(acc, bias_ptr, tl.arange(0, 2 * BLOCK_K) % BLOCK_K, C_out, SLOPE)
    y, h, w = unstacked(y.to(head_weight_ptr.dtype.element_ty), i0, w0, BLOCK_W)
    head_store(y, head_weight_ptr, head_bias_ptr, out_ptr, (n.to(tl.int64) * H + h) * W + w, (h < H) & (w < W),
               tl.arange(0, BLOCK_K), C_out, NUM_CLASSES, BLOCK_CLASSES, OUTPUT, PRECISION)


def _sources(conv: Convolution, config: ConvConfig) -> tuple:
    """The kernels' arguments for x and the skip: image, weights, channels."""
    box = (1, config.block_h, 1, config.block_w, config.block_c)
    args = []
    weights = conv.split(stacked_rows(conv.weight, config.block_k, conv.flipped))
    for image, weight in zip((conv.x, conv.skip), weights):
        if image is None:
            args += [None, None, 0]
        else:
            rows = matrix_boxes(weight, (1, 2 * config.block_k, config.block_c))
            args += [row_pair_boxes(image, box), rows, image.shape[1]]
    return tuple(args)


def _tiles(conv: Convolution, config: ConvConfig) -> tuple[int, tuple[int, int]]:
    """The number of programs, and the tiles along pairs of output rows and along columns."""
    h, w = conv.out_size
    tiles = _launch.cdiv(_launch.cdiv(h, 2), config.block_h), _launch.cdiv(w, config.block_w)
    return conv.batch * tiles[0] * tiles[1], tiles


def launch_two_rows(conv: Convolution, y, pooled, statistics, config: ConvConfig) -> None:
    """Writes the convolution to ``y``, its 2×2 max-pool to ``pooled`` and each tile's ``statistics``, unless None."""
    programs, tiles = _tiles(conv, config)
    half = (1, config.block_h, config.block_w // 2, config.block_k)
    _launch.launch(conv_relu_two_rows_kernel, (programs,), *_sources(conv, config), conv.offset, conv.bias, conv.mask,
                   y, None if pooled is None else image_boxes(pooled, half), statistics,
                   (conv.batch, *conv.out_size, conv.c_out), tiles, SLOPE=conv.slope,
                   BLOCK_K=config.block_k, BLOCK_H=config.block_h, BLOCK_W=config.block_w, BLOCK_C=config.block_c,
                   VECTOR=_launch.vector_width(y), STAGES=config.num_stages, PRECISION=_launch.dot_precision(y.dtype),
                   num_warps=config.num_warps, num_stages=config.num_stages)


def launch_two_rows_head(conv: Convolution, head: Head, out, config: ConvConfig) -> None:
    """Writes the head's logits, probabilities or labels of the convolution to ``out``."""
    programs, tiles = _tiles(conv, config)
    _launch.launch(conv_relu_two_rows_head_kernel, (programs,), *_sources(conv, config), conv.offset, conv.bias,
                   head.weight, head.bias, out, (conv.batch, *conv.out_size, conv.c_out), tiles, SLOPE=conv.slope,
                   NUM_CLASSES=head.classes, BLOCK_CLASSES=head.block, OUTPUT=head.output, BLOCK_K=config.block_k,
                   BLOCK_H=config.block_h, BLOCK_W=config.block_w, BLOCK_C=config.block_c, STAGES=config.num_stages,
                   PRECISION=_launch.dot_precision(conv.x.dtype), num_warps=config.num_warps,
                   num_stages=config.num_stages)
