"""Folders as people have them: spellings of ``dataset.json``, endings, names, links, grids that writers round."""

from __future__ import annotations

import json
import os
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from fastunet.data import Source, check_geometry, discover_cases, read_labels
from fastunet.errors import DataWarning, UserError
from tests.data_files import NNUNET_JSON, brats_case, gli_case, msd_folder, nnunet_folder, random_image, save

pytestmark = pytest.mark.usefixtures("nothing_said")


def rewrite(root: Path, **changes) -> Path:
    """Changes entries of the ``dataset.json`` in ``root``; None takes one away."""
    table = json.loads((root / "dataset.json").read_text()) | changes
    (root / "dataset.json").write_text(json.dumps({name: value for name, value in table.items() if value is not None}))
    return root


def names(root: Path) -> list[str]:
    return [case.name for case in discover_cases(root)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_and_any_order_of_keys(tmp_path, encoding):
    root = nnunet_folder(tmp_path)
    table = dict(reversed(NNUNET_JSON.items()))
    (root / "dataset.json").write_text(json.dumps(table), encoding=encoding)
    (one, _) = discover_cases(root)
    assert list(one.modalities) == ["t1ce", "flair"]
    assert one.label_map.class_names == ("background", "liver", "lesion")


def test_channels_numbered_in_any_order(tmp_path):
    root = rewrite(nnunet_folder(tmp_path), channel_names=None, modality={"1": "FLAIR", "0": "T1ce"})
    assert discover_cases(root)[0].modalities["flair"].path.name == "case_a_0001.nii.gz"


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".NII.GZ"])
def test_a_missing_file_ending_is_that_of_the_files(tmp_path, ending):
    root = rewrite(nnunet_folder(tmp_path), file_ending=None)
    for path in [*root.rglob("*.nii.gz")]:
        image = random_image(0) if "images" in str(path) else random_image(0) % 3
        path.unlink()
        save(path.with_name(path.name[:-7] + ending.lower()), image).rename(path.with_name(path.name[:-7] + ending))
    assert names(root) == ["case_a", "case_b"]
    case = discover_cases(root)[0]
    assert check_geometry(case, case.modalities).shape == (6, 5, 4)
    assert read_labels(case.label, case.label_map).shape == (6, 5, 4)


