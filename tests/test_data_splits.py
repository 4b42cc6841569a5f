from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastunet.data import LABEL_MAPS, Case, Source, split_cases
from fastunet.errors import UserError


def make_cases(scans: list[int]) -> list[Case]:
    """One patient for each number, with as many scans."""
    return [
        Case(f"p{patient:03d}-{scan}", f"p{patient:03d}", {"flair": Source(Path("x"))}, None, "brats2023",
             LABEL_MAPS["brats2023"])
        for patient, count in enumerate(scans)
        for scan in range(count)
    ]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=3, max_size=30), st.integers(0, 5), st.randoms())
def test_no_patient_is_on_two_sides(scans, seed, random):
    cases = make_cases(scans)
    split = split_cases(cases, validation=0.2, test=0.1, seed=seed)
    sides = [{case.patient for case in side} for side in split]
    assert sum(map(len, sides)) == len(set().union(*sides)) == len(scans)
    assert sorted(case.name for side in split for case in side) == [case.name for case in cases]
    assert len(sides[1]) == max(1, round(0.2 * len(scans)))
    assert len(sides[2]) == max(1, round(0.1 * len(scans)))
    shuffled = list(cases)
    random.shuffle(shuffled)
    assert split_cases(shuffled, validation=0.2, test=0.1, seed=seed) == split


def test_seeds_give_different_splits():
    cases = make_cases([1] * 20)
    assert len({tuple(case.name for case in split_cases(cases, seed=seed).validation) for seed in range(10)}) > 5


def test_the_split_of_this_version():
    # Two processes of a run, and a resumed run, must agree; Python's own order of a set differs between processes.
    split = split_cases(make_cases([1] * 10), validation=3, seed=7)
    assert [case.patient for case in split.validation] == ["p000", "p007", "p008"]


def test_counts_and_nothing():
    cases = make_cases([2] * 6)
    split = split_cases(cases, validation=2, test=3)
    assert [len(side) for side in split] == [2, 4, 6]
    assert split_cases(cases, validation=0, test=0).train == cases
    assert split_cases(cases, validation=0.0).validation == []


def test_too_few_patients():
    message = (
        r"needs at least 3 patients \(1 for training, 1 for validation, 1 for testing\), "
        r"but there are 2 \(5 cases, such as x\)"
    )
    with pytest.raises(UserError, match=message):
        split_cases(make_cases([3, 2]), validation=0.2, test=0.2)
    with pytest.raises(UserError, match=r"at least 2 patients.* there are 1"):
        split_cases(make_cases([5]))
    with pytest.raises(UserError, match=r"at least 5 patients.* there are 4"):
        split_cases(make_cases([1] * 4), validation=4)
    with pytest.raises(UserError, match=r"at least 1 patients.* there are 0"):
        split_cases([], validation=0)


@pytest.mark.parametrize("share", [1.0, 1.5, -0.1, -2])
def test_shares_out_of_range(share):
    with pytest.raises(UserError, match="the validation side is"):
        split_cases(make_cases([1] * 5), validation=share)
