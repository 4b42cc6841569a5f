"""Bad input gets one sentence that names it, exit code 2, and leaves no partial file."""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fastunet import files
from fastunet.errors import UserError
from tests.cli_helpers import (  # noqa: F401
    TINY,
    assert_user_error,
    checkpoint,
    files_below,
    phantoms,
    run,
    write_checkpoint,
)

CASE = "Phantom_000"


@pytest.fixture
def data(phantoms, tmp_path) -> Path:  # noqa: F811
    """A copy of the phantoms to damage."""
    return shutil.copytree(phantoms, tmp_path / "data")


def segment(model: Path, source: Path, out: Path, *options: object) -> int:
    return run("segment", model, source, "--out", out, "--device", "cpu", *options)


def rewrite(path: Path, change) -> None:
    """Replaces the NIfTI file at ``path`` by ``change(voxels, affine)``."""
    image = nibabel.load(path)
    voxels, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_text(path: Path) -> None:
    path.write_text("not an image\n")


def make_text_in_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"not an image\n" * 100))


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


@pytest.mark.parametrize("damage", [truncate, make_empty, make_text, make_text_in_gzip])
def test_damaged_volume(damage, data, checkpoint, tmp_path, capsys):  # noqa: F811
    name = f"{CASE}_flair.nii.gz"
    damage(data / CASE / name)
    code = segment(checkpoint, data / CASE, tmp_path / "out")
    assert_user_error(capsys, code, name)
    assert files_below(tmp_path / "out") == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_named_and_can_be_replaced(bad, data, checkpoint, tmp_path, capsys):  # noqa: F811
    def spoil(voxels, affine):
        voxels = voxels.astype(np.float32)
        voxels[5, 6, 7] = bad
        return voxels, affine

    rewrite(data / CASE / f"{CASE}_t1ce.nii.gz", spoil)
    code = segment(checkpoint, data / CASE, tmp_path / "out")
    assert_user_error(capsys, code, f"{CASE}_t1ce.nii.gz", "NaN", "--on-nan zero")
    assert files_below(tmp_path / "out") == []
    assert segment(checkpoint, data / CASE, tmp_path / "out", "--on-nan", "zero") == 0
    assert files_below(tmp_path / "out") == [f"{CASE}.nii.gz"]


def test_modalities_of_different_shapes(data, checkpoint, tmp_path, capsys):  # noqa: F811
    rewrite(data / CASE / f"{CASE}_t1ce.nii.gz", lambda voxels, affine: (voxels[:, :-1], affine))
    code = segment(checkpoint, data / CASE, tmp_path / "out")
    assert_user_error(capsys, code, f"{CASE}_t1ce.nii.gz", "(32, 31, 17)", "(32, 32, 17)")
    assert files_below(tmp_path / "out") == []


def test_modalities_of_different_affines(data, checkpoint, tmp_path, capsys):  # noqa: F811
    rewrite(data / CASE / f"{CASE}_t1ce.nii.gz", lambda voxels, affine: (voxels, affine + np.eye(4) * 0.5))
    code = segment(checkpoint, data / CASE, tmp_path / "out")
    assert_user_error(capsys, code, f"{CASE}_t1ce.nii.gz", "affine")
    assert files_below(tmp_path / "out") == []


def test_missing_modality(data, checkpoint, tmp_path, capsys):  # noqa: F811
    (data / CASE / f"{CASE}_t1ce.nii.gz").unlink()
    code = segment(checkpoint, data, tmp_path / "out")
    assert_user_error(capsys, code, CASE, "t1ce")
    assert not (tmp_path / "out").exists()


def test_label_outside_the_table(data, tmp_path, capsys):
    def spoil(voxels, affine):
        voxels[3, 4, 5] = 9
        return voxels, affine

    for folder in data.iterdir():
        rewrite(folder / f"{folder.name}_seg.nii.gz", spoil)
    code = run("train", data, "--out", tmp_path / "run", *TINY)
    assert_user_error(capsys, code, "_seg.nii.gz", "9", "brats2021")
    assert files_below(tmp_path / "run") == []


@pytest.mark.parametrize("command", ["segment", "train", "evaluate"])
def test_empty_folder(command, checkpoint, tmp_path, capsys):  # noqa: F811
    empty = tmp_path / "empty"
    empty.mkdir()
    lines = {
        "segment": ["segment", checkpoint, empty, "--out", tmp_path / "out"],
        "train": ["train", empty, "--out", tmp_path / "out"],
        "evaluate": ["evaluate", checkpoint, empty, "--csv", tmp_path / "out" / "scores.csv"],
    }
    assert_user_error(capsys, run(*lines[command]), str(empty))
    assert files_below(tmp_path) == []


