"""The tests that this machine can run, ``python -m tests``: two parts at a time, whatever fails, and one summary.

Each part is a run of pytest, which shares the cores with the other one. ``-k EXPRESSION`` and the like are passed on.
``--rest`` runs what is left out: tests marked slow, and under the oldest libraries that pyproject.toml allows what may
depend on them.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

OLDEST_TRITON = Path(sys.prefix) / "triton-3.6.0"
OLDEST = Path(sys.prefix) / "oldest"  # what tests/oldest.txt lists
WITHOUT_TRITON = Path("tests/without_triton").absolute()
LANES = min(os.cpu_count() or 1, 2)
WORKERS = min((os.cpu_count() or 1) // LANES, 4)
SECONDS_BETWEEN_LINES = 20


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of pytest on the tests of ``paths`` that ``marks`` selects, with changes of the environment."""

    name: str
    paths: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    marks: str = "not slow"


@dataclasses.dataclass
class Outcome:
    """What a part's report says."""

    part: Part
    seconds: float
    passed: int = 0
    failed: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)


def parts() -> list[Part]:
    """What can be run here, in an order by which both lanes end at about the same time."""
    rooms = ("tests/kernels", "tests/aot", "tests/emulator", "tests/faults", "tests/without_triton")
    half = tuple(sorted(str(path) for path in Path("tests").glob("test_*.py"))[::2])
    found = [
        Part("library, every other file", half),
        Part("kernels, their machine code executed", ("tests/emulator",)),
        Part("machine code, newest Triton", ("tests/aot",)),
        Part("library, the rest", ("tests", *(f"--ignore={path}" for path in (*rooms, *half)))),
        Part("kernels, interpreted", ("tests/kernels",), (("TRITON_INTERPRET", "1"),)),
    ]
    found.append(Part("library, without Triton", ("tests/without_triton",), before(WITHOUT_TRITON)))
    cuda = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", cuda], check=False).returncode == 0:
        found.append(Part("kernels, on the GPU", ("tests/kernels",)))
    return found


def rest() -> list[Part]:
    """What is slow, campaigns of faults, and what older libraries may change: machine code, files read and written,
    training."""
    files = ("oldest", "schema", "data_volumes", "data_damaged", "data_images", "data_image_folders", "pictures",
             "train", "train_checkpoint")  # fmt: skip
    paths = tuple(f"tests/test_{name}.py" for name in files)
    found = {
        OLDEST_TRITON: Part("machine code, oldest Triton", ("tests/aot",), before(OLDEST_TRITON)),
        OLDEST / "numpy": Part("oldest libraries", paths, (("OLDEST", "1"), *before(OLDEST))),
    }
    slow = Part("slow", ("tests", "--ignore=tests/without_triton"), marks="slow")
    # campaigns of files, processes and the CPU: no Triton either, and the start of a process is saved
    faults = Part("faults", ("tests/faults",), before(WITHOUT_TRITON))
    return [slow, *(part for folder, part in found.items() if folder.exists()), faults]


def before(folder: Path) -> tuple[tuple[str, str], ...]:
    """The environment in which Python looks into ``folder`` first."""
    return (("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))),)


def run(part: Part, arguments: list[str]) -> Outcome:
    """Runs a part to its end, with a line now and then."""
    started, percent = time.monotonic(), "0 %"
    settings = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}  # a test for each core already
    settings["PYTHONDONTWRITEBYTECODE"] = ""  # what is imported is imported by dozens of processes
    workers = ["-n", str(WORKERS), "--dist", "worksteal"] if WORKERS > 1 else ["-n", "0"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *part.paths, "-v", "-m", part.marks, *workers,
                   f"--junitxml={report}", *arguments]  # fmt: skip
        process = subprocess.Popen(command, env={**os.environ, **settings, **dict(part.environment)}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        ended = threading.Event()

        def lives() -> None:
            while not ended.wait(SECONDS_BETWEEN_LINES):
                print(f"{part.name}: {percent} after {time.monotonic() - started:.0f} s", flush=True)

        threading.Thread(target=lives, daemon=True).start()
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"\[ *(\d+)%\]", line):
                percent = f"{found[1]} %"
        ended.set()
        code = process.wait()
        # 5: no test, which a selection may well come to
        ended_well = code == 0 or (code == 5 and bool(arguments))
        outcome = read(report, part, time.monotonic() - started)
        if not ended_well and not outcome.failed:
            reached = ["its start", *(re.split(r" |Fatal", line)[0] for line in lines if "::" in line)][-1]
            outcome.failed.append(f"{part.name}: pytest ended with {code}, at {reached}")
    if outcome.failed:
        print("".join(line for line in lines if not re.search(r" (PASSED|SKIPPED) ", line)), flush=True)
    print(f"{part.name}: {counts(outcome)}, {outcome.seconds:.0f} s", flush=True)
    return outcome


def read(report: Path, part: Part, seconds: float) -> Outcome:
    """The outcome from pytest's report, if it came to write one."""
    outcome = Outcome(part, seconds)
    if not report.exists():
        return outcome
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed.append(name)
        elif (skip := case.find("skipped")) is not None:
            outcome.skipped.append(skip.get("message") or "no reason")
        else:
            outcome.passed += 1
    return outcome


def counts(outcome: Outcome) -> str:
    return f"{outcome.passed} passed, {len(outcome.failed)} failed, {len(outcome.skipped)} skipped"


def summary(outcomes: list[Outcome]) -> str:
    """A line for each part, why tests were skipped, which failed, and the sums alone on the last line."""
    lines = [""]
    for reason, count in collections.Counter(r for o in outcomes for r in o.skipped).most_common():
        lines.append(f"skipped {count}: {reason}")
    for outcome in outcomes:
        lines += [f"FAILED {name} ({outcome.part.name})" for name in outcome.failed]
    width = max(len(o.part.name) for o in outcomes)
    lines += [f"{o.part.name:{width}}  {counts(o)}, {o.seconds:.0f} s" for o in outcomes]
    sums = [(o.passed, len(o.failed), len(o.skipped)) for o in outcomes]
    passed, failed, skipped = (sum(each) for each in zip(*sums))
    return "\n".join([*lines, f"{passed} passed, {failed} failed, {skipped} skipped"])


def main(arguments: list[str]) -> int:
    """Runs all parts; exit status 1 if a test of any of them failed."""
    chosen = rest() if "--rest" in arguments else parts()
    arguments = [argument for argument in arguments if argument != "--rest"]
    with ThreadPoolExecutor(LANES) as lanes:
        outcomes = list(lanes.map(lambda part: run(part, arguments), chosen))
    print(summary(outcomes), flush=True)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
