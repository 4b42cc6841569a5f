"""Two gloo processes with batches of 4 compute what one process computes with batches of 8."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

from fastunet.training import dataset
from tests.cli_helpers import run
from tests.processes import ended, environments, start_group


def augmented(*line) -> int:
    dataset._PLAIN_SLICES = 10
    return run(*line)


@pytest.mark.parametrize("more", [
    ["--loss", "dice_ce", "--class-weights", "0.2,1,2,1"],
    ["--loss", "dice", "--clip-norm", "0.1", "--ema", "0.9"],
], ids=["dice_ce", "dice"])  # fmt: skip
def test_two_processes_equal_one(more, phantoms, tmp_path, monkeypatch):
    # 17 validation slices in batches of 8 leave one process of the last step without any.
    options = ["--width", "4", "--depth", "2", "--epochs", "2", "--dropout", "0", "--device", "cpu", "--threads", "1",
               "--augment", *more]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr(dataset, "_PLAIN_SLICES", 10)  # so that the second epoch is augmented
    assert run("train", phantoms, "--out", one, *options, "--batch-size", "8") == 0
    line = ["train", phantoms, "--out", two, *options, "--batch-size", "4"]
    group = start_group(augmented, *line, told=tmp_path / "told")
    assert [ended(process) for process in group] == [0, 0], (tmp_path / "told0.err").read_text()[-2000:]
    told = [(tmp_path / f"told{rank}.out").read_text().split() for rank in range(2)]
    assert told == [[str(two)], []], "one process reports"
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
    subprocess.run([sys.executable, script, tmp_path], env=os.environ | environments()[0], timeout=120, check=True)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["during True after False"] * 2


THREADS = """
import os
import pathlib
import sys
import torch
from fastunet.training.distributed import process_group

def gloo():
    return any("gloo" in path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm"))

other = os.fork()  # in a process that has not imported what an optimiser does
os.environ["RANK"] = "0" if other else "1"
with process_group("cpu") as processes:
    weight = torch.nn.Parameter(torch.ones(1000))
    torch.optim.Adam([weight]).zero_grad()  # imports what remembers the group it finds
    processes.sum(weight.detach())
    during = gloo()
pathlib.Path(sys.argv[1], str(processes.rank)).write_text(f"during {during} after {gloo()}")
sys.exit(other and os.waitpid(other, 0)[1])
"""


def read_log(folder) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))
