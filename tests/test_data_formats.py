"""Files as people have them: pairs, MGH, MetaImage, planes, channels on any axis, names that do not fit the content."""

from __future__ import annotations

import gzip
import os
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from fastunet.data import LABEL_MAPS, read_geometry, read_labels, read_volume, write_labels
from fastunet.data import streams as streams_module
from fastunet.errors import DataWarning, UserError
from tests.data_files import oriented_affine, random_image, random_labels, save

BRATS = LABEL_MAPS["brats2021"]
AFFINE = oriented_affine("RAS") + np.array([[0.1, 0, 0, 0], [0, 0, 0.2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])

pytestmark = pytest.mark.usefixtures("nothing_said")


def renamed(path: Path, name: str) -> Path:
    return path.rename(path.with_name(name))


@pytest.mark.parametrize("name", ["a.NII.GZ", "a.Nii.gz", "b.NII"])
def test_upper_case_endings(tmp_path, name):
    path = renamed(save(tmp_path / f"x{name[1:].lower()}", random_image(0)), name)
    np.testing.assert_array_equal(read_volume(path).data, random_image(0))


@pytest.mark.parametrize(("stored", "name"), [(".nii", "b.nii.gz"), (".nii.gz", "b.nii")])
def test_content_tells_compression(tmp_path, stored, name):
    for number in range(3):
        renamed(save(tmp_path / f"a{stored}", random_image(number)), f"{number}{name}")
    with pytest.warns(DataWarning, match=rf"0{name} is (not )?compressed.*read by its content"):
        np.testing.assert_array_equal(read_volume(tmp_path / f"0{name}").data, random_image(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once for a folder
        np.testing.assert_array_equal(read_volume(tmp_path / f"2{name}").data, random_image(2))


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("names", [("a.hdr", "a.img"), ("A.HDR", "A.IMG")])
def test_pairs(tmp_path, names, second):
    pair_class = nib.Nifti2Pair if second else nib.Nifti1Pair
    nib.save(pair_class(random_image(0), AFFINE), tmp_path / "a.img")
    for old, new in zip(("a.hdr", "a.img"), names):
        (tmp_path / old).rename(tmp_path / new)
    for name in names:
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.data, random_image(0))
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    write_labels(tmp_path / "out.nii.gz", np.ones((6, 5, 4), np.uint8), volume, BRATS)
    np.testing.assert_array_equal(np.asanyarray(nib.load(tmp_path / "out.nii.gz").dataobj), 1)
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match=rf"{names[1]}: there is no such file"):
        read_volume(tmp_path / names[0])


def test_a_single_file_named_like_a_pair_and_the_reverse(tmp_path):
    save(tmp_path / "a.nii", random_image(0)).rename(tmp_path / "a.hdr")
    with pytest.raises(UserError, match=r"a\.hdr is named like a pair .* but its header is that of a single \.nii"):
        read_volume(tmp_path / "a.hdr")
    nib.save(nib.Nifti1Pair(random_image(0), AFFINE), tmp_path / "b.img")
    (tmp_path / "b.hdr").rename(tmp_path / "b.nii")
    with pytest.raises(UserError, match=r"b\.nii is named like a single"):
        read_volume(tmp_path / "b.nii")


def test_analyze_has_no_orientation(tmp_path):
    nib.save(nib.AnalyzeImage(random_image(0), np.eye(4)), tmp_path / "a.img")
    with pytest.raises(UserError, match=r"a\.hdr is not a NIfTI file: an Analyze 7\.5 header"):
        read_volume(tmp_path / "a.img")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
@pytest.mark.parametrize("suffix", [".mgh", ".mgz", ".MGZ"])
def test_mgh(tmp_path, suffix, dtype):
    image = nib.MGHImage(random_image(0).astype(dtype), AFFINE.astype(np.float32))
    nib.save(image, tmp_path / "a.mgz")
    if suffix == ".mgh":
        (tmp_path / "a.mgh").write_bytes(gzip.decompress((tmp_path / "a.mgz").read_bytes()))
    path = tmp_path / f"a{suffix}"
    if not path.exists():
        (tmp_path / "a.mgz").rename(path)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.data, random_image(0).astype(dtype))
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    write_labels(tmp_path / "out.nii.gz", np.full((6, 5, 4), 2, np.uint8), volume, BRATS)
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii.gz").affine, AFFINE, atol=1e-5)
    with pytest.raises(UserError, match="truncated"):
        read_volume(cut(path, 350 if suffix == ".mgh" else path.stat().st_size // 2))


def test_mgh_frames_are_channels_and_labels(tmp_path):
    frames = random_image(0, (6, 5, 4, 3)).astype(np.float32)
    nib.save(nib.MGHImage(frames, np.eye(4)), tmp_path / "a.mgh")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.mgh", channel=2).data, frames[..., 2])
    labels = random_labels(0)
    nib.save(nib.MGHImage(labels, np.eye(4)), tmp_path / "seg.mgz")
    np.testing.assert_array_equal(read_labels(tmp_path / "seg.mgz", BRATS), BRATS.encode(labels, "seg"))


@pytest.mark.parametrize("field", [(0, 2), (4, 0), (20, 9)])
def test_mgh_headers_that_make_no_sense(tmp_path, field):
    nib.save(nib.MGHImage(random_image(0).astype(np.float32), np.eye(4)), tmp_path / "a.mgh")
    raw = bytearray((tmp_path / "a.mgh").read_bytes())
    raw[field[0] : field[0] + 4] = field[1].to_bytes(4, "big")
    (tmp_path / "a.mgh").write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.mgh"):
        read_volume(tmp_path / "a.mgh")


def test_meta_image(tmp_path):
    sitk = pytest.importorskip("SimpleITK", reason="the extra fastunet[metaimage] is not installed")
    path = save(tmp_path / "a.nii.gz", random_image(0), oriented_affine("PIR"))
    image = sitk.ReadImage(str(path))
    for name in ("a.mha", "a.mhd", "A.MHA"):
        sitk.WriteImage(image, str(tmp_path / "b.mha") if name == "A.MHA" else str(tmp_path / name))
    (tmp_path / "b.mha").rename(tmp_path / "A.MHA")
    for name in ("a.mha", "a.mhd", "A.MHA"):
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.data, random_image(0))
        np.testing.assert_allclose(volume.affine, read_volume(path).affine, atol=1e-4)
    (tmp_path / "a.mha").write_bytes(b"ObjectType = Image\nNDims = 3\n")
    with pytest.raises(UserError, match=r"a\.mha is not a MetaImage"):
        read_volume(tmp_path / "a.mha")


def test_meta_image_without_its_reader(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(UserError, match=r"a\.mha: MetaImage files need SimpleITK: pip install 'fastunet\[metaimage\]'"):
        read_volume(tmp_path / "a.mha")


@pytest.mark.parametrize("components", [1, 2])
def test_meta_image_as_its_reader_gives_it(tmp_path, monkeypatch, components):
    """SimpleITK's arrays run (z, y, x, component), its axes to the left, the back and the top; this is in its place."""
    data = np.random.default_rng(0).normal(size=(6, 5, 4, components)).astype(np.float32)
    turned = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, -1]])
    image = SimpleNamespace(
        SetImageIO=lambda name: None, SetFileName=lambda name: None, ReadImageInformation=lambda: None,
        GetSize=lambda: (4, 5, 6), GetNumberOfComponents=lambda: components, GetOrigin=lambda: (10.0, 20.0, 30.0),
        GetSpacing=lambda: (1.0, 2.0, 3.0), GetDirection=lambda: tuple(turned.ravel()), Execute=lambda: data,
    )  # fmt: skip
    reader = SimpleNamespace(ImageFileReader=lambda: image,
                             GetArrayFromImage=lambda found: found[..., 0] if components == 1 else found)  # fmt: skip
    monkeypatch.setitem(sys.modules, "SimpleITK", reader)
    (tmp_path / "a.mha").write_bytes(b"ElementDataFile = LOCAL\n")
    volume = read_volume(tmp_path / "a.mha")
    expected = data.transpose(2, 1, 0, 3)
    np.testing.assert_array_equal(volume.data, expected[..., 0] if components == 1 else expected)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.mha", channel=components - 1).data, expected[..., -1])
    np.testing.assert_array_equal(volume.affine, [[0, -2, 0, -10], [-1, 0, 0, -20], [0, 0, -3, 30], [0, 0, 0, 1]])

    def damaged():
        raise RuntimeError("Exception thrown in SimpleITK ImageFileReader_Execute")

    image.ReadImageInformation = damaged
    with pytest.raises(UserError, match=r"a\.mha is not a MetaImage file that can be read: .*ImageFileReader_Execute"):
        read_volume(tmp_path / "a.mha")


