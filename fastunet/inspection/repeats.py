"""How a call is repeated to be timed: over operands that no cache holds any more, on a GPU as a graph without Python.

The benchmarks and the search for configurations time through here, so that what one finds the other sees.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

Function = Callable[..., tuple[torch.Tensor, ...]]
_MOST_SETS = 16


def rotation(bytes_of_a_call: float, cache_bytes: int) -> int:
    """As many operand sets as it takes to move twice the last-level cache before the first one comes again."""
    return min(max(math.ceil(2 * cache_bytes / max(bytes_of_a_call, 1)), 1), _MOST_SETS)


def rotated(operands: Sequence[Any], cache_bytes: int) -> list[list[Any]]:
    """``operands`` and copies of its tensors, as many as :func:`rotation` asks for."""
    moved = sum(a.numel() * a.element_size() for a in operands if isinstance(a, torch.Tensor))
    copies = [[a.clone() if isinstance(a, torch.Tensor) else a for a in operands]
              for _ in range(rotation(moved, cache_bytes) - 1)]  # fmt: skip
    return [list(operands), *copies]


class Runner:
    """A function and the operand sets that its calls rotate through, so that no call finds its inputs in the cache."""

    def __init__(self, function: Function, operand_sets: Sequence[Sequence[torch.Tensor]], *, graph: bool):
        self.function, self.operand_sets = function, operand_sets
        self.calls = len(operand_sets)
        self._graph: torch.cuda.CUDAGraph | None = None
        if graph:
            self._capture()

    def __call__(self) -> None:
        """One pass: a call on each operand set."""
        if self._graph is not None:
            self._graph.replay()
            return
        for operands in self.operand_sets:
            self.function(*operands)

    def results(self) -> tuple[torch.Tensor, ...]:
        """The results of the first operand set, as this variant computes them."""
        if self._graph is None:
            return self.function(*self.operand_sets[0])
        for result in self._results:
            # what a replay leaves unwritten must show
            result.fill_(float("nan") if result.is_floating_point() else 255)
        self._graph.replay()
        torch.cuda.synchronize()
        return self._results

    def _capture(self) -> None:
        """Captures a whole pass; three calls on a side stream first, as PyTorch asks."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.function(*self.operand_sets[0])
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            results = [self.function(*operands) for operands in self.operand_sets]
        self._results = results[0]


def device_microseconds(function: Function, operand_sets: Sequence[Sequence[Any]], repeats: int = 10) -> float:
    """Median microseconds of a call on the current CUDA device, from replays of a graph of all operand sets."""
    runner = Runner(function, operand_sets, graph=True)
    runner()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        runner()
        mark.record()
    marks[-1].synchronize()
    median: float = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return 1000 * median / runner.calls
