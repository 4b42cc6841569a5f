"""The data of a run: labelled cases found, split by patient, cached as slices, and augmented on the device."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from fastunet.data import (
    IGNORED,
    Augmentation,
    Case,
    LabelMap,
    SliceDataset,
    TileDataset,
    augment,
    discover_cases,
)
from fastunet.data.image_folders import no_labels
from fastunet.errors import UserError
from fastunet.outputs import check_outputs
from fastunet.training.config import TrainConfig
from fastunet.training.display import Display
from fastunet.training.distributed import Processes
from fastunet.training.plan import check_batch_size, plan_training

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
        plan, problems = plan_training(config, cases, display.message)
        if len(problems) > 1:
            raise UserError(f"{problems[0]}; fastunet check {shlex.quote(config.data)} lists {len(problems) - 1} more")
        if plan is None:
            raise UserError(problems[0])
        options: dict[str, Any] = dict(
            cache_dir=cache, modalities=plan.modalities, axis=config.axis, on_nan=config.on_nan, spacing=plan.spacing
        )
        drawn: dict[str, Any] = dict(foreground_fraction=config.foreground_fraction, skip_empty=True, seed=config.seed)
        split, labels, tile, output = plan.split, plan.labels, plan.tile, plan.output

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
        check_batch_size(config, len(train), parts)
    predicted = "" if tile is None or output == tile else f" (of which {output}×{output} are predicted)"
    display.message(
        f"training cases: {len(split.train)} ({len(train)} {parts}), validation cases: {len(split.validation)} "
        f"({len(val)} {parts}) of {train.size[0]}×{train.size[1]}{predicted}, {', '.join(plan.modalities)}"
    )
    display.message(f"classes by label value: {labels}")
    if labels.region_order:
        display.message(f"overlapping regions, an output each, written in this order: {labels.painting}")
    return TrainingData(train, val, labels, plan.modalities, config, tile, plan.spacing)


def _labelled_cases(config: TrainConfig, display: Display) -> list[Case]:
    # check_quickly asks for modalities
    found = discover_cases(config.data, modalities=None, edition=config.edition, ignore=config.ignore_label)
    cases = [case for case in found if case.label is not None]
    if not cases:
        raise UserError(no_labels(config.data))
    if len(cases) < len(found):
        display.message(f"{len(found) - len(cases)} of {len(found)} cases have no labels and are left out")
    return cases
