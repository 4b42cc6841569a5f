from __future__ import annotations

import numpy as np
import pytest
import torch

from fastunet.data import Augmentation, augment

STILL = Augmentation(flip=(), turn=False, rotate=0, zoom=0, translate=0, scale=0, shift=0, gamma=0, noise=0)
BOTH = (-2, -1)


def make_batch(n: int, height: int = 32, width: int = 32, modalities: int = 2):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, modalities, height, width, generator=generator)
    images *= torch.rand(n, 1, height, width, generator=generator) > 0.3
    return images, torch.randint(0, 4, (n, height, width), dtype=torch.uint8, generator=generator)


def only(**changes) -> Augmentation:
    return Augmentation(**{**vars(STILL), **changes})


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("size", [(32, 32), (17, 31), (240, 240)])
def test_a_sample_does_not_depend_on_its_batch(size):
    images, labels = make_batch(8, *size)
    positions = np.arange(40, 48)
    whole = augment(images, labels, seed=3, epoch=2, positions=positions)
    for part in (slice(0, 4), slice(4, 8), slice(5, 6)):
        half = augment(images[part], labels[part], seed=3, epoch=2, positions=positions[part])
        assert equal(half, (whole[0][part], whole[1][part]))


def test_seed_epoch_and_position_each_matter():
    images, labels = (x.expand(4, *x.shape[1:]) for x in make_batch(1))
    seen = [
        augment(images, labels, seed=seed, epoch=epoch, positions=np.arange(start, start + 4))[0]
        for seed, epoch, start in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 4))
    ]
    samples = torch.cat(seen).flatten(1)
    assert len(samples.unique(dim=0)) == 16
    assert equal(
        augment(images, labels, seed=0, epoch=0, positions=range(4)),
        augment(images, labels, seed=0, epoch=0, positions=range(4)),
    )


def test_inputs_are_left_alone():
    images, labels = make_batch(4)
    before = images.clone(), labels.clone()
    augment(images, labels, seed=0, epoch=0, positions=range(4))
    assert equal(before, (images, labels))


def test_nothing_wanted_changes_nothing():
    images, labels = make_batch(4)
    changed, same = augment(images, labels, seed=0, epoch=0, positions=range(4), options=STILL)
    assert torch.equal(same, labels)
    torch.testing.assert_close(changed, images, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "kinds"), [(only(flip=BOTH), 4), (only(turn=True), 4), (only(flip=BOTH, turn=True), 8)]
)
def test_flips_and_turns_are_drawn_evenly(options, kinds):
    n = 400 * kinds
    labels = torch.arange(1, 10).view(1, 3, 3).expand(n, 3, 3)
    images, moved = augment(labels[:, None].double(), labels, seed=0, epoch=0, positions=range(n), options=options)
    torch.testing.assert_close(images[:, 0].round().long(), moved, rtol=0, atol=0)
    found, counts = moved.flatten(1).unique(dim=0, return_counts=True)
    square = labels[0]
    flips = [square, square.flip(0), square.flip(1), square.flip(0, 1)] if options.flip else [square]
    turns = range(4) if options.turn else [0]
    group = {tuple(torch.rot90(flipped, k).flatten().tolist()) for flipped in flips for k in turns}
    assert {tuple(row) for row in found.tolist()} == group
    assert len(found) == kinds
    assert (counts - 400).abs().max() < 100


def test_oblong_slices_are_flipped_but_not_turned():
    images, labels = make_batch(64, 5, 9)
    _, moved = augment(images, labels, seed=0, epoch=0, positions=range(64), options=only(flip=BOTH, turn=True))
    for before, after in zip(labels, moved):
        assert any(torch.equal(after, before.flip(axes)) for axes in ((), (0,), (1,), (0, 1)))


def test_image_and_label_move_together():
    labels = make_batch(32)[1] + 1
    images = labels[:, None].float().repeat(1, 2, 1, 1)
    moved_images, moved = augment(
        images, labels, seed=1, epoch=1, positions=range(32), options=only(flip=BOTH, turn=True)
    )
    torch.testing.assert_close(moved_images, moved[:, None].float().repeat(1, 2, 1, 1), rtol=0, atol=1e-6)


def test_scale_and_shift_stay_in_their_ranges():
    images, labels = make_batch(300)
    options = only(scale=0.2, shift=0.3)
    changed, _ = augment(images, labels, seed=0, epoch=0, positions=range(300), options=options)
    scales, shifts = [], []
    for before, after in zip(images.flatten(0, 1), changed.flatten(0, 1)):
        inside = before != 0
        x = torch.stack([before[inside], torch.ones_like(before[inside])], 1).double()
        line = torch.linalg.lstsq(x, after[inside].double()[:, None]).solution
        torch.testing.assert_close((x @ line)[:, 0].float(), after[inside], rtol=0, atol=2e-6)
        scales.append(line[0].item())
        shifts.append(line[1].item())
    assert 0.8 <= min(scales) < 0.82
    assert 1.18 < max(scales) <= 1.2
    assert -0.3 <= min(shifts) < -0.28
    assert 0.28 < max(shifts) <= 0.3
    # Each modality has its own.
    assert np.corrcoef(scales[::2], scales[1::2])[0, 1] < 0.2


