"""Wrong arguments of the public functions of ``fastunet.data`` raise ValueError or TypeError, nothing from below."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastunet.data import (
    LABEL_MAPS,
    CaseSlices,
    LabelMap,
    SliceDataset,
    cases_from_files,
    check_geometry,
    discover_cases,
    fit_slice,
    read_geometry,
    read_labels,
    read_volume,
    split_cases,
    unfit_slice,
    write_labels,
    write_map,
)
from fastunet.data.label_tables import label_map_from_json
from tests.data_files import brats_case

WRONG = [
    None, 5, -1, 10**12, 1.5, float("nan"), "x", "", b"x", [], [1], {}, (1, 2, 3), True, "\0", object(), len,
    np.array("x"), np.zeros((2, 2)), np.zeros((3, 3, 3), complex), torch.zeros(2, 2), torch.zeros(2, 2).to_sparse(),
]  # fmt: skip
TABLE = LABEL_MAPS["brats2021"]
REGIONS = label_map_from_json({"background": 0, "a": [1, 2], "b": [2]}, "x", "f", [1, 2])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("arguments")
    for number in range(2):
        brats_case(root / "data" / f"case_{number}", seed=number)
    cases = discover_cases(root / "data")
    flair = cases[0].modalities["flair"].path
    data = SliceDataset(cases, cache_dir=root / "cache")
    return SimpleNamespace(root=root, cases=cases, case=cases[0], flair=flair, like=read_volume(flair), data=data)


CALLS = {
    "read_volume": lambda m: (read_volume, [m.flair], dict(on_nan="error", channel=None)),
    "read_geometry": lambda m: (read_geometry, [m.flair], {}),
    "read_labels": lambda m: (read_labels, [m.case.label, TABLE], {}),
    "write_labels": lambda m: (write_labels, [m.root / "o.nii", np.zeros((6, 5, 4), np.uint8), m.like, TABLE], {}),
    "write_map": lambda m: (write_map, [m.root / "o.nii", np.zeros((6, 5, 4)), m.like], {}),
    "discover_cases": lambda m: (discover_cases, [m.root / "data"], dict(modalities=("flair",), edition=None)),
    "cases_from_files": lambda m: (cases_from_files, [[m.flair], ("flair",)], {}),
    "check_geometry": lambda m: (check_geometry, [m.case, ("flair",)], dict(label=True)),
    "split_cases": lambda m: (split_cases, [m.cases], dict(validation=1, test=0, seed=0)),
    "fit_slice": lambda m: (fit_slice, [np.zeros((2, 5, 5)), 4], {}),
    "unfit_slice": lambda m: (unfit_slice, [np.zeros((2, 5, 5)), (4, 4)], {}),
    "encode": lambda m: (TABLE.encode, [np.zeros((2, 2)), "f"], {}),
    "decode": lambda m: (TABLE.decode, [np.zeros((2, 2), np.uint8)], {}),
    "encode_regions": lambda m: (REGIONS.encode_regions, [np.zeros((2, 2), np.uint8)], {}),
    "decode_regions": lambda m: (REGIONS.decode_regions, [np.zeros((2, 2, 2), bool)], {}),
    "from_dict": lambda m: (LabelMap.from_dict, [TABLE.to_dict()], {}),
    "load": lambda m: (m.data.load, [[0, 1]], {}),
    "whole": lambda m: (m.data.whole, [0], {}),
    "CaseSlices": lambda m: (CaseSlices, [m.case, ("flair",)], dict(size=None, axis=2, normalise=True, on_nan="error")),
    "SliceDataset": lambda m: (
        SliceDataset, [m.cases], dict(cache_dir=m.root / "cache", modalities=("flair",), size=4, axis=2, on_nan="error",
                                      foreground_fraction=0.5, normalise=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments(made, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # some of these values are names of folders
    function, args, options = CALLS[name](made)
    function(*args, **options)
    refused = 0
    for value in WRONG:
        calls = [([*args[:place], value, *args[place + 1 :]], options) for place in range(len(args))]
        calls += [(args, options | {key: value}) for key in options]
        for wrong_args, wrong_options in calls:
            try:
                function(*wrong_args, **wrong_options)
            except (ValueError, TypeError):
                refused += 1
            except IndexError:
                # What Python asks of sequences, as loops over a data set end by it.
                assert name in ("load", "whole")
    assert refused > len(WRONG) / 2
