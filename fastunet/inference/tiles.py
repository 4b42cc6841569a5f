"""Overlap-tile: a network on an image of any size, in tiles with mirrored borders (Ronneberger et al. 2015, figure 2).

Tiles start at multiples of ``2**depth``, so each pixel meets the same pooling grid as in one pass over the whole
mirrored image, and carry a border as wide as the network looks: the result does not depend on the tile size.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fastunet.architecture import Architecture
from fastunet.arguments import checked
from fastunet.data.slices import mirror
from fastunet.errors import UserError

_LARGEST = 2**15
"""Pixels of a tile's side: the activations of more fit into no memory."""


@checked
def segment_tiled(
    forward: Callable[[torch.Tensor], torch.Tensor],
    architecture: Architecture,
    images: torch.Tensor,
    tile: int | None = None,
    largest: int | None = None,
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yields (rows, columns, result) for each tile of ``images``; together they cover them once.

    Args:
        forward: maps (N, C, h, w) to (N, ..., h', w'), such as ``model.predict`` or ``model.predict_proba``.
        architecture: of the network, for its border and its pooling grid.
        images: (N, C, H, W).
        tile: greatest side of the network's input; None takes the whole image, with its mirrored border, in one tile.
        largest: without ``tile``, the side of the tiles of images that do not fit one such tile; too small a side for a
            step of the pooling grid is passed over.

    Raises:
        ValueError: images of another number of channels than the network's, or results of ``forward`` that are
            no maps of the network's size.
        RuntimeError: whatever else ``forward`` raises.
        UserError: ``tile`` is below 1 or above 2**15, does not fit the network, or is no larger than its border.
    """
    if images.ndim != 4 or images.shape[1] != architecture.in_channels:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (N, {architecture.in_channels}, H, W)")
    if tile is not None and not 1 <= tile <= _LARGEST:
        raise UserError(f"tile is {tile}; expected 1 to {_LARGEST} pixels")
    height, width = images.shape[-2:]
    border = border_width(architecture)
    unit = 2**architecture.depth
    side_height, side_width = (_fitting(architecture, side, border) for side in (height, width))
    if tile:
        _step(architecture, tile, border, unit)
        side_height, side_width = min(tile, side_height), min(tile, side_width)  # beyond, all is mirrored
    if not tile and largest and max(side_height, side_width) > largest >= 2 * border + unit:
        side_height = side_width = largest
    step_height, step_width = (_step(architecture, side, border, unit) for side in (side_height, side_width))
    size = architecture.output_size(side_height, side_width)
    for top in range(0, height, step_height):
        for left in range(0, width, step_width):
            rows = _mirrored(top - border, side_height, height, images.device)
            columns = _mirrored(left - border, side_width, width, images.device)
            result = forward(images[:, :, rows][..., columns])
            if not isinstance(result, torch.Tensor) or tuple(result.shape[-2:]) != size:
                got = tuple(result.shape) if isinstance(result, torch.Tensor) else reprlib.repr(result)
                raise ValueError(f"forward gave {got} for tiles of {side_height}×{side_width}; expected maps of {size}")
            # Only "same" networks return their border; valid convolutions have consumed it.
            skip = border if architecture.padding == "same" else 0
            tall, wide = min(step_height, height - top), min(step_width, width - left)
            yield slice(top, top + tall), slice(left, left + wide), result[..., skip : skip + tall, skip : skip + wide]


@checked
def border_width(architecture: Architecture) -> int:
    """Pixels of context on each side of a tile, such that what lies beyond cannot change a result inside."""
    if architecture.padding == "valid":
        side = architecture.nearest_inputs(0)[-1]
        return (side - architecture.output_size(side, side)[0]) // 2
    # From the output back to the input: two 3x3 convolutions a level reach 2 pixels, the 2x2 after upsampling 1.
    reach = 0
    for _ in range(architecture.depth):
        reach = -(-(reach + 2 + 1) // 2)
    reach += 2
    for _ in range(architecture.depth):
        reach = 2 * reach + 1 + 2
    unit: int = 2**architecture.depth
    return -(-reach // unit) * unit


def _mirrored(start: int, side: int, length: int, device: torch.device) -> torch.Tensor:
    """Where ``side`` pixels from ``start`` on lie in an image of ``length`` pixels that is mirrored at its borders."""
    return torch.from_numpy(mirror(np.arange(start, start + side), length)).to(device)


def _step(architecture: Architecture, side: int, border: int, unit: int) -> int:
    """Pixels from a tile to the next: what it gives, rounded down to the pooling grid."""
    try:
        architecture.output_size(side, side)
    except ValueError as error:
        raise UserError(f"tiles of {side} pixels do not fit the network: {error}") from error
    step = (side - 2 * border) // unit * unit
    if step < 1:
        raise UserError(f"tiles of {side} pixels are too small: the border alone takes {border} on each side")
    return step


def _fitting(architecture: Architecture, side: int, border: int) -> int:
    """The smallest input side whose result, cut to the pooling grid, is at least ``side``."""
    unit: int = 2**architecture.depth
    wanted = 2 * border + -(-side // unit) * unit
    return wanted if architecture.padding == "same" else architecture.nearest_inputs(wanted - 1)[-1]
