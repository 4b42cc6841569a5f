"""Two gloo processes with batches of 4 compute what one process computes with batches of 8."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

from fastunet.training import dataset
from tests.cli_helpers import phantoms, run  # noqa: F401


@pytest.mark.parametrize("more", [
    ["--loss", "dice_ce", "--class-weights", "0.2,1,2,1"],
    ["--loss", "dice", "--clip-norm", "0.1", "--ema", "0.9"],
], ids=["dice_ce", "dice"])  # fmt: skip
def test_two_processes_equal_one(more, phantoms, tmp_path, monkeypatch):  # noqa: F811
    # 17 validation slices in batches of 8 leave one process of the last step without any.
    options = ["--width", "4", "--depth", "2", "--epochs", "2", "--dropout", "0", "--device", "cpu", "--threads", "1",
               "--augment", *more]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr(dataset, "_PLAIN_SLICES", 10)  # so that the second epoch is augmented
    (tmp_path / "script.py").write_text(AUGMENTED)
    assert run("train", phantoms, "--out", one, *options, "--batch-size", "8") == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line = [*torchrun, tmp_path / "script.py", "train", phantoms, "--out", two, *options, "--batch-size", "4"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(two)], "one process reports"
    expected, actual = read_log(one), read_log(two)
    assert len(expected) == len(actual) == 2
    for row, other in zip(expected, actual, strict=True):
        for column in ("train_loss", "val_loss", "accuracy", "dice_foreground"):
            assert abs(float(row[column]) - float(other[column])) <= 1e-5, column
        assert row["step"] == other["step"]
    weights, others = (safetensors.torch.load_file(f / "last.safetensors") for f in (one, two))
    for name, weight in weights.items():
        assert (weight - others[name]).abs().max() <= 1e-4, name
    learned = float(expected[0]["train_loss"]) - float(expected[1]["train_loss"])
    assert learned > 0.01, "only a network that changes shows whether the gradients agree"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists a process's threads there")
def test_the_group_and_its_threads_end_together(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(THREADS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, script, tmp_path], capture_output=True, timeout=120, check=True)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["during True after False"] * 2


AUGMENTED = """
import sys
from fastunet.cli import main
from fastunet.training import dataset
dataset._PLAIN_SLICES = 10
sys.exit(main())
"""

THREADS = """
import pathlib
import sys
import torch
from fastunet.training.distributed import process_group

def gloo():
    return any("gloo" in path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm"))

with process_group("cpu") as processes:
    weight = torch.nn.Parameter(torch.ones(1000))
    torch.optim.Adam([weight]).zero_grad()  # imports what remembers the group it finds
    processes.sum(weight.detach())
    during = gloo()
pathlib.Path(sys.argv[1], str(processes.rank)).write_text(f"during {during} after {gloo()}")
"""


def read_log(folder) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))
