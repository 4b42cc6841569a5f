"""Every program of ``examples/`` runs as it stands, and does what it says."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import nibabel
import pytest
import safetensors.torch
import torch

import fastunet
from fastunet.data import discover_cases
from fastunet.interop import save_keras_weights
from fastunet.training.checkpoint import load_model
from tests.cli_helpers import write_checkpoint
from tests.processes import ended, start_group

EXAMPLES = Path(__file__).parents[1] / "examples"


def as_a_program(path: Path) -> None:
    runpy.run_path(str(path), run_name="__main__")


def falls(told: str) -> bool:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", told)]
    return len(losses) >= 2 and losses[-1] < 0.9 * losses[0]


def trains(run, folder, data, network):
    assert falls(run("train_on_your_nifti_folder", data, folder / "RUN", 41))
    model, card = load_model(folder / "RUN")
    assert card.modalities == ("flair", "t1ce")
    assert model.architecture.num_classes == len(card.class_names)


def segments(run, folder, data, network):
    run("segment_from_python", network, data, folder / "OUT")
    for case in discover_cases(data):
        paths = folder / "OUT" / f"{case.name}.nii.gz", case.modalities["flair"].path
        written, image = (nibabel.load(path) for path in paths)
        assert written.shape == image.shape
        assert (written.affine == image.affine).all()


def speeds_up(run, folder, data, network):
    told = run("speed_up_your_unet")
    assert re.search(r"yours [\d.]+ ms, fused [\d.]+ ms", told)


def ports_keras(run, folder, data, network):
    pytest.importorskip("h5py", reason="Keras files need h5py")
    model = fastunet.UNet(width=4, depth=1)
    save_keras_weights(model, folder / "w.weights.h5")
    run("port_a_keras_model", folder / "w.weights.h5", folder / "w.safetensors", 4, 1)
    ported = safetensors.torch.load_file(folder / "w.safetensors")
    assert all(torch.equal(ported[name], weight) for name, weight in model.state_dict().items())


def has_only_the_loss(run, folder, data, network):
    told = run("only_the_dice_loss")
    assert falls(told)
    assert all(float(score) > 0.5 for score in re.findall(r"'\w+': ([\d.]+)", told))


def uses_several_gpus(run, folder, data, network):
    group = start_group(as_a_program, EXAMPLES / "several_gpus.py", told=folder / "told")
    assert [ended(process) for process in group] == [0, 0], (folder / "told0.err").read_text()
    told = (folder / "told0.out").read_text()
    assert falls(told)
    assert "all processes hold the same weights: True" in told


def exports(run, folder, data, network):
    for module in ("onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason=f"{module} is not installed (pip install 'fastunet[rivals]')")
    write_checkpoint(folder / "best.safetensors", depth=1, odd="zeros", norm="instance")
    told = run("export_to_onnx", folder, folder / "network.onnx")
    assert float(re.search(r"([\d.]+)% of the labels", told)[1]) > 99


CHECKS = {
    "train_on_your_nifti_folder": trains,
    "segment_from_python": segments,
    "speed_up_your_unet": speeds_up,
    "port_a_keras_model": ports_keras,
    "only_the_dice_loss": has_only_the_loss,
    "several_gpus": uses_several_gpus,
    "export_to_onnx": exports,
}


@pytest.mark.parametrize("example", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(example, tmp_path, phantoms, checkpoint, monkeypatch, capsys):
    assert len((EXAMPLES / f"{example}.py").read_text().splitlines()) <= 60

    def run(name, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        as_a_program(EXAMPLES / f"{name}.py")
        return capsys.readouterr().out

    torch.manual_seed(0)
    CHECKS[example](run, tmp_path, phantoms, checkpoint)
