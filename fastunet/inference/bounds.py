"""How large images may be so that no sum in a U-Net can overflow: then no NaN can arise.

Engines apply a ReLU while they write a convolution's result, by a maximum that turns NaN into 0, and so a ruined
network into a confident one. Where images and weights keep within the bound there is no NaN to lose.
"""

from __future__ import annotations

import math
from typing import Any

import torch

LARGEST = torch.finfo(torch.float32).max / 2**20
"""What no sum may pass, with room for rounding, and for algorithms that transform their operands first."""


def below(x: torch.Tensor, limit: float) -> bool:
    """Whether all of ``x`` lies within ±``limit``; False where either is NaN."""
    low, high = (value.item() for value in torch.aminmax(x))  # NaN if one element is
    return -limit < low and high < limit


def largest_images(model: Any, pixels: int) -> float:
    """What the magnitudes of images of at most ``pixels`` pixels must stay below; 0 or less, or NaN, if none do.

    With v the largest Euclidean norm over the channels of one pixel, a k×k convolution gives at most k σ v + ‖b‖, where
    σ bounds the spectral norm of its weight (C_out, k² C_in), and so does each part of its sums. Activations keep v,
    a 2×2 maximum doubles it at most, a concatenation adds. So v is at most a · max|images| + b everywhere.
    """
    walk, style = _Walk(pixels), model.architecture
    v = torch.tensor([math.sqrt(style.in_channels), 0], dtype=torch.float64)  # a and b
    skips = []
    for encoder in model.encoders:
        v = walk.block(encoder, v)
        skips.append(v)
        v = 2 * v if style.down == "pool" else v
    v = walk.block(model.bottleneck, v)
    for decoder in model.decoders:
        v = walk.convolution(decoder.up, v, 1 if style.up == "transpose" else 2)  # pixels that one element sees
        v = walk.block(decoder, v + skips.pop())
    walk.convolution(model.head, v, 1)
    return torch.stack(walk.limits).amin().item()


class _Walk:
    """The layers one after the other; ``limits`` are what images must stay below for each."""

    def __init__(self, pixels: int):
        self.pixels = pixels
        self.limits: list[torch.Tensor] = []

    def block(self, block: Any, v: torch.Tensor) -> torch.Tensor:
        for index in (1, 2):
            v = self.convolution(getattr(block, f"conv{index}"), v, 3)
            if (norm := block._modules.get(f"norm{index}")) is not None:
                v = self.norm(norm, v)
        return v

    def convolution(self, layer: Any, v: torch.Tensor, side: int) -> torch.Tensor:
        weight = layer.weight.detach().flatten(1)
        square = weight @ weight.T
        v = v * (square @ square).norm().sqrt().sqrt() * side  # (Σ σ_i⁸)^⅛ ≥ σ
        if layer.bias is not None:
            v = self._plus(v, layer.bias.detach().norm())
        return self._kept(v, LARGEST)

    def norm(self, norm: Any, v: torch.Tensor) -> torch.Tensor:
        weight, bias = norm.weight.detach(), norm.bias.detach()
        if getattr(norm, "running_mean", None) is not None:  # batch norm
            scale = weight.abs() / (norm.running_var + norm.eps).sqrt()
            return self._kept(self._plus(v * scale.amax(), bias.norm() + (norm.running_mean * scale).norm()), LARGEST)
        self._kept(v, math.sqrt(LARGEST / self.pixels))  # its variance is a sum of squares
        return self._plus(0 * v, weight.abs().amax() * math.sqrt(self.pixels * len(weight)) + bias.norm())

    def _plus(self, v: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return torch.stack((v[0], v[1] + offset))

    def _kept(self, v: torch.Tensor, largest: float) -> torch.Tensor:
        self.limits.append((largest - v[1]) / v[0])
        return v
