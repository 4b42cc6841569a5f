"""Weights in the order in which a kernel reads them, by one small kernel instead of flips, pads and copies."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from . import _launch

_TILE = 32


# not specialised, so that two compiled kernels serve every weight of a network
@triton.jit(do_not_specialize=["rows", "columns", "out_rows", "stride_tap", "stride_row", "stride_column", "first",
                               "stride_high", "stride_low", "out_stride_row"])
def permuted_taps_kernel(w_ptr, out_ptr, rows, columns, out_rows, stride_tap, stride_row, stride_column, first,
                         stride_high, stride_low, out_stride_row, LOW: tl.constexpr, TILE: tl.constexpr):
    """out[first + t // LOW · stride_high + t % LOW · stride_low + m · out_stride_row + n] = w[t, m, n].

    m < ``rows``, n < ``columns``; rows up to ``out_rows`` are zero. One program a tap and a tile of rows and columns.
    """
    tap = tl.program_id(1)
    tiles = tl.cdiv(columns, TILE)
    # in 64 bits, for a weight may be a view of any strides
    offs_m = (tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)[:, None]).to(tl.int64)
    offs_n = (tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)[None, :]).to(tl.int64)
    w = tl.load(w_ptr + tap.to(tl.int64) * stride_tap + offs_m * stride_row + offs_n * stride_column,
                mask=(offs_m < rows) & (offs_n < columns), other=0.0)
    out_ptr += first + tap // LOW * stride_high + tap % LOW * stride_low
    tl.store(out_ptr + offs_m * out_stride_row + offs_n, w, mask=(offs_m < out_rows) & (offs_n < columns))


def _permute(taps: torch.Tensor, out: torch.Tensor, first: int, stride_high: int, stride_low: int, out_stride_row: int,
             *, low: int = 1, zeros: bool = False) -> None:
    """Writes ``taps`` (T, M, N) of any strides, or as many ``zeros``, to ``out``, whose strides are in elements."""
    count, rows, columns = taps.shape
    grid = (_launch.cdiv(rows, _TILE) * _launch.cdiv(columns, _TILE), count)
    _launch.launch(permuted_taps_kernel, grid, taps, out, 0 if zeros else rows, columns, rows, *taps.stride(),
                   first, stride_high, stride_low, out_stride_row, LOW=low, TILE=_TILE)


@contextlib.contextmanager
def keeping(kept: dict[tuple, Any]) -> Iterator[None]:
    """Inside, what :func:`keepable` functions make is stored in ``kept`` and found there again.

    For weights that do not change while ``kept`` lives, as those of a captured forward pass.
    """
    previous = _launch.thread.kept_weights
    _launch.thread.kept_weights = kept
    try:
        yield
    finally:
        _launch.thread.kept_weights = previous


def keepable(reorder: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``reorder(weight, *options)``, whose results :func:`keeping` keeps."""

    @functools.wraps(reorder)
    def call(weight: torch.Tensor, *options: Any, **named: Any) -> torch.Tensor:
        kept = _launch.thread.kept_weights
        if kept is None:
            return reorder(weight, *options, **named)
        key = (reorder.__name__, weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, options,
               tuple(named.items()))  # fmt: skip
        if key not in kept:
            # with the weight itself, so that its address belongs to nothing else
            kept[key] = weight, reorder(weight, *options, **named)
        return kept[key][1]

    return call


def _taps(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` (A, B, h, w) as (h · w, A, B), without a copy in the layouts that PyTorch's weights have."""
    a, b, h, w = weight.shape
    if weight.stride(2) != w * weight.stride(3):
        weight = weight.contiguous()
    return weight.as_strided((h * w, a, b), (weight.stride(3), weight.stride(0), weight.stride(1)),
                             weight.storage_offset())  # fmt: skip


@keepable
def conv_taps(weight: torch.Tensor, flipped: bool = False) -> torch.Tensor:
    """``weight`` (C_out, 3, 3, C) of any strides as a contiguous (C_out, 9, C), its taps in reverse if ``flipped``."""
    c_out, _, _, c = weight.shape
    out = _launch.empty((c_out, 9, c), weight.dtype, weight.device)
    first, stride_tap = (8 * c, -c) if flipped else (0, c)
    _permute(_taps(weight.permute(0, 3, 1, 2)), out, first, stride_tap, 0, 9 * c)
    return out


@keepable
def stride2_taps(weight: torch.Tensor, out_first: bool) -> torch.Tensor:
    """(h, w, B, A), or (h, w, A, B) unless ``out_first``, of ``weight`` (A, B, h, w)."""
    taps = _taps(weight).transpose(1, 2) if out_first else _taps(weight)
    _, rows, columns = taps.shape
    out = _launch.empty((*weight.shape[2:], rows, columns), weight.dtype, weight.device)
    _permute(taps, out, 0, rows * columns, 0, columns)
    return out


@keepable
def stride2_slots(weight: torch.Tensor) -> torch.Tensor:
    """(3, 4, C_in, C_out) of ``weight`` (C_out, C_in, 3, 3): a row's first slot is zero, then its three taps follow."""
    taps = _taps(weight).transpose(1, 2)
    _, rows, columns = taps.shape
    out, size = _launch.empty((3, 4, rows, columns), weight.dtype, weight.device), rows * columns
    _permute(taps[:3], out, 0, 4 * size, 0, columns, zeros=True)
    _permute(taps, out, size, 4 * size, size, columns, low=3)
    return out
