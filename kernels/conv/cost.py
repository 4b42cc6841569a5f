"""What a launch of the 3×3 convolution should take, by count: products, bytes from the L2 cache and from memory, waves.

A prediction, with which :func:`config.choose_config` compares tiles. Nothing in it was fitted to a measurement yet: the
shares of the data sheets' figures that a kernel is taken to reach are argument, and the same for every tile.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from .. import _launch
from .convolution import ConvConfig, Convolution


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet: dense 16-bit products a second, bytes a second of memory, and those of the L2 cache, for
    which there are microbenchmarks only."""

    name: str
    architecture: int
    multiprocessors: int
    products: float
    memory: float
    l2: float


DEVICES = (
    Device("H100 PCIe", 90, 114, 756e12, 2.0e12, 3.8e12),
    Device("H200", 90, 132, 989e12, 4.8e12, 5.5e12),
    Device("H100", 90, 132, 989e12, 3.35e12, 5.5e12),
    Device("A100", 80, 108, 312e12, 2.0e12, 4.0e12),
    Device("L4", 89, 58, 121e12, 0.3e12, 1.5e12),
    Device("RTX 4090", 89, 128, 165e12, 1.0e12, 3.5e12),
)
_PRODUCTS, _MEMORY = 0.65, 0.85
"""Shares of the data sheet's products and of its memory bandwidth that a good kernel reaches."""
_POINTER = 0.5
"""Of that, and of the L2 cache, where bulk copies are possible: a pointer kernel computes addresses and masks too."""
_LAUNCH = 3e-6
"""Seconds from one kernel to the next."""


def device() -> Device:
    """The current GPU, its multiprocessors asked for and its speeds from the table; the usual GPU of the architecture
    where there is none, or where launches are recorded for another one."""
    architecture = _launch.architecture()
    if torch.cuda.is_available():
        found = _present(torch.cuda.current_device())
        if found.architecture == architecture:
            return found
    return usual_device(architecture)


@functools.cache
def _present(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    architecture = 10 * properties.major + properties.minor
    known = next((d for d in DEVICES if d.name in properties.name), usual_device(architecture))
    share = properties.multi_processor_count / known.multiprocessors  # of a partitioned GPU, too
    return dataclasses.replace(known, name=properties.name, architecture=architecture, l2=known.l2 * share,
                               multiprocessors=properties.multi_processor_count, products=known.products * share)


def usual_device(architecture: int) -> Device:
    """The GPU that a compute capability times ten stands for where none is asked."""
    names = {80: "A100", 86: "RTX 4090", 89: "RTX 4090"}
    return next(d for d in DEVICES if d.name == names.get(architecture, "H100"))


@dataclass(frozen=True)
class Cost:
    """Of one launch: programs, and of each of them multiply-adds, padding included, and bytes from the L2 cache; bytes
    that memory must move; launches; whether its tiles come by pointers."""

    programs: int
    macs: int
    loaded: int
    memory: int
    launches: int
    itemsize: int
    by_pointers: bool

    def seconds(self, device: Device) -> float:
        """The longest of products, by whole waves, of loads from the L2 cache and of memory, and the launches."""
        rate = device.products * _PRODUCTS * (2 / self.itemsize) / device.multiprocessors
        share = _POINTER if self.by_pointers and device.architecture >= 90 else 1
        products = -(-self.programs // device.multiprocessors) * 2 * self.macs / (rate * share)
        loads = self.programs * self.loaded / (device.l2 * share)
        return max(products, loads, self.memory / (device.memory * _MEMORY)) + self.launches * _LAUNCH


def cost(conv: Convolution, config: ConvConfig, *, pool: bool = False, classes: int = 0) -> Cost:
    """The counts of ``conv`` with the tile of ``config``."""
    size, channels = conv.x.element_size(), conv.channels
    columns, rows = config.pixels, config.block_k
    if config.variant == "first":
        products, loads = [_launch.next_power_of_2(9 * channels[0])], [9 * channels[0]]
    else:
        padded = [_launch.cdiv(c, config.block_c) * config.block_c for c in channels]
        rows, columns = config.stack * rows, columns // config.stack
        products = loads = [3 * (config.stack + 2) * c for c in padded]
    loaded = sum(loads) * (rows + columns)
    if config.variant == "rows":  # of each input column of a group three kernel rows, and two input rows more
        loaded = sum(padded) * (config.stack + 2) * (3 * rows + columns // config.block_h * (config.block_h + 2))
    pixels = conv.batch * conv.out_size[0] * conv.out_size[1]
    written = pixels * (classes or conv.c_out * (1.25 if pool else 1))
    read = sum(image.numel() for image in (*conv.images, *conv.masks))
    memory = size * (read + 9 * sum(channels) * conv.c_out + written)
    if config.splits > 1:
        memory += 2 * 4 * config.splits * pixels * conv.c_out
    launches = 1 + (config.splits > 1) * (1 + pool)
    return Cost(programs(conv, config) * config.splits, rows * columns * sum(products) // config.splits,
                size * loaded // config.splits, int(memory), launches, size, config.variant == "pointer")


def programs(conv: Convolution, config: ConvConfig) -> int:
    """Programs of one split."""
    return pixel_tiles(conv, config) * _launch.cdiv(conv.c_out, config.block_k)


def pixel_tiles(conv: Convolution, config: ConvConfig) -> int:
    """Tiles of output pixels, image by image."""
    (h, w), n = conv.out_size, conv.batch
    if config.variant in ("pointer", "first"):
        return _launch.cdiv(n * h * w, config.pixels)
    return _launch.cdiv(n, config.block_n) * _launch.cdiv(h, config.block_h) * _launch.cdiv(w, config.block_w)
