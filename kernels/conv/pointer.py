"""3×3 convolution by masked pointers: any channel count, any architecture, tiles over the flattened output pixels."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import _launch
from .._launch import mma
from .convolution import ConvConfig, Convolution, Head
from .epilogue import bias_activation, head_store, max_of_pairs, tile_statistics


@triton.jit
def unflatten(p, y_shape, WINDOWS: tl.constexpr):
    """(n, h, w) of the flat output pixel ``p``: row-major, or with ``WINDOWS`` 2×2 pooling window by window.

    The window order keeps the four pixels of each window side by side in one tile, whatever the image size; it counts
    odd sizes up, so (h, w) may lie outside of the image. There are fewer than 2³¹ pixels: each has several channels.
    """
    _, H, W, _ = y_shape
    if WINDOWS:
        windows_h, windows_w = (H + 1) // 2, (W + 1) // 2
        window = p // 4
        w = window % windows_w * 2 + p % 2
        h = window // windows_w % windows_h * 2 + p // 2 % 2
        n = window // (windows_w * windows_h)
    else:
        w = p % W
        h = p // W % H
        n = p // (W * H)
    return n, h, w


@triton.jit
def add_source(acc, x_ptr, weight_ptr, x_shape, offset, n, h, w, p_mask, offs_k, k_mask, WEIGHT_TAP,
               BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """``acc[k, p] += sum_{r,s,c} weight[k, r, s, c] * x[n, h + r - off_h, w + s - off_w, c]``, zero outside of x."""
    H, W, C, stride_n, stride_h = x_shape
    # all are multiples of VECTOR; written to show the compiler that it may load VECTOR elements at once
    C, stride_n, stride_h = C // VECTOR * VECTOR, stride_n // VECTOR * VECTOR, stride_h // VECTOR * VECTOR
    WEIGHT_TAP = WEIGHT_TAP // VECTOR * VECTOR
    h, w = h - offset[0], w - offset[1]
    x_ptrs = x_ptr + n.to(tl.int64) * stride_n + h.to(tl.int64) * stride_h + w * C
    weight_ptrs = weight_ptr + offs_k * (9 * WEIGHT_TAP)
    for i in tl.range(0, 9 * tl.cdiv(C, BLOCK_C), num_stages=STAGES):
        tap = i % 9
        r, s = tap // 3, tap % 3
        offs_c = i // 9 * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = offs_c < C
        inside = p_mask & (h + r >= 0) & (h + r < H) & (w + s >= 0) & (w + s < W)
        x = tl.load(x_ptrs[:, None] + (r * stride_h + s * C + offs_c)[None, :],
                    mask=inside[:, None] & c_mask[None, :], other=0.0)
        weight = tl.load(weight_ptrs[:, None] + (tap * WEIGHT_TAP + offs_c)[None, :],
                         mask=k_mask[:, None] & c_mask[None, :], other=0.0)
        acc = mma(weight, x.T, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["x_shape", "skip_shape", "offset", "y_shape", "WEIGHT_TAP"])
def conv_relu_pointer_kernel(x_ptr, x_weight_ptr, x_shape, skip_ptr, skip_weight_ptr, skip_shape, offset,
                             bias_ptr, mask_ptr, y_ptr, pooled_ptr, statistics_ptr, y_shape, WEIGHT_TAP,
                             SLOPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
                             BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, VECTOR_OUT: tl.constexpr,
                             STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """``y = relu(conv(skip) + conv(x) + bias) * (mask > 0)``, its 2×2 max-pool and tile statistics, each part optional.

    ``x_shape`` (H, W, C, stride of an image, stride of a row), ``y_shape`` (N, H, W, C_out); a weight row holds 9 taps
    of WEIGHT_TAP channels.
    """
    N, H, W, C_out = y_shape
    k_tiles = tl.cdiv(C_out, BLOCK_K)
    tile = tl.program_id(0) // k_tiles
    offs_k = tl.program_id(0) % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    k_mask = offs_k < C_out
    n, h, w = unflatten(tile * BLOCK_P + tl.arange(0, BLOCK_P), y_shape, pooled_ptr is not None)
    p_mask = (n < N) & (h < H) & (w < W)
    acc = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    if skip_ptr is not None:
        acc = add_source(acc, skip_ptr, skip_weight_ptr, skip_shape, offset, n, h, w, p_mask, offs_k, k_mask,
                         WEIGHT_TAP, BLOCK_C, VECTOR, STAGES, PRECISION)
    acc = add_source(acc, x_ptr, x_weight_ptr, x_shape, offset, n, h, w, p_mask, offs_k, k_mask,
                     WEIGHT_TAP, BLOCK_C, VECTOR, STAGES, PRECISION)
    y = bias_activation(acc, bias_ptr, offs_k, C_out, SLOPE)
    first = unflatten(tile * BLOCK_P, y_shape, pooled_ptr is not None)
    store_tile(y, mask_ptr, y_ptr, pooled_ptr, statistics_ptr, y_shape, tile, first, n, h, w, p_mask, offs_k,
               VECTOR_OUT)


@triton.jit
def store_tile(y, mask_ptr, y_ptr, pooled_ptr, statistics_ptr, y_shape, tile, first, n, h, w, p_mask, offs_k,
               VECTOR: tl.constexpr):
    """Stores ``y`` [C_out, pixels], times (mask > 0), the maxima of its 2×2 windows (see :func:`unflatten`), and its
    statistics.

    Offsets are 32 bits wide from the 64-bit one of the tile's ``first`` (n, h, w): ragged channels are stored one by
    one, and twice the address registers spill.
    """
    _, H, W, C_out = y_shape
    C_out = C_out // VECTOR * VECTOR
    k_mask = offs_k < C_out
    first_pixel = (first[0] * H + first[1]) * W + first[2]
    first_y = first_pixel.to(tl.int64) * C_out
    offs_y = ((n * H + h) * W + w - first_pixel)[None, :] * C_out + offs_k[:, None]
    y_mask = k_mask[:, None] & p_mask[None, :]
    if mask_ptr is not None:
        y = tl.where(tl.load(mask_ptr + first_y + offs_y, mask=y_mask, other=0.0) > 0, y, 0.0)
    tl.store(y_ptr + first_y + offs_y, y.to(y_ptr.dtype.element_ty), mask=y_mask)
    if pooled_ptr is not None:
        BLOCK_K: tl.constexpr = y.shape[0]
        QUADS: tl.constexpr = y.shape[1] // 4
        pooled = max_of_pairs(max_of_pairs(tl.reshape(y, (BLOCK_K, QUADS, 2, 2))))
        complete = p_mask & (h // 2 < H // 2) & (w // 2 < W // 2)
        window = tl.where(complete, (n * (H // 2) + h // 2) * (W // 2) + w // 2, -1)
        window = tl.max(tl.reshape(window, (QUADS, 4)), axis=1)  # the four pixels of a window agree on its index
        tl.store(pooled_ptr + window.to(tl.int64)[None, :] * C_out + offs_k[:, None],
                 pooled.to(pooled_ptr.dtype.element_ty), mask=k_mask[:, None] & (window >= 0)[None, :])
    if statistics_ptr is not None:
        tile_statistics(statistics_ptr, (y,), (p_mask,), tile, offs_k, C_out, y_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["x_shape", "skip_shape", "offset", "y_shape", "WEIGHT_TAP"])
def conv_relu_pointer_head_kernel(x_ptr, x_weight_ptr, x_shape, skip_ptr, skip_weight_ptr, skip_shape,
                                  offset, bias_ptr, head_weight_ptr, head_bias_ptr, out_ptr, y_shape, WEIGHT_TAP,
                                  SLOPE: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
                                  OUTPUT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
                                  BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
                                  PRECISION: tl.constexpr):
    """The same convolution, whose C_out channels fit one tile, and the 1×1 head on them; only the head is written."""
    N, H, W, C_out = y_shape
    offs_k = tl.arange(0, BLOCK_K)
    k_mask = offs_k < C_out
    n, h, w = unflatten(tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), y_shape, False)
    p_mask = n < N
    acc = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    if skip_ptr is not None:
        acc = add_source(acc, skip_ptr, skip_weight_ptr, skip_shape, offset, n, h, w, p_mask, offs_k, k_mask,
                         WEIGHT_TAP, BLOCK_C, VECTOR, STAGES, PRECISION)
    acc = add_source(acc, x_ptr, x_weight_ptr, x_shape, offset, n, h, w, p_mask, offs_k, k_mask,
                     WEIGHT_TAP, BLOCK_C, VECTOR, STAGES, PRECISION)
    y = bias_activation(acc, bias_ptr, offs_k, C_out, SLOPE)
    pixel = (n.to(tl.int64) * H + h) * W + w
    head_store(y, head_weight_ptr, head_bias_ptr, out_ptr, pixel, p_mask, offs_k, C_out,
               NUM_CLASSES, BLOCK_CLASSES, OUTPUT, PRECISION)


def _sources(conv: Convolution) -> tuple:
    """The kernels' arguments for x and the skip: image, weights, (H, W, C, stride of an image, stride of a row)."""
    args = []
    for image, weight in zip((conv.x, conv.skip), conv.taps()):
        if image is None:
            args += [None, None, (0, 0, 0, 0, 0)]
        else:
            args += [image, weight, (*image.shape[2:], image.shape[1], image.stride(0), image.stride(2))]
    return tuple(args)


