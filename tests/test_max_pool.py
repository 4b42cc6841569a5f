"""max_pool2d in PyTorch, and its fused gradient: skip sum and ReLU mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastunet.functional import max_pool2d
from tests import operators

OPS = torch.ops.fastunet


@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (1, 1, 2, 2), (2, 2, 7, 5)])
def test_against_pytorch(shape):
    operators.check_against_literal(max_pool2d, lambda x: F.max_pool2d(x, 2), shape)
    operators.check_gradients(max_pool2d, shape)
    operators.check_layouts(max_pool2d, shape)
    operators.check_compiles(max_pool2d, shape)


def test_registration():
    y = torch.randn(2, 3, 7, 6)
    operators.check_registration(OPS.max_pool2d.default, y, "torch")
    d_pooled = torch.randn(2, 3, 3, 3)
    operators.check_registration(OPS.max_pool2d_backward.default, d_pooled, torch.randn_like(y), y, 0.0, "torch")
    operators.check_registration(OPS.max_pool2d_backward.default, d_pooled, None, y, 1.0, "torch")


def test_ties_skip_and_mask():
    """The first maximum gets the gradient; the skip's gradient is added; where y is 0 nothing passes the ReLU."""
    y = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 2.0]]).view(1, 1, 2, 3)
    d_pooled, d_skip = torch.full((1, 1, 1, 1), 10.0), torch.ones(1, 1, 2, 3)
    got = OPS.max_pool2d_backward(d_pooled, d_skip, y, 0.0, "torch")
    assert got.flatten().tolist() == [11, 1, 0, 1, 0, 1]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"\(1, 1, 1, 4\)"):
        max_pool2d(torch.zeros(1, 1, 1, 4))


def test_on_a_cpu_the_derivative_is_pytorch_s_own():
    x = torch.randn(1, 2, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    assert max_pool2d(x).grad_fn.name().startswith("MaxPool2DWithIndices")
