"""Reordered weights are exactly those that PyTorch's flips, permutations and pads give."""

from __future__ import annotations

import pytest
import torch

import fastunet
from fastunet.kernels import _launch, _weights, upsample_conv

SHAPES = [(1, 1), (3, 31), (33, 32), (64, 17)]
LAYOUTS = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "strided": lambda w: w.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.fixture(params=[torch.float32, torch.float16], ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv_taps(shape, layout, flipped, dtype):
    weight = torch.randn(*shape, 3, 3).to(dtype)
    with _launch.poisoned():
        actual = _weights.conv_taps(LAYOUTS[layout](weight).permute(0, 2, 3, 1), flipped)
    expected = (weight.flip((2, 3)) if flipped else weight).permute(0, 2, 3, 1)
    assert torch.equal(actual, expected.reshape(shape[0], 9, shape[1]))
    assert actual.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stride2_taps(shape, layout, dtype):
    weight = torch.randn(*shape, 2, 2).to(dtype)
    for out_first, order in ((True, (2, 3, 1, 0)), (False, (2, 3, 0, 1))):
        with _launch.poisoned():
            actual = _weights.stride2_taps(LAYOUTS[layout](weight), out_first)
        assert torch.equal(actual, weight.permute(order))
        assert actual.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_of_a_larger_weight(layout):
    """Offsets into a storage count."""
    weight = LAYOUTS[layout](torch.randn(6, 10, 3, 3))[2:, 4:]
    exchanged = weight.permute(1, 2, 3, 0)
    assert torch.equal(_weights.conv_taps(exchanged, True), exchanged.flip((1, 2)).flatten(1, 2))


def test_a_frozen_network_reorders_its_weights_once(device, monkeypatch):
    torch.manual_seed(0)
    model = fastunet.UNet(width=8, depth=1, backend="triton").to(device).half().eval()
    frozen, x = model.freeze(), torch.randn(1, 2, 16, 16, device=device).half()
    launched = []
    start = _launch.launch
    monkeypatch.setattr(_launch, "launch", lambda kernel, *a, **k: (launched.append(kernel), start(kernel, *a, **k)))
    reorders = (_weights.permuted_taps_kernel, upsample_conv.sub_pixel_weights_kernel)
    with torch.no_grad():
        expected, *results = model(x), frozen._run_kept(x, "logits"), frozen._run_kept(x, "logits")
        assert any(kernel in reorders for kernel in launched)
        launched.clear()
        results.append(frozen._run_kept(x, "logits"))
    assert not any(kernel in reorders for kernel in launched)
    assert launched
    assert all(torch.equal(result, expected) for result in results)
    frozen.refresh()
    assert not frozen._kept
