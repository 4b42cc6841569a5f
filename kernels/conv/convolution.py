"""What one 3×3 convolution is: its operands, a head that may follow, and the variant and tile that it runs with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _launch, _weights


@dataclass(frozen=True)
class Convolution:
    """``y = relu(conv(concat([skip, x], 1), weight) + bias) * (mask > 0)`` with outputs of ``out_size``.

    ``x`` and ``skip`` (N, C, H, W) are NHWC pixels of unit channel stride and pixel stride C, ``skip`` possibly a crop
    of a larger image; ``weight`` (C_out, 3, 3, C_skip + C_x) has any strides, and its taps are meant in reverse if
    ``flipped``. ``offset`` (off_h, off_w): output (i, j) reads rows i - off_h .. i - off_h + 2 of each source and such
    columns, zero outside of it. Where ``c_first`` is not 0, the output is two images: the first of so many channels,
    and one of the others, times (second_mask > 0).
    """

    x: torch.Tensor
    skip: torch.Tensor | None
    weight: torch.Tensor
    offset: tuple[int, int]
    out_size: tuple[int, int]
    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    slope: float = 1.0
    flipped: bool = False
    c_first: int = 0
    second_mask: torch.Tensor | None = None

    @property
    def images(self) -> tuple[torch.Tensor, ...]:
        return (self.x,) if self.skip is None else (self.skip, self.x)

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(image.shape[1] for image in self.images)

    @property
    def masks(self) -> tuple[torch.Tensor, ...]:
        return tuple(mask for mask in (self.mask, self.second_mask) if mask is not None)

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def c_out(self) -> int:
        return self.weight.shape[0]

    def split(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The columns of ``packed`` (..., C_skip + C_x) that belong to x and to the skip."""
        c_skip = packed.shape[-1] - self.x.shape[1]
        return packed[..., c_skip:], packed[..., :c_skip] if c_skip else None

    def taps(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights (C_out, 9, C) of x and of the skip; views of one tensor, copied only if not in this order already."""
        # views into a flat parameter may be off the alignment of vector accesses
        aligned = self.weight.is_meta or self.weight.data_ptr() % 16 == 0
        if self.weight.is_contiguous() and aligned and not self.flipped:
            return self.split(self.weight.view(self.c_out, 9, -1))
        return self.split(_weights.conv_taps(self.weight, self.flipped))


@dataclass(frozen=True)
class Head:
    """A 1×1 convolution after the 3×3 one: ``weight`` (classes, C_out), ``bias`` (classes,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    output: str

    @property
    def classes(self) -> int:
        return self.weight.shape[0]

    @property
    def block(self) -> int:
        """Classes padded to a side of a matrix product."""
        return max(16, _launch.next_power_of_2(self.classes))


@dataclass(frozen=True)
class ConvConfig:
    """A variant and its tile: ``block_k`` output channels × (block_n · block_h · block_w) pixels, ``block_c`` a step.

    Variants: "pointer" and "first" flatten their pixels and use ``block_w`` alone; "box" and "rows" are the bulk-copy
    kernels of the files of those names. ``splits`` > 1 shares out the sums of a box (``box_split``).
    """

    variant: str
    block_k: int
    block_w: int
    block_h: int = 1
    block_n: int = 1
    block_c: int = 64
    num_warps: int = 4
    num_stages: int = 3
    splits: int = 1

    @property
    def pixels(self) -> int:
        return self.block_n * self.block_h * self.block_w

    @property
    def stack(self) -> int:
        """Neighbouring columns whose channels share the 64 rows of a product."""
        return max(1, 64 // self.block_k) if self.variant == "rows" else 1

    @property
    def writes_two(self) -> bool:
        """Whether its kernel can write two images."""
        return self.variant in ("rows", "box") and self.splits == 1 and self.stack == 1
