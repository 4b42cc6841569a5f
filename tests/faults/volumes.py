"""NIfTI files with changed headers, flipped bits and cut ends, against a reader that takes the header literally."""

from __future__ import annotations

import gzip
import math
import random
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import nibabel
import numpy as np

from fastunet.data import read_volume
from fastunet.errors import UserError
from tests.faults.trials import Deadline, Outcome, forked

TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
FLOATS = [0.0, 1.0, -1.0, math.nan, math.inf, 1e38, 1e-45, 3.5, 352.0, 353.0, 1e9, 2.0**31]
INTEGERS = [0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 256, 512, 1024, 2048, 32767, -32768, 348]
FIELDS = [("i", 0), ("h", 70), ("h", 72), *[("h", 40 + 2 * i) for i in range(8)],
          *[("f", 76 + 4 * i) for i in range(8)],
          ("f", 108), ("f", 112), ("f", 116), ("h", 252), ("h", 254), *[("f", 256 + 4 * i) for i in range(6)],
          *[("f", 280 + 4 * i) for i in range(12)]]  # fmt: skip
CPU_SECONDS, MEMORY = 2, 100 << 20
"""What reading a file may take. Its own bytes, and those it holds, are fewer here by far."""


def campaign(work: Path, trials: int, seed: int, time: Deadline) -> Outcome:
    """What is read must be what the literal reader finds; the rest is refused in a sentence, in bounded memory."""
    outcome, draw = Outcome("NIfTI volumes, changed"), random.Random(seed)
    work.mkdir(parents=True, exist_ok=True)
    affine = np.array([[-1.1, 0.1, 0, 20], [0.1, -0.9, 0.05, 15], [0, 0.05, 1.3, -7], [0, 0, 0, 1.0]])
    image = nibabel.Nifti1Image(np.random.default_rng(1).integers(-300, 900, (12, 10, 8)).astype(np.int16), affine)
    image.set_qform(affine, 1)
    image.header.set_slope_inter(0.25, 10)
    nibabel.save(image, work / "base.nii")
    base = (work / "base.nii").read_bytes()
    for path in (work / "base.nii", work / "base.nii.gz"):  # imports what the children need
        path.write_bytes(gzip.compress(base) if path.suffix == ".gz" else base)
        assert _judge(path) == "right"
    while outcome.tried < trials and time:
        zipped = draw.random() < 0.5
        data = _mutated(base, zipped, draw)
        path = work / ("volume.nii.gz" if zipped else "volume.nii")
        path.write_bytes(data)
        answer = forked(lambda: _judge(path), CPU_SECONDS, MEMORY)  # noqa: B023
        bad = answer if answer not in ("right", "refused", "refused although readable") else None
        outcome.add(answer, f"{answer}: header {data[:352].hex() if not zipped else 'in gzip'}" if bad else None)
    shutil.rmtree(work)
    return outcome


def _mutated(raw: bytes, zipped: bool, draw: random.Random) -> bytes:
    data = bytearray(raw)
    kind = draw.randrange(5)
    for _ in range(draw.randint(1, 3)):
        if kind <= 1:
            code, place = draw.choice(FIELDS)
            value = draw.choice(FLOATS if code == "f" else INTEGERS)
            data[place : place + struct.calcsize(code)] = struct.pack("<" + code, value)
        elif kind == 2:
            data[draw.randrange(352)] ^= 1 << draw.randrange(8)
        elif kind == 3:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        else:
            del data[draw.randrange(len(data)) :]
            data = data or bytearray(b"x")
    if not zipped:
        return bytes(data)
    packed = bytearray(gzip.compress(bytes(data), 1, mtime=0))
    if draw.random() < 0.3:
        packed[draw.randrange(len(packed))] ^= 1 << draw.randrange(8)
    return bytes(packed[: draw.randrange(1, len(packed))] if draw.random() < 0.1 else packed)


def _judge(path: Path) -> str:
    warnings.simplefilter("ignore")
    try:
        wanted = _literal(path)
    except (ValueError, struct.error, EOFError, zlib.error, OSError, OverflowError) as error:
        wanted = str(error)
    try:
        volume = read_volume(path)
    except UserError as error:
        if len(str(error)) > 600 or "\n" in str(error):
            return f"no sentence: {error}"
        return "refused" if isinstance(wanted, str) else "refused although readable"
    if isinstance(wanted, str):
        return f"read although {wanted}"
    voxels, affine = wanted
    if volume.data.shape != voxels.shape or not np.allclose(volume.data, voxels, rtol=1e-5, atol=1e-30):
        return "other voxels"
    if affine is not None and not np.allclose(volume.affine, affine, rtol=1e-4, atol=1e-4):
        return "another affine"
    return "right"


def _literal(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Voxels and affine (None where the qform says it) of the bytes, or a ``ValueError`` that says what contradicts."""
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    if struct.unpack_from("<i", raw)[0] != 348 or raw[344:348] != b"n+1\0":
        raise ValueError("it is no NIfTI-1 file")
    dim, (datatype, bitpix) = struct.unpack_from("<8h", raw, 40), struct.unpack_from("<hh", raw, 70)
    offset, slope, intercept = struct.unpack_from("<3f", raw, 108)
    if not 1 <= dim[0] <= 7 or min(dim[1 : 1 + dim[0]]) < 1 or datatype not in TYPES:
        raise ValueError("its dimensions or its datatype are none")
    dtype = np.dtype("<" + TYPES[datatype])
    if bitpix != 8 * dtype.itemsize or offset != int(offset) or offset < 348:
        raise ValueError("bitpix or vox_offset contradict")
    shape = list(dim[1 : 1 + dim[0]])
    if int(offset) + math.prod(shape) * dtype.itemsize > len(raw):
        raise ValueError("it is cut short")
    voxels = np.frombuffer(raw, dtype, math.prod(shape), int(offset)).reshape(shape, order="F").astype(np.float64)
    if not math.isfinite(slope) or (slope and not math.isfinite(intercept)):
        raise ValueError("its scaling is not finite")
    with np.errstate(all="ignore"):
        voxels = voxels * slope + intercept if slope else voxels
        if not np.isfinite(voxels.astype(np.float32)).all():
            raise ValueError("voxels are not finite")
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    shape += [1] * (3 - len(shape))
    affine = None
    if struct.unpack_from("<h", raw, 254)[0] > 0:
        affine = np.vstack([np.reshape(struct.unpack_from("<12f", raw, 280), (3, 4)), [0, 0, 0, 1]])
        if not np.isfinite(affine).all():
            raise ValueError("its affine is not finite")
    return voxels.reshape(shape, order="F"), affine
