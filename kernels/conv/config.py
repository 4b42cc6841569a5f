"""Which kernel variant and tile a 3×3 convolution runs with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton

from .. import _launch, _tuned
from .convolution import ConvConfig, Convolution
from .cost import cost, device

EIGHT_WARPS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
"""Triton before 3.8 makes each product of a convolution of eight warps wait for the one before."""
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
        few = 9 * conv.x.shape[1] <= 64 and conv.skip is None and not conv.masks and not classes
        return None if few else "it takes at most 7 channels of one source, no mask and no head"
    if _launch.architecture() < 90:
        return f"bulk copies need compute capability 9.0, not {_launch.architecture() / 10}"
    written = classes > 0 or all(c * conv.x.element_size() % 16 == 0 for c in (conv.c_first, conv.c_out))
    if not written or not all(map(_launch.bulk_copy_fits, (*conv.images, *conv.masks))):
        return f"bulk copies need pixels of a multiple of 16 bytes, not {conv.channels} to {conv.c_out} channels"
    if config.writes_two and conv.c_first % (config.block_k // 2):
        return f"half a tile of {config.block_k} channels would be of two images, the first of {conv.c_first} channels"
    if config.variant == "rows" and config.block_h % 2:
        return f"it takes an even number of rows, not {config.block_h}"
    widths = (conv.out_size[1], *(image.shape[3] for image in conv.images))
    if config.stack > 1 and (conv.c_out != config.block_k or any(width % config.stack for width in widths)):
        return f"it takes {config.block_k} output channels and images whose width is a multiple of {config.stack}"
    return None


def choose_config(conv: Convolution, *, pool: bool = False, classes: int = 0) -> ConvConfig:
    """The committed winner for ``conv`` on this GPU, else the least predicted time. ``classes`` > 0: with a head.

    The key rounds every size up to a power of two, so that the layers of a network share few rows.
    """
    sizes = (conv.batch, *conv.out_size, *(conv.channels if conv.skip is not None else (0, *conv.channels)), conv.c_out)
    buckets = tuple(_launch.next_power_of_2(size) if size else 0 for size in sizes)
    precision = _launch.dot_precision(conv.x.dtype)
    key = (*buckets, conv.x.dtype, precision, bool(conv.masks), pool, classes > 0)
    return _tuned.choose("conv_relu", key, ConvConfig, lambda: next(_usable(conv, classes, pool)),
                         lambda config: why_not(config, conv, classes=classes) is None,
                         lambda: list(_usable(conv, classes, pool))[1:])


def _usable(conv: Convolution, classes: int, pool: bool) -> Iterator[ConvConfig]:
    """One configuration or more of each variant that can run, by predicted time; equal ones by what they load."""
    ieee = conv.x.dtype == torch.float32 and _launch.dot_precision(conv.x.dtype) == "ieee"
    pointers = list(_pointers(conv, classes, ieee))
    if ieee:  # without matrix instructions the count of products says nothing
        return (config for config in (_first(conv, ieee), *pointers) if _runs(config, conv, classes))
    candidates = [_first(conv, ieee), *_rows(conv), *_boxes(conv), *pointers]
    gpu = device()

    def predicted(config: ConvConfig) -> tuple[float, int]:
        counted = cost(conv, config, pool=pool, classes=classes)
        return counted.seconds(gpu), counted.programs * counted.loaded

    return iter(sorted((c for c in candidates if _runs(c, conv, classes)), key=predicted))


def _runs(config: ConvConfig | None, conv: Convolution, classes: int) -> bool:
    return config is not None and why_not(config, conv, classes=classes) is None


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


def _rows(conv: Convolution) -> Iterator[ConvConfig]:
    """Padded to 64 channels, and with columns stacked where that fills them; its whole pipeline must fit.

    In steps of 64 bytes a multiprocessor holds two programs, of which one multiplies while the other waits; in steps of
    128 products wait less. The count is the same: stacked ones take the first, of the others the search decides.
    """
    hopper = _launch.architecture() == 90  # for the sums of six rows Triton 3.6 finds no tensor memory on newer ones
    for block_k in sorted({64, conv.c_out} & {8, 16, 32, 64}):
        steps = (64,) if block_k < 64 else (128, 64) if hopper else (128,)
        for block_c, block_h in itertools.product(dict.fromkeys(_block_c(conv, step) for step in steps), (2, 4, 6)):
            if _stages((3 + block_h + 2) * 64 * block_c, conv) >= 2 and (hopper or block_h < 6):
                yield ConvConfig("rows", block_k, 64 * (64 // block_k), block_h, 1, block_c, 4, 2)


def _boxes(conv: Convolution) -> Iterator[ConvConfig]:
    """Each tile of the box that wastes the fewest pixels, and its splits."""
    block_c = _block_c(conv, 128)
    h, w = conv.out_size
    steps = sum(9 * _launch.cdiv(channels, block_c) for channels in conv.channels)
    tiles = ((128, 256, 8),) if EIGHT_WARPS else ()
    for block_k, pixels, warps in (*tiles, (128, 128, 4), (64, 256, 4), (64, 128, 4), (64, 64, 4)):
        # the later boxes read more halo for their pixels, so they must save a tenth of them
        wasted = [1.1**i * _launch.cdiv(conv.batch, n) * _launch.cdiv(h, rows) * _launch.cdiv(w, columns)
                  for i, (n, rows, columns) in enumerate(_BOXES[pixels])]
        block_n, block_h, block_w = _BOXES[pixels][wasted.index(min(wasted))]
        stages = _stages((block_k + pixels) * block_c, conv)
        if stages >= (3 if pixels == 256 else 2):
            for splits in range(1, max(1, min(9, steps // 8)) + 1):
                yield ConvConfig("box", block_k, block_w, block_h, block_n, block_c, warps, stages, splits)


def _pointers(conv: Convolution, classes: int, ieee: bool) -> Iterator[ConvConfig]:
    """Tiles that keep their addresses and masks in registers: ragged channels need one of each an element."""
    k = max(16, _launch.next_power_of_2(conv.c_out))
    wide = min(map(_launch.vector_width, conv.images)) * conv.x.element_size() == 16
    block_c = 64 // conv.x.element_size()
    if ieee:  # without matrix instructions: every thread holds rows of both operands
        tiles = [(k if classes else min(k, 64), 32 if classes else 64, 4 if wide else 8)]
    elif wide:
        tiles = [(min(k, 128), 128, 8 if k > 64 else 4)]
        tiles += [] if classes else [(min(k, 64), 128, 4), (min(k, 64), 64, 4)]
    else:
        tiles = [(k if classes else min(k, 64), 128, 8)]
    for block_k, pixels, warps in tiles:
        stages = _stages((block_k + pixels) * block_c, conv, 3)
        yield ConvConfig("pointer", block_k, pixels, block_c=block_c, num_warps=warps, num_stages=stages)
