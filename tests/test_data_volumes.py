from __future__ import annotations

import gzip
import os
import resource
import signal

import nibabel as nib
import numpy as np
import pytest

from fastunet.data import LABEL_MAPS, LabelMap, read_geometry, read_labels, read_volume, write_labels, write_map
from fastunet.errors import UserError
from tests.data_files import ORIENTATIONS, oriented_affine, random_image, random_labels, save

BRATS = LABEL_MAPS["brats2021"]


def assert_no_leftovers(folder):
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64, ">i2", ">f4"])
def test_every_stored_type_is_read_as_float32(tmp_path, dtype, suffix):
    array = np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(dtype)
    image = nib.Nifti1Image(array, np.eye(4), dtype=np.dtype(dtype))
    if np.dtype(dtype).byteorder == ">":
        image = nib.Nifti1Image(array, np.eye(4), header=nib.Nifti1Header(endianness=">"))
        image.set_data_dtype(dtype)
    nib.save(image, tmp_path / f"a{suffix}")
    volume = read_volume(tmp_path / f"a{suffix}")
    assert volume.data.dtype == np.float32
    np.testing.assert_array_equal(volume.data, array.astype(np.float32))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("stored", [np.uint8, np.int16, np.uint16])
def test_scaled_integers(tmp_path, stored, suffix):
    path = save(tmp_path / f"a{suffix}", np.arange(120, dtype=stored).reshape(4, 5, 6))
    raw = bytearray((gzip.open if suffix == ".nii.gz" else open)(path, "rb").read())
    raw[112:120] = np.array([0.37, -1024.5], dtype="<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(gzip.compress(raw) if suffix == ".nii.gz" else raw)
    slope, intercept = np.float32(0.37).astype(np.float64), -1024.5
    exact = np.arange(120).reshape(4, 5, 6) * slope + intercept
    np.testing.assert_array_equal(read_volume(path).data, exact.astype(np.float32))


def test_nifti2_keeps_its_format(tmp_path):
    array = random_image(0)
    nib.save(nib.Nifti2Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.data, array)
    write_labels(tmp_path / "b.nii.gz", np.zeros(array.shape, np.uint8), volume, BRATS)
    assert isinstance(nib.load(tmp_path / "b.nii.gz"), nib.Nifti2Image)


def test_four_axes_whole_and_by_channel(tmp_path):
    array = random_image(0, (5, 6, 7, 3))
    path = save(tmp_path / "a.nii.gz", array)
    np.testing.assert_array_equal(read_volume(path).data, array)
    for channel in range(3):
        np.testing.assert_array_equal(read_volume(path, channel=channel).data, array[..., channel])
    with pytest.raises(UserError, match=r"a\.nii\.gz.*no channel 3"):
        read_volume(path, channel=3)


def test_trailing_axes_of_one_are_dropped(tmp_path):
    array = random_labels(0, (5, 6, 7))
    path = save(tmp_path / "a.nii.gz", array[..., None, None])
    np.testing.assert_array_equal(read_volume(path).data, array)
    np.testing.assert_array_equal(read_labels(path, BRATS), BRATS.encode(array, path))
    assert read_geometry(path).shape == (5, 6, 7)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_written_labels_keep_geometry_in_every_orientation(tmp_path, codes):
    affine = oriented_affine(codes)
    image = nib.Nifti1Image(random_image(1, (5, 6, 7)), affine)
    image.set_sform(affine, code=4)
    image.set_qform(affine, code=1)
    nib.save(image, tmp_path / "a.nii.gz")
    classes = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    write_labels(tmp_path / "b.nii.gz", classes, read_volume(tmp_path / "a.nii.gz"), BRATS)
    written, source = nib.load(tmp_path / "b.nii.gz"), nib.load(tmp_path / "a.nii.gz")
    assert nib.aff2axcodes(written.affine) == tuple(codes)
    np.testing.assert_array_equal(written.affine, source.affine)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), np.array([0, 1, 2, 4])[classes])
    np.testing.assert_array_equal(read_labels(tmp_path / "b.nii.gz", BRATS), classes)


