"""Operands of the 3×3 convolution of one or two sources, tiles that they straddle, and the result by plain PyTorch."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from fastunet.kernels.conv.convolution import ConvConfig

from .conv_cases import ConvCase

POINTER = ConvConfig("pointer", block_k=32, block_w=64, block_c=32)
FIRST = ConvConfig("first", block_k=16, block_w=64)
BOX = ConvConfig("box", block_k=64, block_w=16, block_h=4, block_c=16)
BATCH_BOX = ConvConfig("box", block_k=64, block_w=8, block_h=8, block_n=2, block_c=32)
SPLIT = ConvConfig("box", block_k=64, block_w=16, block_h=4, block_c=16, splits=5)
BATCH_SPLIT = ConvConfig("box", block_k=64, block_w=8, block_h=8, block_n=2, block_c=16, splits=3)
ROWS = ConvConfig("rows", block_k=64, block_w=16, block_h=4, block_c=32)
STACKED = ConvConfig("rows", block_k=32, block_w=32, block_h=6, block_c=16)
FOUR_STACKED = ConvConfig("rows", block_k=16, block_w=64, block_h=4, block_c=16)


@dataclasses.dataclass(frozen=True)
class Case(ConvCase):
    """The skip is larger than x by ``crop`` rows and ``crop + 1`` columns."""

    crop: int = 0

    def __str__(self):
        return f"{super().__str__()}-crop{self.crop}" if self.crop else super().__str__()


def operands(case, dtype, device, bias=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    c_in = case.c_skip + case.c_x
    x = normal(case.n, case.c_x, case.h, case.w).to(memory_format=torch.channels_last)
    skip = normal(case.n, case.c_skip, case.h + case.crop, case.w + case.crop + 1) if case.c_skip else None
    weight = normal(case.c_out, c_in, 3, 3) / (3 * c_in**0.5)
    return x, skip, weight, normal(case.c_out) if bias else None


def reference(x, skip, weight, bias, pad, relu, dtype, convolve=F.conv2d):
    """Plain PyTorch in ``dtype``; in float64 the specification."""
    x, skip, weight, bias = (None if t is None else t.to(dtype) for t in (x, skip, weight, bias))
    if skip is not None:
        top, left = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
        x = torch.cat([skip[:, :, top : top + x.shape[2], left : left + x.shape[3]], x], 1)
    y = convolve(x, weight, bias, padding=pad)
    return F.relu(y) if relu else y
