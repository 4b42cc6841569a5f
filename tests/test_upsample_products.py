"""Upsampling and its convolution as four products: against float64, and where a frozen network takes it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fastunet import UNet
from fastunet.functional import _upsample_products

from .tolerance import assert_within_budget


def plain(x, weight, bias, relu):
    y = F.conv2d(F.pad(F.interpolate(x, scale_factor=2), (0, 1, 0, 1)), weight, bias)
    return y.relu() if relu else y


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (7, 6)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_equals_float64(memory_format, size, relu):
    x = torch.randn(2, 96, *size).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(40, 96, 2, 2), torch.randn(40)
    found = _upsample_products.upsample_conv(x, _upsample_products.summed(weight), bias, relu)
    operands = x, weight, bias
    assert_within_budget(found, plain(*operands, relu), plain(*(t.double() for t in operands), relu), "y")
    assert found.permute(0, 2, 3, 1).is_contiguous()


def test_where_it_is_the_faster_way():
    """And where products are what float32 gives."""
    possible = torch.backends.mkl.is_available()
    assert _upsample_products.suits(256, 128) == possible
    assert not _upsample_products.suits(255, 128)
    assert not _upsample_products.suits(256, 127)


def test_a_frozen_network_takes_it(monkeypatch):
    if not torch.backends.mkl.is_available():
        pytest.skip("PyTorch without MKL, whose products these are")
    monkeypatch.setattr(_upsample_products, "LEAST_CHANNELS_IN", 16)
    monkeypatch.setattr(_upsample_products, "LEAST_CHANNELS_OUT", 8)
    found, real = [], _upsample_products.upsample_conv
    monkeypatch.setattr(
        _upsample_products, "upsample_conv", lambda x, *rest: found.append(x.shape[1]) or real(x, *rest)
    )
    for up in ("upsample", "transpose"):
        model = UNet(width=4, depth=2, up=up).eval()
        x = torch.randn(2, 2, 20, 24)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            assert_within_budget(model.freeze()(x), model(x), exact, "logits")
    assert found == [16], "of 16 channels to 8, not of 8 to 4, and not what upsamples by itself"
