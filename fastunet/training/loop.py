"""The training loop: epochs of steps, validation, checkpoints, and a log that always agrees with them."""

from __future__ import annotations

import dataclasses
import math
import shlex
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from fastunet.data import SliceDataset
from fastunet.data.sampling import Batch
from fastunet.errors import UserError
from fastunet.metrics import SegmentationMetrics
from fastunet.signals import Interrupted
from fastunet.training import checkpoint
from fastunet.training.checkpoint import BEST, LAST, STATE, Progress
from fastunet.training.config import TrainConfig
from fastunet.training.dataset import TrainingData
from fastunet.training.display import Display
from fastunet.training.distributed import Processes
from fastunet.training.learner import Learner, Step
from fastunet.training.loading import prefetched
from fastunet.training.results import Row, judged_by, metric_columns, write_curves, write_log
from fastunet.training.tensor_file import NotFinite

_SECONDS_BETWEEN_CURVES = 30.0
_MOST_SKIPPED_STEPS = 20
"""In a row, before a run in fp16 counts as diverged: each halves the loss scale, so it is then a millionth."""
_MOST_NAMED_CASES = 8


class Trainer:
    """One run: its learner, how far it is, and the files that say so."""

    def __init__(
        self, config: TrainConfig, run: Path, processes: Processes, data: TrainingData, display: Display
    ) -> None:
        self.config, self.run, self.processes, self.data, self.display = config, run, processes, data, display
        self.device = processes.device
        self.learner = Learner(config, processes, data)
        self.progress = Progress(fingerprint=data.fingerprint)
        self._saved_at = self._drawn_at = time.monotonic()
        self._requested: Callable[[], int] = lambda: 0
        self._failure: UserError | None = None
        self._last_batch: Batch | None = None

    def fit(self, requested: Callable[[], int] = lambda: 0) -> None:
        """Runs the epochs that are left; when ``requested()`` returns a signal, saves the state and raises it."""
        config, progress, self._requested = self.config, self.progress, requested
        steps = self.data.train.steps(config.batch_size, world=self.processes.world)
        while progress.epoch < config.epochs and not self._patience_ended():
            self._train_epoch(steps)
            row = self._finish_epoch(steps)
            self.display.message(
                f"epoch {row['epoch']}/{config.epochs}: loss {row['train_loss']:.4f}, validation loss "
                f"{row['val_loss']:.4f}, Dice {judged_by(row):.3f}, {row['slices_per_second']:.1f} slices/s, "
                f"{100 * row['data_wait_share']:.0f} % waiting for data"
            )
        self._publish(curves=True)

    def _patience_ended(self) -> bool:
        """Whether ``patience`` epochs in a row brought no better validation Dice; says so."""
        epochs = self.progress.epoch - self.progress.best_epoch
        ended = self.config.patience is not None and epochs >= self.config.patience
        if ended:
            best = f"{self.progress.best:.3f} in epoch {self.progress.best_epoch}"
            self.display.message(f"stopped: no validation Dice above {best} in {epochs} epochs (--patience)")
        return ended

    def restore(self) -> None:
        """Continues from the saved state."""
        path, learner = self.run / STATE, self.learner
        self.progress = checkpoint.load_state(path, learner.model, learner.optimizer, learner.scaler, learner.average)
        if self.progress.fingerprint != self.data.fingerprint:
            raise UserError(f"{path} was trained on other data than {self.config.data} holds now")
        steps = self.data.train.steps(self.config.batch_size, world=self.processes.world)
        if self.progress.step != self.progress.epoch * steps + self.progress.batch or self.progress.batch > steps:
            raise UserError(f"{path} counts its steps for other batches than these, {steps} in an epoch")
        self.display.message(f"resuming at epoch {self.progress.epoch + 1}, batch {self.progress.batch + 1}")
        self._publish()

    def _train_epoch(self, steps: int) -> None:
        config, progress, data = self.config, self.progress, self.data.train
        order = data.batches(config.batch_size, progress.epoch, rank=self.processes.rank, world=self.processes.world,
                             start_batch=progress.batch)  # fmt: skip
        batches = ((batch, *data.read(batch)) for batch in order)
        self.learner.model.train()
        self.display.start(f"epoch {progress.epoch + 1}/{config.epochs}", steps, progress.batch)
        # Numbers are read one step late from a CUDA device, so that it never waits for the host; with several processes
        # at once, so that all of them end at the same step.
        late = 1 if self.device.type == "cuda" and self.processes.world == 1 else 0
        waiting: deque[Step] = deque()
        with closing(prefetched(batches)) as loader:
            clock = time.perf_counter()
            for (batch, images, labels, *border), waited in loader:
                waiting.append(self.learner.step(batch, images, labels, *border, progress=progress, steps=steps,
                                                 wishes=self._wants_to_stop))  # fmt: skip
                progress.batch += 1
                progress.step += 1
                now = time.perf_counter()
                progress.seconds, progress.waited, clock = progress.seconds + now - clock, progress.waited + waited, now
                save = time.monotonic() - self._saved_at >= config.checkpoint_every and progress.batch < steps
                loss, stop = self._settle(waiting, 0 if save else late)
                self.display.step(len(images), waited, loss)
                if stop:
                    self._settle(waiting, 0)
                    self._stop()
                if save:
                    self._save_state_alone()
        self._settle(waiting, 0)
        self.display.stop()

    def _wants_to_stop(self) -> bool:
        return bool(self._requested()) or self._failure is not None

    def _settle(self, waiting: deque[Step], left: int) -> tuple[float | None, bool]:
        """Accounts for the steps that wait, but for the last ``left``; returns the last loss and whether to stop.

        Raises:
            UserError: a loss is not finite, and no loss scaler is there or left to put it right.
        """
        progress, loss, stop = self.progress, None, False
        while len(waiting) > left:
            step = waiting.popleft()
            loss, wishes = step.report.tolist()
            stop = stop or wishes > 0
            progress.skipped = progress.skipped + 1 if step.skipped else 0
            if progress.skipped > _MOST_SKIPPED_STEPS:
                raise self._diverged(f"the loss scaler has skipped {progress.skipped} steps in a row", step.batch)
            if math.isfinite(loss):
                progress.loss_sum += loss
                progress.counted += 1
            elif not step.skipped:
                raise self._diverged(f"the loss is {loss}", step.batch)
            self._last_batch = step.batch
        return loss, stop

    def _diverged(self, what: str, batch: Batch | None, data: SliceDataset | None = None) -> UserError:
        """The error for a run that computes no numbers any more; names the slices of ``batch``."""
        data = data or self.data.train
        slices: dict[str, list[str]] = {}
        for index in sorted(batch.indices) if batch is not None else ():
            slices.setdefault(data.cases[data.case_index[index]].name, []).append(str(data.slice_index[index] + 1))
        named = [f"{case} slice{'s'[: len(n) > 1]} {', '.join(n)}" for case, n in slices.items()]
        more = f" and {len(named) - _MOST_NAMED_CASES} more cases" if len(named) > _MOST_NAMED_CASES else ""
        number = batch.step + 1 if batch is not None else 0
        held = f", batch {number} ({'; '.join(named[:_MOST_NAMED_CASES])}{more})" if named else ""
        kept = "the weights saved before are kept" if (self.run / STATE).exists() else "no weights were saved"
        advice = "try a lower --learning-rate, or look at these images"
        return UserError(f"{what} in epoch {self.progress.epoch + 1}{held}; {kept}; {advice}")

    def _stop(self) -> None:
        """Saves the state and raises what the processes were asked to end by."""
        self.display.stop()
        with self.processes.together():
            if self._failure is not None:
                raise self._failure
            self._save_state()
        number = int(self.processes.most(self._requested()))
        line = shlex.join(["fastunet", "train", self.config.data, "--out", str(self.run), "--resume"])
        said = f"stopped by {signal.Signals(number).name}; the state is saved, go on with: {line}"
        raise Interrupted(number, said if self.processes.leader else "")

    def _finish_epoch(self, steps: int) -> Row:
        """Validates, logs and saves; returns the epoch's row of the log."""
        progress = self.progress
        row: Row = {"epoch": progress.epoch + 1, "step": progress.step}
        row["train_loss"] = progress.loss_sum / max(progress.counted, 1)
        row |= self._validate()
        slices = steps * self.config.batch_size * self.processes.world
        row |= {
            "learning_rate": self.learner.learning_rate,
            "slices_per_second": slices / max(progress.seconds, 1e-9),
            "data_wait_share": progress.waited / max(progress.seconds, 1e-9),
            "seconds": progress.seconds,
        }
        progress.history.append(row)
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.loss_sum, progress.counted, progress.seconds, progress.waited = 0.0, 0, 0.0, 0.0
        best = judged_by(row) > progress.best
        progress.best = max(progress.best, judged_by(row))
        with self.processes.together():
            if best:
                # Written before the state: after a crash in between, the same epoch writes the same weights again.
                self._save_weights(BEST)
            self._save_state()
            self._publish()
        return row

    def _validate(self) -> Row:
        config, data, learner = self.config, self.data.val, self.learner
        rank, world = self.processes.rank, self.processes.world
        names = self.data.labels.class_names
        regions = self.data.labels.regions if self.data.labels.region_order else None
        metrics = SegmentationMetrics(len(names), names, regions=regions, ignore_index=self.data.ignored)
        total = torch.zeros(2, dtype=torch.float64)
        learner.result.eval()
        steps = data.steps(config.batch_size, world=world)
        order = data.batches(config.batch_size, shuffle=False, rank=rank, world=world)
        batches = ((batch, *data.read(batch)) for batch in order)
        self.display.start("validation", steps)
        with closing(prefetched(batches)) as loader:
            for _ in range(steps):
                # The last step can leave a process without slices; it still takes part in the sums of the loss.
                nothing: tuple[Any, float] = (None, *data.load([])), 0.0
                (batch, images, labels), waited = next(loader, nothing)
                here = [float(len(images)), float(bool(self._requested()))]
                count, stop = self.processes.sum(torch.tensor(here, device=self.device)).tolist()
                if stop:
                    self._stop()
                logits, labels, loss = learner.validate(images, labels)
                if not math.isfinite(loss):
                    raise self._diverged(f"the validation loss is {loss.item()}", batch, data)
                total += torch.tensor([loss.item() * count, count], dtype=torch.float64)
                metrics.update(logits, labels)
                self.display.step(len(images), waited)
        self.display.stop()
        if world > 1:
            metrics.all_reduce()
        return {"val_loss": (total[0] / total[1]).item()} | metric_columns(metrics)

    def _save_state(self) -> None:
        learner = self.learner
        if self.processes.leader:
            try:
                checkpoint.save_state(self.run / STATE, learner.model, learner.optimizer, learner.scaler, self.progress,
                                      learner.average, self.config.fixed())  # fmt: skip
            except NotFinite as error:
                raise self._diverged(str(error), self._last_batch) from error
        self._saved_at = time.monotonic()

    def _save_state_alone(self) -> None:
        """Saves between two steps: an error there ends all processes, after the next step."""
        try:
            self._save_state()
        except UserError as error:
            if self.processes.world == 1:
                raise
            self._failure = error

    def _save_weights(self, name: str) -> None:
        if self.processes.leader:
            try:
                card = dataclasses.replace(self.learner.card, flips=self.data.mirrored(self.progress.epoch))
                checkpoint.save_weights(self.run / name, self.learner.result, card)
            except NotFinite as error:
                raise self._diverged(str(error), self._last_batch) from error

    def _publish(self, *, curves: bool = False) -> None:
        """Writes what follows from the state: the last weights, the log and, now and then or if asked, the curves."""
        if not self.processes.leader:
            return
        self._save_weights(LAST)
        write_log(self.run, self.progress.history)
        if curves or time.monotonic() - self._drawn_at >= _SECONDS_BETWEEN_CURVES:
            write_curves(self.run, self.progress.history, self.data.labels)
            self._drawn_at = time.monotonic()
