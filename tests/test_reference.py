"""The reference networks: parameter counts, the published sizes, initialisation, and a real Keras build."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch

from fastunet import UNet, reference
from fastunet.reference import centre_crop

ISBI_WALK = {
    "encoders.0.conv1": (64, 570), "encoders.0.conv2": (64, 568),
    "encoders.1.conv1": (128, 282), "encoders.1.conv2": (128, 280),
    "encoders.2.conv1": (256, 138), "encoders.2.conv2": (256, 136),
    "encoders.3.conv1": (512, 66), "encoders.3.conv2": (512, 64),
    "bottleneck.conv1": (1024, 30), "bottleneck.conv2": (1024, 28),
    "decoders.0.up": (512, 56), "decoders.0.conv1": (512, 54), "decoders.0.conv2": (512, 52),
    "decoders.1.up": (256, 104), "decoders.1.conv1": (256, 102), "decoders.1.conv2": (256, 100),
    "decoders.2.up": (128, 200), "decoders.2.conv1": (128, 198), "decoders.2.conv2": (128, 196),
    "decoders.3.up": (64, 392), "decoders.3.conv1": (64, 390), "decoders.3.conv2": (64, 388),
    "head": (2, 388),
}  # fmt: skip
"""Channels and side after each layer of Ronneberger et al. 2015, figure 1."""


@pytest.mark.parametrize("build", [reference.UNet, UNet])
@pytest.mark.parametrize(("preset", "count"), [("brats", 7_759_908), ("isbi", 31_030_658)])
def test_parameter_count(build, preset, count):
    with torch.device("meta"):
        model = build.from_preset(preset)
    assert sum(p.numel() for p in model.parameters()) == count


def test_every_size_of_the_published_walk():
    with torch.device("meta"):
        model = reference.UNet.from_preset("isbi")
    seen = {}
    for name, layer in model.named_modules():
        if name in ISBI_WALK:
            layer.register_forward_hook(lambda _, __, y, name=name: seen.update({name: tuple(y.shape)}))
    model(torch.empty(1, 1, 572, 572, device="meta"))
    assert seen == {name: (1, channels, side, side) for name, (channels, side) in ISBI_WALK.items()}


def test_state_dict_order_is_the_order_of_use():
    model = reference.UNet(width=2, depth=2, dropout=0.0)
    order = []
    for name, layer in model.named_modules():
        if hasattr(layer, "weight"):
            layer.register_forward_hook(lambda *_, name=name: order.append(name))
    model(torch.zeros(1, 2, 8, 8))
    keys = list(model.state_dict())
    assert keys == [f"{name}.{leaf}" for name in order for leaf in ("weight", "bias")]
    assert keys == list(UNet(width=2, depth=2).state_dict())


def test_he_normal_statistics():
    torch.manual_seed(0)
    for preset in ("brats", "isbi"):
        for name, layer in reference.UNet.from_preset(preset, width=16).named_modules():
            if not isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                continue
            assert layer.bias.abs().max() == 0
            transposed = isinstance(layer, torch.nn.ConvTranspose2d)
            fan_in = layer.in_channels * (1 if transposed else layer.kernel_size[0] ** 2)
            std = math.sqrt(2 / fan_in)
            count = layer.weight.numel()
            # Five standard errors of each statistic of a truncated normal, whose kurtosis is below the normal's 3.
            assert abs(layer.weight.mean().item()) < 5 * std / math.sqrt(count), name
            assert abs(layer.weight.std().item() / std - 1) < 5 / math.sqrt(2 * count), name
            assert layer.weight.abs().max().item() <= 2 * std / 0.87962566 * (1 + 1e-6), name


def test_centre_crop_takes_the_middle():
    x = torch.arange(64.0).view(1, 1, 8, 8)
    assert torch.equal(centre_crop(x, 4, 3), x[:, :, 2:6, 2:5])


def keras_build(size):
    """The BraTS network as its Keras source writes it, on Keras' torch backend."""
    os.environ["KERAS_BACKEND"] = "torch"
    keras = pytest.importorskip("keras", reason="Keras is not installed (pip install 'fastunet[rivals]')")
    layers = keras.layers
    inputs = keras.Input((*size, 2))

    def conv(x, filters, side=3):
        return layers.Conv2D(filters, side, activation="relu", padding="same", kernel_initializer="he_normal")(x)

    x, skips = inputs, []
    for filters in (32, 64, 128, 256):
        x = conv(conv(x, filters), filters)
        skips.append(x)
        x = layers.MaxPooling2D(pool_size=(2, 2))(x)
    x = layers.Dropout(0.2)(conv(conv(x, 512), 512))
    for filters in (256, 128, 64, 32):
        x = conv(layers.UpSampling2D(size=(2, 2))(x), filters, side=2)
        x = layers.concatenate([skips.pop(), x], axis=3)
        x = conv(conv(x, filters), filters)
    return keras.Model(inputs, layers.Conv2D(4, 1, activation="softmax")(x))


def test_agrees_with_a_real_keras_build():
    size = 64, 48
    source = keras_build(size)
    convolutions = [layer for layer in source.layers if layer.__class__.__name__ == "Conv2D"]
    rng = np.random.default_rng(0)
    state = {}
    theirs = UNet().eval()
    for key, layer in zip(list(theirs.state_dict())[::2], convolutions, strict=True):
        kernel, bias = layer.get_weights()
        bias = rng.normal(size=bias.shape).astype(np.float32) / 10
        layer.set_weights([kernel, bias])
        state[key] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        state[key.replace("weight", "bias")] = torch.from_numpy(bias)
    x = rng.normal(size=(2, *size, 2)).astype(np.float32)
    want = source.predict(x, verbose=0)
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    for build in (reference.UNet, UNet):
        model = build().eval()
        model.load_state_dict(state)
        got = model.predict_proba(images).permute(0, 2, 3, 1).detach().numpy()
        assert np.abs(got - want).max() <= 1e-5

    shapes = []
    plain = reference.UNet().eval()
    for layer in plain.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _, __, y: shapes.append((*y.shape[2:], y.shape[1])))
    plain(images)
    assert shapes == [tuple(layer.output.shape[1:]) for layer in convolutions]
