from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import signal
import threading

import nibabel as nib
import numpy as np
import pytest
import torch

from fastunet.data import IGNORED, CaseSlices, SliceDataset, discover_cases, fit_slice, read_labels
from fastunet.data import cache as cache_module
from fastunet.errors import UserError
from tests.data_files import (
    brats_case,
    gli_case,
    msd_folder,
    nnunet_folder,
    oriented_affine,
    random_image,
    random_labels,
    save,
)

SHAPE = (10, 9, 8)


def head_case(folder, seed=0, shape=SHAPE, codes="LPS"):
    """A case with an empty border of different width on every side, and labels in its middle."""
    brats_case(folder, seed=seed, shape=shape)
    inside = np.zeros(shape, bool)
    inside[1:-3, 2:-1, 1:-2] = True
    lesion = np.zeros(shape, bool)
    lesion[3:5, 3:6, 3:5] = True
    for part in ("flair", "t1", "t1ce", "t2", "seg"):
        path = folder / f"{folder.name}_{part}.nii.gz"
        array = np.asanyarray(nib.load(path).dataobj)
        save(path, array * (lesion if part == "seg" else inside), oriented_affine(codes))
    return folder


@pytest.fixture
def cases(tmp_path):
    for number in range(3):
        head_case(tmp_path / "data" / f"case_{number}", number, (10 + number, 9, 8), ("LPS", "RAS", "SAR")[number])
    return discover_cases(tmp_path / "data")


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [4, 16, (3, 20), (20, 7)])
def test_slices_are_those_of_segmentation_bit_by_bit(tmp_path, cases, axis, size, normalise):
    modalities = ("t1ce", "flair", "t2")
    data = SliceDataset(
        cases, cache_dir=tmp_path / "cache", modalities=modalities, size=size, axis=axis, normalise=normalise
    )
    images, labels = data.load(range(len(data)))
    assert images.dtype == torch.float32
    assert labels.dtype == torch.uint8
    expected_images, expected_labels = [], []
    for case in cases:
        slices = CaseSlices(case, modalities, size=size, axis=axis, normalise=normalise)
        expected_images.append(slices.read(0, len(slices)))
        expected_labels.append(fit_slice(slices.stack(read_labels(case.label, case.label_map)), size))
    np.testing.assert_array_equal(images.numpy(), np.concatenate(expected_images))
    np.testing.assert_array_equal(labels.numpy(), np.concatenate(expected_labels))
    np.testing.assert_array_equal(data.foreground, foreground_of_slices(cases, axis))
    image, label = data[len(data) - 3]
    torch.testing.assert_close(image, images[-3], rtol=0, atol=0)
    torch.testing.assert_close(label, labels[-3], rtol=0, atol=0)


def foreground_of_slices(cases, axis):
    stacks = [CaseSlices(case, axis=axis).stack(read_labels(case.label, case.label_map)) for case in cases]
    return np.concatenate([stack.any(axis=(1, 2)) for stack in stacks])


def test_empty_slices_can_be_left_out(tmp_path, cases):
    every = SliceDataset(cases, cache_dir=tmp_path / "cache", size=12)
    data = SliceDataset(cases, cache_dir=tmp_path / "cache", size=12, skip_empty=True)
    images, labels = every.load(range(len(every)))
    filled = ((images != 0).any(1) | (labels != 0)).any(-1).any(-1)
    assert 0 < len(data) < len(every)
    torch.testing.assert_close(data.load(range(len(data)))[0], images[filled], rtol=0, atol=0)
    np.testing.assert_array_equal(data.foreground, (labels != 0).any(-1).any(-1).numpy()[filled])


def test_a_crop_beside_the_brain_is_empty(tmp_path):
    folder = brats_case(tmp_path / "data" / "a", shape=(12, 12, 4))
    for part in ("flair", "t1ce", "seg"):
        path = folder / f"a_{part}.nii.gz"
        array = np.asanyarray(nib.load(path).dataobj).copy()
        array[2:] = 0
        save(path, array, oriented_affine("LPS"))
    data = SliceDataset(discover_cases(tmp_path / "data"), cache_dir=tmp_path / "cache", size=4)
    images, labels = data.load(range(len(data)))
    assert not images.any()
    assert not labels.any()


def test_labels_outside_the_brain_are_kept(tmp_path):
    folder = head_case(tmp_path / "data" / "a")
    labels = np.zeros(SHAPE, np.uint8)
    labels[0, 0, 0] = 4
    save(folder / "a_seg.nii.gz", labels, oriented_affine("LPS"))
    data = SliceDataset(discover_cases(tmp_path / "data"), cache_dir=tmp_path / "cache")
    assert data.load([0])[1][0, 0, 0] == 3


def test_editions_with_one_set_of_classes_share_a_data_set(tmp_path):
    brats_case(tmp_path / "data" / "a")
    gli_case(tmp_path / "data" / "b-000")
    data = SliceDataset(discover_cases(tmp_path / "data"), cache_dir=tmp_path / "cache")
    _, labels = data.load(range(len(data)))
    stored = np.concatenate([np.asanyarray(nib.load(case.label).dataobj)[::-1, ::-1] for case in data.cases], axis=2)
    stored[stored == 4] = 3
    np.testing.assert_array_equal(np.moveaxis(labels.numpy(), 0, 2), stored)


def test_decathlon_labels_are_reordered(tmp_path):
    cases = discover_cases(msd_folder(tmp_path / "data"))
    data = SliceDataset(cases[:1], cache_dir=tmp_path / "cache", size=8)
    stored = np.asanyarray(nib.load(cases[0].label).dataobj)
    assert [(data.load(range(len(data)))[1] == c).sum() for c in (1, 2, 3)] == [(stored == v).sum() for v in (2, 1, 3)]


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


