"""``Case``: the files of one scan, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fastunet.arguments import checked
from fastunet.data.formats import is_image
from fastunet.data.labels import LabelMap
from fastunet.errors import UserError

MODALITIES = ("flair", "t1", "t1ce", "t2")
DEFAULT_MODALITIES = ("flair", "t1ce")
_MODALITY_NAMES = {
    "flair": "flair",
    "t2f": "flair",
    "t2flair": "flair",
    "t1": "t1",
    "t1w": "t1",
    "t1n": "t1",
    "t1ce": "t1ce",
    "t1c": "t1ce",
    "t1gd": "t1ce",
    "t2": "t2",
    "t2w": "t2",
}

COLOURS = ("red", "green", "blue")
"""The channels of colour images that have no other names."""


def modality_name(written: str) -> str:
    """One of ``MODALITIES`` for a spelling of it such as "T1Gd", else what is written."""
    return _MODALITY_NAMES.get(re.sub(r"[^a-z0-9]", "", written.lower()), written)


def colour_index(modality: str) -> int | None:
    """Which channel of an RGB image a name such as "red" or "R" stands for, if it does."""
    names = [modality.lower() == colour or modality.lower() == colour[0] for colour in COLOURS]
    return names.index(True) if any(names) else None


class Source(NamedTuple):
    """Where the voxels of one modality are: a file, and the index of the channel if the file has several."""

    path: Path
    channel: int | None = None


@checked
@dataclass(frozen=True)
class Case:
    """One scan of one patient, or one image.

    Attributes:
        name: unique among the cases found together; output files are named after it.
        patient: equal for all scans of a patient.
        modalities: the files by modality; BraTS modalities are called flair, t1, t1ce and t2.
        label: the label file, if there is one; of several ``masks`` the first.
        edition: the data set, for messages.
        label_map: the table of the label file.
        pages: (start, stop) of the slices that belong to this case, where a stack of images is shared out; None is all.
        masks: where every mask is that of one object or of one class: the masks, and the name of the class of each.
    """

    name: str
    patient: str
    modalities: dict[str, Source]
    label: Path | None
    edition: str
    label_map: LabelMap
    pages: tuple[int, int] | None = None
    masks: Mapping[Path, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """Every file of the case once: the modalities in their order, then the label or masks."""
        paths = [source.path for source in self.modalities.values()]
        return list(dict.fromkeys([*paths, *([self.label] if self.label else []), *self.masks]))

    @property
    def is_image(self) -> bool:
        """Whether the case is a 2-D image or a stack of them, whose zeros are as good as other values."""
        return is_image(self.files[0])


def check_modalities(case: Case, modalities: Iterable[str]) -> None:
    """Raises ``UserError`` unless ``case`` has all ``modalities``."""
    modalities = list(modalities)
    missing = [modality for modality in modalities if modality not in case.modalities]
    if missing:
        has = ", ".join(case.modalities) or "no modality"
        if case.is_image:
            wanted = ", ".join(modalities)
            raise UserError(f"{case.files[0]} is read as {has}, and {wanted} is asked for: convert the images to that")
        folder = case.files[0].parent
        raise UserError(f"{folder}: case {case.name} has no {' and no '.join(missing)} (it has {has})")


def check_axis(case: Case, axis: int) -> None:
    """Raises ``UserError`` if ``case`` is an image, and ``axis`` another than that of its pages."""
    if case.is_image and axis != 2:
        raise UserError(f"{case.files[0]} is an image: it has no slices along axis {axis}, only along 2")
