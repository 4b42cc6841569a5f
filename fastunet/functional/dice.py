"""Soft Dice, cross-entropy and the confusion matrix from one read of the logits and integer labels."""

from __future__ import annotations

from typing import Any

import torch

from fastunet import dispatch
from fastunet.functional import dice_cpu
from fastunet.functional.dice_rule import check_rule, dice_score, mean_over_counted

_LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
_MAX_CLASSES = 128

dispatch.define(
    "dice_sums(Tensor logits, Tensor targets, Tensor? class_weights, int? ignore_index, bool cross_entropy,"
    " str backend) -> Tensor",
    torch_impl=dice_cpu.sums,
    triton_impl="dice:sums",
    fake=lambda logits, targets, class_weights, ignore_index, cross_entropy: logits.new_empty(
        (logits.shape[0], 3 * logits.shape[1] + 3), dtype=dice_cpu.sum_dtype(logits)
    ),
)
dispatch.define(
    "dice_sums_grad(Tensor grad, Tensor logits, Tensor targets, Tensor? class_weights, int? ignore_index,"
    " bool cross_entropy, str backend) -> Tensor",
    torch_impl=dice_cpu.sums_grad,
    triton_impl="dice:sums_grad",
    fake=lambda grad, logits, targets, class_weights, ignore_index, cross_entropy: torch.empty_like(logits),
)
dispatch.define(
    "confusion_counts(Tensor predictions, Tensor labels, int classes, int? ignore_index, str backend) -> Tensor",
    torch_impl=dice_cpu.confusion,
    triton_impl="dice_confusion:confusion",
    fake=lambda predictions, labels, classes, ignore_index: labels.new_empty(
        (labels.shape[0], classes * classes + 2), dtype=torch.int64
    ),
)


class _DiceSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, class_weights, *options):
        ctx.save_for_backward(logits, targets, class_weights)
        ctx.options, ctx.kept = options, None
        # Not under torch.compile, fake tensors and the like, which see the operators below as single nodes.
        if ctx.needs_input_grad[0] and type(logits) is torch.Tensor and not torch.compiler.is_compiling():
            ctx.kept = dice_cpu.room_for_probabilities(logits) if options[-1] == "torch" else None
        if ctx.kept is not None:
            return dice_cpu.sums(logits, targets, class_weights, *options[:-1], ctx.kept)
        return torch.ops.fastunet.dice_sums(logits, targets, class_weights, *options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.kept is not None:
            # A second backward pass through a retained graph computes them again.
            kept, ctx.kept = ctx.kept, None
            return dice_cpu.sums_grad(grad, *ctx.saved_tensors, *ctx.options[:-1], kept), *[None] * 5
        return torch.ops.fastunet.dice_sums_grad(grad, *ctx.saved_tensors, *ctx.options), *[None] * 5


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, scale):
        ctx.group, ctx.scale = group, scale
        x = x.clone()
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad * ctx.scale
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None, None


