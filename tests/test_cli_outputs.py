"""No command writes over a file that it reads, and no result of a run over another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastunet
from fastunet.cli import demo
from fastunet.errors import UserError
from fastunet.outputs import check_outputs, name_for_file
from fastunet.training.checkpoint import ModelCard, save_weights
from tests.cli_helpers import CASE, TINY, assert_user_error, files_below, run
from tests.data_files import msd_folder


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_below(folder)}


def segment(model: Path, *rest: object) -> int:
    return run("segment", model, *rest, "--device", "cpu", "--overwrite", "--probabilities", "--overlay")


def network(path: Path, modalities=("flair",), names=("background", "core", "rim"), values=None) -> Path:
    """An untrained network whose classes are called ``names``."""
    torch.manual_seed(0)
    model = fastunet.UNet(len(modalities), len(names), width=2, depth=1)
    labels = {"edition": "e", "values": list(values or range(len(names))), "class_names": list(names), "regions": {}}
    save_weights(path, model, ModelCard(model.config, tuple(modalities), labels))
    return path


def direct(folder: Path, data: Path) -> list:
    return [data, "--out", data / "imagesTr"]


def dotted(folder: Path, data: Path) -> list:
    return [data, "--out", data / "labelsTr" / ".." / "imagesTr"]


def linked_folder(folder: Path, data: Path) -> list:
    (folder / "link").symlink_to(data / "imagesTr")
    return [data, "--out", folder / "link"]


def linked_input(folder: Path, data: Path) -> list:
    (folder / "name.nii.gz").symlink_to(data / "imagesTr" / "BRATS_001.nii.gz")
    (folder / "in").mkdir()
    (folder / "in" / "BRATS_001.nii.gz").symlink_to(folder / "name.nii.gz")
    return [folder / "in" / "BRATS_001.nii.gz", "--out", data / "imagesTr"]


def hard_link(folder: Path, data: Path) -> list:
    (folder / "out").mkdir()
    os.link(data / "imagesTr" / "BRATS_001.nii.gz", folder / "out" / "BRATS_001.nii.gz")
    return [data, "--out", folder / "out"]


def over_labels(folder: Path, data: Path) -> list:
    return [data, "--out", data / "labelsTr"]


def over_the_model(folder: Path, data: Path) -> list:
    """A probability map under the name of the model's file."""
    os.link(folder / "model.safetensors", folder / "BRATS_001_prob_core.nii.gz")
    return [data, "--out", folder]


@pytest.mark.parametrize(
    "how", [direct, dotted, linked_folder, linked_input, hard_link, over_labels, over_the_model]
)  # fmt: skip
def test_segment_never_replaces_its_inputs(how, tmp_path, capsys):
    data = msd_folder(tmp_path / "data")
    names = ("background", "core", "rim", "rest")
    model = network(tmp_path / "model.safetensors", ("flair", "t1", "t1ce", "t2"), names)
    line = how(tmp_path, data)
    before = content(tmp_path)
    if how is linked_input:  # a loose file is one modality
        model = network(tmp_path / "one.safetensors", ("flair",), names)
        before = content(tmp_path)
    assert_user_error(capsys, segment(model, *line), "is an input")
    assert content(tmp_path) == before


def test_evaluate_never_replaces_what_it_reads(phantoms, checkpoint, tmp_path, capsys):
    data, model = shutil.copytree(phantoms, tmp_path / "data"), shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "link.csv").symlink_to(data / CASE / f"{CASE}_seg.nii.gz")
    before = content(tmp_path)
    truth = data / CASE / f"{CASE}_seg.nii.gz"
    for line in (
        [model, data, "--csv", data / CASE / f"{CASE}_t2.nii.gz"],
        [model, data, "--csv", model / "best.safetensors"],
        [model, data, "--csv", tmp_path / "link.csv"],
        [truth, truth, "--labels", "brats2021", "--csv", truth],
    ):
        assert_user_error(capsys, run("evaluate", *line, "--device", "cpu"), "is an input")
        assert content(tmp_path) == before


def test_train_never_replaces_what_it_reads(phantoms, tmp_path, capsys):
    data = shutil.copytree(phantoms, tmp_path / "data")
    (tmp_path / "run").mkdir()
    os.link(data / CASE / f"{CASE}_seg.nii.gz", tmp_path / "run" / "log.csv")
    before = content(tmp_path)
    line = ["train", data, "--out", tmp_path / "run", *TINY, "--epochs", "1"]
    assert_user_error(capsys, run(*line), "is of no run, and would be replaced")
    assert content(tmp_path) == before


def test_summary_never_replaces_its_checkpoint(checkpoint, tmp_path, capsys):
    shutil.copy(checkpoint / "best.safetensors", tmp_path / "net.png")
    assert_user_error(capsys, run("summary", tmp_path / "net.png", "--out", tmp_path / "net"), "is an input")
    assert files_below(tmp_path) == ["net.png"]


