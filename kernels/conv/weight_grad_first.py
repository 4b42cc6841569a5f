"""Weight and bias gradient of a 3×3 convolution of 1 to 4 channels, whose pixels bulk copies cannot load.

The nine taps of all channels lie side by side on one axis of the product, and a column of ones beside them turns the
bias gradient into one more column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _launch
from .._launch import mma
from .weight_grad_config import WeightGradConfig


@triton.jit(do_not_specialize=["x_shape", "x_strides", "dz_shape", "pad", "stride_tap", "column", "row_size",
                             "tiles_a_split", "sums_bias"])
def conv_relu_weight_grad_first_kernel(x_ptr, x_shape, x_strides, dz_ptr, dz_shape, pad, partial_ptr, stride_tap,
                                       column, row_size, tiles_a_split, sums_bias,
                                       C_IN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
                                       BLOCK_Q: tl.constexpr, VECTOR: tl.constexpr, TAPS_FIRST: tl.constexpr,
                                       STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """partial[split, (k, tap, column + c)] = sum of dz[p, k] x[p + tap, c] and, behind them, [split, k] of dz[p, k].

    Shapes: x (H, W) with strides of N and H; dz (N, H, W, C_out), pixels flattened, fewer than 2³¹. Column q = tap *
    C_IN + c of the product; q = 9 C_IN is 1.
    The product is taps × channels if TAPS_FIRST, else channels × taps.
    """
    _, H, W, C_out = dz_shape
    pixels = dz_shape[0] * H * W
    C_out = C_out // VECTOR * VECTOR  # shows the compiler how wide it may load
    split = tl.program_id(1)
    offs_k, q = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Q)
    k_mask = offs_k < C_out
    r, s, c = q // (3 * C_IN) - pad, q // C_IN % 3 - pad, q % C_IN
    acc = tl.zeros((BLOCK_Q, BLOCK_K) if TAPS_FIRST else (BLOCK_K, BLOCK_Q), tl.float32)
    for tile in tl.range(split * tiles_a_split, (split + 1) * tiles_a_split, num_stages=STAGES):
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        p_mask = p < pixels
        n, h, w = (p // (H * W)).to(tl.int64), p // W % H, p % W
        dz = tl.load(dz_ptr + p.to(tl.int64)[:, None] * C_out + offs_k[None, :],
                     mask=p_mask[:, None] & k_mask[None, :], other=0.0)
        h, w = h[:, None] + r[None, :], w[:, None] + s[None, :]
        inside = (h >= 0) & (h < x_shape[0]) & (w >= 0) & (w < x_shape[1]) & p_mask[:, None] & (q < 9 * C_IN)[None, :]
        at = (n * x_strides[0])[:, None] + h.to(tl.int64) * x_strides[1] + w * C_IN + c[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        x = tl.where((q == 9 * C_IN)[None, :], 1.0, x).to(x.dtype)
        if TAPS_FIRST:
            acc = mma(x.T, dz, acc, PRECISION)
        else:
            acc = mma(dz.T, x, acc, PRECISION)
    if TAPS_FIRST:
        acc = acc.T
    partial_ptr += split.to(tl.int64) * row_size
    out = partial_ptr + offs_k[:, None] * 9 * stride_tap + (q // C_IN * stride_tap + column + c)[None, :]
    tl.store(out, acc, mask=k_mask[:, None] & (q < 9 * C_IN)[None, :])
    if sums_bias != 0:
        bias = tl.sum(tl.where((q == 9 * C_IN)[None, :], acc, 0.0), axis=1)
        tl.store(partial_ptr + 9 * C_out * stride_tap + offs_k, bias, mask=k_mask)


def launch_first(dz: torch.Tensor, x: torch.Tensor, pad: int, partial: torch.Tensor, channels: int, column: int,
                 sums_bias: bool, config: WeightGradConfig) -> None:
    """Writes the columns of ``x`` (from ``column`` of ``channels`` on) of ``partial``, and the bias's if told to."""
    (n, c_out, h, w), (splits, row_size), stages = dz.shape, partial.shape, config.stages(dz.dtype)
    # dz is loaded 16 bytes wide as the right operand; only wgmma with 16-bit types takes it as the left one as well
    taps_first = dz.element_size() == 4 or _launch.architecture() < 90
    grid = (_launch.cdiv(c_out, config.block_k), splits)
    _launch.launch(conv_relu_weight_grad_first_kernel, grid, x, tuple(x.shape[2:]), (x.stride(0), x.stride(2)), dz,
                   (n, h, w, c_out), pad, partial, channels, column, row_size, _launch.cdiv(config.tiles(dz), splits),
                   int(sums_bias),
                   C_IN=x.shape[1], BLOCK_P=config.block_w, BLOCK_K=config.block_k, BLOCK_Q=config.block_c,
                   VECTOR=_launch.vector_width(dz), TAPS_FIRST=taps_first, STAGES=stages,
                   PRECISION=_launch.dot_precision(dz.dtype), num_warps=config.num_warps, num_stages=stages)
