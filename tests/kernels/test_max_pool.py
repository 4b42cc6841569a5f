"""Max-pool launchers against PyTorch: exact in both directions, ties and NaN included."""

import pytest
import torch
import torch.nn.functional as F

from fastunet.kernels import max_pool

SHAPES = [
    (1, 1, 2, 2),
    (1, 2, 3, 2),
    (3, 3, 5, 7),
    (2, 4, 16, 15),
    (1, 24, 17, 16),
    (2, 33, 7, 9),
    (1, 48, 15, 15),
    (1, 100, 4, 33),
    (0, 8, 4, 4),
]


def coarse(shape, device, dtype):
    """Random values of which many are equal, so that most windows hold ties, and many negative or zero."""
    return torch.randint(-2, 4, shape, device=device).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_equals_pytorch(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    assert torch.equal(max_pool.forward(x), F.max_pool2d(x, 2))


@pytest.mark.parametrize("slope", [1.0, 0.0, 0.25], ids=["plain", "relu", "leaky"])
@pytest.mark.parametrize("with_skip", [False, True], ids=["pool", "pool+skip"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_equals_autograd(shape, with_skip, slope, device):
    dtype = torch.float16 if shape[1] % 2 else torch.float32
    z = coarse(shape, device, dtype).requires_grad_()
    y = torch.relu(z) if slope == 0 else F.leaky_relu(z, slope)
    pooled = F.max_pool2d(y, 2)
    d_pool = torch.randn(pooled.shape, device=device).to(dtype)
    d_skip = torch.randn(shape, device=device).to(dtype) if with_skip else None
    outputs, gradients = ([pooled, y], [d_pool, d_skip]) if with_skip else ([pooled], [d_pool])
    (expected,) = torch.autograd.grad(outputs, z, gradients)
    assert torch.equal(max_pool.backward(d_pool, d_skip, y.detach(), slope), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nan_is_the_maximum(dtype, device):
    """Every pattern of NaN over a window, with ties among the rest: values and the position that is chosen."""
    windows = torch.tensor([[1.0, 2.0, 2.0, 0.0]]).repeat(16, 1)
    pattern = (torch.arange(16)[:, None] >> torch.arange(4)) & 1
    windows = windows.masked_fill(pattern.bool(), float("nan")).to(device, dtype)
    x = windows.reshape(16, 1, 2, 2).requires_grad_()
    expected = F.max_pool2d(x, 2)
    torch.testing.assert_close(max_pool.forward(x.detach()), expected, rtol=0, atol=0, equal_nan=True)
    d_pool = torch.full_like(expected, 3.0)
    (gradient,) = torch.autograd.grad(expected, x, d_pool)
    assert torch.equal(max_pool.backward(d_pool, None, x.detach(), slope=1.0), gradient)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1)], ids=str)
def test_backward_of_images_without_a_window(size, device):
    """One row or column holds no window: only the skip's gradient arrives."""
    y = torch.randn(2, 5, *size, device=device)
    d_pool = torch.empty(2, 5, size[0] // 2, size[1] // 2, device=device)
    d_skip = torch.randn_like(y)
    assert torch.equal(max_pool.backward(d_pool, d_skip, y, slope=0.0), torch.where(y > 0, d_skip, 0))
    assert torch.equal(max_pool.backward(d_pool, None, y, slope=1.0), torch.zeros_like(y))


def test_strided_and_channels_last_inputs(device):
    whole = torch.randn(2, 8, 9, 14, device=device)
    x = whole[:, ::2, 1:, ::2]
    expected = F.max_pool2d(x, 2)
    assert torch.equal(max_pool.forward(x), expected)
    assert torch.equal(max_pool.forward(x.contiguous(memory_format=torch.channels_last)), expected)


def test_errors_name_the_shapes(device):
    with pytest.raises(ValueError, match="1x6 pixels"):
        max_pool.forward(torch.zeros(1, 1, 1, 6, device=device))
    y = torch.zeros(1, 2, 4, 4, device=device)
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 2\)"):
        max_pool.backward(torch.zeros(1, 2, 3, 2, device=device), None, y, slope=0.0)
