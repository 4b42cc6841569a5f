from __future__ import annotations

import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastunet.data import (
    CaseSlices,
    cases_from_files,
    discover_cases,
    fit_slice,
    read_labels,
    read_volume,
    unfit_slice,
    write_labels,
)
from fastunet.data.slices import brain_statistics, normalise, orient
from fastunet.errors import UserError
from tests.data_files import ORIENTATIONS, brats_case, msd_folder, oriented_affine, random_image, random_labels, save


def reoriented(array: np.ndarray, codes: str) -> np.ndarray:
    """An array along LPS stored along ``codes``, by nibabel."""
    lps, target = (nib.orientations.axcodes2ornt(tuple(c)) for c in ("LPS", codes))
    return nib.orientations.apply_orientation(array, nib.orientations.ornt_transform(lps, target))


def oriented_case(folder, codes: str):
    """One case stored along ``codes``, and its volumes along LPS."""
    volumes = [random_image(seed) * (random_image(seed + 5) > 300) for seed in range(2)]
    labels = random_labels(7)
    for part, volume in zip(("flair", "t1ce", "seg"), [*volumes, labels]):
        save(folder / f"a_{part}.nii", np.ascontiguousarray(reoriented(volume, codes)), oriented_affine(codes))
    return discover_cases(folder)[0], volumes, labels


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_slices_do_not_depend_on_the_orientation_of_the_file(tmp_path, codes):
    case, volumes, labels = oriented_case(tmp_path, codes)
    for axis in range(3):
        slices = CaseSlices(case, axis=axis, normalise=False)
        expected = np.stack([np.moveaxis(volume, axis, 0) for volume in volumes], axis=1)
        np.testing.assert_array_equal(slices.read(0, len(slices)), expected)
        truth = case.label_map.encode(np.moveaxis(labels, axis, 0), "")
        np.testing.assert_array_equal(slices.stack(read_labels(case.label, case.label_map)), truth)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SLP", "PSR", "ILA"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [None, 8, (9, 7)])
def test_labels_return_to_the_voxels_they_came_from(tmp_path, codes, axis, size):
    case, _, _ = oriented_case(tmp_path, codes)
    truth = read_labels(case.label, case.label_map)
    slices = CaseSlices(case, axis=axis, size=size)
    stack = fit_slice(slices.stack(truth), slices.size)
    result = slices.new_volume(np.uint8)
    for start, images in slices.batches(3):
        assert images.shape == (min(3, len(slices) - start), 2, *slices.size)
        slices.place(result, start, stack[start : start + len(images)])
    np.testing.assert_array_equal(result, truth)
    write_labels(tmp_path / "out.nii.gz", result, slices.like, case.label_map)
    written, source = nib.load(tmp_path / "out.nii.gz"), nib.load(case.label)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), np.asanyarray(source.dataobj))
    np.testing.assert_array_equal(written.affine, source.affine)


def test_oblique_affines_go_to_the_nearest_axes():
    turn = np.eye(4)
    angle = np.deg2rad(20)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    array = random_image(0)
    np.testing.assert_array_equal(orient(array, turn @ oriented_affine("LPS")), array)
    np.testing.assert_array_equal(orient(array, turn @ oriented_affine("RAS")), array[::-1, ::-1])


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_affine_without_axes(value):
    affine = np.eye(4)
    affine[1, 1] = value
    with pytest.raises(UserError, match=r"x\.nii: the affine has no three independent axes"):
        orient(random_image(0), affine, "x.nii")


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_fit_and_unfit(height, width, to_height, to_width):
    array = np.arange(1, 2 * height * width + 1).reshape(2, height, width)
    fitted = fit_slice(array, (to_height, to_width))
    assert fitted.shape == (2, to_height, to_width)
    back = unfit_slice(fitted, (height, width))
    kept = back != 0
    np.testing.assert_array_equal(back[kept], array[kept])
    assert kept[0].sum() == min(height, to_height) * min(width, to_width)
    # The kept part is centred to within half a pixel.
    rows = np.flatnonzero(kept[0].any(1))
    assert abs(rows[0] - (height - 1 - rows[-1])) <= 1
    filled = np.flatnonzero((fitted[0] != 0).any(1))
    assert abs(filled[0] - (to_height - 1 - filled[-1])) <= 1


