"""Presets against the networks whose names they bear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.workloads.common_unet import CommonUNet
from fastunet import UNet, fuse, reference
from fastunet.architecture import PRESETS, Architecture
from tests.fuse_results import randomised


def monai():
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    return nets.BasicUNet(spatial_dims=2, in_channels=1, out_channels=2)


def nnunet():
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet", reason="nnU-Net's nets are missing")
    return unet.PlainConvUNet(1, 6, (32, 64, 128, 256, 512, 512), nn.Conv2d, 3, (1, 2, 2, 2, 2, 2), 2, 2, 2, True,
                              nn.InstanceNorm2d, dict(eps=1e-5, affine=True), None, None, nn.LeakyReLU,
                              dict(inplace=True))  # fmt: skip


def common():
    return CommonUNet(width=16, depth=4, in_channels=3)


ORIGINALS = {"milesial": (common, (1, 3, 37, 50), dict(width=16)), "monai_basic": (monai, (1, 1, 37, 50), {}),
             "nnunet2d": (nnunet, (1, 1, 32, 64), {})}  # fmt: skip


def in_order(net, x):
    """The layers with parameters as a forward pass calls them."""
    found = []
    handles = [m.register_forward_hook(lambda m, i, y: found.append(m)) for m in net.modules()
               if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d | nn.InstanceNorm2d)]  # fmt: skip
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("preset", ORIGINALS)
def test_a_preset_is_its_original_layer_for_layer(preset):
    build, shape, options = ORIGINALS[preset]
    original = randomised(build().eval())
    plain = reference.UNet.from_preset(preset, **options).eval()
    if hasattr(getattr(original, "decoder", None), "deep_supervision"):
        original.decoder.deep_supervision = False
    x = torch.randn(shape)
    theirs, ours = in_order(original, x), in_order(plain, x)
    assert [type(a) for a in ours] == [type(b) for b in theirs]
    swapped = {id(decoder.conv1) for decoder in plain.decoders} if preset == "nnunet2d" else ()
    for mine, other in zip(ours, theirs, strict=True):
        state = other.state_dict()
        if id(mine) in swapped:  # it concatenates [upsampled, skip]
            state["weight"] = torch.cat(state["weight"].chunk(2, 1)[::-1], 1)
        mine.load_state_dict(state)
    model = UNet.from_preset(preset, **options).eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        want = original(x)
        scale = want.abs().max().item()
        torch.testing.assert_close(plain(x), want, rtol=0, atol=2e-5 * scale)
        torch.testing.assert_close(model(x), want, rtol=0, atol=2e-5 * scale)
        torch.testing.assert_close(fuse(original)[0](x), want, rtol=0, atol=2e-5 * scale)


def test_presets_take_overrides():
    assert Architecture.from_preset("milesial").widths == (64, 128, 256, 512, 1024)
    assert Architecture.from_preset("monai_basic").widths == (32, 32, 64, 128, 256)
    assert Architecture.from_preset("monai_basic", width=8, depth=2).widths == (8, 16, 32)
    assert Architecture.from_preset("nnunet2d", depth=1, features=(32, 48)).widths == (32, 48)
    assert set(PRESETS) == {"brats", "isbi", "milesial", "monai_basic", "nnunet2d"}
