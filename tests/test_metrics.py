"""Metrics against slow float64 computations, the Keras model's own definitions, and Keras' MeanIoU."""

import os

import numpy as np
import pytest
import torch

from fastunet import dispatch, metrics
from fastunet.metrics import SegmentationMetrics

NAMES = ["background", "necrotic", "oedema", "enhancing"]
REGIONS = {"whole tumour": (1, 2, 3), "core": (1, 3)}


def batch(seed=0, n=4, size=(9, 10), bias=0.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 4, *size, generator=generator)
    labels = torch.randint(0, 4, (n, *size), generator=generator).to(torch.uint8)
    logits.scatter_add_(1, labels.long()[:, None], torch.full((n, 1, *size), bias))
    return logits, labels


def slow_scores(predicted, truth, classes):
    """Counts a region pixel by pixel in NumPy float64."""
    p, t = np.isin(predicted.numpy(), classes), np.isin(truth.numpy(), classes)
    hits, both = float((p & t).sum()), float((p | t).sum())
    return {
        "dice": 2 * hits / (p.sum() + t.sum()),
        "iou": hits / both,
        "precision": hits / p.sum(),
        "sensitivity": hits / t.sum(),
        "specificity": float((~p & ~t).sum()) / (~t).sum(),
    }


def close(got, want):
    assert got.keys() == want.keys()
    for key in want:
        assert got[key] == pytest.approx(want[key], rel=1e-6), key  # Keras' epsilon of 1e-7 in some denominators


def test_equals_slow_counting():
    logits, labels = batch(bias=1.0)
    predicted = logits.argmax(1)
    found = SegmentationMetrics(4, NAMES, regions=REGIONS)
    found.update(logits[:3], labels[:3])
    found.update(predicted[3:].to(torch.uint8), labels[3:, None])
    got = found.compute()
    for i, name in enumerate(NAMES):
        close(got["classes"][name], slow_scores(predicted, labels, [i]))
    for name, classes in REGIONS.items():
        close(got["regions"][name], slow_scores(predicted, labels, classes))
    assert got["accuracy"] == pytest.approx((predicted == labels).double().mean().item(), abs=1e-15)
    assert got["dice"] == pytest.approx(np.mean([got["classes"][name]["dice"] for name in NAMES]), abs=1e-15)
    assert got["mean_iou"] == pytest.approx(np.mean([got["classes"][name]["iou"] for name in NAMES]), abs=1e-15)


@pytest.mark.parametrize("absent", [None, 3])
def test_mean_iou_equals_keras(absent):
    os.environ["KERAS_BACKEND"] = "torch"
    keras = pytest.importorskip("keras", reason="Keras is not installed (pip install 'fastunet[rivals]')")
    logits, labels = batch(1)
    if absent is not None:
        logits[:, absent] = -100
        labels[labels == absent] = 0
    rival, ours = keras.metrics.MeanIoU(num_classes=4), SegmentationMetrics(4)
    for part in (slice(0, 1), slice(1, 4)):
        rival.update_state(labels[part].numpy(), logits[part].argmax(1).numpy())
        ours.update(logits[part], labels[part])
    assert ours.compute()["mean_iou"] == pytest.approx(float(rival.result()), rel=1e-6)


def source_metrics(y_true, y_pred):
    """The notebook's functions in NumPy float64 on (N, H, W, C); ``round`` is to even, as TensorFlow's."""
    epsilon = 1e-7
    clipped = lambda x: np.round(np.clip(x, 0, 1)).sum()  # noqa: E731
    hits = clipped(y_true * y_pred)
    found = {
        "precision": hits / (clipped(y_pred) + epsilon),
        "sensitivity": hits / (clipped(y_true) + epsilon),
        "specificity": clipped((1 - y_true) * (1 - y_pred)) / (clipped(1 - y_true) + epsilon),
    }
    for index, name in ((1, "necrotic"), (2, "edema"), (3, "enhancing")):
        t, p = y_true[..., index], y_pred[..., index]
        found[name] = 2 * np.abs(t * p).sum() / (np.square(t).sum() + np.square(p).sum() + 1e-6)
    return found


@pytest.mark.parametrize("one_hot", [False, True])
def test_source_metrics(one_hot):
    logits, labels = batch(2, bias=2.0)
    p = logits.double().softmax(1)
    p[0, :, 0, 0] = 0.5  # rounds to even: no positive
    t = torch.nn.functional.one_hot(labels.long(), 4).movedim(-1, 1)
    want = source_metrics(t.movedim(1, -1).double().numpy(), p.movedim(1, -1).numpy())
    target = t if one_hot else labels
    got = {name: getattr(metrics, name)(p, target).item() for name in ("precision", "sensitivity", "specificity")}
    got |= {
        name: metrics.dice_of_class(p, target, i).item()
        for i, name in ((1, "necrotic"), (2, "edema"), (3, "enhancing"))
    }
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-12), name


