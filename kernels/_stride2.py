"""Stride-2 transposed convolution, the form of both ways of doubling an image and, read backwards, of halving it.

With a kernel ``k`` of taps (r, s) and an NHWC image x,

    y[n, 2i - 1 + r, 2j - 1 + s, co] += sum_ci k[r, s, co, ci] x[n, i, j, ci]

- nearest x2, then a 2x2 convolution: r, s in {0, 1, 2} (``SIDE`` 3), k sums of one, two or four of its weights;
- 2x2 transposed convolution: r, s in {1, 2} (``SIDE`` 2), k its weights;
- 3x3 convolution with stride 2: the data gradient with respect to x, ``SIDE`` 3 and k its weights.

y is read and written as [N, H, 2, W, 2 C_out]: row phase a and, in one run of memory, (column phase b, channel). Tap
r = 1, 2 belongs to row phase 0, 1 of the same low-resolution row, r = 0 to row phase 1 of the row above; columns alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _launch, _tuned
from .conv.epilogue import bias_activation


@dataclass(frozen=True)
class Stride2Config:
    """Tile of the forward or data-gradient product: ``block_m`` output channels by ``block_h * block_w`` pixels.

    ``block_c`` channels are reduced a step. ``bulk`` loads and stores through tensor descriptors, else by pointers.
    """

    block_h: int
    block_w: int
    block_m: int
    block_c: int
    num_warps: int
    num_stages: int
    bulk: bool


@triton.jit
def load_tile(
    image, n, h, a, w, c, H, W, C, c_end,
    PHASES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """[BLOCK_H * BLOCK_W, BLOCK_C] of an image [N, H, PHASES, W, C] from (n, h, a, w, c); zero outside.

    ``image`` is a descriptor if BULK, else a pointer, and only the latter ends the channels at ``c_end`` < C.
    """
    if BULK:
        return tl.reshape(image.load([n, h, a, w, c]), (BLOCK_H * BLOCK_W, BLOCK_C))
    else:
        offs_p = tl.arange(0, BLOCK_H * BLOCK_W)
        rows, columns = h + offs_p // BLOCK_W, w + offs_p % BLOCK_W
        offs_c = c + tl.arange(0, BLOCK_C)
        inside = (rows >= 0) & (rows < H) & (columns >= 0) & (columns < W)
        pixels = ((n.to(tl.int64) * H + rows) * PHASES + a) * W + columns
        mask = inside[:, None] & (offs_c < c_end)[None, :]
        return tl.load(image + pixels[:, None] * C + offs_c[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(
    image, tile, n, h, a, w, c, H, W, C,
    PHASES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Writes ``tile`` [BLOCK_H * BLOCK_W, BLOCK_C] to an image [N, H, PHASES, W, C]; what lies outside is dropped."""
    if BULK:
        image.store([n, h, a, w, c], tl.reshape(tile, (1, BLOCK_H, 1, BLOCK_W, BLOCK_C)))
    else:
        offs_p = tl.arange(0, BLOCK_H * BLOCK_W)
        rows, columns = h + offs_p // BLOCK_W, w + offs_p % BLOCK_W
        offs_c = c + tl.arange(0, BLOCK_C)
        pixels = ((n.to(tl.int64) * H + rows) * PHASES + a) * W + columns
        mask = ((rows < H) & (columns < W))[:, None] & (offs_c < C)[None, :]
        tl.store(image + pixels[:, None] * C + offs_c[None, :], tile, mask=mask)


@triton.jit
def load_rows(matrix, row, c, rows_end, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BULK: tl.constexpr):
    """[BLOCK_M, BLOCK_C] of a matrix [rows, C] from (row, c); zero outside."""
    if BULK:
        return matrix.load([row, c])
    else:
        offs_m, offs_c = row + tl.arange(0, BLOCK_M), c + tl.arange(0, BLOCK_C)
        mask = (offs_m < rows_end)[:, None] & (offs_c < C)[None, :]
        return tl.load(matrix + offs_m[:, None] * C + offs_c[None, :], mask=mask, other=0.0)


