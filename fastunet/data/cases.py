"""Finding the cases of a data folder: by ``dataset.json``, by BraTS file names, or as images beside masks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fastunet.arguments import checked
from fastunet.data.brats import brats_cases
from fastunet.data.case import DEFAULT_MODALITIES, Case, Source, check_modalities
from fastunet.data.dataset_json import dataset_json_cases
from fastunet.data.formats import VOLUME_SUFFIXES, is_image, is_listed, stem_of
from fastunet.data.image_folders import image_folder_cases
from fastunet.data.label_tables import LABEL_MAPS
from fastunet.errors import Refusal, UserError, refuse


@checked
def discover_cases(
    root: str | Path,
    *,
    modalities: Sequence[str] | None = DEFAULT_MODALITIES,
    edition: str | None = None,
    refused: Refusal = refuse,
) -> list[Case]:
    """All cases below ``root``, sorted by name; ``root`` may also be the folder of one case.

    A ``dataset.json`` in ``root`` makes it an nnU-Net or Medical Segmentation Decathlon folder. Otherwise files are
    recognised by name at any depth: ``<case>_flair.nii.gz`` is BraTS 2018-2021 (one table), ``<case>-t2f.nii.gz`` is
    BraTS 2023, or BraTS 2024 if the case name ends in a timepoint of 100 or more, as the post-treatment release counts.
    Folders ``images`` and ``masks`` (or ``labels``, ``annotations``) hold 2-D images.

    Args:
        root: the folder.
        modalities: what every case must have; None asks for nothing, and so does the default of 2-D images.
        edition: a key of ``LABEL_MAPS`` that overrides the rule above.
        refused: called with what is wrong with one case, which is then left out; by default that raises.

    Raises:
        UserError: no such folder, no case in it, a missing modality, or cases whose classes differ.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder")
    if edition is not None and edition not in LABEL_MAPS:
        raise UserError(f"edition {edition!r} is unknown; the editions are {', '.join(LABEL_MAPS)}")
    try:
        if (root / "dataset.json").is_file():
            cases = dataset_json_cases(root, edition, refused)
        else:
            cases = brats_cases(_volume_files(root), edition, refused) or image_folder_cases(root, refused)
    except PermissionError as error:
        raise UserError(f"{error.filename or root} cannot be read: {error.strerror}") from error
    if not cases:
        nested = sorted([*root.glob("*/dataset.json"), *root.glob("*/[iI]mages")])
        hint = f" (but there is one in {nested[0].parent})" if nested else ""
        names = "no files named like *_flair.nii.gz or *-t2f.nii.gz, no folders images and masks"
        raise UserError(f"{root} holds no cases: {names}, and no dataset.json{hint}")
    asked = () if modalities is DEFAULT_MODALITIES and cases[0].is_image else modalities or ()
    return _checked(cases, root, asked, refused)


@checked
def cases_from_files(paths: Iterable[str | Path], modalities: Sequence[str] = DEFAULT_MODALITIES) -> list[Case]:
    """Cases of loose files: each image is one; volumes are grouped by BraTS names, or are one case in the order given.

    Raises:
        UserError: files that are no complete set.
    """
    files = [Path(path) for path in paths]
    if not files or not modalities:
        raise UserError(f"{len(files)} files and {len(modalities)} modalities given; a case has at least one of both")
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
    named = brats_cases(files, None)
    if files and sum(len(case.files) for case in named) == len(files):
        return _checked(named, files[0].parent, modalities)
    table = LABEL_MAPS["brats2021"]
    if files and all(map(is_image, files)):
        channels = [None] if len(modalities) == 1 else range(len(modalities))
        cases = []
        for path in files:
            sources = {modality: Source(path, channel) for modality, channel in zip(modalities, channels)}
            cases.append(Case(stem_of(path), stem_of(path), sources, None, table.edition, table))
        return _checked(cases, files[0].parent, modalities)
    if len(files) != len(modalities):
        raise UserError(f"{len(files)} files given, but a case has {len(modalities)}: {', '.join(modalities)}")
    name = stem_of(files[0])
    sources = {modality: Source(path) for modality, path in zip(modalities, files)}
    return [Case(name, name, sources, None, table.edition, table)]


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
            check_modalities(case, modalities)
        except UserError as error:
            refused(str(error))
            del kept[case.name]
    return list(kept.values())


def _volume_files(root: Path) -> Iterator[Path]:
    """Volume files below ``root``, in order, hidden ones left out; links are followed, each real folder once."""
    seen = set()

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if is_listed(Path(name), VOLUME_SUFFIXES))
