"""Results for 2-D images and stacks of them: masks as PNG or TIFF in the values that were painted, maps as TIFF."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastunet.data.case import Case
from fastunet.data.formats import TIFF_SUFFIXES, suffix_of
from fastunet.data.labels import COLOUR, LabelMap
from fastunet.errors import UserError
from fastunet.files import whole_file

MAP_SUFFIX = ".tif"
_PNG_VALUES = 1 << 16


def mask_suffix(case: Case, labels: LabelMap) -> str:
    """The ending of a mask of an image: ".tif" for TIFF images and for values that no PNG holds, else ".png"."""
    grey = [value for value in labels.values if value < COLOUR]
    fits = all(0 <= value < _PNG_VALUES for value in grey)
    return ".png" if fits and suffix_of(case.files[0]) not in TIFF_SUFFIXES else ".tif"


def mask_pixels(classes: np.ndarray, labels: LabelMap) -> np.ndarray:
    """Class indices (H, W, pages) as the values or colours of the masks that the table was made from.

    Returns:
        (H, W, pages) in the smallest of uint8, uint16 and the table's own type, or, if the table has a colour, uint8
        (H, W, pages, 3), grey values as their colour.
    """
    values = labels.decode(classes)
    if max(labels.values) >= COLOUR:
        packed = np.where(values >= COLOUR, values - COLOUR, values * 0x010101)
        return np.stack([packed >> 16 & 255, packed >> 8 & 255, packed & 255], axis=-1).astype(np.uint8)
    unsigned = min(labels.values) >= 0 and max(labels.values) < _PNG_VALUES
    return values.astype(np.uint16) if unsigned and values.dtype != np.uint8 else values


def save_image(path: Path, pixels: np.ndarray) -> None:
    """Writes (H, W, pages) or (H, W, pages, 3) as one whole file; of several pages, as a stack.

    Raises:
        UserError: the file cannot be written, ends neither as TIFF nor as PNG, or is a PNG for what that cannot hold.
    """
    tiff, depths = suffix_of(path) in TIFF_SUFFIXES, (np.uint8, np.uint16)
    if not tiff and (suffix_of(path) != ".png" or pixels.shape[2] > 1 or pixels.dtype not in depths):
        raise UserError(f"{path}: {pixels.shape[2]} pages of {pixels.dtype} are written as .tif")
    pages = np.moveaxis(pixels, 2, 0)
    pages = np.ascontiguousarray(pages[0] if len(pages) == 1 else pages)
    with whole_file(path) as temporary:
        if tiff:
            import tifffile

            tifffile.imwrite(temporary, pages, photometric="rgb" if pixels.ndim == 4 else "minisblack", metadata=None)
        else:
            from PIL import Image

            Image.fromarray(pages).save(temporary, format="png")
