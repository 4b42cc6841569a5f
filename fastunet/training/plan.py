"""What a run would do, from its options and the headers of its data, or every reason why it cannot."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastunet.architecture import Architecture
from fastunet.data import DEFAULT_MODALITIES, Case, LabelMap, Split, read_geometry, split_cases
from fastunet.data.checks import check_quickly, slice_shape
from fastunet.data.label_tables import brats_regions
from fastunet.data.slices import slice_spacing
from fastunet.errors import UserError
from fastunet.functional.dice_regions import MOST_REGIONS
from fastunet.training.config import TrainConfig

_SPACING_THAT_MATTERS = 1.1
_LARGEST_VALID, _LARGEST_SAME = 572, 512
"""Sides of the tiles that images are trained in where nothing else is asked for."""


@dataclass(frozen=True)
class Plan:
    """What is decided before any voxel is read.

    Of images ``tile`` is the side of a tile and ``output`` that of the middle which is predicted, None and 0 for
    volumes. ``spacing`` is what slices are resampled to, (rows, columns) in millimetres, None if they stay.
    """

    labels: LabelMap
    modalities: tuple[str, ...]
    split: Split
    spacing: tuple[float, float] | None
    tile: int | None
    output: int


def plan_training(
    config: TrainConfig, cases: Sequence[Case], say: Callable[[str], object]
) -> tuple[Plan | None, list[str]]:
    """The plan of a run on ``cases``, all labelled, or None, and the problems for which it would be refused.

    ``say`` is called with what the user should know.
    """
    problems: list[str] = []
    images, modalities = cases[0].is_image, tuple(config.modalities or training_modalities(cases))
    with _noted(problems):
        labels = trained_labels(config.regions, cases[0].label_map, config.data)
        config.check_class_weights(len(labels.outputs))
        if config.border_weights and labels.region_order:
            advice = "--regions none trains classes"
            raise UserError(f"--border-weights is for exclusive classes, and regions overlap; {advice}")
        if config.border_weights and not images:
            raise UserError(f"--border-weights is for 2-D images; {config.data} holds volumes")
    spacing, tile, output = None, None, 0
    with _noted(problems):
        architecture = architecture_of(config)
        spacing = target_spacing(cases, config.spacing, config.axis, say)
        if images:
            tile, output = tile_sides(architecture, config.size, _sides(cases) or [1])
    problems += check_quickly(cases, modalities, size=config.size, axis=config.axis, spacing=spacing)
    with _noted(problems):
        if not config.val_fraction:
            raise UserError("--val-fraction is 0, but validation needs at least one patient")
        split = split_cases(cases, validation=config.val_fraction, seed=config.seed)
        if not problems:
            most = sum(_samples(case, config.axis, output) for case in split.train)
            check_batch_size(config, most, "tiles" if images else "slices")
    return (None if problems else Plan(labels, modalities, split, spacing, tile, output)), problems


@contextlib.contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Puts a ``UserError`` of the block among the problems."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def check_batch_size(config: TrainConfig, samples: int, kind: str) -> None:
    """Raises ``UserError`` if an epoch of ``samples`` has no full batch."""
    if config.batch_size > samples:
        raise UserError(f"--batch-size is {config.batch_size}, but there are only {samples} training {kind}")


def _sides(cases: Sequence[Case]) -> list[int]:
    """The shorter side of each image whose header can be read."""
    sides = []
    for case in cases:
        with contextlib.suppress(UserError):  # said by check_quickly
            sides.append(min(read_geometry(case.files[0]).shape[:2]))
    return sides


def _samples(case: Case, axis: int, output: int) -> int:
    """How many samples a case gives at most: its slices, or the tiles that cover its pages."""
    count, *sides = slice_shape(read_geometry(case.files[0]), axis)
    count = count if case.pages is None else case.pages[1] - case.pages[0]
    return count * (-(-sides[0] // output) * -(-sides[1] // output) if output else 1)


def architecture_of(config: TrainConfig, **overrides: Any) -> Architecture:
    """The network that ``config`` asks for, with ``overrides`` for what the data decide.

    Raises:
        UserError: an argument that no network takes.
    """
    given = {name: getattr(config, name) for name in ("width", "depth", "dropout", "norm", "activation")}
    given = {name: None if value == "none" else value for name, value in given.items() if value is not None}
    try:
        return Architecture.from_preset(config.preset, **given, **overrides)
    except ValueError as error:
        raise UserError(str(error)) from error


def tile_sides(architecture: Architecture, size: int | None, sides: Sequence[int]) -> tuple[int, int]:
    """The side of the tiles that a network takes from images, and of the middle that it predicts.

    Args:
        architecture: of the network.
        size: the side asked for, of the input. None takes tiles that predict the smallest image whole, or half the
            median one if that is larger, but inputs of no more than 572 pixels, the source's, under "valid"
            convolutions and 512 under "same" ones.
        sides: the shorter side of each image.

    Raises:
        UserError: ``size`` does not fit the network; the message names the nearest that do.
    """
    smallest = max(min(sides), int(np.median(sides)) // 2)
    if size is None and architecture.padding == "same":
        unit = 2**architecture.depth
        size = min(smallest, _LARGEST_SAME)
        size = size // unit * unit or size
    elif size is None:
        least = architecture.nearest_inputs(0)[-1]
        border = least - architecture.output_size(least, least)[0]
        size = architecture.nearest_inputs(min(smallest + border, _LARGEST_VALID) - 1)[-1]
    try:
        return size, architecture.output_size(size, size)[0]
    except ValueError as error:
        raise UserError(str(error)) from error


def target_spacing(
    cases: Sequence[Case], wanted: float | str | None, axis: int, say: Callable[[str], object]
) -> tuple[float, float] | None:
    """The millimetres per pixel (rows, columns) that ``--spacing`` asks for; without it, advice if it would matter.

    Args:
        cases: those of the training.
        wanted: millimetres, "median", or None.
        axis: the slicing axis.
        say: called with a line for the user.

    Raises:
        UserError: a spacing of images.
    """
    if cases[0].is_image:
        if wanted is not None:
            raise UserError("--spacing is for volumes: images do not say how large their pixels are")
        return None
    found = []
    for case in cases:
        with contextlib.suppress(UserError):  # said by check_quickly, with every other problem
            geometry = read_geometry(case.files[0])
            found.append(slice_spacing(geometry.affine, axis, geometry.path))
    if not found:
        return None
    least, middle, most = (f(found, axis=0) for f in (np.min, np.median, np.max))
    if wanted is None:
        if (most > _SPACING_THAT_MATTERS * least).any():
            say(
                f"pixels of slices are from {least[0]:.3g} × {least[1]:.3g} to {most[0]:.3g} × {most[1]:.3g} mm: "
                "--spacing median would resample all to one size"
            )
        return None
    height, width = middle.tolist() if wanted == "median" else (float(wanted),) * 2
    say(f"slices are resampled to pixels of {height:.4g} × {width:.4g} mm")
    return height, width


def trained_labels(regions: str | None, labels: LabelMap, source: object) -> LabelMap:
    """``labels`` with an order of the regions that are trained, or without any for exclusive classes.

    Args:
        regions: "brats", "none", or None for those that the table orders itself.
        source: of the labels, for messages.

    Raises:
        UserError: no regions of BraTS, or more than the loss takes.
    """
    if regions == "none":
        return dataclasses.replace(labels, region_order=())
    if regions == "brats":
        labels = brats_regions(labels, source)
    if len(labels.region_order) > MOST_REGIONS:
        count = len(labels.region_order)
        raise UserError(f"{source} has {count} regions, more than {MOST_REGIONS}; --regions none trains its classes")
    return labels


def training_modalities(cases: Sequence[Case]) -> tuple[str, ...]:
    """FLAIR and T1ce where most cases have them, else all modalities that most have, or those of the first case.

    A case without them is then reported; one that lacks a file must not change what all the others are trained on.
    """
    counts = Counter(name for case in cases for name in case.modalities)
    usual = tuple(name for name, count in counts.items() if 2 * count > len(cases))
    return DEFAULT_MODALITIES if set(DEFAULT_MODALITIES) <= set(usual) else usual or tuple(cases[0].modalities)
