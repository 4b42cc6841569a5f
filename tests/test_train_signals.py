"""SIGINT, SIGTERM and SIGHUP, and two processes in one folder."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import run as torchrun

from fastunet import signals
from fastunet.signals import Interrupted
from fastunet.training import learner, tensor_file
from tests.cli_helpers import TINY, assert_user_error, files_below, run
from tests.processes import ended, start, start_group, wait_for

OPTIONS = [*TINY, "--epochs", "2", "--dropout", "0.3", "--seed", "11", "--threads", "1", "--batch-size", "4"]
ENDLESS = [*OPTIONS, "--epochs", "400", "--checkpoint-every", "0.2"]
WEIGHTS = ("best.safetensors", "last.safetensors")


@pytest.fixture(autouse=True, scope="module")
def heed_interrupts():
    """A shell starts its background jobs with SIGINT ignored, nohup with SIGHUP, and so the tests of such a job."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def uninterrupted(phantoms, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run("train", phantoms, "--out", folder, *OPTIONS) == 0
    return folder


def stop_at(monkeypatch, place: str, count: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal in the ``count``-th call of ``Learner``'s loss, in training or in validation."""
    original, calls = learner._loss, 0

    def signalling(*args):
        loss = original(*args)

        def forward(logits, labels):
            nonlocal calls
            calls += logits.requires_grad == (place == "training")
            if calls == count:
                calls += 1
                os.kill(os.getpid(), number)
            return loss(logits, labels)

        return forward

    monkeypatch.setattr(learner, "_loss", signalling)


@pytest.mark.parametrize("place, count, number", [
    ("training", 1, signal.SIGTERM), ("training", 5, signal.SIGINT), ("training", 12, signal.SIGHUP),
    ("validation", 2, signal.SIGTERM),
])  # fmt: skip
def test_a_signal_saves_the_state(place, count, number, phantoms, uninterrupted, tmp_path, capsys, monkeypatch):
    line = ["train", phantoms, "--out", tmp_path / "run", *OPTIONS]
    with monkeypatch.context() as patch:
        stop_at(patch, place, count, number)
        assert run(*line) == 128 + number
    error = capsys.readouterr().err.splitlines()[-1]
    go_on = f"fastunet train {phantoms} --out {tmp_path / 'run'} --resume"
    assert error == f"fastunet: stopped by {signal.Signals(number).name}; the state is saved, go on with: {go_on}"
    assert not [name for name in files_below(tmp_path) if ".writing" in name or ".lock" in name]
    assert run(*go_on.split()[1:]) == 0
    assert f"batch {count + 1}" in capsys.readouterr().err or place == "validation" or count == 12
    for name in WEIGHTS:
        assert (tmp_path / "run" / name).read_bytes() == (uninterrupted / name).read_bytes(), name


def test_a_signal_before_the_first_step_ends_at_once(phantoms, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastunet.training.run.prepare_data", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    assert run("train", phantoms, "--out", tmp_path / "run", *OPTIONS) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert files_below(tmp_path) == []


def test_a_second_signal_after_a_while_is_not_put_off(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with signals.handled(), signals.deferred() as requested:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested() == signal.SIGTERM
        clock[0] = 60.0
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted), signals.handled(), signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_during_an_import_waits_for_its_end(monkeypatch, tmp_path):
    """An exception in the start of a compiled module, as Triton's, would abort the process."""
    module = "import os, signal, sys; os.kill(os.getpid(), signal.SIGTERM); sys.set_whole = all([True] * 1000)"
    (tmp_path / "interrupted_import.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "set_whole", False, raising=False)
    with signals.handled():
        import interrupted_import  # noqa: F401

        assert sys.set_whole
        with pytest.raises(Interrupted) as stopped:
            time.sleep(30)
    assert stopped.value.number == signal.SIGTERM


def test_a_script_that_an_import_runs_is_interrupted(monkeypatch, tmp_path):
    (tmp_path / "imported_script.py").write_text(
        "import os, signal, time\nfrom fastunet import signals\nwith signals.handled():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(30)\n")  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Interrupted):
        import imported_script  # noqa: F401


def test_ignored_signals_stay_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.handled():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("who", ["one of them", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_stop_at_one_step(who, phantoms, tmp_path):
    line = ["train", phantoms, "--out", tmp_path / "run", *ENDLESS]
    if who == "torchrun":
        given = ["--standalone", "--nproc-per-node=2", "--no-python", sys.executable, "-c", WORKER, tmp_path, *line]
        processes = [start(torchrun.main, [str(argument) for argument in given])]
    else:
        processes = start_group(told, tmp_path, *line)
    wait_for(tmp_path / "run" / "state.safetensors")
    os.kill(processes[-1].pid, signal.SIGTERM)
    for process in processes:
        ended(process)
    codes, errors = ([(tmp_path / f"{name}{rank}").read_text() for rank in range(2)] for name in ("code", "error"))
    assert codes == ["143", "143"]
    assert "".join(errors).count("fastunet: stopped by SIGTERM; the state is saved") == 1, errors
    assert "Traceback" not in "".join(errors)
    state = tensor_file.read_tensors(tmp_path / "run" / "state.safetensors")[1]["fastunet_state"]
    assert '"batch": ' in state
    if who == "torchrun" and GLOO.exists():
        assert [(tmp_path / f"gloo{rank}").read_text() for rank in range(2)] == ["during True after False"] * 2


def told(folder: Path, *line: object) -> int:
    """Runs ``fastunet`` as a process of a group, which leaves its exit code and what it complains of in ``folder``."""
    with open(folder / f"error{os.environ['RANK']}", "w") as file, contextlib.redirect_stderr(file):
        code = run(*line)
    (folder / f"code{os.environ['RANK']}").write_text(str(code))
    return code


GLOO = Path("/proc/self/task")  # of a Linux, where threads have names


def watched(folder: Path, *line: object) -> int:
    """As :func:`told`, and leaves in ``folder`` whether gloo had threads when the loss was made, and at the end."""

    def gloo() -> bool:
        return any("gloo" in path.read_text() for path in GLOO.glob("*/comm"))

    made, during = learner._loss, []
    learner._loss = lambda *args: (during.append(gloo()), made(*args))[1]
    code = told(folder, *line)
    (folder / f"gloo{os.environ['RANK']}").write_text(f"during {during[0]} after {gloo()}")
    return code


WORKER = """
import pathlib, sys
from tests.test_train_signals import watched
assert "torch._dynamo" not in sys.modules, "an optimiser imports it, and what it imports remembers the group it finds"
sys.exit(watched(pathlib.Path(sys.argv[1]), *sys.argv[2:]))
"""


def test_one_run_folder_takes_one_process(phantoms, tmp_path, capsys):
    out = tmp_path / "run"
    process = start(run, "train", phantoms, "--out", out, *ENDLESS)
    try:
        wait_for(out / "state.safetensors")
        for resume in ([], ["--resume"]):
            code = run("train", phantoms, "--out", out, *OPTIONS, "--epochs", "400", *resume)
            assert_user_error(capsys, code, "another process is at work", str(out))
    finally:
        process.kill()
        ended(process)
    assert (out / ".lock").exists(), "a killed process leaves the file"
    assert run("train", phantoms, "--out", out, *OPTIONS, "--epochs", "400") == 2
    assert "holds a run already" in capsys.readouterr().err


def test_several_processes_share_one_fate():
    from fastunet.errors import UserError
    from fastunet.training.distributed import Processes

    alone = Processes(0, 1, torch.device("cpu"))
    with pytest.raises(UserError, match="broken"), alone.together():
        raise UserError("broken")
    assert alone.most(3) == 3
