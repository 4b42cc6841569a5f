"""The search for faster configurations: offline (``bench/tune.py``), or at first use under ``FASTUNET_TUNE=1``.

A search goes downhill from the best of a kernel's starts, the first of which is its heuristic's choice: a faster one
among the configurations that differ in one field becomes the next start, until none is faster. A candidate is timed
only after its results have passed the error budget.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from triton.errors import TritonError

from fastunet.inspection.repeats import device_microseconds, rotated
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
           prepare: Callable[[list[Any]], None] = lambda _: None) -> Found | None:
    """Goes downhill from the fastest of ``starts``.

    ``measure`` returns the microseconds of a configuration, or None for one that does not compile, does not fit or is
    wrong. ``prepare`` gets each round's candidates before they are measured. At ``deadline`` (by ``clock``) the best
    so far is returned. None if the first of ``starts``, the heuristic's choice, cannot be measured.
    """
    heuristic = measure(starts[0])
    if heuristic is None:
        return None
    best, times = starts[0], {starts[0]: heuristic}

    def improve(candidates: Iterable[Any]) -> bool:
        nonlocal best
        start, fresh = best, [c for c in candidates if c not in times]
        prepare(fresh)
        for candidate in fresh:
            if clock() >= deadline:
                break
            found = measure(candidate)
            times[candidate] = math.inf if found is None else found
            if times[candidate] < GAIN * times[best]:
                best = candidate
        return best is not start

    improve(starts[1:])
    while improve(neighbours(best)):
        pass
    return Found(best, times[best], heuristic, len(times))


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


class DeviceLost(RuntimeError):
    """Since a candidate ran, the device answers every call with an error: this process can measure nothing more."""


def measured(entry: Entry, function: Callable[..., Any], operand_sets: Sequence[Sequence[Any]],
             accept: Callable[[tuple[torch.Tensor, ...]], bool],
             timer: Callable[[Callable[..., Any], Sequence[Sequence[Any]]], float] = device_microseconds,
             synchronize: Callable[[], None] = torch.cuda.synchronize) -> Callable[[Any], float | None]:
    """The ``measure`` of :func:`search` for the launcher ``function``, which chooses its configuration of ``entry``.

    ``accept`` judges the results of the first operand set. ``measure`` raises :class:`DeviceLost` after an error that
    the device does not recover from, such as an illegal access.
    """

    def measure(config: Any) -> float | None:
        with _tuned.forcing(entry, config):
            try:
                if not accept(tensors(function(*operand_sets[0]))):
                    return None
                return timer(lambda *operands: tensors(function(*operands)), operand_sets)
            except (TritonError, ValueError, RuntimeError, AssertionError, KeyError):
                # it does not compile, does not fit, or is not one of this kernel's
                try:
                    synchronize()
                except RuntimeError as error:
                    raise DeviceLost(f"{entry[0]} {list(entry[1])}, {config}: {error}") from error
                return None

    return measure


def tunable(launcher: Callable[..., Any]) -> Callable[..., Any]:
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
                sets = rotated(operands, torch.cuda.get_device_properties(None).L2_cache_size)
                measure = measured(entry, launcher, sets, lambda found: _close(found, expected))
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
