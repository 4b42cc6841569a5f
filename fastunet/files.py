"""Files that are whole or absent: written under a temporary name, synchronised to the disk, then renamed.

A temporary file is locked by its writer (``flock``, which ends with the process). So what a killed process left behind
can be told from what another one is writing, and :func:`make_output_folder` removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastunet.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: without locks nothing is taken for left behind
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".writing-"
_LONGEST_ENDING = 40  # characters of the final name that the temporary one repeats: names end at 255 bytes


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
    temporary = handle = None
    try:
        handle, temporary = _temporary_file(path)
        yield temporary
        _synchronise(temporary)
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
        _synchronise(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error
    finally:
        if handle is not None and temporary is not None:
            temporary.unlink(missing_ok=True)
            os.close(handle)


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Holds the lock file ``path`` inside the block. A crash leaves the file behind, but not locked.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    path = Path(path)
    handle = _locked_file(path)
    try:
        yield
    finally:
        if _lock(handle) and not os.fstat(handle).st_size:  # what holds something is not ours
            path.unlink(missing_ok=True)
        os.close(handle)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` as one whole file."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` to ``path`` as one whole UTF-8 file; what UTF-8 cannot hold (broken names) is spelt out."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def make_output_folder(path: str | Path) -> Path:
    """Creates ``path`` if needed and proves that it can be written to, before hours of work depend on it.

    Temporary files that killed processes left in it are removed.

    Raises:
        UserError: it cannot be made, is not a folder, or cannot be written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
        _remove_left_behind(path)
    except OSError as error:
        raise UserError(f"cannot write to the output folder {path}: {reason(error)}") from error
    return path


def require_room(folder: Path, count: int, size: int, what: str) -> None:
    """Raises ``UserError`` unless ``count`` of ``what``, at least one, of at least ``size`` bytes each fit the disk."""
    if count < 1:
        raise UserError(f"{count} {what} are asked for; expected at least 1")
    free = shutil.disk_usage(folder).free
    if count * size > free:
        raise UserError(f"{count} {what} take {count * size >> 20} MB at the least, and {folder} has {free >> 20} free")


def reason(error: OSError) -> str:
    """What the operating system said, for the end of a sentence."""
    return (error.strerror or str(error)).lower()


def _temporary_file(path: Path) -> tuple[int, Path]:
    """An open, locked file beside ``path``."""
    while True:
        handle, name = tempfile.mkstemp(prefix=_PREFIX, suffix="-" + path.name[-_LONGEST_ENDING:], dir=path.parent)
        if _lock(handle) is not False and _names(name, handle):
            return handle, Path(name)
        os.close(handle)  # another process took it for left behind before it was locked


def _locked_file(path: Path) -> int:
    try:
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if _lock(handle) is False:
                os.close(handle)
                raise UserError(f"another process is at work in {path.parent}; wait for it, or choose another folder")
            if _names(path, handle):
                return handle
            os.close(handle)  # its last holder removed it while it was being opened
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error


def _remove_left_behind(folder: Path) -> None:
    for path in folder.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR)
            try:
                if _lock(handle):
                    path.unlink()
            finally:
                os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether this open file is now locked by us; None where the system or the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if isinstance(error, BlockingIOError) else None
    return True


def _names(path: str | Path, handle: int) -> bool:
    """Whether ``path`` is the name of the open file ``handle``."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
