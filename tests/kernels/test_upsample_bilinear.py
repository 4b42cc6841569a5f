"""Bilinear ×2 upsampling and its gradient by the launchers, against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastunet.functional import upsample_bilinear2d
from fastunet.kernels import upsample_bilinear

from ..tolerance import assert_within_budget

SHAPES = [(1, 1, 1, 1), (2, 3, 2, 3), (1, 33, 3, 1), (1, 8, 4, 17), (2, 24, 3, 6), (0, 8, 4, 4)]


def plain(x, dy, align_corners):
    """y and dx."""
    x = x.clone().requires_grad_()
    y = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=align_corners)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def operands(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    n, c, h, w = shape
    return [torch.randn(s, generator=generator).to(device, dtype) for s in (shape, (n, c, 2 * h, 2 * w))]


@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_forward_and_gradient(shape, align_corners, dtype, device):
    x, dy = operands(shape, dtype, device)
    same, exact = plain(x, dy, align_corners), plain(x.double(), dy.double(), align_corners)
    found = upsample_bilinear.forward(x, align_corners), upsample_bilinear.backward(dy, align_corners)
    for name, *results in zip(("y", "dx"), found, same, exact, strict=True):
        assert_within_budget(*results, name)
    assert torch.equal(upsample_bilinear.backward(dy, align_corners), found[1])


@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
def test_every_weight(align_corners, device):
    """Of each output and input pixel of one row, one channel for each; and no NaN but where a weight is."""
    for side in (1, 2, 3, 9):
        x = torch.eye(side, device=device)[None, :, None]
        exact = F.interpolate(x.double(), scale_factor=2, mode="bilinear", align_corners=align_corners)
        y = upsample_bilinear.forward(x, align_corners)
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5)
        nan = torch.where(x > 0, float("nan"), 1.0)
        expected = F.interpolate(nan, scale_factor=2, mode="bilinear", align_corners=align_corners)
        assert torch.equal(upsample_bilinear.forward(nan, align_corners).isnan(), expected.isnan())
        dy = torch.eye(2 * side, device=device)[None, :, None].repeat(1, 1, 2, 1)
        dx = upsample_bilinear.backward(dy, align_corners)
        torch.testing.assert_close(dx[0, :, 0].double(), 2 * exact[0, :, 0].T, rtol=0, atol=2e-5)
        nan = torch.where(dy > 0, float("nan"), 1.0)
        assert not upsample_bilinear.backward(nan, align_corners)[0, :, 0].isnan()[_far(side)].any()


def _far(side):
    """[output pixel, pixel] that are further apart than one."""
    i, a = torch.arange(2 * side)[:, None], torch.arange(side)[None, :]
    return (i / 2 - a).abs() > 2


def test_operator(device):
    x, dy = operands((2, 3, 3, 5), torch.float32, device)
    leaf = x.clone().requires_grad_()
    y = upsample_bilinear2d(leaf, align_corners=True, backend="triton")
    (dx,) = torch.autograd.grad(y, leaf, dy)
    assert torch.equal(y.detach(), upsample_bilinear.forward(x, True))
    assert torch.equal(dx, upsample_bilinear.backward(dy, True))
