"""The shape arithmetic of a U-Net: its constructor arguments, presets, and which image sizes fit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastunet.arguments import checked

PRESETS: dict[str, dict[str, Any]] = {
    "brats": {},
    "isbi": dict(in_channels=1, num_classes=2, width=64, depth=4, padding="valid", up="transpose", dropout=0.5),
    "milesial": dict(in_channels=3, num_classes=2, width=64, depth=4, up="transpose", dropout=0.0, norm="batch",
                     bias=False, odd="zeros"),
    "monai_basic": dict(in_channels=1, num_classes=2, width=32, depth=4, up="transpose", dropout=0.0, norm="instance",
                        activation="leaky_relu", slope=0.1, features=(32, 32, 64, 128, 256), odd="replicate"),
    "nnunet2d": dict(in_channels=1, num_classes=2, width=32, depth=5, up="transpose", dropout=0.0, norm="instance",
                     activation="leaky_relu", down="stride", features=(32, 64, 128, 256, 512, 512)),
}  # fmt: skip
"""Constructor arguments of the reference networks, as differences from the defaults.

"brats" is a Keras U-Net for BraTS (FLAIR and T1ce in, four classes out); "isbi" is Ronneberger et al. 2015
(arXiv:1505.04597), with the dropout that its published model applies at the end of the contracting path. "milesial" is
the PyTorch U-Net of that name with transposed convolutions, "monai_basic" MONAI's ``BasicUNet``, "nnunet2d" the
``PlainConvUNet`` that nnU-Net plans for patches of 192×160, without deep supervision; it concatenates [upsampled,
skip], this package [skip, upsampled], so that the two halves of those convolutions' weights are swapped.
"""
_ALWAYS = "in_channels", "num_classes", "width", "depth", "padding", "up", "dropout"
_DEEPEST = 15
"""Levels below the first: more would halve an image of 32,768 pixels to one, and double channels to as many."""
NORMS, ACTIVATIONS = ("batch", "instance", "group"), ("relu", "leaky_relu")


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
        up: "upsample" (nearest ×2, 2×2 convolution, activation) or "transpose" (2×2 transposed convolution, stride 2).
        dropout: probability of dropping an element after the bottleneck, in training.
        norm: None, "batch", "instance" or "group", with weight and bias, between a 3×3 convolution and its activation.
        activation: "relu" or "leaky_relu".
        slope: of "leaky_relu" for negative values.
        groups: of "group"; it divides every level's channels.
        bias: whether the 3×3 convolutions have one.
        down: "pool" (2×2 max-pool) or "stride" (the first convolution of the next level has stride 2).
        features: channels of each level, the bottleneck's last, in place of ``width * 2**i``.
        odd: what is done about sides that ``2**depth`` does not divide, with "same". "image": zeros at the bottom and
            right of the image, cropped from the logits; "zeros", "replicate": maps that upsampling made too small for
            the skip get zeros on both sides, or their last row and column again.

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
    norm: str | None = None
    activation: str = "relu"
    slope: float = 0.01
    groups: int = 8
    bias: bool = True
    down: str = "pool"
    features: Sequence[int] | None = None
    odd: str = "image"

    def __post_init__(self) -> None:
        for name, least in (("in_channels", 1), ("num_classes", 1), ("width", 1), ("depth", 0), ("groups", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")
        if self.depth > _DEEPEST:
            raise ValueError(f"depth is {self.depth}; expected at most {_DEEPEST}")
        for name, choices in (("padding", ("same", "valid")), ("up", ("upsample", "transpose")),
                              ("norm", (None, *NORMS)), ("activation", ACTIVATIONS), ("bias", (True, False)),
                              ("down", ("pool", "stride")), ("odd", ("image", "zeros", "replicate"))):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, choices))}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}; expected a probability in [0, 1)")
        if not 0 < self.slope < 1:
            raise ValueError(f"slope is {self.slope!r}; expected a number between 0 and 1")
        if self.features is not None:
            object.__setattr__(self, "features", tuple(self.features))
            if len(self.widths) != self.depth + 1 or not all(isinstance(c, int) and c > 0 for c in self.widths):
                raise ValueError(f"features is {self.widths}; expected {self.depth + 1} numbers of channels, depth + 1")
            if self.widths[0] != self.width:
                raise ValueError(f"features begins with {self.widths[0]}; expected width, which is {self.width}")
        for name, value in (("in_channels", self.in_channels), ("num_classes", self.num_classes),
                            ("the widest level", max(self.widths))):  # fmt: skip
            if value > 2**_DEEPEST:
                raise ValueError(f"{name} is {value}; expected at most {2**_DEEPEST} channels")
        if self.norm == "group" and any(channels % self.groups for channels in self.widths):
            raise ValueError(f"groups is {self.groups}; expected a divisor of the levels' channels {self.widths}")
        if self.odd != "image" and (self.padding != "same" or self.down != "pool"):
            raise ValueError(f"odd is {self.odd!r}; expected 'image' with padding 'valid' or down 'stride'")
        if self.down == "stride" and self.padding != "same":
            raise ValueError("down is 'stride'; expected 'pool' with padding 'valid'")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Architecture:
        """The architecture of a preset, with arguments replaced by ``overrides``.

        Another width or depth replaces the preset's ``features``: channels then double from level to level.
        """
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}; expected one of {', '.join(PRESETS)}")
        arguments = PRESETS[name] | overrides
        if any(overrides.get(key, PRESETS[name].get(key)) != PRESETS[name].get(key) for key in ("width", "depth")):
            arguments["features"] = overrides.get("features")
        return cls(**arguments)

    def as_dict(self) -> dict[str, Any]:
        """The constructor arguments, ready for JSON; from ``norm`` on those alone that are not the defaults."""
        arguments = asdict(self)
        defaults = {each.name: each.default for each in fields(self) if each.name not in _ALWAYS}
        return {name: value for name, value in arguments.items() if name in _ALWAYS or value != defaults[name]}

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each encoder level and, last, of the bottleneck."""
        if self.features is not None:
            return tuple(self.features)
        return tuple(self.width * 2**level for level in range(self.depth + 1))

    @property
    def negative_slope(self) -> float:
        """Of the activation: 0 for ReLU."""
        return 0.0 if self.activation == "relu" else self.slope

    @property
    def is_classic(self) -> bool:
        """Whether there are convolutions, ReLU and poolings only, so that blocks can share masks with neighbours."""
        return (self.norm, self.activation, self.bias, self.down, self.odd) == (None, "relu", True, "pool", "image")

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the logits for an input of ``height`` × ``width`` pixels.

        Raises:
            ValueError: the size does not fit; under "valid" the message names the nearest sizes that do.
        """
        if self.padding == "same":
            if height < 1 or width < 1:
                raise ValueError(f"the input is {height}×{width} pixels; both sides must be at least 1")
            if self.odd != "image" and min(height, width) < 2**self.depth:
                least = f"both sides must be at least {2**self.depth} for {self.depth} poolings"
                raise ValueError(f"the input is {height}×{width} pixels; {least}")
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
        """The size that "same" computes on inside: both sides rounded up to a multiple of ``2**depth`` by "image"."""
        unit = 2**self.depth if self.odd == "image" else 1
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
