"""Which variant and tile the weight gradient of a 3×3 convolution runs with, and into how many shares it is split."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from .. import _launch, _tuned
from .cost import device

_WORKSPACE = 64 << 20


@dataclass(frozen=True)
class WeightGradConfig:
    """Tile: ``block_k`` output × ``block_c`` input channels, ``rows`` boxes of ``block_h`` × ``block_w`` pixels a step.

    Variants: "bulk" loads by tensor descriptors, "pointer" by masked pointers, "first" flattens its ``block_w`` pixels
    and puts the 9 · C_in taps and a column of ones on an axis of ``block_c``. ``rows`` > 1 needs ``block_h`` 1.
    """

    variant: str
    block_k: int
    block_c: int
    block_w: int
    block_h: int = 1
    rows: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def tiles(self, dz: torch.Tensor) -> int:
        """Steps over all pixels of ``dz``."""
        n, _, h, w = dz.shape
        if self.variant == "first":
            return _launch.cdiv(n * h * w, self.block_w)
        return n * _launch.cdiv(h, self.block_h * self.rows) * _launch.cdiv(w, self.block_w)

    def stages(self, dtype: torch.dtype) -> int:
        """Steps in flight: ``num_stages``, but one where Hopper's asynchronous product takes tf32 from registers.

        Triton before 3.8 has the next step write these registers while the product reads them, which PTX leaves
        undefined and ptxas may assemble as it stands (triton#9433). Of one stage each step waits for its products.
        """
        rows = self.block_c if self.variant == "first" else self.block_k
        from_registers = self.variant != "bulk" and _launch.dot_precision(dtype) == "tf32" and rows >= 64
        return 1 if from_registers and _launch.architecture() == 90 else self.num_stages

    def programs(self, c_out: int, c_in: int) -> int:
        """Programs of one split."""
        tiles_k = _launch.cdiv(c_out, self.block_k)
        return tiles_k if self.variant == "first" else 3 * tiles_k * _launch.cdiv(c_in, self.block_c)


def why_not(config: WeightGradConfig, dz: torch.Tensor, x: torch.Tensor) -> str | None:
    """Why ``config`` cannot run the source ``x``; None if it can."""
    if config.variant == "first":
        fits = 9 * x.shape[1] < config.block_c
        return None if fits else f"9 taps of {x.shape[1]} channels and a column of ones need more than {config.block_c}"
    if config.rows > 1 and config.block_h > 1:
        return f"{config.rows} rows of boxes need boxes of one row, not of {config.block_h}"
    if config.variant == "bulk":
        if _launch.architecture() < 90:
            return f"bulk copies need compute capability 9.0, not {_launch.architecture() / 10}"
        if not (_launch.bulk_copy_fits(dz) and _launch.bulk_copy_fits(x)):
            return f"bulk copies need pixels of a multiple of 16 bytes, not {x.shape[1]} to {dz.shape[1]} channels"
    return None


def choose_config(dz: torch.Tensor, x: torch.Tensor) -> WeightGradConfig:
    """The committed winner for ``dz`` and one source ``x`` on this GPU, else a heuristic.

    The key rounds every size up to a power of two, so that the layers of a network share few rows.
    """
    sizes = (*dz.shape, x.shape[1])
    key = (*map(_launch.next_power_of_2, sizes), dz.dtype, _launch.dot_precision(dz.dtype))
    return _tuned.choose("conv_relu_weight_grad", key, WeightGradConfig, lambda: _heuristic(dz, x),
                         lambda config: why_not(config, dz, x) is None)


def _heuristic(dz: torch.Tensor, x: torch.Tensor) -> WeightGradConfig:
    c_in, c_out = (_launch.next_power_of_2(tensor.shape[1]) for tensor in (x, dz))
    wide = dz.element_size() == 4
    if x.shape[1] <= 4:
        block_c = max(16, _launch.next_power_of_2(9 * x.shape[1] + 1))
        return WeightGradConfig("first", 32 if wide else 64, block_c, 64 if wide else 128)
    block_k, block_c = max(16, min(64, c_out)), max(16, min(64, c_in))
    if _launch.dot_precision(dz.dtype) == "ieee":
        return WeightGradConfig("pointer", min(32, block_k), min(32, block_c), 16, block_h=2, num_stages=2)
    block_h, block_w, rows = _pixels(dz.shape[3])
    if wide and _launch.architecture() >= 100:
        # each operand gets a transposed copy in shared memory, and Triton 3.6 fails to compile boxes of several rows
        block_h, block_w, rows = 1, 32, 1
    elif wide:
        block_w //= 2
    bulk = WeightGradConfig("bulk", 128 if c_out >= 128 else 64, block_c, block_w, block_h)
    if why_not(bulk, dz, x) is not None or _launch.architecture() >= 110:  # the latter have 99 KiB of shared memory
        if _launch.vector_width(x) * x.element_size() < 4:  # loaded through registers, of which there are too few
            block_c = min(32, block_c)
        num_warps = 8 if block_k * block_c >= 4096 else 4
        return WeightGradConfig("pointer", block_k, block_c, 16, block_h=2 if wide else 4, num_warps=num_warps)
    rows = min(rows, 4 if c_out < 128 and block_c <= 32 else 2)
    if c_out < 128:  # half the shared memory of a multiprocessor: chained products drain, and a second program fills in
        return dataclasses.replace(bulk, rows=rows, num_stages=2 if rows > 1 else 3)
    num_warps = 4 if _launch.architecture() >= 100 else 8  # Blackwell keeps the sums in tensor memory, not in registers
    return dataclasses.replace(bulk, rows=rows, num_warps=num_warps, num_stages=3 if rows > 1 or wide else 4)


def _pixels(w: int) -> tuple[int, int, int]:
    """(block_h, block_w, rows) of the bulk variant: single rows, which share loads, unless ``w`` fills them badly.

    The boxes of several rows load each row of x three times; that is taken to cost 1.3 times as much a pixel.
    """
    choices = {(1, 64, 4): 1.0, (2, 32, 1): 1.3, (4, 16, 1): 1.3}
    return min(choices, key=lambda pixels: choices[pixels] * _launch.cdiv(w, pixels[1]) * pixels[1])


def choose_splits(config: WeightGradConfig, programs: int, tiles: int, row_size: int) -> int:
    """Into how many shares the pixels are split: two to four waves of programs, those that end most evenly.

    ``programs`` are those of a split, ``tiles`` the steps over all pixels. The fp32 workspace of splits · ``row_size``
    elements stays below 64 MiB, or holds a single split.
    """
    resident = (1 if config.block_k >= 128 else 2) if config.variant == "bulk" else 3  # programs on a multiprocessor
    multiprocessors = resident * device().multiprocessors
    fewest = _launch.cdiv(2 * multiprocessors, programs)
    most = max(1, min(tiles, _WORKSPACE // (4 * row_size)))
    candidates = range(min(fewest, most), min(2 * fewest, most) + 1)
    return min(candidates, key=lambda s: _launch.cdiv(programs * s, multiprocessors) * _launch.cdiv(tiles, s))
