"""A run killed with SIGKILL at any moment and resumed ends with the bits of a run that was never interrupted."""

from __future__ import annotations

import csv
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch

from tests.cli_helpers import TINY, assert_user_error, run
from tests.processes import ended, start

TIMINGS = ("slices_per_second", "data_wait_share", "seconds")
OPTIONS = [*TINY, "--epochs", "3", "--dropout", "0.3", "--seed", "11", "--threads", "1", "--schedule", "cosine"]


def killed_at_rename(left: int, moment: str, line: list[str]) -> int:
    """Runs `fastunet` but kills itself, without any chance to clean up, right before or after a file is renamed."""
    replace = Path.replace

    def counted(self, target):
        nonlocal left
        left -= 1
        if left == 0 and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(self, target)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.replace = counted
    return run(*line)


@pytest.fixture(scope="module")
def uninterrupted(phantoms, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert ended(start(run, *arguments(phantoms, folder))) == 0
    return folder


def arguments(data: Path, folder: Path) -> list[str]:
    return ["train", str(data), "--out", str(folder), *OPTIONS]


def assert_same_run(folder: Path, expected: Path) -> None:
    for name in ("last.safetensors", "best.safetensors"):
        actual, wanted = ((f / name).read_bytes() for f in (folder, expected))
        assert actual == wanted, f"{name} differs: {differences(folder / name, expected / name)}"
    assert log_without_timings(folder) == log_without_timings(expected)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def differences(path: Path, expected: Path) -> dict[str, float]:
    actual, wanted = safetensors.torch.load_file(path), safetensors.torch.load_file(expected)
    return {k: (actual[k] - v).abs().max().item() for k, v in wanted.items() if not actual[k].equal(v)}


def log_without_timings(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


def test_killed_between_renames(phantoms, uninterrupted, tmp_path):
    """Each attempt gets one step further than the one before; the moments cover best, state, last and log."""
    folder = tmp_path / "run"
    line = [*arguments(phantoms, folder), "--checkpoint-every", "0", "--resume"]
    # The first 9 renames are the 8 cache files and the configuration.
    for count, moment in ((4, "before"), (11, "after"), (6, "before")):
        assert ended(start(killed_at_rename, count, moment, line)) == -signal.SIGKILL
    assert ended(start(run, *line)) == 0
    assert_same_run(folder, uninterrupted)


def test_killed_at_random_times(phantoms, uninterrupted, tmp_path):
    folder, draw = tmp_path / "run", random.Random(5)
    line = [*arguments(phantoms, folder), "--checkpoint-every", "0.05", "--resume"]
    state, kills = folder / "state.safetensors", 0
    for _ in range(2):
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = start(run, *line)
        while process.is_alive() and (not state.exists() or state.stat().st_mtime_ns == before):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        kills += ended(process) == -signal.SIGKILL
    assert kills >= 1
    assert ended(start(run, *line)) == 0
    assert_same_run(folder, uninterrupted)


def test_finished_run_is_completed_from_its_state(phantoms, uninterrupted, capsys):
    """Killed after the last state and before the other files: resuming writes them again and trains no further."""
    wanted = {name: (uninterrupted / name).read_bytes() for name in ("last.safetensors", "log.csv")}
    (uninterrupted / "last.safetensors").unlink()
    (uninterrupted / "log.csv").write_text("stale\n")
    assert run(*arguments(phantoms, uninterrupted), "--resume") == 0
    assert {name: (uninterrupted / name).read_bytes() for name in wanted} == wanted


def test_a_run_that_ended_in_its_first_state_begins_anew(phantoms, uninterrupted, tmp_path, capsys):
    """A full disk held the best weights and not the state; weights of later epochs without one are not replaced."""
    out = tmp_path / "run"
    for name in ("config.json", "best.safetensors", "log.csv"):
        out.mkdir(exist_ok=True)
        shutil.copy(uninterrupted / name, out)
    assert_user_error(capsys, run(*arguments(phantoms, out), "--resume"), "no state.safetensors")
    (out / "log.csv").unlink()
    (out / "best.safetensors").write_bytes(b"of a first epoch")
    assert run(*arguments(phantoms, out), "--resume") == 0
    for name in ("best.safetensors", "last.safetensors"):
        assert (out / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_weights_alone_are_not_resumed_over(phantoms, uninterrupted, tmp_path, capsys):
    shutil.copy(uninterrupted / "best.safetensors", tmp_path)
    line = arguments(phantoms, tmp_path)
    assert_user_error(capsys, run(*line), "holds a run already")
    assert_user_error(capsys, run(*line, "--resume"), "no state.safetensors")


def test_configuration_without_a_state_starts_from_the_beginning(phantoms, uninterrupted, tmp_path):
    shutil.copy(uninterrupted / "config.json", tmp_path)
    assert run("train", phantoms, "--out", tmp_path, "--resume") == 0
    assert_same_run(tmp_path, uninterrupted)


def test_resume_refuses_what_would_change_the_results(phantoms, uninterrupted, tmp_path, capsys):
    line = arguments(phantoms, uninterrupted)
    assert_user_error(capsys, run(*line), "--resume", str(uninterrupted))
    assert_user_error(capsys, run(*line, "--learning-rate", "0.5", "--resume"), "--learning-rate", "0.001", "0.5")
    assert_user_error(capsys, run(*line, "--epochs", "9", "--resume"), "--epochs", "3", "9")
    state = uninterrupted / "state.safetensors"
    whole = state.read_bytes()
    try:
        state.write_bytes(whole[: len(whole) // 2])
        assert_user_error(capsys, run(*line, "--resume"), str(state), "not a whole safetensors file")
    finally:
        state.write_bytes(whole)


def test_resume_refuses_other_data(uninterrupted, tmp_path, capsys):
    from fastunet.data import make_phantoms

    make_phantoms(tmp_path, 4, 99, shape=(32, 32, 17))
    code = run(*arguments(tmp_path, uninterrupted), "--resume")
    assert_user_error(capsys, code, "other data", str(tmp_path))


def test_state_holds_whole_optimiser_and_weights(uninterrupted):
    """The state alone suffices: it has the last weights and both moments of every parameter."""
    state = safetensors.torch.load_file(uninterrupted / "state.safetensors")
    weights = safetensors.torch.load_file(uninterrupted / "last.safetensors")
    for name, weight in weights.items():
        assert state[f"model.{name}"].equal(weight)
        assert state[f"optimizer.exp_avg.{name}"].abs().sum() > 0
        assert (state[f"optimizer.exp_avg_sq.{name}"] >= 0).all()
    steps = {float(v) for k, v in state.items() if k.startswith("optimizer.step.")}
    assert steps == {float(log_without_timings(uninterrupted)[-1]["step"])}
    assert os.path.getsize(uninterrupted / "last.safetensors") < os.path.getsize(uninterrupted / "state.safetensors")
