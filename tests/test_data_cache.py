"""The cache of a slice data set: one file a case, known by content, shared, and made again when damaged."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal

import nibabel as nib
import numpy as np
import pytest
import torch

from fastunet.data import CaseSlices, SliceDataset, discover_cases
from fastunet.data import cache as cache_module
from fastunet.errors import UserError
from tests.data_files import brats_case, oriented_affine, random_labels, save


def test_the_cache_is_made_once(tmp_path, cases, monkeypatch):
    calls = []
    original = cache_module._write_records
    monkeypatch.setattr(cache_module, "_write_records", lambda *args: (calls.append(args[0].name), original(*args)))
    progress = []
    for _ in range(2):
        SliceDataset(cases, cache_dir=tmp_path / "cache", size=8, on_progress=lambda *done: progress.append(done))
    SliceDataset(cases, cache_dir=tmp_path / "cache", size=5, foreground_fraction=0.5, skip_empty=True, seed=9)
    assert sorted(calls) == ["case_0", "case_1", "case_2"]
    assert progress == [(1, 3), (2, 3), (3, 3)] * 2


@pytest.mark.parametrize("change", ["image", "label", "axis", "normalise", "modalities", "table"])
def test_the_key_follows_content_and_options(tmp_path, cases, change):
    before = SliceDataset(cases[:1], cache_dir=tmp_path / "cache", size=8)
    options = {"size": 8}
    if change in ("image", "label"):
        path = cases[0].modalities["flair"].path if change == "image" else cases[0].label
        image = nib.load(path)
        array = np.asanyarray(image.dataobj).copy()
        array[4, 4, 4] = 1 if array[4, 4, 4] != 1 else 2
        stat = os.stat(path)
        save(path, array, image.affine)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "table":
        cases = discover_cases(tmp_path / "data", edition="brats2024")
    else:
        options |= {"axis": {"axis": 1}, "normalise": {"normalise": False}, "modalities": {"modalities": ("flair",)}}[
            change
        ]
    after = SliceDataset(cases[:1], cache_dir=tmp_path / "cache", **options)
    assert after.fingerprint != before.fingerprint
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def test_the_cache_knows_pairs_by_their_voxels(tmp_path):
    """Headers of pairs are equal, so a key of headers alone would serve one case, or one version, for all."""
    for seed in range(2):
        folder = brats_case(tmp_path / "data" / f"case{seed}", seed=seed)
        for path in list(folder.glob("*.nii.gz")):
            nib.save(nib.Nifti1Pair(np.asanyarray(nib.load(path).dataobj), np.eye(4)), str(path)[:-7] + ".img")
            path.unlink()
    cases = discover_cases(tmp_path / "data")
    before = SliceDataset(cases, cache_dir=tmp_path / "cache")
    assert not torch.equal(before[0][0], before[4][0])
    path = tmp_path / "data" / "case0" / "case0_flair.img"
    path.write_bytes(path.read_bytes()[::-1])
    assert not torch.equal(SliceDataset(cases, cache_dir=tmp_path / "cache")[0][0], before[0][0])


def test_renamed_data_hit_the_cache(tmp_path, cases):
    before = SliceDataset(cases, cache_dir=tmp_path / "cache", size=8).fingerprint
    (tmp_path / "data").rename(tmp_path / "moved")
    assert SliceDataset(discover_cases(tmp_path / "moved"), cache_dir=tmp_path / "cache", size=8).fingerprint == before
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3


def start_process(target, *args):
    """A forked process, which needs no second import of PyTorch."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def test_processes_may_share_a_cache(tmp_path, cases):
    def build(number):
        data = SliceDataset(cases, cache_dir=tmp_path / "cache", size=8)
        torch.save((data.fingerprint, data.load(range(len(data)))), tmp_path / f"{number}.pt")

    processes = [start_process(build, number) for number in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    results = [torch.load(tmp_path / f"{number}.pt") for number in range(3)]
    for fingerprint, samples in results:
        assert fingerprint == results[0][0]
        torch.testing.assert_close(samples, results[0][1], rtol=0, atol=0)
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_a_process_killed_while_writing_leaves_nothing_that_is_read(tmp_path, cases):
    class Killed(CaseSlices):
        def read(self, start, stop):
            os.kill(os.getpid(), signal.SIGKILL)

    def build():
        cache_module.CaseSlices = Killed
        SliceDataset(cases, cache_dir=tmp_path / "cache", size=8)

    process = start_process(build)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not list((tmp_path / "cache").glob("*.json"))
    fresh = SliceDataset(cases, cache_dir=tmp_path / "other", size=8)
    data = SliceDataset(cases, cache_dir=tmp_path / "cache", size=8)
    torch.testing.assert_close(data.load(range(len(data))), fresh.load(range(len(fresh))), rtol=0, atol=0)


def test_records_without_description_are_made_again(tmp_path, cases):
    data = SliceDataset(cases, cache_dir=tmp_path / "cache", size=8)
    expected = data.load(range(len(data)))
    for path in (tmp_path / "cache").glob("*.json"):
        path.unlink()
        path.with_suffix(".npy").write_bytes(b"cut off")
    cache_module._opened.cache_clear()
    data = SliceDataset(cases, cache_dir=tmp_path / "cache", size=8)
    torch.testing.assert_close(data.load(range(len(data))), expected, rtol=0, atol=0)


def test_more_cases_than_files_may_be_open(tmp_path, cases, monkeypatch):
    data = SliceDataset(cases, cache_dir=tmp_path / "cache", size=8)
    opened = cache_module._opened
    assert opened.cache_info().maxsize < resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    data.load(range(len(data)))
    assert opened.cache_info().currsize <= opened.cache_info().maxsize


def test_a_disk_that_fills_up(tmp_path):
    brats_case(tmp_path / "data" / "a", shape=(32, 32, 32))
    cases = discover_cases(tmp_path / "data")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*cache.*\.npy"):
            SliceDataset(cases, cache_dir=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_folder_cannot_be_made(tmp_path, cases):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the output folder"):
        SliceDataset(cases, cache_dir=tmp_path / "file" / "cache", size=8)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [flip, lambda path: os.truncate(path, 200), lambda path: path.unlink(), lambda path: path.write_bytes(b"")],
)
@pytest.mark.parametrize("opened", [False, True])
def test_a_cache_file_damaged_during_the_run_is_made_again(tmp_path, cases, damage, opened, nothing_said):
    data = SliceDataset(cases, cache_dir=tmp_path / "cache", size=8, skip_empty=True)
    expected = data.load(range(len(data)))
    if not opened:
        cache_module._opened.cache_clear()
    for path in (tmp_path / "cache").glob("*.npy"):
        damage(path)
    found = data.load(range(len(data)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if damage is flip:
        assert len(list((tmp_path / "cache").glob("*.npy"))) == 3


def test_a_damaged_cache_file_whose_source_changed(tmp_path, cases, nothing_said):
    data = SliceDataset(cases, cache_dir=tmp_path / "cache", size=8)
    for path in (tmp_path / "cache").glob("*.npy"):
        flip(path)
    save(cases[0].label, random_labels(5, (10, 9, 8)), oriented_affine("LPS"))
    with pytest.raises(UserError, match=r"was changed or cut short, and the files of case case_0 changed since"):
        data.load(range(len(data)))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 200)])
