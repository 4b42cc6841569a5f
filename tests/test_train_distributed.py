"""Two gloo processes with batches of 4 compute what one process computes with batches of 8."""

from __future__ import annotations

import pytest
import safetensors.torch

from fastunet.training import dataset
from tests.cli_helpers import TINY, read_log, run
from tests.processes import ended, start_group


def augmented(*line) -> int:
    dataset._PLAIN_SLICES = 10
    return run(*line)


@pytest.mark.parametrize("options, words", [
    (["--epochs", "x"], "'x' is not a whole number"),
    (["--warm-up", "30"], "30 epochs of 20"),
    (["--device", "cuda:99"], "device 'cuda:99' is not available"),
    (["--modalities", "foo"], "case Phantom_000 has no foo"),
    (["--edition", "brats2021", "--class-weights", "1,2"], "4 outputs need one each"),
])  # fmt: skip
def test_bad_input_is_told_once(options, words, phantoms, tmp_path):
    group = start_group(run, "train", phantoms, "--out", tmp_path / "run", *TINY, *options, told=tmp_path / "told")
    assert [ended(process) for process in group] == [2, 2]
    told = "".join((tmp_path / f"told{rank}.err").read_text() for rank in range(2))
    assert told.count("fastunet: ") == told.count(words) == 1, told


def test_two_processes_equal_one(phantoms, tmp_path, monkeypatch):
    # 17 validation slices in batches of 8 leave one process of the last step without any.
    options = ["--width", "4", "--depth", "2", "--epochs", "2", "--dropout", "0", "--device", "cpu", "--threads", "1",
               "--augment", "--class-weights", "0.2,1,2,1", "--clip-norm", "0.1", "--ema", "0.9"]  # fmt: skip
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
