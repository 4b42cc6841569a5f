"""Which files are volumes and which are images, by their names; case does not matter."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath

from fastunet.errors import UserError

NIFTI_SUFFIXES = (".nii.gz", ".nii", ".hdr.gz", ".hdr", ".img.gz", ".img")
MGH_SUFFIXES = (".mgz", ".mgh")
META_SUFFIXES = (".mha", ".mhd")
TIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (".png", *TIFF_SUFFIXES, ".jpg", ".jpeg", ".bmp", ".gif")
VOLUME_SUFFIXES = NIFTI_SUFFIXES + MGH_SUFFIXES + META_SUFFIXES
SUFFIXES = VOLUME_SUFFIXES + IMAGE_SUFFIXES
_SECOND_OF_PAIR = (".img.gz", ".img")
_MOST_HEADER = 1 << 16


def suffix_of(path: PurePath) -> str:
    """The ending that tells the format, in lower case: ".nii.gz", ".tif", …; "" if it is none of ``SUFFIXES``."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and len(name) > len(suffix)), "")


def stem_of(path: PurePath) -> str:
    """The name without the ending that tells the format."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def parts_of(path: Path) -> list[Path]:
    """All files that hold what ``path`` names: both of a pair, and what a MetaImage header says its voxels are in."""
    name, ending = (path.name[:-3], path.name[-3:]) if path.name.lower().endswith(".gz") else (path.name, "")
    if name[-4:].lower() in (".hdr", ".img"):
        other = {".hdr": ".img", ".img": ".hdr"}[name[-4:].lower()]
        second = path.with_name(name[:-4] + (other.upper() if name[-4:].isupper() else other) + ending)
        return [path, second] if other == ".img" else [second, path]
    if name[-4:].lower() == ".mhd" and path.is_file():
        with open(path, "rb") as file:
            found = re.search(rb"^ElementDataFile\s*=\s*(.+?)\s*$", file.read(_MOST_HEADER), re.MULTILINE)
        data = path.parent / os.fsdecode(found[1]) if found and b"\0" not in found[1] else path
        return [path, data] if data.is_file() and data != path else [path]
    return [path]


def is_image(path: PurePath) -> bool:
    """Whether the name is that of a 2-D image (or a stack of them) rather than of a volume."""
    return suffix_of(path) in IMAGE_SUFFIXES


def is_listed(path: PurePath, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """Whether a folder's listing shows this file as data: of a pair only the header counts, and nothing hidden does."""
    suffix = suffix_of(path)
    return suffix in suffixes and suffix not in _SECOND_OF_PAIR and not path.name.startswith(".")


def listed_below(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The files below ``root`` with these endings, in order, hidden ones left out; each folder once.

    Links are followed, but not to folders that ``root`` itself lies in.

    Raises:
        UserError: a folder that cannot be read.
    """
    seen = {str(folder) for folder in Path(os.path.realpath(root)).parents}

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if is_listed(Path(name), suffixes))
