"""Soft Dice and cross-entropy from one read of the logits and integer labels, and one more for the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastunet import autograd
from fastunet.arguments import checked
from fastunet.functional import dice_cpu
from fastunet.functional.dice_arguments import cannot_raise, raise_out_of_range, validated
from fastunet.functional.dice_operators import loss_of_sums
from fastunet.functional.dice_rule import check_rule, dice_score, mean_over_counted


@checked
def dice_loss(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    """The soft Dice loss, ``1 - mean((2 I + s) / (P + T + s))`` over classes.

    With p = softmax(logits) over the classes (sigmoid for one logit) and t the one-hot labels, per class
    I = sum(p t), P = sum(p), T = sum(t) over the pixels of the batch (or of each sample).

    This is :func:`dice_cross_entropy` with ``ce_weight=0``; see there for the arguments, options and errors.
    """
    return dice_cross_entropy(logits, labels, ce_weight=0.0, **options)


@checked
def dice_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ce_weight: float = 1.0,
    dice_weight: float = 1.0,
    smooth: float = 1.0,
    include_background: bool = True,
    ignore_index: int | None = None,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    tversky: Sequence[float] = (0.5, 0.5),
    reduction: str = "batch",
    empty: str = "smooth",
    check_labels: bool = True,
    sync: bool = False,
    process_group: Any = None,
    grad_reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """``dice_weight · Dice loss + ce_weight · cross-entropy``, from one read of the logits and labels.

    Args:
        logits: (N, C, H, W), or any number of pixel axes; NCHW or channels_last; C from 2 to 128, or 1 for two classes
            with p = sigmoid(logit) of the second, of which alone the Dice loss then is.
        labels: (N, H, W) or (N, 1, H, W) class indices in any integer dtype, bool (two classes), or floating point as
            whole numbers; or one-hot or soft targets of the logits' shape, with values in [0, 1]. With one logit
            (N, 1, H, W) in floating point is soft, unless ``ignore_index`` is given.
        ce_weight, dice_weight: factors of the two terms.
        smooth: the constant s.
        include_background: whether class 0 takes part in the Dice loss; it always does in the cross-entropy.
        ignore_index: pixels with this label count nowhere.
        class_weights: (C,) ((2,) for one logit) weights of the cross-entropy, as in ``torch.nn.CrossEntropyLoss``, and
            of the mean of the Dice loss over classes. The cross-entropy is a mean by the weights w t of one-hot and
            soft targets too, so that one-hot ones act as labels, where PyTorch's divides by the number of pixels.
        label_smoothing: e from 0 to 1: the cross-entropy is of ``(1 - e) t + e / C`` in place of t (of two classes for
            one logit), as in ``torch.nn.functional.cross_entropy``; the Dice loss is of t itself.
        tversky: (α, β), the factors of false positives and false negatives in the ratio of the Dice loss, which then is
            Tversky's: ``(2 I + s) / (2 (I + α (P - I) + β (T - I)) + s)``, with halves the Dice ratio. β above α finds
            more of a small structure, at the price of false positives.
        reduction: "batch" sums I, P, T over the batch before the ratio; "sample" takes the ratio of each sample, and
            the mean over samples and classes together.
        empty: what a class without truth scores: "smooth", "skip" or "one"; the rule of
            :func:`fastunet.functional.dice_rule.dice_score`, under "skip" left out of the mean.
        check_labels: raise for a label out of range or not whole, and for a one-hot or soft target beyond [0, 1]. On a
            GPU this waits. Under ``torch.compile`` and while a CUDA graph is captured, where nothing can be raised, a
            wrong label or target makes the loss NaN instead. With False, labels are trusted: a pixel whose label is out
            of range counts nowhere.
        sync: sum I, P, T and the cross-entropy over the processes of ``process_group`` (None: all) before the ratio.
        grad_reduction: how the caller then combines the parameter gradients of the processes: "mean", as
            DistributedDataParallel does, or "sum". Either way they end equal to one process with the whole batch.
        backend: "auto", "triton" or "torch".

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes, dtypes or options that do not fit, or a label out of range; the message names the value.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 to 1")
    if label_smoothing and not ce_weight:
        raise ValueError(f"label_smoothing={label_smoothing} acts on the cross-entropy, which has no weight here")
    if not include_background and logits.ndim > 1 and logits.shape[1] == 1:
        raise ValueError("include_background=False leaves no class: one logit already stands for the foreground alone")
    targets, class_weights, ignore_index = validated(logits, labels, class_weights, ignore_index, check_labels)
    if autograd.tracked(labels, class_weights):
        raise ValueError("labels or class_weights require a gradient, which the Dice losses do not give; detach() them")
    loss = loss_of_sums(
        "dice_cross_entropy", logits, (targets, class_weights, None), max(logits.shape[1], 2), ignore_index,
        (float(label_smoothing),), (smooth, empty, include_background, dice_weight, ce_weight), tversky=tversky,
        reduction=reduction, check_labels=check_labels, sync=sync, process_group=process_group,
        grad_reduction=grad_reduction, backend=backend,
    )  # fmt: skip
    if check_labels and targets.ndim == 3 and cannot_raise(logits):
        loss = loss * torch.where(((targets >= 0) & (targets <= 1)).all(), 1.0, math.nan)
    return loss


