"""2-D images end to end: trained in tiles, segmented whole, written in the values of their masks, scored."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fastunet.data import CaseSlices, LabelMap, discover_cases, read_labels, read_volume, write_labels
from fastunet.data.image_files import mask_suffix, save_image
from fastunet.data.labels import COLOUR
from fastunet.data.volumes import read_label_values
from fastunet.errors import UserError
from fastunet.inference.segmenter import Segmenter
from fastunet.training.checkpoint import load_model
from tests.cli_helpers import assert_user_error, files_below, run

SIZES = [(40, 52), (64, 33), (30, 30), (45, 60)]
TINY = ["--width", "2", "--depth", "2", "--epochs", "1", "--batch-size", "2", "--device", "cpu"]


def cells(rng: np.random.Generator, shape: tuple[int, int], values=(0, 255)) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image of two bright discs, and its mask."""
    rows, columns = np.indices(shape)
    mask = np.full(shape, values[0], np.uint8)
    for value in (values[1], values[-1]):
        row, column = rng.uniform(8, np.array(shape) - 8)
        mask[(rows - row) ** 2 + (columns - column) ** 2 < 36] = value
    return (mask.astype(float) / 2 + rng.uniform(0, 60, shape)).astype(np.uint8), mask


def image_folder(root: Path, mark="", values=(0, 255), sizes=SIZES) -> Path:
    rng = np.random.default_rng(3)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for index, shape in enumerate(sizes):
        image, mask = cells(rng, shape, values)
        Image.fromarray(image).save(root / "images" / f"cell_{index}.png")
        Image.fromarray(mask).save(root / "masks" / f"cell_{index}{mark}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    """A run of the isbi preset on images of four sizes."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert run("train", folder, "--out", out, "--preset", "isbi", *TINY) == 0
    return out


def test_the_network_is_trained_on_its_valid_convolutions(trained):
    model, card = load_model(trained)
    assert (model.architecture.padding, model.architecture.in_channels, card.images) == ("valid", 1, True)
    assert card.size == 72  # predicts the smallest image, 30 pixels wide, whole


def test_images_of_different_sizes_train_a_network_of_same_convolutions(folder, tmp_path, capsys):
    assert run("check", folder) == 0
    assert run("train", folder, "--out", tmp_path / "run", *TINY) == 0
    assert load_model(tmp_path / "run")[1].size == 28
    assert run("train", folder, "--out", tmp_path / "other", "--preset", "isbi", "--size", "70", *TINY) == 2
    assert "nearest sizes that fit, for height 70: 68 or 72" in capsys.readouterr().err


def test_a_run_on_tiles_resumes_in_the_same_bits(folder, tmp_path):
    line = ["train", folder, "--preset", "isbi", *TINY, "--border-weights", "--threads", "1"]
    assert run(*line, "--out", tmp_path / "whole", "--epochs", "2") == 0
    assert run(*line, "--out", tmp_path / "parts") == 0
    assert run("train", folder, "--out", tmp_path / "parts", "--resume", "--epochs", "2") == 0
    whole, parts = ((tmp_path / name / "last.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_masks_have_the_size_of_the_image_and_the_values_of_the_training(folder, trained, tmp_path):
    assert run("segment", trained, folder, "--out", tmp_path, "--overlay", "--probabilities", "--device", "cpu") == 0
    names = [f"cell_{index}{rest}" for index in range(4) for rest in
             (".png", "_overlay.png", "_prob_background.tif", "_prob_object.tif")]  # fmt: skip
    assert files_below(tmp_path) == sorted(names)
    for index, shape in enumerate(SIZES):
        mask = np.asarray(Image.open(tmp_path / f"cell_{index}.png"))
        maps = [tifffile.imread(tmp_path / f"cell_{index}_prob_{name}.tif") for name in ("background", "object")]
        assert mask.shape == shape
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 255}
        np.testing.assert_allclose(sum(maps), 1, atol=1e-6)
        decided = np.abs(maps[1] - maps[0]) > 1e-6
        np.testing.assert_array_equal(mask[decided] == 255, (maps[1] > maps[0])[decided])


@pytest.mark.parametrize("index", range(3))
def test_tiles_equal_one_pass_over_the_mirrored_image(folder, trained, index):
    """In float64, so that the order of sums leaves no doubt."""
    model, card = load_model(trained)
    case = discover_cases(folder)[index]
    image = torch.from_numpy(CaseSlices(case, card.modalities).read(0, 1)).double()
    height, width = image.shape[-2:]
    border = 20
    sides = [next(s for s in range(side + 2 * border, 200) if _fits(model, s)) for side in (height, width)]
    pads = [(0, 0), (0, 0), *((border, whole - side - border) for side, whole in zip((height, width), sides))]
    model = model.double()
    with torch.inference_mode():
        whole = model(torch.from_numpy(np.pad(image.numpy(), pads, mode="reflect")))[..., :height, :width].softmax(1)
    for tile in (None, 44, 60):
        segmenter = Segmenter(model, card, torch.device("cpu"), tile=tile)
        _, maps = segmenter.probabilities(image.numpy())
        assert np.abs(maps - whole.numpy()).max() < 1e-6  # the maps are float32


def _fits(model, side: int) -> bool:
    try:
        model.output_size(side, side)
    except ValueError:
        return False
    return True


def test_what_is_there_is_not_replaced(folder, trained, tmp_path, capsys):
    precious = tmp_path / "cell_1_overlay.png"
    precious.write_text("precious")
    line = ["segment", trained, folder / "images", "--device", "cpu", "--overlay"]
    assert_user_error(capsys, run(*line, "--out", tmp_path), "cell_1_overlay.png", "--overwrite")
    assert files_below(tmp_path) == ["cell_1_overlay.png"]
    assert_user_error(capsys, run(*line, "--out", folder / "images", "--overwrite"), "is an input")
    assert run(*line, "--out", tmp_path, "--overwrite") == 0
    assert len(files_below(tmp_path)) == 8  # a bare folder of images is segmented too


def test_scores_of_a_folder(trained, tmp_path, capsys):
    data = image_folder(tmp_path / "data", mark="_mask", sizes=SIZES[:2])
    assert run("segment", trained, data, "--out", tmp_path / "out", "--device", "cpu") == 0
    tables = []
    for subject, truth in ((trained, data), (tmp_path / "out", data), (tmp_path / "out", data / "masks")):
        assert run("evaluate", subject, truth, "--csv", tmp_path / "s.csv", "--overwrite", "--device", "cpu") == 0
        with open(tmp_path / "s.csv", newline="") as file:
            tables.append([(row["dice"], row["truth_voxels"], row["predicted_voxels"]) for row in csv.DictReader(file)])
    assert len(tables[0]) == 3
    assert tables[0] == tables[1] == tables[2]
    masks = [np.asarray(Image.open(data / "masks" / f"cell_{index}_mask.png")) for index in range(2)]
    assert [int(row[1]) for row in tables[0][:2]] == [(mask == 255).sum() for mask in masks]


def test_a_folder_whose_masks_lack_a_class_is_scored_by_the_classes_of_the_model(tmp_path, capsys):
    data = image_folder(tmp_path / "data", values=(0, 100, 200))
    assert run("train", data, "--out", tmp_path / "run", *TINY) == 0
    other = image_folder(tmp_path / "other", values=(0, 200), sizes=SIZES[:1])
    capsys.readouterr()
    assert run("evaluate", tmp_path / "run", other, "--device", "cpu") == 0
    assert "100    200" in capsys.readouterr().out
    foreign = image_folder(tmp_path / "foreign", values=(0, 7), sizes=SIZES[:1])
    assert_user_error(capsys, run("evaluate", tmp_path / "run", foreign, "--device", "cpu"), "the model knows")


def test_a_value_of_masks_that_counts_nowhere(tmp_path, capsys):
    data = image_folder(tmp_path / "data", values=(0, 100, 200))
    options = ["--ignore-label", "200"]
    assert run("check", data, *options) == 0
    assert re.search(r"^200 +\(ignored\)", capsys.readouterr().out, re.MULTILINE)
    assert run("train", data, "--out", tmp_path / "run", *TINY, *options) == 0
    assert run("evaluate", tmp_path / "run", data, "--csv", tmp_path / "s.csv", "--device", "cpu") == 0
    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    counts = [(np.asarray(Image.open(path)) == 100).sum() for path in sorted((data / "masks").iterdir())]
    assert [(row["structure"], int(row["truth_voxels"])) for row in rows[:4]] == [("100", count) for count in counts]
    assert_user_error(capsys, run("check", data, "--ignore-label", "0"), "cannot ignore 0")


def test_a_colour_of_masks_that_counts_nowhere(tmp_path, capsys):
    data = image_folder(tmp_path / "data", values=(0, 1, 2))
    for path in (data / "masks").iterdir():  # the border of PASCAL VOC's
        mask = Image.fromarray(np.asarray(Image.open(path)))
        mask.putpalette([0, 0, 0, 128, 0, 0, 224, 224, 192])
        mask.save(path)
    assert run("train", data, "--out", tmp_path / "run", *TINY, "--ignore-label", "#e0E0c0") == 0
    assert "0 background, #800000 #800000, #e0e0c0 ignored" in capsys.readouterr().err
    assert run("segment", tmp_path / "run", data, "--out", tmp_path / "found", "--device", "cpu") == 0
    for line in (["run", data, "--device", "cpu"], ["found", data, "--labels", tmp_path / "run"]):
        capsys.readouterr()
        assert run("evaluate", tmp_path / line[0], *line[1:]) == 0
        assert "#e0e0c0" not in capsys.readouterr().out


def test_the_stacks_of_the_isbi_challenge(tmp_path, capsys):
    rng = np.random.default_rng(1)
    pages = [cells(rng, (36, 36)) for _ in range(5)]
    volume, labels = (np.stack(part) for part in zip(*pages))
    (tmp_path / "data").mkdir()
    tifffile.imwrite(tmp_path / "data" / "train-volume.tif", volume, photometric="minisblack")
    tifffile.imwrite(tmp_path / "data" / "train-labels.tif", labels, photometric="minisblack")
    tifffile.imwrite(tmp_path / "data" / "test-volume.tif", volume[:3], photometric="minisblack")
    assert run("train", tmp_path / "data", "--out", tmp_path / "run", "--preset", "isbi", *TINY) == 0
    line = ["segment", tmp_path / "run", tmp_path / "data", "--overlay", "--probabilities", "--device", "cpu"]
    assert run(*line, "--out", tmp_path / "out") == 0
    assert files_below(tmp_path / "out") == sorted(
        f"{name}{rest}" for name in ("test", "train")
        for rest in (".tif", "_overlay.png", "_prob_background.tif", "_prob_object.tif")
    )  # fmt: skip
    found = tifffile.imread(tmp_path / "out" / "train.tif")
    assert (found.shape, found.dtype) == ((5, 36, 36), np.uint8)
    assert tifffile.imread(tmp_path / "out" / "test.tif").shape == (3, 36, 36)
    assert tifffile.imread(tmp_path / "out" / "test_prob_object.tif").shape == (3, 36, 36)
    capsys.readouterr()
    assert run("evaluate", tmp_path / "run", tmp_path / "data", "--device", "cpu") == 0
    dice = 2 * ((found > 0) & (labels > 0)).sum() / ((found > 0).sum() + (labels > 0).sum())
    assert f"{dice:.3f}" in capsys.readouterr().out


BLUE, RED = COLOUR + 255, COLOUR + (255 << 16)


@pytest.mark.parametrize(
    ("values", "suffix", "dtype", "shape"),
    [
        ((0, 255), ".png", np.uint8, (6, 5)),
        ((0, 65535), ".png", np.uint16, (6, 5)),
        ((0, BLUE, RED), ".png", np.uint8, (6, 5, 3)),
        ((7, 200, RED), ".png", np.uint8, (6, 5, 3)),
        ((-1, 3), ".tif", np.int16, (6, 5)),
        ((0, 70000), ".tif", np.int32, (6, 5)),
    ],
)
def test_masks_keep_their_values(tmp_path, values, suffix, dtype, shape):
    table = LabelMap("masks", values, tuple(map(str, values)))
    Image.fromarray(np.zeros((6, 5), np.uint8)).save(tmp_path / "a.png")
    like = read_volume(tmp_path / "a.png")
    classes = np.random.default_rng(0).integers(0, len(values), (6, 5, 1)).astype(np.uint8)
    path = tmp_path / f"b{suffix}"
    write_labels(path, classes, like, table)
    np.testing.assert_array_equal(read_labels(path, table), classes)
    stored = np.asarray(Image.open(path)) if suffix == ".png" else tifffile.imread(path)
    assert (stored.shape, stored.dtype) == (shape, dtype)
    if suffix == ".tif":
        with pytest.raises(UserError, match=r"c\.png: 1 pages of .* are written as \.tif"):
            write_labels(tmp_path / "c.png", classes, like, table)


def test_colour_stacks(tmp_path):
    table = LabelMap("masks", (0, BLUE, RED), ("background", "blue", "red"))
    classes = np.random.default_rng(0).integers(0, 3, (6, 5, 4)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 6, 5), np.uint8), photometric="minisblack")
    write_labels(tmp_path / "b.tif", classes, read_volume(tmp_path / "a.tif"), table)
    np.testing.assert_array_equal(read_labels(tmp_path / "b.tif", table), classes)
    for pages in (2, 3, 4):  # a stack is no picture of so many channels
        save_image(tmp_path / f"{pages}.tif", classes[..., :pages])
        np.testing.assert_array_equal(read_label_values(tmp_path / f"{pages}.tif"), classes[..., :pages])


