"""2×2 max-pool with stride 2, whose backward recomputes the maximum instead of keeping an index tensor.

By itself it is so as a kernel only; on the PyTorch backend it is PyTorch's own, derivative included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.arguments import checked
from fastunet.autograd import Context, Gradients, Inputs, transformed
from fastunet.dispatch import define, select_backend
from fastunet.functional._checks import check_image
from fastunet.functional._layout import empty_nhwc, nhwc
from fastunet.functional.relu import masked

_OPS = torch.ops.fastunet


def pooled_shape(height: int, width: int) -> tuple[int, int]:
    """Height and width after pooling; an odd last row or column is dropped."""
    return height // 2, width // 2


def _forward(x: Tensor) -> Tensor:
    return nhwc(F.max_pool2d(nhwc(x), 2))


def unpooled(d_pooled: Tensor, d_skip: Tensor | None, y: Tensor, slope: float) -> Tensor:
    """The PyTorch implementation of ``fastunet::max_pool2d_backward``."""
    y = nhwc(y)
    _, indices = torch.ops.aten.max_pool2d_with_indices(y, [2, 2])
    dz = torch.ops.aten.max_pool2d_with_indices_backward(
        nhwc(d_pooled), y, [2, 2], [2, 2], [0, 0], [1, 1], False, indices
    )
    dz = nhwc(dz)
    if d_skip is not None:
        dz += d_skip
    return masked(dz, y, slope)


def _setup(ctx: Context, inputs: Inputs, output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx: Context, d_pooled: Tensor) -> Gradients:
    return _OPS.max_pool2d_backward(d_pooled, None, *ctx.saved_tensors, 1.0, ctx.backend), None


define(
    "max_pool2d(Tensor x, str backend) -> Tensor",
    torch_impl=_forward,
    triton_impl="max_pool:forward",
    fake=lambda x: empty_nhwc(x, x.shape[1], *pooled_shape(*x.shape[2:])),
    setup=_setup,
    backward=_differentiate,
)
define(
    "max_pool2d_backward(Tensor d_pooled, Tensor? d_skip, Tensor y, float slope, str backend) -> Tensor",
    torch_impl=unpooled,
    triton_impl="max_pool:backward",
    fake=lambda d_pooled, d_skip, y, slope: empty_nhwc(y, *y.shape[1:]),
)


@checked
def max_pool2d(x: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """2×2 maximum with stride 2: (N, C, H, W) → (N, C, H // 2, W // 2); the first of equal values gets the gradient.

    Raises:
        ValueError: ``x`` is not a floating (N, C, H, W) tensor with H, W ≥ 2.
    """
    check_image("max_pool2d", x)
    if min(x.shape[2:]) < 2:
        raise ValueError(f"max_pool2d: x has shape {tuple(x.shape)}; both sides must be at least 2")
    backend = select_backend(backend, "max_pool2d", x)
    if backend == "torch" and not transformed():  # its derivative keeps the indices, which cost a pass to find again
        return _forward(x)
    return _OPS.max_pool2d(x, backend)
