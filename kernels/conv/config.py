"""What one 3×3 convolution is, and which kernel variant and tile it runs with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .. import _launch, _tuned, _weights


@dataclass(frozen=True)
class Convolution:
    """``y = relu(conv(concat([skip, x], 1), weight) + bias) * (mask > 0)`` with outputs of ``out_size``.

    ``x`` and ``skip`` (N, C, H, W) are NHWC pixels of unit channel stride and pixel stride C, ``skip`` possibly a crop
    of a larger image; ``weight`` (C_out, 3, 3, C_skip + C_x) has any strides. ``offset`` (off_h, off_w): output (i, j)
    reads rows i - off_h .. i - off_h + 2 of each source and such columns, zero outside of it.
    """

    x: torch.Tensor
    skip: torch.Tensor | None
    weight: torch.Tensor
    offset: tuple[int, int]
    out_size: tuple[int, int]
    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    relu: bool = False

    @property
    def images(self) -> tuple[torch.Tensor, ...]:
        return (self.x,) if self.skip is None else (self.skip, self.x)

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(image.shape[1] for image in self.images)

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
        in_place = self.weight.is_contiguous() and (self.weight.is_meta or self.weight.data_ptr() % 16 == 0)
        return self.split(self.weight.view(self.c_out, 9, -1) if in_place else _weights.forward_taps(self.weight))


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

    Variants: "pointer" and "first" flatten their pixels and use ``block_w`` alone; "box", "rows" and "two_rows" are
    the bulk-copy kernels of the files of those names. ``splits`` > 1 shares out the sums of a box (``box_split``).
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


_MULTIPROCESSORS = 132
_MOST_SPLIT_ELEMENTS = 1 << 26
_SHARED_KIB = {80: 163, 90: 227, 100: 227, 103: 227}
"""Shared memory of one program by architecture; 99 KiB on those not listed."""
_BOXES = {
    64: ((1, 4, 16), (1, 8, 8)),
    128: ((1, 8, 16), (1, 4, 32), (2, 8, 8)),
    256: ((1, 16, 16), (1, 8, 32), (4, 8, 8)),
}
"""(images, rows, columns) of the boxes of so many pixels; powers of two, even for the pooling windows."""


def why_not(config: ConvConfig, conv: Convolution, *, classes: int = 0) -> str | None:
    """Why ``config`` cannot run ``conv``, with a fused head where ``classes`` > 0; None if it can."""
    if classes and config.block_k < conv.c_out:
        return f"the fused head needs all {conv.c_out} channels in one tile of {config.block_k}"
    if config.splits > 1:
        size = conv.batch * conv.out_size[0] * conv.out_size[1] * conv.c_out
        if config.variant != "box" or classes or config.splits > 9 or config.splits * size > _MOST_SPLIT_ELEMENTS:
            return f"{config.splits} splits of a {config.variant}: at most 9, of a small map, without a head"
    if config.variant == "pointer":
        return None
    if config.variant == "first":
        few = 9 * conv.x.shape[1] <= 64 and conv.skip is None and conv.mask is None and not classes
        return None if few else "it takes at most 7 channels of one source, no mask and no head"
    if _launch.architecture() < 90:
        return f"bulk copies need compute capability 9.0, not {_launch.architecture() / 10}"
    written = conv.c_out * conv.x.element_size() % 16 == 0 or classes > 0
    read = conv.images if conv.mask is None else (*conv.images, conv.mask)
    if not written or not all(map(_launch.bulk_copy_fits, read)):
        return f"bulk copies need pixels of a multiple of 16 bytes, not {conv.channels} to {conv.c_out} channels"
    odd = any(image.shape[2] % 2 for image in conv.images)
    if config.variant == "two_rows" and (odd or conv.c_out > config.block_k):
        return f"it takes images of even height and at most {config.block_k} output channels"
    return None


def choose_config(conv: Convolution, *, pool: bool = False, classes: int = 0) -> ConvConfig:
    """The committed winner for ``conv`` on this GPU, else a heuristic. ``classes`` > 0 asks for the fused head.

    The key rounds every size up to a power of two, so that the layers of a network share few rows.
    """
    sizes = (conv.batch, *conv.out_size, *(conv.channels if conv.skip is not None else (0, *conv.channels)), conv.c_out)
    buckets = tuple(_launch.next_power_of_2(size) if size else 0 for size in sizes)
    precision = _launch.dot_precision(conv.x.dtype)
    key = (*buckets, conv.x.dtype, precision, conv.mask is not None, pool, classes > 0)
    return _tuned.choose("conv_relu", key, ConvConfig, lambda: next(_usable(conv, classes)),
                         lambda config: why_not(config, conv, classes=classes) is None,
                         lambda: list(_usable(conv, classes))[1:])


def _usable(conv: Convolution, classes: int) -> Iterator[ConvConfig]:
    """One configuration or more of each variant that can run, the heuristic's choice first."""
    ieee = conv.x.dtype == torch.float32 and _launch.dot_precision(conv.x.dtype) == "ieee"
    boxes = _boxes(conv) if classes else [_split(conv, config) for config in _boxes(conv)]
    candidates = [_first(conv, ieee)] if ieee else [_first(conv, ieee), _two_rows(conv), _rows(conv), *boxes]
    for config in candidates:
        if config is not None and why_not(config, conv, classes=classes) is None:
            yield config
    yield _pointer(conv, classes, ieee)


