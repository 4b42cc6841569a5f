"""What a command reads and writes, compared before it starts: no file that is read is ever written over."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from fastunet.errors import UserError

_LONGEST_NAME = 255  # bytes, on every usual file system
_FORBIDDEN = frozenset('/\\:*?"<>|')


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path], *, overwrite: bool = True) -> None:
    """Proves that ``outputs`` can be written without loss.

    Files are compared by what they are, so links, hard links, other spellings and names that the file system takes for
    the same change nothing. Outputs whose names differ in capitals or in the form of accents only count as one: many
    file systems take them for one.

    Args:
        outputs: every file that will be written.
        inputs: every file that will be read; one that does not exist is left to its reader to report.
        overwrite: whether existing files may be replaced.

    Raises:
        UserError: an output that is an input, exists against the user's will, is a folder or device, or comes twice.
    """
    read = {}
    for path in inputs:
        if (identity := _identity(path)) is not None:
            read[identity] = path
    written: dict[tuple[str, str], Path] = {}
    for path in outputs:
        if len(os.fsencode(path.name)) > _LONGEST_NAME:
            raise UserError(f"the name {path.name} is too long for a file")
        place = os.path.realpath(path.parent), unicodedata.normalize("NFC", path.name).casefold()
        if place in written:
            other = written[place]
            same = f"would be written to {path}" if other == path else f"would be written to {other} and {path}"
            raise UserError(f"two results {same}; use another output folder for one of them")
        written[place] = path
        identity = _identity(path)
        if identity is not None and (source := read.get(identity)) is not None:
            alias = "" if source == path else f", under the name {source}"
            raise UserError(f"{path} is an input{alias}; choose another output")
        if path.is_dir():
            raise UserError(f"{path} is a folder; the result of that name cannot be written")
        if place[0] == "/dev" or f"{place[0]}/".startswith("/proc/") or (path.exists() and not path.is_file()):
            raise UserError(f"{path} is no place for a file, which is written beside it and then takes its name")
        if not overwrite and os.path.lexists(path):
            raise UserError(f"{path} exists; --overwrite replaces it")


def name_for_file(text: str) -> str:
    """``text`` with an underscore for spaces and for every character that some file system does not take in a name."""
    return "".join("_" if c in _FORBIDDEN or c.isspace() or not c.isprintable() else c for c in text)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