def test_the_format_of_a_mask(folder):
    case = discover_cases(folder)[0]
    assert mask_suffix(case, LabelMap("masks", (0, 65535), ("a", "b"))) == ".png"
    assert mask_suffix(case, LabelMap("masks", (0, RED), ("a", "b"))) == ".png"
    assert mask_suffix(case, LabelMap("masks", (0, 65536), ("a", "b"))) == ".tif"


def test_colour_images_are_refused_by_a_network_of_grey_ones(folder, trained, tmp_path, capsys):
    colour = shutil.copytree(folder, tmp_path / "colour")
    for path in (colour / "images").iterdir():
        Image.open(path).convert("RGB").save(path)
    out, first = tmp_path / "out", str(colour / "images" / "cell_0.png")
    for source in (colour, colour / "images", colour / "images" / "cell_0.png"):
        assert_user_error(capsys, run("segment", trained, source, "--out", out, "--device", "cpu"), first, "grey")
    assert_user_error(capsys, run("evaluate", trained, colour, "--device", "cpu"), first, "grey")
    again = shutil.copytree(trained, tmp_path / "run")
    assert_user_error(capsys, run("train", colour, "--out", again, "--resume", "--epochs", "2"), first, "grey")
    Image.open(folder / "images" / "cell_0.png").save(first)
    code = run("segment", trained, colour, "--out", out, "--device", "cpu")
    said = capsys.readouterr().err
    assert code == 2
    assert f"grey and colour images, such as {colour / 'images' / 'cell_1.png'}" in said


def test_masks_beside_their_images_are_no_images(trained, tmp_path, recwarn):
    for name in ("a", "a_mask", "b_mask"):
        save_image(tmp_path / f"{name}.png", np.zeros((32, 32, 1), np.uint8))
    assert run("segment", trained, tmp_path, "--out", tmp_path / "out", "--device", "cpu") == 0
    assert files_below(tmp_path / "out") == ["a.png", "b_mask.png"]
