"""The chunks in which a CPU walks a batch: that they change nothing, and what memory they need."""

import pytest
import torch
import torch.nn.functional as F

from fastunet.functional import dice_confusion, dice_cpu
from fastunet.functional.dice import dice_cross_entropy, dice_loss
from tests.dice_cases import batch, check_within_budget, literal
from tests.tolerance import assert_within_budget


@pytest.mark.parametrize("ignore", [None, 2])
@pytest.mark.parametrize("c", [1, 4])
def test_chunks_of_several_images(c, ignore, monkeypatch):
    """Two images a chunk, and the fifth alone; beside one image a chunk."""
    logits, labels = batch(c, n=5)
    labels[1] = 0
    found = []
    for images in (1, 2):
        pixel_bytes = 4 * max(c, 2) * 7 * 9
        monkeypatch.setattr(dice_cpu, "_CHUNK_BYTES", images * pixel_bytes // max(1, torch.get_num_threads() // 2))
        flat, targets, leaf = logits.flatten(2), labels.flatten(1), logits.clone().requires_grad_()
        loss = dice_cross_entropy(leaf, labels, ignore_index=ignore, reduction="sample")
        gradient = torch.autograd.grad(loss, leaf)[0]
        sums = dice_cpu.sums(flat, targets, None, ignore, True, True)
        found.append((sums, gradient, dice_confusion.confusion(flat, targets, max(c, 2), ignore)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [(40, 50), (7, 9)], ids=["parts of images", "several images"])
@pytest.mark.parametrize("labels", ["all count", "some ignored", "soft"])
@pytest.mark.parametrize("loss", [dice_loss, dice_cross_entropy], ids=["dice", "dice + cross-entropy"])
def test_kept_probabilities_become_the_same_gradient(loss, labels, size, monkeypatch):
    """The first backward pass overwrites what the forward pass kept; a second one computes it again, bit by bit."""
    monkeypatch.setattr(dice_cpu, "_CHUNK_BYTES", 4 * 4 * 150)
    logits, targets = batch(4, size, n=5, dtype=torch.float32)
    if labels == "some ignored":
        targets[:, ::3] = 255
    if labels == "soft":
        targets = torch.rand(logits.shape).softmax(1)
    options = dict(ignore_index=255 if labels == "some ignored" else None, class_weights=torch.tensor([1.0, 2, 3, 4]))
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, targets, **options)
    first = torch.autograd.grad(value, leaf, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(value, leaf, retain_graph=True)[0])
    with torch.no_grad():
        torch.testing.assert_close(loss(leaf, targets, **options), value, rtol=0, atol=0)


def test_probabilities_are_kept_only_where_a_gradient_takes_their_place():
    logits = torch.randn(2, 4, 9)
    assert dice_cpu.room_for_probabilities(logits).shape == logits.shape
    for other in (logits.half(), logits[:, :1].contiguous(), logits.transpose(1, 2).contiguous().transpose(1, 2)):
        assert dice_cpu.room_for_probabilities(other) is None


@pytest.mark.parametrize("gap", [60.0, 80.0, 95.0, 150.0])
def test_cross_entropy_of_true_classes_that_are_all_but_impossible(gap):
    """Where the true class's probability has few digits or none in float32, its logarithm still has them all."""
    logits, labels = batch(3, (20, 20), dtype=torch.float32)
    logits[:, 0, :10] += gap
    labels[:, :10] = 1
    check_within_budget(logits, lambda z: dice_cross_entropy(z, labels), lambda z: literal(z, labels))


def test_confident_predictions_keep_their_small_cross_entropy():
    """Of probabilities next to 1, which round to multiples of 6e-8, as PyTorch's log_softmax does."""
    logits, labels = batch(4, (64, 64), dtype=torch.float32)
    logits += 12 * F.one_hot(labels.long(), 4).movedim(-1, 1)
    ours = dice_cross_entropy(logits, labels, dice_weight=0)
    assert_within_budget(ours, F.cross_entropy(logits, labels.long()), F.cross_entropy(logits.double(), labels.long()))


def test_a_batch_of_large_images_in_float16():
    """More than half a million pixels, of which float16 counts 65,504: finite, and right."""
    logits, labels = batch(2, (512, 512), n=2, dtype=torch.float16)
    leaf, exact = logits.requires_grad_(), logits.detach().double().requires_grad_()
    loss, expected = dice_cross_entropy(leaf, labels), literal(exact, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    scale = 2.0**16  # as GradScaler: the gradient of one pixel is below float16's range
    (loss * scale).backward()
    (expected * scale).backward()
    assert (leaf.grad - exact.grad).abs().max() <= 2**-10 * exact.grad.abs().max()


def test_no_full_size_tensor_beside_the_gradient(monkeypatch):
    """The sums allocate chunks only; the gradient allocates chunks and itself."""
    logits, labels = batch(4, (600, 600), n=2, dtype=torch.float32)
    logits, labels = logits.flatten(2), labels.flatten(1)
    given_, sizes = {logits.untyped_storage().data_ptr(), labels.untyped_storage().data_ptr()}, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given_:
                sizes.append(out.untyped_storage().nbytes())
            return out

    monkeypatch.setattr(dice_cpu, "_CHUNK_BYTES", 64 * 1024)
    chunks = 4 * dice_cpu._CHUNK_BYTES * max(1, torch.get_num_threads() // 2)
    assert chunks < logits.numel() * 4
    with Watch():
        dice_cpu.sums(logits, labels, None, None, True, True)
    assert max(sizes) <= chunks
    with Watch():
        dice_cpu.sums_grad(torch.ones(()), torch.ones(2, 15), logits, labels, None, None, True)
    assert sorted(set(sizes))[-1] == logits.numel() * 4
    assert sorted(set(sizes))[-2] <= chunks
