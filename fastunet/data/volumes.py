"""NIfTI volumes in and out: what is written has the geometry and header of what was read."""

from __future__ import annotations

import contextlib
import gzip
import logging
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from fastunet.data.labels import LabelMap
from fastunet.errors import UserError
from fastunet.files import whole_file

if TYPE_CHECKING:  # nibabel takes 0.2 s to import: every function that needs it imports it
    from nibabel.nifti1 import Nifti1Header, Nifti1Image

SUFFIXES = (".nii.gz", ".nii")
_CHUNK_BYTES = 1 << 20
_COMPRESSION_LEVEL = 4  # level 9 makes label files 5 % smaller and takes ten times as long


@dataclass(frozen=True)
class Geometry:
    """Where a file's voxels lie: ``shape`` as stored, and the 4 x 4 ``affine`` from voxel indices to millimetres."""

    path: Path
    shape: tuple[int, ...]
    affine: np.ndarray


@dataclass(frozen=True)
class Volume:
    """Voxel values, float32 (X, Y, Z) or (X, Y, Z, T), in the file's own orientation, and the file's header."""

    data: np.ndarray
    affine: np.ndarray
    header: Nifti1Header
    path: Path


def read_volume(path: str | Path, *, on_nan: str = "error", channel: int | None = None) -> Volume:
    """Reads a ``.nii`` or ``.nii.gz`` file; stored integers are scaled as the header says.

    Args:
        path: the file.
        on_nan: what to do with NaN and infinite voxels: "error", or "zero" to replace them by 0.
        channel: read only this index of the last axis of a 4-D file.

    Raises:
        UserError: the file is missing, truncated, no NIfTI file, not 3-D or 4-D, or holds NaN or infinite voxels.
    """
    if on_nan not in ("error", "zero"):
        raise ValueError(f"on_nan is {on_nan!r}; expected 'error' or 'zero'")
    path = Path(path)
    with _opened(path) as image:
        data = _voxels(image, path, channel).astype(np.float32, copy=False)
    bad = data.size - np.count_nonzero(np.isfinite(data))
    if bad and on_nan == "error":
        raise UserError(
            f"{path}: {bad} of {data.size} voxels are NaN or infinite; on_nan='zero' (--on-nan zero) replaces them by 0"
        )
    if bad:
        data = np.nan_to_num(data, nan=0.0, posinf=0.0, neginf=0.0)
    return Volume(data, image.affine, image.header, path)


def read_geometry(path: str | Path) -> Geometry:
    """Reads only the header of a NIfTI file; raises ``UserError`` like ``read_volume``."""
    path = Path(path)
    with _opened(path, whole=False) as image:
        return Geometry(path, _without_trailing_ones(image.shape), image.affine)


def read_labels(path: str | Path, label_map: LabelMap) -> np.ndarray:
    """Reads a label file as class indices, uint8 (X, Y, Z).

    Raises:
        UserError: as in ``read_volume``, or a value that is not in the table of ``label_map``.
    """
    path = Path(path)
    with _opened(path) as image:
        values = _voxels(image, path, channel=None)
    if values.ndim != 3:
        raise UserError(f"{path}: a label file has 3 axes, this one has shape {values.shape}")
    return label_map.encode(values, path)


def write_labels(path: str | Path, classes: np.ndarray, like: Volume, label_map: LabelMap) -> None:
    """Writes class indices (X, Y, Z) as file values of ``label_map``, in the smallest of uint8, int16 and int32.

    Affine, sform and qform, voxel sizes, units and description come from ``like``. The file is whole or absent.

    Raises:
        UserError: the file cannot be written.
        ValueError: ``classes`` has not the shape of ``like``.
    """
    _write(Path(path), label_map.decode(classes), like)


def write_map(path: str | Path, values: np.ndarray, like: Volume) -> None:
    """Writes ``values`` (X, Y, Z) or (X, Y, Z, C), such as probabilities, as float32; otherwise as ``write_labels``."""
    _write(Path(path), values.astype(np.float32, copy=False), like)


