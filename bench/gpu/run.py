"""Steps of a stage on a machine that is lent for minutes: each with a deadline, each written down when it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

TAIL_LINES = 40


@dataclasses.dataclass(frozen=True)
class Step:
    """What became of one step: ``status`` is "ok", "failed", "timeout", "absent" or "skipped" (no time was left)."""

    stage: str
    name: str
    status: str
    seconds: float
    tail: str = ""


class Stage:
    """Runs steps until ``seconds`` have passed and appends each outcome to ``folder/<name>.jsonl`` as it is known."""

    def __init__(self, name: str, folder: Path, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.name, self.folder, self.clock = name, folder, clock
        self.deadline = clock() + seconds
        self.steps: list[Step] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - self.clock()

    def record(self, name: str, status: str, seconds: float, tail: str = "") -> Step:
        """Writes a step down."""
        step = Step(self.name, name, status, round(seconds, 2), tail)
        self.steps.append(step)
        with open(self.folder / f"{self.name}.jsonl", "a") as file:
            file.write(json.dumps(dataclasses.asdict(step)) + "\n")
        print(f"[{self.name}] {name}: {status} after {seconds:.1f} s", flush=True)
        return step

    def command(self, name: str, arguments: list[str], *, share: float = 1.0, none_is_ok: bool = False) -> Step:
        """Runs a command for at most ``share`` of the time left, then ends it and all that it has started.

        Exit 5, pytest's "no tests", counts as "ok" where ``none_is_ok``.
        """
        limit = share * self.left
        if limit <= 1:
            return self.record(name, "skipped", 0.0)
        started = self.clock()
        with open(self.folder / f"{self.name}-{name}.log", "w+") as log:
            try:
                process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            except FileNotFoundError:
                return self.record(name, "absent", 0.0, f"{arguments[0]} is not installed")
            try:
                code = process.wait(timeout=limit)
                status = "ok" if code == 0 or (code == 5 and none_is_ok) else "failed"
            except subprocess.TimeoutExpired:
                status = "timeout"
            finally:
                end(process)
            log.seek(0)
            tail = "".join(log.readlines()[-TAIL_LINES:])
        return self.record(name, status, self.clock() - started, tail)

    def summary(self) -> str:
        """One line a step, and the last lines of those that failed."""
        lines = [f"{s.status:8s} {s.seconds:7.1f} s  {s.name}" for s in self.steps]
        for step in self.steps:
            if step.status in ("failed", "timeout"):
                lines += [f"--- {step.name}", *step.tail.splitlines()[-8:]]
        return "\n".join(lines)

    @property
    def failed(self) -> bool:
        """Whether a step failed or was cut off."""
        return any(step.status in ("failed", "timeout") for step in self.steps)


def end(process: subprocess.Popen) -> None:
    """Ends the processes that ``process`` started in its own session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
