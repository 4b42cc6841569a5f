"""Derivatives of every kind on the Triton backend, and results whose memory is what compilation was told."""

from __future__ import annotations

import functools

import pytest
import torch

from fastunet import dispatch
from fastunet.kernels import _launch
from tests import differentiation


@pytest.mark.parametrize("name", differentiation.OPERATORS)
def test_operators(name, device):
    function, literal, shapes = differentiation.OPERATORS[name]
    function = functools.partial(function, backend="triton")
    tensors = [t.to(device) for t in differentiation.random(*shapes, dtype=torch.float32)]
    differentiation.check_second_derivatives(function, literal, tensors)


def test_networks():
    differentiation.check_network_penalty("brats, shallow", "triton", torch.float32)
    differentiation.check_network_torch_func("brats, shallow", "triton", torch.float32)


# tracing, which takes longest, goes the same way through both: the interpreter needs one
@pytest.mark.parametrize("name", ["brats, shallow"] + ["isbi"] * (not _launch.INTERPRETED))
def test_training_compiles(name):
    compiler = "aot_eager" if _launch.INTERPRETED else "inductor"
    differentiation.check_compiled_training(name, "triton", compiler)


def calls():
    """Arguments of every operator of images; the Dice operators' results are dense in any case."""
    (x, skip, dz, up, w, wide, wt, wu, head, b, packed) = differentiation.random(
        (2, 3, 6, 4), (2, 2, 8, 6), (2, 4, 6, 4), (2, 4, 12, 8), (4, 3, 3, 3), (4, 5, 3, 3), (3, 4, 2, 2), (4, 3, 2, 2),
        (4, 3, 1, 1), (4,), (9, 3, 4), dtype=torch.float32,
    )  # fmt: skip
    pooled = dz[..., :3, :2]
    return {
        "conv_relu": (x, skip, wide, b, 1, 0.1),
        "conv_norm": (x, skip, wide, b, b, None, 1, 1, 2, True, 1e-5, 0.1, True, ""),
        "norm_backward": (dz, pooled, dz, b, None, b[None], b[None].square(), b[:0], 1e-5, 0.1, ""),
        "conv_relu_pool": (x, w, b, 1, 0.0),
        "conv_relu_data_grad": (dz, wide, x, skip, 1, True, True),
        "conv_relu_weight_grad": (dz, x, skip, 1, True),
        "block_weight_grads": (dz, x, skip, dz, dz, up, x, 1, False),
        "conv_strided": (x, w, b, 1, 0.1),
        "conv_strided_data_grad": (pooled, w, x, 1),
        "conv_strided_weight_grad": (pooled, x, 1, True),
        "max_pool2d": (x,),
        "max_pool2d_backward": (pooled, dz, dz, 0.0),
        "relu_backward": (dz, dz, 0.1),
        "conv_transpose2d": (x, wt, b),
        "conv_transpose2d_data_grad": (up, wt, x, True),
        "conv_transpose2d_weight_grad": (up, x, True),
        "upsample_conv_relu": (x, wu, b, 0.0),
        "upsample_conv_relu_packing": (x, wu, b, 0.0),
        "upsample_conv_relu_data_grad": (up, wu, x, True, packed),
        "upsample_conv_relu_weight_grad": (up, x, True),
        "upsample_bilinear2d": (x, True),
        "upsample_bilinear2d_backward": (up, True),
        "segmentation_head": (x, head, b, "probabilities"),
        "segmentation_head_backward": (dz, x, head, False, True),
        "conv_relu_head": (x, None, w, b, 1, torch.ones(5, 4, 1, 1), None, "logits"),
    }


LAYOUTS = {
    "NCHW": lambda t: t.contiguous(),
    "NHWC": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", calls())
def test_results_are_as_declared(name, backend, layout, device):
    """Shape, dtype and strides of each result are those of the operator's fake, which compiled code asserts."""
    change = LAYOUTS[layout]
    arguments = [
        (change(a) if a.dim() == 4 else a).to(device) if isinstance(a, torch.Tensor) else a for a in calls()[name]
    ]
    declared = dispatch.OPERATORS[name].fake(*arguments)
    found = getattr(torch.ops.fastunet, name)(*arguments, backend)
    pairs = zip(found, declared, strict=True) if isinstance(found, tuple) else [(found, declared)]
    for result, fake in pairs:
        assert (result.shape, result.dtype, result.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_every_operator_is_compared():
    losses = {"dice_sums", "dice_sums_grad", "dice_region_sums", "dice_region_sums_grad", "dice_rule"}
    assert set(dispatch.OPERATORS) - set(calls()) == losses | {"confusion_counts"}
