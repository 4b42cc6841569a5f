from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastunet.data import LABEL_MAPS, Source, cases_from_files, check_geometry, discover_cases
from fastunet.errors import UserError
from tests.data_files import NNUNET_JSON, brats_case, gli_case, msd_folder, nnunet_folder, random_image, save


def test_brats_2021(tmp_path):
    for number in (2, 0, 1):
        brats_case(tmp_path / f"BraTS2021_0000{number}", suffix=(".nii.gz", ".nii")[number % 2])
    cases = discover_cases(tmp_path)
    assert [case.name for case in cases] == ["BraTS2021_00000", "BraTS2021_00001", "BraTS2021_00002"]
    assert [case.patient for case in cases] == [case.name for case in cases]
    folder = tmp_path / "BraTS2021_00001"
    assert cases[1].modalities == {m: Source(folder / f"{folder.name}_{m}.nii") for m in ("flair", "t1", "t1ce", "t2")}
    assert cases[1].label == folder / f"{folder.name}_seg.nii"
    assert cases[0].edition == "brats2021"
    assert cases[0].label_map is LABEL_MAPS["brats2021"]
    assert len(cases[0].files) == 5


def test_brats_2018_nests_by_grade_and_numbers_scans(tmp_path):
    brats_case(tmp_path / "HGG" / "Brats18_TCIA02_135_1")
    brats_case(tmp_path / "LGG" / "Brats18_2013_0_1")
    brats_case(tmp_path / "LGG" / "Brats18_2013_0_2")
    cases = discover_cases(tmp_path)
    assert [case.patient for case in cases] == ["Brats18_2013_0", "Brats18_2013_0", "Brats18_TCIA02_135"]
    assert cases[0].label_map.values == (0, 1, 2, 4)


def test_the_case_number_of_2020_is_not_a_scan_number(tmp_path):
    brats_case(tmp_path / "BraTS20_Training_001")
    assert discover_cases(tmp_path)[0].patient == "BraTS20_Training_001"


def test_the_label_of_2020_under_another_name(tmp_path):
    folder = brats_case(tmp_path / "BraTS20_Training_355", suffix=".nii")
    (folder / "BraTS20_Training_355_seg.nii").rename(folder / "W39_1998.09.19_Segm.nii")
    (case,) = discover_cases(tmp_path)
    assert case.label == folder / "W39_1998.09.19_Segm.nii"


@pytest.mark.parametrize("inner", ["00000057_brain_{part}.nii", "volume.nii"])
@pytest.mark.parametrize("make, mark", [(brats_case, "_"), (gli_case, "-")])
def test_folders_that_have_the_names_of_files(tmp_path, make, mark, inner):
    case = make(tmp_path / "BraTS-GLI-00001-000", suffix=".nii")
    for file in sorted(case.iterdir()):
        folder = file.rename(tmp_path / "moved.nii") and file
        folder.mkdir()
        (tmp_path / "moved.nii").rename(folder / inner.format(part=file.stem.rpartition(mark)[2]))
    (found,) = discover_cases(tmp_path)
    assert found.name == "BraTS-GLI-00001-000"
    assert list(found.modalities) == ["flair", "t1", "t1ce", "t2"]
    assert all(file.parent.parent == case and file.is_file() for file in found.files)
    assert found.label is not None


@pytest.mark.parametrize(("contrast", "label"), [("T1c", "tumor_segmentation"), ("T1GD", "segm")])
def test_other_names_of_contrast_and_label(tmp_path, contrast, label):
    folder = brats_case(tmp_path / "UCSF-0004")
    for old, new in (("t1ce", contrast), ("seg", label)):
        (folder / f"UCSF-0004_{old}.nii.gz").rename(folder / f"UCSF-0004_{new}.nii.gz")
    (case,) = discover_cases(tmp_path)
    assert case.modalities["t1ce"].path.name == f"UCSF-0004_{contrast}.nii.gz"
    assert case.label == folder / f"UCSF-0004_{label}.nii.gz"


