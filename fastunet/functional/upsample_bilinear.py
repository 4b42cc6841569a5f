"""Bilinear ×2 upsampling; on a GPU its gradient gathers, so that repeats are bit-identical, which PyTorch's are not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.arguments import checked
from fastunet.autograd import Context, Gradients, Inputs
from fastunet.dispatch import define, select_backend
from fastunet.functional._checks import check_image
from fastunet.functional._layout import empty_nhwc, nhwc

_OPS = torch.ops.fastunet


def _forward(x: Tensor, align_corners: bool) -> Tensor:
    return nhwc(F.interpolate(nhwc(x), scale_factor=2.0, mode="bilinear", align_corners=align_corners))


def _backward(dy: Tensor, align_corners: bool) -> Tensor:
    n, c, height, width = dy.shape
    small = [n, c, height // 2, width // 2]
    backward = torch.ops.aten.upsample_bilinear2d_backward
    return nhwc(backward(nhwc(dy), [height, width], small, align_corners, 2.0, 2.0))


def _setup(ctx: Context, inputs: Inputs, y: Tensor) -> None:
    ctx.options = inputs[1:]


def _differentiate(ctx: Context, dy: Tensor) -> Gradients:
    return _OPS.upsample_bilinear2d_backward(dy, *ctx.options), None, None


define(
    "upsample_bilinear2d(Tensor x, bool align_corners, str backend) -> Tensor",
    torch_impl=_forward,
    triton_impl="upsample_bilinear:forward",
    fake=lambda x, align_corners: empty_nhwc(x, x.shape[1], 2 * x.shape[2], 2 * x.shape[3]),
    setup=_setup,
    backward=_differentiate,
)
define(
    "upsample_bilinear2d_backward(Tensor dy, bool align_corners, str backend) -> Tensor",
    torch_impl=_backward,
    triton_impl="upsample_bilinear:backward",
    fake=lambda dy, align_corners: empty_nhwc(dy, dy.shape[1], dy.shape[2] // 2, dy.shape[3] // 2),
)


@checked
def upsample_bilinear2d(x: torch.Tensor, *, align_corners: bool = False, backend: str = "auto") -> torch.Tensor:
    """``nn.Upsample(scale_factor=2, mode="bilinear", align_corners=…)`` of (N, C, H, W): (N, C, 2H, 2W).

    Args:
        x: (N, C, H, W); floating point, fastest in ``channels_last``.
        align_corners: True maps corner pixels onto corner pixels, False edges onto edges.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: ``x`` is not a floating (N, C, H, W) tensor, or the backend cannot run.
    """
    check_image("upsample_bilinear2d", x)
    return _OPS.upsample_bilinear2d(x, align_corners, select_backend(backend, "upsample_bilinear2d", x))
