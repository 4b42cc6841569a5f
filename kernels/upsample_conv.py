"""Nearest x2, 2x2 convolution padded at the bottom and right, bias and ReLU: launchers over ``_stride2``.

The upsampled image never exists. A 2x2 convolution of it is a stride-2 transposed convolution with the 3x3 kernel
``k = flip(w) (*) ones(2, 2)``, (*) the full convolution: an output pixel reads its own low-resolution pixel and, in an
odd row or column, the one below or to the right. 9 products for each low-resolution pixel instead of 16.
With G the gradient of k, dw[a, b] = sum_{u, v in {0, 1}} G[1 - a + u, 1 - b + v].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch, _stride2, _stride2_weight_grad
from ._reduce import sum_rows
from ._stride2 import Stride2Config
from ._stride2_weight_grad import WeightGradConfig
from ._weights import keepable

_PACK_TILE = 256  # weights of one program of sub_pixel_weights_kernel
_FOLD_TILE, _FOLD_SPLITS = 64, 16  # weights, and rows of partial sums added at once, of fold_taps


@triton.jit
def store_sub_pixel_weights(k_ptr, w00, w01, w10, w11, size, mask, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """k[r, SLOTS - 3 + s] = (flip(w) (*) ones(2, 2))[r, s] in matrices of ``size`` elements; slot 0 of 4 is zero."""
    top, bottom = w10 + w11, w00 + w01
    first = (SLOTS - 3) * size
    tl.store(k_ptr + first, w11, mask=mask)
    tl.store(k_ptr + first + size, top, mask=mask)
    tl.store(k_ptr + first + 2 * size, w10, mask=mask)
    first += SLOTS * size
    tl.store(k_ptr + first, w11 + w01, mask=mask)
    tl.store(k_ptr + first + size, top + bottom, mask=mask)
    tl.store(k_ptr + first + 2 * size, w10 + w00, mask=mask)
    first += SLOTS * size
    tl.store(k_ptr + first, w01, mask=mask)
    tl.store(k_ptr + first + size, bottom, mask=mask)
    tl.store(k_ptr + first + 2 * size, w00, mask=mask)
    if SLOTS == 4:
        for r in tl.static_range(3):
            tl.store(k_ptr + r * SLOTS * size, tl.zeros((BLOCK,), k_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sub_pixel_weights_kernel(
    w_ptr, w_stride_out, w_stride_in, w_stride_row, w_stride_column, k_ptr, stride_out, stride_in, packed_ptr, C_out,
    C_in, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """k (3, SLOTS) of w (C_out, C_in, 2, 2) by :func:`store_sub_pixel_weights`, summed in fp32; w has any strides.

    k is matrices with the strides ``stride_out`` and ``stride_in``. The data gradient's k, (3, 3, C_in, C_out), is
    stored too where ``packed_ptr`` is given.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = C_out * C_in
    mask = offs < size
    co, ci = offs // C_in, offs % C_in
    w_ptr += co.to(tl.int64) * w_stride_out + ci.to(tl.int64) * w_stride_in
    w00 = tl.load(w_ptr, mask=mask, other=0.0).to(tl.float32)
    w01 = tl.load(w_ptr + w_stride_column, mask=mask, other=0.0).to(tl.float32)
    w10 = tl.load(w_ptr + w_stride_row, mask=mask, other=0.0).to(tl.float32)
    w11 = tl.load(w_ptr + w_stride_row + w_stride_column, mask=mask, other=0.0).to(tl.float32)
    k_ptr += co * stride_out + ci * stride_in
    store_sub_pixel_weights(k_ptr, w00, w01, w10, w11, size, mask, SLOTS, BLOCK)
    if packed_ptr is not None:
        store_sub_pixel_weights(packed_ptr + ci * C_out + co, w00, w01, w10, w11, size, mask, 3, BLOCK)