@triton.jit
def stride2_forward_kernel(
    x, k, bias_ptr, y, H, W, C_in, C_out, tiles_h, tiles_w, blocks_m,
    SIDE: tl.constexpr, HAS_BIAS: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Both row phases of BLOCK_M of the 2 C_out (column phase, channel) rows, for a tile of low-resolution pixels.

    k is [SIDE, SLOTS, C_out, C_in] as a matrix of C_in columns. Row r holds k[r, 1], k[r, 2]: the rows that meet
    column j. For SIDE 3 they follow zeros, k[r, 0]: the rows that meet column j + 1, which column phase 0 does not.
    Where a block spans both phases, these zeros let a NaN reach one pixel further to the left than it should.
    """
    SLOTS: tl.constexpr = 4 if SIDE == 3 else 2
    pid = tl.program_id(0)
    tile = pid // blocks_m
    m0 = (pid % blocks_m) * BLOCK_M
    h0, w0 = ((tile // tiles_w) % tiles_h) * BLOCK_H, (tile % tiles_w) * BLOCK_W
    n = tile // (tiles_w * tiles_h)
    row_size = SLOTS * C_out
    rows_end = SIDE * row_size
    chunks = tl.cdiv(C_in, BLOCK_C)
    steps = chunks
    if SIDE == 3:
        steps += chunks * (m0 + BLOCK_M > C_out).to(tl.int32)
    even = tl.zeros((BLOCK_M, BLOCK_H * BLOCK_W), tl.float32)
    odd = tl.zeros((BLOCK_M, BLOCK_H * BLOCK_W), tl.float32)
    for step in range(steps):
        right = step // chunks
        c = (step % chunks) * BLOCK_C
        here = load_tile(x, n, h0, 0, w0 + right, c, H, W, C_in, C_in, 1, BLOCK_H, BLOCK_W, BLOCK_C, BULK)
        if SIDE == 3:
            below = load_tile(x, n, h0 + 1, 0, w0 + right, c, H, W, C_in, C_in, 1, BLOCK_H, BLOCK_W, BLOCK_C, BULK)
            row = (1 - right) * 2 * C_out + m0
            k0 = load_rows(k, row, c, rows_end, C_in, BLOCK_M, BLOCK_C, BULK)
            k1 = load_rows(k, row_size + row, c, rows_end, C_in, BLOCK_M, BLOCK_C, BULK)
            k2 = load_rows(k, 2 * row_size + row, c, rows_end, C_in, BLOCK_M, BLOCK_C, BULK)
            odd = _launch.mma(k0, below.T, odd, PRECISION)
        else:
            k1 = load_rows(k, m0, c, rows_end, C_in, BLOCK_M, BLOCK_C, BULK)
            k2 = load_rows(k, row_size + m0, c, rows_end, C_in, BLOCK_M, BLOCK_C, BULK)
        even = _launch.mma(k1, here.T, even, PRECISION)
        odd = _launch.mma(k2, here.T, odd, PRECISION)
    if HAS_BIAS:
        offs_m = m0 + tl.arange(0, BLOCK_M)
        bias = tl.load(bias_ptr + offs_m % C_out, mask=offs_m < 2 * C_out, other=0.0).to(tl.float32)
        even += bias[:, None]
        odd += bias[:, None]
    even = _launch.activation(even, SLOPE)
    odd = _launch.activation(odd, SLOPE)
    dtype = y.dtype if BULK else y.dtype.element_ty
    store_tile(y, even.to(dtype).T, n, h0, 0, w0, m0, H, W, 2 * C_out, 2, BLOCK_H, BLOCK_W, BLOCK_M, BULK)
    store_tile(y, odd.to(dtype).T, n, h0, 1, w0, m0, H, W, 2 * C_out, 2, BLOCK_H, BLOCK_W, BLOCK_M, BULK)


@triton.jit
def stride2_data_grad_kernel(
    dy, k, bias_ptr, x, dx, H, W, C_in, C_out, tiles_h, tiles_w, blocks_m,
    SIDE: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """dx[n, i, j, ci] = sum_{r, s, co} k[r, s, co, ci] dy[n, 2i - 1 + r, 2j - 1 + s, co], times x > 0 where x is given.

    Of SIDE 3 it is the 3x3 convolution of dy with stride 2 as well, whose bias and activation follow. k is [SIDE, SIDE,
    C_in, C_out] as a matrix of C_out columns. BULK needs C_out to be a multiple of BLOCK_C: a box that runs past the
    channels of column phase 0 would read those of phase 1.
    """
    pid = tl.program_id(0)
    tile = pid // blocks_m
    m0 = (pid % blocks_m) * BLOCK_M
    h0, w0 = ((tile // tiles_w) % tiles_h) * BLOCK_H, (tile % tiles_w) * BLOCK_W
    n = tile // (tiles_w * tiles_h)
    chunks = tl.cdiv(C_out, BLOCK_C)
    acc = tl.zeros((BLOCK_M, BLOCK_H * BLOCK_W), tl.float32)
    for step in range(SIDE * SIDE * chunks):
        tap = step // chunks
        c = (step % chunks) * BLOCK_C
        r, s = tap // SIDE + 4 - SIDE, tap % SIDE + 4 - SIDE  # one more than the tap, so that halves round down
        first = (s % 2) * C_out
        g = load_tile(
            dy, n, h0 + r // 2 - 1, r % 2, w0 + s // 2 - 1, first + c, H, W, 2 * C_out, first + C_out,
            2, BLOCK_H, BLOCK_W, BLOCK_C, BULK,
        )  # fmt: skip
        k_tile = load_rows(k, tap * C_in + m0, c, SIDE * SIDE * C_in, C_out, BLOCK_M, BLOCK_C, BULK)
        acc = _launch.mma(k_tile, g.T, acc, PRECISION)
    acc = bias_activation(acc, bias_ptr, m0 + tl.arange(0, BLOCK_M), C_in, SLOPE)
    if x is not None:
        x_tile = load_tile(x, n, h0, 0, w0, m0, H, W, C_in, C_in, 1, BLOCK_H, BLOCK_W, BLOCK_M, BULK)
        acc = tl.where(x_tile.T > 0, acc, 0.0)
    dtype = dx.dtype if BULK else dx.dtype.element_ty
    store_tile(dx, acc.to(dtype).T, n, h0, 0, w0, m0, H, W, C_in, 1, BLOCK_H, BLOCK_W, BLOCK_M, BULK)


def phase_view(
    image: torch.Tensor, phases: int, config: Stride2Config, channels: int
) -> torch.Tensor | TensorDescriptor:
    """What a kernel reads or writes logical NCHW ``image`` through: the tensor itself, or a descriptor if ``bulk``.

    The descriptor sees [N, H / phases, phases, W / phases, phases C] and copies ``channels`` of a tile of pixels.
    """
    if not config.bulk or image.numel() == 0:  # an empty image starts no kernel and has no descriptor
        return image
    n, c, h, w = image.shape
    shape = [n, h // phases, phases, w // phases, phases * c]
    strides = [h * w * c, phases * w * c, w * c, phases * c, 1]
    return TensorDescriptor(image, shape, strides, [1, config.block_h, 1, config.block_w, channels])


def row_view(matrix: torch.Tensor, config: Stride2Config) -> torch.Tensor | TensorDescriptor:
    """The same for a matrix of packed weights, in tiles of ``block_m`` rows and ``block_c`` columns."""
    return _launch.matrix_descriptor(matrix, (config.block_m, config.block_c)) if config.bulk else matrix


def stack_images(x: torch.Tensor) -> torch.Tensor:
    """NHWC images one below the other, as one image: where no tap leaves its pixel, tiles may cross images."""
    n, c, h, w = x.shape
    return x.as_strided((1, c, n * h, w), (n * h * w * c, 1, w * c, c))


def bulk_copies_fit(*images: torch.Tensor) -> bool:
    """Whether the current device copies tiles of all of ``images`` in bulk, with the shared memory of a data centre."""
    return 90 <= _launch.architecture() < 110 and all(map(_launch.bulk_copy_fits, images))


def key_of(x: torch.Tensor, c_out: int, side: int) -> tuple:
    """What a committed configuration is found by: sizes rounded up to powers of two, so that layers share rows."""
    sizes = (*x.shape, c_out)
    return (side, *map(_launch.next_power_of_2, sizes), x.dtype, _launch.dot_precision(x.dtype))


def choose_forward_config(x: torch.Tensor, c_out: int, side: int) -> Stride2Config:
    """The committed winner for :func:`forward` on this GPU, else a heuristic."""
    fits = bulk_copies_fit(x) and c_out * x.element_size() % 16 == 0
    return _tuned.choose(
        "stride2_forward", key_of(x, c_out, side), Stride2Config,
        lambda: _forward_heuristic(x, c_out, side, fits), lambda config: fits or not config.bulk,
    )  # fmt: skip


def choose_data_grad_config(dy: torch.Tensor, x: torch.Tensor, side: int) -> Stride2Config:
    """The committed winner for :func:`data_grad` on this GPU, else a heuristic."""
    fits, c_out = bulk_copies_fit(x, dy), dy.shape[1]
    return _tuned.choose(
        "stride2_data_grad", key_of(x, c_out, side), Stride2Config,
        lambda: _data_grad_heuristic(x, c_out, side, fits),
        lambda config: not config.bulk or (fits and c_out % config.block_c == 0),
    )  # fmt: skip


def _forward_heuristic(x: torch.Tensor, c_out: int, side: int, fits: bool) -> Stride2Config:
    """Four warps: Triton 3.6 makes eight wait for each product of 128 rows, and all versions lay the two accumulators
    of a 64-row tile out differently for eight and convert one of them in the loop."""
    wide = x.element_size() == 4
    if _launch.dot_precision(x.dtype) == "ieee":
        return Stride2Config(4, 16, 64, 16, 8, 2, fits)
    if not fits:
        return Stride2Config(8, 16, 64, 16 if wide else 32, 8, 3, False)
    if side == 2:
        return Stride2Config(32, 4, 64, 32 if wide else 64, 4, 3, True)
    if c_out % 128 == 0 and x.shape[3] <= 8:
        return Stride2Config(8, 8, 128, 16 if wide else 32, 4, 4, True)
    return Stride2Config(8, 16, 64, 16 if wide else 32, 4, 3, True)


def _data_grad_heuristic(x: torch.Tensor, c_out: int, side: int, fits: bool) -> Stride2Config:
    wide, ieee = x.element_size() == 4, _launch.dot_precision(x.dtype) == "ieee"
    # a divisor of C_out, 128 bytes at most, and 16 at least, which products need
    block_c = next((b for b in ((32, 16) if wide else (64, 32, 16)) if c_out % b == 0), 0)
    bulk = fits and block_c > 0
    if ieee:
        return Stride2Config(4, 16, 64, min(block_c, 16) if bulk else 16, 8, 2, bulk)
    if not bulk:
        return Stride2Config(8, 16, 64, 16 if wide else 32, 8, 3, False)
    block_m = 128 if x.shape[1] % 128 == 0 else 64
    if side == 2:
        return Stride2Config(32, 4, block_m, block_c, 4, 3, True)
    return Stride2Config(8, 8 if x.shape[3] <= 8 else 16, block_m, block_c, 4, 3, True)


def forward(
    x: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, slope: float, side: int, config: Stride2Config
) -> torch.Tensor:
    """y (N, C_out, 2H, 2W) of NHWC ``x`` and ``k`` (SIDE, SLOTS, C_out, C_in) packed as the kernel states."""
    n, c_in, h, w = x.shape
    c_out = k.shape[2]
    y = _launch.empty_image((n, c_out, 2 * h, 2 * w), x.dtype, x.device)
    x, target = (stack_images(x), stack_images(y)) if side == 2 else (x, y)
    n, h = x.shape[0], x.shape[2]
    tiles_h, tiles_w = _launch.cdiv(h, config.block_h), _launch.cdiv(w, config.block_w)
    blocks_m = _launch.cdiv(2 * c_out, config.block_m)
    _launch.launch(
        stride2_forward_kernel, (n * tiles_h * tiles_w * blocks_m,),
        phase_view(x, 1, config, config.block_c), row_view(k.view(-1, c_in), config), bias,
        phase_view(target, 2, config, config.block_m), h, w, c_in, c_out, tiles_h, tiles_w, blocks_m,
        SIDE=side, HAS_BIAS=bias is not None, SLOPE=slope, PRECISION=_launch.dot_precision(x.dtype),
        BLOCK_H=config.block_h, BLOCK_W=config.block_w, BLOCK_M=config.block_m, BLOCK_C=config.block_c,
        BULK=config.bulk, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


def data_grad(
    dy: torch.Tensor, k: torch.Tensor, dx: torch.Tensor, mask: torch.Tensor | None, side: int, config: Stride2Config,
    bias: torch.Tensor | None = None, slope: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Writes ``dx`` (N, C_in, H, W) of ``dy`` and ``k`` (SIDE, SIDE, C_in, C_out), times ``mask`` > 0; all NHWC.

    With ``bias`` (C_in,) and ``slope`` the activation of dx + bias instead, for the convolution of stride 2.
    """
    c_in, c_out = k.shape[2:]
    target = dx
    if side == 2:
        dy, target, mask = stack_images(dy), stack_images(dx), None if mask is None else stack_images(mask)
    n, _, h, w = target.shape
    tiles_h, tiles_w = _launch.cdiv(h, config.block_h), _launch.cdiv(w, config.block_w)
    blocks_m = _launch.cdiv(c_in, config.block_m)
    _launch.launch(
        stride2_data_grad_kernel, (n * tiles_h * tiles_w * blocks_m,),
        phase_view(dy, 2, config, config.block_c), row_view(k.view(-1, c_out), config), bias,
        None if mask is None else phase_view(mask, 1, config, config.block_m),
        phase_view(target, 1, config, config.block_m), h, w, c_in, c_out, tiles_h, tiles_w, blocks_m,
        SIDE=side, SLOPE=slope, PRECISION=_launch.dot_precision(dy.dtype),
        BLOCK_H=config.block_h, BLOCK_W=config.block_w, BLOCK_M=config.block_m, BLOCK_C=config.block_c,
        BULK=config.bulk, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dx
