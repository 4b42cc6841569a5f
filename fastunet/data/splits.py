"""Splits by patient: no patient is on two sides."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fastunet.arguments import checked
from fastunet.data.case import Case
from fastunet.data.volumes import read_geometry
from fastunet.errors import UserError


class Split(NamedTuple):
    """The cases of each side, in the order of their names."""

    train: list[Case]
    validation: list[Case]
    test: list[Case]


@checked
def split_cases(cases: Iterable[Case], *, validation: float = 0.2, test: float = 0.0, seed: int = 0) -> Split:
    """Splits ``cases`` so that all scans of a patient stay together.

    The result follows from the patients and ``seed``, not from the order of ``cases``. A single stack of images, such
    as that of the ISBI challenge, is shared out by pages: the first go to training, the last to the other sides.

    Args:
        cases: the cases.
        validation: an integer is a number of patients, a float below 1 a share of them, rounded, but at least one.
        test: the same for the test side.
        seed: a non-negative integer.

    Raises:
        UserError: a share outside [0, 1), a negative number, or fewer patients than the sides need.
    """
    cases = sorted(cases, key=lambda case: case.name)
    if len(cases) == 1 and cases[0].is_image and (pages := _pages(cases[0])) > 2:
        return _shared_out(cases[0], pages, validation, test)
    patients = sorted({case.patient for case in cases})
    n_validation = _patients_for("validation", validation, len(patients))
    n_test = _patients_for("test", test, len(patients))
    needed = 1 + n_validation + n_test
    if len(patients) < needed:
        raise UserError(
            f"the split needs at least {needed} patients (1 for training, {n_validation} for validation, "
            f"{n_test} for testing), but there are {len(patients)} ({len(cases)} cases"
            + (f", such as {cases[0].files[0]})" if cases else ")")
        )
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected at least 0")
    order = [patients[index] for index in np.random.default_rng(seed).permutation(len(patients))]
    side = dict.fromkeys(order, 0)
    side.update(dict.fromkeys(order[:n_validation], 1))
    side.update(dict.fromkeys(order[n_validation : n_validation + n_test], 2))
    return Split(*([case for case in cases if side[case.patient] == number] for number in range(3)))


def _patients_for(name: str, wanted: float, patients: int) -> int:
    if isinstance(wanted, int) and wanted >= 0:
        return wanted
    if not 0 <= wanted < 1:
        raise UserError(f"the {name} side is {wanted}; expected a share from 0 to below 1 or a number of patients")
    return max(round(wanted * patients), 1) if wanted else 0


def _pages(case: Case) -> int:
    return read_geometry(case.files[0]).shape[2]


def _shared_out(case: Case, pages: int, validation: float, test: float) -> Split:
    """Neighbouring pages of a stack are alike, so each side gets a run of them."""
    n_validation = _patients_for("validation", validation, pages)
    n_test = _patients_for("test", test, pages)
    if n_validation + n_test >= pages:
        raise UserError(f"{case.files[0]} has {pages} pages, too few for the split")
    ends = [0, pages - n_validation - n_test, pages - n_test, pages]
    sides = [
        [dataclasses.replace(case, pages=(start, stop), name=f"{case.name} {start + 1}-{stop}")] if stop > start else []
        for start, stop in itertools.pairwise(ends)
    ]
    return Split(*sides)
