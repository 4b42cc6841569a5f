"""Finding the cases of a data folder: BraTS folders by their file names, other folders by their ``dataset.json``."""

from __future__ import annotations

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastunet.data.labels import LABEL_MAPS, LabelMap
from fastunet.data.volumes import SUFFIXES, Geometry, read_geometry
from fastunet.errors import UserError

MODALITIES = ("flair", "t1", "t1ce", "t2")
DEFAULT_MODALITIES = ("flair", "t1ce")

_UNDERSCORE_FILE = re.compile(r"(?P<case>.+)_(?P<part>flair|t1|t1ce|t2|seg|segm)", re.IGNORECASE)
_DASH_FILE = re.compile(r"(?P<case>.+)-(?P<part>t2f|t1n|t1c|t2w|seg)")
_DASH_CASE = re.compile(r"(?P<patient>.+)-(?P<timepoint>\d{3})")
_OTHER_CHALLENGE = re.compile(r"BraTS-(?!GLI-|SSA-)[A-Z]+-")
_SCAN_NUMBER = re.compile(r"(?P<patient>Brats1[789]_.+)_\d+", re.IGNORECASE)
_PARTS = {"t2f": "flair", "t1n": "t1", "t1c": "t1ce", "t2w": "t2", "seg": "label", "segm": "label"}
_POST_TREATMENT_TIMEPOINT = 100
_AFFINE_TOLERANCE = 1e-3  # millimetres: what float32 headers of one scan differ by after conversion between tools


class Source(NamedTuple):
    """Where the voxels of one modality are: a file, and the index on the last axis if it is 4-D."""

    path: Path
    channel: int | None = None


@dataclass(frozen=True)
class Case:
    """One scan of one patient.

    Attributes:
        name: unique among the cases found together; output files are named after it.
        patient: equal for all scans of a patient.
        modalities: the files by modality; BraTS modalities are called flair, t1, t1ce and t2.
        label: the label file, if there is one.
        edition: the data set, for messages.
        label_map: the table of the label file.
    """

    name: str
    patient: str
    modalities: dict[str, Source]
    label: Path | None
    edition: str
    label_map: LabelMap

    @property
    def files(self) -> list[Path]:
        """Every file of the case once: the modalities in their order, then the label."""
        paths = [source.path for source in self.modalities.values()]
        return list(dict.fromkeys(paths + ([self.label] if self.label else [])))


