"""What a run learns with: network, optimiser and loss, and the arithmetic of one step and of one validation batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastunet.data.sampling import Batch
from fastunet.errors import UserError
from fastunet.functional.segmentation_head import finish
from fastunet.inspection.memory import inference_bytes
from fastunet.losses import DiceCrossEntropyLoss, RegionDiceCrossEntropyLoss
from fastunet.reference import centre_crop
from fastunet.training.checkpoint import ModelCard, Progress
from fastunet.training.config import TrainConfig
from fastunet.training.dataset import TrainingData
from fastunet.training.distributed import Processes, memory_of
from fastunet.training.plan import architecture_of
from fastunet.training.precision import autocast, loss_scaler
from fastunet.unet import UNet

_STREAM_DROPOUT = 1
_BYTES_PER_PARAMETER = 16  # float32: the weight, its gradient and AdamW's two moments


@dataclass
class Step:
    """What one optimiser step left behind; on a CUDA device its numbers are not known until somebody waits for them.

    ``report`` holds the loss of the whole batch and the number of processes that want to stop.
    """

    batch: Batch
    report: torch.Tensor
    skipped: bool


class Learner:
    """Model, optimiser, loss scale and loss of one run; it reads and writes no files.

    Attributes:
        model: the network that learns.
        average: its averaged weights, or None.
    """

    def __init__(self, config: TrainConfig, processes: Processes, data: TrainingData) -> None:
        self.config, self.processes, self.data = config, processes, data
        self.device = processes.device
        torch.manual_seed(config.seed)
        self.model = build_model(config, data, self.device)
        self.model.sync_norms = processes.world > 1
        self.format = self.model.fastest_format(self.device)
        self.model.to(self.device, memory_format=self.format)  # type: ignore[call-overload]
        self.parameters = list(self.model.parameters())
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.ema else None
        # Without decay AdamW computes what Adam does.
        rate, decay = config.learning_rate, config.weight_decay
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=decay, fused=True)
        self.scaler = loss_scaler(self.device, config.precision)
        self.loss = _loss(config, processes, data, class_weights(config, data))
        self.painted = torch.from_numpy(data.labels.painted).to(self.device)
        self.card = ModelCard(
            model=self.model.config,
            modalities=data.modalities,
            labels=data.labels.to_dict(),
            regions=bool(data.labels.region_order),
            size=data.tile or config.size,
            axis=config.axis,
            images=data.train.cases[0].is_image,
            spacing=data.spacing,
        )

    @property
    def learning_rate(self) -> float:
        """That of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def result(self) -> UNet:
        """The network that is validated and saved: with averaged weights, if the run has them."""
        return self.model if self.average is None else self.average

    def step(
        self,
        batch: Batch,
        images: torch.Tensor,
        labels: torch.Tensor,
        *border: torch.Tensor,
        progress: Progress,
        steps: int,
        wishes: Callable[[], bool],
    ) -> Step:
        """One optimiser step; its loss is that of the whole batch, of all processes.

        ``border`` is the term of ``border_weights.border_term``, if the run uses it; ``steps`` is the number in an
        epoch, and ``wishes`` is asked, once the gradients are there, whether this process wants to stop.
        """
        config = self.config
        images = images.to(self.device, non_blocking=True).to(memory_format=self.format)
        others = [part.to(self.device, non_blocking=True) for part in (labels, *border)]
        images, labels, *terms = self.data.augment(images, *others, epoch=progress.epoch, positions=batch.positions)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(progress.step, steps)
        # Dropout draws from a generator that each batch seeds anew, so no random state has to be saved.
        torch.manual_seed(batch_seed(config.seed, progress.epoch, progress.batch, self.processes.rank))
        with autocast(self.device, config.precision):
            logits = self.model(images)
        labels, *terms = (centre_crop(part, *logits.shape[-2:]) for part in (labels, *terms))
        loss = self.loss(logits.float(), labels, *(self._pixel_weights(labels, term) for term in terms))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        stop = self.processes.sum_gradients(self.parameters, float(wishes()))
        if config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, config.clip_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None and config.ema is not None:
            update_average(self.average, self.model, config.ema, progress.step)
        skipped = self.scaler.is_enabled() and self.scaler.get_scale() < scale
        report = torch.zeros(2, dtype=torch.float64, device=self.device)
        report[0], report[1] = loss.detach(), stop
        return Step(batch, report, skipped)

    def _pixel_weights(self, labels: torch.Tensor, border: torch.Tensor) -> torch.Tensor:
        """``w_c(x) + border``, with w_c the weight of a pixel's class; of pixels that are ignored it is any number."""
        weights: Any = self.loss.class_weights
        return border + (1 if weights is None else weights[labels.long().clamp(max=len(weights) - 1)])

    @torch.no_grad()
    def validate(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of a batch (for regions: predicted classes), its labels there, and the loss of all processes."""
        images = images.to(self.device).to(memory_format=self.format)
        with autocast(self.device, self.config.precision):
            logits = self.result(images).float()
        labels = centre_crop(labels.to(self.device), *logits.shape[-2:])
        loss = self.loss(logits, labels)
        if self.data.labels.region_order:
            return self.painted[finish(logits, "regions").long()], labels, loss
        return logits, labels, loss


def build_model(config: TrainConfig, data: TrainingData, device: torch.device) -> UNet:
    """The untrained network that ``config`` asks for, checked against the size of the slices and the memory."""
    channels, classes = len(data.modalities), len(data.labels.outputs)
    options = architecture_of(config, in_channels=channels, num_classes=classes).as_dict()
    with torch.device("meta"):
        planned = UNet(**options)
    count = sum(parameter.numel() for parameter in planned.parameters())
    needed, memory = count * _BYTES_PER_PARAMETER, memory_of(device)
    if needed > memory:  # a process that fills it would be killed without a word
        raise UserError(
            f"a network of {count:,} parameters takes {needed >> 30} GB to train, and {device} has {memory >> 30}; "
            "a smaller --depth or --width takes less"
        )
    try:
        planned.output_size(*data.train.size)
    except ValueError as error:
        raise UserError(str(error)) from error
    batch = torch.empty(config.batch_size, channels, *data.train.size, device="meta")
    maps = inference_bytes(planned, batch)[1] // (1 if config.precision in ("fp32", "tf32") else 2)
    if maps > memory:  # the gradients need every map of a step; they take as much again
        height, width = data.train.size
        raise UserError(
            f"the maps of {config.batch_size} images of {height}×{width} take {maps >> 30} GB, and {device} has "
            f"{memory >> 30}; a smaller --size or --batch-size takes less"
        )
    return UNet(**options)


def batch_seed(seed: int, epoch: int, batch: int, rank: int) -> int:
    """The seed of what a process draws for one batch, apart from all other batches, epochs and processes."""
    entropy = np.random.SeedSequence([seed, epoch, batch, rank, _STREAM_DROPOUT])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float, step: int) -> None:
    """``average = d · average + (1 - d) · model`` for all parameters, with d = min(decay, (1 + step) / (10 + step)).

    The second bound lets the average of a young run forget the random weights it began with. Buffers are copied.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)


