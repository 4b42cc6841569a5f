"""The ReLU gradient launcher: exact values, since it only copies or zeroes."""

import pytest
import torch
import torch.nn.functional as F

from fastunet.kernels import relu

SHAPES = [(1, 1, 1, 1), (3, 33, 5, 7), (2, 24, 15, 17), (0, 8, 4, 4), (1, 100, 16, 16)]


@pytest.mark.parametrize("slope", [0.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_autograd(shape, slope, dtype, device):
    z = torch.randn(shape, device=device).to(dtype).requires_grad_()
    y = F.leaky_relu(z, slope) if slope else torch.relu(z)
    dy = torch.randn(shape, device=device).to(dtype)
    (expected,) = torch.autograd.grad(y, z, dy)
    assert torch.equal(relu.backward(dy, y.detach(), slope), expected)


def test_mixed_and_strided_layouts(device):
    """Whatever the layouts of the two operands, elements pair up by index."""
    y = torch.randn(2, 6, 9, 20, device=device).relu()
    dy = torch.randn(2, 6, 9, 20, device=device)
    expected = torch.where(y > 0, dy, 0)
    channels_last = dict(memory_format=torch.channels_last)
    assert torch.equal(relu.backward(dy.contiguous(**channels_last), y, 0.0), expected)
    assert torch.equal(relu.backward(dy, y.contiguous(**channels_last), 0.0), expected)
    result = relu.backward(dy.contiguous(**channels_last), y.contiguous(**channels_last), 0.0)
    assert torch.equal(result, expected)
    assert result.is_contiguous(**channels_last)
    assert torch.equal(relu.backward(dy[..., ::2], y[..., 1::2], 0.0), torch.where(y[..., 1::2] > 0, dy[..., ::2], 0))


def test_special_values(device):
    """As PyTorch: a NaN output passes its gradient on, and zero outputs stop infinite and NaN gradients."""
    inf, nan = float("inf"), float("nan")
    y = torch.tensor([nan, 0.0, 0.0, inf, 1.0], device=device).reshape(1, 1, 1, 5)
    dy = torch.tensor([2.0, inf, nan, 3.0, nan], device=device).reshape(1, 1, 1, 5)
    expected = torch.tensor([2.0, 0.0, 0.0, 3.0, nan], device=device).reshape(1, 1, 1, 5)
    torch.testing.assert_close(relu.backward(dy, y, 0.0), expected, rtol=0, atol=0, equal_nan=True)


def test_shapes_must_match(device):
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 4\) for an output of shape \(1, 2, 3, 5\)"):
        relu.backward(torch.zeros(1, 2, 3, 4, device=device), torch.zeros(1, 2, 3, 5, device=device), 0.0)
