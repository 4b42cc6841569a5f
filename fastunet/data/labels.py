"""Which label value in a file means which class: an explicit table per data set, with regions and an ignored value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastunet.arguments import checked
from fastunet.errors import UserError, warn_once
from fastunet.schema import to_type

MAX_CLASSES = 128
"""What the fused losses and metrics take."""
IGNORED = 255
"""The class index of pixels that count nowhere; what losses and metrics take as ``ignore_index``."""
ROUNDING = 1e-3
"""How far a stored label may lie from a whole number and still be that number: what scaled and float files leave."""
COLOUR = 1 << 24
"""Added to the packed red, green and blue of a mask's coloured pixel, so that it is no grey value."""
_SHOWN_VALUES = 8


@checked
@dataclass(frozen=True)
class LabelMap:
    """The table between the label values of files and class indices.

    Attributes:
        edition: the name of the table, for messages.
        values: the file value of each class.
        class_names: the name of each class; class 0 is the background.
        regions: unions of classes that are scored together, as tuples of class indices.
        region_order: for networks with one sigmoid output a region, in the order of ``regions``: the class that is
            written where the region is found, later ones over earlier ones. Empty if classes are trained.
        ignore: the file value of pixels that count nowhere, or None; they become class ``IGNORED``.
        aliases: other file values of a class, which some copies of the data use in its place.
        hint: what to try where a file holds other values.
    """

    edition: str
    values: tuple[int, ...]
    class_names: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    region_order: tuple[int, ...] = ()
    ignore: int | None = None
    aliases: Mapping[int, int] = field(default_factory=dict)
    hint: str = ""

    def __str__(self) -> str:
        """Values and names in one line, cut short after the first few."""
        table = [f"{value_name(value)} {name}" for value, name in zip(self.values, self.class_names)]
        table += [] if self.ignore is None else [f"{value_name(self.ignore)} ignored"]
        return ", ".join(table[:_SHOWN_VALUES]) + (", …" if len(table) > _SHOWN_VALUES else "")

    def encode(self, values: np.ndarray, file: str | Path) -> np.ndarray:
        """File values of any shape and real dtype → class indices, uint8.

        Values within ``ROUNDING`` of a whole number are that number. A value of ``aliases`` stands for its class if the
        file lacks the class's own value; the user is told once.

        Raises:
            UserError: values outside the table, named and counted together with ``file``.
        """
        whole = rounded(values)
        classes = np.zeros(values.shape, np.uint8)
        known = np.zeros(values.shape, bool)
        for index, value in [*enumerate(self.values), *([] if self.ignore is None else [(IGNORED, self.ignore)])]:
            here = whole == value
            classes[here] = index
            known |= here
        for alias, index in self.aliases.items():
            here = ~known & (whole == alias)
            if here.any() and not (classes == index).any():
                classes[here] = index
                known |= here
                warn_once(f"alias {alias} of {self.edition}", self._alias_note(alias, index, file))
        if not known.all():
            raise UserError(self._unknown(values[~known], file))
        return classes

    def ignoring(self, value: int) -> LabelMap:
        """The table in which ``value`` of the files counts nowhere; a class that it was is left out.

        Raises:
            UserError: another value is ignored, regions hold the class, or it is one of two, or the first.
        """
        if self.ignore not in (None, value):
            raise UserError(f"the table of {self.edition} ignores {self.ignore}; it cannot ignore {value} too")
        if value not in self.values:
            return replace(self, ignore=value, aliases={k: v for k, v in self.aliases.items() if k != value})
        index = self.values.index(value)
        if index == 0 or len(self.values) < 3 or self.regions or self.aliases:
            raise UserError(f"the table of {self.edition} cannot ignore {value}, a class that it needs ({self})")
        values, names = ((*of[:index], *of[index + 1 :]) for of in (self.values, self.class_names))
        return replace(self, values=values, class_names=names, ignore=value)

    def decode(self, classes: np.ndarray) -> np.ndarray:
        """Class indices → file values, in the smallest of uint8, int16 and int32 that holds the whole table.

        Raises:
            ValueError: an index that is no class.
            TypeError: other than whole numbers.
        """
        table = np.zeros(256, self.dtype)
        table[: len(self.values)] = self.values
        allowed = np.zeros(256, bool)
        allowed[: len(self.values)] = True
        if self.ignore is not None:
            table[IGNORED], allowed[IGNORED] = self.ignore, True
        classes = np.asarray(classes)
        if classes.dtype.kind not in "iu":
            raise TypeError(f"classes are of type {classes.dtype}; expected whole numbers")
        if classes.size and not (classes.min() >= 0 and classes.max() < 256 and allowed[np.unique(classes)].all()):
            raise ValueError(f"classes from {classes.min()} to {classes.max()}; expected 0 to {len(self.values) - 1}")
        return np.asarray(table[classes])

    def encode_regions(self, classes: np.ndarray) -> np.ndarray:
        """Class indices (...) → whether each region holds the pixel, uint8 (regions, ...).

        Ignored pixels are ``IGNORED`` in every region.
        """
        targets = np.stack([np.isin(classes, members) for members in self.regions.values()]).astype(np.uint8)
        targets[:, classes == IGNORED] = IGNORED
        return targets

    def decode_regions(self, inside: np.ndarray) -> np.ndarray:
        """Whether each region holds the pixel, bool (regions, ...) → class indices, uint8, as ``region_order`` has it.

        Raises:
            ValueError: the table has no such order, or ``inside`` another number of regions.
        """
        if len(inside) != len(self.region_order):
            raise ValueError(f"{len(inside)} regions; the table of {self.edition} orders {len(self.region_order)}")
        last = np.zeros(inside.shape[1:], np.uint8)
        for number, region in enumerate(inside, start=1):
            last[region.astype(bool)] = number
        return self.painted[last]

    @property
    def painted(self) -> np.ndarray:
        """The class that is written where no region holds the pixel, then where the first, second, … is the last to."""
        return np.array([0, *self.region_order], np.uint8)

    @property
    def painting(self) -> str:
        """The regions in the order in which they are written, and the file value of each, for messages."""
        written = zip(self.regions, self.region_order)
        return ", ".join(f"{name} (as {value_name(self.values[index])})" for name, index in written)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What a network trained on this table has outputs of: the regions if they have an order, else the classes."""
        return tuple(self.regions) if self.region_order else self.class_names

    @property
    def dtype(self) -> np.dtype:
        """The dtype in which files of this table are written."""
        values = [*self.values, *([] if self.ignore is None else [self.ignore])]
        for dtype in (np.uint8, np.int16, np.int32):
            if np.iinfo(dtype).min <= min(values) and max(values) <= np.iinfo(dtype).max:
                return np.dtype(dtype)
        raise UserError(f"the label values {self.values} of {self.edition} do not fit 32 bits")

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON types; ``LabelMap.from_dict`` reads it back. Empty and unset fields are left out."""
        table = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        table["regions"] = {name: list(classes) for name, classes in self.regions.items()}
        table["aliases"] = {str(value): index for value, index in self.aliases.items()}
        optional = ("region_order", "ignore", "aliases", "hint")
        return {name: value for name, value in table.items() if name not in optional or value not in (None, (), {}, "")}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], source: object = "the label table") -> LabelMap:
        """The table that ``to_dict`` wrote.

        Raises:
            UserError: entries of other types, or names, values and regions that do not fit each other.
        """
        labels = to_type(dict(table), cls, source)
        count = len(labels.values)
        indices = [index for members in labels.regions.values() for index in members]
        indices += [*labels.region_order, *labels.aliases.values()]
        if not 2 <= count <= MAX_CLASSES or count != len(labels.class_names) or len(set(labels.values)) < count:
            raise UserError(f"{source} does not give each of 2 to {MAX_CLASSES} classes one value and one name")
        if not all(0 <= index < count for index in indices):
            raise UserError(f"{source} has regions of classes that are not there")
        return labels

    def _alias_note(self, alias: int, index: int, file: str | Path) -> str:
        name, value = self.class_names[index], self.values[index]
        known = f"which the table of {self.edition} numbers {value}"
        return f"{file} holds label {alias} and no {value}: {alias} is read as {name}, {known}"

    def _unknown(self, values: np.ndarray, file: str | Path) -> str:
        found = np.unique(values)
        first = found[:_SHOWN_VALUES]
        shown = ", ".join(value_name(v) if COLOUR <= v < 2 * COLOUR else f"{v:.9g}" for v in first)
        more = f" and {found.size - _SHOWN_VALUES} more" if found.size > _SHOWN_VALUES else ""
        ways = "correct the file, name a table that has them ('labels' of dataset.json, --edition), or --ignore-label"
        hint = self.hint or ways
        if found.dtype.kind == "f" and (np.abs(found - np.rint(found)) > ROUNDING).any():
            hint = f"values within {ROUNDING:g} of a whole number are rounded, these look interpolated"
        return (
            f"{file}: label values {shown}{more} are not in the table of {self.edition} ({self}), in {values.size} "
            f"voxels; {hint}"
        )


def value_name(value: int) -> str:
    """How a label value is shown: as a number, or the colour of a mask as "#rrggbb"."""
    return f"#{int(value) - COLOUR:06x}" if COLOUR <= value < 2 * COLOUR else str(value)


def rounded(values: np.ndarray) -> np.ndarray:
    """Whole numbers where ``values`` are within ``ROUNDING`` of one, NaN elsewhere; whole numbers stay as they are."""
    if values.dtype.kind in "biu":
        return values
    with np.errstate(invalid="ignore"):
        nearest = np.rint(values)
        return np.where(np.abs(values - nearest) <= ROUNDING, nearest, np.nan)
