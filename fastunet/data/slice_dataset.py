"""``SliceDataset``: labelled 2-D slices of many cases, read from the cache of ``fastunet.data.cache``."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from fastunet.arguments import checked
from fastunet.data.cache import CachedCase, DamagedCacheError, Preparation, cache_case, fields_of
from fastunet.data.case import DEFAULT_MODALITIES, Case, check_modalities
from fastunet.data.sampling import Batch, count_steps, epoch_order, split_into_batches
from fastunet.data.slices import overlap, slice_size
from fastunet.errors import UserError, warn_once
from fastunet.files import make_output_folder

_MOST_WORKERS = 4


@checked
class SliceDataset(torch.utils.data.Dataset[tuple[torch.Tensor, ...]]):
    """Slices of labelled cases as (image float32 (modalities, H, W), labels uint8 (H, W)).

    Labels are class indices, and 255 (``fastunet.data.IGNORED``) where the data say that a pixel counts nowhere.

    Every case is preprocessed once into ``cache_dir``; memory holds no volume afterwards. See ``CaseSlices`` for
    orientation, size and normalisation: both give the same bits.

    Args:
        cases: labelled cases.
        cache_dir: the folder of the preprocessed slices; processes and runs may share it.
        modalities: the channels, in this order.
        size: the side of the slices; None needs cases with slices of one size.
        axis: the slicing axis, 0, 1 or 2 (axial).
        normalise: to mean 0 and standard deviation 1 inside the brain.
        on_nan: see ``read_volume``.
        foreground_fraction: the least share of slices with foreground in a shuffled epoch.
        skip_empty: leave out slices that are 0 everywhere.
        seed: of the order of the slices.
        spacing: see ``CaseSlices``.
        border: keep the term of ``border_weights.border_term`` with each slice, for ``TileDataset``.
        on_progress: called with (cases done, all cases) while preprocessing.

    Raises:
        UserError: bad files, slices of different sizes, or no foreground to draw from.
    """

    def __init__(
        self,
        cases: Iterable[Case],
        *,
        cache_dir: str | Path,
        modalities: Sequence[str] = DEFAULT_MODALITIES,
        size: int | Sequence[int] | None = None,
        axis: int = 2,
        normalise: bool = True,
        on_nan: str = "error",
        foreground_fraction: float | None = None,
        skip_empty: bool = False,
        seed: int = 0,
        spacing: tuple[float, float] | None = None,
        border: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.cases = list(cases)
        self.modalities = tuple(modalities)
        self.foreground_fraction = foreground_fraction
        self.seed = seed
        if not self.cases:
            raise UserError("a data set needs at least one case")
        if foreground_fraction is not None and not 0 <= foreground_fraction <= 1:
            raise UserError(f"the share of slices with foreground is {foreground_fraction}, expected 0 to 1")
        for case in self.cases:
            check_modalities(case, self.modalities)
        self._folder = make_output_folder(cache_dir)
        self._made = Preparation(self.modalities, axis, normalise, on_nan, spacing, border)
        self._cached: list[CachedCase] = []
        with ThreadPoolExecutor(min(_MOST_WORKERS, os.cpu_count() or 1)) as pool:
            for cached in pool.map(self._prepare, self.cases):
                self._cached.append(cached)
                if on_progress is not None:
                    on_progress(len(self._cached), len(self.cases))
        self.size = self._common_size(size)
        ranges = [np.arange(*cached.box[0]) if skip_empty else np.arange(cached.shape[0]) for cached in self._cached]
        self.case_index = np.repeat(np.arange(len(ranges)), [len(numbers) for numbers in ranges])
        self.slice_index = np.concatenate(ranges)
        self.foreground = np.concatenate([cached.foreground[used] for cached, used in zip(self._cached, ranges)])
        if foreground_fraction and not self.foreground.any():
            raise UserError(
                f"none of the {len(self)} slices has foreground to draw a share of {foreground_fraction} from"
            )

    @property
    def fingerprint(self) -> str:
        """A digest of the content of all cases and of the preprocessing: equal data give equal fingerprints."""
        keys = " ".join(cached.key for cached in self._cached)
        return hashlib.blake2b(f"{keys} {self.size} {len(self)}".encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.case_index)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        """Image and labels of one slice; raises ``IndexError`` past the last, which ends a loop."""
        return tuple(part[0] for part in self.load([index]))

    def load(self, indices: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, ...]:
        """A batch: images float32 (n, modalities, H, W) and labels uint8 (n, H, W).

        Raises:
            IndexError: no such slice.
            UserError: a file of the cache is damaged, and the case that it was made from is not there to make it again.
        """
        indices = [operator.index(index) for index in indices]
        images = np.zeros((len(indices), len(self.modalities), *self.size), dtype=np.float32)
        labels = np.zeros((len(indices), *self.size), dtype=np.uint8)
        for image, label, index in zip(images, labels, indices):
            cached = self._cached[self.case_index[index]]
            record = self._record(self.case_index[index], self.slice_index[index])
            if record is not None:
                into, window = self._windows(cached)
                image[(..., *into)] = record["image"][(..., *window)]
                label[into] = record["label"][window]
        return torch.from_numpy(images), torch.from_numpy(labels)

    def read(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """What ``load`` gives for the samples of a batch; errors as there."""
        return self.load(batch.indices)

    def steps(self, batch_size: int, *, world: int = 1) -> int:
        """The steps of an epoch of ``world`` processes with batches of ``batch_size`` each."""
        return count_steps(len(self), batch_size, world)

    def batches(
        self,
        batch_size: int,
        epoch: int = 0,
        *,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        start_batch: int = 0,
    ) -> Iterator[Batch]:
        """The batches of one process in one epoch, to be given to ``read``; see ``split_into_batches``.

        Shuffled epochs (training) follow from ``seed`` and ``epoch`` and have full batches only: the last one begins
        the order again. Otherwise every slice comes once, in order.
        """
        if shuffle:
            order = epoch_order(self.foreground, self.seed, epoch, self.foreground_fraction)
        else:
            order = np.arange(len(self))
        return split_into_batches(
            order, batch_size, rank=rank, world=world, start=start_batch, wrap=shuffle, epoch=epoch
        )

    def whole(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One slice in its own size, whatever the size of the data set: image (modalities, H, W) and labels (H, W).

        Raises:
            IndexError: no such slice.
        """
        image, label, *_ = self._whole(operator.index(index))
        return torch.from_numpy(image), torch.from_numpy(label)

    def _whole(self, index: int) -> list[np.ndarray]:
        """The fields of a record in the slice's own size, 0 outside the box."""
        case, number = self.case_index[index], self.slice_index[index]
        record, cached = self._record(case, number), self._cached[case]
        rows, columns = (slice(*interval) for interval in cached.box[1:])
        planes = []
        for name, kind in fields_of(cached.dtype).items():
            planes.append(np.zeros((*kind.shape[:-2], *cached.shape[1:]), kind.base))
            if record is not None:
                planes[-1][..., rows, columns] = record[name]
        return planes

    def _prepare(self, case: Case) -> CachedCase:
        return cache_case(case, self._folder, self._made)

    def _record(self, case: int, number: int) -> np.void | None:
        """A record of the cache; a damaged file is made again once."""
        try:
            return self._cached[case].record(number)
        except DamagedCacheError as error:
            warn_once(f"damaged cache {self._cached[case].path}", f"{error}; it is made again")
            self._cached[case].discard()
            again = self._prepare(self.cases[case])
            if again.key != self._cached[case].key:
                raise UserError(f"{error}, and the files of case {self.cases[case].name} changed since") from error
            self._cached[case] = again
            return again.record(number)

    def _common_size(self, size: int | Sequence[int] | None) -> tuple[int, int]:
        if size is not None:
            return slice_size(size)
        first = self._cached[0].shape[1:]
        for case, cached in zip(self.cases, self._cached):
            if cached.shape[1:] != first:
                raise UserError(
                    f"slices of {self.cases[0].name} are {first[0]} x {first[1]} and those of {case.name} "
                    f"{cached.shape[1]} x {cached.shape[2]}: give one size for all"
                )
        return first

    def _windows(self, cached: CachedCase) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Where the common part of the cached box and the fitted slice lies in each of the two."""
        into: list[slice] = []
        window: list[slice] = []
        for length, target, (start, stop) in zip(cached.shape[1:], self.size, cached.box[1:]):
            in_target, in_slice = overlap(length, target)
            first, last = max(start, in_slice.start), max(start, in_slice.start, min(stop, in_slice.stop))
            shift = in_target.start - in_slice.start
            into.append(slice(first + shift, last + shift))
            window.append(slice(first - start, last - start))
        return (into[0], into[1]), (window[0], window[1])
