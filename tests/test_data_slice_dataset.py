from __future__ import annotations

import pickle
import threading

import nibabel as nib
import numpy as np
import pytest
import torch

from fastunet.data import IGNORED, CaseSlices, SliceDataset, discover_cases, fit_slice, read_labels
from fastunet.errors import UserError
from tests.data_files import (
    brats_case,
    gli_case,
    head_case,
    msd_folder,
    nnunet_folder,
    oriented_affine,
    random_image,
    random_labels,
    save,
)

SHAPE = (10, 9, 8)


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
