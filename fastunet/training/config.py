"""What a training run was asked to do: every option, validated, stored as JSON beside its results."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from fastunet.errors import UserError
from fastunet.files import write_text
from fastunet.schema import read_json

FILE_NAME = "config.json"
LOSSES = ("ce", "dice", "dice_ce")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
SCHEDULES = ("constant", "cosine")
MOST_SEED = 2**63 - 1
FREE_ON_RESUME = frozenset({"data", "device", "threads", "checkpoint_every"})
"""Options that may differ when a run is resumed: they do not change which numbers are computed.

``threads`` can, in the last bits, because sums are split differently; keep it for a bit-identical continuation.
"""


Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


@dataclass(frozen=True)
class TrainConfig:
    """Options of ``fastunet train``. Network options left at None take the preset's value.

    ``size`` is the side of the square slices (None: as large as they are). ``checkpoint_every`` is in seconds.
    """

    data: str
    preset: Literal["brats", "isbi"] = "brats"
    width: Positive | None = None
    depth: Positive | None = None
    dropout: Fraction | None = None
    modalities: list[str] | None = None
    edition: str | None = None
    size: Positive | None = None
    axis: Literal[0, 1, 2] = 2
    epochs: Positive = 20
    batch_size: Positive = 8
    loss: Literal[LOSSES] = "dice_ce"
    learning_rate: Annotated[float, msgspec.Meta(gt=0)] = 1e-3
    schedule: Literal[SCHEDULES] = "constant"
    precision: Literal[PRECISIONS] = "fp32"
    foreground_fraction: Fraction = 0.5
    augment: bool = True
    val_fraction: Fraction = 0.2
    on_nan: Literal["error", "zero"] = "error"
    seed: Annotated[int, msgspec.Meta(ge=0, le=MOST_SEED)] = 0
    deterministic: bool = False
    device: str = "auto"
    threads: Positive | None = None
    checkpoint_every: Annotated[float, msgspec.Meta(ge=0)] = 300.0

    def write(self, run: Path) -> None:
        """Writes ``config.json`` into the run folder."""
        write_text(run / FILE_NAME, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, run: Path) -> TrainConfig:
        """The options stored in a run folder.

        Raises:
            UserError: the file is missing, is not JSON, or has options that this version does not know or take.
        """
        return read_json(Path(run) / FILE_NAME, cls)

    def resumed_with(self, given: dict) -> TrainConfig:
        """This configuration with the options ``given`` for the continuation.

        Raises:
            UserError: one of them would change the results (only a run with a constant rate can take more epochs).
        """
        free = FREE_ON_RESUME | ({"epochs"} if self.schedule == "constant" else set())
        for name, value in given.items():
            if name not in free and value != getattr(self, name):
                option, stored = "--" + name.replace("_", "-"), getattr(self, name)
                raise UserError(f"the run was started with {option} {stored}; it cannot resume with {value}")
        return dataclasses.replace(self, **{name: value for name, value in given.items() if name in free})

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """The learning rate of optimiser step ``step`` (from 0): constant, or half a cosine down to 1 % of it."""
        if self.schedule == "constant":
            return self.learning_rate
        import math

        share = 0.5 * (1 + math.cos(math.pi * step / max(total_steps, 1)))
        return self.learning_rate * (0.01 + 0.99 * share)
