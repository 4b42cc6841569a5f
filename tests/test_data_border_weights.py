"""The weights of gaps between objects, against distances computed one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastunet.data import TileDataset, discover_cases
from fastunet.data.border_weights import border_term, components
from fastunet.data.sampling import Batch
from fastunet.functional.weighted_cross_entropy import weighted_cross_entropy
from fastunet.losses import DiceCrossEntropyLoss
from tests.cli_helpers import assert_user_error, run
from tests.test_segmentation_images import TINY, image_folder

RNG = np.random.default_rng(4)


def flood(foreground: np.ndarray) -> list[np.ndarray]:
    """The parts of ``foreground`` as pixel lists, by walking."""
    left = set(zip(*map(list, np.nonzero(foreground))))
    parts = []
    while left:
        stack, part = [left.pop()], []
        while stack:
            row, column = stack.pop()
            part.append((row, column))
            for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        parts.append(np.array(part))
    return parts


def spiral(side: int) -> np.ndarray:
    """One winding path, the worst case for numbers handed from pixel to pixel."""
    path = np.zeros((side, side), bool)
    for k in range(0, side // 2, 2):
        end = side - 1 - k
        path[k, max(k - 1, 0) : end + 1] = path[k : end + 1, end] = path[end, k : end + 1] = True
        path[k + 2 : end + 1, k] = True
    return path


@pytest.mark.parametrize("foreground", [
    RNG.random((30, 41)) < 0.4, RNG.random((40, 40)) < 0.6, RNG.random((1, 50)) < 0.5, spiral(41),
    np.zeros((5, 6), bool), np.ones((5, 6), bool),
])  # fmt: skip
def test_components_are_those_of_a_flood(foreground):
    numbers, count = components(foreground)
    parts = flood(foreground)
    assert count == len(parts)
    assert ((numbers > 0) == foreground).all()
    for part in parts:
        assert len(np.unique(numbers[part[:, 0], part[:, 1]])) == 1
    assert len(np.unique(numbers[foreground])) == len(parts)


@pytest.mark.parametrize("share", [0.004, 0.02, 0.3])
def test_the_formula(share):
    classes = (RNG.random((48, 70)) < share).astype(np.uint8)
    classes[10:16, 20:31] = 2  # an object of another class counts as well
    classes[30:33, 50:60] = 255
    places = np.stack(np.indices(classes.shape), -1)
    distances = np.stack([
        np.sqrt(((places[:, :, None] - part) ** 2).sum(-1)).min(-1) for part in flood((classes > 0) & (classes < 255))
    ])  # fmt: skip
    first, second = np.sort(distances, axis=0)[:2]
    expected = np.where(classes == 0, 10 * np.exp(-((first + second) ** 2) / (2 * 5**2)), 0)
    assert expected.max() > 1
    np.testing.assert_allclose(border_term(classes), expected, atol=1e-4)


def test_fewer_than_two_objects_weigh_nothing():
    classes = np.zeros((20, 20), np.uint8)
    assert not border_term(classes).any()
    classes[3:9, 4:8] = 1
    assert not border_term(classes).any()


def test_tiles_carry_the_term_of_the_whole_image(tmp_path):
    cases = discover_cases(image_folder(tmp_path / "data"))
    options = dict(cache_dir=tmp_path / "cache", modalities=("grey",), size=24, output=16, random=True)
    data, plain = TileDataset(cases, border=True, **options), TileDataset(cases, **options)
    batch = Batch(0, np.arange(len(data)), np.arange(len(data)))
    images, labels, border = data.read(batch)
    assert all(torch.equal(one, two) for one, two in zip(plain.read(batch), (images, labels)))
    assert border.shape == labels.shape
    assert (border[labels == 0] > 0).any()
    assert not border[labels == 1].any()
    _, _, border = data.load([0])
    whole = border_term(plain.whole(0)[1].numpy())
    np.testing.assert_array_equal(border[0, 4:20, 4:20], whole[:16, :16])
    assert len(data[0]) == 3


def test_the_option(tmp_path, phantoms, capsys):
    data = image_folder(tmp_path / "data")
    line = ["train", data, "--border-weights", "--preset", "isbi", *TINY]
    assert run(*line, "--class-weights", "1,2", "--out", tmp_path / "run") == 0
    assert_user_error(capsys, run(*line, "--out", tmp_path / "b", "--loss", "dice"), "--border-weights", "dice lacks")
    volumes = ["train", phantoms, "--out", tmp_path / "c", "--border-weights", *TINY]
    assert_user_error(capsys, run(*volumes), "--border-weights is for 2-D images")
    for option in ("--elastic", "--turns"):
        off = [option, "--no-augment"]
        assert_user_error(capsys, run(*line, "--out", tmp_path / "d", *off), f"{option} is part of the augmentation")


def batch_of_pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(0, 3, (2, 6, 7), generator=generator).to(torch.uint8)
    labels[0, 0] = 255
    return logits, labels, torch.rand(2, 6, 7, dtype=torch.float64, generator=generator)


def test_the_weighted_cross_entropy():
    logits, labels, weights = batch_of_pixels()
    log_p, total, mass = logits.detach().log_softmax(1), 0.0, 0.0
    for n in range(2):
        for i in range(6):
            for j in range(7):
                if labels[n, i, j] != 255:
                    total -= weights[n, i, j] * log_p[n, int(labels[n, i, j]), i, j]
                    mass += weights[n, i, j]
    found = weighted_cross_entropy(logits, labels, weights, ignore_index=255)
    torch.testing.assert_close(found.detach(), total / mass)
    assert torch.autograd.gradcheck(lambda x: weighted_cross_entropy(x, labels, weights, ignore_index=255), logits)
    assert weighted_cross_entropy(logits, labels, torch.zeros_like(weights)) == 0


def test_equal_weights_are_the_fused_loss_and_class_weights_a_case_of_pixel_weights():
    logits, labels, _ = batch_of_pixels()
    loss = DiceCrossEntropyLoss(ignore_index=255, label_smoothing=0.1, ce_weight=0.7)
    torch.testing.assert_close(loss(logits, labels, torch.full(labels.shape, 2.5)), loss(logits, labels))
    factors = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    loss = DiceCrossEntropyLoss(ignore_index=255, class_weights=factors)
    of_pixels = factors[labels.long().clamp(max=2)]
    torch.testing.assert_close(loss(logits, labels, of_pixels), loss(logits, labels), rtol=1e-6, atol=1e-6)


def test_weights_that_do_not_fit():
    logits, labels, weights = batch_of_pixels()
    with pytest.raises(ValueError, match=r"pixel_weights have shape \(2, 6, 6\); expected \(2, 6, 7\)"):
        weighted_cross_entropy(logits, labels, weights[..., :6])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("form", [
    lambda y, hot: y.float(), lambda y, hot: y[:, None], lambda y, hot: y[:, None].double(), lambda y, hot: hot,
    lambda y, hot: hot.bool(), lambda y, hot: hot.double(), lambda y, hot: 0.8 * hot + 0.05,
])  # fmt: skip
@pytest.mark.parametrize("classes", [3, 1])
def test_pixel_weights_take_labels_in_every_form(classes, form, smoothing):
    logits, labels, weights = batch_of_pixels()
    logits, labels = logits[:, :classes], labels % max(classes, 2)
    hot = torch.nn.functional.one_hot(labels.long()).movedim(3, 1) if classes > 1 else labels[:, None]
    loss, labels = DiceCrossEntropyLoss(label_smoothing=smoothing), form(labels, hot)
    ones = torch.full_like(weights, 2.5)
    got, want = loss(logits, labels, ones[:, None]), loss(logits, labels)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(got, logits), torch.autograd.grad(want, logits)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    if labels.shape[1] == classes:
        return
    plain = loss(logits, labels.reshape(weights.shape).long(), weights)
    torch.testing.assert_close(loss(logits, labels, weights), plain)
