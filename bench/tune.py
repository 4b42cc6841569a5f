"""Searches configurations of every kernel of both networks on this GPU: ``python -m bench.tune --out DIR``.

Writes ``DIR/<gpu>.json`` in the format of ``kernels/tuned/README.md`` after each finished key, the most expensive
first. Started again with the same DIR, it goes on with the keys that are missing, and past candidates that ended the
process or the device (``DIR/<gpu>.lost.json``). Exit 2 without a GPU, 3 when the device was lost: start it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.measuring import machine
from fastunet.files import write_text
from fastunet.inspection import tuning
from fastunet.inspection.layers import CASES, Call, network_calls
from fastunet.inspection.machine_code import compile_launch
from fastunet.inspection.repeats import rotated
from fastunet.kernels import _launch, _tuned
from fastunet.kernels._tuned import Entry

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BATCHES = (16, 1)
SECONDS_FOR_ONE_KEY = 40.0


@dataclasses.dataclass(frozen=True)
class Task:
    """One key to search: the first operator call that asks for it, and where to start, the heuristic's choice first."""

    entry: Entry
    starts: list[Any]
    call: Call
    dtype: torch.dtype


def tasks(architecture: int) -> list[Task]:
    """Every key that the networks ask for, those that move or multiply most first."""
    found: dict[Entry, Task] = {}
    cost: dict[Entry, float] = {}
    for dtype in DTYPES:
        for batch in BATCHES:
            for network, (height, width) in CASES.values():
                calls = network_calls(network, batch, height, width)
                calls += network_calls(network, batch, height, width, training=False, output="probabilities")
                for call in calls:
                    with _launch.recording(architecture), _tuned.asking() as asked:
                        call.launcher()(*call.allocate(dtype))
                    for entry, starts in asked.items():
                        found.setdefault(entry, Task(entry, starts, call, dtype))
                        # by the rates of a large GPU and the dtype that matters most; they decide the order alone
                        seconds = max(call.floor_bytes(dtype) / 3e12, 2 * call.macs / 8e14)
                        seconds *= 1.0 if dtype == DTYPES[0] else 0.1
                        cost[entry] = cost.get(entry, 0.0) + seconds
    return sorted(found.values(), key=lambda task: -cost[task.entry])


def tune_all(todo: list[Task], path: Path, head: dict[str, Any], stamp: dict[str, Any],
             search: Callable[[Task, float], tuning.Found | None], seconds: float,
             clock: Callable[[], float] = time.monotonic) -> tuple[int, int]:
    """Searches the tasks whose keys ``path`` lacks, until ``seconds`` have passed, and writes it after each.

    ``head`` is the file's device and architecture, ``stamp`` the versions and commit of each new row, and
    ``search(task, deadline)`` the search of one key. Returns how many keys are finished now, and how many there are.

    Raises:
        ValueError: ``path`` exists and is not a winners' file, or is one of another device.
    """
    content = _tuned.read(path) if path.exists() else dict(head, rows=[])
    if {key: content[key] for key in head} != head:
        raise ValueError(f"{path} holds winners of {content['device']}, not of {head['device']}")
    done = {(row["kernel"], tuple(row["key"])) for row in content["rows"]}
    deadline = clock() + seconds
    for task in todo:
        if task.entry in done:
            continue
        if clock() >= deadline:
            break
        found = search(task, min(deadline, clock() + SECONDS_FOR_ONE_KEY))
        kernel, key = task.entry
        if found is None:
            print(f"{kernel} {list(key)}: the heuristic's configuration fails its error budget or does not run: "
                  f"{task.starts[0]}", flush=True)  # fmt: skip
            continue
        row = dict(kernel=kernel, key=list(key), config=dataclasses.asdict(found.config),
                   microseconds=round(found.microseconds, 3),
                   heuristic_microseconds=round(found.heuristic_microseconds, 3), **stamp)  # fmt: skip
        content["rows"].append(row)
        done.add(task.entry)
        write(path, content)
        print(f"{kernel} {list(key)}: {found.heuristic_microseconds:.1f} µs → {found.microseconds:.1f} µs "
              f"after {found.tried} configurations", flush=True)  # fmt: skip
    return len(done & {task.entry for task in todo}), len(todo)


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON so that an interruption leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


class Lost:
    """The candidates that were being measured when a process or the device died, kept in a file beside the winners."""

    def __init__(self, path: Path):
        self.path = path
        content = json.loads(path.read_text()) if path.exists() else {"lost": [], "trying": None}
        self.lost: list[str] = content["lost"] + ([content["trying"]] if content["trying"] else [])

    def guarded(self, entry: Entry, measure: Callable[[Any], float | None]) -> Callable[[Any], float | None]:
        """``measure``, whose candidate is written down before it runs; None for one that was lost before."""

        def guard(config: Any) -> float | None:
            name = f"{entry[0]} {list(entry[1])} {config}"
            if name in self.lost:
                return None
            write(self.path, {"lost": self.lost, "trying": name})
            microseconds = measure(config)  # a lost device raises, and leaves the name in the file
            write(self.path, {"lost": self.lost, "trying": None})
            return microseconds

        return guard


def search_on_device(task: Task, deadline: float, lost: Lost) -> tuning.Found | None:
    """Searches one key on the current GPU: each round's candidates compile in parallel, then are checked and timed."""
    launcher, operands = task.call.launcher(), task.call.random(task.dtype, "cuda")
    sets = rotated(operands, machine.cache_bytes(torch.device("cuda")))
    same, exact = task.call.reference(operands), task.call.reference(operands, torch.float64)

    def accept(results: tuple[torch.Tensor, ...]) -> bool:
        return all(tuning.error_within_budget(a, s, e) for a, s, e in zip(results, same, exact, strict=True))

    measure = lost.guarded(task.entry, tuning.measured(task.entry, launcher, sets, accept))
    return tuning.search(task.starts, measure, deadline=deadline, prepare=lambda around: precompile(task, around))


def precompile(task: Task, candidates: list[Any]) -> None:
    """Fills Triton's cache with the kernels of ``candidates``; those that do not compile fail again when measured."""
    architecture, records = _launch.architecture(), []
    for candidate in candidates:
        with _tuned.forcing(task.entry, candidate), _launch.recording(architecture) as launches:
            try:
                task.call.launcher()(*task.call.allocate(task.dtype))
            except ValueError:
                continue
        records += launches
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for future in [pool.submit(compile_launch, launch, architecture) for launch in records]:
            future.exception()


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the winners' file")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this time (default: 60)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.tune: no CUDA device here; configurations can only be timed on one", file=sys.stderr)
        return 2
    started = time.monotonic()
    name, architecture = torch.cuda.get_device_name(), _launch.architecture()
    path = options.out / f"{_tuned.slug_of(name)}.json"
    todo = tasks(architecture)
    seconds = 60 * options.minutes - (time.monotonic() - started)
    stamp = dict(versions=machine.versions(), commit=machine.commit())
    lost, head = Lost(path.with_suffix(".lost.json")), dict(device=name, architecture=architecture)
    try:
        done, total = tune_all(todo, path, head, stamp, functools.partial(search_on_device, lost=lost), seconds)
    except tuning.DeviceLost as error:
        print(f"bench.tune: the device was lost at {error}; start again to go on without it", file=sys.stderr)
        return 3
    print(f"{done} of {total} keys are in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
