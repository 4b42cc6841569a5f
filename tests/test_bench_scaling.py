"""Exponents and the model of many GPUs."""

import json
import math

import pytest

from bench import scaling
from bench.measuring import ceilings
from bench.measuring.rows import OURS, write
from bench.pages import links, scaling_page
from bench.scaling import exponent
from fastunet.architecture import PRESETS
from tests.bench_rows import environment, row
from tests.processes import ended, start_group

STEP = "training step"


def test_the_exponent_is_that_of_the_largest_values():
    values = [1, 2, 4, 8, 16]
    assert exponent(values, [5 * v**1.7 for v in values]) == pytest.approx(1.7)
    # a constant cost that dominates small values does not bend the fit
    assert exponent([1, 2, 64, 128, 256], [50.0, 50.0, 64.0, 128.0, 256.0]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="two points"):
        exponent([1], [1.0])


def test_an_exchange_inside_a_node_is_a_ring():
    expected = 2 * 7 / 8 * 90e9 / 450e9 + 14 * 3e-6
    assert links.exchange_seconds(8, 90 * 10**9) == pytest.approx(expected)


def test_between_nodes_every_gpu_reduces_an_eighth():
    inside = links.exchange_seconds(8, 80 * 10**9)
    expected = 2 * 7 / 8 * 10e9 / 50e9 + 6 * 8e-6
    assert links.exchange_seconds(64, 80 * 10**9) - inside == pytest.approx(expected)


def test_an_exchange_hides_behind_the_backward_pass_but_for_an_eighth():
    exchange = links.exchange_seconds(8, 10**9)
    assert links.step_seconds(8, 1.0, 10**9, overlapped=False) == pytest.approx(1 + exchange)
    assert links.step_seconds(8, 1.0, 10**9, overlapped=True) == pytest.approx(1 + exchange / 8)
    short = exchange / 10
    assert links.step_seconds(8, short, 10**9, overlapped=True) == pytest.approx(short + exchange - short * 2 / 3)
    assert links.step_seconds(1, 1.0, 10**9, overlapped=False) == 1.0


def test_strong_scaling_stops_where_small_batches_cost_the_same():
    assert links.strong_scaling_limit(512, lambda images: 1e-3 * images, 0) == 512
    assert links.strong_scaling_limit(512, lambda images: 1e-3 * max(images, 64), 0) == 8
    # so slow an exchange that two GPUs are no faster than one
    assert links.strong_scaling_limit(512, lambda images: 1e-6 * images, 10**12) == 1


def test_times_between_measured_batches():
    seconds = scaling_page.interpolated({1: 1.0, 4: 1.6, 8: 3.0})
    assert [seconds(b) for b in (0.5, 1, 2.5, 8, 16)] == pytest.approx([1.0, 1.0, 1.3, 3.0, 6.0])


def test_the_page_computes_from_gpu_rows_and_says_what_is_missing(tmp_path):
    assert scaling_page.section(tmp_path).count("pending") == 2
    rows = [row("fastunet", 2.0 * batch, OURS, step=STEP, axis="batch", value=batch, shape=f"{batch}×2×128×128")
            for batch in (1, 8, 64)]  # fmt: skip
    write(tmp_path / "test-gpu" / "x-scaling.json", environment(), rows)
    text = scaling_page.section(tmp_path)
    assert "pending" not in text
    line = next(line for line in text.splitlines() if line.startswith("| 8 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    exchange = links.exchange_seconds(8, 4 * 7_759_908)
    assert cells[1] == f"{0.128 / (0.128 + exchange):.1%}"
    assert cells[3] == "64"
    assert float(cells[5].rstrip("×")) == pytest.approx(8 / (1 + exchange / 8 / 0.128), rel=0.01)
    assert "| training step | batch | 1 – 64 | 1: 2 ms, 64: 128 ms | 1.00 |" in text


def test_efficiency_over_processes(tmp_path):
    points = (("weak", 1, 10.0), ("weak", 2, 12.5), ("strong", 1, 10.0), ("strong", 2, 6.25))
    rows = [row("fastunet", ms, OURS, step=STEP, axis=f"processes, {kind}", value=n, shape=f"{kind} {n}")
            for kind, n, ms in points]  # fmt: skip
    write(tmp_path / "cpu-x" / "x-scaling.json", environment(slug="cpu-x"), rows)
    text = scaling_page.section(tmp_path)
    assert "weak scaling of a training step, weak 1 in one process: 2 processes 80% (12.5 ms; 1 process 10 ms)" in text
    assert "strong scaling of a training step, strong 1 in one process: 2 processes 80%" in text


def quick(*arguments) -> int:
    """``bench.scaling`` of a small network, with a repeat where it takes several, on a machine of small tensors."""
    ceilings._REPEATS = scaling._WORKER_ROUNDS = 1
    ceilings._COPY_MIB, ceilings._SIDE = {"cpu": 1}, {"cpu": 64}
    PRESETS["brats"] = dict(width=4, depth=2)
    return scaling.main(arguments)


def test_two_processes_measure_weak_and_strong_steps(tmp_path):
    line = ["--worker", str(tmp_path), "--batch", "2", "--side", "16", "--device", "cpu"]
    assert [ended(process) for process in start_group(quick, *line)] == [0, 0]
    (path,) = tmp_path.rglob("*-2-processes-scaling.json")
    found = json.loads(path.read_text())["rows"]
    assert [(r["axis"], r["value"], r["batch"]) for r in found] == [
        ("processes, weak", 2, 4), ("processes, strong", 2, 2)]  # fmt: skip
    assert all(math.isfinite(r["p50_ms"]) and r["p50_ms"] > 0 for r in found)
