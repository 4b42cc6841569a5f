"""Tiles of images: each pixel is validated once, tiles at random places depend on their position alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastunet.architecture import Architecture
from fastunet.data import IGNORED, TileDataset, discover_cases
from fastunet.data.sampling import Batch
from fastunet.errors import UserError
from fastunet.training.plan import tile_sides

SIZES = [(7, 30), (25, 25), (40, 17)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images whose pixels are all different within an image, and masks with one object at the lower right."""
    root = tmp_path_factory.mktemp("images")
    for name in ("images", "masks"):
        (root / name).mkdir()
    for index, (height, width) in enumerate(SIZES):
        pixels = np.arange(height * width, dtype=np.uint16).reshape(height, width)
        mask = np.zeros((height, width), np.uint8)
        mask[-3:, -2:] = 255
        Image.fromarray(pixels).save(root / "images" / f"{index}.png")
        Image.fromarray(mask).save(root / "masks" / f"{index}.png")
    return root


def tiles(folder: Path, cache: Path, **options) -> TileDataset:
    options = dict(size=16, output=10, normalise=False, modalities=("grey",)) | options
    return TileDataset(discover_cases(folder), cache_dir=cache, **options)


def mirrored(index: int, pad: int) -> np.ndarray:
    height, width = SIZES[index]
    return np.pad(np.arange(height * width).reshape(height, width), pad, mode="reflect")


def test_tiles_cover_every_image_once_with_mirrored_borders(folder, tmp_path):
    data = tiles(folder, tmp_path)
    images, labels = data.load(range(len(data)))
    assert len(data) == 1 * 3 + 3 * 3 + 4 * 2
    assert images.shape == (20, 1, 16, 16)
    assert (labels[:, :3] == IGNORED).all()  # the border, which valid convolutions consume
    for index, (height, width) in enumerate(SIZES):
        mine = data.case_index == index
        counted = images[mine, 0][labels[mine] != IGNORED]
        assert sorted(counted.tolist()) == list(range(height * width))
        objects = images[mine, 0][labels[mine] == 1]
        expected = np.arange(height * width).reshape(height, width)[-3:, -2:]
        assert sorted(objects.tolist()) == sorted(expected.ravel().tolist())
    first = mirrored(0, 20)
    np.testing.assert_array_equal(images[2, 0], first[17:33, 37:53])  # the third tile of the first image


def test_random_tiles_follow_from_seed_epoch_and_position(folder, tmp_path):
    data = tiles(folder, tmp_path, random=True, seed=5)
    images, labels = data.read(Batch(0, np.arange(20), np.arange(20), epoch=3))
    alone, _ = data.read(Batch(9, np.array([7]), np.array([7]), epoch=3))
    assert torch.equal(alone[0], images[7])
    other, _ = data.read(Batch(0, np.arange(20), np.arange(20), epoch=4))
    assert not torch.equal(other, images)
    for image, label, index in zip(images[:, 0].numpy(), labels.numpy(), data.case_index):
        whole = mirrored(index, 29)
        height, width = SIZES[index]
        found = {
            (row, column)
            for row in range(min(height - 10, 0), max(height - 10, 0) + 1)
            for column in range(min(width - 10, 0), max(width - 10, 0) + 1)
            if np.array_equal(image, whole[row + 26 : row + 42, column + 26 : column + 42])
        }
        assert found
        truth = np.zeros((height, width), np.uint8)
        truth[-3:, -2:] = 1
        truth = np.pad(truth, 29, mode="reflect")
        assert any(np.array_equal(label, truth[r + 26 : r + 42, c + 26 : c + 42]) for r, c in found)


def test_the_share_of_tiles_with_foreground(folder, tmp_path):
    def share(fraction: float) -> float:
        data = tiles(folder, tmp_path, random=True, size=8, output=4, foreground_fraction=fraction)
        _, labels = data.read(Batch(0, np.arange(300), np.arange(300) % len(data)))
        return (labels[:, 2:6, 2:6] == 1).any((1, 2)).float().mean().item()

    assert share(1.0) == 1
    assert share(0.0) < 0.2 < 0.5 < share(0.6)


def test_the_order_hands_its_epoch_on(folder, tmp_path):
    data = tiles(folder, tmp_path, random=True)
    assert {batch.epoch for batch in data.batches(4, 2)} == {2}


@pytest.mark.parametrize(
    ("network", "smallest", "sides"),
    [
        (dict(padding="valid", up="transpose"), 512, (572, 388)),
        (dict(padding="valid", up="transpose"), 128, (316, 132)),
        (dict(padding="valid", up="transpose", depth=2), 3, (44, 4)),
        (dict(), 1000, (512, 512)),
        (dict(), 300, (288, 288)),
        (dict(), 9, (9, 9)),
    ],
)
def test_sides_of_the_tiles(network, smallest, sides):
    assert tile_sides(Architecture(**network), None, [smallest]) == sides


def test_a_side_that_does_not_fit():
    valid = Architecture(padding="valid", up="transpose")
    assert tile_sides(valid, 252, [512]) == (252, 68)
    with pytest.raises(UserError, match="nearest sizes that fit, for height 512: 508 or 524"):
        tile_sides(valid, 512, [512])


def test_a_tiny_image_does_not_decide_on_the_tiles_of_large_ones():
    assert tile_sides(Architecture(in_channels=1, num_classes=2, depth=4), None, [1, 300, 256, 260, 300]) == (128, 128)
