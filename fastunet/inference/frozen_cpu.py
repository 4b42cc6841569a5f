"""A U-Net with its weights packed once, in oneDNN's own layouts or transformed: inference in float32 on a CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastunet.allocator import keep_some_freed_memory
from fastunet.functional import _norm, _onednn, _upsample_products, _winograd
from fastunet.functional._layout import nhwc
from fastunet.functional.conv_norm import folded
from fastunet.functional.relu import activation_
from fastunet.functional.segmentation_head import finish
from fastunet.functional.upsample_conv import transposed_kernel
from fastunet.inference import bounds
from fastunet.reference import centre_crop, padded_to

Size = tuple[int, int, int]
"""Of a map: images, height and width."""
PIXELS = 1 << 24
"""Of an image, at most, within the bounds: they depend on it a little, and not each size shall have its own."""


@dataclass(frozen=True)
class Convolution:
    """Packed weights, of the skip if there is one and of x, or those of both ``transformed``, and the bias; ``norm`` is
    a layer that takes statistics."""

    transformed: bool
    skip: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor
    stride: int
    norm: Any


@dataclass(frozen=True)
class Upsampling:
    """Packed weights of a transposed convolution, or those of a 2×2 convolution ``summed``, and the bias."""

    summed: bool
    weight: torch.Tensor
    bias: torch.Tensor


class PackedNetwork:
    """The forward pass of ``model`` on packed copies of its weights, which it makes when built.

    Memory: one more copy of the weights, 2.7 times as large of those that :mod:`fastunet.functional._winograd` takes,
    and of the maps what the C library keeps from one call to the next (:func:`keep_some_freed_memory`): their page
    faults took 6 to 10 % of a call. oneDNN chooses the layouts by number and size of the images, and by threads;
    others stay right, at the price of conversions in each call, which may take longer than the convolutions. ``limit``
    is that of :func:`bounds.largest_images` for at most :data:`PIXELS`; ``transformed`` keeps weights by layer for the
    networks packed for other images.

    oneDNN applies a ReLU while it writes a convolution's result, but turns NaN into 0; Winograd's algorithm spreads it
    over a tile; a norm whose variance is infinite leaves its bias alone. So a call in which a sum may overflow is the
    model's.
    """

    def __init__(self, model: Any, size: Size, limit: float, transformed: dict[Any, Any]):
        self.pad = 1 if model.architecture.padding == "same" else 0
        self.transpose = model.architecture.up == "transpose"
        self.style = model.architecture
        self.limit, self.transformed = limit, transformed
        self.encoders: list[list[Convolution]] = []
        for encoder in model.encoders:
            block, size = self._pack_block(encoder, size)
            self.encoders.append(block)
            size = (size[0], size[1] // 2, size[2] // 2) if self.style.down == "pool" else size
        self.bottleneck, size = self._pack_block(model.bottleneck, size)
        self.decoders: list[tuple[Upsampling, list[Convolution]]] = []
        for decoder in model.decoders:
            up = self._pack_up(decoder.up, size)
            size = size[0], 2 * size[1], 2 * size[2]
            block, size = self._pack_block(decoder, size, split=decoder.conv2.out_channels)
            self.decoders.append((up, block))
        self.head = nhwc(model.head.weight.detach().clone()), model.head.bias.detach().clone()
        keep_some_freed_memory()

    def run(self, x: torch.Tensor, output: str) -> torch.Tensor | None:
        """Logits, probabilities or labels of padded images; None where a sum may overflow."""
        if x.shape[2] * x.shape[3] > PIXELS or not bounds.below(x, self.limit):
            return None
        x, skips, fused = nhwc(x), [], not self.style.negative_slope
        for block in self.encoders:
            x = self._block(block, x, fused)
            skips.append(x)
            x = F.max_pool2d(x, 2) if self.style.down == "pool" else x
        x = self._block(self.bottleneck, x, fused)
        for up, block in self.decoders:
            x = self._up(up, x, fused)
            skip = skips.pop()
            x = x if x.shape[2:] == skip.shape[2:] else nhwc(padded_to(x, skip, self.style.odd))
            x = self._block(block, x, fused, skip)
        return finish(F.conv2d(x, *self.head), output)

    def _pack_block(self, block: Any, size: Size, split: int = 0) -> tuple[list[Convolution], Size]:
        """The packed convolutions of a block and the size behind it."""
        packed: list[Convolution] = []
        for index in (1, 2):
            layer, norm = getattr(block, f"conv{index}"), block._modules.get(f"norm{index}")
            weight, bias = layer.weight.detach(), layer.bias
            bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()
            if self.style.norm == "batch":  # in evaluation the convolution does its work
                values = norm.weight.detach(), norm.bias.detach(), norm.running_mean, norm.running_var
                (weight, bias), norm = folded(weight, bias, *values, norm.eps), None
            stride = layer.stride[0]
            before, size = size, (size[0], *((side + 2 * self.pad - 3) // stride + 1 for side in size[1:]))
            if stride == 1 and _winograd.suits(weight.shape[1], len(weight), math.prod(size)):
                if layer not in self.transformed:
                    self.transformed[layer] = _winograd.transformed(weight)
                packed.append(Convolution(True, None, self.transformed[layer], bias, stride, norm))
            else:
                skip = self._pack_conv(weight[:, :split], before, stride) if split else None
                x_weight = self._pack_conv(weight[:, split:], before, stride)
                packed.append(Convolution(False, skip, x_weight, bias, stride, norm))
            split = 0
        return packed, size

    def _pack_conv(self, weight: torch.Tensor, size: Size, stride: int) -> torch.Tensor:
        return _onednn.pack(nhwc(weight), self.pad, [size[0], weight.shape[1], *size[1:]], stride)

    def _pack_up(self, layer: Any, size: Size) -> Upsampling:
        weight, bias = layer.weight.detach(), layer.bias.detach().clone()
        if not self.transpose:
            if _upsample_products.suits(weight.shape[1], len(weight)):
                return Upsampling(True, _upsample_products.summed(weight), bias)
            weight = transposed_kernel(weight)
        images = [size[0], weight.shape[0], *size[1:]]
        return Upsampling(False, _onednn.pack_transposed(nhwc(weight), 0 if self.transpose else 1, images), bias)

    def _up(self, up: Upsampling, x: torch.Tensor, fused: bool) -> torch.Tensor:
        relu = fused and not self.transpose  # which knows no activation
        if up.summed:
            x = _upsample_products.upsample_conv(x, up.weight, up.bias, relu)
        else:
            x = _onednn.transposed_convolution(x, up.weight, up.bias, 0 if self.transpose else 1, relu)
        return x if self.transpose or relu else activation_(x, self.style.negative_slope)

    def _block(self, block: list[Convolution], x: torch.Tensor, fused: bool,
               skip: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """Two convolutions with their activations; ``fused``: oneDNN applies a ReLU."""
        for conv in block:
            relu = fused and conv.norm is None
            crop = None if skip is None else centre_crop(skip, *x.shape[2:])
            if conv.transformed:
                sources = [x] if crop is None else [crop, x]
                x = _winograd.convolution(sources, conv.weight, conv.bias, self.pad, relu)
            elif conv.skip is None or crop is None:
                x = _onednn.convolution(x, conv.weight, conv.bias, self.pad, relu, conv.stride)
            else:
                y = _onednn.convolution(nhwc(crop), conv.skip, conv.bias, self.pad, False)
                x = _onednn.add_convolution(y, x, conv.weight, self.pad, relu)
            skip = None
            if conv.norm is not None:
                x = self._normalised(x, conv.norm)
            elif not fused:
                x = activation_(x, self.style.negative_slope)
        return x

    def _normalised(self, z: torch.Tensor, norm: Any) -> torch.Tensor:
        """The norm of each image and its activation, written over ``z``."""
        groups = getattr(norm, "num_groups", z.shape[1])
        _norm.check_values(self.style.norm, z.shape, groups, None)
        mean, var = _norm.statistics(z, groups, True)
        return _norm.apply(z, norm.weight, norm.bias, mean, var, norm.eps, self.style.negative_slope, out=z)
