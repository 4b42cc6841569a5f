"""Slices on a grid of another pixel size: images linearly, labels by the nearest pixel, and results back again.

The field of view stays: pixel i of n lies at the share (i + 1/2) / n of a side before and after.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from fastunet.errors import UserError


def resampled_shape(
    shape: Sequence[int], spacing: Sequence[float], target: Sequence[float] | None, file: object = "the slices"
) -> tuple[int, int]:
    """(H, W) of slices of ``shape`` and ``spacing`` (mm per pixel) on a grid of spacing ``target``; None keeps them.

    Raises:
        UserError: more than 64 times as many pixels, or less than half of one along both sides; named by ``file``.
    """
    height, width = shape
    if target is None:
        return height, width
    sides = [n * have / want for n, have, want in zip((height, width), spacing, target)]
    if max(sides) < 0.5 or not sides[0] * sides[1] <= 64 * height * width:
        have, want = (" x ".join(f"{mm:g}" for mm in pair) for pair in (spacing, target))
        raise UserError(f"{file}: slices of {height} x {width} pixels of {have} mm cannot be resampled to {want} mm")
    return max(1, round(sides[0])), max(1, round(sides[1]))


def resample(images: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Images (n, C, H, W), float32, linearly interpolated to ``shape``; they themselves if they have it."""
    if images.shape[-2:] == tuple(shape):
        return images
    return F.interpolate(torch.from_numpy(images), tuple(shape), mode="bilinear", align_corners=False).numpy()


def resample_labels(labels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The pixels of (n, H, W) nearest to those of a grid of ``shape``."""
    rows, columns = (((np.arange(n) + 0.5) * (m / n)).astype(np.intp) for n, m in zip(shape, labels.shape[-2:]))
    return labels[:, rows[:, None], columns]
