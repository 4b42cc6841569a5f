"""3×3 convolution + bias + ReLU, of one source or of [skip, x] without their concatenation, and with its max-pool.

With ``w`` (C_out, C_skip + C_x, 3, 3): ``y = relu(conv(skip, w[:, :C_skip]) + conv(x, w[:, C_skip:]) + bias)``.
The gradient of the pre-activation, ``dz = dy * (y > 0)``, needs y alone, which the next layer keeps anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.arguments import checked
from fastunet.autograd import Context, Gradients, Inputs, tracked
from fastunet.dispatch import autocast_operands, define, select_backend
from fastunet.functional import _gradients, _weight_products
from fastunet.functional._checks import check_alike, check_image
from fastunet.functional._layout import empty_nhwc, like_weight, nhwc
from fastunet.functional._onednn import accumulates, add_convolution
from fastunet.functional.conv_strided import unsupported
from fastunet.functional.max_pool import pooled_shape
from fastunet.functional.relu import activation_, check_slope, masked
from fastunet.reference import centre_crop

_OPS = torch.ops.fastunet
PADDINGS = {"same": 1, "valid": 0}


def _slices(weight: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor]:
    """The skip's and x's parts of the weight."""
    split = 0 if skip is None else skip.shape[1]
    return weight[:, :split], weight[:, split:]


def torch_forward(
    x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor | None, pad: int, slope: float
) -> Tensor:
    """The PyTorch implementation of ``fastunet::conv_relu``."""
    if skip is not None and accumulates(x) and not tracked(x, skip, weight, bias):
        skip_weight, x_weight = _slices(weight, skip)
        y = nhwc(F.conv2d(nhwc(centre_crop(skip, *x.shape[2:])), skip_weight, bias, padding=pad))
        y = add_convolution(y, nhwc(x), x_weight, pad)
    else:
        x = like_weight(x, weight) if skip is None else _joined(x, skip)
        y = nhwc(F.conv2d(x, weight, bias, padding=pad))
    return activation_(y, slope)


def _joined(x: Tensor, skip: Tensor | None) -> Tensor:
    """NHWC memory of x, or of [centre_crop(skip), x], for the calls that know one source only."""
    if skip is None:
        return nhwc(x)
    _, channels, height, width = x.shape
    if tracked(x, skip):
        return nhwc(torch.cat([centre_crop(skip, height, width), x], dim=1))
    joined = empty_nhwc(x, skip.shape[1] + channels, height, width)
    return torch.cat([centre_crop(skip, height, width), x], dim=1, out=joined)


def _forward_pool(
    x: Tensor, weight: Tensor, bias: Tensor | None, pad: int, slope: float
) -> tuple[Tensor, Tensor]:
    y = torch_forward(x, None, weight, bias, pad, slope)
    return y, nhwc(F.max_pool2d(y, 2))


def _data_grad(
    dz: Tensor, weight: Tensor, x: Tensor, skip: Tensor | None, pad: int, mask_x: bool, mask_skip: bool
) -> tuple[Tensor, Tensor]:
    skip_weight, x_weight = _slices(weight, skip)
    dx = _source_gradient(dz, x, x_weight, pad)
    dx = masked(dx, x) if mask_x else dx
    if skip is None:
        return dx, dx.new_empty(0)
    crop = centre_crop(skip, *x.shape[2:])
    d_crop = _source_gradient(dz, crop, skip_weight, pad)
    d_crop = masked(d_crop, crop) if mask_skip else d_crop
    if crop.shape == skip.shape:
        return dx, d_crop
    dskip = empty_nhwc(skip, *skip.shape[1:]).zero_()
    centre_crop(dskip, *x.shape[2:]).copy_(d_crop)
    return dx, dskip


def _source_gradient(dz: Tensor, x: Tensor, weight: Tensor, pad: int) -> Tensor:
    dz, x = like_weight(dz, weight), like_weight(x, weight)
    return nhwc(_gradients.gradients(dz, x, weight, 1, pad, (True, False, False))[0])


def torch_weight_grad(
    dz: Tensor, x: Tensor, skip: Tensor | None, pad: int, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """The PyTorch implementation of ``fastunet::conv_relu_weight_grad``."""
    sources = [x] if skip is None else [centre_crop(skip, *x.shape[2:]), x]
    if _weight_products.suits(dz, sources):
        return _weight_products.weight_gradient(nhwc(dz), sources, pad, has_bias)
    x = _joined(x, skip)
    dw, db = _gradients.weight_gradient(dz, x, (dz.shape[1], x.shape[1], 3, 3), 1, pad, has_bias)
    return nhwc(dw), db


def fake_forward(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor | None, pad: int, slope: float) -> Tensor:
    """The shape and strides of ``fastunet::conv_relu``."""
    return empty_nhwc(x, weight.shape[0], x.shape[2] + 2 * pad - 2, x.shape[3] + 2 * pad - 2)


def _fake_forward_pool(
    x: Tensor, weight: Tensor, bias: Tensor | None, pad: int, slope: float
) -> tuple[Tensor, Tensor]:
    y = fake_forward(x, None, weight, bias, pad, slope)
    return y, empty_nhwc(x, weight.shape[0], *pooled_shape(*y.shape[2:]))


def _fake_data_grad(
    dz: Tensor, weight: Tensor, x: Tensor, skip: Tensor | None, pad: int, mask_x: bool, mask_skip: bool
) -> tuple[Tensor, Tensor]:
    return empty_nhwc(x, *x.shape[1:]), x.new_empty(0) if skip is None else empty_nhwc(skip, *skip.shape[1:])


def fake_weight_grad(
    dz: Tensor, x: Tensor, skip: Tensor | None, pad: int, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """The shapes and strides of ``fastunet::conv_relu_weight_grad``."""
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    return _gradients.fake_weight_gradient(dz, (dz.shape[1], channels, 3, 3), has_bias)


def _setup(ctx: Context, inputs: Inputs, y: Tensor) -> None:
    x, skip, weight, bias, pad, slope, backend = inputs
    ctx.save_for_backward(x, skip, weight, None if slope == 1 else y)
    ctx.slope = slope
    ctx.options = pad, bias is not None, backend


def _differentiate(ctx: Context, dy: Tensor) -> Gradients:
    x, skip, weight, y = ctx.saved_tensors
    dz = dy if y is None else _OPS.relu_backward(dy, y, ctx.slope, ctx.options[-1])
    return *gradients(ctx, dz, x, skip, weight, *ctx.needs_input_grad[:4]), None, None, None


def _setup_pool(ctx: Context, inputs: Inputs, outputs: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, pad, slope, backend = inputs
    ctx.save_for_backward(x, weight, outputs[0])
    ctx.options = pad, bias is not None, backend
    ctx.slope = slope


def _differentiate_pool(ctx: Context, dy: Tensor, d_pooled: Tensor) -> Gradients:
    x, weight, y = ctx.saved_tensors
    dz = _OPS.max_pool2d_backward(d_pooled, dy, y, ctx.slope, ctx.options[-1])
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    dx, _, dw, db = gradients(ctx, dz, x, None, weight, need_x, False, need_weight, need_bias)
    return dx, dw, db, None, None, None


def gradients(
    ctx: Context, dz: Tensor, x: Tensor, skip: Tensor | None, weight: Tensor, need_x: bool, need_skip: bool,
    need_weight: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dskip, dw, db) from dz, None where none is needed."""
    pad, has_bias, backend = ctx.options
    dx = dskip = dw = db = None
    if need_x or need_skip:
        dx, dskip = _OPS.conv_relu_data_grad(dz, weight, x, skip, pad, False, False, backend)
    if need_weight or need_bias:
        dw, db = _OPS.conv_relu_weight_grad(dz, x, skip, pad, has_bias, backend)
    return dx, dskip if skip is not None else None, dw, db if has_bias else None


