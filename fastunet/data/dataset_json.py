"""The cases of a folder with a ``dataset.json``: nnU-Net (a file per channel) or Medical Segmentation Decathlon (4-D).

Both keep images in ``imagesTr`` and ``imagesTs`` and labels in ``labelsTr`` and ``labelsTs``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from fastunet.data.cases import Case, Source
from fastunet.data.labels import LABEL_MAPS, label_map_from_json
from fastunet.data.volumes import SUFFIXES
from fastunet.errors import UserError
from fastunet.files import read_text

_CHANNEL_FILE = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
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


def dataset_json_cases(root: Path, edition: str | None) -> list[Case]:
    """The cases of ``root``, labelled and unlabelled; ``edition`` overrides the label table of the file.

    Raises:
        UserError: a ``dataset.json`` that cannot be used, a listed file or a channel that is missing.
    """
    file = root / "dataset.json"
    try:
        table = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON: {error.msg} in line {error.lineno}") from error
    if not isinstance(table, Mapping) or "labels" not in table:
        raise UserError(f"{file} has no 'labels'")
    ending = table.get("file_ending", ".nii.gz")
    if ending not in SUFFIXES:
        raise UserError(f"{file}: files end in {ending!r}; only NIfTI files can be read")
    channels = _channel_names(table, file)
    if edition is None:
        label_map = label_map_from_json(table["labels"], str(table.get("name") or root.resolve().name), file)
    else:
        label_map = LABEL_MAPS[edition]
    cases = []
    for part in ("Tr", "Ts"):
        for name, sources in _images(root / f"images{part}", channels, ending):
            label = root / f"labels{part}" / f"{name}{ending}"
            label = label if label.is_file() else None
            cases.append(Case(name, name, sources, label, label_map.edition, label_map))
    _check_listed(table, cases, file)
    return cases


def _channel_names(table: Mapping, file: Path) -> list[str]:
    """Canonical modality names by channel index."""
    entry = table.get("channel_names") or table.get("modality")
    try:
        names = {int(index): str(name) for index, name in entry.items()}
        ordered = [names[index] for index in range(len(names))]
    except (AttributeError, ValueError, KeyError):
        raise UserError(f"{file} has no 'channel_names' or 'modality' that number the channels from 0") from None
    if not ordered:
        raise UserError(f"{file} names no channel")
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in ordered]
    canonical = [_MODALITY_NAMES.get(short, name) for short, name in zip(plain, ordered)]
    if len(set(canonical)) < len(canonical):
        raise UserError(f"{file}: two channels are the same modality: {', '.join(ordered)}")
    return canonical


def _images(folder: Path, channels: list[str], ending: str) -> Iterator[tuple[str, dict[str, Source]]]:
    """Case names and sources of an image folder: single files are 4-D, or 3-D if there is one channel."""
    if not folder.is_dir():
        return
    by_case: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob(f"*{ending}")):
        stem = path.name.removesuffix(ending)
        if path.name.startswith("."):
            continue
        if match := _CHANNEL_FILE.fullmatch(stem):
            by_case.setdefault(match["case"], {})[int(match["channel"])] = path
        else:
            sources = {name: Source(path, index) for index, name in enumerate(channels)}
            yield stem, sources
    for name, files in by_case.items():
        missing = [f"{name}_{index:04d}{ending}" for index in range(len(channels)) if index not in files]
        if missing:
            raise UserError(f"{folder}: case {name} lacks {', '.join(missing)}")
        yield name, {channel: Source(files[index]) for index, channel in enumerate(channels)}


def _check_listed(table: Mapping, cases: list[Case], file: Path) -> None:
    """Every image and label that the file lists for training was found."""
    labelled = {case.name: case.label is not None for case in cases}
    for entry in table.get("training") or ():
        if not isinstance(entry, Mapping) or "image" not in entry:
            raise UserError(f"{file}: an entry of 'training' names no image: {entry!r}")
        name = re.sub(r"\.nii(\.gz)?$", "", Path(entry["image"]).name)
        if name not in labelled or ("label" in entry and not labelled[name]):
            kind = "label" if name in labelled else "image"
            raise UserError(f"{file.parent / entry[kind]} is listed in {file} but was not found")