def save_nifti(path: str | Path, image: Nifti1Image) -> None:
    """Writes ``image`` as one whole file; the same image gives the same bytes."""
    path = Path(path)
    compress = _is_compressed(path)
    with whole_file(path) as temporary, open(temporary, "wb") as raw:
        if not compress:
            image.to_stream(raw)
            return
        with gzip.GzipFile("", "wb", _COMPRESSION_LEVEL, raw, mtime=0) as stream:
            image.to_stream(stream)


def _write(path: Path, values: np.ndarray, like: Volume) -> None:
    import nibabel

    if values.shape[:3] != like.data.shape[:3]:
        raise ValueError(f"an array of shape {values.shape} does not fit {like.path} of shape {like.data.shape}")
    header = like.header.copy()
    header.set_data_dtype(values.dtype)
    header["cal_min"] = header["cal_max"] = 0  # the display window of the intensities would hide the labels
    image_class = nibabel.Nifti2Image if header["sizeof_hdr"] == 540 else nibabel.Nifti1Image
    save_nifti(path, image_class(values, like.affine, header))


@contextlib.contextmanager
def _opened(path: Path, whole: bool = True) -> Iterator[Nifti1Image]:
    """The image, readable inside the block; ``whole`` reads the file to its end, where gzip keeps the checksum."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    try:
        with _open_stream(path) as stream:
            size = int.from_bytes(stream.read(4), "little")
            stream.seek(0)
            nifti2 = 540 in (size, int.from_bytes(size.to_bytes(4, "little"), "big"))
            with _nibabel_silent():
                image = (nibabel.Nifti2Image if nifti2 else nibabel.Nifti1Image).from_stream(stream)
            yield image
            while whole and stream.read(_CHUNK_BYTES):
                pass
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except gzip.BadGzipFile as error:
        raise UserError(f"{path} is not a gzip file, or its content is damaged") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is truncated or damaged: its compressed data end early or make no sense") from error
    except (ImageFileError, HeaderDataError, WrapStructError) as error:
        raise UserError(f"{path} is not a NIfTI file, or its header is damaged") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or 'it is shorter than its header says'}") from error
    except (ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} cannot be read: its header describes no volume that fits into memory") from error


@contextlib.contextmanager
def _nibabel_silent() -> Iterator[None]:
    """Drops what nibabel logs in this thread: it prints each thing that it puts right in a header."""
    from nibabel.imageglobals import logger

    thread = threading.get_ident()

    def from_other_threads(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(from_other_threads)
    try:
        yield
    finally:
        logger.removeFilter(from_other_threads)


def _open_stream(path: Path) -> BinaryIO:
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    return gzip.open(path, "rb") if _is_compressed(path) else open(path, "rb")


def _is_compressed(path: Path) -> bool:
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: the name of a NIfTI file ends in .nii or .nii.gz")
    return path.name.endswith(".gz")


def _voxels(image: Nifti1Image, path: Path, channel: int | None) -> np.ndarray:
    """The scaled voxels, or those of one channel, in whatever real dtype they come."""
    shape = _without_trailing_ones(image.shape)
    if len(shape) not in (3, 4) or 0 in shape:
        raise UserError(f"{path}: expected a volume with 3 or 4 axes, got shape {image.shape}")
    if image.get_data_dtype().kind not in "iuf":
        raise UserError(f"{path}: voxels are of type {image.get_data_dtype()}, expected real numbers")
    if channel is None or (len(shape) == 3 and channel == 0):
        return np.asanyarray(image.dataobj).reshape(shape, order="F")
    if len(shape) != 4 or channel >= shape[3]:
        raise UserError(f"{path}: has no channel {channel}, its shape is {shape}")
    return np.asanyarray(image.dataobj[..., channel])


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(int(n) for n in shape)
