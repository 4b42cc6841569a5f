"""Bilinear ×2 upsampling, by PyTorch on every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastunet.arguments import checked
from fastunet.functional._checks import check_image
from fastunet.functional._layout import nhwc


@checked
def upsample_bilinear2d(x: torch.Tensor, *, align_corners: bool = False, backend: str = "auto") -> torch.Tensor:
    """``nn.Upsample(scale_factor=2, mode="bilinear", align_corners=…)`` of (N, C, H, W): (N, C, 2H, 2W).

    Args:
        x: (N, C, H, W); floating point, fastest in ``channels_last``.
        align_corners: True maps corner pixels onto corner pixels, False edges onto edges.
        backend: "auto" or "torch"; there is no kernel.

    Raises:
        ValueError: ``x`` is not a floating (N, C, H, W) tensor, or the backend is another one.
    """
    check_image("upsample_bilinear2d", x)
    if backend not in ("auto", "torch"):
        raise ValueError(f"upsample_bilinear2d: backend {backend!r} cannot run here: there is no kernel")
    return F.interpolate(nhwc(x), scale_factor=2.0, mode="bilinear", align_corners=align_corners)
