"""Bilinear x2 upsampling as ``nn.Upsample`` computes it, and its gradient, which gathers: no two programs share a sum.

Both kernels are bound by memory. A program walks along one row in vectors of ``VECTOR`` channels, as in ``max_pool``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch

_BLOCK = 128  # vectors of one program


@triton.jit
def source(i, scale, size, ALIGN: tl.constexpr):
    """(lower, upper, weight of upper): the pixels of ``size`` between which output pixel ``i`` lies.

    PyTorch's ``area_pixel_compute_source_index``; an upper pixel of weight 0 is read, and so passes on its NaN.
    """
    position = i.to(tl.float32) * scale if ALIGN else tl.maximum((i.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    lower = tl.minimum(position.to(tl.int32), size - 1)
    return lower, tl.minimum(lower + 1, size - 1), position - lower.to(tl.float32)


@triton.jit
def upsample_bilinear_forward_kernel(
    x_ptr, y_ptr, H, W, scale_h, scale_w, groups, tiles, ALIGN: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """One row of y (N, 2H, 2W, C); C = groups * VECTOR."""
    row = tl.program_id(0) // tiles
    n, i = (row // (2 * H)).to(tl.int64), row % (2 * H)
    vector = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    j, group = vector // groups, vector % groups
    C, lane, mask = groups * VECTOR, tl.arange(0, VECTOR), (j < 2 * W)[:, None]
    above, below, v = source(i, scale_h, H, ALIGN)
    left, right, u = source(j, scale_w, W, ALIGN)
    left = ((left * groups + group) * VECTOR)[:, None] + lane[None, :]
    right = ((right * groups + group) * VECTOR)[:, None] + lane[None, :]
    above, below = x_ptr + (n * H + above) * W * C, x_ptr + (n * H + below) * W * C
    x00 = tl.load(above + left, mask=mask, other=0.0).to(tl.float32)
    x01 = tl.load(above + right, mask=mask, other=0.0).to(tl.float32)
    x10 = tl.load(below + left, mask=mask, other=0.0).to(tl.float32)
    x11 = tl.load(below + right, mask=mask, other=0.0).to(tl.float32)
    u = u[:, None]
    y = (1 - v) * ((1 - u) * x00 + u * x01) + v * ((1 - u) * x10 + u * x11)
    out = y_ptr + row.to(tl.int64) * 2 * W * C + (vector * VECTOR)[:, None] + lane[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def share(i, a, scale, size, ALIGN: tl.constexpr):
    """(whether output pixel ``i`` reads pixel ``a``, its weight there)."""
    lower, upper, weight = source(i, scale, size, ALIGN)
    reads = (i >= 0) & (i < 2 * size) & ((lower == a) | (upper == a))
    return reads, tl.where(lower == a, 1 - weight, 0.0) + tl.where(upper == a, weight, 0.0)


@triton.jit
def upsample_bilinear_backward_kernel(
    dy_ptr, dx_ptr, H, W, scale_h, scale_w, groups, tiles, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """One row of dx (N, H, W, C): output pixels 2a - 2 to 2a + 3 at most read pixel a, to 2a + 2 unless ALIGN."""
    row = tl.program_id(0) // tiles
    n, a = (row // H).to(tl.int64), row % H
    vector = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    b, group = vector // groups, vector % groups
    C, lane = groups * VECTOR, tl.arange(0, VECTOR)
    END: tl.constexpr = 4 if ALIGN else 3
    dx = tl.zeros((BLOCK, VECTOR), tl.float32)
    for r in range(-2, END):
        i = 2 * a + r
        row_reads, row_share = share(i, a, scale_h, H, ALIGN)
        if row_reads:
            dy_row = dy_ptr + (n * 2 * H + i) * 2 * W * C
            total = tl.zeros((BLOCK, VECTOR), tl.float32)
            for s in tl.static_range(-2, END):
                j = 2 * b + s
                reads, column_share = share(j, b, scale_w, W, ALIGN)
                mask = (reads & (b < W))[:, None]
                offs = ((j * groups + group) * VECTOR)[:, None] + lane[None, :]
                total += column_share[:, None] * tl.load(dy_row + offs, mask=mask, other=0.0).to(tl.float32)
            dx += row_share * total
    out = dx_ptr + row.to(tl.int64) * W * C + (vector * VECTOR)[:, None] + lane[None, :]
    tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=(b < W)[:, None])


def _start(kernel, source: torch.Tensor, out: torch.Tensor, height: int, width: int, align_corners: bool) -> None:
    """Starts ``kernel`` on the rows of ``out``; ``height`` and ``width`` are those of the smaller map."""
    n, c, rows, columns = out.shape
    vector = _launch.vector_width(out)
    tiles = _launch.cdiv(columns * (c // vector), _BLOCK)
    scales = [(side - 1) / (2 * side - 1) if align_corners else 0.5 for side in (height, width)]
    _launch.launch(kernel, (n * rows * tiles,), source, out, height, width, *scales, c // vector, tiles,
                   ALIGN=align_corners, BLOCK=_BLOCK, VECTOR=vector)  # fmt: skip


def forward(x: torch.Tensor, align_corners: bool) -> torch.Tensor:
    """y (N, C, 2H, 2W), channels_last, of ``x`` (N, C, H, W)."""
    n, c, height, width = x.shape
    y = _launch.empty_image((n, c, 2 * height, 2 * width), x.dtype, x.device)
    _start(upsample_bilinear_forward_kernel, _launch.channels_last(x), y, height, width, align_corners)
    return y


def backward(dy: torch.Tensor, align_corners: bool) -> torch.Tensor:
    """dx (N, C, H, W), channels_last, of ``dy`` (N, C, 2H, 2W); sums in float32 and in one order."""
    n, c, height, width = dy.shape[0], dy.shape[1], dy.shape[2] // 2, dy.shape[3] // 2
    dx = _launch.empty_image((n, c, height, width), dy.dtype, dy.device)
    _start(upsample_bilinear_backward_kernel, _launch.channels_last(dy), dx, height, width, align_corners)
    return dx
