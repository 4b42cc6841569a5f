"""What a run learns with: network, optimiser and loss, and the arithmetic of one step and of one validation batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import fastunet
from fastunet.data.sampling import Batch
from fastunet.errors import UserError
from fastunet.losses import DiceCrossEntropyLoss, DiceLoss
from fastunet.training.checkpoint import ModelCard, Progress
from fastunet.training.config import TrainConfig
from fastunet.training.dataset import TrainingData, architecture_of, centre_crop
from fastunet.training.distributed import Processes
from fastunet.training.precision import autocast, loss_scaler

_STREAM_DROPOUT = 1


@dataclass
class Step:
    """What one optimiser step left behind; on a CUDA device its numbers are not known until somebody waits for them.

    ``report`` holds the loss of the whole batch and the number of processes that want to stop.
    """

    batch: Batch
    report: torch.Tensor
    skipped: bool


class Learner:
    """Model, optimiser, loss scale and loss of one run; it reads and writes no files."""

    def __init__(self, config: TrainConfig, processes: Processes, data: TrainingData) -> None:
        self.config, self.processes, self.data = config, processes, data
        self.device = processes.device
        torch.manual_seed(config.seed)
        self.model = build_model(config, data).to(self.device, memory_format=torch.channels_last)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.learning_rate, fused=True)
        self.scaler = loss_scaler(self.device, config.precision)
        self.loss = _loss(config, processes.world, data.ignored)
        self.card = ModelCard(
            model=self.model.config,
            modalities=data.modalities,
            labels=data.labels.to_dict(),
            size=data.tile or config.size,
            axis=config.axis,
            images=data.train.cases[0].is_image,
        )

    @property
    def learning_rate(self) -> float:
        """That of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def step(
        self, batch: Batch, images: torch.Tensor, labels: torch.Tensor, progress: Progress, total_steps: int, wish: bool
    ) -> Step:
        """One optimiser step; its loss is that of the whole batch, of all processes; ``wish`` is this one's to stop."""
        config = self.config
        images = images.to(self.device, non_blocking=True).to(memory_format=torch.channels_last)
        labels = labels.to(self.device, non_blocking=True)
        images, labels = self.data.augment(images, labels, progress.epoch, batch.positions)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(progress.step, total_steps)
        # Dropout draws from a generator that each batch seeds anew, so no random state has to be saved.
        torch.manual_seed(batch_seed(config.seed, progress.epoch, progress.batch, self.processes.rank))
        with autocast(self.device, config.precision):
            logits = self.model(images)
        loss = self.loss(logits.float(), centre_crop(labels, *logits.shape[-2:]))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        stop = self.processes.sum_gradients(self.parameters, float(wish))
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.is_enabled() and self.scaler.get_scale() < scale
        report = torch.zeros(2, dtype=torch.float64, device=self.device)
        report[0], report[1] = loss.detach(), stop
        return Step(batch, report, skipped)

    @torch.no_grad()
    def validate(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The logits of a batch, its labels where the network predicts, and the loss of the batch of all processes."""
        images = images.to(self.device).to(memory_format=torch.channels_last)
        with autocast(self.device, self.config.precision):
            logits = self.model(images).float()
        labels = centre_crop(labels.to(self.device), *logits.shape[-2:])
        return logits, labels, self.loss(logits, labels)


def build_model(config: TrainConfig, data: TrainingData) -> torch.nn.Module:
    """The untrained network that ``config`` asks for, checked against the size of the slices."""
    channels, classes = len(data.modalities), len(data.labels.class_names)
    model = fastunet.UNet(**architecture_of(config, in_channels=channels, num_classes=classes).as_dict())
    try:
        model.output_size(*data.train.size)
    except ValueError as error:
        raise UserError(str(error)) from error
    return model


def batch_seed(seed: int, epoch: int, batch: int, rank: int) -> int:
    """The seed of what a process draws for one batch, apart from all other batches, epochs and processes."""
    entropy = np.random.SeedSequence([seed, epoch, batch, rank, _STREAM_DROPOUT])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _loss(config: TrainConfig, world: int, ignored: int | None) -> torch.nn.Module:
    # Labels were checked against the label table when they were read; checking again would wait for the GPU.
    options = dict(sync=world > 1, grad_reduction="sum", check_labels=False, ignore_index=ignored)
    if config.loss == "dice":
        return DiceLoss(**options)
    return DiceCrossEntropyLoss(dice_weight=0.0 if config.loss == "ce" else 1.0, **options)
