"""Weight and bias gradient of the 3×3 convolution: a matrix product whose reduction runs over all pixels, split.

    dw[k, c, r, s] = sum over n, i, j of  dz[n, k, i, j] · x[n, c, i + r - pad, j + s - pad]

with x zero outside of the image. Each program sums its share of the pixels in fp32, and a second kernel adds the
shares in a fixed order. The bias gradient, the sum of dz, is made by further programs of the same two launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _launch
from .._launch import mma
from .._reduce import column_tile, sum_columns, sum_gradients
from .descriptors import image_boxes
from .weight_grad_config import WeightGradConfig, choose_config, choose_splits, why_not
from .weight_grad_first import launch_first


@triton.jit
def load_tile(image, shape, strides, n, h, w, c, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
              VECTOR: tl.constexpr, BULK: tl.constexpr, DETOUR: tl.constexpr = False):
    """[BLOCK_H * BLOCK_W, BLOCK_C] of an NHWC image from pixel (h, w) and channel c on, zero outside of it.

    ``image`` is a descriptor if ``BULK``, else a pointer; ``shape`` (H, W, C); ``strides`` of N and H. VECTOR divides
    them and C, and what is written a // VECTOR * VECTOR shows the compiler how wide it may load. ``DETOUR`` takes a
    pointer's tile through registers: a transposed tf32 operand would else be copied to shared memory 4 bytes at a time.
    """
    if BULK:
        tile = tl.reshape(image.load([n, h, w, c]), (BLOCK_H * BLOCK_W, BLOCK_C))
    else:
        H, W, C = shape
        C, stride_n, stride_h = C // VECTOR * VECTOR, strides[0] // VECTOR * VECTOR, strides[1] // VECTOR * VECTOR
        offs_p, offs_c = tl.arange(0, BLOCK_H * BLOCK_W), c + tl.arange(0, BLOCK_C)
        h, w = h + offs_p // BLOCK_W, w + offs_p % BLOCK_W
        mask = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & (offs_c < C)[None, :]
        offs = n.to(tl.int64) * stride_n + h.to(tl.int64) * stride_h + w * C
        tile = tl.load(image + offs[:, None] + offs_c[None, :], mask=mask, other=0.0)
        if DETOUR:
            tile = tl.where(mask, tile, 0.0)
    return tile


@triton.jit
def sum_products(x, x_shape, x_strides, dz, dz_shape, dz_strides, pad, partial_ptr, stride_tap, s, c0, k0, first, last,
                 BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
                 BLOCK_C: tl.constexpr, X_VECTOR: tl.constexpr, DZ_VECTOR: tl.constexpr, BULK: tl.constexpr,
                 DZ_BULK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """partial[k, (r, s), c] = the formula's sum over tiles ``first`` to ``last``, excluded, for one shift s.

    ``x`` is a descriptor if ``BULK``, else a pointer, and ``dz`` if ``DZ_BULK``, of images with shapes (H, W, C). A
    tile is ROWS successive boxes of output rows: with boxes of one row, each row of x is loaded once and meets up to
    three rows of dz.
    """
    tiles_h, tiles_w = tl.cdiv(dz_shape[0], BLOCK_H * ROWS), tl.cdiv(dz_shape[1], BLOCK_W)
    top = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    middle = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    bottom = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        w0, h0, n = tile % tiles_w * BLOCK_W, tile // tiles_w % tiles_h * BLOCK_H * ROWS, tile // (tiles_w * tiles_h)
        h, w = h0 - pad, w0 + s - pad
        x_rows, dz_rows = (), ()
        for i in tl.static_range(ROWS + 2):
            x_rows += (load_tile(x, x_shape, x_strides, n, h + i, w, c0, BLOCK_H, BLOCK_W, BLOCK_C, X_VECTOR, BULK),)
        for i in tl.static_range(ROWS):
            dz_rows += (load_tile(dz, dz_shape, dz_strides, n, h0 + i, w0, k0, BLOCK_H, BLOCK_W, BLOCK_K, DZ_VECTOR,
                                  DZ_BULK, PRECISION == "tf32"),)
        # one accumulator after the other: products that alternate between them wait for each other
        for i in tl.static_range(ROWS):
            top = mma(dz_rows[i].T, x_rows[i], top, PRECISION)
        for i in tl.static_range(ROWS):
            middle = mma(dz_rows[i].T, x_rows[i + 1], middle, PRECISION)
        for i in tl.static_range(ROWS):
            bottom = mma(dz_rows[i].T, x_rows[i + 2], bottom, PRECISION)

    C_out = dz_shape[2]
    offs_k, offs_c = k0 + tl.arange(0, BLOCK_K), c0 + tl.arange(0, BLOCK_C)
    mask = (offs_k < C_out)[:, None] & (offs_c < x_shape[2] // X_VECTOR * X_VECTOR)[None, :]
    out = partial_ptr + (offs_k * 9 + s)[:, None] * stride_tap + offs_c[None, :]
    tl.store(out, top, mask=mask)
    tl.store(out + 3 * stride_tap, middle, mask=mask)
    tl.store(out + 6 * stride_tap, bottom, mask=mask)


@triton.jit(do_not_specialize=["x_shape", "x_strides", "dz_shape", "dz_strides", "pad", "stride_tap", "column",
                             "row_size", "tiles", "tiles_a_split", "pixels", "pixels_a_split"])
def conv_relu_weight_grad_kernel(x, x_shape, x_strides, dz, dz_ptr, dz_shape, dz_strides, pad, partial_ptr, stride_tap,
                                 column, row_size, tiles, tiles_a_split, pixels, pixels_a_split, BLOCK_H: tl.constexpr,
                                 BLOCK_W: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
                                 BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
                                 X_VECTOR: tl.constexpr, DZ_VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr,
                                 BULK: tl.constexpr, DZ_BULK: tl.constexpr, STAGES: tl.constexpr,
                                 PRECISION: tl.constexpr):
    """partial[split, (k, r, s, column + c)] and, behind them, the bias's [split, k]: sums over the split's pixels.

    Grid: (3 column shifts, C_in and C_out tiles, then C_out in tiles of the bias) × splits. ``pixels`` rows of C_out
    channels start at ``dz_ptr``. OUT_VECTOR divides ``stride_tap``, ``column`` and ``row_size``.
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    C_out, tiles_c = dz_shape[2], tl.cdiv(x_shape[2], BLOCK_C)
    products = 3 * tiles_c * tl.cdiv(C_out, BLOCK_K)
    stride_tap, column = stride_tap // OUT_VECTOR * OUT_VECTOR, column // OUT_VECTOR * OUT_VECTOR
    partial_ptr += split.to(tl.int64) * (row_size // OUT_VECTOR * OUT_VECTOR)
    if pid < products:
        first = split * tiles_a_split
        sum_products(x, x_shape, x_strides, dz, dz_shape, dz_strides, pad, partial_ptr + column, stride_tap, pid % 3,
                     pid // 3 % tiles_c * BLOCK_C, pid // 3 // tiles_c * BLOCK_K, first,
                     tl.minimum(first + tiles_a_split, tiles), BLOCK_H, BLOCK_W, ROWS, BLOCK_K, BLOCK_C, X_VECTOR,
                     DZ_VECTOR, BULK, DZ_BULK, STAGES, PRECISION)
    else:
        first = split * pixels_a_split
        sum_columns(dz_ptr, partial_ptr + 9 * C_out * stride_tap, (pid - products) * BLOCK_Q, first,
                    tl.minimum(first + pixels_a_split, pixels), C_out // DZ_VECTOR * DZ_VECTOR, BLOCK_R, BLOCK_Q)


def weight_grad(dz: torch.Tensor, x: torch.Tensor, skip: torch.Tensor | None, pad: int, has_bias: bool,
                config: WeightGradConfig | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(dw, db) of ``conv3x3(concat([centre_crop(skip), x], 1), w) + b`` from ``dz``, the gradient before ReLU.

    dz (N, C_out, H_out, W_out), x (N, C_x, H, W), skip (N, C_skip, >= H, >= W) or None. dw (C_out, C_skip + C_x, 3, 3)
    in channels_last memory and x's dtype; db (C_out,), or (0,) without a bias. ``config`` is used for both sources.
    The fp32 workspace is splits · C_out · (9 · (C_skip + C_x) + 1) · 4 bytes, bounded by :func:`choose_splits`.

    Raises:
        ValueError: the shapes do not belong together, or ``config`` cannot run.
    """
    n, c_out, h, w = dz.shape
    if (n, h, w) != (x.shape[0], x.shape[2] + 2 * pad - 2, x.shape[3] + 2 * pad - 2):
        raise ValueError(f"conv_relu weight gradient: dz {tuple(dz.shape)} does not fit x {tuple(x.shape)}, pad {pad}")
    c_skip = 0 if skip is None else skip.shape[1]
    channels = c_skip + x.shape[1]
    shape, biases = (c_out, 9, channels), c_out if has_bias else 0
    if dz.numel() == 0:
        dw = _launch.empty(shape, x.dtype, x.device).zero_()
        return _as_weight(dw), _launch.empty((biases,), x.dtype, x.device).zero_()
    dz, x = _launch.channels_last(dz), _launch.channels_last(x)
    x_config = config or choose_config(dz, x)
    splits = choose_splits(dz, x.shape[1], channels, x_config)
    partial = _launch.empty((splits, 9 * c_out * channels + biases), torch.float32, x.device)
    _launch_source(dz, x, pad, partial, channels, c_skip, has_bias, x_config)
    if skip is not None:
        height, width = x.shape[2:]
        top, left = (skip.shape[2] - height) // 2, (skip.shape[3] - width) // 2
        skip = _launch.channels_last(skip)[:, :, top : top + height, left : left + width]
        _launch_source(dz, skip, pad, partial, channels, 0, False, config or choose_config(dz, skip))
    dw, db = sum_gradients(partial, shape, x.dtype)
    return _as_weight(dw), db


def _as_weight(dw: torch.Tensor) -> torch.Tensor:
    """(C_out, 9, C) as a channels_last (C_out, C, 3, 3)."""
    return dw.view(dw.shape[0], 3, 3, dw.shape[2]).permute(0, 3, 1, 2)


def _launch_source(dz: torch.Tensor, x: torch.Tensor, pad: int, partial: torch.Tensor, channels: int, column: int,
                   sums_bias: bool, config: WeightGradConfig) -> None:
    """Writes the columns of ``x`` (from ``column`` of ``channels`` on) of ``partial``, and the bias's if told to."""
    reason = why_not(config, dz, x)
    if reason is not None:
        raise ValueError(f"weight gradient variant {config.variant!r} cannot run here: {reason}")
    if config.variant == "first":
        return launch_first(dz, x, pad, partial, channels, column, sums_bias, config)
    (splits, row_size), bulk, stages = partial.shape, config.variant == "bulk", config.stages(dz.dtype)
    out_vector = next(width for width in (4, 2, 1) if channels % width == column % width == row_size % width == 0)
    box = (1, config.block_h, config.block_w)
    # A 16-bit box of several rows reaches the product without a detour only as its right operand, so that dz comes by
    # pointers. float32 takes the detour through registers anyway.
    dz_bulk = bulk and (config.block_h == 1 or dz.element_size() == 4)
    tiles, programs, pixels = config.tiles(dz), config.programs(dz.shape[1], x.shape[1]), dz.numel() // dz.shape[1]
    block_r, block_q = column_tile(dz.shape[1], config.num_warps)
    programs += _launch.cdiv(dz.shape[1], block_q) if sums_bias else 0
    _launch.launch(conv_relu_weight_grad_kernel, (programs, splits),
                   image_boxes(x, (*box, config.block_c)) if bulk else x,
                   (*x.shape[2:], x.shape[1]), (x.stride(0), x.stride(2)),
                   image_boxes(dz, (*box, config.block_k)) if dz_bulk else dz, dz,
                   (*dz.shape[2:], dz.shape[1]), (dz.stride(0), dz.stride(2)), pad, partial, channels, column, row_size,
                   tiles, _launch.cdiv(tiles, splits), pixels, _launch.cdiv(pixels, splits),
                   BLOCK_H=config.block_h, BLOCK_W=config.block_w, ROWS=config.rows, BLOCK_K=config.block_k,
                   BLOCK_C=config.block_c, BLOCK_R=block_r, BLOCK_Q=block_q, X_VECTOR=_launch.vector_width(x),
                   DZ_VECTOR=_launch.vector_width(dz), OUT_VECTOR=out_vector, BULK=bulk, DZ_BULK=dz_bulk, STAGES=stages,
                   PRECISION=_launch.dot_precision(dz.dtype), num_warps=config.num_warps, num_stages=stages)
