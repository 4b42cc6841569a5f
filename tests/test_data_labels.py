from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from fastunet.data import IGNORED, LABEL_MAPS, LabelMap, discover_cases
from fastunet.data.label_tables import label_map_from_json
from fastunet.data.labels import COLOUR, MAX_CLASSES, value_name
from fastunet.errors import DataWarning, UserError
from fastunet.functional.dice_arguments import MOST_CLASSES
from tests.data_files import MSD_JSON, nnunet_folder

DTYPES = [np.uint8, np.int16, np.int32, np.float32, np.float64]


@pytest.mark.parametrize(
    ("edition", "values"),
    [
        ("brats2018", (0, 1, 2, 4)),
        ("brats2019", (0, 1, 2, 4)),
        ("brats2020", (0, 1, 2, 4)),
        ("brats2021", (0, 1, 2, 4)),
        ("brats2023", (0, 1, 2, 3)),
        ("brats2023_africa", (0, 1, 2, 3)),
        ("brats2023_men", (0, 1, 2, 3)),
        ("brats2023_met", (0, 1, 2, 3)),
        ("brats2023_ped", (0, 1, 2, 3)),
        ("brats2024", (0, 1, 2, 3, 4)),
        ("brats2025_met", (0, 1, 2, 3, 4)),
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


def test_the_most_classes_are_those_of_the_losses():
    assert MAX_CLASSES == MOST_CLASSES < IGNORED


def test_no_table_is_missing_from_the_test_above():
    glioma = [f"brats{year}" for year in (2018, 2019, 2020, 2021, 2023, 2024)]
    others = [f"brats2023_{kind}" for kind in ("africa", "men", "met", "ped")] + ["brats2024_ped", "brats2025_met"]
    assert sorted(LABEL_MAPS) == sorted([*glioma, *others, "msd_brain_tumour"])


def test_the_paediatric_table_of_2024_has_an_order_of_its_own():
    table = LABEL_MAPS["brats2024_ped"]
    stored = np.array([0, 1, 2, 3, 4])
    names = [table.class_names[index] for index in table.encode(stored, "f")]
    assert names == ["background", "enhancing tumour", "non-enhancing tumour", "cystic component", "oedema"]
    assert table.regions["tumour core"] == (1, 2, 3)
    assert table.regions["whole tumour"] == (1, 2, 3, 4)


def test_label_4_is_enhancing_until_2021_and_the_resection_cavity_in_2024():
    four = np.array([4])
    assert LABEL_MAPS["brats2021"].class_names[LABEL_MAPS["brats2021"].encode(four, "f")[0]] == "enhancing tumour"
    assert LABEL_MAPS["brats2024"].class_names[LABEL_MAPS["brats2024"].encode(four, "f")[0]] == "resection cavity"
    assert all(4 not in classes for name, classes in LABEL_MAPS["brats2024"].regions.items() if "tumour" in name)
    with pytest.raises(
        UserError, match=r"label values 4 are not in the table of brats2023 \(0 background, 1 necrotic core"
    ):
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


@pytest.mark.parametrize("unknown", [[3], [5, 3], [-1], [0.5, 3], [255], [1e6], [0.998], [np.nan]])
def test_unknown_values_are_named_with_the_file(unknown):
    values = np.array([0, 1, 2, 4, *unknown], dtype=np.float64)
    with pytest.raises(UserError) as caught:
        LABEL_MAPS["brats2021"].encode(values, "some/seg.nii.gz")
    message = str(caught.value)
    assert message.startswith("some/seg.nii.gz: label values")
    assert ", ".join(f"{value:.9g}" for value in sorted(unknown)) + " are not in the table" in message
    assert f", in {len(unknown)} voxels" in message
    assert ("look interpolated" in message) == any(value % 1 for value in unknown if value == value)


@pytest.mark.parametrize("value", [3.9999, 4.0000001, 4.0009])
def test_values_off_by_rounding_are_rounded(value):
    stored = np.array([0, 1, 2, value, 1 - 1e-7, 1e-4, -1e-4])
    assert LABEL_MAPS["brats2021"].encode(stored, "f").tolist() == [0, 1, 2, 3, 1, 0, 0]


def test_a_copy_that_numbers_the_enhancing_tumour_3(recwarn):
    table = LABEL_MAPS["brats2020"]
    for number in range(2):
        assert table.encode(np.array([0, 1, 2, 3]), f"{number}.nii").tolist() == [0, 1, 2, 3]
    (warning,) = [str(warning.message) for warning in recwarn if warning.category is DataWarning]
    assert warning.startswith("0.nii holds label 3 and no 4: 3 is read as enhancing tumour")
    with pytest.raises(UserError, match="label values 3 are not"):
        table.encode(np.array([0, 1, 2, 3, 4]), "f")


def test_raw_brats_labels_under_a_table_without_gap():
    same = label_map_from_json({"background": 0, "NCR": 1, "ED": 2, "ET": 3}, "same", "f")
    assert same.encode(np.array([0, 1, 2, 4]), "f").tolist() == [0, 1, 2, 3]
    # Where the table swaps core and oedema, nothing tells whether a file does: never a guess.
    swapped = label_map_from_json({"background": 0, "ED": 1, "NCR": 2, "ET": 3}, "swapped", "f")
    assert swapped.encode(np.array([0, 1, 2, 3]), "f").tolist() == [0, 2, 1, 3]
    with pytest.raises(UserError, match=r"label values 4 are not .*--edition brats2021"):
        swapped.encode(np.array([0, 1, 2, 4]), "f")


def test_ignored_pixels():
    table = label_map_from_json({"background": 0, "a": 1, "ignore": 9}, "x", "f")
    assert table.class_names == ("background", "a")
    classes = table.encode(np.array([0, 9, 1]), "f")
    assert classes.tolist() == [0, IGNORED, 1]
    assert table.decode(classes).tolist() == [0, 9, 1]
    with pytest.raises(ValueError, match="classes from 0 to 255"):
        LABEL_MAPS["brats2021"].decode(classes)


REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}


def test_regions_and_back():
    table = label_map_from_json(REGIONS | {"ignore": 4}, "x", "f", [1, 2, 3])
    assert table.values == (0, 1, 2, 3)
    assert table.regions == {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    assert table.class_names == ("background", "label 1", "label 2", "enhancing")
    assert LabelMap.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    classes = table.encode(np.array([[0, 1], [2, 3], [4, 1]]), "f")
    targets = table.encode_regions(classes)
    assert targets[:, 1, 1].tolist() == [1, 1, 1]
    assert targets[:, 1, 0].tolist() == [1, 1, 0]
    assert targets[:, 0, 1].tolist() == [1, 0, 0]
    assert targets[:, 2, 0].tolist() == [IGNORED] * 3
    np.testing.assert_array_equal(table.decode_regions(targets[:, :2] > 0), classes[:2])


def test_later_regions_are_written_over_earlier_ones():
    table = label_map_from_json({"core": [2, 3], "background": [0], "rim": [1, 2]}, "x", "f", [3, 1])
    assert table.decode_regions(np.array([[True, True, False], [False, True, False]])).tolist() == [3, 1, 0]
    with pytest.raises(ValueError, match="1 regions"):
        table.decode_regions(np.ones((1, 2), bool))


@pytest.mark.parametrize(
    ("order", "message"),
    [(None, "is missing"), ([1, 2], "has 2 values"), ([1, 2, 9], "as 9, which it lacks"), ([0, 2, 3], "as 0, which")],
)
def test_orders_that_do_not_fit(order, message):
    with pytest.raises(UserError, match=message):
        label_map_from_json(REGIONS, "x", "f", order)


def test_a_region_that_the_one_around_it_would_hide():
    with pytest.raises(UserError, match=r"'whole' would be written over 'core'.*list 'whole' first"):
        label_map_from_json({"background": 0, "core": 2, "whole": [1, 2]}, "x", "f", [2, 1])


def test_lists_of_one_value_are_classes():
    table = label_map_from_json({"background": [0], "liver": [1], "Ignore": [2]}, "x", "f")
    assert (table.values, table.regions, table.ignore) == ((0, 1), {}, 2)


@pytest.mark.parametrize(
    "names", [("a b", "a_b"), ("x", "X"), ("a/b", "a:b"), ("line\nbreak", "x"), (" ", "x"), ("\0", "x")]
)
def test_class_names_that_cannot_be_told_apart_or_shown(names):
    with pytest.raises(UserError, match=r"^f: "):
        label_map_from_json({"background": 0, names[0]: 1, names[1]: 2}, "x", "f")
    with pytest.raises(UserError, match="two classes called 'x'"):
        label_map_from_json({"0": "background", "1": "x", "2": "x"}, "x", "f")


@pytest.mark.parametrize(
    "change",
    [
        {"values": [0, 1]},
        {"values": [0, 1, 2, 2]},
        {"values": [0, 1, 2, "4"]},
        {"class_names": "abcd"},
        {"regions": {"whole": [1, 9]}},
        {"regions": [1]},
        {"edition": None},
        {"unknown": 1},
    ],
)
def test_stored_tables_that_do_not_fit(change):
    with pytest.raises(UserError, match="checkpoint"):
        LabelMap.from_dict(LABEL_MAPS["brats2021"].to_dict() | change, "checkpoint")


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
        ({"background": 0, "a": 1, "ignore": 1}, "one value that no class has"),
        ({"background": 0, "ignore": 1}, "from 1 to 127 other values"),
        ({"a": 1, "b": 2}, "0 for the background"),
        ({"background": 0}, "from 1 to 127 other values"),
        ({}, "is empty"),
        ({"a": 0, "b": 0}, "gives value 0 to two names"),
        ({"a": "x", "b": "y"}, "whole numbers"),
        ({"background": 0, "a": 1.5}, "whole numbers"),
        ({"background": 0, "a": 2**40}, "whole numbers"),
        ({"background": 0, "a": []}, "whole numbers"),
        ({"background": 0, "a": [0, 1]}, "contains 0"),
        ({str(i): f"c{i}" for i in range(256)}, "from 1 to 127 other values"),
    ],
)
def test_label_entries_that_cannot_be_used(labels, message):
    with pytest.raises(UserError, match=r"data/dataset\.json: 'labels'") as caught:
        label_map_from_json(labels, "x", "data/dataset.json")
    assert message in str(caught.value)


