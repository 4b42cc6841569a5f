"""Files that are whole or absent: written under a temporary name, synchronised to the disk, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastunet.errors import UserError


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _read_umask()
"""Read once: reading sets it for a moment, which another thread's new file would notice."""


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` (same suffixes) that becomes ``path`` when the block ends well.

    A reader, or a process started after a crash, sees the old file or the new one. If the block fails, nothing is left.

    Raises:
        UserError: the operating system refused (no permission, no space, not a folder).
    """
    path = Path(path)
    temporary = None
    try:
        handle, name = tempfile.mkstemp(prefix=".writing-", suffix="-" + path.name, dir=path.parent)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        _synchronise(temporary)
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
        _synchronise(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` as one whole file."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` to ``path`` as one whole UTF-8 file."""
    write_bytes(path, text.encode())


def make_output_folder(path: str | Path) -> Path:
    """Creates ``path`` if needed and proves that it can be written to, before hours of work depend on it.

    Raises:
        UserError: it cannot be made, is not a folder, or cannot be written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".writing-", dir=path) as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise UserError(f"cannot write to the output folder {path}: {_reason(error)}") from error
    return path


def read_text(path: str | Path) -> str:
    """The text of ``path``; a file that cannot be read, or is not UTF-8 text, is a ``UserError``."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not a text file") from error


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
