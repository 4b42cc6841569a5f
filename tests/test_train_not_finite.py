"""Training whose losses or images are not finite, or nearly so: it ends with a sentence, or in finite weights."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest

from fastunet.training import checkpoint, learner, loop
from tests.cli_helpers import TINY, assert_user_error, run
from tests.data_files import nnunet_folder

OPTIONS = [*TINY, "--epochs", "2", "--threads", "1", "--batch-size", "4"]
WEIGHTS = ("best.safetensors", "last.safetensors")


@pytest.mark.parametrize("rate, precision", [("1e6", "fp32"), ("1e30", "fp32"), ("1e6", "fp16")])
def test_a_loss_that_is_not_finite_ends_the_run(rate, precision, phantoms, tmp_path, capsys):
    line = ["train", phantoms, "--out", tmp_path, *OPTIONS, "--epochs", "40", "--learning-rate", rate]
    code = run(*line, "--precision", precision)
    assert_user_error(capsys, code, "epoch", "batch", "Phantom_00", "slice", "--learning-rate")
    for name in WEIGHTS:
        if (tmp_path / name).exists():
            checkpoint.load_model(tmp_path / name)


def test_the_last_good_weights_are_kept(phantoms, tmp_path, capsys, monkeypatch):
    line = ["train", phantoms, "--out", tmp_path, *OPTIONS]
    assert run(*line, "--epochs", "1") == 0
    capsys.readouterr()
    before = {name: (tmp_path / name).read_bytes() for name in (*WEIGHTS, "state.safetensors")}
    original = learner.build_model

    def spoilt(*args):
        model = original(*args)
        model.register_forward_hook(lambda module, inputs, logits: logits * float("nan"))
        return model

    monkeypatch.setattr(learner, "build_model", spoilt)
    code = run(*line, "--resume", "--epochs", "2")
    assert_user_error(capsys, code, "the loss is nan in epoch 2, batch 1", "the weights saved before are kept")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_the_scaler_gets_its_chance(phantoms, tmp_path, capsys, monkeypatch):
    """With fp16 a loss may be infinite as long as the scaler makes it finite within its steps."""
    original, calls = learner._loss, 0

    def spoilt(first_good: int):
        def build(*args):
            loss = original(*args)

            def forward(logits, labels):
                nonlocal calls
                calls += logits.requires_grad
                return loss(logits, labels) * (1.0 if calls > first_good or not logits.requires_grad else float("inf"))

            return forward

        return build

    line = ["train", phantoms, *OPTIONS, "--precision", "fp16", "--epochs", "1"]
    monkeypatch.setattr(learner, "_loss", spoilt(6))
    assert run(*line, "--out", tmp_path / "a") == 0
    monkeypatch.setattr(loop, "_MOST_SKIPPED_STEPS", 5)
    calls = 0
    code = run(*line, "--out", tmp_path / "b")
    assert_user_error(capsys, code, "skipped 6 steps in a row", "no weights were saved")


@pytest.mark.parametrize("name, change", [
    ("huge", lambda voxels: voxels.astype("f4") * 1e33),
    ("tiny", lambda voxels: voxels.astype("f4") * 1e-41),
    ("constant", lambda voxels: voxels * 0 + 7),
    ("both ends", lambda voxels: (voxels > voxels.mean()) * 6e38 - 3e38),
    ("zero", lambda voxels: voxels * 0),
])  # fmt: skip
def test_extreme_images_end_in_finite_weights(name, change, tmp_path, capsys):
    data = nnunet_folder(tmp_path / "data", ("a", "b", "c"), (12, 10, 4))
    for path in (data / "imagesTr").iterdir():
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.asarray(change(image.get_fdata()), np.float32), image.affine), path)
    assert run("train", data, "--out", tmp_path / "run", *OPTIONS) == 0, capsys.readouterr().err
    checkpoint.load_model(tmp_path / "run")  # refuses what is not finite
    assert run("segment", tmp_path / "run", data, "--out", tmp_path / "out", "--device", "cpu") == 0
