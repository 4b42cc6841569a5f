"""The plain ``torch.nn`` build of both networks: the specification that ``fastunet.UNet`` is checked against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastunet.architecture import Architecture
from fastunet.arguments import checked

__all__ = ["UNet"]

_TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a unit normal truncated at ±2, by which he_normal divides to keep its stated variance."""


class ConvBlock(nn.Module):
    """Two 3×3 convolutions, each followed by ReLU: (N, C_in, H, W) → (N, C_out, H', W')."""

    def __init__(self, in_channels: int, out_channels: int, padding: str):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=padding)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))))


class DecoderBlock(nn.Module):
    """Doubles the resolution, halves the width, and merges the encoder's skip: conv(conv(concat[skip, up(x)])).

    A convolution in the place of ``up`` says by its class which of both ways it is; any other module takes the place of
    the layer that the constructor made.
    """

    def __init__(self, in_channels: int, out_channels: int, padding: str, up: str):
        super().__init__()
        self.up_kind = up
        if up == "upsample":
            self.up = nn.Conv2d(in_channels, out_channels, 2)
        else:
            self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.conv1 = nn.Conv2d(2 * out_channels, out_channels, 3, padding=padding)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=padding)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        transpose = self.up_kind == "transpose" and not isinstance(self.up, nn.Conv2d)
        if transpose or isinstance(self.up, nn.ConvTranspose2d):
            x = self.up(x)
        else:
            # Keras pads an even kernel at the bottom and right only.
            x = F.relu(self.up(F.pad(F.interpolate(x, scale_factor=2, mode="nearest"), (0, 1, 0, 1))))
        x = torch.cat([centre_crop(skip, *x.shape[2:]), x], dim=1)
        return F.relu(self.conv2(F.relu(self.conv1(x))))


@checked
class UNet(nn.Module):
    """A U-Net of plain PyTorch layers; the arguments are those of :class:`fastunet.architecture.Architecture`.

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
    ):
        super().__init__()
        self.architecture = Architecture(in_channels, num_classes, width, depth, padding, up, dropout)
        widths = self.architecture.widths
        inputs = (in_channels, *widths)
        self.encoders = nn.ModuleList(self.conv_block(inputs[i], widths[i], padding) for i in range(depth))
        self.bottleneck = self.conv_block(inputs[depth], widths[depth], padding)
        self.dropout = nn.Dropout(dropout)
        self.decoders = nn.ModuleList(
            self.decoder_block(widths[i + 1], widths[i], padding, up) for i in reversed(range(depth))
        )
        self.head = nn.Conv2d(width, num_classes, 1)
        self.backend = backend
        self.reset_parameters()

    @classmethod
    @checked
    def from_preset(cls, name: str, *, backend: str = "auto", **overrides) -> UNet:
        """The preset "brats" (Keras BraTS network) or "isbi" (Ronneberger et al. 2015), arguments overridable."""
        return cls(**Architecture.from_preset(name, **overrides).as_dict(), backend=backend)

    @property
    def config(self) -> dict:
        """Constructor arguments that rebuild this architecture, ready for JSON."""
        return self.architecture.as_dict()

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the logits; raises ValueError for a size that does not fit."""
        return self.architecture.output_size(height, width)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws he_normal weights and zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                std = math.sqrt(2 / _fan_in(module)) / _TRUNCATED_STD
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes, H', W') of images (N, in_channels, H, W); raises ValueError for a wrong shape."""
        height, width = self._check(x)
        x = self._pad(x)
        skips = []
        for encoder in self.encoders:
            skips.append(encoder(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.dropout(self.bottleneck(x))
        for decoder in self.decoders:
            x = decoder(x, skips.pop())
        return self.head(x)[..., :height, :width]

    def predict_proba(self, x: torch.Tensor) -> torch.Tensor:
        """Class probabilities (N, num_classes, H', W'): the softmax of the logits over the classes."""
        return self(x).softmax(dim=1)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Labels (N, H', W') uint8: the class with the largest logit, the first one where several are equal."""
        logits = self(x)
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
        if (height, width) == tuple(x.shape[2:]):
            return x
        return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


@checked
def centre_crop(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The central ``height`` × ``width`` pixels of (N, C, H, W); an odd remainder leaves the extra row at the end."""
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


def _fan_in(module: nn.Conv2d | nn.ConvTranspose2d) -> int:
    """Inputs summed into one output; a stride-2 2×2 transposed convolution sums one tap of each channel."""
    if isinstance(module, nn.ConvTranspose2d):
        return module.in_channels
    return module.in_channels * module.kernel_size[0] * module.kernel_size[1]