def test_gamma_keeps_order_and_extremes():
    images, labels = make_batch(60)
    changed, _ = augment(images, labels, seed=0, epoch=0, positions=range(60), options=only(gamma=0.5, probability=0.6))
    curved = 0
    for before, after in zip(images, changed):
        same = torch.allclose(before, after, atol=1e-5)
        curved += not same
        for b, a in zip(before, after):
            inside = b != 0
            order = b[inside].argsort()
            assert (a[inside][order].diff() >= -1e-5).all()
            torch.testing.assert_close(a[inside].max(), b.max(), rtol=0, atol=1e-5)
            torch.testing.assert_close(a[inside].min(), b.min(), rtol=0, atol=1e-5)
    assert 25 <= curved <= 47


def test_noise_has_the_drawn_strength():
    images, labels = make_batch(200, 48, 48)
    changed, _ = augment(images, labels, seed=0, epoch=0, positions=range(200), options=only(noise=0.4))
    difference = torch.where(images != 0, changed - images, torch.nan)
    strengths = torch.stack([sample[~sample.isnan()].std() for sample in difference])
    means = torch.stack([sample[~sample.isnan()].mean() for sample in difference])
    noisy = strengths > 1e-4
    assert 70 <= noisy.sum() <= 130
    assert 0.36 < strengths.max() < 0.42
    assert 0.15 < strengths[noisy].mean() < 0.25
    assert means.abs().max() < 0.05
    # Two samples share no noise.
    a, b = difference[noisy][:2]
    both = ~a.isnan() & ~b.isnan()
    assert torch.corrcoef(torch.stack([a[both], b[both]]))[0, 1].abs() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_background_stays_and_dtypes_stay(dtype):
    images, labels = make_batch(16)
    options = Augmentation(flip=(), rotate=0, zoom=0, translate=0)
    changed, moved = augment(images.to(dtype), labels, seed=0, epoch=0, positions=range(16), options=options)
    assert changed.dtype == dtype
    assert moved.dtype == torch.uint8
    assert (changed[images == 0] == 0).all()
    assert torch.isfinite(changed).all()
    assert torch.equal(moved, labels)


def test_empty_slices_and_empty_batches():
    images, labels = torch.zeros(3, 2, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)
    changed, moved = augment(images, labels, seed=0, epoch=0, positions=range(3))
    assert torch.equal(changed, images)
    assert torch.equal(moved, labels)
    changed, moved = augment(images[:0], labels[:0], seed=0, epoch=0, positions=[])
    assert changed.shape == (0, 2, 8, 8)
    assert moved.shape == (0, 8, 8)


def test_constant_modalities_survive():
    images = torch.full((4, 2, 8, 8), 3.0)
    labels = torch.zeros(4, 8, 8, dtype=torch.uint8)
    changed, _ = augment(images, labels, seed=0, epoch=0, positions=range(4), options=only(gamma=0.5, probability=1))
    torch.testing.assert_close(changed, images)


def test_positions_must_match():
    images, labels = make_batch(4)
    with pytest.raises(ValueError, match=r"positions of shape \(3,\) given for 4 images"):
        augment(images, labels, seed=0, epoch=0, positions=range(3))


def disc(height: int, width: int, centre: tuple[float, float], radius: float) -> torch.Tensor:
    y, x = torch.arange(height)[:, None] - centre[0], torch.arange(width) - centre[1]
    return (y**2 + x**2 <= radius**2).to(torch.uint8)


