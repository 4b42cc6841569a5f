"""Masks beside their images or volumes, each case in a folder of its own, and folders called as people call them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastunet.data import cases_from_files, discover_cases
from fastunet.data.formats import is_image
from fastunet.data.masks import mask_table
from fastunet.errors import DataWarning, UserError
from tests.cli_helpers import assert_user_error, run
from tests.data_files import random_image, random_labels, save
from tests.image_data import GREY, picture

pytestmark = pytest.mark.usefixtures("nothing_said")
MASK = ((GREY > 100) * 255).astype(np.uint8)


def tree(root, *names):
    """Files of these names: a mask or label file where the name says so."""
    for number, name in enumerate(names):
        marked = any(word in name.lower() for word in ("mask", "label", "seg", "gt", "truth", "manual", "1stho"))
        if is_image(Path(name)):
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
        ("images/{}.nii.gz", "labels/{}.nii.gz", "{}"),
        ("volumes/volume-{}.nii", "segmentations/segmentation-{}.nii", "volume-{}"),
        ("images/{}_training.png", "1st_manual/{}_manual1.png", "{}_training"),
        ("images/image_{}.png", "masks/mask_000{}.png", "image_{}"),
        ("images/{}.png", "masks/{}_mask.gif", "{}"),
        ("images/{}.png", "annotations/trimaps/{}.png", "{}"),
        ("JPEGImages/{}.png", "SegmentationClass/{}.png", "{}"),
        ("leftImg8bit/bonn/{}_leftImg8bit.png", "gtFine/bonn/{}_gtFine_labelTrainIds.png", "bonn_{}_leftImg8bit"),
        ("Image_{}L.png", "Image_{}L_1stHO.png", "Image_{}L"),
        ("01/t00{}.tif", "01_GT/SEG/man_seg00{}.tif", "t00{}"),
    ],
)
def test_masks_beside_their_images(tmp_path, image, mask, name, capsys):
    names = [str(number) for number in range(10, 14)]
    root = tree(tmp_path, *(form.format(one, one) for one in names for form in (image, mask)))
    cases = discover_cases(root, modalities=None)
    assert [case.name for case in cases] == [name.format(one) for one in names]
    assert [case.label for case in cases] == [root / mask.format(one, one) for one in names]
    assert run("check", root, "--batch-size", 1) == 0
    assert "4 cases of 4 patients, 4 labelled; the masks in" in capsys.readouterr().out


def test_pascal_voc_has_masks_of_objects_too(tmp_path):
    (case,) = discover_cases(tree(tmp_path, "JPEGImages/1.jpg", "SegmentationClass/1.png", "SegmentationObject/1.png"))
    assert case.label == tmp_path / "SegmentationClass" / "1.png"


def test_kinds_of_scans_are_no_numbers(tmp_path):
    tree(tmp_path, *(f"p{patient}/{name}.nii" for patient in (1, 2) for name in ("t1", "t2", "seg1")))
    cases = discover_cases(tmp_path, modalities=None)
    assert [(case.name, [*case.modalities]) for case in cases] == [("p1", ["t1", "t2"]), ("p2", ["t1", "t2"])]


def test_scans_of_one_patient(tmp_path):
    frames = [f"patient{number}/patient{number}_frame{frame}" for number in (1, 2) for frame in ("01", "12")]
    cases = discover_cases(tree(tmp_path, *(f"{f}{e}" for f in frames for e in (".nii", "_gt.nii"))), modalities=None)
    assert [case.patient for case in cases] == ["patient1", "patient1", "patient2", "patient2"]
    assert cases[1].name == "patient1_frame12"


def test_labels_whose_name_does_not_say_so(tmp_path):
    for number, case in enumerate("abc"):
        tree(tmp_path / case, "t1.nii.gz", "brain_mask.nii.gz")
        labels = random_labels(number, values=(0, 1)) * (number > 0)  # the first patient has no lesion
        save(tmp_path / case / "lesion.nii.gz", labels)
    words = r"b/lesion\.nii\.gz holds 2 values only.* lesion_mask, and take brain_mask\.nii\.gz away.* --modalities t1$"
    with pytest.warns(DataWarning, match=words):
        discover_cases(tmp_path, modalities=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(discover_cases(tmp_path, modalities=("t1", "lesion"))) == 3


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.png", "b.png"], r"no a_mask\.png beside a\.png, and no dataset\.json"),
        (["a.png", "a_mask.png", "a_mask_old.png"], "a.png has 2 masks, such as .* tell neither objects"),
        (["a.png", "a_mask.png", "a_label.png"], "are masks of one image"),
        (["a.png", "a_1stHO.png", "a_2ndHO.png"], "are masks of one image"),
        (["01/t0.png", "01_GT/SEG/man_seg0.png", "02_GT/SEG/man_seg0.png"], "01_GT, 02_GT may all hold masks: give a"),
        (["a.png", "a_mask.png", "b_mask.png"], r"b_mask\.png has no image of that name"),
        (["1/images/1.png", "1/masks/x.png", "1/masks/y2.png"], "1.png has 2 masks, such as x.png and y2.png,"),
        (["images/1.png", "masks/2.png"], r"2\.png has no image of that name; call it as its image is"),
        (["a/images/1.png", "b/images/1.png", "b/images/2.png"], "holds no cases itself: give .*a, or one of 1 more"),
        (["x/1/images/1.png", "x/2/images/1.png"], "holds no cases itself: give .*x$"),
        (["imagesTr/1_0000.nii.gz", "labelsTr/1.nii.gz"], "imagesTr, but no dataset.json"),
        (["train/1.png", "trainannot/1.png"], r"name its folders so \(train, trainannot\)"),
        (["images/1.png", "mask/1.png", "1st_manual/1.png"], "1st_manual and mask may all hold masks"),
    ],
)
def test_what_is_ambiguous_or_unknown(tmp_path, names, words):
    with pytest.raises(UserError, match=words):
        discover_cases(tree(tmp_path, *names))


def test_files_that_cannot_be_read(tmp_path, capsys):
    for name, words in (
        ("a.dcm", "but a.dcm: convert it"),
        (".hidden", "there is no file in it"),
        ("a.zip", "unpack it"),
    ):
        (tmp_path / name).write_bytes(b"x")
        assert_user_error(capsys, run("check", tmp_path / name if "zip" in name else tmp_path), words)
        (tmp_path / name).unlink()


def test_a_series_without_labels_beside_frames_that_have_them(tmp_path):
    root = tree(tmp_path, *(f"p{number}/p{number}_frame01{end}" for number in (1, 2) for end in (".nii", "_gt.nii")))
    save(root / "p1" / "p1_4d.nii.gz", random_image(0, (6, 5, 4, 2)))
    with pytest.warns(DataWarning, match=r"p1_4d.nii.gz has 2 channels.*left out"):
        assert [case.name for case in discover_cases(root, modalities=None)] == ["p1_frame01", "p2"]
    save(root / "p1" / "p1_4d_gt.nii.gz", random_labels(0))
    with pytest.raises(UserError, match="has 2 channels"):
        discover_cases(root, modalities=None)


def test_an_animated_gif(tmp_path):
    frames = [Image.fromarray(MASK), Image.fromarray(255 - MASK)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="is animated, with 2 frames"):
        mask_table([tmp_path / "a.gif"])


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


@pytest.mark.parametrize(
    ("volumes", "mask", "channels"),
    [
        (["p{}/t1.nii.gz", "p{}/FLAIR.nii.gz"], "p{}/mask.nii.gz", ["flair", "t1"]),
        (["p{}/p{}_T1W.nii", "p{}/p{}_FLAIR.nii"], "p{}/p{}_consensus_gt.nii", ["flair", "t1"]),
        (["p{}/orig/FLAIR.nii", "p{}/orig/T1.nii"], "p{}/wmh.nii", ["flair", "t1"]),
        (
            ["sub-{}/ses-1/anat/sub-{}_ses-1_FLAIR.nii", "sub-{}/ses-1/dwi/sub-{}_ses-1_dwi.nii"],
            "derivatives/sub-{}/ses-1/sub-{}_ses-1_mask.nii",
            ["dwi", "flair"],
        ),
        (["p{}/orig/FLAIR.nii", "p{}/pre/FLAIR.nii"], "p{}/wmh.nii", ["orig_FLAIR", "pre_FLAIR"]),
    ],
)
def test_volumes_beside_one_mask_are_channels(tmp_path, volumes, mask, channels):
    files = [path.format(number, number) for number in range(3) for path in (*volumes, mask)]
    root = tree(tmp_path, *(path.replace("wmh", "gt") for path in files))
    for path in root.rglob("gt.nii"):
        path.rename(path.with_name("wmh.nii"))
    cases = discover_cases(root, modalities=None)
    assert [case.name for case in cases] == (
        ["sub-0_ses-1", "sub-1_ses-1", "sub-2_ses-1"] if "sub-" in mask else ["p0", "p1", "p2"]
    )
    assert cases[1].label == root / mask.format(1, 1)
    assert [sorted(case.modalities) for case in cases] == [channels] * 3
    assert {source.path for source in cases[2].modalities.values()} == {root / path.format(2, 2) for path in volumes}
    assert run("check", root, "--batch-size", 1) == 0
    for path in [*root.rglob("*mask*"), *root.rglob("*gt*"), *root.rglob("wmh*")]:
        path.unlink()
    if volumes[0].count("/") == 1:  # what a network of these channels may be given
        for folder, names in ((root, ["p0", "p1", "p2"]), (root / "p1", ["p1"])):
            found = discover_cases(folder, modalities=channels)
            assert [(case.name, case.label) for case in found] == [(name, None) for name in names]


def test_a_channel_that_one_case_lacks(tmp_path, capsys):
    root = tree(tmp_path, *(f"p{number}/{name}.nii" for number in range(3) for name in ("ct", "pet", "mask")))
    (root / "p0" / "pet.nii").unlink()
    assert run("check", root, "--batch-size", 1) == 2
    assert "p0 has no pet (it has ct)" in capsys.readouterr().out
    assert run("check", root, "--batch-size", 1, "--modalities", "ct") == 0


def test_volumes_of_one_channel_are_segmented_without_masks(tmp_path):
    paths = [save(tmp_path / f"p{number}" / "ct.nii", random_image(number)) for number in range(2)]
    with pytest.raises(UserError, match="holds no cases"):
        discover_cases(tmp_path, modalities=None)
    assert [case.name for case in discover_cases(tmp_path, modalities=["ct"])] == ["p0", "p1"]
    assert [*discover_cases(tmp_path / "p1", modalities=["ct"])[0].modalities] == ["ct"]
    paths[1] = paths[1].rename(paths[1].with_name("b.nii"))
    assert [case.name for case in cases_from_files(paths, ["ct"])] == ["b", "ct"]


def test_sessions_of_one_subject(tmp_path):
    anat = "sub-{0}/ses-{1}/anat/sub-{0}_ses-{1}"
    files = [f"{anat}_T1w.nii", "derivatives/lesions/" + anat + "_label-L_mask.nii"]
    root = tree(tmp_path, *(file.format(one, session) for one in "ab" for session in (1, 2) for file in files))
    cases = discover_cases(root, modalities=None)
    assert [case.patient for case in cases] == ["sub-a", "sub-a", "sub-b", "sub-b"]
    assert [case.label.name for case in cases[:2]] == [f"sub-a_ses-{session}_label-L_mask.nii" for session in (1, 2)]


def test_channels_of_another_grid_can_be_left_out(tmp_path, capsys):
    root = tree(tmp_path, *(f"p{number}/{name}.nii" for number in range(2) for name in ("ct", "mask")))
    for number in range(2):
        save(root / f"p{number}" / "pet.nii", random_image(0, (5, 5, 5)))
    assert run("check", root, "--batch-size", 1) == 2
    assert "or leave it out of --modalities" in capsys.readouterr().out
    assert run("check", root, "--batch-size", 1, "--modalities", "ct") == 0


def test_numbers_of_few_objects_are_told(tmp_path, recwarn):
    """Masks that hold 1 to k with another k each; classes occur without those before them."""
    strips = [np.repeat(np.arange(last + 1, dtype=np.uint8), 4)[:, None].repeat(8, 1) for last in (3, 4, 6)]
    paths = [picture(tmp_path / "a" / f"{number}.png", mask) for number, mask in enumerate(strips)]
    assert len(mask_table(paths).values) == 7
    assert ["numbers of single objects" in str(one.message) for one in recwarn] == [True]
    classes = [np.where(strips[2] == value, strips[2], 0) for value in range(1, 7)]
    assert len(mask_table([picture(tmp_path / "b" / f"{n}.png", mask) for n, mask in enumerate(classes)]).values) == 7
    assert len(recwarn) == 1
