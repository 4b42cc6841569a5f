"""2x2 stride-2 transposed convolution: the launchers against PyTorch's, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastunet.kernels import conv_transpose

from ..tolerance import assert_within_budget
from .conftest import DTYPES
from .doubling import CASES, Case, assert_operator_within_budget, operands


def plain(x, weight, bias):
    return F.conv_transpose2d(x, weight, bias, stride=2)


def weight_shape(case: Case):
    return case.c_in, case.c_out, 2, 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case, dtype, device):
    assert_operator_within_budget(
        conv_transpose, conv_transpose.forward, plain, weight_shape(case), case, dtype, device
    )  # fmt: skip


@pytest.mark.parametrize("bulk", [True, False])
def test_without_bias_or_mask(bulk, device):
    case = Case(2, 32, 16, 3, 7, bulk)
    x, weight, _, dy = operands(case, weight_shape(case), torch.float32, device)
    y = conv_transpose.forward(x, weight, None, **case.product())
    assert_within_budget(y, plain(x, weight, None), plain(x.double(), weight.double(), None), "y")

    def gradient(dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        return torch.autograd.grad(plain(leaf, weight.to(dtype), None), leaf, dy.to(dtype))[0]

    dx = conv_transpose.data_grad(dy, weight, x, False, **case.product())
    assert (gradient(torch.float64)[x == 0] != 0).any()
    assert_within_budget(dx, gradient(torch.float32), gradient(torch.float64), "dx")
    assert conv_transpose.weight_grad(dy, x, False, **case.weight_grad())[1].shape == (0,)


def test_images_do_not_leak_into_each_other(device):
    """Tiles cross images, which lie one below the other: a NaN image must leave its neighbours alone."""
    case = Case(3, 32, 16, 3, 5)
    x, weight, bias, dy = operands(case, weight_shape(case), torch.float32, device)
    x[1], dy[1] = float("nan"), float("nan")
    y = conv_transpose.forward(x, weight, bias)
    dx = conv_transpose.data_grad(dy, weight, x, False)
    others = torch.tensor([0, 2], device=device)
    for name, found, plain in (("y", y, F.conv_transpose2d), ("dx", dx, F.conv2d)):
        operand, added = (x, (bias,)) if name == "y" else (dy, ())
        same, exact = (plain(operand[others].to(d), weight.to(d), *(b.to(d) for b in added), stride=2)
                       for d in (torch.float32, torch.float64))  # fmt: skip
        assert_within_budget(found[others], same, exact, name)
    assert y[1].isnan().all()
    assert dx[1].isnan().all()


def test_strided_operands(device):
    case = Case(2, 32, 16, 5, 6, False)
    x, weight, bias, dy = operands(case, weight_shape(case), torch.float32, device)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    weight_view = weight.transpose(0, 1).contiguous().transpose(0, 1)
    expected = conv_transpose.forward(x, weight, bias, **case.product())
    assert torch.equal(conv_transpose.forward(strided, weight_view, bias, **case.product()), expected)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    expected = conv_transpose.weight_grad(dy, channels_last, True)
    for first, second in zip(conv_transpose.weight_grad(dy, strided, True), expected):
        assert torch.equal(first, second)


@pytest.mark.parametrize("bulk", [True, False])
def test_repeats_are_bit_identical(bulk, device):
    case = Case(1, 32, 16, 5, 9, bulk)
    x, weight, bias, dy = operands(case, weight_shape(case), torch.float16, device)

    def run():
        return (
            conv_transpose.forward(x, weight, bias, **case.product()),
            conv_transpose.data_grad(dy, weight, x, True, **case.product()),
            *conv_transpose.weight_grad(dy, x, True, **case.weight_grad()),
        )

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)