def test_statistics_and_normalisation_of_the_brain():
    rng = np.random.default_rng(0)
    volume = (rng.normal(500, 80, (20, 21, 22)) * (rng.random((20, 21, 22)) > 0.4)).astype(np.float32)
    inside = volume[volume != 0].astype(np.float64)
    mean, deviation = brain_statistics(volume)
    assert mean == pytest.approx(inside.mean(), rel=1e-12)
    assert deviation == pytest.approx(inside.std(), rel=1e-12)
    result = normalise(volume, mean, deviation)
    assert result.dtype == np.float32
    assert (result[volume == 0] == 0).all()
    np.testing.assert_allclose(result[volume != 0], (inside - mean) / deviation, atol=2e-6)


def test_statistics_of_empty_and_constant_volumes():
    assert brain_statistics(np.zeros((3, 3, 3), np.float32)) == (0.0, 1.0)
    assert brain_statistics(np.full((3, 3, 3), 7, np.float32)) == (7.0, 1.0)


def test_statistics_of_large_offsets_do_not_cancel():
    volume = (1e6 + np.random.default_rng(0).normal(0, 1, (30, 30, 30))).astype(np.float32)
    assert brain_statistics(volume)[1] == pytest.approx(volume.astype(np.float64).std(), rel=1e-9)


def test_each_modality_is_normalised_by_itself(tmp_path):
    brats_case(tmp_path / "a", shape=(12, 11, 10))
    slices = CaseSlices(discover_cases(tmp_path)[0], ("t2", "t1"))
    images = slices.read(0, len(slices))
    for channel, modality in enumerate(("t2", "t1")):
        volume = read_volume(tmp_path / "a" / f"a_{modality}.nii.gz").data.astype(np.float64)
        expected = slices.stack((volume - volume.mean()) / volume.std())
        np.testing.assert_allclose(images[:, channel], expected, atol=1e-6)


def test_channels_of_a_4d_file(tmp_path):
    case = discover_cases(msd_folder(tmp_path))[0]
    slices = CaseSlices(case, ("t2", "flair"), normalise=False)
    array = np.asanyarray(nib.load(case.files[0]).dataobj)
    array = orient(array[..., 0], np.eye(4)), orient(array[..., 3], np.eye(4))
    np.testing.assert_array_equal(slices.read(1, 3), np.stack([array[1], array[0]])[..., 1:3].transpose(3, 0, 1, 2))
    assert slices.new_volume(np.uint8).shape == (6, 5, 4)


def test_a_loose_4d_file_names_what_is_wrong(tmp_path):
    path = save(tmp_path / "x.nii", random_image(0, (6, 5, 4, 2)))
    with pytest.raises(UserError, match=r"x\.nii: expected one volume of 3 axes, got shape \(6, 5, 4, 2\)"):
        CaseSlices(cases_from_files([path], ("flair",))[0], ("flair",))


def test_nan_is_replaced_on_demand(tmp_path):
    folder = brats_case(tmp_path / "a")
    array = random_image(0).astype(np.float32)
    array[1, 1, 1] = np.nan
    save(folder / "a_t1ce.nii.gz", array)
    (case,) = discover_cases(tmp_path)
    with pytest.raises(UserError, match=r"a_t1ce\.nii\.gz: 1 of 120 voxels"):
        CaseSlices(case)
    images = CaseSlices(case, on_nan="zero").read(0, 4)
    assert np.isfinite(images).all()
    assert np.argwhere(images == 0).tolist() == [[1, 1, 4, 3]]


def test_memory_beyond_the_volumes_is_a_few_batches(tmp_path):
    brats_case(tmp_path / "a", shape=(64, 64, 64))
    slices = CaseSlices(discover_cases(tmp_path)[0])
    result = slices.new_volume(np.uint8)
    batch_bytes = 4 * 2 * 64 * 64 * 4
    tracemalloc.start()
    try:
        for start, images in slices.batches(4):
            slices.place(result, start, images[:, 0] > 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * batch_bytes


def test_reading_a_volume_takes_little_more_than_the_volume(tmp_path):
    path = save(tmp_path / "a.nii.gz", random_image(0, (96, 96, 64)))
    volume_bytes = 4 * 96 * 96 * 64
    read_volume(path)
    tracemalloc.start()
    try:
        brain_statistics(read_volume(path).data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * volume_bytes + (1 << 21)
