"""HD95: how far apart the surfaces of two structures lie, but for the farthest 5 % of either, in millimetres.

With A, B the surfaces of truth and prediction and ``d(a, B)`` the distance from a to the nearest point of B,
``HD95 = max(P95 of d(a, B) over A, P95 of d(b, A) over B)``: Metrics Reloaded (Maier-Hein, Reinke et al. 2024). P95 is
the 95th percentile, interpolated linearly. Programs differ: MedPy takes one percentile of both sets joined.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def hd95(truth: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], *, empty: str = "one") -> float:
    """HD95 of two masks of one shape, bool, in the unit of ``spacing``, the lengths of a voxel.

    A surface is made of the voxels, taken as their centres, of which a neighbour along an axis longer than 1 is not in
    the structure or not in the array. Where only one structure is empty it is the diagonal of the array, as in BraTS
    (373.13 mm for 240 x 240 x 155 voxels of 1 mm), and 0 where both are; ``empty="skip"`` gives NaN where the truth is.
    """
    found = truth | predicted
    if not truth.any() and (empty == "skip" or not found.any()):
        return float("nan") if empty == "skip" else 0.0
    if not truth.any() or not predicted.any():
        return float(np.linalg.norm(np.multiply(found.shape, spacing)))
    held = (np.flatnonzero(found.any(tuple({*range(found.ndim)} - {axis}))) for axis in range(found.ndim))
    box = tuple(slice(indices[0], indices[-1] + 1) for indices in held)
    one, two = _surface(truth)[box], _surface(predicted)[box]
    return max(float(np.percentile(_distances(a, b, spacing), 95)) for a, b in ((one, two), (two, one)))


def _surface(mask: np.ndarray) -> np.ndarray:
    inner, padded = mask.copy(), np.pad(mask, 1)
    middle = (slice(1, -1),) * mask.ndim
    for axis in (axis for axis, length in enumerate(mask.shape) if length > 1):
        inner &= np.roll(padded, 1, axis)[middle] & np.roll(padded, -1, axis)[middle]
    return np.asarray(mask & ~inner)


def _distances(of: np.ndarray, to: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """From each voxel of ``of`` to the nearest one of ``to``: squares add up, so the least are found axis by axis."""
    squared = np.where(to, np.float32(0), np.float32(np.inf))
    for axis, length in enumerate(spacing):
        before = np.moveaxis(squared, axis, 0)
        best = before.copy()
        for step in range(1, len(best)):
            cost = np.float32((step * length) ** 2)
            if cost >= best.max():  # nothing farther away is nearer
                break
            np.minimum(best[step:], before[:-step] + cost, out=best[step:])
            np.minimum(best[:-step], before[step:] + cost, out=best[:-step])
        squared = np.moveaxis(best, 0, axis)
    return np.asarray(np.sqrt(squared[of]))
