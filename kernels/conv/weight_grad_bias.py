"""Bias gradient of the 3×3 convolution: the sum of dz over all pixels, in one read.

It is a kernel of its own because sums beside the weight gradient's products would serialise them: its loop would have
to bring dz into registers between two ``wgmma``. What it reads is left in the L2 cache for those products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _launch
from .._reduce import sum_splits
from .cost import device

_TILE = 4096  # elements a step: four 16-byte loads of 16-bit elements in flight for each of 128 threads
_PROGRAMS = 8  # for each multiprocessor


@triton.jit(do_not_specialize=["pixels", "C_out", "pixels_a_split"])
def conv_relu_bias_grad_kernel(dz_ptr, partial_ptr, pixels, C_out, pixels_a_split, BLOCK_P: tl.constexpr,
                               BLOCK_K: tl.constexpr, VECTOR: tl.constexpr):
    """partial[split, k] = sum of dz[p, k] over the split's pixels; dz (pixels, C_out)."""
    split = tl.program_id(1)
    C_out = C_out // VECTOR * VECTOR  # C_out is a multiple of VECTOR; so the compiler loads VECTOR wide
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_mask = offs_k < C_out
    acc = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    first = split * pixels_a_split
    last = tl.minimum(first + pixels_a_split, pixels)
    for p in range(first, last, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        offs = offs_p.to(tl.int64)[:, None] * C_out + offs_k[None, :]
        acc += tl.load(dz_ptr + offs, mask=(offs_p < last)[:, None] & k_mask[None, :], other=0.0).to(tl.float32)
    tl.store(partial_ptr + split * C_out + offs_k, tl.sum(acc, axis=0), mask=k_mask)


def bias_grad(dz: torch.Tensor) -> torch.Tensor:
    """The sum of ``dz`` (N, C_out, H, W), in NHWC memory, over all but C_out: (C_out,) in its dtype.

    fp32 sums of splits, added in a fixed order. The number of pixels N · H · W stays below 2³¹.
    """
    n, c_out, h, w = dz.shape
    pixels, block_k = n * h * w, min(128, _launch.next_power_of_2(c_out))
    block_p, tiles_k = _TILE // block_k, _launch.cdiv(c_out, block_k)
    steps = _launch.cdiv(pixels, block_p)
    programs = max(1, min(steps, _PROGRAMS * device().multiprocessors // tiles_k))
    pixels_a_split = max(1, _launch.cdiv(steps, programs)) * block_p
    splits = _launch.cdiv(pixels, pixels_a_split)
    partial = _launch.empty((splits, c_out), torch.float32, dz.device)
    _launch.launch(conv_relu_bias_grad_kernel, (tiles_k, splits), dz, partial, pixels, c_out, pixels_a_split,
                   BLOCK_P=block_p, BLOCK_K=block_k, VECTOR=_launch.vector_width(dz))
    return sum_splits(partial, dz.dtype)
