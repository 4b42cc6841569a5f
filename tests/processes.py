"""Processes of a test's own, forked from one that has imported everything and computed nothing: they start at once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

METHOD = "forkserver"
_CONTEXT = multiprocessing.get_context(METHOD)
_CONTEXT.set_forkserver_preload([
    "torch._dynamo", "torch.distributed.nn.functional", "nibabel", "PIL.Image", "pytest", "fastunet.pictures",
    "fastunet.training.run", "tests.cli_helpers", "tests.processes",
])  # fmt: skip


def start(function: Callable, *args: object, told: Path | None = None, **environment: str) -> BaseProcess:
    """A process on one thread that calls ``function(*args)``, and ends with the exit code that it returns.

    What it prints is written to ``told`` with ``.out`` and ``.err`` added.
    """
    process = _CONTEXT.Process(target=_call, args=(function, args, told, environment), daemon=True)
    process.start()
    return process


def start_group(function: Callable, *args: object, told: Path | None = None) -> list[BaseProcess]:
    """Two processes that find each other as ``torchrun``'s do; they tell in ``told`` with their rank added."""
    return [start(function, *args, told=told and Path(f"{told}{each['RANK']}"), **each) for each in environments()]


def environments() -> list[dict[str, str]]:
    """What ``torchrun`` adds to the environment of each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank)
            for rank in "01"]  # fmt: skip


def ended(process: BaseProcess, seconds: float = 240) -> int | None:
    """The exit code of a process, for which it waits; None if it goes on after so long."""
    process.join(seconds)
    return process.exitcode


def wait_for(path: Path, seconds: float = 120) -> None:
    """Returns once there is a file ``path``."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def _call(function: Callable, args: tuple, told: Path | None, environment: dict[str, str]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    for stream, ending in ((1, ".out"), (2, ".err")) if told else ():
        with open(f"{told}{ending}", "w") as file:
            os.dup2(file.fileno(), stream)
    sys.exit(function(*args))
