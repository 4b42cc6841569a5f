"""What the Dice operators accept: the shapes and dtypes of logits and labels, and labels that are classes."""

from __future__ import annotations

import torch

from fastunet.autograd import transformed
from fastunet.functional import dice_cpu
from fastunet.functional._checks import check_tensors

LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
MOST_CLASSES = 128


def pixels_of(logits: torch.Tensor) -> torch.Tensor:
    """(N, C, S), dense in that order or in (N, S, C): a view unless the memory is in some other order."""
    flat = logits.flatten(2)
    return flat if flat.is_contiguous() or flat.transpose(1, 2).is_contiguous() else flat.contiguous()


def validated(
    logits: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None, ignore_index: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The labels as (N, S) integers or (N, C, S) memberships, and the weights in float32 on the logits' device."""
    check_tensors("dice", logits=logits, labels=labels)
    shape = tuple(logits.shape)
    if len(shape) < 3 or not 1 <= shape[1] <= MOST_CLASSES:
        raise ValueError(f"logits have shape {shape}; expected (N, C, H, W) with C from 1 to {MOST_CLASSES}")
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
        targets = integer_labels(labels, len(shape) - 1, "labels")
        if tuple(targets.shape) != (shape[0], *shape[2:]):
            raise ValueError(f"labels have shape {tuple(labels.shape)}, which does not fit logits of shape {shape}")
        targets = targets.flatten(1)
    if class_weights is not None:
        if tuple(class_weights.shape) != (max(shape[1], 2),):
            raise ValueError(f"class_weights have shape {tuple(class_weights.shape)}; expected ({max(shape[1], 2)},)")
        class_weights = class_weights.to(logits.device, dice_cpu.sum_dtype(logits))
    return targets, class_weights


def integer_labels(labels: torch.Tensor, ndim: int, name: str) -> torch.Tensor:
    """``labels`` with ``ndim`` axes, that is without a channel axis of one."""
    if labels.dtype not in LABEL_DTYPES:
        raise ValueError(f"{name} have dtype {labels.dtype}; expected uint8, int16, int32 or int64")
    return labels.squeeze(1) if labels.ndim == ndim + 1 else labels


def cannot_raise(x: torch.Tensor) -> bool:
    """Whether values cannot be read now: under torch.compile and torch.func, and while a CUDA graph is captured."""
    return torch.compiler.is_compiling() or transformed() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def raise_for_wrong(count: int, greatest: int, classes: int) -> None:
    """Raises ``ValueError`` if the ``count`` of labels out of range is not zero; ``greatest`` is one of them."""
    if count:
        raise ValueError(f"{count} labels are out of range, {greatest} among them; expected 0 to {classes - 1}")


def raise_out_of_range(labels: torch.Tensor, classes: int, ignore_index: int | None) -> None:
    """Raises ``ValueError`` for labels some of which, here or in another process, are not classes."""
    wrong = (labels < 0) | (labels >= classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if not wrong.any():
        raise ValueError(f"labels of another process are out of range; expected 0 to {classes - 1}")
    raise_for_wrong(int(wrong.sum()), int(labels[wrong].max()), classes)
