"""What one 3×3 convolution is, and which kernel variant and tile it runs with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Source:
    """One input of a convolution.

    ``image`` (N, C, H, W): NHWC pixels of unit channel stride and pixel stride C, possibly a crop of a larger image;
    ``weight`` (C_out, 9, C): a view whose rows hold every source's channels.
    """

    image: torch.Tensor
    weight: torch.Tensor

    @property
    def channels(self) -> int:
        return self.image.shape[1]


@dataclass(frozen=True)
class Convolution:
    """``y = relu(conv(skip) + conv(x) + bias) * (mask > 0)`` with outputs of ``out_size``.

    ``offset`` (off_h, off_w): output (i, j) reads rows i - off_h .. i - off_h + 2 of every source, and such columns.
    """

    x: Source
    skip: Source | None
    offset: tuple[int, int]
    out_size: tuple[int, int]
    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    relu: bool = False

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.x,) if self.skip is None else (self.skip, self.x)

    @property
    def batch(self) -> int:
        return self.x.image.shape[0]

    @property
    def c_out(self) -> int:
        return self.x.weight.shape[0]

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(source.channels for source in self.sources)

    @property
    def weight_tap(self) -> int:
        """Elements between two taps of a weight row: the channels of all sources."""
        return sum(self.channels)


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
        return max(16, triton.next_power_of_2(self.classes))


@dataclass(frozen=True)
class ConvConfig:
    """A variant and its tile: ``block_k`` output channels × (block_n · block_h · block_w) pixels, ``block_c`` a step.

    Variants: "pointer" and "first" flatten their pixels and use ``block_w`` alone; "box", "rows" and "two_rows" are
    the bulk-copy kernels of the files of those names.
    """

    variant: str
    block_k: int
    block_w: int
    block_h: int = 1
    block_n: int = 1
    block_c: int = 64
    num_warps: int = 4
    num_stages: int = 3

    @property
    def pixels(self) -> int:
        return self.block_n * self.block_h * self.block_w


def choose_config(conv: Convolution, *, pool: bool = False, classes: int = 0) -> ConvConfig:
    """The committed winner for ``conv`` on this GPU, else a heuristic. ``classes`` > 0 asks for the fused head."""
    return ConvConfig("pointer", max(16, min(128, triton.next_power_of_2(conv.c_out))), 128, block_c=32)
