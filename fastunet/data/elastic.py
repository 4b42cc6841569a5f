"""The elastic deformation of Ronneberger et al. 2015, of whole batches on their device."""

from __future__ import annotations

import torch
from torch.nn import functional as F

GRID = 3
"""Vectors along each axis of the coarse grid."""
DEVIATION = 10.0
"""Standard deviation of their components, in pixels."""
_LARGEST_SHARE = 1 / 20  # of the shorter side: neighbouring vectors then differ by a seventh of their distance


def displacements(vectors: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A displacement of each pixel, (N, 2, H, W) in pixels (down, right), from standard normal ``vectors``.

    Source: arXiv:1505.04597, section 3.1: "random displacement vectors on a coarse 3 by 3 grid", sampled "from a
    Gaussian distribution with 10 pixels standard deviation", between which pixels are "computed using bicubic
    interpolation". Images below 200 pixels, where that would fold, get a deviation of a twentieth of their side.

    Args:
        vectors: (N, 2, 3, 3); the outer ones lie on the corners and borders of the image.
        height, width: of the image.
    """
    deviation = min(DEVIATION, _LARGEST_SHARE * min(height, width))
    return F.interpolate(deviation * vectors, (height, width), mode="bicubic", align_corners=True)


def deform(images: torch.Tensor, labels: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, C, H, W) and labels (N, H, W) as seen at each pixel's place plus its displacement.

    Images are interpolated linearly, labels take the nearest pixel; beyond the borders both are mirrored.

    Args:
        images: the batch, float.
        labels: class indices up to 2^24.
        vectors: standard normal (N, 2, 3, 3), float.
    """
    height, width = images.shape[-2:]
    dtype = torch.promote_types(images.dtype, torch.float32)
    down, right = displacements(vectors.to(dtype), height, width).unbind(1)
    rows, columns = (torch.arange(side, dtype=dtype, device=images.device) for side in (height, width))
    # in grid_sample's unit the centres of the first and the last pixel are -1 and 1
    y = (rows[:, None] + down) * (2 / max(height - 1, 1)) - 1
    x = (columns + right) * (2 / max(width - 1, 1)) - 1
    grid = torch.stack([x, y], -1)

    def move(batch: torch.Tensor, mode: str) -> torch.Tensor:
        moved = F.grid_sample(batch.to(dtype), grid, mode=mode, padding_mode="reflection", align_corners=True)
        return moved.to(batch.dtype)

    return move(images, "bilinear"), move(labels[:, None], "nearest")[:, 0]