def test_source_metrics_of_hard_labels_are_the_matrix():
    logits, labels = batch(3)
    hard = torch.nn.functional.one_hot(logits.argmax(1), 4).movedim(-1, 1).double()
    found = SegmentationMetrics(4)
    found.update(logits, labels)
    scores = found.compute()["classes"]
    for i in range(4):
        got = metrics.dice_of_class(hard, labels, i)
        assert got.item() == pytest.approx(scores[str(i)]["dice"], rel=1e-6)
        one = (hard[:, i : i + 1], (labels == i).double()[:, None])
        for name in ("precision", "sensitivity", "specificity"):
            assert getattr(metrics, name)(*one).item() == pytest.approx(scores[str(i)][name], rel=1e-12)


@pytest.mark.parametrize(
    "empty, both_empty, false_positive, region",
    [("one", 1.0, 0.0, 0.0), ("skip", np.nan, np.nan, np.nan), ("smooth", 1.0, 1 / (2 + 1), 1 / 3)],
)
def test_empty_classes(empty, both_empty, false_positive, region):
    """Class 3 is in neither, class 2 is predicted at two pixels that are background."""
    truth = torch.tensor([[[0, 0, 0, 1]]])
    predicted = torch.tensor([[[0, 2, 2, 1]]])
    found = SegmentationMetrics(4, empty=empty, regions={"both": (2, 3)})
    found.update(predicted, truth)
    got = found.compute()
    dice = [got["classes"][str(i)]["dice"] for i in range(4)]
    assert dice[3] == pytest.approx(both_empty, nan_ok=True)
    assert dice[2] == pytest.approx(false_positive, nan_ok=True)
    assert got["regions"]["both"]["dice"] == pytest.approx(region, nan_ok=True)
    assert got["dice"] == pytest.approx(np.nanmean(dice))
    assert got["classes"]["3"]["iou"] == pytest.approx(both_empty, nan_ok=True)


def test_cases_and_merging():
    parts = [batch(seed) for seed in range(3)]
    whole, left, right = (SegmentationMetrics(4, NAMES) for _ in range(3))
    names = [["a", "b", "a", "c"], "b", ("c", "a", "a", "a")]
    for (logits, labels), case in zip(parts, names):
        whole.update(logits, labels, case)
    left.update(*parts[0], names[0])
    right.update(*parts[1], names[1])
    right.update(*parts[2], names[2])
    assert left.merge(right) is left
    assert left.cases == whole.cases == ["a", "b", "c"]
    assert left.compute() == whole.compute()
    assert left.compute_cases() == whole.compute_cases()
    alone = SegmentationMetrics(4, NAMES)
    alone.update(parts[0][0][1:2], parts[0][1][1:2])
    alone.update(*parts[1])
    assert alone.compute() == whole.compute("b")
    assert whole.matrix.sum() == 3 * 4 * 90
    whole.reset()
    assert whole.cases == []
    assert whole.compute()["accuracy"] == 0.0


def test_state_does_not_grow():
    found = SegmentationMetrics(4)
    for seed in range(5):
        found.update(*batch(seed), "one case")
    assert found._pooled.numel() == found._cases["one case"].numel() == 4 * 4 + 2


def test_ignored_pixels():
    logits, labels = batch()
    labels[:, 0] = 255
    found, want = SegmentationMetrics(4, ignore_index=255), SegmentationMetrics(4)
    found.update(logits, labels)
    want.update(logits[:, :, 1:], labels[:, 1:])
    assert found.compute() == want.compute()


def test_errors():
    logits, labels = batch()
    found = SegmentationMetrics(4)
    labels[0, 0, 0] = 77
    found.update(logits, labels)
    with pytest.raises(ValueError, match="1 labels are out of range, 77 among them; expected 0 to 3"):
        found.compute()
    with pytest.raises(KeyError, match="nobody"):
        found.compute("nobody")
    with pytest.raises(ValueError, match="3 case names for a batch of 4"):
        found.update(logits, labels, ["a", "b", "c"])
    with pytest.raises(ValueError, match="3 classes cannot join"):
        found.merge(SegmentationMetrics(3))
    with pytest.raises(ValueError, match="2 class names for 4 classes"):
        SegmentationMetrics(4, ["a", "b"])
    with pytest.raises(ValueError, match=r"region 'x' is made of \(4,\)"):
        SegmentationMetrics(4, regions={"x": (4,)})
    with pytest.raises(ValueError, match="empty is 'zero'"):
        SegmentationMetrics(4, empty="zero")


def test_update_on_a_device_never_waits(monkeypatch):
    """A meta tensor has no values, and asking for one raises: an update that passes cannot have waited for any."""
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device, dtype: None)
    found = SegmentationMetrics(4, backend="triton")
    logits = torch.empty(2, 4, 8, 8, device="meta", dtype=torch.float16)
    labels = torch.empty(2, 8, 8, device="meta", dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="meta"):
        labels.sum().item()
    for case in (None, "a", ["a", "b"]):
        found.update(logits, labels, case)
    assert found._pooled.is_meta
    assert found.cases == ["a", "b"]
    found.backend = "torch"
    with pytest.raises(ValueError, match="counts of meta tensors"):
        found.update(torch.zeros(2, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.uint8))
