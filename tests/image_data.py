"""Small image files, and folders of them beside masks, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (7, 5)).astype(np.uint8)
RGB = RNG.integers(0, 256, (7, 5, 3)).astype(np.uint8)


def picture(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".tif", ".tiff"):
        tifffile.imwrite(path, pixels, **options)
    else:
        Image.fromarray(pixels).save(path, **options)
    return path


def folder_of(root: Path, count=4, masks="masks", mark="", values=(0, 255)) -> Path:
    """Images and masks; image k is k rows taller. They do not hang on the tests before."""
    rng = np.random.default_rng(0)
    for index in range(count):
        size = (12 + index, 10)
        mask = np.sort(rng.choice(np.array(values, np.uint8), size), 0)  # areas, not noise
        mask.flat[: len(values)] = values
        picture(root / "images" / f"cell_{index}.png", (mask // 2 + rng.integers(0, 50, size)).astype(np.uint8))
        picture(root / masks / f"cell_{index}{mark}.png", mask)
    return root
