"""MetaImage volumes (.mha, .mhd), read by SimpleITK, which is an extra."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastunet.data.stored import Stored, header_of, with_plane_normal
from fastunet.errors import UserError


def load_meta_image(path: Path, channel: int | None, voxels: bool) -> tuple[Stored, np.ndarray | None]:
    """What the file says, and with ``voxels`` its numbers in the shape of ``Stored.axes``, or those of one channel.

    Raises:
        UserError: SimpleITK is not installed, or cannot read the file.
    """
    try:
        import SimpleITK
    except ImportError as error:
        raise UserError(f"{path}: MetaImage files need SimpleITK: pip install 'fastunet[metaimage]'") from error
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("MetaImageIO")  # by itself it knows lower-case names only
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size, components = reader.GetSize(), reader.GetNumberOfComponents()
        stored = _stored(path, size, components, reader)
        if not voxels:
            return stored, None
        values = SimpleITK.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-120:]
        raise UserError(f"{path} is not a MetaImage file that can be read: {reason}") from error
    if values.dtype.kind not in "iuf":
        raise UserError(f"{path}: voxels are of type {values.dtype}, expected real numbers")
    # SimpleITK's arrays run (z, y, x, component).
    parts = [values] if components == 1 else list(np.moveaxis(values, -1, 0))
    data = np.stack([part.T for part in parts], axis=-1).reshape(stored.axes, order="F")
    if channel is None:
        return stored, data
    if channel >= components:
        raise UserError(f"{path}: has no channel {channel}, its shape is {stored.axes}")
    return stored, data.reshape(*stored.axes[:3], components)[..., channel]


def _stored(path: Path, size: tuple[int, ...], components: int, reader) -> Stored:
    n = len(size)
    if n not in (2, 3):
        raise UserError(f"{path}: expected a volume with 2 or 3 axes, got shape {size}")
    affine = np.eye(4)
    affine[:n, :n] = np.reshape(reader.GetDirection(), (n, n)) * reader.GetSpacing()
    affine[:n, 3] = reader.GetOrigin()
    affine[:2] *= -1  # ITK counts towards the left and the back, NIfTI towards the right and the front
    if not np.isfinite(affine).all():
        raise UserError(f"{path}: the affine in the header holds NaN or infinity")
    shape = (*size, *(1,) * (3 - n), components)
    affine = with_plane_normal(affine, size)
    return Stored(path, shape, np.dtype("f4"), 0, 1.0, 0.0, affine, header_of(size, affine))