define(
    "conv_relu(Tensor x, Tensor? skip, Tensor weight, Tensor? bias, int pad, float slope, str backend) -> Tensor",
    torch_impl=torch_forward,
    triton_impl="conv.forward:forward",
    fake=fake_forward,
    setup=_setup,
    backward=_differentiate,
)
define(
    "conv_relu_pool(Tensor x, Tensor weight, Tensor? bias, int pad, float slope, str backend) -> (Tensor, Tensor)",
    torch_impl=_forward_pool,
    triton_impl="conv.forward:forward_pool",
    fake=_fake_forward_pool,
    setup=_setup_pool,
    backward=_differentiate_pool,
)
define(
    "conv_relu_data_grad(Tensor dz, Tensor weight, Tensor x, Tensor? skip, int pad, bool mask_x, bool mask_skip, "
    "str backend) -> (Tensor, Tensor)",
    torch_impl=_data_grad,
    triton_impl="conv.data_grad:data_grad",
    fake=_fake_data_grad,
)
define(
    "conv_relu_weight_grad(Tensor dz, Tensor x, Tensor? skip, int pad, bool has_bias, str backend) -> (Tensor, Tensor)",
    torch_impl=torch_weight_grad,
    triton_impl="conv.weight_grad:weight_grad",
    fake=fake_weight_grad,
)


