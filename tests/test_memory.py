"""Live and total bytes of a forward pass, counted without data."""

from __future__ import annotations

import torch

from fastunet import UNet, reference
from fastunet.inspection.memory import inference_bytes


def test_counts_what_is_alive_at_once():
    def chain(x):
        a = x + 1
        b = a + 1
        del a
        return b + 1

    assert inference_bytes(chain, torch.zeros(256)) == (2 * 1024, 3 * 1024)
    assert inference_bytes(lambda x: x.view(16, 16).add_(1), torch.zeros(256)) == (0, 0)


def test_a_network_frees_its_maps_as_it_goes():
    """At its widest a brats network holds the first skip, the upsampled map, a convolution's input and its output."""
    x = torch.empty(1, 2, 128, 128, device="meta")
    full = 4 * 32 * 128 * 128
    model = UNet().eval().to("meta")
    peak, total = inference_bytes(model, x)
    assert 3 * full <= peak <= 4 * full
    assert total > 2 * peak
    assert peak < inference_bytes(reference.UNet().eval().to("meta"), x)[0]
