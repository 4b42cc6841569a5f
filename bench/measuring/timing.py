"""Times of several variants, taken in turns: each round gives every one a sample, so that drift reaches all alike."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Samples in seconds, each the mean of the calls of one round."""

    samples: tuple[float, ...]

    def percentile(self, share: float) -> float:
        """The sample below which ``share`` of them lie, linearly interpolated."""
        return float(np.quantile(self.samples, share))


@dataclass(frozen=True)
class Budget:
    """How long a comparison may take: rounds until ``seconds`` are spent, within the bounds."""

    seconds: float = 4.0
    least_rounds: int = 5
    most_rounds: int = 60
    least_sample: float = 2e-3
    """Seconds; shorter passes are repeated within a sample, so that a clock's resolution does not show."""
    pause: float = 0.05
    """Seconds before each sample, until threads of other libraries, ONNX Runtime's, wait no longer on the cores."""


def interleave(passes: Sequence[Callable[[], object]], calls: Sequence[int], device: torch.device,
               budget: Budget) -> list[Timing]:
    """Times every function of ``passes``, which makes ``calls`` calls; results are seconds a call.

    After a warm-up, which also says how many passes make a sample, each round takes one sample of each function,
    beginning with another one every time.
    """
    if not passes:
        return []
    clock = clock_of(device)
    for run in passes:
        clock(run, 1)
    estimates = [max(clock(run, 1), 1e-7) for run in passes]
    repeats = [max(1, round(budget.least_sample / estimate)) for estimate in estimates]
    round_seconds = sum(budget.pause + estimate * repeat for estimate, repeat in zip(estimates, repeats))
    rounds = min(max(int(budget.seconds / round_seconds), budget.least_rounds), budget.most_rounds)
    samples: list[list[float]] = [[] for _ in passes]
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        for round_index in range(rounds):
            for offset in range(len(passes)):
                i = (round_index + offset) % len(passes)
                time.sleep(budget.pause)
                samples[i].append(clock(passes[i], repeats[i]) / repeats[i] / calls[i])
    finally:
        if gc_was_on:
            gc.enable()
    return [Timing(tuple(taken)) for taken in samples]


def open_second_pool() -> None:
    """Leaves a thread with OpenMP threads of its own, as a data loader's that has run a PyTorch operation.

    GNU OpenMP then counts more threads than cores, and puts those that wait to sleep without letting them spin.
    """
    opened = threading.Event()

    def wait() -> None:
        torch.ones(2**20).exp_()
        opened.set()
        threading.Event().wait()

    threading.Thread(target=wait, daemon=True).start()
    opened.wait()


def clock_of(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    """``clock(run, repeats)``: the seconds that so many calls of ``run`` take on ``device``."""
    return _seconds_on_cuda if device.type == "cuda" else _seconds_on_cpu


def _seconds_on_cuda(run: Callable[[], object], repeats: int) -> float:
    """Between two events on the stream: what the device took, gaps between launches included."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _seconds_on_cpu(run: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - begin