@pytest.mark.parametrize(("sform", "qform"), [(0, 0), (0, 1), (2, 0), (1, 1), (4, 2)])
def test_written_labels_keep_the_header(tmp_path, sform, qform):
    rotated = np.array([[0.9, -0.1, 0.0, 5], [0.1, 1.1, 0.2, 6], [0.0, -0.2, 2.5, 7], [0, 0, 0, 1]])
    image = nib.Nifti1Image(random_image(1), rotated)
    image.set_qform(rotated, code=qform, strip_shears=True)
    image.set_sform(rotated, code=sform)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"scan 17"
    image.header["cal_max"] = 900
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"kept"))
    nib.save(image, tmp_path / "a.nii.gz")
    source = nib.load(tmp_path / "a.nii.gz")
    write_labels(tmp_path / "b.nii.gz", np.ones((6, 5, 4), np.uint8), read_volume(tmp_path / "a.nii.gz"), BRATS)
    written = nib.load(tmp_path / "b.nii.gz")
    same = ["dim", "pixdim", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c"]
    same += ["quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units", "descrip"]
    for name in same:
        np.testing.assert_array_equal(written.header[name], source.header[name], err_msg=name)
    assert written.header.extensions[0].get_content() == source.header.extensions[0].get_content()
    assert written.get_data_dtype() == np.uint8
    assert written.dataobj.slope == 1
    assert written.dataobj.inter == 0
    assert written.header["cal_max"] == 0


def test_labels_after_a_scaled_4d_image_are_plain_3d(tmp_path):
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=(4, 5, 6, 2)), np.diag([2, 2, 2, 1.0]))
    image.header.set_data_dtype(np.int16)
    image.header.set_zooms((2, 2, 2, 9))
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii", channel=1)
    write_labels(tmp_path / "b.nii", np.full((4, 5, 6), 3, np.uint8), volume, BRATS)
    written = nib.load(tmp_path / "b.nii")
    assert written.shape == (4, 5, 6)
    assert written.header["pixdim"][1:].tolist() == [2, 2, 2, 1, 1, 1, 1]
    np.testing.assert_array_equal(written.get_fdata(), 4)


@pytest.mark.parametrize(
    ("values", "dtype"), [((0, 255), np.uint8), ((0, 256), np.int16), ((-1, 3), np.int16), ((0, 70000), np.int32)]
)
def test_labels_are_written_in_the_smallest_type(tmp_path, values, dtype):
    table = LabelMap("two", values, ("a", "b"))
    volume = read_volume(save(tmp_path / "a.nii", random_image(0)))
    classes = np.random.default_rng(0).integers(0, 2, (6, 5, 4)).astype(np.uint8)
    write_labels(tmp_path / "b.nii", classes, volume, table)
    written = nib.load(tmp_path / "b.nii")
    assert written.get_data_dtype() == dtype
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), np.array(values)[classes])


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 3)])
def test_maps_are_float32(tmp_path, shape):
    volume = read_volume(save(tmp_path / "a.nii", random_image(0)))
    values = np.random.default_rng(0).random(shape)
    write_map(tmp_path / "p.nii.gz", values, volume)
    written = read_volume(tmp_path / "p.nii.gz")
    np.testing.assert_array_equal(written.data, values.astype(np.float32))
    assert written.header.get_data_dtype() == np.float32


def test_shape_that_does_not_fit_is_refused(tmp_path):
    volume = read_volume(save(tmp_path / "a.nii", random_image(0)))
    with pytest.raises(ValueError, match=r"\(5, 6, 4\).*a\.nii"):
        write_labels(tmp_path / "b.nii", np.zeros((5, 6, 4), np.uint8), volume, BRATS)


def test_the_same_labels_give_the_same_bytes(tmp_path):
    volume = read_volume(save(tmp_path / "a.nii", random_image(0)))
    for name in ("b.nii.gz", "c.nii.gz"):
        write_labels(tmp_path / name, np.ones((6, 5, 4), np.uint8), volume, BRATS)
    written = (tmp_path / "b.nii.gz").read_bytes()
    assert written == (tmp_path / "c.nii.gz").read_bytes()
    assert written[4:8] == bytes(4)  # no time in the gzip header


def test_unwritable_folder_and_missing_folder(tmp_path):
    volume = read_volume(save(tmp_path / "a.nii", random_image(0)))
    with pytest.raises(UserError, match=r"cannot write .*missing.*b\.nii\.gz"):
        write_labels(tmp_path / "missing" / "b.nii.gz", np.zeros((6, 5, 4), np.uint8), volume, BRATS)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_labels(tmp_path / "file" / "b.nii.gz", np.zeros((6, 5, 4), np.uint8), volume, BRATS)
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        with pytest.raises(UserError, match="permission denied"):
            write_labels(locked / "b.nii.gz", np.zeros((6, 5, 4), np.uint8), volume, BRATS)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_disk_that_fills_up_leaves_no_file(tmp_path, suffix):
    volume = read_volume(save(tmp_path / "a.nii", random_image(0, (64, 64, 64))))
    out = tmp_path / "out"
    out.mkdir()
    noise = np.random.default_rng(0).random((64, 64, 64))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(UserError, match=rf"cannot write .*p{suffix}"):
            write_map(out / f"p{suffix}", noise, volume)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(out.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    volume = read_volume(save(tmp_path / "a.nii", random_image(0)))
    write_labels(tmp_path / "b.nii.gz", np.ones((6, 5, 4), np.uint8), volume, BRATS)
    before = (tmp_path / "b.nii.gz").read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gzip.GzipFile, "write", fail)
    with pytest.raises(UserError, match=r"cannot write .*b\.nii\.gz: no space left on device"):
        write_labels(tmp_path / "b.nii.gz", np.zeros((6, 5, 4), np.uint8), volume, BRATS)
    assert (tmp_path / "b.nii.gz").read_bytes() == before
    assert_no_leftovers(tmp_path)
