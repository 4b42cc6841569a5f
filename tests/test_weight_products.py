"""The weight gradient as matrix products: against float64 over bands, edges, crops and sources, and where it runs."""

from __future__ import annotations

import pytest
import torch

from fastunet.functional import _weight_products, conv_relu
from fastunet.reference import centre_crop

from .tolerance import assert_within_budget

ENOUGH = 2, 16, 8, 8
"""With LEAST_PRODUCTS at what one image of it has, 8 · 8 · 9 · 16 · 16, the products are worth while."""


def gradients_of(x, weight, dz, pad):
    """PyTorch's (dw, db)."""
    geometry = [1, 1], [pad, pad], [1, 1], False, [0, 0], 1
    return torch.ops.aten.convolution_backward(dz, x, weight, [len(weight)], *geometry, [False, True, True])[1:]


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("size", [(3, 3), (7, 5), (4, 9)])
@pytest.mark.parametrize("channels", [(3,), (2, 4)])
def test_equals_float64(monkeypatch, channels, size, pad, rows):
    height, width = size
    monkeypatch.setattr(_weight_products, "BAND", rows * 3 * max(channels) * (width - 2 + 2 * pad) * 4)
    skips = [torch.randn(2, c, height + 2, width + 3) for c in channels[1:]]
    x = torch.randn(2, channels[0], *size).contiguous(memory_format=torch.channels_last)
    sources = [*(centre_crop(skip, *size) for skip in skips), x]
    dz = torch.randn(2, 5, height - 2 + 2 * pad, width - 2 + 2 * pad).contiguous(memory_format=torch.channels_last)
    found = _weight_products.weight_gradient(dz, sources, pad, True)
    operands = torch.cat(sources, 1), torch.zeros(5, sum(channels), 3, 3), dz
    same_dtype, exact = gradients_of(*operands, pad), gradients_of(*(t.double() for t in operands), pad)
    for name, *results in zip(("dw", "db"), found, same_dtype, exact, strict=True):
        assert_within_budget(*results, name)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert _weight_products.weight_gradient(dz, sources, pad, False)[1].numel() == 0


def test_one_row_and_one_column():
    for size in ((1, 6), (6, 1), (1, 1)):
        x, dz = torch.randn(1, 2, *size), torch.randn(1, 3, *size)
        dw, _ = _weight_products.weight_gradient(dz, [x], 1, True)
        exact = gradients_of(x.double(), torch.zeros(3, 2, 3, 3).double(), dz.double(), 1)[0]
        torch.testing.assert_close(dw.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.fixture
def calls(monkeypatch):
    """The sources of each gradient that the products gave, on a processor as those that they are for."""
    if not torch.backends.mkl.is_available():
        pytest.skip("PyTorch without MKL, whose products these are")
    found, real = [], _weight_products.weight_gradient
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(_weight_products, "LEAST_PRODUCTS", 9 * 16 * 16 * 8 * 8)
    monkeypatch.setattr(_weight_products, "weight_gradient", lambda *a: found.append(len(a[1])) or real(*a))
    return found


def step(dtype=torch.float32, skip=False, channels=16):
    x = torch.randn(ENOUGH[0], channels, *ENOUGH[2:], dtype=dtype)
    weight = torch.randn(16, channels * (2 if skip else 1), 3, 3, dtype=dtype, requires_grad=True)
    conv_relu(x, weight, skip=torch.randn_like(x) if skip else None, backend="torch").sum().backward()


def test_where_they_are_the_faster_way(calls, monkeypatch):
    step()
    step(skip=True)
    assert calls == [1, 2]
    step(channels=15)
    step(dtype=torch.float64)
    monkeypatch.setattr(_weight_products, "LEAST_PRODUCTS", 9 * 16 * 16 * 8 * 8 + 1)
    step()
    monkeypatch.setattr(_weight_products, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    step()
    assert calls == [1, 2]


def test_an_empty_batch_has_no_gradient(calls):
    x, weight = torch.randn(0, *ENOUGH[1:]), torch.randn(16, 16, 3, 3, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)
    conv_relu(x, weight, bias, backend="torch").sum().backward()
    assert not weight.grad.any()
    assert not bias.grad.any()
    assert len(calls) == 1


def test_not_where_products_round_to_bfloat16(calls):
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("this PyTorch has no such setting")
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        step()
    finally:
        settings.fp32_precision = before
    assert calls == []


def test_not_where_they_are_differentiated_or_batched(calls):
    x, dz = (torch.randn(*ENOUGH) for _ in range(2))
    assert _weight_products.suits(dz, [x])
    assert not _weight_products.suits(dz.clone().requires_grad_(), [x])
    with torch.no_grad():
        assert _weight_products.suits(dz.clone().requires_grad_(), [x])
    found = []
    torch.vmap(lambda each: found.append(_weight_products.suits(each, [x])) or each)(dz[None])
    assert found == [False]
