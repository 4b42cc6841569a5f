"""Cross-entropy with a weight of each pixel, in plain PyTorch on every device: the fused sums have none."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from fastunet.functional._checks import check_tensors, processes_of
from fastunet.functional.dice_arguments import class_indices
from fastunet.functional.dice_cpu import sum_dtype


def weighted_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    pixel_weights: torch.Tensor,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    sync: bool = False,
    process_group: Any = None,
    grad_reduction: str = "mean",
) -> torch.Tensor:
    """``sum w(x) nll(x) / sum w(x)`` over the pixels x that count, with nll the cross-entropy of a pixel.

    Args:
        logits: (N, C, H, W), or any number of pixel axes, C at least 2.
        labels: (N, H, W) class indices; a pixel whose label is out of range counts nowhere.
        pixel_weights: (N, H, W), not negative.
        ignore_index, label_smoothing, sync, process_group, grad_reduction: as in
            :func:`fastunet.functional.dice.dice_cross_entropy`.

    Returns:
        A scalar in float32 (float64 for float64 logits); 0 if all weights are 0.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_tensors("weighted_cross_entropy", logits=logits, labels=labels, weight=pixel_weights)
    pixels = (logits.shape[0], *logits.shape[2:])
    for name, given in (("labels", labels), ("pixel_weights", pixel_weights)):
        if tuple(given.shape) != pixels:
            raise ValueError(f"{name} have shape {tuple(given.shape)}; expected {pixels}, as the logits")
    if logits.shape[1] < 2 or labels.dtype.is_floating_point:
        raise ValueError(f"{logits.shape[1]} logits and {labels.dtype} labels; pixel weights take classes, at least 2")
    if pixel_weights.device != logits.device:
        raise ValueError(f"pixel_weights are on {pixel_weights.device}, logits on {logits.device}")
    labels, ignore_index = class_indices(labels, len(pixels), ignore_index)
    counted = (labels >= 0) & (labels < logits.shape[1])
    if ignore_index is not None:
        counted &= labels != ignore_index
    logits = logits.to(sum_dtype(logits))
    targets = torch.where(counted, labels, 0).long()
    nll = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    weights = torch.where(counted, pixel_weights, 0).to(logits.dtype)
    total, mass = (weights * nll).sum(), weights.sum()
    if sync:
        processes = processes_of(process_group, "sync=True")
        sums = torch.stack([total.detach(), mass])
        torch.distributed.all_reduce(sums, group=process_group)
        # The value is that of all processes, the gradient that of this one's pixels.
        total = sums[0] + (total - total.detach()) * (processes if grad_reduction == "mean" else 1)
        mass = sums[1]
    return total / torch.where(mass == 0, 1, mass)