def outline(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Area and centre of each sample's foreground."""
    weights = labels.double()
    area = weights.sum((1, 2))
    rows, columns = (weights.sum(axis) @ torch.arange(labels.shape[axis % 2 + 1]).double() for axis in (2, 1))
    return area, torch.stack([rows / area, columns / area], 1)


def test_rotations_zooms_and_moves_stay_in_their_ranges():
    """Two small discs: their distance gives the zoom, their direction the angle, their middle the move."""
    n, centre = 400, (30.0, 40.0)
    ends = [disc(61, 81, (30, 25), 4), disc(61, 81, (30, 55), 4)]
    labels = (ends[0] + 2 * ends[1]).expand(n, -1, -1)
    options = only(rotate=15, zoom=0.15, translate=0.05, probability=1)
    images, moved = augment(labels[:, None].float(), labels, seed=0, epoch=0, positions=range(n), options=options)
    (area, first), (_, second) = (outline(moved == k) for k in (1, 2))
    line = second - first
    zoom = line.norm(dim=1) / 30
    angle = torch.rad2deg(torch.atan2(line[:, 0], line[:, 1]))
    move = ((first + second) / 2 - torch.tensor(centre, dtype=torch.float64)) / torch.tensor([61.0, 81.0])
    moves = [(move[:, axis], 0.05, 0.01) for axis in (0, 1)]
    for values, limit, slack in ((zoom - 1, 0.15, 0.02), (angle, 15, 1), *moves):
        assert 0.9 * limit < values.max() < limit + slack
        assert -limit - slack < values.min() < -0.9 * limit
        assert abs(values.mean()) < 0.15 * limit
    assert ((area / ends[0].sum()).sqrt() / zoom - 1).abs().max() < 0.12
    # The image is interpolated between pixels, and moves with the labels.
    assert (images[:, 0] - moved).abs().flatten(1).quantile(0.95, dim=1).max() <= 0.5
    assert ((images > 0) & (images < 1)).any()


def test_labels_are_never_mixed_and_bits_of_samples_not_chosen_stay():
    images, labels = make_batch(64)
    labels = torch.where(labels == 1, 255, labels).to(torch.uint8)
    changed, moved = augment(images, labels, seed=0, epoch=0, positions=range(64), options=only(rotate=15, zoom=0.1))
    assert set(moved.unique().tolist()) <= {0, 2, 3, 255}
    same = (moved == labels).flatten(1).all(1)
    assert 20 <= same.sum() <= 44
    torch.testing.assert_close(changed[same], images[same], rtol=0, atol=2e-6)


@pytest.mark.parametrize("mirror", [False, True])
def test_what_comes_in_from_outside(mirror):
    images, labels = torch.ones(50, 1, 24, 40), torch.ones(50, 24, 40, dtype=torch.uint8)
    options = only(rotate=15, zoom=0.15, translate=0.1, mirror=mirror, probability=1)
    changed, moved = augment(images, labels, seed=0, epoch=0, positions=range(50), options=options)
    assert bool((moved == 1).all()) == mirror
    assert bool(((changed - 1).abs() < 1e-5).all()) == mirror
    assert ((changed[:, 0] >= 0.5 - 1e-5) == (moved == 1)).float().mean() > 0.99


def test_defaults_respect_anatomy():
    """Left and right are exchanged where slices show them; top and bottom, and quarters of a turn, when asked."""
    assert Augmentation.for_slices() == Augmentation()
    assert Augmentation.for_slices(axis=1).flip == (-2,)
    assert Augmentation.for_slices(axis=0).flip == ()
    for options in (Augmentation.for_slices(images=True), Augmentation.for_slices(turns=True)):
        assert options.flip == BOTH
        assert options.turn
    assert Augmentation.for_slices(images=True).mirror
    assert not Augmentation.for_slices(images=True, turns=False).turn
    labels = disc(32, 32, (8, 4), 3).expand(200, -1, -1)  # at the front, on one side
    _, moved = augment(labels[:, None].float(), labels, seed=0, epoch=0, positions=range(200))
    _, centres = outline(moved)
    assert (centres[:, 1] < 12).all()
    assert 70 < (centres[:, 0] > 16).sum() < 130


def test_a_share_of_the_samples_is_changed():
    """The others keep their bits."""
    images, labels = make_batch(200)
    whole = augment(images, labels, seed=1, epoch=3, positions=range(200))
    for share, least, most in ((0.0, 0, 0), (0.25, 30, 70), (0.5, 75, 125), (1.0, 200, 200)):
        changed, moved = augment(images, labels, seed=1, epoch=3, positions=range(200), share=share)
        touched = (changed != images).flatten(1).any(1)
        assert least <= touched.sum() <= most
        assert torch.equal(moved[~touched], labels[~touched])
        assert equal((changed[touched], moved[touched]), (whole[0][touched], whole[1][touched]))


def test_wrong_options_are_refused():
    for options in (dict(flip=(0,)), dict(zoom=1.0)):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
            Augmentation(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_batch_stays_on_its_device():
    images, labels = (x.cuda() for x in make_batch(8))
    whole = augment(images, labels, seed=0, epoch=0, positions=range(8))
    half = augment(images[4:], labels[4:], seed=0, epoch=0, positions=range(4, 8))
    assert whole[0].device == images.device
    assert equal(half, (whole[0][4:], whole[1][4:]))
    moved = augment(images.cpu(), labels.cpu(), seed=0, epoch=0, positions=range(8))[1]
    assert torch.equal(whole[1].cpu(), moved)
