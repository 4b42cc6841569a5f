"""The confusion kernel against a count pixel by pixel."""

import pytest
import torch

from fastunet.functional import dice_confusion as specification
from fastunet.kernels.dice import confusion as dice_confusion
from fastunet.kernels.dice import sums as dice
from tests.kernels.dice_cases import LABEL_DTYPES, LAYOUTS, inputs


@pytest.mark.parametrize("ignore_index", [None, 200, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", [1, 2, 3, 4, 33])
def test_confusion_of_logits(c, layout, ignore_index, device):
    logits, labels = inputs(2, c, 300, torch.float16, device, layout)
    logits = logits.round()  # many ties: the first maximum wins
    logits[1, c - 1, 7] = torch.nan
    k = max(c, 2)
    counts = dice_confusion.confusion(logits, labels, k, ignore_index)
    classes = logits if c > 1 else torch.cat([torch.zeros_like(logits), logits], 1)
    assert torch.equal(counts, slow_confusion(classes.argmax(1), labels, k, ignore_index))
    assert torch.equal(counts, specification.confusion(logits, labels, k, ignore_index))


@pytest.mark.parametrize("label_dtype", LABEL_DTYPES, ids=str)
def test_confusion_of_labels(label_dtype, device):
    _, labels = inputs(2, 7, 300, torch.float32, device, label_dtype=label_dtype)
    predictions = labels.flip(1).to(torch.int32)
    predictions[1, 4] = -3
    counts = dice_confusion.confusion(predictions, labels, 7, 200)
    assert torch.equal(counts, slow_confusion(predictions, labels, 7, 200))


@pytest.mark.parametrize("pairs", [False, True], ids=["product", "pairs"])
def test_confusion_in_several_tiles_a_program(pairs, device):
    logits, labels = inputs(1, 4, 600, torch.float32, device)
    config = dice_confusion.ConfusionConfig(block_s=128, programs=2, pairs=pairs)
    counts = dice_confusion.confusion(logits, labels, 4, 200, config)
    assert torch.equal(counts, slow_confusion(logits.argmax(1), labels, 4, 200))


def test_confusion_of_nothing(device):
    logits, labels = inputs(2, 4, 0, torch.float32, device)
    counts = dice_confusion.confusion(logits, labels, 4, None)
    assert torch.equal(counts[:, :-1], torch.zeros(2, 17, dtype=torch.int64, device=device))
    assert (counts[:, -1] == specification.NONE_WRONG).all()


def test_more_samples_than_a_grid_holds(device, monkeypatch):
    logits, labels = inputs(5, 4, 20, torch.float32, device)
    whole = dice_confusion.confusion(logits, labels, 4, 200)
    monkeypatch.setattr(dice, "MOST_SAMPLES", 2)
    assert torch.equal(dice_confusion.confusion(logits, labels, 4, 200), whole)


def slow_confusion(predictions, labels, k, ignore_index):
    """Pixel by pixel."""
    rows = []
    for predicted, truth in zip(predictions.tolist(), labels.tolist()):
        row, wrong = [0] * (k * k + 1), [specification.NONE_WRONG]
        for p, t in zip(predicted, truth):
            if t == ignore_index:
                continue
            if 0 <= p < k and 0 <= t < k:
                row[t * k + p] += 1
            else:
                row[-1] += 1
                wrong += [v for v in (p, t) if not 0 <= v < k]
        rows.append([*row, max(wrong)])
    return torch.tensor(rows, device=labels.device)
