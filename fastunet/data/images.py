"""Reading 2-D images and stacks: PNG, JPEG, BMP and GIF by Pillow, TIFF by tifffile, as volumes whose slices are pages.

Slice k of the default axis is page k, (H, W), as viewers show it: an orientation tag (EXIF, TIFF) is obeyed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from fastunet.data.labels import COLOUR
from fastunet.data.stored import Stored, header_of
from fastunet.data.streams import open_stream
from fastunet.errors import UserError, warn_once

if TYPE_CHECKING:
    from PIL.Image import Image

AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
_PLAUSIBLE_BYTES = 100 << 20
_MOST_EXPANSION = 1032  # of deflate, the best of TIFF's usual compressions
_PICTURES = ("PNG", "JPEG", "BMP", "GIF")
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PLAIN_KINDS = (0, 1, 2)  # TIFF's photometric interpretations: white or black is 0 (numbers are as stored), RGB
_CONVERTED = ((6, 6), (6, 7))  # YCbCr in JPEG compression, which tifffile brings to RGB
_NO_PAGES = 0b101  # of a subfile's type: a smaller version of another image, a mask of what is transparent
_ORIENTATION = 0x0112
_SHOWN = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}
"""By orientation tag: whether rows and columns change places, and the steps through those that result."""


def describe_image(path: Path) -> Stored:
    """Shape and type of an image, from its header; errors as in ``load_image``."""
    with _opened(path) as reader:
        return _stored(path, reader)


def load_image(path: Path, channel: int | None) -> tuple[Stored, np.ndarray]:
    """The numbers of an image as (H, W, pages) or (H, W, pages, channels), or those of one channel.

    A palette gives its colours; an alpha channel is left out. Of a grey image every channel is the same.

    Raises:
        UserError: the file is missing, damaged, too large, or no image of real numbers.
    """
    with _opened(path) as reader:
        stored, data = _stored(path, reader), reader.read()
    if channel is not None and data.ndim == 4:
        if channel >= data.shape[3]:
            raise UserError(f"{path}: has no channel {channel}, its shape is {data.shape}")
        data = data[..., channel]
    return stored, data


def load_mask(path: Path) -> np.ndarray:
    """A mask as integers (H, W, pages): the grey value, or ``COLOUR`` + 65536 R + 256 G + B where a pixel has a colour.

    Raises:
        UserError: as in ``load_image``, values beyond 24 bits, or other than one or three channels.
    """
    _, data = load_image(path, None)
    if data.ndim == 3:
        if data.max() >= COLOUR:
            raise UserError(f"{path} holds values up to {data.max():.9g}; those of a mask are below {COLOUR}")
        return data
    if data.shape[3] != 3 or data.dtype != np.uint8:
        raise UserError(f"{path}: a mask is grey or 8-bit RGB, this one has {data.shape[3]} channels of {data.dtype}")
    red, green, blue = (data[..., index].astype(np.int32) for index in range(3))
    colour = COLOUR + (red << 16) + (green << 8) + blue
    return np.where((red == green) & (green == blue), red, colour)


class _Reader(NamedTuple):
    """The shape (H, W, pages[, channels]) and dtype of an open image, ``read``, which gives its numbers, its tag."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    orientation: int = 1


def _stored(path: Path, reader: _Reader) -> Stored:
    header = header_of(reader.shape[:3], AFFINE)
    return Stored(path, reader.shape, reader.dtype, 0, 1.0, 0.0, AFFINE, header, reader.orientation)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Reader]:
    with open_stream(path) as stream:  # the same refusals as for volumes, and the check that nothing changes meanwhile
        try:
            tiff = stream.raw.read(4) in _TIFF_MAGIC  # whatever the name says
            stream.raw.seek(0)
            with _strict(path), (_tiff if tiff else _picture)(path, stream.raw) as reader:
                if reader.dtype.kind not in "biuf" or 0 in reader.shape:
                    raise UserError(f"{path}: pixels of type {reader.dtype} and shape {reader.shape} are no image")
                yield reader
        except (UserError, MemoryError):
            raise
        except Exception as error:  # both libraries let every kind of exception through on damaged files
            text = re.sub(r"(?:file )?<_io\.[^>]*>", "its format", str(error))
            reason = " ".join(text.split())[:120] or type(error).__name__
            raise UserError(f"{path} cannot be read as an image: {reason}") from error


@contextlib.contextmanager
def _picture(path: Path, raw: BinaryIO) -> Iterator[_Reader]:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(raw, formats=_PICTURES)  # no others: EPS, for one, runs a program
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is no image: its content is not that of a PNG, JPEG, BMP, GIF or TIFF file") from error
    with image:
        if image.format == "PNG" and _bit_depth(raw) == 16 and image.mode in ("RGB", "RGBA", "LA"):
            raise UserError(f"{path}: 16-bit colour in PNG files cannot be read at full depth; save it as TIFF")
        if image.format in ("PNG", "GIF") and (frames := getattr(image, "n_frames", 1)) > 1:
            raise UserError(f"{path} is animated, with {frames} frames; save each as a file of its own")
        target = _plain_mode(image, path)
        shape = (image.height, image.width, 1) + ((3,) if target == "RGB" else ())
        dtype = {"L": np.uint8, "RGB": np.uint8, "F": np.float32, "I": np.int32}.get(target, np.uint16)

        def read() -> np.ndarray:
            if image.mode in ("RGBA", "LA", "PA") and image.getchannel("A").getextrema() != (255, 255):
                _note_transparency(path)
            pixels = np.asarray(image if image.mode == target else image.convert(target))
            return pixels.reshape(shape)

        yield _as_shown(path, _Reader(shape, np.dtype(dtype), read), image.getexif().get(_ORIENTATION, 1))


