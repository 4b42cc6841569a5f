"""What the meta device lists as a network's operator calls is what the network does where its kernels run."""

from __future__ import annotations

import pytest
import torch

import fastunet
from fastunet.architecture import Architecture
from fastunet.inspection.layers import network_calls
from tests.test_layers import Recorder, shapes

NETWORKS = {
    "odd size": (Architecture(width=8, depth=1, in_channels=3, num_classes=5), (5, 6)),
    "no pooling": (Architecture(width=8, depth=0), (5, 5)),
    "valid": (Architecture.from_preset("isbi", width=8, depth=1), (20, 22)),
    "batch": (Architecture.from_preset("milesial", width=8, depth=1), (5, 6)),
    "instance, strided": (Architecture.from_preset("nnunet2d", width=8, depth=1), (4, 6)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_training(name, device):
    architecture, (height, width) = NETWORKS[name]
    model = fastunet.UNet(**architecture.as_dict(), backend="triton").to(device)
    with Recorder() as recorder:
        model(torch.zeros(1, architecture.in_channels, height, width, device=device)).sum().backward()
    calls = network_calls(architecture, 1, height, width, loss=False)
    assert recorder.calls == [(c.operator, shapes(c.arguments.values())) for c in calls]


@pytest.mark.parametrize("name", ["odd size", "batch"])
def test_inference(name, device):
    architecture, (height, width) = NETWORKS[name]
    model = fastunet.UNet(**architecture.as_dict(), backend="triton").to(device).eval()
    with Recorder() as recorder:
        model.predict(torch.zeros(1, architecture.in_channels, height, width, device=device))
    calls = network_calls(architecture, 1, height, width, training=False, output="labels")
    assert recorder.calls == [(c.operator, shapes(c.arguments.values())) for c in calls]
