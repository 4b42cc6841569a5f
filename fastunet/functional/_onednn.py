"""The oneDNN operators that Inductor generates on a CPU: convolutions with packed weights and with epilogues.

They are not public in PyTorch, so they are named here and nowhere else. Proven on PyTorch 2.13; :func:`accumulates` and
:func:`packs` say whether a build has them, and callers keep a public path.

With ``relu`` oneDNN applies it while it writes the result, but its ReLU turns NaN into 0, which PyTorch's does not.
"""

from __future__ import annotations

from typing import Any

import torch

_UNIT, _STRIDE2 = [1, 1], [2, 2]
_NONE: tuple[Any, ...] = "none", [], ""
_RELU: tuple[Any, ...] = "relu", [], ""
_OPS = torch.ops.mkldnn


def accumulates(x: torch.Tensor) -> bool:
    """Whether ``x`` can go through :func:`add_convolution`: float32 on a CPU whose PyTorch has oneDNN."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and hasattr(_OPS, "_convolution_pointwise_")
    )


def packs(x: torch.Tensor) -> bool:
    """Whether ``x`` can also go through convolutions with packed weights."""
    return accumulates(x) and hasattr(_OPS, "_convolution_transpose_pointwise")


def may_round_operands() -> bool:
    """Whether PyTorch was told that it may round float32 operands of convolutions or matrix products on a CPU."""
    parts = (getattr(torch.backends.mkldnn, name, None) for name in ("conv", "matmul"))
    return any(getattr(part, "fp32_precision", "none") in ("bf16", "tf32") for part in parts)


def pack(weight: torch.Tensor, pad: int, images: list[int], stride: int = 1) -> torch.Tensor:
    """``weight`` (C_out, C_in, k, k) in the layout that suits images of the shape ``images``."""
    return _OPS._reorder_convolution_weight(weight, [pad, pad], [stride, stride], _UNIT, 1, images)


def pack_transposed(weight: torch.Tensor, pad: int, images: list[int]) -> torch.Tensor:
    """The same for a stride-2 transposed convolution (C_in, C_out, k, k) whose output padding is ``pad``, too."""
    return _OPS._reorder_convolution_transpose_weight(weight, [pad, pad], [pad, pad], _STRIDE2, _UNIT, 1, images)


def convolution(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, pad: int, relu: bool,
                stride: int = 1) -> torch.Tensor:  # fmt: skip
    """``conv2d(x, packed, bias, stride)``, with its ReLU if asked."""
    epilogue = _RELU if relu else _NONE
    return _OPS._convolution_pointwise(x, packed, bias, [pad, pad], [stride, stride], _UNIT, 1, *epilogue)


def transposed_convolution(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, pad: int,
                           relu: bool) -> torch.Tensor:
    """The stride-2 transposed convolution of :func:`pack_transposed`, with its ReLU if asked."""
    epilogue = _RELU if relu else _NONE
    return _OPS._convolution_transpose_pointwise(x, packed, bias, [pad, pad], [pad, pad], _STRIDE2, _UNIT, 1, *epilogue)


def add_convolution(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, pad: int,
                    relu: bool = False) -> torch.Tensor:
    """``y + conv2d(x, weight)`` written over ``y``, in one pass, with a ReLU of the sum if asked."""
    return _OPS._convolution_pointwise_.binary(
        y, x, weight, None, [pad, pad], _UNIT, _UNIT, 1, "add", 1.0, "relu" if relu else None, [], ""
    )
