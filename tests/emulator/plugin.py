"""pytest plugin: the tests of the kernels in the emulator, in the dtypes that the interpreter leaves out too.

    python -m pytest -p tests.emulator.plugin --emulate 90 tests/kernels -k bf16
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from tests import emulator, tolerance

_TF32_EPSILON = 2**-9  # both operands lose 13 bits of mantissa, by truncation


def pytest_addoption(parser):
    group = parser.getgroup("emulator")
    group.addoption("--emulate", type=int, choices=(80, 90), help="run compiled kernels in the emulator")
    group.addoption("--tf32", action="store_true", help="emulated: float32 products in tf32")
    group.addoption("--log", help="emulated: append a line of JSON for each test to this file")
    group.addoption("--one-schedule", action="store_true", help="emulated: only the lazy schedule, with detector")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config):
    options = early_config.known_args_namespace
    emulator.ARCHITECTURE, emulator.TF32 = options.emulate, options.tf32
    if options.emulate and os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("--emulate runs compiled kernels; unset TRITON_INTERPRET")


def pytest_configure(config):
    if emulator.ARCHITECTURE:
        config.pluginmanager.register(_Emulation(config), "emulation")


class _Emulation:
    def __init__(self, config):
        self.log = config.getoption("--log")
        self.only_lazy = config.getoption("--one-schedule")
        self.comparisons: list[dict] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session):
        """Compiles and launches in the emulator as long as tests run."""
        import torch

        from tests.emulator.driver import emulated
        from tests.emulator.launch import LAZY, Emulator

        if emulator.TF32:
            tolerance.EPSILON[torch.float32] = _TF32_EPSILON
        tolerance.OBSERVERS.append(self.compared)
        self.emulator = Emulator((LAZY,)) if self.only_lazy else Emulator()
        with emulated(emulator.ARCHITECTURE, self.emulator):
            return (yield)

    def compared(self, name, dtype, error, budget):
        self.comparisons.append({"name": name, "dtype": str(dtype)[6:], "error": error, "budget": budget})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        self.comparisons.clear()
        self.emulator.records.clear()
        started, outcome = time.perf_counter(), "failed"
        message = ""
        try:
            result = yield
            outcome = "passed"
            return result
        except pytest.skip.Exception as skipped:
            outcome, message = "skipped", str(skipped)
            raise
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"[:1000]
            raise
        finally:
            if self.log:
                self.write(item.nodeid, outcome, message, time.perf_counter() - started)

    def write(self, test, outcome, message, seconds):
        """One line a test: what was compared, launched and counted."""
        counts, launches = Counter(), Counter()
        for record in self.emulator.records:
            launches[record.kernel] += 1
            counts["programs"] += record.programs
            counts["instructions"] += record.counts["instructions"]
        row = {"test": test, "outcome": outcome, "message": message, "seconds": round(seconds, 2),
               "comparisons": self.comparisons, "launches": launches, "counts": counts}  # fmt: skip
        with Path(self.log).open("a") as file:
            file.write(json.dumps(row) + "\n")
