"""What a file of voxels says about them, whatever its format, and the voxels themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastunet.data.streams import DataStream
from fastunet.errors import UserError

if TYPE_CHECKING:  # nibabel takes 0.2 s to import: every function that needs it imports it
    from nibabel.nifti1 import Nifti1Header

_NIFTI1_LENGTHS = 1 << 15
_SLABS = 32  # voxels are scaled in so many parts, so that float64 never holds all of them


@dataclass(frozen=True)
class Stored:
    """How a file stores its voxels, in Fortran order from byte ``offset`` on.

    Attributes:
        path: the file, for messages.
        shape: as declared, 1 to 7 axes.
        dtype: of a stored voxel; its value is ``slope`` times what is stored plus ``intercept``.
        affine: from voxel indices to millimetres, 4 x 4.
        header: a NIfTI header for results on the same grid.
        orientation: the tag of an image that says how it is shown, 1 for as it is stored.

    Raises:
        UserError: one axis, or more than one axis of length over 1 beyond the third.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    slope: float
    intercept: float
    affine: np.ndarray
    header: Nifti1Header
    orientation: int = 1

    def __post_init__(self) -> None:
        space, rest = self.shape[:3], [n for n in self.shape[3:] if n > 1]
        if len(space) < 2 or len(rest) > 1:
            raise UserError(f"{self.path}: expected a volume with 2 or 3 axes, and channels, got shape {self.shape}")

    @property
    def count(self) -> int:
        """The number of voxels."""
        return math.prod(self.shape)

    @property
    def axes(self) -> tuple[int, ...]:
        """(X, Y, Z), or (X, Y, Z, C) if there are channels: an axis of 1 is added to planes, others are dropped."""
        space, rest = self.shape[:3], [n for n in self.shape[3:] if n > 1]
        return (*space, *(1,) * (3 - len(space)), *rest)


def read_voxels(stored: Stored, stream: DataStream, channel: int | None) -> np.ndarray:
    """The stored numbers, or those of one channel, in the shape of ``stored.axes`` and the file's own dtype.

    Raises:
        UserError: no such channel.
        EOFError: the data end early.
    """
    shape, offset = stored.axes, stored.offset
    if channel is not None and channel >= (shape[3] if len(shape) == 4 else 1):
        raise UserError(f"{stored.path}: has no channel {channel}, its shape is {shape}")
    if channel is not None:
        shape = shape[:3]
        offset += channel * math.prod(shape) * stored.dtype.itemsize
    stream.skip_to(offset)
    data = stream.read_array(math.prod(shape) * stored.dtype.itemsize)
    stream.drain()
    return data.view(stored.dtype).reshape(shape, order="F")


def scaled(values: np.ndarray, stored: Stored, dtype: np.typing.DTypeLike) -> np.ndarray:
    """``values`` as numbers of ``dtype``, computed in float64 where the header scales them."""
    if (stored.slope, stored.intercept) == (1, 0):
        with np.errstate(over="ignore"):  # what overflows is infinite, and found as such
            return values.astype(dtype, copy=False)
    result = np.empty(values.shape, dtype, order="F")
    flat, source = result.reshape(-1, order="F"), values.reshape(-1, order="F")
    step = max(flat.size // _SLABS, 1)
    with np.errstate(all="ignore"):
        for start in range(0, flat.size, step):
            part = slice(start, start + step)
            flat[part] = source[part].astype(np.float64) * stored.slope + stored.intercept
    return result


def with_plane_normal(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """``affine``; if the file is a plane whose third axis is left at zero, one that stands upright on it, 1 mm long."""
    if (len(shape) > 2 and shape[2] > 1) or np.any(affine[:3, 2]):
        return affine
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    length = np.linalg.norm(normal)
    affine = affine.copy()
    affine[:3, 2] = normal / length if length else 0
    return affine


def header_of(shape: tuple[int, ...], affine: np.ndarray) -> Nifti1Header:
    """A NIfTI header for the grid of a file of another format."""
    import nibabel

    kind: Any = nibabel.Nifti1Header if max(shape) < _NIFTI1_LENGTHS else nibabel.Nifti2Header
    header: Nifti1Header = kind()
    header.set_data_shape(shape)
    header.set_zooms(np.linalg.norm(affine[:3, : len(shape)], axis=0))
    header.set_xyzt_units("mm")
    header.set_sform(affine, code="scanner")
    return header