def _programs(conv: Convolution, config: ConvConfig) -> int:
    h, w = conv.out_size
    tiles = _launch.cdiv(h, config.block_h) * _launch.cdiv(w, config.block_w) * _launch.cdiv(conv.batch, config.block_n)
    return tiles * _launch.cdiv(conv.c_out, config.block_k)


def _block_c(conv: Convolution, most: int) -> int:
    """Channels of one step: ``most`` bytes of a pixel, or the whole pixel where it is shorter."""
    return max(16, min(most // conv.x.element_size(), _launch.next_power_of_2(max(conv.channels))))


def _stages(stage_elements: int, conv: Convolution, most: int = 4) -> int:
    """Steps in flight that fit the shared memory."""
    shared = 1024 * _SHARED_KIB.get(_launch.architecture(), 99) - 2048
    return min(most, shared // (stage_elements * conv.x.element_size()))


def _first(conv: Convolution, ieee: bool) -> ConvConfig | None:
    """One product for all taps of the 1 to 4 channels (up to 7 fit) of an image."""
    if conv.x.shape[1] > 7:
        return None
    most, pixels = (32, 32) if ieee else (64, 128)
    return ConvConfig("first", max(16, min(most, _launch.next_power_of_2(conv.c_out))), pixels, num_stages=1)


def _two_rows(conv: Convolution) -> ConvConfig | None:
    """For the widest layers of a network of width 32, as long as there are tiles for every multiprocessor."""
    if conv.c_out > 32:
        return None
    block_c = _block_c(conv, 128)
    tall = ConvConfig("two_rows", 32, 16, 8, 1, block_c, 4, _stages((64 + 128) * block_c, conv))
    if conv.batch * _launch.cdiv(conv.out_size[0], 16) * _launch.cdiv(conv.out_size[1], 16) >= 2 * _MULTIPROCESSORS:
        return tall
    return ConvConfig("two_rows", 32, 16, 4, 1, block_c, 4, tall.num_stages)


def _rows(conv: Convolution) -> ConvConfig | None:
    """For up to 128 channels and rows that 64 columns divide well; its whole pipeline must fit."""
    w = conv.out_size[1]
    block_k, block_c = (64 if conv.c_out <= 64 else 128), _block_c(conv, 128)
    config = ConvConfig("rows", block_k, 64, 4, 1, block_c, block_k // 16, 2)
    wasteful = _launch.cdiv(w, 64) * 64 > 1.3 * w or _programs(conv, config) < _MULTIPROCESSORS
    fits = _stages((3 * block_k + 6 * 64) * block_c, conv) >= 2
    return None if conv.c_out > 128 or wasteful or not fits else config


def _boxes(conv: Convolution) -> list[ConvConfig]:
    """The largest tile that leaves no multiprocessor idle, of the box that wastes the fewest pixels."""
    block_c = _block_c(conv, 128)
    h, w = conv.out_size
    configs = []
    for block_k, pixels, warps in ((128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4)):
        # the later boxes read more halo for their pixels, so they must save a tenth of them
        wasted = [1.1**i * _launch.cdiv(conv.batch, n) * _launch.cdiv(h, rows) * _launch.cdiv(w, columns)
                  for i, (n, rows, columns) in enumerate(_BOXES[pixels])]
        block_n, block_h, block_w = _BOXES[pixels][wasted.index(min(wasted))]
        stages = _stages((block_k + pixels) * block_c, conv)
        if stages >= 2 and (block_k == 64 or conv.c_out > 64):
            configs.append(ConvConfig("box", block_k, block_w, block_h, block_n, block_c, warps, stages))
    full = [config for config in configs if _programs(conv, config) >= _MULTIPROCESSORS]
    return full or configs[-1:]


def _split(conv: Convolution, config: ConvConfig) -> ConvConfig:
    """``config`` with the sums of its few tiles shared out: one wave of programs, eight steps each at least."""
    steps = sum(9 * _launch.cdiv(channels, config.block_c) for channels in conv.channels)
    splits = min(9, _MULTIPROCESSORS // _programs(conv, config), steps // 8)
    return dataclasses.replace(config, splits=splits) if splits > 1 else config


def _pointer(conv: Convolution, classes: int, ieee: bool) -> ConvConfig:
    """Tiles that keep their addresses and masks in registers: ragged channels need one of each an element."""
    k = max(16, _launch.next_power_of_2(conv.c_out))
    wide = min(map(_launch.vector_width, conv.images)) * conv.x.element_size() == 16
    block_c = 64 // conv.x.element_size()
    if ieee:  # without matrix instructions: every thread holds rows of both operands
        config = ConvConfig("pointer", k if classes else min(k, 64), 32 if classes else 64, block_c=block_c,
                            num_warps=4 if wide else 8)
    elif wide:
        config = ConvConfig("pointer", min(k, 128), 128, block_c=block_c, num_warps=8 if k > 64 else 4)
        idle = conv.batch * conv.out_size[0] * conv.out_size[1] * conv.c_out < _MULTIPROCESSORS * 128 * config.block_k
        if idle and not classes:
            config = ConvConfig("pointer", min(k, 64), 64, block_c=block_c)
    else:
        config = ConvConfig("pointer", k if classes else min(k, 64), 128, block_c=block_c, num_warps=8)
    return dataclasses.replace(config, num_stages=_stages((config.block_k + config.pixels) * block_c, conv, 3))
