"""Networks as people write them, for the tests of ``fastunet.fuse``: small, with every way to join layers."""

from __future__ import annotations

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
    """A U-Net of the most used layout, with batch norm; any image size."""

    def __init__(self, bilinear=False, norm=nn.BatchNorm2d, width=4):
        super().__init__()
        self.inc = DoubleConv(1, width, norm)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width, 2 * width, norm))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(2 * width, 4 * width, norm))
        self.up1 = Up(4 * width, 2 * width, bilinear, norm)
        self.up2 = Up(2 * width, width, bilinear, norm)
        self.outc = nn.Conv2d(width, 2, kernel_size=1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        return self.outc(self.up2(self.up1(x3, x2), x1))


class Plain(nn.Module):
    """Two levels of convolutions and functional ReLUs, the way back by nearest upsampling and a 2×2 convolution."""

    def __init__(self, width=4):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, width, 3, padding="same"), nn.Conv2d(width, width, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(width, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.Conv2d(6, width, 2)
        self.up2 = nn.Conv2d(6, width, 2, padding="same")
        self.conv5 = nn.Conv2d(3 * width, width, 3, padding=1)
        self.relu = nn.ReLU()
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x):
        skip = torch.relu(self.conv2(F.relu(self.conv1(x), inplace=True)))
        x = self.conv4(self.relu(self.conv3(F.max_pool2d(skip, 2)))).relu_()
        up = F.relu(self.up(F.pad(F.interpolate(x, scale_factor=2, mode="nearest"), (0, 1, 0, 1))))
        up2 = self.relu(self.up2(F.interpolate(x, scale_factor=2)))
        return self.head(torch.relu_(self.conv5(torch.cat((skip, torch.cat((up, up2), -3)), 1))))


def basic(norm):
    from monai.networks.nets import BasicUNet

    return BasicUNet(2, 1, 2, features=(4, 4, 4, 8, 8, 4), norm=norm, act="relu" if norm is None else
                     ("LeakyReLU", {"negative_slope": 0.1, "inplace": True}))  # fmt: skip


def monai_unet(units):
    from monai.networks.nets import UNet

    return UNet(2, 1, 2, channels=(4, 8, 8), strides=(2, 2), num_res_units=units, norm="batch", act="relu")


def nnunet(deep_supervision=False, dropout=None):
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    return PlainConvUNet(1, 3, (4, 8, 8), nn.Conv2d, 3, (1, 2, 2), 2, 2, 2, True, nn.InstanceNorm2d,
                         dict(eps=1e-5, affine=True), dropout and nn.Dropout2d, {"p": dropout}, nn.LeakyReLU,
                         dict(inplace=True), deep_supervision=deep_supervision)  # fmt: skip


NETS = {
    "plain": (Plain, (2, 1, 12, 10)),
    "batch norm, transposed": (CommonUNet, (2, 1, 13, 18)),
    "batch norm, bilinear": (lambda: CommonUNet(bilinear=True), (2, 1, 13, 18)),
    "MONAI BasicUNet": (lambda: basic(None), (2, 1, 16, 32)),
    "MONAI BasicUNet, batch": (lambda: basic("batch"), (2, 1, 16, 18)),
    "MONAI BasicUNet, instance": (lambda: basic(("instance", {"affine": True})), (2, 1, 32, 18)),
    "MONAI BasicUNet, group": (lambda: basic(("group", {"num_groups": 2})), (2, 1, 16, 18)),
    "MONAI UNet": (lambda: monai_unet(2), (2, 1, 16, 16)),
    "nnU-Net PlainConvUNet": (nnunet, (2, 1, 16, 24)),
    "nnU-Net PlainConvUNet, deep supervision": (lambda: nnunet(True), (2, 1, 16, 24)),
}
"""Name → (constructor, shape of images)."""
