"""The elastic deformation: smooth, by the source's measure, the same for a sample in any batch."""

from __future__ import annotations

import torch

from fastunet.data import Augmentation, augment
from fastunet.data.elastic import deform, displacements


def vectors(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


def test_displacements_are_those_of_the_grid_and_bicubic_between():
    grid = vectors(2)
    moved = displacements(grid, 401, 301)
    torch.testing.assert_close(moved[:, :, ::200, ::150], 10 * grid)
    # Half-way between knots cubic convolution (a = -3/4, edges repeated) weighs four of them by -3, 19, 19, -3 of 32.
    first, middle, last = (10 * grid[:, :, 0]).unbind(-1)
    expected = (-3 * first + 19 * first + 19 * middle - 3 * last) / 32
    torch.testing.assert_close(moved[:, :, 0, 75], expected, rtol=1e-4, atol=1e-4)


def test_small_images_are_moved_less_and_never_folded():
    moved = displacements(vectors(200), 64, 64)
    assert 2.5 < displacements(vectors(4000), 64, 64)[:, :, ::63, ::63].std() < 3.9  # 64 / 20
    down = 1 + moved[:, 0].diff(dim=1)
    right = 1 + moved[:, 1].diff(dim=2)
    assert min(down.min(), right.min()) > 0


def test_images_and_labels_are_seen_at_the_displaced_place():
    rows, columns = torch.meshgrid(torch.arange(300.0), torch.arange(260.0), indexing="ij")
    image = torch.stack([rows, columns])[None].double()
    labels = ((rows // 7 + columns // 5) % 3).to(torch.uint8)[None]
    grid = vectors(1, 3).double()
    moved = displacements(grid, 300, 260)
    seen, classes = deform(image, labels, grid)
    place = image + moved
    inside = ((place >= 0) & (place <= torch.tensor([299.0, 259.0]).view(1, 2, 1, 1))).all(1)[0]
    assert inside.float().mean() > 0.85
    torch.testing.assert_close(seen[..., inside], place[..., inside])
    # Half-way between two pixels either is the nearest.
    clear = inside & ((place - place.floor() - 0.5).abs() > 1e-6).all(1)[0]
    nearest = place.round().long()[0]
    assert torch.equal(classes[0][clear], labels[0][nearest[0][clear], nearest[1][clear]])
    reflected = place[0, 0].abs()
    outside = (place[0, 0] < 0) & (place[0, 1] >= 0) & (place[0, 1] <= 259)
    assert outside.any()
    torch.testing.assert_close(seen[0, 0][outside], reflected[outside])


def test_augmentation_deforms_images_by_default_and_weights_with_them():
    assert Augmentation.for_slices(images=True).elastic
    assert not Augmentation.for_slices(images=True, elastic=False).elastic
    assert not Augmentation.for_slices().elastic
    only = dict(flip=(), rotate=0.0, zoom=0.0, translate=0.0, probability=0.0, scale=0.0, shift=0.0, mirror=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 1, 40, 40, generator=generator) + 1
    labels = (images[:, 0] > 1.5).to(torch.uint8)
    options = dict(seed=1, epoch=2, options=Augmentation(**only, elastic=True))
    new, classes, weights = augment(images, labels, positions=[4, 5, 6], weights=images[:, 0], **options)
    assert (new - images).abs().amax((1, 2, 3)).min() > 0.1
    torch.testing.assert_close(weights, new[:, 0])  # moved alike
    assert not torch.equal(classes, labels)
    alone = augment(images[1:2], labels[1:2], positions=[5], **options)
    torch.testing.assert_close(alone[0], new[1:2])
    other = augment(images, labels, positions=[4, 5, 6], **(options | dict(epoch=3)))
    assert (other[0] - new).abs().max() > 0.1
    kept = augment(images, labels, positions=[4, 5, 6], seed=1, epoch=2, options=Augmentation(**only))
    torch.testing.assert_close(kept[0], images)
