"""Labels of every dtype and form, soft targets, and labels that are none, in the Dice functions."""

import pytest
import torch
import torch.nn.functional as F

from fastunet.functional.dice import dice_coefficient, dice_cross_entropy, dice_loss
from fastunet.functional.dice_confusion import confusion_matrix
from fastunet.metrics import precision
from tests.dice_cases import LAYOUTS, batch

LABEL_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.float32, torch.float64,
]  # fmt: skip


@pytest.mark.parametrize("c", [1, 4])
@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
def test_label_dtypes_and_channel_axis(dtype, c):
    logits, labels = batch(c)
    labels = labels % 2 if dtype == torch.bool else labels
    forms = [labels.to(dtype), labels.to(dtype)[:, None]]
    p = logits.softmax(1) if c > 1 else logits.sigmoid()
    k = max(c, 2)
    for ignore_index in (None, -100):
        want = dice_cross_entropy(logits, labels, ignore_index=ignore_index)
        for given in forms:
            torch.testing.assert_close(dice_cross_entropy(logits, given, ignore_index=ignore_index), want)
            assert torch.equal(
                confusion_matrix(logits, given, k, ignore_index=ignore_index), confusion_matrix(logits, labels, k)
            )
    for given in forms:
        torch.testing.assert_close(dice_coefficient(p, given), dice_coefficient(p, labels))
        torch.testing.assert_close(precision(p, given), precision(p, labels))
        if not dtype.is_floating_point:
            assert torch.equal(confusion_matrix(given, labels, k), confusion_matrix(labels, labels, k))


@pytest.mark.parametrize("dtype, label, ignore_index", [
    (torch.uint8, 156, -100), (torch.int8, -1, 255), (torch.int16, 9, 65536 + 9), (torch.bool, True, 257),
])  # fmt: skip
def test_an_ignored_value_beyond_the_dtype_ignores_nothing(dtype, label, ignore_index):
    """PyTorch compares -100 with uint8 labels as 156."""
    logits, labels = batch(2)
    labels = (labels * 0).to(dtype)
    labels[0, 0, 0] = label
    if dtype == torch.bool:
        assert confusion_matrix(logits, labels, 2, ignore_index=ignore_index)[1].sum() == 1
        return
    for function in (dice_loss, lambda z, y, **options: confusion_matrix(z, y, 2, **options)):
        with pytest.raises(ValueError, match=f"1 labels are out of range, {label} among them"):
            function(logits, labels, ignore_index=ignore_index)


@pytest.mark.parametrize("c", [1, 3])
def test_labels_that_are_not_whole_numbers(c):
    logits, labels = batch(c)
    labels = labels.float()
    for value in (0.5, torch.nan, torch.inf, 1e20):
        labels[1, 2, 3] = value
        want = dice_cross_entropy(logits, torch.where(labels == labels[1, 2, 3], 9.0, labels).nan_to_num(9.0),
                                  check_labels=False)  # fmt: skip
        torch.testing.assert_close(dice_cross_entropy(logits, labels, check_labels=False), want)
        for function in (dice_loss, lambda z, y: confusion_matrix(z, y, max(c, 2)), dice_coefficient):
            with pytest.raises(ValueError, match="1 labels are neither whole numbers nor one-hot"):
                function(logits.sigmoid(), labels)
    compiled = torch.compile(dice_cross_entropy, backend="aot_eager", fullgraph=True)
    assert compiled(logits, labels).isnan()
    for wrong in (-0.5, 1.5, torch.nan):
        soft = logits.softmax(1)
        soft[0, 0].fill_(wrong)
        assert compiled(logits, soft).isnan()


def test_one_logit_takes_floating_labels_as_soft_targets_or_with_ignored_pixels_as_indices():
    logits, labels = batch(1)
    soft = torch.rand(3, 1, 7, 9)
    torch.testing.assert_close(
        dice_cross_entropy(logits, soft, dice_weight=0), F.binary_cross_entropy_with_logits(logits, soft.double())
    )
    labels[0, 0] = 255
    want = dice_cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(dice_cross_entropy(logits, labels.float()[:, None], ignore_index=255), want)
    with pytest.raises(ValueError, match="neither whole numbers"):
        dice_cross_entropy(logits, soft, ignore_index=255)
    with pytest.raises(ValueError, match=r"soft targets reach from 0.0 to 255.0; expected 0 to 1"):
        dice_cross_entropy(logits, labels.float()[:, None])


def test_one_hot_labels_in_the_confusion_matrix():
    logits, labels = batch(4)
    one_hot = F.one_hot(labels.long(), 4).movedim(-1, 1)
    for given in (one_hot, one_hot.bool(), one_hot.float(), one_hot.to(torch.uint8)):
        assert torch.equal(confusion_matrix(logits, given, 4), confusion_matrix(logits, labels, 4))
    for value in (0, 2, 0.5, torch.nan):
        wrong = one_hot.float()
        wrong[1, int(labels[1, 2, 3]), 2, 3] = value
        with pytest.raises(ValueError, match="1 labels are neither whole numbers nor one-hot"):
            confusion_matrix(logits, wrong, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_label_smoothing_of_soft_targets(layout, tiny_chunks):
    logits, _ = batch(4)
    logits = logits.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    targets = torch.randn(3, 4, 7, 9, dtype=torch.float64).softmax(1)
    got = dice_cross_entropy(logits, targets, dice_weight=0.0, label_smoothing=0.2)
    want = F.cross_entropy(logits, targets, label_smoothing=0.2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (got, want)), rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("c", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.uint8], ids=str)
def test_one_hot_targets_equal_labels(c, dtype):
    if c == 1 and dtype != torch.float64:
        pytest.skip("(N, 1, H, W) integers are labels")
    logits, labels = batch(c)
    one_hot = F.one_hot(labels.long(), max(c, 2)).movedim(-1, 1)[:, -c:].to(dtype)
    weights = torch.linspace(0.5, 2, max(c, 2))
    got = dice_cross_entropy(logits, one_hot, class_weights=weights)
    torch.testing.assert_close(got, dice_cross_entropy(logits, labels, class_weights=weights), rtol=1e-12, atol=0)


def test_soft_targets_equal_cross_entropy_of_probabilities():
    logits, _ = batch(4)
    targets = torch.randn(3, 4, 7, 9, dtype=torch.float64).softmax(1)
    got = dice_cross_entropy(logits, targets, dice_weight=0.0)
    torch.testing.assert_close(got, F.cross_entropy(logits, targets), rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [4, 200, -1])
def test_label_out_of_range_is_named(value):
    logits, labels = batch(4, labels=torch.int32)
    want = dice_cross_entropy(logits, torch.where(torch.arange(9) == 3, 255, labels), ignore_index=255)
    labels[..., 3] = value
    for function in (dice_loss, dice_cross_entropy, lambda z, y: confusion_matrix(z, y, 4)):
        with pytest.raises(ValueError, match=f"21 labels are out of range, {value} among them; expected 0 to 3"):
            function(logits, labels)
    torch.testing.assert_close(dice_cross_entropy(logits, labels, check_labels=False), want)
    with pytest.raises(ValueError, match=f"{value} among them"):
        dice_coefficient(logits.softmax(1), labels)
