"""Nearest x2 + 2x2 convolution: the launchers against the plain two operators, forward and every gradient."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from fastunet.kernels import upsample_conv

from ..tolerance import assert_within_budget
from . import in_order
from .conftest import DTYPES
from .doubling import CASES, Case, assert_operator_within_budget, operands


def plain(x, weight, bias, convolve=F.conv2d):
    """The definition: the upsampled image, padded at the bottom and right."""
    return convolve(F.pad(F.interpolate(x, scale_factor=2, mode="nearest"), (0, 1, 0, 1)), weight, bias)


def weight_shape(case: Case):
    return case.c_out, case.c_in, 2, 2


def no_relu(x, weight, bias, **kwargs):
    return upsample_conv.forward(x, weight, bias, 1.0, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case, dtype, device):
    ordered = functools.partial(plain, convolve=in_order.conv2d)
    assert_operator_within_budget(upsample_conv, no_relu, plain, weight_shape(case), case, dtype, device, ordered)


@pytest.mark.parametrize("bulk", [True, False])
def test_relu_without_bias(bulk, device):
    case = Case(2, 32, 16, 3, 7, bulk)
    x, weight, _, _ = operands(case, weight_shape(case), torch.float32, device)
    y = upsample_conv.forward(x, weight, None, 0.0, **case.product())
    exact = plain(x.double(), weight.double(), None).relu()
    assert (exact == 0).any()
    assert_within_budget(y, plain(x, weight, None).relu(), exact, "relu")
    assert (y >= 0).all()


def test_relu_keeps_nan(device):
    case = Case(1, 32, 64, 3, 3)
    x, weight, bias, _ = operands(case, weight_shape(case), torch.float32, device)
    x[0, 5, 1, 1] = float("nan")
    y = upsample_conv.forward(x, weight, bias, 0.0)
    assert torch.equal(y.isnan(), plain(x, weight, bias).relu().isnan())
    assert y[0, 0].isnan().sum() == 9  # an input pixel reaches 3x3 output pixels


@pytest.mark.parametrize("bulk", [True, False])
def test_data_grad_without_mask(bulk, device):
    case = Case(2, 32, 16, 3, 7, bulk)
    x, weight, _, dz = operands(case, weight_shape(case), torch.float32, device)
    actual = upsample_conv.data_grad(dz, weight, x, False, **case.product())

    def gradient(dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        return torch.autograd.grad(plain(leaf, weight.to(dtype), None), leaf, dz.to(dtype))[0]

    assert (gradient(torch.float64)[x == 0] != 0).any()
    assert_within_budget(actual, gradient(torch.float32), gradient(torch.float64), "dx")


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_sub_pixel_weights_are_summed_before_they_are_rounded(dtype, device):
    """fp16 0.1 + 0.1 + 0.1 + 0.1 rounded once differs from the sum rounded at each step for some weights."""
    weight = torch.rand(33, 17, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    taps = F.pad(weight.flip(2, 3).double(), (1, 1, 1, 1)).unfold(2, 2, 1).unfold(3, 2, 1).sum((4, 5))
    k = taps.permute(2, 3, 0, 1).to(dtype)
    for exchanged, expected in ((False, k), (True, k.transpose(2, 3))):
        assert torch.equal(upsample_conv.sub_pixel_weights(weight, slots=3, out_first=not exchanged), expected)
    y, packed = upsample_conv.forward_packing(torch.ones(1, 17, 2, 3).to(weight), weight, None, 1.0)
    assert torch.equal(packed, k.transpose(2, 3).flatten(0, 1))
    stacked = upsample_conv.sub_pixel_weights(weight, slots=4, out_first=True)
    assert torch.equal(stacked[:, 1:], k)
    assert not stacked[:, 0].any()
    assert torch.equal(y, upsample_conv.forward(torch.ones(1, 17, 2, 3).to(weight), weight, None, 1.0))


@pytest.mark.parametrize("bulk", [True, False])
def test_weights_packed_once_give_the_same_bits(bulk, device):
    case = Case(2, 32, 16, 3, 7, bulk)
    x, weight, bias, dz = operands(case, weight_shape(case), torch.bfloat16, device)
    y, packed = upsample_conv.forward_packing(x, weight, bias, 0.0, **case.product())
    assert torch.equal(y, upsample_conv.forward(x, weight, bias, 0.0, **case.product()))
    expected = upsample_conv.data_grad(dz, weight, x, True, **case.product())
    unread = torch.full_like(weight, float("nan"))
    assert torch.equal(upsample_conv.data_grad(dz, unread, x, True, packed, **case.product()), expected)


def test_strided_operands(device):
    """Slices, transposed images and an expanded gradient give what their contiguous copies give."""
    case = Case(2, 32, 16, 5, 6, False)
    x, weight, bias, dz = operands(case, weight_shape(case), torch.float32, device)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    weight_view = weight.transpose(2, 3).contiguous().transpose(2, 3)
    expected = upsample_conv.forward(x, weight, bias, 0.0, **case.product())
    assert torch.equal(upsample_conv.forward(strided, weight_view, bias, 0.0, **case.product()), expected)
    flat = dz[:, :, :1, :1].expand_as(dz)
    dw, db = upsample_conv.weight_grad(flat, strided, True, **case.weight_grad())
    dw_copy, db_copy = upsample_conv.weight_grad(flat.contiguous(), x, True, **case.weight_grad())
    assert torch.equal(dw, dw_copy)
    assert torch.equal(db, db_copy)


@pytest.mark.parametrize("bulk", [True, False])
def test_repeats_are_bit_identical(bulk, device):
    case = Case(1, 32, 16, 5, 9, bulk)
    x, weight, bias, dz = operands(case, weight_shape(case), torch.float16, device)

    def run():
        return (
            upsample_conv.forward(x, weight, bias, 0.0, **case.product()),
            upsample_conv.data_grad(dz, weight, x, True, **case.product()),
            *upsample_conv.weight_grad(dz, x, True, **case.weight_grad()),
        )

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


def test_no_bias_gradient_is_empty(device):
    case = Case(1, 32, 16, 4, 4)
    x, _, _, dz = operands(case, weight_shape(case), torch.float32, device)
    with_bias, _ = upsample_conv.weight_grad(dz, x, True)
    without, db = upsample_conv.weight_grad(dz, x, False)
    assert db.shape == (0,)
    assert torch.equal(with_bias, without)