@pytest.mark.parametrize("beside", [False, True])
def test_compressed_voxels_of_a_meta_image_are_checked(tmp_path, monkeypatch, beside):
    """SimpleITK prints that they are damaged, and gives what it has."""
    data = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    image = SimpleNamespace(
        SetImageIO=lambda name: None, SetFileName=lambda name: None, ReadImageInformation=lambda: None,
        GetSize=lambda: (4, 5, 6), GetNumberOfComponents=lambda: 1, GetOrigin=lambda: (0.0,) * 3,
        GetSpacing=lambda: (1.0,) * 3, GetDirection=lambda: tuple(np.eye(3).ravel()), Execute=lambda: data,
    )  # fmt: skip
    reader = SimpleNamespace(ImageFileReader=lambda: image, GetArrayFromImage=lambda found: found)
    monkeypatch.setitem(sys.modules, "SimpleITK", reader)
    whole = zlib.compress(data.tobytes())
    damaged = whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]
    header = b"CompressedData = True\nElementDataFile = " + (b"a.zraw\n" if beside else b"LOCAL\n")
    for content, reason in ((whole, None), (damaged, "damaged"), (whole[:-1], "truncated"), (whole[:9], "truncated")):
        (tmp_path / "a.zraw").write_bytes(content)
        (tmp_path / "a.mhd").write_bytes(header if beside else header + content)
        if reason is None:
            np.testing.assert_array_equal(read_volume(tmp_path / "a.mhd").data, data.transpose(2, 1, 0))
        else:
            with pytest.raises(UserError, match=rf"a\.{'zraw' if beside else 'mhd'} .*{reason}"):
                read_volume(tmp_path / "a.mhd")


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 1, 1, 1)])
def test_planes(tmp_path, shape):
    array = random_image(0, shape)
    path = save(tmp_path / "a.nii.gz", array, AFFINE)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.data, array.reshape(6, 5, 1))
    assert read_geometry(path).shape == (6, 5, 1)
    write_labels(tmp_path / "b.nii.gz", np.ones((6, 5, 1), np.uint8), volume, BRATS)
    assert nib.load(tmp_path / "b.nii.gz").shape == (shape if len(shape) == 2 else (6, 5, 1))
    np.testing.assert_array_equal(read_labels(tmp_path / "b.nii.gz", BRATS), np.ones((6, 5, 1)))


