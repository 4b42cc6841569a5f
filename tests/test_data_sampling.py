from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastunet.data.sampling import count_steps, epoch_order, split_into_batches


def foreground_of(n: int, share: float) -> np.ndarray:
    return np.random.default_rng(0).random(n) < share


@settings(max_examples=150, deadline=None)
@given(
    samples=st.integers(1, 60),
    batch=st.integers(1, 7),
    world=st.integers(1, 4),
    wrap=st.booleans(),
    start=st.integers(0, 4),
)
def test_processes_together_see_what_one_sees(samples, batch, world, wrap, start):
    order = np.random.default_rng(samples).permutation(samples)
    one = list(split_into_batches(order, batch * world, wrap=wrap, start=start))
    many = [
        {b.step: b for b in split_into_batches(order, batch, rank=rank, world=world, wrap=wrap, start=start)}
        for rank in range(world)
    ]
    for whole in one:
        parts = [process[whole.step] for process in many if whole.step in process]
        np.testing.assert_array_equal(np.concatenate([part.indices for part in parts]), whole.indices)
        np.testing.assert_array_equal(np.concatenate([part.positions for part in parts]), whole.positions)
        if wrap:
            assert [len(part.indices) for part in parts] == [batch] * world
    assert [b.step for b in one] == list(range(start, count_steps(samples, batch, world)))
    assert set().union(*many) <= {b.step for b in one}


@settings(max_examples=100, deadline=None)
@given(samples=st.integers(1, 60), batch=st.integers(1, 9), wrap=st.booleans())
def test_every_sample_comes_and_positions_are_unique(samples, batch, wrap):
    order = np.random.default_rng(samples).permutation(samples)
    batches = list(split_into_batches(order, batch, wrap=wrap))
    indices = np.concatenate([b.indices for b in batches])
    positions = np.concatenate([b.positions for b in batches])
    np.testing.assert_array_equal(positions, np.arange(len(positions)))
    np.testing.assert_array_equal(indices, np.resize(order, len(indices)))
    assert len(indices) == (-(-samples // batch) * batch if wrap else samples)


def test_any_step_can_be_resumed():
    order = epoch_order(foreground_of(50, 0.3), seed=1, epoch=2, foreground_fraction=0.5)
    every = list(split_into_batches(order, 4, rank=1, world=2, wrap=True))
    for start in range(len(every) + 1):
        rest = list(split_into_batches(order, 4, rank=1, world=2, wrap=True, start=start))
        assert [(b.step, b.indices.tolist(), b.positions.tolist()) for b in rest] == [
            (b.step, b.indices.tolist(), b.positions.tolist()) for b in every[start:]
        ]


def test_orders_follow_from_seed_and_epoch():
    flags = foreground_of(80, 0.3)
    orders = {(s, e): epoch_order(flags, s, e, 0.5).tolist() for s in range(3) for e in range(3)}
    assert len({tuple(order) for order in orders.values()}) == 9
    for (seed, epoch), order in orders.items():
        assert epoch_order(flags, seed, epoch, 0.5).tolist() == order


@pytest.mark.parametrize("fraction", [None, 0.0, 0.25])
def test_enough_foreground_is_left_alone(fraction):
    flags = foreground_of(80, 0.5)
    assert sorted(epoch_order(flags, 0, 0, fraction)) == list(range(80))


@pytest.mark.parametrize("fraction", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_foreground_is_oversampled_evenly(fraction, share):
    flags = foreground_of(200, share)
    order = epoch_order(flags, 3, 1, fraction)
    assert len(order) == 200
    assert flags[order].sum() == round(fraction * 200)
    for group in (flags, ~flags):
        counts = np.bincount(order, minlength=200)[group]
        assert counts.max() - counts.min() <= 1
    # Mixed, not one group after the other: the first half has its part of the foreground.
    if fraction < 1:
        assert abs(flags[order[:100]].sum() - fraction * 100) < 25


def test_only_foreground():
    assert sorted(epoch_order(np.ones(9, bool), 0, 0, 1.0)) == list(range(9))


def test_the_orders_of_this_version():
    # A resumed run must find the order that it began with: a change here breaks resuming across versions.
    order = epoch_order(np.arange(10) % 4 == 0, seed=5, epoch=3, foreground_fraction=0.6)
    assert order.tolist() == [7, 5, 8, 8, 0, 9, 4, 2, 0, 4]


@pytest.mark.parametrize(("batch", "rank", "world"), [(0, 0, 1), (10**12, 0, 1), (4, 2, 2), (4, -1, 2)])
def test_bad_ranks(batch, rank, world):
    with pytest.raises(ValueError, match="out of range"):
        next(split_into_batches(np.arange(5), batch, rank=rank, world=world))
