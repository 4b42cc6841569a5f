"""``fastunet check``: what a folder holds and every problem at once; exit code 2 if training would refuse it."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from fastunet.data import discover_cases, split_cases
from fastunet.data.checks import check_quickly, inspect_case
from tests.cli_helpers import TINY, assert_user_error, run
from tests.data_files import brats_case, msd_folder, nnunet_folder, random_image, random_labels, save
from tests.image_data import folder_of, picture


def test_a_good_folder(data, capsys):
    assert run("check", data) == 0
    out = capsys.readouterr().out
    assert "4 cases of 4 patients, 4 labelled; brats2021" in out
    assert "training takes flair, t1ce" in out
    assert out.count("32 × 32 × 17") == 4
    assert out.count("LPS") == 4
    assert "no problem found" in out
    (case, *_) = cases = discover_cases(data)
    labels = np.concatenate([np.ravel(inspect(case)) for case in cases])
    row = next(line.split() for line in out.splitlines() if line.startswith("4 "))
    assert row[:4] == ["4", "enhancing", "tumour", str((labels == 4).sum())]
    report = inspect_case(case, ("flair",))
    voxels = voxels_of(case.modalities["flair"].path)
    assert report.intensities["flair"].mean == pytest.approx(voxels[voxels != 0].mean(), rel=1e-6)
    assert report.intensities["flair"].zeros == pytest.approx((voxels == 0).mean())


def inspect(case) -> np.ndarray:
    return voxels_of(case.label)


def voxels_of(path: Path) -> np.ndarray:
    import nibabel

    return np.asarray(nibabel.load(path).dataobj)


def test_every_problem_at_once(data, capsys):
    (one, two, three, four) = sorted(data.iterdir())
    (one / f"{one.name}_t1ce.nii.gz").unlink()
    path = two / f"{two.name}_flair.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    save(three / f"{three.name}_seg.nii.gz", random_labels(0, (32, 32, 17), (0, 1, 9)), np.diag([-1, -1, 1, 1.0]))
    save(four / f"{four.name}_t1ce.nii.gz", random_image(0, (32, 31, 17)))
    shutil.copytree(four, data / "zz_again")
    code = run("check", data)
    captured = capsys.readouterr()
    assert code == 2
    problems = captured.out.split("problems:\n")[1].splitlines()
    for number, words in enumerate(
        [
            (f"two cases are called {four.name}",),
            (f"case {one.name} has no t1ce",),
            (f"{two.name}_flair.nii.gz", "truncated"),
            (f"{three.name}_seg.nii.gz", "label values 9"),
            (f"{four.name}_t1ce.nii.gz", "(32, 31, 17)"),
        ]
    ):
        assert any(all(word in problem for word in words) for problem in problems), (number, words, problems)
    last = captured.err.splitlines()[-1]
    assert last.startswith("fastunet: ")
    assert f"{len(problems)} problems; training would refuse it" in last
    assert "NOT IN THE TABLE" in captured.out


def test_train_reads_headers_first(data, tmp_path, capsys):
    for folder in sorted(data.iterdir())[1:3]:
        save(folder / f"{folder.name}_flair.nii.gz", random_image(0, (32, 31, 17)))
    assert len(check_quickly(discover_cases(data), ("flair", "t1ce"))) == 2
    code = run("train", data, "--out", tmp_path / "run", *TINY)
    assert_user_error(capsys, code, "differ in shape", "fastunet check", "lists 1 more")
    assert not list((tmp_path / "run").rglob("*.npy"))


def test_sizes(tmp_path, capsys):
    for number in range(3):
        brats_case(tmp_path / f"case_{number}", seed=number, shape=(12, 10 + number // 2, 8))
    code = run("check", tmp_path)
    assert_user_error(capsys, code, "1 problem;")
    assert run("check", tmp_path, "--size", "8") == 0
    out = capsys.readouterr().out
    assert "sizes differ: 12 × 10 × 8 (2), 12 × 11 × 8 (1)" in out
    assert_user_error(capsys, run("check", tmp_path, "--size", 2**20), "1 problem;")


def test_spacing_and_regions_are_checked_as_training_does(tmp_path, capsys):
    for number in range(3):
        affine = np.diag([1.0 + (number == 2), 1, 1, 1])
        for part in ("flair", "t1ce"):
            save(tmp_path / f"c{number}_{part}.nii.gz", random_image(0, (12 - 6 * (number == 2), 12, 4)), affine)
        save(tmp_path / f"c{number}_seg.nii.gz", random_labels(0, (12 - 6 * (number == 2), 12, 4)), affine)
    assert_user_error(capsys, run("check", tmp_path), "1 problem;")
    assert run("check", tmp_path, "--spacing", "1", "--regions", "brats") == 0
    assert "slices are resampled to pixels of 1 × 1 mm" in capsys.readouterr().out
    images = folder_of(tmp_path / "cells")
    assert_user_error(capsys, run("check", images, "--spacing", "1", "--regions", "brats"), "2 problems;")
    for command in ("check", "train"):
        assert_user_error(capsys, run(command, tmp_path, "--modalities", "flair,flair"), "'flair,flair'")


def test_what_training_leaves_out_is_no_problem(data, capsys):
    for number in range(2):
        folder = sorted(data.iterdir())[number]
        (folder / f"{folder.name}_seg.nii.gz").unlink()
    folder = sorted(data.iterdir())[0]
    (folder / f"{folder.name}_flair.nii.gz").write_bytes(gzip.compress(b"text"))
    assert run("check", data) == 0
    out = capsys.readouterr().out
    assert "4 cases of 4 patients, 2 labelled" in out
    assert "which training leaves out" in out


@pytest.mark.parametrize("damage", ["channel", "listed"])
def test_nnunet_folders(tmp_path, capsys, damage):
    root = nnunet_folder(tmp_path, names=("a", "b", "c"), labels={"background": 0, "liver": 1, "ignore": 2})
    assert run("check", root) == 0
    assert "2      (ignored)" in capsys.readouterr().out
    if damage == "channel":
        (root / "imagesTr" / "a_0001.nii.gz").unlink()
        (root / "imagesTr" / "b_0000.nii.gz").unlink()
    else:
        table = json.loads((root / "dataset.json").read_text())
        table["training"] = ["./imagesTr/x.nii.gz", "./imagesTr/y.nii.gz"]
        (root / "dataset.json").write_text(json.dumps(table))
    assert run("check", root) == 2
    out = capsys.readouterr().out
    for word in ("a_0001.nii.gz", "b_0000.nii.gz") if damage == "channel" else ("x.nii.gz", "y.nii.gz"):
        assert word in out


def test_a_modality_that_training_does_not_take_is_no_problem(data, capsys):
    one, two, *_ = (folder / f"{folder.name}_t2.nii.gz" for folder in sorted(data.iterdir()))
    one.write_bytes(b"junk" * 100)
    save(two, voxels_of(two), np.eye(4))
    assert run("check", data) == 0
    out = capsys.readouterr().out
    assert "what training does not need" in out
    assert all(out.count(f"{path}") == 1 for path in (one, two))
    assert run("check", data, "--modalities", "flair,t2") == 2


def test_problems_are_listed_though_no_case_is_left(tmp_path, capsys):
    root = nnunet_folder(tmp_path, channel_names={"0": "flair", "1": "t1ce", "2": "t2"})
    assert run("check", root) == 2
    out = capsys.readouterr().out
    assert "case_a lacks case_a_0002.nii.gz" in out
    assert "case_b lacks case_b_0002.nii.gz" in out


def test_a_library_that_all_files_need_is_named_once(data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    for path in data.rglob("*.nii.gz"):
        path.rename(path.with_name(path.name.replace(".nii.gz", ".mha")))
    assert run("check", data) == 2
    said = capsys.readouterr()
    assert said.out.count("pip install") == 1
    assert "has 1 problem;" in said.err


def test_the_order_in_which_regions_are_painted(tmp_path, capsys):
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    root = nnunet_folder(tmp_path, names=("a", "b", "c"), labels=labels)
    table = json.loads((root / "dataset.json").read_text()) | {"regions_class_order": [1, 2]}
    (root / "dataset.json").write_text(json.dumps(table))
    assert run("check", root) == 0
    assert "(regions_class_order): whole (as 1), core (as 2)" in capsys.readouterr().out


def test_images(tmp_path, capsys):
    assert run("check", folder_of(tmp_path), "--size", "8") == 0
    out = capsys.readouterr().out
    assert "channels: grey; training takes grey" in out
    assert "255    object" in out


def test_a_mask_of_fractions_is_named_once(tmp_path, capsys):
    root = folder_of(tmp_path)
    (root / "masks" / "cell_1.png").unlink()
    broken = np.float32([[0, 0.5], [np.nan, 255]]).repeat(6, 0)[:, [0, 1] * 5]
    broken = picture(root / "masks" / "cell_1.tif", np.vstack([broken, broken[:1]]))
    assert run("check", root) == 2
    assert capsys.readouterr().out.count(str(broken)) == 1


def test_nothing_but_background(tmp_path, capsys):
    for number in range(2):
        folder = brats_case(tmp_path / f"case_{number}", seed=number)
        save(folder / f"{folder.name}_seg.nii.gz", random_labels(0) * 0)
    assert run("check", tmp_path, "--batch-size", 1) == 2
    assert "none of 1 label files for training holds anything but background" in capsys.readouterr().out
    code = run("train", tmp_path, "--out", tmp_path / "run", *TINY, "--foreground-fraction", "0", "--batch-size", 1)
    assert_user_error(capsys, code, "holds anything but background: nothing to learn")


def test_bad_folders(tmp_path, capsys):
    assert_user_error(capsys, run("check", tmp_path / "nowhere"), "nowhere")
    assert_user_error(capsys, run("check", tmp_path), "holds no cases")


def test_channels_that_a_file_lacks(tmp_path, capsys):
    root = msd_folder(tmp_path, names=("a", "b", "c"))
    save(root / "imagesTr" / "a.nii.gz", random_image(0, (6, 5, 4, 2)))
    save(root / "labelsTr" / "b.nii.gz", random_labels(0, (6, 5, 4, 2)))
    assert run("check", root) == 2
    out = capsys.readouterr().out
    assert "a.nii.gz: has no channel 2" in out
    assert "b.nii.gz: a label file has 3 axes" in out
    code = run("train", root, "--out", tmp_path / "run", *TINY, "--modalities", "t1ce")
    assert_user_error(capsys, code, "a.nii.gz", "no channel 2")


@pytest.mark.parametrize("option, words", [
    (["--axis", 1], "has 4 problems"), (["--edition", "brats2021"], "their masks have a table of their own"),
])  # fmt: skip
def test_options_that_images_do_not_take(option, words, tmp_path, capsys):
    data = folder_of(tmp_path / "data")
    assert_user_error(capsys, run("check", data, *option), words)
    assert run("train", data, "--out", tmp_path / "run", *TINY, *option) == 2


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--class-weights", "1,2,3"], "--class-weights has 3 numbers"),
        (["--preset", "isbi", "--size", 101], "101"),
        (["--norm", "group", "--width", 3], "3"),
        (["--batch-size", 100], "--batch-size is 100, but there are only"),
        (["--border-weights", "--loss", "dice"], "--border-weights weighs the cross-entropy"),
    ],
)
def test_options_of_training_that_do_not_fit(option, words, tmp_path, capsys):
    data = folder_of(tmp_path / "data")
    assert run("check", data, *option) == 2
    assert words in "".join(capsys.readouterr())
    assert_user_error(capsys, run("train", data, "--out", tmp_path / "run", *option), words)
    assert not (tmp_path / "run" / "cache").exists()
    assert run("check", data, "--class-weights", "1,2", "--border-weights", "--width", 4, "--batch-size", 1) == 0


@pytest.mark.parametrize("option", [["--border-weights"], ["--batch-size", 1000], ["--width", 3, "--norm", "group"]])
def test_options_of_training_that_do_not_fit_volumes(option, data, tmp_path, capsys):
    for command in (["check"], ["train", "--out", tmp_path / "run"]):
        assert run(*command, data, *option) == 2
        assert option[0] in "".join(capsys.readouterr()) or option[0] == "--width"
    assert not (tmp_path / "run" / "cache").exists()


def test_foreground_in_no_case_that_trains(tmp_path, capsys):
    root = tmp_path / "data"
    folders = [brats_case(root / f"case_{number}", seed=number) for number in range(3)]
    validated = split_cases(discover_cases(root)).validation[0]
    for folder in folders:
        if folder.name != validated.name:
            save(folder / f"{folder.name}_seg.nii.gz", random_labels(0) * 0)
    assert run("check", root, "--batch-size", 1) == 2
    assert "none of 2 label files for training holds anything but background" in capsys.readouterr().out
    assert run("train", root, "--out", tmp_path / "run", *TINY) == 2


@pytest.mark.parametrize("share", [0, 0.99, 1])
def test_shares_that_training_refuses(share, data, tmp_path, capsys):
    assert run("check", data, "--val-fraction", share) == 2
    assert run("train", data, "--out", tmp_path / "run", *TINY, "--val-fraction", share) == 2
    assert run("check", data, "--val-fraction", 0.5) == 0


def test_masks_in_a_folder_of_another_name(tmp_path, capsys):
    data, words = folder_of(tmp_path / "data", masks="outlines"), "outlines beside images is taken for no masks"
    assert run("check", data) == 2
    assert f"holds no labelled cases: {words}; call that folder masks" in capsys.readouterr().out
    assert_user_error(capsys, run("train", data, "--out", tmp_path / "run", *TINY), words)


def test_a_file_in_place_of_its_folder(tmp_path, capsys):
    (tmp_path / "dataset.json").write_text("{}")
    assert_user_error(capsys, run("check", tmp_path / "dataset.json"), "dataset.json is a file; give the data folder")


def test_a_batch_of_more_slices_than_are_not_empty(tmp_path, capsys):
    for number, case in enumerate("abc"):
        image, labels = random_image(number, (6, 5, 8)), random_labels(number, (6, 5, 8), (0, 1))
        image[..., 4:] = labels[..., 4:] = 0
        save(tmp_path / case / "t1.nii.gz", image)
        save(tmp_path / case / "mask.nii.gz", labels)
    assert run("check", tmp_path, "--batch-size", 8) == 0
    assert run("check", tmp_path, "--batch-size", 9) == 2
    assert "--batch-size is 9, but there are only 8 training slices" in capsys.readouterr().out