def _as_shown(path: Path, reader: _Reader, orientation: object) -> _Reader:
    """The image turned and mirrored as its orientation tag says; a tag of no meaning counts as none."""
    if not isinstance(orientation, int) or orientation not in _SHOWN:
        return reader
    warn_once(f"turned images in {path.parent}", f"{path} has an orientation tag: it is taken as viewers show it")
    exchanged, down, right = _SHOWN[orientation]
    height, width, *rest = reader.shape

    def read() -> np.ndarray:
        pixels = reader.read()
        return (pixels.swapaxes(0, 1) if exchanged else pixels)[::down, ::right]

    return _Reader((width, height, *rest) if exchanged else reader.shape, reader.dtype, read, int(orientation))


def _bit_depth(raw: BinaryIO) -> int:
    """The bit depth of an open PNG file."""
    position = raw.tell()
    raw.seek(24)
    depth = raw.read(1)[0]
    raw.seek(position)
    return depth


def _plain_mode(image: Image, path: Path) -> str:
    """The mode without palette, transparency and single bits: L, I;16, I, F or RGB."""
    if "transparency" in image.info:
        _note_transparency(path)
    if image.mode in ("1", "L", "LA"):
        return "L"
    if image.mode.startswith("I;16"):
        return image.mode
    if image.mode in ("I", "F"):
        return image.mode
    if image.mode not in ("RGB", "RGBA", "P", "PA"):
        raise UserError(f"{path} has colours of kind {image.mode}, which cannot be read; save it as grey or RGB")
    return "RGB"


def _note_transparency(path: Path) -> None:
    warn_once(f"transparency in {path.parent}", f"{path} has transparent pixels; they keep their colour")


@contextlib.contextmanager
def _tiff(path: Path, raw: BinaryIO) -> Iterator[_Reader]:
    import tifffile

    with tifffile.TiffFile(raw, name=path.name) as file:
        len(file.pages)  # walks the chain of pages once, and ends where it bites its tail; to list them would not end
        whole = [each for each in file.series if not (each.keyframe.subfiletype or 0) & _NO_PAGES] or file.series[:1]
        kinds = list(dict.fromkeys((each.axes, each.shape, each.dtype, each.keyframe.photometric) for each in whole))
        if len(kinds) > 1:
            sizes = " and ".join(f"{' × '.join(map(str, shape))} of {dtype}" for _, shape, dtype, _ in kinds[:2])
            raise UserError(f"{path} holds images that differ, such as {sizes}; save each as a file of its own")
        axes, shape, page = whole[0].axes, whole[0].shape, whole[0].keyframe
        if page.photometric not in _PLAIN_KINDS and (page.photometric, page.compression) not in _CONVERTED:
            kind = getattr(page.photometric, "name", page.photometric)
            raise UserError(f"{path} is a TIFF of kind {kind}, which cannot be read; save it as grey or RGB, or as PNG")
        size = path.stat().st_size
        if (count := sum(each.nbytes for each in whole)) > max(_PLAUSIBLE_BYTES, size * _MOST_EXPANSION):
            raise UserError(f"{path} declares {count >> 20} MB, which {size} bytes cannot hold")
        if "Y" not in axes or "X" not in axes:
            raise UserError(f"{path}: expected an image of rows and columns, got axes {axes} of shape {shape}")
        channel = next((axes.index(name) for name in "SC" if name in axes and shape[axes.index(name)] > 1), None)
        order = [axes.index("Y"), axes.index("X")]
        pages = [axis for axis in range(len(axes)) if axis not in order and axis != channel]
        order += pages + ([] if channel is None else [channel])
        alpha = channel is not None and shape[channel] in (2, 4) and page.extrasamples != ()
        if alpha:
            _note_transparency(path)
        channels = () if channel is None or shape[channel] - alpha == 1 else (shape[channel] - alpha,)
        planes = math.prod(shape[axis] for axis in pages)
        result = (shape[order[0]], shape[order[1]], planes * len(whole), *channels)

        def read() -> np.ndarray:
            try:
                parts = [each.asarray() for each in whole]
            except ValueError as error:
                if "imagecodecs" in str(error):
                    raise UserError(
                        f"{path}: this compression needs imagecodecs: pip install 'fastunet[tiff]'"
                    ) from error
                raise
            laid_out = (*result[:2], planes, *([] if channel is None else [shape[channel]]))
            pixels = np.concatenate([part.transpose(order).reshape(laid_out) for part in parts], axis=2)
            pixels = pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels
            return pixels[..., : channels[0]] if channels else pixels[..., 0] if alpha else pixels

        tag = page.tags.get(_ORIENTATION)
        yield _as_shown(path, _Reader(result, np.dtype(whole[0].dtype), read), tag and tag.value)


@contextlib.contextmanager
def _strict(path: Path) -> Iterator[None]:
    """Refuses what tifffile only logs as an error, such as pages that are cut off; what it logs besides is dropped."""
    logger, thread = logging.getLogger("tifffile"), threading.get_ident()
    errors: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.thread == thread and record.levelno >= logging.ERROR:
            errors.append(record.getMessage())
        return record.thread != thread

    logger.addFilter(collect)
    try:
        yield
    except UserError:
        if not errors:  # else it follows from them
            raise
    finally:
        logger.removeFilter(collect)
    if errors:
        raise UserError(f"{path} is cut short or damaged: {' '.join(errors[0].split())[-120:]}")
