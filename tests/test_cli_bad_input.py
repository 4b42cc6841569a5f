"""Bad input gets one sentence that names it, exit code 2, and leaves no partial file."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.cli_helpers import CASE, TINY, assert_user_error, files_below, run, segment, write_checkpoint


def rewrite(path: Path, change) -> None:
    """Replaces the NIfTI file at ``path`` by ``change(voxels, affine)``."""
    image = nibabel.load(path)
    voxels, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_text(path: Path) -> None:
    path.write_text("not an image\n")


def make_text_in_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"not an image\n" * 100))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make, words", [
    (os.mkfifo, "is not a regular file"),
    (lambda path: path.write_bytes(b"PK\3\4" + bytes(99)), "is a ZIP archive: unpack it"),
    (lambda path: path.write_bytes(b"\x93NUMPY\1\0"), "is no NumPy file of numbers, or cut short"),
    (lambda path: np.save(path, np.full((4, 4), 1e300)), "holds NaN or infinity"),
])  # fmt: skip
def test_arrays_that_are_no_images(make, words, tmp_path, capsys):
    write_checkpoint(tmp_path / "grey.safetensors", modalities=("em",))
    make(tmp_path / "a.npy")
    assert_user_error(capsys, segment(tmp_path / "grey.safetensors", tmp_path / "a.npy", tmp_path / "out"), words)


@pytest.mark.parametrize("damage", [truncate, make_empty, make_text, make_text_in_gzip])
def test_damaged_volume(damage, data, checkpoint, tmp_path, capsys):
    name = f"{CASE}_flair.nii.gz"
    damage(data / CASE / name)
    code = segment(checkpoint, data / CASE, tmp_path / "out")
    assert_user_error(capsys, code, name)
    assert files_below(tmp_path / "out") == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_named_and_can_be_replaced(bad, data, checkpoint, tmp_path, capsys):
    def spoil(voxels, affine):
        voxels = voxels.astype(np.float32)
        voxels[5, 6, 7] = bad
        return voxels, affine

    rewrite(data / CASE / f"{CASE}_t1ce.nii.gz", spoil)
    code = segment(checkpoint, data / CASE, tmp_path / "out")
    assert_user_error(capsys, code, f"{CASE}_t1ce.nii.gz", "NaN", "--on-nan zero")
    assert files_below(tmp_path / "out") == []
    assert segment(checkpoint, data / CASE, tmp_path / "out", "--on-nan", "zero") == 0
    assert files_below(tmp_path / "out") == [f"{CASE}.nii.gz"]


def test_modalities_of_different_shapes(data, checkpoint, tmp_path, capsys):
    rewrite(data / CASE / f"{CASE}_t1ce.nii.gz", lambda voxels, affine: (voxels[:, :-1], affine))
    code = segment(checkpoint, data / CASE, tmp_path / "out")
    assert_user_error(capsys, code, f"{CASE}_t1ce.nii.gz", "(32, 31, 17)", "(32, 32, 17)")
    assert files_below(tmp_path / "out") == []


def test_modalities_of_different_affines(data, checkpoint, tmp_path, capsys):
    rewrite(data / CASE / f"{CASE}_t1ce.nii.gz", lambda voxels, affine: (voxels, affine + np.eye(4) * 0.5))
    code = segment(checkpoint, data / CASE, tmp_path / "out")
    assert_user_error(capsys, code, f"{CASE}_t1ce.nii.gz", "affine")
    assert files_below(tmp_path / "out") == []


def test_missing_modality(data, checkpoint, tmp_path, capsys):
    (data / CASE / f"{CASE}_t1ce.nii.gz").unlink()
    code = segment(checkpoint, data, tmp_path / "out")
    assert_user_error(capsys, code, CASE, "t1ce")
    assert not (tmp_path / "out").exists()


def test_label_outside_the_table(data, tmp_path, capsys):
    def spoil(voxels, affine):
        voxels[3, 4, 5] = 9
        return voxels, affine

    for folder in data.iterdir():
        rewrite(folder / f"{folder.name}_seg.nii.gz", spoil)
    code = run("train", data, "--out", tmp_path / "run", *TINY)
    assert_user_error(capsys, code, "_seg.nii.gz", "9", "brats2021")
    assert files_below(tmp_path / "run") == []


@pytest.mark.parametrize("command", ["segment", "train", "evaluate"])
def test_empty_folder(command, checkpoint, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    lines = {
        "segment": ["segment", checkpoint, empty, "--out", tmp_path / "out"],
        "train": ["train", empty, "--out", tmp_path / "out"],
        "evaluate": ["evaluate", checkpoint, empty, "--csv", tmp_path / "out" / "scores.csv"],
    }
    assert_user_error(capsys, run(*lines[command]), str(empty))
    assert files_below(tmp_path) == []


def test_checkpoint_of_another_architecture(data, checkpoint, tmp_path, capsys):
    from fastunet.training.checkpoint import load_model, save_weights

    other = tmp_path / "other.safetensors"
    save_weights(other, write_checkpoint(other, width=8), load_model(checkpoint)[1])
    code = segment(other, data, tmp_path / "out")
    assert_user_error(capsys, code, str(other), "another architecture", "(8, 2, 3, 3)", "(4, 2, 3, 3)")
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_another_program(data, tmp_path, capsys):
    import safetensors.torch
    import torch

    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, foreign)
    assert_user_error(capsys, segment(foreign, data, tmp_path / "out"), str(foreign), "not a fastunet checkpoint")


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_truncated_checkpoint(length, data, checkpoint, tmp_path, capsys):
    short = tmp_path / "short.safetensors"
    short.write_bytes((checkpoint / "best.safetensors").read_bytes()[:length])
    assert_user_error(capsys, segment(short, data, tmp_path / "out"), str(short), "not a whole safetensors file")
    assert not (tmp_path / "out").exists()


def test_folder_without_checkpoint(data, tmp_path, capsys):
    assert_user_error(capsys, segment(tmp_path, data, tmp_path / "out"), str(tmp_path), "no checkpoint")


def test_fewer_cases_than_the_split_needs(data, tmp_path, capsys):
    for folder in sorted(data.iterdir())[1:]:
        shutil.rmtree(folder)
    code = run("train", data, "--out", tmp_path / "run", *TINY)
    assert_user_error(capsys, code, "at least 2 patients", "there are 1")
    assert files_below(tmp_path / "run") == []


def test_size_that_does_not_fit_valid_convolutions(data, tmp_path, capsys):
    options = ["--preset", "isbi", "--width", "2", "--depth", "2", "--device", "cpu"]
    code = run("train", data, "--out", tmp_path / "run", *options, "--size", "50")
    assert_user_error(capsys, code, "50", "48", "52")
    code = run("train", data, "--out", tmp_path / "run", *options)
    assert_user_error(capsys, code, "32")
    assert not list((tmp_path / "run").glob("*.*"))


def test_tile_that_does_not_fit(data, tmp_path, capsys):
    model = tmp_path / "valid.safetensors"
    write_checkpoint(model, padding="valid", up="transpose")
    assert_user_error(capsys, segment(model, data, tmp_path / "out", "--tile", "50"), "50", "48 or 52")
    write_checkpoint(tmp_path / "same.safetensors")
    code = segment(tmp_path / "same.safetensors", data, tmp_path / "out", "--tile", "1000000")
    assert_user_error(capsys, code, "1 to 32768 pixels")
    code = segment(tmp_path / "same.safetensors", data, tmp_path / "out", "--tile", "32")
    assert_user_error(capsys, code, "32", "border")
    assert files_below(tmp_path / "out") == []


def test_slices_of_different_sizes_need_a_size(data, tmp_path, capsys):
    for path in (data / CASE).iterdir():
        rewrite(path, lambda voxels, affine: (voxels[:-2], affine))
    code = run("train", data, "--out", tmp_path / "run", *TINY)
    assert_user_error(capsys, code, "size", "30", "32")


@pytest.mark.parametrize(
    "line, words",
    [
        (["train", "X", "--out", "Y", "--epochs", "0"], ["--epochs", "0"]),
        (["train", "X", "--out", "Y", "--size", str(10**30)], ["--size", f"from 1 to {2**31}"]),
        (["summary", "--size", str(2**20)], [str(2**20), "1 to 65536 pixels"]),
        (["demo", "--threads", "1000000"], ["--threads is 1000000"]),
        (["check", "X", "--ignore-label", str(2**31)], ["--ignore-label", f"from {-(2**31)} to {2**31 - 1}"]),
        (["train", "X", "--out", "Y", "--learning-rate", "fast"], ["--learning-rate", "'fast'"]),
        (["train", "X", "--out", "Y", "--precision", "fp8"], ["--precision", "fp8"]),
        (["train", "X", "--out", "Y", "--val-fraction", "2"], ["--val-fraction", "2"]),
        (["segment", "X"], ["INPUT"]),
        (["fly"], ["fly"]),
        ([], ["COMMAND"]),
        (["summary", "--preset", "isbi", "--size", "500"], ["500", "492", "508"]),
        (["segment", "/nowhere.safetensors", "X", "--out", "Y"], ["/nowhere.safetensors"]),
        (["info", "--device", "cuda:99"], ["cuda:99"]),
        (["info", "--device", "toaster"], ["toaster"]),
    ],
)
def test_wrong_arguments(line, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_user_error(capsys, run(*line), *words)
    assert files_below(tmp_path) == []