def test_checkpoint_of_another_architecture(data, checkpoint, tmp_path, capsys):  # noqa: F811
    from fastunet.training.checkpoint import load_model, save_weights

    other = tmp_path / "other.safetensors"
    save_weights(other, write_checkpoint(other, width=8), load_model(checkpoint)[1])
    code = segment(other, data, tmp_path / "out")
    assert_user_error(capsys, code, str(other), "another architecture", "(8, 2, 3, 3)", "(4, 2, 3, 3)")
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_another_program(data, tmp_path, capsys):
    import safetensors.torch
    import torch

    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, foreign)
    assert_user_error(capsys, segment(foreign, data, tmp_path / "out"), str(foreign), "not a fastunet checkpoint")


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_truncated_checkpoint(length, data, checkpoint, tmp_path, capsys):  # noqa: F811
    short = tmp_path / "short.safetensors"
    short.write_bytes((checkpoint / "best.safetensors").read_bytes()[:length])
    assert_user_error(capsys, segment(short, data, tmp_path / "out"), str(short), "not a whole safetensors file")
    assert not (tmp_path / "out").exists()


def test_folder_without_checkpoint(data, tmp_path, capsys):
    assert_user_error(capsys, segment(tmp_path, data, tmp_path / "out"), str(tmp_path), "no checkpoint")


def test_output_folder_below_a_file(data, checkpoint, tmp_path, capsys):  # noqa: F811
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


def test_disk_that_is_full_when_data_reach_it(data, checkpoint, tmp_path, capsys, monkeypatch):  # noqa: F811
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
def test_file_size_limit_in_the_middle_of_a_write(option, limit, data, checkpoint, tmp_path, capsys):  # noqa: F811
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


def test_fewer_cases_than_the_split_needs(data, tmp_path, capsys):
    for folder in sorted(data.iterdir())[1:]:
        shutil.rmtree(folder)
    code = run("train", data, "--out", tmp_path / "run", *TINY)
    assert_user_error(capsys, code, "at least 2 patients", "there are 1")
    assert files_below(tmp_path / "run") == []


def test_size_that_does_not_fit_valid_convolutions(data, tmp_path, capsys):
    options = ["--preset", "isbi", "--width", "2", "--depth", "2", "--device", "cpu"]
    code = run("train", data, "--out", tmp_path / "run", *options, "--size", "50")
    assert_user_error(capsys, code, "50", "48", "52")
    code = run("train", data, "--out", tmp_path / "run", *options)
    assert_user_error(capsys, code, "32")
    assert not list((tmp_path / "run").glob("*.*"))


def test_tile_that_does_not_fit(data, tmp_path, capsys):
    model = tmp_path / "valid.safetensors"
    write_checkpoint(model, padding="valid", up="transpose")
    assert_user_error(capsys, segment(model, data, tmp_path / "out", "--tile", "50"), "50", "48 or 52")
    write_checkpoint(tmp_path / "same.safetensors")
    code = segment(tmp_path / "same.safetensors", data, tmp_path / "out", "--tile", "32")
    assert_user_error(capsys, code, "32", "border")
    assert files_below(tmp_path / "out") == []


def test_slices_of_different_sizes_need_a_size(data, tmp_path, capsys):
    for path in (data / CASE).iterdir():
        rewrite(path, lambda voxels, affine: (voxels[:-2], affine))
    code = run("train", data, "--out", tmp_path / "run", *TINY)
    assert_user_error(capsys, code, "size", "30", "32")


@pytest.mark.parametrize(
    "line, words",
    [
        (["train", "X", "--out", "Y", "--epochs", "0"], ["--epochs", "0"]),
        (["train", "X", "--out", "Y", "--learning-rate", "fast"], ["--learning-rate", "'fast'"]),
        (["train", "X", "--out", "Y", "--precision", "fp8"], ["--precision", "fp8"]),
        (["train", "X", "--out", "Y", "--val-fraction", "2"], ["--val-fraction", "2"]),
        (["segment", "X"], ["INPUT"]),
        (["fly"], ["fly"]),
        ([], ["COMMAND"]),
        (["summary", "--preset", "isbi", "--size", "500"], ["500", "492", "508"]),
        (["segment", "/nowhere.safetensors", "X", "--out", "Y"], ["/nowhere.safetensors"]),
        (["info", "--device", "cuda:99"], ["cuda:99"]),
        (["info", "--device", "toaster"], ["toaster"]),
    ],
)
def test_wrong_arguments(line, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_user_error(capsys, run(*line), *words)
    assert files_below(tmp_path) == []


def test_results_are_not_overwritten_unasked(data, checkpoint, tmp_path, capsys):  # noqa: F811
    assert segment(checkpoint, data / CASE, tmp_path / "out") == 0
    before = (tmp_path / "out" / f"{CASE}.nii.gz").read_bytes()
    assert_user_error(capsys, segment(checkpoint, data / CASE, tmp_path / "out"), f"{CASE}.nii.gz", "--overwrite")
    assert segment(checkpoint, data / CASE, tmp_path / "out", "--overwrite") == 0
    assert (tmp_path / "out" / f"{CASE}.nii.gz").read_bytes() == before


@pytest.mark.parametrize("probabilities", [False, True])
def test_a_device_without_memory_gets_smaller_batches(probabilities, data, checkpoint, tmp_path, capsys, monkeypatch):  # noqa: F811
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_output_is_one_sentence():
    line = [sys.executable, "-m", "fastunet", "summary", "--width", "2", "--depth", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "fastunet: the standard output: no space left on device\n"


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
