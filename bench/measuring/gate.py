"""Right first: the error budget that a variant must keep before it is timed.

The budget comes from data, as in the tests: with PyTorch's own error in the same precision,
``max|result - exact| <= 2 max|plain - exact| + 2 depth eps max|exact|`` for every tensor of the result, where ``exact``
is computed in float64, ``plain`` is the plain build in the memory layout that errs more, and ``depth`` counts the
layers that round one after the other. NaN never passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bench.measuring.precision import EPSILON


def error_shares(actual: Sequence[torch.Tensor], plain: Sequence[Sequence[torch.Tensor]], exact: Sequence[torch.Tensor],
                 precision: str, depth: int) -> list[float]:
    """For each result the largest error as a share of its budget; above 1 (or infinite, for NaN) is wrong.

    ``plain`` holds the results of each plain run.

    Labels (uint8) have ``exact`` logits (N, classes, H, W): a label's error is how far its class's logit lies below
    the largest one, so that a tie may fall either way.

    Raises:
        ValueError: a result's shape or the number of results is not that of the reference.
    """
    if len(actual) != len(exact):
        raise ValueError(f"{len(actual)} results where the reference has {len(exact)}")
    shares = []
    for index, (result, reference) in enumerate(zip(actual, exact)):
        error = _error(result, reference, index)
        plain_error = max(_error(results[index], reference, index) for results in plain)
        scale = reference.abs().max().item() if reference.numel() else 0.0
        budget = 2 * plain_error + 2 * depth * EPSILON[precision] * scale
        shares.append(_share(error, budget))
    return shares


def _share(error: float, budget: float) -> float:
    if error == 0:
        return 0.0
    return error / budget if budget > 0 and error == error else math.inf


def _error(result: torch.Tensor, exact: torch.Tensor, index: int) -> float:
    """The largest absolute deviation from ``exact``, or the largest regret of labels; NaN if any is."""
    labels = result.dtype == torch.uint8
    shape = (exact.shape[0], *exact.shape[2:]) if labels else exact.shape
    if result.shape != shape:
        raise ValueError(f"result {index} has shape {tuple(result.shape)}, the reference {tuple(shape)}")
    if result.numel() == 0:
        return 0.0
    if labels:
        regret = exact.amax(dim=1, keepdim=True) - exact.gather(1, result.long().unsqueeze(1))
        return regret.max().item()
    return (result.detach().double() - exact).abs().max().item()
