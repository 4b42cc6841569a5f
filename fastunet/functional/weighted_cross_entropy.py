"""Cross-entropy with a weight of each pixel, in plain PyTorch on every device: the fused sums have none."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from fastunet.functional._checks import check_tensors, processes_of
from fastunet.functional.dice_arguments import validated
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

    Soft targets t have ``sum w(x) t_c(x) nll_c(x) / sum w(x) t_c(x)``, over the classes c too, as in the fused loss.

    Args:
        logits: (N, C, H, W), or any number of pixel axes.
        labels: in any form that :func:`fastunet.functional.dice.dice_cross_entropy` takes; a pixel whose label is out
            of range counts nowhere.
        pixel_weights: (N, H, W) or (N, 1, H, W), not negative.
        ignore_index, label_smoothing, sync, process_group, grad_reduction: as in
            :func:`fastunet.functional.dice.dice_cross_entropy`.

    Returns:
        A scalar in float32 (float64 for float64 logits); 0 if all weights are 0.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_tensors("weighted_cross_entropy", logits=logits, labels=labels, weight=pixel_weights)
    targets, _, ignore_index = validated(logits, labels, None, ignore_index, check_labels=False)
    pixels = (logits.shape[0], *logits.shape[2:])
    if tuple(pixel_weights.shape) not in (pixels, (pixels[0], 1, *pixels[1:])):
        raise ValueError(f"pixel_weights have shape {tuple(pixel_weights.shape)}; expected {pixels}, as the logits")
    if pixel_weights.device != logits.device:
        raise ValueError(f"pixel_weights are on {pixel_weights.device}, logits on {logits.device}")
    z = logits.flatten(2).to(sum_dtype(logits))
    if z.shape[1] == 1:  # sigmoid(z) is the softmax of (0, z)
        z = torch.cat([torch.zeros_like(z), z], 1)
    weights = pixel_weights.reshape(pixels).flatten(1)
    if targets.ndim == 3:
        soft = targets.to(z.dtype)
        soft = torch.cat([1 - soft, soft], 1) if soft.shape[1] == 1 else soft
        mass = weights * soft.sum(1)
    else:
        counted = (targets >= 0) & (targets < z.shape[1])
        if ignore_index is not None:
            counted &= targets != ignore_index
        soft = torch.where(counted, targets, 0).long()
        mass = weights = torch.where(counted, weights, 0).to(z.dtype)
    nll = F.cross_entropy(z, soft, reduction="none", label_smoothing=label_smoothing)
    total, mass = (weights * nll).sum(), mass.sum()
    if sync:
        processes = processes_of(process_group, "sync=True")
        sums = torch.stack([total.detach(), mass])
        torch.distributed.all_reduce(sums, group=process_group)
        # The value is that of all processes, the gradient that of this one's pixels.
        total = sums[0] + (total - total.detach()) * (processes if grad_reduction == "mean" else 1)
        mass = sums[1]
    return total / torch.where(mass == 0, 1, mass)
