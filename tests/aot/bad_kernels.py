"""One good kernel, and kernels that each do one thing that an expert would not accept."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastunet.kernels import _launch
from fastunet.kernels._launch import Launch


@triton.jit
def product_kernel(a_desc, b_desc, c_desc, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                   STAGES: tl.constexpr):
    """c = a @ b.T by bulk copies."""
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        acc = tl.dot(a_desc.load([m, k]), b_desc.load([n, k]).T, acc)
    c_desc.store([m, n], acc.to(c_desc.dtype))


@triton.jit(do_not_specialize=["C"])
def narrow_kernel(x_ptr, w_ptr, y_ptr, C, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
                  STAGES: tl.constexpr):
    """y = x @ w by pointers whose row length the compiler knows nothing about: it loads element by element."""
    offs_p, offs_k = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for c in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        offs_c = c + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + offs_p[:, None] * C + offs_c[None, :], mask=(offs_c < C)[None, :], other=0.0)
        w = tl.load(w_ptr + offs_c[:, None] * BLOCK_K + offs_k[None, :], mask=(offs_c < C)[:, None], other=0.0)
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + offs_p[:, None] * BLOCK_K + offs_k[None, :], acc)


@triton.jit
def pixels_first_kernel(x_desc, w_desc, y_desc, C, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
                        BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):
    """A convolution's taps with the pixels as the left operand, which a 4-D box reaches through registers only."""
    acc = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_K), tl.float32)
    h = tl.program_id(0) * BLOCK_H
    for i in tl.range(0, 9 * tl.cdiv(C, BLOCK_C), num_stages=STAGES):
        tap, c = i % 9, i // 9 * BLOCK_C
        x = x_desc.load([0, h + tap // 3 - 1, tap % 3 - 1, c])
        acc = tl.dot(tl.reshape(x, (BLOCK_H * BLOCK_W, BLOCK_C)), w_desc.load([0, tap * C + c]).T, acc)
    y_desc.store([0, h, 0, 0], tl.reshape(acc.to(y_desc.dtype), (1, BLOCK_H, BLOCK_W, BLOCK_K)))


def product(m: int, n: int, k: int, *, warps: int = 4, stages: int = 3, size: int = 512,
            dtype: torch.dtype = torch.bfloat16) -> Launch:
    """A launch of :func:`product_kernel` on ``size`` × ``size`` matrices with tiles m × n × k."""
    a, b, c = (_launch.matrix_descriptor(torch.empty(size, size, dtype=dtype, device="meta"), box)
               for box in ((m, k), (n, k), (m, n)))  # fmt: skip
    args = dict(a_desc=a, b_desc=b, c_desc=c, K=size, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, STAGES=stages)
    return Launch(product_kernel, (size // m, size // n), args, warps, stages, 90)


def narrow(channels: int) -> Launch:
    """A launch of :func:`narrow_kernel` on a 16×16 image of ``channels`` channels."""
    x = torch.empty(1, channels, 16, 16, dtype=torch.bfloat16, device="meta")
    w, y = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((channels, 64), (256, 64)))
    args = dict(x_ptr=x, w_ptr=w, y_ptr=y, C=channels, BLOCK_P=64, BLOCK_K=64, BLOCK_C=32, STAGES=3)
    return Launch(narrow_kernel, (4,), args, 4, 3, 90)


def pixels_first() -> Launch:
    """A launch of :func:`pixels_first_kernel` on a 16×16 image of 128 channels, in boxes of 8×16 pixels."""
    x = torch.empty(1, 128, 16, 16, dtype=torch.bfloat16, device="meta")
    w = torch.empty(128, 9 * 128, dtype=torch.bfloat16, device="meta")
    args = dict(x_desc=_launch.image_descriptor(x, (1, 8, 16, 64)), w_desc=_launch.matrix_descriptor(w, (128, 64)),
                y_desc=_launch.image_descriptor(x, (1, 8, 16, 128)), C=128, BLOCK_H=8, BLOCK_W=16, BLOCK_C=64,
                BLOCK_K=128, STAGES=3)  # fmt: skip
    return Launch(pixels_first_kernel, (2,), args, 8, 3, 90)
