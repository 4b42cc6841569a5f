"""A header that contradicts itself is refused, or read as the standard has it; docs/reading.md has the table."""

from __future__ import annotations

import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fastunet.data import LABEL_MAPS, read_geometry, read_volume, write_labels
from fastunet.errors import UserError
from tests.data_files import random_image

AFFINE = np.array([[-1.1, 0.1, 0, 20], [0.1, -0.9, 0.05, 15], [0, 0.05, 1.3, -7], [0, 0, 0, 1.0]])
NAN, INFINITY = float("nan"), float("inf")
# name → (byte, struct format) in a NIfTI-1 header
FIELDS = {
    "sizeof_hdr": (0, "i"), "qfac": (76, "f"), "pixdim_1": (80, "f"),
    "dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "8f"),
    "vox_offset": (108, "f"), "scl_slope": (112, "f"), "scl_inter": (116, "f"), "xyzt_units": (123, "B"),
    "qform_code": (252, "h"), "sform_code": (254, "h"), "quatern_b": (256, "f"), "qoffset_x": (268, "f"),
    "srow_x": (280, "4f"), "magic": (344, "4s"), "extension": (348, "4B"),
}  # fmt: skip


def write(path: Path, **changes) -> Path:
    image = nib.Nifti1Image(random_image(0), AFFINE)
    image.set_qform(AFFINE, 1, strip_shears=True)
    image.set_sform(AFFINE, 2)
    nib.save(image, path)
    raw = bytearray(path.read_bytes())
    for name, value in changes.items():
        position, kind = FIELDS[name]
        struct.pack_into("<" + kind, raw, position, *(value if isinstance(value, tuple) else (value,)))
    path.write_bytes(raw)
    return path


REFUSED = {
    "sizeof_hdr": (dict(sizeof_hdr=349), "not a NIfTI file"),
    "magic": (dict(magic=b"n+9\0"), "without the NIfTI magic"),
    "magic of a pair": (dict(magic=b"ni1\0"), "header is that of a pair"),
    "bitpix": (dict(bitpix=8), r"8 bits a voxel \(bitpix\), but type int16"),
    "unknown type": (dict(datatype=77), "NIfTI type 77"),
    "complex": (dict(datatype=32, bitpix=64), "NIfTI type 32"),
    "128-bit float": (dict(datatype=1536, bitpix=128), "NIfTI type 1536"),
    "no axes": (dict(dim=(0, 6, 5, 4, 1, 1, 1, 1)), "declares no volume"),
    "8 axes": (dict(dim=(8, 6, 5, 4, 1, 1, 1, 1)), "declares no volume"),
    "negative length": (dict(dim=(3, 6, -5, 4, 1, 1, 1, 1)), "declares no volume"),
    "length 0": (dict(dim=(3, 6, 0, 4, 1, 1, 1, 1)), "declares no volume"),
    "two long axes beyond the third": (dict(dim=(5, 2, 2, 2, 3, 5, 1, 1)), "2 or 3 axes, and channels"),
    "more voxels than data": (dict(dim=(3, 6, 5, 5, 1, 1, 1, 1)), "truncated"),
    "offset in the header": (dict(vox_offset=348), r"byte 348 \(vox_offset\)"),
    "offset 0": (dict(vox_offset=0), r"byte 0 \(vox_offset\)"),
    "offset between bytes": (dict(vox_offset=352.5), r"byte 352\.5"),
    "offset NaN": (dict(vox_offset=NAN), "byte nan"),
    "offset beyond the file": (dict(vox_offset=1e6), "truncated"),
    "slope NaN": (dict(scl_slope=NAN), "slope nan"),
    "slope infinite": (dict(scl_slope=INFINITY), "slope inf"),
    "intercept NaN": (dict(scl_slope=2, scl_inter=NAN), "intercept nan"),
    "sform NaN": (dict(srow_x=(1, NAN, 0, 0)), "affine in the header holds NaN"),
    "sform infinite": (dict(srow_x=(1, 0, 0, INFINITY)), "affine in the header holds NaN or infinity"),
    "unknown sform code": (dict(sform_code=6), "sform_code is 6"),
    "negative sform code": (dict(sform_code=-1), "sform_code is -1"),
    "unknown qform code": (dict(sform_code=0, qform_code=9), "qform_code is 9"),
    "long quaternion": (dict(sform_code=0, quatern_b=1.5), "quaternion is"),
    "quaternion NaN": (dict(sform_code=0, quatern_b=NAN), "NaN or infinity"),
    "offset of the qform": (dict(sform_code=0, qoffset_x=INFINITY), "NaN or infinity"),
    "qfac 2": (dict(sform_code=0, qfac=2), "qfac is 2"),
    "negative voxel size": (dict(sform_code=0, pixdim_1=-1), "voxel sizes"),
    "no orientation and no size": (dict(sform_code=0, qform_code=0, pixdim=(1, 0, 1, 1, 0, 0, 0, 0)), "no orientation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    changes, message = REFUSED[name]
    path = write(tmp_path / "a.nii", **changes)
    for read in (read_volume, read_geometry):
        with pytest.raises(UserError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


READ = {
    "slope 0 means none": (dict(scl_slope=0, scl_inter=NAN), 1, 0, "sform"),
    "qfac 0 means 1": (dict(sform_code=0, qfac=0), 1, 0, "qform"),
    "sform before qform": (dict(quatern_b=0.5), 1, 0, "sform"),
    "an unused qform may be broken": (dict(quatern_b=NAN, pixdim=(5, -1, INFINITY, 0, 0, 0, 0, 0)), 1, 0, "sform"),
    "an unused code may be unknown": (dict(qform_code=300), 1, 0, "sform"),
    "voxel sizes beside an sform": (dict(pixdim=(1, 5, 5, 5, 0, 0, 0, 0)), 1, 0, "sform"),
    "lengths beyond dim[0]": (dict(dim=(3, 6, 5, 4, -7, 0, 9, 9)), 1, 0, "sform"),
    "voxels off the raster of 16": (dict(scl_slope=2, scl_inter=3), 2, 3, "sform"),
    "unknown units": (dict(xyzt_units=255), 1, 0, "sform"),
    "a broken extension": (dict(extension=(1, 0, 0, 0)), 1, 0, "sform"),
}


@pytest.mark.parametrize("name", READ)
def test_read_as_the_standard_has_it(tmp_path, name):
    changes, slope, intercept, form = READ[name]
    path = write(tmp_path / "a.nii", **changes)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.data, random_image(0) * slope + intercept)
    expected = AFFINE if form == "sform" else nib.load(write(tmp_path / "b.nii")).get_qform()
    np.testing.assert_allclose(volume.affine, expected, atol=1e-5)
    # Whoever reads a result finds the same place, whatever was wrong beside it.
    write_labels(tmp_path / "out.nii", np.ones((6, 5, 4), np.uint8), volume, LABEL_MAPS["brats2021"])
    written = nib.load(tmp_path / "out.nii")
    np.testing.assert_allclose(written.affine, expected, atol=1e-5)
    if written.header["qform_code"]:
        assert np.isfinite(written.get_qform()).all()
    assert np.isfinite(written.header["pixdim"]).all()
    assert (written.header["pixdim"][1:4] >= 0).all()
    np.testing.assert_allclose(read_geometry(tmp_path / "out.nii").affine, expected, atol=1e-5)
