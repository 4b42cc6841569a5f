"""NIfTI-1 and NIfTI-2 headers, single files and pairs: what they say is read as the standard has it, or refused.

nibabel corrects many contradictions silently, some by guesses that move the image. Here a header that contradicts
itself ends in one sentence; docs/reading.md lists every case with the reason. nibabel still parses the fields.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastunet.data.formats import parts_of
from fastunet.data.stored import Stored, with_plane_normal
from fastunet.data.streams import DataStream, note_compression, open_stream
from fastunet.errors import UserError

if TYPE_CHECKING:  # nibabel takes 0.2 s to import: every function that needs it imports it
    from nibabel.nifti1 import Nifti1Header

_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_KNOWN_CODES = range(6)  # of qform_code and sform_code
_LENGTH_TOLERANCE = 1e-3  # by which a stored quaternion may be longer than 1
_EXTENSION_LIMIT = 64 << 20


@contextlib.contextmanager
def open_nifti(path: Path) -> Iterator[tuple[Stored, DataStream]]:
    """What the file's header says, and the stream that holds its voxels, at their first byte.

    Raises:
        UserError: no NIfTI file, a header that contradicts itself, or one that declares more than the file can hold.
    """
    name = path.name.lower().removesuffix(".gz")
    pair = name.endswith((".hdr", ".img"))
    compressed = path.name.lower().endswith(".gz")
    header_path, data_path = parts_of(path) if pair else (path, path)
    with open_stream(header_path) as stream:
        stored = _read_header(stream, header_path, pair)
        note_compression(stream, compressed)
        if not pair:
            stream.check_holds(stored.offset + stored.count * stored.dtype.itemsize)
            yield stored, stream
            return
    with open_stream(data_path) as stream:
        stream.check_holds(stored.offset + stored.count * stored.dtype.itemsize)
        yield stored, stream


def _read_header(stream: DataStream, path: Path, pair: bool) -> Stored:
    import nibabel

    block = stream.read(348)
    sizes = {end: int.from_bytes(block[:4], end) for end in ("little", "big")}
    endian = next((end for end, size in sizes.items() if size in (348, 540)), None)
    if len(block) < 348 or endian is None:
        raise UserError(f"{path} is not a NIfTI file: it does not begin with a header of 348 or 540 bytes")
    second = sizes[endian] == 540
    block += stream.read(540 - 348) if second else b""
    if len(block) < sizes[endian]:
        raise EOFError
    header_class: Any = nibabel.Nifti2Header if second else nibabel.Nifti1Header
    header: Nifti1Header = header_class(block, "<" if endian == "little" else ">", check=False)
    _check_magic(block[4:12] if second else block[344:348], path, pair, second)
    dtype = _dtype(header, path)
    shape = _shape(header, path)
    offset = _offset(header, path, pair, len(block))
    slope, intercept = _scaling(header, path)
    affine = _affine(header, path)
    if not pair and offset > len(block) + 4:
        _read_extensions(stream, header, offset - len(block))
    # What described the voxels of this file must not describe those of a result.
    header["vox_offset"], header["scl_slope"], header["scl_inter"] = 0, np.nan, np.nan
    return Stored(path, shape, dtype, offset, slope, intercept, with_plane_normal(affine, shape), header)


def _check_magic(magic: bytes, path: Path, pair: bool, second: bool) -> None:
    tail = b"\0\r\n\032\n" if second else b"\0"
    number = b"2" if second else b"1"
    if magic == (b"ni" if pair else b"n+") + number + tail:
        return
    if magic == (b"n+" if pair else b"ni") + number + tail:
        kinds = ("a pair of .hdr and .img", "a single .nii") if pair else ("a single .nii", "a pair of .hdr and .img")
        raise UserError(f"{path} is named like {kinds[0]} file, but its header is that of {kinds[1]} file")
    kind = "an Analyze 7.5" if not magic.strip(b"\0") else "a damaged"
    raise UserError(f"{path} is not a NIfTI file: {kind} header without the NIfTI magic, which says no orientation")


def _dtype(header: Nifti1Header, path: Path) -> np.dtype:
    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code not in _TYPES:
        kind = {32: " (complex)", 128: " (RGB)", 1: " (single bits)", 2304: " (RGBA)"}.get(code, "")
        raise UserError(
            f"{path}: voxels are of NIfTI type {code}{kind}, expected real numbers of 8 to 64 bits: convert the file"
        )
    dtype: np.dtype = np.dtype(f"{header.endianness}{_TYPES[code]}")
    if bits != 8 * dtype.itemsize:
        raise UserError(f"{path}: the header contradicts itself: {bits} bits a voxel (bitpix), but type {dtype.name}")
    return dtype


def _shape(header: Nifti1Header, path: Path) -> tuple[int, ...]:
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 1:
        raise UserError(f"{path}: the header declares no volume: its dimensions are {dim}")
    return tuple(dim[1 : dim[0] + 1])


def _offset(header: Nifti1Header, path: Path, pair: bool, header_bytes: int) -> int:
    offset = float(header["vox_offset"])
    first = 0 if pair else header_bytes + 4
    if not (math.isfinite(offset) and offset == int(offset) and offset >= first):
        raise UserError(f"{path}: the header contradicts itself: voxels begin at byte {offset:g} (vox_offset)")
    if not pair and offset > _EXTENSION_LIMIT:
        raise UserError(f"{path}: {int(offset) >> 20} MB of extensions before the voxels (vox_offset) are too many")
    return int(offset)


def _scaling(header: Nifti1Header, path: Path) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0:
        return 1.0, 0.0  # the standard: no scaling
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise UserError(f"{path}: the scaling of the header is not finite: slope {slope:g}, intercept {intercept:g}")
    return slope, intercept


def _affine(header: Nifti1Header, path: Path) -> np.ndarray:
    """The affine of the sform if its code is set, else of the qform, else voxel sizes alone, as the standard says."""
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    name, deciding = ("qform_code", qform) if sform == 0 else ("sform_code", sform)
    if deciding not in _KNOWN_CODES:
        raise UserError(f"{path}: {name} is {deciding}; the standard knows 0 to 5, so the orientation is not certain")
    qform_affine = _qform(header) if qform in _KNOWN_CODES else "its code is unknown"
    if sform:
        affine = header.get_sform()
    elif qform:
        if isinstance(qform_affine, str):
            raise UserError(f"{path}: the orientation in the header (qform) makes no sense: {qform_affine}")
        affine = qform_affine
    else:
        zooms = [float(size) for size in header["pixdim"][1 : min(int(header["dim"][0]), 3) + 1]]
        if not all(size > 0 for size in zooms):
            raise UserError(f"{path}: the header gives no orientation, and voxel sizes {zooms} (pixdim)")
        affine = header.get_base_affine()
    if not np.isfinite(affine).all():
        raise UserError(f"{path}: the affine in the header holds NaN or infinity")
    if isinstance(qform_affine, str):  # unused: results must not carry it on
        header["qform_code"], header["pixdim"][0] = 0, 1
        for field in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"):
            header[field] = 0
        zooms = header["pixdim"][1:4]
        header["pixdim"][1:4] = np.where(np.isfinite(zooms), np.abs(zooms), 0)
    return np.asarray(affine)


def _qform(header: Nifti1Header) -> np.ndarray | str:
    """The affine of the quaternion, or what is wrong with it."""
    from nibabel.quaternions import quat2mat

    zooms = np.array(header["pixdim"][1:4], float)
    handedness = float(header["pixdim"][0])
    vector = np.array([header[f"quatern_{axis}"] for axis in "bcd"], float)
    origin = [float(header[f"qoffset_{axis}"]) for axis in "xyz"]
    if not np.isfinite([*zooms, *vector, *origin]).all():
        return "it holds NaN or infinity"
    if (zooms < 0).any():
        return f"voxel sizes {zooms.tolist()} (pixdim)"
    if handedness not in (-1, 0, 1):
        return f"qfac is {handedness:g} (pixdim[0]), expected -1 or 1"
    square = float(vector @ vector)
    if square > 1 + _LENGTH_TOLERANCE:
        return f"the quaternion is {math.sqrt(square):.4g} long, expected 1"
    affine = np.eye(4)
    rotation = quat2mat([math.sqrt(max(1 - square, 0)), *vector])
    affine[:3, :3] = rotation * (zooms * [1, 1, -1 if handedness == -1 else 1])
    affine[:3, 3] = origin
    return affine


def _read_extensions(stream: DataStream, header: Nifti1Header, count: int) -> None:
    """Keeps the extensions for results, if they are well-formed; what lies between header and voxels is no voxel."""
    from nibabel.nifti1 import Nifti1Extensions

    block = stream.read(count)
    if block[:1] == b"\0":
        return
    reader: Any = Nifti1Extensions
    with contextlib.suppress(Exception):
        swapped = (header.endianness == "<") != (sys.byteorder == "little")
        header.extensions = reader.from_fileobj(io.BytesIO(block[4:]), count - 4, swapped)
