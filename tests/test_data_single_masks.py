"""A mask for each object, as of the 2018 Data Science Bowl, or for each class, of images and volumes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from fastunet.data import TileDataset, discover_cases
from fastunet.data.border_weights import border_term
from fastunet.data.single_masks import case_labels, case_objects
from fastunet.errors import DataWarning, UserError
from tests.cli_helpers import assert_user_error, run
from tests.data_files import save
from tests.image_data import RNG, picture
from tests.test_segmentation_images import TINY

pytestmark = pytest.mark.usefixtures("nothing_said")
SIZE = (24, 30)
BOXES = ((slice(2, 9), slice(3, 10)), (slice(2, 9), slice(10, 17)), (slice(14, 20), slice(8, 20)))  # two that touch


def object_mask(*boxes) -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    for box in boxes:
        mask[box] = 255
    return mask


def bowl(root: Path, counts=(3, 1, 2, 3)) -> Path:
    for number, count in enumerate(counts):
        name = hashlib.sha256(bytes([number])).hexdigest()
        image = object_mask(*BOXES[:count])[..., None] // 2 + RNG.integers(0, 40, (*SIZE, 3)).astype(np.uint8)
        picture(root / name / "images" / f"{name}.png", np.dstack([image, np.full(SIZE, 255, np.uint8)]))
        for index, box in enumerate(BOXES[:count]):
            own = hashlib.sha256(bytes([number, index])).hexdigest()
            picture(root / name / "masks" / f"{own}.png", object_mask(box))
    return root


def test_the_data_science_bowl(tmp_path, capsys):
    cases = discover_cases(bowl(tmp_path / "data"))
    assert [len(case.masks) for case in cases] != [1] * 4
    assert all(len(case.files) == 1 + len(case.masks) for case in cases)
    for case in cases:
        assert case.label_map.values == (0, 255)
        np.testing.assert_array_equal(case_labels(case)[..., 0] * 255, object_mask(*BOXES[: len(case.masks)]))
        np.testing.assert_array_equal(case_objects(case) > 0, case_labels(case) > 0)
        assert case_objects(case).max() == len(case.masks)
    assert run("check", tmp_path / "data", "--batch-size", 2) == 0
    assert run("train", tmp_path / "data", "--out", tmp_path / "run", "--border-weights", *TINY) == 0
    assert run("segment", tmp_path / "run", tmp_path / "data", "--out", tmp_path / "found") == 0
    for subject in ("run", "found"):
        capsys.readouterr()
        assert run("evaluate", tmp_path / subject, tmp_path / "data") == 0
        assert cases[0].name in capsys.readouterr().out


def test_weights_between_objects_that_touch(tmp_path):
    (case,) = [case for case in discover_cases(bowl(tmp_path / "data", (2, 1))) if len(case.masks) == 2]
    options = dict(cache_dir=tmp_path / "cache", modalities=("red",), size=32, output=32, border=True)
    border = TileDataset([case], **options).load([0])[2][0, : SIZE[0], : SIZE[1]].numpy()
    assert border[9, 9:11].min() > 5  # below the seam
    np.testing.assert_array_equal(border, border_term(case_labels(case)[..., 0], case_objects(case)[..., 0]))
    assert not border_term(case_labels(case)[..., 0]).any()


@pytest.mark.parametrize("mask", ["masks/{0}_{1}.png", "masks/{0}/{1}.png", "masks/{0}.object-{1}.png",
                                  "{0}_mask_{1}.png"])  # fmt: skip
def test_numbered_objects(tmp_path, mask):
    image = "{0}.png" if "/" not in mask else "images/{0}.png"
    for name, count in (("a", 2), ("b", 1), ("c", 3)):
        picture(tmp_path / image.format(name), RNG.integers(0, 255, SIZE).astype(np.uint8))
        for index in range(count):
            picture(tmp_path / mask.format(name, index), object_mask(BOXES[index]))
    cases = discover_cases(tmp_path)
    assert [len(case.masks) for case in cases] == [2, 1, 3]
    assert [int(case_objects(case).max()) for case in cases] == [2, 1, 3]


@pytest.mark.parametrize("mask", ["masks/{1}/{0}.png", "masks/{0}_{1}.png", "{0}_{1}_mask.png"])
def test_a_mask_for_each_class(tmp_path, mask):
    image = "{0}.png" if "/" not in mask else "images/{0}.png"
    for name in "ab":
        picture(tmp_path / image.format(name), RNG.integers(0, 255, SIZE).astype(np.uint8))
        for word, box in zip(("nucleus", "cytoplasm"), BOXES):
            picture(tmp_path / mask.format(name, word), object_mask(box))
    cases = discover_cases(tmp_path)
    assert cases[0].label_map.class_names == ("background", "cytoplasm", "nucleus")
    assert case_objects(cases[0]) is None
    classes = case_labels(cases[1])[..., 0]
    assert (classes[BOXES[0]] == 2).all()
    assert (classes[BOXES[1]] == 1).all()
    picture(tmp_path / mask.format("b", "nucleus"), object_mask(*BOXES[:2]))
    with pytest.raises(UserError, match=r"share 49 pixels, which have one class each"):
        case_labels(cases[1])


@pytest.mark.parametrize("words", [("1", "2"), ("class_1", "class_2", "class_3"), ("1st", "2nd"), ("old", "7")])
def test_names_that_tell_neither(tmp_path, words):
    for name in "ab":
        picture(tmp_path / "images" / f"{name}.png", RNG.integers(0, 255, SIZE).astype(np.uint8))
        for word, box in zip(words, BOXES):
            picture(tmp_path / "masks" / f"{name}_{word}.png", object_mask(box))
    with pytest.raises(UserError, match=r"a\.png has \d masks, such as .* tell neither objects"):
        discover_cases(tmp_path)


def test_masks_that_are_none_of_one_object(tmp_path):
    case, *_ = [case for case in discover_cases(bowl(tmp_path / "data")) if len(case.masks) == 3]
    first, second, _ = case.masks
    picture(first, np.arange(720, dtype=np.uint8).reshape(SIZE))
    with pytest.raises(UserError, match=r"holds values 0, 1, 2, 3, 4, …: a mask of one object has one"):
        case_labels(case)
    picture(first, object_mask(*BOXES))
    with pytest.raises(UserError, match="lies mostly under other masks of its image"):
        case_labels(case)
    picture(second, np.zeros((3, 3), np.uint8))
    with pytest.raises(UserError, match="differ in shape"):
        case_labels(case)
    assert run("check", tmp_path / "data") == 2


STRUCTURES = {"ctv": 2, "rib_left_1": 10, "rib_left_2": 18, "vertebrae_L1": 26}  # where each begins


def total(root: Path, lacking: tuple[tuple[int, str], ...] = ((1, "ctv"),)) -> Path:
    """Scans with a file for each structure, as TotalSegmentator has them."""
    for number in range(3):
        save(root / f"s{number}" / "ct.nii.gz", RNG.integers(-100, 100, (32, 36, 3)).astype(np.int16))
        for name, start in STRUCTURES.items():
            if (number, name) not in lacking:
                structure = np.zeros((32, 36, 3), np.uint8)
                structure[start : start + 6, 4:20, 1:] = 1
                save(root / f"s{number}" / "segmentations" / f"{name}.nii.gz", structure)
    return root


def test_a_file_for_each_structure_of_volumes(tmp_path, capsys):
    data = total(tmp_path / "data")
    cases = discover_cases(data, modalities=None)
    assert [(case.name, len(case.masks)) for case in cases] == [("s0", 4), ("s1", 3), ("s2", 4)]
    assert cases[1].label_map.class_names == ("background", "ctv", "rib left 1", "rib left 2", "vertebrae l1")
    for case in cases:
        found = case_labels(case)[:, 4, 1]
        assert found[[10, 18, 26, 31, 0, 9]].tolist() == [2, 3, 4, 4, 0, 0]
        assert found[2] == (case.name != "s1")
    assert run("check", data, "--batch-size", 2) == 0
    assert run("train", data, "--out", tmp_path / "run", *TINY) == 0
    assert run("segment", tmp_path / "run", data / "s1", "--out", tmp_path / "found") == 0
    rows = []
    for subject, *options in (["run"], ["found", "--labels", tmp_path / "run"]):
        capsys.readouterr()
        assert run("evaluate", tmp_path / subject, data / "s1", *options) == 0
        rows.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("s1")])
    assert rows[0] == rows[1] != []
    run("evaluate", tmp_path / "found", data / "s1")
    assert "0 background, 1 rib left 1, 2 rib left 2, 3 vertebrae l1; with --labels RUN" in capsys.readouterr().out
    table = tmp_path / "dataset.json"
    table.write_text('{"labels": {"background": 0, "ctv": 1, "vertebrae l1": 2}}')
    code = run("evaluate", tmp_path / "found", data / "s1", "--labels", table)
    assert_user_error(capsys, code, "dataset.json has no classes rib left 1, rib left 2, which")


def test_structures_that_overlap(tmp_path):
    cases = discover_cases(total(tmp_path), modalities=None)
    save(cases[2].label, np.ones((32, 36, 3), np.uint8))
    with pytest.raises(UserError, match=r"rib_left_1\.nii\.gz and .*ctv\.nii\.gz share 192 "):
        case_labels(cases[2])


def test_masks_in_a_folder_beside_the_images(tmp_path, capsys):
    for name in "abc":
        picture(tmp_path / f"{name}.png", RNG.integers(0, 255, SIZE).astype(np.uint8))
        picture(tmp_path / "masks" / f"{name}.png", object_mask(*BOXES))
    assert [case.label.parent.name for case in discover_cases(tmp_path)] == ["masks"] * 3
    assert run("evaluate", tmp_path / "masks", tmp_path) == 0
    assert "1.000" in capsys.readouterr().out


def test_structures_beside_labels_of_all(tmp_path):
    for number in range(3):
        save(total(tmp_path) / f"s{number}" / "combined_labels.nii.gz", np.ones((32, 36, 3), np.uint8) * (number % 2))
    with pytest.warns(DataWarning, match="s0/segmentations is left out: a mask lies beside it already"):
        cases = discover_cases(tmp_path, modalities=None)
    assert [case.label.name for case in cases] == ["combined_labels.nii.gz"] * 3
