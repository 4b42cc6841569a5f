"""conv_transpose2d in PyTorch: against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastunet.functional import conv_transpose2d
from tests import operators

OPS = torch.ops.fastunet


@pytest.mark.parametrize(
    "shapes",
    [((2, 3, 5, 4), (3, 4, 2, 2), (4,)), ((1, 1, 1, 1), (1, 1, 2, 2), None), ((1, 6, 3, 7), (6, 2, 2, 2), (2,))],
)
def test_against_pytorch(shapes):
    operators.check_against_literal(conv_transpose2d, lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), *shapes)
    operators.check_gradients(conv_transpose2d, *shapes)
    operators.check_layouts(conv_transpose2d, *shapes)
    operators.check_compiles(conv_transpose2d, *shapes)


def test_registration():
    x, weight, bias, dy = torch.randn(2, 3, 5, 4), torch.randn(3, 4, 2, 2), torch.randn(4), torch.randn(2, 4, 10, 8)
    operators.check_registration(OPS.conv_transpose2d.default, x, weight, bias, "torch")
    operators.check_registration(OPS.conv_transpose2d_data_grad.default, dy, weight, x, True, "torch")
    operators.check_registration(OPS.conv_transpose2d_weight_grad.default, dy, x, True, "torch")
    operators.check_registration(OPS.conv_transpose2d_weight_grad.default, dy, x, False, "torch")


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"\(3, any, 2, 2\), got \(4, 3, 2, 2\)"):
        conv_transpose2d(torch.zeros(1, 3, 4, 4), torch.zeros(4, 3, 2, 2))
