"""``fastunet evaluate PREDICTIONS TRUTH`` on plain label files: named by a table nearby, or as they are found."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from tests.cli_helpers import assert_user_error, run
from tests.data_files import NNUNET_JSON, nnunet_folder, random_labels, save


def folders(tmp_path: Path, values=(0, 3, 7), names=("a", "b")) -> tuple[Path, Path]:
    """Truth, and predictions that are equal but for class 7 in half of the volume."""
    for seed, name in enumerate(names):
        truth = random_labels(seed, (6, 5, 4), values)
        predicted = truth.copy()
        predicted[3:][predicted[3:] == values[-1]] = 0
        save(tmp_path / "truth" / f"{name}.nii.gz", truth)
        save(tmp_path / "predicted" / f"{name}.nii.gz", predicted)
    return tmp_path / "predicted", tmp_path / "truth"


def scores(path: Path) -> dict[tuple[str, str], float]:
    return {(row["case"], row["structure"]): float(row["dice"]) for row in csv.DictReader(path.open())}


def dice(predicted: Path, truth: Path, value: int) -> float:
    one, two = (np.asanyarray(nibabel.load(path).dataobj) == value for path in (predicted, truth))
    return 2 * (one & two).sum() / (one.sum() + two.sum())


def test_labels_as_found(tmp_path, capsys):
    predicted, truth = folders(tmp_path)
    assert run("evaluate", predicted, truth, "--csv", tmp_path / "s.csv") == 0
    assert "labels as found: 0 background, 3 label 3, 7 label 7" in capsys.readouterr().out
    found = scores(tmp_path / "s.csv")
    for name in ("a", "b"):
        for value in (3, 7):
            expected = dice(predicted / f"{name}.nii.gz", truth / f"{name}.nii.gz", value)
            assert found[name, f"label {value}"] == pytest.approx(expected, abs=1e-6)
    assert run("evaluate", predicted / "a.nii.gz", truth / "a.nii.gz") == 0


@pytest.mark.parametrize("place", ["beside", "above", "named", "predictions"])
def test_labels_of_a_dataset_json(tmp_path, capsys, place):
    predicted, truth = folders(tmp_path, (0, 1, 2))
    truth = truth.rename(truth.parent / "x" if place == "named" else truth)
    table = {"beside": tmp_path, "above": tmp_path, "named": tmp_path / "other", "predictions": predicted}[place]
    table.mkdir(exist_ok=True)
    (table / "dataset.json").write_text(json.dumps(NNUNET_JSON))
    named = ["--labels", table / "dataset.json"] if place == "named" else []
    assert run("evaluate", predicted, truth, "--csv", tmp_path / "s.csv", *named) == 0
    assert {structure for _, structure in scores(tmp_path / "s.csv")} == {"liver", "lesion"}


def test_a_whole_nnunet_folder_as_truth(tmp_path):
    root = nnunet_folder(tmp_path / "data", labels={"background": 0, "liver": 1, "ignore": 2})
    predicted = tmp_path / "predicted"
    for name in ("case_a", "case_b"):
        truth = np.asanyarray(nibabel.load(root / "labelsTr" / f"{name}.nii.gz").dataobj)
        save(predicted / f"{name}.nii.gz", np.where(truth == 2, 1, truth).astype(np.uint8))
    assert run("evaluate", predicted, root, "--csv", tmp_path / "s.csv") == 0
    assert set(scores(tmp_path / "s.csv").values()) == {1.0}  # what is ignored is not counted


def test_an_ignored_label_predicts_nothing(tmp_path, capsys):
    root = nnunet_folder(tmp_path / "data", labels={"background": 0, "liver": 1, "ignore": 2})
    code = run("evaluate", root / "labelsTr", root)
    assert_user_error(capsys, code, "case_a.nii.gz", "2", "ignored")


def test_labels_of_a_run_and_of_an_edition(tmp_path, checkpoint):
    predicted, truth = folders(tmp_path, (0, 1, 2, 4))
    for table in (checkpoint, "brats2021"):
        assert run("evaluate", predicted, truth, "--labels", table, "--csv", tmp_path / "s.csv", "--overwrite") == 0
        assert {"whole tumour", "oedema"} < {structure for _, structure in scores(tmp_path / "s.csv")}


def test_masks(tmp_path):
    for folder, mask in (("truth", np.eye(8)), ("predicted", np.eye(8) * (np.arange(8) < 4))):
        (tmp_path / folder).mkdir()
        Image.fromarray((mask * 255).astype(np.uint8)).save(tmp_path / folder / "a.png")
    assert run("evaluate", tmp_path / "predicted", tmp_path / "truth", "--csv", tmp_path / "s.csv") == 0
    assert scores(tmp_path / "s.csv")["a", "label 255"] == pytest.approx(2 / 3, abs=1e-6)


@pytest.mark.parametrize("suffix, scale, words", [(".png", 1, "has values 255, "), (".jpg", 200, "JPEG")])
def test_predictions_in_other_values_than_the_truth(tmp_path, capsys, suffix, scale, words):
    disc = np.hypot(*(np.indices((64, 64)) - 32)) < 20
    for folder, mask, ending in (("truth", disc * 255, ".png"), ("predicted", disc * scale, suffix)):
        (tmp_path / folder).mkdir()
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / folder / f"a{ending}")
    assert_user_error(capsys, run("evaluate", tmp_path / "predicted", tmp_path / "truth"), words)


def test_predictions_with_a_mark(tmp_path, capsys):
    predicted, truth = folders(tmp_path, names=("a",))
    (predicted / "a.nii.gz").rename(predicted / "A_pred.nii.gz")
    assert run("evaluate", predicted, truth) == 0
    shutil.copy(predicted / "A_pred.nii.gz", predicted / "a_seg.nii.gz")
    assert_user_error(capsys, run("evaluate", predicted, truth), "holds 2 predictions of the name a;")


def test_predictions_without_truth_are_named(tmp_path, capsys):
    predicted, truth = folders(tmp_path)
    for name in ("a_prob", "other"):
        shutil.copy(predicted / "a.nii.gz", predicted / f"{name}.nii.gz")
    assert run("evaluate", predicted, truth) == 0
    assert "1 files of" in (said := capsys.readouterr().err)
    assert "such as other.nii.gz, have no truth, and are not scored" in said


def test_what_cannot_be_compared(tmp_path, capsys):
    predicted, truth = folders(tmp_path)
    assert_user_error(capsys, run("evaluate", predicted, truth, "--labels", "brats1999"), "brats1999", "dataset.json")
    save(predicted / "b.nii.gz", random_labels(0), np.diag([2, 1, 1, 1.0]))
    assert_user_error(capsys, run("evaluate", predicted, truth), "b.nii.gz", "5 mm", "voxels of")
    save(predicted / "b.nii.gz", random_labels(0) + np.float32(0.5))
    assert_user_error(capsys, run("evaluate", predicted, truth), "b.nii.gz", "120 voxels are no whole numbers", "4.5")
    (predicted / "b.nii.gz").unlink()
    assert_user_error(capsys, run("evaluate", predicted, truth), "no prediction", "b")
