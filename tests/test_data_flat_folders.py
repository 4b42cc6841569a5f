"""Masks beside their images or volumes, each case in a folder of its own, and folders called as people call them."""

from __future__ import annotations

import numpy as np
import pytest

from fastunet.data import discover_cases
from fastunet.data.masks import mask_table
from fastunet.errors import UserError
from tests.cli_helpers import run
from tests.data_files import random_image, random_labels, save
from tests.image_data import GREY, picture

pytestmark = pytest.mark.usefixtures("nothing_said")
MASK = ((GREY > 100) * 255).astype(np.uint8)


def tree(root, *names):
    """Files of these names: a mask or label file where the name says so."""
    for number, name in enumerate(names):
        marked = any(word in name.lower() for word in ("mask", "label", "seg", "gt", "truth", "manual"))
        if name.endswith(".png"):
            picture(root / name, MASK if marked else GREY)
        else:
            save(root / name, random_labels(number, values=(0, 1, 2)) if marked else random_image(number))
    return root


@pytest.mark.parametrize(
    ("image", "mask", "name"),
    [
        ("{}.png", "{}_mask.png", "{}"),
        ("{}.png", "{}_gt.png", "{}"),
        ("{}.png", "mask_{}.png", "{}"),
        ("{}_image.png", "{}_segmentation.png", "{}_image"),
        ("sub/{}.png", "sub/{}_label.png", "sub_{}"),
        ("{}/image.png", "{}/mask.png", "{}"),
        ("{}/{}.png", "{}/{}_mask.png", "{}"),
        ("{}/images/{}.png", "{}/masks/x.png", "{}"),
        ("train/{}.png", "train_masks/{}_mask.png", "{}"),
        ("Original/{}.png", "Ground Truth/{}.png", "{}"),
        ("{}.nii.gz", "{}_seg.nii.gz", "{}"),
        ("volume-{}.nii", "segmentation-{}.nii", "volume-{}"),
        ("{}/imaging.nii.gz", "{}/segmentation.nii.gz", "{}"),
    ],
)
def test_masks_beside_their_images(tmp_path, image, mask, name, capsys):
    names = [str(number) for number in range(10, 14)]
    root = tree(tmp_path, *(form.format(one, one) for one in names for form in (image, mask)))
    cases = discover_cases(root, modalities=None)
    assert [case.name for case in cases] == [name.format(one) for one in names]
    assert [case.label for case in cases] == [root / mask.format(one, one) for one in names]
    assert run("check", root) == 0
    assert "4 cases of 4 patients, 4 labelled; the masks in" in capsys.readouterr().out


def test_scans_of_one_patient(tmp_path):
    frames = [f"patient{number}/patient{number}_frame{frame}" for number in (1, 2) for frame in ("01", "12")]
    cases = discover_cases(tree(tmp_path, *(f"{f}{e}" for f in frames for e in (".nii", "_gt.nii"))), modalities=None)
    assert [case.patient for case in cases] == ["patient1", "patient1", "patient2", "patient2"]
    assert cases[1].name == "patient1_frame12"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.png", "b.png"], r"no a_mask\.png beside a\.png, and no dataset\.json"),
        (["a.png", "a_mask.png", "a_mask_1.png"], "a has 2 masks, such as .*: join them to one"),
        (["a.png", "a_mask.png", "a_label.png"], "are masks of one image"),
        (["a.png", "a_mask.png", "b_mask.png"], r"b_mask\.png has no image of that name"),
        (["1/images/1.png", "1/masks/x.png", "1/masks/y.png"], "1 has 2 masks, such as .*: join them to one"),
        (["images/1.png", "mask/1.png", "1st_manual/1.png"], "1st_manual and mask may all hold masks"),
    ],
)
def test_what_is_ambiguous(tmp_path, names, words):
    with pytest.raises(UserError, match=words):
        discover_cases(tree(tmp_path, *names))


def test_one_value_that_anti_aliasing_left_at_a_border(tmp_path):
    """A few pixels between two classes that touch are refused; a class of some area, a line and numbers are classes."""
    rows, columns = np.mgrid[:64, :64]
    radius = np.hypot(rows - 30, columns - 25)
    circle = np.where(radius < 12, 255, 0)
    few = np.where((radius >= 12) & (radius < 12.1), 128, circle)
    assert 0 < (few == 128).sum() < 40
    with pytest.raises(UserError, match=r"1 of 3 values \(128\) only lie between others.*above 127 / below"):
        mask_table([picture(tmp_path / "a.png", few.astype(np.uint8))])
    for other in (np.where(radius < 4, 128, circle), np.where((radius >= 12) & (radius < 13.5), 128, circle),
                  np.where(rows + 64 * columns < 30, 128, circle), few // 127):  # fmt: skip
        assert len(mask_table([picture(tmp_path / "a.png", other.astype(np.uint8))]).values) == 3
