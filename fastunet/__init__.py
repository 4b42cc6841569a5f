"""fastunet: U-Nets for PyTorch on fused Triton kernels.

``fastunet.UNet`` is a drop-in module, ``fastunet.functional`` holds its operators, ``fastunet.reference`` the plain
build that both are checked against. Importing this package needs no Triton and touches no device.
"""

import importlib
from typing import Any

from fastunet import functional, reference
from fastunet.unet import UNet

__version__ = "0.2.0"

_LAZY = ("data", "interop", "losses", "metrics")
"""Submodules that are imported when first used, so that ``import fastunet`` stays quick."""

__all__ = ["UNet", "__version__", "functional", "fuse", "reference", "to_onnx", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"fastunet.{name}")
    if name in ("fuse", "to_onnx"):
        return getattr(importlib.import_module("fastunet.interop"), name)
    raise AttributeError(f"module 'fastunet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