@checked
def conv_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    skip: torch.Tensor | None = None,
    padding: str = "same",
    stride: int = 1,
    relu: bool = True,
    slope: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """ReLU of the 3×3 convolution of ``concat([centre_crop(skip), x], 1)``, which is never built on a GPU.

    Args:
        x: (N, C_x, H, W); floating point, fastest in ``channels_last``.
        weight: (C_out, C_skip + C_x, 3, 3), the skip's channels first.
        bias: (C_out,) or None.
        skip: (N, C_skip, H_s, W_s) with H_s ≥ H and W_s ≥ W, or None.
        padding: "same" (zeros around the image) or "valid".
        stride: 1, or 2 of one source; "valid" convolutions of stride 2 are PyTorch's on every backend.
        relu: False leaves the convolution as it is, like a slope of 1.
        slope: what negative results are multiplied by: 0 is ReLU, more LeakyReLU.
        backend: "auto", "triton" or "torch".

    Returns:
        (N, C_out, H, W), or (N, C_out, H − 2, W − 2) under "valid"; with stride 2 every second row and column of it.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; the message shows them.
    """
    pad = check_conv("conv_relu", x, skip, weight, bias, padding)
    check_stride("conv_relu", stride, skip)
    x, skip, weight, bias = autocast_operands(x, skip, weight, bias)
    check_conv_dtypes("conv_relu", x, skip, weight, bias)
    slope = check_slope("conv_relu", slope) if relu else 1.0
    backend = select_backend(backend, "conv_relu", x, unsupported(stride, pad))
    if stride == 2:
        return _OPS.conv_strided(x, weight, bias, pad, slope, backend)
    return _OPS.conv_relu(x, skip, weight, bias, pad, slope, backend)


@checked
def conv_relu_pool(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    padding: str = "same",
    slope: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`conv_relu` and its 2×2 max-pool (stride 2, odd sides floor), in one pass on a GPU.

    Returns:
        ``(y, pooled)``: (N, C_out, H', W') and (N, C_out, H' // 2, W' // 2).
    """
    pad = check_conv("conv_relu_pool", x, None, weight, bias, padding)
    if min(x.shape[2:]) + 2 * pad - 2 < 2:
        raise ValueError(f"conv_relu_pool: x has shape {tuple(x.shape)}; its convolution is too small to pool")
    x, weight, bias = autocast_operands(x, weight, bias)
    check_conv_dtypes("conv_relu_pool", x, None, weight, bias)
    slope = check_slope("conv_relu_pool", slope)
    return _OPS.conv_relu_pool(x, weight, bias, pad, slope, select_backend(backend, "conv_relu_pool", x))


def check_conv(operator: str, x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor | None, padding: str) -> int:
    """Validates the shapes of a 3×3 convolution's operands and returns the padding in pixels."""
    check_image(operator, x)
    if padding not in PADDINGS:
        raise ValueError(f"{operator}: padding is {padding!r}; expected 'same' or 'valid'")
    if padding == "valid" and min(x.shape[2:]) < 3:
        raise ValueError(f"{operator}: x has shape {tuple(x.shape)}, too small for a valid 3×3 convolution")
    channels = x.shape[1]
    if skip is not None:
        check_image(operator, skip, "skip")
        if skip.shape[0] != x.shape[0] or skip.shape[2] < x.shape[2] or skip.shape[3] < x.shape[3]:
            raise ValueError(
                f"{operator}: skip of shape {tuple(skip.shape)} cannot be cropped to x of shape {tuple(x.shape)}"
            )
        channels += skip.shape[1]
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (channels, 3, 3):
        raise ValueError(f"{operator}: weight must be (C_out, {channels}, 3, 3), got {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{operator}: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    return PADDINGS[padding]


def check_stride(operator: str, stride: int, skip: Tensor | None) -> None:
    """Raises unless ``stride`` is 1, or 2 of one source."""
    if stride not in (1, 2):
        raise ValueError(f"{operator}: stride is {stride!r}; expected 1 or 2")
    if stride == 2 and skip is not None:
        raise ValueError(f"{operator}: stride 2 takes one source, but skip is given")


def check_conv_dtypes(operator: str, x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    """Raises unless the operands share x's dtype and device; called after autocast."""
    for name, tensor in (("skip", skip), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_alike(operator, name, tensor, x)
