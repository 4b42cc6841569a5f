"""The cases of plain image folders: ``images/`` beside ``masks/``, or stacks as those of the ISBI challenge."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from fastunet.data.case import Case, Source
from fastunet.data.formats import IMAGE_SUFFIXES, is_listed, stem_of
from fastunet.data.labels import LabelMap
from fastunet.data.masks import mask_table
from fastunet.data.volumes import read_geometry
from fastunet.errors import Refusal, UserError, refuse, warn_once

IMAGE_FOLDERS = ("images", "image", "imgs")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "annotation", "segmentations")
_MASK_MARK = "masks?|labels?|segmentation|segmap|seg|gt|groundtruth|annotations?|manual1?"
_IMAGE_MARK = "images?|img|im|input|raw"
_STACK = re.compile(r"(?P<name>.+)[-_](?P<part>volume|labels?)", re.IGNORECASE | re.DOTALL)
_COLOURS = ("red", "green", "blue")
_UNLABELLED = LabelMap("images without masks", (0, 1), ("background", "object"))


def image_folder_cases(root: Path, refused: Refusal = refuse) -> list[Case]:
    """The cases of ``root``, or none if it has no such layout; all masks are read, for the table of their values.

    ``refused`` is called with what is wrong with one image or mask, which is then left out.

    Raises:
        UserError: masks without an image, two files of one name, images of unusual channels, masks of no classes.
    """
    images, masks = _folder(root, IMAGE_FOLDERS), _folder(root, MASK_FOLDERS)
    pairs = _stacks(root) if images is None else _pairs(images, masks, refused)
    if not pairs:
        return []
    channels = {name: _channels(image) for name, (image, _) in pairs.items()}
    colour = next((pairs[name][0] for name, count in channels.items() if count == 3), None)
    if colour and len(set(channels.values())) > 1:
        mixed = f"{root} holds grey and colour images, such as {colour}; the grey ones count as colour"
        warn_once(f"grey among colour in {root}", mixed)
    labels = [mask for _, mask in pairs.values() if mask is not None]
    table = mask_table(labels) if labels else _UNLABELLED
    cases = []
    for name, (image, mask) in pairs.items():
        if colour:
            sources = {channel: Source(image, index) for index, channel in enumerate(_COLOURS)}
        else:
            sources = {"grey": Source(image)}
        cases.append(Case(name, name, sources, mask, table.edition, table))
    return cases


def _folder(root: Path, names: Iterable[str]) -> Path | None:
    """The folder in ``root`` that has one of the names, in any spelling."""
    found = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    return next((found[name] for name in names if name in found), None)


def _listing(folder: Path | None) -> list[Path]:
    return [] if folder is None else sorted(path for path in folder.iterdir() if is_listed(path, IMAGE_SUFFIXES))


def _pairs(images: Path, masks: Path | None, refused: Refusal) -> dict[str, tuple[Path, Path | None]]:
    """Image and mask by name; the name of a mask may end or begin with a mark such as ``_mask``."""
    named: dict[str, Path] = {}
    for path in _listing(images):
        if stem_of(path) in named:
            refused(f"{named[stem_of(path)]} and {path} have one name; remove one")
        named.setdefault(stem_of(path), path)
    pairs: dict[str, tuple[Path, Path | None]] = {name: (path, None) for name, path in named.items()}
    for mask in _listing(masks):
        name = image_name(stem_of(mask), named)
        if name is None:
            refused(f"{mask} has no image of that name in {images}")
        elif pairs[name][1] is not None:
            refused(f"{pairs[name][1]} and {mask} are masks of one image, {named[name]}; remove one")
        else:
            pairs[name] = (named[name], mask)
    return pairs


def image_name(mask: str, images: Collection[str]) -> str | None:
    """The image that a mask belongs to, by names without endings: the same, or one that differs by marks only."""
    if mask in images:
        return mask
    bare = _unmarked(mask, _MASK_MARK)
    if bare in images:
        return bare
    alike = [name for name in images if _unmarked(name, _IMAGE_MARK) == bare]
    return alike[0] if len(alike) == 1 else None


def _unmarked(name: str, mark: str) -> str:
    """``name`` without a mark at its end or at its front."""
    short = re.sub(rf"[-_. ]({mark})$", "", name, flags=re.IGNORECASE)
    return short if short != name else re.sub(rf"^({mark})[-_. ]", "", name, flags=re.IGNORECASE)


def _stacks(root: Path) -> dict[str, tuple[Path, Path | None]]:
    """Image and mask by name of files such as ``train-volume.tif`` and ``train-labels.tif``."""
    parts: dict[str, dict[str, Path]] = {}
    for path in _listing(root):
        if match := _STACK.fullmatch(stem_of(path)):
            part = "volume" if match["part"].lower() == "volume" else "label"
            parts.setdefault(match["name"], {})[part] = path
    return {name: (found["volume"], found.get("label")) for name, found in parts.items() if "volume" in found}


def _channels(image: Path) -> int:
    channels = (*read_geometry(image).shape[3:], 1)[0]
    if channels not in (1, 3):
        raise UserError(f"{image} has {channels} channels; grey and RGB images can be read")
    return channels
