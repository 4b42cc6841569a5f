"""The search for faster configurations: offline (``bench/tune.py``), or at first use under ``FASTUNET_TUNE=1``.

A search goes downhill from the best of a kernel's starts, the first of which is its heuristic's choice: a faster one
among the configurations that differ in one field becomes the next start, until none is faster. A candidate is timed
only after its results have passed the error budget.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from triton.errors import TritonError

from fastunet.kernels import _tuned
from fastunet.kernels._tuned import Entry

GAIN = 0.98
"""A candidate replaces the best one only below this share of its time; smaller differences are noise."""


@dataclasses.dataclass(frozen=True)
class Found:
    """The outcome of a search: the winner, its median microseconds, and those of the heuristic's choice."""

    config: Any
    microseconds: float
    heuristic_microseconds: float
    tried: int


def neighbours(config: Any) -> Iterator[Any]:
    """Configurations that differ from ``config`` in one number: tile sides by a factor of two, warps, stages."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) is not int:
            continue
        if field.name == "num_warps":
            values = [v for v in (value // 2, value * 2) if 2 <= v <= 8]
        elif field.name == "num_stages":
            values = [v for v in (value - 1, value + 1) if 1 <= v <= 6]
        else:
            values = [v for v in (value // 2, value * 2) if v >= 1]
        for changed in values:
            yield dataclasses.replace(config, **{field.name: changed})


def search(starts: list[Any], measure: Callable[[Any], float | None], *, deadline: float = float("inf"),
           clock: Callable[[], float] = time.monotonic,
           prepare: Callable[[list], None] = lambda _: None) -> Found | None:
    """Goes downhill from the fastest of ``starts``.

    ``measure`` returns the microseconds of a configuration, or None for one that does not compile, does not fit or is
    wrong. ``prepare`` gets each round's candidates before they are measured. At ``deadline`` (by ``clock``) the best
    so far is returned. None if the first of ``starts``, the heuristic's choice, cannot be measured.
    """
    best, times = starts[0], {starts[0]: measure(starts[0])}
    if times[best] is None:
        return None

    def improve(candidates: Iterable[Any]) -> bool:
        nonlocal best
        start, fresh = best, [c for c in candidates if c not in times]
        prepare(fresh)
        for candidate in fresh:
            if clock() >= deadline:
                break
            times[candidate] = measure(candidate)
            if times[candidate] is not None and times[candidate] < GAIN * times[best]:
                best = candidate
        return best is not start

    improve(starts[1:])
    while improve(neighbours(best)):
        pass
    return Found(best, times[best], times[starts[0]], len(times))


def error_within_budget(actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether ``max|actual - exact| <= 2 max|same_dtype - exact| + 2 eps max|exact|``; NaN never passes.

    ``same_dtype`` is PyTorch's result in the dtype of ``actual``, ``exact`` the float64 reference.
    """
    if actual.numel() == 0 or not actual.is_floating_point():
        return bool(torch.equal(actual, same_dtype))
    exact = exact.double()
    budget = 2 * (same_dtype.double() - exact).abs().max() + 2 * torch.finfo(actual.dtype).eps * exact.abs().max()
    return bool((actual.double() - exact).abs().max() <= budget)


def tensors(results: Any) -> tuple[torch.Tensor, ...]:
    """The results of a launcher as a tuple."""
    return results if isinstance(results, tuple) else (results,)


def device_microseconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median time on the current CUDA device of ``run``, after two calls to warm up."""
    for _ in range(2):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    marks[-1].synchronize()
    return 1000 * statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def measured(entry: Entry, run: Callable[[], Any], accept: Callable[[tuple[torch.Tensor, ...]], bool],
             timer: Callable[[Callable[[], Any]], float] = device_microseconds) -> Callable[[Any], float | None]:
    """The ``measure`` of :func:`search` for the launcher call ``run``, which chooses its configuration of ``entry``."""

    def measure(config: Any) -> float | None:
        with _tuned.forcing(entry, config):
            try:
                if not accept(tensors(run())):
                    return None
                return timer(run)
            except (TritonError, ValueError, RuntimeError):
                return None  # it does not compile, does not fit, or is not one of this kernel's

    return measure


def tunable(launcher: Callable) -> Callable:
    """``launcher``, or where ``FASTUNET_TUNE=1`` one that searches at the first call of each key and keeps the winner.

    The winners hold for this process. A candidate must reproduce what the heuristic's configuration computes, up to
    the rounding of its dtype. Nothing is searched while a CUDA graph is captured.
    """
    if os.environ.get("FASTUNET_TUNE") != "1" or not torch.cuda.is_available():
        return launcher

    @functools.wraps(launcher)
    def searching(*operands: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            return launcher(*operands)
        with _tuned.asking() as asked:
            results = launcher(*operands)
        expected = tensors(results)
        for entry, starts in asked.items():
            if not _tuned.is_kept(entry):
                measure = measured(entry, lambda: launcher(*operands), lambda found: _close(found, expected))
                found = search(starts, measure)
                _tuned.keep(entry, found.config if found else starts[0])
        return results

    return searching


def _close(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> bool:
    """Whether two results of the same sums, taken in other orders, agree as far as their dtype lets them."""
    for a, b in zip(found, expected):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return False
        elif a.numel() and not (a - b).abs().max() <= 8 * torch.finfo(a.dtype).eps * b.abs().max():
            return False
    return True
