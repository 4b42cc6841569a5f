"""1x1 convolution to classes: the launchers against PyTorch's, every output and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastunet.functional.segmentation_head import finish
from fastunet.kernels import segmentation_head
from fastunet.kernels.segmentation_head import HeadConfig

from ..tolerance import assert_within_budget
from .conftest import DTYPES

SMALL = HeadConfig(block_p=32, block_c=16, num_warps=4, num_stages=2)
CASES = {  # (n, c, classes, h, w), configuration
    "four classes": ((2, 32, 4, 13, 17), None),
    "two classes": ((1, 64, 2, 16, 16), None),
    "three of 33 channels": ((1, 33, 3, 5, 7), SMALL),
    "one class": ((1, 100, 1, 4, 4), SMALL),
    "32 classes, tile of channels cut": ((3, 24, 32, 9, 5), SMALL),
    "17 classes of one channel": ((2, 1, 17, 15, 1), None),
    "many channels": ((1, 1024, 4, 3, 5), None),
    "one pixel": ((1, 48, 5, 1, 1), None),
    "no image": ((0, 8, 2, 3, 3), None),
}


def operands(shape, dtype, device):
    """x as a ReLU leaves it, weight, bias, dlogits."""
    generator = torch.Generator().manual_seed(0)
    n, c, classes, h, w = shape
    shapes = (n, c, h, w), (classes, c, 1, 1), (classes,), (n, classes, h, w)
    x, weight, bias, dlogits = (torch.randn(*s, generator=generator) for s in shapes)
    return [t.to(dtype).to(device) for t in (x.relu(), weight / c**0.5, bias, dlogits)]


def plain(x, weight, bias, dlogits, dtype):
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
    logits = F.conv2d(*leaves)
    dx, dw, db = torch.autograd.grad(logits, leaves, dlogits.to(dtype))
    logits = logits.detach()
    return {"logits": logits, "probabilities": logits.softmax(1), "dx": dx * (x > 0), "dw": dw, "db": db}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "config"), CASES.values(), ids=list(CASES))
def test_outputs_and_gradients(shape, config, dtype, device):
    x, weight, bias, dlogits = operands(shape, dtype, device)
    actual = {name: segmentation_head.forward(x, weight, bias, name, config) for name in ("logits", "probabilities")}
    actual["dx"], actual["dw"], actual["db"] = segmentation_head.backward(dlogits, x, weight, True, True, config)
    same_dtype, exact = (plain(x, weight, bias, dlogits, d) for d in (dtype, torch.float64))
    for name, tensor in actual.items():
        assert_within_budget(tensor, same_dtype[name], exact[name], name)


@pytest.mark.parametrize(("shape", "config"), CASES.values(), ids=list(CASES))
def test_labels(shape, config, device):
    x, weight, bias, _ = operands(shape, torch.float32, device)
    labels = segmentation_head.forward(x, weight, bias, "labels", config)
    assert labels.dtype == torch.uint8
    logits = segmentation_head.forward(x, weight, bias, "logits", config)
    assert torch.equal(labels.long(), logits.argmax(1))
    assert torch.equal(segmentation_head.forward(x, weight, bias, "regions", config), finish(logits, "regions"))


def test_labels_of_ties_and_nan(device):
    """The first maximum wins and NaN counts as the maximum, as in torch.argmax."""
    logits = torch.tensor([[2, 7, 7, 1], [3, 3, 3, 3], [9, torch.inf, torch.nan, 9], [torch.nan, 1, torch.nan, 2],
                           [-torch.inf, -torch.inf, -torch.inf, -torch.inf], [-5, -4, -torch.inf, -4]])  # fmt: skip
    x = torch.where(logits.isnan() | logits.isinf(), 0.0, logits).T.reshape(1, 4, 6, 1).to(device)
    identity = torch.eye(4, device=device).reshape(4, 4, 1, 1)
    finite = segmentation_head.forward(x, identity, None, "labels", SMALL)
    assert finite.flatten()[[0, 1, 5]].tolist() == [1, 0, 2]
    for row in logits:  # by the bias alone: a special value of x, times the zeros of the identity, is NaN everywhere
        label = segmentation_head.forward(torch.zeros_like(x), identity, row.to(device), "labels", SMALL)
        assert (label == row.argmax()).all(), row


def test_without_bias_or_mask(device):
    x, weight, _, dlogits = operands((2, 24, 3, 5, 7), torch.float32, device)
    logits = segmentation_head.forward(x, weight, None, "logits")
    assert_within_budget(logits, F.conv2d(x, weight), F.conv2d(x.double(), weight.double()), "logits")
    dx, _, db = segmentation_head.backward(dlogits, x, weight, False, False)
    assert db.shape == (0,)
    same, exact = (F.conv_transpose2d(dlogits.to(d), weight.to(d)) for d in (torch.float32, torch.float64))
    assert (exact[x == 0] != 0).any()
    assert_within_budget(dx, same, exact, "dx")


def test_strided_operands_and_repeats(device):
    x, weight, bias, dlogits = operands((2, 32, 4, 9, 7), torch.float16, device)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    flat = dlogits[:, :, :1, :1].expand_as(dlogits)
    first = segmentation_head.backward(flat, strided, weight, True, True, SMALL)
    for a, b in zip(first, segmentation_head.backward(flat.contiguous(), x, weight, True, True, SMALL)):
        assert torch.equal(a, b)
    for output in ("logits", "probabilities", "labels"):
        once = segmentation_head.forward(strided, weight, bias, output)
        assert torch.equal(once, segmentation_head.forward(x, weight, bias, output))


def test_unknown_output_is_named(device):
    x, weight, bias, _ = operands((1, 8, 2, 2, 2), torch.float32, device)
    with pytest.raises(ValueError, match="output is 'logit'; expected one of logits, probabilities, labels"):
        segmentation_head.forward(x, weight, bias, "logit")
