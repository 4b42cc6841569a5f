"""The Dice functions on a CPU: values, gradients, options and errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastunet.functional.dice import dice_coefficient, dice_cross_entropy, dice_loss
from fastunet.functional.dice_confusion import confusion_matrix
from tests.dice_cases import LAYOUTS, OPTIONS, arguments, batch, check_exactly, check_within_budget, literal


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("c", [1, 2, 4, 7])
def test_equals_the_eager_loss(c, options, layout, tiny_chunks):
    if c == 1 and options.get("include_background") is False:
        pytest.skip("one logit has no background class")
    logits, labels = batch(c)
    labels[0, 2] = 255 if "ignore" in options else 0
    if options.get("ignore") == 1:
        labels[labels == 255] = 1
    labels[1] = 0  # a sample without foreground
    logits = logits.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    theirs, ours = arguments(options, max(c, 2), torch.float64)
    loss, expected = dice_cross_entropy(logits, labels, **ours), literal(logits, labels, **theirs)
    check_exactly(logits, loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_stays_within_budget(dtype, tiny_chunks):
    logits, labels = batch(4, (40, 50), dtype=dtype)
    check_within_budget(logits, lambda z: dice_cross_entropy(z, labels), lambda z: literal(z, labels))


def test_volumes_and_sequences_of_pixels():
    logits, labels = batch(3, (4, 5, 6))
    want = dice_cross_entropy(logits, labels)
    torch.testing.assert_close(dice_cross_entropy(logits.flatten(2), labels.flatten(1)), want, rtol=1e-12, atol=0)
    strided = torch.stack([logits, logits], -1)[..., 0]
    torch.testing.assert_close(dice_cross_entropy(strided, labels), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("c", [1, 3])
def test_gradcheck(c, tiny_chunks):
    logits, labels = batch(c, (3, 4), n=2)
    labels[0, 0] = 255
    options = dict(ignore_index=255, class_weights=torch.linspace(0.5, 2, max(c, 2), dtype=torch.float64))
    for smoothing in (0.0, 0.2):
        options["label_smoothing"] = smoothing
        assert torch.autograd.gradcheck(lambda z: dice_cross_entropy(z, labels, **options), logits.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda z: dice_cross_entropy(z, labels, **options), logits, fast_mode=True)
    soft = torch.rand(2, c, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: dice_cross_entropy(z, soft), logits)


def test_opcheck():
    logits, labels = batch(4, dtype=torch.float32)
    flat, pixels = logits.flatten(2), labels.flatten(1)
    torch.library.opcheck(torch.ops.fastunet.dice_sums, (flat, pixels, None, 255, True, False, 0.1, "torch"))
    slopes, grad = torch.randn(3, 15), torch.randn(())
    arguments = (grad, slopes, flat, pixels, torch.rand(4), None, True, 0.1, "torch")
    torch.library.opcheck(torch.ops.fastunet.dice_sums_grad, arguments)
    rule = (torch.rand(3, 15), torch.rand(4), 1.0, "skip", False, 1.0, 0.5, False, 0.3, 0.7, "torch")
    torch.library.opcheck(torch.ops.fastunet.dice_rule, rule)
    torch.library.opcheck(torch.ops.fastunet.confusion_counts, (flat, pixels, 4, None, "torch"))


def test_compiles_to_one_graph():
    logits, labels = batch(4, dtype=torch.float32)

    def step(z, y):
        return dice_cross_entropy(z, y, empty="skip", reduction="sample"), confusion_matrix(z, y, 4)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (loss, counts), (want, want_counts) = compiled(a, labels), step(b, labels)
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss, want)
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(counts, want_counts)
    labels[0, 0, 0] = 9
    assert compiled(logits, labels)[0].isnan()


def test_repeats_are_bit_identical(tiny_chunks):
    logits, labels = batch(4, dtype=torch.float32)
    losses = [dice_cross_entropy(logits.requires_grad_(), labels) for _ in range(2)]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


def test_half_precision_beyond_its_range():
    """More pixels than float16 counts (65,504), under autocast: finite, and right to float16's rounding of logits."""
    logits, labels = batch(2, (600, 500), n=1, dtype=torch.float16)
    labels.zero_()
    leaf = logits.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = dice_cross_entropy(leaf, labels)
    loss.backward()
    wide = logits.double().requires_grad_()
    expected = literal(wide, labels)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    scale = wide.grad.abs().max()
    assert (leaf.grad.double() - wide.grad).abs().max() <= max(2e-3 * scale, 2**-24)


