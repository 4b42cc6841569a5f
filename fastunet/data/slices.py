"""2-D slices of volumes: a common orientation, a common size, normalised intensities, one batch at a time."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastunet.arguments import checked
from fastunet.data.case import DEFAULT_MODALITIES, Case, check_axis, check_modalities
from fastunet.data.grids import check_geometry
from fastunet.data.resampling import resample, resampled_shape
from fastunet.data.volumes import Volume, read_volume
from fastunet.errors import UserError

_LARGEST = 2**16
"""Pixels of a slice's side; a float32 slice of that takes 16 GiB."""


def orient(array: np.ndarray, affine: np.ndarray, file: object = "the volume") -> np.ndarray:
    """A view of ``array`` (X, Y, Z) whose axes run to the left, the back and the top of the head, as in BraTS files.

    Axes are matched to the nearest direction, nothing is resampled. Writing to the view writes to ``array``.

    Raises:
        UserError: an affine without three independent finite axes, named by ``file``.
    """
    source, directions = _axes(affine, file)
    view = array.transpose(source)
    # Nibabel counts towards the right, the front and the top of the head; the first two are turned round.
    steps = directions * (-1, -1, 1)
    return view[tuple(slice(None, None, int(step)) for step in steps)]


def slice_spacing(affine: np.ndarray, axis: int, file: object = "the volume") -> tuple[float, float]:
    """Millimetres per pixel, (rows, columns), of the slices along ``axis`` of a volume as ``orient`` turns it."""
    source, _ = _axes(affine, file)
    height, width = np.delete(np.linalg.norm(affine[:3, :3], axis=0)[source], axis)
    return float(height), float(width)


def _axes(affine: np.ndarray, file: object) -> tuple[np.ndarray, np.ndarray]:
    """The voxel axis that runs most nearly to the right, to the front and to the top, and with which sign each does."""
    import nibabel

    directions = nibabel.io_orientation(affine) if np.isfinite(affine).all() else np.full((3, 2), np.nan)
    if np.isnan(directions).any():
        raise UserError(f"{file}: the affine has no three independent axes")
    source = np.argsort(directions[:, 0])
    return source, directions[source, 1]


@checked
def fit_slice(array: np.ndarray, size: int | Sequence[int]) -> np.ndarray:
    """The last two axes cropped or padded with zeros around their centre to ``size``, an integer or (H, W)."""
    target = slice_size(size)
    if array.ndim < 2:
        raise ValueError(f"an array of shape {array.shape} has no slices")
    height, width = array.shape[-2:]
    (into_h, from_h), (into_w, from_w) = overlap(height, target[0]), overlap(width, target[1])
    fitted = np.zeros((*array.shape[:-2], *target), dtype=array.dtype)
    fitted[..., into_h, into_w] = array[..., from_h, from_w]
    return fitted


