"""3×3 convolution by masked pointers: any channel count, any architecture, tiles over the flattened output pixels."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _launch
from ._launch import mma
from .conv_relu_config import ConvConfig, Convolution, Head
from .conv_relu_epilogue import bias_relu, head_store, max_of_pairs


@triton.jit
def tile_pixels(tile, y_shape, BLOCK_P: tl.constexpr, WINDOWS: tl.constexpr):
    """(n, h, w, mask) of the output pixels of a tile: row-major, or with ``WINDOWS`` 2×2 window by window.

    The window order keeps the four pixels of each pooling window side by side in one tile, whatever the image size.
    """
    N, H, W, _ = y_shape
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
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
    return n, h, w, (n < N) & (h < H) & (w < W)


@triton.jit
def add_source(acc, x_ptr, weight_ptr, x_shape, offset, n, h, w, p_mask, offs_k, k_mask, WEIGHT_TAP,
               BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """``acc[k, p] += sum_{r,s,c} weight[k, r, s, c] * x[n, h + r - off_h, w + s - off_w, c]``, zero outside of x."""
    H, W, C = x_shape
    C = C // VECTOR * VECTOR  # C is a multiple of VECTOR; written so that the compiler sees it and loads VECTOR wide
    WEIGHT_TAP = WEIGHT_TAP // VECTOR * VECTOR
    h, w = h - offset[0], w - offset[1]
    x_ptrs = x_ptr + ((n.to(tl.int64) * H + h) * W + w) * C
    weight_ptrs = weight_ptr + offs_k * (9 * WEIGHT_TAP)
    for i in tl.range(0, 9 * tl.cdiv(C, BLOCK_C), num_stages=STAGES):
        tap = i % 9
        r, s = tap // 3, tap % 3
        offs_c = i // 9 * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = offs_c < C
        inside = p_mask & (h + r >= 0) & (h + r < H) & (w + s >= 0) & (w + s < W)
        x = tl.load(x_ptrs[:, None] + ((r * W + s) * C + offs_c)[None, :],
                    mask=inside[:, None] & c_mask[None, :], other=0.0)
        weight = tl.load(weight_ptrs[:, None] + (tap * WEIGHT_TAP + offs_c)[None, :],
                         mask=k_mask[:, None] & c_mask[None, :], other=0.0)
        acc = mma(weight, x.T, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["x_shape", "x_offset", "skip_shape", "skip_offset", "y_shape", "WEIGHT_TAP"])
def conv_relu_pointer_kernel(x_ptr, x_weight_ptr, x_shape, x_offset, skip_ptr, skip_weight_ptr, skip_shape, skip_offset,
                             bias_ptr, mask_ptr, y_ptr, pooled_ptr, y_shape, WEIGHT_TAP, RELU: tl.constexpr,
                             BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                             VECTOR: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """``y = relu(conv(skip) + conv(x) + bias) * (mask > 0)`` and its 2×2 max-pool, each part optional.

    Shapes: x (H, W, C) of each image, y (N, H, W, C_out); a weight row holds 9 taps of WEIGHT_TAP channels.
    """
    C_out = y_shape[3]
    k_tiles = tl.cdiv(C_out, BLOCK_K)
    tile = tl.program_id(0) // k_tiles
    offs_k = tl.program_id(0) % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    k_mask = offs_k < C_out
    n, h, w, p_mask = tile_pixels(tile, y_shape, BLOCK_P, pooled_ptr is not None)
    acc = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    if skip_ptr is not None:
        acc = add_source(acc, skip_ptr, skip_weight_ptr, skip_shape, skip_offset, n, h, w, p_mask, offs_k, k_mask,
                         WEIGHT_TAP, BLOCK_C, VECTOR, STAGES, PRECISION)
    acc = add_source(acc, x_ptr, x_weight_ptr, x_shape, x_offset, n, h, w, p_mask, offs_k, k_mask,
                     WEIGHT_TAP, BLOCK_C, VECTOR, STAGES, PRECISION)
    y = bias_relu(acc, bias_ptr, offs_k, C_out, RELU)
    store_tile(y, mask_ptr, y_ptr, pooled_ptr, y_shape, n, h, w, p_mask, offs_k, k_mask)


@triton.jit
def store_tile(y, mask_ptr, y_ptr, pooled_ptr, y_shape, n, h, w, p_mask, offs_k, k_mask):
    """Stores ``y`` [C_out, pixels], times (mask > 0), and the maxima of its 2×2 windows (see :func:`tile_pixels`)."""
    _, H, W, C_out = y_shape
    offs_y = ((n.to(tl.int64) * H + h) * W + w)[None, :] * C_out + offs_k[:, None]
    y_mask = k_mask[:, None] & p_mask[None, :]
    if mask_ptr is not None:
        y = tl.where(tl.load(mask_ptr + offs_y, mask=y_mask, other=0.0) > 0, y, 0.0)
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=y_mask)
    if pooled_ptr is not None:
        BLOCK_K: tl.constexpr = y.shape[0]
        QUADS: tl.constexpr = y.shape[1] // 4
        pooled = max_of_pairs(max_of_pairs(tl.reshape(y, (BLOCK_K, QUADS, 2, 2))))
        # every pixel of a window knows its place; the maximum over the four picks one copy of it
        window = (n.to(tl.int64) * (H // 2) + h // 2) * (W // 2) + w // 2
        complete = p_mask & (h // 2 < H // 2) & (w // 2 < W // 2)
        window = tl.max(tl.reshape(tl.where(complete, window, -1), (QUADS, 4)), axis=1)
        tl.store(pooled_ptr + window[None, :] * C_out + offs_k[:, None], pooled.to(pooled_ptr.dtype.element_ty),
                 mask=k_mask[:, None] & (window >= 0)[None, :])


@triton.jit(do_not_specialize=["x_shape", "x_offset", "skip_shape", "skip_offset", "y_shape", "WEIGHT_TAP"])
def conv_relu_pointer_head_kernel(x_ptr, x_weight_ptr, x_shape, x_offset, skip_ptr, skip_weight_ptr, skip_shape,
                                  skip_offset, bias_ptr, head_weight_ptr, head_bias_ptr, out_ptr, y_shape, WEIGHT_TAP,
                                  RELU: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
                                  OUTPUT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
                                  BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
                                  PRECISION: tl.constexpr):
    """The same convolution, whose C_out channels fit one tile, and the 1×1 head on them; only the head is written."""
    _, H, W, C_out = y_shape
    offs_k = tl.arange(0, BLOCK_K)
    k_mask = offs_k < C_out
    n, h, w, p_mask = tile_pixels(tl.program_id(0), y_shape, BLOCK_P, False)
    acc = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    if skip_ptr is not None:
        acc = add_source(acc, skip_ptr, skip_weight_ptr, skip_shape, skip_offset, n, h, w, p_mask, offs_k, k_mask,
                         WEIGHT_TAP, BLOCK_C, VECTOR, STAGES, PRECISION)
    acc = add_source(acc, x_ptr, x_weight_ptr, x_shape, x_offset, n, h, w, p_mask, offs_k, k_mask,
                     WEIGHT_TAP, BLOCK_C, VECTOR, STAGES, PRECISION)
    y = bias_relu(acc, bias_ptr, offs_k, C_out, RELU)
    pixel = (n.to(tl.int64) * H + h) * W + w
    head_store(y, head_weight_ptr, head_bias_ptr, out_ptr, pixel, p_mask, offs_k, C_out,
               NUM_CLASSES, BLOCK_CLASSES, OUTPUT, PRECISION)


def _sources(conv: Convolution) -> tuple:
    """The kernels' arguments for x and the skip."""
    x, skip = conv.x, conv.skip
    args = (x.image, x.weight, (*x.image.shape[2:], x.image.shape[1]), x.offset)
    if skip is None:
        return *args, None, None, (0, 0, 0), (0, 0)
    return *args, skip.image, skip.weight, (*skip.image.shape[2:], skip.image.shape[1]), skip.offset


