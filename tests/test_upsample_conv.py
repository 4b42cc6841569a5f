"""upsample_conv_relu in PyTorch: against nearest upsampling, bottom/right padding, 2×2 convolution, ReLU."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from fastunet.functional import upsample_conv_relu
from fastunet.functional.blocks import decoder_block
from tests import operators
from tests.test_layers import Recorder

OPS = torch.ops.fastunet


def literal(x, weight, bias, slope=0.0):
    up = F.pad(F.interpolate(x, scale_factor=2, mode="nearest"), (0, 1, 0, 1))
    return F.leaky_relu(F.conv2d(up, weight, bias), slope)


@pytest.mark.parametrize(
    "shapes",
    [((2, 3, 5, 4), (4, 3, 2, 2), (4,)), ((1, 1, 1, 1), (1, 1, 2, 2), None), ((1, 6, 3, 7), (2, 6, 2, 2), (2,))],
)
def test_against_literal(shapes):
    operators.check_gradients(upsample_conv_relu, *shapes)
    operators.check_layouts(upsample_conv_relu, *shapes)
    operators.check_compiles(upsample_conv_relu, *shapes)
    got = operators.run_with_gradients(upsample_conv_relu, operators.leaves(*shapes))
    want = operators.run_with_gradients(literal, operators.leaves(*shapes))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_float32_error_is_pytorch_s():
    operators.check_against_literal(upsample_conv_relu, literal, (2, 16, 9, 8), (8, 16, 2, 2), (8,))


def test_registration():
    x, weight, bias, dz = torch.randn(2, 3, 5, 4), torch.randn(4, 3, 2, 2), torch.randn(4), torch.randn(2, 4, 10, 8)
    operators.check_registration(OPS.upsample_conv_relu.default, x, weight, bias, 0.0, "torch")
    operators.check_registration(OPS.upsample_conv_relu.default, x, weight, None, 1.0, "torch")
    operators.check_registration(OPS.upsample_conv_relu_data_grad.default, dz, weight, x, True, None, "torch")
    operators.check_registration(OPS.upsample_conv_relu_packing.default, x, weight, bias, 0.0, "torch")
    packed = torch.randn(9, 3, 4)
    operators.check_registration(OPS.upsample_conv_relu_data_grad.default, dz, weight, x, True, packed, "torch")
    operators.check_registration(OPS.upsample_conv_relu_weight_grad.default, dz, x, True, "torch")
    operators.check_registration(OPS.upsample_conv_relu_weight_grad.default, dz, x, False, "torch")


def test_leaky_relu():
    shapes = (2, 3, 3, 4), (4, 3, 2, 2), (4,)
    ours = functools.partial(upsample_conv_relu, slope=0.1)
    operators.check_against_literal(ours, functools.partial(literal, slope=0.1), *shapes)
    operators.check_gradients(ours, *shapes)


def test_mask_of_the_input():
    torch.manual_seed(0)
    dz, weight, x = torch.randn(1, 4, 6, 8), torch.randn(4, 3, 2, 2), torch.randn(1, 3, 3, 4)
    plain = OPS.upsample_conv_relu_data_grad(dz, weight, x, False, None, "torch")
    assert torch.equal(OPS.upsample_conv_relu_data_grad(dz, weight, x, True, None, "torch"), plain * (x > 0))


def test_packed_weights_are_read_in_place_of_the_weight():
    torch.manual_seed(0)
    x, weight, bias, dz = torch.randn(1, 3, 3, 4), torch.randn(4, 3, 2, 2), torch.randn(4), torch.randn(1, 4, 6, 8)
    y, packed = OPS.upsample_conv_relu_packing(x, weight, bias, 0.1, "torch")
    assert torch.equal(y, OPS.upsample_conv_relu(x, weight, bias, 0.1, "torch"))
    expected = OPS.upsample_conv_relu_data_grad(dz, weight, x, True, None, "torch")
    unread = torch.full_like(weight, float("nan"))
    torch.testing.assert_close(OPS.upsample_conv_relu_data_grad(dz, unread, x, True, packed, "torch"), expected)


def decoder_operands():
    shapes = (1, 4, 3, 5), (1, 4, 6, 10), (4, 4, 2, 2), (4,), (4, 8, 3, 3), (4,), (4, 4, 3, 3), (4,)
    return [torch.randn(shape, device="meta", requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("needed", [True, False])
def test_a_decoder_packs_weights_for_the_data_gradient_where_one_follows(needed, backend):
    x, *others = decoder_operands()
    with Recorder() as recorder:
        decoder_block(x.requires_grad_(needed), *others, up="upsample", backend=backend).sum().backward()
    found = {name: arguments for name, arguments in recorder.calls if name.startswith("upsample")}
    packs = needed and backend == "auto"
    assert ("upsample_conv_relu_packing" in found, "upsample_conv_relu" in found) == (packs, not packs)
    if needed:
        assert found["upsample_conv_relu_data_grad"][-1] == ((9, 4, 4) if packs else None)


def test_a_weight_that_was_packed_must_not_change_before_the_backward_pass():
    operands = decoder_operands()
    y = decoder_block(*operands, up="upsample")
    with torch.no_grad():
        operands[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"\(any, 3, 2, 2\), got \(4, 3, 3, 3\)"):
        upsample_conv_relu(torch.zeros(1, 3, 4, 4), torch.zeros(4, 3, 3, 3))
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\), got \(3,\)"):
        upsample_conv_relu(torch.zeros(1, 3, 4, 4), torch.zeros(4, 3, 2, 2), torch.zeros(3))
