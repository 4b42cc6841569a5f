"""The one memory layout of the operators: logical NCHW in NHWC memory, with exactly the strides (HWC, 1, WC, C)."""

from __future__ import annotations

import torch

from fastunet import autograd


def nhwc_strides(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Strides of NHWC memory for a logical (N, C, H, W) shape."""
    _, c, h, w = shape
    return h * w * c, 1, w * c, c


def nhwc(x: torch.Tensor) -> torch.Tensor:
    """``x`` in NHWC memory; PyTorch's own test accepts other strides where C == 1 or H == W == 1."""
    strides = nhwc_strides(x.shape)
    if x.stride() == strides:
        return x
    if autograd.vmapped():  # which cannot write into a tensor that holds one image
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def like_weight(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x`` as PyTorch's convolutions should get it: in NCHW memory if the weight is, and is much larger, in NHWC
    else; they reorder what does not fit in each call."""
    return x.contiguous() if weight.is_contiguous() and weight.numel() > 4 * x.numel() else nhwc(x)


def empty_nhwc(like: torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    """An uninitialised (N, channels, height, width) tensor with the batch, dtype and device of ``like``."""
    shape = like.shape[0], channels, height, width
    return torch.empty_strided(shape, nhwc_strides(shape), dtype=like.dtype, device=like.device)
