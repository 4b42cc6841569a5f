"""A U-Net with its weights packed once in oneDNN's own layouts: inference in float32 on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastunet.architecture import Architecture
from fastunet.functional import _onednn
from fastunet.functional._layout import nhwc
from fastunet.functional.conv_norm import folded
from fastunet.functional.relu import activation_
from fastunet.functional.segmentation_head import finish
from fastunet.functional.upsample_conv import transposed_kernel
from fastunet.inference import bounds
from fastunet.reference import centre_crop, padded_to

Size = tuple[int, int, int]
"""Of a map: images, height and width."""
Convolution = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]
"""The weight for the skip, if there is one, that for x, and the bias."""
Upsampling = tuple[torch.Tensor, torch.Tensor]


def packs(style: Architecture) -> bool:
    """Whether a network of that style can be a :class:`PackedNetwork`."""
    return style.norm in (None, "batch") and style.down == "pool"


class PackedNetwork:
    """The forward pass of ``model`` on packed copies of its weights, which it makes when built.

    Memory: one more copy of the weights. oneDNN chooses the layouts by image size; ``height`` and ``width`` are the
    ones to choose for, and other sizes stay right, at the price of a conversion in each call.

    oneDNN applies a ReLU while it writes a convolution's result, but turns NaN into 0. So in a call in which a sum may
    overflow each ReLU is a step of its own.
    """

    def __init__(self, model: Any, height: int, width: int):
        self.pad = 1 if model.architecture.padding == "same" else 0
        self.transpose = model.architecture.up == "transpose"
        self.style = model.architecture
        self.limit = bounds.largest_images(model, height * width)
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
        x, skips, fused = nhwc(x), [], not self.style.negative_slope and bounds.below(x, self.limit)
        for block in self.encoders:
            x = self._block(block, x, fused)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self._block(self.bottleneck, x, fused)
        for (weight, bias), block in self.decoders:
            within = fused and not self.transpose  # which knows no activation
            x = _onednn.transposed_convolution(x, weight, bias, 0 if self.transpose else 1, within)
            x = x if self.transpose or within else activation_(x, self.style.negative_slope)
            skip = skips.pop()
            x = x if x.shape[2:] == skip.shape[2:] else nhwc(padded_to(x, skip, self.style.odd))
            x = self._block(block, x, fused, skip)
        return finish(F.conv2d(x, *self.head), output)

    def _pack_block(self, block: Any, size: Size, split: int = 0) -> tuple[list[Convolution], Size]:
        """The packed convolutions of a block and the size behind it."""
        packed: list[Convolution] = []
        for index in (1, 2):
            weight, bias = _folded(block, index)
            skip = self._pack_conv(weight[:, :split], size) if split else None
            packed.append((skip, self._pack_conv(weight[:, split:], size), bias))
            size, split = (size[0], size[1] + 2 * self.pad - 2, size[2] + 2 * self.pad - 2), 0
        return packed, size

    def _pack_conv(self, weight: torch.Tensor, size: Size) -> torch.Tensor:
        return _onednn.pack(nhwc(weight), self.pad, [size[0], weight.shape[1], *size[1:]])

    def _pack_up(self, layer: Any, size: Size) -> Upsampling:
        weight = layer.weight.detach() if self.transpose else transposed_kernel(layer.weight.detach())
        images = [size[0], weight.shape[0], *size[1:]]
        return _onednn.pack_transposed(nhwc(weight), 0 if self.transpose else 1, images), layer.bias.detach().clone()

    def _block(self, block: list[Convolution], x: torch.Tensor, fused: bool,
               skip: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """Two convolutions with their activations; ``fused``: oneDNN applies a ReLU."""
        for skip_weight, weight, bias in block:
            if skip_weight is None or skip is None:
                x = _onednn.convolution(x, weight, bias, self.pad, fused)
            else:
                crop = nhwc(centre_crop(skip, *x.shape[2:]))
                y = _onednn.convolution(crop, skip_weight, bias, self.pad, False)
                x = _onednn.add_convolution(y, x, weight, self.pad, fused)
            x = x if fused else activation_(x, self.style.negative_slope)
        return x


def _folded(block: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution with its batch norm, if it has one, as it is in evaluation."""
    layer, norm = getattr(block, f"conv{index}"), block._modules.get(f"norm{index}")
    weight = layer.weight.detach()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()
    if norm is None:
        return weight, bias
    return folded(weight, bias, norm.weight.detach(), norm.bias.detach(), norm.running_mean, norm.running_var, norm.eps)
