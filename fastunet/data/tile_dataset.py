"""``TileDataset``: square tiles of 2-D images of any sizes, mirrored at their borders (Ronneberger et al. 2015)."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from fastunet.data.cache import fields_of
from fastunet.data.case import Case
from fastunet.data.labels import IGNORED
from fastunet.data.sampling import Batch
from fastunet.data.slice_dataset import SliceDataset
from fastunet.data.slices import mirror


class TileDataset(SliceDataset):
    """Tiles of images as (image float32 (modalities, size, size), labels uint8 (size, size)[, border term float32]).

    Beyond its borders an image goes on as its mirror image. ``load`` gives the tiles whose middle ``output`` pixels
    cover every image once, labels elsewhere ``IGNORED``. ``read`` gives them at random places if ``random``: as many
    an epoch as cover the images, each a function of (seed, epoch, position), its middle inside the image where it fits.

    Args:
        cases: labelled cases; those of one image, or of a stack of them.
        size: the side of the tiles, the input of the network.
        output: the side of the middle of a tile that the network predicts; all of it for "same" convolutions.
        random: whether ``read`` draws places. A tile holds foreground with a probability of at least
            ``foreground_fraction``.
        options: those of ``SliceDataset``.

    Raises:
        UserError: as ``SliceDataset``, but for slices of different sizes.
    """

    def __init__(self, cases: Iterable[Case], *, size: int, output: int, random: bool = False, **options: Any) -> None:
        super().__init__(cases, size=size, **options)
        self.output = output
        self._random = random
        self._border = (size - output) // 2
        corners = [
            [(top, left) for top in range(0, height, output) for left in range(0, width, output)]
            for height, width in (self._cached[case].shape[1:] for case in self.case_index)
        ]
        tiles = [len(of_slice) for of_slice in corners]
        self._corners = np.concatenate(corners)
        self.case_index, self.slice_index, self.foreground = (
            np.repeat(each, tiles) for each in (self.case_index, self.slice_index, self.foreground)
        )
        # Of the samples of an epoch this share has foreground somewhere in its image; see ``epoch_order``.
        wanted = self.foreground_fraction or 0.0
        self._centred = wanted / max(wanted, self.foreground.mean()) if wanted else 0.0

    def load(self, indices: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, ...]:
        """The tiles that cover the images, a batch; errors as in ``SliceDataset.load``."""
        batch = self._room(len(indices))
        for *tile, index in zip(*batch, map(operator.index, indices)):
            label = tile[1]
            self._cut(self._whole(index), self._corners[index], tile)
            shape = self._cached[self.case_index[index]].shape[1:]
            rows, columns = (
                (pixel >= start) & (pixel < min(length, start + self.output))
                for pixel, start, length in zip(self._pixels(self._corners[index]), self._corners[index], shape)
            )
            label[~(rows[:, None] & columns)] = IGNORED
        return tuple(map(torch.from_numpy, batch))

    def read(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The tiles of a batch, at random places if the data set is so; shapes and errors as in ``load``."""
        if not self._random:
            return self.load(batch.indices)
        tiles = self._room(len(batch.indices))
        for *tile, index, position in zip(*tiles, batch.indices, batch.positions):
            rng = np.random.default_rng([self.seed, batch.epoch, position])
            planes = self._whole(index)
            self._cut(planes, self._random_corner(rng, planes[1]), tile)
        return tuple(map(torch.from_numpy, tiles))

    def _room(self, count: int) -> list[np.ndarray]:
        """Of each field of a record, room for ``count`` tiles."""
        kinds = fields_of(self._cached[0].dtype).values()
        return [np.empty((count, *kind.shape[:-2], *self.size), kind.base) for kind in kinds]

    def _random_corner(self, rng: np.random.Generator, classes: np.ndarray) -> np.ndarray:
        """Where the middle of a tile begins: around a pixel of foreground, or anywhere."""
        spare = np.array(classes.shape) - self.output
        least, most = np.minimum(spare, 0), np.maximum(spare, 0)
        if rng.random() < self._centred:
            inside = np.flatnonzero((classes != 0) & (classes != IGNORED))
            if inside.size:
                pixel = np.array(np.unravel_index(rng.choice(inside), classes.shape))
                return np.clip(pixel - rng.integers(0, self.output, 2), least, most)
        return np.asarray(rng.integers(least, most + 1))

    def _cut(self, planes: Sequence[np.ndarray], corner: np.ndarray, tile: Sequence[np.ndarray]) -> None:
        """Writes the tile whose middle begins at ``corner``, of each field of a record, into ``tile``."""
        rows, columns = (mirror(pixel, length) for pixel, length in zip(self._pixels(corner), planes[1].shape))
        for part, plane in zip(tile, planes):
            part[:] = plane[..., rows[:, None], columns]

    def _pixels(self, corner: np.ndarray) -> list[np.ndarray]:
        """The rows and the columns of the image that a tile covers, those beyond its borders too."""
        return [np.arange(side) + start - self._border for side, start in zip(self.size, corner)]
