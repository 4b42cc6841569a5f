"""The plain ``torch.nn`` build of every network: the specification that ``fastunet.UNet`` is checked against."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastunet import autograd
from fastunet.architecture import Architecture
from fastunet.arguments import checked

__all__ = ["UNet"]

_TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a unit normal truncated at ±2, by which he_normal divides to keep its stated variance."""


_CLASSIC = Architecture()


class ConvBlock(nn.Module):
    """Two 3×3 convolutions, each with its norm, if any, and activation: (N, C_in, H, W) → (N, C_out, H', W').

    ``style`` says which norm and activation; ``stride`` is that of the first convolution.
    """

    conv1: nn.Conv2d
    conv2: nn.Conv2d

    def __init__(self, in_channels: int, out_channels: int, padding: str, style: Architecture = _CLASSIC,
                 stride: int = 1):  # fmt: skip
        super().__init__()
        self.style = style
        _add_convolutions(self, in_channels, out_channels, padding, style, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _convolutions(self, x)


class DecoderBlock(nn.Module):
    """Doubles the resolution, halves the width, and merges the encoder's skip: conv(conv(concat[skip, up(x)])).

    A convolution in the place of ``up`` says by its class which of both ways it is; any other module takes the place of
    the layer that the constructor made.
    """

    conv1: nn.Conv2d
    conv2: nn.Conv2d

    def __init__(self, in_channels: int, out_channels: int, padding: str, up: str, style: Architecture = _CLASSIC):
        super().__init__()
        self.up_kind, self.style = up, style
        self.up: nn.Module
        if up == "upsample":
            self.up = nn.Conv2d(in_channels, out_channels, 2)
        else:
            self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        _add_convolutions(self, 2 * out_channels, out_channels, padding, style)

    def upsampled(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C_in, H, W) → (N, C_out, 2H, 2W)."""
        transpose = self.up_kind == "transpose" and not isinstance(self.up, nn.Conv2d)
        up: Callable[[torch.Tensor], torch.Tensor] = self.up
        if transpose or isinstance(self.up, nn.ConvTranspose2d):
            return up(x)
        # Keras pads an even kernel at the bottom and right only.
        x = up(F.pad(F.interpolate(x, scale_factor=2, mode="nearest"), (0, 1, 0, 1)))
        return activation(x, self.style.negative_slope)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = padded_to(self.upsampled(x), skip, self.style.odd)
        x = torch.cat([centre_crop(skip, *x.shape[2:]), x], dim=1)
        return _convolutions(self, x)


def _add_convolutions(block: nn.Module, in_channels: int, out_channels: int, padding: str, style: Architecture,
                      stride: int = 1) -> None:
    """conv1, [norm1,] conv2 and [norm2], in the order of use."""
    for index, channels, step in ((1, in_channels, stride), (2, out_channels, 1)):
        pad = padding if step == 1 else 1
        setattr(block, f"conv{index}", nn.Conv2d(channels, out_channels, 3, step, pad, bias=style.bias))
        if style.norm is not None:
            setattr(block, f"norm{index}", _norm(style, out_channels))


def _norm(style: Architecture, channels: int) -> nn.Module:
    if style.norm == "group":
        return nn.GroupNorm(style.groups, channels)
    return nn.BatchNorm2d(channels) if style.norm == "batch" else nn.InstanceNorm2d(channels, affine=True)


def _convolutions(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for index in (1, 2):
        x = convolution(block, index, x)
    return x


def convolution(block: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    """The convolution of that number of a block, with its norm, if any, and activation."""
    x = getattr(block, f"conv{index}")(x)
    norm = block._modules.get(f"norm{index}")
    style: Any = block.style
    return activation(x if norm is None else norm(x), style.negative_slope)


def activation(x: torch.Tensor, negative_slope: float) -> torch.Tensor:
    """ReLU, or LeakyReLU where the slope is not 0."""
    return F.leaky_relu(x, negative_slope) if negative_slope else F.relu(x)


def padded_to(x: torch.Tensor, skip: torch.Tensor, odd: str) -> torch.Tensor:
    """An upsampled map made as large as the skip, as :class:`Architecture` says for ``odd``; "image" needs none."""
    if odd == "image":
        return x
    height, width = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
    if odd == "replicate":
        return F.pad(x, (0, width, 0, height), "replicate")
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


@checked
class UNet(nn.Module):
    """A U-Net of plain PyTorch layers; the arguments are those of :class:`fastunet.architecture.Architecture`.

    ``style`` are those from ``norm`` on: ``slope``, ``groups``, ``bias``, ``down``, ``features``, ``odd`` and the like.
    ``backend`` is accepted so that both builds share a constructor, and has no effect here. Weights start he_normal
    (truncated normal with standard deviation √(2/fan_in), He et al. 2015, as Keras draws it), biases zero.
    """

    conv_block: type[nn.Module] = ConvBlock
    decoder_block: type[nn.Module] = DecoderBlock

    def __init__(
        self,
        in_channels: int = 2,
        num_classes: int = 4,
        width: int = 32,
        depth: int = 4,
        padding: str = "same",
        up: str = "upsample",
        dropout: float = 0.2,
        backend: str = "auto",
        **style: Any,
    ):
        super().__init__()
        self.architecture = a = Architecture(in_channels, num_classes, width, depth, padding, up, dropout, **style)
        widths, strides = a.widths, (1, *[2 if a.down == "stride" else 1] * depth)
        inputs = (in_channels, *widths)
        blocks = [self.conv_block(inputs[i], widths[i], padding, a, strides[i]) for i in range(depth + 1)]
        self.encoders, self.bottleneck = nn.ModuleList(blocks[:depth]), blocks[depth]
        self.dropout = nn.Dropout(dropout)
        self.decoders = nn.ModuleList(
            self.decoder_block(widths[i + 1], widths[i], padding, up, a) for i in reversed(range(depth))
        )
        self.head = nn.Conv2d(width, num_classes, 1)
        self.backend = backend
        self.reset_parameters()

    @classmethod
    @checked
    def from_preset(cls, name: str, *, backend: str = "auto", **overrides: Any) -> UNet:
        """A network of :data:`fastunet.architecture.PRESETS`, arguments overridable."""
        return cls(**Architecture.from_preset(name, **overrides).as_dict(), backend=backend)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this architecture, ready for JSON."""
        return self.architecture.as_dict()

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the logits; raises ValueError for a size that does not fit."""
        return self.architecture.output_size(height, width)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws he_normal weights (of the activation's slope), zero biases, and norms that change nothing yet."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                gain = 2 / (1 + self.architecture.negative_slope**2)
                std = math.sqrt(gain / _fan_in(module)) / _TRUNCATED_STD
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm):
                module.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes, H', W') of images (N, in_channels, H, W); raises ValueError for a wrong shape."""
        height, width = self._check(x)
        first: Any = self.encoders[0] if len(self.encoders) else self.bottleneck
        layer: Any = first.conv1 if type(first) is self.conv_block else None
        plain = type(layer) is nn.Conv2d and "weight" in layer._parameters
        # hooks and other forward passes may move weights or images
        if plain and not any(m._forward_pre_hooks or "forward" in vars(m) for m in (first, layer)):
            check_images(x, layer.weight)
        return top_left(self.logits_of_padded(self._pad(x)), height, width)

    def logits_of_padded(self, x: torch.Tensor) -> torch.Tensor:
        """Layer by layer: the logits of images that :meth:`forward` has checked and padded.

        Raises:
            RuntimeError: other images, in the words of the layer that cannot take them; NotImplementedError is one.
        """
        skips = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
            x = F.max_pool2d(x, 2) if self.architecture.down == "pool" else x
        x = self.dropout(self.bottleneck(x))
        for decoder in self.decoders:
            x = decoder(x, skips.pop())
        logits: torch.Tensor = self.head(x)
        return logits

    def predict_proba(self, x: torch.Tensor) -> torch.Tensor:
        """Class probabilities (N, num_classes, H', W'): the softmax of the logits over the classes."""
        probabilities: torch.Tensor = self(x).softmax(dim=1)
        return probabilities

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Labels (N, H', W') uint8: the class with the largest logit, the first one where several are equal."""
        logits: torch.Tensor = self(x)
        if logits.shape[1] > 256:
            raise ValueError(f"{logits.shape[1]} classes do not fit uint8 labels")
        return logits.argmax(dim=1).to(torch.uint8)

    @checked
    def _check(self, x: torch.Tensor) -> tuple[int, int]:
        """The output size for ``x``, after checking its shape."""
        channels = self.architecture.in_channels
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"expected images of shape (N, {channels}, H, W), got {tuple(x.shape)}")
        return self.output_size(*x.shape[2:])

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        """Under "same", zeros at the bottom and right up to a multiple of 2**depth."""
        if self.architecture.padding == "valid":
            return x
        height, width = self.architecture.padded_size(*x.shape[2:])
        if _known(*x.shape[2:]) and (height, width) == tuple(x.shape[2:]):
            return x
        return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


def check_images(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises ``ValueError`` unless ``x`` has the dtype, which autocast may give it, and the device of ``weight``, and
    neither is of inference mode where a derivative may be asked for."""
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.is_floating_point()
    if x.dtype != weight.dtype and (not casts or torch.float64 in (x.dtype, weight.dtype)):
        raise ValueError(f"the images are {x.dtype}, but the first layer's parameters {weight.dtype}")
    if x.device != weight.device:
        raise ValueError(f"the images are on {x.device}, but the first layer's parameters on {weight.device}")
    if not torch.compiler.is_compiling() and autograd.tracked(x, weight):
        autograd.refuse_inference("the images or the first layer", [x, weight])


def top_left(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The first ``height`` × ``width`` pixels of (…, H, W)."""
    if _known(height, width):
        return x[..., :height, :width]
    # the strides of a view would tie an exported program to sizes that need no padding, or to those that do
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))


def _known(*sides: int) -> bool:
    """Whether sides are numbers, not the symbols of ``torch.export``."""
    return all(isinstance(side, int) for side in sides)


@checked
def centre_crop(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The central ``height`` × ``width`` pixels of (…, H, W); an odd remainder leaves the extra row at the end."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def _fan_in(module: nn.Conv2d | nn.ConvTranspose2d) -> int:
    """Inputs summed into one output; a stride-2 2×2 transposed convolution sums one tap of each channel."""
    if isinstance(module, nn.ConvTranspose2d):
        return module.in_channels
    return module.in_channels * module.kernel_size[0] * module.kernel_size[1]
