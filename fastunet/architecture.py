"""The shape arithmetic of a U-Net: its constructor arguments, presets, and which image sizes fit."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

from fastunet.arguments import checked

PRESETS: dict[str, dict[str, Any]] = {
    "brats": {},
    "isbi": dict(in_channels=1, num_classes=2, width=64, depth=4, padding="valid", up="transpose", dropout=0.5),
}
"""Constructor arguments of the reference networks, as differences from the defaults.

"brats" is a Keras U-Net for BraTS (FLAIR and T1ce in, four classes out); "isbi" is Ronneberger et al. 2015
(arXiv:1505.04597), with the dropout that its published model applies at the end of the contracting path.
"""


@checked
@dataclass(frozen=True)
class Architecture:
    """Constructor arguments of a U-Net, validated.

    Args:
        in_channels: image channels.
        num_classes: classes, background included.
        width: channels of the first level; level ``i`` has ``width * 2**i``.
        depth: number of 2×2 poolings.
        padding: "same" (outputs as large as inputs) or "valid" (3×3 convolutions without padding).
        up: "upsample" (nearest ×2, 2×2 convolution, ReLU) or "transpose" (2×2 transposed convolution, stride 2).
        dropout: probability of dropping an element after the bottleneck, in training.

    Raises:
        ValueError: an argument outside its range; the message names it and its value.
    """

    in_channels: int = 2
    num_classes: int = 4
    width: int = 32
    depth: int = 4
    padding: str = "same"
    up: str = "upsample"
    dropout: float = 0.2

    def __post_init__(self) -> None:
        for name, least in (("in_channels", 1), ("num_classes", 1), ("width", 1), ("depth", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")
        for name, choices in (("padding", ("same", "valid")), ("up", ("upsample", "transpose"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}; expected a probability in [0, 1)")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Architecture:
        """The architecture of a preset, with arguments replaced by ``overrides``."""
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}; expected one of {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | overrides))

    def as_dict(self) -> dict[str, Any]:
        """The constructor arguments, ready for JSON."""
        return asdict(self)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each encoder level and, last, of the bottleneck."""
        return tuple(self.width * 2**level for level in range(self.depth + 1))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the logits for an input of ``height`` × ``width`` pixels.

        Raises:
            ValueError: the size does not fit; under "valid" the message names the nearest sizes that do.
        """
        if self.padding == "same":
            if height < 1 or width < 1:
                raise ValueError(f"the input is {height}×{width} pixels; both sides must be at least 1")
            return height, width
        h, w = sizes = [self._valid_output(side) for side in (height, width)]
        if h is None or w is None:
            fits = [self.nearest_inputs(side) for side in (height, width)]
            words = " and ".join(
                f"{axis} {side}: {' or '.join(map(str, fit))}"
                for axis, side, fit, out in zip(("height", "width"), (height, width), fits, sizes)
                if out is None
            )
            raise ValueError(
                f"an input of {height}×{width} does not fit {self.depth} poolings with valid convolutions; "
                f"nearest sizes that fit, for {words}"
            )
        return h, w

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size that "same" computes on inside: both sides rounded up to a multiple of ``2**depth``."""
        unit = 2**self.depth
        return -(-height // unit) * unit, -(-width // unit) * unit

    def _valid_output(self, side: int) -> int | None:
        """Output side of the valid network, or None where a side turns odd before a pooling or vanishes."""
        for _ in range(self.depth):
            side -= 4
            if side < 2 or side % 2:
                return None
            side //= 2
        side -= 4
        if side < 1:
            return None
        for _ in range(self.depth):
            side = 2 * side - 4
            if side < 1:
                return None
        return side

    def nearest_inputs(self, side: int) -> list[int]:
        """The largest fitting side below ``side`` (if any) and the smallest above."""
        below = next((s for s in range(side - 1, 0, -1) if self._valid_output(s)), None)
        above = next(s for s in itertools.count(max(side, 0) + 1) if self._valid_output(s))
        return [above] if below is None else [below, above]
