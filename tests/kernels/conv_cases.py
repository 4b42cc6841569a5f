"""What the tests of the 3×3 convolution, its gradients and its norm share: a shape with a tile of its own."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ConvCase:
    """(c_skip, c_x) channels to c_out, x of h × w pixels; a ``config`` of None leaves the choice to the launcher."""

    config: Any
    n: int
    c_skip: int
    c_x: int
    c_out: int
    h: int
    w: int
    pad: int = 1

    @property
    def tile(self) -> str:
        """The configuration's name."""
        splits = "-split" if self.config.splits > 1 else ""
        stack = "-stacked" if self.config.stack > 1 else ""
        return f"{self.config.variant}{splits}{stack}"

    def __str__(self) -> str:
        name = self.tile if self.config else "chosen"
        return f"{name}-{self.n}x{self.c_skip}+{self.c_x}-{self.c_out}x{self.h}x{self.w}-pad{self.pad}"
