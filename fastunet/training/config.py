"""What a training run was asked to do: every option, validated, stored as JSON beside its results."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from fastunet.architecture import ACTIVATIONS, NORMS, PRESETS
from fastunet.errors import DataWarning, UserError
from fastunet.files import write_text
from fastunet.schema import read_json, to_type

FILE_NAME = "config.json"
LOSSES = ("ce", "dice", "dice_ce")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
SCHEDULES = ("constant", "cosine", "poly")
MOST_SEED = 2**63 - 1
FREE_ON_RESUME = frozenset({"data", "device", "threads", "checkpoint_every", "patience"})
"""Options that may differ when a run is resumed: they do not change which numbers are computed, only where they end.

``threads`` can, in the last bits, because sums are split differently; keep it for a bit-identical continuation.
"""


Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
AtLeastZero = Annotated[float, msgspec.Meta(ge=0, le=3.4e38)]  # what float32 holds
AboveZero = Annotated[float, msgspec.Meta(gt=0, le=3.4e38)]


if TYPE_CHECKING:  # checkers know choices that are written out only
    Preset = str
    Norm = str
    Activation = str
    Loss = str
    Schedule = str
    Precision = str
else:
    Preset, Norm = Literal[tuple(PRESETS)], Literal[("none", *NORMS)]
    Activation, Loss, Schedule, Precision = (Literal[each] for each in (ACTIVATIONS, LOSSES, SCHEDULES, PRECISIONS))


@dataclass(frozen=True)
class TrainConfig:
    """Options of ``fastunet train``. Network options left at None take the preset's value.

    ``regions``: "brats" and "none" as the option says; None trains the regions that a ``dataset.json`` orders.
    ``ignore_label`` is a value of the label files that counts nowhere.
    ``size`` is the side of the square slices (None: as large as they are). ``spacing`` is in millimetres per pixel, or
    "median", to which slices are resampled. ``turns`` lets augmentation mirror both axes and turn by 90 degrees (None:
    of 2-D images, not of volumes), ``elastic`` lets it deform (None: the same). ``border_weights`` weighs gaps between
    objects in the cross-entropy. ``tversky`` has the factors of false positives and negatives in place of the Dice
    ratio's one half. ``class_weights`` has a factor per class, or "balanced", for the inverse of each class's share of
    the training pixels. ``warm_up`` is in epochs, fractions too. ``weight_decay`` is AdamW's. ``clip_norm`` bounds the
    norm of the whole gradient. ``ema`` is the decay of averaged weights. ``patience`` is in epochs without a better
    validation Dice. ``checkpoint_every`` is in seconds.

    Raises:
        UserError: options that contradict each other.
    """

    data: str
    preset: Preset = "brats"
    width: Positive | None = None
    depth: Positive | None = None
    dropout: Fraction | None = None
    norm: Norm | None = None
    activation: Activation | None = None
    modalities: list[str] | None = None
    edition: str | None = None
    ignore_label: Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)] | None = None
    regions: Literal["brats", "none"] | None = None
    size: Positive | None = None
    axis: Literal[0, 1, 2] = 2
    spacing: AboveZero | Literal["median"] | None = None
    epochs: Positive = 20
    batch_size: Positive = 8
    loss: Loss = "dice_ce"
    tversky: tuple[AtLeastZero, AtLeastZero] | None = None
    class_weights: list[AtLeastZero] | Literal["balanced"] | None = None
    learning_rate: AboveZero = 1e-3
    schedule: Schedule = "constant"
    warm_up: AtLeastZero = 0.0
    weight_decay: AtLeastZero = 0.0
    clip_norm: AboveZero | None = None
    ema: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None = None
    patience: Positive | None = None
    precision: Precision = "fp32"
    foreground_fraction: Fraction = 0.5
    augment: bool = True
    turns: bool | None = None
    elastic: bool | None = None
    border_weights: bool = False
    val_fraction: Fraction = 0.2
    on_nan: Literal["error", "zero"] = "error"
    seed: Annotated[int, msgspec.Meta(ge=0, le=MOST_SEED)] = 0
    deterministic: bool = False
    device: str = "auto"
    threads: Positive | None = None
    checkpoint_every: AtLeastZero = 300.0

    def __post_init__(self) -> None:
        if self.tversky is not None and (self.loss == "ce" or not any(self.tversky)):
            shown = ",".join(f"{factor:g}" for factor in self.tversky)
            raise UserError(f"--tversky {shown} needs a factor above 0, and --loss dice or dice_ce, not {self.loss}")
        if self.warm_up >= self.epochs:
            raise UserError(f"--warm-up is {self.warm_up:g} epochs of {self.epochs}; it must end before the run does")
        if self.border_weights and self.loss == "dice":
            raise UserError("--border-weights weighs the cross-entropy, which --loss dice lacks")
        if (self.elastic or self.turns) and not self.augment:
            option = "elastic" if self.elastic else "turns"
            raise UserError(f"--{option} is part of the augmentation, which --no-augment turns off")

    def write(self, run: Path) -> None:
        """Writes ``config.json`` into the run folder."""
        write_text(run / FILE_NAME, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, run: Path) -> TrainConfig:
        """The options stored in a run folder.

        Raises:
            UserError: the file is missing, is not JSON, or has options that this version does not know or take.
        """
        file = Path(run) / FILE_NAME
        stored = read_json(file, dict[str, Any])
        stored.setdefault("regions", "none")  # runs older than this option have trained classes
        if "turns" not in stored and stored.get("augment", True):
            warnings.warn(f"{file} is of an older version, which changed slices at random in another way",
                          DataWarning, stacklevel=2)  # fmt: skip
        return to_type(stored, cls, file)

    @classmethod
    def is_in(cls, run: Path) -> bool:
        """Whether ``config.json`` in ``run`` is one of ours, of whatever version."""
        with contextlib.suppress(UserError):
            return {"data", "preset", "epochs"} <= read_json(run / FILE_NAME, dict[str, Any]).keys()
        return False

    def resumed_with(self, given: dict[str, Any]) -> TrainConfig:
        """This configuration with the options ``given`` for the continuation.

        Raises:
            UserError: one of them would change the results (only a run with a constant rate can take more epochs).
        """
        fixed = self.fixed()
        for name, value in given.items():
            if name in fixed and value != (stored := getattr(self, name)):
                before, now = _as_option(name, stored), _as_option(name, value)
                raise UserError(f"the run was started {before}; it cannot resume {now}")
        return dataclasses.replace(self, **{name: value for name, value in given.items() if name not in fixed})

    def fixed(self) -> dict[str, Any]:
        """The options that decide which numbers are computed, as JSON types: all but those free on ``--resume``."""
        free = FREE_ON_RESUME | ({"epochs"} if self.schedule == "constant" else set())
        return {name: value for name, value in msgspec.to_builtins(self).items() if name not in free}

    def check_continues(self, saved: Mapping[str, Any], state: Path) -> None:
        """Compares with what was ``fixed`` when ``state`` was saved, whatever became of ``config.json`` since.

        Raises:
            UserError: an option differs. Modalities that are left to the data are compared as slices.
        """
        for name, value in self.fixed().items():
            if value != saved.get(name, value) and not (name == "modalities" and value is None):
                now, then = (json.dumps(each, ensure_ascii=False) for each in (value, saved[name]))
                here = FILE_NAME if (state.parent / FILE_NAME).exists() else f"{FILE_NAME} is gone"
                raise UserError(f'{state} was saved with "{name}": {then}; it cannot go on with {now} ({here})')

    def check_class_weights(self, outputs: int) -> None:
        """Raises ``UserError`` unless numbers of ``--class-weights`` are one for each of ``outputs``, not all 0."""
        weights = self.class_weights
        if isinstance(weights, list) and (len(weights) != outputs or not any(weights)):
            given = f"--class-weights has {len(weights)} numbers ({weights})"
            raise UserError(f"{given}; {outputs} outputs need one each, not all 0")

    def learning_rate_at(self, step: int, steps: int) -> float:
        """The learning rate of optimiser step ``step`` (from 0) of a run with ``steps`` in an epoch.

        It rises linearly through the w steps of the warm-up, ``rate · (step + 1) / w``, and then, with x from 0 to 1
        over the rest of the run, stays ("constant"), falls to 1 % along half a cosine, or is ``rate · (1 - x)^0.9``
        ("poly", Chen et al. 2017, DeepLab).
        """
        warm_up = round(self.warm_up * steps)
        if step < warm_up:
            return self.learning_rate * (step + 1) / warm_up
        done = (step - warm_up) / max(self.epochs * steps - warm_up, 1)
        if self.schedule == "poly":
            return self.learning_rate * float((1 - done) ** 0.9)
        if self.schedule == "cosine":
            return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        return self.learning_rate


def _as_option(name: str, value: object) -> str:
    """An option of the command line for the end of a sentence."""
    option = "--" + name.replace("_", "-")
    if value is None or isinstance(value, bool):
        return f"{'with' if value else 'without'} {option}"
    return f"with {option} {','.join(map(str, value)) if isinstance(value, list | tuple) else value}"
