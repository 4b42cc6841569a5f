"""Images with a mask for each object, as of the 2018 Data Science Bowl, or for each class."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from fastunet.data import TileDataset, discover_cases
from fastunet.data.border_weights import border_term
from fastunet.data.single_masks import case_labels, case_objects
from fastunet.errors import UserError
from tests.cli_helpers import run
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


@pytest.mark.parametrize("words", [("1", "2"), ("class_1", "class_2", "class_3"), ("1stHO", "2ndHO"), ("old", "7")])
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
