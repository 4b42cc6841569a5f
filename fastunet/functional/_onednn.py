"""Convolution that accumulates into an existing tensor on a CPU, through the oneDNN operator that Inductor generates.

It is not public in PyTorch; :func:`accumulates` says whether this build has it, and callers keep a public path.
"""

from __future__ import annotations

import torch

_UNIT = [1, 1]


def accumulates(x: torch.Tensor) -> bool:
    """Whether ``x`` can go through :func:`add_convolution`: float32 on a CPU whose PyTorch has oneDNN."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
    )


def add_convolution(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, pad: int) -> torch.Tensor:
    """``y + conv2d(x, weight)`` written over ``y``, in one pass.

    oneDNN would apply the ReLU in the same pass, but its ReLU turns NaN into 0, which PyTorch's does not.
    """
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        y, x, weight, None, [pad, pad], _UNIT, _UNIT, 1, "add", 1.0, None, [], ""
    )
