"""Slices of other pixel sizes: what resampling computes, and that results come back to the grid of the files."""

from __future__ import annotations

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastunet.data import CaseSlices, SliceDataset, cases_from_files, discover_cases
from fastunet.data.resampling import resample, resample_labels, resampled_shape
from fastunet.data.slices import slice_spacing
from fastunet.errors import UserError
from fastunet.inference.segmenter import Segmenter, write_case
from fastunet.training.checkpoint import ModelCard, load_model
from tests.cli_helpers import TINY, assert_user_error, run
from tests.data_files import ORIENTATIONS, nnunet_folder, oriented_affine, save


@pytest.mark.parametrize("codes", ORIENTATIONS[::5])
def test_spacing_is_that_of_the_axes_of_the_slices(codes):
    affine = oriented_affine(codes, spacing=(1.0, 2.0, 3.0))
    along = {"LRPAIS".index(code) // 2: size for code, size in zip(codes, (1.0, 2.0, 3.0))}
    for axis in range(3):
        assert slice_spacing(affine, axis) == tuple(along[world] for world in range(3) if world != axis)


def test_the_field_of_view_stays():
    assert resampled_shape((100, 80), (1.0, 2.0), (2.0, 2.0)) == (50, 80)
    assert resampled_shape((3, 80), (0.1, 2.0), (2.0, 1.0)) == (1, 160)
    assert resampled_shape((100, 80), (1.0, 2.0), None) == (100, 80)
    for size in (1e-5, 1e30):
        with pytest.raises(UserError, match=f"{size:g} x {size:g} mm".replace("+", r"\+")):
            resampled_shape((100, 80), (1.0, 2.0), (size, size))


def test_images_are_interpolated_and_labels_are_not():
    rows, columns = np.mgrid[:40, :60].astype(np.float32)
    ramp = (2 * rows - columns)[None, None]
    found = resample(ramp, (80, 45))
    i, j = np.mgrid[:80, :45]
    expected = 2 * ((i + 0.5) / 2 - 0.5) - ((j + 0.5) * 60 / 45 - 0.5)
    np.testing.assert_allclose(found[0, 0, 2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-4)
    labels = np.random.default_rng(0).integers(0, 255, (3, 17, 23), dtype=np.uint8)
    for shape in ((17, 23), (40, 11), (5, 60)):
        wanted = F.interpolate(torch.from_numpy(labels)[None], shape, mode="nearest-exact")[0].numpy()
        np.testing.assert_array_equal(resample_labels(labels, shape), wanted)


def ball(folder, name: str, spacing: tuple[float, float, float], codes: str = "LPS") -> None:
    """A head of 96 x 96 x 12 mm, and two balls in it, in voxels of ``spacing`` along ``codes``."""
    sides = [12 if code in "IS" else 96 for code in codes]
    centres = [(np.arange(round(side / size)) + 0.5) * size - side / 2 for size, side in zip(spacing, sides)]
    axes = np.meshgrid(*centres, indexing="ij")
    radius = np.sqrt(sum(a**2 for a, side in zip(axes, sides) if side == 96))
    image = np.where(radius < 44, 300 + 20 * (28 - radius), 0).astype(np.float32)
    affine = oriented_affine(codes, spacing)
    for channel in range(2):
        save(folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz", image, affine)
    save(folder / "labelsTr" / f"{name}.nii.gz", ((radius < 28) + 1 * (radius < 22)).astype(np.uint8), affine)


CASES = {"a": ((1.0, 1.5, 3.0), "LPS"), "b": ((2.0, 1.0, 3.0), "RAS"), "c": ((1.5, 1.5, 3.0), "LPS"),
         "d": ((3.0, 1.2, 1.2), "SAR")}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four cases of three slices, each with its own pixel size, one along other axes; the median is 1.35 x 1.35."""
    root = nnunet_folder(tmp_path_factory.mktemp("spacing"), ())
    for name, (spacing, codes) in CASES.items():
        ball(root, name, spacing, codes)
    return root


def test_one_object_in_other_pixels_gives_the_same_slices(folder, tmp_path):
    cases = {case.name: case for case in discover_cases(folder)}
    slices = {name: CaseSlices(case, ("t1ce", "flair"), spacing=(1.5, 1.5)) for name, case in cases.items()}
    assert {each.grid for each in slices.values()} == {(64, 64)}
    wanted = CaseSlices(cases["c"], ("t1ce", "flair")).read(0, 4)
    np.testing.assert_array_equal(slices["c"].read(0, 4), wanted)
    inside = np.hypot(*np.mgrid[-31.5:32, -31.5:32]) * 1.5 < 40
    for each in slices.values():
        np.testing.assert_allclose(each.read(0, 4)[..., inside], wanted[..., inside], atol=0.06)
    data = SliceDataset(cases.values(), cache_dir=tmp_path, modalities=("t1ce", "flair"), spacing=(1.5, 1.5))
    assert data.size == (64, 64)
    truth = {name: data.load([4 * index])[1][0] for index, name in enumerate(cases)}
    for index, name in enumerate(cases):
        np.testing.assert_array_equal(data.load([4 * index])[0][0], slices[name].read(0, 1)[0])
        assert (truth[name] != truth["c"]).float().mean() < 0.03
        assert truth[name].unique().tolist() == [0, 1, 2]


class Thresholds(torch.nn.Module):
    """Three classes by intensity, with the interface of a network."""

    def __init__(self):
        super().__init__()
        self.architecture = dataclasses.make_dataclass("Same", ["padding"])("same")

    def forward(self, x):
        return torch.stack([0 * x[:, 0], 20 * (x[:, 0] - self.cuts[0]), 20 * (2 * x[:, 0] - sum(self.cuts))], 1)

    def predict(self, x):
        return self(x).argmax(1).to(torch.uint8)


def test_results_lie_on_the_grid_of_the_files(folder, tmp_path):
    """A threshold at 2 mm finds the ball in every file's own pixels; probabilities and labels agree."""
    model = Thresholds()
    for case in discover_cases(folder):
        card = ModelCard({}, ("t1ce", "flair"), case.label_map.to_dict(), spacing=(2.0, 2.0))
        segmenter = Segmenter(model, card, torch.device("cpu"), batch_size=3)
        slices = segmenter.open(case)
        mean, deviation = slices._statistics[0]
        model.cuts = [(300 + 20 * (28 - radius) - mean) / deviation for radius in (28, 22)]
        plain, target = tmp_path / "plain.nii.gz", tmp_path / f"{case.name}.nii.gz"
        labels = write_case(segmenter, slices, plain, probabilities=False)
        again = write_case(segmenter, slices, target, probabilities=True)
        np.testing.assert_array_equal(labels, again)
        source, written = nib.load(case.label), nib.load(target)
        assert written.shape == source.shape
        np.testing.assert_array_equal(written.affine, source.affine)
        truth, found = np.asarray(source.dataobj), np.asarray(written.dataobj)
        for region in (1, 2):
            one, two = truth >= region, found >= region
            assert 2 * (one & two).sum() > 0.97 * (one.sum() + two.sum())
        names = segmenter.card.class_names
        maps = np.stack([nib.load(tmp_path / f"{case.name}_prob_{name}.nii.gz").get_fdata() for name in names])
        np.testing.assert_allclose(maps.sum(0), 1, atol=1e-5)
        np.testing.assert_array_equal(maps.argmax(0), again)
        with pytest.raises(ValueError, match="restore them"):
            slices.place(slices.new_volume(np.uint8), 0, np.zeros((1, *slices.grid), np.uint8))


def test_train_and_segment_by_the_median(folder, tmp_path, capsys):
    line = ["train", folder, "--epochs", 1, "--val-fraction", 0.5, *TINY, "--batch-size", 4]
    assert run(*line, "--out", tmp_path / "run", "--spacing", "median") == 0
    assert "resampled to pixels of 1.35 × 1.35 mm" in capsys.readouterr().err
    _, card = load_model(tmp_path / "run")
    assert card.spacing == pytest.approx((1.35, 1.35))
    assert run("segment", tmp_path / "run", folder, "--out", tmp_path / "out", "--overlay", "--device", "cpu") == 0
    for name in CASES:
        source, written = (
            nib.load(folder / "labelsTr" / f"{name}.nii.gz"),
            nib.load(tmp_path / "out" / f"{name}.nii.gz"),
        )
        assert written.shape == source.shape
        np.testing.assert_array_equal(written.affine, source.affine)
    assert run("evaluate", tmp_path / "run", folder, "--device", "cpu") == 0
    capsys.readouterr()
    code = run(*line, "--out", tmp_path / "as-they-are")
    assert_user_error(capsys, code, "sizes", "--size")
    assert run(*line, "--out", tmp_path / "cropped", "--size", 48) == 0
    said = [text for text in capsys.readouterr().err.splitlines() if "--spacing median" in text]
    assert said == ["pixels of slices are from 1 × 1 to 2 × 1.5 mm: --spacing median would resample all to one size"]
    assert load_model(tmp_path / "cropped")[1].spacing is None


def test_images_have_no_spacing(tmp_path, capsys):
    from PIL import Image

    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        for name in "ab":
            Image.fromarray(np.tile(np.uint8([0, 255]), (16, 8))).save(tmp_path / part / f"{name}.png")
    code = run("train", tmp_path, "--out", tmp_path / "run", "--spacing", "median", *TINY, "--val-fraction", 0.5)
    assert_user_error(capsys, code, "--spacing is for volumes")


def test_loose_files_without_resampling_stay_as_they_are(folder):
    case = cases_from_files([folder / "imagesTr" / "a_0000.nii.gz"], ("image",))[0]
    slices = CaseSlices(case, ("image",))
    assert slices.grid == slices.slice_shape == (96, 64)