def vector_width(conv: Convolution) -> int:
    """How many channels every row of pixels and weights can be loaded at a time: a power of two, 16 bytes at most."""
    width = 16 // conv.x.image.element_size()
    while any(source.image.shape[1] % width for source in conv.sources):
        width //= 2
    return width


def launch_pointer(conv: Convolution, y, pooled, config: ConvConfig) -> None:
    """Writes the convolution to ``y``, and its 2×2 max-pool to ``pooled`` unless that is None."""
    n, c_out, h, w = y.shape
    pixels = n * h * w if pooled is None else n * triton.cdiv(h, 2) * triton.cdiv(w, 2) * 4
    grid = (triton.cdiv(pixels, config.pixels) * triton.cdiv(c_out, config.block_k),)
    _launch.launch(conv_relu_pointer_kernel, grid, *_sources(conv), conv.bias, conv.mask, y, pooled, (n, h, w, c_out),
                   conv.weight_tap, RELU=conv.relu, BLOCK_K=config.block_k, BLOCK_P=config.pixels,
                   BLOCK_C=config.block_c, VECTOR=vector_width(conv), STAGES=config.num_stages,
                   PRECISION=_launch.dot_precision(y.dtype), num_warps=config.num_warps, num_stages=config.num_stages)


def launch_pointer_head(conv: Convolution, head: Head, out, config: ConvConfig) -> None:
    """Writes the head's logits, probabilities or labels of the convolution to ``out``."""
    n, h, w = conv.batch, *conv.out_size
    grid = (triton.cdiv(n * h * w, config.pixels),)
    _launch.launch(conv_relu_pointer_head_kernel, grid, *_sources(conv), conv.bias, head.weight, head.bias, out,
                   (n, h, w, conv.c_out), conv.weight_tap, RELU=conv.relu, NUM_CLASSES=head.classes,
                   BLOCK_CLASSES=head.block, OUTPUT=head.output, BLOCK_K=config.block_k, BLOCK_P=config.pixels,
                   BLOCK_C=config.block_c, VECTOR=vector_width(conv), STAGES=config.num_stages,
                   PRECISION=_launch.dot_precision(conv.x.image.dtype), num_warps=config.num_warps,
                   num_stages=config.num_stages)
