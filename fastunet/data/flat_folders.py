"""The cases of masks that lie beside their images or volumes."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastunet.data.case import Case, modality_name
from fastunet.data.formats import IMAGE_SUFFIXES, VOLUME_SUFFIXES, listed_below, stem_of
from fastunet.data.image_folders import MARKED, Pairs, cases_of, image_finder, name_below, named_files, pairs_by_name
from fastunet.data.masks import MOST_CLASSES
from fastunet.data.volumes import read_volume
from fastunet.errors import Refusal, UserError, refuse, warn_once

_MOST_CHANNELS = 16
_SAMPLE = 100_000  # voxels that tell an image from labels
_ENTITY = re.compile("sub-|ses-")
"""How BIDS calls the folders of a subject and of a session, beside each other in the data and in derivatives."""


def flat_cases(root: Path, refused: Refusal = refuse, asked: Collection[str] = ()) -> list[Case]:
    """The cases of masks that lie beside their images or volumes, told by marks in their names.

    ``a_mask.png`` belongs to ``a.png``, or to the only other image of its folder, below ``root``, or to all volumes of
    its folder and of those in it, which are channels of one case; so are the volumes of a session of BIDS. A folder
    such as ``segmentations`` beside images or volumes, if no mask lies beside these, holds their masks. Scans in a
    folder with a number in its name, with which theirs begin, or of one subject of BIDS, are those of one patient.
    Volumes without any masks are cases for a network that takes the channels ``asked``, or the only one. For the rest
    see ``image_folder_cases``.
    """
    for suffixes in (IMAGE_SUFFIXES, VOLUME_SUFFIXES):
        pairs: Pairs = {}
        channels: dict[str, dict[str, Path]] = {}
        patients: dict[str, str] = {}
        said: list[str] = []
        for folder, paths in _by_case(root, [*listed_below(root, suffixes)]).items():
            places = dict.fromkeys(path.parent for path in paths)
            inner = [place for place in places if place.parent == folder and MARKED.fullmatch(place.name)]
            masks = [path for path in paths if path.parent in inner or MARKED.fullmatch(stem_of(path))]
            named = named_files(folder, (path for path in paths if path not in masks), said.append)
            inside = root.resolve().name if folder == root else folder.relative_to(root).as_posix()
            subject = next((part for part in inside.split("/") if _ENTITY.match(part)), None)
            several = _channels_of(named) if suffixes is VOLUME_SUFFIXES and 1 < len(named) <= _MOST_CHANNELS else {}
            if masks and (folder == root or masks[1:] or image_finder(named)(name_below(folder, masks[0]))):
                several = {}  # each belongs to one of them
            if several and (masks or (asked and set(asked) <= set(several))):
                pairs[inside] = next(iter(named.values())), tuple(masks)
                channels[inside], patients[inside.replace("/", "_")] = several, subject or inside
                continue
            alone = len(named) == 1 and (folder != root or inner != [])
            for name, pair in pairs_by_name(named, [*inner, folder][0], masks, said.append, alone).items():
                follows = folder != root and name.startswith(folder.name)
                short = inside if alone else name
                own = short if (alone or follows or folder == root) and short not in pairs else f"{inside}/{name}"
                pairs[own] = pair
                numbered = inside if follows and re.search(r"\d", folder.name) else own
                patients[own.replace("/", "_")] = subject or numbered
        if channels:  # of cases with one of them, too
            channels = {name: _channels_of({stem_of(path): path}) for name, (path, _) in pairs.items()} | channels
        labelled = any(own for _, own in pairs.values())
        if labelled and channels and not asked:
            _check_channels(channels, pairs)
        if labelled or (suffixes is VOLUME_SUFFIXES and (channels or len(asked) == 1)):
            for text in said:
                refused(text)
            return [replace(case, patient=patients[case.name]) for case in cases_of(pairs, refused, channels)]
    return []


def _check_channels(channels: Mapping[str, Mapping[str, Path]], pairs: Pairs) -> None:
    """Says which channels hold a few whole numbers only, as labels do whose names do not say so.

    The first case that has more than one value in a channel speaks for the others.
    """
    looked_at: set[str] = set()
    for case, files in channels.items():
        for channel, path in files.items() if pairs[case][1] else ():
            if channel in looked_at:
                continue
            try:
                data = read_volume(path, on_nan="zero").data.ravel(order="K")
            except UserError:  # said where its voxels are needed
                continue
            values = np.unique(data[:: max(data.size // _SAMPLE, 1)])
            values = np.unique(data) if values.size <= MOST_CLASSES else values
            looked_at |= {channel} if values.size > 1 else set()
            if 1 < values.size <= MOST_CLASSES and (values == np.rint(values)).all():
                others = ",".join(name for name in files if name != channel)
                warn_once(
                    f"labels as channel {channel}",
                    f"{path} holds {values.size} values only, as labels do, and is taken as a channel: if it is the "
                    f"label file, call it {stem_of(path)}_mask, and take {pairs[case][1][0].name} away; else name the "
                    f"channels, such as --modalities {others or channel}",
                )


def _by_case(root: Path, paths: list[Path]) -> dict[Path, list[Path]]:
    """The files by folder, together where they make up cases.

    That is those of one subject and session of BIDS, those below a folder of a mask only, and those of a folder that is
    called after masks with what lies beside it; if a mask does already, that folder is left out.
    """
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        entities = dict.fromkeys(part for part in path.parent.relative_to(root).parts if _ENTITY.match(part))
        folders.setdefault(root.joinpath(*entities) if entities else path.parent, []).append(path)
    above = {folder for folder, (path, *more) in folders.items() if not more and MARKED.fullmatch(stem_of(path))}
    plain = {folder for folder, found in folders.items() if not any(MARKED.fullmatch(stem_of(path)) for path in found)}
    joined: dict[Path, list[Path]] = {}
    for folder, found in folders.items():
        owner = next((each for each in folder.parents if each in above - {root}), folder)
        if MARKED.fullmatch(folder.name) and folder.parent in folders:
            if folder in plain and folder.parent not in plain:
                warn_once("masks beside masks", f"{folder} is left out: a mask lies beside it already")
                continue
            owner = folder.parent if folder.parent in plain else owner
        joined.setdefault(owner, []).extend(found)
    return joined


def _channels_of(named: Mapping[str, Path]) -> dict[str, Path]:
    """Volumes of one case by channel: their names without what all begin with."""
    shared = os.path.commonprefix([*named]) if len(named) > 1 else ""  # noqa: RUF071 - characters are meant
    begin = max(map(shared.rfind, "-_. /")) + 1
    written = {name[begin:].replace("/", "_"): path for name, path in named.items()}
    suffixes = {name.rpartition("_")[2]: path for name, path in named.items() if _ENTITY.match(path.name)}
    written = suffixes if len(suffixes) == len(named) else written
    known = {modality_name(name): path for name, path in written.items()}
    return known if len(known) == len(named) else written
