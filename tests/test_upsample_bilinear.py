"""upsample_bilinear2d against nn.Upsample."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from fastunet.functional import upsample_bilinear2d
from tests import operators


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 3, 5), (1, 1, 1, 1)])
def test_against_pytorch(shape, align_corners):
    ours = functools.partial(upsample_bilinear2d, align_corners=align_corners)
    theirs = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=align_corners)
    operators.check_against_literal(ours, theirs, shape)
    operators.check_gradients(ours, shape)
    operators.check_layouts(ours, shape)
    operators.check_compiles(ours, shape)
    x, dy = torch.randn(shape), torch.randn(*shape[:2], 2 * shape[2], 2 * shape[3])
    operators.check_registration(torch.ops.fastunet.upsample_bilinear2d.default, x, align_corners, "torch")
    operators.check_registration(torch.ops.fastunet.upsample_bilinear2d_backward.default, dy, align_corners, "torch")


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="align_corners is None; expected bool"):
        upsample_bilinear2d(torch.zeros(1, 1, 2, 2), align_corners=None)
