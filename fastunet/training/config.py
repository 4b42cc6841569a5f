"""What a training run was asked to do: every option, validated, stored as JSON beside its results."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from fastunet.errors import UserError
from fastunet.files import read_text, write_text

FILE_NAME = "config.json"
LOSSES = ("ce", "dice", "dice_ce")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
SCHEDULES = ("constant", "cosine")
FREE_ON_RESUME = frozenset({"data", "device", "threads", "checkpoint_every"})
"""Options that may differ when a run is resumed: they do not change which numbers are computed.

``threads`` can, in the last bits, because sums are split differently; keep it for a bit-identical continuation.
"""


@dataclass(frozen=True)
class TrainConfig:
    """Options of ``fastunet train``. Network options left at None take the preset's value.

    ``size`` is the side of the square slices (None: as large as they are). ``checkpoint_every`` is in seconds.
    """

    data: str
    preset: str = "brats"
    width: int | None = None
    depth: int | None = None
    dropout: float | None = None
    modalities: list[str] | None = None
    edition: str | None = None
    size: int | None = None
    axis: int = 2
    epochs: int = 20
    batch_size: int = 8
    loss: str = "dice_ce"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    precision: str = "fp32"
    foreground_fraction: float = 0.5
    augment: bool = True
    val_fraction: float = 0.2
    on_nan: str = "error"
    seed: int = 0
    deterministic: bool = False
    device: str = "auto"
    threads: int | None = None
    checkpoint_every: float = 300.0

    def write(self, run: Path) -> None:
        """Writes ``config.json`` into the run folder."""
        write_text(run / FILE_NAME, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, run: Path) -> TrainConfig:
        """The options stored in a run folder.

        Raises:
            UserError: the file is missing, is not JSON, or has options that this version does not know.
        """
        path = Path(run) / FILE_NAME
        try:
            return cls(**json.loads(read_text(path)))
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{path} is not a training configuration of this version: {error}") from error

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
