"""Tiles of all norm kernels: 2×2 windows of pixels by channels, with the norm's numbers for each channel.

Images are NHWC. A row s of statistics belongs to IMAGES images: all of the batch, or one. Windows are counted row by
row through these images, the incomplete ones of odd sizes included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import _launch, _tuned
from .._launch import activation, activation_gradient
from ..max_pool import first_maximum

_PROGRAMS = 1024
"""About how many programs share a sum: several waves of any GPU, and few partial sums."""


@dataclass(frozen=True)
class NormConfig:
    """Tile of ``block_p`` pixels or windows by ``block_c`` channels."""

    block_p: int
    block_c: int
    num_warps: int = 4


def choose_config(z: torch.Tensor) -> NormConfig:
    """The committed winner, else a heuristic: one access of 16 bytes a thread, few channels that do not exist."""
    return _tuned.choose("norm", (_launch.next_power_of_2(z.shape[1]), z.dtype), NormConfig, lambda: _heuristic(z))


def _heuristic(z: torch.Tensor) -> NormConfig:
    c = z.shape[1]
    fitting = (b for b in (128, 64, 32, 16) if 8 * _launch.cdiv(c, b) * b <= 9 * c)
    block_c = next(fitting, min(16, _launch.next_power_of_2(c)))
    return NormConfig(128 * _launch.vector_width(z) // block_c, block_c)


def contiguous(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """(C,) as kernels read it; views of other tensors may have other strides."""
    return None if parameter is None else parameter.contiguous()


def shares(tiles: int, columns: int) -> tuple[int, int]:
    """How many tiles one program adds up, and how many programs then share each of ``columns`` sums."""
    each = max(1, _launch.cdiv(tiles, max(1, _PROGRAMS // max(columns, 1))))
    return each, _launch.cdiv(tiles, each)


@triton.jit
def program_tile(steps, C, BLOCK_C: tl.constexpr):
    """Of this program, channels varying first: its channels, which of them exist, its step of ``steps``, and its s."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return offs_c, offs_c < C, pid // blocks_c % steps, pid // blocks_c // steps


@triton.jit
def channel_numbers(mean_ptr, var_ptr, weight_ptr, bias_ptr, s, offs_c, c_mask, C, CHANNELS_A_GROUP, eps):
    """(mean, 1 / sqrt(var + eps), weight, bias) of each channel, fp32."""
    at = s * (C // CHANNELS_A_GROUP) + offs_c // CHANNELS_A_GROUP
    mean = tl.load(mean_ptr + at, mask=c_mask, other=0.0)
    rstd = 1 / tl.sqrt_rn(tl.load(var_ptr + at, mask=c_mask, other=1.0) + tl.cast(eps, tl.float32))
    weight = tl.full(offs_c.shape, 1.0, tl.float32)
    bias = tl.zeros(offs_c.shape, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs_c, mask=c_mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=c_mask, other=0.0).to(tl.float32)
    return mean, rstd, weight, bias


@triton.jit
def window_pixels(first, s, IMAGES, H, W, BLOCK_P: tl.constexpr):
    """Of windows ``first`` ..: the pixel at the top left, which of the four exist, and the pooled pixel."""
    windows_h, windows_w = (H + 1) // 2, (W + 1) // 2
    q = first + tl.arange(0, BLOCK_P)
    n = s * IMAGES + q // (windows_h * windows_w)
    i, j = q // windows_w % windows_h, q % windows_w
    m00 = q < IMAGES * windows_h * windows_w
    m01 = m00 & (2 * j + 1 < W)
    m10 = m00 & (2 * i + 1 < H)
    pixel = (n * H + 2 * i) * W + 2 * j
    return pixel.to(tl.int64), (m00, m01, m10, m01 & m10), ((n * (H // 2) + i) * (W // 2) + j).to(tl.int64)


@triton.jit
def load_corner(ptr, pixel, m, offs_c, c_mask, C):
    """fp32 [BLOCK_P, BLOCK_C] of one corner of the windows; zero outside."""
    at = pixel[:, None] * C + offs_c[None, :]
    return tl.load(ptr + at, mask=m[:, None] & c_mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_corner(ptr, value, pixel, m, offs_c, c_mask, C):
    at = pixel[:, None] * C + offs_c[None, :]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=m[:, None] & c_mask[None, :])


@triton.jit
def activated(z, numbers, SLOPE: tl.constexpr):
    """The activation of the normalised z."""
    mean, rstd, weight, bias = numbers
    return activation((z - mean[None, :]) * (rstd * weight)[None, :] + bias[None, :], SLOPE)


@triton.jit
def corner_gradient(d, y, dy_ptr, pixel, m, offs_c, c_mask, C, SLOPE: tl.constexpr):
    """The gradient before the activation: ``d`` from the pool, and that of y itself unless ``dy_ptr`` is None."""
    if dy_ptr is not None:
        d += load_corner(dy_ptr, pixel, m, offs_c, c_mask, C)
    return activation_gradient(d, y, SLOPE)


@triton.jit
def window_gradients(
    z_ptr, dy_ptr, d_pooled_ptr, pixel, masks, pooled, numbers, offs_c, c_mask, C, W, SLOPE: tl.constexpr
):
    """For the four corners: the gradient before the activation, and z - mean.

    The result of the activation is computed again and rounded as it was when it was written, so that the pool finds the
    same maximum.
    """
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    z00 = load_corner(z_ptr, pixel, masks[0], offs_c, c_mask, C)
    z01 = load_corner(z_ptr, pixel + 1, masks[1], offs_c, c_mask, C)
    z10 = load_corner(z_ptr, pixel + W, masks[2], offs_c, c_mask, C)
    z11 = load_corner(z_ptr, pixel + W + 1, masks[3], offs_c, c_mask, C)
    y00 = activated(z00, numbers, SLOPE).to(dtype).to(tl.float32)
    y01 = activated(z01, numbers, SLOPE).to(dtype).to(tl.float32)
    y10 = activated(z10, numbers, SLOPE).to(dtype).to(tl.float32)
    y11 = activated(z11, numbers, SLOPE).to(dtype).to(tl.float32)
    d00 = tl.zeros(z00.shape, tl.float32)
    d01, d10, d11 = d00, d00, d00
    if d_pooled_ptr is not None:
        d = load_corner(d_pooled_ptr, pooled, masks[3], offs_c, c_mask, C)
        take00, take01, take10, take11 = first_maximum(y00, y01, y10, y11)
        d00, d01 = tl.where(take00, d, 0.0), tl.where(take01, d, 0.0)
        d10, d11 = tl.where(take10, d, 0.0), tl.where(take11, d, 0.0)
    g00 = corner_gradient(d00, y00, dy_ptr, pixel, masks[0], offs_c, c_mask, C, SLOPE)
    g01 = corner_gradient(d01, y01, dy_ptr, pixel + 1, masks[1], offs_c, c_mask, C, SLOPE)
    g10 = corner_gradient(d10, y10, dy_ptr, pixel + W, masks[2], offs_c, c_mask, C, SLOPE)
    g11 = corner_gradient(d11, y11, dy_ptr, pixel + W + 1, masks[3], offs_c, c_mask, C, SLOPE)
    mean = numbers[0][None, :]
    return (g00, g01, g10, g11), (z00 - mean, z01 - mean, z10 - mean, z11 - mean)
