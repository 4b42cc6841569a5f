"""1x1 convolution to 1..32 classes with softmax or argmax behind it, and its gradients: every image is read once.

logits[p, k] = bias[k] + sum_c weight[k, c] x[p, c], p one of the P = N H W pixels of NHWC memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _launch, _reduce, _tuned
from .conv.cost import device

_OUTPUTS = ("logits", "probabilities", "labels", "regions")
_PROGRAMS = 5  # that share the pixels in the backward, for each multiprocessor


@dataclass(frozen=True)
class HeadConfig:
    """Tile: ``block_p`` pixels by ``block_c`` channels."""

    block_p: int
    block_c: int
    num_warps: int
    num_stages: int


@triton.jit
def segmentation_head_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, P, C,
    CLASSES: tl.constexpr, OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of pixels and all classes: logits, probabilities (P, CLASSES), or (P,) labels, the first maximum, or
    regions, one more than the last positive class.

    P is below 2^31, P C need not be.
    """
    DOT_K: tl.constexpr = 16 if BLOCK_K < 16 else BLOCK_K  # the narrowest product
    offs_p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    offs_k, offs_dot = tl.arange(0, BLOCK_K), tl.arange(0, DOT_K)
    p_mask = offs_p < P
    acc = tl.zeros((BLOCK_P, DOT_K), tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        c_mask = offs_c < C
        x = tl.load(x_ptr + offs_p[:, None] * C + offs_c[None, :], mask=p_mask[:, None] & c_mask[None, :], other=0.0)
        w_mask = (offs_dot < CLASSES)[:, None] & c_mask[None, :]
        w = tl.load(weight_ptr + offs_dot[:, None] * C + offs_c[None, :], mask=w_mask, other=0.0)
        acc = _launch.mma(x, w.T, acc, PRECISION)
    if DOT_K > BLOCK_K:  # back to the classes' own width, so that the tile is one run of memory
        acc = tl.reshape(acc, (BLOCK_P, DOT_K // BLOCK_K, BLOCK_K))
        first = (tl.arange(0, DOT_K // BLOCK_K) == 0)[None, :, None]
        acc = tl.sum(tl.where(first, acc, 0.0), axis=1)
    k_mask = (offs_k < CLASSES)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_k, mask=offs_k < CLASSES, other=0.0).to(tl.float32)[None, :]
    if OUTPUT == "labels":
        nan = (acc != acc) & k_mask
        best = tl.max(tl.where(k_mask & (acc == acc), acc, float("-inf")), axis=1)
        hit = tl.where((tl.max(nan.to(tl.int32), axis=1) > 0)[:, None], nan, (acc == best[:, None]) & k_mask)
        label = tl.min(tl.where(hit, offs_k[None, :], BLOCK_K), axis=1)  # the first NaN if any, as torch.argmax has it
        tl.store(out_ptr + offs_p, label.to(tl.uint8), mask=p_mask)
    elif OUTPUT == "regions":
        last = tl.max(tl.where((acc > 0) & k_mask, offs_k[None, :] + 1, 0), axis=1)
        tl.store(out_ptr + offs_p, last.to(tl.uint8), mask=p_mask)
    else:
        if OUTPUT == "probabilities":
            masked = tl.where(k_mask, acc, float("-inf"))
            acc = tl.exp(masked - tl.max(masked, axis=1)[:, None])
            acc = acc / tl.sum(acc, axis=1)[:, None]
        values = acc.to(out_ptr.dtype.element_ty)
        if BLOCK_K == CLASSES:
            offs = tl.program_id(0).to(tl.int64) * BLOCK_P * CLASSES + tl.arange(0, BLOCK_P * CLASSES)
            end = tl.cast(P, tl.int64) * CLASSES
            tl.store(out_ptr + offs, tl.reshape(values, (BLOCK_P * CLASSES,)), mask=offs < end)
        else:
            tl.store(out_ptr + offs_p[:, None] * CLASSES + offs_k[None, :], values, mask=p_mask[:, None] & k_mask)


@triton.jit
def segmentation_head_backward_kernel(
    dlogits_ptr, x_ptr, weight_ptr, dx_ptr, partial_ptr, P, C, row_size, tiles_a_program,
    CLASSES: tl.constexpr, MASK_X: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    DOT_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """For BLOCK_C channels and a run of pixel tiles: dx = dlogits weight (times x > 0 if MASK_X), and the partial sums

    partial[program, (k, c)] = sum_p dlogits[p, k] x[p, c] and, behind them, [program, k] = sum_p dlogits[p, k], by the
    first block of channels.
    """
    split, c0 = tl.program_id(0), tl.program_id(1) * BLOCK_C
    offs_k, offs_c = tl.arange(0, DOT_K), c0 + tl.arange(0, BLOCK_C)
    k_mask, c_mask = offs_k < CLASSES, offs_c < C
    w_mask = k_mask[:, None] & c_mask[None, :]
    w = tl.load(weight_ptr + offs_k[:, None] * C + offs_c[None, :], mask=w_mask, other=0.0)
    dw = tl.zeros((DOT_K, BLOCK_C), tl.float32)
    db = tl.zeros((BLOCK_P, DOT_K), tl.float32)
    first = split * tiles_a_program
    for tile in range(first, tl.minimum(first + tiles_a_program, tl.cdiv(P, BLOCK_P))):
        offs_p = (tile * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
        p_mask = offs_p < P
        mask = p_mask[:, None] & c_mask[None, :]
        g_mask = p_mask[:, None] & k_mask[None, :]
        g = tl.load(dlogits_ptr + offs_p[:, None] * CLASSES + offs_k[None, :], mask=g_mask, other=0.0)
        x = tl.load(x_ptr + offs_p[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
        # channels by rows: few enough for the product that takes its operands from registers, where the mask is
        dx = _launch.mma(w.T, g.T, tl.zeros((BLOCK_C, BLOCK_P), tl.float32), PRECISION).T
        if MASK_X:
            dx = tl.where(x > 0, dx, 0.0)
        tl.store(dx_ptr + offs_p[:, None] * C + offs_c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dw = _launch.mma(g.T, x, dw, PRECISION)
        if HAS_BIAS:
            db += g.to(tl.float32)
    out = partial_ptr + split.to(tl.int64) * row_size
    tl.store(out + offs_k[:, None] * C + offs_c[None, :], dw, mask=w_mask)
    if HAS_BIAS:  # noqa: SIM102 (a compile-time and a run-time condition)
        if c0 == 0:
            tl.store(out + CLASSES * C + offs_k, tl.sum(db, axis=0), mask=k_mask)


def choose_config(kernel: str, x: torch.Tensor, classes: int) -> HeadConfig:
    """The committed winner of ``kernel`` on this GPU, else a heuristic; sizes are rounded up to powers of two."""
    precision = _launch.dot_precision(x.dtype)
    key = (*map(_launch.next_power_of_2, (*x.shape, classes)), x.dtype, precision)
    block_c = max(16, _launch.next_power_of_2(x.shape[1]))
    if kernel == "segmentation_head_backward":  # larger tiles spill
        config = HeadConfig(64, min(32, block_c), *((8, 2) if precision == "ieee" else (4, 3)))
    else:
        config = HeadConfig(64 if precision == "ieee" else 128, min(128 // x.element_size(), block_c), 4, 3)
    return _tuned.choose(kernel, key, HeadConfig, lambda: config)


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output: str, config: HeadConfig | None = None
) -> torch.Tensor:
    """Head of ``x`` (N, C, H, W) with ``weight`` (classes, C, 1, 1).

    ``output`` "logits" or "probabilities" gives (N, classes, H, W), channels_last, in ``x``'s dtype; "labels" gives
    uint8 (N, H, W), the first maximum of the unrounded logits, "regions" one more than the last positive, or 0.

    Raises:
        ValueError: another ``output``.
    """
    if output not in _OUTPUTS:
        raise ValueError(f"output is {output!r}; expected one of {', '.join(_OUTPUTS)}")
    x, weight = _launch.channels_last(x), weight.contiguous()
    config = config or choose_config("segmentation_head", x, weight.shape[0])
    n, c, h, w = x.shape
    classes, pixels = weight.shape[0], n * h * w
    if output in ("labels", "regions"):
        out = _launch.empty((n, h, w), torch.uint8, x.device)
    else:
        out = _launch.empty_image((n, classes, h, w), x.dtype, x.device)
    _launch.launch(
        segmentation_head_forward_kernel, (_launch.cdiv(pixels, config.block_p),), x, weight, bias, out, pixels, c,
        CLASSES=classes, OUTPUT=output, PRECISION=_launch.dot_precision(x.dtype),
        BLOCK_K=_launch.next_power_of_2(classes), BLOCK_P=config.block_p, BLOCK_C=config.block_c,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def backward(
    dlogits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mask_x: bool, has_bias: bool,
    config: HeadConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx, dw, db) of ``dlogits`` (N, classes, H, W): dx channels_last, times x > 0 if ``mask_x`` (x a ReLU's output).

    dw (classes, C, 1, 1) and db (classes,) in ``x``'s dtype; db is empty (0,) without ``has_bias``.
    """
    dlogits, x, weight = _launch.channels_last(dlogits), _launch.channels_last(x), weight.contiguous()
    config = config or choose_config("segmentation_head_backward", x, weight.shape[0])
    n, c, h, w = x.shape
    classes, tiles = weight.shape[0], _launch.cdiv(n * h * w, config.block_p)
    tiles_a_program = max(1, _launch.cdiv(tiles, _PROGRAMS * device().multiprocessors))
    splits = _launch.cdiv(tiles, tiles_a_program)
    dx = _launch.empty_image(tuple(x.shape), x.dtype, x.device)
    partial = _launch.empty((splits, classes * c + (classes if has_bias else 0)), torch.float32, x.device)
    _launch.launch(
        segmentation_head_backward_kernel, (splits, _launch.cdiv(c, config.block_c)),
        dlogits, x, weight, dx, partial, n * h * w, c, partial.shape[1], tiles_a_program,
        CLASSES=classes, MASK_X=mask_x, HAS_BIAS=has_bias, PRECISION=_launch.dot_precision(x.dtype),
        DOT_K=max(16, _launch.next_power_of_2(classes)), BLOCK_P=config.block_p, BLOCK_C=config.block_c,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    dw, db = _reduce.sum_gradients(partial, tuple(weight.shape), x.dtype)
    dw = dw.as_strided(dw.shape, (dw.shape[1], 1, dw.shape[1], dw.shape[1]))  # NHWC, as PyTorch writes it for one pixel
    return dx, dw, db
