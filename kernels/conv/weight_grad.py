"""Weight and bias gradient of the 3×3 convolution: a matrix product whose reduction runs over all pixels, split.

    dw[k, c, r, s] = sum over n, i, j of  dz[n, k, i, j] · x[n, c, i + r - pad, j + s - pad]

with x zero outside of the image. Each program sums its share of the pixels in fp32, and a second kernel adds the
shares in a fixed order. The bias gradient, the sum of dz, is made by further programs of the same two launches, as are
the columns of a skip and, in a block, the gradients of its other convolution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

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


@triton.jit
def add_source(pid, x, x_shape, x_strides, dz, dz_ptr, dz_shape, dz_strides, partial_ptr, row, images, pad,
               BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
               BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, X_VECTOR: tl.constexpr,
               DZ_VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr, BULK: tl.constexpr, DZ_BULK: tl.constexpr,
               STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """partial[split, (k, r, s, column + c)] and, behind them, the bias's [split, k]: sums over the split's pixels.

    ``pid`` counts 3 column shifts, C_in and C_out tiles, then C_out in tiles of the bias; program axis 1 the splits.
    ``row`` is (channels of all sources, column, elements of a row), which OUT_VECTOR divides. The pixels' rows of C_out
    channels start at ``dz_ptr``.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    channels, column, row_size = row
    H, W, C_out = dz_shape
    tiles_c = tl.cdiv(x_shape[2], BLOCK_C)
    products = 3 * tiles_c * tl.cdiv(C_out, BLOCK_K)
    channels, column = channels // OUT_VECTOR * OUT_VECTOR, column // OUT_VECTOR * OUT_VECTOR
    partial_ptr += split.to(tl.int64) * (row_size // OUT_VECTOR * OUT_VECTOR)
    if pid < products:
        tiles = images * tl.cdiv(H, BLOCK_H * ROWS) * tl.cdiv(W, BLOCK_W)
        share = tl.cdiv(tiles, splits)
        sum_products(x, x_shape, x_strides, dz, dz_shape, dz_strides, pad, partial_ptr + column, channels, pid % 3,
                     pid // 3 % tiles_c * BLOCK_C, pid // 3 // tiles_c * BLOCK_K, split * share,
                     tl.minimum(split * share + share, tiles), BLOCK_H, BLOCK_W, ROWS, BLOCK_K, BLOCK_C, X_VECTOR,
                     DZ_VECTOR, BULK, DZ_BULK, STAGES, PRECISION)
    else:
        pixels = images * H * W
        share = tl.cdiv(pixels, splits)
        sum_columns(dz_ptr, partial_ptr + 9 * C_out * channels, (pid - products) * BLOCK_Q, split * share,
                    tl.minimum(split * share + share, pixels), C_out // DZ_VECTOR * DZ_VECTOR, BLOCK_R, BLOCK_Q)


@triton.jit(do_not_specialize=["images", "pad", "start1", "start2"])
def conv_relu_weight_grad_kernel(x, x_shape, x_strides, dz, dz_ptr, dz_shape, dz_strides, partial_ptr, row,
                                 x1, x1_shape, x1_strides, dz1, dz1_ptr, dz1_shape, dz1_strides, partial1_ptr, row1,
                                 x2, x2_shape, x2_strides, dz2, dz2_ptr, dz2_shape, dz2_strides, partial2_ptr, row2,
                                 images, pad, start1, start2, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
                                 ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
                                 BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, X_VECTOR: tl.constexpr,
                                 DZ_VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr, BULK: tl.constexpr,
                                 DZ_BULK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """:func:`add_source` of one source, two or three, by programs of their own.

    Grid: the programs of all, the second's from ``start1`` and the third's from ``start2`` on, × splits. All are of one
    batch of ``images``.
    """
    pid = tl.program_id(0)
    if pid < start1:
        add_source(pid, x, x_shape, x_strides, dz, dz_ptr, dz_shape, dz_strides, partial_ptr, row, images, pad,
                   BLOCK_H, BLOCK_W, ROWS, BLOCK_K, BLOCK_C, BLOCK_R, BLOCK_Q, X_VECTOR, DZ_VECTOR, OUT_VECTOR, BULK,
                   DZ_BULK, STAGES, PRECISION)
    # one after another, not nested: Triton lays the buffers of an else beside those of its if, not over them
    if x1 is not None:
        pid1 = pid - start1
        if (pid1 >= 0) & (pid < start2):
            add_source(pid1, x1, x1_shape, x1_strides, dz1, dz1_ptr, dz1_shape, dz1_strides, partial1_ptr, row1,
                       images, pad, BLOCK_H, BLOCK_W, ROWS, BLOCK_K, BLOCK_C, BLOCK_R, BLOCK_Q, X_VECTOR, DZ_VECTOR,
                       OUT_VECTOR, BULK, DZ_BULK, STAGES, PRECISION)
    if x2 is not None:
        pid2 = pid - start2
        if pid2 >= 0:
            add_source(pid2, x2, x2_shape, x2_strides, dz2, dz2_ptr, dz2_shape, dz2_strides, partial2_ptr, row2,
                       images, pad, BLOCK_H, BLOCK_W, ROWS, BLOCK_K, BLOCK_C, BLOCK_R, BLOCK_Q, X_VECTOR, DZ_VECTOR,
                       OUT_VECTOR, BULK, DZ_BULK, STAGES, PRECISION)


@dataclass(frozen=True)
class Product:
    """A convolution whose weight gradient is wanted: ``dz`` (N, C_out, H_out, W_out), ``x`` (N, C_x, H, W), ``skip``
    (N, C_skip, >= H, >= W) or None."""

    dz: torch.Tensor
    x: torch.Tensor
    skip: torch.Tensor | None
    has_bias: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C_out, 9, C_skip + C_x), the order of dw's memory."""
        return self.dz.shape[1], 9, self.x.shape[1] + (0 if self.skip is None else self.skip.shape[1])

    @property
    def row_size(self) -> int:
        """Elements of dw and db."""
        return math.prod(self.shape) + self.has_bias * self.dz.shape[1]

    def sources(self, config: WeightGradConfig | None) -> list[Source]:
        """x, with which the bias is summed, and the skip's centre, whose channels come first."""
        dz, x = _launch.channels_last(self.dz), _launch.channels_last(self.x)
        c_skip, (height, width) = self.shape[2] - x.shape[1], x.shape[2:]
        found = [Source(dz, x, self.shape[2], c_skip, self.has_bias, config or choose_config(dz, x))]
        if self.skip is not None:
            top, left = (self.skip.shape[2] - height) // 2, (self.skip.shape[3] - width) // 2
            skip = _launch.channels_last(self.skip)[:, :, top : top + height, left : left + width]
            found.append(Source(dz, skip, self.shape[2], 0, False, config or choose_config(dz, skip)))
        return found


@dataclass(frozen=True)
class Source:
    """One image of a product, whose channels are those from ``column`` on of all ``channels``."""

    dz: torch.Tensor
    x: torch.Tensor
    channels: int
    column: int
    sums_bias: bool
    config: WeightGradConfig

    @property
    def tiles(self) -> int:
        return self.config.tiles(self.dz)

    @property
    def programs(self) -> int:
        """Of one split, without those of the bias."""
        return self.config.programs(self.dz.shape[1], self.x.shape[1])


def weight_grad(dz: torch.Tensor, x: torch.Tensor, skip: torch.Tensor | None, pad: int, has_bias: bool,
                config: WeightGradConfig | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(dw, db) of ``conv3x3(concat([centre_crop(skip), x], 1), w) + b`` from ``dz``, the gradient before ReLU.

    dz (N, C_out, H_out, W_out), x (N, C_x, H, W), skip (N, C_skip, >= H, >= W) or None. dw (C_out, C_skip + C_x, 3, 3)
    in channels_last memory and x's dtype; db (C_out,), or (0,) without a bias. ``config`` is used for both sources.

    Raises:
        ValueError: the shapes do not belong together, or ``config`` cannot run.
    """
    product = Product(dz, x, skip, has_bias)
    (partial,) = partial_sums([product], pad, config)
    dw, db = sum_gradients(partial, product.shape, x.dtype)
    return as_weight(dw), db


def as_weight(dw: torch.Tensor) -> torch.Tensor:
    """(C_out, 9, C) as a channels_last (C_out, C, 3, 3)."""
    return dw.view(dw.shape[0], 3, 3, dw.shape[2]).permute(0, 3, 1, 2)


def partial_sums(products: Sequence[Product], pad: int, config: WeightGradConfig | None = None) -> list[torch.Tensor]:
    """fp32 (splits, row_size) for each product: rows of dw's elements, then db's; no row where there is no pixel.

    One launch for all sources of all products if they have one configuration, else one for each configuration of a
    product. The workspace is bounded by :func:`choose_splits`.
    """
    for each in products:
        n, _, h, w = each.dz.shape
        if (n, h, w) != (each.x.shape[0], each.x.shape[2] + 2 * pad - 2, each.x.shape[3] + 2 * pad - 2):
            shapes = f"dz {tuple(each.dz.shape)} does not fit x {tuple(each.x.shape)}"
            raise ValueError(f"conv_relu weight gradient: {shapes}, pad {pad}")
    found: dict[int, torch.Tensor] = {}
    sources = {at: each.sources(config) for at, each in enumerate(products) if each.dz.numel()}
    alike = len({source.config for group in sources.values() for source in group}) == 1
    for group in [list(sources)] if alike else [[at] for at in sources]:
        read = [source for at in group for source in sources[at]]
        splits = choose_splits(read[0].config, sum(source.programs for source in read), max(s.tiles for s in read),
                               sum(products[at].row_size for at in group))  # fmt: skip
        for at in group:
            found[at] = _launch.empty((splits, products[at].row_size), torch.float32, read[0].dz.device)
        given = [(source, found[at]) for at in group for source in sources[at]]
        for _, members in itertools.groupby(given, key=lambda member: member[0].config):
            _launch_sources(*zip(*members), pad)
    return [found[at] if at in found else _launch.empty((0, each.row_size), torch.float32, each.dz.device)
            for at, each in enumerate(products)]  # fmt: skip


def _launch_sources(sources: tuple[Source, ...], partial: tuple[torch.Tensor, ...], pad: int) -> None:
    """Writes the columns of sources of one configuration to the rows of their products."""
    config, dtype = sources[0].config, sources[0].dz.dtype
    for source in sources:
        reason = why_not(config, source.dz, source.x)
        if reason is not None:
            raise ValueError(f"weight gradient variant {config.variant!r} cannot run here: {reason}")
    if config.variant == "first":
        for source, rows in zip(sources, partial):
            launch_first(source.dz, source.x, pad, rows, source.channels, source.column, source.sums_bias, config)
        return
    bulk, stages, splits = config.variant == "bulk", config.stages(dtype), len(partial[0])
    box = (1, config.block_h, config.block_w)
    # A 16-bit box of several rows reaches the product without a detour only as its right operand, so that dz comes by
    # pointers. float32 takes the detour through registers anyway.
    dz_bulk = bulk and (config.block_h == 1 or dtype == torch.float32)
    block_r, block_q = column_tile(max(source.dz.shape[1] for source in sources), config.num_warps)
    arguments, ends = [], []
    for source, rows in zip(sources, partial):
        dz, x = source.dz, source.x
        arguments += [image_boxes(x, (*box, config.block_c)) if bulk else x, (*x.shape[2:], x.shape[1]),
                      (x.stride(0), x.stride(2)), image_boxes(dz, (*box, config.block_k)) if dz_bulk else dz, dz,
                      (*dz.shape[2:], dz.shape[1]), (dz.stride(0), dz.stride(2)), rows,
                      (source.channels, source.column, rows.shape[1])]  # fmt: skip
        ends.append(sum(ends[-1:]) + source.programs + source.sums_bias * _launch.cdiv(dz.shape[1], block_q))
    absent = [None] * (3 - len(sources)) * (len(arguments) // len(sources))
    numbers = [number for each, rows in zip(sources, partial) for number in (each.channels, each.column, rows.shape[1])]
    _launch.launch(conv_relu_weight_grad_kernel, (ends[-1], splits), *arguments, *absent, len(dz), pad,
                   ends[0], ends[min(1, len(ends) - 1)],
                   BLOCK_H=config.block_h, BLOCK_W=config.block_w, ROWS=config.rows, BLOCK_K=config.block_k,
                   BLOCK_C=config.block_c, BLOCK_R=block_r, BLOCK_Q=block_q,
                   X_VECTOR=min(_launch.vector_width(source.x) for source in sources),
                   DZ_VECTOR=min(_launch.vector_width(source.dz) for source in sources),
                   OUT_VECTOR=math.gcd(4, *numbers), BULK=bulk, DZ_BULK=dz_bulk, STAGES=stages,
                   PRECISION=_launch.dot_precision(dtype), num_warps=config.num_warps, num_stages=stages)