def test_brats_2023_and_2024_differ_by_timepoint(tmp_path):
    gli_case(tmp_path / "a" / "BraTS-GLI-00000-000")
    gli_case(tmp_path / "a" / "BraTS-GLI-00000-001")
    gli_case(tmp_path / "b" / "BraTS-GLI-02405-100", values=(0, 1, 2, 3, 4))
    old, new = discover_cases(tmp_path / "a"), discover_cases(tmp_path / "b")
    assert [case.edition for case in old + new] == ["brats2023", "brats2023", "brats2024"]
    assert [case.patient for case in old + new] == ["BraTS-GLI-00000", "BraTS-GLI-00000", "BraTS-GLI-02405"]
    assert old[0].modalities["flair"].path.name == "BraTS-GLI-00000-000-t2f.nii.gz"
    assert old[0].modalities["t1ce"].path.name == "BraTS-GLI-00000-000-t1c.nii.gz"
    assert old[0].modalities["t1"].path.name == "BraTS-GLI-00000-000-t1n.nii.gz"
    assert old[0].modalities["t2"].path.name == "BraTS-GLI-00000-000-t2w.nii.gz"
    with pytest.raises(UserError, match=r"mixes cases of brats2023 .* and brats2024"):
        discover_cases(tmp_path)
    assert {case.edition for case in discover_cases(tmp_path, edition="brats2024")} == {"brats2024"}


def test_other_challenges_need_a_named_edition(tmp_path):
    gli_case(tmp_path / "BraTS-PATH-00001-000")
    with pytest.raises(UserError, match="no label table is known for this challenge"):
        discover_cases(tmp_path)
    assert discover_cases(tmp_path, edition="brats2023")[0].patient == "BraTS-PATH-00001"
    with pytest.raises(UserError, match="edition 'brats1999' is unknown"):
        discover_cases(tmp_path, edition="brats1999")


def test_one_case_folder_and_flat_folders(tmp_path):
    folder = brats_case(tmp_path / "one")
    assert [case.name for case in discover_cases(folder)] == ["one"]
    for number in range(3):
        brats_case(tmp_path / "flat", f"case_{number}", seed=number)
    assert [case.name for case in discover_cases(tmp_path / "flat")] == ["case_0", "case_1", "case_2"]


def test_cases_without_label(tmp_path):
    folder = brats_case(tmp_path / "a")
    (folder / "a_seg.nii.gz").unlink()
    assert discover_cases(tmp_path)[0].label is None


def test_hidden_files_and_link_cycles(tmp_path):
    folder = brats_case(tmp_path / "data" / "a")
    shutil.copy(folder / "a_flair.nii.gz", folder / "._b_flair.nii.gz")
    brats_case(tmp_path / "data" / ".cache" / "c")
    (folder / "loop").symlink_to(tmp_path / "data")
    (folder / "above").symlink_to(tmp_path)
    brats_case(tmp_path / "beside" / "e")
    brats_case(tmp_path / "elsewhere" / "d")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    assert [case.name for case in discover_cases(tmp_path / "data")] == ["a", "d"]


def test_missing_modality(tmp_path):
    folder = brats_case(tmp_path / "a")
    (folder / "a_t1ce.nii.gz").unlink()
    with pytest.raises(UserError, match=rf"{folder}: case a has no t1ce \(it has flair, t1, t2\)"):
        discover_cases(tmp_path)
    assert discover_cases(tmp_path, modalities=("flair", "t2"))[0].name == "a"
    assert discover_cases(tmp_path, modalities=None)[0].name == "a"


def test_label_without_modalities(tmp_path):
    save(tmp_path / "a" / "a_seg.nii.gz", random_image(0))
    with pytest.raises(UserError, match=r"a_seg\.nii\.gz is a label file without any modality"):
        discover_cases(tmp_path)


