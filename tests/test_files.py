"""Whole files, what is left of killed processes, and locks."""

from __future__ import annotations

import time

import pytest

from fastunet.errors import UserError
from fastunet.files import locked, make_output_folder, whole_file, write_text
from tests.cli_helpers import files_below
from tests.processes import ended, start, wait_for


def writes_and_waits(path, at_work) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("half")
        at_work.touch()
        time.sleep(60)


def locks_and_waits(path, at_work) -> None:
    with locked(path):
        at_work.touch()
        time.sleep(60)


def started(function, path):
    at_work = path.parent.with_name(f"{path.parent.name}-at-work")
    process = start(function, path, at_work)
    wait_for(at_work)
    return process


def killed(process) -> None:
    process.kill()
    ended(process)


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_kept(tmp_path):
    process = started(writes_and_waits, tmp_path / "x.txt")
    make_output_folder(tmp_path)
    assert len(files_below(tmp_path)) == 1, "another process is still writing it"
    killed(process)
    assert len(files_below(tmp_path)) == 1
    make_output_folder(tmp_path)
    assert files_below(tmp_path) == []


def test_a_lock_ends_with_its_process(tmp_path):
    process = started(locks_and_waits, tmp_path / ".lock")
    with pytest.raises(UserError, match="another process is at work"), locked(tmp_path / ".lock"):
        pass
    killed(process)
    assert files_below(tmp_path) == [".lock"]
    with locked(tmp_path / ".lock"), pytest.raises(UserError, match="another process"), locked(tmp_path / ".lock"):
        pass
    assert files_below(tmp_path) == []
    (tmp_path / ".lock").write_text("of another program")
    with locked(tmp_path / ".lock"):
        pass
    assert files_below(tmp_path) == [".lock"]


def test_names_of_any_length_and_bytes(tmp_path):
    longest = "é" * 123 + ".nii.gz"
    write_text(tmp_path / longest, "caf\udce9")
    assert (tmp_path / longest).read_text() == "caf\\udce9"
    with pytest.raises(UnicodeEncodeError), whole_file(tmp_path / "y") as temporary:
        temporary.write_text("\ud800")
    assert files_below(tmp_path) == [longest]
