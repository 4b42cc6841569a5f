"""Label tables: which value in a file means which class, one explicit table per edition of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from fastunet.errors import UserError

MAX_CLASSES = 255
_UNKNOWN = 255
_SHOWN_VALUES = 8


@dataclass(frozen=True)
class LabelMap:
    """The table between the label values of files and class indices.

    Attributes:
        edition: the name of the table, for messages.
        values: the file value of each class.
        class_names: the name of each class; class 0 is the background.
        regions: unions of classes that are scored together, as tuples of class indices.
    """

    edition: str
    values: tuple[int, ...]
    class_names: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def encode(self, values: np.ndarray, file: str | Path) -> np.ndarray:
        """File values of any shape and real dtype → class indices, uint8.

        Raises:
            UserError: values outside the table, named together with ``file``.
        """
        classes = np.full_like(values, _UNKNOWN, dtype=np.uint8)
        for index, value in enumerate(self.values):
            classes[values == value] = index
        unknown = np.unique(values[classes == _UNKNOWN])
        if unknown.size:
            shown = ", ".join(f"{value:.9g}" for value in unknown[:_SHOWN_VALUES])
            more = f" and {unknown.size - _SHOWN_VALUES} more" if unknown.size > _SHOWN_VALUES else ""
            known = ", ".join(map(str, self.values))
            raise UserError(f"{file}: label values {shown}{more} are not in the table of {self.edition} ({known})")
        return classes

    def decode(self, classes: np.ndarray) -> np.ndarray:
        """Class indices → file values, in the smallest of uint8, int16 and int32 that holds the whole table."""
        return np.asarray(self.values, dtype=self.dtype)[classes]

    @property
    def dtype(self) -> np.dtype:
        """The dtype in which files of this table are written."""
        for dtype in (np.uint8, np.int16, np.int32):
            if np.iinfo(dtype).min <= min(self.values) and max(self.values) <= np.iinfo(dtype).max:
                return np.dtype(dtype)
        raise UserError(f"the label values {self.values} of {self.edition} do not fit 32 bits")

    def to_dict(self) -> dict:
        """The table as JSON types; ``LabelMap.from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping) -> LabelMap:
        """The table that ``to_dict`` wrote."""
        regions = {name: tuple(classes) for name, classes in table["regions"].items()}
        return cls(table["edition"], tuple(table["values"]), tuple(table["class_names"]), regions)


_GLIOMA = ("background", "necrotic core", "oedema", "enhancing tumour")
# As the BraTS challenges define them: the core leaves out the oedema, the whole leaves out a resection cavity.
_REGIONS = {"whole tumour": (1, 2, 3), "tumour core": (1, 3), "enhancing tumour": (3,)}

_TABLES = (
    *(LabelMap(f"brats{year}", (0, 1, 2, 4), _GLIOMA, _REGIONS) for year in (2018, 2019, 2020, 2021)),
    LabelMap("brats2023", (0, 1, 2, 3), _GLIOMA, _REGIONS),
    LabelMap(
        "brats2024",
        (0, 1, 2, 3, 4),
        ("background", "non-enhancing tumour core", "oedema", "enhancing tumour", "resection cavity"),
        {**_REGIONS, "resection cavity": (4,)},
    ),
    LabelMap("msd_brain_tumour", (0, 2, 1, 3), _GLIOMA, _REGIONS),
)
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


def label_map_from_json(labels: Mapping, edition: str, file: str | Path) -> LabelMap:
    """The table of the "labels" entry of a ``dataset.json``: {"name": value} or {"value": "name"}.

    If the names are the four classes of BraTS, the classes are brought into the order of BraTS, whatever the values;
    otherwise classes follow the values.

    Raises:
        UserError: the entry is no such table, has no background 0, or has regions or an "ignore" label.
    """
    if not isinstance(labels, Mapping) or not labels:
        raise UserError(f"{file}: 'labels' is not a table of names and values")
    if any(isinstance(value, list) for value in labels.values()):
        raise UserError(f"{file}: 'labels' defines regions (lists of values); only one value per class can be used")
    try:
        names = {int(key): str(name) for key, name in labels.items()}
    except ValueError:
        try:
            names = {int(value): str(name) for name, value in labels.items()}
        except (TypeError, ValueError):
            raise UserError(f"{file}: 'labels' is not a table of names and whole-number values") from None
    if len(names) != len(labels):
        raise UserError(f"{file}: 'labels' gives one value to two names")
    if 0 not in names or not 2 <= len(names) <= MAX_CLASSES:
        raise UserError(f"{file}: 'labels' needs 0 for the background and from 1 to {MAX_CLASSES - 1} other values")
    if "ignore" in names.values():
        raise UserError(f"{file}: 'labels' has an 'ignore' label, which is not supported")
    classes = [_SYNONYMS.get(_plain(name)) for name in names.values()]
    if set(classes) == set(range(len(_GLIOMA))) and len(classes) == len(_GLIOMA):
        values = dict(zip(classes, names))
        return LabelMap(edition, tuple(values[c] for c in range(len(_GLIOMA))), _GLIOMA, _REGIONS)
    return LabelMap(edition, tuple(sorted(names)), tuple(names[value] for value in sorted(names)))


def _plain(name: str) -> str:
    """The name in lower case, letters only, in American spelling."""
    letters = "".join(c for c in name.lower() if c.isalpha())
    return letters.replace("tumour", "tumor").replace("oedema", "edema")
