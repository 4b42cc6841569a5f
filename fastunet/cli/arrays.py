"""NumPy files in and out for ``fastunet segment``: 2-D images as ``.npy``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastunet.cli.arguments import say
from fastunet.errors import UserError

if TYPE_CHECKING:
    from fastunet.inference.segmenter import Segmenter


def segment_arrays(segmenter: Segmenter, paths: list[Path], args: argparse.Namespace) -> None:
    """Writes the labels of each image to the output folder under the image's name.

    Pixels of the results are label values of the training data. Images are normalised like the slices of a volume.
    """
    for path in paths:
        image = read_array(path, len(segmenter.card.modalities))
        values = segmenter.label_map.decode(segmenter.predict(_normalised(image, segmenter.card.images)[None])[0])
        target = args.out / path.name
        _write(target, values)
        say(target)
        if args.overlay:
            from fastunet.files import write_bytes
            from fastunet.pictures.overlay import overlay

            classes = segmenter.label_map.encode(values, target)
            panels = [(path.name, None), ("prediction", classes)]
            picture = overlay_path(args.out, path)
            write_bytes(picture, overlay(image[0], panels, segmenter.card.class_names))
            say(picture)


def overlay_path(folder: Path, image: Path) -> Path:
    """Where the picture of an image's labels goes."""
    return folder / f"{image.stem}_overlay.png"


def read_array(path: Path, channels: int) -> np.ndarray:
    """An image as float32 (channels, H, W), stored as that or as (H, W).

    Raises:
        UserError: the file cannot be read, has another number of channels, or holds NaN or infinity.
    """
    from fastunet.data.streams import open_stream

    with open_stream(path) as stream:
        try:
            image = np.lib.format.read_array(stream.raw, allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{path} is no NumPy file of numbers, or cut short") from error
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[0] != channels or 0 in image.shape or image.dtype.kind not in "buif":
        raise UserError(f"{path} has shape {image.shape} and type {image.dtype}; the network takes {channels} channels")
    with np.errstate(over="ignore"):  # what overflows is infinite, and found as such
        values: np.ndarray = image.astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds NaN or infinity")
    return values


def _normalised(image: np.ndarray, everywhere: bool) -> np.ndarray:
    from fastunet.data.slices import brain_statistics, normalise

    statistics = [brain_statistics(channel[..., None], everywhere=everywhere) for channel in image]
    return np.stack([normalise(one, *both, everywhere=everywhere) for one, both in zip(image, statistics)])


def _write(target: Path, values: np.ndarray) -> None:
    import io

    from fastunet.files import write_bytes

    stream = io.BytesIO()
    np.save(stream, values)
    write_bytes(target, stream.getvalue())
