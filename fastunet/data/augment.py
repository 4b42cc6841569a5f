"""Augmentation of whole batches on their device, the same for a sample whatever batch or process it is in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a sample; intensities are in standard deviations of the brain.

    Attributes:
        flip: mirror along each image axis, each with probability 1/2.
        turn: turn by 0, 90, 180 or 270 degrees, if the slices are square.
        scale: each modality is multiplied by a factor within 1 ± ``scale``.
        shift: each modality is moved within ± ``shift``.
        gamma: contrast curve exponents from 1/(1 + ``gamma``) to 1 + ``gamma``, between a modality's extremes.
        noise: standard deviation of Gaussian noise, from 0 to ``noise``.
        probability: that a sample gets its contrast curve, and independently its noise.
    """

    flip: bool = True
    turn: bool = True
    scale: float = 0.1
    shift: float = 0.1
    gamma: float = 0.3
    noise: float = 0.1
    probability: float = 0.5


def augment(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    seed: int,
    epoch: int,
    positions: Sequence[int] | np.ndarray,
    options: Augmentation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New images (N, M, H, W) and labels (N, H, W), changed at random; background voxels (0) stay 0.

    What happens to a sample follows from (seed, epoch, its position in the epoch's order) alone: ``Batch.positions``.

    Args:
        images: float, normalised, 0 outside the brain.
        labels: class indices of any integer dtype.
        seed: of the whole run.
        epoch: counts from 0.
        positions: N integers.
        options: what may happen; None for the defaults.
    """
    options = options or Augmentation()
    if len(positions) != len(images):
        raise ValueError(f"{len(positions)} positions given for {len(images)} images")
    draw = _Draws(seed, epoch, positions, images.device)
    images, labels = _flip_and_turn(images, labels, draw, options)
    return _change_intensities(images, draw, options), labels


def _flip_and_turn(
    images: torch.Tensor, labels: torch.Tensor, draw: _Draws, options: Augmentation
) -> tuple[torch.Tensor, torch.Tensor]:
    """A turn by k · 90° is a transposition, if k is odd, and mirrorings: each is one select over the batch."""
    quarter = (draw.uniform(1) * 4).long()[:, 0]
    if not options.turn or images.shape[-1] != images.shape[-2]:
        quarter = torch.zeros_like(quarter)
    flips = (draw.uniform(2) < 0.5) & options.flip
    transpose = quarter % 2 == 1
    mirror_rows = flips[:, 0] ^ ((quarter == 1) | (quarter == 2))
    mirror_columns = flips[:, 1] ^ ((quarter == 2) | (quarter == 3))

    def move(batch: torch.Tensor) -> torch.Tensor:
        ones = (1,) * (batch.ndim - 1)
        if images.shape[-1] == images.shape[-2]:
            batch = torch.where(transpose.view(-1, *ones), batch.mT, batch)
        batch = torch.where(mirror_rows.view(-1, *ones), batch.flip(-2), batch)
        return torch.where(mirror_columns.view(-1, *ones), batch.flip(-1), batch)

    return move(images), move(labels)


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

    def __init__(self, seed: int, epoch: int, positions: Sequence[int] | np.ndarray, device: torch.device) -> None:
        self._device = device
        run = _mix(np.uint64(seed % 2**64) ^ _mix(np.uint64(epoch)))
        self._states = _mix(np.asarray(positions, dtype=np.uint64) ^ run)

    def uniform(self, columns: int) -> torch.Tensor:
        """Uniform in [0, 1), float32 (N, columns)."""
        values = np.stack([self._next() >> np.uint64(40) for _ in range(columns)], axis=1)
        return torch.from_numpy(values.astype(np.float32) * np.float32(2**-24)).to(self._device, non_blocking=True)

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


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64-bit integers."""
    x = np.atleast_1d(x)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