def test_a_cache_file_damaged_between_runs_is_made_again(tmp_path, cases, damage):
    expected = SliceDataset(cases, cache_dir=tmp_path / "cache", size=8)
    expected = expected.load(range(len(expected)))
    for path in (tmp_path / "cache").glob("*.npy"):
        damage(path)
    data = SliceDataset(cases, cache_dir=tmp_path / "cache", size=8)
    torch.testing.assert_close(data.load(range(len(data))), expected, rtol=0, atol=0)
    description = next((tmp_path / "cache").glob("*.json"))
    whole = description.read_text()
    foreground = '"foreground":['
    assert foreground + "0" not in whole
    for text in ('{"case": 1}', whole.replace(foreground, f"{foreground}0,")):
        description.write_text(text)
        data = SliceDataset(cases, cache_dir=tmp_path / "cache", size=8)
        torch.testing.assert_close(data.load(range(len(data))), expected, rtol=0, atol=0)
        assert description.read_text() == whole


def test_files_that_change_while_they_are_cached(tmp_path, cases, monkeypatch):
    original = cache_module._content_key

    def change(case, *args):
        key = original(case, *args)
        save(case.label, random_labels(5, (10, 9, 8)), oriented_affine("LPS"))
        os.utime(case.label, (1, 1))
        return key

    monkeypatch.setattr(cache_module, "_content_key", change)
    with pytest.raises(UserError, match=r"files of case case_0 in .* changed while they were read"):
        SliceDataset(cases[:1], cache_dir=tmp_path / "cache", size=8)
    assert list((tmp_path / "cache").iterdir()) == []
