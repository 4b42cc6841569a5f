"""Several masks of one image or volume: a file for each object, as of the 2018 Data Science Bowl, or each class."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from fastunet.data.case import Case
from fastunet.data.formats import is_image, stem_of
from fastunet.data.labels import COLOUR, IGNORED, MAX_CLASSES, LabelMap
from fastunet.data.volumes import read_label_values, read_labels
from fastunet.errors import UserError

OBJECT = "object"
MARKS = "masks?|labels?|segmentations?|segm?|msk|gt|ground|truth|annotations?"
_MOST_SHARED = 0.5
"""The part of an object that may lie under others of its image: more of it is the same object, painted twice."""


def masks_by_class(groups: Mapping[Path, Sequence[Path]]) -> tuple[LabelMap, dict[Path, str]]:
    """The table of images whose masks are a file for each object or each class, and the class of each mask.

    Names tell: numbers and names that no other image has are objects; words without digits that recur are classes. Of
    volumes, which have such files for structures, so are names with numbers if they begin with several words.

    Args:
        groups: the masks of each image.

    Raises:
        UserError: names that tell neither.
    """
    names = {image: [_own_name(mask, image) for mask in masks] for image, masks in groups.items()}
    image, several = next((image, masks) for image, masks in groups.items() if len(masks) > 1)
    where = several[0].parent
    counts = Counter(name for found in names.values() for name in found)
    recur = max(counts.values()) > 1 or len(groups) == 1
    numbered = [re.fullmatch(r"(?P<word>\D*?) ?\d*", name) for name in counts]
    kinds = {match["word"] for match in numbered if match}
    spoken = r"[^\W\d]+\b.*" if len(kinds) > 1 and not is_image(image) else r"\D+"
    words = {name for name in counts if re.fullmatch(spoken, name)}
    same = len({tuple(sorted(found)) for found in names.values()}) == 1 and len(names) > 1
    if len(words) == len(counts) < MAX_CLASSES and recur:
        classes = sorted(words)
        table = LabelMap(f"the masks in {where.name}", tuple(range(len(classes) + 1)), ("background", *classes))
        return table, {mask: name for key, found in names.items() for mask, name in zip(groups[key], found)}
    counted = all(numbered) and len(kinds - {""}) <= 1 and not kinds & {"class", "category"} and not same
    if counted or (not recur and all(re.search(r"\d", name) for name in counts)):
        table = LabelMap(f"the masks in {where.name}", (0, 255), ("background", OBJECT))
        return table, {mask: OBJECT for masks in groups.values() for mask in masks}
    raise UserError(
        f"{where}: {image.name} has {len(several)} masks, such as {several[0].name} and {several[1].name}, whose names "
        "tell neither objects (numbers, other ones for each image) nor classes (words that recur): rename them so, "
        "or leave one mask to an image"
    )


def _own_name(mask: Path, image: Path) -> str:
    """What a mask is called beside its image's name and marks such as "mask"; or the folder it lies in."""
    for part in (stem_of(mask), mask.parent.name):
        rest, own = part.casefold(), stem_of(image).casefold()
        tokens = re.split(r"[-_. ]+", re.sub(rf"^{re.escape(own)}(?![^\W\d_])", "", rest))
        if name := " ".join(token for token in tokens if token and not re.fullmatch(MARKS, token)):
            return name
    return ""


def case_labels(case: Case, table: LabelMap | None = None) -> np.ndarray:
    """The class indices of a labelled case, uint8 in the shape of its files, by ``table`` or its own.

    Raises:
        UserError: as in ``read_labels``; of masks of one object or class each, as in ``_inside`` and ``case_objects``,
            or a pixel of two classes.
    """
    table = table or case.label_map
    if not case.masks:
        return read_labels(cast(Path, case.label), table)
    owner: dict[int, Path] = {}
    classes: np.ndarray | None = None
    for path, inside in _inside(case):
        named = case.masks[path] in table.class_names
        index = table.class_names.index(case.masks[path]) if named else IGNORED  # see ``LabelMap.ignoring``
        classes = np.zeros(inside.shape, np.uint8) if classes is None else classes
        taken = classes[inside]
        if other := int(np.where(taken == index, 0, taken).max(initial=0)):
            count = int(np.count_nonzero((taken != 0) & (taken != index)))
            raise UserError(
                f"{path} and {owner[other]} share {count} pixels, which have one class each: take them out of one"
            )
        if case.masks[path] == OBJECT and np.count_nonzero(taken) > _MOST_SHARED * taken.size:
            raise UserError(
                f"{path} lies mostly under other masks of its image: leave one mask to an object, of one annotator"
            )
        classes[inside] = index
        owner.setdefault(index, path)
    return cast(np.ndarray, classes)


def case_objects(case: Case) -> np.ndarray | None:
    """A number for each object whose mask is a file of its own, int32 in the shape of the files, 0 elsewhere.

    None where objects have no files of their own.
    """
    if OBJECT not in case.masks.values():
        return None
    objects: np.ndarray | None = None
    for number, (_, inside) in enumerate(_inside(case), 1):
        objects = np.zeros(inside.shape, np.int32) if objects is None else objects
        objects[inside] = number
    return objects


def _inside(case: Case) -> Iterator[tuple[Path, np.ndarray]]:
    """Each mask of the case, and where it is not 0.

    Raises:
        UserError: one that holds more than two values, or of another shape than the first.
    """
    shape = None
    for path in case.masks:
        values = read_label_values(path)
        inside = values != 0
        found = np.unique(values[inside])
        if found.size > 1:
            shown = ", ".join(str(value if value < COLOUR else "colours") for value in found[:4])
            raise UserError(f"{path} holds values 0, {shown}{', …' * (found.size > 4)}: a mask of one object has one")
        shape = shape or inside.shape
        if inside.shape != shape:
            raise UserError(f"{path} and {next(iter(case.masks))} differ in shape: {inside.shape} and {shape}")
        yield path, inside
