"""The label tables of the BraTS editions, and those that a ``dataset.json`` defines.

Sources: the challenge papers, arXiv 2107.02314 (2021), 2305.19369 (Africa), 2305.17033 and 2404.15009 (paediatric),
2305.07642 (meningioma), 2306.00838 (metastases), 2405.18368 (post-treatment glioma, with the resection cavity).
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastunet.data.labels import MAX_CLASSES, LabelMap
from fastunet.errors import UserError
from fastunet.outputs import name_for_file

_GLIOMA = ("background", "necrotic core", "oedema", "enhancing tumour")
# As the BraTS challenges define them: the core leaves out the oedema, the whole leaves out a resection cavity.
_REGIONS = {"whole tumour": (1, 2, 3), "tumour core": (1, 3), "enhancing tumour": (3,)}
_CAVITY = ("background", "non-enhancing tumour core", "oedema", "enhancing tumour", "resection cavity")
_CAVITY_REGIONS = {**_REGIONS, "resection cavity": (4,)}
_PAEDIATRIC = ("background", "enhancing tumour", "non-enhancing tumour", "cystic component", "oedema")
_PAEDIATRIC_REGIONS = {
    "whole tumour": (1, 2, 3, 4),
    "oedema": (4,),
    "tumour core": (1, 2, 3),
    "non-enhancing tumour": (2,),
    "cystic component": (3,),
    "enhancing tumour": (1,),
}
_ORDERS = (
    # Each region writes what it has beyond the regions inside of it, which are written over it: BraTS' whole tumour
    # oedema, the core necrosis, as nnU-Net's conversions of the challenges do.
    (_REGIONS, (2, 1, 3)),
    (_CAVITY_REGIONS, (2, 1, 3, 4)),
    (_PAEDIATRIC_REGIONS, (4, 4, 2, 2, 3, 1)),
)

_TABLES = (
    # Many copies of these editions number the enhancing tumour 3, to leave no gap.
    *(LabelMap(f"brats{year}", (0, 1, 2, 4), _GLIOMA, _REGIONS, aliases={3: 3}) for year in (2018, 2019, 2020, 2021)),
    *(
        LabelMap(f"brats2023{kind}", (0, 1, 2, 3), _GLIOMA, _REGIONS)
        for kind in ("", "_africa", "_men", "_met", "_ped")
    ),
    LabelMap("brats2024", (0, 1, 2, 3, 4), _CAVITY, _CAVITY_REGIONS),
    LabelMap("brats2024_ped", (0, 1, 2, 3, 4), _PAEDIATRIC, _PAEDIATRIC_REGIONS),
    LabelMap("brats2025_met", (0, 1, 2, 3, 4), _CAVITY, _CAVITY_REGIONS),
    LabelMap("msd_brain_tumour", (0, 2, 1, 3), _GLIOMA, _REGIONS),
)
Number = int | float | str
LABEL_MAPS: dict[str, LabelMap] = {table.edition: table for table in _TABLES}

_SYNONYMS = {
    "background": 0,
    "necrosis": 1,
    "necrotic": 1,
    "necroticcore": 1,
    "necrotictumor": 1,
    "necrotictumorcore": 1,
    "nonenhancing": 1,
    "nonenhancingtumor": 1,
    "nonenhancingtumorcore": 1,
    "ncr": 1,
    "ncrnet": 1,
    "netc": 1,
    "edema": 2,
    "peritumoraledema": 2,
    "ed": 2,
    "snfh": 2,
    "enhancing": 3,
    "enhancingtumor": 3,
    "et": 3,
}
_RAW_BRATS_HINT = (
    "0, 1, 2, 4 are BraTS' own numbers (1 necrotic core, 2 oedema, 4 enhancing tumour), which this table orders "
    "otherwise: --edition brats2021 reads them so"
)


def label_map_from_json(
    labels: Mapping[str, Number | Sequence[Number]],
    edition: str,
    file: str | Path,
    order: Sequence[Number] | None = None,
) -> LabelMap:
    """The table of "labels" and "regions_class_order" of a ``dataset.json``.

    "labels" is {"name": value}, {"value": "name"} as in older files, or {"name": [values]} for regions: unions that are
    trained one by one, and written in the order of "regions_class_order". "ignore" names the value that counts nowhere.
    If the names are the four classes of BraTS, the classes are brought into the order of BraTS, whatever the values;
    otherwise classes follow the values. Texts of numbers are numbers.

    Raises:
        UserError: no background 0, no other class, values or names that occur twice, or an order that does not fit.
    """
    members = _members(labels, file)
    ignore = _take_ignore(members, file)
    check_class_names(members, file)
    values = sorted({value for listed in members.values() for value in listed} | {0})
    lists = any(isinstance(listed, Sequence) and not isinstance(listed, str) for listed in labels.values())
    if any(len(listed) > 1 for listed in members.values()) or (lists and order is not None):  # as nnU-Net has it
        _check_count(values, file)
        if not all(map(is_whole, order or ())):
            raise UserError(f"{file}: 'regions_class_order' is {order}; expected whole numbers of 32 bits")
        whole = None if order is None else list(map(int, order))
        return _with_regions(members, values, whole, edition, ignore, file)
    if order is not None:
        raise UserError(f"{file}: 'regions_class_order' orders regions, but every entry of 'labels' is one value")
    names: dict[int, str] = {}
    for name, (value,) in members.items():
        if value in names:
            raise UserError(f"{file}: 'labels' gives value {value} to two names, {names[value]!r} and {name!r}")
        names[value] = name
    if 0 not in names or any(value and _SYNONYMS.get(_plain(name)) == 0 for value, name in names.items()):
        raise UserError(f"{file}: 'labels' needs 0 for the background, and for nothing else")
    _check_count(values, file)
    classes = [_SYNONYMS.get(_plain(name)) for name in names.values()]
    if set(classes) == set(range(len(_GLIOMA))) and len(classes) == len(_GLIOMA):
        by_class = dict(zip(classes, names))
        ordered = tuple(by_class[index] for index in range(len(_GLIOMA)))
        return LabelMap(edition, ordered, _GLIOMA, _REGIONS, ignore=ignore, **_raw_brats(ordered))
    return LabelMap(edition, tuple(values), tuple(names[value] for value in values), ignore=ignore)


def brats_regions(labels: LabelMap, source: object) -> LabelMap:
    """``labels`` with the order in which the regions of BraTS, if it has them, are trained and written.

    Raises:
        UserError: the table has none, or orders its own.
    """
    if labels.region_order:
        raise UserError(f"{source} has regions of its own ({', '.join(labels.regions)}), trained without --regions")
    for regions, order in _ORDERS:
        if labels.regions == regions:
            return replace(labels, region_order=order)
    raise UserError(f"{source}: --regions brats needs labels of BraTS; these are {labels}")


def _check_count(values: Sequence[int], file: str | Path) -> None:
    if not 2 <= len(values) <= MAX_CLASSES:
        raise UserError(f"{file}: 'labels' needs 0 for the background and from 1 to {MAX_CLASSES - 1} other values")


def check_class_names(names: Iterable[str], source: object) -> None:
    """Raises ``UserError`` unless all ``names`` differ, also as parts of file names, and can be shown in one line."""
    seen: dict[str, str] = {}
    for name in names:
        if not name.strip() or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
            raise UserError(f"{source}: the class name {name!r} is empty or holds characters that cannot be shown")
        safe = name_for_file(name).casefold()
        if safe in seen:
            raise UserError(f"{source}: classes {seen[safe]!r} and {name!r} would share one file name; rename one")
        seen[safe] = name


def _members(labels: Mapping[str, Number | Sequence[Number]], file: str | Path) -> dict[str, list[int]]:
    """The file values by class or region name, from either way to write the table."""
    if not labels:
        raise UserError(f"{file}: 'labels' is empty")
    if all(isinstance(entry, str) for entry in labels.values()) and all(is_whole(key) for key in labels):
        named: dict[str, list[int]] = {}
        for value, name in labels.items():
            if name in named:
                raise UserError(f"{file}: 'labels' has two classes called {name!r}")
            named[str(name)] = [int(value)]
        return named
    members = {}
    for name, entry in labels.items():
        listed = [entry] if isinstance(entry, (int, str, float)) else list(entry)
        if not listed or not all(is_whole(value) for value in listed):
            raise UserError(f"{file}: 'labels' gives {name!r} the value {entry!r}; expected whole numbers of 32 bits")
        members[name] = list(dict.fromkeys(int(value) for value in listed))
    return members


def is_whole(value: object) -> bool:
    """Whether ``value`` is a number, or the text of one, of at most 32 bits."""
    if isinstance(value, str):
        return re.fullmatch(r"\s*[+-]?\d{1,10}\s*", value) is not None and is_whole(int(value))
    return isinstance(value, (int, float)) and value == int(value) and -(2**31) <= value < 2**31


def _take_ignore(members: dict[str, list[int]], file: str | Path) -> int | None:
    """Removes the "ignore" entry and returns its value."""
    listed = next((members.pop(name) for name in list(members) if name.strip().lower() == "ignore"), None)
    if listed is None:
        return None
    if len(listed) != 1 or any(listed[0] in others for others in members.values()):
        raise UserError(
            f"{file}: 'labels' gives 'ignore' no value of its own; it needs one value that no class has, not {listed}"
        )
    return listed[0]


def _with_regions(
    members: dict[str, list[int]],
    values: list[int],
    order: Sequence[int] | None,
    edition: str,
    ignore: int | None,
    file: str | Path,
) -> LabelMap:
    """A table whose classes are the single values, named by the regions that are one value, or by the value itself."""
    regions = {name: listed for name, listed in members.items() if listed != [0]}
    if any(0 in listed for listed in regions.values()):
        raise UserError(f"{file}: 'labels' has a region that contains 0, the background")
    if order is None or len(order) != len(regions):
        found = "is missing" if order is None else f"has {len(order)} values"
        raise UserError(f"{file}: 'regions_class_order' {found}; it needs one value for each of {len(regions)} regions")
    for value, (name, listed) in zip(order, regions.items()):
        if value not in listed:
            raise UserError(f"{file}: 'regions_class_order' {list(order)} writes {name!r} as {value}, which it lacks")
    for (inner, small), (outer, large) in itertools.combinations(regions.items(), 2):
        if set(small) < set(large):
            raise UserError(
                f"{file}: {outer!r} would be written over {inner!r}, which lies inside of it: list {outer!r} first, in "
                "'labels' and in 'regions_class_order'"
            )
    own = {listed[0]: name for name, listed in regions.items() if len(listed) == 1}
    names = tuple("background" if value == 0 else own.get(value, f"label {value}") for value in values)
    check_class_names(names, file)
    check_class_names(regions, file)
    index = {value: number for number, value in enumerate(values)}
    table = {name: tuple(index[value] for value in listed) for name, listed in regions.items()}
    raw: dict[str, Any] = {}
    if set(map(frozenset, table.values())) == set(map(frozenset, _REGIONS.values())):
        raw = _raw_brats(tuple(values))
    return LabelMap(edition, tuple(values), names, table, tuple(index[value] for value in order), ignore, **raw)


def _raw_brats(values: tuple[int, ...]) -> dict[str, Any]:
    """How a table of the classes of BraTS takes files whose labels were left as BraTS 2018-2021 numbers them."""
    if values in ((0, 1, 2, 3), (0, 1, 2, 4)):
        return {"aliases": {4 if values[3] == 3 else 3: 3}}
    return {} if 4 in values else {"hint": _RAW_BRATS_HINT}


def _plain(name: str) -> str:
    """The name in lower case, letters only, in American spelling."""
    letters = "".join(c for c in name.lower() if c.isalpha())
    return letters.replace("tumour", "tumor").replace("oedema", "edema")
