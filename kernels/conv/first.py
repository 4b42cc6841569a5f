"""3×3 convolution of very few channels, the network's first layer: all 9·C_in taps are one reduction of one product.

Such pixels are too short for bulk copies, and a product per tap would multiply mostly padding: 9·C_in padded to 16, 32
or 64 wastes 44 % at one channel and at two, 16 % at three, 44 % at four.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import _launch
from .._launch import mma
from .convolution import ConvConfig, Convolution
from .epilogue import bias_activation
from .pointer import store_tile, unflatten


@triton.jit(do_not_specialize=["x_shape", "offset", "y_shape"])
def conv_relu_first_kernel(x_ptr, weight_ptr, x_shape, offset, bias_ptr, y_ptr, pooled_ptr, statistics_ptr,
                           y_shape, C_IN: tl.constexpr, SLOPE: tl.constexpr, BLOCK_R: tl.constexpr,
                           BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, VECTOR_OUT: tl.constexpr,
                           PRECISION: tl.constexpr):
    """``y = relu(conv(x) + bias)`` and, unless None, its 2×2 max-pool and tile statistics.

    ``x_shape`` (H, W), ``y_shape`` (N, H, W, C_out), weights (C_out, 9·C_IN); BLOCK_R >= 9·C_IN.
    """
    N, H, W, C_out = y_shape
    x_h, x_w = x_shape
    k_tiles = tl.cdiv(C_out, BLOCK_K)
    tile = tl.program_id(0) // k_tiles
    offs_k = tl.program_id(0) % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    n, h, w = unflatten(tile * BLOCK_P + tl.arange(0, BLOCK_P), y_shape, pooled_ptr is not None)
    p_mask = (n < N) & (h < H) & (w < W)
    offs_r = tl.arange(0, BLOCK_R)
    r_mask = offs_r < 9 * C_IN
    tap, c = offs_r // C_IN, offs_r % C_IN
    in_h = h[None, :] + (tap // 3)[:, None] - offset[0]
    in_w = w[None, :] + (tap % 3)[:, None] - offset[1]
    inside = p_mask[None, :] & r_mask[:, None] & (in_h >= 0) & (in_h < x_h) & (in_w >= 0) & (in_w < x_w)
    x_ptrs = x_ptr + (n.to(tl.int64) * x_h * x_w * C_IN)[None, :] + (in_h * x_w + in_w).to(tl.int64) * C_IN + c[:, None]
    x = tl.load(x_ptrs, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + offs_k[:, None] * (9 * C_IN) + offs_r[None, :],
                     mask=(offs_k < C_out)[:, None] & r_mask[None, :], other=0.0)
    acc = mma(weight, x, tl.zeros((BLOCK_K, BLOCK_P), tl.float32), PRECISION)
    y = bias_activation(acc, bias_ptr, offs_k, C_out, SLOPE)
    first = unflatten(tile * BLOCK_P, y_shape, pooled_ptr is not None)
    store_tile(y, None, y_ptr, pooled_ptr, statistics_ptr, y_shape, tile, first, n, h, w, p_mask, offs_k, VECTOR_OUT)


def launch_first(conv: Convolution, y, pooled, statistics, config: ConvConfig) -> None:
    """Writes the convolution of one source without a mask to ``y``, its 2×2 max-pool to ``pooled`` and each tile's
    ``statistics``, unless None."""
    n, c_out, h, w = y.shape
    c_in = conv.x.shape[1]
    pixels = n * h * w if pooled is None else n * _launch.cdiv(h, 2) * _launch.cdiv(w, 2) * 4
    grid = (_launch.cdiv(pixels, config.pixels) * _launch.cdiv(c_out, config.block_k),)
    _launch.launch(conv_relu_first_kernel, grid, conv.x, conv.taps()[0], tuple(conv.x.shape[2:]), conv.offset,
                   conv.bias, y, pooled, statistics, (n, h, w, c_out), C_IN=c_in, SLOPE=conv.slope,
                   BLOCK_R=max(16, _launch.next_power_of_2(9 * c_in)), BLOCK_K=config.block_k, BLOCK_P=config.pixels,
                   VECTOR_OUT=_launch.vector_width(y), PRECISION=_launch.dot_precision(y.dtype),
                   num_warps=config.num_warps, num_stages=config.num_stages)
