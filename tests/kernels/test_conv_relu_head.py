"""The 3×3 convolution with the segmentation head in its epilogue: logits, probabilities, labels and regions."""

import pytest
import torch
import torch.nn.functional as F

from fastunet.functional.segmentation_head import finish
from fastunet.kernels.conv import forward as conv_relu

from ..tolerance import assert_within_budget
from .conftest import COMPILED
from .conv_sources import BATCH_BOX, BOX, FOUR_STACKED, POINTER, ROWS, STACKED, Case, operands, reference


@pytest.mark.parametrize("output", ["logits", "probabilities", "labels"])
@pytest.mark.parametrize("case", [
    Case(POINTER, 2, 0, 33, 20, 5, 7),
    Case(BOX, 1, 8, 24, 64, 6, 17),
    Case(BATCH_BOX, 3, 0, 16, 40, 7, 9, pad=0),
    Case(ROWS, 1, 0, 24, 64, 7, 17),
    Case(STACKED, 2, 8, 24, 32, 7, 18, crop=2),
    Case(FOUR_STACKED, 1, 0, 32, 16, 8, 12),
    Case(None, 1, 0, 32, 100, 3, 5),
    Case(None, 1, 0, 2, 8, 3, 5),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("classes", [1, 4, 17, 32])
def test_forward_head(case, output, classes, device):
    if case.config is not STACKED and classes in (1, 17) and output != "logits":
        pytest.skip("padded class counts differ from full ones only in the epilogue, which all variants share")
    check(case, output, torch.float32, classes, device)


@pytest.mark.parametrize("case, output", [
    (Case(POINTER, 2, 0, 33, 20, 5, 7), "logits"), (Case(BOX, 1, 8, 24, 64, 6, 17), "probabilities"),
    (Case(ROWS, 1, 0, 24, 64, 7, 17), "logits"), (Case(STACKED, 2, 8, 24, 32, 7, 18, crop=2), "probabilities"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, id="bf16", marks=COMPILED)])
def test_forward_head_of_rounded_features(case, output, dtype, device):
    """Whose labels are not certain; networks' labels are compared where they are."""
    check(case, output, dtype, 4, device)


def check(case, output, dtype, classes, device):
    x, skip, weight, bias = operands(case, dtype, device)
    head_weight = (torch.randn(classes, case.c_out, 1, 1, device=device) / case.c_out**0.5).to(dtype)
    head_bias = torch.randn(classes, device=device).to(dtype)
    out = conv_relu.forward_head(x, skip, weight, bias, case.pad, head_weight, head_bias, output, case.config)
    same, exact = (
        F.conv2d(reference(x, skip, weight, bias, case.pad, True, d), head_weight.to(d), head_bias.to(d))
        for d in (dtype, torch.float64)
    )
    if output == "labels":
        assert out.dtype == torch.uint8
        assert torch.equal(out.long(), exact.argmax(1))
    elif output == "probabilities":
        assert_within_budget(out, same.softmax(1), exact.softmax(1), output)
    else:
        assert_within_budget(out, same, exact, output)


@pytest.mark.parametrize("case", [Case(BOX, 1, 0, 24, 64, 6, 17)], ids=str)
def test_head_reads_features_rounded_to_the_activations_dtype(case, device):
    """The fused head equals a 1×1 convolution of the features as `forward` writes them."""
    x, _, weight, bias = operands(case, torch.float16, device)
    head_weight = torch.full((2, 64, 1, 1), 1.0, device=device, dtype=torch.float16)
    features = conv_relu.forward(x, None, weight, bias, 1, 0.0, BOX)
    out = conv_relu.forward_head(x, None, weight, bias, 1, head_weight, None, "logits", BOX)
    assert torch.equal(out, features.double().sum(1, keepdim=True).expand(-1, 2, -1, -1).to(torch.float16))


@pytest.mark.parametrize("case", [Case(POINTER, 2, 0, 33, 20, 5, 7), Case(STACKED, 2, 8, 24, 32, 7, 18, crop=2)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("classes", [1, 3])
def test_regions_of_the_head(case, classes, device):
    x, skip, weight, bias = operands(case, torch.float32, device)
    head, operator = torch.randn(classes, case.c_out, 1, 1, device=device), conv_relu.forward_head
    centre = operator(x, skip, weight, bias, case.pad, head, None, "logits", case.config).mean((0, 2, 3))
    logits, regions = (
        operator(x, skip, weight, bias, case.pad, head, -centre, output, case.config)
        for output in ("logits", "regions")
    )
    assert (logits > 0).any()
    assert torch.equal(regions, finish(logits, "regions"))


@pytest.mark.parametrize("case", [Case(FOUR_STACKED, 1, 0, 8, 16, 2, 4)], ids=str)
def test_labels_take_the_first_maximum_and_nan_above_all(case, device):
    x, _, weight, _ = operands(case, torch.float32, device)
    zero = torch.zeros(5, 16, 1, 1, device=device)
    for head_bias, label in (([0, 2, 1, 2, 0], 1), ([0, 2, float("nan"), 3, 0], 2), ([float("-inf")] * 5, 0)):
        bias = torch.tensor(head_bias, device=device, dtype=torch.float32)
        labels = conv_relu.forward_head(x, None, weight, None, 1, zero, bias, "labels", case.config)
        assert (labels == label).all()


def test_head_of_too_many_features_is_an_error(device):
    x, weight = torch.randn(1, 8, 4, 4, device=device), torch.randn(129, 8, 3, 3, device=device)
    with pytest.raises(ValueError, match="at most 128 features, not 129"):
        conv_relu.forward_head(x, None, weight, None, 1, torch.randn(4, 129, 1, 1, device=device), None, "labels")