def class_weights(config: TrainConfig, data: TrainingData) -> list[float] | None:
    """The factors of ``--class-weights``; "balanced" ones are inverse to the pixels of each class, with mean 1.

    Where regions are trained, they are those of the regions.

    Raises:
        UserError: a class without pixels to balance.
    """
    names, weights = data.labels.outputs, config.class_weights
    if weights == "balanced":
        counts = np.zeros(256, dtype=np.int64)
        # Of an image cut into tiles each is an entry: count it once.
        slices = np.stack([data.train.case_index, data.train.slice_index])
        for index in np.unique(slices, axis=1, return_index=True)[1]:
            counts += np.bincount(data.train.whole(index)[1].flatten().numpy(), minlength=256)
        if data.labels.region_order:
            counts = np.array([counts[list(members)].sum() for members in data.labels.regions.values()])
        counts = counts[: len(names)]
        if not counts.all():
            missing = names[int(np.argmin(counts))]
            raise UserError(f"--class-weights balanced: no training slice holds {missing}; give the weights as numbers")
        return [float(factor) for factor in 1 / counts / np.mean(1 / counts)]
    return weights


def _loss(
    config: TrainConfig, processes: Processes, data: TrainingData, weights: list[float] | None
) -> DiceCrossEntropyLoss | RegionDiceCrossEntropyLoss:
    # Labels were checked against the label table when they were read; checking again would wait for the GPU.
    options: dict[str, Any] = dict(
        sync=processes.world > 1, grad_reduction="sum", check_labels=False, ignore_index=data.ignored,
        ce_weight=float(config.loss != "dice"), dice_weight=float(config.loss != "ce"),
        tversky=config.tversky or (0.5, 0.5),
    )  # fmt: skip
    if data.labels.region_order:
        regions, classes = list(data.labels.regions.values()), len(data.labels.class_names)
        regional = RegionDiceCrossEntropyLoss(regions, num_classes=classes, region_weights=weights, **options)
        return regional.to(processes.device)
    return DiceCrossEntropyLoss(class_weights=weights, **options).to(processes.device)
