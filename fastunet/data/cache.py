"""Preprocessed slices on disk: one memory-mapped file per case, named after the content that it was made from.

A record is one slice: the modalities, float32, then the labels, uint8. Records are cut to the box around everything
that is not 0, which loses nothing and leaves a third of a skull-stripped volume: about 30 MB for a BraTS case of two
modalities. float32 rather than float16, so that training and segmentation see the same bits.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastunet.data.cases import Case, check_geometry
from fastunet.data.slices import CaseSlices
from fastunet.data.volumes import read_labels
from fastunet.errors import UserError
from fastunet.files import whole_file, write_text

_VERSION = 1  # part of every key: raise it when the same input gives other records
_HASH_CHUNK_BYTES = 1 << 20
_SLICES_AT_ONCE = 16
_OPEN_FILES = 128  # well below the usual limit of 1024 open files, for data sets of any number of cases


@dataclass(frozen=True)
class CachedCase:
    """The records of one case.

    Attributes:
        path: the ``.npy`` file of the records.
        shape: slices, height and width before the cut to the box.
        box: (start, stop) on the same three axes.
        foreground: bool, for each of all slices whether any label is not 0.
    """

    path: Path
    shape: tuple[int, int, int]
    box: tuple[tuple[int, int], ...]
    foreground: np.ndarray

    @property
    def key(self) -> str:
        """The digest of content and options."""
        return self.path.stem

    def record(self, index: int) -> np.void | None:
        """The record of slice ``index``, or None where the slice is empty; fields "image" and "label"."""
        start, stop = self.box[0]
        return _open_records(self.path)[index - start] if start <= index < stop else None


def cache_case(
    case: Case, modalities: Sequence[str], folder: Path, *, axis: int = 2, normalise: bool = True, on_nan: str = "error"
) -> CachedCase:
    """The records of ``case`` in ``folder``, made if they are not there.

    Files appear whole, by renaming, and their content follows from their name: processes may share the folder and be
    killed at any time.

    Raises:
        UserError: no label, files that cannot be read or do not match, a volume of zeros, or a full disk.
    """
    if case.label is None:
        raise UserError(f"{case.files[0].parent}: case {case.name} has no label file")
    options = [_VERSION, list(modalities), axis, normalise, on_nan, list(case.label_map.values)]
    path = folder / f"{_content_key(case, modalities, options)}.npy"
    # The description is written last: where it is, the records are.
    if not path.with_suffix(".json").exists():
        _write_records(case, modalities, path, axis, normalise, on_nan)
    table = json.loads(path.with_suffix(".json").read_text())
    foreground = np.zeros(table["shape"][0], dtype=bool)
    foreground[table["foreground"]] = True
    return CachedCase(path, tuple(table["shape"]), tuple(map(tuple, table["box"])), foreground)


def _content_key(case: Case, modalities: Sequence[str], options: list) -> str:
    digest = hashlib.blake2b(json.dumps(options).encode(), digest_size=16)
    files = {}
    for path, channel in [*(case.modalities[modality] for modality in modalities), (case.label, None)]:
        if path not in files:
            files[path] = _file_digest(path)
        digest.update(files[path] + str(channel).encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return digest.digest()


def _write_records(case: Case, modalities: Sequence[str], path: Path, axis: int, normalise: bool, on_nan: str) -> None:
    check_geometry(case, modalities)
    slices = CaseSlices(case, modalities, axis=axis, normalise=normalise, on_nan=on_nan)
    labels = slices.stack(read_labels(case.label, case.label_map))
    box = _bounding_box(slices.occupied() | (labels != 0), case)
    (first, last), rows, columns = box[0], slice(*box[1]), slice(*box[2])
    height, width = rows.stop - rows.start, columns.stop - columns.start
    dtype = np.dtype([("image", "<f4", (len(modalities), height, width)), ("label", "u1", (height, width))])
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (last - first,)}
    # Plain writes: on a full disk they raise, where writes to a memory map would end the process.
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
        for start in range(first, last, _SLICES_AT_ONCE):
            stop = min(start + _SLICES_AT_ONCE, last)
            records = np.empty(stop - start, dtype)
            records["image"] = slices.read(start, stop)[..., rows, columns]
            records["label"] = labels[start:stop, rows, columns]
            file.write(records.tobytes())
    foreground = np.flatnonzero(labels.any(axis=(1, 2))).tolist()
    table = {"case": case.name, "shape": labels.shape, "box": box, "foreground": foreground}
    write_text(path.with_suffix(".json"), json.dumps(table))


def _bounding_box(occupied: np.ndarray, case: Case) -> list[tuple[int, int]]:
    box = []
    for axis in range(3):
        used = np.flatnonzero(occupied.any(axis=tuple(other for other in range(3) if other != axis)))
        if used.size == 0:
            raise UserError(f"{case.files[0]}: every voxel is 0")
        box.append((int(used[0]), int(used[-1]) + 1))
    return box


@functools.lru_cache(maxsize=_OPEN_FILES)
def _open_records(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")
