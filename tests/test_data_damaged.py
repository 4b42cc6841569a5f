"""Files that are damaged, no NIfTI, or hold what no volume or label map may: one sentence names them."""

from __future__ import annotations

import gzip
import logging
import lzma

import nibabel as nib
import numpy as np
import pytest

from fastunet.data import LABEL_MAPS, read_geometry, read_labels, read_volume
from fastunet.errors import UserError
from tests.data_files import random_image, random_labels, save

BRATS = LABEL_MAPS["brats2021"]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_truncation_anywhere_is_noticed(tmp_path, suffix):
    whole = save(tmp_path / f"whole{suffix}", random_image(0)).read_bytes()
    path = tmp_path / f"cut{suffix}"
    lengths = {*range(0, len(whole), 7), *range(max(0, len(whole) - 12), len(whole)), 348, 351, 352}
    for length in sorted(lengths):
        if length >= len(whole):
            continue
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"cut{suffix}"):
            read_volume(path)


def test_damaged_gzip_data_are_noticed(tmp_path):
    whole = save(tmp_path / "a.nii.gz", random_image(0, (20, 20, 20))).read_bytes()
    for position in (60, len(whole) // 2, len(whole) - 6):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        (tmp_path / "b.nii.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"b\.nii\.gz"):
            read_volume(tmp_path / "b.nii.gz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.nii.gz", b"", "is empty"),
        ("a.nii", b"", "is empty"),
        ("a.nii.gz", b"this is a text file\n" * 40, "is not a NIfTI file"),
        ("a.nii", b"this is a text file\n" * 40, "is not a NIfTI file"),
        ("a.nii.gz", gzip.compress(b"this is a text file\n" * 40, mtime=0), "is not a NIfTI file"),
        ("a.nii.gz", gzip.compress(b"", mtime=0), "is not a NIfTI file"),
        ("a.nii.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "`git lfs pull` fetches"),
        ("a.nii", b"<!DOCTYPE html><html>Please log in</html>", "is a web page"),
        ("a.nii", lzma.compress(bytes(999)), "is compressed by xz"),
        ("a.dcm", b"DICM", "no file that can be read"),
        ("a.nii", None, "there is no such file"),
    ],
)
def test_files_that_are_no_nifti(tmp_path, capfd, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for read in (read_volume, read_geometry, lambda p: read_labels(p, BRATS)):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_what_nibabel_puts_right_is_not_printed(tmp_path):
    raw = bytearray(save(tmp_path / "a.nii", random_image(0)).read_bytes())
    raw[252:254] = b"\xff\x00"  # qform_code
    (tmp_path / "a.nii").write_bytes(raw)
    messages = []
    handler = logging.Handler()
    handler.emit = messages.append
    nib.imageglobals.logger.addHandler(handler)
    try:
        np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").data, random_image(0))
        assert messages == []
        nib.load(tmp_path / "a.nii")
        assert len(messages) == 1
    finally:
        nib.imageglobals.logger.removeHandler(handler)


def test_a_folder_is_no_volume(tmp_path):
    (tmp_path / "a.nii.gz").mkdir()
    with pytest.raises(UserError, match=r"a\.nii\.gz is not a regular file"):
        read_volume(tmp_path / "a.nii.gz")


def test_header_of_an_impossible_size(tmp_path):
    raw = bytearray(save(tmp_path / "a.nii", random_image(0)).read_bytes())
    raw[42:48] = np.array([32767] * 3, dtype="<i2").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.nii is truncated or damaged"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("shape", [(6,), (6, 5, 4, 3, 2)])
def test_other_numbers_of_axes(tmp_path, shape):
    path = save(tmp_path / "a.nii", np.ones(shape, np.int16))
    with pytest.raises(UserError, match=r"a\.nii: expected a volume with 2 or 3 axes"):
        read_volume(path)


def test_complex_voxels(tmp_path):
    path = save(tmp_path / "a.nii", np.ones((3, 3, 3), np.complex64))
    with pytest.raises(UserError, match=r"a\.nii: voxels are of NIfTI type 32"):
        read_volume(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_nan_and_infinity_are_named_or_replaced(tmp_path, bad):
    array = random_image(0).astype(np.float64)
    array[1, 2, 3] = array[0, 0, 0] = bad
    path = save(tmp_path / "a.nii.gz", array)
    with pytest.raises(UserError, match=r"a\.nii\.gz: 2 of 120 voxels are NaN or infinite"):
        read_volume(path)
    replaced = read_volume(path, on_nan="zero").data
    np.testing.assert_array_equal(replaced, np.where(np.abs(array) < 1e9, array, 0))
    with pytest.raises(ValueError, match="'ignore'"):
        read_volume(path, on_nan="ignore")


@pytest.mark.parametrize(("value", "shown"), [(7, "7"), (0.5, "0.5"), (np.nan, "nan"), (3, "3")])
def test_label_outside_the_table(tmp_path, value, shown):
    array = random_labels(0).astype(np.float32)
    array[0, 0, 0] = value
    path = save(tmp_path / "seg.nii.gz", array)
    with pytest.raises(UserError, match=rf"seg\.nii\.gz: label values {shown} are not in the table of brats2021"):
        read_labels(path, BRATS)


def test_label_file_with_four_axes(tmp_path):
    path = save(tmp_path / "seg.nii", np.zeros((3, 3, 3, 2), np.uint8))
    with pytest.raises(UserError, match=r"seg\.nii: a label file has 3 axes"):
        read_labels(path, BRATS)
