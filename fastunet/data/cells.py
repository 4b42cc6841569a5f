"""Synthetic pictures of cells that touch: for demonstrations and tests, never for claims about microscopes.

A picture has patches of cells of unequal size, each a cell of a Voronoi diagram with a bent outline, so that neighbours
touch along a line. They have a membrane, a dark nucleus and texture; then come debris as bright as cells, light that is
uneven and falls off to one side, the blur of the lens, shot noise and read noise. No threshold separates cells from the
ground or from each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastunet.arguments import checked
from fastunet.data.case import Case
from fastunet.data.cases import discover_cases
from fastunet.data.image_files import save_image
from fastunet.data.phantoms import blur, smooth_field
from fastunet.errors import UserError
from fastunet.files import make_output_folder, require_room

CELL, GAP = 22.0, 1.6
"""Pixels between the middles of neighbouring cells, and of the ground between two that touch."""
_SMALLEST_SIDE = 64


@checked
def make_cells(
    root: str | Path, count: int, seed: int, *, sizes: Sequence[tuple[int, int]] = ((160, 160),)
) -> list[Case]:
    """Writes ``count`` images and masks below ``root`` and returns their cases; equal arguments give equal pixels.

    Args:
        root: the folder, made if needed; ``images`` and ``masks`` in it get PNG files.
        count: how many; image i depends on ``seed`` and i only.
        seed: a non-negative integer.
        sizes: (height, width) of the images, taken in turn.

    Raises:
        UserError: no size or one that is too small, no room on the disk, or a file that cannot be written.
    """
    if not sizes:
        raise UserError("pictures of cells need at least one size")
    root = Path(root)
    least = min(math.prod(size) for size in sizes) // 2
    require_room(make_output_folder(root), count, least, "pictures of cells")
    images, masks = (make_output_folder(root / name) for name in ("images", "masks"))
    for index in range(count):
        pixels, mask = cells(np.random.default_rng([seed, index]), sizes[index % len(sizes)])
        name = f"cells_{index:03d}.png"
        save_image(images / name, pixels[..., None])
        save_image(masks / name, mask[..., None])
    return discover_cases(root)


def cells(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """One picture: grey values uint8 (H, W), and a mask uint8 (H, W), 255 in cells and 0 between them."""
    if min(size) < _SMALLEST_SIDE:
        raise UserError(f"pictures of cells need sides of at least {_SMALLEST_SIDE} pixels, got {size[0]} × {size[1]}")
    mesh: np.ndarray = np.indices(size, dtype=np.float32)
    rows, columns = mesh
    knots = max(size) // 14
    rows, columns = rows + 2.5 * smooth_field(rng, size, knots), columns + 2.5 * smooth_field(rng, size, knots)
    # A jittered grid of middles, some of them missing: those make the ground.
    steps = [np.arange(-CELL, side + CELL, CELL) for side in size]
    grid = np.stack(np.meshgrid(*steps, indexing="ij"), -1).reshape(-1, 2)
    middles = grid + rng.uniform(-0.32, 0.32, grid.shape) * CELL
    radii = rng.uniform(0.42, 0.66, len(middles)) * CELL
    density = smooth_field(rng, size, 3)
    place = np.clip(middles.astype(int), 0, np.array(size) - 1)
    present = density[place[:, 0], place[:, 1]] > rng.uniform(-1.8, -0.5)
    middles, radii = middles[present], radii[present]
    distance = np.hypot(rows[..., None] - middles[:, 0], columns[..., None] - middles[:, 1]).astype(np.float32)
    order = np.argpartition(distance, 1, axis=-1)[..., :2]
    near, next_near = np.moveaxis(np.take_along_axis(distance, order, -1), -1, 0)
    owner = order[..., 0]
    inside = np.minimum(radii[owner] - near, (next_near - near) / 2 - GAP / 2)
    brightness = rng.uniform(0.75, 1.15, len(middles))
    nucleus = np.clip((radii[owner] * 0.38 - near) / 1.5, 0, 1)
    shade = brightness[owner] * (0.5 + 0.12 * smooth_field(rng, size, knots * 2)) - 0.22 * nucleus
    shade += 0.22 * np.exp(-((inside - 1.2) ** 2) / 2)
    picture = np.where(inside > 0, shade, 0.3 + 0.05 * smooth_field(rng, size, knots))
    for _ in range(rng.integers(6, 14)):
        row, column = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        picture += 0.5 * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * rng.uniform(0.8, 2.2) ** 2))
    light = np.exp(0.28 * smooth_field(rng, size, 2)) * (1 - 0.35 * (rows / size[0] - 0.5) * rng.choice([-1, 1]))
    photons = rng.poisson(blur(picture).clip(0) * light * 140) + rng.normal(0, 4, size)
    return (photons * rng.uniform(0.8, 1.1)).clip(0, 255).astype(np.uint8), (inside > 0).astype(np.uint8) * 255
