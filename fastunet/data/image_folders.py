"""The cases of folders without a table: ``images/`` beside ``masks/``, stacks, and masks beside images by name."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from fastunet.data.case import COLOURS, Case, Source
from fastunet.data.formats import IMAGE_SUFFIXES, SUFFIXES, VOLUME_SUFFIXES, is_image, is_listed, listed_below, stem_of
from fastunet.data.labels import LabelMap
from fastunet.data.masks import mask_table
from fastunet.data.single_masks import masks_by_class
from fastunet.data.volumes import read_geometry
from fastunet.errors import Refusal, UserError, refuse, warn_once

IMAGE_FOLDERS = ("images", "image", "imgs", "jpegimages")
_TRUTH_MARK = (
    "masks?|labels?|segmentations?|segmap|segm?|msk|wmh|gt|ground[_ ]?truth|annotations?|manual1?|manualmasks?|"
    "segmentationclass(png)?|gtfine|gtcoarse|label(train)?ids|[12](st|nd)ho|man_seg"
)
_MASK_MARK = f"{_TRUTH_MARK}|pred|prediction"
_IMAGE_MARK = r"images?|img|im|input|raw|volumes?|training|test|leftimg8bit|t(?=\d{3})"  # t1 and t2 are kinds of scans
MARKED = re.compile(rf"(.*[-_. \d])?({_TRUTH_MARK})([-_. \d].*)?", re.IGNORECASE | re.DOTALL)
_STACK = re.compile(r"(?P<name>.+)[-_](?P<part>volume|labels?)", re.IGNORECASE | re.DOTALL)
UNNAMED = "image"
"""The channel of volumes of one channel each."""
_UNLABELLED = LabelMap("images without masks", (0, 1), ("background", "object"))
Pairs = dict[str, tuple[Path, tuple[Path, ...]]]
"""By name an image and its masks: none, one, or one for each object or class."""


def image_folder_cases(root: Path, refused: Refusal = refuse) -> list[Case]:
    """The cases of a folder of images or volumes and one of masks in ``root``, or in folders of one each, or of stacks.

    All masks are read, for the table of their values. ``refused`` is called with what is wrong with one image or mask,
    which is then left out.

    Raises:
        UserError: masks of no classes, or several folders of masks.
    """
    images, masks = _folders(root)
    if images is not None:
        return cases_of(_pairs_of(images, masks, refused), refused)
    pairs: Pairs = {}
    for case in sorted(path for path in root.glob("[!.]*") if path.is_dir()):
        images = _folder(case, IMAGE_FOLDERS)
        if images is not None and len(list(itertools.islice(listed_below(images, SUFFIXES), 2))) != 1:
            pairs = {}  # they are parts of a data set, such as train and test
            break
        if images is not None:
            (pairs[case.name],) = _pairs_of(images, _folders(case)[1], refused, alone=True).values()
    return cases_of(pairs or _stacks(root), refused)


def cases_of(pairs: Pairs, refused: Refusal, named: Mapping[str, Mapping[str, Path]] | None = None) -> list[Case]:
    """The cases of images or volumes, some of several ``named`` channels, and masks, with the table of all of these."""
    channels = {}
    labelled = any(masks for _, masks in pairs.values())
    for name, (image, masks) in pairs.items():
        try:
            channels[name] = _channels(image)
        except UserError as error:
            if labelled and not masks:  # a series beside frames that are labelled
                warn_once(f"left out of {image.parent.parent}", f"{error}; it has no mask, and is left out")
            else:
                refused(str(error))
    pairs = {name: pairs[name] for name in channels}
    colour = next((pairs[name][0] for name, count in channels.items() if count == 3), None)
    if colour and len(set(channels.values())) > 1:
        mixed = f"{colour.parent} holds grey and colour images, such as {colour}; the grey ones count as colour"
        warn_once(f"grey among colour in {colour.parent}", mixed)
    labels = [mask for _, masks in pairs.values() for mask in masks]
    classes: dict[Path, str] = {}
    if any(len(masks) > 1 for _, masks in pairs.values()):
        table, classes = masks_by_class({image: masks for image, masks in pairs.values() if masks})
    else:
        table = mask_table(labels, refused) if labels else _UNLABELLED
    cases = []
    for name, (image, masks) in pairs.items():
        if colour:
            sources = {channel: Source(image, index) for index, channel in enumerate(COLOURS)}
        elif named and name in named:
            sources = {channel: Source(path) for channel, path in named[name].items()}
        else:
            sources = {"grey" if is_image(image) else UNNAMED: Source(image)}
        name = name.replace("/", "_")
        own = {mask: classes[mask] for mask in masks} if classes else {}
        cases.append(Case(name, name, sources, next(iter(masks), None), table.edition, table, masks=own))
    return cases


def no_labels(root: str | Path) -> str:
    """The sentence on a folder whose cases have no labels, with what may be masks under another name."""
    images = _folder(Path(root), IMAGE_FOLDERS)
    others = sorted(path.name for path in Path(root).glob("[!.]*") if path.is_dir() and path != images)
    hint = ""
    if images is not None and others and not any(map(MARKED.fullmatch, others)):
        hint = f": {others[0]} beside {images.name} is taken for no masks; call that folder masks"
    beside = ": no mask like a_mask.png, no label file like a_seg.nii.gz, no labelsTr"
    return f"{root} holds no labelled cases{hint or beside}"


def _folder(root: Path, names: Iterable[str]) -> Path | None:
    """The folder in ``root`` that has one of the names, in any spelling."""
    found = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    return next((found[name] for name in names if name in found), None)


def _folders(root: Path) -> tuple[Path | None, Path | None]:
    """The folder of images in ``root``, and that of their masks, by their names: one that is marked, and its fellow.

    Raises:
        UserError: several folders whose names are marked hold images.
    """
    folders = [path for path in sorted(root.glob("[!.]*")) if path.is_dir()]
    marked = [path for path in folders if MARKED.fullmatch(path.name)]
    images = _folder(root, IMAGE_FOLDERS)
    if images is None and len(marked) == 1:
        others = {path.name: path for path in folders if path not in marked and _holds_images(path)}
        fellow = image_finder(others)(marked[0].name) or (next(iter(others)) if len(others) == 1 else "")
        images = others.get(fellow)
    holding = [path for path in marked if images is not None and _holds_images(path)]
    if len(holding) > 1:
        raise UserError(f"{root}: {' and '.join(path.name for path in holding)} may all hold masks; leave one there")
    return images, ([*holding, *marked, None][0] if images is not None else None)


def _holds_images(folder: Path) -> bool:
    return next(listed_below(folder, SUFFIXES), None) is not None


def _pairs_of(images: Path, masks: Path | None, refused: Refusal, *, alone: bool = False) -> Pairs:
    """Image and mask by name in two folders, with that of the folder inside of ``images`` before it."""
    named = named_files(images, _readable(images, refused), refused)
    if masks is None or not named:
        return {name: (path, ()) for name, path in named.items()}
    return pairs_by_name(named, masks, _readable(masks, refused), refused, alone)


def named_files(folder: Path, paths: Iterable[Path], refused: Refusal) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in paths:
        if (own := name_below(folder, path)) in named:
            refused(f"{named[own]} and {path} have one name; remove one")
        named.setdefault(own, path)
    return named


def pairs_by_name(named: dict[str, Path], folder: Path, masks: list[Path], refused: Refusal, alone: bool) -> Pairs:
    """The images ``named`` with those of ``masks``, which lie in ``folder``; see ``image_finder``.

    ``alone`` lets one image and one mask belong together whatever their names are.
    """
    pairs: Pairs = {name: (path, ()) for name, path in named.items()}
    find = image_finder(named)
    strays: dict[str, list[Path]] = {}
    for mask in masks:
        own = name_below(folder, mask)
        name = next(iter(named)) if alone and len(masks) == 1 else find(own)
        if name is None:
            beginnings = [own[: match.start()] for match in re.finditer("[-_. /]", own)]
            owners = [*named] if alone else [image for image in beginnings if image in named]
            owners = owners or [*filter(None, [find(own.rpartition("/")[2])])]  # in a folder of its class
            strays.setdefault([own, *owners][-1], []).append(mask)
        elif pairs[name][1]:
            refused(f"{pairs[name][1][0]} and {mask} are masks of one image, {named[name]}; remove one")
        else:
            pairs[name] = (named[name], (mask,))
    together = {image: (*pairs[image][1], *found) for image, found in strays.items() if image in pairs}
    several = any(len(found) > 1 for found in together.values())
    for image, found in strays.items():
        inside = name_below(folder, found[0]).rpartition("/")[2]
        if image in together and (several or find(inside) == image):
            pairs[image] = (named[image], together[image])
        else:
            refused(f"{found[0]} has no image of that name; call it as its image is, or take it out of {folder}")
    return pairs


def _readable(folder: Path, refused: Refusal) -> list[Path]:
    """The images or volumes below ``folder``; other files alone are refused."""
    found = list(listed_below(folder, SUFFIXES))
    if not found and (unread := unreadable(folder)):
        refused(unread)
    return found


def unreadable(folder: Path) -> str:
    """The sentence on a folder of files none of which can be read, "" if there is no file at all."""
    others = sorted(path for path in folder.rglob("[!.]*") if path.is_file())
    if not others:
        return ""
    kinds = f"volumes end in {', '.join(VOLUME_SUFFIXES)}, images in {', '.join(IMAGE_SUFFIXES)}"
    return f"{folder} holds no file that can be read, but {others[0].relative_to(folder)}: convert it; {kinds}"


def name_below(folder: Path, path: Path) -> str:
    """The name of ``path`` without its ending, after the folders between it and ``folder`` if it lies there."""
    between = path.relative_to(folder) if folder in path.parents else Path(path.name)
    return between.with_name(stem_of(path)).as_posix()


def image_finder(images: Iterable[str]) -> Callable[[str], str | None]:
    """A function from the name of a mask to that of its image, one of ``images``, names without endings.

    It is the same name, or the only one that differs by marks such as ``_mask`` and ``img_``, by capitals, by how
    letters with accents are composed, which differs between systems, or by zeros before numbers.
    """
    spellings: tuple[dict[str, list[str]], ...] = ({}, {}, {}, {})
    for image in images:
        bare = _folded(_unmarked(image, _IMAGE_MARK))
        for table, spelled in zip(spellings, (image, _folded(image), bare, _unpadded(bare))):
            table.setdefault(spelled, []).append(image)

    def find(mask: str) -> str | None:
        bare = _unmarked(mask, _MASK_MARK)
        names = (mask, bare, _folded(mask), _folded(bare), _unpadded(_folded(bare)))
        found = [table.get(name, []) for table in spellings for name in names]
        return next((alike[0] for alike in found if len(alike) == 1), None)

    return find


def unmarked_mask(name: str) -> str:
    """The name of the image that a mask of this name belongs to, if its name has a mark such as ``_mask``."""
    return _unmarked(name, _MASK_MARK)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _unpadded(name: str) -> str:
    return re.sub(r"(?<!\d)0+(?=\d)", "", name)


def _unmarked(name: str, mark: str) -> str:
    """``name`` without marks at its end or at its front, which a digit or a separator divides from the rest."""
    before, _, short = name.rpartition("/")
    while (rest := re.sub(rf"([-_. ]|(?<=\d))({mark})$", "", short, flags=re.IGNORECASE)) not in ("", short):
        short = rest
    rest = re.sub(rf"^({mark})([-_. ]|(?=\d))", "", short, flags=re.IGNORECASE)
    return f"{before}/{rest or short}" if before else rest or short


def _stacks(root: Path) -> Pairs:
    """Image and mask by name of files such as ``train-volume.tif`` and ``train-labels.tif``."""
    parts: dict[str, dict[str, Path]] = {}
    for path in sorted(path for path in root.iterdir() if is_listed(path, IMAGE_SUFFIXES)):
        if match := _STACK.fullmatch(stem_of(path)):
            part = "volume" if match["part"].lower() == "volume" else "label"
            parts.setdefault(match["name"], {})[part] = path
    volumes = {name: found.pop("volume") for name, found in parts.items() if "volume" in found}
    return {name: (path, tuple(parts[name].values())) for name, path in volumes.items()}


def _channels(image: Path) -> int:
    channels = (*read_geometry(image).shape[3:], 1)[0]
    if channels not in ((1, 3) if is_image(image) else (1,)):
        can = "grey and RGB images can be read" if is_image(image) else "a dataset.json says what those of volumes are"
        raise UserError(f"{image} has {channels} channels; {can}")
    return channels
