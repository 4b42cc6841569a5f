"""The bound on a network's sums: nothing passes it, and trained networks on ordinary images keep well within it."""

from __future__ import annotations

import pytest
import torch

from fastunet import UNet, reference
from fastunet.inference import bounds

STYLES = {
    "brats": {},
    "isbi": dict(padding="valid", up="transpose"),
    "batch norm": dict(norm="batch", bias=False, odd="replicate"),
    "instance norm": dict(norm="instance", activation="leaky_relu", down="stride"),
    "group norm": dict(norm="group", groups=2, up="transpose"),
}


@pytest.mark.parametrize("kind", ["random", "all positive", "skips alone"])
@pytest.mark.parametrize("style", STYLES)
def test_no_layer_passes_its_bound(style, kind, monkeypatch):
    torch.manual_seed(0)
    model = reference.UNet(width=4, depth=2, **STYLES[style]).eval().requires_grad_(False)
    for tensor in model.state_dict().values():
        if kind != "random":  # then the bound of a convolution is nearly met
            tensor.abs_()
        elif tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.01)
    for decoder in model.decoders if kind == "skips alone" else ():
        decoder.up.weight.zero_()
    x = torch.randn(1, 2, 44, 60).sign() if kind == "random" else torch.ones(1, 2, 44, 60)
    bounded, seen = [], []
    convolution = bounds._Walk.convolution

    def record(walk, layer, *operands):
        v = convolution(walk, layer, *operands)
        bounded.append((layer, v.sum().item()))  # images are at most 1
        return v

    monkeypatch.setattr(bounds._Walk, "convolution", record)
    assert bounds.largest_images(model, 44 * 60) > 1
    for layer, _ in bounded:
        layer.register_forward_hook(lambda layer, _, y: seen.append((layer, y.double().norm(dim=1).max().item())))
    model(x)
    assert [layer for layer, _ in seen] == [layer for layer, _ in bounded]
    for (_, norm), (_, bound) in zip(seen, bounded):
        assert norm <= bound * (1 + 1e-6)


@pytest.mark.parametrize("preset", ["brats", "isbi"])
def test_ordinary_images_are_far_below(preset):
    model = UNet.from_preset(preset, width=16).eval()
    assert bounds.largest_images(model, 572**2) > 1e8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("name", ["encoders.0.conv1.weight", "decoders.1.conv2.bias", "bottleneck.norm1.running_mean"])
def test_of_what_is_not_finite_nothing_is_below(name, value):
    model = UNet(width=4, depth=2, norm="batch").eval()
    model.state_dict()[name][:1] = value
    assert not bounds.below(torch.zeros(1), bounds.largest_images(model, 100))


def test_images_that_are_not_finite_are_not_below():
    for value in (float("nan"), float("inf"), -float("inf"), 5.0, -5.0):
        assert not bounds.below(torch.tensor([0.0, value, 1.0]), 5.0)
    assert bounds.below(torch.tensor([-4.9, 4.9]), 5.0)
