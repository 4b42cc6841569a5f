"""The data of a run: labelled cases found, split by patient, cached as slices, and augmented on the device."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from fastunet.architecture import Architecture
from fastunet.data import (
    DEFAULT_MODALITIES,
    IGNORED,
    Augmentation,
    Case,
    LabelMap,
    SliceDataset,
    TileDataset,
    augment,
    discover_cases,
    read_geometry,
    split_cases,
)
from fastunet.data.checks import check_quickly
from fastunet.data.image_folders import no_labels
from fastunet.data.label_tables import brats_regions
from fastunet.data.slices import slice_spacing
from fastunet.errors import UserError
from fastunet.functional.dice_regions import MOST_REGIONS
from fastunet.outputs import check_outputs
from fastunet.training.config import TrainConfig
from fastunet.training.display import Display
from fastunet.training.distributed import Processes

_SPACING_THAT_MATTERS = 1.1
_PLAIN_SLICES = 1000
_LARGEST_VALID, _LARGEST_SAME = 572, 512
"""Sides of the tiles that images are trained in where nothing else is asked for."""


@dataclass(frozen=True)
class TrainingData:
    """Slices or tiles for training and validation, and the label table that they share.

    ``tile`` is the side of the tiles in which images are trained, None for volumes. ``spacing`` is what slices were
    resampled to, (rows, columns) in millimetres, None if they are as they were.
    """

    train: SliceDataset
    val: SliceDataset
    labels: LabelMap
    modalities: tuple[str, ...]
    config: TrainConfig
    tile: int | None = None
    spacing: tuple[float, float] | None = None

    @property
    def augmentation(self) -> Augmentation | None:
        """What may happen to a sample, None if nothing does."""
        if not self.config.augment:
            return None
        images = self.train.cases[0].is_image
        config = self.config
        return Augmentation.for_slices(axis=config.axis, images=images, turns=config.turns, elastic=config.elastic)

    def share_changed(self, epoch: int) -> float:
        """Of the slices that augmentation changes in ``epoch``: none while a run has seen less than 1,000 slices of
        volumes, all from 2,000 on.

        A network gets over its first steps faster with slices as they are, and a short run cannot learn them by heart.
        """
        seen = epoch * len(self.train)
        return 1.0 if self.tile is not None else min(max(seen / _PLAIN_SLICES - 1, 0.0), 1.0)

    def mirrored(self, epochs: int) -> tuple[Literal[-2, -1], ...]:
        """The image axes along which the first ``epochs`` epochs have mirrored slices."""
        options = self.augmentation
        if options is None or not epochs or not self.share_changed(epochs - 1):
            return ()
        return cast("tuple[Literal[-2, -1], ...]", options.flip)

    @property
    def ignored(self) -> int | None:
        """The class index of pixels that count nowhere, if there can be any."""
        return IGNORED if self.labels.ignore is not None or self.tile is not None else None

    @property
    def fingerprint(self) -> str:
        """A digest of both sides: equal if and only if the slices are."""
        return hashlib.blake2b(f"{self.train.fingerprint} {self.val.fingerprint}".encode(), digest_size=16).hexdigest()

    def augment(
        self, images: torch.Tensor, labels: torch.Tensor, *border: torch.Tensor, epoch: int, positions: np.ndarray
    ) -> tuple[torch.Tensor, ...]:
        """A batch changed at random, if the run asks for it; a function of seed, epoch and positions alone."""
        options = self.augmentation
        if options is None:
            return images, labels, *border
        return augment(
            images, labels, seed=self.config.seed, epoch=epoch, positions=positions, options=options,
            weights=border[0] if border else None, share=self.share_changed(epoch),
        )  # fmt: skip


def prepare_data(
    config: TrainConfig, outputs: Sequence[Path], cache: Path, processes: Processes, display: Display
) -> TrainingData:
    """Finds, splits and preprocesses the cases of ``config.data``; the leader fills the cache, the others read it.

    Raises:
        UserError: no labelled cases, too few for the split, files that cannot be used, or one of the run's ``outputs``
            among them.
    """
    with processes.together():
        cases = _labelled_cases(config, display)
        check_outputs(outputs, [Path(config.data, "dataset.json"), *(path for case in cases for path in case.files)])
        labels = trained_labels(config.regions, cases[0].label_map, config.data)
        architecture = architecture_of(config)
        config.check_class_weights(len(labels.outputs))
        if labels.region_order and config.border_weights:
            advice = "--regions none trains classes"
            raise UserError(f"--border-weights is for exclusive classes, and regions overlap; {advice}")
        modalities = config.modalities or training_modalities(cases)
        spacing = target_spacing(cases, config.spacing, config.axis, display.message)
        problems = check_quickly(cases, modalities, size=config.size, axis=config.axis, spacing=spacing)
        if len(problems) > 1:
            raise UserError(f"{problems[0]}; fastunet check {shlex.quote(config.data)} lists {len(problems) - 1} more")
        if problems:
            raise UserError(problems[0])
        if not config.val_fraction:
            raise UserError("--val-fraction is 0, but validation needs at least one patient")
        split = split_cases(cases, validation=config.val_fraction, seed=config.seed)
        options: dict[str, Any] = dict(
            cache_dir=cache, modalities=modalities, axis=config.axis, on_nan=config.on_nan, spacing=spacing
        )
        drawn: dict[str, Any] = dict(foreground_fraction=config.foreground_fraction, skip_empty=True, seed=config.seed)
        tile: int | None = None
        output = 0
        if cases[0].is_image:
            sides = [min(read_geometry(case.files[0]).shape[:2]) for case in cases]
            tile, output = tile_sides(architecture, config.size, sides)
        elif config.border_weights:
            raise UserError(f"--border-weights is for 2-D images; {config.data} holds volumes")

    def build() -> tuple[SliceDataset, SliceDataset]:
        if tile is None:
            train = SliceDataset(split.train, size=config.size, **options, **drawn)
            return train, SliceDataset(split.validation, size=config.size, **options)
        train = TileDataset(split.train, size=tile, output=output, random=True, border=config.border_weights,
                            **options, **drawn)  # fmt: skip
        return train, TileDataset(split.validation, size=tile, output=output, **options)

    for leaders_turn in (True, False):
        with processes.together():
            if processes.leader == leaders_turn:
                train, val = build()
    parts = "slices" if tile is None else "tiles"
    with processes.together():
        if not train.foreground.any():
            raise UserError(f"none of the {len(train)} training slices holds anything but background: nothing to learn")
        if val.size != train.size:
            raise UserError(f"training slices are {train.size}, validation slices {val.size}: give one --size for all")
        if config.batch_size > len(train):
            raise UserError(f"--batch-size is {config.batch_size}, but there are only {len(train)} training {parts}")
    predicted = "" if tile is None or output == tile else f" (of which {output}×{output} are predicted)"
    display.message(
        f"training cases: {len(split.train)} ({len(train)} {parts}), validation cases: {len(split.validation)} "
        f"({len(val)} {parts}) of {train.size[0]}×{train.size[1]}{predicted}, {', '.join(modalities)}"
    )
    display.message(f"classes by label value: {labels}")
    if labels.region_order:
        display.message(f"overlapping regions, an output each, written in this order: {labels.painting}")
    return TrainingData(train, val, labels, tuple(modalities), config, tile, spacing)


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


def _labelled_cases(config: TrainConfig, display: Display) -> list[Case]:
    # check_quickly asks for modalities
    found = discover_cases(config.data, modalities=None, edition=config.edition, ignore=config.ignore_label)
    cases = [case for case in found if case.label is not None]
    if not cases:
        raise UserError(no_labels(config.data))
    if len(cases) < len(found):
        display.message(f"{len(found) - len(cases)} of {len(found)} cases have no labels and are left out")
    return cases


def training_modalities(cases: Sequence[Case]) -> tuple[str, ...]:
    """FLAIR and T1ce where most cases have them, else all modalities of the first case.

    A case without them is then reported; one that lacks a file must not change what all the others are trained on.
    """
    if 2 * sum(set(DEFAULT_MODALITIES) <= set(case.modalities) for case in cases) > len(cases):
        return DEFAULT_MODALITIES
    return tuple(cases[0].modalities)
