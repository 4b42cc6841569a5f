"""Nearest ×2 upsampling, 2×2 "same" convolution (padded at the bottom and right) and ReLU, without the upsampled image.

With ``k = flip(w) ⊛ ones(2, 2)``, a 3×3 kernel, the two steps are one transposed convolution:
``upconv(x) = conv_transpose2d(x, k, stride=2, padding=1, output_padding=1)``, 9 products a low-resolution pixel instead
of 16. If G is the gradient of k, that of w is ``flip(dw')`` with ``dw'[a, b] = G[a:a+2, b:b+2].sum()``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.arguments import checked
from fastunet.autograd import Context, Gradients, Inputs
from fastunet.dispatch import define, select_backend
from fastunet.functional._checks import checked_operands
from fastunet.functional._gradients import fake_weight_gradient, gradients, weight_gradient
from fastunet.functional._layout import empty_nhwc, nhwc
from fastunet.functional.relu import activation_, check_slope, masked

_OPS = torch.ops.fastunet


def transposed_kernel(weight: Tensor) -> Tensor:
    """k as (C_in, C_out, 3, 3) in NHWC memory; half-precision weights are summed in float32 and rounded once."""
    wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    bottom, top = wide.permute(1, 2, 3, 0).unbind(1)
    right, left = torch.stack((top, top + bottom, bottom), 1).unbind(2)
    return torch.stack((left, left + right, right), 2).to(weight.dtype).permute(0, 3, 1, 2)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> Tensor:
    y = F.conv_transpose2d(nhwc(x), transposed_kernel(weight), bias, stride=2, padding=1, output_padding=1)
    return activation_(nhwc(y), slope)


def _forward_packing(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> tuple[Tensor, Tensor]:
    packed = transposed_kernel(weight).permute(2, 3, 0, 1).flatten(0, 1).contiguous()
    return _forward(x, weight, bias, slope), packed


def _data_grad(dz: Tensor, weight: Tensor, x: Tensor, mask_x: bool, packed: Tensor | None) -> Tensor:
    x, k = nhwc(x), transposed_kernel(weight) if packed is None else packed.unflatten(0, (3, 3)).permute(2, 3, 0, 1)
    dx = nhwc(gradients(nhwc(dz), x, k, 2, 1, (True, False, False), transposed=True)[0])
    return masked(dx, x) if mask_x else dx


def torch_weight_grad(dz: Tensor, x: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """The PyTorch implementation of ``fastunet::upsample_conv_relu_weight_grad``."""
    g, db = weight_gradient(dz, x, (x.shape[1], dz.shape[1], 3, 3), 2, 1, has_bias, transposed=True)
    folded = g[..., :2, :2] + g[..., :2, 1:] + g[..., 1:, :2] + g[..., 1:, 1:]
    return nhwc(folded.flip(2, 3).transpose(0, 1)), db


def _setup(ctx: Context, inputs: Inputs, y: Tensor) -> None:
    x, weight, bias, slope, backend = inputs
    ctx.save_for_backward(x, weight, None if slope == 1 else y)
    ctx.options = slope, bias is not None, backend


def _differentiate(ctx: Context, dy: Tensor) -> Gradients:
    x, weight, y = ctx.saved_tensors
    slope, has_bias, backend = ctx.options
    dz = dy if y is None else _OPS.relu_backward(dy, y, slope, backend)
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = _OPS.upsample_conv_relu_data_grad(dz, weight, x, False, None, backend)
    if any(ctx.needs_input_grad[1:3]):
        dw, db = _OPS.upsample_conv_relu_weight_grad(dz, x, has_bias, backend)
    return dx, dw, db if has_bias else None, None, None


define(
    "upsample_conv_relu(Tensor x, Tensor weight, Tensor? bias, float slope, str backend) -> Tensor",
    torch_impl=_forward,
    triton_impl="upsample_conv:forward",
    fake=lambda x, weight, bias, slope: empty_nhwc(x, weight.shape[0], 2 * x.shape[2], 2 * x.shape[3]),
    setup=_setup,
    backward=_differentiate,
)
define(  # for a training step on kernels: k (9, C_in, C_out) too, so that the data gradient need not make it again
    "upsample_conv_relu_packing(Tensor x, Tensor weight, Tensor? bias, float slope, str backend) -> (Tensor, Tensor)",
    torch_impl=_forward_packing,
    triton_impl="upsample_conv:forward_packing",
    fake=lambda x, weight, bias, slope: (
        empty_nhwc(x, weight.shape[0], 2 * x.shape[2], 2 * x.shape[3]),
        weight.new_empty(9, weight.shape[1], weight.shape[0]),
    ),
)
define(  # packed, where it is given, is read in place of weight
    "upsample_conv_relu_data_grad(Tensor dz, Tensor weight, Tensor x, bool mask_x, Tensor? packed, str backend) "
    "-> Tensor",
    torch_impl=_data_grad,
    triton_impl="upsample_conv:data_grad",
    fake=lambda dz, weight, x, mask_x, packed: empty_nhwc(x, *x.shape[1:]),
)
define(
    "upsample_conv_relu_weight_grad(Tensor dz, Tensor x, bool has_bias, str backend) -> (Tensor, Tensor)",
    torch_impl=torch_weight_grad,
    triton_impl="upsample_conv:weight_grad",
    fake=lambda dz, x, has_bias: fake_weight_gradient(dz, (dz.shape[1], x.shape[1], 2, 2), has_bias),
)


@checked
def upsample_conv_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    slope: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """``relu(conv2d(pad(interpolate(x, scale_factor=2, mode="nearest"), (0, 1, 0, 1)), weight, bias))``.

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in, 2, 2).
        bias: (C_out,) or None.
        slope: what negative results are multiplied by: 0 is ReLU, more LeakyReLU, 1 none.
        backend: "auto", "triton" or "torch".

    Returns:
        (N, C_out, 2H, 2W).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; the message shows them.
    """
    x, weight, bias = checked_operands("upsample_conv_relu", x, weight, bias, 2)
    slope = check_slope("upsample_conv_relu", slope)
    return _OPS.upsample_conv_relu(x, weight, bias, slope, select_backend(backend, "upsample_conv_relu", x))
