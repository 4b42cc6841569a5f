"""3×3 convolution that feeds each loaded input row to all the output rows that need it, for sm_90 and newer.

A tile is two, four or six output rows of one image. For each column shift two input rows more are loaded once and serve
three products for each output row, where a tap-by-tap kernel loads 24 or 36: for up to 128 channels the L2 cache is
what limits that one.

`wgmma` multiplies at least 64 rows of weights. Fewer output channels are stacked: those of 2 neighbouring columns where
there are 32, of 4 where there are 16. Such a group meets STACK + 2 input columns, each with the taps that the group's
columns have for it, or zero. So 32 channels take 4 products of 64 rows for 2 columns instead of 6, and load each pixel
twice instead of three times. As zeros are multiplied, an infinity or NaN of the input reaches all columns of a group.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from .. import _launch
from .._launch import mma
from .convolution import ConvConfig, Convolution, Head
from .descriptors import column_boxes, image_boxes, output_boxes, tap_sources, tap_weight
from .epilogue import bias_activation, head_store, max_of_pairs, store_images, tile_statistics


@triton.jit
def stacked_weight(weight, weight_stride, r, t, k0, c, C, STACK: tl.constexpr, BLOCK_K: tl.constexpr,
                   BLOCK_C: tl.constexpr, FLIPPED: tl.constexpr):
    """Weights of kernel row ``r`` for input column ``t`` of a group, as operand A [STACK·BK, BC].

    Part j, for the group's output column j, is the tap of kernel column t - j, or zero where there is none.
    """
    if STACK == 1:
        tile = tap_weight(weight, 3 * r + t, k0, c, FLIPPED)
    else:
        VECTOR: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
        stride = weight_stride // VECTOR * VECTOR  # multiples of VECTOR; shows the compiler that it may load so many
        offs_m, offs_c = tl.arange(0, STACK * BLOCK_K)[:, None], tl.arange(0, BLOCK_C)[None, :]
        j = offs_m // BLOCK_K
        # what changes from step to step is one scalar, so that a thread keeps few addresses
        if FLIPPED:
            first = (8 - 3 * r - t) * stride + c * (9 * stride)
            at = offs_m % BLOCK_K + j * stride + offs_c * (9 * stride)
        else:
            first = (3 * r + t) * stride + c
            at = offs_m % BLOCK_K * (9 * stride) - j * stride + offs_c
        mask = (j <= t) & (t - j < 3) & (offs_c < C // VECTOR * VECTOR - c)
        tile = tl.load(weight + first + at, mask=mask, other=0.0)
    return tile


@triton.jit
def add_rows_source(rows, x_desc, weight, weight_stride, C, n, h0, group, shift, k0, STACK: tl.constexpr,
                    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
                    FLIPPED: tl.constexpr):
    """Adds 9 taps and C channels to each of ``rows``; the first of them has its first tap in input row ``h0``, and
    ``shift`` columns to the left of its first column, that of ``group``."""
    ROWS: tl.constexpr = len(rows)
    for i in tl.range(0, (STACK + 2) * tl.cdiv(C, BLOCK_C), num_stages=STAGES):
        t = i % (STACK + 2)
        c = i // (STACK + 2) * BLOCK_C
        column = (t - shift) & (STACK - 1)  # within its group, also where it is left of the image
        w = group + (t - shift - column) // STACK
        weights = (stacked_weight(weight, weight_stride, 0, t, k0, c, C, STACK, BLOCK_K, BLOCK_C, FLIPPED),
                   stacked_weight(weight, weight_stride, 1, t, k0, c, C, STACK, BLOCK_K, BLOCK_C, FLIPPED),
                   stacked_weight(weight, weight_stride, 2, t, k0, c, C, STACK, BLOCK_K, BLOCK_C, FLIPPED))
        for h in tl.static_range(ROWS + 2):
            x = x_desc.load([n, h0 + h, w, column, c])
            x = tl.reshape(x, (x.shape[2], BLOCK_C)).T
            for r in tl.static_range(3):
                if r <= h and h - r < ROWS:
                    rows = rows[: h - r] + (mma(weights[r], x, rows[h - r], PRECISION),) + rows[h - r + 1 :]
    return rows


@triton.jit
def accumulate_rows(x_desc, x_weight, x_channels, skip_desc, skip_weight, skip_channels, weight_stride, offset, n, h0,
                    group, k0, ROWS: tl.constexpr, STACK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
                    BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
                    FLIPPED: tl.constexpr = False):
    """The sums [STACK·BK, BW] of each of ROWS output rows over the skip, if any, then over x."""
    rows = ()
    for _ in tl.static_range(ROWS):
        rows = rows + (tl.zeros((STACK * BLOCK_K, BLOCK_W), tl.float32),)
    if skip_desc is not None:
        rows = add_rows_source(rows, skip_desc, skip_weight, weight_stride, skip_channels, n, h0 - offset[0], group,
                               offset[1], k0, STACK, BLOCK_K, BLOCK_C, STAGES, PRECISION, FLIPPED)
    return add_rows_source(rows, x_desc, x_weight, weight_stride, x_channels, n, h0 - offset[0], group, offset[1], k0,
                           STACK, BLOCK_K, BLOCK_C, STAGES, PRECISION, FLIPPED)


@triton.jit
def side_by_side(y, STACK: tl.constexpr):
    """``y`` [STACK·BK, groups] as [BK, columns]."""
    if STACK > 1:
        BLOCK_K: tl.constexpr = y.shape[0] // STACK
        y = tl.permute(tl.reshape(y, (STACK, BLOCK_K, y.shape[1])), (1, 2, 0))
        y = tl.reshape(y, (BLOCK_K, y.shape[1] * STACK))
    return y


@triton.jit
def pool_rows(upper, lower, pooled_desc, n, h, w, k0, STACK: tl.constexpr):
    """Stores the 2×2 maxima of two rows."""
    rows = tl.maximum(upper, lower, propagate_nan=tl.PropagateNan.ALL).to(pooled_desc.dtype)
    rows = side_by_side(rows, STACK).to(tl.float32)
    HALF_W: tl.constexpr = rows.shape[1] // 2
    pooled = max_of_pairs(tl.reshape(rows, (rows.shape[0], HALF_W, 2)))
    pooled_desc.store([n, h, w, k0], tl.reshape(pooled.to(pooled_desc.dtype).T, (1, 1, HALF_W, rows.shape[0])))


@triton.jit(do_not_specialize=["x_channels", "skip_channels", "weight_stride", "offset", "C_out", "tiles"])
def conv_relu_rows_kernel(x_desc, x_weight, x_channels, skip_desc, skip_weight, skip_channels, weight_stride, offset,
                          bias_ptr, mask_desc, y_desc, second_mask_desc, second_desc, pooled_desc, statistics_ptr,
                          C_out, tiles, SLOPE: tl.constexpr, ROWS: tl.constexpr, STACK: tl.constexpr,
                          BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
                          PRECISION: tl.constexpr, FLIPPED: tl.constexpr):
    """``y = relu(conv(skip) + conv(x) + bias) * (mask > 0)``, its 2×2 max-pool and tile statistics, each part optional.

    A tile has BW groups of STACK columns. Boxes: x, skip [1, 1, BW, 1, BC] of (N, H, W/STACK, STACK, C); weights those
    of :func:`tap_sources`; masks and outputs, see :func:`store_images`, [1, 1, BW, STACK·BK or half] of
    (N, H, W/STACK, STACK·C); pooled [1, 1, BW·STACK/2, BK]. ``tiles`` counts the tiles along (h, w, C_out).
    """
    tiles_h, tiles_w, tiles_k = tiles
    k0, tile = tl.program_id(0) % tiles_k * BLOCK_K, tl.program_id(0) // tiles_k
    group, h0, n = tile % tiles_w * BLOCK_W, tile // tiles_w % tiles_h * ROWS, tile // (tiles_w * tiles_h)
    rows = accumulate_rows(x_desc, x_weight, x_channels, skip_desc, skip_weight, skip_channels, weight_stride, offset,
                           n, h0, group, k0, ROWS, STACK, BLOCK_K, BLOCK_W, BLOCK_C, STAGES, PRECISION, FLIPPED)
    offs_m = tl.arange(0, STACK * BLOCK_K)
    offs_k = k0 + offs_m % BLOCK_K
    for i in tl.static_range(0, ROWS, 2):
        upper = store_images(bias_activation(rows[i], bias_ptr, offs_k, C_out, SLOPE), mask_desc, y_desc,
                             second_mask_desc, second_desc, n, h0 + i, group, k0)
        lower = store_images(bias_activation(rows[i + 1], bias_ptr, offs_k, C_out, SLOPE), mask_desc, y_desc,
                             second_mask_desc, second_desc, n, h0 + i + 1, group, k0)
        if pooled_desc is not None:
            pool_rows(upper, lower, pooled_desc, n, (h0 + i) // 2, group * STACK // 2, k0, STACK)
        rows = rows[:i] + (upper.to(y_desc.dtype), lower.to(y_desc.dtype)) + rows[i + 2 :]
    if statistics_ptr is not None:
        insides = ()
        for i in tl.static_range(ROWS):
            width = tl.where(h0 + i < y_desc.shape[1], y_desc.shape[2], 0)
            insides = insides + (group + tl.arange(0, BLOCK_W) < width,)
        tile_statistics(statistics_ptr, rows, insides, tile * STACK + offs_m // BLOCK_K, offs_k, C_out, y_desc.dtype)


@triton.jit(do_not_specialize=["x_channels", "skip_channels", "weight_stride", "offset", "y_shape", "tiles"])
def conv_relu_rows_head_kernel(x_desc, x_weight, x_channels, skip_desc, skip_weight, skip_channels, weight_stride,
                               offset, bias_ptr, head_weight_ptr, head_bias_ptr, out_ptr, y_shape, tiles,
                               SLOPE: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
                               OUTPUT: tl.constexpr, ROWS: tl.constexpr, STACK: tl.constexpr, BLOCK_K: tl.constexpr,
                               BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
                               PRECISION: tl.constexpr):
    """The same convolution, whose C_out channels fit one tile, and the 1×1 head on them; only the head is written."""
    _, H, W, C_out = y_shape
    tiles_h, tiles_w, _ = tiles
    tile = tl.program_id(0)
    group, h0, n = tile % tiles_w * BLOCK_W, tile // tiles_w % tiles_h * ROWS, tile // (tiles_w * tiles_h)
    rows = accumulate_rows(x_desc, x_weight, x_channels, skip_desc, skip_weight, skip_channels, weight_stride, offset,
                           n, h0, group, 0, ROWS, STACK, BLOCK_K, BLOCK_W, BLOCK_C, STAGES, PRECISION)
    w = group * STACK + tl.arange(0, BLOCK_W * STACK)
    for i in tl.static_range(ROWS):
        y = bias_activation(rows[i], bias_ptr, tl.arange(0, STACK * BLOCK_K) % BLOCK_K, C_out, SLOPE)
        y = side_by_side(y.to(head_weight_ptr.dtype.element_ty), STACK)
        head_store(y, head_weight_ptr, head_bias_ptr, out_ptr, (n.to(tl.int64) * H + h0 + i) * W + w,
                   w < tl.where(h0 + i < H, W, 0), tl.arange(0, BLOCK_K), C_out, NUM_CLASSES, BLOCK_CLASSES, OUTPUT,
                   PRECISION)


def _launch_rows(kernel, conv: Convolution, config: ConvConfig, *args, C_out, **options) -> None:
    """Starts ``kernel`` with what both have in common around ``args``; ``C_out`` is that number or y's shape."""
    (h, w), stack = conv.out_size, config.stack
    tiles = _launch.cdiv(h, config.block_h), _launch.cdiv(w, config.block_w), _launch.cdiv(conv.c_out, config.block_k)
    boxes = functools.partial(column_boxes, box=(config.block_w // stack, 1, config.block_c), stack=stack)
    weight_stride = conv.weight.stride(2) if conv.flipped else conv.weight.shape[3]
    _launch.launch(kernel, (conv.batch * tiles[0] * tiles[1] * tiles[2],),
                   *tap_sources(conv, boxes, config.block_k, config.block_c, stack), weight_stride, conv.offset,
                   conv.bias, *args, C_out, tiles, SLOPE=conv.slope, ROWS=config.block_h, STACK=stack,
                   BLOCK_K=config.block_k, BLOCK_W=config.block_w // stack, BLOCK_C=config.block_c,
                   STAGES=config.num_stages, PRECISION=_launch.dot_precision(conv.x.dtype), **options,
                   num_warps=config.num_warps, num_stages=config.num_stages)


def launch_rows(conv: Convolution, y, pooled, statistics, config: ConvConfig, second=None) -> None:
    """Writes the convolution to ``y`` and ``second``, its 2×2 max-pool to ``pooled`` and each tile's ``statistics``,
    unless None."""
    pixels, half = (1, 1, config.block_w // config.stack), (1, 1, config.block_w // 2, config.block_k)
    _launch_rows(conv_relu_rows_kernel, conv, config,
                 *output_boxes(conv, y, second, pixels, config.block_k, config.stack),
                 None if pooled is None else image_boxes(pooled, half), statistics, C_out=conv.c_out,
                 FLIPPED=conv.flipped)


def launch_rows_head(conv: Convolution, head: Head, out, config: ConvConfig) -> None:
    """Writes the head's logits, probabilities or labels of the convolution to ``out``."""
    _launch_rows(conv_relu_rows_head_kernel, conv, config, head.weight, head.bias, out,
                 C_out=(conv.batch, *conv.out_size, conv.c_out), NUM_CLASSES=head.classes, BLOCK_CLASSES=head.block,
                 OUTPUT=head.output)
