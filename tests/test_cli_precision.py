"""Every command in every precision on a CPU, in one process after the other precisions."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest

from tests.cli_helpers import TINY, assert_user_error, run

PRECISIONS = ("fp32", "bf16", "fp16")


def labels(folder):
    return {path.name: np.asarray(nibabel.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))}


def test_segment_agrees_over_precisions(phantoms, checkpoint, tmp_path):
    found, data = {}, phantoms / "Phantom_000"
    for precision in (*PRECISIONS, "fp32"):
        out = tmp_path / f"{precision}-{len(found)}"
        assert run("segment", checkpoint, data, "--out", out, "--precision", precision, "--device", "cpu",
                   "--probabilities", "--overlay") == 0  # fmt: skip
        found[out.name] = labels(out)
    exact = found["fp32-0"]
    assert {name.split(".")[0] for name in exact} >= {"Phantom_000"}
    for results in found.values():
        assert results.keys() == exact.keys()
        for name, values in results.items():
            if np.issubdtype(values.dtype, np.integer):
                assert (values == exact[name]).mean() > 0.98, name


@pytest.mark.parametrize("precision, other", [("fp32", "bf16"), ("bf16", "fp16"), ("fp16", "fp32")])
def test_train_and_evaluate(precision, other, phantoms, tmp_path, capsys):
    assert run("train", phantoms, "--out", tmp_path / "run", "--epochs", 1, "--precision", precision, *TINY) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["precision"] == precision
    capsys.readouterr()
    assert run("evaluate", tmp_path / "run", phantoms, "--precision", other, "--device", "cpu") == 0
    assert "Mean foreground Dice" in capsys.readouterr().out


def test_tf32_needs_a_cuda_device(phantoms, checkpoint, tmp_path, capsys):
    code = run("segment", checkpoint, phantoms, "--out", tmp_path / "out", "--precision", "tf32", "--device", "cpu")
    assert_user_error(capsys, code, "tf32", "CUDA")
