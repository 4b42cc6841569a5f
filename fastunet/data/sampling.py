"""Which slices each step of an epoch uses: a function of (seed, epoch), whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_MOST_SAMPLES = 1 << 20
"""In one batch, more than any device holds; an epoch's last batch repeats samples until it is full."""


class Batch(NamedTuple):
    """The samples of one process for one step.

    Attributes:
        step: counts the steps of the epoch, over all processes.
        positions: int64 (n,), places in the order of the epoch; unique, so that they can seed an augmentation.
        indices: int64 (n,), the samples of the data set at these places.
        epoch: that the order belongs to.
    """

    step: int
    positions: np.ndarray
    indices: np.ndarray
    epoch: int = 0


def epoch_order(foreground: np.ndarray, seed: int, epoch: int, foreground_fraction: float | None) -> np.ndarray:
    """A shuffled order of as many samples as there are, int64 (n,).

    Args:
        foreground: bool (n,), whether a sample holds foreground.
        seed: of the whole run.
        epoch: counts from 0.
        foreground_fraction: the least share of the order that holds foreground. If there is less, samples with
            foreground repeat in place of others, both drawn as evenly as possible. None takes every sample once.
    """
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed is {seed} and epoch {epoch}; expected at least 0")
    rng = np.random.default_rng([seed, epoch])
    n = len(foreground)
    with_foreground, without = np.flatnonzero(foreground), np.flatnonzero(~foreground)
    wanted = round((foreground_fraction or 0) * n)
    if wanted <= with_foreground.size:
        return rng.permutation(n)
    drawn = np.concatenate([_draw(rng, with_foreground, wanted), _draw(rng, without, n - wanted)])
    return rng.permutation(drawn)


def split_into_batches(
    order: np.ndarray,
    batch_size: int,
    *,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    wrap: bool = False,
    epoch: int = 0,
) -> Iterator[Batch]:
    """The batches of process ``rank`` of ``world`` from step ``start`` on.

    A step takes the next ``batch_size * world`` samples of the order, and process r the r-th ``batch_size`` of them:
    two processes with batches of b see at every step what one process with batches of 2b sees.

    Args:
        order: the samples of the epoch.
        batch_size: of one process.
        rank: this process.
        world: the number of processes.
        start: the first step wanted.
        wrap: begin the order again to fill the last step, as training needs it; otherwise the last batch is smaller,
            and a process left without samples skips it.
        epoch: handed on to the batches.
    """
    if not 1 <= batch_size <= _MOST_SAMPLES or not 0 <= rank < world or start < 0:
        raise ValueError(f"batch_size {batch_size}, rank {rank} of {world} or start {start} is out of range")
    steps = count_steps(len(order), batch_size, world)
    total = steps * batch_size * world if wrap else len(order)
    for step in range(start, steps):
        first = (step * world + rank) * batch_size
        positions = np.arange(first, min(first + batch_size, total))
        if positions.size:
            yield Batch(step, positions, order[positions % len(order)], epoch)


def count_steps(samples: int, batch_size: int, world: int = 1) -> int:
    """The steps of an epoch over ``samples``."""
    if batch_size < 1 or world < 1:
        raise ValueError(f"batches of {batch_size} in {world} processes; expected at least 1 of both")
    return math.ceil(samples / (batch_size * world))


def _draw(rng: np.random.Generator, pool: np.ndarray, count: int) -> np.ndarray:
    """``count`` samples of ``pool``, each taken k or k + 1 times."""
    if count == 0:
        return pool[:0]
    rounds = math.ceil(count / len(pool))
    return np.concatenate([rng.permutation(pool) for _ in range(rounds)])[:count]
