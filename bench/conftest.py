"""``pytest bench/ --benchmark-only``: one benchmark per variant of each workload, measured in turns with its rivals.

pytest-benchmark times one function after another with a clock of the host. Here the variants of a workload are timed
together by ``measuring.timing``, when the first of their tests runs, and each test hands its samples over to be shown.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from bench.measuring.machine import default_device, environment
from bench.measuring.measure import Measurement, measure
from bench.measuring.rows import OK, RESULTS, UNCOMMITTED, Results, write
from bench.run import time_budget
from bench.workloads.variants import Variant
from bench.workloads.workload import Workload

DEVICE = default_device()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastunet benchmarks")
    group.addoption("--full", action="store_true", help="every shape, precision and variant, instead of a quick choice")
    group.addoption("--save", action="store_true",
                    help="write the rows to bench/results, to be committed, instead of .benchmarks")  # fmt: skip


class Session:
    """Measurements so far; a workload is measured when the first of its variants is asked for."""

    def __init__(self, device: torch.device, root: Path):
        self.environment = environment(device)
        self._device, self._rows = device, []
        self._path = root / self.environment.slug / Results(self.environment, ()).filename
        self._measured: dict[str, dict[str, Measurement]] = {}

    def measurement(self, workload: Workload, variant: Variant) -> Measurement:
        """That of ``variant``, beside all others of the workload."""
        if workload.name not in self._measured:
            found = measure(workload, self._device, self.environment, time_budget(self._device))
            self._measured[workload.name] = {m.row.variant: m for m in found}
            self._rows += [m.row for m in found]
            write(self._path, self.environment, self._rows)
        return self._measured[workload.name][variant.name]


class ReplayedClock:
    """A clock that :meth:`advance` moves; pytest-benchmark reads it before and after each round."""

    def __init__(self):
        self.now = 0.0

    def advance(self, seconds: float) -> None:
        self.now += seconds


_CLOCK = ReplayedClock()


def replayed_time() -> float:
    """The time in seconds that the samples handed over so far add up to."""
    return _CLOCK.now


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    return Session(DEVICE, RESULTS if request.config.getoption("--save") else UNCOMMITTED)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises tests over the workloads of their module's ``workloads(device, full)`` and their variants."""
    if "workload" not in metafunc.fixturenames:
        return
    workloads = metafunc.module.workloads(DEVICE, metafunc.config.getoption("--full"))
    cases = []
    for workload in workloads:
        marks = pytest.mark.benchmark(group=workload.name, timer=replayed_time)
        name = workload.name.replace("×", "x").replace(" → ", "-")
        cases += [pytest.param(workload, v, id=f"{name}-{v.name}", marks=marks) for v in workload.variants]
    metafunc.parametrize("workload, variant", cases)


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark):
    """Runs the benchmark of a test's workload and variant; skips what cannot run, fails what is wrong."""

    def run(workload: Workload, variant: Variant) -> None:
        reason = workload.why_not(variant, DEVICE)
        if reason:
            pytest.skip(reason)
        found = request.getfixturevalue("session").measurement(workload, variant)
        if found.row.state != OK:
            pytest.fail(f"{found.row.state}: {found.row.note}")
        samples = itertools.cycle(found.timing.samples)
        benchmark.extra_info.update(share_of_floor=found.row.share_of_floor, max_error=found.row.max_error,
                                    peak_bytes=found.row.peak_bytes, saved_bytes=found.row.saved_bytes)  # fmt: skip
        benchmark.pedantic(lambda: _CLOCK.advance(next(samples)), rounds=len(found.timing.samples))

    return run