@checked
def dice_coefficient(
    y_pred: torch.Tensor, y_true: torch.Tensor, *, smooth: float = 1.0, empty: str = "smooth"
) -> torch.Tensor:
    """The Dice coefficient of the Keras BraTS U-Net: ``mean_c (2 sum(t p) + s) / (sum(t) + sum(p) + s)``.

    The sums run over the whole batch and image. Unlike the losses it takes probabilities, and is differentiable as
    ordinary PyTorch.

    Args:
        y_pred: (N, C, H, W) probabilities.
        y_true: labels in any form that :func:`dice_cross_entropy` takes.
        smooth: the constant s.
        empty: the rule for a class without truth, as in :func:`dice_cross_entropy`.

    Returns:
        A scalar in float32 (float64 for float64 probabilities).

    Raises:
        ValueError: shapes or dtypes that do not fit, or a label out of range.
    """
    check_rule(empty, smooth)
    intersection, predicted, truth = probability_sums(y_pred, y_true)
    score = dice_score(intersection, predicted, truth, smooth=smooth, empty=empty)
    return mean_over_counted(score, truth, empty=empty)


def probability_sums(y_pred: torch.Tensor, y_true: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """I = sum(p t), P = sum(p) and T = sum(t) per class over the batch and image, each (C,).

    The arguments are those of :func:`dice_coefficient`. No one-hot tensor is made of integer labels.
    """
    targets, *_ = validated(y_pred, y_true)
    if autograd.tracked(y_pred):
        autograd.refuse_inference("dice_coefficient", [y_pred, y_true])
    p = y_pred.flatten(2).to(dice_cpu.sum_dtype(y_pred))
    c = p.shape[1]
    classes = max(c, 2)
    may_check = targets.ndim == 2 and targets.numel() and not cannot_raise(p)
    if may_check and (targets.min() < 0 or targets.max() >= classes):
        raise_out_of_range(targets, classes, None)
    if targets.ndim == 3 or c == 1:
        t = targets.to(p.dtype) if targets.ndim == 3 else (targets == 1).to(p.dtype)[:, None]
        return (p * t).sum((0, 2)), p.sum((0, 2)), t.sum((0, 2))
    index = targets.long()
    true = p.gather(1, index[:, None]).flatten().double()
    index, zeros = index.flatten(), torch.zeros(c, dtype=torch.float64, device=p.device)
    intersection, truth = zeros.scatter_add(0, index, true), zeros.scatter_add(0, index, torch.ones_like(true))
    return intersection.to(p.dtype), p.sum((0, 2)), truth.to(p.dtype)
