"""Label files without a table: masks that people paint, and label volumes; the values found become classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastunet.data.formats import is_image, suffix_of
from fastunet.data.labels import COLOUR, MAX_CLASSES, LabelMap, rounded, value_name
from fastunet.data.volumes import read_label_values
from fastunet.errors import Refusal, UserError, refuse, warn_once

MOST_CLASSES = 32
_THREADS = 4
_MOST_VALUES = 1 << 12
_LABEL_NUMBERS = 32  # masks of values below are numbered by class, others painted to be seen
_NEAR = 8  # grey levels
_RARE = 0.05
_MOSTLY = 0.75  # of a value's pixels
_LOOKED_AT = 16  # masks, those of most values
_SHOWN = 8
_APART = "paint objects in one value, or save a mask of each, as NAME_1.png and NAME_2.png of NAME.png"
_OBJECTS = 6
"""Masks of this many values, of which each holds the first ones, with half as many last ones, may number objects."""


def mask_table(paths: Sequence[Path], refused: Refusal = refuse) -> LabelMap:
    """The classes of all masks together: one for each value, in the order of the values, 0 (black) first.

    ``refused`` is called with what is wrong with a mask that cannot be read, which then counts nothing.

    Raises:
        UserError: masks that cannot be read, one value only, or values that no one painted: traces of JPEG compression,
            numbers of single objects, or a photograph.
    """
    counted = _counted(paths, refused)
    counts = _summed(counted)
    where = Path(os.path.commonpath([path.parent for path in paths]))
    if not counts:
        return LabelMap("masks that cannot be read", (0, 1), ("background", "object"))
    _check(counts, counted, paths, where)
    values = sorted(counts)
    lasts = {max(found) for found in counted if found and sorted(found) == [*range(len(found))]}
    if values == [*range(len(values))] and len(values) >= _OBJECTS and len(lasts) >= _OBJECTS // 2:
        text = (
            f"{where}: values 0 to {values[-1]} may be numbers of single objects, of which each mask has its first ones"
        )
        warn_once(
            f"objects in {where}", f"{text}; they are taken as classes: if they are none, {_APART}"
        )
    names = ["background", "object"] if len(values) == 2 else ["background", *map(value_name, values[1:])]
    return LabelMap(f"the masks in {where.name}", tuple(values), tuple(names))


def found_table(truths: Sequence[Path], predictions: Sequence[Path]) -> LabelMap:
    """The classes of label files as they are found: 0, the background, and one for each other value.

    Raises:
        UserError: files that cannot be read, values that are no whole numbers, or too many, traces of JPEG compression,
            or truth and predictions that have values, but none in common.
    """
    paths = [*truths, *predictions]
    counted = _counted(paths)
    if lossy := _lossy(paths, counted):
        raise UserError(f"{lossy[0]}: its values look like traces of JPEG compression; save masks as PNG")
    true, predicted = (sorted(_summed(part).keys() - {0}) for part in (counted[: len(truths)], counted[len(truths) :]))
    if true and predicted and not {*true} & {*predicted}:
        where = truths[0].parent, predictions[0].parent
        raise UserError(
            f"the truth in {where[0]} has values {_shown(true)}, the predictions in {where[1]} have "
            f"{_shown(predicted)}: bring one to the values of the other"
        )
    _check_edges(paths, counted)
    values = sorted({0, *true, *predicted})
    if len(values) > MAX_CLASSES:
        raise UserError(
            f"{paths[0].parent}: label files hold {len(values)} values ({_shown(values)}), too many classes"
        )
    values.remove(0)
    names = ("background", *(f"label {value_name(value)}" for value in values)) if values else ("background", "label 1")
    return LabelMap("the values found", (0, *(values or [1])), names)


def _summed(counted: Sequence[dict[int, int]]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for values in counted:
        for value, number in values.items():
            counts[value] = counts.get(value, 0) + number
    return counts


def _counted(paths: Sequence[Path], refused: Refusal = refuse) -> list[dict[int, int]]:
    def count(path: Path) -> dict[int, int] | UserError:
        try:
            return count_labels(path)
        except UserError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(count, paths))
    for one in found:
        if isinstance(one, UserError):
            refused(str(one))
    return [{} if isinstance(one, UserError) else one for one in found]


def count_labels(path: Path) -> dict[int, int]:
    """How many voxels or pixels of a label file hold each value, rounded as ``LabelMap.encode`` does.

    Raises:
        UserError: the file cannot be read, or holds values that are no whole numbers, or thousands of them.
    """
    return value_counts(read_label_values(path), path)


def value_counts(voxels: np.ndarray, path: Path) -> dict[int, int]:
    """``count_labels`` of an array that was read from ``path``."""
    whole = rounded(voxels)
    if whole.dtype == np.uint8:
        counts = np.bincount(whole.ravel(order="K"))
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    values, counts = np.unique(whole[~np.isnan(whole)] if whole.dtype.kind == "f" else whole, return_counts=True)
    broken = voxels.size - int(counts.sum())
    if broken:
        example = voxels[np.isnan(whole)].flat[0]
        raise UserError(
            f"{path}: {broken} voxels are no whole numbers, such as {example:.9g}; a label file holds those"
        )
    if values.size > _MOST_VALUES or abs(values).max(initial=0) >= 1 << 31:
        raise UserError(
            f"{path} holds {values.size} different values up to {abs(values).max():.9g}; it is no label file"
        )
    return dict(zip(values.astype(int).tolist(), counts.tolist()))


def _check(counts: dict[int, int], counted: list[dict[int, int]], paths: Sequence[Path], where: Path) -> None:
    if len(counts) < 2:
        value = value_name(next(iter(counts)))
        raise UserError(f"{where}: every pixel of {len(paths)} masks is {value}; there is nothing to learn")
    values = sorted(counts)
    ones = next((path for path, found in zip(paths, counted) if 1 in found), None)
    if values == [0, 1, 255] and not any({1, 255} <= found.keys() for found in counted):
        whites = next(path for path, found in zip(paths, counted) if 255 in found)
        raise UserError(f"{ones} paints the object as 1 and {whites} as 255: bring one to the value of the other")
    grey = [value for value in values if value < COLOUR]
    stray = [value for value in grey if grey[-1] > _LABEL_NUMBERS and _is_stray(value, grey, counts)]
    lossy = _lossy(paths, counted)
    if not lossy:
        _check_edges(paths, counted, painted=len(grey) == len(values) and grey[-1] > _LABEL_NUMBERS)
    run = values == list(range(values[0], values[0] + len(values)))
    numbers = run and len(values) > MOST_CLASSES and not lossy  # of objects, smaller than the background
    if (stray and not numbers) or lossy:
        kept = [value for value in grey if value not in stray]
        example = lossy[0] if lossy else next(p for p, found in zip(paths, counted) if set(stray) & set(found))
        raise UserError(
            f"{example}: {len(stray) or len(values)} of {len(values)} values look like traces of JPEG compression "
            f"({_shown(stray or values)}): bring each pixel back to a class ({_limit(kept)}), and save masks as PNG"
        )
    if len(values) > MOST_CLASSES:
        hint = f"; they look like numbers of single objects, which are no classes: {_APART}" if run else ""
        raise UserError(
            f"{where}: masks hold {len(values)} different values ({_shown(values)}), at most {MOST_CLASSES} can be "
            f"classes{hint}"
        )


def _check_edges(paths: Sequence[Path], counted: Sequence[dict[int, int]], *, painted: bool = False) -> None:
    """Refuses masks with values that only lie between others: what smoothing and resampling leave at edges.

    A line that someone painted, one pixel wide, lies between two classes too, but is one value among many, or keeps the
    two apart: a single value of ``painted`` masks is refused where they touch beside it more often than it occurs.
    """
    values = _summed(counted).keys()
    if len(values) < (3 if painted else 4):
        return
    several = {path: len(found) for path, found in zip(paths, counted) if len(found) > 2 and is_image(path)}
    within = {path: _between(path) for path in sorted(several, key=lambda path: -several[path])[:_LOOKED_AT]}
    seen, between = (_summed([found[index] for found in within.values()]) for index in (0, 1))
    edges = sorted(value for value, number in between.items() if number >= _MOSTLY * seen[value])
    few = 2 * sum(seen[value] for value in edges) < sum(seen.values())  # else it is a photograph
    stray = painted and len(edges) == 1 and sum(_contacts(path, edges[0]) for path in within) > seen[edges[0]]
    if few and (stray or len(edges) >= max(2, len(values) - len(edges))):
        example = next(path for path, (_, found) in within.items() if found.keys() & set(edges))
        raise UserError(
            f"{example}: {len(edges)} of {len(values)} values ({_shown(edges)}) only lie between others, as in masks "
            "that were smoothed or resampled: bring each pixel back to a class "
            f"({_limit(sorted(values - set(edges)))}), and resize masks by nearest neighbours"
        )


def _limit(kept: Sequence[int]) -> str:
    """How pixels are brought back to the classes ``kept``."""
    two = len(kept) == 2 and kept[-1] < COLOUR
    return f"above {(kept[0] + kept[-1]) // 2} / below" if two else "nearest painted value"


def _between(path: Path) -> tuple[dict[int, int], dict[int, int]]:
    """How many pixels off the border hold each value, and how many of them lie between their neighbours on both sides.

    In between is what is neither of the two, and in no channel beyond them.
    """
    values = read_label_values(path)
    packed = np.where(values >= COLOUR, values - COLOUR, values * 0x010101) if values.max() >= COLOUR else values
    channels = [packed >> 16, packed >> 8 & 255, packed & 255] if packed is not values else [values]
    inner = (slice(1, -1), slice(1, -1))
    found = np.zeros(values[inner].shape, bool)
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        sides = [
            tuple(slice(1 + sign * step, size - 1 + sign * step) for step, size in zip((down, right), values.shape))
            for sign in (1, -1)
        ]
        here = (values[inner] != values[sides[0]]) & (values[inner] != values[sides[1]])
        for channel in channels:
            one, two = channel[sides[0]], channel[sides[1]]
            here &= (np.minimum(one, two) <= channel[inner]) & (channel[inner] <= np.maximum(one, two))
        found |= here
    return value_counts(values[inner], path), value_counts(values[inner][found], path)


def _contacts(path: Path, value: int) -> int:
    """How many neighbours, side by side, have ``value`` between their own, which touch though."""
    values = read_label_values(path)
    pairs = ((values[1:], values[:-1]), (values[:, 1:], values[:, :-1]))
    return sum(int(np.count_nonzero((np.minimum(*pair) < value) & (value < np.maximum(*pair)))) for pair in pairs)


def _lossy(paths: Sequence[Path], counted: Sequence[dict[int, int]]) -> list[Path]:
    return [path for path, found in zip(paths, counted) if suffix_of(path) in (".jpg", ".jpeg") and len(found) > 2]


def _is_stray(value: int, grey: list[int], counts: dict[int, int]) -> bool:
    """Whether a value is rare beside a near one."""
    near = [counts[other] for other in grey if 0 < abs(other - value) <= _NEAR]
    return counts[value] < _RARE * max(near, default=0)


def _shown(values: Sequence[int]) -> str:
    return ", ".join(map(value_name, values[:_SHOWN])) + (", …" if len(values) > _SHOWN else "")