def test_drawings_and_tables_are_not_replaced_unasked(phantoms, checkpoint, tmp_path, capsys):
    label = phantoms / CASE / f"{CASE}_seg.nii.gz"
    for name, line in (
        ("net.svg", ["summary", "--width", "2", "--depth", "1", "--out", tmp_path / "net"]),
        ("scores.csv", ["evaluate", label, label, "--labels", "brats2021", "--csv", tmp_path / "scores.csv"]),
    ):
        (tmp_path / name).write_text("mine")
        assert_user_error(capsys, run(*line), f"{name} exists; --overwrite replaces it")
        assert (tmp_path / name).read_text() == "mine"
        assert run(*line, "--overwrite") == 0
        assert (tmp_path / name).read_text() != "mine"


def test_a_drawing_called_like_a_folder(tmp_path, capsys):
    code = run("summary", "--width", 2, "--depth", 1, "--out", tmp_path)
    assert_user_error(capsys, code, f"--out {tmp_path} is a folder", str(tmp_path / "unet"))


def test_demo_removes_only_what_a_demo_made(tmp_path, capsys):
    (tmp_path / demo._MARKER).write_text("")
    (tmp_path / "thesis.txt").write_text("years of work")
    assert_user_error(capsys, run("demo", "--out", tmp_path), "thesis.txt")
    assert files_below(tmp_path) == [demo._MARKER, "thesis.txt"]
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "scans").mkdir(parents=True)
    (elsewhere / "scans" / "scan.nii.gz").write_text("patient")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / demo._MARKER).write_text("")
    (tmp_path / "demo" / "data").symlink_to(elsewhere / "scans")
    demo._fresh_folder(tmp_path / "demo")
    assert files_below(tmp_path / "demo") == [demo._MARKER]
    assert (elsewhere / "scans" / "scan.nii.gz").read_text() == "patient"


SAME_FILE = (("a b", "a_b"), ("x", "x"), ("é", "e\u0301"), ("a/b", "a:b"), ("Core", "core"), ("x" * 300, "y"))


@pytest.mark.parametrize("names", SAME_FILE)
def test_class_names_that_share_a_file_name(names, tmp_path, capsys):
    data = msd_folder(tmp_path / "data")
    model = network(tmp_path / "model.safetensors", ("flair", "t1", "t1ce", "t2"), ("background", *names))
    assert_user_error(capsys, segment(model, data, "--out", tmp_path / "out"), "_prob_")
    assert not (tmp_path / "out").exists()
    assert run("segment", model, data, "--out", tmp_path / "out", "--device", "cpu") == 0, "labels alone are no clash"


def test_case_called_like_the_probabilities_of_another(tmp_path, capsys):
    data = msd_folder(tmp_path / "data", names=("a", "a_prob_core"))
    model = network(tmp_path / "model.safetensors", ("flair", "t1", "t1ce", "t2"))
    assert_user_error(capsys, segment(model, data, "--out", tmp_path / "out"), "two results", "a_prob_core.nii.gz")
    assert not (tmp_path / "out").exists()


def test_images_and_their_overlays(tmp_path, capsys):
    model = network(tmp_path / "model.safetensors", ("em",))
    for name in ("x.png", "x_overlay.png"):
        Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / name)
    images = [tmp_path / "x.png", tmp_path / "x_overlay.png"]
    assert_user_error(capsys, segment(model, *images, "--out", tmp_path / "out"), "two results", "x_overlay.png")
    assert_user_error(capsys, segment(model, images[0], "--out", tmp_path), "x.png is an input")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["_prob_oedema.nii.gz", ".png"])
def test_maps_and_pictures_are_not_replaced_unasked(name, phantoms, checkpoint, tmp_path, capsys):
    precious = tmp_path / f"{CASE}{name}"
    precious.write_text("precious")
    outputs = ["--out", tmp_path, "--probabilities", "--overlay"]
    line = ["segment", checkpoint, phantoms / CASE, *outputs, "--device", "cpu"]
    assert_user_error(capsys, run(*line), precious.name, "--overwrite")
    assert content(tmp_path) == {precious.name: b"precious"}
    assert run(*line, "--overwrite") == 0
    assert precious.read_bytes() != b"precious"


def test_rules(tmp_path):
    (tmp_path / "a").write_text("")
    (tmp_path / "folder").mkdir()
    check_outputs([tmp_path / "b"], [tmp_path / "a", tmp_path / "missing"])
    check_outputs([tmp_path / "a"], [])
    for outputs, inputs, words in (
        ([tmp_path / "folder"], [], "is a folder"),
        ([tmp_path / "b", tmp_path / "folder" / ".." / "B"], [], "two results"),
        ([tmp_path / ("é" * 130)], [], "too long"),
        ([tmp_path / "folder" / ".." / "a"], [tmp_path / "a"], "under the name"),
    ):
        with pytest.raises(UserError, match=words):
            check_outputs(outputs, inputs)
    (tmp_path / "dangling").symlink_to("nothing")
    with pytest.raises(UserError, match="exists"):
        check_outputs([tmp_path / "dangling"], [], overwrite=False)
    assert name_for_file("a b/c\n\0é?") == "a_b_c__é_"


@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/null", "/proc/self/fd/1", "pipe"])
def test_results_take_the_place_of_no_device(place, tmp_path):
    """A file takes its name by a rename, which as root would have replaced /dev/stdout for every program."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no place for a file"):
        check_outputs([tmp_path / place], [])
