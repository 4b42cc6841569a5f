"""Finding the cases of a data folder: by ``dataset.json``, by BraTS file names, or as images beside masks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from fastunet.arguments import checked
from fastunet.data.brats import brats_cases
from fastunet.data.case import DEFAULT_MODALITIES, Case, Source, check_modalities, colour_index
from fastunet.data.dataset_json import CHANNEL_FILE, dataset_json_cases
from fastunet.data.flat_folders import flat_cases
from fastunet.data.formats import SUFFIXES, VOLUME_SUFFIXES, is_image, listed_below, stem_of
from fastunet.data.image_folders import MARKED, UNNAMED, image_folder_cases, unreadable
from fastunet.data.label_tables import LABEL_MAPS
from fastunet.errors import Refusal, UserError, refuse, warn_once

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
_SHOWN = 4


@checked
def discover_cases(
    root: str | Path,
    *,
    modalities: Sequence[str] | None = DEFAULT_MODALITIES,
    edition: str | None = None,
    ignore: int | None = None,
    refused: Refusal = refuse,
) -> list[Case]:
    """All cases below ``root``, sorted by name; ``root`` may also be the folder of one case.

    A ``dataset.json`` in ``root`` makes it an nnU-Net or Medical Segmentation Decathlon folder. Otherwise files are
    recognised by name at any depth: ``<case>_flair.nii.gz`` is BraTS 2018-2021 (one table), ``<case>-t2f.nii.gz`` is
    BraTS 2023, or BraTS 2024 if the case name ends in a timepoint of 100 or more, as the post-treatment release counts.
    Folders ``images`` and ``masks`` (or ``labels``, ``annotations``) hold 2-D images; see ``image_folder_cases``, and
    ``flat_cases`` for masks that lie beside their images.

    Args:
        root: the folder.
        modalities: what every case must have; None asks for nothing, and so does the default of 2-D images.
        edition: a key of ``LABEL_MAPS`` that overrides the rule above.
        ignore: a value of the label files that counts nowhere; see ``LabelMap.ignoring``.
        refused: called with what is wrong with one case, which is then left out; by default that raises.

    Raises:
        UserError: no such folder, no case in it, a missing modality, or cases whose classes differ.
    """
    root = Path(root)
    if not os.path.isdir(root):  # False, not an error, for names that no file can have
        wanted = " is an archive; unpack it" if root.suffix.lower() in _ARCHIVES else " is a file; give the data folder"
        raise UserError(f"{root}{wanted if os.path.isfile(root) else ': there is no such folder'}")
    if edition is not None and edition not in LABEL_MAPS:
        raise UserError(f"edition {edition!r} is unknown; the editions are {', '.join(LABEL_MAPS)}")
    said: list[str] = []

    def note(text: str) -> None:
        said.append(text)
        refused(text)

    described = os.path.lexists(root / "dataset.json")
    try:
        if described:
            cases = dataset_json_cases(root, edition, note)
        else:
            given: Sequence[str] = () if modalities is DEFAULT_MODALITIES else modalities or ()
            cases = brats_cases(listed_below(root, VOLUME_SUFFIXES), edition, note)
            if not any(case.label for case in cases) and not _all_have(cases, given):
                others = image_folder_cases(root, note) or flat_cases(root, note, given)
                cases = others if not cases or any(case.label for case in others) or _all_have(others, given) else cases
    except PermissionError as error:
        raise UserError(f"{error.filename or root} cannot be read: {error.strerror}") from error
    if not cases and said:  # nothing is left, and why has been said
        return []
    if not cases and described:
        raise UserError(f"{root} holds no cases: its imagesTr and imagesTs hold no image")
    if not cases:
        raise UserError(_no_cases(root))
    if edition is not None and cases[0].is_image and not described:
        raise UserError(f"edition {edition}: {root} holds images, and their masks have a table of their own")
    if ignore is not None:
        cases = [replace(case, label_map=case.label_map.ignoring(ignore)) for case in cases]
    asked = () if modalities is DEFAULT_MODALITIES and cases[0].is_image else modalities or ()
    return _checked(cases, root, asked, refused)


def _all_have(cases: Sequence[Case], modalities: Sequence[str]) -> bool:
    """Whether there are cases and names of modalities, and each case has them all."""
    return bool(cases and modalities) and all(set(modalities) <= set(case.modalities) for case in cases)


def _no_cases(root: Path) -> str:
    """The sentence on a folder in which nothing is recognised, with what may be done."""
    signs = itertools.product(("*/", "*/*/"), ("dataset.json", "[iI]mages", "imagesTr"))
    nested = sorted({path.parent for depth, name in signs for path in root.glob(depth + name)})
    if len(nested) > 1 and len(above := {path.parent for path in nested} - {root}) == 1:
        nested = [*above]  # a folder for each case
    if nested:
        others = f", or one of {len(nested) - 1} more such folders" if nested[1:] else ""
        return f"{root} holds no cases itself: give {nested[0]}{others}"
    if (root / "imagesTr").is_dir():
        return f"{root} has imagesTr, but no dataset.json, which names channels and classes: write one"
    if next(listed_below(root, SUFFIXES), None) is None:
        return unreadable(root) or f"{root} holds no cases: there is no file in it"
    folders = [path.name for path in sorted(root.glob("[!.]*")) if path.is_dir()]
    hint = f"; name its folders so ({', '.join(folders[:_SHOWN])}) or its files" if folders else ""
    marked = [name for name in folders if MARKED.fullmatch(name)]
    if len(marked) > 1:
        shown = ", ".join(marked[:_SHOWN])
        return f"{root}: {shown} may all hold masks: give a folder that has one of them, and the folder of its images"
    names = "no files named like *_flair.nii.gz or *-t2f.nii.gz, no folders images and masks"
    return f"{root} holds no cases: {names}, no a_mask.png beside a.png, and no dataset.json{hint}"


@checked
def cases_from_files(paths: Iterable[str | Path], modalities: Sequence[str] = DEFAULT_MODALITIES) -> list[Case]:
    """Cases of loose files: each image is one, and each volume for one modality; other volumes are grouped by BraTS
    names, or are one case in the order given.

    Images that hold one channel each, and say so by nnU-Net's names, are grouped, too.

    Raises:
        UserError: files that are no complete set.
    """
    files = [Path(path) for path in paths]
    if not files or not modalities:
        raise UserError(f"{len(files)} files and {len(modalities)} modalities given; a case has at least one of both")
    for path in files:
        if not os.path.isfile(path):
            raise UserError(f"{path}{' is not a regular file' if os.path.exists(path) else ': there is no such file'}")
    named = brats_cases(files, None)
    if files and sum(len(case.files) for case in named) == len(files):
        return _checked(named, files[0].parent, modalities)
    table = LABEL_MAPS["brats2021"]
    if files and all(map(is_image, files)):
        cases = [
            Case(name, name, dict(zip(modalities, sources)), None, table.edition, table)
            for name, sources in _loose_images(files, modalities)
        ]
        return _checked(cases, files[0].parent, modalities)
    if len(modalities) == 1:
        cases = [Case(stem_of(path), stem_of(path), {modalities[0]: Source(path)}, None, table.edition, table)
                 for path in files]  # fmt: skip
        return _checked(cases, files[0].parent, modalities)
    if len(files) != len(modalities):
        raise UserError(f"{len(files)} files given, but a case has {len(modalities)}: {', '.join(modalities)}")
    if len(set(files)) < len(files):
        raise UserError(f"{files[0]} is given twice; each of {', '.join(modalities)} has a file of its own")
    name = stem_of(files[0])
    sources = {modality: Source(path) for modality, path in zip(modalities, files)}
    return [Case(name, name, sources, None, table.edition, table)]


def _loose_images(files: Sequence[Path], modalities: Sequence[str]) -> list[tuple[str, list[Source]]]:
    """Names and channels of the cases that images make up: colours by name, others in their order."""
    if colours := [index for name in modalities if (index := colour_index(name)) is not None]:
        channels: Sequence[int | None] = colours
    else:
        matches = [CHANNEL_FILE.fullmatch(stem_of(path)) for path in files]
        grouped: dict[str, dict[int, Path]] = {}
        for path, match in zip(files, matches):
            if match:
                grouped.setdefault(match["case"], {})[int(match["channel"])] = path
        numbers = range(len(modalities))
        if len(numbers) > 1 and all(matches) and all(sorted(paths) == list(numbers) for paths in grouped.values()):
            return [(name, [Source(paths[number]) for number in numbers]) for name, paths in grouped.items()]
        channels = [None] if len(numbers) == 1 else numbers
    return [(stem_of(path), [Source(path, channel) for channel in channels]) for path in files]


def _as_asked(case: Case, modalities: Sequence[str]) -> Case:
    """An image with its channels under the names that are asked for: a single channel, of volumes too, or colours."""
    own = case.modalities
    if set(modalities) <= set(own) or not (case.is_image or [*own] == [UNNAMED]):
        return case
    known = {colour_index(name): source for name, source in own.items()}
    colours = [colour_index(name) for name in modalities]
    sources = list(own.values())
    if None not in colours and set(colours) <= set(known):
        sources = [known[colour] for colour in colours]
    elif None not in colours and len(own) == 1:
        path = sources[0].path
        warn_once(f"grey as colour in {path.parent}", f"{path} is grey, and taken as a colour image of equal channels")
        sources = [Source(path, colour) for colour in colours]
    elif not len(own) == len(modalities) == 1:
        return case
    return replace(case, modalities=dict(zip(modalities, sources)))


def _checked(cases: Iterable[Case], root: Path, modalities: Iterable[str], refused: Refusal = refuse) -> list[Case]:
    """The cases by name, those left out that cannot be used with the others."""
    kept: dict[str, Case] = {}
    for case in sorted(cases, key=lambda case: case.name):
        first = next(iter(kept.values()), case)
        if any("\ud800" <= c <= "\udfff" for c in case.name):
            refused(f"{str(case.files[0])!a}: the name of the case is not UTF-8; rename its files")
        elif case.name in kept:
            refused(f"{root}: two cases are called {case.name}, in {kept[case.name].files[0]} and {case.files[0]}")
        elif case.label_map.class_names != first.label_map.class_names:
            refused(
                f"{root} mixes cases of {first.edition} ({first.name}) and {case.edition} ({case.name}), "
                "whose classes differ; name one edition for all"
            )
        else:
            kept[case.name] = case
    for case in list(kept.values()):
        try:
            kept[case.name] = _as_asked(case, list(modalities))
            check_modalities(kept[case.name], modalities)
        except UserError as error:
            refused(str(error))
            del kept[case.name]
    return list(kept.values())
