"""What the tests of the command line share: small phantoms, an untrained checkpoint, and a runner of ``main``."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch

import fastunet
from fastunet.cli import main
from fastunet.data import LABEL_MAPS, LabelMap
from fastunet.files import write_bytes
from fastunet.training import loop
from fastunet.training.checkpoint import ModelCard, save_weights
from fastunet.training.results import CURVES, write_curves

SHAPE = (32, 32, 17)
CASE = "Phantom_000"
TINY = ["--width", "4", "--depth", "2", "--batch-size", "8", "--device", "cpu"]


def write_checkpoint(path: Path, *, modalities=("flair", "t1ce"), **network) -> torch.nn.Module:
    """Writes a random network with labels of BraTS 2021 and returns it; its biases leave no two classes equal."""
    torch.manual_seed(7)
    model = fastunet.UNet(**{"in_channels": len(modalities), "width": 4, "depth": 2, **network}).eval()
    torch.nn.init.uniform_(model.head.bias, -0.1, 0.1)
    card = ModelCard(model.config, tuple(modalities), LABEL_MAPS["brats2021"].to_dict())
    save_weights(path, model, card)
    return model


_drawn: dict[tuple, bytes] = {}


def run(*args: object) -> int:
    """The exit code of ``fastunet`` with these arguments, in this process; one picture of curves for all like runs."""
    with mock.patch.object(loop, "write_curves", _write_curves):
        return main([str(arg) for arg in args])


def _write_curves(folder: Path, history: Sequence[dict], labels: LabelMap) -> None:
    """As its own, which takes as long as a test's training."""
    kind = tuple(history[0] if history else ()), repr(labels)
    if kind not in _drawn:
        write_curves(folder, history, labels)
        _drawn[kind] = (folder / CURVES).read_bytes()
    write_bytes(folder / CURVES, _drawn[kind])


def assert_user_error(capsys, code: int, *words: str) -> None:
    """Exit code 2, and on stderr one last line that starts with "fastunet: " and holds all ``words``."""
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("fastunet: ")
    assert error.count("fastunet: ") == 1
    for word in words:
        assert word in last, f"{word!r} is not in {last!r}"


def files_below(folder: Path) -> list[str]:
    """Every file below ``folder``, hidden ones too, as sorted relative paths."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read_log(folder: Path) -> list[dict[str, str]]:
    """The rows of a run folder's log."""
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def command(*args: object, module: str = "fastunet", **environment: str) -> subprocess.CompletedProcess:
    """Runs ``python -m fastunet`` in a process of its own, on one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    line = [sys.executable, "-m", module, *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, env=env, timeout=240, check=False)


def segment(model: Path, source: Path, out: Path, *options: object) -> int:
    return run("segment", model, source, "--out", out, "--device", "cpu", *options)
