"""Bytes of users' files: plain or gzip by content, never memory-mapped, bounded by what the file can hold.

A memory map of a file that someone cuts short ends the process by a signal; a plain read ends in a sentence. No buffer
is filled before the data for it arrive, so a small file that declares a petabyte costs neither memory nor time.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastunet.errors import UserError, warn_once

_CHUNK_BYTES = 1 << 20
_DEFLATE_LIMIT = 1032  # no deflate stream grows by more; RFC 1951: 258 bytes from 2 bits
_SURPLUS_LIMIT = 64 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_FOREIGN = {
    b"version https://git-lfs.github.com/": "a Git LFS pointer: `git lfs pull` fetches the file itself",
    b"<!DOCTYPE": "a web page, not the file that was to be downloaded",
    b"<html": "a web page, not the file that was to be downloaded",
    b"PK\3\4": "a ZIP archive: unpack it",
    b"BZh91AY&SY": "compressed by bzip2: unpack it",
    b"\xfd7zXZ\0": "compressed by xz: unpack it",
}
"""What files begin with that were never brought into the form that their name promises."""


class DataStream:
    """A file read forwards; see ``open_stream``. ``raw`` is the file as it is stored, for libraries that read it."""

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        self.path = path
        self.raw = raw
        self._size = os.fstat(raw.fileno()).st_size
        self.compressed = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        self._stream: Any = gzip.GzipFile(fileobj=raw) if self.compressed else raw
        self._position = 0

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes, fewer at the end of the file."""
        data: bytes = self._stream.read(count)
        self._position += len(data)
        return data

    def skip_to(self, position: int) -> None:
        """Moves on to ``position``."""
        self.check_holds(position)
        if not self.compressed:
            self.raw.seek(position)
            self._position = position
        while self._position < position:
            if not self.read(min(_CHUNK_BYTES, position - self._position)):
                raise EOFError

    def read_array(self, count: int) -> np.ndarray:
        """The next ``count`` bytes as uint8; ``EOFError`` if there are fewer."""
        self.check_holds(self._position + count)
        data = np.empty(count, np.uint8)  # costs memory only as it is filled
        view, filled = memoryview(data.data), 0
        while filled < count:
            got = self._stream.readinto(view[filled : filled + _CHUNK_BYTES])
            if not got:
                raise EOFError
            filled += got
        self._position += count
        return data

    def check_holds(self, count: int) -> None:
        """Raises ``EOFError`` if the file is too small to hold ``count`` bytes, before anything is read."""
        if count > self._size * (_DEFLATE_LIMIT if self.compressed else 1):
            raise EOFError

    def drain(self) -> None:
        """Reads a compressed file to its end, where the checksum is."""
        surplus = 0
        while self.compressed and (data := self.read(_CHUNK_BYTES)):
            surplus += len(data)
            if surplus > _SURPLUS_LIMIT:
                raise UserError(f"{self.path} holds more than {surplus >> 20} MB beyond the voxels that it declares")


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[DataStream]:
    """The file ``path``, decompressed if its content is gzip, whatever its name says.

    Raises:
        UserError: no file, no regular file, an empty one, damaged or too short data, or one that changed meanwhile.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening: a pipe would wait for its writer
            raise UserError(f"{path} is not a regular file")
        with open(path, "rb") as raw:
            before = os.fstat(raw.fileno())
            if before.st_size == 0:
                raise UserError(f"{path} is empty")
            beginning = raw.read(max(map(len, _FOREIGN)))
            if foreign := next((what for mark, what in _FOREIGN.items() if beginning.startswith(mark)), None):
                raise UserError(f"{path} is {foreign}")
            raw.seek(0)
            yield DataStream(path, raw)
            after = os.fstat(raw.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise UserError(f"{path} changed while it was read; start again when nothing writes to it")
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except EOFError as error:
        raise UserError(f"{path} is truncated or damaged: it holds less data than its header declares") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged: its compressed content cannot be unpacked") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (OverflowError, MemoryError) as error:
        raise UserError(f"{path} cannot be read: its header declares more than fits into memory") from error


def note_compression(stream: DataStream, expected: bool) -> None:
    """Says once that names and contents disagree on compression."""
    if stream.compressed != expected:
        problem = "is compressed though its name does not say so" if stream.compressed else "is not compressed"
        warn_once(f"compression, {expected} by name", f"{stream.path} {problem}; it is read by its content")
