"""The sizes up to which kernels address their operands without overflow; larger ones are refused, never misread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

_PIXELS = 1 << 30
_ROW = 1 << 26
_CHANNELS = 1 << 13
_SIDE = (1 << 31) - (1 << 16)


def check_sizes(kernel: str, arguments: Iterable[Any]) -> None:
    """Refuses tensors, and descriptors of tensors, that are beyond what the kernels' 32-bit arithmetic holds.

    Kernels count pixels in 32 bits, rounded up to whole tiles, pooling windows and shares of programs, and address in
    64; but within a tile of at most sixteen rows offsets are of 32 bits, as are those within a weight of 16 · C_out ·
    C_in elements. Hence for an image (N, C, H, W): N · (H + 1) · (W + 1) < 2³⁰, W · C < 2²⁶ and C <= 2¹³; and no side
    of any tensor comes within a tile of 2³¹.

    Raises:
        ValueError: a tensor is larger.
    """
    for argument in arguments:
        tensor = getattr(argument, "base", argument)
        if not isinstance(tensor, torch.Tensor):
            continue
        shape = tensor.shape
        if any(side >= _SIDE for side in shape):
            raise ValueError(f"{kernel}: no side of a tensor may reach {_SIDE}, and one has the shape {tuple(shape)}")
        if len(shape) != 4:
            continue
        n, c, h, w = shape
        row = max(w * c, tensor.stride(2) if tensor.stride(1) == 1 else 0)
        if n * (h + 1) * (w + 1) >= _PIXELS or row >= _ROW or c > _CHANNELS:
            raise ValueError(
                f"{kernel}: an image of shape {tuple(shape)} is too large: N · (H + 1) · (W + 1) must be below "
                f"{_PIXELS}, a row below {_ROW} elements, and there may be {_CHANNELS} channels"
            )