def discover_cases(
    root: str | Path, *, modalities: Sequence[str] | None = DEFAULT_MODALITIES, edition: str | None = None
) -> list[Case]:
    """All cases below ``root``, sorted by name; ``root`` may also be the folder of one case.

    A ``dataset.json`` in ``root`` makes it an nnU-Net or Medical Segmentation Decathlon folder. Otherwise files are
    recognised by name at any depth: ``<case>_flair.nii.gz`` is BraTS 2018-2021 (one table), ``<case>-t2f.nii.gz`` is
    BraTS 2023, or BraTS 2024 if the case name ends in a timepoint of 100 or more, as the post-treatment release counts.

    Args:
        root: the folder.
        modalities: what every case must have; None asks for nothing.
        edition: a key of ``LABEL_MAPS`` that overrides the rule above.

    Raises:
        UserError: no such folder, no case in it, a missing modality, or cases whose classes differ.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder")
    if edition is not None and edition not in LABEL_MAPS:
        raise UserError(f"edition {edition!r} is unknown; the editions are {', '.join(LABEL_MAPS)}")
    if (root / "dataset.json").is_file():
        from fastunet.data.dataset_json import dataset_json_cases

        cases = dataset_json_cases(root, edition)
    else:
        cases = _brats_cases(_nifti_files(root), edition)
    if not cases:
        nested = sorted(root.glob("*/dataset.json"))
        hint = f" (but there is one in {nested[0].parent})" if nested else ""
        names = "no files named like *_flair.nii.gz or *-t2f.nii.gz"
        raise UserError(f"{root} holds no cases: {names}, and no dataset.json{hint}")
    return _checked(cases, root, modalities or ())


def cases_from_files(paths: Iterable[str | Path], modalities: Sequence[str] = DEFAULT_MODALITIES) -> list[Case]:
    """Cases of loose volume files: grouped by BraTS names, or one case with the files in the order of ``modalities``.

    Raises:
        UserError: files that are no complete set.
    """
    files = [Path(path) for path in paths]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
    named = _brats_cases(files, None)
    if files and sum(len(case.files) for case in named) == len(files):
        return _checked(named, files[0].parent, modalities)
    if len(files) != len(modalities):
        raise UserError(f"{len(files)} files given, but a case has {len(modalities)}: {', '.join(modalities)}")
    name = _stem(files[0])
    sources = {modality: Source(path) for modality, path in zip(modalities, files)}
    return [Case(name, name, sources, None, "brats2021", LABEL_MAPS["brats2021"])]


def check_modalities(case: Case, modalities: Iterable[str]) -> None:
    """Raises ``UserError`` unless ``case`` has all ``modalities``."""
    missing = [modality for modality in modalities if modality not in case.modalities]
    if missing:
        folder = case.files[0].parent
        has = ", ".join(case.modalities) or "no modality"
        raise UserError(f"{folder}: case {case.name} has no {' and no '.join(missing)} (it has {has})")


def check_geometry(case: Case, modalities: Iterable[str], *, label: bool = True) -> Geometry:
    """Proves that the files of a case lie on one grid, and returns that of the first modality; reads headers only.

    Raises:
        UserError: two files differ in shape or affine; both are named.
    """
    paths = [case.modalities[modality].path for modality in modalities]
    if label and case.label is not None:
        paths.append(case.label)
    first, *others = [read_geometry(path) for path in dict.fromkeys(paths)]
    for other in others:
        if other.shape[:3] != first.shape[:3]:
            raise UserError(f"{first.path} and {other.path} differ in shape: {first.shape[:3]} and {other.shape[:3]}")
        difference = float(np.abs(other.affine - first.affine).max())
        if not difference <= _AFFINE_TOLERANCE:
            raise UserError(f"{first.path} and {other.path} differ in affine, by up to {difference:.3g}")
    return first


def _checked(cases: Iterable[Case], root: Path, modalities: Iterable[str]) -> list[Case]:
    """The cases by name, after proof that they can be used together."""
    cases = sorted(cases, key=lambda case: case.name)
    for one, other in itertools.pairwise(cases):
        if one.name == other.name:
            raise UserError(f"{root}: two cases are called {one.name}, in {one.files[0]} and {other.files[0]}")
        if one.label_map.class_names != other.label_map.class_names:
            raise UserError(
                f"{root} mixes cases of {one.edition} ({one.name}) and {other.edition} ({other.name}), "
                "whose classes differ; name one edition for all"
            )
    for case in cases:
        check_modalities(case, modalities)
    return cases


def _nifti_files(root: Path) -> Iterator[Path]:
    """NIfTI files below ``root``, in order, hidden ones left out; links are followed, each real folder once."""
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(SUFFIXES) and name[0] != ".")


def _brats_cases(paths: Iterable[Path], edition: str | None) -> list[Case]:
    groups: dict[tuple[Path, str, str], dict[str, Path]] = defaultdict(dict)
    for path in paths:
        for style, pattern in (("-", _DASH_FILE), ("_", _UNDERSCORE_FILE)):
            if match := pattern.fullmatch(_stem(path)):
                part = match["part"].lower()
                group = groups[path.parent, match["case"], style]
                previous = group.setdefault(_PARTS.get(part, part), path)
                if previous != path:
                    raise UserError(f"{previous} and {path} are the same part of one case; remove one")
                break
    _adopt_stray_labels(groups)
    cases = []
    for (_, name, style), parts in groups.items():
        label = parts.pop("label", None)
        if not parts:
            raise UserError(f"{label} is a label file without any modality beside it")
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
    if _OTHER_CHALLENGE.match(name):
        editions = ", ".join(LABEL_MAPS)
        raise UserError(f"{path}: no label table is known for this challenge; name an edition ({editions})")
    match = _DASH_CASE.fullmatch(name)
    return "brats2024" if match and int(match["timepoint"]) >= _POST_TREATMENT_TIMEPOINT else "brats2023"


def _patient(name: str, style: str) -> str:
    match = (_SCAN_NUMBER if style == "_" else _DASH_CASE).fullmatch(name)
    return match["patient"] if match else name


def _stem(path: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name)
