"""Networks as people write them, for the tests of ``fastunet.fuse``: small, with every way to join layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from bench.workloads.common_unet import CommonUNet


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


class Code(nn.Module):
    """Layers conv, conv2 (4 → 4), norm, relu, and a forward pass of one's own."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu, self.head = nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.code = forward

    def forward(self, x):
        return self.code(self, x)


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


def smp_unet() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=2)


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
    "smp Unet, resnet18": (smp_unet, (2, 1, 32, 64)),
}
"""Name → (constructor, shape of images)."""
