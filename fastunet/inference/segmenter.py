"""Segmentation of whole cases, slice batch by slice batch: no array of classes × volume ever exists."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from fastunet.architecture import Architecture
from fastunet.arguments import checked
from fastunet.data import Case, CaseSlices, LabelMap, write_labels, write_map
from fastunet.data.formats import is_image, stem_of
from fastunet.data.image_files import MAP_SUFFIX
from fastunet.errors import DataWarning, UserError, is_out_of_memory
from fastunet.functional.segmentation_head import finish
from fastunet.inference.tiles import segment_tiled
from fastunet.outputs import name_for_file
from fastunet.training.checkpoint import ModelCard
from fastunet.training.precision import autocast
from fastunet.unet import UNet

Progress = Callable[[int, int], None]


@checked
@dataclass
class Segmenter:
    """A network and how to run it.

    Attributes:
        model: the network, in evaluation mode, on ``device``.
        card: its card, for modalities, axis and labels.
        device: where it runs.
        batch_size: slices at a time.
        precision: "fp32", "tf32", "bf16" or "fp16".
        tile: side of the overlap-tile input. None runs whole slices under "same" padding; under "valid" padding, with
            mirrored borders, in tiles no larger than those of the training on images, which changes no result.
        tta: average the probabilities of each slice over its mirror images along the axes that training mirrored
            (none, each of them, both): every copy is predicted, tile by tile if need be, and mirrored back.

    Raises:
        UserError: ``tta`` for a network that was trained without mirrored slices.
    """

    model: torch.nn.Module
    card: ModelCard
    device: torch.device
    batch_size: int = 4
    precision: str = "fp32"
    tile: int | None = None
    tta: bool = False

    def __post_init__(self) -> None:
        if self.tta and not self.card.flips:
            seen = "this network was trained without mirrored slices, which it would take for others"
            raise UserError(f"--tta: {seen} (--no-augment, sagittal slices, or too short a run)")
        self._network: Any = self.model.freeze() if isinstance(self.model, UNet) else self.model
        self._format = torch.channels_last
        if isinstance(self.model, UNet):
            self._format = self.model.fastest_format(self.device)
        self._architecture = cast(Architecture, self.model.architecture)
        self._painted = self.label_map.painted if self.card.regions else None

    @property
    def label_map(self) -> LabelMap:
        """The label table of the training data."""
        return self.card.label_map

    def truth_table(self, case: Case) -> LabelMap | None:
        """The table by which the label file of ``case`` is read in the model's classes; None if its classes are others.

        Masks have no table of their own but the values found in a folder, which may lack some: for images it is the
        model's, if that has all of them; of masks of one class each, if it has all names.
        """
        table = self.label_map
        if case.masks:
            return table if set(case.label_map.class_names) <= set(table.class_names) else None
        if case.is_image and set(case.label_map.values) <= {*table.values, table.ignore}:
            return table
        own = case.label_map
        if table.ignore is not None and own.ignore is None and table.ignore not in own.values:
            own = own.ignoring(table.ignore)
        return own if own.class_names == table.class_names else None

    def open(self, case: Case, *, on_nan: str = "error") -> CaseSlices:
        """The slices of ``case`` as this network wants them, uncropped."""
        card = self.card
        return CaseSlices(case, card.modalities, axis=card.axis, on_nan=on_nan, everywhere=card.images,
                          spacing=card.spacing)  # fmt: skip

    def labels(self, slices: CaseSlices, progress: Progress | None = None) -> np.ndarray:
        """The predicted classes of a case, uint8 in the shape and orientation of its files."""
        volume = slices.new_volume(np.uint8)
        for start, images in slices.batches(self.batch_size):
            if slices.grid == slices.slice_shape:
                slices.place(volume, start, self.predict(images))
            else:
                slices.place(volume, start, self.restored(slices, images)[0])
            if progress:
                progress(start + len(images), len(slices))
        return volume

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Classes, uint8 (N, H, W), of float32 images (N, C, H, W)."""
        return self._in_parts(self._predict, images)[0]

    def probabilities(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Classes, uint8 (N, H, W), and probabilities, float32 (N, classes or regions, H, W)."""
        labels, maps = self._in_parts(self._probabilities, images)
        return labels, maps

    def restored(self, slices: CaseSlices, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`probabilities` of slices that were read from ``slices``, on the pixels of the files.

        Where slices were resampled, probabilities are brought back linearly, and classes follow from them.
        """
        labels, maps = self.probabilities(images)
        if slices.grid == slices.slice_shape:
            return labels, maps
        maps = slices.restore(maps)
        return self._classes(maps), maps

    def _classes(self, maps: np.ndarray) -> np.ndarray:
        """The classes of probabilities (N, classes or regions, H, W): the greatest, or what the regions paint."""
        if self._painted is None:
            return np.asarray(maps.argmax(1), np.uint8)
        return self.label_map.decode_regions(maps.swapaxes(0, 1) > 0.5)

    def _in_parts(
        self, compute: Callable[[np.ndarray], tuple[np.ndarray, ...]], images: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """``compute`` of as many images at a time as the device's memory takes, which is found out."""
        results: list[tuple[np.ndarray, ...]] = []
        done = 0
        while not results or done < len(images):
            part = images[done : done + self.batch_size]
            try:
                results.append(compute(part))
                done += len(part)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    needs = f"one slice of {part.shape[2:]} needs more memory than {self.device} has"
                    raise UserError(f"{needs}; --tile runs it in parts") from None
                self.batch_size = len(part) // 2
                text = f"{self.device} has no memory for {len(part)} slices at a time; going on with {self.batch_size}"
                warnings.warn(text, DataWarning, stacklevel=4)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        return tuple(map(np.concatenate, zip(*results))) if len(results) > 1 else results[0]

    @torch.inference_mode()
    def _predict(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        if self.tta:
            return self._averaged(images)[:1]
        out = np.empty((len(images), *images.shape[2:]), dtype=np.uint8)
        predict = self._network.predict if self._painted is None else self._network.predict_regions
        for rows, columns, result in self._run(predict, images):
            out[:, rows, columns] = result.cpu().numpy()
        return (out if self._painted is None else self._painted[out],)

    @torch.inference_mode()
    def _probabilities(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.tta:
            return self._averaged(images)
        labels = np.empty((len(images), *images.shape[2:]), dtype=np.uint8)
        maps = np.empty((len(images), len(self.label_map.outputs), *images.shape[2:]), dtype=np.float32)
        for rows, columns, logits in self._run(self._network, images):
            # The labels come from the logits, as in predict(): probabilities that round to the same value would tie.
            if self._painted is None:
                found, probabilities = logits.argmax(1), logits.float().softmax(1)
            else:
                found, probabilities = finish(logits, "regions"), logits.float().sigmoid()
            labels[:, rows, columns] = found.cpu().numpy()
            maps[:, :, rows, columns] = probabilities.cpu().numpy()
        return labels if self._painted is None else self._painted[labels], maps

    def _proba(self, images: torch.Tensor) -> Any:
        return self._network.predict_proba(images) if self._painted is None else self._network(images).float().sigmoid()

    @torch.inference_mode()
    def _averaged(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        axes = self.card.flips
        copies = [subset for n in range(len(axes) + 1) for subset in itertools.combinations(axes, n)]
        maps = np.empty((len(images), len(self.label_map.outputs), *images.shape[2:]), dtype=np.float32)
        total = np.zeros_like(maps)
        for copy in copies:
            mirrored = np.flip(images, copy).copy()
            for rows, columns, result in self._run(self._proba, mirrored):
                maps[:, :, rows, columns] = result.float().cpu().numpy()
            total += np.flip(maps, copy)
        total /= len(copies)
        return self._classes(total), total

    def _run(
        self, forward: Callable[[torch.Tensor], torch.Tensor], images: np.ndarray
    ) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        batch = torch.from_numpy(images).to(self.device).to(memory_format=self._format)
        with autocast(self.device, self.precision):
            if self.tile is None and self._architecture.padding == "same":
                yield slice(None), slice(None), forward(batch)
            else:
                largest = self.card.size if self.card.images else None
                yield from segment_tiled(forward, self._architecture, batch, self.tile, largest)


@checked
def write_case(
    segmenter: Segmenter, slices: CaseSlices, target: Path, *, probabilities: bool, progress: Progress | None = None
) -> np.ndarray:
    """Segments a case into the label file ``target`` and returns the classes.

    With ``probabilities`` a float32 map per class, or region, goes beside it, ``<name>_prob_<class>.nii.gz``, or
    ``.tif`` for images. Maps are kept on disk until a class is complete, so that memory holds one class at a time.
    """
    if not probabilities:
        labels = segmenter.labels(slices, progress)
        write_labels(target, labels, slices.like, segmenter.label_map)
        return labels
    names = segmenter.label_map.outputs
    with contextlib.ExitStack() as stack:
        labels = slices.new_volume(np.uint8)
        try:
            # Nameless files: gone when this process is, however it ends.
            spools = [stack.enter_context(tempfile.TemporaryFile(dir=target.parent)) for _ in names]
            for start, images in slices.batches(segmenter.batch_size):
                classes, maps = segmenter.restored(slices, images)
                slices.place(labels, start, classes)
                for index, spool in enumerate(spools):
                    spool.write(maps[:, index].tobytes())
                if progress:
                    progress(start + len(images), len(slices))
            for name, spool in zip(names, spools, strict=True):
                write_map(probability_path(target, name), _gather(slices, spool, segmenter.batch_size), slices.like)
        except OSError as error:
            raise UserError(f"cannot write to {target.parent}: {error.strerror}") from error
    write_labels(target, labels, slices.like, segmenter.label_map)
    return labels


@checked
def probability_path(target: Path, class_name: str) -> Path:
    """Where the probabilities of a class go, beside the label file ``target``."""
    suffix = MAP_SUFFIX if is_image(target) else ".nii.gz"
    return target.with_name(f"{stem_of(target)}_prob_{name_for_file(class_name)}{suffix}")


def _gather(slices: CaseSlices, spool: IO[bytes], batch_size: int) -> np.ndarray:
    """The volume whose slices were written to ``spool`` one after the other."""
    volume = slices.new_volume(np.float32)
    height, width = slices.slice_shape
    spool.seek(0)
    for start in range(0, len(slices), batch_size):
        count = min(batch_size, len(slices) - start)
        data = spool.read(4 * count * height * width)
        slices.place(volume, start, np.frombuffer(data, dtype=np.float32).reshape(count, height, width))
    return volume