def test_a_plane_whose_header_has_no_third_axis(tmp_path):
    affine = AFFINE.copy()
    affine[:3, 2] = 0
    image = nib.Nifti1Image(random_image(0, (6, 5)), np.eye(4))
    image.header.set_sform(affine, code=1)
    image.header["qform_code"] = 0
    nib.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[280:328] = affine[:3].astype("<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    found = read_volume(tmp_path / "a.nii").affine
    np.testing.assert_allclose(found[:3, 2] @ found[:3, :2], 0, atol=1e-6)
    assert np.linalg.norm(found[:3, 2]) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (6, 5, 4, 1, 3), (6, 5, 4, 3, 1), (6, 5, 1, 3), (6, 5, 1, 1, 3)])
def test_channels_on_the_fourth_or_fifth_axis(tmp_path, shape):
    array = random_image(0, shape)
    plain = array.reshape(*shape[:3], 3)
    path = save(tmp_path / "a.nii.gz", array)
    np.testing.assert_array_equal(read_volume(path).data, plain)
    np.testing.assert_array_equal(read_volume(path, channel=1).data, plain[..., 1])


def cut(path: Path, length: int) -> Path:
    path.write_bytes(path.read_bytes()[:length])
    return path


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii.gz")
    (tmp_path / "zero.nii").symlink_to("/dev/zero")
    (tmp_path / "loop.nii").symlink_to("loop.nii")
    for name in ("pipe.nii.gz", "zero.nii", "loop.nii"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            read_volume(tmp_path / name)


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii", random_image(0))
    original = streams_module.DataStream.read_array

    def change(stream, count):
        data = original(stream, count)
        path.write_bytes(path.read_bytes()[:-4] + b"late")
        os.utime(path, ns=(0, time.time_ns() + 10**9))
        return data

    monkeypatch.setattr(streams_module.DataStream, "read_array", change)
    with pytest.raises(UserError, match=r"a\.nii changed while it was read"):
        read_volume(path)


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path):
    path = save(tmp_path / "a.nii", random_image(0, (200, 200, 100)).astype(np.float32))
    volume = read_volume(path)
    os.truncate(path, 1000)  # a memory map would now end the process
    assert volume.data.sum() > 0
    with pytest.raises(UserError, match=r"a\.nii is truncated"):
        read_volume(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_petabyte_declared_costs_nothing(tmp_path, compressed):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header["dim"] = [5, 32767, 32767, 32767, 32, 1, 1, 1]
    header["vox_offset"], header["magic"] = 352, b"n+1"
    raw = header.binaryblock + bytes(4) + bytes(1000)
    path = tmp_path / ("a.nii.gz" if compressed else "a.nii")
    path.write_bytes(gzip.compress(raw) if compressed else raw)
    for read in (read_volume, read_geometry):
        with pytest.raises(UserError, match="truncated or damaged"):
            read(path)


def test_much_data_behind_the_voxels(tmp_path):
    raw = save(tmp_path / "a.nii", random_image(0)).read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(raw + bytes(1000)))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").data, random_image(0))
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(raw + bytes(80 << 20), 1))
    with pytest.raises(UserError, match="beyond the voxels that it declares"):
        read_volume(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_labels_that_a_writer_scaled(tmp_path, dtype):
    labels = random_labels(0, (6, 5, 4), (0, 1, 2, 4))
    image = nib.Nifti1Image(labels * 1.0, np.eye(4))
    image.set_data_dtype(dtype)  # nibabel spreads 0 to 4 over the whole range of the type
    nib.save(image, tmp_path / "seg.nii.gz")
    assert dtype is np.float32 or nib.load(tmp_path / "seg.nii.gz").dataobj.slope != 1
    np.testing.assert_array_equal(read_labels(tmp_path / "seg.nii.gz", BRATS), BRATS.encode(labels, "seg"))


def test_a_scaling_that_makes_labels_one(tmp_path):
    path = save(tmp_path / "seg.nii", random_labels(0))
    raw = bytearray(path.read_bytes())
    raw[112:116] = np.float32(1e-5).tobytes()
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"seg\.nii: the scaling .* makes different labels one"):
        read_labels(path, BRATS)


def test_threads_read_one_file(tmp_path):
    path = save(tmp_path / "a.nii.gz", random_image(0, (30, 30, 30)))
    results = []
    threads = [threading.Thread(target=lambda: results.append(read_volume(path).data)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(np.array_equal(data, results[0]) for data in results)
