"""The cases of plain image folders: ``images/`` beside ``masks/``, or stacks as those of the ISBI challenge."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from fastunet.data.case import COLOURS, Case, Source
from fastunet.data.formats import IMAGE_SUFFIXES, is_listed, listed_below, stem_of
from fastunet.data.labels import LabelMap
from fastunet.data.masks import mask_table
from fastunet.data.volumes import read_geometry
from fastunet.errors import Refusal, UserError, refuse, warn_once

IMAGE_FOLDERS = ("images", "image", "imgs")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "annotation", "segmentations", "gt", "ground_truth",
                "groundtruth")  # fmt: skip
_MASK_MARK = "masks?|labels?|segmentation|segmap|seg|gt|groundtruth|annotations?|manual1?|pred|prediction"
_IMAGE_MARK = "images?|img|im|input|raw"
_STACK = re.compile(r"(?P<name>.+)[-_](?P<part>volume|labels?)", re.IGNORECASE | re.DOTALL)
_UNLABELLED = LabelMap("images without masks", (0, 1), ("background", "object"))


def image_folder_cases(root: Path, refused: Refusal = refuse) -> list[Case]:
    """The cases of ``root``, or none if it has no such layout; all masks are read, for the table of their values.

    ``refused`` is called with what is wrong with one image or mask, which is then left out.

    Raises:
        UserError: masks of no classes.
    """
    images, masks = _folder(root, IMAGE_FOLDERS), _folder(root, MASK_FOLDERS)
    pairs = _stacks(root) if images is None else _pairs(images, masks, refused)
    if not pairs:
        return []
    channels = {}
    for name, (image, _) in pairs.items():
        try:
            channels[name] = _channels(image)
        except UserError as error:
            refused(str(error))
    pairs = {name: pairs[name] for name in channels}
    colour = next((pairs[name][0] for name, count in channels.items() if count == 3), None)
    if colour and len(set(channels.values())) > 1:
        mixed = f"{root} holds grey and colour images, such as {colour}; the grey ones count as colour"
        warn_once(f"grey among colour in {root}", mixed)
    labels = [mask for _, mask in pairs.values() if mask is not None]
    table = mask_table(labels, refused) if labels else _UNLABELLED
    cases = []
    for name, (image, mask) in pairs.items():
        if colour:
            sources = {channel: Source(image, index) for index, channel in enumerate(COLOURS)}
        else:
            sources = {"grey": Source(image)}
        name = name.replace("/", "_")
        cases.append(Case(name, name, sources, mask, table.edition, table))
    return cases


def no_labels(root: str | Path) -> str:
    """The sentence on a folder whose cases have no labels, with what may be masks under another name."""
    images = _folder(Path(root), IMAGE_FOLDERS)
    others = sorted(path.name for path in Path(root).glob("[!.]*") if path.is_dir() and path != images)
    hint = ""
    if images is not None and others and _folder(Path(root), MASK_FOLDERS) is None:
        hint = f": {others[0]} beside {images.name} is taken for no masks; call that folder masks"
    return f"{root} holds no labelled cases{hint}"


def _folder(root: Path, names: Iterable[str]) -> Path | None:
    """The folder in ``root`` that has one of the names, in any spelling."""
    found = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    return next((found[name] for name in names if name in found), None)


def _pairs(images: Path, masks: Path | None, refused: Refusal) -> dict[str, tuple[Path, Path | None]]:
    """Image and mask by name, with that of the folder inside of ``images`` before it; see ``image_finder``."""
    named: dict[str, Path] = {}
    for path in _readable(images, refused):
        if (own := _name_below(images, path)) in named:
            refused(f"{named[own]} and {path} have one name; remove one")
        named.setdefault(own, path)
    pairs: dict[str, tuple[Path, Path | None]] = {name: (path, None) for name, path in named.items()}
    if masks is None or not named:
        return pairs
    find = image_finder(named)
    strays: dict[str, list[Path]] = {}
    for mask in _readable(masks, refused):
        own = _name_below(masks, mask)
        name = find(own)
        if name is None:
            beginnings = [own[: match.start()] for match in re.finditer("[-_. /]", own)]
            owners = named if len(named) == 1 else [image for image in beginnings if image in named]
            strays.setdefault([own, *owners][-1], []).append(mask)
        elif pairs[name][1] is not None:
            refused(f"{pairs[name][1]} and {mask} are masks of one image, {named[name]}; remove one")
        else:
            pairs[name] = (named[name], mask)
    for image, found in strays.items():
        if len(found) > 1:
            refused(f"{images}: {image} has {len(found)} masks, such as {found[0]}: join them to one")
        else:
            refused(f"{found[0]} has no image of that name in {images}")
    return pairs


def _readable(folder: Path, refused: Refusal) -> list[Path]:
    """The images below ``folder``; other files alone are refused."""
    found = list(listed_below(folder, IMAGE_SUFFIXES))
    others = [] if found else sorted(path for path in folder.rglob("[!.]*") if path.is_file())
    if others:
        endings = ", ".join(IMAGE_SUFFIXES)
        refused(f"{folder} holds no image that can be read, but {others[0].name}: images end in {endings}")
    return found


def _name_below(folder: Path, path: Path) -> str:
    """The name of ``path`` in ``folder`` without its ending, the folders in between before it."""
    return path.relative_to(folder).with_name(stem_of(path)).as_posix()


def image_finder(images: Iterable[str]) -> Callable[[str], str | None]:
    """A function from the name of a mask to that of its image, one of ``images``, names without endings.

    It is the same name, or the only one that differs by marks such as ``_mask`` and ``img_``, by capitals, or by how
    letters with accents are composed, which differs between systems.
    """
    spellings: tuple[dict[str, list[str]], ...] = ({}, {}, {})
    for image in images:
        for table, spelled in zip(spellings, (image, _folded(image), _folded(_unmarked(image, _IMAGE_MARK)))):
            table.setdefault(spelled, []).append(image)

    def find(mask: str) -> str | None:
        bare = _unmarked(mask, _MASK_MARK)
        found = [table.get(name, []) for table in spellings for name in (mask, bare, _folded(mask), _folded(bare))]
        return next((alike[0] for alike in found if len(alike) == 1), None)

    return find


def unmarked_mask(name: str) -> str:
    """The name of the image that a mask of this name belongs to, if its name has a mark such as ``_mask``."""
    return _unmarked(name, _MASK_MARK)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _unmarked(name: str, mark: str) -> str:
    """``name`` without marks at its end or at its front, which a digit or a separator divides from the rest."""
    before, _, short = name.rpartition("/")
    while (rest := re.sub(rf"([-_. ]|(?<=\d))({mark})$", "", short, flags=re.IGNORECASE)) not in ("", short):
        short = rest
    rest = re.sub(rf"^({mark})([-_. ]|(?=\d))", "", short, flags=re.IGNORECASE)
    return f"{before}/{rest or short}" if before else rest or short


def _stacks(root: Path) -> dict[str, tuple[Path, Path | None]]:
    """Image and mask by name of files such as ``train-volume.tif`` and ``train-labels.tif``."""
    parts: dict[str, dict[str, Path]] = {}
    for path in sorted(path for path in root.iterdir() if is_listed(path, IMAGE_SUFFIXES)):
        if match := _STACK.fullmatch(stem_of(path)):
            part = "volume" if match["part"].lower() == "volume" else "label"
            parts.setdefault(match["name"], {})[part] = path
    return {name: (found["volume"], found.get("label")) for name, found in parts.items() if "volume" in found}


def _channels(image: Path) -> int:
    channels = (*read_geometry(image).shape[3:], 1)[0]
    if channels not in (1, 3):
        raise UserError(f"{image} has {channels} channels; grey and RGB images can be read")
    return channels