def test_extreme_logits():
    logits = torch.tensor([[[[1e4, -1e4]], [[-1e4, 1e4]]]], requires_grad=True)
    loss = dice_cross_entropy(logits, torch.tensor([[[1, 1]]]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    impossible = torch.tensor([[[[0.0]], [[0.0]], [[-torch.inf]]]])
    torch.testing.assert_close(
        dice_cross_entropy(impossible, torch.tensor([[[0]]]), dice_weight=0), torch.tensor(2.0).log()
    )
    assert dice_cross_entropy(impossible, torch.tensor([[[2]]])) == torch.inf
    assert dice_cross_entropy(impossible * torch.nan, torch.tensor([[[2]]])).isnan()


@pytest.mark.parametrize("empty, expected", [("smooth", 1 - 1 / (1 + 8 * 0.5)), ("skip", 0.0), ("one", 1.0)])
def test_slice_without_foreground(empty, expected):
    """Class 1 is absent and predicted with 0.5 at eight pixels: the table of docs/losses.md."""
    logits = torch.zeros(1, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.zeros(1, 2, 4, dtype=torch.uint8)
    loss = dice_loss(logits, labels, include_background=False, empty=empty)
    assert loss.item() == pytest.approx(expected, abs=1e-15)
    loss.backward()
    if empty == "smooth":
        # d(1 - s / (P + s)) / dp = s / (P + s)^2 = 1 / 25, times p (1 - p): pushes the false positives down
        torch.testing.assert_close(logits.grad[:, 1], torch.full((1, 2, 4), 0.25 / 25, dtype=torch.float64))
    else:
        assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("empty, expected", [("smooth", 0.0), ("skip", 0.0), ("one", 0.0)])
def test_empty_prediction_of_an_empty_class(empty, expected):
    logits = torch.tensor([[[[900.0]], [[-900.0]]]], dtype=torch.float64)
    loss = dice_loss(logits, torch.tensor([[[0]]]), include_background=False, empty=empty)
    assert loss.item() == expected


def test_everything_ignored():
    logits, labels = batch(4)
    leaf = logits.requires_grad_()
    loss = dice_cross_entropy(leaf, torch.full_like(labels, 255), ignore_index=255, empty="skip")
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_empty_batch():
    loss = dice_cross_entropy(torch.zeros(0, 4, 8, 8, requires_grad=True), torch.zeros(0, 8, 8, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0


def test_bad_arguments_are_named():
    logits, labels = batch(4)
    cases = [
        (dict(empty="none"), "empty is 'none'"),
        (dict(smooth=0.0), "smooth is 0.0"),
        (dict(tversky=(0.0, 0.0)), r"tversky is \(0.0, 0.0\); expected two numbers"),
        (dict(tversky=(-1.0, 2.0)), r"tversky is \(-1.0, 2.0\)"),
        (dict(tversky=(0.5, float("nan"))), r"tversky is \(0.5, nan\)"),
        (dict(smooth=-1.0, empty="skip"), "smooth is -1.0"),
        (dict(reduction="mean"), "reduction is 'mean'"),
        (dict(grad_reduction="max"), "grad_reduction is 'max'"),
        (dict(sync=True, reduction="sample"), "needs reduction='batch'"),
        (dict(class_weights=torch.ones(3)), r"class_weights have shape \(3,\); expected \(4,\)"),
        (dict(label_smoothing=1.5), "label_smoothing is 1.5; expected 0 to 1"),
        (dict(label_smoothing=0.1, ce_weight=0), "label_smoothing=0.1 acts on the cross-entropy"),
        (dict(backend="cuda"), "backend is 'cuda'"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            dice_cross_entropy(logits, labels, **options)
    with pytest.raises(ValueError, match=r"labels have shape \(3, 7, 8\)"):
        dice_loss(logits, labels[..., 1:])
    with pytest.raises(ValueError, match=r"logits have shape \(3, 200, 7, 9\)"):
        dice_loss(torch.zeros(3, 200, 7, 9), labels)
    with pytest.raises(ValueError, match=r"logits have dtype torch\.uint8"):
        dice_loss(logits.to(torch.uint8), labels)
    with pytest.raises(ValueError, match="ignore_index=0 needs integer labels"):
        dice_loss(logits, logits.softmax(1), ignore_index=0)
    with pytest.raises(ValueError, match="leaves no class"):
        dice_loss(logits[:, :1], labels.clamp(max=1), include_background=False)
    with pytest.raises(ValueError, match=r"logits have shape \(3, 4, 7, 9\); 5 classes need \(N, 5, H, W\)"):
        confusion_matrix(logits, labels, 5)
    with pytest.raises(ValueError, match="num_classes is 129"):
        confusion_matrix(labels, labels, 129)
    with pytest.raises(ValueError, match=r"labels have shape \(3, 7, 8\); the predictions need \(3, 7, 9\)"):
        confusion_matrix(labels, labels[..., 1:], 4)


def keras_dice_coef(y_true, y_pred, smooth=1.0):
    """The source's function, in NumPy float64 on (N, H, W, C) arrays."""
    total = 0.0
    for i in range(4):
        t, p = y_true[..., i].astype(np.float64).ravel(), y_pred[..., i].astype(np.float64).ravel()
        total += (2.0 * (t * p).sum() + smooth) / (t.sum() + p.sum() + smooth)
    return total / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dice_coefficient_is_the_sources(dtype):
    logits, labels = batch(4, (128, 128), n=4, dtype=dtype)
    p = logits.softmax(1)
    one_hot = F.one_hot(labels.long(), 4).movedim(-1, 1)
    want = keras_dice_coef(one_hot.movedim(1, -1).numpy(), p.movedim(1, -1).numpy())
    for target in (labels, labels[:, None], one_hot, one_hot.to(dtype)):
        assert dice_coefficient(p, target).item() == pytest.approx(want, abs=1e-6 if dtype == torch.float32 else 1e-14)
    assert 1 - dice_loss(logits, labels).item() == pytest.approx(want, abs=1e-6)


def test_dice_coefficient_is_differentiable():
    logits, labels = batch(4)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (1 - dice_coefficient(a.softmax(1), labels)).backward()
    dice_loss(b, labels).backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("c", [1, 2, 5])
def test_confusion_matrix(c, tiny_chunks):
    logits, labels = batch(c)
    k = max(c, 2)
    predicted = logits.argmax(1) if c > 1 else (logits[:, 0] > 0).long()
    want = np.zeros((k, k), dtype=np.int64)
    np.add.at(want, (labels.numpy().ravel(), predicted.numpy().ravel()), 1)
    for given_ in (logits, logits.requires_grad_(), predicted, predicted.to(torch.uint8)):
        assert np.array_equal(confusion_matrix(given_, labels, k).numpy(), want)
    assert confusion_matrix(predicted, labels, k, ignore_index=0)[0].sum() == 0
