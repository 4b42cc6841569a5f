"""Winograd's algorithm: its error against float64 over sizes, edges, parts and sources, and where it runs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fastunet import UNet
from fastunet.functional import _upsample_products, _weight_products, _winograd, conv_relu
from fastunet.reference import centre_crop

from .tolerance import assert_within_budget

EPSILON = torch.finfo(torch.float32).eps


def nhwc_image(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def weight_gradient(dz, x, pad):
    """PyTorch's, by one thread: several share out the sums, and how they round depends on how many they are."""
    geometry = [1, 1], [pad, pad], [1, 1], False, [0, 0], 1
    weight, threads = x.new_empty(dz.shape[1], x.shape[1], 3, 3), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.ops.aten.convolution_backward(dz, x, weight, None, *geometry, [False, True, False])[1]
    finally:
        torch.set_num_threads(threads)


def set_part(monkeypatch, tiles, size, pad):
    """Leaves so many rows of tiles to a part, of five channels."""
    across = -(-(size[1] + 2 * pad - 2) // _winograd.WIDE)
    monkeypatch.setattr(_winograd, "PART", tiles * 24 * across * 5 // torch.get_num_threads() + 1)


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("size", [(3, 3), (4, 9), (8, 6), (13, 10), (18, 3)])
@pytest.mark.parametrize("tiles", [1, 3, 1000])
def test_equals_float64(monkeypatch, tiles, size, pad):
    """Whatever is left of the last tiles, and however many of them are transformed together."""
    set_part(monkeypatch, tiles, size, pad)
    skip, x = torch.randn(3, 2, size[0] + 2, size[1] + 3), nhwc_image(3, 3, *size)
    sources, weight, bias = [centre_crop(skip, *size), x], torch.randn(4, 5, 3, 3), torch.randn(4)
    exact = F.conv2d(torch.cat(sources, 1).double(), weight.double(), bias.double(), padding=pad)
    # PyTorch's error is no measure for sums of 45 products
    tolerance = dict(rtol=0, atol=16 * EPSILON * exact.abs().max().item())
    transformed = _winograd.transformed(weight)
    found = _winograd.convolution(sources, transformed, bias, pad, False)
    torch.testing.assert_close(found.double(), exact, **tolerance)
    assert found.permute(0, 2, 3, 1).is_contiguous()
    found = _winograd.convolution(sources, transformed, bias, pad, True)
    torch.testing.assert_close(found.double(), exact.relu(), **tolerance)


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("size", [(3, 3), (4, 9), (8, 6), (13, 10), (18, 3)])
@pytest.mark.parametrize("tiles", [1, 3, 1000])
def test_weight_gradient_equals_float64(monkeypatch, tiles, size, pad):
    set_part(monkeypatch, tiles, size, pad)
    sources = [centre_crop(torch.randn(3, 2, size[0] + 2, size[1] + 3), *size), nhwc_image(3, 3, *size)]
    dz = nhwc_image(3, 4, size[0] + 2 * pad - 2, size[1] + 2 * pad - 2)
    found = _winograd.weight_gradient(dz.permute(0, 2, 3, 1), sources, pad)
    exact = weight_gradient(dz.double(), torch.cat(sources, 1).double(), pad)
    tolerance = 32 * EPSILON * exact.abs().max().item()
    torch.testing.assert_close(found.permute(0, 3, 1, 2).double(), exact, rtol=0, atol=tolerance)
    assert found.is_contiguous()
    assert not _winograd.weight_gradient(dz[:0].permute(0, 2, 3, 1), [x[:0] for x in sources], pad).any()


@pytest.mark.parametrize("kind", ["normal", "after ReLUs", "far from zero"])
@pytest.mark.parametrize(("c_in", "c_out", "side"), [(64, 64, 23), (64, 128, 40)])
def test_weight_gradient_rounds_little_more_than_pytorch(kind, c_in, c_out, side):
    x, dz = nhwc_image(1, c_in, side, side), nhwc_image(1, c_out, side, side)
    x = {"normal": x, "after ReLUs": x.relu(), "far from zero": x + 10}[kind]
    dz = dz * (torch.rand_like(dz) < 0.5) if kind == "after ReLUs" else dz
    found = _winograd.weight_gradient(dz.permute(0, 2, 3, 1), [x], 1).permute(0, 3, 1, 2)
    assert_within_budget(found, weight_gradient(dz, x, 1), weight_gradient(dz.double(), x.double(), 1), "dw")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_same_weight_gradients(value):
    x, dz = nhwc_image(1, 5, 12, 12), nhwc_image(1, 4, 12, 12)
    x[0, 1, 5, 6] = dz[0, 2, 7, 7] = value
    found = _winograd.weight_gradient(dz.permute(0, 2, 3, 1), [x], 1).permute(0, 3, 1, 2)
    assert torch.equal(found.isfinite(), weight_gradient(dz, x, 1).isfinite())


@pytest.mark.parametrize("kind", ["normal", "after a ReLU", "smooth", "far from zero"])
@pytest.mark.parametrize(("c_in", "c_out", "side"), [(128, 256, 16), (512, 256, 18)])
def test_rounds_no_more_than_pytorch(kind, c_in, c_out, side):
    x, bias = nhwc_image(1, c_in, side, side), torch.randn(c_out)
    x = {"normal": x, "after a ReLU": x.relu(), "smooth": F.avg_pool2d(x, 5, 1, 2), "far from zero": x + 10}[kind]
    weight = torch.randn(c_out, c_in, 3, 3) / (9 * c_in) ** 0.5
    found = _winograd.convolution([x], _winograd.transformed(weight), bias, 1, False)
    same_dtype = F.conv2d(x, weight, bias, padding=1)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert_within_budget(found, same_dtype, exact, "y")


def test_gives_the_same_again():
    x, weight, bias = nhwc_image(2, 32, 20, 20), _winograd.transformed(torch.randn(48, 32, 3, 3)), torch.randn(48)
    first = _winograd.convolution([x], weight, bias, 1, True)
    assert all(torch.equal(_winograd.convolution([x], weight, bias, 1, True), first) for _ in range(5))


def assert_same(model, frozen, x):
    with torch.no_grad():
        assert_within_budget(frozen(x), model(x), copy.deepcopy(model).double()(x.double()), "logits")


def test_where_it_is_the_faster_way():
    if not torch.backends.mkl.is_available():
        assert not _winograd.suits(512, 512, 10_000)
        return
    assert _winograd.suits(128, 256, 256)
    assert not _winograd.suits(127, 256, 256)
    assert not _winograd.suits(256, 255, 256)
    assert not _winograd.suits(512, 512, 199)


def test_where_it_gives_weight_gradients(monkeypatch):
    if not torch.backends.mkl.is_available():
        pytest.skip("PyTorch without MKL, whose products these are")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(_weight_products, "LEAST_PRODUCTS", 0)
    found, real = [], _winograd.weight_gradient
    monkeypatch.setattr(
        _winograd, "weight_gradient", lambda dz, *rest: found.append(tuple(dz.shape)) or real(dz, *rest)
    )
    for c_x, c_skip, c_out, height in (
        (64, 0, 64, 16),
        (32, 32, 64, 16),
        (64, 0, 63, 16),
        (63, 0, 64, 16),
        (64, 0, 64, 15),
    ):
        x, skip = torch.randn(2, c_x, height, 16), torch.randn(2, c_skip, height, 16) if c_skip else None
        weight = torch.randn(c_out, c_x + c_skip, 3, 3, requires_grad=True)
        conv_relu(x, weight, skip=skip, backend="torch").sum().backward()
        sources = x if skip is None else torch.cat([skip, x], 1)
        dz = (F.conv2d(sources, weight, padding=1) > 0).to(x.dtype).detach()
        exact = weight_gradient(dz.double(), sources.double(), 1)
        assert_within_budget(weight.grad, weight_gradient(dz, sources, 1), exact, "dw")
    assert found == [(2, 16, 16, 64), (2, 16, 16, 64)]


@pytest.fixture
def shapes(monkeypatch):
    """(channels of the sources, C_out) of each convolution that ran this way, as smaller ones than usual may."""
    if not torch.backends.mkl.is_available():
        pytest.skip("PyTorch without MKL, whose products these are")
    found, real = [], _winograd.convolution
    monkeypatch.setattr(_winograd, "LEAST_CHANNELS_IN", 8)
    monkeypatch.setattr(_winograd, "LEAST_CHANNELS_OUT", 16)
    monkeypatch.setattr(_winograd, "LEAST_PIXELS", 64)
    monkeypatch.setattr(
        _winograd, "convolution",
        lambda sources, weight, *rest: found.append(([s.shape[1] for s in sources], weight.shape[2]))
        or real(sources, weight, *rest),
    )  # fmt: skip
    return found


def frozen_network(**style):
    model = UNet(depth=1, **style).eval()
    return model, model.freeze(), torch.randn(1, 2, 16, 16)


def test_shapes_of_images_share_transformed_weights(shapes):
    model, frozen, x = frozen_network(width=8)
    assert_same(model, frozen, x)
    assert shapes == [([8], 16), ([16], 16)]
    kept = dict(frozen._kept)
    assert list(kept) == [model.bottleneck.conv1, model.bottleneck.conv2]
    frozen(torch.cat([x, x]))
    assert len(shapes) == 4
    assert all(frozen._kept[layer] is weight for layer, weight in kept.items())
    frozen(x[..., :14])
    assert len(shapes) == 4, "56 pixels at half the size are too few"


def test_sources_of_a_decoder_go_together(shapes):
    model, frozen, _ = frozen_network(width=16, padding="valid", up="transpose")
    assert_same(model, frozen, torch.randn(1, 2, 32, 32))
    assert ([16, 16], 16) in shapes


def test_changed_weights_are_transformed_again(shapes):
    model, frozen, x = frozen_network(width=8)
    frozen(x)
    with torch.no_grad():
        model.bottleneck.conv2.weight.mul_(0.5)
    assert_same(model, frozen, x)
    assert len(shapes) == 4


@pytest.mark.parametrize("part", ["conv", "matmul"])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_not_where_operands_may_be_rounded(shapes, part, precision):
    settings = getattr(torch.backends.mkldnn, part, None)
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("this PyTorch has no such setting")
    _, frozen, x = frozen_network(width=8)
    frozen(x)
    before, settings.fp32_precision = settings.fp32_precision, precision
    try:
        assert not _upsample_products.suits(512, 256)
        frozen(x)
    finally:
        settings.fp32_precision = before
    assert len(shapes) == 2
    frozen(x)
    assert len(shapes) == 4