def test_what_dataset_json_and_the_folders_say_otherwise(tmp_path):
    root = rewrite(nnunet_folder(tmp_path), file_ending="nii.gz", numTraining=3)  # no dot
    save(root / "labelsTr" / "case_a.nii", random_image(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(discover_cases(root)) == 2
    said = "\n".join(str(warning.message) for warning in caught)
    assert re.search(r"1 files of .*labelsTr, such as case_a\.nii, do not end in \.nii\.gz .*left out", said)
    assert "says numTraining 3, but 2 cases have images and labels" in said
    with pytest.raises(UserError, match=r"labelsTr, such as case_a\.nii, do not end in \.png"):
        discover_cases(rewrite(root, file_ending=".png"))
    with pytest.raises(UserError, match=r"names 1 channels, but there is case_a_0001\.nii\.gz"):
        discover_cases(rewrite(root, file_ending=None, channel_names={"0": "T1ce"}))


def test_one_file_in_two_spellings(tmp_path):
    root = nnunet_folder(tmp_path)
    save(root / "imagesTr" / "x.nii.gz", random_image(0)).rename(root / "imagesTr" / "case_a_0000.NII.GZ")
    with pytest.raises(UserError, match=r"case_a_0000\.NII\.GZ and .*case_a_0000\.nii\.gz are the same file"):
        discover_cases(root)


@pytest.mark.parametrize(
    "entry",
    [
        {"image": "./imagesTr/case_a.nii.gz", "label": "./labelsTr/case_a.nii.gz"},
        {"image": "imagesTr/case_a_0000.nii.gz", "label": "labelsTr/case_a.nii.gz"},
        {"image": ["./imagesTr/case_a_0000.nii.gz", "./imagesTr/case_a_0001.nii.gz"], "label": "x"},
        {"image": "imagesTr\\case_a.nii.gz", "label": "labelsTr\\case_a.nii.gz"},
        {"image": "/another/machine/imagesTr/case_a.nii.gz", "label": "/another/machine/case_a.nii.gz"},
        {"label": "./labelsTr/case_a.nii.gz", "image": "case_a.nii.gz", "fold": 3},
        "./imagesTr/case_a.nii.gz",
        ["./imagesTr/case_a.nii.gz", "./labelsTr/case_a.nii.gz"],
    ],
)
def test_spellings_of_training(tmp_path, entry):
    root = rewrite(nnunet_folder(tmp_path), training=[entry])
    assert names(root) == ["case_a", "case_b"]
    rewrite(root, training=[json.loads(json.dumps(entry).replace("case_a", "case_q"))])
    with pytest.raises(UserError, match=r"case_q.* is listed in .* but was not found"):
        discover_cases(root)


def test_labels_are_those_that_training_names(tmp_path, recwarn):
    root = nnunet_folder(tmp_path, names=("case_a", "case_b", "case_c"))
    (root / "labelsTr" / "case_a.nii.gz").rename(root / "labelsTr" / "a_seg.nii.gz")
    rewrite(root, training=[{"image": "case_a.nii.gz", "label": "./labelsTr/a_seg.nii.gz"},
                            {"image": "case_b.nii.gz", "label": "./labelsTr/case_c.nii.gz"}])  # fmt: skip
    assert [case.label.name for case in discover_cases(root)] == ["a_seg.nii.gz", "case_c.nii.gz", "case_c.nii.gz"]
    said = " ".join(str(warning.message) for warning in recwarn)
    assert "'training' of" in said
    assert "lacks 1 cases with labels, such as case_c; all are taken" in said
    assert "1 label files of" in said
    assert "such as case_b.nii.gz, belong to no image, and are left out" in said


def test_the_dataset_entry_of_nnunet_2(tmp_path):
    root = nnunet_folder(tmp_path / "data")
    elsewhere = tmp_path / "elsewhere"
    images = [str(save(elsewhere / f"{number}.nii.gz", random_image(number))) for number in range(2)]
    label = save(elsewhere / "l.nii.gz", random_image(0) % 3)
    rewrite(root, dataset={"far": {"images": images, "label": str(label)}})
    far = next(case for case in discover_cases(root) if case.name == "far")
    assert far.modalities == {"t1ce": Source(Path(images[0])), "flair": Source(Path(images[1]))}
    assert far.label == label
    for broken in ({"images": images[:1] * 3}, {"images": [images[0], "nothing.nii.gz"]}, {"images": ["\0", "x"]}):
        rewrite(root, dataset={"far": broken})
        with pytest.raises(UserError, match=r"dataset\.json"):
            discover_cases(root)


def test_what_people_write_by_hand(tmp_path):
    root = nnunet_folder(tmp_path)
    text = json.dumps(NNUNET_JSON, indent=1)
    for broken, line, fix in (
        (text.replace('"lesion": 2', '"lesion": 2,'), '"lesion": 2,', "remove the comma"),
        (text.replace('"lesion": 2', '"lesion": 2 // of the liver'), "// of the liver", "no comments"),
        (text.replace('"background": 0,', '"background": 0'), '"liver": 1', "missing before it"),
        (text.replace('"numTraining": 2', '"numTraining": None'), "None", "writes true, false and null"),
    ):
        (root / "dataset.json").write_text(broken)
        with pytest.raises(UserError, match=r"dataset\.json is not valid JSON") as caught:
            discover_cases(root)
        assert re.search(rf"in line \d+: .*{re.escape(line)}.*{fix}", str(caught.value)), caught.value


VALUES = [None, True, 0, -1, 1.5, 1e308, "", "x", "0", [], [0], {}, {"0": 1}, 2**70, "\0", "../../x", "é", ["a", "b"]]


def test_any_change_of_a_dataset_json_is_read_or_refused_in_one_sentence(tmp_path):
    root = msd_folder(tmp_path)
    whole = json.loads((root / "dataset.json").read_text()) | {"regions_class_order": None, "channel_names": None}
    draw = random.Random(0)
    said = []
    for _ in range(1500):
        table = json.loads(json.dumps(whole))
        for _ in range(draw.choice([1, 1, 2, 3])):
            change(table, draw)
        (root / "dataset.json").write_text(json.dumps(table))
        try:
            discover_cases(root, modalities=None)
        except UserError as error:
            said.append(str(error))
    assert 300 < len(said) < 1200
    for sentence in said:
        assert "\n" not in sentence
        assert len(sentence) < 600
        assert str(root) in sentence


def change(table: dict, draw: random.Random) -> None:
    """Takes away, renames or replaces one entry at any depth."""
    node, places = table, []
    while isinstance(node, (dict, list)) and node:
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        places.append((node, key))
        node = node[key]
    parent, key = draw.choice(places)
    value = draw.choice(VALUES)
    action = draw.random()
    if action < 0.2:
        parent.pop(key)
    elif action < 0.4 and isinstance(parent, dict):
        parent[str(value)] = parent.pop(key)
    else:
        parent[key] = value


@pytest.mark.parametrize(
    "name", ["two words", "new\nline", "tab\there", "-dash", "--out", "脳-ü", "$(x)", "*", "'\"", "a\\b"]
)
def test_case_names(tmp_path, name):
    brats_case(tmp_path / "brats" / name)
    assert names(tmp_path / "brats") == [name]
    root = nnunet_folder(tmp_path / "nnunet", names=(name,))
    assert names(root) == [name]
    assert discover_cases(root)[0].label is not None


def test_a_case_name_that_is_not_utf8(tmp_path):
    folder = brats_case(tmp_path / "plain")
    for name in os.listdir(os.fsencode(folder)):
        path = os.path.join(os.fsencode(folder), name)
        os.rename(path, path.replace(b"plain_", b"pl\xff\xfein_"))
    with pytest.raises(UserError, match="is not UTF-8; rename") as caught:
        discover_cases(tmp_path)
    str(caught.value).encode()


def test_links(tmp_path):
    root = nnunet_folder(tmp_path / "data")
    outside = tmp_path / "outside.nii.gz"
    (root / "labelsTr" / "case_a.nii.gz").rename(outside)
    (root / "labelsTr" / "case_a.nii.gz").symlink_to(outside)  # large data often lie elsewhere
    case = discover_cases(root)[0]
    assert read_labels(case.label, case.label_map).shape == (6, 5, 4)
    outside.unlink()  # a broken link is no missing label
    case = discover_cases(root)[0]
    with pytest.raises(UserError, match=r"case_a\.nii\.gz: there is no such file"):
        read_labels(case.label, case.label_map)


def test_a_folder_that_may_not_be_read(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads every folder")
    brats_case(tmp_path / "a")
    (tmp_path / "a").chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        discover_cases(tmp_path)


@pytest.mark.parametrize(
    ("challenge", "edition", "said"),
    [("PED", "brats2024_ped", True), ("MET", "brats2023_met", True), ("MEN", "brats2023_men", False),
     ("SSA", "brats2023_africa", False)],
)  # fmt: skip
def test_challenges_beside_glioma(tmp_path, challenge, edition, said):
    gli_case(tmp_path / f"BraTS-{challenge}-00001-000")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (case,) = discover_cases(tmp_path)
    assert case.label_map.edition == edition
    assert case.patient == f"BraTS-{challenge}-00001"
    assert [warning.category for warning in caught] == ([DataWarning] if said else [])


GRID = np.array([[-0.9375, 0, 0, 119.5], [0, -0.9375, 0, 131.25], [0, 0, 1.2, -71.03], [0, 0, 0, 1]])
SHAPE = (24, 22, 15)


def grids(tmp_path: Path, other: np.ndarray, shape=SHAPE):
    save(tmp_path / "a" / "a_flair.nii.gz", random_image(0, SHAPE), GRID)
    save(tmp_path / "a" / "a_t1ce.nii.gz", random_image(1, shape), other)
    return discover_cases(tmp_path)[0]


def shifted(axis: int, by: float) -> np.ndarray:
    other = GRID.copy()
    other[axis, 3] += by
    return other


@pytest.mark.parametrize(
    ("other", "warned"),
    [
        (GRID + 1e-6, False),
        (GRID.astype(np.float32), False),
        (np.round(GRID, 4), False),
        (shifted(0, 0.0045 * 0.9375), True),
        (shifted(2, 71.03e-4), True),
        (GRID * np.array([1 + 9e-5, 1, 1, 1]), True),
        (GRID * (1 + 9e-5), True),
    ],
)
def test_grids_that_a_writer_rounded(tmp_path, other, warned):
    case = grids(tmp_path, other)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_geometry(case, ("flair", "t1ce"))
        check_geometry(case, ("flair", "t1ce"))
    assert ["rounding" in str(warning.message) for warning in caught] == [True] * warned


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (shifted(1, 0.5), ["by up to 0.5 mm", "shifted", "resample"]),
        (shifted(1, 0.03), ["by up to 0.03 mm", "shifted"]),
        (GRID * [[1.01], [1], [1], [1]], ["voxels of 0.9375 × 0.9375 × 1.2 and 0.94687"]),
        (GRID * [[-1], [1], [1], [1]], ["axes run LPS and RPS"]),
        (GRID[:, [1, 0, 2, 3]], ["axes run LPS and PLS"]),
        (np.array([[1, 0.02, 0, 0], [-0.02, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ GRID, ["mm ("]),
    ],
)
def test_grids_that_differ(tmp_path, other, words):
    case = grids(tmp_path, other)
    with pytest.raises(UserError, match=r"a_flair\.nii\.gz and .*a_t1ce\.nii\.gz differ in affine") as caught:
        check_geometry(case, ("flair", "t1ce"))
    for word in words:
        assert word in str(caught.value)
