"""What the campaigns share: a count of what was tried, work in a forked child, and a small run to damage."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch._dynamo  # noqa: F401  what every training imports, and its curves: in a forked child it costs 3 seconds

import fastunet.pictures.curves
import fastunet.training.run  # noqa: F401
from fastunet.cli import main

TINY = ["--width", "4", "--depth", "2", "--batch-size", "4", "--device", "cpu", "--threads", "1"]


@dataclass
class Outcome:
    """How many trials of a campaign there were, what became of them, and the descriptions of those that went wrong."""

    title: str
    counts: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def add(self, kind: str, failure: str | None = None) -> None:
        """Counts a trial; with ``failure`` as one that went wrong."""
        kind = "lost" if failure else kind
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if failure:
            self.lost.append(failure)

    @property
    def tried(self) -> int:
        return sum(self.counts.values())


class Deadline:
    """Says when a campaign has used its share of the time."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def __bool__(self) -> bool:
        return time.monotonic() < self._end


HANGS_AFTER = 300.0
"""Seconds, however busy the machine is."""


def forked(work: Callable[[], str], cpu: int, memory: int) -> str:
    """What ``work()`` returns in a forked child, or "raised …", "killed by …" or "hangs".

    ``cpu`` limits its processor time in seconds, ``memory`` what it may map beyond what it has, in bytes.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
            resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
            answer = work()
        except BaseException as error:
            answer = (
                f"raised {type(error).__name__}: {str(error)[:200]} {traceback.extract_tb(error.__traceback__)[-1]}"
            )
        os.write(writer, answer.encode(errors="replace")[:60000])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        if not select.select([stream], [], [], HANGS_AFTER)[0]:
            os.kill(pid, signal.SIGKILL)
        answer = stream.read().decode()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return "hangs" if os.WTERMSIG(status) == signal.SIGKILL else f"killed by signal {os.WTERMSIG(status)}"
    return answer


def start(line: list, log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """The process id of a forked child that runs the command line ``line``; what it says goes to ``log``."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(log, "w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
                prepare()
                try:
                    code = main([str(argument) for argument in line])
                except BaseException:
                    traceback.print_exc(file=stream)
        finally:
            os._exit(code)
    return pid


def finish(pid: int) -> int:
    """The exit code of a child; negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(line: list, log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Runs a command line in a forked child to its end."""
    return finish(start(line, log, prepare))


def is_one_sentence(code: int, log: Path) -> bool:
    """Whether the command ended well, or with code 2 and one line for the user."""
    text = log.read_text(errors="replace")
    return "Traceback" not in text and (code == 0 or (code == 2 and text.count("fastunet: ") == 1))


def left_behind(folder: Path) -> list[str]:
    """Temporary files and locks below ``folder``."""
    return [path.name for path in folder.rglob(".*") if path.name.startswith((".writing-", ".lock"))]
