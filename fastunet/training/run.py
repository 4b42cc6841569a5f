"""A training run: what its folder may hold, and how it is begun or continued there."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path

from fastunet.errors import UserError
from fastunet.files import locked, make_output_folder
from fastunet.signals import deferred
from fastunet.training.checkpoint import BEST, LAST, STATE, saved_options
from fastunet.training.config import FILE_NAME, TrainConfig
from fastunet.training.dataset import prepare_data
from fastunet.training.display import Display
from fastunet.training.distributed import Processes
from fastunet.training.loop import Trainer
from fastunet.training.precision import prepare
from fastunet.training.results import CURVES, LOG

FILES = (FILE_NAME, LOG, CURVES, BEST, LAST, STATE)
"""What a run folder holds beside its cache."""


def train(config: TrainConfig, run: Path, processes: Processes, *, resume: bool = False, quiet: bool = False) -> None:
    """Trains as ``config`` says, in the run folder ``run``; with ``resume`` from where its state left off.

    Every ``torchrun`` process calls this; the leader alone writes ``config.json``, ``log.csv``, ``curves.png``,
    ``best.safetensors``, ``last.safetensors`` and ``state.safetensors``.

    A signal that :func:`fastunet.signals.handled` turns into ``Interrupted`` waits for the step or the validation batch
    at hand; then the state is saved. A run continued from it gives the bits of one that was never interrupted.

    Raises:
        UserError: data, options, checkpoint or output folder cannot be used, another process is at work in the folder,
            or the loss is not finite.
    """
    with ExitStack() as held:
        with processes.together():
            if processes.leader:
                make_output_folder(run)
                held.enter_context(locked(run / ".lock"))
                _check_run(config, run, resume)
        _train(config, run, processes, Display(quiet=quiet or not processes.leader))


def _check_run(config: TrainConfig, run: Path, resume: bool) -> None:
    found = [name for name in (STATE, BEST, LAST) if (run / name).exists()]
    if found and not resume:
        raise UserError(f"{run} holds a run already; --resume continues it, or choose another folder")
    # a run's best weights and no log: the disk was full, or the process gone, before the first state was whole
    in_first_state = found == [BEST] and (run / FILE_NAME).exists() and not (run / LOG).exists()
    if found and STATE not in found and not in_first_state:
        raise UserError(f"{run} holds weights but no {STATE} to continue from; choose another folder")
    foreign = [name for name in (LOG, CURVES) if not found and (run / name).exists()]
    if foreign or (not found and (run / FILE_NAME).exists() and not TrainConfig.is_in(run)):
        name = (foreign or [FILE_NAME])[0]
        raise UserError(f"{run / name} is of no run, and would be replaced; choose another folder")
    if STATE in found:
        config.check_continues(saved_options(run / STATE), run / STATE)


def _train(config: TrainConfig, run: Path, processes: Processes, display: Display) -> None:
    with processes.together():
        prepare(processes.device, config.precision, deterministic=config.deterministic)
    data = prepare_data(config, [run / name for name in FILES], run / "cache", processes, display)
    config = dataclasses.replace(config, modalities=list(data.modalities))
    with processes.together():
        trainer = Trainer(config, run, processes, data, display)
        if (run / STATE).exists():
            trainer.restore()
        if processes.leader:
            config.write(run)  # of a resumed run too: it may go on longer, or with data that moved
    with deferred() as requested:
        trainer.fit(requested)
