"""Convolution with the sum and ReLU in its epilogue on a CPU, through the oneDNN operators that Inductor generates.

They are not public in PyTorch; :func:`fusible` says whether this build has them, and callers keep a public path.
"""

from __future__ import annotations

import torch

_UNIT = [1, 1]


def fusible(x: torch.Tensor) -> bool:
    """Whether ``x`` can go through the fused operators: float32 on a CPU whose PyTorch has oneDNN."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
    )


def convolution_relu(x, weight, bias, pad: int, relu: bool) -> torch.Tensor:
    """``relu(conv2d(x, weight, bias))``, or without the ReLU, in one pass."""
    post = "relu" if relu else "none"
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, [pad, pad], _UNIT, _UNIT, 1, post, [], "")


def add_convolution_relu(y, x, weight, pad: int, relu: bool) -> torch.Tensor:
    """``relu(y + conv2d(x, weight))`` written over ``y``, in one pass."""
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        y, x, weight, None, [pad, pad], _UNIT, _UNIT, 1, "add", 1.0, "relu" if relu else None, [], ""
    )
