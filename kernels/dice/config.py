"""The tiles of the Dice kernels, and the memory orders that they are chosen for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .. import _launch, _tuned


@dataclass(frozen=True)
class DiceConfig:
    """Pixels of a tile, columns in which the forward pass sums them, warps, and tiles that it has on their way."""

    block_s: int
    keep: int
    num_warps: int = 4
    num_stages: int = 1


def choose_config(classes: int, layout: str, itemsize: int) -> DiceConfig:
    """The committed winner on this GPU, else a heuristic."""
    return _tuned.choose("dice", (classes, layout, itemsize), DiceConfig, lambda: _heuristic(classes, layout, itemsize))


def choose_regions_config(regions: int, layout: str, itemsize: int) -> DiceConfig:
    """:func:`choose_config` of overlapping regions, whose kernels hold more of a pixel at a time."""

    def heuristic() -> DiceConfig:
        config = _heuristic(regions, layout, itemsize)
        if layout != "planes" or itemsize == 4:
            return config
        # Four neighbours to a column up to four regions, where a thread has whole pixels; else half the tile.
        if regions <= 4:
            return replace(config, keep=config.block_s // 4)
        return replace(config, block_s=config.block_s // 2, keep=config.block_s // 4)

    return _tuned.choose("dice_regions", (regions, layout, itemsize), DiceConfig, heuristic)


def _heuristic(classes: int, layout: str, itemsize: int) -> DiceConfig:
    """The tile for 16 to 32 values a thread, and as many columns apart as registers allow without spilling any.

    Two neighbours share a column where 16-bit vectors hold eight pixels, four where many float32 classes do.
    """
    vector, block_c, threads = 16 // itemsize, _launch.next_power_of_2(classes), 128
    if layout == "rows":
        block_s = max(1, 16 * threads // block_c)
        vector = next(width for width in (vector, 4, 2, 1) if classes % width == 0)
        columns = block_s if itemsize == 4 else min(block_s, threads * vector // block_c)
        return DiceConfig(block_s, keep=max(1, columns))
    num_warps, neighbours = 4, 1 if itemsize == 4 else 2
    if itemsize == 4 and block_c > 16:
        num_warps, neighbours, threads = 8, 4, 256
    values = 16 if itemsize == 4 or layout == "packed" else 32
    block_s = max(vector, min(threads * vector, values * threads // block_c))
    return DiceConfig(block_s, block_s // neighbours, num_warps)


def layout_of(logits: torch.Tensor) -> str:
    """The ``LAYOUT`` of ``tiles`` for (N, C, S) logits.

    Raises:
        ValueError: the memory is neither in the order (N, C, S) nor (N, S, C).
    """
    if logits.is_contiguous():
        return "planes"
    if not logits.transpose(1, 2).is_contiguous():
        raise ValueError(f"logits of shape {tuple(logits.shape)} have strides {logits.stride()}; expected dense memory")
    return {2: "packed", 3: "triplets", 4: "packed"}.get(logits.shape[1], "rows")
