"""2-D images and stacks: every usual file."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from fastunet.data import check_geometry, discover_cases, read_geometry, read_volume
from fastunet.errors import DataWarning, UserError
from tests.image_data import GREY, RGB, RNG, picture

STACK = RNG.integers(0, 256, (6, 7, 5)).astype(np.uint8)

pytestmark = pytest.mark.usefixtures("nothing_said")


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.tif", "a.TIFF", "a.bmp"])
@pytest.mark.parametrize("pixels", [GREY, RGB], ids=["grey", "rgb"])
def test_lossless_files(tmp_path, name, pixels):
    volume = read_volume(picture(tmp_path / name, pixels))
    expected = pixels[:, :, None] if pixels.ndim == 2 else pixels[:, :, None, :]
    np.testing.assert_array_equal(volume.data, expected)
    assert volume.data.dtype == np.float32


def test_jpeg(tmp_path):
    smooth = np.add.outer(np.arange(64), np.arange(48)).astype(np.uint8)
    volume = read_volume(picture(tmp_path / "a.jpg", smooth, quality=95))
    assert np.abs(volume.data[..., 0] - smooth).max() < 6


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float32, np.float64, bool])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_tiff_depths_and_compressions(tmp_path, dtype, compression):
    pixels = (RNG.integers(0, 2, (7, 5)) if dtype is bool else RNG.integers(0, 30000, (7, 5)) / 8).astype(dtype)
    compression = None if dtype is bool else compression  # older versions of tifffile cannot write it
    volume = read_volume(picture(tmp_path / "a.tif", pixels, compression=compression))
    np.testing.assert_array_equal(volume.data[..., 0], pixels.astype(np.float32) * (255 if dtype is bool else 1))


def test_sixteen_bit_png(tmp_path):
    pixels = RNG.integers(0, 65536, (7, 5)).astype(np.uint16)
    np.testing.assert_array_equal(read_volume(picture(tmp_path / "a.png", pixels)).data[..., 0], pixels)


def test_sixteen_bit_colour_png_is_refused(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(6 * 2) for _ in range(2))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    with pytest.raises(UserError, match=r"a\.png: 16-bit colour"):
        read_volume(tmp_path / "a.png")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"imagej": True, "metadata": {"axes": "ZYX"}},
        {"photometric": "minisblack"},
        {"ome": True, "metadata": {"axes": "TYX"}},
    ],
)
def test_stacks(tmp_path, options):
    path = picture(tmp_path / "a.tif", STACK, **options)
    np.testing.assert_array_equal(read_volume(path).data, np.moveaxis(STACK, 0, -1))


@pytest.mark.parametrize("options", [{}, {"metadata": None}, {"compression": "zlib"}], ids=str)
def test_pages_that_were_written_one_by_one_are_a_stack(tmp_path, options):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in STACK:
            file.write(page, **options)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tif").data, np.moveaxis(STACK, 0, -1))


@pytest.mark.parametrize("kind", [1, 4], ids=["thumbnail", "transparency mask"])
@pytest.mark.parametrize("first", [True, False])
def test_smaller_versions_and_masks_in_a_tiff_are_passed_over(tmp_path, kind, first):
    other = GREY[::2, ::2] if kind == 1 else GREY > 9
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for pixels, subfile in sorted([(GREY, 0), (other, kind)], key=lambda each: each[1], reverse=first):
            file.write(pixels, subfiletype=subfile)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tif").data[..., 0], GREY)


@pytest.mark.parametrize("other", [GREY[:5], GREY.astype(np.uint16), RGB], ids=["size", "type", "colour"])
def test_a_tiff_of_different_images_is_refused(tmp_path, other):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for pixels in (GREY, other):
            file.write(pixels)
    with pytest.raises(UserError, match=r"images that differ, such as 7 × 5 of uint8 and .*save each"):
        read_volume(tmp_path / "a.tif")


def test_colour_stacks_and_planar_colours(tmp_path):
    pixels = RNG.integers(0, 256, (4, 7, 5, 3)).astype(np.uint8)
    path = picture(tmp_path / "a.tif", pixels, photometric="rgb")
    np.testing.assert_array_equal(read_volume(path, channel=1).data, np.moveaxis(pixels[..., 1], 0, -1))
    path = picture(tmp_path / "b.tif", np.moveaxis(RGB, -1, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_volume(path).data, RGB[:, :, None, :])


def test_numbers_are_those_stored_whichever_is_shown_white(tmp_path):
    path = picture(tmp_path / "a.tif", GREY, photometric="miniswhite")
    np.testing.assert_array_equal(read_volume(path).data[..., 0], GREY)


def test_palettes_single_bits_and_transparency(tmp_path):
    palette = Image.fromarray(RGB).quantize(4)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "p.png").data[:, :, 0], np.asarray(palette.convert("RGB")))
    Image.fromarray(GREY > 128).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "b.png").data[..., 0], (GREY > 128) * 255)
    picture(tmp_path / "t.png", np.dstack([RGB, GREY]))
    with pytest.warns(DataWarning, match="transparent"):
        np.testing.assert_array_equal(read_volume(tmp_path / "t.png").data[:, :, 0], RGB)
    alpha = picture(tmp_path / "t.tif", np.dstack([GREY, GREY // 2]), photometric="minisblack",
                    planarconfig="contig", extrasamples=["unassalpha"])  # fmt: skip
    np.testing.assert_array_equal(read_volume(alpha).data[..., 0], GREY)


@pytest.mark.filterwarnings("ignore:.*orientation tag")
@pytest.mark.parametrize("orientation", range(10))
def test_orientation_tags_are_obeyed_as_viewers_do(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = picture(tmp_path / "a.png", RGB, exif=exif)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    tagged = picture(tmp_path / "a.tif", RGB, photometric="rgb", extratags=[(0x0112, "H", 1, orientation, True)])
    for file in (path, tagged):
        np.testing.assert_array_equal(read_volume(file).data[:, :, 0], shown)
        assert read_geometry(file).shape == (*shown.shape[:2], 1, 3)


@pytest.mark.filterwarnings("ignore:.*orientation tag")
@pytest.mark.parametrize("image, mask, fits", [(3, 1, False), (3, 3, True), (1, 3, False), (6, 1, True), (1, 8, False)])
def test_an_image_and_a_mask_of_different_orientation_tags(tmp_path, image, mask, fits):
    """Without a tag a mask fits what is shown where only that has its shape; else which is meant cannot be told."""
    for index in range(2):
        for part, tag in (("images", image), ("masks", mask)):
            exif = Image.Exif()
            exif[0x0112] = tag
            pixels = GREY if part == "images" else (GREY > 100).astype(np.uint8)
            pixels = pixels.T if part == "masks" and image == 6 else pixels
            picture(tmp_path / part / f"{index}.png", pixels, exif=exif)
    case = discover_cases(tmp_path)[0]
    if fits:
        check_geometry(case, ["grey"])
        return
    with pytest.raises(UserError, match=f"0.png have orientation tags {image} and {mask}"):
        check_geometry(case, ["grey"])


def test_a_jpeg_of_printing_colours(tmp_path):
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg has colours of kind CMYK.* save it as grey or RGB"):
        read_volume(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["palette", "separated", "ycbcr", "cielab"])
def test_tiffs_whose_numbers_are_no_grey_and_no_rgb(tmp_path, kind):
    pixels = {"palette": GREY, "separated": np.dstack([RGB, GREY])}.get(kind, RGB)
    colours = {"colormap": np.zeros((3, 256), np.uint16)} if kind == "palette" else {}
    path = picture(tmp_path / "a.tif", pixels, photometric=kind, **colours)
    with pytest.raises(UserError, match=rf"a\.tif is a TIFF of kind {kind.upper()}.* save it as"):
        read_volume(path)


def test_images_are_read_by_content_and_no_other_format_is(tmp_path):
    for content, name in (("png", "a.tif"), ("tif", "a.png")):
        path = picture(tmp_path / f"b.{content}", GREY).rename(tmp_path / name)
        np.testing.assert_array_equal(read_volume(path).data[..., 0], GREY)
    Image.fromarray(RGB).save(tmp_path / "c.png", format="EPS")
    with pytest.raises(UserError, match=r"c\.png is no image: its content is not that of a PNG"):
        read_volume(tmp_path / "c.png")


def test_an_animation_is_not_its_first_picture(tmp_path):
    path = picture(tmp_path / "a.png", GREY, save_all=True, append_images=[Image.fromarray(GREY // 2)])
    with pytest.raises(UserError, match="is animated, with 2 frames"):
        read_volume(path)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".bmp"])
def test_damaged_images(tmp_path, suffix):
    pixels = RNG.integers(0, 256, (64, 64)).astype(np.uint8)
    whole = picture(tmp_path / f"a{suffix}", pixels).read_bytes()
    for data in (whole[: len(whole) // 2], whole[:20], b"text" * 100, b""):
        (tmp_path / f"b{suffix}").write_bytes(data)
        with pytest.raises(UserError, match=rf"b\{suffix}"):
            read_volume(tmp_path / f"b{suffix}")


@pytest.mark.parametrize("options", [{"compression": "zlib"}, {"imagej": True, "metadata": {"axes": "ZYX"}}, {}])
def test_a_stack_cut_short_is_never_a_shorter_stack(tmp_path, options):
    path = picture(tmp_path / "a.tif", STACK.repeat(20, axis=2).astype(np.uint16), photometric="minisblack", **options)
    whole, expected = path.read_bytes(), read_volume(path).data
    refused = 0
    for length in range(9, len(whole), len(whole) // 60):
        (tmp_path / "b.tif").write_bytes(whole[:length])
        try:
            np.testing.assert_array_equal(read_volume(tmp_path / "b.tif").data, expected)
        except UserError:
            refused += 1
    assert refused > 30


def test_nan_in_a_float_tiff(tmp_path):
    path = picture(tmp_path / "a.tif", np.full((4, 4), np.nan, np.float32))
    with pytest.raises(UserError, match=r"a\.tif: 16 of 16 voxels are NaN"):
        read_volume(path)


def test_a_stack_that_declares_more_than_it_holds(tmp_path):
    path = picture(tmp_path / "a.tif", GREY)
    raw = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        entries = {tag.name: tag.valueoffset for tag in file.pages[0].tags}
    data = bytearray(raw)
    for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
        struct.pack_into("<I" if name == "x" else "<H", data, entries[name], 60000)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tif"):
        read_volume(path)


@pytest.mark.parametrize("again", [0, 1])
def test_a_stack_whose_pages_go_round_in_circles(tmp_path, again):
    path = picture(tmp_path / "a.tif", GREY, metadata=None)
    tifffile.imwrite(path, GREY[1:], metadata=None, append=True)
    with tifffile.TiffFile(path) as file:
        first, last = (page.offset for page in file.pages)
    data = bytearray(path.read_bytes())
    (tags,) = struct.unpack_from("<H", data, last)
    struct.pack_into("<I", data, last + 2 + 12 * tags, (first, last)[again])
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tif .* circular"):
        read_volume(path)
