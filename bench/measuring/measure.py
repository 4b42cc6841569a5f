"""Measures one workload: builds its variants, checks them, times those that are right in turns, returns rows."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench.measuring.gate import error_shares
from bench.measuring.machine import cache_bytes, telemetry
from bench.measuring.memory import peak_bytes, saved_bytes
from bench.measuring.precision import precision_settings
from bench.measuring.rows import FAILED, OK, OTHER, WRONG, Environment, Row
from bench.measuring.timing import Budget, Timing, interleave
from bench.workloads.variants import CHANNELS_LAST, PLAIN, Variant
from bench.workloads.workload import Workload
from fastunet.inspection.repeats import Function, Runner, rotation

_GATE_SEED = 0


@dataclass(frozen=True)
class Measurement:
    """A row and the samples behind it; none where the variant was not timed."""

    row: Row
    timing: Timing | None


def measure(workload: Workload, device: torch.device, environment: Environment, budget: Budget,
            deadline: float = math.inf) -> list[Measurement]:
    """All variants of ``workload`` that can run on ``device``, those that compile last.

    A variant whose results miss the budget becomes a row in state "wrong", one that raises in state "failed"; neither
    is timed. Operands are drawn anew for each set that the calls rotate through. No variant is built after ``deadline``
    (of ``time.monotonic``).
    """
    variants = [v for v in workload.variants if workload.why_not(v, device) is None]
    variants.sort(key=lambda v: (None, "default", "max-autotune").index(v.compile_mode))
    with precision_settings(workload.precision):
        torch._dynamo.reset()
        sets = [workload.operands(device, _GATE_SEED + i) for i in range(_number_of_sets(workload, device))]
        checked = list(_checked(workload, variants, device, sets, deadline))
        right = [(row, runner) for row, runner in checked if runner is not None]
        timings = interleave([runner for _, runner in right], [runner.calls for _, runner in right], device, budget)
        state = telemetry(device)
        timed = {row.variant: timing for (row, _), timing in zip(right, timings)}
    measurements = [Measurement(_timed(row, timed.get(row.variant), workload, environment, state),
                                timed.get(row.variant)) for row, _ in checked]  # fmt: skip
    del checked, right, sets
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return measurements


def _number_of_sets(workload: Workload, device: torch.device) -> int:
    return rotation(workload.floor.bytes, cache_bytes(device))


def _checked(workload: Workload, variants: list[Variant], device: torch.device, sets: list[list[torch.Tensor]],
             deadline: float):
    """Yields each variant's row without times, and its runner if it is right."""
    exact = workload.exact(*sets[0])
    same_precision = [_eager_results(workload, variant, device, sets[0]) for variant in (PLAIN, CHANNELS_LAST)]
    functions: dict[Variant, Function] = {}
    for variant in variants:
        row = Row(workload.subject, workload.step, workload.shape, workload.batch, workload.precision, variant.name,
                  variant.role, OK)  # fmt: skip
        if time.monotonic() > deadline:
            yield replace(row, state=FAILED, note="not enough time left to build it"), None
            continue
        # a graph replays what its twin without one has compiled
        ungraphed = replace(variant, name="", graph=False)
        try:
            function = functions.get(ungraphed) or functions.setdefault(ungraphed, workload.build(variant, device))
            placed = [[variant.place(t) for t in operands] for operands in sets]
            runner = Runner(function, placed, graph=variant.graph)
            if variant.role == OTHER:
                worst = 0.0 if all(r.isfinite().all() for r in runner.results()) else math.inf
                row = replace(row, note="another network of the same widths, not in the ratios")
            else:
                worst = max(error_shares(runner.results(), same_precision, exact, workload.precision, workload.depth))
            row = replace(row, max_error=worst, **_memory(workload, function, placed[0], device))
        # any failure of a rival is a result of its own, and the other variants go on
        except Exception as error:
            yield replace(row, state=FAILED, note=_one_line(error)), None
            continue
        if worst > 1:
            yield replace(row, state=WRONG, note=f"error {worst:.3g} times its budget; not timed"), None
        else:
            yield row, runner


def _eager_results(workload: Workload, variant: Variant, device: torch.device, operands: list[torch.Tensor]):
    """PyTorch's own results in the workload's precision, on which the error budget rests."""
    return workload.build(variant, device)(*(variant.place(t) for t in operands))


def _memory(workload: Workload, function: Callable, operands: list[torch.Tensor], device: torch.device) -> dict:
    """Peak and saved memory of a call; a graph's are those of the function that it captured."""
    peak = peak_bytes(lambda: function(*operands), device)
    if not workload.differentiates:
        return dict(peak_bytes=peak)
    known = [*operands, *getattr(function, "parameters", ())]
    return dict(peak_bytes=peak, saved_bytes=saved_bytes(lambda: function(*operands), known))


def _timed(row: Row, timing: Timing | None, workload: Workload, environment: Environment, state: dict) -> Row:
    """``row`` with its times, and rates as shares of the run's ceilings."""
    if timing is None:
        return row
    p20, p50, p80 = (timing.percentile(share) for share in (0.2, 0.5, 0.8))
    tflops, gbs = workload.floor.flop / p50 / 1e12, workload.floor.bytes / p50 / 1e9
    # a CPU's ceilings are taken in two precisions
    matmul = environment.matmul_tflops.get(row.precision) or environment.matmul_tflops["fp32"]
    return replace(
        row,
        p20_ms=p20 * 1e3,
        p50_ms=p50 * 1e3,
        p80_ms=p80 * 1e3,
        rounds=len(timing.samples),
        images_per_second=row.batch / p50,
        tflops=tflops,
        gbs=gbs,
        share_of_ceiling=max(tflops / matmul, gbs / environment.copy_gbs),
        floor_ms=workload.floor.seconds(environment.copy_gbs, matmul) * 1e3,
        clock_mhz=state.get("clocks.sm", 0.0),
        temperature_c=state.get("temperature.gpu", 0.0),
    )


def _one_line(error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first}"[:200]
