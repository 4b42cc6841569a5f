"""2×2 transposed convolution with stride 2 and bias: each input pixel becomes a 2×2 block, without overlap."""

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
from fastunet.functional.relu import masked

_OPS = torch.ops.fastunet


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nhwc(F.conv_transpose2d(nhwc(x), weight, bias, stride=2))


def _data_grad(dy: Tensor, weight: Tensor, x: Tensor, mask_x: bool) -> Tensor:
    x = nhwc(x)
    dx = nhwc(gradients(nhwc(dy), x, weight, 2, 0, (True, False, False), transposed=True)[0])
    return masked(dx, x) if mask_x else dx


def torch_weight_grad(dy: Tensor, x: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """The PyTorch implementation of ``fastunet::conv_transpose2d_weight_grad``."""
    dw, db = weight_gradient(dy, x, (x.shape[1], dy.shape[1], 2, 2), 2, 0, has_bias, transposed=True)
    return nhwc(dw), db


def _setup(ctx: Context, inputs: Inputs, y: Tensor) -> None:
    x, weight, bias, backend = inputs
    ctx.save_for_backward(x, weight)
    ctx.options = bias is not None, backend


def _differentiate(ctx: Context, dy: Tensor) -> Gradients:
    x, weight = ctx.saved_tensors
    has_bias, backend = ctx.options
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = _OPS.conv_transpose2d_data_grad(dy, weight, x, False, backend)
    if any(ctx.needs_input_grad[1:3]):
        dw, db = _OPS.conv_transpose2d_weight_grad(dy, x, has_bias, backend)
    return dx, dw, db if has_bias else None, None


define(
    "conv_transpose2d(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    torch_impl=_forward,
    triton_impl="conv_transpose:forward",
    fake=lambda x, weight, bias: empty_nhwc(x, weight.shape[1], 2 * x.shape[2], 2 * x.shape[3]),
    setup=_setup,
    backward=_differentiate,
)
define(
    "conv_transpose2d_data_grad(Tensor dy, Tensor weight, Tensor x, bool mask_x, str backend) -> Tensor",
    torch_impl=_data_grad,
    triton_impl="conv_transpose:data_grad",
    fake=lambda dy, weight, x, mask_x: empty_nhwc(x, *x.shape[1:]),
)
define(
    "conv_transpose2d_weight_grad(Tensor dy, Tensor x, bool has_bias, str backend) -> (Tensor, Tensor)",
    torch_impl=torch_weight_grad,
    triton_impl="conv_transpose:weight_grad",
    fake=lambda dy, x, has_bias: fake_weight_gradient(dy, (x.shape[1], dy.shape[1], 2, 2), has_bias),
)


@checked
def conv_transpose2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str = "auto"
) -> torch.Tensor:
    """``y[n, k, 2i+a, 2j+b] = bias[k] + Σ_c x[n, c, i, j] · weight[c, k, a, b]``.

    Args:
        x: (N, C_in, H, W).
        weight: (C_in, C_out, 2, 2).
        bias: (C_out,) or None.
        backend: "auto", "triton" or "torch".

    Returns:
        (N, C_out, 2H, 2W).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; the message shows them.
    """
    x, weight, bias = checked_operands("conv_transpose2d", x, weight, bias, 2, transposed=True)
    return _OPS.conv_transpose2d(x, weight, bias, select_backend(backend, "conv_transpose2d", x))