@triton.jit
def fold_taps(partial_ptr, dw_ptr, splits, C_out, C_in, row_size, first_m, BLOCK_S: tl.constexpr,
              BLOCK_M: tl.constexpr):
    """dw[co, ci, a, b] = sum_{u, v} G[co, 1 - a + u, 1 - b + v, ci], G the sum of partial (splits, C_out, 9, C_in)."""
    offs_m = first_m + tl.arange(0, BLOCK_M)
    m_mask = offs_m < C_out * C_in
    offs_s = tl.arange(0, BLOCK_S)
    element = (offs_m // C_in) * 9 * C_in + offs_m % C_in
    dw00 = tl.zeros((BLOCK_S, BLOCK_M), tl.float32)
    dw01 = tl.zeros((BLOCK_S, BLOCK_M), tl.float32)
    dw10 = tl.zeros((BLOCK_S, BLOCK_M), tl.float32)
    dw11 = tl.zeros((BLOCK_S, BLOCK_M), tl.float32)
    for first in range(0, splits, BLOCK_S):
        rows = (first + offs_s).to(tl.int64)
        mask = (rows < splits)[:, None] & m_mask[None, :]
        for r in tl.static_range(3):
            g_ptr = partial_ptr + rows[:, None] * row_size + element[None, :] + r * 3 * C_in
            middle = tl.load(g_ptr + C_in, mask=mask, other=0.0)
            low = tl.load(g_ptr, mask=mask, other=0.0) + middle
            high = middle + tl.load(g_ptr + 2 * C_in, mask=mask, other=0.0)
            if r < 2:
                dw10 += high
                dw11 += low
            if r > 0:
                dw00 += high
                dw01 += low
    dw_ptr += (offs_m // C_in) * 4 * C_in + offs_m % C_in  # memory in the order (co, a, b, ci)
    tl.store(dw_ptr, tl.sum(dw00, 0).to(dw_ptr.dtype.element_ty), mask=m_mask)
    tl.store(dw_ptr + C_in, tl.sum(dw01, 0).to(dw_ptr.dtype.element_ty), mask=m_mask)
    tl.store(dw_ptr + 2 * C_in, tl.sum(dw10, 0).to(dw_ptr.dtype.element_ty), mask=m_mask)
    tl.store(dw_ptr + 3 * C_in, tl.sum(dw11, 0).to(dw_ptr.dtype.element_ty), mask=m_mask)


@triton.jit
def fold_rows(pid, partial_ptr, dw_ptr, db_ptr, splits, C_out, C_in, row_size, BLOCK_S: tl.constexpr,
              BLOCK_M: tl.constexpr):
    """:func:`fold_taps`, and in the programs after those the C_out columns behind G summed into db.

    The order of the additions depends on the number of splits alone.
    """
    blocks = tl.cdiv(C_out * C_in, BLOCK_M)
    if pid < blocks:
        fold_taps(partial_ptr, dw_ptr, splits, C_out, C_in, row_size, pid * BLOCK_M, BLOCK_S, BLOCK_M)
    else:
        offs_k = (pid - blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        db = sum_rows(partial_ptr + 9 * C_out * C_in, splits, row_size, offs_k, offs_k < C_out, BLOCK_S, BLOCK_M)
        tl.store(db_ptr + offs_k, db.to(db_ptr.dtype.element_ty), mask=offs_k < C_out)


@triton.jit
def fold_taps_kernel(partial_ptr, dw_ptr, db_ptr, splits, C_out, C_in, row_size, BLOCK_S: tl.constexpr,
                     BLOCK_M: tl.constexpr):
    """:func:`fold_rows` of a tile of weights or of biases."""
    fold_rows(tl.program_id(0), partial_ptr, dw_ptr, db_ptr, splits, C_out, C_in, row_size, BLOCK_S, BLOCK_M)


@keepable
def sub_pixel_weights(weight: torch.Tensor, slots: int, out_first: bool) -> torch.Tensor:
    """k (3, slots, C_out, C_in), channels swapped unless ``out_first``, of ``weight`` (C_out, C_in, 2, 2)."""
    return _pack(weight, slots, out_first, None)


def _pack(weight: torch.Tensor, slots: int, out_first: bool, packed: torch.Tensor | None) -> torch.Tensor:
    """k as :func:`sub_pixel_weights` states; k of 3 slots with swapped channels is written to ``packed``."""
    c_out, c_in = weight.shape[:2]
    shape, strides = ((c_out, c_in), (c_in, 1)) if out_first else ((c_in, c_out), (1, c_out))
    k = _launch.empty((3, slots, *shape), weight.dtype, weight.device)
    grid = (_launch.cdiv(c_out * c_in, _PACK_TILE),)
    _launch.launch(sub_pixel_weights_kernel, grid, weight, *weight.stride(), k, *strides, packed, c_out, c_in,
                   SLOTS=slots, BLOCK=_PACK_TILE)
    return k


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, slope: float, config: Stride2Config | None = None
) -> torch.Tensor:
    """y (N, C_out, 2H, 2W), channels_last, of ``x`` (N, C_in, H, W) and ``weight`` (C_out, C_in, 2, 2)."""
    x = _launch.channels_last(x)
    config = config or _stride2.choose_forward_config(x, weight.shape[0], side=3)
    k = sub_pixel_weights(weight, slots=4, out_first=True)
    return _stride2.forward(x, k, bias, slope, side=3, config=config)


def forward_packing(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, slope: float, config: Stride2Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """y of :func:`forward`, and ``weight`` as :func:`data_grad` reads it, (9, C_in, C_out), in one launch less."""
    x = _launch.channels_last(x)
    c_out, c_in = weight.shape[:2]
    config = config or _stride2.choose_forward_config(x, c_out, side=3)
    packed = _launch.empty((9, c_in, c_out), weight.dtype, weight.device)
    k = _pack(weight, 4, True, packed)
    return _stride2.forward(x, k, bias, slope, side=3, config=config), packed


def data_grad(
    dz: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, mask_x: bool, packed: torch.Tensor | None = None,
    config: Stride2Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """dx (N, C_in, H, W) of ``dz`` (N, C_out, 2H, 2W), the gradient before this operator's own ReLU.

    Times x > 0 if ``mask_x`` (x the output of a ReLU). ``packed`` of :func:`forward_packing` is read in place of
    ``weight``.
    """
    dz, x = _launch.channels_last(dz), _launch.channels_last(x)
    config = config or _stride2.choose_data_grad_config(dz, x, side=3)
    if packed is None:
        k = sub_pixel_weights(weight, slots=3, out_first=False)
    else:
        k = packed.contiguous().view(3, 3, *packed.shape[1:])
    dx = _launch.empty_image(tuple(x.shape), x.dtype, x.device)
    return _stride2.data_grad(dz, k, dx, x if mask_x else None, side=3, config=config)


def weight_grad(
    dz: torch.Tensor, x: torch.Tensor, has_bias: bool, config: WeightGradConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """dw (C_out, C_in, 2, 2), channels_last, and db (C_out,) in ``x``'s dtype; db is (0,) without ``has_bias``."""
    dz, x = _launch.channels_last(dz), _launch.channels_last(x)
    c_out, c_in = dz.shape[1], x.shape[1]
    config = config or _stride2_weight_grad.choose_config(dz, x, side=3)
    summed = dz if has_bias else None
    partial = _stride2_weight_grad.partial_sums(dz, x, summed, side=3, in_first=False, config=config)
    dw = _launch.empty_image((c_out, c_in, 2, 2), x.dtype, x.device)
    db = _launch.empty((c_out if has_bias else 0,), x.dtype, x.device)
    programs = _launch.cdiv(c_out * c_in, _FOLD_TILE) + _launch.cdiv(db.numel(), _FOLD_TILE)
    _launch.launch(fold_taps_kernel, (programs,), partial, dw, db if has_bias else dw, partial.shape[0], c_out, c_in,
                   partial.shape[1], BLOCK_S=_FOLD_SPLITS, BLOCK_M=_FOLD_TILE)
    return dw, db
