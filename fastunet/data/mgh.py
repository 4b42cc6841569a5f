"""FreeSurfer's MGH volumes, plain (.mgh) and compressed (.mgz)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastunet.data.stored import Stored, header_of
from fastunet.data.streams import DataStream, note_compression, open_stream
from fastunet.errors import UserError

_VOXELS_AT = 284
_TYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2"}


@contextlib.contextmanager
def open_mgh(path: Path) -> Iterator[tuple[Stored, DataStream]]:
    """What the file's header says, and the stream that holds its voxels; the affine as FreeSurfer computes it.

    Raises:
        UserError: no MGH file, or one that declares more than it holds.
    """
    from nibabel.freesurfer.mghformat import MGHHeader

    with open_stream(path) as stream:
        note_compression(stream, path.name.lower().endswith((".mgz", ".gz")))
        block = stream.read(_VOXELS_AT)
        if len(block) < _VOXELS_AT or block[:4] != b"\0\0\0\1":
            raise UserError(f"{path} is not an MGH file: it does not begin with version 1 of the format")
        header = MGHHeader(block, check=False)
        shape = tuple(int(n) for n in header["dims"])
        if min(shape) < 1:
            raise UserError(f"{path}: the header declares no volume: its dimensions are {list(shape)}")
        code = int(header["type"])
        if code not in _TYPES:
            raise UserError(f"{path}: voxels are of MGH type {code}, expected one of {', '.join(map(str, _TYPES))}")
        affine = np.array(header.get_affine(), float)
        if not np.isfinite(affine).all():
            raise UserError(f"{path}: the affine in the header holds NaN or infinity")
        dtype = np.dtype(_TYPES[code])
        stored = Stored(path, shape, dtype, _VOXELS_AT, 1.0, 0.0, affine, header_of(shape[:3], affine))
        stream.check_holds(_VOXELS_AT + stored.count * dtype.itemsize)
        yield stored, stream