def test_large_labels_are_shown_as_numbers_and_colours_as_colours():
    shown = [value_name(value) for value in (7, COLOUR + 0xFF00AA, 2 * COLOUR, 1 << 30)]
    assert shown == ["7", "#ff00aa", "33554432", "1073741824"]


def test_numbers_written_as_texts(tmp_path):
    names = ("a", "b", "c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = discover_cases(nnunet_folder(tmp_path, names, channel_names=["T1ce", "FLAIR"]))
        texts = {"labels": {"background": "0", "liver": "1", "lesion": " 2"}, "numTraining": "3"}
        assert discover_cases(nnunet_folder(tmp_path, names, **texts)) == plain
    with pytest.warns(DataWarning, match="says numTraining 7, but 3 cases"):
        discover_cases(nnunet_folder(tmp_path, names, numTraining="7"))
    regions = {"background": ["0"], "whole": ["1", "2"], "core": ["2"]}
    (one, *_) = discover_cases(nnunet_folder(tmp_path, names, labels=regions, regions_class_order=["1", 2.0]))
    assert one.label_map.region_order == (1, 2)
    with pytest.raises(UserError, match=r"'regions_class_order' is \['1', 'x'\]; expected whole numbers"):
        discover_cases(nnunet_folder(tmp_path, names, labels=regions, regions_class_order=["1", "x"]))
