"""A U-Net with its weights packed once in oneDNN's own layouts: inference in float32 on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastunet.functional import _onednn
from fastunet.functional._layout import nhwc
from fastunet.functional.segmentation_head import finish
from fastunet.functional.upsample_conv import transposed_kernel
from fastunet.reference import centre_crop

Size = tuple[int, int, int]
"""Of a map: images, height and width."""
Reach = tuple[float, float]
Convolution = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, Reach]
"""The weight for the skip, if there is one, that for x, the bias, and what :func:`_reach` says of both."""
Upsampling = tuple[torch.Tensor, torch.Tensor, Reach]

_LARGEST = torch.finfo(torch.float32).max / 2
"""What no sum inside a convolution may pass, with room for rounding, if its ReLU is oneDNN's."""


class PackedNetwork:
    """The forward pass of ``model`` on packed copies of its weights, which it makes when built.

    Memory: one more copy of the weights. oneDNN chooses the layouts by image size; ``height`` and ``width`` are the
    ones to choose for, and other sizes stay right, at the price of a conversion in each call.

    oneDNN applies a ReLU while it writes a convolution's result, but turns NaN into 0. NaN can arise only where images
    or weights are not finite, or a sum overflows; so each call bounds every sum, layer by layer, by
    max|x| · max_k Σ|w_k| + max|b|, and a ReLU whose bound is too large, or NaN, is a step of its own.
    """

    def __init__(self, model: Any, height: int, width: int):
        self.pad = 1 if model.architecture.padding == "same" else 0
        self.transpose = model.architecture.up == "transpose"
        self.encoders: list[list[Convolution]] = []
        size: Size = 1, height, width
        for encoder in model.encoders:
            block, size = self._pack_block(encoder, size)
            self.encoders.append(block)
            size = size[0], size[1] // 2, size[2] // 2
        self.bottleneck, size = self._pack_block(model.bottleneck, size)
        self.decoders: list[tuple[Upsampling, list[Convolution]]] = []
        for decoder in model.decoders:
            up = self._pack_up(decoder.up, size)
            size = size[0], 2 * size[1], 2 * size[2]
            block, size = self._pack_block(decoder, size, split=decoder.conv2.out_channels)
            self.decoders.append((up, block))
        self.head = nhwc(model.head.weight.detach().clone()), model.head.bias.detach().clone()

    def run(self, x: torch.Tensor, output: str) -> torch.Tensor:
        """Logits, probabilities or labels of padded images."""
        x, skips = nhwc(x), []
        low, high = (value.item() for value in torch.aminmax(x))
        bound = -low if -low > high else high  # not max(): it may pass over a NaN
        for block in self.encoders:
            x, bound = self._block(block, x, bound)
            skips.append((x, bound))
            x = F.max_pool2d(x, 2)
        x, bound = self._block(self.bottleneck, x, bound)
        for up, block in self.decoders:
            x, bound = self._up(x, up, bound)
            x, bound = self._block(block, x, bound, *skips.pop())
        return finish(F.conv2d(x, *self.head), output)

    def _pack_block(self, block: Any, size: Size, split: int = 0) -> tuple[list[Convolution], Size]:
        """The packed convolutions of a block and the size behind it."""
        packed: list[Convolution] = []
        for layer in (block.conv1, block.conv2):
            weight, bias = layer.weight.detach(), layer.bias.detach().clone()
            skip = self._pack_conv(weight[:, :split], size) if split else None
            packed.append((skip, self._pack_conv(weight[:, split:], size), bias, _reach(weight, bias)))
            size, split = (size[0], size[1] + 2 * self.pad - 2, size[2] + 2 * self.pad - 2), 0
        return packed, size

    def _pack_conv(self, weight: torch.Tensor, size: Size) -> torch.Tensor:
        return _onednn.pack(nhwc(weight), self.pad, [size[0], weight.shape[1], *size[1:]])

    def _pack_up(self, layer: Any, size: Size) -> Upsampling:
        weight = layer.weight.detach() if self.transpose else transposed_kernel(layer.weight.detach())
        images = [size[0], weight.shape[0], *size[1:]]
        packed = _onednn.pack_transposed(nhwc(weight), 0 if self.transpose else 1, images)
        bias = layer.bias.detach().clone()
        return packed, bias, _reach(weight.transpose(0, 1), bias)

    def _up(self, x: torch.Tensor, up: Upsampling, bound: float) -> tuple[torch.Tensor, float]:
        """The upsampled map and the bound of its elements."""
        weight, bias, reach = up
        bound = _sum_bound(reach, bound)
        fused = not self.transpose and bound < _LARGEST
        y = _onednn.transposed_convolution(x, weight, bias, 0 if self.transpose else 1, fused)
        return (y if self.transpose or fused else y.relu_()), bound

    def _block(
        self, block: list[Convolution], x: torch.Tensor, bound: float, skip: torch.Tensor | None = None,
        skip_bound: float = 0.0,
    ) -> tuple[torch.Tensor, float]:  # fmt: skip
        """Two convolutions with ReLU, and the bound of their elements."""
        for skip_weight, weight, bias, reach in block:
            bound = _sum_bound(reach, skip_bound if skip_bound > bound else bound)
            fused = bound < _LARGEST
            if skip_weight is None or skip is None:
                x = _onednn.convolution(x, weight, bias, self.pad, fused)
            else:
                crop = nhwc(centre_crop(skip, *x.shape[2:]))
                y = _onednn.convolution(crop, skip_weight, bias, self.pad, False)
                x = _onednn.add_convolution(y, x, weight, self.pad, fused)
                skip_bound = 0.0
            x = x if fused else x.relu_()
        return x, bound


def _reach(weight: torch.Tensor, bias: torch.Tensor) -> Reach:
    """The largest Σ|w| of an output channel, weight (C_out, C_in, k, k), and the largest |bias|."""
    return weight.abs().double().sum(dim=(1, 2, 3)).amax().item(), bias.abs().amax().item()


def _sum_bound(reach: Reach, bound: float) -> float:
    """What no sum of a convolution passes whose inputs are at most ``bound``; NaN where that, or a weight, is NaN."""
    return reach[0] * bound + reach[1]
