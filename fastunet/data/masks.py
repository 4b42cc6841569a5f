"""Masks that people paint: any set of grey values or colours becomes a table of classes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastunet.data.formats import suffix_of
from fastunet.data.images import load_mask
from fastunet.data.labels import COLOUR, LabelMap, value_name
from fastunet.errors import UserError

MOST_CLASSES = 32
_THREADS = 4
_LABEL_NUMBERS = 32  # masks of values below are numbered by class, others painted to be seen
_NEAR = 8  # grey levels
_RARE = 0.05
_SHOWN = 8


def mask_table(paths: Sequence[Path]) -> LabelMap:
    """The classes of all ``paths`` together: one for each value, in the order of the values, 0 (black) first.

    Raises:
        UserError: masks that cannot be read, one value only, or values that no one painted: traces of JPEG compression,
            numbers of single objects, or a photograph.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        counted = list(pool.map(_count, paths))
    counts: dict[int, int] = {}
    for values in counted:
        for value, number in values.items():
            counts[value] = counts.get(value, 0) + number
    where = paths[0].parent
    _check(counts, counted, paths, where)
    values = sorted(counts)
    names = ["background", "object"] if len(values) == 2 else ["background", *map(value_name, values[1:])]
    return LabelMap(f"the masks in {where.name}", tuple(values), tuple(names))


def _count(path: Path) -> dict[int, int]:
    pixels = load_mask(path)
    if pixels.dtype.kind == "f":
        whole = np.rint(pixels)
        if not (np.isfinite(pixels).all() and (whole == pixels).all()):
            raise UserError(f"{path}: a mask holds whole numbers, this one holds others")
    values, counts = np.unique(pixels, return_counts=True)
    if values.size > 1 << 16 or values[0] < 0 or values[-1] >= 2 * COLOUR:
        raise UserError(f"{path} holds {values.size} different values; it is no mask of classes")
    return dict(zip(values.astype(int).tolist(), counts.tolist()))


def _check(counts: dict[int, int], counted: list[dict[int, int]], paths: Sequence[Path], where: Path) -> None:
    if len(counts) < 2:
        value = value_name(next(iter(counts)))
        raise UserError(f"{where}: every pixel of {len(paths)} masks is {value}; there is nothing to learn")
    values = sorted(counts)
    grey = [value for value in values if value < COLOUR]
    stray = [value for value in grey if grey[-1] > _LABEL_NUMBERS and _is_stray(value, grey, counts)]
    lossy = [path for path, found in zip(paths, counted) if suffix_of(path) in (".jpg", ".jpeg") and len(found) > 2]
    if stray or lossy:
        kept = [value for value in grey if value not in stray]
        example = lossy[0] if lossy else next(p for p, found in zip(paths, counted) if set(stray) & set(found))
        limit = f"above {(kept[0] + kept[-1]) // 2} / below" if len(kept) == 2 else "nearest painted value"
        raise UserError(
            f"{example}: {len(stray) or len(values)} of {len(values)} values look like traces of JPEG compression "
            f"({_shown(stray or values)}): bring each pixel back to a class ({limit}), and save masks as PNG"
        )
    if len(values) > MOST_CLASSES:
        run = values == list(range(values[0], values[0] + len(values)))
        hint = "; they look like numbers of single objects, which are no classes" if run else ""
        raise UserError(
            f"{where}: masks hold {len(values)} different values ({_shown(values)}), at most {MOST_CLASSES} can be "
            f"classes{hint}"
        )


def _is_stray(value: int, grey: list[int], counts: dict[int, int]) -> bool:
    """Whether a value is rare beside a near one."""
    near = [counts[other] for other in grey if 0 < abs(other - value) <= _NEAR]
    return counts[value] < _RARE * max(near, default=0)


def _shown(values: Sequence[int]) -> str:
    return ", ".join(map(value_name, values[:_SHOWN])) + (", …" if len(values) > _SHOWN else "")
