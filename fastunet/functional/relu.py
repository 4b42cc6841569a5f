"""The gradient of ReLU from its own output, for backward passes that keep no pre-activation."""

from __future__ import annotations

import torch

from fastunet.dispatch import define
from fastunet.functional._layout import empty_nhwc, nhwc


def _backward(dy, y):
    return torch.ops.aten.threshold_backward(nhwc(dy), nhwc(y), 0)


def masked(gradient: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``gradient * (y > 0)``, written over ``gradient`` unless autograd follows it."""
    if gradient.requires_grad:
        return torch.ops.aten.threshold_backward(gradient, y, 0)
    return torch.ops.aten.threshold_backward.grad_input(gradient, y, 0, grad_input=gradient)


define(
    "relu_backward(Tensor dy, Tensor y, str backend) -> Tensor",
    torch_impl=_backward,
    triton_impl="relu:backward",
    fake=lambda dy, y: empty_nhwc(y, *y.shape[1:]),
)
