"""Volumes and images in, volumes out: what is written has the geometry and header of what was read."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastunet.arguments import checked
from fastunet.data.formats import IMAGE_SUFFIXES, META_SUFFIXES, NIFTI_SUFFIXES, SUFFIXES, is_image, suffix_of
from fastunet.data.image_files import mask_pixels, save_image
from fastunet.data.images import describe_image, load_image, load_mask
from fastunet.data.labels import LabelMap
from fastunet.data.meta_image import describe_meta_image, load_meta_image
from fastunet.data.mgh import open_mgh
from fastunet.data.nifti import open_nifti
from fastunet.data.stored import Stored, read_voxels, scaled
from fastunet.errors import UserError
from fastunet.files import whole_file

if TYPE_CHECKING:  # nibabel takes 0.2 s to import: every function that needs it imports it
    from nibabel.nifti1 import Nifti1Header, Nifti1Image

_MOST_QUANTISED = 0.05
_COMPRESSION_LEVEL = 4  # level 9 makes label files 5 % smaller and takes ten times as long


@dataclass(frozen=True)
class Geometry:
    """Where a file's voxels lie: ``shape`` (X, Y, Z) or (X, Y, Z, C), and the affine from voxel indices to millimetres.

    Of an image (H, W) the shape is (H, W, pages), and a pixel is 1 mm wide; ``orientation`` is the tag that was obeyed.
    """

    path: Path
    shape: tuple[int, ...]
    affine: np.ndarray
    orientation: int = 1


@dataclass(frozen=True)
class Volume:
    """Voxel values, float32 (X, Y, Z) or (X, Y, Z, C), in the file's own orientation, and the file's header."""

    data: np.ndarray
    affine: np.ndarray
    header: Nifti1Header
    path: Path


@checked
def read_volume(path: str | Path, *, on_nan: str = "error", channel: int | None = None) -> Volume:
    """Reads a NIfTI file or pair, an MGH or MetaImage file, or an image; stored integers are scaled as the header says.

    Axes of length 1 beyond the third are dropped, a plane gets a third axis, channels may lie on the fourth or fifth.

    Args:
        path: the file; compression is told by content.
        on_nan: what to do with NaN and infinite voxels: "error", or "zero" to replace them by 0.
        channel: read only this channel.

    Raises:
        UserError: the file is missing, damaged or of another format, contradicts itself (docs/reading.md), has more
            axes, or holds NaN or infinite voxels.
    """
    if on_nan not in ("error", "zero"):
        raise ValueError(f"on_nan is {on_nan!r}; expected 'error' or 'zero'")
    path = Path(path)
    if channel is not None and channel < 0:
        raise ValueError(f"channel is {channel}; channels are counted from 0")
    stored, values = _load(path, channel)
    data = scaled(values, stored, np.float32)
    bad = data.size - np.count_nonzero(np.isfinite(data))
    if bad and on_nan == "error":
        raise UserError(
            f"{path}: {bad} of {data.size} voxels are NaN or infinite in float32; "
            "on_nan='zero' (--on-nan zero) replaces them by 0"
        )
    if bad:
        data = np.nan_to_num(data, nan=0.0, posinf=0.0, neginf=0.0)
    return Volume(data, stored.affine, stored.header, path)


@checked
def read_geometry(path: str | Path) -> Geometry:
    """Reads only the header of a file; raises ``UserError`` like ``read_volume``."""
    stored = _describe(Path(path))
    return Geometry(stored.path, stored.axes, stored.affine, stored.orientation)


@checked
def read_labels(path: str | Path, label_map: LabelMap) -> np.ndarray:
    """Reads a label file as class indices, uint8 (X, Y, Z); ``LabelMap.encode`` says what is rounded.

    Raises:
        UserError: as in ``read_volume``, or a value that is not in the table of ``label_map``.
    """
    return label_map.encode(read_label_values(path), path)


def read_label_values(path: str | Path) -> np.ndarray:
    """The numbers of a label file as they are stored, scaled as the header says; of a mask, see ``load_mask``."""
    path = Path(path)
    if suffix_of(path) in IMAGE_SUFFIXES:
        return load_mask(path)
    stored, values = _load(path, None)
    if values.ndim != 3:
        raise UserError(f"{path}: a label file has 3 axes, this one has shape {values.shape}")
    if (stored.slope, stored.intercept) == (1, 0):
        return values
    if values.dtype.kind not in "iu":
        return scaled(values, stored, np.float64)
    found = np.unique(values)
    if np.unique(np.rint(scaled(found, stored, np.float64))).size < found.size:
        raise UserError(f"{path}: the scaling in its header (slope {stored.slope:g}) makes different labels one")
    # A writer that spreads labels over the range of a type is off by up to half a step.
    exact = scaled(values, stored, np.float64)
    nearest = np.rint(exact)
    close = np.abs(exact - nearest) <= min(abs(stored.slope) / 2, _MOST_QUANTISED)
    return np.where(close, nearest, exact)


@checked
def write_labels(path: str | Path, classes: np.ndarray, like: Volume, label_map: LabelMap) -> None:
    """Writes class indices (X, Y, Z) as file values of ``label_map``, in the smallest of uint8, int16 and int32.

    Affine, sform and qform, voxel sizes, units and description come from ``like``. The file is whole or absent. A path
    that ends as an image does takes classes (H, W, pages), and becomes a mask: see ``image_files.mask_pixels``.

    Raises:
        UserError: the file cannot be written.
        ValueError: ``classes`` has not the shape of ``like``, or holds an index that is no class.
    """
    path = Path(path)
    _write(path, (mask_pixels(classes, label_map) if is_image(path) else label_map.decode(classes)), like)


@checked
def write_map(path: str | Path, values: np.ndarray, like: Volume) -> None:
    """Writes ``values`` (X, Y, Z) or (X, Y, Z, C), such as probabilities, as float32; otherwise as ``write_labels``.

    Of images it takes TIFF files only.
    """
    _write(Path(path), np.asarray(values).astype(np.float32, copy=False), like)


def save_nifti(path: str | Path, image: Nifti1Image) -> None:
    """Writes ``image`` as one whole file; the same image gives the same bytes."""
    path = Path(path)
    suffix = suffix_of(path)
    if suffix not in (".nii", ".nii.gz"):
        raise UserError(f"{path}: the name of a NIfTI file ends in .nii or .nii.gz")
    with whole_file(path) as temporary, open(temporary, "wb") as raw:
        if suffix == ".nii":
            image.to_stream(raw)
            return
        with gzip.GzipFile("", "wb", _COMPRESSION_LEVEL, raw, mtime=0) as stream:
            image.to_stream(stream)


def _write(path: Path, values: np.ndarray, like: Volume) -> None:
    import nibabel

    if values.shape[:3] != like.data.shape[:3]:
        raise ValueError(f"an array of shape {values.shape} does not fit {like.path} of shape {like.data.shape}")
    if is_image(path):
        return save_image(path, values)
    header = like.header.copy()
    if len(header.get_data_shape()) == 2 and values.ndim == 3:
        values = values[..., 0]  # a plane stays a plane
    header.set_data_dtype(values.dtype)
    header["cal_min"] = header["cal_max"] = 0  # the display window of the intensities would hide the labels
    image_class: Any = nibabel.Nifti2Image if header["sizeof_hdr"] == 540 else nibabel.Nifti1Image
    save_nifti(path, image_class(values, like.affine, header))


def _describe(path: Path) -> Stored:
    """What the header of a file says."""
    suffix = _suffix(path)
    if suffix in IMAGE_SUFFIXES:
        return describe_image(path)
    if suffix in META_SUFFIXES:
        return describe_meta_image(path)
    with (open_nifti if suffix in NIFTI_SUFFIXES else open_mgh)(path) as (stored, _):
        return stored


def _load(path: Path, channel: int | None) -> tuple[Stored, np.ndarray]:
    """What a file says, and its numbers as they are stored."""
    suffix = _suffix(path)
    if suffix in IMAGE_SUFFIXES:
        return load_image(path, channel)
    if suffix in META_SUFFIXES:
        return load_meta_image(path, channel)
    with (open_nifti if suffix in NIFTI_SUFFIXES else open_mgh)(path) as (stored, stream):
        return stored, read_voxels(stored, stream, channel)


def _suffix(path: Path) -> str:
    if not (suffix := suffix_of(path)):
        raise UserError(f"{path} is no file that can be read: names end in {', '.join(SUFFIXES)}")
    return suffix
