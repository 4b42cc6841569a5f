"""3×3 convolution with stride 2, bias and activation, of one source: what ``conv_relu(stride=2)`` runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.autograd import Context, Gradients, Inputs
from fastunet.dispatch import define
from fastunet.functional import _gradients
from fastunet.functional._layout import empty_nhwc, nhwc
from fastunet.functional.relu import activation_

_OPS = torch.ops.fastunet


def torch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, pad: int, slope: float) -> Tensor:
    """The PyTorch implementation of ``fastunet::conv_strided``."""
    return activation_(nhwc(F.conv2d(nhwc(x), weight, bias, stride=2, padding=pad)), slope)


def _data_grad(dz: Tensor, weight: Tensor, x: Tensor, pad: int) -> Tensor:
    return nhwc(_gradients.gradients(nhwc(dz), nhwc(x), weight, 2, pad, (True, False, False))[0])


def _weight_grad(dz: Tensor, x: Tensor, pad: int, has_bias: bool) -> tuple[Tensor, Tensor]:
    dw, db = _gradients.weight_gradient(dz, x, (dz.shape[1], x.shape[1], 3, 3), 2, pad, has_bias)
    return nhwc(dw), db


def output_size(x: Tensor, pad: int, stride: int) -> tuple[int, int]:
    """Height and width of the convolution of ``x``."""
    height, width = ((side + 2 * pad - 3) // stride + 1 for side in x.shape[2:])
    return height, width


def unsupported(stride: int, pad: int) -> str | None:
    """Why no kernel runs a convolution, if none does."""
    return "a valid convolution of stride 2 has no kernel" if stride == 2 and pad == 0 else None


def gradients(
    dz: Tensor, x: Tensor, weight: Tensor, pad: int, needed: Sequence[bool], backend: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db) from dz, None where none is ``needed``."""
    dx = dw = db = None
    if needed[0]:
        dx = _OPS.conv_strided_data_grad(dz, weight, x, pad, backend)
    if needed[1] or needed[2]:
        dw, db = _OPS.conv_strided_weight_grad(dz, x, pad, needed[2], backend)
    return dx, dw, db if needed[2] else None


def _setup(ctx: Context, inputs: Inputs, y: Tensor) -> None:
    x, weight, _, pad, slope, backend = inputs
    ctx.save_for_backward(x, weight, None if slope == 1 else y)
    ctx.options = pad, slope, backend


def _differentiate(ctx: Context, dy: Tensor) -> Gradients:
    x, weight, y = ctx.saved_tensors
    pad, slope, backend = ctx.options
    dz = dy if y is None else _OPS.relu_backward(dy, y, slope, backend)
    return *gradients(dz, x, weight, pad, ctx.needs_input_grad[:3], backend), None, None, None


define(
    "conv_strided(Tensor x, Tensor weight, Tensor? bias, int pad, float slope, str backend) -> Tensor",
    torch_impl=torch_forward,
    triton_impl="conv_strided:forward",
    fake=lambda x, weight, bias, pad, slope: empty_nhwc(x, weight.shape[0], *output_size(x, pad, 2)),
    setup=_setup,
    backward=_differentiate,
)
define(
    "conv_strided_data_grad(Tensor dz, Tensor weight, Tensor x, int pad, str backend) -> Tensor",
    torch_impl=_data_grad,
    triton_impl="conv_strided:data_grad",
    fake=lambda dz, weight, x, pad: empty_nhwc(x, *x.shape[1:]),
)
define(
    "conv_strided_weight_grad(Tensor dz, Tensor x, int pad, bool has_bias, str backend) -> (Tensor, Tensor)",
    torch_impl=_weight_grad,
    triton_impl="conv_strided:weight_grad",
    fake=lambda dz, x, pad, has_bias: _gradients.fake_weight_gradient(dz, (dz.shape[1], x.shape[1], 3, 3), has_bias),
)
