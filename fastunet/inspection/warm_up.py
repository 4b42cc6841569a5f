"""Kernels of networks compiled before their first use, by several processes, into Triton's cache on disk."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastunet.architecture import Architecture
from fastunet.inspection.kernel_table import Use, distinct, uses_of
from fastunet.inspection.layers import network_calls, standalone_calls
from fastunet.inspection.machine_code import compile_launch

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """What is to be compiled: training and inference of ``network`` on ``batch`` images of ``size`` in ``precision``,
    for ``architecture``, a compute capability times ten."""

    network: Architecture
    size: tuple[int, int]
    batch: int
    precision: str
    architecture: int


def kernels(work: Work) -> list[Use]:
    """Each kernel of ``work`` once. Losses and metrics take the logits in float32 too, as ``fastunet train`` does.

    Raises:
        ValueError: the size does not fit the network.
    """
    torch.backends.cudnn.allow_tf32 = work.precision == "tf32"
    arguments = work.network, work.batch, *work.size
    calls = network_calls(*arguments)
    for output in ("logits", "probabilities", "labels"):
        calls += network_calls(*arguments, training=False, output=output)
    found = uses_of("", calls, DTYPES[work.precision], work.architecture)
    scores = [call for call in calls + standalone_calls(*arguments) if call.layer in ("loss", "metrics")]
    return distinct(found + uses_of("", scores, torch.float32, work.architecture))


def warm_up(works: Sequence[Work], processes: int, progress: Callable[[int, int], None] | None = None) -> int:
    """Compiles every kernel of ``works``, telling ``progress`` how many of how many are there; returns their number."""
    number = len(_all(works))
    # not forked: a copy of this process would hold its CUDA context, which does not survive that
    with multiprocessing.get_context("spawn").Pool(processes, _begin, (works,)) as pool:
        for done, _ in enumerate(pool.imap_unordered(_compile, range(number)), 1):
            if progress is not None:
                progress(done, number)
    return number


def _all(works: Sequence[Work]) -> list[Use]:
    return distinct(use for work in works for use in kernels(work))


_kernels: list[Use] = []
"""In a process of the pool: what is to be compiled."""


def _begin(works: Sequence[Work]) -> None:
    _kernels[:] = _all(works)


def _compile(index: int) -> None:
    use = _kernels[index]
    compile_launch(use.launch, use.architecture)
