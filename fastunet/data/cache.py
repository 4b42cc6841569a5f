"""Preprocessed slices on disk: one file per case, named after the content that it was made from.

A record is one slice: the modalities, float32, then the labels, uint8, and if asked for the term of
``border_weights.border_term``, float32. Records are cut to the box around everything
that is not 0, which loses nothing and leaves a third of a skull-stripped volume: about 30 MB for a BraTS case of two
modalities. float32 rather than float16, so that training and segmentation see the same bits. Records are read by plain
reads and carry a checksum: a file that is cut short, changed or gone is made again, where a memory map would end the
process.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec
import numpy as np

from fastunet.data.border_weights import border_term
from fastunet.data.case import Case, Source
from fastunet.data.formats import parts_of
from fastunet.data.grids import check_geometry
from fastunet.data.labels import IGNORED
from fastunet.data.resampling import resample_labels
from fastunet.data.single_masks import case_labels, case_objects
from fastunet.data.slices import CaseSlices
from fastunet.errors import UserError
from fastunet.files import whole_file, write_text
from fastunet.schema import read_json

_VERSION = 3  # part of every key: raise it when the same input gives other records
_HASH_CHUNK_BYTES = 1 << 20
_SLICES_AT_ONCE = 16
_OPEN_FILES = 128  # well below the usual limit of 1024 open files, for data sets of any number of cases


class DamagedCacheError(UserError):
    """A file of the cache is gone, cut short or changed; it can be made again."""


class _Description(msgspec.Struct):
    """The file beside the records, written last: where it is, they are.

    ``digest`` is that of the other fields; with it a change of any of them shows.
    """

    case: str
    shape: tuple[int, int, int]
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    foreground: list[int]
    offset: int
    checksums: list[int]
    digest: str = ""

    def own_digest(self) -> str:
        """What ``digest`` must be."""
        facts = msgspec.json.encode(msgspec.structs.replace(self, digest=""))
        return hashlib.blake2b(facts, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Preparation:
    """How records are made of a case: options of ``CaseSlices``, and whether they have the border term."""

    modalities: tuple[str, ...]
    axis: int
    normalise: bool
    on_nan: str
    spacing: tuple[float, float] | None
    border: bool


@dataclass(frozen=True)
class CachedCase:
    """The records of one case.

    Attributes:
        path: the ``.npy`` file of the records.
        channels: the number of modalities.
        shape: slices, height and width before the cut to the box.
        box: (start, stop) on the same three axes.
        foreground: bool, for each of all slices whether any label is neither 0 nor ignored.
        offset: where the first record begins.
        checksums: of each record.
        border: whether a record has the border term.
    """

    path: Path
    channels: int
    shape: tuple[int, int, int]
    box: tuple[tuple[int, int], ...]
    foreground: np.ndarray
    offset: int
    checksums: tuple[int, ...]
    border: bool = False

    @property
    def key(self) -> str:
        """The digest of content and options."""
        return self.path.stem

    @property
    def dtype(self) -> np.dtype:
        """Of a record: fields "image", float32 (modalities, height, width) of the box, "label", uint8, and "border"."""
        return _record_dtype(self.channels, self.box, self.border)

    def record(self, index: int) -> np.void | None:
        """The record of slice ``index``, or None where the slice is empty.

        Raises:
            DamagedCacheError: the file is not what was written.
        """
        start, stop = self.box[0]
        if not start <= index < stop:
            return None
        size, number = self.dtype.itemsize, index - start
        try:
            data = os.pread(_opened(self.path).fileno(), size, self.offset + number * size)
        except OSError as error:
            raise DamagedCacheError(f"the cache file {self.path} cannot be read: {error.strerror}") from error
        if len(data) < size or zlib.crc32(data) != self.checksums[number]:
            raise DamagedCacheError(f"the cache file {self.path} was changed or cut short")
        return cast(np.void, np.frombuffer(data, self.dtype)[0])

    def discard(self) -> None:
        """Removes the files, so that they are made again."""
        _opened.cache_clear()
        for path in (self.path.with_suffix(".json"), self.path):
            path.unlink(missing_ok=True)


def cache_case(case: Case, folder: Path, made: Preparation) -> CachedCase:
    """The records of ``case`` in ``folder``, made if they are not there, or not whole.

    Files appear whole, by renaming, and their content follows from their name: processes may share the folder and be
    killed at any time.

    Raises:
        UserError: no label, files that cannot be read, do not match or change meanwhile, a volume of zeros, or a full
            disk.
    """
    if case.label is None:
        raise UserError(f"{case.files[0].parent}: case {case.name} has no label file")
    before = _states(case)
    table = [list(case.label_map.values), case.label_map.ignore, sorted(case.label_map.aliases.items())]
    options = [_VERSION, made.modalities, made.axis, made.normalise, made.on_nan, table, case.pages, case.is_image]
    if made.spacing is not None:
        options.append(made.spacing)
    options += ["border"] if made.border else []
    options += case.masks.values()
    path = folder / f"{_content_key(case, made.modalities, options)}.npy"
    cached = _described(path, made)
    if cached is None:
        _write_records(case, path, made, before)
        cached = _described(path, made)
    if cached is None:
        raise UserError(f"{path} vanished right after it was written; is something else clearing {folder}?")
    return cached


def _described(path: Path, made: Preparation) -> CachedCase | None:
    """The records at ``path`` if they and their description are whole, as far as sizes tell."""
    try:
        table = read_json(path.with_suffix(".json"), _Description)
        size = path.stat().st_size
    except (UserError, OSError):
        return None
    if table.digest != table.own_digest():
        return None
    foreground = np.zeros(table.shape[0], dtype=bool)
    foreground[table.foreground] = True
    channels, checksums = len(made.modalities), tuple(table.checksums)
    cached = CachedCase(path, channels, table.shape, table.box, foreground, table.offset, checksums, made.border)
    return cached if size == table.offset + len(table.checksums) * cached.dtype.itemsize else None


def _states(case: Case) -> list[tuple[int, int] | None]:
    """Size and time of change of every file of the case, None for one that is not there."""
    states: list[tuple[int, int] | None] = []
    for path in itertools.chain.from_iterable(map(parts_of, case.files)):
        try:
            state = path.stat()
        except OSError:
            states.append(None)
        else:
            states.append((state.st_size, state.st_mtime_ns))
    return states


def _content_key(case: Case, modalities: Sequence[str], options: list[Any]) -> str:
    digest = hashlib.blake2b(json.dumps(options).encode(), digest_size=16)
    files = {}
    sources: list[Source] = [case.modalities[modality] for modality in modalities]
    for path, channel in [*sources, *map(Source, case.masks or [cast(Path, case.label)])]:
        if path not in files:
            files[path] = _file_digest(path)
        digest.update(files[path] + str(channel).encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    try:
        for part in parts_of(path):
            with open(part, "rb") as file:
                while chunk := file.read(_HASH_CHUNK_BYTES):
                    digest.update(chunk)
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    return digest.digest()


def _write_records(case: Case, path: Path, made: Preparation, states: list[Any]) -> None:
    check_geometry(case, made.modalities)
    slices = CaseSlices(case, made.modalities, axis=made.axis, normalise=made.normalise, on_nan=made.on_nan,
                        spacing=made.spacing)  # fmt: skip
    labels = slices.stack(case_labels(case))
    objects = slices.stack(numbers) if made.border and (numbers := case_objects(case)) is not None else None
    if slices.grid != slices.slice_shape:
        labels = resample_labels(labels, slices.grid)
    if _states(case) != states:  # the records would not be those that their name promises
        raise UserError(
            f"files of case {case.name} in {case.files[0].parent} changed while they were read; start again"
        )
    box = _bounding_box(slices.occupied() | (labels != 0), case)
    (first, last), rows, columns = box[0], slice(*box[1]), slice(*box[2])
    dtype = _record_dtype(len(made.modalities), box, made.border)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (last - first,)}
    checksums = []
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
        offset = file.tell()
        for start in range(first, last, _SLICES_AT_ONCE):
            stop = min(start + _SLICES_AT_ONCE, last)
            records = np.empty(stop - start, dtype)
            records["image"] = slices.read(start, stop)[..., rows, columns]
            records["label"] = labels[start:stop, rows, columns]
            for index, record in enumerate(records, start):
                if made.border:
                    term = border_term(labels[index], None if objects is None else objects[index])
                    record["border"] = term[rows, columns]
                data = record.tobytes()
                checksums.append(zlib.crc32(data))
                file.write(data)
    foreground = np.flatnonzero(((labels != 0) & (labels != IGNORED)).any(axis=(1, 2))).tolist()
    table = _Description(case.name, labels.shape, (box[0], box[1], box[2]), foreground, offset, checksums)
    table.digest = table.own_digest()
    write_text(path.with_suffix(".json"), msgspec.json.encode(table).decode())


def fields_of(dtype: np.dtype) -> dict[str, np.dtype]:
    """The fields of a record by name, each with its shape."""
    return {name: dtype[name] for name in dtype.names or ()}


def _record_dtype(channels: int, box: Sequence[tuple[int, int]], border: bool) -> np.dtype:
    height, width = (stop - start for start, stop in box[1:])
    fields = [("image", "<f4", (channels, height, width)), ("label", "u1", (height, width))]
    return np.dtype([*fields, ("border", "<f4", (height, width))] if border else fields)


def _bounding_box(occupied: np.ndarray, case: Case) -> list[tuple[int, int]]:
    box = []
    for axis in range(3):
        used = np.flatnonzero(occupied.any(axis=tuple(other for other in range(3) if other != axis)))
        if used.size == 0:
            raise UserError(f"{case.files[0]}: every voxel is 0")
        box.append((int(used[0]), int(used[-1]) + 1))
    return box


@functools.lru_cache(maxsize=_OPEN_FILES)
def _opened(path: Path) -> BinaryIO:
    return open(path, "rb", buffering=0)  # closed when it falls out of the cache
