"""The confusion matrix of logits or predicted labels, from one read; on a CPU chunk by chunk, as ``dice_cpu`` walks."""

from __future__ import annotations

import torch

from fastunet import dispatch
from fastunet.arguments import checked
from fastunet.functional import dice_cpu
from fastunet.functional._checks import check_classes
from fastunet.functional.dice_arguments import (
    MOST_CLASSES,
    cannot_raise,
    class_indices,
    indices_of_one_hot,
    pixels_of,
    raise_for_wrong,
)

NONE_WRONG = -(2**31)
"""Stands for "no value is out of range" in :func:`confusion`."""


def confusion(predictions: torch.Tensor, labels: torch.Tensor, classes: int, ignore_index: int | None) -> torch.Tensor:
    """Counts of (truth, prediction) pairs per sample, and of the values that are out of range.

    Args:
        predictions: (N, C, S) logits, of which the first maximum is the prediction (of one logit: the second of two
            classes where it is positive), or (N, S) integer labels.
        labels: (N, S) integers.
        classes: K, at least C.

    Returns:
        (N, K² + 2) int64: the matrix row by row (rows truth), the number of pixels left out because their label or
        prediction is out of range, and the greatest such value (:data:`NONE_WRONG` if there is none).
    """
    n = len(labels)
    result = torch.zeros(n, classes * classes + 2, dtype=torch.int64, device=labels.device)
    result[:, -1] = NONE_WRONG
    channels = predictions if predictions.ndim == 3 else predictions[:, None]
    for samples, pixels, block in dice_cpu.chunks(channels, max(channels.shape[1], 2), 1):
        truth = labels[samples, pixels].long()
        if predictions.ndim == 3:
            predicted = dice_cpu.class_logits(block[0], predictions[samples, :, pixels]).argmax(1)
        else:
            predicted = predictions[samples, pixels].long()
        counted = torch.ones_like(truth, dtype=torch.bool) if ignore_index is None else truth != ignore_index
        truth_wrong, predicted_wrong = (counted & ((v < 0) | (v >= classes)) for v in (truth, predicted))
        wrong = truth_wrong | predicted_wrong
        # The entry after the matrix collects the wrong pixels; ignored ones add nothing to it.
        pair = torch.where(counted & ~wrong, truth * classes + predicted, classes * classes)
        result[samples, :-1].scatter_add_(1, pair, counted.long())
        greatest = result[samples, -1]
        for values, out_of_range in ((truth, truth_wrong), (predicted, predicted_wrong)):
            torch.maximum(greatest, torch.where(out_of_range, values, NONE_WRONG).amax(1), out=greatest)
    return result


dispatch.define(
    "confusion_counts(Tensor predictions, Tensor labels, int classes, int? ignore_index, str backend) -> Tensor",
    torch_impl=confusion,
    triton_impl="dice.confusion:confusion",
    fake=lambda predictions, labels, classes, ignore_index: labels.new_empty(
        (labels.shape[0], classes * classes + 2), dtype=torch.int64
    ),
)


@checked
def confusion_matrix(
    logits_or_labels: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    ignore_index: int | None = None,
    check_labels: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """Counts pixels by truth (row) and prediction (column), from one read of both.

    Args:
        logits_or_labels: (N, C, H, W) logits, whose first greatest channel is the prediction (of one logit: class 1
            where it is positive), or (N, H, W) predicted labels.
        labels: (N, H, W) or (N, 1, H, W) true labels in any integer dtype, bool, or floating point as whole numbers;
            or one-hot of the logits' shape.
        num_classes: K, at most 128.
        ignore_index: pixels with this true label are not counted.
        check_labels: raise for a true or predicted label out of range, which on a GPU waits for the kernel. With
            False, under ``torch.compile`` and while a CUDA graph is captured such pixels are not counted.
        backend: "auto", "triton" or "torch".

    Returns:
        (num_classes, num_classes) int64.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a label out of range; the message names the value.
    """
    counts = confusion_counts(logits_or_labels, labels, num_classes, ignore_index=ignore_index, backend=backend)
    if check_labels and not cannot_raise(counts):
        raise_for_wrong(int(counts[:, -2].sum()), int(counts[:, -1].max()) if len(counts) else 0, num_classes)
    return counts[:, :-2].sum(0).reshape(num_classes, num_classes)


def confusion_counts(
    logits_or_labels: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    ignore_index: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """:func:`confusion_matrix` per sample and without waiting for the device.

    Returns:
        (N, num_classes² + 2) int64: the matrix row by row, the number of pixels left out because a label is out of
        range, and the greatest such label.
    """
    check_classes(num_classes, MOST_CLASSES)
    predictions = logits_or_labels
    if predictions.dtype.is_floating_point:
        shape = tuple(predictions.shape)
        if len(shape) < 3 or max(shape[1], 2) != num_classes:
            raise ValueError(f"logits have shape {shape}; {num_classes} classes need (N, {num_classes}, H, W)")
        predictions, pixels = pixels_of(predictions.detach()), (shape[0], *shape[2:])
        if shape[1] > 1 and tuple(labels.shape) == shape:
            labels = indices_of_one_hot(labels)
    else:
        if predictions.ndim < 2:
            raise ValueError(f"predicted labels have shape {tuple(predictions.shape)}; expected (N, H, W)")
        predictions, _ = class_indices(predictions, labels.ndim)
        predictions, pixels = predictions.flatten(1), tuple(predictions.shape)
    labels, ignore_index = class_indices(labels, len(pixels), ignore_index)
    if tuple(labels.shape) != pixels:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; the predictions need {pixels}")
    # Which backend can run depends on the dtype of logits only; the kernel takes labels of any integer dtype.
    stand_in = predictions if predictions.ndim == 3 else predictions.new_empty(0, dtype=torch.float32)
    backend = dispatch.select_backend(backend, "confusion_matrix", stand_in)
    return torch.ops.fastunet.confusion_counts(predictions, labels.flatten(1), num_classes, ignore_index, backend)
