"""Gradient of ReLU and LeakyReLU from its saved output, where no neighbour's epilogue could apply the mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _launch, _tuned


@dataclass(frozen=True)
class ReluConfig:
    """Elements of one program and its warps."""

    block: int = 4096
    num_warps: int = 4


@triton.jit
def relu_backward_kernel(dy_ptr, y_ptr, dz_ptr, count, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:  # unmasked, so that accesses stay 16 bytes wide for any count
        y = tl.load(y_ptr + offs)
        dy = tl.load(dy_ptr + offs)
        tl.store(dz_ptr + offs, _launch.activation_gradient(dy, y.to(tl.float32), SLOPE))
    else:
        mask = offs < count
        y = tl.load(y_ptr + offs, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0)
        tl.store(dz_ptr + offs, _launch.activation_gradient(dy, y.to(tl.float32), SLOPE), mask=mask)


def backward(dy: torch.Tensor, y: torch.Tensor, slope: float, config: ReluConfig | None = None) -> torch.Tensor:
    """dz = dy where y > 0, else slope · dy; for a slope of 0 a NaN activation passes its gradient on, as in PyTorch.

    ``dy`` and ``y`` have one shape (N, C, H, W). The result is channels_last.

    Raises:
        ValueError: the shapes differ.
    """
    if dy.shape != y.shape:
        raise ValueError(f"relu backward: gradient of shape {tuple(dy.shape)} for an output of shape {tuple(y.shape)}")
    config = config or _tuned.choose("relu", (y.dtype,), ReluConfig, ReluConfig)
    dy, y = _launch.channels_last(dy), _launch.channels_last(y)
    dz = _launch.empty_image(tuple(y.shape), y.dtype, y.device)
    grid = (_launch.cdiv(y.numel(), config.block),)
    _launch.launch(
        relu_backward_kernel, grid, dy, y, dz, y.numel(),
        SLOPE=slope, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip
    return dz
