"""Where a command may not write, or disk or memory run out: one sentence, exit code 2, and no partial file."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fastunet import files
from fastunet.cli.arguments import say
from fastunet.errors import UserError
from fastunet.training.display import Display
from tests.cli_helpers import CASE, TINY, assert_user_error, files_below, run, segment
from tests.image_data import folder_of


@contextlib.contextmanager
def file_size_limit(length: int):
    """No file of this process grows beyond ``length`` bytes inside the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def as_ordinary_user(folder: Path):
    """Takes write permission to ``folder`` away, and root's power to ignore that."""
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_output_folder_below_a_file(data, checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for line in (
        ["segment", checkpoint, data, "--out", tmp_path / "file" / "out"],
        ["train", data, "--out", tmp_path / "file" / "run"],
        ["summary", "--out", tmp_path / "file" / "net"],
        ["demo", "--out", tmp_path / "file" / "demo"],
    ):
        assert_user_error(capsys, run(*line), "cannot write", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == ""


def test_output_folder_without_permission():
    with tempfile.TemporaryDirectory() as name, as_ordinary_user(Path(name)):
        with pytest.raises(UserError, match=r"cannot write to the output folder .*/out: permission denied"):
            files.make_output_folder(Path(name) / "out")
        with pytest.raises(UserError, match=r"cannot write .*/file: permission denied"):
            files.write_text(Path(name) / "file", "text")


def test_disk_that_is_full_when_data_reach_it(data, checkpoint, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(files, "make_output_folder", lambda path: Path(path))
    monkeypatch.setattr(os, "fsync", full)
    code = segment(checkpoint, data, out, "--probabilities")
    assert_user_error(capsys, code, "cannot write", str(out), "no space left")
    assert files_below(out) == []


@pytest.mark.parametrize("option, limit", [(None, 2500), ("--probabilities", 20_000), ("--overlay", 20_000)])
def test_file_size_limit_in_the_middle_of_a_write(option, limit, data, checkpoint, tmp_path, capsys):
    """Like a full disk, but real: the kernel refuses bytes beyond the limit in the middle of a file."""
    out = tmp_path / "out"
    with file_size_limit(limit):
        code = segment(checkpoint, data / CASE, out, *([option] if option else []))
    assert_user_error(capsys, code, "cannot write", str(out))
    assert files_below(out) == ([f"{CASE}.nii.gz"] if option == "--overlay" else [])


def test_training_that_fills_the_disk_keeps_the_last_whole_state(data, tmp_path, capsys):
    run_folder = tmp_path / "run"
    line = ["train", data, "--out", run_folder, *TINY, "--checkpoint-every", "0"]
    assert run(*line, "--epochs", "1") == 0
    capsys.readouterr()
    state = (run_folder / "state.safetensors").read_bytes()
    with file_size_limit(len(state) // 2):
        code = run(*line, "--epochs", "2", "--resume")
    assert_user_error(capsys, code, "cannot write", "state.safetensors")
    assert (run_folder / "state.safetensors").read_bytes() == state
    assert not [name for name in files_below(run_folder) if ".writing-" in name]
    assert run(*line, "--epochs", "2", "--resume") == 0


def test_results_are_not_overwritten_unasked(data, checkpoint, tmp_path, capsys):
    assert segment(checkpoint, data / CASE, tmp_path / "out") == 0
    before = (tmp_path / "out" / f"{CASE}.nii.gz").read_bytes()
    assert_user_error(capsys, segment(checkpoint, data / CASE, tmp_path / "out"), f"{CASE}.nii.gz", "--overwrite")
    assert segment(checkpoint, data / CASE, tmp_path / "out", "--overwrite") == 0
    assert (tmp_path / "out" / f"{CASE}.nii.gz").read_bytes() == before


@pytest.mark.parametrize("probabilities", [False, True])
def test_a_device_without_memory_gets_smaller_batches(probabilities, data, checkpoint, tmp_path, capsys, monkeypatch):
    """The batch is halved until it fits, with one line each time, and the labels are those of the small batch."""
    import torch

    from fastunet.inference.segmenter import Segmenter

    options = ["--batch-size", "9", *(["--probabilities"] if probabilities else [])]
    assert segment(checkpoint, data / CASE, tmp_path / "small", "--batch-size", "2", *options[2:]) == 0
    original = Segmenter._run

    def limited(self, forward, images):
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from original(self, forward, images)

    monkeypatch.setattr(Segmenter, "_run", limited)
    most = 2
    capsys.readouterr()
    assert segment(checkpoint, data / CASE, tmp_path / "out", *options) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "no memory" in line]
    assert [line.rpartition(" ")[2] for line in lines] == ["4", "2"]
    for name in files_below(tmp_path / "small"):
        ours, theirs = (np.asarray(nibabel.load(tmp_path / folder / name).dataobj) for folder in ("out", "small"))
        assert (np.abs(ours - theirs.astype(np.float64)) <= 1e-4).mean() > 0.999, name
    most = 0
    code = segment(checkpoint, data / CASE, tmp_path / "none", *options)
    assert_user_error(capsys, code, "one slice", "more memory")
    assert files_below(tmp_path / "none") == []


class _Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stream", [None, _Full()], ids=["closed", "full"])
def test_standard_streams_that_take_nothing(stream, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", stream)
    assert run("check", tmp_path) == 2
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run("info", "--device", "cpu") == 0


class _Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_readers_that_go_away_end_no_work(monkeypatch):
    with monkeypatch.context() as patch:  # say puts another stream in its place
        patch.setattr(sys, "stdout", _Closed())
        say("a", "b")
        say("c")
    for stream in (_Closed(), _Full()):
        Display(stream=stream).message("epoch 1")


def test_names_do_nothing_to_the_terminal(tmp_path, capsys):
    folder = tmp_path / "a\x1b[31m  b\n\x07"
    assert_user_error(capsys, run("check", folder), r"a\x1b[31m  b\n\x07: there is no such folder")
    folder_of(folder, values=(0, 1))
    assert run("check", folder, "--batch-size", 1) == 0
    assert capsys.readouterr().out.startswith(rf"{tmp_path}/a\x1b[31m  b\n\x07: 4 cases")


def test_a_current_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert_user_error(capsys, run("summary", "--out", "x"), "the current folder: no such file or directory")


def test_no_room_for_temporary_files(monkeypatch, capsys):
    from fastunet import cli

    error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    monkeypatch.setattr(cli.info, "run", lambda args: (_ for _ in ()).throw(error))
    assert_user_error(capsys, run("info"), "fastunet: temporary files: no usable temporary directory found in ['/tmp']")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_sentence(error, monkeypatch, capsys):
    from fastunet import cli

    monkeypatch.setattr(cli.info, "run", lambda args: (_ for _ in ()).throw(error))
    assert_user_error(capsys, run("info"), "out of memory")


def test_an_error_that_speaks_of_memory_is_still_a_defect(monkeypatch):
    from fastunet import cli

    error = RuntimeError("unable to open shared memory object </torch_1>")
    monkeypatch.setattr(cli.info, "run", lambda args: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError, match="shared memory object"):
        run("info")


def test_demo_leaves_other_folders_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert_user_error(capsys, run("demo", "--out", tmp_path), str(tmp_path))
    assert files_below(tmp_path) == ["thesis.txt"]
