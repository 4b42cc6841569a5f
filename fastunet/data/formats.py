"""Which files are volumes and which are images, by their names; case does not matter."""

from __future__ import annotations

from pathlib import PurePath

NIFTI_SUFFIXES = (".nii.gz", ".nii", ".hdr.gz", ".hdr", ".img.gz", ".img")
MGH_SUFFIXES = (".mgz", ".mgh")
META_SUFFIXES = (".mha", ".mhd")
TIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (".png", *TIFF_SUFFIXES, ".jpg", ".jpeg", ".bmp")
VOLUME_SUFFIXES = NIFTI_SUFFIXES + MGH_SUFFIXES + META_SUFFIXES
SUFFIXES = VOLUME_SUFFIXES + IMAGE_SUFFIXES
_SECOND_OF_PAIR = (".img.gz", ".img")


def suffix_of(path: PurePath) -> str:
    """The ending that tells the format, in lower case: ".nii.gz", ".tif", …; "" if it is none of ``SUFFIXES``."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and len(name) > len(suffix)), "")


def stem_of(path: PurePath) -> str:
    """The name without the ending that tells the format."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def is_image(path: PurePath) -> bool:
    """Whether the name is that of a 2-D image (or a stack of them) rather than of a volume."""
    return suffix_of(path) in IMAGE_SUFFIXES


def is_listed(path: PurePath, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """Whether a folder's listing shows this file as data: of a pair only the header counts, and nothing hidden does."""
    suffix = suffix_of(path)
    return suffix in suffixes and suffix not in _SECOND_OF_PAIR and not path.name.startswith(".")
