"""The cases of BraTS folders by file names: ``<case>_flair.nii.gz`` (2018-2021), ``<case>-t2f.nii.gz`` (from 2023)."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from fastunet.data.case import MODALITIES, Case, Source
from fastunet.data.formats import VOLUME_SUFFIXES, stem_of, suffix_of
from fastunet.data.label_tables import LABEL_MAPS
from fastunet.errors import Refusal, UserError, refuse, warn_once

_UNDERSCORE_PARTS = "flair|t1|t1ce|t1c|t1gd|t2|seg|segm|tumor_segmentation"
_UNDERSCORE_FILE = re.compile(rf"(?P<case>.+)_(?P<part>{_UNDERSCORE_PARTS})", re.IGNORECASE | re.DOTALL)
_DASH_FILE = re.compile(r"(?P<case>.+)-(?P<part>t2f|t1n|t1c|t2w|seg)", re.IGNORECASE | re.DOTALL)
_DASH_CASE = re.compile(r"(?P<patient>.+)-(?P<timepoint>\d{3})", re.DOTALL)
_CHALLENGE = re.compile(r"BraTS-(?P<name>[A-Z]+(-RT)?)-")
_SCAN_NUMBER = re.compile(r"(?P<patient>Brats1[789]_.+)_\d+", re.IGNORECASE | re.DOTALL)
_PARTS = {"t2f": "flair", "t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t1gd": "t1ce"}
_PARTS |= dict.fromkeys(("seg", "segm", "tumor_segmentation"), "label")
_POST_TREATMENT_TIMEPOINT = 100
_EDITIONS = {"SSA": "brats2023_africa", "MEN": "brats2023_men", "MET": "brats2023_met", "PED": "brats2024_ped"}
_OTHER_NUMBERS = {
    "MET": ("the 2025 release adds a resection cavity", "brats2025_met"),
    "PED": ("the 2023 release numbers 1 core, 2 oedema, 3 enhancing", "brats2023_ped"),
}


def brats_cases(paths: Iterable[Path], edition: str | None, refused: Refusal = refuse) -> list[Case]:
    """The cases that files named as in BraTS make up; others are left out.

    Args:
        paths: files of any kind.
        edition: overrides the rule of the names.
        refused: called with what is wrong with one case, which is then left out.
    """
    groups: dict[tuple[Path, str, str], dict[str, Path]] = defaultdict(dict)
    paths = list(paths)
    for path in paths:
        # Copies of the data have folders called case_flair.nii, each around one file of any name.
        names = [path.parent, path] if suffix_of(path.parent) in VOLUME_SUFFIXES else [path]
        for named, (style, pattern) in itertools.product(names, (("-", _DASH_FILE), ("_", _UNDERSCORE_FILE))):
            if match := pattern.fullmatch(stem_of(named)):
                part = match["part"].lower()
                group = groups[named.parent, match["case"], style]
                previous = group.setdefault(_PARTS.get(part, part), path)
                if previous != path:
                    refused(f"{previous} and {path} are the same part of one case; remove one")
                break
    _adopt_stray_labels(groups)
    cases = []
    beside = {(path.parent, stem_of(path)) for path in paths}
    for (folder, name, style), parts in groups.items():
        label = parts.pop("label", None)
        if not parts and (folder, name) in beside:
            continue  # not of BraTS: a volume with its labels
        if not parts:
            refused(f"{label} is a label file without any modality beside it")
            continue
        key = edition or ("brats2021" if style == "_" else _dash_edition(name, label or next(iter(parts.values()))))
        sources = {modality: Source(parts[modality]) for modality in MODALITIES if modality in parts}
        cases.append(Case(name, _patient(name, style), sources, label, key, LABEL_MAPS[key]))
    return cases


def _adopt_stray_labels(groups: dict[tuple[Path, str, str], dict[str, Path]]) -> None:
    """Gives a lone label file to the only case of its folder: BraTS20_Training_355 has one under another name."""
    for key in [key for key, parts in groups.items() if set(parts) == {"label"}]:
        owners = [parts for other, parts in groups.items() if other[0] == key[0] and other != key]
        if len(owners) == 1 and "label" not in owners[0]:
            owners[0]["label"] = groups.pop(key)["label"]


def _dash_edition(name: str, path: Path) -> str:
    challenge = match["name"] if (match := _CHALLENGE.match(name)) else "GLI"
    if challenge in _OTHER_NUMBERS:
        difference, other = _OTHER_NUMBERS[challenge]
        text = f"{path} is read with the labels of {_EDITIONS[challenge]}; {difference}: --edition {other}"
        warn_once(f"edition of BraTS-{challenge}", text)
    if challenge in _EDITIONS:
        return _EDITIONS[challenge]
    if challenge != "GLI":
        editions = ", ".join(LABEL_MAPS)
        raise UserError(f"{path}: no label table is known for this challenge; name an edition ({editions})")
    match = _DASH_CASE.fullmatch(name)
    return "brats2024" if match and int(match["timepoint"]) >= _POST_TREATMENT_TIMEPOINT else "brats2023"


def _patient(name: str, style: str) -> str:
    match = (_SCAN_NUMBER if style == "_" else _DASH_CASE).fullmatch(name)
    return match["patient"] if match else name
