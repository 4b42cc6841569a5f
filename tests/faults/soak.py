"""A long training and many segmentations in one process: memory, open files and threads stay as they are."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path

from fastunet.cli import main
from fastunet.training import learner
from tests.data_files import msd_folder
from tests.faults.trials import TINY, Deadline, Outcome

MEMORY_MB, FILES, THREADS = 24.0, 2, 2  # what may come and go between two looks


def campaign(work: Path, trials: int, seed: int, time: Deadline) -> Outcome:
    """``trials`` segmentations after thirty times as many training steps; the second half must hold no more."""
    outcome = Outcome("a long run in one process (30 training steps and one segmentation each)")
    data, seen, steps = msd_folder(work / "data", ("a", "b", "c"), (24, 20, 8)), [], 0
    # What is imported once, and the first figure, is no growth.
    _run("train", data, "--out", work / "first", *TINY, "--epochs", "1")
    step = learner.Learner.step

    def counted(self, *args, **options):
        nonlocal steps
        steps += 1
        if steps % max(3 * trials, 1) == 0:
            seen.append(_state())
        return step(self, *args, **options)

    learner.Learner.step = counted
    try:
        epochs = -(-30 * trials // 4)
        said = _run("train", data, "--out", work / "run", *TINY, "--epochs", epochs, "--checkpoint-every", "5",
                    "--seed", seed)  # fmt: skip
    finally:
        learner.Learner.step = step
    _compare(outcome, seen, f"{steps} training steps", said)
    seen = []
    for index in range(trials):
        if not time:
            break
        said = _run("segment", work / "run", data, "--out", work / "out", "--overwrite", "--probabilities", "--overlay",
                    "--device", "cpu", "--threads", "1")  # fmt: skip
        outcome.add("segmented", said or None)
        if index % max(trials // 10, 1) == 0:
            seen.append(_state())
    _compare(outcome, seen, "segmentations", "")
    shutil.rmtree(work)
    return outcome


def _run(*line: object) -> str:
    """What a command that fails says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = main([str(argument) for argument in line])
    if code in (130, 143):
        raise KeyboardInterrupt  # somebody ends the campaign: that is no result of it
    return f"code {code}: {said.getvalue()[-200:]}" if code else ""


def _state() -> tuple[float, int, int]:
    """Resident memory in MB, open files, threads."""
    status = Path("/proc/self/status").read_text()
    facts = dict(line.split(":", 1) for line in status.splitlines())
    return int(facts["VmRSS"].split()[0]) / 1024, len(os.listdir("/proc/self/fd")), int(facts["Threads"])


def _compare(outcome: Outcome, seen: list[tuple], what: str, said: str) -> None:
    if len(seen) < 4:
        return outcome.add("too short to compare", said or None)
    middle, last = seen[len(seen) // 2], seen[-1]
    growth = [b - a for a, b in zip(middle, last)]
    grown = any(g > limit for g, limit in zip(growth, (MEMORY_MB, FILES, THREADS)))
    problem = f"{what}: memory {growth[0]:+.1f} MB, files {growth[1]:+d}, threads {growth[2]:+d} in the second half"
    outcome.add("flat", said or (problem if grown else None))
