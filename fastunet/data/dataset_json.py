"""The cases of a folder with a ``dataset.json``: nnU-Net (a file per channel) or Medical Segmentation Decathlon (4-D).

Both keep images in ``imagesTr`` and ``imagesTs`` and labels in ``labelsTr`` and ``labelsTs``.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from fastunet.data.case import COLOURS, Case, Source, modality_name
from fastunet.data.formats import SUFFIXES, is_image, is_listed, stem_of, suffix_of
from fastunet.data.label_tables import LABEL_MAPS, Number, is_whole, label_map_from_json
from fastunet.data.labels import LabelMap
from fastunet.data.volumes import read_geometry
from fastunet.errors import Refusal, UserError, refuse, warn_once
from fastunet.schema import read_json

CHANNEL_FILE = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})", re.DOTALL)
_SHOWN = 80


class _Listed(msgspec.Struct):
    """An entry of "training" as in Decathlon, or of "dataset" as in nnU-Net 2."""

    image: str | list[str] | None = None
    images: list[str] | None = None
    label: str | None = None


class _DatasetJson(msgspec.Struct):
    """What is used of a ``dataset.json``; whatever else it holds may be anything."""

    labels: dict[str, Number | list[Number]]
    channel_names: dict[str, str] | list[str] | None = None
    modality: dict[str, str] | list[str] | None = None
    file_ending: str | None = None
    regions_class_order: list[Number] | None = None
    training: list[_Listed | str | list[str]] | None = None
    dataset: dict[str, _Listed] | None = None
    numTraining: Any = None
    name: str | int | float | list[Any] | dict[str, Any] | bool | None = None


def dataset_json_cases(root: Path, edition: str | None, refused: Refusal = refuse) -> list[Case]:
    """The cases of ``root``, labelled and unlabelled.

    Args:
        root: the folder of the file.
        edition: overrides the label table of the file.
        refused: called with what is wrong with one case, which is then left out.

    Raises:
        UserError: a ``dataset.json`` that cannot be used, a listed file or a channel that is missing or left over.
    """
    file = root / "dataset.json"
    table = read_json(file, _DatasetJson)
    label_map = _label_map(table, edition, root, file)
    channels = _channel_names(table, file)
    ending = _file_ending(table, root, file)
    cases: dict[str, Case] = {}
    labels: dict[str, Path] = {}
    for part in ("Tr", "Ts"):
        found = _files(root / f"labels{part}", ending, refused)
        labels |= found
        for name, sources in _images(root / f"images{part}", channels, ending, refused):
            if name in cases:
                refused(f"{root}: case {name} is in imagesTr and in imagesTs")
                continue
            cases[name] = Case(name, name, sources, found.get(name), label_map.edition, label_map)
    for name, entry in _listed(table, file):
        if name not in cases and table.dataset is not None:
            cases[name] = _listed_case(name, entry, channels, label_map, root, file)
        label = None if entry.label is None else labels.get(stem_of(_posix(entry.label)))
        if name in cases and label is not None:
            cases[name] = dataclasses.replace(cases[name], label=label)  # which may be called otherwise
        elif name not in cases or (entry.label is not None and cases[name].label is None):
            path = entry.label if name in cases else entry.image
            refused(f"{root / str(path)[:_SHOWN]} is listed in {file} but was not found")
    _note_counts(table, cases, labels, file)
    return list(cases.values())


def _note_counts(table: _DatasetJson, cases: dict[str, Case], labels: dict[str, Path], file: Path) -> None:
    """Says where the numbers of images, labels, and cases that ``file`` names disagree."""
    labelled = {name: case.label for name, case in cases.items() if case.label is not None}
    if is_whole(table.numTraining) and len(labelled) != int(table.numTraining):
        text = f"{file} says numTraining {table.numTraining}, but {len(labelled)} cases have images and labels"
        warn_once(f"numTraining of {file}", text)
    unlisted = sorted(labelled.keys() - {name for name, _ in _listed(table, file)})
    if table.training and unlisted:
        text = f"'training' of {file} lacks {len(unlisted)} cases with labels, such as {unlisted[0]}; all are taken"
        warn_once(f"training of {file}", text)
    if stray := [path.name for path in labels.values() if path not in labelled.values()]:
        text = f"{len(stray)} label files of {file.parent}, such as {stray[0]}, belong to no image, and are left out"
        warn_once(f"labels of {file}", text)


def read_label_map(file: Path) -> LabelMap:
    """The label table of a ``dataset.json``; errors as in ``dataset_json_cases``."""
    return _label_map(read_json(file, _DatasetJson), None, file.parent, file)


def _label_map(table: _DatasetJson, edition: str | None, root: Path, file: Path) -> LabelMap:
    if edition is not None:
        return LABEL_MAPS[edition]
    name = table.name if isinstance(table.name, str) and table.name.strip() else root.resolve().name
    return label_map_from_json(table.labels, name[:_SHOWN], file, table.regions_class_order)


def _file_ending(table: _DatasetJson, root: Path, file: Path) -> str:
    """The ending of images and labels, in lower case; where the file does not say, that of most training files."""
    if table.file_ending is not None:
        ending = "." + table.file_ending.lower().removeprefix(".")
        if ending not in SUFFIXES:
            raise UserError(f"{file}: files end in {table.file_ending[:_SHOWN]!r}; read are {', '.join(SUFFIXES)}")
        return ending
    folder = root / "imagesTr"
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    found = Counter(suffix_of(path) for path in names if is_listed(path))
    return found.most_common(1)[0][0] if found else ".nii.gz"


def _channel_names(table: _DatasetJson, file: Path) -> list[str]:
    """Canonical modality names by channel index."""
    entry = table.channel_names or table.modality or {}
    try:
        names = {int(index): name for index, name in (entry.items() if isinstance(entry, dict) else enumerate(entry))}
        ordered = [names[index] for index in range(len(names))]
    except (ValueError, KeyError):
        ordered = []
    if not ordered or len(ordered) != len(entry):
        raise UserError(f"{file} has no 'channel_names' or 'modality' that number the channels from 0")
    canonical = [*map(modality_name, ordered)]
    if len(set(canonical)) < len(canonical):
        raise UserError(f"{file}: two channels are the same modality: {', '.join(ordered)}; rename one")
    return canonical


def _files(folder: Path, ending: str, refused: Refusal) -> dict[str, Path]:
    """The files of a folder by name without ending. Broken links count: reading them says what is wrong."""
    if not os.path.isdir(folder):
        return {}
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    endings = (".tif", ".tiff") if ending.startswith(".tif") else (ending,)
    found: dict[str, Path] = {}
    for path in (folder / name for name in names if not name.startswith(".")):
        if suffix_of(path) not in endings:
            continue
        if stem_of(path) in found:
            refused(f"{found[stem_of(path)]} and {path} are the same file in two spellings; remove one")
        found[stem_of(path)] = path
    others = [path for path in (folder / name for name in names) if is_listed(path) and suffix_of(path) not in endings]
    if others:
        what = f"{len(others)} files of {folder}, such as {others[0].name}, do not end in {ending} ('file_ending')"
        if found:
            warn_once(f"other endings in {folder}", f"{what}; they are left out")
        else:
            refused(f"{what}: save them so, or change dataset.json")
    return found


def _images(
    folder: Path, channels: list[str], ending: str, refused: Refusal
) -> Iterator[tuple[str, dict[str, Source]]]:
    """Case names and sources of an image folder: single files hold all channels, others one each."""
    by_case: dict[str, dict[int, Path]] = {}
    for stem, path in _files(folder, ending, refused).items():
        if match := CHANNEL_FILE.fullmatch(stem):
            by_case.setdefault(match["case"], {})[int(match["channel"])] = path
        else:
            yield stem, {name: Source(path, index) for index, name in enumerate(channels)}
    for name, files in by_case.items():
        try:
            yield name, _sources(name, files, channels, folder, ending)
        except UserError as error:
            refused(str(error))


def _sources(name: str, files: dict[int, Path], channels: list[str], folder: Path, ending: str) -> dict[str, Source]:
    """The sources of a case of one file per channel; an RGB image is three channels."""
    colours = read_geometry(files[0]).shape[3:] if set(files) == {0} and is_image(files[0]) else ()
    if colours and len(channels) in (1, colours[0]):
        names = channels if len(channels) > 1 else COLOURS[: colours[0]]
        return {colour: Source(files[0], index) for index, colour in enumerate(names)}
    missing = [f"{name}_{index:04d}{ending}" for index in range(len(channels)) if index not in files]
    if missing:
        raise UserError(f"{folder}: case {name} lacks {', '.join(missing)}")
    if extra := [path.name for index, path in sorted(files.items()) if index >= len(channels)]:
        raise UserError(f"{folder}: dataset.json names {len(channels)} channels, but there is {', '.join(extra)}")
    return {channel: Source(files[index]) for index, channel in enumerate(channels)}


def _listed(table: _DatasetJson, file: Path) -> Iterator[tuple[str, _Listed]]:
    """Case names and entries of "training", in any of its spellings, and of "dataset"."""
    for entry in table.training or ():
        if isinstance(entry, str):
            entry = _Listed(image=entry)
        elif isinstance(entry, list):
            entry = _Listed(image=entry[:1], label=entry[1] if len(entry) > 1 else None)
        images = [entry.image] if isinstance(entry.image, str) else entry.image or entry.images
        if not images:
            raise UserError(f"{file}: an entry of 'training' names no image")
        yield _name(images[0]), _Listed(image=images[0], label=entry.label)
    for name, listed in (table.dataset or {}).items():
        yield name, _Listed(image=(listed.images or [name])[0], images=listed.images, label=listed.label)


def _name(listed: str) -> str:
    """The case that a listed image belongs to: its file name without ending and, if need be, without the channel."""
    stem = stem_of(_posix(listed))
    match = CHANNEL_FILE.fullmatch(stem)
    return match["case"] if match else stem


def _posix(listed: str) -> PurePosixPath:
    return PurePosixPath(listed.replace("\\", "/"))


def _listed_case(name: str, entry: _Listed, channels: list[str], label_map: LabelMap, root: Path, file: Path) -> Case:
    """A case of "dataset", which says where its files are."""
    images = entry.images or []
    if len(images) not in (1, len(channels)):
        raise UserError(f"{file}: case {name} of 'dataset' lists {len(images)} images for {len(channels)} channels")
    paths = [root / image for image in images]
    single = len(images) == 1 and len(channels) > 1
    sources = {
        channel: Source(paths[0], index) if single else Source(paths[index]) for index, channel in enumerate(channels)
    }
    label = None if entry.label is None else root / entry.label
    for path in [*paths, *([] if label is None else [label])]:
        if not os.path.isfile(path):
            raise UserError(f"{str(path)[:_SHOWN]!r} is listed in {file} but was not found")
    return Case(name, name, sources, label, label_map.edition, label_map)
