"""Augmentation of whole batches on their device, the same for a sample whatever batch or process it is in."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastunet.arguments import checked
from fastunet.data.elastic import GRID, deform


@checked
@dataclass(frozen=True)
class Augmentation:
    """What may happen to a sample; the defaults suit axial and coronal slices, whose rows run from side to side.

    Intensities are in standard deviations of the brain.

    Attributes:
        flip: image axes along which to mirror, each with probability 1/2: -2 exchanges left and right, -1 columns.
        turn: turn by 0, 90, 180 or 270 degrees, if the slices are square.
        rotate: rotation about the centre within ± ``rotate`` degrees.
        zoom: enlargement by a factor within 1 ± ``zoom``.
        translate: move along each axis within ± ``translate`` of its length.
        mirror: what comes in from outside is the slice mirrored at its border; False: 0, and class 0.
        elastic: the deformation of ``fastunet.data.elastic``, of every sample; what comes in from outside is mirrored.
        scale: each modality is multiplied by a factor within 1 ± ``scale``.
        shift: each modality is moved within ± ``shift``.
        gamma: contrast curve exponents from 1/(1 + ``gamma``) to 1 + ``gamma``, between a modality's extremes.
        noise: standard deviation of Gaussian noise, from 0 to ``noise``.
        probability: that a sample is rotated, zoomed and moved, and independently gets its contrast curve, its noise.
    """

    flip: tuple[int, ...] = (-2,)
    turn: bool = False
    rotate: float = 15.0
    zoom: float = 0.15
    translate: float = 0.05
    mirror: bool = False
    elastic: bool = False
    scale: float = 0.1
    shift: float = 0.1
    gamma: float = 0.3
    noise: float = 0.1
    probability: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.flip, tuple) or not set(self.flip) <= {-2, -1}:
            raise ValueError(f"flip is {self.flip}; image axes are -2 and -1")
        if not 0 <= self.zoom < 1:
            raise ValueError(f"zoom is {self.zoom}; expected at least 0 and less than 1")
        for name in ("rotate", "translate", "scale", "shift", "gamma", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability is {self.probability}; expected 0 to 1")

    @classmethod
    def for_slices(
        cls, *, axis: int = 2, images: bool = False, turns: bool | None = None, elastic: bool | None = None
    ) -> Augmentation:
        """What suits slices along ``axis`` of volumes, or 2-D ``images``, which have no side that is up.

        ``turns``: mirror both axes and turn by 90 degrees; None for images only. Otherwise left and right are
        exchanged, which sagittal slices (axis 0) do not show. ``elastic``: None for images only.
        """
        if axis not in (0, 1, 2):
            raise ValueError(f"axis is {axis}; expected 0, 1 or 2")
        elastic = images if elastic is None else elastic
        if turns or (turns is None and images):
            return cls(flip=(-2, -1), turn=True, mirror=images, elastic=elastic)
        return cls(flip=() if axis == 0 and not images else (-2,), mirror=images, elastic=elastic)


@checked
def augment(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    seed: int,
    epoch: int,
    positions: Sequence[int] | np.ndarray,
    options: Augmentation | None = None,
    weights: torch.Tensor | None = None,
    share: float = 1.0,
) -> tuple[torch.Tensor, ...]:
    """New images (N, M, H, W) and labels (N, H, W), changed at random; intensities of background (0) stay 0.

    Both move together, and so do ``weights``, if they are given, which are then returned as the third; between pixels
    images and weights are interpolated linearly, labels take the nearest.
    What happens to a sample follows from (seed, epoch, its position in the epoch's order) alone: ``Batch.positions``.

    Args:
        images: float, normalised, 0 outside the brain.
        labels: class indices of any integer dtype.
        seed: of the whole run.
        epoch: counts from 0.
        positions: N integers of at least 0.
        options: what may happen; None for the defaults.
        weights: of each pixel, (N, H, W).
        share: of the samples that are changed at all; the others keep their bits.

    Raises:
        ValueError: shapes that do not fit, images that are not floating point, negative numbers.
    """
    options = options or Augmentation()
    if np.shape(positions) != (len(images),):
        raise ValueError(f"positions of shape {np.shape(positions)} given for {len(images)} images")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; expected floating point")
    if images.ndim != 4 or labels.shape != (len(images), *images.shape[2:]):
        raise ValueError(f"images have shape {tuple(images.shape)} and labels {tuple(labels.shape)}; expected "
                         "(N, M, H, W) and (N, H, W)")  # fmt: skip
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; expected {tuple(labels.shape)}, as the labels")
    numbers = np.asarray(positions)
    if epoch < 0 or (numbers.size and (numbers.dtype.kind not in "iu" or numbers.min() < 0)):
        raise ValueError(f"epoch is {epoch}, positions are {reprlib.repr(positions)}; expected integers of at least 0")
    draw = _Draws(seed, epoch, numbers, images.device)
    modalities = images.shape[1]
    if weights is not None:
        images = torch.cat([images, weights[:, None].to(images.dtype)], 1)
    moved, classes = _flip_and_turn(images, labels, draw, options)
    moved, classes = _rotate_and_zoom(moved, classes, draw, options)
    if options.elastic and images.numel():
        moved, classes = deform(moved, classes, draw.normal_like(images.new_empty(len(images), 2, GRID, GRID)))
    moved = torch.cat([_change_intensities(moved[:, :modalities], draw, options), moved[:, modalities:]], 1)
    if share < 1:
        chosen = (draw.uniform(1) < share)[..., None]
        moved, classes = torch.where(chosen[..., None], moved, images), torch.where(chosen, classes, labels)
    return (moved, classes) if weights is None else (moved[:, :modalities], classes, moved[:, modalities])


def _flip_and_turn(
    images: torch.Tensor, labels: torch.Tensor, draw: _Draws, options: Augmentation
) -> tuple[torch.Tensor, torch.Tensor]:
    """A turn by k · 90° is a transposition, if k is odd, and mirrorings: each is one select over the batch."""
    quarter = (draw.uniform(1) * 4).long()[:, 0]
    if not options.turn or images.shape[-1] != images.shape[-2]:
        quarter = torch.zeros_like(quarter)
    flips = draw.uniform(2) < 0.5
    transpose = quarter % 2 == 1
    mirror_rows = (flips[:, 0] & (-2 in options.flip)) ^ ((quarter == 1) | (quarter == 2))
    mirror_columns = (flips[:, 1] & (-1 in options.flip)) ^ ((quarter == 2) | (quarter == 3))

    def move(batch: torch.Tensor) -> torch.Tensor:
        ones = (1,) * (batch.ndim - 1)
        if images.shape[-1] == images.shape[-2]:
            batch = torch.where(transpose.view(-1, *ones), batch.mT, batch)
        batch = torch.where(mirror_rows.view(-1, *ones), batch.flip(-2), batch)
        return torch.where(mirror_columns.view(-1, *ones), batch.flip(-1), batch)

    return move(images), move(labels)


def _rotate_and_zoom(
    images: torch.Tensor, labels: torch.Tensor, draw: _Draws, options: Augmentation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples that are not chosen keep their bits. Products and sums of the grid are elementwise: a matrix product
    could round differently in another batch."""
    (n, _, height, width), dtype = images.shape, torch.promote_types(images.dtype, torch.float32)
    drawn = draw.numbers(5)
    if not (n and height and width and (options.rotate or options.zoom or options.translate)):
        return images, labels
    placed = []
    for choice, *parts in drawn.tolist():
        angle, zoom, down, right = (2 * part - 1 for part in parts)
        angle, zoom = math.radians(options.rotate * angle), 1 + options.zoom * zoom
        moves = options.translate * height * down, options.translate * width * right
        placed.append([choice < options.probability, math.cos(angle) / zoom, math.sin(angle) / zoom, *moves])
    chosen, cosine, sine, down, right = draw.to_device(np.array(placed)).to(dtype).T[..., None, None]
    y = torch.arange(height, dtype=dtype, device=images.device)[:, None] - (height - 1) / 2 - down
    x = torch.arange(width, dtype=dtype, device=images.device) - (width - 1) / 2 - right
    # where each pixel comes from, in the unit of grid_sample: -1 and 1 are the outer borders
    grid = torch.stack([(cosine * x - sine * y) * (2 / width), (cosine * y + sine * x) * (2 / height)], -1)
    padding = "reflection" if options.mirror else "zeros"

    def move(batch: torch.Tensor, mode: str) -> torch.Tensor:
        moved = F.grid_sample(batch.to(dtype), grid, mode=mode, padding_mode=padding, align_corners=False)
        return torch.where(chosen[:, None] > 0, moved.to(batch.dtype), batch)

    return move(images, "bilinear"), move(labels[:, None], "nearest")[:, 0]


def _change_intensities(images: torch.Tensor, draw: _Draws, options: Augmentation) -> torch.Tensor:
    n, modalities = images.shape[:2]
    inside = images != 0

    def symmetric(size: int) -> torch.Tensor:
        return (draw.uniform(size) * 2 - 1).view(n, size, 1, 1).to(images.dtype)

    def chosen() -> torch.Tensor:
        return (draw.uniform(1) < options.probability).view(n, 1, 1, 1)

    exponent = torch.where(chosen(), (1 + options.gamma) ** symmetric(modalities), 1)
    low, high = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    span = (high - low).clamp_min(torch.finfo(images.dtype).tiny)
    changed = ((images - low) / span) ** exponent * span + low
    changed = changed * (1 + options.scale * symmetric(modalities)) + options.shift * symmetric(modalities)
    deviation = torch.where(chosen(), options.noise * draw.uniform(1).view(n, 1, 1, 1), 0).to(images.dtype)
    changed = changed + deviation * draw.normal_like(images)
    return torch.where(inside, changed, 0)


class _Draws:
    """Random numbers that depend on (seed, epoch, position, number of the draw) and on nothing else in the batch."""

    def __init__(self, seed: int, epoch: int, positions: np.ndarray, device: torch.device) -> None:
        self._device = device
        run = _mix(np.uint64(seed % 2**64) ^ _mix(np.uint64(epoch)))
        self._states = _mix(positions.astype(np.uint64) ^ run)

    def numbers(self, columns: int) -> np.ndarray:
        """Uniform in [0, 1), float32 (N, columns), on the host."""
        values = np.stack([self._next() >> np.uint64(40) for _ in range(columns)], axis=1)
        return values.astype(np.float32) * np.float32(2**-24)

    def uniform(self, columns: int) -> torch.Tensor:
        """:meth:`numbers` on the device."""
        return self.to_device(self.numbers(columns))

    def to_device(self, values: np.ndarray) -> torch.Tensor:
        """``values``, without waiting for the device."""
        return torch.from_numpy(values).to(self._device, non_blocking=True)

    def normal_like(self, images: torch.Tensor) -> torch.Tensor:
        """Standard normal in the shape of ``images``."""
        noise = torch.empty(images.shape, dtype=images.dtype, device=self._device)
        generator = torch.Generator(self._device)
        # A generator per sample: one for the batch would give a sample other noise in another batch.
        for sample, state in zip(noise, self._next()):
            sample.normal_(generator=generator.manual_seed(int(state >> np.uint64(1))))
        return noise

    def _next(self) -> np.ndarray:
        self._states = self._states + np.uint64(0x9E3779B97F4A7C15)
        return _mix(self._states)


def _mix(x: Any) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64-bit integers."""
    x = np.atleast_1d(x)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
