"""Averages over mirrored slices: what ``--tta`` computes, whole, in tiles, with either kind of convolution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import fastunet
from fastunet.data import LABEL_MAPS
from fastunet.inference.segmenter import Segmenter
from fastunet.training.checkpoint import ModelCard, load_model
from tests.cli_helpers import TINY, assert_user_error, run

NETWORKS = {
    "same": (dict(), None, (32, 48)),
    "one pixel wide": (dict(), None, (20, 1)),
    "same in tiles": (dict(), 80, (40, 24)),
    "valid": (dict(padding="valid", up="transpose", dropout=0.0), None, (20, 27)),
    "valid in tiles": (dict(padding="valid", up="transpose", dropout=0.0), 60, (20, 27)),
}


@pytest.mark.parametrize("flips", [(-2,), (-2, -1)])
@pytest.mark.parametrize("options, tile, shape", NETWORKS.values(), ids=NETWORKS.keys())
def test_the_mean_of_mirrored_copies(options, tile, shape, flips):
    torch.manual_seed(0)
    model = fastunet.UNet(width=4, depth=2, **options).eval()
    card = ModelCard(model.config, ("flair", "t1ce"), LABEL_MAPS["brats2021"].to_dict(), flips=flips)
    plain, averaged = (Segmenter(model, card, torch.device("cpu"), 2, tile=tile, tta=tta) for tta in (False, True))
    images = np.random.default_rng(0).standard_normal((3, 2, *shape), dtype=np.float32)
    labels, maps = averaged.probabilities(images)
    copies = [subset for n in range(3) for subset in itertools.combinations(flips, n)]
    assert len(copies) == 2 ** len(flips)
    wanted = np.mean([np.flip(plain.probabilities(np.flip(images, c).copy())[1], c) for c in copies], 0)
    np.testing.assert_allclose(maps, wanted, atol=1e-6)
    assert np.abs(maps - plain.probabilities(images)[1]).max() > 1e-3
    np.testing.assert_array_equal(labels, maps.argmax(1))
    np.testing.assert_array_equal(averaged.predict(images), labels)
    for axis in flips:  # whatever the network, the result turns with the image
        mirrored = averaged.probabilities(np.flip(images, axis).copy())[1]
        np.testing.assert_allclose(np.flip(mirrored, axis), maps, atol=1e-6)


def test_only_mirror_images_that_training_saw(phantoms, checkpoint, tmp_path, capsys, monkeypatch):
    code = run("segment", checkpoint, phantoms, "--out", tmp_path / "out", "--tta", "--device", "cpu")
    assert_user_error(capsys, code, "--tta", "without mirrored slices")
    run_folder = tmp_path / "run"
    assert run("train", phantoms, "--out", run_folder, *TINY, "--epochs", 1) == 0
    code = run("segment", run_folder, phantoms, "--out", tmp_path / "out", "--tta", "--device", "cpu")
    assert_user_error(capsys, code, "--tta", "too short a run")
    # the first epoch leaves slices as they are, and the second one mirrors some
    monkeypatch.setattr("fastunet.training.dataset._PLAIN_SLICES", 20)
    assert run("train", phantoms, "--out", run_folder, "--resume", "--epochs", 2) == 0
    assert load_model(run_folder / "last.safetensors")[1].flips == (-2,)
    run_folder = run_folder / "last.safetensors"
    for command in (["segment", run_folder, phantoms, "--out", tmp_path / "out"], ["evaluate", run_folder, phantoms]):
        assert run(*command, "--tta", "--device", "cpu") == 0
