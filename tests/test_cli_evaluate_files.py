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

from fastunet.inference.surface import hd95
from tests.cli_helpers import assert_user_error, run
from tests.data_files import NNUNET_JSON, nnunet_folder, random_labels, save
from tests.image_data import picture


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


def test_hd95_is_that_of_all_pairs_of_surface_voxels():
    """Against distances between every voxel of one surface and every one of the other."""
    drawn = np.random.default_rng(0)
    for shape in ((9, 7, 6), (12, 10, 1), (5, 1, 1), (8, 9, 2)):
        spacing = drawn.uniform(0.3, 3, 3)
        for density in (0.03, 0.4, 0.9):
            one, two = (drawn.random(shape) < density for _ in range(2))
            one.flat[0] = two.flat[-1] = True
            surfaces = []
            for mask in (one, two):
                found = []
                for voxel in np.argwhere(mask):
                    around = [voxel + sign * np.eye(3, dtype=int)[axis] for sign in (-1, 1) for axis in range(3)
                              if shape[axis] > 1]  # fmt: skip
                    if not all((n >= 0).all() and (n < shape).all() and mask[tuple(n)] for n in around):
                        found.append(voxel * spacing)
                surfaces.append(np.array(found))
            apart = np.linalg.norm(surfaces[0][:, None] - surfaces[1][None], axis=-1)
            expected = max(np.percentile(apart.min(1), 95), np.percentile(apart.min(0), 95))
            assert hd95(one, two, spacing) == pytest.approx(expected, rel=1e-6)


def test_hd95_of_empty_structures():
    empty, full = np.zeros((240, 240, 155), bool), np.zeros((240, 240, 155), bool)
    full[3, 4, 5] = True
    unit = (1.0, 1.0, 1.0)
    assert hd95(full, empty, unit) == hd95(empty, full, unit) == pytest.approx(373.13, abs=0.01)
    assert hd95(empty, empty, unit) == hd95(full, full, unit) == 0
    assert np.isnan([hd95(empty, other, unit, empty="skip") for other in (empty, full)]).all()
    assert hd95(full, empty, unit, empty="skip") > 373


def test_hd95_in_the_table_and_the_csv(tmp_path, capsys):
    """Cubes 3 voxels of 2 mm apart; the third class is missing in the prediction, and where both lack it scores 0."""
    truth = np.zeros((20, 8, 6), np.uint8)
    truth[2:5, 2:5, 2:5], truth[10:12, 4, 4] = 1, 2
    predicted = np.roll(np.where(truth == 1, 1, 0).astype(np.uint8), 3, axis=0)
    for name, values in (("truth", truth), ("predicted", predicted)):
        save(tmp_path / name / "a.nii.gz", values, np.diag([2, 1, 1.5, 1]))
    assert run("evaluate", tmp_path / "predicted", tmp_path / "truth", "--hd95", "--csv", tmp_path / "s.csv") == 0
    rows = {row["structure"]: row["hd95"] for row in csv.DictReader((tmp_path / "s.csv").open()) if row["case"] == "a"}
    diagonal = np.linalg.norm([40, 8, 9])
    assert [float(rows["label 1"]), float(rows["label 2"])] == pytest.approx([6, diagonal], abs=1e-5)
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("HD95", f"{diagonal:.3f}", "in millimetres"))
    assert run("evaluate", tmp_path / "predicted", tmp_path / "truth", "--csv", tmp_path / "t.csv") == 0
    assert "hd95" not in (tmp_path / "t.csv").read_text()


@pytest.mark.parametrize("truth", ["case_{}/segmentation.nii.gz", "case_{}_seg.nii.gz"])
def test_pictures_beside_predictions_and_images_beside_the_truth(tmp_path, capsys, truth):
    for number in range(2):
        labels = random_labels(number, values=(0, 1))
        save(tmp_path / "truth" / truth.format(number), labels)
        image = truth.format(number).replace("segmentation", "imaging").replace("_seg", "")
        save(tmp_path / "truth" / image, labels + 5)
        save(tmp_path / "predicted" / f"case_{number}.nii.gz", labels)
        picture(tmp_path / "predicted" / f"case_{number}.png", np.zeros((4, 4), np.uint8))
    assert run("evaluate", tmp_path / "predicted", tmp_path / "truth") == 0
    assert "Mean foreground Dice: 1.000" in capsys.readouterr().out
