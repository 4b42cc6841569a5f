"""MetaImage volumes (.mha, .mhd), read by SimpleITK, which is an extra."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastunet.data.stored import Stored, header_of, with_plane_normal
from fastunet.data.streams import open_stream
from fastunet.errors import UserError

_CHUNK_BYTES = 1 << 20


def describe_meta_image(path: Path) -> Stored:
    """What the header of the file says; errors as in ``load_meta_image``."""
    with _opened(path) as (stored, _):
        return stored


def load_meta_image(path: Path, channel: int | None) -> tuple[Stored, np.ndarray]:
    """What the file says, and its numbers in the shape of ``Stored.axes``, or those of one channel.

    Raises:
        UserError: SimpleITK is not installed, or cannot read the file.
    """
    with _opened(path) as (stored, read):
        _check_compressed(path)
        values = read()
    if values.dtype.kind not in "iuf":
        raise UserError(f"{path}: voxels are of type {values.dtype}, expected real numbers")
    components = stored.shape[3]
    # SimpleITK's arrays run (z, y, x, component).
    parts = [values] if components == 1 else list(np.moveaxis(values, -1, 0))
    data = np.stack([part.T for part in parts], axis=-1).reshape((*stored.shape[:3], components), order="F")
    if channel is not None and channel >= components:
        raise UserError(f"{path}: has no channel {channel}, its shape is {stored.axes}")
    return stored, data.reshape(stored.axes, order="F") if channel is None else data[..., channel]


def _check_compressed(path: Path) -> None:
    """Raises UserError where compressed voxels are damaged: SimpleITK prints that, and gives what it has."""
    fields: dict[bytes, bytes] = {}
    with open_stream(path) as header:
        while b"ElementDataFile" not in fields and (line := header.raw.readline(_CHUNK_BYTES)):
            key, _, value = line.partition(b"=")
            fields[key.strip()] = value.strip()
        name = fields.get(b"ElementDataFile", b"")
        if fields.get(b"CompressedData", b"")[:1] not in (b"T", b"t", b"1"):
            return
        if name.upper() == b"LOCAL":
            return _check_stream(header.raw)
    with open_stream(path.parent / os.fsdecode(name)) as data:
        _check_stream(data.raw)


def _check_stream(file: BinaryIO) -> None:
    """Reads a zlib or gzip stream to its checksum; raises zlib.error, or EOFError where it ends before."""
    stream = zlib.decompressobj(32 + zlib.MAX_WBITS)
    while not stream.eof:
        chunk = stream.unconsumed_tail or file.read(_CHUNK_BYTES)
        if not stream.decompress(chunk, _CHUNK_BYTES) and not chunk:
            raise EOFError


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Stored, Callable[[], np.ndarray]]]:
    """What the header says, and a function that reads the voxels."""
    try:
        import SimpleITK
    except ImportError as error:
        raise UserError(f"{path}: MetaImage files need SimpleITK: pip install 'fastunet[metaimage]'") from error
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file")
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("MetaImageIO")  # by itself it knows lower-case names only
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        stored = _stored(path, reader.GetSize(), reader.GetNumberOfComponents(), reader)
        yield stored, lambda: SimpleITK.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-120:]
        raise UserError(f"{path} is not a MetaImage file that can be read: {reason}") from error


def _stored(path: Path, size: tuple[int, ...], components: int, reader: Any) -> Stored:
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
