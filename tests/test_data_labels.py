from __future__ import annotations

import json

import numpy as np
import pytest

from fastunet.data import LABEL_MAPS, LabelMap
from fastunet.data.labels import label_map_from_json
from fastunet.errors import UserError
from tests.data_files import MSD_JSON

DTYPES = [np.uint8, np.int16, np.int32, np.float32, np.float64]


@pytest.mark.parametrize(
    ("edition", "values"),
    [
        ("brats2018", (0, 1, 2, 4)),
        ("brats2019", (0, 1, 2, 4)),
        ("brats2020", (0, 1, 2, 4)),
        ("brats2021", (0, 1, 2, 4)),
        ("brats2023", (0, 1, 2, 3)),
        ("brats2024", (0, 1, 2, 3, 4)),
        ("msd_brain_tumour", (0, 2, 1, 3)),
    ],
)
def test_tables(edition, values):
    table = LABEL_MAPS[edition]
    assert table.edition == edition
    assert table.values == values
    assert table.class_names[2:4] == ("oedema", "enhancing tumour")
    assert table.regions["whole tumour"] == (1, 2, 3)
    assert table.regions["tumour core"] == (1, 3)
    assert table.regions["enhancing tumour"] == (3,)
    assert table.values[0] == 0
    assert len(table.class_names) == len(values)


def test_no_table_is_missing_from_the_test_above():
    assert list(LABEL_MAPS) == [
        *(f"brats{year}" for year in (2018, 2019, 2020, 2021, 2023, 2024)),
        "msd_brain_tumour",
    ]


def test_label_4_is_enhancing_until_2021_and_the_resection_cavity_in_2024():
    four = np.array([4])
    assert LABEL_MAPS["brats2021"].class_names[LABEL_MAPS["brats2021"].encode(four, "f")[0]] == "enhancing tumour"
    assert LABEL_MAPS["brats2024"].class_names[LABEL_MAPS["brats2024"].encode(four, "f")[0]] == "resection cavity"
    assert all(4 not in classes for name, classes in LABEL_MAPS["brats2024"].regions.items() if "tumour" in name)
    with pytest.raises(UserError, match=r"label values 4 are not in the table of brats2023 \(0, 1, 2, 3\)"):
        LABEL_MAPS["brats2023"].encode(four, "f")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edition", LABEL_MAPS)
def test_encode_and_decode_are_inverse(edition, dtype):
    table = LABEL_MAPS[edition]
    values = np.random.default_rng(0).choice(np.array(table.values), (7, 6, 5)).astype(dtype)
    classes = table.encode(values, "file")
    assert classes.dtype == np.uint8
    np.testing.assert_array_equal(classes, np.vectorize(table.values.index)(values))
    decoded = table.decode(classes)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, values)


@pytest.mark.parametrize("unknown", [[3], [5, 3], [-1], [0.5, 3], [255], [1e6], [0.9999999]])
def test_unknown_values_are_named_with_the_file(unknown):
    values = np.array([0, 1, 2, 4, *unknown], dtype=np.float64)
    with pytest.raises(UserError) as caught:
        LABEL_MAPS["brats2021"].encode(values, "some/seg.nii.gz")
    message = str(caught.value)
    assert message.startswith("some/seg.nii.gz: label values")
    assert ", ".join(f"{value:.9g}" for value in sorted(unknown)) + " are not in the table" in message


def test_many_unknown_values_are_cut_short():
    with pytest.raises(UserError, match="10, 11, 12, 13, 14, 15, 16, 17 and 22 more are not"):
        LABEL_MAPS["brats2021"].encode(np.arange(10, 40), "f")


def test_a_table_survives_json():
    for table in LABEL_MAPS.values():
        assert LabelMap.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_decathlon_names_come_into_the_order_of_brats():
    table = label_map_from_json(MSD_JSON["labels"], "BRATS", "dataset.json")
    assert table.values == (0, 2, 1, 3)
    assert table.class_names == LABEL_MAPS["msd_brain_tumour"].class_names
    assert table.regions == LABEL_MAPS["msd_brain_tumour"].regions
    # File value 1 is oedema there.
    assert table.class_names[table.encode(np.array([1]), "f")[0]] == "oedema"


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "edema": 2, "NCR/NET": 1, "enhancing": 4},
        {"background": "0", "peritumoral oedema": "2", "necrotic core": "1", "enhancing tumour": "4"},
        {"4": "ET", "2": "ED", "1": "NCR", "0": "Background"},
    ],
)
def test_spellings_of_the_brats_classes(labels):
    table = label_map_from_json(labels, "x", "dataset.json")
    assert table.values == (0, 1, 2, 4)
    assert table.regions == LABEL_MAPS["brats2021"].regions


def test_other_names_keep_the_order_of_the_values():
    table = label_map_from_json({"lesion": 5, "background": 0, "liver": 2}, "x", "f")
    assert table.values == (0, 2, 5)
    assert table.class_names == ("background", "liver", "lesion")
    assert table.regions == {}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "whole tumor": [1, 2, 3], "core": [2, 3]}, "regions"),
        ({"background": 0, "a": 1, "ignore": 2}, "'ignore' label"),
        ({"a": 1, "b": 2}, "0 for the background"),
        ({"background": 0}, "0 for the background"),
        ({}, "not a table"),
        ([0, 1], "not a table"),
        ({"a": 0, "b": 0}, "one value to two names"),
        ({"a": "x", "b": "y"}, "whole-number"),
        ({"a": None}, "whole-number"),
        ({str(i): f"c{i}" for i in range(256)}, "from 1 to 254 other values"),
    ],
)
def test_label_entries_that_cannot_be_used(labels, message):
    with pytest.raises(UserError, match=r"data/dataset\.json: 'labels'") as caught:
        label_map_from_json(labels, "x", "data/dataset.json")
    assert message in str(caught.value)