def test_workers_and_pickles(tmp_path, cases):
    data = SliceDataset(cases, cache_dir=tmp_path / "cache", size=8)
    images, labels = data.load(range(len(data)))
    assert len(pickle.dumps(data)) < 40_000
    torch.testing.assert_close(pickle.loads(pickle.dumps(data)).load([3])[0], images[3:4], rtol=0, atol=0)
    loader = torch.utils.data.DataLoader(data, batch_size=5, num_workers=2)
    loaded = list(loader)
    torch.testing.assert_close(torch.cat([batch[0] for batch in loaded]), images, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([batch[1] for batch in loaded]), labels, rtol=0, atol=0)


def test_threads_may_read_at_once(tmp_path, cases):
    data = SliceDataset(cases, cache_dir=tmp_path / "cache", size=8)
    expected = data.load(range(len(data)))[0]
    results = [None] * 4

    def read(place):
        results[place] = data.load(range(len(data)))[0]

    threads = [threading.Thread(target=read, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)


def test_batches_cover_and_repeat(tmp_path, cases):
    data = SliceDataset(cases, cache_dir=tmp_path / "cache", size=8, foreground_fraction=0.6, seed=4)
    assert data.steps(5) == -(-len(data) // 5)
    first = [batch.indices.tolist() for batch in data.batches(5, 1)]
    assert first == [batch.indices.tolist() for batch in data.batches(5, 1)]
    assert first != [batch.indices.tolist() for batch in data.batches(5, 2)]
    assert first[3:] == [batch.indices.tolist() for batch in data.batches(5, 1, start_batch=3)]
    assert np.mean(data.foreground[np.concatenate(first)]) >= 0.5
    in_order = np.concatenate([batch.indices for batch in data.batches(5, shuffle=False)])
    np.testing.assert_array_equal(in_order, np.arange(len(data)))


def test_bad_options(tmp_path, cases):
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="needs at least one case"):
        SliceDataset([], cache_dir=cache)
    with pytest.raises(UserError, match=r"slices of case_0 are 10 x 9 and those of case_1 11 x 9: give one size"):
        SliceDataset(cases, cache_dir=cache)
    with pytest.raises(UserError, match="slice size is 0"):
        SliceDataset(cases, cache_dir=cache, size=0)
    with pytest.raises(UserError, match=r"share of slices with foreground is 1\.5"):
        SliceDataset(cases, cache_dir=cache, size=8, foreground_fraction=1.5)
    with pytest.raises(UserError, match="has no adc"):
        SliceDataset(cases, cache_dir=cache, size=8, modalities=("adc",))
    with pytest.raises(ValueError, match="axis is 3"):
        SliceDataset(cases, cache_dir=cache, size=8, axis=3)


def test_bad_cases(tmp_path):
    folder = head_case(tmp_path / "data" / "a")
    cache = tmp_path / "cache"
    affine = oriented_affine("LPS")

    def refuse(message):
        with pytest.raises(UserError, match=message):
            SliceDataset(discover_cases(tmp_path / "data"), cache_dir=cache, foreground_fraction=0.5)
        assert list(cache.iterdir()) == []

    labels = random_labels(0, SHAPE)
    save(folder / "a_seg.nii.gz", labels + (labels == 4) * 3, affine)
    refuse(r"a_seg\.nii\.gz: label values 7 are not in the table")
    save(folder / "a_seg.nii.gz", labels)
    refuse("differ in affine")
    (folder / "a_seg.nii.gz").write_bytes(b"")
    refuse(r"a_seg\.nii\.gz is empty")
    (folder / "a_seg.nii.gz").unlink()
    refuse(r"a: case a has no label file")
    save(folder / "a_seg.nii.gz", labels, affine)
    save(folder / "a_flair.nii.gz", random_image(0, SHAPE) * 0, affine)
    save(folder / "a_t1ce.nii.gz", random_image(0, SHAPE) * 0, affine)
    save(folder / "a_seg.nii.gz", labels * 0, affine)
    refuse(r"a_flair\.nii\.gz: every voxel is 0")


def test_no_foreground_to_draw_from(tmp_path):
    folder = head_case(tmp_path / "data" / "a")
    save(folder / "a_seg.nii.gz", np.zeros(SHAPE, np.uint8), oriented_affine("LPS"))
    with pytest.raises(UserError, match=r"none of the 8 slices has foreground"):
        SliceDataset(discover_cases(tmp_path / "data"), cache_dir=tmp_path / "cache", foreground_fraction=0.5)


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


@pytest.fixture
def said(monkeypatch):
    monkeypatch.setattr("fastunet.errors._said", set())


def flip(path):
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [flip, lambda path: os.truncate(path, 200), lambda path: path.unlink(), lambda path: path.write_bytes(b"")],
)
@pytest.mark.parametrize("opened", [False, True])
def test_a_cache_file_damaged_during_the_run_is_made_again(tmp_path, cases, damage, opened, said):
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


def test_a_damaged_cache_file_whose_source_changed(tmp_path, cases, said):
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


def test_ignored_pixels_are_carried_and_are_no_foreground(tmp_path):
    root = nnunet_folder(tmp_path / "data", labels={"background": 0, "liver": 1, "ignore": 2})
    labels = np.zeros((6, 5, 4), np.uint8)
    labels[1, 1, 1], labels[2, 2, 2] = 2, 1
    save(root / "labelsTr" / "case_a.nii.gz", labels)
    data = SliceDataset(discover_cases(root)[:1], cache_dir=tmp_path / "cache", modalities=("flair",))
    found = data.load(range(4))[1].numpy()
    assert found.max() == IGNORED
    assert (found == IGNORED).sum() == 1
    assert data.foreground.tolist() == [False, False, True, False]
