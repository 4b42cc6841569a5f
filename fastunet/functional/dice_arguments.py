"""What the Dice operators accept: the shapes and dtypes of logits and labels, and labels that are classes."""

from __future__ import annotations

import torch

from fastunet.autograd import transformed
from fastunet.functional import dice_cpu

MOST_CLASSES = 128

NOT_WHOLE = 1 - 2**31
"""Stands among integer labels for what was given as a number that is not whole, or as no one-hot vector."""

_WIDER = {
    torch.bool: torch.uint8,
    torch.int8: torch.int16,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
}
"""Dtypes that PyTorch or the kernels hardly compute with, and those that hold their values."""


def pixels_of(logits: torch.Tensor) -> torch.Tensor:
    """(N, C, S), dense in that order or in (N, S, C): a view unless the memory is in some other order."""
    flat = logits.flatten(2)
    return flat if flat.is_contiguous() or flat.transpose(1, 2).is_contiguous() else flat.contiguous()


def validated(
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    ignore_index: int | None = None,
    check_labels: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, int | None]:
    """The labels as (N, S) integers or (N, C, S) memberships, and what goes with them.

    Targets of the logits' shape are memberships, one-hot or soft; with one logit only those in floating point, and only
    without ``ignore_index``, which says that they are class indices. All else are class indices.

    Returns:
        The labels; the class weights in the dtype of the sums on the logits' device; ``ignore_index``, or None if no
        label can have that value.
    """
    shape = tuple(logits.shape)
    if len(shape) < 3 or not 1 <= shape[1] <= MOST_CLASSES:
        raise ValueError(f"logits have shape {shape}; expected (N, C, H, W) with C from 1 to {MOST_CLASSES}")
    if not logits.dtype.is_floating_point:
        raise ValueError(f"logits have dtype {logits.dtype}; expected floating point")
    if labels.device != logits.device:
        raise ValueError(f"labels are on {labels.device}, logits on {logits.device}")
    indices = shape[1] == 1 and (not labels.dtype.is_floating_point or ignore_index is not None)
    if tuple(labels.shape) == shape and not indices:
        if ignore_index is not None:
            raise ValueError(f"ignore_index={ignore_index} needs integer labels, not one-hot or soft targets")
        targets = labels.to(_WIDER.get(labels.dtype, labels.dtype)).flatten(2)
        if check_labels and targets.numel() and not cannot_raise(logits):
            least, greatest = (value.item() for value in targets.aminmax())
            if not (least >= 0 and greatest <= 1):
                raise ValueError(f"one-hot or soft targets reach from {least} to {greatest}; expected 0 to 1")
    else:
        targets, ignore_index = class_indices(labels, len(shape) - 1, ignore_index)
        if tuple(targets.shape) != (shape[0], *shape[2:]):
            raise ValueError(f"labels have shape {tuple(labels.shape)}, which does not fit logits of shape {shape}")
        targets = targets.flatten(1)
    if class_weights is not None:
        if tuple(class_weights.shape) != (max(shape[1], 2),):
            raise ValueError(f"class_weights have shape {tuple(class_weights.shape)}; expected ({max(shape[1], 2)},)")
        class_weights = moved(class_weights, logits)
    return targets, class_weights, ignore_index


def moved(weights: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Weights of classes or regions in the dtype of the sums on the device of ``logits``."""
    if weights.is_meta and not logits.is_meta:
        raise ValueError(f"the weights are on meta, without numbers, the logits on {logits.device}")
    return weights.to(logits.device, dice_cpu.sum_dtype(logits))


def class_indices(labels: torch.Tensor, ndim: int, ignore_index: int | None = None) -> tuple[torch.Tensor, int | None]:
    """``labels`` of any dtype as signed integers or uint8, with ``ndim`` axes: without a channel axis of one.

    Returns:
        The labels, floating ones that are not whole numbers as :data:`NOT_WHOLE`; and ``ignore_index``, or None if it
        is beyond their dtype: comparing them would wrap it around, -100 to 156.
    """
    if labels.dtype.is_floating_point:
        whole = (labels == labels.trunc()) & (labels.abs() < 2**30)
        labels = torch.where(whole, labels, 0).to(torch.int32).masked_fill(~whole, NOT_WHOLE)
    labels = labels.to(_WIDER.get(labels.dtype, labels.dtype))
    limits = torch.iinfo(labels.dtype)
    if ignore_index is not None and not limits.min <= ignore_index <= limits.max:
        ignore_index = None
    return labels.squeeze(1) if labels.ndim == ndim + 1 else labels, ignore_index


def indices_of_one_hot(labels: torch.Tensor) -> torch.Tensor:
    """(N, H, W) class indices of (N, C, H, W) one-hot labels; :data:`NOT_WHOLE` where a pixel is not one-hot."""
    ones = labels == 1
    one_hot = (ones | (labels == 0)).all(1) & (ones.sum(1) == 1)
    return ones.to(torch.uint8).argmax(1).masked_fill(~one_hot, NOT_WHOLE)


def cannot_raise(x: torch.Tensor) -> bool:
    """Whether values cannot be read now: of meta tensors, under torch.compile and torch.func, and while a CUDA graph is
    captured."""
    if x.is_meta or torch.compiler.is_compiling() or transformed():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def raise_for_wrong(count: int, greatest: int, classes: int) -> None:
    """Raises ``ValueError`` if the ``count`` of labels out of range is not zero; ``greatest`` is one of them."""
    if count and greatest == NOT_WHOLE:
        raise ValueError(f"{count} labels are neither whole numbers nor one-hot; expected 0 to {classes - 1}")
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
