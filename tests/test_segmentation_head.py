"""segmentation_head in PyTorch: logits, probabilities and labels of a 1×1 convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastunet.functional import segmentation_head
from tests import operators

OPS = torch.ops.fastunet
SHAPES = [((2, 8, 5, 4), (4, 8, 1, 1), (4,)), ((1, 1, 1, 1), (1, 1, 1, 1), None), ((1, 3, 2, 3), (33, 3, 1, 1), (33,))]


@pytest.mark.parametrize("shapes", SHAPES)
def test_logits(shapes):
    operators.check_against_literal(segmentation_head, F.conv2d, *shapes)
    operators.check_gradients(segmentation_head, *shapes)
    operators.check_layouts(segmentation_head, *shapes)
    operators.check_compiles(segmentation_head, *shapes)


@pytest.mark.parametrize("shapes", SHAPES)
def test_probabilities_and_their_gradient(shapes):
    def fast(*tensors):
        return segmentation_head(*tensors, output="probabilities")

    operators.check_against_literal(fast, lambda *t: F.conv2d(*t).softmax(1), *shapes)
    with torch.no_grad():
        tensors = operators.leaves(*shapes)
        torch.testing.assert_close(fast(*tensors), F.conv2d(*tensors).softmax(1), rtol=1e-12, atol=1e-12)


def test_labels():
    x, weight, bias = operators.leaves((2, 8, 5, 4), (4, 8, 1, 1), (4,), dtype=torch.float32)
    labels = segmentation_head(x, weight, bias, output="labels")
    assert labels.dtype == torch.uint8
    assert not labels.requires_grad
    assert torch.equal(labels, F.conv2d(x, weight, bias).argmax(1).to(torch.uint8))
    bias = torch.tensor([0.0, 1.0, 1.0])
    ties = segmentation_head(torch.ones(1, 1, 2, 2), torch.ones(3, 1, 1, 1), bias, output="labels")
    assert torch.equal(ties, torch.ones(1, 2, 2, dtype=torch.uint8))


def test_regions_are_painted_one_over_the_other():
    """As nnU-Net paints them: each region where its sigmoid is above one half, later ones over earlier ones."""
    x, weight, bias = operators.leaves((2, 8, 9, 9), (3, 8, 1, 1), (3,), dtype=torch.float32)
    last = segmentation_head(x, weight, bias, output="regions")
    painted = torch.zeros(2, 9, 9, dtype=torch.uint8)
    for number, inside in enumerate((F.conv2d(x, weight, bias).sigmoid() > 0.5).unbind(1), start=1):
        painted[inside] = number
    assert torch.equal(last, painted)
    assert set(last.unique().tolist()) == {0, 1, 2, 3}
    assert not last.requires_grad
    logits = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0]).view(1, 1, 4, 1)
    assert segmentation_head(logits, torch.ones(1, 1, 1, 1), output="regions").flatten().tolist() == [0, 1, 0, 0]


def test_registration():
    x, weight, bias = torch.randn(2, 8, 5, 4), torch.randn(4, 8, 1, 1), torch.randn(4)
    for output in ("logits", "probabilities", "labels", "regions"):
        operators.check_registration(OPS.segmentation_head.default, x, weight, bias, output, "torch")
    operators.check_registration(
        OPS.segmentation_head_backward.default, torch.randn(2, 4, 5, 4), x, weight, True, True, "torch"
    )


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="output is 'softmax'"):
        segmentation_head(torch.zeros(1, 2, 3, 3), torch.zeros(4, 2, 1, 1), output="softmax")
    with pytest.raises(ValueError, match="257 classes"):
        segmentation_head(torch.zeros(1, 2, 3, 3), torch.zeros(257, 2, 1, 1), output="labels")