@checked
def unfit_slice(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Undoes ``fit_slice`` for slices of ``shape`` (H, W): what was padded is cut off, what was cropped becomes 0."""
    return fit_slice(array, shape)


def slice_size(size: Any) -> tuple[int, int]:
    """(height, width) of an integer or a pair of them, from 1 to 2**16; raises ``UserError`` for anything else."""
    try:
        sides = (size, size) if np.ndim(size) == 0 else tuple(size)
        height, width = (operator.index(side) for side in sides)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"the slice size is {reprlib.repr(size)}; expected a whole number or two") from None
    if not (1 <= height <= _LARGEST and 1 <= width <= _LARGEST):
        raise UserError(f"the slice size is {reprlib.repr(size)}; expected 1 to {_LARGEST} pixels")
    return height, width


def overlap(length: int, target: int) -> tuple[slice, slice]:
    """Where the common middle of two centred intervals lies in the target and in the source."""
    common = min(length, target)
    into, start = (target - common) // 2, (length - common) // 2
    return slice(into, into + common), slice(start, start + common)


def mirror(index: np.ndarray, length: int) -> np.ndarray:
    """Indices outside ``0 … length-1`` reflected back at the borders, the border pixel itself not repeated."""
    if length == 1:
        return np.zeros_like(index)
    index = index % (2 * (length - 1))
    return np.asarray(np.minimum(index, 2 * (length - 1) - index))


def brain_statistics(volume: np.ndarray, *, everywhere: bool = False) -> tuple[float, float]:
    """Mean and standard deviation of the non-zero voxels, summed slab by slab in float64; (0, 1) where undefined.

    ``everywhere`` takes the zeros in, as 2-D images need it.
    """
    count, total, squares = 0, 0.0, 0.0
    for slab in np.moveaxis(volume, -1, 0):
        inside = (slab if everywhere else slab[slab != 0]).astype(np.float64)
        count += inside.size
        total += inside.sum()
    if count == 0:
        return 0.0, 1.0
    mean = total / count
    for slab in np.moveaxis(volume, -1, 0):
        squares += (((slab if everywhere else slab[slab != 0]).astype(np.float64) - mean) ** 2).sum()
    deviation = float(np.sqrt(squares / count))
    return float(mean), deviation if deviation > 0 else 1.0


def normalise(slab: np.ndarray, mean: float, deviation: float, *, everywhere: bool = False) -> np.ndarray:
    """``(slab - mean) / deviation`` where ``slab`` is not 0 or ``everywhere``, and 0 elsewhere; float32."""
    scaled = (slab - np.float32(mean)) / np.float32(deviation)
    return scaled if everywhere else np.where(slab != 0, scaled, np.float32(0))


@checked
class CaseSlices:
    """The slices of one case in order, as the network sees them; only the input volumes are held in memory.

    ``place`` puts results back into a volume in the orientation of the files, so that segmentation is::

        slices = CaseSlices(case, modalities, size=128)
        labels = slices.new_volume(np.uint8)
        for start, images in slices.batches(16):
            slices.place(labels, start, predict(images))
        write_labels(path, labels, slices.like, case.label_map)

    Args:
        case: the case; see ``cases_from_files`` for loose files.
        modalities: the channels, in this order.
        size: the side of the slices, cropped or padded around the centre; None leaves them as they are.
        axis: 0 slices from right to left, 1 from front to back, 2 (axial) from bottom to top, in any file orientation.
        normalise: to mean 0 and standard deviation 1 inside the brain, the non-zero voxels of each modality; of a 2-D
            image, over all pixels.
        on_nan: see ``read_volume``.
        everywhere: normalise over all pixels, zeros too; None does so for images.
        spacing: resample slices to these millimetres per pixel (rows, columns), after they are normalised; ``size``
            then crops what results, and ``restore`` brings results back to the pixels of the files.

    Attributes:
        slice_shape: (H, W) of the slices in the files.
        grid: (H, W) after resampling, before ``size``.

    Raises:
        UserError: a missing modality, files on different grids, or a file that cannot be read.
    """

    def __init__(
        self,
        case: Case,
        modalities: Sequence[str] = DEFAULT_MODALITIES,
        *,
        size: int | Sequence[int] | None = None,
        axis: int = 2,
        normalise: bool = True,
        on_nan: str = "error",
        everywhere: bool | None = None,
        spacing: tuple[float, float] | None = None,
    ) -> None:
        if axis not in (0, 1, 2):
            raise ValueError(f"axis is {axis}; expected 0, 1 or 2")
        check_axis(case, axis)
        check_modalities(case, modalities)
        check_geometry(case, modalities, label=False)
        self.case = case
        self.axis = axis
        self._everywhere = case.is_image if everywhere is None else everywhere
        sources = [case.modalities[modality] for modality in modalities]
        volumes = [read_volume(path, on_nan=on_nan, channel=channel) for path, channel in sources]
        self.like: Volume = volumes[0]
        self._stacks = [self.stack(volume.data) for volume in volumes]
        self._statistics = [
            brain_statistics(volume.data, everywhere=self._everywhere) if normalise else None for volume in volumes
        ]
        self.slice_shape: tuple[int, int] = self._stacks[0].shape[1:]
        own = slice_spacing(self.like.affine, axis, self.like.path)
        self.grid = resampled_shape(self.slice_shape, own, spacing, self.like.path)
        self.size = self.grid if size is None else slice_size(size)

    def __len__(self) -> int:
        return len(self._stacks[0])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Slices ``start`` to ``stop`` as float32 (n, modalities, H, W)."""
        n = len(range(*slice(start, stop).indices(len(self))))
        images = np.empty((n, len(self._stacks), *self.slice_shape), dtype=np.float32)
        for channel, (stack, statistics) in enumerate(zip(self._stacks, self._statistics)):
            slab = stack[start:stop]
            if statistics is not None:
                slab = normalise(slab, *statistics, everywhere=self._everywhere)
            images[:, channel] = slab
        images = resample(images, self.grid)
        return images if self.size == self.grid else fit_slice(images, self.size)

    def occupied(self) -> np.ndarray:
        """Where any modality is not 0, bool (slices, H, W) before cropping or padding; of an image, everywhere."""
        if self.case.is_image:
            return np.ones(self._stacks[0].shape, bool)
        found: np.ndarray = np.logical_or.reduce([stack != 0 for stack in self._stacks])
        if self.grid == self.slice_shape:
            return found
        return np.asarray(resample(found[None].astype(np.float32), self.grid)[0] > 0)

    def batches(self, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (index of the first slice, slices as ``read`` gives them) over the whole case."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        for start in range(0, len(self), batch_size):
            yield start, self.read(start, start + batch_size)

    def restore(self, maps: np.ndarray) -> np.ndarray:
        """Float32 results (n, C, H, W) for slices as ``read`` gives them, on the pixels of the files, linearly."""
        return resample(maps if self.size == self.grid else unfit_slice(maps, self.grid), self.slice_shape)

    def new_volume(self, dtype: np.typing.DTypeLike) -> np.ndarray:
        """Zeros in the shape and orientation of the case's files, for ``place`` to fill."""
        return np.zeros(self.like.data.shape, dtype=dtype, order="F")

    def place(self, volume: np.ndarray, start: int, batch: np.ndarray) -> None:
        """Writes a batch (n, H, W) of per-pixel results for the slices from ``start`` on into ``volume`` (X, Y, Z).

        Raises:
            ValueError: slices that the case does not have; or slices were resampled, and results were not brought back
                by ``restore``.
        """
        if not 0 <= start <= len(self) - len(batch):
            raise ValueError(f"slices {start} to {start + len(batch) - 1} are not among the {len(self)} of the case")
        if self.grid != self.slice_shape and batch.shape[1:] != self.slice_shape:
            raise ValueError(f"results of shape {batch.shape[1:]} do not fit {self.slice_shape}: restore them")
        self.stack(volume)[start : start + len(batch)] = unfit_slice(batch, self.slice_shape)

    def stack(self, volume: np.ndarray) -> np.ndarray:
        """A view of ``volume`` (X, Y, Z), stored like the case's files, as slices (n, H, W) in `read`'s order."""
        slices = np.moveaxis(orient(volume, self.like.affine, self.like.path), self.axis, 0)
        return slices if self.case.pages is None else slices[slice(*self.case.pages)]
