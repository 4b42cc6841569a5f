"""pytest plugin: the tests of the kernels in the emulator, in the dtypes that the interpreter leaves out too.

    python -m pytest -p tests.emulator.plugin --emulate 90 tests/kernels -k bf16
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests import emulator, tolerance

_TF32_EPSILON = 2**-9  # both operands lose 13 bits of mantissa, by truncation


def pytest_addoption(parser):
    group = parser.getgroup("emulator")
    group.addoption("--emulate", type=int, choices=(80, 90), help="run compiled kernels in the emulator")
    group.addoption("--tf32", action="store_true", help="emulated: float32 products in tf32")
    group.addoption("--log", type=Path, help="emulated: append a line of JSON for each test to this file")
    group.addoption("--label", default="", help="emulated: the log's name of this run; what passed in it is left out")
    group.addoption("--share", default="1/1", help="emulated: i/n, the i-th of n shares of the tests")
    group.addoption("--subset", action="store_true", help="emulated: in bfloat16, each kernel, variant and option once")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config):
    options = early_config.known_args_namespace
    emulator.ARCHITECTURE, emulator.TF32 = options.emulate, options.tf32
    if options.emulate and os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("--emulate runs compiled kernels; unset TRITON_INTERPRET")


def pytest_configure(config):
    if emulator.ARCHITECTURE:
        config.pluginmanager.register(_Emulation(config), "emulation")


def logged(path: Path) -> list[dict]:
    """The rows of a log, of a test that ran several times the last; a line that was cut off does not count."""
    rows = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else []):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows[row["label"], row.get("test", number)] = row
    return list(rows.values())


_SUBSET = re.compile(r"""bf16|bfloat16|test_backward_equals_autograd|test_confusion_of_logits.4-NHWC-200
|test_confusion_of_labels.torch.uint8|test_confusion_in_several.*pairs|test_soft_targets.4-NCHW
|test_equals_the_specification.40-128-(skip[ ]foreground-|one-weights|Tversky-)]
|test_dice.py::test_more_samples_than_a_grid_holds.NHWC|regions.py::test_more_samples_than_a_grid_holds.NCHW""", re.X)
"""The names of the tests in the subset."""
_ALIKE = re.compile(r"""chosen|(two|one|four|17)[ ]class|many[ ]channels|one[ ]pixel|no[ ]image|.batch-2x48|.group
|by_the_convolution.(rows|box-split|pointer)|hard_labels.*NCHW|pool.skip-(relu|plain)|-pool-(leaky|plain)
|test_forward.first|forward_pool.pointer|data_grad.*-[xs]?-bf16|bulk1x4|pointer1x2
|upsample_conv.*pointers|corners|.none-|.transpose-two|.upsample-|summed_before""", re.X)
"""But not these, whose kernels others run in the subset: tilings that the heuristics choose, sizes, statistics by the
function that other tilings call, gradients of blocks that have fewer sources, one more pairing of two
options, numbers that the interpreter has too, what test_kernels.py runs for sm_80 and test_networks.py for sm_90."""
_SIZE = re.compile(r"(?<![rtkx\d])\d[\dx+.]*|-crop(None)?")
"""A number in a test's name, but in that of a tile ("bulk1x4", "first1x1") or a type; whether there is a skip."""


def _subset(items: list[pytest.Item]) -> set[pytest.Item]:
    """Of the cases that differ in numbers alone one that has a skip, with the most digits: each kernel, variant and
    option."""
    alike = defaultdict(list)
    for item in items:
        if _SUBSET.search(item.nodeid) and not _ALIKE.search(item.nodeid):
            alike[_SIZE.sub("", item.nodeid)].append(item)
    return {max(group, key=lambda item: (bool(re.search(r"crop\d", item.nodeid)), len(item.nodeid)))
            for group in alike.values()}  # fmt: skip


class _Emulation:
    def __init__(self, config):
        self.option = config.option
        self.comparisons: list[dict] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        self.collected = len(items)  # before -k
        share, shares = map(int, self.option.share.split("/"))
        wanted = _subset(items) if self.option.subset else set(items)
        rows = logged(self.option.log) if self.option.log else []
        done = {row["test"] for row in rows
                if row["label"] == self.option.label and row.get("outcome") in ("passed", "skipped")}  # fmt: skip
        mine = [item for item in items if item in wanted][share - 1 :: shares]
        chosen = [item for item in mine if item.nodeid not in done]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session):
        """Compiles and launches in the emulator as long as tests run."""
        import torch

        from tests.emulator.driver import emulated
        from tests.emulator.launch import Emulator

        if emulator.TF32:
            tolerance.EPSILON[torch.float32] = _TF32_EPSILON
        tolerance.OBSERVERS.append(self.compared)
        self.emulator = Emulator()
        if self.option.log:
            self.write_session()
        with emulated(emulator.ARCHITECTURE, self.emulator):
            return (yield)

    def compared(self, name, dtype, error, budget):
        self.comparisons.append({"name": name, "dtype": str(dtype)[6:], "error": error, "budget": budget})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        self.comparisons.clear()
        self.emulator.records.clear()
        started, outcome, message = time.perf_counter(), "passed", ""
        try:
            return (yield)
        except pytest.skip.Exception as skipped:
            outcome, message = "skipped", str(skipped)
            raise
        except Exception as error:
            outcome, message = "failed", f"{type(error).__name__}: {error}"[:1000]
            raise
        except BaseException:
            outcome = ""  # interrupted: to be run again
            raise
        finally:
            if self.option.log and outcome:
                self.write(item.nodeid, outcome, message, time.perf_counter() - started)

    def write_session(self):
        """What runs here, once a process."""
        import numpy
        import torch
        import triton

        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
        self.append({"collected": self.collected, "session": {
            "commit": git.stdout.strip() or "unknown", "Triton": triton.__version__, "PyTorch": torch.__version__,
            "NumPy": numpy.__version__, "Python": platform.python_version()}})  # fmt: skip

    def append(self, row):
        with self.option.log.open("a") as file:
            file.write(json.dumps({"label": self.option.label} | row) + "\n")

    def write(self, test, outcome, message, seconds):
        """One line a test: what was compared, launched and counted."""
        launches, totals = Counter(record.kernel for record in self.emulator.records), Counter()
        for record in self.emulator.records:
            totals.update(programs=record.programs, instructions=record.counts["instructions"], seconds=record.seconds)
        self.append({"test": test, "outcome": outcome, "message": message, "launches": launches, "totals": totals,
                     "seconds": round(seconds, 2), "comparisons": self.comparisons})  # fmt: skip
