"""2-D images and stacks: every usual file, folders of images beside masks, nnU-Net folders of images."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from fastunet.data import (
    CaseSlices,
    SliceDataset,
    cases_from_files,
    discover_cases,
    read_geometry,
    read_labels,
    read_volume,
    split_cases,
)
from fastunet.data.masks import mask_table
from fastunet.errors import DataWarning, UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (7, 5)).astype(np.uint8)
RGB = RNG.integers(0, 256, (7, 5, 3)).astype(np.uint8)
STACK = RNG.integers(0, 256, (6, 7, 5)).astype(np.uint8)


@pytest.fixture(autouse=True)
def said(monkeypatch):
    monkeypatch.setattr("fastunet.errors._said", set())


def picture(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".tif", ".tiff"):
        tifffile.imwrite(path, pixels, **options)
    else:
        Image.fromarray(pixels).save(path, **options)
    return path


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


def folder_of(root: Path, count=4, masks="masks", suffix=".png", mark="", values=(0, 255), shape=(12, 10)) -> Path:
    """Images and masks; image k is k rows taller."""
    for index in range(count):
        size = (shape[0] + index, shape[1])
        mask = RNG.choice(np.array(values, np.uint8), size)
        mask.flat[: len(values)] = values
        picture(root / "images" / f"cell_{index}{suffix}", (mask // 2 + RNG.integers(0, 50, size)).astype(np.uint8))
        picture(root / masks / f"cell_{index}{mark}.png", mask)
    return root


@pytest.mark.parametrize("masks", ["masks", "labels", "annotations", "Masks"])
@pytest.mark.parametrize("mark", ["", "_mask", "_label", "-seg", "_manual1"])
def test_images_beside_masks(tmp_path, masks, mark):
    cases = discover_cases(folder_of(tmp_path, masks=masks, mark=mark))
    assert [case.name for case in cases] == [f"cell_{index}" for index in range(4)]
    assert cases[0].label_map.values == (0, 255)
    assert cases[0].label_map.class_names == ("background", "object")
    assert list(cases[0].modalities) == ["grey"]
    stored = np.asarray(Image.open(cases[2].label))
    np.testing.assert_array_equal(read_labels(cases[2].label, cases[2].label_map)[..., 0], stored == 255)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("img_7", "mask_7"),
        ("7_image", "7_label"),
        ("image-7", "label-7"),
        ("a.7", "a.7_gt"),
        ("I_7", "I_7_segmentation"),
        ("img7", "Mask7"),
        ("C_7", "c_7_segmentation_mask"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}7", "e\N{COMBINING ACUTE ACCENT}7"),
    ],
)
def test_names_that_differ_by_marks(tmp_path, image, mask):
    picture(tmp_path / "images" / f"{image}.png", GREY)
    picture(tmp_path / "images" / "8.png", GREY)
    picture(tmp_path / "masks" / f"{mask}.png", (GREY > 100).astype(np.uint8))
    assert [case.label is not None for case in discover_cases(tmp_path) if case.name == image] == [True]
    with pytest.raises(UserError, match="there is one in"):
        discover_cases(Path(shutil.copytree(tmp_path, tmp_path / "x" / "train")).parent)


def test_folders_inside_of_images_and_masks(tmp_path):
    root = folder_of(tmp_path, mark="_mask")
    for part in ("images", "masks"):
        for name in ("a", "b"):
            shutil.copytree(root / part, root / part / name, ignore=shutil.ignore_patterns("a", "b"))
    cases = discover_cases(root)
    assert [case.name for case in cases[:5]] == ["a_cell_0", "a_cell_1", "a_cell_2", "a_cell_3", "b_cell_0"]
    assert cases[0].label == root / "masks" / "a" / "cell_0_mask.png"
    assert len(cases) == 12


def test_every_image_and_mask_that_cannot_be_used_is_named(tmp_path):
    root = folder_of(tmp_path, count=6)
    for part, index in (("images", 1), ("images", 2), ("masks", 3), ("masks", 4)):
        (root / part / f"cell_{index}.png").write_bytes(b"junk")
    said = []
    cases = discover_cases(root, refused=said.append)
    assert [any(f"{part}/cell_{index}.png" in text for text in said) for part in ("images", "masks")
            for index in range(6)] == [index in (1, 2, 9, 10) for index in range(12)]  # fmt: skip
    assert cases[0].label_map.values == (0, 255)


@pytest.mark.parametrize("asked", [("red", "green", "blue"), ("R", "G", "B"), ("phase",)])
def test_images_are_taken_as_a_network_has_them(tmp_path, asked):
    """The same from a folder as from loose files: grey as colour, under any names; colour is no grey."""
    root = folder_of(tmp_path)
    cases = discover_cases(root, modalities=asked)
    loose = cases_from_files([case.files[0] for case in cases], asked)
    assert [case.modalities.keys() for case in cases] == [case.modalities.keys() for case in loose]
    one, two = CaseSlices(cases[0], asked).read(0, 1), CaseSlices(loose[0], asked).read(0, 1)
    np.testing.assert_array_equal(one, two)
    assert one.shape[1] == len(asked)


def test_loose_images_of_one_channel_each(tmp_path):
    files = [picture(tmp_path / f"a_{index:04d}.png", GREY + index) for index in range(3)]
    (case,) = cases_from_files(files, ("x", "y", "z"))
    assert [source.path for source in case.modalities.values()] == files
    assert case.name == "a"
    assert len(cases_from_files(files, ("red", "green", "blue"))) == 3


def test_images_of_different_sizes_are_served_as_slices(tmp_path):
    cases = discover_cases(folder_of(tmp_path / "data"))
    data = SliceDataset(cases, cache_dir=tmp_path / "cache", modalities=("grey",), size=11)
    assert len(data) == 4
    image, label = data.whole(3)
    assert image.shape == (1, 15, 10)
    pixels = np.asarray(Image.open(cases[3].files[0])).astype(np.float64)
    np.testing.assert_allclose(image[0], (pixels - pixels.mean()) / pixels.std(), atol=1e-5)
    np.testing.assert_array_equal(label, np.asarray(Image.open(cases[3].label)) == 255)
    # Zeros count: a black pixel is no background.
    assert (pixels == 0).any() == (image.numpy() == image.numpy().min()).any() or pixels.min() > 0
    slices = CaseSlices(cases[3], ("grey",))
    np.testing.assert_array_equal(slices.read(0, 1)[0], image)
    with pytest.raises(UserError, match="no slices along axis 0"):
        CaseSlices(cases[3], ("grey",), axis=0)


def test_black_pixels_are_values_like_others(tmp_path):
    pixels = np.array([[0, 0, 100], [0, 50, 100]], np.uint8)
    (case,) = cases_from_files([picture(tmp_path / "a.png", pixels)], ("grey",))
    image = CaseSlices(case, ("grey",)).read(0, 1)[0, 0]
    np.testing.assert_allclose(image, (pixels - pixels.mean()) / pixels.std(), rtol=1e-5)


def test_colour_images_and_colour_masks(tmp_path):
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)
    for index in range(2):
        picture(tmp_path / "images" / f"{index}.png", RGB)
        picture(tmp_path / "masks" / f"{index}.png", colours[RNG.integers(0, 3, (7, 5))])
    picture(tmp_path / "images" / "2.png", GREY)  # grey among colour
    with pytest.warns(DataWarning, match="grey and colour"):
        cases = discover_cases(tmp_path)
    assert list(cases[2].modalities) == ["red", "green", "blue"]
    assert cases[0].label_map.class_names == ("background", "#0000ff", "#ff0000")
    stored = np.asarray(Image.open(cases[0].label))
    classes = read_labels(cases[0].label, cases[0].label_map)[..., 0]
    np.testing.assert_array_equal(classes, (stored[..., 2] > 0) + 2 * (stored[..., 0] > 0))
    slices = CaseSlices(cases[2], ("red", "green", "blue"))
    assert slices.read(0, 1).shape == (1, 3, 7, 5)


@pytest.mark.parametrize(("values", "names"), [((0, 1), 2), ((0, 1, 2), 3), ((0, 100, 200), 3), ((10, 20), 2)])
def test_any_values_are_classes(tmp_path, values, names):
    table = discover_cases(folder_of(tmp_path, values=values))[0].label_map
    assert table.values == values
    assert len(table.class_names) == names
    assert table.class_names[0] == "background"


def test_masks_with_traces_of_jpeg(tmp_path):
    root = folder_of(tmp_path)
    mask = np.asarray(Image.open(root / "masks" / "cell_1.png")).copy()
    mask[0, 2:5] = [3, 250, 254]
    picture(root / "masks" / "cell_1.png", mask)
    big = np.zeros((200, 200), np.uint8)
    big[50:150, 50:150] = 255
    picture(root / "masks" / "cell_0.png", np.where(RNG.random((12, 10)) < 0.5, 0, 255).astype(np.uint8))
    picture(root / "images" / "big.png", big)
    picture(root / "masks" / "big.png", big)
    with pytest.raises(UserError, match=r"cell_1\.png: 3 of 5 values look like traces of JPEG.*3, 250, 254.*PNG"):
        discover_cases(root)
    (root / "masks" / "cell_1.png").unlink()
    (root / "masks" / "big.png").unlink()
    tilted = np.where(np.add.outer(np.arange(200), np.arange(200)) > 190, 255, 0).astype(np.uint8)
    picture(root / "masks" / "big.jpg", tilted, quality=60)
    with pytest.raises(UserError, match=r"big\.jpg: .*traces of JPEG compression"):
        discover_cases(root)


def test_masks_that_are_no_classes(tmp_path):
    numbered = picture(tmp_path / "a.png", np.arange(100, dtype=np.uint8).reshape(10, 10))
    with pytest.raises(UserError, match=r"100 different values .* numbers of single objects"):
        mask_table([numbered])
    with pytest.raises(UserError, match="every pixel of 1 masks is 7"):
        mask_table([picture(tmp_path / "b.png", np.full((4, 4), 7, np.uint8))])
    with pytest.raises(UserError, match=r"b\.tif holds values up to 16777217; those of a mask are below 16777216"):
        mask_table([picture(tmp_path / "b.tif", np.full((4, 4), (1 << 24) + 1, np.int32))])
    with pytest.raises(UserError, match=r"16 voxels are no whole numbers, such as 0\.5"):
        mask_table([picture(tmp_path / "c.tif", np.full((4, 4), 0.5, np.float32))])


def test_masks_that_fit_no_image(tmp_path):
    root = folder_of(tmp_path)
    extra = picture(root / "masks" / "other.png", GREY)
    with pytest.raises(UserError, match=r"other\.png has no image of that name"):
        discover_cases(root)
    extra.rename(root / "masks" / "cell_0_mask.png")
    with pytest.raises(UserError, match="are masks of one image"):
        discover_cases(root)


def test_mask_of_another_size(tmp_path):
    root = folder_of(tmp_path / "data")
    picture(root / "masks" / "cell_0.png", np.zeros((5, 5), np.uint8))
    with pytest.raises(UserError, match=r"differ in shape: \(12, 10, 1\) and \(5, 5, 1\)"):
        SliceDataset(discover_cases(root), cache_dir=tmp_path / "cache", modalities=("grey",), size=8)


def test_the_stacks_of_the_isbi_challenge(tmp_path):
    volume = RNG.integers(0, 256, (30, 16, 16)).astype(np.uint8)
    picture(tmp_path / "train-volume.tif", volume)
    picture(tmp_path / "train-labels.tif", ((volume > 100) * 255).astype(np.uint8))
    picture(tmp_path / "test-volume.tif", volume[:3], photometric="minisblack")
    test, train = discover_cases(tmp_path)
    assert (test.name, train.name) == ("test", "train")
    assert test.label is None
    split = split_cases([train], validation=0.2)
    assert [side[0].pages for side in split[:2]] == [(0, 24), (24, 30)]
    assert split.test == []
    data = SliceDataset(split.validation, cache_dir=tmp_path / "cache", modalities=("grey",))
    assert len(data) == 6
    np.testing.assert_array_equal(data[2][1], volume[26] > 100)
    slices = CaseSlices(train, ("grey",))
    result = slices.new_volume(np.uint8)
    for start, images in slices.batches(8):
        slices.place(result, start, (images[:, 0] > 0).astype(np.uint8))
    np.testing.assert_array_equal(result[..., 5], (volume[5] > volume.mean()))


def nnunet_images(root: Path, suffix: str, channels: dict, pixels: list[np.ndarray]) -> Path:
    for name in ("a", "b"):
        for index, channel in enumerate(pixels):
            picture(root / "imagesTr" / f"{name}_{index:04d}{suffix}", channel)
        picture(root / "labelsTr" / f"{name}{suffix}", RNG.integers(0, 2, (7, 5)).astype(np.uint8))
    table = {"channel_names": channels, "labels": {"background": 0, "road": 1}, "file_ending": suffix, "numTraining": 2}
    (root / "dataset.json").write_text(json.dumps(table))
    return root


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_nnunet_folders_of_images(tmp_path, suffix):
    cases = discover_cases(nnunet_images(tmp_path / "grey", suffix, {"0": "light", "1": "dye"}, [GREY, 255 - GREY]))
    slices = CaseSlices(cases[0], ("light", "dye"), normalise=False)
    np.testing.assert_array_equal(slices.read(0, 1)[0], [GREY, 255 - GREY])
    for number, channels in enumerate(({"0": "R", "1": "G", "2": "B"}, {"0": "RGB"})):
        cases = discover_cases(nnunet_images(tmp_path / f"{number}", suffix, channels, [RGB]))
        assert len(cases[0].modalities) == 3
        slices = CaseSlices(cases[1], tuple(cases[1].modalities), normalise=False)
        np.testing.assert_array_equal(slices.read(0, 1)[0], np.moveaxis(RGB, -1, 0))
        assert cases[0].label_map.class_names == ("background", "road")


def test_loose_images(tmp_path):
    files = [picture(tmp_path / f"{index}.png", GREY) for index in range(3)]
    cases = cases_from_files(files, ("grey",))
    assert [case.name for case in cases] == ["0", "1", "2"]
    colour = cases_from_files([picture(tmp_path / "c.png", RGB)], ("red", "green", "blue"))
    np.testing.assert_array_equal(
        CaseSlices(colour[0], ("red", "green", "blue"), normalise=False).read(0, 1)[0], np.moveaxis(RGB, -1, 0)
    )