def launch_pointer(conv: Convolution, y, pooled, statistics, config: ConvConfig) -> None:
    """Writes the convolution to ``y``, its 2×2 max-pool to ``pooled`` and each tile's ``statistics``, unless None."""
    n, c_out, h, w = y.shape
    pixels = n * h * w if pooled is None else n * _launch.cdiv(h, 2) * _launch.cdiv(w, 2) * 4
    grid = (_launch.cdiv(pixels, config.pixels) * _launch.cdiv(c_out, config.block_k),)
    _launch.launch(conv_relu_pointer_kernel, grid, *_sources(conv), conv.offset, conv.bias,
                   conv.mask, y, pooled, statistics, (n, h, w, c_out), sum(conv.channels), SLOPE=conv.slope,
                   BLOCK_K=config.block_k, BLOCK_P=config.pixels, BLOCK_C=config.block_c,
                   VECTOR=min(map(_launch.vector_width, conv.images)), VECTOR_OUT=_launch.vector_width(y),
                   STAGES=config.num_stages, PRECISION=_launch.dot_precision(y.dtype), num_warps=config.num_warps,
                   num_stages=config.num_stages)


def launch_pointer_head(conv: Convolution, head: Head, out, config: ConvConfig) -> None:
    """Writes the head's logits, probabilities or labels of the convolution to ``out``."""
    n, h, w = conv.batch, *conv.out_size
    dtype = conv.x.dtype
    grid = (_launch.cdiv(n * h * w, config.pixels),)
    _launch.launch(conv_relu_pointer_head_kernel, grid, *_sources(conv), conv.offset, conv.bias,
                   head.weight, head.bias, out, (n, h, w, conv.c_out), sum(conv.channels), SLOPE=conv.slope,
                   NUM_CLASSES=head.classes, BLOCK_CLASSES=head.block, OUTPUT=head.output, BLOCK_K=config.block_k,
                   BLOCK_P=config.pixels, BLOCK_C=config.block_c, VECTOR=min(map(_launch.vector_width, conv.images)),
                   STAGES=config.num_stages, PRECISION=_launch.dot_precision(dtype), num_warps=config.num_warps,
                   num_stages=config.num_stages)
