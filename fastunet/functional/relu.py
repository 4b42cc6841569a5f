"""ReLU, LeakyReLU and their gradient from their own output, for backward passes that keep no pre-activation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastunet.dispatch import define
from fastunet.functional._layout import empty_nhwc, nhwc


def activation_(u: torch.Tensor, slope: float) -> torch.Tensor:
    """``u`` where it is positive, else ``slope * u``, written over ``u``: 0 is ReLU, 1 nothing."""
    if slope == 0:
        return u.relu_()
    return u if slope == 1 else F.leaky_relu_(u, slope)


def check_slope(operator: str, slope: float) -> float:
    """``slope`` as a float; raises unless it keeps the sign, from which gradients are found."""
    if not 0 <= slope < math.inf:
        raise ValueError(f"{operator}: slope is {slope}; expected at least 0")
    return float(slope)


def activation_gradient(dy: torch.Tensor, y: torch.Tensor, slope: float) -> torch.Tensor:
    """The PyTorch implementation of ``fastunet::relu_backward``."""
    if slope == 0:
        return torch.ops.aten.threshold_backward(nhwc(dy), nhwc(y), 0)
    return torch.ops.aten.leaky_relu_backward(nhwc(dy), nhwc(y), slope, True)


def masked(gradient: torch.Tensor, y: torch.Tensor, slope: float = 0.0) -> torch.Tensor:
    """``gradient`` times the derivative at output ``y``, written over ``gradient`` unless autograd follows it."""
    if slope == 1:
        return gradient
    if gradient.requires_grad:
        return activation_gradient(gradient, y, slope)
    if slope != 0:
        return torch.ops.aten.leaky_relu_backward.grad_input(gradient, y, slope, True, grad_input=gradient)
    return torch.ops.aten.threshold_backward.grad_input(gradient, y, 0, grad_input=gradient)


define(
    "relu_backward(Tensor dy, Tensor y, float slope, str backend) -> Tensor",
    torch_impl=activation_gradient,
    triton_impl="relu:backward",
    fake=lambda dy, y, slope: empty_nhwc(y, *y.shape[1:]),
)
