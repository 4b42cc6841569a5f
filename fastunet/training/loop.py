"""The training loop: epochs of steps, validation, checkpoints, and a log that always agrees with them."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

import fastunet
from fastunet.data import IGNORED
from fastunet.errors import UserError
from fastunet.files import make_output_folder
from fastunet.losses import DiceCrossEntropyLoss, DiceLoss
from fastunet.metrics import SegmentationMetrics
from fastunet.training import checkpoint
from fastunet.training.checkpoint import BEST, LAST, STATE, ModelCard, Progress
from fastunet.training.config import FILE_NAME, TrainConfig
from fastunet.training.dataset import TrainingData, centre_crop, prepare_data
from fastunet.training.display import Display
from fastunet.training.distributed import Processes
from fastunet.training.loading import prefetched
from fastunet.training.precision import autocast, loss_scaler, prepare
from fastunet.training.results import CURVES, LOG, metric_columns, write_curves, write_log

FILES = (FILE_NAME, LOG, CURVES, BEST, LAST, STATE)
"""What a run folder holds beside its cache."""
_SECONDS_BETWEEN_CURVES = 30.0
_STREAM_DROPOUT = 1


def train(config: TrainConfig, run: Path, processes: Processes, *, resume: bool = False, quiet: bool = False) -> None:
    """Trains as ``config`` says, in the run folder ``run``; with ``resume`` from where its state left off.

    Every ``torchrun`` process calls this; the leader alone writes ``config.json``, ``log.csv``, ``curves.png``,
    ``best.safetensors``, ``last.safetensors`` and ``state.safetensors``.

    Raises:
        UserError: data, options, checkpoint or output folder cannot be used.
    """
    if processes.leader:
        make_output_folder(run)
    processes.barrier()
    prepare(processes.device, config.precision, deterministic=config.deterministic)
    display = Display(quiet=quiet or not processes.leader)
    data = prepare_data(config, [run / name for name in FILES], run / "cache", processes, display)
    trainer = Trainer(config, run, processes, data, display)
    if resume and (run / STATE).is_file():
        trainer.restore()
    elif processes.leader:
        config.write(run)
    trainer.fit()


class Trainer:
    """Model, optimiser and progress of one run."""

    def __init__(
        self, config: TrainConfig, run: Path, processes: Processes, data: TrainingData, display: Display
    ) -> None:
        self.config, self.run, self.processes, self.data, self.display = config, run, processes, data, display
        self.device = processes.device
        torch.manual_seed(config.seed)
        self.model = build_model(config, data).to(self.device)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.learning_rate, fused=True)
        self.scaler = loss_scaler(self.device, config.precision)
        ignored = IGNORED if data.labels.ignore is not None else None
        self.loss = _loss(config, processes.world, ignored)
        self.progress = Progress(fingerprint=data.fingerprint)
        self.card = ModelCard(
            model=self.model.config,
            modalities=data.modalities,
            labels=data.labels.to_dict(),
            size=config.size,
            axis=config.axis,
            images=data.train.cases[0].is_image,
        )
        self._saved_at = self._drawn_at = time.monotonic()

    def fit(self) -> None:
        """Runs the epochs that are left."""
        config, progress = self.config, self.progress
        steps = self.data.train.steps(config.batch_size, world=self.processes.world)
        while progress.epoch < config.epochs:
            self._train_epoch(steps)
            row = self._finish_epoch(steps)
            self.display.message(
                f"epoch {row['epoch']}/{config.epochs}: loss {row['train_loss']:.4f}, validation loss "
                f"{row['val_loss']:.4f}, Dice {row['dice_foreground']:.3f}, {row['slices_per_second']:.1f} slices/s, "
                f"{100 * row['data_wait_share']:.0f} % waiting for data"
            )
        self._publish(curves=True)

    def restore(self) -> None:
        """Continues from the saved state."""
        path = self.run / STATE
        self.progress = checkpoint.load_state(path, self.model, self.optimizer, self.scaler)
        if self.progress.fingerprint != self.data.fingerprint:
            raise UserError(f"{path} was trained on other data than {self.config.data} holds now")
        self.display.message(f"resuming at epoch {self.progress.epoch + 1}, batch {self.progress.batch + 1}")
        self._publish()

    def _train_epoch(self, steps: int) -> None:
        config, progress, data = self.config, self.progress, self.data.train
        order = data.batches(config.batch_size, progress.epoch, rank=self.processes.rank, world=self.processes.world,
                             start_batch=progress.batch)  # fmt: skip
        batches = ((batch.positions, *data.load(batch.indices)) for batch in order)
        self.model.train()
        self.display.start(f"epoch {progress.epoch + 1}/{config.epochs}", steps, progress.batch)
        loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=self.device)
        with closing(prefetched(batches)) as loader:
            clock = time.perf_counter()
            for (positions, images, labels), waited in loader:
                loss = self._step(positions, images, labels, steps)
                loss_sum += loss
                progress.batch += 1
                progress.step += 1
                now = time.perf_counter()
                progress.seconds, progress.waited, clock = progress.seconds + now - clock, progress.waited + waited, now
                self.display.step(len(images), waited, loss.item() if self.display.wants_loss else None)
                if time.monotonic() - self._saved_at >= config.checkpoint_every and progress.batch < steps:
                    progress.loss_sum = loss_sum.item()
                    self._save_state()
        progress.loss_sum = loss_sum.item()
        self.display.stop()

    def _step(self, positions: np.ndarray, images: torch.Tensor, labels: torch.Tensor, steps: int) -> torch.Tensor:
        """One optimiser step; returns the loss of the whole batch, of all processes."""
        config, progress = self.config, self.progress
        images = images.to(self.device, non_blocking=True).to(memory_format=torch.channels_last)
        labels = labels.to(self.device, non_blocking=True)
        images, labels = self.data.augment(images, labels, progress.epoch, positions)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(progress.step, steps * config.epochs)
        # Dropout draws from a generator that each batch seeds anew, so no random state has to be saved.
        torch.manual_seed(batch_seed(config.seed, progress.epoch, progress.batch, self.processes.rank))
        with autocast(self.device, config.precision):
            logits = self.model(images)
        loss = self.loss(logits.float(), centre_crop(labels, *logits.shape[-2:]))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.processes.sum_gradients(self.parameters)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach().double()

    def _finish_epoch(self, steps: int) -> dict:
        """Validates, logs and saves; returns the epoch's row of the log."""
        progress = self.progress
        row = {"epoch": progress.epoch + 1, "step": progress.step, "train_loss": progress.loss_sum / steps}
        row |= self._validate()
        slices = steps * self.config.batch_size * self.processes.world
        row |= {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "slices_per_second": slices / max(progress.seconds, 1e-9),
            "data_wait_share": progress.waited / max(progress.seconds, 1e-9),
            "seconds": progress.seconds,
        }
        progress.history.append(row)
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.loss_sum, progress.seconds, progress.waited = 0.0, 0.0, 0.0
        if row["dice_foreground"] > progress.best:
            progress.best = row["dice_foreground"]
            if self.processes.leader:
                # Written before the state: after a crash in between, the same epoch writes the same weights again.
                checkpoint.save_weights(self.run / BEST, self.model, self.card)
        self._save_state()
        self._publish()
        return row

    @torch.no_grad()
    def _validate(self) -> dict:
        config, data = self.config, self.data.val
        rank, world = self.processes.rank, self.processes.world
        names = self.data.labels.class_names
        ignored = IGNORED if self.data.labels.ignore is not None else None
        metrics = SegmentationMetrics(len(names), names, ignore_index=ignored)
        total = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        steps = data.steps(config.batch_size, world=world)
        order = data.batches(config.batch_size, shuffle=False, rank=rank, world=world)
        batches = (data.load(batch.indices) for batch in order)
        self.display.start("validation", steps)
        with closing(prefetched(batches)) as loader:
            for _ in range(steps):
                # The last step can leave a process without slices; it still takes part in the sums of the loss.
                (images, labels), waited = next(loader, (data.load([]), 0.0))
                images = images.to(self.device).to(memory_format=torch.channels_last)
                with autocast(self.device, config.precision):
                    logits = self.model(images).float()
                labels = centre_crop(labels.to(self.device), *logits.shape[-2:])
                count = self.processes.sum(torch.tensor(float(len(images)), device=self.device)).item()
                total += torch.tensor([self.loss(logits, labels).item() * count, count], dtype=torch.float64)
                metrics.update(logits, labels)
                self.display.step(len(images), waited)
        self.display.stop()
        if world > 1:
            metrics.all_reduce()
        return {"val_loss": (total[0] / total[1]).item()} | metric_columns(metrics)

    def _save_state(self) -> None:
        if self.processes.leader:
            checkpoint.save_state(self.run / STATE, self.model, self.optimizer, self.scaler, self.progress)
        self._saved_at = time.monotonic()

    def _publish(self, *, curves: bool = False) -> None:
        """Writes what follows from the state: the last weights, the log and, now and then or if asked, the curves."""
        if not self.processes.leader:
            return
        checkpoint.save_weights(self.run / LAST, self.model, self.card)
        write_log(self.run, self.progress.history)
        if curves or time.monotonic() - self._drawn_at >= _SECONDS_BETWEEN_CURVES:
            write_curves(self.run, self.progress.history, self.data.labels.class_names)
            self._drawn_at = time.monotonic()


def build_model(config: TrainConfig, data: TrainingData) -> torch.nn.Module:
    """The untrained network that ``config`` asks for, checked against the size of the slices."""
    overrides = {"in_channels": len(data.modalities), "num_classes": len(data.labels.class_names)}
    for name in ("width", "depth", "dropout"):
        if getattr(config, name) is not None:
            overrides[name] = getattr(config, name)
    try:
        model = fastunet.UNet.from_preset(config.preset, **overrides)
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
