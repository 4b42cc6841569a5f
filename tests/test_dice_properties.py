"""What holds for the Dice functions whatever the input."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastunet.functional.dice import dice_cross_entropy
from fastunet.functional.dice_confusion import confusion_matrix
from tests.dice_cases import batch

images = st.tuples(st.integers(2, 6), st.integers(1, 9), st.integers(1, 3), st.integers(0, 10**6))


@settings(max_examples=40, deadline=None)
@given(images, st.permutations(range(6)))
def test_permuting_classes_permutes_the_sums(image, order):
    c, size, n, seed = image
    order = torch.tensor([i for i in order if i < c])
    logits, labels = batch(c, (size, size), n, seed=seed)
    renamed = torch.argsort(order)[labels.long()]
    for given_, other in ((logits, logits[:, order]), (logits.argmax(1), torch.argsort(order)[logits.argmax(1)])):
        matrix = confusion_matrix(given_, labels, c)
        assert torch.equal(confusion_matrix(other, renamed, c), matrix[order][:, order])
    for empty in ("smooth", "skip", "one"):
        got = dice_cross_entropy(logits[:, order], renamed, empty=empty)
        torch.testing.assert_close(got, dice_cross_entropy(logits, labels, empty=empty), rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(images, st.integers(0, 10**6))
def test_ignored_pixels_change_nothing(image, other_seed):
    c, size, n, seed = image
    logits, labels = batch(c, (size, size), n, seed=seed)
    labels[..., ::2] = 255
    changed = torch.where(labels[:, None] == 255, batch(c, (size, size), n, seed=other_seed)[0] * 10, logits)
    a, b = logits.requires_grad_(), changed.requires_grad_()
    losses = [dice_cross_entropy(z, labels, ignore_index=255) for z in (a, b)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    losses[1].backward()
    assert torch.equal(b.grad * (labels[:, None] == 255), torch.zeros_like(b))
    assert torch.equal(*(confusion_matrix(z, labels, c, ignore_index=255) for z in (a, b)))


@settings(max_examples=40, deadline=None)
@given(images, st.sampled_from(["smooth", "skip", "one"]))
def test_a_perfect_prediction_costs_nothing(image, empty):
    c, size, n, seed = image
    _, labels = batch(c, (size, size), n, seed=seed)
    logits = 1000 * F.one_hot(labels.long(), c).movedim(-1, 1).double()
    assert dice_cross_entropy(logits, labels, empty=empty).item() <= 1e-12


@settings(max_examples=40, deadline=None)
@given(images)
def test_sums_equal_the_pixel_count(image):
    c, size, n, seed = image
    logits, labels = batch(c, (size, size), n, seed=seed, dtype=torch.float32)
    sums = torch.ops.fastunet.dice_sums(logits.flatten(2), labels.flatten(1), None, None, True, True, 0.0, "torch")
    pixels = torch.full((n,), float(size * size))
    torch.testing.assert_close(sums[:, c : 2 * c].sum(1), pixels)
    assert torch.equal(sums[:, 2 * c : 3 * c].sum(1), pixels)
    assert torch.equal(sums[:, 3 * c + 1], pixels)
    assert confusion_matrix(logits, labels, c).sum() == n * size * size
