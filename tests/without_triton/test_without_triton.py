"""What must work where Triton is not installed: everything but its kernels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

import fastunet
from fastunet import functional, losses
from fastunet.dispatch import why_not_triton
from tests.cli_helpers import run
from tests.data_files import msd_folder
from tests.faults.trials import TINY

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is not None,
                                reason="Triton is installed: PYTHONPATH=tests/without_triton hides it")  # fmt: skip


def test_a_network_trains_and_predicts():
    torch.manual_seed(0)
    model = fastunet.UNet(width=2, depth=1, dropout=0.0)
    images, labels = torch.randn(2, 2, 9, 7), torch.randint(0, 4, (2, 9, 7))
    loss, optimizer = losses.DiceCrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=1e-2)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        values.append(loss(model(images), labels))
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.9 * values[0]
    frozen = model.eval().freeze()
    assert (frozen.predict(images) == model(images).argmax(1)).float().mean() > 0.98
    plain = fastunet.reference.UNet(width=2, depth=1, dropout=0.0)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images), plain(images))


def test_its_kernels_are_refused_by_name():
    assert why_not_triton(torch.device("cuda", 0), torch.float32) == "Triton is not installed"
    with pytest.raises(ValueError, match="conv_relu: backend 'triton' cannot run here: Triton is not installed"):
        functional.conv_relu(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3), backend="triton")


def test_every_command(tmp_path, capsys):
    data = msd_folder(tmp_path / "data", ("a", "b", "c"), (24, 20, 8))
    assert run("info") == 0
    assert "Triton is not installed" in capsys.readouterr().out
    assert run("train", data, "--out", tmp_path / "run", *TINY, "--epochs", "1") == 0
    assert run("segment", tmp_path / "run", data, "--out", tmp_path / "labels", "--device", "cpu") == 0
    assert run("evaluate", tmp_path / "run", data, "--csv", tmp_path / "scores.csv", "--device", "cpu") == 0
    assert len(list((tmp_path / "labels").glob("*.nii.gz"))) == 3


def test_children_lack_it_too():
    """So that what this folder proves holds for processes that a command starts."""
    done = subprocess.run([sys.executable, "-c", "import triton"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "No module named 'triton'" in done.stderr or "import of triton halted" in done.stderr
