"""The U-Net that people copy most: batch norm, padded and concatenated upsampled maps; in plain PyTorch."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn


class DoubleConv(nn.Module):
    """The most copied block: (convolution, norm, ReLU) twice."""

    def __init__(self, in_channels, out_channels, norm=nn.BatchNorm2d):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), norm(out_channels), nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), norm(out_channels), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x):
        return self.double_conv(x)


class Up(nn.Module):
    """Bilinear or transposed ×2, padded to the skip's size, concatenated."""

    def __init__(self, in_channels, out_channels, bilinear, norm):
        super().__init__()
        if bilinear:
            self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                                    nn.Conv2d(in_channels, in_channels // 2, 1))  # fmt: skip
        else:
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, 2, stride=2)
        self.conv = DoubleConv(in_channels, out_channels, norm)

    def forward(self, x1, x2):
        x1 = self.up(x1)
        dy, dx = x2.size()[2] - x1.size()[2], x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class CommonUNet(nn.Module):
    """Any image size; ``depth`` poolings, from ``width`` channels doubling from level to level."""

    def __init__(self, bilinear=False, norm=nn.BatchNorm2d, width=4, depth=2, in_channels=1, num_classes=2):
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        pairs = [*itertools.pairwise(widths)]
        self.inc = DoubleConv(in_channels, width, norm)
        self.downs = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), DoubleConv(a, b, norm)) for a, b in pairs)
        self.ups = nn.ModuleList(Up(b, a, bilinear, norm) for a, b in reversed(pairs))
        self.outc = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, x):
        maps = [self.inc(x)]
        for down in self.downs:
            maps.append(down(maps[-1]))
        x = maps.pop()
        for up in self.ups:
            x = up(x, maps.pop())
        return self.outc(x)
