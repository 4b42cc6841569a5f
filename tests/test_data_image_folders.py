"""Folders of 2-D images beside masks, nnU-Net folders of images, stacks with masks, and loose files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from fastunet.data import CaseSlices, SliceDataset, cases_from_files, discover_cases, read_labels, split_cases
from fastunet.data.masks import mask_table
from fastunet.errors import DataWarning, UserError
from tests.image_data import GREY, RGB, RNG, folder_of, picture

pytestmark = pytest.mark.usefixtures("nothing_said")


@pytest.mark.parametrize("masks", ["masks", "labels", "annotations", "Masks", "GT"])
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
    with pytest.raises(UserError, match=r"holds no cases itself: give .*train"):
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


@pytest.mark.parametrize("method", [Image.Resampling.BILINEAR, Image.Resampling.LANCZOS, Image.Resampling.BOX])
@pytest.mark.parametrize("side", [32, 45, 96, 128])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_masks_that_were_smoothed_or_resampled(tmp_path, method, side, mode):
    rows, columns = np.mgrid[:64, :64]
    circle = Image.fromarray(np.where((rows - 30) ** 2 + (columns - 25) ** 2 < 150, 255, 0).astype(np.uint8))
    black = Image.new("L", circle.size)
    painted = circle if mode == "L" else Image.merge("RGB", [circle, black, ImageOps.invert(circle)])
    line = np.where(np.asarray(circle.filter(ImageFilter.MaxFilter(3))) > np.asarray(circle), 128, np.asarray(circle))
    folder_of(tmp_path, count=1)
    mask = picture(tmp_path / "masks" / "cell_0.png", line)
    assert mask_table([mask]).values == (0, 128, 255), "a line between classes is a class"
    painted.resize((side, side), Image.Resampling.NEAREST).save(mask)
    assert len(mask_table([mask]).values) == 2
    painted.resize((side, side), method).save(mask)
    if len(np.unique(np.asarray(painted.resize((side, side), method)).reshape(side * side, -1), axis=0)) > 2:
        advice = "above 127 / below" if mode == "L" and method != Image.Resampling.LANCZOS else "nearest painted value"
        with pytest.raises(UserError, match=rf"cell_0\.png: .* only lie between others.*\({advice}\)"):
            mask_table([mask])


def test_masks_that_number_the_object_in_two_ways(tmp_path):
    root = folder_of(tmp_path)
    mask = root / "masks" / "cell_1.png"
    picture(mask, (np.asarray(Image.open(mask)) == 255).astype(np.uint8))
    with pytest.raises(UserError, match=r"cell_1\.png paints the object as 1 and .*cell_0\.png as 255"):
        discover_cases(root)


def test_masks_that_are_no_classes(tmp_path):
    numbered = picture(tmp_path / "a.png", np.arange(100, dtype=np.uint8).reshape(10, 10))
    with pytest.raises(UserError, match=r"100 different values .* numbers of single objects.*: paint .* NAME_1\.png"):
        mask_table([numbered])
    small = np.zeros((60, 60), np.uint16)  # objects so small that the background has most pixels
    small[::8, ::8] = np.arange(1, 65).reshape(8, 8)
    with pytest.raises(UserError, match=r"65 different values .* numbers of single objects"):
        mask_table([picture(tmp_path / "a.tif", small)])
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


@pytest.mark.parametrize("part", ["images", "masks"])
def test_folders_of_files_that_are_no_images(tmp_path, part):
    root = folder_of(tmp_path)
    for path in (root / part).iterdir():
        path.rename(path.with_suffix(".webp"))
    with pytest.raises(UserError, match=rf"{part} holds no file that can be read, but cell_0\.webp: convert it;"):
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