def test_empty_and_missing_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no cases"):
        discover_cases(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        discover_cases(tmp_path / "nowhere")


def test_the_folder_above_a_decathlon_task(tmp_path):
    msd_folder(tmp_path / "Task01")
    with pytest.raises(UserError, match=r"holds no cases itself: give .*Task01"):
        discover_cases(tmp_path)


def test_two_cases_of_one_name(tmp_path):
    brats_case(tmp_path / "HGG" / "a")
    brats_case(tmp_path / "LGG" / "a")
    with pytest.raises(UserError, match="two cases are called a"):
        discover_cases(tmp_path)


def test_one_modality_twice(tmp_path):
    folder = brats_case(tmp_path / "a")
    save(folder / "a_t1.nii", random_image(0))
    with pytest.raises(UserError, match=r"a_t1\.nii and .*a_t1\.nii\.gz are the same part"):
        discover_cases(tmp_path)


def test_geometry_of_a_good_case(tmp_path):
    brats_case(tmp_path / "a")
    (case,) = discover_cases(tmp_path)
    assert check_geometry(case, ("flair", "t2")).shape == (6, 5, 4)


@pytest.mark.parametrize("part", ["t1ce", "seg"])
def test_different_shapes(tmp_path, part):
    folder = brats_case(tmp_path / "a")
    save(folder / f"a_{part}.nii.gz", random_image(0, (6, 5, 5)))
    with pytest.raises(UserError, match=rf"a_flair\.nii\.gz and .*a_{part}\.nii\.gz differ in shape") as caught:
        check_geometry(discover_cases(tmp_path)[0], ("flair", "t1ce"))
    assert "(6, 5, 4) and (6, 5, 5)" in str(caught.value)


@pytest.mark.parametrize("part", ["t1ce", "seg"])
@pytest.mark.parametrize("where", [(0, 0), (1, 3), (0, 1)])
def test_different_affines(tmp_path, part, where):
    folder = brats_case(tmp_path / "a")
    affine = np.eye(4)
    affine[where] += 0.01
    save(folder / f"a_{part}.nii.gz", random_image(0), affine)
    (case,) = discover_cases(tmp_path)
    apart = {(0, 0): 0.05, (1, 3): 0.01, (0, 1): 0.04}[where]
    with pytest.raises(UserError, match=rf"a_flair\.nii\.gz and .*a_{part}\.nii\.gz differ in .* up to {apart} mm"):
        check_geometry(case, ("flair", "t1ce"))
    assert check_geometry(case, ("flair", "t1"), label=False).shape == (6, 5, 4)
    affine[where] -= 0.0095
    save(folder / f"a_{part}.nii.gz", random_image(0), affine)
    check_geometry(case, ("flair", "t1ce"))


def test_loose_files_by_name_and_by_order(tmp_path):
    one, two = brats_case(tmp_path / "one"), gli_case(tmp_path / "two-001")
    files = [one / "one_t1ce.nii.gz", one / "one_flair.nii.gz", two / "two-001-t2f.nii.gz", two / "two-001-t1c.nii.gz"]
    assert [case.name for case in cases_from_files(files)] == ["one", "two-001"]
    assert cases_from_files(files)[0].modalities["t1ce"].path == files[0]
    a, b = save(tmp_path / "x.nii", random_image(0)), save(tmp_path / "y.nii.gz", random_image(1))
    (case,) = cases_from_files([b, a], ("t2", "flair"))
    assert case.name == "y"
    assert case.modalities == {"t2": Source(b), "flair": Source(a)}
    assert case.label is None


def test_loose_files_that_are_no_set(tmp_path):
    one = brats_case(tmp_path / "one")
    x = save(tmp_path / "x.nii", random_image(0))
    with pytest.raises(UserError, match="1 files given, but a case has 2: flair, t1ce"):
        cases_from_files([x])
    with pytest.raises(UserError, match=r"x\.nii is given twice; each of flair, t1ce has a file of its own"):
        cases_from_files([x, x])
    with pytest.raises(UserError, match="one is not a regular file"):
        cases_from_files([one])
    with pytest.raises(UserError, match="case one has no t1ce"):
        cases_from_files([one / "one_flair.nii.gz"])
    with pytest.raises(UserError, match=r"nothing\.nii: there is no such file"):
        cases_from_files([tmp_path / "nothing.nii"])


def test_decathlon(tmp_path):
    root = msd_folder(tmp_path / "Task01_BrainTumour")
    save(root / "imagesTs" / "BRATS_900.nii.gz", random_image(5, (6, 5, 4, 4)))
    save(root / "imagesTr" / "._BRATS_001.nii.gz", random_image(5))
    one, two, test = discover_cases(root)
    assert (one.name, two.name, test.name) == ("BRATS_001", "BRATS_002", "BRATS_900")
    image = root / "imagesTr" / "BRATS_001.nii.gz"
    assert one.modalities == {m: Source(image, i) for i, m in enumerate(("flair", "t1", "t1ce", "t2"))}
    assert one.label == root / "labelsTr" / "BRATS_001.nii.gz"
    assert one.files == [image, one.label]
    assert one.label_map.values == (0, 2, 1, 3)
    assert one.edition == "BRATS"
    assert test.label is None
    assert check_geometry(one, ("flair", "t1ce")).shape == (6, 5, 4, 4)


def test_nnunet(tmp_path):
    root = nnunet_folder(tmp_path / "Dataset001_Liver")
    one, two = discover_cases(root)
    assert (one.name, two.name, one.edition) == ("case_a", "case_b", "Dataset001_Liver")
    images = root / "imagesTr"
    assert one.modalities == {
        "t1ce": Source(images / "case_a_0000.nii.gz"),
        "flair": Source(images / "case_a_0001.nii.gz"),
    }
    assert one.label == root / "labelsTr" / "case_a.nii.gz"
    assert one.label_map.class_names == ("background", "liver", "lesion")
    assert discover_cases(root, edition="brats2023")[0].label_map is LABEL_MAPS["brats2023"]


def test_nnunet_of_the_first_version_lists_images_without_channel(tmp_path):
    listed = [{"image": "./imagesTr/case_a.nii.gz", "label": "./labelsTr/case_a.nii.gz"}]
    root = nnunet_folder(tmp_path, modality={"0": "T1Gd", "1": "FLAIR"}, channel_names=None, training=listed)
    assert list(discover_cases(root)[0].modalities) == ["t1ce", "flair"]


def test_dataset_json_with_files_missing(tmp_path):
    root = msd_folder(tmp_path / "msd")
    (root / "labelsTr" / "BRATS_002.nii.gz").unlink()
    with pytest.raises(UserError, match=r"labelsTr/BRATS_002\.nii\.gz is listed in .*dataset\.json but was not found"):
        discover_cases(root)
    (root / "imagesTr" / "BRATS_002.nii.gz").unlink()
    with pytest.raises(UserError, match=r"imagesTr/BRATS_002\.nii\.gz is listed"):
        discover_cases(root)
    root = nnunet_folder(tmp_path / "nnunet")
    (root / "imagesTr" / "case_b_0001.nii.gz").unlink()
    with pytest.raises(UserError, match=r"imagesTr: case case_b lacks case_b_0001\.nii\.gz"):
        discover_cases(root)


def test_dataset_json_without_the_modality(tmp_path):
    root = nnunet_folder(tmp_path, channel_names={"0": "CT", "1": "FLAIR"})
    with pytest.raises(UserError, match=r"case case_a has no t1ce \(it has CT, flair\)"):
        discover_cases(root)
    assert discover_cases(root, modalities=("CT",))[0].name == "case_a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "expected object, got array"),
        ("\xff", "is not valid JSON"),
        (json.dumps({**NNUNET_JSON, "channel_names": {"1": "T1"}}), "number the channels from 0"),
        (json.dumps({**NNUNET_JSON, "channel_names": 7}), "at channel_names"),
        (json.dumps({**NNUNET_JSON, "channel_names": {"0": "T1", "1": "T1w"}}), "two channels are the same modality"),
        (json.dumps({**NNUNET_JSON, "file_ending": ".dcm"}), "files end in '.dcm'"),
        (json.dumps({**NNUNET_JSON, "training": ["a"]}), "was not found"),
        (json.dumps({**NNUNET_JSON, "training": [{"label": "a"}]}), "names no image"),
        (json.dumps({**NNUNET_JSON, "labels": {"background": 0, "whole": [1, 2]}}), "regions"),
        (json.dumps({**NNUNET_JSON, "labels": {"background": 1, "liver": 0}}), "needs 0 for the background"),
    ],
)
def test_dataset_json_that_cannot_be_used(tmp_path, content, message):
    root = nnunet_folder(tmp_path)
    (root / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json") as caught:
        discover_cases(root)
    assert message in str(caught.value)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_dataset_json_that_is_no_file(tmp_path, make):
    brats_case(tmp_path / "case")
    make(tmp_path / "dataset.json")
    with pytest.raises(UserError, match=r"dataset\.json(: no such| is not a regular) file"):
        discover_cases(tmp_path)


def test_dataset_json_without_images(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(NNUNET_JSON))
    with pytest.raises(UserError, match="holds no cases"):
        discover_cases(tmp_path)