def dice_loss(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    """The soft Dice loss, ``1 - mean((2 I + s) / (P + T + s))`` over classes.

    With p = softmax(logits) over the classes (sigmoid for one logit) and t the one-hot labels, per class
    I = sum(p t), P = sum(p), T = sum(t) over the pixels of the batch (or of each sample).

    This is :func:`dice_cross_entropy` with ``ce_weight=0``; see there for the arguments, options and errors.
    """
    return dice_cross_entropy(logits, labels, ce_weight=0.0, **options)


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
        labels: (N, H, W) or (N, 1, H, W) class indices in uint8, int16, int32 or int64; or one-hot or soft targets of
            the logits' shape, with values in [0, 1].
        ce_weight, dice_weight: factors of the two terms.
        smooth: the constant s.
        include_background: whether class 0 takes part in the Dice loss; it always does in the cross-entropy.
        ignore_index: pixels with this label count nowhere.
        class_weights: (C,) ((2,) for one logit) weights of the cross-entropy, as in ``torch.nn.CrossEntropyLoss``, and
            of the mean of the Dice loss over classes.
        reduction: "batch" sums I, P, T over the batch before the ratio; "sample" takes the mean of each sample's loss.
        empty: what a class without truth scores: "smooth", "skip" or "one"; the rule of
            :func:`fastunet.functional.dice_rule.dice_score`, under "skip" left out of the mean.
        check_labels: raise for a label out of range. On a GPU this waits for the kernel; under ``torch.compile`` and
            while a CUDA graph is captured, where nothing can be raised, the loss becomes NaN instead. With False,
            labels are trusted: a pixel whose label is out of range counts nowhere.
        sync: sum I, P, T and the cross-entropy over the processes of ``process_group`` (None: all) before the ratio.
        grad_reduction: how the caller then combines the parameter gradients of the processes: "mean", as
            DistributedDataParallel does, or "sum". Either way they end equal to one process with the whole batch.
        backend: "auto", "triton" or "torch".

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes, dtypes or options that do not fit, or a label out of range; the message names the value.
    """
    check_rule(empty, smooth)
    if reduction not in ("batch", "sample"):
        raise ValueError(f"reduction is {reduction!r}; expected 'batch' or 'sample'")
    if grad_reduction not in ("mean", "sum"):
        raise ValueError(f"grad_reduction is {grad_reduction!r}; expected 'mean' or 'sum'")
    if sync and reduction == "sample":
        raise ValueError("sync=True sums over the whole batch and needs reduction='batch'")
    if not include_background and logits.ndim > 1 and logits.shape[1] == 1:
        raise ValueError("include_background=False leaves no class: one logit already stands for the foreground alone")
    targets, class_weights = _validated(logits, labels, class_weights, ignore_index)
    backend = dispatch.select_backend(backend, "dice_cross_entropy", logits)
    sums = _DiceSums.apply(_pixels(logits), targets, class_weights, ignore_index, bool(ce_weight), backend)
    wrong = sums[:, -1].sum()
    if check_labels and not _cannot_raise(logits) and wrong.item() > 0:
        _raise_out_of_range(targets, max(logits.shape[1], 2), ignore_index)

    c = logits.shape[1]
    if reduction == "batch":
        sums = sums.sum(0, keepdim=True)
    if sync:
        scale = 1.0 if grad_reduction == "mean" else 1 / torch.distributed.get_world_size(process_group)
        sums = _SumOverProcesses.apply(sums, process_group, scale)
    first = 0 if include_background else 1
    intersection, predicted, truth = (sums[:, j * c + first : (j + 1) * c] for j in range(3))
    score = dice_score(intersection, predicted, truth, smooth=smooth, empty=empty)
    dice_weights = None if class_weights is None or c == 1 else class_weights[first:]
    loss = dice_weight * mean_over_counted(1 - score, truth, empty=empty, weights=dice_weights)
    if ce_weight:
        nll, weight = sums[:, 3 * c].sum(), sums[:, 3 * c + 1].sum()
        loss = loss + ce_weight * nll / torch.where(weight == 0, torch.ones_like(weight), weight)
    if check_labels and _cannot_raise(logits):
        loss = torch.where(wrong > 0, torch.full_like(loss, float("nan")), loss)
    return loss


def dice_coefficient(
    y_pred: torch.Tensor, y_true: torch.Tensor, *, smooth: float = 1.0, empty: str = "smooth"
) -> torch.Tensor:
    """The Dice coefficient of the Keras BraTS U-Net: ``mean_c (2 sum(t p) + s) / (sum(t) + sum(p) + s)``.

    The sums run over the whole batch and image. Unlike the losses it takes probabilities, and is differentiable as
    ordinary PyTorch.

    Args:
        y_pred: (N, C, H, W) probabilities.
        y_true: one-hot (N, C, H, W), or integer labels (N, H, W) or (N, 1, H, W).
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
    targets, _ = _validated(y_pred, y_true, None, None)
    p = y_pred.flatten(2).to(dice_cpu.sum_dtype(y_pred))
    c = p.shape[1]
    if targets.ndim == 3 or c == 1:
        t = targets.to(p.dtype) if targets.ndim == 3 else (targets == 1).to(p.dtype)[:, None]
        return (p * t).sum((0, 2)), p.sum((0, 2)), t.sum((0, 2))
    if targets.numel() and not _cannot_raise(p) and (targets.min() < 0 or targets.max() >= c):
        _raise_out_of_range(targets, c, None)
    index = targets.long()
    true = p.gather(1, index[:, None]).flatten().double()
    index, zeros = index.flatten(), torch.zeros(c, dtype=torch.float64, device=p.device)
    intersection, truth = zeros.scatter_add(0, index, true), zeros.scatter_add(0, index, torch.ones_like(true))
    return intersection.to(p.dtype), p.sum((0, 2)), truth.to(p.dtype)


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
        labels: (N, H, W) or (N, 1, H, W) true labels in uint8, int16, int32 or int64.
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
    if check_labels and not _cannot_raise(counts):
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
    if not 1 <= num_classes <= _MAX_CLASSES:
        raise ValueError(f"num_classes is {num_classes}; expected 1 to {_MAX_CLASSES}")
    predictions = logits_or_labels
    if predictions.dtype.is_floating_point:
        shape = tuple(predictions.shape)
        if len(shape) < 3 or max(shape[1], 2) != num_classes:
            raise ValueError(f"logits have shape {shape}; {num_classes} classes need (N, {num_classes}, H, W)")
        predictions, pixels = _pixels(predictions.detach()), (shape[0], *shape[2:])
    else:
        predictions = _integer_labels(predictions, labels.ndim, "predicted labels")
        predictions, pixels = predictions.flatten(1), tuple(predictions.shape)
    labels = _integer_labels(labels, len(pixels), "labels")
    if tuple(labels.shape) != pixels:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; the predictions need {pixels}")
    # Which backend can run depends on the dtype of logits only; the kernel takes labels of any integer dtype.
    stand_in = predictions if predictions.ndim == 3 else predictions.new_empty(0, dtype=torch.float32)
    backend = dispatch.select_backend(backend, "confusion_matrix", stand_in)
    return torch.ops.fastunet.confusion_counts(predictions, labels.flatten(1), num_classes, ignore_index, backend)


def raise_for_wrong(count: int, greatest: int, classes: int) -> None:
    """Raises ``ValueError`` if the ``count`` of labels out of range is not zero; ``greatest`` is one of them."""
    if count:
        raise ValueError(f"{count} labels are out of range, {greatest} among them; expected 0 to {classes - 1}")


def _pixels(logits: torch.Tensor) -> torch.Tensor:
    """(N, C, S), dense in that order or in (N, S, C): a view unless the memory is in some other order."""
    flat = logits.flatten(2)
    return flat if flat.is_contiguous() or flat.transpose(1, 2).is_contiguous() else flat.contiguous()


def _validated(
    logits: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None, ignore_index: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The labels as (N, S) integers or (N, C, S) memberships, and the weights in float32 on the logits' device."""
    shape = tuple(logits.shape)
    if len(shape) < 3 or not 1 <= shape[1] <= _MAX_CLASSES:
        raise ValueError(f"logits have shape {shape}; expected (N, C, H, W) with C from 1 to {_MAX_CLASSES}")
    if not logits.dtype.is_floating_point:
        raise ValueError(f"logits have dtype {logits.dtype}; expected floating point")
    if labels.device != logits.device:
        raise ValueError(f"labels are on {labels.device}, logits on {logits.device}")
    if tuple(labels.shape) == shape and (shape[1] > 1 or labels.dtype.is_floating_point):
        if ignore_index is not None:
            raise ValueError(f"ignore_index={ignore_index} needs integer labels, not one-hot or soft targets")
        targets = labels.to(torch.uint8) if labels.dtype == torch.bool else labels
        targets = targets.flatten(2)
    else:
        targets = _integer_labels(labels, len(shape) - 1, "labels")
        if tuple(targets.shape) != (shape[0], *shape[2:]):
            raise ValueError(f"labels have shape {tuple(labels.shape)}, which does not fit logits of shape {shape}")
        targets = targets.flatten(1)
    if class_weights is not None:
        if tuple(class_weights.shape) != (max(shape[1], 2),):
            raise ValueError(f"class_weights have shape {tuple(class_weights.shape)}; expected ({max(shape[1], 2)},)")
        class_weights = class_weights.to(logits.device, dice_cpu.sum_dtype(logits))
    return targets, class_weights


def _integer_labels(labels: torch.Tensor, ndim: int, name: str) -> torch.Tensor:
    if labels.dtype not in _LABEL_DTYPES:
        raise ValueError(f"{name} have dtype {labels.dtype}; expected uint8, int16, int32 or int64")
    return labels.squeeze(1) if labels.ndim == ndim + 1 else labels


def _cannot_raise(x: torch.Tensor) -> bool:
    """Whether values cannot be read now: under torch.compile, and while a CUDA graph is captured."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _raise_out_of_range(labels: torch.Tensor, classes: int, ignore_index: int | None) -> None:
    wrong = (labels < 0) | (labels >= classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    raise_for_wrong(int(wrong.sum()), int(labels[wrong].max()), classes)
