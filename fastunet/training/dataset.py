"""The data of a run: labelled cases found, split by patient, cached as slices, and augmented on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastunet.data import DEFAULT_MODALITIES, Case, LabelMap, SliceDataset, augment, discover_cases, split_cases
from fastunet.data.checks import check_quickly
from fastunet.errors import UserError
from fastunet.outputs import check_outputs
from fastunet.training.config import TrainConfig
from fastunet.training.display import Display
from fastunet.training.distributed import Processes


@dataclass(frozen=True)
class TrainingData:
    """Slices for training and validation, and the label table that they share."""

    train: SliceDataset
    val: SliceDataset
    labels: LabelMap
    modalities: tuple[str, ...]
    config: TrainConfig

    @property
    def fingerprint(self) -> str:
        """A digest of both sides: equal if and only if the slices are."""
        return hashlib.blake2b(f"{self.train.fingerprint} {self.val.fingerprint}".encode(), digest_size=16).hexdigest()

    def augment(
        self, images: torch.Tensor, labels: torch.Tensor, epoch: int, positions: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch changed at random, if the run asks for it; a function of seed, epoch and positions alone."""
        if not self.config.augment:
            return images, labels
        return augment(images, labels, seed=self.config.seed, epoch=epoch, positions=positions)


def prepare_data(
    config: TrainConfig, outputs: Sequence[Path], cache: Path, processes: Processes, display: Display
) -> TrainingData:
    """Finds, splits and preprocesses the cases of ``config.data``; the leader fills the cache, the others read it.

    Raises:
        UserError: no labelled cases, too few for the split, files that cannot be used, or one of the run's ``outputs``
            among them.
    """
    cases = _labelled_cases(config, display)
    check_outputs(outputs, [Path(config.data, "dataset.json"), *(path for case in cases for path in case.files)])
    modalities = config.modalities or training_modalities(cases)
    problems = check_quickly(cases, modalities, size=config.size, axis=config.axis)
    if len(problems) > 1:
        raise UserError(f"{problems[0]}; fastunet check {config.data} lists {len(problems) - 1} more")
    if problems:
        raise UserError(problems[0])
    if not config.val_fraction:
        raise UserError("--val-fraction is 0, but validation needs at least one patient")
    split = split_cases(cases, validation=config.val_fraction, seed=config.seed)
    options = dict(cache_dir=cache, modalities=modalities, size=config.size, axis=config.axis, on_nan=config.on_nan)

    def build() -> tuple[SliceDataset, SliceDataset]:
        train = SliceDataset(split.train, **options, foreground_fraction=config.foreground_fraction, skip_empty=True,
                             seed=config.seed)  # fmt: skip
        return train, SliceDataset(split.validation, **options)

    train = val = None
    for leaders_turn in (True, False):
        with processes.together():
            if processes.leader == leaders_turn:
                train, val = build()
    if val.size != train.size:
        raise UserError(f"training slices are {train.size}, validation slices {val.size}: give one --size for all")
    if config.batch_size > len(train):
        raise UserError(f"--batch-size is {config.batch_size}, but there are only {len(train)} training slices")
    display.message(
        f"training cases: {len(split.train)} ({len(train)} slices), validation cases: {len(split.validation)} "
        f"({len(val)} slices) of {train.size[0]}×{train.size[1]}, {', '.join(modalities)}"
    )
    display.message(f"classes by label value: {cases[0].label_map}")
    if cases[0].label_map.region_order:
        display.message("regions of dataset.json are trained as these exclusive classes, not as overlapping outputs")
    return TrainingData(train, val, cases[0].label_map, tuple(modalities), config)


def centre_crop(labels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The central part of labels (N, H, W) that a network with valid padding predicts."""
    top, left = (labels.shape[1] - height) // 2, (labels.shape[2] - width) // 2
    return labels[:, top : top + height, left : left + width]


def _labelled_cases(config: TrainConfig, display: Display) -> list[Case]:
    found = discover_cases(config.data, modalities=config.modalities, edition=config.edition)
    cases = [case for case in found if case.label is not None]
    if not cases:
        raise UserError(f"{config.data} holds no labelled cases")
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
